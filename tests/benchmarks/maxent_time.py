"""Seconds of maximum causal entropy IRL by pirl, imitation and econirl on one problem: figures, never pass or fail.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.maxent_time [--only pirl,imitation,econirl] [--limit 120]

The problem is the default of models/gridworld.py. All begin at weights zero and maximise one dual, until by no feature
the soft policy misses the demonstrations by more than 1e-6 an episode (the "residual"). pirl's :class:`Dual` judges
everybody's last weights; who has not come so far is marked with "!", and who was out of time has a lower bound for a
ratio. pirl's base measure of actions is uniform and the others' counts: that adds a constant to the values of each
step, and the estimates are the same. "difference" is the largest of weights from pirl's: along some directions the dual
is flat, and weights differ that match the features as well.

Each row has a process of its own, which calls twice: the first call pays for what compiles or is first touched, and the
second begins with the problem built anew. Seconds run from the problem in the library's own classes to the weights;
imports are apart. "steps" are Newton steps of pirl, Adam steps, or evaluations of econirl's feature gap. Ratios are to
pirl's same call, with standard errors if the row has them. "load" is the machine's before the row: run on a quiet one.

- imitation stops by the Euclidean norm of the gradient, which is at least the largest derivative. Its policy does not
  foresee the reward of the state after the last decision, but its matching counts that state, so that as it is (row "as
  it is") it maximises no dual. In the other rows the count leaves that state out, and nothing else is changed. Rewards
  are in float64: its usual float32 does not resolve the tolerance.
- econirl's "L-BFGS-B" with finitely many periods is in fact scipy's hybrid root finder, with derivatives from
  differences; it returns its weights in float32. Its "gradient" is Adam, and gives up after 20 steps without a smaller
  gap; its gaps are means over decisions, and so is the tolerance that it is given. Its "root" fails with finitely many
  periods. Its standard errors come of a Hessian of its likelihood by differences; pirl's of a dual are sandwiches.

Threads: what OMP_NUM_THREADS says for torch and numpy; JAX takes its own default.

The others (``pip install imitation econirl``) are not dependencies of pirl; absent ones are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

LIBRARIES = ("pirl", "imitation", "econirl")
TOLERANCE = 1e-6
CHUNK = 100  # Adam steps between looks at the clock

Setting = dict[str, Any]
Answer = tuple[list[float], int]
"""Weights, and steps."""


def settings(rates: list[float]) -> list[Setting]:
    """The rows: of each library its defaults first, then others."""
    imitation = [{"library": "imitation", "rate": rate, "counts_end": False} for rate in (0.01, *rates)]
    imitation += [{"library": "imitation", "rate": 1.0, "counts_end": True}]
    econirl = [{"library": "econirl", "optimizer": "L-BFGS-B", "errors": errors} for errors in (False, True)]
    econirl += [{"library": "econirl", "optimizer": "gradient", "rate": rate} for rate in (0.02, *rates)]
    return [{"library": "pirl", "errors": errors} for errors in (False, True)] + imitation + econirl


def describe(setting: Setting) -> str:
    """How the library is set."""
    errors = ", with standard errors" if setting.get("errors") else ""
    if setting["library"] == "pirl":
        return "Newton" + errors
    if setting["library"] == "imitation":
        default = " (default)" if setting["rate"] == 0.01 else ""
        return f"Adam {setting['rate']:g}{default}" + (", as it is" if setting["counts_end"] else "")
    if setting["optimizer"] == "gradient":
        return f"gradient: Adam {setting['rate']:g}" + (" (default)" if setting["rate"] == 0.02 else "")
    return setting["optimizer"] + errors


# ------------------------------------------------------------------------------------------------- in its own process


def of_pirl(problem: Setting, limit: float, errors: bool = False) -> Callable[[], Answer]:
    """pirl, as a user calls it."""
    from pirl.baselines import maxent

    kinds = None if errors else ()
    tables = (problem["demos"], problem["mdp"], problem["features"])

    def call() -> Answer:
        found = maxent(*tables, objective="dual", tolerance=TOLERANCE, standard_errors=kinds)
        return found.parameters["weights"].tolist(), found.attrs["iterations"]

    return call


def of_imitation(problem: Setting, limit: float, rate: float, counts_end: bool) -> Callable[[], Answer]:
    """imitation's MCEIRL with a linear reward, in chunks of steps that keep the optimizer's state."""
    import numpy as np
    import torch
    from imitation.algorithms import mce_irl
    from imitation.rewards.reward_nets import BasicRewardNet
    from seals.base_envs import TabularModelPOMDP

    mdp, states = problem["mdp"], problem["demos"].as_tensor()[..., 0].numpy()
    env = TabularModelPOMDP(
        transition_matrix=mdp.transition.to_dense().reshape(mdp.num_states, mdp.num_actions, -1).numpy(),
        observation_matrix=problem["features"].numpy(),
        reward_matrix=np.zeros(mdp.num_states),
        horizon=mdp.horizon,
        initial_state_dist=np.bincount(states[:, 0], minlength=mdp.num_states) / len(states),
    )
    counted = states if counts_end else states[:, :-1]
    visits = np.bincount(counted.flatten(), minlength=mdp.num_states) / len(states)
    occupancy = mce_irl.mce_occupancy_measures

    def of_decisions(*args: Any, **options: Any) -> Any:
        by_time, _ = occupancy(*args, **options)
        return by_time, by_time[:-1].sum(0)

    if not counts_end:
        mce_irl.mce_occupancy_measures = of_decisions

    def call() -> Answer:
        ends = time.perf_counter() + limit
        net = BasicRewardNet(env.observation_space, env.action_space, use_action=False, hid_sizes=()).double()
        # The bias changes nothing and has no slope: it stays at zero.
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter)
        learner = mce_irl.MCEIRL(
            visits,
            env,
            net,
            np.random.default_rng(0),
            optimizer_kwargs={"lr": rate},
            linf_eps=0.0,
            grad_l2_eps=TOLERANCE,
            log_interval=None,
        )
        steps, wanted = 0, CHUNK
        while steps == wanted - CHUNK and time.perf_counter() < ends:
            learner.train(CHUNK)
            steps, wanted = int(next(iter(learner.optimizer.state.values()))["step"]), wanted + CHUNK
        weights = next(parameter for parameter in net.parameters() if parameter.ndim == 2)
        return weights.detach().flatten().tolist(), steps

    return call


def of_econirl(
    problem: Setting, limit: float, optimizer: str, rate: float = 0.02, errors: bool = False
) -> Callable[[], Answer]:
    """econirl's MCEIRLEstimator with its periods; out of time, the weights that it tried last."""
    import econirl  # noqa: F401  (before all of JAX: sets its precision)
    import jax.numpy as jnp
    import numpy as np
    from econirl.core.types import DDCProblem, Panel, Trajectory
    from econirl.estimation.mce_irl import MCEIRLEstimator
    from econirl.preferences.reward import LinearReward

    class TimedReward(LinearReward):
        """Notes the weights that are tried, and ends the search in time."""

        def compute(self, params: Any) -> Any:
            self.tried, self.steps = params, self.steps + 1
            if time.perf_counter() > self.ends:
                raise TimeoutError
            return super().compute(params)

    mdp, table = problem["mdp"], problem["demos"].as_tensor().numpy()
    states, actions = table[..., 0], table[:, :-1, 1]
    spec = DDCProblem(mdp.num_states, mdp.num_actions, mdp.discount, num_periods=mdp.horizon)
    dense = mdp.transition.to_dense().reshape(mdp.num_states, mdp.num_actions, -1)
    transitions = jnp.asarray(dense.transpose(0, 1).numpy())
    panel = Panel([Trajectory(*map(jnp.asarray, (s[:-1], a, s[1:]))) for s, a in zip(states, actions, strict=True)])
    starts = jnp.asarray(np.bincount(states[:, 0], minlength=mdp.num_states) / len(states))
    features = jnp.asarray(problem["features"].numpy())
    names = [str(feature) for feature in range(features.shape[1])]

    def call() -> Answer:
        reward = TimedReward(features, names, mdp.num_actions)
        reward.ends, reward.steps = time.perf_counter() + limit, 0
        estimator = MCEIRLEstimator(
            optimizer=optimizer,
            learning_rate=rate,
            outer_tol=TOLERANCE / mdp.horizon if optimizer == "gradient" else TOLERANCE,  # a gap; a change
            outer_max_iter=10**6,
            compute_se=errors,
            se_method="asymptotic",
        )
        zeros = jnp.zeros(len(names), dtype=features.dtype)
        try:
            found = estimator.estimate(panel, reward, spec, transitions, initial_params=zeros, initial_dist=starts)
        except TimeoutError:
            return np.asarray(reward.tried).tolist(), reward.steps
        return np.asarray(found.parameters).tolist(), found.num_iterations

    return call


