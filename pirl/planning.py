"""Plans without softness: optimal and given policies, most likely trajectories, stationary distributions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import (
    ConvergenceError,
    DiscountError,
    DivergenceError,
    HorizonError,
    InvalidPolicyError,
    InvalidRewardError,
    NotUnichainError,
    OptionError,
)
from pirl.soft_values import chain_first
from pirl.transitions import Dynamics, scatter_max, solve_system


class OptimalPolicy(NamedTuple):
    """A deterministic optimal plan; time (1..T) stands before S when the horizon is finite.

    Example:
        >>> plan = pirl.optimal_policy(mdp, truth)
        >>> plan.policy.shape, plan.value.shape, plan.action_value.shape
        (torch.Size([25, 5]), torch.Size([25]), torch.Size([25, 5]))
    """

    policy: Tensor
    """``[*batch, (T,) S, A]``, one-hot. Ties go to the action of the lowest number; where that would never
    end, though it must (discount 1, no horizon), to one on a shortest way to the end."""
    value: Tensor
    """``[*batch, (T,) S]``."""
    action_value: Tensor
    """``[*batch, (T,) S, A]``; -inf where an action is not available."""


class MostLikelyTrajectory(NamedTuple):
    """The mode of p(tau) exp(sum r).

    Example:
        >>> found = pirl.most_likely_trajectory(world, wanted)
        >>> found.states.shape, found.actions.shape
        (torch.Size([9]), torch.Size([8]))
    """

    states: Int[Tensor, "*batch L1"]
    """s_1 .. s_{L+1}; -1 after the end."""
    actions: Int[Tensor, "*batch L"]
    """a_1 .. a_L; -1 after the end."""
    log_weight: Float[Tensor, "*batch"]
    """log p(tau) + sum r of that trajectory, p(a|s) included, not divided by Z."""


def _rows(mdp: Dynamics, reward: Tensor) -> tuple[Float[Tensor, "S A C"], torch.Size]:
    reward = _finite_reward(mdp, reward)
    return reward.reshape(-1, *reward.shape[-2:]).movedim(0, -1), reward.shape[:-2]


def _finite_reward(mdp: Dynamics, reward: Tensor) -> Float[Tensor, "*batch S A"]:
    """What cannot be chosen may have any reward, and counts as 0."""
    reward, allowed = mdp.check_reward(reward), mdp.log_prior.isfinite()
    bad = ~reward.isfinite() & allowed
    if bool(bad.any()):
        *_, state, action = bad.nonzero()[0].tolist()
        raise InvalidRewardError(f"reward of state {state}, action {action} is NaN or infinite")
    return torch.where(allowed, reward, 0.0)


def optimal_policy(mdp: Dynamics, reward: Tensor) -> OptimalPolicy:
    """Bellman-optimal plan: backward induction (finite horizon) or policy iteration.

    With discount 1 and no horizon it is the best of the policies that end.

    Args:
        reward: r(s) or r(s,a), ``[*batch, S, A]``.

    Raises:
        InvalidRewardError: wrong shape, or NaN or infinite.
        DivergenceError: discount 1, no horizon, and some policy collects positive reward for ever.

    Example:
        >>> line = pirl.envs.gridworld(1, 3, slip=0.0, discount=0.5, initial=0)
        >>> pirl.optimal_policy(line, torch.tensor([0.0, 0.0, 1.0]).double()).value
        tensor([0.5000, 1.0000, 2.0000], dtype=torch.float64)
    """
    r, batch = _rows(mdp, reward)
    allowed = mdp.log_prior.isfinite().unsqueeze(-1)

    def look_ahead(value: Tensor) -> Tensor:
        q = r + mdp.discount * mdp.transitions.expect(value).reshape(r.shape)
        return torch.where(allowed, q, -torch.inf)

    if mdp.horizon is not None:
        values, qs = [torch.zeros_like(r[:, 0])], []
        for _ in range(mdp.horizon):
            qs.append(look_ahead(values[-1]))
            values.append(qs[-1].amax(1))
        q, value = torch.stack(qs[::-1]), torch.stack(values[:0:-1])
        policy = torch.nn.functional.one_hot(q.argmax(2), r.shape[1]).movedim(-1, 2).to(r.dtype)
        return OptimalPolicy(chain_first(policy, batch), chain_first(value, batch), chain_first(q, batch))
    # A proper start: mixing over every allowed action reaches a terminal state from anywhere.
    policy = allowed.to(r.dtype)  # first: booleans divide in the default dtype, which may be shorter
    policy = (policy / policy.sum(1, keepdim=True)).expand_as(r)
    largest = torch.where(allowed, r, 0.0).abs().flatten(0, 1).amax(0)
    previous = torch.full_like(r[:, 0], -torch.inf)
    for _ in range(10 * r.shape[0] + 100):
        value = _evaluate(mdp, policy, r)
        q = look_ahead(value)
        best = q.amax(1, keepdim=True)
        # Only a real improvement changes the plan, in action value and then in value: ties broken by rounding error
        # would cycle for ever.
        rounding = 64 * torch.finfo(r.dtype).eps * (largest + best.abs())
        chosen = (q * policy).nan_to_num(nan=0.0, neginf=0.0).sum(1, keepdim=True)
        rising = (value > previous + rounding.squeeze(1)).any(0)
        better, previous = (best > chosen + rounding) & rising, value
        if not bool(better.any()):
            first = _first(mdp, (q >= best - rounding) | (policy > 0)).to(r.dtype)
            return OptimalPolicy(chain_first(first, batch), chain_first(best.squeeze(1), batch), chain_first(q, batch))
        greedy = torch.nn.functional.one_hot(q.argmax(1), r.shape[1]).movedim(-1, 1).to(r.dtype)
        policy = torch.where(better, greedy, policy)
    raise ConvergenceError("policy iteration did not settle: values are too large for their differences to be seen")


def _first(mdp: Dynamics, tied: Bool[Tensor, "S A C"]) -> Int[Tensor, "S A C"]:
    """The tied action of the lowest number, one-hot; of those on a way to the end, where it would never end."""

    def lowest(pairs: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(pairs.to(torch.uint8).argmax(1), pairs.shape[1]).movedim(-1, 1)

    first = lowest(tied)
    if mdp.discount < 1:
        return first
    endless = (_next_to_end(mdp, first > 0) < 0).any(0)
    transitions, following = mdp.transitions, _next_to_end(mdp, tied)
    onward = (transitions.column.unsqueeze(-1) == following[transitions.state]).long()
    pair = transitions.row.unsqueeze(-1).expand_as(onward)
    leads = torch.zeros_like(first).flatten(0, 1).scatter_reduce(0, pair, onward, "amax").reshape(first.shape)
    return torch.where(endless, lowest(tied & ((leads > 0) | mdp.terminal[:, None, None])), first)


def _next_to_end(mdp: Dynamics, pairs: Bool[Tensor, "S A C"]) -> Int[Tensor, "S C"]:
    """Next state on a shortest way to an end by the given pairs only: -1 where there is none, S at the end."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order

    states = pairs.shape[0]
    state, column = mdp.transitions.state.cpu().numpy(), mdp.transitions.column.cpu().numpy()
    ends = mdp.terminal.nonzero().flatten().cpu().numpy()
    ways = []
    for used in pairs.flatten(0, 1)[mdp.transitions.row].t().cpu().numpy():
        # Backwards, from one extra node that all ends lead to.
        edge = (np.append(column[used], np.full(len(ends), states)), np.append(state[used], ends))
        graph = coo_matrix((np.ones(len(edge[0])), edge), shape=(states + 1, states + 1))
        _, following = breadth_first_order(graph.tocsr(), states)
        ways.append(torch.from_numpy(following[:-1].astype("int64")).clamp_min(-1))
    return torch.stack(ways, 1).to(pairs.device)


