"""Are studies of the bus, and its engines, right? The ranks that are kept, beside those that exact posteriors expect.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bus_exact [--replicates 10000] [--seed 5] [--cells 300]

First truths and data alone: where are truths within their exact posteriors, of as many data sets as asked for? Then
every engine whose ranks ``tests.benchmarks.calibration`` has kept, on the data that it had: the mean of rank less its
expectation, which has nothing to do with where the truths happen to be, and its spread relative to the binomial's,
which is above 1 where draws are not independent.
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
    """A row for each engine and quantity: replicates, mean ranks, and how far off the engine is."""
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
        error = off.std(axis=0, ddof=1) / len(off) ** 0.5
        spread = (off**2).mean(axis=0) / (NUM_DRAWS * u * (1 - u)).mean(axis=0)
        for number, name in enumerate(QUANTITIES):
            rows.append(
                {
                    "engine": engine, "replicates": len(ranks), "quantity": name,
                    "mean rank": ranks[:, number].mean(), "exact": NUM_DRAWS * u[:, number].mean(),
                    "off by": off[:, number].mean(), "+-": error[number],
                    "z": off[:, number].mean() / error[number], "spread": spread[number],
                }
            )  # fmt: skip
    return pandas.DataFrame(rows)


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
    # Cells of u as wide as those of ranks among NUM_DRAWS draws, which are uniform as u is.
    places = np.minimum((u * (NUM_DRAWS + 1)).astype(int), NUM_DRAWS)
    print(f"{given.replicates} truths within exact posteriors")
    print(judge(places, NUM_DRAWS, QUANTITIES).assign(mean=u.mean(axis=0)).round(3).to_string())


if __name__ == "__main__":
    main()
