"""Bayesian inverse reinforcement learning as probabilistic inference, on Pyro, PyTorch and ArviZ.

People watch someone act and ask what they wanted. Many rewards explain the same behaviour, so the honest answer is a
posterior. pirl is the vocabulary (decision problems, trajectories, their distributions, inference engines); a Pyro
model is the sentence written with it.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from pirl.calibrate import calibrate
from pirl.compare import compare
from pirl.continuous import ContinuousTrajectories
from pirl.diagnose import diagnose
from pirl.distributions import MaxCausalEntTrajectory, MaxEntTrajectory
from pirl.fit import fit
from pirl.mdp import TabularMDP
from pirl.message_passing import Messages, log_partition, messages, occupancy, soft_policy
from pirl.planning import most_likely_trajectory, optimal_policy, policy_value, stationary_distribution
from pirl.pool import Pool
from pirl.posterior import reward_draws
from pirl.rewards import expected_reward, lifted_network, lifted_reward, linear_reward, neural_reward, tabular_reward
from pirl.sampled import FeatureReward, SampledMaxEntTrajectory
from pirl.trajectories import Trajectories
from pirl.verdicts import is_calibrated, print_verdicts, verdicts

__version__ = "0.1.0"

__all__ = [
    "ContinuousTrajectories",
    "FeatureReward",
    "MaxCausalEntTrajectory",
    "MaxEntTrajectory",
    "Messages",
    "Pool",
    "SampledMaxEntTrajectory",
    "TabularMDP",
    "Trajectories",
    "calibrate",
    "compare",
    "diagnose",
    "expected_reward",
    "fit",
    "is_calibrated",
    "lifted_network",
    "lifted_reward",
    "linear_reward",
    "log_partition",
    "messages",
    "most_likely_trajectory",
    "neural_reward",
    "occupancy",
    "optimal_policy",
    "policy_value",
    "print_verdicts",
    "reward_draws",
    "soft_policy",
    "stationary_distribution",
    "tabular_reward",
    "verdicts",
]


def _rooms() -> set[str]:
    return {room.name for room in iter_modules(__path__) if not room.name.startswith("_")}


def __getattr__(name: str) -> ModuleType:
    """A room by its name, imported when first asked for: ``pirl.plots`` brings matplotlib, and ``pirl`` must not."""
    if name.startswith("_") or name not in _rooms():
        raise AttributeError(f"module 'pirl' has no attribute {name!r}")
    return import_module(f"pirl.{name}")


def __dir__() -> list[str]:
    # What needs an extra can be asked for, but is not there for whoever looks at everything, as help(pirl) does.
    return sorted({*globals(), *_rooms()} - {"stable_baselines"})
