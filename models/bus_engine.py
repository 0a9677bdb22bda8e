"""Harold Zurcher's bus engines: what did he think that they cost him?

Each month Harold Zurcher, superintendent of maintenance at Madison Metropolitan Bus Company, kept or replaced the
engine of each of his buses. Keeping one costs more the further it has run since the last replacement, ``.001 theta11``
for every 5,000 miles; replacing costs ``RC`` and starts again from 0 miles. Both are in units of the scatter (logit
shocks) of what else weighed on a month's decision, unseen by us. He looks far ahead: the discount is .9999 a month.

The decision problem has 90 states (mileage in bins of 5,000 miles) and two actions, keep (0) and replace (1). How far
a bus runs in a month is estimated first, by relative frequencies, and then held fixed; what is fitted is the
probability of the choices in the states that a bus was in (Rust's second stage). A bus is one observation, so that
leave-one-out cross-validation leaves out a bus. The priors are uniform: the posterior has the shape of the likelihood.

    pirl fit models/bus_engine.py --set group=1-4

Source: J. Rust, "Optimal Replacement of GMC Bus Engines: An Empirical Model of Harold Zurcher", Econometrica 55(5),
1987, table IX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl.datasets import NUM_STATES, BusData, bus_transition, zurcher_raw, zurcher_table

RUST_DISCOUNT = 0.9999

# Bounds of the uniform priors, wide of the likelihood of these two fleets. Those of other fleets are wider; and the
# less a manager looks ahead, the steeper must the cost be that makes him replace.
BOUNDS = {"4": {"RC": (4.0, 26.0), "theta11": (0.05, 9.0)}, "1-4": {"RC": (5.0, 20.0), "theta11": (0.2, 8.0)}}
WIDE_BOUNDS = {"RC": (2.0, 40.0), "theta11": (0.01, 25.0)}
SHORT_SIGHTED_BOUNDS = {"RC": (2.0, 40.0), "theta11": (0.01, 500.0)}

# Table IX, linear cost, discount .9999: estimates and standard errors.
TABLE_IX = {
    "1-3": ({"RC": 11.7270, "theta11": 4.8259}, {"RC": 2.602, "theta11": 1.792}),
    "4": ({"RC": 10.0750, "theta11": 2.2930}, {"RC": 1.582, "theta11": 0.639}),
    "1-4": ({"RC": 9.7558, "theta11": 2.6275}, {"RC": 1.227, "theta11": 0.618}),
}

dims = {"months": ("bus", "state"), "replaced": ("bus", "state")}
labels = {"RC": "replacement cost RC (utility)", "theta11": "running cost theta11 (.001 utility per 5,000 miles)"}

# The two costs are nearly proportional (correlation .92), which a dense mass matrix takes away. What is left is almost
# Gaussian, and few long steps explore it better than many short ones. A prior draw beside a bound is far out in
# unconstrained space, where the density is flat: a chain that starts there is long on its way. So they start around
# the mode, twice as far from it as the Laplace approximation is wide.
defaults = {
    "chees": {"init": "laplace", "num_chains": 32, "num_warmup": 100, "num_samples": 150},
    "nuts": {"num_warmup": 200, "num_samples": 500, "dense_mass": True, "target_accept_prob": 0.65},
}


class Choices(dist.Binomial):
    """How often an engine was replaced among the months in a state: a binomial without its coefficient.

    What was observed is a record of months in their order, one of many with the same counts, so that the log-likelihood
    is Rust's and not shifted by the number of orders.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits - self.total_count * torch.nn.functional.softplus(self.logits)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        # Under vmap torch.binomial wants both arguments batched.
        months = self.total_count + torch.zeros_like(self.probs)
        return torch.binomial(months.expand(shape), self.probs.detach().expand(shape))


def costs(replacement_cost: Tensor, theta11: Tensor) -> Tensor:
    """Reward [*batch, S, 2] of keeping and of replacing, from two tensors [*batch]."""
    state = torch.arange(NUM_STATES, dtype=theta11.dtype, device=theta11.device)
    keep = -0.001 * theta11[..., None] * state
    replace = -replacement_cost[..., None].expand_as(keep)
    return torch.stack([keep, replace], dim=-1)


def model(mdp: pirl.TabularMDP, months: Tensor, replaced: Tensor, bounds: dict[str, tuple[float, float]]) -> None:
    """Costs, then the choices that a manager who knows them makes; ``months`` and ``replaced`` are [bus, state]."""
    replacement_cost = pyro.sample("RC", dist.Uniform(*bounds["RC"]))
    theta11 = pyro.sample("theta11", dist.Uniform(*bounds["theta11"]))
    log_policy = pirl.soft_policy(mdp, costs(replacement_cost, theta11))
    log_odds = log_policy[..., 1] - log_policy[..., 0]
    with pyro.plate("bus", len(months)):
        pyro.sample("replaced", Choices(months, logits=log_odds).to_event(1), obs=replaced)


def load(group: str = "4", discount: float = RUST_DISCOUNT, data: Path | None = None) -> dict[str, Any]:
    """Choices of the buses of some of Rust's groups ("4", "1-3", "1-4", "1,2").

    They come from pirl's own table, or from a folder of matrices in Rust's format (see :mod:`pirl.datasets`).
    """
    fleet = fleet_of(group, data)
    # Logit shocks: an action weighs the same whether there are others or not (the counting measure), as in Rust.
    usage = fleet.usage.sum(dim=0)
    mdp = pirl.TabularMDP(bus_transition(usage), 0, discount, action_prior="counting", action_names=("keep", "replace"))
    choices = fleet.choices.to(mdp.dtype)
    bounds = BOUNDS.get(group, WIDE_BOUNDS) if discount >= RUST_DISCOUNT else SHORT_SIGHTED_BOUNDS
    return {"mdp": mdp, "months": choices.sum(dim=-1), "replaced": choices[..., 1], "bounds": bounds}


def fleet_of(group: str, data: Path | None) -> BusData:
    """The records of a fleet."""
    return zurcher_table(group) if data is None else zurcher_raw(data, group)


def coords(group: str, data: Path | None) -> dict[str, Any]:
    """Each bus by its own number."""
    return {"bus": fleet_of(group, data).bus}


def reference(group: str, discount: float) -> dict[str, Any] | None:
    """Rust's estimates for the groups that he reports."""
    if group not in TABLE_IX or discount != RUST_DISCOUNT:
        return None
    values, standard_errors = TABLE_IX[group]
    return {"label": "Rust (1987)", "values": values, "standard_errors": standard_errors}


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
