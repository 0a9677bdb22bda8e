"""Command lines of any flags and values: no traceback, a known exit status, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pirl.cli import app
from pirl.infer import ENGINES
from tests.fuzz.cases import FULL, cases

# A model of two numbers that compares as well: a chain of three states, seen twice and more.
MODEL = '''"""A short corridor."""

import pyro
import pyro.distributions as dist
import torch

import pirl

defaults = {"num_prior": 4, "num_posterior_predictive": 4, "laplace": {"num_starts": 2}, "svi": {"max_steps": 20}}


def model(demos, mdp, features):
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"dims": ["feature"]})
    reward = pirl.linear_reward(features, weights)
    with pyro.plate("episode", len(demos)):
        pyro.sample("seen", pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths), obs=demos.as_tensor())


def load(episodes: int = 4, discount: float = 0.9, slow: bool = False):
    table = torch.zeros(3, 2, 3, dtype=torch.float64)
    for s in range(3):
        table[s, 0, max(s - 1, 0)] = table[s, 1, min(s + 1, 2)] = 1.0
    mdp = pirl.TabularMDP(table, 0, discount=discount)
    features = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    demos = pirl.Trajectories([[0, 1, 2, 1]] * episodes, [[1, 1, 0]] * episodes)
    return {"demos": demos, "mdp": mdp, "features": features}


def coords():
    return {"feature": ["near", "far"]}


def reference():
    return {"label": "truth", "values": {"weights": [0.5, 1.0]}}
'''


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its posterior, and files that are neither."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "model.py").write_text(MODEL)
    (folder / "words.nc").write_text("my thesis")
    (folder / "empty.nc").touch()
    (folder / "no_model.py").write_text("x = 1\n")
    (folder / "folder").mkdir()
    command = ["fit", str(folder / "model.py"), "--engine", "laplace", "--chains", "2", "--samples", "30"]
    result = CliRunner().invoke(app, [*command, "--out", str(folder / "posterior.nc")])
    assert result.exit_code == 0, result.output
    return folder


@contextmanager
def inside(shelf: Path) -> Iterator[dict[str, bytes | None]]:
    """A working copy of the shelf to run in; what lies in it."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(shelf, folder, dirs_exist_ok=True)
        os.chdir(folder)
        try:
            yield contents()
        finally:
            os.chdir(before)


