"""Distances between rewards: by what is lost on acting on the wrong one, or up to what rewards mean for behaviour."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import HorizonError, InvalidRewardError, OptionError
from pirl.identify import unidentified
from pirl.mdp import TabularMDP
from pirl.message_passing import soft_policy
from pirl.metrics.blocks import by_block, by_time
from pirl.planning import optimal_policy, policy_value
from pirl.soft_values import chain_first, chain_last

# A canonical reward this much (times epsilon) below the largest reward is rounding error of zero.
_ROUNDING = 2**14


def expected_value_difference(
    mdp: TabularMDP, truth: Tensor, reward: Tensor | None = None, *, policy: Tensor | None = None, soft: bool = False
) -> Float[Tensor, "*batch"]:
    """Return under the true reward that an agent loses who plans with an estimate, in units of reward.

    ``J(plan for the truth) - J(plan for the estimate)``, J the expected discounted return under the true reward from
    p(s_1) (Levine, Popovic and Koltun 2011, section 5). Never negative for optimal plans; with ``soft=True`` both plans
    are soft-optimal, and it may be, since an estimate on a larger scale plans with fewer mistakes.

    Args:
        truth: the true reward, r(s) or r(s,a), ``[*batch, S, A]``.
        reward: the estimate, likewise.
        policy: instead of a reward, pi(a|s) ``[*batch, S, A]``, or ``[*batch, T, S, A]`` by time when the horizon is T
            (a dimension of that size there is time).
        soft: compare soft-optimal policies of the causal reading.

    Raises:
        OptionError: not one of ``reward`` and ``policy``.
        InvalidRewardError, InvalidPolicyError, DivergenceError: as in :func:`pirl.policy_value`.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> expected_value_difference(mdp, torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[1.0, 0.0]]).double())
        tensor(3., dtype=torch.float64)
    """
    if (reward is None) == (policy is None):
        raise OptionError("give the estimate as a reward or as policy=, one of the two")
    truth = mdp.check_reward(truth)
    steps = mdp.horizon or 1

    def plan(estimate: Tensor) -> Tensor:
        return soft_policy(mdp, estimate).exp() if soft else optimal_policy(mdp, estimate).policy

    def gain(true: Tensor, followed: Tensor) -> Tensor:
        value = policy_value(mdp, followed, true, timed=mdp.horizon is not None)
        return (value if mdp.horizon is None else value[..., 0, :]) @ mdp.initial

    cost = 3 * steps * truth.shape[-2:].numel() + len(mdp.transitions.value)
    best = by_block(lambda true: gain(true, plan(true)), cost, (truth, 2))
    if policy is not None:
        followed = by_block(gain, cost, (truth, 2), by_time(mdp, policy))
    else:
        assert reward is not None
        followed = by_block(lambda true, r: gain(true, plan(r)), cost, (truth, 2), (mdp.check_reward(reward), 2))
    return best - followed


def epic_distance(
    problem: TabularMDP | float,
    first: Tensor,
    second: Tensor,
    *,
    coverage: Tensor | None = None,
    states: Tensor | None = None,
    actions: Tensor | None = None,
) -> Float[Tensor, "*batch"]:
    """EPIC: the Pearson distance of rewards freed of potentials, whatever the dynamics (Gleave et al. 2021).

    Zero where the rewards differ by a positive factor, a constant, and potential shaping ``g phi(s') - phi(s)``; 1
    where one is the other with the sign turned. The canonical form (definition 4.1)

        C(r)(s,a,s') = r(s,a,s') + E[g r(s',A,S') - r(s,A,S') - g r(S,A,S')],   S, S' ~ states, A ~ actions

    is standardised under the coverage distribution to u, and the distance is ``|u - v| / 2``, which is the root of
    ``(1 - correlation) / 2`` without its cancellation. A reward whose canonical form is constant has u = 0: two such
    are 0 apart, and 1/2 from any other.

    A reward r(s,a) has no shaping but by constants here; where the dynamics are known use :func:`starc_distance`.

    Args:
        problem: a decision problem, of which only the discount and sizes count, or the discount.
        first: ``[*batch, S, A, S']``, or r(s,a) ``[*batch, S, A]``, or with a decision problem r(s) ``[*batch, S, 1]``.
            Last dimensions (S, A, S) or (S, A, 1) are read as r(s,a,s').
        second: likewise.
        coverage: distribution over (s,a,s') ``[S, A, S']``; uniform by default.
        states: distribution of S and S' ``[S]``; uniform by default.
        actions: distribution of A ``[A]``; uniform by default.

    Raises:
        InvalidRewardError: shapes or types do not fit, or numbers are NaN or infinite.
        OptionError: a distribution that is none, or of the wrong shape; a discount outside [0, 1].

    Example:
        >>> r = torch.randn(4, 2, 4, dtype=torch.float64)
        >>> phi = torch.arange(4.0, dtype=torch.float64)
        >>> bool(epic_distance(0.9, r, 3 * r + 0.9 * phi - phi[:, None, None]) < 1e-10)
        True
    """
    discount = problem.discount if isinstance(problem, TabularMDP) else float(problem)
    if not 0 <= discount <= 1:
        raise OptionError(f"discount is {discount}; it must lie in [0, 1]")
    first, second = _transition_reward(problem, first), _transition_reward(problem, second)
    if first.shape[-3:-1] != second.shape[-3:-1] or first.dtype != second.dtype or first.device != second.device:
        raise InvalidRewardError(
            f"rewards {first.dtype} {tuple(first.shape)} on {first.device} and {second.dtype} {tuple(second.shape)} on "
            f"{second.device} cannot be compared: give both the same states, actions, dtype and device"
        )
    num_states, num_actions = first.shape[-3:-1]
    table = (num_states, num_actions, num_states)
    weight = _distribution(coverage, table, "coverage", first)
    state, action = (
        _distribution(states, table[:1], "states", first),
        _distribution(actions, table[1:2], "actions", first),
    )

    # Uniform coverage of r(s,a): its two terms, of (s,a) and of s', are independent, and need no table of (s,a,s').
    apart = coverage is None and first.shape[-1] == second.shape[-1] == 1

    def standard(reward: Tensor) -> Tensor:
        """u, times the root of each entry's weight."""
        if apart:
            mean = reward.squeeze(-1) @ action
            terms = [(reward.squeeze(-1) - mean.unsqueeze(-1)).flatten(-2), discount * mean]
            centred = torch.cat([(x - x.mean(-1, keepdim=True)) / x.shape[-1] ** 0.5 for x in terms], -1)
        else:
            reward = reward.expand(*reward.shape[:-1], num_states)
            mean = torch.einsum("...sat,a,t->...s", reward, action, state)  # E r(s, A, S')
            form = reward - mean[..., :, None, None] + discount * mean[..., None, None, :]
            centred = (form - (form * weight).sum((-3, -2, -1), keepdim=True)) * weight.sqrt()
        return _unit(centred.flatten(1), reward)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(standard(a) - standard(b), dim=-1) / 2

    cost = 4 * num_states * num_actions * (1 if apart else num_states)
    return by_block(distance, cost, (first, 3), (second, 3)).clamp_max(1.0)


def starc_distance(
    mdp: TabularMDP, first: Tensor, second: Tensor, *, canonical: str = "projection"
) -> Float[Tensor, "*batch"]:
    """A STARC metric of rewards r(s,a) under known dynamics (Skalse et al. 2023).

    Zero if and only if the rewards order all policies alike, that is where they differ by a positive factor and
    expected shaping ``phi(s) - g sum_s' P(s'|s,a) phi(s')``; 1 where one is the other with the sign turned. Each
    reward is freed of potentials, divided by its Euclidean norm to u, and the distance is ``|u - v| / 2``. Pairs that
    no episode contains do not count. A reward that is all potential, under which all policies are alike, has u = 0:
    two such are 0 apart, and 1/2 from any other.

    Args:
        first: r(s) or r(s,a), ``[*batch, S, A]`` (of r(s,a,s') take :func:`pirl.expected_reward` first).
        second: likewise.
        canonical: "projection", the smallest reward with the same meaning (their minimal form; with a horizon, the part
            that :func:`pirl.identify.unidentified` leaves), or "value", ``r - V + g P V`` with V the value of the
            uniform policy (their value-adjusted levelling; infinite horizon only).

    Raises:
        InvalidRewardError: shapes or types do not fit, or numbers are NaN or infinite.
        HorizonError: "value" with a horizon.
        OptionError: there is no such canonical form.
        MemoryLimitError: the projection is too large; use "value".

    Example:
        >>> mdp = pirl.envs.random_mdp(5, 2)
        >>> r, phi = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        >>> shaped = 2 * r + phi[:, None] - 0.9 * mdp.transition @ phi
        >>> bool(starc_distance(mdp, r, shaped) < 1e-10)
        True
    """
    first, second = _finite(mdp.check_reward(first)), _finite(mdp.check_reward(second))
    visible = mdp.log_prior.isfinite() & mdp.reachable.unsqueeze(-1)
    if canonical == "projection":
        project = unidentified(mdp).identified
    elif canonical == "value":
        if mdp.horizon is not None:
            raise HorizonError("canonical='value' has no stationary form with a horizon: use canonical='projection'")
        uniform = mdp.log_prior.isfinite().to(mdp.dtype)
        uniform = uniform / uniform.sum(1, keepdim=True)

        def project(parameters: Tensor) -> Tensor:
            value = policy_value(mdp, uniform, parameters)
            following = mdp.transitions.expect(chain_last(value, 1))
            return (
                parameters
                - value.unsqueeze(-1)
                + mdp.discount * chain_first(following.unflatten(0, visible.shape), value.shape[:-1])
            )
    else:
        raise OptionError(f"canonical must be 'projection' or 'value', not {canonical!r}")

    def standard(reward: Tensor) -> Tensor:
        reward = torch.where(visible, reward, 0.0)
        form = torch.where(visible, project(reward), 0.0)
        return _unit(form.flatten(1), reward)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(standard(a) - standard(b), dim=-1) / 2

    cost = 6 * visible.numel() + len(mdp.transitions.value)
    return by_block(distance, cost, (first, 2), (second, 2)).clamp_max(1.0)


def _unit(form: Float[Tensor, "C n"], reward: Tensor) -> Float[Tensor, "C n"]:
    """``form`` divided by its length; 0 where it is rounding error of the reward that it was made of."""
    size = torch.linalg.vector_norm(form, dim=-1, keepdim=True)
    largest = reward.flatten(1).abs().amax(1, keepdim=True)
    zero = size <= _ROUNDING * torch.finfo(form.dtype).eps * largest
    return torch.where(zero, 0.0, form / torch.where(zero, 1.0, size))


def _finite(reward: Tensor) -> Tensor:
    if not reward.is_floating_point() or not bool(reward.isfinite().all()):
        raise InvalidRewardError(f"a reward ({reward.dtype}) is not floating, or NaN or infinite somewhere")
    return reward


def _transition_reward(problem: TabularMDP | float, reward: Tensor) -> Float[Tensor, "*batch S A T"]:
    """``[*batch, S, A, S]`` or ``[*batch, S, A, 1]``."""
    if reward.dim() >= 3 and reward.shape[-1] in (1, reward.shape[-3]):
        table = tuple(reward.shape[-3:-1])
        if not isinstance(problem, TabularMDP) or table == tuple(problem.log_prior.shape):
            return _finite(reward)
    if isinstance(problem, TabularMDP):
        reward = problem.check_reward(reward)
    if reward.dim() < 2:
        raise InvalidRewardError(
            f"reward has shape {tuple(reward.shape)}; expected [*batch, S, A, S] or [*batch, S, A]"
        )
    return _finite(reward).unsqueeze(-1)


def _distribution(given: Tensor | None, shape: tuple[int, ...], name: str, like: Tensor) -> Tensor:
    if given is None:
        return like.new_full(shape, 1.0 / torch.Size(shape).numel())
    if tuple(given.shape) != shape or not bool((given >= 0).all()) or abs(float(given.sum()) - 1) > 1e-6:
        raise OptionError(f"{name} must be a distribution of shape {list(shape)} that sums to 1")
    return given.to(like)
