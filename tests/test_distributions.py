"""Trajectory distributions: normalised, what they sample is what they score, and right in every Pyro context."""

from __future__ import annotations

import itertools
import math
import pickle

import oracle
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from pirl.distributions import MaxCausalEntTrajectory, MaxEntTrajectory, TabularTrajectory
from pirl.errors import HorizonError, ImpossibleTransitionError, InvalidRewardError
from pirl.mdp import TabularMDP
from pirl.message_passing import messages, occupancy
from pirl.trajectories import Trajectories

READINGS = [MaxCausalEntTrajectory, MaxEntTrajectory]
PROBLEMS = {
    "stochastic": {"horizon": 4},
    "deterministic": {"horizon": 5, "stochastic": False},
    "terminal": {"horizon": 4, "terminal": [2]},
    "counting": {"horizon": 4, "action_prior": "counting"},
    "masked": {"horizon": 4, "available": torch.tensor([[1, 1], [0, 1], [1, 0]]).bool()},
}


def make(name: str = "stochastic", **more: object) -> tuple[TabularMDP, Tensor]:
    mdp = oracle.random_mdp(11, **{**PROBLEMS[name], **more})  # type: ignore[arg-type]
    return mdp, torch.randn(3, 2, dtype=torch.float64)


def everything(mdp: TabularMDP, steps: int, horizon: int | None = None, stop: float = 0.0) -> Tensor:
    """All trajectories of at most ``steps`` decisions, as one tensor."""
    return torch.stack([oracle.as_tensor(path, steps + 1) for path in oracle.paths(mdp, steps, horizon, stop)])


def simulated(mdp: TabularMDP, reward: Tensor, lengths: list[int], seed: int = 0) -> Trajectories:
    pyro.set_rng_seed(seed)
    table = MaxCausalEntTrajectory(mdp, reward, lengths=torch.tensor(lengths)).sample()
    return Trajectories(table[..., 0], table[:, :-1, 1])


# ------------------------------------------------------------------------------------------------ normalisation and
# oracle


