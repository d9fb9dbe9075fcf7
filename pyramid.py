"""The simple pyramid: four resolutions from a vision transformer, which has one (CAE, arXiv:2202.03026)."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn


class SimplePyramid(nn.Module):
    """Feature maps at 4, 2, 1 and 1/2 times the patch grid, each from one map of the grid's size.

    CAE's adapter, which BEiT's and iBOT's is too: two transposed convolutions of 2x2 with a norm and a GELU between
    them; one of them; nothing; and the maximum of each 2x2. With patches of 16 pixels the strides are 4, 8, 16 and 32.
    All keep the number of channels.

    Args:
        dim: channels of the maps.
        norm: makes the norm for so many channels, such as `nn.BatchNorm2d`.
    """

    SCALES = (4, 2, 1, 0.5)
    """Rows and columns of each map that is given, in those of the patch grid."""

    def __init__(self, dim: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
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
