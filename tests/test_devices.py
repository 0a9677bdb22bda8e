"""A forgotten ``device=``: with "meta" as torch's default device, any tensor made without one stops the computation.

Inputs are on the CPU, so everything derived from them must be there too; no other device is needed to see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pirl
from pirl import planning
from pirl.distributions import TabularTrajectory
from pirl.mdp import TabularMDP
from pirl.message_passing import log_partition, messages, occupancy, soft_policy
from pirl.trajectories import Trajectories
from tests import oracle

PROBLEMS: dict[str, dict[str, Any]] = {
    "finite": {"horizon": 3},
    "finite with ends": {"horizon": 3, "terminal": [2]},
    "discounted": {"discount": 0.8},
    "until the end": {"terminal": [2]},
}
TWISTS = ("causal", "trajectory", "trajectory that stops")


def problem(name: str) -> TabularMDP:
    return oracle.random_mdp(2, states=4, actions=2, **PROBLEMS[name])


def rewards(*batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return -torch.rand(*batch, 4, 2, generator=generator, dtype=torch.float64) - 0.5


def fits(name: str, twist: str) -> bool:
    """The trajectory reading has no discount, and stops only with one."""
    discounted = PROBLEMS[name].get("discount", 1.0) < 1
    return twist == "causal" or (twist == "trajectory that stops") == discounted


CASES = [(name, twist) for name in PROBLEMS for twist in TWISTS if fits(name, twist)]


def everything(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [tensor for part in x for tensor in everything(part)] if isinstance(x, tuple) else []


def same_under_meta(compute: Callable[[], Any]) -> None:
    """The same numbers, on the CPU, whatever torch's default device."""
    expected = everything(compute())
    assert expected
    with torch.device("meta"):
        found = everything(compute())
    for x, y in zip(found, expected, strict=True):
        assert x.device == torch.device("cpu")
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0, equal_nan=True)


def test_the_check_itself_finds_a_forgotten_device() -> None:
    with pytest.raises(AssertionError):
        same_under_meta(lambda: torch.zeros(2) + 1)
    with pytest.raises(RuntimeError):
        same_under_meta(lambda: torch.ones(2, device="cpu") + torch.ones(2))


# ------------------------------------------------------------------------------------------------ what is given


@pytest.mark.parametrize("layout", ["dense", "coo"])
def test_a_problem_stays_where_its_table_is(layout: str) -> None:
    mdp = oracle.random_mdp(3, states=4, actions=2, horizon=2)
    table = mdp.transition if layout == "dense" else mdp.transition.reshape(8, 4).to_sparse()
    options = {
        "terminal": [3], "available": [[True, True]] * 4, "state_names": "abcd",
        "action_prior": [[0.25, 0.75]] * 4, "horizon": 2,
    }  # fmt: skip

    def compute() -> tuple[Tensor, ...]:
        found = []
        for initial in (1, [0.5, 0.5, 0.0, 0.0], mdp.initial):
            built = TabularMDP(table, initial, **options)
            short = built.replace(horizon=None, discount=0.5).to(dtype=torch.float32)
            state = torch.tensor([0, 1], device="cpu")
            for one in (built, short):
                found += [one.log_prior, one.acts, one.reachable, one.transitions.matrix, one.transitions.transposed]
                found += [one.initial, one.probability(state, state, state), one.check_reward(one.initial)]
                found += [torch.from_numpy(values) for _, values in one.constant_data().values()]
            repr(built)
        return tuple(found)

    same_under_meta(compute)


