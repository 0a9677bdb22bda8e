"""What imitation's AIRL and GAIL make of the demonstrations of gym_returns, in an environment of their own.

    OMP_NUM_THREADS=1 python tests/benchmarks/imitation_returns.py cartpole|pendulum --out FILE [--seeds 5]

Runs where imitation 1.0 and its Stable-Baselines3 are installed, and without pirl. Demonstrations, environment, PPO's
settings, seeds, numbers of decisions and the lines of JSON are those of tests/benchmarks/gym_returns.py, which shows
them. Each method has 200,000 decisions; a fresh PPO policy then has 200,000 on what it learned alone: AIRL's base
reward ("r") and its shaped one ("f"), and GAIL's discriminator.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from imitation.algorithms.adversarial.airl import AIRL
from imitation.algorithms.adversarial.gail import GAIL
from imitation.data.types import Trajectory
from imitation.rewards.reward_nets import BasicRewardNet, BasicShapedRewardNet
from imitation.rewards.reward_wrapper import RewardVecEnvWrapper
from imitation.util.networks import RunningNorm
from imitation.util.util import make_vec_env
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

PROBLEMS: dict[str, Any] = {
    "cartpole": ("seals:seals/CartPole-v0", "cartpole_0.npz", 390, 8, 1e-3,
                 {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gae_lambda": 0.8, "gamma": 0.98}),
    "pendulum": ("Pendulum-v1", "pendulum_0.npz", 200, 4, 1e-3,
                 {"n_steps": 512, "batch_size": 64, "n_epochs": 10, "gae_lambda": 0.95, "gamma": 0.9}),
}  # fmt: skip


class Problem:
    """One of gym_returns' problems."""

    def __init__(self, name: str) -> None:
        self.name, (self.env, self.file, self.horizon, self.copies, self.rate, self.ppo) = name, PROBLEMS[name]

    def copies_of_env(self, seed: int) -> Any:
        return make_vec_env(
            self.env, rng=np.random.default_rng(seed), n_envs=self.copies, max_episode_steps=self.horizon
        )

    def learner(self, env: Any, seed: int, decays: bool) -> PPO:
        rate = (lambda left: self.rate * left) if decays and self.name == "cartpole" else self.rate
        return PPO("MlpPolicy", env, learning_rate=rate, seed=seed, device="cpu", **self.ppo)

    def demonstrations(self, num: int = 10) -> list[Trajectory]:
        root = Path(__file__).resolve().parents[2].parent / "shared" / "data"
        folder = Path(os.environ.get("PIRL_DATA") or root) / "imitation_rollouts"
        with np.load(folder / self.file) as data:
            obs, acts, indices = data["obs"], data["acts"], data["indices"]
        actions = np.split(acts, indices)
        starts = np.cumsum([0, *(len(x) + 1 for x in actions)])
        return [
            Trajectory(obs[a:b][: self.horizon + 1], x[: self.horizon], None, terminal=True)
            for a, b, x in list(zip(starts[:-1], starts[1:], actions))[:num]  # noqa: B905
        ]


def work(problem: Problem, method: str, seed: int, steps: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rows: list[dict[str, Any]] = []

    def tell(what: str, policy: PPO, began: float) -> None:
        env = problem.copies_of_env(50 + seed)
        earned, _ = evaluate_policy(policy, env, 20, deterministic=False, return_episode_rewards=True)
        rows.append({"problem": problem.name, "method": what, "seed": seed, "return": float(np.mean(earned)),
                     "sd_of_episodes": float(np.std(earned)), "steps": steps,
                     "seconds": round(time.perf_counter() - began, 1)})  # fmt: skip

    def fresh(reward: Any) -> PPO:
        env = RewardVecEnvWrapper(problem.copies_of_env(1000 + seed), reward)
        return problem.learner(env, 1000 + seed, True).learn(steps)

    began = time.perf_counter()
    env = problem.copies_of_env(seed)
    policy = problem.learner(env, seed, False)  # it calls learn() in rounds, each of which would decay anew
    net = BasicShapedRewardNet if method == "AIRL" else BasicRewardNet
    reward = net(env.observation_space, env.action_space, normalize_input_layer=RunningNorm)
    kind = AIRL if method == "AIRL" else GAIL
    trainer = kind(
        demonstrations=problem.demonstrations(), demo_batch_size=1024, gen_replay_buffer_capacity=2048,
        n_disc_updates_per_round=16, venv=env, gen_algo=policy, reward_net=reward, log_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.train(steps)
    tell(f"imitation {method}: imitates", policy, began)
    learned = {"f": reward, "r": reward.base} if method == "AIRL" else {"D": trainer.reward_test}
    for what, net_learned in learned.items():
        began = time.perf_counter()
        tell(f"imitation {method}: fresh, {what}", fresh(net_learned.predict_processed), began)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="imitation on the problems of gym_returns.")
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    gymnasium.logger.set_level(gymnasium.logger.ERROR)
    known = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["problem"], row["method"].split(":")[0], row["seed"]) for row in known}
    for seed in range(arguments.seeds):
        for method in ("AIRL", "GAIL"):
            if (arguments.problem, f"imitation {method}", seed) not in done:
                rows = work(Problem(arguments.problem), method, seed, arguments.steps)
                with arguments.out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
