"""Minimum bulk ESS a second of pirl and of other samplers on the same posteriors: figures, never pass or fail.

    python -m tests.benchmarks.ess_per_second [gridworld] [states] [bus] [--only chees,numpyro] [--chains 64,256]

Run it on a quiet machine. Each sampler has a process of its own, and pays for compilation and warm-up; seconds run
from before the sampler is made until its draws are on the host, imports apart. (Of pirl they are the ``sampling_time``
of the posterior; the wall time of the whole call stands beside it.) Before anything is timed, all forms of a posterior
must have pirl's log density and gradients to 1e-8. Afterwards the means of all samplers must agree: "z" is the largest
difference from the sampler with the largest ESS, over all parameters, in standard errors of both. Who has not
converged (R-hat above 1.05, or z above 5) is marked with "!" and not compared. Gradients are those after warm-up, of
all chains; float64 throughout.

Each library takes as many threads as it likes (column "threads"; of JAX, the processors that it sees), but torch only
one where one chain runs after the other: two were never faster there. OMP_NUM_THREADS holds for torch, --processors
for everything.

The others (``pip install numpyro blackjax``) are not dependencies of pirl; absent ones are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from typing import Any

PROBLEMS = ("gridworld", "states", "bus")
PIRL, TORCH = ("chees", "nuts"), ("chees", "nuts", "pyro")
LIMIT = 900  # seconds a process
GOOD_RHAT, GOOD_Z = 1.05, 5.0

Setting = dict[str, Any]


def settings(problem: str, chains: list[int]) -> list[Setting]:
    """Who runs, and how: warm-up and draws long enough that compilation does not count for much."""
    sparse, other = {"gridworld": ("gather", "dense"), "states": ("gather", "newton"), "bus": ("newton", None)}[problem]
    chees = {"gridworld": (200, 300), "states": (150, 75), "bus": (100, 200)}[problem]
    blackjax = {"gridworld": (200, 300), "states": (200, 75), "bus": (150, 200)}[problem]
    nuts = {"gridworld": (200, 500), "states": (100, 50), "bus": (200, 500)}[problem]
    naive = {"gridworld": (200, 200), "states": (100, 50), "bus": (200, 300)}[problem]
    warmup, numpyro, wide = {"gridworld": (300, 1500, 250), "states": (250, 250, 40), "bus": (300, 2000, 250)}[problem]

    def setting(sampler: str, chains: int, warmup: int, draws: int, **options: Any) -> Setting:
        return {"sampler": sampler, "chains": chains, "warmup": warmup, "draws": draws, **options}

    def numpyro_nuts(method: str, chains: int, dense_mass: bool, form: str) -> Setting:
        draws = {4: numpyro, 16: wide, 64: wide // 2}[chains]
        return setting("numpyro", chains, warmup, draws, form=form, method=method, dense_mass=dense_mass)

    def blackjax_chees(diagonal: bool, form: str) -> Setting:
        return setting("blackjax", 64, *blackjax, form=form, diagonal=diagonal)

    found = [setting("chees", number, *chees) for number in chains]
    # Two threads do not help one chain, and spin.
    found += [setting("nuts", 4, *nuts, threads=1), setting("pyro", 1, *naive, threads=1)]
    found += [
        numpyro_nuts("parallel", 4, True, sparse),
        numpyro_nuts("parallel", 4, False, sparse),
        numpyro_nuts("sequential", 4, True, sparse),
        numpyro_nuts("sequential", 4, False, sparse),
        numpyro_nuts("vectorized", 16, True, sparse),
        numpyro_nuts("vectorized", 16, False, sparse),
        numpyro_nuts("vectorized", 64, True, sparse),
        blackjax_chees(True, sparse),
        blackjax_chees(False, sparse),
    ]
    if other:
        found += [numpyro_nuts("parallel", 4, True, other), numpyro_nuts("vectorized", 16, True, other)]
        found += [blackjax_chees(True, other)]
    return found


def describe(setting: Setting) -> str:
    """Name of a row."""
    words = {"chees": "pirl chees", "nuts": "pirl nuts, dense mass", "pyro": "Pyro NUTS, naive, dense mass"}
    if setting["sampler"] == "numpyro":
        mass = "dense" if setting["dense_mass"] else "diagonal"
        return f"NumPyro NUTS, {setting['method']}, {mass} mass, {setting['form']}"
    if setting["sampler"] == "blackjax":
        return f"BlackJAX ChEES, {'diagonal' if setting['diagonal'] else 'unit'} mass, {setting['form']}"
    return words[setting["sampler"]]


# ------------------------------------------------------------------------------------------------- in its own process


def pirl_fit(problem: Any, *, engine: str, chains: int, warmup: int, draws: int, seed: int, device: str) -> Any:
    """pirl, as a user calls it."""
    import numpy as np

    import pirl
    from tests.benchmarks.ess_others import Run

    began = time.perf_counter()
    posterior = pirl.fit(
        problem.model,
        model_kwargs=problem.arguments,
        engine=engine,
        num_chains=chains,
        num_warmup=warmup,
        num_samples=draws,
        num_prior=0,
        num_posterior_predictive=0,
        seed=seed,
        device=device,
        progress=False,
        **({"dense_mass": True} if engine == "nuts" else {}),
    )
    wall = time.perf_counter() - began
    parts = [values.values.reshape(chains, draws, -1) for values in posterior.posterior.values()]
    steps = posterior.sample_stats.get("n_steps")
    gradients = None if steps is None else float(steps.sum())
    warm = posterior.attrs.get("warmup_time")
    return Run(np.concatenate(parts, -1), posterior.attrs["sampling_time"], warm, None, gradients, wall)


def measure(name: str, setting: Setting, seed: int, device: str) -> Setting:
    """Run one sampler, and judge its draws."""
    import arviz_stats
    import torch
    import xarray

    from tests.benchmarks import ess_others, ess_problems

    torch.set_default_dtype(torch.float64)
    problem = ess_problems.PROBLEMS[name]()
    options = dict(setting)
    sampler, _ = options.pop("sampler"), options.pop("threads", None)
    if sampler in PIRL:
        run = pirl_fit(problem, engine=sampler, device=device, seed=seed, **options)
    else:
        runs = {"pyro": "pyro_nuts", "numpyro": "numpyro_nuts", "blackjax": "blackjax_chees"}
        run = getattr(ess_others, runs[sampler])(problem, seed=seed, **options)
    half = run.draws.shape[1] // 2
    compared = run.draws if len(run.draws) > 1 else run.draws[0, : 2 * half].reshape(2, half, -1)
    draws, halves = (xarray.Dataset({"z": (("chain", "draw", "parameter"), x)}) for x in (run.draws, compared))
    figures = {
        "ess": float(arviz_stats.ess(draws, method="bulk").z.min()),
        "rhat": float(arviz_stats.rhat(halves).z.max()),
        "mean": draws.z.mean(("chain", "draw")).values.tolist(),
        "mcse": arviz_stats.mcse(draws, method="mean").z.values.tolist(),
        "threads": torch.get_num_threads() if sampler in TORCH else processors(),
    }
    return {**{key: value for key, value in run._asdict().items() if key != "draws"}, **figures}


def check(name: str, forms: list[str]) -> Setting:
    """Compare all forms of a posterior; see :func:`ess_problems.check`."""
    import torch

    from tests.benchmarks import ess_others, ess_problems

    torch.set_default_dtype(torch.float64)
    if forms:
        ess_others.enter_jax()
    return {"error": ess_problems.check(ess_problems.PROBLEMS[name](), forms)}


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------- from outside


def in_a_process(job: Setting, processors: int | None = None, threads: int | None = None) -> Setting:
    """Do a job in a fresh process; what goes wrong there is the value of "failed"."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.ess_per_second", "--job", json.dumps(job)]
    if processors:  # JAX follows the affinity of its process, and nothing else
        command = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:processors])), *command]
    limited = {"OPENBLAS_NUM_THREADS": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    try:
        done = subprocess.run(command, env={**os.environ, **limited}, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {LIMIT} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(results: list[Setting]) -> None:
    """Add the ESS a second, and how far the means are from those of the run with the largest ESS."""
    converged = [result for result in results if result["rhat"] <= GOOD_RHAT]
    best = max(converged or results, key=lambda result: result["ess"])
    for result in results:
        triples = zip(result["mean"], best["mean"], zip(result["mcse"], best["mcse"], strict=True), strict=True)
        result["z"] = 0.0 if result is best else max(abs(a - b) / (s * s + t * t) ** 0.5 for a, b, (s, t) in triples)
        result["rate"] = result["ess"] / result["seconds"]
        result["good"] = result["rhat"] <= GOOD_RHAT and result["z"] <= GOOD_Z


def table(results: list[Setting]) -> None:
    """Print the rows of a problem; the last column is the rate over that of the best sampler that is not pirl."""
    compare(results)
    rates = [r["rate"] for r in results if r["good"] and r["sampler"] not in PIRL]
    reference = max(rates, default=None)
    columns = {
        "chains": ("chains", "d"), "threads": ("threads", "d"), "warm-up": ("warmup", "d"), "draws": ("draws", "d"),
        "seconds": ("seconds", ".1f"), "warming": ("warming", ".1f"), "compiling": ("compilation", ".1f"),
        "call": ("wall", ".1f"), "gradients": ("gradients", ".3g"), "ESS": ("ess", ".0f"), "ESS/s": ("rate", ".1f"),
        "R-hat": ("rhat", ".3f"), "z": ("z", ".1f"), "ratio": ("ratio", ".2f"),
    }  # fmt: skip
    print(f"  {'sampler':48}" + "".join(f"{head:>10}" for head in columns))
    for result in sorted(results, key=lambda result: -result["rate"]):
        result["ratio"] = result["rate"] / reference if reference and result["good"] else None
        cells = ("-" if result[key] is None else format(result[key], style) for key, style in columns.values())
        mark = " " if result["good"] else "!"
        print(f"{mark} {describe(result):48}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Minimum bulk ESS a second, pirl against others.")
    parser.add_argument("problems", nargs="*", default=PROBLEMS, help=f"of {', '.join(PROBLEMS)}; all by default")
    parser.add_argument("--only", help="samplers: of chees, nuts, pyro, numpyro, blackjax, separated by commas")
    parser.add_argument("--chains", default="64", help="numbers of chains for chees, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of pirl; JAX takes its own default, plain Pyro the CPU")
    parser.add_argument("--processors", type=int, help="how many a process may use; by default all")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps({"check": check, "measure": measure}[job.pop("do")](**job)))
        return
    absent = [name for name in ("numpyro", "blackjax") if importlib.util.find_spec(name) is None]
    if absent:
        print(f"left out, not installed: {', '.join(absent)} (pip install numpyro blackjax)")
    if unknown := set(arguments.problems) - set(PROBLEMS):
        parser.error(f"no problem is called {', '.join(sorted(unknown))}: choose of {', '.join(PROBLEMS)}")
    only = (arguments.only or "chees,nuts,pyro,numpyro,blackjax").split(",")
    for name in arguments.problems:
        wanted = settings(name, [int(number) for number in arguments.chains.split(",")])
        wanted = [s for s in wanted if s["sampler"] in only and s["sampler"] not in absent]
        forms = sorted({s["form"] for s in wanted if "form" in s})
        checked = in_a_process({"do": "check", "name": name, "forms": forms})
        if "failed" in checked:
            raise SystemExit(f"{name}: {checked['failed']}")
        print(f"{name}: all forms agree with pirl's density and gradients to {checked['error']:.0e}", flush=True)
        results = []
        for setting in wanted:
            job = {"do": "measure", "name": name, "setting": setting}
            job |= {"seed": arguments.seed, "device": arguments.device}
            result = in_a_process(job, arguments.processors, setting.get("threads"))
            label = f"  {describe(setting)}, {setting['chains']} chains: "
            if "failed" in result:
                print(label + result["failed"], flush=True)
            else:
                results.append({**setting, **result})
                print(label + f"{result['ess']:.0f} in {result['seconds']:.1f} s", file=sys.stderr)
        if results:
            print(f"  {arguments.processors or processors()} processors a process; pirl on {arguments.device}")
            table(results)


if __name__ == "__main__":
    main()
