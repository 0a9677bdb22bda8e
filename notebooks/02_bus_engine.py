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
# # What does an engine cost? Harold Zurcher's buses
#
# Harold Zurcher maintained the buses of Madison, Wisconsin. Every month, for each bus, he kept the engine or had it
# replaced. John Rust (1987) asked what costs make sense of those decisions, and how many engines Zurcher would buy at
# another price. He gave the best single answer. Here is the posterior, for the 37 buses of his group 4.
#
# Source: J. Rust, "Optimal Replacement of GMC Bus Engines", Econometrica 55(5), 1987.

# %%
import os

import arviz_plots as azp
import arviz_stats as azs
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

import pirl
from pirl.datasets import bus_transition, zurcher_table
from pirl.plots import BLUE, ORANGE, plot_posterior

# PIRL_SHORT=1 in the environment: fewer and shorter chains, everything else the same. For tests, not for conclusions.
SHORT = os.environ.get("PIRL_SHORT") == "1"

# %% [markdown]
# ## The decision problem, and who decided what
#
# The state of a bus is the mileage of its engine, in 90 bins of 5,000 miles. To keep the engine (action 0) lets it age;
# to replace it (action 1) starts again from zero. How far a bus runs in a month is counted first and then held fixed.
# Zurcher looks far ahead: the discount is .9999 a month.

# %%
fleet = zurcher_table("4")
usage = fleet.usage.sum(dim=0)  # months in which a bus moved up by 0, 1 and 2 bins
mdp = pirl.TabularMDP(
    bus_transition(usage), initial=0, discount=0.9999, action_prior="counting", action_names=("keep", "replace")
)
months = fleet.choices.sum(dim=-1).double()  # [bus, mileage]: months that a bus spent at a mileage
replaced = fleet.choices[..., 1].double()  # [bus, mileage]: those in which its engine was replaced
miles = 5 * np.arange(mdp.num_states)  # thousands
print(f"{len(fleet)} buses, {int(months.sum()):,} decisions, {int(replaced.sum())} replacements")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 2.5), layout="constrained")
left.bar([0, 5, 10], (usage / usage.sum()).numpy(), width=3, color=BLUE)
left.set(xticks=[0, 5, 10], xlabel="thousand miles in a month", ylabel="share of months", title="what chance does")
right.bar(miles, months.sum(0).numpy(), width=4, color=BLUE, alpha=0.5, label="months at that mileage")
at = np.repeat(miles, replaced.sum(0).int())
right.plot(at, np.full(len(at), -7), "|", color=ORANGE, markersize=10, label=f"{len(at)} replacements")
right.set(xlabel="mileage of the engine (thousands)", ylabel="bus-months", title="what Zurcher decided", xlim=(-5, 450))
right.legend()
plt.show()

# %% [markdown]
# ## The model
#
# Keeping an engine for a month costs `.001 * theta11` for every 5,000 miles on it, replacing it costs `RC`. The unit is
# the scatter of everything else that weighed on a month's decision. Both priors are flat.


# %%
def costs(RC, theta11):
    keep = -0.001 * theta11[..., None] * torch.arange(mdp.num_states)
    replace = -RC[..., None].expand_as(keep)
    return torch.stack([keep, replace], dim=-1)  # reward [*batch, mileage, action]


def model(mdp, months, replaced):
    RC = pyro.sample("RC", dist.Uniform(0.0, 26.0))
    theta11 = pyro.sample("theta11", dist.Uniform(0.0, 9.0))
    log_policy = pirl.soft_policy(mdp, costs(RC, theta11))
    log_odds = log_policy[..., 1] - log_policy[..., 0]
    with pyro.plate("bus", len(months)):
        pyro.sample("replaced", dist.Binomial(months, logits=log_odds).to_event(1), obs=replaced)


