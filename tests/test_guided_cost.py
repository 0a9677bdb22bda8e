"""From a simulator alone to what exact dynamics give: guided cost learning, IRL as a GAN, and the posterior."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from models import linear_gaussian as puck
from pirl.baselines import adversarial, guided_cost, maxent, sample_gradient
from pirl.baselines.adversarial import _discriminator
from pirl.baselines.guided_cost import _climb, _in_standard_errors, _likelihood
from pirl.baselines.worlds import FiniteWorld, Sums, World, _check_kinds, make_world
from pirl.convergence import ess_bulk
from pirl.datasets import simulate
from pirl.envs import gridworld, gridworld_features
from pirl.errors import ConvergenceWarning, InvalidRewardError, ModelError, OptionError, PartitionError, SimulatorError
from pirl.learning import bayesian_guided_cost, guided_pool, guided_posterior, near_samples
from pirl.learning import rounds as guided_rounds
from pirl.partition import PartitionEstimate, untrusted
from pirl.partition.gates import ESS_PER_DEMONSTRATION
from pirl.pool.demonstrations import check_starts, check_table
from pirl.posterior import from_samples
from pirl.simulators import TabularPolicy, TabularSimulator, base_policy, roll_out
from tests.exchange import exchange

STEPS = 8
QUICK = {"num_samples": 20, "num_starts": 1}
SHORT: dict[str, Any] = {"engine": "laplace", "num_samples": 200, "num_prior": 0, "num_posterior_predictive": 0}
TRUTH = torch.tensor([1.0, -0.8, 0.4], dtype=torch.float64)


def problem(slip: float, num: int = 200, num_features: int = 3) -> tuple[pirl.TabularMDP, Tensor, pirl.Trajectories]:
    mdp = gridworld(4, 4, slip=slip, horizon=STEPS, initial=(1, 1))
    features = gridworld_features(4, 4, num_features)
    law = pirl.MaxEntTrajectory(
        mdp, pirl.linear_reward(features, TRUTH[:num_features]), lengths=torch.full((num,), STEPS)
    )
    seen = law.sample()
    return mdp, features, pirl.Trajectories(seen[..., 0], seen[:, :-1, 1])


@pytest.mark.parametrize("slip", [0.0, 0.1])
def test_guided_cost_and_the_gan_find_maximum_likelihood(slip: float) -> None:
    mdp, features, demos = problem(slip)
    exact = maxent(demos, mdp, features, reading="trajectory").parameters["weights"]
    for method in (guided_cost, adversarial):
        simulator = TabularSimulator(mdp)
        found = method(demos, simulator, features, num_rounds=8, num_rollouts=4000, tolerance=0.0)
        weights = found.parameters["weights"]
        assert float((weights - exact).norm() / exact.norm()) < 0.05
        log_z = float(pirl.log_partition(mdp, found.reward))
        assert abs(found.attrs["log_partition"] - log_z) < 4 * found.attrs["standard_error"]
        assert found.attrs["environment_steps"] == simulator.steps_taken
        sd = found.history["sd_log_weight"]
        if slip == 0:
            # Every pair within reach was tried: the policy is exact, and each weight is Z.
            assert sd[-1] < 1e-9
        else:
            # No causal policy chooses chance: a floor, which does not fall with more rounds.
            assert min(sd) > 0.1 and max(sd[3:]) < 1.5 * min(sd[3:])
        if method is adversarial:
            assert abs(found.attrs["learned_log_partition"] - log_z) < 0.05


def test_the_lower_rungs() -> None:
    mdp, features, demos = problem(0.0)
    exact = maxent(demos, mdp, features, reading="trajectory").parameters["weights"]
    plain = sample_gradient(demos, TabularSimulator(mdp), features, num_rounds=60, num_rollouts=1000, rate=2.0)
    weighed = sample_gradient(
        demos, TabularSimulator(mdp), features, reuse=True, num_rounds=60, num_rollouts=200, rate=2.0
    )
    assert float((plain.parameters["weights"] - exact).norm() / exact.norm()) < 0.2
    assert float((weighed.parameters["weights"] - exact).norm() / exact.norm()) < 0.1
    assert weighed.attrs["environment_steps"] * 4 < plain.attrs["environment_steps"]


@pytest.mark.parametrize("particles", [False, True])
def test_environment_steps_are_those_that_the_simulator_was_asked_for(particles: bool) -> None:
    """Also where episodes end, and where the runs of particles hold more of them than there are draws."""
    mdp = gridworld(4, 4, slip=0.1, horizon=STEPS, initial=(1, 1), terminal=[(2, 2)])
    simulator = TabularSimulator(mdp)
    demos = roll_out(simulator, base_policy(mdp), 20, torch.Generator().manual_seed(0)).trajectories()
    before = simulator.steps_taken
    found = guided_cost(
        demos, simulator, gridworld_features(4, 4, 3), num_rounds=3, num_rollouts=211, particles=particles, l2=1.0,
        tolerance=0.0,
    )  # fmt: skip
    assert found.attrs["environment_steps"] == simulator.steps_taken - before == found.history["environment_steps"][-1]


@pytest.mark.parametrize("method", ["guided cost", "particles", "gan", "gradient", "pool", "pool of particles"])
def test_every_roll_out_is_a_draw_of_its_own(method: str) -> None:
    """Thirty first states out of sixteen agree by chance in one case of 16^30."""
    mdp, features, _ = problem(0.1, num=1)
    spread = pirl.TabularMDP(mdp.transition, torch.full((16,), 1 / 16).double(), horizon=4)
    starts: list[Tensor] = []

    class Noted(TabularSimulator):
        def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
            starts.append(super().reset(num, generator))
            return starts[-1]

    demos = roll_out(TabularSimulator(spread), base_policy(spread), 5, torch.Generator().manual_seed(1)).trajectories()
    rounds: dict[str, Any] = {"num_rounds": 2, "num_rollouts": 30}
    if method.startswith("pool"):
        rounds |= {"num_policies": 2, "progress": False, "particles": method == "pool of particles"}
        guided_pool(model, demos, Noted(spread), features, guide_options=QUICK, **rounds)
    elif method == "gradient":
        sample_gradient(demos, Noted(spread), features, **rounds)
    else:
        how = adversarial if method == "gan" else guided_cost
        how(demos, Noted(spread), features, l2=1.0, tolerance=0.0, particles=method == "particles", **rounds)
    assert len(starts) >= 1 + 2 * 2 and min(map(len, starts)) >= 30
    for i, one in enumerate(starts):
        for other in starts[:i]:
            size = min(len(one), len(other))
            assert not torch.equal(one[:size], other[:size])


def test_a_counting_measure_stays_one_in_the_pool() -> None:
    """Every decision multiplies Z by the number of actions, which a policy's own density would cancel."""
    mdp, features, demos = problem(0.1, num=5)
    counting = pirl.TabularMDP(mdp.transition, mdp.initial, horizon=STEPS, action_prior="counting")
    world = make_world(demos, TabularSimulator(counting), features, 0, 0.1, "trajectory", None, None)
    assert world.begin(50) == slice(0, 50)
    expected = torch.full((50,), STEPS * math.log(5), dtype=torch.float64)
    torch.testing.assert_close(world.pool.log_ratio, expected, rtol=1e-12, atol=0)
    exact = pirl.log_partition(counting, torch.zeros(16, 5).double())
    torch.testing.assert_close(exact, expected[0], rtol=1e-12, atol=0)


