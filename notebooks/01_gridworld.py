# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does it want? A posterior over rewards in a gridworld
#
# An animal lives in a field of 6 x 6 cells. We saw twenty of its walks, ten decisions each, all from its den in a
# corner. There are four landmarks: a spring, a thicket, a hill and, too far for such walks, a pond. What is each of
# them worth to it?
#
# The animal here is simulated, so that we know the answer and can check. `notebooks/02_bus_engine.py` does the same
# with decisions that a man took.

# %%
import os

import arviz_plots as azp
import arviz_stats as azs
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pirl
from pirl.datasets import simulate
from pirl.envs import gridworld
from pirl.plots import BLUE, ORANGE, plot_forest, plot_reward_map

# PIRL_SHORT=1 in the environment: fewer and shorter chains, everything else the same. For tests, not for conclusions.
SHORT = os.environ.get("PIRL_SHORT") == "1"

# %% [markdown]
# ## The decision problem, and who decided what
#
# A state is a cell; the actions are a step up, down, left or right, and to stay. One step in ten goes astray. That is
# `mdp`: everything but the reward. A cell is worth the sum of its landmarks' worth, which fades with distance.

# %%
SIZE, STEPS, WALKS = 6, 10, 20
landmarks = {"spring": (1, 1), "thicket": (4, 2), "hill": (3, 3), "pond": (0, 5)}
true_weights = torch.tensor([1.5, -1.0, 0.5, 1.0], dtype=torch.float64)

mdp = gridworld(SIZE, SIZE, slip=0.1, horizon=STEPS, initial=(5, 0))
cells = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).double()
centres = torch.tensor(list(landmarks.values())).double()
features = torch.exp(-(torch.cdist(cells, centres) ** 2) / 2)  # [cell, landmark]
true_reward = pirl.linear_reward(features, true_weights)  # [cell, 1]

demos = simulate(mdp, true_reward, WALKS, STEPS, seed=1)
visits = np.bincount(demos.states.flatten(), minlength=SIZE**2)
print(mdp, demos, sep="\n")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
plot_reward_map(left, true_reward, SIZE, SIZE, "true reward, hidden from the analyst")
plot_reward_map(right, visits, SIZE, SIZE, f"{WALKS} walks from the lower left, three drawn", label="visits")
for name, (row, column) in landmarks.items():
    left.plot(column, row, "o", markersize=14, markerfacecolor="none", markeredgecolor="white")
    left.annotate(name, (column, row), (0, -16), textcoords="offset points", ha="center", color="white")
for number, colour in enumerate(["white", ORANGE, "#CC79A7"]):
    row, column = np.divmod(demos.states[number].numpy(), SIZE)
    aside = 0.12 * (number - 1)  # so that walks through the same cells stay apart
    right.plot(column + aside, row + aside, ".-", color=colour)
plt.show()

# %% [markdown]
# ## The model
#
# Six lines of Pyro: what we think of the weights before any walk, the reward that they make, and the walks of an
# animal that mostly does what is best (at each step the probability of an action is proportional to the exponential
# of what it is worth, future included).


