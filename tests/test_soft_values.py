"""The primitive V(r): its values against plain recursions, and its derivatives against everything that can check
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from pirl import soft_values as kernel
from pirl import stationary, transitions
from pirl.mdp import TabularMDP
from pirl.message_passing import soft_problem
from pirl.soft_values import SoftProblem, soft_values

KINDS = {
    "finite causal": ("causal", {"horizon": 4}),
    "finite discounted causal": ("causal", {"horizon": 4, "discount": 0.8}),
    "discounted causal": ("causal", {"discount": 0.9}),
    "absorbing causal": ("causal", {"terminal": [2]}),
    "finite trajectory": ("trajectory", {"horizon": 4}),
    "finite stopping trajectory": ("trajectory", {"horizon": 4, "discount": 0.8}),
    "finite absorbing causal": ("causal", {"horizon": 4, "terminal": [2]}),
    "finite absorbing trajectory": ("trajectory", {"horizon": 4, "terminal": [2]}),
    "stopping trajectory": ("trajectory", {"discount": 0.9}),
    "absorbing trajectory": ("trajectory", {"terminal": [2]}),
}
FINITE = [name for name, (_, options) in KINDS.items() if "horizon" in options]
STATIONARY = [name for name, (_, options) in KINDS.items() if "horizon" not in options]


def make(name: str, stochastic: bool = True, seed: int = 3, **more: object) -> tuple[TabularMDP, SoftProblem]:
    reading, options = KINDS[name]
    available = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    mdp = oracle.random_mdp(seed, 3, 3, stochastic, available=available, **{**options, **more})
    stopping = "geometric" if reading == "trajectory" and mdp.discount < 1 else None
    return mdp, soft_problem(mdp, reading, stopping=stopping)  # type: ignore[arg-type]


def problem_discount(name: str) -> float:
    """The discount that scales tolerances; 0 where values do not accumulate without end."""
    return float(KINDS[name][1].get("discount", 0.0))  # type: ignore[arg-type]


def rewards(*batch: int, shift: float = -1.5) -> Tensor:
    """Low enough for every undiscounted sum over paths to converge."""
    return torch.randn(*batch, 3, 3, dtype=torch.float64) + shift


def unrolled(reward: Tensor, problem: SoftProblem, steps: int) -> Tensor:
    """The recursion of the definition, with autograd through every step."""
    table = problem.transitions.matrix.to_dense() if problem.transitions.matrix.is_sparse_csr else None
    matrix = problem.transitions.matrix if table is None else table
    value = reward.new_zeros(reward.shape[0])
    for _ in range(steps):
        if problem.reading == "causal":
            following = matrix @ value
        else:
            ended = problem.ended.flatten()
            following = (matrix @ value.exp() + ended + (1 - ended) * problem.stop).log()
        value = torch.logsumexp(problem.log_prior + reward + following.reshape(reward.shape), -1)
    return value


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_equal_the_unrolled_recursion(name: str) -> None:
    _, problem = make(name)
    reward = rewards().requires_grad_()
    steps = problem.horizon or 2000
    slow = unrolled(reward, problem, steps)
    fast = soft_values(reward, problem)
    fast = fast if problem.horizon is None else fast[-1]
    cotangent = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)
    (expected,) = torch.autograd.grad(slow @ cotangent, reward)
    (found,) = torch.autograd.grad(fast @ cotangent, reward)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_first_and_second_derivatives(name: str) -> None:
    _, problem = make(name)
    reward = rewards(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: soft_values(r, problem), reward, atol=1e-8, rtol=1e-8, eps=1e-5)
    assert torch.autograd.gradgradcheck(lambda r: soft_values(r, problem), reward, atol=1e-8, rtol=1e-8, eps=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_hessian_by_torch_func_alone_and_under_vmap(name: str) -> None:
    _, problem = make(name)
    batch = rewards(3)

    def scalar(reward: Tensor) -> Tensor:
        return (soft_values(reward, problem) ** 2).sum()

    hessian = torch.func.jacrev(torch.func.grad(scalar))
    step = 1e-5 * torch.eye(9, dtype=torch.float64).reshape(9, 3, 3)
    gradient = torch.func.vmap(torch.func.grad(scalar))
    differences = (gradient(batch[0] + step) - gradient(batch[0] - step)) / 2e-5
    # Central differences: h^2/6 of the third derivative, and rounding eps/h.
    torch.testing.assert_close(hessian(batch[0]).reshape(9, 3, 3), differences, rtol=1e-6, atol=1e-6)
    together = torch.func.vmap(hessian)(batch)
    alone = torch.stack([hessian(reward) for reward in batch])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_batched_equals_looped_equals_vmapped(name: str) -> None:
    mdp, problem = make(name)
    batch = rewards(4, 5)
    scale = 1 / (1 - mdp.discount) if mdp.discount < 1 else 1.0
    near = {"rtol": 1e-12 * scale, "atol": 1e-12 * scale}
    together = soft_values(batch, problem)
    looped = torch.stack([torch.stack([soft_values(reward, problem) for reward in row]) for row in batch])
    vmapped = torch.func.vmap(torch.func.vmap(lambda r: soft_values(r, problem)))(batch)
    torch.testing.assert_close(together, looped, **near)
    torch.testing.assert_close(together, vmapped, **near)
    gradient = torch.func.vmap(torch.func.vmap(torch.func.grad(lambda r: soft_values(r, problem).sum())))(batch)
    batch.requires_grad_()
    (expected,) = torch.autograd.grad(soft_values(batch, problem).sum(), batch)
    torch.testing.assert_close(gradient, expected, **near)


@pytest.mark.parametrize("name", KINDS)
def test_dense_equals_sparse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    reward = rewards(3).requires_grad_()
    for threshold, layout in ((0.0, torch.strided), (1.0, torch.sparse_csr)):
        monkeypatch.setattr(transitions, "_DENSE_ABOVE", threshold)
        _, problem = make(name)
        assert problem.transitions.matrix.layout == layout
        values = soft_values(reward, problem)
        results.append((values, *torch.autograd.grad(values.sum(), reward)))
    for dense, sparse in zip(*results, strict=True):
        scale = 1 / (1 - problem_discount(name))
        torch.testing.assert_close(dense, sparse, rtol=1e-12 * scale, atol=1e-12 * scale)


@pytest.mark.parametrize("name", STATIONARY)
def test_newton_equals_value_iteration(name: str) -> None:
    _, problem = make(name)
    reward = rewards(4)
    newton, iterated = (soft_values(reward, problem, solver) for solver in ("newton", "value_iteration"))  # type: ignore[arg-type]
    # Value iteration stops at a residual of 64 ulp of numbers of order 10, and may be off by that over 1 - g = .1.
    torch.testing.assert_close(newton, iterated, rtol=0, atol=64 * 2.3e-16 * 20 / 0.1)


@pytest.mark.parametrize("name", STATIONARY)
def test_sparse_factorisation_equals_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, problem = make(name)
    reward = rewards(3).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        values = soft_values(reward, problem, "newton")
        (first,) = torch.autograd.grad((values**2).sum(), reward, create_graph=True)
        return values, first, *torch.autograd.grad((first**2).sum(), reward)

    dense = run()
    monkeypatch.setattr(transitions, "DENSE_STATES", 0)
    monkeypatch.setattr(transitions, "FAST_RATE", 0.0)
    for a, b in zip(dense, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", STATIONARY)
def test_fixed_point_meets_its_residual(name: str) -> None:
    _, problem = make(name)
    reward = rewards(5)
    values = soft_values(reward, problem)
    base = reward.movedim(0, -1) + problem.log_prior.unsqueeze(-1)
    again = torch.logsumexp(kernel.backup(base, values.t(), problem), 1)
    assert ((again - values.t()).abs().amax(0) <= stationary.residual_tolerance(base, values.t())).all()


def test_newton_takes_few_steps_where_value_iteration_takes_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    _, problem = make("discounted causal", discount=0.999)
    reward = rewards()
    calls: dict[str, int] = {"backup": 0, "solve_system": 0}

    def count(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: object) -> Tensor:
            calls[name] += 1
            return original(*arguments)

        return counted

    for name in calls:
        monkeypatch.setattr(stationary, name, count(name, getattr(stationary, name)))
    soft_values(reward, problem, "newton")
    assert 1 <= calls["solve_system"] <= 4 and calls["backup"] <= 100
    soft_values(reward, problem, "value_iteration")
    assert calls["solve_system"] <= 4 and calls["backup"] > 1000


# At +1000 the sum over paths diverges where only rewards bound the length of an episode (tests of bad input).
DIVERGING = {("absorbing trajectory", 1000.0), ("stopping trajectory", 1000.0)}


@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n in KINDS for s in (1000.0, -1000.0) if (n, s) not in DIVERGING]
)
def test_extreme_rewards_stay_finite(name: str, size: float) -> None:
    """Rewards of +-1000: wherever the sum exists at all."""
    _, options = KINDS[name]
    for stochastic in (True, False):
        more = {"terminal": [0]} if not stochastic and "terminal" in options else {}
        try:
            _, problem = make(name, stochastic, **more)
        except ValueError:  # this deterministic table has no absorption
            continue
        reward = torch.full((2, 3, 3), size, dtype=torch.float64)
        reward[0, 0, 0] = -size if size < 0 and problem.horizon is not None else size / 2
        reward.requires_grad_()
        values = soft_values(reward, problem)
        assert values.isfinite().all()
        (gradient,) = torch.autograd.grad(values.sum(), reward)
        assert gradient.isfinite().all()


def test_a_chain_that_diverges_is_nan_alone() -> None:
    """Undiscounted with absorption: high rewards have no finite values; the other rows are as if it were not there."""
    mdp = TabularMDP([[[0.9, 0.1]], [[0.0, 1.0]]], initial=0, terminal=[1])
    problem = soft_problem(mdp, "trajectory")
    reward = torch.tensor([[[-1.0], [0.0]], [[1.0], [0.0]], [[-0.5], [0.0]]], dtype=torch.float64)
    values = soft_values(reward, problem)
    assert values[1].isnan().all()
    torch.testing.assert_close(values[[0, 2]], soft_values(reward[[0, 2]], problem), rtol=0, atol=0)
    # z = .9 e^r z + .1 e^r by hand
    expected = [math.log(0.1 * math.exp(r) / (1 - 0.9 * math.exp(r))) for r in (-1.0, -0.5)]
    torch.testing.assert_close(values[[0, 2], 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_one_shift_and_row_shifts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one shift for all rows would underflow, the row-wise path gives what exact arithmetic gives."""
    mdp = TabularMDP(torch.eye(3, dtype=torch.float64).repeat(2, 1, 1).movedim(0, 1), initial=0, horizon=2)
    problem = soft_problem(mdp, "trajectory")
    spread = torch.tensor([[0.0], [-2000.0], [-4000.0]], dtype=torch.float64)
    found = kernel.log_expect(spread, problem).reshape(3, 2)
    torch.testing.assert_close(found, spread.expand(3, 2), rtol=1e-15, atol=0)
    _, problem = make("finite stopping trajectory")
    gentle = torch.randn(3, 4, dtype=torch.float64)
    fast = kernel.log_expect(gentle, problem)
    monkeypatch.setattr(torch, "finfo", lambda dtype: type("Info", (), {"tiny": 1.0, "eps": 2.2e-16, "max": 1.8e308})())
    torch.testing.assert_close(kernel.log_expect(gentle, problem), fast, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["finite trajectory", "finite causal", "absorbing trajectory"])
