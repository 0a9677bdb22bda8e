"""The No-U-Turn sampler: Pyro's kernel, driven step by step, one for each chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer.mcmc import NUTS
from pyro.infer.mcmc.adaptation import BlockMassMatrix
from torch import Tensor

from pirl.errors import OptionError, check_counts
from pirl.infer.checkpoint import Checkpoint
from pirl.infer.engine import START_STREAM, Draws, own_generator, reseed
from pirl.infer.hmc import Metric
from pirl.infer.potential import Potential, Values
from pirl.infer.ranks import ALONE, Ranks
from pirl.infer.recorded import recorded
from pirl.infer.sampling import Sampler, Stats, check_moves, sample
from pirl.infer.start import NAMED_STARTS, check_init, find_start, guarded, laplace_metric, told

__all__ = ["run"]

STATISTICS = ("lp", "energy", "tree_depth", "n_steps", "step_size", "acceptance_rate", "diverging")


WIDEST = 10.0
"""How many times wider in variance than a window's draws a guess may be, where it counts."""

LONG = 10
"""How many times as many draws as its guess counts for are believed by themselves."""


class _Guessed(BlockMassMatrix):
    """A mass matrix that begins with a guess of the covariance, and holds to it while a window has few draws.

    Pyro's own holds to .001 times the identity, which a posterior of other units takes long to leave.
    """

    def __init__(self, spread: Metric, potential: Potential) -> None:
        super().__init__()
        self._covariance = spread.unwhiten(spread.unwhiten(torch.eye(potential.size)).mT)
        self._place = potential.unflatten(torch.arange(potential.size))
        self.guess: dict[tuple[str, ...], Tensor] = {}

    def configure(self, *args: Any, **kwargs: Any) -> None:
        """Lay out the blocks, and begin with the guess: its correlations too, where a block is dense."""
        super().configure(*args, **kwargs)
        for names, inverse in self._inverse_mass_matrix.items():
            rows = torch.cat([self._place[name].reshape(-1) for name in names])
            block = self._covariance[rows][:, rows]
            self.guess[names] = (block if inverse.dim() == 2 else block.diagonal()).to(inverse)
        self.inverse_mass_matrix = dict(self.guess)

    def end_adaptation(self) -> None:
        """Take what the window's draws say, moved towards the guess as by further draws where they are few."""
        found = {}
        for names, moments in self._adapt_scheme.items():
            guess, count = self.guess[names], moments.n_samples
            covariance = moments.get_covariance(regularize=False)
            dense = guess.dim() == 2
            variance, guessed = (x.diagonal() if dense else x for x in (covariance, guess))
            # A covariance of D directions needs more than D draws; variances need few (Stan's number).
            extra = len(guess) + 2 if dense else 5
            moved = variance > 0
            if count < LONG * extra or not bool(moved.all()):
                # At a mode that is flat the guess is far too wide, and an average with it would be as well.
                scale = torch.where(moved, (WIDEST * variance / guessed).clamp(max=1), 1.0).sqrt()
                guess = guess * (scale[:, None] * scale if dense else scale.square())
                covariance = (count * covariance + extra * guess) / (count + extra)
            found[names] = covariance
        self.inverse_mass_matrix = found


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
        }

    def state_dict(self, potential: Potential) -> dict[str, Tensor]:
        """All that the next step depends on: where the chain is, and what Pyro's adapter has learnt."""
        adapter, averaging = self._adapter, self._adapter._step_size_adapt_scheme
        numbers = [self._t, adapter.step_size, adapter._current_window, averaging.prox_center]
        numbers += [getattr(averaging, "_x_t", 0.0), averaging._x_avg, averaging._g_avg, averaging._t]
        state = {
            "z": potential.flatten(self._z_last),
            "energy": torch.as_tensor(self._potential_energy_last),
            "gradient": potential.flatten(self._z_grads_last),
            "numbers": torch.tensor([float(x) for x in numbers], dtype=torch.float64),
        }
        mass = self.mass_matrix_adapter
        for index, (names, inverse) in enumerate(mass.inverse_mass_matrix.items()):
            moments = mass._adapt_scheme[names]
            state[f"mass{index}"] = inverse
            state[f"count{index}"] = torch.tensor(float(moments.n_samples), dtype=torch.float64)
            state[f"mean{index}"] = torch.zeros_like(inverse[0]) + moments._mean
            state[f"scatter{index}"] = torch.zeros_like(inverse) + moments._m2
            if isinstance(mass, _Guessed):
                state[f"guess{index}"] = mass.guess[names]
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], potential: Potential) -> None:
        """Continue where a saved chain was; the kernel was set up for the same potential and warm-up."""
        like = self._potential_energy_last
        adapter, averaging = self._adapter, self._adapter._step_size_adapt_scheme
        time, adapter.step_size, window, averaging.prox_center, *rest = state["numbers"].tolist()
        averaging._x_t, averaging._x_avg, averaging._g_avg, steps = rest
        self._t, adapter._current_window, averaging._t = int(time), int(window), int(steps)
        mass = self.mass_matrix_adapter
        names = list(mass.inverse_mass_matrix)
        mass.inverse_mass_matrix = {name: state[f"mass{i}"].to(like) for i, name in enumerate(names)}
        for i, name in enumerate(names):
            moments = mass._adapt_scheme[name]
            moments.n_samples = int(state[f"count{i}"])
            moments._mean, moments._m2 = state[f"mean{i}"].to(like), state[f"scatter{i}"].to(like)
            if isinstance(mass, _Guessed):  # another machine may find the mode to other bits
                mass.guess[name] = state[f"guess{i}"].to(like)
        z, gradient = (potential.unflatten(state[name].to(like)) for name in ("z", "gradient"))
        self._cache(z, state["energy"].to(like), gradient)


