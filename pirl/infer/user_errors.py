"""Errors that a user's model raises: which of them mean that there is no density, and what is told of the others."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch

from pirl.errors import PirlError

NO_DENSITY = (ArithmeticError, torch.linalg.LinAlgError)
"""What a model may raise where it has no density: for pirl's own errors of that kind, see :mod:`pirl.errors`."""


def place_of(error: BaseException) -> str:
    """Where in a user's code it arose, for a message; nothing where that is not known."""
    others = (sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
    folders = (*torch.__path__, *pyro.__path__, Path(__file__).parents[1], *others)
    own = tuple(f"{folder}{os.sep}" for folder in folders)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    return f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def own_error(error: BaseException) -> PirlError | None:
    """What pirl said where Pyro wrapped it, or added a table of shapes to it; None where it was not pirl."""
    reason: BaseException | None = error
    while isinstance(reason, (PirlError, ValueError, RuntimeError)):  # Pyro wraps no others
        cause = reason.__cause__
        repeated = type(cause) is type(reason) and str(cause) != "" and str(reason).startswith(str(cause))
        if isinstance(reason, PirlError) and not repeated:
            return reason
        reason = cause
    return None


@contextmanager
def own_errors() -> Iterator[None]:
    """Let pirl's errors through as they were raised, without what Pyro makes of them."""
    try:
        yield
    except Exception as error:
        said = own_error(error)
        if said is None:
            raise
        raise said from said.__cause__
