"""Metrics against loops and enumeration on tiny problems, and the zeros that they must have."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from pirl import envs, metrics
from pirl.datasets import simulate
from pirl.distributions import MaxCausalEntTrajectory
from pirl.errors import (
    HorizonError,
    InvalidPolicyError,
    InvalidRewardError,
    InvalidTrajectoriesError,
    OptionError,
    PirlError,
)
from pirl.mdp import TabularMDP
from pirl.message_passing import occupancy, soft_policy
from pirl.metrics import (
    epic_distance,
    expected_value_difference,
    feature_gap,
    held_out_log_likelihood,
    interval_coverage,
    policy_divergence,
    starc_distance,
)
from pirl.planning import discounted_occupancy, optimal_policy, policy_value
from pirl.trajectories import Trajectories
from tests import oracle
from tests.draws import normal

EXACT = {"rtol": 1e-11, "atol": 1e-12}
ZERO = 1e-10
MASK = torch.tensor([[True, True], [True, False], [False, True]])


def random_policy(mdp: TabularMDP, *batch: int, seed: int = 0) -> Tensor:
    weight = normal(*batch, mdp.num_states, mdp.num_actions, seed=seed).exp() * mdp.available
    return weight / weight.sum(-1, keepdim=True)


def table(mdp: TabularMDP) -> Tensor:
    dense = mdp.transition.to_dense().reshape(mdp.num_states, mdp.num_actions, mdp.num_states)
    return dense * mdp.acts.unsqueeze(-1)


def uniform_like(count: int) -> list[float]:
    return [1.0 / count] * count


@pytest.fixture(params=[2**23, 40], ids=["whole", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every law holds for all draws at once and for a few at a time."""
    monkeypatch.setattr(metrics.blocks, "_AT_ONCE", request.param)


# ------------------------------------------------------------------------------------------------ value differences


def enumerated_return(mdp: TabularMDP, policy: Tensor, reward: Tensor) -> float:
    """Expected discounted return over every trajectory; policy [T, S, A]."""
    assert mdp.horizon is not None
    terms = []
    for path in oracle.paths(mdp.replace(action_prior="counting"), mdp.horizon):
        chosen = math.prod(float(policy[t, s, a]) for t, (s, a) in enumerate(path.pairs))
        gain = math.fsum(mdp.discount**t * float(reward[s, a]) for t, (s, a) in enumerate(path.visited))
        terms.append(path.probability * chosen * gain)
    return math.fsum(terms)


FINITE = [{}, {"discount": 0.7, "terminal": [2]}, {"available": MASK, "discount": 0.9}]


@pytest.mark.parametrize("options", FINITE)
@pytest.mark.parametrize("soft", [False, True])
def test_value_differences_are_those_of_returns_over_all_trajectories(options: dict[str, Any], soft: bool) -> None:
    mdp = oracle.random_mdp(3, horizon=3, **options)
    truth, estimates = normal(3, 2), normal(5, 3, 2, seed=1)

    def plan(reward: Tensor) -> Tensor:
        return soft_policy(mdp, reward).exp() if soft else optimal_policy(mdp, reward).policy

    best = enumerated_return(mdp, plan(truth), truth)
    expected = torch.tensor([best - enumerated_return(mdp, plan(r), truth) for r in estimates], dtype=torch.float64)
    assert expected.abs().max() > 0.01
    found = expected_value_difference(mdp, truth, estimates, soft=soft)
    torch.testing.assert_close(found, expected, **EXACT)
    by_policy = expected_value_difference(mdp, truth, policy=plan(estimates), soft=soft)
    torch.testing.assert_close(by_policy, expected, **EXACT)