# %%
def model(demos, mdp, features):
    prior = dist.Normal(0.0, 2.0).expand([features.shape[-1]]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["landmark"]})
    reward = pirl.linear_reward(features, weights)
    with pyro.plate("walk", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


posterior = pirl.fit(
    model,
    demos,
    mdp,
    features,
    coords={"landmark": list(landmarks)},
    num_chains=16,  # all at once
    num_warmup=30 if SHORT else 100,
    num_samples=30 if SHORT else 100,
    num_posterior_predictive=40 if SHORT else 400,
    seed=1,
)

# %% [markdown]
# ## Can the sampling be trusted?
#
# R-hat near 1 (the chains agree), hundreds of effective draws, no divergent transitions, chains that look alike.

# %%
print(int(posterior["sample_stats"]["diverging"].sum()), "divergent transitions")
azs.summary(posterior, ci_prob=0.9)

# %%
azp.plot_trace_dist(posterior, compact=False, figure_kwargs={"figsize": (10, 8), "layout": "constrained"})
plt.show()

# %% [markdown]
# ## Posterior, truth, and the best single answer
#
# Maximum likelihood is the usual single answer: the same distribution of walks, and an optimiser instead of a sampler.

# %%
estimate = torch.zeros(len(landmarks), dtype=torch.float64, requires_grad=True)
optimiser = torch.optim.LBFGS([estimate], max_iter=200, line_search_fn="strong_wolfe")


def log_likelihood(weights):
    law = pirl.MaxCausalEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
    return law.log_prob_sum(demos.as_tensor())


def loss():
    optimiser.zero_grad()
    value = -log_likelihood(estimate)
    value.backward()
    return value


optimiser.step(loss)
best, other = estimate.detach(), estimate.detach().clone()
other[-1] = true_weights[-1]
print({name: round(weight, 2) for name, weight in zip(landmarks, best.tolist(), strict=True)})
print(f"log-likelihood {log_likelihood(best):.2f}; with the true weight of the pond {log_likelihood(other):.2f}")

# %%
draws = posterior["posterior"]["weights"]
by_landmark = {name: draws.sel(landmark=name).values for name in landmarks}

figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
heights = np.arange(len(landmarks))
ax.barh(heights, 2 * 3.29, left=-3.29, height=0.6, color="0.93", zorder=0, label="prior, 90%")
ax.plot(best.clamp(min=-4.4), heights + 0.2, "ks", label="maximum likelihood")
for height, weight in zip(heights, best.tolist(), strict=True):
    if weight < -4.4:
        ax.annotate(f"at {weight:.1f}", (-4.25, height + 0.2), va="center")
plot_forest(ax, by_landmark, dict(zip(landmarks, true_weights.tolist(), strict=True)), "truth")
ax.set(xlabel="weight (worth of being there for one step)", ylabel="landmark", xlim=(-4.7, 4.2))
plt.show()

# %% [markdown]
# The walks tell the worth of the spring well, and hardly anything about the pond, which they never came near. The
# posterior says so: there it is nearly the prior. Maximum likelihood answers with a number all the same, far from the
# truth, and nothing in it warns that the truth explains the walks almost as well.
#
# ## The reward, with its uncertainty

# %%
rewards = pirl.linear_reward(features, torch.from_numpy(draws.values))[..., 0]  # [chain, draw, cell]: all in one call
mean, sd = rewards.mean(dim=(0, 1)), rewards.std(dim=(0, 1))
ends = (float(min(mean.min(), true_reward.min())), float(max(mean.max(), true_reward.max())))

figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
plot_reward_map(axes[0], true_reward, SIZE, SIZE, "truth", ends)
plot_reward_map(axes[1], mean, SIZE, SIZE, "posterior mean", ends)
plot_reward_map(axes[2], sd, SIZE, SIZE, "posterior sd", label="sd")
plt.show()

# %% [markdown]
# ## Does the model reproduce what was seen?
#
# `pirl.fit` has also simulated twenty walks from each of many posterior draws. Each point is a cell: how often it was
# visited, and how often it is in the simulations.

# %%
simulated = posterior["posterior_predictive"]["trajectories"].values[..., 0].astype(int)  # [chain, draw, walk, step]
simulated = simulated.reshape(-1, WALKS * (STEPS + 1))
replicated = np.stack([np.bincount(walks, minlength=SIZE**2) for walks in simulated])
low, median, high = np.quantile(replicated, [0.05, 0.5, 0.95], axis=0)
print(f"{np.mean((low <= visits) & (visits <= high)):.0%} of the cells lie within their 90% interval")

figure, ax = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
ax.errorbar(visits, median, yerr=[median - low, high - median], fmt="o", color=BLUE, label="median and 90% interval")
ax.axline((0, 0), slope=1, color="0.6", linestyle="--", label="as observed")
ax.set(xlabel="visits observed", ylabel="visits simulated from the posterior", title="posterior predictive check")
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# How well would the model predict a walk that it has not seen? Leave-one-out cross-validation, from the same draws,
# beside an animal that does not care (weights of zero).

# %%
loo = azs.loo(posterior)
indifferent = pirl.MaxCausalEntTrajectory(mdp, torch.zeros_like(true_reward)).log_prob(demos.as_tensor()).sum()
print(loo)
print(f"log predictive density a walk: {loo.elpd / WALKS:.1f}; of an indifferent animal: {indifferent / WALKS:.1f}")

# %% [markdown]
# To fit your own demonstrations, replace `mdp`, `demos` and `features`: `pirl.TabularMDP` takes any table of
# transition probabilities, `pirl.Trajectories.from_dataframe` any log of states and actions.
