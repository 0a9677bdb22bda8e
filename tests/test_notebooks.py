"""Every notebook runs from top to bottom in its short form, without a warning, and draws labelled figures."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pirl import plots

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
NUM_FIGURES = {"01_gridworld": 5, "02_bus_engine": 6, "03_posterior_against_point_estimates": 3,
               "04_unknown_dynamics": 5, "05_calibration": 4}  # fmt: skip

# Runs a notebook as a script in an interpreter of its own, and reports on every figure that it made.
RUN = """
import json, runpy, sys, warnings
import matplotlib
from matplotlib.figure import Figure

warnings.simplefilter("error")
# The short form has too few draws for leave-one-out cross-validation to be trusted.
warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto distribution")
warnings.filterwarnings("ignore", category=RuntimeWarning, module="arviz_stats.base.diagnostics")  # repeated draws
# What plt.show() says without a window, where there could be one.
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")

figures, make = [], Figure.__init__

def remember(figure, *args, **kwargs):
    make(figure, *args, **kwargs)
    figures.append(figure)

Figure.__init__ = remember
runpy.run_path(sys.argv[1], run_name="__main__")

def describe(ax):
    return {
        "x": ax.get_xlabel(), "y": ax.get_ylabel(), "title": ax.get_title(), "colorbar": hasattr(ax, "_colorbar"),
        "ticks": bool(len(ax.get_yticks())), "data": ax.has_data(),
    }

for figure in figures:
    figure.canvas.draw()  # a layout that does not fit warns here
print("FIGURES", json.dumps([[describe(ax) for ax in figure.axes] for figure in figures]))
"""


def figures_of(notebook: Path) -> list[list[dict[str, Any]]]:
    """Run a notebook in its short form; what its figures' axes say about themselves."""
    finished = subprocess.run(
        [sys.executable, "-c", RUN, str(notebook)],
        env={**os.environ, "PIRL_SHORT": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert not finished.stderr.strip(), finished.stderr[-3000:]
    return json.loads(finished.stdout.rpartition("FIGURES ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_labels_its_figures(notebook: Path) -> None:
    figures = figures_of(notebook)
    assert len(figures) == NUM_FIGURES[notebook.stem]
    for number, axes in enumerate(figures, start=1):
        assert axes, f"figure {number} is empty"
        for ax in axes:
            assert ax["data"] or ax["colorbar"], f"figure {number} has an empty panel: {ax}"
            assert ax["colorbar"] or ax["x"], f"figure {number} has a panel without a label below: {ax}"
            assert not ax["ticks"] or ax["y"], f"figure {number} has an axis with numbers and no label: {ax}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_text_that_jupytext_reads(notebook: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    read = jupytext.read(notebook)
    assert read.metadata["kernelspec"]["name"] == "python3"
    first, *others = read.cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert {cell.cell_type for cell in others} == {"markdown", "code"}
    # The short form may change how long chains run, and nothing else.
    uses = [line for cell in others for line in cell.source.splitlines() if "SHORT" in line and line[0] != "#"]
    assert all("num_" in line or line.startswith("SHORT = ") for line in uses), uses


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_that_pyplot_does_not_know_end_their_cells(notebook: Path) -> None:
    """Only there does a notebook show them."""
    jupytext = pytest.importorskip("jupytext")
    makers = {name for name in plots.__all__ if "Figure" in str(signature_of(name))}
    assert {"plot_ranks", "plot_recovery"} <= makers
    for cell in jupytext.read(notebook).cells:
        if cell.cell_type != "code":
            continue
        body = ast.parse(cell.source).body
        for number, step in enumerate(body, start=1):
            called = step.value.func if isinstance(step, ast.Expr) and isinstance(step.value, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in makers:
                assert number == len(body), cell.source


def signature_of(name: str) -> Any:
    made = getattr(plots, name)
    return inspect.signature(made).return_annotation if inspect.isfunction(made) else None


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(NUM_FIGURES)
