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
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from pirl.errors import (
    CheckpointError,
    CheckpointWarning,
    InterruptedWarning,
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
        self.reasons: dict[int, str] = {}
        self.together = self.apart = False
        """Whether some were sampled at once, and some one by one."""
        self.why_apart = ""
        """Why the model cannot be sampled at once."""
        self.alone_until = 0
        """Replicates before this one are made one by one: their batch could not be sampled at once."""
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
                while missing := self.numbers[len(self.done) :][: self.batch]:
                    # The last of a batch is done when all of them are compared with their truths.
                    before, last = len(self.done), len(self.done) + len(missing) - 1
                    shown = lambda share: update(min(before + share * len(missing), last), "")  # noqa: B023, E731
                    alone = len(missing) == 1 or before < self.alone_until
                    if alone or not self._add_all(many, missing, shown):
                        self.apart = True
                        self._add(missing[0], partial(one, missing[0]))
                    update(len(self.done), f"{len(self.reasons)} failed" if self.reasons else "")
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
    ) -> bool:
        """Make replicates at once; False where that cannot be done, of these data sets or of any."""
        try:
            compared = many(numbers, shown)
        except NotAtOnceError as error:
            if self.must and not self.done:
                raise NotAtOnceError(f"{error}; with batch=1 replicates are sampled one by one") from error
            self.batch, self.why_apart = 1, first_line(error)  # those that follow go the same way
            return False
        except (PirlError, *NO_DENSITY):  # one of them has no start, say: by itself it fails by itself
            self.alone_until = len(self.done) + len(numbers)
            return False
        self.together = True
        for number, found in zip(numbers, compared, strict=True):
            self._add(number, found)
        return True

    def _add(self, number: int, one: Callable[[], Comparison]) -> None:
        try:
            self._keep(one())
        except (PirlError, *NO_DENSITY) as error:
            if not self.done:  # as the others will
                raise
            self.reasons[number] = first_line(error)
            self._append(np.append(np.full(len(self.done[0]) - 1, np.nan), 1.0))

    def _append(self, row: np.ndarray) -> None:
        self.done.append(row)
        self.spare = self.spare[1:]
        self.unsaved = True

    def _keep(self, found: Comparison) -> None:
        shapes = {name: x.truth.shape for name, x in found.quantities.items()}
        if not self.done:
            self.shapes = shapes
        if shapes != self.shapes:
            name = next(iter({**self.shapes, **shapes}.items() - self.shapes.items()), (next(iter(shapes)), ()))[0]
            raise OptionError(f"quantity {name!r} has shape {shapes.get(name)} for one data set and another for others")
        # By name: files and processes may have been asked for quantities in other orders.
        ordered = [found.quantities[name] for name in sorted(self.shapes)]
        columns = [column.reshape(-1).astype(float) for x in ordered for column in x]
        self._append(np.concatenate([*columns, [found.ess, found.rhat, found.divergences, 0.0]]))

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
            self.together, self.apart, self.why_apart = told["together"], told["apart"], told["why_apart"]
            self.alone_until = told["alone_until"]
            saved = len(arrays["rows"])
            # Of a study that ended within a batch, a longer one makes that batch anew, as a whole.
            whole = saved >= len(self.numbers) or saved < self.alone_until
            kept = min(saved, len(self.numbers)) if whole else saved // self.batch * self.batch
            self.done, self.spare = list(arrays["rows"][:kept]), list(arrays["rows"][kept:])
            self.reasons = {int(number): reason for number, reason in told["reasons"].items()}
        return checkpoint

    def _arrays(self) -> Arrays:
        ways = {name: getattr(self, name) for name in ("batch", "together", "apart", "why_apart", "alone_until")}
        layout = json.dumps({"shapes": self.shapes, "reasons": self.reasons, **ways})
        rows = np.stack([*self.done, *self.spare])
        return {"step": np.array(len(rows)), "rows": rows, "layout": np.array(layout)}

    def gathered(self) -> Float[np.ndarray, "R width"]:
        """The rows of all processes, in the order of the replicates; from then on reasons and ways are those of all."""
        self.together, self.apart = self.ranks.any(self.together, self.apart)
        told = [json.loads(text) for text in self.ranks.gather_text(json.dumps([self.why_apart, self.reasons]))]
        self.why_apart = next((why for why, _ in told if why), "")
        reasons = {int(number): said for _, theirs in told for number, said in theirs.items()}
        self.reasons = dict(sorted(reasons.items()))
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
