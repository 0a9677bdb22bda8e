"""CartPole-v1 from few demonstrations and no simulator: mean returns of offline_posterior, beside published ones.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.offline_cartpole [--demos 1,3,7] [--seeds 5] [--episodes 20]

Each seed draws its demonstrations from the 57 of cartpole_0.npz (in PIRL_DATA, or shared/data beside the repository),
learns with the defaults, and plays the most likely action (the return is at most 500). "policy" samples actions in
place of it. Standard errors are over seeds. "theirs" is the mean return of the demonstrations learned from. The
published column is by others, from other demonstrations.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import pirl
from pirl.learning import OfflinePosterior, offline_posterior
from pirl.simulators import GymSimulator, Policy, roll_out

PUBLISHED = {1: 467, 3: 493, 7: 500}


class Greedy:
    """Plays the most likely action."""

    def __init__(self, found: OfflinePosterior) -> None:
        self.found = found

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        return self.found.greedy(states)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return torch.where(actions == self.found.greedy(states), 0.0, -torch.inf).to(states.dtype)


def play(policy: Policy, num: int, seed: int = 0) -> float:
    """Mean return of episodes on CartPole-v1."""
    simulator = GymSimulator("CartPole-v1", absorb=False, copies=num)
    rewards = roll_out(simulator, policy, num, torch.Generator().manual_seed(seed)).rewards
    simulator.close()
    assert rewards is not None
    return float(rewards.sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Mean returns on CartPole-v1 after offline learning.")
    parser.add_argument("--demos", default="1,3,7", help="numbers of demonstrations, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=20, help="played for each seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("PIRL_DATA") or root) / "imitation_rollouts"
    demos = pirl.ContinuousTrajectories.from_npz(folder / "cartpole_0.npz")
    heads = f"{'demos':>6}{'greedy':>9}{'s.e.':>7}{'policy':>9}{'theirs':>9}{'published':>11}"
    print(heads + f"{'seconds a fit':>15}   each seed", flush=True)
    for number in map(int, arguments.demos.split(",")):
        greedy, sampled, theirs, seconds = [], [], [], []
        for seed in range(arguments.seeds):
            chosen = torch.randperm(len(demos), generator=torch.Generator().manual_seed(seed))[:number]
            theirs.append(float(demos.lengths[chosen].double().mean()))  # it pays 1 a step
            began = time.perf_counter()
            found = offline_posterior(demos[chosen], 2, seed=seed)
            seconds.append(time.perf_counter() - began)
            greedy.append(play(Greedy(found), arguments.episodes, seed))
            sampled.append(play(found, arguments.episodes, seed))
        error = statistics.stdev(greedy) / len(greedy) ** 0.5 if len(greedy) > 1 else float("nan")
        print(
            f"{number:>6}{statistics.mean(greedy):>9.1f}{error:>7.1f}{statistics.mean(sampled):>9.1f}"
            f"{statistics.mean(theirs):>9.1f}"
            f"{PUBLISHED.get(number, '-'):>11}{statistics.mean(seconds):>15.1f}   "
            + " ".join(f"{x:.0f}" for x in greedy),
            flush=True,
        )


if __name__ == "__main__":
    main()
