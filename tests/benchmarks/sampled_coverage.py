"""Do intervals of posteriors with a sampled log Z cover, and agree with exact ones? Truths from the prior: figures.

    python -m tests.benchmarks.sampled_coverage [gridworld|linear_gaussian] [--worlds 60] [--jobs 1] [--out FILE]

Bayesian guided cost learning, in problems whose log Z is known: a 5 x 5 gridworld with chance (slip 0.1, three kinds of
ground, 10 decisions, 20 demonstrations) and a puck that is pushed home (two log costs, 6 decisions, 5 demonstrations).
Coverage of central 90% intervals with the 99% band of a binomial, Bonferroni-corrected over the parameters; and how far
means and standard deviations are from those of the posterior with exact log Z. A world takes most of a minute, and is
told when it is done; with ``--out`` it is written as a line of JSON, and not run again. What was measured so far is in
tests/benchmarks/sampled_coverage.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

import pirl
from models import linear_gaussian as puck
from pirl.envs import gridworld
from pirl.learning import bayesian_guided_cost
from pirl.simulators import TabularSimulator

KINDS, STEPS = 3, 10
FEW: dict[str, Any] = {"num_chains": 8, "num_warmup": 75, "num_samples": 125, "progress": False, "num_prior": 0,
                       "num_posterior_predictive": 0, "log_likelihood": False}  # fmt: skip


def ground_model(demos: pirl.Trajectories, known: Any, features: Tensor) -> None:
    """Weights of kinds of ground, with a pool or with the true MDP."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([KINDS]).to_event(1))
    law = pirl.MaxEntTrajectory if isinstance(known, pirl.TabularMDP) else pirl.SampledMaxEntTrajectory
    with pyro.plate("episode", len(demos)):
        reward = pirl.linear_reward(features, weights)
        pyro.sample("trajectories", law(known, reward, lengths=demos.lengths), obs=demos.as_tensor())


def in_gridworld(seed: int) -> tuple[Any, Any, Tensor]:
    """Sampled and exact posterior draws, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    mdp = gridworld(5, 5, slip=0.1, horizon=STEPS, initial=(2, 2))
    features = torch.zeros(25, KINDS, dtype=torch.float64)
    features[torch.randperm(25, generator=generator)[: 4 * KINDS], torch.arange(KINDS).repeat(4)] = 1.0
    truth = torch.randn(KINDS, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    seen = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, truth), lengths=torch.full((20,), STEPS)).sample()
    demos = pirl.Trajectories(seen[..., 0], seen[:, :-1, 1])
    found = bayesian_guided_cost(
        ground_model, demos, TabularSimulator(mdp), features, num_rollouts=1000, seed=seed, **FEW
    )
    exact = pirl.fit(ground_model, demos, mdp, features, seed=seed, **FEW)
    return found.posterior, exact, truth


def costs_of(states: Tensor, actions: Tensor) -> Tensor:
    """The puck's reward is linear in these."""
    weight = torch.tensor([1.0, 0.1], dtype=states.dtype)
    return -0.5 * torch.cat([(states.square() * weight).sum(-1, keepdim=True), actions.square()], -1)


