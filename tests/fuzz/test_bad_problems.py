"""Problems, rewards and demonstrations that are wrong: the error with its name, in one line, and nothing half-done."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import pirl
from pirl.errors import (
    DiscountError,
    EmptyTrajectoriesWarning,
    HorizonError,
    OptionError,
    PirlError,
    UnboundedProblemError,
)
from pirl.message_passing import log_partition, messages, occupancy, soft_policy
from pirl.trajectories import Trajectories
from tests.fuzz import corruptions, strategies
from tests.fuzz.cases import cases
from tests.fuzz.corruptions import OF_PROBLEMS, Expected
from tests.fuzz.strategies import Problem, episodes, problems, rewards

KINDS = {"causal": pirl.MaxCausalEntTrajectory, "trajectory": pirl.MaxEntTrajectory}


def refused(use: Callable[[], Any], expected: Iterable[Expected]) -> None:
    """Exactly one of these classes, in one line with its words."""
    expected = list(expected)
    with pytest.raises(PirlError) as found:
        use()
    message = str(found.value)
    assert "\n" not in message and message, message
    fits = [kind for kind, words in expected if type(found.value) is kind and re.search(words, message)]
    assert fits, f"{type(found.value).__name__}: {message}; expected {expected}"


@pytest.mark.parametrize("name", OF_PROBLEMS)
@given(data=st.data())
@cases(3, 110)
def test_a_problem_with_one_fault_is_refused_by_name(name: str, data: st.DataObject) -> None:
    problem = copy.deepcopy(data.draw(problems()))
    expected = OF_PROBLEMS[name][1](data.draw, problem)
    refused(problem.build, [expected])


@given(st.data())
@cases(12, 300)
def test_of_several_faults_one_is_told(data: st.DataObject) -> None:
    problem = copy.deepcopy(data.draw(problems("finite")))
    parts = data.draw(st.lists(st.sampled_from(sorted(OF_PROBLEMS)), min_size=2, max_size=3,
                               unique_by=lambda name: OF_PROBLEMS[name][0]))  # fmt: skip
    # A spoiled table has no sizes to spoil the others by: it comes last. A mask changes which rows count.
    parts.sort(key=lambda name: (OF_PROBLEMS[name][0] == "table", name))
    assume(not ({"available", "terminal", "prior"} & {OF_PROBLEMS[name][0] for name in parts[:-1]}))
    refused(problem.build, [OF_PROBLEMS[name][1](data.draw, problem) for name in parts])


@given(st.data())
@cases(12, 300)
def test_undiscounted_problems_end_or_are_refused(data: st.DataObject) -> None:
    problem = copy.deepcopy(data.draw(problems("finite")))
    del problem.options["horizon"]
    reached = {s for s in range(problem.states) if problem.ends(s)}
    for _ in range(problem.states):
        reached |= {s for s in range(problem.states)
                    if any(n in reached for a in problem.acts(s) for n in problem.following(s, a))}  # fmt: skip
    if len(reached) == problem.states:
        assert problem.build().horizon is None
        return
    first = min(set(range(problem.states)) - reached)
    refused(problem.build, [(UnboundedProblemError, f"state {first} cannot reach a terminal state")])


def uses(problem: Problem, reward: torch.Tensor) -> list[Callable[[], Any]]:
    """Whatever takes a reward."""
    mdp = problem.build()
    found: list[Callable[[], Any]] = [
        lambda: pirl.MaxCausalEntTrajectory(mdp, reward),
        lambda: soft_policy(mdp, reward),
        lambda: messages(mdp, reward, "causal"),
        lambda: occupancy(mdp, reward, "causal"),
    ]
    if mdp.discount == 1:
        found += [
            lambda: pirl.MaxEntTrajectory(mdp, reward),
            lambda: log_partition(mdp, reward),
            lambda: messages(mdp, reward, "trajectory"),
            lambda: occupancy(mdp, reward, "trajectory"),
        ]
    return found


def some(data: st.DataObject, of: list[Callable[[], Any]], most: int = 3) -> list[Callable[[], Any]]:
    return data.draw(st.lists(st.sampled_from(of), min_size=1, max_size=most, unique=True))


def plans(problem: Problem, reward: torch.Tensor) -> list[Callable[[], Any]]:
    mdp = problem.build()
    allowed = mdp.log_prior.isfinite().double()
    policy = allowed / allowed.sum(-1, keepdim=True)
    found: list[Callable[[], Any]] = [
        lambda: pirl.optimal_policy(mdp, reward), lambda: pirl.policy_value(mdp, policy, reward),
    ]  # fmt: skip
    return found + [lambda: pirl.most_likely_trajectory(mdp, reward)] * (mdp.discount == 1)


@given(st.data())
@cases(8, 300)
def test_a_reward_that_is_not_finite_names_its_pair(data: st.DataObject) -> None:
    problem = data.draw(problems())
    reward, expected, (s, a) = corruptions.reward_value(data.draw, problem)
    for use in some(data, uses(problem, reward)):
        refused(use, [expected])
    counts = a == 0 if problem.ends(s) else a in problem.acts(s)
    for use in some(data, plans(problem, reward)):
        if counts:
            refused(use, [expected])
        else:  # what cannot be chosen has any reward
            found = use()
            for number in found if isinstance(found, tuple) else (found,):
                assert not bool(number.isnan().any())


@pytest.mark.parametrize("fault", ["reward_shape", "reward_dtype", "reward_of_next_state"])
@given(data=st.data())
@cases(4, 120)
def test_a_reward_that_does_not_fit_is_refused(fault: str, data: st.DataObject) -> None:
    problem = data.draw(problems())
    reward, expected = getattr(corruptions, fault)(data.draw, problem)
    for use in some(data, uses(problem, reward) + plans(problem, reward)):
        refused(use, [expected])


@given(st.data())
@cases(6, 100)
def test_a_discount_belongs_to_one_reading(data: st.DataObject) -> None:
    problem = data.draw(problems("discounted"))
    mdp, reward = problem.build(), data.draw(rewards(problem, batched=False))
    for use in some(data, uses(problem, reward)):
        use()
    refused(lambda: pirl.MaxEntTrajectory(mdp, reward), [(DiscountError, "has no discount.*stopping='geometric'")])
    refused(lambda: log_partition(mdp, reward), [(DiscountError, "has no discount")])
    refused(lambda: pirl.most_likely_trajectory(mdp, reward), [(DiscountError, "discount")])
    causal = {"stopping": "geometric"}
    refused(lambda: pirl.MaxCausalEntTrajectory(mdp, reward, **causal), [(OptionError, "belongs to the trajectory")])
    if mdp.discount == 0:
        refused(lambda: log_partition(mdp, reward, **causal), [(DiscountError, "stops after one decision")])
    refused(lambda: pirl.MaxCausalEntTrajectory(mdp, reward).sample(), [(HorizonError, "lengths=")])
    own = torch.tensor([2, -1])
    refused(lambda: pirl.MaxCausalEntTrajectory(mdp, reward, horizons=own), [(HorizonError, "own horizon")])


@given(st.data())
@cases(40, 1000)
def test_demonstrations_that_are_no_whole_numbers_or_do_not_fit(data: st.DataObject) -> None:
    states, actions, options, expected = corruptions.demonstrations(data.draw)
    before = repr((states, actions, options))
    refused(lambda: Trajectories(states, actions, **options), [expected])
    assert repr((states, actions, options)) == before


@given(st.data())
@cases(60, 800)
def test_demonstrations_that_cannot_be_name_trajectory_and_step(data: st.DataObject) -> None:
    """And those that can be, however they came about, have a density."""
    problem = data.draw(problems(paths=None))
    seen = data.draw(st.lists(episodes(problem, 5), min_size=1, max_size=3))
    for _ in range(data.draw(st.integers(0, 2))):
        corruptions.spoil(data.draw, problem, data.draw(st.sampled_from(seen)))
    mdp, expected = problem.build(), corruptions.complaints(problem, seen)
    demos = strategies.demonstrations(seen)
    table = demos.as_tensor().clone()
    reward = torch.full((problem.states, problem.actions), -1.3, dtype=torch.float64)
    laws = [pirl.MaxCausalEntTrajectory(mdp, reward)]
    if mdp.discount == 1 and mdp.horizon is not None:
        laws.append(pirl.MaxEntTrajectory(mdp, reward))
    checks: list[Callable[[], Any]] = [lambda: demos.validate(mdp)]
    for law in laws:
        checks += [lambda f=f: f(demos.as_tensor()) for f in (law.log_prob, law.log_prob_sum, law.choice_log_prob)]
    for check in some(data, checks):
        if expected:
            refused(check, expected)
        else:
            found = check()
            assert found is None or bool(found.isfinite().all() and (found < 1e-9).all())
    assert bool((demos.as_tensor() == table).all())
    # Nothing half-done: the same laws go on.
    start = torch.tensor([[[problem.starts()[0], -1]]])
    assert all(bool(law.log_prob(start).isfinite().all()) for law in laws)


@given(st.data())
@cases(6, 150)
def test_claims_about_episodes_are_checked(data: st.DataObject) -> None:
    """Horizons, lengths, starts and ends that are not what was said."""
    problem = data.draw(problems("finite", paths=None).filter(lambda p: not p.terminal))
    problem.options["horizon"] = 4
    mdp = problem.build()
    seen = [data.draw(episodes(problem, 4)) for _ in range(2)]
    demos, reward = strategies.demonstrations(seen), torch.zeros(problem.states, problem.actions, dtype=torch.float64)
    i = data.draw(st.integers(0, 1))
    length = len(seen[i].actions)
    assume(length > 0)
    for kind in KINDS.values():
        own = torch.full((2,), -1)
        own[i] = length - 1
        if length > 1:
            law = kind(mdp, reward, horizons=own)
            words = f"trajectory {i} has {length} decisions, more than the horizon {length - 1}"
            refused(lambda law=law: law.log_prob(demos.as_tensor()), [(HorizonError, words)])
        watched = demos.lengths.clone()
        watched[i] = length - 1
        words = f"trajectory {i} has {length} decisions, more than its length {length - 1}"
        law = kind(mdp, reward, lengths=watched)
        refused(lambda law=law: law.log_prob(demos.as_tensor()), [(HorizonError, words)])
        starts = demos.starts.clone()
        starts[i] = (starts[i] + 1) % max(2, problem.states)
        law = kind(mdp, reward, starts=starts)
        words = f"trajectory {i}, step 0: start state {int(demos.starts[i])} is not the given one"
        refused(lambda law=law: law.log_prob(demos.as_tensor()), [(pirl.errors.InvalidTrajectoriesError, words)])
    if all(len(e.states) > len(e.actions) for e in seen):
        claimed = strategies.demonstrations(seen, ends="terminated")
        words = "trajectory 0 ends 'terminated', but its last state"
        refused(lambda: claimed.validate(mdp), [(pirl.errors.InvalidTrajectoriesError, words)])


@given(st.data())
@cases(5, 60)
def test_no_demonstrations_warn_and_say_nothing(data: st.DataObject) -> None:
    problem = data.draw(problems(discount=True))
    mdp, reward = problem.build(), data.draw(rewards(problem, strategies.COSTS, batched=False)).requires_grad_()
    nothing = data.draw(st.sampled_from([[], (), torch.zeros(0, 3), torch.zeros(0, 0)]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        demos = Trajectories(nothing, nothing)
    assert [w.category for w in told] == [EmptyTrajectoriesWarning] and "\n" not in str(told[0].message)
    law = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
    (slope,) = torch.autograd.grad(law.log_prob_sum(demos.as_tensor()), reward)
    assert float(law.log_prob(demos.as_tensor()).detach()) == 0.0 and bool((slope == 0).all())