def test_the_best_plan_is_the_best_of_all_deterministic_ones() -> None:
    mdp = oracle.random_mdp(5, discount=0.8, available=MASK)
    truth = normal(3, 2)
    choices = [row.nonzero().flatten().tolist() for row in MASK]
    gains = []
    for actions in itertools.product(*choices):
        policy = torch.nn.functional.one_hot(torch.tensor(actions), 2).double()
        gains.append((policy_value(mdp, policy, truth) @ mdp.initial, policy))
    top = max(gain for gain, _ in gains)
    losses = expected_value_difference(mdp, truth, policy=torch.stack([policy for _, policy in gains]))
    torch.testing.assert_close(losses, top - torch.stack([gain for gain, _ in gains]), **EXACT)
    assert losses.min().abs() < 1e-12


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", [{"horizon": 4}, {"discount": 0.8}, {"terminal": [1]}])
@pytest.mark.parametrize("soft", [False, True])
def test_value_differences_of_many_draws_are_those_of_each(options: dict[str, Any], soft: bool) -> None:
    mdp = oracle.random_mdp(4, **options)
    # Four draws and four steps: a block of draws must not be taken for time.
    truth, estimates = -normal(2, 1, 3, 2).abs(), -normal(2, 4, 3, 2, seed=1).abs()
    found = expected_value_difference(mdp, truth, estimates, soft=soft)
    assert found.shape == (2, 4)
    policy = random_policy(mdp, 3, seed=2)
    stationary = expected_value_difference(mdp, truth, policy=policy, soft=soft)
    assert stationary.shape == (2, 3)
    for i in range(2):
        for j in range(4):
            one = expected_value_difference(mdp, truth[i, 0], estimates[i, j], soft=soft)
            torch.testing.assert_close(found[i, j], one, **EXACT)
        for j in range(3):
            one = expected_value_difference(mdp, truth[i, 0], policy=policy[j], soft=soft)
            torch.testing.assert_close(stationary[i, j], one, **EXACT)


def test_equivalent_rewards_lose_nothing_and_optimal_plans_never_gain() -> None:
    mdp = oracle.random_mdp(6, states=5, actions=3, discount=0.9)
    truth, phi = normal(5, 3), normal(5, seed=1)
    shaped = 2.5 * truth + phi.unsqueeze(1) - 0.9 * table(mdp) @ phi
    assert expected_value_difference(mdp, truth, shaped).abs() < ZERO
    assert expected_value_difference(mdp, truth, (shaped - 1.5 * truth), soft=True).abs() < ZERO
    losses = expected_value_difference(mdp, truth, normal(200, 5, 3, seed=2))
    assert losses.min() > -1e-12
    assert losses.max() > 0.1
    # A soft planner on a larger scale makes fewer mistakes.
    assert expected_value_difference(mdp, truth, 10 * truth, soft=True) < -0.1


# ------------------------------------------------------------------------------------------------ EPIC


def looped_epic(a: Tensor, b: Tensor, g: float, states: list[float], actions: list[float], coverage: Tensor) -> float:
    """Definition 4.1 and Pearson's distance, number by number; r [S, A, S']."""
    count, choices = len(states), len(actions)

    def canonical(r: Tensor) -> list[float]:
        out = []
        for s, x, t in itertools.product(range(count), range(choices), range(count)):
            mean = 0.0
            for i, u, j in itertools.product(range(count), range(choices), range(count)):
                mean += states[i] * actions[u] * states[j] * float(g * r[t, u, j] - r[s, u, j] - g * r[i, u, j])
            out.append(float(r[s, x, t]) + mean)
        return out

    weight = coverage.flatten().tolist()

    def moment(x: list[float], y: list[float]) -> float:
        mx = math.fsum(w * i for w, i in zip(weight, x, strict=True))
        my = math.fsum(w * i for w, i in zip(weight, y, strict=True))
        return math.fsum(w * (i - mx) * (j - my) for w, i, j in zip(weight, x, y, strict=True))

    u, v = canonical(a), canonical(b)
    correlation = moment(u, v) / math.sqrt(moment(u, u) * moment(v, v))
    return math.sqrt((1 - correlation) / 2)


def test_epic_is_its_definition() -> None:
    a, b = normal(3, 2, 3), normal(3, 2, 3, seed=1)
    uniform = torch.full((3, 2, 3), 1 / 18, dtype=torch.float64)
    expected = looped_epic(a, b, 0.9, uniform_like(3), uniform_like(2), uniform)
    assert 0.1 < expected < 0.9
    assert float(epic_distance(0.9, a, b)) == pytest.approx(expected, abs=1e-12)
    coverage = normal(3, 2, 3, seed=2).exp()
    coverage[0, 1] = 0.0
    coverage = coverage / coverage.sum()
    states, actions = [0.2, 0.5, 0.3], [0.9, 0.1]
    expected = looped_epic(a, b, 0.5, states, actions, coverage)
    by_state, by_action = (torch.tensor(x, dtype=torch.float64) for x in (states, actions))
    found = epic_distance(0.5, a, b, coverage=coverage, states=by_state, actions=by_action)
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_epic_of_rewards_of_pairs_does_not_depend_on_the_next_state() -> None:
    mdp = oracle.random_mdp(1, discount=0.7)
    a, b = normal(3, 2), normal(3, 2, seed=1)
    whole = [x.unsqueeze(-1).expand(3, 2, 3) for x in (a, b)]
    uniform = torch.full((3, 2, 3), 1 / 18, dtype=torch.float64)
    expected = looped_epic(whole[0], whole[1], 0.7, uniform_like(3), uniform_like(2), uniform)
    for x, y in ((a, b), whole, (a.unsqueeze(-1), b), (a, whole[1])):
        assert float(epic_distance(mdp, x, y)) == pytest.approx(expected, abs=1e-12)
        assert float(epic_distance(0.7, x, y)) == pytest.approx(expected, abs=1e-12)
    states = normal(3, 1, seed=3)
    assert float(epic_distance(mdp, states, states.expand(3, 2))) < ZERO


