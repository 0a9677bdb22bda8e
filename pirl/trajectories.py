"""`Trajectories`: demonstrations, ragged and validated, as one tensor that a Pyro model observes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from pirl.errors import (
    EmptyTrajectoriesWarning,
    HorizonError,
    ImpossibleTransitionError,
    InvalidTrajectoriesError,
    UnavailableActionError,
    form,
    warn,
)
from pirl.transitions import Dynamics

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# A terminated episode that nobody said for how long it would have been watched is simulated for up to this many times
# the longest one: it will nearly always have ended by then.
_ROOM_TO_END = 5

End = Literal["truncated", "terminated", "horizon"]


class Trajectories:
    """N episodes of states and actions.

    Args:
        states: ``[N, T]``, or ``[N, T + 1]`` with the state after the last action; integers, or a list of N sequences.
        actions: ``[N, T]`` integers, or a list of N sequences. Entries after an episode's length are ignored.
        lengths: number of actions of each episode ``[N]``; by default up to the first negative action.
        ends: why each episode ends, one word for all or one each. "truncated": we stopped watching. "terminated":
            the last state is terminal (:meth:`validate` checks it). "horizon": the demonstrator knew that it would end
            there. Likelihoods see for themselves which states are terminal; simulation needs to be told (``limits``).
        horizons: the horizon that each demonstrator knew ``[N]``, where it differs from the length of an episode with
            ends="horizon"; -1 where the decision problem's counts.
        limits: for how many decisions each episode would have been watched ``[N]``, which is what simulated episodes
            are given. By default the length; for an episode that terminated, five times the longest length.
        subjects: number of the subject that each episode belongs to ``[N]``.

    Raises:
        InvalidTrajectoriesError: shapes disagree, or entries are not whole numbers.

    With no episodes at all there is nothing to learn from: a warning says so, and one blank episode (log-probability
    0) stands in, since a Pyro plate cannot be empty.

    Example:
        >>> demos = Trajectories(states=[[0, 1, 2]], actions=[[1, 1]])
        >>> demos.as_tensor()
        tensor([[[ 0,  1],
                 [ 1,  1],
                 [ 2, -1]]])
    """

    def __init__(
        self,
        states: Any,
        actions: Any,
        lengths: Any = None,
        *,
        ends: End | Sequence[End] = "truncated",
        horizons: Any = None,
        limits: Any = None,
        subjects: Any = None,
        subject_names: Sequence[str] | None = None,
    ) -> None:
        both_listed = isinstance(states, (list, tuple)) and isinstance(actions, (list, tuple))
        listed = zip(states, actions, strict=False) if both_listed and lengths is None else ()
        states, actions = _integers(states, "states"), _integers(actions, "actions")
        for episode, (visited, acted) in enumerate(listed):
            if len(visited) - len(acted) not in (0, 1):
                raise InvalidTrajectoriesError(
                    f"trajectory {episode} has {len(visited)} states for {len(acted)} actions; "
                    "expected as many, or one more"
                )
        if states.shape[0] != actions.shape[0] or states.shape[1] - actions.shape[1] not in (0, 1):
            raise InvalidTrajectoriesError(
                f"states {tuple(states.shape)} do not fit actions {tuple(actions.shape)}: "
                "expected [N, T] or [N, T + 1] with [N, T]"
            )
        if len(actions) == 0:
            warn("no demonstrations: the posterior will be the prior", EmptyTrajectoriesWarning)
            states = actions = torch.full((1, 1), -1, device=actions.device)
            lengths, ends, horizons, limits, subjects = [0], "truncated", None, None, None
        count, steps = actions.shape
        self.lengths = _lengths(actions) if lengths is None else _column(lengths, actions, "lengths")
        if bool(((self.lengths < 0) | (self.lengths > steps)).any()):
            raise InvalidTrajectoriesError(f"lengths must lie between 0 and {steps}, the number of action columns")
        self.ends: tuple[End, ...] = (ends,) * count if isinstance(ends, str) else tuple(ends)
        if len(self.ends) != count or not set(self.ends) <= {"truncated", "terminated", "horizon"}:
            raise InvalidTrajectoriesError(
                "ends must be 'truncated', 'terminated' or 'horizon', one for all or one for each episode"
            )
        self.horizons = self._own_horizons(None if horizons is None else _column(horizons, actions, "horizons"))
        self.given_limits: Tensor | None = None if limits is None else _column(limits, actions, "limits")
        self._check_limits()
        self.subjects = None if subjects is None else _column(subjects, actions, "subjects")
        self.subject_names = None if subject_names is None else tuple(str(x) for x in subject_names)
        self._check_subjects()
        slots = max(int(self.lengths.max()), 0) + 1
        step = torch.arange(slots, device=actions.device)
        table = torch.full((count, slots, 2), -1, device=actions.device)
        table[:, : min(slots, states.shape[1]), 0] = states[:, :slots]
        table[:, : min(slots, steps), 1] = actions[:, :slots]
        table[..., 0].masked_fill_(step > self.lengths.unsqueeze(1), -1)
        table[..., 1].masked_fill_(step >= self.lengths.unsqueeze(1), -1)
        self._check_table(table)
        unseen = torch.tensor([end == "terminated" for end in self.ends], device=table.device) & (self._last(table) < 0)
        if bool(unseen.any()):
            raise InvalidTrajectoriesError(
                f"trajectory {int(unseen.nonzero()[0])} ends 'terminated' without its last state: "
                "give states [N, T + 1]"
            )
        self._table: Tensor | None = table
        self.starts: Tensor = table[:, 0, 0]

    def _own_horizons(self, given: Tensor | None) -> Tensor | None:
        known = torch.tensor([end == "horizon" for end in self.ends], device=self.lengths.device)
        own = torch.where(known, self.lengths, -1)
        own = own if given is None else torch.where(given >= 0, given, own)
        short = (own >= 0) & (own < self.lengths)
        if bool(short.any()):
            episode = int(short.nonzero()[0])
            raise HorizonError(
                f"trajectory {episode} has {int(self.lengths[episode])} decisions, more than its horizon "
                f"{int(own[episode])}"
            )
        return own if bool((own >= 0).any()) else None

    def _check_limits(self) -> None:
        short = self.limits < self.lengths
        if bool(short.any()):
            episode = int(short.nonzero()[0])
            raise InvalidTrajectoriesError(
                f"trajectory {episode} has {int(self.lengths[episode])} decisions, more than its limit "
                f"{int(self.limits[episode])}"
            )

    def _check_subjects(self) -> None:
        if self.subjects is None:
            return
        wrong = self.subjects < 0
        if self.subject_names is not None:
            wrong = wrong | (self.subjects >= len(self.subject_names))
        if bool(wrong.any()):
            episode = int(wrong.nonzero()[0])
            count = "1, ..." if self.subject_names is None else f"... for {len(self.subject_names)} subject_names"
            raise InvalidTrajectoriesError(
                f"trajectory {episode} has subject {int(self.subjects[episode])}: subjects are numbered 0, {count}"
            )

    def _last(self, table: Tensor) -> Tensor:
        return table.gather(1, self.lengths[:, None, None].expand(-1, 1, 2))[:, 0, 0]

    def _check_table(self, table: Tensor) -> None:
        step = torch.arange(table.shape[1], device=table.device)
        acting = step < self.lengths.unsqueeze(1)
        for name, column in (("state", 0), ("action", 1)):
            missing = acting & (table[..., column] < 0)
            if bool(missing.any()):
                episode, t = missing.nonzero()[0].tolist()
                raise InvalidTrajectoriesError(f"trajectory {episode}, step {t}: the {name} is negative or missing")

    # ------------------------------------------------------------------------------------------------ data of a model

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.lengths.device

    @property
    def limits(self) -> Int[Tensor, " N"]:
        """For how many decisions each episode would have been watched: as given, or from lengths, ends and horizons.

        Derived when asked for, so that a subset's are those of the same episodes by themselves.
        """
        if self.given_limits is not None:
            return self.given_limits
        terminated = torch.tensor([end == "terminated" for end in self.ends], device=self.lengths.device)
        room = (_ROOM_TO_END * self.lengths.max()).expand_as(self.lengths)
        room = room if self.horizons is None else torch.where(self.horizons >= 0, self.horizons, room)
        return torch.where(terminated, room, self.lengths)

    def as_tensor(self) -> Int[Tensor, "N slots 2"] | None:
        """(state, action) of every step; (s, -1) is a last state without action, (-1, -1) padding.

        Always the same object. None for :meth:`unobserved` trajectories, so that the same model simulates.
        """
        return self._table

    @property
    def states(self) -> Int[Tensor, "N slots"]:
        """States ``[N, T + 1]``, -1 where not observed."""
        return self._observed()[..., 0]

    @property
    def actions(self) -> Int[Tensor, "N slots"]:
        """Actions ``[N, T]``, -1 after the end."""
        return self._observed()[:, :-1, 1]

    def _observed(self) -> Tensor:
        if self._table is None:
            raise InvalidTrajectoriesError(
                "these trajectories are unobserved: they have lengths and starts, no states or actions (where a model "
                "simulates it is given such: observe by obs=demos.as_tensor())"
            )
        return self._table

    def unobserved(self) -> Trajectories:
        """The same episodes (starts, horizons, subjects) with nothing observed.

        How long an episode was is an outcome where it ended in a terminal state; what was given is for how long it
        would have been watched. So the lengths of unobserved episodes are the limits of the observed ones.
        """
        return self._with(_table=None, lengths=self.limits, given_limits=self.limits)

    def __getitem__(self, index: Any) -> Trajectories:
        """A subset of the episodes: a slice, a mask, or a list of numbers; an empty one warns, and is a blank one."""
        numbers = torch.arange(len(self), device=self.lengths.device)
        if isinstance(index, list):
            index = torch.as_tensor(index, device=numbers.device) if index else slice(0)
        index = numbers[index].reshape(-1)
        if not len(index):
            return Trajectories(self.lengths.new_zeros(0, 1), self.lengths.new_zeros(0, 1))
        pick = lambda x: None if x is None else x[index]  # noqa: E731
        return self._with(
            lengths=self.lengths[index],
            ends=tuple(self.ends[i] for i in index.tolist()),
            horizons=pick(self.horizons),
            given_limits=pick(self.given_limits),
            subjects=pick(self.subjects),
            starts=self.starts[index],
            _table=None
            if self._table is None
            else self._table[index, : int(self.lengths[index].max()) + 1].contiguous(),
        )

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Trajectories:
        """A copy on another device (states and actions are whole numbers: ``dtype`` is ignored)."""
        if device is None or torch.device(device) == self.lengths.device:
            return self
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        names = ("lengths", "horizons", "given_limits", "subjects", "starts", "_table")
        return self._with(**{name: move(getattr(self, name)) for name in names})

    def _with(self, **changes: Any) -> Trajectories:
        copy = object.__new__(Trajectories)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def constant_data(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """What a posterior file keeps beside the observed trajectories themselves."""
        columns = {"length": self.lengths, "own_horizon": self.horizons, "subject": self.subjects}
        return {name: (("episode",), x.cpu().numpy()) for name, x in columns.items() if x is not None}

    def __repr__(self) -> str:
        return f"Trajectories({len(self)} episodes, {int(self.lengths.sum())} decisions)"

    # ------------------------------------------------------------------------------------------------ validation

    def validate(self, mdp: Dynamics) -> None:
        """Check every episode against a decision problem.

        Raises:
            InvalidTrajectoriesError: a state or action out of range, an action in a terminal state, or
                ends="terminated" elsewhere.
            UnavailableActionError: an action that is not available.
            ImpossibleTransitionError: a start or transition of probability 0; names trajectory and step.
            HorizonError: an episode longer than the horizon.
        """
        validate(self._observed(), mdp, self.horizons)
        last = self._last(self._observed())
        claimed = torch.tensor([end == "terminated" for end in self.ends], device=last.device)
        wrong = claimed & ~((last >= 0) & mdp.terminal[last.clamp_min(0)])
        if bool(wrong.any()):
            episode = int(wrong.nonzero()[0])
            raise InvalidTrajectoriesError(
                f"trajectory {episode} ends 'terminated', but its last state {int(last[episode])} is not terminal"
            )

    # ------------------------------------------------------------------------------------------------ other formats

    @classmethod
    def from_dataframe(
        cls,
        data: pd.DataFrame,
        *,
        subject: str | None = "subject",
        episode: str = "episode",
        t: str = "t",
        state: str = "state",
        action: str = "action",
        ends: End | Sequence[End] = "truncated",
    ) -> Trajectories:
        """One row a decision, sorted by ``t`` in (subject, episode); a last row without action gives the last state.

        Columns are named by the arguments; ``subject=None`` (or no such column) for a single subject. States and
        actions are whole numbers; subjects may be anything.
        """
        if not hasattr(data, "columns"):
            raise InvalidTrajectoriesError(f"data is {form(data)}, not a data frame: pandas.DataFrame(...)")
        absent = [name for name in (episode, t, state, action) if name not in data.columns]
        if absent:
            raise InvalidTrajectoriesError(
                f"the data frame has no column {absent[0]!r}; it has {', '.join(map(str, data.columns))}"
            )
        has_subject = subject is not None and subject in data.columns
        keys = [subject, episode] if has_subject else [episode]
        for name in (*keys, t, state, action):
            if list(data.columns).count(name) > 1:
                raise InvalidTrajectoriesError(f"the data frame has several columns {name!r}")
            if name != action and data[name].isna().any():
                raise InvalidTrajectoriesError(f"column {name!r} has missing entries; only a last action may be")
        for name in (state, action):
            if text := next((x for x in data[name] if isinstance(x, str)), None):
                raise InvalidTrajectoriesError(
                    f"column {name!r} has text ({text!r}): number it first, as data[{name!r}].map({{{text!r}: 0, ...}})"
                )
        # On whole columns: pandas is slow by the episode.
        try:
            number = data.groupby(keys, sort=True, observed=True).ngroup().to_numpy()
            by_time = data[t].reset_index(drop=True).sort_values(kind="stable").index.to_numpy()
            order = by_time[number[by_time].argsort(kind="stable")]
            rows, number = data.iloc[order], number[order]
            twice = rows[[t]].set_axis(["t"], axis=1).assign(number=number).duplicated().to_numpy()
        except TypeError as error:
            raise InvalidTrajectoriesError(
                f"columns {', '.join(map(str, (*keys, t)))} cannot be put in order: {error}"
            ) from None
        same = number[1:] == number[:-1]  # as the row before
        first = [0, *((~same).nonzero()[0] + 1).tolist()] if len(rows) else []
        names_of = list(zip(*(rows[name].iloc[first].tolist() for name in keys), strict=True))
        if twice.any():
            raise InvalidTrajectoriesError(
                f"episode {names_of[number[twice.argmax()]]} has two rows with the same {t!r}"
            )
        if rows[t].dtype.kind in "iu":
            at = rows[t].to_numpy("int64")
            gap = same & (at[1:] - at[:-1] != 1)
            if gap.any():
                place = int(gap.argmax())
                raise InvalidTrajectoriesError(
                    f"episode {names_of[number[place]]} goes from {t!r} = {at[place]} to {at[place + 1]}: "
                    "split it there, or number its decisions 0, 1, 2, ..."
                )
        missing = rows[action].isna().to_numpy()
        early = missing[:-1] & same
        if early.any():
            raise InvalidTrajectoriesError(
                f"episode {names_of[number[early.argmax()]]} has a missing action before its last row"
            )
        visited, acted = rows[state].tolist(), rows[action].tolist()
        spans = list(itertools.pairwise([*first, len(rows)]))
        states = [visited[begin:end] for begin, end in spans]
        actions = [acted[begin : end - int(missing[end - 1])] for begin, end in spans]
        names = list(dict.fromkeys(name[0] for name in names_of)) if has_subject else None
        numbers = {name: i for i, name in enumerate(names or ())}
        subjects = [numbers[name[0]] for name in names_of] if has_subject else None
        return cls(states, actions, ends=ends, subjects=subjects, subject_names=names)

    @classmethod
    def from_episodes(cls, episodes: Iterable[Any]) -> Trajectories:
        """Objects shaped like imitation's Trajectory (``obs``, ``acts``, ``terminal``) or Minari's episodes
        (``observations``, ``actions``, ``terminations``), or pairs (states, actions); discrete spaces only.

        Works for a list of imitation trajectories, ``minari.load_dataset(...)`` and recorded Gymnasium rollouts alike.
        """
        states: list[Any] = []
        actions: list[Any] = []
        ends: list[End] = []
        for episode in episodes:
            first = lambda *names: next((getattr(episode, n) for n in names if hasattr(episode, n)), None)  # noqa: B023, E731
            observed, acted = first("obs", "observations"), first("acts", "actions")
            if observed is None or acted is None:
                if not isinstance(episode, (list, tuple)) or len(episode) != 2:
                    raise InvalidTrajectoriesError(
                        f"episode {len(states)} is {form(episode)}: expected (states, actions), "
                        "or an object with obs and acts, or with observations and actions"
                    )
                observed, acted = episode
            terminal = first("terminal", "terminations")
            done = terminal is not None and bool(torch.as_tensor(terminal, device="cpu").reshape(-1)[-1])
            states.append(observed)
            actions.append(acted)
            ends.append("terminated" if done else "truncated")
        return cls(states, actions, ends=tuple(ends))


def validate(
    table: Tensor,
    mdp: Dynamics,
    horizons: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    """Check a tensor of trajectories against a decision problem (see :meth:`Trajectories.validate`).

    Args:
        horizons: own horizons ``[*batch]``, -1 where the MDP's counts.
        starts: given first states ``[*batch]``, whose probability then does not matter.
        lengths: for how many decisions each was watched ``[*batch]``.
    """
    if (
        table.is_floating_point()
        or table.is_complex()
        or table.dtype == torch.bool
        or table.shape[-1:] != (2,)
        or table.dim() < 2
    ):
        raise InvalidTrajectoriesError(
            f"trajectories are whole numbers [*batch, steps, 2], not {table.dtype} {tuple(table.shape)}"
        )
    flat = table.reshape(-1, *table.shape[-2:])
    state, action = flat[..., 0], flat[..., 1]
    states, actions = mdp.log_prior.shape
    acting = action >= 0

    def refuse(bad: Tensor, error: type[Exception], message: str) -> None:
        if bool(bad.any()):
            episode, t = bad.nonzero()[0].tolist()
            values = {
                "s": int(state[episode, t]),
                "a": int(action[episode, t]),
                "n": int(state[episode, min(t + 1, state.shape[1] - 1)]),
            }
            raise error(f"trajectory {episode}, step {t}: " + message.format(**values))

    refuse(
        (state >= states) | (state < -1),
        InvalidTrajectoriesError,
        f"state {{s}} is out of range; states are 0 to {states - 1}",
    )
    refuse(
        (action >= actions) | (action < -1),
        InvalidTrajectoriesError,
        f"action {{a}} is out of range; actions are 0 to {actions - 1}",
    )
    refuse(acting & (state < 0), InvalidTrajectoriesError, "an action without a state")
    refuse(acting[:, 1:] & ~acting[:, :-1], InvalidTrajectoriesError, "an action after the end of the episode")
    late = (state >= 0)[:, 1:] & ~acting[:, :-1]
    refuse(torch.nn.functional.pad(late, (1, 0)), InvalidTrajectoriesError, "a state after the end of the episode")
    at, now = state.clamp_min(0), action.clamp_min(0)
    refuse(
        acting & mdp.terminal[at],
        InvalidTrajectoriesError,
        "action {a} in terminal state {s}; leave out what follows a terminal state",
    )
    refuse(
        acting & ~mdp.log_prior.isfinite()[at, now], UnavailableActionError, "action {a} is not available in state {s}"
    )
    begun = (state[:, :1] >= 0) & (starts is None)
    refuse(
        begun & (mdp.initial[at[:, :1]] == 0), ImpossibleTransitionError, "start state {s} has initial probability 0"
    )
    if starts is not None:
        given = starts.expand(table.shape[:-2]).reshape(-1, 1)
        refuse(
            (state[:, :1] >= 0) & (state[:, :1] != given),
            InvalidTrajectoriesError,
            "start state {s} is not the given one",
        )
    step = acting[:, :-1] & (state[:, 1:] >= 0)
    chance = torch.ones_like(step, dtype=mdp.initial.dtype)
    chance[step] = mdp.probability(at[:, :-1][step], now[:, :-1][step], at[:, 1:][step])
    refuse(
        step & (chance == 0),
        ImpossibleTransitionError,
        "moving from state {s} by action {a} to state {n} has probability 0",
    )
    longest = acting.sum(1).reshape(table.shape[:-2])
    limit = torch.full_like(longest, -1 if mdp.horizon is None else mdp.horizon)
    limit = limit if horizons is None else torch.where(horizons >= 0, horizons, limit)
    watched = torch.full_like(longest, -1) if lengths is None else lengths
    for most, name in ((limit, "the horizon"), (watched, "its length")):
        over = (most >= 0) & (longest > most)
        if bool(over.any()):
            episode = int(over.reshape(-1).nonzero()[0])
            raise HorizonError(
                f"trajectory {episode} has {int(longest.reshape(-1)[episode])} decisions, more than {name} "
                f"{int(most.expand_as(longest).reshape(-1)[episode])}"
            )


def _integers(x: Any, name: str) -> Int[Tensor, "N T"]:
    if not isinstance(x, (list, tuple)):
        return _vector(x, name, dims=2)
    if not x:
        return torch.zeros(0, 0, dtype=torch.long)
    return torch.nn.utils.rnn.pad_sequence(
        [_vector(row, f"{name}[{i}]") for i, row in enumerate(x)], batch_first=True, padding_value=-1
    )


def _lengths(actions: Int[Tensor, "N T"]) -> Int[Tensor, " N"]:
    """Number of actions before the padding."""
    acting = actions >= 0
    lengths = acting.long().cumprod(1).sum(1)
    gap = lengths < acting.sum(1)
    if bool(gap.any()):
        episode = int(gap.nonzero()[0])
        raise InvalidTrajectoriesError(
            f"trajectory {episode}, step {int(lengths[episode])}: the action is negative or missing"
        )
    return lengths


def _vector(x: Any, name: str, dims: int = 1, device: torch.device | None = None) -> Tensor:
    try:
        tensor = x if isinstance(x, Tensor) and device is None else torch.as_tensor(x, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidTrajectoriesError(f"{name} cannot be read as whole numbers") from None
    if tensor.numel() == 0:
        tensor = tensor.to(torch.long)
    # A data frame with missing entries turns whole numbers into floats. What is infinite, or too large to be told from
    # its neighbours, is no whole number, and would become a negative one.
    if tensor.is_floating_point() and bool(((tensor == tensor.round()) & (tensor.abs() < 2**53)).all()):
        tensor = tensor.to(torch.long)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.dim() != dims:
        wrong = ""
        if tensor.is_floating_point() and tensor.dim() == dims:
            at = (tensor != tensor.round()).nonzero()
            wrong = f": {float(tensor[tuple(at[0])]):g} at {at[0].tolist()} is none" if len(at) else ""
        raise InvalidTrajectoriesError(
            f"{name} must be whole numbers with {dims} dimension(s), not {tensor.dtype} {tuple(tensor.shape)}{wrong}"
        )
    return tensor.to(torch.long)


def _column(x: Any, actions: Int[Tensor, "N T"], name: str) -> Int[Tensor, " N"]:
    column = _vector(x, name, device=actions.device)
    if len(column) != len(actions):
        raise InvalidTrajectoriesError(f"{name} has {len(column)} entries for {len(actions)} episodes")
    return column
