"""The live view of a run: one line, on a terminal, in a notebook or in a log, of how far it is and how it goes."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pirl.convergence import FEWEST_DRAWS, ess_bulk

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL, LOG_INTERVAL = 0.25, 60.0
"""Seconds between two updates of a line, and between two lines of a log."""

ESS_INTERVAL, ESS_SHARE = 2.0, 0.02
"""Seconds between two estimates of the effective sample size, and the share of the run's time that they may take."""

MOST_PARAMETERS, MOST_DRAWS = 50, 20_000


class LiveView:
    """Show the state of a run while it lasts: one line that changes, on a terminal or in a notebook.

    Elsewhere standard error is somebody's log, of a batch job say: a line a minute, and no view of shorter runs.

    Args:
        label: what runs, the name of an engine.
        total: number of steps of the whole run.
        shown: False shows nothing.
        console: a terminal of rich's to write to, in place of standard error.

    Example:
        >>> with LiveView("nuts", 2000, shown=True) as view:
        ...     view.update(1, warmup=True, step_size=0.5)
    """

    def __init__(self, label: str, total: int, shown: bool, *, console: Console | None = None) -> None:
        self.label, self.total, self.shown = label, total, shown
        self._console = console
        self._display: _Terminal | _Notebook | _Log | None = None
        self._next, self._told = 0.0, True
        self._ess = _Ess()
        self._pace: deque[tuple[float, int]] = deque(maxlen=60)  # the last quarter of a minute; of a log, hour

    def __enter__(self) -> LiveView:
        """Open the display, if there is one."""
        if self.shown:
            self._display = _open(self._console)
        self._next = self._began = time.monotonic()
        if isinstance(self._display, _Log):
            self._next, self._told = self._began + LOG_INTERVAL, False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the line away from a terminal; in a notebook its last state stays."""
        display, self._display = self._display, None
        if display is not None:
            display.close()

    @property
    def due(self) -> bool:
        """Whether an update now would be shown: what is dear to compute can wait until it is."""
        return self._display is not None and (not self._pace or time.monotonic() >= self._next)

    def update(
        self,
        done: int,
        *,
        warmup: bool | None = None,
        divergences: int = 0,
        step_size: float | None = None,
        acceptance: float | None = None,
        draws: Callable[[], np.ndarray | None] | None = None,
        note: str = "",
    ) -> None:
        """Say how far the run is; costs less than a microsecond where nothing is due to be shown.

        Args:
            done: number of steps made.
            warmup: whether the run is warming up or sampling; None where there is no such thing.
            divergences: divergent transitions after warm-up.
            step_size, acceptance: of late.
            draws: gives the draws so far, ``[chain, draw, parameter]``; called every few seconds while sampling.
            note: anything else.
        """
        if self._display is None:
            return
        now = time.monotonic()
        if not self._pace:
            self._pace.append((now, done))
        if now < self._next and not (done >= self.total and self._told):
            return
        self._pace.append((now, done))
        if draws is not None and not warmup:
            self._ess.refresh(draws, now - self._began)
        phase = {True: "warm-up", False: "sampling", None: ""}[warmup]
        facts = [
            f"{divergences:,} divergence{'s' * (divergences != 1)}" if divergences else "",
            f"ESS {self._ess.least:,.0f}" if self._ess.least is not None and not warmup else "",
            f"step {step_size:.2g}" if step_size is not None else "",
            f"accept {acceptance:.2f}" if acceptance is not None else "",
            note,
        ]
        words = [f"{self.label} {phase}".strip(), f"{done:,}/{self.total:,}", self._time_left(), *filter(None, facts)]
        self._display.show("  ".join(words), done / max(self.total, 1))
        self._next, self._told = time.monotonic() + self._display.interval, True

    def _time_left(self) -> str:
        """At the pace of the last seconds, hours:minutes:seconds."""
        (then, before), (now, done) = self._pace[0], self._pace[-1]
        if done <= before or now <= then:
            return "-:--" if done < self.total else _clock(now - self._began)
        left = (self.total - done) * (now - then) / (done - before)
        return f"{_clock(left)} left" if done < self.total else _clock(now - self._began)


@contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[float, str], None]]:
    """Yield ``update(done, note)`` of a :class:`LiveView`."""
    with LiveView(label, total, shown) as view:
        yield lambda done, note: view.update(int(done), note=note)


def say(line: str, shown: bool) -> None:
    """Write a line that stays, above the live view; a terminal that cannot be written to is no reason to end a run."""
    if shown and sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(f"pirl: {line}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class _Ess:
    """The smallest bulk effective sample size so far, estimated seldom enough not to slow the run."""

    def __init__(self) -> None:
        self.least: float | None = None
        self._spent = 0.0
        self._next = ESS_INTERVAL
        self._per_number = 1e-6  # seconds, on a slow machine; learnt from each estimate

    def refresh(self, draws: Callable[[], np.ndarray | None], elapsed: float) -> None:
        """Estimate anew if it is time to, after ``elapsed`` seconds of the run."""
        if elapsed < self._next:
            return
        began = time.perf_counter()
        values = draws()
        if values is not None and values.shape[1] >= FEWEST_DRAWS and values.shape[2]:
            self._estimate(values, ESS_SHARE * elapsed - self._spent)
        took = time.perf_counter() - began
        self._spent += took
        self._next = max(elapsed + ESS_INTERVAL, (self._spent + took) / ESS_SHARE)

    def _estimate(self, values: np.ndarray, seconds: float) -> None:
        """Estimate from some of the parameters and draws, unless even that is likely to take longer."""
        chains, count, size = values.shape
        columns = np.linspace(0, size - 1, min(size, MOST_PARAMETERS)).astype(int)
        # Thinning loses little where draws depend on each other, and makes the estimate cautious.
        step = max(1, chains * count // MOST_DRAWS)
        if chains * (count // step) * len(columns) * self._per_number > seconds:
            return
        began = time.perf_counter()
        chosen = values[:, ::step][:, :, columns].astype(float)
        sizes = ess_bulk(chosen[..., np.isfinite(chosen).all((0, 1))])
        if np.isfinite(sizes).any():
            self.least = float(np.nanmin(sizes))
        self._per_number = (time.perf_counter() - began) / chosen.size


# ------------------------------------------------------------------------------------------------------------- displays


def _open(console: Console | None) -> _Terminal | _Notebook | _Log | None:
    if console is not None:
        return _Terminal(console)
    if _in_notebook():
        return _Notebook()
    try:
        terminal = sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return None
    return _Terminal(None) if terminal else _Log()


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, or one that builds on it)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class _Terminal:
    """A line, drawn over itself, behind a bar if there is room; gone at the end."""

    interval = INTERVAL

    def __init__(self, console: Console | None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(stderr=True)
        # What the model prints stays where it was sent to, unless that is this terminal too.
        shared = sys.stdout is not None and sys.stdout.isatty()
        self.live = Live(console=self.console, auto_refresh=False, transient=True, redirect_stdout=shared)
        self.live.start()

    def show(self, line: str, share: float) -> None:
        """Replace what was shown; ``share`` of the work is done."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # One line, whatever the width: the last words go first.
        room = self.console.width - 1
        bar = min(24, max(0, room - len(line) - 2))
        row = Table.grid(padding=(0, 2, 0, 0))
        cells: list[Any] = [Text(line, no_wrap=True, overflow="ellipsis")]
        if bar >= 6:
            cells.insert(0, ProgressBar(total=1.0, completed=share, width=bar))
        row.add_row(*cells)
        self.live.update(row, refresh=True)

    def close(self) -> None:
        """Give the place back."""
        self.live.stop()


class _Log:
    """Line after line, none of them in the first minute."""

    interval = LOG_INTERVAL

    def show(self, line: str, share: float) -> None:
        """Write the line; a log that cannot be written to is no reason to end the run."""
        say(line, shown=True)

    def close(self) -> None:
        """What is written stays."""


class _Notebook:
    """One line of output, replaced in place. (Rich would need ipywidgets for that.)"""

    interval = INTERVAL

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, line: str, share: float) -> None:
        """Replace what was shown; ``share`` of the work is done."""
        from IPython.display import display

        filled = round(20 * share)
        content = {"text/plain": f"{'█' * filled}{'░' * (20 - filled)}  {line}"}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)

    def close(self) -> None:
        """Leave the last line: it tells a reader of the notebook what was run."""
