"""The No-U-Turn sampler: Pyro's kernel, driven step by step, chain after chain in this process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.infer.mcmc import NUTS
from torch import Tensor

from pirl.errors import ConvergenceWarning, StuckChainsError
from pirl.infer.engine import Draws, own_generator, progress_bar, reseed
from pirl.infer.potential import Potential, Values
from pirl.infer.recorded import recorded
from pirl.infer.start import find_start, guarded


class _Kernel(NUTS):
    """Pyro's NUTS, which also remembers the leaves of its last tree: the statistics are read from them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.leaves: list[tuple[Any, float, float]] = []
        self.energy_before = math.nan

    def _build_basetree(self, z: Any, r: Any, z_grads: Any, log_slice: Any, direction: Any, energy_current: Any) -> Any:
        leaf = super()._build_basetree(z, r, z_grads, log_slice, direction, energy_current)
        self.energy_before = float(energy_current)
        # With multinomial sampling a leaf weighs exp(energy before - energy of the leaf).
        self.leaves.append((leaf.z_proposal, self.energy_before - float(leaf.weight), float(leaf.sum_accept_probs)))
        return leaf

    def statistics(self, step_size: float) -> dict[str, float]:
        """Describe the last transition, which was made with ``step_size``."""
        steps = len(self.leaves)
        chosen = [energy for z, energy, _ in self.leaves if z is self._z_last]
        return {
            "lp": -float(self._potential_energy_last),
            "energy": chosen[0] if chosen else self.energy_before,
            "tree_depth": math.floor(math.log2(steps + 1)),
            "n_steps": steps,
            "step_size": step_size,
            "acceptance_rate": sum(accept for _, _, accept in self.leaves) / steps,
            "diverging": any(energy - self.energy_before > self._max_sliced_energy for _, energy, _ in self.leaves),
            "moved": bool(chosen),
        }


def run(
    potential: Potential,
    *,
    num_chains: int = 4,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    full_mass: bool | list[tuple[str, ...]] = False,
    init: str | Mapping[str, Tensor] = "uniform",
    record: bool = True,
) -> Draws:
    """Sample with the No-U-Turn sampler (Hoffman and Gelman 2014), multinomial variant (Betancourt 2017).

    The step size and the mass matrix adapt during warm-up and then stay. Each step has its own seed, derived from
    (seed, chain, step): draws are reproduced exactly, whatever ran before and however many chains there are.

    Args:
        target_accept_prob: mean acceptance that the step size aims at; raise it when transitions diverge.
        max_tree_depth: at most 2^depth - 1 leapfrog steps a transition.
        full_mass: dense mass matrix: over all sites, or over each tuple of site names.
        init: where chains start, see :func:`~pirl.infer.start.find_start`.
        record: run the model's Python once and repeat its tensor operations, where the model allows it.

    Raises:
        NonFiniteError: no start with a finite log density and gradient.
        StuckChainsError: no chain accepted a proposal after warm-up.
    """
    options = {"target_accept_prob": target_accept_prob, "max_tree_depth": max_tree_depth, "full_mass": full_mass}
    steps = num_warmup + num_samples
    chains, stats, stuck = [], [], []
    with (
        own_generator(),
        pyro.validation_enabled(False),
        progress_bar("nuts", num_chains * steps, progress) as update,
    ):
        reseed(seed, 0)
        replay = recorded(potential, find_start(potential, init), find_start(potential, init)) if record else None
        energy = guarded(replay or potential)
        for chain in range(num_chains):
            reseed(seed, chain)
            kernel = _Kernel(potential_fn=energy, **options)
            kernel.initial_params = z = find_start(potential, init)
            kernel.setup(num_warmup)
            draws: list[Values] = []
            rows: list[dict[str, float]] = []
            for step in range(steps):
                reseed(seed, chain, step + 1)
                kernel.leaves.clear()
                step_size = float(kernel.step_size)
                z = kernel.sample(z)
                if step >= num_warmup:
                    draws.append(z)
                    rows.append(kernel.statistics(step_size))
                if step % 10 == 9:
                    update(chain * steps + step + 1, f"chain {chain}, step size {kernel.step_size:.2g}")
            moves = [row.pop("moved") for row in rows]
            if not any(moves):
                stuck.append(chain)
            chains.append({name: torch.stack([draw[name] for draw in draws]) for name in potential.latent})
            stats.append({name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
        if len(stuck) == num_chains:
            raise StuckChainsError(f"no chain accepted a proposal after warm-up: {potential.culprit(z)}")
    if stuck:
        warnings.warn(f"chains {stuck} never moved after warm-up; their draws are one point", ConvergenceWarning, 2)
    return Draws(
        {name: torch.stack([chain[name] for chain in chains]) for name in potential.latent},
        unconstrained=True,
        stats={name: torch.stack([row[name] for row in stats]) for name in stats[0]},
        attrs={
            "target_accept_prob": target_accept_prob,
            "max_tree_depth": max_tree_depth,
            "full_mass": str(full_mass),
            "recorded": str(replay is not None),
        },
    )
