"""The sampled distribution against the exact one, and what it refuses."""

from __future__ import annotations

import dataclasses
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
from pirl.baselines import guided_cost
from pirl.continuous import ContinuousTrajectories
from pirl.datasets import simulate
from pirl.diagnose import verdict
from pirl.envs import gridworld, gridworld_features
from pirl.errors import (
    DataError,
    DiscountError,
    HorizonError,
    InvalidRewardError,
    InvalidTrajectoriesError,
    OptionError,
    PartitionError,
)
from pirl.learning import guided_pool
from pirl.particles import tilt
from pirl.pool import Pool, check_support
from pirl.posterior import sampled_rewards
from pirl.sampled import FeatureReward, SampledMaxEntTrajectory
from pirl.simulators import Rollouts, TabularPolicy, TabularSimulator, base_policy, roll_out
from pirl.soft_q_learning import SoftQLearner

HORIZON, STEPS = 6, 6


def problem(slip: float = 0.0) -> tuple[pirl.TabularMDP, Tensor, Tensor]:
    mdp = gridworld(3, 3, slip=slip, horizon=HORIZON, initial=(0, 0))
    features = gridworld_features(3, 3, 2)
    return mdp, features, torch.tensor([1.0, -0.7], dtype=torch.float64)


def sampled(mdp: pirl.TabularMDP, reward: Tensor | None, num: int, seed: int = 0) -> Pool:
    """Roll-outs of the soft policy of a reward (of the base policy without one)."""
    base = base_policy(mdp)
    policy = base if reward is None else TabularPolicy(pirl.soft_policy(mdp, reward))
    generator = torch.Generator().manual_seed(seed)
    return Pool.of(roll_out(TabularSimulator(mdp), policy, num, generator), policy, base)


def test_the_optimal_policy_knows_log_z_exactly_without_chance() -> None:
    mdp, features, weights = problem()
    reward = pirl.linear_reward(features, weights)
    law = SampledMaxEntTrajectory(sampled(mdp, reward, 50), reward)
    exact = pirl.log_partition(mdp, reward)
    torch.testing.assert_close(law.log_partition, exact, rtol=0, atol=1e-12)
    assert float(law.estimate().ess) == pytest.approx(50, rel=1e-9)
    demos = simulate(mdp, reward, 20, STEPS)
    table = demos.as_tensor()
    assert table is not None
    whole = pirl.MaxEntTrajectory(mdp, reward, lengths=demos.lengths).log_prob(table)
    without = pirl.MaxEntTrajectory(mdp, 0 * reward, lengths=demos.lengths).log_prob(table)  # log p(tau), as Z = 1
    torch.testing.assert_close(law.log_prob(table), whole - without, rtol=0, atol=1e-11)


@pytest.mark.parametrize("slip", [0.0, 0.2])
def test_several_policies_agree_with_the_exact_log_z(slip: float) -> None:
    mdp, features, weights = problem(slip)
    reward = pirl.linear_reward(features, weights)
    pool = sampled(mdp, None, 4_000)
    policy = TabularPolicy(pirl.soft_policy(mdp, 0.7 * reward))
    pool = pool.add(roll_out(TabularSimulator(mdp), policy, 6_000, torch.Generator().manual_seed(1)), policy)
    assert len(pool) == 10_000 and len(pool.policies) == 2
    estimate = SampledMaxEntTrajectory(pool, reward).estimate()
    # Within 4 standard errors, and the first-order bias, half the square of one.
    error = float(estimate.standard_error)
    assert 1e-3 < error < 0.02
    assert abs(float(estimate.log_partition - pirl.log_partition(mdp, reward))) < 4 * error + error**2
    newest = pool.newest(1)
    assert len(newest) == 6_000 and len(newest.policies) == 1
    torch.testing.assert_close(newest.log_ratio, pool.log_base[4_000:] - pool.log_densities[1, 4_000:])


