"""Linear maps over a transition table: expectation, flow, and the solve of a policy's system.

Everything here works on *chain-last* matrices ``[S, C]`` and ``[S * A, C]``: with the batch of reward vectors
(chains, particles, draws) in the last dimension one sparse product serves all of them, which was several times faster
on a CPU than a dense ``[C, S, A]``.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function

from pirl.elimination import MANY, Elimination, find_elimination

# A dense product beats a sparse one only when few entries are zero (measured at S = 100, A = 5, C = 64: factor 4 at
# 5% non-zero).
_DENSE_ABOVE = 0.25
# Systems with at most this many states are solved for all chains at once, by elimination of few entries or by a batched
# dense LU; beyond it by a sparse LU, or by iteration.
DENSE_STATES = 1000
# Dense systems of this size are solved at a time: what fits a cache is not fetched from memory anew.
_SOLVE_BYTES = 2**20
# M that contracts at least this fast solves a large system by at most some 3,000 products with it.
FAST_RATE = 0.988
_MAX_PRODUCTS = 4_000


_numbered: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


class Numbered:
    """An object that operators of torch know by its number, since they take numbers and tensors only.

    Operators are for tracers (make_fx, torch.compile), which then record one call, and neither the steps that an
    example happened to take nor a sparse tensor, which they cannot hold.
    """

    @cached_property
    def number(self) -> int:
        """The number, for as long as the object lives."""
        number = next(_numbers)
        _numbered[number] = self
        return number

    @staticmethod
    def find(number: int) -> Any:
        """The object of a number."""
        return _numbered[number]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "number"}


@dataclass(frozen=True, eq=False)
class SparseMap(Numbered):
    """A linear map given by the entries of its matrix, differentiable any number of times, under vmap too.

    Args:
        row: entry -> output, sorted.
        column: entry -> input.
        value: entry -> weight; entries of the same place add up.
        shape: (outputs, inputs).
    """

    row: Int[Tensor, " nnz"]
    column: Int[Tensor, " nnz"]
    value: Float[Tensor, " nnz"]
    shape: tuple[int, int]

    @cached_property
    def matrix(self) -> Tensor:
        """The matrix: dense where most entries are non-zero, else CSR."""
        return _matrix(self.row, self.column, self.value, self.shape)

    @cached_property
    def transposed(self) -> Tensor:
        """The transpose, stored on its own so that the adjoint is a product too, not a scatter."""
        order = torch.argsort(self.column, stable=True)
        return _matrix(self.column[order], self.row[order], self.value[order], self.shape[::-1])

    def apply(self, x: Float[Tensor, "inputs C"]) -> Float[Tensor, "outputs C"]:
        """``matrix @ x``."""
        return _Product.apply(x, self, False) if _differentiated(x) else self.matrix @ x

    def adjoint(self, y: Float[Tensor, "outputs C"]) -> Float[Tensor, "inputs C"]:
        """``matrix.T @ y``."""
        return _Product.apply(y, self, True) if _differentiated(y) else self.transposed @ y

    def apply_plus(
        self, base: Float[Tensor, "outputs #C"], x: Float[Tensor, "inputs C"], out: Tensor | None = None
    ) -> Float[Tensor, "outputs C"]:
        """``base + matrix @ x``, in one pass over memory (into ``out``) where nothing is differentiated."""
        if _differentiated(x) or _differentiated(base) or base.shape[1] != x.shape[1]:
            return base + self.apply(x)
        return torch.addmm(base, self.matrix, x, out=out)

    def adjoint_plus(self, base: Float[Tensor, "inputs C"], y: Float[Tensor, "outputs C"]) -> Float[Tensor, "inputs C"]:
        """``base + matrix.T @ y``, likewise."""
        if _differentiated(base) or _differentiated(y):
            return base + self.adjoint(y)
        return torch.addmm(base, self.transposed, y)

    def __getstate__(self) -> dict[str, Any]:
        # Cached matrices are rebuilt on demand: CSR tensors make pickles large and warn when they are read.
        return {name: x for name, x in super().__getstate__().items() if name not in ("matrix", "transposed")}


class TransitionMap(SparseMap):
    """P(s'|s,a) as a map ``[S] -> [S * A]``, row ``s * A + a``, possibly scaled by a discount."""

    @property
    def num_states(self) -> int:
        """S."""
        return self.shape[1]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.shape[0] // self.shape[1]

    @cached_property
    def state(self) -> Int[Tensor, " nnz"]:
        """Entry -> state left, ``row // A``."""
        return torch.div(self.row, self.num_actions, rounding_mode="floor")

    @cached_property
    def place(self) -> Int[Tensor, " nnz"]:
        """Entry -> its place in a flattened matrix of states, ``state * S + column``."""
        return self.state * self.num_states + self.column

    @cached_property
    def pattern(self) -> tuple[Tensor, Tensor, SparseMap, SparseMap, SparseMap]:
        """Pairs (s, s') joined by some entry: their s, their s', and sums of entries by pair, of pairs by s and s'."""
        place, pair = torch.unique(self.place, return_inverse=True)
        state, column = torch.div(place, self.num_states, rounding_mode="floor"), place % self.num_states

        def sums(group: Tensor, groups: int) -> SparseMap:
            order = torch.argsort(group, stable=True)
            return SparseMap(group[order], order, self.value.new_ones(len(order)), (groups, len(order)))

        return state, column, sums(pair, len(place)), sums(state, self.num_states), sums(column, self.num_states)

    @cached_property
    def eliminations(self) -> tuple[Elimination | None, Elimination | None]:
        """How ``I - M`` with these entries is eliminated, and its transpose; None where a dense solve is cheaper."""
        state, column = self.pattern[:2]
        budget = _dense_cost(self.num_states, MANY) / 2  # a single chain takes longer: it must be worth it
        return (
            find_elimination(state, column, self.num_states, budget),
            find_elimination(column, state, self.num_states, budget),
        )

    @cached_property
    def row_count(self) -> Int[Tensor, " SA"]:
        """Number of entries of each row."""
        return torch.bincount(self.row, minlength=self.shape[0])

    def expect(self, x: Float[Tensor, "S C"]) -> Float[Tensor, "SA C"]:
        """``sum_s' P(s'|s,a) x(s')`` for every pair (s, a)."""
        return self.apply(x)

    def flow(self, y: Float[Tensor, "SA C"]) -> Float[Tensor, "S C"]:
        """``sum_{s,a} y(s,a) P(s'|s,a)`` for every next state: the transpose of :meth:`expect`."""
        return self.adjoint(y)

    def rows(self, pair: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """The entries of n listed rows: (position in the list, entry), in order."""
        count = self.row_count[pair]
        position = torch.repeat_interleave(torch.arange(len(pair), device=pair.device), count)
        first = (self.row_count.cumsum(0) - self.row_count)[pair] - (count.cumsum(0) - count)
        return position, torch.arange(len(position), device=pair.device) + first[position]


@runtime_checkable
class Dynamics(Protocol):
    """What the recursions, planning and validation need of a decision problem; :class:`pirl.TabularMDP` has it."""

    @property
    def transitions(self) -> TransitionMap:
        """P(s'|s,a) of pairs that act."""

    @property
    def log_prior(self) -> Float[Tensor, "S A"]:
        """log p(a|s)."""

    @property
    def acts(self) -> Bool[Tensor, "S A"]:
        """Pairs that a decision can lead to."""

    @property
    def terminal(self) -> Bool[Tensor, " S"]:
        """States where episodes end."""

    @property
    def initial(self) -> Float[Tensor, " S"]:
        """p(s_1)."""

    @property
    def discount(self) -> float:
        """g."""

    @property
    def horizon(self) -> int | None:
        """Number of decisions, or None."""

    @property
    def memo(self) -> dict[Any, Any]:
        """Room for what is derived from the tables once."""

    def check_reward(self, reward: Tensor) -> Float[Tensor, "*batch S A"]:
        """Broadcast a reward to ``[*batch, S, A]``, or refuse it."""

    def probability(self, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """P(s'|s,a) of listed transitions."""


def is_transformed(x: Tensor) -> bool:
    """Whether a torch.func transform is at work, under which values cannot be looked at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _differentiated(x: Tensor) -> bool:
    """Whether autograd or a transform watches; otherwise a Function's overhead buys nothing."""
    return x.requires_grad or is_transformed(x)


def _matrix(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    if value.numel() > _DENSE_ABOVE * shape[0] * shape[1]:
        return torch.zeros(shape, dtype=value.dtype, device=value.device).index_put(
            (row, column), value, accumulate=True
        )
    counts = torch.bincount(row, minlength=shape[0])
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with warnings.catch_warnings():
        # torch announces once a process that CSR is "in beta"; users of pirl can do nothing about it.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(crow, column, value, shape, device=value.device, check_invariants=False)


@torch.library.custom_op("pirl::product", mutates_args=(), schema="(Tensor x, int linear, bool transpose) -> Tensor")
def _product(x: Tensor, linear: int, transpose: bool) -> Tensor:
    known = Numbered.find(linear)
    return (known.transposed if transpose else known.matrix) @ x


@_product.register_fake
def _(x: Tensor, linear: int, transpose: bool) -> Tensor:
    return x.new_empty(Numbered.find(linear).shape[1 if transpose else 0], x.shape[1])


class _Product(Function):
    """``matrix @ x`` or ``transposed @ x``; each is the other's derivative."""

    @staticmethod
    def forward(x: Tensor, linear: SparseMap, transpose: bool) -> Tensor:
        return _product(x, linear.number, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.linear, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Product.apply(grad, ctx.linear, not ctx.transpose), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, linear: SparseMap, transpose: bool) -> Any:
        x = x.movedim(in_dims[0], -1)
        result = _Product.apply(x.flatten(1), linear, transpose)
        return result.unflatten(1, x.shape[1:]), 2


def solve_system(
    transitions: TransitionMap, weight: Float[Tensor, "nnz C"], b: Float[Tensor, "S C"], transpose: bool = False
) -> Float[Tensor, "S C"]:
    """Solve ``(I - M) x = b``, or with its transpose, where ``M[s, s'] = sum of weight`` over the entries from s to s'.

    A chain whose system is singular gets non-finite values, alone. Differentiable in ``weight`` and ``b`` by the
    implicit function theorem, whatever method solved it.
    """
    if _differentiated(weight) or _differentiated(b):
        return _Solve.apply(weight, b, transitions, transpose)
    return _solve(transitions, weight, b, transpose)


def _solve(transitions: TransitionMap, weight: Tensor, b: Tensor, transpose: bool) -> Tensor:
    if transitions.num_states <= DENSE_STATES:
        # Elimination is hundreds of small operations, each a launch on a GPU. Whether it is used does not depend on the
        # number of chains: near g = 1 two methods differ by more than rounding, and one chain must get what many get.
        order = transitions.eliminations[transpose] if b.device.type == "cpu" else None
        if order is not None:
            return order.solve(transitions.pattern[2].apply(weight), b)
        return _solve_dense(transitions, weight, b, transpose)
    x = _solve_iterated(transitions, weight, b, transpose)
    left = x[0].isnan().nonzero().flatten()
    if len(left):
        x[:, left] = _solve_sparse(transitions, weight[:, left], b[:, left], transpose)
    return x


class _Solve(Function):
    @staticmethod
    def forward(weight: Tensor, b: Tensor, transitions: TransitionMap, transpose: bool) -> Tensor:
        return _solve(transitions, weight, b, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, ctx.transitions, ctx.transpose = inputs
        ctx.save_for_backward(weight, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, x = ctx.saved_tensors
        dual = _Solve.apply(weight, grad, ctx.transitions, not ctx.transpose)
        left, right = (x, dual) if ctx.transpose else (dual, x)
        # (I - M) x = b  =>  dx = (I - M)^-1 dM x, so the derivative in M[s, s'] is dual(s) x(s').
        return left[ctx.transitions.state] * right[ctx.transitions.column], dual, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], weight: Tensor, b: Tensor, transitions: TransitionMap, transpose: bool
    ) -> Any:
        weight, b = (_batch_last(x, dim, info.batch_size) for x, dim in zip((weight, b), in_dims[:2], strict=True))
        chains, batch = b.shape[1:]
        x = _Solve.apply(weight.flatten(1), b.flatten(1), transitions, transpose)
        return x.reshape(-1, chains, batch), 2


def _batch_last(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.unsqueeze(-1).expand(*x.shape, size) if dim is None else x.movedim(dim, -1)


def _dense_cost(states: int, chains: int) -> float:
    """Microseconds that dense solves are expected to take on a CPU (measured)."""
    return 100.0 + (0.01 * states**2 + 1.5e-4 * states**3) * chains


def _solve_dense(transitions: TransitionMap, weight: Tensor, b: Tensor, transpose: bool) -> Tensor:
    states, chains = b.shape
    state, column, by_pair = transitions.pattern[:3]
    # Column after column, as LAPACK wants it.
    place = state * states + column if transpose else column * states + state
    m = by_pair.apply(weight).t()
    block = max(1, _SOLVE_BYTES // (states * states * b.element_size()))
    x = torch.empty_like(b)
    for start in range(0, chains, block):
        part = slice(start, start + block)
        system = m.new_zeros(len(m[part]), states * states)
        system[:, :: states + 1] = 1.0
        system[:, place] -= m[part]
        found, info = torch.linalg.solve_ex(system.unflatten(1, (states, states)).mT, b[:, part].t().unsqueeze(-1))
        x[:, part] = found.squeeze(-1).masked_fill_((info != 0)[:, None], torch.nan).t()
    return x


def _solve_iterated(transitions: TransitionMap, weight: Tensor, b: Tensor, transpose: bool) -> Tensor:
    """``x = b + M x`` for all chains at once, to rounding error; NaN where M contracts too slowly."""
    state, column, by_pair, by_state, by_column = transitions.pattern
    m = by_pair.apply(weight)
    rate = by_state.apply(m.abs()).amax(0)
    chains = ((rate <= FAST_RATE) & b.isfinite().all(0)).nonzero().flatten()
    m, b, result = m[:, chains], b[:, chains], torch.full_like(b, torch.nan)
    source, total = (state, by_column) if transpose else (column, by_state)
    x, done = b, torch.zeros_like(chains, dtype=torch.bool)
    for _ in range(_MAX_PRODUCTS if len(chains) else 0):
        update = total.apply_plus(b, m * x[source])
        settled = (update - x).abs().amax(0) <= 4 * torch.finfo(b.dtype).eps * update.abs().amax(0)
        x, done = torch.where(done, x, update), done | settled
        if bool(done.all()):
            break
    result[:, chains] = torch.where(done, x, torch.nan)
    return result


def _solve_sparse(transitions: TransitionMap, weight: Tensor, b: Tensor, transpose: bool) -> Tensor:
    """Sparse LU, one chain at a time, on the CPU (torch has none); a GPU pays the two copies."""
    import numpy as np
    from scipy.sparse import coo_matrix, identity
    from scipy.sparse.linalg import splu

    states, chains = b.shape
    index = (transitions.state.cpu().numpy(), transitions.column.cpu().numpy())
    values, right = weight.detach().cpu().numpy(), b.detach().cpu().numpy()
    x = np.full(right.shape, np.nan, dtype=right.dtype)
    for chain in range(chains):
        if not (np.isfinite(values[:, chain]).all() and np.isfinite(right[:, chain]).all()):
            continue
        flow = coo_matrix((values[:, chain], index), shape=(states, states))
        try:
            factor = splu((identity(states, format="csc") - flow.tocsc()).astype(right.dtype))
        except RuntimeError:  # "Factor is exactly singular"
            continue
        x[:, chain] = factor.solve(right[:, chain], trans="T" if transpose else "N")
    return torch.from_numpy(x).to(b)


def scatter_max(source: Float[Tensor, "nnz C"], index: Int[Tensor, " nnz"], size: int) -> Float[Tensor, "size C"]:
    """The largest entry of each group; -inf for an empty one."""
    full = index.unsqueeze(-1).expand_as(source)
    return source.new_full((size, source.shape[1]), -torch.inf).scatter_reduce(0, full, source, "amax")
