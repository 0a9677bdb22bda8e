"""Files and tables of data that are damaged, or of another kind: one named error, or what can still be read."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import pirl
from pirl.cli import app
from pirl.continuous import ContinuousTrajectories
from pirl.datasets import mouse_labyrinth, zurcher_raw
from pirl.errors import DataError, EmptyTrajectoriesWarning, InvalidTrajectoriesError, PirlError
from pirl.files import write_posterior
from pirl.trajectories import Trajectories
from tests.fuzz.cases import cases, in_child

ODD: list[Any] = [math.nan, math.inf, -1, 0.5, "x", None, True, 2**70, [0], "", pd.NaT]


def read(use: Callable[[], Any], kinds: tuple[type[PirlError], ...]) -> Any:
    """What a reader gives, or None where it refuses in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmptyTrajectoriesWarning)
            return use()
    except kinds as error:
        assert str(error) and "\n" not in str(error), str(error)
        return None


# ------------------------------------------------------------------------------------------------ data frames


@st.composite
def frames(draw: Any) -> tuple[pd.DataFrame, bool]:
    """A table of decisions, and whether it was left as it should be."""
    rows = []
    for subject in range(draw(st.integers(1, 2))):
        for episode in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, 4))
            rows += [
                [f"s{subject}", episode, t, draw(st.integers(0, 3)), draw(st.integers(0, 2))] for t in range(length)
            ]
    columns = ["subject", "episode", "t", "state", "action"]
    frame = pd.DataFrame(rows, columns=columns).iloc[draw(st.permutations(range(len(rows))))]
    faults = draw(st.integers(0, 2))
    for _ in range(faults):
        how = draw(st.sampled_from(["value", "column", "kind", "twice", "rows", "name"]))
        name = draw(st.sampled_from(columns[1:]))
        if name not in frame:
            continue
        if how == "value" and len(frame):
            column = frame[name].astype(object).copy()
            column.iloc[draw(st.integers(0, len(frame) - 1))] = draw(st.sampled_from(ODD))
            frame = frame.assign(**{name: column})
        elif how == "column":
            frame = frame.drop(columns=name)
        elif how == "kind":
            kind = draw(st.sampled_from(["str", "float", "bool", "category", "datetime64[ns]", "complex"]))
            try:
                frame = frame.astype({name: kind})
            except (TypeError, ValueError, RuntimeWarning):  # a fault came before it
                continue
        elif how == "twice":
            frame = pd.concat([frame, frame.iloc[:1]])
        elif how == "rows":
            frame = frame.iloc[: draw(st.integers(0, 2))]
        else:
            frame = frame.rename(columns={name: draw(st.sampled_from(["", "State", 0, "subject"]))})
    return frame, faults == 0


@given(frames())
@cases(25, 600)
def test_data_frames(case: tuple[pd.DataFrame, bool]) -> None:
    frame, whole = case
    before = frame.copy(deep=True)
    demos = read(lambda: Trajectories.from_dataframe(frame), (InvalidTrajectoriesError,))
    pd.testing.assert_frame_equal(frame, before)
    assert demos is not None or not whole
    if demos is None or not whole:
        return
    told = frame.sort_values(["subject", "episode", "t"])
    episodes = [rows for _, rows in told.groupby(["subject", "episode"])]
    table = demos.as_tensor()
    assert len(demos) == len(episodes)
    for i, rows in enumerate(episodes):
        assert table[i, : len(rows)].tolist() == rows[["state", "action"]].values.tolist()


# ------------------------------------------------------------------------------------------------ archives


def arrays() -> st.SearchStrategy[Any]:
    """What an archive may hold under a name where an array [N, T, d] is wanted."""
    shapes = st.sampled_from(
        [(2, 4, 2), (2, 3, 2), (2, 3), (3, 4, 2), (2,), (), (0, 3, 2), (2, 0, 2), (6,), (7, 2), (1, 2, 3, 4)]
    )
    kinds = st.sampled_from(["f8", "f8", "f8", "i8", "f4", "U3", "c16", "?", "M8[s]"])

    def make(pair: tuple[tuple[int, ...], str]) -> Any:
        return np.zeros(pair[0]).astype(pair[1])

    return st.tuples(shapes, kinds).map(make)


ENTRIES = st.dictionaries(
    st.sampled_from(["states", "actions", "lengths", "obs", "acts", "indices", "other"]),
    arrays() | st.just(np.array([3, 2])) | st.just(np.full((2, 3, 1), math.nan)),
    max_size=5,
)


