"""The models: published estimates, known truths, and the posteriors that quadrature gives."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import scipy.optimize
import torch
from torch import Tensor

import pirl
from models import bus_engine, frozen_lake, gridworld
from pirl.datasets import simulate
from pirl.envs import gridworld as make_gridworld
from pirl.errors import OptionError
from tests.bus_grid import BusGrid

ROOT = Path(__file__).resolve().parents[1]

# Rust 1987, table IX: group, discount, RC, theta11; and the log-likelihood of the choices.
TABLE_IX = [
    ("1-3", 0.9999, 11.7270, 4.8259, -132.3887),
    ("4", 0.9999, 10.0750, 2.2930, -163.5843),
    ("1-4", 0.9999, 9.7558, 2.6275, -300.2503),
    ("1-3", 0.0, 8.2985, 109.9031, -134.7468),
    ("4", 0.0, 7.6358, 71.5133, -165.4585),
    ("1-4", 0.0, 7.3055, 70.2769, -306.6411),
]


def choice_log_likelihood(arguments: dict[str, Any], costs: Tensor) -> Tensor:
    """What the model says of the choices at (RC, theta11), bus by bus."""
    conditioned = pyro.condition(bus_engine.model, {"RC": costs[0], "theta11": costs[1]})
    site = pyro.poutine.trace(conditioned).get_trace(**arguments).nodes["replaced"]
    return site["fn"].log_prob(site["value"])


def highest(arguments: dict[str, Any], start: np.ndarray) -> tuple[np.ndarray, float]:
    """The maximum of the model's own likelihood, from a start; in units of the start, which are alike."""

    def loss(ratio: np.ndarray) -> tuple[float, np.ndarray]:
        costs = torch.tensor(ratio * start, requires_grad=True)
        value = -choice_log_likelihood(arguments, costs).sum()
        (slope,) = torch.autograd.grad(value, costs)
        return value.item(), slope.numpy() * start

    found = scipy.optimize.minimize(
        loss, np.ones(2), jac=True, method="L-BFGS-B", options={"ftol": 1e-13, "gtol": 1e-6}
    )
    return found.x * start, -found.fun


@pytest.mark.parametrize(("group", "discount", "replacement_cost", "theta11", "log_likelihood"), TABLE_IX)
def test_rust_table_ix(
    data_folder: Path, group: str, discount: float, replacement_cost: float, theta11: float, log_likelihood: float
) -> None:
    arguments = bus_engine.load(group=group, discount=discount, data=data_folder / "zurcher_bus")
    published = np.array([replacement_cost, theta11])
    mode, value = highest(arguments, 1.3 * published)
    assert mode == pytest.approx(published, rel=1e-3)
    assert value == pytest.approx(log_likelihood, abs=1e-3)
    # The priors do not cut the estimate off.
    for estimate, (low, high) in zip(published, arguments["bounds"].values(), strict=True):
        assert low < estimate < high


def test_a_bus_is_one_observation() -> None:
    arguments = bus_engine.load(group="4")
    costs = torch.tensor([9.0, 2.0], dtype=torch.float64)
    each = choice_log_likelihood(arguments, costs)
    assert each.shape == (37,)
    log_policy = pirl.soft_policy(arguments["mdp"], bus_engine.costs(*costs))
    kept = arguments["months"] - arguments["replaced"]
    expected = (kept * log_policy[:, 0] + arguments["replaced"] * log_policy[:, 1]).sum(dim=-1)
    # 1e-12, scaled by 1 / (1 - discount)
    torch.testing.assert_close(each, expected, rtol=1e-8, atol=1e-8)


