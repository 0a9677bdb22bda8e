"""Soft values V(r), the one primitive from which every message, partition function and likelihood is built.

Two readings of p(O_t = 1 | s, a) = exp r(s, a) share one backup, V(s) = logsumexp_a Q(s, a), and differ in how chance
enters Q:

- *trajectory* (the graphical model, literally): ``Q = log p(a|s) + r + log sum_s' P(s'|s,a) exp V(s')``, so that V =
log beta;
- *causal* (Ziebart 2010, section 6.2; Levine 2018, eq. 18): ``Q = log p(a|s) + r + g sum_s' P(s'|s,a) V(s')``.

Values are computed by a :class:`torch.autograd.Function` that returns V as a differentiable output. Its backward is a
second Function, the adjoint recursion; whose own backward differentiates the adjoint's plain kernel. So memory stays
O(T S) under autograd, gradients and Hessians are exact, and both Functions accept leading batch dimensions, which
makes their vmap rules one ``movedim`` each.

Time is counted *to go*: ``V[k]`` is the value with k decisions left and ``V[0] = 0``, so that one scan serves every
horizon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pirl.errors import OptionError
from pirl.transitions import DENSE_STATES, Numbered, TransitionMap, is_transformed, scatter_max, solve_system

Reading = Literal["causal", "trajectory"]
Solver = Literal["auto", "newton", "value_iteration"]

_MAX_NEWTON = 100
_MAX_VALUE_ITERATIONS = 200_000
# Beyond DENSE_STATES one value iteration is thousands of times cheaper than one factorisation.
_FEW_VALUE_ITERATIONS = 3_000


@dataclass(frozen=True, eq=False)
class SoftProblem(Numbered):
    """A decision problem as the recursions see it.

    Args:
        transitions: P(s'|s,a) times the discount (causal), or times the probability of going on (trajectory); no
            entry leaves a terminal state.
        log_prior: log p(a|s), -inf where an action is not available; a terminal state has one action, 0, of log p = 0.
        reading: how chance enters (module docstring).
        ended: ``[S, A]``, 1 where nothing follows a pair for sure (terminal states, actions that are not available),
            else 0.
        stop: probability of stopping after any other step (trajectory reading with geometric stopping: 1 - g; else 0).
        horizon: number of decisions, or None for the stationary fixed point.
    """

    transitions: TransitionMap
    log_prior: Float[Tensor, "S A"]
    reading: Reading
    ended: Float[Tensor, "S A"]
    stop: float
    horizon: int | None

    @cached_property
    def undiscounted(self) -> bool:
        """Whether some decision is followed by another for sure, so that only absorption bounds the values."""
        value, row = self.transitions.value, self.transitions.row
        total = value.new_zeros(self.transitions.shape[0]).index_add(0, row, value)
        return bool((total > 1 - 1e-7).any())


def soft_values(reward: Float[Tensor, "*batch S A"], problem: SoftProblem, solver: Solver = "auto") -> Tensor:
    """Soft state values: ``[*batch, K + 1, S]`` by decisions to go (finite horizon K) or ``[*batch, S]`` (infinite).

    A row of the batch whose fixed point does not exist, or is not reached, is NaN, alone: inside a sampler one bad
    chain must not stop the others. Callers outside a sampler check, and raise.
    """
    if solver not in ("auto", "newton", "value_iteration"):
        raise OptionError(f"solver must be 'auto', 'newton' or 'value_iteration', not {solver!r}")
    return _SoftValues.apply(reward, problem, solver)


def soft_adjoint(
    reward: Float[Tensor, "*batch S A"], values: Tensor, cotangent: Tensor, problem: SoftProblem
) -> Float[Tensor, "*batch S A"]:
    """Pull a cotangent of V back to the reward; of an indicator, that gives the expected visits that follow from it."""
    return _SoftAdjoint.apply(reward, values, cotangent, problem)


@torch.library.custom_op(
    "pirl::soft_values", mutates_args=(), schema="(Tensor reward, int problem, str solver) -> Tensor"
)
def _values_operator(reward: Tensor, problem: int, solver: Any) -> Tensor:
    return _values(reward, Numbered.find(problem), solver)


@torch.library.custom_op(
    "pirl::soft_adjoint",
    mutates_args=(),
    schema="(Tensor reward, Tensor values, Tensor cotangent, int problem) -> Tensor",
)
def _adjoint_operator(reward: Tensor, values: Tensor, cotangent: Tensor, problem: int) -> Tensor:
    return _adjoint(reward, values, cotangent, Numbered.find(problem))


@_values_operator.register_fake
def _(reward: Tensor, problem: int, solver: str) -> Tensor:
    horizon, chains = Numbered.find(problem).horizon, reward.shape[:-2].numel()
    times = () if horizon is None else (horizon + 1,)
    return chain_first(reward.new_empty(*times, reward.shape[-2], chains), reward.shape[:-2])


@_adjoint_operator.register_fake
def _(reward: Tensor, values: Tensor, cotangent: Tensor, problem: int) -> Tensor:
    return chain_first(reward.new_empty(*reward.shape[-2:], reward.shape[:-2].numel()), reward.shape[:-2])


class _SoftValues(Function):
    @staticmethod
    def forward(reward: Tensor, problem: SoftProblem, solver: Solver) -> Tensor:
        return _values_operator(reward, problem.number, solver)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        reward, ctx.problem = inputs[:2]
        ctx.save_for_backward(reward, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        reward, values = ctx.saved_tensors
        return _SoftAdjoint.apply(reward, values, grad, ctx.problem), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], reward: Tensor, problem: SoftProblem, solver: Solver) -> Any:
        return _SoftValues.apply(reward.movedim(in_dims[0], 0), problem, solver), 0


class _SoftAdjoint(Function):
    @staticmethod
    def forward(reward: Tensor, values: Tensor, cotangent: Tensor, problem: SoftProblem) -> Tensor:
        return _adjoint_operator(reward, values, cotangent, problem.number)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        reward, values, cotangent, ctx.problem = inputs
        ctx.save_for_backward(reward, values, cotangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*_SoftAdjointBackward.apply(*ctx.saved_tensors, grad, ctx.problem), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        tensors = _batch_first(inputs[:3], in_dims[:3], info.batch_size)
        return _SoftAdjoint.apply(*tensors, inputs[3]), 0


class _SoftAdjointBackward(Function):
    """A Function of its own so that a Hessian under vmap reaches the kernel with plain tensors."""

    @staticmethod
    def forward(
        reward: Tensor, values: Tensor, cotangent: Tensor, grad: Tensor, problem: SoftProblem
    ) -> tuple[Tensor, Tensor, Tensor]:
        pull: Any = torch.func.vjp(lambda r, v, c: _adjoint(r, v, c, problem), reward, values, cotangent)[1]
        return pull(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("soft values have no third derivatives: use finite differences of the Hessian")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        tensors = _batch_first(inputs[:4], in_dims[:4], info.batch_size)
        return _SoftAdjointBackward.apply(*tensors, inputs[4]), (0, 0, 0)


def _batch_first(tensors: tuple[Any, ...], dims: tuple[Any, ...], size: int) -> list[Tensor]:
    return [
        x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]


def chain_last(x: Tensor, event_dims: int) -> Tensor:
    """``[*batch, *event] -> [*event, C]``, contiguous."""
    event = x.shape[x.dim() - event_dims :]
    return x.reshape(-1, math.prod(event)).t().contiguous().reshape(*event, -1)


def chain_first(x: Tensor, batch: torch.Size) -> Tensor:
    """``[*event, C] -> [*batch, *event]``, a view."""
    return x.movedim(-1, 0).reshape(*batch, *x.shape[:-1])


# ------------------------------------------------------------------------------------------------ kernels, chain-last


def backup(base: Float[Tensor, "S A #C"], values: Float[Tensor, "S #C"], problem: SoftProblem) -> Tensor:
    """Q from the next state's values; ``base`` is r + log p(a|s)."""
    if problem.reading == "causal":
        return problem.transitions.apply_plus(base.flatten(0, 1), values).unflatten(0, base.shape[:2])
    return base + log_expect(values, problem).unflatten(0, base.shape[:2])


def log_expect(values: Float[Tensor, "S C"], problem: SoftProblem) -> Float[Tensor, "SA C"]:
    """``log(stop + sum_s' P(s'|s,a) exp V(s'))``, 0 where the episode has ended; safe for any spread of V."""
    transitions, ended = problem.transitions, problem.ended.reshape(-1, 1)
    top = values.detach().amax(0)
    total = transitions.expect((values - top).exp()) + ended
    # One shift for all rows is exact until some row's terms all fall below the smallest normal number; only then, or
    # where a transform hides the numbers, shift row by row.
    if not is_transformed(values) and bool((total > torch.finfo(total.dtype).tiny * 2.0**52).all()):
        result = total.log() + (1 - ended) * top
    else:
        entry = transitions.value.log().unsqueeze(-1) + values[transitions.column]
        row_top = torch.where(ended > 0, 0.0, scatter_max(entry.detach(), transitions.row, ended.shape[0]))
        scaled = (entry - row_top[transitions.row]).exp()
        result = ended.expand_as(row_top).index_add(0, transitions.row, scaled).log() + row_top
    if problem.stop == 0:
        return result
    # Not logaddexp, whose second derivative is NaN where one term dwarfs the other.
    either = torch.stack([result, torch.full_like(result, math.log(problem.stop))])
    return torch.where(ended > 0, 0.0, torch.logsumexp(either, 0))


def entry_weights(values: Float[Tensor, "S C"], problem: SoftProblem) -> Float[Tensor, "nnz #C"]:
    """Weight of each transition in the derivative of Q: g P(s'|s,a), or the tilted law P(s'|s,a) e^{V(s')} / norm."""
    transitions = problem.transitions
    if problem.reading == "causal":
        return transitions.value.unsqueeze(-1)
    norm = log_expect(values, problem)
    return (transitions.value.log().unsqueeze(-1) + values[transitions.column] - norm[transitions.row]).exp()


def finite_values(base: Float[Tensor, "S A C"], problem: SoftProblem, horizon: int) -> Float[Tensor, "K1 S C"]:
    """Backward scan: V_0 = 0, V_k = logsumexp_a Q(V_{k-1})."""
    values = base.new_zeros(horizon + 1, base.shape[0], base.shape[2])
    for k in range(1, horizon + 1):
        values[k] = _log_sum_exp(backup(base, values[k - 1], problem))
    return values


def _log_sum_exp(q: Float[Tensor, "S A C"]) -> Float[Tensor, "S C"]:
    """logsumexp over actions, overwriting ``q``: each state has an action, so no row is all -inf."""
    top = q.amax(1, keepdim=True)
    return q.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))


