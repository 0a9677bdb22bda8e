"""Is pirl calibrated? Simulation-based calibration of its engines on its models; the table in the README.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.calibration [CASE ...] [--engines nuts,chees,smc] [--replicates 1000]
        [--seed 0] [--folder FOLDER] [--table]

Cases are gridworld (5 x 5, slip .1, 3 weights, 10 episodes of 10 decisions; both readings), bus (Rust's group 4, two
costs) and optimality (the literal graphical model with enumerated states). Each study saves itself to FOLDER and goes
on from there, also to more replicates. Its ranks are kept in tests/benchmarks/calibration_ranks, a file for each seed,
and --table judges all of a case and engine together: of other seeds, replicates are others. svi and laplace are
approximations: their departures are reported and not held against them. "chees alone" samples replicates one by one,
with the adaptation of ``pirl.fit``; "chees" many at once. "nuts short" is how the bus was studied first. One process a
study: start several by hand on several cores.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import pandas
import xarray

from pirl.convergence import element_names
from pirl.files import write_posterior
from pirl.model_file import ModelFile
from pirl.verdicts import COVERED, judge

GRID = ["rows=5", "cols=5", "num_features=3", "horizon=10", "num_demos=10"]
CASES = {
    "gridworld, causal": ("gridworld", [*GRID, "reading=causal"]),
    "gridworld, trajectory": ("gridworld", [*GRID, "reading=trajectory"]),
    "bus": ("bus_engine", []),
    "optimality": ("optimality_graphical_model", []),
}
NUM_DRAWS = 39
"""40 ranks: intervals of 50% and 90% are exact."""

RANKS = Path(__file__).with_name("calibration_ranks")
"""Of each study: a line a replicate, with the ranks of its quantities and its effective sample size."""

SIZES: dict[str, dict[str, int]] = {
    "nuts": {"num_chains": 1, "num_warmup": 150, "num_samples": 150},
    # In fewer than 20 steps Pyro adapts the step size alone; longer windows have too few steps of that at their end.
    "nuts short": {"num_chains": 1, "num_warmup": 19, "num_samples": 250},
    "chees": {"num_chains": 16, "num_warmup": 150, "num_samples": 20},
    "chees alone": {"num_chains": 16, "num_warmup": 150, "num_samples": 20, "batch": 1},
    "smc": {"num_chains": 1, "num_samples": 256},
    "svi": {"num_chains": 1, "num_samples": 100},
    "laplace": {"num_chains": 1, "num_samples": 100},
}

OF_CASE = {
    # Truths are drawn from wide bounds: chains from there are long on their way to a posterior of a hundredth of them.
    ("bus", "chees"): {"init": "laplace", "num_warmup": 60},
    ("bus", "nuts"): {"init": "laplace", "num_warmup": 100, "num_samples": 400},
    ("bus", "nuts short"): {"init": "laplace"},
}


def study(case: str, engine: str, replicates: int, seed: int, folder: Path) -> None:
    """Make one study, or what is missing of it."""
    model, settings = CASES[case]
    file = ModelFile.read(Path("models") / f"{model}.py")
    name = "-".join([*case.split(", "), *engine.split(), *([str(seed)] if seed else [])])
    arguments = {
        "engine": engine.split()[0],
        "num_replicates": replicates,
        "num_draws": NUM_DRAWS,
        "checkpoint": f"{folder / name}.ckpt",
        "seed": seed,
        **SIZES[engine],
        **OF_CASE.get((case, engine), {}),
    }
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of single posteriors; the study counts them
        found = file.calibrate(file.options(settings), arguments)
    assert found is not None
    found.attrs |= {"case": case, "by": engine, "seconds": time.perf_counter() - began}
    write_posterior(found, folder / f"{name}.nc")
    RANKS.mkdir(exist_ok=True)
    ranks_of(found).to_csv(RANKS / f"{name}.csv", index=False)


def ranks_of(found: xarray.DataTree) -> pandas.DataFrame:
    """A line a replicate, empty where it failed: case, engine, ranks by quantity, effective sample size."""
    stats = found["sample_stats"].to_dataset()
    lived = ~stats["failed"].values[0].astype(bool)
    columns: dict[str, object] = {"case": found.attrs["case"], "engine": found.attrs["by"]}
    for data in found["ranks"].data_vars.values():
        ranks = data.values[0].reshape(len(lived), -1)
        for label, rank in zip(element_names(data), ranks.T, strict=True):
            columns[label] = pandas.Series(rank).where(lived).astype("Int64")
    columns["ess"] = pandas.Series(stats["ess"].values[0]).round(1).where(lived)
    return pandas.DataFrame(columns)


def table(folder: Path = RANKS) -> pandas.DataFrame:
    """A row for each case and engine: replicates, the least adjusted p-value, coverage, what leaves its band."""
    rows, files = [], dict[tuple[str, str], list[pandas.DataFrame]]()
    for path in sorted(folder.glob("*.csv")):
        one = pandas.read_csv(path)
        files.setdefault((one["case"][0], one["engine"][0]), []).append(one)
    for (case, engine), parts in files.items():
        whole = pandas.concat(parts)
        found = whole.dropna(subset="ess")
        names = [name for name in found.columns if name not in ("case", "engine", "ess")]
        judged = judge(found[names].to_numpy(int), NUM_DRAWS, names)
        out = judged.loc[judged["finding"] != "uniform", "finding"]
        covers = {
            f"{level:.0%} covers": " ".join(f"{share:.3f}" for share in judged[f"coverage_{round(100 * level)}"])
            for level in COVERED
        }
        rows.append(
            {
                "case": case, "engine": engine, "replicates": len(whole), "failed": len(whole) - len(found),
                "least p": judged["p_adjusted"].min(), **covers, "5% of ESS": float(found["ess"].quantile(0.05)),
                "leaves its band": "; ".join(f"{name}: {words}" for name, words in out.items()) or "-",
            }
        )  # fmt: skip
    return pandas.DataFrame(rows)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--engines", default="chees,nuts,smc,laplace,svi")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("calibration"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        given.folder.mkdir(exist_ok=True)
        for engine in given.engines.split(","):
            for case in given.cases or CASES:
                study(case, engine, given.replicates, given.seed, given.folder)
                print(f"{case}, {engine}: done", flush=True)
    print(table().to_string(index=False))


if __name__ == "__main__":
    main()
