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
# # What does a posterior add to a point estimate?
#
# Maximum entropy IRL gives one reward, and so does apprenticeship learning by margins. Both are good at imitating. This
# notebook asks two questions of them that only a posterior answers:
#
# 1. With few demonstrations, how wrong may the answer be?
# 2. With many, what will never be known?
#
# It helps to have read `notebooks/01_gridworld.py`.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pirl
from pirl.baselines import cloning, max_margin, maxent
from pirl.datasets import simulate
from pirl.envs import gridworld, gridworld_features
from pirl.identify import unidentified
from pirl.metrics import expected_value_difference
from pirl.plots import BLUE, ORANGE, plot_estimates

# PIRL_SHORT=1 in the environment: fewer worlds, demonstrations and draws. For tests, not for conclusions.
SHORT = os.environ.get("PIRL_SHORT") == "1"
GREEN, GREY = "#009E73", "#555555"

# %% [markdown]
# ## 1. From one demonstration to a hundred
#
# Many small worlds of 5 x 5 cells, each with its own landmarks; what each landmark is worth is drawn from a standard
# normal distribution, which is also the prior. In each world somebody is watched once, three times, ... a hundred
# times, for ten decisions. Every method gets the same demonstrations.

# %%
num_worlds = 2 if SHORT else 20
num_seen = [1, 10] if SHORT else [1, 3, 10, 30, 100]
SIZE, STEPS, LANDMARKS = 5, 10, 3
mdp = gridworld(SIZE, SIZE, slip=0.1, horizon=STEPS)


def model(demos, mdp, features):
    weights = pyro.sample(
        "weights", dist.Normal(0.0, 1.0).expand([LANDMARKS]).to_event(1), infer={"dims": ["landmark"]}
    )
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


SAMPLER = {"num_chains": 16, "num_warmup": 100, "num_samples": 30 if SHORT else 60, "progress": False}
FEW = {"num_prior": 0, "num_posterior_predictive": 0, "log_likelihood": False}


# %% [markdown]
# The *expected value difference* is what somebody loses who acts on the answer: the best return under the true reward,
# less the return of the policy that is best under the answer. *Coverage* is the share of weights that lie in the 90%
# interval of an answer. MaxEnt has an interval, its estimate plus and minus 1.645 standard errors, which is right for
# many demonstrations. With one it may have no finite estimate at all: whoever never took a step to the left, never
# will. (A small penalty, `l2`, keeps the search finite; it is not in the standard error's theory.) Apprenticeship
# learning answers with a mixture of policies, and no interval.

# %%
rows, watched = [], []
for world in range(num_worlds):
    features = gridworld_features(SIZE, SIZE, LANDMARKS, seed=world)
    truth = torch.randn(LANDMARKS, dtype=torch.float64, generator=torch.Generator().manual_seed(world))
    reward = pirl.linear_reward(features, truth)
    everything = simulate(mdp, reward, num_seen[-1], STEPS, seed=world)
    watched.append(float(expected_value_difference(mdp, reward, policy=pirl.soft_policy(mdp, reward).exp()[None])))
    for number in num_seen:
        demos = everything[:number]
        posterior = pirl.fit(model, demos, mdp, features, seed=world, **SAMPLER, **FEW)
        draws = torch.from_numpy(posterior.posterior["weights"].values).flatten(0, 1)
        point = maxent(demos, mdp, features, l2=0.01, tolerance=1e-6)
        margin = max_margin(demos, mdp, features, epsilon=0.05)
        answers = {
            "posterior mean": (draws.mean(0), np.quantile(draws, [0.05, 0.95], axis=0)),
            "MaxEnt": (point.parameters["weights"], point.interval(0.9)["weights"].numpy()),
            "max-margin": (margin.parameters["weights"], None),
        }
        for name, (weights, interval) in answers.items():
            policies = pirl.optimal_policy(mdp, pirl.linear_reward(features, weights)).policy[None]
            shares = torch.ones(1, dtype=torch.float64)
            if name == "max-margin":
                shares, policies = margin.mixture
            lost = float(shares @ expected_value_difference(mdp, reward, policy=policies))
            inside = np.nan
            if interval is not None:
                inside = np.mean((interval[0] <= truth.numpy()) & (truth.numpy() <= interval[1]))
            width = np.nan if interval is None else np.median(interval[1] - interval[0])
            rows.append({"world": world, "demonstrations": number, "answer": name, "EVD": lost, "coverage": inside,
                         "width": width})  # fmt: skip
