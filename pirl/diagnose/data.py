"""Checks of what the data say: observations with much influence, and parameters that they leave alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pirl.convergence import element_names
from pirl.diagnose.facts import Facts, Finding, worst_of
from pirl.infer.importance import FEWEST, TRUSTED_K

FEWEST_FROM_PRIOR = 100
MOST_FOR_LOO = 1000
"""Observations whose leave-one-out weights are looked at: a second or so."""

WORST_K = 9.99
"""From 1 on there is not even a mean: how far above does not matter."""

SAME_AS_PRIOR, HARDLY_MOVED = 0.9, 0.5


def influential(facts: Facts) -> Iterator[Finding]:
    """Observations that change the posterior much when left out."""
    group, count = facts.group("log_likelihood"), facts.chains * facts.count
    if group is None or count < FEWEST:
        return
    values = [data for data in group.data_vars.values() if data.dims[:2] == ("chain", "draw")]
    if not 0 < sum(data[0, 0].size for data in values) <= MOST_FOR_LOO:
        return
    from arviz_stats.base import array_stats

    limit = min(1 - 1 / np.log10(count), TRUSTED_K)
    own = facts.stat("log_weight") if facts.approximate else None  # draws that are not of the posterior have weights
    log_weight = own.reshape(count, 1) if own is not None and np.isfinite(own).all() else 0.0
    names, found = [], []
    for data in values:
        columns = data.values.reshape(count, -1).astype(float)
        # Where a draw makes no difference there is no tail; a smaller one is rounding.
        with np.errstate(invalid="ignore"):
            usable = np.isfinite(columns).all(0) & (np.ptp(columns, axis=0) > 1e-6)
            columns = columns - log_weight
            usable &= np.ptp(columns, axis=0) > 1e-6
        labels = element_names(data) if usable.any() else []
        for i in np.flatnonzero(usable):
            names.append(labels[i])
            weights = np.exp(columns[:, i].min() - columns[:, i])
            if weights.sum() < 2:  # one draw has most of the weight, and there is no tail to fit
                found.append(WORST_K)
            else:
                found.append(float(array_stats.psislw(columns[:, i])[1]))
    khat = np.nan_to_num(np.array(found), nan=WORST_K).clip(max=WORST_K)
    high = np.flatnonzero(khat > limit)
    if len(khat):
        facts.figures.append(f"leave-one-out k-hat at most {khat.max():.2f}")
    if len(high):
        yield Finding(
            "note",
            "influential",
            f"{len(high)} of {len(khat)} observations have much influence: leave-one-out k-hat of "
            f"{worst_of([names[i] for i in high], khat[high], '.2f')}, above {limit:.2f}.",
            "leave-one-out scores (az.loo) cannot be trusted for them, and the model may not expect them",
            "a look at these observations; for scores, folds of data that are left out and fitted again",
        )


def from_the_prior(facts: Facts) -> Iterator[Finding]:
    """Parameters whose posterior is about their prior."""
    prior = facts.group("prior")
    if prior is None or prior.sizes.get("draw", 0) * prior.sizes.get("chain", 0) < FEWEST_FROM_PRIOR:
        return
    posterior = facts.posterior["posterior"].to_dataset()
    names: list[str] = []
    ratios: list[np.ndarray] = []
    for name in dict.fromkeys(facts.latent.variables):
        if name not in prior or prior[name].shape[2:] != posterior[name].shape[2:]:
            continue
        after, before = (
            np.quantile(data.values.reshape(data.shape[0] * data.shape[1], -1), (0.05, 0.5, 0.95), axis=0)
            for data in (posterior[name], prior[name])
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (after[2] - after[0]) / (before[2] - before[0])
            shift = np.abs(after[1] - before[1]) / (before[2] - before[0])
        # The width of a 90% interval is 3.3 standard deviations of a normal law, and exists for every other.
        kept = np.flatnonzero((ratio > SAME_AS_PRIOR) & np.isfinite(ratio) & (3.3 * shift < HARDLY_MOVED))
        labels = element_names(posterior[name]) if len(kept) else []
        names += [labels[i] for i in kept]
        ratios.append(ratio[kept])
    if names:
        yield Finding(
            "note",
            "prior",
            f"The data say little about {worst_of(names, np.concatenate(ratios), '.2f')}: in brackets the width of the "
            "posterior over that of the prior.",
            "what the posterior says about them is what the prior said",
            "a prior that you would defend; more varied demonstrations; or leave it at that",
        )
