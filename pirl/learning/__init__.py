"""Posteriors that are learned: with a policy in the loop of a simulator, or from demonstrations alone."""

from pirl.learning.guided_posterior import GuidedPool, GuidedPosterior, bayesian_guided_cost, guided_pool
from pirl.learning.offline import OfflinePosterior, offline_posterior

__all__ = [
    "GuidedPool", "GuidedPosterior", "OfflinePosterior", "bayesian_guided_cost", "guided_pool", "offline_posterior",
]  # fmt: skip
