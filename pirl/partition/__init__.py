"""The partition function of unknown dynamics, estimated from samples: tensors of log weights in, log Z-hat out.

For trajectories tau_j from a proposal q, w_j = p(tau_j) exp(sum of rewards) / q(tau_j), whose mean is unbiased for
Z = E_p[exp sum of rewards]. Where q used the true dynamics these cancel, and

    log w_j = sum_t r(s_t, a_t) + sum_t [log p(a_t|s_t) - log pi(a_t|s_t)],

so that a simulator is enough. This is the trajectory reading of exp(r): under chance no causal policy makes the weights
constant. Every estimator takes leading batch dimensions (one for each reward) and is differentiable in the rewards;
its gradient is the average of the returns' gradients under the self-normalised weights. Sources: Finn, Levine and
Abbeel (2016); Veach and Guibas (1995) for the balance heuristic; Shi and Cornish (2021) for the multilevel estimator.
"""

from pirl.partition.estimators import (
    Constants,
    Sandwich,
    importance,
    log_mean_exp,
    mixture_log_density,
    multilevel,
    reconcile,
    sandwich,
)
from pirl.partition.gates import PartitionEstimate, pareto_k, require_trusted, trusted_k, untrusted
from pirl.partition.sequential import ParticleRuns, Particles, smc, smc_trajectories

__all__ = [
    "Constants",
    "ParticleRuns",
    "Particles",
    "PartitionEstimate",
    "Sandwich",
    "importance",
    "log_mean_exp",
    "mixture_log_density",
    "multilevel",
    "pareto_k",
    "reconcile",
    "require_trusted",
    "sandwich",
    "smc",
    "smc_trajectories",
    "trusted_k",
    "untrusted",
]
