"""Decision problems that can only be sampled: simulators, policies that act in them, and roll-outs.

A simulator is anything with ``horizon``, ``reset`` and ``step`` (stateless and vectorised over episodes), or, like a
Gymnasium environment, anything that plays whole episodes itself; :func:`roll_out` serves both. Roll-outs keep log q of
the decisions, sum_t log pi(a_t|s_t): with the true dynamics in both, p(tau) / q(tau) needs nothing else.
"""

from pirl.simulators.environments import GymSimulator
from pirl.simulators.finite import BaseMeasure, TabularPolicy, TabularSimulator, base_policy, log_base_measure
from pirl.simulators.playing import log_density, roll_out
from pirl.simulators.protocols import EpisodeSimulator, Policy, Simulator, WholeLaw
from pirl.simulators.rollouts import Rollouts

__all__ = [
    "BaseMeasure",
    "EpisodeSimulator",
    "GymSimulator",
    "Policy",
    "Rollouts",
    "Simulator",
    "TabularPolicy",
    "TabularSimulator",
    "WholeLaw",
    "base_policy",
    "log_base_measure",
    "log_density",
    "roll_out",
]
