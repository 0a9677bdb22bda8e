"""Rust's table IX by maximum likelihood of models/bus_engine.py: estimates, log-likelihood and seconds.

    python -m tests.benchmarks.rust_mle [FOLDER]

FOLDER holds matrices in Rust's format; without it, the counts that are installed with pirl serve. The seconds are those
of reading the data and of the search, imports apart.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pandas  # noqa: F401  (imported when needed: here, so that it is not timed)
import torch

from models import bus_engine
from tests.test_models import TABLE_IX, highest


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    highest(bus_engine.load(), np.array([10.0, 2.0]))  # torch's first calls are slow
    print(
        f"{'group':6}{'discount':>9}{'RC':>10}{'Rust':>10}{'theta11':>11}{'Rust':>11}{'log-lik':>11}{'known':>11}{'s':>7}"
    )
    for group, discount, replacement_cost, theta11, known in TABLE_IX:
        began = time.perf_counter()
        arguments = bus_engine.load(group=group, discount=discount, data=folder)
        mode, value = highest(arguments, 1.3 * np.array([replacement_cost, theta11]))
        seconds = time.perf_counter() - began
        print(
            f"{group:6}{discount:9}{mode[0]:10.4f}{replacement_cost:10.4f}{mode[1]:11.4f}{theta11:11.4f}"
            f"{value:11.4f}{known:11.4f}{seconds:7.2f}"
        )


if __name__ == "__main__":
    main()
