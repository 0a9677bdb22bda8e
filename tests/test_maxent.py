"""Maximum entropy IRL against its definitions: gradients, features that match, the entropy theorem, standard errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import random_mdp
from torch import Tensor, nn

import pirl
from models import bus_engine
from pirl import errors
from pirl.baselines import maxent
from pirl.baselines.estimate import check_problem
from pirl.baselines.objectives import Dual, Likelihood
from pirl.datasets import simulate, zurcher_table
from pirl.envs import gridworld, gridworld_features
from pirl.planning import discounted_occupancy

F64 = torch.float64


def problem(stochastic: bool, horizon: int | None = 5, discount: float = 1.0, count: int = 30) -> Any:
    """A random problem with features of pairs, and demonstrations from some weights."""
    mdp = random_mdp(3, states=4, actions=3, stochastic=stochastic, horizon=horizon, discount=discount)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 3, 2, dtype=F64, generator=generator)
    reward = pirl.linear_reward(features, torch.tensor([1.0, -0.5], dtype=F64))
    demos = simulate(mdp, reward, count, horizon or 8)
    return mdp, features, demos


def counts(mdp: pirl.TabularMDP, demos: pirl.Trajectories, discount: float = 1.0) -> Tensor:
    table = torch.zeros(mdp.num_states, mdp.num_actions, dtype=F64)
    for states, actions in zip(demos.states.tolist(), demos.actions.tolist(), strict=True):
        for t, action in enumerate(actions):
            if action >= 0:
                table[states[t], action] += discount**t
    return table


def with_starts(mdp: pirl.TabularMDP, demos: pirl.Trajectories) -> pirl.TabularMDP:
    """The same problem, begun where the demonstrations did."""
    return mdp.replace(initial=torch.bincount(demos.starts, minlength=mdp.num_states).to(F64) / len(demos))


def gradient(objective: Any, reward: Tensor) -> Tensor:
    return torch.func.grad(objective)(reward)


# ------------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("stochastic", [False, True])
def test_trajectory_gradient_is_counts_minus_occupancy(stochastic: bool) -> None:
    """The lecture's: what was done, less what is expected by the backward, the forward and the mu messages."""
    mdp, features, demos = problem(stochastic)
    reward = features @ torch.tensor([0.3, 0.7], dtype=F64)
    expected = counts(mdp, demos) - len(demos) * pirl.messages(mdp, reward).mu.sum(0)
    torch.testing.assert_close(gradient(Likelihood(demos, mdp, "trajectory"), reward), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_dual_gradient_is_visits_minus_occupancy(stochastic: bool, discount: float) -> None:
    mdp, features, demos = problem(stochastic, discount=discount)
    reward = features @ torch.tensor([0.3, 0.7], dtype=F64)
    occupancy = pirl.occupancy(with_starts(mdp, demos), reward, "causal")
    expected = counts(mdp, demos, discount) - len(demos) * occupancy
    torch.testing.assert_close(gradient(Dual(demos, mdp), reward), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("horizon", [None, 6])
def test_dual_is_return_and_what_is_left_less_the_soft_value_of_the_start(horizon: int | None) -> None:
    """Ragged, truncated and terminated episodes, with and without their last state, one by one."""
    mdp = random_mdp(5, states=4, actions=2, horizon=horizon, discount=0.9, terminal=[3])
    reward = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    demos = simulate(mdp, reward, 12, 4)
    blind = pirl.Trajectories(demos.states[:, :-1], demos.actions, demos.lengths)
    own = pirl.Trajectories(demos.states[:, :-1], demos.actions, demos.lengths, ends="horizon")
    table = mdp.transition.to_dense().reshape(4, 2, 4)
    values = {k: pirl.messages(mdp.replace(horizon=k), reward, "causal").log_beta[0] for k in range(1, 7)}
    values[0] = torch.zeros(4, dtype=F64)
    stationary = pirl.messages(mdp.replace(horizon=None), reward, "causal").log_beta
    for given, known in ((demos, horizon), (blind, horizon), (own, "own")):
        terms = Dual(given, mdp).terms(reward)
        for i, (states, actions) in enumerate(zip(given.states.tolist(), given.actions.tolist(), strict=True)):
            length = sum(a >= 0 for a in actions)
            total = length if known == "own" else known

            def value(left: int, total: int | None = total) -> Tensor:
                return stationary if total is None else values[total - left]

            expected = -value(0)[states[0]]
            for t in range(length):
                expected = expected + 0.9**t * reward[states[t], actions[t]]
            if states[length] >= 0:
                expected = expected + 0.9**length * value(length)[states[length]]
            elif length:
                after = 0.0 if total == length else table[states[length - 1], actions[length - 1]] @ value(length)
                expected = expected + 0.9**length * after
            assert float(terms[i]) == pytest.approx(float(expected), abs=1e-10)
        assert float(Dual(given, mdp)(reward)) == pytest.approx(float(terms.sum()), abs=1e-10)


@pytest.mark.parametrize("reading", ["causal", "trajectory"])
def test_terms_differ_from_the_likelihood_by_a_constant(reading: Any) -> None:
    mdp, features, demos = problem(True)
    goal = Likelihood(demos, mdp, reading)
    assert len(goal.terms(features[..., 0])) == len(goal.unit) == (150 if reading == "causal" else 30)
    assert goal.unit.bincount().tolist() == [5 if reading == "causal" else 1] * 30
    differences = [float(goal(r) - goal.terms(r).sum()) for r in features.unbind(-1)]
    assert differences[0] == pytest.approx(differences[1], abs=1e-10)


# ------------------------------------------------------------------------------------------------------- the estimates


def test_readings_and_objectives_agree_where_they_must() -> None:
    """Deterministic dynamics, no discount, given starts: all that differs elsewhere is the same."""
    mdp, features, demos = problem(False)
    results = [
        maxent(demos, mdp, features, objective="likelihood", tolerance=1e-11),
        maxent(demos, mdp, features, objective="dual", tolerance=1e-11),
        maxent(demos, mdp, features, reading="trajectory", given_starts=True, tolerance=1e-11),
        maxent(demos, mdp, features, reading="trajectory", objective="dual", tolerance=1e-11),
    ]
    for result in results:
        assert result.attrs["converged"]
        torch.testing.assert_close(result.parameters["weights"], results[0].parameters["weights"], rtol=0, atol=1e-8)
        torch.testing.assert_close(result.log_policy, results[0].log_policy, rtol=0, atol=1e-8)


@pytest.mark.parametrize("horizon, discount", [(5, 1.0), (5, 0.8), (None, 0.8)])
def test_the_dual_matches_features_for_any_dynamics(horizon: int | None, discount: float) -> None:
    mdp, features, demos = problem(True, horizon, discount)
    result = maxent(demos, mdp, features, objective="dual")
    whole = with_starts(mdp, demos)
    if horizon is None:
        # What is left after the truncated end is expected by the model.
        visits = counts(mdp, demos, discount)
        left = mdp.replace(initial=torch.bincount(demos.states[:, -1], minlength=4).to(F64) / len(demos))
        visits = visits / len(demos) + discount**8 * discounted_occupancy(left, result.log_policy.exp())
        occupancy = discounted_occupancy(whole, result.log_policy.exp())
    else:
        visits = counts(mdp, demos, discount) / len(demos)
        occupancy = pirl.occupancy(whole, result.reward, "causal")
    gap = torch.einsum("sa,sak->k", visits - occupancy, features)
    assert gap.abs().max() < 1e-6
    assert result.attrs["feature_gap"] < 1e-6


def test_the_likelihood_misses_features_where_chance_rules_and_says_so() -> None:
    mdp, features, demos = problem(True)
    result = maxent(demos, mdp, features)
    gap = counts(mdp, demos) / len(demos) - pirl.occupancy(with_starts(mdp, demos), result.reward, "causal")
    missed = torch.einsum("sa,sak->k", gap, features).abs().max()
    assert missed > 1e-3
    assert result.attrs["feature_gap"] == pytest.approx(float(missed), rel=1e-9)
    tilted = maxent(demos, mdp, features, reading="trajectory")
    mu = pirl.occupancy(mdp, tilted.reward, "trajectory")
    assert torch.einsum("sa,sak->k", counts(mdp, demos) / len(demos) - mu, features).abs().max() < 1e-6
    assert tilted.attrs["feature_gap"] < 1e-6


def test_no_policy_of_the_same_features_has_more_entropy() -> None:
    """The lecture's theorem, over occupancies rho: causal entropy is -sum rho log(rho(s,a) / rho(s))."""
    mdp, features, demos = problem(True, None, 0.8)
    result = maxent(demos, mdp, features, objective="dual", tolerance=1e-11)
    rho = discounted_occupancy(with_starts(mdp, demos), result.log_policy.exp())

    def entropy(visits: Tensor) -> Tensor:
        return -(visits * (visits / visits.sum(-1, keepdim=True)).log()).sum()

    # Directions in which visits stay those of a policy, and features stay what they are.
    flow = torch.eye(4, dtype=F64).repeat_interleave(3, 1) - 0.8 * mdp.transition.reshape(12, 4).T
    constraints = torch.cat([flow, features.reshape(12, 2).T])
    free = torch.linalg.svd(constraints)[2][len(constraints) :]
    assert len(free) == 12 - 4 - 2
    slope = torch.func.grad(entropy)(rho)
    assert (free @ slope.flatten()).abs().max() < 1e-8
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        change = (torch.randn(len(free), dtype=F64, generator=generator) @ free).reshape(4, 3)
        change = change * 0.5 * float((rho / change.abs()).min())
        assert entropy(rho + change) < entropy(rho)
    # And the theorem is about these constraints: with other features there is more to be had.
    assert (torch.linalg.svd(flow)[2][4:] @ slope.flatten()).abs().max() > 1e-2


def test_gradient_ascent_finds_what_quasi_newton_finds() -> None:
    mdp, features, demos = problem(True)
    quick = maxent(demos, mdp, features, reading="trajectory")
    slow = maxent(demos, mdp, features, reading="trajectory", method="gradient", learning_rate=0.2, max_iterations=2000)
    assert slow.attrs["converged"] and slow.attrs["iterations"] > quick.attrs["iterations"]
    torch.testing.assert_close(slow.parameters["weights"], quick.parameters["weights"], rtol=0, atol=1e-6)
    assert all(b >= a - 1e-9 for a, b in zip(slow.history["objective"], slow.history["objective"][1:], strict=False))


def test_a_linear_network_is_a_linear_reward() -> None:
    mdp, features, demos = problem(True)
    network = nn.Linear(2, 1, bias=False, dtype=F64)
    before = network.weight.detach().clone()
    neural = maxent(demos, mdp, features, network=network)
    linear = maxent(demos, mdp, features)
    torch.testing.assert_close(neural.parameters["weight"][0], linear.parameters["weights"], rtol=0, atol=1e-6)
    assert torch.equal(network.weight, before)
    assert neural.covariance == {} and "feature_gap" not in neural.attrs


def test_a_network_explains_what_a_linear_reward_cannot() -> None:
    mdp = gridworld(5, 5, discount=0.9)
    place = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5), indexing="ij"), -1)
    features = place.reshape(25, 2).to(F64)
    demos = simulate(mdp, 4 * (features.square().sum(1) < 0.6).to(F64), 40, 10)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    neural = maxent(demos, mdp, features, network=network, l2=0.1, tolerance=1e-4)
    linear = maxent(demos, mdp, features)
    assert neural.attrs["log_likelihood"] > linear.attrs["log_likelihood"] + 50


