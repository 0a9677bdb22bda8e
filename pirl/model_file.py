"""Model files: Python files with a Pyro program, its data and its words, which the command line runs by their path.

A model file is a Python file with

- ``model(...)``, a Pyro program;
- ``load(**options)``, which returns the named arguments of ``model``; its keyword parameters are what
  ``--set key=value`` sets, of the type that they are annotated with (str, int, float, bool, Path, Literal, or one of
  these or None), or else of that of their defaults;

and, where they help,

- ``coords(...)``, which returns labels by dim;
- ``reference(...)``, which returns published or true values to print beside the posterior, or None:
  ``{"label": "Rust (1987)", "values": {"RC": 10.075}, "standard_errors": {"RC": 1.582}}``. Values have the shape of the
  parameter; standard errors may be missing;
- ``truth(...)``, which returns the true reward ``[S, A]`` or ``[S, 1]`` where it is known, for comparisons;
- ``draw_data(parameters, arguments)``, which draws the data anew, where the model cannot say them forwards: from latent
  sites by name and the model's arguments by name, a dict of those arguments that are data;
- ``dims``, a dict from arguments to the names of their dims;
- ``labels``, a dict from parameters to words and units for figures;
- ``defaults``, arguments of :func:`pirl.fit` that suit the model, and under the name of an engine those for it:
  ``{"engine": "nuts", "nuts": {"dense_mass": True}}``.

``coords``, ``reference`` and ``truth`` are called with those options and arguments that their parameters name.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pirl.calibrate import calibrate
from pirl.errors import OptionError
from pirl.fit import fit
from pirl.replicates import DrawData

if TYPE_CHECKING:
    import xarray

_SIZES = {f"num_{of}" for of in ("chains", "warmup", "samples", "prior", "posterior_predictive")} | {"engine", "thin"}
"""What :func:`pirl.calibrate` decides for itself, since it needs few draws of each of many posteriors."""

_FUNCTIONS = ("coords", "reference", "truth", "draw_data")
_TABLES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dims": (
        lambda dims: isinstance(dims, (tuple, list)) and all(isinstance(dim, str) for dim in dims),
        "names of dims",
    ),
    "labels": (lambda label: isinstance(label, str), "words"),
    "defaults": (lambda value: True, "arguments of pirl.fit"),
}
"""What a file may define beside model and load: functions; and dicts, of what."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class ModelFile:
    """A model file, imported: see the head of this module for what it may define."""

    path: Path
    model: Callable[..., Any]
    load: Callable[..., Mapping[str, Any]]
    title: str = ""
    coords: Callable[..., Mapping[str, Any]] | None = None
    reference: Callable[..., Mapping[str, Any] | None] | None = None
    truth: Callable[..., Any] | None = None
    draw_data: DrawData | None = None
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
        names = ("model", "load", *_FUNCTIONS, *_TABLES)
        found = {name: getattr(module, name) for name in names if getattr(module, name, None) is not None}
        for name in _FUNCTIONS:
            if not callable(found.get(name, cls)):
                raise OptionError(f"{path}: {name} must be a function, not {type(found[name]).__name__}")
        for name, (fits, words) in _TABLES.items():
            table = found.get(name, {})
            if not isinstance(table, Mapping) or not all(isinstance(k, str) and fits(v) for k, v in table.items()):
                raise OptionError(f"{path}: {name} must be a dict from names to {words}")
        return cls(path, title=((module.__doc__ or "").strip() or path.stem).splitlines()[0], **found)

    def options(self, settings: list[str]) -> dict[str, Any]:
        """All options of ``load``: its defaults, and what ``key=value`` texts say, converted to the annotated types.

        Raises:
            OptionError: an unknown key, a value of another type, or a missing one; names the keys.
        """
        try:
            hints = typing.get_type_hints(self.load)
        except (NameError, SyntaxError, TypeError) as error:
            raise OptionError(f"{self.path}: the annotations of load() cannot be read: {error}") from None
        every = inspect.signature(self.load).parameters
        plain = {name: type(one.default) for name, one in every.items() if type(one.default) in (bool, int, float)}
        hints = {**plain, **hints}
        if any(one.kind is one.POSITIONAL_ONLY and one.default is one.empty for one in every.values()):
            raise OptionError(f"{self.path}: load() must take its options by name: leave out the /")
        parameters = {name: one for name, one in every.items() if one.kind in _NAMED}
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

    def arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What ``load`` returns: the named arguments of the model.

        Raises:
            OptionError: they are no dict, or do not fit the model.
        """
        result: Any = self.load(**options)
        if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
            kind = type(result).__name__
            raise OptionError(f"{self.path}: load() must return a dict of the named arguments of model(), not a {kind}")
        loaded = dict(result)
        try:
            inspect.signature(self.model).bind(**loaded)
        except TypeError as error:
            raise OptionError(f"{self.path}: what load() returns does not fit model(): {error}") from None
        return loaded

    def known_truth(self, known: Mapping[str, Any]) -> Any:
        """The true reward, or None."""
        return self._called("truth", known)

    def fit(
        self, options: Mapping[str, Any], arguments: Mapping[str, Any], loaded: Mapping[str, Any] | None = None
    ) -> xarray.DataTree | None:
        """Load (unless ``loaded``), fit, and note in the posterior what was fitted, its labels and reference values.

        None in a process of several that does not lead them.
        """
        loaded = self.arguments(options) if loaded is None else loaded
        known = {**options, **loaded}
        engine, own = self._suited(arguments.get("engine"))
        coords, reference = self._labels(known), self._published(known)
        posterior = fit(
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

    def calibrate(self, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> xarray.DataTree | None:
        """Load, and study the calibration of the model, with the plan of its demonstrations.

        None in a process of several that does not lead them.
        """
        loaded = self.arguments(options)
        engine, own = self._suited(arguments.get("engine"))
        own = {name: value for name, value in own.items() if name not in _SIZES}
        coords = self._labels({**options, **loaded})
        kept = {"draw_data": self.draw_data, "dims": self.dims, "coords": coords, **own, **arguments, "engine": engine}
        study = calibrate(self.model, model_kwargs=loaded, **kept)
        if study is not None:
            study.attrs |= {"model": self.path.stem, "title": self.title, "options": json.dumps(options, default=str)}
        return study

    def _suited(self, engine: str | None) -> tuple[str, dict[str, Any]]:
        """The engine, unless given, and the arguments that suit the model with it."""
        engine = engine or self.defaults.get("engine", "chees")
        own = {name: value for name, value in self.defaults.items() if not isinstance(value, Mapping)}
        for_engine = self.defaults.get(engine, {})
        if not isinstance(for_engine, Mapping):
            raise OptionError(f"{self.path}: {engine} among defaults must be a dict of that engine's options")
        own |= for_engine
        for name, value in own.items():
            if name.startswith("num_") and (not isinstance(value, int) or value < 0):
                raise OptionError(
                    f"{self.path}: {name} among defaults is {value!r}, but must be a whole number from 0 on"
                )
        return engine, own

    def _labels(self, known: Mapping[str, Any]) -> Mapping[str, Any]:
        """What ``coords`` returns."""
        coords = self._called("coords", known) or {}
        if not isinstance(coords, Mapping) or not all(_is_listed(labels) for labels in coords.values()):
            raise OptionError(f"{self.path}: coords() must return a dict from dims to lists of labels")
        return coords

    def _published(self, known: Mapping[str, Any]) -> dict[str, Any] | None:
        """What ``reference`` returns, as JSON can keep it."""
        reference = self._called("reference", known)
        if reference is None:
            return None
        try:
            numbers = {
                kind: {str(name): _numbers(value) for name, value in reference.get(kind, {}).items()}
                for kind in ("values", "standard_errors")
            }
            return {"label": str(reference["label"]), **numbers}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OptionError(
                f"{self.path}: reference() must return {{'label': text, 'values': {{name: numbers}}}}, and perhaps "
                f"'standard_errors' like 'values', or None: {type(error).__name__} {error}"
            ) from None

    def _called(self, name: str, known: Mapping[str, Any]) -> Any:
        """Call a function of the file with what its parameters name; those with a default may be unknown."""
        function = getattr(self, name)
        if function is None:
            return None
        parameters = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return function(**known)
        arguments = {parameter.name: known[parameter.name] for parameter in parameters if parameter.name in known}
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise OptionError(
                f"{self.path}: {name}() can be called with {', '.join(known) or 'nothing'}: {error}"
            ) from None
        return function(**arguments)


def _numbers(value: Any) -> Any:
    array = np.asarray(value, dtype=float)
    if array.size == 0:
        raise ValueError("no numbers")
    return array.tolist()


def _is_listed(labels: Any) -> bool:
    return hasattr(labels, "__len__") and hasattr(labels, "__iter__") and not isinstance(labels, str)


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