def test_gradient_batches_and_vmap_agree() -> None:
    mdp, features, _ = problem(0.1)
    pool = sampled(mdp, None, 300)
    weights = torch.randn(5, 2, dtype=torch.float64)
    demos = simulate(mdp, pirl.linear_reward(features, weights[0]), 7, STEPS)
    table = demos.as_tensor()
    assert table is not None

    def total(w: Tensor) -> Tensor:
        reward = pirl.linear_reward(features, w)
        return SampledMaxEntTrajectory(pool, reward, lengths=demos.lengths).log_prob(table).sum()

    values, gradients = torch.func.vmap(torch.func.grad_and_value(total))(weights)[::-1]
    counts, used = pool.visits(None, (9, 5))
    seen, visited = pool.visits(table, (9, 5))
    state_features = features[used // 5], features[visited // 5]
    for i, w in enumerate(weights):
        torch.testing.assert_close(values[i], total(w), rtol=1e-12, atol=1e-12)
        chance = (counts @ (state_features[0] @ w) + pool.log_ratio).softmax(0)
        expected = (seen @ state_features[1]).sum(0) - len(demos) * (chance @ counts @ state_features[0])
        torch.testing.assert_close(gradients[i], expected, rtol=0, atol=1e-10)
    batched = SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights).unsqueeze(1), lengths=demos.lengths)
    assert batched.batch_shape == (5, 7)
    torch.testing.assert_close(batched.log_prob(table).sum(-1), values, rtol=1e-12, atol=1e-12)


def test_samples_follow_the_tilted_law() -> None:
    mdp, features, weights = problem(0.1)
    reward = pirl.linear_reward(features, weights)
    law = SampledMaxEntTrajectory(sampled(mdp, None, 20_000), reward)
    drawn = law.sample((20_000,))
    assert drawn.shape == (20_000, STEPS + 1, 2)
    mean = reward.squeeze(-1)[drawn[:, :-1, 0]].sum(-1).mean()
    exact = (pirl.occupancy(mdp, reward, "trajectory") * reward).sum()
    spread = float(reward.squeeze(-1)[drawn[:, :-1, 0]].sum(-1).std())
    ess = float(law.estimate().ess)
    assert abs(float(mean - exact)) < 4 * spread * math.sqrt(1 / 20_000 + 1 / ess)


def model(demos: pirl.Trajectories, pool: Pool, features: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"dims": ["feature"]})
    with pyro.plate("episode", len(demos)):
        law = SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def exact_model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"dims": ["feature"]})
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


@pytest.mark.slow
def test_the_posterior_is_the_exact_one_where_the_gate_holds() -> None:
    mdp, features, weights = problem(0.1)
    demos = simulate(mdp, pirl.linear_reward(features, weights), 10, STEPS)
    pool = sampled(mdp, None, 20_000)
    options = {"num_chains": 64, "num_warmup": 150, "num_samples": 60, "progress": False, "num_prior": 0}
    found = pirl.fit(model, demos, pool, features, num_posterior_predictive=8, **options)
    exact = pirl.fit(exact_model, demos, mdp, features, num_posterior_predictive=0, **options)
    assert found.attrs["partition_estimator"].startswith("importance sampling")
    assert found.attrs["partition_trusted"] == 1 and found.attrs["partition_ess"] > 1_000
    assert found["posterior_predictive"]["trajectories"].shape[-3:] == (10, STEPS + 1, 2)
    a, b = (x.posterior["weights"].values.reshape(-1, 2) for x in (found, exact))
    spread = b.std(0)
    # sqrt(M / ESS) = 0.1 sd of the estimate of log Z, and 0.05 of the two chains' Monte Carlo errors.
    assert (abs(a.mean(0) - b.mean(0)) < 0.15 * spread).all()
    assert (abs(a.std(0) / spread - 1) < 0.1).all()


