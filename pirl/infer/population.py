"""What the samplers of many chains share: moves that all chains make alike, and what they learn from them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import OptionError, check_counts
from pirl.infer.adaptation import StepSize, TrajectoryLength, criterion_slope, halton
from pirl.infer.engine import MOMENTA, laid_out, random_numbers
from pirl.infer.ensemble import Ensemble
from pirl.infer.hmc import Metric, Phase, Transition
from pirl.infer.sampling import Sampler, Stats, part

WHITENED_LENGTH = 2.4
"""Where the ChEES criterion is largest on a Gaussian in whitened units, with times uniform on (0, T): the root of
cos^4 T = (1/T) int_0^T cos^4 t dt beyond pi/2."""

MOST_DENSE = 300
"""Parameters up to which the mass matrix is dense unless told."""


class Population(Sampler):
    """Chains that move by Hamiltonian Monte Carlo with one step size, number of steps and mass matrix.

    Args:
        ensemble: evaluates and moves the chains.
        start: where they are.
        temperature: of all of them.
        metric: how wide the posterior may be.
        target_accept_prob: acceptance that the step size aims at.
        max_leapfrogs: gradients of a move at most.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        start: Float[Tensor, "C D"],
        temperature: float,
        metric: Metric,
        *,
        seed: int,
        target_accept_prob: float,
        max_leapfrogs: int,
    ) -> None:
        self.ensemble, self.metric, self.seed, self.max_leapfrogs = ensemble, metric, seed, max_leapfrogs
        self.phase = ensemble.evaluate(start, torch.full_like(start[:, 0], temperature))
        self.step_size = StepSize(1.0, target_accept_prob, start[:, 0])
        self.length = TrajectoryLength(WHITENED_LENGTH)

    def move(self, sizes: Float[Tensor, " C"], num_steps: int, counter: int, stream: int = MOMENTA) -> Transition:
        """Try one transition; its random numbers depend on (seed, stream, counter) only."""
        numbers, z = random_numbers(self.seed, stream, counter), self.phase.z
        momentum = laid_out(torch.from_numpy(numbers.standard_normal(tuple(z.shape))).to(z))
        log_uniform = torch.from_numpy(-numbers.standard_exponential(len(z))).to(z)
        return self.ensemble.transition(self.phase, self.metric, sizes, num_steps, momentum, log_uniform)

    def transit(
        self, step: int, sizes: Float[Tensor, " C"], length: float, most: int
    ) -> tuple[Transition, float, Stats]:
        """Make the transition of a step, for a share of ``length`` that the Halton sequence gives.

        Returns:
            The transition, for how long it went, and statistics.
        """
        time = halton(step + 1) * length
        num_steps = max(1, min(most, math.ceil(time / float(sizes.median()))))
        moved = self.move(sizes, num_steps, step)
        self.phase = moved.phase
        stats = {
            "lp": -self.phase.energy,
            "energy": moved.hamiltonian,
            "acceptance_rate": moved.acceptance,
            "diverging": moved.diverging > 0,
            "step_size": sizes,
            "n_steps": torch.full(sizes.shape, num_steps),
            "trajectory_length": sizes * num_steps,
        }
        return moved, time, stats

    def learn(self, start: Float[Tensor, "C D"], moved: Transition, time: float) -> None:
        """Adapt step size and trajectory length to a transition that began at ``start`` and went on for ``time``."""
        self.step_size.update(moved.acceptance)
        whiten = self.metric.whiten
        slope = criterion_slope(whiten(start), whiten(moved.proposal), moved.velocity, moved.acceptance, time)
        self.length.update(slope, longest=self.max_leapfrogs * self.step_size.current)

    def state_dict(self) -> dict[str, Tensor]:
        """Positions and all that was learnt; energies too, since computing them again could round differently."""
        groups = {
            "step_size": self.step_size.state_dict(),
            "length": self.length.state_dict(),
            "phase": vars(self.phase),
        }
        state = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        return {**state, "metric": self.metric.factor}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where a saved population was."""
        device = self.phase.z.device
        self.step_size.load_state_dict(part(state, "step_size"))
        self.length.load_state_dict(part(state, "length"))
        self.phase = Phase(**{name: value.to(device) for name, value in part(state, "phase").items()})
        self.metric = Metric(state["metric"].to(device))


def check_options(target_accept_prob: float, max_leapfrogs: int, chains_per_block: int | None) -> None:
    """Refuse what no population can be moved with.

    Raises:
        OptionError: an option is out of its range.
    """
    if not 0 < target_accept_prob < 1:
        raise OptionError(f"target_accept_prob is {target_accept_prob}, but must be between 0 and 1")
    for name, value in (("max_leapfrogs", max_leapfrogs), ("chains_per_block", chains_per_block)):
        if value is not None:
            check_counts(1, **{name: value})
