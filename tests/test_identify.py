"""What demonstrations cannot determine: formulas, the Jacobian, and derivatives of the likelihoods themselves."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pirl import envs, identify
from pirl.convergence import ess_bulk
from pirl.datasets import simulate
from pirl.distributions import MaxCausalEntTrajectory, MaxEntTrajectory
from pirl.errors import (
    DiscountError,
    HorizonError,
    InvalidMDPError,
    InvalidRewardError,
    MemoryLimitError,
    OptionError,
    PirlError,
)
from pirl.fit import fit
from pirl.identify import Identification, advantage, gauge_basis, unidentified
from pirl.mdp import TabularMDP
from pirl.message_passing import log_partition, soft_policy
from tests import oracle
from tests.draws import normal

MASK = torch.tensor([[True, True, False], [True, True, True], [False, True, True], [True, False, True]])
# No direction of these problems shows by less than some 1e-3 (asserted below), and rounding is some 1e-14.
SAME = {"rtol": 0.0, "atol": 1e-9}


def table(mdp: TabularMDP) -> Tensor:
    """P(s'|s,a) [S, A, S], nothing after a terminal state or an action that is not available."""
    dense = mdp.transition.to_dense().reshape(mdp.num_states, mdp.num_actions, mdp.num_states)
    return dense * mdp.acts.unsqueeze(-1)


def potentials(mdp: TabularMDP) -> Tensor:
    """E - g P, [S * A, S]."""
    eye = torch.eye(mdp.num_states, dtype=torch.float64)
    return (eye.unsqueeze(1) - mdp.discount * table(mdp)).reshape(-1, mdp.num_states)


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def null_projector(matrix: Tensor, tolerance: float = 1e-8) -> Tensor:
    """Of a matrix whose rank is not in doubt."""
    _, values, v = torch.linalg.svd(matrix)
    relative = values / values.max().clamp_min(1e-300)
    assert not ((relative > tolerance / 1e3) & (relative < tolerance * 1e2)).any()
    return projector(v[int((relative > tolerance).sum()) :].mH)


def check(found: Identification) -> None:
    """What every result is: an orthonormal basis, and a rank that is not in doubt."""
    eye = torch.eye(found.num_unidentified, dtype=found.null.dtype)
    torch.testing.assert_close(found.null.mT @ found.null, eye, rtol=0.0, atol=1e-12)
    assert found.singular_values.shape == (found.num_parameters,)
    assert (found.singular_values[: found.rank] > 1e-4).all()
    assert (found.singular_values[found.rank :] < 1e-12).all()


def torus(size: int, discount: float = 0.9) -> TabularMDP:
    state = torch.arange(size * size)
    row, column = state // size, state % size
    moves = [((row + i) % size) * size + (column + j) % size for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    transition = torch.nn.functional.one_hot(torch.stack(moves, 1), size * size).double()
    return TabularMDP(transition, torch.full((size**2,), size**-2.0, dtype=torch.float64), discount=discount)


def some(seed: int = 0, **options: Any) -> TabularMDP:
    return oracle.random_mdp(seed, states=4, actions=3, **options)


def unreached(**options: Any) -> TabularMDP:
    """State 3 leads to the others, and none leads to it."""
    dense = some(5, horizon=1).transition.clone()
    dense[:3, :, 3] = 0.0
    return TabularMDP(dense / dense.sum(-1, keepdim=True), 0, **options)


INFINITE = [
    some(1, discount=0.9),
    some(2, discount=0.7, available=MASK),
    some(3, discount=0.9, terminal=[1]),
    some(4, discount=1.0, terminal=[1, 3], available=MASK),
    unreached(discount=0.8),
    some(1, discount=0.0),
    some(2, discount=0.9, action_prior="counting", available=MASK),
]
FINITE = [
    some(1, horizon=3),
    some(2, horizon=1),
    some(3, horizon=4, discount=0.8, terminal=[1], available=MASK),
    some(4, horizon=3, stochastic=False),
    some(5, horizon=5, stochastic=False, terminal=[0]),
    unreached(horizon=3),
    envs.gridworld(2, 3, slip=0.0, horizon=4, initial=0),
    envs.gridworld(2, 3, slip=0.2, horizon=3, initial=0, terminal=[5]),
]


# ------------------------------------------------------------------------------------------------ the cases


def test_state_rewards_of_a_grid_are_known_up_to_a_constant() -> None:
    found = unidentified(envs.gridworld(5, 5, slip=0.0, discount=0.9), space="state")
    check(found)
    assert (found.rank, found.num_unidentified, found.shape) == (24, 1, (25,))
    torch.testing.assert_close(found.null.abs(), torch.full((25, 1), 0.2, dtype=torch.float64), **SAME)


@pytest.mark.parametrize(
    ("mdp", "rank"), [(torus(4), 14), (torus(5), 24), (envs.gridworld(5, 5, slip=0.0, discount=0.9), 24)]
)
def test_state_rewards_have_the_rank_of_what_actions_change(mdp: TabularMDP, rank: int) -> None:
    differences = table(mdp).movedim(1, 0) - table(mdp)[:, 0]
    assert torch.linalg.matrix_rank(differences.reshape(-1, mdp.num_states)) == rank
    found = unidentified(mdp, space="state")
    check(found)
    assert found.rank == rank


def test_on_a_torus_without_staying_colours_of_a_chessboard_are_not_known() -> None:
    found = unidentified(torus(4), space="state")
    colour = torch.tensor([(-1.0) ** (s // 4 + s % 4) for s in range(16)]).double()
    torch.testing.assert_close(found.identified(colour), torch.zeros(16).double(), **SAME)
    assert found.num_unidentified == 2


@pytest.mark.parametrize(
    ("first", "second", "constants"),
    [
        (some(1, discount=0.9), some(1, discount=0.5), True),
        (some(1, discount=0.9), some(2, discount=0.9), True),
        (some(1, discount=0.9), some(1, discount=0.9), False),
        # Deterministic cycles in one order, by whatever action: a potential along them fits both.
        (torus(2, 0.9), torus(2, 0.5), False),
        (torus(2, 0.9), torus(3, 0.9), None),
    ],
)
def test_two_problems_leave_a_constant_exactly_if_their_potentials_share_nothing_else(
    first: TabularMDP, second: TabularMDP, constants: bool | None
) -> None:
    if constants is None:
        with pytest.raises(InvalidMDPError, match="different sizes"):
            unidentified([first, second])
        return
    both = torch.cat([potentials(first), -potentials(second)], 1)
    states = first.num_states
    rank = int(torch.linalg.matrix_rank(both))
    assert (rank == 2 * states - 1) == constants
    found = unidentified([first, second])
    check(found)
    assert found.num_unidentified == 2 * states - rank
    one = torch.ones(first.num_states, first.num_actions).double()
    torch.testing.assert_close(found.identified(one), 0 * one, **SAME)
    # Whichever comes first, and by the Jacobian too.
    for other in (unidentified([second, first]), unidentified([first, second], reward=0 * one)):
        check(other)
        torch.testing.assert_close(projector(other.null), projector(found.null), **SAME)


def test_a_finite_horizon_leaves_constants_and_a_single_decision_any_reward_of_the_state() -> None:
    for horizon, left in ((1, 4), (2, 1), (3, 1), (30, 1)):
        found = unidentified(some(1, horizon=horizon))
        check(found)
        assert found.num_unidentified == left
        state_only = torch.ones(4, 3).double() if left == 1 else normal(4, 1).expand(4, 3)
        torch.testing.assert_close(found.gauge(state_only), state_only, **SAME)


def test_a_long_horizon_does_not_lose_the_constant_to_rounding() -> None:
    found = unidentified(some(1, horizon=2_000))
    assert found.num_unidentified == 1
    torch.testing.assert_close(found.null.abs(), torch.full((12, 1), 12**-0.5, dtype=torch.float64), **SAME)


# ------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("mdp", INFINITE)
def test_the_gauge_is_what_potentials_make_and_what_is_never_seen(mdp: TabularMDP) -> None:
    visible = (mdp.log_prior.isfinite() & mdp.reachable.unsqueeze(1)).flatten()
    free = torch.diag((~visible).double())
    span = torch.cat([potentials(mdp) * visible.unsqueeze(1), free], 1)
    u, values, _ = torch.linalg.svd(span)
    expected = projector(u[:, : int((values > 1e-9).sum())])
    found = unidentified(mdp)
    check(found)
    assert found.num_unidentified == int(mdp.reachable.sum()) + int((~visible).sum())
    torch.testing.assert_close(projector(found.null), expected, **SAME)
    torch.testing.assert_close(projector(gauge_basis(mdp)), expected - free, **SAME)
    # The same from the Jacobian, at two rewards.
    for reward in (torch.zeros(4, 3).double(), 3 * normal(4, 3)):
        general = unidentified(mdp, reward=reward)
        check(general)
        torch.testing.assert_close(projector(general.null), expected, **SAME)


@pytest.mark.parametrize("mdp", INFINITE)
@pytest.mark.parametrize("dims", [2, 3])
def test_weights_of_features_are_unidentified_where_a_potential_makes_their_reward(mdp: TabularMDP, dims: int) -> None:
    visible = (mdp.log_prior.isfinite() & mdp.reachable.unsqueeze(1)).flatten()
    features = normal(4, 3, 5) if dims == 3 else normal(4, 5)
    rows = (features if dims == 3 else features.unsqueeze(1).expand(4, 3, 5)).reshape(12, 5).clone()
    if dims == 3:  # one of the weights gives a potential, and one sum of two says nothing
        rows[:, 0] = potentials(mdp) @ normal(4)
        rows[:, 4] = -2 * rows[:, 3]
        features = rows.reshape(4, 3, 5)
    system = torch.cat([rows, -potentials(mdp)], 1)[visible][:, torch.cat([torch.ones(5).bool(), mdp.reachable])]
    both = null_projector(system)
    weights = both[:5]  # of every pair (weights, potential) of the null space, the weights
    u, values, _ = torch.linalg.svd(weights)
    expected = projector(u[:, : int((values > 1e-9).sum())])
    for found in (unidentified(mdp, features=features), unidentified(mdp, features=features, reward=normal(4, 3))):
        check(found)
        assert (found.space, found.shape) == ("features", (5,))
        torch.testing.assert_close(projector(found.null), expected, **SAME)
    assert found.num_unidentified >= (2 if dims == 3 else 1)


def test_state_rewards_are_features_of_states() -> None:
    for mdp in (some(1, discount=0.9), some(4, horizon=3, stochastic=False), torus(4)):
        eye = torch.eye(mdp.num_states, dtype=torch.float64)
        one, other = unidentified(mdp, space="state"), unidentified(mdp, features=eye)
        torch.testing.assert_close(projector(one.null), projector(other.null), **SAME)


def test_problems_of_different_sizes_share_weights() -> None:
    mdps = [torus(2), torus(3)]
    features = [normal(4, 3), normal(9, 3, seed=1)]
    features[0][:, 2], features[1][:, 2] = 1.0, 1.0
    found = unidentified(mdps, features=features)
    check(found)
    torch.testing.assert_close(found.null.abs(), torch.tensor([[0.0], [0.0], [1.0]]).double(), **SAME)


# ------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("mdp", [*INFINITE, *FINITE])
def test_the_causal_null_space_is_that_of_the_derivative_of_the_policy(mdp: TabularMDP) -> None:
    """torch differentiates log pi itself; steps at which a state cannot be are left out."""
    shape = (mdp.num_states, mdp.num_actions)
    law = soft_policy(mdp, torch.zeros(shape).double()).exp()  # of full support
    here, reached = mdp.initial > 0, []
    for _ in range(mdp.horizon or mdp.num_states):
        reached.append(here)
        here = (here.unsqueeze(1).expand(shape)[..., None] & (table(mdp) > 0)).any(0).any(0)
    seen = torch.stack(reached) if mdp.horizon else torch.stack(reached).any(0)
    chosen = seen.unsqueeze(-1) & (law > 0)

    def choices(reward: Tensor) -> Tensor:
        return soft_policy(mdp, reward)[chosen]

    jacobian = torch.autograd.functional.jacobian(choices, normal(*shape, seed=3)).flatten(1)
    found = unidentified(mdp)
    check(found)
    torch.testing.assert_close(projector(found.null), null_projector(jacobian), **SAME)


TRAJECTORY = [
    *[(mdp, None) for mdp in FINITE if mdp.discount == 1],
    (some(4, terminal=[1, 3], available=MASK), None),
    (envs.gridworld(2, 2, slip=0.0, terminal=[3], initial=0), None),
    (some(1, discount=0.9), "geometric"),
    (some(6, discount=0.5, terminal=[2]), "geometric"),
    (some(2, horizon=3, discount=0.5), "geometric"),
    (unreached(discount=0.8), "geometric"),
]


@pytest.mark.parametrize(("mdp", "stopping"), TRAJECTORY)
@pytest.mark.parametrize("starts", ["drawn", "given"])
def test_the_trajectory_null_space_is_that_of_the_covariance_of_counts(
    mdp: TabularMDP, stopping: str | None, starts: Any
) -> None:
    """torch differentiates log Z twice, at a reward of its own."""
    reward = -normal(mdp.num_states, mdp.num_actions, seed=3).abs()
    begin = [mdp] if starts == "drawn" else [mdp.replace(initial=int(s)) for s in mdp.initial.nonzero()]

    def total(r: Tensor) -> Tensor:
        return torch.stack([log_partition(one, r, stopping=stopping) for one in begin]).sum()

    count = reward.numel()
    r = reward.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(r), r, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(x, r, retain_graph=True)[0].flatten() for x in grad.flatten()])
    assert (torch.linalg.eigvalsh(hessian) > -1e-10).all()
    for at in (None, reward):
        found = unidentified(mdp, reading="trajectory", stopping=stopping, starts=starts, reward=at)
        check(found)
        assert found.num_parameters == count
        # Eigenvalues are squares.
        torch.testing.assert_close(projector(found.null), null_projector(hessian, 1e-9), rtol=0.0, atol=1e-6)


def test_both_readings_agree_where_nothing_is_left_to_chance() -> None:
    for mdp in (some(4, horizon=3, stochastic=False), some(5, horizon=5, stochastic=False, terminal=[0])):
        causal = unidentified(mdp)
        trajectory = unidentified(mdp, reading="trajectory", starts="given")
        torch.testing.assert_close(projector(causal.null), projector(trajectory.null), **SAME)


# ------------------------------------------------------------------------------------------------ canonical forms


@pytest.mark.parametrize("mdp", [some(1, discount=0.9), some(3, discount=0.9, terminal=[1], available=MASK)])
def test_the_canonical_form_names_a_class_of_rewards(mdp: TabularMDP) -> None:
    found, reward = unidentified(mdp), normal(7, 4, 3)
    shaped = reward + (potentials(mdp) @ normal(4, 7, seed=1)).mT.reshape(7, 4, 3)
    identified, gauge = found.split(reward)
    torch.testing.assert_close(identified + gauge, reward, rtol=0.0, atol=1e-14)
    torch.testing.assert_close((identified * gauge).sum((1, 2)), torch.zeros(7).double(), **SAME)
    torch.testing.assert_close(found.identified(shaped), identified, **SAME)
    torch.testing.assert_close(found.identified(reward.flatten(1)), identified.flatten(1), rtol=0.0, atol=0.0)
    seen = mdp.log_prior.isfinite()
    for form in (identified, shaped, advantage(mdp, reward)):
        torch.testing.assert_close(soft_policy(mdp, form)[:, seen], soft_policy(mdp, reward)[:, seen], **SAME)
    torch.testing.assert_close(advantage(mdp, shaped), advantage(mdp, reward), **SAME)
    torch.testing.assert_close(found.identified(advantage(mdp, reward)), identified, **SAME)
    other = normal(4, 3, seed=2)
    assert (found.identified(other) - identified).abs().amax((1, 2)).min() > 0.1


def test_shares_say_which_parameters_are_never_more_than_the_prior() -> None:
    mdp = unreached(discount=0.8, available=MASK)
    share = unidentified(mdp).share.reshape(4, 3)
    torch.testing.assert_close(share[3], torch.ones(3).double(), **SAME)
    torch.testing.assert_close(share[:3][~MASK[:3]], torch.ones(2).double(), **SAME)
    assert ((share[:3][MASK[:3]] > 0) & (share[:3][MASK[:3]] < 1)).all()
    assert share.sum().round() == unidentified(mdp).num_unidentified


def test_state_rewards_come_with_or_without_their_last_dimension() -> None:
    found = unidentified(some(1, discount=0.9), space="state")
    reward = normal(5, 4)
    expected = reward - reward.mean(1, keepdim=True)
    torch.testing.assert_close(found.identified(reward), expected, **SAME)
    torch.testing.assert_close(found.identified(reward.unsqueeze(-1)), expected.unsqueeze(-1), **SAME)
    with pytest.raises(InvalidRewardError, match="expected"):
        found.identified(normal(5, 3))


# ------------------------------------------------------------------------------------------------ the gauge theorem


@pytest.mark.parametrize(
    ("mdp", "reading"),
    [
        (some(1, discount=0.9), "causal"),
        (some(3, discount=0.9, terminal=[1], available=MASK), "causal"),
        (some(3, horizon=6, terminal=[1], available=MASK), "causal"),
        (some(3, horizon=6, terminal=[1], available=MASK), "trajectory"),
    ],
)
def test_whatever_the_data_the_posterior_of_the_gauge_is_its_prior(mdp: TabularMDP, reading: Any) -> None:
    """With r ~ N(0, sigma^2 I) and a likelihood that is constant along U, U'r is N(0, sigma^2 I) and independent of the
    rest. The likelihood's gradient is orthogonal to U everywhere, and Laplace's covariance has sigma^2 there.
    """
    sigma, steps = 1.7, 5
    family: Any = {"causal": MaxCausalEntTrajectory, "trajectory": MaxEntTrajectory}[reading]
    demos = family(mdp, normal(4, 3, seed=9), lengths=torch.full((40,), steps)).sample()
    found = unidentified(mdp, reading=reading)
    directions = found.null.mT.reshape(-1, 4, 3)
    assert len(directions)

    def log_likelihood(reward: Tensor) -> Tensor:
        return family(mdp, reward, lengths=torch.full((40,), steps)).log_prob(demos).sum()

    reward = normal(4, 3, seed=4).requires_grad_()
    value = log_likelihood(reward)
    (grad,) = torch.autograd.grad(value, reward, create_graph=True)
    assert grad.abs().max() > 1.0  # the data say something
    torch.testing.assert_close(
        (directions * grad).sum((1, 2)), torch.zeros(len(directions)).double(), rtol=0, atol=1e-10
    )
    for direction in directions:
        moved = log_likelihood(reward + 2.5 * direction)
        torch.testing.assert_close(moved, value, rtol=0.0, atol=1e-10)
    hessian = torch.stack([torch.autograd.grad(x, reward, retain_graph=True)[0].flatten() for x in grad.flatten()])
    covariance = torch.linalg.inv(torch.eye(12).double() / sigma**2 - hessian)
    along = found.null.mT @ covariance
    torch.testing.assert_close(along, sigma**2 * found.null.mT, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize(
    ("engine", "sizes"),
    [
        ("laplace", {"num_samples": 1_000}),
        ("chees", {"num_chains": 32, "num_warmup": 150, "num_samples": 100}),
        ("nuts", {"num_chains": 1, "num_warmup": 200, "num_samples": 300}),
        ("smc", {"num_chains": 4, "num_samples": 500}),
    ],
)
def test_a_fit_finds_the_prior_along_the_gauge_and_less_across(engine: str, sizes: dict[str, int]) -> None:
    mdp, sigma = oracle.random_mdp(1, states=2, actions=2, discount=0.8), 1.0
    demos = simulate(mdp, normal(2, 2), num_episodes=8, length=10)

    def model() -> None:
        reward = pyro.sample("reward", dist.Normal(0.0, sigma).expand([2, 2]).to_event(2))
        with pyro.plate("episode", len(demos)):
            law = MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
            pyro.sample("trajectories", law, obs=demos.as_tensor())

    result = fit(
        model, engine=engine, **sizes, seed=1, dtype=torch.float64, log_likelihood=False,
        num_prior=0, num_posterior_predictive=0, progress=False,
    )  # fmt: skip
    draws = torch.as_tensor(result["posterior"]["reward"].values.copy())  # [chain, draw, 2, 2]
    found = unidentified(mdp)
    assert found.num_unidentified == 2
    gauge = draws.flatten(2) @ found.null / sigma
    # Standard normal: of N independent draws a mean has the error 1 / sqrt(N), a mean square sqrt(2 / N).
    for moment, expected, sd in ((gauge, 0.0, 1.0), (gauge**2, 1.0, 2**0.5)):
        for k in range(2):
            ess = min(float(ess_bulk(moment[..., k].numpy())), draws[..., 0, 0].numel())
            assert ess > 50
            assert abs(float(moment[..., k].mean()) - expected) < 4 * sd / ess**0.5
    across = found.identified(draws.flatten(0, 1)).flatten(1).var(0).sum() / found.rank
    assert across < 0.5 * sigma**2


# ------------------------------------------------------------------------------------------------ types and errors


def test_a_shorter_type_finds_the_same_rank() -> None:
    for mdp in (
        some(1, discount=0.9),
        some(3, horizon=4, available=MASK),
        envs.gridworld(5, 5, slip=0.0, discount=0.9),
    ):
        for reward in (None, torch.zeros(mdp.num_states, 1)):
            short = unidentified(mdp.to(dtype=torch.float32), reward=reward)
            assert short.null.dtype == torch.float32
            assert short.num_unidentified == unidentified(mdp).num_unidentified


def test_tables_that_are_too_large_are_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identify, "_MOST_BYTES", 2**20)
    mdp = envs.random_mdp(60, 4)
    with pytest.raises(MemoryLimitError, match=r"240 parameters of 60 states.*features= \[S, K\], or space='state'"):
        unidentified(mdp)
    assert unidentified(mdp, features=normal(60, 3)).num_parameters == 3


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (InvalidMDPError, "no decision problem", {"mdp": []}),
        (OptionError, "space must be", {"space": "features"}),
        (OptionError, "starts must be", {"starts": "free"}),
        (DiscountError, "stopping='geometric'", {"reading": "trajectory"}),
        (InvalidRewardError, "features have shape", {"features": normal(3, 2)}),
        (InvalidRewardError, "features are torch.float32", {"features": normal(4, 2).float()}),
        (InvalidRewardError, "NaN", {"features": normal(4, 2) * torch.nan}),
        (InvalidRewardError, "2 tensors of features for 1", {"features": [normal(4, 2)] * 2}),
        (InvalidRewardError, "one reward", {"reward": normal(5, 4, 3)}),
        (InvalidRewardError, "NaN or infinite", {"reward": normal(4, 3) / 0}),
    ],
)
def test_misuse_is_named(error: type[PirlError], message: str, arguments: dict[str, Any]) -> None:
    mdp = arguments.pop("mdp", some(1, discount=0.9))
    with pytest.raises(error, match=message):
        unidentified(mdp, **arguments)


def test_features_of_several_problems_must_agree() -> None:
    with pytest.raises(InvalidRewardError, match="share the weights"):
        unidentified([torus(2), torus(3)], features=[normal(4, 2), normal(9, 3)])
    with pytest.raises(HorizonError, match="stationary"):
        advantage(some(1, horizon=3), normal(4, 3))
