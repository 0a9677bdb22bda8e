"""What is wrong with a posterior, why it matters, and what to try: in words."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from itertools import chain as chained
from typing import TYPE_CHECKING, Any

from pirl.diagnose.approximation import approximation, particles, partition
from pirl.diagnose.chains import disagreement, divergences, energies, few_effective, run, unsound
from pirl.diagnose.data import from_the_prior, influential
from pirl.diagnose.facts import Facts, Finding
from pirl.errors import PosteriorFileError, form

if TYPE_CHECKING:
    import xarray

_Check = Callable[[Facts], Iterator[Finding]]
_PROBLEMS: tuple[_Check, ...] = (
    unsound, disagreement, few_effective, divergences, energies, approximation, particles, partition,
)  # fmt: skip
_NOTES: tuple[_Check, ...] = (run, influential, from_the_prior)

__all__ = ["Finding", "diagnose", "print_diagnosis", "verdict"]


def diagnose(posterior: xarray.DataTree) -> list[Finding]:
    """Say what is wrong with a posterior and what to try, problems before notes; an empty list where nothing is.

    Looks at R-hat (nested where chains share starts), effective sample sizes, divergent transitions and where they
    are, energies, stuck chains and several modes, Pareto k-hat of approximations, what the engines say about
    themselves, influential observations, and parameters of which the data say little.

    Raises:
        PosteriorFileError: there is no group of posterior draws.

    Example:
        >>> pirl.diagnose(posterior)
        []
    """
    return _examine(posterior)[0]


def print_diagnosis(posterior: xarray.DataTree) -> list[Finding]:
    """Print the findings, and the figures that were looked at; return the findings.

    Example:
        >>> findings = print_diagnosis(posterior)
        Nothing is wrong.
        Checked: R-hat at most 1.0...
    """
    import shutil

    findings, figures = _examine(posterior)
    width = min(120, shutil.get_terminal_size().columns)

    def paragraph(text: str, first: str = "", others: str = "") -> None:
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(text, width, initial_indent=first, subsequent_indent=others, **options))

    for finding in findings:
        paragraph(finding.what, f"{finding.severity.capitalize()}: ", "  ")
        paragraph(f"This matters: {finding.why}.", "  ", "    ")
        paragraph(f"Try: {finding.advice}.", "  ", "    ")
        print()
    problems = sum(finding.severity == "problem" for finding in findings)
    notes = len(findings) - problems
    counts = [f"{n} {word}{'s' * (n != 1)}" for n, word in ((problems, "problem"), (notes, "note")) if n]
    paragraph(f"{' and '.join(counts) if problems else ', '.join(['Nothing is wrong', *counts])}.")
    paragraph(f"Checked: {'; '.join(figures)}.", "", "  ")
    return findings


def verdict(posterior: xarray.DataTree) -> str:
    """Whether the numbers can be trusted, in one line: the same rules as :func:`diagnose`.

    Example:
        >>> verdict(posterior)
        'R-hat at most 1.0...: nothing is wrong.'
    """
    facts = Facts(posterior)
    problems = [finding for check in _PROBLEMS for finding in check(facts) if finding.severity == "problem"]
    figures = "; ".join(facts.figures)
    if not problems:
        return f"{figures}: nothing is wrong."
    return (
        f"{figures}: do not trust this yet ({', '.join(f.kind for f in problems)}); `pirl diagnose` says what to try."
    )


def _examine(posterior: xarray.DataTree) -> tuple[list[Finding], list[str]]:
    if not hasattr(posterior, "children"):
        inner = " its .posterior" if hasattr(posterior, "posterior") else " what pirl.fit returned"
        raise PosteriorFileError(f"{form(posterior)} is no DataTree: give{inner}")
    if "posterior" not in posterior.children or not {"chain", "draw"} <= set(posterior["posterior"].sizes):
        raise PosteriorFileError("there is no group 'posterior' with dims chain and draw: give what pirl.fit returned")
    facts = Facts(posterior)
    findings = list(chained.from_iterable(check(facts) for check in (*_PROBLEMS, *_NOTES)))
    return sorted(findings, key=lambda finding: finding.severity == "note"), facts.figures