results = pd.DataFrame(rows)
print(results.groupby(["answer", "demonstrations"])[["EVD", "coverage", "width"]].mean().round(3).to_string())

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (name, part), colour, marker in zip(results.groupby("answer"), [ORANGE, GREEN, BLUE], "sDo", strict=True):
    mean = part.groupby("demonstrations")[["EVD", "coverage"]].mean()
    error = part.groupby("demonstrations")["EVD"].sem()
    left.errorbar(mean.index, mean["EVD"], 1.645 * error, color=colour, marker=marker, capsize=3, label=name)
    if mean["coverage"].notna().any():
        right.plot(mean.index, mean["coverage"], color=colour, marker=marker, label=f"{name.split()[0]}, 90% interval")
left.axhline(np.mean(watched), color=GREY, linestyle=":", label="who is watched")
count = num_worlds * LANDMARKS
half = 1.645 * np.sqrt(0.9 * 0.1 / count)
right.axhspan(0.9 - half, min(1.0, 0.9 + half), color=GREY, alpha=0.15, label="what chance allows at 90%")
right.set(ylim=(0.4, 1.03), ylabel="share of true weights inside")
left.set(ylabel="return lost by acting on the answer")
for ax in (left, right):
    ax.set_xscale("log")
    ax.set_xticks(num_seen, [str(n) for n in num_seen])
    ax.minorticks_off()
    ax.set_xlabel("demonstrations")
    ax.legend(frameon=False)
left.set_title("How good is the advice?")
right.set_title("Does it know how good?")
plt.show()

# %% [markdown]
# Who is watched does not act perfectly, but as soft-optimal demonstrators do: better actions are likelier, no more. The
# mixture of max-margin promises the return of who is watched, not more, and delivers that. MaxEnt and the posterior
# see through the noise, and their advice is soon better than what they saw; in these worlds they are equally good.
# What differs is what they say of themselves. With one demonstration MaxEnt's intervals are several times as wide as
# the posterior's: they hold too much, where they say anything. The posterior's hold what they promise at any number of
# demonstrations, and when there are many, the two agree.

# %% [markdown]
# ## 2. What will never be known
#
# A rat in a corridor of nine cells. At the right end there are food *and* light, always together. It goes there. Does
# it like the food, or the light? A thousand visits do not tell.

# %%
CELLS = 9
num_visits = 20 if SHORT else 200
corridor = gridworld(1, CELLS, slip=0.0, discount=0.9, initial=(0, CELLS // 2))
food, light, dark = (torch.zeros(CELLS, dtype=torch.float64) for _ in range(3))
food[-1] = light[-1] = 1.0
dark[0] = 1.0
things = torch.stack([food, light, dark], -1)
rat = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)  # it likes food, is indifferent to light, fears the dark
seen = simulate(corridor, pirl.linear_reward(things, rat), num_visits, 12)


def rat_model(demos, mdp, features):
    weights = pyro.sample("weights", dist.Normal(0.0, 2.0).expand([3]).to_event(1), infer={"dims": ["thing"]})
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


names = ["food", "light", "dark"]
posterior = pirl.fit(rat_model, seen, corridor, things, coords={"thing": names}, **SAMPLER, **FEW)
point = maxent(seen, corridor, things, tolerance=1e-6)
other = maxent(seen, corridor, things, tolerance=1e-6, start=torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64))
margin = max_margin(seen, corridor, things, epsilon=0.05)
for name, estimate in {"MaxEnt": point, "MaxEnt, begun elsewhere": other, "max-margin": margin}.items():
    print(f"{name:24}", dict(zip(names, estimate.parameters["weights"].numpy().round(2).tolist(), strict=True)))
print("log-likelihood of the two:", round(point.attrs["log_likelihood"], 6), round(other.attrs["log_likelihood"], 6))

