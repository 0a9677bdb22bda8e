from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from typer.testing import CliRunner

from pirl.cli import _short_warnings, app
from pirl.errors import CheckpointWarning, OutputError, PosteriorFileError
from pirl.files import read_posterior, write_posterior
from pirl.infer import ENGINES
from pirl.infer.nuts import Nuts

ROOT = Path(__file__).resolve().parents[1]

# A model that is fitted in a second: coins, whose bias has a published value, and a vector of other numbers.
MODEL = '''"""Coins that land on their edge."""

from pathlib import Path
from typing import Literal

import pyro
import pyro.distributions as dist
import torch

labels = {"bias": "bias of the coin (log-odds)"}
dims = {"heads": ("throw",)}
defaults = {"num_prior": 20, "num_posterior_predictive": 20, "laplace": {"num_samples": 70}}


def model(heads, spread):
    bias = pyro.sample("bias", dist.Normal(0.0, spread))
    pyro.sample("other", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"dims": ["side"]})
    with pyro.plate("throw", len(heads)):
        pyro.sample("landed", dist.Bernoulli(logits=bias), obs=heads)


def load(
    heads: int = 6,
    spread: float = 1.0,
    fair: bool = False,
    metal: Literal["tin", "gold"] = "tin",
    folder: Path | None = None,
):
    assert isinstance(fair, bool) and (folder is None or isinstance(folder, Path))
    throws = torch.zeros(10, dtype=torch.float64)
    throws[:heads] = 1.0
    return {"heads": throws, "spread": spread}


def coords(heads, metal):
    return {"throw": [f"{metal}{i}" for i in range(len(heads))], "side": ["a", "b"]}


def reference(metal):
    if metal == "gold":
        return None
    return {"label": "mint", "values": {"bias": 0.25, "other": [1.5, 2.5]}, "standard_errors": {"bias": 0.125}}
'''


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "coin.py"
    path.write_text(MODEL)
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fit(model: Path, *arguments: Any) -> Any:
    result = run("fit", model, "--engine", "laplace", "--chains", 2, *arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: Any) -> str:
    """The one line that a mistake gets."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("pirl: ")
    return line


def test_a_fit_prints_its_table_and_keeps_the_posterior(model: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "posterior.nc", tmp_path / "posterior.png"
    result = fit(model, "--samples", 100, "--seed", 3, "--out", out, "--plot", plot, "--set", "heads=7")
    posterior = xarray.open_datatree(out, engine="h5netcdf").load()
    assert posterior.posterior.sizes["chain"] * posterior.posterior.sizes["draw"] == 200
    assert posterior.attrs["model"] == "coin"
    assert posterior.attrs["seed"] == 3
    assert json.loads(posterior.attrs["options"])["heads"] == 7
    assert posterior.posterior["bias"].attrs["long_name"] == "bias of the coin (log-odds)"
    assert posterior.log_likelihood["landed"].coords["throw"].values.tolist() == [f"tin{i}" for i in range(10)]
    assert posterior.constant_data["heads"].dims == ("throw",)
    assert plot.read_bytes().startswith(b"\x89PNG")

    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    draws = posterior.posterior["bias"].values.ravel()
    expected = [draws.mean(), draws.std(ddof=1), *np.quantile(draws, [0.05, 0.5, 0.95])]
    # Three digits of the standard deviation are printed.
    assert [float(number) for number in rows["bias"][:5]] == pytest.approx(expected, abs=0.0051 * draws.std())
    assert rows["bias"][-2:] == ["0.250", "(0.125)"]
    assert rows["other[a]"][-1] == "1.500" or float(rows["other[a]"][-1]) == 1.5
    assert max(len(line) for line in result.stdout.splitlines()[:6]) <= 80
    assert "coin heads=7 spread=1.0" in result.stdout
    assert f"wrote {out}" in result.stdout


def test_the_file_is_enough_for_summary_and_plot(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "posterior.nc"
    fitted = fit(model, "--out", out)
    summary = run("summary", out)
    assert summary.exit_code == 0
    assert summary.stdout == fitted.stdout.replace(f"wrote {out}\n", "")
    drawn = run("plot", out)
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "posterior.png").stat().st_size > 10_000
    assert run("plot", out, "--out", tmp_path / "p.svg").exit_code == 0
    assert "--recovery is of studies" in refused("plot", out, "--recovery", tmp_path / "r.png")
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_a_model_has_defaults_which_the_command_line_overrides(model: Path) -> None:
    assert (
        "2 x 30 draws" in run("fit", model, "--engine", "nuts", "--chains", 2, "--samples", 30, "--warmup", 30).stdout
    )
    assert "1 x 140 draws" in fit(model).stdout
    assert "1 x 20 draws" in fit(model, "--samples", 10).stdout


def test_a_reference_may_be_absent(model: Path) -> None:
    result = fit(model, "--set", "metal=gold")
    assert "mint" not in result.stdout
    assert "mint" in fit(model, "--set", "metal=tin").stdout


def test_options_are_converted_to_their_types(model: Path) -> None:
    result = fit(model, "--set", "fair=yes", "--set", "folder=here", "--set", "spread=2", "--set", "heads=3")
    assert "coin heads=3 spread=2.0 fair=True metal=tin folder=here" in result.stdout
    assert "folder" not in fit(model, "--set", "folder=none").stdout
    # And where they are not annotated, to those of their defaults.
    model.write_text(model.read_text().replace("heads: int = 6", "heads=6"))
    assert "coin heads=3 " in fit(model, "--set", "heads=3").stdout
    assert "--set heads=many: heads must be a whole number" in refused("fit", model, "--set", "heads=many")


def test_an_existing_file_stays_until_all_is_written(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "posterior.nc"
    fit(model, "--out", out)
    before = out.read_bytes()
    posterior = read_posterior(out)

    def broken(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="could not be written: No space left"):
        patch.setattr(os, "fsync", broken)
        write_posterior(posterior, out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if "posterior" in path.name) == ["posterior.nc"]
    fit(model, "--out", out, "--set", "heads=2")
    assert json.loads(read_posterior(out).attrs["options"])["heads"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--set", "tails=1"],
            ["no option 'tails'", "heads (a whole number)", "metal (tin or gold)", "folder (a path"],
        ),
        (["--set", "heads=many"], ["heads must be a whole number"]),
        (["--set", "heads=1.5"], ["heads must be a whole number"]),
        (["--set", "spread=wide"], ["spread must be a number"]),
        (["--set", "fair=perhaps"], ["fair must be true or false"]),
        (["--set", "metal=lead"], ["metal must be tin or gold"]),
        (["--set", "heads"], ["KEY=VALUE", "'heads'"]),
        (["--engine", "magic"], ["no engine 'magic'", "laplace"]),
        (["--samples", "0"], ["--samples"]),
        (["--samples", "few"], ["--samples", "valid integer"]),
        (["--device", "abacus"], ["device 'abacus' is not known"]),
        (["--device", "meta"], ["device 'meta' cannot be used"]),
        (["--chain", "4"], ["--chain"]),
        (["--out", "{tmp}/nowhere/p.nc"], ["nowhere"]),
        (["--out", "{tmp}"], ["it is a folder"]),
        (["--plot", "{tmp}/p.xyz"], [".png"]),
    ],
)
def test_mistakes_get_one_line(model: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    line = refused("fit", model, *(argument.format(tmp=tmp_path) for argument in arguments))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("pendulum", "num_demos=0", "num_demos is 0, but must be a whole number, at least 1"),
        ("pendulum", "horizon=0", "horizon is 0"),
        ("pendulum", "seed=-1", "seed is -1"),
        ("cartpole", "horizon=0", "horizon is 0"),
        ("cartpole", "num_demos=-1", "num_demos is -1"),
        ("gridworld", "num_demos=0", "num_episodes is 0"),
        ("gridworld", "seed=-1", "seed is -1"),
        ("objectworld", "hidden=-1", "hidden is -1"),
        ("optimality_graphical_model", "num_demos=-1", "num_episodes is -1"),
    ],
)
def test_options_of_our_models_out_of_range_get_one_line(name: str, setting: str, words: str) -> None:
    assert words in refused("fit", ROOT / "models" / f"{name}.py", "--set", setting)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is not a file"),
        ("def load():\n    return {}\n", "no function model"),
        ("def model():\n    pass\n", "no function load"),
        ("def model(:\n", "not Python"),
        ("def model(x):\n    pass\n\n\ndef load(path: str):\n    return {}\n", "--set path=VALUE"),
        ("def model(x):\n    pass\n\n\ndef load():\n    return {'x': 1}\n", "no latent site"),
        ("def model(x):\n    pass\n\n\ndef load():\n    return {'y': 1}\n", "model()"),
    ],
)
def test_a_file_that_is_no_model_gets_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "other.py"
    if text is not None:
        path.write_text(text)
    assert words in refused("fit", path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("heads: int = 6", "heads: Number = 6", "annotations of load() cannot be read"),
        ("heads: int = 6", "heads, /, other: int = 6", "load() must take its options by name"),
        ('return {"heads": throws, "spread": spread}', "return None", "load() must return a dict"),
        ("def coords(heads, metal):", "def coords(heads, color):", "coords() can be called with heads, spread"),
        ("def coords(heads, metal):", "def coords(heads, metal):\n    return 3", "coords() must return a dict"),
        ("def coords(", "coords = 3\n\n\ndef others(", "coords must be a function, not int"),
        ('"label": "mint", ', "", "reference() must return {'label': text"),
        ('"bias": 0.25', '"bias": "much"', "reference() must return"),
        ('"bias": 0.25', '"bias": []', "reference() must return"),
        ('"bias of the coin (log-odds)"', "3", "labels must be a dict from names to words"),
        ('("throw",)', "3", "dims must be a dict from names to names of dims"),
        ('"num_prior": 20', '"num_prior": -20', "num_prior among defaults is -20"),
        ('{"num_samples": 70}', "70", "laplace among defaults must be a dict"),
        ("defaults = {", "defaults = 3 or {", "defaults must be a dict"),
    ],
)
def test_a_part_that_is_none_gets_one_line(model: Path, old: str, new: str, words: str) -> None:
    text = model.read_text()
    assert old in text
    model.write_text("from __future__ import annotations\n" + text.split('"""\n', 1)[1].replace(old, new))
    assert words in refused("fit", model, "--engine", "laplace", "--out", model.with_suffix(".nc"))
    assert not model.with_suffix(".nc").exists()


