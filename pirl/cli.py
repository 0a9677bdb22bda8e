"""The command line: ``pirl fit MODEL.py``, and ``pirl summary``, ``diagnose`` and ``plot`` of its ``posterior.nc``.

A model file is a Python file with

- ``model(...)``, a Pyro program;
- ``load(**options)``, which returns the named arguments of ``model``; its annotated keyword parameters (str, int,
  float, bool, Path, Literal, or one of these or None) are what ``--set key=value`` sets;

and, where they help,

- ``coords(...)``, which returns labels by dim;
- ``reference(...)``, which returns published or true values to print beside the posterior, or None:
  ``{"label": "Rust (1987)", "values": {"RC": 10.075}, "standard_errors": {"RC": 1.582}}``. Values have the shape of the
  parameter; standard errors may be missing;
- ``dims``, a dict from arguments to the names of their dims;
- ``labels``, a dict from parameters to words and units for figures;
- ``defaults``, arguments of :func:`pirl.fit` that suit the model, and under the name of an engine those for it:
  ``{"engine": "nuts", "nuts": {"full_mass": True}}``.

``coords`` and ``reference`` are called with those options and arguments that their parameters name.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pirl.diagnose import print_diagnosis
from pirl.errors import (
    CheckpointWarning,
    ConvergenceWarning,
    InterruptedWarning,
    OptionError,
    PirlError,
    PosteriorFileError,
)
from pirl.summary import print_summary

if TYPE_CHECKING:
    import xarray

PLOT_FORMATS = (".png", ".pdf", ".svg", ".jpg")
INTERRUPTED = 130
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class _Commands(TyperGroup):
    """Errors of use become one line on stderr and exit status 2; any other error is a bug and keeps its traceback."""

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
                raise
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


@app.command("fit")
def fit_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.py", help="A Python file with model(...) and load(...).")],
    engine: Annotated[str | None, typer.Option(help="chees, nuts, smc, svi or laplace.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Number of chains.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Draws a chain.")] = None,
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
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Draw a bar on a terminal.")] = True,
) -> None:
    """Infer the posterior of a model file, print its summary, and keep it.

    Ctrl-C while it samples keeps the draws so far; the exit status is then 130.
    """
    _check_output(out)
    _check_output(plot, PLOT_FORMATS)
    file = ModelFile.read(model)
    options = file.options(settings or [])
    arguments = {
        "engine": engine, "num_chains": chains, "num_samples": samples, "num_warmup": warmup,
        "device": _device(device), "seed": seed, "progress": progress, "checkpoint": checkpoint,
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
    """Print the table of a posterior file: estimates, how far to trust them, and reference values beside."""
    print_summary(read_posterior(posterior))


@app.command("diagnose")
def diagnose_command(posterior: PosteriorPath) -> None:
    """Say what is wrong with a posterior file and what to try; exit status 1 if something is."""
    findings = print_diagnosis(read_posterior(posterior))
    raise typer.Exit(int(any(finding.severity == "problem" for finding in findings)))


@app.command("plot")
def plot_command(
    posterior: PosteriorPath,
    out: Annotated[Path | None, typer.Option(metavar="POSTERIOR.png", help="By default beside the posterior.")] = None,
) -> None:
    """Draw the posterior distributions of a posterior file, with reference values."""
    target = out or posterior.with_suffix(".png")
    _check_output(target, PLOT_FORMATS)
    _write_plot(read_posterior(posterior), target)
    print(f"wrote {target}")


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
        for kind in (CheckpointWarning, ConvergenceWarning, InterruptedWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = show  # put back by catch_warnings
        yield


# ------------------------------------------------------------------------------------------------------- model files


@dataclass(frozen=True)
class ModelFile:
    """A model file, imported: see the head of this module for what it may define."""

    path: Path
    model: Callable[..., Any]
    load: Callable[..., Mapping[str, Any]]
    title: str = ""
    coords: Callable[..., Mapping[str, Any]] | None = None
    reference: Callable[..., Mapping[str, Any] | None] | None = None
    dims: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> ModelFile:
        """Import a model file by its path.

        Raises:
            OptionError: there is no such file, it is not Python, or it lacks ``model`` or ``load``.
        """
        if path.suffix != ".py" or not path.is_file():
            problem = "is not a file" if not path.is_file() else "does not end in .py"
            raise OptionError(f"{path} {problem}: give the path of a model file, such as models/bus_engine.py")
        name = f"pirl_model_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        # Registered, as dataclasses and pickles look their module up; under a name that shadows nothing.
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise OptionError(f"{path} is not Python: {error.msg} in line {error.lineno}") from None
        for needed in ("model", "load"):
            if not callable(getattr(module, needed, None)):
                raise OptionError(
                    f"{path} has no function {needed}(...): a model file defines model(...) and load(...)"
                )
        names = ("model", "load", "coords", "reference", "dims", "labels", "defaults")
        found = {name: getattr(module, name) for name in names if getattr(module, name, None) is not None}
        return cls(path, title=(module.__doc__ or path.stem).strip().splitlines()[0], **found)

    def options(self, settings: list[str]) -> dict[str, Any]:
        """All options of ``load``: its defaults, and what ``key=value`` texts say, converted to the annotated types.

        Raises:
            OptionError: an unknown key, a value of another type, or a missing one; names the keys.
        """
        hints = typing.get_type_hints(self.load)
        parameters = inspect.signature(self.load).parameters
        known = ", ".join(f"{name} ({_words(hints.get(name, str))})" for name in parameters) or "none"
        given = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or key not in parameters:
                problem = f"has no option {key!r}" if equals else f"needs --set KEY=VALUE, not {setting!r}"
                raise OptionError(f"{self.path} {problem}; its options are {known}")
            try:
                given[key] = _converted(text, hints.get(key, str))
            except ValueError:
                raise OptionError(f"--set {setting}: {key} must be {_words(hints.get(key, str))}") from None
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        options = {**defaults, **given}
        for name, value in options.items():
            if value is inspect.Parameter.empty:
                raise OptionError(
                    f"{self.path} needs --set {name}=VALUE, where {name} is {_words(hints.get(name, str))}"
                )
        return options

    def fit(self, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> xarray.DataTree | None:
        """Load, fit, and note in the posterior what was fitted, its labels and the reference values.

        None in a process of several that does not lead them.
        """
        import pirl

        loaded = dict(self.load(**options))
        try:
            inspect.signature(self.model).bind(**loaded)
        except TypeError as error:
            raise OptionError(f"{self.path}: what load() returns does not fit model(): {error}") from None
        known = {**options, **loaded}
        engine = arguments.get("engine", self.defaults.get("engine", "chees"))
        own = {name: value for name, value in self.defaults.items() if not isinstance(value, Mapping)}
        own |= self.defaults.get(engine, {})
        coords = _called(self.coords, known) or {}
        reference = _called(self.reference, known)
        posterior = pirl.fit(
            self.model,
            model_kwargs=loaded,
            **{"coords": coords, "dims": self.dims, **own, **arguments, "engine": engine},
        )
        if posterior is None:
            return None
        posterior.attrs |= {"model": self.path.stem, "title": self.title, "options": json.dumps(options, default=str)}
        if reference is not None:
            posterior.attrs["reference"] = json.dumps(reference)
        for name, label in self.labels.items():
            if name in posterior["posterior"]:
                posterior["posterior"][name].attrs["long_name"] = label
        return posterior


def _called(function: Callable[..., Any] | None, known: Mapping[str, Any]) -> Any:
    """Call with what its parameters name; parameters with a default may be unknown."""
    if function is None:
        return None
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function(**known)
    return function(**{parameter.name: known[parameter.name] for parameter in parameters if parameter.name in known})


def _converted(text: str, hint: Any) -> Any:
    """Convert a text to an annotated type; ValueError where it does not fit."""
    if typing.get_origin(hint) is typing.Literal:
        fitting = [value for value in typing.get_args(hint) if str(value) == text]
        if not fitting:
            raise ValueError
        return fitting[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) < len(typing.get_args(hint)) and text.lower() == "none":
            return None
        return _converted(text, kinds[0])
    if hint is bool:
        if text.lower() not in TRUE + FALSE:
            raise ValueError
        return text.lower() in TRUE
    return hint(text)


def _words(hint: Any) -> str:
    """A type in words, for messages."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("none" if kind is type(None) else _words(kind) for kind in typing.get_args(hint))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _device(name: str | None) -> str | None:
    import torch

    try:
        if name is not None:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return name


