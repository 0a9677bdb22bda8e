"""Results in files: posteriors and studies, sealed; and any file written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pirl.errors import OptionError, OutputError, PosteriorFileError

if TYPE_CHECKING:
    import xarray

__all__ = ["read_posterior", "write_posterior"]

SEAL = b"pirl sha256 "
SEAL_LENGTH = len(SEAL) + 64

LONGEST_NAME, LONGEST_FOLDER = 230, 3000
"""Bytes; a little less than file systems take, for the name that a file has while it is written."""


def write_posterior(posterior: xarray.DataTree, path: str | Path) -> None:
    """Write a posterior, or a study, to a netCDF file, compressed and sealed: its SHA-256 stands at the end.

    HDF5 reads what comes before the seal, and so do ArviZ and xarray. What was there before stays until all is written.

    Raises:
        OptionError: no file can have that name there.
        OutputError: it cannot be written.

    Example:
        >>> pirl.files.write_posterior(posterior, "posterior.nc")
        >>> pirl.files.read_posterior("posterior.nc").attrs["engine"]
        'chees'
    """
    path = Path(path)
    check_output(path)
    encoding = {
        group.path: {name: {"zlib": True, "complevel": 1} for name, data in group.data_vars.items() if data.size > 1000}
        for group in posterior.subtree
        if group.data_vars
    }
    # Through memory: where the disk is full, HDF5 ends the process when it closes a file that it could not write.
    content = posterior.to_netcdf(engine="h5netcdf", encoding=encoding)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.write(SEAL + hashlib.sha256(content).hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def read_posterior(path: str | Path) -> xarray.DataTree:
    """Read a posterior file into memory; nothing in it is run.

    Raises:
        PosteriorFileError: there is no such file, it is damaged, or it is not one that pirl wrote.

    Example:
        >>> pirl.files.write_posterior(posterior, "posterior.nc")
        >>> sorted(pirl.files.read_posterior("posterior.nc")["posterior"].data_vars)
        ['weights']
    """
    return as_posterior(read_result(path), path)


def read_result(path: str | Path) -> xarray.DataTree:
    """What :func:`write_posterior` wrote, be it a posterior or a study.

    Raises:
        PosteriorFileError: there is no such file, or it is damaged.
    """
    import xarray

    path = Path(path)

    if not path.is_file():
        raise PosteriorFileError(f"{path} is not a file: give one that `pirl fit MODEL.py --out` wrote")
    try:
        _check_seal(path)
        with xarray.open_datatree(path, engine="h5netcdf") as tree:
            return tree.load()
    except Exception:  # whatever the parts of HDF5 and xarray say of what is damaged
        raise PosteriorFileError(
            f"{path} is damaged, or not a netCDF file: give one that `pirl fit --out` wrote"
        ) from None


def is_study(tree: xarray.DataTree) -> bool:
    """Whether it is what :func:`pirl.calibrate` returned."""
    return tree.attrs.get("inference_library") == "pirl" and {"ranks", "recovery"} <= set(tree.children)


def as_posterior(posterior: xarray.DataTree, path: str | Path) -> xarray.DataTree:
    """The same, once it is seen to be a posterior.

    Raises:
        PosteriorFileError: it is a study, or of another program.
    """
    if is_study(posterior):
        raise PosteriorFileError(
            f"{path} is a study of `pirl calibrate`, not a posterior: `pirl summary` prints its verdicts, "
            "`pirl plot` draws its ranks, and pirl.files.read_result reads it"
        )
    if posterior.attrs.get("inference_library") != "pirl" or "posterior" not in posterior.children:
        raise PosteriorFileError(f"{path} is not a posterior of pirl: give one that `pirl fit --out` wrote")
    return posterior


def check_output(path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse what could not be written, before anything is computed.

    Raises:
        OptionError: says what is in the way.
    """
    if path is None:
        return
    folder = path.parent
    if len(os.fsencode(path.name)) > LONGEST_NAME or len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise OptionError(f"{str(path)[:60]}... cannot be written: its name is too long")
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device would be replaced by a file
        raise OptionError(f"{path} cannot be written: it is no ordinary file; name another")
    if not folder.is_dir():
        raise OptionError(f"{path} cannot be written: there is no folder {folder}; make it first")
    if path.is_dir() or not os.access(folder, os.W_OK):
        problem = "it is a folder" if path.is_dir() else f"folder {folder} is read-only"
        raise OptionError(f"{path} cannot be written: {problem}; name another file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise OptionError(f"{path} has no known format: let its name end in {', '.join(suffixes)}")


def check_distinct(*paths: Path | None) -> None:
    """Refuse one file for two results.

    Raises:
        OptionError: names it.
    """
    given = [path.resolve() for path in paths if path is not None]
    if twice := [path for path in given if given.count(path) > 1]:
        raise OptionError(f"{twice[0].name} is named for two results: give each a file of its own")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, renamed to ``path`` when all went well: never half a file.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_seal(path: Path) -> None:
    """ValueError if the file ends in a seal that is not its own; files of other programs have none."""
    with open(path, "rb") as file:
        content = file.read()
    body, seal = content[:-SEAL_LENGTH], content[-SEAL_LENGTH:]
    if seal.startswith(SEAL) and seal.removeprefix(SEAL) != hashlib.sha256(body).hexdigest().encode():
        raise ValueError("the file is not as it was written")
