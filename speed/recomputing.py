"""Activations that blocks drop in the forward pass and compute again in the backward pass."""

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from config import RematerializationConfig
from utils import UserError

CHANGED_IN_PLACE = frozenset({"aten::mean"})
"""Operators whose result torch itself changes in place afterwards (RMSNorm adds its eps): it cannot be kept."""


def recompute_blocks(blocks: Iterable[nn.Module], cfg: RematerializationConfig) -> None:
    """Make each block drop what the policy says in the forward pass and compute it again in the backward pass.

    State-dict keys stay as they are. Block by block, so that at most one block's dropped activations are alive again.

    Raises: UserError for an operator name that torch does not know.
    """
    if not cfg.enabled:
        return
    policy = _operator_policy(cfg)
    for block in blocks:
        block.forward = _recomputed(block.forward, policy)


def _operator_policy(cfg: RematerializationConfig) -> Callable[..., CheckpointPolicy]:
    if torch.distributed.is_available():
        importlib.import_module("torch.distributed._functional_collectives")  # registers _c10d_functional
    for name in cfg.policy:
        namespace, _, operator = name.partition("::")
        known = operator and hasattr(torch.ops, namespace) and hasattr(getattr(torch.ops, namespace), operator)
        comes_later = namespace.startswith("xformers")  # when that is imported, if ever
        if not known and not comes_later and not (namespace == "_c10d_functional" and not dist.is_available()):
            raise UserError(
                f"efficiency.rematerialization.policy.{name}: torch has no such operator; "
                "names look like aten::mm, without the overload"
            )
    recompute = dict(cfg.policy)

    def policy(_ctx: object, operator: Any, *_args: object, **_kwargs: object) -> CheckpointPolicy:
        schema = getattr(operator, "_schema", None)
        name = schema.name if schema is not None else str(operator)
        in_place = name in CHANGED_IN_PLACE or (schema is not None and schema.is_mutable)
        if in_place or recompute.get(name, cfg.default):
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE

    return policy


def _recomputed(forward: Callable[..., Any], policy: Callable[..., CheckpointPolicy]) -> Callable[..., Any]:
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    @functools.wraps(forward)
    def wrapped(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)

    return wrapped
