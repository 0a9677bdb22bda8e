"""ChEES-HMC: hundreds of chains with one step size, trajectory length and mass matrix, learnt from all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pirl.errors import OptionError
from pirl.infer.adaptation import Covariance, window_ends
from pirl.infer.batched import BatchedPotential
from pirl.infer.checkpoint import Checkpoint
from pirl.infer.engine import TRIALS, Draws, own_generator, reseed
from pirl.infer.ensemble import Ensemble, default_width
from pirl.infer.hmc import Metric
from pirl.infer.population import MOST_DENSE, WHITENED_LENGTH, Population, check_options
from pirl.infer.potential import Potential
from pirl.infer.ranks import ALONE, Ranks
from pirl.infer.sampling import Stats, check_moves, part, sample
from pirl.infer.start import find_probes, find_starts, told

__all__ = ["run"]

FIRST_LEAPFROGS = 8
"""Leapfrog steps of a transition in the first window; twice as many in the next."""


class Chees(Population):
    """The sampler: see :func:`run` for its options."""

    label = "chees"

    def __init__(
        self,
        ensemble: Ensemble,
        start: Tensor,
        metric: Metric,
        *,
        num_warmup: int,
        dense_mass: bool,
        trajectory_length: float | None,
        **options: Any,
    ) -> None:
        super().__init__(ensemble, start, 1.0, metric, **options)
        self.num_warmup, self.fixed_length = num_warmup, trajectory_length
        self.windows = window_ends(num_warmup)
        self.covariance = Covariance(start.shape[1], dense_mass, start)
        self.step_size.log_size = math.log(self._reasonable_step_size(1.0, num_warmup))

    def advance(self, step: int) -> tuple[Tensor, Stats]:
        """One transition of all chains, and until warm-up is over what they learn from it."""
        warm, start = step < self.num_warmup, self.phase.z
        eps, length = self.step_size, self.length
        sizes = eps.sizes if warm else torch.full_like(self.phase.energy, eps.average)
        time = self.fixed_length or (length.current if warm else length.average)
        moved, time, stats = self.transit(step, sizes, time, self._most_steps(step))
        if warm:
            self.learn(start, moved, time)
            self.covariance.update(self.phase.z[~_behind(self.phase.energy)])
            if step + 1 in self.windows:
                self._renew_metric(step)
        return self.phase.z, stats

    def _most_steps(self, step: int) -> int:
        """While the scale of the posterior is not known, long trajectories are a waste."""
        if step >= self.num_warmup:
            return self.max_leapfrogs
        windows = sum(end <= step for end in self.windows)
        return min(self.max_leapfrogs, FIRST_LEAPFROGS * 2**windows) if windows < 3 else self.max_leapfrogs

    def _renew_metric(self, step: int) -> None:
        """Take the covariance of the last window, in whose units step size and length are sought anew."""
        metric = self.covariance.metric()
        self.covariance.restart()
        if metric is None:
            return
        self.metric = metric
        self.step_size.restart(self._reasonable_step_size(self.step_size.current, step))
        self.length.restart(WHITENED_LENGTH)

    def _reasonable_step_size(self, eps: float, step: int) -> float:
        """Double or halve until the mean acceptance of one leapfrog step crosses 0.8; no chain moves."""

        def accepted(size: float) -> bool:
            trial = self.move(torch.full_like(self.phase.energy, size), 1, step, stream=TRIALS)
            return float(trial.acceptance.mean()) > 0.8

        grows = accepted(eps)
        for _ in range(50):
            trial = eps * 2 if grows else eps / 2
            if accepted(trial) != grows:
                return eps if grows else trial
            eps = trial
        return eps

    def state_dict(self) -> dict[str, Tensor]:
        """The population, and the draws of the window so far."""
        window = {f"covariance.{name}": value for name, value in self.covariance.state_dict().items()}
        return {**super().state_dict(), **window}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where a saved sampler was."""
        super().load_state_dict(state)
        self.covariance.load_state_dict(part(state, "covariance"))


