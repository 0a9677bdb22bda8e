"""Distributions over trajectories, to be observed (or simulated) by a Pyro model.

Batch shape ``[*batch, N]``, event shape ``(T + 1, 2)``: the (state, action) of every step, a last state (s, -1), then
padding (-1, -1). Batch dimensions of the reward stand left of the plates, as in Pyro: ``[P, 1, S, A]`` against N
episodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pirl.errors import HorizonError, InvalidRewardError, InvalidTrajectoriesError
from pirl.mdp import TabularMDP
from pirl.message_passing import (
    action_values,
    log_policy_to_go,
    require_finite,
    require_finite_reward,
    soft_problem,
)
from pirl.soft_values import Reading, SoftProblem, log_expect, soft_values
from pirl.statistics import RowLayout, Statistics, known_horizon, memoised, statistics
from pirl.trajectories import validate
from pirl.transitions import is_transformed

_SAMPLED_AT_ONCE = 2**23


class TabularTrajectory(TorchDistribution):
    """What the two readings share; use :class:`MaxCausalEntTrajectory` or :class:`MaxEntTrajectory`.

    Example:
        >>> law = pirl.MaxCausalEntTrajectory(mdp, truth, lengths=demos.lengths)
        >>> law.batch_shape, law.event_shape
        (torch.Size([30]), torch.Size([16, 2]))
        >>> law.log_prob(demos.as_tensor()).shape, law.choice_log_prob(demos.as_tensor()).shape
        (torch.Size([30]), torch.Size([30]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.integer, 2)
    has_enumerate_support = False
    event_dim_names = ("step", "state_action")
    reading: ClassVar[Reading]

    def __init__(
        self,
        mdp: TabularMDP,
        reward: Tensor,
        *,
        lengths: Int[Tensor, "*batch"] | None = None,
        horizons: Int[Tensor, "*batch"] | None = None,
        starts: Int[Tensor, "*batch"] | None = None,
        stopping: str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.mdp, self.reward = mdp, mdp.check_reward(reward)
        self.lengths, self.horizons, self.starts, self.stopping = lengths, horizons, starts, stopping
        # Remembered, because a tracer cannot look at numbers, and a GPU must be waited for.
        horizon = memoised(mdp.memo, ("horizon",), (horizons,), lambda: known_horizon(horizons, mdp.horizon))
        self.problem: SoftProblem = soft_problem(mdp, self.reading, stopping=stopping, horizon=horizon)
        given = [x.shape for x in (lengths, horizons, starts) if x is not None]
        try:
            batch_shape = torch.broadcast_shapes(self.reward.shape[:-2], *given)
        except RuntimeError:
            raise InvalidRewardError(
                f"rewards of batch shape {tuple(self.reward.shape[:-2])} do not fit episodes {tuple(given[0])}: index "
                "them by the subject of each episode (reward[..., demos.subjects, :, :]), or end their batch with a 1"
            ) from None
        self._shared: dict[str, Tensor] = {}  # computed once, whatever expands this distribution
        slots = memoised(mdp.memo, ("longest", horizon), (lengths,), lambda: _longest(lengths, horizon))
        # Validation is not torch's (constraints of arguments and support): it names trajectory and step.
        super().__init__(batch_shape, torch.Size((1 if slots is None else slots + 1, 2)), validate_args=False)
        self.validating = torch.distributions.Distribution._validate_args if validate_args is None else validate_args
        if self.validating and not is_transformed(self.reward):
            require_finite_reward(self.reward)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TabularTrajectory:
        """The same distribution with a larger batch shape; nothing is copied or computed again."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.broadcast_shapes(torch.Size(batch_shape), self._batch_shape)
        return new

    # ------------------------------------------------------------------------------------------------ densities

    @property
    def values(self) -> Tensor:
        """Soft values by decisions to go, ``[*reward_batch, K + 1, S]``, or ``[*reward_batch, S]``.

        Computed once where nothing is differentiated; else anew, so that each use has a graph of its own.
        """
        if "values" in self._shared:
            return self._shared["values"]
        values = soft_values(self.reward, self.problem)
        if self.validating and not is_transformed(values):
            require_finite(self.reward, values, self.problem)
        if not self.reward.requires_grad:
            self._shared["values"] = values
        return values

    def log_prob(self, value: Tensor) -> Float[Tensor, "..."]:
        """Normalised log density of each trajectory, p(s_1), P(s'|s,a) and p(a|s) included.

        Over what ``sample`` can return it sums to 1. A trajectory that is shorter than ``lengths``, or lacks its last
        state, has the probability of all that could follow. A blank one has log-probability 0.

        Raises:
            InvalidTrajectoriesError, ImpossibleTransitionError, UnavailableActionError, HorizonError: with validation
            on (the default); otherwise the density is 0 where a step is impossible.
        """
        counts = self._statistics(value)
        layout = counts.layout
        values = self.values
        result = counts.const.unsqueeze(-1) + counts.visits.apply(layout.inputs(self.reward, 2))
        result = result + counts.values.apply(layout.inputs(values, self._value_dims))
        if self.reading == "trajectory":
            result = result + counts.partitions.apply(self._log_partitions(values, counts))
            for episode, term in self._open_ends(values, counts):
                result = result.index_add(0, episode, term)
        return layout.outputs(result).expand(self._full_batch(value))

    def log_prob_sum(self, value: Tensor) -> Float[Tensor, ""]:
        """``log_prob(value).sum()`` by sufficient statistics: two dot products, whatever the number of trajectories."""
        counts = self._statistics(value)
        layout = counts.layout
        reward, values = layout.inputs(self.reward, 2), self.values
        result = counts.const.sum() * reward.shape[1] + counts.total_visits.apply(reward).sum()
        result = result + counts.total_values.apply(layout.inputs(values, self._value_dims)).sum()
        if self.reading == "trajectory":
            result = result + (counts.total_partitions @ self._log_partitions(values, counts)).sum()
            result = result + sum(term.sum() for _, term in self._open_ends(values, counts))
        # A distribution that was expanded over a value that was not counts it as often.
        full = torch.broadcast_shapes(layout.reward_batch, layout.value_batch)
        return result * (self._full_batch(value).numel() / max(full.numel(), 1))

    def choice_log_prob(self, value: Tensor) -> Float[Tensor, "..."]:
        """Sum of log pi_t(a_t|s_t) over the steps of each trajectory: choices only, neither starts nor dynamics.

        This is what econometrics calls the partial likelihood of choices, and what held-out log-likelihood a decision
        uses.
        """
        counts = self._statistics(value)
        layout = counts.layout
        log_policy = log_policy_to_go(self.reward, self.values, self.problem)
        # Unavailable actions are never looked up (validation), but 0 * -inf would be NaN in the product.
        log_policy = log_policy.masked_fill(~self.problem.log_prior.isfinite(), 0.0)
        flat, pair = value.reshape(-1, *value.shape[-2:]), self.problem.log_prior.numel()
        acting = flat[..., 1] >= 0
        episode = torch.arange(len(flat), device=flat.device).unsqueeze(1).expand_as(acting)[acting]
        place = (flat[..., 0] * self.mdp.num_actions + flat[..., 1])[acting]
        size = pair
        if self.problem.horizon is not None:
            step = torch.arange(flat.shape[1], device=flat.device).expand_as(acting)[acting]
            place = place + (self._horizon_of(value)[episode] - step - 1) * pair
            size = pair * self.problem.horizon
        table = layout.inputs(log_policy, 2 if self.problem.horizon is None else 3)
        row = layout.row_of_episode(flat.device)[episode]
        chosen = table[row * size + place]
        result = chosen.new_zeros(len(flat), table.shape[1]).index_add(0, episode, chosen)
        return layout.outputs(result).expand(self._full_batch(value))

    @property
    def _value_dims(self) -> int:
        return 1 if self.problem.horizon is None else 2

    def _full_batch(self, value: Tensor) -> torch.Size:
        return torch.broadcast_shapes(self.batch_shape, value.shape[:-2])

    def _horizon_of(self, value: Tensor) -> Int[Tensor, " n"]:
        assert self.problem.horizon is not None
        limit = -1 if self.mdp.horizon is None else self.mdp.horizon
        own = torch.full((), -1, device=value.device) if self.horizons is None else self.horizons
        return torch.where(own < 0, limit, own).expand(value.shape[:-2]).reshape(-1)

    def _statistics(self, value: Tensor) -> Statistics:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] != 2:
            raise InvalidTrajectoriesError("trajectories are whole numbers [*batch, steps, 2]: use demos.as_tensor()")
        given = [x.shape for x in (self.horizons, self.starts) if x is not None]
        batch = torch.broadcast_shapes(value.shape[:-2], *given)
        layout = RowLayout(tuple(self.reward.shape[:-2]), tuple(batch))
        key = (
            self.reading,
            self.stopping,
            self.problem.horizon,
            layout.reward_batch,
            layout.value_batch,
            bool(self.validating),
        )

        def compute() -> Statistics:
            whole = value.expand(*batch, *value.shape[-2:])
            if self.validating:
                validate(whole, self.mdp, self.horizons, self.starts, self.lengths)
            return statistics(
                whole,
                self.problem,
                layout,
                log_start=self.mdp.initial.log() if self.starts is None else None,
                log_probability=lambda s, a, n: self.mdp.probability(s, a, n).log(),
                horizons=None if self.problem.horizon is None else self._horizon_of(whole),
            )

        return memoised(self.mdp.memo, key, (value, self.horizons, self.starts, self.lengths), compute)

    def _log_partitions(self, values: Tensor, counts: Statistics) -> Float[Tensor, "inputs C"]:
        values = values.unsqueeze(-2) if self.problem.horizon is None else values[..., counts.horizons, :]
        return counts.layout.inputs(torch.logsumexp(self.mdp.initial.log() + values, -1), 1)

    def _open_ends(
        self, values: Tensor, counts: Statistics
    ) -> Iterator[tuple[Int[Tensor, " m"], Float[Tensor, "m C"]]]:
        """(episodes, log of what could follow their last actions) of episodes without a last state."""
        for k, episode, pair in counts.open_ends:
            after = values if self.problem.horizon is None else values[..., k, :]
            following = log_expect(after.reshape(-1, after.shape[-1]).t(), self.problem).t()
            table = counts.layout.inputs(following.reshape(*after.shape[:-1], -1), 1)
            yield episode, table[pair]

    # ------------------------------------------------------------------------------------------------ simulation

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Int[Tensor, "*sample_batch slots 2"]:
        """Draw trajectories from the demonstrator's own law: start, actions, and next states (tilted, if luck obeys).

        Each goes on for its length (``lengths``, or its horizon), or until it ends in a terminal state, or stops.

        Raises:
            HorizonError: neither ``lengths`` nor a horizon says how long to go on.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        limits = self._limits(shape)
        device, count = self.reward.device, shape.numel()
        batch = self.reward.shape[:-2]
        rows = torch.arange(batch.numel(), device=device).reshape(batch).expand(shape).reshape(-1)
        reward = self.reward.reshape(-1, *self.reward.shape[-2:])
        values = self.values.reshape(-1, *self.values.shape[self.values.dim() - self._value_dims :])
        horizon = None if self.problem.horizon is None else self._horizon_of(limits.new_zeros(*shape, 1, 2))
        state = self._first_states(shape, rows, values, horizon)
        slots = max(int(limits.max()), 0) + 1 if count else 1
        result = torch.full((count, slots, 2), -1, device=device)
        alive = torch.ones(count, dtype=torch.bool, device=device)
        for t in range(slots):
            result[:, t, 0] = torch.where(alive, state, -1)
            alive = alive & ~self.mdp.terminal[state] & (t < limits)
            now = alive.nonzero().flatten()
            if not len(now):
                break
            to_go = None if horizon is None else horizon[now] - t
            action, following = self._step(rows[now], state[now], to_go, reward, values)
            result[now, t, 1] = action
            stopped = following < 0
            alive[now[stopped]] = False
            state = state.index_put((now,), torch.where(stopped, 0, following))
        return result.reshape(*shape, slots, 2)

    def _limits(self, shape: torch.Size) -> Int[Tensor, " n"]:
        limits = self.lengths
        if self.problem.horizon is not None:
            horizon = self._horizon_of(torch.zeros(*shape, 1, 2, device=self.reward.device)).reshape(shape)
            limits = horizon if limits is None else torch.minimum(limits.expand(shape), horizon)
        if limits is None:
            raise HorizonError("sampling needs lengths= (decisions of each trajectory): the problem has no horizon")
        return limits.expand(shape).reshape(-1)

    def _first_states(
        self, shape: torch.Size, rows: Tensor, values: Tensor, horizon: Tensor | None
    ) -> Int[Tensor, " n"]:
        if self.starts is not None:
            return self.starts.expand(shape).reshape(-1)
        if self.reading == "causal":
            return torch.multinomial(self.mdp.initial.expand(1, -1), len(rows), replacement=True)[0]
        first = values[rows] if horizon is None else values[rows, horizon]
        return _categorical(self.mdp.initial.log() + first)

    def _step(
        self, rows: Tensor, state: Tensor, to_go: Tensor | None, reward: Tensor, values: Tensor
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Action and next state (-1: stopped) of each; episodes with as many decisions to go share one backup."""
        if to_go is None:
            if "log_policy" not in self._shared:  # stationary: once for all steps
                self._shared["log_policy"] = log_policy_to_go(reward, values, self.problem)
            action = _categorical(self._shared["log_policy"][rows, state])
            return action, self._next_states(rows, state, action, values)
        action, following = torch.empty_like(state), torch.empty_like(state)
        for k in to_go.unique().tolist():
            here = (to_go == k).nonzero().flatten()
            # One step's problem: the values of k - 1 decisions to go are what follows.
            q = reward + action_values(torch.zeros_like(reward), values[:, [k - 1, k]], self.problem)[:, 0]
            action[here] = _categorical((self.problem.log_prior + q)[rows[here], state[here]])
            following[here] = self._next_states(rows[here], state[here], action[here], values[:, k - 1])
        return action, following

    def _next_states(
        self, rows: Tensor, state: Tensor, action: Tensor, values: Float[Tensor, "R S"]
    ) -> Int[Tensor, " n"]:
        transitions = self.mdp.transitions
        pair = state * self.mdp.num_actions + action
        result = torch.empty_like(state)
        block = max(1, _SAMPLED_AT_ONCE // max(1, int(transitions.row_count.max())))
        for start in range(0, len(state), block):
            cut = slice(start, start + block)
            position, entry = transitions.rows(pair[cut])
            log_weight = transitions.value[entry].log() + math.log1p(-self.problem.stop)
            if self.reading == "trajectory":  # the posterior controls chance: P(s'|s,a) exp V(s')
                log_weight = log_weight + values[rows[cut][position], transitions.column[entry]]
            width = int(transitions.row_count[pair[cut]].max())
            first = torch.searchsorted(position, torch.arange(len(pair[cut]), device=pair.device))
            table = log_weight.new_full((len(pair[cut]), width + 1), -torch.inf)
            offset = torch.arange(len(position), device=pair.device) - first[position]
            table[position, offset] = log_weight
            if self.problem.stop > 0:
                table[:, width] = math.log(self.problem.stop)
            drawn = _categorical(table)
            successor = transitions.column[entry[(first + drawn).clamp_max(len(entry) - 1)]]
            result[cut] = torch.where(drawn == width, -1, successor)
        return result


class MaxCausalEntTrajectory(TabularTrajectory):
    """Causal reading (Ziebart 2010): a demonstrator who chooses actions and not chance; the default of pirl's models.

    ``Q = r + log p(a|s) + g E_P[V(s')]``, ``V = logsumexp_a Q``, ``pi = exp(Q - V)``; the density of a trajectory is
    ``p(s_1) prod_t pi_t(a_t|s_t) P(s_{t+1}|s_t,a_t)`` (Ziebart 2010, eqs. 9.1 to 9.3, with a discount).

    Args:
        mdp: the decision problem, with any discount, horizon and terminal states.
        reward: r(s) ``[S]`` or ``[*batch, S, 1]``, or r(s,a) ``[*batch, S, A]``.
        lengths: number of decisions after which we stop watching ``[*batch, N]``; needed to sample when the horizon
            is infinite.
        horizons: horizon that each demonstrator knew, -1 where the MDP's counts (``demos.horizons``).
        starts: first states, when the experimenter set them; p(s_1) is then left out of the density.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> demos = pirl.Trajectories(states=[[0, 0, 0]], actions=[[0, 1, 1]])
        >>> pirl.MaxCausalEntTrajectory(mdp, torch.zeros(1, 2).double()).log_prob(demos.as_tensor()).exp()
        tensor([0.1250], dtype=torch.float64)
    """

    reading: ClassVar[Reading] = "causal"


class MaxEntTrajectory(TabularTrajectory):
    """Trajectory reading: the optimality-variable graphical model, literally, p(tau | O) = p(tau) exp(sum_t r) / Z.

    Conditioning on optimality also tilts chance: ``sample`` draws s_1 and s' from the tilted laws, as it must (Levine
    2018, section 2.4). An episode that was truncated contributes exp(sum r) beta(s_{L+1}) / Z. A reward r(s,a,s')
    does not reduce to its mean here.

    There is no discount: with a discount g below 1 give ``stopping="geometric"`` (the episode stops with probability
    1 - g after each step; an episode without a last state has stopped), which equals causal discounting not even for
    deterministic dynamics.

    Args:
        starts: condition on the first state: Z becomes Z(s_1).
        stopping: None or "geometric".
        mdp, reward, lengths, horizons: as for :class:`MaxCausalEntTrajectory`.

    Raises:
        DiscountError: discount below 1 without ``stopping``.
        DivergenceError: the sum over paths is infinite (no horizon, rewards too large).

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> pirl.MaxEntTrajectory(mdp, torch.zeros(1, 2).double()).sample((5,)).shape
        torch.Size([5, 4, 2])
    """

    reading: ClassVar[Reading] = "trajectory"


def _longest(lengths: Tensor | None, horizon: int | None) -> int | None:
    if lengths is None or lengths.numel() == 0:
        return horizon
    longest = int(lengths.max())
    return longest if horizon is None else min(longest, horizon)


def _categorical(logits: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """One draw a row, by the inverse of the cumulative sum: never an outcome of probability 0."""
    weight = torch.softmax(logits, -1).cumsum(-1)
    total = weight[:, -1:]
    target = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(weight, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
