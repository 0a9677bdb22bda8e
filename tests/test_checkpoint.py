"""Interrupted runs: what is saved, what goes on bit by bit, what is refused, and what signals do.

Run as a program, this file fits one model with the options that its argument spells in JSON (see ``main``): for the
tests that kill a process for real.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from pirl import errors
from pirl.fit import fit
from pirl.infer import checkpoint as checkpoints
from pirl.infer.checkpoint import MAGIC, Checkpoint, read
from pirl.infer.chees import Chees
from pirl.infer.nuts import Nuts
from pirl.infer.sampling import Sampler
from pirl.infer.smc import SMC

ROOT = Path(__file__).resolve().parents[1]
QUIET: dict[str, Any] = {"num_prior": 0, "num_posterior_predictive": 0, "progress": False, "seed": 1}
SAMPLERS: dict[str, type[Sampler]] = {"nuts": Nuts, "chees": Chees, "smc": SMC}
# 22 steps of warm-up have windows of Pyro's adaptation that end after 3, 20 and 22; 30 of ChEES after 10 and 22.
NUTS = {"engine": "nuts", "num_chains": 2, "num_warmup": 22, "num_samples": 8, "max_tree_depth": 2}
CHEES = {
    "engine": "chees",
    "num_chains": 8,
    "num_warmup": 30,
    "num_samples": 8,
    "chains_per_block": 4,
    "max_leapfrogs": 4,
}
RUNS: dict[str, dict[str, Any]] = {
    "nuts": NUTS,
    "nuts, dense": {**NUTS, "dense_mass": True},
    "nuts, blocks": {**NUTS, "num_chains": 1, "dense_mass": [("m",)]},
    "nuts, laplace": {**NUTS, "init": "laplace", "dense_mass": [("s", "m")]},
    "chees": CHEES,
    "chees, diagonal": {**CHEES, "dense_mass": False},
    "smc": {"engine": "smc", "num_chains": 2, "num_samples": 16, "chains_per_block": 8, "max_leapfrogs": 4},
}
INTERRUPTIONS = {
    "nuts": (1, 3, 12, 20, 22, 25),
    "nuts, dense": (12, 24),
    "nuts, blocks": (12, 24),
    "nuts, laplace": (2, 12, 24),
    "chees": (1, 5, 10, 15, 30, 33),
    "chees, diagonal": (15, 33),
    "smc": (1, 4, 7),
}


def model(y: torch.Tensor) -> None:
    means = pyro.sample("m", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(means[0] + means[1], scale + 0.1), obs=y)


def other_model(y: torch.Tensor) -> None:
    means = pyro.sample("m", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(means.sum(), 0.5), obs=y)


def data() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)


def run(name: str, **options: Any) -> xarray.DataTree:
    return fit(model, data(), **{**QUIET, **RUNS[name], **options})


@functools.cache
def whole(name: str, **options: Any) -> xarray.DataTree:
    """The run that nothing interrupts, whatever a test has planned."""
    with ExitStack() as stack:
        for kind, advance in ORIGINALS.items():
            stack.enter_context(patch.object(kind, "advance", advance))
        return run(name, **options)


def assert_same(found: xarray.DataTree, expected: xarray.DataTree, draws: int | None = None) -> None:
    """The same bits in every draw and statistic, of the first ``draws`` draws."""
    for group in ("posterior", "sample_stats", "smc"):
        assert (group in found.children) == (group in expected.children)
        if group not in found.children:
            continue
        assert set(found[group].data_vars) == set(expected[group].data_vars)
        for name, value in expected[group].data_vars.items():
            value = value.isel(draw=slice(draws)) if "draw" in value.dims else value
            np.testing.assert_array_equal(found[group][name].values, value.values, err_msg=f"{group} {name}")


ORIGINALS = {kind: kind.advance for kind in SAMPLERS.values()}


class HaltError(Exception):
    """The end of a process, for tests that go on in the same one."""


Event = Callable[[], None]


def halt() -> None:
    raise HaltError


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``at(name, step, event)``: something happens at the beginning of a step, and what was planned before does not."""

    def plan(name: str, step: int | None = None, event: Event = halt) -> None:
        def advance(self: Sampler, now: int) -> Any:
            if now == step:
                event()
            return ORIGINALS[type(self)](self, now)

        monkeypatch.setattr(SAMPLERS[RUNS[name]["engine"]], "advance", advance)

    return plan


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are made."""
    made: list[int] = []
    for kind in SAMPLERS.values():

        def advance(self: Sampler, step: int) -> Any:
            made.append(step)
            return ORIGINALS[type(self)](self, step)

        monkeypatch.setattr(kind, "advance", advance)
    return made


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every step."""
    monkeypatch.setattr(Checkpoint, "due", True)