# ---------------------------------------------------------------------------------------------------- files in and out


def _check_output(path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse what could not be written, before anything is computed."""
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise OptionError(f"{path} cannot be written: there is no folder {folder}; make it first")
    if path.is_dir() or not os.access(folder, os.W_OK):
        problem = "it is a folder" if path.is_dir() else f"folder {folder} is read-only"
        raise OptionError(f"{path} cannot be written: {problem}; name another file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise OptionError(f"{path} has no known image format: let its name end in {', '.join(suffixes)}")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, renamed to ``path`` when all went well: never half a file."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_posterior(posterior: xarray.DataTree, path: Path) -> None:
    """Write a posterior to a netCDF file, compressed; what was there before stays until all is written."""
    encoding = {
        group.path: {name: {"zlib": True, "complevel": 1} for name, data in group.data_vars.items() if data.size > 1000}
        for group in posterior.subtree
        if group.data_vars
    }
    with _replacing(path) as temporary:
        posterior.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)


def read_posterior(path: Path) -> xarray.DataTree:
    """Read a posterior file into memory.

    Raises:
        PosteriorFileError: there is no such file, or it is not one that pirl wrote.
    """
    import xarray

    if not path.is_file():
        raise PosteriorFileError(f"{path} is not a file: give one that `pirl fit MODEL.py --out` wrote")
    try:
        with xarray.open_datatree(path, engine="h5netcdf") as tree:
            posterior = tree.load()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError):
        raise PosteriorFileError(
            f"{path} is damaged, or not a netCDF file: give one that `pirl fit --out` wrote"
        ) from None
    if posterior.attrs.get("inference_library") != "pirl" or "posterior" not in posterior.children:
        raise PosteriorFileError(f"{path} is not a posterior of pirl: give one that `pirl fit --out` wrote")
    return posterior


def _write_plot(posterior: xarray.DataTree, path: Path) -> None:
    from pirl.plots import plot_posterior

    figure = plot_posterior(posterior)
    with _replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