def test_both_flows_of_the_adjoint_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, problem = make(name)
    reward = rewards(3).requires_grad_()
    gradient: Callable[[], Tensor] = lambda: torch.autograd.grad(soft_values(reward, problem).sum(), reward)[0]  # noqa: E731
    fast = gradient()
    monkeypatch.setattr(kernel.math, "log", lambda x: -1e300)  # no spread is small enough for the quick flow
    torch.testing.assert_close(gradient(), fast, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ shortcuts


def derivatives(problem: SoftProblem, reward: Tensor) -> list[Tensor]:
    """Values, gradient and second derivative; then values and gradient again by torch.func under vmap."""
    reward = reward.detach().requires_grad_()
    values = soft_values(reward, problem)
    (first,) = torch.autograd.grad((values**2).sum(), reward, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), reward)
    both = torch.func.vmap(torch.func.grad_and_value(lambda r: (soft_values(r, problem) ** 2).sum()))
    return [values, first, second, *both(reward.detach())]


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("name", [name for name in FINITE if KINDS[name][0] == "causal"])
def test_policies_kept_for_the_adjoint_change_nothing(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no step, of the first steps, of all."""
    _, problem = make(name)
    reward = rewards(5)
    monkeypatch.setattr(kernel, "_KEPT", 0)
    expected = derivatives(problem, reward)
    monkeypatch.setattr(kernel, "_KEPT", steps * reward.numel() + 1)
    values, policy = torch.ops.pirl.soft_values_kept(reward, problem.number)
    assert policy.shape == (5, steps, 3, 3)
    logits = torch.stack([backup_of(reward, values[:, k], problem) for k in range(steps)], 1)
    torch.testing.assert_close(policy, logits.softmax(-1), rtol=1e-12, atol=1e-12)
    for found, right in zip(derivatives(problem, reward), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def backup_of(reward: Tensor, values: Tensor, problem: SoftProblem) -> Tensor:
    """Q ``[C, S, A]`` of values ``[C, S]``."""
    base = (reward + problem.log_prior).movedim(0, -1)
    return kernel.backup(base, values.t(), problem).movedim(-1, 0)


def test_nothing_is_kept_where_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    _, problem = make("finite causal")
    monkeypatch.setattr(kernel, "_kept_operator", lambda *_: pytest.fail("policies were kept for no adjoint"))
    soft_values(rewards(2), problem)
    with torch.no_grad():
        soft_values(rewards(2).requires_grad_(), problem)


@pytest.mark.parametrize("size", [1.0, 30.0, 100.0, 300.0, 1000.0])
@pytest.mark.parametrize("name", [name for name in FINITE if KINDS[name][0] == "trajectory"])
def test_rescaled_products_equal_log_space(name: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rewards spread over more than the exponent of a float, and where only some chains' do."""
    _, problem = make(name)
    reward = rewards(6, shift=0.0) * size * torch.tensor([1.0, 0.1] * 3, dtype=torch.float64)[:, None, None]
    values = soft_values(reward.requires_grad_(), problem)
    found = values, torch.autograd.grad(values.sum(), reward)[0]
    left = kernel._scaled_values(kernel._base(reward.detach(), problem), problem, 4) is None
    assert left == (size > 300) or size == 300
    monkeypatch.setattr(kernel, "_scaled_values", lambda *_: None)
    monkeypatch.setattr(kernel, "_scaled_visits", lambda *_: None)
    values = soft_values(reward, problem)
    torch.testing.assert_close(found[0], values, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(found[1], torch.autograd.grad(values.sum(), reward)[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name][0] == "trajectory" and "absorbing" not in name])
def test_where_nothing_is_left_to_chance_the_trajectory_reading_is_linear(name: str) -> None:
    """Unless chance stops an episode; at rewards of any size."""
    _, problem = make(name, stochastic=False)
    assert problem.linear == (problem.stop == 0) and not make(name)[1].linear
    for size in (1.0, 100.0):
        reward = (size * rewards(shift=-2.0)).clamp_max(-1.0).requires_grad_()
        tilted = replace(problem, transitions=problem.transitions)  # a problem of its own, to be told otherwise
        tilted.__dict__["linear"] = False
        for mine, its in zip(derivatives(problem, reward[None]), derivatives(tilted, reward[None]), strict=True):
            # Policies are exp of differences of numbers up to 2,000: good to 1e-12 of the largest.
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-10 * float(mine.detach().abs().max()))


