"""The command line: ``pirl fit MODEL.py``, and ``pirl summary``, ``diagnose`` and ``plot`` of its ``posterior.nc``;
``pirl compare MODEL.py`` and ``pirl calibrate MODEL.py``.

What a model file is tells :mod:`pirl.model_file`.
"""

from __future__ import annotations

import sys
import traceback
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pirl.diagnose import print_diagnosis
from pirl.errors import (
    CheckpointWarning,
    ConvergenceWarning,
    EmptyTrajectoriesWarning,
    InterruptedWarning,
    PirlError,
)
from pirl.files import (
    as_posterior,
    check_distinct,
    check_output,
    is_study,
    read_posterior,
    read_result,
    replacing,
    write_posterior,
)
from pirl.model_file import ModelFile
from pirl.summary import print_summary

if TYPE_CHECKING:
    import xarray

PLOT_FORMATS = (".png", ".pdf", ".svg", ".jpg")
INTERRUPTED = 130

CRASHED = 3
"""Exit status of what is nobody's use, but an error in a model or in pirl."""


class _Commands(TyperGroup):
    """Errors of use become one line on stderr and exit status 2; any other one keeps its traceback, with status 3."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except PirlError as error:
            _complain(str(error))
        except typer.Abort:
            sys.exit(INTERRUPTED)
        except Exception as error:
            # What typer raises for words that it does not understand; it may carry its own copy of click.
            if not hasattr(error, "format_message"):
                traceback.print_exception(error)
                sys.exit(CRASHED)  # 1 is an answer: a posterior with problems, a study that leaves its band
            if type(error).__name__ == "NoArgsIsHelpError":
                sys.exit(2)  # has printed the help
            _complain(error.format_message())
        sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str) -> typing.NoReturn:
    print(f"pirl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


app = typer.Typer(
    cls=_Commands,
    help="Bayesian inverse reinforcement learning: from observed decisions to the rewards that explain them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="pirl")


def fit_module(path: str) -> None:
    """Run ``pirl fit`` on the file at ``path`` with this program's arguments: what ``python -m models.NAME`` does."""
    app(["fit", path, *sys.argv[1:]], prog_name="pirl")


# ---------------------------------------------------------------------------------------------------------- commands

PosteriorPath = Annotated[Path, typer.Argument(metavar="POSTERIOR.nc", help="A file that `pirl fit --out` wrote.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Say how far it is; in a log, every minute.")]


