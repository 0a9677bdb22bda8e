"""MaxEnt-RL policies for states and actions that are vectors, from roll-outs: linear-Gaussian, by time.

Guided cost learning moves its policy this way (Levine and Abbeel 2014): dynamics are fitted to what was seen as
s' ~ N(A_t s + B_t a + c_t, W_t), rewards as quadratics, and the soft-optimal policy of that fit is exact, by the
recursion of :mod:`pirl.linear_gaussian`. On truly linear-Gaussian problems it tends to the optimum; elsewhere it is a
local approximation, and a proposal whose weights say how good it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import InvalidPolicyError, InvalidRewardError, OptionError, check_counts, check_numbers, form
from pirl.gaussian_integrals import GaussianKernel, Noise, Quadratic, expect, times
from pirl.simulators import EpisodeSimulator, Simulator, roll_out
from pirl.simulators.protocols import Generator, check_simulator
from pirl.soft_values import Reading

Reward = Callable[[Tensor, Tensor], Tensor]
"""(states [n, ds], actions [n, da]) -> [n]."""


class LocalPolicy(NamedTuple):
    """A linear-Gaussian policy by time and what it expects: a :class:`pirl.particles.ValuedPolicy`.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> puck = pirl.linear_gaussian.LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=5)
        >>> learner = LocalLearner(puck, puck.base_policy)
        >>> policy = learner.update(lambda states, actions: -states.square().sum(-1), num_rollouts=50)
        >>> policy.kernel.gain.shape, policy.value(torch.zeros(3, 1).double(), step=0).shape
        (torch.Size([5, 1, 1]), torch.Size([3]))
    """

    kernel: GaussianKernel
    """pi_t(a|s) = N(gain_t s + offset_t, .)."""
    values: Quadratic
    """V_t as a function of (s, 1), for t = 1..T (index 0..T-1)."""

    def __repr__(self) -> str:
        return f"LocalPolicy({self.kernel!r})"

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions ``[n, da]``."""
        return self.kernel.sample(states, step, generator)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log pi_t(a|s)."""
        return self.kernel.log_prob(states, actions, step)

    def value(self, states: Tensor, step: int) -> Float[Tensor, " n"]:
        """V_t(s), an estimate of log beta_t(s)."""
        return self.values.at(step)(_with_one(states))


class LocalLearner:
    """Learns :class:`LocalPolicy` from roll-outs of the policies before; what it saw serves every reward.

    Args:
        simulator: of vector states; all episodes have its horizon.
        base: the base policy p(a|s), linear-Gaussian, by time: ``LinearGaussian.base_policy``, or
            :func:`gaussian_base`.
        shared: one fit of the dynamics for all times, where they do not depend on time.
        ridge: on the fitted coefficients, relative to the spread of what they multiply.
        memory: roll-outs of so many last updates are kept; all by default.
        reading: "trajectory" (the better proposal) or "causal"; see :class:`pirl.soft_q_learning.SoftQLearner`.

    Raises:
        OptionError: an option out of range.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> puck = pirl.linear_gaussian.LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=5)
        >>> learner = LocalLearner(puck, puck.base_policy)
        >>> policy = learner.update(lambda states, actions: -states.square().sum(-1), num_rollouts=50)
        >>> pirl.simulators.roll_out(puck, policy, 4).states.shape
        torch.Size([4, 6, 1])
    """

    def __init__(
        self,
        simulator: Simulator | EpisodeSimulator,
        base: GaussianKernel,
        *,
        shared: bool = False,
        ridge: float = 1e-9,
        memory: int | None = None,
        reading: Reading = "trajectory",
    ) -> None:
        check_simulator(simulator)
        if not isinstance(base, GaussianKernel):
            raise InvalidPolicyError(
                f"base is {form(base)}, and no linear-Gaussian policy: give pirl.local_control.gaussian_base(...), or "
                "LinearGaussian.base_policy"
            )
        check_numbers(0.0, ridge=ridge)
        check_counts(1, memory=1 if memory is None else memory)
        if reading not in ("causal", "trajectory"):
            raise OptionError(f"reading must be 'causal' or 'trajectory', not {reading!r}")
        if len(base.gain) != simulator.horizon:
            raise InvalidPolicyError(
                f"the base policy has {len(base.gain)} steps, and the simulator's episodes have {simulator.horizon}"
            )
        self.simulator, self.base, self.shared, self.ridge, self.memory = simulator, base, shared, ridge, memory
        self.reading: Reading = reading
        self.policy: LocalPolicy | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, reward: Reward, num_rollouts: int, generator: Generator = None) -> LocalPolicy:
        """Roll out the present policy (at first the base policy), and make one for this reward of all that was seen.

        Raises:
            InvalidRewardError: the reward of a roll-out is not finite.
            SimulatorError: the simulator failed; the learner is as before.
        """
        if num_rollouts < (0 if self._seen else 2):
            raise OptionError(f"num_rollouts is {num_rollouts}: at least 2 the first time")
        seen = self._seen
        if num_rollouts:
            played = roll_out(self.simulator, self.policy or self.base, num_rollouts, generator)
            seen = [*seen, (played.states, played.actions)][-(self.memory or len(seen) + 1) :]
        policy = self._solve(reward, *(torch.cat(x) for x in zip(*seen, strict=True)))
        self._seen, self.policy = seen, policy
        return policy

    def _solve(self, reward: Reward, states: Tensor, actions: Tensor) -> LocalPolicy:
        ds, da, horizon = states.shape[-1], actions.shape[-1], actions.shape[1]
        pairs = torch.cat([states[:, :-1], actions], -1)
        if not callable(reward):
            raise InvalidRewardError(f"the reward is {form(reward)}: give a function of states and actions")
        gained = reward(states[:, :-1].flatten(0, 1), actions.flatten(0, 1))
        if not isinstance(gained, Tensor) or gained.shape != (actions.shape[0] * actions.shape[1],):
            raise InvalidRewardError(
                f"the reward gave {form(gained)} for {actions.shape[0] * actions.shape[1]} pairs: expected one number "
                "each, [n]"
            )
        gained = gained.unflatten(0, actions.shape[:2])
        if not bool(gained.isfinite().all()):
            raise InvalidRewardError("the reward of a roll-out is NaN or infinite: rewards must be finite")
        motions = [_regression(p, s, self.ridge) for p, s in _by_time(pairs, states[:, 1:], self.shared)]
        value = Quadratic(*(states.new_zeros(shape) for shape in ((ds + 1, ds + 1), (ds + 1,), ())))
        values, kernels = [], []
        one = states.new_zeros(1, ds + 1).index_fill(1, torch.tensor(ds, device=states.device), 1.0)
        # Everything is a function of x = (s, 1), so that offsets are coefficients like others.
        put = torch.eye(ds + 1, dtype=states.dtype, device=states.device)[:, :ds]
        for t in reversed(range(horizon)):
            coefficient, covariance = motions[0 if self.shared else t]
            motion = torch.cat([put @ coefficient[:ds].mT, put @ coefficient[ds : ds + da].mT], -1)
            motion = torch.cat([motion[:, :ds], put @ coefficient[-1:].mT + one.mT, motion[:, ds:]], -1)
            ahead, *_ = expect(value, put @ Noise.of(covariance).factor, self.reading == "trajectory", "states")
            gain, offset, factor = (x[t] for x in self.base)
            acting = torch.cat([put.mT.new_zeros(ds + 1, ds + 1) + torch.eye(ds + 1).to(put),
                                torch.cat([gain, offset.unsqueeze(-1)], -1)])  # fmt: skip
            noise = torch.cat([factor.new_zeros(ds + 1, factor.shape[-1]), factor])
            fitted = _concave(_quadratic(pairs[:, t], gained[:, t], self.ridge), ds, pairs[:, t].mean(0))
            joint = fitted.plus(ahead.after(motion))
            joint, how, where, spread = expect(joint, noise, True, "actions")
            how, where, spread = how[ds + 1 :] @ acting, where[ds + 1 :], spread[ds + 1 :]
            kernels.append((how[:, :ds], how[:, ds] + where, spread))
            value = joint.after(acting)
            values.append(value)
        kernel = GaussianKernel(*(torch.stack(x[::-1]) for x in zip(*kernels, strict=True)))
        return LocalPolicy(kernel, Quadratic(*(torch.stack(x[::-1]) for x in zip(*values, strict=True))))


def gaussian_base(
    horizon: int, covariance: Float[Tensor, "da da"], num_state_dims: int, mean: Float[Tensor, " da"] | None = None
) -> GaussianKernel:
    """p(a|s) = N(mean, covariance) at every time, as the base policy of vector actions.

    Args:
        horizon: T, as the simulator's.
        covariance: of the actions; its dtype must be the simulator's.
        num_state_dims: ds, coordinates of a state as the simulator gives them.
        mean: of the actions; 0 by default.

    Raises:
        OptionError: the covariance is no positive definite matrix, the mean has another size or dtype, or a number is
            out of range.

    Example:
        >>> gaussian_base(10, torch.eye(1).double(), num_state_dims=3).gain.shape
        torch.Size([10, 1, 3])
    """
    check_counts(1, horizon=horizon, num_state_dims=num_state_dims)
    square = isinstance(covariance, Tensor) and covariance.dim() == 2 and covariance.shape[0] == covariance.shape[1]
    if not square or not covariance.is_floating_point():
        raise OptionError(
            f"covariance is {form(covariance)}; expected a floating tensor [da, da], as torch.eye(1).double()"
        )
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info) or not torch.allclose(covariance, covariance.mT):
        raise OptionError(f"covariance {covariance.tolist()} is not symmetric and positive definite")
    da = len(covariance)
    if mean is not None and (not isinstance(mean, Tensor) or mean.shape != (da,) or mean.dtype != covariance.dtype):
        raise OptionError(
            f"mean is {form(mean)}, but the covariance {form(covariance)}: give one of its dtype, ({da},)"
        )
    offset = covariance.new_zeros(da) if mean is None else mean
    parts = covariance.new_zeros(da, num_state_dims), offset, factor
    return GaussianKernel(*(x.expand(horizon, *x.shape) for x in parts))


def _with_one(states: Float[Tensor, "*n ds"]) -> Float[Tensor, "*n dx"]:
    return torch.cat([states, torch.ones_like(states[..., :1])], -1)


def _by_time(pairs: Tensor, following: Tensor, shared: bool) -> list[tuple[Tensor, Tensor]]:
    if shared:
        return [(pairs.flatten(0, 1), following.flatten(0, 1))]
    return [(pairs[:, t], following[:, t]) for t in range(pairs.shape[1])]


def _regression(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], ridge: float) -> tuple[Tensor, Tensor]:
    """Coefficients ``[d + 1, e]`` of (x, 1), and the residuals' covariance."""
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-12)
    scaled = (x - mean) / scale
    gram = scaled.mT @ scaled / len(x) + max(ridge, 1e-12) * torch.eye(x.shape[1]).to(x)
    slope = torch.linalg.solve(gram, scaled.mT @ (y - y.mean(0)) / len(x)) / scale.unsqueeze(1)
    slope = torch.where(x.std(0).unsqueeze(1) > 1e-12, slope, 0.0)
    left = y.mean(0) - mean @ slope
    residual = y - x @ slope - left
    # Degrees of freedom: as many as coefficients are lost.
    covariance = residual.mT @ residual / max(len(x) - x.shape[1] - 1, 1)
    return torch.cat([slope, left.unsqueeze(0)]), covariance


