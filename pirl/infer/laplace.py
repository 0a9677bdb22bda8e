"""The Laplace approximation: a Gaussian at the highest mode of the posterior in unconstrained space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro
import torch
from torch import Tensor

from pirl.errors import ConvergenceWarning, ModelError, NonFiniteError, OptionError, warn
from pirl.infer.engine import Draws, own_generator, reseed
from pirl.infer.importance import weighed
from pirl.infer.potential import Potential
from pirl.infer.progress import progress_bar
from pirl.infer.start import find_start, guarded

__all__ = ["run"]


def hessian(energy: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Second derivatives of a scalar function ``[D] -> []`` at a point ``[D]``, symmetrised; shape ``[D, D]``.

    By torch.func where the function allows it, else by double backward, else by central differences of the gradient.
    """

    def by_differences() -> Tensor:
        width = torch.finfo(point.dtype).eps ** (1 / 3)
        shifts = torch.diag(width * point.abs().clamp(min=1.0))
        slope = [(_slope(energy, point + s)[1] - _slope(energy, point - s)[1]) / (2 * s.sum()) for s in shifts]
        return torch.stack(slope)

    ways: list[Callable[[], Tensor]] = [
        lambda: torch.func.jacrev(torch.func.grad(energy))(point),
        lambda: torch.autograd.functional.hessian(energy, point),
    ]
    for way in ways:
        try:
            second = way().detach()
        except (RuntimeError, NotImplementedError):  # no rule for vmap, or a backward that cannot be differentiated
            continue
        return (second + second.mT) / 2
    second = by_differences()
    return (second + second.mT) / 2