def occupancy_step(
    base: Tensor, values: Float[Tensor, "S C"], following: Float[Tensor, "S C"], weight: Tensor, problem: SoftProblem
) -> tuple[Float[Tensor, "S A C"], Float[Tensor, "S C"]]:
    """One step of the adjoint: (visits to pairs, flow into next states) of ``weight`` visits to states."""
    if problem.reading == "causal":
        policy = backup(base, following, problem).sub_(values.unsqueeze(1)).exp_()
        visits = weight.unsqueeze(1) * policy
        return visits, problem.transitions.flow(visits.flatten(0, 1))
    norm = log_expect(following, problem)
    policy = (base + norm.reshape(base.shape) - values.unsqueeze(1)).exp()
    visits = weight.unsqueeze(1) * policy
    top = following.detach().amax(0)
    lift = torch.where(problem.ended.reshape(-1, 1) > 0, 0.0, top - norm)
    if bool((lift < 0.8 * math.log(torch.finfo(norm.dtype).max)).all()):
        pulled = problem.transitions.flow(visits.flatten(0, 1) * lift.exp())
        return visits, pulled * (following - top).exp()
    # The spread of values exceeds the range of the exponent: use the tilted law entry by entry.
    tilted = visits.flatten(0, 1)[problem.transitions.row] * entry_weights(following, problem)
    return visits, torch.zeros_like(following).index_add(0, problem.transitions.column, tilted)