def _require_end(mdp: Dynamics, policy: Float[Tensor, "S A C"]) -> None:
    if mdp.discount == 1:
        endless = (_next_to_end(mdp, policy > 0) < 0).any(1)
        if bool(endless.any()):
            raise DivergenceError(
                f"the undiscounted sum diverges: from state {int(endless.nonzero()[0])} the policy never reaches a "
                "terminal state; discount, or add a horizon"
            )


def _evaluate(mdp: Dynamics, policy: Float[Tensor, "S A C"], r: Float[Tensor, "S A C"]) -> Float[Tensor, "S C"]:
    _require_end(mdp, policy)
    weight = mdp.discount * policy.flatten(0, 1)[mdp.transitions.row] * mdp.transitions.value.unsqueeze(-1)
    return solve_system(mdp.transitions, weight, torch.where(policy > 0, policy * r, 0.0).sum(1))


def policy_value(mdp: Dynamics, policy: Tensor, reward: Tensor, *, timed: bool | None = None) -> Tensor:
    """Expected return of a policy from each state: ``[*batch, S]``, or ``[*batch, T, S]`` by time when the horizon is
    finite.

    Args:
        policy: pi(a|s) ``[*batch, S, A]``, or ``[*batch, T, S, A]`` by time (finite horizon T only: a dimension of
            that size there is time). At terminal states it is ignored.
        reward: r(s) or r(s,a), ``[*batch, S, A]``; batch dimensions broadcast against the policy's.
        timed: whether the policy is one by time; by default its shape tells.

    Raises:
        InvalidPolicyError: rows that do not sum to 1, weight on actions that are not available, wrong shape; or T
            policies for T rewards, which may be one policy by time, without ``timed``.
        DivergenceError: discount 1 and the policy never ends.

    Example:
        >>> line = pirl.envs.gridworld(1, 3, slip=0.0, discount=0.5, initial=0)
        >>> always_right = torch.eye(5).double()[3].expand(3, 5)
        >>> pirl.policy_value(line, always_right, torch.tensor([0.0, 0.0, 1.0]).double())
        tensor([0.5000, 1.0000, 2.0000], dtype=torch.float64)
    """
    reward = _finite_reward(mdp, reward)
    fits = mdp.horizon is not None and policy.dim() >= 3 and policy.shape[-3] == mdp.horizon
    if timed is None:
        timed = fits
        if fits and policy.shape[:-2] == reward.shape[:-2]:
            raise InvalidPolicyError(
                f"policy {tuple(policy.shape)} may be by time, or a stationary one for each of {mdp.horizon} rewards: "
                "say timed=True or timed=False"
            )
    elif timed and not fits:
        raise InvalidPolicyError(
            f"policy {tuple(policy.shape)} is not by time: that is [*batch, T, S, A], T being the horizon {mdp.horizon}"
        )
    policy = _checked_policy(mdp, policy)
    event = 3 if timed else 2
    batch = torch.broadcast_shapes(reward.shape[:-2], policy.shape[:-event])
    r = reward.expand(*batch, *reward.shape[-2:]).reshape(-1, *reward.shape[-2:]).movedim(0, -1)
    pi = policy.expand(*batch, *policy.shape[-event:]).reshape(-1, *policy.shape[-event:]).movedim(0, -1)
    if mdp.horizon is None:
        return chain_first(_evaluate(mdp, pi, r), batch)
    values = [torch.zeros_like(r[:, 0])]
    for t in reversed(range(mdp.horizon)):
        q = r + mdp.discount * mdp.transitions.expect(values[-1]).reshape(r.shape)
        now = pi[t] if timed else pi
        values.append(torch.where(now > 0, now * q, 0.0).sum(1))
    return chain_first(torch.stack(values[:0:-1]), batch)


