from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import pirl
from pirl.envs import gridworld
from pirl.errors import InvalidPolicyError, OptionError
from pirl.plots import (
    BLUE,
    ORANGE,
    mark_cells,
    plot_occupancy,
    plot_policy,
    plot_reward_map,
    plot_reward_posterior,
    plot_reward_summary,
)
from pirl.plots.maps import GRIDWORLD_MOVES
from pirl.plots.style import DIVERGING, SEQUENTIAL, new_figure
from tests.figures import drawn, is_legible, words

SHAPE = (3, 4)
WALLS = [(1, 1), (2, 3)]
WALL = np.isin(np.arange(12), [5, 11])


def grid(ax: Axes) -> np.ndarray:
    """Numbers of a map by state, NaN where it is blank."""
    return np.ma.filled(np.ma.asarray(ax.images[0].get_array(), dtype=float), np.nan).ravel()


def hidden(values: np.ndarray) -> np.ndarray:
    return np.where(WALL, np.nan, values)


def titled(figure: Figure, title: str) -> Axes:
    (ax,) = [ax for ax in figure.axes if ax.get_title() == title]
    return ax


def draws(seed: int = 3, count: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.4, 1.0, size=(count, 12))


def test_a_map_has_the_first_row_on_top_and_a_named_scale() -> None:
    figure = Figure()
    ax = figure.subplots()
    plot_reward_map(ax, np.arange(6.0), 2, 3, title="mean", limits=(-1.0, 9.0), label="reward")
    (image,) = ax.images
    assert image.get_array().tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert image.get_clim() == (-1.0, 9.0)
    assert figure.axes[1].get_ylabel() == "reward"
    with pytest.raises(OptionError, match="expected 8"):
        plot_reward_map(ax, np.arange(6.0), 2, 4)


def test_maps_of_mean_and_truth_share_their_scale() -> None:
    rewards = np.random.default_rng(2).normal(size=(2, 50, 6))
    figure = drawn(plot_reward_posterior(rewards, 2, 3, truth=np.full(6, 7.0)))
    truth, mean, sd = (ax.images[0] for ax in figure.axes[:3])
    assert np.ravel(mean.get_array().data) == pytest.approx(rewards.reshape(100, 6).mean(axis=0))
    assert np.ravel(sd.get_array().data) == pytest.approx(rewards.reshape(100, 6).std(axis=0, ddof=1))
    assert truth.get_clim() == mean.get_clim() == (pytest.approx(mean.get_array().min()), 7.0)


def test_a_map_with_a_centre_diverges_from_it_as_far_to_both_sides() -> None:
    ax = Figure().subplots()
    plot_reward_map(ax, torch.arange(6.0, requires_grad=True) - 1.0, 2, 3, centre=1.0)
    assert ax.images[0].get_clim() == (-2.0, 4.0)
    assert ax.images[0].get_cmap().name == DIVERGING
    plot_reward_map(ax, np.zeros(6), 2, 3, centre=0.0)
    assert ax.images[1].get_clim() == (-1.0, 1.0)


def test_a_summary_shows_mean_sd_and_probability_without_walls() -> None:
    rewards, truth = draws(), np.linspace(-5.0, 2.0, 12)
    figure = plot_reward_summary(torch.from_numpy(rewards), SHAPE, truth=truth, walls=WALLS)
    is_legible(figure)
    assert grid(titled(figure, "truth")) == pytest.approx(hidden(truth), nan_ok=True)
    assert grid(titled(figure, "posterior mean")) == pytest.approx(hidden(rewards.mean(0)), nan_ok=True)
    assert grid(titled(figure, "posterior sd")) == pytest.approx(hidden(rewards.std(0, ddof=1)), nan_ok=True)
    above = titled(figure, "probability above 0")
    assert grid(above) == pytest.approx(hidden((rewards > 0).mean(0)), nan_ok=True)
    # White is no reward, and a probability of a half; truth and mean share their scale.
    assert titled(figure, "truth").images[0].get_clim() == (-5.0, 5.0)
    assert titled(figure, "posterior mean").images[0].get_clim() == (-5.0, 5.0)
    assert above.images[0].get_clim() == (0.0, 1.0)
    maps = {ax.get_title(): ax.images[0].get_cmap().name for ax in figure.axes if ax.get_title()}
    assert maps == {
        "truth": DIVERGING,
        "posterior mean": DIVERGING,
        "posterior sd": SEQUENTIAL,
        "probability above 0": DIVERGING,
    }
    assert [ax.get_ylabel() for ax in figure.axes[4:]] == ["reward (nats)"] * 2 + ["sd (nats)", "posterior probability"]


