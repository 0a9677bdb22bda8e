"""Apprenticeship learning: visits of demonstrations and policies, margins, mixtures, and what they promise."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from pirl import envs, planning
from pirl.baselines.max_margin import _Projection, _Quadratic, max_margin
from pirl.baselines.visits import demonstrated_visits, in_total, policy_visits, visiting_policy
from pirl.errors import (
    ConvergenceWarning,
    EmptyTrajectoriesWarning,
    HorizonError,
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

METHODS = ("quadratic", "projection")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def sparse(mdp: TabularMDP) -> TabularMDP:
    return mdp.replace(transition=mdp.transition.reshape(-1, mdp.num_states).to_sparse_coo())


def masked() -> TabularMDP:
    """A terminal state, and actions that are not always available."""
    available = torch.ones(6, 3, dtype=torch.bool)
    available[1, 0] = available[2, 2] = available[4, 1] = False
    return envs.random_mdp(6, 3, seed=4, discount=0.9).replace(available=available, terminal=[5])


PROBLEMS = {
    "grid": (lambda: envs.gridworld(4, 4, slip=0.2, discount=0.9), lambda: envs.gridworld_features(4, 4, 5)),
    "sparse": (lambda: sparse(envs.random_mdp(8, 3, seed=1, branching=2)), lambda: normal(8, 4)),
    "masked": (masked, lambda: normal(6, 3, 4)),
    "finite": (lambda: envs.random_mdp(5, 3, seed=2, discount=0.95, horizon=6), lambda: normal(5, 3, 4)),
    "finite, terminal": (lambda: masked().replace(horizon=5, discount=1.0), lambda: normal(6, 4)),
}


def pairs(features: Tensor, mdp: TabularMDP) -> Tensor:
    return features if features.dim() == 3 else features.unsqueeze(1).expand(-1, mdp.num_actions, -1)


def expectations(mdp: TabularMDP, policy: Tensor, features: Tensor) -> Tensor:
    """Feature expectations as values: the value of a policy for each feature as a reward."""
    rewards = pairs(features, mdp).movedim(-1, 0)
    if mdp.horizon is not None and policy.dim() == 2:
        policy = policy.expand(mdp.horizon, *policy.shape)
    value = planning.policy_value(mdp, policy.expand(len(rewards), *policy.shape), rewards)
    return (value if mdp.horizon is None else value[:, 0]) @ mdp.initial


def deterministic_policies(mdp: TabularMDP) -> list[Tensor]:
    """All of them, by time where the horizon is finite."""
    steps = mdp.horizon or 1
    choices = [row.isfinite().nonzero().flatten().tolist() for row in mdp.log_prior] * steps
    eye = torch.eye(mdp.num_actions, dtype=mdp.dtype)
    shape = mdp.log_prior.shape if mdp.horizon is None else (steps, *mdp.log_prior.shape)
    return [eye[list(actions)].reshape(shape) for actions in itertools.product(*choices)]


def nearest(target: Tensor, points: Tensor, iterations: int = 100_000) -> float:
    """Distance to a convex hull, by Wolfe's away steps: no solver, linear convergence."""
    weight = torch.zeros(len(points), dtype=points.dtype)
    weight[0] = 1.0
    for _ in range(iterations):
        slope = points @ (weight @ points - target)
        toward = int(slope.argmin())
        away = int(torch.where(weight > 0, slope, -torch.inf).argmax())
        gap = slope @ weight - slope[toward]
        if gap < 1e-14:
            break
        forward = bool(gap >= slope[away] - slope @ weight)
        direction = -weight if forward else weight.clone()
        direction[toward if forward else away] += 1.0 if forward else -1.0
        most = 1.0 if forward else float(weight[away] / (1 - weight[away]))
        move = direction @ points
        step = float((-(slope @ direction) / (move @ move)).clamp(0.0, most))
        weight = (weight + step * direction).clamp_min(0.0)
    return float(torch.linalg.vector_norm(weight @ points - target))


# ------------------------------------------------------------------------------------------------ visits


