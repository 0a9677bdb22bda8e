"""What one likelihood and its gradient cost: figures, never pass or fail.

Run ``python tests/benchmarks/message_passing.py`` on a quiet machine. One thread; medians of blocked calls; float64.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import pirl
from models import bus_engine
from models.gridworld import load as load_gridworld
from models.gridworld import model as model_of_gridworld
from pirl.envs import gridworld, gridworld_features, random_mdp
from pirl.infer.potential import Potential
from pirl.message_passing import soft_problem
from pirl.soft_values import soft_values

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
        sizes = (1, 16, 32, 64, 128, 512)
        cells = [(c, median_ms(likelihood_and_gradient(grid, features, demos, reading, c))) for c in sizes]
        print(f"  {reading:<11}" + "".join(f"{c:>5} rewards {ms:8.2f}" for c, ms in cells))

    throughput()
    stationary()

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

    print(
        "deterministic gridworld of 500 x 500, 5 actions, T = 100: one likelihood and gradient, in a process of its own"
    )
    for reading in READINGS:
        print(
            f"  {reading:<11}"
            + subprocess.check_output([sys.executable, __file__, reading, "large"], text=True).strip()
        )


def throughput() -> None:
    """One Pyro model (models/gridworld.py): gradients of one chain after another, and of many at once."""
    torch.set_default_dtype(torch.float64)
    potential = Potential(model_of_gridworld, (), load_gridworld())
    point = torch.randn(4096, 8)
    looped = median_ms(lambda: potential.gradient({"weights": point[0]}))
    print(f"potential of models/gridworld.py: one gradient takes {looped:.2f} ms alone; C at once by torch.func.vmap:")
    together = torch.func.vmap(torch.func.grad_and_value(potential))
    for chains in (1, 4, 16, 64, 256, 1024, 4096):
        ms = median_ms(lambda c=chains: together({"weights": point[:c]}))  # type: ignore[misc]
        print(f"  C = {chains:<5}{ms:9.2f} ms{ms / chains:9.3f} ms a chain{looped * chains / ms:8.1f} times as fast")
    torch.set_default_dtype(torch.float32)


def stationary() -> None:
    """Infinite horizons: values and gradient of 64 rewards, each another one."""
    print("infinite horizon, causal, 64 rewards: ms for values and gradient")
    for discount in (0.9, 0.99, 0.999):
        mdp = gridworld(12, 12, slip=0.1, discount=discount)
        problem = soft_problem(mdp, "causal")
        reward = (10 * torch.randn(64, 144, 1, dtype=torch.float64)).expand(64, 144, 5).requires_grad_()
        ms = median_ms(lambda p=problem, r=reward: torch.autograd.grad(soft_values(r, p).sum(), r))  # type: ignore[misc]
        print(f"  gridworld 12x12, rewards N(0, 10^2), discount {discount:<6}{ms:9.2f}")
    torch.set_default_dtype(torch.float64)
    potential = Potential(bus_engine.model, (), bus_engine.load())
    point = {name: torch.randn(64) for name in ("RC", "theta11")}
    together = torch.func.vmap(torch.func.grad_and_value(potential))
    print(f"  models/bus_engine.py, 90 states, discount .9999    {median_ms(lambda: together(point)):9.2f}")
    torch.set_default_dtype(torch.float32)


def memory(reading: str) -> None:
    """One likelihood and gradient of a long scan, in a process of its own; prints its peak."""
    mdp = random_mdp(1000, 4, seed=1, branching=4, discount=1.0, horizon=10_000)
    once(mdp, reading)


def large(reading: str) -> None:
    """The same of very many states; prints also what building the problem took."""
    began = time.perf_counter()
    mdp = gridworld(500, 500, slip=0.0, horizon=100)
    print(f"built in {time.perf_counter() - began:5.2f} s;", end="")
    once(mdp, reading)


def once(mdp: pirl.TabularMDP, reading: str) -> None:
    """Peak memory above what stands before, and seconds, of the first likelihood and gradient."""
    torch.manual_seed(0)
    assert mdp.horizon is not None
    features = torch.randn(mdp.num_states, 8, dtype=torch.float64)
    walk = random_walk(mdp, 10, mdp.horizon)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = peak_mb()
    began = time.perf_counter()
    likelihood_and_gradient(mdp, features, walk, reading, 1)()
    print(f"{peak_mb() - before:8.0f} MB{time.perf_counter() - began:8.2f} s")


def peak_mb() -> float:
    """Largest resident memory so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def random_walk(mdp: pirl.TabularMDP, episodes: int, length: int) -> Tensor:
    """Demonstrations that need no values: an indifferent demonstrator."""
    zero = mdp.replace(horizon=1)
    reward = torch.zeros(mdp.num_states, mdp.num_actions, dtype=torch.float64)
    state = torch.multinomial(mdp.initial, episodes, replacement=True)
    steps = []
    for _ in range(length):
        one = pirl.MaxCausalEntTrajectory(zero, reward, starts=state).sample()
        steps.append(one[:, 0])
        state = one[:, 1, 0]
    return torch.stack([*steps, torch.stack([state, torch.full_like(state, -1)], -1)], 1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        (large if "large" in sys.argv else memory)(sys.argv[1])
    else:
        main()
