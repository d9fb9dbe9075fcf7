"""Any vision transformer of timm (https://huggingface.co/timm), by timm's own names and with its own downloads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines._shared import Output, library, load_published, patch_grid
from utils import Normalisation, UserError, did_you_mean


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    timm_kwargs: Mapping[str, Any] | None = None,
    state_dict_key: str | None = None,
) -> nn.Module:
    """Build a transformer that has a patch embedding and prefix tokens.

    Args:
        model_name: as `timm.create_model` takes it, for example `vit_small_patch16_224.dino`.
        pretrained_weights: path or URL of a state dict with timm's key names; a classifier in it is left out.
        pretrained: False gives random weights; True without `pretrained_weights` lets timm download those of the tag.
        device: where to put the model.
        timm_kwargs: for `timm.create_model`. The default, `{"dynamic_img_size": True}`, takes any image size.
        state_dict_key: where in the file the state dict is, if not at the top.
    """
    timm = library("timm")
    model_name = model_name.removeprefix("timm/")
    if "/" not in model_name and not timm.is_model(model_name):  # with a slash it is a repository of the hub
        raise UserError(f"model_name={model_name!r} is no model of timm{_suggest(timm, model_name)}")
    kwargs = {"dynamic_img_size": True} if timm_kwargs is None else dict(timm_kwargs)
    downloads = pretrained and pretrained_weights is None
    # timm checks a download strictly only if the classifier is kept; it does not touch the features.
    kwargs |= {"pretrained": True} if downloads else {"pretrained": False, "num_classes": 0}
    try:
        network = timm.create_model(model_name, **kwargs)
    except TypeError as error:
        raise UserError(f"{model_name} does not take timm_kwargs={kwargs}: {error}. Try timm_kwargs={{}}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"timm could not build {model_name} with {kwargs}: {error}") from error
    if not all(hasattr(network, name) for name in ("patch_embed", "num_prefix_tokens", "forward_head")):
        raise UserError(
            f"{model_name} has no patch embedding or no prefix tokens; this loader takes vision transformers"
        )
    network.reset_classifier(0)  # a download has brought one
    path = () if state_dict_key is None else (state_dict_key,)
    source = None if pretrained_weights is None else str(pretrained_weights)
    load_published(network, source, path=path, drop=("head.", "head_dist."))
    # A name without a tag says nothing of how a file of weights was trained.
    is_of_tag = downloads or "." in model_name
    return TimmFeatures(network, network.pretrained_cfg if is_of_tag else {}).to(device).eval()


__model_loader__ = load_model


def _suggest(timm: Any, model_name: str) -> str:
    names = [*timm.list_models(), *timm.list_pretrained()]
    hint = did_you_mean(model_name, names)
    return hint if hint.startswith("; did you mean") else f"; timm.list_models() has {len(names)} names"


class TimmFeatures(nn.Module):
    """timm's pooled features, the registers if there are any, and the map of patch tokens.

    Args:
        network: transformer of timm.
        pretrained_cfg: what timm knows of its weights; with `mean` and `std` images are normalised by these.
    """

    def __init__(self, network: Any, pretrained_cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.network: Any = network
        size = network.patch_embed.patch_size
        self.patch_size = size if isinstance(size, int) else size[0]
        tokens = getattr(network, "reg_token", None)
        self.num_registers = 0 if tokens is None else tokens.shape[1]
        self.normalisation = Normalisation.of({key: pretrained_cfg.get(key) for key in ("mean", "std")})

    def forward(self, images: Float[Tensor, "b c h w"]) -> Output:
        """Features of normalised images; both sides must be multiples of the patch size."""
        grid = patch_grid(images, self.patch_size)
        tokens = self.network.forward_features(images)
        prefix, patches = tokens.split([self.network.num_prefix_tokens, grid[0] * grid[1]], dim=1)
        registers = prefix[:, -self.num_registers :] if self.num_registers else None
        return self.network.forward_head(tokens, pre_logits=True), registers, patches.unflatten(1, grid)
