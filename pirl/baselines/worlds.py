"""Demonstrations, a simulator, and a pool that grows: what guided cost learning and IRL as a GAN work on."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.baselines.estimate import PointEstimate
from pirl.continuous import ContinuousTrajectories
from pirl.errors import InvalidRewardError, OptionError, check_counts, check_numbers, form
from pirl.gaussian_integrals import GaussianKernel
from pirl.local_control import LocalLearner
from pirl.particles import ValuedPolicy, tilt
from pirl.partition import PartitionEstimate, log_mean_exp
from pirl.pool import Features, Pool, check_explained, check_transitions, checked_features
from pirl.rewards import linear_reward
from pirl.sampled import FeatureReward
from pirl.simulators import BaseMeasure, Policy, roll_out
from pirl.simulators.finite import cloned_policy
from pirl.simulators.protocols import check_demonstrations, check_simulator, require_undiscounted
from pirl.soft_q_learning import FiniteSimulator, SoftQLearner, require_finite_simulator
from pirl.soft_values import Reading
from pirl.trajectories import Trajectories

HISTORY = ("objective", "ess", "sd_log_weight", "change", "environment_steps")


class Sums(NamedTuple):
    """What a reward step sees: features summed over trajectories, and what their returns are weighed by."""

    demos: Float[Tensor, "N K"]
    pool: Float[Tensor, "J K"]
    log_ratio: Float[Tensor, " J"]
    """log p - log q of the pool's samples, q the mixture of its policies."""
    log_worth: Float[Tensor, " J"]
    """log of the independent draws that each of these counts for."""
    demos_log_ratio: Float[Tensor, " N"]
    """log p - log q of the demonstrations, whose actions the policies of the pool might have taken."""

    @property
    def log_offset(self) -> Float[Tensor, " J"]:
        """What returns are added to for log weights, whose mean is Z-hat: see :attr:`pirl.Pool.log_offset`."""
        return self.log_ratio + self.log_worth - log_mean_exp(self.log_worth)

    def effective_share(self, weights: Tensor) -> Tensor:
        """The share of the pool's draws that count, as its own weights tell it or those of demonstrations: the less."""
        log_weights = self.pool @ weights + self.log_offset
        own = -(2 * log_weights.log_softmax(0) - self.log_worth).logsumexp(0) - self.log_worth.logsumexp(0)
        return torch.minimum(own, self.log_share_of_demos(weights)).exp()

    def log_share_of_demos(self, weights: Tensor) -> Tensor:
        """Its logarithm as demonstrations tell it: see :meth:`pirl.Pool.ess_of`."""
        odds = log_mean_exp(self.demos @ weights + self.demos_log_ratio)
        return log_mean_exp(self.pool @ weights + self.log_offset) - odds


