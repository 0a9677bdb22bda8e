"""Sparse Gaussian elimination of many matrices that share one pattern: who is eliminated when is found once.

Of a decision problem each state leads to a few others, whatever the policy, so that ``I - M`` has the same few entries
for every chain and at every step of a Newton iteration. An order of elimination that keeps them few is looked for once
(Markowitz 1957); from then on a solve is some hundred operations on rows ``[C]``, all chains at a time, in place of a
dense factorisation of each.

There is no pivoting. ``I - M`` with ``M >= 0`` and spectral radius below 1 is an M-matrix, whose pivots are positive in
any order, and which is eliminated without growth (Funderlic and Plemmons 1981); where a pivot is not positive the
spectral radius is 1 or more, and the answer is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SLACKS = (1, 2, 4)
"""Pivots are eliminated at once that make at most so many times the fewest products: fewer levels, but more fill."""

LEVEL_COST, PRODUCT_COST, CHAIN_COST = 65.0, 0.2, 0.0072
"""Microseconds of a level and of a product, whatever their size, and of each chain in a product (measured on a CPU)."""

MANY = 256
"""Chains for which an order is chosen."""


@dataclass(frozen=True)
class _Level:
    """Pivots that do not meet each other, as slices of the entries and places among them."""

    pivot: slice
    below: slice
    """Entries of the pivots' columns, column after column."""
    right: slice
    """Entries of the pivots' rows, row after row."""
    side: slice
    """Their right-hand sides."""
    below_owner: Int[Tensor, " b"]
    """Entry below -> its pivot, counted from the first of the level."""
    right_owner: Int[Tensor, " r"]
    right_solution: Int[Tensor, " r"]
    """Entry right -> where its column's solution will stand."""
    left_factor: Int[Tensor, " p"]
    """Product -> its entry below, counted from the first of the level."""
    right_factor: Int[Tensor, " p"]
    """Product -> its entry right or right-hand side, counted likewise."""
    target: Int[Tensor, " p"]
    """Product -> the entry that it is taken from."""


@dataclass(frozen=True)
class Elimination:
    """An order of elimination for matrices ``[S, S]`` of one pattern.

    Args:
        levels: what is done, in this order.
        size: number of entries, right-hand sides included.
        entry: entry of the pattern -> where it stands.
        diagonal: state -> where its diagonal entry stands.
        side: state -> where its right-hand side, and then its solution, stands.
        products: how many there are in all.

    Example:
        >>> import torch
        >>> from pirl.elimination import find_elimination
        >>> elimination = find_elimination(torch.tensor([0, 1]), torch.tensor([1, 0]), num_states=2, budget=1e4)
        >>> m = torch.tensor([[0.5], [0.5]])  # M = [[0, .5], [.5, 0]], one chain
        >>> elimination.solve(m, torch.tensor([[0.5], [0.5]])).flatten()
        tensor([1., 1.])
    """

    levels: tuple[_Level, ...]
    size: int
    entry: Int[Tensor, " nnz"]
    diagonal: Int[Tensor, " S"]
    side: Int[Tensor, " S"]
    products: int

    def cost(self, chains: int) -> float:
        """Microseconds that a solve is expected to take."""
        return _cost(len(self.levels), self.products, chains)

    def solve(self, m: Float[Tensor, "nnz C"], b: Float[Tensor, "S C"]) -> Float[Tensor, "S C"]:
        """Solve ``(I - M) x = b``; a chain with a pivot that is not positive, or without a finite solution, is NaN."""
        table = m.new_zeros(self.size, m.shape[1])
        table[self.diagonal] = 1.0
        table[self.side] = b
        table.index_add_(0, self.entry, m, alpha=-1)
        for level in self.levels:
            below = table[level.below]
            below /= table[level.pivot][level.below_owner]
            right = table[level.right.start : level.side.stop]
            table.index_add_(0, level.target, below[level.left_factor] * right[level.right_factor], alpha=-1)
        for level in reversed(self.levels):
            side = table[level.side]
            known = table[level.right] * table[level.right_solution]
            side.index_add_(0, level.right_owner, known, alpha=-1)
            side /= table[level.pivot]
        x = table[self.side]
        sound = (table[self.diagonal] > 0).all(0) & x.isfinite().all(0)
        return torch.where(sound, x, torch.nan)


