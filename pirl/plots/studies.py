"""Calibration studies: how ranks of the truth are distributed, and how well the truth is recovered."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from pirl.convergence import element_names
from pirl.errors import OptionError, counted
from pirl.plots.style import BLUE, ORANGE, new_figure
from pirl.quantities import LOG_LIKELIHOOD
from pirl.replicates import check_study
from pirl.uniformity import band, holm, p_values, shares_below

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 24


def plot_ranks(study: xarray.DataTree, level: float = 0.95, names: Sequence[str] | None = None) -> Figure:
    """Draw how far the ranks of each test quantity are from uniform, and how far they may be.

    A panel a quantity: by how much the share of replicates whose truth lies below a share of the posterior exceeds that
    share, with the band that holds all lines of a sound study with probability ``level``, those not drawn included.
    Where some leave it, it is as wide as the others need (Holm 1979), so that those leave it that
    :func:`pirl.verdicts` names. A line above 0 on the left and below 0 on the right is a posterior too narrow;
    the reverse, too wide; above 0 throughout, too high; below, too low. Lines that leave their band are orange,
    with dots where they do.

    Args:
        study: what :func:`pirl.calibrate` returned.
        level: of the band.
        names: the quantities to draw, or elements of them (``"weights"``, ``"weights[food]"``); None: all.

    A notebook shows the figure where the call ends a cell; a script writes it by ``savefig``.

    Raises:
        OptionError: there are more than 24 elements: give ``names=``.

    Example:
        >>> study = pirl.calibrate(model, demos[:5], mdp, features, engine="laplace", num_replicates=4, num_draws=9)
        >>> plot_ranks(study).savefig("ranks.png")
    """
    if not 0 < level < 1:
        raise OptionError(f"level is {level}, but must be between 0 and 1")
    every, num_draws = _elements(study, "ranks"), int(study.attrs["num_draws"])
    ranks, p = _few(every, names), _p_values(study, every)
    leaves = dict(zip(p, holm(np.array(list(p.values()))) < 1 - level, strict=True))
    some = next(iter(ranks.values()))
    inside = band(len(some), num_draws, 1 - (1 - level) / max(len(leaves) - sum(leaves.values()), 1))
    figure, panels = _panels(list(ranks))
    for ax, (name, rank) in zip(panels, ranks.items(), strict=True):
        share = shares_below(rank.astype(int), num_draws)
        out = bool(leaves[name])
        lower, upper = inside.lower - inside.grid, inside.upper - inside.grid
        ax.fill_between(inside.grid, lower, upper, color="0.85", linewidth=0, label=f"{level:.0%} band")
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.plot(inside.grid, share - inside.grid, color=ORANGE if out else BLUE, linewidth=1.5)
        if out:
            there = (share < inside.lower) | (share > inside.upper)
            ax.plot(inside.grid[there], (share - inside.grid)[there], "o", color=ORANGE, markersize=4)
        ax.set_title(name + (" (leaves the band)" if out else ""), fontsize="medium")
        ax.set_xlabel("rank of the truth, as a share of draws")
        ax.set_ylabel("share of replicates below,\nminus expected")
    key = f"grey: lines of {level:.0%} of sound studies; above 0: truths are lower than the posterior says"
    _set_title(figure, study, f"; {key}, below 0: higher")
    return figure


def plot_recovery(study: xarray.DataTree, names: Sequence[str] | None = None) -> Figure:
    """Draw what the posterior says against the truth, for each parameter: mean and 90% interval a replicate.

    On the diagonal the truth is recovered. Orange intervals miss it, which one in ten should (more, of fewer than 19
    draws, which have no such quantiles). What the data do not tell lies flat, at the mean of the prior.

    Args:
        study: what :func:`pirl.calibrate` returned.
        names: the quantities to draw, or elements of them; None: all.

    Raises:
        OptionError: there are more than 24 elements: give ``names=``.

    Example:
        >>> study = pirl.calibrate(model, demos[:5], mdp, features, engine="laplace", num_replicates=4, num_draws=9)
        >>> plot_recovery(study).savefig("recovery.png")
    """
    truths = _few(_elements(study, "prior"), names)
    truths.pop(LOG_LIKELIHOOD, None)
    recovery = {name: _elements(study, "recovery", name) for name in ("mean", "q5", "q95")}
    figure, panels = _panels(list(truths))
    for ax, (name, truth) in zip(panels, truths.items(), strict=True):
        low, high = recovery["q5"][name], recovery["q95"][name]
        missed = (truth < low) | (truth > high)
        for some, color in ((~missed, BLUE), (missed, ORANGE)):
            ax.vlines(truth[some], low[some], high[some], color=color, linewidth=0.8, alpha=0.4)
            ax.plot(truth[some], recovery["mean"][name][some], "o", color=color, markersize=3, linestyle="none")
        ends = [min(truth.min(), low.min()), max(truth.max(), high.max())]
        ax.plot(ends, ends, color="0.5", linewidth=0.8, zorder=0)
        flat = truth.std() == 0 or recovery["mean"][name].std() == 0
        r = np.nan if flat else np.corrcoef(truth, recovery["mean"][name])[0, 1]
        ax.set_title(f"{name} (r = {r:.2f})", fontsize="medium")
        ax.set_xlabel("truth")
        ax.set_ylabel("posterior mean\nand 90% interval")
    missing = max(0.1, 2 / (int(study.attrs["num_draws"]) + 1))  # few draws have no such quantiles
    _set_title(figure, study, f"; orange: the interval misses the truth, as {missing:.0%} should")
    return figure


def least_uniform(study: xarray.DataTree) -> list[str]:
    """The names of as many elements as there are panels for, those with the smallest p-values, in their order."""
    every = _elements(study, "ranks")
    if len(every) <= MOST_PANELS:
        return list(every)
    p = _p_values(study, every)
    kept = set(sorted(p, key=lambda name: p[name])[:MOST_PANELS])
    return [name for name in every if name in kept]


def _p_values(study: xarray.DataTree, ranks: dict[str, np.ndarray]) -> dict[str, float]:
    """Of the hypothesis that ranks are uniform, by element."""
    return {name: float(p_values(rank.astype(int), int(study.attrs["num_draws"]))) for name, rank in ranks.items()}


def _elements(study: xarray.DataTree, group: str, summary: str | None = None) -> dict[str, Float[np.ndarray, " R"]]:
    """Each element of each quantity by its name, of the replicates that did not fail."""
    check_study(study)
    lived = ~np.asarray(study["sample_stats"]["failed"].values, dtype=bool)[0]
    found: dict[str, np.ndarray] = {}
    for data in study[group].to_dataset().data_vars.values():
        chosen = data if summary is None else data.sel(summary=summary)
        values = chosen.values[0][lived].reshape(int(lived.sum()), -1)
        found |= dict(zip(element_names(chosen), values.T, strict=True))
    return found


def _few(elements: dict[str, np.ndarray], names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Those that are to be drawn, as many as there is room for."""
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        known = {name: [key for key in elements if name in (key, key.partition("[")[0])] for name in names}
        if unknown := [name for name, keys in known.items() if not keys]:
            raise OptionError(f"names has {unknown[0]!r}, which is not in the study: it has {', '.join(elements)}")
        elements = {key: elements[key] for keys in known.values() for key in keys}
    if len(elements) > MOST_PANELS:
        raise OptionError(
            f"there are {len(elements)} elements for {MOST_PANELS} panels at most: give names=, or see pirl.verdicts"
        )
    return elements


def _panels(names: list[str]) -> tuple[Figure, list[Axes]]:
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = new_figure(3.6 * columns + 0.4, 2.8 * rows + 0.6)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(len(names))]


def _set_title(figure: Figure, study: xarray.DataTree, more: str = "") -> None:
    """What was studied and how, in lines that the figure has room for."""
    many = counted(int(study.attrs["num_replicates"]), "replicate")
    lines = [study.attrs.get("title", study.attrs["model"]), f"{many}, engine {study.attrs['engine']}{more}"]
    letters = int(12 * figure.get_figwidth())
    figure.suptitle("\n".join(part for line in lines for part in textwrap.wrap(line, letters)), fontsize="medium")