def test_a_constant_feature_moves_nothing() -> None:
    mdp, features, demos = problem(0.0, num=20)
    constant = torch.cat([features, torch.full((16, 1), 0.1).double()], 1)
    options: dict[str, Any] = {"reuse": True, "num_rounds": 5, "num_rollouts": 100}
    weights = sample_gradient(demos, TabularSimulator(mdp), constant, **options).parameters["weights"]
    without = sample_gradient(demos, TabularSimulator(mdp), features, **options).parameters["weights"]
    assert abs(float(weights[3])) < 1e-9
    fresh = sample_gradient(demos, TabularSimulator(mdp), features, num_rounds=1, num_rollouts=20)
    assert fresh.attrs["reading"] == "causal"
    torch.testing.assert_close(weights[:3], without, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["likelihood", "counts", "even"])
def test_objectives_have_the_derivatives_they_say(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sums = Sums(normal(6, 3), normal(40, 3), normal(40), 0.5 * normal(40), normal(6))

    def value(x: Tensor) -> Tensor:
        return (_likelihood(sums, x, 0.3) if kind == "likelihood" else _discriminator(sums, x, kind, 0.3)).value

    point = normal(3 if kind == "likelihood" else 4)
    step = _likelihood(sums, point, 0.3) if kind == "likelihood" else _discriminator(sums, point, kind, 0.3)
    torch.testing.assert_close(step.gradient, torch.func.grad(value)(point), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        step.curvature, -torch.func.jacrev(torch.func.jacrev(value))(point), rtol=1e-10, atol=1e-10
    )


def test_samples_that_were_copied_count_as_they_did() -> None:
    """Two copies of each of 20 samples, of half a sample's worth, beside 20 others."""
    normal = torch.randn(40 * 4 + 6 * 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made, offset, real, ratio = (x.squeeze(-1) for x in _split(normal, (40, 3), (40, 1), (6, 3), (6, 1)))
    copied = torch.arange(40).repeat_interleave(torch.tensor([2, 1]).repeat_interleave(20))
    worth = torch.tensor([0.5, 1.0]).double().repeat_interleave(torch.tensor([40, 20]))
    once = Sums(real, made, offset, torch.zeros(40).double(), ratio)
    twice = Sums(real, made[copied], offset[copied], worth.log(), ratio)
    point = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
    told = []
    for sums in (once, twice):
        told.append([
            *_likelihood(sums, point[:3], 0.1), *_discriminator(sums, point, "even", 0.1),
            *_discriminator(sums, point, "counts", 0.1), *(sums.effective_share(x * point[:3]) for x in (0.1, 1, 5)),
        ])  # fmt: skip
    for one, other in zip(*told, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_worlds_sums_weigh_as_its_pool_does() -> None:
    mdp, features, demos = problem(0.3, num=5)
    world = make_world(demos, TabularSimulator(mdp), features, 0, 0.1, "trajectory", None, None)
    world.begin(200)
    weights = torch.tensor([2.0, -2.0, 1.0], dtype=torch.float64)
    world.tilt(world.learn(weights, 50), weights, 100)
    pool, sums = world.pool, world.sums()
    assert pool.efficiency < 0.95
    for reward in (torch.zeros(3).double(), weights):
        estimate = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, reward)).estimate()
        log_z = (sums.pool @ reward + sums.log_offset).logsumexp(0) - math.log(len(pool))
        torch.testing.assert_close(log_z, estimate.log_partition, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pool.ratio_of(pool.states, pool.actions, pool.lengths), sums.log_ratio)


def _split(numbers: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    parts = numbers.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def test_a_reward_step_ends_where_samples_end() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(500, 1, generator=generator, dtype=torch.float64)
    far = torch.full((20, 1), 3.5, dtype=torch.float64)  # where hardly a sample is: the likelihood says much further
    sums = Sums(far, made, *torch.zeros(2, 500).double(), torch.zeros(20).double())
    start = torch.zeros(1, dtype=torch.float64)
    for least in (0.5, 0.05):
        found, free = _climb(lambda x: _likelihood(sums, x, 0.0), start, 1, sums, least)
        share = (made @ found).softmax(0)
        # By the samples' own weights, and as the demonstrations see it: 500 Z-hat over the mean weight of theirs.
        ess = float(1 / share.square().sum()) / 500
        seen = float((made @ found).exp().mean() / (far @ found).exp().mean())
        assert not free and least <= min(ess, seen) < 1.1 * least
    assert _climb(lambda x: _likelihood(sums._replace(demos=0.2 + 0 * far), x, 0.0), start, 1, sums, 0.05)[1]


def test_the_discriminator_knows_both_unknowns_when_samples_are_plenty() -> None:
    # Demonstrations from exp(w f)/Z times a normal law, roll-outs from that law: w and log Z = w^2/2 are known.
    generator = torch.Generator().manual_seed(0)
    weight = 0.7
    real = torch.randn(4000, 1, generator=generator, dtype=torch.float64) + weight
    made = torch.randn(40_000, 1, generator=generator, dtype=torch.float64)
    sums = Sums(real, made, *torch.zeros(2, 40_000).double(), torch.zeros(4000).double())
    for odds in ("counts", "even"):
        point = torch.zeros(2, dtype=torch.float64)
        for _ in range(30):
            step = _discriminator(sums, point, odds, 0.0)
            point = point + torch.linalg.solve(step.curvature, step.gradient)
        # Standard errors of a few hundredths at most: 1/sqrt(4000) for each, times at most 2 for what D leaves out.
        assert abs(float(point[0]) - weight) < 4 * 2 / math.sqrt(4000)
        assert abs(float(point[1]) - weight**2 / 2) < 4 * 2 / math.sqrt(4000)


# ---------------------------------------------------------------------------------------------------- the posterior


def model(demos: pirl.Trajectories, pool: pirl.Pool, features: Tensor) -> None:
    size = features.shape[-1]
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([size]).to_event(1), infer={"dims": ["feature"]})
    with pyro.plate("episode", len(demos)):
        law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def exact_model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
    size = features.shape[-1]
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([size]).to_event(1), infer={"dims": ["feature"]})
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def test_the_rounds_model_is_the_less_likely_the_fewer_samples_count() -> None:
    """By M squares of how far log ESS is below a few, and by the demonstrations' own weights in log Z.

    With the demonstrations among the samples, log Z is that of N + M of them: log mean over N of all weights.
    """
    mdp, features, demos = problem(0.1, num=7)
    base, generator = base_policy(mdp), torch.Generator().manual_seed(0)
    pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 400, generator), base, base)
    near = near_samples.near_samples(model)
    lacks, more = [], []
    for size in (0.0, 1.0, 20.0):
        weights = size * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
        law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights))
        weight = law.log_weights
        share = (weight - weight.max()).exp()
        theirs = law.log_prob(demos.as_tensor()) + pool.ratio_of(demos.states, demos.actions, demos.lengths)
        own = float(share.sum() ** 2 / share.square().sum())
        lacks.append(max(0.0, math.log(0.05 * 400) - math.log(own)))
        theirs = theirs + law.log_partition  # log w of the demonstrations
        more.append(float(torch.cat([weight, theirs]).logsumexp(0)) - float(weight.logsumexp(0)))
        at = {"weights": weights}
        plain, bounded = (
            float(pyro.poutine.trace(pyro.poutine.condition(x, at)).get_trace(demos, pool, features).log_prob_sum())
            for x in (model, near)
        )
        # Sums of a few hundred terms in float64.
        assert bounded - plain == pytest.approx(-7 * (lacks[-1] ** 2 + more[-1]), rel=1e-12, abs=1e-12 * abs(plain))
    assert lacks[0] == 0 and lacks[-1] > 1 and more[0] < 0.1 and more[-1] > 1


