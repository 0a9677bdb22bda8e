"""The live view: one line on a terminal or in a notebook, a line a minute elsewhere, at hardly any cost."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pirl.convergence import ess_bulk
from pirl.infer import progress
from pirl.infer.progress import LiveView

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """A time that passes when told to; looking at it and computing take none."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal:
    """What was written to a terminal, and what can be read on it."""

    def __init__(self, width: int = 140) -> None:
        self.stream = io.StringIO()
        self.console = Console(file=self.stream, force_terminal=True, width=width, color_system=None)

    def lines(self) -> list[str]:
        """Each state of the line."""
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\r", self.stream.getvalue())
        lines = [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
        return [line for line, _ in itertools.groupby(lines)]  # the last is drawn again before it is wiped off


def test_the_line_says_how_far_the_run_is_and_how_it_goes(clock: Clock) -> None:
    terminal = Terminal()
    with LiveView("nuts", 2000, True, console=terminal.console) as view:
        view.update(1, warmup=True, step_size=0.123, acceptance=0.5)
        clock.now += 10
        view.update(501, warmup=True, step_size=0.123, acceptance=0.5, note="chain 2")
        clock.now += 10
        view.update(1500, warmup=False, divergences=1, step_size=0.25, acceptance=0.789)
        clock.now += 5
        view.update(2000, warmup=False, divergences=1200)
    first, second, third, last = terminal.lines()
    assert first.endswith("nuts warm-up  1/2,000  -:--  step 0.12  accept 0.50")
    # 500 steps in 10 seconds leave 1499 for 30; 1499 in 20 leave 500 for 7.
    assert second.endswith("nuts warm-up  501/2,000  0:30 left  step 0.12  accept 0.50  chain 2")
    assert third.endswith("nuts sampling  1,500/2,000  0:07 left  1 divergence  step 0.25  accept 0.79")
    assert last.endswith("nuts sampling  2,000/2,000  0:25  1,200 divergences")


def test_updates_are_shown_at_most_every_quarter_of_a_second(clock: Clock) -> None:
    terminal = Terminal()
    with LiveView("chees", 10_000, True, console=terminal.console) as view:
        for step in range(1, 10_001):
            clock.now += 0.01
            due = view.due
            shown = len(terminal.stream.getvalue())
            view.update(step, warmup=step < 5000)
            assert (len(terminal.stream.getvalue()) > shown) == (due or step == 10_000)
        assert not view.due
    assert 390 <= len(terminal.lines()) <= 402
    assert "10,000/10,000" in terminal.lines()[-1]
    assert not view.due


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_the_line_is_one_line_on_every_terminal(clock: Clock, width: int) -> None:
    terminal = Terminal(width)
    with LiveView("nuts", 2000, True, console=terminal.console) as view:
        for step in (100, 1000, 1999):
            clock.now += 1
            view.update(step, warmup=False, divergences=3, step_size=0.1, acceptance=0.8, note="[red]chain 3")
    assert len(terminal.lines()) == 3
    assert max(map(len, terminal.lines())) <= width
    assert width < 200 or "[red]chain 3" in terminal.lines()[-1]


def draws_of(values: np.ndarray) -> tuple[Callable[[], np.ndarray], list[int]]:
    calls: list[int] = []

    def draws() -> np.ndarray:
        calls.append(len(calls))
        return values

    return draws, calls


def test_the_smallest_effective_sample_size_is_shown_while_sampling(clock: Clock) -> None:
    numbers = np.random.default_rng(0)
    values = numbers.normal(size=(4, 100, 30))
    values[..., 17] = np.cumsum(values[..., 17], axis=1)
    values[..., 5] = np.nan
    values[..., 6] = 1.0
    draws, calls = draws_of(values)
    terminal = Terminal()
    with LiveView("nuts", 1000, True, console=terminal.console) as view:
        for step in range(1, 101):
            clock.now += 0.5
            view.update(step, warmup=step < 10, draws=draws)
    # 45 seconds of sampling, one estimate every two.
    assert len(calls) == 23
    assert f"ESS {ess_bulk(values)[17]:.0f}" in terminal.lines()[-1]
    assert all("ESS" not in line for line in terminal.lines()[:9])


def test_estimates_take_a_fiftieth_of_the_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def dear(values: np.ndarray) -> np.ndarray:
        assert values.shape[2] <= progress.MOST_PARAMETERS
        assert values.shape[0] * values.shape[1] <= 2 * progress.MOST_DRAWS
        clock.now += 0.3
        return ess_bulk(values[:, :10])

    monkeypatch.setattr(progress, "ess_bulk", dear)
    draws, calls = draws_of(np.random.default_rng(0).normal(size=(8, 6000, 70)))
    terminal = Terminal()
    with LiveView("nuts", 2000, True, console=terminal.console) as view:
        for step in range(1, 2000):
            clock.now += 0.5
            view.update(step, warmup=False, draws=draws)
    elapsed, computed = clock.now - 100, (clock.now - 100 - 0.5 * 1999) / 0.3
    assert 20 < computed <= 1 + 0.02 * elapsed / 0.3
    assert len(calls) < 100


@pytest.mark.parametrize("values", [None, np.zeros((4, 3, 2)), np.zeros((4, 50, 0)), np.ones((4, 50, 2))])
def test_without_usable_draws_there_is_no_estimate(clock: Clock, values: np.ndarray | None) -> None:
    terminal = Terminal()
    with LiveView("nuts", 1000, True, console=terminal.console) as view:
        for step in (1, 2, 3):
            clock.now += 100
            view.update(step, warmup=False, draws=lambda: values)
    assert len(terminal.lines()) == 3
    assert "ESS" not in terminal.stream.getvalue()


def test_a_run_without_warm_up_has_no_phase(clock: Clock) -> None:
    terminal = Terminal()
    with LiveView("svi", 300, True, console=terminal.console) as view:
        view.update(100, note="ELBO -3.21")
    (line,) = terminal.lines()
    assert line.endswith("svi  100/300  -:--  ELBO -3.21")


def test_a_resumed_run_counts_time_from_where_it_went_on(clock: Clock) -> None:
    terminal = Terminal()
    with LiveView("nuts", 2000, True, console=terminal.console) as view:
        view.update(1001, warmup=False)
        clock.now += 10
        view.update(1101, warmup=False)
    assert "1:30 left" in terminal.lines()[-1]


def test_a_log_gets_a_line_a_minute(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    with LiveView("nuts", 100, True) as view:
        for step in range(1, 101):
            assert view.due == (step % 30 == 1)  # the first is the pace that the second is told from
            view.update(step, warmup=step < 50, draws=lambda: None)
            clock.now += 2
    out, told = capfd.readouterr()
    assert out == ""
    assert told.splitlines() == [
        "pirl: nuts warm-up  31/100  2:18 left",
        "pirl: nuts sampling  61/100  1:18 left",
        "pirl: nuts sampling  91/100  0:18 left",
        "pirl: nuts sampling  100/100  3:18",
    ]


def test_a_log_gets_nothing_of_short_runs_and_where_nothing_is_wanted(
    capfd: pytest.CaptureFixture[str], clock: Clock
) -> None:
    for shown, pause in ((True, 5), (False, 50)):
        with LiveView("nuts", 10, shown) as view:
            for step in range(1, 11):
                clock.now += pause
                assert not view.due or (shown and step == 1)
                view.update(step, warmup=False, draws=lambda: pytest.fail("not looked at"))
    assert capfd.readouterr() == ("", "")
    terminal = Terminal()
    with LiveView("nuts", 10, False, console=terminal.console) as view:
        view.update(10, warmup=False)
    assert terminal.stream.getvalue() == ""


def test_a_log_gets_a_line_of_a_first_step_that_was_long(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    with LiveView("laplace", 2, True) as view:
        clock.now += 600
        view.update(1)
        clock.now += 600
        view.update(2)
    assert capfd.readouterr().err.splitlines() == ["pirl: laplace  1/2  -:--", "pirl: laplace  2/2  20:00"]


def test_a_log_that_cannot_be_written_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "no space left on device")

    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        with LiveView("nuts", 10, True) as view:
            for step in range(1, 11):
                clock.now += 61
                view.update(step, warmup=False)


def test_an_error_leaves_the_terminal_in_order(clock: Clock) -> None:
    terminal = Terminal()
    with pytest.raises(KeyboardInterrupt), LiveView("nuts", 10, True, console=terminal.console) as view:
        view.update(1, warmup=True)
        raise KeyboardInterrupt
    assert terminal.stream.getvalue().rindex("\x1b[?25h") > terminal.stream.getvalue().rindex("\x1b[?25l")
    view.update(2, warmup=True)  # too late, and no error


def test_an_update_that_is_not_due_costs_next_to_nothing(clock: Clock) -> None:
    """A tenth of one that is shown, even with the checks of types that tests add to each call."""

    def seconds(calls: int, pause: float) -> float:
        best = np.inf
        for _ in range(5):
            began = time.perf_counter()
            for step in range(calls):
                clock.now += pause
                view.update(step, warmup=True, divergences=0, step_size=0.1, draws=None)
            best = min(best, (time.perf_counter() - began) / calls)
        return best

    terminal = Terminal()
    with LiveView("nuts", 10**9, True, console=terminal.console) as view:
        assert seconds(2000, pause=0.0) < seconds(50, pause=1.0) / 10


SCRIPT = """
import sys, time
from pirl.infer.progress import LiveView

with LiveView("nuts", 40, True) as view:
    for step in range(1, 41):
        time.sleep(0.02)
        view.update(step, warmup=step < 20)
        if step == 30:
            print("from the model")
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_real_terminal_shows_the_line_and_gets_it_back() -> None:
    import pty

    leader, follower = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.stdout is not None
    # What the program prints goes where it was sent, not to the terminal.
    assert process.stdout.read() == b"from the model\ndone\n"
    process.stdout.close()
    assert process.wait(60) == 0
    text = shown.decode()
    assert "nuts warm-up  1/40" in text
    assert "nuts sampling  40/40" in text
    assert text.count("/40") <= 8
    assert text.rstrip().endswith("\x1b[2K") or text.rindex("\x1b[2K") > text.rindex("40/40")


def test_a_notebook_is_known_by_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    class InteractiveShell: ...

    class TerminalInteractiveShell(InteractiveShell): ...

    class ZMQInteractiveShell(InteractiveShell): ...

    class Colab(ZMQInteractiveShell): ...

    fake = types.ModuleType("IPython")
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert not progress._in_notebook()
    for shell, expected in (
        (None, False),
        (TerminalInteractiveShell(), False),
        (ZMQInteractiveShell(), True),
        (Colab(), True),
    ):
        monkeypatch.setattr(fake, "get_ipython", lambda shell=shell: shell, raising=False)
        assert progress._in_notebook() == expected


def test_a_real_notebook_shows_one_line_that_changes() -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cell = nbformat.v4.new_code_cell(SCRIPT.replace("time.sleep(0.02)", "time.sleep(0.03)"))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    updates: list[str] = []

    class Client(nbclient.NotebookClient):  # type: ignore[name-defined,misc]
        def output(self, outs, msg, display_id, cell_index):  # type: ignore[no-untyped-def]
            if msg["msg_type"] in ("display_data", "update_display_data"):
                updates.append(msg["content"]["data"]["text/plain"])
            return super().output(outs, msg, display_id, cell_index)

    client = Client(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    shown = [output for output in cell.outputs if output.output_type == "display_data"]
    (line,) = [output["data"]["text/plain"] for output in shown]
    assert line.startswith("█" * 20 + "  nuts sampling  40/40")
    assert "".join(output.text for output in cell.outputs if output.get("name") == "stdout") == "from the model\ndone\n"
    assert 1 <= len(updates) <= 10