def test_visits_of_demonstrations_are_counted_by_hand() -> None:
    mdp = masked()
    demos = Trajectories(states=[[0, 2, 5], [1, 3]], actions=[[1, 0], [1]], ends=("terminated", "truncated"))
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for state, action, step in ((0, 1, 0), (2, 0, 1), (5, 0, 2), (1, 1, 0)):  # the no-op of state 5 counts once
        expected[state, action] += 0.9**step / 2
    assert torch.allclose(demonstrated_visits(demos, mdp, tail="none"), expected, **EXACT)

    finite = mdp.replace(horizon=2)
    by_time = demonstrated_visits(demos, finite, tail="none")
    assert by_time.shape == (2, 6, 3)
    expected[5, 0] = 0.0  # entered after the last decision
    assert torch.allclose(by_time.sum(0), expected, **EXACT)
    assert torch.allclose(by_time.sum((1, 2)), torch.tensor([1.0, 0.45], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("last_state", [True, False])
@pytest.mark.parametrize("horizon", [None, 7])
def test_cut_off_episodes_go_on_as_the_demonstrators_did(horizon: int | None, last_state: bool) -> None:
    """With a deterministic demonstrator who was seen in every state, the visits are exactly its own."""
    mdp = envs.random_mdp(6, 3, seed=3, branching=2, discount=0.9)
    action = torch.tensor([0, 2, 1, 1, 0, 2])
    policy = torch.nn.functional.one_hot(action, 3).double()
    moves = mdp.transition.to_dense().reshape(6, 3, 6)[torch.arange(6), action]
    mdp = mdp.replace(horizon=horizon)
    # One decision from each state: an average over the next state needs that state to be unobserved, or certain.
    states = [[s] for s in range(6)]
    if last_state:
        certain = torch.nn.functional.one_hot(moves.argmax(1), 6).double()
        table = mdp.transition.to_dense().reshape(6, 3, 6).clone()
        table[torch.arange(6), action] = certain
        mdp, states = mdp.replace(transition=table), [[s, int(certain[s].argmax())] for s in range(6)]
    mdp = mdp.replace(initial=torch.full((6,), 1 / 6, dtype=torch.float64))
    demos = Trajectories(states=states, actions=[[int(a)] for a in action])
    own = policy if horizon is None else policy.expand(horizon, 6, 3)
    assert torch.allclose(demonstrated_visits(demos, mdp), policy_visits(mdp, own), **EXACT)


@pytest.mark.parametrize("horizon", [None, 4])
def test_a_last_state_that_is_certain_need_not_be_seen(horizon: int | None) -> None:
    mdp = envs.gridworld(3, 3, slip=0.0, discount=0.8, horizon=horizon)
    states, actions = [[0, 1, 2], [8, 7], [4, 4, 1, 1]], [[3, 3, 1], [2, 2], [4, 0, 0, 3]]
    ends = [[5], [6], [2]]
    seen = Trajectories(states=[s + e for s, e in zip(states, ends, strict=True)], actions=actions)
    unseen = Trajectories(states=states, actions=actions)
    assert torch.allclose(demonstrated_visits(seen, mdp), demonstrated_visits(unseen, mdp), **EXACT)


@pytest.mark.parametrize("horizon", [None, 9])
def test_completed_visits_have_the_mass_of_whole_episodes(horizon: int | None) -> None:
    mdp = envs.gridworld(3, 3, slip=0.3, discount=0.8, horizon=horizon)
    demos = Trajectories(states=[[0, 1, 2, 5], [4, 4], [8]], actions=[[3, 3, 1], [4], [0]])
    visits = in_total(demonstrated_visits(demos, mdp), mdp)
    whole = 5.0 if horizon is None else (1 - 0.8**9) / 0.2
    assert abs(float(visits.sum()) - whole) < 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_visits_of_policies_give_their_values(name: str) -> None:
    """Nothing but the definition: visits times a reward is the value, for policies by time and for a batch."""
    mdp, features = (make() for make in PROBLEMS[name])
    shape = (2, *(() if mdp.horizon is None else (mdp.horizon,)), *mdp.log_prior.shape)
    policy = torch.softmax(normal(*shape, seed=5).masked_fill(~mdp.log_prior.isfinite(), -torch.inf), -1)
    visits = policy_visits(mdp, policy)
    total = in_total(visits, mdp)
    for one in range(2):
        found = torch.einsum("sa,sak->k", total[one], pairs(features, mdp))
        assert torch.allclose(found, expectations(mdp, policy[one], features), **EXACT)
        again = visiting_policy(visits[one], otherwise=torch.zeros_like(policy[one]))
        visited = again.sum(-1) > 0
        assert torch.allclose(again[visited], policy[one][visited], **EXACT)


# ------------------------------------------------------------------------------------------------ the two methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_mixture_has_the_demonstrators_features(name: str, method: str) -> None:
    mdp, features = (make() for make in PROBLEMS[name])
    reward = pairs(features, mdp) @ normal(features.shape[-1], seed=7)
    target = expectations(mdp, soft_policy(mdp, 2 * reward, "causal").exp(), features)
    epsilon = {"quadratic": 1e-6, "projection": 0.05}[method]  # which takes many more iterations
    found = max_margin(None, mdp, features, method=method, epsilon=epsilon, feature_expectations=target)
    assert found.attrs["matched"] and found.attrs["converged"]
    shares, policies = found.mixture
    assert float(shares.min()) > 0 and abs(float(shares.sum()) - 1) < 1e-12
    mixed = sum(share * expectations(mdp, policy, features) for share, policy in zip(shares, policies, strict=True))
    assert float(torch.linalg.vector_norm(mixed - target)) <= epsilon + 1e-10
    assert abs(float(torch.linalg.vector_norm(mixed - target)) - found.attrs["distance"]) < 1e-10
    # The one Markov policy has the mixture's features, state visits and all.
    assert torch.allclose(expectations(mdp, found.log_policy.exp(), features), mixed, rtol=1e-9, atol=1e-9)
    assert torch.allclose(found.log_policy.exp().sum(-1), torch.ones(()).double())
    assert abs(float(torch.linalg.vector_norm(found.parameters["weights"])) - 1) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_margin_falls_and_stays_above_its_bound(method: str) -> None:
    mdp, features = (make() for make in PROBLEMS["grid"])
    target = expectations(mdp, soft_policy(mdp, 3 * features[:, :1] - features[:, 1:2], "causal").exp(), features)
    found = max_margin(None, mdp, features, method=method, epsilon=1e-2, feature_expectations=target)
    margin, bound = (torch.tensor(found.history[name], dtype=torch.float64) for name in ("margin", "bound"))
    assert len(margin) == found.attrs["iterations"] > 3
    assert bool((margin.diff() <= 1e-9).all()) and margin[-1] <= 1e-2 < margin[-2]
    assert bool((bound.diff() >= 0).all()) and bool((bound <= margin + 1e-12).all())


def test_cone_program_is_solved_with_its_dual() -> None:
    """Optimality of both programs: widest margin (Abbeel and Ng, eq. 10-12) = smallest distance of a mixture."""
    for seed in range(5):
        found, target = normal(6, 3, seed=seed), normal(3, seed=seed + 50) + 2.0
        weights, shares = _Quadratic()(target, found, torch.zeros(0))
        ahead = (target - found) @ weights
        distance = torch.linalg.vector_norm(target - shares @ found)
        assert abs(float(torch.linalg.vector_norm(weights)) - 1) < 1e-12
        assert abs(float(ahead.min() - distance)) < 1e-8
        assert torch.allclose(ahead[shares > 1e-6], ahead.min(), rtol=0, atol=1e-8)
        # Near its maximum the margin is flat: off by d in direction, it is d^2 / 2 of itself short.
        assert torch.allclose(weights, (target - shares @ found) / distance, rtol=0, atol=(2 * 1e-8) ** 0.5)
        assert abs(float(distance) - nearest(target, found)) < 1e-8


def test_projection_onto_a_segment() -> None:
    target = torch.tensor([1.0, 1.0]).double()
    found = torch.tensor([[0.0, 0.0], [4.0, 0.0]]).double()
    weights, shares = _Projection()(target, found, torch.ones(1).double())
    assert torch.allclose(shares, torch.tensor([0.75, 0.25]).double(), **EXACT)
    assert torch.allclose(weights, torch.tensor([0.0, 1.0]).double(), **EXACT)
    _, beyond = _Projection()(torch.tensor([9.0, 0.0]).double(), found, torch.ones(1).double())
    assert torch.allclose(beyond, torch.tensor([0.0, 1.0]).double(), **EXACT)  # stays a mixture


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("horizon", [None, 2])
def test_features_that_no_policy_has(method: str, horizon: int | None) -> None:
    """It stops at the nearest mixture, which all deterministic policies, tried out, confirm."""
    mdp = envs.random_mdp(3, 2, seed=5, discount=0.8, horizon=horizon)
    features = normal(3, 2, 3, seed=1)
    points = torch.stack([expectations(mdp, policy, features) for policy in deterministic_policies(mdp)])
    target = points.mean(0) + 3.0 * (points[3] - points.mean(0)) + 0.5
    epsilon = 1e-3
    found = max_margin(None, mdp, features, method=method, epsilon=epsilon, feature_expectations=target)
    truth = nearest(target, points)
    assert truth > 2 * epsilon
    assert not found.attrs["matched"] and found.attrs["converged"]
    assert truth - 1e-9 <= found.attrs["distance"] <= truth + epsilon
    assert found.history["bound"][-1] <= truth + 1e-9
    # Which is by how much the demonstrator beats every policy under the learned reward.
    lead = ((target - points) @ found.parameters["weights"]).min()
    assert abs(float(lead) - found.history["bound"][-1]) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_an_optimal_demonstrator_is_matched_from_its_episodes(method: str) -> None:
    """Deterministic dynamics: from where the demonstrations start, the demonstrator is one of the policies."""
    mdp = envs.gridworld(3, 3, slip=0.0, discount=0.9)
    demos = Trajectories(states=[[0, 1, 2, 2], [3, 4, 5, 2, 2]], actions=[[3, 3, 4], [3, 3, 0, 4]])
    features = torch.eye(9, dtype=torch.float64)
    found = max_margin(demos, mdp, features, method=method, epsilon=0.1)
    assert found.attrs["matched"]
    assert found.reward.shape == (9, 1) and int(found.reward.argmax()) == 2
    # Seen from all states, the two starts are unlike what any policy does.
    elsewhere = max_margin(demos, mdp, features, method=method, epsilon=0.1, starts="initial")
    assert not elsewhere.attrs["matched"] and elsewhere.attrs["distance"] > 0.1
    # Without what follows the last decision, goal visits are missing.
    cut = max_margin(demos, mdp, features, method=method, epsilon=0.1, tail="none")
    assert cut.attrs["distance"] > 1.0


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_under_which_the_demonstrator_is_nearest_to_optimal(method: str) -> None:
    mdp = envs.random_mdp(3, 2, seed=5, discount=0.8)
    features = normal(3, 2, 3, seed=1)
    points = torch.stack([expectations(mdp, policy, features) for policy in deterministic_policies(mdp)])
    tried: list[Tensor] = []
    module = sys.modules[max_margin.__module__]
    original = module.linear_reward

    def spy(features: Tensor, weights: Tensor) -> Tensor:
        tried.append(weights)
        return original(features, weights)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "linear_reward", spy)
        target = points.mean(0)
        found = max_margin(None, mdp, features, method=method, epsilon=1e-2, feature_expectations=target)
    regret = torch.stack([(points @ w).max() - target @ w for w in tried[:-1]])  # the last is the answer itself
    assert len(regret) > 2
    assert torch.equal(found.parameters["weights"], tried[int(regret.argmin())])


def test_first_policy_that_matches_ends_it() -> None:
    mdp, features = (make() for make in PROBLEMS["grid"])
    policy = soft_policy(mdp, features[:, :1], "causal").exp()
    target = expectations(mdp, policy, features)
    found = max_margin(None, mdp, features, feature_expectations=target, initial_policy=policy)
    assert found.attrs["iterations"] == 1 and found.attrs["matched"]
    assert bool((found.parameters["weights"] == 0).all())
    assert torch.allclose(found.log_policy.exp(), policy, **EXACT)


def test_too_few_iterations_warn() -> None:
    mdp, features = (make() for make in PROBLEMS["grid"])
    target = expectations(mdp, soft_policy(mdp, features[:, :1], "causal").exp(), features)
    with pytest.warns(ConvergenceWarning, match="after 2 iterations, above epsilon = 1e-06"):
        found = max_margin(None, mdp, features, epsilon=1e-6, max_iterations=2, feature_expectations=target)
    assert not found.attrs["converged"] and found.attrs["iterations"] == 2


def test_a_softmax_in_float32_is_a_first_policy() -> None:
    mdp = envs.gridworld(3, 3, discount=0.9).to(dtype=torch.float32)
    demos, eye = Trajectories(states=[[0, 1]], actions=[[3]]), torch.eye(9)
    policy = torch.softmax(normal(9, 5).float(), -1)
    assert (policy.sum(-1) - 1).abs().max() > 1e-8
    found = max_margin(demos, mdp, eye, initial_policy=policy, method="projection", epsilon=0.5)
    assert found.log_policy.dtype == torch.float32
    with pytest.raises(InvalidPolicyError, match="initial_policy is not a distribution"):
        max_margin(demos, mdp, eye, initial_policy=policy * (1 + 1e-4))


# ------------------------------------------------------------------------------------------------ what is refused


def test_bad_input_is_named() -> None:
    mdp = envs.gridworld(2, 2, discount=0.9)
    demos, eye = Trajectories(states=[[0, 1]], actions=[[3]]), torch.eye(4, dtype=torch.float64)
    with pytest.raises(OptionError, match="'linear'"):
        max_margin(demos, mdp, eye, method="linear")
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="epsilon is"):
            max_margin(demos, mdp, eye, epsilon=epsilon)
    with pytest.raises(OptionError, match="max_iterations"):
        max_margin(demos, mdp, eye, max_iterations=0)
    for option in ({"tail": "zero"}, {"starts": "anywhere"}):
        with pytest.raises(OptionError, match=next(iter(option))):
            max_margin(demos, mdp, eye, **option)
    with pytest.raises(OptionError, match="feature_expectations"):
        max_margin(None, mdp, eye)
    for features in (eye[:3], eye[0], eye.float(), torch.zeros(4, 2, 3).double(), eye / 0):
        with pytest.raises(InvalidRewardError, match="features"):
            max_margin(demos, mdp, features)
    for target in (eye[0, :3], eye[0].float(), eye[0] / 0):
        with pytest.raises(InvalidRewardError, match="feature_expectations"):
            max_margin(None, mdp, eye, feature_expectations=target)
    for policy in (torch.ones(4, 5).double(), torch.ones(4, 2).double() / 2, torch.full((4, 5), 0.2)):
        with pytest.raises(InvalidPolicyError, match="initial_policy"):
            max_margin(demos, mdp, eye, initial_policy=policy)


