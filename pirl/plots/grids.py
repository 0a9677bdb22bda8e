"""Cells of a grid: which are meant, how they are marked, and the axes and figures of maps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from pirl.errors import OptionError
from pirl.plots.style import as_array, new_figure
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = ArrayLike | Iterable[tuple[int, int]]
"""A mask ``[S]``, or cells as (row, column) or state numbers."""


def mark_cells(
    ax: Axes,
    shape: tuple[int, int],
    walls: Cells | None = None,
    terminals: Cells | None = None,
    visited: Cells | Trajectories | None = None,
) -> dict[str, Artist]:
    """Mark cells of a map: walls hatched, terminal cells framed, demonstrated ones with a dot.

    Args:
        shape: (rows, columns) of the grid.
        walls, terminals: mask ``[S]``, or cells as (row, column) or state numbers.
        visited: likewise, or the demonstrations themselves.

    Returns:
        What a legend needs, by name: ``figure.legend(marks.values(), marks.keys())``.

    Raises:
        OptionError: a cell is not on the grid.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = plt.subplots()[1]
        >>> list(mark_cells(ax, (4, 4), walls=[(1, 1)], terminals=[15], visited=walks))
        ['wall', 'terminal', 'demonstrated']
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Patch, Rectangle
    from matplotlib.patheffects import withStroke

    if isinstance(visited, Trajectories):
        visited = np.unique(visited.states[visited.states >= 0].cpu().numpy())
    corner = lambda cells, inset: [  # noqa: E731
        Rectangle((column - 0.5 + inset, row - 0.5 + inset), 1 - 2 * inset, 1 - 2 * inset)
        for row, column in np.argwhere(cells)
    ]
    handles: dict[str, Artist] = {}
    if (cells := cell_mask(walls, shape, "walls")).any():
        style: dict[str, Any] = {"facecolor": "0.85", "edgecolor": "0.6", "hatch": "////", "linewidth": 0.0}
        ax.add_collection(PatchCollection(corner(cells, 0.0), zorder=1.5, label="wall", **style), autolim=False)
        handles["wall"] = Patch(**style)
    # Black within white is seen on every colour.
    if (cells := cell_mask(terminals, shape, "terminals")).any():
        style = {"facecolor": "none", "edgecolor": "black", "linewidth": 1.8}
        frames = PatchCollection(corner(cells, 0.06), zorder=1.6, label="terminal", **style)
        frames.set_path_effects([withStroke(linewidth=3.6, foreground="white")])
        ax.add_collection(frames, autolim=False)
        handles["terminal"] = Patch(**style)
    if (cells := cell_mask(visited, shape, "visited")).any():
        dots = [Circle((column, row), 0.11) for row, column in np.argwhere(cells)]
        style = {"facecolor": "black", "edgecolor": "white", "linewidth": 0.8}
        ax.add_collection(PatchCollection(dots, zorder=1.7, label="demonstrated", **style), autolim=False)
        handles["demonstrated"] = Line2D(
            [], [], marker="o", linestyle="", color="black", markeredgecolor="white", markersize=6
        )
    return handles


def grid_axes(ax: Axes, rows: int, cols: int) -> None:
    """Name rows and columns."""
    ax.set(xlabel="column", ylabel="row")
    # Whole numbers only, and not too many.
    ax.set_xticks(np.arange(0, cols, -(-cols // 10)))
    ax.set_yticks(np.arange(0, rows, -(-rows // 10)))


def row_of_maps(shape: tuple[int, int], count: int) -> tuple[Figure, Any]:
    """A figure of so many maps beside each other, and their Axes."""
    rows, cols = shape
    # Cells are squares: a flat grid gets a flat figure.
    figure = new_figure(4.3 * count, float(np.clip(3.1 * rows / cols + 1.4, 2.5, 8.0)))
    return figure, figure.subplots(1, count)


def legend_below(figure: Figure, marks: dict[str, Artist]) -> None:
    """Say what the marks of :func:`mark_cells` are, if there are any."""
    if marks:
        figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=len(marks), frameon=False)


def state_values(values: Any, shape: tuple[int, int], name: str) -> Float[np.ndarray, " S"]:
    """One number a cell."""
    values = as_array(values).ravel()
    if len(values) != shape[0] * shape[1]:
        raise OptionError(f"{name} has {len(values)} values for {shape[0]} x {shape[1]} cells")
    return values


def state_draws(draws: Any, shape: tuple[int, int], name: str) -> Float[np.ndarray, "D S"]:
    """Draws of one number a cell, of several chains and with an action dimension of 1 as well."""
    draws, states = as_array(draws), shape[0] * shape[1]
    draws = draws[..., 0] if draws.ndim > 2 and draws.shape[-1] == 1 and draws.shape[-2] == states else draws
    if draws.ndim < 2 or draws.shape[-1] != states:
        raise OptionError(
            f"{name} has shape {draws.shape}: expected r(s) as [D, S] or [D, S, 1] with S = {shape[0]} x {shape[1]} = "
            f"{states}"
        )
    return draws.reshape(-1, states)


def cell_mask(cells: Any, shape: tuple[int, int], name: str) -> Bool[np.ndarray, "rows cols"]:
    """Which cells are meant, by a mask, by pairs (row, column) or by numbers."""
    rows, cols = shape
    found = np.zeros(rows * cols, dtype=bool)
    listed = [] if cells is None else list(cells.flatten().tolist() if _is_mask(cells) else cells)
    if listed and all(isinstance(cell, bool) for cell in listed):
        if len(listed) != len(found):
            raise OptionError(f"{name} is a mask of {len(listed)} states for {rows} x {cols} cells")
        return np.array(listed).reshape(shape)
    for cell in listed:
        row, column = cell if np.ndim(cell) else divmod(int(cell), cols)
        if not (0 <= row < rows and 0 <= column < cols):
            raise OptionError(f"{name}: cell {cell} is not on the grid of {rows} x {cols}")
        found[row * cols + column] = True
    return found.reshape(shape)


def _is_mask(cells: Any) -> bool:
    return str(getattr(cells, "dtype", "")) in ("bool", "torch.bool")