@pytest.mark.parametrize("groups", [1, 3])
def test_the_rounds_model_of_groups_is_that_of_each(groups: int) -> None:
    """Rewards of their own for each group of demonstrations: what one group lacks is no other's."""
    mdp, features, demos = problem(0.1, num=5 * groups)
    base, generator = base_policy(mdp), torch.Generator().manual_seed(0)
    pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 400, generator), base, base)
    weights = torch.tensor([0.5, 3.0, 8.0], dtype=torch.float64)[:groups, None, None] * TRUTH

    def together(weights: Tensor, demos: Tensor) -> None:
        with pyro.plate("group", len(weights), dim=-2), pyro.plate("episode", 5, dim=-1):
            law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights))
            pyro.sample("trajectories", law, obs=demos)

    def likelihood(x: Any, *args: Any) -> float:
        return float(pyro.poutine.trace(near_samples.near_samples(x)).get_trace(*args).log_prob_sum())

    table = demos.as_tensor().unflatten(0, (groups, 5))
    each = [likelihood(together, weights[g : g + 1], table[g : g + 1]) for g in range(groups)]
    # Sums of a few dozen terms in float64.
    assert likelihood(together, weights, table) == pytest.approx(sum(each), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_demonstrations_far_from_the_pool_leave_a_slope(dtype: torch.dtype) -> None:
    """A thousand nats likelier, or less likely, than samples: beyond what exp and log survive."""
    mdp, _, _ = problem(0.0, num=1)
    base = base_policy(mdp)
    pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 50, torch.Generator().manual_seed(0)), base, base)
    for odds in (1000.0, -1000.0):
        given = torch.tensor([odds, odds - 1], dtype=dtype, requires_grad=True)
        found = pool.log_ess_of(given)
        found.backward()
        share = torch.softmax(given.detach(), 0)
        expected = math.log(50) - odds - math.log((1 + math.exp(-1)) / 2)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-12)
        # float32 keeps a thousand to 3e-5.
        assert given.grad is not None and torch.allclose(given.grad, -share, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:log Z is not known well enough")
def test_a_round_begins_anew_where_the_last_ones_draw_has_no_density() -> None:
    mdp, features, demos = problem(0.1, num=5)
    base = base_policy(mdp)
    pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 500, torch.Generator().manual_seed(0)), base, base)
    given, start = (demos, pool, features), {"init": {"weights": torch.full((3,), torch.inf)}}
    found = guided_rounds._guide(model, given, "laplace", 0, guided_rounds._QUICK, start)
    expected = guided_rounds._guide(model, given, "laplace", 0, guided_rounds._QUICK, {})
    assert found.attrs["engine"] == "laplace"
    np.testing.assert_array_equal(found.posterior["weights"], expected.posterior["weights"])


def test_the_rounds_posterior_is_the_models_where_the_gate_is_met() -> None:
    """However large the pool: held back, it would stop where it is held, look known there, and leave it at the end.

    What is left of the demonstrations' own weights is M log(1 + M / ess), .01 M at most where ess is 100 M.
    """
    mdp, features, demos = problem(0.0, num=4)
    weights = 0.3 * TRUTH
    proposed = TabularPolicy(pirl.soft_policy(mdp, pirl.linear_reward(features, weights).expand(-1, 5)))
    rollouts = roll_out(TabularSimulator(mdp), proposed, 40_000, torch.Generator().manual_seed(0))
    pool = pirl.Pool.of(rollouts, proposed, base_policy(mdp))
    law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, 15.0 * weights))
    ess = min(float(law.estimate().ess), float(pool.ess_of(from_samples.log_odds(law, demos.as_tensor()))))
    assert 4 * ESS_PER_DEMONSTRATION < ess < 0.05 * len(pool)
    plain, bounded = (
        float(
            pyro.poutine.trace(pyro.poutine.condition(x, {"weights": 15.0 * weights}))
            .get_trace(demos, pool, features)
            .log_prob_sum()
        )
        for x in (model, near_samples.near_samples(model))
    )
    assert -0.04 <= bounded - plain < 0


