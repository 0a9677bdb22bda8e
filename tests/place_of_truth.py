"""Where the truths of a study lie in their exact posteriors, and whether an engine's ranks are those of such places.

With u(t, y) = P(draw < t | y) of truth t and data y, the rank of t among M draws of the exact posterior has mean M u,
and is Binomial(M, u) if they are independent. Ranks alone vary by M^2 / 12 from data set to data set, and given u by
M / 6 in the mean: for M = 39 a dozen replicates then tell as much of an engine as two hundred.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.infer.datatree import replay_draws
from pirl.infer.engine import Draws
from pirl.quantities import quantities_at
from pirl.replicates import Study


def on_grid(
    study: Study, number: int, site: str, points: Float[Tensor, "G size"], step: float
) -> dict[str, np.ndarray]:
    """u of each test quantity, by its name, for the truth of a replicate: by the density at evenly spaced points.

    Args:
        site: the only latent site, whose support is the real vectors.
        points: as many of the posterior as matter, on a grid whose place is random.
        step: between neighbours; a point stands for the cell around it.
    """
    truth = study.draw(number)
    potential = study.potential(truth)
    both = Draws({site: torch.cat([truth.latent[site][None], points])[None]}, unconstrained=True)
    groups = replay_draws(potential, both, log_likelihood=False)
    flat = {group: {name: value[0] for name, value in values.items()} for group, values in groups.items()}
    weights = torch.softmax(flat["stats"]["lp"][1:], dim=0)
    found = {}
    for name, values in quantities_at(potential, flat, {}):
        if name == site:
            less = ((values[0] - values[1:]) / step + 0.5).clamp(0.0, 1.0)
        else:
            less = (values[1:] < values[0]).double() + 0.5 * (values[1:] == values[0]).double()
        found[name] = torch.tensordot(weights, less, dims=1).numpy()
    return found


def scores(
    ranks: Float[np.ndarray, "R Q"],
    u: Float[np.ndarray, "R Q"],
    num_draws: int,
    inflation: Float[np.ndarray, " R"] | float = 1.0,
) -> Float[np.ndarray, "2 Q"]:
    """Standard scores of location (above 0: ranks are too high, the posterior too low) and of width (too wide).

    Args:
        ranks: of R truths in Q quantities.
        u: their places in exact posteriors.
        num_draws: M.
        inflation: by how much draws that are not independent spread ranks, as a factor of the variance.
    """
    off = ranks - num_draws * u
    variance = num_draws * u * (1 - u) * np.broadcast_to(inflation, len(u))[:, None]
    # Of a posterior that is too wide, low ranks are moved up and high ones down.
    inwards = 0.5 - u
    found = [(off * weight).sum(0) / (variance * weight**2).sum(0) ** 0.5 for weight in (np.ones_like(u), inwards)]
    return np.stack(found)
