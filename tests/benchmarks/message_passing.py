"""What one likelihood and its gradient cost: figures, never pass or fail.

Run ``python tests/benchmarks/message_passing.py`` on a quiet machine. One thread; medians of blocked calls; float64.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import pirl
from pirl.envs import gridworld, gridworld_features, random_mdp

torch.set_num_threads(1)
READINGS = {"causal": pirl.MaxCausalEntTrajectory, "trajectory": pirl.MaxEntTrajectory}


def median_ms(call: Callable[[], object], seconds: float = 2.0) -> float:
    """Median wall time of a call, over about ``seconds``."""
    for _ in range(3):
        call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times)[len(times) // 2]


def likelihood_and_gradient(
    mdp: pirl.TabularMDP, features: Tensor, demos: Tensor, reading: str, chains: int
) -> Callable[[], object]:
    """One batched log-likelihood, summed over demonstrations, and its gradient in the weights."""
    weights = torch.randn(chains, features.shape[-1], dtype=torch.float64, requires_grad=True)

    def call() -> object:
        reward = pirl.linear_reward(features, weights).unsqueeze(1)
        model = READINGS[reading](mdp, reward, validate_args=False)
        return torch.autograd.grad(model.log_prob_sum(demos), weights)

    return call


def simulate(mdp: pirl.TabularMDP, features: Tensor, episodes: int, length: int) -> Tensor:
    """Demonstrations of a random linear reward."""
    reward = pirl.linear_reward(features, torch.randn(features.shape[-1], dtype=torch.float64))
    lengths = torch.full((episodes,), length)
    return pirl.MaxCausalEntTrajectory(mdp, reward, lengths=lengths).sample()


def main() -> None:
    """Print every table."""
    torch.manual_seed(0)
    features = gridworld_features(10, 10)

    print("gridworld 10x10, slip .1, 5 actions, 8 features, T = 20, 50 demonstrations: ms a likelihood and gradient")
    grid = gridworld(10, 10, slip=0.1, horizon=20)
    demos = simulate(grid, features, 50, 20)
    for reading in READINGS:
        cells = [(c, median_ms(likelihood_and_gradient(grid, features, demos, reading, c))) for c in (1, 8, 64, 512)]
        print(f"  {reading:<11}" + "".join(f"{c:>5} rewards {ms:8.2f}" for c, ms in cells))

    print("cost against the horizon T (64 rewards): ms, and microseconds a step")
    for horizon in (10, 20, 40, 80, 160, 320):
        grid = gridworld(10, 10, slip=0.1, horizon=horizon)
        ms = median_ms(likelihood_and_gradient(grid, features, simulate(grid, features, 50, horizon), "causal", 64))
        print(f"  T = {horizon:<4}{ms:9.2f}{1e3 * ms / horizon:9.1f}")

    print("cost against non-zero transitions (1,000 states, 4 actions, T = 20, 64 rewards): ms, and ns an entry")
    for branching in (1, 2, 4, 8, 16, 32, 64):
        mdp = random_mdp(1000, 4, seed=1, branching=branching, discount=1.0, horizon=20)
        rich = torch.randn(1000, 8, dtype=torch.float64)
        ms = median_ms(likelihood_and_gradient(mdp, rich, simulate(mdp, rich, 20, 20), "causal", 64))
        print(f"  {mdp.transitions.value.numel():>7} entries{ms:9.2f}{1e6 * ms / mdp.transitions.value.numel():10.1f}")

    print("memory: T = 10,000, 1,000 states, 4 actions; peak above the imported library, MB, and seconds")
    for reading in READINGS:
        print(f"  {reading:<11}" + subprocess.check_output([sys.executable, __file__, reading], text=True).strip())


def memory(reading: str) -> None:
    """One likelihood and gradient of a long scan, in a process of its own; prints its peak."""
    torch.manual_seed(0)
    mdp = random_mdp(1000, 4, seed=1, branching=4, discount=1.0, horizon=10_000)
    features = torch.randn(1000, 8, dtype=torch.float64)
    walk = random_walk(mdp, 10, 10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    likelihood_and_gradient(mdp, features, walk, reading, 1)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(peak - before) / 1024:8.0f} MB{time.perf_counter() - began:8.2f} s")


def random_walk(mdp: pirl.TabularMDP, episodes: int, length: int) -> Tensor:
    """Demonstrations that need no values: an indifferent demonstrator."""
    zero = mdp.replace(horizon=None, discount=0.5)
    reward = torch.zeros(mdp.num_states, mdp.num_actions, dtype=torch.float64)
    return pirl.MaxCausalEntTrajectory(zero, reward, lengths=torch.full((episodes,), length)).sample()


if __name__ == "__main__":
    memory(sys.argv[1]) if len(sys.argv) > 1 else main()