def test_replacements_are_simulated_given_the_months() -> None:
    months = torch.tensor([[2000.0, 0.0, 2000.0]], dtype=torch.float64)
    log_odds = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    law = bus_engine.Choices(months, logits=log_odds).to_event(1)
    drawn = law.sample((500,))
    assert drawn.shape == (500, 1, 3)
    assert not drawn.requires_grad
    assert drawn[:, 0, 1].eq(0).all()
    p = torch.sigmoid(log_odds.detach())
    error = (months[0] * p * (1 - p) / 500).sqrt()
    assert ((drawn.mean(dim=0)[0] - months[0] * p).abs() <= 4 * error).all()
    # Also under vmap, where posterior predictive draws are made.
    mapped = torch.func.vmap(
        lambda logits: bus_engine.Choices(months, logits=logits).to_event(1).sample(), randomness="different"
    )(log_odds.detach().expand(400, 3))
    assert ((mapped.mean(dim=0)[0] - months[0] * p).abs() <= 4 * error * (500 / 400) ** 0.5).all()


def quadrature(arguments: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Posterior mean and sd of the costs; for a smooth density errors fall faster than any power of a cell's width."""
    grid = BusGrid(arguments, size=31)
    return grid.moments(grid.posterior(grid.log_likelihood(arguments["replaced"])))[0]


def test_the_grid_gives_the_known_posterior_of_group_4() -> None:
    exact = quadrature(bus_engine.load(group="4"))
    assert exact["RC"] == pytest.approx({"mean": 10.610, "sd": 1.442}, abs=2e-3)
    assert exact["theta11"] == pytest.approx({"mean": 2.511, "sd": 0.587}, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["nuts", "chees"])
def test_engines_agree_with_quadrature(engine: str) -> None:
    import arviz_stats

    arguments = bus_engine.load(group="4")
    sizes = {"nuts": {"num_chains": 2, "num_samples": 200}, "chees": {"num_samples": 50}}[engine]
    posterior = pirl.fit(
        bus_engine.model,
        model_kwargs=arguments,
        engine=engine,
        **{**bus_engine.defaults[engine], **sizes},
        num_prior=0,
        num_posterior_predictive=0,
        progress=False,
    )["posterior"].to_dataset()
    exact = quadrature(arguments)
    for statistic in ("mean", "sd"):
        error = arviz_stats.mcse(posterior, method=statistic)
        found = posterior.mean() if statistic == "mean" else posterior.std(ddof=1)
        for name in exact:
            assert abs(float(found[name]) - exact[name][statistic]) < 4 * float(error[name])


def test_the_reference_is_given_for_what_rust_estimated() -> None:
    assert bus_engine.reference("4", 0.9999)["values"] == {"RC": 10.0750, "theta11": 2.2930}  # type: ignore[index]
    assert bus_engine.reference("4", 0.99) is None
    assert bus_engine.reference("1", 0.9999) is None
    assert bus_engine.coords("4", None)["bus"][0] == 5297


@pytest.mark.parametrize("reading", ["causal", "trajectory"])
def test_simulated_choices_follow_the_policy(reading: str) -> None:
    mdp = make_gridworld(2, 2, slip=0.0, horizon=3, initial=0)
    reward = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    before = torch.random.get_rng_state()
    demos = simulate(mdp, reward, num_episodes=4000, length=3, reading=reading, seed=5)
    assert torch.random.get_rng_state().equal(before)
    assert demos.lengths.eq(3).all()
    demos.validate(mdp)
    # Without chance and discount the two readings choose alike.
    expected = pirl.soft_policy(mdp, reward, "causal")[0, 0].exp()
    frequency = torch.bincount(demos.actions[:, 0], minlength=5) / 4000
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()
    again = simulate(mdp, reward, num_episodes=4000, length=3, reading=reading, seed=5)
    assert demos.as_tensor().equal(again.as_tensor())
    other = simulate(mdp, reward, num_episodes=4000, length=3, reading=reading, seed=6)
    assert not demos.as_tensor().equal(other.as_tensor())


def test_simulation_refuses_another_reading() -> None:
    with pytest.raises(OptionError, match="choose causal or trajectory"):
        simulate(make_gridworld(2, 2, horizon=3), torch.zeros(4, dtype=torch.float64), 1, 3, "optimistic")


@pytest.mark.parametrize("reading", ["causal", "trajectory"])
def test_gridworld_finds_its_truth(reading: Any) -> None:
    options = {"num_features": 3, "seed": 1}
    arguments = gridworld.load(rows=3, cols=3, num_demos=300, horizon=6, reading=reading, **options)
    posterior = pirl.fit(
        gridworld.model, model_kwargs=arguments, engine="laplace", num_samples=100, num_prior=5,
        num_posterior_predictive=5, coords=gridworld.coords(arguments["features"], 3), progress=False,
    )  # fmt: skip
    weights = posterior["posterior"]["weights"].values.reshape(-1, 3)
    truth = np.array(gridworld.reference(**options)["values"]["weights"])
    # The squared Mahalanobis distance is chi-squared with 3 degrees of freedom: 16.3 leaves one in a thousand.
    away = truth - weights.mean(axis=0)
    assert away @ np.linalg.solve(np.cov(weights.T), away) < 16.3
    assert posterior.posterior_predictive["trajectories"].shape[2:] == (300, 7, 2)


@pytest.mark.slow
def test_chees_and_nuts_agree_on_a_gridworld() -> None:
    """Two engines, one posterior, on a small grid; the full one is measured by the benchmarks."""
    from arviz_stats.base import array_stats

    arguments = gridworld.load(rows=4, cols=4, num_features=4, num_demos=20, horizon=8, seed=2)
    options: dict[str, Any] = {"num_prior": 0, "num_posterior_predictive": 0, "progress": False, "seed": 4}
    runs = [
        {"engine": "chees", "num_warmup": 100, "num_samples": 150},
        {"engine": "nuts", "num_chains": 2, "num_warmup": 300, "num_samples": 500, "dense_mass": True},
    ]
    draws = [
        pirl.fit(gridworld.model, model_kwargs=arguments, **run, **options).posterior["weights"].values for run in runs
    ]
    for k in range(4):
        ours, theirs = (x[:, :, k] for x in draws)
        for method, of in (("mean", np.mean), ("sd", np.std)):
            error = np.hypot(array_stats.mcse(ours, method=method), array_stats.mcse(theirs, method=method))
            assert abs(of(ours) - of(theirs)) < 4 * error, (k, method)


def test_features_are_named_after_their_centres() -> None:
    features = gridworld.load(rows=4, cols=5, num_demos=1, horizon=2)["features"]
    names = gridworld.coords(features, 5)["feature"]
    assert len(set(names)) == features.shape[1]
    row, column = map(int, names[0][1:].split("c"))
    assert features[row * 5 + column, 0] == 1.0


def test_the_readings_differ_on_slippery_ice_only() -> None:
    pytest.importorskip("gymnasium")
    truth = torch.tensor(frozen_lake.TRUE_WORTH, dtype=torch.float64)
    likelihood = {}
    for slippery in (True, False):
        for reading in ("causal", "trajectory"):
            arguments = frozen_lake.load(slippery=slippery, num_demos=200, reading=reading)
            reward = pirl.linear_reward(arguments["kinds"], truth)
            law = frozen_lake.LAWS[reading](arguments["mdp"], reward, lengths=arguments["demos"].lengths)
            likelihood[slippery, reading] = law.log_prob(arguments["demos"].as_tensor()).sum().item()
    # The demonstrator is causal: on slippery ice the other reading explains the same demonstrations far worse.
    assert likelihood[True, "causal"] > likelihood[True, "trajectory"] + 50
    assert likelihood[False, "causal"] == pytest.approx(likelihood[False, "trajectory"], rel=1e-10)


@pytest.mark.parametrize("name", ["bus_engine", "gridworld", "frozen_lake", "linear_gaussian"])
def test_a_model_file_stands_alone(name: str) -> None:
    found = runpy.run_path(str(ROOT / "models" / f"{name}.py"))
    assert callable(found["model"])
    assert callable(found["load"])
    assert found["__doc__"]
