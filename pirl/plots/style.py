"""What all figures share: colours, the layout of a new figure, and arrays from whatever holds numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design (2008); their yellow is too light for lines on white and comes last.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
BLUE, ORANGE = OKABE_ITO[:2]

# A shape for each colour, so that figures survive printing in grey.
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "*")

# Sequential for amounts; diverging, from red over white to blue, for what has a centre.
SEQUENTIAL, DIVERGING = "viridis", "RdBu"

Numbers = ArrayLike | torch.Tensor | float | int
"""What :func:`as_array` reads."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches whose parts keep clear of each other.

    Not by pyplot: no window opens, and no backend is chosen for the user.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from pirl.plots.shown import ShownFigure

    return ShownFigure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))


def as_array(values: Numbers) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers as float64; tensors may be on any device, and need gradients."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)