def test_a_poor_pool_is_told() -> None:
    mdp, features, weights = problem(0.1)
    demos = simulate(mdp, pirl.linear_reward(features, weights), 30, STEPS)
    with pytest.warns(pirl.errors.ConvergenceWarning, match="effective samples of 60 for 30 demonstrations"):
        found = pirl.fit(model, demos, sampled(mdp, None, 60), features, engine="laplace", num_samples=50,
                         progress=False, num_prior=0, num_posterior_predictive=0)  # fmt: skip
    assert found.attrs["partition_trusted"] == 0 and not bool(found.attrs["partition_trusted"])
    # The warning is gone when the file is read again: the diagnosis must say it.
    problems = {finding.kind: finding for finding in pirl.diagnose(found) if finding.severity == "problem"}
    assert "effective samples of 60" in problems["partition"].what and "policies nearer" in problems["partition"].advice
    assert "do not trust this yet" in verdict(found) and "partition" in verdict(found)
    # Every demonstration's density has the same log Z-hat: errors add up in the evidence.
    assert found.attrs["log_evidence_se"] == pytest.approx(30 * found.attrs["partition_standard_error"], rel=1e-12)
    assert found.attrs["log_evidence_se"] > 0.5


# ------------------------------------------------------------------------------------------------- vectors as states


def test_rewards_that_the_pool_knows_least_are_found() -> None:
    mdp, features, weights = problem(0.1)
    demos = simulate(mdp, pirl.linear_reward(features, weights), 5, STEPS)
    pool = sampled(mdp, None, 400)
    quick = {"engine": "laplace", "num_samples": 60, "num_prior": 0, "num_posterior_predictive": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the poor pool
        posterior = pirl.fit(model, demos, pool, features, seed=0, **quick)
    given: Any = (posterior, model, demos, pool, features)

    def effective(reward: Tensor) -> float:
        return float(SampledMaxEntTrajectory(pool, reward).estimate().ess)

    plain = sampled_rewards(*given, num_draws=1 + 2 * 8, seed=3)
    found = sampled_rewards(*given, num_draws=3, seed=3, least_known=2)
    assert found[0].equal(plain[0])
    assert [effective(x) for x in found[1:]] == sorted(effective(x) for x in plain[1:])[:2]
    assert effective(found[1]) < 0.8 * np.median([effective(x) for x in plain])
    with pytest.raises(OptionError, match="least_known is 3, more than num_draws=2"):
        sampled_rewards(*given, num_draws=2, least_known=3)


def vectors(num: int = 40, steps: int = 5) -> tuple[Rollouts, object]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num, steps + 1, 2, generator=generator, dtype=torch.float64)
    actions = torch.randn(num, steps, 1, generator=generator, dtype=torch.float64)

    class Standard:
        def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.randn(len(states), 1, generator=generator, dtype=torch.float64)

        def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
            return -0.5 * (actions.square() + math.log(2 * math.pi)).sum(-1)

    policy = Standard()
    density = sum(policy.log_prob(states[:, t], actions[:, t], t) for t in range(steps))
    return Rollouts(states, actions, density, torch.full((num,), steps)), policy  # type: ignore[arg-type]


def features_of(states: Tensor, actions: Tensor) -> Tensor:
    return torch.cat([states, actions.square()], -1)


def test_features_functions_and_networks_agree() -> None:
    rollouts, policy = vectors()
    pool = Pool.of(rollouts, policy, policy)  # type: ignore[arg-type]
    demos = ContinuousTrajectories(rollouts.states[:3], rollouts.actions[:3])
    table = demos.as_tensor()
    assert table is not None
    weights = torch.tensor([0.3, -0.2, -0.1], dtype=torch.float64)
    by_features = SampledMaxEntTrajectory(pool, FeatureReward(features_of, weights), lengths=demos.lengths)
    by_function = SampledMaxEntTrajectory(pool, lambda s, a: features_of(s, a) @ weights, lengths=demos.lengths)
    torch.testing.assert_close(by_features.log_prob(table), by_function.log_prob(table), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_features.log_partition, by_function.log_partition, rtol=1e-12, atol=1e-12)
    returns = (features_of(rollouts.states[:, :-1], rollouts.actions) @ weights).sum(-1)
    torch.testing.assert_close(by_features.log_partition, returns.logsumexp(0) - math.log(40), rtol=1e-12, atol=1e-12)
    assert by_features.sample().shape == (3, 6, 3)
    # A batch of weights, called: as many rewards, each by its own.
    several = torch.randn(3, 2, 3, dtype=torch.float64)
    states, actions = rollouts.states[:, :-1], rollouts.actions
    found = FeatureReward(features_of, several)(states, actions)
    one_by_one = [FeatureReward(features_of, each)(states, actions) for each in several.flatten(0, 1)]
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(one_by_one), rtol=1e-12, atol=1e-12)


