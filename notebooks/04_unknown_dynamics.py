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
from pirl.partition import Particles, log_mean_exp, multilevel, sandwich, smc_trajectories
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
# - *learned policy*: from transitions, soft Q-learning learns where reward is to be had. A roll-out of its policy
#   counts for less where the policy makes it likelier than aimless moves would.
# - *particles*: many roll-outs side by side. As they go, those that had bad luck are replaced by copies of those that
#   had good luck. The learned policy moves them, and its soft values (the *twist*) say which of them are promising.

# %%
num_large, num_runs = (6_000, 20) if SHORT else (60_000, 60)
generator = torch.Generator().manual_seed(0)
learner = SoftQLearner(simulator, reading="trajectory")
for _ in range(3):
    policy = learner.update(reward, 1_000, generator)


def log_weights(proposal, number):
    """log w of fresh roll-outs: sum of rewards, plus log p(actions) without aim, less that under the proposal."""
    pool = pirl.Pool.of(roll_out(simulator, proposal, number, generator), proposal, base)
    return pirl.SampledMaxEntTrajectory(pool, reward).log_weights


# What a particle filter needs: how particles begin, choose, move and gain, and the twist. Dynamics and first states are
# the simulator's own, so that their log ratios are 0.
def begin(shape):
    return simulator.reset(shape[0] * shape[1], generator).reshape(shape), torch.zeros(shape).double()


def choose(step, states):
    actions = policy.sample(states.flatten(), step, generator).reshape(states.shape)
    return actions, base.log_prob(states, actions, step) - policy.log_prob(states, actions, step)


def move(step, states, actions):
    following = simulator.step(states.flatten(), actions.flatten(), generator)
    return following.reshape(states.shape), torch.zeros(states.shape).double()


particles = Particles(begin, choose, move, lambda step, s, a: reward[s, a], lambda step, s: policy.value(s, step))


def log_runs(number, size):
    """log Z-hat of independent particle filters."""
    return smc_trajectories(particles, STEPS, size, number, generator=generator).log_partition