def test_trajectories_stay_where_their_states_are() -> None:
    states, actions = torch.tensor([[0, 1, 2], [1, 0, 0]]), torch.tensor([[1, 0], [0, -1]])

    def compute() -> tuple[Tensor | None, ...]:
        demos = Trajectories(states, actions, [2, 1], ends=["truncated", "horizon"], horizons=[4, -1], subjects=[0, 1])
        inferred = Trajectories(states, actions)
        return tuple(
            x
            for one in (demos, inferred, demos[[1]], demos[1:], demos[[True, False]], demos.unobserved())
            for x in (one.as_tensor(), one.lengths, one.horizons, one.subjects, one.starts)
            if x is not None
        )

    same_under_meta(compute)
    mdp = oracle.random_mdp(2, states=4, actions=2, horizon=3)
    seen = pirl.MaxCausalEntTrajectory(mdp, rewards()).sample((5,))
    with torch.device("meta"):
        Trajectories(seen[..., 0], seen[:, :-1, 1]).validate(mdp)
        with pytest.warns(pirl.errors.EmptyTrajectoriesWarning):
            blank = Trajectories(states[:0], actions[:0])
    assert blank.as_tensor().device == blank.lengths.device == torch.device("cpu")


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize(("name", "twist"), CASES)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_messages_stay_on_the_device(name: str, twist: str, batch: tuple[int, ...]) -> None:
    mdp, reward = problem(name), rewards(*batch).requires_grad_()
    reading: Any = twist.split()[0]
    options = {"stopping": "geometric"} if "stops" in twist else {}

    def compute() -> tuple[Tensor, ...]:
        fresh = mdp.replace()  # what a problem remembers is made under the default device too
        policy = soft_policy(fresh, reward, reading, **options)
        found = (*messages(fresh, reward, reading, **options), occupancy(fresh, reward, reading, **options), policy)
        goal = (policy.exp() * policy.clamp_min(-50.0)).sum() + found[1].clamp_min(-50.0).sum()
        if reading == "trajectory":
            goal = goal + log_partition(fresh, reward, **options).sum()
        (slope,) = torch.autograd.grad(goal, reward, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), reward)
        return (*everything(found), slope, curve)

    same_under_meta(compute)


@pytest.mark.parametrize(("name", "twist"), CASES)
@pytest.mark.parametrize("batch", [(), (6,), (2, 6)])
def test_distributions_stay_on_the_device(name: str, twist: str, batch: tuple[int, ...]) -> None:
    mdp, reward = problem(name), rewards(*batch).requires_grad_()
    kind = pirl.MaxCausalEntTrajectory if twist == "causal" else pirl.MaxEntTrajectory
    options: dict[str, Any] = {"stopping": "geometric"} if "stops" in twist else {}
    options["lengths"] = torch.tensor([3, 3, 2, 2, 1, 0])
    if "horizon" in PROBLEMS[name]:
        options["horizons"] = torch.tensor([3, 5, -1, -1, 2, 1])
    torch.manual_seed(0)
    seen = kind(mdp, reward.reshape(-1, 4, 2)[0].detach(), **options).sample()
    blank = torch.full((1, seen.shape[1], 2), -1)
    last = (seen[..., 1:] < 0) & (seen[..., :1] >= 0)
    open_ended = torch.where(last & ("stopping" not in options), -1, seen)

    def compute() -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for starts in (None, seen[:, 0, 0]):
            for value in (seen, open_ended, blank.expand_as(seen)):
                density: TabularTrajectory = kind(
                    mdp.replace(), reward, starts=None if starts is None else value[:, 0, 0], **options
                )
                terms = density.log_prob(value), density.log_prob_sum(value), density.choice_log_prob(value)
                (slope,) = torch.autograd.grad(sum(x.sum() for x in terms), reward)
                found += [x.detach() for x in terms] + [slope]
            torch.manual_seed(1)
            found.append(kind(mdp.replace(), reward, starts=starts, **options).sample((2,)))
        return tuple(found)

    same_under_meta(compute)


@pytest.mark.parametrize("name", PROBLEMS)
def test_plans_stay_on_the_device(name: str) -> None:
    mdp, reward = problem(name), rewards(2)
    policy = torch.softmax(rewards(2), -1)
    endless = oracle.random_mdp(2, states=4, actions=2, discount=0.9)

    def compute() -> tuple[Tensor, ...]:
        fresh = mdp.replace()
        found = [planning.optimal_policy(fresh, reward), planning.policy_value(fresh, policy, reward)]
        found += [planning.discounted_occupancy(fresh, policy), planning.stationary_distribution(endless, policy)]
        if fresh.discount == 1:
            found.append(planning.most_likely_trajectory(fresh, reward))
        return tuple(found)

    same_under_meta(compute)


def test_ties_are_broken_on_the_device() -> None:
    table = torch.zeros(2, 2, 2, dtype=torch.float64)
    table[0, 0, 0] = table[0, 1, 1] = 1.0
    mdp, reward = TabularMDP(table, 0, terminal=[1]), torch.zeros(2, 2, dtype=torch.float64)
    same_under_meta(lambda: planning.optimal_policy(mdp.replace(), reward))


@pytest.mark.parametrize("name", PROBLEMS)
def test_large_problems_stay_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse branches: CSR products and sparse factorisations."""
    from pirl import transitions

    monkeypatch.setattr(transitions, "DENSE_STATES", 0)
    monkeypatch.setattr(transitions, "_DENSE_ABOVE", 1.0)
    test_messages_stay_on_the_device(name, "causal", (2, 3))
    test_plans_stay_on_the_device(name)
