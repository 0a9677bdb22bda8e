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
# # When dynamics can only be sampled
#
# Who infers rewards needs the partition function Z: how much reward was to be had at all. With known dynamics it is
# exact. A robot, a mouse or a market has no table of transition probabilities, but perhaps a simulator. Then log Z is
# estimated from roll-outs, and two questions arise that this notebook answers:
#
# 1. How good is an estimate, and does it know?
# 2. Is the posterior of the reward still right?
#
# Everywhere the true answer is known and shown beside, because the problems are small. It helps to have read
# `notebooks/01_gridworld.py`.

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
from models.linear_gaussian import TRUE_COSTS, costs, load
from models.linear_gaussian import model as puck_model
from pirl.baselines import adversarial, guided_cost, maxent, sample_gradient
from pirl.envs import gridworld
from pirl.errors import PartitionError
from pirl.learning import bayesian_guided_cost
from pirl.particles import tilt
from pirl.partition import multilevel, sandwich
from pirl.plots import BLUE, ORANGE
from pirl.simulators import TabularSimulator, base_policy, roll_out
from pirl.soft_q_learning import SoftQLearner

# PIRL_SHORT=1 in the environment: fewer samples, rounds and draws. For tests, not for conclusions.
SHORT = os.environ.get("PIRL_SHORT") == "1"
GREEN, GREY = "#009E73", "#555555"

# %% [markdown]
# ## 1. log Z from samples
#
# A world of 5 x 5 cells with four kinds of ground. One move in ten goes astray. Somebody starts in the middle and
# makes ten decisions. In the *trajectory reading* of exp(r), trajectories have probability proportional to
# p(trajectory) exp(sum of rewards), and Z is the mean of exp(sum of rewards) over trajectories without any aim.
#
# A `TabularSimulator` hides the dynamics: it can be reset and stepped, no more.

# %%
SIZE, STEPS, KINDS = 5, 10, 4


def world(slip):
    mdp = gridworld(SIZE, SIZE, slip=slip, horizon=STEPS, initial=(2, 2))
    cells = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(1))[: 3 * KINDS]
    ground = torch.zeros(SIZE * SIZE, KINDS, dtype=torch.float64)
    ground[cells, torch.arange(KINDS).repeat(3)] = 1.0
    return mdp, ground


truth = torch.tensor([1.2, -1.0, 0.6, -0.3], dtype=torch.float64)
mdp, ground = world(slip=0.1)
reward = pirl.linear_reward(ground, truth).expand(-1, mdp.num_actions)
exact = float(pirl.log_partition(mdp, reward))
simulator, base = TabularSimulator(mdp), base_policy(mdp)
print(f"exact log Z: {exact:.3f}")

# %% [markdown]
# Three ways to sample, from simple to clever:
#
# - *aimless*: the base policy, which moves at random. Few of its roll-outs find what is worth finding.
# - *a policy that has learned* from transitions where reward is to be had (soft Q-learning). Each roll-out is weighed
#   by how much likelier it is than without an aim.
# - *particles*: many roll-outs at once, of which the unlucky are replaced by copies of the lucky as they go, guided
#   by the same learned values. Their weights need no policy to be perfect, and luck no explaining.

# %%
num_large = 6_000 if SHORT else 60_000
num_repeats = 20 if SHORT else 60
generator = torch.Generator().manual_seed(0)
learner = SoftQLearner(simulator, reading="trajectory")
for _ in range(3):
    policy = learner.update(reward, 1_000, generator)


def log_weights(proposal, number):
    """log w of fresh roll-outs: sum of rewards, plus log p(actions) without aim, less that under the proposal."""
    pool = pirl.Pool.of(roll_out(simulator, proposal, number, generator), proposal, base)
    return pirl.SampledMaxEntTrajectory(pool, reward).log_weights


