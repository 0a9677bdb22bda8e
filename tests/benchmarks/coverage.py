"""Do 90% intervals cover the truth nine times in ten? Truths from the prior, many gridworlds: figures, no pass or fail.

    python -m tests.benchmarks.coverage [--worlds 500] [--demos 20] [--engine chees] [--jobs 2]

Each world is a 5 x 5 grid with its own features, true weights drawn from the prior Normal(0, 1), and demonstrations of
ten decisions. The posterior's central intervals must then cover each weight in 90% of the worlds, whatever the number
of demonstrations: counts are compared with the 99% band of a binomial, Bonferroni-corrected over the weights. MaxEnt's
intervals (estimate -+ 1.645 standard errors) are beside it; they promise that only for many demonstrations.
"""

from __future__ import annotations

import argparse
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats

import pirl
from pirl.baselines import maxent
from pirl.datasets import simulate
from pirl.envs import gridworld, gridworld_features

SIZE, HORIZON, WEIGHTS, LEVEL = 5, 10, 3, 0.9
KINDS = ("posterior", "hessian", "outer_product", "sandwich", "clustered")


def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: torch.Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([WEIGHTS]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def world(job: tuple[int, int, str]) -> dict[str, Any]:
    """Whether each interval covers each weight in one world, and how wide it is."""
    seed, num_demos, engine = job
    torch.set_num_threads(1)
    mdp, features = gridworld(SIZE, SIZE, horizon=HORIZON), gridworld_features(SIZE, SIZE, WEIGHTS, seed)
    truth = torch.randn(WEIGHTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    demos = simulate(mdp, pirl.linear_reward(features, truth), num_demos, HORIZON, seed=seed)
    options = {"num_chains": 16, "num_warmup": 150, "num_samples": 125} if engine == "chees" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = pirl.fit(
            model, demos, mdp, features, engine=engine, seed=seed, progress=False, log_likelihood=False, num_prior=0,
            num_posterior_predictive=0, **options,
        )  # fmt: skip
        estimate = maxent(demos, mdp, features)
    draws = posterior["posterior"]["weights"].values.reshape(-1, WEIGHTS)
    intervals = {"posterior": np.quantile(draws, [0.05, 0.95], axis=0)}
    intervals |= {kind: estimate.interval(LEVEL, kind)["weights"].numpy() for kind in KINDS[1:]}
    found = {
        kind: ((low <= truth.numpy()) & (truth.numpy() <= high)).tolist() for kind, (low, high) in intervals.items()
    }
    widths = {kind: (high - low).tolist() for kind, (low, high) in intervals.items()}
    rhat = float(pirl.convergence.rhat(posterior["posterior"]["weights"].values).max())
    return {"covers": found, "width": widths, "rhat": rhat, "converged": estimate.attrs["converged"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Coverage of intervals over worlds whose truth is drawn from the prior."
    )
    parser.add_argument("--worlds", type=int, default=500)
    parser.add_argument("--demos", type=int, default=20)
    parser.add_argument("--engine", default="chees")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    began = time.perf_counter()
    jobs = [(seed, arguments.demos, arguments.engine) for seed in range(arguments.worlds)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(world, jobs, chunksize=5))
    tail = 0.01 / WEIGHTS / 2
    low, high = stats.binom.ppf([tail, 1 - tail], arguments.worlds, LEVEL) / arguments.worlds
    print(
        f"{arguments.worlds} worlds, {arguments.demos} demonstrations of {HORIZON} decisions, {arguments.engine}, "
        f"{time.perf_counter() - began:.0f} s; R-hat at most {max(r['rhat'] for r in results):.3f}; "
        f"MaxEnt converged in {sum(r['converged'] for r in results)}"
    )
    print(f"{'intervals':16}{'coverage of each weight':>30}{'median width':>15}   99% band {low:.3f} to {high:.3f}")
    for kind in KINDS:
        covered = np.mean([r["covers"][kind] for r in results], axis=0)
        width = np.median([r["width"][kind] for r in results])
        inside = "inside" if ((low <= covered) & (covered <= high)).all() else "OUTSIDE"
        print(f"{kind:16}{'  '.join(f'{c:.3f}' for c in covered):>30}{width:15.2f}   {inside}")


if __name__ == "__main__":
    main()
