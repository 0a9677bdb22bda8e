"""Small decision problems, rewards and demonstrations of every kind, as plain lists that a failing test can print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pirl.mdp import TabularMDP
from pirl.trajectories import Trajectories

Draw = Callable[[st.SearchStrategy[Any]], Any]

MOST_PATHS = 300
"""Trajectories that are enumerated for one case."""

KINDS = ("finite", "discounted", "absorbing")


@dataclass
class Problem:
    """Arguments of a :class:`TabularMDP`, not yet looked at by it."""

    table: Any
    """[S][A][S]."""
    initial: Any
    terminal: Any
    available: Any
    prior: Any
    layout: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)
    """discount, horizon."""

    @property
    def states(self) -> int:
        return len(self.table)

    @property
    def actions(self) -> int:
        return len(self.table[0])

    def acts(self, state: int) -> list[int]:
        """Actions that can be chosen in a state."""
        allowed = range(self.actions) if self.available is None else self.available[state]
        chosen = range(self.actions) if self.available is None else [a for a in range(self.actions) if allowed[a]]
        return [a for a in chosen if isinstance(self.prior, str) or self.prior[state][a] > 0]

    def ends(self, state: int) -> bool:
        return bool(self.terminal and self.terminal[state])

    def starts(self) -> list[int]:
        if isinstance(self.initial, int):
            return [self.initial]
        return [s for s, p in enumerate(self.initial) if p > 0]

    def following(self, state: int, action: int) -> list[int]:
        return [s for s, p in enumerate(self.table[state][action]) if p > 0]

    def build(self) -> TabularMDP:
        table: Any = self.table
        if self.layout != "list" and not isinstance(table, Tensor):
            table = torch.tensor(table, dtype=torch.float64)
        if self.layout in ("coo", "csr") and not isinstance(self.table, Tensor):
            table = table.reshape(-1, table.shape[-1]).to_sparse()
            table = _to_csr(table) if self.layout == "csr" else table
        prior = self.prior if isinstance(self.prior, str) else torch.tensor(self.prior, dtype=torch.float64)
        mask = lambda x: x if x is None else torch.tensor(x)  # noqa: E731
        return TabularMDP(
            table, self.initial, terminal=mask(self.terminal), available=mask(self.available), action_prior=prior,
            **self.options,
        )  # fmt: skip

    def replace(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    def number_of_paths(self, steps: int) -> int:
        """How many trajectories of at most ``steps`` decisions there are."""
        count = [1] * self.states
        for _ in range(steps):
            count = [
                1 if self.ends(s) else sum(sum(count[n] for n in self.following(s, a)) for a in self.acts(s))
                for s in range(self.states)
            ]
        return sum(count[s] for s in self.starts())


def _to_csr(table: Tensor) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return table.to_sparse_csr()


def distributions(size: int, most: int | None = None) -> st.SearchStrategy[list[float]]:
    """Probabilities, some of them 0; at most ``most`` positive."""
    most = size if most is None else min(most, size)
    chosen = st.lists(
        st.tuples(st.integers(0, size - 1), st.integers(1, 4)),
        min_size=1,
        max_size=most,
        unique_by=lambda pair: pair[0],
    )

    def normalised(pairs: list[tuple[int, int]]) -> list[float]:
        total = sum(weight for _, weight in pairs)
        found = dict(pairs)
        return [found.get(i, 0) / total for i in range(size)]

    return chosen.map(normalised)


@st.composite
def problems(draw: Draw, kind: str | None = None, discount: bool = False, paths: int | None = MOST_PATHS) -> Problem:
    """Problems of a kind (any by default); ``discount`` lets those with a horizon have one as well."""
    kind = kind or draw(st.sampled_from(KINDS))
    states, actions = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    if kind == "absorbing":
        terminal: Any = draw(st.lists(st.booleans(), min_size=states, max_size=states))
        terminal[draw(st.integers(0, states - 1))] = True
    else:
        terminal = draw(st.none() | st.lists(st.booleans(), min_size=states, max_size=states))
    available: Any = None
    if draw(st.booleans()):
        available = draw(st.lists(st.lists(st.booleans(), min_size=actions, max_size=actions),
                                  min_size=states, max_size=states))  # fmt: skip
        for row in available:
            row[draw(st.integers(0, actions - 1))] |= not any(row)
    prior: Any = draw(st.sampled_from(["uniform", "uniform", "counting", "given"]))
    if prior == "given":
        prior = []
        for s in range(states):
            allowed = [a for a in range(actions) if available is None or available[s][a]]
            weight = draw(distributions(len(allowed)))
            prior.append([weight[allowed.index(a)] if a in allowed else 0.0 for a in range(actions)])
    most = 1 if draw(st.booleans()) else 3
    table = [[draw(distributions(states, most)) for _ in range(actions)] for _ in range(states)]
    initial = draw(st.integers(0, states - 1) | distributions(states))
    problem = Problem(
        table, initial, terminal, available, prior, draw(st.sampled_from(["dense", "coo", "csr", "list"]))
    )
    if kind == "absorbing":
        _let_all_end(problem)
    for s in range(states):  # rows that nobody takes are free
        for a in range(actions):
            if (problem.ends(s) or a not in problem.acts(s)) and draw(st.booleans()):
                table[s][a] = [0.0] * states if draw(st.booleans()) else [0.25] * states
    if kind == "discounted":
        problem.options["discount"] = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99]))
    elif discount:
        problem.options["discount"] = draw(st.sampled_from([1.0, 0.9, 0.5, 0.0]))
    if kind == "finite":
        horizon = draw(st.integers(1, 6))
        while paths is not None and horizon > 1 and problem.number_of_paths(horizon) > paths:
            horizon -= 1
        problem.options["horizon"] = horizon
    return problem


def _let_all_end(problem: Problem) -> None:
    """Let every state reach a terminal one."""
    end = problem.terminal.index(True)
    reached = set()
    while len(reached) < problem.states:
        before = len(reached)
        for s in range(problem.states):
            if problem.ends(s) or any(n in reached for a in problem.acts(s) for n in problem.following(s, a)):
                reached.add(s)
        if len(reached) == before:
            s = next(s for s in range(problem.states) if s not in reached)
            row = problem.table[s][problem.acts(s)[0]]
            row[:] = [p / 2 for p in row]
            row[end] += 0.5


MODERATE = [0.0, 0.25, -0.5, 1.0, -1.0, 2.0, -3.0, 1e-9, -1e-300]
EXTREME = [1000.0, -1000.0, 999.5, -745.5, 710.0]
COSTS = [0.0, -0.25, -0.5, -1.0, -2.0, -3.0, -1e-9]


@st.composite
def rewards(draw: Draw, problem: Problem, values: list[float] | None = None, batched: bool = True) -> Tensor:
    """r(s), r(s,a), batches of them, of any shape that is taken."""
    if values is None:
        values = MODERATE + EXTREME if draw(st.integers(0, 2)) == 0 else MODERATE
    shapes: list[tuple[int, ...]] = [(problem.states, problem.actions), (problem.states,), (problem.states, 1)]
    if batched:
        shapes += [(2, problem.states, problem.actions), (2, 1, problem.states, 1)]
    shape = torch.Size(draw(st.sampled_from(shapes)))
    numbers = draw(st.lists(st.sampled_from(values), min_size=shape.numel(), max_size=shape.numel()))
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


@dataclass
class Episode:
    """One demonstration; ``states`` has one entry more than ``actions`` where the last state was seen."""

    states: list[Any]
    actions: list[Any]
    horizon: int = -1
    subject: int = 0


def demonstrations(episodes: list[Episode], **options: Any) -> Trajectories:
    return Trajectories([e.states for e in episodes], [e.actions for e in episodes], **options)


@st.composite
def episodes(draw: Draw, problem: Problem, longest: int, blank: bool = False) -> Episode:
    """A demonstration that is possible, cut anywhere."""
    length = draw(st.integers(0, longest))
    states, actions = [draw(st.sampled_from(problem.starts()))], []
    while len(actions) < length and not problem.ends(states[-1]):
        actions.append(draw(st.sampled_from(problem.acts(states[-1]))))
        states.append(draw(st.sampled_from(problem.following(states[-1], actions[-1]))))
    if (actions or blank) and draw(st.integers(0, 3)) == 0:
        states.pop()
    return Episode(states, actions)
