"""Every error and warning that pirl raises, by name.

All errors derive from :class:`PirlError`; the command line prints them as one line and exits with status 2. Each also
derives from the built-in class that a caller would expect (``ValueError`` for bad values, ``ImportError`` for a
missing extra).
"""

from __future__ import annotations

import math
import sys
import warnings
from numbers import Integral, Real
from typing import Any

import torch


class PirlError(Exception):
    """Base class of all errors that pirl raises on purpose."""


class InvalidMDPError(PirlError, ValueError):
    """The tables that describe a decision problem are inconsistent (shapes, probabilities, masks, discount)."""


class UnboundedProblemError(InvalidMDPError):
    """An undiscounted problem without a horizon in which some state cannot reach a terminal state."""


class InvalidRewardError(PirlError, ValueError):
    """A reward has the wrong shape, or is NaN or infinite."""


class InvalidPolicyError(PirlError, ValueError):
    """A policy has the wrong shape, or is not a distribution over the available actions."""


class InvalidTrajectoriesError(PirlError, ValueError):
    """Demonstrations are malformed: shapes, types, ranges or padding."""


class ImpossibleTransitionError(InvalidTrajectoriesError):
    """A demonstrated start or transition has probability zero under the dynamics."""


class UnavailableActionError(InvalidTrajectoriesError):
    """A demonstrated action is not available where it was taken."""


class HorizonError(PirlError, ValueError):
    """A horizon or a length is missing, or is shorter than a demonstration."""


class DiscountError(PirlError, ValueError):
    """The trajectory reading of exp(r) was asked for a discounted problem without saying how an episode ends."""


class RewardTimingError(InvalidRewardError):
    """A reward r(s, a, s') was given where a reward is r(s, a)."""


class DivergenceError(PirlError, ArithmeticError):
    """The undiscounted sum of rewards diverges: the partition function or the value is infinite."""


class ConvergenceError(PirlError, ArithmeticError):
    """An iterative solver did not reach its residual."""


class PartitionError(PirlError, ArithmeticError):
    """The partition function cannot be estimated, or not well enough, from the samples that there are."""


class NotUnichainError(PirlError, ValueError):
    """A Markov chain has no unique stationary distribution."""


class ModelError(PirlError, ValueError):
    """A Pyro model cannot be used by the engine that was asked for."""


class DiscreteLatentError(ModelError):
    """The model has a discrete latent site, which gradient-based engines cannot sample."""


class NonFiniteError(ModelError):
    """The log density or its gradient is not finite where it must be; names the site."""


class SimulatorError(PirlError, RuntimeError):
    """A simulator failed in mid-roll-out, or gave states that cannot be; names the step, and chains the cause."""


class StuckChainsError(PirlError, RuntimeError):
    """Every chain is stuck: no proposal was accepted after warm-up."""


class OptionError(PirlError, ValueError):
    """An option has an unknown name or a value that does not fit."""


class PosteriorFileError(PirlError, ValueError):
    """A file is not a posterior that pirl wrote, or it is damaged."""


class OutputError(PirlError, OSError):
    """A result could not be written; what was there before is left as it was."""


class DataError(PirlError, ValueError):
    """A data file is missing or does not have the expected format."""


class MissingDependencyError(PirlError, ImportError):
    """An optional dependency is not installed."""


class EmptyTrajectoriesWarning(UserWarning):
    """There are no demonstrations: the posterior is the prior."""


class ConvergenceWarning(UserWarning):
    """An approximation or a chain has not converged; its numbers should not be trusted."""


class RankError(PirlError, RuntimeError):
    """Another process of a run over several devices has ended or does not answer."""


class RankWarning(UserWarning):
    """Some processes of a run have nothing to do."""


class CheckpointError(PirlError, ValueError):
    """A checkpoint is damaged, belongs to another run, or cannot be written."""


class MemoryLimitError(PirlError, MemoryError):
    """A run needs more memory than there is."""


