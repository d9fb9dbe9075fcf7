"""Training on top of a backbone: what fine-tuning has in common, whatever its task.

A task is a script: finetune_classification.py, finetune_segmentation.py, finetune_detection.py. It has its
configuration, makes batches of images and labels, a head, and a loss. Around it is what every training has
(training.py). The backbone is any model of the evaluations' contract, see README.md.

A finished training exports `model.pth`: `backbone.*` and `head.*`, with its configuration beside it. This file is also
a model file of the evaluations, whose loader reads such exports; eval_finetuned.py scores their predictions.
"""

import argparse
import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from checkpoint import SavedState
from config import (
    BETWEEN_0_AND_1,
    COUNT,
    IMAGE_MEAN,
    IMAGE_STD,
    LOADER_KWARGS,
    NOT_NEGATIVE,
    EpochsConfig,
    EpochsImagesConfig,
    EpochsOptimConfig,
    TrainingConfig,
    load_config,
    read_yaml,
    require,
    section_of,
    within,
)
from data import Batch, PretrainLoader, normalizer
from distributed import mean_over_ranks
from evaluation import FrozenModel, Results, find_loader, load_model_file
from keys import answer
from model import Backbone, Features, Residual, RotaryEmbedding, draw_drop_path, linear_rates
from optim import Multipliers, ema_update_, make_adamw, scheduled, set_rates_
from report import Panel
from sheets import Column
from training import (
    Run,
    TrainState,
    chosen_checkpoint,
    config_in,
    describe,
    global_batch_size,
    milestones,
    run_command,
    sent_to,
    warn_of_another_course,
    with_length,
)
from utils import Normalisation, UserError, ending_in_words, import_from_path, setup_logging
from weights import load_strictly, read_state_dict

logger = logging.getLogger("finetuning")

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "finetune" / "default.yaml"

# --- Knobs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackboneConfig:
    """The model that is trained on, as the evaluations take it."""

    model_path: str
    """Python file with `__model_loader__(**model_loader_kwargs)`, such as model.py or baselines/dinov2_loader.py."""
    model_loader_kwargs: dict[str, Any] = field(metadata=LOADER_KWARGS)
    """Arguments of the loader, such as `pretrained_weights`."""
    image_mean: tuple[float, float, float] | None = field(metadata=IMAGE_MEAN)
    """Mean of the RGB channels, in [0, 1], which is subtracted. null: what the backbone was trained with, where it says
    so, else ImageNet's; the training writes the numbers."""
    image_std: tuple[float, float, float] | None = field(metadata=IMAGE_STD)
    """Deviation of the RGB channels, in units of [0, 1], by which they are divided; null likewise."""
    drop_path_rate: float = field(metadata=within(at_least=0, below=1))
    """Probability that a branch of the last block is skipped for an image; it rises linearly from 0 at the first."""
    relative_position_bias: bool
    """Let attention learn an offset for each relative position and head, from 0 on, with a backbone that has
    `add_relative_positions`. Images then have the size of training, also for predictions."""
    freeze: bool
    """Train the head alone."""
    architecture: str | None
    """Written by the training: the class that builds the backbone again, and its arguments, without its first weights.
    null: only the loader can."""
    arguments: dict[str, Any]
    """Written by the training: arguments of that class."""

    @property
    def normalisation(self) -> Normalisation:
        """What 8-bit images go through, once it is known."""
        assert self.image_mean is not None and self.image_std is not None, "ask the backbone: with_normalisation_of"
        return Normalisation(mean=self.image_mean, std=self.image_std)


@dataclass(frozen=True)
class FinetuneOptimConfig(EpochsOptimConfig):
    """Length, batch, and the optimizer."""

    weight_decay: float = field(metadata=NOT_NEGATIVE)
    """Of matrices and convolutions; biases, norms, positions and tokens have none."""
    layer_decay: float = field(metadata=within(above=0, at_most=1))
    """A block learns at this times the rate of the next one; the head at the full rate. 1: all at the same rate."""
    ema_momentum: float | None = field(metadata=BETWEEN_0_AND_1)
    """Also keep a moving average of the weights, with m in average = m * average + (1 - m) * weights; it is what is
    exported then. null for none."""


@dataclass(frozen=True)
class FinetuneImagesConfig(EpochsImagesConfig):
    """Images and crops; these are squares."""

    images_size: int = field(metadata=COUNT)
    """Side of the square crop in pixels, a multiple of the backbone's patch size. Other shapes are for pretraining."""


