"""Do the chains agree, and how many independent draws are they worth? Computed for thousands of parameters at once.

The definitions are those of ArviZ, which goes from parameter to parameter; here each is a few operations on arrays
``[chain, draw, *shape]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Num

if TYPE_CHECKING:
    import xarray

MAX_RHAT = 1.01
"""Vehtari et al. 2021: above it the chains do not agree."""

MIN_ESS_PER_CHAIN, ENOUGH_CHAINS = 100, 4

FEWEST_DRAWS = 4
"""A chain is compared in halves, and a half needs two draws."""

TAILS = (0.05, 0.95)

BLOCK = 1 << 21
"""Numbers that are treated at once, to bound memory."""


def wanted_ess(num_chains: int) -> int:
    """How large an effective sample size should be: 100 a chain (Vehtari et al. 2021), 400 from four chains on.

    Below that the autocorrelations, and with them the diagnostics, are themselves uncertain; 400 independent draws give
    a mean to a twentieth of a posterior standard deviation, from however many chains they come.
    """
    return MIN_ESS_PER_CHAIN * min(num_chains, ENOUGH_CHAINS)


def allowed_rhat(num_chains: int, num_draws: int, num_superchains: int | None = None) -> float:
    """Largest R-hat with which chains agree: 1.01, or for nested R-hat the same distance above its floor.

    A superchain of M chains with N draws has a mean whose variance is at least W/(M N), so nested R-hat is about
    sqrt(1 + 1/(M N)) where all is well. R-hat has no such floor: it is sqrt((N - 1)/N + B/W). Hence
    sqrt(1.01^2 + 1/(M N)), which for M = 1 is the same condition on B and W as R-hat < 1.01.
    """
    if num_superchains is None:
        return MAX_RHAT
    return float(np.sqrt(MAX_RHAT**2 + num_superchains / (num_chains * num_draws)))


def rhat(draws: Num[np.ndarray, "chain draw *shape"]) -> Float[np.ndarray, "*shape"]:
    """Split R-hat of the rank-normalised draws, of the bulk or of the tails, whichever is larger.

    About 1 where chains, and the two halves of each, agree; NaN for a constant or for fewer than 4 draws. Unlike ArviZ
    it is defined for one chain, whose halves it compares.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021, equations 3, 4, 13 and 14.
    """
    if draws.shape[1] < FEWEST_DRAWS:
        return np.full(draws.shape[2:], np.nan)
    halves = split(draws)
    return np.asarray(np.fmax(_rhat(normal_scores(halves)), _rhat(normal_scores(_folded(halves)))))


def _rhat(chains: np.ndarray) -> np.ndarray:
    count = chains.shape[1]
    between, within = chains.mean(1).var(0, ddof=1), chains.var(1, ddof=1).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt((count - 1) / count + between / within))


def nested_rhat(
    draws: Num[np.ndarray, "chain draw *shape"], num_superchains: int, rank: bool = True
) -> Float[np.ndarray, "*shape"]:
    """Nested R-hat: do superchains agree, groups of chains that share a start? For many chains, however short.

    sqrt(1 + B/W), where B is the variance of the superchains' means, and W the mean over superchains of the variance
    between the means of their chains plus the mean variance within those (the first is 0 for one chain a superchain).
    Its floor is about sqrt(1 + 1/(M N)) for M chains of N draws a superchain: see :func:`allowed_rhat`.

    Source: Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari and Gelman 2024, definition 2.1 (equations 6 to 8).

    Args:
        draws: superchain k is made of chains k C/K to (k + 1) C/K - 1.
        num_superchains: K, at least 2, which divides the number of chains C.
        rank: compare rank-normalised halves of chains, in bulk and tails, as :func:`rhat` does; else the draws as they
            are.

    Raises:
        ValueError: the chains cannot be dealt out to so many superchains.
    """
    chains, count = draws.shape[:2]
    if num_superchains < 2 or chains % num_superchains:
        raise ValueError(f"{chains} chains do not make {num_superchains} superchains of one size, at least 2 of them")
    if count < (FEWEST_DRAWS if rank else 1):
        return np.full(draws.shape[2:], np.nan)

    if not rank:
        return _nested(draws, num_superchains)
    halves = split(draws)
    scores = normal_scores(halves), normal_scores(_folded(halves))
    return np.asarray(np.fmax(*(_nested(score, num_superchains, halves=2) for score in scores)))


def _nested(chains: np.ndarray, num_superchains: int, halves: int = 1) -> np.ndarray:
    """Compare superchains; the first halves of all chains come before the second."""
    dealt = chains.reshape(halves, num_superchains, -1, *chains.shape[1:]).swapaxes(0, 1)
    dealt = dealt.reshape(num_superchains, -1, *chains.shape[1:])
    means = dealt.mean(2)
    within = np.zeros_like(means[:, 0])
    if dealt.shape[1] > 1:
        within += means.var(1, ddof=1)
    if dealt.shape[2] > 1:
        within += dealt.var(2, ddof=1).mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(1 + means.mean(1).var(0, ddof=1) / within.mean(0)))


def ess_bulk(draws: Num[np.ndarray, "chain draw *shape"]) -> Float[np.ndarray, "*shape"]:
    """Effective sample size of the rank-normalised draws: how well the middle of the posterior is known.

    NaN for a constant or for fewer than 4 draws. Source: Vehtari et al. 2021, section 4.3.
    """
    if draws.shape[1] < FEWEST_DRAWS:
        return np.full(draws.shape[2:], np.nan)
    return _ess(normal_scores(split(draws)))


def ess_tail(draws: Num[np.ndarray, "chain draw *shape"]) -> Float[np.ndarray, "*shape"]:
    """Effective sample size for the 5% and the 95% quantile, whichever is smaller: how well intervals are known.

    NaN for a constant or for fewer than 4 draws. Source: Vehtari et al. 2021, section 4.3.
    """
    if draws.shape[1] < FEWEST_DRAWS:
        return np.full(draws.shape[2:], np.nan)
    sizes = []
    for quantile in np.quantile(draws, TAILS, axis=(0, 1)):
        below = split((draws <= quantile).astype(float))
        # A quantile that is the largest value, in draws with repetitions, is known as well as a constant.
        known = (below == below[0, 0]).all((0, 1)) & (draws != draws[0, 0]).any((0, 1))
        sizes.append(np.where(known, below.shape[0] * below.shape[1], _ess(below)))
    return np.asarray(np.minimum(*sizes))


def split(draws: np.ndarray) -> np.ndarray:
    """Cut each chain in two; an odd draw in the middle is left out."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, draws.shape[1] - half :]])


