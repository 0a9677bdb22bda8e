"""Exact posteriors of the bus model, of as many data sets as one likes: the oracle of its engines and of its studies.

There are two costs, and the months in which a choice was made stay what they are: how every choice is made at each
point of a grid of costs is computed once, and the posterior given any choices is then one product of matrices.
What the places of truths in them tell of engines, see :mod:`tests.place_of_truth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import pirl
from models import bus_engine
from pirl.replicates import Study, Truth
from pirl.setting import Setting

NAMES = ("RC", "theta11")
QUANTITIES = (*NAMES, "log_likelihood")
"""Of a study of the bus, in this order."""


class BusGrid:
    """Posteriors on ``size`` x ``size`` cells that fill the prior.

    Args:
        arguments: of the model, as ``bus_engine.load`` returns them.
        size: cells in each direction.
    """

    def __init__(self, arguments: Mapping[str, Any], size: int) -> None:
        self.arguments = arguments
        self.months: Float[Tensor, " S"] = arguments["months"].sum(dim=0)
        even = torch.linspace(0.0, 1.0, size + 1, dtype=torch.float64)
        # Where running costs little its posterior is narrow: there cells are a third as wide as at the other end.
        shares = {"RC": even, "theta11": (even + even**2) / 2}
        bounds = arguments["bounds"]
        self.edges = {name: bounds[name][0] + (bounds[name][1] - bounds[name][0]) * shares[name] for name in NAMES}
        self.centres = {name: (edges[1:] + edges[:-1]) / 2 for name, edges in self.edges.items()}
        self.area = torch.outer(*(edges.diff() for edges in self.edges.values()))
        rows = [self._log_odds(cost.expand(size), self.centres["theta11"]) for cost in self.centres["RC"]]
        self.log_odds = torch.stack(rows)
        # log(1 + odds), once for each choice: they were made in the same months in all data sets.
        self.log_normaliser = torch.nn.functional.softplus(self.log_odds) @ self.months

    def _log_odds(self, replacement_cost: Tensor, theta11: Tensor) -> Float[Tensor, "*batch S"]:
        log_policy = pirl.soft_policy(self.arguments["mdp"], bus_engine.costs(replacement_cost, theta11))
        return log_policy[..., 1] - log_policy[..., 0]

    def log_likelihood(self, replaced: Float[Tensor, "bus S"]) -> Float[Tensor, "RC theta11"]:
        """Log-likelihood of choices at the centre of each cell."""
        return self.log_odds @ replaced.sum(dim=0) - self.log_normaliser

    def posterior(self, log_likelihood: Float[Tensor, "RC theta11"]) -> Float[Tensor, "RC theta11"]:
        """Probability of each cell."""
        return torch.softmax((log_likelihood + self.area.log()).flatten(), dim=0).reshape(self.area.shape)

    def place(self, truth: Truth) -> Float[np.ndarray, "3"]:
        """u of each of ``QUANTITIES``: the posterior probability of less than the truth."""
        replaced = truth.data["replaced"]
        log_likelihood = self.log_likelihood(replaced)
        cells = self.posterior(log_likelihood)
        log_odds = self._log_odds(*(truth.latent[name] for name in NAMES))
        at_truth = log_odds @ replaced.sum(dim=0) - torch.nn.functional.softplus(log_odds) @ self.months
        costs = [
            np.interp(float(truth.latent[name]), self.edges[name].numpy(), self._at_edges(cells, name))
            for name in NAMES
        ]
        return np.array([*costs, cells[log_likelihood < at_truth].sum().item()]).clip(0.0, 1.0)

    def quantiles(self, cells: Float[Tensor, "RC theta11"], name: str, levels: Sequence[float]) -> np.ndarray:
        """Quantiles of a cost."""
        return np.interp(levels, self._at_edges(cells, name), self.edges[name].numpy())

    def moments(self, cells: Float[Tensor, "RC theta11"]) -> tuple[dict[str, dict[str, float]], float]:
        """Mean and sd of each cost, and their correlation."""
        centred, figures = [], {}
        for axis, (name, x) in enumerate(self.centres.items()):
            marginal = cells.sum(dim=1 - axis)
            mean = marginal @ x
            centred.append(x - mean)
            figures[name] = {"mean": mean.item(), "sd": (marginal @ (x - mean) ** 2).sqrt().item()}
        covariance = centred[0] @ cells @ centred[1]
        return figures, covariance.item() / (figures["RC"]["sd"] * figures["theta11"]["sd"])

    def _at_edges(self, cells: Tensor, name: str) -> np.ndarray:
        """Probability below each edge: within a cell it is spread evenly."""
        marginal = cells.sum(dim=1 - NAMES.index(name))
        return torch.cat([torch.zeros(1, dtype=cells.dtype), marginal.cumsum(0)]).numpy()


def places_of_truths(grid: BusGrid, seed: int, count: int) -> Float[np.ndarray, "R 3"]:
    """u of the first truths of a study with this seed, which are uniform if it draws truths and data as it says."""
    setting = Setting.of((), grid.arguments)
    with setting.entered():
        study = Study(bus_engine.model, setting, seed=seed)
        return np.stack([grid.place(study.draw(number)) for number in range(count)])