@dataclass(frozen=True)
class FinetuneConfig(EpochsConfig):
    """What every fine-tuning reads; a task adds its sections."""

    EXPORTS: ClassVar[tuple[str, ...]] = ("model",)
    SECTION: ClassVar[str]
    """Name of the section that the task alone has."""

    optim: FinetuneOptimConfig
    data: FinetuneImagesConfig
    backbone: BackboneConfig
    classes: list[str]
    """Written by the training: what the outputs of the head are, in their order."""

    def __post_init__(self) -> None:
        """Check what all trainings do; images of an epoch are counted once the data are open, if they are not given."""
        TrainingConfig.__post_init__(self)

    def as_begun(self, saved: Mapping[str, Any]) -> Self:
        """The configuration with what a training found out when it began: backbone, classes and number of images.

        So neither the weights with which it began need be there any more, nor, to export it, the images.

        Args:
            saved: that of its checkpoint, as nested dicts; sections may be missing.
        """
        backbone = section_of(saved, "backbone")
        known = {name: backbone[name] for name in ("architecture", "arguments") if name in backbone}
        for name in ("image_mean", "image_std"):
            if getattr(self.backbone, name) is None and backbone.get(name) is not None:
                known[name] = tuple(backbone[name])
        num_images = self.data.images_per_epoch or section_of(saved, "data").get("images_per_epoch")
        return replace(
            self,
            backbone=replace(self.backbone, **known),
            classes=self.classes or saved.get("classes", []),
            data=replace(self.data, images_per_epoch=num_images),
        )

    def as_trained(self, saved: Mapping[str, Any]) -> Self:
        """Also `as_begun`."""
        return super().as_trained(saved).as_begun(saved)


FinetuneT = TypeVar("FinetuneT", bound=FinetuneConfig)


def lr_at(step: int, cfg: FinetuneConfig) -> float:
    """Learning rate of the head in the update after `step` finished ones."""
    return scheduled(cfg.optim.lr_schedule, step, cfg.optim.total_iters)


# --- The backbone ----------------------------------------------------------------------------------------------------