def normal_scores(draws: np.ndarray) -> np.ndarray:
    """Replace draws by the normal quantiles of their ranks among all chains; ties share their mean rank."""
    count = draws.shape[0] * draws.shape[1]
    rows = np.ascontiguousarray(draws.reshape(count, -1).T)  # sorting is fastest along what is contiguous
    order = rows.argsort(axis=1)
    ordered = np.take_along_axis(rows, order, axis=1)
    places = np.arange(count)
    differs = ordered[:, 1:] != ordered[:, :-1]
    if differs.all():
        twice = np.broadcast_to(2 * places, rows.shape)
    else:
        edge = np.ones_like(rows[:, :1], dtype=bool)
        first = np.maximum.accumulate(np.where(np.hstack([edge, differs]), places, 0), axis=1)
        last = np.minimum.accumulate(np.where(np.hstack([differs, edge]), places, count)[:, ::-1], axis=1)[:, ::-1]
        twice = first + last
    # Mean ranks are whole or half numbers: one table has the quantiles of all.
    quantiles = torch.special.ndtri(
        torch.from_numpy((np.arange(2 * count - 1) / 2 + 1 - 0.375) / (count + 0.25))
    ).numpy()
    scores = np.empty(rows.shape)
    np.put_along_axis(scores, order, quantiles[twice], axis=1)
    return np.ascontiguousarray(scores.T).reshape(draws.shape)


def _folded(draws: np.ndarray) -> np.ndarray:
    return np.abs(draws - np.median(draws, axis=(0, 1)))


