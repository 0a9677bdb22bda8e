"""How well a policy predicts: held-out choices, demonstrated features, another policy; and whether intervals cover."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import HorizonError, InvalidPolicyError, InvalidRewardError, InvalidTrajectoriesError, OptionError
from pirl.mdp import TabularMDP
from pirl.metrics.blocks import by_block, by_time, is_timed
from pirl.planning import discounted_occupancy
from pirl.soft_values import chain_last
from pirl.trajectories import Trajectories


class HeldOut(NamedTuple):
    """Log-likelihood of held-out choices (:func:`held_out_log_likelihood`).

    Example:
        >>> found = pirl.metrics.held_out_log_likelihood(pirl.soft_policy(mdp, truth), demos[:4])
        >>> found.per_decision.shape, found.episodes.shape, found.decisions
        (torch.Size([]), torch.Size([4]), tensor([15, 15, 15, 15]))
    """

    per_decision: Float[Tensor, "*batch"]
    """Sum over all episodes by the number of decisions."""
    episodes: Float[Tensor, "*batch N"]
    """Sum over the decisions of each episode; resample these, with their numbers of decisions, for an interval."""
    decisions: Int[Tensor, " N"]
    """Number of decisions of each episode."""


class Divergence(NamedTuple):
    """How far apart two policies are, averaged over the states that the first visits (:func:`policy_divergence`).

    Example:
        >>> found = pirl.metrics.policy_divergence(mdp, pirl.soft_policy(mdp, truth), pirl.soft_policy(mdp, 2 * truth))
        >>> bool(found.kl > 0), bool(0 < found.total_variation < 1)
        (True, True)
    """

    kl: Float[Tensor, "*batch"]
    """KL(p || q) of the action distributions, in nats; infinite where p does what q never does."""
    total_variation: Float[Tensor, "*batch"]
    """Half the sum of absolute differences, in [0, 1]."""


def held_out_log_likelihood(
    log_policy: Tensor, demos: Trajectories, *, horizon: int | None = None, pool: bool = False, bits: bool = False
) -> HeldOut:
    """Log-likelihood of choices that were held out: log pi(a_t|s_t), neither starts nor dynamics.

    Args:
        log_policy: log pi(a|s) ``[*batch, S, A]``, or with ``horizon=T`` by time, ``[*batch, T, S, A]``.
        demos: the held-out episodes. Where an episode has a horizon of its own (``demos.horizons``), it follows the
            policy from as many decisions to go.
        horizon: number of decisions T that a policy by time is for (``mdp.horizon``).
        pool: the posterior predictive: over all batch dimensions the likelihood of each episode is averaged,
            ``log mean exp``, since one draw holds for a whole episode; the result has no batch dimensions.
        bits: in bits instead of nats.

    Returns:
        Per decision, and for each episode. ``-inf`` where a choice has probability 0.

    Raises:
        InvalidPolicyError: the shape does not fit ``horizon``, or numbers are NaN or above 0.
        InvalidTrajectoriesError: states or actions beyond the policy's, or no decision at all.
        HorizonError: an episode longer than the policy.

    Example:
        >>> demos = pirl.Trajectories(states=[[0, 0, 0]], actions=[[0, 1, 1]])
        >>> held_out_log_likelihood(torch.full((1, 2), 0.5).log(), demos, bits=True).per_decision
        tensor(-1.)
    """
    timed = horizon is not None
    event = 2 + timed
    if log_policy.dim() < event or (timed and log_policy.shape[-3] != horizon):
        expected = f"[*batch, {horizon}, S, A]" if timed else "[*batch, S, A]"
        raise InvalidPolicyError(f"log_policy has shape {tuple(log_policy.shape)}; expected {expected}")
    if not bool((log_policy <= 1e-6).all()):  # false for NaN too
        raise InvalidPolicyError("log_policy is NaN or above 0 somewhere: give log probabilities")
    table = demos.states[:, :-1], demos.actions
    num_states, num_actions = log_policy.shape[-2:]
    acting = table[1] >= 0
    state, action = table[0][acting], table[1][acting]
    episode = torch.arange(len(demos), device=acting.device).unsqueeze(1).expand_as(acting)[acting]
    if not len(state):
        raise InvalidTrajectoriesError("the held-out episodes contain no decision: there is nothing to predict")
    if int(state.max()) >= num_states or int(action.max()) >= num_actions:
        raise InvalidTrajectoriesError(
            f"an episode has state {int(state.max())} and action {int(action.max())}; the policy is for states below "
            f"{num_states} and actions below {num_actions}"
        )
    place = state * num_actions + action
    if horizon is not None:
        place = place + _step_of_policy(demos, acting, horizon)[acting] * (num_states * num_actions)

    def score(policy: Tensor) -> Tensor:
        chosen = policy.flatten(1)[:, place]
        return chosen.new_zeros(len(chosen), len(demos)).index_add(1, episode, chosen)

    episodes = by_block(score, len(place), (log_policy, event))
    if pool:
        episodes = episodes.reshape(-1, len(demos))
        episodes = torch.logsumexp(episodes, 0) - math.log(len(episodes))
    episodes = episodes / math.log(2.0) if bits else episodes
    return HeldOut(episodes.sum(-1) / len(place), episodes, acting.sum(1))


def feature_gap(
    mdp: TabularMDP,
    features: Tensor,
    demos: Trajectories,
    *,
    policy: Tensor | None = None,
    occupancy: Tensor | None = None,
    order: float = 2.0,
    shares: Tensor | None = None,
) -> Float[Tensor, "*batch"]:
    """Norm of the difference between demonstrated and modelled feature expectations (Abbeel and Ng 2004).

    ``|mean over episodes of sum_t g^(t-1) f(s_t, a_t) - E_pi[the same]|``. The policy starts from p(s_1) and is watched
    for as long as the episodes were (``demos.limits``), so that the gap of the right policy goes to 0 as episodes
    become many, however short. The no-op of a terminal state counts once, on entry, where a decision is left for it.

    Args:
        features: ``[S, K]`` or ``[S, A, K]``.
        policy: pi(a|s) ``[*batch, S, A]``, or ``[*batch, T, S, A]`` by time when the horizon is T (a dimension of that
            size there is time).
        occupancy: instead, expected discounted visits ``[*batch, S, A]``, taken as they are.
        order: of the norm; 2 by default, ``math.inf`` for the largest difference.
        shares: ``[*batch]``, sums to 1: the policies are a mixture, one of them drawn for an episode; the result is a
            scalar.

    Raises:
        OptionError: not one of ``policy`` and ``occupancy``.
        InvalidPolicyError, InvalidRewardError: shapes do not fit.
        InvalidTrajectoriesError and others: the demonstrations are impossible in this problem.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> demos = pirl.Trajectories(states=[[0, 0, 0]], actions=[[0, 1, 1]])
        >>> feature_gap(mdp, torch.eye(2).double()[None], demos, policy=torch.full((1, 2), 0.5).double())
        tensor(0.7071, dtype=torch.float64)
    """
    if (policy is None) == (occupancy is None):
        raise OptionError("give policy= or occupancy=, one of the two")
    pairs = mdp.log_prior.shape
    if tuple(features.shape[:-1]) not in ((pairs[0],), tuple(pairs)) or features.dtype != mdp.dtype:
        raise InvalidRewardError(
            f"features are {features.dtype} {tuple(features.shape)}; expected {mdp.dtype} [{pairs[0]}, K] or "
            f"[{pairs[0]}, {pairs[1]}, K]"
        )
    demos.validate(mdp)
    rows = (features.unsqueeze(1).expand(-1, pairs[1], -1) if features.dim() == 2 else features).flatten(0, 1)
    shown = _demonstrated_visits(mdp, demos).flatten() @ rows
    if occupancy is not None:
        if occupancy.shape[-2:] != pairs:
            raise InvalidPolicyError(f"occupancy has shape {tuple(occupancy.shape)}; expected [*batch, S, A] = {pairs}")
        return torch.linalg.vector_norm(occupancy.flatten(-2) @ rows - shown, order, dim=-1)
    assert policy is not None
    own = [] if demos.horizons is None else demos.horizons.tolist()
    if is_timed(mdp, policy) and any(horizon not in (-1, mdp.horizon) for horizon in own):
        raise HorizonError("a policy by time cannot be compared with episodes that have horizons of their own")
    watched = _share_watched(mdp, demos)

    def expected(followed: Tensor) -> Tensor:
        total = followed.new_zeros(len(followed), pairs.numel())
        for weight, visits in zip(watched, _visits(mdp, followed), strict=False):
            total = total + weight * visits.flatten(1)
        return total @ rows

    _require_policy(mdp, policy)
    no_op = mdp.log_prior.exp()
    policy = torch.where(mdp.terminal.unsqueeze(-1), no_op, policy)
    found = by_block(expected, (4 + (mdp.horizon or 1)) * pairs.numel(), by_time(mdp, policy))
    if shares is not None:
        found = torch.einsum("m,mk->k", shares.flatten(), found.flatten(0, -2))
    return torch.linalg.vector_norm(found - shown, order, dim=-1)


def policy_divergence(mdp: TabularMDP, log_p: Tensor, log_q: Tensor) -> Divergence:
    """KL divergence and total variation of two policies' choices, averaged over the discounted visits of the first.

    Terminal states, where nothing is chosen, do not count.

    Args:
        log_p: log pi(a|s) ``[*batch, S, A]``, or ``[*batch, T, S, A]`` by time when the horizon is T (a dimension of
            that size there is time).
        log_q: likewise; batch dimensions broadcast.

    Raises:
        InvalidPolicyError: not log probabilities over available actions, or the wrong shape.
        DivergenceError: discount 1, no horizon, and the first policy never ends.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> p, q = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[1.0, 0.0]]).double().log()
        >>> policy_divergence(mdp, p, q)
        Divergence(kl=tensor(inf, dtype=torch.float64), total_variation=tensor(0.5000, dtype=torch.float64))
    """
    inputs = []
    for x in (log_p, log_q):
        _require_policy(mdp, x.exp())
        inputs.append(by_time(mdp, torch.where(mdp.terminal.unsqueeze(-1), mdp.log_prior, x)))
    acting = ~mdp.terminal

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        followed = p.exp()
        if mdp.horizon is None:
            visits = discounted_occupancy(mdp, followed).unsqueeze(1)
            p, q, followed = (x.unsqueeze(1) for x in (p, q, followed))
        else:
            discount = mdp.discount ** torch.arange(mdp.horizon, device=p.device).to(p)
            visits = torch.stack(list(_visits(mdp, followed)), 1) * discount[:, None, None]
        # By state [C, T, S]; log p - log q is not looked at where p is 0.
        kl = torch.where(followed > 0, followed * (p - q), 0.0).sum(-1)
        variation = (followed - q.exp()).abs().sum(-1) / 2
        weight = visits.sum(-1) * acting
        total = weight.sum((-2, -1)).clamp_min(torch.finfo(weight.dtype).tiny)
        means = [torch.where(weight > 0, weight * x, 0.0).sum((-2, -1)) / total for x in (kl, variation)]
        return torch.stack(torch.broadcast_tensors(*means), -1)

    cost = 8 * (mdp.horizon or 1) * mdp.log_prior.numel() + len(mdp.transitions.value)
    both = by_block(divergence, cost, *inputs)
    return Divergence(both[..., 0].clamp_min(0.0), both[..., 1])


def interval_coverage(
    draws: Float[Tensor, "draw *event"], truth: Float[Tensor, "*event"], levels: Sequence[float] = (0.5, 0.9)
) -> Bool[Tensor, "level *event"]:
    """Whether central credible intervals contain the truth: one row a level.

    A central interval of level p leaves (1 - p) / 2 of the draws on either side. Averaged over many truths drawn from
    the prior, a right posterior covers with probability p.

    Args:
        draws: posterior draws ``[draw, *event]``.
        truth: ``[*event]``.
        levels: probabilities of the intervals, in (0, 1).

    Raises:
        OptionError: a level outside (0, 1), no draws, or shapes that do not fit.

    Example:
        >>> interval_coverage(torch.arange(101.0), torch.tensor(20.0), levels=(0.5, 0.9))
        tensor([False,  True])
    """
    if not len(levels) or not all(0 < level < 1 for level in levels):
        raise OptionError(f"levels are {tuple(levels)}; an interval's probability lies strictly between 0 and 1")
    if draws.dim() < 1 or not len(draws) or draws.shape[1:] != truth.shape:
        raise OptionError(f"draws {tuple(draws.shape)} do not fit truth {tuple(truth.shape)}: expected [draw, *truth]")
    # torch.quantile takes no more than 16 million numbers.
    ordered = draws.sort(0).values

    def quantile(probability: float) -> Tensor:
        below, part = divmod(probability * (len(ordered) - 1), 1)
        above = min(int(below) + 1, len(ordered) - 1)
        return torch.lerp(ordered[int(below)], ordered[above], part)

    return torch.stack([(quantile((1 - p) / 2) <= truth) & (truth <= quantile((1 + p) / 2)) for p in levels])


def _require_policy(mdp: TabularMDP, policy: Tensor) -> None:
    if policy.dim() < 2 or policy.shape[-2:] != mdp.log_prior.shape:
        raise InvalidPolicyError(
            f"policy has shape {tuple(policy.shape)}; expected [*batch, {mdp.num_states}, {mdp.num_actions}]"
        )
    tolerance = max(1e-8, 32 * torch.finfo(policy.dtype).eps)
    fits = (policy >= 0) & (mdp.log_prior.isfinite() | (policy == 0))
    bad = (((policy.sum(-1) - 1).abs() > tolerance) | ~fits.all(-1)) & ~mdp.terminal
    if bool(bad.any()):
        raise InvalidPolicyError(
            f"policy of state {int(bad.nonzero()[0, -1])} is not a distribution over its available actions"
        )


def _visits(mdp: TabularMDP, policy: Tensor) -> Iterator[Float[Tensor, "C S A"]]:
    """P(s_t = s, a_t = a), t = 1, 2, ..., up to the horizon, of policies ``[C, T, S, A]``, or ``[C, S, A]`` without."""
    state = mdp.initial.unsqueeze(-1).expand(-1, len(policy))
    t = 0
    while mdp.horizon is None or t < mdp.horizon:
        now = chain_last(policy if mdp.horizon is None else policy[:, t], 2)
        visits = state.unsqueeze(1) * now
        yield visits.movedim(-1, 0)
        state = mdp.transitions.flow(visits.flatten(0, 1))
        t += 1


def _step_of_policy(demos: Trajectories, acting: Bool[Tensor, "N T"], horizon: int) -> Int[Tensor, "N T"]:
    """Which step of a policy for ``horizon`` decisions each decision is."""
    step = torch.arange(acting.shape[1], device=acting.device).expand_as(acting)
    if demos.horizons is not None:
        step = step + horizon - torch.where(demos.horizons < 0, horizon, demos.horizons).unsqueeze(1)
    wrong = acting & ((step < 0) | (step >= horizon))
    if bool(wrong.any()):
        raise HorizonError(
            f"trajectory {int(wrong.nonzero()[0, 0])} goes beyond the {horizon} decisions that the policy is for"
        )
    return step


def _demonstrated_visits(mdp: TabularMDP, demos: Trajectories) -> Float[Tensor, "S A"]:
    """Mean over episodes of discounted visits, the no-op of a terminal state included."""
    table = demos.as_tensor()
    assert table is not None  # validation has looked at it
    state, action = table.unbind(-1)
    step = torch.arange(state.shape[1], device=state.device)
    ended = (state >= 0) & mdp.terminal[state.clamp_min(0)] & (step < _limits(mdp, demos).unsqueeze(1))
    counted = (action >= 0) | ended
    place = (state * mdp.num_actions + action.clamp_min(0))[counted]
    weight = (mdp.discount ** step.to(mdp.dtype)).expand(state.shape)[counted]
    visits = weight.new_zeros(mdp.log_prior.numel()).index_add(0, place, weight)
    return visits.reshape(mdp.log_prior.shape) / len(demos)


def _share_watched(mdp: TabularMDP, demos: Trajectories) -> list[float]:
    """g^(t-1) times the share of episodes that were watched at step t."""
    limits = _limits(mdp, demos)
    step = torch.arange(int(limits.max()), device=limits.device)
    share = (limits.unsqueeze(1) > step).to(mdp.dtype).mean(0)
    return (share * mdp.discount ** step.to(mdp.dtype)).tolist()


def _limits(mdp: TabularMDP, demos: Trajectories) -> Int[Tensor, " N"]:
    """For how many decisions each episode was watched, or would have been, had it not ended in a terminal state.

    Where nobody said so (``limits``), as long as the longest: by its own length, how it ended would be selected.
    """
    table = demos.as_tensor()
    assert table is not None
    last = table[..., 0].gather(1, demos.lengths.unsqueeze(1)).squeeze(1)
    ended = (last >= 0) & mdp.terminal[last.clamp_min(0)]
    told = torch.full_like(ended, demos.given_limits is not None)
    if demos.horizons is not None:
        told = told | (ended & (demos.horizons >= 0))
    longest = torch.maximum(demos.lengths.max(), torch.where(told, demos.limits, 0).max())
    limits = torch.where(ended & ~told, longest + int(ended.all()), demos.limits)
    if mdp.horizon is not None:
        limits = limits.clamp_max(mdp.horizon)
    return limits if demos.horizons is None else torch.where(demos.horizons < 0, limits, limits.minimum(demos.horizons))
