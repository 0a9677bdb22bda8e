"""Roll-outs or particles: what a round adds is what counted for more in the round before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toys import Knowing, Misled, Plain, Scattered, steep

import pirl
from pirl.errors import ConvergenceWarning, OptionError, PartitionError
from pirl.learning import growth
from pirl.learning.growth import Growth
from pirl.particles import TiltedProposal
from pirl.simulators import roll_out


def flat(states: Tensor, actions: Tensor) -> Tensor:
    return 0 * states[:, 0]


def first(generator: torch.Generator, num: int = 100) -> pirl.Pool:
    return pirl.Pool.of(roll_out(Scattered(), Plain(), num, generator), Plain(), Plain())


def counts(pool: pirl.Pool) -> list[tuple[bool, int]]:
    """Whether each proposal's samples are particles, and how many there are."""
    number = torch.bincount(pool.origin).tolist()
    return [(isinstance(law, TiltedProposal), size) for law, size in zip(pool.policies, number, strict=True)]


def test_what_counts_for_more_is_added_by_the_next_round() -> None:
    generator = torch.Generator().manual_seed(0)
    grows, pools = Growth(Plain(), 100, None, generator), [first(generator)]
    # Starts near 0 count, of a law with sd 3: one in seven of roll-outs, and most particles.
    for number in range(2):
        pools = grows.add(pools, [Scattered()], [Knowing()], steep, may_try=number == 0)
    assert counts(pools[0]) == [(False, 100), (False, 100), (True, 50), (False, 100)]
    grows.decide()
    pools = grows.add(pools, [Scattered()], [Knowing()], steep)
    assert counts(pools[0])[-1] == (True, 100)
    grows.decide()  # nothing was tried: it stays
    assert grows.particles
    # A reward that says nothing is one that all roll-outs count for.
    pools = grows.add(pools, [Scattered()], [Knowing()], flat, may_try=True)
    assert counts(pools[0])[-2:] == [(True, 100), (False, 50)]
    grows.decide()
    assert not grows.particles


def test_the_worth_of_roll_outs_is_their_effective_share() -> None:
    """E[w]^2 / E[w^2] = (1 + 18 c)^(1/2) / (1 + 9 c) for r = -c s^2 / 2, c = 10, and starts N(0, 9)."""
    generator = torch.Generator().manual_seed(0)
    pool = first(generator, 10).add(roll_out(Scattered(), Plain(), 100_000, generator), Plain())
    # The error of the mean of w^2, and as much for that of w, which varies less.
    weight = (2 * steep(pool.states[10:, 0], pool.actions[10:, 0])).exp()
    error = 4 * 2 * float(weight.std() / weight.mean()) / math.sqrt(100_000)
    assert growth._worth(pool, steep) == pytest.approx(181**0.5 / 91, rel=error)
    assert error < 0.12
    nowhere = lambda states, actions: torch.full((len(states),), -torch.inf, dtype=states.dtype)  # noqa: E731
    assert growth._worth(pool, nowhere) == 0


def test_where_no_particle_is_left_roll_outs_are_added() -> None:
    """And a failure is named only where particles were asked for."""
    generator = torch.Generator().manual_seed(0)
    grows, pools = Growth(Plain(), 100, None, generator), [first(generator)]
    grows.particles = True
    pools = grows.add(pools, [Scattered()], [Misled()], steep, may_try=True)
    assert counts(pools[0]) == [(False, 100), (False, 100), (False, 50)]
    grows.decide()
    assert not grows.particles
    with pytest.raises(PartitionError):
        Growth(Plain(), 100, True, generator).add(pools, [Scattered()], [Misled()], steep)


def test_policies_without_values_are_not_tried() -> None:
    generator = torch.Generator().manual_seed(0)
    grows, pools = Growth(Plain(), 100, None, generator), [first(generator)]
    grows.particles = True
    pools = grows.add(pools, [Scattered()], [Plain()], steep, may_try=True)
    assert counts(pools[0]) == [(False, 100), (False, 100)]
    with pytest.raises(OptionError, match="needs policies with value"):
        Growth(Plain(), 100, True, generator).add(pools, [Scattered()], [Plain()], steep)


def test_too_few_samples_tell_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    grows = Growth(Plain(), 2 * growth._FEWEST - 1, None, generator)
    pools = grows.add([first(generator)], [Scattered()], [Knowing()], steep, may_try=True)
    assert counts(pools[0]) == [(False, 100), (False, 2 * growth._FEWEST - 1)]


def test_a_trial_that_fails_is_told_and_costs_nothing() -> None:
    """As where a simulator cannot go on from any state: roll-outs need no such thing."""

    class Counting(Scattered):
        def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
            self.playing = num
            return super().reset(num, generator)

        def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
            assert len(states) == self.playing, "of another episode"
            return states

    generator = torch.Generator().manual_seed(0)
    grows, pools = Growth(Plain(), 100, None, generator), [first(generator)]
    with pytest.warns(
        ConvergenceWarning, match="particles were tried, and failed .*of another episode.*particles=False"
    ):
        pools = grows.add(pools, [Counting()], [Knowing()], steep, may_try=True)
    pools = grows.add(pools, [Counting()], [Knowing()], steep, may_try=True)  # not again
    assert counts(pools[0]) == [(False, 100)] * 3


def test_every_pool_has_a_policy_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = Plain(), Plain()
    pools = Growth(Plain(), 100, False, generator).add([first(generator)] * 2, [Scattered()] * 2, [one, other], steep)
    assert pools[0].policies[-1] is one and pools[1].policies[-1] is other