@pytest.mark.parametrize("cls", READINGS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_density_sums_to_one_over_all_trajectories(cls: type[TabularTrajectory], name: str) -> None:
    mdp, reward = make(name)
    assert mdp.horizon is not None
    whole = cls(mdp, reward).log_prob(everything(mdp, mdp.horizon)).exp().sum()
    assert math.isclose(float(whole), 1.0, rel_tol=1e-12)
    for length in (0, 1, 3):  # truncated: we stopped watching
        watched = cls(mdp, reward, lengths=torch.tensor(length))
        assert math.isclose(
            float(watched.log_prob(everything(mdp, length, mdp.horizon)).exp().sum()), 1.0, rel_tol=1e-12
        )
    # without their last states, trajectories have the probability of all that could follow
    full = everything(mdp, 3, mdp.horizon)
    reached = full[:, 3, 0] >= 0
    without = torch.cat([full[reached][:, :3], full[~reached][:, :3]]).unique(dim=0)
    if name != "terminal":
        assert math.isclose(float(cls(mdp, reward).log_prob(without).exp().sum()), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("cls", READINGS)
def test_density_sums_to_one_given_starts_and_own_horizons(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make("terminal")
    for state in (0, 1):
        started = mdp.replace(initial=state)
        given = cls(mdp, reward, starts=torch.tensor(state))
        assert math.isclose(float(given.log_prob(everything(started, 4)).exp().sum()), 1.0, rel_tol=1e-12)
    for own in (1, 2, 4):
        # the longest horizon of the batch sets the scan; each episode is scored with its own
        table = torch.nn.functional.pad(everything(mdp, own), (0, 0, 0, 4 - own), value=-1)
        horizons = torch.full((len(table),), own)
        several = cls(mdp, reward, horizons=torch.cat([horizons, torch.tensor([4])]))
        values = torch.cat([table, everything(mdp, 4)[:1]])
        assert math.isclose(float(several.log_prob(values)[:-1].exp().sum()), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("name", ["stochastic", "terminal", "masked"])
def test_geometric_stopping_sums_to_one(name: str) -> None:
    mdp, reward = make(name, horizon=3, discount=0.7)
    table = everything(mdp, 3, stop=1 - 0.7)
    whole = MaxEntTrajectory(mdp, reward, stopping="geometric").log_prob(table).exp()
    assert math.isclose(float(whole.sum()), 1.0, rel_tol=1e-12)
    endless, low = mdp.replace(horizon=None), reward - 1.0
    watched = MaxEntTrajectory(endless, low, stopping="geometric", lengths=torch.tensor(3))
    assert math.isclose(float(watched.log_prob(table).exp().sum()), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_trajectory_reading_equals_enumeration(name: str) -> None:
    """p(tau) exp(sum r) / Z, and for a truncated episode the sum of that over everything that continues it."""
    mdp, reward = make(name)
    assert mdp.horizon is not None
    weights: dict[tuple, float] = {}
    partial: dict[tuple, float] = {}
    log_z = oracle.log_partition(mdp, reward)
    for path in oracle.paths(mdp, mdp.horizon):
        weight = path.probability * math.exp(oracle.reward_sum(path, reward) - log_z)
        weights[path.pairs, path.last] = weight
        cut = path.pairs[:2]
        last = path.pairs[2][0] if len(path.pairs) > 2 else path.last
        partial[cut, last] = partial.get((cut, last), 0.0) + weight
    for table, slots in ((weights, mdp.horizon + 1), (partial, 3)):
        values = torch.stack([oracle.as_tensor(oracle.Path(*key, 0.0, ()), slots) for key in table])
        found = MaxEntTrajectory(mdp, reward).log_prob(values).exp()
        torch.testing.assert_close(found, torch.tensor(list(table.values()), dtype=found.dtype), rtol=1e-12, atol=0)


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("name", PROBLEMS)
def test_causal_reading_equals_the_definition(name: str, discount: float) -> None:
    mdp, reward = make(name, discount=discount)
    assert mdp.horizon is not None
    policies = [oracle.causal_policy(mdp, reward, mdp.horizon - t) for t in range(mdp.horizon)]
    prior = mdp.log_prior.tolist()
    values, expected, choices = [], [], []
    for path in oracle.paths(mdp, mdp.horizon):
        chosen = math.fsum(policies[t][s][a] for t, (s, a) in enumerate(path.pairs))
        base = math.fsum(prior[s][a] for s, a in path.pairs)
        values.append(oracle.as_tensor(path, mdp.horizon + 1))
        expected.append(math.log(path.probability) - base + chosen)
        choices.append(chosen)
    model = MaxCausalEntTrajectory(mdp, reward)
    log_prob = model.log_prob(torch.stack(values))
    torch.testing.assert_close(log_prob, torch.tensor(expected, dtype=log_prob.dtype), rtol=1e-12, atol=1e-12)
    found = model.choice_log_prob(torch.stack(values))
    torch.testing.assert_close(found, torch.tensor(choices, dtype=found.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", READINGS)
def test_stationary_density_is_the_limit_of_long_horizons(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make("terminal", horizon=None)
    reward = reward - 2.0
    values = everything(mdp, 3, 4)
    long = cls(mdp.replace(horizon=400), reward)
    endless = cls(mdp, reward)
    torch.testing.assert_close(endless.log_prob(values), long.log_prob(values), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(endless.choice_log_prob(values), long.choice_log_prob(values), rtol=1e-11, atol=1e-11)
    assert math.isclose(
        float(cls(mdp, reward, lengths=torch.tensor(3)).log_prob(values).exp().sum()), 1.0, rel_tol=1e-12
    )


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("cls", READINGS)
@pytest.mark.parametrize("name", ["stochastic", "terminal", "masked"])
def test_samples_follow_the_density(cls: type[TabularTrajectory], name: str) -> None:
    """Chi-square over every trajectory of three steps; starts and next states are tilted in the trajectory reading."""
    mdp, reward = make(name, horizon=3)
    check_samples(cls(mdp, reward), everything(mdp, 3))


@pytest.mark.parametrize("cls", READINGS)
def test_truncated_stationary_samples_follow_the_density(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make("terminal", horizon=None)
    check_samples(cls(mdp, reward - 2.0, lengths=torch.tensor(2)), everything(mdp, 2, 3))


def test_stopping_samples_follow_the_density() -> None:
    mdp, reward = make(horizon=None, discount=0.7)
    model = MaxEntTrajectory(mdp, reward - 1.0, stopping="geometric", lengths=torch.tensor(2))
    check_samples(model, everything(mdp, 2, stop=0.3))


def check_samples(model: TabularTrajectory, table: Tensor, draws: int = 20_000) -> None:
    pyro.set_rng_seed(5)
    samples = model.sample((draws,))
    probability = model.log_prob(table).exp()
    both, inverse = torch.cat([table, samples]).unique(dim=0, return_inverse=True)
    assert len(both) == len(table), "a sample is impossible"
    counts = torch.bincount(inverse[len(table) :], minlength=len(both))[inverse[: len(table)]]
    expected = draws * probability
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum().reshape(1)]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum().reshape(1)])
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert scipy.stats.chi2.sf(float(statistic), int(kept.sum()) - 1) > 1e-4


def test_sampling_needs_to_know_how_long() -> None:
    mdp, reward = make(horizon=None, discount=0.9)
    with pytest.raises(HorizonError, match="lengths="):
        MaxCausalEntTrajectory(mdp, reward).sample()


@pytest.mark.parametrize("cls", READINGS)
def test_samples_keep_lengths_starts_and_batches(cls: type[TabularTrajectory]) -> None:
    mdp, _ = make()
    reward = torch.randn(2, 1, 3, 2, dtype=torch.float64)
    lengths, starts = torch.tensor([1, 4, 2]), torch.tensor([2, 0, 1])
    draws = cls(mdp, reward, lengths=lengths, starts=starts).sample((7,))
    assert draws.shape == (7, 2, 3, 5, 2)
    assert ((draws[..., 1] >= 0).sum(-1) == lengths).all()
    assert (draws[..., 0, 0] == starts).all()
    last = draws[..., 0].gather(-1, lengths[:, None].expand(7, 2, 3, 1))
    assert (last >= 0).all()


# ------------------------------------------------------------------------------------------------ sums, batches,
# layouts


LAYOUTS = [((), (5,)), ((4,), (5,)), ((4, 1), (5,)), ((4, 1, 1), (2, 5)), ((2, 1), (2, 5)), ((4, 2, 1), (2, 5))]
LAYOUTS += [((5,), (5,)), ((2, 5), (2, 5)), ((3, 2, 5), (2, 5)), ((1, 5), (2, 5)), ((4, 1), (1,))]


@pytest.mark.parametrize("cls", READINGS)
@pytest.mark.parametrize(("reward_batch", "batch"), LAYOUTS)
def test_batched_equals_looped_in_every_layout(
    cls: type[TabularTrajectory], reward_batch: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    """Rewards with dimensions of their own (particles), shared ones (subjects), and both."""
    if reward_batch == (4,):
        reward_batch = (4, 1)
    mdp, _ = make("terminal")
    reward = torch.randn(*reward_batch, 3, 2, dtype=torch.float64, requires_grad=True)
    count = math.prod(batch)
    demos = simulated(mdp, torch.zeros(3, 2, dtype=torch.float64), [1, 4, 2, 3, 4, 2, 1, 4, 3, 2][:count])
    value = demos.as_tensor()
    assert value is not None
    value = value.reshape(*batch, *value.shape[-2:])
    model = cls(mdp, reward)
    full = torch.broadcast_shapes(reward_batch, batch)
    model = model.expand(full)
    found = model.log_prob(value)
    assert found.shape == full
    rewards = reward.expand(*full, 3, 2).reshape(-1, 3, 2)
    values = value.expand(*full, *value.shape[-2:]).reshape(-1, *value.shape[-2:])
    looped = torch.stack([cls(mdp, r).log_prob(v) for r, v in zip(rewards, values, strict=True)]).reshape(full)
    torch.testing.assert_close(found, looped, rtol=1e-12, atol=1e-12)
    choices = torch.stack([cls(mdp, r).choice_log_prob(v) for r, v in zip(rewards, values, strict=True)])
    torch.testing.assert_close(model.choice_log_prob(value).reshape(-1), choices, rtol=1e-12, atol=1e-12)
    total = model.log_prob_sum(value)
    torch.testing.assert_close(total, looped.sum(), rtol=1e-12, atol=1e-12)
    (fast,) = torch.autograd.grad(total, reward)
    (slow,) = torch.autograd.grad(looped.sum(), reward)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", READINGS)
def test_ragged_equals_the_sum_of_its_parts(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make()
    demos = simulated(mdp, reward, [1, 4, 2, 4, 3])
    whole = cls(mdp, reward, lengths=demos.lengths).log_prob(demos.as_tensor())
    parts = []
    for i in range(5):
        length = int(demos.lengths[i])
        alone = Trajectories(demos.states[i : i + 1, : length + 1], demos.actions[i : i + 1, :length])
        parts.append(cls(mdp, reward).log_prob(alone.as_tensor()))
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", READINGS)
def test_a_value_counted_by_a_larger_plate_counts_as_often(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make()
    value = simulated(mdp, reward, [4]).as_tensor()
    assert value is not None
    model = cls(mdp, reward).expand((6,))
    torch.testing.assert_close(model.log_prob_sum(value[0]), 6 * cls(mdp, reward).log_prob(value[0]))
    torch.testing.assert_close(model.log_prob(value).sum(), 6 * cls(mdp, reward).log_prob(value[0]))


def test_trajectory_gradient_is_counts_minus_occupancy() -> None:
    """The lecture's MaxEnt gradient: demonstrated visits minus mu, for full episodes and any dynamics."""
    mdp, reward = make("stochastic")
    demos = simulated(mdp, reward, [4] * 6)
    reward.requires_grad_()
    (gradient,) = torch.autograd.grad(MaxEntTrajectory(mdp, reward).log_prob_sum(demos.as_tensor()), reward)
    counts = torch.zeros(3, 2, dtype=torch.float64)
    counts.index_put_((demos.states[:, :4].flatten(), demos.actions.flatten()), torch.ones(()).double(), True)
    # what comes after the last action is luck, which the trajectory reading also controls: none is left at the horizon
    expected = counts - 6 * messages(mdp, reward.detach()).mu.sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_causal_gradient_is_counts_minus_occupancy_only_for_deterministic_dynamics() -> None:
    """Feature matching and causal maximum likelihood are different estimators when chance plays a part."""
    for name, equal in (("deterministic", True), ("stochastic", False)):
        mdp, reward = make(name)
        mdp = mdp.replace(initial=0)
        assert mdp.horizon is not None
        demos = simulated(mdp, reward, [mdp.horizon] * 6)
        reward.requires_grad_()
        model = MaxCausalEntTrajectory(mdp, reward)
        (gradient,) = torch.autograd.grad(model.log_prob_sum(demos.as_tensor()), reward)
        counts = torch.zeros(3, 2, dtype=torch.float64)
        where = (demos.states[:, : mdp.horizon].flatten(), demos.actions.flatten())
        counts.index_put_(where, torch.ones(()).double(), True)
        matching = counts - 6 * occupancy(mdp, reward.detach(), "causal")
        assert torch.allclose(gradient, matching, rtol=1e-10, atol=1e-10) == equal


@pytest.mark.parametrize("cls", READINGS)
def test_log_prob_sum_under_vmap_and_its_hessian(cls: type[TabularTrajectory]) -> None:
    mdp, _ = make()
    rewards = torch.randn(4, 3, 2, dtype=torch.float64)
    value = simulated(mdp, rewards[0], [4, 2, 3]).as_tensor()
    gradient = torch.func.grad(lambda r: cls(mdp, r).log_prob_sum(value))
    vmapped = torch.func.vmap(gradient)(rewards)
    looped = torch.stack([gradient(r) for r in rewards])
    torch.testing.assert_close(vmapped, looped, rtol=1e-12, atol=1e-12)
    hessian = torch.func.jacrev(gradient)(rewards[0]).reshape(6, 6)
    step = 1e-5 * torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)
    differences = torch.func.vmap(gradient)(rewards[0] + step) - torch.func.vmap(gradient)(rewards[0] - step)
    torch.testing.assert_close(hessian, differences.reshape(6, 6) / 2e-5, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", READINGS)
def test_dense_equals_sparse_tables(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make("terminal")
    sparse = mdp.replace(transition=mdp.transition.reshape(-1, 3).to_sparse())
    values = everything(mdp, 4)
    torch.testing.assert_close(cls(mdp, reward).log_prob(values), cls(sparse, reward).log_prob(values))


# ------------------------------------------------------------------------------------------------ counts are remembered


def test_counts_are_remembered_by_identity_and_forgotten_after_a_change() -> None:
    mdp, reward = make()
    value = simulated(mdp, reward, [4, 3]).as_tensor()
    assert value is not None
    model = MaxCausalEntTrajectory(mdp, reward)
    first = model._statistics(value)
    assert MaxCausalEntTrajectory(mdp, reward + 1)._statistics(value) is first
    assert model._statistics(value.clone()) is not first
    before = model.log_prob(value)
    value[0, 3, 1] = 1 - value[0, 3, 1]  # in place: the same object, another trajectory
    after = model.log_prob(value)
    assert before[1] == after[1] and before[0] != after[0]
    torch.testing.assert_close(after, model.log_prob(value.clone()))
    copy = pickle.loads(pickle.dumps(mdp))
    assert copy.memo == {}
    torch.testing.assert_close(MaxCausalEntTrajectory(copy, reward).log_prob(value), after)


@pytest.mark.parametrize("cls", READINGS)
def test_scores_are_the_same_in_inference_mode(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make()
    demos = simulated(mdp, reward, [3, 1])
    score = cls(mdp, reward).log_prob(demos.as_tensor())
    with torch.inference_mode():
        inside = Trajectories(demos.states.clone(), demos.actions.clone())
        assert inside.as_tensor().is_inference()
        for own in (inside, inside, demos):
            found = cls(mdp, reward, lengths=own.lengths).log_prob(own.as_tensor())
            torch.testing.assert_close(found, score, rtol=1e-12, atol=1e-12)
        # Such a tensor counts no changes, so nothing is remembered of it.
        inside.as_tensor()[1, 1, 0] = -1
        changed = cls(mdp, reward, lengths=inside.lengths).log_prob(inside.as_tensor())
    assert changed[1] != score[1] and changed[0] == score[0]


def test_the_memory_of_counts_does_not_grow() -> None:
    mdp, reward = make()
    for seed in range(30):
        MaxCausalEntTrajectory(mdp, reward).log_prob(simulated(mdp, reward, [4], seed).as_tensor())
    assert len(mdp.memo["statistics"]) <= 8  # those of dead tensors go


def test_without_validation_the_impossible_has_density_zero() -> None:
    mdp, reward = make("deterministic")
    values = everything(mdp, 5)[:1].clone()
    values[0, 1, 0] = (values[0, 1, 0] + 1) % 3
    with pytest.raises(ImpossibleTransitionError, match="trajectory 0, step"):
        MaxEntTrajectory(mdp, reward).log_prob(values)
    for cls in READINGS:
        assert cls(mdp, reward, validate_args=False).log_prob(values).item() == -math.inf


def test_rewards_that_are_not_numbers_are_refused_and_pass_without_validation() -> None:
    mdp, reward = make()
    reward[1, 0] = math.nan
    with pytest.raises(InvalidRewardError, match="state 1, action 0"):
        MaxEntTrajectory(mdp, reward)
    rows = torch.stack([reward, torch.zeros_like(reward)]).unsqueeze(1)
    value = everything(mdp, 4)[:3]
    found = MaxCausalEntTrajectory(mdp, rows, validate_args=False).log_prob(value)
    assert found[0].isnan().all() and found[1].isfinite().all()


# ------------------------------------------------------------------------------------------------ Pyro


def episodes_model(mdp: TabularMDP, demos: Trajectories, cls: type[TabularTrajectory] = MaxCausalEntTrajectory) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(6).double(), 1.0).to_event(1))
    with pyro.plate("episode", len(demos)):
        model = cls(mdp, weights.reshape(*weights.shape[:-1], 3, 2), lengths=demos.lengths)
        pyro.sample("trajectories", model, obs=demos.as_tensor())


@pytest.mark.parametrize("cls", READINGS)
def test_trace_log_prob_is_prior_plus_likelihood(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make()
    demos = simulated(mdp, reward, [4, 2, 3, 1])
    conditioned = poutine.condition(episodes_model, {"weights": reward.flatten()})
    trace = poutine.trace(conditioned).get_trace(mdp, demos, cls)
    expected = dist.Normal(0.0, 1.0).log_prob(reward).sum() + cls(mdp, reward).log_prob(demos.as_tensor()).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-12, atol=1e-12)


def test_subjects_outside_episodes() -> None:
    """A second plate outside the first: each subject's reward meets its own episodes."""
    mdp, reward = make()
    demos = simulated(mdp, reward, [4, 2, 3, 1, 4, 4])
    value = demos.as_tensor()
    assert value is not None
    value = value.reshape(2, 3, *value.shape[1:])

    def model() -> None:
        with pyro.plate("subject", 2, dim=-2):
            weights = pyro.sample("weights", dist.Normal(torch.zeros(6).double(), 1.0).to_event(1))
            with pyro.plate("episode", 3, dim=-1):
                rows = weights.reshape(*weights.shape[:-1], 3, 2)
                pyro.sample("trajectories", MaxCausalEntTrajectory(mdp, rows), obs=value)

    rewards = torch.randn(2, 1, 6, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(model, {"weights": rewards})).get_trace()
    trace.compute_log_prob()
    found = trace.nodes["trajectories"]["log_prob"]
    expected = [MaxCausalEntTrajectory(mdp, rewards[i].reshape(3, 2)).log_prob(value[i]) for i in range(2)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", READINGS)
def test_masked_episodes_do_not_count(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make()
    value = simulated(mdp, reward, [4, 2, 3]).as_tensor()
    keep = torch.tensor([True, False, True])

    def model() -> None:
        with pyro.plate("episode", 3), poutine.mask(mask=keep):
            pyro.sample("trajectories", cls(mdp, reward), obs=value)

    expected = cls(mdp, reward).log_prob(value)[keep].sum()
    torch.testing.assert_close(poutine.trace(model).get_trace().log_prob_sum(), expected)
    torch.testing.assert_close(cls(mdp, reward).expand((3,)).mask(keep).log_prob(value).sum(), expected)


def test_subsampling_is_unbiased() -> None:
    """Over all subsets of two episodes out of four, the scaled log-likelihood averages to the whole one."""
    mdp, reward = make()
    demos = simulated(mdp, reward, [4, 2, 3, 1])
    value = demos.as_tensor()
    assert value is not None

    def model(subset: Tensor) -> None:
        with pyro.plate("episode", 4, subsample=subset) as index:
            part = MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths[index])
            pyro.sample("trajectories", part, obs=value[index])

    subsets = [torch.tensor(pair) for pair in itertools.combinations(range(4), 2)]
    found = torch.stack([poutine.trace(model).get_trace(subset).log_prob_sum() for subset in subsets]).mean()
    torch.testing.assert_close(found, MaxCausalEntTrajectory(mdp, reward).log_prob(value).sum())


def test_vectorised_particles_equal_a_loop_of_particles() -> None:
    mdp, reward = make()
    demos = simulated(mdp, reward, [4, 2, 3])

    def guide(mdp: TabularMDP, demos: Trajectories) -> None:
        loc = pyro.param("loc", torch.zeros(6).double())
        pyro.sample("weights", dist.Normal(loc, 0.1).to_event(1))

    losses = []
    for vectorized in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        elbo = Trace_ELBO(num_particles=400, vectorize_particles=vectorized)
        losses.append(elbo.loss(episodes_model, guide, mdp, demos))
    # 400 draws each: the sd of one is about 1, so of the difference of means about .07
    assert abs(losses[0] - losses[1]) < 0.5
    svi = SVI(episodes_model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(4, vectorize_particles=True))
    before = losses[0]
    for _ in range(150):
        svi.step(mdp, demos)
    assert Trace_ELBO(400, vectorize_particles=True).loss(episodes_model, guide, mdp, demos) < before


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_draws_whole_sets_of_demonstrations(parallel: bool) -> None:
    mdp, reward = make()
    demos = simulated(mdp, reward, [4, 2, 3])
    draws = {"weights": torch.randn(5, 1, 6, dtype=torch.float64) if parallel else torch.randn(5, 6).double()}
    found = Predictive(episodes_model, draws, parallel=parallel)(mdp, demos.unobserved())["trajectories"]
    assert found.shape == (5, 3, 5, 2)
    assert ((found[..., 1] >= 0).sum(-1) == demos.lengths).all()


def test_predictive_from_the_prior() -> None:
    mdp, reward = make()
    demos = simulated(mdp, reward, [4, 2, 3])
    found = Predictive(episodes_model, num_samples=4)(mdp, demos.unobserved())["trajectories"]
    assert found.shape == (4, 3, 5, 2)


def test_expanding_shares_the_values() -> None:
    mdp, reward = make()
    model = MaxEntTrajectory(mdp, reward)
    assert model.expand((3,)).expand((2, 3)).values is model.values
    assert model.expand((2, 3)).batch_shape == (2, 3)
    assert model.event_shape == (5, 2)


@pytest.mark.parametrize("cls", READINGS)
def test_sampling_first_changes_no_gradient_and_graphs_are_not_shared(cls: type[TabularTrajectory]) -> None:
    mdp, reward = make()
    reward.requires_grad_()
    value = simulated(mdp, reward.detach(), [4, 2]).as_tensor()
    model = cls(mdp, reward)
    model.sample()
    gradients = [torch.autograd.grad(model.log_prob(value).sum(), reward)[0] for _ in range(2)]
    (fresh,) = torch.autograd.grad(cls(mdp, reward).log_prob(value).sum(), reward)
    for gradient in gradients:
        torch.testing.assert_close(gradient, fresh, rtol=0, atol=0)


@pytest.mark.parametrize("given", ["starts", "horizons"])
def test_sums_count_dimensions_of_starts_and_horizons_once(given: str) -> None:
    mdp, reward = make()
    value = simulated(mdp, reward, [3]).as_tensor()
    assert value is not None
    batch = {"starts": value[0, 0, :1].expand(3), "horizons": torch.tensor([3, 4, 4])}[given]
    model = MaxCausalEntTrajectory(mdp, reward, **{given: batch})
    torch.testing.assert_close(model.log_prob_sum(value[0]), model.log_prob(value[0]).sum())


def test_episodes_longer_than_they_were_watched_are_refused() -> None:
    mdp, reward = make()
    value = simulated(mdp, reward, [4, 2]).as_tensor()
    with pytest.raises(HorizonError, match="trajectory 0 has 4 decisions, more than its length 3"):
        MaxCausalEntTrajectory(mdp, reward, lengths=torch.tensor([3, 3])).log_prob(value)


def test_simulated_lengths_of_terminating_episodes_have_the_law_of_the_data() -> None:
    """A length that ended in a terminal state is an outcome, and no limit of what is simulated in its place."""
    from pirl.datasets import simulate

    mdp = TabularMDP([[[0.7, 0.3]], [[0.0, 1.0]]], initial=0, terminal=[1])
    reward = torch.zeros(2, 1, dtype=torch.float64)
    demos = simulate(mdp, reward, num_episodes=4000, length=60)
    hidden = demos.unobserved()
    assert (hidden.lengths == 60).all() and set(demos.ends) == {"terminated"}
    again = MaxCausalEntTrajectory(mdp, reward, lengths=hidden.lengths).sample()
    lengths = (again[..., 1] >= 0).sum(-1).double()
    # geometric with mean 1/.3 and sd sqrt(.7)/.3, 4,000 of each
    assert abs(lengths.mean() - demos.lengths.double().mean()) < 4 * math.sqrt(2 * 0.7 / 0.09 / 4000)
    untold = Trajectories(demos.states, demos.actions, demos.lengths, ends="terminated").unobserved()
    assert (untold.lengths == 5 * demos.lengths.max()).all()


@pytest.mark.parametrize("operator", ["soft_values", "soft_adjoint", "product"])
@pytest.mark.parametrize("horizon", [None, 3])
def test_operators_keep_torch_s_rules(operator: str, horizon: int | None) -> None:
    mdp, reward = make(horizon=horizon, discount=0.9)
    problem = MaxCausalEntTrajectory(mdp, reward).problem
    rewards = torch.stack([reward, reward + 1])
    values = torch.ops.pirl.soft_values(rewards, problem.number, "auto")
    arguments = {
        "soft_values": (rewards, problem.number, "auto"),
        "soft_adjoint": (rewards, values, torch.ones_like(values), problem.number),
        "product": (torch.randn(3, 4).double(), problem.transitions.number, False),
    }[operator]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.pirl, operator).default, arguments, test_utils=checks)