def damaged(draw: Any, content: bytes, ways: tuple[str, ...] = ("cut", "flip", "flip", "text", "whole")) -> bytes:
    """A part of a file, or all of it with some bytes changed."""
    how = draw(st.sampled_from(ways))
    if how == "cut":
        return content[: draw(st.integers(0, max(len(content) - 1, 0)))]
    if how == "text":
        return draw(
            st.sampled_from([b"", b"states,actions\n0,1\n", b"\x00" * 4096, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"])
        )
    if how == "flip":
        changed = bytearray(content)
        for _ in range(draw(st.integers(1, 8))):
            # Half of them near the head, where the structure is told.
            place = draw(st.integers(0, min(len(content), 2048) - 1) | st.integers(0, len(content) - 1))
            changed[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    return content


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
@given(data=st.data())
@cases(12, 300)
def test_archives_of_trajectories(kind: str, data: st.DataObject) -> None:
    import h5py

    good = {"states": np.zeros((2, 4, 2)), "actions": np.ones((2, 3, 1))}
    entries = data.draw(st.just(good) | ENTRIES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{kind}"
        if kind == "npz":
            np.savez(path, **entries)
        else:
            grouped = data.draw(st.booleans())
            with h5py.File(path, "w") as file:
                for name, array in entries.items():
                    if array.dtype.kind not in "UM":
                        (file.create_group("episode_0") if grouped and "episode_0" not in file
                         else file["episode_0"] if grouped else file)[name] = array  # fmt: skip
        content = path.read_bytes()
        spoiled = damaged(data.draw, content)
        path.write_bytes(spoiled)
        reader = ContinuousTrajectories.from_npz if kind == "npz" else ContinuousTrajectories.from_hdf5

        def work() -> Any:
            demos = read(lambda: reader(path), (DataError, InvalidTrajectoriesError))
            return None if demos is None else (len(demos), bool(demos.as_tensor().isfinite().all()))

        found = in_child(work) if kind == "hdf5" and spoiled != content else work()
        assert found is None or found[1]
        if entries is good and spoiled == content and kind == "npz":
            assert found == (2, True)


@given(st.data())
@cases(5, 150)
def test_archives_of_mice(data: st.DataObject) -> None:
    good = {
        "states": np.zeros((2, 3), int),
        "actions": np.full((2, 3), 3),
        "train_idx": np.array([0]),
        "val_idx": np.array([1]),
    }
    entries = dict(good)
    for name in data.draw(st.lists(st.sampled_from(sorted(good)), max_size=2)):
        entries[name] = data.draw(arrays() | st.sampled_from([np.array([7]), np.array([-1]), np.full((2, 3), 126)]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "water_restricted.npz"
        np.savez(path, **entries)
        content = path.read_bytes()
        spoiled = damaged(data.draw, content)
        path.write_bytes(spoiled)
        found = read(lambda: mouse_labyrinth(folder), (DataError,))
        if spoiled == content and all(entries[name] is good[name] for name in good):
            assert [len(part) for part in found] == [1, 1]


@given(st.data())
@cases(8, 200)
def test_texts_of_buses(data: st.DataObject) -> None:
    """The raw matrix of a fleet, some of its numbers and lines changed."""
    readings = [0, 4000, 9000, 12000, 17000]
    column = [4321, 1, 80, 1, 80, 0, 0, 0, 0, 0, 0, *readings]
    lines = [f"{number} {number + (i == 0)}" for i, number in enumerate(column)]
    changes = data.draw(st.integers(0, 3))
    for _ in range(changes):
        odd = ["", "x", "nan nan", "inf 1", "-1 -1", "0.5 1", "1 2 3", "1e300 1", "1" * 400, "\x00", "5 5 #", "é 1"]
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place : place + data.draw(st.integers(0, 1))] = [data.draw(st.sampled_from(odd))]
    with tempfile.TemporaryDirectory() as folder:
        content = "\n".join(lines).encode(data.draw(st.sampled_from(["utf-8", "utf-8", "latin-1", "utf-16"])))
        (Path(folder) / "g870.asc").write_bytes(content)
        found = read(lambda: zurcher_raw(folder, "1"), (DataError,))
        if found is not None:
            assert bool((found.choices >= 0).all()) and len(found) >= 1
        else:
            assert changes or content.startswith((b"\xff\xfe", b"\xfe\xff"))


# ------------------------------------------------------------------------------------------------ posteriors


@pytest.fixture(scope="module")
def posterior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A posterior file with every group and attribute that commands look at."""
    mdp = pirl.TabularMDP(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 2, dtype=torch.float64), 0, discount=0.5)
    demos = Trajectories([[0, 1, 1]], [[1, 1]])

    def model(demos: Trajectories) -> None:
        reward = pyro.sample("reward", dist.Normal(torch.zeros(2, 2, dtype=torch.float64), 1.0).to_event(2))
        with pyro.plate("episode", len(demos)):
            law = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
            pyro.sample("seen", law, obs=demos.as_tensor())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pirl.fit(model, demos, engine="laplace", num_samples=40, num_chains=1, num_prior=5,
                         num_posterior_predictive=5, progress=False)  # fmt: skip
    found.attrs["reference"] = '{"label": "x", "values": {"reward": [[0, 1], [2, 3]]}}'
    path = tmp_path_factory.mktemp("posterior") / "posterior.nc"
    write_posterior(found, path)
    return path


@pytest.mark.parametrize("command", ["summary", "diagnose", "plot"])
@given(data=st.data())
@cases(2, 100)
def test_damaged_posteriors(command: str, posterior: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.nc"
        path.write_bytes(damaged(data.draw, posterior.read_bytes()))

        def work() -> Any:
            result = CliRunner().invoke(app, [command, str(path)])
            lines = [x for x in result.stderr.splitlines() if not x.startswith("warning: ")]
            return (
                result.exit_code,
                repr(result.exception),
                result.output,
                lines,
                sorted(p.name for p in path.parent.iterdir()),
            )

        code, error, output, lines, left = in_child(work)
        assert error == "None" or error.startswith("SystemExit"), (code, error, output)
        assert code in (0, 1, 2)
        if code == 2:
            assert len(lines) == 1 and lines[0].startswith("pirl: "), output
            assert left == ["posterior.nc"]


def test_the_whole_file_is_read(posterior: Path, tmp_path: Path) -> None:
    """So that damage is all that the test above refuses."""
    path = tmp_path / "posterior.nc"
    shutil.copy(posterior, path)
    assert [CliRunner().invoke(app, [c, str(path)]).exit_code for c in ("summary", "diagnose", "plot")] == [0, 0, 0]
