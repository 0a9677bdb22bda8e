"""Planted faults: each breaks the library on purpose, and a law that is tested elsewhere sees it.

``planted.FAULTS`` says what is broken; ``CHECKS`` which law must fail then, and holds otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import oracle
import planted
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import test_checkpoint as runs
import test_chees as chees_laws
import test_distributions as densities
import test_message_passing as messages
import test_potential as potentials
import test_smc as smc_laws
import test_soft_values as values
import torch

from pirl.distributions import MaxCausalEntTrajectory, MaxEntTrajectory
from pirl.errors import PirlError
from pirl.infer.potential import Potential
from pirl.trajectories import Trajectories

Check = Callable[[], Any]


@contextmanager
def inside_an_engine(validated: bool = False) -> Iterator[None]:
    """What the fixtures of some laws do: double precision, and a model that is trusted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(validated):
            yield
    finally:
        torch.set_default_dtype(before)


def trusted(law: Check) -> Check:
    """A law as it is called inside an engine."""

    def check() -> None:
        with inside_an_engine():
            law()

    return check


# ------------------------------------------------------------------------------------------------- laws for this file


def likelihood_equals_enumeration() -> None:
    """Five whole episodes: sum of log p(tau) + sum r, minus five times log Z of the oracle; summed, and one by one."""
    mdp, reward = densities.make("stochastic")
    assert mdp.horizon is not None
    chosen = list(oracle.paths(mdp, mdp.horizon))[::50][:5]
    value = torch.stack([oracle.as_tensor(path, mdp.horizon + 1) for path in chosen])
    demos = Trajectories(value[..., 0], value[:, :-1, 1])
    expected = math.fsum(math.log(path.probability) + oracle.reward_sum(path, reward) for path in chosen)
    expected -= len(chosen) * oracle.log_partition(mdp, reward)
    law = MaxEntTrajectory(mdp, reward)
    assert math.isclose(float(law.log_prob_sum(demos.as_tensor())), expected, rel_tol=1e-12)
    assert math.isclose(float(law.log_prob(demos.as_tensor()).sum()), expected, rel_tol=1e-12)


def gradient_equals_enumeration() -> None:
    """The slope of log Z is what the oracle visits on average."""
    mdp, reward = densities.make("stochastic")
    assert mdp.horizon is not None
    visits = torch.zeros_like(reward)
    for path in oracle.paths(mdp, mdp.horizon):
        for state, action in path.visited:
            visits[state, action] += path.probability * math.exp(oracle.reward_sum(path, reward))
    reward.requires_grad_()
    law = MaxEntTrajectory(mdp, reward)
    chosen = next(oracle.paths(mdp, mdp.horizon))
    (slope,) = torch.autograd.grad(law.log_prob_sum(oracle.as_tensor(chosen, mdp.horizon + 1)[None]), reward)
    for state, action in chosen.visited:
        slope[state, action] -= 1
    expected = -visits / math.exp(oracle.log_partition(mdp, reward.detach()))
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-10)


def prior_draws_follow_the_prior() -> None:
    """Kolmogorov and Smirnov's test of what chains and populations start from."""
    with inside_an_engine():
        potential = Potential(lambda: pyro.sample("x", dist.Gamma(3.0, 2.0)))
        pyro.set_rng_seed(1)
        draws = potential.flat_prior_draws(2000)[:, 0].exp().numpy()
    assert scipy.stats.kstest(draws, scipy.stats.gamma(3.0, scale=0.5).cdf).pvalue > 1e-4


def nuts_is_frozen() -> None:
    """After warm-up each chain has one step size."""
    sizes = runs.run("nuts").sample_stats["step_size"].values
    assert (sizes == sizes[:, :1]).all()


def chains_differ() -> None:
    """Two chains of one seed have nothing in common."""
    draws = runs.run("nuts").posterior["s"].values
    assert not np.isin(draws[0], draws[1]).any()


def steps_differ() -> None:
    """Two steps of one population have momenta of their own."""
    sampler = chees_laws.chees(0)
    first = sampler.move(torch.full((16,), 1e-3), 1, 0).velocity
    second = sampler.move(torch.full((16,), 1e-3), 1, 1).velocity
    assert float((first - second).abs().min()) > 1e-6


