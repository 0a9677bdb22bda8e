"""Figures of posteriors, rewards, policies and comparisons; a function draws on given Axes, or returns a Figure.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; maps are perceptually uniform, or diverge
from a centre that means something. Nothing here opens a window or changes matplotlib's settings.
"""

from pirl.plots.comparison import calibration_table, plot_calibration, plot_comparison, plot_estimates
from pirl.plots.grids import mark_cells
from pirl.plots.maps import (
    plot_occupancy,
    plot_policy,
    plot_reward_map,
    plot_reward_posterior,
    plot_reward_summary,
)
from pirl.plots.posterior import plot_density, plot_forest, plot_joint, plot_posterior
from pirl.plots.studies import plot_ranks, plot_recovery
from pirl.plots.style import BLUE, OKABE_ITO, ORANGE

__all__ = [
    "BLUE",
    "OKABE_ITO",
    "ORANGE",
    "calibration_table",
    "mark_cells",
    "plot_calibration",
    "plot_comparison",
    "plot_density",
    "plot_estimates",
    "plot_forest",
    "plot_joint",
    "plot_occupancy",
    "plot_policy",
    "plot_posterior",
    "plot_ranks",
    "plot_recovery",
    "plot_reward_map",
    "plot_reward_posterior",
    "plot_reward_summary",
]
