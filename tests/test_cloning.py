"""Behaviour cloning against counts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pirl
from pirl import errors
from pirl.baselines import cloning

F64 = torch.float64


def problem(**options: Any) -> tuple[pirl.TabularMDP, pirl.Trajectories]:
    available = torch.tensor([[True, True, True], [True, True, False]])
    table = torch.full((2, 3, 2), 0.5, dtype=F64)
    mdp = pirl.TabularMDP(table, [0.5, 0.5], **({"discount": 0.9} | options), available=available)
    return mdp, pirl.Trajectories(states=[[0, 0, 1], [0, 1]], actions=[[2, 0, 1], [2, 0]])


def test_shares_of_actions_by_state() -> None:
    mdp, demos = problem()
    found = cloning(demos, mdp, smoothing=3.0).log_policy.exp()
    torch.testing.assert_close(found, torch.tensor([[2.0, 1, 3], [0, 0, 0]], dtype=F64) / 6 + torch.tensor(
        [[0.0, 0, 0], [0.5, 0.5, 0]], dtype=F64))  # fmt: skip


def test_without_smoothing_what_was_seen_is_repeated() -> None:
    mdp, demos = problem()
    found = cloning(demos, mdp, smoothing=0.0)
    assert found.log_policy.exp()[0].tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert found.reward is None and found.parameters == {} and found.attrs["decisions"] == 5


def test_by_time() -> None:
    mdp, demos = problem(horizon=4)
    found = cloning(demos, mdp, given="time", smoothing=0.0).log_policy.exp()
    assert found.shape == (4, 2, 3)
    # At time 0 both went with action 2, which state 1 does not have: there the prior is all there is.
    assert found[0].tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
    assert found[1].tolist() == [[1, 0, 0], [1, 0, 0]]
    torch.testing.assert_close(found[3], mdp.log_prior.exp())


def test_by_state_and_time() -> None:
    mdp, demos = problem(horizon=3)
    found = cloning(demos, mdp, given="state and time", smoothing=0.0).log_policy.exp()
    assert found[0, 0].tolist() == [0, 0, 1]
    assert found[1].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert found[2].tolist() == [[1 / 3] * 3, [0, 1, 0]]


@pytest.mark.parametrize("given", ["state", "time", "state and time"])
def test_policies_are_distributions_over_available_actions(given: Any) -> None:
    mdp, demos = problem(horizon=5, terminal=[False, True])
    demos = pirl.Trajectories(states=[[0, 0, 1], [0, 1]], actions=[[2, 0], [2]], ends="terminated")
    policy = cloning(demos, mdp, given=given).log_policy.exp()
    torch.testing.assert_close(policy.sum(-1), torch.ones_like(policy[..., 0]))
    assert (policy[..., 1, 0] == 1).all()
    pirl.policy_value(mdp, policy, torch.zeros(2, 3, dtype=F64))  # refuses what is none


def test_bad_options_are_refused() -> None:
    mdp, demos = problem()
    with pytest.raises(errors.OptionError, match="given must be"):
        cloning(demos, mdp, given="action")  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="smoothing is -1"):
        cloning(demos, mdp, smoothing=-1.0)
    with pytest.raises(errors.HorizonError, match="more than num_steps=2"):
        cloning(demos, mdp, given="time", num_steps=2)


def test_a_counting_measure_is_no_more_than_one_decision() -> None:
    mdp, demos = problem(action_prior="counting")
    plain, _ = problem()
    for smoothing in (0.0, 2.0):
        torch.testing.assert_close(
            cloning(demos, mdp, smoothing=smoothing).log_policy, cloning(demos, plain, smoothing=smoothing).log_policy
        )
