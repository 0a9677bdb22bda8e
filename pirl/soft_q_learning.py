"""Soft Q-learning: the MaxEnt-RL policy of a finite space, from transitions alone.

With k decisions to go (V_0 = 0, g the discount, p(a|s) the base measure; Levine 2018; Haarnoja et al. 2017)

    Q_k(s,a) = r(s,a) + g F_k(s,a),    F_k(s,a) = E[V_{k-1}(s') | s,a],    V_k(s) = log sum_a p(a|s) exp Q_k(s,a)

is the causal reading's recursion; only F must be learned. Dynamics do not depend on time, so every transition (s,a,s')
is one of every k. Two ways to average over s':

- *replay*: all transitions seen, as counts, are swept to the fixed point: F is the mean of V_{k-1} over all that
  followed (s,a). For a new reward it needs no new transition. The estimate is that of the empirical dynamics; its
  error falls as one over the square root of the counts, and is zero where nothing is left to chance.
- *online*: each batch moves F towards its mean by the step size (k + 1) / (k + n) of the n-th visit (as Jin et al. 2018
  for episodes of known length), and is forgotten.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import (
    DiscountError,
    InvalidRewardError,
    OptionError,
    check_counts,
    check_numbers,
    form,
)
from pirl.message_passing import log_policy_to_go, require_finite, require_finite_reward
from pirl.simulators import Rollouts, TabularPolicy, roll_out
from pirl.simulators.protocols import Generator
from pirl.soft_values import Reading, SoftProblem, soft_values
from pirl.transitions import TransitionMap


@runtime_checkable
class FiniteSimulator(Protocol):
    """A simulator of a finite space, and what is known of that space: not its dynamics.

    States are numbers from 0 to S - 1, actions from 0 to A - 1, in tensors of int64; all random numbers are to come
    from the generator that is given, on its device. A class with these attributes and methods is one; it need not
    inherit. ``is_terminal(states) -> [n]`` (bool) may be there too, and must then agree with ``terminal``.

    Example:
        >>> class Drift:  # three places on a line; 1 tries to go right and slips, 0 rests; the last place ends it
        ...     horizon, discount = 6, 1.0
        ...     log_prior = torch.full((3, 2), 0.5, dtype=torch.float64).log()
        ...     terminal = torch.tensor([False, False, True])
        ...     def reset(self, num, generator=None):
        ...         return torch.zeros(num, dtype=torch.long)
        ...     def step(self, states, actions, generator=None):
        ...         slips = torch.rand(len(states), generator=generator) < 0.3
        ...         return (states + actions * ~slips).clamp(max=2)
        >>> isinstance(Drift(), FiniteSimulator)
        True
        >>> policy = soft_q_learning(Drift(), torch.tensor([[0.0], [0.0], [5.0]]).double(), num_rollouts=200)
        >>> pirl.simulators.roll_out(Drift(), policy, 3).states.shape
        torch.Size([3, 7])
    """

    horizon: int
    """T, decisions of a roll-out."""
    discount: float
    """g."""
    log_prior: Tensor
    """log p(a|s) ``[S, A]``, -inf where an action is not available; rows of terminal states do not matter, for an
    episode that has ended collects r(s, 0) once, if any decisions are left."""
    terminal: Tensor
    """``[S]`` mask: where episodes end."""

    def reset(self, num: int, generator: Generator = None) -> Tensor:
        """First states ``[num]``, whole numbers."""

    def step(self, states: Tensor, actions: Tensor, generator: Generator = None) -> Tensor:
        """Next states ``[n]``, whole numbers, of states and actions ``[n]`` each."""


def require_finite_simulator(simulator: Any) -> None:
    """Refuse a simulator that does not say of its space what has to be known.

    Raises:
        OptionError: names what :class:`FiniteSimulator` has and this one lacks, or has in another form.

    Example:
        >>> require_finite_simulator(pirl.simulators.TabularSimulator(world))
    """
    protocol = "a finite space needs a pirl.soft_q_learning.FiniteSimulator"
    names = ("horizon", "discount", "log_prior", "terminal", "reset", "step")
    lacks = [name for name in names if not hasattr(simulator, name)]
    if lacks or isinstance(simulator, type):
        raise OptionError(
            f"{protocol}, and {form(simulator)} lacks {', '.join(lacks) or 'an instance'}: give it what is missing, or "
            "a function of states and actions in place of a table where states are vectors"
        )
    prior, terminal, discount = simulator.log_prior, simulator.terminal, simulator.discount
    check_counts(1, horizon=simulator.horizon)
    if not isinstance(prior, Tensor) or prior.dim() != 2 or not prior.is_floating_point() or prior.isnan().any():
        raise OptionError(f"{protocol}: log_prior is {form(prior)}; expected log p(a|s), a floating tensor [S, A]")
    if bool((prior > 1e-6).any()):
        raise OptionError(
            f"{protocol}: log_prior is up to {float(prior.max()):.4g}; log p(a|s) is at most 0: give the logarithm of "
            "probabilities, or zeros for the counting measure"
        )
    if not isinstance(terminal, Tensor) or terminal.shape != prior.shape[:1] or terminal.dtype != torch.bool:
        raise OptionError(f"{protocol}: terminal is {form(terminal)}; expected a mask, a bool tensor [{len(prior)}]")
    if not isinstance(discount, (int, float)) or not 0 <= discount <= 1:
        raise OptionError(f"{protocol}: discount is {discount!r}; expected a number from 0 to 1")


def _with_no_op(log_prior: Tensor, terminal: Tensor) -> Tensor:
    """The base measure with one action, of measure 1, where episodes have ended: whatever its rows say there."""
    no_op = torch.full_like(log_prior[0], -torch.inf)
    no_op[0] = 0.0
    return torch.where(terminal.unsqueeze(-1), no_op, log_prior)


class Round(NamedTuple):
    """What one update did.

    Example:
        >>> policy = soft_q_learning(pirl.simulators.TabularSimulator(world), wanted, num_rollouts=20, num_rounds=2)
        >>> [(done.num_rollouts, done.steps) for done in policy.history]
        [(20, 160), (20, 160)]
    """

    num_rollouts: int
    steps: int
    """Environment steps of this round."""
    seen: int
    """Pairs (s,a) that were ever tried."""
    change: float
    """Largest change of a soft value by these roll-outs, under the same reward."""


class SoftPolicy(TabularPolicy):
    """What was learned; a :class:`pirl.simulators.Policy` to roll out.

    Attributes:
        log_policy: log pi_t(a|s) ``[T, S, A]`` by time, or ``[S, A]`` (stationary).
        values: V_t(s) ``[T, S]``, or ``[S]``.
        history: one :class:`Round` an update.

    Example:
        >>> policy = soft_q_learning(pirl.simulators.TabularSimulator(world), wanted, num_rollouts=20)
        >>> policy.log_policy.shape, policy.values.shape, len(policy.history)
        (torch.Size([8, 16, 5]), torch.Size([8, 16]), 10)
    """

    def __init__(self, log_policy: Tensor, values: Tensor, history: tuple[Round, ...]) -> None:
        super().__init__(log_policy)
        self.values, self.history = values, history

    def value(self, states: Tensor, step: int) -> Float[Tensor, " n"]:
        """V_t(s) of some states: what a particle filter can be twisted by."""
        return (self.values[step] if self.values.dim() == 2 else self.values)[states]


class SoftQLearner:
    """Soft Q-learning that goes on: new roll-outs, and new rewards, start from all that was learned.

    Args:
        simulator: a :class:`pirl.simulators.TabularSimulator` or another :class:`FiniteSimulator`.
        replay: keep transitions as counts, and sweep them to the fixed point; else learn online.
        explore: share of decisions that follow the base measure instead of the policy.
        stationary: learn the discounted infinite horizon's policy ``[S, A]`` (replay only); the simulator's horizon is
            then only where roll-outs stop.
        reading: "causal", MaxEnt RL; or "trajectory" (replay only, no discount): log E exp V in place of E V, whose
            policy is p(a_t | s_t, O). Of all policies it is the nearest to p(tau | O) in KL(p || q), and the better
            proposal for log Z under chance; V is log beta.

    A pair that was never tried is taken to lead nowhere, Q = r: a promise where rewards are negative, so that the
    policy itself goes there.

    Raises:
        OptionError: an option out of range.
        DiscountError: stationary, and the discount is 1.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> learner = SoftQLearner(pirl.simulators.TabularSimulator(mdp))
        >>> learner.update(torch.zeros(1, 2).double(), num_rollouts=10).values
        tensor([[0.],
                [0.],
                [0.]], dtype=torch.float64)
    """

    def __init__(
        self,
        simulator: FiniteSimulator,
        *,
        replay: bool = True,
        explore: float = 0.1,
        stationary: bool = False,
        reading: Reading = "causal",
    ) -> None:
        require_finite_simulator(simulator)
        check_numbers(0.0, 1.0, explore=explore)
        if stationary and not replay:
            raise OptionError("stationary=True sweeps what it keeps: use replay=True, or a finite horizon")
        if stationary and not simulator.discount < 1:
            raise DiscountError(f"a stationary policy needs a discount below 1, not {simulator.discount:g}")
        if reading not in ("causal", "trajectory"):
            raise OptionError(f"reading must be 'causal' or 'trajectory', not {reading!r}")
        if reading == "trajectory" and (stationary or not replay):
            raise OptionError("reading='trajectory' has a finite horizon, and sweeps what it keeps: use replay=True")
        if reading == "trajectory" and simulator.discount != 1:
            raise DiscountError(
                f"the trajectory reading has no discount, and the simulator's is {simulator.discount:g}"
            )
        self.simulator, self.replay, self.explore, self.stationary = simulator, replay, explore, stationary
        self.reading: Reading = reading
        log_prior = self._log_prior = _with_no_op(simulator.log_prior, simulator.terminal)
        self._counts = _Counts.none(log_prior)
        self._base = torch.log_softmax(log_prior, -1)
        # Online: F_k for k = 1..T, visits since the reward changed, and that reward.
        self._following = log_prior.new_zeros(simulator.horizon, *log_prior.shape)
        self._visits = torch.zeros_like(log_prior)
        self._ever = torch.zeros_like(log_prior)
        self._reward: Tensor | None = None
        self._history: tuple[Round, ...] = ()
        self._policy: SoftPolicy | None = None

    @property
    def policy(self) -> SoftPolicy:
        """The policy of the last update.

        Raises:
            OptionError: there was none.
        """
        if self._policy is None:
            raise OptionError("nothing was learned yet: call update(reward, num_rollouts) first")
        return self._policy

    @property
    def visits(self) -> Float[Tensor, "S A"]:
        """How often each pair was ever tried."""
        return self._ever.clone()

    def update(self, reward: Tensor, num_rollouts: int, generator: Generator = None) -> SoftPolicy:
        """Roll out the present policy under this reward, mixed with the base measure, and learn from it.

        Args:
            reward: ``[S, A]`` or ``[S, 1]``.
            num_rollouts: 0 learns from what was kept alone.

        Raises:
            InvalidRewardError: wrong shape, NaN or infinite.
            SimulatorError: the simulator failed; the learner is as before.
        """
        reward = self._checked(reward)
        if reward.dim() != 2:
            raise InvalidRewardError(f"update takes one reward, not {tuple(reward.shape)}: solve() takes a batch")
        check_counts(0, num_rollouts=num_rollouts)
        changed = self._reward is None or not torch.equal(self._reward, reward)
        visits = torch.zeros_like(self._visits) if changed else self._visits  # old means are of another reward's values
        counts, following, ever = self._counts, self._following, self._ever
        log_policy, before = self._solved(reward, counts, following)
        after, steps = before, 0
        if num_rollouts:
            rollouts = roll_out(self.simulator, self._behaviour(log_policy), num_rollouts, generator)
            batch = _Counts.of(rollouts, self._base)
            steps, ever = int(batch.number.sum()), ever + batch.visits
            if self.replay:
                counts = counts.plus(batch)
            else:
                following = self._moved(reward, following, visits, batch)
            visits = visits + batch.visits
            log_policy, after = self._solved(reward, counts, following)
        self._counts, self._following, self._visits, self._ever = counts, following, visits, ever
        self._reward = reward.clone()
        change = float((after - before).abs().max())
        self._history = (*self._history, Round(num_rollouts, steps, int((ever > 0).sum()), change))
        # By decisions to go 0..T; by time, it is the other way around, and nothing is left at the end.
        values = after if self.stationary else after.flip(-2)[:-1]
        self._policy = SoftPolicy(log_policy, values, self._history)
        return self._policy

    @torch.no_grad()
    def solve(self, reward: Tensor) -> Tensor:
        """log pi ``[*batch, T, S, A]`` for other rewards ``[*batch, S, A]``, from the transitions that were kept.

        Raises:
            OptionError: nothing is kept online.
        """
        if not self.replay:
            raise OptionError("an online learner keeps no transitions: use SoftQLearner(..., replay=True)")
        return self._solved(self._checked(reward), self._counts, self._following)[0]

    def _checked(self, reward: Tensor) -> Tensor:
        states, actions = self._base.shape
        if not isinstance(reward, Tensor):
            raise InvalidRewardError(f"the reward is {form(reward)}; expected a tensor [{states}, {actions}]")
        if reward.dim() < 2 or reward.shape[-2] != states or reward.shape[-1] not in (1, actions):
            raise InvalidRewardError(
                f"reward has shape {tuple(reward.shape)}; expected [{states}, {actions}] for r(s,a), or [{states}, 1]"
            )
        if reward.dtype != self._base.dtype or reward.device != self._base.device:
            raise InvalidRewardError(
                f"reward is {reward.dtype} on {reward.device}, the simulator's tables {self._base.dtype} on "
                f"{self._base.device}: convert one"
            )
        require_finite_reward(reward)
        return reward.detach().expand(*reward.shape[:-1], actions)

    def _behaviour(self, log_policy: Tensor) -> TabularPolicy:
        if not bool(self._ever.any()):
            return TabularPolicy(self._base)
        share = torch.tensor([1 - self.explore, self.explore], dtype=log_policy.dtype, device=log_policy.device).log()
        return TabularPolicy(torch.logaddexp(share[0] + log_policy, share[1] + self._base.expand_as(log_policy)))

    @torch.no_grad()
    def _solved(self, reward: Tensor, counts: _Counts, following: Tensor) -> tuple[Tensor, Tensor]:
        """log pi by time, and V by decisions to go ``[*batch, T + 1, S]`` (or both stationary)."""
        if not self.replay:
            action = self._log_prior + reward + self.simulator.discount * following
            now = action.logsumexp(-1)
            return (action - now.unsqueeze(-1)).flip(-3), torch.cat([torch.zeros_like(now[:1]), now])
        horizon = None if self.stationary else self.simulator.horizon
        problem = counts.problem(self._log_prior, self.simulator.discount, horizon, self.reading)
        values = soft_values(reward, problem)
        require_finite(reward, values, problem)
        log_policy = log_policy_to_go(reward, values, problem)
        return (log_policy if self.stationary else log_policy.flip(-3)), values

    @torch.no_grad()
    def _moved(self, reward: Tensor, following: Tensor, visits: Tensor, batch: _Counts) -> Tensor:
        """F after a batch: the n-th visit of a pair moves F_k by (k + 1) / (k + n) towards what it saw."""
        mean = batch.means
        n, m = visits, batch.visits
        value, moved = torch.zeros_like(reward[:, 0]), []
        for k, old in enumerate(following, start=1):
            # Weight left to the old mean: prod_{i=n+1}^{n+m} (i - 1) / (k + i); 0 for a first visit.
            kept = (n + m).lgamma() - n.lgamma() + (n + k + 1).lgamma() - (n + m + k + 1).lgamma()
            kept = torch.where(n > 0, kept.exp(), 0.0)
            target = mean.expect(value.unsqueeze(-1)).reshape(old.shape)
            moved.append(torch.where(m > 0, kept * old + (1 - kept) * target, old))
            value = (self._log_prior + reward + self.simulator.discount * moved[-1]).logsumexp(-1)
        return torch.stack(moved)


def soft_q_learning(
    simulator: FiniteSimulator,
    reward: Tensor,
    num_rollouts: int,
    num_rounds: int = 10,
    *,
    generator: Generator = None,
    **options: Any,
) -> SoftPolicy:
    """The MaxEnt-RL policy of a reward, from a simulator alone; converges to ``pirl.soft_policy(mdp, reward)``.

    Args:
        reward: ``[S, A]`` or ``[S, 1]``.
        num_rollouts: roll-outs a round; those of the first follow the base measure, later ones the policy so far.
        num_rounds: how often the policy is renewed.
        options: of :class:`SoftQLearner`.

    Raises:
        OptionError: unknown, or out of range.
        InvalidRewardError, SimulatorError: see :meth:`SoftQLearner.update`.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> simulator = pirl.simulators.TabularSimulator(mdp)
        >>> soft_q_learning(simulator, torch.tensor([[0.0, 1.0]]).double(), 10).log_policy[0].exp()
        tensor([[0.2689, 0.7311]], dtype=torch.float64)
    """
    check_counts(1, num_rollouts=num_rollouts, num_rounds=num_rounds)
    known = inspect.signature(SoftQLearner).parameters.keys() - {"simulator"}
    for name in options.keys() - known:
        raise OptionError(f"soft_q_learning has no option {name!r}; it has {', '.join(sorted(known))}")
    learner = SoftQLearner(simulator, **options)
    for _ in range(num_rounds):
        learner.update(reward, num_rollouts, generator)
    return learner.policy


class _Counts(NamedTuple):
    """How often each transition was seen: (s, a, s') as one number, increasing, and the number of times."""

    key: Int[Tensor, " n"]
    number: Int[Tensor, " n"]
    visits: Float[Tensor, "S A"]

    @staticmethod
    def none(log_prior: Tensor) -> _Counts:
        nothing = torch.zeros(0, dtype=torch.long, device=log_prior.device)
        return _Counts(nothing, nothing, torch.zeros_like(log_prior))

    @staticmethod
    def of(rollouts: Rollouts, like: Tensor) -> _Counts:
        states, actions = like.shape
        acting = rollouts.actions >= 0
        pair = rollouts.states[:, :-1][acting] * actions + rollouts.actions[acting]
        key, number = torch.unique(pair * states + rollouts.states[:, 1:][acting], return_counts=True)
        visits = torch.bincount(pair, minlength=states * actions).to(like.dtype).reshape(like.shape)
        return _Counts(key, number, visits)

    def plus(self, other: _Counts) -> _Counts:
        key, place = torch.unique(torch.cat([self.key, other.key]), return_inverse=True)
        number = torch.zeros_like(key).index_add(0, place, torch.cat([self.number, other.number]))
        return _Counts(key, number, self.visits + other.visits)

    @property
    def means(self) -> TransitionMap:
        """Relative frequencies of s' after (s, a); nothing after a pair that was not tried."""
        states = self.visits.shape[0]
        row, column = torch.div(self.key, states, rounding_mode="floor"), self.key % states
        value = self.number.to(self.visits.dtype) / self.visits.reshape(-1)[row]
        return TransitionMap(row, column, value, (self.visits.numel(), states))

    def problem(self, log_prior: Tensor, discount: float, horizon: int | None, reading: Reading) -> SoftProblem:
        """The decision problem of these relative frequencies, discounted."""
        mean = self.means
        scaled = TransitionMap(mean.row, mean.column, mean.value * discount, mean.shape)
        ended = (self.visits == 0).to(log_prior.dtype)
        return SoftProblem(scaled, log_prior, reading, ended, stop=0.0, horizon=horizon)
