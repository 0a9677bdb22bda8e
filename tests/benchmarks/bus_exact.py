"""Are studies of the bus, and its engines, right? The ranks that are kept, beside those that exact posteriors expect.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bus_exact [--replicates 10000] [--seed 5] [--cells 300]

First every engine whose ranks ``tests.benchmarks.calibration`` has kept, on the data that it had. "p" is of its ranks
alone, adjusted for three quantities, and "p exact" of the places of the same truths in their exact posteriors: what is
small in both is the luck of truths. "off by" is the mean of rank - M u (see tests/place_of_truth.py), where that luck
is taken away, "z" and "z wide" its standard scores and those of a posterior that is too wide; "p given data" is the
least of their six p-values, adjusted for there being six. "spread" is the variance of rank - M u relative to that of
independent draws: above 1 where draws are not independent (few effective ones: see "5% of ESS"), or where an engine
errs now to one side and now to the other.

Then truths and data alone: where are truths in exact posteriors, of as many data sets as asked for?
"""

from __future__ import annotations

import argparse
from functools import lru_cache

import numpy as np
import pandas
import scipy.stats

from models import bus_engine
from pirl.uniformity import holm
from pirl.verdicts import judge
from tests.benchmarks.calibration import NUM_DRAWS, RANKS
from tests.bus_grid import QUANTITIES, BusGrid, places_of_truths
from tests.place_of_truth import scores


def engines(grid: BusGrid) -> pandas.DataFrame:
    """A row for each engine and quantity.

    Raises:
        ValueError: ranks are of other truths than a study draws today.
    """
    longest = lru_cache(lambda seed: places_of_truths(grid, seed, 1000))
    parts = dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]()
    for path in sorted(RANKS.glob("bus-*.csv")):
        found = pandas.read_csv(path)
        last = path.stem.split("-")[-1]
        u = longest(int(last) if last.isdecimal() else 0)[: len(found)]
        lived = found["ess"].notna().to_numpy()
        ranks = found.loc[lived, list(QUANTITIES)].to_numpy(int)
        if any(np.corrcoef(ranks[:, q], u[lived, q])[0, 1] < 0.5 for q in range(len(QUANTITIES))):
            raise ValueError(f"{path.name} has ranks of other truths than the study with its seed draws now")
        parts.setdefault(found["engine"][0], []).append((ranks, u[lived], found.loc[lived, "ess"].to_numpy()))
    rows = []
    for engine, studies in parts.items():
        ranks, u, ess = (np.concatenate(arrays) for arrays in zip(*studies, strict=True))
        off, variance = ranks - NUM_DRAWS * u, (NUM_DRAWS * u * (1 - u)).mean(axis=0)
        spread = (off**2).mean(axis=0) / variance
        # Scores whose denominator is what was seen, and not what independent draws would have.
        z = scores(ranks, u, NUM_DRAWS) / spread**0.5
        given_data = float(holm(2 * scipy.stats.norm.sf(np.abs(z).ravel())).min())
        alone, exact = (judge(x, NUM_DRAWS, QUANTITIES)["p_adjusted"] for x in (ranks, cells_of(u)))
        for q, name in enumerate(QUANTITIES):
            rows.append(
                {
                    "engine": engine, "replicates": len(ranks), "5% of ESS": np.quantile(ess, 0.05), "quantity": name,
                    "p": alone[name], "p exact": exact[name],
                    "mean": ranks[:, q].mean(), "mean exact": NUM_DRAWS * u[:, q].mean(),
                    "off by": off[:, q].mean(), "+-": standard_error(off)[q], "z": z[0, q], "z wide": z[1, q],
                    "p given data": given_data, "spread": spread[q], "+- ": (standard_error(off**2) / variance)[q],
                }
            )  # fmt: skip
    return pandas.DataFrame(rows)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean of rows."""
    return np.asarray(values.std(axis=0, ddof=1) / len(values) ** 0.5)


def cells_of(u: np.ndarray) -> np.ndarray:
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
    print(engines(grid).round(3).to_string(index=False), flush=True)
    u = places_of_truths(grid, given.seed, given.replicates)
    print(f"{given.replicates} truths in exact posteriors")
    print(judge(cells_of(u), NUM_DRAWS, QUANTITIES).assign(mean=u.mean(axis=0)).round(3).to_string())


if __name__ == "__main__":
    main()
