"""Tempered sequential Monte Carlo: its weights, its temperatures, its evidence, and several modes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch import Tensor

from pirl import errors
from pirl.fit import fit
from pirl.infer.smc import next_temperature, relative_size, resample

FEW: dict[str, Any] = {"num_prior": 0, "num_posterior_predictive": 0, "progress": False}


def test_relative_size_is_one_over_the_second_moment() -> None:
    log_weight = torch.randn(3, 50, dtype=torch.float64) * 2
    weight = log_weight.exp()
    expected = weight.sum(1) ** 2 / (50 * (weight**2).sum(1))
    torch.testing.assert_close(relative_size(log_weight), expected)
    torch.testing.assert_close(relative_size(log_weight - 1e4), expected)
    assert relative_size(torch.zeros(1, 50)).item() == pytest.approx(1.0)
    one = torch.full((1, 50), -torch.inf, dtype=torch.float64)
    one[0, 7] = 3.0
    assert relative_size(one).item() == pytest.approx(1 / 50)


def test_temperatures_rise_as_far_as_the_weights_allow() -> None:
    log_likelihood = 10 * torch.randn(4, 1000, dtype=torch.float64)
    first = next_temperature(log_likelihood, 0.0, 0.8)
    assert 0 < first < 1
    assert float(relative_size(first * log_likelihood).mean()) == pytest.approx(0.8, abs=1e-6)
    second = next_temperature(log_likelihood, first, 0.8)
    assert second == pytest.approx(2 * first, rel=1e-6)  # the same particles: the same step
    assert next_temperature(1e-3 * log_likelihood, 0.0, 0.8) == 1.0
    # Particles that the data rule out are lost at once, and do not hold up the others.
    ruled_out = torch.where(torch.arange(1000) < 300, -torch.inf, log_likelihood)
    assert next_temperature(ruled_out, 0.0, 0.8) == pytest.approx(first, rel=0.2)


def test_resampling_gives_each_particle_its_share() -> None:
    """Systematic resampling keeps every count within one of N w, and right on average."""
    generator = torch.Generator().manual_seed(0)
    log_weight = torch.randn(2, 200, dtype=torch.float64, generator=generator)
    expected = 200 * torch.softmax(log_weight, 1)
    total, trials = torch.zeros(2, 200, dtype=torch.float64), 2000
    for _ in range(trials):
        chosen = resample(log_weight, torch.rand(2, dtype=torch.float64, generator=generator))
        assert bool((chosen.diff(dim=1) >= 0).all())  # families stay side by side
        count = torch.stack([torch.bincount(row, minlength=200) for row in chosen]).to(torch.float64)
        assert bool(((count - expected).abs() < 1).all())
        total += count
    assert float((total / trials - expected).abs().max()) < 5 * 0.5 / math.sqrt(trials)


FAR, WIDTH, SHARE = 6.0, 0.3, 0.25


def two_modes() -> None:
    """A narrow likelihood at -6 and at +6, of weights 1/4 and 3/4, under a broad prior that leans to the left."""
    x = pyro.sample("x", dist.Normal(-2.0, 5.0))
    places = dist.Normal(torch.tensor([-FAR, FAR]), WIDTH)
    pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.tensor([SHARE, 1 - SHARE])), places), obs=x)


def two_mode_truth() -> tuple[float, float]:
    """Posterior probability of the right mode, and log evidence: Gaussians times Gaussians."""
    wide = math.sqrt(5.0**2 + WIDTH**2)
    left, right = (w * stats.norm.pdf(m, -2.0, wide) for w, m in ((SHARE, -FAR), (1 - SHARE, FAR)))
    return right / (left + right), math.log(left + right)


def test_modes_keep_their_shares_and_the_evidence_is_right() -> None:
    share, evidence = two_mode_truth()

    def density(x: float) -> float:
        likelihood = SHARE * stats.norm.pdf(x, -FAR, WIDTH) + (1 - SHARE) * stats.norm.pdf(x, FAR, WIDTH)
        return stats.norm.pdf(x, -2, 5) * likelihood

    numeric = quad(density, -20, 20, points=[-FAR, FAR], limit=400)[0]
    assert math.log(numeric) == pytest.approx(evidence, abs=1e-6)
    result = fit(two_modes, engine="smc", num_chains=16, num_samples=500, target_ess=0.9, seed=1, **FEW)
    right = (result.posterior["x"].values > 0).mean(1)
    assert 0.1 < share < 0.9
    # Populations are independent: their spread gives the standard error.
    assert abs(right.mean() - share) < 4 * right.std(ddof=1) / 4
    assert right.std(ddof=1) / 4 < 0.02
    assert abs(result.attrs["log_evidence"] - evidence) < 0.02
    assert abs(result.attrs["log_evidence"] - evidence) < 4 * result.attrs["log_evidence_se"]
    # No chain that starts in one mode finds the other: what smc is for.
    assert result.attrs["num_temperatures"] == result["smc"].sizes["stage"] - 1
    temperature = result["smc"]["temperature"].values
    assert temperature[0] == 0.0 and temperature[-1] == 1.0 and (np.diff(temperature) > 0).all()


def test_evidence_needs_no_likelihood() -> None:
    """Without data the posterior is the prior, and the evidence is 1."""
    result = fit(lambda: pyro.sample("x", dist.Gamma(3.0, 2.0)), engine="smc", num_samples=500, seed=0, **FEW)
    assert result.attrs["log_evidence"] == 0.0
    draws = result.posterior["x"].values
    assert abs(draws.mean() - 1.5) < 4 * math.sqrt(0.75 / draws.size) * 1.5


def test_parts_of_the_prior_without_likelihood_are_left() -> None:
    """Half of the prior has no likelihood: it is lost at once, and the evidence halves."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x < 0, -torch.inf, 0.0 * x))

    result = fit(model, engine="smc", num_samples=2000, seed=0, **FEW)
    draws = result.posterior["x"].values
    assert draws.min() > 0
    assert abs(result.attrs["log_evidence"] - math.log(0.5)) < 4 / math.sqrt(8000)
    assert abs(draws.mean() - math.sqrt(2 / math.pi)) < 4 * 0.6 / math.sqrt(2000)


