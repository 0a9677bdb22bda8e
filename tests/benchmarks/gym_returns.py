"""Rewards learned by AIRL on CartPole and Pendulum: what a fresh policy earns that is trained on them alone.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.gym_returns cartpole|pendulum [--seeds 5] [--jobs 1] [--out FILE]

Ten demonstrations of imitation_rollouts (in PIRL_DATA, or shared/data beside the repository), 200,000 decisions of
IRL, and 200,000 more for each fresh policy, PPO all of them. Returns are of the true reward, the mean of 20 episodes
of the policy as it is (actions are drawn). CartPole never terminates (as seals/CartPole-v0): 390 decisions of which
each pays 1 while |x| < 2.4 and |angle| < 12 degrees; Pendulum has its own 200. Each seed:

- "imitates": the policy that AIRL ends with;
- "fresh, r": trained on the learned r(s, a) alone;  "fresh, f": on r + g h(s') - h(s), the discriminator's f;
- "+1", "-1", "true": controls, trained on constant rewards and on the true one.

"r" and "f" correlate what was learned with the true reward of single decisions, half of them the demonstrators' and
half of a policy that acts at random. With --out, each result is a line of JSON as soon as there is one, and those there
are not computed again; tests/benchmarks/imitation_returns.py appends those of imitation. --table only shows them.
tests/benchmarks/gym_returns.jsonl has what was measured so far (two cores that were busy: its seconds are no speed).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pirl
from pirl.baselines import airl
from pirl.simulators import GymSimulator, Policy, roll_out

Row = dict[str, Any]
METHODS = ("airl", "+1", "-1", "true")


class Problem(NamedTuple):
    """An environment, its true reward, and how PPO learns there."""

    env: Any
    file: str
    horizon: int
    true: Callable[[Tensor, Tensor], Tensor]
    """r(s, a), which the methods do not see."""
    ppo: dict[str, Any]
    temperature: float
    """Of the true reward's units: 1 is that of learned ones, whose scale is their own."""
    airl: dict[str, Any]


def upright(states: Tensor, actions: Tensor) -> Tensor:
    return ((states[:, 0].abs() < 2.4) & (states[:, 2].abs() < 12 * math.pi / 180)).double()


def swing(states: Tensor, actions: Tensor) -> Tensor:
    angle = torch.atan2(states[:, 1], states[:, 0])
    return -(angle.square() + 0.1 * states[:, 2].square() + 0.001 * actions.reshape(len(states)).square())


def problem(name: str) -> Problem:
    if name == "cartpole":
        from seals.classic_control import FixedHorizonCartPole

        ppo = {"n_steps": 32, "num_envs": 8, "batch_size": 256, "n_epochs": 20, "gae_lambda": 0.8, "discount": 0.98,
               "learning_rate": 1e-3, "decay_steps": 200_000}  # fmt: skip
        return Problem(FixedHorizonCartPole, "cartpole_0.npz", 390, upright, ppo, 0.1, {"learning_rate": 1e-3})
    ppo = {"n_steps": 512, "num_envs": 4, "batch_size": 64, "n_epochs": 10, "gae_lambda": 0.95, "discount": 0.9,
           "learning_rate": 1e-3}  # fmt: skip
    return Problem("Pendulum-v1", "pendulum_0.npz", 200, swing, ppo, 0.1, {"learning_rate": 1e-3})


def demonstrations(chosen: Problem, num: int = 10) -> pirl.ContinuousTrajectories:
    """The first ones, cut to the horizon; torques within 1% of their ends are pulled there, where densities are."""
    root = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("PIRL_DATA") or root) / "imitation_rollouts"
    demos = pirl.ContinuousTrajectories.from_npz(folder / chosen.file)[:num]
    actions = demos.actions[:, : chosen.horizon]
    if chosen.true is swing:
        actions = actions.clamp(-1.98, 1.98)
    return pirl.ContinuousTrajectories(demos.states[:, : chosen.horizon + 1], actions)


def fresh(chosen: Problem, seed: int, steps: int, reward: Any, temperature: float = 1.0, **options: Any) -> Policy:
    from pirl.stable_baselines import StableBaselines

    learner = StableBaselines(
        chosen.env, horizon=chosen.horizon, seed=1000 + seed, temperature=temperature, **chosen.ppo
    )
    return learner.improve(reward, steps, **options)


def play(chosen: Problem, policy: Policy, seed: int, num: int = 20) -> Any:
    simulator = GymSimulator(chosen.env, chosen.horizon, copies=num)
    return roll_out(simulator, policy, num, torch.Generator().manual_seed(seed))


class Random:
    """Any action is as good."""

    def __init__(self, chosen: Problem) -> None:
        self.discrete = chosen.true is upright

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        if self.discrete:
            return torch.randint(2, (len(states),), generator=generator)
        return 4 * torch.rand(len(states), 1, generator=generator, dtype=torch.float64) - 2

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return torch.full((len(states),), -math.log(2 if self.discrete else 4), dtype=torch.float64)