# %% [markdown]
# MaxEnt shares the credit equally, begun elsewhere otherwise: both explain the walks equally well, to the last digit.
# pirl's standard errors are infinite where there is no information, and `unidentified` says beforehand, from the
# problem alone, which direction no demonstration can show.

# %%
print(point.table().round(3).to_string(), "\n")
blind = unidentified(corridor, features=things)
print("not identified:", [dict(zip(names, u.tolist(), strict=True)) for u in blind.null.T.numpy().round(2)])

# %%
draws = posterior.posterior["weights"].values.reshape(-1, 3)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=[1, 1.2])
left.plot(draws[:, 0], draws[:, 1], ".", color=BLUE, markersize=3, alpha=0.4, label="posterior")
for estimate, marker, label in ((point, "s", "MaxEnt"), (other, "D", "MaxEnt, begun elsewhere")):
    left.plot(
        *estimate.parameters["weights"][:2], marker, color=ORANGE, markersize=8, markeredgecolor="white", label=label
    )
left.plot(*rat[:2], "*", color="black", markersize=12, label="truth")
left.set(xlabel="worth of food", ylabel="worth of light", title="Only the sum is known")
left.legend(frameon=False)

# %% [markdown]
# Does it matter? In another corridor the food is on the left and the light on the right. Where will the rat go?

# %%
elsewhere = torch.stack([food.flip(0), light, torch.zeros(CELLS, dtype=torch.float64)], -1)


def goes_left(weights):
    """Expected share of the time spent in the left half, less that in the right."""
    visits = pirl.occupancy(corridor, pirl.linear_reward(elsewhere, weights), "causal").sum(-1) * (
        1 - corridor.discount
    )
    return visits[..., : CELLS // 2].sum(-1) - visits[..., CELLS // 2 + 1 :].sum(-1)


right.hist(
    goes_left(torch.from_numpy(draws)), np.linspace(-1, 1, 41), density=True, color=BLUE, alpha=0.6, label="posterior"
)
for weights, colour, style, label in (
    (point.parameters["weights"], ORANGE, "-", "MaxEnt"),
    (other.parameters["weights"], ORANGE, "--", "MaxEnt, begun elsewhere"),
    (rat, "black", ":", "truth"),
):
    right.axvline(float(goes_left(weights)), color=colour, linestyle=style, linewidth=2, label=label)
right.set(
    xlabel="time spent left less right in the other corridor",
    ylabel="density",
    title="So it is not known where it would go",
)
right.legend(frameon=False)
plt.show()

# %% [markdown]
# The posterior says: it may go either way. A point estimate names one answer, and which one depends on where its search
# began. To learn more, do not watch more of the same: separate food from light.
#
# The same parameters, side by side:

# %%
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
plot_estimates(
    ax,
    {name: draws[:, i] for i, name in enumerate(names)},
    {"MaxEnt": dict(zip(names, point.parameters["weights"].tolist(), strict=True))},
    truth=dict(zip(names, rat.tolist(), strict=True)),
)
ax.set_ylabel("thing")
plt.show()

# %% [markdown]
# ## 3. On demonstrations that nobody has seen
#
# `pirl.compare` puts all answers into one table: how likely they find held-out decisions, and, since here the truth is
# known, what acting on them costs. From a shell: `pirl compare models/gridworld.py`.

# %%
features = gridworld_features(SIZE, SIZE, LANDMARKS, seed=1)
truth = torch.tensor([1.5, -1.0, 0.5], dtype=torch.float64)
reward = pirl.linear_reward(features, truth)
demos, held_out = simulate(mdp, reward, 8, STEPS, seed=1), simulate(mdp, reward, 50, STEPS, seed=2)
posterior = pirl.fit(model, demos, mdp, features, **SAMPLER, num_prior=0, num_posterior_predictive=0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of eight demonstrations leave-one-out says little
    table = pirl.compare(
        {
            "posterior": posterior,
            "MaxEnt": maxent(demos, mdp, features, tolerance=1e-6),
            "max-margin": max_margin(demos, mdp, features, epsilon=0.05),
            "cloning": cloning(demos, mdp),
        },
        held_out,
        mdp,
        rewards={"posterior": pirl.reward_draws(posterior, model, demos, mdp, features)},
        truth=reward,
        features=features,
    )
print(table.round(3).to_string())
