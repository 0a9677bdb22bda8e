"""Chains over processes: ``torchrun`` starts one process (rank) a device, and each evaluates whole blocks of chains.

Everything that chains have in common (step size, mass matrix, their history) is computed by every rank from the
gathered chains, in their order, so that draws are the same bits for any number of ranks.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as distributed
from torch import Tensor

from pirl.errors import RankError, first_line

TIMEOUT = timedelta(minutes=30)
"""For how long a rank waits for the others' share of one step before it gives up."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run; by default alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes, shows and returns what all have computed."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` items are this rank's: consecutive ones, at most one more than any other's."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        """Join the rows ``[n, *rest]`` of all ranks, in their order; ``counts`` says how many each rank has.

        Raises:
            RankError: another rank ended or does not answer.
        """
        if self.size == 1:
            return own
        most = max(counts)
        padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]).contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        with _named():
            distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_text(self, own: str) -> list[str]:
        """The texts of all ranks, in their order.

        Raises:
            RankError: another rank ended or does not answer.
        """
        if self.size == 1:
            return [own]
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        letters = torch.tensor(list(own.encode()), dtype=torch.uint8, device=device)
        counts = self.gather(torch.tensor([len(letters)], device=device), [1] * self.size).tolist()
        parts = self.gather(letters, counts).split(counts)
        return [bytes(part.tolist()).decode() for part in parts]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank raised it: so that all do the same next.

        Raises:
            RankError: another rank ended or does not answer.
        """
        if self.size == 1:
            return flags
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        raised = torch.tensor(flags, dtype=torch.int32, device=device)
        with _named():
            distributed.all_reduce(raised, distributed.ReduceOp.MAX)
        return tuple(bool(flag) for flag in raised.tolist())

    def agree(self, number: int) -> bool:
        """Whether all ranks have the same number."""
        device = "cuda" if self.size > 1 and distributed.get_backend() == "nccl" else "cpu"
        numbers = self.gather(torch.tensor([number], device=device), [1] * self.size)
        return bool((numbers == number).all())


ALONE = Ranks()
"""A run in one process."""


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"another process of this run has ended or does not answer, so this one ends too: {first_line(error)}"
        ) from error


def join(device: torch.device) -> Ranks:
    """Join the process group that ``torchrun`` announces, or use one that exists; alone without either.

    It is left when the process ends: of two groups one after the other, the second may find the first's addresses.
    """
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not distributed.is_available() or not (launched or distributed.is_initialized()):
        return ALONE
    if not distributed.is_initialized():
        # Imported by recordings, and keeps every group that is there then: its threads would outlive the interpreter.
        import_module("torch._dynamo")
        with _named():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