def correlations(chosen: Problem, demos: pirl.ContinuousTrajectories, found: Any, discount: float) -> Row:
    wild = play(chosen, Random(chosen), 0, len(demos))
    parts = [(demos.states, demos.actions.reshape(len(demos), chosen.horizon, -1)),
             (wild.states, wild.actions.double().reshape(len(demos), chosen.horizon, -1))]  # fmt: skip
    now, later = (torch.cat([states[:, i : chosen.horizon + i].flatten(0, 1) for states, _ in parts]) for i in (0, 1))
    actions = torch.cat([x.flatten(0, 1) for _, x in parts])
    r = found.reward(now, actions)
    f = r + discount * found.potential(later) - found.potential(now)
    true = chosen.true(now, actions)
    return {name: float(torch.corrcoef(torch.stack([x, true]))[0, 1]) for name, x in (("r", r), ("f", f))}


def work(name: str, method: str, seed: int, steps: int) -> list[Row]:
    """One method and one seed."""
    warnings.filterwarnings("ignore", message=".*precision lowered.*")
    torch.set_num_threads(1)
    chosen = problem(name)
    demos = demonstrations(chosen)
    rows: list[Row] = []

    def tell(what: str, policy: Policy, began: float, **more: Any) -> None:
        earned = play(chosen, policy, seed).rewards.sum(1)
        rows.append({"problem": name, "method": what, "seed": seed, "return": float(earned.mean()),
                     "sd_of_episodes": float(earned.std()), "steps": steps,
                     "seconds": round(time.perf_counter() - began, 1), **more})  # fmt: skip

    began = time.perf_counter()
    if method != "airl":
        rewards = {"+1": lambda s, a: torch.ones(len(s)), "-1": lambda s, a: -torch.ones(len(s)), "true": chosen.true}
        temperature = chosen.temperature if method == "true" else 1.0
        tell(method, fresh(chosen, seed, steps, rewards[method], temperature), began)
        return rows
    from pirl.stable_baselines import StableBaselines

    learner = StableBaselines(chosen.env, horizon=chosen.horizon, seed=seed, **chosen.ppo)
    found = airl(demos, learner, steps, seed=seed, **chosen.airl)
    losses = {"loss": statistics.mean(found.history["loss"][-10:]), "entropy": found.history["entropy"][-1]}
    learnt = correlations(chosen, demos, found, learner.discount)
    tell("airl: imitates", found.policy, began, **losses, **learnt)
    for what, options in (("airl: fresh, r", {}), ("airl: fresh, f", {"potential": found.potential})):
        began = time.perf_counter()
        tell(what, fresh(chosen, seed, steps, found.reward, **options), began)
    return rows


def show(name: str, rows: list[Row]) -> None:
    chosen = problem(name)
    demos = demonstrations(chosen)
    earned = torch.stack([chosen.true(s[:-1], a) for s, a in zip(demos.states, demos.actions, strict=True)]).sum(1)
    print(f"{name}: {chosen.horizon} decisions; the 10 demonstrations earn {earned.mean():.1f} +- {earned.std():.1f}")
    print(f"{'method':>24}{'return':>9}{'sd':>8}{'r':>7}{'f':>7}{'seconds':>9}   each seed")
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
        each = [row["return"] for row in mine]
        mean = lambda key: statistics.mean(row.get(key, math.nan) for row in mine)  # noqa: B023, E731
        sd = statistics.stdev(each) if len(each) > 1 else math.nan
        numbers = f"{mean('return'):>9.1f}{sd:>8.1f}{mean('r'):>7.2f}{mean('f'):>7.2f}{mean('seconds'):>9.0f}   "
        print(f"{method:>24}{numbers}" + " ".join(f"{x:.0f}" for x in each))


def main() -> None:
    parser = argparse.ArgumentParser(description="Returns of policies trained on learned rewards.")
    parser.add_argument("problem", choices=["cartpole", "pendulum"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--out", type=Path, help="lines of JSON, which an interrupted run goes on from")
    parser.add_argument("--table", action="store_true", help="only show what is in --out")
    arguments = parser.parse_args()
    known = arguments.out is not None and arguments.out.exists()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if known else []
    rows = [row for row in rows if row["problem"] == arguments.problem]
    done = {(row["method"].split(":")[0], row["seed"]) for row in rows}
    todo = [(m, seed) for seed in range(arguments.seeds) for m in METHODS if (m, seed) not in done]
    if not arguments.table:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            units = [pool.submit(work, arguments.problem, m, seed, arguments.steps) for m, seed in todo]
            for unit in as_completed(units):
                rows += unit.result()
                if arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in unit.result())
    show(arguments.problem, rows)


if __name__ == "__main__":
    main()
