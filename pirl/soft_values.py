"""Soft values V(r), the one primitive from which every message, partition function and likelihood is built.

Two readings of p(O_t = 1 | s, a) = exp r(s, a) share one backup, V(s) = logsumexp_a Q(s, a), and differ in how chance
enters Q (:mod:`pirl.backups`).

Values are computed by a :class:`torch.autograd.Function` that returns V as a differentiable output. Its backward is a
second Function, the adjoint recursion; whose own backward differentiates the adjoint's plain kernel. So memory stays
O(T S) under autograd, gradients and Hessians are exact, and both Functions accept leading batch dimensions, which
makes their vmap rules one ``movedim`` each. Policies of the first steps, as many as fit some 30 MB, are kept for the
adjoint: a hint only, through which nothing is differentiated.

Time is counted *to go*: ``V[k]`` is the value with k decisions left and ``V[0] = 0``, so that one scan serves every
horizon.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pirl.backups import Reading, SoftProblem, backup, entry_weights, log_expect
from pirl.errors import OptionError
from pirl.stationary import Solver, stationary_values, stationary_visits
from pirl.transitions import Numbered, is_transformed

__all__ = [
    "Reading", "SoftProblem", "Solver", "backup", "chain_first", "chain_last", "entry_weights", "log_expect",
    "occupancy_step", "soft_adjoint", "soft_values",
]  # fmt: skip

# Policies [T, S, A, C] of the first steps, at most this many numbers, are kept from the values for the adjoint. Beyond
# 32 MiB the C library asks the system for fresh memory each time, which costs more than making policies again.
_KEPT = 7 * 2**19


def soft_values(reward: Float[Tensor, "*batch S A"], problem: SoftProblem, solver: Solver = "auto") -> Tensor:
    """Soft state values: ``[*batch, K + 1, S]`` by decisions to go (finite horizon K) or ``[*batch, S]`` (infinite).

    A row of the batch whose fixed point does not exist, or is not reached, is NaN, alone: inside a sampler one bad
    chain must not stop the others. Callers outside a sampler check, and raise.
    """
    if solver not in ("auto", "newton", "value_iteration"):
        raise OptionError(f"solver must be 'auto', 'newton' or 'value_iteration', not {solver!r}")
    differentiated = is_transformed(reward) or (reward.requires_grad and torch.is_grad_enabled())
    return _SoftValues.apply(reward, problem, solver, differentiated)[0]


def soft_adjoint(
    reward: Float[Tensor, "*batch S A"], values: Tensor, cotangent: Tensor, problem: SoftProblem
) -> Float[Tensor, "*batch S A"]:
    """Pull a cotangent of V back to the reward; of an indicator, that gives the expected visits that follow from it."""
    return _SoftAdjoint.apply(reward, values, cotangent, None, problem)


@torch.library.custom_op(
    "pirl::soft_values", mutates_args=(), schema="(Tensor reward, int problem, str solver) -> Tensor"
)
def _values_operator(reward: Tensor, problem: int, solver: Any) -> Tensor:
    known = Numbered.find(problem)
    base = _base(reward, known)
    if known.horizon is None:
        return chain_first(stationary_values(base, known, solver), reward.shape[:-2])
    return chain_first(finite_values(base, known, known.horizon), reward.shape[:-2])


@torch.library.custom_op(
    "pirl::soft_values_kept", mutates_args=(), schema="(Tensor reward, int problem) -> (Tensor, Tensor)"
)
def _kept_operator(reward: Tensor, problem: int) -> tuple[Tensor, Tensor]:
    """Values, and the policies ``[*batch, J, S, A]`` of the first J steps."""
    known, batch = Numbered.find(problem), reward.shape[:-2]
    base = _base(reward, known)
    policy = base.new_empty(_steps_kept(reward, known), *base.shape)
    values = finite_values(base, known, known.horizon, policy)
    return chain_first(values, batch), chain_first(policy, batch)


@torch.library.custom_op(
    "pirl::soft_adjoint",
    mutates_args=(),
    schema="(Tensor reward, Tensor values, Tensor cotangent, int problem, Tensor? policy=None) -> Tensor",
)
def _adjoint_operator(
    reward: Tensor, values: Tensor, cotangent: Tensor, problem: int, policy: Tensor | None = None
) -> Tensor:
    known = Numbered.find(problem)
    if known.horizon is None:
        return _adjoint(reward, values, cotangent, known)
    now, weight = chain_last(values, 2), chain_last(cotangent, 2)
    policy = None if policy is None else chain_last(policy, 3)
    return chain_first(finite_visits(_base(reward, known), now, weight, known, policy), reward.shape[:-2])


@_values_operator.register_fake
def _(reward: Tensor, problem: int, solver: str) -> Tensor:
    horizon = Numbered.find(problem).horizon
    return _fake(reward, *(() if horizon is None else (horizon + 1,)), reward.shape[-2])


@_kept_operator.register_fake
def _(reward: Tensor, problem: int) -> tuple[Tensor, Tensor]:
    known = Numbered.find(problem)
    policy = _fake(reward, _steps_kept(reward, known), *reward.shape[-2:])
    return _fake(reward, known.horizon + 1, reward.shape[-2]), policy


@_adjoint_operator.register_fake
def _(reward: Tensor, values: Tensor, cotangent: Tensor, problem: int, policy: Tensor | None = None) -> Tensor:
    return _fake(reward, *reward.shape[-2:])


def _steps_kept(reward: Tensor, problem: SoftProblem) -> int:
    if problem.horizon is None or problem.reading == "trajectory":  # a tracer cannot look whether it is linear
        return 0
    return min(problem.horizon, _KEPT // max(1, reward.numel()))


def _fake(reward: Tensor, *event: int) -> Tensor:
    return chain_first(reward.new_empty(*event, reward.shape[:-2].numel()), reward.shape[:-2])


class _SoftValues(Function):
    """(V, policies of the first steps); the latter empty where none is kept."""

    @staticmethod
    def forward(reward: Tensor, problem: SoftProblem, solver: Solver, differentiated: bool) -> tuple[Tensor, Tensor]:
        if differentiated and _steps_kept(reward, problem):
            return _kept_operator(reward, problem.number)
        return _values_operator(reward, problem.number, solver), reward.new_empty(*reward.shape[:-2], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        reward, ctx.problem = inputs[:2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(reward, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        reward, values, policy = ctx.saved_tensors
        kept = policy if policy.numel() else None
        return _SoftAdjoint.apply(reward, values, grad, kept, ctx.problem), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], reward: Tensor, *rest: Any) -> Any:
        return _SoftValues.apply(reward.movedim(in_dims[0], 0), *rest), (0, 0)


class _SoftAdjoint(Function):
    """Linear in the cotangent; differentiable in reward and values too, of which ``policy`` is a function."""

    @staticmethod
    def forward(
        reward: Tensor, values: Tensor, cotangent: Tensor, policy: Tensor | None, problem: SoftProblem
    ) -> Tensor:
        return _adjoint_operator(reward, values, cotangent, problem.number, policy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        reward, values, cotangent, _, ctx.problem = inputs
        ctx.save_for_backward(reward, values, cotangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*_SoftAdjointBackward.apply(*ctx.saved_tensors, grad, ctx.problem), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        tensors = _batch_first(inputs[:3], in_dims[:3], info.batch_size)
        # Of one policy for many cotangents, copies would cost more than making it again.
        policy = None if in_dims[3] is None else inputs[3].movedim(in_dims[3], 0)
        return _SoftAdjoint.apply(*tensors, policy, inputs[4]), 0


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


def finite_values(
    base: Float[Tensor, "S A C"], problem: SoftProblem, horizon: int, policy: Tensor | None = None
) -> Float[Tensor, "K1 S C"]:
    """Backward scan: V_0 = 0, V_k = logsumexp_a Q(V_{k-1}); fills ``policy [J, S, A, C]`` of the first J steps."""
    if not problem.linear:
        values = _scaled_values(base, problem, horizon)
        if values is not None:
            return values
    values = base.new_zeros(horizon + 1, base.shape[0], base.shape[2])
    buffer = torch.empty_like(base)
    for k in range(1, horizon + 1):
        q = backup(base, values[k - 1], problem, out=buffer)
        top = q.amax(1)  # each state has an action, so no row is all -inf
        total = q.sub_(top.unsqueeze(1)).exp_().sum(1)
        torch.log(total, out=values[k]).add_(top)
        if policy is not None and k <= len(policy):
            torch.mul(q, total.reciprocal_().unsqueeze(1), out=policy[k - 1])
    return values


def finite_visits(
    base: Float[Tensor, "S A C"], values: Tensor, cotangent: Tensor, problem: SoftProblem, policy: Tensor | None = None
) -> Float[Tensor, "S A C"]:
    """The adjoint of :func:`finite_values`, with the policies that it kept or without."""
    last = len(values) - 1
    while last > 0 and not bool(cotangent[last].any()):
        last -= 1
    if not problem.linear:
        visits = _scaled_visits(base, values[: last + 1], cotangent[: last + 1], problem)
        return _plain_visits(base, values, cotangent, problem) if visits is None else visits
    visits, buffer, weight = torch.zeros_like(base), torch.empty_like(base), cotangent[last]
    for k in range(last, 0, -1):
        if policy is not None and k <= len(policy):
            now = policy[k - 1]
        else:
            now = backup(base, values[k - 1], problem, out=buffer).sub_(values[k].unsqueeze(1)).exp_()
        step = torch.mul(now, weight.unsqueeze(1), out=buffer)
        visits += step
        weight = problem.transitions.adjoint_plus(cotangent[k - 1], step.flatten(0, 1))
    return visits


def _scaled_values(base: Tensor, problem: SoftProblem, horizon: int) -> Tensor | None:
    """V = log u + scale by products of u alone (trajectory reading), rescaled per chain so that max u = 1.

    None where some u is too small for float's exponent. Otherwise exact: a term lost to underflow is below 2^-52 of
    the sum that it belongs to.
    """
    states, actions, chains = base.shape
    top = base.flatten(0, 1).amax(0)
    factor, buffer = (base - top).exp_(), torch.empty_like(base)
    values = base.new_zeros(horizon + 1, states, chains)
    u, scale = base.new_ones(states, chains), base.new_zeros(chains)
    for k in range(1, horizon + 1):
        now = _scaled_expect(u, scale, problem, buffer).mul_(factor).sum(1)
        peak = now.amax(0)
        torch.div(now, peak, out=u)
        if not bool(u.amin() > torch.finfo(u.dtype).tiny * 2.0**52):
            return None
        scale = peak.log_().add_(scale).add_(top)
        torch.log(u, out=values[k]).add_(scale)
    return values


def _scaled_expect(u: Tensor, scale: Tensor, problem: SoftProblem, out: Tensor) -> Float[Tensor, "S A C"]:
    """``(stop + sum_s' P(s'|s,a) e^V(s')) e^-scale`` for u = e^(V - scale), into ``out``."""
    total = torch.mm(problem.transitions.matrix, u, out=out.flatten(0, 1))
    if problem.ends is not None:
        total.addr_(problem.ends, (-scale).exp_())
    return out


def _scaled_visits(base: Tensor, values: Tensor, cotangent: Tensor, problem: SoftProblem) -> Tensor | None:
    """The adjoint in the terms of :func:`_scaled_values`; None where e^(log Q - V) exceeds float's exponent."""
    top, scale = base.flatten(0, 1).amax(0), values.amax(1)
    room = 0.4 * math.log(torch.finfo(base.dtype).max)
    # pi(a|s) = e^(base - top) (sum_s' P u) e^lift: beyond this room a factor that underflows would matter.
    lift = (scale[:-1] + top).unsqueeze(1) - values[1:]
    if not bool((lift < room).all()) or (problem.ends is not None and not bool((scale > -room).all())):
        return None
    factor, visits, buffer, weight = (base - top).exp_(), torch.zeros_like(base), torch.empty_like(base), cotangent[-1]
    raised = torch.empty_like(base)
    for k in range(len(values) - 1, 0, -1):
        u = (values[k - 1] - scale[k - 1]).exp_()
        torch.mul(factor, (weight * lift[k - 1].exp_()).unsqueeze(1), out=raised)
        visits.addcmul_(raised, _scaled_expect(u, scale[k - 1], problem, buffer))
        weight = cotangent[k - 1] + problem.transitions.flow(raised.flatten(0, 1)) * u
    return visits


def occupancy_step(
    base: Tensor, values: Float[Tensor, "S C"], following: Float[Tensor, "S C"], weight: Tensor, problem: SoftProblem
) -> tuple[Float[Tensor, "S A C"], Float[Tensor, "S C"]]:
    """One step of the adjoint: (visits to pairs, flow into next states) of ``weight`` visits to states."""
    if problem.linear:
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


def _base(reward: Float[Tensor, "*batch S A"], problem: SoftProblem) -> Float[Tensor, "S A C"]:
    return chain_last(reward, 2) + problem.log_prior.unsqueeze(-1)


def _adjoint(reward: Tensor, values: Tensor, cotangent: Tensor, problem: SoftProblem) -> Tensor:
    """The adjoint as a plain kernel, which torch can differentiate."""
    base, batch = _base(reward, problem), reward.shape[:-2]
    if problem.horizon is None:
        return chain_first(stationary_visits(base, chain_last(values, 1), chain_last(cotangent, 1), problem), batch)
    return chain_first(_plain_visits(base, chain_last(values, 2), chain_last(cotangent, 2), problem), batch)


def _plain_visits(base: Tensor, values: Tensor, cotangent: Tensor, problem: SoftProblem) -> Tensor:
    visits = torch.zeros_like(base)
    weight = cotangent[-1]
    for k in range(len(values) - 1, 0, -1):
        step, flow = occupancy_step(base, values[k], values[k - 1], weight, problem)
        visits += step
        weight = cotangent[k - 1] + flow
    return visits
