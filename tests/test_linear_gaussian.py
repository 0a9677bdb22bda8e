"""The continuous oracle against one dense Gaussian integral over everything that is random, and against itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pirl
from models import linear_gaussian as puck
from pirl.errors import (
    DivergenceError,
    HorizonError,
    ImpossibleTransitionError,
    InvalidMDPError,
    InvalidRewardError,
    InvalidTrajectoriesError,
)
from pirl.linear_gaussian import LinearGaussian, LinearGaussianTrajectory, QuadraticReward
from pirl.partition import smc
from pirl.simulators import Policy, Simulator, roll_out

T, DS, DA = 4, 2, 1


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, seed: int, rank: int | None = None) -> Tensor:
    root = 0.5 * normal(size, size if rank is None else rank, seed=seed)
    return root @ root.mT


NOISES = {"regular": (None, None), "singular": (1, 1), "given start": (None, 0), "no noise": (0, None), "none": (0, 0)}


def system(kind: str = "regular", horizon: int = T, **changed: Any) -> LinearGaussian:
    rank, start = NOISES[kind]
    arguments = {
        "transition": 0.6 * normal(DS, DS, seed=1),
        "control": normal(DS, DA, seed=2),
        "noise": covariance(DS, 3, rank),
        "initial_mean": normal(DS, seed=4),
        "initial_covariance": covariance(DS, 5, start),
        "action_covariance": 0.3 * torch.eye(DA, dtype=torch.float64) + covariance(DA, 6),
        "horizon": horizon,
        "action_gain": 0.5 * normal(DA, DS, seed=7),
    }
    return LinearGaussian(**(arguments | changed))


def rewards(*batch: int, seed: int = 8) -> QuadraticReward:
    """Costs that are not positive in all directions, but small enough for Z to be finite."""
    Q = 0.2 * normal(*batch, DS, DS, seed=seed) + 0.3 * torch.eye(DS, dtype=torch.float64)
    R = 0.2 * normal(*batch, DA, DA, seed=seed + 1) + 0.3 * torch.eye(DA, dtype=torch.float64)
    q, c = 0.5 * normal(*batch, DS, seed=seed + 2), 0.5 * normal(*batch, DA, seed=seed + 3)
    return system().quadratic((Q + Q.mT) / 2, (R + R.mT) / 2, q, c)


class Dense:
    """Everything random as one standard normal z: trajectories are affine in it, and the tilted law is Gaussian."""

    def __init__(self, problem: LinearGaussian, reward: QuadraticReward) -> None:
        def root(x: Tensor) -> Tensor:  # by singular values: not the library's way, and right for singular matrices
            u, s, _ = torch.linalg.svd(x)
            return u * s.sqrt()

        size = DS + problem.horizon * (DA + DS)
        parts = torch.eye(size, dtype=torch.float64).split([DS, *[DA, DS] * problem.horizon])
        gain, offset = root(problem.initial_covariance) @ parts[0], problem.initial_mean
        self.pairs = []  # (s_t, a_t) = F z + f
        precision, linear = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        constant = torch.zeros((), dtype=torch.float64)
        Q, R, q, c = reward
        H = torch.block_diag(Q, R)
        h = torch.cat([q, c])
        for t in range(problem.horizon):
            K = problem.action_gain
            assert K is not None
            F = torch.cat([gain, K @ gain + root(problem.action_covariance) @ parts[1 + 2 * t]])
            f = torch.cat([offset, K @ offset])
            self.pairs.append((F, f))
            precision = precision + F.mT @ H @ F
            linear = linear + F.mT @ (h - H @ f)
            constant = constant + h @ f - 0.5 * f @ H @ f
            motion = torch.cat([problem.transition, problem.control], 1)
            gain, offset = motion @ F + root(problem.noise) @ parts[2 + 2 * t], motion @ f
        self.mean, self.covariance = torch.linalg.solve(precision, linear), torch.linalg.inv(precision)
        self.smallest = torch.linalg.eigvalsh(precision).min()
        self.log_partition = constant + 0.5 * linear @ self.mean - 0.5 * torch.linalg.slogdet(precision).logabsdet

    def pair(self, t: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (s_t, a_t) given O."""
        F, f = self.pairs[t]
        return F @ self.mean + f, F @ self.covariance @ F.mT


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("horizon", [1, T, 60])
def test_log_partition_is_the_dense_integral(noise: str, horizon: int) -> None:
    problem, reward = system(noise, horizon), rewards()
    dense = Dense(problem, reward)
    assert dense.smallest > 0
    found = problem.log_partition(reward)
    assert float(found) == pytest.approx(float(dense.log_partition), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("noise", NOISES)
def test_the_gradient_is_the_tilted_mean_of_the_rewards_gradient(noise: str) -> None:
    problem = system(noise)
    reward = QuadraticReward(*(x.requires_grad_() for x in rewards()))
    slopes = torch.autograd.grad(problem.log_partition(reward), list(reward))
    dense = Dense(problem, QuadraticReward(*(x.detach() for x in reward)))
    means, seconds = zip(*((m, C + torch.outer(m, m)) for m, C in map(dense.pair, range(T))), strict=True)
    mean, second = sum(means), sum(seconds)
    expected = [-second[:DS, :DS] / 2, -second[DS:, DS:] / 2, mean[:DS], mean[DS:]]
    for slope, wanted in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reading", ["trajectory", "causal"])
def test_gradients_agree_with_finite_differences(reading: Any) -> None:
    problem = system("singular")
    states, actions = problem.sample(rewards(), 3, torch.Generator().manual_seed(0))

    def everything(*coefficients: Tensor) -> tuple[Tensor, ...]:
        reward = QuadraticReward(*coefficients)
        relative = problem.relative_log_prob(reward, states, actions, reading)
        return problem.log_partition(reward, reading), relative

    inputs = tuple(x.requires_grad_() for x in rewards())
    assert torch.autograd.gradcheck(everything, inputs)
    assert torch.autograd.gradgradcheck(everything, inputs)


def test_a_batch_is_a_loop_and_so_is_vmap() -> None:
    problem, batch = system("singular"), rewards(3, 2)
    states, actions = problem.sample(rewards(), 2, torch.Generator().manual_seed(0))
    each = [QuadraticReward(*(x[i, j] for x in batch)) for i in range(3) for j in range(2)]
    for reading in ("trajectory", "causal"):

        def ask(*reward: Tensor, reading: Any = reading) -> tuple[Tensor, ...]:
            law = problem.solve(QuadraticReward(*reward), reading)
            return law.log_partition, *law.values, law.policy.gain, law.start_mean

        looped = [torch.stack(x).unflatten(0, (3, 2)) for x in zip(*(ask(*reward) for reward in each), strict=True)]
        mapped = torch.func.vmap(torch.func.vmap(ask))(*batch)
        for together, one, mapped_one in zip(ask(*batch), looped, mapped, strict=True):
            torch.testing.assert_close(together, one, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(mapped_one, one, rtol=1e-12, atol=1e-12)
        found = problem.log_prob(batch, states, actions, reading)  # reward batch [3, 2] against 2 trajectories
        for i in range(3):
            for j in range(2):
                one = problem.log_prob(each[2 * i + j], states[j], actions[j], reading)
                torch.testing.assert_close(found[i, j], one, rtol=1e-12, atol=1e-12)


def test_a_batch_of_rewards_is_sampled_reward_by_reward() -> None:
    problem, batch, num = system(), rewards(3, 2), 2000
    states, actions = problem.sample(batch, num, torch.Generator().manual_seed(0))
    assert (states.shape, actions.shape) == ((3, 2, num, T + 1, DS), (3, 2, num, T, DA))
    for i in range(3):
        for j in range(2):
            mean, spread = Dense(problem, QuadraticReward(*(x[i, j] for x in batch))).pair(T - 1)
            drawn = torch.cat([states[i, j, :, T - 1], actions[i, j, :, T - 1]], -1)
            assert bool(((drawn.mean(0) - mean).abs() <= 4 * (spread.diagonal() / num).sqrt()).all())


def test_gradients_under_vmap_are_those_of_each() -> None:
    problem, batch = system(), rewards(4)

    def slope(*reward: Tensor) -> Any:
        return torch.func.grad(lambda Q: problem.log_partition(QuadraticReward(Q, *reward[1:])))(reward[0])

    mapped = torch.func.vmap(slope)(*batch)
    one = torch.stack([slope(*(x[i] for x in batch)) for i in range(4)])
    torch.testing.assert_close(mapped, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_readings_agree_exactly_where_there_is_no_chance(noise: str) -> None:
    problem, reward = system(noise), rewards()
    both = [problem.solve(reward, reading) for reading in ("causal", "trajectory")]
    same = [
        torch.allclose(causal, trajectory, rtol=1e-12, atol=1e-12)
        for causal, trajectory in (
            [law.log_partition for law in both],
            [law.values.constant[0] for law in both],
            [law.policy.gain for law in both],
            [law.policy.offset for law in both],
        )
    ]
    without_noise = noise in ("none", "no noise")
    assert same == [noise == "none", without_noise, without_noise, without_noise]


def test_causal_values_are_a_soft_backup() -> None:
    """V_t(s) = log int p(a|s) exp(r + E V_{t+1}(s')) da, by quadrature over actions and averages over noise."""
    problem, reward = system(), rewards()
    law = problem.solve(reward, "causal")
    s = normal(DS, seed=20)
    a = torch.linspace(-14, 14, 2001, dtype=torch.float64).unsqueeze(-1)
    states = s.expand(len(a), DS)
    mean = states @ problem.transition.mT + a @ problem.control.mT
    # Two points a standard deviation away on each axis integrate quadratics exactly.
    root = torch.linalg.cholesky(problem.noise) * math.sqrt(DS)
    points = torch.cat([mean + sign * root[:, k] for sign in (-1, 1) for k in range(DS)]).reshape(2 * DS, -1, DS)
    ahead = law.values.at(2)(points).mean(0)
    log_weight = problem.base_log_prob(states, a) + reward(states, a) + ahead
    value = log_weight.logsumexp(0) + (a[1, 0] - a[0, 0]).log()
    torch.testing.assert_close(law.values.at(1)(s), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(law.policy.log_prob(states, a, 1), log_weight - value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("noise", NOISES)
def test_draws_of_the_tilted_law_have_constant_weights(noise: str) -> None:
    """exp(sum r) p / q by the laws that were drawn from, where all have densities; and log Z is that constant."""
    problem, reward = system(noise), rewards()
    states, actions = problem.sample(reward, 500, torch.Generator().manual_seed(0))
    assert (states.shape, actions.shape) == ((500, T + 1, DS), (500, T, DA))
    law = problem.solve(reward)
    log_weight = reward(states[:, :-1], actions).sum(-1) + problem.base_log_prob(states[:, :-1], actions).sum(-1)
    log_weight = log_weight - law.policy.log_prob(states[:, :-1], actions).sum(-1)
    twist = problem.twist(reward)
    log_weight = log_weight + law.log_partition - twist(0, states[:, 0])  # p(s_1) / q(s_1)
    pair = torch.cat([states[:, :-1], actions], -1)
    for t in range(T):
        if noise == "regular":  # by densities
            mean = pair[:, t] @ torch.cat([problem.transition, problem.control], 1).mT
            true = torch.distributions.MultivariateNormal(mean, problem.noise).log_prob(states[:, t + 1])
            log_weight = log_weight + true - law.dynamics.log_prob(pair[:, t], states[:, t + 1], t)
        else:
            mean = problem.transition @ states[:, t].mT + problem.control @ actions[:, t].mT
            log_weight = log_weight + law.expected.at(t)(mean.mT) - twist(t + 1, states[:, t + 1])
    spread = (log_weight - law.log_partition).abs().max()
    assert float(spread) < 1e-9


@pytest.mark.parametrize("noise", NOISES)
def test_the_exact_twist_leaves_particles_without_variance(noise: str) -> None:
    problem, reward = system(noise), rewards()
    exact = smc(problem.particles(reward), num_steps=T, num_particles=50, num_runs=4)
    assert float((exact.log_partition - problem.log_partition(reward)).abs()) < 1e-9
    assert float(exact.standard_error) < 1e-7  # the root of a difference that is rounding
    assert float(exact.ess) == pytest.approx(200, rel=1e-9)
    # Guided by another reward they have a spread, and the right mean.
    guide = rewards(seed=30)
    rough = smc(problem.particles(reward, guide), num_steps=T, num_particles=500, num_runs=40)
    assert 1e-4 < float(rough.standard_error) < 0.1
    error = (rough.log_partition - problem.log_partition(reward)).abs()
    assert float(error) < 4 * float(rough.standard_error) + float(rough.standard_error) ** 2


@pytest.mark.parametrize("noise", ["regular", "singular"])
def test_moments_of_draws(noise: str) -> None:
    problem, reward, num = system(noise), rewards(), 20_000
    states, actions = problem.sample(reward, num, torch.Generator().manual_seed(1))
    dense = Dense(problem, reward)
    for t in range(T):
        mean, spread = dense.pair(t)
        drawn = torch.cat([states[:, t], actions[:, t]], -1)
        error = (spread.diagonal() / num).sqrt()
        assert bool(((drawn.mean(0) - mean).abs() <= 4 * error).all())
        # The variance of a covariance's estimate (Wishart).
        scale = ((spread.square() + torch.outer(spread.diagonal(), spread.diagonal())) / num).sqrt()
        assert bool(((drawn.mT.cov() - spread).abs() <= 4 * scale).all())


@pytest.mark.parametrize("reading", ["trajectory", "causal"])
def test_the_density_is_that_of_the_draws(reading: Any) -> None:
    """Term by term, with torch's own normal densities; and a distribution's draws have it, too."""
    problem, reward = system(), rewards()
    law = problem.solve(reward, reading)
    joint = LinearGaussianTrajectory(problem, reward, reading)
    drawn = joint.sample((5,))
    assert bool((drawn[:, -1, DS:] == 0).all())
    states, actions = drawn[..., :DS], drawn[:, :-1, DS:]

    def density(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(mean, factor @ factor.mT).log_prob(x)

    expected = density(states[:, 0], law.start_mean, law.start_factor)
    for t in range(T):
        gain, offset, factor = (x[t] for x in law.policy)
        expected = expected + density(actions[:, t], states[:, t] @ gain.mT + offset, factor)
        gain, offset, factor = (x[t] for x in law.dynamics)
        pair = torch.cat([states[:, t], actions[:, t]], -1)
        expected = expected + density(states[:, t + 1], pair @ gain.mT + offset, factor)
    torch.testing.assert_close(joint.log_prob(drawn), expected, rtol=1e-10, atol=1e-10)
    # Without a reward it is the density of the simulator, which the relative one leaves out.
    relative = problem.relative_log_prob(reward, states, actions, reading)
    base = problem.log_prob(problem.quadratic(), states, actions, reading)
    torch.testing.assert_close(relative + base, expected, rtol=1e-10, atol=1e-10)


def test_it_is_a_simulator_with_a_policy() -> None:
    problem, num = system("singular"), 20_000
    assert isinstance(problem, Simulator)
    assert isinstance(problem.base_policy, Policy)
    rollouts = roll_out(problem, problem.base_policy, num, torch.Generator().manual_seed(0))
    dense = Dense(problem, problem.quadratic())
    for t in range(T):
        mean, spread = dense.pair(t)
        drawn = torch.cat([rollouts.states[:, t], rollouts.actions[:, t]], -1)
        assert bool(((drawn.mean(0) - mean).abs() <= 4 * (spread.diagonal() / num).sqrt()).all())
        scale = ((spread.square() + torch.outer(spread.diagonal(), spread.diagonal())) / num).sqrt()
        assert bool(((drawn.mT.cov() - spread).abs() <= 4 * scale).all())
    density = problem.base_log_prob(rollouts.states[:, :-1], rollouts.actions).sum(-1)
    torch.testing.assert_close(rollouts.log_density, density)
    again = roll_out(problem, problem.base_policy, 3, torch.Generator().manual_seed(0))
    assert again.states.equal(roll_out(problem, problem.base_policy, 3, torch.Generator().manual_seed(0)).states)


def test_divergence_is_named_and_under_vmap_stays_with_its_member() -> None:
    problem, reward = system(), rewards(3)
    # exp(a^2 / 2 (1/U)) against N(0, U): infinite just beyond, finite just before.
    edge = problem.quadratic(action_cost=-1 / problem.action_covariance, state_cost=0 * reward.state_cost[0])
    one = system(horizon=1, action_gain=torch.zeros(DA, DS, dtype=torch.float64))
    assert float(one.log_partition(edge._replace(action_cost=edge.action_cost * (1 - 1e-6)))) > 5
    with pytest.raises(DivergenceError, match="infinite: .* actions of step 1 fall"):
        one.log_partition(edge._replace(action_cost=edge.action_cost * (1 + 1e-6)))
    with pytest.raises(DivergenceError, match="states after step"):
        problem.log_partition(problem.quadratic(-50 * torch.eye(DS, dtype=torch.float64), reward.action_cost[0]))
    bad = reward._replace(action_cost=reward.action_cost.clone())
    bad.action_cost[1] = -100
    with pytest.raises(DivergenceError, match="positive semi-definite costs"):
        problem.log_partition(bad)
    good = problem.log_partition(reward)

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        slope, value = torch.func.grad_and_value(lambda q: problem.log_partition(QuadraticReward(*x[:2], q, x[3])))(
            x[2]
        )
        return slope, value

    slope, value = torch.func.vmap(both)(*bad)
    assert value.isnan().tolist() == [False, True, False]
    assert slope.isnan().all(-1).tolist() == [False, True, False]
    torch.testing.assert_close(value[[0, 2]], good[[0, 2]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"control": torch.ones(2).double()}, InvalidMDPError, r"control \(B\) must be a tensor"),
        ({"transition": torch.eye(3).double()}, InvalidMDPError, r"transition is \(3, 3\)"),
        ({"noise": torch.eye(2)}, InvalidMDPError, "noise is torch.float32"),
        ({"noise": torch.tensor([[1.0, 0.2], [0.0, 1.0]]).double()}, InvalidMDPError, "noise is not symmetric"),
        ({"noise": -torch.eye(2).double()}, InvalidMDPError, "noise has the eigenvalue -1: .* positive semi-definite"),
        ({"initial_mean": torch.full((2,), torch.nan).double()}, InvalidMDPError, "initial_mean is NaN"),
        ({"action_covariance": torch.zeros(1, 1).double()}, InvalidMDPError, "eigenvalue 0: .* positive definite"),
        ({"horizon": 0}, HorizonError, "horizon is 0"),
        ({"horizon": True}, HorizonError, "horizon is True"),
    ],
)
def test_bad_dynamics_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        system(**changed)
    assert "\n" not in str(caught.value)


def test_bad_rewards_and_trajectories_are_named() -> None:
    problem, reward = system(), rewards()
    with pytest.raises(InvalidRewardError, match=r"action_cost is a Tensor torch.float64 \(2, 2\)"):
        problem.quadratic(action_cost=reward.state_cost)
    with pytest.raises(InvalidRewardError, match="state_cost is torch.float32"):
        problem.quadratic(reward.state_cost.float())
    with pytest.raises(InvalidRewardError, match="action_slope is NaN"):
        problem.quadratic(action_slope=torch.full((1,), torch.nan).double())
    with pytest.raises(InvalidRewardError, match="do not broadcast"):
        problem.quadratic(rewards(2).state_cost, rewards(3).action_cost)
    states, actions = problem.sample(reward, 3)
    with pytest.raises(InvalidTrajectoriesError, match=r"states \(3, 4, 2\)"):
        problem.log_prob(reward, states[:, 1:], actions)
    with pytest.raises(InvalidTrajectoriesError, match="trajectories have shape"):
        LinearGaussianTrajectory(problem, reward).log_prob(states)
    actions[1, 2] = torch.nan
    with pytest.raises(InvalidTrajectoriesError, match=r"actions\[1, 2\] is NaN"):
        problem.log_prob(reward, states, actions)


def test_what_noise_does_not_allow_is_refused() -> None:
    problem, reward = system("singular"), rewards()
    states, actions = problem.sample(reward, 3)
    assert bool(problem.log_prob(reward, states, actions).isfinite().all())
    off = states.clone()
    off[2, 3] += normal(DS, seed=0)
    with pytest.raises(ImpossibleTransitionError, match=r"trajectory \[2\]: step 2 has probability 0, as noise"):
        problem.log_prob(reward, off, actions)
    off = states.clone()
    off[1, 0] += normal(DS, seed=0)
    with pytest.raises(ImpossibleTransitionError, match=r"trajectory \[1\]: its start .* initial_covariance"):
        problem.log_prob(reward, off, actions)


def test_types_and_devices_follow_the_problem() -> None:
    problem, reward = system("singular"), rewards()
    single = problem.to(dtype=torch.float32)
    found = single.log_partition(single.quadratic(*(x.float() for x in reward)))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(problem.log_partition(reward)), rel=1e-4)
    expected = problem.log_partition(reward)
    with torch.device("meta"):  # whatever forgets a device stops here
        copied = problem.to(dtype=torch.float64)
        copied.log_prob(reward, *copied.sample(reward, 2))
        copied.step(copied.reset(3), copied.base_sample(copied.reset(3)))
        found = copied.log_partition(reward)
    assert found.equal(expected)
    assert set(problem.constant_data()) >= {"transition", "noise", "horizon"}


def grid(loaded: dict[str, Any], size: int = 81) -> dict[str, dict[str, float]]:
    """Posterior moments of the two log costs by the rectangle rule, exact for smooth densities that end in the box."""
    axis = torch.linspace(-4, 3, size, dtype=torch.float64)
    points = dict(zip(puck.TRUE_COSTS, torch.meshgrid(axis, axis, indexing="ij"), strict=True))
    demos, problem = loaded["demos"], loaded["system"]
    if loaded["reading"] == "causal":
        reward = puck.costs(problem, *points.values())
        states, actions = demos[:, None, None, :, :2], demos[:, None, None, :-1, 2:]
        log_density = problem.relative_log_prob(reward, states, actions, "causal").sum(0)
    else:  # by hand
        squares = demos[:, :-1].square().sum((0, 1))
        away, pushes = (squares[0] + squares[1] / 10) / 2, squares[2] / 2
        log_density = -sum(x.exp() * cost for x, cost in zip(points.values(), (away, pushes), strict=True))
        log_density = log_density - len(demos) * problem.log_partition(puck.costs(problem, *points.values()))
    log_density = log_density - sum(x.square() for x in points.values()) / (2 * puck.PRIOR_SD**2)
    weight = log_density.flatten().softmax(0).reshape(size, size)
    border = torch.cat([weight[0], weight[-1], weight[:, 0], weight[:, -1]])
    assert float(border.sum()) < 1e-5
    mean = {name: float((weight * x).sum()) for name, x in points.items()}
    return {n: {"mean": mean[n], "sd": float((weight * (x - mean[n]) ** 2).sum().sqrt())} for n, x in points.items()}


@pytest.mark.parametrize("reading", ["trajectory", "causal"])
def test_chees_finds_the_posterior_of_the_grid(reading: Any) -> None:
    from arviz_stats.base import array_stats

    loaded = puck.load(horizon=5, reading=reading)
    posterior = pirl.fit(
        puck.model, model_kwargs=loaded, num_chains=16, num_warmup=60, num_samples=60, dims=puck.dims,
        coords=puck.coords(), num_prior=5, num_posterior_predictive=5, progress=False,
    )  # fmt: skip
    exact = grid(loaded)
    for name, moments in exact.items():
        draws = posterior["posterior"][name].values
        for method, found in (("mean", draws.mean()), ("sd", draws.std())):
            assert abs(found - moments[method]) < 4 * array_stats.mcse(draws, method=method), (name, method)
        # The truth is a draw like any other: four posterior standard deviations away is one in ten thousand.
        assert abs(puck.TRUE_COSTS[name] - moments["mean"]) < 4 * moments["sd"]
    assert posterior["posterior_predictive"]["trajectories"].shape[2:] == loaded["demos"].shape
    assert posterior["log_likelihood"]["trajectories"].shape[2:] == (len(loaded["demos"]),)


def test_laplace_is_close_with_many_demonstrations() -> None:
    """Its error in the mean is of the order of sd^2 (the curvature changes), here below a quarter of an sd."""
    loaded = puck.load(num_demos=100, horizon=5)
    posterior = pirl.fit(
        puck.model, model_kwargs=loaded, engine="laplace", num_chains=1, num_samples=4000, log_likelihood=False,
        num_prior=0, num_posterior_predictive=0, progress=False,
    )  # fmt: skip
    for name, moments in grid(loaded, size=161).items():
        draws = posterior["posterior"][name].values
        assert abs(draws.mean() - moments["mean"]) < 0.25 * moments["sd"]
        assert draws.std() == pytest.approx(moments["sd"], rel=0.1)
