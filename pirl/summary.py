"""What a posterior says, as a table for the terminal: estimates, how far to trust them, reference values beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray

# A parameter with more elements belongs in a figure.
MOST_ROWS = 40
# Vehtari et al. 2021: the chains agree, and the diagnostics themselves are stable.
MAX_RHAT, MIN_ESS_PER_CHAIN = 1.01, 100


def print_summary(posterior: xarray.DataTree) -> None:
    """Print a posterior's table, what to think of its convergence, and what was run."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    reference = json.loads(posterior.attrs.get("reference", "null"))
    columns = ["mean", "sd", "5%", "50%", "95%", "ESS\nbulk", "ESS\ntail", "R-hat"]
    table.add_column("", no_wrap=True)
    for column in [*columns, reference["label"]] if reference else columns:
        table.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    for row in _rows(posterior["posterior"].to_dataset(), reference or {}):
        table.add_row(*map(Text, row))  # not str, in which "weights[a]" would be markup
    Console(highlight=False).print(table)
    large = [f"{name} {data.shape[2:]}" for name, data in posterior["posterior"].data_vars.items() if _is_large(data)]
    print()
    if large:
        print(f"Not shown for its size: {', '.join(large)}.")
    print(_verdict(posterior), _what_was_run(posterior), sep="\n")


def _is_large(data: xarray.DataArray) -> bool:
    return data[0, 0].size > MOST_ROWS


def _rows(posterior: xarray.Dataset, reference: Mapping[str, Any]) -> Iterator[list[str]]:
    """One row of texts a parameter: the columns of :func:`print_summary`."""
    import arviz_stats

    small = posterior[[name for name, data in posterior.data_vars.items() if not _is_large(data)]]
    diagnostics = [
        arviz_stats.ess(small, method="bulk"),
        arviz_stats.ess(small, method="tail"),
        arviz_stats.rhat(small),
    ]
    for name, data in small.data_vars.items():
        draws = data.values.reshape(data.shape[0] * data.shape[1], -1)
        published = np.ravel(reference.get("values", {}).get(name, np.nan))
        errors = np.ravel(reference.get("standard_errors", {}).get(name, np.nan))
        checks = np.stack([dataset[name].values.ravel() for dataset in diagnostics], axis=1)
        labels = [[str(label) for label in data[dim].values] for dim in data.dims[2:]]
        for i, (index, values) in enumerate(zip(np.ndindex(data.shape[2:]), draws.T, strict=True)):
            element = ",".join(axis[j] for axis, j in zip(labels, index, strict=True))
            sd = values.std(ddof=1)
            # Two or three digits of the standard deviation say all that there is to say.
            places = int(np.clip(2 - np.floor(np.log10(sd)), 0, 6)) if sd > 0 else 3
            numbers = [values.mean(), sd, *np.quantile(values, [0.05, 0.5, 0.95])]
            row = [f"{name}[{element}]" if element else str(name), *(f"{x:.{places}f}" for x in numbers)]
            # R-hat compares chains; independent draws of an approximation are one chain.
            row += [*(f"{ess:.0f}" for ess in checks[i, :2]), f"{checks[i, 2]:.3f}" if len(data) > 1 else "-"]
            if reference:
                at, error = published[i % published.size], errors[i % errors.size]
                bracket = "" if np.isnan(error) else f" ({error:.{places}f})"
                row.append("" if np.isnan(at) else f"{at:.{places}f}{bracket}")
            yield row


def _verdict(posterior: xarray.DataTree) -> str:
    """Whether the numbers can be trusted, in one line."""
    import arviz_stats

    if "approximation" in posterior.attrs:
        k = float(posterior.attrs.get("pareto_k", np.nan))
        judgement = "close to the posterior" if k < 0.7 else "do not trust it: use an exact engine, such as nuts"
        return f"An approximation ({posterior.attrs['approximation']}); Pareto k-hat {k:.2f}: {judgement}."
    draws = posterior["posterior"].to_dataset()
    ess = min(
        float(data.min()) for method in ("bulk", "tail") for data in arviz_stats.ess(draws, method=method).values()
    )
    rhat = max(float(data.max()) for data in arviz_stats.rhat(draws).values())
    stats = posterior["sample_stats"].to_dataset()
    divergent = int(stats["diverging"].sum()) if "diverging" in stats else 0
    figures = f"{divergent} divergences, R-hat at most {rhat:.3f}, ESS at least {ess:.0f}"
    wanted = MIN_ESS_PER_CHAIN * draws.sizes["chain"]
    if divergent == 0 and rhat < MAX_RHAT and ess >= wanted:
        return f"{figures}: the chains agree."
    return f"{figures}: do not trust this yet (wanted: 0, {MAX_RHAT}, {wanted}); try more --warmup and --samples."


def _what_was_run(posterior: xarray.DataTree) -> str:
    attrs, sizes = posterior.attrs, posterior["posterior"].sizes
    options = json.loads(attrs.get("options", "{}")).items()
    words = [attrs.get("model", "model"), *(f"{key}={value}" for key, value in options if value is not None)]
    return (
        f"{' '.join(words)}: {attrs['engine']}, {sizes['chain']} x {sizes['draw']} draws, "
        f"seed {attrs['seed']}, {float(attrs['wall_time']):.1f} s."
    )
