"""Nothing is written beside the tests, and the full form says how many cases there were."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis.configuration import set_hypothesis_home_dir

from tests.fuzz import cases

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "pirl-fuzz")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not cases.FULL:
        return
    seconds = {
        report.nodeid: report.duration
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
    }
    terminalreporter.section("cases")
    for test, count in cases.COUNTS.items():
        terminalreporter.write_line(f"{count:6d} cases {seconds.get(test, 0.0):7.1f} s  {test.rpartition('/')[2]}")
    terminalreporter.write_line(f"{cases.COUNTS.total():6d} cases {sum(seconds.values()):7.1f} s  in all")
