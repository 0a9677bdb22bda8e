"""Where engines start: a point of unconstrained space at which the model has a density and a slope."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pirl.errors import NonFiniteError, OptionError
from pirl.infer.potential import Potential, Values

START_ATTEMPTS = 100


def guarded(potential: Callable[[Values], Tensor]) -> Callable[[Values], Tensor]:
    """Give NaN where a draw has no density: one bad proposal is a divergence, not the end of the run."""

    def energy(z: Values) -> Tensor:
        try:
            value = potential(z)
        except (ArithmeticError, torch.linalg.LinAlgError):
            return sum(x.sum() for x in z.values()) * math.nan  # type: ignore[return-value]
        return value if value > -math.inf else value * math.nan

    return energy


def find_start(potential: Potential, init: str | Mapping[str, Tensor]) -> Values:
    """Find a point of unconstrained space whose log density and gradient are finite.

    Args:
        init: "uniform" (each coordinate uniform on (-2, 2)), "prior" (a draw from the prior), or values of all latent
            sites, in the constrained space, to start at.

    Raises:
        NonFiniteError: there is none among 100 candidates; names the site.
    """
    if isinstance(init, str) and init not in ("uniform", "prior"):
        raise OptionError(
            f"init={init!r} is not known: use 'uniform', 'prior', or a dict of values of all latent sites"
        )
    energy = guarded(potential)
    for _ in range(START_ATTEMPTS if isinstance(init, str) else 1):
        if not isinstance(init, str):
            z = potential.unconstrain(init)
        elif init == "prior":
            z = potential.prior_draw()
        else:
            z = {name: torch.empty(s.unconstrained_shape).uniform_(-2.0, 2.0) for name, s in potential.latent.items()}
        leaves = {name: value.detach().clone().requires_grad_() for name, value in z.items()}
        value = energy(leaves)
        if torch.isfinite(value):
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            if all(slope is None or torch.isfinite(slope).all() for slope in slopes):
                return {name: leaf.detach() for name, leaf in leaves.items()}
    raise NonFiniteError(
        f"no start among {START_ATTEMPTS if isinstance(init, str) else 1} has a finite log density and gradient: "
        f"{potential.culprit(z)}"
    )