# ------------------------------------------------------------------------------------------------- going on, in process


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_run_goes_on_bit_by_bit(name: str, monkeypatch: Any, always: None, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    begun: list[int] = []
    ends = (*INTERRUPTIONS[name], None)
    for end in ends:
        first: list[int] = []

        def advance(self: Sampler, step: int, end: int | None = end, first: list[int] = first) -> Any:
            first.append(step)
            if step == end:
                raise HaltError
            return ORIGINALS[type(self)](self, step)

        monkeypatch.setattr(SAMPLERS[RUNS[name]["engine"]], "advance", advance)
        if end is None:
            assert_same(run(name, checkpoint=path), whole(name))
        else:
            with pytest.raises(HaltError):
                run(name, checkpoint=path)
        begun.append(first[0])
        assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    assert begun == [0, *INTERRUPTIONS[name]]


@pytest.mark.parametrize("name", ["nuts", "chees", "smc"])
def test_a_finished_run_is_only_read(name: str, steps: list[int], tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    first = run(name, checkpoint=path)
    assert steps
    steps.clear()
    before = path.read_bytes()
    again = run(name, checkpoint=path)
    assert not steps
    assert path.read_bytes() == before
    assert_same(again, first)
    assert_same(again, whole(name))


@pytest.mark.parametrize("name", ["nuts", "chees"])
def test_a_finished_run_draws_on(name: str, steps: list[int], tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run(name, checkpoint=path)
    last = steps[-1]
    steps.clear()
    longer = run(name, checkpoint=path, num_samples=20)
    assert steps == list(range(last + 1, last + 13))
    assert_same(longer, whole(name, num_samples=20))
    # And with fewer, those that come first; the file keeps all.
    steps.clear()
    before = path.read_bytes()
    assert_same(run(name, checkpoint=path, num_samples=5), whole(name, num_samples=20), draws=5)
    assert not steps and path.read_bytes() == before


@pytest.mark.parametrize("name", ["nuts", "chees"])
def test_thinned_runs_go_on(name: str, at: Any, always: None, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    at(name, int(RUNS[name]["num_warmup"]) + 5, halt)
    with pytest.raises(HaltError):
        run(name, checkpoint=path, thin=3)
    at(name)
    found = run(name, checkpoint=path, thin=3)
    assert_same(found, whole(name, thin=3))
    assert_same(run(name, checkpoint=path, thin=3, num_samples=11), whole(name, thin=3, num_samples=11))
    # Thinning keeps draws of the run without it.
    thinned = whole(name).posterior["m"].isel(draw=slice(None, None, 3))
    np.testing.assert_array_equal(found.posterior["m"].values, thinned.values)


def test_particles_are_no_draws_to_go_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run("smc", checkpoint=path)
    with pytest.raises(errors.CheckpointError, match="num_samples is 16 and not 20"):
        run("smc", checkpoint=path, num_samples=20)


def test_single_precision_goes_on(at: Any, always: None, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    options = {"dtype": torch.float32, "checkpoint": path}
    at("chees", 33, halt)
    with pytest.raises(HaltError):
        run("chees", **options)
    at("chees")
    result = run("chees", **options)
    assert result.posterior["m"].dtype == np.float32
    assert_same(result, run("chees", dtype=torch.float32))
    with pytest.raises(errors.CheckpointError, match="dtype is 'float32' and not 'float64'"):
        run("chees", checkpoint=path)


def test_an_option_that_is_named_is_that_option(steps: list[int], tmp_path: Path) -> None:
    """Whether the default of an engine is spelt out makes no other run."""
    path = tmp_path / "run.ckpt"
    start = {"m": torch.tensor([0.5, -0.5], dtype=torch.float64), "s": np.array(1.0)}
    run("nuts", checkpoint=path, init=start)
    steps.clear()
    run("nuts", checkpoint=path, init=start, target_accept_prob=0.8)
    assert not steps
    with pytest.raises(errors.CheckpointError, match="option init is"):
        run("nuts", checkpoint=path, init={**start, "s": np.array(1.1)})


# -------------------------------------------------------------------------------------------- signals, in this process


def press(number: signal.Signals = signal.SIGINT) -> Event:
    return lambda: signal.raise_signal(number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does, the handlers of signals are afterwards what they were."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("name", ["nuts", "chees"])
def test_ctrl_c_returns_the_draws_so_far(name: str, at: Any) -> None:
    at(name, int(RUNS[name]["num_warmup"]) + 4, press())
    with pytest.warns(errors.InterruptedWarning, match="the 5 draws of each chain"):
        result = run(name)
    assert result.posterior.sizes["draw"] == result.sample_stats.sizes["draw"] == 5
    assert (result.attrs["interrupted"], result.attrs["num_samples"]) == ("True", 5)
    assert_same(result, whole(name), draws=5)
    assert whole(name).attrs["interrupted"] == "False"


@pytest.mark.parametrize("name", ["nuts", "chees"])
def test_ctrl_c_saves(name: str, at: Any, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    at(name, 5, press())
    with pytest.raises(KeyboardInterrupt, match="after 6 steps, when there are no draws yet; .*run.ckpt"):
        run(name, checkpoint=path)
    at(name, int(RUNS[name]["num_warmup"]) + 4, press())
    with pytest.warns(errors.InterruptedWarning, match=r"the same call goes on from .*run\.ckpt"):
        assert_same(run(name, checkpoint=path), whole(name), draws=5)
    at(name)
    assert_same(run(name, checkpoint=path), whole(name))


def test_ctrl_c_at_the_last_step_interrupts_nothing(at: Any) -> None:
    at("nuts", 29, press())
    assert_same(run("nuts"), whole("nuts"))


@pytest.mark.parametrize("name", ["nuts", "smc"])
def test_ctrl_c_without_draws_is_raised(name: str, at: Any) -> None:
    at(name, 3, press())
    with pytest.raises(KeyboardInterrupt, match="no draws yet$"):
        run(name)


def test_a_second_ctrl_c_interrupts_at_once(at: Any, tmp_path: Path) -> None:
    path, after = tmp_path / "run.ckpt", []

    def twice() -> None:
        press()()
        press()()
        after.append("still here")

    at("nuts", 25, twice)
    with pytest.raises(KeyboardInterrupt):
        run("nuts", checkpoint=path)
    assert not after and not path.exists()


@pytest.mark.parametrize(
    ("name", "step", "told"),
    [
        ("nuts", 25, "26 of 30 steps; the run goes on from there"),
        ("chees", 12, "13 of 38 steps; the run goes on from there"),
        ("smc", 3, r"4 steps, to temperature \S+; the run goes on from there"),
    ],
)
def test_a_run_that_goes_on_says_how_far_it_was(
    name: str, step: int, told: str, at: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    path = tmp_path / "run.ckpt"
    at(name, step, press(signal.SIGTERM))
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as left:
        patched.setattr(sys, "stderr", None)  # as of a service: nobody is told, and it ends as it should
        run(name, checkpoint=path)
    assert left.value.code == 143 and not capsys.readouterr().out
    at(name)
    for words in (told, "the whole run"):
        capsys.readouterr()
        assert_same(run(name, checkpoint=path, progress=True), whole(name))
        assert re.fullmatch(f"pirl: {path} has {words}\n", capsys.readouterr().err)
    run(name, checkpoint=path)
    assert not capsys.readouterr().err


def test_sigterm_saves_and_exits(at: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.ckpt"
    at("chees", 12, press(signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        run("chees", checkpoint=path)
    assert left.value.code == 143
    assert capsys.readouterr().err == f"pirl: terminated at step 13; the same call goes on from {path}\n"
    at("chees")
    assert_same(run("chees", checkpoint=path), whole("chees"))


def test_sigterm_is_not_lost_while_the_last_save_is_made(monkeypatch: Any, tmp_path: Path) -> None:
    path, save = tmp_path / "run.ckpt", Checkpoint.save

    def slow(self: Checkpoint, arrays: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(self, arrays)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(Checkpoint, "save", slow)
        run("nuts", checkpoint=path)
    assert left.value.code == 143
    assert_same(run("nuts", checkpoint=path), whole("nuts"))


def test_sigterm_is_left_alone_without_a_checkpoint(at: Any) -> None:
    found: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    at("nuts", 3, lambda: found.append(signal.getsignal(signal.SIGTERM)))
    run("nuts")
    assert found == [before]


def test_who_ignores_ctrl_c_is_not_interrupted(at: Any) -> None:
    """As a program does that a shell has put into the background."""
    at("nuts", 5, press())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert_same(run("nuts"), whole("nuts"))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_errors_leave_the_handlers_as_they_were(at: Any, tmp_path: Path) -> None:
    at("chees", 3, halt)
    with pytest.raises(HaltError):  # the fixture `handlers` looks at what is left
        run("chees", checkpoint=tmp_path / "run.ckpt")


def test_other_threads_fit_too(tmp_path: Path) -> None:
    path, results = tmp_path / "run.ckpt", []
    thread = threading.Thread(target=lambda: results.append(run("nuts", checkpoint=path)))
    thread.start()
    thread.join()
    assert_same(results[0], whole("nuts"))
    assert path.exists()


# ------------------------------------------------------------------------------------------------- files that are wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "run.ckpt"
    run("chees", checkpoint=path)
    return path.read_bytes()


def refuse(path: Path, words: str = "", **options: Any) -> str:
    """A fit refuses the checkpoint in one line, before its first step, and leaves the file as it is."""
    before = path.read_bytes()
    with pytest.raises(errors.CheckpointError, match=words) as refused:
        run("chees", checkpoint=path, **options)
    message = str(refused.value)
    assert "\n" not in message and str(path) in message and len(message) < len(str(path)) + 300
    assert path.read_bytes() == before
    return message


def test_a_truncated_file_is_refused(saved: bytes, tmp_path: Path, steps: list[int]) -> None:
    path = tmp_path / "run.ckpt"
    lengths = {0, 1, len(MAGIC) - 1, len(MAGIC), len(MAGIC) + 1, 64, 82, 83, len(saved) - 64, len(saved) - 1}
    for length in sorted(lengths | set(np.linspace(0, len(saved) - 1, 100).astype(int).tolist())):
        path.write_bytes(saved[:length])
        with pytest.raises(errors.CheckpointError):
            read(path)
    path.write_bytes(saved[:-1])
    refuse(path, "is damaged")
    path.write_bytes(saved + b"\0")
    refuse(path, "is damaged")
    assert not steps


def test_a_flipped_bit_is_refused(saved: bytes, tmp_path: Path, steps: list[int]) -> None:
    path = tmp_path / "run.ckpt"
    for place in np.linspace(0, len(saved) - 1, 200).astype(int).tolist():
        damaged = bytearray(saved)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(errors.CheckpointError):
            read(path)
    refuse(path, "is damaged")
    assert not steps


def test_other_files_are_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    np.savez(path.with_suffix(".npz"), x=np.zeros(3))
    others = [b"", b"my thesis\n", b"\x89PNG\r\n\x1a\n", b"pirl checkpoint of mine\n", saved[len(MAGIC) :]]
    for content in (*others, path.with_suffix(".npz").read_bytes()):
        path.write_bytes(content)
        refuse(path, "is not a checkpoint of pirl")


def test_a_newer_format_is_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(saved.replace(b"checkpoint 1\n", b"checkpoint 12\n", 1))
    refuse(path, "format 12 of another version of pirl; this one reads format 1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 2}, "seed is 1 and not 2"),
        ({"run": "nuts"}, "engine is 'chees' and not 'nuts'"),
        ({"num_chains": 4}, "num_chains is 8 and not 4"),
        ({"num_warmup": 31}, "num_warmup is 30 and not 31"),
        ({"thin": 2}, "thin is 1 and not 2"),
        ({"target_accept_prob": 0.9}, r"option target_accept_prob is 0\.8 and not 0\.9"),
        ({"dense_mass": False}, "option dense_mass is None and not False"),
        ({"dtype": torch.float32}, "dtype is 'float64' and not 'float32'"),
    ],
)
def test_another_run_is_refused(
    options: dict[str, Any], words: str, saved: bytes, tmp_path: Path, steps: list[int]
) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(saved)
    name = options.pop("run", "chees")
    with pytest.raises(errors.CheckpointError, match=words) as refused:
        run(name, checkpoint=path, **options)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == saved and not steps


def test_another_model_and_other_data_are_refused(saved: bytes, tmp_path: Path, steps: list[int]) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(saved)

    def fits(model: Any, y: torch.Tensor) -> None:
        fit(model, y, checkpoint=path, **QUIET, **RUNS["chees"])

    with pytest.raises(errors.CheckpointError, match="model is 'model' and not 'other_model'"):
        fits(other_model, data())
    other_model.__name__ = "model"
    try:
        with pytest.raises(errors.CheckpointError, match="sites is"):
            fits(other_model, data())
    finally:
        other_model.__name__ = "other_model"
    for other in (data() + torch.tensor([0.0, 0.0, 1e-5, 0.0], dtype=torch.float64), data().repeat(2)):
        with pytest.raises(errors.CheckpointError, match="its model or data, .* give other numbers"):
            fits(model, other)
    assert path.read_bytes() == saved and not steps


class Trap:
    """An object whose unpickling leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_reading_runs_no_code(saved: bytes, tmp_path: Path, monkeypatch: Any) -> None:
    """Pickles in an archive whose sum is right: they are refused, and nothing is unpickled."""
    path, sprung = tmp_path / "run.ckpt", tmp_path / "sprung"
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(sprung)
    archive, array = io.BytesIO(), io.BytesIO()
    np.savez(archive, **{**read_arrays(saved, tmp_path), "draws": trap})  # type: ignore[arg-type]
    np.save(array, trap)
    pickled = pickle.dumps(trap)
    unpickled: list[str] = []
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *args, **kwargs: unpickled.append("at all"))
    # The trap works: it would have sprung.
    with np.load(io.BytesIO(archive.getvalue()), allow_pickle=True) as loaded:
        loaded["draws"]
    assert unpickled == ["at all"]
    unpickled.clear()
    for content in (archive.getvalue(), array.getvalue(), pickled, b"", b"PK\x03\x04"):
        body = MAGIC + content
        path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())
        refuse(path, "is damaged")
    assert not unpickled and not sprung.exists()


def read_arrays(content: bytes, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "whole.ckpt"
    path.write_bytes(content)
    return read(path)


def test_missing_parts_are_refused(saved: bytes, tmp_path: Path) -> None:
    """A right sum over the wrong arrays."""
    path = tmp_path / "run.ckpt"
    for missing in ("identity", "probe", "step"):
        arrays = read_arrays(saved, tmp_path)
        del arrays[missing]
        with open(path, "wb") as file:
            checkpoints.write(file, arrays)
        refuse(path, "is damaged")


# ------------------------------------------------------------------------------------------------- writes that go wrong


def no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails", ["fsync", "replace", "write"])
def test_a_failing_write_leaves_the_last_checkpoint(
    fails: str, at: Any, always: None, monkeypatch: Any, tmp_path: Path
) -> None:
    path, kept = tmp_path / "run.ckpt", []

    def fail() -> None:
        kept.append(path.read_bytes())
        if fails == "write":
            original = checkpoints._Hashed.write
            done: list[int] = []

            def write(self: Any, data: Any) -> int:
                done.append(len(data))
                if sum(done) > 1000:
                    no_space()
                return original(self, data)

            monkeypatch.setattr(checkpoints._Hashed, "write", write)
        else:
            monkeypatch.setattr(os, fails, no_space)

    at("nuts", 25, fail)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = run("nuts", checkpoint=path)
    assert {warning.category for warning in told} == {errors.CheckpointWarning}
    messages = [str(warning.message) for warning in told]
    assert all(f"checkpoint {path} could not be written: No space left on device" in text for text in messages)
    assert "the run goes on" in messages[0] and "the draws are returned" in messages[-1]
    assert_same(result, whole("nuts"))
    assert path.read_bytes() == kept[0]
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    monkeypatch.undo()
    at("nuts", 24, halt)  # goes on from the last good one, which was saved after step 24
    assert_same(run("nuts", checkpoint=path), whole("nuts"))


def test_what_cannot_be_saved_when_there_is_nothing_to_return_is_an_error(
    at: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    for number, step in ((signal.SIGINT, 5), (signal.SIGTERM, 25)):

        def event(number: signal.Signals = number) -> None:
            monkeypatch.setattr(os, "fsync", no_space)
            signal.raise_signal(number)

        at("nuts", step, event)
        with pytest.raises(errors.CheckpointError, match="No space left"):
            run("nuts", checkpoint=tmp_path / "run.ckpt")
        assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path: Path, steps: list[int], monkeypatch: Any) -> None:
    with pytest.raises(errors.CheckpointError, match=r"folder .*nowhere does not exist"):
        run("nuts", checkpoint=tmp_path / "nowhere" / "run.ckpt")
    with pytest.raises(errors.CheckpointError, match="is not a file: name one"):
        run("nuts", checkpoint=tmp_path)
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):  # the administrator may write anywhere
            monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(errors.CheckpointError, match="is read-only"):
            run("nuts", checkpoint=tmp_path / "run.ckpt")
    finally:
        tmp_path.chmod(0o700)
    assert not steps


@pytest.mark.parametrize("engine", ["svi", "laplace"])
def test_approximations_save_nothing(engine: str, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match=f"engine '{engine}' saves no checkpoints"):
        fit(model, data(), engine=engine, checkpoint=tmp_path / "run.ckpt", **QUIET)


# -------------------------------------------------------------------------------------------------- processes, for real


def main() -> None:
    """Fit as told by JSON: name of the run, checkpoint, at which step to pause or to limit the size of files, output.

    Prints each step, and saves after each.
    """
    told = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent did
    kind = SAMPLERS[RUNS[told["run"]]["engine"]]

    def advance(self: Sampler, step: int) -> Any:
        print(f"step {step}", flush=True)
        time.sleep(told.get("pause", 0.0) * (step == told.get("at")))
        if step == told.get("at") and "limit" in told:
            resource.setrlimit(resource.RLIMIT_FSIZE, (told["limit"], resource.RLIM_INFINITY))
        return ORIGINALS[kind](self, step)

    kind.advance = advance  # type: ignore[method-assign]
    Checkpoint.due = True  # type: ignore[method-assign, assignment]
    result = run(told["run"], checkpoint=told.get("checkpoint"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result.to_netcdf(told["out"], engine="h5netcdf")


class Child:
    """This file as a program."""

    def __init__(self, run: str, at: int, **told: Any) -> None:
        self.step, told = at, {"run": run, "at": at, **told}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(told, default=str)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def send(self, *numbers: signal.Signals) -> tuple[int, str]:
        """Send signals when the step begins; the exit status and what was complained."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == f"step {self.step}\n":
                break
        for number in numbers:
            time.sleep(0.2)
            self.process.send_signal(number)
        _, complaint = self.process.communicate(timeout=60)
        return self.process.returncode, complaint


@pytest.mark.parametrize(("name", "step"), [("nuts", 13), pytest.param("chees", 34, marks=pytest.mark.slow)])
def test_a_killed_process_goes_on(name: str, step: int, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    status, _ = Child(name, step, checkpoint=path, out=tmp_path / "out.nc").send(signal.SIGKILL)
    assert status == -signal.SIGKILL
    # It may have been killed while it wrote: what is there is whole.
    assert_same(run(name, checkpoint=path), whole(name))


@pytest.mark.slow
def test_a_terminated_process_saves(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    status, complaint = Child("chees", 25, checkpoint=path, out="", pause=1).send(signal.SIGTERM)
    assert status == 143
    assert complaint == f"pirl: terminated at step 26; the same call goes on from {path}\n"
    assert_same(run("chees", checkpoint=path), whole("chees"))


def test_an_interrupted_process_keeps_its_draws(tmp_path: Path) -> None:
    out = tmp_path / "out.nc"
    status, complaint = Child("nuts", 25, out=out, pause=1).send(signal.SIGINT)
    assert status == 0
    # It points at the line that called pirl.fit.
    words = r"test_checkpoint.py:\d+: InterruptedWarning: interrupted: returning the 4 draws of each chain so far"
    assert re.search(words, complaint)
    with xarray.open_datatree(out, engine="h5netcdf") as result:
        assert_same(result, whole("nuts"), draws=4)


@pytest.mark.slow
def test_a_process_that_is_interrupted_twice_ends_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    status, complaint = Child("nuts", 0, out="", pause=60).send(signal.SIGINT, signal.SIGINT)
    assert status in (-signal.SIGINT, 130) and complaint.endswith("KeyboardInterrupt\n")
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The system refuses to write more than 2000 bytes to any file."""
    path, out = tmp_path / "run.ckpt", tmp_path / "out.nc"
    status, complaint = Child("nuts", 25, checkpoint=path, out=out, limit=2000).send()
    assert status == 0
    assert "CheckpointWarning" in complaint and "File too large" in complaint
    with xarray.open_datatree(out, engine="h5netcdf") as result:
        assert_same(result, whole("nuts"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.nc", "run.ckpt"]
    assert int(read(path)["step"]) == 25
    assert_same(run("nuts", checkpoint=path), whole("nuts"))


if __name__ == "__main__":
    main()
