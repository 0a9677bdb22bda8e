"""Bands and p-values for ranks: exact, against enumeration and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom

from pirl.uniformity import band, holm, p_values, shares_below


def test_p_values_equal_enumeration() -> None:
    """Every outcome of four ranks on 0, 1, 2 is equally likely: p is the share of those that are as far out."""
    outcomes = np.array(list(itertools.product(range(3), repeat=4)))

    def farthest(ranks: np.ndarray) -> float:
        tails = []
        for i in (1, 2):
            count, law = (ranks < i).sum(), binom(4, i / 3)
            tails.append(min(1.0, 2 * min(law.cdf(count), law.sf(count - 1))))
        return min(tails)

    statistic = np.array([farthest(ranks) for ranks in outcomes])
    for ranks, own in zip(outcomes[:: len(outcomes) // 9], statistic[:: len(outcomes) // 9], strict=True):
        exact = (statistic <= own * (1 + 1e-9)).mean()
        assert p_values(ranks, 2) == pytest.approx(exact, abs=1e-12)


def test_bands_hold_uniform_ranks_as_often_as_they_say() -> None:
    ranks = np.random.default_rng(1).integers(0, 40, (60, 4000))
    shares = shares_below(ranks, 39)
    for level in (0.5, 0.95):
        inside = band(60, 39, level)
        out = ((shares < inside.lower[:, None] - 1e-9) | (shares > inside.upper[:, None] + 1e-9)).any(0)
        # The statistic is discrete: a band may hold more than its level, by the probability of one of its values.
        noise = 4.5 * np.sqrt(level * (1 - level) / 4000)
        assert -noise < (1 - out.mean()) - level < noise + 0.06
        # The band and the p-value are one test.
        small = p_values(ranks, 39) <= 1 - level
        assert (small == out).all()


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_ranks_that_are_not_uniform_leave_the_band(power: float) -> None:
    uniform = np.random.default_rng(2).random(400)
    ranks = np.floor(uniform**power * 100).astype(int)
    assert p_values(ranks, 99) < 1e-3
    share, inside = shares_below(ranks, 99), band(400, 99)
    assert ((share < inside.lower) | (share > inside.upper)).any()


def test_the_null_is_kept_far_out_too() -> None:
    """Many quantities are judged out in the tails, where p-values must be as rare as they say."""
    generator = np.random.default_rng(4)
    for replicates, draws in ((20, 9), (300, 39)):
        ranks = generator.integers(0, draws + 1, (replicates, 20_000))
        p = p_values(ranks, draws)
        for level in (0.05, 0.001):
            allowed = 4.5 * np.sqrt(level * (1 - level) / len(p))
            assert (p <= level).mean() < level + allowed  # discrete: it may be rarer
            assert level < 0.01 or (p <= level).mean() > 0.4 * level
    # A thousand quantities would hide the plainest fault from a test whose p-values have a floor.
    assert p_values(np.zeros(200, dtype=int), 39) * 10_000 < 1e-6


def test_of_many_quantities_few_false_alarms() -> None:
    p = np.random.default_rng(3).random((5000, 7))
    alarms = np.mean([holm(row).min() < 0.05 for row in p])
    assert alarms == pytest.approx(0.05, abs=4.5 * np.sqrt(0.05 * 0.95 / 5000))
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