@pytest.mark.usefixtures("blocks")
def test_epic_is_zero_under_shaping_scale_and_constants_and_one_when_turned() -> None:
    mdp = oracle.random_mdp(2, states=4, actions=3, discount=0.95)
    reward, phi = normal(6, 4, 3, 4), 3 * normal(6, 4, seed=1)
    scale = normal(6, seed=2).exp()[:, None, None, None]
    shaping = 0.95 * phi[:, None, None, :] - phi[:, :, None, None]
    coverage = normal(4, 3, 4, seed=3).exp()
    state = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for options in ({}, {"coverage": coverage / coverage.sum(), "states": state}):
        shaped = epic_distance(mdp, reward, scale * reward + shaping + 2.5, **options)
        assert shaped.shape == (6,)
        assert shaped.max() < ZERO
        turned = epic_distance(mdp, reward, -scale * reward + shaping - 1.0, **options)
        torch.testing.assert_close(turned, torch.ones(6).double(), **EXACT)
        # Shaping with another discount is a change.
        assert epic_distance(mdp.replace(discount=0.5), reward, reward + shaping, **options).min() > 1e-3


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("distance", ["epic", "projection", "value"])
def test_distances_are_pseudometrics_in_one_call(distance: str) -> None:
    mdp = oracle.random_mdp(2, states=3, actions=2, discount=0.9)
    event = (3, 2, 3) if distance == "epic" else (3, 2)

    def measure(a: Tensor, b: Tensor) -> Tensor:
        return epic_distance(mdp, a, b) if distance == "epic" else starc_distance(mdp, a, b, canonical=distance)

    rewards = normal(7, *event)
    found = measure(rewards.unsqueeze(1), rewards)
    assert found.shape == (7, 7)
    for i, j in itertools.product(range(7), range(7)):
        torch.testing.assert_close(found[i, j], measure(rewards[i], rewards[j]), **EXACT)
    torch.testing.assert_close(found, found.mT, **EXACT)
    assert found.diagonal().max() < ZERO
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert (found.unsqueeze(2) + found.unsqueeze(0) >= found.unsqueeze(1) - 1e-12).all()  # d(i,k) + d(k,j) >= d(i,j)


def test_trivial_rewards_are_alike_and_half_way_to_all_others() -> None:
    mdp = oracle.random_mdp(2, discount=0.9)
    other, phi = normal(3, 2), normal(3, seed=1)
    potential = phi.unsqueeze(1) - 0.9 * table(mdp) @ phi
    for canonical in ("projection", "value"):
        for zero in (torch.zeros(3, 2).double(), torch.full((3, 2), 7.0, dtype=torch.float64), 100 * potential):
            assert starc_distance(mdp, zero, 3 * potential, canonical=canonical) == 0
            half = starc_distance(mdp, zero, other, canonical=canonical)
            torch.testing.assert_close(half, torch.tensor(0.5).double(), **EXACT)
    shaping = 0.9 * phi - phi[:, None, None].expand(3, 2, 1)
    assert epic_distance(0.9, 100 * shaping, torch.zeros(3, 2).double()) == 0
    torch.testing.assert_close(epic_distance(0.9, shaping, other), torch.tensor(0.5).double(), **EXACT)


# ------------------------------------------------------------------------------------------------ STARC


