"""MIM-Refiner (arXiv:2402.10093), through torch.hub.

torch.hub downloads the repository ml-jku/MIM-Refiner from GitHub and RUNS ITS CODE on this machine, which then builds
the network, downloads its weights and reads them in its own way. So `trust_repo=True` must be given; a local copy that
you have read can be used with `repo=<folder>`. The code needs the packages kappamodules and einops.

`pretrained=False` runs none of that: the same architecture with random weights comes from timm (MAE, dBOT, CrossMAE) or
from `data2vec2_loader.py` (data2vec 2.0). Its parameters have other names, so that fine-tuning, whose exports are
loaded into it, refuses this family.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines._shared import Output, PatchFeatures, library, look_up, patch_grid, resize_antialiased, split_tokens
from baselines.data2vec2_loader import PostNormViT
from utils import UserError

REPOSITORY = "ml-jku/MIM-Refiner"
LARGE, HUGE, TWO_BILLION = (1024, 24, 16, 16), (1280, 32, 16, 14), (2560, 24, 32, 14)  # width, depth, heads, patch
MODELS = {
    "mae_refined_l16": LARGE,
    "dbot_refined_l16": LARGE,
    "crossmae_refined_l16": LARGE,
    "d2v2_refined_l16": LARGE,
    "mae_refined_h14": HUGE,
    "dbot_refined_h14": HUGE,
    "d2v2_refined_h14": HUGE,
    "mae_refined_twob14": TWO_BILLION,
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    trust_repo: bool = False,
    repo: str | Path | None = None,
) -> nn.Module:
    """Build an encoder with the code of its repository.

    Args:
        model_name: a name of its hubconf.py.
        pretrained_weights: not supported; the repository's code reads its own files.
        pretrained: False gives random weights without running any code of the repository.
        device: where to put the model.
        trust_repo: True allows to download the repository and to run its code.
        repo: folder of a local copy to run instead, with `trust_repo=True`.
    """
    embed_dim, depth, num_heads, patch_size = look_up(model_name, MODELS)
    if pretrained_weights is not None:
        raise UserError(
            f"pretrained_weights={str(pretrained_weights)!r}: the code of {REPOSITORY} reads its own files only; give "
            "repo=<folder> for a local copy of that repository"
        )
    if not pretrained:
        return random_network(model_name, embed_dim, depth, num_heads, patch_size).to(device).eval()
    if not trust_repo:
        raise UserError(
            f"{model_name} comes through torch.hub, which downloads {REPOSITORY} from GitHub and runs its code on this "
            "machine. Read that code; if you trust it, give model_loader_kwargs.trust_repo=true"
        )
    place: dict[str, Any] = {"repo_or_dir": REPOSITORY, "source": "github", "trust_repo": True}
    if repo is not None:
        place = {"repo_or_dir": str(repo), "source": "local"}
    try:
        network: Any = torch.hub.load(model=model_name.lower(), **place)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"torch.hub could not build {model_name} with the code of {place['repo_or_dir']}: {error}. It needs a "
            "connection, kappamodules and einops (pip install kappamodules einops), or repo=<folder> for a local copy"
        ) from error
    return HubFeatures(network, patch_size).to(device).eval()


__model_loader__ = load_model


def random_network(model_name: str, embed_dim: int, depth: int, num_heads: int, patch_size: int) -> nn.Module:
    """The architecture alone. Positions are added to the patches only."""
    if model_name.lower().startswith("d2v2"):
        return PostNormViT(embed_dim, depth, num_heads, patch_size)
    vit = library("timm.models").VisionTransformer(
        img_size=224,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        num_classes=0,
        global_pool="",
        no_embed_class=True,
    )
    vit.patch_embed.strict_img_size = False
    return PatchFeatures(vit, patch_size, resize_antialiased)


class HubFeatures(nn.Module):
    """A network of the repository: images to class token and patch tokens. Its parameters are frozen."""

    def __init__(self, network: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.network, self.patch_size = network.requires_grad_(False), patch_size

    def forward(self, images: Float[Tensor, "b c h w"]) -> Output:
        """Features of normalised images; both sides must be multiples of the patch size."""
        return split_tokens(self.network(images), patch_grid(images, self.patch_size))
