"""Faults of machines, for real: processes that are killed, disks that are full, files that rot.

Prints, for each engine and for a calibration study, how often a run was killed and went on to the same bits, and how
many damaged files were refused:

    python -m tests.faults [--kills 50] [--only nuts,chees,smc,study] [--stride 1] [--seed 0]

Runs are children of this program (forked, so that each begins at once) that save after every step. A third of the
kills come at a random time from outside; the others in the midst of a write: at a random call of those that write the
file, force it to the disk, rename it, or force the folder, before it, after half of its bytes, or after it.
``tests/test_faults.py`` runs a short form.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import xarray
from test_checkpoint import ORIGINALS, RUNS, SAMPLERS, assert_same, data, model, run, whole

import pirl
from pirl import errors
from pirl.infer import checkpoint as checkpoints
from pirl.infer.checkpoint import Checkpoint, read
from pirl.infer.sampling import Sampler

STUDY = "study"
ENGINES = ("nuts", "chees", "smc", STUDY)
SAME, OTHER, BROKEN = 0, 3, 4
"""What a child found: the bits of the run that nothing disturbed, other bits, or an error."""


# ------------------------------------------------------------------------------------------------------------ children


def fork(work: Callable[[], None]) -> int:
    """Start a child that does ``work`` and ends; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = BROKEN
    try:
        work()
        status = SAME
    except AssertionError:
        status = OTHER
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """How a child ended: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fit(name: str, path: Path) -> None:
    """Run, saving after every step, and compare with the run that nothing disturbed."""
    Checkpoint.due = True  # type: ignore[method-assign, assignment]
    if name == STUDY:
        found, expected = study(checkpoint=path), undisturbed(name)
        for group in expected.children:
            assert found[group].to_dataset().equals(expected[group].to_dataset()), group
    else:
        assert_same(run(name, checkpoint=path), whole(name))


def undisturbed(name: str) -> xarray.DataTree:
    """What a run finds that nothing disturbs."""
    return whole_study() if name == STUDY else whole(name)


def study(**options: Any) -> xarray.DataTree:
    """Thirty replicates, each a posterior of its own."""
    few: dict[str, Any] = {"engine": "laplace", "num_replicates": 30, "num_draws": 9, "num_samples": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.ConvergenceWarning)  # of so few draws
        return pirl.calibrate(model, data(), **few, seed=1, progress=False, **options)


@functools.cache
def whole_study() -> xarray.DataTree:
    """The study that nothing interrupts."""
    return study()


class Writes:
    """Lists the calls that replace checkpoints, and kills this process in the midst of one of them."""

    def __init__(self, last: int | None = None, moment: str = "before") -> None:
        self.made: list[str] = []
        self.last, self.moment = last, moment
        write, fsync, replace = checkpoints._Hashed.write, os.fsync, os.replace

        def halved(hashed: Any, data: Any) -> int:
            if self.now("half"):
                hashed.file.write(bytes(memoryview(data).cast("B")[: len(data) // 2]))
                hashed.file.flush()
                self.die()
            return self.around("write", write, hashed, data)

        checkpoints._Hashed.write = halved  # type: ignore[method-assign]
        os.fsync = lambda *a: self.around("fsync", fsync, *a)  # type: ignore[assignment]
        os.replace = lambda *a: self.around("replace", replace, *a)  # type: ignore[assignment]

    def around(self, kind: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if self.now("before"):
            self.die()
        result = call(*arguments)
        if self.now("after"):
            self.die()
        self.made.append(kind)
        return result

    def now(self, moment: str) -> bool:
        return len(self.made) == self.last and self.moment == moment

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


# --------------------------------------------------------------------------------------------------------------- kills


def kills(name: str, count: int, folder: Path, numbers: random.Random) -> dict[str, Any]:
    """Kill a run ``count`` times, each time from the start; what is there is whole, and goes on to the same bits."""
    path, report = folder / f"{name}.ckpt", folder / "calls"
    undisturbed(name)

    def counted() -> None:
        writes = Writes()
        fit(name, path)
        report.write_text(json.dumps(writes.made))

    began = time.monotonic()
    assert wait(fork(counted)) == SAME
    span, calls = time.monotonic() - began, json.loads(report.read_text())
    row: dict[str, Any] = {"engine": name, "kills": 0, "in a write": 0, "in warm-up": 0, "survived": 0, "same bits": 0}
    while row["kills"] < count:
        path.unlink(missing_ok=True)
        inside = numbers.random() < 2 / 3
        if inside:
            kind = numbers.choice(["write", "fsync", "replace"])
            last = numbers.choice([place for place, call in enumerate(calls) if call == kind])
            moment = numbers.choice(["before", "after", *(["half"] if kind == "write" else [])])

            def work(last: int = last, moment: str = moment) -> None:
                Writes(last, moment)
                fit(name, path)

            status = wait(fork(work))
        else:
            child = fork(lambda: fit(name, path))
            time.sleep(numbers.uniform(0, span))
            os.kill(child, signal.SIGKILL)
            status = wait(child)
        if status == SAME and not inside:  # it had ended before
            continue
        assert status == -signal.SIGKILL, status
        row["kills"] += 1
        row["in a write"] += inside
        try:
            step = int(read(path)["step"]) if path.exists() else 0
        except errors.CheckpointError as error:
            print(error, file=sys.stderr)
            continue
        row["in warm-up"] += name in ("nuts", "chees") and step < RUNS[name]["num_warmup"]
        row["survived"] += 1
        row["same bits"] += wait(fork(lambda: fit(name, path))) == SAME
    return row


def posterior_kills(count: int, folder: Path, numbers: random.Random) -> dict[str, Any]:
    """Kill a process that replaces one posterior file again and again: one whole file is there."""
    from pirl.files import read_posterior, write_posterior

    path, posterior = folder / "posterior.nc", whole("nuts")
    write_posterior(posterior, path)

    def work() -> None:
        while True:
            write_posterior(posterior, path)

    row: dict[str, Any] = {"engine": "posterior file", "kills": 0, "in a write": 0, "survived": 0, "same bits": 0}
    for _ in range(count):
        child = fork(work)
        time.sleep(numbers.uniform(0.1, 0.5))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        row["kills"] += 1
        row["in a write"] += 1
        try:
            found = read_posterior(path)
            row["survived"] += 1
            assert_same(found, posterior)
            row["same bits"] += 1
        except (errors.PirlError, AssertionError) as error:
            print(error, file=sys.stderr)
    return row


# ----------------------------------------------------------------------------------------------------- failing writes


def limit(path: Path, bytes_: int) -> None:
    """From now on the system writes no file of this process beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