posterior = pirl.fit(
    model,
    mdp,
    months,
    replaced,
    coords={"bus": fleet.bus},
    dims={"months": ["bus", "mileage"], "replaced": ["bus", "mileage"]},
    engine="nuts",
    num_chains=2 if SHORT else 4,
    num_warmup=30 if SHORT else 100,
    num_samples=50 if SHORT else 250,
    dense_mass=True,  # the two costs are strongly correlated
    num_posterior_predictive=40 if SHORT else 400,
    num_prior=0,
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
azp.plot_trace_dist(posterior, figure_kwargs={"figsize": (10, 4.5), "layout": "constrained"})
plt.show()

# %% [markdown]
# ## Beside the best single answer
#
# Rust maximised the likelihood. So do we, in a few lines, and find what he published in table IX.

# %%
estimate = torch.tensor([10.0, 2.0], dtype=torch.float64, requires_grad=True)
optimiser = torch.optim.LBFGS([estimate], max_iter=100, line_search_fn="strong_wolfe")
choices = fleet.choices.sum(dim=0)  # [mileage, action]


def loss():
    optimiser.zero_grad()
    value = -(choices * pirl.soft_policy(mdp, costs(*estimate))).sum()
    value.backward()
    return value


print(f"log-likelihood at the start: {-optimiser.step(loss):.2f}, at the maximum: {-loss():.2f}")
estimate = estimate.detach()

draws = posterior["posterior"]
rust = {
    "label": "Rust (1987)",
    "values": {"RC": 10.0750, "theta11": 2.2930},
    "standard_errors": {"RC": 1.582, "theta11": 0.639},
}
table = pd.DataFrame(
    {
        "Rust": rust["values"],
        "standard error": rust["standard_errors"],
        "maximum here": dict(zip(["RC", "theta11"], estimate.tolist(), strict=True)),
        "posterior mean": {name: float(draws[name].mean()) for name in draws},
        "sd": {name: float(draws[name].std()) for name in draws},
        **{f"{q:.0%}": {name: float(draws[name].quantile(q)) for name in draws} for q in (0.05, 0.5, 0.95)},
    }
)
table.round(3)

# %%
plot_posterior(posterior, rust)

# %%
RC, theta11 = (torch.from_numpy(draws[name].values.ravel()) for name in ("RC", "theta11"))
ratio = theta11 / RC
skew = {name: float((((x - x.mean()) / x.std()) ** 3).mean()) for name, x in {"RC": RC, "theta11": theta11}.items()}
print(f"correlation {np.corrcoef(RC, theta11)[0, 1]:.2f}; skewness", {name: round(x, 2) for name, x in skew.items()})
print(f"sd / mean: RC {RC.std() / RC.mean():.0%}, theta11 {theta11.std() / theta11.mean():.0%}, ", end="")
print(f"their ratio {ratio.std() / ratio.mean():.0%}")

# %% [markdown]
# What the posterior adds to table IX: it leans to the right, so that its mean lies above the maximum; it is a little
# narrower than Rust's standard errors, which are symmetric by construction; and the two costs go together, so that
# running an engine is known about twice as well in shares of a replacement as it is by itself.
#
# ## The costs, with their uncertainty

# %%
OUTER = {"color": BLUE, "alpha": 0.2, "linewidth": 0, "label": "posterior, 90%"}
INNER = {"color": BLUE, "alpha": 0.3, "linewidth": 0, "label": "posterior, 50%"}


def plot_bands(ax, x, values, best):
    """Bands over the first dimension of ``values``, and the curve of the maximum likelihood estimate on top."""
    low, lower, upper, high = np.quantile(values, [0.05, 0.25, 0.75, 0.95], axis=0)
    ax.fill_between(x, low, high, **OUTER)
    ax.fill_between(x, lower, upper, **INNER)
    ax.plot(x, best, color=ORANGE, label="maximum likelihood")


def keeping(theta11):
    return -costs(torch.zeros_like(theta11), theta11)[..., 0]


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
plot_bands(left, miles, keeping(theta11), keeping(estimate[1]))
plot_bands(right, miles, 100 * keeping(theta11) / RC[:, None], 100 * keeping(estimate[1]) / estimate[0])
left.set(xlabel="mileage (thousands)", ylabel="utility a month", title="cost of keeping an engine")
right.set(xlabel="mileage (thousands)", ylabel="% of a replacement", title="the same, as a share of RC")
left.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Does the model reproduce what was seen?
#
# Left: the probability of a replacement against mileage, and the observed frequencies, over 25,000 miles each. Right:
# how many replacements `pirl.fit` simulated for the same bus-months, and how many there were.

# %%
chance = pirl.soft_policy(mdp, costs(RC, theta11))[..., 1].exp()
best = pirl.soft_policy(mdp, costs(*estimate))[..., 1].exp()
binned = (18, 5)  # of five bins each
seen, made = months.sum(0).reshape(binned).sum(-1), replaced.sum(0).reshape(binned).sum(-1)
middle = miles.reshape(binned).mean(axis=-1)
simulated = posterior["posterior_predictive"]["replaced"].sum("bus").values.reshape(-1, *binned).sum(axis=-1)
low, median, high = np.quantile(simulated, [0.05, 0.5, 0.95], axis=0)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
plot_bands(left, miles, 100 * chance, 100 * best)
some = seen > 0
left.scatter(middle[some], 100 * (made / seen)[some], s=seen[some] / 5, color="k", label="observed (area: bus-months)")
left.set(xlabel="mileage (thousands)", ylabel="% replaced a month", title="probability of a replacement", xlim=(0, 400))
left.legend(loc="upper left")
right.errorbar(middle, median, yerr=[median - low, high - median], fmt="_", color=BLUE, label="simulated: median, 90%")
right.plot(middle, made, "ko", markersize=5, label="observed")
right.set(xlabel="mileage (thousands)", ylabel="replacements", title="posterior predictive check", xlim=(0, 400))
right.legend(loc="upper left")
plt.show()

# %% [markdown]
# And for a bus that was left out? Leave-one-out cross-validation, from the same draws. All Pareto k are good when no
# single bus rules the posterior; `p_loo`, the effective number of parameters, should be near two.

# %%
print(azs.loo(posterior))

# %% [markdown]
# ## What if engines cost something else?
#
# Zurcher's costs tell what he would do at prices that nobody saw. For every posterior draw and every price: solve the
# decision problem, follow its policy until the mileages of the fleet no longer depend on the start, and count. It is
# one call each, over draws and prices together.

# %%
percent = torch.arange(-50, 51, 10)


def replacements_a_year(RC, theta11):
    """Per bus in the long run, ``[*batch, prices]``."""
    RC, theta11 = torch.broadcast_tensors(RC[..., None] * (1 + percent / 100), theta11[..., None])
    policy = pirl.soft_policy(mdp, costs(RC, theta11)).exp()
    mileage = pirl.stationary_distribution(mdp, policy)
    return 12 * (mileage * policy[..., 1]).sum(dim=-1)


few = slice(None, None, max(len(RC) // 200, 1))  # two hundred draws are enough for bands
demand, best = replacements_a_year(RC[few], theta11[few]), replacements_a_year(*estimate)

figure, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
plot_bands(ax, percent, demand, best)
ax.set(
    xlabel="change of the replacement cost RC (%)",
    ylabel="replacements per bus and year",
    title="demand for engines",
    ylim=(0, None),
)
ax.legend()
plt.show()

# %%
low, high = demand.quantile(torch.tensor([0.05, 0.95], dtype=demand.dtype), dim=0)
for i in (0, 5, 10):
    print(f"RC {percent[i]:+d}%: best single answer {best[i]:.3f}, 90% interval {low[i]:.3f} to {high[i]:.3f}")

# %% [markdown]
# Near the price that Zurcher faced, the data pin demand down. The further the price moves from it, the more the answers
# differ that explain his decisions: the single curve hides that, the bands show it.
