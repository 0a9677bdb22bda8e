"""Maximum margin planning (Ratliff, Bagnell and Zinkevich 2006): the demonstrator wins by more, the worse the rival.

Source: N. D. Ratliff, J. A. Bagnell and M. A. Zinkevich, "Maximum margin planning", ICML 2006.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    tally,
    visiting_policy,
)
from pirl.errors import ConvergenceWarning, InvalidPolicyError, InvalidRewardError, OptionError, warn
from pirl.mdp import TabularMDP
from pirl.planning import optimal_policy
from pirl.rewards import linear_reward
from pirl.trajectories import Trajectories

# Rounds of a local search: each is an exact plan, and a vertex is rarely more than a few from the best one near it.
_MAX_ROUNDS = 100
# Of the policies that it knows, a local search keeps this many, and starts again from the worst rivals among them.
_KNOWN, _RECENT = 2000, 8


def maximum_margin_planning(
    demos: Trajectories | None,
    mdp: TabularMDP,
    features: Tensor,
    *,
    loss: str | Tensor | Callable[[Tensor], Tensor] = "hamming",
    slack_cost: float = 1.0,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    visits: Tensor | None = None,
    starts: str = "demonstrations",
    tail: str = "cloned",
    num_starts: int = 16,
    seed: int = 0,
) -> PointEstimate:
    """Smallest weights for which the demonstrator beats every policy pi by a margin D that grows with pi's difference.

    With E*f the demonstrator's feature expectations and E_pi f a policy's, both discounted (the source writes F mu for
    them, l'mu for D, and costs for rewards; its sum over examples has one term here, all episodes of one MDP):

        minimise  |psi|^2 / 2 + C slack    subject to    psi'E*f + slack >= psi'E_pi f + D(pi) for all pi,  slack >= 0

    There are as many constraints as policies, so they are added one by one, the most violated first, which is found by
    planning for the loss-augmented reward; a quadratic program with those found so far gives the next psi
    (cutting planes: each objective is a lower bound on the final one). All hold to ``tolerance`` in the end.

    Losses D, of a policy's discounted visits mu:

    - ``"hamming"``: expected visits in which the policy does other than the demonstrator: sum mu(s,a) l(s,a) with
      l = 1 - the share of the demonstrator's decisions at s (and t, with a finite horizon) that were a; 1 where the
      demonstrator never was. The augmented reward is psi'f + l, so the search is exact. Slack takes up what no
      weights can mend: a demonstrator that does not always do the same somewhere, or actions that differ in no
      feature, such as bumping into a wall and staying.
    - a tensor l ``[S, A]``, or ``[T, S, A]`` by time: any other loss that is linear in visits; also exact.
    - ``"features"``: ``|E*f - E_pi f|_2``.
    - a function of visits ``[S, A]`` (summed over time) that gives one number, convex and differentiable: max psi'f mu
      + D is then attained by a deterministic policy, but need not be the only local maximum. Each search repeats an
      exact plan for the loss linearised at the visits found, which never gets worse, from several starts: the
      linearisations at the worst rivals known, and at optimal policies of ``num_starts`` random rewards, new ones each
      time, and of minus these. "features" is solved likewise, with random rewards of those features. It is a *local*
      search: a constraint that it misses is not imposed, and more starts miss less.

    Args:
        demos: demonstrations; None where ``visits`` are given.
        features: ``[S, K]`` or ``[S, A, K]``.
        slack_cost: C, the price of a unit of slack. ``math.inf`` allows none: right for an optimal demonstrator.
        tolerance: largest violation of any constraint, in units of the loss.
        max_iterations: most constraints.
        visits: the demonstrator's discounted visits from p(s_1), ``[S, A]``, or ``[T, S, A]`` by time with a finite
            horizon; instead of an estimate.
        starts: where policies start: where the demonstrations do, or at "initial", p(s_1).
        tail: what follows an episode that was cut off: "cloned", what demonstrators did where they came to the same
            state, and the action prior where nobody came; or "none", which is off by up to g^L / (1 - g) visits.
        num_starts: random starts of a local search.
        seed: of those.

    Returns:
        A :class:`PointEstimate`: "weights" ``[K]``; ``log_policy`` of the optimal policy of psi'f, without softness:
        whatever else has log-probability -inf. ``history``: "objective", the program's at each iteration, which never
        falls, and "violation", that of the worst constraint found then. ``attrs``: "slack", "objective", "gap" (how far
        below the optimum the objective can be, where the search is exact), "constraints", "converged", "iterations",
        "seconds".

    Raises:
        OptionError: an unknown loss, a loss that is not one differentiable number, or an option out of range; no
            weights satisfy every margin, and no slack is allowed.
        InvalidRewardError: features, or a loss given as a tensor, do not fit the MDP.
        InvalidPolicyError: nor do the visits.
        InvalidTrajectoriesError: demonstrations are empty, impossible, or cannot be completed.
        DivergenceError: without discount and horizon, some reward would be collected for ever.
        MissingDependencyError: cvxpy or clarabel is not installed.

    Warns:
        ConvergenceWarning: a constraint is still violated by more than ``tolerance``.

    Example:
        >>> mdp = pirl.envs.gridworld(3, 3, slip=0.0, discount=0.9, initial=0)
        >>> demos = pirl.Trajectories(states=[[0, 1, 2, 2]], actions=[[3, 3, 3]])
        >>> found = maximum_margin_planning(demos, mdp, torch.eye(9).double())
        >>> found.reward.argmax().item()
        2
    """
    begun = time.perf_counter()
    if demos is not None:
        check_problem(demos, mdp)
    for name, value in (("slack_cost", slack_cost), ("tolerance", tolerance)):
        if not value > 0:
            raise OptionError(f"{name} is {value}, but must be above 0")
    for name, least, number in (("max_iterations", 1, max_iterations), ("num_starts", 0, num_starts)):
        if number < least:
            raise OptionError(f"{name} is {number}, but must be at least {least}")
    table = feature_table(features, mdp)
    if visits is not None:
        demonstrated, decisions = _checked_visits(visits, mdp), visits
    elif demos is not None:
        demonstrated, decisions = demonstrated_visits(demos, mdp, tail), tally(demos, mdp, 1.0)
        mdp = from_starts(demos, mdp, starts)
    else:
        raise OptionError("give demonstrations, or visits")
    target = torch.einsum("sa,sak->k", in_total(demonstrated, mdp), table)
    search = _search(loss, mdp, table, target, decisions, num_starts, seed)
    program = _Program(slack_cost)

    rivals: list[tuple[Tensor, float]] = []
    history: dict[str, list[float]] = {"objective": [], "violation": []}
    psi, slack = torch.zeros_like(target), 0.0
    while True:
        rival = search(mdp.check_reward(linear_reward(features, psi)))
        difference = torch.einsum("sa,sak->k", rival.visits, table) - target
        violation = float(psi @ difference) + rival.loss - slack
        history["objective"].append(float(psi @ psi) / 2 + (slack_cost * slack if slack > 0 else 0.0))
        history["violation"].append(max(violation, 0.0))
        if converged := violation <= tolerance:
            break
        # No worse than a constraint that the program has: it is the solver's own tolerance that is left.
        known = any(violation <= (float(psi @ x) + d - slack) * (1 + 1e-6) for x, d in rivals)
        if known or len(rivals) >= max_iterations:
            warn(
                f"maximum_margin_planning: a constraint is violated by {violation:.3g} after {len(rivals)} iterations, "
                f"more than tolerance = {tolerance:g}; allow more iterations, or a larger tolerance",
                ConvergenceWarning,
            )
            break
        rivals.append((difference, rival.loss))
        psi, slack = program(rivals)

    reward = linear_reward(features, psi)
    # The violation is slack that the program did not know to be needed.
    gap = slack_cost * history["violation"][-1] if history["violation"][-1] > 0 else 0.0
    return PointEstimate(
        name="maximum_margin_planning",
        parameters={"weights": psi},
        reward=reward,
        log_policy=best_plan(mdp, mdp.check_reward(reward)).log(),
        history=history,
        attrs={
            "loss": loss if isinstance(loss, str) else "table" if isinstance(loss, Tensor) else "function",
            "slack_cost": float(slack_cost), "slack": slack, "objective": history["objective"][-1], "gap": gap,
            "constraints": len(rivals), "converged": converged, "iterations": len(history["objective"]),
            "seconds": time.perf_counter() - begun,
        },
    )  # fmt: skip


class _Program:
    """The quadratic program over the rivals found so far."""

    def __init__(self, slack_cost: float) -> None:
        self.cp, self.slack_cost = cvxpy(), slack_cost

    def __call__(self, rivals: list[tuple[Tensor, float]]) -> tuple[Float[Tensor, " K"], float]:
        cp, like = self.cp, rivals[0][0]
        differences = torch.stack([x for x, _ in rivals])
        margins = differences.new_tensor([d for _, d in rivals])
        # In units of the largest numbers of its data a program of any size is as well conditioned as any other.
        wide, high = float(differences.abs().max()) or 1.0, float(margins.abs().max()) or 1.0
        a, d = ((x / unit).double().cpu().numpy() for x, unit in ((differences, wide), (margins, high)))
        psi, slack = cp.Variable(len(like)), cp.Variable(nonneg=True)
        cost, allowed = cp.sum_squares(psi) / 2, -(a @ psi) - d
        if math.isinf(self.slack_cost):
            problem = cp.Problem(cp.Minimize(cost), [allowed >= 0])
        else:
            price = self.slack_cost * wide**2 / high
            problem = cp.Problem(cp.Minimize(cost + price * slack), [allowed + slack >= 0])
        if not solve(problem):
            raise OptionError(
                "no weights satisfy every margin, and slack_cost=inf allows no slack: the demonstrations are not "
                "optimal for any reward of these features; use a finite slack_cost"
            )
        taken = 0.0 if math.isinf(self.slack_cost) else max(float(slack.value), 0.0) * high
        return torch.as_tensor(psi.value).to(like) * (high / wide), taken


# ------------------------------------------------------------------------------------------------ the worst constraint


@dataclass(frozen=True, eq=False)
class _Rival:
    visits: Float[Tensor, "S A"]
    loss: float


_Search = Callable[[Float[Tensor, "S A"]], _Rival]
"""From a reward to a policy with much reward plus loss."""


def _search(
    loss: Any, mdp: TabularMDP, table: Tensor, target: Tensor, decisions: Tensor, num_starts: int, seed: int
) -> _Search:
    if isinstance(loss, Tensor):
        return _LinearSearch(mdp, _checked_loss(loss, mdp))
    if callable(loss):
        # Such a loss may see any difference of visits, not only those that features show.
        places = torch.eye(mdp.available.numel(), dtype=mdp.dtype, device=mdp.device)
        return _LocalSearch(mdp, loss, places.reshape(*mdp.available.shape, -1), num_starts, seed)
    if loss == "features":
        distance = lambda mu: torch.linalg.vector_norm(torch.einsum("sa,sak->k", mu, table) - target)  # noqa: E731
        return _LocalSearch(mdp, distance, table, num_starts, seed)
    if loss == "hamming":
        return _LinearSearch(mdp, 1.0 - visiting_policy(decisions, otherwise=torch.zeros_like(decisions)))
    raise OptionError(f"loss must be 'hamming', 'features', a tensor or a function of visits, not {loss!r}")


@dataclass(frozen=True, eq=False)
class _LinearSearch:
    """The best policy for reward plus a loss that is linear in visits: one plan, exactly."""

    mdp: TabularMDP
    loss: Float[Tensor, "*T S A"]

    def __call__(self, reward: Tensor) -> _Rival:
        visits = policy_visits(self.mdp, best_plan(self.mdp, reward + self.loss))
        visits = visits if self.loss.dim() == visits.dim() else in_total(visits, self.mdp)
        total = visits if visits.dim() == 2 else visits.sum(0)
        return _Rival(total, float((visits * self.loss).sum()))


class _LocalSearch:
    """Iterated linearisation of a convex loss (Frank-Wolfe with full steps), from several starts that change."""

    def __init__(
        self, mdp: TabularMDP, loss: Callable[[Tensor], Tensor], directions: Tensor, count: int, seed: int
    ) -> None:
        self.mdp, self.loss, self.directions, self.count = mdp, loss, directions, count
        self.generator = torch.Generator().manual_seed(seed)
        # The first start is the plan without a loss; it is also the first policy that is known.
        self.nothing = torch.zeros(1, mdp.num_states, mdp.num_actions, dtype=mdp.dtype, device=mdp.device)
        self.visits = self._planned(self.nothing)
        self.losses, self.slopes = self._linearised(self.visits)

    def __call__(self, reward: Tensor) -> _Rival:
        best = self._scores(reward).topk(min(_RECENT, len(self.visits))).indices
        slopes = torch.cat([self.nothing, self.slopes[best], self._fresh()])
        highest = reward.new_full((len(slopes),), -torch.inf)
        for _ in range(_MAX_ROUNDS):
            visits = self._planned(reward + slopes)
            losses, slopes = self._linearised(visits)
            scores = (visits * reward).sum((1, 2)) + losses
            rising = scores > highest + 1e-12 * scores.abs()
            self._keep(visits, losses, slopes)
            if not bool(rising.any()):
                break
            slopes, highest = slopes[rising], scores[rising]
        top = int(self._scores(reward).argmax())
        return _Rival(self.visits[top], float(self.losses[top]))

    def _scores(self, reward: Float[Tensor, "S A"]) -> Float[Tensor, " n"]:
        return (self.visits * reward).sum((1, 2)) + self.losses

    def _fresh(self) -> Float[Tensor, "n S A"]:
        """The loss linearised at optimal policies of random rewards and of minus these."""
        if not self.count:
            return self.nothing[:0]
        weights = torch.randn(self.count, self.directions.shape[-1], generator=self.generator, dtype=torch.float64)
        both = torch.cat([weights, -weights]).to(self.nothing)
        rewards = torch.einsum("sak,nk->nsa", self.directions, both)
        # Nowhere positive, so that nothing is worth collecting for ever.
        return self._linearised(self._planned(rewards - rewards.amax((1, 2), keepdim=True)))[1]

    def _keep(self, visits: Tensor, losses: Tensor, slopes: Tensor) -> None:
        """Remember policies that are new: at other weights they may be the worst rivals."""
        for i in range(len(visits)):
            if not bool((self.visits - visits[i]).abs().amax((1, 2)).min() < 1e-9):
                self.visits, self.losses, self.slopes = (
                    torch.cat([old, new[i : i + 1]])[-_KNOWN:]
                    for old, new in ((self.visits, visits), (self.losses, losses), (self.slopes, slopes))
                )

    def _planned(self, rewards: Float[Tensor, "n S A"]) -> Float[Tensor, "n S A"]:
        return in_total(policy_visits(self.mdp, optimal_policy(self.mdp, rewards).policy), self.mdp)

    def _linearised(self, visits: Float[Tensor, "n S A"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n S A"]]:
        """The loss at each, and its gradient."""
        losses, slopes = [], []
        for one in visits:
            one = one.detach().requires_grad_()
            with torch.enable_grad():
                value = self.loss(one)
            if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                raise OptionError("loss must be a differentiable function of visits [S, A] that gives one number")
            (slope,) = torch.autograd.grad(value.sum(), one)
            if not bool(value.isfinite().all() & slope.isfinite().all()):
                raise OptionError("loss is NaN or infinite, or its gradient is")
            losses.append(value.detach().reshape(()))
            slopes.append(slope)
        return torch.stack(losses), torch.stack(slopes)


def _checked_loss(loss: Tensor, mdp: TabularMDP) -> Tensor:
    pairs = (mdp.num_states, mdp.num_actions)
    timed = () if mdp.horizon is None else ((mdp.horizon, *pairs),)
    if loss.shape not in (pairs, *timed) or loss.dtype != mdp.dtype or not bool(loss.isfinite().all()):
        raise InvalidRewardError(
            f"loss is {loss.dtype} {tuple(loss.shape)}; expected finite {mdp.dtype} {pairs}"
            + " or by time" * bool(timed)
        )
    return loss


def _checked_visits(visits: Tensor, mdp: TabularMDP) -> Tensor:
    pairs = (mdp.num_states, mdp.num_actions)
    expected = pairs if mdp.horizon is None else (mdp.horizon, *pairs)
    if visits.shape != expected or visits.dtype != mdp.dtype:
        raise InvalidPolicyError(f"visits are {visits.dtype} {tuple(visits.shape)}; expected {mdp.dtype} {expected}")
    if not bool((visits.isfinite() & (visits > -1e-9)).all()):
        raise InvalidPolicyError("visits are negative, NaN or infinite somewhere; they are expected numbers of visits")
    return visits
