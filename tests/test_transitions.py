"""Linear maps over a transition table, against dense matrices and their solves."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from pirl import transitions
from pirl.transitions import SparseMap, TransitionMap, scatter_max, solve_system
from tests import oracle
from tests.draws import normal

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def listed(matrix: Tensor, kind: type[SparseMap] = SparseMap) -> Any:
    row, column = matrix.nonzero(as_tuple=True)
    return kind(row, column, matrix[row, column], tuple(matrix.shape))


def some_matrix(share: float) -> Tensor:
    """10 x 6, about ``share`` of it not zero, with one row and one column of zeros."""
    matrix = normal(10, 6) * (torch.rand(10, 6, generator=torch.Generator().manual_seed(1)) < share)
    matrix[4], matrix[:, 2] = 0.0, 0.0
    return matrix


# ------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize(("share", "layout"), [(0.9, torch.strided), (0.15, torch.sparse_csr), (0.0, torch.sparse_csr)])
def test_a_map_is_its_matrix(share: float, layout: torch.layout) -> None:
    matrix = some_matrix(share)
    linear = listed(matrix)
    assert linear.matrix.layout == linear.transposed.layout == layout
    x, y = normal(6, 3), normal(10, 3)
    torch.testing.assert_close(linear.apply(x), matrix @ x, **EXACT)
    torch.testing.assert_close(linear.adjoint(y), matrix.T @ y, **EXACT)
    torch.testing.assert_close((linear.apply(x) * y).sum(), (x * linear.adjoint(y)).sum(), **EXACT)


@pytest.mark.parametrize("share", [0.9, 0.15])
def test_products_in_one_pass_are_sums(share: float) -> None:
    linear = listed(some_matrix(share))
    x, y, room = normal(6, 3), normal(10, 3, seed=1), normal(10, 3, seed=2)
    torch.testing.assert_close(linear.apply_plus(y, x), y + linear.apply(x), **EXACT)
    torch.testing.assert_close(linear.adjoint_plus(x, y), x + linear.adjoint(y), **EXACT)
    assert linear.apply_plus(y, x, room).data_ptr() == room.data_ptr()
    torch.testing.assert_close(room, y + linear.apply(x), **EXACT)
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: linear.apply_plus(y, x), y)
    assert torch.autograd.gradcheck(lambda y: linear.adjoint_plus(x, y), y)


def test_entries_of_one_place_add_up() -> None:
    row, column = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])
    value = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for columns in (2, 40):  # dense, then sparse
        linear = SparseMap(row, column, value, (2, columns))
        x = torch.zeros(columns, 1, dtype=torch.float64)
        x[0], x[1] = 10.0, 1.0
        assert linear.apply(x).flatten().tolist() == [3.0, 40.0]
        assert linear.adjoint(torch.ones(2, 1, dtype=torch.float64))[:2].flatten().tolist() == [4.0, 3.0]


@pytest.mark.parametrize("share", [0.9, 0.15])
def test_products_are_differentiable_twice_and_under_vmap(share: float) -> None:
    matrix = some_matrix(share)
    linear = listed(matrix)
    x, y = normal(6, 2).requires_grad_(), normal(10, 2).requires_grad_()
    for product, argument in ((linear.apply, x), (linear.adjoint, y)):
        assert torch.autograd.gradcheck(product, argument, atol=1e-8)
        # The square makes the second derivative more than zero.
        assert torch.autograd.gradgradcheck(lambda z, f=product: f(z) ** 2, argument, atol=1e-8)
    batch = normal(2, 6, 5, 3)
    nested = torch.func.vmap(torch.func.vmap(linear.apply, in_dims=1, out_dims=1))(batch)
    torch.testing.assert_close(nested, torch.einsum("ij,bjkc->bikc", matrix, batch), **EXACT)

    def energy(z: Tensor) -> Tensor:
        return linear.apply(z.unsqueeze(1)).square().sum()

    hessian = torch.func.jacrev(torch.func.grad(energy))
    torch.testing.assert_close(hessian(batch[0, :, 0, 0]), 2 * matrix.T @ matrix, **EXACT)
    many = torch.func.vmap(torch.func.grad(energy))(batch[0, :, :, 0].T)
    torch.testing.assert_close(many, 2 * batch[0, :, :, 0].T @ matrix.T @ matrix, **EXACT)


def test_a_transition_map_by_rows() -> None:
    mdp = oracle.random_mdp(0, states=4, actions=3, horizon=1, terminal=[2])
    table = (mdp.transition * ~mdp.terminal[:, None, None]).reshape(12, 4)
    whole = listed(table, TransitionMap)
    assert (whole.num_states, whole.num_actions) == (4, 3)
    assert whole.state.equal(whole.row // 3)
    assert whole.row_count.equal((table > 0).sum(1))
    value, weight = normal(4, 2), normal(12, 2)
    torch.testing.assert_close(whole.expect(value), table @ value, **EXACT)
    torch.testing.assert_close(whole.flow(weight), table.T @ weight, **EXACT)
    pairs = torch.tensor([3, 0, 7, 3, 11])  # 7 is a pair of the terminal state: no entries
    position, entry = whole.rows(pairs)
    rebuilt = torch.zeros(5, 4, dtype=torch.float64)
    rebuilt[position, whole.column[entry]] = whole.value[entry]
    assert rebuilt.equal(table[pairs])
    assert all(len(x) == 0 for x in whole.rows(pairs[:0]))


def test_a_pickle_leaves_the_matrices_behind() -> None:
    linear = listed(some_matrix(0.15))
    x = normal(6, 2)
    before = linear.apply(x)
    other = pickle.loads(pickle.dumps(linear))
    assert "matrix" in vars(linear) and "matrix" not in vars(other)
    assert other.apply(x).equal(before)


def test_the_largest_of_each_group() -> None:
    source = torch.tensor([[1.0, -5.0], [3.0, -7.0], [2.0, -torch.inf]], dtype=torch.float64)
    largest = scatter_max(source, torch.tensor([2, 2, 0]), 3)
    assert largest.tolist() == [[2.0, -torch.inf], [-torch.inf, -torch.inf], [3.0, -5.0]]


# ------------------------------------------------------------------------------------------------ solves

MDP = oracle.random_mdp(1, states=5, actions=2, discount=0.9)


def weights(chains: int, seed: int = 0) -> Tensor:
    """Weights of entries [nnz, chains]: random policies, with a discount of .2 in them."""
    policy = normal(5, 2, chains, seed=seed).softmax(1)
    return 0.2 * policy.flatten(0, 1)[MDP.transitions.row] * MDP.transitions.value.unsqueeze(-1)


def systems(weight: Tensor) -> Tensor:
    """I - M of each chain, entry by entry: [chains, S, S]."""
    matrix = torch.zeros(weight.shape[1], 5, 5, dtype=weight.dtype)
    for entry, (s, n) in enumerate(zip(MDP.transitions.state.tolist(), MDP.transitions.column.tolist(), strict=True)):
        matrix[:, s, n] += weight[entry].detach()
    return torch.eye(5, dtype=weight.dtype) - matrix


@pytest.fixture(params=["dense", "blocks", "sparse", "iterated", "stalled"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All chains by one dense LU, two chains at a time, each by a sparse LU, or by products, which may not converge."""
    if request.param == "blocks":
        monkeypatch.setattr(transitions, "_SOLVE_BYTES", 2 * 5 * 5 * 8)
    if request.param in ("sparse", "iterated", "stalled"):
        monkeypatch.setattr(transitions, "DENSE_STATES", 4)
    if request.param == "sparse":
        monkeypatch.setattr(transitions, "FAST_RATE", 0.0)
    if request.param == "stalled":
        monkeypatch.setattr(transitions, "_MAX_PRODUCTS", 3)
    return request.param