@pytest.mark.parametrize(
    ("share", "khat", "rounds"), [(1.0, 0.1, 3), (1.9, 0.1, 3), (2.1, 0.1, 2), (2.1, 0.5, 3), (20.0, 0.5, 2)]
)
def test_the_pool_grows_beyond_what_the_approximation_needs(
    monkeypatch: pytest.MonkeyPatch, share: float, khat: float, rounds: int
) -> None:
    """The engine may reach further: just enough samples, or tails that just pass, are not enough; nor is one round."""
    mdp, features, demos = problem(0.1, num=5)
    fitted, kept = guided_rounds._guide, list[Any]()

    def sure(*args: Any) -> Any:
        kept[:] = kept or [fitted(*args)]
        kept[0].attrs |= {"partition_trusted": 1, "partition_ess": share * 5 * ESS_PER_DEMONSTRATION}
        kept[0].attrs["partition_pareto_k"] = khat
        return kept[0]

    monkeypatch.setattr(guided_rounds, "_guide", sure)
    sizes: dict[str, Any] = {"num_rounds": 3, "num_policies": 1, "num_rollouts": 50, "guide_options": QUICK}
    found = guided_pool(model, demos, TabularSimulator(mdp), features, progress=False, **sizes)
    assert {len(x) for x in found.history.values()} == {rounds}


def test_rounds_go_on_where_the_engine_finds_what_they_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the rounds' approximation always says that the pool knows all; the engine's draws tell that it does not."""
    mdp, features, demos = problem(0.1, num=5)
    fitted, engine, asked = guided_rounds._guide, guided_posterior.fit, list[Any]()

    def sure(*args: Any) -> Any:
        found = fitted(*args)
        found.attrs |= {"partition_trusted": 1, "partition_ess": 1e6, "partition_pareto_k": 0.0}
        return found

    @functools.wraps(engine)
    def noted(*args: Any, **options: Any) -> Any:
        found = engine(*args, **options)
        asked.append((options.get("checkpoint"), found.attrs["partition_trusted"], found.attrs["partition_ess"]))
        return found

    monkeypatch.setattr(guided_rounds, "_guide", sure)
    monkeypatch.setattr(guided_posterior, "fit", noted)
    sizes: dict[str, Any] = {"num_policies": 2, "num_rollouts": 100, "guide_options": QUICK, "progress": False, **SHORT}
    call = (model, demos, TabularSimulator(mdp), features)
    with pytest.warns(ConvergenceWarning, match="its 2 rounds"):
        bayesian_guided_cost(*call, num_rounds=2, **sizes)
    assert [trusted for _, trusted, _ in asked] == [0]
    asked.clear()
    found = bayesian_guided_cost(*call, num_rounds=60, **sizes)
    assert [trusted for _, trusted, _ in asked] == [0, 1]
    # What they looked at is the engine's draws, with the margin.
    assert 2 < len(found.history["ess"]) < 60 and asked[-1][2] > 1.2 * 5 * ESS_PER_DEMONSTRATION
    # Where it cannot go on, what was found is not lost; the model's own precision is not the pool's.
    reach = guided_rounds.Rounds.reach

    def fails(self: guided_rounds.Rounds, posterior: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(guided_rounds.Rounds, "reach", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bayesian_guided_cost(*call, num_rounds=60, **sizes)
    assert not found.posterior.attrs["partition_trusted"]
    told = [str(x.message) for x in caught if x.category is ConvergenceWarning]
    assert "could not go on (KeyboardInterrupt: interrupted): this is the posterior of before" in told[0]
    assert "log Z is not known well enough" in told[1] and len(told) == 2
    monkeypatch.setattr(guided_rounds.Rounds, "reach", reach)
    asked.clear()
    found = bayesian_guided_cost(*call, num_rounds=60, dtype=torch.float32, **sizes)
    assert found.posterior.attrs["dtype"] == "float32" and [trusted for _, trusted, _ in asked] == [0, 1]
    # It does not go on without end.
    monkeypatch.setattr(guided_rounds.Rounds, "_known", lambda self, posterior: True)
    asked.clear()
    with pytest.warns(ConvergenceWarning, match="not known well enough"):
        bayesian_guided_cost(*call, num_rounds=60, **sizes)
    assert len(asked) == guided_posterior._MOST_POSTERIORS


def test_demonstrations_that_cannot_be_are_refused_before_the_first_round() -> None:
    mdp, features, demos = problem(0.0, num=5)
    masked = torch.ones(16, 5, dtype=torch.bool)
    masked[:, int(demos.actions[2, 0])] = False
    narrow = pirl.TabularMDP(mdp.transition, mdp.initial, horizon=STEPS, available=masked)

    def untrained(reward: Tensor, generator: torch.Generator | None) -> Any:
        raise AssertionError("was trained")

    with pytest.raises(PartitionError, match="has probability 0 under the base measure"):
        guided_pool(
            model, demos, TabularSimulator(narrow), features, policy_step=untrained, num_rollouts=10, progress=False
        )


CHAINS = {"num_chains": 64, "num_warmup": 150, "num_samples": 60, "progress": False}
FEW = {"num_prior": 0, "num_posterior_predictive": 0, "log_likelihood": False}


@pytest.mark.slow
def test_bayesian_guided_cost_agrees_with_exact_dynamics() -> None:
    mdp, features, demos = problem(0.1, num=30)
    found = bayesian_guided_cost(model, demos, TabularSimulator(mdp), features, num_rollouts=1000, **CHAINS, **FEW)
    assert found.posterior.attrs["partition_trusted"] == 1 and found.history["trusted"][-1]
    assert len(found.history["ess"]) > 1 and len(found.pool) == found.posterior.attrs["partition_samples"]
    exact = pirl.fit(exact_model, demos, mdp, features, **CHAINS, **FEW)
    a, b = (x.posterior["weights"].values.reshape(-1, 3) for x in (found.posterior, exact))
    # The gate: a tenth of a standard deviation; and Monte Carlo errors of both chains, some hundredths.
    assert (abs(a.mean(0) - b.mean(0)) < 0.15 * b.std(0)).all()
    assert (abs(a.std(0) / b.std(0) - 1) < 0.15).all()


@pytest.mark.slow
def test_the_exchange_algorithm_agrees() -> None:
    # Rewards of at most 0: half-normal costs of two features.
    mdp = gridworld(3, 3, slip=0.1, horizon=3, initial=(1, 1))
    features = gridworld_features(3, 3, 2)
    truth = torch.tensor([-0.8, -0.3], dtype=torch.float64)
    law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, truth), lengths=torch.full((12,), 3))
    seen = law.sample()
    demos = pirl.Trajectories(seen[..., 0], seen[:, :-1, 1])
    generator = torch.Generator().manual_seed(0)
    simulator, base = TabularSimulator(mdp), base_policy(mdp)

    def sums(count: int) -> Tensor:
        return features[roll_out(simulator, base, count, generator).states[:, :-1]].sum(1)

    def log_prior(weights: Tensor) -> Tensor:
        return torch.where((weights <= 0).all(), -0.5 * weights.square().sum(), -torch.inf)

    demo_sums = features[demos.states[:, :-1]].sum(1)
    draws = exchange(demo_sums, sums, log_prior, truth, 0.6, 2500, generator)[200:].numpy()

    def costs(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
        cost = pyro.sample("cost", dist.HalfNormal(1.0).expand([2]).to_event(1))
        with pyro.plate("episode", len(demos)):
            law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, -cost), lengths=demos.lengths)
            pyro.sample("trajectories", law, obs=demos.as_tensor())

    ess = ess_bulk(draws[None])
    assert ess.min() > 100
    particles: dict[str, Any] = {"engine": "smc", "num_chains": 2, "num_samples": 500, "progress": False}
    for options in (CHAINS, particles):
        chains = -pirl.fit(costs, demos, mdp, features, **options, **FEW).posterior["cost"].values
        own, exact = ess_bulk(chains), chains.reshape(-1, 2)
        assert own.min() > 100
        for power in (1, 2):
            a, b = draws**power, exact**power
            error = np.sqrt(a.var(0) / ess + b.var(0) / own)
            assert (abs(a.mean(0) - b.mean(0)) < 4 * error).all()


# ------------------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_named() -> None:
    mdp, features, demos = problem(0.0, num=5)
    simulator = TabularSimulator(mdp)
    with pytest.raises(InvalidRewardError, match=r"features have shape \(3, 3\)"):
        guided_cost(demos, simulator, torch.eye(3))
    with pytest.raises(OptionError, match="least_ess is 2"):
        guided_cost(demos, simulator, features, least_ess=2.0)
    with pytest.raises(OptionError, match="odds must be"):
        adversarial(demos, simulator, features, odds="none")
    with pytest.raises(OptionError, match="rate is 0.0"):
        sample_gradient(demos, simulator, features, rate=0.0)
    with pytest.raises(pirl.errors.HorizonError, match="trajectory 0 has 8 decisions"):
        guided_cost(demos, TabularSimulator(mdp, horizon=5), features)
    with pytest.raises(OptionError, match="at least 1"):
        bayesian_guided_cost(model, demos, simulator, features, num_policies=0)
    with pytest.raises(OptionError, match="an object, which cannot be played"):
        bayesian_guided_cost(model, demos, object(), features)
    masked = torch.ones(16, 5, dtype=torch.bool)
    masked[:, int(demos.actions[0, 0])] = False
    narrow = pirl.TabularMDP(mdp.transition, mdp.initial, discount=1.0, horizon=STEPS, available=masked)
    with pytest.raises(PartitionError, match="demonstration 0 has probability 0"):
        guided_cost(demos, TabularSimulator(narrow), features)


@pytest.mark.parametrize(("seed", "num", "slip"), [(22, 20, 0.0), (31, 200, 0.1)])
def test_weights_stay_where_demonstrations_say_that_samples_are(
    seed: int, num: int, slip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what they say, weights that cancel in every return grow until rounding leaves policies that are none."""
    pyro.set_rng_seed(seed)
    mdp, _, demos = problem(slip, num=num)
    few: dict[str, Any] = {"num_rounds": 6, "num_rollouts": 8, "seed": seed}
    found = guided_cost(demos, TabularSimulator(mdp), gridworld_features(4, 4, 8), **few)
    assert not found.attrs["converged"] and float(found.parameters["weights"].abs().max()) < 10
    monkeypatch.setattr(Sums, "log_share_of_demos", lambda self, weights: torch.tensor(torch.inf, dtype=torch.float64))
    monkeypatch.setattr(World, "imitate", lambda self, num_rollouts: None)
    monkeypatch.setattr(FiniteWorld, "imitate", lambda self, num_rollouts: None)
    with pytest.raises(PartitionError, match="the weights run away .* give more roll-outs, or l2"):
        guided_cost(demos, TabularSimulator(mdp), gridworld_features(4, 4, 8), **few)