class World:
    """What is the same in finite spaces and in spaces of vectors."""

    pool: Pool

    def __init__(self, demos: Any, simulator: Any, base: Policy, generator: torch.Generator) -> None:
        self.demos, self.simulator, self.base, self.generator = demos, simulator, base, generator
        self.steps = 0

    def reward(self, weights: Tensor) -> Any:
        """The reward of some weights."""
        raise NotImplementedError

    def learn(self, weights: Tensor, num_rollouts: int) -> Any:
        """A policy for the reward of some weights."""
        raise NotImplementedError

    def features_of(self, table: Tensor | None) -> Float[Tensor, "N K"]:
        """Features summed over demonstrations, or over the pool's samples (None)."""
        raise NotImplementedError

    def begin(self, num_rollouts: int) -> slice:
        """Fill the pool with roll-outs of the base policy."""
        measure = self.base
        plain = measure.policy if isinstance(measure, BaseMeasure) else measure
        rollouts = roll_out(self.simulator, plain, num_rollouts, self.generator)
        self.steps += int(rollouts.lengths.sum())
        self.pool = Pool.of(rollouts, plain, measure)
        check_explained(self.pool, self.demos)
        return slice(0, num_rollouts)

    def imitate(self, num_rollouts: int) -> None:
        """Add roll-outs of a policy cloned from the demonstrations, where a table of counts is one."""

    def extend(self, policy: Policy, num_rollouts: int) -> slice:
        """Add roll-outs of a policy to the pool; where they are."""
        rollouts = roll_out(self.simulator, policy, num_rollouts, self.generator)
        return self._add(rollouts, policy, int(rollouts.lengths.sum()))

    def tilt(self, policy: ValuedPolicy, weights: Tensor, num_rollouts: int) -> slice:
        """Add particles that follow a reward; where they are."""
        reward = self.reward(weights)
        drawn, law = tilt(self.simulator, policy, reward, num_rollouts, self.generator, base=self.base)
        return self._add(drawn, law, law.steps_taken)

    def _add(self, rollouts: Any, law: Any, steps: int) -> slice:
        self.steps += steps
        size = len(self.pool)
        self.pool = self.pool.add(rollouts, law)
        return slice(size, len(self.pool))

    def sums(self) -> Sums:
        """For a reward step."""
        ratio = self.pool.ratio_of(self.demos.states, self.demos.actions, self.demos.lengths)
        features = self.features_of(self.demos.as_tensor()), self.features_of(None)
        return Sums(*features, self.pool.log_ratio, self.pool.log_worth, ratio)

    def record(
        self, history: dict[str, list[float]], weights: Tensor, newest: slice, value: float, change: float
    ) -> None:
        """Note how a round went."""
        sums = self.sums()
        origin = int(self.pool.origin[newest][0])
        own = sums.pool[newest] @ weights + self.pool.log_base[newest] - self.pool.log_densities[origin, newest]
        ess = float(self._judged(sums, weights).ess)
        numbers = (value, ess, float(own.std()), change, float(self.steps))
        for key, number in zip(HISTORY, numbers, strict=True):
            history[key].append(number)

    def _judged(self, sums: Sums, weights: Tensor) -> PartitionEstimate:
        """log Z-hat, and how well it is known by samples and by demonstrations."""
        found = self.pool.judge(sums.pool @ weights + sums.log_offset)
        odds = sums.demos @ weights + sums.demos_log_ratio - found.log_partition
        return found._replace(ess=torch.minimum(found.ess, self.pool.ess_of(odds)))

    def estimate(
        self, name: str, weights: Tensor, history: dict[str, list[float]], began: float, attrs: dict[str, Any]
    ) -> PointEstimate:
        """What was found, with how well log Z is known there."""
        sums = self.sums()
        found = self._judged(sums, weights)
        told = {
            "reading": "trajectory",
            **attrs,
            "log_partition": float(found.log_partition),
            "standard_error": float(found.standard_error),
            "ess": float(found.ess),
            "pareto_k": float(found.pareto_k),
            "log_likelihood": float((sums.demos @ weights).sum() - len(self.demos) * found.log_partition),
            "environment_steps": self.steps,
            "num_rounds": len(history["ess"]),
            "seconds": time.perf_counter() - began,
            "instead_of_errors": "pirl.learning.bayesian_guided_cost gives a posterior",
        }
        log_policy, policy = self.final(weights)
        return PointEstimate(name, {"weights": weights}, self.reward(weights), log_policy, history, told, policy=policy)

    def final(self, weights: Tensor) -> tuple[Tensor | None, Policy | None]:
        """A table of the policy, or the policy, for the last reward."""
        raise NotImplementedError


class FiniteWorld(World):
    """Numbered states and actions; policies by soft Q-learning."""

    def __init__(
        self,
        demos: Trajectories,
        simulator: FiniteSimulator,
        features: Tensor,
        seed: int,
        explore: float,
        reading: Reading,
    ) -> None:
        self.shape: tuple[int, int] = simulator.log_prior.shape  # type: ignore[assignment]
        if features.dim() not in (2, 3) or features.shape[:-1] not in (self.shape[:1], self.shape):
            raise InvalidRewardError(
                f"features have shape {tuple(features.shape)}; expected [{self.shape[0]}, K] or "
                f"[{self.shape[0]}, {self.shape[1]}, K]"
            )
        base = BaseMeasure(simulator.log_prior)
        generator = torch.Generator(device=simulator.log_prior.device).manual_seed(seed)
        super().__init__(demos, simulator, base, generator)
        self.features = features.to(simulator.log_prior)
        self.learner = SoftQLearner(simulator, explore=explore, reading=reading)

    def reward(self, weights: Tensor) -> Tensor:
        return linear_reward(self.features, weights)

    def learn(self, weights: Tensor, num_rollouts: int) -> Any:
        """Two looks at the world: with the policy for this reward so far, and with the one that this taught."""
        policy = self.learner.update(self.reward(weights), num_rollouts, self.generator)
        self.steps += policy.history[-1].steps
        return policy

    def imitate(self, num_rollouts: int) -> None:
        self.extend(cloned_policy(self.simulator.log_prior, self.demos.states, self.demos.actions), num_rollouts)
        check_transitions(self.pool, self.demos.states, self.demos.actions)

    def features_of(self, table: Tensor | None) -> Tensor:
        flat = self.features if self.features.dim() == 3 else self.features.unsqueeze(1).expand(-1, self.shape[1], -1)
        counts, used = self.pool.visits(table, self.shape)
        return counts @ flat.reshape(self.shape[0] * self.shape[1], -1)[used]

    def final(self, weights: Tensor) -> tuple[Tensor | None, Policy | None]:
        return self.learner.solve(self.reward(weights)), None


