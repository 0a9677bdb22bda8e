"""Practice problems: what an action does in them, counted by hand or by playing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pirl import envs
from pirl.errors import InvalidMDPError, MissingDependencyError, UnboundedProblemError
from pirl.mdp import TabularMDP

UP, DOWN, LEFT, RIGHT, STAY = range(5)


def dense(mdp: TabularMDP) -> torch.Tensor:
    table = mdp.transition.to_dense()
    return table.reshape(mdp.num_states, mdp.num_actions, mdp.num_states)


def test_a_gridworld_without_slip_moves_as_told() -> None:
    table = dense(envs.gridworld(2, 3, slip=0.0, discount=0.9))
    # 0 1 2
    # 3 4 5
    following = table.argmax(dim=-1)
    assert table.max(dim=-1).values.eq(1.0).all()
    assert following[4].tolist() == [1, 4, 3, 5, 4]
    assert following[0].tolist() == [0, 3, 0, 1, 0]


def test_slip_goes_to_the_other_directions_equally() -> None:
    table = dense(envs.gridworld(3, 3, slip=0.3, discount=0.9))
    centre, above, below, left, right = 4, 1, 7, 3, 5
    expected = torch.zeros(2, 9, dtype=torch.float64)
    expected[0, [above, below, left, right]] = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    expected[1, [centre, above, below, left, right]] = torch.tensor(
        [0.7, 0.075, 0.075, 0.075, 0.075], dtype=torch.float64
    )
    torch.testing.assert_close(table[centre, [UP, STAY]], expected, atol=1e-15, rtol=0.0)
    # In the corner the two outward slips stay, with the outward move itself.
    assert table[0, UP, 0].item() == pytest.approx(0.7 + 0.1, abs=1e-15)
    assert table[0, RIGHT, 0].item() == pytest.approx(0.2, abs=1e-15)


def test_four_actions_without_stay() -> None:
    mdp = envs.gridworld(3, 3, stay=False, discount=0.9)
    assert mdp.num_actions == 4
    assert mdp.action_names == ("up", "down", "left", "right")


def test_walls_are_never_entered() -> None:
    mdp = envs.gridworld(3, 3, terminal=[(2, 2)], walls=[(1, 1), 1])
    assert mdp.reachable.tolist() == [True, False, True, True, False, True, True, True, True]
    assert dense(mdp)[[0, 3, 5, 7], :, 4].eq(0).all()
    assert mdp.terminal.nonzero().flatten().tolist() == [8]
    # Neither walls nor ends are starts.
    expected = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.float64) / 6
    torch.testing.assert_close(mdp.initial, expected)


def test_a_large_gridworld_is_sparse_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    small = envs.gridworld(4, 5, horizon=3, walls=[(0, 1)])
    monkeypatch.setattr(envs, "_DENSE_ENTRIES", 0)
    large = envs.gridworld(4, 5, horizon=3, walls=[(0, 1)])
    assert small.transition.layout == torch.strided
    assert large.transition.layout != torch.strided
    assert dense(large).equal(dense(small))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rows": 0}, "empty"),
        ({"slip": 1.5}, "slip"),
        ({"terminal": [(2, 0)]}, "outside"),
        ({"walls": [4]}, "outside"),
        ({"walls": [-1]}, "outside"),
        ({"walls": range(4)}, "every cell"),
        ({"initial": 1, "walls": [1]}, "is a wall"),
    ],
)
def test_impossible_gridworlds_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidMDPError, match=complaint):
        envs.gridworld(**{"rows": 2, "cols": 2, "discount": 0.9} | options)


def test_an_endless_gridworld_is_refused() -> None:
    with pytest.raises(UnboundedProblemError):
        envs.gridworld(2, 2)


def test_radial_features_peak_at_distinct_centres() -> None:
    features = envs.gridworld_features(10, 10, 8, seed=3)
    assert features.shape == (100, 8)
    assert features.dtype == torch.float64
    assert features.max(dim=0).values.eq(1.0).all()
    assert features.argmax(dim=0).unique().numel() == 8
    # One cell away from a centre: exp(-1 / 2 w^2), w = sqrt(100 / 8) / 2.
    assert torch.isclose(features, torch.tensor(-2 * 8 / 100, dtype=torch.float64).exp()).any(dim=0).all()
    assert features.equal(envs.gridworld_features(10, 10, 8, seed=3))
    assert not features.equal(envs.gridworld_features(10, 10, 8, seed=4))
    # As many features as cells: each cell has its own.
    assert envs.gridworld_features(2, 3, 6).argmax(dim=0).sort().values.tolist() == list(range(6))


@pytest.mark.parametrize("num_features", [0, 5])
def test_features_must_have_distinct_centres(num_features: int) -> None:
    with pytest.raises(InvalidMDPError, match="from 1 to 4"):
        envs.gridworld_features(2, 2, num_features)


def test_random_problems_branch_as_told() -> None:
    table = dense(envs.random_mdp(7, 3, seed=5, branching=2))
    assert (table > 0).sum(dim=-1).eq(2).all()
    assert table.equal(dense(envs.random_mdp(7, 3, seed=5, branching=2)))
    assert not table.equal(dense(envs.random_mdp(7, 3, seed=6, branching=2)))
    assert (dense(envs.random_mdp(7, 3)) > 0).all()


@pytest.mark.parametrize(("states", "actions", "branching"), [(0, 1, None), (2, 0, 1), (2, 1, 3), (2, 1, 0)])
def test_impossible_random_problems_are_refused(states: int, actions: int, branching: int | None) -> None:
    with pytest.raises(InvalidMDPError, match="at least 1"):
        envs.random_mdp(states, actions, branching=branching)


@pytest.mark.parametrize(
    ("name", "terminal"),
    [
        ("FrozenLake-v1", [5, 7, 11, 12, 15]),
        ("CliffWalking-v1", [47]),
        # The passenger has arrived at one of the four stands.
        ("Taxi-v4", [0, 85, 410, 475]),
    ],
)
def test_gymnasiums_tables_are_what_gymnasium_plays(name: str, terminal: list[int]) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    problem = envs.from_gymnasium(name)
    assert problem.mdp.terminal.nonzero().flatten().tolist() == terminal
    table = dense(problem.mdp)

    env = gymnasium.make(name)
    env.action_space.seed(0)
    for seed in range(5):
        state, _ = env.reset(seed=seed)
        assert problem.mdp.initial[state] > 0
        for _ in range(60):
            action = env.action_space.sample()
            following, reward, terminated, _, _ = env.step(action)
            listed = sum(p for p, there, _, _ in env.unwrapped.P[state][action] if there == following)
            assert table[state, action, following].item() == pytest.approx(listed, abs=1e-15)
            assert problem.reward_sas[state, action, following].item() == reward
            assert problem.mdp.terminal[following].item() == terminated
            state = following
            if terminated:
                break
    alive = ~problem.mdp.terminal
    torch.testing.assert_close(problem.reward[alive], (table * problem.reward_sas).sum(dim=-1)[alive])
    assert problem.reward[~alive].eq(0).all()


def fake_env(table: dict[int, dict[int, list[tuple[float, int, float, bool]]]]) -> SimpleNamespace:
    return SimpleNamespace(P=table, initial_state_distrib=np.eye(len(table))[0])


def test_actions_missing_from_a_table_are_not_available() -> None:
    table = {
        0: {0: [(0.5, 1, 1.0, True), (0.5, 1, 3.0, True)]},
        1: {0: [(1.0, 1, 7.0, True)], 1: [(1.0, 0, 7.0, False)]},
    }
    problem = envs.from_gymnasium(fake_env(table))
    assert problem.mdp.available.tolist() == [[True, False], [True, True]]
    # One next state listed twice: its reward is the mean; what is listed after the end is never received.
    assert problem.reward.tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert problem.reward_sas[0, 0].tolist() == [0.0, 2.0]


def test_an_end_that_depends_on_the_way_is_refused() -> None:
    table = {0: {0: [(1.0, 1, 0.0, False)], 1: [(1.0, 1, 0.0, True)]}, 1: {0: [(1.0, 0, 0.0, False)]}}
    with pytest.raises(InvalidMDPError, match="entering state 1 ends some"):
        envs.from_gymnasium(fake_env(table), discount=0.9)


def test_ends_that_no_episode_sees_do_not_count() -> None:
    table = {
        0: {0: [(1.0, 1, 0.0, False)]},
        1: {0: [(1.0, 2, 1.0, True)]},
        2: {0: [(1.0, 2, 0.0, True)]},
        3: {0: [(1.0, 1, 0.0, True)]},
    }
    problem = envs.from_gymnasium(fake_env(table))
    assert problem.mdp.terminal.tolist() == [False, False, True, False]
    assert problem.reward.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_an_environment_without_a_table_is_refused() -> None:
    with pytest.raises(InvalidMDPError, match="has no table P"):
        envs.from_gymnasium(SimpleNamespace())


def test_a_missing_gymnasium_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingDependencyError, match=r"pirl\[envs\]"):
        envs.from_gymnasium("FrozenLake-v1")
