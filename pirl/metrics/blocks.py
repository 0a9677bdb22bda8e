"""Thousands of draws, a block at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pirl.mdp import TabularMDP

# Numbers that one block of draws may fill.
_AT_ONCE = 2**23


def by_block(function: Callable[..., Tensor], numbers: int, *inputs: tuple[Tensor, int]) -> Tensor:
    """``function`` of ``[C, *event]`` tensors for all of the broadcast batch, so many rows at once as fit a block.

    Args:
        function: gives ``[C, *out]``; an input without batch dimensions comes as ``[1, *event]``.
        numbers: how many numbers one row needs.
        inputs: (tensor ``[*batch, *event]``, number of event dimensions).
    """
    batch = torch.broadcast_shapes(*(x.shape[: x.dim() - event] for x, event in inputs))
    rows = []
    for x, event in inputs:
        own, shape = x.shape[: x.dim() - event], tuple(x.shape[x.dim() - event :])
        rows.append(
            x.reshape(1, *shape) if own.numel() == 1 else x.expand(*batch, *shape).reshape(batch.numel(), *shape)
        )
    block = max(1, _AT_ONCE // max(1, numbers))
    parts = [
        function(*(x if len(x) == 1 else x[start : start + block] for x in rows))
        for start in range(0, max(map(len, rows)), block)
    ]
    whole = torch.cat(parts)
    return whole.reshape((*batch, *whole.shape[1:]))


def is_timed(mdp: TabularMDP, policy: Tensor) -> bool:
    """Whether a policy has a dimension of time, which stands before S and A and is as long as the horizon."""
    return mdp.horizon is not None and policy.dim() >= 3 and policy.shape[-3] == mdp.horizon


def by_time(mdp: TabularMDP, policy: Tensor) -> tuple[Tensor, int]:
    """The policy and its number of event dimensions: with a horizon it always has one of time.

    Else a block of as many draws as there are steps would be taken for a policy by time.
    """
    if mdp.horizon is None:
        return policy, 2
    if is_timed(mdp, policy):
        return policy, 3
    return policy.unsqueeze(-3).expand(*policy.shape[:-2], mdp.horizon, *policy.shape[-2:]), 3
