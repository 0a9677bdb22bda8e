"""Starts that nobody chose are told of: what they say of the reward is not what follows says."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from pirl.errors import ConvergenceWarning
from pirl.learning import bayesian_guided_cost
from pirl.posterior.starts import conflict
from pirl.simulators import TabularSimulator
from tests.toys import Plain

REPLICATES, NUMBER, DRAWS, SAMPLES = 200, 20, 100, 4000
PRECISION = 16.0
"""Of the prior: samples of no reward know log Z of rewards so small."""


def replicate(seed: int, slope: float = 1.0, theta: float | None = None, chosen: bool = True) -> tuple[float, float]:
    """A start s and what follows, y, standard normal by chance; the return theta (s + slope y), theta normal.

    Both are normal with means theta and slope theta where rewards choose them, and the posterior of theta is normal.

    Args:
        slope: how much more what follows tells than starts.
        theta: the reward; None: of the prior.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    theta = float(noise(1)) / PRECISION**0.5 if theta is None else theta
    starts, follow = chosen * theta + noise(NUMBER), slope * theta + noise(NUMBER)
    precision = PRECISION + NUMBER * (1 + slope**2)
    draws = (starts.sum() + slope * follow.sum()) / precision + noise(DRAWS) / math.sqrt(precision)
    samples = noise(SAMPLES, 2)
    returns = draws.unsqueeze(-1) * (samples @ torch.tensor([1.0, slope], dtype=torch.float64))
    return conflict(starting(samples[:, 0]), starts.unsqueeze(-1), returns)


def starting(starts: Tensor) -> pirl.Pool:
    """A pool of the base policy with these starts, of whose samples none is likelier than another."""
    nothing = torch.zeros(len(starts), dtype=torch.float64)
    count = torch.ones(len(starts), dtype=torch.long)
    states = starts.reshape(-1, 1, 1).expand(-1, 2, 1)
    return pirl.Pool(states, nothing.reshape(-1, 1, 1), count, None, nothing, (Plain(),), 0 * count, nothing[None])


@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_conflicts_of_what_was_chosen_are_as_large_as_chance_makes_them(slope: float) -> None:
    """They are normal of variance 1, whatever the share that starts have of what is known: .49, .36 and .09 here."""
    found = torch.tensor([replicate(seed, slope=slope) for seed in range(REPLICATES)], dtype=torch.float64)
    assert float(found[:, 0].square().mean()) == pytest.approx(1.0, abs=4.5 * (2 / REPLICATES) ** 0.5)
    # The chance that is told is a p-value: a tenth of them are below .1.
    assert float((found[:, 1] < 0.1).double().mean()) == pytest.approx(0.1, abs=4.5 * (0.09 / REPLICATES) ** 0.5)


def test_starts_that_nobody_chose_are_told_of() -> None:
    """Their slope at the posterior's mean, sum s - NUMBER mean, with a mean of which starts have the share k."""
    found = torch.tensor([replicate(seed, theta=1.0, chosen=False) for seed in range(REPLICATES)], dtype=torch.float64)
    k = NUMBER / (PRECISION + 2 * NUMBER)
    centre, variance = NUMBER**0.5 * k / (1 - k) ** 0.5, ((1 - k) ** 2 + k**2) / (1 - k)
    error = (2 * variance**2 + 4 * centre**2 * variance) ** 0.5 / REPLICATES**0.5
    # The posterior's standard deviation is that of a hundred draws, by which the square is off by 1/50 on average.
    assert float(found[:, 0].square().mean()) == pytest.approx(centre**2 + variance, abs=4.5 * error, rel=0.02)


def test_starts_that_tell_nothing_or_all_have_no_conflict() -> None:
    """Where what follows tells nothing, starts have all of the precision but the prior's, and nothing contradicts."""
    ours = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.randn(DRAWS, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 1000**0.5
    far = torch.full((1000, 1), 3.0, dtype=torch.float64)
    assert conflict(starting(ours), far, draws * ours) == (0.0, 1.0)
    assert conflict(starting(ours), far, draws * torch.ones_like(ours)) == (0.0, 1.0)  # nor does the return
    assert conflict(starting(0 * ours), far, draws * ours) == (0.0, 1.0)


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
