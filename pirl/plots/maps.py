"""What belongs to cells of a grid, or to states: rewards and how sure we are of them, policies, occupancies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from pirl.errors import InvalidPolicyError, OptionError
from pirl.plots.grids import (
    Cells,
    cell_mask,
    grid_axes,
    legend_below,
    mark_cells,
    row_of_maps,
    state_draws,
    state_values,
)
from pirl.plots.style import BLUE, DIVERGING, ORANGE, SEQUENTIAL, Numbers, as_array, new_figure
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Row and column step of each action of pirl.envs.gridworld: up, down, left, right, stay.
GRIDWORLD_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
# Where arrows begin and how long the longest is, in cells; and the least probability that is drawn.
_BEGIN, _REACH, _LEAST = 0.1, 0.37, 0.02


def plot_reward_map(
    ax: Axes,
    values: Numbers,
    rows: int,
    cols: int,
    title: str = "",
    limits: tuple[float, float] | None = None,
    label: str = "reward",
    centre: float | None = None,
) -> None:
    """Draw one number a cell of a grid ``[rows * cols]``, such as the mean or sd of a reward, with a colour bar.

    Args:
        values: NaN leaves a cell blank.
        limits: values at the ends of the colour scale, to make several maps comparable.
        label: of the colour bar; say the unit.
        centre: colours diverge from this value, as far to both sides: 0 for rewards whose sign means something.

    Raises:
        OptionError: there are more or fewer values than cells.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> rewards = pirl.reward_draws(posterior, model, demos, mdp, features)  # [D, S, A], the same for all actions
        >>> mean = rewards[..., 0].mean(0)
        >>> plot_reward_map(plt.subplots()[1], mean, 5, 5, "posterior mean", label="reward (nats)", centre=0.0)
    """
    values = as_array(values)
    if values.size != rows * cols:
        raise OptionError(f"{values.size} values for a map of {rows} x {cols} cells: expected {rows * cols}")
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    if centre is not None:
        reach = max(abs(high - centre), abs(centre - low)) or 1.0
        low, high = centre - reach, centre + reach
    colours = SEQUENTIAL if centre is None else DIVERGING
    image = ax.imshow(values.reshape(rows, cols), cmap=colours, vmin=low, vmax=high)
    ax.set(title=title)
    grid_axes(ax, rows, cols)
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)


def _refuse_one(draws: np.ndarray) -> None:
    if len(draws) < 2:
        raise OptionError("there is one draw only: an sd needs two, and a posterior many")


def plot_reward_posterior(
    rewards: Numbers, rows: int, cols: int, truth: Numbers | None = None, truth_label: str = "truth"
) -> Figure:
    """Draw maps of the posterior mean and sd of a state reward ``[draws, rows * cols]``, and of the truth if known.

    The mean and the truth share their colour scale. :func:`plot_reward_summary` says more.

    Raises:
        OptionError: there is one draw.

    Example:
        >>> rewards = pirl.reward_draws(posterior, model, demos, mdp, features)  # [D, S, A], the same for all actions
        >>> plot_reward_posterior(rewards[..., 0], 5, 5, truth=truth).savefig("reward.png")
    """
    rewards = as_array(rewards).reshape(-1, rows * cols)
    _refuse_one(rewards)
    mean = rewards.mean(axis=0)
    shared = mean if truth is None else np.concatenate([mean, as_array(truth).ravel()])
    limits = (float(shared.min()), float(shared.max()))
    panels = [("posterior mean", mean, limits, "reward"), ("posterior sd", rewards.std(axis=0, ddof=1), None, "sd")]
    if truth is not None:
        panels.insert(0, (truth_label, as_array(truth).ravel(), limits, "reward"))
    figure = new_figure(4.3 * len(panels), 3.9)
    for ax, (title, values, ends, name) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        plot_reward_map(ax, values, rows, cols, title, ends, name)
    return figure


def plot_reward_summary(
    draws: Numbers,
    shape: tuple[int, int],
    *,
    relative_to: Literal["zero", "mean"] = "zero",
    truth: Numbers | None = None,
    walls: Cells | None = None,
    terminals: Cells | None = None,
    visited: Cells | Trajectories | None = None,
    label: str = "reward",
    unit: str = "nats",
) -> Figure:
    """Draw what a posterior says of the reward of each cell: mean, sd, and how probably it is positive.

    Args:
        draws: r(s) ``[D, S]``, ``[D, S, 1]`` or ``[chain, draw, S]`` with ``S = rows * cols``.
        shape: (rows, columns) of the grid.
        relative_to: "zero", or "mean": every draw less its own mean over the cells that are not walls. Where the
            demonstrations do not tell a constant, only the latter says something.
        truth: ``[S]``, drawn first and on the scale of the mean.
        walls, terminals, visited: as for :func:`mark_cells`; walls are left out.
        label, unit: what the numbers are. Rewards of soft-optimal demonstrators are differences of log-odds: nats.

    Raises:
        OptionError: the draws do not fit the grid, are fewer than two, or ``relative_to`` is neither.

    Example:
        >>> rewards = pirl.reward_draws(posterior, model, demos, mdp, features)  # [D, S, A], the same for all actions
        >>> plot_reward_summary(rewards[..., 0], (5, 5), relative_to="mean", visited=demos).savefig("reward.pdf")
    """
    if relative_to not in ("zero", "mean"):
        raise OptionError(f"relative_to is {relative_to!r}: choose 'zero' or 'mean'")
    draws = state_draws(draws, shape, "draws")
    _refuse_one(draws)
    wall = cell_mask(walls, shape, "walls").ravel()

    def shown(values: Any) -> Any:
        values = values - values[..., ~wall].mean(-1, keepdims=True) if relative_to == "mean" else values
        return np.where(wall, np.nan, values)

    relative = shown(draws)
    mean = relative.mean(0)
    known = None if truth is None else shown(state_values(truth, shape, "truth"))
    reach = float(np.nanmax(np.abs(mean if known is None else [mean, known])))
    name, zero = (label, "0") if relative_to == "zero" else (f"{label} less map mean", "map mean")
    scale: dict[str, Any] = {"limits": (-reach, reach), "centre": 0.0, "label": f"{name} ({unit})"}
    above = np.where(wall, np.nan, (relative > 0).mean(0))
    panels: list[tuple[str, Any, dict[str, Any]]] = [
        ("posterior mean", mean, scale),
        ("posterior sd", relative.std(0, ddof=1), {"label": f"sd ({unit})"}),
        (f"probability above {zero}", above, {"limits": (0.0, 1.0), "centre": 0.5, "label": "posterior probability"}),
    ]
    if known is not None:
        panels.insert(0, ("truth", known, scale))
    figure, axes = row_of_maps(shape, len(panels))
    for ax, (title, values, options) in zip(axes, panels, strict=True):
        plot_reward_map(ax, values, *shape, title, **options)
        marks = mark_cells(ax, shape, walls, terminals, visited)
    legend_below(figure, marks)
    return figure


def plot_policy(
    ax: Axes,
    policy: Numbers,
    shape: tuple[int, int],
    moves: Sequence[tuple[int, int]] | None = None,
    *,
    walls: Cells | None = None,
    terminals: Cells | None = None,
    title: str = "",
    color: str = "black",
) -> None:
    """Draw pi(a|s) on a grid: an arrow for each action, as long and as opaque as it is probable; a disc for staying.

    Discs have an area proportional to the probability. May be drawn over a map (:func:`plot_reward_map`).

    Args:
        policy: probabilities ``[S, A]`` with ``S = rows * cols``, such as the mean policy of a posterior; one time of
            a policy ``[T, S, A]`` that depends on it.
        shape: (rows, columns) of the grid.
        moves: (row step, column step) of each action; by default those of :func:`pirl.envs.gridworld`.
        walls, terminals: as for :func:`mark_cells`. Nothing is drawn in them but the marks.

    Raises:
        InvalidPolicyError: wrong shape, or not a distribution over actions in every free cell.
        OptionError: there is not one move for each action.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> rewards = pirl.reward_draws(posterior, model, demos, mdp, features)
        >>> mean = pirl.policies.mean_policy(pirl.soft_policy(mdp, rewards))
        >>> plot_policy(plt.subplots()[1], mean.exp(), (5, 5), terminals=mdp.terminal)
    """
    rows, cols = shape
    policy = as_array(policy)
    if policy.ndim != 2 or len(policy) != rows * cols:
        raise InvalidPolicyError(
            f"the policy has shape {policy.shape}: expected [S, A] with S = {rows * cols}; of draws give their mean, "
            "of times one"
        )
    count = policy.shape[1]
    moves = GRIDWORLD_MOVES[:count] if moves is None and count in (4, 5) else moves
    if moves is None or len(moves) != count:
        raise OptionError(f"there are {count} actions: give moves, a (row step, column step) for each")
    free = ~(cell_mask(walls, shape, "walls") | cell_mask(terminals, shape, "terminals")).ravel()
    wrong = free & ~((policy >= 0).all(1) & np.isclose(policy.sum(1), 1.0, atol=1e-5))
    if wrong.any():
        raise InvalidPolicyError(
            f"the policy in state {int(wrong.argmax())} is not a distribution: give probabilities that sum to 1, "
            "not their logarithms"
        )
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Circle

    grid_axes(ax, rows, cols)
    ax.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal")
    ax.set_title(title or ax.get_title(), pad=22)  # above the key
    ax.set_xticks(np.arange(cols + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="0.85", linewidth=0.6)
    ax.tick_params(which="minor", length=0)
    mark_cells(ax, shape, walls, terminals)

    state, action = np.nonzero((policy >= _LEAST) & free[:, None])
    probability = policy[state, action]
    row, column = np.divmod(state, cols)
    down, right = np.array(moves)[action].T
    rests = (down == 0) & (right == 0)
    colours = np.tile(to_rgba(color), (len(state), 1))
    # The unlikely stay visible.
    colours[:, 3] = 0.25 + 0.75 * probability
    where = column[rests], row[rests], probability[rests]
    discs = [Circle((x, y), 0.2 * np.sqrt(p)) for x, y, p in zip(*where, strict=True)]
    ax.add_collection(PatchCollection(discs, facecolor=colours[rests], linewidth=0.0, zorder=2.1), autolim=False)
    step = np.stack([right, down])[:, ~rests]
    arrows = ax.quiver(
        *(np.stack([column, row])[:, ~rests] + _BEGIN * step), *(_REACH * probability[~rests] * step),
        color=colours[~rests], angles="xy", scale_units="xy", scale=1.0, units="xy", width=0.045, headwidth=3.6,
        headlength=3.6, headaxislength=3.2, minshaft=1.5, minlength=0.0, zorder=2.2,
    )  # fmt: skip
    words = "probability 1, disc: stay" if any(not any(move) for move in moves) else "probability 1"
    ax.quiverkey(arrows, 0.0, 1.03, _REACH, words, labelpos="E", color=color, fontproperties={"size": "small"})


def plot_occupancy(
    demonstrated: Numbers,
    model: Numbers,
    shape: tuple[int, int] | None = None,
    *,
    walls: Cells | None = None,
    terminals: Cells | None = None,
    level: float = 0.9,
    unit: str = "visits an episode",
) -> Figure:
    """Draw how often states are visited, by the demonstrators and by the model.

    On a grid two maps and their difference, else the one against the other. Where the model gives draws, states that
    lie outside their central interval are marked. That interval holds the uncertainty of the draws only: draw *visits
    of simulated episodes* (a posterior predictive), as many as were demonstrated, to include the demonstrations' own.

    Args:
        demonstrated: visits ``[S]``.
        model: expected or simulated visits ``[S]``, or draws of them ``[D, S]``.
        shape: (rows, columns) of a grid; None where states have no places.
        walls, terminals: as for :func:`mark_cells`.
        level: of the interval.
        unit: of what is counted.

    Raises:
        OptionError: the numbers of states differ.

    Example:
        >>> import numpy as np
        >>> visits = lambda states: np.bincount(states[states >= 0], minlength=25) / len(demos)
        >>> simulated = posterior["posterior_predictive"]["trajectories"].values[..., 0]  # [chain, draw, N, slots]
        >>> simulated = np.stack([visits(episodes) for episodes in simulated.reshape(-1, *simulated.shape[2:])])
        >>> figure = plot_occupancy(visits(demos.states), simulated, (5, 5))
    """
    if not 0 < level < 1:
        raise OptionError(f"level is {level}, but must be between 0 and 1")
    seen, draws = as_array(demonstrated).ravel(), as_array(model)
    if draws.ndim not in (1, 2) or draws.shape[-1] != len(seen):
        raise OptionError(f"the model has shape {draws.shape}: expected [S] or [D, S] with S = {len(seen)}")
    interval = np.quantile(np.atleast_2d(draws), [0.5 - level / 2, 0.5, 0.5 + level / 2], axis=0)
    low, _, high = interval
    outside = (draws.ndim == 2) & ((seen < low) | (seen > high))
    said = f"demonstrated outside the model's {100 * level:g}% interval"
    if shape is None:
        return _occupancy_scatter(seen, interval, outside, draws.ndim == 2, said, level, unit)
    middle = np.atleast_2d(draws).mean(0)
    wall = cell_mask(walls, shape, "walls").ravel()
    blank = lambda values: np.where(wall, np.nan, state_values(values, shape, "demonstrated"))  # noqa: E731
    seen, middle = blank(seen), blank(middle)
    limits = (0.0, float(np.nanmax([seen, middle])))
    figure, (left, centre, right) = row_of_maps(shape, 3)
    plot_reward_map(left, seen, *shape, "demonstrated", limits, unit)
    plot_reward_map(centre, middle, *shape, "model" if draws.ndim == 1 else "model, mean of draws", limits, unit)
    plot_reward_map(right, middle - seen, *shape, "model $-$ demonstrated", None, unit, 0.0)
    for ax in (left, centre, right):
        marks = mark_cells(ax, shape, walls, terminals)
    if (outside & ~wall).any():
        from matplotlib.lines import Line2D
        from matplotlib.patheffects import withStroke

        row, column = np.divmod(np.nonzero(outside & ~wall)[0], shape[1])
        right.plot(
            column, row, "x", color="black", label=said, path_effects=[withStroke(linewidth=3.0, foreground="white")]
        )
        marks[said] = Line2D([], [], marker="x", linestyle="", color="black")
    legend_below(figure, marks)
    return figure


def _occupancy_scatter(
    seen: Float[np.ndarray, " S"],
    interval: Float[np.ndarray, "3 S"],
    outside: Bool[np.ndarray, " S"],
    several: bool,
    said: str,
    level: float,
    unit: str,
) -> Figure:
    figure = new_figure(5.2, 5.2)
    ax = figure.subplots()
    low, median, high = interval
    name = f"median and {100 * level:g}% interval" if several else "state"
    for chosen, color, marker, label in ((~outside, BLUE, "o", name), (outside, ORANGE, "D", said)):
        if chosen.any():
            reach = np.stack([median - low, high - median])[:, chosen] if several else None
            ax.errorbar(
                seen[chosen], median[chosen], yerr=reach, fmt=marker, color=color, markersize=4.5, markeredgewidth=0,
                elinewidth=1.0, alpha=0.85, label=label,
            )  # fmt: skip
    largest = 1.05 * max(float(seen.max()), float(high.max())) or 1.0
    ax.plot([0, largest], [0, largest], "--", color="0.5", linewidth=1.0, zorder=0, label="as demonstrated")
    ax.set(xlim=(-0.02 * largest, largest), ylim=(-0.02 * largest, largest), aspect="equal")
    ax.set(xlabel=f"demonstrated ({unit})", ylabel=f"model ({unit})")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small")
    return figure
