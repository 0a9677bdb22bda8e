"""How good is an estimate of a reward, or of a policy? Numbers, for all posterior draws in one call.

Every function takes leading batch dimensions (draws, chains, subjects) that broadcast against each other, and works
through them in blocks, so that thousands of draws need no more memory than a few.

Rewards are compared up to what they mean for behaviour: by what an agent loses who follows the estimate
(:func:`expected_value_difference`), or by pseudometrics that are zero where two rewards say the same (EPIC for
r(s,a,s') whatever the dynamics; STARC for r(s,a) under known dynamics). Policies are compared with held-out choices
(:func:`held_out_log_likelihood`), with demonstrated features (:func:`feature_gap`) and with each other
(:func:`policy_divergence`).
"""

from pirl.metrics.policies import (
    Divergence,
    HeldOut,
    feature_gap,
    held_out_log_likelihood,
    interval_coverage,
    policy_divergence,
)
from pirl.metrics.rewards import epic_distance, expected_value_difference, starc_distance

__all__ = [
    "Divergence",
    "HeldOut",
    "epic_distance",
    "expected_value_difference",
    "feature_gap",
    "held_out_log_likelihood",
    "interval_coverage",
    "policy_divergence",
    "starc_distance",
]