def looped_starc(mdp: TabularMDP, a: Tensor, b: Tensor, value_form: bool) -> float:
    """Canonicalise by least squares over potentials, or by the uniform policy's values; normalise; halve."""
    states, actions = mdp.num_states, mdp.num_actions
    kernel, g = table(mdp).tolist(), mdp.discount
    seen = [(s, x) for s in range(states) for x in range(actions) if math.isfinite(mdp.log_prior[s, x])]
    rows = [[float(s == t) - g * kernel[s][x][t] for t in range(states)] for s, x in seen]
    system = torch.tensor(rows, dtype=torch.float64)

    def standard(r: Tensor) -> Tensor:
        listed = torch.tensor([float(r[pair]) for pair in seen], dtype=torch.float64)
        if value_form:
            policy = torch.tensor([1 / sum(s == t for t, _ in seen) for s, _ in seen], dtype=torch.float64)
            mean = torch.zeros(states, len(seen), dtype=torch.float64)
            for i, (s, _) in enumerate(seen):
                mean[s, i] = policy[i]
            phi = torch.linalg.solve(mean @ system, mean @ listed)
        else:
            phi = torch.linalg.solve(system.mT @ system, system.mT @ listed)
        form = listed - system @ phi
        return form / form.square().sum().sqrt()

    return float((standard(a) - standard(b)).square().sum().sqrt()) / 2


@pytest.mark.parametrize(
    "options",
    [{"discount": 0.9}, {"discount": 0.6, "available": MASK}, {"discount": 0.9, "terminal": [1]}, {"terminal": [0, 2]}],
)
@pytest.mark.parametrize("canonical", ["projection", "value"])
def test_starc_is_its_definition(options: dict[str, Any], canonical: str) -> None:
    mdp = oracle.random_mdp(7, **options)
    a, b = normal(5, 3, 2), normal(3, 2, seed=1)
    found = starc_distance(mdp, a, b, canonical=canonical)
    expected = [looped_starc(mdp, x, b, canonical == "value") for x in a]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert found.max() - found.min() > 0.01 or "terminal" in options


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", [{"discount": 0.95}, {"discount": 0.9, "terminal": [1]}, {"terminal": [3]}])
@pytest.mark.parametrize("canonical", ["projection", "value"])
def test_starc_is_zero_under_expected_shaping_and_one_when_turned(options: dict[str, Any], canonical: str) -> None:
    mdp = oracle.random_mdp(2, states=4, actions=3, **options)
    reward, phi = normal(6, 4, 3), 3 * normal(6, 4, seed=1)
    scale = normal(6, seed=2).exp()[:, None, None]
    shaping = phi.unsqueeze(-1) - mdp.discount * torch.einsum("sat,bt->bsa", table(mdp), phi)
    unseen = ~mdp.log_prior.isfinite() * normal(4, 3, seed=5)  # what no episode contains
    shaped = starc_distance(mdp, reward, scale * reward + shaping + unseen, canonical=canonical)
    assert shaped.shape == (6,)
    assert shaped.max() < ZERO
    turned = starc_distance(mdp, reward, -scale * reward + shaping, canonical=canonical)
    torch.testing.assert_close(turned, torch.ones(6).double(), **EXACT)
    other = oracle.random_mdp(3, states=4, actions=3, **options)
    assert starc_distance(other, reward, reward + shaping, canonical=canonical).min() > 1e-3


def test_starc_with_a_horizon_knows_its_own_gauge() -> None:
    mdp = oracle.random_mdp(2, horizon=4)
    reward, phi = normal(3, 2), normal(3, seed=1)
    assert starc_distance(mdp, reward, 2 * reward + 3.0) < ZERO
    shaping = phi.unsqueeze(-1) - table(mdp) @ phi
    assert starc_distance(mdp, reward, reward + shaping) > 1e-3
    with pytest.raises(HorizonError, match="projection"):
        starc_distance(mdp, reward, reward, canonical="value")


# ------------------------------------------------------------------------------------------------ held-out choices


DEMOS = Trajectories(states=[[0, 1, 2, 0], [2, 1], [1]], actions=[[0, 1, 1], [0], []])


