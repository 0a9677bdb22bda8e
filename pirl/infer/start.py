"""Where engines start: a point of unconstrained space at which the model has a density and a slope."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pirl.errors import ModelError, NonFiniteError, OptionError, first_line, form
from pirl.infer.batched import BatchedPotential
from pirl.infer.engine import STARTS, random_numbers, reseed
from pirl.infer.hmc import Metric
from pirl.infer.potential import Potential, Values
from pirl.infer.user_errors import NO_DENSITY

__all__ = ["find_start", "find_starts"]

START_ATTEMPTS = 100

NAMED_STARTS = ("prior", "uniform", "laplace")
"""Where chains start, by name."""

DISPERSION = 2.0
"""How many times wider than the Laplace approximation the starts around a mode are."""


def guarded(potential: Callable[[Values], Tensor]) -> Callable[[Values], Tensor]:
    """Give NaN where a draw has no density: one bad proposal is a divergence, not the end of the run."""

    def energy(z: Values) -> Tensor:
        try:
            value = potential(z)
        except NO_DENSITY:
            return sum(x.sum() for x in z.values()) * math.nan  # type: ignore[return-value]
        return value if value > -math.inf else value * math.nan

    return energy


def check_init(init: str | Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Refuse what is no start, or none of ``names``."""
    if not isinstance(init, str | Mapping):
        raise OptionError(
            f"init is {form(init)}: use {', '.join(map(repr, names))}, or a dict of values by latent site"
        )
    if isinstance(init, str) and init not in names:
        known = ", ".join(map(repr, names))
        raise OptionError(f"init={init!r} is not known: use {known}, or a dict of values of all latent sites")


def told(init: str | Mapping[str, Tensor]) -> str:
    """How a posterior's attributes name where chains started."""
    return init if isinstance(init, str) else "given"


def find_start(
    potential: Potential, init: str | Mapping[str, Tensor], around: tuple[Tensor, Metric] | None = None
) -> Values:
    """Find a point of unconstrained space whose log density and gradient are finite.

    Args:
        init: "uniform" (each coordinate uniform on (-2, 2)), "prior" (a draw from the prior), or values of all latent
            sites, in the constrained space, to start at; with ``around``, "laplace" too (see :func:`find_starts`).
        around: the mode and the width of the Laplace approximation, as ``laplace_metric`` finds them.

    Raises:
        NonFiniteError: there is none among 100 candidates; names the site.

    Example:
        >>> potential = pirl.infer.Potential(lambda: pyro.sample("x", dist.HalfNormal(1.0)))
        >>> find_start(potential, {"x": torch.tensor(1.0)})  # unconstrained: the logarithm
        {'x': tensor(0.)}
    """
    check_init(init, ("uniform", "prior", *(["laplace"] if around else [])))
    energy = guarded(potential)
    for _ in range(START_ATTEMPTS if isinstance(init, str) else 1):
        if not isinstance(init, str):
            dtype = torch.get_default_dtype()
            _check_names(potential, init)
            given = {name: torch.as_tensor(init[name], dtype=dtype) for name in potential.latent}
            for name, value in given.items():
                _check_shape(potential, name, value.shape)
            try:
                z = potential.unconstrain(given)
            except NO_DENSITY as error:
                said = first_line(error)
                raise NonFiniteError(f"the model has no density at the start that init gives: {said}") from error
        elif init == "prior":
            z = potential.prior_draw()
        elif init == "laplace" and around:
            mode, spread = around
            z = potential.unflatten((mode + DISPERSION * spread.unwhiten(torch.randn_like(mode)[None]))[0])
        else:
            z = {name: torch.empty(s.unconstrained_shape).uniform_(-2.0, 2.0) for name, s in potential.latent.items()}
        leaves = {name: value.detach().clone().requires_grad_() for name, value in z.items()}
        value = energy(leaves)
        if torch.isfinite(value):
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            if all(slope is None or torch.isfinite(slope).all() for slope in slopes):
                return {name: leaf.detach() for name, leaf in leaves.items()}
    raise NonFiniteError(
        f"no start among {START_ATTEMPTS if isinstance(init, str) else 1} has a finite log density and gradient: "
        f"{potential.culprit(z)}"
    )


