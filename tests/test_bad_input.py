"""What is wrong with an input, where, and nothing half-done: one named error for each kind."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from pirl import envs
from pirl.errors import (
    ConvergenceError,
    DiscountError,
    DivergenceError,
    EmptyTrajectoriesWarning,
    HorizonError,
    ImpossibleTransitionError,
    InvalidMDPError,
    InvalidRewardError,
    InvalidTrajectoriesError,
    ModelError,
    NonFiniteError,
    PirlError,
    RewardTimingError,
    StuckChainsError,
    UnavailableActionError,
    UnboundedProblemError,
)
from pirl.mdp import TabularMDP
from pirl.message_passing import log_partition, messages, soft_policy
from pirl.trajectories import Trajectories
from tests import oracle

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"causal": pirl.MaxCausalEntTrajectory, "trajectory": pirl.MaxEntTrajectory}
READINGS = tuple(KINDS)
TABLE = oracle.random_mdp(0, states=3, actions=2, horizon=1).transition


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def changed(x: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"horizon": 3}, {"discount": 0.9}, {"terminal": [2]}])
def test_a_reward_that_is_not_finite_names_its_pair(value: float, options: dict) -> None:
    mdp = oracle.random_mdp(0, states=3, actions=2, **options)
    reward = changed(zeros(4, 3, 2) - 1.0, (2, 1, 1), value)  # one of four draws
    policy = torch.full((3, 2), 0.5, dtype=torch.float64)
    uses: list[Callable[[], Any]] = [
        lambda: pirl.MaxCausalEntTrajectory(mdp, reward),
        lambda: soft_policy(mdp, reward),
        lambda: messages(mdp, reward, "causal"),
        lambda: pirl.optimal_policy(mdp, reward),
        lambda: pirl.policy_value(mdp, policy, reward),
    ]
    if mdp.discount == 1:
        uses += [lambda: pirl.MaxEntTrajectory(mdp, reward), lambda: log_partition(mdp, reward)]
        uses += [lambda: pirl.most_likely_trajectory(mdp, reward)]
    for use in uses:
        with pytest.raises(InvalidRewardError, match="state 1, action 1 is NaN or infinite"):
            use()


# ------------------------------------------------------------------------------------------------ probabilities


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ((1, 0, 2), math.nan, r"transition\[1, 0\] contains nan"),
        ((2, 1, 0), math.inf, r"transition\[2, 1\] contains inf"),
        ((0, 1, 1), -0.25, r"transition\[0, 1\] contains -0.25"),
        ((1, 1, 2), 0.5, r"transition\[1, 1\] sums to .*, not 1"),
        ((1, 1, 2), None, r"transition\[1, 1\] sums to 1.00000002, not 1"),
    ],
)
def test_a_row_that_is_no_distribution_is_named(
    layout: str, place: tuple[int, ...], value: float | None, complaint: str
) -> None:
    table = changed(TABLE, place, float(TABLE[place]) + 2e-8 if value is None else value)
    given = table if layout == "dense" else table.reshape(6, 3).to_sparse()
    with pytest.raises(InvalidMDPError, match=complaint):
        TabularMDP(given, 0, horizon=2)


def test_rows_may_round() -> None:
    table = changed(TABLE, (1, 1, 2), float(TABLE[1, 1, 2]) + 5e-9)
    assert TabularMDP(table, 0, horizon=2).num_states == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"initial": [0.5, math.nan, 0.5]}, r"initial\[1\] is nan"),
        ({"initial": [1.5, -0.5, 0.0]}, r"initial\[1\] is -0.5"),
        ({"initial": [0.5, 0.25, 0.0]}, "initial sums to 0.75, not 1"),
        ({"initial": [0.5, 0.5 + 2e-8, 0.0]}, "initial sums to 1.00000002, not 1"),
        ({"action_prior": [[0.5, 0.5], [math.inf, 0.5], [0.5, 0.5]]}, r"action_prior\[1, 0\] is inf"),
        ({"action_prior": [[0.5, 0.5], [0.5, 0.5], [1.5, -0.5]]}, r"action_prior\[2, 1\] is -0.5"),
        ({"discount": math.nan}, "discount is nan"),
        ({"discount": 1.01}, "discount is 1.01"),
        ({"discount": -0.1}, "discount is -0.1"),
    ],
)
def test_other_numbers_that_are_no_probabilities(options: dict, complaint: str) -> None:
    with pytest.raises(InvalidMDPError, match=complaint):
        TabularMDP(**{"transition": TABLE, "initial": 0, "horizon": 2, **options})


# ------------------------------------------------------------------------------------------------ states and actions


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"initial": 3}, "initial state 3 is out of range; states are 0 to 2"),
        ({"initial": -1}, "initial state -1 is out of range"),
        ({"terminal": [0, 3]}, "terminal names state 3"),
        ({"terminal": [2, -1]}, "terminal names state -1"),
        ({"terminal": [0.5]}, "terminal .* boolean mask"),
        ({"horizon": 0}, "horizon is 0"),
        ({"horizon": True}, "horizon is True"),
    ],
)
def test_states_and_horizons_of_a_problem_are_whole_numbers_in_range(options: dict, complaint: str) -> None:
    with pytest.raises(InvalidMDPError, match=complaint):
        TabularMDP(**{"transition": TABLE, "initial": 0, "horizon": 2, **options})


def path() -> list[list[list[int]]]:
    """Two possible trajectories of :func:`narrow`."""
    return [[[0, 1], [1, 1], [2, -1]], [[0, 0], [0, 1], [1, -1]]]


def narrow(**options: Any) -> TabularMDP:
    """Action 0 stays, action 1 goes a state further; action 0 is not available in state 1."""
    table = torch.zeros(3, 2, 3, dtype=torch.float64)
    for state in range(3):
        table[state, 0, state] = table[state, 1, min(state + 1, 2)] = 1.0
    available = torch.tensor([[True, True], [False, True], [True, True]])
    return TabularMDP(table, **{"initial": [0.5, 0.5, 0.0], "available": available, "horizon": 2, **options})


SPOILED = [
    ((1, 1, 0), 3, InvalidTrajectoriesError, "trajectory 1, step 1: state 3 is out of range; states are 0 to 2"),
    ((1, 1, 0), -2, InvalidTrajectoriesError, "trajectory 1, step 1: .*state"),
    ((1, 0, 1), 2, InvalidTrajectoriesError, "trajectory 1, step 0: action 2 is out of range; actions are 0 to 1"),
    ((1, 1, 0), 2, ImpossibleTransitionError, "trajectory 1, step 0: .* state 0 by action 0 to state 2"),
    ((0, 2, 0), 0, ImpossibleTransitionError, "trajectory 0, step 1: .* state 1 by action 1 to state 0"),
    ((0, 1, 1), 0, UnavailableActionError, "trajectory 0, step 1: action 0 is not available in state 1"),
    ((1, 0, 0), 2, ImpossibleTransitionError, "trajectory 1, step 0: start state 2 has initial probability 0"),
]


@pytest.mark.parametrize(("place", "value", "error", "complaint"), SPOILED)
def test_a_demonstration_that_cannot_be_names_trajectory_and_step(
    place: tuple[int, ...], value: int, error: type[Exception], complaint: str
) -> None:
    mdp, table = narrow(), torch.tensor(path())
    for kind in KINDS.values():
        density = kind(mdp, zeros(3, 2))
        assert bool(density.log_prob(table).isfinite().all())
        for use in (density.log_prob, density.log_prob_sum, density.choice_log_prob):
            with pytest.raises(error, match=complaint):
                use(changed(table, place, value))
        # Nothing half-done: the same distribution goes on.
        assert bool(density.log_prob(table).isfinite().all())
    if value >= 0:
        spoiled = changed(table, place, value)
        with pytest.raises(error, match=complaint):
            Trajectories(spoiled[..., 0], spoiled[:, :-1, 1]).validate(mdp)


def test_an_action_in_a_terminal_state_is_refused() -> None:
    mdp = narrow(terminal=[1])
    with pytest.raises(InvalidTrajectoriesError, match="trajectory 0, step 1: action 1 in terminal state 1"):
        pirl.MaxCausalEntTrajectory(mdp, zeros(3, 2)).log_prob(torch.tensor(path()))


@pytest.mark.parametrize(
    ("states", "actions", "complaint"),
    [
        ([[0.5, 1.0]], [[1, 1]], r"states\[0\] must be whole numbers"),
        ([[0, 1]], [[math.nan, 1.0]], r"actions\[0\] must be whole numbers"),
        ([[0, 1]], [[1.0, math.inf]], r"actions\[0\] must be whole numbers"),  # no end of the episode
        ([[0, 1e300]], [[1, 1]], r"states\[0\] must be whole numbers"),
        ([[0, 1]], 3.5, "actions must be whole numbers"),
        ([["a", "b"]], [[1, 1]], r"states\[0\] cannot be read"),
        ([[True, False]], [[1, 1]], r"states\[0\] must be whole numbers"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2), "states must be whole numbers with 2 dimension"),
        ([[0, -1, 1]], [[1, 1]], "trajectory 0, step 1: the state is negative or missing"),
        ([[0, 1, 1]], [[1, -1, 1]], "trajectory 0, step 1: the action is negative or missing"),
        ([[0, 1], [0, 1, 2, 2]], [[1, 1], [1, 1]], "trajectory 1 has 4 states for 2 actions"),
        ([[0], [1]], [[1]], r"states \(2, 1\) do not fit actions \(1, 1\)"),
        (torch.zeros(2, 5), torch.zeros(2, 3), r"states \(2, 5\) do not fit actions \(2, 3\)"),
    ],
)
def test_demonstrations_are_whole_numbers_that_fit(states: Any, actions: Any, complaint: str) -> None:
    with pytest.raises(InvalidTrajectoriesError, match=complaint):
        Trajectories(states, actions)


# ------------------------------------------------------------------------------------------------ horizons


def test_no_discount_no_horizon_and_no_end_is_refused() -> None:
    with pytest.raises(UnboundedProblemError, match="state 0 cannot reach a terminal state: give horizon="):
        TabularMDP(TABLE, 0)
    # One state that cannot reach the end is enough.
    table = torch.eye(3, dtype=torch.float64).unsqueeze(1).clone()
    table[0, 0] = torch.tensor([0.0, 0.0, 1.0])
    with pytest.raises(UnboundedProblemError, match="state 1 cannot reach"):
        TabularMDP(table, 0, terminal=[2])


def test_a_horizon_shorter_than_a_demonstration_is_refused() -> None:
    table = torch.tensor(path())
    for kind in KINDS.values():
        with pytest.raises(HorizonError, match="trajectory 0 has 2 decisions, more than the horizon 1"):
            kind(narrow(horizon=1), zeros(3, 2)).log_prob(table)
        with pytest.raises(HorizonError, match="trajectory 1 has 2 decisions, more than the horizon 1"):
            kind(narrow(), zeros(3, 2), horizons=torch.tensor([3, 1])).log_prob(table)
    with pytest.raises(HorizonError, match="trajectory 1 has 2 decisions, more than its horizon 1"):
        Trajectories(table[..., 0], table[:, :-1, 1], horizons=[3, 1])
    endless = narrow(horizon=None, discount=0.9)
    with pytest.raises(HorizonError, match="their own horizon and the others none"):
        pirl.MaxCausalEntTrajectory(endless, zeros(3, 2), horizons=torch.tensor([3, -1]))
    with pytest.raises(HorizonError, match="lengths="):
        pirl.MaxCausalEntTrajectory(endless, zeros(3, 2)).sample()


def test_a_discount_in_the_trajectory_reading_is_refused_with_two_ways_out() -> None:
    mdp = oracle.random_mdp(0, discount=0.9)
    for use in (lambda: log_partition(mdp, zeros(3, 2)), lambda: pirl.MaxEntTrajectory(mdp, zeros(3, 2))):
        with pytest.raises(DiscountError, match="horizon, or stopping='geometric'"):
            use()


# ------------------------------------------------------------------------------------------------ divergence


def refuses(mdp: TabularMDP, reward: Tensor, reading: str, error: Any) -> None:
    table = torch.tensor([[[int(mdp.initial.argmax()), -1]]])
    uses: list[Callable[[], Any]] = [
        lambda: messages(mdp, reward, reading),  # type: ignore[arg-type]
        lambda: soft_policy(mdp, reward, reading),  # type: ignore[arg-type]
        lambda: KINDS[reading](mdp, reward, lengths=torch.tensor([5])).sample(),
    ]
    if reading == "trajectory":
        uses += [lambda: log_partition(mdp, reward), lambda: KINDS[reading](mdp, reward).log_prob(table)]
    for use in uses:
        with pytest.raises(error, match=r"horizon"):
            use()


@pytest.mark.parametrize("reading", READINGS)
def test_a_cycle_that_pays_diverges(reading: str) -> None:
    ring = torch.zeros(3, 2, 3, dtype=torch.float64)
    ring[0, 0, 1] = ring[1, 0, 0] = ring[:2, 1, 2] = 1.0
    mdp = TabularMDP(ring, 0, terminal=[2])
    reward = zeros(3, 2)
    assert bool(messages(mdp, reward, reading).log_beta.isfinite().all())  # type: ignore[arg-type]
    # One round of probability 1/4 multiplies the weight by e^(2r) / 4.
    edge = math.log(2.0)
    near = messages(mdp, reward + edge - 1e-3, reading)  # type: ignore[arg-type]
    assert bool(near.log_beta.isfinite().all())
    for above in (1e-3, 1.0, 100.0):
        refuses(mdp, reward + edge + above, reading, (DivergenceError, ConvergenceError))
    if reading == "trajectory":
        with pytest.raises(DivergenceError, match="longer paths weigh more"):
            log_partition(mdp, reward + 100.0)


@pytest.mark.parametrize("reading", READINGS)
def test_the_counting_measure_may_diverge_for_negative_rewards(reading: str) -> None:
    grid = envs.gridworld(3, 3, slip=0.0, stay=False, terminal=[(2, 2)], initial=(0, 0))
    grid, moves, edges = grid.replace(action_prior="counting"), grid.transitions, zeros(9, 9)
    edges.index_put_((moves.state, moves.column), moves.value, accumulate=True)
    radius = float(torch.linalg.eigvals(edges).abs().max())
    assert radius * math.exp(-1.30) == pytest.approx(1.04, abs=0.01)
    refuses(grid, torch.full((9, 4), -1.30, dtype=torch.float64), reading, (DivergenceError, ConvergenceError))
    # Below -log A it always converges; here from -log(radius) on.
    for cost in (-math.log(radius) - 1e-3, -math.log(4.0) - 1e-3):
        found = messages(grid, torch.full((9, 4), cost, dtype=torch.float64), reading)  # type: ignore[arg-type]
        assert bool(found.log_beta.isfinite().all())


# ------------------------------------------------------------------------------------------------ no demonstrations


def model(demos: Trajectories, mdp: TabularMDP) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1))
    reward = torch.stack([weights[0] * torch.ones(mdp.num_states), weights[1] * torch.arange(mdp.num_states)], -1)
    with pyro.plate("episode", len(demos)):
        pyro.sample(
            "trajectory", pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths), obs=demos.as_tensor()
        )


@pytest.mark.parametrize(
    "nothing",
    [
        lambda: Trajectories([], []),
        lambda: Trajectories(torch.zeros(0, 3), torch.zeros(0, 3)),
        lambda: Trajectories.from_episodes([]),
        lambda: Trajectories([[0, 1]], [[1]])[:0],
    ],
)
def test_no_demonstrations_warn_and_say_nothing(nothing: Callable[[], Trajectories]) -> None:
    with pytest.warns(EmptyTrajectoriesWarning, match="the posterior will be the prior"):
        demos = nothing()
    assert (len(demos), demos.lengths.tolist()) == (1, [0])
    for kind in KINDS.values():
        reward = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        for term in ("log_prob", "log_prob_sum", "choice_log_prob"):
            value = getattr(kind(narrow(), reward), term)(demos.as_tensor()).sum()
            assert value.item() == 0.0
            (slope,) = torch.autograd.grad(value, reward)
            assert bool((slope == 0).all())


def test_without_demonstrations_the_posterior_is_the_prior() -> None:
    import arviz_stats

    with pytest.warns(EmptyTrajectoriesWarning):
        demos = Trajectories([], [])
    options = {"num_prior": 0, "num_posterior_predictive": 0, "progress": False}
    # A Gaussian prior is its own Laplace approximation, exactly.
    exact = pirl.fit(model, demos, narrow(), engine="laplace", num_chains=1, num_samples=20, num_starts=1, **options)
    assert exact.laplace["mode"].values.tolist() == pytest.approx([1.0, -2.0], abs=1e-6)
    assert exact.laplace["covariance"].values.ravel().tolist() == pytest.approx([0.25, 0.0, 0.0, 4.0], abs=1e-8)
    assert bool((exact.log_likelihood["trajectory"] == 0).all())
    sampled = pirl.fit(model, demos, narrow(), engine="nuts", num_chains=1, num_warmup=60, num_samples=150, **options)
    for i, (mean, sd) in enumerate([(1.0, 0.5), (-2.0, 2.0)]):
        draws = sampled.posterior["weights"].values[..., i]
        spread = (draws - mean) ** 2
        size, size_of_spread = float(arviz_stats.ess(draws)), float(arviz_stats.ess(spread))
        assert min(size, size_of_spread) > 20
        assert abs(draws.mean() - mean) < 4 * sd / math.sqrt(size)
        # The square of a Gaussian has sd sqrt(2) times its variance.
        assert abs(spread.mean() - sd**2) < 4 * math.sqrt(2 / size_of_spread) * sd**2


# ------------------------------------------------------------------------------------------------ handled, not refused


@pytest.mark.parametrize("reading", READINGS)
def test_ragged_episodes_are_the_sum_of_their_parts(reading: str) -> None:
    mdp = oracle.random_mdp(2, states=3, actions=2, horizon=6)
    reward = torch.randn(3, 2, dtype=torch.float64)
    density = KINDS[reading](mdp, reward)
    whole = density.sample((4,))
    lengths = [6, 3, 1, 0]
    cut = [whole[i : i + 1, : n + 1].clone() for i, n in enumerate(lengths)]
    demos = Trajectories([x[0, :, 0] for x in cut], [x[0, :-1, 1] for x in cut])
    together = density.log_prob(demos.as_tensor())
    for x in cut:
        x[0, -1, 1] = -1
    alone = torch.cat([density.log_prob(x) for x in cut])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(density.log_prob_sum(demos.as_tensor()), together.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"horizon": 4}, {"discount": 0.9}, {"terminal": [2]}])
@pytest.mark.parametrize("reading", READINGS)
def test_rewards_of_unreachable_states_are_left_to_the_prior(options: dict, reading: str) -> None:
    if reading == "trajectory" and options.get("discount", 1.0) < 1:
        return
    mdp = oracle.random_mdp(4, states=5, actions=2, **options)
    table = mdp.transition.clone()
    table[:3, :, 3:] = 0.0  # nothing leads to states 3 and 4, which lead elsewhere
    table = table / table.sum(-1, keepdim=True)
    mdp = mdp.replace(transition=table, initial=[0.5, 0.5, 0.0, 0.0, 0.0])
    assert "(2 unreachable)" in repr(mdp)
    reward = -torch.rand(5, 2, dtype=torch.float64)
    reward.requires_grad_()
    for term in ("log_prob", "log_prob_sum", "choice_log_prob"):
        density = KINDS[reading](mdp, reward, lengths=torch.full((20,), 4))
        (slope,) = torch.autograd.grad(getattr(density, term)(density.sample()).sum(), reward)
        assert bool((slope[3:] == 0).all()) and float(slope[:3].abs().max()) > 1e-3


@pytest.mark.parametrize("options", [{"horizon": 4}, {"discount": 0.9}, {"terminal": [2]}])
def test_one_action_is_no_choice(options: dict) -> None:
    mdp = oracle.random_mdp(1, states=3, actions=1, **options)
    reward = torch.randn(3, 1, dtype=torch.float64).requires_grad_()
    density = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=torch.full((10,), 4))
    demos = density.sample()
    torch.testing.assert_close(density.choice_log_prob(demos), zeros(10), rtol=0.0, atol=1e-12)
    other = pirl.MaxCausalEntTrajectory(mdp, 3 * reward, lengths=density.lengths)
    torch.testing.assert_close(other.log_prob(demos), density.log_prob(demos), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(density.log_prob_sum(demos), reward)
    torch.testing.assert_close(slope, zeros(3, 1), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_one_state(reading: str) -> None:
    mdp = TabularMDP(torch.ones(1, 3, 1, dtype=torch.float64), 0, horizon=4)
    reward = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64).requires_grad_()
    density = KINDS[reading](mdp, reward)
    demos = density.sample((7,))
    log_softmax = torch.log_softmax(reward[0], -1)
    expected = log_softmax[demos[:, :-1, 1]].sum(-1)
    torch.testing.assert_close(density.log_prob(demos), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(density.log_prob_sum(demos), reward)[0],
        torch.autograd.grad(expected.sum(), reward)[0], rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    endless = TabularMDP(torch.ones(1, 3, 1, dtype=torch.float64), 0, discount=0.5)
    assert pirl.optimal_policy(endless, reward).value.tolist() == [4.0]
    assert pirl.stationary_distribution(endless, torch.full((1, 3), 1 / 3, dtype=torch.float64)).tolist() == [1.0]


# ------------------------------------------------------------------------------------------------ extremes


def extremes(name: str, stochastic: bool) -> tuple[TabularMDP, Tensor, dict[str, str]]:
    """A problem of every kind, and rewards of +-1000: without a horizon gains only where the episode ends."""
    options: dict[str, Any] = {"finite": {"horizon": 5}, "discounted": {"discount": 0.9}, "stopping": {"discount": 0.9},
                               "until the end": {"terminal": [3]}}[name]  # fmt: skip
    mdp = oracle.random_mdp(6, states=4, actions=3, **options)
    if not stochastic:
        table = torch.zeros(4, 3, 4, dtype=torch.float64)
        for state in range(4):
            table[state, 0, state] = table[state, 1, (state + 1) % 4] = table[state, 2, (state + 3) % 4] = 1.0
        mdp = mdp.replace(transition=table)
    signs = torch.tensor([[1, -1, 1], [-1, -1, 1], [1, 1, -1], [1, -1, -1]], dtype=torch.float64)
    if name in ("stopping", "until the end"):
        signs = torch.where(mdp.terminal[:, None], 1.0, -signs.abs())
    return mdp, 1000 * signs, {"stopping": "geometric"} if name == "stopping" else {}


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(
    ("reading", "name"),
    [("causal", "finite"), ("causal", "discounted"), ("causal", "until the end"),
     ("trajectory", "finite"), ("trajectory", "stopping"), ("trajectory", "until the end")],
)  # fmt: skip
def test_rewards_of_a_thousand_stay_finite(reading: str, name: str, stochastic: bool) -> None:
    mdp, reward, options = extremes(name, stochastic)
    reward.requires_grad_()
    found = messages(mdp, reward, reading, **options)  # type: ignore[arg-type]
    assert bool(found.log_beta.isfinite().all()) and bool(found.mu.isfinite().all())
    density = KINDS[reading](mdp, reward, lengths=torch.full((8,), 4), **options)
    demos = density.sample()
    value = density.log_prob_sum(demos) + density.choice_log_prob(demos).sum()
    (slope,) = torch.autograd.grad(value, reward, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), reward)
    assert bool(value.isfinite()) and bool(slope.isfinite().all()) and bool(curve.isfinite().all())
    if reading == "trajectory":
        log_z = log_partition(mdp, reward, **options)
        (slope,) = torch.autograd.grad(log_z, reward)
        torch.testing.assert_close(slope, found.mu if mdp.horizon is None else found.mu.sum(0), rtol=1e-9, atol=1e-9)
        # At this size the sum is its largest term, up to the number of terms and their prior.
        if mdp.discount == 1:
            best = pirl.most_likely_trajectory(mdp, reward.detach()).log_weight
            assert best.item() - 1e-6 <= log_z.item() <= best.item() + 20.0


# In a process of its own, where a hundred thousand small steps are not type-checked one by one.
LONG = """
import sys, torch, pirl
from pirl.message_passing import soft_problem
from pirl.soft_values import soft_values
torch.set_num_threads(1)
reading, horizon = sys.argv[1], 100_000
mdp = pirl.TabularMDP([[[0.5, 0.5], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]], 0, horizon=horizon)
reward = torch.tensor([[-1.0, 0.3], [0.2, -0.4]], dtype=torch.float64, requires_grad=True)
values = soft_values(reward, soft_problem(mdp, reading))
(visits,) = torch.autograd.grad(values[-1, 0], reward)
values = values.detach()
assert values.isfinite().all() and visits.isfinite().all() and (visits > 0).all()
# Every decision counts once; a policy exp(Q - V) is off by the rounding of V, a hundred thousand times over.
assert abs(visits.sum() - horizon) < horizon * (horizon * torch.finfo(torch.float64).eps * values.abs().max()), visits
growth, others = (values[-1] - values[-2]).tolist()
if reading == "trajectory":  # by the largest eigenvalue of exp(r) p(a|s) P
    weight = torch.einsum("sa,sat->st", reward.detach().exp() / 2, mdp.transition)
    others = torch.linalg.eigvals(weight).abs().max().log().item()