@pytest.mark.usefixtures("blocks")
def test_held_out_choices_by_hand() -> None:
    log_policy = torch.log_softmax(normal(7, 2, 3, 2), -1)
    found = held_out_log_likelihood(log_policy, DEMOS)
    first = log_policy[..., 0, 0] + log_policy[..., 1, 1] + log_policy[..., 2, 1]
    episodes = torch.stack([first, log_policy[..., 2, 0], 0 * first], -1)
    torch.testing.assert_close(found.episodes, episodes, **EXACT)
    torch.testing.assert_close(found.per_decision, episodes.sum(-1) / 4, **EXACT)
    assert found.decisions.tolist() == [3, 1, 0]
    bits = held_out_log_likelihood(log_policy, DEMOS, bits=True)
    torch.testing.assert_close(bits.per_decision, found.per_decision / math.log(2), **EXACT)
    pooled = held_out_log_likelihood(log_policy, DEMOS, pool=True)
    predictive = episodes.reshape(14, 3).exp().mean(0).log()
    torch.testing.assert_close(pooled.episodes, predictive, **EXACT)
    torch.testing.assert_close(pooled.per_decision, predictive.sum() / 4, **EXACT)
    # Jensen: averaging probabilities beats averaging their logarithms.
    assert pooled.per_decision > found.per_decision.mean()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("horizon", [None, 5])
def test_held_out_choices_are_those_of_the_causal_likelihood(horizon: int | None) -> None:
    mdp = oracle.random_mdp(3, discount=0.9, horizon=horizon)
    rewards = normal(5, 3, 2)
    demos = simulate(mdp, rewards[0], num_episodes=12, length=4)
    own = None if horizon is None else torch.arange(12) % 2 * 6 - 1  # -1: the problem's; 5: the same, spelled out
    short = Trajectories(demos.states, demos.actions, demos.lengths, horizons=own)
    if horizon is not None:
        short = Trajectories(
            demos.states[:, :4], demos.actions[:, :3], horizons=torch.tensor([3, 4, 5] * 4), ends="truncated"
        )
    law = MaxCausalEntTrajectory(mdp, rewards.unsqueeze(1), horizons=short.horizons)
    expected = law.choice_log_prob(short.as_tensor())
    found = held_out_log_likelihood(soft_policy(mdp, rewards), short, horizon=horizon)
    torch.testing.assert_close(found.episodes, expected, **EXACT)


def test_a_choice_of_probability_zero_counts_where_it_was_made_only() -> None:
    log_policy = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]]).log()
    found = held_out_log_likelihood(log_policy, DEMOS)
    assert found.per_decision.isneginf().tolist() == [False, True]
    assert found.episodes.isneginf().tolist() == [[False, False, False], [True, False, False]]
    assert held_out_log_likelihood(log_policy, DEMOS, pool=True).per_decision.isfinite()


# ------------------------------------------------------------------------------------------------ features, policies


def enumerated_features(mdp: TabularMDP, policy: Tensor, features: Tensor) -> Tensor:
    columns = [enumerated_return(mdp, policy, column) for column in features.movedim(-1, 0)]
    return torch.tensor(columns, dtype=torch.float64)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", [{}, {"discount": 0.8, "terminal": [2]}])
def test_the_feature_gap_is_that_of_means_over_all_trajectories(options: dict[str, Any]) -> None:
    mdp = oracle.random_mdp(3, horizon=3, **options)
    features = normal(3, 2, 4)
    demos = simulate(mdp, normal(3, 2), num_episodes=60, length=3)
    # Some enter a terminal state with no decision left for its no-op, some with one.
    assert not mdp.terminal.any() or {2, 3} <= set((demos.states == 2).nonzero()[:, 1].tolist())
    shown = torch.zeros(4, dtype=torch.float64)
    for states, actions in zip(demos.states.tolist(), demos.actions.tolist(), strict=True):
        for t, (s, a) in enumerate(itertools.zip_longest(states[:3], actions, fillvalue=-1)):
            if s >= 0:  # the no-op of a terminal state is action 0
                shown += mdp.discount**t * features[s, max(a, 0)] / 60
    stationary, by_time = random_policy(mdp, 4, seed=1), random_policy(mdp, 2, 3, seed=2)
    for policy, whole in ((stationary, stationary.unsqueeze(1).expand(4, 3, 3, 2)), (by_time, by_time)):
        expected = torch.stack([(enumerated_features(mdp, pi, features) - shown).norm() for pi in whole])
        torch.testing.assert_close(feature_gap(mdp, features, demos, policy=policy), expected, **EXACT)
    visits = discounted_occupancy(mdp, stationary)
    torch.testing.assert_close(
        feature_gap(mdp, features, demos, occupancy=visits),
        feature_gap(mdp, features, demos, policy=stationary),
        **EXACT,
    )
    largest = feature_gap(mdp, features, demos, occupancy=visits, order=math.inf)
    assert (largest <= feature_gap(mdp, features, demos, occupancy=visits)).all()
    on_states = normal(3, 2)
    torch.testing.assert_close(
        feature_gap(mdp, on_states, demos, policy=stationary),
        feature_gap(mdp, on_states.unsqueeze(1).expand(3, 2, 2), demos, policy=stationary),
        **EXACT,
    )