sizes = [30, 100, 300, 1000, 3000]
rows, estimates = [], {}
for name, proposal in {"aimless": base, "learned policy": policy}.items():
    many = log_weights(proposal, num_large)
    estimates[name] = pirl.partition.importance(many)
    for size in sizes:
        blocks = many[: num_large // size * size].reshape(-1, size)
        found = pirl.partition.log_mean_exp(blocks).numpy()
        rows.append({"sampler": name, "samples": size, "rms error": np.sqrt(np.mean((found - exact) ** 2))})
for size in sizes:
    found = [
        tilt(simulator, policy, reward, size, generator, base=base, num_runs=2)[1].log_partition
        for _ in range(num_repeats)
    ]
    rows.append(
        {"sampler": "particles", "samples": size, "rms error": np.sqrt(np.mean((np.array(found) - exact) ** 2))}
    )
errors = pd.DataFrame(rows)
print(errors.pivot(index="samples", columns="sampler", values="rms error").round(3).to_string())

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
for (name, part), colour, marker in zip(errors.groupby("sampler"), [ORANGE, BLUE, GREEN], "sDo", strict=True):
    left.plot(part["samples"], part["rms error"], marker, color=colour, label=name)
    if name in estimates:
        cv = float(estimates[name].standard_error) * np.sqrt(estimates[name].num_samples)
        left.plot(sizes, cv / np.sqrt(sizes), color=colour, linewidth=1)
left.plot([], [], color=GREY, linewidth=1, label="theory: CV / sqrt(N)")
left.set(xscale="log", yscale="log", xlabel="samples N", ylabel="root mean square error of log Z (nats)")
left.set_title("Every sampler gets there, some sooner")
left.legend(frameon=False)

# %% [markdown]
# The lines are first-order theory, from the coefficient of variation (CV) of the weights. It is right where N is
# large enough; for the aimless sampler even three thousand hardly are.
#
# An estimate of log Z from few samples is too low on average (the logarithm of a mean is not the mean of logarithms).
# So the average of many is a *lower bound*. With one exact draw of the law among the samples it becomes an *upper
# bound*. And there is an estimator without bias, which adds differences between sample sizes at random levels; its
# variance is finite only if the weights' tails are light, and pirl refuses it where they are not.

# %%
law = pirl.MaxEntTrajectory(mdp, reward, lengths=torch.full((400,), STEPS))
drawn = law.sample()
told = pirl.Trajectories(drawn[..., 0], drawn[:, :-1, 1])
pool = pirl.Pool.of(roll_out(simulator, policy, num_large, generator), policy, base)
many = pirl.SampledMaxEntTrajectory(pool, reward).log_weights
given = pool.ratio_of(told.states, told.actions, told.lengths)
returns = (reward[told.states[:, :-1], told.actions]).sum(1)
blocks = [2, 4, 8, 16, 32, 64]
bounds = [sandwich(many[: 400 * block], returns + given, block) for block in blocks]
right.axhline(exact, color="black", linestyle=":", label="exact")
for side, colour, marker in (("lower", BLUE, "D"), ("upper", ORANGE, "s")):
    mean = np.array([float(getattr(bound, side)) for bound in bounds])
    error = np.array([float(getattr(bound, f"{side}_error")) for bound in bounds])
    right.errorbar(blocks, mean, 1.96 * error, color=colour, marker=marker, capsize=3, label=f"{side} bound")
unbiased = multilevel(lambda number: log_weights(policy, number), 500, generator=generator)
right.errorbar(
    [blocks[-1] * 1.6], float(unbiased.log_partition), 1.96 * float(unbiased.standard_error),
    color=GREEN, marker="o", capsize=3, label="without bias (500 replicates)",
)  # fmt: skip
right.set(xscale="log", xlabel="samples a block", ylabel="log Z (nats)")
right.set_xticks(blocks, [str(block) for block in blocks])
right.minorticks_off()
right.set_title("Bounds from both sides")
right.legend(frameon=False)
plt.show()
try:
    multilevel(lambda number: log_weights(base, number), 500, generator=generator)
except PartitionError as refusal:
    print("aimless, without bias: refused:", refusal)

# %% [markdown]
# ## 2. The ladder: a reward from a simulator alone
#
# Now the reward is unknown, and 100 demonstrations are given. The gradient of their likelihood is the difference
# between their features and those of the model's trajectories, which need sampling:
#
# - *sample gradient*: train the best policy for every new reward, and average its fresh roll-outs. "Too expensive".
# - *weighted gradient*: keep the roll-outs of all policies, and weigh them.
# - *guided cost learning*: fit the reward on all samples to the end, then improve the policy a little, and so on.
# - *IRL as a GAN*: the same, with a discriminator that knows the form of the answer, and log Z as its parameter.
#
# With exact dynamics maximum likelihood is known; the table says how far each is from it, and what it cost.

# %%
num_demos, num_rounds, num_rollouts = 100, 4 if SHORT else 10, 200 if SHORT else 1_000
rungs = {
    "sample gradient": (sample_gradient, {"rate": 2.0}),
    "weighted gradient": (sample_gradient, {"rate": 2.0, "reuse": True}),
    "guided cost": (guided_cost, {"tolerance": 0.0}),
    "IRL as a GAN": (adversarial, {"tolerance": 0.0}),
    "guided cost, particles": (guided_cost, {"tolerance": 0.0, "particles": True}),
}
rows, histories = [], {}
for slip in (0.0, 0.1):
    mdp, ground = world(slip)
    torch.manual_seed(0)
    seen = pirl.MaxEntTrajectory(
        mdp, pirl.linear_reward(ground, truth), lengths=torch.full((num_demos,), STEPS)
    ).sample()
    demos = pirl.Trajectories(seen[..., 0], seen[:, :-1, 1])
    best = maxent(demos, mdp, ground, reading="trajectory").parameters["weights"]
    for name, (method, options) in rungs.items():
        often = num_rounds * 4 if method is sample_gradient else num_rounds
        found = method(demos, TabularSimulator(mdp), ground, num_rounds=often, num_rollouts=num_rollouts, **options)
        distance = float((found.parameters["weights"] - best).norm() / best.norm())
        rows.append({"moves astray": slip, "rung": name, "off maximum likelihood": f"{distance:.1%}",
                     "simulator steps": found.attrs["environment_steps"],
                     "effective samples": round(found.attrs["ess"])})  # fmt: skip
        histories[slip, name] = found.history
print(pd.DataFrame(rows).to_string(index=False))

# %% [markdown]
# When no move goes astray, everything ends at the same place, and the rungs differ in cost alone. With chance, the
# plain sample gradient ends somewhere else: its policy cannot choose its luck, and what it matches is the *causal*
# reading's answer. The others weigh their samples, and find what they should.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
for slip, colour, marker in ((0.0, BLUE, "o"), (0.1, ORANGE, "s")):
    spread = np.maximum(histories[slip, "guided cost"]["sd_log_weight"], 1e-16)
    left.plot(np.arange(1, len(spread) + 1), spread, marker=marker, color=colour, label=f"{slip:.0%} of moves astray")
left.set(yscale="log", xlabel="round", ylabel="sd of log weights of the newest policy (nats)")
left.set_title("No policy chooses its luck")
left.legend(frameon=False)
for name, colour, marker in (("guided cost", ORANGE, "s"), ("guided cost, particles", GREEN, "o")):
    share = np.array(histories[0.1, name]["ess"]) / (num_rollouts * np.arange(2, num_rounds + 2))
    right.plot(np.arange(1, len(share) + 1), share, marker=marker, color=colour, label=name)
right.set(ylim=(0, 1), xlabel="round", ylabel="effective samples, as a share of all")
right.set_title("Particles replace the unlucky (10% astray)")
right.legend(frameon=False)
for ax in (left, right):
    ax.xaxis.get_major_locator().set_params(integer=True)
plt.show()

# %% [markdown]
# Without chance a learned policy makes all weights equal, to the last digits of floating-point numbers. With chance
# there is a floor. Particles get below it, as they take luck into their own hands.
#
# ## 3. The posterior
#
# The Pyro model is that of exact dynamics with one name changed: `SampledMaxEntTrajectory(pool, reward)` instead of
# `MaxEntTrajectory(mdp, reward)`. The pool stays as it is while chains run, so they sample one definite
# approximation.
#
# `bayesian_guided_cost` makes the pool: it trains policies for draws of the posterior, adds what they sample, infers
# the posterior again, and stops when log Z is known well enough *over the posterior's draws*.

# %%
num_seen = 20
few = demos[:num_seen]
SAMPLER = {"num_chains": 16, "num_warmup": 100, "num_samples": 50 if SHORT else 150, "progress": False}
SAMPLER |= {"num_prior": 0, "num_posterior_predictive": 0, "log_likelihood": False}


def model(demos, known, ground):
    prior = dist.Normal(0.0, 1.0).expand([KINDS]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["ground"]})
    law = pirl.MaxEntTrajectory if isinstance(known, pirl.TabularMDP) else pirl.SampledMaxEntTrajectory
    with pyro.plate("episode", len(demos)):
        reward = pirl.linear_reward(ground, weights)
        pyro.sample("trajectories", law(known, reward, lengths=demos.lengths), obs=demos.as_tensor())


