"""Every public name has a docstring with an example, and every example runs and prints what it says."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pytest

from docs.reference import public_modules, public_names
from tests.readme import python_blocks


def is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


# By the first page that has the name; `pirl.reward_draws` is `pirl.posterior.reward_draws`.
PUBLIC: dict[str, tuple[str, Any]] = {}
for page in public_modules():
    for name, value in public_names(page):
        if not any(value is known for _, known in PUBLIC.values()):
            PUBLIC[f"{page.__name__}.{name}"] = (page.__name__, value)


def without_example(names: dict[str, tuple[str, Any]]) -> list[str]:
    # What is raised needs no example of its own: it is in the examples and tests of what raises it.
    return [
        name
        for name, (_, value) in names.items()
        if not is_error(value) and not re.search(r"^Example:\n(    .*\n)*    >>> ", inspect.getdoc(value) or "", re.M)
    ]


def undocumented_methods(value: Any) -> list[str]:
    members = vars(value).items() if inspect.isclass(value) else ()
    return [
        name
        for name, member in members
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod))
        and not (inspect.getdoc(getattr(value, name)) or "").strip()
    ]


def test_every_public_name_has_an_example() -> None:
    assert without_example(PUBLIC) == []


def test_every_error_and_every_public_method_says_what_it_is() -> None:
    silent = [name for name, (_, value) in PUBLIC.items() if not vars(value).get("__doc__", value.__doc__)]
    methods = [f"{name}.{method}" for name, (_, value) in PUBLIC.items() for method in undocumented_methods(value)]
    assert silent + methods == []


def test_a_name_without_example_would_be_seen() -> None:
    def silent() -> None:
        """Says what it is."""

    def shown() -> None:
        """Shows it.

        Example:
            >>> 1 + 1
            2
        """

    assert without_example({"silent": ("here", silent), "shown": ("here", shown)}) == ["silent"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What examples begin with: the README's two worlds, the first with fewer simulated episodes."""
    blocks = python_blocks()
    first = next(block for block in blocks if "pirl.fit" in block)
    unknown = next(block for block in blocks if "bayesian_guided_cost" in block).partition("# Only reset")[0]
    quick = "num_chains=32, num_warmup=200, num_samples=200, "
    assert quick in first and "walks" in unknown
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path_factory.mktemp("readme")), contextlib.redirect_stdout(io.StringIO()):
        pyro.set_rng_seed(0)
        exec(first.replace(quick, f"{quick}num_prior=50, num_posterior_predictive=50, progress=False, "), names)
        exec(unknown, names)
    return names


@pytest.mark.parametrize("name", sorted(name for name, (_, value) in PUBLIC.items() if not is_error(value)))
def test_the_example_runs(name: str, begun: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, value = PUBLIC[name]
    names = begun | dict(public_names(importlib.import_module(where)))
    monkeypatch.chdir(tmp_path)
    pyro.set_rng_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = io.StringIO()
    for example in doctest.DocTestFinder(recurse=False).find(value, name, globs=names):
        runner.run(example, out=report.write)
    plt.close("all")
    assert not runner.failures, report.getvalue()