@pytest.mark.parametrize("transpose", [False, True])
def test_a_solve_is_the_solve_of_each_chain(method: str, transpose: bool) -> None:
    weight, b = weights(7), normal(5, 7, seed=1)
    system = systems(weight)
    expected = torch.linalg.solve(system.mT if transpose else system, b.T.unsqueeze(-1)).squeeze(-1).T
    torch.testing.assert_close(solve_system(MDP.transitions, weight, b, transpose), expected, **EXACT)


@pytest.mark.parametrize("transpose", [False, True])
def test_only_fast_chains_are_iterated_and_they_reach_rounding_error(
    transpose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = oracle.random_mdp(3, states=60, actions=3, discount=0.9).transitions
    b, share = normal(60, 4, seed=1), torch.tensor([0.9, 0.0, 0.999, 0.98], dtype=torch.float64)
    weight = share * normal(60, 3, 4).softmax(1).flatten(0, 1)[many.row] * many.value.unsqueeze(-1)
    b[0, 3] = torch.nan
    found = transitions._solve_iterated(many, weight, b, transpose)
    assert found.isnan().all(0).tolist() == [False, False, True, True]
    right = transitions._solve_dense(many, weight, b, transpose)
    torch.testing.assert_close(found[:, :2], right[:, :2], **EXACT)
    monkeypatch.setattr(transitions, "_MAX_PRODUCTS", 10)
    assert transitions._solve_iterated(many, weight, b, transpose)[:, 0].isnan().all()


@pytest.mark.parametrize("transpose", [False, True])
def test_a_solve_is_differentiable_twice_in_weights_and_right_side(method: str, transpose: bool) -> None:
    weight, b = weights(3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()

    def solve(weight: Tensor, b: Tensor) -> Tensor:
        return solve_system(MDP.transitions, weight, b, transpose)

    assert torch.autograd.gradcheck(solve, (weight, b), atol=1e-8)
    assert torch.autograd.gradgradcheck(solve, (weight, b), atol=1e-7)


@pytest.mark.parametrize("transpose", [False, True])
def test_a_solve_under_vmap_is_looped(method: str, transpose: bool) -> None:
    weight, b = torch.stack([weights(2, seed) for seed in range(3)]), normal(3, 5, 2)

    def solve(weight: Tensor, b: Tensor) -> Tensor:
        return solve_system(MDP.transitions, weight, b, transpose)

    looped = torch.stack([solve(w, x) for w, x in zip(weight, b, strict=True)])
    torch.testing.assert_close(torch.func.vmap(solve)(weight, b), looped, **EXACT)
    # One system for all right sides, one right side for all systems, and gradients of each.
    shared = torch.func.vmap(solve, in_dims=(None, 0))(weight[0], b)
    torch.testing.assert_close(shared, torch.stack([solve(weight[0], x) for x in b]), **EXACT)
    shared = torch.func.vmap(solve, in_dims=(1, None))(weight.movedim(0, 1), b[0])
    torch.testing.assert_close(shared, torch.stack([solve(w, b[0]) for w in weight]), **EXACT)
    slope = torch.func.grad(lambda w, x: solve(w, x).square().sum())
    torch.testing.assert_close(
        torch.func.vmap(slope)(weight, b), torch.stack([slope(w, x) for w, x in zip(weight, b, strict=True)]), **EXACT
    )


@pytest.mark.parametrize("trouble", ["singular", "nan"])
def test_a_chain_without_a_solution_is_nan_alone(method: str, trouble: str) -> None:
    weight, b = weights(3), normal(5, 3, seed=1)
    right = solve_system(MDP.transitions, weight, b)
    if trouble == "singular":  # state 0 stays for ever, exactly
        leaving, stays = MDP.transitions.state == 0, (MDP.transitions.state == 0) & (MDP.transitions.column == 0)
        weight[leaving, 1], weight[stays.nonzero()[0], 1] = 0.0, 1.0
    else:
        weight[0, 1] = torch.nan
    found = solve_system(MDP.transitions, weight, b)
    assert not found[:, 1].isfinite().any()
    torch.testing.assert_close(found[:, [0, 2]], right[:, [0, 2]], **EXACT)


def test_single_precision_stays_single(method: str) -> None:
    short = MDP.to(dtype=torch.float32)
    weight, b = weights(2).float(), normal(5, 2).float()
    found = solve_system(short.transitions, weight, b)
    assert found.dtype == torch.float32
    expected = solve_system(MDP.transitions, weights(2), normal(5, 2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
