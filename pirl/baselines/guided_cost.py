"""MaxEnt IRL from a simulator alone: the ladder from plain sample gradients to guided cost learning.

The likelihood of the trajectory reading needs log Z, whose gradient is the mean of the features under p(tau | O). With
unknown dynamics it is estimated from roll-outs, in three rungs:

- :func:`sample_gradient`: train the policy to MaxEnt-RL optimality for each reward, and take the plain average of its
  roll-outs: (1/N) sum f(demonstration) - (1/M) sum f(roll-out). Simple, and dear: a policy and fresh samples a step.
- ``reuse=True``: samples of earlier policies, with importance weights.
- :func:`guided_cost` (Finn, Levine and Abbeel 2016): reward and policy improve in turn. The reward is fitted on all
  samples so far, as one mixture; the policy follows it a little at a time, and becomes the proposal that is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pirl.baselines.estimate import PointEstimate
from pirl.baselines.worlds import HISTORY, Sums, make_world
from pirl.continuous import ContinuousTrajectories
from pirl.errors import PartitionError, check_counts, check_numbers
from pirl.partition.gates import ESS_PER_DEMONSTRATION
from pirl.pool import Features
from pirl.simulators import Policy
from pirl.trajectories import Trajectories

Demonstrations = Trajectories | ContinuousTrajectories

_MOST_STEPS = 100
_ARMIJO = 1e-4
_NOISE = 0.1
"""Standard errors below which a change is none."""
_FARTHEST = 1e5
"""Returns (in nats) beyond which a likelihood has no maximum among the samples, and policies no digits."""


class Step(NamedTuple):
    """A concave objective at one point."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor
    """Minus the Hessian."""


def guided_cost(
    demos: Demonstrations,
    simulator: Any,
    features: Tensor | Features,
    *,
    num_rounds: int = 20,
    num_rollouts: int = 1000,
    least_ess: float = 0.05,
    l2: float = 0.0,
    explore: float = 0.1,
    tolerance: float = 1e-3,
    seed: int = 0,
    particles: bool = False,
    base: Policy | None = None,
    learner: Any = None,
) -> PointEstimate:
    """Guided cost learning with a reward linear in features: maximum likelihood of the trajectory reading.

    Each round fits the weights to the demonstrations with log Z-hat from all samples so far (balance heuristic), trains
    the policy for the reward found, by soft Q-learning from transitions, and adds its roll-outs. A reward step stops
    where the effective sample size falls below ``least_ess`` of the pool: beyond, the estimate would be believed where
    there are no samples (Jensen's inequality makes that attractive).

    Args:
        demos: of the simulator's horizon.
        simulator: :class:`pirl.simulators.TabularSimulator`, another finite one, or one of vectors.
        features: ``[S, K]`` or ``[S, A, K]``; of vectors a function (:class:`pirl.FeatureReward`).
        num_rounds: at most; ends before when weights move by less than ``tolerance`` and the pool is good enough.
        num_rollouts: that each round adds to the pool, and of the base policy and a policy cloned from numbered
            demonstrations before the first; as many teach the policy.
        least_ess: share of the pool.
        l2: penalty ``l2 / 2 |weights|^2`` on the log-likelihood of all demonstrations.
        explore: share of the base measure among the decisions that teach the policy.
        seed: of all that is random.
        particles: add draws of p(tau | O) by particles that the policy guides (:func:`pirl.particles.tilt`) instead of
            the policy's own roll-outs. Their weights do not depend on luck, and they count for as many as the first
            particles that they descend from: more effective samples where chance decides much, fewer where little.
        base: the base policy of a simulator of vectors.
        learner: of its policies, with ``update(reward, generator)``, such as :class:`pirl.grid_control.GridLearner`; by
            default :class:`pirl.local_control.LocalLearner`, where the base policy is linear-Gaussian.

    Returns:
        A :class:`PointEstimate` with "weights", and attrs "log_partition", "standard_error", "ess" and "pareto_k" (of
        log Z), "log_likelihood" (of all demonstrations, relative to p(tau), of which nothing is known), "change"
        (relative) and "change_in_standard_errors" of the weights in the last round, "converged" (the change is below
        ``tolerance``; or below a tenth of a standard error, with 100 effective samples for each demonstration),
        "num_rounds" and "environment_steps". Its history has, by round, "objective", "ess", "sd_log_weight" (of the
        newest policy's own weights: it goes to 0 without chance, and to a floor with it; of particles always 0),
        "change" and "environment_steps".

    Raises:
        PartitionError: demonstrations that no roll-out could resemble, or no reward step is possible.
        SimulatorError: the simulator failed.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> estimate = guided_cost(walks, simulator, marks, num_rounds=2, num_rollouts=200)
        >>> estimate.parameters["weights"].shape, sorted(estimate.history)
        (torch.Size([3]), ['change', 'environment_steps', 'ess', 'objective', 'sd_log_weight'])
    """

    def likelihood(sums: Sums, weights: Tensor) -> Step:
        return _likelihood(sums, weights, l2)

    return _alternate("guided cost", likelihood, demos, simulator, features, num_rounds, num_rollouts, least_ess,
                      explore, tolerance, seed, particles, base, learner, {"l2": l2})  # fmt: skip


