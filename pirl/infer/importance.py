"""How good is an approximation? Importance weights of its draws, smoothed, and their Pareto k-hat."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pirl.errors import ConvergenceWarning, warn
from pirl.infer.engine import Draws
from pirl.infer.potential import Potential, Values
from pirl.infer.user_errors import NO_DENSITY

TRUSTED_K = 0.7
FEWEST = 25
"""Pareto smoothing needs this many draws."""


def log_density(potential: Potential, vectors: Tensor) -> Tensor:
    """Joint log density of flat unconstrained draws ``[n, size]``, shape ``[n]``: by vmap if the model allows it.

    It is -inf where there is no density.
    """

    def one(vector: Tensor) -> Tensor:
        return -potential(potential.unflatten(vector))

    def alone(vector: Tensor) -> Tensor:
        try:
            return one(vector)
        except NO_DENSITY:
            return vector.new_full((), -torch.inf)

    with torch.no_grad():
        try:
            return torch.func.vmap(one, chunk_size=128)(vectors)
        except Exception:  # an operator without a batching rule, or a branch on a value
            return torch.stack([alone(vector) for vector in vectors])


def weighed(potential: Potential, vectors: Tensor, log_q: Tensor, resample: bool) -> Draws:
    """Turn flat draws of an approximation into :class:`Draws`, with their weights against the posterior.

    The ratios p/q are Pareto-smoothed (Vehtari et al. 2024). k-hat < 0.7 says that weighted averages of the draws are
    averages over the posterior; ``resample`` then makes the draws themselves follow the weights (with repetitions).

    Args:
        vectors: draws ``[n, size]`` in unconstrained space.
        log_q: their log density under the approximation, ``[n]``.
    """
    from arviz_stats.base import array_stats

    log_p = log_density(potential, vectors)
    ratios = (log_p - log_q).detach().cpu().numpy().astype(float)
    ratios = np.where(np.isfinite(ratios), ratios, -np.inf if np.isfinite(ratios).any() else 0.0)
    smooth, khat = ratios, -np.inf
    rounding = 1e3 * torch.finfo(log_p.dtype).eps * (1 + float(log_p[log_p.isfinite()].abs().sum() / len(log_p)))
    if len(ratios) < FEWEST:
        khat = np.nan  # too few draws for a tail
    elif np.ptp(ratios[np.isfinite(ratios)]) > rounding:  # else the approximation is exact, and has no tail
        with np.errstate(divide="ignore", invalid="ignore"):  # of weights that nearly all are 0
            smooth, khat = array_stats.psislw(-ratios)  # it takes the log of the inverse weights, as loo does
        if np.isnan(smooth).any():  # no tail can be fitted where so many draws weigh next to nothing
            smooth, khat = ratios, np.inf
    smooth = smooth - np.logaddexp.reduce(smooth)
    size = float(np.exp(-np.logaddexp.reduce(2 * smooth)))
    attrs: dict[str, str | int | float] = {
        "pareto_k": float(khat),
        "importance_ess": size,
        "resampled": str(bool(resample and khat < TRUSTED_K)),
    }
    stats: Values = {"lp": log_p, "log_q": log_q, "log_weight": torch.as_tensor(smooth)}
    if khat >= TRUSTED_K:
        warn(
            f"the approximation may miss part of the posterior: Pareto k-hat is {khat:.2f}, above {TRUSTED_K} "
            f"(its {len(smooth)} draws count for {size:.0f}); use engine='chees' (or, with svi, a richer guide)",
            ConvergenceWarning,
        )
    elif resample and khat < TRUSTED_K:
        # Systematic resampling: one uniform number, least variance.
        points = (np.arange(len(smooth)) + torch.rand(()).item()) / len(smooth)
        index = torch.as_tensor(np.searchsorted(np.cumsum(np.exp(smooth)), points).clip(max=len(smooth) - 1))
        index = index[torch.randperm(len(index))]
        vectors = vectors[index]
        stats = {name: value[index] for name, value in stats.items()}
        stats["log_weight"] = torch.full_like(stats["log_weight"], -np.log(len(smooth)))
    values = {name: value[None] for name, value in potential.unflatten(vectors).items()}
    return Draws(values, unconstrained=True, stats={n: v.detach()[None] for n, v in stats.items()}, attrs=attrs)
