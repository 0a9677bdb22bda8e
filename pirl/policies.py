"""Acting on a posterior of rewards: one policy for all that the reward may be.

Draws of the reward ``[D, S, A]`` stand for the posterior. Which policy is best depends on what one is after:

- :func:`mean_policy` predicts the next action of a demonstrator of whom nothing else is known;
- :func:`bayes_policy` has the largest expected return (the return is linear in the reward, so that the mean is enough);
- :func:`risk_averse_policy` fares well in most of the worst cases: the largest conditional value at risk, or quantile,
  of the return.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import ConvergenceError, ConvergenceWarning, OptionError, warn
from pirl.mdp import TabularMDP
from pirl.planning import discounted_occupancy, optimal_policy

RISKS = ("cvar", "quantile")
_MOST_ROUNDS, _MOST_PLANS = 50, 200


class RiskAversePolicy(NamedTuple):
    """A policy that may mix actions, and what it is good for.

    Example:
        >>> found = risk_averse_policy(mdp, pirl.reward_draws(posterior, model, demos, mdp, features, num_draws=20))
        >>> found.policy.shape, found.returns.shape
        (torch.Size([25, 5]), torch.Size([20]))
    """

    policy: Tensor
    """pi(a|s) ``[S, A]``, or by time ``[T, S, A]``."""
    value: float
    """Conditional value at risk, or quantile, of the return (or of less regret) over the draws."""
    returns: Float[Tensor, " D"]
    """Expected return under each draw; with ``of="regret"`` less the best return there, so at most 0."""


def mean_policy(log_policies: Float[Tensor, "D *event"]) -> Float[Tensor, "*event"]:
    """Log of the mean over draws of pi(a|s), ``[D, S, A]`` or ``[D, T, S, A]``, at each state and time.

    It is how a demonstrator acts whose reward is drawn anew at each decision. One that is drawn once for an episode is
    a mixture of policies, which past actions tell something about: see ``pool`` of
    :func:`pirl.metrics.held_out_log_likelihood`.

    Example:
        >>> mean_policy(torch.tensor([[[0.5, 0.5]], [[0.1, 0.9]]]).log()).exp()
        tensor([[0.3000, 0.7000]])
    """
    return torch.logsumexp(log_policies, 0) - math.log(len(log_policies))


def bayes_policy(mdp: TabularMDP, rewards: Float[Tensor, "D S A"]) -> Tensor:
    """The policy of the largest expected return over draws of the reward: optimal for their mean.

    Args:
        rewards: r(s,a) ``[D, S, A]``, or r(s) ``[D, S, 1]``.

    Returns:
        pi(a|s), one-hot: ``[S, A]``, or by time ``[T, S, A]`` where the horizon is finite.

    Example:
        >>> bayes_policy(mdp, pirl.reward_draws(posterior, model, demos, mdp, features)).shape
        torch.Size([25, 5])
    """
    return optimal_policy(mdp, mdp.check_reward(rewards).mean(0)).policy


def risk_averse_policy(
    mdp: TabularMDP,
    rewards: Float[Tensor, "D S A"],
    *,
    risk: str = "cvar",
    level: float = 0.1,
    of: str = "return",
    max_draws: int = 200,
) -> RiskAversePolicy:
    """The policy with the largest conditional value at risk, or quantile, of the return over draws of the reward.

    The conditional value at risk is the mean of the worst share ``level`` of the draws. Over occupancies rho it is the
    linear program ``max z - 1/(level D) sum_d (z - <rho, r_d>)_+`` (Rockafellar and Uryasev 2000), solved plan by plan:
    exactly, unless 200 plans do not suffice, of which a warning tells with a bound. The quantile is not concave; from
    the policy of the first, and from the best on average, the worst draws are given up and the smallest return of the
    others is raised, until that gains nothing: a local optimum.

    A return holds directions of the reward that demonstrations cannot determine (constants, shaping), where draws are
    those of the prior: ``of="regret"`` takes the best return under each draw from it, which leaves only differences
    between policies.

    Args:
        rewards: r(s,a) ``[D, S, A]`` or r(s) ``[D, S, 1]``; of more than ``max_draws``, evenly spaced ones are used.
        risk: "cvar" or "quantile".
        level: share of the worst draws, or of those below the quantile.
        of: "return" or "regret".

    Raises:
        OptionError: an option out of range.
        ConvergenceError: the linear program has no solution.
        DivergenceError: discount 1, no horizon, and some reward is collected for ever.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=1)
        >>> rewards = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).double()  # which of the two is good?
        >>> risk_averse_policy(mdp, rewards, level=0.5).policy
        tensor([[[0.5000, 0.5000]]], dtype=torch.float64)
    """
    if risk not in RISKS:
        raise OptionError(f"risk must be 'cvar' or 'quantile', not {risk!r}")
    if of not in ("return", "regret"):
        raise OptionError(f"of must be 'return' or 'regret', not {of!r}")
    if not 0 < level <= 1:
        raise OptionError(f"level is {level}, but must be above 0 and at most 1")
    if max_draws < 1:
        raise OptionError(f"max_draws is {max_draws}, but must be at least 1")
    whole = mdp.check_reward(rewards)
    count = min(len(whole), max_draws)
    picked = whole[torch.linspace(0, len(whole) - 1, count).round().long()]
    best = torch.zeros(count, dtype=whole.dtype, device=whole.device)
    if of == "regret":
        value = optimal_policy(mdp, picked).value
        best = (value if mdp.horizon is None else value[:, 0]) @ mdp.initial
    plans = _Plans(mdp, picked, best)
    worst = max(1, round(level * count))
    if risk == "cvar":
        visits, returns = plans.largest(worst)
        attained = float(np.sort(returns)[:worst].mean())
    else:
        found = [plans.raised(*plans.largest(start), worst - 1) for start in {worst, count}]
        visits, returns = max(found, key=lambda pair: np.sort(pair[1])[worst - 1])
        attained = float(np.sort(returns)[worst - 1])
    total = visits.sum(-1, keepdim=True)
    prior = mdp.log_prior.exp()
    # What is never reached may be left to the prior.
    policy = torch.where(total > 1e-12, visits / total.clamp(min=1e-12), prior)
    policy = policy / policy.sum(-1, keepdim=True)
    policy = policy if mdp.horizon else policy[0]
    return RiskAversePolicy(policy, attained, torch.from_numpy(returns).to(whole))


class _Plans:
    """Mixtures of deterministic plans, of which a linear program asks for the next (column generation).

    The program's multipliers weigh the draws; a plan that is best for the reward weighed so, and no better than the
    mixture, proves that no policy is.
    """

    def __init__(self, mdp: TabularMDP, rewards: Float[Tensor, "D S A"], best: Float[Tensor, " D"]) -> None:
        self.mdp, self.rewards, self.best = mdp, rewards, best
        self.visits: list[Tensor] = []
        self.returns = np.zeros((0, len(rewards)))
        self._add(rewards.mean(0))

    def _add(self, reward: Float[Tensor, "S A"]) -> np.ndarray:
        """The best plan for a reward: keep it, and say what it returns under each draw."""
        visits = _visits(self.mdp, optimal_policy(self.mdp, reward).policy)
        returns = torch.einsum("sa,dsa->d", visits.sum(0), self.rewards) - self.best
        self.visits.append(visits)
        self.returns = np.concatenate([self.returns, returns.double().cpu().numpy()[None]])
        return self.returns[-1]

    def largest(self, worst: int, kept: np.ndarray | None = None) -> tuple[Tensor, np.ndarray]:
        """Maximise the mean of the ``worst`` smallest returns, of all draws or of those kept: visits, all returns."""
        index = np.arange(len(self.best)) if kept is None else kept
        for _ in range(_MOST_PLANS):
            share, weight, attained = _mixed(self.returns[:, index], worst)
            reward = torch.einsum("d,dsa->sa", torch.from_numpy(weight).to(self.rewards), self.rewards[index])
            offered = float(weight @ self._add(reward)[index])
            if not offered > attained + 1e-9 * (1 + abs(attained)):
                break
        else:
            warn(
                f"after {_MOST_PLANS} plans the risk-averse policy attains {attained:.4g}, and none attains more than "
                f"{offered:.4g}",
                ConvergenceWarning,
            )
        share = np.append(share, 0.0)  # of the plan that was not better
        visits = torch.einsum("m,mtsa->tsa", torch.from_numpy(share).to(self.rewards), torch.stack(self.visits))
        return visits, share @ self.returns

    def raised(self, visits: Tensor, returns: np.ndarray, below: int) -> tuple[Tensor, np.ndarray]:
        """Raise the return that ``below`` draws fall short of, as long as giving up other draws helps."""
        for _ in range(_MOST_ROUNDS):
            level = np.sort(returns)[below]
            trial, now = self.largest(1, np.argsort(returns)[below:])
            if not np.sort(now)[below] > level + 1e-9 * (1 + abs(level)):
                break
            visits, returns = trial, now
        return visits, returns


def _mixed(returns: np.ndarray, worst: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Shares of plans ``[M]`` with the best mean of ``worst`` returns, weights of the draws ``[D]``, and that mean."""
    from scipy.optimize import linprog

    plans, draws = returns.shape
    # Variables: shares; the level z; shortfalls u_d >= z - sum_m share_m returns_md.
    cost = np.concatenate([np.zeros(plans), [-1.0], np.full(draws, 1.0 / worst)])
    unequal = np.hstack([-returns.T, np.ones((draws, 1)), -np.eye(draws)])
    equal = np.concatenate([np.ones(plans), np.zeros(1 + draws)])[None]
    bounds = [(0, None)] * plans + [(None, None)] + [(0, None)] * draws
    solved = linprog(cost, A_ub=unequal, b_ub=np.zeros(draws), A_eq=equal, b_eq=[1.0], bounds=bounds, method="highs")
    if solved.status != 0:
        raise ConvergenceError(f"the linear program of the risk-averse policy has no solution: {solved.message}")
    share = solved.x[:plans].clip(min=0)
    return share / share.sum(), -solved.ineqlin.marginals, float(-solved.fun)


def _visits(mdp: TabularMDP, policy: Tensor) -> Float[Tensor, "T S A"]:
    """Expected discounted visits by time, or of all time (T = 1) where there is no horizon."""
    if mdp.horizon is None:
        return discounted_occupancy(mdp, policy).unsqueeze(0)
    weight, steps = mdp.initial, []
    for now in policy:
        steps.append(weight.unsqueeze(-1) * now)
        weight = mdp.discount * mdp.transitions.flow(steps[-1].reshape(-1, 1)).squeeze(-1)
    return torch.stack(steps)
