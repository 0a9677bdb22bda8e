"""Stochastic variational inference with Pyro's autoguides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, autoguide
from torch import Tensor

from pirl.errors import ConvergenceWarning, NonFiniteError, OptionError, warn
from pirl.infer.engine import Draws, own_generator, reseed
from pirl.infer.importance import weighed
from pirl.infer.potential import Potential, Values
from pirl.infer.progress import progress_bar
from pirl.infer.start import find_start

__all__ = ["run"]

GUIDES: dict[str, Callable[..., Any]] = {
    "normal": autoguide.AutoDiagonalNormal,
    "multivariate_normal": autoguide.AutoMultivariateNormal,
    "full_rank": autoguide.AutoMultivariateNormal,
    "low_rank": autoguide.AutoLowRankMultivariateNormal,
    "iaf": autoguide.AutoIAFNormal,
    "flow": autoguide.AutoIAFNormal,
    "delta": autoguide.AutoDelta,
}
WINDOW = 100
SHRINK, PHASES = 0.25, 5


def _make_guide(potential: Potential, name: str, start: Values) -> Any:
    if name not in GUIDES:
        raise OptionError(f"there is no guide {name!r}; the guides are {', '.join(sorted(GUIDES))}")
    # Only AutoNormal knows how to keep a latent site inside a plate that subsamples.
    kind = autoguide.AutoNormal if name == "normal" and potential.subsampled else GUIDES[name]
    options: dict[str, Any] = {}
    if kind is not autoguide.AutoIAFNormal:  # which has no location to start from
        options["init_loc_fn"] = autoguide.init_to_value(values=start, fallback=autoguide.init_to_median)
    guide = kind(potential.model, **options)
    guide(*potential.args, **potential.kwargs)  # builds the prototype and the parameters
    return guide


def _frozen(posterior: Any) -> Any:
    """Copy a Gaussian without its gradients: only the path of the draws is differentiated, see :func:`_own_loss`."""
    if isinstance(posterior, dist.Independent):
        base = posterior.base_dist
        return dist.Normal(base.loc.detach(), base.scale.detach()).to_event(1)
    if isinstance(posterior, dist.MultivariateNormal):
        return dist.MultivariateNormal(posterior.loc.detach(), scale_tril=posterior.scale_tril.detach())
    if isinstance(posterior, dist.LowRankMultivariateNormal):
        parts = (posterior.loc, posterior.cov_factor, posterior.cov_diag)
        return dist.LowRankMultivariateNormal(*(part.detach() for part in parts))
    return posterior  # a flow: its density is known only where it was drawn


def _own_loss(potential: Potential, guide: Any, num_particles: int) -> Callable[[], Tensor]:
    """Negative ELBO by the reparametrised draws of the guide and our potential, particles by vmap.

    The score of the guide, whose mean is zero, is left out of the gradient (Roeder, Wu and Duvenaud 2017), so that its
    noise vanishes where the guide matches the posterior: a Gaussian posterior is found exactly.
    """

    def energy(vector: Tensor) -> Tensor:
        return potential(potential.unflatten(vector))

    batched: Callable[[Tensor], Tensor] = torch.func.vmap(energy)
    probe = torch.zeros(2, potential.size)
    try:
        batched(probe)
    except Exception:  # an operator without a batching rule, or a branch on a value

        def batched(vectors: Tensor) -> Tensor:
            return torch.stack([energy(vector) for vector in vectors])

    def loss() -> Tensor:
        posterior = guide.get_posterior()
        vectors = posterior.rsample((num_particles,))
        return (batched(vectors) + _frozen(posterior).log_prob(vectors)).mean()

    return loss


def _optimise(
    loss: Callable[[], Tensor],
    parameters: list[Tensor],
    *,
    learning_rate: float,
    max_steps: int,
    tolerance: float,
    update: Callable[[int, str], None],
) -> tuple[list[float], list[float], bool]:
    """Run Adam, its step size cut whenever the ELBO stops growing; end at the average of the last window.

    Windows of 100 steps are compared: growth that is neither above its own standard error nor above ``tolerance`` nats
    cuts the step size to a quarter; after five such phases the ELBO is called converged.
    """
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    losses: list[float] = []
    rates: list[float] = []
    phase_began, converged = 0, False
    total = [torch.zeros_like(parameter) for parameter in parameters]
    while len(losses) < max_steps and not converged:
        rate = optimiser.param_groups[0]["lr"]
        for value in total:
            value.zero_()
        for _ in range(WINDOW):
            optimiser.zero_grad()
            value = loss()
            if torch.isfinite(value):
                value.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1e3 * math.sqrt(sum(p.numel() for p in parameters)))
                optimiser.step()
            losses.append(value.item())
            rates.append(rate)
            for mean, parameter in zip(total, parameters, strict=True):
                mean += parameter.detach() / WINDOW
        update(len(losses), f"ELBO {-np.mean(losses[-WINDOW:]):.2f}, step size {rate:.2g}")
        if not np.isfinite(losses[-WINDOW:]).any():
            raise NonFiniteError(f"the ELBO was not finite for {WINDOW} steps: use a smaller learning_rate")
        if len(losses) - phase_began < 2 * WINDOW:
            continue
        old, new = np.array(losses[-2 * WINDOW : -WINDOW]), np.array(losses[-WINDOW:])
        growth = np.nanmean(old) - np.nanmean(new)
        error = math.sqrt((np.nanvar(old) + np.nanvar(new)) / WINDOW)
        if growth <= max(error, tolerance):
            phase_began = len(losses)
            converged = rate <= learning_rate * SHRINK ** (PHASES - 1) * 1.001
            optimiser.param_groups[0]["lr"] = rate * SHRINK
    with torch.no_grad():
        for parameter, mean in zip(parameters, total, strict=True):
            parameter.copy_(mean)
    return losses, rates, converged


def run(
    potential: Potential,
    *,
    num_chains: int = 4,
    num_warmup: int = 0,
    num_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    guide: str = "multivariate_normal",
    num_particles: int = 16,
    vectorize_particles: bool = False,
    max_steps: int = 10_000,
    learning_rate: float = 0.03,
    tolerance: float = 1e-3,
    init: str | Mapping[str, Tensor] = "uniform",
    resample: bool = False,
) -> Draws:
    """Fit a guide to the posterior by maximising the evidence lower bound, and draw from it.

    Exact where the posterior belongs to the guide's family in unconstrained space; elsewhere ``attrs["pareto_k"]``
    tells how far off it is, ``sample_stats.log_weight`` corrects averages, and the group ``psis_moments`` has corrected
    means and sds. The group ``elbo`` keeps the history.
    Models with ``pyro.param`` or with plates that subsample go through Pyro's own ELBO.

    Args:
        num_warmup: ignored.
        guide: "normal" (diagonal), "multivariate_normal" (or "full_rank"), "low_rank", "iaf" (or "flow": inverse
            autoregressive flow), "delta" (the mode in the constrained space; all draws are equal).
        num_particles: draws for each estimate of the ELBO.
        vectorize_particles: let Pyro's own ELBO draw them in one plate (all others are always vectorised); the model
            must then declare every batch dim with a plate.
        max_steps: steps after which the search ends unconverged, with a warning.
        learning_rate: first step size of Adam.
        tolerance: growth of the ELBO over 100 steps, in nats, that is too small to go on.
        init: where the location starts, see :func:`pirl.infer.start.find_start`.
        resample: let the draws follow their importance weights, where k-hat < 0.7 allows it.

    Raises:
        OptionError: no such guide.
        NonFiniteError: no start with a finite log density and gradient, or an ELBO that stays not finite.

    Example:
        >>> potential = pirl.infer.Potential(lambda: pyro.sample("x", dist.Normal(1.0, 2.0)))
        >>> draws = run(potential, guide="normal", num_samples=100, max_steps=2000, progress=False)
        >>> draws.values["x"].shape
        torch.Size([1, 400])
    """
    count = num_chains * num_samples
    args, kwargs = potential.args, potential.kwargs
    with own_generator(), pyro.validation_enabled(False), progress_bar("svi", max_steps, progress) as update:
        reseed(seed, 0)
        special = bool(potential.params or potential.subsampled)
        if special:
            start: Values = {}
        else:
            start = potential.replay(find_start(potential, init))["posterior"]
        variational = _make_guide(potential, guide, start)
        pyro_elbo = special or not isinstance(variational, autoguide.AutoContinuous)
        if pyro_elbo:
            elbo = Trace_ELBO(
                num_particles=1 if guide == "delta" else num_particles, vectorize_particles=vectorize_particles
            )
            loss = lambda: elbo.differentiable_loss(potential.model, variational, *args, **kwargs)  # noqa: E731
            with pyro.poutine.trace(param_only=True) as capture:
                loss()
            parameters = list({site["value"].unconstrained() for site in capture.trace.nodes.values()})
        else:
            loss = _own_loss(potential, variational, num_particles)
            variational.get_posterior()
            parameters = list(variational.parameters())
        losses, rates, converged = _optimise(
            loss, parameters, learning_rate=learning_rate, max_steps=max_steps, tolerance=tolerance, update=update
        )
        reseed(seed, 1)
        with torch.no_grad():
            result = _draw(potential, variational, count, resample)
    if not converged:
        warn(f"the ELBO still grows after {len(losses)} steps: raise max_steps", ConvergenceWarning)
    result.attrs |= {
        "approximation": "svi",
        "guide": guide,
        "converged": str(converged),
        "num_steps": len(losses),
        "elbo": -float(np.nanmean(losses[-WINDOW:])),
        "num_particles": num_particles,
    }
    history = {"elbo": -np.array(losses), "learning_rate": np.array(rates)}
    result.extra["elbo"] = {name: (("iteration",), values) for name, values in history.items()}
    return result


def _draw(potential: Potential, guide: Any, count: int, resample: bool) -> Draws:
    if isinstance(guide, autoguide.AutoDelta):
        values = guide.median(*potential.args, **potential.kwargs)
        return Draws({n: v.detach().expand(1, count, *v.shape) for n, v in values.items()}, unconstrained=False)
    if isinstance(guide, autoguide.AutoContinuous):
        posterior = guide.get_posterior()
        vectors = posterior.sample((count,))
        if not (potential.params or potential.subsampled):
            return weighed(potential, vectors, posterior.log_prob(vectors), resample)
        return Draws({n: v[None] for n, v in potential.unflatten(vectors).items()}, unconstrained=True)
    values = {}
    for name in potential.latent:  # AutoNormal: every latent site apart, at its full size
        loc, scale = guide._get_loc_and_scale(name)
        values[name] = (loc + scale * torch.randn(count, *loc.shape))[None]
    return Draws(values, unconstrained=True)
