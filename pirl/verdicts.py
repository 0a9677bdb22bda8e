"""What a calibration study says: a table of its test quantities, and a verdict in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from pirl.convergence import element_names
from pirl.errors import OptionError, counted, form
from pirl.quantities import LOG_LIKELIHOOD
from pirl.replicates import check_study
from pirl.uniformity import holm, p_values

if TYPE_CHECKING:
    import pandas
    import xarray

SMALL = 0.05
"""Adjusted p-value below which a quantity is called out: the chance that a sound study calls out any."""

CHANCE = 0.001
"""Adjusted p-value above which one is told that it may be chance: more studies than one may look at are sound."""

COVERED = (0.5, 0.9)
"""Central intervals whose coverage is told."""

FEWEST = 20
"""Replicates below which nothing is said of them all being well."""

APPROXIMATE = ("laplace", "svi")

NARROW = 0.5
"""Contraction above which a posterior claims that the data tell of a parameter."""

UNTOLD = 0.2
"""Correlation of truths and posterior means below which data tell little, where replicates are enough to know it."""

MOST_NAMED = 20

FEW_DRAWS, BAD_RHAT, OFTEN, MOSTLY = 0.5, 1.1, 0.05, 0.5
# R-hat of a few dozen draws a chain is often above 1.05 where nothing is wrong.


def verdicts(study: xarray.DataTree) -> pandas.DataFrame:
    """Judge each test quantity of a study that :func:`pirl.calibrate` made.

    Returns:
        A row for each element of each quantity: ``p_value`` of the hypothesis that its ranks are uniform (of the
        largest departure anywhere, exact), ``p_adjusted`` for the number of quantities (Holm 1979; a sound study has
        any below .05 in 5% of cases), ``coverage_50`` and ``coverage_90``, the shares of truths in the central
        intervals, ``correlation`` of truths and posterior means, ``contraction`` (1 - mean posterior variance /
        variance of the truths; both NaN of fewer than 20) and ``finding``, in words.

    Raises:
        OptionError: this is no study.

    Example:
        >>> study = pirl.calibrate(model, demos[:5], mdp, features, engine="laplace", num_replicates=4, num_draws=9)
        >>> found = verdicts(study)
        >>> list(found.columns[:2]), list(found.index)
        (['p_value', 'p_adjusted'], ['weights[0]', 'weights[1]', 'weights[2]', 'log_likelihood', 'return_gap'])
    """
    import pandas

    check_study(study)
    num_draws = int(study.attrs["num_draws"])
    lived = ~_statistics(study)["failed"].astype(bool)
    all_ranks = [data.values[0][lived].reshape(lived.sum(), -1) for data in study["ranks"].data_vars.values()]
    index: list[str] = []
    rows: list[dict[str, float]] = []
    for labels, truth, mean, sd in _recovered(study):
        index += labels
        for element in range(len(labels)):
            known = truth[:, element]
            spread = known.var(ddof=1) if len(known) > 1 else 0.0
            told = spread > 0 and len(known) >= FEWEST
            rows.append(
                {
                    "correlation": np.corrcoef(known, mean[:, element])[0, 1] if told else np.nan,
                    "contraction": 1 - (sd[:, element] ** 2).mean() / spread if told else np.nan,
                }
            )
    judged = judge(np.concatenate(all_ranks, -1).astype(int), num_draws, index)
    recovered = pandas.DataFrame(rows, index=judged.index)
    return pandas.concat([judged.drop(columns="finding"), recovered, judged["finding"]], axis=1)


def judge(ranks: Int[np.ndarray, "..."], num_draws: int, names: Sequence[str]) -> pandas.DataFrame:
    """Judge ranks of truths among draws, wherever they are from: several studies of one model, say, put together.

    Args:
        ranks: ``[R, Q]``, number of draws below the truth, 0, ..., L, of R replicates and Q quantities.
        num_draws: L.
        names: of the quantities.

    Returns:
        A row a quantity: ``p_value``, ``p_adjusted``, ``coverage_50``, ``coverage_90`` and ``finding``, as of
        :func:`verdicts`.

    Raises:
        OptionError: there are none, they are not 0, ..., L, or names are not as many as quantities.

    Example:
        >>> import numpy as np
        >>> from pirl.verdicts import judge
        >>> halves = np.tile(np.arange(5), 20)[:, None]  # the truth is never above the middle of nine draws
        >>> judge(halves, num_draws=9, names=["wage"]).loc["wage", "finding"]
        'posterior too high'
    """
    import pandas

    if ranks.ndim != 2 or len(ranks) == 0 or ranks.shape[1] != len(names):
        raise OptionError(f"ranks are {form(ranks)} for {counted(len(names), 'name')}: expected [replicate, quantity]")
    if ranks.min() < 0 or ranks.max() > num_draws:
        raise OptionError(f"ranks are {ranks.min()} to {ranks.max()}, but of {num_draws} draws 0 to {num_draws}")
    p = p_values(ranks, num_draws)
    table = pandas.DataFrame({"p_value": p, "p_adjusted": holm(p)}, index=pandas.Index(names, name="quantity"))
    for level in COVERED:
        table[f"coverage_{round(100 * level)}"] = [_coverage(rank, num_draws, level) for rank in ranks.T]
    table["finding"] = [
        _words(rank, num_draws) if adjusted < SMALL else "uniform"
        for rank, adjusted in zip(ranks.T, table["p_adjusted"], strict=True)
    ]
    return table


def is_calibrated(study: xarray.DataTree) -> bool:
    """Whether every replicate was made, of twenty at least, and no test quantity leaves its band.

    Example:
        >>> study = pirl.calibrate(model, demos[:5], mdp, features, engine="laplace", num_replicates=4, num_draws=9)
        >>> type(is_calibrated(study))
        <class 'bool'>
    """
    return stays_in_bands(study) and len(_statistics(study)["failed"]) >= FEWEST


def stays_in_bands(study: xarray.DataTree) -> bool:
    """Whether every replicate was made, however few, and no test quantity leaves its band.

    Example:
        >>> study = pirl.calibrate(model, demos[:5], mdp, features, engine="laplace", num_replicates=4, num_draws=9)
        >>> type(stays_in_bands(study))
        <class 'bool'>
    """
    return not _statistics(study)["failed"].any() and bool((verdicts(study)["finding"] == "uniform").all())


def print_verdicts(study: xarray.DataTree) -> None:
    """Print the table of a study, and what to think of it.

    Example:
        >>> study = pirl.calibrate(model, demos[:5], mdp, features, engine="laplace", num_replicates=4, num_draws=9)
        >>> print_verdicts(study)
                                        50%    90% corre- contrac-...
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = verdicts(study)
    few = (~_statistics(study)["failed"].astype(bool)).sum() < FEWEST
    headers = ["p", "adjusted", "50%\ncovers", "90%\ncovers", "corre-\nlation", "contrac-\ntion"]

    def shown(columns: list[str]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column("", overflow="fold")
        for column in columns:
            table.add_column(column, justify="right", vertical="bottom", no_wrap=True)
        table.add_column("ranks", vertical="bottom", overflow="fold")
        for label, row in found.iterrows():
            digits = [3, 3] + [2] * (len(columns) - 2)
            numbers = [_shown(x, n) for x, n in zip(row.iloc[: len(columns)], digits, strict=True)]
            finding = row["finding"]
            if finding == "uniform" and few:
                finding = "too few to tell"
            table.add_row(*map(Text, [str(label), *numbers, finding]))
        return table

    console = Console(highlight=False)
    table = shown(headers)
    wanted = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if wanted > console.width and not (console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ):
        console = Console(highlight=False, width=wanted)  # a file has room
    if wanted > console.width:  # what is judged first
        table = shown(headers[:4])
    console.print(table)
    print()
    print(_made(study))
    for line in words(study, found):
        print(line)


def _shown(number: float, digits: int) -> str:
    if np.isnan(number):
        return "-"
    if number < -1:  # of contractions, of heavy tails above all: how far below does not matter
        return "<-1"
    # Of p-values; whether shares are 0 does not matter to three digits.
    return f"<.{'0' * (digits - 1)}1" if 0 < number < 0.5 / 10**digits else f"{number:.{digits}f}"


def _made(study: xarray.DataTree) -> str:
    """How a study was made, in a line."""
    attrs = study.attrs
    chains, warmup = counted(int(attrs["num_chains"]), "chain"), int(attrs["num_warmup"])
    after = f" after {warmup:,} of warm-up" if warmup else ""
    draws = f"{int(attrs['num_samples']):,} {'particles' if attrs['engine'] == 'smc' else 'draws'}"
    many, by = counted(int(attrs["num_replicates"]), "replicate"), attrs.get("sampler", attrs["engine"])
    asked = f" (of {int(attrs['num_asked']):,}, interrupted)" if "num_asked" in attrs else ""
    said = [
        f"{attrs['model']}: {many}{asked} by {by}",
        f"{chains} of {draws}{after}",
        f"ranks among {int(attrs['num_draws']):,}",
        *([str(attrs["engine_options"])] if "engine_options" in attrs else []),
        *([f"data by {attrs['draw_data']}"] if "draw_data" in attrs else []),
        f"seed {attrs['seed']}",
    ]
    return ", ".join(said) + "."


def words(study: xarray.DataTree, found: pandas.DataFrame) -> list[str]:
    """The verdict, line by line: first the ranks, then what casts doubt on the study itself.

    Example:
        >>> study = pirl.calibrate(model, demos[:5], mdp, features, engine="laplace", num_replicates=4, num_draws=9)
        >>> all(isinstance(line, str) for line in words(study, verdicts(study)))
        True
    """
    stats = _statistics(study)
    lived = ~stats["failed"].astype(bool)
    count, num_draws = int(lived.sum()), int(study.attrs["num_draws"])
    out = found[found["finding"] != "uniform"]
    engine = study.attrs["engine"]
    margin = 1.96 * 0.5 / np.sqrt(count)
    few = float((stats["ess"][lived] < FEW_DRAWS * num_draws).mean())
    torn = float((stats["rhat"][lived] > BAD_RHAT).mean())
    unknown = float(np.isnan(stats["rhat"][lived]).mean())
    if engine in APPROXIMATE:  # which has no chains
        few = torn = unknown = 0.0
    on_whole = " on the whole" if max(few, torn, unknown) > OFTEN else ""  # of single posteriors the last lines tell
    if len(out):
        names = ", ".join(f"{name} ({row['finding']})" for name, row in out.iterrows())
        why = "it approximates" if engine in APPROXIMATE else "the chains are too short"
        other = f"what {study.attrs['draw_data']} draws is not the model's, " if "draw_data" in study.attrs else ""
        lines = [f"Not calibrated: {names}. The model or engine {engine!r} is wrong there, {other}or {why}."]
        if few > OFTEN or torn > OFTEN:  # which is enough of a cause
            lines = [f"Not calibrated: {names}. The chains are too short, which may be all that is wrong."]
        least = float(out["p_adjusted"].min())
        if least > CHANCE:
            lines.append(
                f"A sound study departs as far with probability {least:.2g} at most: another seed, or more "
                "replicates, tell whether it was chance."
            )
    elif not lived.all():
        lines = [
            f"Not known to be calibrated: the ranks of {counted(count, 'replicate')} stay in their band, but others "
            "failed, and perhaps because of their truths."
        ]
    elif count < FEWEST:
        many = counted(count, "replicate")
        lines = [f"Nothing leaves its band, but {many} tell too little: make {FEWEST} at least."]
    elif max(few, torn, unknown) > MOSTLY:
        lines = [
            f"Nothing leaves its band, which says little of {count} replicates: most of their chains are too short, "
            "disagree, or tell nothing of themselves."
        ]
    else:
        lines = [
            f"Calibrated{on_whole}, as far as {count} replicates can tell: the ranks of {len(found)} quantities stay "
            f"in their band (shares are known to +-{margin:.2f})."
        ]
    if not lived.all():
        why = f": {study.attrs['failures']}" if "failures" in study.attrs else ""
        lines.append(f"{int((~lived).sum())} of {len(lived)} replicates failed{why}.")
    if few > OFTEN:
        lines.append(
            f"{few:.0%} of the posteriors have fewer than {FEW_DRAWS * num_draws:.0f} independent draws for "
            f"num_draws={num_draws}, which makes ranks too extreme: take more samples, or fewer num_draws."
        )
    if torn > OFTEN:
        lines.append(
            f"In {torn:.0%} of the posteriors chains disagree (R-hat of what is judged here above {BAD_RHAT}): warm up "
            "longer, or take more samples."
        )
    if unknown > OFTEN:
        lines.append(
            f"Of {unknown:.0%} of the posteriors R-hat is unknown: draws that never change, or fewer than 4 a chain."
        )
    lines += _untold(study, found, count)
    if "sampled_one_by_one" in study.attrs:
        why = study.attrs["sampled_one_by_one"]
        lines.append(f"Not all replicates could be sampled at once, which is faster: {why}.")
    diverging = float((stats["divergences"][lived] > 0).mean())
    if diverging > OFTEN:
        lines.append(f"{diverging:.0%} of the posteriors have divergent transitions.")
    return lines


def _untold(study: xarray.DataTree, found: pandas.DataFrame, count: int) -> list[str]:
    """Which truths posterior means do not follow: because data tell nothing of them, or because they are not theirs."""
    if count < FEWEST:
        return []
    parts = list(_recovered(study))
    follows = np.concatenate([_rank_correlation(truth, mean) for _, truth, mean, _ in parts])
    varies = np.concatenate([truth.max(0) > truth.min(0) for _, truth, _, _ in parts])
    # What so many replicates cannot tell from none at all, whether relations are linear or not; of many, what is small.
    limit = max(2 / np.sqrt(count), UNTOLD)
    most = np.fmax(np.nan_to_num(np.abs(follows)), found["correlation"].abs().fillna(0.0))
    lost = found[varies & (most < limit)].drop(index=LOG_LIKELIHOOD, errors="ignore")
    narrow = [str(name) for name in lost.index[lost["contraction"] > NARROW]]
    wide = [str(name) for name in lost.index if name not in narrow]
    lines = []
    if wide:
        lines.append(
            f"Of {_some(wide)} the data tell little, as far as {count} replicates show: posterior means hardly follow "
            "the truth."
        )
    if narrow:
        source = f"what {study.attrs['draw_data']} draws depends" if "draw_data" in study.attrs else "data depend"
        lines.append(
            f"Posteriors of {_some(narrow)} are narrow and do not follow the truth: see whether {source} on it."
        )
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {counted(len(names) - MOST_NAMED, 'other')}" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _recovered(study: xarray.DataTree) -> Iterator[tuple[list[str], np.ndarray, np.ndarray, np.ndarray]]:
    """Of each quantity labels, truths, posterior means and sds ``[R, element]`` of the replicates that did not fail."""
    lived = ~_statistics(study)["failed"].astype(bool)
    recovery = study["recovery"].to_dataset()
    for key, data in study["ranks"].data_vars.items():
        name = str(key)
        truth = np.asarray(study["prior"][name])[0][lived].reshape(lived.sum(), -1)
        each = recovery[name].transpose("summary", "chain", "draw", ...)
        mean, sd = (each.sel(summary=what).values[0][lived].reshape(truth.shape) for what in ("mean", "sd"))
        yield element_names(data), truth, mean, sd


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's, of each column; NaN where one does not vary."""
    import scipy.stats

    ranks = [scipy.stats.rankdata(values, axis=0) for values in (x, y)]
    a, b = (values - values.mean(0) for values in ranks)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), size, out=np.full(len(size), np.nan), where=size > 0)