def find_starts(
    potential: Potential, target: BatchedPotential, init: str | Mapping[str, Tensor], count: int, seed: int
) -> tuple[Tensor, Metric]:
    """Find ``count`` starts ``[count, D]`` of finite density and gradient, and how wide the posterior may be.

    Args:
        target: evaluates the posterior at many points.
        init: "prior" (draws from the prior), "uniform" (each coordinate uniform on (-2, 2)), "laplace" (around the
            mode, twice as wide as the Laplace approximation), or values of all latent sites in the constrained space,
            of one start or of ``count`` in the first dim.

    Raises:
        NonFiniteError: some start has no finite log density and gradient after 100 attempts; names the site.
        OptionError: no such ``init``, or values of another number of starts.

    Example:
        >>> posterior = pirl.fit(model, demos, mdp, features, init="laplace", num_chains=4, num_warmup=50,
        ...                      num_samples=10, num_prior=0, num_posterior_predictive=0)
        >>> posterior.posterior.sizes["chain"]
        4
    """
    numbers = random_numbers(seed, STARTS, 0)
    reseed(seed, 0)
    like = torch.empty(0)
    spread = Metric(like.new_ones(potential.size))
    if not isinstance(init, str):
        starts = _given(potential, init, count)
        attempts = 1
    else:
        check_init(init, NAMED_STARTS)
        attempts = START_ATTEMPTS
        if init == "laplace":
            mode, spread = laplace_metric(potential)
    bad = torch.ones(count, dtype=torch.bool)
    for _ in range(attempts):
        if init == "prior":
            fresh = potential.flat_prior_draws(count)
        elif init == "uniform":
            fresh = torch.from_numpy(numbers.uniform(-2.0, 2.0, (count, potential.size))).to(like)
        elif init == "laplace":
            noise = torch.from_numpy(numbers.standard_normal((count, potential.size))).to(like)
            fresh = mode + DISPERSION * spread.unwhiten(noise)
        else:
            fresh = starts
        starts = torch.where(bad[:, None], fresh, starts) if not bad.all() else fresh
        bad = ~torch.cat([_is_finite(target, rows) for rows in starts.split(target.width)])
        if not bad.any():
            if init == "prior" and count > 1:
                spread = Metric(starts.std(0).clamp(min=1e-6))
            return starts, spread
    where = potential.culprit({name: value[0] for name, value in potential.unflatten(starts[bad]).items()})
    raise NonFiniteError(
        f"{int(bad.sum())} of {count} starts have no finite log density and gradient after {attempts} attempts: {where}"
    )


def find_probes(potential: Potential, init: str | Mapping[str, Tensor], count: int) -> Tensor:
    """Two points ``[2, D]`` at which a batched evaluation is tried out before :func:`find_starts` needs it."""
    check_init(init, NAMED_STARTS)
    if not isinstance(init, str):
        return _given(potential, init, count)[[0, -1]]
    where = "prior" if init == "prior" else "uniform"
    return torch.stack([potential.flatten(find_start(potential, where)) for _ in range(2)])


def _is_finite(target: BatchedPotential, points: Tensor) -> Tensor:
    energy, gradient, _ = target(points)
    return energy.isfinite() & gradient.isfinite().all(-1)


def _given(potential: Potential, init: Mapping[str, Tensor], count: int) -> Tensor:
    """Flat unconstrained starts from values of sites, of one start or of all."""
    _check_names(potential, init)
    values = {name: torch.as_tensor(init[name], dtype=torch.get_default_dtype()) for name in potential.latent}
    many = [name for name, value in values.items() if value.dim() > len(potential.latent[name].shape)]
    for name, value in values.items():
        _check_shape(potential, name, value.shape[1:] if name in many else value.shape)
    for name in many:
        if len(values[name]) != count:
            raise OptionError(f"init[{name!r}] has {len(values[name])} starts, but there are {count}")
    rows = [
        potential.flatten(potential.unconstrain({n: v[i] if n in many else v for n, v in values.items()}))
        for i in range(count if many else 1)
    ]
    return torch.stack(rows).expand(count, -1)


def _check_names(potential: Potential, init: Mapping[str, Tensor]) -> None:
    """Refuse what is not one value of each latent site: a name that is misspelt would be left out silently."""
    # A posterior's draw has deterministic sites as well.
    more = [name for name in init if name not in potential.sites or potential.sites[name].kind == "observed"]
    if more:
        raise OptionError(f"init has a value of {more[0]!r}: the latent sites are {', '.join(potential.latent)}")
    missing = [name for name in potential.latent if name not in init]
    if missing:
        raise OptionError(f"init has no value of {', '.join(missing)}: give one of each latent site")


def _check_shape(potential: Potential, name: str, shape: torch.Size) -> None:
    if shape != potential.latent[name].shape:
        raise OptionError(
            f"init[{name!r}] has the shape {tuple(shape)}, and the site {tuple(potential.latent[name].shape)}: "
            "give a value of that shape"
        )


def laplace_metric(potential: Potential) -> tuple[Tensor, Metric]:
    """The mode and a factor of the inverse Hessian there."""
    from pirl.infer.laplace import find_mode, posterior_precision

    guard = guarded(potential)
    start = potential.flatten(find_start(potential, "uniform"))
    mode, _ = find_mode(lambda vector: guard(potential.unflatten(vector)), start)
    try:
        precision = posterior_precision(potential, mode)[1]
    except ModelError as error:
        raise ModelError(f"init='laplace' finds no Gaussian to start from, use 'uniform' or 'prior': {error}") from None
    return mode, Metric(torch.linalg.cholesky(torch.cholesky_inverse(precision)))
