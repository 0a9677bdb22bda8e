"""The lecture's messages, beta_t(s,a), beta_t(s), alpha_t(s), mu_t(s,a), log Z, and policies and occupancies.

All in log space (unnormalised messages underflow at T = 1000 even in float64), batched over leading dimensions of the
reward, and differentiable in it. Trajectory reading, with p(a|s) the base measure (Levine 2018, section 2.3; Ziebart
2008, section 3):

    beta_t(s,a) = exp r(s,a) sum_s' P(s'|s,a) beta_{t+1}(s'),    beta_t(s) = sum_a p(a|s) beta_t(s,a),    beta_{T+1} = 1
    alpha_1 = p(s_1),    alpha_{t+1}(s') = sum_{s,a} alpha_t(s) p(a|s) exp r(s,a) P(s'|s,a)
    Z = sum_s p(s_1) beta_1(s_1),    mu_t(s,a) = alpha_t(s) p(a|s) beta_t(s,a) / Z

Causal reading (Ziebart 2010, eqs. 9.1 to 9.3): beta_t(s,a) is exp(r + g E V) and mu_t the discounted visits of the
soft policy under the true dynamics; log Z and alpha are not defined there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import ConvergenceError, DiscountError, DivergenceError, HorizonError, InvalidRewardError, OptionError
from pirl.soft_values import (
    Reading,
    SoftProblem,
    Solver,
    backup,
    chain_first,
    chain_last,
    entry_weights,
    occupancy_step,
    soft_adjoint,
    soft_values,
)
from pirl.transitions import Dynamics, TransitionMap, is_transformed, solve_system

# What other rooms use besides is written for them.
__all__ = ["Messages", "log_partition", "messages", "occupancy", "soft_policy"]


class Messages(NamedTuple):
    """Log messages, by time t = 1..T (index 0..T-1); without the time dimension when the horizon is infinite.

    For an infinite horizon ``log_alpha`` and ``mu`` are sums over time: expected visits.

    Example:
        >>> found = pirl.messages(world, wanted)
        >>> found.log_beta.shape, found.mu.shape, found.log_partition.shape
        (torch.Size([9, 16]), torch.Size([8, 16, 5]), torch.Size([]))
    """

    log_beta_action: Float[Tensor, "*batch T S A"]
    """log beta_t(s, a)."""
    log_beta: Float[Tensor, "*batch T1 S"]
    """log beta_t(s), one step more than the others: beta_{T+1} = 1."""
    log_alpha: Float[Tensor, "*batch T S"] | None
    """log alpha_t(s), or None for the causal reading."""
    mu: Float[Tensor, "*batch T S A"]
    """mu_t(s, a): probability of the pair at time t given optimality (trajectory), discounted visits (causal)."""
    log_partition: Float[Tensor, "*batch"] | None
    """log Z, or None for the causal reading."""


def soft_problem(
    mdp: Dynamics, reading: Reading, *, stopping: str | None = None, horizon: int | None = None
) -> SoftProblem:
    """The problem that the recursions solve, memoised on the MDP.

    Args:
        reading: "causal" or "trajectory".
        stopping: "geometric" makes an episode of the trajectory reading stop with probability 1 - g after each step.
        horizon: replaces the MDP's horizon.

    Raises:
        DiscountError: trajectory reading, discount below 1 and no stopping: exp(sum_t g^t r) is not what the
            graphical model says.
    """
    horizon = mdp.horizon if horizon is None else horizon
    key = ("problem", reading, stopping, horizon)
    if key in mdp.memo:
        return mdp.memo[key]
    if reading not in ("causal", "trajectory"):
        raise OptionError(f"reading must be 'causal' or 'trajectory', not {reading!r}")
    if stopping not in (None, "geometric"):
        raise OptionError(f"stopping must be None or 'geometric', not {stopping!r}")
    if stopping is not None and reading == "causal":
        raise OptionError("stopping='geometric' belongs to the trajectory reading; the causal reading has a discount")
    if reading == "trajectory" and mdp.discount < 1 and stopping is None:
        raise DiscountError(
            f"the trajectory reading has no discount, and the MDP's is {mdp.discount:g}: use "
            "reading='causal', discount=1 with a horizon, or stopping='geometric' (stop with probability 1 - discount "
            "after each step)"
        )
    if stopping is not None and mdp.discount == 0:
        raise DiscountError(
            "stopping='geometric' with discount 0 stops after one decision: use horizon=1 and discount=1"
        )
    whole = mdp.transitions
    scaled = TransitionMap(whole.row, whole.column, whole.value * mdp.discount, whole.shape)
    mdp.memo[key] = problem = SoftProblem(
        transitions=whole if mdp.discount == 1 else scaled,
        log_prior=mdp.log_prior,
        reading=reading,
        ended=(~mdp.acts).to(mdp.initial.dtype),
        stop=1 - mdp.discount if stopping == "geometric" else 0.0,
        horizon=horizon,
    )
    return problem


def checked_values(mdp: Dynamics, reward: Tensor, problem: SoftProblem, solver: Solver = "auto") -> Tensor:
    """:func:`pirl.soft_values.soft_values`, raising where a row is not finite (see :func:`is_checked`).

    Raises:
        InvalidRewardError: the reward is NaN or infinite somewhere that matters.
        DivergenceError: the undiscounted sum over paths is infinite.
        ConvergenceError: the fixed point was not reached to rounding error.
    """
    reward = mdp.check_reward(reward)
    values = soft_values(reward, problem, solver)
    if is_checked(values):
        require_finite_reward(reward)
        require_finite(reward, values, problem)
    return values


def is_checked(x: Tensor) -> bool:
    """Whether to look at values and raise: not under a torch.func transform, nor while validation is off.

    Engines switch torch's validation off inside their loops, where one bad proposal must not end the run.
    """
    return torch.distributions.Distribution._validate_args and not is_transformed(x)


def require_finite(reward: Tensor, values: Tensor, problem: SoftProblem) -> None:
    """Raise by name what made values non-finite (see :func:`checked_values`)."""
    if bool(values.isfinite().all()):
        return
    require_finite_reward(reward)
    if problem.horizon is not None:
        raise InvalidRewardError(
            f"values overflow at horizon {problem.horizon}: rewards are too large for {values.dtype}"
        )
    if problem.transitions.value.numel() and problem.reading == "trajectory":
        raise DivergenceError(
            "the partition function is infinite: rewards are so large that longer paths weigh more; lower them "
            "(r <= 0 with a normalised action prior always converges), or give a horizon"
        )
    raise ConvergenceError(
        "soft values were not reached to rounding error: "
        "with discount 1 the undiscounted sum may diverge; lower the rewards or the discount, or give a horizon"
    )


def require_finite_reward(reward: Tensor) -> None:
    """Raise :class:`InvalidRewardError`, naming the pair, where a reward is NaN or infinite."""
    bad = ~reward.isfinite()
    if bool(bad.any()):
        *_, state, action = bad.nonzero()[0].tolist()
        raise InvalidRewardError(
            f"reward of state {state}, action {action} is NaN or infinite (to forbid an action use available=)"
        )


def log_partition(mdp: Dynamics, reward: Tensor, *, stopping: str | None = None) -> Float[Tensor, "*batch"]:
    """log Z = log E_p(tau)[exp sum_t r], trajectory reading; ``[*batch]``. Its gradient in r is ``sum_t mu_t``.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> float(log_partition(mdp, torch.zeros(1, 2).double()))
        0.0
    """
    problem = soft_problem(mdp, "trajectory", stopping=stopping)
    values = checked_values(mdp, reward, problem)
    return torch.logsumexp(mdp.initial.log() + _first(values, problem), -1)


def action_values(reward: Float[Tensor, "*batch S A"], values: Tensor, problem: SoftProblem) -> Tensor:
    """Q - log p(a|s) = log beta(s,a): ``[*batch, K, S, A]`` for 1..K decisions to go, or ``[*batch, S, A]``."""
    if problem.horizon is not None:
        reward, values = reward.unsqueeze(-3), values[..., :-1, :]
    batch = values.shape[:-1]
    flat = values.reshape(-1, values.shape[-1]).t()
    zero = torch.zeros_like(problem.log_prior).unsqueeze(-1)
    following = backup(zero, flat, problem)
    return reward + following.movedim(-1, 0).reshape(*batch, *problem.log_prior.shape)


def messages(
    mdp: Dynamics, reward: Tensor, reading: Reading = "trajectory", *, stopping: str | None = None
) -> Messages:
    """Every message of the module's docstring at once.

    Args:
        reward: r(s) ``[S]``, ``[*batch, S, 1]`` or r(s,a) ``[*batch, S, A]``.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> messages(mdp, torch.zeros(1, 2).double()).mu.sum((-1, -2))
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    reward = mdp.check_reward(reward)
    problem = soft_problem(mdp, reading, stopping=stopping)
    values = checked_values(mdp, reward, problem)
    log_beta_action = action_values(reward, values, problem)
    mu = _occupancy(mdp, reward, values, problem)
    if problem.horizon is not None:
        values, log_beta_action = values.flip(-2), log_beta_action.flip(-3)
    if reading == "causal":
        return Messages(log_beta_action, values, None, mu, None)
    first = values if problem.horizon is None else values[..., 0, :]
    log_z = torch.logsumexp(mdp.initial.log() + first, -1)
    return Messages(log_beta_action, values, _log_alpha(mdp, reward, values, problem), mu, log_z)