sizes = [30, 100, 300, 1000, 3000]
rows, spread = [], {}
for name, proposal in {"aimless": base, "learned policy": policy}.items():
    many = log_weights(proposal, num_large)
    estimate = pirl.partition.importance(many)
    spread[name] = float(estimate.standard_error) * np.sqrt(estimate.num_samples)
    for size in sizes:
        found = log_mean_exp(many[: num_large // size * size].reshape(-1, size))
        rows.append({"sampler": name, "samples": size, "rms error": float((found - exact).square().mean().sqrt())})
for size in sizes:
    found = log_runs(num_runs, size)
    rows.append({"sampler": "particles", "samples": size, "rms error": float((found - exact).square().mean().sqrt())})
errors = pd.DataFrame(rows)
print(errors.pivot(index="samples", columns="sampler", values="rms error").round(3).to_string())

# %% [markdown]
# An estimate of log Z from few samples is too low on average (the logarithm of a mean is not the mean of logarithms).
# So the average of many such estimates is a *lower bound*. If one sample of each block is an exact draw of the law, it
# becomes an *upper bound*.
#
# There is also an estimator without bias, which adds differences between sample sizes at random levels. Its variance is
# finite only if the weights' tails are light, and pirl refuses it where they are not. A whole particle filter gives one
# weight, Z-hat, and filters differ less than single roll-outs do.

# %%
torch.manual_seed(0)
told = pirl.MaxEntTrajectory(mdp, reward, lengths=torch.full((400,), STEPS)).sample()
told = pirl.Trajectories(told[..., 0], told[:, :-1, 1])
pool = pirl.Pool.of(roll_out(simulator, policy, num_large, generator), policy, base)
law = pirl.SampledMaxEntTrajectory(pool, reward)
returns = reward[told.states[:, :-1], told.actions].sum(1)
told_weights = returns + pool.ratio_of(told.states, told.actions, told.lengths)
blocks = [2, 4, 8, 16, 32, 64]
bounds = [sandwich(law.log_weights[: 400 * block], told_weights, block) for block in blocks]

unbiased = multilevel(lambda number: log_runs(number, 30), 500, generator=generator)
print(f"filters of 30 particles, without bias: {float(unbiased.log_partition):.3f}", end=" ")
print(f"+- {float(unbiased.standard_error):.3f} (Pareto k-hat {float(unbiased.pareto_k):.2f})")
try:
    multilevel(lambda number: log_weights(base, number), 500, generator=generator)
except PartitionError as refusal:
    print("aimless roll-outs, without bias: refused:", refusal)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
for (name, part), colour, marker in zip(errors.groupby("sampler"), [ORANGE, BLUE, GREEN], "sDo", strict=True):
    left.plot(part["samples"], part["rms error"], marker, color=colour, label=name)
    if name in spread:
        left.plot(sizes, spread[name] / np.sqrt(sizes), color=colour, linewidth=1)
left.plot([], [], color=GREY, linewidth=1, label="theory: CV / sqrt(N)")
left.set(xscale="log", yscale="log", xlabel="samples N", ylabel="root mean square error of log Z (nats)")
left.set_title("Every sampler gets there, some sooner")
left.legend(frameon=False)
right.axhline(exact, color="black", linestyle=":", label="exact")
for side, colour, marker in (("upper", ORANGE, "s"), ("lower", BLUE, "D")):
    mean = np.array([float(getattr(bound, side)) for bound in bounds])
    error = np.array([float(getattr(bound, f"{side}_error")) for bound in bounds])
    right.errorbar(blocks, mean, 1.96 * error, color=colour, marker=marker, capsize=3, label=f"{side} bound")
right.errorbar(
    [blocks[-1] * 1.6], float(unbiased.log_partition), 1.96 * float(unbiased.standard_error),
    color=GREEN, marker="o", capsize=3, label="without bias, filters",
)  # fmt: skip
right.set(xscale="log", xlabel="samples a block", ylabel="log Z (nats)")
right.set_xticks(blocks, [str(block) for block in blocks])
right.minorticks_off()
right.set_title("Bounds from both sides (learned policy)")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# The lines on the left are first-order theory, from the coefficient of variation (CV) of the weights. The learned
# policy follows its line. The errors of the aimless sampler lie below its line: the theory holds only for more samples
# than these. For the same error it needs at least ten times as many samples as the others. (The learned policy has
# itself cost three thousand roll-outs; but what it learned serves any reward.) Particles do a little better still.
#
# On the right the bounds close in on the exact value (bars: 95% intervals of their averages). The estimate without bias
# is from filters of 30 particles each. For aimless roll-outs pirl refuses to make one, and says why.
#
# ## 2. The ladder: a reward from a simulator alone
#
# Now the reward is unknown, and 100 demonstrations are given. The gradient of their likelihood is the difference
# between their features and those of the model's trajectories, which need sampling:
#
# - *sample gradient*: for every new reward train a policy, and average its fresh roll-outs.
# - *weighted gradient*: keep the roll-outs of all policies, and weigh them.
# - *guided cost learning*: fit the reward on all samples to the end, then improve the policy a little, and so on.
# - *IRL as a GAN*: the same, with a discriminator that knows the form of the answer, and log Z as its parameter.
#
# With exact dynamics maximum likelihood is known. So every rung is run for several numbers of rounds: how far is it
# from maximum likelihood, and how often was the simulator asked?

# %%
num_demos, num_rollouts = 100, 200 if SHORT else 500
num_steep, num_guided = ([5, 10], [1, 2, 4]) if SHORT else ([5, 10, 20, 40], [1, 2, 4, 10])
rungs = {
    "sample gradient": (sample_gradient, {"rate": 2.0}),
    "weighted gradient": (sample_gradient, {"rate": 2.0, "reuse": True}),
    "guided cost": (guided_cost, {"tolerance": 0.0}),
    "IRL as a GAN": (adversarial, {"tolerance": 0.0}),
    "guided cost, particles": (guided_cost, {"tolerance": 0.0, "particles": True}),
}


def watch(slip):
    """A world, demonstrations in it, and their exact maximum likelihood."""
    mdp, ground = world(slip)
    torch.manual_seed(0)
    law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(ground, truth), lengths=torch.full((num_demos,), STEPS))
    seen = law.sample()
    demos = pirl.Trajectories(seen[..., 0], seen[:, :-1, 1])
    return mdp, ground, demos, maxent(demos, mdp, ground, reading="trajectory").parameters["weights"]


rows, last = [], {}
for slip in (0.0, 0.1):
    mdp, ground, demos, best = watch(slip)
    for name, (method, options) in rungs.items():
        for rounds in num_steep if method is sample_gradient else num_guided:
            found = method(
                demos, TabularSimulator(mdp), ground, num_rounds=rounds, num_rollouts=num_rollouts, **options
            )
            distance = float((found.parameters["weights"] - best).norm() / best.norm())
            rows.append({"astray": slip, "rung": name, "distance": distance, "rounds": rounds,
                         "steps": found.attrs["environment_steps"], "ess": round(found.attrs["ess"])})  # fmt: skip
        last[slip, name] = found
ladder = pd.DataFrame(rows)
ends = ladder.groupby(["astray", "rung"], sort=False).tail(1)
print(ends.round({"distance": 3}).to_string(index=False))
off_truth = float((best - truth).norm() / best.norm())
print(f"maximum likelihood itself is {off_truth:.3f} off the truth")
gan = last[0.1, "IRL as a GAN"]
at_end = float(pirl.log_partition(mdp, pirl.linear_reward(ground, gan.parameters["weights"])))
print(f"log Z of the GAN's reward: learned {gan.attrs['learned_log_partition']:.3f}, exact {at_end:.3f}")

# %% [markdown]
# What can a policy not learn? Soft Q-learning for the true reward, from more and more roll-outs: how much do the
# weights of its policy's own roll-outs still differ?

# %%
num_doublings, num_fresh = 10, 500 if SHORT else 2_000
seen_rollouts, differing = 5 * (2 ** np.arange(1, num_doublings + 1) - 1), {}
for slip in (0.0, 0.1):
    mdp, ground = world(slip)
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    learner = SoftQLearner(simulator, reading="trajectory")
    differing[slip] = []
    for doubling in range(num_doublings):
        policy = learner.update(reward, 5 * 2**doubling, generator)
        differing[slip].append(float(log_weights(policy, num_fresh).std()))

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
looks = {"sample gradient": (GREY, "v"), "weighted gradient": ("#CC79A7", "^"), "guided cost": (ORANGE, "s"),
         "IRL as a GAN": (BLUE, "D"), "guided cost, particles": (GREEN, "o")}  # fmt: skip
for name, (colour, marker) in looks.items():
    part = ladder[(ladder["astray"] == 0.1) & (ladder["rung"] == name)]
    left.plot(part["steps"], part["distance"], marker=marker, color=colour, label=name)
left.axhline(off_truth, color="black", linestyle=":", label="maximum likelihood to truth")
left.set(xscale="log", yscale="log", xlabel="steps of the simulator", ylabel="relative distance of weights")
left.set_ylim(bottom=2e-3)
left.set_xticks([20_000, 50_000, 100_000, 200_000, 400_000], ["20 000", "50 000", "100 000", "200 000", "400 000"])
left.minorticks_off()
left.set_title("Distance to maximum likelihood, 10% astray")
left.legend(frameon=False, fontsize="small", loc="lower left")
for slip, colour, marker in ((0.0, BLUE, "o"), (0.1, ORANGE, "s")):
    right.plot(seen_rollouts, differing[slip], marker=marker, color=colour, label=f"{slip:.0%} of moves astray")
right.set(xscale="log", yscale="log", xlabel="roll-outs learned from", ylabel="sd of log weights (nats)")
right.set_title("A policy does not choose its luck")
right.legend(frameon=False, loc="center left")
plt.show()

# %% [markdown]
# Without chance every rung comes near maximum likelihood (the upper half of the table); they differ in what they cost.
# With 10% of moves astray, guided cost and its relatives are soon nearer to maximum likelihood than that is to the
# truth (the dotted line): more rounds would not help the analyst. The weighted gradient gets there too, with many times
# the steps. All this is one run each, so that small differences mean nothing: that particles came nearest may be luck.
#
# The plain sample gradient stops elsewhere, at weights too large. The right side says why. Without chance the weights
# of a policy's roll-outs become equal, to the last digits of floating-point numbers, once every move has been tried.
# With chance there is a floor of about 1.5 nats: trajectories of p(tau) exp(r) are lucky ones, and no policy is lucky
# by choice. Whoever weighs the samples corrects for that. The plain gradient does not: it looks for a reward whose
# policy collects, by effort alone, what the demonstrators had by luck as well.

# %%
mdp, ground, demos, best = watch(0.1)
plain = last[0.1, "sample gradient"].parameters["weights"]
visits = pirl.occupancy(mdp, pirl.linear_reward(ground, torch.stack([plain, best])), "causal").sum(-1)
collected = {
    "demonstrations": ground[demos.states[:, :-1]].sum(1).mean(0),
    "policy of the sample gradient": visits[0] @ ground,
    "policy of maximum likelihood": visits[1] @ ground,
}
print("steps on each ground, by policies that do not choose their luck:")
print(pd.DataFrame(collected, index=[f"ground {kind + 1}" for kind in range(KINDS)]).T.round(2).to_string())

# %% [markdown]
# ## 3. The posterior
#
# The Pyro model is that of exact dynamics with one name changed: `SampledMaxEntTrajectory(pool, reward)` instead of
# `MaxEntTrajectory(mdp, reward)`. The pool stays as it is while chains run, so they sample one definite
# approximation.
#
# `bayesian_guided_cost` makes the pool: it trains policies for draws of the posterior, adds what they sample, infers
# the posterior again, and stops when log Z is known well enough *over the posterior's draws*.

# %%
num_few = 8 if SHORT else 20
few = demos[:num_few]  # of those with one move in ten astray
SAMPLER = {"num_chains": 16, "num_warmup": 60 if SHORT else 100, "num_samples": 50 if SHORT else 150, "progress": False}
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
    base = base_policy(mdp)
    poor_pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 100, generator), base, base)
    poor = pirl.fit(model, few, poor_pool, ground, **SAMPLER)
