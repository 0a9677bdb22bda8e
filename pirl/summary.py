"""What a posterior says, as a table for the terminal: estimates, how far to trust them, reference values beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pirl.convergence import element_names, ess_bulk, ess_tail, rhat
from pirl.diagnose import verdict

if TYPE_CHECKING:
    import xarray

# A parameter with more elements belongs in a figure.
MOST_ROWS = 40

LEAST_SHARE = 0.05
"""Share of a parameter's prior variance that no demonstrations take away, and that is told."""


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
    blind = json.loads(posterior.attrs.get("unidentified_sites", "[]"))
    shown = posterior["posterior"].to_dataset().drop_vars(blind, errors="ignore")
    for row in _rows(shown, reference or {}, _unidentified(posterior)):
        table.add_row(*map(Text, row))  # not str, in which "weights[a]" would be markup
    Console(highlight=False).print(table)
    large = [f"{name} {data.shape[2:]}" for name, data in shown.data_vars.items() if _is_large(data)]
    print()
    if large:
        print(f"Not shown for its size: {', '.join(large)}.")
    if blind:
        print(f"Not shown, since only what is computed from them is identified: {', '.join(blind)}.")
    print(*filter(None, [_what_is_identified(posterior)]), verdict(posterior), _what_was_run(posterior), sep="\n")


def _is_large(data: xarray.DataArray) -> bool:
    return data[0, 0].size > MOST_ROWS


def _unidentified(posterior: xarray.DataTree) -> dict[str, np.ndarray]:
    """Of each parameter, of which elements some prior variance is out of reach of any demonstrations."""
    if "identification" not in posterior.children:
        return {}
    shares = posterior["identification"].data_vars.items()
    return {str(name): share.values.ravel() > LEAST_SHARE for name, share in shares}


def _what_is_identified(posterior: xarray.DataTree) -> str:
    """Explain the stars, and how well chains agree on what is identified; or why neither is known; or nothing."""
    attrs = posterior.attrs
    if "identification_unknown" in attrs:
        return f"What demonstrations determine of the parameters is not known: {attrs['identification_unknown']}."
    if "unidentified_sites" in attrs or not any(x.any() for x in _unidentified(posterior).values()):
        return ""
    missing = int(attrs["num_directions"]) - int(attrs["identified_directions"])
    return (
        f"* not identified, or in part: {missing} of {attrs['num_directions']} directions of the parameters change no "
        f"choice, so that no data reduce what the prior leaves open there. On what is identified R-hat is at most "
        f"{float(attrs['identified_rhat']):.3f}, bulk ESS at least {float(attrs['identified_ess']):.0f}."
    )


def _rows(
    posterior: xarray.Dataset, reference: Mapping[str, Any], unidentified: Mapping[str, np.ndarray]
) -> Iterator[list[str]]:
    """One row of texts a parameter: the columns of :func:`print_summary`."""
    for name, data in posterior.data_vars.items():
        if _is_large(data):
            continue
        values = data.values.reshape(*data.shape[:2], -1).astype(float)
        published = np.ravel(reference.get("values", {}).get(name, np.nan))
        errors = np.ravel(reference.get("standard_errors", {}).get(name, np.nan))
        blind = unidentified.get(str(name), np.zeros(values.shape[-1], bool))
        checks = np.stack([ess_bulk(values), ess_tail(values), rhat(values)], axis=1)
        for i, label in enumerate(element_names(data)):
            draws = values[..., i].ravel()
            sd = draws.std(ddof=1) if len(draws) > 1 else 0.0
            # Two or three digits of the standard deviation say all that there is to say.
            places = int(np.clip(2 - np.floor(np.log10(sd)), 0, 6)) if sd > 0 else 3
            numbers = [draws.mean(), sd, *np.quantile(draws, [0.05, 0.5, 0.95])]
            row = [label + "*" * int(blind[i]), *(f"{x:.{places}f}" for x in numbers)]
            # A constant has neither.
            row += ["-" if np.isnan(x) else f"{x:.{digits}f}" for x, digits in zip(checks[i], (0, 0, 3), strict=True)]
            if len(data) == 1:  # R-hat compares chains; independent draws of an approximation are one chain.
                row[-1] = "-"
            if reference:
                at, error = published[i % published.size], errors[i % errors.size]
                bracket = "" if np.isnan(error) else f" ({error:.{places}f})"
                row.append("" if np.isnan(at) else f"{at:.{places}f}{bracket}")
            yield row


def _what_was_run(posterior: xarray.DataTree) -> str:
    attrs, sizes = posterior.attrs, posterior["posterior"].sizes
    options = json.loads(attrs.get("options", "{}")).items()
    words = [attrs.get("model", "model"), *(f"{key}={value}" for key, value in options if value is not None)]
    part = " (interrupted)" if str(attrs.get("interrupted")) == "True" else ""
    return (
        f"{' '.join(words)}: {attrs['engine']}, {sizes['chain']} x {sizes['draw']} draws{part}, "
        f"seed {attrs['seed']}, {float(attrs['wall_time']):.1f} s."
    )
