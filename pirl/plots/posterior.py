"""Posteriors of parameters: densities, joint distributions, and forests of intervals."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from pirl.errors import OptionError, counted
from pirl.plots.style import BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Numbers that get a density each; more are drawn as a forest of intervals, up to where that is legible.
MOST_DENSITIES, MOST_INTERVALS = 6, 60


def plot_posterior(posterior: xarray.DataTree, reference: Mapping[str, Any] | None = None) -> Figure:
    """Draw the posterior of every parameter, with reference values where they are known.

    Up to six numbers get a density with median and 90% interval, and two of them their joint distribution as well;
    more are drawn as a forest of intervals. Parameters of more than 60 elements are left out: they belong on a map
    (:func:`pirl.plots.plot_reward_map`).

    Args:
        posterior: what :func:`pirl.fit` returned. The attribute ``long_name`` of a parameter labels its axis.
        reference: ``{"label": ..., "values": {name: ...}, "standard_errors": {name: ...}}``; by default what
            ``pirl fit`` kept in the posterior's attributes.

    Raises:
        OptionError: every parameter is too large.

    Example:
        >>> figure = plot_posterior(posterior, {"label": "truth", "values": {"weights": [2.0, -1.0, 0.0]}})
        >>> figure.savefig("weights.png")
    """
    if reference is None:
        reference = json.loads(posterior.attrs.get("reference", "null"))
    label = (reference or {}).get("label", "reference")
    quantities = _quantities(posterior["posterior"].to_dataset(), reference or {})
    count = len(quantities)
    if count == 0:
        raise OptionError(f"no parameter has at most {MOST_INTERVALS} elements: draw maps with plot_reward_map")
    if count > MOST_DENSITIES:
        figure = new_figure(7.0, 1.6 + 0.25 * count)
        plot_forest(
            figure.subplots(),
            {quantity.name: quantity.draws for quantity in quantities},
            {quantity.name: quantity.at for quantity in quantities if quantity.at is not None},
            label,
        )
    else:
        columns = 2 if count in (2, 4) else min(count, 3)
        rows = -(-count // columns)
        joint = count == 2
        figure = new_figure(9.5, 5.0) if joint else new_figure(4.2 * columns, 3.2 * rows)
        if joint:
            axes = figure.subplot_mosaic("AC;BC", width_ratios=(1, 1.15))
            panels = [axes["A"], axes["B"]]
            first, second = quantities
            at = None if first.at is None or second.at is None else (first.at, second.at)
            plot_joint(axes["C"], first.draws, second.draws, at, label)
            axes["C"].set(xlabel=first.label, ylabel=second.label)
        else:
            panels = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
        for ax, quantity in zip(panels, quantities, strict=True):
            plot_density(ax, quantity.draws, quantity.at, quantity.error, label)
            ax.set_xlabel(quantity.label)
        handles, labels = panels[0].get_legend_handles_labels()
        beside = len(labels) if columns > 1 else 2
        figure.legend(handles, labels, loc="outside lower center", ncols=beside, frameon=False)
    figure.suptitle(_title(posterior), fontsize="medium")
    return figure


def plot_density(
    ax: Axes, draws: ArrayLike, reference: float | None = None, error: float | None = None, label: str = "reference"
) -> None:
    """Draw the density of one parameter, its median and 90% interval, and a reference value with its standard error.

    Draws that are all the same, as those of a point estimate, are a line.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> plot_density(plt.subplots()[1], posterior.posterior["weights"].values[..., 0], reference=2.0, label="truth")
    """
    from arviz_stats.base import array_stats

    draws = np.asarray(draws).ravel()
    low, median, high = np.quantile(draws, [0.05, 0.5, 0.95])
    if np.ptp(draws) > 0:
        place, density, _ = array_stats.kde(draws)
        ax.plot(place, density, color=BLUE, label="posterior density")
        inside = (place >= low) & (place <= high)
        ax.fill_between(place, density, where=inside, color=BLUE, alpha=0.2, label="90% interval")
        ax.vlines(median, 0, np.interp(median, place, density), color=BLUE, linestyle=":", label="median")
        ax.set_title(f"median {median:.3g}, 90% from {low:.3g} to {high:.3g}", fontsize="medium")
    else:  # a point estimate, which has no density
        density = np.ones(1)
        ax.vlines(median, 0, 1, color=BLUE, label="every draw")
        ax.set_title(f"every draw is {median:.3g}", fontsize="medium")
    if reference is not None:
        name = label if error is None else f"{label} $\\pm$ standard error"
        # Below the curve, so that it hides nothing; the axis reaches down for it.
        ax.errorbar(
            reference, -0.07 * density.max(), xerr=error, fmt="D", color=ORANGE, markersize=5, capsize=3, label=name
        )
    ax.set_ylim(-0.14 * density.max(), 1.08 * density.max())
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set_yticks([])
    ax.spines[["left", "top", "right"]].set_visible(False)


def plot_joint(
    ax: Axes,
    first: ArrayLike,
    second: ArrayLike,
    reference: tuple[float, float] | None = None,
    label: str = "reference",
) -> None:
    """Scatter the draws of two parameters against each other, with a reference point and their correlation.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> draws = posterior.posterior["weights"].values.reshape(-1, 3)
        >>> plot_joint(plt.subplots()[1], draws[:, 0], draws[:, 1], reference=(2.0, -1.0), label="truth")
    """
    first, second = np.asarray(first).ravel(), np.asarray(second).ravel()
    some = np.linspace(0, len(first) - 1, min(len(first), 2000)).astype(int)
    ax.scatter(first[some], second[some], s=5, color=BLUE, alpha=0.3, linewidths=0, rasterized=True)
    if reference is not None:
        ax.plot(*reference, "D", color=ORANGE, markersize=7, markeredgecolor="white", label=label)
    varies = np.ptp(first) > 0 and np.ptp(second) > 0
    correlation = f", correlation {np.corrcoef(first, second)[0, 1]:.2f}" if varies else ""
    ax.set_title(f"{counted(len(some), 'draw')}{correlation}", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)


def plot_forest(
    ax: Axes, draws: Mapping[str, ArrayLike], reference: Mapping[str, float] | None = None, label: str = "reference"
) -> None:
    """Draw the median, 50% and 90% interval of many numbers below each other, with reference values by name.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> draws = posterior.posterior["weights"].values.reshape(-1, 3)
        >>> plot_forest(plt.subplots()[1], {name: draws[:, i] for i, name in enumerate("abc")}, reference={"a": 2.0})
    """
    height = np.arange(len(draws))
    low, lower, median, upper, high = np.quantile(
        [np.asarray(values).ravel() for values in draws.values()], [0.05, 0.25, 0.5, 0.75, 0.95], axis=1
    )
    ax.hlines(height, low, high, color=BLUE, linewidth=1.2, label="90% interval")
    ax.hlines(height, lower, upper, color=BLUE, linewidth=4, label="50% interval")
    ax.plot(median, height, "o", color="white", markeredgecolor=BLUE, markersize=5, label="median")
    reference = reference or {}
    known = [(reference[name], at) for name, at in zip(draws, height, strict=True) if name in reference]
    if known:
        ax.plot(*zip(*known, strict=True), "D", color=ORANGE, markersize=5, label=label)
    ax.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set_yticks(height, list(draws))
    ax.set_ylim(len(draws) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines[["left", "top", "right"]].set_visible(False)
    # Above the rows: a forest has no free corner.
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize="small")


@dataclass(frozen=True)
class _Quantity:
    """One number of the posterior: a scalar parameter, or an element of a larger one."""

    name: str
    label: str
    draws: Float[np.ndarray, "chain draw"]
    at: float | None
    error: float | None


def _quantities(posterior: xarray.Dataset, reference: Mapping[str, Any]) -> list[_Quantity]:
    quantities = []
    for name, data in posterior.data_vars.items():
        shape = data.shape[2:]
        if np.prod(shape) > MOST_INTERVALS:
            continue
        known = [reference.get(key, {}).get(name) for key in ("values", "standard_errors")]
        known = [None if numbers is None else np.broadcast_to(numbers, shape) for numbers in known]
        for index in np.ndindex(shape):
            element = ",".join(str(data[dim].values[i]) for dim, i in zip(data.dims[2:], index, strict=True))
            at, error = (None if numbers is None else float(numbers[index]) for numbers in known)
            suffix = f"[{element}]" if element else ""
            label = data.attrs.get("long_name", name) + (f" {suffix}" if suffix else "")
            quantities.append(_Quantity(f"{name}{suffix}", label, data.values[(..., *index)], at, error))
    return quantities


def _title(posterior: xarray.DataTree) -> str:
    attrs, sizes = posterior.attrs, posterior["posterior"].sizes
    options = json.loads(attrs.get("options", "{}")).items()
    words = [attrs.get("model", "model"), *(f"{key}={value}" for key, value in options if value is not None)]
    run = f"{' '.join(words)}: {attrs.get('engine', 'engine unknown')}, {sizes['chain'] * sizes['draw']:,} draws"
    return "\n".join([attrs.get("title", "Posterior"), *textwrap.wrap(run, 80)])