def build_backbone(cfg: BackboneConfig, image_size: int, *, with_weights: bool) -> nn.Module:
    """The backbone, in training mode.

    Args:
        cfg: what to build.
        image_size: side of the images that it is trained on.
        with_weights: with those of its loader; else any, for a checkpoint or an export to fill, whose files may be all
            that is left of it.

    Raises: UserError from the loader.
    """
    if not with_weights and cfg.architecture is not None:
        backbone = architecture_named(cfg.architecture)(**cfg.arguments)
    else:
        backbone = load_model_file(cfg.model_path, cfg.model_loader_kwargs) if with_weights else _rebuilt(cfg)
        if cfg.relative_position_bias:
            add = getattr(backbone, "add_relative_positions", None)
            remedy = f"{type(backbone).__name__} of {cfg.model_path} has no add_relative_positions; set it to false"
            require(add is not None, "backbone.relative_position_bias", True, remedy)
            patch_size: Any = backbone.patch_size
            add(image_size // patch_size)  # pyright: ignore[reportOptionalCall]
    bands = getattr(backbone, "in_chans", 3), getattr(backbone, "normalisation", Normalisation()).value_range
    if bands != (3, None):
        raise UserError(
            f"backbone.model_loader_kwargs={cfg.model_loader_kwargs}: the model takes {bands[0]} bands with "
            f"data.value_range={bands[1]}, and fine-tuning gives it 8-bit RGB; give a model that was trained on that, "
            "or evaluate this one frozen: eval_classification.py and eval_segmentation.py give it its bands"
        )
    backbone.requires_grad_(True)  # a loader may have frozen it, for evaluations
    for part in backbone.modules():
        if isinstance(part, Backbone) and isinstance(table := getattr(part, "pos_embed", None), Tensor):
            table.requires_grad_(False)  # sines and cosines
        if isinstance(part, Residual):  # stochastic depth is that of `Trunk`, whose draws can be repeated
            part.keep_prob = 1.0
        if isinstance(part, RotaryEmbedding):
            part.requires_grad_(False)
    return backbone.train()


def _rebuilt(cfg: BackboneConfig) -> nn.Module:
    """What the loader builds without weights, or with those that it began with if it takes no `pretrained`."""
    kwargs = dict(cfg.model_loader_kwargs)
    if "pretrained" in loader_arguments(cfg):
        weights = kwargs.pop("pretrained_weights", None)
        if weights is not None and "config_path" in loader_arguments(cfg):
            kwargs.setdefault("config_path", str(config_beside(weights)))
        return load_model_file(cfg.model_path, kwargs | {"pretrained": False})
    try:
        return load_model_file(cfg.model_path, kwargs)
    except (OSError, UserError) as error:
        raise UserError(
            f"backbone.model_path={cfg.model_path}: its loader takes no `pretrained`, so that exports need what it was "
            f"called with, {kwargs}: {error}; put that back, or let the loader take `pretrained`, False of which gives "
            "a model without weights"
        ) from error


def loader_arguments(cfg: BackboneConfig) -> set[str]:
    """Names of what the loader takes; `pretrained=False` asks for a model without weights."""
    return set(inspect.signature(find_loader(cfg.model_path)).parameters)


def config_beside(weights: str | Path) -> Path:
    """The configuration of an export, which has the same name."""
    return Path(str(weights)).with_suffix(".yaml")


def with_architecture(cfg: FinetuneT, backbone: nn.Module) -> FinetuneT:
    """The configuration that says how to build the backbone again, for one of this repository."""
    kind = type(backbone)
    if not isinstance(backbone, Backbone) or not _is_ours(kind.__module__):
        return cfg
    built = {"architecture": f"{kind.__module__}.{kind.__qualname__}", "arguments": _plain(backbone.arguments)}
    return replace(cfg, backbone=replace(cfg.backbone, **built))


def with_normalisation_of(cfg: FinetuneT, backbone: nn.Module) -> FinetuneT:
    """The configuration with the backbone's own mean and deviation where it has none."""
    own = getattr(backbone, "normalisation", Normalisation())
    own_numbers = {"image_mean": own.mean, "image_std": own.std}
    unset = {key: numbers for key, numbers in own_numbers.items() if getattr(cfg.backbone, key) is None}
    return replace(cfg, backbone=replace(cfg.backbone, **unset))


def architecture_named(architecture: str) -> type[Backbone]:
    """The class that `with_architecture` named.

    A configuration may come from anyone, and what it names is called: nothing but a backbone of this repository.

    Raises: UserError if it is something else.
    """
    module, _, name = architecture.rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if _is_ours(module) else None
    is_backbone = isinstance(kind, type) and issubclass(kind, Backbone)
    remedy = "is no backbone of this repository; set it to null, and give the loader in backbone.model_path"
    require(is_backbone, "backbone.architecture", architecture, remedy)
    assert isinstance(kind, type)
    return kind


def _is_ours(module: str) -> bool:
    return module.isidentifier() and Path(__file__).with_name(f"{module}.py").is_file()


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


BRANCHES = (("attn", "mlp"), ("attention", "mlp"), ("residual1", "residual2"), ("dropout1", "dropout2"))
"""Names of the two residual branches of a transformer block, or of what is last in them."""


def branches(block: nn.Module) -> list[nn.Module] | None:
    """The attention and the MLP of a transformer block, what they give being added to the tokens; None of another."""
    children = dict(block.named_children())
    for first, second in BRANCHES:
        if first in children and second in children:
            found = (children[first], children[second])
            return [part.fn if isinstance(part, Residual) else part for part in found]
    return None


class Trunk:
    """A backbone's blocks, from outside: feature maps after them, their depth, and stochastic depth.

    Args:
        backbone: whose first list of transformer blocks is its encoder.
        drop_path_rate: see `BackboneConfig`.

    Raises: UserError if it has no such list.
    """

    def __init__(self, backbone: nn.Module, drop_path_rate: float = 0.0) -> None:
        self.backbone = backbone
        self.patch_size: int = backbone.patch_size  # pyright: ignore[reportAttributeAccessIssue]
        self.name, self.blocks = self._find_blocks()
        for block in self.blocks:  # by which weights are divided and recomputed
            block.__dict__.setdefault("is_transformer_block", True)
        self.rates = linear_rates(drop_path_rate, len(self.blocks))
        self._factors: Tensor | None = None
        if drop_path_rate:
            for i, block in enumerate(self.blocks):
                for j, branch in enumerate(branches(block) or ()):
                    branch.register_forward_hook(functools.partial(self._drop, i, j))

    def _find_blocks(self) -> tuple[str, list[nn.Module]]:
        for name, part in self.backbone.named_modules():
            if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) and all(map(branches, part)):
                return name, list(part)
        named = " or ".join(" and ".join(names) for names in BRANCHES)
        raise UserError(
            f"backbone.model_path: {type(self.backbone).__name__} has no list of transformer blocks whose branches are "
            f"called {named}; choose a vision transformer"
        )

    @property
    def final_norm(self) -> nn.LayerNorm | None:
        """The `LayerNorm` with weights that the backbone has after its blocks; None if it has none."""
        path = self.name.split(".")
        for depth in reversed(range(len(path))):  # beside the blocks, else beside what holds them, and so on outwards
            children = dict(self.backbone.get_submodule(".".join(path[:depth])).named_children())
            after = list(children.values())[list(children).index(path[depth]) + 1 :]
            for part in after:
                if isinstance(part, nn.LayerNorm):
                    return part if part.elementwise_affine else None
        return None

    def _drop(self, block: int, branch: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Scale what a branch gives: 0 for images that skip it, 1 / probability to be kept for others."""
        if self._factors is None:
            return output
        if isinstance(output, tuple):
            return (self._drop(block, branch, _module, _args, output[0]), *output[1:])
        return output * self._factors[block, branch].view(-1, *[1] * (output.ndim - 1)).to(output.dtype)

    def draw_drop_path(self, num_images: int, generator: torch.Generator, device: torch.device) -> None:
        """Decide which images skip which branches until the next draw, forward and backward pass alike."""
        factors = draw_drop_path(self.rates, num_images, generator)
        self._factors = None if factors is None else sent_to(device, factors)

    @contextmanager
    def keeping_all(self) -> Iterator[None]:
        """Skip nothing, for predictions."""
        before, self._factors = self._factors, None
        try:
            yield
        finally:
            self._factors = before

    def maps(
        self, images: Float[Tensor, "b 3 h w"], blocks: Sequence[int], *, norm: bool = False
    ) -> list[Float[Tensor, "b d rows columns"]]:
        """Patch tokens after chosen blocks, which ascend; the first block is 0, -1 is the last.

        Args:
            images: normalised; both sides are multiples of the patch size.
            blocks: which ones.
            norm: put them through the final norm, for the last block only.

        Raises: UserError for a block that there is not.
        """
        depth = len(self.blocks)
        wrong = [block for block in blocks if not -depth <= block < depth]
        require(not wrong, "blocks", list(blocks), f"the backbone has {depth} blocks, 0 to {depth - 1}")
        chosen = [block % depth for block in blocks]
        if isinstance(self.backbone, Backbone):
            return list(self.backbone.get_intermediate_layers(images, chosen, reshape=True, norm=norm))
        assert not norm or chosen == [depth - 1]
        outputs: dict[int, Tensor] = {}
        hooks = [self.blocks[i].register_forward_hook(functools.partial(_keep, outputs, i)) for i in chosen]
        try:
            _, _, feature_map = self.backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        if norm:
            return [feature_map.movedim(-1, 1)]
        rows, columns = feature_map.shape[1:3]
        # Class token and registers come first, in every transformer that the evaluations know.
        return [outputs[i][:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns)) for i in chosen]

    def layer_of(self, name: str) -> int:
        """How deep a parameter of the backbone is: 0 for the embedding, i + 1 for block i, then for what follows.

        The rule of BEiT (arXiv:2106.08254); with a decay the embedding learns slowest. Relative positions that all
        blocks share belong to what follows.
        """
        prefix = f"{self.name}."
        if name.startswith(prefix):
            return int(name.removeprefix(prefix).partition(".")[0]) + 1
        if "rel_pos_bias" in name.split("."):
            return len(self.blocks) + 1
        names = [name for name, _ in self.backbone.named_parameters()]
        first_of_blocks = next(i for i, other in enumerate(names) if other.startswith(prefix))
        return 0 if names.index(name) < first_of_blocks else len(self.blocks) + 1


def _keep(outputs: dict[int, Tensor], block: int, _module: nn.Module, _args: Any, output: Any) -> None:
    outputs[block] = output[0] if isinstance(output, tuple) else output


def layer_scales(depth: int, decay: float) -> list[float]:
    """What the learning rates of the layers of `Trunk.layer_of` are multiplied by; the last one is the head's, 1."""
    return [decay ** (depth + 1 - layer) for layer in range(depth + 2)]


def decayed_multipliers(model: nn.ModuleDict, trunk: Trunk, layer_decay: float) -> dict[str, Multipliers]:
    """Multipliers of every parameter of `model` by name: rates fall with depth; no weight decay on what has one axis,
    on positions and on tokens."""
    scales = layer_scales(len(trunk.blocks), layer_decay)
    result = {}
    for name, parameter in model.named_parameters():
        part, _, own = name.partition(".")
        layer = trunk.layer_of(own) if part == "backbone" else len(trunk.blocks) + 1
        last = own.rpartition(".")[2]
        is_matrix = parameter.ndim > 1 and not any(word in last for word in ("token", "pos_embed", "registers"))
        result[name] = Multipliers(scales[layer], float(is_matrix))
    return result


@torch.enable_grad()
def freeze_unused_(backbone: nn.Module, maps: Callable[[Tensor], Sequence[Tensor]], image_size: int) -> None:
    """Let go of the parameters that the head's inputs do not depend on, such as a predictor's.

    Args:
        backbone: changed in place.
        maps: what the head reads, of normalised images.
        image_size: of an image to try it with.

    Raises: UserError if they depend on none.
    """
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    total = sum((x.float().sum() for x in maps(torch.zeros(1, 3, image_size, image_size))), torch.zeros(()))
    if not total.requires_grad:
        raise UserError(
            f"backbone.model_path: what {type(backbone).__name__} gives has no gradient, as under torch.no_grad(); "
            "change that in its file, or train the head alone with backbone.freeze=true"
        )
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def stacked(crops: Sequence[tuple[Tensor, Any]], sample_ids: Sequence[int], bad: list[tuple[str, str]]) -> Batch:
    """A batch of images of one size, with a label each: a number, or a tensor of one shape; see `data.Maker.batch`."""
    images, labels = zip(*crops, strict=True)
    label = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return Batch(torch.stack(images), {}, torch.tensor(sample_ids), bad=bad, labels={"label": label})


# --- State and step --------------------------------------------------------------------------------------------------

Loss = Callable[[nn.ModuleDict, Trunk, Batch, torch.Generator], Mapping[str, Tensor]]
"""Of the model and a normalised batch: named losses, whose sum is learned from. The generator, of the CPU, is for what
is random in it, and torch's global one is seeded alike."""


class FinetuneState(TrainState[FinetuneConfig]):
    """Everything a checkpoint holds: `model` {backbone, head}, and with optim.ema_momentum its average `model_ema`.

    Args:
        cfg: of the training.
        device: where it runs.
        make_head: the task's head for a backbone.
        head_inputs: what the head reads of normalised images, from the trunk.
        with_weights: whether the backbone begins with those of its loader.
        plain: see `TrainState`.
    """

    MAIN = "model"
    MODEL_KEYS = ("backbone.architecture", "backbone.arguments", "classes")

    def __init__(
        self,
        cfg: FinetuneConfig,
        device: torch.device,
        *,
        make_head: Callable[[Trunk], nn.Module],
        head_inputs: Callable[[Trunk, Tensor], Sequence[Tensor]],
        with_weights: bool,
        plain: bool = False,
    ) -> None:
        super().__init__(cfg, device, plain=plain)
        self.trunk, self.model = self._make(make_head, head_inputs, with_weights)
        self.modules = {"model": self.model}
        self.head_inputs = head_inputs
        if cfg.optim.ema_momentum is not None:
            self.trunk_ema, self.model_ema = self._make(make_head, head_inputs, False, is_average=True)
            ema_update_(self.model_ema, self.model, 0.0)
            self.modules["model_ema"] = self.model_ema
        by_name = decayed_multipliers(self.model, self.trunk, cfg.optim.layer_decay)
        self.optimizer = make_adamw(self.model, cfg.optim.optimizer, cfg.optim.betas, by_name)
        self.optimizers = {"model": (self.model, self.optimizer)}

    def _make(
        self,
        make_head: Callable[[Trunk], nn.Module],
        head_inputs: Callable[[Trunk, Tensor], Sequence[Tensor]],
        with_weights: bool,
        *,
        is_average: bool = False,
    ) -> tuple[Trunk, nn.ModuleDict]:
        cfg = self.cfg
        backbone = build_backbone(cfg.backbone, cfg.data.images_size, with_weights=with_weights)
        is_learned = not (is_average or cfg.backbone.freeze)
        trunk = Trunk(backbone, cfg.backbone.drop_path_rate if is_learned else 0.0)
        if cfg.backbone.freeze:
            backbone.requires_grad_(False)
        else:
            freeze_unused_(backbone, functools.partial(head_inputs, trunk), probe_size(cfg, trunk))
        model = nn.ModuleDict({"backbone": backbone, "head": make_head(trunk)})
        placed = self.place(lambda: model, "do_student", compiles_blocks=True, is_teacher=is_average, is_filled=True)
        return trunk, placed

    def network(self, name: str) -> Any:
        """The model, or its average where there is one."""
        return self.modules[name if self.cfg.optim.ema_momentum is None else f"{name}_ema"]

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """The backbone's patch features."""
        self.model.eval()
        with (
            torch.no_grad(),
            self.trunk.keeping_all(),
            torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            features = self.trunk.maps(images, [-1], norm=True)[0].flatten(2).transpose(1, 2)
        self.model.train()
        return features


def probe_size(cfg: FinetuneConfig, trunk: Trunk) -> int:
    """Side of an image to try a backbone with: a small one, if it takes any size."""
    size = cfg.data.images_size
    require(
        size % trunk.patch_size == 0,
        "data.images_size",
        size,
        f"must be a multiple of the backbone's patches of {trunk.patch_size} pixels; the nearest is "
        f"{max(1, round(size / trunk.patch_size)) * trunk.patch_size}",
    )
    takes_any = isinstance(trunk.backbone, Backbone) and not cfg.backbone.relative_position_bias
    return min(size, 4 * trunk.patch_size) if takes_any else size


def train_step(state: FinetuneState, batches: Sequence[Batch], lr: float, loss: Loss) -> dict[str, Tensor]:
    """One update. Returns detached scalars, still on the device.

    Args:
        state: changed in place.
        batches: normalised images and labels of the accumulation steps, on the device.
        lr: learning rate of the head in this update.
        loss: of the task.
    """
    cfg = state.cfg
    set_rates_(state.optimizer, lr, cfg.optim.weight_decay)
    state.zero_grad()
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        seed = state.seed_of("fine-tuning", number)
        torch.manual_seed(seed)  # of what a backbone or a head draws by itself
        generator = torch.Generator().manual_seed(seed)
        state.trunk.draw_drop_path(len(batch.images), generator, state.device)
        with torch.autocast(state.device.type, state.dtype, enabled=state.dtype != torch.float32):
            parts = loss(state.model, state.trunk, batch, generator)
        whole = torch.stack([part.float() for part in parts.values()]).sum()
        state.backward(whole / len(batches))
        for name, part in ({"loss": whole} | dict(parts)).items():
            totals[name] = totals.get(name, 0) + part.detach() / len(batches)
    updated, norms = state.apply_gradients()
    if updated and cfg.optim.ema_momentum is not None:
        ema_update_(state.model_ema, state.model, cfg.optim.ema_momentum)
        for average, own in zip(state.model_ema.buffers(), state.model.buffers(), strict=True):
            average.copy_(own)
    return mean_over_ranks(totals) | norms


# --- The run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task(Generic[FinetuneT]):
    """What the script of a task brings."""

    schema: type[FinetuneT]
    """Its configuration."""
    defaults: str
    """YAML file of this repository with its own defaults, on top of those that all tasks have in common."""
    open_data: Callable[[FinetuneT], tuple[FinetuneT, Any]]
    """Opens what is trained on; gives the configuration with its classes and their number of images, and the data."""
    make_head: Callable[[FinetuneT, Trunk], nn.Module]
    """Its head for a backbone, with weights to begin with."""
    head_inputs: Callable[[FinetuneT, Trunk, Tensor], Sequence[Tensor]]
    """What the head reads of normalised images, from the trunk."""
    loss: Callable[[FinetuneT], Loss]
    make_loader: Callable[..., PretrainLoader]
    """Of the configuration, the data, and the keyword arguments that say where it runs, as `training.Run` gives."""
    predict: Callable[[FinetuneT, nn.ModuleDict, Trunk, Tensor], Any]
    """What the model says of normalised images."""
    evaluate: Callable[[Any, FrozenModel, Results], None]
    """Scores an exported model, a `Finetuned` in a `FrozenModel`, by the keys of eval_finetuned.py."""
    look: Callable[[FinetuneT, Batch, int], Sequence[Column]]
    """What the contact sheet shows beside crops: the labels of a batch's first so many images, see `sheets.Look`."""
    losses: Mapping[str, str] = field(default_factory=dict)
    """Names of the parts of the loss, and what they are called in curves and in the log; none if it has one part. A
    training may lack some."""
    lr_at: Callable[[int, FinetuneT], float] = lr_at
    """Learning rate of the head in the update after so many finished ones."""


def train(task: Task[FinetuneT], cfg: FinetuneT, data: Any, output_dir: Path, device: torch.device) -> None:
    """Train up to `optim.total_iters` finished updates, or until a signal; continue what is in `output_dir`.

    Args:
        task: what is trained for.
        cfg: with its classes.
        data: what they were found in.
        output_dir: folder of the run.
        device: where it runs.
    """
    checkpoint = chosen_checkpoint(cfg, output_dir)
    cfg = prepared(cfg, checkpoint)
    state = make_state(task, cfg, device, with_weights=checkpoint is None)
    loss = task.loss(cfg)
    with Run(
        cfg,
        state,
        output_dir,
        make_loader=functools.partial(task.make_loader, cfg, data),
        encode=state.encode,
        log_line=functools.partial(log_line, task),
        finite=("loss", "grad_norm"),
        panels=panels(task),
        flops_per_image=None,
        opening=opening(cfg, state),
        on_resume=functools.partial(warn_if_changed, task, cfg=cfg),
        normalize=normalisation(cfg),
        look=functools.partial(task.look, cfg),
    ) as run:
        while not run.is_over():
            lr = task.lr_at(state.step, cfg)
            scalars = train_step(state, run.next_batches(), lr, loss)
            state.step += 1
            run.count(scalars, {"lr": lr})
            run.log()
            run.save()
            run.evaluate()
    run.export()


def normalisation(cfg: FinetuneConfig) -> Callable[[Tensor], Tensor]:
    """From 8-bit images to what the backbone gets."""
    return normalizer(cfg.backbone.normalisation)


def prepared(cfg: FinetuneT, checkpoint: Path | None = None) -> FinetuneT:
    """The configuration with the length, and what is to be known of the backbone, that follow from the rest.

    Args:
        cfg: as the user gave it.
        checkpoint: what the training goes on from, see `FinetuneConfig.as_begun`; None if it begins.
    """
    if saved := config_in(checkpoint):
        cfg = cfg.as_begun(saved)
    elif None in (cfg.backbone.architecture, cfg.backbone.image_mean, cfg.backbone.image_std):
        backbone = build_backbone(cfg.backbone, cfg.data.images_size, with_weights=True)
        cfg = with_normalisation_of(with_architecture(cfg, backbone), backbone)
        if cfg.backbone.architecture is None and "pretrained" in loader_arguments(cfg.backbone):
            again = build_backbone(cfg.backbone, cfg.data.images_size, with_weights=False)
            remedy = "Its loader builds another network with pretrained=False, so that no export could be loaded"
            load_strictly(again, backbone.state_dict(), cfg.backbone.model_path, remedy=remedy)
    return with_length(cfg)


def make_state(
    task: Task[FinetuneT], cfg: FinetuneT, device: torch.device, *, with_weights: bool, plain: bool = False
) -> FinetuneState:
    """A fresh state; its backbone begins with the weights of its loader, or with any, for a checkpoint to fill."""
    return FinetuneState(
        cfg,
        device,
        make_head=functools.partial(task.make_head, cfg),
        head_inputs=functools.partial(task.head_inputs, cfg),
        with_weights=with_weights,
        plain=plain,
    )


def warn_if_changed(task: Task[FinetuneT], saved: SavedState, cfg: FinetuneT) -> None:
    """Warn of keys that shape the rest of the training and are others than at the checkpoint."""
    keys = ("optim", "backbone.drop_path_rate", "backbone.freeze", cfg.SECTION)
    warn_of_another_course(saved, cfg, keys, lambda step, c: {"learning rate": task.lr_at(step, c)})


def panels(task: Task[Any]) -> list[Panel]:
    """The curves of a training's metrics that its reports show."""
    return [
        Panel("Loss", "loss", {"loss": "sum" if task.losses else "", **task.losses}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Learning rate of the head", "learning rate", {"lr": ""}),
    ]


def log_line(task: Task[Any], values: Mapping[str, float]) -> str:
    """How it goes, in a line of the log."""
    parts = [f"{words} {values[name]:.3f}" for name, words in task.losses.items() if name in values]
    return "  ".join([f"loss {values['loss']:.3f}", *parts])


def opening(cfg: FinetuneConfig, state: FinetuneState) -> str:
    """What is trained, in a line of the log."""
    of_backbone, of_head = (
        sum(p.numel() for p in part.parameters() if p.requires_grad) for part in state.model.values()
    )
    return (
        f"{cfg.backbone.model_path}, {len(state.trunk.blocks)} blocks: {of_backbone / 1e6:.1f}M parameters to learn, "
        f"and {of_head / 1e6:.2f}M of the head; {len(cfg.classes)} classes; "
        f"{global_batch_size(cfg.optim)} images per step"
    )


def dry_run(task: Task[FinetuneT], cfg: FinetuneT, data: Any) -> str:
    """What a training with this config would be, without training."""
    cfg = prepared(cfg)
    state = make_state(task, cfg, torch.device("cpu"), with_weights=False, plain=True)
    depth = len(state.trunk.blocks)
    scales = layer_scales(depth, cfg.optim.layer_decay)
    schedule = ["schedule     step         lr of the head   of the first block"]
    for step in milestones(cfg.optim):
        lr = task.lr_at(step, cfg)
        schedule.append(f"             {step:<12} {lr:<16.3g} {lr * scales[1]:.3g}")
    return describe(
        cfg,
        functools.partial(task.make_loader, cfg, data),
        sizes=[
            f"image        {cfg.data.images_size} px, patches of {state.trunk.patch_size} px",
            f"model        {opening(cfg, state)}",
            f"classes      {', '.join(cfg.classes[:10])}{', ...' if len(cfg.classes) > 10 else ''}",
        ],
        costs=[],
        schedule=schedule,
        warnings=[],
        normalize=normalisation(cfg),
        look=functools.partial(task.look, cfg),
    )


# --- As a model of the evaluations -----------------------------------------------------------------------------------


class Finetuned(nn.Module):
    """An exported model: features of its backbone, as the evaluations take them, and predictions of its head.

    Args:
        task: what its script brings.
        cfg: that it was trained with.
    """

    def __init__(self, task: Task[Any], cfg: FinetuneConfig) -> None:
        super().__init__()
        backbone = build_backbone(cfg.backbone, cfg.data.images_size, with_weights=False)
        self.task, self.cfg = task, with_normalisation_of(cfg, backbone)
        self.normalisation = self.cfg.backbone.normalisation
        self.trunk = Trunk(backbone)
        self.patch_size = self.trunk.patch_size
        self.model = nn.ModuleDict({"backbone": backbone, "head": task.make_head(cfg, self.trunk)})

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Features of the backbone."""
        return Features(*self.model["backbone"](images))

    def predict(self, images: Float[Tensor, "b 3 h w"]) -> Any:
        """What the task's `predict` says of normalised images."""
        return self.task.predict(self.cfg, self.model, self.trunk, images)


def load_model(
    pretrained_weights: str | Path | None = None,
    config_path: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> Finetuned:
    """Build an exported model and load its weights: the model loader that evaluations call.

    Args:
        pretrained_weights: path or URL of an export of a fine-tuning. None gives random weights to what `config_path`
            describes.
        config_path: its configuration. None: the file of the same name beside the weights, as exports have it.
        pretrained: False gives random weights also where there is an export, of which only the configuration is read.
        device: where to put the model.

    Returns: the model in eval mode.
    Raises: UserError for a missing file, one that is no such export, or weights that do not fit.
    """
    if config_path is None:
        if pretrained_weights is None:
            raise UserError("pretrained_weights=None: give an export of a fine-tuning, such as runs/mine/model.pth")
        config_path = config_beside(pretrained_weights)
    if not Path(config_path).is_file():
        raise UserError(
            f"pretrained_weights={pretrained_weights}: its configuration {str(config_path)!r} is not there; a training "
            "writes both"
        )
    model = Finetuned(*task_of(Path(config_path)))
    if pretrained_weights is not None and pretrained:
        source = str(pretrained_weights)
        load_strictly(model.model, read_state_dict(source), source, remedy="Give an export of a fine-tuning")
    return model.to(device).eval()


TASKS = ("finetune_classification", "finetune_segmentation", "finetune_detection")
"""Scripts of tasks, by the section of the configuration that each alone has: what follows on the first `_`."""


def default_sources(task: Task[Any]) -> list[str]:
    """The files whose values come before those of a user: what all tasks have in common, and the task's own file."""
    return [str(DEFAULT_CONFIG), str(Path(__file__).parent / task.defaults)]


def load(task: Task[FinetuneT], sources: Sequence[str]) -> FinetuneT:
    """The configuration of a task: what all have in common, its own defaults, and then what the user gives.

    Args:
        task: whose.
        sources: as typed.

    Raises: UserError for what does not fit.
    """
    cfg = load_config(task.schema, DEFAULT_CONFIG, [*default_sources(task)[1:], *sources])
    remedy = "is for pretraining; give backbone.model_path and backbone.model_loader_kwargs"
    require(cfg.train.init_from is None, "train.init_from", cfg.train.init_from, remedy)
    require(not cfg.efficiency.teacher_fp8, "efficiency.teacher_fp8", True, "there is no teacher; set it to false")
    require(cfg.data.decode == "cpu", "data.decode", cfg.data.decode, "labels travel with the images; use cpu")
    return cfg


@ending_in_words
def main(task: Task[Any], parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """The command line of a task.

    Args:
        task: whose.
        parser: with the options of `utils.add_training_options`.
        arguments: as typed; None for those of this process.

    Returns: the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains.
    """
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    answer(args, task.schema, [*default_sources(task), *args.sources])
    cfg, data = load(task, args.sources), None
    if not (args.print_config or args.export):
        cfg, data = task.open_data(cfg)

    return run_command(
        args,
        cfg,
        dry_run=lambda cfg: dry_run(task, cfg, data),
        train=lambda cfg, output_dir, device: train(task, cfg, data, output_dir, device),
        make_state=functools.partial(make_state, task, with_weights=False, plain=True),
        has_kernels=False,
    )


def task_of(config_path: Path) -> tuple[Task[Any], FinetuneConfig]:
    """The task of an exported configuration, and that configuration.

    Raises: UserError if it is that of something else.
    """
    sections = read_yaml(config_path)
    for name in TASKS:
        if isinstance(sections, dict) and name.partition("_")[2] in sections:
            script: Any = import_from_path(Path(__file__).with_name(f"{name}.py"))
            return script.TASK, load(script.TASK, [str(config_path)])
    sections_named = ", ".join(name.partition("_")[2] for name in TASKS)
    raise UserError(f"{config_path} is no configuration of a fine-tuning: it has none of the sections {sections_named}")


__model_loader__ = load_model  # the name that evaluation scripts look for in a model file
