"""What the checks of a posterior look at, and how they name what they find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from pirl.convergence import Convergence, Elements

if TYPE_CHECKING:
    import xarray

MIN_ACCEPTANCE, MIN_MOVES = 0.05, 0.1
"""A chain that accepts less, or moves in fewer of its transitions, is stuck."""

FEWEST_FOR_MOVES, FEW_PARTICLES = 20, 0.5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a posterior ("problem"), or worth knowing ("note").

    Example:
        >>> Finding("note", "influence", what="one episode weighs much", why="it may be odd", advice="look").advice
        'look'
    """

    severity: Literal["problem", "note"]
    kind: str
    """One word: rhat, modes, stuck, low_density, ess, divergences, energy, pareto_k, ..."""
    what: str
    why: str
    advice: str


@dataclass
class Facts:
    """A posterior, and what several checks want to know of it; ``figures`` tells what they found, good or bad."""

    posterior: xarray.DataTree
    figures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.attrs = self.posterior.attrs
        self.approximate = "approximation" in self.attrs
        self.particles = self.attrs.get("engine") == "smc"
        sizes = self.posterior["posterior"].sizes
        self.chains, self.count = sizes["chain"], sizes["draw"]

    def group(self, name: str) -> xarray.Dataset | None:
        return self.posterior[name].to_dataset() if name in self.posterior.children else None

    def stat(self, name: str) -> np.ndarray | None:
        """A statistic of the sampler, ``[chain, draw]``."""
        stats = self.group("sample_stats")
        if stats is None or name not in stats or stats[name].dims != ("chain", "draw"):
            return None
        return stats[name].values

    def number(self, name: str) -> float:
        """An attribute that is a number; NaN where there is none."""
        try:
            return float(self.attrs.get(name, np.nan))
        except (TypeError, ValueError):
            return np.nan

    @cached_property
    def latent(self) -> Elements:
        """What was sampled, without what was computed from it, as far as the file tells."""
        posterior, prior = self.posterior["posterior"].to_dataset(), self.group("log_prior")
        sampled = [name for name in posterior.data_vars if prior is not None and name in prior]
        return Elements.of(posterior[sampled or list(posterior.data_vars)])

    @cached_property
    def judged(self) -> xarray.Dataset:
        """The variables by which chains are judged: not those that are known only through others."""
        posterior = self.posterior["posterior"].to_dataset()
        blind = set(json.loads(self.attrs.get("unidentified_sites", "[]")))
        return posterior[[name for name in posterior.data_vars if name not in blind] or list(posterior.data_vars)]

    @cached_property
    def elements(self) -> Elements:
        return Elements.of(self.judged)

    @cached_property
    def stuck(self) -> list[int]:
        """Chains that hardly move."""
        if self.count < FEWEST_FOR_MOVES or not self.latent.names or self.particles or self.approximate:
            return []
        moved = np.zeros((self.chains, self.count - 1), dtype=bool)
        for block in self.latent.blocks():
            part = self.latent.draws[..., block]
            moved |= (part[:, 1:] != part[:, :-1]).any(2)
        still = moved.mean(1) < MIN_MOVES
        acceptance = self.stat("acceptance_rate")
        if acceptance is not None:
            still |= acceptance.mean(1) < MIN_ACCEPTANCE
        return np.flatnonzero(still).tolist()

    @cached_property
    def distinct(self) -> float:
        """Share of draws that are no copies of others."""
        flat = self.latent.draws.reshape(self.chains * self.count, -1)
        return len(np.unique(flat, axis=0)) / len(flat) if self.latent.names else 1.0

    @cached_property
    def superchains(self) -> int | None:
        count = self.number("num_superchains")
        return int(count) if np.isfinite(count) else None

    @cached_property
    def live(self) -> tuple[list[int], Elements]:
        """Chains that move, and their draws; all of them where none does, or where they come in groups."""
        chains = [c for c in range(self.chains) if c not in self.stuck]
        if not self.stuck or not chains or self.superchains:
            return list(range(self.chains)), self.elements
        return chains, Elements.of(self.judged.isel(chain=chains))

    @cached_property
    def convergence(self) -> Convergence:
        return Convergence.of(self.live[1], self.superchains)


# ----------------------------------------------------------------------------------------------------- words and names


