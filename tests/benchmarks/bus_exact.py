"""Are studies of the bus, and its engines, right? The ranks that are kept, beside those that exact posteriors expect.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bus_exact [--replicates 10000] [--seed 5] [--cells 300]

First every engine whose ranks ``tests.benchmarks.calibration`` has kept, on the data that it had: p-values of its ranks
and of the exact ones of the same truths; by how much ranks are off those that the exact posterior expects, which has
nothing to do with where truths happen to be, and how far in for a posterior that is too wide (z wide); and their
spread relative to the binomial's, above 1 where draws are not independent. Then truths and data alone: where are truths
within exact posteriors, of as many data sets as asked for?
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas

from models import bus_engine
from pirl.verdicts import judge
from tests.benchmarks.calibration import NUM_DRAWS, RANKS
from tests.bus_grid import QUANTITIES, BusGrid, truths_below


def kept(grid: BusGrid) -> pandas.DataFrame:
    """A row for each engine and quantity: where truths lie, and how far the engine's ranks are from there."""
    parts = dict[str, list[tuple[np.ndarray, np.ndarray]]]()
    for path in sorted(RANKS.glob("bus-*.csv")):
        found = pandas.read_csv(path)
        last = path.stem.split("-")[-1]
        u = truths_below(grid, int(last) if last.isdecimal() else 0, len(found))
        lived = found["ess"].notna().to_numpy()
        parts.setdefault(found["engine"][0], []).append((found.loc[lived, list(QUANTITIES)].to_numpy(int), u[lived]))
    rows = []
    for engine, pairs in parts.items():
        ranks, u = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        off = ranks - NUM_DRAWS * u
        # A posterior that is too wide moves low ranks up, and high ones down.
        wide = -off * (u - 0.5)
        theirs, exact = (judge(x, NUM_DRAWS, QUANTITIES)["p_adjusted"] for x in (ranks, places(u)))
        for number, name in enumerate(QUANTITIES):
            rows.append(
                {
                    "engine": engine, "replicates": len(ranks), "quantity": name,
                    "p": theirs[name], "p exact": exact[name],
                    "mean": ranks[:, number].mean(), "mean exact": NUM_DRAWS * u[:, number].mean(),
                    "off by": off[:, number].mean(), "+-": error_of(off)[number],
                    "z": (off.mean(axis=0) / error_of(off))[number],
                    "z wide": (wide.mean(axis=0) / error_of(wide))[number],
                    "spread": ((off**2).mean(axis=0) / (NUM_DRAWS * u * (1 - u)).mean(axis=0))[number],
                }
            )  # fmt: skip
    return pandas.DataFrame(rows)


def error_of(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean of rows."""
    return np.asarray(values.std(axis=0, ddof=1) / len(values) ** 0.5)


def places(u: np.ndarray) -> np.ndarray:
    """In which of as many cells as there are ranks among NUM_DRAWS draws: uniform as u is."""
    return np.minimum((u * (NUM_DRAWS + 1)).astype(int), NUM_DRAWS)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--cells", type=int, default=300)
    given = parser.parse_args()
    grid = BusGrid(bus_engine.load(group="4"), given.cells)
    print(kept(grid).round(3).to_string(index=False), flush=True)
    u = truths_below(grid, given.seed, given.replicates)
    print(f"{given.replicates} truths within exact posteriors")
    print(judge(places(u), NUM_DRAWS, QUANTITIES).assign(mean=u.mean(axis=0)).round(3).to_string())


if __name__ == "__main__":
    main()
