"""A study whose exact posterior is known, and an engine that draws from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from pirl.infer import Potential
from pirl.infer.engine import Draws

module = sys.modules["pirl.calibrate"]  # whose name the function has

SCALE = 0.5

DATA = torch.zeros(4, dtype=torch.float64)


def normal(data: Tensor) -> None:
    """One mean, four measurements: the posterior is normal, with mean sum / (4 + SCALE^2) and known sd."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("item", len(data)):
        pyro.sample("x", dist.Normal(mu, SCALE), obs=data)


def exact(shift: float = 0.0, width: float = 1.0, blind: bool = False) -> Callable[..., Draws]:
    """An engine for :func:`normal`: independent draws of its posterior, spoilt as asked."""

    def run(potential: Potential, *, num_chains: int, num_warmup: int, num_samples: int, seed: int, **_: Any) -> Draws:
        observed = potential.sites["x"].value
        assert observed is not None
        precision = 1 + len(observed) / SCALE**2
        mean, sd = observed.sum() / SCALE**2 / precision, precision**-0.5
        if blind:
            mean, sd = torch.tensor(0.0), 1.0
        noise = torch.randn(num_chains, num_samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Draws({"mu": mean + shift * sd + width * sd * noise}, unconstrained=True)

    return run


def study(monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Draws], **options: Any) -> Any:
    monkeypatch.setattr(module, "get_engine", lambda name: engine)
    given: dict[str, Any] = {"num_replicates": 200, "engine": "laplace", "progress": False, **options}
    return pirl.calibrate(normal, DATA, **given)
