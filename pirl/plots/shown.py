"""The figure that all plots are drawn on."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that a notebook shows, as matplotlib's own do only where ``matplotlib.pyplot`` is imported.

    Where it is, IPython asks its own printer of figures, and not this one.
    """

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
