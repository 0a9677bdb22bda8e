"""Demonstrations: simulated ones, mice in a labyrinth, and Rust's (1987) bus engines.

Harold Zurcher's monthly records, in which the state is the mileage since the last replacement in bins of 5,000 miles;
the actions are to keep the engine or to replace it. Conventions that reproduce Rust's figures:

- an engine is replaced in the last month before the odometer passes the replacement's reading;
- each bus's first month is dropped, because its usage is unknown;
- the usage of a month is the difference of the two states, but after a replacement it is the new mileage *rounded up*
  to bins, while the state is rounded down. That reproduces Rust and is not one generative model, so fit the choices;
- the first stage is the relative frequency of usages among the buses that are fitted, all of them together;
- the last state keeps the probability of all that lies beyond it, and replacing acts as keeping does in state 0.

Source: J. Rust, "Optimal Replacement of GMC Bus Engines", Econometrica 55(5), 1987, table IX.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.distributions import MaxCausalEntTrajectory, MaxEntTrajectory
from pirl.errors import DataError, InvalidTrajectoriesError, OptionError, check_counts, first_line
from pirl.mdp import TabularMDP
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    import pandas

BIN_MILES = 5_000
NUM_STATES = 90
LABYRINTH_NODES = 127

# The published files, one number a line, and how many of them make one bus.
_FILES = {1: ("g870.asc", 36), 2: ("rt50.asc", 60), 3: ("t8h203.asc", 81), 4: ("a530875.asc", 128)}
_MOUSE_ARRAYS = ("states", "actions", "train_idx", "val_idx")
# What stands above a bus's odometer readings.
_HEADER_ROWS = 11
_REPLACEMENT_ROWS = (5, 8)
_LARGEST = 1e9


@dataclass(frozen=True, eq=False)
class BusData:
    """What the choices and the usage of a fleet come to, bus by bus: all that a likelihood needs.

    Attributes:
        bus: identity of each bus, B of them.
        group: Rust's group of each bus.
        choices: months ``[B, S, 2]`` in which the bus was in a state and its engine kept (0) or replaced (1).
        usage: months ``[B, J]`` in which the bus moved up by 0, 1, ... J - 1 states.

    Example:
        >>> fleet = zurcher_table("4")
        >>> fleet.usage.sum(dim=0)
        tensor([1682, 2555,   55])
    """

    bus: tuple[int, ...]
    group: tuple[int, ...]
    choices: Int[Tensor, "B S 2"]
    usage: Int[Tensor, "B J"]

    def __len__(self) -> int:
        return len(self.bus)

    def select(self, groups: str) -> BusData:
        """The buses of some groups, such as ``"4"``, ``"1-3"`` or ``"1,2"``.

        Raises:
            OptionError: ``groups`` is not like that.
            DataError: no bus here belongs to them.
        """
        wanted = _group_numbers(groups)
        keep = [row for row, group in enumerate(self.group) if group in wanted]
        if not keep:
            raise DataError(f"no bus of groups {groups!r} here: there are groups {sorted(set(self.group))}")
        return BusData(
            bus=tuple(self.bus[row] for row in keep),
            group=tuple(self.group[row] for row in keep),
            choices=self.choices[keep],
            usage=self.usage[keep],
        )


def simulate(
    mdp: TabularMDP, reward: Tensor, num_episodes: int, length: int, reading: str = "causal", seed: int = 0
) -> Trajectories:
    """Demonstrations of a soft-optimal agent, watched for ``length`` decisions or until a terminal state.

    Args:
        mdp: the decision problem.
        reward: r(s) ``[S]`` or ``[S, 1]``, or r(s,a) ``[S, A]``.
        num_episodes: number of demonstrations.
        length: decisions watched, at most the horizon where there is one.
        reading: "causal", or "trajectory" for an agent that controls its luck as well.
        seed: the same numbers for the same seed; torch's random state stays as it was.

    Raises:
        OptionError: there is no such reading, or a number is out of range.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, discount=0.9)
        >>> simulate(mdp, torch.zeros(1, 2).double(), num_episodes=3, length=5)
        Trajectories(3 episodes, 15 decisions)
    """
    readings = {"causal": MaxCausalEntTrajectory, "trajectory": MaxEntTrajectory}
    if reading not in readings:
        raise OptionError(f"there is no reading {reading!r}: choose causal or trajectory")
    check_counts(1, num_episodes=num_episodes)
    check_counts(0, length=length, seed=seed)
    law = readings[reading](mdp, reward, lengths=torch.full((num_episodes,), length, device=mdp.device))
    with torch.random.fork_rng(devices=[mdp.device] if mdp.device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = law.sample()
    ends = mdp.terminal[drawn[..., 0].clamp_min(0)] & (drawn[..., 0] >= 0)
    return Trajectories(
        states=drawn[..., 0],
        actions=drawn[:, :-1, 1],
        ends=tuple("terminated" if ended else "truncated" for ended in ends.any(1).tolist()),
        limits=torch.full((num_episodes,), length, device=mdp.device),
    )


def labyrinth_transition() -> Float[Tensor, "S 4 S"]:
    """Transition table of the labyrinth of Rosenberg et al. (2021): a binary tree of 127 nodes, without chance.

    Nodes are numbered level by level from the entrance, 0: node s leads left to 2 s + 1 and right to 2 s + 2. Actions
    are left (0), right (1), back (2) and stay (3). What cannot be done is to stay: left and right at the 64 ends, back
    at the entrance.

    Example:
        >>> labyrinth_transition()[5].nonzero()[:, 1]
        tensor([11, 12,  2,  5])
    """
    node = torch.arange(LABYRINTH_NODES)
    following = torch.stack([2 * node + 1, 2 * node + 2, (node - 1).div(2, rounding_mode="floor"), node], dim=1)
    possible = (following >= 0) & (following < LABYRINTH_NODES)
    following = torch.where(possible, following, node.unsqueeze(1))
    return torch.nn.functional.one_hot(following, LABYRINTH_NODES).to(torch.float64)


def mouse_labyrinth(folder: str | Path) -> tuple[Trajectories, Trajectories]:
    """Paths of water-deprived mice through the labyrinth, to learn from (160) and to test on (40), 22 decisions each.

    The folder holds water_restricted.npz with arrays states and actions ``[200, 22]``, train_idx and val_idx, as
    published with Ashwood, Jha and Pillow (2022) after Rosenberg et al. (2021). Water is at node 100. Many paths are
    the same, decision by decision.

    Raises:
        DataError: the file is missing or malformed, or shows a move that the labyrinth does not have.

    Example:
        >>> training, validation = mouse_labyrinth("mouse_labyrinth")  # doctest: +SKIP
    """
    path = Path(folder) / "water_restricted.npz"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = [_as_tensor(file[name].astype(np.int64, casting="safe")) for name in _MOUSE_ARRAYS]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): it comes with Ashwood et al. (2022)") from None
    except Exception as error:  # a damaged archive has as many kinds of them as zip, zlib and NumPy have parts
        names = ", ".join(_MOUSE_ARRAYS)
        raise DataError(f"{path} is not an archive of whole numbers {names}: {first_line(error)}") from None
    states, actions, *split = arrays
    try:
        demos = Trajectories(states, actions)
        demos.validate(TabularMDP(labyrinth_transition(), 0, horizon=actions.shape[1]))
        training, validation = (demos[numbers] for numbers in split)
    except InvalidTrajectoriesError as error:
        raise DataError(f"{path}: {error}") from None
    except IndexError:
        raise DataError(f"{path}: train_idx and val_idx must be numbers of its {len(demos)} paths") from None
    return training, validation


def zurcher_table(groups: str = "1-4") -> BusData:
    """Rust's groups 1 to 4 (104 buses), from the table of counts that is installed with pirl.

    Example:
        >>> fleet = zurcher_table("1-4")
        >>> len(fleet), fleet.choices[..., 1].sum().item()
        (104, 60)
    """
    folder = resources.files("pirl") / "data"
    with (folder / "zurcher_usage.csv").open() as file:
        usage = np.loadtxt(file, dtype=np.int64, delimiter=",", skiprows=1)
    with (folder / "zurcher_choices.csv").open() as file:
        choices = np.loadtxt(file, dtype=np.int64, delimiter=",", skiprows=1)
    bus, group = usage[:, 0], usage[:, 1]
    counts = np.zeros((len(bus), NUM_STATES, 2), dtype=np.int64)
    row_of = {identity: row for row, identity in enumerate(bus)}
    rows = [row_of[identity] for identity in choices[:, 0]]
    counts[rows, choices[:, 1]] = choices[:, 2:]
    everyone = BusData(tuple(bus.tolist()), tuple(group.tolist()), torch.from_numpy(counts), _as_tensor(usage[:, 2:]))
    return everyone.select(groups)


def zurcher_raw(folder: str | Path, groups: str = "1-4") -> BusData:
    """The same counts from a folder of matrices in Rust's format; :func:`zurcher_months` tells their layout and errors.

    Example:
        >>> fleet = zurcher_raw("my_buses", groups="4")  # doctest: +SKIP
    """
    months = zurcher_months(folder, groups)
    fleet = months.drop_duplicates("bus")
    row = months["bus"].map({bus: row for row, bus in enumerate(fleet["bus"])}).to_numpy()
    choices = np.zeros((len(fleet), NUM_STATES, 2), dtype=np.int64)
    np.add.at(choices, (row, months["state"], months["replaced"]), 1)
    usage = np.zeros((len(fleet), months["usage"].max() + 1), dtype=np.int64)
    np.add.at(usage, (row, months["usage"]), 1)
    return BusData(tuple(fleet["bus"].tolist()), tuple(fleet["group"].tolist()), _as_tensor(choices), _as_tensor(usage))


def zurcher_months(folder: str | Path, groups: str = "1-4") -> pandas.DataFrame:
    """Every month of every bus but its first: columns bus, group, month, state, replaced (0 or 1) and usage.

    Usage is the number of states moved up since the month before. The folder holds g870.asc (group 1), rt50.asc (2),
    t8h203.asc (3) and a530875.asc (4), those of the chosen groups at least. A column is a bus: its identity in row 1,
    the odometer at its first and second replacement in rows 6 and 9 (0 = none), monthly odometer readings in miles from
    row 12 on. A file with several numbers a line is that matrix; a file with one number a line, as published, is the
    matrix column by column with 36, 60, 81 or 128 rows.

    Raises:
        DataError: a file is missing or malformed, an odometer runs backwards, a replacement lies outside the readings.
        OptionError: ``groups`` is not like "4", "1-3" or "1,2".

    Example:
        >>> months = zurcher_months("my_buses", groups="4")  # doctest: +SKIP
    """
    import pandas

    frames = []
    for group in _group_numbers(groups):
        path = Path(folder) / _FILES[group][0]
        for column in _read_matrix(path, num_rows=_FILES[group][1]).T:
            frames.append(pandas.DataFrame({"bus": int(column[0]), "group": group} | _bus_months(column, path)))
    months = pandas.concat(frames, ignore_index=True)
    if months.duplicated(["bus", "month"]).any():
        twice = months.loc[months.duplicated(["bus", "month"]), "bus"].iloc[0]
        raise DataError(f"bus {twice} occurs twice in {folder}: each bus must have an identity (row 1) of its own")
    return months


def bus_transition(
    usage: Float[Tensor, " J"] | Int[Tensor, " J"], num_states: int = NUM_STATES
) -> Float[Tensor, "S 2 S"]:
    """Transition table of keeping (0) and replacing (1).

    ``usage`` says how often a bus moved up by 0, 1, ... J - 1 states, or with what probability. The last state keeps
    the probability of all that lies beyond it; replacing acts as keeping does in state 0.

    Raises:
        DataError: a count is negative or not finite, or all of them are zero.

    Example:
        >>> bus_transition(torch.tensor([1, 3]), num_states=2)[:, 0]
        tensor([[0.2500, 0.7500],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    weight = usage.to(torch.float64)
    if not (torch.isfinite(weight).all() and (weight >= 0).all() and weight.sum() > 0):
        raise DataError(f"usage counts must be non-negative, and one of them positive: got {usage.tolist()}")
    probability = weight / weight.sum()
    state = torch.arange(num_states, device=usage.device)
    keep = probability.new_zeros(num_states, num_states)
    for increment, p in enumerate(probability):
        keep[state, (state + increment).clamp(max=num_states - 1)] += p
    return torch.stack([keep, keep[:1].expand_as(keep)], dim=1)


def _group_numbers(groups: str) -> list[int]:
    chosen: set[int] = set()
    for part in groups.split(","):
        ends = re.fullmatch(r"\s*([1-4])(?:\s*-\s*([1-4]))?\s*", part)
        if ends is None:
            raise OptionError(
                f'groups {groups!r} is not a choice among Rust\'s groups 1 to 4: write "4", "1-3" or "1,2"'
            )
        chosen.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    if not chosen:
        raise OptionError(f'groups {groups!r} names no group: write the smaller number first, as in "1-3"')
    return sorted(chosen)


def _read_matrix(path: Path, num_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The matrix [rows, buses] of one file."""
    try:
        lines = path.read_text().split("\n")
        matrix = np.loadtxt(lines, ndmin=2) if any(map(str.strip, lines)) else np.empty((0, 1))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): a folder of Rust's format holds it") from None
    except ValueError as error:
        raise DataError(f"{path} is not a matrix of numbers: {first_line(error)}") from None
    if matrix.shape[1] == 1:
        if matrix.size == 0 or matrix.size % num_rows:
            raise DataError(
                f"{path} has {matrix.size} lines: one number a line needs a multiple of {num_rows}, one bus each"
            )
        matrix = matrix.reshape(num_rows, -1, order="F")
    if len(matrix) < _HEADER_ROWS + 2:
        raise DataError(
            f"{path} has {len(matrix)} rows: a bus has {_HEADER_ROWS} of description and two or more odometer readings"
        )
    if not ((matrix >= 0).all() and (matrix < _LARGEST).all() and (matrix == np.rint(matrix)).all()):
        raise DataError(
            f"{path} holds a number that is negative, fractional, not finite or above {_LARGEST:.0e}: "
            "all are counts, years or miles"
        )
    return matrix.astype(np.int64)


def _bus_months(
    column: np.ndarray[Any, np.dtype[np.int64]], path: Path
) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Month, state, replaced and usage of one bus, without its first month."""
    odometer = column[_HEADER_ROWS:]
    where = f"{path}: bus {column[0]}"
    backwards = np.flatnonzero(np.diff(odometer) < 0)
    if backwards.size:
        raise DataError(f"{where} has an odometer that runs backwards in month {backwards[0] + 2}")
    mileage = odometer.copy()
    replaced = np.zeros_like(odometer)
    previous = 0
    for reading in column[list(_REPLACEMENT_ROWS)]:
        if reading == 0:
            continue
        passed = odometer > reading
        if passed[0] or not passed[-1] or reading < previous:
            raise DataError(
                f"{where} has a replacement at {reading} miles, which its odometer readings do not pass in order"
            )
        replaced[passed.argmax() - 1] = 1
        mileage[passed] = odometer[passed] - reading
        previous = reading
    state = mileage // BIN_MILES
    usage = np.where(replaced[:-1] == 1, -(-mileage[1:] // BIN_MILES), np.diff(state))
    return {
        "month": np.arange(1, len(odometer)),
        "state": state[1:].clip(max=NUM_STATES - 1),
        "replaced": replaced[1:],
        "usage": usage,
    }


def _as_tensor(array: np.ndarray[Any, np.dtype[np.int64]]) -> Int[Tensor, "..."]:
    return torch.from_numpy(np.ascontiguousarray(array))