assert abs(growth - others) < 1e-8 * abs(others), (growth, others)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
def test_a_hundred_thousand_steps_stay_finite(reading: str) -> None:
    command = [sys.executable, "-c", LONG, reading]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


# ------------------------------------------------------------------------------------------------ samplers


def small_fit(model: Callable[[], Any], **options: Any) -> Any:
    sizes = {"num_chains": 2, "num_warmup": 5, "num_samples": 5, "num_prior": 0, "num_posterior_predictive": 0}
    return pirl.fit(model, progress=False, **sizes, **options)


def test_gradients_that_are_never_finite_name_the_site() -> None:
    def broken() -> None:
        pyro.sample("innocent", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.factor("trap", (slope - slope).sqrt())  # 0, with a derivative of infinity times 0

    for engine in ("nuts", "chees", "laplace", "svi"):
        with pytest.raises(NonFiniteError, match="gradient at site 'slope' is not finite"):
            small_fit(broken, engine=engine)


def test_a_density_that_is_never_finite_names_the_site() -> None:
    def broken() -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        # So far out that its square is infinite.
        pyro.sample("seen", dist.Normal(weight, 1e-10), obs=torch.tensor(1e300))

    with pytest.raises(NonFiniteError, match="site 'seen' is -inf"):
        small_fit(broken)


def test_a_factor_that_is_never_finite_is_named() -> None:
    def broken() -> None:
        pyro.sample("weight", dist.Normal(0.0, 1.0))
        pyro.factor("trap", torch.tensor(-torch.inf))

    with pytest.raises(NonFiniteError, match="site 'trap' is -inf"):
        small_fit(broken)


def test_two_sites_of_one_name_are_refused() -> None:
    def twice() -> None:
        pyro.sample("weight", dist.Normal(0.0, 1.0))
        pyro.sample("weight", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="sites named 'weight'"):
        small_fit(twice)


def test_chains_that_are_all_stuck_name_the_site() -> None:
    def cliff() -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        pyro.factor("cliff", torch.where(weight == 0, 0.0, -torch.inf))

    with pytest.raises(StuckChainsError, match="site 'weight'"):
        small_fit(cliff, init={"weight": torch.tensor(0.0)})


# ------------------------------------------------------------------------------------------------ words

# What a user sees: here calls are not type-checked before pirl looks at them.
WORDS = """
import torch, pirl
from pirl.message_passing import messages, log_partition
table = torch.ones(1, 2, 1, dtype=torch.float64)
mdp, reward = pirl.TabularMDP(table, 0, horizon=2), torch.zeros(1, 2, dtype=torch.float64)
for call in (
    lambda: pirl.Trajectories([[0]], [[0]], ends="stopped"),
    lambda: messages(mdp, reward, "acausal"),
    lambda: log_partition(mdp, reward, stopping="never"),
    lambda: pirl.MaxEntTrajectory(mdp, [[0.0, 0.0]]),
    lambda: pirl.MaxCausalEntTrajectory(mdp, reward).log_prob([[[0, 0]]]),
    lambda: pirl.MaxCausalEntTrajectory(mdp, reward).log_prob(torch.zeros(1, 2, 2)),
    lambda: pirl.MaxCausalEntTrajectory(mdp, reward).log_prob(torch.zeros(1, 2, 3).long()),
    lambda: pirl.TabularMDP(table, 0, horizon=2.5),
    lambda: pirl.TabularMDP(table, 0, horizon=float("inf")),
    lambda: pirl.TabularMDP(table, 0, horizon=float("nan")),
    lambda: pirl.TabularMDP(table, 0, horizon="x"),
    lambda: pirl.TabularMDP(table, 0, horizon="3"),
    lambda: pirl.TabularMDP(table, 0, discount="x"),
    lambda: pirl.TabularMDP(table, 0, discount=[0.5, 0.9]),
    lambda: pirl.most_likely_trajectory(mdp.replace(horizon=None, terminal=0), reward, max_length=2.5),
    lambda: pirl.TabularMDP("table", 0),
    lambda: pirl.TabularMDP([[[1.0], [0.5, 0.5]]], 0),
    lambda: pirl.policy_value(mdp, torch.ones(2, 1).double(), reward),
    lambda: pirl.fit(lambda: None, engine="metropolis"),
):
    try:
        call()
    except pirl.errors.PirlError as error:
        text = str(error)
        print(type(error).__name__, text)
        assert chr(10) not in text
"""


def test_wrong_words_and_kinds_have_named_errors_of_one_line() -> None:
    finished = subprocess.run([sys.executable, "-c", WORDS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    expected = [
        ("InvalidTrajectoriesError", "'truncated', 'terminated' or 'horizon'"),
        ("OptionError", "'acausal'"),
        ("OptionError", "'never'"),
        ("InvalidRewardError", "not list"),
        ("InvalidTrajectoriesError", "as_tensor()"),
        ("InvalidTrajectoriesError", "whole numbers"),
        ("InvalidTrajectoriesError", "whole numbers"),
        ("InvalidMDPError", "horizon is 2.5"),
        ("InvalidMDPError", "horizon is inf"),
        ("InvalidMDPError", "horizon is nan"),
        ("InvalidMDPError", "horizon is 'x'; it must be a whole number"),
        ("InvalidMDPError", "horizon is '3'"),
        ("InvalidMDPError", "discount is 'x'; it must be a number"),
        ("InvalidMDPError", "discount is [0.5, 0.9]"),
        ("OptionError", "max_length is 2.5; it must be a whole number"),
        ("InvalidMDPError", "transition cannot be read"),
        ("InvalidMDPError", "transition cannot be read"),
        ("InvalidPolicyError", "shape (2, 1)"),
        ("OptionError", "'metropolis'"),
    ]
    lines = finished.stdout.splitlines()
    assert len(lines) == len(expected), finished.stdout
    for line, (name, words) in zip(lines, expected, strict=True):
        assert line.startswith(name) and words in line, line


def test_every_error_is_pirls_own_and_a_python_one() -> None:
    from pirl import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PirlError)]
    assert len(kinds) > 15
    for kind in kinds:
        assert kind.__doc__
        builtin = (ValueError, ArithmeticError, RuntimeError, ImportError, MemoryError, OSError)
        assert kind is PirlError or issubclass(kind, builtin), kind


def test_a_mask_of_whole_numbers_is_not_taken_for_state_numbers() -> None:
    with pytest.raises(InvalidMDPError, match="repeats a state number; a mask must be boolean"):
        oracle.random_mdp(0, terminal=[0, 0, 1])


def test_a_gap_in_a_data_frame_is_no_transition() -> None:
    import pandas as pd

    frame = pd.DataFrame({"episode": 0, "t": [0, 1, 3], "state": [0, 1, 2], "action": [0, 0, 0]})
    with pytest.raises(InvalidTrajectoriesError, match="goes from 't' = 1 to 3"):
        Trajectories.from_dataframe(frame)


def test_rewards_by_subject_that_were_not_indexed_say_how() -> None:
    mdp = oracle.random_mdp(0, horizon=4)
    reward = torch.zeros(2, 3, 2, dtype=torch.float64)
    with pytest.raises(InvalidRewardError, match="demos.subjects"):
        pirl.MaxCausalEntTrajectory(mdp, reward, lengths=torch.full((5,), 3))


def test_fit_names_the_trajectory_that_is_impossible() -> None:
    mdp = oracle.random_mdp(0, states=3, actions=2, stochastic=False, horizon=4)
    wrong = (int(mdp.transition[0, 0].argmax()) + 1) % 3
    demos = Trajectories([[0, wrong]], [[0]])

    def model(demos: Trajectories) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("episode", len(demos)):
            law = pirl.MaxCausalEntTrajectory(mdp, weight * torch.ones(3, 2), lengths=demos.lengths)
            pyro.sample("seen", law, obs=demos.as_tensor())

    with pytest.raises(ImpossibleTransitionError, match="trajectory 0, step 0"):
        pirl.fit(model, demos, progress=False)


@pytest.mark.parametrize("law", [pirl.MaxEntTrajectory, pirl.MaxCausalEntTrajectory])
def test_rewards_of_the_next_state_are_refused_with_the_way_out(law: Any) -> None:
    mdp = oracle.random_mdp(0, states=3, actions=2, horizon=4)
    with pytest.raises(RewardTimingError, match="expected_reward"):
        law(mdp, torch.zeros(3, 2, 3, dtype=torch.float64))