def conjugate(**options: Any) -> Any:
    """A normal mean of prior N(0, 1), seen once, at 1, with sd 1/2: the posterior is N(0.8, 0.2)."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.tensor(1.0, dtype=torch.float64))

    return smc_laws.fit(model, engine="smc", num_chains=4, num_samples=300, seed=0, **smc_laws.FEW, **options)


def posterior_of_a_conjugate_model() -> None:
    """Particles that hardly move are where their weights have put them: five standard errors of a mean."""
    result = conjugate(max_moves=1, max_leapfrogs=1, target_ess=0.5)
    assert abs(float(result.posterior["x"].mean()) - 0.8) < 5 * math.sqrt(0.2 / 300)


def evidence_of_a_conjugate_model() -> None:
    """Against its closed form, within four standard errors and a hundredth."""
    result = conjugate()
    expected = scipy.stats.norm.logpdf(1.0, 0.0, math.sqrt(1.25))
    assert abs(result.attrs["log_evidence"] - expected) < 4 * result.attrs["log_evidence_se"] + 0.01


CHECKS: dict[str, Check] = {
    "the horizon is one decision too short": lambda: messages.test_log_partition_equals_enumeration("stochastic"),
    "the gradient of soft values has the other sign": gradient_equals_enumeration,
    "visits are rolled forward with the row of another pair": gradient_equals_enumeration,
    "chance is not tilted when visits are rolled forward": gradient_equals_enumeration,
    "the fixed point is not differentiated, only its last backup": (
        lambda: values.test_values_and_gradients_equal_the_unrolled_recursion("discounted causal")
    ),
    "value iteration stops early": lambda: values.test_fixed_point_meets_its_residual("discounted causal"),
    "rewards of a batch get each other's values": (
        lambda: values.test_batched_equals_looped_equals_vmapped("finite causal")
    ),
    "the action mask is ignored": lambda: densities.test_causal_reading_equals_the_definition("masked", 1.0),
    "the base measure is ignored": lambda: messages.test_log_partition_equals_enumeration("weighted"),
    "the discount is ignored": lambda: messages.test_causal_policy_equals_the_definition("stochastic", 0.7),
    "terminal states do not end an episode": lambda: messages.test_log_partition_equals_enumeration("terminal"),
    "Z^(M-1) instead of Z^M": likelihood_equals_enumeration,
    "the value of the state after a truncated episode is left out": (
        lambda: densities.test_trajectory_reading_equals_enumeration("stochastic")
    ),
    "episodes without a last state are taken for whole ones": (
        lambda: densities.test_density_sums_to_one_over_all_trajectories(MaxEntTrajectory, "stochastic")
    ),
    "the initial distribution is ignored in Z": likelihood_equals_enumeration,
    "the causal reading in place of the trajectory reading": likelihood_equals_enumeration,
    "every decision is taken as the last one": (
        lambda: densities.test_samples_follow_the_density(MaxCausalEntTrajectory, "stochastic")
    ),
    "next states are drawn from the true law where luck obeys": (
        lambda: densities.test_samples_follow_the_density(MaxEntTrajectory, "stochastic")
    ),
    "counts of changed demonstrations are remembered": (
        densities.test_counts_are_remembered_by_identity_and_forgotten_after_a_change
    ),
    "the log Jacobian is dropped": trusted(
        lambda: potentials.test_potential_and_gradient_equal_those_of_pyro(potentials.schools)
    ),
    "the prior counts twice": trusted(
        lambda: potentials.test_potential_and_gradient_equal_those_of_pyro(potentials.schools)
    ),
    "chains start from a wider prior": prior_draws_follow_the_prior,
    "the gradient of many chains has the other sign": trusted(
        lambda: chees_laws.test_batched_potential_is_the_looped_one(width=3, record=False)
    ),
    "the temperature is ignored": trusted(
        lambda: chees_laws.test_batched_potential_is_the_looped_one(width=3, record=False)
    ),
    "the metric is not transposed when it pulls gradients": trusted(
        chees_laws.test_energy_error_is_of_second_order_and_decides_acceptance
    ),
    "the many chains adapt for ever": trusted(chees_laws.test_everything_is_frozen_after_warmup),
    "the No-U-Turn sampler adapts for ever": nuts_is_frozen,
    "all chains have the same random numbers": chains_differ,
    "every step has the same random numbers": trusted(steps_differ),
    "the evidence sums weights, and does not average them": evidence_of_a_conjugate_model,
    "particles are resampled without their weights": posterior_of_a_conjugate_model,
    "a checkpoint forgets what the step size has learnt": trusted(
        chees_laws.test_a_learner_goes_on_from_what_was_saved
    ),
}
BY_RANKS = {
    "every proposal is accepted",
    "the momentum depends on where a chain is",
    "the momentum is wider than its law",
    "the kinetic energy is left out of the acceptance",
}
"""Seen by the rank tests of ``test_exact_kernels.py``."""


def test_each_fault_has_a_check() -> None:
    assert set(planted.FAULTS) == set(CHECKS) | BY_RANKS


@pytest.mark.parametrize("name", CHECKS)
def test_the_fault_is_seen(name: str) -> None:
    CHECKS[name]()
    assert isinstance(planted.under(name, CHECKS[name]), (AssertionError, PirlError))