@app.command("fit")
def fit_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.py", help="A Python file with model(...) and load(...).")],
    engine: Annotated[str | None, typer.Option(help="chees, nuts, smc, svi or laplace.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Chains; of smc, populations of particles.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Draws a chain; of smc, particles a population.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up a chain.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Reproduces every number.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the model; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="POSTERIOR.nc", help="Where to write the posterior.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="POSTERIOR.png", help="Where to draw it.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="RUN.ckpt", help="Where to save the run; the same command goes on from there."),
    ] = None,
    predictive: Annotated[
        bool, typer.Option("--predictive/--no-predictive", help="Simulate from the prior and the posterior, too.")
    ] = True,
    progress: Progress = True,
) -> None:
    """Infer the posterior of a model file, print its summary, and keep it.

    Exit status: 0: there is a posterior (`pirl diagnose` says whether to trust it); 2: wrong input; 3: a crash; 130:
    Ctrl-C, of which chains after their warm-up keep the draws so far; 143: SIGTERM, with a checkpoint.
    """
    check_output(out)
    check_output(plot, PLOT_FORMATS)
    check_distinct(out, plot, checkpoint)
    _check_device(device)
    file = ModelFile.read(model)
    options = file.options(settings or [])
    arguments = {
        "engine": engine, "num_chains": chains, "num_samples": samples, "num_warmup": warmup,
        "device": device, "seed": seed, "progress": progress, "checkpoint": checkpoint,
        **({} if predictive else {"num_prior": 0, "num_posterior_predictive": 0}),
    }  # fmt: skip
    try:
        with _short_warnings():
            posterior = file.fit(options, {name: value for name, value in arguments.items() if value is not None})
    except KeyboardInterrupt as interrupt:
        print(f"pirl: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if posterior is None:  # the process of another rank has it
        return
    if out is not None:
        write_posterior(posterior, out)
    if plot is not None:
        _write_plot(posterior, plot)
    print_summary(posterior)
    for path in (out, plot):
        if path is not None:
            print(f"wrote {path}")
    if posterior.attrs.get("interrupted") == "True":
        raise typer.Exit(INTERRUPTED)


@app.command("summary")
def summary_command(posterior: PosteriorPath) -> None:
    """Print the table of a posterior file: estimates, how far to trust them, and reference values beside.

    Of a study that `pirl calibrate --out` wrote, print its verdicts again.
    """
    tree = read_result(posterior)
    if is_study(tree):
        from pirl.verdicts import print_verdicts

        print_verdicts(tree)
    else:
        print_summary(as_posterior(tree, posterior))


@app.command("diagnose")
def diagnose_command(posterior: PosteriorPath) -> None:
    """Say what is wrong with a posterior file and what to try; exit status 1 if something is."""
    findings = print_diagnosis(read_posterior(posterior))
    raise typer.Exit(int(any(finding.severity == "problem" for finding in findings)))


@app.command("plot")
def plot_command(
    posterior: PosteriorPath,
    out: Annotated[Path | None, typer.Option(metavar="POSTERIOR.png", help="By default beside the posterior.")] = None,
    recovery: Annotated[
        Path | None, typer.Option(metavar="RECOVERY.png", help="Of a study: truths against posteriors, too.")
    ] = None,
) -> None:
    """Draw the posterior distributions of a posterior file, with reference values.

    Of a study that `pirl calibrate --out` wrote, draw its ranks.
    """
    target = out or (posterior.with_suffix(".png") if posterior.name else Path("posterior.png"))
    for path in (target, recovery):
        check_output(path, PLOT_FORMATS)
    check_distinct(target, recovery)
    tree = read_result(posterior)
    if is_study(tree):
        _write_study_plots(tree, target, recovery)
    elif recovery is not None:
        _complain("--recovery is of studies, which `pirl calibrate --out` writes")
    else:
        _write_plot(as_posterior(tree, posterior), target)
    for path in (target, recovery):
        if path is not None:
            print(f"wrote {path}")


@app.command("compare")
def compare_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.py", help="A model file with demos and mdp among its data.")],
    engine: Annotated[str | None, typer.Option(help="chees, nuts, smc, svi or laplace.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Chains; of smc, populations of particles.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Draws a chain; of smc, particles a population.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up a chain.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the engine, and of which episodes are held out.")] = 0,
    hold_out: Annotated[float, typer.Option(help="Share of the episodes that is held out.")] = 0.25,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the model; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="TABLE.csv", help="Where to write the table; or .tex.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="TABLE.png", help="Where to draw it.")] = None,
    progress: Progress = True,
) -> None:
    """Compare the posterior of a model file with point estimates and cloning, on episodes that are held out."""
    from pirl.compare import against_point_estimates, print_comparison, to_latex

    check_output(out, (".csv", ".tex"))
    check_output(plot, PLOT_FORMATS)
    check_distinct(out, plot)
    file = ModelFile.read(model)
    options = file.options(settings or [])
    arguments = {
        "engine": engine, "num_chains": chains, "num_samples": samples, "num_warmup": warmup,
        "seed": seed, "progress": progress, "num_prior": 0, "num_posterior_predictive": 0,
    }  # fmt: skip
    with _short_warnings():
        table = against_point_estimates(
            file, options, {name: value for name, value in arguments.items() if value is not None}, hold_out, seed
        )
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(to_latex(table) if out.suffix == ".tex" else table.to_csv())
    if plot is not None:
        from pirl.plots import plot_comparison

        figure = plot_comparison(table)
        with replacing(plot) as temporary:
            figure.savefig(temporary, dpi=150)
    print_comparison(table)
    for path in (out, plot):
        if path is not None:
            print(f"wrote {path}")


