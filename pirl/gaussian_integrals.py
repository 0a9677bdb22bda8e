"""Quadratic functions under Gaussian laws: the integrals, kernels and noises that linear-Gaussian problems are made of.

With W = LL', G = I + L'ML = XX' (Cholesky) and F = L X^-T,

    log E_{x ~ N(m, W)} exp(-1/2 x'Mx + h'x) = -1/2 m'(M - MFF'M)m + (h - MFF'h)'m + 1/2 |F'h|^2 - 1/2 log |G|,

and x under that weight is N(m + FF'(h - Mm), FF'). No covariance is inverted, so W may be singular; the integral is
infinite where G is not positive.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import (
    DivergenceError,
    HorizonError,
    ImpossibleTransitionError,
    InvalidMDPError,
    InvalidPolicyError,
    check_generator,
    counted,
)
from pirl.message_passing import is_checked

Generator = torch.Generator | None


class Quadratic(NamedTuple):
    """-1/2 x'Mx + h'x + g: a function of vectors x. Leading dimensions of the coefficients are a batch."""

    matrix: Float[Tensor, "... d d"]
    """M, symmetric."""
    vector: Float[Tensor, "... d"]
    """h."""
    constant: Float[Tensor, "..."]
    """g."""

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """Values at x; leading dimensions broadcast against the batch."""
        return (x * (self.vector - 0.5 * times(self.matrix, x))).sum(-1) + self.constant

    def after(self, map: Float[Tensor, "d e"]) -> Quadratic:
        """y -> self(map @ y)."""
        return Quadratic(map.mT @ self.matrix @ map, times(map.mT, self.vector), self.constant)

    def plus(self, other: Quadratic) -> Quadratic:
        """The sum of two functions."""
        return Quadratic(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def at(self, step: int) -> Quadratic:
        """One time of coefficients ``[*batch, T, ...]``."""
        return Quadratic(self.matrix[..., step, :, :], self.vector[..., step, :], self.constant[..., step])

    def timed(self) -> Quadratic:
        """The same function at every time, against x ``[*batch, T, d]``."""
        return Quadratic(self.matrix.unsqueeze(-3), self.vector.unsqueeze(-2), self.constant.unsqueeze(-1))


class GaussianKernel(NamedTuple):
    """y ~ N(gain_t x + offset_t, factor_t factor_t') at each time t; of actions given states, a policy to roll out."""

    gain: Float[Tensor, "*batch T dy dx"]
    offset: Float[Tensor, "*batch T dy"]
    factor: Float[Tensor, "*batch T dy dz"]

    def __repr__(self) -> str:
        steps, to, of = self.gain.shape[-3:]
        return f"GaussianKernel({of} to {to} coordinates, {counted(steps, 'step')})"

    def sample(self, x: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Draws ``[*n, dy]`` given x ``[*n, dx]`` at one time (from 0)."""
        gain, offset, factor = self._at(step, x)
        mean = times(gain, x) + offset
        return mean + times(factor, standard_normal((*mean.shape[:-1], factor.shape[-1]), mean, generator))

    def log_prob(self, x: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        """Log density ``[*n]`` at one time, or of all times ``[*n, T, dx]`` (None); the factor must be invertible."""
        gain, offset, factor = self._at(step, x)
        z = times(torch.linalg.inv(factor), y - times(gain, x) - offset)
        return _log_standard(z) - torch.linalg.slogdet(factor).logabsdet

    def _at(self, step: int | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dtype != self.gain.dtype or x.shape[-1:] != self.gain.shape[-1:]:
            raise InvalidPolicyError(
                f"a linear-Gaussian law of {self.gain.dtype} and vectors of size {self.gain.shape[-1]} was given "
                f"states {x.dtype} {tuple(x.shape)}: make it of the simulator's dtype, or the simulator of the "
                "policy's, and of its size (num_state_dims)"
            )
        if step is not None and step >= self.gain.shape[-3]:
            raise HorizonError(
                f"the policy has {self.gain.shape[-3]} steps, but step {step} was asked for (they count from 0)"
            )
        if step is None:
            return self.gain, self.offset, self.factor
        return self.gain[..., step, :, :], self.offset[..., step, :], self.factor[..., step, :, :]


class Noise(NamedTuple):
    """N(0, LL'), which has a density where L has full rank."""

    factor: Float[Tensor, "d d"]
    """L."""
    inverse: Float[Tensor, "d d"]
    """Its pseudo-inverse."""
    full: bool

    @classmethod
    def of(cls, covariance: Float[Tensor, "d d"]) -> Noise:
        """L by eigenvalues: a covariance may be singular."""
        factor = _factor(covariance)
        return cls(factor, torch.linalg.pinv(factor), bool((factor != 0).any(0).all()))

    def log_prob(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """Log density; 0 where there is none."""
        if not self.full:
            return torch.zeros_like(x[..., 0])
        return _log_standard(times(self.inverse, x)) + torch.linalg.slogdet(self.inverse).logabsdet

    def check(self, x: Float[Tensor, "*n T d"], size: Float[Tensor, "*n"], when: str, name: str) -> None:
        """Raise where x is off the range of L by more than rounding."""
        off = (x - times(self.factor @ self.inverse, x)).abs().amax(-1)
        bad = off > torch.finfo(x.dtype).eps ** 0.5 * size.unsqueeze(-1)
        if not self.full and bool(bad.any()):
            *trajectory, step = bad.nonzero()[0].tolist()
            raise ImpossibleTransitionError(
                f"trajectory {trajectory}: {when.format(step)} has probability 0, as {name} is singular and allows no "
                "noise there"
            )


def expect(value: Quadratic, factor: Tensor, tilts: bool, what: str) -> tuple[Quadratic, Tensor, Tensor, Tensor]:
    """log E exp value(x) over x ~ N(m, LL') as a quadratic in m, and x's law under that weight (module's head).

    Returns:
        The quadratic, then gain, offset and factor of x ~ N(gain m + offset, factor factor'). Without ``tilts``:
        E value(x), and the law of x as it was.
    """
    M, h, g = value
    batch = h.shape[:-1]
    if not tilts:
        spread = ((M @ factor) * factor).sum((-2, -1))
        same = eye_like(M), torch.zeros_like(h), factor.expand(*batch, *factor.shape)
        return Quadratic(M, h, g - 0.5 * spread), *same
    G = eye_like(factor.mT @ factor) + factor.mT @ M @ factor
    root, info = torch.linalg.cholesky_ex(G)  # which reads the lower triangle
    failed = info != 0
    if is_checked(M) and bool(failed.any()):
        raise DivergenceError(
            f"the partition function is infinite: rewards grow faster than the Gaussian tails of {what} fall; give "
            "positive semi-definite costs Q and R, for which it always is finite"
        )
    root = torch.where(failed[..., None, None], torch.nan, root)
    F = torch.linalg.solve_triangular(root, factor.mT.expand(*batch, *factor.mT.shape), upper=False).mT
    MF, Fh = M @ F, times(F.mT, h)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    result = Quadratic(M - MF @ MF.mT, h - times(MF, Fh), g + 0.5 * Fh.square().sum(-1) - log_det)
    return result, eye_like(M) - F @ MF.mT, times(F, Fh), F


def times(matrix: Float[Tensor, "... d e"], x: Float[Tensor, "... e"]) -> Float[Tensor, "... d"]:
    """Matrix times vector; leading dimensions broadcast."""
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def eye_like(like: Tensor) -> Float[Tensor, "d d"]:
    """The identity, as large as the last dimension."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    """Draws of N(0, 1) in the type, and on the device, of another tensor."""
    check_generator(generator)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _factor(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """L with LL' = covariance; columns of zeros where it is singular."""
    spread, axes = torch.linalg.eigh(covariance)
    rounding = len(spread) * torch.finfo(spread.dtype).eps * spread.abs().max()
    return axes * torch.where(spread > rounding, spread, 0.0).sqrt()


def check_covariance(name: str, covariance: Float[Tensor, "d d"], definite: bool) -> None:
    """Raise :class:`InvalidMDPError` where a matrix is not symmetric, or not positive (semi-)definite."""
    rounding = 100 * torch.finfo(covariance.dtype).eps * covariance.abs().max()
    if bool((covariance - covariance.mT).abs().max() > rounding):
        raise InvalidMDPError(f"{name} is not symmetric: a covariance is")
    least = torch.linalg.eigvalsh(covariance).min()
    if bool(least < -len(covariance) * rounding) or (definite and not Noise.of(covariance).full):
        kind = "positive definite" if definite else "positive semi-definite"
        raise InvalidMDPError(f"{name} has the eigenvalue {float(least):.3g}: this covariance must be {kind}")


def _log_standard(z: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """log N(z; 0, I)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
