"""Chains over several processes: the same bits for any number of them, and an end to all when one ends.

Run as a program (by ``torchrun``), this file fits the model of ``test_checkpoint`` as its argument says, in JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from test_checkpoint import CHEES, NUTS, ORIGINALS, RUNS, SAMPLERS, assert_same, data, model, run, whole

import pirl
from pirl import errors
from pirl.infer.checkpoint import Checkpoint, read
from pirl.infer.ranks import ALONE, Ranks
from pirl.infer.sampling import Sampler

ROOT = Path(__file__).resolve().parents[1]
# Of five blocks two ranks have two and three; of two blocks, one of three ranks has none.
RUNS["three chains"] = {**NUTS, "num_chains": 3}
RUNS["five blocks"] = {**CHEES, "num_chains": 18}
ENGINES = ("three chains", "five blocks", "chees", "smc")


# ------------------------------------------------------------------------------------------------------------ one rank


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 100])
def test_shares_are_a_balanced_partition(count: int, size: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_is_alone() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    assert ALONE.leads and (ALONE.rank, ALONE.size) == (0, 1)
    assert ALONE.gather(rows, [3]) is rows
    assert ALONE.any(True, False) == (True, False)
    assert ALONE.agree(3)
    assert not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------------- several ranks


def main() -> None:
    """What each rank does: as told, gather rows, or fit, and where it is told to, end in the middle."""
    told = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    if "gather" in told:
        gather(told["gather"])
    if "calibrates" in told:
        study = calibrated(told["calibrates"], checkpoint=told.get("checkpoint"))
        assert (study is not None) == (rank == 0)
        if study is not None:
            study.to_netcdf(Path(told["folder"]) / "study.nc", engine="h5netcdf")
    dies, pauses = told.get("dies", [None, None]), told.get("pauses")

    def advance(self: Sampler, step: int) -> Any:
        if rank == 0:
            print(f"step {step}", flush=True)
        if [rank, step] == dies:
            os.kill(os.getpid(), signal.SIGKILL) if "killed" in told else os._exit(1)
        if step == pauses:
            time.sleep(1.0)
        return ORIGINALS[type(self)](self, step)

    for kind in SAMPLERS.values():
        kind.advance = advance  # type: ignore[method-assign]
    if "saves" in told:
        Checkpoint.due = True  # type: ignore[method-assign, assignment]
    for name in told["runs"]:
        result = run(name, checkpoint=told.get("checkpoint"))
        if rank == 0:
            result.to_netcdf(Path(told["folder"]) / f"{name}.nc", engine="h5netcdf")
        else:
            assert result is None


def calibrated(engine: str, **options: Any) -> xarray.DataTree | None:
    """Seven replicates: of two ranks one has four, the other three."""
    sizes = {"num_chains": 2, "num_warmup": 10, "num_samples": 10, "num_draws": 19}
    return pirl.calibrate(
        model, data(), engine=engine, num_replicates=7, seed=3, progress=False, quantities={"q": picky}, **sizes,
        **options,
    )  # fmt: skip


def picky(draws: dict[str, torch.Tensor], data: dict[str, torch.Tensor]) -> torch.Tensor:
    """A test quantity that some data sets have not."""
    return draws["s"] * (torch.nan if int(1000 * data["y"].abs().sum()) % 3 == 2 else 1.0)


def gather(counts: list[int]) -> None:
    from pirl.infer.ranks import join

    ranks = join(torch.device("cpu"))
    assert ranks.leads == (ranks.rank == 0) and ranks.size == len(counts)
    whole = torch.randn(sum(counts), 2, 3, generator=torch.Generator().manual_seed(1))
    found = ranks.gather(whole.split(counts)[ranks.rank], counts)
    assert torch.equal(found, whole)
    assert ranks.any(ranks.rank == 1, False) == (ranks.size > 1, False)
    assert ranks.agree(7) and not ranks.agree(ranks.rank)
    assert ranks.gather_text("é" * ranks.rank) == ["é" * rank for rank in range(ranks.size)]
    assert join(torch.device("cpu")) == ranks


class Torchrun:
    """This file as a program of several ranks."""

    def __init__(self, size: int, **told: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-addr",
             "127.0.0.1", "--master-port", str(port), __file__, json.dumps(told, default=str)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip

    def until(self, step: int) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == f"step {step}\n":
                return

    def end(self) -> tuple[int, str]:
        """The exit status, and what was complained."""
        try:
            _, complaint = self.process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, complaint


def results(folder: Path, name: str) -> xarray.DataTree:
    with xarray.open_datatree(folder / f"{name}.nc", engine="h5netcdf") as tree:
        return tree.load()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "counts"), [(2, [1, 3]), (3, [2, 0, 3])])
def test_draws_do_not_depend_on_the_number_of_ranks(size: int, counts: list[int], tmp_path: Path) -> None:
    """Four fits in one process group, one after the other."""
    status, complaint = Torchrun(size, runs=ENGINES, folder=tmp_path, gather=counts).end()
    assert status == 0, complaint
    for name in ENGINES:
        found = results(tmp_path, name)
        assert_same(found, whole(name))
        assert (found.attrs["num_ranks"], whole(name).attrs["num_ranks"]) == (size, 1)


@pytest.mark.slow
def test_replicates_of_a_calibration_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    status, complaint = Torchrun(
        2, runs=[], folder=tmp_path, calibrates="nuts", checkpoint=tmp_path / "study.ckpt"
    ).end()  # fmt: skip
    assert status == 0, complaint
    alone, found = calibrated("nuts"), results(tmp_path, "study")
    assert alone is not None
    for group in ("ranks", "prior", "recovery", "prior_sbc"):
        assert found[group].to_dataset().equals(alone[group].to_dataset())
    # Reasons of all processes, in the order of the replicates.
    assert found.attrs["failures"] == alone.attrs["failures"]
    failed = np.flatnonzero(alone["sample_stats"]["failed"].values[0])
    assert any(failed % 2) and not all(failed % 2), failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.ckpt.0", "study.ckpt.1", "study.nc"]


@pytest.mark.slow
def test_a_rank_that_dies_ends_all(tmp_path: Path) -> None:
    launched = Torchrun(3, runs=["five blocks"], folder=tmp_path, dies=[1, 7])
    launched.until(7)
    began = time.monotonic()
    status, complaint = launched.end()
    assert status == 1
    assert time.monotonic() - began < 60  # of the thirty minutes that a rank waits for another
    assert re.search(r"exitcode *: 1\b", complaint)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dies"), [("three chains", [1, 24]), ("five blocks", [0, 12])])
def test_a_rank_that_is_killed_leaves_the_last_checkpoint(name: str, dies: list[int], tmp_path: Path) -> None:
    """The one that writes, in warm-up, or another, after it: the run goes on alone, to the same bits."""
    path = tmp_path / "run.ckpt"
    status, complaint = Torchrun(
        2, runs=[name], folder=tmp_path, checkpoint=path, dies=dies, killed=True, saves=True
    ).end()  # fmt: skip
    assert status == 1 and "SIGKILL" in complaint
    # Saved after each step; the one in which a rank died was not made.
    assert int(read(path)["step"]) == dies[1]
    assert_same(run(name, checkpoint=path), whole(name))


@pytest.mark.slow
def test_the_other_ranks_say_that_one_was_killed(tmp_path: Path) -> None:
    """Without torchrun, which ends the others: each finds out by itself, and names what happened."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"runs": ["three chains"], "folder": tmp_path, "checkpoint": tmp_path / "run.ckpt", "dies": [1, 24]}
    shared = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps({**told, "killed": True, "saves": True}, default=str)],
            env={**os.environ, **shared, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    complaints = [process.communicate(timeout=120)[1] for process in ranks]
    assert ranks[1].returncode == -signal.SIGKILL and ranks[0].returncode == 1
    assert "RankError: another process of this run has ended or does not answer" in complaints[0]
    assert int(read(tmp_path / "run.ckpt")["step"]) == 24
    assert_same(run("three chains", checkpoint=tmp_path / "run.ckpt"), whole("three chains"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three chains", "five blocks"])
def test_a_terminated_run_goes_on_with_other_ranks(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    launched = Torchrun(2, runs=[name], folder=tmp_path, checkpoint=path, pauses=12)
    launched.until(12)
    launched.process.terminate()
    status, complaint = launched.end()
    assert status != 0
    assert complaint.count(f"pirl: terminated at step 13; the same call goes on from {path}") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    saved = path.read_bytes()
    assert_same(run(name, checkpoint=path), whole(name))
    path.write_bytes(saved)
    status, complaint = Torchrun(3, runs=[name], folder=tmp_path, checkpoint=path).end()
    assert status == 0, complaint
    assert_same(results(tmp_path, name), whole(name))


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    """A terminal sends it to torchrun, which passes it on to its processes."""
    launched = Torchrun(2, runs=["five blocks"], folder=tmp_path, pauses=33)
    launched.until(33)
    time.sleep(0.2)
    os.killpg(launched.process.pid, signal.SIGINT)
    _, complaint = launched.end()
    assert complaint.count("returning the 4 draws of each chain so far") == 1, complaint
    found = results(tmp_path, "five blocks")
    assert_same(found, whole("five blocks"), draws=4)


def test_fewer_chains_than_ranks_are_refused() -> None:
    from pirl.infer import Potential
    from pirl.infer.nuts import run as nuts

    with pytest.raises(errors.OptionError, match="num_chains is 2, fewer than the 3 ranks"):
        nuts(Potential(model, (data(),)), num_chains=2, ranks=Ranks(0, 3))


if __name__ == "__main__":
    main()