def soft_policy(mdp: Dynamics, reward: Tensor, reading: Reading = "causal", *, stopping: str | None = None) -> Tensor:
    """log pi_t(a|s) of the soft-optimal demonstrator: ``[*batch, T, S, A]`` by time, or ``[*batch, S, A]`` (infinite
    horizon).

    Example:
        >>> pirl.soft_policy(mdp, truth).shape, pirl.soft_policy(world, wanted).shape
        (torch.Size([25, 5]), torch.Size([8, 16, 5]))
    """
    reward = mdp.check_reward(reward)
    problem = soft_problem(mdp, reading, stopping=stopping)
    values = checked_values(mdp, reward, problem)
    log_policy = log_policy_to_go(reward, values, problem)
    return log_policy if problem.horizon is None else log_policy.flip(-3)


def log_policy_to_go(reward: Float[Tensor, "*batch S A"], values: Tensor, problem: SoftProblem) -> Tensor:
    """log pi_k(a|s) = Q - V: ``[*batch, K, S, A]`` by decisions to go (1..K), or ``[*batch, S, A]``."""
    now = values if problem.horizon is None else values[..., 1:, :]
    return problem.log_prior + action_values(reward, values, problem) - now.unsqueeze(-1)


def occupancy(
    mdp: Dynamics,
    reward: Tensor,
    reading: Reading = "causal",
    *,
    stopping: str | None = None,
    per_step: bool = False,
) -> Tensor:
    """Expected (discounted) visits ``[*batch, S, A]`` of the soft-optimal demonstrator, or mu_t ``[*batch, T, S, A]``.

    Causal reading: visits of the soft policy under the true dynamics, discounted, the gradient of E_p(s_1)[V(s_1)]
    (Ziebart 2010, algorithm 9.3). Trajectory reading: the gradient of log Z. The no-op of a terminal state is
    counted once, on entry.

    Example:
        >>> pirl.occupancy(mdp, truth).sum().round(decimals=4)  # 1 / (1 - discount)
        tensor(20., dtype=torch.float64)
        >>> pirl.occupancy(world, wanted, "trajectory").sum().round(decimals=4)
        tensor(8., dtype=torch.float64)
    """
    reward = mdp.check_reward(reward)
    problem = soft_problem(mdp, reading, stopping=stopping)
    values = checked_values(mdp, reward, problem)
    if problem.horizon is None and per_step:
        raise HorizonError("per_step=True needs a finite horizon")
    mu = _occupancy(mdp, reward, values, problem)
    return mu if per_step or problem.horizon is None else mu.sum(-3)