@pytest.mark.parametrize("options", [{"discount": 0.9}, {"discount": 0.9, "terminal": [2]}, {"terminal": [2]}])
def test_the_right_policy_closes_the_feature_gap_whenever_watching_stops(options: dict[str, Any]) -> None:
    mdp = oracle.random_mdp(3, **options)
    reward = -normal(3, 2).abs()
    policy, features = soft_policy(mdp, reward).exp(), torch.eye(6, dtype=torch.float64).reshape(3, 2, 6)
    episodes = 4_000
    demos = simulate(mdp, reward, num_episodes=episodes, length=4)
    gap = feature_gap(mdp, features, demos, policy=policy)
    # A count lies in [0, 4], so its mean has a standard deviation of at most 2 / sqrt(N): 5 of them, 6 counts.
    assert gap < 5 * 2 / math.sqrt(episodes) * math.sqrt(6)
    assert gap < feature_gap(mdp, features, demos, policy=random_policy(mdp, seed=3)) / 3


def test_occupancy_is_taken_as_it_is() -> None:
    mdp = oracle.random_mdp(1, horizon=4)
    demos, reward = simulate(mdp, normal(3, 2), num_episodes=3, length=4), normal(5, 3, 2)
    by_policy = feature_gap(mdp, normal(3, 2), demos, policy=soft_policy(mdp, reward).exp())
    by_occupancy = feature_gap(mdp, normal(3, 2), demos, occupancy=occupancy(mdp, reward, "causal"))
    torch.testing.assert_close(by_policy, by_occupancy, **EXACT)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", [{"terminal": [1]}, {"discount": 0.7}])
def test_divergence_is_the_mean_over_the_first_policys_trajectories(options: dict[str, Any]) -> None:
    mdp = oracle.random_mdp(3, horizon=3, **options)
    p, q = random_policy(mdp, 4, 3, seed=1), random_policy(mdp, 2, 1, seed=2)
    found = policy_divergence(mdp, p.log(), q[:, 0].log().unsqueeze(1))
    assert found.kl.shape == found.total_variation.shape == (2, 4)
    acting = (~mdp.terminal).double().unsqueeze(1).expand(3, 2)
    for i, j in itertools.product(range(2), range(4)):
        kl = variation = total = 0.0
        for t in range(3):
            # What is received at step t only: the visits of that step.
            shorter = mdp.replace(horizon=t + 1)
            for s in range(3):
                here = torch.zeros(3, 2).double()
                here[s] = acting[s]
                before = enumerated_return(mdp.replace(horizon=t), p[j, :t], here) if t else 0.0
                weight = enumerated_return(shorter, p[j, : t + 1], here) - before
                pi, rho = p[j, t, s], q[i, 0, s]
                kl += weight * float((pi * (pi / rho).log()).sum())
                variation += weight * float((pi - rho).abs().sum()) / 2
                total += weight
        assert float(found.kl[i, j]) == pytest.approx(kl / total, rel=1e-11)
        assert float(found.total_variation[i, j]) == pytest.approx(variation / total, rel=1e-11)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", [{"discount": 0.9}, {"terminal": [1], "available": MASK}])
def test_divergence_without_a_horizon(options: dict[str, Any]) -> None:
    mdp = oracle.random_mdp(3, **options)
    p, q = random_policy(mdp, 5, seed=1), random_policy(mdp, seed=2)
    found = policy_divergence(mdp, p.log(), q.log())
    weight = discounted_occupancy(mdp, p).sum(-1) * ~mdp.terminal
    each = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
    torch.testing.assert_close(found.kl, (weight * each).sum(-1) / weight.sum(-1), **EXACT)
    variation = (weight * (p - q).abs().sum(-1)).sum(-1) / weight.sum(-1) / 2
    torch.testing.assert_close(found.total_variation, variation, **EXACT)
    same = policy_divergence(mdp, p.log(), p.log())
    assert same.kl.abs().max() < 1e-14
    assert same.total_variation.abs().max() < 1e-14
    # Pinsker's inequality, state by state and so on average.
    assert (found.kl >= 2 * found.total_variation.square()).all()