class VectorWorld(World):
    """States and actions that are vectors; policies by a learner, or by fitted linear-Gaussian control."""

    def __init__(
        self,
        demos: ContinuousTrajectories,
        simulator: Any,
        features: Features,
        seed: int,
        base: Policy | None,
        learner: Any,
    ) -> None:
        if base is None:
            raise OptionError(
                "a simulator without a finite space needs base=, the base policy p(a|s), such as "
                "pirl.local_control.gaussian_base(horizon, covariance, num_state_dims)"
            )
        if learner is None:
            if not isinstance(base, GaussianKernel):
                raise OptionError(
                    "a simulator without a finite space needs learner=, which trains policies, or a linear-Gaussian "
                    "base policy (pirl.local_control.gaussian_base)"
                )
            learner = LocalLearner(simulator, base)
        if not hasattr(learner, "update"):
            raise OptionError(
                f"learner is {form(learner)}, which has no update(reward, generator): see its description"
            )
        super().__init__(demos, simulator, base, torch.Generator(device=demos.device).manual_seed(seed))
        self.features, self.learner = features, learner
        self._policy: Policy | None = None

    def begin(self, num_rollouts: int) -> slice:
        """Fill the pool with roll-outs of the base policy, and look at what the features say of some."""
        newest = super().begin(num_rollouts)
        states, actions, _ = self.pool.decisions(None, None)
        found = checked_features(self.features, states[:2], actions[:2])
        if found.dtype != self.pool.dtype or not bool(found.isfinite().all()):
            problem = f"{found.dtype}, the roll-outs {self.pool.dtype}" if found.isfinite().all() else "not finite"
            raise InvalidRewardError(f"features are {problem}")
        return newest

    def reward(self, weights: Tensor) -> FeatureReward:
        return FeatureReward(self.features, weights)

    def learn(self, weights: Tensor, num_rollouts: int) -> Any:
        if isinstance(self.learner, LocalLearner):
            self.steps += num_rollouts * self.simulator.horizon
            self._policy = self.learner.update(self.reward(weights), num_rollouts, self.generator)
        else:
            before = getattr(self.learner, "steps_taken", 0)
            self._policy = self.learner.update(self.reward(weights), self.generator)
            self.steps += getattr(self.learner, "steps_taken", 0) - before
        return self._policy

    def features_of(self, table: Tensor | None) -> Tensor:
        return self.pool.feature_sums(self.features, table, None if table is None else self.demos.lengths)

    def final(self, weights: Tensor) -> tuple[Tensor | None, Policy | None]:
        return None, self._policy


def make_world(
    demos: Any,
    simulator: Any,
    features: Any,
    seed: int,
    explore: float,
    reading: Reading,
    base: Policy | None,
    learner: Any,
) -> World:
    """A world of tables if features are one, else one of vectors.

    Raises:
        OptionError: what was given is of another kind than its place; says what belongs there.
        InvalidRewardError: features that are not numbers, or not finite.
        DiscountError: the simulator has a discount.
    """
    _check_kinds(demos, simulator, features)
    check_counts(0, seed=seed)
    check_numbers(0.0, 1.0, explore=explore)
    require_undiscounted(simulator)
    if not isinstance(features, Tensor):
        return VectorWorld(demos, simulator, features, seed, base, learner)
    require_finite_simulator(simulator)
    if not features.shape[-1:].numel() or features.is_complex():
        raise InvalidRewardError(f"features is {form(features)}; expected real numbers, of at least one feature")
    if not bool(features.isfinite().all()):
        place = (~features.isfinite()).nonzero()[0].tolist()
        raise InvalidRewardError(f"features{place} is {float(features[tuple(place)])}: features must be finite")
    if base is not None or learner is not None:
        raise OptionError("a finite simulator has its own base policy and learner: leave out base= and learner=")
    return FiniteWorld(demos, simulator, features, seed, explore, reading)


def _check_kinds(demos: Any, simulator: Any, features: Any) -> None:
    check_demonstrations(demos)
    check_simulator(simulator)
    if isinstance(features, Tensor):
        return
    if not callable(features):
        raise OptionError(f"features is {form(features)}: give a tensor (torch.as_tensor) or a function")
    if isinstance(simulator, FiniteSimulator):
        raise OptionError("features of a finite simulator are a table [S, K] or [S, A, K]: call the function on it")
