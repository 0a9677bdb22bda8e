"""What chains learn about the posterior during warm-up, together: step size, trajectory length, mass matrix.

Each learner keeps its numbers in tensors, so that they can be saved and loaded exactly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.infer.hmc import Metric

NEGLIGIBLE = 1e-4


class _Saved:
    """A learner whose attributes are all it knows: numbers and tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the numbers."""
        return {name: torch.as_tensor(value, dtype=torch.float64).clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a copy."""
        for name, value in vars(self).items():
            saved: Any = state[name]
            setattr(self, name, type(value)(saved.item()) if not isinstance(value, Tensor) else saved.to(value))


class StepSize(_Saved):
    """Find the step size whose acceptance is the target, by stochastic approximation (Robbins and Monro 1951).

    What is steered is the harmonic mean over chains of each chain's recent mean acceptance: it minds a chain that is
    refused again and again, and not the one of hundreds that was refused last, which rules the plain harmonic mean
    (Hoffman et al. 2021). It has little noise, so that the size may follow it at once; Nesterov's dual averaging, made
    for the noise of one chain, first throws the size about by factors of three.

    Until the first restart each chain seeks a size of its own: before the scale of the posterior is known, one chain
    that starts far from it would hold up all others.
    """

    def __init__(self, step_size: float, target: float, like: Float[Tensor, " C"]) -> None:
        self.target = target
        self.recent = torch.zeros_like(like)
        self.offset = torch.zeros_like(like)
        self.restart(step_size)
        self.apart = True

    def restart(self, step_size: float) -> None:
        """Forget everything, and start from a size."""
        self.log_size, self.steps = math.log(step_size), 0
        self.total, self.weight = 0.0, 0.0
        self.recent, self.offset = torch.full_like(self.recent, self.target), torch.zeros_like(self.offset)
        self.apart = False

    def update(self, acceptance: Float[Tensor, " C"]) -> None:
        """Learn from the acceptance of one transition of each chain."""
        self.steps += 1
        if self.apart:
            self.offset = self.offset + 2.0 * self.steps**-0.6 * (acceptance - self.target)
            return
        self.recent = _recent(self.recent, acceptance, self.steps)
        self.log_size += 2.0 * self.steps**-0.6 * (float(_harmonic_mean(self.recent)) - self.target)
        self.total += self.steps * self.log_size
        self.weight += self.steps

    @property
    def current(self) -> float:
        """The size to try next."""
        return math.exp(self.log_size)

    @property
    def sizes(self) -> Float[Tensor, " C"]:
        """The size that each chain tries next."""
        return self.current * self.offset.exp()

    @property
    def average(self) -> float:
        """The size to keep: the geometric mean of those since the restart, later ones weighing more."""
        if self.apart:  # no common size was ever sought
            return float(self.sizes.median())
        return math.exp(self.total / self.weight) if self.weight else self.current


class StepSizes:
    """The step size of each of R replicates, by the acceptance of its own chains; see :class:`StepSize`."""

    def __init__(self, like: Float[Tensor, "C R"], target: float) -> None:
        self.target, self.log_size, self.recent = target, torch.zeros_like(like[0]), like
        self.restart()

    def restart(self) -> None:
        """Forget everything but the size."""
        self.steps, self.recent = 0, torch.full_like(self.recent, self.target)
        self.total, self.weight = torch.zeros_like(self.log_size), 0.0

    def update(self, acceptance: Float[Tensor, "C R"]) -> None:
        """Learn from the acceptance of one transition of each chain."""
        self.steps += 1
        self.recent = _recent(self.recent, acceptance, self.steps)
        self.log_size = self.log_size + 2.0 * self.steps**-0.6 * (_harmonic_mean(self.recent) - self.target)
        self.total = self.total + self.steps * self.log_size
        self.weight += self.steps

    @property
    def average(self) -> Float[Tensor, " R"]:
        """The sizes to keep."""
        return (self.total / self.weight).exp() if self.weight else self.log_size.exp()


def _recent(mean: Tensor, acceptance: Tensor, steps: int) -> Tensor:
    """The recent mean acceptance: it begins at the target, as if seen five times, since one refusal says little."""
    return mean + max(1 / (steps + 5), 0.1) * (acceptance - mean)


def _harmonic_mean(recent: Float[Tensor, "C *R"]) -> Float[Tensor, "*R"]:
    return 1 / (1 / recent.clamp(min=1e-3)).mean(0)