def test_divergence_of_extreme_policies() -> None:
    mdp = envs.random_mdp(3, 2)
    sure, even = torch.tensor([[1.0, 0.0]] * 3).double(), torch.full((3, 2), 0.5).double()
    assert policy_divergence(mdp, even.log(), sure.log()).kl == math.inf
    torch.testing.assert_close(
        policy_divergence(mdp, sure.log(), even.log()).kl, torch.tensor(math.log(2), dtype=torch.float64)
    )
    far = torch.tensor([[0.0, -2_000.0]] * 3).double()  # beyond what exp can hold
    kl = policy_divergence(mdp, even.log(), far).kl
    torch.testing.assert_close(kl, torch.tensor(1_000 - math.log(2), dtype=torch.float64), **EXACT)


# ------------------------------------------------------------------------------------------------ calibration


def test_intervals_are_between_quantiles() -> None:
    draws = normal(1_000, 3, 2)
    levels = (0.5, 0.8, 0.99)
    for truth in (normal(3, 2, seed=1), 5 + normal(3, 2)):
        found = interval_coverage(draws, truth, levels)
        for row, level in zip(found, levels, strict=True):
            low, high = torch.quantile(draws, torch.tensor([(1 - level) / 2, (1 + level) / 2]).double(), dim=0)
            assert (row == ((low <= truth) & (truth <= high))).all()
    assert interval_coverage(torch.zeros(1, 2), torch.zeros(2)).all()


def test_intervals_of_a_right_posterior_cover_as_they_say() -> None:
    count = 4_000
    truth = normal(count)
    data = truth + normal(count, seed=1)
    draws = data / 2 + math.sqrt(0.5) * normal(400, count, seed=2)
    for row, level in zip(interval_coverage(draws, truth, (0.5, 0.9)), (0.5, 0.9), strict=True):
        # 4.5 binomial standard deviations, and what 400 draws leave open at either end.
        assert abs(float(row.double().mean()) - level) < 4.5 * math.sqrt(level * (1 - level) / count) + 1 / 200
    narrow = interval_coverage(data / 2 + (draws - data / 2) / 2, truth, (0.9,)).double().mean()
    assert narrow < 0.75


# ------------------------------------------------------------------------------------------------ errors


def nan(*shape: int) -> Tensor:
    return torch.full(shape, math.nan, dtype=torch.float64)


