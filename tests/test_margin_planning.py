"""Maximum margin planning: every policy of tiny problems is a constraint that can be checked, and solved for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pirl import envs, planning
from pirl.baselines.estimate import PointEstimate
from pirl.baselines.margin_planning import maximum_margin_planning
from pirl.baselines.visits import in_total, policy_visits
from pirl.errors import (
    ConvergenceWarning,
    EmptyTrajectoriesWarning,
    InvalidPolicyError,
    InvalidRewardError,
    InvalidTrajectoriesError,
    MissingDependencyError,
    OptionError,
)
from pirl.mdp import TabularMDP
from pirl.message_passing import soft_policy
from pirl.trajectories import Trajectories
from tests.draws import normal
from tests.test_max_margin import deterministic_policies, masked, pairs


def few() -> TabularMDP:
    """Some actions are not available, and time counts."""
    available = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
    return envs.random_mdp(3, 3, seed=8, discount=0.9, horizon=2).replace(available=available)


PROBLEMS = {
    "infinite": (lambda: envs.random_mdp(4, 3, seed=1, discount=0.8), lambda: normal(4, 3, 4, seed=2)),
    "states": (lambda: envs.random_mdp(5, 2, seed=3, branching=2, discount=0.9), lambda: normal(5, 3, seed=4)),
    "terminal": (masked, lambda: normal(6, 3, 4, seed=5)),
    "finite": (lambda: envs.random_mdp(3, 2, seed=6, horizon=3, discount=0.9), lambda: normal(3, 2, 3, seed=7)),
    "finite, masked": (few, lambda: normal(3, 3, 4, seed=8)),
}


def curved(visits: Tensor) -> Tensor:
    """Some convex function of visits, for want of a better one."""
    weight = torch.linspace(-1, 2, visits.numel(), dtype=visits.dtype).reshape(visits.shape)
    return 0.1 * (visits * weight).sum().square() + 0.3 * visits.square().sum()


class Enumerated:
    """All deterministic policies of a problem as rivals of a demonstrator with the given visits."""

    def __init__(self, mdp: TabularMDP, features: Tensor, demonstrated: Tensor, loss: str | Callable[[Tensor], Tensor]):
        table, policies = pairs(features, mdp), deterministic_policies(mdp)
        visits = torch.stack([policy_visits(mdp, policy) for policy in policies])
        feature = lambda mu: torch.einsum("...sa,sak->...k", in_total(mu, mdp), table)  # noqa: E731
        self.differences = feature(visits) - feature(demonstrated)
        if loss == "hamming":
            total = demonstrated.sum(-1, keepdim=True)
            own = torch.where(total > 1e-12, demonstrated / total.clamp_min(1e-300), 0.0)
            # Expected visits at which an action drawn by the demonstrator there is another one.
            self.losses = ((visits * (1 - own)).flatten(1)).sum(1)
        elif loss == "features":
            self.losses = self.differences.norm(dim=1)
        else:
            assert callable(loss)
            self.losses = torch.stack([loss(mu) for mu in in_total(visits, mdp)])

    def worst(self, found: PointEstimate) -> float:
        """Largest left side minus right side of any constraint."""
        lead = self.differences @ found.parameters["weights"] + self.losses
        return float(lead.max()) - float(found.attrs["slack"])

    def solution(self, slack_cost: float) -> tuple[Tensor, float]:
        """Weights and objective with all constraints at once, through the dual: weights of rivals that sum to <= C."""
        import cvxpy as cp

        alpha = cp.Variable(len(self.losses), nonneg=True)
        psi = -(self.differences.numpy().T @ alpha)
        value = self.losses.numpy() @ alpha - cp.sum_squares(psi) / 2
        problem = cp.Problem(cp.Maximize(value), [cp.sum(alpha) <= slack_cost] if math.isfinite(slack_cost) else [])
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        return torch.as_tensor(psi.value), float(problem.value)


def softly(mdp: TabularMDP, features: Tensor, scale: float = 2.0, seed: int = 9) -> Tensor:
    """Visits of a demonstrator that is not optimal."""
    reward = scale * pairs(features, mdp) @ normal(features.shape[-1], seed=seed)
    return policy_visits(mdp, soft_policy(mdp, reward, "causal").exp())


@pytest.mark.parametrize("loss", ["hamming", "features", curved], ids=["hamming", "features", "function"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("slack_cost", [0.1, 3.0])
def test_solution_is_that_of_all_policies_at_once(
    name: str, loss: str | Callable[[Tensor], Tensor], slack_cost: float
) -> None:
    mdp, features = (make() for make in PROBLEMS[name])
    demonstrated = softly(mdp, features)
    everyone = Enumerated(mdp, features, demonstrated, loss)
    found = maximum_margin_planning(None, mdp, features, loss=loss, slack_cost=slack_cost, visits=demonstrated)
    assert found.attrs["converged"]
    assert everyone.worst(found) <= 2e-6
    weights, objective = everyone.solution(slack_cost)
    # The objective is strongly convex with modulus 1, so weights are as near as the root of twice its error.
    assert abs(float(found.attrs["objective"]) - objective) <= 1e-6 * max(1.0, objective)
    assert torch.allclose(found.parameters["weights"], weights, rtol=0, atol=1e-6)
    objectives = torch.tensor(found.history["objective"], dtype=torch.float64)
    assert bool((objectives.diff() >= -1e-8).all()) and found.attrs["constraints"] < len(everyone.losses)


def optimal(mdp: TabularMDP, features: Tensor, seed: int) -> Tensor:
    reward = pairs(features, mdp) @ normal(features.shape[-1], seed=seed)
    return planning.optimal_policy(mdp, reward).policy


@pytest.mark.parametrize("loss", ["hamming", "features"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_an_optimal_demonstrator_needs_no_slack(name: str, loss: str) -> None:
    mdp, features = (make() for make in PROBLEMS[name])
    policy = optimal(mdp, features, seed=11)
    demonstrated = policy_visits(mdp, policy)
    found = maximum_margin_planning(None, mdp, features, loss=loss, slack_cost=math.inf, visits=demonstrated)
    everyone = Enumerated(mdp, features, demonstrated, loss)
    assert found.attrs["converged"] and found.attrs["slack"] == 0.0
    assert everyone.worst(found) <= 2e-6
    weights, objective = everyone.solution(math.inf)
    assert torch.allclose(found.parameters["weights"], weights, rtol=1e-6, atol=1e-6)
    # The demonstrator's policy is optimal for the learned reward, and is what is predicted wherever it goes.
    reward = pairs(features, mdp) @ found.parameters["weights"]
    best = planning.optimal_policy(mdp, reward).value
    value = planning.policy_value(mdp, policy, reward)
    first = (lambda v: v) if mdp.horizon is None else (lambda v: v[0])
    assert abs(float(mdp.initial @ (first(best) - first(value)))) < 1e-6
    visited = demonstrated.sum(-1) > 1e-9
    assert torch.equal(found.log_policy.exp()[visited], policy[visited])


@pytest.mark.parametrize("loss", ["hamming", "features"])
def test_slack_grows_as_it_gets_cheaper(loss: str) -> None:
    mdp, features = (make() for make in PROBLEMS["infinite"])
    demonstrated = softly(mdp, features)
    costs = (0.01, 0.1, 1.0, 10.0, 100.0)
    fits = [
        maximum_margin_planning(None, mdp, features, loss=loss, slack_cost=cost, visits=demonstrated) for cost in costs
    ]
    slack = torch.tensor([float(fit.attrs["slack"]) for fit in fits], dtype=torch.float64)
    norm = torch.stack([fit.parameters["weights"].norm() for fit in fits])
    assert bool((slack.diff() <= 1e-7).all()) and slack[0] > slack[-1] + 0.01
    assert bool((norm.diff() >= -1e-6).all())


def test_a_demonstrator_that_is_never_optimal_needs_slack() -> None:
    mdp, features = (make() for make in PROBLEMS["infinite"])
    with pytest.raises(OptionError, match="use a finite slack_cost"):
        maximum_margin_planning(None, mdp, features, slack_cost=math.inf, visits=softly(mdp, features))


@pytest.mark.parametrize("horizon", [None, 4])
def test_hamming_loss_is_a_table(horizon: int | None) -> None:
    """The same loss given as one number a pair (and time), and as a function of visits."""
    mdp = envs.random_mdp(4, 3, seed=8, discount=0.8, horizon=horizon)
    features, policy = normal(4, 3, 4, seed=3), optimal(mdp, normal(4, 3, 4, seed=3), seed=12)
    demonstrated = policy_visits(mdp, policy)
    weights = [
        maximum_margin_planning(None, mdp, features, loss=loss, visits=demonstrated).parameters["weights"]
        for loss in ("hamming", torch.where(demonstrated.sum(-1, keepdim=True) > 1e-12, 1 - policy, 1.0))
    ]
    assert torch.allclose(weights[0], weights[1], rtol=1e-6, atol=1e-6)
    if horizon is None:
        table = 1 - policy
        linear = maximum_margin_planning(None, mdp, features, loss=lambda mu: (mu * table).sum(), visits=demonstrated)
        assert torch.allclose(linear.parameters["weights"], weights[0], rtol=1e-6, atol=1e-6)


def test_episodes_of_an_optimal_demonstrator() -> None:
    """A loss counts what was seen: in deterministic dynamics episodes and visits give the same weights."""
    mdp = envs.gridworld(3, 3, slip=0.0, discount=0.9, initial=0, stay=True)
    demos = Trajectories(states=[[0, 1, 2, 2]], actions=[[3, 3, 4]])
    features = torch.eye(45, dtype=torch.float64).reshape(9, 5, 45)
    found = maximum_margin_planning(demos, mdp, features, slack_cost=math.inf)
    policy = torch.zeros(9, 5, dtype=torch.float64)
    policy[:, 4] = 1.0
    policy[[0, 1], 4], policy[[0, 1], 3] = 0.0, 1.0
    given = maximum_margin_planning(None, mdp, features, slack_cost=math.inf, visits=policy_visits(mdp, policy))
    assert torch.allclose(found.parameters["weights"], given.parameters["weights"], rtol=1e-6, atol=1e-6)
    assert int(found.reward.argmax()) == 2 * 5 + 4
    assert torch.equal(found.log_policy.exp()[:3], policy[:3])


def test_a_loss_counts_what_was_seen_and_not_what_was_filled_in() -> None:
    mdp = envs.gridworld(2, 3, slip=0.2, discount=0.9, initial=0)
    demos = Trajectories(states=[[0, 1, 2], [0, 0]], actions=[[3, 3], [1]])
    features = normal(6, 5, 4)
    table = torch.ones(6, 5, dtype=torch.float64)
    table[0, 3] = table[0, 1] = 0.5
    table[1, 3] = 0.0
    found, given = (maximum_margin_planning(demos, mdp, features, loss=loss) for loss in ("hamming", table))
    assert torch.allclose(found.parameters["weights"], given.parameters["weights"], rtol=1e-6, atol=1e-6)


def test_every_start_finds_more_of_a_convex_loss() -> None:
    """The local search needs its starts: without them it misses rivals that others find."""
    for seed in (1, 4):
        mdp, features = envs.random_mdp(4, 3, seed=seed, discount=0.9), normal(4, 3, 4, seed=seed)
        demonstrated = softly(mdp, features, seed=seed)
        everyone = Enumerated(mdp, features, demonstrated, curved)
        options = {"loss": curved, "slack_cost": 0.1, "visits": demonstrated}
        assert everyone.worst(maximum_margin_planning(None, mdp, features, **options)) <= 2e-6
        assert everyone.worst(maximum_margin_planning(None, mdp, features, num_starts=0, **options)) > 0.1


def test_weights_are_learned_that_explain_noisy_episodes() -> None:
    """Value lost under the true reward: far less than by behaving at random."""
    mdp = envs.gridworld(5, 5, slip=0.1, discount=0.9)
    features = envs.gridworld_features(5, 5, 6)
    reward = features @ torch.tensor([3.0, -1.0, 0.0, -2.0, 1.0, 0.0], dtype=torch.float64)
    from pirl.datasets import simulate

    demos = simulate(mdp, 3 * reward, num_episodes=40, length=15)
    found = maximum_margin_planning(demos, mdp, features)
    best = planning.optimal_policy(mdp, reward.unsqueeze(-1)).value @ mdp.initial
    own = planning.policy_value(mdp, found.log_policy.exp(), reward.unsqueeze(-1)) @ mdp.initial
    idle = planning.policy_value(mdp, mdp.action_prior, reward.unsqueeze(-1)) @ mdp.initial
    assert found.attrs["converged"] and found.attrs["slack"] > 0
    assert best - own < 0.1 * (best - idle)


def test_too_few_constraints_warn() -> None:
    mdp, features = (make() for make in PROBLEMS["infinite"])
    with pytest.warns(ConvergenceWarning, match="after 1 iterations"):
        found = maximum_margin_planning(None, mdp, features, max_iterations=1, visits=softly(mdp, features))
    everyone = Enumerated(mdp, features, softly(mdp, features), "hamming")
    _, objective = everyone.solution(1.0)
    assert not found.attrs["converged"]
    assert found.attrs["objective"] <= objective <= found.attrs["objective"] + found.attrs["gap"] + 1e-6
    assert abs(everyone.worst(found) - found.history["violation"][-1]) < 1e-9


def test_bad_input_is_named() -> None:
    mdp = envs.gridworld(2, 2, discount=0.9)
    demos, eye = Trajectories(states=[[0, 1]], actions=[[3]]), torch.eye(4, dtype=torch.float64)
    for name in ("slack_cost", "tolerance", "max_iterations"):
        with pytest.raises(OptionError, match=name):
            maximum_margin_planning(demos, mdp, eye, **{name: 0 if name == "max_iterations" else 0.0})
    with pytest.raises(OptionError, match="num_starts"):
        maximum_margin_planning(demos, mdp, eye, num_starts=-1)
    for loss, message in (
        ("zero-one", "'zero-one'"),
        (lambda mu: mu.sum().item(), "differentiable"),
        (lambda mu: mu.sum(0), "one number"),
        (lambda mu: mu.sum() / 0, "NaN or infinite"),
    ):
        with pytest.raises(OptionError, match=message):
            maximum_margin_planning(demos, mdp, eye, loss=loss)
    for table in (eye, torch.zeros(4, 5), torch.full((4, 5), torch.nan).double()):
        with pytest.raises(InvalidRewardError, match="loss is"):
            maximum_margin_planning(demos, mdp, eye, loss=table)
    with pytest.raises(InvalidRewardError, match="features have shape"):
        maximum_margin_planning(demos, mdp, eye[:3])
    with pytest.raises(OptionError, match="give demonstrations"):
        maximum_margin_planning(None, mdp, eye)
    for visits in (eye, torch.full((4, 5), -1.0).double(), torch.full((4, 5), torch.nan).double()):
        with pytest.raises(InvalidPolicyError, match="visits are"):
            maximum_margin_planning(None, mdp, eye, visits=visits)
    with pytest.warns(EmptyTrajectoriesWarning):
        empty = Trajectories(states=[], actions=[])
    with pytest.raises(InvalidTrajectoriesError, match="no decision"):
        maximum_margin_planning(empty, mdp, eye)


def test_missing_solver_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pirl\[baselines\]'"):
        maximum_margin_planning(
            Trajectories(states=[[0, 1]], actions=[[3]]), envs.gridworld(2, 2, discount=0.9), torch.eye(4).double()
        )