print("poor pool:   ", poor_pool, label(poor))
for warning in caught:
    if "log Z" in str(warning.message):
        print("pirl warns:  ", warning.message)

# %%
figure, axes = plt.subplots(1, KINDS, figsize=(12, 3.4), layout="constrained")
for kind, ax in enumerate(axes):
    drawn = [x.posterior["weights"].values[..., kind].ravel() for x in (by_messages, guided.posterior, poor)]
    edges = np.linspace(np.quantile(drawn, 0.001), np.quantile(drawn, 0.999), 41)
    looks = {"exact log Z": GREY, "guided pool": BLUE, "poor pool": ORANGE}
    for draws, (name, colour) in zip(drawn, looks.items(), strict=True):
        filled = colour is GREY
        ax.hist(draws, edges, density=True, color=colour, alpha=0.4 if filled else 1,
                histtype="stepfilled" if filled else "step", linewidth=1.8, label=name)  # fmt: skip
    ax.axvline(float(truth[kind]), color="black", linestyle=":", label="truth")
    ax.set(xlabel=f"weight of ground {kind + 1} (nats a step)", ylabel="density" if kind == 0 else "")
    if kind:
        ax.set_yticks([])
figure.suptitle("Posteriors of the weights: exact, and with log Z from samples")
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
plt.show()
for name, posterior in {"exact": by_messages, "guided": guided.posterior, "poor": poor}.items():
    draws = posterior.posterior["weights"].values.reshape(-1, KINDS)
    print(f"{name:7} mean {draws.mean(0).round(2)}  sd {draws.std(0).round(2)}")