@app.command("calibrate")
def calibrate_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.py", help="A Python file with model(...) and load(...).")],
    replicates: Annotated[int, typer.Option(min=2, help="Truths, with data and a posterior each.")] = 200,
    draws: Annotated[int, typer.Option(min=1, help="Draws of a posterior that the truth is ranked among.")] = 99,
    engine: Annotated[str | None, typer.Option(help="chees, nuts, smc, svi or laplace.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Chains of a posterior; of smc, populations.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Draws a chain; of smc, particles a population.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up a chain.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Reproduces every replicate.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the model; repeatable.")
    ] = None,
    quantities: Annotated[
        list[str] | None,
        typer.Option("--quantity", metavar="SITE", help="Rank this, which the model records, as well; repeatable."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Replicates that chees samples and saves at once; 1 judges chees itself.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="STUDY.nc", help="Where to write the study.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="RANKS.png", help="Where to draw the ranks.")] = None,
    recovery: Annotated[
        Path | None, typer.Option(metavar="RECOVERY.png", help="Where to draw truths against posteriors.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="STUDY.ckpt", help="Where to save each batch; the same command goes on from there."),
    ] = None,
    progress: Progress = True,
) -> None:
    """Check by simulation that the posteriors of a model file are what they claim to be.

    Parameters are drawn from the prior, data from the model, posteriors by the engine. Sizes are those of a study, and
    not those of the file's defaults. Exit status: 0: no quantity leaves its band (which few replicates can hardly do);
    1: some does, or a replicate failed; 2: wrong input; 3: a crash; 130: Ctrl-C; 143: SIGTERM.
    """
    from pirl.verdicts import print_verdicts, stays_in_bands

    check_output(out)
    for path in (plot, recovery):
        check_output(path, PLOT_FORMATS)
    check_distinct(out, plot, recovery, checkpoint)
    _check_device(device)
    file = ModelFile.read(model)
    arguments = {
        "engine": engine, "num_chains": chains, "num_samples": samples, "num_warmup": warmup, "device": device,
        "num_replicates": replicates, "num_draws": draws, "seed": seed, "progress": progress, "checkpoint": checkpoint,
        "quantities": quantities or None, "batch": batch,
    }  # fmt: skip
    try:
        with _short_warnings():
            study = file.calibrate(
                file.options(settings or []), {name: value for name, value in arguments.items() if value is not None}
            )
    except KeyboardInterrupt as interrupt:
        print(f"pirl: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if study is None:  # the process of another rank has it
        return
    if out is not None:
        write_posterior(study, out)
    print_verdicts(study)
    _write_study_plots(study, plot, recovery)
    for path in (out, plot, recovery):
        if path is not None:
            print(f"wrote {path}")
    if study.attrs["num_replicates"] < replicates:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(int(not stays_in_bands(study)))


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print each warning once, as one line, when it comes."""
    told: set[str] = set()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        line = " ".join(str(message).split())
        if line not in told:
            told.add(line)
            print(f"warning: {line}", file=sys.stderr)

    with warnings.catch_warnings():
        for kind in (CheckpointWarning, ConvergenceWarning, EmptyTrajectoriesWarning, InterruptedWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = show  # put back by catch_warnings
        yield


def _check_device(name: str | None) -> None:
    """Before data are loaded, which may take long."""
    from pirl.setting import own_device

    if name is not None:
        own_device(name)


def _write_study_plots(study: xarray.DataTree, ranks: Path | None, recovery: Path | None) -> None:
    if ranks is None and recovery is None:
        return
    from pirl.plots import plot_ranks, plot_recovery
    from pirl.plots.studies import least_uniform

    for path, draw in ((ranks, plot_ranks), (recovery, plot_recovery)):
        if path is not None:
            figure = draw(study, names=least_uniform(study))
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=150)


def _write_plot(posterior: xarray.DataTree, path: Path) -> None:
    from pirl.plots import plot_posterior

    figure = plot_posterior(posterior)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
