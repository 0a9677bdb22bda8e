"""Continuous states and actions where log Z is exact: linear-Gaussian dynamics, quadratic rewards.

    s_1 ~ N(m0, P0),    s_{t+1} = A s_t + B a_t + w_t,  w_t ~ N(0, W),    a_t ~ p(a|s) = N(K s_t, U),    t = 1..T
    r(s, a) = -1/2 s'Qs - 1/2 a'Ra + q's + c'a

Soft values are then quadratic in s, log beta_t(s) = -1/2 s'Ms + h's + g, by a Riccati recursion backward in time, whose
every step is the one integral of ``pirl.gaussian_integrals``: W and P0 may be singular. Trajectory reading, as in
:mod:`pirl.message_passing`; the causal reading (a soft LQR) has E log beta over chance in place of log E beta. Matrices
are small: everything is dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pirl.errors import (
    HorizonError,
    InvalidMDPError,
    InvalidRewardError,
    InvalidTrajectoriesError,
    OptionError,
    check_counts,
    form,
)
from pirl.gaussian_integrals import (
    GaussianKernel,
    Generator,
    Noise,
    Quadratic,
    check_covariance,
    expect,
    eye_like,
    standard_normal,
    times,
)
from pirl.message_passing import is_checked
from pirl.partition import Particles
from pirl.soft_values import Reading


class QuadraticReward(NamedTuple):
    """r(s, a) = -1/2 s'Qs - 1/2 a'Ra + q's + c'a; see :meth:`LinearGaussian.quadratic`.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> puck = LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=5)
        >>> puck.quadratic(2 * one, one)._fields
        ('state_cost', 'action_cost', 'state_slope', 'action_slope')
    """

    state_cost: Float[Tensor, "*batch ds ds"]
    """Q."""
    action_cost: Float[Tensor, "*batch da da"]
    """R."""
    state_slope: Float[Tensor, "*batch ds"]
    """q."""
    action_slope: Float[Tensor, "*batch da"]
    """c."""

    def __call__(self, states: Float[Tensor, "... ds"], actions: Float[Tensor, "... da"]) -> Float[Tensor, "..."]:
        """Rewards; leading dimensions broadcast against those of the coefficients."""
        none = torch.zeros((), dtype=states.dtype, device=states.device)
        of_state = Quadratic(self.state_cost, self.state_slope, none)
        return of_state(states) + Quadratic(self.action_cost, self.action_slope, none)(actions)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions."""
        matrices, vectors = self[:2], self[2:]
        return torch.broadcast_shapes(*(x.shape[:-2] for x in matrices), *(x.shape[:-1] for x in vectors))

    def joint(self) -> Quadratic:
        """The same as a function of x = (s, a); only the symmetric parts of Q and R count."""
        batch = self.batch_shape
        Q, R = (x.expand(*batch, *x.shape[-2:]) for x in self[:2])
        states, actions = Q.shape[-1], R.shape[-1]
        above = torch.cat([Q, Q.new_zeros(*batch, states, actions)], -1)
        below = torch.cat([R.new_zeros(*batch, actions, states), R], -1)
        matrix = torch.cat([above, below], -2)
        vector = torch.cat([x.expand(*batch, x.shape[-1]) for x in self[2:]], -1)
        return Quadratic((matrix + matrix.mT) / 2, vector, vector.new_zeros(batch))