class Nuts(Sampler):
    """The sampler: see :func:`run` for its options."""

    label = "nuts"

    def __init__(
        self,
        potential: Potential,
        energy: Callable[[Values], Tensor],
        *,
        num_chains: int,
        num_warmup: int,
        seed: int,
        init: str | Mapping[str, Tensor],
        ranks: Ranks,
        **options: Any,
    ) -> None:
        self.potential, self.seed, self.ranks = potential, seed, ranks
        self._counts = [len(Ranks(rank, ranks.size).share(num_chains)) for rank in range(ranks.size)]
        self.kernels: dict[int, _Kernel] = {}
        reseed(seed, 0)
        around = laplace_metric(potential) if init == "laplace" else None
        for chain in ranks.share(num_chains):
            reseed(seed, chain)
            kernel = self.kernels[chain] = _Kernel(potential_fn=energy, **options)
            if around:
                kernel.mass_matrix_adapter = _Guessed(around[1], potential)
            kernel.initial_params = find_start(potential, init, around)
            kernel.setup(num_warmup)

    def advance(self, step: int) -> tuple[Tensor, Stats]:
        """One transition of each chain, one after the other; those of other ranks are gathered."""
        rows = []
        for chain, kernel in self.kernels.items():
            reseed(self.seed, chain, step + 1)
            kernel.leaves.clear()
            step_size = float(kernel.step_size)
            z = self.potential.flatten(kernel.sample(kernel._z_last))
            statistics = kernel.statistics(step_size)
            rows.append(torch.cat([z, z.new_tensor([float(value) for value in statistics.values()])]))
        size = self.potential.size
        everything = self.ranks.gather(torch.stack(rows), self._counts)
        stats = dict(zip(STATISTICS, everything[:, size:].unbind(1), strict=True))
        whole = {name: stats[name].to(torch.int64) for name in ("tree_depth", "n_steps")}
        return everything[:, :size], {**stats, **whole, "diverging": stats["diverging"] > 0}

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all chains, stacked."""
        own = [kernel.state_dict(self.potential) for kernel in self.kernels.values()]
        return {name: self.ranks.gather(torch.stack([state[name] for state in own]), self._counts) for name in own[0]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where saved chains were."""
        for chain, kernel in self.kernels.items():
            kernel.load_state_dict({name: value[chain] for name, value in state.items()}, self.potential)


def run(
    potential: Potential,
    *,
    num_chains: int = 4,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    thin: int = 1,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    dense_mass: bool | list[tuple[str, ...]] = False,
    init: str | Mapping[str, Tensor] = "uniform",
    record: bool = True,
) -> Draws:
    """Sample with the No-U-Turn sampler (Hoffman and Gelman 2014), multinomial variant (Betancourt 2017).

    The step size and the mass matrix of each chain adapt during warm-up and then stay. Each step has its own seed,
    derived from (seed, chain, step): draws are reproduced exactly, whatever ran before and however many chains or
    ranks there are.

    Args:
        target_accept_prob: mean acceptance that the step size aims at; raise it when transitions diverge.
        max_tree_depth: at most 2^depth - 1 leapfrog steps a transition.
        dense_mass: learn correlations too: of all sites, or within each tuple of site names.
        init: where chains start: "uniform" (each coordinate of unconstrained space uniform on (-2, 2)), "prior" (draws
            from it), values of all latent sites (one start, of all chains), or "laplace": around the mode, twice as
            wide as the Laplace approximation, whose covariance the mass matrix begins with. A short warm-up will do
            then; R-hat does not see a mode that no chain started near.
        record: run the model's Python once and repeat its tensor operations, where the model allows it.

    Raises:
        NonFiniteError: no start with a finite log density and gradient.
        StuckChainsError: no chain accepted a proposal after warm-up.
        ModelError: init="laplace", and the search for a mode ends where there is no Gaussian.
        OptionError: more chains than have random numbers of their own, or fewer than ranks; no tree to build.

    Example:
        >>> potential = pirl.infer.Potential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> draws = run(potential, num_chains=2, num_warmup=20, num_samples=10, progress=False)
        >>> draws.values["x"].shape, sorted(draws.stats)
        (torch.Size([2, 10]), ['acceptance_rate', 'diverging', 'energy', 'lp', 'n_steps', 'step_size', 'tree_depth'])
    """
    if num_chains > START_STREAM:
        raise OptionError(f"num_chains is {num_chains}; at most {START_STREAM} chains have random numbers of their own")
    if num_chains < ranks.size:
        raise OptionError(f"num_chains is {num_chains}, fewer than the {ranks.size} ranks that share them: start fewer")
    check_counts(1, max_tree_depth=max_tree_depth)
    check_init(init, NAMED_STARTS)
    options = {"target_accept_prob": target_accept_prob, "max_tree_depth": max_tree_depth, "full_mass": dense_mass}
    with own_generator(), pyro.validation_enabled(False):
        reseed(seed, 0)
        probe = "uniform" if init == "laplace" else init
        replay = recorded(potential, find_start(potential, probe), find_start(potential, probe)) if record else None
        energy = guarded(replay or potential)
        sampler = Nuts(
            potential, energy, num_chains=num_chains, num_warmup=num_warmup, seed=seed, init=init, ranks=ranks,
            **options,
        )  # fmt: skip
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
            "max_tree_depth": max_tree_depth,
            "dense_mass": str(dense_mass),
            "init": told(init),
            "recorded": str(replay is not None),
            "interrupted": str(sampled.interrupted),
        },
    )
