"""How many cases a test runs, what counts as a hang, and how to look at a process that may crash."""

from __future__ import annotations

import faulthandler
import functools
import os
import pickle
import select
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings

FULL = os.environ.get("PIRL_FUZZ") == "full"

HANG = 60.0
"""Seconds after which a case hangs: hundreds of times what any of them takes, so no measure of speed."""

COUNTS: Counter[str] = Counter()
"""Cases that ran to their end, by test."""


class HangError(Exception):
    """A case has not ended."""


@contextmanager
def deadline(seconds: float = HANG) -> Iterator[None]:
    """Turn a hang into a failure: of Python code by an exception, of compiled code by the end of the process."""

    def rings(*_: Any) -> None:
        raise HangError(f"not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, rings)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def cases(short: int, full: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many cases in the suite, and so many in the full form; stands below ``@given``."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def one(*args: Any, **kwargs: Any) -> None:
            with deadline():
                test(*args, **kwargs)
            COUNTS[os.environ.get("PYTEST_CURRENT_TEST", test.__name__).rpartition(" ")[0]] += 1

        quick = () if FULL else (Phase.explain,)
        return settings(
            max_examples=full if FULL else short,
            deadline=None,
            database=None,
            derandomize=not FULL,
            print_blob=False,
            phases=[phase for phase in Phase if phase not in quick],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        )(one)

    return decorate


def in_child(work: Callable[[], Any], seconds: float = HANG) -> Any:
    """What ``work`` returns in a process of its own; a crash of the interpreter, or a hang, becomes an exception."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, which the child does not use
        child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            try:
                answer = pickle.dumps((True, work()))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            with open(writing, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writing)
    content, until = b"", time.monotonic() + seconds
    try:
        while True:
            ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise HangError(f"the child was not done after {seconds:g} seconds")
            part = os.read(reading, 1 << 16)
            if not part:
                break
            content += part
    finally:
        os.close(reading)
        if time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    assert status == 0 and content, f"the interpreter crashed: wait status {status}"
    good, answer = pickle.loads(content)
    assert good, answer
    return answer