def test_reference_values_may_be_tensors_and_a_title_may_be_blank(model: Path) -> None:
    text = model.read_text().split('"""\n', 1)[1]
    model.write_text('""" """\n' + text.replace("[1.5, 2.5]", "torch.tensor([1.5, 2.5])"))
    assert "2.50" in fit(model).stdout


def test_an_error_of_pirl_in_a_model_gets_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    body = "from pirl.errors import DataError\ndef model(): ...\ndef load(): raise DataError('no\\ndata')\n"
    path.write_text(body)
    assert refused("fit", path) == "pirl: no data"


def test_the_output_is_checked_before_the_model_is_read(tmp_path: Path) -> None:
    assert "there is no folder" in refused("fit", tmp_path / "absent.py", "--out", tmp_path / "nowhere" / "p.nc")


def test_a_bug_in_a_model_keeps_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "buggy.py"
    path.write_text("def model():\n    pass\n\n\ndef load():\n    return {}[0]\n")
    result = run("fit", path)
    assert result.exit_code == 3 and "KeyError: 0" in result.stderr and "buggy.py" in result.stderr


@pytest.mark.parametrize("command", ["summary", "plot"])
def test_what_is_not_a_posterior_gets_one_line(command: str, tmp_path: Path) -> None:
    path = tmp_path / "file.nc"
    assert "is not a file" in refused(command, path)
    path.write_bytes(b"something else")
    assert "damaged, or not a netCDF file" in refused(command, path)
    xarray.Dataset({"x": 1.0}).to_netcdf(path, engine="h5netcdf")
    assert "not a posterior of pirl" in refused(command, path)


