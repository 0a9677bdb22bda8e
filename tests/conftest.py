"""What every test shares: one thread, checked shapes, a fixed seed, and the folder of real data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and matplotlib are imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pyro
import pytest
import torch

from tests import checked_types

torch.set_num_threads(1)

# Before pirl is imported: calls into it now check the shapes that its signatures name.
checked_types.install("pirl")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """Seed every generator, check types again, and leave no Pyro parameters and no other precision behind."""
    checked_types.calls.clear()
    pyro.set_rng_seed(0)
    dtype = torch.get_default_dtype()
    with pyro.get_param_store().scope():
        yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    assert left == dtype, f"the test leaves {left} as the default: tests after it would see it"
    checked_types.calls.clear()  # fixtures of the next module come before its first test


@pytest.fixture
def data_folder() -> Path:
    """Real demonstrations: PIRL_DATA, or shared/data beside the repository; PIRL_REQUIRE_DATA=1 insists on them."""
    folder = Path(os.environ.get("PIRL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        message = f"no real data in {folder}: name their folder in PIRL_DATA"
        if os.environ.get("PIRL_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder
