"""Finite spaces: policies and base measures that are tables, and a decision problem that can only be sampled."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import (
    HorizonError,
    InvalidPolicyError,
    OptionError,
    UnavailableActionError,
    check_generator,
    form,
    is_count,
)
from pirl.mdp import TabularMDP
from pirl.simulators.protocols import Generator


class TabularPolicy:
    """A table of log pi(a|s) ``[S, A]``, or by time ``[T, S, A]``, as a :class:`Policy`.

    Raises:
        InvalidPolicyError: wrong shape, or a row that is not a distribution.

    Example:
        >>> policy = TabularPolicy(pirl.soft_policy(world, wanted))
        >>> policy.sample(torch.zeros(3).long(), step=0).shape
        torch.Size([3])
    """

    def __init__(self, log_policy: Tensor) -> None:
        if not isinstance(log_policy, Tensor) or log_policy.dim() not in (2, 3) or not log_policy.is_floating_point():
            raise InvalidPolicyError(
                f"log_policy is {form(log_policy)}; expected a floating tensor, log pi [S, A] or [T, S, A]"
            )
        log_policy = log_policy.detach()
        weight = log_policy.exp().cumsum(-1)
        wrong = ~((weight[..., -1] - 1).abs() <= 10 * torch.finfo(weight.dtype).eps ** 0.5)  # NaN is wrong too
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise InvalidPolicyError(
                f"log_policy{place} has probabilities that sum to {float(weight[..., -1][wrong][0]):.9g}, not 1"
            )
        self.log_policy, self._cumulative = log_policy, weight

    def __repr__(self) -> str:
        *steps, states, actions = self.log_policy.shape
        by_time = f", {steps[0]} steps" if steps else ""
        return f"{type(self).__name__}({states} states, {actions} actions{by_time})"

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions ``[n]``, never one of probability 0."""
        check_generator(generator)
        weight = self._at(self._cumulative, step)[states]
        total = weight[:, -1:]
        uniform = torch.rand(total.shape, generator=generator, dtype=weight.dtype, device=weight.device)
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(weight, target, right=True).squeeze(-1)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log pi(a|s)."""
        return self._at(self.log_policy, step)[states, actions]

    def _at(self, table: Tensor, step: int) -> Tensor:
        if table.dim() == 2:
            return table
        if step >= len(table):
            raise HorizonError(f"the policy has {len(table)} steps, but step {step} was asked for (they count from 0)")
        return table[step]


def base_policy(mdp: TabularMDP | TabularSimulator) -> TabularPolicy:
    """Actions from the base measure p(a|s), normalised: uniform for "uniform" and for "counting".

    A counting measure weighs trajectories by more than this policy's density: see :func:`log_base_measure`.

    Example:
        >>> base_policy(world).log_prob(torch.tensor([0]), torch.tensor([4]), step=0).exp()
        tensor([0.2000], dtype=torch.float64)
    """
    if not isinstance(getattr(mdp, "log_prior", None), Tensor):
        raise OptionError(f"mdp is {form(mdp)}, which has no table log_prior: give a TabularMDP")
    return TabularPolicy(torch.log_softmax(mdp.log_prior, -1))


def cloned_policy(
    log_prior: Float[Tensor, "S A"], states: Int[Tensor, "num slots"], actions: Int[Tensor, "num T"]
) -> TabularPolicy:
    """Actions as often as they were demonstrated in each state, and the base measure as one decision more.

    Example:
        >>> from pirl.simulators.finite import cloned_policy
        >>> cloned = cloned_policy(torch.zeros(16, 5).double(), walks.states, walks.actions)
        >>> cloned.log_policy.exp().sum(-1).unique()
        tensor([1.], dtype=torch.float64)
    """
    acting = actions >= 0
    counts = torch.log_softmax(log_prior, -1).exp()
    place = states[:, : actions.shape[1]][acting], actions[acting]
    counts = counts.index_put(place, torch.ones_like(place[0], dtype=counts.dtype), accumulate=True)
    return TabularPolicy((counts / counts.sum(-1, keepdim=True)).log())


def log_base_measure(
    mdp: TabularMDP | TabularSimulator, states: Int[Tensor, "num slots"], actions: Int[Tensor, "num T"]
) -> Float[Tensor, " num"]:
    """sum_t log p(a_t|s_t) of the base measure over the decisions, as given: 0 for the counting measure.

    log weights of the trajectory reading are ``rollouts.returns(reward) + log_base_measure(...) - log q``.

    Example:
        >>> log_base_measure(world, walks.states[:2], walks.actions[:2])  # 8 log 1/5
        tensor([-12.8755, -12.8755], dtype=torch.float64)
    """
    acting = actions >= 0
    chosen = mdp.log_prior[states[:, : actions.shape[1]].clamp_min(0), actions.clamp_min(0)]
    return torch.where(acting, chosen, 0.0).sum(1)


class BaseMeasure:
    """A base measure over actions that need not be normalised, such as the counting measure.

    Roll-outs that follow it are drawn from its normalised form, ``policy``; as the base of a
    :class:`pirl.Pool` it weighs trajectories by what it is.

    Example:
        >>> counting = BaseMeasure(torch.zeros(16, 5).double())
        >>> counting.log_prob(torch.tensor([0]), torch.tensor([4]), step=0)
        tensor([0.], dtype=torch.float64)
    """

    def __init__(self, log_prior: Float[Tensor, "S A"]) -> None:
        if not isinstance(log_prior, Tensor) or log_prior.dim() != 2 or not log_prior.is_floating_point():
            raise InvalidPolicyError(f"log_prior is {form(log_prior)}; expected a floating tensor, log p(a|s) [S, A]")
        self.log_prior, self.policy = log_prior, TabularPolicy(torch.log_softmax(log_prior, -1))

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions ``[n]``."""
        return self.policy.sample(states, step, generator)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log p(a|s), as given."""
        return self.log_prior[states, actions]


class TabularSimulator:
    """A :class:`pirl.TabularMDP` that can only be sampled, and counts how often.

    Args:
        mdp: the decision problem.
        horizon: decisions of a roll-out; the MDP's by default.

    Raises:
        HorizonError: neither has a horizon.

    Attributes:
        steps_taken: environment steps so far; neither a reset nor a terminal state's no-op is one.
        log_prior: log p(a|s) ``[S, A]``, known to whoever acts, as are ``available``, ``terminal`` and ``discount``.

    Example:
        >>> simulator = TabularSimulator(pirl.TabularMDP(torch.eye(2).reshape(2, 1, 2).double(), initial=0, horizon=3))
        >>> simulator.step(simulator.reset(4), torch.zeros(4).long())
        tensor([0, 0, 0, 0])
    """

    def __init__(self, mdp: TabularMDP, horizon: int | None = None) -> None:
        if not isinstance(mdp, TabularMDP):
            raise OptionError(f"mdp is {form(mdp)}: make a pirl.TabularMDP of it first")
        horizon = mdp.horizon if horizon is None else horizon
        if horizon is None:
            raise HorizonError("the MDP has no horizon: say how long a roll-out is, TabularSimulator(mdp, horizon=...)")
        if not is_count(horizon):
            raise HorizonError(f"horizon is {horizon!r}; a roll-out has a whole number of decisions, at least 1")
        self.horizon, self.discount = horizon, mdp.discount
        self.log_prior, self.terminal, self.available = mdp.log_prior, mdp.terminal, mdp.available & mdp.acts
        self.steps_taken = 0
        self._base, self._start = base_policy(mdp), mdp.initial.double().cumsum(0)
        table = mdp.transitions
        self._following, self._last = table.column, table.row_count.cumsum(0) - 1
        # Row number plus the cumulative probability within the row increases over all entries: one search finds the
        # next states of any number of rows. Its rounding is that of the row number, 1e-16 of it.
        value = table.value.double()
        before = torch.cat([value.new_zeros(1), value.cumsum(0)])
        self._before = before[self._last + 1 - table.row_count]
        self._total = before[self._last + 1] - self._before
        self._key = table.row + (before[1:] - self._before[table.row]) / self._total[table.row]

    def reset(self, num: int, generator: Generator = None) -> Int[Tensor, " num"]:
        """First states from p(s_1)."""
        target = self._uniform(num, generator) * self._start[-1]
        # Never beyond the last state of positive probability, whatever is rounded.
        return torch.searchsorted(self._start, target, right=True).clamp_max(int((self._start < self._start[-1]).sum()))

    def step(
        self, states: Int[Tensor, " n"], actions: Int[Tensor, " n"], generator: Generator = None
    ) -> Int[Tensor, " n"]:
        """Next states from P(s'|s,a).

        Raises:
            UnavailableActionError: an action that is not available, or any in a terminal state.
        """
        refused = ~self.available[states, actions]
        if bool(refused.any()):
            state, action = int(states[refused][0]), int(actions[refused][0])
            raise UnavailableActionError(f"action {action} is not available in state {state}")
        row = states * self.log_prior.shape[1] + actions
        entry = torch.searchsorted(self._key, row + self._uniform(len(row), generator), right=True)
        self.steps_taken += len(row)
        return self._following[torch.minimum(entry, self._last[row])]

    def is_terminal(self, states: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Where episodes end."""
        return self.terminal[states]

    def sample_actions(self, states: Int[Tensor, " n"], generator: Generator = None) -> Int[Tensor, " n"]:
        """Actions from the base measure."""
        return self._base.sample(states, 0, generator)

    def _uniform(self, num: int, generator: Generator) -> Tensor:
        check_generator(generator)
        return torch.rand(num, generator=generator, dtype=torch.float64, device=self._start.device)