def corridor() -> tuple[pirl.TabularMDP, Tensor, pirl.Trajectories]:
    """Fourteen places in a row, reward at the far end, which one in 8,192 of the base policy's episodes reaches."""
    table = torch.zeros(14, 2, 14, dtype=torch.float64)
    for place in range(14):
        table[place, 0, max(place - 1, 0)] = table[place, 1, min(place + 1, 13)] = 1.0
    mdp = pirl.TabularMDP(table, initial=0, horizon=14)
    features = torch.zeros(14, 1, dtype=torch.float64)
    features[13] = 1.0
    return mdp, features, simulate(mdp, 12.0 * features, 10, 14, reading="trajectory")


def test_a_pool_that_never_goes_where_demonstrations_go_is_not_trusted() -> None:
    """Its weights are all equal: that no sample has the feature, only the demonstrations tell."""
    mdp, features, demos = corridor()
    base, generator = base_policy(mdp), torch.Generator().manual_seed(1)
    played = roll_out(TabularSimulator(mdp), base, 2000, generator)
    assert not bool((played.states[:, :-1] == 13).any()) and bool((demos.states[:, :-1] == 13).any())
    pool = pirl.Pool.of(played, base, base)
    with pytest.warns(ConvergenceWarning, match="log Z is not known well enough: 0 effective samples"):
        posterior = pirl.fit(model, demos, pool, features, **SHORT)
    assert posterior.attrs["partition_trusted"] == 0 and posterior.attrs["partition_ess"] < 1


def test_what_the_base_policy_never_reaches_is_learned_by_imitation_first() -> None:
    mdp, features, demos = corridor()
    found = bayesian_guided_cost(model, demos, TabularSimulator(mdp), features, progress=False, **SHORT)
    exact = pirl.fit(exact_model, demos, mdp, features, **SHORT)
    a, b = (x.posterior["weights"].values.ravel() for x in (found.posterior, exact))
    assert found.posterior.attrs["partition_trusted"] == 1
    # 200 draws each, .07 sd of error apiece; and log Z moves the mean by .1 sd.
    assert abs(a.mean() - b.mean()) < 0.4 * b.std() and 0.7 < a.std() / b.std() < 1.4
    best = guided_cost(demos, TabularSimulator(mdp), features, l2=1.0)
    assert best.attrs["log_partition"] == pytest.approx(
        float(pirl.log_partition(mdp, pirl.linear_reward(features, best.parameters["weights"]))), abs=0.1
    )


