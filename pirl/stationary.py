"""Stationary soft values, V = logsumexp_a Q(V): the fixed point of an infinite horizon, and its derivative.

Chain-last throughout (``[S, A, C]``, ``[S, C]``); a chain whose fixed point does not exist, or is not reached, is NaN,
alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pirl.backups import SoftProblem, backup, entry_weights
from pirl.transitions import DENSE_STATES, scatter_max, solve_system

Solver = Literal["auto", "newton", "value_iteration"]

_MAX_NEWTON = 100
_MAX_VALUE_ITERATIONS = 200_000
# A value iteration costs a hundredth of a dense factorisation or less, and 20 save two Newton steps of three; where
# elimination is cheap, 3 are as good as they cost.
_SWEEPS, _FEW_SWEEPS = 20, 3


def stationary_visits(base: Tensor, values: Tensor, weight: Tensor, problem: SoftProblem) -> Float[Tensor, "S A C"]:
    """Implicit differentiation of the fixed point: ``(I - M)^T lambda = weight``, visits = lambda(s) pi(a|s)."""
    policy = (backup(base, values, problem) - values.unsqueeze(1)).exp()
    tilted = policy.flatten(0, 1)[problem.transitions.row] * entry_weights(values, problem)
    return solve_system(problem.transitions, tilted, weight, transpose=True).unsqueeze(1) * policy


def residual_tolerance(base: Float[Tensor, "S A C"], values: Float[Tensor, "S C"]) -> Float[Tensor, " C"]:
    """Rounding error of one backup, per chain: 64 ulp of the largest number that enters it."""
    return _rounding(_largest(base), values)


def _largest(base: Tensor) -> Float[Tensor, " C"]:
    return torch.where(base.isfinite(), base, 0.0).abs().flatten(0, 1).amax(0)


def _rounding(largest: Tensor, values: Tensor) -> Float[Tensor, " C"]:
    return (torch.maximum(values.abs().amax(0), largest) + 1.0) * (64 * torch.finfo(values.dtype).eps)


def stationary_values(base: Float[Tensor, "S A C"], problem: SoftProblem, solver: Solver) -> Float[Tensor, "S C"]:
    """The fixed point V = logsumexp_a Q(V); NaN in chains where it is not reached to rounding error."""
    if solver == "value_iteration" or (solver == "auto" and base.shape[0] > DENSE_STATES and problem.fast):
        return _iterate_values(base, problem)
    if problem.reading == "trajectory":
        return _newton(base, _linear_values(base, problem), problem, sweeps=0)
    cheap = base.shape[0] <= DENSE_STATES and problem.transitions.eliminations[0] is not None
    sweeps = _FEW_SWEEPS if cheap else _SWEEPS
    if not problem.undiscounted:
        return _newton(base, torch.zeros_like(base[:, 0]), problem, sweeps)
    values = _newton(base, _prior_values(base, problem), problem, sweeps)
    return torch.where(_ends_in_time(base, values, problem), values, torch.nan)


def _newton(base: Tensor, values: Tensor, problem: SoftProblem, sweeps: int) -> Tensor:
    """Newton on V = T(V), which is soft policy iteration, each step after some value iterations: 2 to 8 steps.

    T is monotone and convex: from its first step on Newton ascends to the fixed point, and so does V -> T(V) between
    the steps. Chains that have converged are left alone.
    """
    transitions, largest = problem.transitions, _largest(base)
    result = torch.full_like(values, torch.nan)
    waiting = torch.ones_like(largest, dtype=torch.bool)
    for _ in range(_MAX_NEWTON):
        update = torch.logsumexp(backup(base, values, problem), 1)
        residual = (update - values).abs().amax(0)
        # The update is one contraction better than the iterate whose residual was checked.
        done = waiting & (residual <= _rounding(largest, values))
        result = torch.where(done, update, result)
        waiting = waiting & ~done & residual.isfinite()
        left = waiting.nonzero().flatten()
        if not len(left):
            break
        here, now = base[..., left], update[:, left]
        for _ in range(sweeps):
            now = torch.logsumexp(backup(here, now, problem), 1)
        q = backup(here, now, problem)
        update = torch.logsumexp(q, 1)
        policy = q.sub_(update.unsqueeze(1)).exp_()
        weight = policy.flatten(0, 1)[transitions.row] * entry_weights(now, problem)
        values = values.index_copy(1, left, now + solve_system(transitions, weight, update - now))
    return result


def _ends_in_time(base: Tensor, values: Tensor, problem: SoftProblem) -> Bool[Tensor, " C"]:
    """Whether the soft policy ends, where nothing else bounds the values; rounding meets a residual that grows with V.

    The expected number of decisions t = (I - P_pi)^-1 1 is at least 1, and V is at most that many rewards and
    entropies; beyond 1e12 decisions the system is singular in float64 (and likewise in shorter types).
    """
    if not problem.undiscounted:
        return values.isfinite().all(0)
    policy = (backup(base, values, problem) - values.unsqueeze(1)).exp()
    weight = policy.flatten(0, 1)[problem.transitions.row] * entry_weights(values, problem)
    decisions = solve_system(problem.transitions, weight, torch.ones_like(values))
    return ((decisions > 0.5) & (decisions < 1e-3 / torch.finfo(values.dtype).eps)).all(0)


def _prior_values(base: Tensor, problem: SoftProblem) -> Tensor:
    """Value of acting by the prior: a full-support policy, from which soft policy iteration improves monotonically."""
    prior = torch.softmax(problem.log_prior, 1).unsqueeze(-1)
    kept = torch.where(prior > 0, base - prior.log(), 0.0)
    mean = (prior * kept).sum(1)
    weight = prior.flatten(0, 1)[problem.transitions.row] * problem.transitions.value.unsqueeze(-1)
    return solve_system(problem.transitions, weight.expand(-1, base.shape[2]), mean)


def _linear_values(base: Tensor, problem: SoftProblem) -> Tensor:
    """log z where z = M z + b, solved after z = e^v y with v the max-plus values, so that y >= 1 is of order one.

    z is positive exactly when the sum over paths converges (spectral radius of M below 1), wherever all states can
    stop.
    """
    transitions, states = problem.transitions, base.shape[0]
    ends = torch.where(problem.ended > 0, 1.0, problem.stop).log().unsqueeze(-1) + base
    steps = base.flatten(0, 1)[transitions.row] + transitions.value.log().unsqueeze(-1)
    best = ends.amax(1)
    for _ in range(states + 1):
        longer = scatter_max(steps + best[transitions.column], transitions.state, states)
        settled = (longer <= best).all(0)
        if bool(settled.all()):
            break
        best = torch.maximum(best, longer)
    # A path of more than S steps is improved only around a cycle of positive reward: no finite values in that chain.
    best = torch.where(settled, best, torch.nan)
    # Entries of unavailable actions are exp(-inf) = 0.
    weight = (steps + best[transitions.column] - best[transitions.state]).exp()
    y = solve_system(transitions, weight, (ends - best.unsqueeze(1)).exp().sum(1))
    return best + torch.where((y > 0).all(0), y, torch.nan).log()


def _iterate_values(base: Tensor, problem: SoftProblem) -> Tensor:
    values = torch.zeros_like(base[:, 0])
    result = torch.full_like(values, torch.nan)
    for _ in range(_MAX_VALUE_ITERATIONS):
        update = torch.logsumexp(backup(base, values, problem), 1)
        residual = (update - values).abs().amax(0)
        done = (residual <= residual_tolerance(base, values)) & result[0].isnan()
        result = torch.where(done, update, result)
        if not bool((result[0].isnan() & residual.isfinite()).any()):
            break
        values = update
    return result