def _slope(energy: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    leaf = point.detach().clone().requires_grad_()
    value = energy(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def find_mode(energy: Callable[[Tensor], Tensor], start: Tensor, max_steps: int = 500) -> tuple[Tensor, Tensor]:
    """Minimise by L-BFGS with a strong Wolfe line search, then polish by damped Newton steps; point and value."""
    leaf = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [leaf], max_iter=max_steps, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = energy(leaf)
        leaf.grad = torch.autograd.grad(value, leaf)[0]
        return value.detach()

    optimiser.step(closure)
    point = leaf.detach().clone() if torch.isfinite(leaf).all() else start
    value, slope = _slope(energy, point)
    for _ in range(20):
        factor, info = torch.linalg.cholesky_ex(hessian(energy, point))
        if info != 0 or not torch.isfinite(factor).all():
            break
        step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        for halvings in range(20):
            candidate = point - step * 0.5**halvings
            new_value, new_slope = _slope(energy, candidate)
            if new_value <= value + 10 * torch.finfo(point.dtype).eps * value.abs():  # rounding is no reason to stop
                break
        else:
            break
        small = (slope * step).sum() < torch.finfo(point.dtype).eps
        point, value, slope = candidate, new_value, new_slope
        if small:
            break
    return point, value


def posterior_precision(potential: Potential, mode: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[D]``, ascending, and Cholesky factor ``[D, D]`` of the Hessian of U at a mode.

    Raises:
        ModelError: it is not positive definite; names the parameter.
    """
    precision = hessian(lambda vector: potential(potential.unflatten(vector)), mode)
    names = potential.coordinates()
    lowest, vectors = torch.linalg.eigh(precision)
    if not lowest[0] > torch.finfo(mode.dtype).eps * lowest[-1].abs() * len(names):
        worst = names[int(vectors[:, 0].abs().argmax())]
        raise ModelError(
            f"the Hessian at the best mode is not positive definite (smallest eigenvalue {float(lowest[0]):.3g}, "
            f"mostly along {worst}): there is no Gaussian approximation; use engine='chees', a proper prior, "
            "or for a scale that can shrink to 0 the non-centred form w = mu + tau * z"
        )
    return lowest, torch.linalg.cholesky(precision)


def run(
    potential: Potential,
    *,
    num_chains: int = 4,
    num_warmup: int = 0,
    num_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    num_starts: int = 4,
    init: str | Mapping[str, Tensor] = "uniform",
    resample: bool = False,
) -> Draws:
    """Approximate the posterior by N(z*, H^-1) in unconstrained space, z* the best mode found, H the Hessian there.

    Draws are pushed through the bijections of the sites. Exact where the posterior is Gaussian in unconstrained
    space; elsewhere ``attrs["pareto_k"]`` tells how far off it is, ``sample_stats.log_weight`` corrects averages, and
    the group ``psis_moments`` has corrected means and sds. The group ``laplace`` keeps mode, covariance and gradient;
    ``attrs["log_evidence"]`` is -U(z*) + D/2 log 2 pi - 1/2 log det H, approximately log p(data).

    Args:
        num_warmup: ignored.
        num_starts: searches for the mode, from different starts; the best end wins.
        init: where they start, see :func:`pirl.infer.start.find_start`; of given values only the first search, and
            the others uniformly.
        resample: let the draws follow their importance weights, where k-hat < 0.7 allows it.

    Raises:
        NonFiniteError: no start with a finite log density and gradient.
        ModelError: the Hessian at the best end is not positive definite: there is no Gaussian approximation.

    Example:
        >>> potential = pirl.infer.Potential(lambda: pyro.sample("x", dist.Normal(1.0, 2.0)))
        >>> draws = run(potential, num_samples=100, progress=False)
        >>> draws.values["x"].shape, round(draws.attrs["log_evidence"], 4)
        (torch.Size([1, 400]), 0.0)
    """
    if num_starts < 1:
        raise OptionError(f"num_starts is {num_starts}, but must be at least 1")
    guard = guarded(potential)

    def energy(vector: Tensor) -> Tensor:
        return potential(potential.unflatten(vector))

    with own_generator(), pyro.validation_enabled(False), progress_bar("laplace", num_starts, progress) as update:
        ends = []
        for index in range(num_starts):
            reseed(seed, index)
            where = init if index == 0 or isinstance(init, str) else "uniform"
            try:
                start = potential.flatten(find_start(potential, where))
            except NonFiniteError:
                if where is init:
                    raise
                continue  # the start that was given does
            ends.append(find_mode(lambda vector: guard(potential.unflatten(vector)), start))
            update(index + 1, "")
        finite = [end for end in ends if torch.isfinite(end[1])] or ends
        mode, value = min(finite, key=lambda end: float(end[1]))
        _, slope = _slope(energy, mode)
        lowest, factor = posterior_precision(potential, mode)
        # Distance to the mode that is left, in posterior standard deviations.
        distance = float(torch.linalg.solve_triangular(factor, slope[:, None], upper=False).norm())
        if distance > 1e-2:
            warn(f"the search for the mode stopped {distance:.2g} posterior sds away", ConvergenceWarning)
        reseed(seed, num_starts)
        noise = torch.randn(num_chains * num_samples, len(mode))
        draws = mode + torch.linalg.solve_triangular(factor.mT, noise.mT, upper=True).mT
        half_log_det = factor.diagonal().log().sum()
        log_q = half_log_det - 0.5 * (noise**2).sum(-1) - 0.5 * len(mode) * math.log(2 * math.pi)
        result = weighed(potential, draws, log_q, resample)
    evidence = float(-value + 0.5 * len(mode) * math.log(2 * math.pi) - half_log_det)
    agreeing = sum(bool((point - mode).abs().max() < 1e-3 / lowest[-1].sqrt()) for point, _ in ends)
    result.attrs |= {
        "approximation": "laplace",
        "log_evidence": evidence,
        "num_starts": len(ends),
        "starts_at_mode": agreeing,
        "converged": str(distance <= 1e-2),
    }
    coordinate = ("coordinate", "coordinate_other")
    result.extra["laplace"] = {
        "mode": (coordinate[:1], mode.cpu().numpy()),
        "gradient": (coordinate[:1], slope.cpu().numpy()),
        "covariance": (coordinate, torch.cholesky_inverse(factor).cpu().numpy()),
    }
    return result
