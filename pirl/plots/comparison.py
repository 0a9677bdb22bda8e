"""Posteriors beside point estimates, predictions beside what happened, and the table of :func:`pirl.compare`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import HorizonError, InvalidPolicyError, InvalidTrajectoriesError, OptionError, UnavailableActionError
from pirl.plots.style import BLUE, MARKERS, OKABE_ITO, ORANGE, Numbers, as_array, new_figure
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = NormalDist().inv_cdf(0.95)  # of a 90% interval, in standard errors

# Of a reliability diagram, below 0: where the bars of counts stand, and how high the highest is.
_FLOOR, _STRIP = -0.22, 0.13

# ------------------------------------------------------------------------------------------------------------ estimates


def plot_estimates(
    ax: Axes,
    draws: Mapping[str, Numbers],
    estimates: Mapping[str, Mapping[str, Numbers]],
    errors: Mapping[str, Mapping[str, Numbers]] | None = None,
    truth: Mapping[str, Numbers] | None = None,
    label: str = "parameter",
) -> None:
    """Draw the posterior of each parameter beside point estimates of it, a row a parameter.

    The posterior has its median, 50% and 90% interval; estimates have the 90% interval of a normal distribution. Where
    a standard error is infinite, since the demonstrations say nothing, a dotted line runs from side to side. About 0.3
    inches of height a parameter are legible, for up to some 30 of them.

    Args:
        draws: by parameter, ``[D]``; or ``[D, *shape]``, which gives a row for each element.
        estimates: by method, then by parameter: a number, or ``[*shape]``. A method may lack parameters.
        errors: standard errors, likewise; a method or parameter without any has no interval.
        truth: by parameter.
        label: of the axis; say the unit.

    Raises:
        OptionError: an estimate, an error or a truth is of a parameter (or element) that has no draws.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> estimate = pirl.baselines.maxent(demos, mdp, features)
        >>> draws = posterior.posterior["weights"].values.reshape(-1, 3)
        >>> plot_estimates(plt.subplots()[1], {"weights": draws}, {"MaxEnt": estimate.parameters},
        ...                {"MaxEnt": estimate.standard_errors()}, label="weight (nats)")
    """
    from matplotlib.container import ErrorbarContainer
    from matplotlib.legend_handler import HandlerErrorbar
    from matplotlib.lines import Line2D

    errors = errors or {}
    if strange := set(errors) - set(estimates):
        raise OptionError(f"errors of {min(strange)!r}, which has no estimates: they are of {', '.join(estimates)}")
    rows = _elements(draws, first=1)
    if not rows:
        raise OptionError("there are no draws of any parameter")
    points = {name: _of_rows(values, rows, f"estimates of {name!r}") for name, values in estimates.items()}
    spread = {name: _of_rows(errors.get(name, {}), rows, f"errors of {name!r}") for name in estimates}
    known = _of_rows(truth or {}, rows, "truth")

    height = np.arange(len(rows))
    lanes = np.linspace(-0.36, 0.36, 2 * len(estimates) + 3)[1::2]  # middles of as many stripes of a row
    low, lower, median, upper, high = np.quantile(
        [values.ravel() for values in rows.values()], [0.05, 0.25, 0.5, 0.75, 0.95], axis=1
    )
    for row in height[1::2]:
        ax.axhspan(row - 0.5, row + 0.5, color="0.95", linewidth=0, zorder=0)
    at = height + lanes[0]
    thin = ax.hlines(at, low, high, color=BLUE, linewidth=1.2, label="90% interval")
    thick = ax.hlines(at, lower, upper, color=BLUE, linewidth=4, label="50% interval")
    (middle,) = ax.plot(median, at, "o", color="white", markeredgecolor=BLUE, markersize=5, label="median")
    handles: dict[str, Any] = {"posterior: median, 50% and 90% interval": (thin, thick, middle)}
    for number, name in enumerate(estimates):
        at, color = height + lanes[number + 1], OKABE_ITO[1 + number % 6]
        error = np.where(np.isfinite(spread[name]), spread[name], np.nan)
        has_errors = bool(np.isfinite(error).any())
        handles[f"{name}, 90% interval" if has_errors else name] = ax.errorbar(
            points[name], at, xerr=_WIDTH * error if has_errors else None, fmt=MARKERS[1 + number % 6], color=color,
            markersize=4.5, elinewidth=1.2, capsize=0, label=name,
        )  # fmt: skip
        for y in at[np.isinf(spread[name])]:
            ax.axhline(y, color=color, linestyle=":", linewidth=1.2, zorder=1)
    if known_rows := np.isfinite(known).nonzero()[0].tolist():
        ends = height[known_rows] - 0.45, height[known_rows] + 0.45
        ax.vlines(known[known_rows], *ends, color="black", linewidth=1.5, label="truth", zorder=1.5)
        handles["truth"] = Line2D([], [], color="black", marker="|", markersize=10, markeredgewidth=1.5, linestyle="")
    ax.axvline(0, color="0.7", linewidth=0.8, zorder=0.5)
    ax.set_yticks(height, list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(label)
    ax.tick_params(axis="y", length=0)
    ax.spines[["left", "top", "right"]].set_visible(False)
    ax.legend(
        list(handles.values()), list(handles), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False,
        fontsize="small", handler_map={ErrorbarContainer: HandlerErrorbar(xerr_size=1.1)},
    )  # fmt: skip


def _elements(values: Mapping[str, Numbers], first: int) -> dict[str, Float[np.ndarray, "*draws"]]:
    """A number, or its draws, for each element of each parameter; the first dimensions are draws."""
    elements = {}
    for name, given in values.items():
        array = as_array(given)
        for index in np.ndindex(array.shape[first:]):
            suffix = f"[{','.join(map(str, index))}]" if index else ""
            elements[f"{name}{suffix}"] = array[(..., *index)]
    return elements


def _of_rows(values: Mapping[str, Numbers], rows: Mapping[str, Any], what: str) -> Float[np.ndarray, " rows"]:
    """One number a row, NaN where there is none."""
    elements = _elements(values, first=0)
    if strange := [name for name in elements if name not in rows]:
        raise OptionError(f"{what} name {strange[0]!r}, of which there are no draws: draws are of {', '.join(rows)}")
    return np.array([float(elements.get(name, np.nan)) for name in rows])


# ---------------------------------------------------------------------------------------------------------- calibration


def calibration_table(
    log_policy: Float[Tensor, "*times S A"], demos: Trajectories, bins: int = 10, level: float = 0.9
) -> pandas.DataFrame:
    """How often actions were taken that a policy gives some probability.

    Each decision gives a prediction for every available action; those with a single one give none. Predictions are
    grouped by probability into bins of equal width. Intervals of the frequency are Clopper's and Pearson's (1934): they
    take predictions as independent. Those of one decision exclude each other, which makes the intervals wide; decisions
    of one demonstrator whose reward is uncertain go together, which makes them narrow.

    Args:
        log_policy: log pi(a|s) ``[S, A]``, or by time ``[T, S, A]`` as :func:`pirl.soft_policy` gives it; -inf where
            an action is not available. Of draws, the mean policy (:func:`pirl.policies.mean_policy`).
        demos: held out, best of all.
        bins: number of bins between 0 and 1.
        level: of the intervals.

    Returns:
        A row a bin: its edges ``lower`` and ``upper``, mean ``predicted`` probability, ``frequency`` of the actions,
        its interval from ``low`` to ``high``, and the ``count`` of predictions; NaN where there are none.

    Raises:
        OptionError: bins or level out of range.
        InvalidPolicyError: wrong shape, or not the logarithm of a distribution.
        InvalidTrajectoriesError: a state or action that the policy does not know.
        UnavailableActionError: an action was taken that the policy says is impossible.
        HorizonError: an episode is longer than the policy.

    Example:
        >>> table = calibration_table(pirl.soft_policy(mdp, truth), demos, bins=5)
        >>> list(table.columns), len(table)
        (['lower', 'upper', 'predicted', 'frequency', 'low', 'high', 'count'], 5)
    """
    import pandas
    from scipy.stats import beta

    if bins < 1 or not 0 < level < 1:
        raise OptionError(f"bins is {bins} and level {level}: expected at least 1 bin, and a level between 0 and 1")
    rows, chosen = _predictions(log_policy, demos)
    # A forced action says nothing.
    counted = rows.isfinite() & (rows.isfinite().sum(1, keepdim=True) > 1)
    probability = as_array(rows.exp()[counted])
    taken = as_array(torch.nn.functional.one_hot(chosen, rows.shape[1])[counted])

    place = (probability * bins).astype(int).clip(0, bins - 1)
    count, times = np.bincount(place, minlength=bins), np.bincount(place, taken, bins)
    with np.errstate(invalid="ignore"):
        predicted, frequency = np.bincount(place, probability, bins) / count, times / count
        # Where all or none were taken, one shape is 0 and the quantile NaN: that bound is the end.
        low = np.where(times > 0, beta.ppf(0.5 - level / 2, times, count - times + 1), 0.0)
        high = np.where(times < count, beta.ppf(0.5 + level / 2, times + 1, count - times), 1.0)
    edges = np.linspace(0, 1, bins + 1)
    empty = np.where(count > 0, 0.0, np.nan)
    return pandas.DataFrame(
        {
            "lower": edges[:-1], "upper": edges[1:], "predicted": predicted, "frequency": frequency,
            "low": low + empty, "high": high + empty, "count": count,
        }
    )  # fmt: skip


def _predictions(log_policy: Tensor, demos: Trajectories) -> tuple[Float[Tensor, "n A"], Tensor]:
    """log pi(.|s_t) at each decision, and the action that was taken ``[n]``."""
    if log_policy.dim() not in (2, 3):
        raise InvalidPolicyError(
            f"log_policy has shape {tuple(log_policy.shape)}: expected [S, A] or [T, S, A], of draws their mean"
        )
    episode, step = (demos.actions >= 0).nonzero(as_tuple=True)
    state, action = demos.states[episode, step], demos.actions[episode, step]
    *times, states, actions = log_policy.shape
    for name, numbers, size in (("state", state, states), ("action", action, actions)):
        if (bad := numbers >= size).any():
            raise InvalidTrajectoriesError(
                f"trajectory {int(episode[bad][0])}, step {int(step[bad][0])}: {name} {int(numbers[bad][0])}, but the "
                f"policy has {size}"
            )
    if times:
        # Who knows of an earlier end begins later in the policy.
        own = torch.full_like(demos.lengths, -1) if demos.horizons is None else demos.horizons
        time = step + torch.where(own < 0, 0, times[0] - own)[episode]
        if (bad := (time >= times[0]) | (time < 0)).any():
            raise HorizonError(
                f"trajectory {int(episode[bad][0])} needs more than the {times[0]} times that log_policy has"
            )
        rows = log_policy[time, state]
    else:
        rows = log_policy[state]
    if (bad := ~torch.isclose(rows.exp().sum(1), rows.new_ones(()), atol=1e-5)).any():
        raise InvalidPolicyError(f"log_policy of state {int(state[bad][0])} is not the logarithm of a distribution")
    if (bad := rows.gather(1, action.unsqueeze(1))[:, 0].isneginf()).any():
        raise UnavailableActionError(
            f"trajectory {int(episode[bad][0])}, step {int(step[bad][0])}: action {int(action[bad][0])} has "
            "probability 0: give a policy that may take every available action"
        )
    return rows, action


def plot_calibration(ax: Axes, tables: pandas.DataFrame | Mapping[str, pandas.DataFrame]) -> None:
    """Draw a reliability diagram: observed frequency against predicted probability, with numbers of predictions below.

    Points on the diagonal are calibrated; bars below the axis count the predictions of each bin.

    Args:
        tables: of :func:`calibration_table`; several by name, with the same bins.

    Raises:
        OptionError: a column is missing, or there is no table.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> estimate = pirl.baselines.maxent(demos[:20], mdp, features)
        >>> rewards = pirl.reward_draws(posterior, model, demos, mdp, features)
        >>> mean = pirl.policies.mean_policy(pirl.soft_policy(mdp, rewards))
        >>> plot_calibration(plt.subplots()[1], {"posterior": calibration_table(mean, demos),
        ...                                      "MaxEnt": calibration_table(estimate.log_policy, demos[20:])})
    """
    named = tables if isinstance(tables, Mapping) else {"": tables}
    if not named:
        raise OptionError("there is no table of a calibration to draw")
    most = max(int(table["count"].max()) for table in named.values() if _has(table, "count", "predicted", "frequency"))
    ax.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1.0, zorder=0, label="calibrated")
    tallest: list[float] = []
    for number, (name, table) in enumerate(named.items()):
        color = OKABE_ITO[number % 7]
        seen = table[table["count"] > 0]
        reach = np.stack([seen["frequency"] - seen["low"], seen["high"] - seen["frequency"]]).clip(0.0)
        ax.errorbar(
            seen["predicted"], seen["frequency"], yerr=reach, fmt=f"{MARKERS[number % 7]}-", color=color, markersize=5,
            linewidth=1.0, elinewidth=1.2, capsize=2, label=name or "observed, with interval",
        )  # fmt: skip
        width = 0.9 * (table["upper"] - table["lower"]) / len(named)
        left = table["lower"] + (table["upper"] - table["lower"]) * 0.05 + number * width
        ax.bar(
            left, _STRIP * table["count"] / max(most, 1), width, bottom=_FLOOR, align="edge", color=color, alpha=0.6,
            linewidth=0,
        )  # fmt: skip
        tallest = tallest or [x for x, y in zip(left + width / 2, table["count"], strict=True) if y == most][:1]
    if most:
        ax.text(tallest[0], _FLOOR + _STRIP + 0.01, f"{most:,}", ha="center", va="bottom", fontsize="x-small")
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xlim=(-0.02, 1.02), ylim=(_FLOOR, 1.02))
    ax.set(xlabel="predicted probability of an action", ylabel="observed frequency")
    ax.set_yticks([_FLOOR + _STRIP / 2, *np.linspace(0, 1, 6)], ["count", *(f"{y:.1f}" for y in np.linspace(0, 1, 6))])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", frameon=False, fontsize="small")


# ----------------------------------------------------------------------------------------------------------- comparison


def plot_comparison(table: pandas.DataFrame) -> Figure:
    """Draw the table of :func:`pirl.compare`: how well each answer predicts, and how well one acts on it.

    On the left the held-out log-likelihood a decision with its interval, with a broken line at the truth's; on the
    right, where there is one, the expected value difference. Rows of one posterior ("name: what is made of it") stand
    together below its name. An arrow to the left is minus infinity: the answer rules out what was done.

    Args:
        table: a row an answer, with columns ``log_likelihood`` and, as far as known, ``log_likelihood_low``,
            ``log_likelihood_high`` and ``evd``.

    Raises:
        OptionError: there is no column ``log_likelihood``, or no row.

    Example:
        >>> answers = {"MaxEnt": pirl.baselines.maxent(demos[:20], mdp, features),
        ...            "cloning": pirl.baselines.cloning(demos[:20], mdp)}
        >>> plot_comparison(pirl.compare(answers, demos[20:], mdp, truth=truth)).savefig("comparison.pdf")
    """
    _has(table, "log_likelihood")
    if not len(table):
        raise OptionError("the table is empty: there is nothing to compare")
    column = lambda name: (  # noqa: E731
        as_array(table[name]) if name in table else np.full(len(table), np.nan)
    )
    places, ticks, breaks = _places([str(name) for name in table.index])
    lost = column("evd")
    panels = 1 + bool(np.isfinite(lost).any())
    figure = new_figure(4.8 + 3.2 * (panels - 1) + 0.5, 1.3 + 0.28 * (len(ticks) + 0.4 * len(breaks)))
    axes = figure.subplots(1, panels, sharey=True, squeeze=False, width_ratios=(1.4, 1.0)[:panels])[0]
    colors = ["black" if n == "truth" else BLUE if ": " in n else ORANGE for n in map(str, table.index)]
    _log_likelihoods(
        axes[0], places, colors, column("log_likelihood"), column("log_likelihood_low"), column("log_likelihood_high")
    )
    if "truth" in table.index and np.isfinite(known := float(table["log_likelihood"]["truth"])):
        axes[0].axvline(known, color="black", linestyle="--", linewidth=1.0, zorder=0.5)
    if panels == 2:
        ax = axes[1]
        ax.hlines(places, 0.0, lost, color=colors, linewidth=1.2)
        ax.scatter(lost, places, color=colors, s=26, zorder=2)
        ax.axvline(0, color="0.7", linewidth=0.8, zorder=0.5)
        ax.set(xlabel="expected value difference\n(units of reward)", title="acting: less is better")
    for ax in axes:
        for y in breaks:
            ax.axhline(y, color="0.85", linewidth=0.8, zorder=0)
        ax.set_ylim(max(y for y, _, _ in ticks) + 0.6, min(y for y, _, _ in ticks) - 0.6)
        ax.tick_params(axis="y", length=0)
        ax.spines[["left", "top", "right"]].set_visible(False)
        ax.title.set_fontsize("medium")
    axes[0].set_yticks([y for y, _, _ in ticks], [text for _, text, _ in ticks])
    for text, (_, _, header) in zip(axes[0].get_yticklabels(), ticks, strict=True):
        text.set_fontweight("bold" if header else "normal")
    return figure


def _log_likelihoods(
    ax: Axes, places: list[float], colors: list[str], middle: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    finite = np.concatenate([x[np.isfinite(x)] for x in (middle, low, high)])
    left, right = (finite.min(), finite.max()) if len(finite) else (-1.0, 0.0)
    margin = 0.06 * (right - left) or 0.1
    left, right = left - 2 * margin, right + margin
    ax.hlines(places, np.where(np.isneginf(low), left, low), high, color=colors, linewidth=1.6)
    ax.scatter(middle, places, color=colors, s=26, zorder=2)
    for y, color, middle_, low_ in zip(places, colors, middle, low, strict=True):
        if np.isneginf([middle_, low_]).any():
            ax.plot(left + 0.2 * margin, y, "<", color=color, markersize=6)
        if np.isneginf(middle_):
            ax.annotate("$-\\infty$", (left, y), (12, 0), textcoords="offset points", va="center", fontsize="small")
    ax.set(xlim=(left, right), xlabel="held-out log-likelihood\na decision (nats)", title="predicting: more is better")


def _places(names: list[str]) -> tuple[list[float], list[tuple[float, str, bool]], list[float]]:
    """Height of each row; (height, text, whether it heads a group) of each label; heights between groups."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name.split(": ", 1)[0], []).append(number)
    places, breaks = [0.0] * len(names), []
    ticks: list[tuple[float, str, bool]] = []
    y = 0.0
    for group, members in groups.items():
        if ticks:
            breaks.append(y - 0.3)
            y += 0.4
        if len(members) > 1:
            ticks.append((y, group, True))
            y += 1.0
        for number in members:
            places[number] = y
            whole = names[number]
            ticks.append((y, whole.split(": ", 1)[-1] if len(members) > 1 else whole, False))
            y += 1.0
    return places, ticks, breaks


def _has(table: pandas.DataFrame, *columns: str) -> bool:
    for column in columns:
        if column not in table.columns:
            raise OptionError(f"the table has no column {column!r}; it has {', '.join(map(str, table.columns))}")
    return True