def _values(reward: Tensor, problem: SoftProblem, solver: Solver) -> Tensor:
    base = chain_last(reward, 2) + problem.log_prior.unsqueeze(-1)
    if problem.horizon is None:
        return chain_first(stationary_values(base, problem, solver), reward.shape[:-2])
    return chain_first(finite_values(base, problem, problem.horizon), reward.shape[:-2])


def _adjoint(reward: Tensor, values: Tensor, cotangent: Tensor, problem: SoftProblem) -> Tensor:
    base = chain_last(reward, 2) + problem.log_prior.unsqueeze(-1)
    dims = 1 if problem.horizon is None else 2
    values, cotangent = chain_last(values, dims), chain_last(cotangent, dims)
    if problem.horizon is None:
        visits = stationary_visits(base, values, cotangent, problem)
    else:
        visits = torch.zeros_like(base)
        weight = cotangent[problem.horizon]
        for k in range(problem.horizon, 0, -1):
            step, flow = occupancy_step(base, values[k], values[k - 1], weight, problem)
            visits += step
            weight = cotangent[k - 1] + flow
    return chain_first(visits, reward.shape[:-2])


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
    if solver == "auto":
        solver = _choose_solver(base, problem)
    if solver == "value_iteration":
        values = _iterate_values(base, problem)
    elif problem.reading == "causal":
        values = _newton(base, _prior_values(base, problem), problem)
        values = torch.where(_ends_in_time(base, values, problem), values, torch.nan)
    else:
        values = _newton(base, _linear_values(base, problem), problem)
    return values