@pytest.mark.parametrize("count", [(4, 20, 12), (80, 12, 1), (4, 20, 12, 1)])
def test_draws_of_several_chains_and_with_an_action_of_their_own_are_draws(count: tuple[int, ...]) -> None:
    figures = [plot_reward_summary(x, SHAPE) for x in (draws(), draws().reshape(count))]
    one, other = (grid(titled(figure, "posterior sd")) for figure in figures)
    assert one == pytest.approx(other)


def test_relative_to_the_mean_a_constant_of_each_draw_is_invisible() -> None:
    rewards = draws()
    shifted = rewards + np.random.default_rng(4).normal(0.0, 9.0, size=(80, 1))
    shifted[:, WALL] += 100.0  # walls do not count in the mean
    figures = [plot_reward_summary(x, SHAPE, relative_to="mean", walls=WALLS) for x in (rewards, shifted)]
    for title in ("posterior mean", "posterior sd", "probability above map mean"):
        first, second = (grid(titled(figure, title)) for figure in figures)
        assert first == pytest.approx(second, nan_ok=True)
    assert np.nanmean(grid(titled(figures[0], "posterior mean"))) == pytest.approx(0.0, abs=1e-12)
    assert "reward less map mean (nats)" in words(figures[0])
    is_legible(figures[0])


def test_cells_are_marked_by_masks_pairs_numbers_or_demonstrations() -> None:
    figure = Figure()
    first, second = figure.subplots(1, 2)
    demos = pirl.Trajectories([[0, 1, 2], [1, 0]], [[3, 3], [2]])
    handles = mark_cells(first, SHAPE, walls=WALLS, terminals=torch.from_numpy(WALL), visited=demos)
    assert list(handles) == ["wall", "terminal", "demonstrated"]
    mark_cells(second, SHAPE, walls=[5, 11], terminals=[(1, 1), 11], visited=np.arange(12) < 3)
    for ax in (first, second):
        centres = {
            collection.get_label(): {tuple(path.get_extents().get_points().mean(0)) for path in collection.get_paths()}
            for collection in ax.collections
        }
        assert centres["wall"] == centres["terminal"] == {(1.0, 1.0), (3.0, 2.0)}
        assert {(round(x, 9), round(y, 9)) for x, y in centres["demonstrated"]} == {(0, 0), (1, 0), (2, 0)}
    assert mark_cells(first, SHAPE) == {}


@pytest.mark.parametrize("cell", [(3, 0), (0, -1), 12, -1])
def test_cells_beside_the_grid_are_refused_by_name(cell: Any) -> None:
    with pytest.raises(OptionError, match=r"terminals: cell .* is not on the grid of 3 x 4"):
        mark_cells(Figure().subplots(), SHAPE, terminals=[cell])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": np.zeros((5, 11))}, r"draws has shape \(5, 11\): expected .* 12"),
        ({"draws": np.zeros((5, 12, 2))}, "expected"),  # r(s, a) is not a map
        ({"draws": np.zeros(12)}, "expected"),
        ({"draws": np.zeros((1, 12))}, "one draw"),
        ({"draws": np.zeros((5, 13, 1))}, "expected"),
        ({"truth": np.zeros(11)}, "truth has 11 values"),
        ({"walls": np.zeros(11, dtype=bool)}, "mask of 11"),
    ],
)
def test_a_summary_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plot_reward_summary(**{"draws": draws(), "shape": SHAPE} | options)


