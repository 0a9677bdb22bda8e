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
# # Can this posterior be believed?
#
# A posterior comes with diagnostics: R-hat, effective sample size, divergences. They say whether the chains agree about
# the distribution that the model defines. They do not say whether it is the distribution that you meant. A wrong line
# gives a wrong posterior, and its chains agree about it perfectly.
#
# Simulation-based calibration asks the other question. Draw parameters from the prior, demonstrations from the model
# with those parameters, and a posterior from those demonstrations; again and again. If all is well the truth is just
# one more draw from the posterior, and its rank among the others is uniform. This notebook does so
#
# 1. with a model that is right,
# 2. with one in which a line is wrong,
# 3. with one that is right, applied to people of another kind.

# %%
import os

import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pirl
from pirl.datasets import simulate
from pirl.envs import gridworld, gridworld_features
from pirl.plots import plot_ranks, plot_recovery
from pirl.verdicts import words

# PIRL_SHORT=1 in the environment: a handful of replicates. For tests, not for conclusions.
SHORT = os.environ.get("PIRL_SHORT") == "1"
num_replicates = 8 if SHORT else 200
SIZES = {"num_replicates": num_replicates, "num_chains": 8, "num_warmup": 80, "num_samples": 40, "num_draws": 39,
         "seed": 1, "progress": False}  # fmt: skip
pd.set_option("display.precision", 2, "display.width", 140)

# %% [markdown]
# ## 1. A model that is right
#
# Somebody walks over a field of 4 x 4 cells, on which two landmarks stand; the ground is slippery, so that one step in
# four goes elsewhere. Twelve walks of five steps are watched. Of the demonstrations that are given to `pirl.calibrate`
# only the plan counts: how many, how long, from where.

# %%
STEPS = 5
mdp = gridworld(4, 4, slip=0.25, horizon=STEPS)
features = gridworld_features(4, 4, num_features=2)
plan = simulate(mdp, torch.zeros(16, dtype=mdp.dtype), num_episodes=12, length=STEPS)


def model(demos, mdp, features):
    prior = dist.Normal(0.0, 2.0).expand([features.shape[-1]]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["landmark"]})
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


sound = pirl.calibrate(model, plan, mdp, features, **SIZES)
pirl.verdicts(sound)

# %% [markdown]
# A row a *test quantity*. Besides the two weights there are two that depend on the data as well: the log-likelihood,
# and the *return gap*, by how much the demonstrators' behaviour earns more than wandering about. They see what
# parameters alone do not: a posterior that ignores the data ranks its own prior draws perfectly, but not their
# likelihood.
#
# `p_adjusted` is small where the ranks of a quantity are not uniform (in one sound study of twenty any of them is below
# .05). The coverage of intervals should be what they say, up to a few hundredths with this many replicates.

# %%
print(*words(sound, pirl.verdicts(sound)), sep="\n")

# %% [markdown]
# The same as a picture. A line shows how many more truths than expected lie below each share of the posterior; the band
# holds all lines of a sound study in 95 studies of 100.

# %%
plot_ranks(sound)

# %% [markdown]
# And what cognitive scientists publish: are parameters recovered? Calibrated is not the same as informative. A
# posterior that repeats the prior is calibrated, and recovers nothing. Here the demonstrations tell much (`contraction`
# near 1 in the table): intervals are short, and follow the diagonal. One in ten misses it, as they should.

# %%
plot_recovery(sound)

# %% [markdown]
# ## 2. A sum too many
#
# Now the likelihood is written by hand, as one does for choices in an experiment: the log-probability of each choice
# under the policy, summed. Somewhere in these lines is a slip that is easily made in Pyro.


# %%
def summed(demos, mdp, features):
    prior = dist.Normal(0.0, 2.0).expand([features.shape[-1]]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["landmark"]})
    log_policy = pirl.soft_policy(mdp, pirl.linear_reward(features, weights))  # [time, state, action]
    states, actions = demos.as_tensor()[:, :STEPS].unbind(-1)
    with pyro.plate("episode", len(demos)):
        pyro.factor("choices", log_policy[torch.arange(STEPS), states, actions].sum())


# %% [markdown]
# Nothing shows when it is fitted. The chains agree, there are no divergences, and the weights look like weights.

# %%
true_weights = torch.tensor([2.0, -1.0], dtype=mdp.dtype)
seen = simulate(mdp, pirl.linear_reward(features, true_weights), num_episodes=12, length=STEPS, seed=3)
fitted = pirl.fit(summed, seen, mdp, features, num_chains=8, num_warmup=300, num_samples=200, progress=False,
                  num_prior=0, num_posterior_predictive=0, log_likelihood=False)  # fmt: skip
problems = [finding for finding in pirl.diagnose(fitted) if finding.severity == "problem"]
print(f"{len(problems)} problems found by pirl.diagnose")

# %% [markdown]
# A `pyro.factor` says how likely the data are but cannot draw them, so calibration needs to be told how they come
# about: a function from parameters to data, which is best written apart from the model.


# %%
def walks(parameters, arguments):
    reward = pirl.linear_reward(arguments["features"], parameters["weights"])
    law = pirl.MaxCausalEntTrajectory(arguments["mdp"], reward, lengths=arguments["demos"].lengths)
    table = law.sample()
    return {"demos": pirl.Trajectories(table[..., 0], table[:, :-1, 1])}


doubled = pirl.calibrate(summed, plan, mdp, features, draw_data=walks, **SIZES)
print(*words(doubled, pirl.verdicts(doubled)), sep="\n")

# %%
plot_ranks(doubled)

# %% [markdown]
# The truth lies too often in the tails: below most draws or above them, which makes the line an S that leaves the band.
# The posterior is too narrow. The plate has twelve episodes, and `sum()` without a dim adds up the choices of all of
# them; so each episode of the plate gets the whole sum, and everything counts twelve times. `sum(-1)` is right.

# %%
pirl.verdicts(doubled)

# %% [markdown]
# ## 3. Right, for other people
#
# The trajectory reading of exp(r) supposes a demonstrator whom luck obeys. Suppose that we use it for people whom luck
# does not obey. The model is coded without a fault; it is the world that is otherwise. `draw_data` lets us ask what we
# would then believe.


# %%
def lucky(demos, mdp, features):
    prior = dist.Normal(0.0, 2.0).expand([features.shape[-1]]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["landmark"]})
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


misread = pirl.calibrate(lucky, plan, mdp, features, draw_data=walks, **SIZES)
pirl.verdicts(misread)

# %%
plot_recovery(misread)

# %% [markdown]
# Who slips off a good cell is taken for somebody who did not care for it: estimates are drawn towards zero, and the
# intervals are too sure of it. Diagnostics of the chains would never have said so.
#
# From a shell, for a model file:
#
#     pirl calibrate models/gridworld.py --replicates 200 --plot ranks.png --recovery recovery.png
#
# The exit status is 1 when a quantity leaves its band.