def test_steps_that_the_cotangent_does_not_reach_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    _, problem = make("finite causal")
    base, cotangent = torch.zeros(3, 3, 2, dtype=torch.float64) + problem.log_prior.unsqueeze(-1), torch.zeros(5, 3, 2)
    cotangent = cotangent.double()
    cotangent[2, 1] = 1.0
    values = kernel.finite_values(base, problem, 4)
    expected = kernel._plain_visits(base, values, cotangent, problem)
    calls = []
    original = kernel.backup
    monkeypatch.setattr(kernel, "backup", lambda *x, **y: calls.append(1) or original(*x, **y))
    torch.testing.assert_close(kernel.finite_visits(base, values, cotangent, problem), expected, rtol=1e-13, atol=0)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["discounted causal", "stopping trajectory"])
def test_many_states_by_iteration_equal_those_by_factorisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, options = KINDS[name]
    mdp = oracle.random_mdp(0, 40, 3, **options)  # type: ignore[arg-type]
    problem = soft_problem(mdp, reading, stopping="geometric" if reading == "trajectory" else None)  # type: ignore[arg-type]
    reward = 3 * torch.randn(4, 40, 3, dtype=torch.float64)
    if reading == "trajectory":
        reward = -reward.abs()
    reward.requires_grad_()
    results = []
    for states in (40, 39):
        monkeypatch.setattr(transitions, "DENSE_STATES", states)
        monkeypatch.setattr(stationary, "DENSE_STATES", states)
        if states == 39:
            monkeypatch.setattr(transitions, "_solve_sparse", lambda *_: pytest.fail("no chain was left to factorise"))
        values = soft_values(reward, problem)
        (first,) = torch.autograd.grad((values**2).sum(), reward, create_graph=True)
        results.append((values, first, *torch.autograd.grad((first**2).sum(), reward)))
    for direct, iterated in zip(*results, strict=True):
        torch.testing.assert_close(iterated, direct, rtol=0, atol=1e-10 * float(direct.detach().abs().max()))


