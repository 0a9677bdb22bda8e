"""Apprenticeship learning (Abbeel and Ng 2004): a reward under which the demonstrator beats every policy found so far.

Source: P. Abbeel and A. Y. Ng, "Apprenticeship learning via inverse reinforcement learning", ICML 2004.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.baselines.estimate import PointEstimate, check_problem
from pirl.baselines.programs import cvxpy, solve
from pirl.baselines.visits import (
    best_plan,
    demonstrated_visits,
    feature_table,
    from_starts,
    in_total,
    policy_visits,
    visiting_policy,
)
from pirl.errors import ConvergenceError, ConvergenceWarning, InvalidPolicyError, InvalidRewardError, OptionError, warn
from pirl.mdp import TabularMDP
from pirl.rewards import linear_reward
from pirl.trajectories import Trajectories

# Shares below this are a solver's rounding.
_NO_SHARE = 1e-10

Mixer = Callable[[Float[Tensor, " K"], Float[Tensor, "M K"], Float[Tensor, " L"]], tuple[Tensor, Tensor]]
"""(demonstrator's features, the policies', shares of all but the last) -> (weights psi, shares of all)."""


def max_margin(
    demos: Trajectories | None,
    mdp: TabularMDP,
    features: Tensor,
    *,
    method: str = "quadratic",
    epsilon: float = 1e-2,
    max_iterations: int = 1000,
    initial_policy: Tensor | None = None,
    feature_expectations: Tensor | None = None,
    starts: str = "demonstrations",
    tail: str = "cloned",
) -> PointEstimate:
    """Mixture of optimal policies that has the demonstrator's feature expectations, and the last reward on the way.

    A policy's feature expectations are mu = E[sum_t g^(t-1) f(s_t,a_t)] (section 2, eq. 2-4). Each iteration finds the
    weights psi of norm 1 at least, under which the demonstrator is better by the widest margin than any mixture of the
    policies found so far, and adds the policy that is optimal for the reward psi'f (section 3). It stops

    - when some mixture's features are within ``epsilon`` of the demonstrator's, so that under every reward psi'f with
      ``|psi| <= 1`` it is worth as much to within ``epsilon`` (eq. 6-9); or
    - when psi proves that no policy's are: psi'mu_E - max psi'mu bounds the distance from below; and the mixture's are
      nearest to within ``epsilon``. That happens with features estimated from few demonstrations.

    Methods:

    - ``"quadratic"``: maximise t subject to psi'(mu_E - mu_j) >= t, ``|psi|_2 <= 1`` (eq. 10-12), a second-order cone
      program. Its multipliers solve the dual, min ``|mu_E - sum_j share_j mu_j|`` over the simplex, which is the
      mixing program of section 3. Needs the extra "baselines".
    - ``"projection"``: psi points from the orthogonal projection mubar of mu_E, onto the line through the last mubar
      and the last mu, to mu_E (section 3.1); mubar is a mixture's. No solver, but where mu_E lies among the mixtures
      of several policies, iterations grow as 1 / epsilon or faster, while the program's do not.

    Args:
        demos: demonstrations; None where ``feature_expectations`` are given.
        features: ``[S, K]`` or ``[S, A, K]``.
        epsilon: as above, in units of feature expectations.
        max_iterations: most policies to be found.
        initial_policy: the first policy ``[S, A]``, or ``[T, S, A]`` by time; by default the action prior.
        feature_expectations: the demonstrator's ``[K]``, discounted, from p(s_1); instead of an estimate.
        starts: where policies start: where the demonstrations do, so that features do not differ by the luck of the
            start; or at "initial", p(s_1). Given feature expectations are always from p(s_1).
        tail: what follows an episode that was cut off: "cloned", what demonstrators did where they came to the same
            state, and the action prior where nobody came; or "none", which is off by up to g^L / (1 - g) visits.

    Returns:
        A :class:`PointEstimate`: "weights" ``[K]``, of all psi the one under which the demonstrator is nearest to
        optimal, with the largest psi'mu_E - max psi'mu (0 where the first policy matched already). The method promises
        nothing of that reward, though: its answer is the mixture. ``mixture`` holds the policies and their shares; one
        of them is drawn for a whole episode. ``log_policy`` is the one Markov policy with the mixture's visits, sum_j
        share_j mu_j(s,a) over the same sum at s: state by state (and time by time) it acts as the mixture does on
        average, and has its feature expectations. Policies are deterministic: what none of them does has
        log-probability -inf.
        ``history``: "margin" ``|mu_E - mixture's|``, which never rises, and "bound", what it cannot fall below.
        ``attrs``: "matched" (within ``epsilon``), "distance", "converged" (either way), "iterations", "seconds".

    Raises:
        OptionError: an unknown method, or an option out of range.
        InvalidRewardError: features or feature expectations do not fit the MDP.
        InvalidPolicyError: nor does the initial policy.
        InvalidTrajectoriesError: demonstrations are empty, impossible, or cannot be completed.
        DivergenceError: without discount and horizon, some reward would be collected for ever.
        MissingDependencyError: the quadratic method without cvxpy and clarabel.

    Warns:
        ConvergenceWarning: ``max_iterations`` were not enough.

    Example:
        >>> mdp = pirl.envs.gridworld(3, 3, slip=0.0, discount=0.9, initial=0)
        >>> demos = pirl.Trajectories(states=[[0, 1, 2, 2]], actions=[[3, 3, 4]])
        >>> max_margin(demos, mdp, torch.eye(9).double(), method="projection").attrs["matched"]
        True
    """
    if demos is not None:
        check_problem(demos, mdp)
    if method not in _MIXERS:
        raise OptionError(f"method must be 'quadratic' or 'projection', not {method!r}")
    if not epsilon > 0:
        raise OptionError(f"epsilon is {epsilon}, but must be above 0")
    if max_iterations < 1:
        raise OptionError(f"max_iterations is {max_iterations}, but must be at least 1")
    begun = time.perf_counter()
    mix, table = _MIXERS[method](), feature_table(features, mdp)
    if feature_expectations is not None:
        target = _given(feature_expectations, table)
    elif demos is not None:
        target = _expectations(in_total(demonstrated_visits(demos, mdp, tail), mdp), table)
        mdp = from_starts(demos, mdp, starts)
    else:
        raise OptionError("give demonstrations, or feature_expectations")

    policies = [_first_policy(mdp, initial_policy)]
    visits = [policy_visits(mdp, policies[0])]
    found = [_expectations(in_total(visits[0], mdp), table)]
    shares, weights = target.new_zeros(0), torch.zeros_like(target)
    history: dict[str, list[float]] = {"margin": [], "bound": []}
    lowest, done = -float("inf"), False
    while True:
        psi, shares = mix(target, torch.stack(found), shares)
        distance = float(torch.linalg.vector_norm(target - shares @ torch.stack(found)))
        history["margin"].append(distance)
        if matched := distance <= epsilon:
            history["bound"].append(max(lowest, 0.0))
            break
        policy = best_plan(mdp, mdp.check_reward(linear_reward(features, psi)))
        policies.append(policy)
        visits.append(policy_visits(mdp, policy))
        found.append(_expectations(in_total(visits[-1], mdp), table))
        if (bound := float(psi @ (target - found[-1]))) > lowest:
            lowest, weights = bound, psi
        history["bound"].append(max(lowest, 0.0))
        if done := lowest > epsilon and distance - lowest <= epsilon:
            break
        if len(history["margin"]) >= max_iterations:
            warn(
                f"max_margin: the margin is {distance:.3g} after {max_iterations} iterations, above epsilon = "
                f"{epsilon:g}; allow more iterations, or a larger epsilon",
                ConvergenceWarning,
            )
            break

    kept = (shares > 0).nonzero().flatten().tolist()
    shares = shares[kept]
    mixed = torch.stack([policies[j] for j in kept])
    weight = shares.reshape(-1, *[1] * (mixed.dim() - 1))
    mean_visits = (weight * torch.stack([visits[j] for j in kept])).sum(0)
    return PointEstimate(
        name="max_margin",
        parameters={"weights": weights},
        reward=linear_reward(features, weights),
        log_policy=visiting_policy(mean_visits, otherwise=(weight * mixed).sum(0)).log(),
        history=history,
        attrs={
            "method": method, "epsilon": float(epsilon), "converged": matched or done, "matched": matched,
            "distance": distance, "iterations": len(history["margin"]), "seconds": time.perf_counter() - begun,
        },
        mixture=(shares, mixed),
    )  # fmt: skip


def _expectations(visits: Float[Tensor, "S A"], table: Float[Tensor, "S A K"]) -> Float[Tensor, " K"]:
    return torch.einsum("sa,sak->k", visits, table)


def _given(expectations: Tensor, table: Float[Tensor, "S A K"]) -> Float[Tensor, " K"]:
    if expectations.shape != table.shape[-1:] or expectations.dtype != table.dtype:
        raise InvalidRewardError(
            f"feature_expectations are {expectations.dtype} {tuple(expectations.shape)}; expected {table.dtype} "
            f"[{table.shape[-1]}]"
        )
    if not bool(expectations.isfinite().all()):
        raise InvalidRewardError("feature_expectations contain NaN or infinite entries")
    return expectations


def _first_policy(mdp: TabularMDP, given: Tensor | None) -> Float[Tensor, "*T S A"]:
    policy = mdp.log_prior.exp() if given is None else given
    shape = mdp.log_prior.shape if mdp.horizon is None else (mdp.horizon, *mdp.log_prior.shape)
    if policy.shape not in (shape, shape[-2:]) or policy.dtype != mdp.dtype:
        raise InvalidPolicyError(
            f"initial_policy is {policy.dtype} {tuple(policy.shape)}; expected {mdp.dtype} {tuple(shape)}"
        )
    total = policy.sum(-1, keepdim=True)
    tolerance = max(1e-8, 32 * torch.finfo(policy.dtype).eps)
    if given is not None and not bool(
        (policy >= 0).all() & ((total - 1).abs() <= tolerance).all() & ((policy == 0) | mdp.log_prior.isfinite()).all()
    ):
        raise InvalidPolicyError("initial_policy is not a distribution over the available actions of every state")
    return (policy / total).expand(shape)


class _Quadratic:
    """Widest margin by a cone program over all policies found."""

    def __init__(self) -> None:
        self.cp = cvxpy()

    def __call__(self, target: Tensor, found: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        ahead = target - found
        scale = float(ahead.abs().max())
        if scale == 0.0:
            return torch.zeros_like(target), torch.ones_like(found[:, 0]) / len(found)
        cp = self.cp
        psi, margin = cp.Variable(len(target)), cp.Variable()
        better = (ahead / scale).double().cpu().numpy() @ psi >= margin
        program = cp.Problem(cp.Maximize(margin), [better, cp.norm(psi, 2) <= 1])
        if not solve(program):
            raise ConvergenceError("the widest margin was not found: the solver calls its program infeasible")
        weights = torch.as_tensor(psi.value).to(target)
        new_shares = torch.as_tensor(better.dual_value).to(target)
        new_shares = torch.where(new_shares > _NO_SHARE, new_shares, 0.0)
        return weights / torch.linalg.vector_norm(weights).clamp_min(1e-300), new_shares / new_shares.sum()


class _Projection:
    """Projection of the demonstrator's features onto the segment from the last mixture's to the last policy's."""

    def __call__(self, target: Tensor, found: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        if len(found) == 1:
            shares = torch.ones_like(found[:, 0])
        else:
            mean = shares @ found[:-1]
            step = found[-1] - mean
            # A step beyond 1 would leave the mixtures; it is never asked for where mu_E is some policy's.
            length = float((step @ (target - mean) / (step @ step)).clamp(0.0, 1.0))
            shares = torch.cat([(1 - length) * shares, shares.new_tensor([length])])
        ahead = target - shares @ found
        return ahead / torch.linalg.vector_norm(ahead).clamp_min(1e-300), shares


_MIXERS: dict[str, Callable[[], Mixer]] = {"quadratic": _Quadratic, "projection": _Projection}
