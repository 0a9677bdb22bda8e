"""Plans: every deterministic policy and every trajectory of tiny problems, tried out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pirl import planning, transitions
from pirl.errors import (
    DiscountError,
    DivergenceError,
    HorizonError,
    InvalidPolicyError,
    NotUnichainError,
    OptionError,
    UnboundedProblemError,
)
from pirl.mdp import TabularMDP
from pirl.planning import (
    discounted_occupancy,
    most_likely_trajectory,
    optimal_policy,
    policy_value,
    stationary_distribution,
)
from tests import oracle
from tests.draws import normal

EXACT = {"rtol": 1e-12, "atol": 1e-12}
MASK = torch.tensor([[True, True, False], [True, True, True], [False, True, True], [True, False, True]])


def random_policy(mdp: TabularMDP, *batch: int, seed: int = 0) -> Tensor:
    weight = normal(*batch, mdp.num_states, mdp.num_actions, seed=seed).exp() * mdp.available
    return weight / weight.sum(-1, keepdim=True)


def one_hot(actions: tuple[int, ...] | Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.as_tensor(actions), count).double()


def deterministic_policies(mdp: TabularMDP) -> Iterator[Tensor]:
    choices = [row.isfinite().nonzero().flatten().tolist() for row in mdp.log_prior]
    for actions in itertools.product(*choices):
        yield one_hot(actions, mdp.num_actions)


def chain_of(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """P_pi [S, S], with nothing after a terminal state."""
    table = mdp.transition.to_dense().reshape(mdp.num_states, mdp.num_actions, mdp.num_states)
    return torch.einsum("sa,sat->st", policy, table) * ~mdp.terminal.unsqueeze(1)


def solved_value(mdp: TabularMDP, policy: Tensor, reward: Tensor) -> Tensor:
    system = torch.eye(mdp.num_states, dtype=torch.float64) - mdp.discount * chain_of(mdp, policy)
    return torch.linalg.solve(system, (policy * reward).sum(1))


def enumerated_value(mdp: TabularMDP, policy: Tensor, reward: Tensor) -> Tensor:
    """Expected return from each state over every trajectory (finite horizon; policy [T, S, A])."""
    assert mdp.horizon is not None
    result = []
    for start in range(mdp.num_states):
        terms = []
        # Under the counting measure a trajectory's probability is that of chance alone.
        for path in oracle.paths(mdp.replace(initial=start, action_prior="counting"), mdp.horizon):
            chosen = math.prod(float(policy[t, s, a]) for t, (s, a) in enumerate(path.pairs))
            gain = math.fsum(mdp.discount**t * float(reward[s, a]) for t, (s, a) in enumerate(path.visited))
            terms.append(path.probability * chosen * gain)
        result.append(math.fsum(terms))
    return torch.tensor(result, dtype=torch.float64)


FINITE = [
    {},
    {"discount": 0.7},
    {"terminal": [2]},
    {"terminal": [1, 3], "available": MASK, "discount": 0.9},
]


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("options", FINITE)
def test_the_value_of_a_policy_is_its_mean_return_over_all_trajectories(options: dict) -> None:
    mdp = oracle.random_mdp(3, states=4, actions=3, horizon=3, **options)
    reward, stationary = normal(4, 3), random_policy(mdp, seed=1)
    by_time = random_policy(mdp, 3, seed=2)
    for policy, whole in ((stationary, stationary.expand(3, 4, 3)), (by_time, by_time)):
        value = policy_value(mdp, policy, reward)
        assert value.shape == (3, 4)
        torch.testing.assert_close(value[0], enumerated_value(mdp, whole, reward), **EXACT)
        # With a step gone, what is left is a shorter problem.
        shorter = enumerated_value(mdp.replace(horizon=2), whole[1:], reward)
        torch.testing.assert_close(value[1], shorter, **EXACT)


def test_as_many_policies_as_steps_are_not_taken_for_one_by_time() -> None:
    mdp = oracle.random_mdp(3, states=4, actions=3, horizon=5)
    rewards, policies = normal(5, 4, 3), random_policy(mdp, 5, seed=1)
    with pytest.raises(InvalidPolicyError, match=r"one for each of 5 rewards: say timed=True or timed=False"):
        policy_value(mdp, policies, rewards)
    pairs = zip(policies, rewards, strict=True)
    each = torch.stack([policy_value(mdp, policy, reward) for policy, reward in pairs])
    torch.testing.assert_close(policy_value(mdp, policies, rewards, timed=False), each, **EXACT)
    by_time = torch.stack([policy_value(mdp, policies, reward) for reward in rewards])
    torch.testing.assert_close(policy_value(mdp, policies, rewards, timed=True), by_time, **EXACT)
    torch.testing.assert_close(policy_value(mdp, policies, rewards[0], timed=False)[0], each[0], **EXACT)
    for wrong in (mdp.replace(horizon=4), mdp.replace(horizon=None, discount=0.9)):
        with pytest.raises(InvalidPolicyError, match="is not by time"):
            policy_value(wrong, policies, rewards, timed=True)


@pytest.mark.parametrize("options", [{"discount": 0.9}, {"discount": 0.5, "terminal": [0]}, {"terminal": [2]}])
def test_the_value_of_a_policy_without_horizon(options: dict) -> None:
    mdp = oracle.random_mdp(4, states=4, actions=3, available=MASK, **options)
    reward, policy = normal(4, 3), random_policy(mdp)
    value = policy_value(mdp, policy, reward)
    by_solve = solved_value(mdp, torch.where(mdp.terminal[:, None], one_hot((0,) * 4, 3), policy), reward)
    torch.testing.assert_close(value, by_solve, **EXACT)
    # What is beyond 400 steps weighs at most .9^400, or the probability of not having ended: both below 1e-16.
    assert mdp.discount**400 < 1e-16 or bool((chain_of(mdp, policy).matrix_power(400).sum(1) < 1e-16).all())
    long = policy_value(mdp.replace(horizon=400), policy, reward)
    torch.testing.assert_close(value, long[0], **EXACT)


# ------------------------------------------------------------------------------------------------ optimal policies


@pytest.mark.parametrize("options", [{}, {"discount": 0.6}, {"terminal": [1], "discount": 0.9}])
def test_the_optimal_plan_is_the_best_of_all_plans_by_time(options: dict) -> None:
    mdp = oracle.random_mdp(5, states=3, actions=2, horizon=2, **options)
    reward = normal(3, 2, seed=1)
    plans = [torch.stack(plan) for plan in itertools.product(deterministic_policies(mdp), repeat=2)]
    best = torch.stack([enumerated_value(mdp, plan, reward) for plan in plans]).amax(0)
    found = optimal_policy(mdp, reward)
    torch.testing.assert_close(found.value[0], best, **EXACT)
    torch.testing.assert_close(enumerated_value(mdp, found.policy, reward), best, **EXACT)
    torch.testing.assert_close(policy_value(mdp, found.policy, reward), found.value, **EXACT)
    torch.testing.assert_close(found.action_value.amax(-1), found.value, **EXACT)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("options", [{}, {"terminal": [1], "available": MASK}])
def test_the_optimal_policy_is_the_best_of_all_policies(options: dict, discount: float) -> None:
    mdp = oracle.random_mdp(6, states=4, actions=3, discount=discount, **options)
    reward = normal(4, 3, seed=2)
    best = torch.stack([solved_value(mdp, policy, reward) for policy in deterministic_policies(mdp)]).amax(0)
    found = optimal_policy(mdp, reward)
    # A solve loses up to 1 / (1 - discount) in relative accuracy.
    torch.testing.assert_close(found.value, best, rtol=1e-13 / (1 - discount), atol=1e-13)
    torch.testing.assert_close(policy_value(mdp, found.policy, reward), best, rtol=1e-13 / (1 - discount), atol=1e-13)
    allowed = mdp.log_prior.isfinite()
    assert found.action_value.isfinite().equal(allowed)
    assert bool((found.policy[~allowed] == 0).all()) and bool((found.policy.sum(-1) == 1).all())


def longest_run(mdp: TabularMDP, policy: Tensor, reward: Tensor) -> float:
    """Best long-run reward a step, over starts, of a deterministic policy in a deterministic problem of 4 states."""
    chain, flow = chain_of(mdp, policy), (policy * reward).sum(1)
    steps = [torch.linalg.matrix_power(chain, n) @ flow for n in range(4, 16)]  # any cycle's length divides 12
    return float(torch.stack(steps).mean(0).max())


def test_without_discount_the_optimum_is_right_or_diverges() -> None:
    seen = {"finite, every policy ends": 0, "finite, some never end": 0, "infinite": 0}
    for seed in range(160):
        try:
            mdp = oracle.random_mdp(seed, states=4, actions=2, stochastic=False, terminal=[3])
        except UnboundedProblemError:
            continue
        reward = normal(4, 2, seed=seed) - 0.5
        ending, endless = [], []
        for policy in deterministic_policies(mdp):
            ends = bool((chain_of(mdp, policy).matrix_power(4) == 0).all())
            (ending if ends else endless).append(policy)
        if any(longest_run(mdp, policy, reward) > 1e-9 for policy in endless):
            seen["infinite"] += 1
            with pytest.raises(DivergenceError, match="never reaches a terminal state"):
                optimal_policy(mdp, reward)
            continue
        seen["finite, some never end" if endless else "finite, every policy ends"] += 1
        best = torch.stack([solved_value(mdp, policy, reward) for policy in ending]).amax(0)
        found = optimal_policy(mdp, reward)
        torch.testing.assert_close(found.value, best, **EXACT)
        torch.testing.assert_close(policy_value(mdp, found.policy, reward), best, **EXACT)
    assert min(seen.values()) >= 5, seen


def stay_or_go() -> TabularMDP:
    """State 0: action 0 stays, action 1 goes to the end, state 1."""
    table = torch.zeros(2, 2, 2, dtype=torch.float64)
    table[0, 0, 0] = table[0, 1, 1] = 1.0
    return TabularMDP(table, 0, terminal=[1])


def test_a_tie_with_never_ending_is_broken_by_ending() -> None:
    # Staying is as good as going only as long as one goes in the end.
    reward = torch.tensor([[0.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    found = optimal_policy(stay_or_go(), reward)
    assert found.policy[0].tolist() == [0.0, 1.0]
    assert policy_value(stay_or_go(), found.policy, reward).tolist() == found.value.tolist() == [5.0, 5.0]


def test_a_policy_that_never_ends_is_not_optimal_but_one_that_gains_for_ever_diverges() -> None:
    # Of the policies that end the best loses 1; staying for ever at no cost is not one of them.
    found = optimal_policy(stay_or_go(), torch.tensor([[0.0, -1.0], [0.0, 0.0]], dtype=torch.float64))
    assert found.value.tolist() == [-1.0, 0.0]
    with pytest.raises(DivergenceError, match="state 0"):
        optimal_policy(stay_or_go(), torch.tensor([[1e-9, -1.0], [0.0, 0.0]], dtype=torch.float64))


def test_divergence_is_seen_where_rounding_hides_that_the_system_is_singular() -> None:
    # A closed class of thirds: 1 - 3 * (1/3) is not 0 in floating point.
    table = torch.zeros(4, 2, 4, dtype=torch.float64)
    table[:3, 0, :3] = 1 / 3
    table[:3, 1, 3] = 1.0
    mdp = TabularMDP(table, 0, terminal=[3])
    with pytest.raises(DivergenceError, match="never reaches"):
        optimal_policy(mdp, torch.tensor([[0.1, 0.0]] * 3 + [[0.0, 0.0]], dtype=torch.float64))
    endless = one_hot((0, 0, 0, 0), 2)
    for bounded in (lambda: policy_value(mdp, endless, normal(4, 2)), lambda: discounted_occupancy(mdp, endless)):
        with pytest.raises(DivergenceError, match="state 0"):
            bounded()


@pytest.mark.parametrize("options", [{"horizon": 3}, {"discount": 0.9}, {"discount": 0.99, "terminal": [0]}])
def test_ties_go_to_the_action_of_the_lowest_number(options: dict) -> None:
    mdp = oracle.random_mdp(0, states=4, actions=3, available=MASK, **options)
    lowest = torch.where(mdp.terminal, 0, MASK.to(torch.uint8).argmax(1))
    found = optimal_policy(mdp, torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(found.policy, one_hot(lowest, 3).expand_as(found.policy))
    # Actions 0 and 1 are twins; a tie of sums that rounding could break.
    twins = TabularMDP(mdp.transition[:, [0, 0, 1]], 0, **options)
    reward = normal(4, 3)
    reward[:, 1] = reward[:, 0]
    assert bool((optimal_policy(twins, reward).policy[..., 1] == 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"horizon": 2}, {"terminal": [2]}])
def test_what_cannot_be_chosen_may_have_any_reward(options: dict, value: float) -> None:
    available = torch.tensor([[True, False], [True, True], [True, True]])
    mdp = oracle.random_mdp(0, states=3, actions=2, available=available, **options)
    reward = torch.full((3, 2), -1.0, dtype=torch.float64)
    odd = reward.clone()
    odd[0, 1] = value
    policy = available / available.sum(1, keepdim=True).double()
    for plan in (optimal_policy, most_likely_trajectory, lambda mdp, r: (policy_value(mdp, policy, r),)):
        for found, expected in zip(plan(mdp, odd), plan(mdp, reward), strict=True):
            assert bool((found == expected).all())


def test_where_all_actions_tie_the_value_is_exact() -> None:
    """Three of them: a third is no number of a shorter type."""
    mdp = TabularMDP(torch.ones(1, 3, 1, dtype=torch.float64), 0, discount=0.3)
    assert optimal_policy(mdp, torch.full((1, 3), 0.25, dtype=torch.float64)).value.item() == pytest.approx(
        0.25 / 0.7, rel=1e-15
    )


def test_a_shift_by_a_potential_leaves_the_optimal_policy() -> None:
    mdp = oracle.random_mdp(1, states=4, actions=3, discount=0.95)
    reward, potential = normal(4, 3), normal(4, seed=1)
    shifted = reward + potential[:, None] - 0.95 * (mdp.transition @ potential)
    torch.testing.assert_close(optimal_policy(mdp, shifted).policy, optimal_policy(mdp, reward).policy)


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("options", [{"horizon": 3}, {"discount": 0.9}, {"terminal": [2]}])
def test_batched_is_looped_and_dense_is_sparse(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = oracle.random_mdp(7, states=4, actions=3, available=MASK, **options)
    sparse = mdp.replace(transition=mdp.transition.reshape(12, 4).to_sparse())
    reward = normal(2, 3, 4, 3) - 2.0  # so low that nothing diverges
    policy = random_policy(mdp, 3, seed=1)
    calls = [
        lambda m, r, pi: optimal_policy(m, r),
        lambda m, r, pi: (policy_value(m, pi, r),),
        lambda m, r, pi: (discounted_occupancy(m, pi),),
    ]
    if mdp.discount == 1:
        calls.append(lambda m, r, pi: most_likely_trajectory(m, r))
    for call in calls:
        # A policy [3, S, A] beside rewards [2, 3, S, A]; 3 is the horizon too, so the time dimension is written out.
        whole = policy.unsqueeze(-3).expand(3, 3, 4, 3) if mdp.horizon is not None and call is calls[1] else policy
        batched = call(mdp, reward, whole)
        for i, j in itertools.product(range(2), range(3)):
            for many, one in zip(batched, call(mdp, reward[i, j], whole[j]), strict=True):
                torch.testing.assert_close(many[j] if call is calls[2] else many[i, j], one, **EXACT)
        with monkeypatch.context() as patch:
            for states in (1000, 0):  # a dense factorisation, then a sparse one
                patch.setattr(transitions, "DENSE_STATES", states)
                for many, one in zip(batched, call(sparse, reward, whole), strict=True):
                    torch.testing.assert_close(many, one, **EXACT)


def test_values_are_differentiable_in_reward_and_policy() -> None:
    mdp = oracle.random_mdp(8, states=3, actions=2, discount=0.9)
    logits, reward = normal(3, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, r: policy_value(mdp, x.softmax(-1), r), (logits, reward), atol=1e-8)
    # dV/dr at the start is the occupancy.
    policy = random_policy(mdp)
    (slope,) = torch.autograd.grad(mdp.initial @ policy_value(mdp, policy, reward), reward)
    torch.testing.assert_close(slope, discounted_occupancy(mdp, policy), **EXACT)


# ------------------------------------------------------------------------------------------------ occupancy


@pytest.mark.parametrize("options", FINITE)
def test_occupancy_counts_the_visits_of_all_trajectories(options: dict) -> None:
    mdp = oracle.random_mdp(9, states=4, actions=3, horizon=3, **options)
    policy = random_policy(mdp)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for path in oracle.paths(mdp.replace(action_prior=policy), 3):
        for t, (s, a) in enumerate(path.visited):
            expected[s, a] += path.probability * mdp.discount**t
    torch.testing.assert_close(discounted_occupancy(mdp, policy), expected, **EXACT)


@pytest.mark.parametrize("options", [{"discount": 0.9}, {"discount": 0.8, "terminal": [1]}, {"terminal": [1]}])
def test_occupancy_without_horizon(options: dict) -> None:
    mdp = oracle.random_mdp(10, states=4, actions=3, available=MASK, **options)
    policy = random_policy(mdp)
    visits = discounted_occupancy(mdp, policy)
    torch.testing.assert_close(visits, discounted_occupancy(mdp.replace(horizon=400), policy), **EXACT)
    if mdp.terminal.any():
        # Without discount every episode enters one terminal state once.
        assert float(visits[mdp.terminal].sum()) == pytest.approx(1.0, abs=1e-12) or mdp.discount < 1
        assert bool((visits[1, 1:] == 0).all())
    else:
        assert float(visits.sum()) == pytest.approx(1 / (1 - mdp.discount), rel=1e-12)


# ------------------------------------------------------------------------------------------------ the likeliest path


def log_weight(path: oracle.Path, reward: Tensor) -> float:
    return math.log(path.probability) + oracle.reward_sum(path, reward)


def written(found: planning.MostLikelyTrajectory) -> list[list[int]]:
    """The trajectory found, as (state, action) rows without padding."""
    actions = [*found.actions.tolist(), -1]
    return [[s, a] for s, a in zip(found.states.tolist(), actions, strict=True) if s >= 0]


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"terminal": [2]}, {"available": MASK, "terminal": [1]}, {"action_prior": "counting"}]
)
def test_the_most_likely_trajectory_is_the_most_likely_of_all(options: dict, stochastic: bool) -> None:
    for seed in range(4):
        mdp = oracle.random_mdp(seed, states=4, actions=3, horizon=3, stochastic=stochastic, **options)
        reward = normal(4, 3, seed=seed)
        best = max(oracle.paths(mdp, 3), key=lambda path: log_weight(path, reward))
        found = most_likely_trajectory(mdp, reward)
        assert found.states.shape == (4,) and found.actions.shape == (3,)
        assert float(found.log_weight) == pytest.approx(log_weight(best, reward), rel=1e-12)
        assert written(found) == [row for row in oracle.as_tensor(best, 4).tolist() if row[0] >= 0]


@pytest.mark.parametrize("stochastic", [True, False])
def test_the_most_likely_trajectory_to_the_end(stochastic: bool) -> None:
    tried = 0
    for seed in range(60):
        try:
            mdp = oracle.random_mdp(seed, states=4, actions=2, terminal=[3], stochastic=stochastic)
        except UnboundedProblemError:
            continue
        tried += 1
        reward = -normal(4, 2, seed=seed).abs()
        # With r <= 0 no detour pays: the best path visits no state twice.
        ended = [path for path in oracle.paths(mdp, 4) if path.last == 3]
        best = max(ended, key=lambda path: log_weight(path, reward))
        found = most_likely_trajectory(mdp, reward)
        assert float(found.log_weight) == pytest.approx(log_weight(best, reward), rel=1e-12)
        assert written(found) == oracle.as_tensor(best, len(best.pairs) + 1).tolist()
    assert tried >= 5


def test_a_detour_of_no_weight_is_not_taken_and_one_of_positive_weight_diverges() -> None:
    mdp = stay_or_go().replace(action_prior="counting")
    found = most_likely_trajectory(mdp, torch.zeros(2, 2, dtype=torch.float64))
    assert written(found) == [[0, 1], [1, -1]] and float(found.log_weight) == 0.0
    # 0.1 + 0.2 - 0.3 is not 0 in floating point, and still no gain.
    table = torch.zeros(4, 2, 4, dtype=torch.float64)
    for state, following in ((0, 1), (1, 2), (2, 0)):
        table[state, 0, following] = table[state, 1, 3] = 1.0
    ring = TabularMDP(table, 0, terminal=[3], action_prior="counting")
    gains = torch.tensor([[0.1, 0.0], [0.2, 0.0], [-0.3, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = most_likely_trajectory(ring, gains)
    assert written(found) == [[0, 0], [1, 0], [2, 1], [3, -1]]
    assert float(found.log_weight) == pytest.approx(0.3, abs=1e-15)
    gains[2, 0] = -0.29
    with pytest.raises(DivergenceError, match="cycle"):
        most_likely_trajectory(ring, gains)


def test_the_most_likely_trajectory_knows_no_discount_and_says_when_it_is_cut_short() -> None:
    with pytest.raises(DiscountError, match=r"replace\(discount=1.0\)"):
        most_likely_trajectory(oracle.random_mdp(0, discount=0.9), normal(3, 2))
    corridor = torch.eye(5, dtype=torch.float64).roll(1, 1).unsqueeze(1)
    mdp = TabularMDP(corridor, 0, terminal=[4])
    assert written(most_likely_trajectory(mdp, -torch.ones(5, 1).double()))[-1] == [4, -1]
    with pytest.raises(HorizonError, match="max_length=3"):
        most_likely_trajectory(mdp, -torch.ones(5, 1).double(), max_length=3)
    for wrong in (0, -1):
        with pytest.raises(OptionError, match=f"max_length is {wrong}; it must be a whole number"):
            most_likely_trajectory(mdp, -torch.ones(5, 1).double(), max_length=wrong)
    with pytest.raises(OptionError, match="max_length is for problems without a horizon, and this one has 6"):
        most_likely_trajectory(mdp.replace(horizon=6), -torch.ones(5, 1).double(), max_length=3)


# ------------------------------------------------------------------------------------------------ the long run


def test_the_stationary_distribution_is_kept_and_is_the_limit_of_the_discounted_occupancy() -> None:
    mdp = oracle.random_mdp(11, states=4, actions=3, discount=0.9)
    policy = random_policy(mdp, 5)
    found = stationary_distribution(mdp, policy)
    for chain, kept in zip((chain_of(mdp, x) for x in policy), found, strict=True):
        assert float((kept @ chain - kept).abs().max()) < 1e-12
        assert float(kept.sum()) == pytest.approx(1.0, abs=1e-12) and bool((kept >= 0).all())
        # (1 - g) sum_t g^t p_1 P^t = d + (1 - g) p_1 D + O((1 - g)^2), D the deviation matrix.
        ones = torch.ones(4, 1, dtype=torch.float64)
        deviation = torch.linalg.inv(torch.eye(4, dtype=torch.float64) - chain + ones * kept) - ones * kept
        assert float((mdp.initial @ deviation).abs().max()) > 1e-3  # so that the limit is not reached at once
    for gap in (1e-3, 1e-5):
        visits = discounted_occupancy(mdp.replace(discount=1 - gap), policy).sum(-1) * gap
        first_order = torch.stack(
            [
                mdp.initial @ (torch.linalg.inv(torch.eye(4, dtype=torch.float64) - chain_of(mdp, x) + d) - d)
                for x, d in zip(policy, found.unsqueeze(-2).expand(-1, 4, -1), strict=True)
            ]
        )
        torch.testing.assert_close(visits, found + gap * first_order, atol=20 * gap**2 + 1e-12 / gap * 1e-3, rtol=0.0)


def test_a_periodic_chain_has_a_stationary_distribution() -> None:
    ring = torch.eye(3, dtype=torch.float64).roll(1, 1).unsqueeze(1)
    found = stationary_distribution(TabularMDP(ring, 0, discount=0.9), torch.ones(3, 1, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full((3,), 1 / 3, dtype=torch.float64), **EXACT)


def test_transient_states_have_no_weight_in_the_long_run() -> None:
    table = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.2, 0.8]], [[0.0, 0.6, 0.4]]], dtype=torch.float64)
    found = stationary_distribution(TabularMDP(table, 0, horizon=1), torch.ones(3, 1, dtype=torch.float64))
    expected = torch.tensor([0.0, 3 / 7, 4 / 7], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_chain_of_two_classes_has_no_one_stationary_distribution() -> None:
    mdp = TabularMDP(torch.eye(3, dtype=torch.float64).unsqueeze(1).repeat(1, 2, 1), 0, discount=0.9)
    with pytest.raises(NotUnichainError, match="3 recurrent classes"):
        stationary_distribution(mdp, torch.full((3, 2), 0.5, dtype=torch.float64))
    with pytest.raises(NotUnichainError, match="terminal"):
        stationary_distribution(stay_or_go(), torch.full((2, 2), 0.5, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ policies refused


@pytest.mark.parametrize(
    ("state", "row", "complaint"),
    [
        (1, [0.5, 0.4, 0.0], "state 1"),
        (2, [0.5, 0.5, 0.0], "state 2"),  # action 0 is not available there
        (0, [1.5, -0.5, 0.0], "state 0"),
        (3, [math.nan, 0.0, 1.0], "state 3"),
    ],
)
def test_what_is_not_a_policy_is_refused(state: int, row: list[float], complaint: str) -> None:
    mdp = oracle.random_mdp(0, states=4, actions=3, available=MASK, discount=0.9)
    policy = random_policy(mdp)
    policy[state] = torch.tensor(row, dtype=torch.float64)
    for use in (lambda: policy_value(mdp, policy, normal(4, 3)), lambda: discounted_occupancy(mdp, policy),
                lambda: stationary_distribution(mdp, policy)):  # fmt: skip
        with pytest.raises(InvalidPolicyError, match=complaint):
            use()
    with pytest.raises(InvalidPolicyError, match="shape"):
        policy_value(mdp, policy[:, :2], normal(4, 3))
