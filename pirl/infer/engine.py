"""What all engines share: the draws that they return, and counter-based seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pirl.errors import OptionError

START_STREAM, PRIOR_STREAM, PREDICTIVE_STREAM = 1021, 1022, 1023
"""Streams of random numbers beside those of the chains, which are numbered 0, 1, ..."""

MOMENTA, TRIALS, STARTS, RESAMPLING = range(4)
"""Streams of :func:`random_numbers`: of transitions, of those that only try a step size, of starts, of resampling."""

_COUNTER_BITS = 22


@dataclass
class Draws:
    """What an engine returns: draws, one dictionary of tensors ``[chain, draw, *shape]`` by site name.

    ``unconstrained`` tells in which space the draws are. ``stats`` are ``[chain, draw]`` and go to the group
    ``sample_stats``; ``attrs`` (text and numbers) go to the attributes of the result; ``extra`` are further groups:
    name of the group -> name of the variable -> (names of dims, array).

    Example:
        >>> potential = Potential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> draws = get_engine("laplace")(potential, num_chains=2, num_samples=10, progress=False)
        >>> draws.values["x"].shape, draws.unconstrained, sorted(draws.stats)
        (torch.Size([1, 20]), True, ['log_q', 'log_weight', 'lp'])
    """

    values: dict[str, Tensor]
    unconstrained: bool
    stats: dict[str, Tensor] = field(default_factory=dict)
    attrs: dict[str, str | int | float] = field(default_factory=dict)
    extra: dict[str, dict[str, tuple[tuple[str | None, ...], np.ndarray]]] = field(default_factory=dict)


def _mix(word: int) -> int:
    """A bijection of 32-bit words that scatters neighbours (the finaliser of MurmurHash3)."""
    word ^= word >> 16
    word = word * 0x85EBCA6B & 0xFFFFFFFF
    word ^= word >> 13
    word = word * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)


def derive_seed(seed: int, stream: int, counter: int) -> int:
    """Derive the seed of one step of one stream of random numbers.

    For a given ``seed`` the map from (stream, counter) is one to one, so that two steps never share a generator, and
    a step can be repeated without the history of the generator: an interrupted chain resumes exactly.

    Raises:
        OptionError: more streams or steps than there are seeds.
    """
    if stream >> (32 - _COUNTER_BITS) or counter >> _COUNTER_BITS:
        raise OptionError(
            f"step {counter} of chain {stream} is out of range: at most {1 << (32 - _COUNTER_BITS)} chains "
            f"of {1 << _COUNTER_BITS} steps have seeds of their own"
        )
    keys = np.random.SeedSequence(seed).generate_state(2)
    return _mix(_mix((stream << _COUNTER_BITS | counter) ^ int(keys[0])) ^ int(keys[1]))


def reseed(seed: int, stream: int, counter: int = 0) -> None:
    """Seed torch's default generators for one step of one stream; only inside :func:`own_generator`."""
    derived = derive_seed(seed, stream, counter)
    torch.default_generator.manual_seed(derived)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(derived)


def random_numbers(seed: int, stream: int, counter: int) -> np.random.Generator:
    """Numbers of one step of one stream, the same on every device: Philox with (seed, stream) as key."""
    key = np.array([np.random.SeedSequence(seed).generate_state(1, np.uint64)[0], stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, counter]))


def laid_out(x: Tensor) -> Tensor:
    """A copy in rows, where torch puts its own tensors: products of matrices round by strides and alignment.

    Processors with wide registers choose another order of sums for other layouts, so that a run which goes on from a
    checkpoint, or on other ranks, would differ in the last bits from one that was not interrupted.
    """
    return x.clone(memory_format=torch.contiguous_format)


@contextmanager
def own_generator() -> Iterator[None]:
    """Leave torch's global random state, on the CPU and on the current GPU, as it was found."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on operations as small as these, more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