def test_one_draw_has_no_sd_to_draw() -> None:
    with pytest.raises(OptionError, match="one draw"):
        plot_reward_posterior(np.zeros((1, 12)), *SHAPE)


def test_moves_are_those_of_gridworlds() -> None:
    mdp = gridworld(3, 3, slip=0.0, discount=0.9)
    table = mdp.transition.to_dense().reshape(9, 5, 9)
    for action, (down, right) in enumerate(GRIDWORLD_MOVES):
        assert table[4, action, 4 + 3 * down + right] == 1.0


def test_arrows_are_as_long_and_opaque_as_probable_and_staying_is_a_disc() -> None:
    policy = np.tile([0.5, 0.01, 0.0, 0.25, 0.24], (12, 1))
    policy[1] = [0.0, 0.0, 1.0, 0.0, 0.0]
    policy[[5, 11]] = np.nan  # nobody acts in a wall
    figure = new_figure(3.5, 3.2)
    ax = figure.subplots()
    plot_policy(ax, torch.from_numpy(policy), SHAPE, walls=WALLS, terminals=[(0, 3)], title="mean policy of 400 draws")
    is_legible(figure)
    (quiver,) = [artist for artist in ax.collections if hasattr(artist, "U")]
    length = np.hypot(quiver.U, quiver.V)
    probability = length / length.max()
    # Ten free cells, one of them terminal: eight with two arrows above the least probability, one with a single one.
    assert sorted(np.round(probability, 9)) == [0.25] * 8 + [0.5] * 8 + [1.0]
    assert len(set(map(tuple, np.round(quiver.XY, 2)))) == 17
    up, right, left = quiver.V < 0, quiver.U > 0, quiver.U < 0
    assert probability[up].tolist() == pytest.approx([0.5] * 8)
    assert probability[right].tolist() == pytest.approx([0.25] * 8)
    assert probability[left].tolist() == pytest.approx([1.0])
    opacity = quiver.get_facecolors()[:, 3]
    assert opacity == pytest.approx(0.25 + 0.75 * probability)
    # No arrow leaves its cell.
    ends = quiver.XY + np.stack([quiver.U, quiver.V], 1)
    assert np.abs(ends - np.round(quiver.XY)).max() < 0.5
    (discs,) = [artist for artist in ax.collections if artist is not quiver and artist.get_zorder() == 2.1]
    areas = [np.prod(path.get_extents().size) for path in discs.get_paths()]
    assert areas == pytest.approx([0.24 * 0.4**2] * 8)
    assert ax.get_title() == "mean policy of 400 draws"
    assert "probability 1, disc: stay" in words(figure)
    assert ax.get_ylim() == (2.5, -0.5)


def test_a_policy_over_a_map_leaves_the_map_and_its_title() -> None:
    figure = Figure(layout="constrained")
    ax = figure.subplots()
    plot_reward_map(ax, np.arange(12.0), *SHAPE, "values")
    plot_policy(ax, np.full((12, 4), 0.25), SHAPE)
    assert grid(ax).tolist() == list(range(12))
    assert ax.get_title() == "values"
    assert ax.get_xlim() == (-0.5, 3.5)
    is_legible(figure)
    assert "disc" not in words(figure)  # nobody can stay


def test_moves_of_other_actions_are_given() -> None:
    ax = Figure().subplots()
    plot_policy(ax, np.eye(12)[:, :3] * 0 + [0.0, 1.0, 0.0], SHAPE, moves=[(0, 0), (1, 1), (0, -1)])
    (quiver,) = [artist for artist in ax.collections if hasattr(artist, "U")]
    assert (quiver.U > 0).all()
    assert (quiver.V > 0).all()
    with pytest.raises(OptionError, match="3 actions: give moves"):
        plot_policy(ax, np.full((12, 3), 1 / 3), SHAPE)
    with pytest.raises(OptionError, match="4 actions: give moves"):
        plot_policy(ax, np.full((12, 4), 0.25), SHAPE, moves=[(0, 1)])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (np.full((12, 4), np.log(0.25)), "state 0 is not a distribution.*not their logarithms"),
        (np.full((12, 4), 0.2), "state 0 is not a distribution"),
        (np.full((2, 12, 4), 0.25), r"expected \[S, A\] with S = 12"),
        (np.full((11, 4), 0.25), r"expected \[S, A\] with S = 12"),
    ],
)
def test_what_is_not_a_policy_is_refused(policy: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidPolicyError, match=message):
        plot_policy(Figure().subplots(), policy, SHAPE)