class TrajectoryLength(_Saved):
    """Ascend the ChEES criterion in the logarithm of the trajectory length T (Hoffman, Radul and Sountsov 2021).

    The criterion is E[(|y' - m'|^2 - |y - m|^2)^2] / 4: the change of the estimator of total variance that is hardest
    to make, y and y' the ends of a trajectory in whitened units, m and m' their means over chains. Its derivative in
    the time of travel is (|y' - m'|^2 - |y - m|^2) <y' - m', v'> with v' the velocity at the end.
    """

    def __init__(self, length: float, rate: float = 0.05) -> None:
        self.rate = rate
        self.restart(length)

    def restart(self, length: float) -> None:
        """Forget everything, and start from a length."""
        self.log_length, self.second, self.steps = math.log(length), 0.0, 0
        self.total, self.weight = 0.0, 0.0

    @property
    def current(self) -> float:
        """The length to try next."""
        return math.exp(self.log_length)

    @property
    def average(self) -> float:
        """The length to keep: the geometric mean of those since the restart, later ones weighing more."""
        return math.exp(self.total / self.weight) if self.weight else self.current

    def update(self, slope: float, longest: float) -> None:
        """One step of Adam without momentum along the derivative ``slope`` of the criterion in log T."""
        if not math.isfinite(slope):
            return
        self.steps += 1
        self.second += 0.05 * (slope * slope - self.second)
        scale = math.sqrt(self.second / (1 - 0.95**self.steps))
        change = self.rate * slope / scale if scale > 0 else 0.0
        self.log_length = min(self.log_length + max(-0.35, min(0.35, change)), math.log(longest))
        self.total += self.steps * self.log_length
        self.weight += self.steps


def criterion_slope(
    start: Float[Tensor, "C D"],
    proposal: Float[Tensor, "C D"],
    velocity: Float[Tensor, "C D"],
    acceptance: Float[Tensor, " C"],
    time: float,
) -> float:
    """Derivative of the ChEES criterion in log T, averaged over chains by acceptance.

    Args:
        start, proposal: whitened positions before and after a trajectory.
        velocity: of the proposal, not reversed.
        acceptance: of each chain; those below 1e-4 do not count.
        time: how long the trajectory was, h T: it changes by itself with log T.
    """
    weight = torch.where((acceptance >= NEGLIGIBLE) & proposal.isfinite().all(-1), acceptance, 0.0)
    total = weight.sum()
    if not total > 0:
        return math.nan
    ends = torch.where(weight[:, None] > 0, proposal, 0.0)
    before = start - start.mean(0)
    after = ends - (weight @ ends) / total
    growth = after.square().sum(-1) - before.square().sum(-1)
    slopes = growth * (after * torch.where(weight[:, None] > 0, velocity, 0.0)).sum(-1)
    return time * float((weight @ slopes) / total)


class Covariance(_Saved):
    """Covariance of the draws of all chains since the last :meth:`restart`, by Chan, Golub and LeVeque's update."""

    def __init__(self, size: int, dense: bool, like: Tensor) -> None:
        self.count = 0.0
        self.mean = like.new_zeros(size)
        self.scatter = like.new_zeros((size, size) if dense else (size,))

    def restart(self) -> None:
        """Forget all draws."""
        self.count = 0.0
        self.mean, self.scatter = torch.zeros_like(self.mean), torch.zeros_like(self.scatter)

    def update(self, draws: Float[Tensor, "C D"]) -> None:
        """Add one draw of each chain."""
        if not len(draws):
            return
        mean = draws.mean(0)
        centred, shift = draws - mean, mean - self.mean
        total = self.count + len(draws)
        factor = self.count * len(draws) / total
        if self.scatter.dim() == 1:
            self.scatter = self.scatter + centred.square().sum(0) + factor * shift.square()
        else:
            self.scatter = self.scatter + centred.mT @ centred + factor * torch.outer(shift, shift)
        self.mean = self.mean + shift * (len(draws) / total)
        self.count = total

    def metric(self) -> Metric | None:
        """The factor of the covariance; None where the draws do not determine it."""
        if self.count < 2:
            return None
        estimate = self.scatter / (self.count - 1)
        variance = estimate if estimate.dim() == 1 else estimate.diagonal()
        if not bool((variance > 0).all() & variance.isfinite().all()):
            return None
        if estimate.dim() == 1:
            return Metric(variance.sqrt())
        factor, info = torch.linalg.cholesky_ex(shrunk(estimate, self.count))
        return Metric(factor) if info == 0 else None


def shrunk(covariance: Float[Tensor, "*R D D"], count: float) -> Float[Tensor, "*R D D"]:
    """An estimate from ``count`` draws, moved towards its diagonal as by D + 2 further draws.

    A few directions of too few draws would otherwise look as if they had no width.
    """
    extra = covariance.shape[-1] + 2
    share = extra / (count + extra)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return (1 - share) * covariance + share * diagonal


def halton(index: int) -> float:
    """The ``index``-th number (from 1) of the base-2 Halton sequence (van der Corput's) on (0, 1)."""
    result, scale = 0.0, 0.5
    while index:
        result += scale * (index & 1)
        index, scale = index >> 1, scale / 2
    return result


def window_ends(num_warmup: int) -> list[int]:
    """Steps after which the covariance is learnt anew from the draws since the last: 10, 20, 30, 45, 67, ... , 3/4."""
    last = int(0.75 * num_warmup)
    ends, end = [], 10
    while end <= last / 1.25:
        ends.append(end)
        end = max(end + 10, int(1.5 * end))
    return [*ends, last] if last >= 5 else []