def _occupancy(mdp: Dynamics, reward: Float[Tensor, "*batch S A"], values: Tensor, problem: SoftProblem) -> Tensor:
    """mu_t by time ``[*batch, T, S, A]``, or summed over an infinite horizon ``[*batch, S, A]``."""
    first = _first(values, problem)
    tilted = problem.reading == "trajectory"
    start = torch.softmax(mdp.initial.log() + first, -1) if tilted else mdp.initial.expand_as(first)
    if problem.horizon is None:
        return soft_adjoint(reward, values, start, problem)
    base = chain_last(reward, 2) + problem.log_prior.unsqueeze(-1)
    now, weight = chain_last(values, 2), chain_last(start, 1)
    steps = []
    for k in range(problem.horizon, 0, -1):
        visits, weight = occupancy_step(base, now[k], now[k - 1], weight, problem)
        steps.append(visits)
    return chain_first(torch.stack(steps), reward.shape[:-2])


def _first(values: Tensor, problem: SoftProblem) -> Float[Tensor, "*batch S"]:
    return values if problem.horizon is None else values[..., problem.horizon, :]


def _log_alpha(mdp: Dynamics, reward: Tensor, values: Tensor, problem: SoftProblem) -> Tensor:
    """Forward recursion, independent of mu (so that alpha p(a|s) beta / Z = mu is a check, not a definition)."""
    transitions = problem.transitions
    batch = reward.shape[:-2]
    log_step = chain_last(reward + problem.log_prior, 2).flatten(0, 1)[
        transitions.row
    ] + transitions.value.log().unsqueeze(-1)
    log_alpha = mdp.initial.log().unsqueeze(-1).expand(-1, log_step.shape[-1])
    if problem.horizon is None:
        # alpha = p(s_1) + M^T alpha, solved for alpha * beta, whose system is the tilted Markov chain's
        base, now = chain_last(reward, 2) + problem.log_prior.unsqueeze(-1), chain_last(values, 1)
        policy = (backup(base, now, problem) - now.unsqueeze(1)).exp()
        weight = policy.flatten(0, 1)[transitions.row] * entry_weights(now, problem)
        first = log_alpha + now
        top = first.amax(0)
        product = solve_system(transitions, weight, (first - top).exp(), transpose=True)
        return chain_first(product.log() + top - now, batch)
    steps = [log_alpha]
    for _ in range(problem.horizon - 1):
        entry = steps[-1][transitions.state] + log_step
        index = transitions.column.unsqueeze(-1).expand_as(entry)
        top = torch.full_like(log_alpha, -torch.inf).scatter_reduce(0, index, entry.detach(), "amax")
        shift = torch.where(top.isfinite(), top, 0.0)
        total = torch.zeros_like(log_alpha).scatter_add(0, index, (entry - shift[transitions.column]).exp())
        steps.append(total.log() + shift)
    return chain_first(torch.stack(steps), batch)
