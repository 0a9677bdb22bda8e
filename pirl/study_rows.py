"""What the replicates of a study found, a row of numbers each: made, saved, shared by processes, and laid out."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from pirl.errors import (
    CheckpointError,
    CheckpointWarning,
    InterruptedWarning,
    ModelError,
    OptionError,
    PirlError,
    first_line,
    warn,
)
from pirl.infer.checkpoint import Arrays, Checkpoint, open_checkpoint
from pirl.infer.datatree import Named
from pirl.infer.progress import progress_bar, say
from pirl.infer.ranks import Ranks
from pirl.infer.replicated import NotAtOnceError
from pirl.infer.user_errors import NO_DENSITY
from pirl.quantities import QUANTILES
from pirl.replicates import Comparison, Study

__all__ = ["COLUMNS", "Rows", "groups_of"]

COLUMNS = 4 + len(QUANTILES)
"""Numbers that are kept of each element of a quantity: rank, truth, mean, sd, quantiles."""


class _Tail(NamedTuple):
    """The batch that was made last: where it starts, of how many, and whether they are made one by one."""

    start: int = 0
    size: int = 0
    alone: bool = False


class Rows:
    """What replicates found, a row of numbers each: this process's own, and those of all at the end.

    Args:
        batch: replicates that are sampled at once; where that fails, one by one, unless it ``must`` be.
    """

    def __init__(self, study: Study, num_replicates: int, ranks: Ranks, batch: int, must: bool) -> None:
        self.study, self.num_replicates, self.ranks, self.batch, self.must = study, num_replicates, ranks, batch, must
        # Every so-many-th, so that a study of more replicates has the same first ones.
        self.numbers = range(ranks.rank, num_replicates, ranks.size)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.done: list[np.ndarray] = []
        self.spare: list[np.ndarray] = []
        """What a file has of a study of more replicates, which it keeps."""
        self.ways: list[bool] = []
        """Of each that is done, whether it was sampled by itself."""
        self.reasons: dict[int, str] = {}
        """Of those that failed, why."""
        self.why_apart = ""
        """Why some were sampled by themselves, though others were to be sampled with them."""
        self.tail = _Tail()
        self.unsaved = False

    def fill(
        self,
        one: Callable[[int], Comparison],
        many: Callable[[Sequence[int], Callable[[float], None]], list[Callable[[], Comparison]]],
        path: str | os.PathLike[str] | None,
        identity: Mapping[str, Any],
        numbers: Sequence[float],
        progress: bool,
    ) -> None:
        """Make the replicates that are missing, saving them on the way.

        Args:
            one, many: make a replicate, and many at once, of which each is then compared with its truth.
            path: of the checkpoint, which knows its study again by ``identity``, and to rounding by ``numbers``.
            progress: say how far it is.
        """
        checkpoint = self._open(path, {**identity, "batch": self.batch}, numbers)
        visible = progress and self.ranks.leads
        if checkpoint is not None and self.done + self.spare:
            have, want = len(self.done) + len(self.spare), len(self.numbers)
            share = " of this process" if self.ranks.size > 1 else ""
            again = f", {len(self.spare)} of them made anew with the rest of their batch" if self.spare else ""
            rest = f"{have:,} of {want:,} replicates{share}; the study goes on from there{again}"
            told = f"all {want:,} replicates{share}" if len(self.done) >= want else rest
            say(f"{checkpoint.path} has {told}", visible)
        bar = progress_bar("calibrate", len(self.numbers), visible)
        with bar as update, _leaving_in_order(checkpoint is not None):
            try:
                while (before := len(self.done)) < len(self.numbers):
                    start = before // self.batch * self.batch
                    whole = self.numbers[start : start + self.batch]
                    if self.tail[:2] != (start, len(whole)):
                        self.tail = _Tail(start, len(whole), alone=len(whole) == 1)
                    if not self.tail.alone:
                        # The last of a batch is done when all of them are compared with their truths.
                        last = before + len(whole) - 1
                        shown = lambda share: update(min(before + share * len(whole), last), "")  # noqa: B023, E731
                        self._add_all(many, whole, shown)
                    else:
                        number = self.numbers[before]
                        self._append([self._row(number, partial(one, number))], alone=True)
                    failed = sum(bool(row[-1]) for row in self.done)
                    update(len(self.done), f"{failed} failed" if failed else "")
                    self._save(checkpoint)
            except KeyboardInterrupt:
                if not self.done:
                    size = min(self.batch, len(self.numbers))
                    hint = f": {size} at once; a smaller batch (--batch) is done sooner" if size > 1 else ""
                    raise KeyboardInterrupt(f"interrupted before the first replicates were done{hint}") from None
                again = f"; the same call goes on from {path}" if checkpoint else ""
                warn(f"interrupted after {len(self.done)} replicates{again}", InterruptedWarning)
            except SystemExit as left:
                self._save(checkpoint, now=True)
                if left.code == 128 + signal.SIGTERM and self.done and not self.unsaved and self.ranks.leads:
                    after = f" after {len(self.done)} replicates" if self.ranks.size == 1 else ""
                    say(f"terminated{after}; the same call goes on from {path}", shown=True)
                raise
            finally:
                self._save(checkpoint, now=True)

    def _save(self, checkpoint: Checkpoint | None, now: bool = False) -> None:
        if checkpoint is None or not self.unsaved or not (now or checkpoint.due):
            return
        try:
            checkpoint.save(self._arrays())
            self.unsaved = False
        except CheckpointError as error:  # what was made is worth more than the file
            warn(f"{error}; the study goes on", CheckpointWarning)

    def _add_all(
        self,
        many: Callable[[Sequence[int], Callable[[float], None]], list[Callable[[], Comparison]]],
        numbers: Sequence[int],
        shown: Callable[[float], None],
    ) -> None:
        """Make replicates at once; or, where that cannot be done, have them made one by one."""
        try:
            compared = many(numbers, shown)
        except OptionError:
            raise
        except (PirlError, *NO_DENSITY) as error:
            reason = first_line(error)
            if self.must and not self.done:
                kind = type(error) if isinstance(error, ModelError) else ModelError
                raise kind(f"{reason}; with batch=1 replicates are sampled one by one") from error
            self.why_apart = self.why_apart or reason
            self.spare = []  # of a batch that was made otherwise
            if isinstance(error, NotAtOnceError):
                self.batch = 1  # of others, too
            else:  # one of them has no start, say: by itself it fails by itself
                self.tail = self.tail._replace(alone=True)
            return
        self._append([self._row(*each) for each in zip(numbers, compared, strict=True)], alone=False)

    def _row(self, number: int, one: Callable[[], Comparison]) -> np.ndarray | Exception:
        """What a replicate found, or why it failed."""
        try:
            row = self._numbers_of(one())
        except (PirlError, *NO_DENSITY) as error:
            self.reasons[number] = first_line(error)
            return error
        self.reasons.pop(number, None)  # of the same one, otherwise made
        return row

    def _append(self, rows: Sequence[np.ndarray | Exception], alone: bool) -> None:
        """Keep what was made; where all failed from the first on, as the others will, raise the first reason."""
        known = next((row for row in [*self.done, *rows] if isinstance(row, np.ndarray)), None)
        if known is None:
            raise next(row for row in rows if isinstance(row, Exception))
        failed = np.append(np.full(len(known) - 1, np.nan), 1.0)
        self.done += [row if isinstance(row, np.ndarray) else failed for row in rows]
        self.ways += [alone] * len(rows)
        self.spare = self.spare[len(rows) :]
        self.unsaved = True

    def _numbers_of(self, found: Comparison) -> np.ndarray:
        """A row; all have the same quantities, of the same shapes."""
        shapes = {name: x.truth.shape for name, x in found.quantities.items()}
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            name = next(iter({**self.shapes, **shapes}.items() - self.shapes.items()), (next(iter(shapes)), ()))[0]
            raise OptionError(f"quantity {name!r} has shape {shapes.get(name)} for one data set and another for others")
        # By name: files and processes may have been asked for quantities in other orders.
        ordered = [found.quantities[name] for name in sorted(self.shapes)]
        columns = [column.reshape(-1).astype(float) for x in ordered for column in x]
        return np.concatenate([*columns, [found.ess, found.rhat, found.divergences, 0.0]])

    def _open(
        self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any], numbers: Sequence[float]
    ) -> Checkpoint | None:
        if path is None:
            return None
        own = os.fspath(path) + (f".{self.ranks.rank}" if self.ranks.size > 1 else "")
        potential = self.study.potential(self.study.draw(0))
        checkpoint = open_checkpoint(own, potential, {**identity, "processes": self.ranks.size}, numbers)
        if (arrays := checkpoint.load()) is not None:
            told = json.loads(arrays["layout"].item())
            self.shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}
            self.batch = min(self.batch, told["batch"])
            self.why_apart, self.tail = told["why_apart"], _Tail(*told["tail"])
            saved = len(arrays["rows"])
            kept = len(self.numbers) if saved >= len(self.numbers) else self._whole(saved)
            self.done, self.spare = list(arrays["rows"][:kept]), list(arrays["rows"][kept:])
            self.ways = told["ways"][:kept]
            self.reasons = {int(number): reason for number, reason in told["reasons"].items()}
        return checkpoint

    def _whole(self, saved: int) -> int:
        """How many of the rows that were saved stay: all, but for those of a batch that is larger now, or not whole."""
        start = max(saved - 1, 0) // self.batch * self.batch
        size = min(self.batch, len(self.numbers) - start)
        goes_on = self.tail == _Tail(start, size, alone=True)
        return saved if goes_on or saved - start == self.batch else start

    def _arrays(self) -> Arrays:
        known = {name: getattr(self, name) for name in ("shapes", "reasons", "batch", "ways", "why_apart", "tail")}
        layout = json.dumps(known)
        rows = np.stack([*self.done, *self.spare])
        return {"step": np.array(len(rows)), "rows": rows, "layout": np.array(layout)}

    def gathered(self) -> Float[np.ndarray, "R width"]:
        """The rows of all processes, in the order of the replicates; from then on the reasons are those of all, too."""
        failed = {number for number, row in zip(self.numbers, self.done, strict=False) if row[-1]}
        ours = {number: reason for number, reason in self.reasons.items() if number in failed}
        told = [json.loads(text) for text in self.ranks.gather_text(json.dumps([self.why_apart, ours]))]
        self.why_apart = next((why for why, _ in told if why), "")
        reasons = {int(number): said for _, theirs in told for number, said in theirs.items()}
        self.reasons = dict(sorted(reasons.items()))
        self.together, self.apart = self.ranks.any(not all(self.ways), any(self.ways))
        whole = len(range(0, self.num_replicates, self.ranks.size))
        own = torch.full((whole, len(self.done[0])), torch.nan, dtype=torch.float64, device="cpu")
        own[: len(self.done)] = torch.from_numpy(np.stack(self.done))
        # Where processes talk to each other.
        table = self.ranks.gather(own.to(torch.empty(0).device), [whole] * self.ranks.size).cpu()
        rows = table.reshape(self.ranks.size, whole, -1).transpose(0, 1).flatten(0, 1).numpy()
        return rows[~np.isnan(rows[:, -1])]  # made, though perhaps failed


def groups_of(
    rows: Float[np.ndarray, "R width"],
    shapes: Mapping[str, tuple[int, ...]],
    num_draws: int,
    dims: Mapping[str, Sequence[str | None]],
    seed: int,
) -> dict[str, Named]:
    """The groups of the result, from what :class:`Rows` keeps."""
    groups: dict[str, Named] = {name: {} for name in ("prior_sbc", "ranks", "prior", "recovery")}
    luck = np.random.default_rng(seed)
    places, start = dict[str, slice](), 0
    for name in sorted(shapes):
        places[name] = slice(start, start + COLUMNS * int(np.prod(shapes[name])))
        start = places[name].stop
    for name, shape in shapes.items():
        names = tuple(dims.get(name, ()))
        names = (*(None,) * (len(shape) - len(names)), *names)
        part = rows[:, places[name]].reshape(1, len(rows), COLUMNS, *shape)
        rank, truth, moments = part[:, :, 0], part[:, :, 1], part[:, :, 2:]
        over = ("chain", "draw", *names)
        groups["prior_sbc"][name] = (over, (rank + luck.random(rank.shape)) / (num_draws + 1))
        groups["ranks"][name] = (over, rank)
        groups["prior"][name] = (over, truth)
        groups["recovery"][name] = (("chain", "draw", "summary", *names), moments)
    summary = ["mean", "sd", *(f"q{round(100 * q)}" for q in QUANTILES)]
    groups["recovery"]["summary"] = (("summary",), np.array(summary))
    columns = dict(zip(("ess", "rhat", "divergences", "failed"), rows[:, start:].T, strict=True))
    groups["sample_stats"] = {name: (("chain", "draw"), value[None]) for name, value in columns.items()}
    return groups


@contextmanager
def _leaving_in_order(saves: bool) -> Iterator[None]:
    """SIGTERM ends a study that saves itself as an exception does; only the main thread may listen."""
    if not saves or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.getsignal(signal.SIGTERM)
    if before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
