"""Calls with what belongs elsewhere, or nowhere: `python -m tests.misuse` says by name what each of them raises.

A process of its own, as the tests' check of types would be first; users have none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl import partition
from pirl.baselines import adversarial, guided_cost, sample_gradient
from pirl.grid_control import Actions, Grid, GridLearner, UniformPolicy
from pirl.learning import bayesian_guided_cost, guided_pool, offline_posterior
from pirl.local_control import LocalLearner, gaussian_base
from pirl.particles import tilt
from pirl.pool import Pool
from pirl.sampled import FeatureReward, SampledMaxEntTrajectory
from pirl.simulators import (
    BaseMeasure,
    GymSimulator,
    TabularPolicy,
    TabularSimulator,
    base_policy,
    log_density,
    roll_out,
)
from pirl.soft_q_learning import SoftQLearner, soft_q_learning
from pirl.stable_baselines import StableBaselines

Case = tuple[Callable[[], Any], str, str]
"""A call, the name of the error, and a part of its text."""

F64 = torch.float64
torch.manual_seed(0)
world = pirl.envs.gridworld(3, 3, slip=0.1, horizon=4)
marks = pirl.envs.gridworld_features(3, 3, num_features=2)
wanted = pirl.linear_reward(marks, torch.tensor([1.0, -1.0], dtype=F64))
simulator, base = TabularSimulator(world), base_policy(world)
played = roll_out(simulator, base, 30)
walks, pool = played.trajectories(), Pool.of(played, base, base)
one = torch.eye(1, dtype=F64)
puck = pirl.linear_gaussian.LinearGaussian(one, one, 0.1 * one, one[0], 0 * one, one, horizon=4)
slid = roll_out(puck, puck.base_policy, 30)
slides, lane = pirl.ContinuousTrajectories(slid.states, slid.actions), Pool.of(slid, puck.base_policy, puck.base_policy)
beyond = pirl.Trajectories(torch.full((2, 5), 20), torch.ones(2, 4).long())
unknown = pirl.Trajectories(torch.ones(2, 5).long(), torch.full((2, 4), 9))


def vectors(state_size: int, action_size: int) -> pirl.ContinuousTrajectories:
    return pirl.ContinuousTrajectories(torch.zeros(2, 5, state_size), torch.zeros(2, 4, action_size))


def squares(states: Tensor, actions: Tensor) -> Tensor:
    return -torch.cat([states.square(), actions.square()], -1)


def model(demos: Any, pool: Pool, features: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


class Bare:
    """Steps through the world, and says nothing else of it."""

    horizon = 4

    def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        return simulator.reset(num, generator)

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return simulator.step(states, actions, generator)


class Listed(Bare):
    """Has everything, and terminal states as a list."""

    discount, log_prior, terminal = 1.0, simulator.log_prior, list[int]()

    def is_terminal(self, states: Tensor) -> Tensor:
        return torch.zeros(len(states), dtype=torch.bool)


class Plain(Listed):
    """Probabilities where their logarithms belong."""

    log_prior, terminal = simulator.log_prior.exp(), torch.zeros(9, dtype=torch.bool)  # type: ignore[assignment]


class Answers:
    """A policy that answers whatever it was made with."""

    def __init__(self, action: Any, log_prob: Any) -> None:
        self.action, self.density = action, log_prob

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Any:
        return self.action(states)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Any:
        return self.density(states)


def learners() -> dict[str, Case]:
    """What learns from demonstrations and a simulator."""
    quick: dict[str, Any] = {"num_rounds": 1, "num_rollouts": 20}
    found: dict[str, Case] = {}
    point: dict[str, Callable[..., Any]] = {
        "guided_cost": guided_cost,
        "adversarial": adversarial,
        "sample_gradient": sample_gradient,
    }
    for name, learn in point.items():
        slide = lambda demos, learn=learn, features=squares, base=puck.base_policy, **options: learn(  # noqa: E731
            demos, puck, features, base=base, **quick, **options
        )
        walk = lambda demos, learn=learn, simulator=simulator, features=marks, **options: learn(  # noqa: E731
            demos, simulator, features, **quick, **options
        )
        of_name: dict[str, Case] = {
            "states beyond": (
                lambda f=walk: f(beyond),
                "InvalidTrajectoriesError",
                "state 20 is out of range, of 9 st",
            ),
            "actions beyond": (lambda f=walk: f(unknown), "InvalidTrajectoriesError", "action 9 is out of range, of 5"),
            "vectors": (
                lambda f=walk: f(slides),
                "InvalidTrajectoriesError",
                "are vectors, and the simulator's are num",
            ),
            "numbers": (
                lambda f=slide: f(walks),
                "InvalidTrajectoriesError",
                "are numbers, and the simulator's are vec",
            ),
            "state size": (
                lambda f=slide: f(vectors(2, 1)),
                "InvalidTrajectoriesError",
                "size 2 and actions of size 1,",
            ),
            "action size": (
                lambda f=slide: f(vectors(1, 2)),
                "InvalidTrajectoriesError",
                "size 1 and actions of size 2,",
            ),
            "precision": (
                lambda f=slide: f(slides.to(dtype=torch.float32)),
                "InvalidTrajectoriesError",
                "are torch.float32, and the",
            ),
            "base of another size": (
                lambda f=slide: f(slides, base=gaussian_base(4, one, 3)),
                "InvalidPolicyError",
                "vectors of size 3 was",
            ),
            "base in single precision": (
                lambda f=slide: f(slides, base=gaussian_base(4, torch.eye(1), 1)),
                "InvalidPolicyError",
                "torch.float32",
            ),
            "no learner": (
                lambda f=slide: f(slides, learner=3),
                "OptionError",
                "learner is an int, which has no update",
            ),
            "features fail": (
                lambda f=slide: f(slides, features=lambda s, a: s[..., 5]),
                "InvalidRewardError",
                "failed: IndexError",
            ),
            "no features": (
                lambda f=walk: f(walks, features=marks[:, :0]),
                "InvalidRewardError",
                "at least one feature",
            ),
            "simulator lacks": (
                lambda f=walk: f(walks, simulator=Bare()),
                "OptionError",
                "FiniteSimulator, and a Bare lacks discount, log_prior, terminal:",
            ),
            "probabilities": (
                lambda f=walk: f(walks, simulator=Plain()),
                "OptionError",
                "log_prior is up to 0.2; log p(a|s) is at most 0: give the logarithm",
            ),
            "terminal is a list": (
                lambda f=walk: f(walks, simulator=Listed()),
                "OptionError",
                "terminal is a list; expected a mask",
            ),
            "seed": (lambda f=walk: f(walks, seed=-1), "OptionError", "seed is -1, but must be a whole number"),
            "explore": (lambda f=walk: f(walks, explore="a"), "OptionError", "explore is 'a', but must be"),
        }
        found |= {f"{name}: {case}": value for case, value in of_name.items()}
        if learn is not sample_gradient:
            for option, value in {"l2": -1.0, "tolerance": -1.0, "least_ess": math.nan}.items():
                call = lambda f=walk, option=option, value=value: f(walks, **{option: value})  # noqa: E731
                found[f"{name}: {option}"] = (call, "OptionError", f"{option} is {value}, but must be")

    def pooled(*given: Any, **options: Any) -> Any:
        return guided_pool(*given, num_rounds=1, num_rollouts=10, progress=False, **options)

    return found | {
        "guided_pool: states beyond": (
            lambda: pooled(model, beyond, simulator, marks),
            "InvalidTrajectoriesError",
            "state 20 is out of range",
        ),
        "guided_pool: sizes": (
            lambda: pooled(model, vectors(2, 1), puck, marks, base=puck.base_policy),
            "InvalidTrajectoriesError",
            "states of size 2 and actions of size 1, and the simulator 1 and 1",
        ),
        "guided_pool: vectors": (
            lambda: pooled(model, slides, simulator, marks),
            "InvalidTrajectoriesError",
            "are vectors",
        ),
        "guided_pool: model last": (lambda: pooled(walks, model, simulator), "OptionError", "model is a Trajectories"),
        "guided_pool: simulator first": (
            lambda: pooled(model, simulator, walks, marks),
            "OptionError",
            "demos is a TabularSimulator",
        ),
        "guided_pool: tables": (
            lambda: pooled(model, walks, world, marks),
            "OptionError",
            "the simulator is a TabularM",
        ),
        "guided_pool: lacks": (lambda: pooled(model, walks, Bare(), marks), "OptionError", "a Bare lacks discount"),
        "guided_pool: float32": (  # not Pyro's table of shapes
            lambda: pooled(model, walks, simulator, marks.float()),
            "InvalidRewardError",
            "features are torch.float32, and weights torch.float64: give features.double()",
        ),
        "guided_pool: whole numbers": (
            lambda: pooled(model, walks, simulator, marks.long()),
            "InvalidRewardError",
            "features are torch.int64, and weights torch.float64: give features.double()",
        ),
        "linear_reward: weights": (
            lambda: pirl.linear_reward(marks, [1.0, 2.0]),
            "InvalidRewardError",
            "weights is a list; expected a floating tensor [*batch, 2]",
        ),
        "guided_pool: one group": (
            lambda: pooled(model, walks, [simulator, simulator], marks),
            "OptionError",
            "2 simulators, and demos is a Tr",
        ),
        "guided_pool: policy_step": (
            lambda: pooled(model, walks, simulator, marks, policy_step=3),
            "OptionError",
            "policy_step is an int",
        ),
        "guided_pool: no policy": (
            lambda: pooled(model, walks, simulator, marks, policy_step=lambda reward, generator: None),
            "OptionError",
            "policy is a NoneType, and no policy",
        ),
        "bayesian_guided_cost: sizes": (
            lambda: bayesian_guided_cost(model, beyond, simulator, marks, num_rounds=1, num_rollouts=10),
            "InvalidTrajectoriesError",
            "state 20 is out of range",
        ),
        "soft_q_learning: swapped": (lambda: soft_q_learning(wanted, simulator, 9), "OptionError", "a Tensor torch.fl"),
        "soft_q_learning: lacks": (lambda: SoftQLearner(Bare()), "OptionError", "a Bare lacks discount"),
        "soft_q_learning: reward": (
            lambda: soft_q_learning(simulator, wanted.numpy(), 9),
            "InvalidRewardError",
            "the reward is an ndarray",
        ),
        "LocalLearner: swapped": (lambda: LocalLearner(puck.base_policy, puck), "OptionError", "is a GaussianKernel"),
        "LocalLearner: base": (lambda: LocalLearner(puck, base), "InvalidPolicyError", "base is a TabularPolicy"),
        "LocalLearner: reward": (
            lambda: LocalLearner(puck, puck.base_policy).update(lambda s, a: s, 9),
            "InvalidRewardError",
            "(36, 1) for 36",
        ),
        **{
            f"generator: {name}": (call, "OptionError", "generator is an int: give torch.Generator().manual_seed(3)")
            for name, call in {
                "soft_q_learning": lambda: soft_q_learning(simulator, wanted, 9, generator=3),
                "tilt": lambda: tilt(simulator, soft_q_learning(simulator, wanted, 9), wanted, 9, 3, base=base),
                "roll_out": lambda: roll_out(simulator, base, 5, 3),
                "TabularSimulator": lambda: simulator.reset(5, 3),
                "TabularSimulator.step": lambda: simulator.step(torch.zeros(5).long(), torch.zeros(5).long(), 3),
                "TabularPolicy": lambda: base.sample(torch.zeros(5).long(), 0, 3),
                "LinearGaussian": lambda: puck.reset(5, 3),
                "LocalLearner": lambda: LocalLearner(puck, puck.base_policy).update(lambda s, a: -s[..., 0], 9, 3),
                "UniformPolicy": lambda: UniformPolicy(Actions(2)).sample(torch.zeros(3, 1), 0, 3),
                "GridLearner": lambda: GridLearner(puck, Grid([-1.0], [1.0], [3]), Actions(2), generator=3),
                "multilevel": lambda: partition.multilevel(torch.zeros, 4, generator=3),
            }.items()
        },
        "soft_q_learning: option": (
            lambda: soft_q_learning(simulator, wanted, 9, exploration=0.1),
            "OptionError",
            "no option 'exploration'; it has explore, reading",
        ),
        "tilt: reward": (
            lambda: tilt(simulator, soft_q_learning(simulator, wanted, 9), wanted.expand(-1, 3), 9, base=base),
            "InvalidRewardError",
            "expected a table [9, 5] or [9, 1]",
        ),
        "tilt: policy": (lambda: tilt(simulator, base, wanted, 9, base=base), "OptionError", "give one with value"),
    }


def simulators() -> dict[str, Case]:
    """Roll-outs, policies, pools and environments."""
    nine = TabularPolicy(torch.full((4, 5), 0.2, dtype=F64).log())
    zeros = lambda states: torch.zeros(len(states))  # noqa: E731
    numbers = lambda states: torch.zeros(len(states)).long()  # noqa: E731
    return {
        "roll_out: swapped": (
            lambda: roll_out(base, simulator, 5),
            "OptionError",
            "is a TabularPolicy, which cannot be",
        ),
        "roll_out: class": (lambda: roll_out(TabularSimulator, base, 5), "OptionError", "the class TabularSimulator"),
        "roll_out: tables": (
            lambda: roll_out(world, base, 5),
            "OptionError",
            "is a TabularMDP, which cannot be played",
        ),
        "roll_out: no policy": (lambda: roll_out(simulator, 3, 5), "OptionError", "policy is an int, and no policy"),
        "roll_out: a table": (
            lambda: roll_out(simulator, base.log_policy, 5),
            "OptionError",
            "policy is a Tensor torch.float64 (9, 5)",
        ),
        "roll_out: num": (lambda: roll_out(simulator, base, 5.0), "OptionError", "num is 5.0, but must be a whole"),
        "roll_out: fewer states": (lambda: roll_out(simulator, nine, 50), "InvalidPolicyError", "IndexError: index"),
        "roll_out: vectors": (lambda: roll_out(puck, base, 5), "InvalidPolicyError", "states torch.float64 (5, 1)"),
        "roll_out: numbers": (
            lambda: roll_out(simulator, puck.base_policy, 5),
            "InvalidPolicyError",
            "was given states torch.int64 (5,)",
        ),
        "roll_out: short": (
            lambda: roll_out(puck, gaussian_base(2, one, 1), 5),
            "HorizonError",
            "the policy has 2 steps, but step 2",
        ),
        "roll_out: list": (
            lambda: roll_out(simulator, Answers(lambda s: [0] * len(s), zeros), 5),
            "InvalidPolicyError",
            "gave a list",
        ),
        "roll_out: float": (
            lambda: roll_out(simulator, Answers(numbers, lambda s: 0.0), 5),
            "InvalidPolicyError",
            "gave a float at step 0",
        ),
        "log_density: swapped": (
            lambda: log_density(played.states, played.actions, base),
            "OptionError",
            "policy is a Tensor torch.int64",
        ),
        "TabularPolicy": (
            lambda: TabularPolicy(np.zeros((3, 2))),
            "InvalidPolicyError",
            "is an ndarray float64 (3, 2)",
        ),
        "BaseMeasure": (lambda: BaseMeasure(np.zeros((3, 2))), "InvalidPolicyError", "log_prior is an ndarray"),
        "TabularSimulator": (lambda: TabularSimulator(marks), "OptionError", "mdp is a Tensor"),
        "TabularSimulator: horizon": (lambda: TabularSimulator(world, 2.5), "HorizonError", "horizon is 2.5"),
        "base_policy": (lambda: base_policy(3), "OptionError", "mdp is an int, which has no table log_prior"),
        "Pool.of: swapped": (lambda: Pool.of(base, played), "OptionError", "rollouts is a TabularPolicy"),
        "Pool.of: policy": (lambda: Pool.of(played, 3), "OptionError", "policy is an int"),
        "Pool.of: base": (lambda: Pool.of(played, base, 3), "OptionError", "base is an int"),
        "Pool.add": (lambda: pool.add(base, played), "OptionError", "rollouts is a TabularPolicy"),
        "Pool.newest": (lambda: pool.newest(0), "OptionError", "num_policies is 0"),
        "gaussian_base: numpy": (lambda: gaussian_base(4, np.eye(1), 1), "OptionError", "is an ndarray float64 (1, 1)"),
        "gaussian_base: vector": (
            lambda: gaussian_base(4, one[0], 1),
            "OptionError",
            "expected a floating tensor [da, d",
        ),
        "gaussian_base: even": (
            lambda: gaussian_base(4, torch.tensor([[1.0, 0.0], [0.5, 1.0]]), 1),
            "OptionError",
            "is not symmetric",
        ),
        "gaussian_base: horizon": (lambda: gaussian_base(0, one, 1), "OptionError", "horizon is 0, but must be"),
        "gaussian_base: mean": (
            lambda: gaussian_base(4, one, 1, torch.zeros(1)),
            "OptionError",
            "mean is a Tensor torch.f",
        ),
        "gaussian_base: precision": (
            lambda: roll_out(GymSimulator("Pendulum-v1", horizon=2), gaussian_base(2, torch.eye(1), 3), 2),
            "InvalidPolicyError",
            "of torch.float32 and vectors of size 3 was given states torch.float64 (1, 3)",
        ),
        "GymSimulator: id": (
            lambda: GymSimulator("CartPol-v1"),
            "OptionError",
            "Environment `CartPol` doesn't exist. Did you mean: `CartP",
        ),
        "GymSimulator: version": (lambda: GymSimulator("CartPole-v77"), "OptionError", "Environment version `v77`"),
        "GymSimulator: option": (lambda: GymSimulator("CartPole-v1", size=3), "OptionError", "keyword argument 'size'"),
        "GymSimulator: none": (lambda: GymSimulator(world), "OptionError", "env is a TabularMDP"),
        "GymSimulator: horizon": (lambda: GymSimulator("CartPole-v1", horizon=2.5), "HorizonError", "horizon is 2.5"),
        "StableBaselines: id": (lambda: StableBaselines("CartPol-v1"), "OptionError", "Did you mean: `CartPole`?"),
        "StableBaselines: decay_steps": (
            lambda: StableBaselines("CartPole-v1", decay_steps=0),
            "OptionError",
            "decay_steps is 0, but must be a whole number, at least 1",
        ),
        "StableBaselines: seed": (
            lambda: StableBaselines("CartPole-v1", seed=-1),
            "OptionError",
            "seed is -1, but must",
        ),
        "FeatureReward: swapped": (
            lambda: FeatureReward(torch.zeros(2), squares),
            "InvalidRewardError",
            "features is a Tensor torch.float32 (2,)",
        ),
        "FeatureReward: weights": (
            lambda: FeatureReward(squares, [1.0, 2.0]),
            "InvalidRewardError",
            "weights is a list",
        ),
        "FeatureReward: width": (
            lambda: SampledMaxEntTrajectory(lane, FeatureReward(squares, torch.zeros(3, dtype=F64))),
            "InvalidRewardError",
            "gives 2 features, and there are 3 weights",
        ),
        "FeatureReward: call": (
            lambda: FeatureReward(squares, torch.zeros(3))(torch.zeros(4, 1), torch.zeros(4, 1)),
            "InvalidRewardError",
            "gives 2 features, and there are 3 weights",
        ),
        "FeatureReward: shape": (
            lambda: SampledMaxEntTrajectory(lane, FeatureReward(lambda s, a: s[..., 0], torch.zeros(1))),
            "InvalidRewardError",
            "returned a Tensor torch.float64 (30, 4); expected [30, 4, K]",
        ),
        "Sampled: swapped": (lambda: SampledMaxEntTrajectory(wanted, pool), "OptionError", "pool is a Tensor"),
        "Sampled: reward": (lambda: SampledMaxEntTrajectory(lane, 3.0), "InvalidRewardError", "the reward is a float"),
        "Sampled: whole numbers": (
            lambda: SampledMaxEntTrajectory(pool, wanted.long()),
            "InvalidRewardError",
            "is a Tensor torch.int64 (9, 1)",
        ),
        "Sampled: function": (
            lambda: SampledMaxEntTrajectory(lane, lambda s, a: s),
            "InvalidRewardError",
            "expected [*batch, 30, 4]",
        ),
        "Sampled: lengths": (
            lambda: SampledMaxEntTrajectory(pool, wanted, lengths=4),
            "InvalidTrajectoriesError",
            "lengths is an int",
        ),
        "Sampled: demonstrations": (
            lambda: SampledMaxEntTrajectory(pool, wanted).log_prob(walks),
            "InvalidTrajectoriesError",
            "a Trajectories",
        ),
        "Sampled: other lengths": (
            lambda: SampledMaxEntTrajectory(
                lane, FeatureReward(squares, torch.zeros(2, dtype=F64)), lengths=torch.full((7,), 4)
            ).log_prob(lane.table),
            "InvalidTrajectoriesError",
            "lengths (7,) do not fit trajectories (30, 5, 2)",
        ),
        "Sampled: numbers": (
            lambda: SampledMaxEntTrajectory(lane, FeatureReward(squares, torch.zeros(2, dtype=F64))).log_prob(
                torch.zeros(3, 5, 2).long()
            ),
            "InvalidTrajectoriesError",
            "trajectories are torch.int64, and the pool's torch.float64",
        ),
        "LinearGaussian: reward": (lambda: puck.solve(wanted), "InvalidRewardError", "the reward is a Tensor"),
        "LinearGaussian: cost": (lambda: puck.quadratic(1.0), "InvalidRewardError", "state_cost is a float"),
        "LinearGaussian: law": (
            lambda: pirl.linear_gaussian.LinearGaussianTrajectory(puck.quadratic(one), puck),
            "OptionError",
            "a Quadratic",
        ),
        "LinearGaussian: batch": (
            lambda: puck.particles(puck.quadratic(one.expand(3, 1, 1))),
            "InvalidRewardError",
            "reward is a batch (3,)",
        ),
        "LinearGaussian: num": (lambda: puck.sample(puck.quadratic(one), -1), "OptionError", "num is -1"),
    }


def estimators() -> dict[str, Case]:
    """`pirl.partition`, and what learns without a simulator."""
    whole, trusted = torch.zeros(30).long(), partition.importance(torch.zeros(3, 1000))
    walk = partition.Particles(
        reset=lambda shape: (torch.zeros(shape), torch.zeros(shape)),
        propose=lambda t, states: (torch.randn_like(states), torch.zeros_like(states)),
        step=lambda t, states, actions: (states + actions, torch.zeros_like(states)),
        reward=lambda t, states, actions: -actions.square() / 2,
    )
    found: dict[str, Case] = {}
    for name in ("importance", "log_mean_exp", "pareto_k"):
        function = getattr(partition, name)
        for given, told in (
            (whole, "a Tensor torch.int64 (30,)"),
            (np.zeros(3), "an ndarray float64"),
            ([0.0], "a list"),
        ):
            found[f"{name}: {told}"] = (lambda f=function, x=given: f(x), "PartitionError", f"log weights are {told}")
    bounds = {"num_runs": 0, "num_steps": 0, "num_particles": 1.5, "threshold": math.nan}
    for name in ("smc", "smc_trajectories"):
        estimate = getattr(partition, name)
        run = lambda particles=walk, f=estimate, **options: f(  # noqa: E731
            particles, **{"num_steps": 2, "num_particles": 10, **options}
        )
        for option, value in bounds.items():
            call = lambda f=run, option=option, value=value: f(**{option: value})  # noqa: E731
            found[f"{name}: {option}"] = (call, "OptionError", f"{option} is {value}, but must be")
        laws: dict[str, tuple[dict[str, Any], str]] = {
            "reset": ({"reset": torch.zeros}, "reset of the particles gave a Tensor"),
            "reward": ({"reward": lambda t, s, a: 0.0}, "reward of the particles gave a float"),
            "twist": (
                {"twist": lambda t, s: torch.zeros(3)},
                "twist of the particles gave a Tensor torch.float32 (3,)",
            ),
        }
        for case, (law, told) in laws.items():
            found[f"{name}: {case}"] = (lambda f=run, law=law: f(walk._replace(**law)), "PartitionError", told)
        found[f"{name}: none"] = (lambda f=run: f(3), "OptionError", "particles is an int")
    origin, errors, densities = torch.tensor([0, 0, 1]), torch.full((2,), 0.1), torch.zeros(2, 3)
    weights = lambda *shape: torch.zeros(*shape)  # noqa: E731
    offline: dict[str, tuple[Any, str]] = {
        "hidden": (32, "hidden is 32: give the widths of all layers"),
        "seed": (-1, "seed is -1"),
        "num_steps": ("a", "num_steps is 'a'"),
        "discount": ("a", "discount is 'a'"),
        "temperature": (None, "temperature is None"),
        "terminated": ("a", "terminated is a str"),
    }
    demos = pirl.ContinuousTrajectories(torch.zeros(2, 5, 3), torch.ones(2, 4))
    for option, (value, told) in offline.items():
        call = lambda option=option, value=value: offline_posterior(demos, 2, **{option: value})  # noqa: E731
        found[f"offline_posterior: {option}"] = (call, "OptionError", told)
    return found | {
        "OfflinePosterior.reward_draws": (
            lambda: offline_posterior(demos, 2, num_steps=1).reward_draws(torch.zeros(3), torch.zeros(()).long(), 5, 7),
            "OptionError",
            "generator is an int: give torch.Generator().manual_seed(7)",
        ),
        "reward_draws: offline": (
            lambda: pirl.reward_draws(offline_posterior(demos, 2, num_steps=1), model, walks, pool, marks),
            "OptionError",
            "posterior is an OfflinePosterior, which draws rewards itself: posterior.reward_draws",
        ),
        "reward_draws: swapped": (
            lambda: pirl.reward_draws(model, trusted, walks, pool, marks),
            "OptionError",
            "posterior is a function: give what pirl.fit returned, then its model",
        ),
        "compare: a simulator": (
            lambda: pirl.compare({"mine": torch.zeros(2, 9, 1)}, walks, simulator),
            "OptionError",
            "mdp is a TabularSimulator: compare takes policies' values in a pirl.TabularMDP, which knows P",
        ),
        "offline_posterior: swapped": (lambda: offline_posterior(2, demos), "OptionError", "demos is an int"),
        "trusted_k": (lambda: partition.trusted_k(0), "OptionError", "num_samples is 0"),
        "untrusted: estimate": (lambda: partition.untrusted(weights(3), 5), "OptionError", "estimate is a Tensor"),
        "untrusted: count": (lambda: partition.untrusted(trusted, 0), "OptionError", "num_demonstrations is 0"),
        "untrusted: share": (lambda: partition.untrusted(trusted, 5, 2.0), "OptionError", "share is 2.0, but must be"),
        "mixture: numpy": (
            lambda: partition.mixture_log_density(np.zeros((2, 3)), origin),
            "PartitionError",
            "log densities are an ndarray",
        ),
        "mixture: counts": (
            lambda: partition.mixture_log_density(densities, torch.tensor([3, -2])),
            "PartitionError",
            "counts are [3, -2]",
        ),
        "mixture: list": (
            lambda: partition.mixture_log_density(densities, [1, 2]),
            "PartitionError",
            "do not fit counts, a list",
        ),
        "reconcile: origin": (
            lambda: partition.reconcile(densities, origin[:2], errors),
            "PartitionError",
            "origin is a Tensor torch.int64",
        ),
        "reconcile: range": (
            lambda: partition.reconcile(densities, origin * 7, errors),
            "PartitionError",
            "are of proposals [0, 7]",
        ),
        "reconcile: errors": (
            lambda: partition.reconcile(densities, origin, errors - 1),
            "PartitionError",
            "expected finite numbers from 0",
        ),
        "multilevel: number": (
            lambda: partition.multilevel(lambda n: weights(n + 1), 10),
            "PartitionError",
            "gave log weights (",
        ),
        "sandwich: batch": (
            lambda: partition.sandwich(weights(3, 100), weights(2, 10)),
            "PartitionError",
            "expected one batch and dtype",
        ),
        "sandwich: block": (
            lambda: partition.sandwich(weights(100), weights(10), block=2.5),
            "OptionError",
            "block is 2.5, but must be",
        ),
    }


def engines() -> dict[str, Case]:
    """What is wrong inside a model: as pirl says it, without what Pyro adds."""

    def other(demos: Any, mdp: Any) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("episode", len(demos)):
            law = pirl.MaxCausalEntTrajectory(mdp, weight * torch.ones(5, dtype=F64), lengths=demos.lengths)
            pyro.sample("trajectories", law, obs=demos.as_tensor())

    def coin() -> None:
        pyro.sample("x", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

    starts = {
        f"{engine}: init={wrong!r}": (
            lambda engine=engine, wrong=wrong: pirl.fit(coin, engine=engine, init=wrong),
            "OptionError",
            f"init is {form}: use '",
        )
        for engine in ("chees", "nuts", "svi", "laplace")
        for wrong, form in ((None, "a NoneType"), (0.5, "a float"), ([0.5], "a list"))
    }
    calls = {"fit": pirl.fit, "calibrate": pirl.calibrate}
    calls |= {engine: lambda *given, by=engine: pirl.fit(*given, engine=by) for engine in ("nuts", "smc", "svi")}
    return starts | {
        f"{name}: the model's reward": (
            lambda call=call: call(other, walks, world),
            "InvalidRewardError",
            "reward has shape (5,); expected",
        )
        for name, call in calls.items()
    }


CASES: dict[str, Case] = {**learners(), **simulators(), **estimators(), **engines()}


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    """The name of what a call raises, and its text."""
    try:
        return "nothing", repr(call())
    except Exception as error:
        return type(error).__name__ if isinstance(error, pirl.errors.PirlError) else repr(type(error)), str(error)


if __name__ == "__main__":
    print(json.dumps({name: raised(call) for name, (call, _, _) in CASES.items()}))