def find_elimination(
    row: Int[Tensor, " nnz"], column: Int[Tensor, " nnz"], num_states: int, budget: float
) -> Elimination | None:
    """The cheapest order for ``MANY`` chains that was found; None where each costs more than ``budget`` microseconds.

    Args:
        row, column: of the entries of M, each pair once.
        num_states: S.
        budget: what a solve may cost.

    Example:
        >>> import torch
        >>> from pirl.elimination import find_elimination
        >>> row, column = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 2])  # a chain that leads to a state that stays
        >>> elimination = find_elimination(row, column, num_states=3, budget=1e4)
        >>> len(elimination.levels), elimination.products
        (2, 1)
    """
    place = list(zip(row.tolist(), column.tolist(), strict=True))
    best: list[list[_Pivot]] | None = None
    for slack in SLACKS:
        found = _order(place, num_states, slack, budget)
        if found is not None:
            best, budget = found, _cost(len(found), _products(found), MANY)
    return None if best is None else _laid_out(best, place, num_states, row.device)


@dataclass(frozen=True)
class _Pivot:
    state: int
    below: Sequence[int]
    """Rows of its column that are not eliminated yet."""
    right: Sequence[int]


def _order(place: list[tuple[int, int]], num_states: int, slack: int, budget: float) -> list[list[_Pivot]] | None:
    """Levels of pivots that do not meet, cheapest first; None as soon as they cost more than the budget."""
    right: list[set[int]] = [set() for _ in range(num_states)]
    below: list[set[int]] = [set() for _ in range(num_states)]
    for i, j in place:
        if i != j:
            right[i].add(j)
            below[j].add(i)
    left, levels, cost = set(range(num_states)), list[list[_Pivot]](), 0.0
    while left:
        products = {k: len(below[k]) * (len(right[k]) + 1) for k in left}
        most = slack * max(1, min(products.values()))
        level, met = list[_Pivot](), set[int]()
        for k in sorted(left, key=lambda k: (products[k], k)):
            if products[k] > most:
                break
            if k not in met:
                level.append(_Pivot(k, sorted(below[k]), sorted(right[k])))
                met |= below[k] | right[k]
        cost += _cost(1, _products([level]), MANY)
        if cost > budget:
            return None
        for pivot in level:
            k = pivot.state
            left.remove(k)
            for i in pivot.below:
                right[i] |= right[k]
                right[i] -= {i, k}
            for j in pivot.right:
                below[j] |= below[k]
                below[j] -= {j, k}
        levels.append(level)
    return levels


def _products(levels: Sequence[Sequence[_Pivot]]) -> int:
    return sum(len(pivot.below) * (len(pivot.right) + 1) for level in levels for pivot in level)


def _cost(levels: int, products: int, chains: int) -> float:
    return LEVEL_COST * levels + (PRODUCT_COST + CHAIN_COST * chains) * products


def _laid_out(
    levels: list[list[_Pivot]], place: list[tuple[int, int]], num_states: int, device: torch.device
) -> Elimination:
    """Give each entry a place, level after level, so that a level's entries are slices."""
    where = dict[tuple[int, int], int]()
    side = num_states  # the right-hand sides are one more column
    slices = list[tuple[slice, slice, slice, slice]]()
    for level in levels:
        ends = [len(where)]
        for keys in (
            [(pivot.state, pivot.state) for pivot in level],
            [(i, pivot.state) for pivot in level for i in pivot.below],
            [(pivot.state, j) for pivot in level for j in pivot.right],
            [(pivot.state, side) for pivot in level],
        ):
            where |= {key: len(where) + n for n, key in enumerate(keys)}
            ends.append(len(where))
        slices.append(tuple(slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)))  # type: ignore[arg-type]

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    steps, total = list[_Level](), 0
    for level, (pivot, below, right, sides) in zip(levels, slices, strict=True):
        products = [
            (where[i, p.state] - below.start, where[p.state, j] - right.start, where[i, j])
            for p in level for i in p.below for j in (*p.right, side)
        ]  # fmt: skip
        total += len(products)
        owner = {p.state: n for n, p in enumerate(level)}
        columns = [(owner[p.state], j) for p in level for j in p.right]
        steps.append(
            _Level(
                pivot, below, right, sides,
                below_owner=index([owner[p.state] for p in level for _ in p.below]),
                right_owner=index([n for n, _ in columns]),
                right_solution=index([where[j, side] for _, j in columns]),
                left_factor=index([x for x, _, _ in products]),
                right_factor=index([x for _, x, _ in products]),
                target=index([x for _, _, x in products]),
            )
        )  # fmt: skip
    states = range(num_states)
    return Elimination(
        tuple(steps), len(where), index([where[key] for key in place]), index([where[s, s] for s in states]),
        index([where[s, side] for s in states]), total,
    )  # fmt: skip
