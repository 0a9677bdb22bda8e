"""Sparse elimination of many matrices of one pattern, against dense solves of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pirl import elimination, envs
from pirl.elimination import Elimination, find_elimination
from pirl.mdp import TabularMDP
from pirl.transitions import solve_system

SMALL = 1e-11  # some hundred operations, and condition numbers up to 1/(1 - g) = 1e3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(states: int) -> TabularMDP:
    """On, two further, or back to one of the first three: like the bus engines."""
    table = torch.zeros(states, 2, states, dtype=torch.float64)
    for s in range(states):
        for step in (0, 1):
            table[s, 0, min(s + step, states - 1)] += 0.5
        table[s, 1, :3] = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    return TabularMDP(table, 0, discount=0.999)


def tree(depth: int) -> TabularMDP:
    """Down to either child, or up."""
    states = 2**depth - 1
    table = torch.zeros(states, 3, states, dtype=torch.float64)
    for s in range(states):
        for a, there in enumerate((2 * s + 1, 2 * s + 2, (s - 1) // 2)):
            table[s, a, there if 0 <= there < states else s] = 1.0
    return TabularMDP(table, 0, discount=0.999)


PROBLEMS = {
    "chain": chain(30), "tree": tree(5), "grid": envs.gridworld(6, 5, slip=0.2, discount=0.999),
    "dense": envs.random_mdp(9, 3, seed=0, discount=0.999), "one state": envs.random_mdp(1, 2, seed=0, discount=0.9),
}  # fmt: skip


def system(mdp: TabularMDP, chains: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of entries, of pairs of states, and the matrices I - M."""
    policy = normal(mdp.num_states, mdp.num_actions, chains, seed=seed).softmax(1)
    whole = mdp.transitions
    weight = policy.flatten(0, 1)[whole.row] * whole.value.unsqueeze(-1) * mdp.discount
    matrix = torch.zeros(chains, mdp.num_states, mdp.num_states, dtype=torch.float64)
    for entry, (s, n) in enumerate(zip(whole.state.tolist(), whole.column.tolist(), strict=True)):
        matrix[:, s, n] += weight[entry]
    return weight, whole.pattern[2].apply(weight), torch.eye(mdp.num_states, dtype=torch.float64) - matrix


def order(mdp: TabularMDP, transpose: bool = False) -> Elimination:
    state, column = mdp.transitions.pattern[:2]
    pair = (column, state) if transpose else (state, column)
    found = find_elimination(*pair, mdp.num_states, torch.inf)
    assert found is not None
    return found


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("slack", [1, 2, 100])
def test_it_is_the_solve_of_each_chain(name: str, transpose: bool, slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "SLACKS", (slack,))
    mdp = PROBLEMS[name]
    _, m, matrix = system(mdp, 6)
    b = normal(mdp.num_states, 6, seed=1)
    expected = torch.linalg.solve(matrix.mT if transpose else matrix, b.T.unsqueeze(-1)).squeeze(-1).T
    found = order(mdp, transpose).solve(m, b)
    torch.testing.assert_close(found, expected, rtol=SMALL, atol=SMALL * float(expected.abs().max()))


def test_trees_are_eliminated_without_fill_and_level_by_level() -> None:
    mdp = PROBLEMS["tree"]
    found = order(mdp)
    entries = 3 * mdp.num_states - 2 + mdp.num_states  # a diagonal, two ends of each edge, and the right-hand sides
    assert found.size == entries
    assert len(found.levels) <= 5
    chain_levels = len(order(PROBLEMS["chain"]).levels)
    assert chain_levels < 15  # half of the states that are left, each time, and not one after the other


def test_budget_and_cost() -> None:
    mdp = PROBLEMS["grid"]
    found = order(mdp)
    state, column = mdp.transitions.pattern[:2]
    assert find_elimination(state, column, 30, found.cost(elimination.MANY) * 1.001) is not None
    assert find_elimination(state, column, 30, found.cost(elimination.MANY) * 0.999) is None
    assert found.products == sum(len(level.target) for level in found.levels)


@pytest.mark.parametrize("trouble", ["singular", "growing", "nan", "inf"])
def test_a_chain_without_a_solution_is_nan_alone(trouble: str) -> None:
    mdp = PROBLEMS["grid"]
    _, m, _ = system(mdp, 3)
    b = normal(30, 3, seed=1)
    right = order(mdp).solve(m, b)
    if trouble == "inf":
        b[3, 1] = torch.inf
    else:
        # Without a discount; rho(M) > 1, where the solve is finite but is no sum over paths; not a number.
        share = {"singular": 1 / mdp.discount, "growing": 1.5, "nan": torch.nan}[trouble]
        m[:, 1] *= share
    found = order(mdp).solve(m, b)
    # What is singular but for rounding is found out by a pivot, or is beyond all bounds.
    assert not (found[:, 1].isfinite() & (found[:, 1].abs() < 1e9)).any()
    torch.testing.assert_close(found[:, [0, 2]], right[:, [0, 2]], rtol=0, atol=0)


def test_one_chain_gets_the_bits_that_many_get() -> None:
    for name in ("chain", "tree", "grid"):
        mdp = PROBLEMS[name]
        _, m, _ = system(mdp, 40)
        b = normal(mdp.num_states, 40, seed=1)
        alone = torch.cat([order(mdp).solve(m[:, [c]], b[:, [c]]) for c in range(40)], 1)
        assert order(mdp).solve(m, b).equal(alone)


def test_solves_take_it_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few entries, however many chains; else dense."""
    called = list[int]()
    original = Elimination.solve

    def solve(self: Any, m: Tensor, b: Tensor) -> Tensor:
        called.append(b.shape[1])
        return original(self, m, b)

    monkeypatch.setattr(Elimination, "solve", solve)
    mdp = chain(60)
    for chains in (1, 64):
        weight, _, matrix = system(mdp, chains)
        b = normal(60, chains, seed=1)
        for transpose in (False, True):
            found = solve_system(mdp.transitions, weight, b, transpose)
            expected = torch.linalg.solve(matrix.mT if transpose else matrix, b.T.unsqueeze(-1)).squeeze(-1).T
            torch.testing.assert_close(found, expected, rtol=SMALL, atol=SMALL * float(expected.abs().max()))
    assert called == [1, 1, 64, 64]
    assert PROBLEMS["dense"].transitions.eliminations == (None, None)
