"""Starts that nobody chose are told of: what they say of the reward is not what follows says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from pirl.errors import ConvergenceWarning
from pirl.learning import bayesian_guided_cost
from pirl.posterior.starts import UNLIKELY, _simulated, conflict
from pirl.simulators import TabularSimulator
from tests.toys import Plain

REPLICATES, NUMBER, DRAWS, SAMPLES = 200, 20, 100, 4000
PRECISION = 16.0
"""Of the prior: samples of no reward know log Z of rewards so small."""


def noise(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def starting(starts: Tensor) -> pirl.Pool:
    """A pool of the base policy with these starts, of whose samples none is likelier than another."""
    nothing = torch.zeros(len(starts), dtype=torch.float64)
    count = torch.ones(len(starts), dtype=torch.long)
    if not starts.is_floating_point():
        states = starts[:, None].expand(-1, 2)
        return pirl.Pool(states, 0 * states[:, :1], count, None, nothing, (Plain(),), 0 * count, nothing[None])
    states = starts.reshape(len(starts), 1, -1).expand(-1, 2, -1)
    return pirl.Pool(states, nothing.reshape(-1, 1, 1), count, None, nothing, (Plain(),), 0 * count, nothing[None])


def replicate(
    seed: int, slope: float = 1.0, theta: float | None = None, chosen: bool = True, size: int = 1
) -> tuple[float, float]:
    """Starts s and what follows, y, standard normal by chance; the return theta . (s + slope y), theta normal.

    They are normal with means theta and slope theta where rewards choose them, and the posterior of theta is normal.

    Args:
        slope: how much more what follows tells than starts.
        theta: the reward, in every direction; None: of the prior.
        size: how many coordinates.
    """
    normal = noise(seed)
    truth = normal(size) / PRECISION**0.5 if theta is None else torch.full((size,), theta, dtype=torch.float64)
    starts, follow = chosen * truth + normal(NUMBER, size), slope * truth + normal(NUMBER, size)
    precision = PRECISION + NUMBER * (1 + slope**2)
    draws = (starts + slope * follow).sum(0) / precision + normal(DRAWS, size) / precision**0.5
    samples, after = normal(SAMPLES, size), normal(SAMPLES, size)
    return conflict(
        starting(samples), starts, draws @ (samples + slope * after).mT, draws @ (starts + slope * follow).mT
    )


@pytest.mark.parametrize(("slope", "size"), [(0.5, 1), (1.0, 1), (3.0, 1), (1.0, 3)])
def test_conflicts_of_what_was_chosen_are_as_large_as_chance_makes_them(slope: float, size: int) -> None:
    """They are normal of variance 1, whatever the share of what is known that starts have: .8, .5 and .1 here."""
    found = torch.tensor([replicate(seed, slope, size=size) for seed in range(REPLICATES)], dtype=torch.float64)
    if size == 1:
        assert float(found[:, 0].square().mean()) == pytest.approx(1.0, abs=4.5 * (2 / REPLICATES) ** 0.5)
    # The chance that is told is a p-value, of several directions a bound, near by where it is small.
    assert float((found[:, 1] < 0.1).double().mean()) == pytest.approx(0.1, abs=4.5 * (0.09 / REPLICATES) ** 0.5)


def test_starts_that_nobody_chose_are_told_of() -> None:
    """Of half the information each, starts say 0 and the rest says 1: off by sqrt(NUMBER / 2) standard errors."""
    found = torch.tensor([replicate(seed, theta=1.0, chosen=False) for seed in range(REPLICATES)], dtype=torch.float64)
    error = (2 + 4 * NUMBER / 2) ** 0.5 / REPLICATES**0.5
    # Samples know the mean of the starts to NUMBER / ess, by which the standard error is the larger: 1% here.
    expected = 1 + NUMBER / 2
    assert float(found[:, 0].square().mean()) == pytest.approx(expected, abs=4.5 * error + 0.02 * expected)
    assert float((found[:, 1] < UNLIKELY).double().mean()) > 0.3  # half of them, where 3.3 errors are told


def numbered(seed: int, num_states: int, number: int, rare: float | None = None) -> tuple[float, float]:
    """Starts in numbered states of random worth (or in a rare one of worth), and what follows as above.

    The reward is what it is, and the posterior's mean off it by a normal error: the difference of what starts and what
    follows say does not depend on it.
    """
    normal, generator = noise(seed), torch.Generator().manual_seed(seed)
    worth = normal(num_states) if rare is None else torch.eye(num_states, dtype=torch.float64)[0]
    chance = torch.full((num_states,), 1 / num_states, dtype=torch.float64)
    if rare is not None:
        chance = torch.full((num_states,), (1 - rare) / (num_states - 1), dtype=torch.float64)
        chance[0] = rare
    theta = 0.5 * normal(1)
    starts = torch.multinomial(chance * (theta * worth).exp(), number, replacement=True, generator=generator)
    follow = theta + normal(number)
    draws = theta + normal(DRAWS, 1) / (2 * number) ** 0.5
    ours, after = torch.multinomial(chance, SAMPLES, replacement=True, generator=generator), normal(SAMPLES)
    return conflict(starting(ours), starts, draws * (worth[ours] + after), draws * (worth[starts] + follow))


@pytest.mark.parametrize(
    ("num_states", "number", "rare"), [(16, 20, None), (144, 10, None), (225, 10, None), (4, 10, 0.03)]
)
def test_starts_in_numbered_states_are_told_of_by_chance_alone(
    num_states: int, number: int, rare: float | None
) -> None:
    """Chances are p-values, of more states than are told apart, and of few rare starts, whose sum is not normal."""
    found = torch.tensor([numbered(seed, num_states, number, rare) for seed in range(REPLICATES)], dtype=torch.float64)
    for level in (0.1, 0.005):
        at_most = level + 4.5 * (level * (1 - level) / REPLICATES) ** 0.5
        assert float((found[:, 1] < level).double().mean()) <= at_most


def test_large_errors_of_few_rare_starts_are_likelier_than_of_a_normal_law() -> None:
    found = [numbered(seed, 4, 10, 0.03) for seed in range(REPLICATES)]
    large = [(errors, chance) for errors, chance in found if errors > 2.4]
    assert large and all(chance > 1.5 * math.erfc(errors / 2**0.5) for errors, chance in large)
    # Of ten draws of what happens with probability .03 one in four has any: 1 - .97^10.
    weight = torch.tensor([0.03, 0.97], dtype=torch.float64)
    chance, exact = _simulated(torch.tensor([[1.0, 0.0]], dtype=torch.float64), weight, 10, 1.0), 1 - 0.97**10
    assert chance == pytest.approx(exact, abs=4.5 * (exact * (1 - exact) / 8000) ** 0.5)


def test_large_conflicts_are_told_of_one_reward_of_many() -> None:
    """Fifty people with a reward each, of whom one was put where he started: the simulation's floor is no bound."""
    normal = noise(0)
    samples, after = normal(SAMPLES), normal(SAMPLES)
    theta, starts, follow = 0.2 * normal(50, 1), normal(50, NUMBER), normal(50, NUMBER)
    starts, follow = theta + starts, theta + follow
    starts[17] = starts[17] - 3
    draws = theta.mT + normal(DRAWS, 50) / (2 * NUMBER) ** 0.5
    of_demos = draws.unsqueeze(-1) * (starts + follow)
    errors, chance = conflict(
        starting(samples), starts.unsqueeze(-1), draws.reshape(DRAWS, 50, 1, 1) * (samples + after), of_demos
    )
    assert chance < 1e-6 and errors == pytest.approx(3 * (NUMBER / 2) ** 0.5, abs=4.5)