def test_misuse_is_named() -> None:
    mdp, r = oracle.random_mdp(1, discount=0.9), normal(3, 2)
    log_policy = random_policy(mdp).log()
    cases: list[tuple[type[PirlError], str, Any]] = [
        (OptionError, "one of the two", lambda: expected_value_difference(mdp, r)),
        (OptionError, "one of the two", lambda: expected_value_difference(mdp, r, r, policy=log_policy.exp())),
        (InvalidPolicyError, "not a distribution", lambda: expected_value_difference(mdp, r, policy=log_policy)),
        (InvalidRewardError, "expected", lambda: expected_value_difference(mdp, r, normal(4, 2))),
        (OptionError, "discount is 1.5", lambda: epic_distance(1.5, r, r)),
        (InvalidRewardError, "NaN", lambda: epic_distance(mdp, r, nan(3, 2))),
        (InvalidRewardError, "not floating", lambda: epic_distance(0.9, r.long(), r.long())),
        (InvalidRewardError, "expected", lambda: epic_distance(mdp, r, normal(4, 2))),
        (InvalidRewardError, "cannot be compared", lambda: epic_distance(0.9, r, normal(4, 2))),
        (OptionError, "coverage must be", lambda: epic_distance(mdp, r, r, coverage=torch.ones(3, 2, 3).double())),
        (OptionError, "states must be", lambda: epic_distance(mdp, r, r, states=torch.ones(2).double() / 2)),
        (OptionError, "canonical must be", lambda: starc_distance(mdp, r, r, canonical="epic")),
        (InvalidRewardError, "NaN", lambda: starc_distance(mdp, r, nan(3, 2))),
        (InvalidRewardError, "expected_reward", lambda: starc_distance(mdp, r, normal(3, 2, 3))),
        (InvalidPolicyError, "above 0", lambda: held_out_log_likelihood(log_policy.exp(), DEMOS)),
        (InvalidPolicyError, "above 0", lambda: held_out_log_likelihood(nan(3, 2), DEMOS)),
        (InvalidPolicyError, r"\[\*batch, 5, S, A\]", lambda: held_out_log_likelihood(log_policy, DEMOS, horizon=5)),
        (InvalidTrajectoriesError, "state 2", lambda: held_out_log_likelihood(log_policy[:2], DEMOS)),
        (InvalidTrajectoriesError, "no decision", lambda: held_out_log_likelihood(log_policy, DEMOS[2:])),
        (HorizonError, "trajectory 0 goes beyond the 2", lambda: held_out_log_likelihood(
            log_policy.expand(2, 3, 2), DEMOS, horizon=2)),
        (OptionError, "one of the two", lambda: feature_gap(mdp, r, DEMOS)),
        (InvalidRewardError, "features are", lambda: feature_gap(mdp, normal(4, 2), DEMOS, policy=log_policy.exp())),
        (InvalidPolicyError, "not a distribution", lambda: feature_gap(mdp, r, DEMOS, policy=log_policy)),
        (InvalidPolicyError, "occupancy has shape", lambda: feature_gap(mdp, r, DEMOS, occupancy=normal(2, 2))),
        (InvalidPolicyError, "not a distribution", lambda: policy_divergence(mdp, log_policy, 2 * log_policy)),
        (InvalidPolicyError, "policy has shape", lambda: policy_divergence(mdp, log_policy, log_policy[:2])),
        (OptionError, "strictly between", lambda: interval_coverage(r, r[0], (0.5, 1.0))),
        (OptionError, "no draws|do not fit", lambda: interval_coverage(r[:0], r[0])),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_a_policy_by_time_does_not_fit_horizons_of_their_own() -> None:
    mdp = oracle.random_mdp(1, horizon=4)
    demos = Trajectories(states=[[0, 0]], actions=[[0]], horizons=[2])
    with pytest.raises(HorizonError, match="of their own"):
        feature_gap(mdp, normal(3, 2), demos, policy=random_policy(mdp, 4))


def test_the_gap_of_the_right_policy_vanishes_however_episodes_end() -> None:
    """Terminated and truncated ones, with and without what was said of their ends and horizons."""
    table = torch.zeros(3, 2, 3, dtype=torch.float64)
    rows = [[[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], [[0.3, 0.3, 0.4], [0.5, 0.4, 0.1]]]
    table[:2] = torch.tensor(rows, dtype=torch.float64)
    mdp = TabularMDP(table, 0, 0.9, terminal=[False, False, True])
    reward = torch.tensor([[0.3, -0.2], [0.1, 0.5], [1.0, 1.0]], dtype=torch.float64)
    count, features = 20_000, torch.eye(3, dtype=torch.float64)
    told = simulate(mdp, reward, count, 6)
    ends = tuple("terminated" if bool(mdp.terminal[s[s >= 0][-1]]) else "truncated" for s in told.states)
    untold = [
        Trajectories(told.states, told.actions, told.lengths),
        Trajectories(told.states, told.actions, told.lengths, ends=ends),
    ]
    policy = soft_policy(mdp, reward).exp()
    for demos in (told, *untold):
        # Visits of an episode have a spread of some 1.
        assert feature_gap(mdp, features, demos, policy=policy) < 4 * 3**0.5 * 1.5 / count**0.5


def test_the_gap_of_a_subset_is_that_of_the_same_episodes_by_themselves() -> None:
    table = torch.tensor([[[0.5, 0.5]], [[0.0, 1.0]]], dtype=torch.float64)
    mdp, features = TabularMDP(table, 0, 0.9, terminal=[1]), torch.eye(2, dtype=torch.float64)
    states = [[0, 1], [0, 0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0]]
    ends, policy = ["terminated"] * 3 + ["truncated"], torch.ones(2, 1, dtype=torch.float64)

    def gap(demos: Trajectories) -> float:
        return float(feature_gap(mdp, features, demos, policy=policy))

    def built(count: int, **options: Any) -> Trajectories:
        chosen = states[:count]
        return Trajectories(chosen, [[0] * (len(row) - 1) for row in chosen], ends=ends[:count], **options)

    assert gap(built(4)[:2]) == gap(built(2)) == gap(pickle.loads(pickle.dumps(built(4)))[:2])
    assert gap(built(4, limits=[10, 10, 9, 2])[:2]) == gap(built(2, limits=[10, 10])) != gap(built(2))
    # A limit that someone gave counts, whatever number it is.
    assert gap(built(1, limits=[5])) != gap(built(1)) != gap(built(1, limits=[1]))