def test_bad_demonstrations_are_named() -> None:
    mdp, eye = envs.gridworld(2, 2, discount=0.9), torch.eye(4, dtype=torch.float64)
    with pytest.warns(EmptyTrajectoriesWarning):
        empty = Trajectories(states=[], actions=[])
    with pytest.raises(InvalidTrajectoriesError, match="no decision"):
        max_margin(empty, mdp, eye)
    with pytest.raises(HorizonError, match="horizon of its own"):
        max_margin(Trajectories(states=[[0, 1]], actions=[[3]], ends="horizon"), mdp, eye)
    endless = envs.gridworld(2, 2, terminal=[3])
    with pytest.raises(InvalidTrajectoriesError, match="stops before a terminal state"):
        max_margin(Trajectories(states=[[0, 1]], actions=[[3]]), endless, eye)


def test_missing_solver_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp, eye = envs.gridworld(2, 2, discount=0.9), torch.eye(4, dtype=torch.float64)
    demos = Trajectories(states=[[0, 1]], actions=[[3]])
    for module in ("clarabel", "cvxpy"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            with pytest.raises(MissingDependencyError, match=rf"{module} is not installed: pip install 'pirl\[basel"):
                max_margin(demos, mdp, eye)
            assert max_margin(demos, mdp, eye, method="projection").attrs["converged"]
