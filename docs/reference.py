"""Builds the API reference from the docstrings: ``python -m docs.reference [FOLDER]``, or ``make docs``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pirl
import pirl.infer

INTERNAL = {
    # Rooms whose public names are those that `pirl` itself exports.
    "pirl.continuous", "pirl.distributions", "pirl.fit", "pirl.mdp", "pirl.pool", "pirl.rewards", "pirl.sampled",
    "pirl.trajectories",
    # What the rooms are built from.
    "pirl.backups", "pirl.cli", "pirl.convergence", "pirl.gaussian_integrals", "pirl.model_file", "pirl.soft_values",
    "pirl.stationary", "pirl.statistics", "pirl.summary", "pirl.transitions",
    "pirl.infer.adaptation", "pirl.infer.batched", "pirl.infer.checkpoint", "pirl.infer.datatree", "pirl.infer.engine",
    "pirl.infer.ensemble", "pirl.infer.hmc", "pirl.infer.importance", "pirl.infer.memory", "pirl.infer.population",
    "pirl.infer.potential", "pirl.infer.progress", "pirl.infer.ranks", "pirl.infer.recorded", "pirl.infer.sampling",
    "pirl.infer.start",
}  # fmt: skip
"""Modules without a page of their own. Every other one is public, and so is each of its names."""

_WHOLE = ("pirl.baselines", "pirl.diagnose", "pirl.learning", "pirl.metrics", "pirl.plots")
"""Packages that are public by their own names, whatever file these stand in."""


def public_modules() -> list[ModuleType]:
    """Every module that has a page, the package itself first."""
    found = [module.name for module in pkgutil.walk_packages(pirl.__path__, "pirl.")]
    inner = tuple(f"{package}." for package in _WHOLE)
    hidden = [name for name in found if "._" in name or name.startswith(inner) or name in INTERNAL]
    return [pirl, *(importlib.import_module(name) for name in sorted(set(found) - set(hidden)))]


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes of a module: those in ``__all__``, or else those that it defines without underscore.

    An engine's public face is its ``run``.
    """
    engine = module.__name__ in pirl.infer.ENGINES.values()
    for name in ("run",) if engine else getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        own = hasattr(module, "__all__") or getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value