def measure(setting: Setting, limit: float) -> Setting:
    """Call twice, and judge the weights."""
    import torch

    from models import gridworld
    from pirl import linear_reward
    from pirl.baselines.objectives import Dual

    options = dict(setting)
    make = {"pirl": of_pirl, "imitation": of_imitation, "econirl": of_econirl}[options.pop("library")]
    seconds: list[float] = []
    while len(seconds) < 2 and sum(seconds) < limit:
        problem = gridworld.load()
        call = make(problem, limit, **options)
        began = time.perf_counter()
        found, steps = call()
        seconds.append(time.perf_counter() - began)
    weights = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    goal = Dual(problem["demos"], problem["mdp"])
    goal(problem["mdp"].check_reward(linear_reward(problem["features"], weights))).backward()
    residual = float(weights.grad.abs().max()) / goal.count
    return {"weights": found, "steps": steps, "residual": residual, "first": seconds[0], "second": (*seconds, None)[1]}


# ----------------------------------------------------------------------------------------------------- from outside


def in_a_process(setting: Setting, limit: float) -> Setting:
    """Measure in a fresh process; what goes wrong there is the value of "failed"."""
    job = json.dumps({"setting": setting, "limit": limit})
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.maxent_time", "--job", job]
    load = os.getloadavg()[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * limit + 60)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {3 * limit + 60:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return {**setting, **json.loads(done.stdout.strip().splitlines()[-1]), "load": load}


COLUMNS = {
    "first": ("first", ".2f"), "second": ("second", ".2f"), "steps": ("steps", "d"), "residual": ("residual", ".1e"),
    "difference": ("difference", ".1e"), "ratio 1st": ("ratio_first", ".1f"), "ratio 2nd": ("ratio_second", ".1f"),
    "load": ("load", ".1f"),
}  # fmt: skip


def row(result: Setting, pirl: dict[bool, Setting]) -> str:
    """A line of the table."""
    like = pirl.get(result.get("errors", False))
    cells = dict(result)
    if like:
        cells["difference"] = max(abs(a - b) for a, b in zip(result["weights"], like["weights"], strict=True))
        for call in ("first", "second"):
            if result[call] is not None:
                cells[f"ratio_{call}"] = result[call] / like[call]
    texts = ("-" if cells.get(key) is None else format(cells[key], style) for key, style in COLUMNS.values())
    mark = " " if result["residual"] <= TOLERANCE else "!"
    return f"{mark} {result['library']:10}{describe(result):32}" + "".join(f"{text:>11}" for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of maximum causal entropy IRL, pirl against others.")
    parser.add_argument("--only", default=",".join(LIBRARIES), help="libraries, separated by commas")
    parser.add_argument("--rates", default="0.3,1,3", help="Adam's, beside the defaults, separated by commas")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a call")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(**json.loads(arguments.job))))
        return
    only = arguments.only.split(",")
    if unknown := set(only) - set(LIBRARIES):
        parser.error(f"no library is called {', '.join(sorted(unknown))}: choose of {', '.join(LIBRARIES)}")
    absent = [name for name in LIBRARIES[1:] if importlib.util.find_spec(name) is None]
    if absent:
        print(f"left out, not installed: {', '.join(absent)} (pip install imitation econirl)")
    print(f"  {'library':10}{'setting':32}" + "".join(f"{head:>11}" for head in COLUMNS), flush=True)
    pirl: dict[bool, Setting] = {}
    for setting in settings([float(rate) for rate in arguments.rates.split(",") if rate]):
        if setting["library"] not in only or setting["library"] in absent:
            continue
        result = in_a_process(setting, arguments.limit)
        if "failed" in result:
            print(f"! {setting['library']:10}{describe(setting):32} {result['failed']}", flush=True)
            continue
        if result["library"] == "pirl":
            pirl[result["errors"]] = result
        print(row(result, pirl), flush=True)


if __name__ == "__main__":
    main()