def run(
    potential: Potential,
    *,
    num_chains: int = 64,
    num_warmup: int = 300,
    num_samples: int = 500,
    seed: int = 0,
    progress: bool = True,
    thin: int = 1,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
    init: str | Mapping[str, Tensor] = "prior",
    num_superchains: int | None = None,
    target_accept_prob: float = 0.8,
    max_leapfrogs: int = 1000,
    dense_mass: bool | None = None,
    trajectory_length: float | None = None,
    chains_per_block: int | None = None,
    record: bool = True,
    loop: bool = False,
) -> Draws:
    """Sample with ChEES-HMC (Hoffman, Radul and Sountsov 2021): many chains, which learn from each other.

    During warm-up all chains together find the step size (stochastic approximation of their recent acceptance),
    the covariance of the posterior (in growing windows) and the trajectory length (ascent of the ChEES criterion in
    whitened units); then everything stays. Each transition follows the same number of leapfrog steps in all chains,
    jittered by a Halton sequence. Chains are evaluated in blocks, in as many threads as torch may use.

    Args:
        num_chains: the more, the better they learn and the busier a device is; with fewer than about 16, nuts learns
            more.
        init: where chains start, see :func:`pirl.infer.start.find_starts`.
        num_superchains: groups of consecutive chains that share one start, for nested R-hat (Margossian et al. 2024);
            None: each chain has its own.
        target_accept_prob: acceptance (harmonic mean over chains) that the step size aims at; raise it when
            transitions diverge.
        max_leapfrogs: at most so many gradients a transition.
        dense_mass: learn correlations too; None: with up to 300 parameters.
        trajectory_length: in units of posterior standard deviations, instead of learning it.
        chains_per_block: width of a block, 64 or on a GPU 1024 by default; draws depend on it by rounding only.
        record: run the model's Python once and repeat its tensor operations, where the model allows it.
        loop: evaluate chains one by one: for models that do not vmap, many times slower.

    Raises:
        ModelError: the model does not vmap; says what to change.
        NonFiniteError: no start with a finite log density and gradient.
        OptionError: superchains of unequal size, or an option out of range.
        StuckChainsError: no chain accepted a proposal after warm-up.

    Example:
        >>> potential = pirl.infer.Potential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> draws = run(potential, num_chains=16, num_warmup=50, num_samples=10, progress=False)
        >>> draws.values["x"].shape, sorted(draws.stats)
        (torch.Size([16, 10]), ['acceptance_rate', 'diverging', 'energy', 'lp', 'n_steps', 'step_size',
                                'trajectory_length'])
    """
    check_options(target_accept_prob, max_leapfrogs, chains_per_block)
    if trajectory_length is not None and not trajectory_length > 0:
        raise OptionError(f"trajectory_length is {trajectory_length}, but must be above 0")
    if num_superchains is not None and num_superchains < 1:
        raise OptionError(f"num_superchains is {num_superchains}, but must be at least 1")
    groups = num_superchains or num_chains
    if num_chains % groups:
        raise OptionError(f"num_superchains={groups} must divide num_chains={num_chains}: try {_divisor(num_chains)}")
    device = torch.empty(0).device
    width = min(chains_per_block or default_width(num_chains, device), num_chains)
    dense = potential.size <= MOST_DENSE if dense_mass is None else dense_mass
    with own_generator(), pyro.validation_enabled(False):
        reseed(seed, 0)
        target = BatchedPotential(potential, find_probes(potential, init, groups), width, record=record, loop=loop)
        ensemble = Ensemble(target, num_chains, ranks)
        with ensemble.at_work(device):
            starts, metric = find_starts(potential, target, init, groups, seed)
            sampler = Chees(
                ensemble,
                starts.repeat_interleave(num_chains // groups, 0),
                metric if dense else metric.diagonal(),
                num_warmup=num_warmup,
                seed=seed,
                target_accept_prob=target_accept_prob,
                max_leapfrogs=max_leapfrogs,
                dense_mass=dense,
                trajectory_length=trajectory_length,
            )
            sampled = sample(
                sampler,
                num_warmup=num_warmup,
                num_samples=num_samples,
                thin=thin,
                progress=progress,
                checkpoint=checkpoint,
                ranks=ranks,
            )
        check_moves(potential, sampled)
    return Draws(
        potential.unflatten(sampled.draws),
        unconstrained=True,
        stats=sampled.stats,
        attrs={
            "target_accept_prob": target_accept_prob,
            "max_leapfrogs": max_leapfrogs,
            "dense_mass": str(dense),
            "init": told(init),
            "chains_per_block": width,
            "recorded": str(target.recorded),
            **({"num_superchains": groups} if groups < num_chains else {}),
            "interrupted": str(sampled.interrupted),
        },
    )


def _behind(energy: Tensor) -> Tensor:
    """Chains that are still far from where most are: their distance is not the posterior's width."""
    low, middle, high = energy.quantile(torch.tensor([0.25, 0.5, 0.75]).to(energy))
    return energy > middle + 10 * (high - low)


def _divisor(count: int) -> int:
    return next(n for n in range(max(1, count // 16), 0, -1) if count % n == 0)