def _ess(chains: np.ndarray) -> np.ndarray:
    """Effective sample size by autocorrelations, cut off by Geyer's initial monotone sequence."""
    num_chains, count, *shape = chains.shape
    total = num_chains * count
    centred = chains - chains.mean(1, keepdims=True)
    spectrum = np.fft.rfft(centred, n=_fast_length(2 * count), axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).mean(0)
    covariance = np.fft.irfft(power, n=_fast_length(2 * count), axis=0)[:count].reshape(count, -1) / count
    within = covariance[0] * count / (count - 1)
    across = covariance[0] + (chains.mean(1).reshape(num_chains, -1).var(0, ddof=1) if num_chains > 1 else 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = 1 - (within - covariance) / across
    correlation[0] = 1.0
    # Sums over lags (0, 1), (2, 3), ... are positive and fall in a reversible chain: what does not is noise.
    last = max((count - 3) // 2, 0)
    pairs = correlation[0 : 2 * last + 2 : 2] + correlation[1 : 2 * last + 2 : 2]
    negative = pairs <= 0
    end = np.where(negative.any(0), negative.argmax(0), last)
    kept = np.arange(last + 1)[:, None] < end
    falling = np.where(kept, np.minimum.accumulate(pairs, axis=0), 0.0).sum(0)
    rest = np.take_along_axis(correlation, 2 * end[None], axis=0)[0].clip(min=0)
    time = np.maximum(-1 + 2 * falling + rest, 1 / np.log10(total))
    return np.where(across > 0, total / time, np.nan).reshape(shape)


def _fast_length(count: int) -> int:
    """A length whose Fourier transform is fast: the next 2^k or 3 * 2^k."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= count else power


# ---------------------------------------------------------------------------------------------------------- a posterior


@dataclass(frozen=True)
class Elements:
    """The numbers of a posterior that vary, side by side: ``draws [chain, draw, element]`` and their names."""

    names: list[str]
    variables: list[str]
    draws: Num[np.ndarray, "chain draw element"]
    unsound: list[str]
    """Names of elements that are NaN or infinite in some draws (in all of them is a way to blank out)."""

    @classmethod
    def of(cls, posterior: xarray.Dataset) -> Elements:
        """Collect the elements of all variables ``[chain, draw, ...]``; constants are left out."""
        names, variables, columns, unsound = [], [], [], []
        for variable, data in posterior.data_vars.items():
            if data.dtype.kind not in "fiub" or data.dims[:2] != ("chain", "draw"):
                continue
            values = data.values.reshape(*data.shape[:2], -1)
            varies, broken = varying(values)
            labels = element_names(data) if varies.any() or broken.any() else []
            names += [labels[i] for i in np.flatnonzero(varies)]
            unsound += [labels[i] for i in np.flatnonzero(broken)]
            variables += [str(variable)] * int(varies.sum())
            columns.append(values if varies.all() else values[..., varies])
        empty = np.zeros((posterior.sizes.get("chain", 0), posterior.sizes.get("draw", 0), 0))
        draws = columns[0] if len(columns) == 1 else np.concatenate([empty, *columns], axis=2)
        return cls(names, variables, draws, unsound)

    def blocks(self) -> Iterator[slice]:
        """Cut the elements into slices of bounded size."""
        size = max(1, BLOCK // max(1, self.draws.shape[0] * self.draws.shape[1]))
        return (slice(at, at + size) for at in range(0, len(self.names), size))


def varying(
    values: Num[np.ndarray, "chain draw element"],
) -> tuple[Bool[np.ndarray, " element"], Bool[np.ndarray, " element"]]:
    """Which elements vary by more than rounding, and which are not finite in some draws but not in all."""
    first = values[:1, :1]
    same = (values == first).all((0, 1)) if values.size else np.ones(values.shape[2], dtype=bool)
    if values.dtype.kind != "f":
        return ~same, np.zeros_like(same)
    same |= np.isnan(values).all((0, 1))
    finite = np.isfinite(values).all((0, 1))
    with np.errstate(invalid="ignore"):
        span, size = np.ptp(values, axis=(0, 1)) if values.size else 0.0, np.abs(values).max((0, 1), initial=0.0)
    return ~same & finite & (span > 64 * np.finfo(values.dtype).eps * size), ~same & ~finite


def element_names(data: xarray.DataArray) -> list[str]:
    """Name each element of a variable ``[chain, draw, ...]`` by its labels: "weights[goal]"."""
    axes = [[str(label) for label in data[dim].values] for dim in data.dims[2:]]
    if not axes:
        return [str(data.name)]
    return [
        f"{data.name}[{','.join(axis[j] for axis, j in zip(axes, index, strict=True))}]"
        for index in np.ndindex(data.shape[2:])
    ]


@dataclass(frozen=True)
class Convergence:
    """R-hat and effective sample sizes of the elements of a posterior, and what they should be."""

    names: list[str]
    rhat: Float[np.ndarray, " element"]
    bulk: Float[np.ndarray, " element"]
    tail: Float[np.ndarray, " element"]
    max_rhat: float
    min_ess: int
    nested: bool

    @classmethod
    def of(cls, elements: Elements, num_superchains: int | None = None) -> Convergence:
        """Compute them, R-hat between superchains where chains share their starts in groups."""
        chains, count = elements.draws.shape[:2]
        nested = bool(num_superchains and 1 < num_superchains < chains and chains % num_superchains == 0)
        groups = num_superchains if nested else None
        columns: list[list[np.ndarray]] = []
        for block in elements.blocks():
            part = elements.draws[..., block].astype(float)
            columns.append([nested_rhat(part, groups) if groups else rhat(part), ess_bulk(part), ess_tail(part)])
        joined = [np.concatenate(column) for column in zip(*columns, strict=True)] or [np.zeros(0)] * 3
        limit = allowed_rhat(chains, max(count, 1), groups)
        return cls(elements.names, joined[0], joined[1], joined[2], limit, wanted_ess(chains), nested)

    @property
    def ess(self) -> Float[np.ndarray, " element"]:
        """The smaller of the two effective sample sizes."""
        return np.minimum(self.bulk, self.tail)
