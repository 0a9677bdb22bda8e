"""One step of the recursions: a decision problem as they see it, and Q from the next state's values.

Two readings of p(O_t = 1 | s, a) = exp r(s, a) differ in how chance enters Q:

- *trajectory* (the graphical model, literally): ``Q = log p(a|s) + r + log sum_s' P(s'|s,a) exp V(s')``, so that V =
log beta;
- *causal* (Ziebart 2010, section 6.2; Levine 2018, eq. 18): ``Q = log p(a|s) + r + g sum_s' P(s'|s,a) V(s')``.

All tensors are *chain-last*: ``[S, A, C]`` and ``[S, C]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.transitions import FAST_RATE, Numbered, TransitionMap, is_transformed, scatter_max

Reading = Literal["causal", "trajectory"]


@dataclass(frozen=True, eq=False)
class SoftProblem(Numbered):
    """A decision problem as the recursions see it.

    Args:
        transitions: P(s'|s,a) times the discount (causal), or times the probability of going on (trajectory); no
            entry leaves a terminal state.
        log_prior: log p(a|s), -inf where an action is not available; a terminal state has one action, 0, of log p = 0.
        reading: how chance enters (module docstring).
        ended: ``[S, A]``, 1 where nothing follows a pair for sure (terminal states, actions that are not available),
            else 0.
        stop: probability of stopping after any other step (trajectory reading with geometric stopping: 1 - g; else 0).
        horizon: number of decisions, or None for the stationary fixed point.
    """

    transitions: TransitionMap
    log_prior: Float[Tensor, "S A"]
    reading: Reading
    ended: Float[Tensor, "S A"]
    stop: float
    horizon: int | None

    @cached_property
    def ends(self) -> Float[Tensor, " SA"] | None:
        """Probability that nothing follows a pair that can be chosen; None where something always does."""
        ends = (self.ended + (1 - self.ended) * self.stop) * self.log_prior.isfinite()
        return ends.flatten() if bool(ends.any()) else None

    @cached_property
    def linear(self) -> bool:
        """Whether Q is linear in the next V: always in the causal reading, and wherever nothing is left to chance."""
        return self.reading == "causal" or (self.stop == 0 and bool((self.transitions.value == 1).all()))

    @cached_property
    def rate(self) -> float:
        """The largest probability (times the discount) that a decision is followed by another."""
        value, row = self.transitions.value, self.transitions.row
        return float(value.new_zeros(self.transitions.shape[0]).index_add(0, row, value).amax())

    @property
    def undiscounted(self) -> bool:
        """Whether some decision is followed by another for sure, so that only absorption bounds the values."""
        return self.rate > 1 - 1e-7

    @property
    def fast(self) -> bool:
        """Whether value iteration takes at most some 3,000 steps; a tilted law's rate depends on the reward."""
        return self.reading == "causal" and self.rate <= FAST_RATE


def backup(
    base: Float[Tensor, "S A #C"], values: Float[Tensor, "S #C"], problem: SoftProblem, out: Tensor | None = None
) -> Float[Tensor, "S A C"]:
    """Q from the next state's values; ``base`` is r + log p(a|s). ``out`` is room that may be used for it."""
    if problem.linear:
        room = None if out is None else out.flatten(0, 1)
        return problem.transitions.apply_plus(base.flatten(0, 1), values, room).unflatten(0, base.shape[:2])
    return base + log_expect(values, problem).unflatten(0, base.shape[:2])


def log_expect(values: Float[Tensor, "S C"], problem: SoftProblem) -> Float[Tensor, "SA C"]:
    """``log(stop + sum_s' P(s'|s,a) exp V(s'))``, 0 where the episode has ended; safe for any spread of V."""
    transitions, ended = problem.transitions, problem.ended.reshape(-1, 1)
    top = values.detach().amax(0)
    total = transitions.expect((values - top).exp()) + ended
    # One shift for all rows is exact until some row's terms all fall below the smallest normal number; only then, or
    # where a transform hides the numbers, shift row by row.
    if not is_transformed(values) and bool((total > torch.finfo(total.dtype).tiny * 2.0**52).all()):
        result = total.log() + (1 - ended) * top
    else:
        entry = transitions.value.log().unsqueeze(-1) + values[transitions.column]
        row_top = torch.where(ended > 0, 0.0, scatter_max(entry.detach(), transitions.row, ended.shape[0]))
        scaled = (entry - row_top[transitions.row]).exp()
        result = ended.expand_as(row_top).index_add(0, transitions.row, scaled).log() + row_top
    if problem.stop == 0:
        return result
    # Not logaddexp, whose second derivative is NaN where one term dwarfs the other.
    either = torch.stack([result, torch.full_like(result, math.log(problem.stop))])
    return torch.where(ended > 0, 0.0, torch.logsumexp(either, 0))


def entry_weights(values: Float[Tensor, "S C"], problem: SoftProblem) -> Float[Tensor, "nnz #C"]:
    """Weight of each transition in the derivative of Q: g P(s'|s,a), or the tilted law P(s'|s,a) e^{V(s')} / norm."""
    transitions = problem.transitions
    if problem.linear:
        return transitions.value.unsqueeze(-1)
    norm = log_expect(values, problem)
    return (transitions.value.log().unsqueeze(-1) + values[transitions.column] - norm[transitions.row]).exp()