def contents() -> dict[str, bytes | None]:
    paths = (path for path in Path().rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def run(words: list[str], before: dict[str, bytes | None], outputs: list[str]) -> Any:
    """Run a command, and check what holds for each."""
    result = CliRunner().invoke(app, words)
    told = f"{words}: {result.exit_code}, {result.exception!r}\n{result.output}"
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code in (0, 1, 2, 130) and "Traceback" not in result.output, told
    after = contents()
    new = {name for name in after if name not in before}
    changed = {name for name in before if after.get(name, b"") != before[name]}
    if result.exit_code in (2, 130):
        assert not new and not changed, f"{told}\n{new} {changed}"
        lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        assert (len(lines) == 1 and lines[0].startswith("pirl: ")) or not words, told
        assert result.stdout == "" or not words, told
    else:
        assert new | changed <= {str(Path(x)) for x in outputs}, f"{told}\n{new} {changed}"
        if "nan" in result.stdout.lower():
            assert "--help" in words, told
    return result


def word(*usual: str) -> st.SearchStrategy[str]:
    """A likely value, or a most unlikely one."""
    odd = ["", "-1", "0", "x", "1e3", "nan", "1" * 30, "\x00", "ä", " ", "-", "--", "=", "%s", "{x}", "[bold]", "None"]
    return st.sampled_from([*usual, *usual, *usual, *odd])


NUMBERS = ("1", "2", "5")
OUTPUTS = (
    "out.nc",
    "posterior.nc",
    "folder/out.nc",
    "folder",
    "nowhere/out.nc",
    "words.nc",
    "./out.nc",
    ".hidden",
    "out",
)
PICTURES = ("p.png", "p.svg", "p.xyz", "folder/p.pdf", "nowhere/p.png", "P.PNG", "p", ".png")
FLAGS: dict[str, st.SearchStrategy[str]] = {
    "--engine": word(*ENGINES, "magic", "Laplace"),
    "--chains": word(*NUMBERS),
    "--samples": word(*NUMBERS),
    "--warmup": word("0", *NUMBERS),
    "--seed": word("0", "7", "4294967296"),
    "--device": word("cpu", "cpu", "meta", "cuda:99", "abacus"),
    "--set": word("episodes=5", "episodes=0", "episodes=1", "discount=0.5", "discount=1", "discount=nan", "discount=2",
                  "slow=yes", "slow=perhaps", "absent=1", "episodes"),
    "--out": word(*OUTPUTS),
    "--plot": word(*PICTURES),
}  # fmt: skip
COMPARE = {name: value for name, value in FLAGS.items() if name != "--device"} | {
    "--out": word("t.csv", "t.tex", "t.txt", "nowhere/t.csv", "folder"),
    "--hold-out": word("0.25", "0.5", "0", "1", "0.99", "-0.5", "inf"),
}
CALIBRATE = FLAGS | {
    "--replicates": word("2", "3", "1"),
    "--draws": word(*NUMBERS),
    "--recovery": word(*PICTURES),
    "--checkpoint": word("study.ckpt", "out.nc", "words.nc", "folder", "nowhere/study.ckpt"),
}
MODELS = st.sampled_from(["model.py"] * 8 + ["no_model.py", "absent.py", "words.nc", "folder", ""])
POSTERIORS = st.sampled_from(
    ["posterior.nc"] * 4 + ["words.nc", "empty.nc", "absent.nc", "folder", "model.py", "", "\x00"]
)


@st.composite
def flags(draw: Any, known: dict[str, st.SearchStrategy[str]], most: int = 4) -> list[str]:
    words: list[str] = []
    for name in draw(st.lists(st.sampled_from(sorted(known)), max_size=most, unique=True)):
        value = draw(known[name])
        words += draw(st.sampled_from([[name, value], [name, value], [f"{name}={value}"]]))
    if draw(st.integers(0, 12)) == 0:
        words.append(draw(st.sampled_from(["--no-progress", "--verbose", "--out", "extra", "--help", "--engin", "-x"])))
    return words


def values(words: list[str], *names: str) -> list[str]:
    """What follows an option that names an output."""
    found = [after for name, after in zip(words, words[1:], strict=False) if name in names]
    return found + [word.partition("=")[2] for word in words if word.startswith(tuple(f"{name}=" for name in names))]


@given(model=MODELS, more=flags(FLAGS))
@cases(6, 260)
def test_fits(shelf: Path, model: str, more: list[str]) -> None:
    small = [w for name, value in (("--engine", "laplace"), ("--chains", "1"), ("--samples", "3"), ("--warmup", "2"))
             if not any(x.partition("=")[0] == name for x in more) for w in (name, value)]  # fmt: skip
    with inside(shelf) as before:
        run(["fit", model, *small, *more], before, values(more, "--out", "--plot"))


@given(model=MODELS, more=flags(CALIBRATE))
@cases(6, 120)
def test_studies(shelf: Path, model: str, more: list[str]) -> None:
    few = {
        "--engine": "laplace",
        "--chains": "1",
        "--samples": "3",
        "--warmup": "2",
        "--replicates": "2",
        "--draws": "2",
    }
    small = [
        w for name, value in few.items() if not any(x.partition("=")[0] == name for x in more) for w in (name, value)
    ]
    with inside(shelf) as before:
        run(["calibrate", model, *small, *more], before, values(more, "--out", "--plot", "--recovery", "--checkpoint"))


@pytest.mark.skipif(not FULL, reason="in the full form only: a comparison fits six answers")
@given(model=MODELS, more=flags(COMPARE, most=3))
@cases(1, 20)
def test_comparisons(shelf: Path, model: str, more: list[str]) -> None:
    small = [w for name, value in (("--engine", "laplace"), ("--chains", "1"), ("--samples", "3"), ("--warmup", "2"))
             if not any(x.partition("=")[0] == name for x in more) for w in (name, value)]  # fmt: skip
    with inside(shelf) as before:
        run(["compare", model, *small, *more], before, values(more, "--out", "--plot"))


@given(command=st.sampled_from(["summary", "diagnose", "plot"]), path=POSTERIORS, out=st.none() | word(*PICTURES))
@cases(4, 200)
def test_files_looked_at(shelf: Path, command: str, path: str, out: str | None) -> None:
    given_out = [] if out is None or command != "plot" else ["--out", out]
    with inside(shelf) as before:
        beside = [str(Path(path).with_suffix(".png"))] if path and command == "plot" and Path(path).name else []
        run([command, path, *given_out], before, values(given_out, "--out") or beside)


@given(
    st.lists(
        word("fit", "summary", "plot", "diagnose", "compare", "calibrate", "model.py", "posterior.nc", "--help"),
        max_size=4,
    )
)
@cases(6, 160)
def test_any_words(shelf: Path, words: list[str]) -> None:
    with inside(shelf) as before:
        if words and words[0] in ("fit", "compare", "calibrate"):
            words = [*words, "--engine", "laplace", "--chains", "1", "--samples", "3"]
            words += ["--replicates", "2", "--draws", "2"] * (words[0] == "calibrate")
        run(words, before, ["posterior.png", "model.png"])


@pytest.mark.parametrize("command", ["fit", "plot", *["compare"] * FULL])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), *[KeyboardInterrupt(), MemoryError()] * FULL]
)
def test_what_breaks_while_writing_leaves_what_was_there(
    shelf: Path, command: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the command, the old file is whole and no other lies beside it."""
    import matplotlib.figure
    import pandas

    def half(_: Any, path: Any, *rest: Any, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    def broken(*_: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", half)
    monkeypatch.setattr(pandas.DataFrame, "to_csv", broken)
    small = ["--engine", "laplace", "--chains", "1", "--samples", "3"]
    words = {
        "fit": ["fit", "model.py", *small, "--out", "old.nc"],
        "plot": ["plot", "posterior.nc", "--out", "old.png"],
        "compare": ["compare", "model.py", *small, "--out", "old.csv"],
    }[command]
    with inside(shelf):
        Path(words[-1]).write_text("old")
        before = contents()
        result = CliRunner().invoke(app, words)
        assert contents() == before
        if isinstance(error, OSError):
            assert result.exit_code == 2 and "could not be written: No space left on device" in result.output