@pytest.mark.parametrize("horizon", [None, 4])
def test_operators_keep_torch_s_rules(horizon: int | None) -> None:
    _, problem = make("finite causal" if horizon else "discounted causal")
    reward = rewards(2)
    checks = ("test_schema", "test_faketensor")
    check: Callable[..., object] = lambda operator, *x: torch.library.opcheck(operator.default, x, test_utils=checks)  # noqa: E731
    values = torch.ops.pirl.soft_values(reward, problem.number, "auto")
    check(torch.ops.pirl.soft_values, reward, problem.number, "auto")
    check(torch.ops.pirl.soft_adjoint, reward, values, torch.ones_like(values), problem.number)
    if horizon is not None:
        policy = torch.ops.pirl.soft_values_kept(reward, problem.number)[1]
        check(torch.ops.pirl.soft_values_kept, reward, problem.number)
        check(torch.ops.pirl.soft_adjoint, reward, values, torch.ones_like(values), problem.number, policy)


@pytest.mark.parametrize("name", KINDS)
def test_a_recording_holds_one_operator_for_values_and_one_for_the_adjoint(name: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    _, problem = make(name)
    both = torch.func.grad_and_value(lambda r: (soft_values(r, problem) ** 2).sum())
    graph = make_fx(both)(rewards())
    names = [str(node.target) for node in graph.graph.nodes if "pirl" in str(node.target)]
    assert len(names) == 2 and names[0].startswith("pirl.soft_values") and names[1].startswith("pirl.soft_adjoint")
    fresh = rewards()
    for recorded, direct in zip(graph(fresh), both(fresh), strict=True):
        torch.testing.assert_close(recorded, direct, rtol=1e-12, atol=1e-12)
