"""Tempered sequential Monte Carlo: a population that moves from the prior to the posterior, with its evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import ConvergenceError, ConvergenceWarning, NonFiniteError, OptionError, warn
from pirl.infer.adaptation import Covariance
from pirl.infer.batched import BatchedPotential
from pirl.infer.checkpoint import Checkpoint
from pirl.infer.engine import RESAMPLING, Draws, own_generator, random_numbers, reseed
from pirl.infer.ensemble import Ensemble, default_width
from pirl.infer.hmc import Metric
from pirl.infer.population import MOST_DENSE, Population, check_options
from pirl.infer.potential import Potential
from pirl.infer.ranks import ALONE, Ranks
from pirl.infer.sampling import Stats, sample
from pirl.infer.start import find_start

__all__ = ["run"]

WIDTH = 256
"""Particles of a block on a CPU: of thousands, wider blocks cost less a particle and still occupy every core."""

MOST_MOVES = 100_000
FEWEST_MOVES = 2


class SMC(Population):
    """The sampler: see :func:`run` for its options.

    A step is one move of all particles; before the first move at a temperature they are weighted and resampled.
    """

    label = "smc"

    def __init__(
        self,
        ensemble: Ensemble,
        start: Float[Tensor, "C D"],
        *,
        num_islands: int,
        target_ess: float,
        max_moves: int,
        correlation: float,
        dense_mass: bool,
        **options: Any,
    ) -> None:
        super().__init__(ensemble, start, 0.0, Metric(torch.ones_like(start[0])), **options)
        self.num_islands, self.target_ess, self.dense_mass = num_islands, target_ess, dense_mass
        self.max_moves, self.correlation = max_moves, correlation
        self.step_size.restart(0.5)
        self.origin, self.moves, self.still = start, 0, False
        self.log_evidence = start.new_zeros(num_islands)
        self.temperatures, self.sizes = [0.0], [1.0]

    @property
    def temperature(self) -> float:
        """Power of the likelihood: 0 the prior, 1 the posterior."""
        return self.temperatures[-1]

    @property
    def finished(self) -> bool:  # type: ignore[override]
        """Whether the population has settled in the posterior."""
        return self.temperature == 1.0 and self.still

    @property
    def note(self) -> str:  # type: ignore[override]
        """Where on the way from the prior the population is."""
        return f"temperature {self.temperature:.3g}"

    def reached(self, step: int, total: int) -> int:
        """As far as the temperature; there are moves to make when that is 1."""
        return total if self.finished else min(int(self.temperature * total), total - 1)

    def advance(self, step: int) -> tuple[Tensor, Stats]:
        """Change the temperature when it is time, then move every particle once."""
        if self.still or self.temperature == 0.0:
            self._heat(step)
        start = self.phase.z
        moved, time, stats = self.transit(step, self.step_size.sizes, self.length.current, self.max_leapfrogs)
        self.learn(start, moved, time)
        self.moves += 1
        # At the end twice as many, since what resampling has made equal is then counted as draws.
        most, fewest = (2 * n if self.temperature == 1.0 else n for n in (self.max_moves, FEWEST_MOVES))
        self.still = self.moves >= most or (self.moves >= fewest and self._remembered() < self.correlation)
        return self.phase.z, stats

    def _remembered(self) -> float:
        """Correlation of where particles are with where they began at this temperature: the largest coordinate's."""
        now, begun = (self.metric.whiten(z) for z in (self.phase.z, self.origin))
        now, begun = now - now.mean(0), begun - begun.mean(0)
        correlation = (now * begun).mean(0) / (now.square().mean(0) * begun.square().mean(0)).sqrt()
        return float(correlation.abs().max())

    def _heat(self, step: int) -> None:
        """Raise the temperature as far as the weights allow; weigh, resample, and learn the population's covariance."""
        likelihood, energy = self.phase.log_likelihood, self.phase.energy
        likelihood = torch.where(energy.isfinite() & likelihood.isfinite(), likelihood, -torch.inf)
        log_likelihood = likelihood.reshape(self.num_islands, -1)
        if not bool(log_likelihood.isfinite().any(1).all()):
            raise NonFiniteError("no draw from the prior has a likelihood: is the prior far from the data?")
        higher = next_temperature(log_likelihood, self.temperature, self.target_ess)
        log_weight = (higher - self.temperature) * log_likelihood
        log_weight = torch.where(log_likelihood == -torch.inf, -torch.inf, log_weight)  # 0 * inf
        self.log_evidence = self.log_evidence + torch.logsumexp(log_weight, 1) - math.log(log_weight.shape[1])
        self.temperatures.append(higher)
        self.sizes.append(float(relative_size(log_weight).mean()))
        uniforms = torch.from_numpy(random_numbers(self.seed, RESAMPLING, step).random(self.num_islands))
        chosen = resample(log_weight, uniforms.to(log_weight)) + log_weight.shape[1] * torch.arange(
            self.num_islands, device=log_weight.device
        ).unsqueeze(1)
        z = self.phase.z[chosen.flatten()]
        self.phase = self.ensemble.evaluate(z, torch.full_like(z[:, 0], higher))
        self.origin, self.moves, self.still = z, 0, False
        covariance = Covariance(z.shape[1], self.dense_mass, z)
        covariance.update(z)
        self.metric = covariance.metric() or self.metric

    def state_dict(self) -> dict[str, Tensor]:
        """The population, and how it came here."""
        return {
            **super().state_dict(),
            "origin": self.origin,
            "moves": torch.tensor([self.moves, int(self.still)]),
            "log_evidence": self.log_evidence,
            "temperatures": torch.tensor(self.temperatures, dtype=torch.float64),
            "sizes": torch.tensor(self.sizes, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where a saved sampler was."""
        super().load_state_dict(state)
        like = self.log_evidence
        self.origin, self.log_evidence = state["origin"].to(like), state["log_evidence"].to(like)
        self.moves, self.still = int(state["moves"][0]), bool(state["moves"][1])
        self.temperatures, self.sizes = state["temperatures"].tolist(), state["sizes"].tolist()


def relative_size(log_weight: Float[Tensor, "I N"]) -> Float[Tensor, " I"]:
    """Effective sample size of weights as a share of their number, ``(sum w)^2 / (N sum w^2)``."""
    twice = 2 * torch.logsumexp(log_weight, 1) - torch.logsumexp(2 * log_weight, 1)
    return twice.exp() / log_weight.shape[1]


def next_temperature(log_likelihood: Float[Tensor, "I N"], temperature: float, target: float) -> float:
    """The highest temperature up to 1 at which the effective sample size is still ``target``, by bisection."""

    def size(higher: float) -> float:
        weight = torch.where(log_likelihood == -torch.inf, -torch.inf, (higher - temperature) * log_likelihood)
        return float(relative_size(weight).mean())

    # Particles without a likelihood are lost at any temperature.
    target *= float(log_likelihood.isfinite().to(log_likelihood.dtype).mean())
    if size(1.0) >= target:
        return 1.0
    low, high = temperature, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if size(middle) >= target else (low, middle)
    return high if low == temperature else low


def resample(log_weight: Float[Tensor, "I N"], uniform: Float[Tensor, " I"]) -> Tensor:
    """Systematic resampling within each island: ``[I, N]`` indices, in order, so that families stay side by side."""
    count = log_weight.shape[1]
    points = (torch.arange(count, device=log_weight.device) + uniform[:, None]) / count
    total = torch.softmax(log_weight, 1).cumsum(1)
    return torch.searchsorted(total / total[:, -1:], points).clamp(max=count - 1)


def run(
    potential: Potential,
    *,
    num_chains: int = 4,
    num_warmup: int = 0,
    num_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    thin: int = 1,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
    target_ess: float = 0.8,
    target_accept_prob: float = 0.8,
    max_leapfrogs: int = 200,
    max_moves: int = 5,
    correlation: float = 0.2,
    dense_mass: bool | None = None,
    chains_per_block: int | None = None,
    record: bool = True,
    loop: bool = False,
) -> Draws:
    """Sample by tempered sequential Monte Carlo (Del Moral, Doucet and Jasra 2006), for posteriors of several modes.

    Independent populations ("chains") of ``num_samples`` particles start as draws from the prior. The likelihood is
    raised to a power that grows from 0 to 1, each time as far as the effective sample size of the weights allows; the
    particles are resampled and moved by Hamiltonian Monte Carlo, with step size, trajectory length and mass matrix
    learnt from all of them. Modes keep the share that the weights give them, also where no chain could cross between.
    ``attrs["log_evidence"]`` estimates log p(data), with a standard error from the populations.

    Args:
        num_chains: independent populations.
        num_warmup: ignored.
        num_samples: particles of each population; ``thin`` leaves some of them out at the end.
        target_ess: share of the particles that the weights of a step must be worth; larger is slower and more exact.
        target_accept_prob: acceptance that the step size aims at.
        max_leapfrogs: at most so many gradients a move.
        max_moves: moves at a temperature at most, and ``correlation`` with where particles began below which fewer do.
        chains_per_block: width of a block, 256 or on a GPU 1024 by default.
        dense_mass, record, loop: see :func:`pirl.infer.chees.run`.

    Raises:
        ModelError: the model does not vmap; says what to change.
        NonFiniteError: the likelihood is zero at every draw from the prior.
        OptionError: a target that is no share.

    Example:
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x.square(), 0.1), obs=torch.tensor(1.0))  # two modes, at -1 and 1
        >>> draws = run(pirl.infer.Potential(model), num_chains=2, num_samples=100, progress=False)
        >>> draws.values["x"].shape, "log_evidence" in draws.attrs
        (torch.Size([2, 100]), True)
    """
    if not 0 < target_ess < 1:
        raise OptionError(f"target_ess is {target_ess}, but must be a share between 0 and 1")
    check_options(target_accept_prob, max_leapfrogs, chains_per_block)
    count = num_chains * num_samples
    device = torch.empty(0).device
    width = min(chains_per_block or (WIDTH if device.type == "cpu" else default_width(count, device)), count)
    with own_generator(), pyro.validation_enabled(False):
        reseed(seed, 0)
        probes = torch.stack([potential.flatten(find_start(potential, "prior")) for _ in range(2)])
        ensemble = Ensemble(BatchedPotential(potential, probes, width, record=record, loop=loop), count, ranks)
        with ensemble.at_work(device):
            reseed(seed, 1)
            sampler = SMC(
                ensemble,
                potential.flat_prior_draws(count),
                num_islands=num_chains,
                seed=seed,
                target_ess=target_ess,
                target_accept_prob=target_accept_prob,
                max_leapfrogs=max_leapfrogs,
                max_moves=max_moves,
                correlation=correlation,
                dense_mass=potential.size <= MOST_DENSE if dense_mass is None else dense_mass,
            )
            sampled = sample(
                sampler,
                num_warmup=MOST_MOVES,
                num_samples=0,
                thin=1,
                progress=progress,
                checkpoint=checkpoint,
                ranks=ranks,
            )
    if not sampler.finished:
        raise ConvergenceError(
            f"{MOST_MOVES} moves reached only temperature {sampler.temperature:.3g}: lower target_ess"
        )
    evidence = sampler.log_evidence
    islands = num_chains
    combined = float(torch.logsumexp(evidence, 0) - math.log(islands))
    error = float(evidence.std() / math.sqrt(islands)) if islands > 1 else math.nan
    if error > 0.5:
        warn(
            f"the log evidence differs by {float(evidence.max() - evidence.min()):.1f} between populations: raise "
            "num_samples or target_ess",
            ConvergenceWarning,
        )
    shape = (num_chains, num_samples)
    stats = {name: value.reshape(shape)[:, ::thin] for name, value in sampled.last.items()}
    draws = potential.unflatten(sampler.phase.z.reshape(*shape, -1).cpu()[:, ::thin])
    stages = {"temperature": sampler.temperatures, "relative_ess": sampler.sizes}
    return Draws(
        draws,
        unconstrained=True,
        stats=stats,
        attrs={
            "log_evidence": combined,
            "log_evidence_se": error,
            "num_temperatures": len(sampler.temperatures) - 1,
            "target_ess": target_ess,
            "target_accept_prob": target_accept_prob,
            "chains_per_block": width,
            "recorded": str(ensemble.target.recorded),
        },
        extra={
            "smc": {
                **{name: (("stage",), np.array(values)) for name, values in stages.items()},
                "log_evidence": (("population",), evidence.cpu().numpy()),
            }
        },
    )