def test_effective_samples_as_the_demonstrations_see_them() -> None:
    """With demonstrations from p(tau | O) both counts are of the same N / (1 + CV^2)."""
    mdp, features, demos = problem(0.1, num=4000)
    base, generator = base_policy(mdp), torch.Generator().manual_seed(0)
    pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 20_000, generator), base, base)
    law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, TRUTH))
    odds = law.log_prob(demos.as_tensor()) + pool.ratio_of(demos.states, demos.actions, demos.lengths)
    weight = odds.exp()
    # Of the mean weight of demonstrations, and as much of the samples' mean square.
    error = 4 * math.sqrt(2) * float(weight.std() / weight.mean()) / math.sqrt(4000)
    assert float(pool.ess_of(odds)) == pytest.approx(float(pool.judge(law.log_weights).ess), rel=error)
    assert error < 0.3


def test_demonstrations_without_a_plate_count_each() -> None:
    mdp, features, demos = problem(0.1, num=40)
    base, generator = base_policy(mdp), torch.Generator().manual_seed(0)
    pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 2000, generator), base, base)

    def plain(demos: pirl.Trajectories, pool: pirl.Pool, features: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights))
        pyro.sample("trajectories", law, obs=demos.as_tensor())

    with pytest.warns(ConvergenceWarning, match="for 40 demonstrations"):
        posterior = pirl.fit(plain, demos, pool, features, **SHORT)
    assert posterior.attrs["partition_demonstrations"] == 40


def test_a_bad_pool_does_not_hide_behind_a_good_one() -> None:
    """Ten demonstrations with 100 effective samples are not known, whatever a thousand others are."""

    def site(pool: Any, explained: int, ess: float) -> from_samples._Site:
        rows = torch.full((3, 1), ess)
        estimate = PartitionEstimate(0 * rows, ess**-0.5 + 0 * rows, rows, 0 * rows, 10**6)
        return from_samples._Site(f"site {pool}", pool, explained, estimate)

    bad, good = site("a", 10, 100.0), site("b", 1000, 200_000.0)
    assert untrusted(*from_samples._together([good])[:2]) is None
    for sites in ([bad], [bad, good]):
        assert untrusted(*from_samples._together(sites)[:2]) is not None
    assert untrusted(*from_samples._together([site("a", 10, 1001.0), good])[:2]) is None
    # Which one is bad is told, where there are several.
    for sites, name in (([bad], None), ([bad, good], "site a"), ([good, bad], "site a")):
        found = from_samples._together(sites)
        assert found.weakest == name
        told = str(untrusted(*found[:2], site=found.weakest))
        assert ("least of all at site 'site a'" in told) == (name is not None)


def test_the_pool_with_the_heavy_tail_is_named() -> None:
    def site(pool: Any, ess: float, khat: float) -> from_samples._Site:
        rows = torch.full((3, 1), ess)
        estimate = PartitionEstimate(0 * rows, ess**-0.5 + 0 * rows, rows, khat + 0 * rows, 10**6)
        return from_samples._Site(f"site {pool}", pool, 10, estimate)

    found = from_samples._together([site("a", 200_000.0, 0.95), site("b", 150_000.0, 0.1)])
    assert "at site 'site a': Pareto k-hat" in str(untrusted(*found[:2], site=found.weakest))


def test_the_error_of_the_likelihood_is_that_of_all_pools() -> None:
    """Two sites share a pool, and its error; those of two pools average out: as fresh pools show it."""
    mdp, features, demos = problem(0.1, num=9)
    base, generator = base_policy(mdp), torch.Generator().manual_seed(0)
    groups = {"few": demos[:2], "some": demos[2:5], "others": demos[5:]}

    def likelihood(pools: list[pirl.Pool]) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        for pool, (name, group) in zip(pools, groups.items(), strict=True):
            with pyro.plate(name, len(group)):
                law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights), lengths=group.lengths)
                pyro.sample(f"{name}_seen", law, obs=group.as_tensor())

    found, said = [], []
    at = {"weights": 0.5 * TRUTH.unsqueeze(0)}
    for _ in range(200):
        one, other = (pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 200, generator), base, base) for _ in "ab")
        quality = from_samples.partition_quality(likelihood, ([one, one, other],), {}, at)
        assert quality is not None
        said.append(float(quality.total_error))
        trace = pyro.poutine.trace(pyro.poutine.condition(likelihood, {"weights": at["weights"][0]}))
        found.append(float(trace.get_trace([one, one, other]).log_prob_sum()))
    # The sd of 200 values has a relative error of 1 / sqrt(400). One error for all would be 9 / sqrt(5^2 + 4^2) = 1.4
    # times as large, and one for each site .84 as large.
    assert np.std(found, ddof=1) / np.mean(said) == pytest.approx(1.0, abs=3 / math.sqrt(400))


@pytest.mark.parametrize(("wrong", "apart", "refused"), [(12, 1, True), (12, 12, True), (6, 6, True), (1, 1, False)])
def test_demonstrations_that_start_where_no_sample_does(wrong: int, apart: int, refused: bool) -> None:
    """In one state that no sample starts in, or in so many, of which each by itself would not be out of the way."""
    mdp, features, demos = problem(0.1, num=12)
    base, generator = base_policy(mdp), torch.Generator().manual_seed(0)
    played = roll_out(TabularSimulator(mdp), base, 1000, generator)
    (start,) = played.states[:, 0].unique().tolist()
    pool, states = pirl.Pool.of(played, base, base), demos.states.clone()
    states[:wrong, 0] = (start + 1 + torch.arange(wrong) % apart) % 16
    law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, TRUTH))
    elsewhere = pirl.Trajectories(states, demos.actions).as_tensor()
    told = (
        rf"{wrong} of 12 demonstrations start where none of 1000 samples does \(all start in {start}\), the first of "
        f"them, 0, in {(start + 1) % 16}:"
    )
    with pytest.raises(PartitionError, match=told) if refused else pytest.warns(ConvergenceWarning, match=told):
        law.log_prob(elsewhere)


def test_rare_starts_are_no_reason_to_refuse() -> None:
    """Starts spread over more places than there are samples: that a demonstration's is not among them says nothing."""
    size = 2000
    stay = pirl.TabularMDP(
        torch.eye(size, dtype=torch.float64).reshape(size, 1, size),
        torch.full((size,), 1 / size, dtype=torch.float64),
        horizon=2,
    )
    base = base_policy(stay)
    pool = pirl.Pool.of(roll_out(TabularSimulator(stay), base, 500, torch.Generator().manual_seed(0)), base, base)
    demos = roll_out(TabularSimulator(stay), base, 20, torch.Generator().manual_seed(1)).trajectories()
    assert not bool(torch.isin(demos.states[:, 0], pool.states[:, 0]).all())
    law = pirl.SampledMaxEntTrajectory(pool, torch.zeros(size, 1).double())
    assert law.log_prob(demos.as_tensor()).abs().max() < 1e-12