class LinearGaussianLaw(NamedTuple):
    """p(tau | O): soft values, and the laws that ``sample`` draws from, by time t = 1..T (index 0..T-1).

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> puck = LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=5)
        >>> law = puck.solve(puck.quadratic(2 * one, one))
        >>> law.log_partition.shape, law.policy.gain.shape
        (torch.Size([]), torch.Size([5, 1, 1]))
    """

    log_partition: Float[Tensor, "*batch"]
    """log Z; causal reading: E V_1(s_1)."""
    values: Quadratic
    """log beta_t(s) (trajectory) or V_t(s) (causal), one step more than the others: it is 0 at T+1."""
    expected: Quadratic
    """log E beta_{t+1}(s') (causal: E V_{t+1}(s')) as a function of the mean A s + B a of s'."""
    start_mean: Float[Tensor, "*batch ds"]
    start_factor: Float[Tensor, "*batch ds ds"]
    """p(s_1 | O) = N(start_mean, start_factor start_factor')."""
    policy: GaussianKernel
    """p(a_t | s_t, O)."""
    dynamics: GaussianKernel
    """p(s_{t+1} | (s_t, a_t), O): the true dynamics in the causal reading, which does not tilt chance."""


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """Linear-Gaussian dynamics over T steps, with a linear-Gaussian base policy: everything but the reward.

    It is also a simulator (``reset``, ``step``), which knows nothing of rewards.

    Args:
        transition: A ``[ds, ds]``; its dtype (use float64) and device are those of all that follows.
        control: B ``[ds, da]``.
        noise: W ``[ds, ds]``, positive semi-definite; zero for deterministic dynamics.
        initial_mean: m0 ``[ds]``.
        initial_covariance: P0 ``[ds, ds]``, positive semi-definite; zero where the start is given.
        action_covariance: U ``[da, da]`` of the base policy, positive definite.
        horizon: T, number of decisions.
        action_gain: K ``[da, ds]`` of the base policy's mean K s; zero by default.

    Raises:
        InvalidMDPError: shapes, types or covariances are not as above; names the argument.
        HorizonError: the horizon is not a positive whole number.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> system = LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=1)
        >>> system.log_partition(system.quadratic(0 * one, one))  # E exp(-a^2 / 2) = 2^-1/2
        tensor(-0.3466, dtype=torch.float64)
    """

    transition: Tensor
    control: Tensor
    noise: Tensor
    initial_mean: Tensor
    initial_covariance: Tensor
    action_covariance: Tensor
    horizon: int
    action_gain: Tensor | None = None

    base_policy: GaussianKernel = field(init=False, repr=False)
    """p(a|s), as a policy to roll out."""
    _start_noise: Noise = field(init=False, repr=False)
    _noise: Noise = field(init=False, repr=False)
    _motion: Float[Tensor, "ds dx"] = field(init=False, repr=False)
    _acting: Float[Tensor, "dx ds"] = field(init=False, repr=False)
    _action_factor: Float[Tensor, "dx da"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.action_gain is None and isinstance(self.control, Tensor):
            object.__setattr__(self, "action_gain", torch.zeros_like(self.control.mT))
        if not isinstance(self.control, Tensor) or self.control.dim() != 2 or 0 in self.control.shape:
            raise InvalidMDPError("control (B) must be a tensor [ds, da] with at least one state and one action")
        ds, da = self.control.shape
        shapes = {"transition": (ds, ds), "control": (ds, da), "noise": (ds, ds), "initial_mean": (ds,),
                  "initial_covariance": (ds, ds), "action_covariance": (da, da), "action_gain": (da, ds)}  # fmt: skip
        for name, shape in shapes.items():
            x, like = getattr(self, name), self.control
            if not isinstance(x, Tensor) or x.shape != shape:
                found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise InvalidMDPError(f"{name} is {found}; with control [{ds}, {da}] it must be a tensor {shape}")
            if x.dtype != like.dtype or x.device != like.device or not x.is_floating_point():
                raise InvalidMDPError(f"{name} is {x.dtype} on {x.device}, control {like.dtype} on {like.device}: "
                                      "give all of them one floating type and device")  # fmt: skip
            if not bool(x.isfinite().all()):
                raise InvalidMDPError(f"{name} is NaN or infinite somewhere")
        for name in ("noise", "initial_covariance", "action_covariance"):
            check_covariance(name, getattr(self, name), definite=name == "action_covariance")
        if isinstance(self.horizon, bool) or not isinstance(self.horizon, int) or self.horizon < 1:
            raise HorizonError(f"horizon is {self.horizon!r}; it must be a whole number of decisions, at least 1")
        self._derive()

    @property
    def num_state_dims(self) -> int:
        """ds."""
        return self.control.shape[0]

    @property
    def num_action_dims(self) -> int:
        """da."""
        return self.control.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of every tensor of this problem."""
        return self.control.dtype

    @property
    def device(self) -> torch.device:
        """Where every tensor of this problem lives."""
        return self.control.device

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> LinearGaussian:
        """A copy on another device, or in another floating type."""
        given: dict[str, Any] = {x.name: getattr(self, x.name) for x in fields(self) if x.init}
        moved = {name: x.to(device=device, dtype=dtype) for name, x in given.items() if isinstance(x, Tensor)}
        return LinearGaussian(**(given | moved))

    def constant_data(self) -> dict[str, tuple[tuple[str | None, ...], np.ndarray]]:
        """What a posterior file keeps of this problem."""
        given = {x.name: torch.as_tensor(getattr(self, x.name), device="cpu") for x in fields(self) if x.init}
        return {name: ((None,) * x.dim(), x.numpy()) for name, x in given.items()}

    def quadratic(
        self,
        state_cost: Tensor | None = None,
        action_cost: Tensor | None = None,
        state_slope: Tensor | None = None,
        action_slope: Tensor | None = None,
    ) -> QuadraticReward:
        """The reward -1/2 s'Qs - 1/2 a'Ra + q's + c'a; what is not given is zero.

        Args:
            state_cost: Q ``[*batch, ds, ds]``, symmetric. Where Q and R are positive semi-definite, Z is finite.
            action_cost: R ``[*batch, da, da]``, symmetric.
            state_slope: q ``[*batch, ds]``.
            action_slope: c ``[*batch, da]``.

        Raises:
            InvalidRewardError: wrong shape, dtype or device, or a NaN.
        """
        ds, da = self.num_state_dims, self.num_action_dims
        given = {"state_cost": (state_cost, (ds, ds)), "action_cost": (action_cost, (da, da)),
                 "state_slope": (state_slope, (ds,)), "action_slope": (action_slope, (da,))}  # fmt: skip
        return self._checked(
            QuadraticReward(*(self.control.new_zeros(shape) if x is None else x for x, shape in given.values()))
        )

    # ------------------------------------------------------------------------------------------------ exact inference

    def solve(self, reward: QuadraticReward, reading: Reading = "trajectory") -> LinearGaussianLaw:
        """log Z, soft values, and the law of trajectories given O, ``[*batch]``; differentiable in the reward.

        The causal reading's policy is exp(Q - V) with Q = r + log p(a|s) + E V(s').

        Raises:
            DivergenceError: Z is infinite (or a causal V). Under ``torch.func.vmap``, and where torch's validation is
                off, that member alone is NaN.
            InvalidRewardError: the reward does not fit; see :meth:`quadratic`.
        """
        if reading not in ("causal", "trajectory"):
            raise OptionError(f"reading must be 'causal' or 'trajectory', not {reading!r}")
        ds, tilts = self.num_state_dims, reading == "trajectory"
        joint = self._checked(reward).joint()
        value = Quadratic(
            *(torch.zeros_like(x) for x in (joint.matrix[..., :ds, :ds], joint.vector[..., :ds], joint.constant))
        )
        values, expected, policies, dynamics = [value], [], [], []
        for t in reversed(range(self.horizon)):
            ahead, gain, offset, factor = expect(value, self._noise.factor, tilts, f"the states after step {t + 1}")
            expected.append(ahead)
            dynamics.append((gain @ self._motion, offset, factor))
            ahead, gain, offset, factor = expect(
                joint.plus(ahead.after(self._motion)), self._action_factor, True, f"the actions of step {t + 1}"
            )
            policies.append((gain[..., ds:, :] @ self._acting, offset[..., ds:], factor[..., ds:, :]))
            value = ahead.after(self._acting)
            values.append(value)
        first, gain, offset, factor = expect(value, self._start_noise.factor, tilts, "the first states")
        return LinearGaussianLaw(
            first(self.initial_mean),
            Quadratic(*_by_time(values, 2, 1, 0)),
            Quadratic(*_by_time(expected, 2, 1, 0)),
            times(gain, self.initial_mean) + offset,
            factor,
            GaussianKernel(*_by_time(policies, 2, 1, 2)),
            GaussianKernel(*_by_time(dynamics, 2, 1, 2)),
        )

    def log_partition(self, reward: QuadraticReward, reading: Reading = "trajectory") -> Float[Tensor, "..."]:
        """log Z = log E_p(tau)[exp sum_t r], ``[*batch]``; causal reading: E V_1(s_1).

        Raises:
            DivergenceError, InvalidRewardError: see :meth:`solve`.
        """
        return self.solve(reward, reading).log_partition

    def soft_values(self, reward: QuadraticReward, reading: Reading = "trajectory") -> Quadratic:
        """log beta_t(s) by time: coefficients ``[*batch, T + 1, ...]``, zero at T+1."""
        return self.solve(reward, reading).values

    def twist(self, reward: QuadraticReward) -> Callable[[int, Tensor], Tensor]:
        """(t, states ``[*n, ds]``) -> log beta_t(states) ``[*n]``, t = 0..T: the exact twist of a particle filter."""
        values = self.soft_values(reward)
        return lambda t, states: values.at(t)(states)

    def particles(
        self, reward: QuadraticReward, guide: QuadraticReward | None = None, generator: Generator = None
    ) -> Particles:
        """What :func:`pirl.partition.smc` runs on: draws of the law tilted by ``guide``, with its soft values as twist.

        With the reward itself as guide (the default) Z-hat has no variance. Rewards without batch dimensions.

        Raises:
            InvalidRewardError: a reward has batch dimensions; or see :meth:`solve`.
        """
        for name, given in (("reward", reward), ("guide", guide or reward)):
            if self._checked(given).batch_shape:
                batch = tuple(given.batch_shape)
                raise InvalidRewardError(
                    f"the {name} is a batch {batch}: particles are of one reward; take them in turn"
                )
        law = self.solve(QuadraticReward(*(x.detach() for x in (guide or reward))))

        def reset(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
            states = self._start(law, torch.Size(shape), generator)
            return states, law.log_partition - law.values.at(0)(states)

        def propose(t: int, states: Tensor) -> tuple[Tensor, Tensor]:
            actions = law.policy.sample(states, t, generator)
            return actions, self.base_log_prob(states, actions) - law.policy.log_prob(states, actions, t)

        def step(t: int, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
            pair = torch.cat([states, actions], -1)
            following = law.dynamics.sample(pair, t, generator)
            return following, law.expected.at(t)(times(self._motion, pair)) - law.values.at(t + 1)(following)

        def gained(t: int, states: Tensor, actions: Tensor) -> Tensor:
            return reward(states, actions)

        return Particles(reset, propose, step, gained, lambda t, states: law.values.at(t)(states))

    # ------------------------------------------------------------------------------------------------ trajectories

    @torch.no_grad()
    def sample(
        self, reward: QuadraticReward, num: int, generator: Generator = None, reading: Reading = "trajectory"
    ) -> tuple[Float[Tensor, "*batch num T1 ds"], Float[Tensor, "*batch num T da"]]:
        """Draw trajectories of p(tau | O): s_1, actions and next states all from their tilted laws (module's head)."""
        check_counts(0, num=num)
        batch = self._checked(reward).batch_shape
        states, actions = self.draw(self.solve(reward, reading), torch.Size((num, *batch)), generator)
        return states.movedim(0, len(batch)), actions.movedim(0, len(batch))

    def draw(
        self, law: LinearGaussianLaw, shape: torch.Size, generator: Generator = None
    ) -> tuple[Float[Tensor, "*shape T1 ds"], Float[Tensor, "*shape T da"]]:
        """One trajectory of a law for each place of ``shape``, whose last dimensions are the law's batch."""
        states, actions = [self._start(law, shape, generator)], []
        for t in range(self.horizon):
            actions.append(law.policy.sample(states[t], t, generator))
            states.append(law.dynamics.sample(torch.cat([states[t], actions[t]], -1), t, generator))
        return torch.stack(states, -2), torch.stack(actions, -2)

    def relative_log_prob(
        self, reward: QuadraticReward, states: Tensor, actions: Tensor, reading: Reading = "trajectory"
    ) -> Float[Tensor, "..."]:
        """log p(tau | O) - log p(tau): what the reward says of trajectories, whatever their dynamics.

        It is sum_t r - log Z; in the causal reading sum_t log pi_t(a_t|s_t) - log p(a_t|s_t).

        Args:
            states: ``[*n, T + 1, ds]``; *n broadcasts against the reward's batch.
            actions: ``[*n, T, da]``.

        Raises:
            InvalidTrajectoriesError: wrong shapes, or a NaN.
            DivergenceError, InvalidRewardError: see :meth:`solve`.
        """
        self._check_trajectories(states, actions)
        before, law = states[..., :-1, :], self.solve(reward, reading)
        if reading == "causal":
            return (law.policy.log_prob(before, actions) - self.base_log_prob(before, actions)).sum(-1)
        gained = reward.joint().timed()(torch.cat([before, actions], -1))
        return gained.sum(-1) - law.log_partition

    def log_prob(
        self, reward: QuadraticReward, states: Tensor, actions: Tensor, reading: Reading = "trajectory"
    ) -> Float[Tensor, "..."]:
        """Normalised log density of trajectories, p(s_1), P(s'|s,a) and p(a|s) included; arguments as above.

        Where P0 or W is singular that law has no density; it is left out, and the rest is relative to it.

        Raises:
            ImpossibleTransitionError: such a start or step is off the plane that P0 or W allows (with validation on).
        """
        relative = self.relative_log_prob(reward, states, actions, reading)
        before = states[..., :-1, :]
        started = (states[..., 0, :] - self.initial_mean).unsqueeze(-2)
        moved = states[..., 1:, :] - times(self._motion, torch.cat([before, actions], -1))
        if is_checked(states):
            size = 1 + states.abs().amax((-2, -1)) + self.initial_mean.abs().max()
            self._start_noise.check(started, size, "its start", "initial_covariance")
            self._noise.check(moved, size, "step {}", "noise")
        result = relative + self.base_log_prob(before, actions).sum(-1)
        return result + self._start_noise.log_prob(started).sum(-1) + self._noise.log_prob(moved).sum(-1)

    # ------------------------------------------------------------------------------------------------ simulation

    def reset(self, num: int, generator: Generator = None) -> Float[Tensor, "num ds"]:
        """First states from p(s_1)."""
        z = standard_normal((num, self.num_state_dims), self.control, generator)
        return self.initial_mean + times(self._start_noise.factor, z)

    def step(
        self, states: Float[Tensor, "*n ds"], actions: Float[Tensor, "*n da"], generator: Generator = None
    ) -> Float[Tensor, "*n ds"]:
        """Next states from P(s'|s,a)."""
        z = standard_normal(states.shape, states, generator)
        return times(self._motion, torch.cat([states, actions], -1)) + times(self._noise.factor, z)

    def base_sample(self, states: Float[Tensor, "*n ds"], generator: Generator = None) -> Float[Tensor, "*n da"]:
        """Actions from p(a|s)."""
        return self.base_policy.sample(states, 0, generator)

    def base_log_prob(self, states: Float[Tensor, "*n ds"], actions: Float[Tensor, "*n da"]) -> Float[Tensor, "*n"]:
        """log p(a|s)."""
        return self.base_policy.log_prob(states, actions, 0)

    # ------------------------------------------------------------------------------------------------ internals

    def _derive(self) -> None:
        """Matrices that the recursions use; here and not on first use, which may be inside a torch.func transform."""
        A, B, K, U = self.transition, self.control, self.action_gain, Noise.of(self.action_covariance).factor
        assert K is not None
        of_one_step = K, torch.zeros_like(B[0]), U
        # Through __dict__: a frozen object fills itself once.
        self.__dict__.update(
            base_policy=GaussianKernel(*(x.expand(self.horizon, *x.shape) for x in of_one_step)),
            _start_noise=Noise.of(self.initial_covariance),
            _noise=Noise.of(self.noise),
            _motion=torch.cat([A, B], -1),  # (s, a) to the mean of s'
            _acting=torch.cat([eye_like(A), K], -2),  # s to the mean of (s, a)
            _action_factor=torch.cat([torch.zeros_like(B), U], -2),  # of the covariance of (s, a) given s
        )

    def _start(self, law: LinearGaussianLaw, shape: torch.Size, generator: Generator) -> Tensor:
        z = standard_normal((*shape, self.num_state_dims), law.start_mean, generator)
        return law.start_mean + times(law.start_factor, z)

    def _checked(self, reward: QuadraticReward) -> QuadraticReward:
        ds, da = self.num_state_dims, self.num_action_dims
        if not isinstance(reward, QuadraticReward):
            raise InvalidRewardError(f"the reward is {form(reward)}: give one of LinearGaussian.quadratic(...)")
        for name, x, shape in zip(reward._fields, reward, ((ds, ds), (da, da), (ds,), (da,)), strict=True):
            if not isinstance(x, Tensor) or x.shape[x.dim() - len(shape) :] != shape or x.dim() < len(shape):
                raise InvalidRewardError(f"{name} is {form(x)}; expected a tensor [*batch, *{shape}]")
            if x.dtype != self.dtype or x.device != self.device:
                raise InvalidRewardError(
                    f"{name} is {x.dtype} on {x.device}, the dynamics {self.dtype} on {self.device}: convert one"
                )
            if is_checked(x) and not bool(x.isfinite().all()):
                raise InvalidRewardError(f"{name} is NaN or infinite somewhere")
        try:
            reward.batch_shape  # noqa: B018
        except RuntimeError:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(reward._fields, reward, strict=True))
            raise InvalidRewardError(f"batch dimensions do not broadcast: {shapes}") from None
        return reward

    def _check_trajectories(self, states: Tensor, actions: Tensor) -> None:
        T, ds, da = self.horizon, self.num_state_dims, self.num_action_dims
        if states.shape[-2:] != (T + 1, ds) or actions.shape[-2:] != (T, da):
            raise InvalidTrajectoriesError(
                f"states {tuple(states.shape)} and actions {tuple(actions.shape)} must end in [{T + 1}, {ds}] and "
                f"[{T}, {da}]: {T} decisions, and the state after the last"
            )
        for name, x in (("states", states), ("actions", actions)):
            if is_checked(x) and not bool(x.isfinite().all()):
                place = (~x.isfinite()).nonzero()[0, :-1].tolist()
                raise InvalidTrajectoriesError(f"{name}{place} is NaN or infinite")


