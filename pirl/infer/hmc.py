"""One Hamiltonian Monte Carlo transition of many chains with one step size, number of steps and mass matrix.

Positions z are whitened by a factor F of the posterior's covariance, z = F y, so that the mass matrix of y is the
identity: leapfrog steps and distances are those of y, and only the two products with F tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.infer.engine import laid_out

DIVERGENT = 1000.0
"""Growth of the energy within a trajectory beyond which the integrator has left the posterior (as in Stan)."""

Target = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(points ``[B, D]``, temperatures ``[B]``) -> (U, gradient, log-likelihood)."""


@dataclass(frozen=True)
class Metric:
    """A factor F of the covariance that moves are adapted to: lower triangular ``[D, D]``, or diagonal ``[D]``."""

    factor: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", laid_out(self.factor))

    def diagonal(self) -> Metric:
        """Without correlations: the standard deviations."""
        return self if self.factor.dim() == 1 else Metric(self.factor.square().sum(1).sqrt())

    def unwhiten(self, y: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """``F y`` of each row."""
        return y * self.factor if self.factor.dim() == 1 else y @ self.factor.mT

    def pull(self, gradient: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Gradient with respect to y of one with respect to z: ``F' g`` of each row."""
        return gradient * self.factor if self.factor.dim() == 1 else gradient @ self.factor

    def whiten(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """``F^-1 z`` of each row."""
        if self.factor.dim() == 1:
            return z / self.factor
        return torch.linalg.solve_triangular(self.factor, z.mT, upper=False).mT


@dataclass(frozen=True)
class Phase:
    """Where chains are: positions ``[B, D]``, potential ``[B]``, its gradient, log-likelihood ``[B]``, temperature."""

    z: Float[Tensor, "B D"]
    energy: Float[Tensor, " B"]
    gradient: Float[Tensor, "B D"]
    log_likelihood: Float[Tensor, " B"]
    temperature: Float[Tensor, " B"]

    @classmethod
    def at(cls, z: Tensor, temperature: Tensor, target: Target) -> Phase:
        """Evaluate the target at ``z``."""
        energy, gradient, log_likelihood = target(z, temperature)
        return cls(z, energy, gradient, log_likelihood, temperature)


@dataclass(frozen=True)
class Transition:
    """What became of each chain.

    Args:
        phase: where it is now.
        proposal: where its trajectory ended, ``[B, D]``, and ``velocity`` there, in whitened units.
        acceptance: probability with which the end was taken; 0 where the target was not finite.
        hamiltonian: potential and kinetic energy of where it is now.
        diverging: the energy grew by more than 1000, or was not finite.
    """

    phase: Phase
    proposal: Float[Tensor, "B D"]
    velocity: Float[Tensor, "B D"]
    acceptance: Float[Tensor, " B"]
    hamiltonian: Float[Tensor, " B"]
    diverging: Float[Tensor, " B"]


def transition(
    target: Target,
    phase: Phase,
    metric: Metric,
    step_size: Float[Tensor, " B"],
    num_steps: int,
    momentum: Float[Tensor, "B D"],
    log_uniform: Float[Tensor, " B"],
) -> Transition:
    """Follow Hamilton's equations for ``num_steps`` leapfrog steps, then accept or stay (Duane et al. 1987).

    Args:
        momentum: standard normal numbers, whitened momenta at the start.
        log_uniform: logarithm of uniform numbers that decide on acceptance.
    """
    eps = step_size[:, None]
    end, velocity = phase, momentum - 0.5 * eps * metric.pull(phase.gradient)
    for step in range(num_steps):
        end = Phase.at(end.z + eps * metric.unwhiten(velocity), phase.temperature, target)
        last = step == num_steps - 1
        velocity = velocity - (0.5 if last else 1.0) * eps * metric.pull(end.gradient)
    before = phase.energy + 0.5 * momentum.square().sum(-1)
    after = end.energy + 0.5 * velocity.square().sum(-1)
    growth = torch.where(after.isfinite() & end.gradient.isfinite().all(-1), after - before, torch.inf)
    growth = growth.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    moves = log_uniform < -growth
    chosen = Phase(
        torch.where(moves[:, None], end.z, phase.z),
        torch.where(moves, end.energy, phase.energy),
        torch.where(moves[:, None], end.gradient, phase.gradient),
        torch.where(moves, end.log_likelihood, phase.log_likelihood),
        phase.temperature,
    )
    return Transition(
        chosen,
        proposal=end.z,
        velocity=velocity,
        acceptance=(-growth).exp().clamp(max=1.0),
        hamiltonian=torch.where(moves, after, before),
        diverging=(growth > DIVERGENT).to(growth.dtype),
    )
