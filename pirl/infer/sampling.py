"""The loop of every sampler: warm up, draw, show, save, resume, and stop when asked."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from pirl.errors import (
    CheckpointError,
    CheckpointWarning,
    ConvergenceWarning,
    InterruptedWarning,
    RankError,
    StuckChainsError,
    counted,
    warn,
)
from pirl.infer.checkpoint import Arrays, Checkpoint
from pirl.infer.engine import laid_out
from pirl.infer.potential import Potential
from pirl.infer.progress import LiveView, say
from pirl.infer.ranks import Ranks

Stats = dict[str, Tensor]

FEWEST_TO_JUDGE = 20
"""Draws of which a chain that accepts half its proposals repeats all with probability one in a million."""

FEWEST_REFUSALS = 8
"""Transitions, of all chains together, after which none accepted is no accident."""


class Sampler(ABC):
    """All chains of a run, advanced together.

    The next step depends on the state and on the number of the step alone: random numbers are made from (seed, step).
    """

    label: str
    finished = False
    """Whether there is nothing more to do, for a sampler that decides that itself."""
    note = ""
    """What else to tell while it runs."""

    @abstractmethod
    def advance(self, step: int) -> tuple[Tensor, Stats]:
        """Make one step: where the chains are, ``[C, D]``, and statistics ``[C]``; the same on every rank."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on; called by every rank."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""

    def reached(self, step: int, total: int) -> int:
        """How far the run is, on a scale that ends at ``total``."""
        return step


@dataclass
class Sampled:
    """Draws ``[C, n, D]`` and statistics ``[C, n]``; fewer than asked for where the run was interrupted.

    ``last`` are the statistics ``[C]`` of the last step.
    """

    draws: Tensor
    stats: Stats
    last: Stats
    interrupted: bool


