"""Checks of what engines without chains return: draws of an approximation, and particles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pirl.diagnose.facts import FEW_PARTICLES, Facts, Finding, non_centred, worst_of
from pirl.infer.importance import FEWEST, TRUSTED_K

FEWEST_IMPORTANT, MAX_EVIDENCE_ERROR = 100, 0.5
MAX_SHIFT = 0.25
"""Posterior standard deviations by which a mean of an approximation may be off."""


def approximation(facts: Facts) -> Iterator[Finding]:
    """Is an approximation near the posterior?"""
    if not facts.approximate:
        return
    name, k, size = facts.attrs["approximation"], facts.number("pareto_k"), facts.number("importance_ess")
    count = facts.chains * facts.count
    exact = "engine='chees', which is exact"
    if facts.attrs.get("guide") == "delta":
        yield Finding(
            "problem",
            "point",
            "All draws are one point, the mode: guide='delta' has no uncertainty.",
            "intervals and standard deviations are 0 and mean nothing",
            f"guide='multivariate_normal', engine='laplace', or {exact}",
        )
    elif np.isnan(k):
        few = "pareto_k" in facts.attrs and count < FEWEST
        facts.figures.append("Pareto k-hat unknown")
        yield Finding(
            "problem" if few else "note",
            "pareto_k",
            f"Nothing tells how near the approximation ({name}) is to the posterior"
            + (f": {count} draws are too few for a Pareto k-hat." if few else "."),
            "an approximation can be wrong in ways that its draws do not show",
            "num_samples=1000" if few else f"a comparison with {exact}, on a part of the data if need be",
        )
    else:
        facts.figures.append(f"Pareto k-hat {k:.2f} ({name})")
        if k >= TRUSTED_K:
            richer = "a richer guide (guide='multivariate_normal', or 'iaf')" if name == "svi" else "engine='svi'"
            yield Finding(
                "problem",
                "pareto_k",
                f"The approximation ({name}) misses part of the posterior: Pareto k-hat {k:.2f}, above {TRUSTED_K}; "
                f"its {count:,} draws count for {size:.0f}.",
                "standard deviations and intervals are likely too narrow",
                "; ".join(filter(None, [exact, richer, non_centred(facts)])),
            )
        elif size < FEWEST_IMPORTANT and count >= FEWEST_IMPORTANT:
            yield Finding(
                "note",
                "importance_ess",
                f"The {count:,} draws of the approximation count for {size:.0f} when they are weighted.",
                "weighted averages rest on few draws",
                f"num_samples={10 * facts.count}",
            )
        elif shifted := _shifted(facts, size):
            yield Finding(
                "problem",
                "shifted",
                f"Means of the approximation's draws ({name}) are not those that their weights give; by posterior "
                f"standard deviations: {shifted}.",
                "means and intervals of the draws are not the posterior's, which its weights know",
                f"resample=True (draws then follow their weights), posterior['psis_moments'], or {exact}",
            )
    if str(facts.attrs.get("converged")) == "False":
        advice = "a larger max_steps, or a smaller learning_rate" if name == "svi" else "num_starts=20"
        yield Finding(
            "problem",
            "unconverged",
            f"The search for the best approximation ({name}) had not ended when it was stopped.",
            "the draws belong to an unfinished fit",
            advice,
        )


def particles(facts: Facts) -> Iterator[Finding]:
    """Sequential Monte Carlo: have the particles moved apart after resampling?"""
    if not facts.particles or not facts.latent.names:
        return
    share, count = facts.distinct, facts.chains * facts.count
    temperatures = facts.number("num_temperatures")
    steps = f" after {temperatures:.0f} temperatures" if np.isfinite(temperatures) else ""
    facts.figures.append(f"{share:.0%} of the particles are distinct{steps}")
    if share < FEW_PARTICLES:
        yield Finding(
            "problem",
            "few_particles",
            f"Only {share:.0%} of {count:,} particles are distinct.",
            "copies of a few particles stand for the whole posterior",
            "a larger max_moves, so that copies move apart, or more particles (num_samples)",
        )
    error = facts.number("log_evidence_se")
    if error > MAX_EVIDENCE_ERROR:
        yield Finding(
            "problem",
            "evidence",
            f"The log evidence of {facts.chains} populations is uncertain: {facts.number('log_evidence'):.1f} with a "
            f"standard error of {error:.2g}.",
            "the shares of modes and comparisons of models are as uncertain",
            "more particles (num_samples), or a larger target_ess",
        )


def _shifted(facts: Facts, size: float) -> str:
    """Elements whose means the importance weights move by more than is tolerable, and than chance does."""
    log_weight = facts.stat("log_weight")
    if log_weight is None or not facts.latent.names:
        return ""
    weight = np.exp(log_weight - log_weight.max()).ravel()
    weight /= weight.sum()
    draws = facts.latent.draws.reshape(len(weight), -1)
    draws = np.where(weight[:, None] > 0, draws, 0.0)
    mean = weight @ draws
    spread = np.sqrt(weight @ (draws - mean) ** 2)
    off = np.abs(draws.mean(0) - mean) / np.where(spread > 0, spread, np.inf)
    far = np.flatnonzero(off > max(MAX_SHIFT, 4 / np.sqrt(size)))
    return worst_of([facts.latent.names[i] for i in far], off[far], ".2f") if len(far) else ""


def _told(facts: Facts, name: str) -> tuple[str, str]:
    """What an attribute says is wrong, as a sentence, and what it says to do."""
    reason, _, advice = str(facts.attrs[name]).rpartition(": ")
    return reason[0].upper() + reason[1:] + ".", advice


def partition(facts: Facts) -> Iterator[Finding]:
    """Is log Z, where it was estimated from samples, known well enough?"""
    if "partition_trusted" not in facts.attrs:
        return
    facts.figures.append(f"log Z by {facts.number('partition_ess'):,.0f} effective samples")
    if "partition_starts" in facts.attrs:
        what, advice = _told(facts, "partition_starts")
        yield Finding(
            "problem",
            "starts",
            what,
            "rewards explain starts as well as what follows, and are wrong where nobody chose the starts",
            advice,
        )
    if int(facts.attrs["partition_trusted"]):
        return
    what, advice = _told(facts, "partition_problem")
    yield Finding(
        "problem",
        "partition",
        what,
        "the chains sampled an approximation of the posterior that may be far from it, however well they agree",
        f"{advice} (pirl.learning.bayesian_guided_cost does so: with more num_rounds or num_rollouts)",
    )
