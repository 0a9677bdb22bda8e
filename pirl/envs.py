"""Decision problems to practise on: gridworlds, objectworlds, random problems, and Gymnasium's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import InvalidMDPError, MissingDependencyError, check_counts
from pirl.mdp import TabularMDP

# A dense table beyond this many numbers becomes a sparse one.
_DENSE_ENTRIES = 1_000_000

# Row and column steps of the four directions, then of staying.
_MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1), "stay": (0, 0)}

Cell = int | tuple[int, int]


def gridworld(
    rows: int,
    cols: int,
    slip: float = 0.1,
    discount: float = 1.0,
    horizon: int | None = None,
    terminal: Iterable[Cell] = (),
    walls: Iterable[Cell] = (),
    initial: Cell | None = None,
    stay: bool = True,
) -> TabularMDP:
    """A grid of ``rows * cols`` states with actions up, down, left, right and, by default, stay.

    A cell is state number ``row * cols + column``. With probability ``slip`` the move is in another of the four
    directions, each equally likely. A move off the grid or into a wall ends where it began.

    Args:
        rows: number of rows, the first on top.
        cols: number of columns.
        slip: probability of moving in another direction than intended.
        discount: as in :class:`pirl.TabularMDP`.
        horizon: likewise; without it, and with discount 1, terminal cells are needed.
        terminal: cells that end an episode, as (row, column) or state numbers.
        walls: cells that are never entered. They remain states, so that numbering is simple; no episode visits them.
        initial: the cell where episodes start; by default any free cell that is not terminal, with equal probability.
        stay: whether "stay" is an action.

    Raises:
        InvalidMDPError: a size, a probability or a cell is out of range.
        UnboundedProblemError: discount 1 without horizon or reachable terminals.

    Example:
        >>> gridworld(3, 4, discount=0.9)
        TabularMDP(states=12, actions=5, discount=0.9)
    """
    if rows < 1 or cols < 1:
        raise InvalidMDPError(f"a gridworld of {rows} rows and {cols} columns is empty: both must be at least 1")
    if not 0 <= slip <= 1:
        raise InvalidMDPError(f"slip is {slip}; it is a probability, from 0 to 1")
    ends, wall = np.zeros(rows * cols, dtype=bool), np.zeros(rows * cols, dtype=bool)
    ends[[_state(cell, rows, cols) for cell in terminal]] = True
    wall[[_state(cell, rows, cols) for cell in walls]] = True
    if initial is None:
        start = (~ends & ~wall).astype(np.float64)
        if not start.any():
            raise InvalidMDPError("every cell is a wall or terminal: leave a cell where an episode can start")
    else:
        start = np.zeros(rows * cols)
        start[_state(initial, rows, cols)] = 1.0
        if start @ wall:
            raise InvalidMDPError(f"initial cell {initial} is a wall: start in a free cell")

    state = np.arange(rows * cols)
    row, column = np.divmod(state, cols)
    moved = {}
    for name, (down, right) in _MOVES.items():
        target = (row + down).clip(0, rows - 1) * cols + (column + right).clip(0, cols - 1)
        # From a wall every move is free: no episode is there, but an isolated state would be an unbounded problem.
        moved[name] = np.where(wall[target] & ~wall, state, target)
    actions = [name for name in _MOVES if stay or name != "stay"]
    entries = []
    for action, intended in enumerate(actions):
        others = [name for name in _MOVES if name not in (intended, "stay")]
        outcomes = [(intended, 1.0 - slip), *((other, slip / len(others)) for other in others)]
        for name, probability in outcomes:
            entries.append((state * len(actions) + action, moved[name], np.full(len(state), probability)))
    pair, following, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    table = _table(pair, following, value, len(state), len(actions))
    return TabularMDP(
        table,
        torch.from_numpy(start / start.sum()),
        discount=discount,
        horizon=horizon,
        terminal=torch.from_numpy(ends),
        action_names=tuple(actions),
    )


def gridworld_features(rows: int, cols: int, num_features: int = 8, seed: int = 0) -> Float[Tensor, "S K"]:
    """Radial features of a gridworld's states: exp(-d^2 / 2 w^2) of the distances d to K distinct random cells.

    The width w is half the typical distance between neighbouring centres: sqrt(rows * cols / K) / 2.

    Raises:
        InvalidMDPError: there are more features than cells, or none.

    Example:
        >>> gridworld_features(10, 10).shape
        torch.Size([100, 8])
    """
    if not 1 <= num_features <= rows * cols:
        raise InvalidMDPError(
            f"{num_features} features of {rows * cols} cells: choose a number from 1 to {rows * cols}"
        )
    cell = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
    check_counts(0, seed=seed)
    centre = cell[np.random.default_rng(seed).choice(len(cell), num_features, replace=False)]
    squared_distance = ((cell[:, None] - centre) ** 2).sum(axis=-1)
    width = np.sqrt(len(cell) / num_features) / 2
    return torch.from_numpy(np.exp(-squared_distance / (2 * width**2)))


class ObjectWorld(NamedTuple):
    """A grid with coloured objects on it, whose true reward is a nonlinear function of its features.

    Attributes:
        mdp: the dynamics, those of a gridworld.
        features: distance ``[S, 2C]`` of each cell to the nearest object of each inner colour, then of each outer one,
            in cells.
        reward: the true reward r(s) ``[S]``, 1, -1 or 0.
        objects: cell, inner colour and outer colour of each object ``[n, 3]``.

    Example:
        >>> world = objectworld(8, num_objects=10)
        >>> world.mdp, world.features.shape
        (TabularMDP(states=64, actions=5, discount=0.9), torch.Size([64, 4]))
        >>> world.reward.unique()
        tensor([-1.,  0.,  1.], dtype=torch.float64)
    """

    mdp: TabularMDP
    features: Float[Tensor, "S K"]
    reward: Float[Tensor, " S"]
    objects: Int[Tensor, "n 3"]


def objectworld(
    size: int = 10, num_objects: int = 15, num_colours: int = 2, slip: float = 0.3, discount: float = 0.9, seed: int = 0
) -> ObjectWorld:
    """A square grid with objects, each of one inner and one outer colour, on random cells.

    The reward is 1 within 3 cells of outer colour 0 and also within 2 cells of outer colour 1, -1 within 3 cells of
    outer colour 0 only, and 0 elsewhere, by Euclidean distance. Inner colours, and other outer ones, only distract.
    No linear function of the distances comes near it.

    Args:
        size: rows, and columns.
        num_objects: at least as many as colours, so that each colour occurs; at most one a cell.
        num_colours: C, at least 2.
        slip, discount: as in :func:`gridworld`.

    Raises:
        InvalidMDPError: a number is out of range.

    Source: S. Levine, Z. Popovic and V. Koltun, "Nonlinear Inverse Reinforcement Learning with Gaussian Processes",
    NIPS 2011, section 6.

    Example:
        >>> objectworld(8, num_objects=10).features.shape
        torch.Size([64, 4])
    """
    if not 2 <= num_colours <= num_objects <= size**2:
        raise InvalidMDPError(
            f"{num_objects} objects of {num_colours} colours on {size**2} cells: at least 2 colours, as many objects "
            "as colours, and as many cells as objects"
        )
    check_counts(0, seed=seed)
    generator = np.random.default_rng(seed)
    place = generator.choice(size**2, num_objects, replace=False)
    # The first objects have a colour each.
    rest = (2, num_objects - num_colours)
    colour = np.concatenate(
        [np.tile(np.arange(num_colours), (2, 1)), generator.integers(num_colours, size=rest)], axis=1
    )
    colour = generator.permuted(colour, axis=1)
    cell = np.stack(np.divmod(np.arange(size**2), size), axis=1)
    distance = np.linalg.norm(cell[:, None] - cell[place], axis=-1)
    nearest = np.stack([distance[:, kind == c].min(axis=1) for kind in colour for c in range(num_colours)], axis=1)
    near, both = nearest[:, num_colours] <= 3, nearest[:, num_colours + 1] <= 2
    return ObjectWorld(
        gridworld(size, size, slip=slip, discount=discount),
        torch.from_numpy(nearest),
        torch.from_numpy(np.where(near, np.where(both, 1.0, -1.0), 0.0)),
        torch.from_numpy(np.stack([place, *colour], axis=1)),
    )


def random_mdp(
    num_states: int,
    num_actions: int,
    seed: int = 0,
    branching: int | None = None,
    discount: float = 0.9,
    horizon: int | None = None,
) -> TabularMDP:
    """Every action leads to ``branching`` distinct states (all by default), with probabilities uniform on the simplex.

    Raises:
        InvalidMDPError: a size is out of range.

    Example:
        >>> random_mdp(6, 2, seed=1, branching=3)
        TabularMDP(states=6, actions=2, discount=0.9)
    """
    branching = num_states if branching is None else branching
    if num_states < 1 or num_actions < 1 or not 1 <= branching <= num_states:
        raise InvalidMDPError(
            f"{num_states} states, {num_actions} actions, branching {branching}: all must be at least 1, "
            "and branching at most the number of states"
        )
    check_counts(0, seed=seed)
    generator = np.random.default_rng(seed)
    pairs = num_states * num_actions
    column = np.stack([generator.choice(num_states, branching, replace=False) for _ in range(pairs)])
    value = generator.dirichlet(np.ones(branching), size=pairs)
    row = np.repeat(np.arange(pairs), branching)
    table = _table(row, column.ravel(), value.ravel(), num_states, num_actions)
    initial = torch.from_numpy(generator.dirichlet(np.ones(num_states)))
    return TabularMDP(table, initial, discount=discount, horizon=horizon)


class TabularEnvironment(NamedTuple):
    """A Gymnasium table as a decision problem, and the reward that Gymnasium gives in it.

    Attributes:
        mdp: the dynamics.
        reward: expected reward r(s, a) ``[S, A]``; zero in terminal states, where Gymnasium's episodes are over.
        reward_sas: r(s, a, s') ``[S, A, S]``, zero where P(s'|s,a) is; its mean is right for the causal reading only.

    Example:
        >>> lake = from_gymnasium("FrozenLake-v1", horizon=100)
        >>> lake.reward.shape, lake.reward_sas.shape
        (torch.Size([16, 4]), torch.Size([16, 4, 16]))
    """

    mdp: TabularMDP
    reward: Tensor
    reward_sas: Tensor


def from_gymnasium(env: Any, discount: float = 1.0, horizon: int | None = None) -> TabularEnvironment:
    """Read the table ``env.unwrapped.P`` of a Gymnasium environment (FrozenLake, Taxi, CliffWalking), or of its name.

    Gymnasium marks the transitions that end an episode; here it ends in terminal states, so every state that such a
    transition enters becomes one. A time limit is not part of the table: give ``horizon``.

    Raises:
        MissingDependencyError: ``env`` is a name and Gymnasium is not installed.
        InvalidMDPError: there is no table, or a state is entered both with and without an end of the episode.

    Example:
        >>> from_gymnasium("FrozenLake-v1").mdp
        TabularMDP(states=16, actions=4, terminal=5)
    """
    if isinstance(env, str):
        try:
            import gymnasium
        except ImportError:
            raise MissingDependencyError("gymnasium is not installed: pip install 'pirl[envs]'") from None
        env = gymnasium.make(env)
    inner = getattr(env, "unwrapped", env)
    table, initial = getattr(inner, "P", None), getattr(inner, "initial_state_distrib", None)
    if table is None or initial is None:
        raise InvalidMDPError(
            f"{type(inner).__name__} has no table P and initial_state_distrib: only tabular ones are read"
        )

    num_states, num_actions = len(table), 1 + max(action for choices in table.values() for action in choices)
    start = np.asarray(initial, dtype=np.float64)
    available = np.zeros((num_states, num_actions), dtype=bool)
    columns: list[list[float]] = []
    for state, choices in table.items():
        for action, outcomes in choices.items():
            available[state, action] = True
            columns += [[state, action, p, following, reward, done] for p, following, reward, done in outcomes if p > 0]
    listed = np.array(columns)
    state, action, following = (listed[:, i].astype(np.int64) for i in (0, 1, 3))
    probability, reward, done = listed[:, 2], listed[:, 4], listed[:, 5].astype(bool)

    ends = _terminal_states(start > 0, state, following, done)
    # The reward listed where an episode is over already is never received.
    reward = np.where(ends[state], 0.0, reward)
    row = state * num_actions + action
    reward_sa, reward_sas = np.zeros(num_states * num_actions), np.zeros((num_states * num_actions, num_states))
    np.add.at(reward_sa, row, probability * reward)
    # A next state may be listed twice: its reward is the mean over the ways there.
    total = np.zeros_like(reward_sas)
    np.add.at(total, (row, following), probability)
    np.add.at(reward_sas, (row, following), probability * reward)
    np.divide(reward_sas, total, out=reward_sas, where=total > 0)
    mdp = TabularMDP(
        _table(row, following, probability, num_states, num_actions),
        torch.from_numpy(start / start.sum()),
        discount=discount,
        horizon=horizon,
        terminal=torch.from_numpy(ends),
        available=torch.from_numpy(available),
    )
    return TabularEnvironment(
        mdp,
        torch.from_numpy(reward_sa.reshape(num_states, num_actions)),
        torch.from_numpy(reward_sas.reshape(num_states, num_actions, num_states)),
    )


def _terminal_states(visited: np.ndarray, state: np.ndarray, following: np.ndarray, done: np.ndarray) -> np.ndarray:
    """States that transitions marked ``done`` enter; at first ``visited`` are those where an episode can begin."""
    while True:
        further = visited.copy()
        further[following[visited[state] & ~done]] = True
        if (further == visited).all():
            break
        visited = further
    ending, ending_seen = np.zeros_like(visited), np.zeros_like(visited)
    ending[following[done]] = True
    ending_seen[following[done & visited[state]]] = True
    both = np.flatnonzero(ending_seen & visited)
    if both.size:
        raise InvalidMDPError(f"entering state {both[0]} ends some episodes and not others: split it into two states")
    # Taxi also lists ways in without an end, from states that no episode visits; they do not count.
    return ending & ~visited


def _table(row: np.ndarray, column: np.ndarray, value: np.ndarray, num_states: int, num_actions: int) -> Tensor:
    """Transition table of entries (row ``s * A + a``, column s'), summed where repeated; sparse when large."""
    indices = torch.from_numpy(np.stack([row, column]).astype(np.int64))
    shape = (num_states * num_actions, num_states)
    table = torch.sparse_coo_tensor(indices, torch.from_numpy(value), shape, check_invariants=True).coalesce()
    if num_actions * num_states**2 > _DENSE_ENTRIES:
        return table
    return table.to_dense().reshape(num_states, num_actions, num_states)


def _state(cell: Cell, rows: int, cols: int) -> int:
    row, column = cell if isinstance(cell, tuple) else divmod(cell, cols)
    if not (0 <= row < rows and 0 <= column < cols):
        raise InvalidMDPError(f"cell {cell} is outside the grid of {rows} rows and {cols} columns")
    return row * cols + column
