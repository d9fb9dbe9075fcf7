"""The released CAPI backbones for `torch.hub`, with torch alone installed.

    model = torch.hub.load("/path/to/this/folder", "capi_vitl14_lvd", source="local")
    global_repr, registers, feature_map = model(torch.zeros(1, 3, 224, 224))

Images are RGB in [0, 1], minus (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225); both sides are multiples of 14.
"""

import sys
from pathlib import Path as _Path  # underscores keep names out of `torch.hub.list`
from typing import Any as _Any

import torch

# torch.hub runs inside other people's programs, which may have modules of these names: those are put back below.
_theirs = {name: sys.modules[name] for name in ("model", "utils", "weights") if name in sys.modules}
for _name, _module in list(_theirs.items()):
    if _Path(getattr(_module, "__file__", None) or "/").parent == _Path(__file__).parent:
        del _theirs[_name]  # ours, imported before
    else:
        del sys.modules[_name]
import model as _model  # noqa: E402  # once its name is free

sys.modules.update(_theirs)

dependencies = ["torch"]

ADDRESS = "https://dl.fbaipublicfiles.com/capi/"

VIT_L14: dict[str, _Any] = {
    "patch_size": 14,
    "in_chans": 3,
    "norm_layer_type": "RMSNorm",
    "norm_layer_kwargs": {"eps": 1e-5},
    "final_norm_kwargs": {"elementwise_affine": False},
    "n_registers": 16,
    "register_coordinates": "edge",
    "scale_reg_to_visible": True,
    "out_layer": -1,
    "transformers_kwargs": {
        "embed_dim": 1024,
        "drop_path_rate": 0.2,
        "block_kwargs": {
            "drop_path_type": "efficient",
            "attn_kwargs": {
                "num_heads": 16,
                "qkv_bias": False,
                "proj_bias": False,
                "rope_kwargs": {"max_freq": 7.0, "min_freq": 7e-4},
            },
        },
    },
    "encoder_kwargs": {"depth": 24},
    "decoder_kwargs": {"depth": 12},
}
"""The released architecture, whatever the default of new trainings becomes."""


def _vit_l14(file: str, pretrained: bool, weights: str | None) -> _model.EncoderDecoder:
    source = weights if weights is not None else ADDRESS + file if pretrained else None
    if source is None:
        return _model.EncoderDecoder(**VIT_L14).eval()
    state_dict = _model.read_state_dict(source, key="weights")
    with torch.device("meta"):
        model = _model.EncoderDecoder(**VIT_L14)
    model.to_empty(device="cpu")
    _model.load_backbone_weights(model, state_dict, str(source))
    return model.eval()


def capi_vitl14_lvd(pretrained: bool = True, weights: str | None = None) -> _model.EncoderDecoder:
    """ViT-L/14 trained on LVD-142M.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_lvd.pth", pretrained, weights)


def capi_vitl14_p205(pretrained: bool = True, weights: str | None = None) -> _model.EncoderDecoder:
    """ViT-L/14 trained on Places205.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_p205.pth", pretrained, weights)


def capi_vitl14_in22k(pretrained: bool = True, weights: str | None = None) -> _model.EncoderDecoder:
    """ViT-L/14 trained on ImageNet-22k.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_i22k.pth", pretrained, weights)


def capi_vitl14_in1k(pretrained: bool = True, weights: str | None = None) -> _model.EncoderDecoder:
    """ViT-L/14 trained on ImageNet-1k.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_in1k.pth", pretrained, weights)
