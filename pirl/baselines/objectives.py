"""What MaxEnt IRL maximises: the likelihood of the demonstrations, or the dual of feature matching.

Both are functions of the reward of all pairs, ``[S, A]``. With stochastic dynamics they are different estimators; for
the trajectory reading, and for deterministic dynamics watched to the end without a discount, they are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.distributions import MaxCausalEntTrajectory, MaxEntTrajectory
from pirl.errors import OptionError
from pirl.mdp import TabularMDP
from pirl.message_passing import log_policy_to_go, require_finite, soft_problem
from pirl.soft_values import Reading, soft_values
from pirl.statistics import known_horizon
from pirl.trajectories import Trajectories
from pirl.transitions import is_transformed


class Objective(ABC):
    """A function of the reward to be maximised; a sum over ``count`` episodes."""

    count: int
    unit: Int[Tensor, " n"]
    """Episode of each term of :meth:`terms`."""

    @abstractmethod
    def __call__(self, reward: Float[Tensor, "S A"]) -> Float[Tensor, ""]:
        """The value."""

    @abstractmethod
    def terms(self, reward: Float[Tensor, "S A"]) -> Float[Tensor, " n"]:
        """The independent terms that the value is the sum of, up to a constant: their gradients are the scores."""


class Likelihood(Objective):
    """Log-likelihood of the demonstrations under the soft-optimal demonstrator of a reward.

    The scores are those of single decisions in the causal reading, whose likelihood is a product of choices, and of
    whole episodes in the trajectory reading, where one normaliser is shared by a trajectory.
    """

    def __init__(
        self,
        demos: Trajectories,
        mdp: TabularMDP,
        reading: Reading,
        starts: Tensor | None = None,
        stopping: str | None = None,
    ) -> None:
        self.demos, self.mdp, self.reading, self.count = demos, mdp, reading, len(demos)
        self.options: dict[str, Any] = {
            "lengths": demos.lengths,
            "horizons": demos.horizons,
            "starts": starts,
            "stopping": stopping,
        }
        table = demos.as_tensor()
        assert table is not None
        self.table = table
        acting = table[..., 1] >= 0
        episode = torch.arange(len(table), device=table.device)
        self.unit = episode.unsqueeze(1).expand_as(acting)[acting] if reading == "causal" else episode

    def law(self, reward: Tensor) -> Any:  # of Pyro, whose classes are no types for beartype
        """The distribution of the demonstrations."""
        kind = MaxCausalEntTrajectory if self.reading == "causal" else MaxEntTrajectory
        return kind(self.mdp, reward, **self.options)

    def __call__(self, reward: Tensor) -> Tensor:
        """``log p(demonstrations)``."""
        return self.law(reward).log_prob_sum(self.table)

    def terms(self, reward: Tensor) -> Tensor:
        """log pi of every decision (causal), or the log density of every trajectory."""
        law = self.law(reward)
        if self.reading == "trajectory":
            return law.log_prob(self.table)
        log_policy = log_policy_to_go(law.reward, law.values, law.problem)
        log_policy = log_policy.masked_fill(~law.problem.log_prior.isfinite(), 0.0)  # never looked up
        state, action = self.table.unbind(-1)
        acting = action >= 0
        if law.problem.horizon is None:
            return log_policy[state[acting], action[acting]]
        step = torch.arange(acting.shape[1], device=acting.device).expand_as(acting)[acting]
        to_go = _horizons(self.demos, self.mdp)[self.unit] - step
        return log_policy[to_go - 1, state[acting], action[acting]]


class Dual(Objective):
    """Dual of maximum causal entropy: empirical return less the soft value of the empirical starts.

    Its gradient in the reward is the demonstrations' (discounted) visits less those that the soft policy makes from
    the same starts under the true dynamics, so that at its maximum features match (Ziebart 2010, theorem 6.2 and
    algorithm 9.3), whatever the dynamics. It is concave in the reward. What follows the last action of an episode that
    was truncated is expected by the model: its soft value is added to the return.
    """

    def __init__(self, demos: Trajectories, mdp: TabularMDP) -> None:
        self.count = len(demos)
        self.problem = soft_problem(mdp, "causal", horizon=known_horizon(demos.horizons, mdp.horizon))
        table = demos.as_tensor()
        assert table is not None
        demos.validate(mdp)
        state, action = table.unbind(-1)
        acting, episode = action >= 0, torch.arange(len(table), device=table.device)
        self.unit = episode
        step = torch.arange(acting.shape[1], device=table.device).expand_as(acting)
        discount = mdp.initial.new_tensor(mdp.discount)
        begun = state[:, 0] >= 0
        to_go = _horizons(demos, mdp)

        def place(state: Tensor, to_go: Tensor) -> Tensor:
            """Where the soft value of a state is found."""
            return state if self.problem.horizon is None else to_go * mdp.num_states + state

        # Rewards received at once; the value of where the episode began; and of where it was left.
        self.pairs = (episode.unsqueeze(1).expand_as(acting)[acting], (state * mdp.num_actions + action)[acting])
        self.pair_weight = discount ** step[acting]
        length = acting.sum(1)
        last = state.gather(1, length.unsqueeze(1)).squeeze(1)
        seen, unseen = begun & (last >= 0), begun & (last < 0) & (length > 0)
        final = (length - 1).clamp_min(0).unsqueeze(1)
        final_pair = (state * mdp.num_actions + action).gather(1, final).squeeze(1)[unseen]
        position, entry = self.problem.transitions.rows(final_pair)
        left = episode[unseen][position]
        parts = [
            (episode[begun], place(state[:, 0], to_go)[begun], -mdp.initial.new_ones(int(begun.sum()))),
            (episode[seen], place(last, to_go - length)[seen], discount ** length[seen]),
            (left, place(self.problem.transitions.column[entry], (to_go - length)[left]),
             self.problem.transitions.value[entry] * discount ** (length[left] - 1)),
        ]  # fmt: skip
        self.value_unit, self.places, self.value_weight = (torch.cat(x) for x in zip(*parts, strict=True))
        num_values = mdp.num_states * (1 if self.problem.horizon is None else self.problem.horizon + 1)
        zeros = mdp.initial.new_zeros
        self.visits = zeros(mdp.available.numel()).index_add(0, self.pairs[1], self.pair_weight)
        self.values = zeros(num_values).index_add(0, self.places, self.value_weight)

    def _soft_values(self, reward: Tensor) -> Tensor:
        values = soft_values(reward, self.problem)
        if not is_transformed(values):
            require_finite(reward, values, self.problem)
        return values.flatten()

    def __call__(self, reward: Tensor) -> Tensor:
        """The dual's value, summed over episodes."""
        return self.visits @ reward.flatten() + self.values @ self._soft_values(reward)

    def terms(self, reward: Tensor) -> Tensor:
        """The dual's value of each episode."""
        now = reward.new_zeros(self.count).index_add(
            0, self.pairs[0], self.pair_weight * reward.flatten()[self.pairs[1]]
        )
        return now.index_add(0, self.value_unit, self.value_weight * self._soft_values(reward)[self.places])


def _horizons(demos: Trajectories, mdp: TabularMDP) -> Int[Tensor, " N"]:
    """Horizon of each episode; 0 where there is none."""
    own = demos.horizons if demos.horizons is not None else torch.full_like(demos.lengths, -1)
    return torch.where(own < 0, mdp.horizon or 0, own)


def get_objective(
    kind: str, demos: Trajectories, mdp: TabularMDP, reading: Reading, given_starts: bool, stopping: str | None
) -> Objective:
    """The objective of that name.

    Raises:
        OptionError: there is none.
    """
    if kind not in ("likelihood", "dual"):
        raise OptionError(f"objective must be 'likelihood' or 'dual', not {kind!r}")
    if reading == "trajectory":  # its likelihood is its dual; of empirical starts, when those are given
        starts = demos.starts if given_starts or kind == "dual" else None
        return Likelihood(demos, mdp, reading, starts, stopping)
    if stopping is not None:
        raise OptionError("stopping='geometric' belongs to the trajectory reading; the causal reading has a discount")
    return Likelihood(demos, mdp, reading) if kind == "likelihood" else Dual(demos, mdp)
