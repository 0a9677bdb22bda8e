"""Behaviour cloning: how often which action was taken, smoothed. It imitates, and infers no reward."""

from __future__ import annotations

import torch

from pirl.baselines.estimate import PointEstimate, check_problem
from pirl.errors import HorizonError, OptionError
from pirl.mdp import TabularMDP
from pirl.trajectories import Trajectories

GIVEN = ("state", "time", "state and time")


def cloning(
    demos: Trajectories,
    mdp: TabularMDP,
    *,
    given: str = "state",
    smoothing: float = 1.0,
    num_steps: int | None = None,
) -> PointEstimate:
    """Share of each action among the decisions seen, given the state, the time, or both.

    ``smoothing`` decisions by the action prior are added to those seen (the mean of a Dirichlet posterior), so that
    what was never seen is not impossible.

    Args:
        given: what the policy may depend on. Times are counted from the start of an episode.
        smoothing: weight of the prior; at 0 the action prior is only used where nothing was seen.
        num_steps: number of decisions of a policy by time; by default the MDP's horizon, or the longest episode.

    Returns:
        A :class:`PointEstimate` without parameters and reward; ``log_policy`` is ``[S, A]``, or ``[T, S, A]``.

    Raises:
        OptionError: an unknown ``given``, or negative smoothing.
        HorizonError: an episode is longer than ``num_steps``.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> demos = pirl.Trajectories(states=[[0, 0, 0]], actions=[[0, 1, 1]])
        >>> cloning(demos, mdp, smoothing=3.0).log_policy.exp()
        tensor([[0.4167, 0.5833]], dtype=torch.float64)
    """
    check_problem(demos, mdp)
    if given not in GIVEN:
        raise OptionError(f"given must be 'state', 'time' or 'state and time', not {given!r}")
    if not smoothing >= 0:
        raise OptionError(f"smoothing is {smoothing}, but must not be negative")
    demos.validate(mdp)
    states, actions = demos.states, demos.actions
    longest = int(demos.lengths.max())
    steps = num_steps or mdp.horizon or max(longest, 1)
    if given != "state" and steps < longest:
        raise HorizonError(f"an episode has {longest} decisions, more than num_steps={steps}")
    acting = actions >= 0
    time = torch.arange(actions.shape[1], device=actions.device).expand_as(actions)[acting]
    place = (states[:, : actions.shape[1]][acting], actions[acting])
    prior = mdp.log_prior.exp()
    prior = prior / prior.sum(-1, keepdim=True)  # of a counting measure
    counts = prior.new_zeros(1 if given == "state" else steps, *prior.shape)
    counts.index_put_(
        (torch.zeros_like(time) if given == "state" else time, *place), prior.new_ones(()), accumulate=True
    )
    if given == "time":
        # Of what was done at a time, the part that is available in a state.
        counts = counts.sum(1, keepdim=True).expand_as(counts) * mdp.available
    weight = counts + smoothing * prior
    total = weight.sum(-1, keepdim=True)
    policy = torch.where(total > 0, weight / total.clamp(min=torch.finfo(total.dtype).tiny), prior)
    log_policy = torch.where(mdp.terminal.unsqueeze(-1), mdp.log_prior, policy.log())
    return PointEstimate(
        name="cloning",
        parameters={},
        reward=None,
        log_policy=log_policy[0] if given == "state" else log_policy,
        attrs={"given": given, "smoothing": float(smoothing), "decisions": int(acting.sum())},
    )
