"""Faults of machines, in a short form of ``python -m tests.faults``; and files that would run code if they could."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_checkpoint import HaltError, Trap, assert_same, run, whole

from pirl import errors
from pirl.files import read_posterior, write_posterior
from pirl.infer import checkpoint as checkpoints
from pirl.infer.checkpoint import MAGIC, Checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_nothing_is_lost_in_a_short_campaign() -> None:
    command = [sys.executable, "-m", "tests.faults", "--json", "--kills", "2", "--stride", "101"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["lost"] == 0
    assert [row["engine"] for row in found["kills"]] == ["nuts", "chees", "smc", "study", "posterior file"]
    assert all(row["kills"] == row["survived"] == row["same bits"] == 2 for row in found["kills"])
    assert all(row["failed writes"] == row["same bits"] == 2 for row in found["failing writes"])
    assert all(row["files"] == row["refused"] > 90 for row in found["damages"])


def test_what_killed_writes_left_is_swept_away(tmp_path: Path) -> None:
    """A write that is killed leaves its half behind: the next runs remove it once it is old, and nothing else."""
    path = tmp_path / "run[1].ckpt"
    names = (".run[1].ckpt.7.partial", ".run1.ckpt.7.partial", ".run[1].ckpt.8.partial")
    old, other, fresh = (tmp_path / name for name in names)
    for file in (old, other, fresh):
        file.write_bytes(MAGIC)
    for file in (old, other):
        os.utime(file, (time.time() - 2 * checkpoints.STALE,) * 2)
    assert_same(run("nuts", checkpoint=path), whole("nuts"))
    assert sorted(tmp_path.iterdir()) == sorted([path, other, fresh])


# ------------------------------------------------------------------------------------------------ files that would run


WATCHED = """
import pickle, sys
from pathlib import Path

from pirl.files import read_posterior
from pirl.errors import PirlError
from pirl.infer.checkpoint import read

harmless, laden, *others = map(Path, sys.argv[1:])

def attempt(path):
    for reader in (read_posterior, read):
        try:
            reader(path)
        except PirlError:
            pass

for path in (harmless, harmless.with_name("nonsense.nc")):
    attempt(path)  # what reading imports is imported now
seen = []
watched = ("pickle.find_class", "exec", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "marshal.loads")
sys.addaudithook(lambda event, arguments: seen.append(event) if event in watched else None)
read_posterior(laden)
for path in (laden, *others):
    attempt(path)
assert not seen, seen
pickle.loads(others[0].read_bytes())  # the trap works, and the watch sees it
assert "pickle.find_class" in seen
"""


def test_reading_files_runs_no_code(tmp_path: Path) -> None:
    """Pickles as files, as attributes, as opaque values of variables: Python's own audit sees none that is loaded."""
    sprung, good = tmp_path / "sprung", tmp_path / "good.nc"
    write_posterior(whole("nuts"), good)
    payload = pickle.dumps(Trap(sprung))
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(sprung)
    plain, array, laden = tmp_path / "plain.nc", tmp_path / "array.nc", tmp_path / "laden.nc"
    plain.write_bytes(payload)
    with open(array, "wb") as file:
        np.save(file, trap)
    code = "__import__('pathlib').Path('sprung').touch()"
    good.with_name("nonsense.nc").write_bytes(b"nonsense")
    laden.write_bytes(good.read_bytes())
    for path, text, pickled in ((good, "harmless", b"harmless"), (laden, code, payload)):
        with h5py.File(path, "a") as file:
            file.attrs["pickle"] = np.void(pickled)
            file["posterior"].create_dataset("opaque", data=np.array([np.void(pickled)]))
            file.attrs["text"] = text
            file["posterior/m"].attrs["units"] = text
            file["posterior"].attrs["model"] = text
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, good, laden, plain, array],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sprung.exists()  # at the end, by the pickle that was loaded on purpose
    sprung.unlink()
    for path in (plain, array):
        with pytest.raises(errors.PosteriorFileError):
            read_posterior(path)
    assert not sprung.exists()


def test_a_right_sum_over_what_no_run_wrote_is_refused_by_name(tmp_path: Path) -> None:
    """Whoever can compute the sum can write anything: it is read as numbers, or refused."""
    path = tmp_path / "run.ckpt"
    good = run("nuts", checkpoint=path)
    arrays = checkpoints.read(path)

    def forge(**others: Any) -> None:
        with open(path, "wb") as file:
            checkpoints.write(file, {**arrays, **others})

    def refuse() -> None:
        before = path.read_bytes()
        with pytest.raises(errors.CheckpointError, match="is damaged"):
            run("nuts", checkpoint=path)
        assert path.read_bytes() == before

    for identity in (np.arange(3), np.array(1.0), np.array("{"), np.array("[1]"), np.array(["{}", "{}"])):
        forge(identity=identity)
        refuse()
    header = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000
    for method, content in ((zipfile.ZIP_STORED, header), (zipfile.ZIP_DEFLATED, b"x" * 100)):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", method) as file:
            file.writestr("draws.npy", content)
        raw = bytearray(archive.getvalue())
        raw[35 + len("draws.npy")] ^= 0xFF if method == zipfile.ZIP_DEFLATED else 0
        body = MAGIC + bytes(raw)
        path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())
        refuse()
    forge()
    assert_same(run("nuts", checkpoint=path), good)


def test_a_killed_step_is_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    """A save that ends after the renaming is as good as one that ends at all."""
    path = tmp_path / "run.ckpt"
    with monkeypatch.context() as patch, pytest.raises(HaltError):
        patch.setattr(Checkpoint, "due", True)

        def halted(folder: Path) -> None:
            raise HaltError

        patch.setattr(checkpoints, "_sync_folder", halted)
        run("nuts", checkpoint=path)
    assert_same(run("nuts", checkpoint=path), whole("nuts"))
