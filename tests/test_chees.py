"""Chains that learn from each other: the laws of their moves, of what they learn, and of the batched potential."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pirl import errors
from pirl.fit import fit
from pirl.infer import Potential
from pirl.infer.adaptation import Covariance, StepSize, TrajectoryLength, criterion_slope, halton, window_ends
from pirl.infer.batched import BatchedPotential
from pirl.infer.chees import Chees
from pirl.infer.ensemble import Ensemble
from pirl.infer.hmc import Metric, Phase, transition
from pirl.infer.population import WHITENED_LENGTH
from pirl.infer.ranks import ALONE
from pirl.infer.start import find_starts

F64 = torch.float64
FEW: dict[str, Any] = {"num_prior": 0, "num_posterior_predictive": 0, "progress": False}


@pytest.fixture(autouse=True)
def double() -> Any:
    """As inside an engine: float64, and the model is trusted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    with pyro.validation_enabled(False):
        yield
    torch.set_default_dtype(before)


def quartic(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U = sum z^4 / 4 + z_1 z_2 / 2: not Gaussian, and correlated."""
    energy = 0.25 * z.pow(4).sum(-1) + 0.5 * z[:, 0] * z[:, 1]
    gradient = z.pow(3) + 0.5 * torch.stack([z[:, 1], z[:, 0]], 1)
    return energy, gradient, -energy


METRIC = Metric(torch.tensor([[0.7, 0.0], [0.4, 1.3]], dtype=F64))


# ------------------------------------------------------------------------------------------------------ moves


@pytest.mark.parametrize("metric", [METRIC, METRIC.diagonal()], ids=["dense", "diagonal"])
def test_whitening_is_inverted_and_transposed(metric: Metric) -> None:
    y, z = torch.randn(2, 5, 2)
    torch.testing.assert_close(metric.whiten(metric.unwhiten(y)), y)
    # <F y, z> = <y, F' z>
    torch.testing.assert_close((metric.unwhiten(y) * z).sum(-1), (y * metric.pull(z)).sum(-1))


@pytest.mark.parametrize("metric", [METRIC, METRIC.diagonal()], ids=["dense", "diagonal"])
def test_trajectories_are_reversible_and_keep_volume(metric: Metric) -> None:
    """Reversed velocity leads back, and the map (y, p) -> (y', p') has determinant 1."""
    phase = Phase.at(torch.randn(6, 2), torch.ones(6), quartic)
    eps, certain = torch.full((6,), 0.2), torch.full((6,), -torch.inf)
    there = transition(quartic, phase, metric, eps, 5, torch.randn(6, 2), certain)
    end = Phase.at(there.proposal, torch.ones(6), quartic)
    back = transition(quartic, end, metric, eps, 5, -there.velocity, certain)
    torch.testing.assert_close(back.proposal, phase.z, rtol=0, atol=1e-12)

    def flow(state: Tensor) -> Tensor:
        start = Phase.at(metric.unwhiten(state[None, :2]), torch.ones(1), quartic)
        moved = transition(quartic, start, metric, eps[:1], 5, state[None, 2:], certain[:1])
        return torch.cat([metric.whiten(moved.proposal), moved.velocity], 1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(4))
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-10)


def test_energy_error_is_of_second_order_and_decides_acceptance() -> None:
    phase = Phase.at(torch.randn(50, 2), torch.ones(50), quartic)
    momentum, never = torch.randn(50, 2), torch.zeros(50)

    def errors_of(eps: float, steps: int) -> Tensor:
        moved = transition(quartic, phase, METRIC, torch.full((50,), eps), steps, momentum, never)
        growth = quartic(moved.proposal, never)[0] + 0.5 * moved.velocity.square().sum(-1)
        growth = growth - phase.energy - 0.5 * momentum.square().sum(-1)
        torch.testing.assert_close(moved.acceptance, (-growth).exp().clamp(max=1.0))
        return growth.abs()

    ratio = errors_of(0.04, 25).mean() / errors_of(0.02, 50).mean()
    assert float(ratio) == pytest.approx(4.0, rel=0.05)


def test_each_chain_is_accepted_by_its_own_number() -> None:
    phase = Phase.at(torch.randn(200, 2), torch.ones(200), quartic)
    uniform = torch.rand(200)
    moved = transition(quartic, phase, METRIC, torch.full((200,), 0.7), 2, torch.randn(200, 2), uniform.log())
    taken = (moved.phase.z == moved.proposal).all(-1)
    assert torch.equal(taken, uniform < moved.acceptance)
    assert 0.2 < taken.to(F64).mean() < 0.9
    stays = torch.where(taken[:, None], moved.proposal, phase.z)
    assert torch.equal(moved.phase.z, stays)
    torch.testing.assert_close(moved.phase.energy, quartic(stays, uniform)[0])
    torch.testing.assert_close(moved.phase.gradient, quartic(stays, uniform)[1])


def test_a_trajectory_into_nowhere_is_a_divergence_of_its_own_chain() -> None:
    def walled(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energy, gradient, log_likelihood = quartic(z, temperature)
        return torch.where(z[:, 0] > 1.0, torch.nan, energy), gradient, log_likelihood

    start = torch.tensor([[0.9, 0.0], [0.0, 0.0]])
    phase = Phase.at(start, torch.ones(2), walled)
    momentum = torch.tensor([[2.0, 0.0], [0.1, 0.1]])
    moved = transition(
        walled, phase, Metric(torch.ones(2)), torch.full((2,), 0.5), 1, momentum, torch.full((2,), -50.0)
    )
    assert moved.diverging.tolist() == [1.0, 0.0]
    assert moved.acceptance[0] == 0.0 and moved.acceptance[1] > 0.5
    assert torch.equal(moved.phase.z[0], start[0]) and not torch.equal(moved.phase.z[1], start[1])


# ------------------------------------------------------------------------------------------------------ what is learnt


def test_criterion_slope_is_the_derivative_of_the_criterion() -> None:
    """By central differences of E[(|y' - m'|^2 - |y - m|^2)^2] / 4 in log T, on exact flows of a Gaussian.

    The flow is of a Gaussian of another width than the metric's, so that velocity and momentum differ.
    """
    start, momentum = METRIC.unwhiten(torch.randn(400, 2)), torch.randn(400, 2)
    precision = torch.tensor([[2.0, 0.3], [0.3, 0.5]])
    # Hamilton's equations in whitened units: y' = p, p' = -F' A F y.
    curvature = METRIC.factor.mT @ precision @ METRIC.factor
    values, vectors = torch.linalg.eigh(curvature)
    omega = values.sqrt()

    def flow(time: float) -> tuple[Tensor, Tensor]:
        y, p = METRIC.whiten(start) @ vectors, momentum @ vectors
        cos, sin = torch.cos(omega * time), torch.sin(omega * time)
        return (y * cos + p * sin / omega) @ vectors.mT, (p * cos - y * omega * sin) @ vectors.mT

    weight = torch.rand(400)
    weight[:50] = 0.0  # refused chains do not count

    def criterion(log_length: float) -> float:
        y, (end, _) = METRIC.whiten(start), flow(math.exp(log_length) * share)
        mean = (weight @ end) / weight.sum() if detached is None else detached
        growth = (end - mean).square().sum(-1) - (y - y.mean(0)).square().sum(-1)
        return float(weight @ growth.square() / weight.sum()) / 4

    share, length = 0.6, 1.7
    end, velocity = flow(share * length)
    detached = (weight @ end) / weight.sum()  # the mean is held fixed
    slope = criterion_slope(METRIC.whiten(start), end, velocity, weight, share * length)
    h = 1e-5
    expected = (criterion(math.log(length) + h) - criterion(math.log(length) - h)) / (2 * h)
    assert slope == pytest.approx(expected, rel=1e-6)


def test_criterion_slope_leaves_out_what_is_not_finite() -> None:
    start, end, velocity = torch.randn(3, 20, 2)
    acceptance = torch.rand(20)
    clean = criterion_slope(start, end, velocity, acceptance * (torch.arange(20) >= 3), 1.0)
    for bad in (math.nan, math.inf):
        end[:3], velocity[:3] = bad, bad
        assert criterion_slope(start, end, velocity, acceptance, 1.0) == pytest.approx(clean, rel=1e-12)
    assert math.isnan(criterion_slope(start, end, velocity, torch.zeros(20), 1.0))


def test_trajectory_length_finds_the_known_optimum_of_a_gaussian() -> None:
    """With times uniform on (0, T) the criterion of a whitened Gaussian is largest at T = 2.37, whatever the start."""
    length = TrajectoryLength(0.3)
    generator = torch.Generator().manual_seed(0)
    for step in range(600):
        y, p = torch.randn(2, 500, 3, generator=generator)
        time = halton(step + 1) * length.current
        end, velocity = y * math.cos(time) + p * math.sin(time), p * math.cos(time) - y * math.sin(time)
        length.update(criterion_slope(y, end, velocity, torch.ones(500), time), longest=100.0)
    # cos^4 T = mean of cos^4 over (0, T)
    grid = np.linspace(1e-6, 4, 400_001)
    mean = np.cumsum(np.cos(grid) ** 4) / np.arange(1, len(grid) + 1)
    beyond = grid > math.pi / 2
    optimum = grid[beyond][np.argmax(np.cos(grid[beyond]) ** 4 > mean[beyond])]
    assert optimum == pytest.approx(2.37, abs=0.01)
    assert length.average == pytest.approx(optimum, rel=0.1)


def test_trajectory_length_is_bounded_and_minds_no_noise() -> None:
    length = TrajectoryLength(1.0)
    length.update(math.nan, longest=10.0)
    assert length.current == 1.0
    for _ in range(500):
        length.update(1e30, longest=10.0)
    assert length.current == pytest.approx(10.0)
    before = length.current
    length.update(-1e300, longest=10.0)
    assert length.current >= before * math.exp(-0.35) * (1 - 1e-12)


def test_step_size_reaches_its_target() -> None:
    """Acceptance of chain c is erfc(k_c eps): the size found gives the wanted harmonic mean over chains."""
    k = torch.linspace(0.5, 1.5, 64)
    eps = StepSize(10.0, 0.8, k)
    eps.restart(10.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        mean = torch.special.erfc(k * eps.current)
        eps.update((mean + 0.2 * (torch.rand(64, generator=generator) - 0.5)).clamp(0, 1))
    reached = float(1 / (1 / torch.special.erfc(k * eps.average)).mean())
    assert reached == pytest.approx(0.8, abs=0.02)


def test_step_size_minds_the_chain_that_is_refused_most() -> None:
    """Chains that accept e^-h and e^-3h share the size h whose *harmonic* mean acceptance is the target."""
    sizes = StepSize(0.1, 0.8, torch.zeros(2))
    sizes.restart(0.1)
    for _ in range(3000):
        sizes.update(torch.exp(-sizes.current * torch.tensor([1.0, 3.0])))
    first, second = math.exp(-sizes.average), math.exp(-3 * sizes.average)
    assert 2 / (1 / first + 1 / second) == pytest.approx(0.8, abs=1e-3)
    assert (first + second) / 2 > 0.805


def test_before_the_first_restart_each_chain_has_its_own_step_size() -> None:
    k = torch.tensor([0.01, 1.0, 100.0])
    eps = StepSize(1.0, 0.8, k)
    for _ in range(300):
        eps.update(torch.special.erfc(k * eps.sizes))
    torch.testing.assert_close(torch.special.erfc(k * eps.sizes), torch.full((3,), 0.8), rtol=0, atol=0.1)
    eps.restart(1.0)
    assert eps.sizes.tolist() == [1.0] * 3


@pytest.mark.parametrize("dense", [True, False])
def test_covariance_in_parts_is_the_covariance_of_all(dense: bool) -> None:
    draws = 1e3 + torch.randn(7, 30, 3) @ torch.randn(3, 3)
    moments = Covariance(3, dense, draws)
    for part in draws:
        moments.update(part)
    expected = torch.cov(draws.flatten(0, 1).mT)
    scatter = moments.scatter / (moments.count - 1)
    torch.testing.assert_close(scatter, expected if dense else expected.diagonal(), rtol=1e-10, atol=1e-10)
    metric = moments.metric()
    assert metric is not None
    if dense:
        kept = 210 / (210 + 3 + 2)
        wanted = kept * expected + (1 - kept) * expected.diagonal().diag()
        torch.testing.assert_close(metric.factor @ metric.factor.mT, wanted, rtol=1e-10, atol=1e-10)
    else:
        torch.testing.assert_close(metric.factor.square(), expected.diagonal(), rtol=1e-10, atol=1e-10)


def test_covariance_without_width_gives_no_metric() -> None:
    moments = Covariance(2, True, torch.zeros(1))
    assert moments.metric() is None
    moments.update(torch.ones(5, 2))
    assert moments.metric() is None
    moments.update(torch.full((5, 2), torch.nan))
    assert moments.metric() is None


def test_halton_numbers_fill_the_interval_evenly() -> None:
    assert [halton(i) for i in (1, 2, 3, 4, 5)] == [0.5, 0.25, 0.75, 0.125, 0.625]
    for bits in (3, 6):  # the first 2^k - 1 numbers are all multiples of 2^-k
        numbers = sorted(halton(i) for i in range(1, 2**bits))
        assert numbers == [i / 2**bits for i in range(1, 2**bits)]


@pytest.mark.parametrize("num_warmup", [0, 1, 6, 7, 20, 60, 300, 1000, 5000])
def test_windows_grow_and_leave_time_at_the_end(num_warmup: int) -> None:
    ends = window_ends(num_warmup)
    assert ends == sorted(set(ends)) and all(0 < end <= 0.75 * num_warmup for end in ends)
    if num_warmup >= 20:
        assert ends[-1] == int(0.75 * num_warmup)
        # No window is shorter than a fifth of all that went before.
        assert all(b - a >= 0.2 * a for a, b in zip(ends, ends[1:], strict=False))


def test_a_learner_goes_on_from_what_was_saved() -> None:
    def used(learner: Any, times: int) -> Any:
        generator = torch.Generator().manual_seed(1)
        for _ in range(times):
            numbers = torch.rand(4, generator=generator)
            if isinstance(learner, TrajectoryLength):
                learner.update(float(numbers[0]) - 0.4, longest=10.0)
            elif isinstance(learner, StepSize):
                learner.update(numbers)
            else:
                learner.update(numbers.reshape(2, 2))
        return learner

    makers = (
        lambda: TrajectoryLength(1.0),
        lambda: StepSize(1.0, 0.8, torch.zeros(4)),
        lambda: Covariance(2, True, torch.zeros(1)),
    )
    for make in makers:
        saved = used(make(), 3).state_dict()
        loaded = make()
        loaded.load_state_dict(saved)
        assert {k: type(v) for k, v in vars(loaded).items()} == {k: type(v) for k, v in vars(make()).items()}
        straight, resumed = used(used(make(), 3), 5).state_dict(), used(loaded, 5).state_dict()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# ------------------------------------------------------------------------------------------------ many points at once


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * raw, 0.5), obs=y)


Y = torch.tensor([0.3, -1.0, 2.2], dtype=F64)


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_batched_potential_is_the_looped_one(record: bool, width: int) -> None:
    """U at temperature 1, tempered U = -(log prior + b log likelihood), gradients; fewer points than the width too."""
    potential = Potential(hierarchy, (Y,))
    points, heat = torch.randn(width, potential.size), torch.rand(width)
    target = BatchedPotential(potential, torch.randn(2, potential.size), width, record=record)
    assert target.recorded == record
    for count in {1, width}:
        energy, gradient, log_likelihood = target(points[:count], heat[:count])
        for i in range(count):
            point = points[i].clone().requires_grad_()
            log_prior, likelihood = potential.parts(potential.unflatten(point))
            expected = -(log_prior + heat[i] * likelihood)
            (slope,) = torch.autograd.grad(expected, point)
            torch.testing.assert_close(energy[i], expected.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient[i], slope, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(log_likelihood[i], likelihood.detach(), rtol=1e-12, atol=1e-12)
    plain = target(points)[0]
    torch.testing.assert_close(plain, torch.stack([potential(potential.unflatten(p)) for p in points]))


def test_a_looped_model_gives_the_same_draws() -> None:
    options = {"engine": "chees", "num_chains": 4, "num_warmup": 20, "num_samples": 5, **FEW}
    batched, looped = (fit(hierarchy, Y, loop=loop, **options).posterior["mu"].values for loop in (False, True))
    np.testing.assert_allclose(batched, looped, rtol=1e-6)


def branching() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("fold", -(x**2) if x > 0 else -x.abs())


def item() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(-(float(x.detach()) ** 2)))


def in_place() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    table = torch.zeros(3)
    table[1] = x
    pyro.factor("f", -(table.sum() ** 2))


def mixing() -> None:
    """Counts its own dims from the left, so that many chains at once are taken for one."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.factor("f", -_sum_of_everything(x))


def _sum_of_everything(x: Tensor) -> Tensor:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.square().sum()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * ctx.saved_tensors[0] * slope

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
            return Sum.apply(x).expand(info.batch_size), 0

    return Sum.apply(x)


@pytest.mark.parametrize(
    "model, words",
    [
        (branching, r"test_chees.py:\d+.*torch.where"),
        (item, r"test_chees.py:\d+"),
        (in_place, r"test_chees.py:\d+.*torch.stack"),
        (mixing, "another log density.*mixes chains"),
    ],
)
def test_models_that_do_not_vmap_are_told_what_to_change(model: Any, words: str) -> None:
    with pytest.raises(errors.ModelError, match=words) as caught:
        fit(model, engine="chees", **FEW)
    assert "\n" not in str(caught.value) and "loop=True" in str(caught.value)


def test_a_branching_model_is_sampled_when_asked_to_loop() -> None:
    draws = fit(branching, engine="chees", loop=True, num_chains=4, num_warmup=60, num_samples=100, **FEW).posterior
    # The density is exp(-3 x^2 / 2) for x > 0 and exp(-x^2 / 2 - |x|) for x < 0.
    right = math.sqrt(math.pi / 6)
    left = math.sqrt(math.pi / 2) * math.exp(0.5) * math.erfc(1 / math.sqrt(2))
    share = float((draws["x"] > 0).mean())
    assert abs(share - right / (left + right)) < 4 * 0.5 / math.sqrt(100)


def test_a_chain_without_density_is_nan_alone() -> None:
    """A factorisation fails for one chain of four: recorded and plain."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        root = torch.linalg.cholesky(torch.eye(2) + x * torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        pyro.factor("f", root.diagonal().log().sum())

    potential = Potential(model)
    for record in (True, False):
        target = BatchedPotential(potential, torch.tensor([[0.1], [-0.2]]), 4, record=record)
        energy, gradient, _ = target(torch.tensor([[0.3], [2.0], [0.0], [-0.9]]))
        assert energy.isfinite().tolist() == [True, False, True, True]
        assert gradient.isfinite().squeeze(1).tolist() == [True, False, True, True]


# ------------------------------------------------------------------------------------------------------ the sampler


def chees(num_warmup: int, **options: Any) -> Chees:
    potential = Potential(hierarchy, (Y,))
    pyro.set_rng_seed(1)
    target = BatchedPotential(potential, torch.randn(2, potential.size), 16)
    starts, metric = find_starts(potential, target, "prior", 16, 0)
    settings = {"num_warmup": num_warmup, "seed": 1, "target_accept_prob": 0.8, "max_leapfrogs": 100}
    settings |= {"dense_mass": True, "trajectory_length": None} | options
    return Chees(Ensemble(target, 16, ALONE), starts, metric, **settings)


def test_everything_is_frozen_after_warmup() -> None:
    sampler = chees(40)
    for step in range(40):
        sampler.advance(step)
    learnt = {name: value for name, value in sampler.state_dict().items() if not name.startswith("phase.")}
    sizes, lengths = set(), []
    for step in range(40, 60):
        _, stats = sampler.advance(step)
        sizes |= set(stats["step_size"].tolist())
        lengths.append(float(stats["trajectory_length"][0]))
    after = sampler.state_dict()
    assert all(torch.equal(after[name], value) for name, value in learnt.items())
    assert len(sizes) == 1
    # Trajectories last a share h of one length, rounded up to whole steps.
    (eps,), length = sizes, sampler.length.average
    expected = [eps * max(1, math.ceil(halton(step + 1) * length / eps)) for step in range(40, 60)]
    assert lengths == pytest.approx(expected, rel=1e-12)


def test_a_new_metric_begins_step_size_and_length_anew() -> None:
    """In its units nothing that was learnt before holds."""
    sampler = chees(100)
    first, step = sampler.metric, 0
    while sampler.metric is first:
        sampler.advance(step)
        step += 1
    assert step in sampler.windows
    assert sampler.length.current == pytest.approx(WHITENED_LENGTH, rel=1e-12)
    assert (sampler.length.steps, sampler.step_size.steps) == (0, 0)
    sampler.advance(step)
    assert (sampler.length.steps, sampler.step_size.steps) == (1, 1)


def test_what_was_learnt_is_kept_from_the_right_phase() -> None:
    """The step size kept is that of the last phase, for the metric that is kept."""
    sampler = chees(200)
    for step in range(200):
        sampler.advance(step)
    rates = [float(sampler.advance(step)[1]["acceptance_rate"].mean()) for step in range(200, 300)]
    # 16 chains x 100 transitions: the noise of the mean is below .01; adaptation itself ends within a few hundredths.
    assert np.mean(rates) == pytest.approx(0.8, abs=0.08)


def test_a_given_trajectory_length_is_kept() -> None:
    sampler = chees(40, trajectory_length=1.0)
    for step in range(40):
        sampler.advance(step)
    times = [float(sampler.advance(step)[1]["trajectory_length"][0]) for step in range(40, 60)]
    eps = sampler.step_size.average
    assert times == pytest.approx([eps * max(1, math.ceil(halton(s + 1) / eps)) for s in range(40, 60)])


class Plain(BatchedPotential):
    """A density written by hand, of coordinates z = F y."""

    def __init__(self, metric: Metric) -> None:
        self.metric, self.width, self._graph = metric, 16, None

    def __call__(self, z: Tensor, temperature: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        assert temperature is not None
        energy, slope, log_likelihood = quartic(self.metric.whiten(z), temperature)
        factor = self.metric.factor
        return energy, torch.linalg.solve_triangular(factor.mT, slope.mT, upper=True).mT, log_likelihood


def test_what_is_learnt_does_not_depend_on_coordinates() -> None:
    """Sampling y, or z = F y with metric F: moves, step size and trajectory length are the same."""
    start, identity = torch.randn(16, 2), Metric(torch.eye(2))
    settings: dict[str, Any] = {"num_warmup": 1000, "seed": 1, "target_accept_prob": 0.8, "max_leapfrogs": 100,
                                "dense_mass": True, "trajectory_length": None}  # fmt: skip
    plain, turned = (
        Chees(Ensemble(Plain(metric), 16, ALONE), metric.unwhiten(start), metric, **settings)
        for metric in (identity, METRIC)
    )
    lengths = set()
    for step in range(9):  # before the first window ends
        torch.testing.assert_close(
            METRIC.unwhiten(plain.advance(step)[0]), turned.advance(step)[0], rtol=1e-9, atol=1e-9
        )
        assert plain.step_size.log_size == pytest.approx(turned.step_size.log_size, abs=1e-9)
        assert plain.length.log_length == pytest.approx(turned.length.log_length, abs=1e-9)
        lengths.add(plain.length.log_length)
    assert len(lengths) > 5


@pytest.mark.parametrize("init", ["prior", "uniform", "laplace"])
def test_starts_are_finite_and_dispersed(init: str) -> None:
    potential = Potential(hierarchy, (Y,))
    target = BatchedPotential(potential, torch.randn(2, potential.size), 16)
    starts, metric = find_starts(potential, target, init, 40, seed=3)
    assert starts.shape == (40, potential.size) and len(starts.unique(dim=0)) == 40
    assert all(target(part)[0].isfinite().all() for part in starts.split(16))
    again, _ = find_starts(potential, target, init, 40, seed=3)
    assert torch.equal(starts, again)
    if init == "laplace":  # twice as wide as the approximation
        spread = metric.whiten(starts - starts.mean(0)).square().mean().sqrt()
        assert float(spread) == pytest.approx(2.0, rel=4 / math.sqrt(2 * 40 * potential.size))


def test_given_starts_are_taken() -> None:
    potential = Potential(hierarchy, (Y,))
    target = BatchedPotential(potential, torch.randn(2, potential.size), 16)
    values = {"mu": torch.arange(4.0), "tau": torch.full((4,), 2.0), "raw": torch.zeros(4, 3)}
    starts, _ = find_starts(potential, target, values, 4, seed=0)
    sites = potential.unflatten(starts)
    assert sites["mu"].tolist() == [0.0, 1.0, 2.0, 3.0]
    torch.testing.assert_close(sites["tau"].exp(), values["tau"])
    one = {name: value[1] for name, value in values.items()}
    torch.testing.assert_close(find_starts(potential, target, one, 4, seed=0)[0], starts[1].expand(4, -1))
    with pytest.raises(errors.OptionError, match="'mu'.*4 starts, but there are 8"):
        find_starts(potential, target, values, 8, seed=0)
    with pytest.raises(errors.OptionError, match="no value of tau"):
        find_starts(potential, target, {"mu": values["mu"], "raw": values["raw"]}, 4, seed=0)


def test_superchains_share_a_start() -> None:
    options: dict[str, Any] = {"engine": "chees", "num_chains": 12, "num_warmup": 0, "num_samples": 1, **FEW}
    posterior = fit(hierarchy, Y, num_superchains=3, max_leapfrogs=1, trajectory_length=1e-9, **options)
    # With hardly any time to move, chains are where they started.
    mu = posterior.posterior["mu"].values[:, 0].reshape(3, 4)
    assert posterior.attrs["num_superchains"] == 3
    assert mu.std(1).max() < 0.5 * mu.mean(1).std()
    with pytest.raises(errors.OptionError, match="num_superchains=5 must divide num_chains=12"):
        fit(hierarchy, Y, num_superchains=5, **options)