def sample_gradient(
    demos: Demonstrations,
    simulator: Any,
    features: Tensor | Features,
    *,
    reuse: bool = False,
    num_rounds: int = 100,
    num_rollouts: int = 1000,
    rate: float = 0.5,
    explore: float = 0.1,
    seed: int = 0,
    base: Policy | None = None,
    learner: Any = None,
) -> PointEstimate:
    """The lower rungs: gradient ascent with a newly trained policy's samples, or with importance weights on all.

    With fresh samples (``reuse=False``) nothing is weighed: the gradient is that of feature matching by the soft
    policy, which is the trajectory reading's where the start is given and nothing is left to chance, and the dual's
    elsewhere. With ``reuse=True`` the weights correct for both earlier policies and chance.

    Args:
        rate: of the first step, on features scaled to unit variance under the base measure; it falls as
            ``1 / sqrt(round)``.

    The other arguments, errors and the result are those of :func:`guided_cost`.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> estimate = sample_gradient(walks, simulator, marks, num_rounds=3, num_rollouts=100, reuse=True)
        >>> estimate.parameters["weights"].shape
        torch.Size([3])
    """
    began = time.perf_counter()
    check_counts(1, num_rounds=num_rounds)
    check_counts(2, num_rollouts=num_rollouts)
    check_numbers(0.0, within=True, rate=rate)
    world = make_world(demos, simulator, features, seed, explore, "causal", base, learner)
    world.begin(num_rollouts)
    sums = world.sums()
    scale = sums.pool.std(0)
    # A constant feature's spread is rounding noise, and so is its gradient, which must not be blown up by it.
    scale = torch.where(scale > 1e-6 * sums.pool.abs().amax(0), scale, 1.0)
    weights = torch.zeros_like(scale)
    history: dict[str, list[float]] = {name: [] for name in HISTORY}
    for number in range(1, num_rounds + 1):
        policy = world.learn(weights, num_rollouts)
        newest = world.extend(policy, num_rollouts)
        sums = world.sums()
        if reuse:
            step = _likelihood(sums, weights, 0.0)
            gradient, value = step.gradient / len(demos), float(step.value)
        else:
            gradient, value = sums.demos.mean(0) - sums.pool[newest].mean(0), math.nan
        before, weights = weights, weights + rate / math.sqrt(number) * gradient / scale.square()
        world.record(history, before, newest, value, float((weights - before).norm() / weights.norm()))
    name = "importance-weighted gradient" if reuse else "sample gradient"
    reading = "trajectory" if reuse else "causal"  # of which fresh samples climb the dual
    return world.estimate(name, weights, history, began, {"rate": rate, "reading": reading})


