"""The posterior of models/bus_engine.py by nuts, laplace and svi, against a fine grid.

    python -m tests.benchmarks.bus_posterior [GROUP ...]

Prints each figure, and beside it how far it is from the grid's: in Monte Carlo standard errors (se) where the engine
is exact, in posterior standard deviations (sd) for the approximations.
"""

from __future__ import annotations

import sys
from typing import Any

import arviz_stats
import numpy as np
import torch

import pirl
from models import bus_engine
from tests.bus_grid import NAMES, BusGrid

QUANTILES = (0.05, 0.5, 0.95)
ENGINES: dict[str, dict[str, Any]] = {
    "nuts": {**bus_engine.defaults["nuts"], "num_samples": 2000},
    "laplace": {"num_samples": 4000},
    "svi": {"num_samples": 4000, "guide": "multivariate_normal"},
}


def grid(arguments: dict[str, Any]) -> tuple[dict[str, np.ndarray], float]:
    """Mean, sd and 5/50/95% quantiles of each cost, and their correlation."""
    exact = BusGrid(arguments, size=121)
    cells = exact.posterior(exact.log_likelihood(arguments["replaced"]))
    moments, correlation = exact.moments(cells)
    return {
        name: np.array([*moments[name].values(), *exact.quantiles(cells, name, QUANTILES)]) for name in NAMES
    }, correlation


def main() -> None:
    torch.set_num_threads(1)
    for group in sys.argv[1:] or ["4", "1-4"]:
        arguments = bus_engine.load(group=group)
        exact, correlation = grid(arguments)
        print(f"\ngroup {group}{'mean':>24}{'sd':>18}{'5%':>18}{'50%':>18}{'95%':>18}")
        for name in NAMES:
            print(f"{'grid':9}{name:9}" + "".join(f"{figure:10.3f}{'':8}" for figure in exact[name]))
        print(f"{'grid':9}correlation {correlation:.3f}")
        for engine, options in ENGINES.items():
            posterior = pirl.fit(
                bus_engine.model, model_kwargs=arguments, engine=engine, **options,
                num_prior=0, num_posterior_predictive=0, progress=False,
            )  # fmt: skip
            draws = posterior["posterior"].to_dataset()
            for name in NAMES:
                values = draws[name].values
                found = np.array([values.mean(), values.std(ddof=1), *np.quantile(values, QUANTILES)])
                if engine == "nuts":
                    errors = [arviz_stats.mcse(draws[[name]], method=method) for method in ("mean", "sd")]
                    errors += [arviz_stats.mcse(draws[[name]], method="quantile", prob=prob) for prob in QUANTILES]
                    scale, unit = np.array([float(error[name]) for error in errors]), "se"
                else:
                    scale, unit = exact[name][1], "sd"
                away = (found - exact[name]) / scale
                print(
                    f"{engine:9}{name:9}"
                    + "".join(f"{f:10.3f} {a:+5.2f}{unit}" for f, a in zip(found, away, strict=True))
                )
            if engine == "nuts":
                ess = min(float(x.min()) for x in arviz_stats.ess(draws, method="bulk").values())
                rhat = max(float(x.max()) for x in arviz_stats.rhat(draws).values())
                quality = (
                    f"bulk ESS {ess:.0f}, R-hat {rhat:.4f}, {int(posterior.sample_stats.diverging.sum())} divergences"
                )
            else:
                quality = f"Pareto k-hat {posterior.attrs['pareto_k']:.2f}"
            flat = np.corrcoef(*(draws[name].values.ravel() for name in NAMES))[0, 1]
            print(f"{engine:9}correlation {flat:.3f}; {quality}; {posterior.attrs['sampling_time']:.1f} s")


if __name__ == "__main__":
    main()