class LinearGaussianTrajectory(TorchDistribution):
    """Trajectories of :class:`LinearGaussian` given O, to be observed by a Pyro model.

    Batch shape ``[*batch]`` (that of the reward; a plate of N episodes expands it), event shape ``(T + 1, ds + da)``:
    state and action of every step; the last state's action is 0.

    Args:
        system: the dynamics.
        reward: see :meth:`LinearGaussian.quadratic`.
        reading: "trajectory" (sum_t r - log Z, exact) or "causal".

    Raises:
        DivergenceError, InvalidRewardError: see :meth:`LinearGaussian.solve`; when the density is asked for.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> puck = LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=5)
        >>> law = LinearGaussianTrajectory(puck, puck.quadratic(2 * one, one))
        >>> paths = law.sample((20,))
        >>> paths.shape, law.log_prob(paths).shape
        (torch.Size([20, 6, 2]), torch.Size([20]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 2)
    event_dim_names = ("step", "state_action")

    def __init__(
        self,
        system: LinearGaussian,
        reward: QuadraticReward,
        reading: Reading = "trajectory",
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(system, LinearGaussian):
            raise OptionError(f"system is {form(system)}: give a LinearGaussian, then its reward")
        self.system, self.reward, self.reading = system, system._checked(reward), reading
        event = torch.Size((system.horizon + 1, system.num_state_dims + system.num_action_dims))
        # Validation is not torch's (constraints of arguments and support): it names trajectory and step.
        super().__init__(reward.batch_shape, event, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LinearGaussianTrajectory:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.broadcast_shapes(torch.Size(batch_shape), self._batch_shape)
        return new

    def log_prob(self, value: Float[Tensor, "... T1 dx"]) -> Float[Tensor, "..."]:
        """Normalised log density; see :meth:`LinearGaussian.log_prob`."""
        if value.shape[-2:] != self.event_shape:
            raise InvalidTrajectoriesError(
                f"trajectories have shape {tuple(value.shape)}; expected [*batch, *{tuple(self.event_shape)}]"
            )
        ds = self.system.num_state_dims
        result = self.system.log_prob(self.reward, value[..., :ds], value[..., :-1, ds:], self.reading)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Float[Tensor, "*shape T1 dx"]:
        """Draw trajectories."""
        shape = torch.Size(sample_shape) + self.batch_shape
        states, actions = self.system.draw(self.system.solve(self.reward, self.reading), shape)
        return torch.cat([states, torch.nn.functional.pad(actions, (0, 0, 0, 1))], -1)


def _by_time(steps: list[Any], *events: int) -> list[Tensor]:
    """From tuples of tensors ``[*batch, *event]``, last time first, to a tensor ``[*batch, T, *event]`` for each."""
    return [torch.stack(x[::-1], -1 - event) for x, event in zip(zip(*steps, strict=True), events, strict=True)]
