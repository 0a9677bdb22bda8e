"""What rewards say of mice in a labyrinth, in bits a decision, beside cloning that infers nothing.

    python -m tests.benchmarks.mouse_labyrinth [laplace svi chees ...]

Columns: bits a decision (log2 of the probability of the action that was taken; random choices have -2) of the policy
that is the mean over posterior draws, on the paths that were learnt from and on those that were not; of whole paths
under the posterior's mixture, which remembers within a path which draws it fits; and by leave-one-out
cross-validation over the training paths. Beside them what Ashwood, Jha and Pillow (2022) report.

Most validation paths occur word for word in training, and node and time together tell the action: cloning wins by rote.
The rewards are for what cloning cannot say: what the mice wanted.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pirl
from models import mouse_labyrinth

MODELS: dict[str, dict[str, Any]] = {
    "static": {"num_maps": 0},
    "static, lapse": {"num_maps": 0, "lapse": True},
    "1 map": {"num_maps": 1},
    "1 map, lapse": {"num_maps": 1, "lapse": True},
    "2 maps": {"num_maps": 2},
}
PUBLISHED = {"static": -1.767, "1 map": -0.876, "2 maps": -0.827}
ENGINES: dict[str, dict[str, Any]] = {
    "laplace": mouse_labyrinth.defaults["laplace"],
    "svi": {"num_chains": 1, "num_samples": 500, "guide": "normal", "num_particles": 4, "max_steps": 2000},
    "chees": mouse_labyrinth.defaults["chees"],
}
BLOCK = 50


def log_policies(mdp: pirl.TabularMDP, posterior: Any, steps: int) -> Tensor:
    """log pi_t(a|s) of every draw ``[draw, T, S, A]``, lapses included."""
    reward = torch.from_numpy(posterior["reward"].values).flatten(0, 1)
    rows = [pirl.soft_policy(mdp, part.unsqueeze(-1)) for part in reward.split(BLOCK)]
    log_policy = torch.cat(rows).expand(-1, steps, -1, -1)
    if "lapse" in posterior:
        lapse = torch.from_numpy(posterior["lapse"].values).flatten()[:, None, None, None]
        log_policy = torch.logaddexp(torch.log1p(-lapse) + log_policy, (lapse / mdp.num_actions).log())
    return log_policy


def chosen(log_policy: Tensor, states: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of each decision, ``[*draw, T, S, A]`` -> ``[*draw, N, T]``."""
    return log_policy[..., torch.arange(states.shape[1]), states, actions]


def cloned(states: Tensor, actions: Tensor, by_state: bool, by_time: bool, num_states: int = 127) -> Tensor:
    """Log frequencies ``[T, S, A]`` of actions by state, by time or by both, each counted a tenth of a time more."""
    counts = torch.zeros(states.shape[1], num_states, 4, dtype=torch.float64)
    counts.index_put_((torch.arange(states.shape[1]).expand_as(states), states, actions), torch.ones(()).double(), True)
    if not by_time:
        counts = counts.sum(dim=0, keepdim=True).expand_as(counts)
    if not by_state:
        counts = counts.sum(dim=1, keepdim=True).expand_as(counts)
    return ((counts + 0.1) / (counts + 0.1).sum(dim=-1, keepdim=True)).log()


def bits(log_probability: Tensor) -> float:
    return log_probability.mean().item() / np.log(2)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    training, validation = ((x.states[:, :-1], x.actions) for x in mouse_labyrinth.paths())
    print(f"{'':32}{'training':>9}{'validation':>11}{'paths':>8}{'LOO':>8}{'published':>10}{'seconds':>9}")
    print(f"{'random':32}{-2:9.3f}{-2:11.3f}")
    for name, by_state, by_time in (
        ("by state", True, False), ("by time", False, True), ("by state and time", True, True)
    ):  # fmt: skip
        law = cloned(*training, by_state, by_time)
        print(f"{'cloning ' + name:32}{bits(chosen(law, *training)):9.3f}{bits(chosen(law, *validation)):11.3f}")
    for engine in sys.argv[1:] or ["laplace"]:
        for name, options in MODELS.items():
            row(f"{name}, {engine}", engine, mouse_labyrinth.load(**options), training, validation, PUBLISHED.get(name))


def row(name: str, engine: str, arguments: dict[str, Any], training: Any, validation: Any, published: Any) -> None:
    from arviz_stats import loo

    began = time.perf_counter()
    fitted = pirl.fit(
        mouse_labyrinth.model, model_kwargs=arguments, engine=engine, **ENGINES[engine], dims=mouse_labyrinth.dims,
        num_prior=0, num_posterior_predictive=0, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    draws = log_policies(arguments["mdp"], fitted["posterior"].to_dataset(), training[0].shape[1])
    mean_policy = torch.logsumexp(draws, dim=0) - np.log(len(draws))
    whole = chosen(draws, *validation).sum(dim=-1)
    paths = torch.logsumexp(whole, dim=0) - np.log(len(draws))
    left_out = loo(fitted, var_name="actions").elpd / (training[0].numel() * np.log(2))
    print(
        f"{name:32}{bits(chosen(mean_policy, *training)):9.3f}{bits(chosen(mean_policy, *validation)):11.3f}"
        f"{bits(paths) / training[0].shape[1]:8.3f}{left_out:8.3f}"
        f"{'' if published is None else f'{published:.3f}':>10}{seconds:9.1f}  {quality(fitted)}"
    )


def quality(fitted: Any) -> str:
    """How far to trust an engine."""
    if "pareto_k" in fitted.attrs:
        return f"k-hat {fitted.attrs['pareto_k']:.2f}"
    from pirl.convergence import ess_bulk, rhat

    reward = fitted.posterior["reward"].values
    return f"R-hat {np.nanmax(rhat(reward)):.3f}, bulk ESS {np.nanmin(ess_bulk(reward)):.0f} of the reward"


if __name__ == "__main__":
    main()
