"""Model files, put together from parts of which some are wrong: one line and status 2, or the file's own exception."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pirl.cli import CRASHED, app
from tests.fuzz.cases import HANG, cases

ROOT = Path(__file__).resolve().parents[2]

HEAD = """import pyro, torch
import pyro.distributions as dist
"""
MODEL = """
def model(heads, spread):
    bias = pyro.sample("bias", dist.Normal(0.0, spread))
    pair = pyro.sample("pair", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("throw", len(heads)):
        pyro.sample("landed", dist.Bernoulli(logits=bias + 0 * pair.sum()), obs=heads)
"""
LOAD = """
def load(heads: int = 3, spread: float = 1.0):
    return {"heads": (torch.arange(6.0) < heads).double(), "spread": spread}
"""


def body(text: str) -> str:
    """The model with another body."""
    return "\ndef model(heads, spread):\n" + "".join(f"    {line}\n" for line in text.splitlines())


def returning(text: str, signature: str = "") -> str:
    return f"\ndef load({signature}):\n    return {text}\n"


GOOD, ONE_LINE, OWN = "good", "one line", "own"


@dataclass(frozen=True)
class Part:
    """A piece of a model file, what comes of it, and words of the line that it gets."""

    text: str
    outcome: str = GOOD
    words: str = ""


def bad(text: str, words: str = "") -> Part:
    return Part(text, ONE_LINE, words)


def own(text: str, error: str) -> Part:
    """The file's own error, which keeps its traceback."""
    return Part(text, OWN, error)


Z = 'z = pyro.sample("z", dist.Normal(0.0, 1.0))\n'
PARTS: dict[str, list[Part]] = {
    "head": [
        Part(HEAD),
        Part('"""Coins."""\n' + HEAD),
        Part('""" """\n' + HEAD),  # no title
        Part('"""\n\n"""\n' + HEAD),
        Part("# -*- coding: latin-1 -*-\n# \xe9\n" + HEAD),
        Part("from __future__ import annotations\n" + HEAD),
        bad("def model(:\n", "not Python"),
        bad("if True:\nx = 1\n", "not Python"),
        bad("x = '\n", "not Python"),
        bad("\x00" + HEAD, "not Python"),
        bad("# -*- coding: no-such-code -*-\n", "not Python"),
        bad("return 1\n", "not Python"),
        bad("(" * 300 + ")" * 300 + "\n", "not Python"),
        own("import no_such_module_at_all\n", "ModuleNotFoundError"),
        own("1 / 0\n", "ZeroDivisionError"),
        own("undefined_name\n", "NameError"),
        bad("from pirl.errors import DataError\nraise DataError('no\\ndata')\n", "no data"),
    ],
    "model": [
        Part(MODEL),
        Part(body(Z + 'pyro.factor("f", -z * z)')),
        Part(body('pyro.sample("only", dist.Normal(0.0, 1.0))')),  # no observed site: the prior
        Part(body('pyro.sample("a b[c]", dist.Normal(0.0, 1.0))')),
        Part(body('pyro.sample("z", dist.LogNormal(0.0, 1.0))\nreturn object()')),
        Part("\nmodel = lambda heads, spread: pyro.sample('x', dist.Normal(0.0, 1.0))\n"),
        bad("", "no function model"),
        bad("\nmodel = 3\n", "no function model"),
        bad("\nmodel = None\n", "no function model"),
        bad("\ndef model():\n    pass\n", "does not fit model"),
        bad("\ndef model(heads, spread, more):\n    pass\n", "does not fit model"),
        bad(body("pass"), "no latent site"),
        bad(body('pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))'), "no latent site"),
        bad(body('pyro.sample("k", dist.Bernoulli(0.5))'), "'k' is discrete"),
        bad(body('pyro.sample("k", dist.Categorical(torch.ones(3)))'), "'k' is discrete"),
        bad(body('pyro.sample("k", dist.Poisson(2.0))'), "'k' is discrete"),
        bad(body('pyro.sample("a/b", dist.Normal(0.0, 1.0))'), "'a/b' contains '/'"),
        bad(body('pyro.param("w", torch.zeros(()))\n' + Z), "'w' is a pyro.param"),
        bad(body('with pyro.plate("p", 4, subsample_size=2):\n    ' + Z), "'p' takes 2"),
        bad(body('pyro.sample("z", dist.Normal(0.0, -1.0))'), "scale"),
        bad(body('pyro.sample("z", dist.Normal(float("nan"), 1.0))'), "loc"),
        bad(body(Z + 'pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(float("nan")))'), "x"),
        bad(body(Z + 'pyro.sample("x", dist.Bernoulli(0.5), obs=torch.tensor(0.5))'), "x"),
        bad(body(Z + 'pyro.sample("x", dist.Normal(z, 1e-10), obs=torch.tensor(1e300))'), "'x'"),
        bad(body(Z + 'pyro.factor("trap", torch.tensor(float("-inf")))'), "'trap'"),
        bad(body(Z + 'pyro.factor("trap", z * float("nan"))'), "log_factor"),
        bad(body(Z + 'pyro.factor("trap", (z - z).sqrt())'), "'z' is not finite"),
        bad(body(Z + Z), "'z'"),
        own(body("return 1 / 0"), "ZeroDivisionError"),
        own(body('return heads["x"]'), "(TypeError|IndexError|ValueError)"),
        own("\ndef model(heads, spread):\n    raise KeyError('mine')\n", "KeyError"),
    ],
    "load": [
        Part(LOAD),
        Part(returning('{"heads": torch.ones(4).double(), "spread": 2.0}')),
        Part(returning("{'heads': torch.ones(4).double(), 'spread': 1.0}", "*names")),
        Part(returning("{'heads': torch.ones(4).double(), 'spread': 1.0}", "**options")),
        Part(returning('{"heads": torch.ones(4).double(), "spread": float(n)}', "n=3")),  # an option without a type
        Part(returning('{"heads": torch.ones(4).double(), "spread": 1.0}', "a: 'int | None' = None, b: bool = False")),
        bad("", "no function load"),
        bad("\nload = {}\n", "no function load"),
        bad(returning("{}", "path: str"), "needs --set path=VALUE, where path is text"),
        bad(returning("{}", "path"), "needs --set path=VALUE"),
        bad(returning("{}", "n: 'NoSuchType' = 1"), "load"),
        bad(returning("None"), "load"),
        bad(returning("3"), "load"),
        bad(returning("'text'"), "load"),
        bad(returning("[1, 2]"), "load"),
        bad(returning("{1: 2}"), "load"),
        bad(returning("{}"), "does not fit model"),
        bad(returning("{'heads': 1}"), "does not fit model"),
        bad(returning("{'heads': 1, 'spread': 2, 'more': 3}"), "does not fit model"),
        Part(returning("{'heads': torch.ones(4).double(), 'spread': 1.0}", "a=1, /")),
        bad(returning('[("heads", torch.ones(4).double()), ("spread", 2.0)]'), "load"),
        bad(returning("{}", "a, /"), "load"),
        own(returning("{}[0]"), "KeyError"),
        own(returning("open('/no/such/file/at/all')"), "FileNotFoundError"),
        own(returning("int('x')"), "ValueError"),
    ],
    "coords": [
        Part(""),
        Part("\ndef coords(heads):\n    return {'throw': list(range(len(heads)))}\n"),
        Part("\ndef coords():\n    return {}\n"),
        Part("\ndef coords():\n    return None\n"),
        Part("\ncoords = None\n"),
        bad("\ncoords = 3\n", "coords"),
        bad("\ncoords = {'throw': [0]}\n", "coords"),
        bad("\ndef coords():\n    return {'throw': ['a']}\n", "throw"),
        bad("\ndef coords():\n    return {'no_such_dim': ['a']}\n", "no_such_dim"),
        bad("\ndef coords():\n    return 3\n", "coords"),
        bad("\ndef coords():\n    return ['a']\n", "coords"),
        bad("\ndef coords():\n    return {'throw': 3}\n", "coords"),
        bad("\ndef coords(unknown):\n    return {}\n", "coords"),
        own("\ndef coords():\n    raise LookupError('mine')\n", "LookupError"),
    ],
    "reference": [
        Part(""),
        Part("\ndef reference():\n    return None\n"),
        Part("\ndef reference():\n    return {'label': 'x', 'values': {'bias': 0.5, 'pair': [1, 2], 'absent': 3}}\n"),
        Part("\ndef reference():\n    return {'label': 'x', 'values': {}, 'standard_errors': {'pair': [0.1, 0.2]}}\n"),
        Part("\ndef reference():\n    return {'label': 'x', 'values': {'bias': float('nan')}}\n"),
        bad("\nreference = {'label': 'x'}\n", "reference"),
        bad("\ndef reference():\n    return 3\n", "reference"),
        bad("\ndef reference():\n    return 'words'\n", "reference"),
        bad("\ndef reference():\n    return {'values': {'bias': 0.5}}\n", "reference"),
        bad("\ndef reference():\n    return {'label': 'x', 'values': {'bias': 'many'}}\n", "reference"),
        bad("\ndef reference():\n    return {'label': 'x', 'values': {'bias': []}}\n", "reference"),
        bad("\ndef reference():\n    return {'label': 'x', 'values': 3}\n", "reference"),
        bad("\ndef reference():\n    return {'label': 'x', 'values': {'bias': ['a']}}\n", "reference"),
        Part("\ndef reference():\n    return {'label': 3, 'values': {'pair': torch.ones(2)}}\n"),
        bad("\ndef reference(unknown):\n    return None\n", "reference"),
        own("\ndef reference():\n    raise LookupError('mine')\n", "LookupError"),
    ],
    "words": [
        Part("\ndefaults = {'num_prior': 0, 'num_posterior_predictive': 0}\n"),
        Part(""),
        Part("\ndims = {'heads': ('throw',)}\n"),
        Part("\nlabels = {'bias': 'the bias', 'absent': 'x'}\n"),
        Part("\ndefaults = {'num_prior': 3, 'laplace': {'num_starts': 2}, 'num_posterior_predictive': 0}\n"),
        Part("\ndims = None\nlabels = None\ndefaults = None\n"),
        bad("\ndims = 3\n", "dims"),
        bad("\ndims = {'heads': 3}\n", "dims"),
        bad("\ndims = {'heads': ('a', 'b', 'c')}\n", "heads"),
        bad("\nlabels = 3\n", "labels"),
        bad("\nlabels = {'bias': 3}\n", "labels"),
        bad("\ndefaults = 3\n", "defaults"),
        bad("\ndefaults = ['engine']\n", "defaults"),
        Part("\ndefaults = {'engine': 'magic'}\n"),  # the command names another
        bad("\ndefaults = {'laplace': 3}\n", "laplace"),
        bad("\ndefaults = {'no_such_option': 1}\n", "no_such_option"),
        bad("\ndefaults = {'laplace': {'no_such_option': 1}}\n", "no_such_option"),
        bad("\ndefaults = {3: 4}\n", "defaults"),
        bad("\ndefaults = {'num_prior': 'many'}\n", "num_prior"),
        bad("\ndefaults = {'num_prior': -3}\n", "num_prior"),
    ],
}  # fmt: skip
ORDER = list(PARTS)


@st.composite
def files(draw: Any, faults: int) -> list[tuple[str, Part]]:
    """Parts in order, at most so many of them wrong."""
    wrong = draw(st.lists(st.sampled_from(ORDER), min_size=faults, max_size=faults, unique=True))
    return [
        (name, draw(st.sampled_from([part for part in PARTS[name] if (part.outcome == GOOD) == (name not in wrong)])))
        for name in ORDER
    ]


def fit(parts: list[tuple[str, Part]], *arguments: str) -> tuple[Any, list[str]]:
    """What the command makes of the file, and what else lies in its folder then."""
    with tempfile.TemporaryDirectory() as folder, pyro.get_param_store().scope():
        path = Path(folder) / "file.py"
        path.write_text(
            "".join(part.text for _, part in parts), encoding="utf-8" if "\xe9" not in parts[0][1].text else "latin-1"
        )
        command = ["fit", str(path), "--engine", "laplace", "--chains", "1", "--samples", "6", *arguments]
        command += ["--out", str(Path(folder) / "p.nc")]
        result = CliRunner().invoke(app, command)
        sys.modules.pop("pirl_model_file", None)
        return result, sorted(x.name for x in Path(folder).iterdir() if x.name not in ("file.py", "__pycache__"))


def check(result: Any, left: list[str], faults: list[Part]) -> None:
    told = f"{result.exit_code}, {result.exception!r}, {left}\n{result.output}\n{result.stderr}"
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    if result.exit_code == CRASHED:
        # The file's own exception, told with its traceback.
        kinds = [part.words for part in faults if part.outcome == OWN]
        raised = re.findall(r"^([A-Za-z_.]+)(?::|$)", result.stderr, re.MULTILINE)
        assert any(re.fullmatch(kind, raised[-1].split(".")[-1]) for kind in kinds), told
        assert "Traceback" in result.stderr and left == [], told
        return
    if not faults:
        assert result.exit_code == 0 and left == ["p.nc"] and lines == [], told
        return
    assert result.exit_code == 2 and result.stdout == "" and left == [], told
    assert len(lines) == 1 and lines[0].startswith("pirl: "), told
    assert any(part.words in lines[0] for part in faults if part.outcome == ONE_LINE), told


@pytest.mark.parametrize("name", ORDER)
@given(data=st.data())
@cases(2, 80)
def test_a_file_with_one_odd_part(name: str, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(PARTS[name]))
    parts = [(other, part if other == name else PARTS[other][0]) for other in ORDER]
    check(*fit(parts), [part] if part.outcome != GOOD else [])


@given(files(0))
@cases(1, 60)
def test_odd_parts_that_are_right_go_together(parts: list[tuple[str, Part]]) -> None:
    # Names that a dict of reference values or labels knows need not be sites; a dim that has labels must be there.
    parts = [(name, PARTS[name][0] if name in ("coords", "words") else part) for name, part in parts]
    check(*fit(parts), [])


@given(files(2))
@cases(4, 350)
def test_of_two_faults_one_is_told(parts: list[tuple[str, Part]]) -> None:
    parts = [
        (name, PARTS[name][0] if part.outcome == GOOD and name in ("coords", "words") else part) for name, part in parts
    ]
    check(*fit(parts), [part for _, part in parts if part.outcome != GOOD])


@given(
    files(1),
    st.lists(st.sampled_from(["=", "heads=1", "heads=x", "spread=nan", "no=1", "heads", "", "a=none"]), max_size=2),
)
@cases(2, 100)
def test_settings_of_odd_files(parts: list[tuple[str, Part]], settings: list[str]) -> None:
    """Whatever is set: no traceback but the file's own, and no file without a posterior."""
    parts = [
        (name, PARTS[name][0] if part.outcome == GOOD and name in ("coords", "words") else part) for name, part in parts
    ]
    result, left = fit(parts, *(word for text in settings for word in ("--set", text)))
    if result.exit_code == 0:
        assert left == ["p.nc"]
    elif result.exit_code == 2:
        assert left == [] and len(result.stderr.splitlines()) == 1, result.stderr
    else:
        check(result, left, [part for _, part in parts if part.outcome != GOOD])


@given(files(1).filter(lambda parts: any(part.outcome == ONE_LINE for _, part in parts)))
@cases(1, 12)
def test_in_a_process_of_its_own(parts: list[tuple[str, Part]]) -> None:
    """As a user runs it: calls are not type-checked there before pirl looks at them."""
    parts = [(name, PARTS[name][0] if part.outcome == GOOD else part) for name, part in parts]
    (fault,) = [part for _, part in parts if part.outcome != GOOD]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.py"
        path.write_text("".join(part.text for _, part in parts))
        command = [sys.executable, "-c", "from pirl.cli import main; main()", "fit", str(path), "--engine", "laplace"]
        done = subprocess.run(
            [*command, "--chains", "1", "--samples", "6", "--out", f"{folder}/p.nc"],
            cwd=ROOT, capture_output=True, text=True, timeout=4 * HANG, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        assert line.startswith("pirl: ") and fault.words in line
        assert not (Path(folder) / "p.nc").exists()
