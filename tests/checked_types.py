"""Types and shapes of pirl's functions, checked while tests run: of each its first hundred calls in each test, and one
in a thousand of those after.

jaxtyping's import hook checks every call. An engine calls the same few functions a hundred thousand times, from the
same lines: that took more than half of the suite's time, and most of it for functions defined inside functions, whose
checks are compiled anew each time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from threading import RLock
from typing import Any

import jaxtyping

CALLS = 100
"""Of each function in each test."""

LATER = 997
"""Of the calls after those, each so many-th is checked: no multiple of what engines do by tens and hundreds."""

calls: Counter[int] = Counter()
"""By the code of a function: those that are defined anew each time count together."""

every_call = jaxtyping.jaxtyped
compiling = RLock()
"""Chains may run in threads, and warnings are filtered for all of them."""


def first_calls(function: Any = None, *, typechecker: Callable[..., Any] | None) -> Any:
    """What the hook decorates each function and class with, in place of jaxtyping's ``jaxtyped``."""
    if function is None:
        return functools.partial(first_calls, typechecker=typechecker)
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = first_calls(function.__init__, typechecker=typechecker)
        return function
    if not inspect.isfunction(function):
        return every_call(function, typechecker=typechecker)
    code = id(function.__code__)
    checked: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        __tracebackhide__ = True
        number = calls[code]
        calls[code] = number + 1
        if number >= CALLS and number % LATER:
            return function(*args, **kwargs)
        if checked is None:
            # Beartype deplores types of other libraries (Pyro's constraints), once.
            with compiling, warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                checked = every_call(function, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call


def install(package: str) -> None:
    """Check what is imported from ``package`` hereafter."""
    jaxtyping.jaxtyped = first_calls
    jaxtyping.install_import_hook(package, "beartype.beartype")