# %% [markdown]
# With the guided pool the posterior is that of exact dynamics: means agree to a few hundredths. With a hundred aimless
# roll-outs it is far off, and its width does not say so: the weights of grounds 1 and 2 are much too extreme. Where
# samples are missing, log Z comes out too low, and such rewards look likelier than they are. pirl tells: it warns, with
# figures, and labels the posterior as not to be trusted.
#
# ## 4. Continuous states and actions
#
# A puck slides along a line and is pushed home (say metres and seconds). How much does somebody mind being away, and
# how much pushing? States are position and velocity, the reward is quadratic, and air moves the puck a little: a
# linear-Gaussian problem, in which log Z is known by a Riccati recursion (`models/linear_gaussian.py`). The sampled
# model knows nothing of that. Policies are learned from roll-outs alone, by fitted linear-Gaussian control.

# %%
num_pushed, num_particles = (4, 1_000) if SHORT else (8, 2_000)
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
names, titles = list(TRUE_COSTS), ("log cost of being away (1/m$^2$)", "log cost of pushing (s$^4$/m$^2$)")
for name in names:
    ours, theirs = (x.posterior[name].values for x in (found.posterior, riccati))
    print(f"{name:15} sampled {ours.mean():+.3f} +- {ours.std():.3f}, exact {theirs.mean():+.3f} +- {theirs.std():.3f}")