def test_shorter_episodes_count_their_own_steps() -> None:
    states, actions = torch.arange(12.0).reshape(2, 3, 2), torch.ones(2, 2, 1)
    demos = ContinuousTrajectories(states, actions, [2, 1])
    assert demos.states[1, 2].tolist() == demos.states[1, 1].tolist() and demos.actions[1, 1].tolist() == [0.0]
    assert demos[[1]].lengths.tolist() == [1] and demos.unobserved().as_tensor() is None
    assert demos.to(dtype=torch.float32).dtype == torch.float32
    assert demos.unobserved().dtype == torch.float64
    listed = ContinuousTrajectories(list(states.numpy()), list(actions.numpy()), lengths=[2, 1])
    assert torch.equal(listed.states, demos.states) and listed.lengths.tolist() == [2, 1]


def test_files(tmp_path: object) -> None:
    import h5py

    path = str(tmp_path)
    states, actions = torch.rand(3, 5, 2).double().numpy(), torch.rand(3, 4, 1).double().numpy()
    np.savez(f"{path}/a.npz", states=states, actions=actions)
    np.savez(f"{path}/b.npz", obs=states.reshape(15, 2), acts=actions.reshape(12, 1), indices=[4, 8])
    with h5py.File(f"{path}/c.hdf5", "w") as file:
        for i in range(3):
            group = file.create_group(f"episode_{i}")
            group["observations"], group["actions"] = states[i], actions[i]
    expected = ContinuousTrajectories(states, actions).as_tensor()
    read = [
        ContinuousTrajectories.from_npz(f"{path}/a.npz"),
        ContinuousTrajectories.from_npz(f"{path}/b.npz"),
        ContinuousTrajectories.from_hdf5(f"{path}/c.hdf5"),
        ContinuousTrajectories.from_episodes(zip(states, actions, strict=True)),
    ]
    for found in read:
        torch.testing.assert_close(found.as_tensor(), expected)
    (tmp_path / "d.npz").write_bytes(b"nothing")  # type: ignore[operator]
    for name in ("d.npz", "absent.npz"):
        with pytest.raises(DataError, match=name):
            ContinuousTrajectories.from_npz(f"{path}/{name}")
    with pytest.raises(DataError, match=r"d\.npz"):
        ContinuousTrajectories.from_hdf5(f"{path}/d.npz")


@pytest.mark.parametrize("keep", [0, 4, 30, 200, -30])
def test_a_damaged_archive_is_refused_in_one_line(tmp_path: Any, keep: int) -> None:
    path = tmp_path / "demos.npz"
    np.savez(path, states=np.zeros((2, 4, 1)), actions=np.zeros((2, 3, 1)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"^[^\n]*cannot be read as a NumPy archive[^\n]*$"):
        ContinuousTrajectories.from_npz(path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"lengths": np.array([1.5, 2.0])}, "lengths must be 2 whole numbers"),
        ({"actions": np.full((2, 3, 1), "left")}, "actions cannot be read as numbers"),
        ({"states": np.zeros((2, 4, 1), complex)}, "states must be real numbers"),
    ],
)
def test_an_archive_of_other_things_is_refused(tmp_path: Any, entries: dict[str, Any], words: str) -> None:
    path = tmp_path / "demos.npz"
    np.savez(path, **{"states": np.zeros((2, 4, 1)), "actions": np.zeros((2, 3, 1)), **entries})
    with pytest.raises(InvalidTrajectoriesError, match=words):
        ContinuousTrajectories.from_npz(path)


