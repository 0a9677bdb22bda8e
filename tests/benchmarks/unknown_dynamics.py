"""From a simulator alone: how near guided cost learning, IRL as a GAN and the sampled posterior come to exact dynamics.

    python -m tests.benchmarks.unknown_dynamics

A 6 x 6 gridworld with 8 kinds of ground, horizon 12, 200 demonstrations of the trajectory reading, slip 0 and 0.1.
References: maximum likelihood and the posterior with exact messages.
"""

from __future__ import annotations

import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl.baselines import adversarial, guided_cost, maxent, sample_gradient
from pirl.envs import gridworld
from pirl.learning import bayesian_guided_cost
from pirl.simulators import TabularSimulator

FEATURES, STEPS = 8, 12


def ground() -> Tensor:
    """Eight kinds of ground on three cells each, and twelve bare cells: weights that demonstrations can tell apart."""
    cells = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    features = torch.zeros(36, FEATURES, dtype=torch.float64)
    features[cells[: 3 * FEATURES], torch.arange(FEATURES).repeat(3)] = 1.0
    return features


def problem(slip: float, num: int, seed: int) -> tuple[pirl.TabularMDP, Tensor, pirl.Trajectories]:
    """A world, its features, and demonstrations of weights from N(0, I)."""
    torch.manual_seed(seed)
    mdp = gridworld(6, 6, slip=slip, horizon=STEPS, initial=(2, 2))
    features = ground()
    reward = pirl.linear_reward(features, torch.randn(FEATURES, dtype=torch.float64))
    seen = pirl.MaxEntTrajectory(mdp, reward, lengths=torch.full((num,), STEPS)).sample()
    return mdp, features, pirl.Trajectories(seen[..., 0], seen[:, :-1, 1])


def point_estimates(slip: float, num_rollouts: int, seed: int) -> None:
    """Print each rung's distance from maximum likelihood, what it cost, and sd(log w) by round."""
    mdp, features, demos = problem(slip, 200, seed)
    best = maxent(demos, mdp, features, reading="trajectory")
    exact = best.parameters["weights"]
    print(f"slip {slip:.1f} seed {seed} maximum likelihood: |w| {exact.norm():.2f}, standard errors "
          f"{best.standard_errors()['weights'].numpy().round(2)}")  # fmt: skip
    often = {"num_rollouts": num_rollouts, "num_rounds": 12, "tolerance": 0.0}
    methods = {
        "guided cost": lambda s: guided_cost(demos, s, features, **often),
        "... by particles": lambda s: guided_cost(demos, s, features, particles=True, **often),
        "GAN-IRL": lambda s: adversarial(demos, s, features, **often),
        "GAN-IRL, particles": lambda s: adversarial(demos, s, features, particles=True, **often),
        "GAN-IRL, even odds": lambda s: adversarial(demos, s, features, odds="even", **often),
        "1/M gradient": lambda s: sample_gradient(demos, s, features, num_rollouts=1000, num_rounds=100, rate=2.0),
        "weighted gradient": lambda s: sample_gradient(
            demos, s, features, reuse=True, num_rollouts=200, num_rounds=100, rate=2.0
        ),
    }
    for name, method in methods.items():
        found = method(TabularSimulator(mdp))
        weights = found.parameters["weights"]
        error = float((weights - exact).norm() / exact.norm())
        log_z = float(pirl.log_partition(mdp, found.reward))
        learned = found.attrs.get("learned_log_partition", found.attrs["log_partition"])
        sd = found.history["sd_log_weight"]
        print(
            f"slip {slip:.1f} seed {seed} {name:20} weights off by {error:6.1%}  log Z off by {learned - log_z:+.3f}  "
            f"ESS {found.attrs['ess']:8.0f} {found.attrs['environment_steps']:9,} steps {found.attrs['seconds']:5.1f} s"
            f"  sd(log w) {sd[0]:.3f} {sd[1]:.3f} ... {sd[-1]:.3g}"
        )


def sampled_model(demos: pirl.Trajectories, pool: pirl.Pool, features: Tensor) -> None:
    """The trajectory reading with log Z from samples."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([FEATURES]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def exact_model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
    """The same with exact messages."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([FEATURES]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def posteriors(slip: float, seed: int) -> None:
    """Print how far Bayesian guided cost learning's posterior is from the exact one."""
    mdp, features, demos = problem(slip, 30, seed)
    options = {"num_chains": 32, "num_warmup": 150, "num_samples": 150, "progress": False, "num_prior": 0,
               "num_posterior_predictive": 0, "log_likelihood": False}  # fmt: skip
    began = time.perf_counter()
    simulator = TabularSimulator(mdp)
    found = bayesian_guided_cost(sampled_model, demos, simulator, features, num_rollouts=3000, **options)
    seconds = time.perf_counter() - began
    exact = pirl.fit(exact_model, demos, mdp, features, **options)
    a, b = (x.posterior["weights"].values.reshape(-1, FEATURES) for x in (found.posterior, exact))
    attrs, off = found.posterior.attrs, (abs(a.mean(0) - b.mean(0)) / b.std(0)).max()
    print(
        f"slip {slip:.1f} seed {seed} posterior: means off by {off:.3f} sd at most, "
        f"sds by {abs(a.std(0) / b.std(0) - 1).max():.1%}; {len(found.history['ess'])} rounds, "
        f"{len(found.pool):,} samples, {simulator.steps_taken:,} steps, ESS {attrs['partition_ess']:.0f}, "
        f"k-hat {attrs['partition_pareto_k']:.2f}, trusted {attrs['partition_trusted']}, {seconds:.0f} s"
    )


def main() -> None:
    """Run everything."""
    torch.set_num_threads(1)
    for slip in (0.0, 0.1):
        for seed in (1, 2, 3):
            point_estimates(slip, 5000, seed)
    for slip in (0.0, 0.1):
        for seed in (1, 2, 3):
            posteriors(slip, seed)


if __name__ == "__main__":
    main()