aimless = pirl.Pool.of(roll_out(system, system.base_policy, len(found.pool), generator), system.base_policy,
                       system.base_policy)  # fmt: skip
centre = torch.tensor([float(found.posterior.posterior[name].mean()) for name in names], dtype=system.dtype).exp()
for name, pool in {"guided pool": found.pool, "aimless pushes": aimless}.items():
    at_mean = pirl.SampledMaxEntTrajectory(pool, pirl.FeatureReward(squares, centre)).estimate()
    print(f"{name}: {float(at_mean.ess):.0f} effective samples of {len(pool)} at the posterior mean")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for ax, name, title in zip(axes, names, titles, strict=True):
    drawn = [x.posterior[name].values.ravel() for x in (riccati, found.posterior)]
    edges = np.linspace(np.min(drawn), np.max(drawn), 41)
    ax.hist(drawn[0], edges, density=True, color=GREY, alpha=0.4, label="exact log Z")
    ax.hist(drawn[1], edges, density=True, color=BLUE, histtype="step", linewidth=1.8, label="guided pool")
    ax.plot(edges, np.exp(-0.5 * (edges / 1.5) ** 2) / (1.5 * np.sqrt(2 * np.pi)), color=GREEN, label="prior")
    ax.axvline(TRUE_COSTS[name], color="black", linestyle=":", label="truth")
    ax.set(xlabel=title, ylabel="density")
figure.suptitle("Posteriors of the two costs")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# Sampled and exact posteriors agree, though of as many aimless pushes hardly one in a thousand would count. The true
# cost of pushing lies in the tail of both: these eight demonstrators happened to push weakly, and the prior leans to
# a higher cost. That is the data's fault and not that of sampling.
#
# The reward itself, over position and push of a puck at rest. The white lines are the demonstrators' paths.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
place, push = np.linspace(-3, 3, 60), np.linspace(-5, 5, 60)
cells = torch.from_numpy(np.stack(np.meshgrid(place, push), -1)).reshape(-1, 2)
states, actions = torch.stack([cells[:, 0], torch.zeros(len(cells)).double()], -1), cells[:, 1:]
draws = [torch.from_numpy(found.posterior.posterior[name].values.ravel()[::4].copy()) for name in names]
surfaces = costs(system, *draws)(states.unsqueeze(1), actions.unsqueeze(1)).T.numpy()  # [draw, cell]
for ax, values, title, map_name in (
    (axes[0], surfaces.mean(0), "Reward: posterior mean", "viridis"),
    (axes[1], surfaces.std(0), "Reward: posterior standard deviation", "magma"),
):
    mesh = ax.pcolormesh(place, push, values.reshape(len(push), len(place)), cmap=map_name, shading="gouraud")
    figure.colorbar(mesh, ax=ax, label="nats a step")
    for path, pushes in zip(pushed.states[:, :-1, 0], pushed.actions[..., 0], strict=True):
        ax.plot(path, pushes, ".-", color="white", markersize=5, linewidth=0.6, alpha=0.8)
    ax.set(xlabel="position (m)", ylabel="push (m/s$^2$)", title=title, xlim=(place[0], place[-1]),
           ylim=(push[0], push[-1]))  # fmt: skip
plt.show()

# %% [markdown]
# The demonstrators stay near home and push weakly. (Pucks start at 2 m, give or take 1 m, if nobody aims at anything.
# In the trajectory reading even the start is a lucky one.) The standard deviation grows with distance from home, where
# nobody went. That it is zero at home is not the data's merit: a quadratic reward without a linear part is zero there
# whatever the costs. And that there is an answer at all far out is due to this form as well.
#
# For dynamics that are not linear, `pirl.grid_control` makes policies where there are few coordinates
# (`models/pendulum.py` and `models/cartpole.py`, on recorded agents), and any class with `sample` and `log_prob` can
# be a proposal. Whatever proposes, the weights tell how good it was.