def _statistics(study: xarray.DataTree) -> dict[str, np.ndarray]:
    """What is known of each replicate."""
    return {str(name): data.values[0] for name, data in study["sample_stats"].data_vars.items()}


def _coverage(rank: np.ndarray, num_draws: int, level: float) -> float:
    """Share of truths in the central interval that holds ``level`` of the ranks."""
    tail = (1 - level) / 2 * (num_draws + 1)
    return float(((rank >= tail - 1e-9) & (rank < num_draws + 1 - tail - 1e-9)).mean())


def _words(rank: np.ndarray, num_draws: int) -> str:
    """How ranks depart from uniformity: in the mean, in the spread, or in both, the further first."""
    place = (rank + 0.5) / (num_draws + 1) - 0.5
    known = (1 - 1 / (num_draws + 1) ** 2) / 12  # the variance of as many ranks, evenly spaced
    shift = place.mean() * np.sqrt(len(rank) / known)
    # A shift alone moves ranks to one end: away from the middle, and nearer to each other.
    spreads = [((x**2).mean() - known) * np.sqrt(180 * len(rank)) for x in (place, place - place.mean())]
    spread = min(spreads, key=abs) if min(spreads) * max(spreads) > 0 else 0.0
    found = [(abs(shift), "low" if shift > 0 else "high"), (abs(spread), "narrow" if spread > 0 else "wide")]
    said = [word for size, word in sorted(found, reverse=True) if size >= 2]
    return f"posterior too {' and '.join(said)}" if said else "another shape"