def _choose_solver(base: Tensor, problem: SoftProblem) -> Solver:
    if base.shape[0] <= DENSE_STATES or problem.reading == "trajectory":  # whose rate depends on the reward
        return "newton"
    transitions = problem.transitions
    leaving = torch.zeros_like(base[:, :, 0]).flatten().index_add(0, transitions.row, transitions.value)
    rate = float(leaving.amax()) if leaving.numel() else 0.0
    if (
        0.0 <= rate < 1.0
        and math.log(torch.finfo(base.dtype).eps) / math.log(max(rate, 1e-300)) < _FEW_VALUE_ITERATIONS
    ):
        return "value_iteration"
    return "newton"


def _newton(base: Tensor, values: Tensor, problem: SoftProblem) -> Tensor:
    """Newton on V = T(V), which is soft policy iteration: 4 to 12 steps. Chains that have converged are left alone."""
    transitions, largest = problem.transitions, _largest(base)
    result = torch.full_like(values, torch.nan)
    waiting = torch.ones_like(largest, dtype=torch.bool)
    for _ in range(_MAX_NEWTON):
        q = backup(base, values, problem)
        update = torch.logsumexp(q, 1)
        change = update - values
        residual = change.abs().amax(0)
        # The update is one contraction better than the iterate whose residual was checked.
        done = waiting & (residual <= _rounding(largest, values))
        result = torch.where(done, update, result)
        waiting = waiting & ~done & residual.isfinite()
        if not bool(waiting.any()):
            break
        policy = q.sub_(update.unsqueeze(1)).exp_()
        weight = policy.flatten(0, 1)[transitions.row] * entry_weights(values, problem)
        step = solve_system(transitions, weight.masked_fill_(~waiting, 0.0), change)
        values = torch.where(waiting, values + step, values)
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