def label(posterior):
    """What a posterior says of its estimate of log Z."""
    return {key.removeprefix("partition_"): value if isinstance(value, str) else round(float(value), 2)
            for key, value in posterior.posterior.attrs.items()
            if key in ("partition_samples", "partition_ess", "partition_pareto_k", "partition_trusted")}  # fmt: skip


by_messages = pirl.fit(model, few, mdp, ground, **SAMPLER)
guided = bayesian_guided_cost(model, few, TabularSimulator(mdp), ground, num_rollouts=1_000, **SAMPLER)
print("guided pool: ", guided.pool, label(guided.posterior))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    poor_pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 1_000, generator), base, base)
    poor = pirl.fit(model, few, poor_pool, ground, **SAMPLER)
print("poor pool:   ", poor_pool, label(poor))
for warning in caught:
    if "log Z" in str(warning.message):
        print("pirl warns:  ", warning.message)

# %%
figure, axes = plt.subplots(1, KINDS, figsize=(12, 3.4), layout="constrained", sharey=True)
edges = np.linspace(-2.2, 2.2, 49)
for kind, ax in enumerate(axes):
    for posterior, colour, name in ((by_messages, GREY, "exact log Z"), (guided.posterior, BLUE, "guided pool"),
                                    (poor, ORANGE, "poor pool")):  # fmt: skip
        draws = posterior.posterior["weights"].values[..., kind].ravel().clip(edges[0], edges[-1])
        filled = colour is GREY
        ax.hist(draws, edges, density=True, color=colour, alpha=0.4 if filled else 1,
                histtype="stepfilled" if filled else "step", linewidth=1.8, label=name)  # fmt: skip
    ax.axvline(float(truth[kind]), color="black", linestyle=":", label="truth")
    ax.set(xlabel=f"weight of ground {kind + 1}", ylabel="density")
