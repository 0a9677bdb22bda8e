"""Estimators of log Z against problems where it is known: first-order theory, zero variance, bounds, gates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pirl.envs import random_mdp
from pirl.errors import OptionError, PartitionError
from pirl.message_passing import messages
from pirl.partition import (
    Particles,
    PartitionEstimate,
    importance,
    log_mean_exp,
    mixture_log_density,
    multilevel,
    require_trusted,
    sandwich,
    smc,
    trusted_k,
    untrusted,
)
from pirl.partition.gates import check_log_weights, pareto_k

OUTCOMES = 6


def finite_problem(seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A proposal over a few outcomes, their log weights, and the exact log Z."""
    generator = torch.Generator().manual_seed(seed)
    proposal = torch.rand(OUTCOMES, generator=generator, dtype=torch.float64).softmax(0)
    log_weight = spread * torch.randn(OUTCOMES, generator=generator, dtype=torch.float64)
    return proposal, log_weight, (proposal.log() + log_weight).logsumexp(0)


def drawn(proposal: Tensor, log_weight: Tensor, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(proposal, math.prod(shape), replacement=True, generator=generator)
    return log_weight[index].reshape(shape)


@pytest.mark.parametrize("num_samples", [32, 128])
def test_bias_and_variance_follow_first_order_theory(num_samples: int) -> None:
    proposal, log_weight, log_z = finite_problem()
    relative = (log_weight - log_z).exp() - 1
    second, third = (proposal * relative**2).sum(), (proposal * relative**3).sum()
    replicates = 40_000
    values = log_mean_exp(drawn(proposal, log_weight, replicates, num_samples))
    # The next terms of the expansion of E log(1 + e) in 1/N bound what the first leaves out.
    rest = float((third / 3).abs() + 3 * second**2 / 4) / num_samples**2
    bias, error = float(values.mean() - log_z), float(values.std()) / math.sqrt(replicates)
    assert abs(bias + float(second) / (2 * num_samples)) < 4 * error + 2 * rest
    assert abs(bias) > 4 * error  # so that a bias of the wrong sign or size would be seen
    # Relative standard error of a variance, for a kurtosis of up to 6; and terms in 1/N.
    chance = 4 * math.sqrt(5 / replicates)
    theory = float(second) / num_samples
    assert abs(float(values.var()) / theory - 1) < chance + 6 * rest / theory


def test_standard_error_is_the_spread_of_replicates() -> None:
    proposal, log_weight, _ = finite_problem()
    estimate = importance(drawn(proposal, log_weight, 2_000, 400))
    spread = estimate.log_partition.std()
    assert float(estimate.standard_error.mean() / spread) == pytest.approx(1, abs=4 / math.sqrt(2 * 2_000) + 2 / 400)


def test_gradient_is_the_average_under_normalised_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    offset = torch.randn(50, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    log_weights = weights @ features.mT + offset
    (gradient,) = torch.autograd.grad(importance(log_weights).log_partition.sum(), weights)
    torch.testing.assert_close(gradient, (log_weights.softmax(-1) @ features).detach(), rtol=0, atol=1e-10)
    each = torch.func.vmap(torch.func.grad(lambda w: log_mean_exp(w @ features.mT + offset)))(weights.detach())
    torch.testing.assert_close(each, gradient, rtol=0, atol=1e-12)


def test_constant_weights_have_no_error() -> None:
    estimate = importance(torch.full((3, 40), 2.0, dtype=torch.float64))
    torch.testing.assert_close(estimate.log_partition, torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(estimate.ess, torch.full((3,), 40.0, dtype=torch.float64))
    assert bool((estimate.standard_error < 1e-7).all())
    assert bool((estimate.pareto_k == -torch.inf).all())


def test_a_mixture_weighs_every_outcome_once() -> None:
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(OUTCOMES, generator=generator, dtype=torch.float64)
    proposals = torch.randn(3, OUTCOMES, generator=generator, dtype=torch.float64).log_softmax(-1)
    counts = torch.tensor([5, 1, 10])
    log_q = mixture_log_density(proposals, counts)
    by_hand = ((counts / 16.0).double().unsqueeze(1) * proposals.exp()).sum(0).log()
    torch.testing.assert_close(log_q, by_hand, rtol=0, atol=1e-12)
    # Expectation of the mean weight over the samples of all proposals: sum_k n_k/N sum_tau q_k w = sum_tau exp target.
    mean = ((counts / 16.0).double().unsqueeze(1) * proposals.exp() * (target - log_q).exp()).sum()
    torch.testing.assert_close(mean.log(), target.logsumexp(0), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- multilevel


def test_multilevel_is_unbiased_where_plain_is_not() -> None:
    proposal, log_weight, log_z = finite_problem(seed=3)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return log_weight[torch.multinomial(proposal, count, replacement=True, generator=generator)]

    estimate = multilevel(draw, 10_000, generator=generator)
    assert abs(float(estimate.log_partition - log_z)) < 4 * float(estimate.standard_error)
    plain = log_mean_exp(draw(2 * 10_000).reshape(10_000, 2)).mean()
    assert float(log_z - plain) > 8 * float(estimate.standard_error)  # what the corrections took away


def test_multilevel_refuses_heavy_tails() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:  # Pareto weights of tail index 0.8
        return -0.8 * torch.rand(count, generator=generator, dtype=torch.float64).log()

    with pytest.raises(PartitionError, match=r"k-hat 0\.\d+.* only below 0\.4"):
        multilevel(draw, 2_000, generator=generator)


def in_lumps(generator: torch.Generator, size: int) -> Tensor:
    """Weights from 1 to 2, of which most of the largest few hundred are 1.5, to a few parts in ten thousand."""
    weights = 1 + 0.5 * torch.rand(size, generator=generator, dtype=torch.float64)
    weights[:300] = 1.5 + 1e-4 * torch.rand(300, generator=generator, dtype=torch.float64)
    weights[300:400] = 1.5 + 0.5 * torch.rand(100, generator=generator, dtype=torch.float64)
    return weights.log()


def test_lumps_of_weights_are_no_heavy_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        weights = in_lumps(generator, 16_000)  # of which 379 are the tail
        # The tail's largest weight is 2, its smallest 1.5.
        assert float(pareto_k(weights)) < math.log(2 / 1.5)


@pytest.mark.parametrize("index", [0.3, 0.7, 1.0])
def test_heavy_tails_are_found(index: float) -> None:
    """Of Pareto weights, whose index is known: the fit of M tail weights has a standard error of (1 + k) / sqrt(M)."""
    generator, size, tries = torch.Generator().manual_seed(0), 10_000, 20
    weights = -index * torch.rand(tries, size, generator=generator, dtype=torch.float64).log()
    found, error = pareto_k(weights), (1 + index) / math.sqrt(3 * math.sqrt(size))
    # The smaller of two estimates, the other one's error smaller, is lower by less than one error.
    assert index - error - 4 * error / math.sqrt(tries) < float(found.mean()) < index + 4 * error / math.sqrt(tries)


@pytest.mark.parametrize("index", [1.0, 1.5])
def test_heavy_parts_of_mixtures_are_found(index: float) -> None:
    """One sample in a hundred has a heavy tail, beside a lump of weights between .9 and 1: no mean, or just none."""
    generator, size = torch.Generator().manual_seed(0), 10_000
    for _ in range(20):
        uniform = torch.rand(2, size, generator=generator, dtype=torch.float64)
        heavy = torch.arange(size) < 100
        weights = torch.where(heavy, -index * uniform[0].log(), (0.9 + 0.1 * uniform[1]).log())
        # Hill's estimate of the fifty or so largest has an error of k / 7: four of them below is still refused at 1.5;
        # of an index of 1, two are.
        assert float(pareto_k(weights)) > (0.7 if index > 1 else 0.5)


# ------------------------------------------------------------------------------------------------------- particles


class Chain:
    """A small random problem whose messages are exact, as :func:`smc` wants it."""

    def __init__(self, horizon: int = 5, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.mdp = random_mdp(4, 3, discount=1.0, horizon=horizon, seed=seed)
        table = self.mdp.transition.to_dense().reshape(4, 3, 4)
        self.reward = torch.randn(4, 3, generator=self.generator, dtype=torch.float64, requires_grad=True)
        self.horizon = horizon
        found = messages(self.mdp, self.reward.detach())
        self.log_z = found.log_partition
        self.beta = found.log_beta[:-1]  # [T, S]
        self.occupancy = found.mu.sum(-3)
        self.table = table

    def choose(self, log_p: Tensor) -> Tensor:
        flat = log_p.softmax(-1).reshape(-1, log_p.shape[-1])
        return torch.multinomial(flat, 1, generator=self.generator).reshape(log_p.shape[:-1])

    def particles(self, exact: bool) -> Particles:
        """Exact: tilted laws and the exact twist. Else the true laws, and no twist."""
        start, prior, table = self.mdp.initial.log(), self.mdp.log_prior, self.table.log()
        ahead = [*self.beta, torch.zeros(4, dtype=torch.float64)]

        def pick(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
            log_q = log_q.log_softmax(-1)
            index = self.choose(log_q)
            ratio = (log_p - log_q).gather(-1, index.unsqueeze(-1)).squeeze(-1)
            return index, ratio

        def reset(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
            log_p = start.expand(*shape, 4)
            return pick(log_p, log_p + exact * ahead[0])

        def propose(t: int, states: Tensor) -> tuple[Tensor, Tensor]:
            log_p = prior[states]
            gain = self.reward.detach() + (table + ahead[t + 1]).logsumexp(-1)
            return pick(log_p, log_p + exact * gain[states])

        def step(t: int, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
            log_p = table[states, actions]
            return pick(log_p, log_p + exact * ahead[t + 1])

        return Particles(
            reset,
            propose,
            step,
            lambda t, states, actions: self.reward[states, actions],
            (lambda t, states: ahead[t][states]) if exact else None,
        )


def test_exact_twist_and_tilted_draws_have_no_variance() -> None:
    chain = Chain()
    estimate = smc(
        chain.particles(exact=True), num_steps=chain.horizon, num_particles=7, num_runs=5, generator=chain.generator
    )
    torch.testing.assert_close(estimate.log_partition.detach(), chain.log_z, rtol=1e-12, atol=1e-12)
    assert float(estimate.standard_error) < 1e-7
    assert float(estimate.ess) == pytest.approx(35, rel=1e-9)


def test_particles_find_log_z_and_its_gradient() -> None:
    chain = Chain()
    estimate = smc(
        chain.particles(exact=False), num_steps=chain.horizon, num_particles=2_000, num_runs=30,
        generator=chain.generator,
    )  # fmt: skip
    assert float(estimate.standard_error) > 0
    assert abs(float(estimate.log_partition.detach() - chain.log_z)) < 4 * float(estimate.standard_error)
    (gradient,) = torch.autograd.grad(estimate.log_partition, chain.reward)
    # Counts of a pair lie between 0 and T: their mean under the weights has an error of at most T/2 / sqrt(ESS).
    assert float((gradient - chain.occupancy).abs().max()) < 4 * chain.horizon / 2 / math.sqrt(float(estimate.ess))
    torch.testing.assert_close(gradient.sum(), torch.tensor(float(chain.horizon), dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------- bounds


def test_bounds_hold_log_z_between_them_and_close() -> None:
    proposal, log_weight, log_z = finite_problem(seed=5)
    target = (proposal.log() + log_weight).softmax(0)
    gaps = []
    for block in (4, 64):
        count = 4_000
        bounds = sandwich(drawn(proposal, log_weight, count * block), drawn(target, log_weight, count, seed=1), block)
        assert float(bounds.lower - log_z) < 4 * float(bounds.lower_error)
        assert float(bounds.upper - log_z) > -4 * float(bounds.upper_error)
        gaps.append(float(bounds.upper - bounds.lower))
    assert gaps[0] > 8 * gaps[1] > 0  # both are O(1 / block): 16 times smaller


# ------------------------------------------------------------------------------------------------------- gates


def estimated(ess: list[float], khat: list[float], num_samples: int = 10_000) -> PartitionEstimate:
    zero = torch.zeros(len(ess), dtype=torch.float64)
    return PartitionEstimate(zero, zero, zero + torch.tensor(ess), zero + torch.tensor(khat), num_samples)


def test_gates() -> None:
    good = estimated([1_000.0] * 40, [0.3] * 40)
    assert untrusted(good, 10) is None
    require_trusted(good, 10)
    reason = untrusted(good, 11)
    assert reason is not None and "1000 effective samples of 10000 for 11 demonstrations (needed: 1100)" in reason
    with pytest.raises(PartitionError, match=r"k-hat of the weights is 0\.72, a heavy tail \(at most 0\.70 for"):
        require_trusted(estimated([1_000.0] * 40, [0.72] * 40), 10)
    assert untrusted(estimated([1_000.0] * 39 + [10.0], [0.3] * 40), 10) is None  # one draw in forty
    assert untrusted(estimated([1_000.0] * 30 + [10.0] * 10, [0.3] * 40), 10) is not None
    assert trusted_k(100) == pytest.approx(0.5) and trusted_k(10**6) == 0.7
    assert untrusted(estimated([1_000.0] * 40, [0.3] * 30 + [0.9] * 10), 10) is not None  # the heavy ones tell
    assert untrusted(estimated([math.inf], [math.nan], 10), 1) is not None  # too few for a tail
    assert untrusted(estimated([math.nan], [0.3]), 1) is not None  # nobody knows how many


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: importance(torch.tensor([0.0, math.nan])), "sample 1 is NaN"),
        (lambda: importance(torch.tensor([math.inf, 0.0])), "sample 0 is NaN or"),
        (lambda: importance(torch.full((3,), -math.inf)), "all weights are 0"),
        (lambda: mixture_log_density(torch.zeros(2, 3), torch.tensor([1, 1, 1])), "do not fit counts"),
        (lambda: mixture_log_density(torch.tensor([[0.0, -math.inf]]), torch.tensor([2])), "sample 1 has density 0"),
        (lambda: mixture_log_density(torch.tensor([[0.0, math.nan]]), torch.tensor([2])), "sample 1 under proposal 0"),
        (lambda: sandwich(torch.zeros(3), torch.zeros(1)), "make no two blocks"),
    ],
)
def test_bad_input_is_named(call: object, says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        call()  # type: ignore[operator]


def test_a_flat_tail_is_no_heavy_tail() -> None:
    # Trajectories of a finite world often have equal weights; whatever part of the tail they fill.
    for size in (33, 410):
        for top in range(1, 70):
            if top < size:
                weights = torch.cat([torch.full((top,), 2.0), torch.linspace(-3.0, 0.0, size - top)]).double()
                khat = float(importance(weights).pareto_k)
                assert khat == -math.inf or math.isfinite(khat)


def test_weights_of_another_form_are_refused() -> None:
    for wrong in (torch.tensor(0.0), torch.zeros(0), torch.zeros(3, 0)):
        with pytest.raises(PartitionError, match=r"\[\*batch, N\]"):
            check_log_weights(wrong)


def test_counts_of_a_multilevel_estimator_are_checked() -> None:
    with pytest.raises(OptionError, match="num_replicates is 0"):
        multilevel(lambda n: torch.zeros(n), 0)
    with pytest.raises(OptionError, match="num_replicates is 1, .* at least 2"):
        multilevel(lambda n: torch.zeros(n), 1)
    with pytest.raises(PartitionError, match="one half of a replicate"):
        multilevel(lambda n: torch.where(torch.arange(n) % 4 < 2, -torch.inf, 0.0), 50)


def test_particles_that_share_ancestors_are_not_counted_twice() -> None:
    """Resampled often, their final weights are even, and say nothing of how far Z-hat is off."""
    walk = Particles(
        reset=lambda shape: (torch.zeros(shape), torch.zeros(shape)),
        propose=lambda t, states: (torch.randn_like(states), torch.zeros_like(states)),
        step=lambda t, states, actions: (actions, torch.zeros_like(states)),
        reward=lambda t, states, actions: 1.5 * actions,
    )
    torch.manual_seed(0)
    found = smc(walk, num_steps=30, num_particles=50, num_runs=64)
    assert found.ess <= 1 / found.standard_error**2 * (1 + 1e-5)
    assert found.ess < 20  # their final weights alone say a hundred
    single = smc(walk, num_steps=3, num_particles=2000, num_runs=1)
    assert single.standard_error.isnan() and "0 effective samples" in str(untrusted(single, 1))
    assert importance(torch.zeros(2, 1)).standard_error.isnan().all()
