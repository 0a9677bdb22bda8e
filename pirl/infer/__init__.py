"""Inference engines: any Pyro model with continuous latent sites in, posterior draws out. Knows no decision problem.

Each engine is a function ``run(potential, *, num_chains, num_warmup, num_samples, seed, progress, **options)``, which
returns :class:`~pirl.infer.engine.Draws`; its further keyword arguments are its options. Samplers also take ``thin``,
``checkpoint`` and ``ranks``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from pirl.errors import OptionError
from pirl.infer.engine import Draws
from pirl.infer.potential import Potential

ENGINES = {
    "chees": "pirl.infer.chees",
    "nuts": "pirl.infer.nuts",
    "smc": "pirl.infer.smc",
    "svi": "pirl.infer.svi",
    "laplace": "pirl.infer.laplace",
}
"""Name of an engine -> the module that has its ``run``, imported when it is asked for."""


def get_engine(name: str) -> Callable[..., Draws]:
    """Return the ``run`` function of an engine by its name.

    Raises:
        OptionError: there is no engine of that name.

    Example:
        >>> get_engine("laplace").__module__
        'pirl.infer.laplace'
    """
    if name not in ENGINES:
        raise OptionError(f"there is no engine {name!r}; the engines are {', '.join(sorted(ENGINES))}")
    return import_module(ENGINES[name]).run


def __getattr__(name: str) -> ModuleType:
    """An engine's module by its name, imported when first asked for: ``help(pirl.infer.nuts.run)``."""
    if name not in ENGINES:
        raise AttributeError(f"module 'pirl.infer' has no attribute {name!r}")
    return import_module(ENGINES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *ENGINES})


__all__ = ["ENGINES", "Draws", "Potential", "get_engine"]