def test_a_damaged_posterior_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "posterior.nc"
    fit(model, "--out", out)
    out.write_bytes(out.read_bytes()[:2000])
    with pytest.raises(PosteriorFileError):
        read_posterior(out)


def test_unknown_commands_get_one_line() -> None:
    assert "fitt" in refused("fitt")
    assert "--verbose" in refused("--verbose")
    assert "POSTERIOR.nc" in refused("summary")


@pytest.mark.parametrize(
    "command", [["-m", "models.bus_engine"], ["-c", "from pirl.cli import main; main()", "fit", "models/bus_engine.py"]]
)
def test_a_model_runs_as_a_program(command: list[str]) -> None:
    # Errors only: they need no fit.
    finished = subprocess.run(
        [sys.executable, *command, "--set", "color=red"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert "no option 'color'; its options are group (text), discount (a number), data (a path or none)" in line


# ------------------------------------------------------------------------------------------- checkpoints and interrupts


def nuts_with(monkeypatch: Any, step: int, event: Any) -> None:
    """Let something happen at the beginning of a step of NUTS."""
    original = Nuts.advance

    def advance(self: Nuts, now: int) -> Any:
        if now == step:
            event()
        return original(self, now)

    monkeypatch.setattr(Nuts, "advance", advance)


NUTS = ("--engine", "nuts", "--chains", 2, "--samples", 20, "--warmup", 20)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def raising(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_predictive_draws_can_be_left_out(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "posterior.nc"
    assert run("fit", model, *NUTS, "--out", out, "--no-predictive").exit_code == 0
    assert not {"prior", "posterior_predictive"} & set(read_posterior(out).children)


def test_ctrl_c_keeps_the_draws_so_far(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, path = tmp_path / "posterior.nc", tmp_path / "run.ckpt"
    with monkeypatch.context() as patch:
        nuts_with(patch, 31, ctrl_c)
        result = run("fit", model, *NUTS, "--out", out, "--checkpoint", path)
    assert result.exit_code == 130
    assert "2 x 12 draws (interrupted), seed" in result.stdout and f"wrote {out}" in result.stdout
    (line,) = (line for line in result.stderr.splitlines() if "interrupted" in line)
    assert (
        line == f"warning: interrupted: returning the 12 draws of each chain so far; the same call goes on from {path}"
    )
    saved = path.read_bytes()
    interrupted = read_posterior(out)
    assert interrupted.posterior.sizes["draw"] == 12 and interrupted.attrs["interrupted"] == "True"

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pirl.fit"], "describe", raising)
        late = run("fit", model, *NUTS, "--checkpoint", path)
    assert late.exit_code == 130
    words = f"interrupted after sampling, while the model was run on the draws; the same call goes on from {path}"
    assert late.stderr.splitlines()[-1] == f"pirl: {words}"
    path.write_bytes(saved)

    again = run("fit", model, *NUTS, "--out", out, "--checkpoint", path)
    assert again.exit_code == 0 and "2 x 20 draws, seed" in again.stdout
    assert f"pirl: {path} has 32 of 40 steps; the run goes on from there" in again.stderr.splitlines()
    whole = tmp_path / "whole.nc"
    run("fit", model, *NUTS, "--out", whole)
    np.testing.assert_array_equal(read_posterior(out).posterior["bias"], read_posterior(whole).posterior["bias"])
    np.testing.assert_array_equal(interrupted.posterior["bias"], read_posterior(whole).posterior["bias"][:, :12])


def test_ctrl_c_in_warm_up_says_what_is_left(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, path = tmp_path / "posterior.nc", tmp_path / "run.ckpt"
    nuts_with(monkeypatch, 3, ctrl_c)
    result = run("fit", model, *NUTS, "--out", out, "--checkpoint", path)
    assert result.exit_code == 130
    assert result.stdout == "" and path.exists() and not out.exists()
    words = f"pirl: interrupted after 4 steps, when there are no draws yet; the same call goes on from {path}"
    assert words in result.stderr.splitlines()


def test_checkpoints_that_do_not_fit_get_one_line(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    path.write_text("my thesis")
    assert "run.ckpt is not a checkpoint of pirl" in refused("fit", model, *NUTS, "--checkpoint", path)
    assert path.read_text() == "my thesis"
    assert "nowhere does not exist" in refused("fit", model, *NUTS, "--checkpoint", tmp_path / "nowhere" / "r")
    assert "saves no checkpoints" in refused("fit", model, "--engine", "laplace", "--checkpoint", path)


def test_warnings_are_told_once_when_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    with _short_warnings():
        for _ in range(2):
            warnings.warn("not\nsaved", CheckpointWarning, stacklevel=1)
        assert capsys.readouterr().err == "warning: not saved\n"
    assert capsys.readouterr().err == ""


def test_the_help_names_every_engine() -> None:
    words = run("fit", "--help").stdout
    for engine in ENGINES:
        assert engine in words
    assert "--checkpoint" in words


def test_a_posterior_file_is_refused_if_a_single_bit_of_it_is_another(tmp_path: Path) -> None:
    path = tmp_path / "posterior.nc"
    numbers = xarray.Dataset({"mu": (("chain", "draw"), np.random.default_rng(0).normal(size=(2, 600)))})
    tree = xarray.DataTree.from_dict({"posterior": numbers})
    tree.attrs["inference_library"] = "pirl"
    write_posterior(tree, path)
    assert read_posterior(path)["posterior"].to_dataset().equals(numbers)
    whole = path.read_bytes()
    # HDF5 reads it as any other, with the seal behind it.
    with xarray.open_datatree(path, engine="h5netcdf") as plain:
        assert plain["posterior"].to_dataset().equals(numbers)
    for bit in np.random.default_rng(1).integers(0, 8 * (len(whole) - 80), 100).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(PosteriorFileError):
            read_posterior(path)
    # Where nothing more can be written the last file stays, and the error has a name.
    path.write_bytes(whole)
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from pirl.files import read_posterior, write_posterior\n"
        "path = Path(sys.argv[1])\ntree = read_posterior(path)\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\nwrite_posterior(tree, path)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"{OutputError.__name__}: {path} could not be written: File too large" in ended.stderr
    assert path.read_bytes() == whole and [entry.name for entry in tmp_path.iterdir()] == ["posterior.nc"]
