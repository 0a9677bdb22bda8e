"""Replicates of a study: many at once equal one by one, and a study goes on where it was stopped."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
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
    CheckpointError,
    CheckpointWarning,
    ConvergenceWarning,
    InterruptedWarning,
    ModelError,
    NonFiniteError,
    OptionError,
)
from pirl.infer import Potential
from pirl.infer.engine import Draws
from pirl.infer.replicated import NotAtOnceError, ReplicatedPotential, run_all
from pirl.replicates import Study
from pirl.setting import Setting
from pirl.verdicts import print_verdicts, verdicts
from tests.studies import DATA, SCALE, exact, module, normal, study


def interrupted_after(count: int) -> Callable[..., Draws]:
    sound, calls = exact(), [0]

    def run(potential: Potential, **options: Any) -> Draws:
        calls[0] += 1
        if calls[0] > count:
            raise KeyboardInterrupt
        return sound(potential, **options)

    return run


def test_a_study_goes_on_where_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = study(monkeypatch, exact(), num_replicates=12)
    path = tmp_path / "study.ckpt"
    with pytest.warns(InterruptedWarning, match="after 5 replicates"):
        part = study(monkeypatch, interrupted_after(5), num_replicates=12, checkpoint=path)
    assert part.attrs["num_replicates"] == 5
    capsys.readouterr()
    print_verdicts(part)
    told = capsys.readouterr().out
    assert "normal: 5 replicates (of 12, interrupted) by laplace" in told and "too few to tell" in told
    assert "uniform" not in told and verdicts(part)["correlation"].isna().all()
    resumed = study(monkeypatch, interrupted_after(7), num_replicates=12, checkpoint=path)
    for group in ("ranks", "prior", "recovery", "prior_sbc", "sample_stats"):
        assert resumed[group].to_dataset().identical(whole[group].to_dataset().assign_attrs(resumed[group].attrs))
    assert "num_asked" not in resumed.attrs
    longer = study(monkeypatch, exact(), num_replicates=15, checkpoint=path)
    assert longer["ranks"]["mu"][:, :12].equals(whole["ranks"]["mu"])
    with pytest.raises(CheckpointError, match="another run"):
        study(monkeypatch, exact(), num_replicates=12, checkpoint=path, seed=1)
    with pytest.raises(CheckpointError, match="kind is 'calibration'"):
        pirl.fit(normal, DATA, engine="nuts", num_warmup=5, num_samples=5, checkpoint=path, progress=False)


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
    assert pirl.calibrate(mixing, DATA, **sizes).attrs["num_replicates"] == 2


def test_progress_is_told_within_a_batch() -> None:
    shares = list[float]()
    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(normal, (DATA,), 3)
        run_all(potentials, normal, data, num_chains=4, num_warmup=20, num_samples=5, seed=1, told=shares.append)
    assert shares == pytest.approx([(k + 1) / 25 for k in range(25)])


def test_a_study_that_is_terminated_saves_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, path = exact(), tmp_path / "study.ckpt"

    def killed(potential: Potential, *, seed: int, **options: Any) -> Draws:
        killed.calls += 1
        if killed.calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return engine(potential, seed=seed, **options)

    killed.calls = 0
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        study(monkeypatch, killed, num_replicates=6, checkpoint=path)
    assert left.value.code == 128 + signal.SIGTERM
    again_from = f"the same call goes on from {path}"
    assert capsys.readouterr().err == f"pirl: terminated after 3 replicates; {again_from}\n"
    assert signal.getsignal(signal.SIGTERM) == before
    again = study(monkeypatch, killed, num_replicates=6, checkpoint=path)
    assert killed.calls == 4 + 3  # three were saved
    whole = study(monkeypatch, engine, num_replicates=6)
    np.testing.assert_array_equal(again["ranks"]["mu"].values, whole["ranks"]["mu"].values)


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


def test_fewer_replicates_leave_the_others_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "study.ckpt"
    whole = study(monkeypatch, exact(), num_replicates=30, checkpoint=path)
    before = path.read_bytes()
    few = study(monkeypatch, exact(), num_replicates=5, checkpoint=path)
    assert path.read_bytes() == before
    np.testing.assert_array_equal(few["ranks"]["mu"].values, whole["ranks"]["mu"].values[:, :5])
    spoilt = study(monkeypatch, exact(shift=9.0), num_replicates=30, checkpoint=path)  # nothing is made anew
    np.testing.assert_array_equal(spoilt["ranks"]["mu"].values, whole["ranks"]["mu"].values)


@pytest.mark.parametrize("reason", [NotAtOnceError("no batch dims"), NonFiniteError("no start")])
def test_what_is_sampled_one_by_one_goes_on_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: Exception
) -> None:
    path, made = tmp_path / "study.ckpt", list[int]()
    own = Study.compare

    def compare(self: Study, number: int, *rest: Any) -> Any:
        made.append(number)
        if made == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return own(self, number, *rest)

    monkeypatch.setattr(Study, "compare", compare)
    monkeypatch.setattr(module, "run_all", lambda *_, **__: (_ for _ in ()).throw(reason))
    monkeypatch.setattr(module, "get_engine", lambda name: exact())
    sizes: dict[str, Any] = {
        "num_replicates": 6,
        "num_draws": 39,
        "num_chains": 2,
        "checkpoint": path,
        "progress": False,
    }
    monkeypatch.setattr(module, "check_options", lambda *_: None)
    with pytest.warns(InterruptedWarning, match="after 3 replicates"):
        pirl.calibrate(normal, DATA, **sizes)
    assert pirl.calibrate(normal, DATA, **sizes).attrs["sampler"] == "chees"
    assert made == [0, 1, 2, 3, 3, 4, 5]


def test_a_full_disk_costs_no_replicates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Any, arrays: Any) -> None:
        raise CheckpointError("cannot be written: no space left")

    monkeypatch.setattr("pirl.infer.checkpoint.Checkpoint.save", full)
    with pytest.warns(CheckpointWarning, match="no space left; the study goes on"):
        found = study(monkeypatch, exact(), num_replicates=7, checkpoint=tmp_path / "study.ckpt")
    assert found.attrs["num_replicates"] == 7


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


def test_a_replicate_that_fails_costs_the_others_nothing() -> None:
    """What is not finite for one data set says nothing against many at once, and neither does one without a start."""
    sizes = {"num_replicates": 6, "num_chains": 4, "num_warmup": 20, "num_samples": 30, "num_draws": 19}
    plain = pirl.calibrate(normal, DATA, batch=3, progress=False, **sizes)
    odd = float(plain["recovery"]["mu"].sel(summary="mean").values[0, 4])

    def quantity(draws: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        own = float(data["x"].sum()) / SCALE**2 / (1 + 4 / SCALE**2)
        return draws["mu"] * (torch.nan if abs(own - odd) < 0.1 else 1.0)

    study = pirl.calibrate(normal, DATA, batch=3, progress=False, quantities={"q": quantity}, **sizes)
    assert study["sample_stats"]["failed"].values[0].tolist() == [0, 0, 0, 0, 1, 0]
    assert study.attrs["sampler"] == plain.attrs["sampler"]
    lives = [0, 1, 2, 3, 5]
    assert np.array_equal(study["ranks"]["mu"].values[0, lives], plain["ranks"]["mu"].values[0, lives])


def test_a_batch_without_starts_is_sampled_one_by_one_and_the_next_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def sometimes(potentials: list[Potential], *arguments: Any, **options: Any) -> Any:
        calls.append(len(potentials))
        if len(calls) == 2:
            raise NonFiniteError("no start")
        return run_all(potentials, *arguments, **options)

    monkeypatch.setattr(module, "run_all", sometimes)
    sizes = {"num_replicates": 6, "num_chains": 4, "num_warmup": 20, "num_samples": 30, "num_draws": 19}
    study = pirl.calibrate(normal, DATA, batch=2, progress=False, **sizes)
    assert calls == [2, 2, 2]
    assert study.attrs["sampler"].endswith("; chees")
    assert not study["sample_stats"]["failed"].values.any()


def test_runs_know_themselves_where_the_model_has_no_density_in_many_places(tmp_path: Path) -> None:
    def picky(data: Tensor, scale: float) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if float(mu.detach().abs()) < 1.2:  # around 0, where others are told apart
            raise ArithmeticError("no law")
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, scale), obs=data)

    path = tmp_path / "study.ckpt"
    sizes = {"engine": "nuts", "num_warmup": 5, "num_samples": 20, "num_draws": 19, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pirl.calibrate(picky, DATA, 0.5, num_replicates=2, checkpoint=path, **sizes)
        with pytest.raises(CheckpointError, match="another"):
            pirl.calibrate(picky, DATA, 50.0, num_replicates=4, checkpoint=path, **sizes)
    # A fit has nothing but the density at some point to know its data by.
    path = tmp_path / "fit.ckpt"
    options = {"engine": "nuts", "num_warmup": 5, "num_samples": 5, "num_prior": 0, "num_posterior_predictive": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pirl.fit(picky, DATA, 0.5, checkpoint=path, progress=False, seed=1, **options)
        with pytest.raises(CheckpointError, match="another"):
            pirl.fit(picky, DATA, 50.0, checkpoint=path, progress=False, seed=1, **options)


def data_of(number: int) -> Tensor:
    """The data of a replicate of a study of :func:`normal` with seed 0."""
    with Setting.of((DATA,), {}).entered():
        return Study(normal, Setting.of((DATA,), {})).draw(number).data["x"]


@pytest.mark.parametrize("stops", [None, 3, 5])
def test_more_replicates_are_those_of_a_longer_study_whatever_could_not_be_sampled_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stops: int | None
) -> None:
    """With the sixth data set four cannot be sampled at once; but two can, which the first study has at its end."""
    sixth, calls = data_of(5), list[int]()

    def picky(potentials: list[Potential], model: Any, data: dict[str, Tensor], **options: Any) -> Any:
        if len(potentials) == 4 and (data["x"] == sixth).all(-1).any():
            raise NonFiniteError("no start")
        return run_all(potentials, model, data, **options)

    own = Study.compare

    def compare(self: Study, number: int, *rest: Any) -> Any:
        calls.append(number)
        if stops is not None and len(calls) == 6 + stops:
            raise KeyboardInterrupt
        return own(self, number, *rest)

    monkeypatch.setattr(module, "run_all", picky)
    sizes: dict[str, Any] = {"num_chains": 4, "num_warmup": 20, "num_samples": 30, "num_draws": 19, "batch": 4}
    sizes |= {"progress": False, "seed": 0}
    whole = pirl.calibrate(normal, DATA, num_replicates=10, **sizes)
    path = tmp_path / "study.ckpt"
    pirl.calibrate(normal, DATA, num_replicates=6, checkpoint=path, **sizes)
    if stops is not None:
        calls[:] = range(6)
        monkeypatch.setattr(Study, "compare", compare)
        with pytest.warns(InterruptedWarning):
            pirl.calibrate(normal, DATA, num_replicates=10, checkpoint=path, **sizes)
    found = pirl.calibrate(normal, DATA, num_replicates=10, checkpoint=path, **sizes)
    for group in ("ranks", "recovery", "sample_stats"):
        assert found[group].to_dataset().equals(whole[group].to_dataset())
    assert found.attrs["sampler"] == whole.attrs["sampler"]
    assert found.attrs["sampled_one_by_one"] == "no start"


def test_the_first_replicate_of_a_batch_may_fail_as_others_do() -> None:
    sizes = {"num_chains": 4, "num_warmup": 20, "num_samples": 30, "num_draws": 19, "num_replicates": 4}
    first = data_of(0)

    def quantity(draws: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        return draws["mu"] * (torch.nan if data["x"].equal(first) else 1.0)

    study = pirl.calibrate(normal, DATA, batch=4, progress=False, quantities={"q": quantity}, **sizes)
    assert study["sample_stats"]["failed"].values[0].tolist() == [1, 0, 0, 0]
    assert study.attrs["failures"].startswith("replicate 0: test quantity 'q' is not finite")
    with pytest.raises(ModelError, match="not finite"):
        pirl.calibrate(normal, DATA, batch=1, progress=False, quantities={"q": quantity}, **sizes)
