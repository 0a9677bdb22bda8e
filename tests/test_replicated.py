"""Many data sets at once: they equal one by one, have their own posteriors, and refuse models that mix them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from pirl.envs import gridworld, gridworld_features
from pirl.errors import (
    ModelError,
    OptionError,
)
from pirl.infer import Potential
from pirl.infer.replicated import ReplicatedPotential, run_all
from pirl.replicates import Study
from pirl.setting import Setting
from pirl.verdicts import verdicts, words
from tests.studies import DATA, SCALE, normal


def hierarchy(data: Tensor) -> None:
    """Means of groups, a scale, and a support that is not the whole line: dims of every kind."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    base = pyro.sample("base", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("group", 3):
        mu = pyro.sample("mu", dist.Normal(base.sum(-1), scale))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, 0.7), obs=data)


def vectors(data: Tensor) -> None:
    """A hierarchy of vectors, as the README writes it."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("group", len(data)):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        weights = mean + scale[..., None] * offset
        pyro.sample("x", dist.Normal(weights, SCALE).to_event(1), obs=data)


def problem(reading: str) -> tuple[Any, ...]:
    mdp = gridworld(3, 3, slip=0.2, horizon=5)
    features = gridworld_features(3, 3, num_features=2)
    law = pirl.MaxCausalEntTrajectory if reading == "causal" else pirl.MaxEntTrajectory
    lengths = torch.tensor([5, 5, 3, 2])
    table = law(mdp, pirl.linear_reward(features, torch.zeros(2, dtype=mdp.dtype)), lengths=lengths).sample()

    def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
        prior = dist.Normal(0.0, 2.0).expand([features.shape[-1]]).to_event(1)
        reward = pirl.linear_reward(features, pyro.sample("weights", prior))
        with pyro.plate("episode", len(demos)):
            pyro.sample("trajectories", law(mdp, reward, lengths=demos.lengths), obs=demos.as_tensor())

    return model, pirl.Trajectories(table[..., 0], table[:, :-1, 1], lengths), mdp, features


def stacked(model: Any, args: tuple[Any, ...], count: int) -> tuple[list[Potential], dict[str, Tensor]]:
    study = Study(model, Setting.of(args, {}))
    truths = [study.draw(number) for number in range(count)]
    data = {name: torch.stack([truth.data[name] for truth in truths]) for name in truths[0].data}
    return [study.potential(truth) for truth in truths], data


@pytest.mark.parametrize("case", ["hierarchy", "vectors", "causal", "trajectory"])
def test_at_once_equals_one_by_one(case: str) -> None:
    made_up: dict[str, Any] = {
        "hierarchy": (hierarchy, DATA.new_zeros(5, 3)),
        "vectors": (vectors, DATA.new_zeros(5, 2)),
    }
    model, *args = made_up[case] if case in made_up else problem(case)
    with Setting.of(args, {}).entered(), pyro.validation_enabled(False):
        potentials, data = stacked(model, tuple(args), 4)
        probes = torch.stack([potentials[0].flatten(potentials[0].prior_draw()) for _ in range(2)])
        target = ReplicatedPotential(potentials, model, data, probes, width=12)
        points = torch.randn(12, potentials[0].size)
        value, slope, _ = target(points)
        for row, point in enumerate(points):
            energy, gradient = potentials[row % 4].gradient(potentials[row % 4].unflatten(point))
            torch.testing.assert_close(value[row], energy, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(slope[row], potentials[0].flatten(gradient), rtol=1e-10, atol=1e-10)


def test_replicates_sampled_at_once_have_their_own_posteriors() -> None:
    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(normal, (DATA,), 20)
        found = run_all(potentials, normal, data, num_chains=16, num_warmup=100, num_samples=100, seed=1)
    precision = 1 + 4 / SCALE**2
    for draws, x in zip(found, data["x"], strict=True):
        mu = draws.values["mu"].numpy()
        error = precision**-0.5 / pirl.convergence.ess_bulk(mu) ** 0.5
        assert mu.mean() == pytest.approx(float(x.sum()) / SCALE**2 / precision, abs=4.5 * error)
        assert mu.std() == pytest.approx(precision**-0.5, rel=4.5 / (2 * pirl.convergence.ess_bulk(mu**2)) ** 0.5)


def test_chains_sampled_at_once_start_where_they_are_told() -> None:
    def far(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(50.0, 1.0))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, SCALE), obs=data)

    sizes = {"num_chains": 4, "num_warmup": 0, "num_samples": 1, "max_leapfrogs": 1, "seed": 1}
    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(far, (DATA,), 3)
        first = {
            # One step of a prior's or a box's size is refused where the posterior's sd is .24: chains stay there.
            init: torch.stack([draws.values["mu"] for draws in run_all(potentials, far, data, init=init, **sizes)])
            for init in ("prior", "uniform", "laplace")
        }
    assert first["prior"].min() > 40 and first["uniform"].abs().max() < 2 and len(first["uniform"].unique()) == 12
    precision = 1 + 4 / SCALE**2
    means = (50.0 + data["x"].sum(-1) / SCALE**2) / precision
    assert ((first["laplace"].mean(1).squeeze() - means).abs() < 4.5 * 2 / (4 * precision) ** 0.5).all()
    with pytest.raises(OptionError, match="batch=2 cannot be: init gives values, and many replicates start by one of"):
        pirl.calibrate(far, DATA, batch=2, init={"mu": torch.tensor(50.0)}, progress=False)
    with pytest.raises(OptionError, match="batch=2 cannot be: init is 'priors', and many replicates"):
        pirl.calibrate(far, DATA, batch=2, init="priors", progress=False)
    with pytest.raises(OptionError, match="batch=2 cannot be: with the option loop"):
        pirl.calibrate(far, DATA, batch=2, loop=True, progress=False)
    with pytest.raises(OptionError, match="batch=2 cannot be: the data are drawn by draw_data"):
        pirl.calibrate(far, DATA, batch=2, draw_data=lambda truth, given: {"data": DATA}, progress=False)


def test_one_chain_a_replicate_has_no_spread_to_learn_from() -> None:
    """Of one start torch has no standard deviation, and says so: a warning, which is an error here."""
    sizes = {"num_chains": 1, "num_warmup": 10, "num_samples": 9, "num_draws": 9, "progress": False}
    found = pirl.calibrate(normal, DATA, num_replicates=3, batch=3, **sizes)
    assert np.isfinite(found["recovery"]["mu"].sel(summary="mean")).all()


def test_models_that_mix_replicates_are_sampled_one_by_one() -> None:
    def mixing(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(weights[0] + weights[1], SCALE), obs=data)

    sizes = {"num_replicates": 2, "num_chains": 4, "num_warmup": 20, "num_samples": 30, "progress": False}
    with pytest.raises(ModelError, match="data sets at once.*; with batch=1 replicates are sampled one by one"):
        pirl.calibrate(mixing, DATA, batch=2, **sizes)
    study = pirl.calibrate(mixing, DATA, **sizes)
    assert study.attrs["num_replicates"] == 2
    (line,) = [line for line in words(study, verdicts(study)) if "at once" in line]
    # With the reason, and where in the model it arose.
    assert line.startswith("Not all replicates could be sampled at once, which is faster: the model does not take many")


def test_progress_is_told_within_a_batch() -> None:
    shares = list[float]()
    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(normal, (DATA,), 3)
        run_all(potentials, normal, data, num_chains=4, num_warmup=20, num_samples=5, seed=1, told=shares.append)
    assert shares == pytest.approx([(k + 1) / 25 for k in range(25)])


def test_models_that_give_other_densities_at_once_are_sampled_one_by_one() -> None:
    def turned(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = SCALE if mu.dim() == 0 else 2 * SCALE  # right shapes, wrong law
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, scale), obs=data)

    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(turned, (DATA,), 3)
        with pytest.raises(ModelError, match="other densities"):
            run_all(potentials, turned, data, num_chains=4, num_warmup=5, num_samples=5, seed=1)
    for options in ({"target_accept_prob": 5.0}, {"max_leapfrogs": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            pirl.calibrate(normal, DATA, num_replicates=2, progress=False, **options)


def cornered(data: Tensor) -> None:
    """Correlated pairs: torch finds no Cholesky factor where the correlation is not within -1 and 1."""
    t = pyro.sample("t", dist.Normal(0.0, 0.6))
    one = torch.ones_like(t)
    covariance = torch.stack([torch.stack([one, t], -1), torch.stack([t, one], -1)], -2)
    factor = torch.linalg.cholesky(covariance)
    with pyro.plate("item", len(data)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=data)


PAIRS = torch.zeros(6, 2, dtype=torch.float64)


@pytest.mark.parametrize("halvings", [100, 2])
def test_where_one_of_many_has_no_density_the_others_have_theirs(
    monkeypatch: pytest.MonkeyPatch, halvings: int
) -> None:
    """Torch stops where one of a batch of matrices has no factor."""
    monkeypatch.setattr("pirl.infer.replicated.MOST_HALVINGS", halvings)
    with Setting.of((PAIRS,), {}).entered(), pyro.validation_enabled(False):
        potentials, data = stacked(cornered, (PAIRS,), 3)
        target = ReplicatedPotential(potentials, cornered, data, torch.tensor([[0.1], [-0.3]]), width=6)
        points = torch.tensor([[0.2], [0.5], [1.5], [-1.1], [-0.2], [0.9]])
        value, slope, _ = target(points)
        for row, point in enumerate(points):
            if abs(float(point)) >= 1:
                assert value[row].isnan() and slope[row].isnan()
                continue
            energy, gradient = potentials[row % 3].gradient({"t": point[0]})
            torch.testing.assert_close(value[row], energy, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(slope[row, 0], gradient["t"], rtol=1e-10, atol=1e-10)


def test_studies_of_models_without_a_density_somewhere() -> None:
    sizes = {"num_replicates": 6, "num_chains": 4, "num_warmup": 20, "num_samples": 30, "progress": False}
    study = pirl.calibrate(cornered, PAIRS, **sizes)
    assert study.attrs["sampler"].startswith("HMC of many replicates at once")
    assert "; chees" not in study.attrs["sampler"]
    assert not study["sample_stats"]["failed"].values.any()
    assert (abs(study["recovery"]["t"].sel(summary="mean")) < 1).all()
    # Approximations do not know of it: what torch complains of is a failure of the replicate, and not of the study.
    rough = pirl.calibrate(cornered, PAIRS, engine="laplace", num_replicates=20, num_draws=19, progress=False)
    failed = rough["sample_stats"]["failed"].values
    assert failed.any() and not failed.all()
    assert "no density at a draw of the posterior" in rough.attrs["failures"]
