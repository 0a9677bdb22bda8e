"""How often are starts told of that an experimenter set, and how often such as were chosen? Figures.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.set_starts [--size 4] [--demos 10] [--worlds 100]

Gridworlds with chance (slip 0.1), six decisions, three features, weights from the prior; the simulator starts anywhere.
Demonstrators either chose their start as they chose the rest (the trajectory reading), or began where they were put,
anywhere. Posteriors by Laplace with log Z from 20,000 roll-outs of the base policy, all of them looked at, trusted or
not.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl.posterior import from_samples
from pirl.posterior.starts import UNLIKELY
from pirl.simulators import TabularSimulator, base_policy, roll_out

STEPS = 6


def model(demos: pirl.Trajectories, pool: pirl.Pool, features: Tensor) -> None:
    """Linear rewards."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights))
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def chances(kind: str, size: int, number: int, worlds: int) -> Iterator[tuple[float, float]]:
    """Standard errors and chances of the conflict, of worlds of which the posterior could be found."""
    found = list[Any]()
    plain = from_samples.conflict

    def noted(*args: Any) -> Any:
        found.append(plain(*args))
        return found[-1]

    from_samples.conflict = noted
    from_samples.untrusted = lambda *args, **options: None
    for seed in range(worlds):
        torch.manual_seed(seed)
        transition = pirl.envs.gridworld(size, size, slip=0.1, horizon=STEPS).transition
        anywhere = torch.full((size**2,), 1 / size**2, dtype=torch.float64)
        mdp = pirl.TabularMDP(transition, anywhere, horizon=STEPS)
        features, weights = torch.randn(size**2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        reward = pirl.linear_reward(features, weights)
        groups = [(mdp, number)]
        if kind == "set":
            put = torch.eye(size**2, dtype=torch.float64)[torch.randint(size**2, (number,))]
            groups = [(pirl.TabularMDP(transition, start, horizon=STEPS), 1) for start in put]
        tables = [pirl.MaxEntTrajectory(x, reward, lengths=torch.full((n,), STEPS)).sample() for x, n in groups]
        table = torch.cat(tables)
        base, generator = base_policy(mdp), torch.Generator().manual_seed(seed)
        pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 20_000, generator), base, base)
        demos, before = pirl.Trajectories(table[..., 0], table[:, :-1, 1]), len(found)
        try:
            pirl.fit(model, demos, pool, features, engine="laplace", num_samples=100, progress=False, num_prior=0,
                     num_posterior_predictive=0, log_likelihood=False)  # fmt: skip
        except pirl.errors.PirlError as error:
            print(f"world {seed}: {error}")
        if len(found) > before:
            yield found[-1]


def main() -> None:
    """Print how many are told of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 4), ("demos", 10), ("worlds", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("chosen", "set"):
            errors, chance = torch.tensor(list(chances(kind, given.size, given.demos, given.worlds))).unbind(1)
            print(
                f"{kind}: told {int((chance < UNLIKELY).sum())} of {len(chance)} worlds, chance below .1 in "
                f"{int((chance < 0.1).sum())}; standard errors {errors.median():.1f} (90%: {errors.quantile(0.9):.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
