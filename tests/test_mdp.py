"""Decision problems: one meaning in every layout, what copies keep, and what a reward may look like."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pirl import message_passing
from pirl.errors import InvalidMDPError, InvalidRewardError, UnboundedProblemError
from pirl.mdp import TabularMDP
from tests import oracle

TABLE = oracle.random_mdp(0, states=4, actions=3, horizon=2).transition
INITIAL = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)


def csr(table: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return table.reshape(-1, table.shape[-1]).to_sparse_csr()


def shuffled_coo(table: Tensor) -> Tensor:
    """Entries in no order, each in two halves."""
    sparse = table.reshape(-1, table.shape[-1]).to_sparse()
    order = torch.randperm(2 * sparse.values().numel())
    entry, half = sparse.indices().repeat(1, 2)[:, order], sparse.values().repeat(2)[order] / 2
    return torch.sparse_coo_tensor(entry, half, sparse.shape, check_invariants=True)


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda table: table.tolist(),
    "numpy": lambda table: table.numpy(),
    "coo": lambda table: table.reshape(-1, table.shape[-1]).to_sparse(),
    "shuffled coo": shuffled_coo,
    "csr": csr,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_problem(layout: str) -> None:
    available = torch.ones(4, 3, dtype=torch.bool)
    available[:2, 1] = False
    options = {"horizon": 3, "terminal": [3], "available": available}
    dense = TabularMDP(TABLE, INITIAL, **options)
    mdp = TabularMDP(LAYOUTS[layout](TABLE), INITIAL.tolist(), **options)
    for name in ("row", "column", "value"):
        torch.testing.assert_close(getattr(mdp.transitions, name), getattr(dense.transitions, name), rtol=0.0, atol=0.0)
    assert mdp.transitions.shape == (12, 4) and mdp.dtype == torch.float64
    states, actions, following = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (4, 3, 4)), indexing="ij"))
    assert mdp.probability(states, actions, following).equal(TABLE.flatten())
    assert repr(mdp) == repr(dense) == "TabularMDP(states=4, actions=3, horizon=3, terminal=1)"
    reward = torch.randn(4, 3, dtype=torch.float64)
    value = message_passing.log_partition(mdp, reward)
    torch.testing.assert_close(value, message_passing.log_partition(dense, reward), rtol=1e-12, atol=1e-12)


def test_nothing_leaves_a_terminal_state_or_by_an_action_that_is_not_available() -> None:
    available = torch.tensor([[True, False, True]] * 4)
    mdp = TabularMDP(TABLE, INITIAL, horizon=2, terminal=[2], available=available)
    kept = torch.zeros(12, 4, dtype=torch.bool)
    kept[mdp.transitions.row, mdp.transitions.column] = True
    assert kept.reshape(4, 3, 4).equal((TABLE > 0) & available.unsqueeze(2) & (torch.arange(4) != 2)[:, None, None])
    # Rows that no decision reads are free.
    free = TABLE.clone()
    free[2], free[:, 1] = 0.0, 7.0
    assert TabularMDP(free, INITIAL, horizon=2, terminal=[2], available=available).transitions.value.equal(
        mdp.transitions.value
    )


def test_the_action_prior_in_words_and_numbers() -> None:
    available = torch.tensor([[True, False, True], [True, True, True], [False, True, False], [True, True, True]])
    options = {"horizon": 2, "available": available, "terminal": [3]}
    uniform = TabularMDP(TABLE, INITIAL, **options).log_prior.exp()
    torch.testing.assert_close(uniform[:3].sum(1), torch.ones(3, dtype=torch.float64))
    assert uniform[0].tolist() == [0.5, 0.0, 0.5]
    # A terminal state has its no-op alone, and its weight is 1 in every measure.
    counting = TabularMDP(TABLE, INITIAL, action_prior="counting", **options)
    for prior in (uniform, counting.log_prior.exp()):
        assert prior[3].tolist() == [1.0, 0.0, 0.0]
    assert counting.log_prior.exp()[:3].equal(available[:3].double())
    again = TabularMDP(TABLE, INITIAL, action_prior=counting.action_prior, **options)
    assert again.log_prior.equal(counting.log_prior)


@pytest.mark.parametrize("start", [2, np.int64(2), torch.tensor(2), np.array(2), [0, 0, 1, 0], np.eye(4)[2]])
def test_a_start_is_a_state_or_a_distribution(start: Any) -> None:
    assert TabularMDP(TABLE, start, horizon=1).initial.tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("ends", [[1, 3], (3, 1), np.array([1, 3]), torch.tensor([False, True, False, True])])
def test_ends_are_numbers_or_a_mask(ends: Any) -> None:
    assert TabularMDP(TABLE, 0, terminal=ends).terminal.tolist() == [False, True, False, True]
    assert not TabularMDP(TABLE, 0, terminal=[], horizon=1).terminal.any()


@pytest.mark.parametrize("end", [2, np.int64(2), torch.tensor(2), np.array(2)])
def test_one_end_may_be_a_number_as_a_start_may(end: Any) -> None:
    assert TabularMDP(TABLE, 0, terminal=end, horizon=1).terminal.tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------------------------ reachable states


def corridor(states: int, **options: Any) -> TabularMDP:
    """Action 0 goes back to the start, action 1 a state further; the last stays."""
    state = torch.arange(states)
    table = torch.zeros(states, 2, states, dtype=torch.float64)
    table[:, 0, 0] = table[state, 1, (state + 1).clamp_max(states - 1)] = 1.0
    return TabularMDP(table, **{"initial": 0, "discount": 0.9, **options})


def test_reachable_states_are_those_that_some_policy_visits() -> None:
    assert corridor(5).reachable.all()
    assert corridor(5, terminal=[2]).reachable.tolist() == [True, True, True, False, False]
    no_way = torch.tensor([[True, True], [True, False]] + [[True, True]] * 3)
    mdp = corridor(5, available=no_way)
    assert mdp.reachable.tolist() == [True, True, False, False, False]
    assert repr(mdp) == "TabularMDP(states=5 (3 unreachable), actions=2, discount=0.9)"
    two_starts = corridor(5, available=no_way, initial=[0.5, 0, 0, 0.5, 0])
    assert two_starts.reachable.tolist() == [True, True, False, True, True]
    # Not one level of Python recursion a state.
    assert corridor(3000).reachable.all()


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("layout", ["dense", "coo"])
def test_in_float32_rows_sum_to_one_again(layout: str) -> None:
    table = TABLE if layout == "dense" else LAYOUTS["coo"](TABLE)
    available = torch.ones(4, 3, dtype=torch.bool)
    available[0, 1] = False
    mdp = TabularMDP(table, INITIAL, horizon=2, terminal=[3], available=available, state_names=list("abcd"))
    short = mdp.to(dtype=torch.float32)
    assert short.dtype == short.log_prior.dtype == short.transitions.value.dtype == torch.float32
    assert (short.horizon, short.state_names) == (2, ("a", "b", "c", "d"))
    assert short.available.equal(available) and short.terminal.equal(mdp.terminal)
    torch.testing.assert_close(short.transitions.value.double(), mdp.transitions.value, rtol=1e-6, atol=0.0)
    assert short.transitions.row.equal(mdp.transitions.row)
    back = short.to(dtype=torch.float64)  # validated anew, within 1e-8 of 1
    torch.testing.assert_close(back.transitions.value, mdp.transitions.value, rtol=1e-6, atol=0.0)
    assert mdp.to() is mdp.to("cpu") is mdp.to(torch.device("cpu"), torch.float64) is mdp


def test_many_states_survive_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(300, 2, 300, generator=generator, dtype=torch.float64)
    start = torch.full((300,), 1 / 300, dtype=torch.float64)
    mdp = TabularMDP(table / table.sum(-1, keepdim=True), start, discount=0.9)
    short = mdp.to(dtype=torch.float32)
    assert float((short.transition.sum(-1) - 1).abs().max()) < 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("layout", ["dense", *LAYOUTS])
def test_a_pickle_keeps_everything_but_the_memo(layout: str) -> None:
    mdp = TabularMDP(LAYOUTS.get(layout, lambda table: table)(TABLE), INITIAL, horizon=3, terminal=[1])
    reward = torch.randn(4, 3, dtype=torch.float64)
    value = message_passing.log_partition(mdp, reward)
    assert mdp.memo
    for other in (pickle.loads(pickle.dumps(mdp)), copy.deepcopy(mdp), copy.copy(mdp)):
        assert not other.memo and repr(other) == repr(mdp)
        assert message_passing.log_partition(other, reward).equal(value)
    stream = io.BytesIO()
    torch.save(mdp, stream)
    stream.seek(0)
    assert message_passing.log_partition(torch.load(stream, weights_only=False), reward).equal(value)


def test_replace_validates_and_keeps_the_rest() -> None:
    mdp = TabularMDP(TABLE, INITIAL, horizon=3, action_names=("x", "y", "z"))
    longer = mdp.replace(horizon=5)
    assert (longer.horizon, mdp.horizon, longer.action_names) == (5, 3, ("x", "y", "z"))
    assert longer.memo is not mdp.memo
    with pytest.raises(UnboundedProblemError, match="state 0"):
        mdp.replace(horizon=None)
    # The prior is uniform over what is available now, not over what was.
    fewer = torch.ones(4, 3, dtype=torch.bool).index_fill(1, torch.tensor([2]), False)
    torch.testing.assert_close(mdp.replace(available=fewer).log_prior[:, :2].exp(), torch.full((4, 2), 0.5).double())
    counting = mdp.replace(action_prior="counting").replace(available=fewer)
    assert counting.log_prior.exp().equal(fewer.double())


def test_a_problem_does_not_change() -> None:
    mdp = TabularMDP(TABLE, INITIAL, horizon=3)
    with pytest.raises(AttributeError, match="horizon"):
        mdp.horizon = 4
    assert mdp.horizon == 3


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy()])
def test_what_was_given_may_be_written_to_afterwards(convert: Any) -> None:
    given = {
        "transition": TABLE.clone(), "initial": torch.tensor([1.0, 0, 0, 0]).double(),
        "terminal": torch.zeros(4, dtype=torch.bool), "available": torch.ones(4, 3, dtype=torch.bool),
        "action_prior": torch.full((4, 3), 1 / 3, dtype=torch.float64),
    }  # fmt: skip
    mdp = TabularMDP(**{name: convert(x) for name, x in given.items()}, horizon=2)
    kept = {name: x.clone() for name, x in given.items()}
    for x in given.values():
        x.zero_() if x.any() else x.fill_(True)
    for other in (mdp, mdp.replace(horizon=3)):
        assert all(getattr(other, name).equal(x) for name, x in kept.items())


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_constant_data_rebuilds_the_problem(layout: str) -> None:
    available = torch.ones(4, 3, dtype=torch.bool)
    available[1, 2] = False
    table = TABLE if layout == "dense" else csr(TABLE)
    mdp = TabularMDP(table, INITIAL, discount=0.9, terminal=[3], available=available)
    data = mdp.constant_data()
    kept = {name: values for name, (_, values) in data.items()}
    assert all(isinstance(values, np.ndarray) and values.ndim == len(dims) for dims, values in data.values())
    rebuilt = np.zeros((12, 4))
    rebuilt[kept["transition_row"], kept["transition_column"]] = kept["transition_probability"]
    assert np.array_equal(rebuilt.reshape(4, 3, 4), TABLE.numpy())
    assert np.array_equal(kept["initial"], INITIAL.numpy()) and np.array_equal(kept["available"], available.numpy())
    assert kept["terminal"].tolist() == [False, False, False, True]
    assert (float(kept["discount"]), int(kept["horizon"])) == (0.9, -1)
    assert int(mdp.replace(horizon=7).constant_data()["horizon"][1]) == 7


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize(
    ("shape", "result"),
    [((4,), (4, 3)), ((4, 1), (4, 3)), ((4, 3), (4, 3)), ((5, 4, 1), (5, 4, 3)), ((2, 5, 4, 3), (2, 5, 4, 3))],
)
def test_rewards_of_states_or_pairs(shape: tuple[int, ...], result: tuple[int, ...]) -> None:
    mdp = TabularMDP(TABLE, INITIAL, horizon=2)
    reward = torch.randn(shape, dtype=torch.float64)
    whole = mdp.check_reward(reward)
    assert whole.shape == result
    expected = reward.unsqueeze(-1) if len(shape) == 1 else reward
    assert whole.equal(expected.expand(result))


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        (torch.zeros(3, dtype=torch.float64), r"shape \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.float64), r"shape \(3, 4\)"),
        (torch.zeros(4, 2, dtype=torch.float64), r"shape \(4, 2\)"),
        (torch.zeros((), dtype=torch.float64), r"shape \(\)"),
        (torch.zeros(5, 4, dtype=torch.float64), r"\[\*batch, 4, 1\]"),  # r(s) of five draws needs its last dimension
        (torch.zeros(4, 3), r"float32 .*float64"),
    ],
)
def test_rewards_of_other_shapes_or_types_are_refused(reward: Any, complaint: str) -> None:
    with pytest.raises(InvalidRewardError, match=complaint):
        TabularMDP(TABLE, INITIAL, horizon=2).check_reward(reward)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"state_names": ("a", "b")}, "state_names has 2 names for 4"),
        ({"action_names": ("a",)}, "action_names has 1 names for 3"),
        ({"action_prior": "flat"}, "'flat'"),
        ({"action_prior": torch.ones(4, 2)}, r"shape \(4, 2\)"),
        ({"action_prior": torch.full((4, 3), 0.3)}, r"action_prior\[0\] sums to 0.9"),
        ({"terminal": torch.zeros(3, dtype=torch.bool)}, r"terminal .*\(3,\)"),
        ({"available": torch.ones(4, 3)}, "boolean"),
        ({"available": torch.zeros(4, 3, dtype=torch.bool)}, "state 0 has no available action"),
        ({"initial": [0.5, 0.5]}, r"initial has shape \(2,\)"),
        ({"terminal": 4}, "terminal names state 4"),
        ({"terminal": "last"}, "terminal cannot be read"),
        ({"terminal": 2.0}, "terminal is torch.float.*boolean mask"),
        ({"initial": "start"}, "initial cannot be read"),
        ({"transition": torch.zeros(4, 3)}, r"\[S, A, S\]"),
        ({"transition": torch.zeros(5, 4).to_sparse()}, r"\[S \* A, S\]"),
        ({"transition": torch.zeros(0, 2, 0)}, "0 states"),
    ],
)
def test_tables_that_do_not_fit_are_refused(options: dict, complaint: str) -> None:
    with pytest.raises(InvalidMDPError, match=complaint):
        TabularMDP(**{"transition": TABLE, "initial": INITIAL, "horizon": 2, **options})


def test_a_problem_of_terminal_states_only() -> None:
    mdp = TabularMDP(torch.zeros(1, 2, 1, dtype=torch.float64), 0, terminal=[0])
    assert mdp.probability(*torch.zeros(3, 1, dtype=torch.long)).tolist() == [0.0]
    # The no-op of the terminal state is all that happens.
    reward = torch.tensor([[0.3, 9.0]], dtype=torch.float64)
    assert float(message_passing.log_partition(mdp, reward)) == pytest.approx(0.3, abs=1e-15)


def test_a_base_measure_has_no_weight_on_actions_that_are_not_available() -> None:
    available = torch.tensor([[True, False], [True, True], [True, True]])
    prior = torch.tensor([[1.0, 0.7], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    mdp = oracle.random_mdp(0, available=available, action_prior=prior, horizon=2)
    assert mdp.log_prior[0].tolist() == [0.0, -math.inf]
    assert not mdp.acts[0, 1] and mdp.acts[1:].all()