figure.suptitle("Posteriors of the weights: exact, and with log Z from samples")
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# With the guided pool the posterior is that of exact dynamics. With a thousand aimless roll-outs it is off, and the
# weight of ground 1 too large: where samples are missing, Z looks small, and rewards look likelier than they are.
# pirl says so, with figures, and labels the posterior as not to be trusted.
#
# ## 4. Continuous states and actions
#
# A puck slides along a line and is pushed home. How much does somebody mind being away, and how much pushing? States
# are position and velocity, the reward is quadratic, and air moves the puck a little: a linear-Gaussian problem, in
# which log Z is known by a Riccati recursion (`models/linear_gaussian.py`). Policies are learned from roll-outs
# alone, by fitted linear-Gaussian control.

# %%
num_pushed, num_particles = 8, 500 if SHORT else 2_000
given = load(num_demos=num_pushed)
system, table = given["system"], given["demos"]
pushed = pirl.ContinuousTrajectories(table[..., :2], table[:, :-1, 2:])


def squares(states, actions):
    """Minus half the squares that the two costs weigh."""
    away = (states.square() * torch.tensor([1.0, 0.1], dtype=states.dtype)).sum(-1, keepdim=True)
    return -0.5 * torch.cat([away, actions.square()], -1)


def sampled_model(demos, pool):
    log_costs = [pyro.sample(name, dist.Normal(0.0, 1.5)) for name in TRUE_COSTS]
    reward = pirl.FeatureReward(squares, torch.stack(log_costs, -1).exp())
    with pyro.plate("episode", len(demos)):
        law = pirl.SampledMaxEntTrajectory(pool, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


found = bayesian_guided_cost(
    sampled_model, pushed, system, base=system.base_policy, num_rollouts=num_particles, **SAMPLER
)
riccati = pirl.fit(puck_model, table, system, **SAMPLER)
print("guided pool:", found.pool, label(found.posterior))
for name in TRUE_COSTS:
    ours, theirs = (x.posterior[name].values for x in (found.posterior, riccati))
    print(
        f"{name:16} sampled {ours.mean():+.3f} +- {ours.std():.3f}   exact {theirs.mean():+.3f} +- {theirs.std():.3f}"
    )

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
names = list(TRUE_COSTS)
for posterior, colour, name, size in ((riccati, GREY, "exact log Z", 5), (found.posterior, BLUE, "guided pool", 2)):
    x, y = (posterior.posterior[n].values.ravel() for n in names)
    axes[0].plot(x, y, ".", color=colour, markersize=size, alpha=0.5, label=name)
axes[0].plot(*TRUE_COSTS.values(), "*", color="black", markersize=12, label="truth")
axes[0].set(xlabel="log cost of being away", ylabel="log cost of pushing", title="The two costs")
axes[0].legend(frameon=False)

place, push = np.linspace(-1.5, 3.5, 60), np.linspace(-5, 5, 60)
cells = torch.from_numpy(np.stack(np.meshgrid(place, push), -1)).reshape(-1, 2)
states, actions = torch.stack([cells[:, 0], torch.zeros(len(cells)).double()], -1), cells[:, 1:]
draws = [torch.from_numpy(found.posterior.posterior[name].values.ravel()[::4].copy()) for name in names]
surfaces = costs(system, *draws)(states.unsqueeze(1), actions.unsqueeze(1)).T.numpy()  # [draw, cell]
for ax, values, title, map_name in (
    (axes[1], surfaces.mean(0), "Reward at rest: posterior mean", "viridis"),
    (axes[2], surfaces.std(0), "Its standard deviation", "magma"),
):
    mesh = ax.pcolormesh(place, push, values.reshape(len(push), len(place)), cmap=map_name, shading="gouraud")
    figure.colorbar(mesh, ax=ax, label="nats a step")
    ax.plot(pushed.states[:, :-1, 0].ravel(), pushed.actions[..., 0].ravel(), ".", color="white", markersize=3)
    ax.set(xlabel="position", ylabel="push", title=title, xlim=(place[0], place[-1]), ylim=(push[0], push[-1]))
plt.show()

# %% [markdown]
# The white dots are the demonstrators' decisions: near home, with weak pushes. There the reward is known well. Far
# from home, where nobody went, its standard deviation grows; that there is an answer at all out there is due to the
# form of the reward (quadratic).
#
# For dynamics that are not linear, `pirl.grid_control` makes policies where there are few coordinates
# (`models/pendulum.py` and `models/cartpole.py`, on recorded agents), and any class with `sample` and `log_prob` can
# be a proposal. Whatever proposes, the weights tell how good it was.