def test_starts_that_repeat_are_no_reason_to_refuse() -> None:
    """Demonstrations that a bootstrap drew again, policies that were rolled out with the same chance; on any device."""
    system, generator = puck.puck(6, 0.05), torch.Generator().manual_seed(0)
    base = system.base_policy
    seen = roll_out(system, base, 10, generator)
    pool = pirl.Pool.of(roll_out(system, base, 500, torch.Generator().manual_seed(1)), base, base)
    pool = pool.add(roll_out(system, base, 500, torch.Generator().manual_seed(1)), base)
    demos = pirl.ContinuousTrajectories(seen.states, seen.actions)
    for table in (demos.as_tensor(), demos.as_tensor().repeat(5, 1, 1), demos.as_tensor().expand(3, 10, -1, -1)):
        check_table(pool, table)
    with torch.device("meta"):
        check_starts(pool, demos.states[:, 0])


def test_refusals_of_starts_are_as_rare_as_they_say() -> None:
    """Of one law, with starts of all kinds of chances, at most 5% of demonstrations are warned of."""
    size = 200
    chance = torch.linspace(0, 8, size, dtype=torch.float64).neg().exp()
    stay = pirl.TabularMDP(
        torch.eye(size, dtype=torch.float64).reshape(size, 1, size), chance / chance.sum(), horizon=2
    )
    base, generator, told = base_policy(stay), torch.Generator().manual_seed(0), 0
    for _ in range(300):
        pool = pirl.Pool.of(roll_out(TabularSimulator(stay), base, 300, generator), base, base)
        starts = roll_out(TabularSimulator(stay), base, 20, generator).states[:, 0]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_starts(pool, starts)
        told += len(caught)
    assert told / 300 <= 0.05 + 4.5 * (0.05 * 0.95 / 300) ** 0.5


def test_a_discount_is_refused() -> None:
    mdp, features, demos = problem(0.0, num=5)
    simulator = TabularSimulator(pirl.TabularMDP(mdp.transition, mdp.initial, discount=0.7, horizon=STEPS))
    for method in (guided_cost, adversarial, sample_gradient):
        with pytest.raises(pirl.errors.DiscountError, match="the simulator's is 0.7"):
            method(demos, simulator, features, num_rounds=1, num_rollouts=10)
    with pytest.raises(pirl.errors.DiscountError, match="the simulator's is 0.7"):
        bayesian_guided_cost(model, demos, simulator, features, num_rollouts=10, progress=False)


def test_a_simulator_that_fails_leaves_the_pool_as_it_was() -> None:
    mdp, features, demos = problem(0.0, num=5)

    class Breaks(TabularSimulator):
        left = 3 * STEPS

        def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
            Breaks.left -= 1
            if Breaks.left < 0:
                raise ValueError("the cable came off")
            return super().step(states, actions, generator)

    with pytest.raises(SimulatorError, match="the cable came off"):
        guided_cost(demos, Breaks(mdp), features, num_rollouts=100)
    base = base_policy(mdp)
    pool = pirl.Pool.of(roll_out(TabularSimulator(mdp), base, 10), base, base)
    before = pool.log_ratio.clone()
    with pytest.raises(SimulatorError, match="the cable came off"):
        pool.add(roll_out(Breaks(mdp), base, 10), base)
    assert len(pool) == 10 and torch.equal(pool.log_ratio, before)


def test_a_model_with_exact_dynamics_needs_no_pool() -> None:
    mdp, features, demos = problem(0.0, num=5)

    def other(demos: pirl.Trajectories, pool: pirl.Pool, features: Tensor) -> None:
        exact_model(demos, mdp, features)

    with pytest.raises(ModelError, match="no SampledMaxEntTrajectory"):
        bayesian_guided_cost(other, demos, TabularSimulator(mdp), features, num_rollouts=10, progress=False)


def test_vectors_reach_maximum_likelihood_too() -> None:
    given = puck.load(num_demos=100, horizon=5)
    system, table = given["system"], given["demos"]
    demos = pirl.ContinuousTrajectories(table[..., :2], table[:, :-1, 2:])

    def squares(states: Tensor, actions: Tensor) -> Tensor:
        away = (states.square() * torch.tensor([1.0, 0.1], dtype=states.dtype)).sum(-1, keepdim=True)
        return -0.5 * torch.cat([away, actions.square()], -1)

    # The exact maximum, by the Riccati recursion: gradient ascent is Newton's, as there are two costs.
    costs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    law = lambda x: puck.costs(system, x[0], x[1])  # noqa: E731

    def value(x: Tensor) -> Tensor:
        return system.relative_log_prob(law(x), demos.states, demos.actions).sum()

    for _ in range(20):
        (slope,) = torch.autograd.grad(value(costs), costs)
        bend = torch.func.jacrev(torch.func.jacrev(value))(costs.detach())
        costs = (costs - torch.linalg.solve(bend, slope)).detach().requires_grad_()
    exact = costs.detach().exp()
    log_z = float(system.log_partition(law(costs.detach())))
    for method in (guided_cost, adversarial):
        options: dict[str, Any] = {"base": system.base_policy, "num_rounds": 5, "num_rollouts": 4000, "tolerance": 0.0}
        found = method(demos, system, squares, particles=True, **options)
        weights = found.parameters["weights"]
        assert float((weights - exact).norm() / exact.norm()) < 0.05
        assert found.log_policy is None and found.policy is not None
        states = torch.zeros(3, 2, dtype=torch.float64)
        assert torch.equal(found.reward(states, states[:, :1]), squares(states, states[:, :1]) @ weights)
        if method is adversarial:
            assert abs(float(found.attrs["learned_log_partition"]) - log_z) < 0.1
        # Policies' own roll-outs are weighed right as well; the noise leaves them fewer effective samples.
        plain = method(demos, system, squares, **options)
        assert float((plain.parameters["weights"] - exact).norm() / exact.norm()) < 0.1
        assert plain.history["sd_log_weight"][-1] > 0.1 > found.history["sd_log_weight"][-1]
    with pytest.raises(OptionError, match="base="):
        guided_cost(demos, system, squares)
    with pytest.raises(OptionError, match="a LinearGaussian lacks discount.* a function of states and actions"):
        guided_cost(demos, system, torch.zeros(3, 2).double())
    mdp, features, tabular = problem(0.0, num=5)
    with pytest.raises(OptionError, match="leave out"):
        guided_cost(tabular, TabularSimulator(mdp), features, base=base_policy(mdp))
    with pytest.raises(OptionError, match="vectors"):
        pirl.compare({"puck": found}, tabular, mdp)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"engine": "hmc"}, "hmc"), ({"guide": "nuts"}, "nuts"), ({"num_rollout": 5}, "did you mean 'num_rollouts'")],
)
def test_wrong_options_are_refused_before_the_first_roll_out(wrong: dict[str, Any], told: str) -> None:
    mdp, features, demos = problem(0.0, num=5)

    class Untouched(TabularSimulator):
        def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
            raise AssertionError("was played")

    with pytest.raises(OptionError, match=told):
        bayesian_guided_cost(model, demos, Untouched(mdp), features, progress=False, **wrong)