def _alternate(
    name: str,
    objective: Callable[[Sums, Tensor], Step],
    demos: Demonstrations,
    simulator: Any,
    features: Tensor | Features,
    num_rounds: int,
    num_rollouts: int,
    least_ess: float,
    explore: float,
    tolerance: float,
    seed: int,
    particles: bool,
    base: Policy | None,
    learner: Any,
    attrs: dict[str, Any],
    extra: int = 0,
) -> PointEstimate:
    """Reward steps on all samples, policy steps towards the reward; ``extra`` parameters follow the weights."""
    began = time.perf_counter()
    check_counts(1, num_rounds=num_rounds)
    check_counts(2, num_rollouts=num_rollouts)
    check_numbers(0.0, 1.0, within=True, least_ess=least_ess)
    check_numbers(0.0, tolerance=tolerance, l2=attrs["l2"])
    # Under chance p(a_t | s_t, O), with luck in its values, covers p(tau | O) better than the causal policy does.
    world = make_world(demos, simulator, features, seed, explore, "trajectory", base, learner)
    newest = world.begin(num_rollouts)
    world.imitate(num_rollouts)
    num_features = world.sums().pool.shape[-1]
    parameters = world.sums().pool.new_zeros(num_features + extra)
    history: dict[str, list[float]] = {key: [] for key in HISTORY}
    converged = False
    for number in range(num_rounds):
        sums = world.sums()
        found, free = _climb(lambda x: objective(sums, x), parameters, num_features, sums, least_ess)  # noqa: B023
        before, parameters = parameters[:num_features], found
        weights = parameters[:num_features]
        change = float((weights - before).norm() / weights.norm().clamp_min(1e-12))
        value = float(objective(sums, parameters).value)
        # Of the demonstrations too, which may go where no sample did; and before large weights cancel in a return.
        seen = torch.cat([sums.pool, sums.demos])
        returns, terms = (seen @ weights).abs().max(), (seen.abs() @ weights.abs()).max()
        if not (float(returns) < _FARTHEST and float(terms) < torch.finfo(terms.dtype).eps ** -0.5):
            raise PartitionError(
                f"the weights run away (|w| = {float(weights.norm()):.3g}): nothing among {len(sums.pool)} samples "
                "bounds them; give more roll-outs, or l2"
            )
        converged = free and change < tolerance and number > 0
        policy = world.learn(weights, num_rollouts)
        newest = world.tilt(policy, weights, num_rollouts) if particles else world.extend(policy, num_rollouts)
        world.record(history, weights, newest, value, change)
        if converged:
            break
    moved = _in_standard_errors(parameters[:num_features] - before, sums, parameters[:num_features], attrs["l2"])
    # More digits than the samples have are noise: a tenth of a standard error is what 100 effective samples for each
    # demonstration leave of it.
    known = history["ess"][-1] >= ESS_PER_DEMONSTRATION * len(demos)
    converged = converged or (free and num_rounds > 1 and known and moved < _NOISE)
    attrs = {**attrs, "converged": converged, "change": change, "change_in_standard_errors": moved}
    if not converged:
        attrs["advice"] = (
            f"the last round moved weights by {moved:.2g} standard errors, with {history['ess'][-1]:.0f} effective "
            f"samples (of {ESS_PER_DEMONSTRATION * len(demos)} for a tenth of one): raise "
            f"{'num_rounds' if known else 'num_rounds or num_rollouts'}"
        )
    if extra:
        attrs["learned_log_partition"] = float(parameters[-1])
    return world.estimate(name, parameters[:num_features], history, began, attrs)


def _in_standard_errors(step: Tensor, sums: Sums, weights: Tensor, l2: float) -> float:
    """Length of a step of the weights by the likelihood's curvature, the square mean over directions."""
    curvature = _likelihood(sums, weights, l2).curvature
    return float((step @ curvature @ step / len(step)).clamp_min(0).sqrt())


def _likelihood(sums: Sums, weights: Tensor, l2: float) -> Step:
    """Sum over demonstrations of w'f - log Z-hat(w); its gradient is that of self-normalised weights."""
    count = len(sums.demos)
    log_weights = sums.pool @ weights + sums.log_offset
    share = log_weights.softmax(0)
    mean = share @ sums.pool
    centred = sums.pool - mean
    value = (sums.demos @ weights).sum() - count * (log_weights.logsumexp(0) - math.log(len(log_weights)))
    gradient = sums.demos.sum(0) - count * mean
    curvature = count * (centred * share.unsqueeze(1)).mT @ centred
    penalty = l2 * torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    return Step(value - 0.5 * l2 * weights @ weights, gradient - l2 * weights, curvature + penalty)


def _climb(
    objective: Callable[[Tensor], Step], start: Tensor, num_features: int, sums: Sums, least_ess: float
) -> tuple[Tensor, bool]:
    """Newton's method on a concave objective, as far as the samples can be believed; whether it reached the top."""
    point = start
    rounding = 1e-9 * len(sums.demos)

    def size(x: Tensor) -> float:
        return float(sums.effective_share(x[:num_features]))

    floor = min(least_ess, size(start))
    for _ in range(_MOST_STEPS):
        here = objective(point)
        ridge = 1e-9 * here.curvature.diagonal().mean().clamp_min(1e-12)
        matrix = here.curvature + ridge * torch.eye(len(point), dtype=point.dtype, device=point.device)
        direction = torch.linalg.solve(matrix, here.gradient)
        slope = float(here.gradient @ direction)
        if not math.isfinite(slope):
            raise PartitionError("the reward step is not finite: features have no spread among the samples")
        if slope < rounding:
            return point, True
        length = 1.0
        while length > 1e-6:
            trial = point + length * direction
            if size(trial) >= floor and float(objective(trial).value) >= float(here.value) + _ARMIJO * length * slope:
                break
            length /= 2
        else:
            return point, False  # at the edge of what the samples show
        point = trial
    return point, False
