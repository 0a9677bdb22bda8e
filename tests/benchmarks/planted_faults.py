"""Which planted faults does simulation-based calibration see?

    OMP_NUM_THREADS=1 python -m tests.benchmarks.planted_faults [--replicates 100] [--faults NAME ...]

The laws of ``tests/test_planted_faults.py`` see all of them. Here each fault of ``tests/planted.py`` is at work while
parameters and demonstrations of a small corridor are drawn, and their posteriors by chees, in both readings. A fault
that simulation and inference share cannot be seen so: it makes another model, and that one is calibrated.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas
import planted
from test_sbc import corridor, model, plan

import pirl
from pirl.errors import PirlError
from pirl.verdicts import verdicts


def seen(reading: str, replicates: int) -> str:
    """What a study says: the least adjusted p-value, and what leaves its band."""
    mdp = corridor()
    try:
        study = pirl.calibrate(
            model, plan(mdp), mdp, reading, num_replicates=replicates, num_draws=39, num_chains=8, num_warmup=80,
            num_samples=30, seed=2, progress=False,
        )  # fmt: skip
    except (PirlError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
    table = verdicts(study)
    out = table[table["finding"] != "uniform"]
    failed = int(study["sample_stats"]["failed"].sum())
    words = ", ".join(f"{name} {row['finding'].removeprefix('posterior ')}" for name, row in out.iterrows()) or "-"
    return f"p {table['p_adjusted'].min():.4f}: {words}" + (f"; {failed} failed" if failed else "")


def row(name: str, replicates: int) -> dict[str, str]:
    """What is seen of one fault, by reading."""
    with warnings.catch_warnings(), planted.FAULTS.get(name, nullcontext)():
        warnings.simplefilter("ignore")
        return {reading: seen(reading, replicates) for reading in ("causal", "trajectory")}


def main() -> None:
    """Print a row a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=100)
    parser.add_argument("--faults", nargs="*", help="only these")
    given = parser.parse_args()
    rows = {}
    for name in given.faults or ["(none)", *planted.FAULTS]:
        # A process each: what the library remembers from a fault must not meet the next one.
        with get_context("fork").Pool(1) as child:
            rows[name] = child.apply(row, (name, given.replicates))
        print(name, rows[name], flush=True)
    print(pandas.DataFrame(rows).T.to_string())


if __name__ == "__main__":
    main()