def _checked_policy(mdp: Dynamics, policy: Tensor) -> Tensor:
    states, actions = mdp.log_prior.shape
    if policy.dim() < 2 or policy.shape[-2:] != (states, actions):
        raise InvalidPolicyError(f"policy has shape {tuple(policy.shape)}; expected [*batch, {states}, {actions}]")
    no_op = torch.zeros_like(policy)
    no_op[..., 0] = 1.0
    policy = torch.where(mdp.terminal.unsqueeze(-1), no_op, policy)
    allowed = mdp.log_prior.isfinite()
    total = policy.sum(-1)
    tolerance = max(1e-8, 32 * torch.finfo(policy.dtype).eps)
    bad = ((total - 1).abs() > tolerance) | ~((policy >= 0) & (allowed | (policy == 0))).all(-1)
    if bool(bad.any()):
        raise InvalidPolicyError(
            f"policy of state {int(bad.nonzero()[0, -1])} is not a distribution over its available actions"
        )
    return policy


def discounted_occupancy(mdp: Dynamics, policy: Float[Tensor, "*batch S A"]) -> Float[Tensor, "*batch S A"]:
    """Expected discounted visits ``sum_t g^(t-1) P(s_t = s, a_t = a)`` of a stationary policy, from p(s_1); infinite
    or finite horizon.

    They sum to 1 / (1 - g) when nothing ends. The no-op of a terminal state counts once, on entry.

    Raises:
        InvalidPolicyError: as for :func:`policy_value`.
        DivergenceError: discount 1, no horizon, and from some state the policy never ends.

    Example:
        >>> line = pirl.envs.gridworld(1, 3, slip=0.0, discount=0.5, initial=0)
        >>> always_right = torch.eye(5).double()[3].expand(3, 5)
        >>> discounted_occupancy(line, always_right).sum(-1)
        tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    policy = _checked_policy(mdp, policy)
    batch = policy.shape[:-2]
    pi = policy.reshape(-1, *policy.shape[-2:]).movedim(0, -1)
    weight = mdp.initial.unsqueeze(-1).expand(-1, pi.shape[-1])
    if mdp.horizon is None:
        _require_end(mdp, pi)
        entries = mdp.discount * pi.flatten(0, 1)[mdp.transitions.row] * mdp.transitions.value.unsqueeze(-1)
        visits = solve_system(mdp.transitions, entries, weight, transpose=True)
        return chain_first(visits.unsqueeze(1) * pi, batch)
    visits = torch.zeros_like(weight)
    for _ in range(mdp.horizon):
        visits = visits + weight
        weight = mdp.discount * mdp.transitions.flow((weight.unsqueeze(1) * pi).flatten(0, 1))
    return chain_first(visits.unsqueeze(1) * pi, batch)


def most_likely_trajectory(mdp: Dynamics, reward: Tensor, *, max_length: int | None = None) -> MostLikelyTrajectory:
    """argmax over trajectories of p(tau) exp(sum r), by max-product message passing (Viterbi); p(a|s) counts.

    With deterministic dynamics and a given start this is the plan of highest reward; with chance it also picks the
    luck.

    Args:
        reward: r(s) or r(s,a), ``[*batch, S, A]``.
        max_length: for an infinite horizon with absorption, the longest path followed; S by default, which is always
            enough.

    Raises:
        InvalidRewardError: wrong shape, or NaN or infinite.
        DiscountError: p(tau) exp(sum r) knows no discount, and the MDP's is below 1.
        OptionError: ``max_length`` is not a positive whole number, or given beside a horizon.
        HorizonError: no trajectory of at most ``max_length`` decisions is the most likely one.
        DivergenceError: a cycle of positive weight: longer is always likelier.

    Example:
        >>> line = pirl.envs.gridworld(1, 3, slip=0.0, horizon=3, initial=0)
        >>> pirl.most_likely_trajectory(line, torch.tensor([0.0, 0.0, 1.0]).double()).states
        tensor([0, 1, 2, 2])
    """
    r, batch = _rows(mdp, reward)
    if mdp.discount < 1:
        raise DiscountError(
            f"the most likely trajectory knows no discount, and the MDP's is {mdp.discount:g}: "
            "use mdp.replace(discount=1.0), with a horizon or terminal states"
        )
    base = r + mdp.log_prior.unsqueeze(-1)
    if max_length is not None:
        if mdp.horizon is not None:
            raise OptionError(
                f"max_length is for problems without a horizon, and this one has {mdp.horizon}: leave it out"
            )
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise OptionError(f"max_length is {max_length!r}; it must be a whole number of decisions, at least 1")
    steps = mdp.horizon or max_length or r.shape[0]
    value, plan = _max_product(mdp, base)
    first = mdp.initial.log().unsqueeze(-1) + value
    chains = torch.arange(r.shape[-1], device=r.device)
    states, actions = [first.argmax(0)], []
    for t in range(steps):
        action, following = plan[-1] if mdp.horizon is None else plan[steps - 1 - t]
        now = states[-1]
        at = now.clamp_min(0)
        over = (now < 0) | mdp.terminal[at]
        actions.append(torch.where(over, -1, action[at, chains]))
        states.append(torch.where(over, -1, following[at, chains]))
    last = states[-1]
    if mdp.horizon is None and bool(((last >= 0) & ~mdp.terminal[last.clamp_min(0)]).any()):
        raise HorizonError(f"no terminal state was reached in max_length={steps} steps; raise it")
    result = torch.stack(states), torch.stack(actions)
    return MostLikelyTrajectory(
        chain_first(result[0], batch), chain_first(result[1], batch), first.amax(0).reshape(batch)
    )


def _max_product(mdp: Dynamics, base: Float[Tensor, "S A C"]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Log weight of the best way on ``[S, C]``, and its (action, next state) by decisions to go, or once for all."""
    transitions, (states, actions, chains) = mdp.transitions, base.shape
    log_value = transitions.value.log().unsqueeze(-1)
    ended = ~mdp.acts.reshape(-1, 1)

    def look_ahead(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        entry = log_value + value[transitions.column]
        best = scatter_max(entry, transitions.row, states * actions)
        attained = torch.where(entry == best[transitions.row], transitions.column.unsqueeze(-1), -1)
        index = transitions.row.unsqueeze(-1).expand_as(attained)
        successor = torch.full((states * actions, chains), -1, device=base.device).scatter_reduce(
            0, index, attained, "amax"
        )
        score, action = (base + torch.where(ended, 0.0, best).reshape(base.shape)).max(1)
        return score, action, successor.reshape(base.shape).gather(1, action.unsqueeze(1)).squeeze(1)

    if mdp.horizon is not None:
        value, plan = torch.zeros_like(base[:, 0]), []
        for _ in range(mdp.horizon):
            value, action, following = look_ahead(value)
            plan.append((action, following))
        return value, plan
    # A plan changes only for a real gain, so that cycles of weight 0 are never entered.
    largest = torch.cat([x[x.isfinite()].abs() for x in (base, log_value)]).amax()
    margin = 8 * torch.finfo(base.dtype).eps * states * (1 + largest)
    value = torch.full_like(base[:, 0], -torch.inf)
    action = following = torch.full(value.shape, -1, device=value.device)
    for _ in range(states + 1):
        score, chosen, successor = look_ahead(value)
        better = score > value + margin
        if not bool(better.any()):
            return value, [(action, following)]
        value = torch.where(better, score, value)
        action, following = torch.where(better, chosen, action), torch.where(better, successor, following)
    raise DivergenceError("a cycle of positive reward makes longer trajectories likelier without end; give a horizon")


def stationary_distribution(mdp: Dynamics, policy: Float[Tensor, "*batch S A"]) -> Float[Tensor, "*batch S"]:
    """The distribution that a policy's Markov chain keeps: d = d P_pi, by a direct solve.

    It is the limit of the normalised discounted occupancy as the discount goes to 1.

    Raises:
        NotUnichainError: more than one recurrent class, or terminal states.

    Example:
        >>> transition = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]], dtype=torch.float64)
        >>> two = pirl.TabularMDP(transition, initial=0, discount=0.9)
        >>> pirl.stationary_distribution(two, torch.ones(2, 1, dtype=torch.float64))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    if bool(mdp.terminal.any()):
        raise NotUnichainError(
            "terminal states end every episode: there is no stationary distribution; use discounted_occupancy"
        )
    policy = _checked_policy(mdp, policy)
    rows = policy.reshape(-1, *policy.shape[-2:])
    states = rows.shape[1]
    weight = rows.flatten(1)[:, mdp.transitions.row] * mdp.transitions.value
    chain = weight.new_zeros(len(rows), states * states)
    chain = chain.index_add(1, mdp.transitions.state * states + mdp.transitions.column, weight).reshape(
        -1, states, states
    )
    for number, matrix in enumerate(chain):
        classes = _recurrent_classes(matrix)
        if classes != 1:
            raise NotUnichainError(
                f"policy {number} has {classes} recurrent classes: its long run depends on the start"
            )
    # One balance equation is redundant; the normalisation takes its place.
    system = torch.eye(states, dtype=chain.dtype, device=chain.device) - chain.mT
    system[:, -1, :] = 1.0
    right = torch.zeros_like(system[:, :, :1])
    right[:, -1] = 1.0
    result = torch.linalg.solve(system, right).squeeze(-1)
    return result.reshape(*policy.shape[:-2], states)


def _recurrent_classes(matrix: Float[Tensor, "S S"]) -> int:
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    support = matrix.detach().cpu().numpy() > 0
    count, label = connected_components(csr_matrix(support), connection="strong")
    source, target = support.nonzero()
    leaves = np.unique(label[source[label[source] != label[target]]])
    return count - len(leaves)
