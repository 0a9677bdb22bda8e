"""Expected discounted visits: those of demonstrations, of policies, and the policies that have given ones.

Visits are ``sum_t g^(t-1) P(s_t = s, a_t = a)``, ``[S, A]``, or by time ``[T, S, A]`` (without the sum) where the
horizon is finite. A terminal state takes its no-op, action 0, once, on entry.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.baselines.cloning import cloning
from pirl.errors import HorizonError, InvalidRewardError, InvalidTrajectoriesError, OptionError
from pirl.mdp import TabularMDP
from pirl.planning import discounted_occupancy, optimal_policy
from pirl.trajectories import Trajectories

# A share of all visits below which a place counts as not visited: linear solves leave some 1e-16 where there are none.
_UNVISITED = 1e-12


def feature_table(features: Tensor, mdp: TabularMDP) -> Float[Tensor, "S A K"]:
    """Features ``[S, K]`` of states or ``[S, A, K]`` of pairs as features of pairs.

    Raises:
        InvalidRewardError: another shape, dtype or device than the MDP's, or entries that are NaN or infinite.
    """
    states, actions = mdp.num_states, mdp.num_actions
    if not isinstance(features, Tensor) or features.dtype != mdp.dtype or features.device != mdp.device:
        raise InvalidRewardError(f"features must be a tensor of {mdp.dtype} on {mdp.device}, as the MDP's tables are")
    if features.dim() not in (2, 3) or features.shape[:-1] not in ((states,), (states, actions)):
        raise InvalidRewardError(
            f"features have shape {tuple(features.shape)}; expected [{states}, K] or [{states}, {actions}, K]"
        )
    if not bool(features.isfinite().all()):
        raise InvalidRewardError("features contain NaN or infinite entries")
    return features.unsqueeze(1).expand(-1, actions, -1) if features.dim() == 2 else features


def tally(demos: Trajectories, mdp: TabularMDP, discount: float) -> Float[Tensor, "*T S A"]:
    """Sum over episodes of ``discount^(t-1)`` at the pair of each observed step t."""
    states = demos.states
    actions = torch.nn.functional.pad(demos.actions, (0, 1), value=-1)
    ended = (states >= 0) & mdp.terminal[states.clamp_min(0)]
    actions = torch.where(ended, 0, actions)
    time = torch.arange(states.shape[1], device=states.device).expand_as(states)
    seen = (actions >= 0) & (time < (mdp.horizon or states.shape[1]))
    row = time[seen] if mdp.horizon else torch.zeros_like(time[seen])
    table = mdp.initial.new_zeros(mdp.horizon or 1, mdp.num_states, mdp.num_actions)
    weight = discount ** time[seen].to(mdp.dtype)
    table.index_put_((row, states[seen], actions[seen]), weight, accumulate=True)
    return table if mdp.horizon else table[0]


def demonstrated_visits(demos: Trajectories, mdp: TabularMDP, tail: str = "cloned") -> Float[Tensor, "*T S A"]:
    """Average over episodes of the discounted visits (Abbeel and Ng 2004, section 3, the estimate of mu_E).

    An episode that we stopped watching went on. With ``tail="cloned"`` it goes on as the demonstrators of all episodes
    acted where they came to the same state (:func:`cloning`), by the action prior where nobody came; what is filled in
    has weight g^L of an episode of L decisions. With ``tail="none"`` nothing follows, which is off by up to g^L /
    (1 - g) visits.

    Raises:
        InvalidTrajectoriesError: no decision at all, or an episode that was cut off in a problem with neither discount
            nor horizon, unless ``tail="none"``.
        HorizonError: an episode has a horizon of its own that is not the MDP's.
        OptionError: an unknown ``tail``.
    """
    if tail not in ("cloned", "none"):
        raise OptionError(f"tail must be 'cloned' or 'none', not {tail!r}")
    demos.validate(mdp)
    own = demos.horizons
    if own is not None and bool(((own >= 0) & (own != (mdp.horizon or -1))).any()):
        raise HorizonError(
            f"an episode has a horizon of its own, but plans are made for that of the MDP: {mdp.horizon}"
        )
    seen = tally(demos, mdp, mdp.discount)
    if not bool((seen > 0).any()):
        raise InvalidTrajectoriesError("there is no decision in the demonstrations: nothing to learn from")
    entering = _cut_off(demos, mdp) if tail == "cloned" else torch.zeros_like(seen[..., 0])
    if bool((entering > 0).any()):
        if mdp.discount == 1.0 and mdp.horizon is None:
            raise InvalidTrajectoriesError(
                "an episode stops before a terminal state, and without discount and horizon nobody knows how much "
                "follows: leave it out, give a horizon, or use tail='none'"
            )
        seen = seen + _continued(demos, mdp, entering)
    return seen / (demos.starts >= 0).sum()


def _cut_off(demos: Trajectories, mdp: TabularMDP) -> Float[Tensor, "*T S"]:
    """Discounted weight of episodes that went on unseen, at the state (and time) where they did."""
    states, actions, length = demos.states, demos.actions, demos.lengths
    last = states.gather(1, length.unsqueeze(1)).squeeze(1)
    missing = last < 0
    went_on = (demos.starts >= 0) & (missing | ~mdp.terminal[last.clamp_min(0)]) & (length < (mdp.horizon or torch.inf))
    weight = mdp.discount ** length.to(mdp.dtype)
    entering = mdp.initial.new_zeros(mdp.horizon or 1, mdp.num_states)
    row = length if mdp.horizon else torch.zeros_like(length)
    known, unknown = went_on & ~missing, (went_on & missing).nonzero().flatten()
    entering.index_put_((row[known], last[known]), weight[known], accumulate=True)
    final = length[unknown] - 1
    position, entry = mdp.transitions.rows(states[unknown, final] * mdp.num_actions + actions[unknown, final])
    transitions, episode = mdp.transitions, unknown[position]
    entering.index_put_(
        (row[episode], transitions.column[entry]), weight[episode] * transitions.value[entry], accumulate=True
    )
    return entering if mdp.horizon else entering[0]


def _continued(demos: Trajectories, mdp: TabularMDP, entering: Float[Tensor, "*T S"]) -> Float[Tensor, "*T S A"]:
    policy = cloning(demos, mdp, smoothing=0.0).log_policy.exp()
    if mdp.horizon is None:
        total = entering.sum()
        return discounted_occupancy(mdp.replace(initial=entering / total), policy) * total
    return _forward(mdp, policy.expand(mdp.horizon, -1, -1), entering)


def from_starts(demos: Trajectories, mdp: TabularMDP, starts: str) -> TabularMDP:
    """The same problem, begun where the demonstrations begin.

    Raises:
        OptionError: an unknown ``starts``.
    """
    if starts not in ("demonstrations", "initial"):
        raise OptionError(f"starts must be 'demonstrations' or 'initial', not {starts!r}")
    if starts == "initial":
        return mdp
    count = torch.bincount(demos.starts[demos.starts >= 0], minlength=mdp.num_states).to(mdp.dtype)
    return mdp.replace(initial=count / count.sum())


def policy_visits(mdp: TabularMDP, policy: Float[Tensor, "*policy S A"]) -> Float[Tensor, "*policy S A"]:
    """Visits of policies ``[*batch, S, A]`` (no horizon), or by time ``[*batch, T, S, A]``."""
    if mdp.horizon is None:
        return discounted_occupancy(mdp, policy)
    first = torch.zeros_like(policy[..., 0])
    first[..., 0, :] = mdp.initial
    return _forward(mdp, policy, first)


def _forward(
    mdp: TabularMDP, policy: Float[Tensor, "*batch T S A"], entering: Float[Tensor, "*batch T S"]
) -> Float[Tensor, "*batch T S A"]:
    """Visits by time of all that enters at some time and follows the policy from there."""
    weight, steps = torch.zeros_like(entering[..., 0, :]), []
    for t in range(policy.shape[-3]):
        weight = weight + entering[..., t, :]
        steps.append(weight.unsqueeze(-1) * policy[..., t, :, :])
        flow = mdp.transitions.flow(steps[-1].reshape(-1, mdp.num_states * mdp.num_actions).t())
        weight = mdp.discount * flow.t().reshape(weight.shape)
    return torch.stack(steps, -3)


def in_total(visits: Tensor, mdp: TabularMDP) -> Float[Tensor, "*batch S A"]:
    """Visits summed over time."""
    return visits if mdp.horizon is None else visits.sum(-3)


def visiting_policy(visits: Float[Tensor, "*T S A"], otherwise: Float[Tensor, "*T S A"]) -> Float[Tensor, "*T S A"]:
    """The policy ``visits(s,a) / visits(s)``, the only Markov one that has these visits; ``otherwise`` elsewhere."""
    visits = visits.clamp_min(0.0)
    total = visits.sum(-1, keepdim=True)
    visited = total > _UNVISITED * visits.sum()
    return torch.where(visited, visits / total.where(visited, torch.ones_like(total)), otherwise)


def best_plan(mdp: TabularMDP, reward: Float[Tensor, "*T S A"]) -> Float[Tensor, "*time S A"]:
    """A deterministic optimal policy, by time with a finite horizon; then the reward may depend on time as well."""
    if reward.dim() == 2:
        return optimal_policy(mdp, reward).policy
    allowed, value, plan = mdp.log_prior.isfinite(), torch.zeros_like(reward[0, :, :1]), []
    for now in reward.flip(0):
        q = now + mdp.discount * mdp.transitions.expect(value).reshape(now.shape)
        value, action = torch.where(allowed, q, -torch.inf).max(1, keepdim=True)
        plan.append(torch.zeros_like(now).scatter_(1, action, 1.0))
    return torch.stack(plan[::-1])
