from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import xarray
from matplotlib.figure import Figure

from pirl.errors import OptionError
from pirl.plots import plot_density, plot_forest, plot_joint, plot_posterior
from pirl.plots.style import new_figure
from tests.figures import drawn, is_legible, words


def posterior(shapes: dict[str, tuple[int, ...]], **attrs: str) -> xarray.DataTree:
    generator = np.random.default_rng(0)
    variables: dict[str, Any] = {}
    for name, shape in shapes.items():
        dims = ("chain", "draw", *(f"{name}_dim_{i}" for i in range(len(shape))))
        variables[name] = (dims, generator.normal(size=(2, 300, *shape)))
    coords = {dim: np.arange(size) for dims, x in variables.values() for dim, size in zip(dims, x.shape, strict=True)}
    dataset = xarray.Dataset(variables, coords=coords)
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), "posterior": dataset})


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_few_numbers_have_a_density_each(count: int) -> None:
    figure = plot_posterior(posterior({f"p{i}": () for i in range(count)}))
    is_legible(figure)
    assert len(figure.axes) == (3 if count == 2 else count)
    assert {f"p{i}" for i in range(count)} <= set(words(figure).split("\n"))
    assert "reference" not in words(figure)


def test_two_numbers_have_a_joint_panel_with_their_correlation() -> None:
    tree = posterior({"a": (), "b": ()})
    tree["posterior"]["b"] = tree["posterior"]["a"] * -2.0
    assert "correlation -1.00" in words(drawn(plot_posterior(tree)))


def test_many_numbers_are_a_forest_named_by_labels() -> None:
    tree = posterior({"w": (9,), "large": (200,)})
    tree["posterior"].coords["w_dim_0"] = [f"f{i}" for i in range(9)]
    figure = plot_posterior(tree, {"label": "truth", "values": {"w": list(range(9))}})
    is_legible(figure)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"w[f{i}]" for i in range(9)]
    truth = next(line for line in ax.lines if line.get_label() == "truth")
    assert list(truth.get_xdata()) == list(range(9))
    # The first parameter stands on top.
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_labels_title_and_reference_come_from_the_file() -> None:
    kept = {"label": "Rust", "values": {"a": 0.5}, "standard_errors": {"a": 0.25}}
    tree = posterior({"a": (), "b": ()}, title="Buses", model="bus", engine="nuts", reference=json.dumps(kept))
    tree["posterior"]["a"].attrs["long_name"] = "cost (utility)"
    figure = drawn(plot_posterior(tree))
    assert {"cost (utility)", "b"} <= set(words(figure).split("\n"))
    assert "Buses\nbus: nuts, 600 draws" in words(figure)
    assert "Rust $\\pm$ standard error" in words(figure)


def test_a_density_marks_median_interval_and_reference() -> None:
    ax = Figure().subplots()
    draws = np.random.default_rng(1).normal(3.0, 2.0, size=(4, 500))
    plot_density(ax, draws, reference=2.0, error=0.5, label="known")
    low, median, high = np.quantile(draws, [0.05, 0.5, 0.95])
    assert ax.get_title() == f"median {median:.3g}, 90% from {low:.3g} to {high:.3g}"
    (shade,) = [collection for collection in ax.collections if collection.get_label() == "90% interval"]
    edges = shade.get_paths()[0].vertices[:, 0]
    assert edges.min() == pytest.approx(low, abs=0.1)
    assert edges.max() == pytest.approx(high, abs=0.1)
    (place, height), *_ = (line.get_data() for line in ax.lines)
    assert np.trapezoid(height, place) == pytest.approx(1.0, abs=0.02)
    assert ax.containers[0].get_label() == "known $\\pm$ standard error"


def test_a_joint_plot_thins_long_chains() -> None:
    ax = Figure().subplots()
    x = np.arange(10_000.0)
    plot_joint(ax, x, x, (1.0, 2.0), "known")
    offsets = ax.collections[0].get_offsets()
    assert len(offsets) == 2000
    assert offsets[0, 0] == 0.0
    assert offsets[-1, 0] == 9_999.0


@pytest.mark.parametrize("draws", [np.full((2, 5), 3.0), np.full((1, 1), 3.0)])
def test_a_point_has_no_density(draws: np.ndarray) -> None:
    """ArviZ would warn, which is an error here, and return none."""
    ax = Figure().subplots()
    plot_density(ax, draws, reference=4.0)
    (line,) = [collection for collection in ax.collections if collection.get_label() == "every draw"]
    assert line.get_segments()[0].tolist() == [[3.0, 0.0], [3.0, 1.0]] and ax.get_title() == "every draw is 3"


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0])])
def test_what_does_not_vary_has_no_correlation(first: list[float], second: list[float]) -> None:
    """Of one draw, or of a point estimate, NumPy warns: an error here."""
    ax = Figure().subplots()
    plot_joint(ax, first, second)
    assert ax.get_title() == ("1 draw" if len(first) == 1 else "2 draws")
    plot_joint(ax, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert ax.get_title() == "3 draws, correlation -1.00"


def test_a_forest_without_reference() -> None:
    ax = Figure().subplots()
    plot_forest(ax, {"a": np.zeros(10), "b": np.ones(10)})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["90% interval", "50% interval", "median"]


def test_only_large_parameters_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match="plot_reward_map"):
        plot_posterior(posterior({"large": (100,)}))


def test_a_notebook_shows_figures_without_pyplot() -> None:
    """IPython prints matplotlib's own figures as pictures only where pyplot is imported, and as a line elsewhere."""
    formatters = pytest.importorskip("IPython.core.formatters")
    figure = new_figure(2.0, 1.0)
    figure.subplots().plot([0, 1])
    data, _ = formatters.DisplayFormatter().format(figure)
    assert data["image/png"].startswith(b"\x89PNG")
    assert type(pickle.loads(pickle.dumps(figure))) is type(figure)
