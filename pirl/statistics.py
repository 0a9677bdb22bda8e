"""Sufficient statistics: a tabular likelihood sees demonstrations through counts only.

The log-likelihood of an episode is linear in the reward r and in the soft values V given them (both readings):

    causal       sum_t [ r(s_t,a_t) + g sum_s' P(s'|s_t,a_t) V_{k-1}(s') - V_k(s_t) ] + const
    trajectory   sum_t r(s_t,a_t) + V_end(s_end) - log Z + const

so it is two sparse products, whatever the number of episodes; summed over episodes, two dot products. Only a
trajectory-reading episode whose last state was not observed adds a term that is not linear, log sum_s' P(s'|s,a) exp
V(s').
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import HorizonError
from pirl.soft_values import SoftProblem
from pirl.transitions import SparseMap

_EXPANDED_AT_ONCE = 2**20
# Observation sites of one model times what each looks up; far more than any model has.
_MEMO_SIZE = 256


@dataclass(frozen=True, eq=False)
class RowLayout:
    """How batch dimensions of rewards meet those of observed episodes.

    A dimension in which both are larger than 1 (subjects, environments) is *aligned*: counts are kept per reward row.
    A dimension of the reward alone (particles, chains, draws) is *free*: it becomes the chain dimension of the
    products.
    """

    reward_batch: tuple[int, ...]
    value_batch: tuple[int, ...]

    @cached_property
    def _padded(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        dims = max(len(self.reward_batch), len(self.value_batch))
        pad = lambda shape: (1,) * (dims - len(shape)) + tuple(shape)  # noqa: E731
        return pad(self.reward_batch), pad(self.value_batch)

    @cached_property
    def aligned(self) -> tuple[int, ...]:
        """Aligned dimensions (of the padded shapes)."""
        return tuple(d for d, (r, v) in enumerate(zip(*self._padded, strict=True)) if r > 1 and v != 1)

    @cached_property
    def free(self) -> tuple[int, ...]:
        """Dimensions of the reward alone."""
        return tuple(d for d, (r, v) in enumerate(zip(*self._padded, strict=True)) if r > 1 and v == 1)

    @property
    def num_rows(self) -> int:
        """Number of reward rows that have counts of their own."""
        reward, _ = self._padded
        return math.prod(reward[d] for d in self.aligned)

    def row_of_episode(self, device: torch.device) -> Int[Tensor, " n"]:
        """Reward row of each (flattened) episode."""
        reward, value = self._padded
        shape = [reward[d] if d in self.aligned else 1 for d in range(len(reward))]
        return torch.arange(self.num_rows, device=device).reshape(shape).expand(value).reshape(-1)

    def inputs(self, x: Tensor, event_dims: int) -> Float[Tensor, "inputs C"]:
        """``[*reward_batch, *event]`` -> ``[rows * event, C]``."""
        reward, _ = self._padded
        event = x.shape[x.dim() - event_dims :]
        x = x.reshape((*reward, *event))
        others = [d for d in range(len(reward)) if d not in self.aligned and d not in self.free]
        order = [*self.aligned, *others, *range(len(reward), len(reward) + event_dims), *self.free]
        rows = self.num_rows * int(torch.Size(event).numel())
        return x.permute(order).reshape(rows, -1)

    def outputs(self, y: Float[Tensor, "n C"]) -> Tensor:
        """``[n, C]`` -> ``[*broadcast(reward_batch, value_batch)]``."""
        reward, value = self._padded
        y = y.reshape((*value, *(reward[d] for d in self.free)))
        dims = len(value)
        for place, d in enumerate(self.free):
            y = y.transpose(d, dims + place)
        return y.reshape(y.shape[:dims])


@dataclass(frozen=True, eq=False)
class Statistics:
    """Counts of one tensor of trajectories, for one problem and one layout of rewards.

    Inputs of the linear parts are indexed ``row * size + place``, where place is ``s * A + a`` for the reward, ``k *
    S + s`` for values (k decisions to go, or 0) and the number of a distinct horizon for log Z.
    """

    layout: RowLayout
    const: Float[Tensor, " n"]
    visits: SparseMap
    """episodes x (rows * S * A): visits to pairs."""
    value_entries: tuple[Tensor, Tensor, Tensor]
    """(episode, input, weight) of single values."""
    expected_entries: tuple[Tensor, Tensor, Tensor, Tensor]
    """(episode, row, decisions to go of the next state, pair) of expected next values (causal reading)."""
    open_ends: tuple[tuple[int, Tensor, Tensor], ...]
    """(decisions to go, episode, row * S * A + pair) of episodes without a last state (trajectory reading)."""
    partitions: SparseMap
    """episodes x (rows * distinct horizons): how often log Z is subtracted."""
    horizons: tuple[int, ...]
    """The distinct horizons; (0,) when the horizon is infinite."""
    num_values: int
    problem: SoftProblem = field(repr=False)

    @cached_property
    def values(self) -> SparseMap:
        """episodes x (rows * values): the linear part in V."""
        parts = [self.value_entries, *self._expanded()]
        episode, place, weight = (torch.cat(x) for x in zip(*parts, strict=True))
        return _sparse(episode, place, weight, (len(self.const), self.layout.num_rows * self.num_values))

    @cached_property
    def total_visits(self) -> SparseMap:
        """Column sums of :attr:`visits`."""
        return _row(self.const.new_zeros(self.visits.shape[1]).index_add(0, self.visits.column, self.visits.value))

    @cached_property
    def total_values(self) -> SparseMap:
        """Column sums of :attr:`values`, without its entries: memory O(T S), not O(N T S)."""
        total = self.const.new_zeros(self.layout.num_rows * self.num_values)
        for _, place, weight in (self.value_entries, *self._expanded()):
            total.index_add_(0, place, weight)
        return _row(total)

    @cached_property
    def total_partitions(self) -> Float[Tensor, " inputs"]:
        """Column sums of :attr:`partitions`."""
        return self.const.new_zeros(self.partitions.shape[1]).index_add(
            0, self.partitions.column, self.partitions.value
        )

    def _expanded(self) -> Any:
        """Expected next values as single entries, some rows of the transition table at a time."""
        transitions = self.problem.transitions
        episode, row, k, pair = self.expected_entries
        if not len(pair):
            return
        block = max(1, _EXPANDED_AT_ONCE // max(1, int(transitions.row_count.max())))
        for start in range(0, len(pair), block):
            cut = slice(start, start + block)
            position, entry = transitions.rows(pair[cut])
            place = (row[cut] * self.num_values + k[cut] * transitions.num_states)[position] + transitions.column[entry]
            yield episode[cut][position], place, transitions.value[entry]


@dataclass(frozen=True, eq=False)
class _Episodes:
    """One tensor of trajectories, taken apart; ``[n, slots]`` unless said otherwise."""

    state: Tensor
    pair: Tensor
    following: Tensor
    acting: Tensor
    """A decision is observed."""
    moving: Tensor
    """A decision and the state after it are observed."""
    episode: Tensor
    row: Tensor
    """Reward row ``[n]``."""
    length: Tensor
    """Decisions ``[n]``."""
    horizon: Tensor
    """Decisions that the demonstrator expected ``[n]``; 0 when the horizon is infinite."""
    to_go: Tensor
    """Decisions to go at each step, the index of its value; 0 when the horizon is infinite."""
    next_to_go: Tensor

    @classmethod
    def read(cls, value: Tensor, problem: SoftProblem, layout: RowLayout, horizons: Tensor | None) -> _Episodes:
        flat = value.reshape(-1, *value.shape[-2:])
        state, action = flat[..., 0], flat[..., 1]
        acting = action >= 0
        length = acting.sum(1)
        following = torch.nn.functional.pad(state[:, 1:], (0, 1), value=-1)
        horizon = torch.zeros_like(length) if horizons is None else horizons.contiguous()
        # Stationary values have no time: their only index is 0.
        finite = int(problem.horizon is not None)
        to_go = horizon.unsqueeze(1) - finite * torch.arange(flat.shape[1], device=flat.device)
        return cls(
            state=state,
            pair=state * problem.log_prior.shape[1] + action,
            following=following,
            acting=acting,
            moving=acting & (following >= 0),
            episode=torch.arange(len(flat), device=flat.device).unsqueeze(1).expand_as(state),
            row=layout.row_of_episode(flat.device),
            length=length,
            horizon=horizon,
            to_go=to_go,
            next_to_go=to_go - finite,
        )

    def __len__(self) -> int:
        return len(self.length)

    @property
    def begun(self) -> Tensor:
        """Episodes that are not blank ``[n]``."""
        return self.state[:, 0] >= 0

    @property
    def finished(self) -> Tensor:
        """Episodes whose last state is observed ``[n]``."""
        padded = torch.nn.functional.pad(self.state, (0, 1), value=-1)
        return padded.gather(1, self.length.unsqueeze(1)).squeeze(1) >= 0


def statistics(
    value: Int[Tensor, "*batch slots 2"],
    problem: SoftProblem,
    layout: RowLayout,
    *,
    log_start: Float[Tensor, " S"] | None,
    log_probability: Callable[[Tensor, Tensor, Tensor], Tensor],
    horizons: Int[Tensor, " n"] | None,
) -> Statistics:
    """Count one tensor of trajectories.

    Args:
        value: (state, action) of every step; (s, -1) a last state, (-1, -1) padding.
        problem: the recursion's problem; its horizon is the longest of all.
        layout: how rewards and episodes meet.
        log_start: log p(s_1), or None when starts are given (then Z is Z(s_1)).
        log_probability: function (s, a, s') -> log P(s'|s,a) of n transitions.
        horizons: horizon of each (flattened) episode; None when it is infinite.
    """
    num_states, num_actions = problem.log_prior.shape
    e = _Episodes.read(value, problem, layout, horizons)
    num_values = num_states * (1 if problem.horizon is None else problem.horizon + 1)
    place = e.row.unsqueeze(1) * num_values + e.to_go * num_states + e.state
    one = problem.log_prior.new_ones(len(e))

    def add(total: Tensor, episode: Tensor, terms: Tensor) -> Tensor:
        return total.index_add(0, episode, terms)

    action = e.pair - e.state * num_actions
    moved = log_probability(e.state[e.moving], action[e.moving], e.following[e.moving])
    const = add(torch.zeros_like(one), e.episode[e.acting], problem.log_prior.reshape(-1)[e.pair[e.acting]])
    const = add(const, e.episode[e.moving], moved)
    if log_start is not None:
        const = const + torch.where(e.begun, log_start[e.state[:, 0].clamp_min(0)], 0.0)

    none = e.length[:0]
    distinct = tuple(sorted(set(e.horizon.tolist())))
    subtracted = e.begun.nonzero().flatten() if problem.reading == "trajectory" and log_start is not None else none
    expected_entries = (none, none, none, none)
    open_ends: tuple[tuple[int, Tensor, Tensor], ...] = ()
    if problem.reading == "causal":
        value_entries = (e.episode[e.acting], place[e.acting], -one[e.episode[e.acting]])
        row = e.row.unsqueeze(1).expand_as(e.state)
        expected_entries = (e.episode[e.acting], row[e.acting], e.next_to_go[e.acting], e.pair[e.acting])
    else:
        ends = (e.begun & e.finished).nonzero().flatten()
        starts = e.begun.nonzero().flatten() if log_start is None else none
        opened = (e.begun & ~e.finished & (e.length > 0)).nonzero().flatten()
        if problem.stop > 0:  # an episode that shows no next state has stopped
            const = add(const, opened, math.log(problem.stop) * one[opened])
            const = add(const, e.episode[e.moving], math.log1p(-problem.stop) * one[e.episode[e.moving]])
            opened = none
        value_entries = (
            torch.cat([ends, starts]),
            torch.cat([place[ends, e.length[ends]], place[starts, 0]]),
            torch.cat([one[ends], -one[starts]]),
        )
        last = (opened, e.length[opened] - 1)
        left, pair = e.next_to_go[last], e.row[opened] * num_states * num_actions + e.pair[last]
        # With no decision left after the last one, what follows sums to 1: nothing to add.
        steps = [k for k in sorted(set(left.tolist())) if k > 0 or problem.horizon is None]
        open_ends = tuple((k, opened[left == k], pair[left == k]) for k in steps)
    return Statistics(
        layout=layout,
        const=const,
        visits=_sparse(
            e.episode[e.acting],
            (e.row.unsqueeze(1) * num_states * num_actions + e.pair)[e.acting],
            one[e.episode[e.acting]],
            (len(e), layout.num_rows * num_states * num_actions),
        ),
        value_entries=value_entries,
        expected_entries=expected_entries,
        open_ends=open_ends,
        partitions=_sparse(
            subtracted,
            e.row[subtracted] * len(distinct)
            + torch.searchsorted(torch.tensor(distinct, device=e.row.device), e.horizon)[subtracted],
            -one[subtracted],
            (len(e), layout.num_rows * len(distinct)),
        ),
        horizons=distinct,
        num_values=num_values,
        problem=problem,
    )


def _sparse(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> SparseMap:
    """Entries of the same place added up, sorted by row."""
    key, inverse = torch.unique(row * shape[1] + column, return_inverse=True)
    total = value.new_zeros(len(key)).index_add(0, inverse, value)
    return SparseMap(torch.div(key, shape[1], rounding_mode="floor"), key % shape[1], total, shape)


def memoised(memo: dict[Any, Any], key: tuple[Any, ...], tensors: tuple[Tensor | None, ...], compute: Any) -> Any:
    """``compute()``, remembered for as long as the very same tensors, unchanged, are asked about again."""
    if any(x is not None and x.is_inference() for x in tensors):  # nothing tells whether those were changed since
        return compute()
    table = memo.setdefault("statistics", {})
    full = (*key, *(None if x is None else (id(x), x._version) for x in tensors))
    held = table.get(full)
    if held is not None and all(
        x is None or (ref is not None and ref() is x) for x, ref in zip(tensors, held[0], strict=True)
    ):
        table[full] = table.pop(full)  # the last to be asked about is the last to go
        return held[1]
    result = compute()
    for old in [
        old for old, (tensors, _) in table.items() if any(ref is not None and ref() is None for ref in tensors)
    ]:
        table.pop(old)
    while len(table) >= _MEMO_SIZE:
        table.pop(next(iter(table)))
    table[full] = (tuple(None if x is None else weakref.ref(x) for x in tensors), result)
    return result


def known_horizon(own: Tensor | None, horizon: int | None) -> int | None:
    """The longest horizon that any episode knows.

    Raises:
        HorizonError: some episodes have a horizon of their own, and others none.
    """
    if own is None:
        return horizon
    if horizon is None and bool((own < 0).any()):
        raise HorizonError(
            "some episodes have their own horizon and the others none: give horizons for all, or an MDP with a horizon"
        )
    return max(int(own.max()), -1 if horizon is None else horizon)


def _row(total: Tensor) -> SparseMap:
    """A sum of weighed inputs as a map with one output: under vmap ``vector @ matrix`` would be an outer product."""
    column = total.nonzero().flatten()
    return SparseMap(torch.zeros_like(column), column, total[column], (1, len(total)))
