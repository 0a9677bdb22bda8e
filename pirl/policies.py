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

from pirl.errors import ConvergenceError, OptionError
from pirl.mdp import TabularMDP
from pirl.planning import optimal_policy

RISKS = ("cvar", "quantile")
_MOST_ROUNDS = 50


class RiskAversePolicy(NamedTuple):
    """A policy that may mix actions, and what it is good for."""

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
    linear program ``max z - 1/(level D) sum_d (z - <rho, r_d>)_+`` (Rockafellar and Uryasev 2000), solved exactly. The
    quantile is not concave; from the policy of the first, and from the best on average, the worst draws are given up
    and the smallest return of the others is raised, until that gains nothing: a local optimum.

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
        ConvergenceError: the linear program has no solution (discount 1, and some policy never ends).

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
    program = _Occupancies(mdp, picked.flatten(1).double().cpu().numpy(), best.double().cpu().numpy())
    worst = max(1, round(level * count))
    if risk == "cvar":
        visits, returns = program.largest(worst)
        attained = float(np.sort(returns)[:worst].mean())
    else:
        found = [program.raised(*program.largest(start), worst - 1) for start in {worst, count}]
        visits, returns = max(found, key=lambda pair: np.sort(pair[1])[worst - 1])
        attained = float(np.sort(returns)[worst - 1])
    total = visits.sum(-1, keepdims=True)
    prior = mdp.log_prior.exp().double().cpu().numpy()
    # What is never reached may be left to the prior.
    policy = np.where(total > 1e-12, visits / np.maximum(total, 1e-300), prior)
    best_policy = torch.from_numpy(policy / policy.sum(-1, keepdims=True)).to(whole)
    return RiskAversePolicy(
        best_policy if mdp.horizon else best_policy[0], attained, torch.from_numpy(returns).to(whole)
    )


class _Occupancies:
    """Linear programs over expected visits ``[T, S, A]`` (T = 1 stands for an infinite horizon)."""

    def __init__(self, mdp: TabularMDP, rewards: np.ndarray, best: np.ndarray) -> None:
        from scipy import sparse

        transitions = mdp.transitions
        pairs, states = mdp.available.numel(), mdp.num_states
        self.shape = (mdp.horizon or 1, *mdp.available.shape)
        self.rewards, self.best, self.size = rewards, best, self.shape[0] * pairs
        row, column = transitions.row.cpu().numpy(), transitions.column.cpu().numpy()
        onward = mdp.discount * sparse.coo_matrix(
            (transitions.value.double().cpu().numpy(), (column, row)), shape=(states, pairs)
        )
        visited = sparse.kron(sparse.eye(states), np.ones((1, mdp.num_actions)))
        # Visits are counted with their discount: what comes in (or was there at first) goes on.
        steps = self.shape[0]
        before = sparse.eye(1) if mdp.horizon is None else sparse.eye(steps, k=-1)
        self.conserved = sparse.csr_matrix(sparse.kron(sparse.eye(steps), visited) - sparse.kron(before, onward))
        self.start = np.zeros(steps * states)
        self.start[:states] = mdp.initial.double().cpu().numpy()
        allowed = np.tile(mdp.log_prior.isfinite().flatten().cpu().numpy(), steps)
        self.bounds = [(0, None if free else 0) for free in allowed]
        self.total = sparse.kron(np.ones((1, steps)), sparse.eye(pairs))

    def largest(self, worst: int, kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Maximise the mean of the ``worst`` smallest returns, of all draws or of those kept: visits, all returns."""
        from scipy import sparse
        from scipy.optimize import linprog

        index = np.arange(len(self.best)) if kept is None else kept
        count, pairs = len(index), self.rewards.shape[1]
        # Variables: visits by time; their sums over time w; the level z; shortfalls u_d >= z - (<w, r_d> - best_d).
        equal = sparse.bmat([[self.conserved, None], [self.total, -sparse.eye(pairs)]], format="csr")
        equal = sparse.hstack([equal, sparse.csr_matrix((equal.shape[0], 1 + count))], format="csr")
        unequal = sparse.hstack(
            [sparse.csr_matrix((count, self.size)), -self.rewards[index], np.ones((count, 1)), -sparse.eye(count)],
            format="csr",
        )
        cost = np.concatenate([np.zeros(self.size + pairs), [-1.0], np.full(count, 1.0 / worst)])
        bounds = [*self.bounds, *[(None, None)] * (pairs + 1), *[(0, None)] * count]
        solved = linprog(
            cost,
            A_ub=unequal,
            b_ub=-self.best[index],
            A_eq=equal,
            b_eq=np.concatenate([self.start, np.zeros(pairs)]),
            bounds=bounds,
            method="highs",
        )
        if solved.status != 0:
            raise ConvergenceError(f"the linear program of the risk-averse policy has no solution: {solved.message}")
        visits = solved.x[: self.size].clip(min=0).reshape(self.shape)
        return visits, self.rewards @ visits.sum(0).flatten() - self.best

    def raised(self, visits: np.ndarray, returns: np.ndarray, below: int) -> tuple[np.ndarray, np.ndarray]:
        """Raise the return that ``below`` draws fall short of, as long as giving up other draws helps."""
        for _ in range(_MOST_ROUNDS):
            level = np.sort(returns)[below]
            trial, now = self.largest(1, np.argsort(returns)[below:])
            if not np.sort(now)[below] > level + 1e-9 * (1 + abs(level)):
                break
            visits, returns = trial, now
        return visits, returns
