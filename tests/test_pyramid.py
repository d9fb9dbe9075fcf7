"""tasks/pyramid.py: sizes and places of the four maps, and batch norm over the images of all ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import seeded
from ranks import run_on_ranks
from torch import Tensor, nn

from tasks.pyramid import SimplePyramid, SyncedBatchNorm, synchronise_


@pytest.mark.parametrize("rows", [2, 5])
def test_maps_are_four_two_one_and_half_times_the_grid(rows):
    pyramid = SimplePyramid(8)
    maps = [torch.randn(3, 8, rows, 4, generator=seeded(i)) for i in range(4)]
    shapes = [tuple(level.shape) for level in pyramid(maps)]
    assert shapes == [(3, 8, 4 * rows, 16), (3, 8, 2 * rows, 8), (3, 8, rows, 4), (3, 8, rows // 2, 2)]
    alone = pyramid([maps[2]])
    assert [tuple(level.shape) for level in alone] == shapes
    assert torch.equal(alone[2], maps[2]), "one map stands for all four"


def test_a_patch_changes_what_lies_over_it_and_nothing_else():
    pyramid = SimplePyramid(8).eval()
    maps = [torch.randn(1, 8, 4, 6, generator=seeded(i)) for i in range(4)]
    changed = [x.clone() for x in maps]
    for x in changed:
        x[:, :, 2, 3] = 9.0
    for scale, before, after in zip(pyramid.SCALES, pyramid(maps), pyramid(changed), strict=True):
        different = (before != after).any(dim=1)[0].nonzero()
        assert different.amin(dim=0).tolist() == [int(2 * scale), int(3 * scale)], scale
        assert different.amax(dim=0).tolist() == [
            int(2 * scale + max(1, scale)) - 1,
            int(3 * scale + max(1, scale)) - 1,
        ]


def test_the_finest_map_is_two_transposed_convolutions_with_norm_and_gelu_between():
    pyramid: Any = SimplePyramid(4, norm=lambda dim: nn.GroupNorm(1, dim))
    first, norm, _, second = pyramid.levels[0]
    x = torch.randn(2, 4, 3, 3, generator=seeded(0))
    by_hand = nn.functional.conv_transpose2d(x, first.weight, first.bias, stride=2)
    by_hand = nn.functional.gelu(norm(by_hand))
    by_hand = nn.functional.conv_transpose2d(by_hand, second.weight, second.bias, stride=2)
    torch.testing.assert_close(pyramid([x])[0], by_hand)
    assert isinstance(norm, nn.GroupNorm)


# --- Batch norm ------------------------------------------------------------------------------------------------------


def norm_of_my_share(norm_class: Any, x: Tensor, grad: Tensor) -> tuple[Any, ...]:
    """Two training steps of a norm with this rank's images: output, gradient, the weights' gradients, statistics."""
    norm = norm_class(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    share = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
    own = x[share].clone().requires_grad_()
    for _ in range(2):
        norm(own)
    out = norm(own)
    (out * grad[share]).sum().backward()
    return out.detach(), own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def test_batch_norm_of_two_ranks_is_that_of_all_their_images():
    x = 2 + 3 * torch.randn(6, 3, 4, 5, generator=seeded(0))
    grad = torch.randn(x.shape, generator=seeded(1))
    whole = norm_of_my_share(nn.BatchNorm2d, x, grad)
    ranks = run_on_ranks(norm_of_my_share, 2, SyncedBatchNorm, x, grad)
    (alone,) = run_on_ranks(norm_of_my_share, 1, SyncedBatchNorm, x, grad)
    for a, b in zip(alone, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for number, part in enumerate(ranks):
        for name, i in (("output", 0), ("gradient", 1)):
            torch.testing.assert_close(part[i], whole[i][number::2], rtol=1e-4, atol=1e-5, msg=name)
        for name, i in (("running mean", 4), ("running variance", 5)):
            torch.testing.assert_close(part[i], whole[i], msg=name)
    for name, i in (("gradient of the weight", 2), ("gradient of the bias", 3)):
        torch.testing.assert_close(ranks[0][i] + ranks[1][i], whole[i], rtol=1e-4, atol=1e-4, msg=name)


def test_one_rank_has_a_plain_batch_norm():
    x = torch.randn(4, 3, 2, 2, generator=seeded(0))
    grad = torch.ones_like(x)
    for a, b in zip(norm_of_my_share(SyncedBatchNorm, x, grad), norm_of_my_share(nn.BatchNorm2d, x, grad), strict=True):
        assert torch.equal(a, b)
    plain, synced = nn.BatchNorm2d(3), SyncedBatchNorm(3)
    synced.load_state_dict(plain.state_dict())
    assert synced.state_dict().keys() == plain.state_dict().keys()


def test_every_batch_norm_within_is_synchronised_with_what_it_knows():
    module: Any = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.LayerNorm(4))
    )
    with torch.no_grad():
        module[1][0].running_mean.fill_(3)
    synchronise_(module)
    norm: Any = module[1][0]
    assert isinstance(norm, SyncedBatchNorm)
    assert (norm.eps, norm.momentum) == (1e-3, 0.2)
    assert module[1][0].running_mean.tolist() == [3.0] * 4
    assert type(module[1][1]) is nn.LayerNorm
