"""Episodes that a policy played: states, actions, and how likely its decisions were."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import InvalidRewardError
from pirl.trajectories import End, Trajectories


class Rollouts(NamedTuple):
    """Episodes that a policy played, in the form of :class:`pirl.Trajectories`.

    Whole numbers are -1 after the end; of vectors, the last state is repeated there and actions are 0. A tabular
    episode shorter than the horizon ended in a terminal state, where it collects r(s, 0) once; that no-op is no
    decision: it has no entry in ``actions`` and is not counted in ``lengths``, but :meth:`pairs` and :meth:`returns`
    know of it.

    Example:
        >>> played = roll_out(TabularSimulator(world), base_policy(world), 5)
        >>> played.states.shape, played.actions.shape, played.returns(wanted.expand(16, 5)).shape
        (torch.Size([5, 9]), torch.Size([5, 8]), torch.Size([5]))
        >>> played.trajectories()
        Trajectories(5 episodes, 40 decisions)
    """

    states: Tensor
    """``[num, T + 1, *event]``."""
    actions: Tensor
    """``[num, T, *event]``."""
    log_density: Float[Tensor, " num"]
    """sum_t log pi(a_t|s_t) over the decisions."""
    lengths: Int[Tensor, " num"]
    """Number of decisions."""
    rewards: Float[Tensor, "num T"] | None = None
    """What a Gymnasium environment paid, which learning must not see; None elsewhere."""
    horizon: int | None = None
    """T of the simulator, where these are fewer columns (all ended before); None: as many as there are columns."""
    terminal: Bool[Tensor, " S"] | None = None
    """Which numbered states end an episode, where the simulator tells it."""
    discount: float = 1.0
    """Of the simulator, where it tells it; :meth:`returns` are plain sums all the same."""

    def __repr__(self) -> str:
        return f"Rollouts({len(self.lengths)} episodes of at most {self.actions.shape[1]} decisions)"

    def pairs(self) -> tuple[Tensor, Tensor, Bool[Tensor, "num T"]]:
        """States and actions ``[num, T, *event]`` that a reward can be asked for, and which of them count.

        What does not count is state 0 and action 0 (or a repeated vector); what does includes the no-op.
        """
        return paying(self.states, self.actions, self.lengths, self.horizon)

    def returns(self, reward: Tensor) -> Float[Tensor, "*batch num"]:
        """sum_t r(s_t, a_t) of each episode, the no-op of a terminal state included; differentiable in r.

        Args:
            reward: r(s, a), or r(s) as ``[*batch, S, 1]``.

        Raises:
            InvalidRewardError: states are vectors, of which a table knows nothing; or the table is too small.
        """
        if self.states.is_floating_point() or self.actions.is_floating_point():
            raise InvalidRewardError(
                "a table of rewards needs numbered states and actions: sum a function over pairs()"
            )
        states, actions, counted = self.pairs()
        if reward.dim() < 2 or reward.shape[-2] <= int(states.max()) or 1 < reward.shape[-1] <= int(actions.max()):
            raise InvalidRewardError(
                f"a reward {tuple(reward.shape)} has no entry for every state and action of these roll-outs: it must "
                "be [*batch, S, A], or [*batch, S, 1]"
            )
        reward = reward.expand(*reward.shape[:-1], max(reward.shape[-1], int(actions.max()) + 1))
        return (reward[..., states, actions] * counted).sum(-1)

    def trajectories(self) -> Trajectories:
        """The same episodes as demonstrations (of numbered states and actions)."""
        horizon = self.actions.shape[1]
        ends: list[End] = ["terminated" if length < horizon else "truncated" for length in self.lengths.tolist()]
        limits = torch.full_like(self.lengths, horizon)
        return Trajectories(self.states, self.actions, self.lengths, ends=ends, limits=limits)


def paying(
    states: Tensor, actions: Tensor, lengths: Int[Tensor, " num"], horizon: int | None = None
) -> tuple[Tensor, Tensor, Bool[Tensor, "num steps"]]:
    """States and actions that a reward is paid for, and which of them count: whoever sums rewards asks here.

    Decisions count; so does the no-op of a numbered state that ended an episode before the horizon, even where it is
    in the last column, as of demonstrations that all ended early. What does not count is state 0 and action 0.

    Args:
        states: ``[num, T + 1, *event]`` (or T, where the last ones are not known).
        actions: ``[num, T, *event]``.
        horizon: T of the simulator; by default the number of actions' columns.

    Example:
        >>> ended = torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([1])  # a decision, then the end
        >>> [paying(*ended, horizon)[2].tolist() for horizon in (1, 8)]
        [[[True]], [[True, True]]]
    """
    steps, length = actions.shape[1], lengths.unsqueeze(1)
    horizon = steps if horizon is None else horizon
    if states.is_floating_point():
        return states[:, :steps], actions, torch.arange(steps, device=lengths.device) < length
    size = max(steps, min(states.shape[1], horizon))
    states, time = states[:, :size], torch.arange(size, device=lengths.device)
    actions = torch.cat([actions, actions.new_zeros(len(actions), size - steps, *actions.shape[2:])], 1)
    no_op = (time == length) & (states >= 0) & (length < horizon)
    actions = actions if actions.is_floating_point() else actions.clamp_min(0)
    return states.clamp_min(0), actions, (time < length) | no_op