# ------------------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_named() -> None:
    mdp, features, weights = problem()
    reward = pirl.linear_reward(features, weights)
    pool = sampled(mdp, None, 20)
    with pytest.raises(HorizonError, match="trajectory 1 has 4 decisions, and the pool's have 6"):
        SampledMaxEntTrajectory(pool, reward, lengths=torch.tensor([6, 4]))
    with pytest.raises(InvalidRewardError, match="not finite"):
        SampledMaxEntTrajectory(pool, torch.full((9, 5), math.nan, dtype=torch.float64))
    with pytest.raises(InvalidRewardError, match="does not fit the pool"):
        SampledMaxEntTrajectory(pool, torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(InvalidRewardError, match="need a table"):
        SampledMaxEntTrajectory(pool, lambda s, a: s.sum(-1))
    with pytest.raises(InvalidTrajectoriesError, match="do not fit a pool"):
        pool.add(vectors()[0], base_policy(mdp))
    up = torch.full((9, 5), -math.inf, dtype=torch.float64)
    up[:, 0] = 0.0
    only_up = TabularPolicy(up)
    narrow = Pool.of(roll_out(TabularSimulator(mdp), only_up, 5), only_up, base_policy(mdp))
    demos = simulate(mdp, reward, 3, STEPS)
    with pytest.raises(PartitionError, match="demonstration 0 has probability 0 under every policy"):
        check_support(narrow, demos.states, demos.actions, demos.lengths)
    with pytest.raises(PartitionError, match="was played with log density"):
        Pool.of(roll_out(TabularSimulator(mdp), base_policy(mdp), 5), only_up)
    rollouts, policy = vectors()
    with pytest.raises(InvalidRewardError, match="needs numbered states"):
        SampledMaxEntTrajectory(Pool.of(rollouts, policy), reward)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("states", "actions", "lengths", "says"),
    [
        (
            torch.zeros(2, 3, 1),
            torch.zeros(2, 5, 1),
            None,
            "3 states do not fit 5 actions: expected as many, or one more$",
        ),
        (torch.zeros(2, 4, 1), torch.zeros(2, 5, 1), None, "4 states do not fit 5 actions.* or give the states first"),
        (torch.zeros(2, 3), torch.zeros(2, 2), None, r"are not \[N, T \+ 1, ds\]"),
        (torch.zeros(0, 3, 1), torch.zeros(0, 2, 1), None, "are not"),
        (torch.full((1, 3, 1), math.nan), torch.zeros(1, 2, 1), None, "trajectory 0, step 0"),
        (torch.zeros(1, 3, 1), torch.zeros(1, 2, 1), [3], "lengths must be 1 whole numbers from 0 to 2"),
        ([np.zeros((3, 1))], [np.zeros((5, 1))], None, "trajectory 0 has states"),
        ([np.zeros((3, 1)), np.zeros((3, 2))], [np.zeros((2, 1))] * 2, None, "disagree in the size"),
    ],
)
def test_bad_vectors_are_named(states: object, actions: object, lengths: object, says: str) -> None:
    with pytest.raises(InvalidTrajectoriesError, match=says):
        ContinuousTrajectories(states, actions, lengths)


def test_terminal_states_collect_their_reward_once() -> None:
    mdp = gridworld(3, 3, slip=0.0, horizon=HORIZON, initial=(0, 0), terminal=[(2, 2)])
    reward = torch.randn(9, 5, dtype=torch.float64)
    reward[8, 0] = 2.0
    pool = sampled(mdp, reward, 200)
    assert bool((pool.lengths < HORIZON).any())  # some ended, and their no-op counts
    law = SampledMaxEntTrajectory(pool, reward)
    torch.testing.assert_close(law.log_partition, pirl.log_partition(mdp, reward), rtol=0, atol=1e-12)
    table = simulate(mdp, reward, 30, STEPS).as_tensor()
    assert table is not None
    lengths = (table[..., 1] >= 0).sum(-1)
    whole = pirl.MaxEntTrajectory(mdp, reward, lengths=torch.full((30,), STEPS)).log_prob(table)
    without = pirl.MaxEntTrajectory(mdp, 0 * reward, lengths=torch.full((30,), STEPS)).log_prob(table)
    found = SampledMaxEntTrajectory(pool, reward, lengths=lengths).log_prob(table)
    torch.testing.assert_close(found, whole - without, rtol=0, atol=1e-11)


