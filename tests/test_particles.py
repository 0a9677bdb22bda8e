"""Particles as proposals: unbiased, draws of p(tau | O), honest about shared ancestors, at one about constants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toys import Knowing, Scattered, steep

import pirl
from pirl.envs import gridworld, gridworld_features
from pirl.errors import OptionError, PartitionError, SimulatorError
from pirl.linear_gaussian import LinearGaussian
from pirl.message_passing import messages
from pirl.particles import TiltedProposal, returns, tilt
from pirl.partition import reconcile
from pirl.pool import Pool
from pirl.simulators import BaseMeasure, Rollouts, TabularPolicy, TabularSimulator, base_policy, roll_out
from pirl.soft_q_learning import SoftPolicy, SoftQLearner

STEPS = 6


def world(slip: float = 0.3, terminal: bool = False) -> tuple[pirl.TabularMDP, Tensor]:
    ends = [(2, 2)] if terminal else []
    mdp = gridworld(3, 3, slip=slip, horizon=STEPS, initial=(0, 0), terminal=ends)
    reward = pirl.linear_reward(gridworld_features(3, 3, 3), torch.tensor([1.5, -1.0, 0.5], dtype=torch.float64))
    return mdp, reward.expand(-1, mdp.num_actions).contiguous()


def learned(mdp: pirl.TabularMDP, reward: Tensor, num: int = 300) -> SoftPolicy:
    learner = SoftQLearner(TabularSimulator(mdp), reading="trajectory", explore=0.5)
    for seed in range(3):
        policy = learner.update(reward, num, torch.Generator().manual_seed(seed))
    return policy


def test_the_trajectory_readings_policy_is_learned() -> None:
    mdp, reward = world(slip=0.0)
    exact = messages(mdp, reward)
    policy = learned(mdp, reward)
    seen = exact.mu.sum(-1) > 0
    assert torch.allclose(policy.values[seen], exact.log_beta[:STEPS][seen], atol=1e-10)
    # Under chance it tends to the tilted policy, and not to the causal one.
    mdp, reward = world(slip=0.3)
    found = learned(mdp, reward, 4000).log_policy.exp()
    tilted, causal = (pirl.soft_policy(mdp, reward, reading).exp() for reading in ("trajectory", "causal"))
    weight = messages(mdp, reward).mu.sum(-1, keepdim=True)
    far = lambda other: float((weight * (found - other).abs()).sum())  # noqa: E731
    assert far(tilted) < far(causal) / 4


@pytest.mark.parametrize("terminal", [False, True])
def test_particles_are_unbiased_and_draw_from_the_tilted_law(terminal: bool) -> None:
    mdp, reward = world(terminal=terminal)
    exact = messages(mdp, reward)
    log_z = float(pirl.log_partition(mdp, reward))
    policy = learned(mdp, reward, 50)  # a poor twist: nothing may depend on it
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(1)
    ratios, visits = [], []
    for _ in range(60):
        rollouts, proposal = tilt(simulator, policy, reward, 400, generator, base=base, num_runs=4)
        ratio = math.exp(proposal.log_partition - log_z)
        states, actions, counted = rollouts.pairs()
        count = torch.zeros(mdp.num_states * mdp.num_actions, dtype=torch.float64)
        pair = states * mdp.num_actions + actions
        count.index_add_(0, pair[counted], torch.ones(int(counted.sum()), dtype=torch.float64))
        ratios.append(ratio)
        visits.append(ratio * count / len(rollouts.lengths))  # Z-hat times the draws' mean is unbiased
        decisions = rollouts.lengths.double() * math.log(mdp.num_actions)
        by_hand = rollouts.returns(reward) - decisions - proposal.log_partition
        assert torch.allclose(by_hand, rollouts.log_density, rtol=1e-12, atol=1e-12)
    ratio = torch.tensor(ratios)
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))
    found = torch.stack(visits)
    error = found.std(0) / math.sqrt(len(found))
    expected = exact.mu.sum(0).flatten()
    assert bool(((found.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all())


def test_efficiency_says_what_a_particle_is_worth() -> None:
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    blind = SoftPolicy(base.log_policy.expand(STEPS, -1, -1), torch.zeros(STEPS, mdp.num_states).double(), ())
    generator = torch.Generator().manual_seed(2)
    means, worth, spread = [], [], []
    for _ in range(80):
        rollouts, proposal = tilt(simulator, blind, 2 * reward, 400, generator, base=base, num_runs=20)
        value = rollouts.returns(2 * reward)
        means.append(float(value.mean()))
        worth.append(proposal.efficiency)
        spread.append(float(value.var()))
    honest = sum(spread) / len(spread) / float(torch.tensor(means).var()) / 400
    # Never better than it is, but for the chance of a variance of 80 means, and of 20 runs each; and not far worse.
    assert 0.65 < honest / (sum(worth) / len(worth)) < 3
    assert sum(worth) / len(worth) < 0.7
    # Where nothing is left to chance and the twist is exact, no particle is resampled.
    mdp, reward = world(slip=0.0)
    _, proposal = tilt(TabularSimulator(mdp), learned(mdp, reward), reward, 400, generator, base=base, num_runs=20)
    assert proposal.efficiency > 0.5 and proposal.standard_error < 1e-9


def test_any_part_of_the_draws_is_as_good_as_another() -> None:
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    blind = SoftPolicy(base.log_policy.expand(STEPS, -1, -1), torch.zeros(STEPS, mdp.num_states).double(), ())
    generator = torch.Generator().manual_seed(5)
    drawn = [tilt(simulator, blind, 2 * reward, 200, generator, base=base)[0].returns(2 * reward) for _ in range(150)]
    first = torch.stack([x[0] for x in drawn]) - torch.stack([x.mean() for x in drawn])
    assert abs(float(first.mean())) < 4 * float(first.std()) / math.sqrt(len(first))


def test_samples_that_share_ancestors_do_not_hide_behind_many_that_do_not_count() -> None:
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(6)
    drawn, proposal = tilt(simulator, learned(mdp, 3 * reward), 3 * reward, 1000, generator, base=base)
    proposal.efficiency = 0.1
    alone = Pool.of(drawn, proposal, base)
    many = Pool.of(roll_out(simulator, base, 5000, generator), base, base).add(drawn, proposal)
    ess = [float(pirl.SampledMaxEntTrajectory(x, 3 * reward).estimate().ess) for x in (alone, many)]
    assert abs(ess[0] - 100) < 1
    # The five thousand add what they are worth for this reward, which is little; they are not averaged with the others.
    without = float(pirl.SampledMaxEntTrajectory(Pool.of(
        roll_out(simulator, base, 5000, generator), base, base), 3 * reward).estimate().ess)  # fmt: skip
    assert ess[1] < 2 * (ess[0] + without)
    # And an estimate at r0 itself is not known better than Z-hat(r0) is.
    assert float(pirl.SampledMaxEntTrajectory(alone, 3 * reward).estimate().standard_error) >= proposal.standard_error


def test_a_counting_measure_is_one() -> None:
    mdp = gridworld(3, 3, slip=0.2, horizon=STEPS, initial=(0, 0), terminal=[(2, 2)])
    counting = pirl.TabularMDP(mdp.transition, initial=mdp.initial, terminal=mdp.terminal, horizon=STEPS,
                               action_prior="counting")  # fmt: skip
    reward = world()[1]
    measure = BaseMeasure(counting.log_prior)
    simulator = TabularSimulator(counting)
    learner = SoftQLearner(simulator, reading="trajectory")
    generator = torch.Generator().manual_seed(7)
    policy = learner.update(reward, 2000, generator)
    drawn, proposal = tilt(simulator, policy, reward, 8000, generator, base=measure)
    exact = float(pirl.log_partition(counting, reward))
    assert abs(proposal.log_partition - exact) < 4 * proposal.standard_error
    assert abs(exact - float(pirl.log_partition(mdp, reward))) > 5
    pool = Pool.of(roll_out(simulator, base_policy(counting), 20_000, generator), base_policy(counting), measure)
    found = pirl.SampledMaxEntTrajectory(pool.add(drawn, proposal), 0.8 * reward).estimate()
    off = float(found.log_partition) - float(pirl.log_partition(counting, 0.8 * reward))
    assert abs(off) < 4 * float(found.standard_error)


def overlapping(seed: int, count: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Three unnormalised laws over ten outcomes, their log normalising constants, and samples of each."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.multinomial(law.exp(), count, replacement=True, generator=generator)
    return law[:, index.flatten()], torch.arange(3).repeat_interleave(count), law.logsumexp(1)


def test_constants_are_reconciled() -> None:
    # The same law three times, with three estimates of its constant: agreed at the mean by precision, exactly.
    density, origin, _ = overlapping(0)
    off, errors = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.1, 0.2, 0.4]).double()
    found = reconcile(density[:1] - off.unsqueeze(1), origin, errors).shift
    after = off + found
    expected = float((off / errors**2).sum() / (errors**-2).sum())
    assert torch.allclose(after, torch.full_like(after, expected), atol=1e-6)
    # Different laws: ratios of constants within their spread over replicates, far below the prior errors.
    differences = []
    for seed in range(40):
        density, origin, log_z = overlapping(seed)
        found = reconcile(density, origin, torch.full((3,), 10.0).double()).shift
        differences.append(found - found.mean() - (log_z - log_z.mean()))
    difference = torch.stack(differences)
    error = difference.std(0) / math.sqrt(len(difference))
    assert bool((difference.mean(0).abs() < 4 * error + 1e-3).all()) and float(difference.std()) < 0.2
    # Without overlap the estimates stay, in single precision too.
    apart = torch.tensor([[0.0, 0.0, -900.0, -900.0], [-900.0, -900.0, 0.0, 0.0]])
    assert float(reconcile(apart, torch.tensor([0, 0, 1, 1]), torch.full((2,), 0.1)).shift.abs().max()) < 1e-6
    # One estimate alone stays.
    assert not bool(reconcile(density[:1], 0 * origin, torch.tensor([0.1]).double()).shift.any())


@pytest.mark.parametrize("sure", [[0], [0, 2]])
def test_constants_that_are_known_stay_and_hold_the_others(sure: list[int]) -> None:
    """Estimates that are off by 1, with errors that say nothing: as near as samples can tell, which is as told."""
    off = torch.ones(3, dtype=torch.float64)
    off[sure] = 0.0
    known = off == 0
    standard = []
    for seed in range(60):
        density, origin, log_z = overlapping(seed)
        found = reconcile(density - (log_z + off).unsqueeze(1), origin, 100 * off, known=known)
        moved = found.shift + off
        assert not bool(found.shift[sure].any()) and not bool(found.covariance[sure].any())
        free = off.bool()
        root = torch.linalg.cholesky(found.covariance[free][:, free])
        standard.append(torch.linalg.solve_triangular(root, moved[free].unsqueeze(1), upper=False).squeeze(1))
    square = torch.stack(standard).square()
    # Mean squares of standard normal numbers, 60 of each.
    assert abs(float(square.mean()) - 1) < 4 * math.sqrt(2 / square.numel())
    # Samples of one law, under three names, know the others' constants exactly by the one that is known.
    same = reconcile(density[:1] - off.unsqueeze(1), origin, 100 * off, known=known)
    assert torch.allclose(same.shift, -off, atol=1e-6) and float(same.covariance.abs().max()) < 1e-6
    # Errors that say that the estimates are known leave them, unless those who know contradict: .1 is within their
    # error here, 1 is not, and 0 is no error that anybody may have.
    for error in (1e-4, 0.0):
        near, far = (
            reconcile(density - (log_z + size * off).unsqueeze(1), origin, error * off, known=known).shift
            for size in (0.1, 1.0)
        )
        assert float(near.abs().max()) < 1e-3
        assert bool(((far + off)[~known].abs() < 0.3).all())
    # Without those who know, an estimate without error is left alone.
    assert not bool(reconcile(density - off.unsqueeze(1), origin, 0 * off).shift.any())


def test_a_filter_that_missed_is_corrected() -> None:
    """A reward that hardly any particle finds: all runs have the same Z-hat, and no error of it."""
    mdp, _ = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(5)
    rare = torch.zeros(mdp.num_states, mdp.num_actions, dtype=torch.float64)
    visits = messages(mdp, rare).mu.sum((0, 2))
    rare[int(visits.argmin())] = 6.0
    log_z = float(pirl.log_partition(mdp, rare))
    flat = SoftPolicy(base.log_policy.expand(STEPS, -1, -1), torch.zeros(STEPS, mdp.num_states).double(), ())
    plain = Pool.of(roll_out(simulator, base, 2000, generator), base, base)
    missed = 0
    for _ in range(40):
        drawn, law = tilt(simulator, flat, rare, 8, generator, base=base, num_runs=2)
        if law.log_partition > log_z - 3:
            continue
        missed += 1
        alone, both = (pirl.SampledMaxEntTrajectory(x, rare).estimate() for x in (plain, plain.add(drawn, law)))
        # Believed, they would be off by as much as their constant, and hundreds of samples would seem to count. What is
        # left is that they pass for eight draws of a law that eleven of the roll-outs know.
        assert abs(float(both.log_partition) - log_z) < (log_z - law.log_partition) / 3
        assert 8 < float(alone.ess) < 15 and float(both.ess) < 1.5 * float(alone.ess)
    assert missed > 20


def test_constants_weigh_what_samples_and_estimates_know() -> None:
    # Errors of estimates 0.05 beside samples that hardly overlap: the estimates win; and the other way around.
    density, origin, log_z = overlapping(1)
    noise = torch.tensor([0.04, -0.03, 0.02]).double()
    normalised = density - (log_z + noise).unsqueeze(1)
    sure = reconcile(normalised, origin, torch.full((3,), 1e-4).double()).shift
    unsure = reconcile(normalised, origin, torch.full((3,), 1.0).double()).shift
    assert float(sure.abs().max()) < 1e-4 and float(unsure.abs().max()) > 1e-2


def test_a_pool_of_particles_knows_log_z_of_other_rewards() -> None:
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    learner = SoftQLearner(simulator, reading="trajectory", explore=0.5)
    generator = torch.Generator().manual_seed(3)
    first = pool = Pool.of(roll_out(simulator, base, 2000, generator), base, base)
    for scale in (0.8, 1.0, 1.2):
        policy = learner.update(scale * reward, 500, generator)
        pool = pool.add(*tilt(simulator, policy, scale * reward, 2000, generator, base=base))
    for scale in (0.7, 0.9, 1.1):
        law = pirl.SampledMaxEntTrajectory(pool, scale * reward)
        found, exact = law.estimate(), float(pirl.log_partition(mdp, scale * reward))
        # The constants' own errors add to that of the weights.
        constant = max(p.standard_error for p in pool.policies if isinstance(p, TiltedProposal))
        assert abs(float(found.log_partition) - exact) < 4 * math.hypot(float(found.standard_error), constant)
        # And with them more is known than by the first 2,000 alone.
        assert float(found.ess) > float(pirl.SampledMaxEntTrajectory(first, scale * reward).estimate().ess)
        assert pool.efficiency < 1
    assert float(pool.constants[0]) == 0 and bool((pool.constants[1:] != 0).all())


def test_vectors() -> None:
    system = LinearGaussian(
        torch.eye(1).double(), torch.eye(1).double(), 0.2 * torch.eye(1).double(), torch.zeros(1).double(),
        torch.eye(1).double(), torch.eye(1).double(), horizon=4,
    )  # fmt: skip
    reward = system.quadratic(torch.eye(1).double(), 0.5 * torch.eye(1).double())
    law, base = system.solve(reward), system.base_policy

    class Exact:
        def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
            return law.policy.sample(states, step, generator)

        def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
            return law.policy.log_prob(states, actions, step)

        def value(self, states: Tensor, step: int) -> Tensor:
            return law.values.at(step)(states)

    class Base(Exact):
        def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
            return base.sample(states, 0, generator)

        def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
            return base.log_prob(states, actions, 0)

    generator = torch.Generator().manual_seed(4)
    # A reward is asked for pairs [n, ds] and [n, da], as it is documented.
    shapes = set[int]()

    def watched(states: Tensor, actions: Tensor) -> Tensor:
        shapes.add(states.dim())
        return reward(states, actions)

    tilt(system, Exact(), watched, 100, generator, base=Base())
    assert shapes == {2}
    drawn, proposal = tilt(system, Exact(), reward, 4000, generator, base=Base())
    assert abs(proposal.log_partition - float(law.log_partition)) < 4 * proposal.standard_error
    states, actions = system.sample(reward, 20_000, generator)
    for found, exact in ((drawn.states[:, -1], states[:, -1]), (drawn.actions[:, 0], actions[:, 0])):
        error = float(exact.std()) * math.sqrt(1 / (4000 * proposal.efficiency) + 1 / 20_000)
        assert abs(float(found.mean() - exact.mean())) < 4 * error
        assert abs(float(found.std() / exact.std()) - 1) < 4 * error / float(exact.std())


def test_an_end_pays_wherever_the_last_column_is() -> None:
    mdp, reward = world(terminal=True)
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(10)
    plain = roll_out(simulator, base, 300, generator)
    drawn, proposal = tilt(simulator, learned(mdp, reward), reward, 300, generator, base=base)
    pool = Pool.of(plain, base, base).add(drawn, proposal)
    early = (plain.lengths < 5).nonzero().flatten()
    wide = plain.states[early], plain.actions[early], plain.lengths[early]
    narrow = wide[0][:, :5], wide[1][:, :4], wide[2]
    assert int(wide[2].max()) == 4
    for of in (pool.ratio_of, proposal.log_density, lambda *x: returns(reward, *x, STEPS)):
        torch.testing.assert_close(of(*narrow), of(*wide), rtol=0, atol=1e-12)
    told = Rollouts(*narrow[:2], torch.zeros(len(early)), wide[2], horizon=STEPS)
    torch.testing.assert_close(told.returns(reward), plain.returns(reward)[early], rtol=0, atol=1e-12)
    # Samples of unequal numbers, with constants that were reconciled, are weighed as demonstrations would be.
    bad = TiltedProposal(reward, base, proposal.log_partition + 0.3, 0.3, 1.0, STEPS)
    more, again = tilt(simulator, learned(mdp, reward), reward, 90, generator, base=base)
    more = more._replace(log_density=bad.log_density(*more[:2], more.lengths))
    pool = pool.add(more, bad)
    assert again.horizon == STEPS and float(pool.constants.abs().max()) > 0.1
    torch.testing.assert_close(pool.ratio_of(pool.states, pool.actions, pool.lengths), pool.log_ratio)


def test_bad_input_is_named() -> None:
    mdp, reward = world()
    policy, base = learned(mdp, reward, 10), base_policy(mdp)
    with pytest.raises(OptionError, match="at least 2 runs"):
        tilt(TabularSimulator(mdp), policy, reward, 3, base=base)

    class Whole:
        horizon = 3

        def roll_out(self, policy: TabularPolicy, num: int, generator: object = None) -> Rollouts:
            raise NotImplementedError

    with pytest.raises(SimulatorError, match="reset and step"):
        tilt(Whole(), policy, reward, 100, base=base)

    class Fails(TabularSimulator):
        def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
            raise RuntimeError("the robot fell")

    with pytest.raises(SimulatorError, match="step 0: RuntimeError: the robot fell"):
        tilt(Fails(mdp), policy, reward, 100, base=base)

    class Ends:
        horizon = 3

        def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.zeros(num, 1)

        def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return states

        def is_terminal(self, states: Tensor) -> Tensor:
            return states[:, 0] > 1

    with pytest.raises(SimulatorError, match="is_terminal"):
        tilt(Ends(), policy, reward, 100, base=base)


def test_a_pool_mends_a_constant_that_is_known_badly() -> None:
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(8)
    policy = learned(mdp, reward)
    (one, good), (two, bad) = (tilt(simulator, policy, reward, 2000, generator, base=base) for _ in range(2))
    bad.log_partition, bad.standard_error = bad.log_partition + 0.5, 0.5
    pool = Pool.of(one, good, base).add(two, bad)
    found = float(pirl.SampledMaxEntTrajectory(pool, reward).log_partition)
    # Both are of the same law, whose constant is that of the one that knows it.
    assert abs(found - good.log_partition) < 0.01
    assert abs(found - float(pirl.log_partition(mdp, reward))) < 4 * good.standard_error + 0.01


def test_runs_count_by_what_they_found() -> None:
    # Small runs without guidance: some find much, some little, and Z-hat times the draws' mean stays unbiased.
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    blind = SoftPolicy(base.log_policy.expand(STEPS, -1, -1), torch.zeros(STEPS, mdp.num_states).double(), ())
    generator = torch.Generator().manual_seed(9)
    log_z, found = float(pirl.log_partition(mdp, 2 * reward)), []
    expected = float((messages(mdp, 2 * reward).mu.sum(0) * 2 * reward).sum())
    for _ in range(600):
        drawn, proposal = tilt(simulator, blind, 2 * reward, 24, generator, base=base, num_runs=6)
        found.append(math.exp(proposal.log_partition - log_z) * float(drawn.returns(2 * reward).mean()))
    value = torch.tensor(found, dtype=torch.float64)
    assert abs(float(value.mean()) - expected) < 4 * float(value.std()) / math.sqrt(len(value))


def test_a_reward_that_pays_late_hides_no_early_steps() -> None:
    # Many steps of chance, and only the last one pays: blind particles are resampled away at every step.
    mdp, reward = world()
    late = torch.zeros_like(reward)
    late[int(reward.sum(-1).argmax())] = 6.0
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(11)
    policy = learned(mdp, late)
    bent = SoftPolicy(
        base.log_policy.expand(STEPS, -1, -1), torch.randn(STEPS, mdp.num_states, generator=generator).double(), ()
    )
    firsts, worth, runs = [], [], 60
    for twist in (policy, bent):
        means, said = [], []
        for _ in range(runs):
            drawn, proposal = tilt(simulator, twist, late, 400, generator, base=base, num_runs=4)
            means.append(float((drawn.actions[:, 0] == 0).double().mean()))
            said.append(proposal.efficiency)
        mean = sum(means) / runs
        firsts.append(mean * (1 - mean) / float(torch.tensor(means).var()) / 400)
        worth.append(sum(said) / runs)
    # What first actions are worth, by their spread over runs: never far less than is said.
    assert all(honest > 0.6 * told for honest, told in zip(firsts, worth, strict=True)), (firsts, worth)
    assert worth[1] < worth[0]


def test_errors_of_constants_count_in_effective_samples() -> None:
    # Two proposals that have no sample in common: what their constants are off by moves the mean of what tells them
    # apart, by the variance that 1 / ess says.
    both = torch.full((1, 2, 1), 1.0, dtype=torch.float64)
    mdp = pirl.TabularMDP(both, initial=torch.ones(1).double(), horizon=1)
    base, rewards = base_policy(mdp), 40.0 * torch.eye(2).double().unsqueeze(1)

    def pool(errors: Tensor, error: float) -> Pool:
        found = None
        for action, (reward, off) in enumerate(zip(rewards, errors.tolist(), strict=True)):
            law = TiltedProposal(reward, base, 40 - math.log(2) + off, error, 1.0, 1)
            states, actions = torch.zeros(50, 2, dtype=torch.long), torch.full((50, 1), action)
            lengths = torch.ones(50, dtype=torch.long)
            rollouts = Rollouts(states, actions, law.log_density(states, actions, lengths), lengths)
            found = Pool.of(rollouts, law, base) if found is None else found.add(rollouts, law)
        assert found is not None
        return found

    sign, moved, error = torch.tensor([1.0, -1.0]).double().repeat_interleave(50), [], 0.1
    generator = torch.Generator().manual_seed(12)
    for _ in range(400):
        off = error * torch.randn(2, generator=generator, dtype=torch.float64)
        moved.append(float(pool(off, error).log_ratio.softmax(0) @ sign))
    exact = pool(torch.zeros(2).double(), error)
    known = pool(torch.zeros(2).double(), 1e-9)
    ess = [1 / float(x.judge(torch.stack([x.log_ratio, x.log_ratio])).ess[1]) for x in (exact, known)]
    assert abs(ess[1] - 1 / 100) < 1e-9
    variance = float(torch.tensor(moved).square().mean())
    assert abs(variance / (ess[0] - ess[1]) - 1) < 4 * math.sqrt(2 / 400)
    # One of them alone has nothing to be off from.
    weights = torch.where(sign > 0, exact.log_ratio, -torch.inf)
    assert abs(float(exact.judge(weights).ess) - 50) < 1e-6
    assert abs(float(exact.judge(weights).standard_error) - math.hypot(error, math.sqrt(1 / 100 * 100 / 99))) < 1e-3


def test_particles_count_for_as_many_samples_as_they_are_worth() -> None:
    # Copies of draws, worth that much less, tell what the draws told, beside a policy's roll-outs as well.
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(13)
    plain = roll_out(simulator, base, 100, generator)
    drawn, law = tilt(simulator, learned(mdp, reward), reward, 60, generator, base=base)
    other = roll_out(simulator, base, 7, generator)
    told = []
    for copies in (1, 5):
        once = TiltedProposal(reward, base, law.log_partition, 0.1, 0.9 / copies, STEPS)
        repeated = Rollouts(*(x.repeat(copies, *[1] * (x.dim() - 1)) for x in drawn[:4]))
        pool = Pool.of(plain, base, base).add(repeated, once)
        rewards = reward * torch.tensor([0.0, 0.5, 1.2]).double().reshape(3, 1, 1, 1)
        found = pirl.SampledMaxEntTrajectory(pool, rewards).estimate()
        ratio = pool.ratio_of(other.states, other.actions, other.lengths)
        told.append([found.log_partition, found.ess, found.standard_error, ratio, pool.ess_of(ratio)])
    for one, many in zip(*told, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-10, atol=1e-10)
    assert float(pool.efficiency) < 0.5
    # Where the samples know log Z exactly, unequal worth makes no error.
    exact = float(pirl.log_partition(mdp, reward))
    same = TiltedProposal(reward, base, exact, 0.0, 0.25, STEPS), TiltedProposal(reward, base, exact, 0.0, 1.0, STEPS)
    pool = Pool.of(drawn, same[0], base).add(drawn, same[1])
    found = pool.judge(returns(reward, pool.states, pool.actions, pool.lengths) + pool.log_offset)
    assert abs(float(found.log_partition) - exact) < 1e-12 and float(found.standard_error) < 1e-12


def test_weights_are_unbiased_and_errors_honest_whatever_particles_are_worth() -> None:
    """Copies of exact draws, a third or a fifth of a draw each, beside roll-outs."""
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    log_z = {scale: float(pirl.log_partition(mdp, scale * reward)) for scale in (0.5, 1.0, 1.5)}
    generator, found = torch.Generator().manual_seed(14), []
    torch.manual_seed(14)
    for _ in range(150):
        pool = Pool.of(roll_out(simulator, base, 80, generator), base, base)
        for scale, copies, num in ((0.5, 3, 40), (1.0, 5, 30)):
            table = pirl.MaxEntTrajectory(mdp, scale * reward).sample((num,))
            states, actions = (x.repeat(copies, 1) for x in (table[..., 0], table[:, :-1, 1]))
            law = TiltedProposal(scale * reward, base, log_z[scale], 0.0, 1 / copies, STEPS)
            lengths = torch.full((len(states),), STEPS)
            pool = pool.add(Rollouts(states, actions, law.log_density(states, actions, lengths), lengths), law)
        estimate = pirl.SampledMaxEntTrajectory(pool, 1.5 * reward).estimate()
        found.append((float(estimate.log_partition) - log_z[1.5], float(estimate.standard_error)))
    off, told = torch.tensor(found, dtype=torch.float64).unbind(1)
    ratio = off.exp() - 1
    assert abs(float(ratio.mean())) < 4 * float(ratio.std()) / math.sqrt(150)
    # The square of the error told is an upper bound of the variance, as numbers of samples are fixed; and a close one.
    variance, bound = float((ratio.square()).mean()), float((told * off.exp()).square().mean())
    assert 0.6 * bound < variance < bound * (1 + 4 * math.sqrt(2 / 150))


def test_poor_particles_do_not_spoil_good_roll_outs() -> None:
    """Few particles in two runs with a twist that misleads, whose Z-hat is known less well than it says.

    Taken for as many samples as they are, with a constant that roll-outs do not correct, the error is 5 times theirs.
    """
    mdp, reward = world()
    simulator, base = TabularSimulator(mdp), base_policy(mdp)
    generator = torch.Generator().manual_seed(3)
    bent = SoftPolicy(
        base.log_policy.expand(STEPS, -1, -1),
        1.5 * torch.randn(STEPS, mdp.num_states, generator=generator).double(), (),
    )  # fmt: skip
    log_z, off = float(pirl.log_partition(mdp, reward)), []
    for _ in range(80):
        alone = Pool.of(roll_out(simulator, base, 500, generator), base, base)
        both = alone.add(*tilt(simulator, bent, 2 * reward, 40, generator, base=base, num_runs=2))
        off.append([float(pirl.SampledMaxEntTrajectory(x, reward).log_partition) - log_z for x in (alone, both)])
    alone, both = (torch.tensor(off, dtype=torch.float64).exp() - 1).square().mean(0).sqrt().tolist()
    assert both < 2 * alone, (alone, both)


def test_a_value_of_another_shape_is_named() -> None:
    class Column(Knowing):
        def value(self, states: Tensor, step: int) -> Tensor:
            return states

    with pytest.raises(PartitionError, match=r"policy.value gave .*\(2, 160, 1\) for 320 states: expected one number"):
        tilt(Scattered(), Column(), lambda s, a: s[:, 0], 20, base=Knowing(), num_runs=2)


def test_starts_are_chosen_among_sixteen_times_as_many() -> None:
    """Z is a mean over starts: its relative variance is CV^2 / (16 n), and no start is chosen twice.

    For r = -c s^2 / 2 and starts N(0, 9), Z = (1 + 9 c)^(-1/2) and E[w^2] = (1 + 18 c)^(-1/2). The likeliest start of
    16 n is chosen n / (16 n Z) = .6 times on average, here at most once. Of the n starts alone, 1 in 7 would count.
    """
    policy, generator = Knowing(), torch.Generator().manual_seed(0)
    z, square = 91**-0.5, 181**-0.5
    found, worth = [], []
    for _ in range(200):
        _, proposal = tilt(Scattered(), policy, steep, 100, generator, base=policy)
        worth.append(proposal.efficiency)
        found.append(math.exp(proposal.log_partition) / z)
    # All particles count, but for what five runs' means of the reward differ by chance; by the starts alone, 1 in 7.
    assert sum(worth) / 200 > 0.7
    spread = math.sqrt((square / z**2 - 1) / 1600)
    assert abs(sum(found) / 200 - 1) < 4 * spread / math.sqrt(200)
    # The sd of 200 values has a relative error of about 1 / sqrt(400); by the n starts alone it would be 4 times this.
    assert 0.8 < float(torch.tensor(found).std()) / spread < 1.2
