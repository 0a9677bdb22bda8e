"""One model, many data sets: the posteriors of all of them sampled at once, C chains of each of R replicates.

The model runs once for all. Its latent sites get the batch dims [C, R] left of its plates, its observed sites the batch
dim [R]: Pyro's own idiom for many particles, which a model follows whose operations count dims from the right. Chains
of a replicate share step size and mass matrix; replicates share nothing but the number of leapfrog steps.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from jaxtyping import Bool, Float
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pirl.errors import ModelError, NonFiniteError, PirlError, first_line, named_line
from pirl.infer.adaptation import StepSizes, halton, shrunk, window_ends
from pirl.infer.chees import FIRST_LEAPFROGS
from pirl.infer.engine import MOMENTA, Draws, laid_out, own_generator, random_numbers, reseed
from pirl.infer.ensemble import Ensemble
from pirl.infer.hmc import Metric
from pirl.infer.population import MOST_DENSE, WHITENED_LENGTH, check_options
from pirl.infer.potential import Potential, Values, bijection, kind_of
from pirl.infer.ranks import ALONE
from pirl.infer.recorded import record as record_function
from pirl.infer.start import DISPERSION, laplace_metric
from pirl.infer.user_errors import NO_DENSITY, place_of

WIDTH = 1024
"""Chains of a block, of all replicates: each call has to look up the counts of all of them, however many chains."""

MOST_LEAPFROGS = 200
MOST_HALVINGS = 100
"""Calls in which rows without a density are looked for among many, before the rest is evaluated row by row."""
START_ATTEMPTS = 100
SLOW = 0.1
"""Share of replicates that may move less far than they should: how many steps are made is for all of them to share,
and those of a tenth that needs the shortest steps should not be what all others wait for."""


class NotAtOnceError(ModelError):
    """A model cannot take many data sets at once, whichever they are."""


class _EvaluateAll(Messenger):
    """Fix latent and observed sites at values with batch dims left of the plates; sum the log density by replicate."""

    def __init__(self, latent: Values, data: Values, plates: int) -> None:
        super().__init__()
        self.latent, self.data, self.plates = latent, data, plates
        self.total: Tensor | float = 0.0

    def _process_message(self, message: Any) -> None:
        name = message["name"]
        if message["type"] != "sample":
            return
        if name in self.data:
            message["value"], message["is_observed"] = self.data[name], True
        elif name in self.latent:
            value, support = self.latent[name], bijection(message["fn"])
            constrained = support(value)
            self._add(support.log_abs_det_jacobian(value, constrained))
            message["value"], message["done"] = constrained, True

    def _postprocess_message(self, message: Any) -> None:
        if message["type"] != "sample" or kind_of(message) in ("plate", "deterministic") or message["mask"] is False:
            return
        self._add(scale_and_mask(message["fn"].log_prob(message["value"]), message["scale"], message["mask"]))

    def _add(self, terms: Tensor) -> None:
        """Sum over plates; what stands left of them are chains and replicates."""
        own = list(range(-min(self.plates, terms.dim()), 0))
        self.total = self.total + (terms.sum(own) if own else terms)


class ReplicatedPotential:
    """U and its gradient for C chains of each of R replicates, as rows ``c R + r`` of ``[C R, D]``.

    Args:
        potentials: of each replicate, one by one: the model conditioned on its own data.
        model: without the data.
        data: values of the observed sites, ``[R, *shape]``.
        probes: two points ``[2, D]`` where all replicates have a density: what is evaluated at once must agree there
            with what is evaluated one by one.
        width: rows of a call, a multiple of R.

    Raises:
        NotAtOnceError: the model cannot take batch dims left of its plates, or gives other numbers when it does.
    """

    def __init__(
        self,
        potentials: list[Potential],
        model: Any,
        data: Values,
        probes: Float[Tensor, "2 D"],
        width: int,
        record: bool = True,
    ) -> None:
        first = potentials[0]
        self.model, self.args, self.kwargs, self.width = model, first.args, first.kwargs, width
        self.potential, self.potentials, self.replicates = first, potentials, len(potentials)
        self._python = threading.Lock()  # Pyro runs one model at a time
        self.plates = max((-dim for site in first.sites.values() for dim in site.plates), default=0)
        self.data = {name: self._aligned(name, value) for name, value in data.items()}
        self._graph: Any = None
        self._good = probes[torch.arange(width, device=probes.device) // self.replicates % 2]
        self._check(probes, self._good)
        if record:
            plain = lambda x: self._plain(x)  # noqa: E731 - the recorder counts arguments, and self as one
            self._graph = record_function(plain, (self._good,), (self._good.flip(0),))

    @property
    def recorded(self) -> bool:
        """Whether calls repeat recorded operations."""
        return self._graph is not None

    def _aligned(self, name: str, value: Tensor) -> Tensor:
        """Put dims of 1 between what is left of a site's plates and them, so that plates meet plates."""
        site = self.potential.sites[name]
        shape = site.unconstrained_shape if site.kind == "latent" else site.shape
        left = value.dim() - len(shape)
        missing = self.plates - (len(shape) - site.event_dim)
        return value.reshape(*value.shape[:left], *(1,) * missing, *shape)

    def _plain(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        def energy(x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.potential.unflatten(x.reshape(-1, self.replicates, x.shape[-1]))
            latent = {name: self._aligned(name, value) for name, value in z.items()}
            with _EvaluateAll(latent, self.data, self.plates) as evaluation:
                self.model(*self.args, **self.kwargs)
            each = -torch.as_tensor(evaluation.total)
            if each.shape != (len(x) // self.replicates, self.replicates):
                raise NotAtOnceError("the model does not keep batch dims left of its plates")
            return each.sum(), each.reshape(-1)

        slope, (_, value) = torch.func.grad_and_value(energy, has_aux=True)(vectors)
        return value, slope

    def __call__(
        self, vectors: Float[Tensor, "B D"], temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate ``width`` rows; NaN where there is no density."""
        with torch.no_grad():
            try:
                value, slope = (self._graph or self._plain)(vectors)
            except NO_DENSITY:  # of one chain, but all were evaluated together
                with self._python:
                    value, slope = self._by_halves(vectors)
        value = torch.where(value > -torch.inf, value, torch.nan)
        return value, slope, torch.zeros_like(value)

    def _by_halves(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Find rows without a density among others by some calls each; where there are many, go row by row."""
        value, slope = torch.full_like(vectors[:, 0], torch.nan), torch.full_like(vectors, torch.nan)
        left = list(torch.arange(self.width, device=vectors.device).chunk(2))
        for _ in range(MOST_HALVINGS):
            if not left:
                break
            some = left.pop()
            rows = self._good.clone()
            rows[some] = vectors[some]
            try:
                found = (self._graph or self._plain)(rows)
            except NO_DENSITY:
                left += some.chunk(2) if len(some) > 1 else []
                continue
            value[some], slope[some] = (x[some] for x in found)
        for row in torch.cat(left).tolist() if left else []:
            vector = vectors[row]
            potential = self.potentials[row % self.replicates]
            try:
                with torch.enable_grad():
                    energy, gradient = potential.gradient(potential.unflatten(vector))
            except NO_DENSITY:
                continue
            value[row], slope[row] = energy.detach(), potential.flatten(gradient).detach()
        return value, slope

    def _check(self, probes: Tensor, rows: Tensor) -> None:
        try:
            with torch.no_grad():
                value, slope = self._plain(rows)
        except Exception as error:  # what a model may do with dims it did not expect has no one name
            said = first_line(error) if isinstance(error, PirlError) else f"{named_line(error)}{place_of(error)}"
            raise NotAtOnceError(f"the model does not take many data sets at once: {said}") from error
        value, slope = (x.reshape(-1, self.replicates, *x.shape[1:])[:2] for x in (value, slope))
        tolerance = torch.finfo(rows.dtype).eps ** 0.6
        for r, potential in enumerate(self.potentials):
            for c, point in enumerate(probes[: len(value)]):
                energy, gradient = potential.gradient(potential.unflatten(point))
                expected = torch.cat([energy.reshape(1), potential.flatten(gradient)])
                found = torch.cat([value[c, r].reshape(1), slope[c, r]])
                if not torch.allclose(found, expected, tolerance, tolerance):
                    raise NotAtOnceError("the model gives other densities for many data sets at once than for one")


@dataclass(frozen=True)
class _Metrics(Metric):
    """A factor of the covariance of each replicate: ``[R, D, D]``, or ``[R, D]``; rows are ``c R + r``."""

    def unwhiten(self, y: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return self._applied(y, transpose=False)

    def pull(self, gradient: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return self._applied(gradient, transpose=True)

    def _applied(self, y: Tensor, transpose: bool) -> Tensor:
        each = y.reshape(-1, len(self.factor), y.shape[-1])
        if self.factor.dim() == 2:
            return (each * self.factor).reshape(y.shape)
        factor = self.factor.mT if transpose else self.factor
        return torch.einsum("rij,crj->cri", factor, each).reshape(y.shape)


def run_all(
    potentials: list[Potential],
    model: Any,
    data: Values,
    *,
    num_chains: int,
    num_warmup: int,
    num_samples: int,
    seed: int,
    target_accept_prob: float = 0.8,
    dense_mass: bool | None = None,
    max_leapfrogs: int | None = None,
    init: str = "prior",
    told: Callable[[float], None] = lambda share: None,
) -> list[Draws]:
    """Sample all replicates by Hamiltonian Monte Carlo, as ``chees`` does but for a trajectory length that is fixed.

    The length is the best one for a Gaussian, in units of each replicate's posterior (as soon as that is known).

    Args:
        potentials, model, data: see :class:`ReplicatedPotential`.
        num_chains, num_warmup, num_samples: of each replicate.
        target_accept_prob, dense_mass, max_leapfrogs: see :func:`pirl.infer.chees.run`.
        init: one of ``NAMED_STARTS``, see :func:`pirl.infer.start.find_starts`.
        told: is given the share of steps made, on the way.

    Returns:
        Of each replicate the draws ``[chain, draw, *shape]``, unconstrained.

    Raises:
        NotAtOnceError: the model cannot take many data sets at once.
        ModelError: for these data sets no mode was found, or no point where all of them have a density.
        NonFiniteError: no starts where all replicates have a density.
        OptionError: an option is out of its range.
    """
    check_options(target_accept_prob, MOST_LEAPFROGS if max_leapfrogs is None else max_leapfrogs, None)
    replicates, potential = len(potentials), potentials[0]
    dense = potential.size <= MOST_DENSE if dense_mass is None else dense_mass
    with own_generator(), pyro.validation_enabled(False):
        reseed(seed, 0)
        width = _chains_at_once(num_chains, replicates) * replicates
        target = ReplicatedPotential(potentials, model, data, _probes(potentials), width)
        ensemble = Ensemble(target, num_chains * replicates, ALONE)
        with ensemble.at_work(torch.empty(0).device):
            draws, bad = _sample(
                ensemble, target, potentials, num_chains, num_warmup, num_samples, seed, target_accept_prob, dense,
                MOST_LEAPFROGS if max_leapfrogs is None else max_leapfrogs, init, told,
            )  # fmt: skip
    return [
        Draws(potential.unflatten(draws[:, :, r]), unconstrained=True, stats={"diverging": bad[:, :, r]})
        for r in range(replicates)
    ]


def _chains_at_once(num_chains: int, replicates: int) -> int:
    """A divisor of the number of chains that makes blocks of a good width."""
    most = max(1, WIDTH // replicates)
    return next(n for n in range(min(most, num_chains), 0, -1) if num_chains % n == 0)


def _probes(potentials: list[Potential]) -> Float[Tensor, "2 D"]:
    """Two draws from the prior at which all replicates have a finite density and gradient."""
    found = list[Tensor]()
    for _ in range(START_ATTEMPTS):
        point = potentials[0].flatten(potentials[0].prior_draw())
        if all(_finite(potential, point) for potential in potentials):
            found.append(point)
        if len(found) == 2:
            return torch.stack(found)
    raise ModelError(f"no two of {START_ATTEMPTS} draws from the prior have a finite density for all data sets")


def _finite(potential: Potential, point: Tensor) -> bool:
    try:
        energy, slopes = potential.gradient(potential.unflatten(point))
    except NO_DENSITY:
        return False
    return bool(energy.isfinite() & potential.flatten(slopes).isfinite().all())


def _sample(
    ensemble: Ensemble,
    target: ReplicatedPotential,
    potentials: list[Potential],
    num_chains: int,
    num_warmup: int,
    num_samples: int,
    seed: int,
    target_accept_prob: float,
    dense: bool,
    max_leapfrogs: int,
    init: str,
    told: Callable[[float], None],
) -> tuple[Float[Tensor, "C draw R D"], Bool[Tensor, "C draw R"]]:
    """Warm up, freeze, draw: positions, and which transitions diverged."""
    by = (num_chains, target.replicates)
    start, metric = _starts(target, potentials, num_chains, init)
    sizes = StepSizes(start[:, 0].reshape(by), target_accept_prob)
    phase = ensemble.evaluate(start, torch.ones_like(start[:, 0]))
    ends, window = window_ends(num_warmup), list[Tensor]()
    kept, diverging = [], []
    for step in range(num_warmup + num_samples):
        warm = step < num_warmup
        eps = sizes.log_size.exp() if warm else sizes.average
        # As in chees: while scales are unknown, long trajectories are a waste.
        most = min(max_leapfrogs, FIRST_LEAPFROGS * 2 ** sum(end <= step for end in ends)) if warm else max_leapfrogs
        count = max(1, min(most, math.ceil(halton(step + 1) * WHITENED_LENGTH / float(eps.quantile(SLOW)))))
        numbers = random_numbers(seed, MOMENTA, step)
        momentum = laid_out(torch.from_numpy(numbers.standard_normal(tuple(phase.z.shape))).to(phase.z))
        luck = torch.from_numpy(-numbers.standard_exponential(len(phase.z))).to(phase.z)
        moved = ensemble.transition(phase, metric, eps.expand(by).reshape(-1), count, momentum, luck)
        phase = moved.phase
        if warm:
            sizes.update(moved.acceptance.reshape(by))
            window.append(phase.z.reshape(*by, -1))
            if step + 1 in ends:
                metric = _learnt(torch.cat(window), dense)
                window.clear()
                sizes.restart()
        else:
            kept.append(phase.z.reshape(*by, -1).cpu())
            diverging.append((moved.diverging > 0).reshape(by).cpu())
        told((step + 1) / (num_warmup + num_samples))
    return torch.stack(kept, 1), torch.stack(diverging, 1)


def _starts(
    target: ReplicatedPotential, potentials: list[Potential], num_chains: int, init: str
) -> tuple[Float[Tensor, "B D"], Metric]:
    """Starts where each replicate has a finite density and gradient, and how wide its posterior may be."""
    count, size = num_chains * target.replicates, target.potential.size
    if init == "laplace":
        try:
            found = [laplace_metric(potential) for potential in potentials]
        except (PirlError, RuntimeError) as error:  # torch.linalg's among them
            raise ModelError(f"the mode of a replicate was not found: {first_line(error)}") from error
        mode = torch.stack([mode for mode, _ in found])
        metric = _Metrics(torch.stack([spread.factor for _, spread in found]))

    def fresh() -> Tensor:
        if init == "prior":
            return target.potential.flat_prior_draws(count)
        if init == "uniform":
            return torch.empty(count, size).uniform_(-2.0, 2.0)
        noise = metric.unwhiten(torch.randn(count, size))
        return (mode + DISPERSION * noise.reshape(num_chains, *mode.shape)).reshape(count, size)

    start = fresh()
    for _ in range(START_ATTEMPTS):
        parts = [target(rows) for rows in start.split(target.width)]
        bad = ~torch.cat([energy.isfinite() & slope.isfinite().all(-1) for energy, slope, _ in parts])
        if not bool(bad.any()):
            if init == "laplace":
                return start, metric
            if init == "prior" and num_chains > 1:
                return start, _Metrics(start.reshape(num_chains, -1, size).std(0).clamp(min=1e-6))
            return start, _Metrics(torch.ones(target.replicates, size))
        start = torch.where(bad[:, None], fresh(), start)
    raise NonFiniteError(f"{int(bad.sum())} of {count} chains find no start (init={init!r}) with a finite density")


def _learnt(draws: Float[Tensor, "n R D"], dense: bool) -> Metric:
    """The factor of each replicate's covariance."""
    centred = draws - draws.mean(0)
    variance = centred.square().mean(0).clamp(min=1e-12)
    if not dense:
        return _Metrics(variance.sqrt())
    covariance = torch.einsum("nri,nrj->rij", centred, centred) / len(draws)
    factor, info = torch.linalg.cholesky_ex(shrunk(covariance, float(len(draws))))
    return _Metrics(torch.where((info == 0)[:, None, None], factor, torch.diag_embed(variance.sqrt())))
