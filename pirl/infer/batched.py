"""The potential of many chains at once: U and its gradient at flat vectors ``[B, D]``, by ``torch.func.vmap``."""

from __future__ import annotations

import textwrap
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import ModelError, first_line
from pirl.infer.potential import Potential
from pirl.infer.recorded import record as record_function
from pirl.infer.user_errors import NO_DENSITY, place_of

Evaluation = tuple[Float[Tensor, " B"], Float[Tensor, "B D"], Float[Tensor, " B"]]
"""U, its gradient, and the log-likelihood."""

MOST_QUOTED = 160
"""Characters of torch's own message: its first sentence says what happened."""

ADVICE = (
    ("data-dependent control flow", "choose between values with torch.where, not with if"),
    (".item()", "keep parameters as tensors: no float(), int(), .item(), nor if on a parameter"),
    ("inplace", "write no values into existing tensors (x[0] = y): use torch.stack, torch.cat or torch.where"),
    ("randomness", "draw no random numbers but with pyro.sample"),
    ("numpy", "use torch, not numpy, on what depends on a parameter"),
)


class BatchedPotential:
    """U, its gradient and the log-likelihood of ``width`` chains, each at its own point and temperature.

    At temperature b the potential is ``-(log prior + log |Jacobian| + b log likelihood)``; at 1 it is the posterior's.
    A chain whose density does not exist gets NaN, alone.

    Args:
        potential: of a model that vmaps, unless ``loop``.
        probes: two points ``[2, D]`` of positive density: the batched evaluation is recorded at the first and compared
            with the plain one at both.
        width: number of chains of a call; fewer are padded.
        record: run the model's Python once and repeat its tensor operations, where the model allows it.
        loop: evaluate chains one by one: for models that do not vmap, and many times slower.

    Raises:
        ModelError: the model does not vmap; says what to change.
    """

    def __init__(
        self,
        potential: Potential,
        probes: Float[Tensor, "2 D"],
        width: int,
        record: bool = True,
        loop: bool = False,
    ) -> None:
        self.potential, self.width, self.loop = potential, width, loop
        self._python = threading.Lock()  # Pyro runs one model at a time
        self._mapped = torch.func.vmap(self._one)
        self._graph: Callable[..., Any] | None = None
        if loop:
            return
        order = torch.arange(width, device=probes.device) % 2
        points, others = probes[order], probes.flip(0)[order]
        heat = torch.ones(width, dtype=probes.dtype, device=probes.device)
        self._check(points, heat)
        if record:
            mapped = lambda x, b: self._mapped(x, b)  # noqa: E731 - the recorder counts arguments, and self as one
            self._graph = record_function(mapped, (points, heat), (others, 0.5 * heat))

    @property
    def recorded(self) -> bool:
        """Whether calls repeat recorded operations; only then may several threads call at once."""
        return self._graph is not None

    def _one(self, vector: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def energy(x: Tensor) -> tuple[Tensor, Tensor]:
            log_prior, log_likelihood = self.potential.parts(self.potential.unflatten(x))
            return -(log_prior + temperature * log_likelihood), log_likelihood

        slope, (value, log_likelihood) = torch.func.grad_and_value(energy, has_aux=True)(vector)
        return value, slope, log_likelihood

    def __call__(self, vectors: Float[Tensor, "B D"], temperature: Float[Tensor, " B"] | None = None) -> Evaluation:
        """Evaluate at up to ``width`` points; NaN where there is no density."""
        count, width = len(vectors), self.width
        heat = torch.ones_like(vectors[:, 0]) if temperature is None else temperature
        if count < width:  # the same shapes give the same bits, and fit the recording
            vectors = torch.cat([vectors, vectors[-1:].expand(width - count, -1)])
            heat = torch.cat([heat, heat[-1:].expand(width - count)])
        with torch.no_grad():
            value, slope, log_likelihood = self._evaluate(vectors, heat)
        # An infinite density attracts a chain for ever.
        value = torch.where(value > -torch.inf, value, torch.nan)
        return value[:count], slope[:count], log_likelihood[:count]

    def _evaluate(self, vectors: Tensor, heat: Tensor) -> Any:
        try:
            return self._each(vectors, heat) if self.loop else (self._graph or self._mapped)(vectors, heat)
        except NO_DENSITY:  # of one chain, but all were evaluated together
            with self._python:
                return self._each(vectors, heat)

    def _each(self, vectors: Tensor, heat: Tensor) -> Any:
        rows = []
        for vector, temperature in zip(vectors, heat, strict=True):
            with torch.enable_grad():
                leaf = vector.detach().clone().requires_grad_()
                try:
                    log_prior, log_likelihood = self.potential.parts(self.potential.unflatten(leaf))
                    value = torch.as_tensor(-(log_prior + temperature * log_likelihood))
                    (slope,) = torch.autograd.grad(value, leaf)
                    rows.append((value.detach(), slope, torch.as_tensor(log_likelihood).detach()))
                except NO_DENSITY:
                    nan = torch.full_like(vector, torch.nan)
                    rows.append((nan.sum(), nan, nan.sum()))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _check(self, points: Tensor, heat: Tensor) -> None:
        """Refuse a model that does not vmap, or that gives other numbers when it does."""
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                batched = self._mapped(points, heat)
        except Exception as error:
            raise ModelError(f"the model cannot evaluate many chains at once{_explain(error)}") from error
        single = self._each(points[:2], heat[:2])
        tolerance = torch.finfo(points.dtype).eps ** 0.6
        for name, ours, plain in zip(("log density", "gradient", "log-likelihood"), batched, single, strict=True):
            if not torch.allclose(ours[: len(plain)], plain, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise ModelError(
                    f"the model gives another {name} for many chains at once than for one: a reduction or a reshape "
                    "mixes chains; give dims counted from the right (dim=-1), or use loop=True"
                )


def _explain(error: Exception) -> str:
    """What stopped the vectorised evaluation, where in the user's code, and what to write instead."""
    reason = textwrap.shorten(first_line(error), MOST_QUOTED, placeholder=" ...")
    advice = next((text for mark, text in ADVICE if mark in str(error)), "use torch operations that vmap")
    return f"{place_of(error)}: {advice}; or use loop=True, which evaluates chains one by one (torch says: {reason})"