def full(path: Path, bytes_: int) -> None:
    """The next write finds no space left on the device; those after it do."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.symlink_to("/dev/full")


def failing_writes(name: str, count: int, folder: Path, numbers: random.Random) -> dict[str, Any]:
    """Let writes fail part-way: the last checkpoint stays, the run returns its draws, and the file goes on."""
    path = folder / f"{name}.ckpt"
    whole(name)
    assert wait(fork(lambda: fit(name, path))) == SAME
    steps = int(read(path)["step"])
    row = {"engine": name, "failed writes": 0, "draws returned": 0, "last one kept": 0, "same bits": 0}
    for turn in range(count):
        path.unlink(missing_ok=True)
        fault = [limit, full][turn % 2]
        at, bytes_ = numbers.randrange(1, steps), numbers.randrange(4000)

        def work(fault: Any = fault, at: int = at, bytes_: int = bytes_) -> None:
            kind = SAMPLERS[RUNS[name]["engine"]]

            def advance(self: Sampler, now: int) -> Any:
                if now == at:
                    fault(path, bytes_)
                return ORIGINALS[kind](self, now)

            kind.advance = advance  # type: ignore[method-assign]
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                fit(name, path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            words = "File too large" if fault is limit else "No space left on device"
            assert told and all(w.category is errors.CheckpointWarning and words in str(w.message) for w in told)

        row["failed writes"] += 1
        row["draws returned"] += wait(fork(work)) == SAME
        # The limit stays until the end, so the file is that of the step before; a full disk has room again.
        kept = int(read(path)["step"])
        row["last one kept"] += kept == (at if fault is limit else steps)
        row["same bits"] += wait(fork(lambda: fit(name, path))) == SAME
    return row


# ------------------------------------------------------------------------------------------------------- damaged files


def refused(content: bytes, path: Path) -> bool:
    """Whether a file of this content is refused by name and left as it is."""
    path.write_bytes(content)
    try:
        read(path)
    except errors.CheckpointError:
        return path.read_bytes() == content
    return False


def damages(content: bytes, stride: int, folder: Path) -> list[dict[str, Any]]:
    """Every ``stride``-th truncation, and every ``stride``-th single flipped bit."""
    path = folder / "damaged.ckpt"
    path.write_bytes(content)
    read(path)  # it is whole
    cuts = range(0, len(content), stride)
    cut = sum(refused(content[:length], path) for length in cuts)
    flips, flipped, damaged = range(0, 8 * len(content), stride), 0, bytearray(content)
    for bit in flips:
        damaged[bit // 8] ^= 1 << bit % 8
        flipped += refused(bytes(damaged), path)
        damaged[bit // 8] ^= 1 << bit % 8
    return [
        {"damage": "truncated", "bytes": len(content), "files": len(cuts), "refused": cut},
        {"damage": "one bit flipped", "bytes": len(content), "files": len(flips), "refused": flipped},
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one table, aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """Print the tables, or with --json the rows; exit with 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", default=",".join(ENGINES))
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    engines, numbers = [name for name in told.only.split(",") if name], random.Random(told.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        killed = [kills(name, told.kills, folder, numbers) for name in engines]
        killed.append(posterior_kills(told.kills, folder, numbers))
        failed = [failing_writes(name, max(2, told.kills // 5), folder, numbers) for name in engines if name != STUDY]
        run("nuts", checkpoint=folder / "small.ckpt")
        damaged = damages((folder / "small.ckpt").read_bytes(), told.stride, folder)
    lost = sum(row["kills"] - min(row["survived"], row["same bits"]) for row in killed)
    kept = ("draws returned", "last one kept", "same bits")
    lost += sum(row["failed writes"] - min(row[name] for name in kept) for row in failed)
    lost += sum(row["files"] - row["refused"] for row in damaged)
    if told.json:
        print(json.dumps({"kills": killed, "failing writes": failed, "damages": damaged, "lost": lost}))
    else:
        print("\n\n".join(map(table, (killed, failed, damaged))), f"\n\nlost: {lost}")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
