"""Exact save and resume: what a sampler knows and the draws so far, in one file that is replaced atomically.

The file is a line that names the format, an archive of arrays (numpy's npz, without pickles: reading it runs no code),
and the SHA-256 of both. It is written beside the last one, forced to the disk, and then renamed over it: whatever
happens meanwhile, one whole checkpoint is there.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import textwrap
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from pirl.errors import CheckpointError
from pirl.infer.engine import STARTS, random_numbers
from pirl.infer.potential import Potential
from pirl.infer.user_errors import NO_DENSITY

FORMAT = 1
MAGIC = b"pirl checkpoint %d\n" % FORMAT
DIGEST = 64
EVERY = 30.0
"""Seconds between two checkpoints."""
PROBES = 20
"""Points at which a density is looked for, by which a run knows its model and data again."""
STALE = 600.0
"""Seconds after which a file that nobody writes on is what a killed process left."""

Arrays = dict[str, np.ndarray]


class Checkpoint:
    """A file that one run saves itself to.

    Args:
        path: where; its folder must exist.
        identity: what makes the run what it is: texts and numbers that must be equal in the file.
        probe: numbers that the model gives somewhere, which tell whether it and its data are the same: they must agree
            to rounding error.
        every: seconds between two saves.

    Raises:
        CheckpointError: there is no such folder, it is read-only, or the path is a folder.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: Mapping[str, Any], probe: np.ndarray, every: float = EVERY
    ) -> None:
        self.path, self.probe, self.every = Path(path), probe, every
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._saved = time.monotonic()
        folder = self.path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            problem = "is read-only" if folder.is_dir() else "does not exist"
            raise CheckpointError(f"checkpoint {self.path} cannot be written: folder {folder} {problem}")
        if self.path.exists() and not self.path.is_file():
            raise CheckpointError(f"checkpoint {self.path} is not a file: name one")

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved >= self.every

    def load(self) -> Arrays | None:
        """Read what was saved; None if there is no file yet.

        Raises:
            CheckpointError: the file is no checkpoint, is damaged, or belongs to another run. It is left as it is.
        """
        if not self.path.exists():
            return None
        arrays = read(self.path)
        identity, probe = _identity(arrays.pop("identity"), self.path), arrays.pop("probe")
        names = self.identity.keys() | identity.keys()
        for name in sorted(names, key=lambda name: (name != "kind", name != "model", name != "engine", name)):
            ours, theirs = self.identity.get(name), identity.get(name)
            if ours != theirs:
                raise CheckpointError(
                    f"{self.path} belongs to another run, where {name} is {_short(theirs)} and not {_short(ours)}: "
                    "name another file, or delete it"
                )
        tolerance = 1e-3 if probe.dtype == np.float32 else 1e-7
        if probe.shape != self.probe.shape or not np.allclose(probe, self.probe, tolerance, tolerance, equal_nan=True):
            raise CheckpointError(
                f"{self.path} belongs to another run: its model or data, or quantities of a study, give other numbers: "
                "name another file, or delete it"
            )
        return arrays

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the file by a new one, or leave it as it is.

        Raises:
            CheckpointError: it could not be written.
        """
        # A file apart for each process: two runs that are given one path by mistake do not mix.
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                write(file, {**arrays, "identity": np.array(json.dumps(self.identity)), "probe": self.probe})
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise CheckpointError(f"checkpoint {self.path} could not be written: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
            self._sweep()
            self._saved = time.monotonic()

    def _sweep(self) -> None:
        """Remove the halves that processes left which were killed while they wrote."""
        for name in glob.glob(f".{glob.escape(self.path.name)}.*.partial", root_dir=self.path.parent):
            with suppress(OSError):  # another process swept it, or may not
                partial = self.path.with_name(name)
                if time.time() - partial.stat().st_mtime > STALE:
                    partial.unlink()


def open_checkpoint(
    path: str | os.PathLike[str], potential: Potential, identity: Mapping[str, Any], further: Sequence[float] = ()
) -> Checkpoint:
    """Make the checkpoint of a run, told apart from others by its options, its sites, and the density that it gives.

    Options are those that are set, and the defaults of the others. ``further`` numbers tell it apart, too, to
    rounding error.
    """
    sites = {name: [list(site.shape), list(site.unconstrained_shape)] for name, site in potential.latent.items()}
    kept = {name: _plain(value) for name, value in identity.items()}
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    probe = _probe(potential)
    probe = np.concatenate([probe, np.asarray(further, probe.dtype)])
    return Checkpoint(path, {**kept, "dtype": dtype, "sites": sites}, probe)


def _probe(potential: Potential) -> np.ndarray:
    """The density and its gradient at the first of some points where there is one; empty where there is none at all."""
    for number in range(PROBES):
        numbers = random_numbers(0, STARTS, 1 + number)
        wide = 1 + number / 4  # where there is none nearby, further out
        point = torch.from_numpy(wide * numbers.uniform(-1.0, 1.0, (potential.size,))).to(torch.empty(0))
        try:
            energy, slopes = potential.gradient(potential.unflatten(point))
        except NO_DENSITY:
            continue
        probe = torch.cat([energy.reshape(1), potential.flatten(slopes)]).detach().cpu().numpy()
        if np.isfinite(probe).all():
            return probe
    return torch.empty(0, device="cpu").numpy()


def _plain(value: Any) -> Any:
    """An option as JSON can keep it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool)) or value is None else repr(value)


def _short(value: Any) -> str:
    """A value in a message of one line."""
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


class _Hashed(io.RawIOBase):
    """Passes what is written on to a file and to a hash; cannot go back, so nothing is changed after it was hashed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.file.write(data)


def write(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a checkpoint to an open file."""
    hashed = _Hashed(file)
    hashed.write(MAGIC)
    with zipfile.ZipFile(hashed, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
    file.write(hashed.hash.hexdigest().encode())


def read(path: Path) -> Arrays:
    """Read a checkpoint's arrays.

    Raises:
        CheckpointError: it is no checkpoint, or not the whole of one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if not content.startswith(MAGIC):
        other = re.match(rb"pirl checkpoint (\d{1,9})\n", content)
        kind = f"has format {int(other[1])} of another version of pirl; this one reads format {FORMAT}" if other else ""
        raise CheckpointError(f"{path} {kind or 'is not a checkpoint of pirl'}: it is left as it is; name another file")
    body, digest = content[:-DIGEST], content[-DIGEST:]
    damaged = _damaged(path)
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise CheckpointError(damaged)
    try:
        # Refuses pickles; what has the right sum and is no archive of arrays all the same was not written by save().
        with np.load(io.BytesIO(body[len(MAGIC) :]), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # of many kinds, as many as forms of nonsense
        raise CheckpointError(damaged) from error
    if not {"identity", "probe", "step"} <= arrays.keys():
        raise CheckpointError(damaged)
    return arrays


def _damaged(path: Path) -> str:
    return f"checkpoint {path} is damaged: it is left as it is; name another file, or delete it"


def _identity(text: np.ndarray, path: Path) -> dict[str, Any]:
    try:
        identity = json.loads(text.item())
    except (ValueError, TypeError) as error:
        raise CheckpointError(_damaged(path)) from error
    if not isinstance(identity, dict):
        raise CheckpointError(_damaged(path))
    return identity


def _sync_folder(folder: Path) -> None:
    """Force the renaming to the disk, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
