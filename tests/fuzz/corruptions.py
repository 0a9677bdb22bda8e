"""Each way in which a problem, a reward or demonstrations can be wrong, and the error that must say so.

A corruption spoils what it is given and returns what is to come: the class of the error, and words of its message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from pirl.errors import (
    HorizonError,
    ImpossibleTransitionError,
    InvalidMDPError,
    InvalidRewardError,
    InvalidTrajectoriesError,
    RewardTimingError,
    UnavailableActionError,
)
from tests.fuzz.strategies import Draw, Episode, Problem

Expected = tuple[type[Exception], str]

NO_PROBABILITY = [math.nan, math.inf, -math.inf, -0.25, -1e-12, -1000.0]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def pick(draw: Draw, size: int) -> int:
    return draw(st.integers(0, size - 1))


def deciding(draw: Draw, problem: Problem) -> tuple[int, int]:
    """A pair (s, a) that a decision can lead to."""
    pairs = [(s, a) for s in range(problem.states) if not problem.ends(s) for a in problem.acts(s)]
    assume(pairs)
    return draw(st.sampled_from(pairs))


# ------------------------------------------------------------------------------------------------ problems


def probability(draw: Draw, problem: Problem) -> Expected:
    s, a, n = pick(draw, problem.states), pick(draw, problem.actions), pick(draw, problem.states)
    problem.table[s][a] = list(problem.table[s][a])
    problem.table[s][a][n] = draw(st.sampled_from(NO_PROBABILITY))
    return InvalidMDPError, rf"transition\[{s}, {a}\] contains "


def row_sum(draw: Draw, problem: Problem) -> Expected:
    s, a = deciding(draw, problem)
    by = draw(st.sampled_from([1 + 1e-6, 1 - 1e-6, 1 + 3e-8, 0.5, 2.0, 0.0, 1e300]))
    problem.table[s][a] = [by * p for p in problem.table[s][a]]
    return InvalidMDPError, rf"transition\[{s}, {a}\] sums to "


def table_shape(draw: Draw, problem: Problem) -> Expected:
    table = torch.tensor(problem.table, dtype=torch.float64)
    wrong = [
        table[..., :0], table[:0], table[:, :0], table[0], table[0, 0, 0], table.unsqueeze(0), table[..., [0, 0]],
        torch.zeros(problem.states + 1, problem.actions, problem.states, dtype=torch.float64),
        torch.zeros(problem.states, 0, problem.states, dtype=torch.float64),
        torch.zeros(3, 2, dtype=torch.float64).to_sparse(), torch.zeros(3, 0, dtype=torch.float64).to_sparse(),
        torch.zeros(2, 2, 2, dtype=torch.float64).to_sparse(),
    ]  # fmt: skip
    if problem.states == 2:
        del wrong[6]  # which is whole
    problem.table = draw(st.sampled_from(wrong))
    return InvalidMDPError, r"transition has "


def table_kind(draw: Draw, problem: Problem) -> Expected:
    uneven: list[Any] = [[[1.0]] * problem.actions for _ in range(problem.states)]
    uneven[0] = [[1.0]] * (problem.actions + 1)
    uneven.append([[1.0, 2.0]])
    problem.table, problem.layout = draw(st.sampled_from([uneven, "table", [["a"]], [[[None]]], object(), {}])), "list"
    return InvalidMDPError, "transition cannot be read"


def start_state(draw: Draw, problem: Problem) -> Expected:
    problem.initial = state = draw(st.sampled_from([-1, problem.states, problem.states + 7, 10**12]))
    return InvalidMDPError, f"initial state {state} is out of range; states are 0 to {problem.states - 1}"


def start_probability(draw: Draw, problem: Problem) -> Expected:
    s = pick(draw, problem.states)
    problem.initial = [1 / problem.states] * problem.states
    problem.initial[s] = draw(st.sampled_from(NO_PROBABILITY))
    return InvalidMDPError, rf"initial\[{s}\] is .*; probabilities are finite and >= 0"


def start_sum(draw: Draw, problem: Problem) -> Expected:
    total = draw(st.sampled_from([0.0, 0.5, 1 + 1e-6, 2.0]))
    problem.initial = [total / problem.states] * problem.states
    return InvalidMDPError, "initial sums to "


def start_shape(draw: Draw, problem: Problem) -> Expected:
    problem.initial = draw(st.sampled_from([[], [1.0] + [0.0] * problem.states, [[1.0]], 0.5, True]))
    return InvalidMDPError, "initial has shape"


def prior_weight(draw: Draw, problem: Problem) -> Expected:
    s, a = pick(draw, problem.states), pick(draw, problem.actions)
    problem.prior = [[1 / problem.actions] * problem.actions for _ in range(problem.states)]
    problem.prior[s][a] = draw(st.sampled_from(NO_PROBABILITY))
    return InvalidMDPError, rf"action_prior\[{s}, {a}\] is "


def prior_sum(draw: Draw, problem: Problem) -> Expected:
    s, _ = deciding(draw, problem)
    problem.available = None
    problem.prior = [[1 / problem.actions] * problem.actions for _ in range(problem.states)]
    by = draw(st.sampled_from([0.5, 1.5, 1 + 1e-6, 0.0]))
    problem.prior[s] = [by * p for p in problem.prior[s]]
    return InvalidMDPError, rf"action_prior\[{s}\] sums to "


def prior_kind(draw: Draw, problem: Problem) -> Expected:
    wrong = ["Uniform", "", [1.0], [[1.0] * (problem.actions + 1)] * problem.states]
    problem.prior = draw(st.sampled_from(wrong))
    return InvalidMDPError, "action_prior (must be|has shape)"


def terminal_states(draw: Draw, problem: Problem) -> Expected:
    state = draw(st.sampled_from([-1, problem.states, 10**9]))
    problem.terminal = [0, state]
    return InvalidMDPError, f"terminal names state {state}; states are 0 to {problem.states - 1}"


def terminal_mask(draw: Draw, problem: Problem) -> Expected:
    problem.terminal = draw(st.sampled_from([[0, 0], [0.5], [1.0] * problem.states, [True] * (problem.states + 1)]))
    return InvalidMDPError, "terminal (repeats a state number|is .*expected a boolean mask)"


def available_mask(draw: Draw, problem: Problem) -> Expected:
    wrong = [[True], [[True] * (problem.actions + 1)] * problem.states, [[1] * problem.actions] * problem.states]
    problem.available = draw(st.sampled_from(wrong))
    return InvalidMDPError, "available is .*expected a boolean mask"


def no_action(draw: Draw, problem: Problem) -> Expected:
    s, _ = deciding(draw, problem)
    problem.available = [[True] * problem.actions for _ in range(problem.states)]
    problem.available[s] = [False] * problem.actions
    problem.prior = "uniform"
    return InvalidMDPError, f"state {s} has no available action"


def discount(draw: Draw, problem: Problem) -> Expected:
    problem.options["discount"] = draw(st.sampled_from([math.nan, math.inf, -math.inf, -0.1, 1.0000001, 2.0]))
    return InvalidMDPError, "discount is .*must lie in"


def horizon(draw: Draw, problem: Problem) -> Expected:
    problem.options["horizon"] = draw(st.sampled_from([0, -1, -(10**9), True, False]))
    return InvalidMDPError, "horizon is .*must be a whole number"


def names(draw: Draw, problem: Problem) -> Expected:
    which = draw(st.sampled_from(["state_names", "action_names"]))
    count = (problem.states if which == "state_names" else problem.actions) + draw(st.sampled_from([-1, 1, 5]))
    problem.options[which] = ["x"] * count
    return InvalidMDPError, f"{which} has {count} names for"


OF_PROBLEMS: dict[str, tuple[str, Callable[[Draw, Problem], Expected]]] = {
    function.__name__: (part, function)
    for part, functions in {
        "table": (probability, row_sum, table_shape, table_kind),
        "initial": (start_state, start_probability, start_sum, start_shape),
        "prior": (prior_weight, prior_sum, prior_kind),
        "terminal": (terminal_states, terminal_mask),
        "available": (available_mask, no_action),
        "discount": (discount,),
        "horizon": (horizon,),
        "names": (names,),
    }.items()
    for function in functions
}
"""By name: the part that is spoiled, and what spoils it. No two of one part are tried together."""


# ------------------------------------------------------------------------------------------------ rewards


def reward_value(draw: Draw, problem: Problem) -> tuple[Tensor, Expected, tuple[int, int]]:
    """A batch with one number that is not finite, and its pair."""
    s, a = pick(draw, problem.states), pick(draw, problem.actions)
    reward = torch.full((2, problem.states, problem.actions), -1.0, dtype=torch.float64)
    reward[pick(draw, 2), s, a] = draw(st.sampled_from(NOT_FINITE))
    return reward, (InvalidRewardError, f"reward of state {s}, action {a} is NaN or infinite"), (s, a)


def reward_shape(draw: Draw, problem: Problem) -> tuple[Tensor, Expected]:
    s, a = problem.states, problem.actions
    shape = draw(
        st.sampled_from(
            [(), (0,), (s + 1,), (s + 1, a), (s, a + 1), (a + 2, s + 2), (2, s + 1, a), (s, 0), (s, a, s, s + 5)]
        )
    )
    return torch.zeros(shape, dtype=torch.float64), (InvalidRewardError, "reward has shape")


def reward_dtype(draw: Draw, problem: Problem) -> tuple[Tensor, Expected]:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex128]))
    reward = torch.zeros(problem.states, problem.actions, dtype=dtype)
    return reward, (InvalidRewardError, f"reward is {dtype} on cpu, the MDP torch.float64")


def reward_of_next_state(draw: Draw, problem: Problem) -> tuple[Tensor, Expected]:
    assume(problem.states != problem.actions)
    batch = draw(st.sampled_from([(), (3,)]))
    reward = torch.zeros(*batch, problem.states, problem.actions, problem.states, dtype=torch.float64)
    return reward, (RewardTimingError, "expected_reward")


# ------------------------------------------------------------------------------------------------ demonstrations


def demonstrations(draw: Draw) -> tuple[list[Any], list[Any], dict[str, Any], Expected]:
    """States, actions and options of demonstrations that are no whole numbers, or do not fit each other."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    states: list[Any] = [[0] * (n + 1) for n in lengths]
    actions: list[Any] = [[0] * n for n in lengths]
    i = pick(draw, len(lengths))
    t = pick(draw, lengths[i])
    n = len(lengths)
    what = draw(st.sampled_from(["number", "state", "action", "count", "episodes", "lengths", "horizons", "limits",
                                 "subjects", "terminated", "column"]))  # fmt: skip
    error: type[Exception] = InvalidTrajectoriesError
    options: dict[str, Any] = {}
    if what == "number":
        which, name = draw(st.sampled_from([(states, "states"), (actions, "actions")]))
        bad = draw(st.sampled_from([math.nan, math.inf, 0.5, "one", None, 1j, [0, 1], 2**70]))
        which[i][t] = bad
        words = rf"{name}\[{i}\] (must be|cannot be read as) whole numbers"
    elif what == "state":
        states[i][t] = draw(st.integers(-9, -1))
        words = f"trajectory {i}, step {t}: the state is negative or missing"
    elif what == "action":
        assume(t < lengths[i] - 1)
        actions[i][t] = draw(st.integers(-9, -1))
        words = f"trajectory {i}, step {t}: the action is negative or missing"
    elif what == "count":
        states[i] = [0] * draw(st.sampled_from([lengths[i] - 1, lengths[i] + 2, lengths[i] + 7]))
        words = f"trajectory {i} has {len(states[i])} states for {lengths[i]} actions"
    elif what == "episodes":
        (states if draw(st.booleans()) else actions).append([0])
        words = r"states \(.*\) do not fit actions \("
    elif what == "column":
        states, actions = draw(
            st.sampled_from([(0, [[0]]), ([[0]], 3.5), ("ab", [[0]]), ([0, 0], [0]), ([[0]], [0]), ({}, [[0]])])
        )
        words = r"(states|actions)(\[0\])? (must be|cannot be read as) whole numbers|do not fit"
    elif what == "terminated":
        states = [x[:-1] for x in states]
        options["ends"] = "terminated"
        words = "trajectory 0 ends 'terminated' without its last state"
    else:
        column = [0] * n if what == "subjects" else list(lengths)
        short = what in ("lengths", "horizons", "limits") and draw(st.booleans())
        if not short:
            column = draw(st.sampled_from([column[1:], [*column, 1], [*column[1:], 0.5], [*column[1:], math.nan]]))
            words = rf"{what} (has {len(column)} entries for {n} episodes|must be whole numbers)"
        elif what == "lengths":
            column[i] = draw(st.sampled_from([-1, max(lengths) + 1, 10**9]))
            words = f"lengths must lie between 0 and {max(lengths)}"
        else:
            column[i] = lengths[i] - 1
            words = f"trajectory {i} has {lengths[i]} decisions, more than its {what[:-1]} {column[i]}"
            error = HorizonError if what == "horizons" else error
        if what == "lengths" and not all(isinstance(x, int) for x in column):
            words = "lengths must be whole numbers"
        options[what] = column
    return states, actions, options, (error, words)


