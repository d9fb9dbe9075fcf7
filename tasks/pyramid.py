"""The simple pyramid, four resolutions from a vision transformer, which has one, and its norm (arXiv:2106.08254)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distributed import all_reduce_sum_, is_distributed


class SyncedBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the images of all ranks: torch's, which is for GPUs alone, and the same formula on CPU ranks.

    One rank is a plain batch norm, and its state dict is that of one.
    """

    kept_in_float32 = ("weight", "bias")

    def forward(self, input: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b d rows columns"]:  # noqa: A002  # torch's name
        """The maps with mean 0 and variance 1 in each channel while training, times `weight`, plus `bias`."""
        if not self.training or not is_distributed() or input.device.type != "cpu":
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return self._on_cpu(input.float()).to(input.dtype)

    def _on_cpu(self, x: Tensor) -> Tensor:
        count = all_reduce_sum_(torch.tensor(float(x[:, 0].numel())))  # images may differ in size, and boxes in number
        mean = _sum_over_ranks(x.sum((0, 2, 3))) / count
        centred = x - mean.view(1, -1, 1, 1)
        variance = _sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, own: Tensor) -> Tensor:
        return all_reduce_sum_(own.clone())

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce_sum_(grad.clone())  # each rank's loss depends on what all ranks added


def _sum_over_ranks(own: Tensor) -> Any:
    return _SumOverRanks.apply(own)


def synchronise_(module: nn.Module) -> None:
    """Put a `SyncedBatchNorm` in the place of each batch norm of maps, with its weights and statistics."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                synced = SyncedBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
                synced.load_state_dict(child.state_dict())
                setattr(parent, name, synced)


class SimplePyramid(nn.Module):
    """Feature maps at 4, 2, 1 and 1/2 times the patch grid, each from one map of the grid's size.

    BEiT's adapter, and others' after it: two transposed convolutions of 2x2 with a norm and a GELU between
    them; one of them; nothing; and the maximum of each 2x2. With patches of 16 pixels the strides are 4, 8, 16 and 32.
    All keep the number of channels.

    Args:
        dim: channels of the maps.
        norm: makes the norm for so many channels, such as `nn.BatchNorm2d`.
    """

    SCALES = (4, 2, 1, 0.5)
    """Rows and columns of each map that is given, in those of the patch grid."""

    def __init__(self, dim: int, norm: Callable[[int], nn.Module] = SyncedBatchNorm) -> None:
        super().__init__()

        def up() -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

        self.levels = nn.ModuleList(
            [nn.Sequential(up(), norm(dim), nn.GELU(), up()), up(), nn.Identity(), nn.MaxPool2d(2)]
        )

    def forward(self, maps: Sequence[Float[Tensor, "b d rows columns"]]) -> list[Tensor]:
        """Four maps [b, d, scale * rows, scale * columns], by `SCALES`; an odd number is halved downwards.

        Args:
            maps: after four blocks that ascend, the first for the finest map; one map stands for all four. At least
                2x2 patches.
        """
        if len(maps) == 1:
            maps = [*maps] * len(self.levels)
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]