def test_what_was_cut_before_its_end_is_refused() -> None:
    mdp = gridworld(3, 3, slip=0.0, horizon=HORIZON, initial=(0, 0), terminal=[(2, 2)])
    reward = torch.zeros(9, 5, dtype=torch.float64)
    reward[8, 0] = 2.0
    simulator, pool = TabularSimulator(mdp), sampled(mdp, None, 2000)
    untold = dataclasses.replace(pool, terminal=None, _memo={})
    whole = roll_out(simulator, base_policy(mdp), 2000, torch.Generator().manual_seed(1)).trajectories()
    short = whole[(whole.lengths < HORIZON).nonzero().flatten()]
    cut = pirl.Trajectories(whole.states[:, :3], whole.actions[:, :2])
    for each in (pool, untold):
        table = short.as_tensor()
        assert table is not None and table.shape[1] <= HORIZON
        lengths = torch.full((len(short),), STEPS)
        exact = [pirl.MaxEntTrajectory(mdp, x, lengths=lengths).log_prob(table) for x in (reward, 0 * reward)]
        each_law = SampledMaxEntTrajectory(each, reward, lengths=short.lengths)
        found = each_law.log_prob(table)
        found = found + each_law.log_partition - pirl.log_partition(mdp, reward)  # all but log Z is exact
        torch.testing.assert_close(found, exact[0] - exact[1], rtol=0, atol=1e-11)
        with pytest.raises(HorizonError, match="trajectory 0 was cut after 2 of 6 decisions, in state"):
            SampledMaxEntTrajectory(each, reward, lengths=cut.lengths).log_prob(cut.as_tensor())
    with pytest.raises(HorizonError, match="was cut after 2 of 6 decisions"):
        guided_cost(cut, simulator, torch.eye(9).double()[:, :2], num_rollouts=2000)
    with pytest.raises(HorizonError, match="was cut after 2 of 6 decisions"):
        guided_pool(model, cut, simulator, torch.eye(9).double()[:, :2], num_rollouts=500, progress=False)


def test_trajectories_of_another_length_or_shape_are_refused_without_lengths_too() -> None:
    mdp, features, weights = problem()
    reward = pirl.linear_reward(features, weights)
    law = SampledMaxEntTrajectory(sampled(mdp, None, 20), reward)
    with pytest.raises(HorizonError, match="trajectory 0 has 2 decisions, and the pool's have 6"):
        law.log_prob(pirl.Trajectories([[0, 0, 0]], [[4, 4]]).as_tensor())
    rollouts, policy = vectors()
    by_features = SampledMaxEntTrajectory(
        Pool.of(rollouts, policy, policy),
        FeatureReward(features_of, torch.ones(3).double()),  # type: ignore[arg-type]
    )
    with pytest.raises(HorizonError, match="have 2 decisions, and the pool's 5"):
        by_features.log_prob(torch.zeros(4, 3, 3).double())
    with pytest.raises(InvalidTrajectoriesError, match=r"must be \[\*batch, 6, 3\]"):
        by_features.log_prob(torch.zeros(4, 6, 2).double())