def test_occupancies_share_a_scale_and_states_outside_the_interval_are_crossed() -> None:
    model = np.random.default_rng(5).uniform(1.0, 2.0, size=(200, 12))
    seen = np.full(12, 1.5)
    seen[[2, 5, 7]] = [3.0, 0.0, 0.5]  # 5 is a wall
    figure = plot_occupancy(torch.from_numpy(seen), model, SHAPE, walls=WALLS)
    is_legible(figure)
    left, middle, right = (
        titled(figure, title) for title in ("demonstrated", "model, mean of draws", "model $-$ demonstrated")
    )
    assert grid(left) == pytest.approx(hidden(seen), nan_ok=True)
    assert grid(middle) == pytest.approx(hidden(model.mean(0)), nan_ok=True)
    assert grid(right) == pytest.approx(hidden(model.mean(0) - seen), nan_ok=True)
    assert left.images[0].get_clim() == middle.images[0].get_clim() == (0.0, 3.0)
    low, high = right.images[0].get_clim()
    assert low == -high
    (crosses,) = right.lines
    assert sorted(zip(*crosses.get_data(), strict=True)) == [(2, 0), (3, 1)]
    assert "demonstrated outside the model's 90% interval" in words(figure)
    assert [ax.get_ylabel() for ax in figure.axes[3:]] == ["visits an episode"] * 3


def test_occupancies_without_draws_have_no_interval() -> None:
    figure = drawn(plot_occupancy(np.zeros(12), np.ones(12), SHAPE))
    assert "interval" not in words(figure)
    assert titled(figure, "model").images
    scatter = drawn(plot_occupancy(np.arange(5.0), np.ones(5)))
    assert "interval" not in words(scatter)


def test_occupancies_of_states_without_places_are_a_scatter_with_intervals() -> None:
    model = np.random.default_rng(6).gamma(2.0, size=(300, 7))
    seen = np.median(model, axis=0)
    seen[4] = 50.0
    figure = plot_occupancy(seen, model, level=0.5, unit="months a bus")
    is_legible(figure)
    (ax,) = figure.axes
    inside, outside = ax.containers
    low, median, high = np.quantile(model, [0.25, 0.5, 0.75], axis=0)
    rest = np.arange(7) != 4
    for container, chosen, color in ((inside, rest, BLUE), (outside, ~rest, ORANGE)):
        points, _, (bars,) = container.lines
        assert points.get_xdata() == pytest.approx(seen[chosen])
        assert points.get_ydata() == pytest.approx(median[chosen])
        assert to_hex(points.get_color()).upper() == color
        edges = np.array(bars.get_segments())[..., 1]
        assert edges == pytest.approx(np.stack([low, high], 1)[chosen])
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlabel() == "demonstrated (months a bus)"
    assert "50% interval" in words(figure)


def test_occupancies_of_other_states_are_refused() -> None:
    with pytest.raises(OptionError, match=r"expected \[S\] or \[D, S\] with S = 12"):
        plot_occupancy(np.zeros(12), np.zeros((5, 11)))
    with pytest.raises(OptionError, match="demonstrated has 12 values for 2 x 4"):
        plot_occupancy(np.zeros(12), np.zeros((5, 12)), (2, 4))
    with pytest.raises(OptionError, match=r"level is 1\.0"):
        plot_occupancy(np.zeros(12), np.zeros(12), level=1.0)