def test_starts_that_tell_nothing_or_all_have_no_conflict() -> None:
    """Where what follows tells nothing, starts have all of what is known, and nothing contradicts."""
    ours, far = noise(0)(SAMPLES), torch.full((1000, 1), 3.0, dtype=torch.float64)
    draws = noise(1)(DRAWS, 1) / 1000**0.5
    assert conflict(starting(ours), far, draws * ours, draws * far[:, 0]) == (0.0, 1.0)
    assert conflict(starting(ours), far, draws * torch.ones_like(ours), draws * torch.ones_like(far[:, 0])) == (
        0.0,
        1.0,
    )
    assert conflict(starting(0 * ours), 0 * far, draws * ours, draws * far[:, 0]) == (0.0, 1.0)


def test_a_coordinate_that_does_not_vary_says_nothing() -> None:
    """It has a rounding error, of which a regression would make anything."""
    normal = noise(0)
    samples, after, follow, starts = normal(SAMPLES), normal(SAMPLES), normal(NUMBER), normal(NUMBER)
    draws = normal(DRAWS, 1) / (2 * NUMBER) ** 0.5
    returns, of_demos = draws * (samples + after), draws * (starts + follow)
    alone = conflict(starting(samples), starts.unsqueeze(-1), returns, of_demos)
    for value, seen in ((0.1, float(torch.tensor(0.1))), (0.1, 0.101), (0.0, 1e-8)):
        pair = torch.stack([samples, torch.full_like(samples, value)], -1)
        theirs = torch.stack([starts, torch.full_like(starts, seen)], -1)
        assert conflict(starting(pair), theirs, returns, of_demos) == pytest.approx(alone, rel=1e-6)


