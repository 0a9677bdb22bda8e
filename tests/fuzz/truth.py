"""What is right, from the definitions, one number at a time: sums over enumerated trajectories, plain recursions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pirl.mdp import TabularMDP
from tests.fuzz.strategies import Problem
from tests.oracle import Path

Matrix = list[list[float]]

EPS = 2.0**-52


def log_sum(terms: Iterable[float]) -> float:
    terms = list(terms)
    top = max(terms, default=-math.inf)
    if top == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(x - top) for x in terms))


def log_weight(path: Path, reward: Matrix) -> float:
    """log of p(tau) exp(sum r)."""
    return math.log(path.probability) + math.fsum(reward[s][a] for s, a in path.visited)


def log_prior(problem: Problem) -> Matrix:
    """log p(a|s), with the no-op of terminal states."""
    found = []
    for s in range(problem.states):
        row = [-math.inf] * problem.actions
        if problem.ends(s):
            row[0] = 0.0
        else:
            acts = problem.acts(s)
            for a in acts:
                if problem.prior == "uniform":
                    row[a] = -math.log(len(acts))
                elif problem.prior == "counting":
                    row[a] = 0.0
                else:
                    row[a] = math.log(problem.prior[s][a])
        found.append(row)
    return found


class Rules:
    """One step of the recursion of either reading, and of a plan."""

    def __init__(
        self, problem: Problem, reward: Matrix, reading: str, discount: float = 1.0, stop: float = 0.0
    ) -> None:
        self.problem, self.reward, self.reading = problem, reward, reading
        self.discount, self.stop, self.prior = discount, stop, log_prior(problem)

    def q(self, value: list[float]) -> Matrix:
        """r + log p(a|s) + what follows; -inf where an action cannot be taken."""
        problem = self.problem
        return [
            [
                -math.inf
                if prior == -math.inf
                else prior + self.reward[s][a] + (0.0 if problem.ends(s) else self.after(s, a, value))
                for a, prior in enumerate(self.prior[s])
            ]
            for s in range(problem.states)
        ]

    def after(self, s: int, a: int, value: list[float]) -> float:
        row = [(p, v) for p, v in zip(self.problem.table[s][a], value, strict=True) if p > 0]
        if self.reading == "trajectory":
            stopped = [math.log(self.stop)] if self.stop > 0 else []
            return log_sum([*stopped, *(math.log(p * (1 - self.stop)) + v for p, v in row)])
        return self.discount * math.fsum(p * v for p, v in row)

    def step(self, value: list[float]) -> tuple[list[float], Matrix]:
        """V and log pi one decision earlier."""
        q = self.q(value)
        new = [log_sum(row) for row in q]
        return new, [[x - v for x in row] for row, v in zip(q, new, strict=True)]

    def finite(self, horizon: int) -> tuple[list[list[float]], list[Matrix]]:
        """V and log pi by decisions to go, 0..K and 1..K."""
        values, policies = [[0.0] * self.problem.states], []
        for _ in range(horizon):
            value, policy = self.step(values[-1])
            values.append(value)
            policies.append(policy)
        return values, policies


def tolerance(steps: int, size: float) -> float:
    """Rounding of a recursion: some operations a step, each on numbers of this size."""
    return 100 * EPS * max(1, steps) * (1.0 + size)


def initial(problem: Problem) -> list[float]:
    if isinstance(problem.initial, int):
        return [float(s == problem.initial) for s in range(problem.states)]
    return problem.initial


def rows(mdp: TabularMDP, reward: Any) -> list[Matrix]:
    """Each reward of a batch as a plain table."""
    return mdp.check_reward(reward).reshape(-1, mdp.num_states, mdp.num_actions).tolist()