def spoil(draw: Draw, problem: Problem, episode: Episode) -> None:
    """Change one number of an episode, or let it go on; what comes of it may still be possible."""
    at = pick(draw, len(episode.states))
    how = draw(st.sampled_from(["state", "state", "action", "go on"]))
    if how == "state":
        episode.states[at] = draw(st.integers(0, problem.states + 1))
    elif how == "action" and episode.actions:
        episode.actions[pick(draw, len(episode.actions))] = draw(st.integers(0, problem.actions + 1))
    elif how == "go on" and len(episode.states) > len(episode.actions):
        episode.actions.append(draw(st.integers(0, problem.actions - 1)))
        episode.states.append(draw(st.integers(0, problem.states - 1)))


def complaints(problem: Problem, seen: list[Episode]) -> list[Expected]:
    """Everything that is wrong with demonstrations, rule by rule: any of it may be what is told."""
    found: list[Expected] = []
    limit = problem.options.get("horizon")
    for i, episode in enumerate(seen):
        for t, state in enumerate(episode.states):
            where = f"trajectory {i}, step {t}: "
            action = episode.actions[t] if t < len(episode.actions) else None
            if state >= problem.states:
                found.append((InvalidTrajectoriesError, f"{where}state {state} is out of range"))
            elif t == 0 and state not in problem.starts():
                found.append((ImpossibleTransitionError, f"{where}start state {state} has initial probability 0"))
            if action is None:
                continue
            if action >= problem.actions:
                found.append((InvalidTrajectoriesError, f"{where}action {action} is out of range"))
            if state >= problem.states or action >= problem.actions:
                continue
            if problem.ends(state):
                found.append((InvalidTrajectoriesError, f"{where}action {action} in terminal state {state}"))
            elif action not in problem.acts(state):
                found.append((UnavailableActionError, f"{where}action {action} is not available in state {state}"))
            if t + 1 < len(episode.states):
                following = episode.states[t + 1]
                if following < problem.states and problem.table[state][action][following] == 0:
                    words = f"moving from state {state} by action {action} to state {following} has probability 0"
                    found.append((ImpossibleTransitionError, f"{where}{words}"))
        if limit is not None and len(episode.actions) > limit:
            words = f"trajectory {i} has {len(episode.actions)} decisions, more than the horizon {limit}"
            found.append((HorizonError, words))
    return [(error, re.escape(words)) for error, words in found]
