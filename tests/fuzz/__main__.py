"""The full form: ``python -m tests.fuzz [SEED] [pytest's options]`` runs 11,700 cases and says how many of each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PIRL_FUZZ"] = "full"

import pytest

if __name__ == "__main__":
    given = sys.argv[1:]
    seed = given.pop(0) if given and given[0].isdigit() else "0"
    here = Path(__file__).parent
    where = [] if any("test_" in word for word in given) else [str(here)]
    sys.exit(pytest.main(["-q", f"--rootdir={here.parents[1]}", f"--hypothesis-seed={seed}", *where, *given]))
