"""Trajectories as tables: what a Pyro model observes, and what rewards and features are summed over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import InvalidRewardError, PirlError, form, named_line
from pirl.simulators.rollouts import paying

Features = Callable[[Tensor, Tensor], Tensor]
"""(states [..., ds], actions [..., da]) -> features [..., K]."""


def encode(states: Tensor, actions: Tensor) -> Tensor:
    """(state, action) of every step, the last without action: ``[N, T + 1, 2]`` or ``[N, T + 1, ds + da]``."""
    if not states.is_floating_point():
        last = torch.full_like(actions[:, :1], -1)
        return torch.stack([states, torch.cat([actions, last], 1)], -1)
    actions = actions.unsqueeze(-1) if actions.dim() == 2 else actions
    actions = actions.to(states.dtype)
    return torch.cat([states, torch.cat([actions, torch.zeros_like(actions[:, :1])], 1)], -1)


def widened(states: Tensor, actions: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Numbered trajectories that all ended early, as wide as others of this horizon: any law sees that they did."""
    if states.is_floating_point():
        return states, actions

    def widen(x: Tensor, size: int) -> Tensor:
        return torch.cat([x, x.new_full((len(x), max(size - x.shape[1], 0), *x.shape[2:]), -1)], 1)

    return widen(states, horizon + 1), widen(actions, horizon)


def checked_features(features: Features, states: Tensor, actions: Tensor) -> Float[Tensor, "..."]:
    """Features of states ``[..., ds]`` and actions ``[..., da]``, looked at: ``[..., K]``.

    Raises:
        InvalidRewardError: the function raised, or gave something else.
    """
    given = f"features(states {tuple(states.shape)}, actions {tuple(actions.shape)})"
    try:
        found = features(states, actions)
    except PirlError:
        raise
    except Exception as error:
        raise InvalidRewardError(f"{given} failed: {named_line(error)}") from error
    if not isinstance(found, Tensor) or found.shape[:-1] != states.shape[:-1] or found.dim() != states.dim():
        batch = ", ".join(map(str, states.shape[:-1]))
        raise InvalidRewardError(f"{given} returned {form(found)}; expected [{batch}, K]: stack them in the last dim")
    return found


def visits(
    table: Int[Tensor, "*batch T1 2"], shape: tuple[int, int], horizon: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "*batch U"], Int[Tensor, " U"]]:
    """How often trajectories collect the reward of each pair, and the pairs that any of them visits.

    Args:
        shape: numbers of states and of actions; one action where rewards are of states alone.
        horizon: until which a terminal state pays.
        dtype: of the counts.
    """
    flat = table.reshape(-1, *table.shape[-2:])
    states, actions, counted = paying(flat[..., 0], flat[..., 1], (flat[..., 1] >= 0).sum(-1), horizon)
    actions = actions if shape[1] > 1 else torch.zeros_like(actions)  # one column: of states alone
    pair = torch.where(counted, states * shape[1] + actions, 0)
    used, at = pair.unique(return_inverse=True)
    counts = torch.zeros(len(flat), len(used), dtype=dtype, device=table.device)
    counts = counts.scatter_add_(-1, at, counted.to(counts.dtype))
    return counts.reshape(*table.shape[:-2], len(used)), used