def test_a_reward_of_states_alone_does_not_ask_what_was_done() -> None:
    mdp, _, _ = problem()
    base = base_policy(mdp)
    still = torch.full((9, 5), -100.0, dtype=torch.float64)  # possible, and never seen
    still[:, 0] = 0.0
    only = TabularPolicy(still)
    pool = Pool.of(roll_out(TabularSimulator(mdp), only, 4), only, base)  # the others were never taken
    table = pirl.Trajectories([[0] * 7], [[4] * 6]).as_tensor()
    of_states = torch.arange(9, dtype=torch.float64).add(1).unsqueeze(1)
    found, expected = (SampledMaxEntTrajectory(pool, x).log_prob(table) for x in (of_states, of_states.expand(9, 5)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(InvalidRewardError, match="no entry for action 4"):
        SampledMaxEntTrajectory(pool, torch.zeros(9, 3).double()).log_prob(table)


def lifted_model(demos: ContinuousTrajectories, pool: Pool, network: torch.nn.Module, last_layer: bool) -> None:
    net = pirl.lifted_network("net", network, last_layer=last_layer)
    with pyro.plate("episode", len(demos)):
        law = SampledMaxEntTrajectory(
            pool, lambda s, a: -net(torch.cat([s, a], -1)).squeeze(-1).square(), lengths=demos.lengths
        )
        pyro.sample("trajectories", law, obs=demos.as_tensor())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["chees", "nuts", "svi", "laplace"])
def test_a_network_with_priors_is_a_reward_for_every_engine(engine: str) -> None:
    rollouts, policy = vectors()
    pool = Pool.of(rollouts, policy, policy)  # type: ignore[arg-type]
    demos = ContinuousTrajectories(rollouts.states[:3], rollouts.actions[:3])
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)).double()
    few: dict[str, Any] = {"num_chains": 2, "num_warmup": 10, "num_samples": 10} if engine in ("chees", "nuts") else {}
    few |= {"max_steps": 100} if engine == "svi" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so short a run converges to nothing, and this pool is poor
        posterior = pirl.fit(
            lifted_model, demos, pool, network, engine == "laplace", engine=engine, progress=False, num_prior=0,
            num_posterior_predictive=0, log_likelihood=False, **few,
        )  # fmt: skip
    sites = {"net_2_weight", "net_2_bias"} if engine == "laplace" else {
        "net_0_weight", "net_0_bias", "net_2_weight", "net_2_bias"}  # fmt: skip
    assert set(posterior.posterior.data_vars) == sites
    assert all(np.isfinite(x.values).all() for x in posterior.posterior.data_vars.values())
    assert posterior.posterior.attrs["partition_trusted"] == 0


def test_the_last_layer_alone_is_a_linear_reward() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1, bias=False)).double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    hidden = network[:2](inputs).detach()
    weights = torch.randn(5, 1, 4, dtype=torch.float64)
    for value in (weights[0], weights):
        with pyro.poutine.condition(data={"net_2_weight": value}):
            found = pirl.lifted_reward("net", network, inputs, last_layer=True)
        torch.testing.assert_close(found.squeeze(-1), value.squeeze(-2) @ hidden.mT, rtol=1e-12, atol=1e-12)
    trace = pyro.poutine.trace(lambda: pirl.lifted_network("net", network, last_layer=True)).get_trace()
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["net_2_weight"]
    with pytest.raises(InvalidRewardError, match="no parameters"):
        pirl.lifted_network("net", torch.nn.Tanh())


def test_what_the_pool_says_nothing_of_is_refused() -> None:
    """However many samples agree about a log Z that leaves the demonstrations out."""
    mdp, features, weights = problem()
    base, generator = base_policy(mdp), torch.Generator().manual_seed(0)
    demos = simulate(mdp, pirl.linear_reward(features, weights), num_episodes=4, length=STEPS, seed=1)
    table = torch.full((mdp.num_states, mdp.num_actions), -torch.inf, dtype=torch.float64)
    table[:, 3:] = -math.log(2)
    narrow = TabularPolicy(table)
    played = roll_out(TabularSimulator(mdp), narrow, 50, generator)
    reward = pirl.linear_reward(features, torch.zeros(2, dtype=torch.float64))

    def scored(pool: Pool, table: Tensor) -> Tensor:
        return SampledMaxEntTrajectory(pool, reward, lengths=demos.lengths).log_prob(table)

    with pytest.raises(PartitionError, match="probability 0 under every policy of the pool"):
        scored(Pool.of(played, narrow, base), demos.as_tensor())
    with pytest.raises(PartitionError, match="probability 0 under the base measure"):
        scored(Pool.of(roll_out(TabularSimulator(mdp), base, 50, generator), base, narrow), demos.as_tensor())
    whole = Pool.of(roll_out(TabularSimulator(mdp), base, 50, generator), base, base)
    assert scored(whole, demos.as_tensor()).isfinite().all()
    for column, what in ((0, "state 40"), (1, "action 40")):
        wrong = demos.as_tensor().clone()
        wrong[2, 3, column] = 40
        with pytest.raises(InvalidTrajectoriesError, match=f"trajectory 2, step 3: {what} is out of range"):
            scored(whole, wrong)
    # Roll-outs of one policy, said to be another's.
    for make in (lambda: Pool.of(played, base, base), lambda: whole.add(played, base)):
        with pytest.raises(PartitionError, match="roll-out 0 was played with log density"):
            make()