def _quadratic(x: Float[Tensor, "n d"], y: Float[Tensor, " n"], ridge: float) -> Quadratic:
    """The quadratic function of x nearest to y."""
    size = x.shape[1]
    mean, scale = x.mean(0), x.std(0)
    scale = torch.where(scale > 1e-9, scale, 1.0)
    scaled = (x - mean) / scale
    row, column = torch.triu_indices(size, size)
    terms = torch.cat([scaled[:, row] * scaled[:, column], scaled, torch.ones_like(scaled[:, :1])], -1)
    gram = terms.mT @ terms / len(x) + max(ridge, 1e-12) * torch.eye(terms.shape[1]).to(x)
    coefficient = torch.linalg.solve(gram, terms.mT @ y / len(x))
    square, slope, constant = coefficient.split([len(row), size, 1])
    matrix = x.new_zeros(size, size)
    matrix[row, column] = -square
    return _unscaled(Quadratic(matrix + matrix.mT, slope, constant[0]), mean, scale)


def _unscaled(function: Quadratic, mean: Tensor, scale: Tensor) -> Quadratic:
    """f((x - mean) / scale) as a function of x."""
    matrix, vector = function.matrix / (scale[:, None] * scale), function.vector / scale
    constant = function.constant - vector @ mean - 0.5 * mean @ times(matrix, mean)
    return Quadratic(matrix, vector + times(matrix, mean), constant)


def _concave(function: Quadratic, num_states: int, centre: Tensor) -> Quadratic:
    """A function of (s, a) as one of (s, 1, a), without upward curvature, for which integrals might be infinite.

    Value and slope stay what they are at the centre of what the function was fitted to.
    """
    size, axes = torch.linalg.eigh(function.matrix)
    matrix = (axes * size.clamp_min(0.0)) @ axes.mT
    moved = (matrix - function.matrix) @ centre
    keep = torch.cat([torch.arange(num_states), torch.arange(num_states + 1, len(matrix) + 1)]).to(matrix.device)
    larger = matrix.new_zeros(len(matrix) + 1, len(matrix) + 1)
    larger[keep.unsqueeze(1), keep] = matrix
    vector = matrix.new_zeros(len(matrix) + 1)
    vector[keep] = function.vector + moved
    return Quadratic(larger, vector, function.constant - 0.5 * centre @ moved)