def worst_of(names: Sequence[str], values: np.ndarray, form: str, largest: bool = True, most: int = 3) -> str:
    """Name the elements with the most extreme values: "a (1.08), b[x] (1.03) and 4 more"."""
    order = np.argsort(-values if largest else values, kind="stable")
    words = [f"{names[i]} ({values[i]:{form}})" for i in order[:most]]
    return joined(words, len(names) - len(words))


def joined(words: Sequence[str], more: int = 0) -> str:
    """Join words: "a, b and c", "a and 3 more"."""
    words = [*words, *([f"{more} more"] if more > 0 else [])]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def chain_names(numbers: Sequence[int], most: int = 8) -> str:
    """Name chains: "chain 2", "chains 0, 3 and 5 to 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [w for run in runs for w in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    return f"chain{'s' * (len(numbers) != 1)} {joined(words[:most], len(words) - most)}"


def large(value: float) -> str:
    """Write an R-hat, which may be infinite."""
    return f"{value:.3f}" if value < 10 else f"{value:.0f}" if value < 1e4 else "beyond all bounds"


LONG_WARMUP = 2000
"""Steps of warm-up after which more are no cure."""


def longer_or_faster(facts: Facts, factor: int | None = None) -> str:
    """What to try where chains are too short: longer ones, unless that was tried.

    Args:
        factor: how many times as many draws are needed, where warm-up was long enough; None: nobody knows.
    """
    warmup = facts.number("tuning_steps")
    if factor is None and warmup >= LONG_WARMUP:
        return f"{faster(facts)}; chains warmed up for {warmup:.0f} steps, and longer ones alone may not help"
    longer = twice_as_long(facts) if factor is None else more_draws(facts, factor)
    return f"{longer}; if that does not help, {faster(facts)}"


def more_draws(facts: Facts, factor: int) -> str:
    """So many times as many draws, or particles, as this run has."""
    if facts.particles:
        return f"more particles, such as num_samples={factor * facts.count} (--samples), or a larger target_ess"
    return f"longer chains, such as num_samples={_steps(facts, factor)} (--samples)"


def twice_as_long(facts: Facts) -> str:
    """Chains, and their warm-up, twice as long as in this run; or more particles."""
    warmup = facts.number("tuning_steps")
    if facts.particles or not np.isfinite(warmup):
        return more_draws(facts, 2)
    least = 50 if facts.attrs.get("init") == "laplace" else 500  # near the posterior, and with its covariance
    sizes = f"num_warmup={2 * max(int(warmup), least)} and num_samples={_steps(facts, 2)}"
    return f"longer chains, such as {sizes} (--warmup and --samples)"


def _steps(facts: Facts, factor: int) -> int:
    """Of a chain, those that thinning leaves out included."""
    return factor * facts.count * int(np.nan_to_num(facts.number("thin"), nan=1.0))


def weighing_modes(facts: Facts) -> str:
    """What gives each mode its share, where that was not done."""
    return (
        "more particles (num_samples) or a larger target_ess" if facts.particles else "engine='smc', which weighs modes"
    )


def more_accepting(facts: Facts) -> str:
    """The next target of acceptance, or nothing where it is as high as it can be."""
    now = np.nan_to_num(facts.number("target_accept_prob"), nan=0.8)
    higher = [target for target in (0.9, 0.95, 0.99) if target > now + 1e-6]
    return f"target_accept_prob={higher[0]:g} (it was {now:g}), which makes steps smaller" if higher else ""


NON_CENTRED = "the non-centred form for scales (sample z from a standard normal and compute w = mu + tau * z)"


def non_centred(facts: Facts) -> str:
    """The other form of scales, where there may be any: numbers that are positive in all draws."""
    draws = facts.latent.draws
    return NON_CENTRED if bool((draws > 0).all((0, 1)).any()) else ""


def faster(facts: Facts) -> str:
    """What lets chains move more freely."""
    return alternatives(dense_mass(facts), "features of similar size", non_centred(facts))


def alternatives(*ways: str) -> str:
    """Join those that there are: "a, b, or c"."""
    there = [way for way in ways if way]
    return ", or ".join(filter(None, [", ".join(there[:-1]), there[-1]]))


def dense_mass(facts: Facts) -> str:
    """The engine's option for correlated parameters, unless it was used."""
    attrs = facts.attrs
    used = attrs.get("engine", "") not in ("nuts", "chees") or str(attrs.get("dense_mass")) == "True"
    return "" if used else "dense_mass=True for correlated parameters"
