"""Posteriors that are learned: with a policy in the loop of a simulator, or from demonstrations alone."""

from pirl.learning.guided_posterior import GuidedPosterior, bayesian_guided_cost
from pirl.learning.offline import OfflinePosterior, offline_posterior

__all__ = ["GuidedPosterior", "OfflinePosterior", "bayesian_guided_cost", "offline_posterior"]