def test_a_discount_is_refused_where_the_pool_is_made() -> None:
    """log Z is of sums, whoever rolled out: a simulator that steps, one that plays whole episodes, or particles."""
    mdp, features, weights = problem()
    reward = pirl.linear_reward(features, weights).expand(-1, 5)
    half = TabularSimulator(pirl.TabularMDP(mdp.transition, mdp.initial, discount=0.5, horizon=HORIZON))
    plain, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(0)

    class Whole:
        horizon, discount = HORIZON, 0.5

        def roll_out(self, policy: Any, num: int, generator: Any = None) -> Rollouts:
            return roll_out(plain, policy, num, generator)

    valued = SoftQLearner(plain, reading="trajectory").update(reward, 20, generator)
    pool = Pool.of(roll_out(plain, base, 20, generator), base, base)
    for rollouts, law in (
        (roll_out(half, base, 20, generator), base),
        (roll_out(Whole(), base, 20, generator), base),
        tilt(half, valued, reward, 20, generator, base=base),
    ):
        assert rollouts.discount == 0.5
        for make in (lambda: Pool.of(rollouts, law, base), lambda: pool.add(rollouts, law)):  # noqa: B023
            with pytest.raises(DiscountError, match=r"no discount, and the simulator's is 0\.5"):
                make()


@pytest.mark.parametrize("count", [3, 5])
def test_functions_of_many_rewards_are_functions_of_each(count: int) -> None:
    """As many rewards as trajectories, or not; without a dim for the plate they would meet the trajectories."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 6, 2, generator=generator, dtype=torch.float64)
    actions = torch.randn(40, 5, 1, generator=generator, dtype=torch.float64)
    weights = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    base = Standard()
    log_prob = sum(base.log_prob(states[:, t], actions[:, t], t) for t in range(5))
    pool = Pool.of(Rollouts(states, actions, log_prob, torch.full((40,), 5)), base, base)
    demos = pirl.ContinuousTrajectories(states[:3], actions[:3])

    def many(states: Tensor, actions: Tensor) -> Tensor:
        return (squares(states, actions) * weights[:, None, None, None, :]).sum(-1)

    law = SampledMaxEntTrajectory(pool, many, lengths=demos.lengths)
    found = law.log_prob(demos.as_tensor())
    assert found.shape == (count, 3)
    for own, expected in zip(weights, found, strict=True):
        one = SampledMaxEntTrajectory(pool, lambda s, a, w=own: squares(s, a) @ w, lengths=demos.lengths)
        torch.testing.assert_close(one.log_prob(demos.as_tensor()), expected, rtol=1e-12, atol=1e-12)
    linear = SampledMaxEntTrajectory(pool, FeatureReward(squares, weights[:, None]), lengths=demos.lengths)
    torch.testing.assert_close(linear.log_prob(demos.as_tensor()), found, rtol=1e-12, atol=1e-12)
    with pytest.raises(InvalidRewardError, match="must keep a dim of 1 for the plate"):
        bare = SampledMaxEntTrajectory(pool, lambda s, a: many(s, a).squeeze(1))
        bare.log_prob(demos.as_tensor())


class Standard:
    """Normal actions, wherever."""

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(len(states), 1, generator=generator, dtype=torch.float64)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(actions).sum(-1)


def squares(states: Tensor, actions: Tensor) -> Tensor:
    return torch.cat([states, actions.square()], -1)