def sample(
    sampler: Sampler,
    *,
    num_warmup: int,
    num_samples: int,
    thin: int,
    progress: bool,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> Sampled:
    """Run a sampler for ``num_warmup + num_samples`` steps, keeping every ``thin``-th draw after warm-up.

    Ctrl-C ends the run after the step at hand: the draws so far are returned, with a warning. A second one interrupts
    at once. With a checkpoint the state is saved every so often, at the end, on Ctrl-C and on SIGTERM, which then
    exits; the same call goes on from there.

    Raises:
        KeyboardInterrupt: Ctrl-C in warm-up, when there are no draws.
        SystemExit: SIGTERM, with a checkpoint.
        CheckpointError: the checkpoint is not of this run, is damaged, or could not be written when there was nothing
            else to keep the run.
    """
    store = _Store(-(-num_samples // thin))
    begin = _resume(sampler, store, checkpoint)
    if not ranks.agree(begin):
        raise RankError("the processes read different checkpoints: put the file on a disk that all of them share")
    total, step = num_warmup + num_samples, begin
    scale = total if num_samples else 100
    shown = progress and ranks.leads
    if checkpoint is not None and begin:
        steps = f"{begin:,} of {total:,} steps" if num_samples else f"{counted(begin, 'step')}, to {sampler.note}"
        whole = begin >= total or sampler.finished
        have = "the whole run" if whole else f"{steps}; the run goes on from there"
        say(f"{checkpoint.path} has {have}", shown)
    asked, leave = _Asked(), False
    with (
        asked.listening(terminate=checkpoint is not None),
        LiveView(sampler.label, scale, shown) as view,
    ):
        while step < total and not sampler.finished:
            draws, stats = sampler.advance(step)
            store.last = stats
            if step >= num_warmup and (step - num_warmup) % thin == 0:
                store.add(draws, stats)
            step += 1
            if view.due or step == total or sampler.finished:
                view.update(
                    sampler.reached(step, scale),
                    warmup=step <= num_warmup if num_samples else None,
                    divergences=store.divergences,
                    step_size=float(stats["step_size"].mean()),
                    acceptance=float(stats["acceptance_rate"].mean()),
                    draws=store.numbers if num_samples else None,
                    note=sampler.note,
                )
            due = checkpoint is not None and ranks.leads and checkpoint.due
            stop, leave, save = ranks.any(asked.to_stop, asked.to_leave, due)
            if stop or leave:
                break
            if save:
                _save(sampler, store, step, checkpoint, ranks, otherwise="the run goes on")
        over = step >= total or sampler.finished
        if step > begin:
            returned = "the draws are returned all the same" if (over or store.count) and not leave else None
            _save(sampler, store, step, checkpoint, ranks, otherwise=returned)
    leave = leave or asked.to_leave  # heard while the last save was made
    if leave or not over:
        _explain(step, store.count, checkpoint, leave, ranks.leads)
    return Sampled(store.draws[:, : store.count], store.taken(), store.last, interrupted=not over)


class _Asked:
    """Whether somebody asked the run to stop (Ctrl-C), or to leave (SIGTERM)."""

    def __init__(self) -> None:
        self.to_stop = self.to_leave = False

    @contextmanager
    def listening(self, terminate: bool) -> Iterator[None]:
        """Only the main thread may listen; others leave signals as they are, and so does who ignores them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in [signal.SIGINT] + [signal.SIGTERM] * terminate}
        listened = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for number in listened:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number in listened:
                signal.signal(number, before[number])

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.to_leave = True
        elif self.to_stop:
            raise KeyboardInterrupt
        else:
            self.to_stop = True


class _Store:
    """Draws and statistics, in memory that is taken once."""

    def __init__(self, size: int) -> None:
        self.size, self.count, self.divergences = size, 0, 0
        self.draws = torch.empty(0, 0, 0)
        self.stats: Stats = {}
        self.last: Stats = {}

    def add(self, draws: Tensor, stats: Stats) -> None:
        if self.count == 0:
            self._take(draws, stats)
        self.draws[:, self.count] = draws.cpu()
        for name, value in stats.items():
            self.stats[name][:, self.count] = value.cpu()
        self.divergences += int(stats["diverging"].sum())
        self.count += 1

    def _take(self, draws: Tensor, stats: Stats) -> None:
        self.draws = torch.empty(len(draws), self.size, draws.shape[1], dtype=draws.dtype, device="cpu")
        self.stats = {
            name: torch.empty(len(draws), self.size, dtype=value.dtype, device="cpu") for name, value in stats.items()
        }

    def numbers(self) -> np.ndarray:
        """The draws so far, ``[chain, draw, parameter]``."""
        return self.draws[:, : self.count].numpy()

    def taken(self) -> Stats:
        """The statistics so far."""
        return {name: value[:, : self.count] for name, value in self.stats.items()}

    def arrays(self) -> Arrays:
        """What a checkpoint keeps."""
        groups = {"last": self.last, "stats": self.taken()}
        arrays = {f"{group}.{name}": x.cpu().numpy() for group, values in groups.items() for name, x in values.items()}
        return arrays | ({"draws": self.numbers()} if self.count else {})

    def load(self, arrays: Arrays) -> None:
        """Take over saved draws, as many as this run asks for."""
        tensors = {name: laid_out(torch.from_numpy(array)) for name, array in arrays.items()}
        self.last = part(tensors, "last")
        if "draws" not in tensors:
            return
        kept = slice(self.size)
        draws, stats = tensors["draws"], part(tensors, "stats")
        self._take(draws[:, 0], {name: value[:, 0] for name, value in stats.items()})
        self.count = draws[:, kept].shape[1]
        self.draws[:, : self.count] = draws[:, kept]
        for name, value in stats.items():
            self.stats[name][:, : self.count] = value[:, kept]
        self.divergences = int(self.stats["diverging"][:, : self.count].sum())


def part(state: Mapping[str, Tensor], group: str) -> Stats:
    """The entries of a group, which are named ``group.name``."""
    prefix = f"{group}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _resume(sampler: Sampler, store: _Store, checkpoint: Checkpoint | None) -> int:
    """Load a checkpoint if there is one; the step to begin with."""
    arrays = checkpoint.load() if checkpoint else None
    if arrays is None:
        return 0
    store.load(arrays)
    state = {name: laid_out(torch.from_numpy(x)) for name, x in arrays.items() if name.startswith("state.")}
    sampler.load_state_dict(part(state, "state"))
    return int(arrays["step"])


def _save(
    sampler: Sampler, store: _Store, step: int, checkpoint: Checkpoint | None, ranks: Ranks, otherwise: str | None
) -> None:
    """Save; where that fails, warn and say what happens otherwise, or raise."""
    if checkpoint is None:
        return
    state = sampler.state_dict()
    if not ranks.leads:
        return
    arrays = {f"state.{name}": value.detach().cpu().numpy() for name, value in state.items()}
    try:
        checkpoint.save({"step": np.array(step), **arrays, **store.arrays()})
    except CheckpointError as error:
        if otherwise is None:
            raise
        warn(f"{error}; {otherwise}", CheckpointWarning)


def _explain(step: int, count: int, checkpoint: Checkpoint | None, leave: bool, leads: bool) -> None:
    """Say what an interrupted run leaves, and end it where it leaves nothing to return."""
    again = f"; the same call goes on from {checkpoint.path}" if checkpoint else ""
    if leave:
        say(f"terminated at step {step}{again}", shown=leads)
        raise SystemExit(128 + signal.SIGTERM)
    if not count:
        raise KeyboardInterrupt(f"interrupted after {step} steps, when there are no draws yet{again}")
    if leads:
        warn(f"interrupted: returning the {count} draws of each chain so far{again}", InterruptedWarning)


def check_moves(potential: Potential, sampled: Sampled) -> None:
    """Say which chains never moved after warm-up; refuse when none did."""
    draws = sampled.draws
    if draws.shape[1] < 2:
        return
    stuck = (draws[:, 1:] == draws[:, :1]).all(-1).all(-1)
    if bool(stuck.all()) and stuck.numel() * (draws.shape[1] - 1) >= FEWEST_REFUSALS:
        point = draws[0, -1].to(torch.empty(0).device)
        where = potential.culprit(potential.unflatten(point))
        raise StuckChainsError(f"no chain accepted a proposal after warm-up: {where}")
    if bool(stuck.any()) and draws.shape[1] >= FEWEST_TO_JUDGE:
        names = stuck.nonzero()[:, 0].tolist()
        some = ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")
        warn(
            f"{len(names)} of {len(draws)} chains never moved after warm-up (chains {some}); their draws are one point",
            ConvergenceWarning,
        )
