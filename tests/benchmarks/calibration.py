"""Is pirl calibrated? Simulation-based calibration of its engines on its models; the table in the README.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.calibration [CASE ...] [--engines nuts,chees,smc] [--replicates 1000]
        [--folder FOLDER] [--table]

Cases are gridworld (5 x 5, slip .1, 3 weights, 10 episodes of 10 decisions; both readings), bus (Rust's group 4, two
costs) and optimality (the literal graphical model with enumerated states). Each study saves itself to FOLDER and goes
on from there, also to more replicates; --table shows what is there. svi and laplace are approximations: their
departures are reported and not held against them. "chees alone" samples replicates one by one, with the adaptation of
``pirl.fit``; "chees" many at once. One process a study: start several by hand on several cores.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import pandas
import xarray

from pirl.files import write_posterior
from pirl.model_file import ModelFile
from pirl.verdicts import verdicts

GRID = ["rows=5", "cols=5", "num_features=3", "horizon=10", "num_demos=10"]
CASES = {
    "gridworld, causal": ("gridworld", [*GRID, "reading=causal"]),
    "gridworld, trajectory": ("gridworld", [*GRID, "reading=trajectory"]),
    "bus": ("bus_engine", []),
    "optimality": ("optimality_graphical_model", []),
}
NUM_DRAWS = 39
"""40 ranks: intervals of 50% and 90% are exact."""

SIZES: dict[str, dict[str, int]] = {
    "nuts": {"num_chains": 1, "num_warmup": 150, "num_samples": 150},
    "chees": {"num_chains": 16, "num_warmup": 150, "num_samples": 20},
    "chees alone": {"num_chains": 16, "num_warmup": 150, "num_samples": 20, "batch": 1},
    "smc": {"num_chains": 1, "num_samples": 256},
    "svi": {"num_chains": 1, "num_samples": 100},
    "laplace": {"num_chains": 1, "num_samples": 100},
}

OF_CASE = {
    # Truths are drawn from wide bounds: chains from there are long on their way to a posterior of a hundredth of them.
    ("bus", "chees"): {"init": "laplace", "num_warmup": 60},
}


def study(case: str, engine: str, replicates: int, folder: Path) -> None:
    """Make one study, or what is missing of it."""
    model, settings = CASES[case]
    file = ModelFile.read(Path("models") / f"{model}.py")
    stem = folder / f"{case.replace(', ', '-')}-{engine.replace(' ', '-')}"
    arguments = {
        "engine": engine.split()[0],
        "num_replicates": replicates,
        "num_draws": NUM_DRAWS,
        "checkpoint": f"{stem}.ckpt",
        **SIZES[engine],
        **OF_CASE.get((case, engine), {}),
    }
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of single posteriors; the study counts them
        found = file.calibrate(file.options(settings), arguments)
    assert found is not None
    found.attrs |= {"case": case, "by": engine, "seconds": time.perf_counter() - began}
    write_posterior(found, stem.with_suffix(".nc"))


def table(folder: Path) -> pandas.DataFrame:
    """A row a study: how many replicates, the least adjusted p-value, coverage, what leaves its band."""
    rows = []
    for path in sorted(folder.glob("*.nc")):
        with xarray.open_datatree(path, engine="h5netcdf") as tree:
            found = tree.load()
        judged, stats = verdicts(found), found["sample_stats"].to_dataset()
        out = judged[judged["finding"] != "uniform"]
        rows.append(
            {
                "case": found.attrs["case"],
                "engine": found.attrs.get("by", found.attrs["engine"]),
                "replicates": int(found.attrs["num_replicates"]),
                "failed": int(stats["failed"].sum()),
                "least p": judged["p_adjusted"].min(),
                "50% covers": " ".join(f"{x:.3f}" for x in judged["coverage_50"]),
                "90% covers": " ".join(f"{x:.3f}" for x in judged["coverage_90"]),
                "5% of ESS": float(stats["ess"].quantile(0.05)),
                "leaves its band": "; ".join(f"{name}: {row['finding']}" for name, row in out.iterrows()) or "-",
            }
        )
    return pandas.DataFrame(rows)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--engines", default="chees,nuts,smc,laplace,svi")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("calibration"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    for engine in [] if given.table else given.engines.split(","):
        for case in given.cases or CASES:
            study(case, engine, given.replicates, given.folder)
            print(f"{case}, {engine}: done", flush=True)
    print(table(given.folder).to_string(index=False))


if __name__ == "__main__":
    main()
