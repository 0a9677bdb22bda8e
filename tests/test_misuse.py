"""Arguments that are swapped, of another kind or shape, or out of range, are named in one line by pirl."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.misuse import CASES
from tests.readme import ROOT


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[str, str]]:
    """What each call raises where no types are checked on the way, as for users."""
    pytest.importorskip("gymnasium")
    done = subprocess.run([sys.executable, "-m", "tests.misuse"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_misuse_is_named(name: str, answers: dict[str, tuple[str, str]]) -> None:
    _, kind, told = CASES[name]
    found, text = answers[name]
    assert found == kind and told in text and "\n" not in text, f"{found}: {text}"
