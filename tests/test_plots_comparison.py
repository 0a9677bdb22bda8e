from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import pirl
from pirl.datasets import simulate
from pirl.envs import random_mdp
from pirl.errors import HorizonError, InvalidPolicyError, InvalidTrajectoriesError, OptionError, UnavailableActionError
from pirl.plots import (
    BLUE,
    OKABE_ITO,
    ORANGE,
    calibration_table,
    plot_calibration,
    plot_comparison,
    plot_estimates,
    plot_policy,
)
from pirl.plots.style import new_figure
from tests.figures import drawn, is_legible, words

# ------------------------------------------------------------------------------------------------------------ estimates


def labelled(ax: Axes, label: str) -> Any:
    (artist,) = [artist for artist in (*ax.containers, *ax.collections, *ax.lines) if artist.get_label() == label]
    return artist


def estimates(count: int = 6, height: float = 4.0) -> tuple[Figure, dict[str, np.ndarray]]:
    draws = {f"w{i}": np.random.default_rng(i).normal(i, 1.0, size=500) for i in range(count)}
    figure = new_figure(6.5, height)
    plot_estimates(
        figure.subplots(),
        draws,
        {"MaxEnt": {name: x.mean() for name, x in draws.items()}, "max-margin": {"w1": 1.5}},
        {"MaxEnt": {"w0": 2.0, "w2": np.inf}},
        truth={"w0": 0.0, "w2": 2.0},
        label="weight (nats)",
    )
    return figure, draws


def test_estimates_stand_beside_the_posterior() -> None:
    figure, draws = estimates()
    is_legible(figure)
    (ax,) = figure.axes
    low, lower, median, upper, high = np.quantile(list(draws.values()), [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    for label, ends in (("90% interval", (low, high)), ("50% interval", (lower, upper))):
        segments = np.array(labelled(ax, label).get_segments())
        assert segments[..., 0] == pytest.approx(np.stack(ends, 1))
        assert to_hex(labelled(ax, label).get_color()[0]).upper() == BLUE
    assert labelled(ax, "median").get_xdata() == pytest.approx(median)

    points, _, (bars,) = labelled(ax, "MaxEnt").lines
    assert points.get_xdata() == pytest.approx([x.mean() for x in draws.values()])
    assert to_hex(points.get_color()).upper() == ORANGE
    known = np.array([segment for segment in bars.get_segments() if np.size(segment) and np.isfinite(segment).all()])
    # One finite standard error: the interval that holds nine tenths of a normal distribution.
    assert known.shape == (1, 2, 2)
    law = NormalDist(draws["w0"].mean(), 2.0)
    assert [law.cdf(x) for x in known[0, :, 0]] == pytest.approx([0.05, 0.95])

    other, *_ = labelled(ax, "max-margin").lines
    assert np.isfinite(other.get_xdata()).tolist() == [False, True] + [False] * 4
    truth = np.array(labelled(ax, "truth").get_segments())
    assert truth[:, 0, 0].tolist() == [0.0, 2.0]
    assert truth[:, :, 1].mean(1).tolist() == [0, 2]
    # Who says nothing spans everything.
    (dotted,) = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert round(dotted.get_ydata()[0]) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "posterior: median, 50% and 90% interval",
        "MaxEnt, 90% interval",
        "max-margin",
        "truth",
    ]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(draws)
    assert ax.get_xlabel() == "weight (nats)"
    assert ax.get_ylim() == (5.5, -0.5)


def test_lanes_of_a_row_do_not_meet() -> None:
    figure, _ = estimates()
    (ax,) = figure.axes
    lanes = [
        labelled(ax, "median").get_ydata(),
        *(labelled(ax, name).lines[0].get_ydata() for name in ("MaxEnt", "max-margin")),
    ]
    for row, heights in enumerate(np.transpose(lanes)):
        assert (np.diff(heights) > 0.15).all()
        assert np.abs(heights - row).max() < 0.5


def test_thirty_parameters_are_legible() -> None:
    is_legible(estimates(30, height=10.0)[0])


def test_elements_of_larger_parameters_have_rows_of_their_own() -> None:
    ax = Figure().subplots()
    draws = torch.arange(20.0).reshape(5, 2, 2).requires_grad_()
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    plot_estimates(ax, {"w": draws, "b": np.ones(5)}, {"MAP": {"w": values}}, {"MAP": {"w": values / 10}})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["w[0,0]", "w[0,1]", "w[1,0]", "w[1,1]", "b"]
    assert labelled(ax, "median").get_xdata().tolist() == [8.0, 9.0, 10.0, 11.0, 1.0]
    assert labelled(ax, "MAP").lines[0].get_xdata()[:4].tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimates": {"MAP": {"v": 1.0}}}, "estimates of 'MAP' name 'v'.*draws are of w"),
        ({"estimates": {"MAP": {"w": [1.0, 2.0]}}}, r"estimates of 'MAP' name 'w\[0\]'"),
        ({"errors": {"MLE": {"w": 1.0}}}, "errors of 'MLE', which has no estimates: they are of MAP"),
        ({"truth": {"v": 1.0}}, "truth name 'v'"),
        ({"draws": {}}, "no draws of any parameter"),
    ],
)
def test_estimates_of_something_else_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"draws": {"w": np.ones(9)}, "estimates": {"MAP": {"w": 1.0}}, "truth": {"w": 1.0}} | options
    with pytest.raises(OptionError, match=message):
        plot_estimates(Figure().subplots(), **given)