def test_what_cannot_be_is_left_out() -> None:
    """Samples of weight 0, whose returns are -inf under some draws; a start that no sample has is one of the rest."""
    normal = noise(0)
    ours, starts = torch.arange(SAMPLES) % 5, torch.arange(NUMBER) % 5
    draws = normal(DRAWS, 1) / (2 * NUMBER) ** 0.5
    returns, of_demos = draws * (ours + normal(SAMPLES)), draws * (starts + normal(NUMBER))
    plain = conflict(starting(ours), starts, returns, of_demos)
    impossible = torch.cat([returns, torch.full((DRAWS, 1), -torch.inf)], 1)
    assert conflict(starting(torch.cat([ours, ours[:1]])), starts, impossible, of_demos) == plain
    errors, chance = conflict(starting(ours), torch.where(starts == 0, 9, starts), returns, of_demos)
    assert errors < 10 and chance > 0


def test_rewards_of_their_own_and_no_plate() -> None:
    """Demonstrations with a reward each, one for all, and one by itself; on whatever device tensors are made."""
    normal = noise(0)
    samples, after, starts = normal(SAMPLES), normal(SAMPLES), normal(4)
    draws, follow = normal(DRAWS, 4), normal(4)
    each = conflict(
        starting(samples), starts.unsqueeze(-1), draws.unsqueeze(-1) * (samples + after), draws * (starts + follow)
    )
    alone = [
        conflict(starting(samples), one, draw * (samples + after), draw * (one + later))
        for one, later, draw in zip(starts.unsqueeze(-1), follow, draws.unsqueeze(-1).unbind(1), strict=True)
    ]
    largest = max(alone)
    assert each == pytest.approx((largest[0], min(4 * largest[1], 1.0)))
    # Of numbered states one, without a plate. The default device is the run's, and everything here is on the CPU.
    ours, returns = torch.arange(SAMPLES) % 5, draws[:, :1] * after
    pool = starting(ours)
    assert pool.log_offset.isfinite().all()
    with torch.device("meta"):
        found = conflict(pool, ours[3], returns, returns[:, 3])
    assert 0 <= found.errors < 10


# ------------------------------------------------------------------------------------------------ in a fit, and after


STEPS, SIZE, NUM_DEMOS = 5, 16, 20


def world(start: Tensor) -> pirl.TabularMDP:
    return pirl.TabularMDP(pirl.envs.gridworld(4, 4, slip=0.1, horizon=STEPS).transition, initial=start, horizon=STEPS)


def model(demos: pirl.Trajectories, pool: pirl.Pool, features: Tensor) -> None:
    reward = pirl.linear_reward(features, pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1)))
    with pyro.plate("episode", len(demos)):
        pyro.sample("trajectories", pirl.SampledMaxEntTrajectory(pool, reward), obs=demos.as_tensor())


def seen(start: Tensor, reward: Tensor, num: int) -> Tensor:
    return pirl.MaxEntTrajectory(world(start), reward, lengths=torch.full((num,), STEPS)).sample()


@pytest.mark.parametrize("kind", ["chosen", "set"])
def test_a_fit_tells_of_starts_that_were_set(kind: str) -> None:
    torch.manual_seed(1)
    anywhere = torch.full((SIZE,), 1 / SIZE, dtype=torch.float64)
    features = torch.randn(SIZE, 2, dtype=torch.float64)
    reward = pirl.linear_reward(features, torch.tensor([1.0, -0.7], dtype=torch.float64))
    if kind == "chosen":
        table = seen(anywhere, reward, NUM_DEMOS)
    else:  # one by one, from wherever the experimenter put them
        put = torch.eye(SIZE, dtype=torch.float64)[torch.randint(SIZE, (NUM_DEMOS,))]
        table = torch.cat([seen(start, reward, 1) for start in put])
    demos = pirl.Trajectories(table[..., 0], table[:, :-1, 1])
    options: dict[str, Any] = {"engine": "laplace", "num_samples": 100, "num_prior": 0, "num_posterior_predictive": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bayesian_guided_cost(model, demos, TabularSimulator(world(anywhere)), features, **options).posterior
    told = [str(one.message) for one in caught if issubclass(one.category, ConvergenceWarning)]
    assert len(told) == (kind == "set")
    assert found.attrs["partition_trusted"] == 1
    assert ("partition_starts" in found.attrs) == (kind == "set")
    problems = {finding.kind: finding for finding in pirl.diagnose(found) if finding.severity == "problem"}
    assert ("starts" in problems) == (kind == "set")
    if kind == "set":
        assert "starts and what follows them differ" in told[0] and "a simulator for each start" in told[0]
        assert "differ about the reward by" in problems["starts"].what
        assert "a simulator for each start" in problems["starts"].advice
