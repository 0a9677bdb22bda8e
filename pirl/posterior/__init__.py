"""What draws of a model's parameters mean: the rewards that they make, and what of them demonstrations determine."""

from pirl.posterior.draws import reward_draws
from pirl.posterior.from_samples import prior_rewards, sampled_rewards

__all__ = ["prior_rewards", "reward_draws", "sampled_rewards"]