def test_what_stands_in_the_wrong_place_is_named() -> None:
    # Called directly, as the tests' own check of types would be first.
    mdp, features, demos = problem(0.0, num=5)
    simulator = TabularSimulator(mdp)
    calls: list[tuple[tuple[Any, ...], str]] = [
        ((demos, mdp, features), "TabularSimulator"),
        ((simulator, demos, features), "demos is a TabularSimulator"),
        ((demos, features, simulator), "give one in this place"),
        ((demos, simulator, features.numpy()), "torch.as_tensor"),
        ((demos, simulator, lambda s, a: features[s]), "table"),
    ]
    for arguments, told in calls:
        with pytest.raises(OptionError, match=told):
            _check_kinds(*arguments)
    spoilt = features.clone()
    spoilt[2, 1] = math.nan
    with pytest.raises(InvalidRewardError, match=r"features\[2, 1\] is nan"):
        guided_cost(demos, simulator, spoilt, num_rollouts=10)


def test_models_that_guided_cost_learning_cannot_use_are_named() -> None:
    mdp, features, demos = problem(0.0, num=5)

    def exact(demos: pirl.Trajectories, pool: Any, features: Tensor) -> None:
        exact_model(demos, pool, features)

    def forgetful(demos: pirl.Trajectories, pool: pirl.Pool, features: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1))
        with pyro.plate("episode", len(demos)):
            pyro.sample("trajectories", pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights)))

    options = {"num_rollouts": 10, "progress": False}
    with pytest.raises(ModelError, match="observes a SampledMaxEntTrajectory"):
        bayesian_guided_cost(exact, demos, TabularSimulator(mdp), features, **options)
    with pytest.raises(ModelError, match="obs=demos"):
        bayesian_guided_cost(forgetful, demos, TabularSimulator(mdp), features, **options)


def test_features_of_vectors_are_looked_at_first() -> None:
    given = puck.load(num_demos=5, horizon=5)
    system, table = given["system"], given["demos"]
    demos = pirl.ContinuousTrajectories(table[..., :2], table[:, :-1, 2:])
    good = lambda s, a: -(s**2)  # noqa: E731
    wrong: list[tuple[Any, str]] = [
        (lambda s, a: good(s, a).sum(-1), "stack them in the last dim"),
        (lambda s, a: good(s, a).float(), "float32"),
        (lambda s, a: good(s, a) * math.inf, "not finite"),
    ]
    for features, told in wrong:
        with pytest.raises(InvalidRewardError, match=told):
            guided_cost(demos, system, features, base=system.base_policy, num_rollouts=10)


class Elsewhere(TabularSimulator):
    """The same world, but for what one decision leads to."""

    def __init__(self, mdp: pirl.TabularMDP, state: int, action: int, leads_to: int) -> None:
        super().__init__(mdp)
        self.where, self.leads_to = (state, action), leads_to

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        following = super().step(states, actions, generator)
        return torch.where((states == self.where[0]) & (actions == self.where[1]), self.leads_to, following)


@pytest.mark.parametrize("method", [guided_cost, guided_pool])
def test_transitions_that_the_simulator_never_makes_are_told(method: Any) -> None:
    mdp, features, demos = problem(0.1, num=40)
    wrong = Elsewhere(mdp, 5, int(demos.actions[0, 0]), 10)  # where every demonstration starts
    arguments = (demos, wrong, features) if method is guided_cost else (model, demos, wrong, features)
    few = {"num_rollouts": 500, "num_rounds": 1}
    with pytest.warns(ConvergenceWarning, match=r"\(state 5, action \d\) lead to state \d+, and none of \d+ samples"):
        method(*arguments, **few)


def test_luck_of_a_few_transitions_is_told_of_no_simulator() -> None:
    """Slips that a small pool has not seen are no fault: warnings are errors here."""
    for seed in range(20):
        pyro.set_rng_seed(seed)
        mdp, features, demos = problem(0.3, num=20)
        guided_cost(demos, TabularSimulator(mdp), features, num_rounds=1, num_rollouts=60, seed=seed)


def test_convergence_is_judged_in_standard_errors() -> None:
    mdp, features, demos = problem(0.1, num=20)
    found = guided_cost(demos, TabularSimulator(mdp), features, num_rounds=6, num_rollouts=3000)
    attrs, exact = found.attrs, maxent(demos, mdp, features, reading="trajectory")
    # Relative change is above the tolerance still, by noise that no standard error would show.
    assert attrs["converged"] and attrs["change"] > 1e-3 and attrs["change_in_standard_errors"] < 0.1
    errors = exact.standard_errors()["weights"]
    away = (found.parameters["weights"] - exact.parameters["weights"]) / errors
    # Weights themselves are as far from maximum likelihood as so many effective samples leave them: 4 of these.
    assert float(away.abs().max()) < 4 * math.sqrt(len(demos) / attrs["ess"]) * float(len(away)) ** 0.5
    # Its units are those of maximum likelihood's standard errors, of a step along one weight that others follow.
    sums = make_world(demos, TabularSimulator(mdp), features, 0, 0.1, "trajectory", None, None)
    sums.begin(20_000)
    one = torch.zeros(3).double()
    one[0] = 0.1 * errors[0]
    size = _in_standard_errors(one, sums.sums(), exact.parameters["weights"], 0.0) * math.sqrt(3)
    information = torch.linalg.inv(exact.covariance["hessian"])[0, 0]
    assert abs(size / math.sqrt(float(one[0] ** 2 * information)) - 1) < 0.1
    # Too few samples are told, with how many would do.
    few = guided_cost(demos, TabularSimulator(mdp), features, num_rounds=3, num_rollouts=50, tolerance=0.0)
    assert not few.attrs["converged"]
    assert "of 2000 for a tenth of one): raise num_rounds or num_rollouts" in repr(few)
