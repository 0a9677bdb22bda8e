"""How pools grow: by roll-outs of policies or by particles that these guide, whichever count for more.

Roll-outs are draws of their own, but their luck is in their weights. Particles are without luck, but share ancestors,
and count for as few. Which is better depends on the world, on its policies, and on where the posterior is; so one
policy a round is tried both ways. What a trial says decides about the next round, not about its own: samples that were
kept for looking good would be biased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pirl.errors import OptionError, PartitionError
from pirl.particles import TiltedProposal, ValuedPolicy, can_tilt, returns, tilt
from pirl.pool import Pool
from pirl.simulators import Policy, roll_out
from pirl.simulators.protocols import Generator

_TIMES = 2.0
"""Particles have to be worth so many times as much: roll-outs of several policies cover for each other."""


class Growth:
    """What policies add to pools, and which kind of samples the next round draws.

    Args:
        base: the base measure over actions.
        num: samples of each policy.
        particles: True or False; None to try.

    Attributes:
        particles: whether this round adds particles.
    """

    def __init__(self, base: Policy, num: int, particles: bool | None, generator: Generator) -> None:
        self.base, self.num, self.generator = base, num, generator
        self.particles, self._tries = bool(particles), particles is None
        self._worth = dict[bool, float]()

    def add(
        self, pools: Sequence[Pool], simulators: Sequence[Any], policy: Policy, reward: Any, may_try: bool = False
    ) -> list[Pool]:
        """Larger pools, with samples of a policy that was trained for this reward.

        Args:
            may_try: draw half as many the other way as well, and note what both are worth.
        """
        new = [
            self._more(*each, policy, reward, self.particles, self.num) for each in zip(pools, simulators, strict=True)
        ]
        if may_try and self._tries and isinstance(policy, ValuedPolicy) and all(can_tilt(x) for x in simulators):
            other, few = not self.particles, max(self.num // 2, 4)
            self._worth[self.particles] = sum(_worth(*each, reward) for each in zip(new, pools, strict=True))
            both = [self._more(*each, policy, reward, other, few) for each in zip(new, simulators, strict=True)]
            self._worth[other] = sum(_worth(*each, reward) for each in zip(both, new, strict=True))
            return both
        return new

    def decide(self) -> None:
        """Choose what the next round adds, by what this one tried."""
        if self._worth:
            self.particles = self._worth.pop(True) > _TIMES * self._worth.pop(False)

    def _more(self, pool: Pool, simulator: Any, policy: Policy, reward: Any, particles: bool, num: int) -> Pool:
        if not particles:
            return pool.add(roll_out(simulator, policy, num, self.generator), policy)
        if not isinstance(policy, ValuedPolicy) or not can_tilt(simulator):
            raise OptionError("particles=True needs policies with value(states, step), an estimate of log beta")
        try:
            return pool.add(*tilt(simulator, policy, reward, num, self.generator, base=self.base))
        except PartitionError:
            if not self._tries:
                raise
            return pool  # no particle is left: they are worth nothing here


def _worth(pool: Pool, before: Pool, reward: Any) -> float:
    """The share of the newest samples that count for the reward that their policy was trained for."""
    if pool is before:
        return 0.0
    if isinstance(law := pool.policies[-1], TiltedProposal):
        return law.efficiency
    newest = pool.newest(1)
    gained = returns(reward, newest.states, newest.actions, newest.lengths, pool.horizon)
    # A reward that is not finite counts for nothing here; the model names it.
    return float(1 / (gained + newest.log_ratio).softmax(-1).square().sum()) / len(newest)
