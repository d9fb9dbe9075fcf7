"""Predict the mean colour of hidden patches: the smallest method, which shows what one has to bring.

python tests/toy_method.py config.yaml a.b=c [--dry-run | --print-config | --export]
"""

from utils import add_training_options, command_line

with command_line(__doc__, __name__) as parser:
    add_training_options(parser)

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import nn

from config import DEFAULT_PRETRAIN_CONFIG, PretrainingImagesConfig, TrainingConfig, load_config
from data import PretrainLoader
from distributed import mean_over_ranks
from keys import answer
from masking import MaskPlan, PatchMasks, Uniform
from model import Features
from optim import make_adamw, scheduled, set_rates_
from training import Run, TrainState, describe, run_command
from utils import ending_in_words, setup_logging


@dataclass(frozen=True)
class ToyModelConfig:
    patch_size: int
    embed_dim: int
    in_chans: int


@dataclass(frozen=True)
class ToyConfig(TrainingConfig):
    EXPORTS = ("student",)

    data: PretrainingImagesConfig
    model: ToyModelConfig


def write_config(path: Path, images: Path) -> None:
    """A configuration of the toy that trains on a folder of images: the default one without what is CAPI's."""
    content = yaml.safe_load(DEFAULT_PRETRAIN_CONFIG.read_text())
    own = {
        "optim": (
            "start",
            "weight_decay",
            "patch_embed_lr_mult",
            "rope_lr_mult",
            "layernorm_wd_mult",
            "momentum_schedule",
        ),
        "data": ("mask_ratio", "prediction_subsampling", "masking_generator", "masking_generator_kwargs"),
    }
    for section, keys in own.items():
        for key in keys:
            del content[section][key]
    del content["capi"]
    content["model"] = {"patch_size": 4, "embed_dim": 8, "in_chans": 3}
    content["data"] |= {"dataset": str(images), "images_size": 16}
    content["evals"] = None
    path.write_text(yaml.safe_dump(content))


class Backbone(nn.Module):
    """Every patch is a token, and a hidden one the same everywhere; tokens are mixed with their mean."""

    forward_methods = ("tokens",)

    def __init__(self, patch_size, embed_dim, in_chans=3):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.mask_token = nn.Parameter(torch.empty(embed_dim))
        self.mix = nn.Linear(embed_dim, embed_dim)

    def init_weights(self):
        self.patch_embed.reset_parameters()
        self.mix.reset_parameters()
        nn.init.normal_(self.mask_token)

    def tokens(self, images, hidden=None):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [b, n, d]
        if hidden is not None:
            x = x.flatten(0, 1).index_copy(0, hidden, self.mask_token.expand(len(hidden), -1)).view_as(x)
        return x + self.mix(F.gelu(x - x.mean(1, keepdim=True)))

    def forward(self, images):
        x = self.tokens(images)
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        return Features(x.mean(1), x[:, :1], x.unflatten(1, grid))


class Head(nn.Linear):
    def init_weights(self):
        self.reset_parameters()


class ToyState(TrainState):
    def __init__(self, cfg, device, *, plain=False):
        super().__init__(cfg, device, plain=plain)
        size = (cfg.model.patch_size, cfg.model.embed_dim, cfg.model.in_chans)
        self.student = self.place(lambda: nn.ModuleDict({"backbone": Backbone(*size), "head": Head(size[1], size[2])}))
        self.modules = {"student": self.student}
        self.optimizers = {"student": (self.student, make_adamw(self.student, cfg.optim.optimizer, cfg.optim.betas))}

    @torch.no_grad()
    def encode(self, images):
        return self.student["backbone"].tokens(images)


def train_step(state, batches, lr):
    set_rates_(state.optimizers["student"][1], lr, 0.0)
    state.zero_grad()
    total = torch.zeros((), device=state.device)
    for batch in batches:
        hidden = batch.masks["predict_indices"]
        colours = F.avg_pool2d(batch.images, state.student["backbone"].patch_size).flatten(2).transpose(1, 2)
        predicted = state.student["head"](state.student["backbone"].tokens(batch.images, hidden).flatten(0, 1)[hidden])
        loss = F.mse_loss(predicted, colours.flatten(0, 1)[hidden]) / len(batches)
        state.backward(loss)
        total += loss.detach()
    return mean_over_ranks({"loss": total}) | state.apply_gradients()[1]


def make_loader(cfg, **place):
    grid = cfg.data.images_size // cfg.model.patch_size
    masks = PatchMasks(MaskPlan(grid, grid, 0.5, 1.0), Uniform(), cfg.train.seed)
    size = {"batch_size": cfg.optim.batch_size_per_gpu, "num_workers": cfg.efficiency.dataloader_num_workers}
    return PretrainLoader(cfg.data, masks, seed=cfg.train.seed, **size, **place)


def train(cfg, output_dir, device):
    state = ToyState(cfg, device)
    with Run(
        cfg, state, output_dir, make_loader=functools.partial(make_loader, cfg), encode=state.encode,
        log_line=lambda values: f"colour {values['loss']:.3f}", finite=("loss", "grad_norm"), flops_per_image=1.0,
        opening="a toy",
    ) as run:  # fmt: skip
        while not run.is_over():
            lr = scheduled(cfg.optim.lr_schedule, state.step, cfg.optim.total_iters)
            scalars = train_step(state, run.next_batches(), lr)
            state.step += 1
            run.count(scalars, {"lr": lr})
            run.log()
            run.save()
            run.evaluate()
    run.export()


def __model_loader__(pretrained_weights):  # noqa: N807  # the name that evaluations look for
    """For the evaluations: the exported backbone."""
    weights = torch.load(pretrained_weights, weights_only=True)
    model = Backbone(
        weights["backbone.patch_embed.weight"].shape[-1],
        len(weights["backbone.mask_token"]),
        weights["backbone.patch_embed.weight"].shape[1],
    )
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")})
    return model


@ending_in_words
def main(arguments=None):
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    answer(args, ToyConfig, args.sources)
    cfg = load_config(ToyConfig, None, args.sources)
    return run_command(
        args,
        cfg,
        dry_run=lambda cfg: describe(
            cfg, functools.partial(make_loader, cfg), sizes=["a toy"], costs=[], schedule=[], warnings=[]
        ),
        train=train,
        make_state=functools.partial(ToyState, plain=True),
    )


if __name__ == "__main__":
    sys.exit(main())