class InterruptedWarning(UserWarning):
    """Sampling was interrupted: the result has fewer draws than were asked for."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written; the run goes on, and the last good checkpoint is intact."""


_BELOW = ("pirl", "pyro", "torch", "contextlib", "functools")
"""Packages whose lines are nobody's own: a warning points above them."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn of something at the nearest line that a user wrote.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     warn("the chains do not agree yet", ConvergenceWarning)
        >>> str(told[0].message)
        'the chains do not agree yet'
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BELOW:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def first_line(error: BaseException) -> str:
    """What an error says, without what follows in further lines (Pyro adds a table of shapes); its name if nothing.

    Example:
        >>> first_line(ValueError("of two lines\\nthe second")), first_line(KeyError())
        ('of two lines', 'KeyError')
    """
    return _said(error) or type(error).__name__


def named_line(error: BaseException) -> str:
    """The name of an error, and what it says in its first line.

    Example:
        >>> named_line(ValueError("of two lines\\nthe second")), named_line(AssertionError())
        ('ValueError: of two lines', 'AssertionError')
    """
    return ": ".join(filter(None, (type(error).__name__, _said(error))))


def _said(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "").strip()
    return "" if line.startswith("Trace Shapes:") else line


def is_count(x: Any, least: int = 1) -> bool:
    """Whether something is a whole number, and large enough.

    Example:
        >>> is_count(3), is_count(3.0)
        (True, False)
    """
    return isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= least


def check_counts(least: int, **counts: Any) -> None:
    """Refuse what is no whole number, or too small a one.

    Raises:
        OptionError: names it.

    Example:
        >>> check_counts(1, num_rollouts=500)
    """
    for name, count in counts.items():
        if not is_count(count, least):
            raise OptionError(f"{name} is {count!r}, but must be a whole number, at least {least}")


def check_numbers(
    least: float, most: float = math.inf, *, within: bool = False, below: bool = False, **numbers: Any
) -> None:
    """Refuse what is no finite number from ``least`` to ``most``.

    Args:
        within: both ends are refused too.
        below: ``most`` is refused too.

    Raises:
        OptionError: names it.

    Example:
        >>> check_numbers(0.0, 1.0, explore=0.1)
    """
    bounded = most < math.inf  # and without a most there is nothing to be below of
    words = f"strictly between {least:g} and {most:g}" if bounded else f"above {least:g}"
    end = "on" if not bounded else f"to below {most:g}" if below else f"to {most:g}"
    words = words if within else f"from {least:g} {end}"
    for name, number in numbers.items():
        real = isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)
        fits = real and least <= number <= most and not (within and number == least)
        if not fits or ((within or below) and number == most):
            raise OptionError(f"{name} is {number!r}, but must be a finite number {words}")


def check_generator(generator: Any) -> None:
    """Refuse a seed, or anything else, in the place of a generator of random numbers.

    Raises:
        OptionError: says how to make one.

    Example:
        >>> check_generator(torch.Generator().manual_seed(3))
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        seed = int(generator) if is_count(generator, 0) else 0
        raise OptionError(f"generator is {form(generator)}: give torch.Generator().manual_seed({seed}), or None")


def counted(number: int, word: str) -> str:
    """A number and what is counted, in the plural unless it is one.

    Example:
        >>> counted(1, "round"), counted(2_000, "round")
        ('1 round', '2,000 rounds')
    """
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def form(x: Any) -> str:
    """What something is, in words for messages: its type, and of arrays what they hold and their shape.

    Example:
        >>> form(torch.zeros(3).long()), form(0.5)
        ('a Tensor torch.int64 (3,)', 'a float')
    """
    if isinstance(x, type):
        return f"the class {x.__name__}"
    name = type(x).__name__
    article = "an" if name[0] in "aeioAEIO" or name == "ndarray" else "a"
    table = f" {x.dtype} {tuple(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else ""
    return f"{article} {name}{table}"
