"""Activations of blocks that wait for the backward pass in the host's memory."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

SMALLEST = 2**16
"""Bytes of a tensor that is worth the way."""


def offload_blocks(blocks: Iterable[nn.Module]) -> None:
    """Make each block move what it keeps for the backward pass to the host, and back when that needs it.

    The way of `torch.autograd.graph.save_on_cpu`: copies take their turn among the kernels of the device, so that
    nothing waits but the device. Unlike there, a tensor without gaps comes back with the strides that it had, on which
    the choice of a kernel may depend, and weights stay where they are; gathered ones do go. Where a block is
    recomputed, that is what it is given, its inputs; what the policy of recomputation keeps stays.
    """
    for block in blocks:
        block.forward = _offloaded(block, block.forward)


def _offloaded(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        weights = {p.untyped_storage().data_ptr() for p in block.parameters() if not isinstance(p, DTensor)}

        def pack(x: Tensor) -> tuple[torch.device, Tensor]:
            storage = x.untyped_storage()
            is_view_of_less = storage.nbytes() < x.nbytes  # such as a mask token at all positions
            if x.nbytes < SMALLEST or is_view_of_less or storage.data_ptr() in weights:
                return x.device, x
            host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
            return x.device, host.copy_(x, non_blocking=x.is_cuda)

        with saved_tensors_hooks(pack, _unpack):
            return forward(*args)

    return wrapped


def _unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, x = packed
    return x.to(device, non_blocking=True)
