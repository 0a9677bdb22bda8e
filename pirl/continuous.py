"""`ContinuousTrajectories`: demonstrations whose states are vectors, as one tensor that a Pyro model observes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pirl.errors import DataError, InvalidTrajectoriesError, form


class ContinuousTrajectories:
    """N episodes of states that are vectors, and of actions that are vectors or numbers.

    Args:
        states: ``[N, T + 1, ds]``, or ``[N, T, ds]`` without the state after the last action; or a list of N arrays.
        actions: ``[N, T, da]``, or ``[N, T]`` for numbered or scalar actions; or a list of N arrays.
        lengths: number of actions of each episode ``[N]``; by default all.
        dtype: of the tensor; numbered actions are kept in it as whole numbers.

    Raises:
        InvalidTrajectoriesError: shapes disagree, there are no episodes, or an entry is not finite (names episode and
            step).

    Example:
        >>> demos = ContinuousTrajectories(states=torch.zeros(5, 11, 3), actions=torch.zeros(5, 10, 1))
        >>> demos.as_tensor().shape
        torch.Size([5, 11, 4])
    """

    def __init__(
        self, states: Any, actions: Any, lengths: Any = None, *, dtype: torch.dtype = torch.float64, device: Any = None
    ) -> None:
        if isinstance(states, (list, tuple)):
            states, actions, full = _padded(states, actions)
            lengths = full if lengths is None else lengths
        states, actions = (_real(x, name, device).to(dtype) for x, name in ((states, "states"), (actions, "actions")))
        actions = actions.unsqueeze(-1) if actions.dim() == 2 else actions
        if states.dim() != 3 or actions.dim() != 3 or len(states) != len(actions) or len(states) == 0:
            raise InvalidTrajectoriesError(
                f"states {tuple(states.shape)} and actions {tuple(actions.shape)} are not [N, T + 1, ds] and [N, T, da]"
            )
        count, steps = actions.shape[:2]
        if states.shape[1] == steps:  # nobody saw the last state, whose reward does not count either
            states = torch.cat([states, states[:, -1:]], 1)
        if states.shape[1] != steps + 1:
            swapped = ", or give the states first" if states.shape[1] == steps - 1 else ""
            raise InvalidTrajectoriesError(
                f"{states.shape[1]} states do not fit {steps} actions: expected as many, or one more{swapped}"
            )
        if lengths is None:
            lengths = torch.full((count,), steps)
        lengths = _real(lengths, "lengths", states.device)
        self.lengths: Tensor = lengths.long()
        if (
            bool((self.lengths != lengths).any())
            or self.lengths.shape != (count,)
            or bool(((self.lengths < 0) | (self.lengths > steps)).any())
        ):
            raise InvalidTrajectoriesError(f"lengths must be {count} whole numbers from 0 to {steps}")
        self.state_dim = states.shape[-1]
        acting = torch.arange(steps, device=states.device) < self.lengths.unsqueeze(1)
        actions = torch.where(acting.unsqueeze(-1), actions, 0.0)
        # After the end the last state stays, so that a network sees nothing strange there.
        at = torch.arange(steps + 1, device=states.device).minimum(self.lengths.unsqueeze(1))
        states = states.gather(1, at.unsqueeze(-1).expand_as(states))
        table = torch.cat([states, torch.cat([actions, torch.zeros_like(actions[:, :1])], 1)], -1)
        wrong = ~table.isfinite().all(-1)
        if bool(wrong.any()):
            episode, t = wrong.nonzero()[0].tolist()
            raise InvalidTrajectoriesError(f"trajectory {episode}, step {t}: a state or action is NaN or infinite")
        self._table: Tensor | None = table
        self._dtype = table.dtype

    @property
    def acting(self) -> Bool[Tensor, "N T"]:
        """Which steps are decisions."""
        return torch.arange(self.num_steps, device=self.lengths.device) < self.lengths.unsqueeze(1)

    @property
    def num_steps(self) -> int:
        """T, the number of action columns."""
        return self._observed().shape[1] - 1

    @property
    def states(self) -> Float[Tensor, "N T1 ds"]:
        """States, the last one included and repeated after the end."""
        return self._observed()[..., : self.state_dim]

    @property
    def actions(self) -> Float[Tensor, "N T da"]:
        """Actions, 0 after the end."""
        return self._observed()[:, :-1, self.state_dim :]

    @property
    def dtype(self) -> torch.dtype:
        """Precision; where nothing is observed, of what was."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.lengths.device

    def as_tensor(self) -> Float[Tensor, "N T1 D"] | None:
        """(state, action) of every step ``[N, T + 1, ds + da]``, always the same object; None if unobserved."""
        return self._table

    def unobserved(self) -> ContinuousTrajectories:
        """As many episodes with nothing observed: the same model then simulates."""
        return self._with(_table=None)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> ContinuousTrajectories:
        """A copy elsewhere, or of another precision."""
        table = None if self._table is None else self._table.to(device=device, dtype=dtype)
        return self._with(_table=table, lengths=self.lengths.to(device), _dtype=dtype or self._dtype)

    def constant_data(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """What a posterior file keeps beside the observed trajectories themselves."""
        return {"length": (("episode",), self.lengths.cpu().numpy())}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> ContinuousTrajectories:
        """A subset of the episodes: a slice, a mask, or a list of numbers."""
        numbers = torch.arange(len(self), device=self.device)[index].reshape(-1)
        if len(numbers) == 0:
            raise InvalidTrajectoriesError("no episodes are left: choose at least one")
        return self._with(_table=self._observed()[numbers], lengths=self.lengths[numbers])

    def __repr__(self) -> str:
        return f"ContinuousTrajectories({len(self)} episodes, {int(self.lengths.sum())} decisions)"

    def _observed(self) -> Tensor:
        if self._table is None:
            raise InvalidTrajectoriesError("these trajectories are unobserved: they have lengths and nothing else")
        return self._table

    def _with(self, **changes: Any) -> ContinuousTrajectories:
        copy = object.__new__(ContinuousTrajectories)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    # ------------------------------------------------------------------------------------------------ other formats

    @classmethod
    def from_episodes(cls, episodes: Iterable[Any], **options: Any) -> ContinuousTrajectories:
        """Objects shaped like imitation's Trajectory (``obs``, ``acts``), Minari's episodes (``observations``,
        ``actions``: ``minari.load_dataset(...)`` itself will do), or pairs (states, actions).
        """
        states: list[Any] = []
        actions: list[Any] = []
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
            states.append(observed)
            actions.append(acted)
        return cls(states, actions, **options)

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str], **options: Any) -> ContinuousTrajectories:
        """A NumPy archive: ``states`` and ``actions`` (and ``lengths``), or imitation's flat ``obs``, ``acts`` and
        ``indices``, where the actions are split. No code of the file is run.

        Raises:
            DataError: the file is missing, damaged, or has other entries.
        """
        try:
            content = io.BytesIO(Path(path).read_bytes())
            with np.load(content, allow_pickle=False) as file:
                data = {key: file[key] for key in file.files if key in _ENTRIES}
        except Exception as error:  # a damaged archive has as many kinds of them as zip, zlib and NumPy have parts
            raise DataError(f"{os.fspath(path)} cannot be read as a NumPy archive: {_line(error)}") from None
        return cls._of(data, path, **options)

    @classmethod
    def from_hdf5(cls, path: str | os.PathLike[str], **options: Any) -> ContinuousTrajectories:
        """An HDF5 file with the entries of :meth:`from_npz`, or with one group an episode (as Minari writes).

        Raises:
            DataError: the file is missing, damaged, or has other entries.
        """
        import h5py

        pairs: list[tuple[np.ndarray, np.ndarray]] | None = None
        try:
            with h5py.File(path, "r") as file:
                groups = sorted((key for key in file if isinstance(file[key], h5py.Group)), key=_number)
                if groups:
                    names = [("observations", "actions"), ("obs", "acts"), ("states", "actions")]
                    keys = next((pair for pair in names if all(k in file[groups[0]] for k in pair)), None)
                    if keys is not None:
                        pairs = [(file[g][keys[0]][:], file[g][keys[1]][:]) for g in groups]
                data = {key: file[key][:] for key in file if key in _ENTRIES}
        except Exception as error:  # whatever the parts of HDF5 say of what is damaged
            raise DataError(
                f"{os.fspath(path)} cannot be read as an HDF5 file of trajectories: {_line(error)}"
            ) from None
        if pairs is not None:
            return cls.from_episodes(pairs, **options)
        return cls._of(data, path, **options)

    @classmethod
    def _of(cls, data: dict[str, np.ndarray], path: Any, **options: Any) -> ContinuousTrajectories:
        if {"states", "actions"} <= data.keys():
            return cls(data["states"], data["actions"], data.get("lengths"), **options)
        if {"obs", "acts", "indices"} <= data.keys():
            try:
                actions = np.split(data["acts"], data["indices"])
            except (TypeError, ValueError, IndexError) as error:
                raise DataError(f"{os.fspath(path)}: indices do not split the actions: {_line(error)}") from None
            # Each episode has one observation more than actions.
            starts = np.cumsum([0, *(len(part) + 1 for part in actions)])
            if starts[-1] != len(data["obs"]):
                raise DataError(
                    f"{os.fspath(path)}: {len(data['obs'])} observations do not fit the actions' {starts[-1]}"
                )
            states = [data["obs"][a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
            return cls(states, actions, **options)
        raise DataError(f"{os.fspath(path)} has no entries states and actions (nor obs, acts and indices)")


_ENTRIES = ("states", "actions", "lengths", "obs", "acts", "indices")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())


def _number(name: str) -> tuple[int, str]:
    digits = "".join(c for c in name if c.isdigit())
    return (int(digits) if digits else -1, name)


def _real(x: Any, name: str, device: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(x if isinstance(x, Tensor) else np.asarray(x), device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTrajectoriesError(f"{name} cannot be read as numbers: {_line(error)}") from None
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidTrajectoriesError(f"{name} must be real numbers, not {tensor.dtype}")
    return tensor


def _padded(states: Any, actions: Any) -> tuple[np.ndarray, np.ndarray, list[int]]:
    states, actions = [np.asarray(x) for x in states], [np.asarray(x) for x in actions]
    if not states or len(states) != len(actions):
        raise InvalidTrajectoriesError(f"{len(states)} sequences of states and {len(actions)} of actions do not fit")
    for episode, (visited, acted) in enumerate(zip(states, actions, strict=True)):
        if len(visited) - len(acted) not in (0, 1) or visited.ndim != 2:
            raise InvalidTrajectoriesError(
                f"trajectory {episode} has states {visited.shape} for {len(acted)} actions; "
                "expected [T + 1, ds] or [T, ds]"
            )
    lengths = [len(x) for x in actions]
    steps = max(lengths)

    def fill(rows: list[np.ndarray], size: int) -> np.ndarray:
        rows = [x[:, None] if x.ndim == 1 else x for x in rows]
        if any(x.shape[1:] != rows[0].shape[1:] for x in rows):
            raise InvalidTrajectoriesError("episodes disagree in the size of their states or actions")
        return np.stack([np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)]) for x in rows])

    return fill(states, steps + 1), fill(actions, steps), lengths
