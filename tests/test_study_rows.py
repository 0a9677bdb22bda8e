"""Replicates of a study: what fails costs the others nothing, and a study goes on where it was stopped."""

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
from pirl.errors import (
    CheckpointError,
    CheckpointWarning,
    ConvergenceWarning,
    InterruptedWarning,
    ModelError,
    NonFiniteError,
)
from pirl.infer import Potential
from pirl.infer.engine import Draws
from pirl.infer.replicated import NotAtOnceError, run_all
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