def test_a_prior_far_from_the_data_is_refused() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x < 40, -torch.inf, 0.0 * x))

    with pyro.validation_enabled(False), pytest.raises(errors.PirlError):
        fit(model, engine="smc", num_samples=50, **FEW)


def test_a_disagreement_between_populations_is_told() -> None:
    """Few particles, steep likelihoods in many directions."""

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 10.0).expand([10]).to_event(1))
        pyro.sample("y", dist.Normal(w, 0.01).to_event(1), obs=y)

    with pytest.warns(errors.ConvergenceWarning, match="log evidence differs"):
        fit(model, torch.zeros(10, dtype=torch.float64), engine="smc", num_samples=20, target_ess=0.3, **FEW)


def test_bayes_factors_compare_reward_models() -> None:
    """Evidence of nested regressions in closed form: the difference is the log Bayes factor."""
    x = torch.linspace(-1, 1, 15, dtype=torch.float64)
    y = 0.5 * x + 0.1 * torch.sin(9 * x)

    def model(powers: int) -> None:
        design = torch.stack([x**k for k in range(1, powers + 1)], 1)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([powers]).to_event(1))
        pyro.sample("y", dist.Normal(design @ w, 0.3).to_event(1), obs=y)

    found, expected = [], []
    for powers in (1, 3):
        design = torch.stack([x**k for k in range(1, powers + 1)], 1)
        marginal = 0.09 * torch.eye(15, dtype=torch.float64) + design @ design.T
        expected.append(float(dist.MultivariateNormal(torch.zeros(15, dtype=torch.float64), marginal).log_prob(y)))
        result = fit(model, powers, engine="smc", num_chains=8, num_samples=2000, target_ess=0.95, seed=2, **FEW)
        found.append(result.attrs["log_evidence"])
        assert abs(found[-1] - expected[-1]) < 0.02
    assert found[0] - found[1] == pytest.approx(expected[0] - expected[1], abs=0.03)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_targets_are_shares(share: float) -> None:
    with pytest.raises(errors.OptionError, match="target_ess"):
        fit(two_modes, engine="smc", target_ess=share, **FEW)


def test_points_where_the_model_gives_up_get_no_posterior() -> None:
    """A law that raises for x < 0, chain by chain: evidence and draws are those of the other half."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if float(x.detach()) < 0:
            raise errors.DivergenceError("no law")
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

    options: dict[str, Any] = {"num_samples": 100, "target_ess": 0.5, "seed": 1, "loop": True}
    result = fit(model, engine="smc", **options, **FEW)
    assert result.posterior["x"].values.min() >= 0
    truth = math.log(stats.norm.pdf(0, 0, math.sqrt(2)) / 2)
    assert abs(result.attrs["log_evidence"] - truth) < 4 * math.sqrt(2 / 400)
