"""A model that stays near the samples of its pool: what the rounds of guided cost learning fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pirl.errors import ModelError
from pirl.infer.engine import own_generator
from pirl.pool import Pool
from pirl.posterior.draws import default_dtype
from pirl.posterior.from_samples import log_odds
from pirl.sampled import SampledMaxEntTrajectory

_LEAST_SHARE, _FEW = 0.05, 30.0
"""So many of the draws that a pool's samples count for, the smaller of this share and this number, should count before
more are drawn. Less than the gate asks for: a posterior that is held back must not look known where it is held."""


def near_samples(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, less likely where few samples of the pool count.

    There log Z-hat is too low, and the likelihood without bounds in directions that no sample shows. So demonstrations
    count as samples too (Finn, Levine and Abbeel 2016 add them to those of the policies): their own weights bound log Z
    from below, by log(1 + M / ess) more than the samples where ess are counted by M demonstrations. And where less than
    a few samples count, the likelihood is lowered further. The rounds go step by step; the last posterior, of a good
    pool, is of the model itself.
    """

    def bounded(*args: Any) -> None:
        with Laws() as laws:
            model(*args)
        for name, (law, seen) in laws.found.items():
            ess = law.pool.log_ess(law.log_weights)
            draws = len(law.pool) * law.pool.efficiency
            lacking = (math.log(min(_LEAST_SHARE * draws, _FEW)) - ess).clamp_min(0.0)
            odds = _by_reward(log_odds(law, seen), ess.shape)
            count = odds.shape[-1]
            fused = torch.nn.functional.softplus(math.log(count) - law.pool.log_ess_of(odds))
            pyro.factor(f"{name}_near_samples", -count * (lacking.square().sum() + fused.sum()))

    return bounded


def check_observed(model: Callable[..., Any], given: tuple[Any, ...], pools: Sequence[Pool]) -> None:
    """Refuse a model that leaves out a group: its demonstrations would be lost silently."""
    with (
        default_dtype(pools[0].dtype),
        own_generator(),
        pyro.validation_enabled(False),
        torch.no_grad(),
        Laws() as laws,
    ):
        model(*given)
    seen = {id(law.pool) for law, _ in laws.found.values()}
    for number, pool in enumerate(pools):
        if id(pool) not in seen:
            raise ModelError(
                f"the model observes nothing with pool {number} of {len(pools)}: let it observe every group, by a site "
                "in a plate of its own"
            )


def _by_reward(odds: Float[Tensor, "*batch"], rewards: torch.Size) -> Float[Tensor, "G M"]:
    """What belongs to each reward of a batch, whose shape is 1 along the plate of the demonstrations."""
    rewards = torch.Size([1] * (odds.dim() - len(rewards)) + list(rewards))
    odds = odds.expand(torch.broadcast_shapes(odds.shape, rewards))
    own = [dim for dim, size in enumerate(rewards) if size > 1]
    groups = math.prod(rewards)
    return odds.movedim(own, list(range(len(own)))).reshape(groups, odds.numel() // groups)


class Laws(Messenger):
    """Keeps the laws whose log Z is sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.found = dict[str, tuple[SampledMaxEntTrajectory, Tensor]]()

    def _postprocess_message(self, message: Any) -> None:
        law = message.get("fn")
        while not isinstance(law, SampledMaxEntTrajectory) and hasattr(law, "base_dist"):
            law = law.base_dist
        if message["type"] == "sample" and message["is_observed"] and isinstance(law, SampledMaxEntTrajectory):
            self.found[message["name"]] = law, message["value"]
