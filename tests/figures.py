"""What tests of figures share: drawing for real, and what can be read in the result."""

from __future__ import annotations

import io
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.quiver import QuiverKey
from matplotlib.text import Text


def drawn(figure: Figure) -> Figure:
    """Really draw it: warnings of the layout are errors here."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in _texts(figure))


def is_legible(figure: Figure) -> None:
    """No text lies on another, or reaches beyond the figure."""
    figure.draw_without_rendering()
    shown = [text for text in _texts(figure) if text.get_text().strip()]
    for ax in figure.axes:
        shown = [text for text in shown if text not in _out_of_view(ax)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (first, one), (second, other) in combinations(boxes, 2):
        assert not one.padded(-0.5).overlaps(other.padded(-0.5)), f"{first!r} lies on {second!r}"


def _texts(figure: Figure) -> list[Text]:
    # The key of arrows does not list its text among its children.
    texts = [*figure.findobj(Text), *(key.text for key in figure.findobj(QuiverKey))]
    return [text for text in texts if text.get_visible()]


def _out_of_view(ax: Axes) -> list[Text]:
    hidden = []
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        margin = 1e-6 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - margin <= tick.get_loc() <= high + margin:
                hidden += [tick.label1, tick.label2]
    return hidden
