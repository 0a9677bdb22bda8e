"""Many chains in fixed blocks: over the threads of this process, and over the processes of a run.

A block has the same chains and the same shapes wherever it is evaluated, since a product of another width rounds
differently; and on a CPU one thread, since two sum in another order. Draws depend neither on the number of threads nor
on the number of ranks. (Models that cannot be recorded are evaluated by all of torch's threads, which must be as many.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import RankWarning, warn
from pirl.infer.engine import laid_out
from pirl.infer.hmc import Metric, Phase, Transition, transition
from pirl.infer.ranks import Ranks

CPU_WIDTH, GPU_WIDTH = 64, 1024
"""Chains of a block: enough to be efficient, few enough to stay in the cache of a core and to be shared by ranks."""


def default_width(num_chains: int, device: torch.device) -> int:
    """Chains of a block on a device."""
    return min(num_chains, CPU_WIDTH if device.type == "cpu" else GPU_WIDTH)


@runtime_checkable
class Evaluator(Protocol):
    """The potential of one block of chains: U, its gradient, and the log-likelihood, at ``[width, D]``."""

    width: int

    @property
    def recorded(self) -> bool:
        """Whether several threads may call at once."""

    def __call__(
        self, vectors: Float[Tensor, "B D"], temperature: Float[Tensor, " B"] | None = None, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate."""


class Ensemble:
    """Evaluate and move ``num_chains`` chains.

    Args:
        target: evaluates one block; its width is that of the blocks.
        num_chains: chains of all ranks.
        ranks: the processes that share them.
    """

    def __init__(self, target: Evaluator, num_chains: int, ranks: Ranks) -> None:
        self.target, self.num_chains, self.ranks = target, num_chains, ranks
        width = target.width
        blocks = [slice(start, min(start + width, num_chains)) for start in range(0, num_chains, width)]
        if len(blocks) < ranks.size and ranks.leads:
            warn(
                f"{ranks.size - len(blocks)} of {ranks.size} ranks have nothing to do: {num_chains} chains are "
                f"{len(blocks)} blocks; set chains_per_block to {-(-num_chains // ranks.size)}",
                RankWarning,
            )
        shares = [Ranks(rank, ranks.size).share(len(blocks)) for rank in range(ranks.size)]
        self._own = [blocks[i] for i in shares[ranks.rank]]
        self._counts = [sum(blocks[i].stop - blocks[i].start for i in share) for share in shares]
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def at_work(self, device: torch.device) -> Iterator[None]:
        """Evaluate blocks in as many threads as torch may use, each with one of its own."""
        threads = torch.get_num_threads()
        if device.type != "cpu" or not self.target.recorded:
            yield
            return
        workers = min(threads, len(self._own))
        torch.set_num_threads(1)  # for one block, too
        try:
            if workers < 2:
                yield
                return
            with ThreadPoolExecutor(workers) as self._pool:
                yield
        finally:
            self._pool = None
            torch.set_num_threads(threads)

    def evaluate(self, z: Float[Tensor, "C D"], temperature: Float[Tensor, " C"]) -> Phase:
        """Potential and gradient of all chains."""

        def evaluate(rows: slice) -> list[Tensor]:
            return list(self.target(z[rows], temperature[rows]))

        energy, gradient, log_likelihood = self._over_blocks(evaluate, [1, z.shape[1], 1], z)
        return Phase(z, energy[:, 0], gradient, log_likelihood[:, 0], temperature)

    def transition(
        self,
        phase: Phase,
        metric: Metric,
        step_size: Float[Tensor, " C"],
        num_steps: int,
        momentum: Float[Tensor, "C D"],
        log_uniform: Float[Tensor, " C"],
    ) -> Transition:
        """One transition of all chains, see :func:`~pirl.infer.hmc.transition`."""

        def move(rows: slice) -> list[Tensor]:
            part = Phase(*(getattr(phase, f.name)[rows] for f in fields(Phase)))
            moved = transition(self.target, part, metric, step_size[rows], num_steps, momentum[rows], log_uniform[rows])
            own, end = moved.phase, moved
            return [own.z, own.energy, own.gradient, own.log_likelihood, end.proposal, end.velocity, end.acceptance,
                    end.hamiltonian, end.diverging]  # fmt: skip

        size = phase.z.shape[1]
        parts = self._over_blocks(move, [size, 1, size, 1, size, size, 1, 1, 1], phase.z)
        z, energy, gradient, log_likelihood, proposal, velocity, *rest = parts
        now = Phase(z, energy[:, 0], gradient, log_likelihood[:, 0], phase.temperature)
        return Transition(now, proposal, velocity, *(column[:, 0] for column in rest))

    def _over_blocks(self, function: Callable[[slice], list[Tensor]], sizes: list[int], like: Tensor) -> list[Tensor]:
        """Columns ``[C, size]`` of all chains, those of other ranks too."""

        def joined(rows: slice) -> Tensor:
            with torch.no_grad():
                return torch.cat([x.reshape(rows.stop - rows.start, -1) for x in function(rows)], dim=1)

        mapped = map(joined, self._own) if self._pool is None else self._pool.map(joined, self._own)
        own = torch.cat([like.new_empty(0, sum(sizes)), *mapped])
        return [laid_out(x) for x in self.ranks.gather(own, self._counts).split(sizes, dim=1)]