def test_a_penalty_is_a_prior() -> None:
    mdp, features, demos = problem(True)
    result = maxent(demos, mdp, features, l2=7.0, tolerance=1e-10)
    weights = result.parameters["weights"]
    slope = torch.func.grad(lambda w: Likelihood(demos, mdp, "causal")(features @ w))(weights)
    torch.testing.assert_close(slope, 7.0 * weights, rtol=0, atol=1e-7)


def test_what_has_no_maximum_is_said() -> None:
    """One who always goes the same way: the more the better."""
    mdp = pirl.TabularMDP(torch.eye(2, dtype=F64).expand(2, 2, 2).clone(), initial=0, horizon=1)
    demos = pirl.Trajectories(states=[[0]] * 5, actions=[[1]] * 5)
    features = torch.tensor([[[0.0], [1.0]]] * 2, dtype=F64)
    with pytest.warns(errors.ConvergenceWarning, match="set l2"):
        result = maxent(demos, mdp, features, method="gradient", max_iterations=50)
    assert not result.attrs["converged"] and "NOT converged" in repr(result)
    assert maxent(demos, mdp, features, l2=0.1).attrs["converged"]


# ------------------------------------------------------------------------------------------------------ standard errors


def test_standard_errors_are_their_definitions() -> None:
    """Scores and Hessian by differences of single decisions' log-probabilities."""
    mdp, features, demos = problem(True)
    subjects = torch.arange(30) % 6
    demos = pirl.Trajectories(demos.states, demos.actions, subjects=subjects)
    result = maxent(demos, mdp, features, tolerance=1e-11)
    weights = result.parameters["weights"]
    episodes = zip(demos.states.tolist(), demos.actions.tolist(), strict=True)
    rows = [(t, s[t], a[t], i) for i, (s, a) in enumerate(episodes) for t in range(5)]

    def choices(w: Tensor) -> Tensor:
        log_policy = pirl.soft_policy(mdp, features @ w)
        return torch.stack([log_policy[t, s, a] for t, s, a, _ in rows])

    step = 1e-5 * torch.eye(2, dtype=F64)
    scores = torch.stack([(choices(weights + h) - choices(weights - h)) / 2e-5 for h in step], 1)
    total = lambda w: torch.func.grad(lambda v: Likelihood(demos, mdp, "causal")(features @ v))(w)  # noqa: E731
    hessian = torch.stack([(total(weights + h) - total(weights - h)) / 2e-5 for h in step])
    bread = torch.linalg.inv(-hessian)
    clusters = torch.stack([sum(scores[n] for n, row in enumerate(rows) if row[3] % 6 == g) for g in range(6)])
    expected = {
        "hessian": bread,
        "outer_product": torch.linalg.inv(scores.T @ scores),
        "sandwich": bread @ scores.T @ scores @ bread,
        "clustered": bread @ clusters.T @ clusters @ bread * 6 / 5,
    }
    assert list(result.covariance) == list(expected)
    for kind, covariance in expected.items():
        # Central differences with steps of 1e-5 err by some 1e-10 / 1e-5.
        torch.testing.assert_close(result.covariance[kind], covariance, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(
            result.standard_errors(kind)["weights"], covariance.diagonal().sqrt(), rtol=1e-5, atol=0
        )
    low, high = result.interval(0.9)["weights"]
    torch.testing.assert_close(high - low, 2 * 1.6448536 * result.standard_errors()["weights"], rtol=1e-6, atol=0)
    assert list(result.table().columns) == ["estimate", *(f"s.e. ({kind})" for kind in expected)]


def test_dual_standard_errors_are_those_of_its_moments() -> None:
    mdp, features, demos = problem(True)
    result = maxent(demos, mdp, features, objective="dual", tolerance=1e-11)
    assert list(result.covariance) == ["sandwich", "clustered"]
    scores = torch.func.jacrev(lambda w: Dual(demos, mdp).terms(features @ w))(result.parameters["weights"])
    bread = torch.linalg.inv(-torch.func.jacrev(torch.func.grad(lambda w: Dual(demos, mdp)(features @ w)))(
        result.parameters["weights"]
    ))  # fmt: skip
    torch.testing.assert_close(result.covariance["sandwich"], bread @ scores.T @ scores @ bread, rtol=1e-8, atol=1e-12)
    with pytest.raises(errors.OptionError, match="the dual is no likelihood"):
        maxent(demos, mdp, features, objective="dual", standard_errors=["hessian"])


def test_what_is_not_identified_has_no_standard_error() -> None:
    """A constant changes nothing; a feature given twice is known in sum."""
    mdp, features, demos = problem(True)
    more = torch.cat([features, torch.ones(4, 3, 1, dtype=F64)], -1)
    result = maxent(demos, mdp, more)
    for kind in result.covariance:
        found = result.standard_errors(kind)["weights"]
        assert found[2] == torch.inf and found[:2].isfinite().all()
    plain = maxent(demos, mdp, features)
    torch.testing.assert_close(
        result.standard_errors()["weights"][:2], plain.standard_errors()["weights"], rtol=1e-6, atol=0
    )
    twice = maxent(demos, mdp, torch.cat([features, features[..., :1]], -1))
    assert twice.standard_errors()["weights"].isinf().tolist() == [True, False, True]


RUST = {"4": (1.582, 0.639)}
HESSIAN = {"4": (1.351, 0.554), "1-4": (0.9015, 0.4716)}


def bus_problem(group: str) -> tuple[pirl.Trajectories, pirl.TabularMDP, Tensor]:
    """A month is an episode of one decision, a bus the subject."""
    fleet = zurcher_table(group)
    bus, state, action, months = [x.flatten() for x in torch.meshgrid(
        *(torch.arange(n) for n in fleet.choices.shape), indexing="ij")] + [fleet.choices.flatten()]  # fmt: skip
    rows = torch.arange(len(months)).repeat_interleave(months.long())
    demos = pirl.Trajectories(state[rows][:, None], action[rows][:, None], subjects=bus[rows])
    mdp = bus_engine.load(group=group)["mdp"]
    mdp = mdp.replace(
        initial=torch.full((mdp.num_states,), 1 / mdp.num_states, dtype=F64)
    )  # a month may begin anywhere
    features = torch.zeros(mdp.num_states, 2, 2, dtype=F64)
    features[:, 0, 1] = -0.001 * torch.arange(mdp.num_states)
    features[:, 1, 0] = -1.0
    return demos, mdp, features


@pytest.mark.parametrize("group", ["4", "1-4"])
def test_rust_s_estimates_and_standard_errors(group: str) -> None:
    result = maxent(*bus_problem(group))
    estimates, _ = bus_engine.TABLE_IX[group]
    assert result.parameters["weights"].tolist() == pytest.approx(list(estimates.values()), rel=1e-3)
    assert result.standard_errors("hessian")["weights"].tolist() == pytest.approx(HESSIAN[group], rel=0.01)
    if group in RUST:
        assert result.standard_errors("outer_product")["weights"].tolist() == pytest.approx(RUST[group], rel=0.01)


def test_units_of_features_do_not_matter() -> None:
    """A feature in units a million times as large has a weight a million times as large, and so has its error."""
    mdp, features, demos = problem(True)
    unit = torch.tensor([1.0, 1e-6], dtype=F64)
    plain, scaled = maxent(demos, mdp, features), maxent(demos, mdp, features * unit)
    torch.testing.assert_close(scaled.parameters["weights"] * unit, plain.parameters["weights"], rtol=1e-6, atol=1e-8)
    for kind in plain.covariance:
        torch.testing.assert_close(
            scaled.standard_errors(kind)["weights"] * unit, plain.standard_errors(kind)["weights"], rtol=1e-6, atol=0
        )


def test_in_single_precision() -> None:
    mdp, features, demos = problem(True)
    double = maxent(demos, mdp, features)
    single = maxent(demos, mdp.to(dtype=torch.float32), features.float())
    assert single.attrs["converged"] and single.covariance["sandwich"].dtype == torch.float32
    torch.testing.assert_close(
        single.parameters["weights"].double(), double.parameters["weights"], rtol=0.01, atol=0.01
    )


def test_where_the_sum_over_paths_is_infinite_the_search_turns_back() -> None:
    """Undiscounted, with a terminal corner: rewards just above 0 have no partition function."""
    mdp = gridworld(4, 4, slip=0.0, terminal=[(3, 3)], initial=0)
    features = torch.ones(16, 1, dtype=F64)
    features[15] = 0.0
    demos = simulate(mdp, torch.where(features[:, 0] > 0, -0.02, 0.0).to(F64), 50, 10_000, "trajectory")
    found = maxent(demos, mdp, features, reading="trajectory")
    assert found.attrs["converged"] and found.parameters["weights"] < 0.05
    with pytest.raises(errors.OptionError, match="no finite objective at the start.*give start="):
        maxent(demos, mdp, features, reading="trajectory", start=torch.tensor([1.0], dtype=F64))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "newton"}, "method must be"),
        ({"objective": "primal"}, "objective must be"),
        ({"l2": -1.0}, "l2 is -1"),
        ({"tolerance": 0.0}, "must be positive"),
        ({"standard_errors": ["robust"]}, "no standard errors are called 'robust'"),
        ({"given_starts": True}, "given_starts belongs to the trajectory reading"),
        ({"stopping": "geometric"}, "belongs to the trajectory reading"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    mdp, features, demos = problem(True)
    with pytest.raises(errors.OptionError, match=words):
        maxent(demos, mdp, features, **options)


def test_features_of_another_problem_are_refused() -> None:
    mdp, _, demos = problem(True)
    with pytest.raises(errors.InvalidRewardError, match=r"expected \[4, K\]"):
        maxent(demos, mdp, torch.zeros(5, 2, dtype=F64))
    with pytest.raises(errors.OptionError, match="no standard errors"):
        pirl.baselines.cloning(demos, mdp).standard_errors()


def test_features_on_a_gridworld_are_recovered() -> None:
    """Within four standard errors of each kind."""
    mdp = gridworld(6, 6, horizon=10)
    features = gridworld_features(6, 6, 4)
    truth = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=F64)
    demos = simulate(mdp, pirl.linear_reward(features, truth), 200, 10)
    result = maxent(demos, mdp, features)
    for kind in result.covariance:
        assert ((result.parameters["weights"] - truth).abs() < 4 * result.standard_errors(kind)["weights"]).all()


def test_arguments_in_the_wrong_place_are_named() -> None:
    mdp, _, demos = problem(True)
    check_problem(demos, mdp)
    for wrong, told in (((None, mdp), "demos is a NoneType"), ((mdp, demos), "Trajectories first"),
                        ((demos, None), "mdp is a NoneType")):  # fmt: skip
        with pytest.raises(errors.OptionError, match=told):
            check_problem(*wrong)
