"""Checks of chains: do they agree, do they move, can they follow the posterior?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pirl.convergence import FEWEST_DRAWS, normal_scores, rhat
from pirl.diagnose.facts import (
    FEW_PARTICLES,
    FEWEST_FOR_MOVES,
    NON_CENTRED,
    Facts,
    Finding,
    alternatives,
    chain_names,
    dense_mass,
    joined,
    large,
    longer_or_faster,
    more_accepting,
    non_centred,
    twice_as_long,
    weighing_modes,
    worst_of,
)

MIN_BFMI = 0.3
OFTEN = 0.05
"""Share of trajectories at their longest that is worth a word."""

CLEARLY, MIXES = 1.1, 1.05
"""R-hat between chains that are in different places, and within a chain that is in one."""


def unsound(facts: Facts) -> Iterator[Finding]:
    """Draws that are not numbers."""
    broken = facts.elements.unsound
    if broken:
        yield Finding(
            "problem",
            "not_finite",
            f"{joined(broken[:3], len(broken) - 3)} {'is' if len(broken) == 1 else 'are'} NaN or infinite in some "
            "draws.",
            "means and intervals of these numbers do not exist",
            "priors that keep the model away from overflow (narrower scales), dtype=torch.float64, or blank out on "
            "purpose what has no value in every draw",
        )


def disagreement(facts: Facts) -> Iterator[Finding]:
    """Chains that do not tell the same story: stuck ones, ones in a worse place, several modes, or too short."""
    if facts.approximate:
        return
    if facts.count < FEWEST_DRAWS:
        yield Finding(
            "problem",
            "few_draws",
            f"There are {facts.count} draws a chain, with which nothing can be checked.",
            "R-hat and effective sample sizes need at least four draws a chain, and a few hundred to be of use",
            "num_samples=1000 (--samples 1000)",
        )
        return
    if facts.particles and facts.distinct < FEW_PARTICLES:
        return  # copies cannot be compared
    if facts.stuck:
        yield _stuck(facts)
        if len(facts.stuck) == facts.chains:
            return
    found = facts.convergence
    varying = np.isfinite(found.rhat) | (found.rhat == np.inf)
    if not varying.any():
        facts.figures.append("no parameter varies")
        return
    worst = int(np.where(varying, found.rhat, -np.inf).argmax())
    kind = "nested R-hat" if found.nested else "R-hat"
    alone = " between the halves of its one chain" if facts.chains == 1 else ""
    facts.figures.append(f"{kind}{alone} at most {large(found.rhat[worst])} ({found.names[worst]})")
    low = _low_chains(facts)
    modes = _modes(facts, worst) if found.rhat[worst] > CLEARLY else ""
    if low:
        yield low
    elif modes:
        yield Finding(
            "problem",
            "modes",
            f"Chains disagree though each mixes well: {modes}; {kind} {large(found.rhat[worst])}.",
            "the posterior has several modes, and how many chains found each says nothing of their probabilities",
            f"{weighing_modes(facts)}; or more chains and a look at the groups apart "
            "(posterior.sel(chain=[...])); where labels can be swapped or signs flipped, a prior that tells them apart",
        )
    elif found.rhat[worst] > found.max_rhat:
        high = np.flatnonzero(found.rhat > found.max_rhat)
        size = np.nanmin(found.ess) if np.isfinite(found.ess).any() else np.nan
        told = facts.number("identified_rhat")
        sound = f" On what demonstrations identify, R-hat is {told:.3f}." if told <= found.max_rhat else ""
        yield Finding(
            "problem",
            "rhat",
            f"The chains do not agree yet: {kind} is above {found.max_rhat:.{3 if found.nested else 2}f} for "
            f"{worst_of([found.names[i] for i in high], found.rhat[high], '.3f')}"
            + (f"; the draws count for as few as {size:.0f} independent ones." if np.isfinite(size) else ".")
            + sound,
            "means and intervals depend on which chain, or which part of it, one looks at",
            longer_or_faster(facts),
        )


def _stuck(facts: Facts) -> Finding:
    which = facts.stuck
    acceptance = facts.stat("acceptance_rate")
    rate = f" (they accept {acceptance[which].mean():.1%} of proposals)" if acceptance is not None else ""
    rest = "" if len(which) < facts.chains else ", that is, all of them"
    return Finding(
        "problem",
        "stuck",
        f"{chain_names(which).capitalize()} hardly moved{rest}: the same values again and again{rate}.",
        "a chain that does not move says where it started and nothing about the posterior",
        "another start (init='prior', or a dict of values), more warm-up, or another seed; if chains stick again, look "
        "for a log density that jumps or is not finite nearby",
    )


def _low_chains(facts: Facts) -> Finding | None:
    """Chains whose log densities hardly reach those of the best one."""
    lp = facts.stat("lp")
    chains, _ = facts.live
    if lp is None or facts.particles or len(chains) < 2 or facts.count < FEWEST_FOR_MOVES:
        return None
    lp = lp[chains]
    if not np.isfinite(lp).all():
        return None
    middle, spread = np.median(lp, axis=1), float(np.median(lp.std(axis=1)))
    best = int(middle.argmax())
    low = (lp.max(1) < lp[best].min()) & (middle[best] - middle > 5 * spread)
    if not low.any():
        return None
    which = [chains[i] for i in np.flatnonzero(low)]
    gap = float((middle[best] - middle[low]).max())
    return Finding(
        "problem",
        "low_density",
        f"{chain_names(which).capitalize()} {'stays' if len(which) == 1 else 'stay'} where the log density is far "
        f"lower than in chain {chains[best]}, by up to {gap:.0f}.",
        "these chains sit in a lesser mode or have not arrived, and their draws distort every mean",
        f"{twice_as_long(facts)}; other starts (init='prior', or a dict of values); if the same places come again, "
        f"{weighing_modes(facts)}",
    )


def _modes(facts: Facts, worst: int) -> str:
    """Who is where, if each chain (or each superchain) mixes and yet they differ; else nothing."""
    chains, elements = facts.live
    groups = facts.superchains if facts.convergence.nested else len(chains)
    if not groups or groups < 2:
        return ""
    draws = elements.draws[..., worst].astype(float).reshape(groups, -1, facts.count)
    if not all(rhat(group) < MIXES for group in draws):
        return ""
    size = draws.shape[1]
    scores = normal_scores(draws.reshape(groups * size, -1)).reshape(groups, -1)
    order = scores.mean(1).argsort()
    cut = int(np.diff(scores.mean(1)[order]).argmax()) + 1
    low, high = scores[order[:cut]], scores[order[cut:]]
    # Two normal humps of equal weight are one hump until their means are two deviations apart.
    if high.mean() - low.mean() <= 2 * np.sqrt((low.var() + high.var()) / 2):
        return ""
    means = draws.mean((1, 2))
    words = []
    for side in (np.sort(order[:cut]), np.sort(order[cut:])):
        members = [chains[g * size + c] for g in side for c in range(size)]
        words.append(f"{chain_names(members)} {'stays' if len(members) == 1 else 'stay'} near {means[side].mean():.3g}")
    return f"for {elements.names[worst]}, {words[0]} and {words[1]}"


def few_effective(facts: Facts) -> Iterator[Finding]:
    """Too few independent draws, where the chains agree otherwise."""
    if facts.approximate or facts.particles or facts.count < FEWEST_DRAWS or len(facts.stuck) == facts.chains:
        return
    found = facts.convergence
    for name, sizes in (("bulk", found.bulk), ("tail", found.tail)):
        if np.isfinite(sizes).any():
            worst = int(np.nanargmin(sizes))
            facts.figures.append(f"{name} ESS at least {sizes[worst]:.0f} ({found.names[worst]})")
    known = found.rhat[~np.isnan(found.rhat)]
    if (known > found.max_rhat).any():
        return  # said already, with its cause
    low = np.flatnonzero(found.ess < found.min_ess)
    if len(low):
        names = [found.names[i] for i in low]
        part = "tails of the " if np.nanmin(found.bulk) >= found.min_ess else ""
        yield Finding(
            "problem",
            "ess",
            f"There are too few independent draws for the {part}posterior (wanted {found.min_ess}): effective sample "
            f"size of {worst_of(names, found.ess[low], '.0f', largest=False)}.",
            "means and intervals would come out differently in another run"
            if not part
            else "the ends of intervals would come out differently in another run",
            longer_or_faster(facts, max(2, math.ceil(found.min_ess / max(float(np.nanmin(found.ess)), 1.0)))),
        )


def divergences(facts: Facts) -> Iterator[Finding]:
    """How many transitions diverged, and where."""
    diverging = facts.stat("diverging")
    if diverging is None or facts.particles:
        return
    count = int(diverging.sum())
    facts.figures.append(f"{count:,} of {diverging.size:,} transitions diverged")
    if count == 0:
        return
    where, narrow = _concentrated(facts, diverging.astype(bool))
    hints = [more_accepting(facts), non_centred(facts), "a tighter prior"]
    if narrow:
        hints = [NON_CENTRED, more_accepting(facts), "a tighter prior"]
    yield Finding(
        "problem",
        "divergences",
        f"{count:,} of {diverging.size:,} transitions diverged ({count / diverging.size:.2g} of all){where}.",
        "the sampler could not follow the posterior there, so that region is visited too little and estimates are off",
        alternatives(*hints),
    )


def _concentrated(facts: Facts, diverging: np.ndarray) -> tuple[str, bool]:
    """Which parameters differ most between divergent and other draws, and whether the first is a scale near 0."""
    elements, count = facts.latent, int(diverging.sum())
    if not elements.names or count == diverging.size:
        return "", False
    shifts = np.concatenate(
        [
            scores[diverging].mean(0) - scores[~diverging].mean(0)
            for block in elements.blocks()
            for scores in [normal_scores(elements.draws[..., block].astype(float))]
        ]
    )
    # Scores are standard normal: a mean of so many is hardly ever larger, even the largest of all elements'.
    noise = (2 + np.sqrt(2 * np.log(len(shifts)))) / np.sqrt(count)
    order = [int(i) for i in np.argsort(-np.abs(shifts))[:2] if abs(shifts[i]) > noise]
    if not order:
        return ", in no particular place", False
    words = []
    for i in order:
        values = elements.draws[..., i]
        inside, outside = np.median(values[diverging]), np.median(values[~diverging])
        size = "small" if shifts[i] < 0 else "large"
        words.append(f"{elements.names[i]} is {size} (median {inside:.3g}, elsewhere {outside:.3g})")
    narrow = bool(shifts[order[0]] < 0 and elements.draws[..., order[0]].min() > 0)
    return f", mostly where {' and '.join(words)}", narrow


def energies(facts: Facts) -> Iterator[Finding]:
    """Bayesian fraction of missing information: can momentum carry a chain between the levels of energy?"""
    energy = facts.stat("energy")
    if (
        energy is None
        or facts.particles
        or facts.count < FEWEST_FOR_MOVES
        or np.nan_to_num(facts.number("thin"), nan=1.0) > 1
    ):
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        bfmi = np.square(np.diff(energy, axis=1)).mean(1) / energy.var(axis=1, ddof=1)
    bfmi[facts.stuck] = np.nan  # said already
    if not np.isfinite(bfmi).any():
        return
    facts.figures.append(f"E-BFMI at least {np.nanmin(bfmi):.2f}")
    low = np.flatnonzero(bfmi < MIN_BFMI).tolist()
    if low:
        yield Finding(
            "problem",
            "energy",
            f"The energy of {chain_names(low)} changes too slowly: E-BFMI {np.nanmin(bfmi):.2f}, below {MIN_BFMI}.",
            "the sampler moves too little between the middle of the posterior and its tails",
            alternatives(non_centred(facts), "priors with lighter tails (Normal for Cauchy)", "more warm-up"),
        )


def run(facts: Facts) -> Iterator[Finding]:
    """What the engine says about its run."""
    if str(facts.attrs.get("interrupted")) == "True":
        yield Finding(
            "note",
            "interrupted",
            f"The run was interrupted: each chain has {facts.count:,} draws, fewer than were asked for.",
            "all that is said here concerns the draws that there are",
            "the same call again; with a checkpoint it goes on from there",
        )
    if facts.chains == 1 and not facts.approximate and not facts.particles:
        yield Finding(
            "note",
            "one_chain",
            "There is one chain, which nothing can be compared with.",
            "a chain in a lesser mode looks well from inside",
            "num_chains=4 (--chains 4)",
        )
    for stat, limit, words, advice in (
        ("tree_depth", "max_tree_depth", "are cut off at the tree depth", "a larger max_tree_depth"),
        ("n_steps", "max_leapfrogs", "are cut off at the number of leapfrog steps", "a larger max_leapfrogs"),
    ):
        values, most = facts.stat(stat), facts.number(limit)
        if values is None or facts.particles or np.isnan(most):
            continue
        share = float((values >= most).mean())
        facts.figures.append(f"{share:.0%} of trajectories at {limit}")
        if share > OFTEN:
            yield Finding(
                "note",
                "trajectories",
                f"{share:.0%} of the trajectories {words} {most:.0f} ({limit}).",
                "the draws are right, but each costs much and they depend on each other more than they need to",
                alternatives(dense_mass(facts), "features of similar size", advice),
            )