def puck_model(demos: pirl.ContinuousTrajectories, pool: pirl.Pool) -> None:
    """``models/linear_gaussian.py`` with log Z from a pool."""
    costs = [pyro.sample(name, dist.Normal(0.0, puck.PRIOR_SD)).exp() for name in puck.TRUE_COSTS]
    with pyro.plate("episode", len(demos)):
        reward = pirl.FeatureReward(costs_of, torch.stack(costs, -1))
        law = pirl.SampledMaxEntTrajectory(pool, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def with_a_puck(seed: int) -> tuple[Any, Any, Tensor]:
    """The same for the puck; truths from the prior."""
    system, generator = puck.puck(6, 0.05), torch.Generator().manual_seed(seed)
    truth = puck.PRIOR_SD * torch.randn(2, generator=generator, dtype=torch.float64)
    states, actions = system.sample(puck.costs(system, *truth), 5, generator)
    table = torch.cat([states, torch.nn.functional.pad(actions, (0, 0, 0, 1))], -1)
    found = bayesian_guided_cost(
        puck_model, pirl.ContinuousTrajectories(states, actions), system, base=system.base_policy, num_rollouts=2000,
        seed=seed, **FEW,
    )  # fmt: skip
    return found.posterior, pirl.fit(puck.model, table, system, seed=seed, **FEW), truth


PROBLEMS = {"gridworld": in_gridworld, "linear_gaussian": with_a_puck}


def world(job: tuple[str, int]) -> dict[str, Any]:
    """Whether each interval covers, and how far the sampled posterior is from the exact one."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, exact, truth = PROBLEMS[job[0]](job[1])

    def flat(posterior: Any) -> np.ndarray:
        values = [x.values.reshape(FEW["num_chains"] * FEW["num_samples"], -1) for x in posterior.posterior.values()]
        return np.concatenate(values, 1)

    ours, theirs = flat(found), flat(exact)
    covers = [
        (np.quantile(x, 0.05, axis=0) <= truth.numpy()) & (truth.numpy() <= np.quantile(x, 0.95, axis=0))
        for x in (ours, theirs)
    ]
    return {
        "problem": job[0], "seed": job[1], "seconds": round(time.perf_counter() - began, 1),
        "sampled": covers[0].tolist(), "exact": covers[1].tolist(),
        "off": ((ours.mean(0) - theirs.mean(0)) / theirs.std(0)).tolist(),
        "ratio": (ours.std(0) / theirs.std(0)).tolist(),
        "trusted": bool(found.posterior.attrs["partition_trusted"] == 1),
        "ess": float(found.posterior.attrs["partition_ess"]),
    }  # fmt: skip


def read(out: Path) -> list[dict[str, Any]]:
    """What is written there; a last line that was cut short, by a run that was ended, is taken out."""
    whole = out.read_text()
    if not whole.endswith("\n"):
        whole = whole[: whole.rfind("\n") + 1]
        out.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def worlds(problem: str, count: int, jobs: int, out: Path | None) -> list[dict[str, Any]]:
    """All worlds, those that ``out`` has already not run again; each is told, and saved, as soon as it is done."""
    lines = read(out) if out and out.exists() else []
    results = [line for line in lines if line["problem"] == problem and line["seed"] < count]
    left = sorted(set(range(count)) - {line["seed"] for line in results})
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(world, (problem, seed)) for seed in left]):
            results.append(result := done.result())
            print(f"world {result['seed']}: {result['seconds']} s, ESS {result['ess']:.0f}, "
                  f"{'trusted' if result['trusted'] else 'not trusted'}", flush=True)  # fmt: skip
            if out:
                with out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    return results


def main() -> None:
    """Run the worlds."""
    parser = argparse.ArgumentParser(description="Coverage of sampled posteriors.")
    parser.add_argument("problem", choices=list(PROBLEMS), nargs="?", default="gridworld")
    parser.add_argument("--worlds", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file of JSON lines, to go on from")
    arguments = parser.parse_args()
    results = worlds(arguments.problem, arguments.worlds, arguments.jobs, arguments.out)
    stacked = {key: np.array([result[key] for result in results]) for key in results[0]}
    size = stacked["sampled"].shape[1]
    low, high = stats.binom.interval(1 - 0.01 / size, arguments.worlds, 0.9) / np.array(arguments.worlds)
    print(f"{arguments.problem}: {arguments.worlds} worlds, {stacked['seconds'].mean():.0f} s each; 99% band of "
          f"coverage {low:.3f} to {high:.3f}")  # fmt: skip
    for kind in ("sampled", "exact"):
        print(f"  {kind:8} coverage {stacked[kind].mean(0).round(3)}")
    for name, chosen in (("trusted", stacked["trusted"]), ("not trusted", ~stacked["trusted"])):
        if chosen.any():
            off, ratio = np.abs(stacked["off"][chosen]), np.abs(stacked["ratio"][chosen] - 1)
            print(
                f"  {name}: {chosen.sum()} worlds, ESS {np.median(stacked['ess'][chosen]):.0f} (median); means off by "
                f"{off.mean():.3f} sd (90%: {np.quantile(off, 0.9):.3f}), sds by {ratio.mean():.1%} "
                f"(90%: {np.quantile(ratio, 0.9):.1%})"
            )


if __name__ == "__main__":
    main()
