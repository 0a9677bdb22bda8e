"""How pools grow: by roll-outs of policies, or by particles that these guide where they count for much more.

Roll-outs are draws of their own, but their luck is in their weights. Particles are without luck, but share ancestors,
and count for as few. Which is better depends on the world, on its policies, and on where the posterior is; so one
policy a round is tried both ways. What a trial says decides about the next round, not about its own: samples that were
kept for looking good would be biased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pirl.errors import ConvergenceWarning, OptionError, PartitionError, named_line, warn
from pirl.particles import TiltedProposal, ValuedPolicy, can_tilt, returns, tilt
from pirl.pool import Pool
from pirl.simulators import Policy, roll_out
from pirl.simulators.protocols import Generator

_FEWEST = 20
"""Samples that tell what they are worth; the effective share of n is never below 1 / n."""
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
        self,
        pools: Sequence[Pool],
        simulators: Sequence[Any],
        policies: Sequence[Policy],
        reward: Any,
        may_try: bool = False,
    ) -> list[Pool]:
        """Larger pools, with samples of policies that were trained for this reward: one for each simulator and pool.

        Args:
            may_try: draw half as many the other way as well, and note what both are worth.
        """

        def more(pools: Sequence[Pool], particles: bool, num: int) -> list[Pool]:
            each = zip(pools, simulators, policies, strict=True)
            return [self._more(pool, simulator, policy, reward, particles, num) for pool, simulator, policy in each]

        def worth(larger: Sequence[Pool]) -> float:
            return sum(_worth(pool, reward) for pool in larger)

        new = more(pools, self.particles, self.num)
        few = self.num // 2
        able = all(map(can_tilt, simulators)) and all(isinstance(policy, ValuedPolicy) for policy in policies)
        if not (may_try and self._tries and able and few >= _FEWEST):
            return new
        try:
            both = more(new, not self.particles, few)
            self._worth = {self.particles: worth(new), not self.particles: worth(both)}
        except Exception as error:
            if self.particles:
                raise
            warn(
                f"particles were tried, and failed ({named_line(error)}): "
                "roll-outs are added; particles=False does not try",
                ConvergenceWarning,
            )
            self._tries = False
            return new
        return both

    def decide(self) -> None:
        """Choose what the next round adds, by what this one tried."""
        if self._worth:
            self.particles = self._worth.pop(True) > _TIMES * self._worth.pop(False)

    def _more(self, pool: Pool, simulator: Any, policy: Policy, reward: Any, particles: bool, num: int) -> Pool:
        if particles and isinstance(policy, ValuedPolicy) and can_tilt(simulator):
            try:
                drawn = tilt(simulator, policy, reward, num, self.generator, base=self.base)
            except PartitionError:  # no particle is left: roll-outs are what there is
                if not self._tries:
                    raise
            else:
                return pool.add(*drawn)
        elif particles and not self._tries:
            raise OptionError("particles=True needs policies with value(states, step), an estimate of log beta")
        return pool.add(roll_out(simulator, policy, num, self.generator), policy)


def _worth(pool: Pool, reward: Any) -> float:
    """The share of the newest samples that count for the reward that their policy was trained for."""
    if isinstance(law := pool.policies[-1], TiltedProposal):
        return law.efficiency
    newest = pool.newest(1)
    gained = returns(reward, newest.states, newest.actions, newest.lengths, pool.horizon)
    share = float(1 / (gained + newest.log_ratio).softmax(-1).square().sum()) / len(newest)
    return share if math.isfinite(share) else 0.0  # a reward that is not finite is named by the model
