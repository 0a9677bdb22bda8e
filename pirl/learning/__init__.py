"""Posteriors with a policy in the loop, where dynamics are known by sampling only."""

from pirl.learning.guided_posterior import GuidedPosterior, bayesian_guided_cost

__all__ = ["GuidedPosterior", "bayesian_guided_cost"]
