"""What demonstrations determine of a model's parameters, and how well chains agree on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.convergence import ess_bulk, rhat
from pirl.errors import PirlError, named_line
from pirl.identify import Identification, unidentified
from pirl.infer.user_errors import NO_DENSITY
from pirl.mdp import TabularMDP
from pirl.posterior.draws import BLOCK, trajectory_laws

# Beyond these, dense tables of directions cost more than they tell.
_MOST_PARAMETERS, _MOST_PAIRS, _MOST_QUANTITIES = 300, 3000, 200
_PRIOR_DRAWS = 400


class Identified(NamedTuple):
    """What demonstrations determine of a model's parameters, and how well chains agree on that part."""

    share: dict[str, np.ndarray]
    """Of each element of each latent site: the share of its prior variance that no demonstrations can take away."""
    num_directions: int
    """Number of identified directions of parameter space (near the posterior mean, where rewards are not linear)."""
    num_parameters: int
    rhat: float
    """The largest R-hat of identified quantities: of those directions, or of the reward where it is not linear."""
    ess: float
    """Their smallest bulk effective sample size."""


def identified(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Mapping[str, Tensor]
) -> Identified | str:
    """Compare the parameters of a model with what its demonstrations can show of its rewards (pirl.identify).

    A direction of parameter space is not identified where the reward moves along directions that are not. What stays
    unknown of a parameter is its prior variance given all that is identified, which is little for the mean of many
    subjects, say, though with it their deviations could make any reward. (Exact for normal priors and rewards that are
    linear in the parameters; else an approximation near the posterior mean.)

    Where that cannot be told, why: too many pairs or parameters, or derivatives that fail; in no words of a model
    without trajectories of a TabularMDP, of which it is not asked.

    Args:
        draws: of the latent sites, ``[chain, draw, *shape]``.
    """
    names = list(draws)
    shapes = [draws[name].shape[2:] for name in names]
    flat = torch.cat([draws[name].reshape(*draws[name].shape[:2], -1) for name in names], -1)  # [chain, draw, P]
    known: dict[str, Identification] = {}

    def laws_at(vector: Tensor) -> dict[str, Any]:
        parts = vector.split([shape.numel() for shape in shapes])
        draw = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return trajectory_laws(model, args, kwargs, draw)

    def visible(vector: Tensor) -> Tensor:
        """The canonical reward, of all sites, at one vector of parameters."""
        return torch.cat([known[name].identified(law.reward).flatten() for name, law in laws_at(vector).items()])

    point = flat.mean((0, 1))
    try:
        with torch.no_grad():
            try:
                laws = laws_at(point)
            except NO_DENSITY:  # between draws there may be none
                point = flat[0, 0]
                laws = laws_at(point)
            if not laws:
                return ""
            if flat.shape[-1] > _MOST_PARAMETERS:
                return f"there are {flat.shape[-1]:,} parameters, more than {_MOST_PARAMETERS}"
            if flat[..., 0].numel() < 2:
                return "there is one draw"
            spread = flat.flatten(0, 1).std(0)
            if not bool((spread > 0).all()):
                return "a parameter is the same in all draws"
            for name, law in laws.items():
                if law.reward.numel() > _MOST_PAIRS:
                    return f"{name} has {law.reward.numel():,} pairs of states and actions, more than {_MOST_PAIRS:,}"
                starts = "drawn" if law.starts is None else "given"
                own = [law.mdp] if law.horizons is None else _with_horizons(law.mdp, law.horizons)
                known[name] = unidentified(own, reading=law.reading, stopping=law.stopping, starts=starts)
            slope, elsewhere = _jacobian(visible, point), _jacobian(visible, flat[0, -1])
            prior = _prior_covariance(_prior_draws(model, args, kwargs, names, _PRIOR_DRAWS).to(flat))
    except (RuntimeError, NotImplementedError, PirlError) as error:
        return named_line(error)
    _, level, axes = torch.linalg.svd(slope * spread)
    rounding = max(1e-8, torch.finfo(level.dtype).eps ** (2 / 3))
    rank = int((level > rounding * level.amax().clamp(min=torch.finfo(level.dtype).tiny)).sum())
    share = _prior_share(prior, axes[:rank] / spread)
    parts = share.split([shape.numel() for shape in shapes])
    if torch.allclose(slope, elsewhere, rtol=rounding, atol=rounding * float(slope.abs().amax())):
        quantities = ((flat - point) / spread) @ axes[:rank].mT
    else:
        with torch.no_grad():
            values = torch.func.vmap(visible, chunk_size=BLOCK)(flat.flatten(0, 1))
        moving = values.std(0) > 1e-10 * values.abs().amax()
        picked = moving.nonzero().flatten()[:: max(1, int(moving.sum()) // _MOST_QUANTITIES)]
        quantities = values[:, picked].unflatten(0, flat.shape[:2])
    table = quantities.double().cpu().numpy()
    return Identified(
        {name: x.reshape(s).cpu().numpy() for name, x, s in zip(names, parts, shapes, strict=True)},
        rank,
        flat.shape[-1],
        float(rhat(table).max()) if table.shape[-1] else math.nan,
        float(ess_bulk(table).min()) if table.shape[-1] else math.nan,
    )


def _with_horizons(mdp: TabularMDP, horizons: Tensor) -> list[TabularMDP]:
    """The problem as each kind of demonstrator knew it."""
    return [mdp if horizon < 0 else mdp.replace(horizon=horizon) for horizon in horizons.unique().tolist()]


def _prior_draws(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], names: list[str], count: int
) -> Float[Tensor, "n P"]:
    """Flat draws of the latent sites from the prior."""

    def one() -> Tensor:
        with pyro.poutine.trace() as traced:
            model(*args, **kwargs)
        return torch.cat([traced.trace.nodes[name]["value"].reshape(-1) for name in names])

    return torch.stack([one() for _ in range(count)])


def _prior_covariance(draws: Float[Tensor, "n P"]) -> Float[Tensor, "P P"]:
    """Of draws; correlations that chance alone could make are none, as nearly all are."""
    covariance = torch.cov(draws.T).reshape(draws.shape[1], -1)
    spread = covariance.diagonal().sqrt()
    by_chance = covariance.abs() < 4 / len(draws) ** 0.5 * torch.outer(spread, spread)
    return torch.where(by_chance & ~torch.eye(len(spread), dtype=torch.bool, device=draws.device), 0.0, covariance)


def _prior_share(covariance: Float[Tensor, "P P"], seen: Float[Tensor, "r P"]) -> Float[Tensor, " P"]:
    """Var(theta_i | seen theta) / Var(theta_i) of a normal with that covariance."""
    variance = covariance.diagonal()
    cross = covariance @ seen.mT
    explained = (cross @ torch.linalg.pinv(seen @ cross, hermitian=True)) * cross
    return (1 - explained.sum(1) / variance).clamp(0, 1)


def _jacobian(function: Callable[[Tensor], Tensor], point: Float[Tensor, " P"]) -> Float[Tensor, "n P"]:
    """Of n functions of few variables, by P reverse passes: the product with the Jacobian is linear in its weights."""
    like = function(point)
    pull = lambda weight: torch.func.vjp(function, point)[1](weight)[0]  # noqa: E731
    return torch.func.jacrev(pull)(torch.zeros_like(like)).mT
