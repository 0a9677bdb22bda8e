"""The slow truth: every trajectory of a tiny problem, enumerated in plain Python from the definitions alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pirl.mdp import TabularMDP


class Path(NamedTuple):
    """One trajectory: (state, action) of every step, then the last state; and the factors of its weight."""

    pairs: tuple[tuple[int, int], ...]
    last: int | None
    """The state after the last action; None where a geometric stop came instead."""
    probability: float
    """p(s_1) prod p(a|s) P(s'|s,a), and the probability of stopping or going on."""
    visited: tuple[tuple[int, int], ...]
    """Pairs whose reward counts: all steps, and the no-op of a terminal state."""


def paths(mdp: TabularMDP, steps: int, horizon: int | None = None, stop: float = 0.0) -> Iterator[Path]:
    """Every trajectory of at most ``steps`` decisions that is possible at all.

    A terminal state ends the episode after its no-op, for which a decision must be left (of ``horizon``).
    """
    table = mdp.transition.to_dense().reshape(mdp.num_states, mdp.num_actions, mdp.num_states).tolist()
    prior = mdp.log_prior.exp().tolist()
    terminal = mdp.terminal.tolist()
    horizon = steps if horizon is None else horizon

    def go(pairs: tuple[tuple[int, int], ...], state: int, probability: float) -> Iterator[Path]:
        if terminal[state]:
            no_op = ((state, 0),) if len(pairs) < horizon else ()
            yield Path(pairs, state, probability, pairs + no_op)
            return
        if len(pairs) == steps:
            yield Path(pairs, state, probability, pairs)
            return
        for action, p_action in enumerate(prior[state]):
            if p_action == 0:
                continue
            acted = (*pairs, (state, action))
            if stop > 0:
                yield Path(acted, None, probability * p_action * stop, acted)
            for following, p_next in enumerate(table[state][action]):
                if p_next > 0:
                    yield from go(acted, following, probability * p_action * p_next * (1 - stop))

    for state, p in enumerate(mdp.initial.tolist()):
        if p > 0:
            yield from go((), state, p)


def reward_sum(path: Path, reward: Tensor) -> float:
    """sum_t r(s_t, a_t) of one trajectory."""
    return math.fsum(float(reward[s, a]) for s, a in path.visited)


def log_partition(mdp: TabularMDP, reward: Tensor, stop: float = 0.0, steps: int | None = None) -> float:
    """log sum_tau p(tau) exp(sum r), term by term."""
    steps = steps or mdp.horizon
    assert steps is not None
    return math.log(math.fsum(p.probability * math.exp(reward_sum(p, reward)) for p in paths(mdp, steps, stop=stop)))


def causal_policy(mdp: TabularMDP, reward: Tensor, to_go: int) -> list[list[float]]:
    """log pi(a|s) with ``to_go`` decisions left, by the recursion of the definition, one number at a time."""
    value = [0.0] * mdp.num_states
    table = mdp.transition.to_dense().reshape(mdp.num_states, mdp.num_actions, mdp.num_states).tolist()
    prior = mdp.log_prior.tolist()
    policy: list[list[float]] = []
    for _ in range(to_go):
        q = [
            [
                prior[s][a]
                + float(reward[s, a])
                + (
                    0.0
                    if mdp.terminal[s]
                    else mdp.discount * math.fsum(p * v for p, v in zip(table[s][a], value, strict=True))
                )
                if prior[s][a] > -math.inf
                else -math.inf
                for a in range(mdp.num_actions)
            ]
            for s in range(mdp.num_states)
        ]
        value = [math.log(math.fsum(math.exp(x) for x in row)) for row in q]
        policy = [[x - v for x in row] for row, v in zip(q, value, strict=True)]
    return policy


def as_tensor(path: Path, slots: int) -> Tensor:
    """The path as pirl writes it: (state, action), a last state (s, -1), padding."""
    rows = [list(pair) for pair in path.pairs]
    if path.last is not None:
        rows.append([path.last, -1])
    rows += [[-1, -1]] * (slots - len(rows))
    return torch.tensor(rows)


def random_mdp(seed: int, states: int = 3, actions: int = 2, stochastic: bool = True, **options: object) -> TabularMDP:
    """A small random problem; one zero in each row keeps support questions honest."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(states, actions, states, generator=generator, dtype=torch.float64)
    if stochastic:
        table = table * (torch.rand(table.shape, generator=generator) > 0.25)
        table[..., 0] += 0.1
    else:
        table = torch.nn.functional.one_hot(table.argmax(-1), states).double()
    table = table / table.sum(-1, keepdim=True)
    initial = torch.rand(states, generator=generator, dtype=torch.float64)
    return TabularMDP(table, initial / initial.sum(), **options)  # type: ignore[arg-type]