# ---------------------------------------------------------------------------------------------------------- calibration


def log(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_every_available_action_is_a_prediction() -> None:
    # The action of state 1 is forced, one of state 2 not available.
    policy = log([0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.75, 0.25, 0.0])
    demos = pirl.Trajectories([[0, 0, 1, 2], [0, 2]], [[0, 1, 1, 0], [0]])
    table = calibration_table(policy, demos, bins=4)
    # 0.2 and 0.1, three times each; 0.25 once, at the lower edge of its bin; 0.7 three times; 0.75 once.
    assert table["count"].tolist() == [6, 1, 3, 1]
    assert table["predicted"].tolist() == pytest.approx([0.15, 0.25, 0.7, 0.75])
    assert table["frequency"].tolist() == pytest.approx([1 / 6, 0.0, 2 / 3, 1.0])
    assert table["lower"].tolist() == [0.0, 0.25, 0.5, 0.75]
    assert table["upper"].tolist() == [0.25, 0.5, 0.75, 1.0]


def test_intervals_are_exact_binomial_ones() -> None:
    from scipy.stats import binomtest

    policy = log([0.7, 0.2, 0.1])
    demos = pirl.Trajectories([[0] * 9], [[0, 0, 0, 0, 0, 0, 1, 1, 1]])
    table = calibration_table(policy, demos, bins=10, level=0.8)
    filled = table[table["count"] > 0]
    assert filled["frequency"].tolist() == pytest.approx([0.0, 3 / 9, 6 / 9])
    for (_, row), times in zip(filled.iterrows(), (0, 3, 6), strict=True):
        expected = binomtest(times, 9).proportion_ci(0.8, method="exact")
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert table[table["count"] == 0][["predicted", "frequency", "low", "high"]].isna().all(axis=None)


def test_the_true_policy_is_calibrated_and_a_bold_one_is_not() -> None:
    mdp = random_mdp(8, 3, seed=1, discount=0.9)
    reward = torch.randn(8, 3, dtype=torch.float64)
    demos = simulate(mdp, reward, 200, 10)
    true, bold = (calibration_table(pirl.soft_policy(mdp, x), demos, bins=5, level=0.999) for x in (reward, 4 * reward))
    filled = true[true["count"] > 0]
    assert filled["predicted"].between(filled["low"], filled["high"]).all()
    assert not bold["predicted"].between(bold["low"], bold["high"])[[0, 4]].any()
    # 2,000 decisions of three actions each.
    assert true["count"].sum() == bold["count"].sum() == 6000


def test_a_policy_by_time_is_read_from_the_end_that_each_demonstrator_knew() -> None:
    policy = torch.stack([log([0.9, 0.1]), log([0.6, 0.4]), log([0.25, 0.75])])
    # The one has all three times, the other knew of two; it begins at the second.
    demos = pirl.Trajectories([[0, 0, 0], [0, 0]], [[0, 0, 0], [0, 0]], ends=["truncated", "horizon"])
    table = calibration_table(policy, demos, bins=10)
    count = dict(zip(table["lower"].round(1), table["count"], strict=True))
    assert count == {0.0: 0, 0.1: 1, 0.2: 2, 0.3: 0, 0.4: 2, 0.5: 0, 0.6: 2, 0.7: 2, 0.8: 0, 0.9: 1}
    with pytest.raises(HorizonError, match="trajectory 0 needs more than the 2 times"):
        calibration_table(policy[:2], demos)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (log([0.5, 0.5]), InvalidTrajectoriesError, "trajectory 1, step 0: state 1, but the policy has 1"),
        (log([1.0], [1.0]), InvalidTrajectoriesError, "trajectory 0, step 1: action 1, but the policy has 1"),
        (log([1.0, 0.0], [0.5, 0.5]), UnavailableActionError, "trajectory 0, step 1: action 1 has probability 0"),
        (log([0.5, 0.5], [0.5, 0.5]).exp(), InvalidPolicyError, "state 0 is not the logarithm"),
        (log([0.5, 0.5], [0.5, 0.5]) * torch.nan, InvalidPolicyError, "state 0 is not the logarithm"),
    ],
)
def test_policies_that_do_not_fit_are_refused(policy: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibration_table(policy, pirl.Trajectories([[0, 0], [1]], [[0, 1], [0]]))


def test_bins_and_levels_are_checked() -> None:
    demos = pirl.Trajectories([[0]], [[0]])
    for options in ({"bins": 0}, {"level": 1.0}):
        with pytest.raises(OptionError, match="at least 1 bin"):
            calibration_table(log([0.5, 0.5]), demos, **options)


def calibrations() -> dict[str, pandas.DataFrame]:
    demos = pirl.Trajectories([[0] * 40], [[0] * 22 + [1] * 18])
    return {f"p = {p}": calibration_table(log([p, 1 - p]), demos, bins=5) for p in (0.5, 0.7)}


def test_a_reliability_diagram_shows_the_table() -> None:
    tables = calibrations()
    figure = new_figure(4.5, 4.0)
    ax = figure.subplots()
    plot_calibration(ax, tables)
    is_legible(figure)
    for number, (name, table) in enumerate(tables.items()):
        seen = table[table["count"] > 0]
        (container,) = [c for c in ax.containers if c.get_label() == name and hasattr(c, "has_yerr")]
        points, _, (bars,) = container.lines
        assert to_hex(points.get_color()).upper() == OKABE_ITO[number]
        assert points.get_xdata() == pytest.approx(seen["predicted"])
        assert points.get_ydata() == pytest.approx(seen["frequency"])
        assert np.array(bars.get_segments())[..., 1] == pytest.approx(seen[["low", "high"]].to_numpy())
    counts = [[bar.get_height() for bar in c] for c in ax.containers if not hasattr(c, "has_yerr")]
    most = max(table["count"].max() for table in tables.values())
    for heights, table in zip(counts, tables.values(), strict=True):
        assert heights == pytest.approx((max(map(max, counts)) * table["count"] / most).tolist())
    # Bars stay below the points, within their bins, and the largest says how many it is.
    bars = [bar for c in ax.containers if not hasattr(c, "has_yerr") for bar in c]
    assert all(bar.get_y() + bar.get_height() < 0 for bar in bars)
    assert [text.get_text() for text in ax.texts] == ["80"]
    edges = [[(bar.get_x(), bar.get_x() + bar.get_width()) for bar in c] for c in ax.containers[1::2]]
    assert (np.diff(np.concatenate(edges, 1).reshape(-1)) > -1e-9).all()


def test_one_table_needs_no_name_and_an_empty_one_shows_nothing() -> None:
    ax = Figure().subplots()
    (table, _) = calibrations().values()
    plot_calibration(ax, table)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["calibrated", "observed, with interval"]
    plot_calibration(Figure().subplots(), table.assign(count=0))
    with pytest.raises(OptionError, match="no column 'count'"):
        plot_calibration(ax, table.drop(columns="count"))
    with pytest.raises(OptionError, match="no table"):
        plot_calibration(ax, {})


# ----------------------------------------------------------------------------------------------------------- comparison

NAN, INF = np.nan, np.inf
ROWS = {
    "posterior: mean policy": (-1.10, -1.16, -1.04, 0.12),
    "posterior: 10% CVaR policy": (NAN, NAN, NAN, 0.10),
    "maxent": (-1.15, -1.25, -1.06, 0.30),
    "max_margin": (-INF, -INF, -INF, 0.90),
    "cloning": (-1.40, -INF, -1.30, NAN),
    "truth": (-1.05, -1.10, -1.00, 0.0),
}
TABLE = pandas.DataFrame.from_dict(
    ROWS, orient="index", columns=["log_likelihood", "log_likelihood_low", "log_likelihood_high", "evd"]
)


def test_a_comparison_shows_both_columns_in_groups() -> None:
    figure = plot_comparison(TABLE)
    is_legible(figure)
    predicting, acting = figure.axes
    labels = [label.get_text() for label in predicting.get_yticklabels()]
    assert labels == ["posterior", "mean policy", "10% CVaR policy", "maxent", "max_margin", "cloning", "truth"]
    weights = [label.get_fontweight() for label in predicting.get_yticklabels()]
    assert weights == ["bold"] + ["normal"] * 6
    heights = predicting.get_yticks()[1:]
    for ax, column in ((predicting, "log_likelihood"), (acting, "evd")):
        (points,) = [artist for artist in ax.collections if len(artist.get_offsets()) == 6]
        place, height = np.ma.filled(points.get_offsets(), np.nan).T
        finite = np.isfinite(TABLE[column].to_numpy())
        assert place[finite] == pytest.approx(TABLE[column].to_numpy()[finite])
        assert height[finite] == pytest.approx(heights[finite])
        colors = [to_hex(color).upper() for color in points.get_facecolor()]
        assert colors == [BLUE, BLUE, ORANGE, ORANGE, ORANGE, "#000000"]
    left = predicting.get_xlim()[0]
    (intervals,) = [artist for artist in predicting.collections if hasattr(artist, "get_segments")]
    known, segments = [0, 2, 5], intervals.get_segments()
    ends = {row: segments[row][:, 0] for row in (*known, 4)}
    bounds = TABLE[["log_likelihood_low", "log_likelihood_high"]].to_numpy()
    assert np.array([ends[row] for row in known]) == pytest.approx(bounds[known])
    assert ends[4] == pytest.approx([left, -1.30])
    # Minus infinity: an arrow for the estimate and for the open interval, words for the estimate.
    arrows = [line.get_ydata()[0] for line in predicting.lines if line.get_marker() == "<"]
    assert arrows == pytest.approx([heights[3], heights[4]])
    assert [text.get_text() for text in predicting.texts] == ["$-\\infty$"]
    (truth,) = [line for line in predicting.lines if line.get_linestyle() == "--"]
    assert truth.get_xdata()[0] == -1.05


def test_without_a_truth_there_is_one_panel() -> None:
    table = TABLE.drop(index="truth").assign(evd=NAN)
    figure = plot_comparison(table)
    is_legible(figure)
    assert len(figure.axes) == 1
    assert "value difference" not in words(figure)
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    drawn(plot_comparison(table[["log_likelihood"]]))
    drawn(plot_comparison(table.loc[["max_margin"]]))


def test_tables_of_something_else_are_refused() -> None:
    with pytest.raises(OptionError, match="no column 'log_likelihood'; it has evd"):
        plot_comparison(TABLE[["evd"]])
    with pytest.raises(OptionError, match="empty"):
        plot_comparison(TABLE.iloc[:0])


# --------------------------------------------------------------------------------------------------------------- axes


def test_only_the_given_axes_are_drawn_on() -> None:
    figure = Figure()
    axes, others = figure.subplots(2, 3)
    plot_estimates(axes[0], {"w": np.arange(9.0)}, {"MAP": {"w": 1.0}})
    plot_calibration(axes[1], calibrations())
    plot_policy(axes[2], np.full((4, 4), 0.25), (2, 2))
    assert figure.axes == [*axes, *others]
    assert not figure.legends
    assert not any(ax.has_data() or ax.get_legend() or ax.get_title() for ax in others)
