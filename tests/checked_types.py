"""Types and shapes of pirl's functions, checked while tests run: the first hundred calls of each, in each test.

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
from types import CodeType
from typing import Any

import jaxtyping

CALLS = 100
"""Of each function in each test."""

calls: Counter[CodeType] = Counter()
"""By the function as it is written: those that are defined anew each time count together."""

every_call = jaxtyping.jaxtyped


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
    code = function.__code__
    checked: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        __tracebackhide__ = True
        if calls[code] >= CALLS:
            return function(*args, **kwargs)
        calls[code] += 1
        if checked is None:
            # Beartype deplores types of other libraries (Pyro's constraints), once.
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                checked = every_call(function, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call


def install(package: str) -> None:
    """Check what is imported from ``package`` hereafter."""
    jaxtyping.jaxtyped = first_calls
    jaxtyping.install_import_hook(package, "beartype.beartype")
