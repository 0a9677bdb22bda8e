"""Problems that are as they should be, however odd: every number equals the one that enumeration or recursion gives."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pirl
from pirl.errors import ConvergenceError, DivergenceError
from pirl.mdp import TabularMDP
from pirl.message_passing import log_partition, messages, occupancy, soft_policy
from tests import oracle
from tests.fuzz import truth
from tests.fuzz.cases import cases
from tests.fuzz.strategies import COSTS, MODERATE, Problem, demonstrations, episodes, problems, rewards

KINDS = {"causal": pirl.MaxCausalEntTrajectory, "trajectory": pirl.MaxEntTrajectory}


def size_of(mdp: TabularMDP, reward: Tensor, steps: int) -> float:
    """How large a value may be after so many steps."""
    return steps * (float(reward.detach().abs().max()) + 3.0)


def a_row_each(mdp: TabularMDP, reward: Tensor) -> Tensor:
    """Rewards ``[R, 1, S, A]``, whose rows stand left of the episodes."""
    return mdp.check_reward(reward.detach()).reshape(-1, 1, mdp.num_states, mdp.num_actions)


def near(found: Tensor, expected: Any, atol: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert bool(found.isfinite().all()), found
    torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)


def visits(
    problem: Problem, paths: list[oracle.Path], chances: list[float], discount: float = 1.0
) -> list[list[float]]:
    """Expected number of times that each pair counts."""
    total = [[0.0] * problem.actions for _ in range(problem.states)]
    for path, chance in zip(paths, chances, strict=True):
        for t, (s, a) in enumerate(path.visited):
            total[s][a] += chance * discount**t
    return total


@given(st.data())
@cases(15, 600)
def test_the_graphical_model_is_its_enumeration(data: st.DataObject) -> None:
    problem = data.draw(problems("finite"))
    mdp, steps = problem.build(), problem.options["horizon"]
    reward = data.draw(rewards(problem)).requires_grad_()
    paths = list(oracle.paths(mdp, steps))
    table = torch.stack([oracle.as_tensor(path, steps + 1) for path in paths])
    error = truth.tolerance(steps, size_of(mdp, reward, steps))
    log_z = log_partition(mdp, reward)
    (slope,) = torch.autograd.grad(log_z.sum(), reward)
    mu = occupancy(mdp, reward.detach(), "trajectory")
    near(slope, torch.autograd.grad(mdp.check_reward(reward), reward, mu)[0], steps * error)  # of r(s) too
    law = pirl.MaxEntTrajectory(mdp, a_row_each(mdp, reward))
    density = law.log_prob(table)
    near(law.log_prob_sum(table), density.sum(), len(paths) * error)
    policy = soft_policy(mdp, reward.detach(), "trajectory").reshape(-1, steps, *mdp.available.shape)
    for row, r in enumerate(truth.rows(mdp, reward.detach())):
        weights = [truth.log_weight(path, r) for path in paths]
        expected = truth.log_sum(weights)
        near(log_z.reshape(-1)[row], expected, error)
        near(density[row], [w - expected for w in weights], 2 * error)
        assert abs(math.fsum(density[row].exp().tolist()) - 1) < 2 * error
        chances = [math.exp(w - expected) for w in weights]
        near(mu.reshape(-1, *mdp.available.shape)[row], visits(problem, paths, chances), steps * 2 * error)
        log_policy = truth.Rules(problem, r, "trajectory").finite(steps)[1]
        near(policy[row].exp(), torch.tensor(log_policy[::-1], dtype=torch.float64).exp(), 2 * error)


@given(st.data())
@cases(15, 600)
def test_the_causal_reading_is_its_recursion(data: st.DataObject) -> None:
    problem = data.draw(problems("finite", discount=True))
    mdp, steps = problem.build(), problem.options["horizon"]
    reward = data.draw(rewards(problem)).requires_grad_()
    paths = list(oracle.paths(mdp, steps))
    table = torch.stack([oracle.as_tensor(path, steps + 1) for path in paths])
    error = truth.tolerance(steps, size_of(mdp, reward, steps))
    found = messages(mdp, reward, "causal")
    (slope,) = torch.autograd.grad((found.log_beta[..., 0, :] @ mdp.initial).sum(), reward)
    mu = occupancy(mdp, reward.detach(), "causal")
    near(slope, torch.autograd.grad(mdp.check_reward(reward), reward, mu)[0], steps * error)
    law = pirl.MaxCausalEntTrajectory(mdp, a_row_each(mdp, reward))
    density, choices = law.log_prob(table), law.choice_log_prob(table)
    near(law.log_prob_sum(table), density.sum(), len(paths) * error)
    policy = soft_policy(mdp, reward.detach(), "causal").reshape(-1, steps, *mdp.available.shape)
    for row, r in enumerate(truth.rows(mdp, reward.detach())):
        values, policies = truth.Rules(problem, r, "causal", mdp.discount).finite(steps)
        near(found.log_beta.reshape(-1, steps + 1, mdp.num_states)[row].detach(), values[::-1], error)
        near(policy[row].exp(), torch.tensor(policies[::-1], dtype=torch.float64).exp(), 2 * error)
        chosen = [math.fsum(policies[steps - t - 1][s][a] for t, (s, a) in enumerate(path.pairs)) for path in paths]
        prior = truth.log_prior(problem)
        chance = [math.log(path.probability) - math.fsum(prior[s][a] for s, a in path.pairs) for path in paths]
        near(choices[row], chosen, 2 * error)
        near(density[row], [c + x for c, x in zip(chosen, chance, strict=True)], 2 * error)
        assert abs(math.fsum(density[row].exp().tolist()) - 1) < 2 * error
        chances = density[row].exp().tolist()
        near(
            mu.reshape(-1, *mdp.available.shape)[row], visits(problem, paths, chances, mdp.discount), steps * 2 * error
        )


@pytest.mark.parametrize("reading", KINDS)
@given(data=st.data())
@cases(12, 400)
def test_ragged_demonstrations_are_sums_over_what_could_follow(reading: str, data: st.DataObject) -> None:
    """Cut anywhere, of subjects with rewards of their own, with horizons of their own, with starts that were set."""
    own = data.draw(st.booleans())
    problem = data.draw(problems("finite", discount=reading == "causal"))
    most = problem.options["horizon"]
    horizons = data.draw(st.lists(st.integers(-1, most), min_size=1, max_size=4)) if own else [-1]
    seen = []
    for horizon in horizons * (1 if own else data.draw(st.integers(1, 4))):
        episode = data.draw(episodes(problem, most if horizon < 0 else horizon, blank=True))
        episode.horizon, episode.subject = horizon, data.draw(st.integers(0, 1))
        seen.append(episode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demos = demonstrations(seen, horizons=[e.horizon for e in seen], subjects=[e.subject for e in seen])
    mdp = problem.build()
    demos.validate(mdp)
    subjects = 2
    reward = torch.stack([mdp.check_reward(data.draw(rewards(problem, batched=False))) for _ in range(subjects)])
    given_starts = all(e.states for e in seen) and data.draw(st.booleans())
    leaf = reward.clone().requires_grad_()
    law = KINDS[reading](
        mdp, leaf[demos.subjects], horizons=demos.horizons, starts=demos.starts if given_starts else None
    )
    found = law.log_prob(demos.as_tensor())
    error = truth.tolerance(most, size_of(mdp, reward, most))
    near(law.log_prob_sum(demos.as_tensor()).detach(), float(found.detach().sum()), len(seen) * error)
    (slope,) = torch.autograd.grad(law.log_prob_sum(demos.as_tensor()), leaf)
    assert bool(slope.isfinite().all())
    for i, episode in enumerate(seen):
        steps = most if episode.horizon < 0 else episode.horizon
        r = reward[episode.subject].tolist()
        paths = list(oracle.paths(mdp, steps)) if steps else []
        if not steps:  # nothing to decide: only where it starts is an outcome
            paths = [oracle.Path((), s, p, ()) for s, p in enumerate(truth.initial(problem)) if p > 0]
        if given_starts:
            paths = [p for p in paths if (p.pairs[0][0] if p.pairs else p.last) == episode.states[0]]
        if reading == "trajectory":
            weights = [truth.log_weight(path, r) for path in paths]
        else:
            policies = truth.Rules(problem, r, "causal", mdp.discount).finite(steps)[1]
            prior = truth.log_prior(problem)
            weights = [
                math.log(path.probability)
                + math.fsum(policies[steps - t - 1][s][a] - prior[s][a] for t, (s, a) in enumerate(path.pairs))
                for path in paths
            ]
        pairs = tuple(zip(episode.states, episode.actions, strict=False))
        last = episode.states[len(pairs)] if len(episode.states) > len(pairs) else None
        fits = [
            w
            for w, path in zip(weights, paths, strict=True)
            if path.pairs[: len(pairs)] == pairs
            and (last is None or (path.pairs[len(pairs)][0] if len(path.pairs) > len(pairs) else path.last) == last)
        ]
        near(found[i].detach(), truth.log_sum(fits) - truth.log_sum(weights), 4 * error)


@pytest.mark.parametrize("reading", KINDS)
@given(data=st.data())
@cases(10, 300)
def test_without_a_horizon_the_equation_holds_or_the_error_says_why_not(reading: str, data: st.DataObject) -> None:
    """Discounted (or stopping), and undiscounted until the end."""
    discounted = data.draw(st.booleans())
    problem = data.draw(problems("discounted" if discounted else "absorbing"))
    mdp = problem.build()
    stopping = "geometric" if discounted and reading == "trajectory" else None
    if stopping and mdp.discount == 0:
        mdp = mdp.replace(discount=0.5)
    cheap = problem.prior != "counting" and data.draw(st.booleans())
    reward = data.draw(rewards(problem, COSTS if cheap else None, batched=False)).requires_grad_()
    (r,) = truth.rows(mdp, reward.detach())
    moderate = float(reward.detach().abs().max()) <= max(map(abs, MODERATE))
    stop = 1 - mdp.discount if stopping else 0.0
    rules = truth.Rules(problem, r, reading, mdp.discount, stop)
    radius = spectral_radius(rules) if moderate else math.nan
    must = cheap or (discounted and reading == "causal") or radius < 1 - 1e-6
    try:
        found = messages(mdp, reward, reading, stopping=stopping)
    except (DivergenceError, ConvergenceError) as error:
        assert not must, error
        assert reading == "causal" or isinstance(error, DivergenceError) or not moderate, error
        return
    assert not (reading == "trajectory" and radius > 1 + 1e-6), "an infinite sum has a value"
    value = found.log_beta.detach()
    expected, policy = rules.step(value.tolist())
    size = float(value.abs().max()) + float(reward.detach().abs().max())
    near(value, expected, 1e3 * truth.EPS * (1 + size))
    if reading == "causal" and discounted:  # a contraction: so near to the equation is so near to its solution
        far, horizon = [0.0] * problem.states, math.ceil(math.log(1e-16) / math.log(mdp.discount or 1e-16))
        if horizon < 500:
            far = rules.finite(horizon)[0][-1]
            near(value, far, 1e3 * truth.EPS * (1 + size) / (1 - mdp.discount))
    error = 1e4 * truth.EPS * (1 + size)
    near(
        soft_policy(mdp, reward.detach(), reading, stopping=stopping).exp(),
        torch.tensor(policy, dtype=torch.float64).exp(),
        error,
    )
    total = found.log_partition if reading == "trajectory" else found.log_beta @ mdp.initial
    (slope,) = torch.autograd.grad(total.sum(), reward)
    mu = occupancy(mdp, reward.detach(), reading, stopping=stopping)
    assert bool(mu.isfinite().all())
    scale = 1 + float(mu.sum())
    near(slope, torch.autograd.grad(mdp.check_reward(reward), reward, mu)[0], error * scale**2)
    steps = data.draw(st.integers(1, 3))
    while steps > 1 and problem.number_of_paths(steps) > 100:
        steps -= 1
    paths = list(oracle.paths(mdp, steps, stop=stop))
    table = torch.stack([oracle.as_tensor(path, steps + 1) for path in paths])
    law = KINDS[reading](mdp, reward.detach(), **({"stopping": stopping} if stopping else {}))
    density = law.log_prob(table)
    assert bool(density.isfinite().all())
    if not stopping:  # where stopping may come, an episode without its last state has stopped or was cut
        assert abs(math.fsum(density.exp().tolist()) - 1) < 10 * steps * error


def spectral_radius(rules: truth.Rules) -> float:
    """Of the weights p(a|s) e^r P that a path collects between states where it does not end."""
    problem = rules.problem
    matrix = np.zeros((problem.states, problem.states))
    for s in range(problem.states):
        if not problem.ends(s):
            for a in problem.acts(s):
                weight = math.exp(rules.prior[s][a] + rules.reward[s][a]) * (1 - rules.stop)
                matrix[s] += weight * np.array(problem.table[s][a])
    transient = [s for s in range(problem.states) if not problem.ends(s)]
    if not transient:
        return 0.0
    return float(np.abs(np.linalg.eigvals(matrix[np.ix_(transient, transient)])).max())


@pytest.mark.parametrize("reading", KINDS)
@given(data=st.data())
@cases(3, 80)
def test_long_horizons_and_large_rewards_stay_exact(reading: str, data: st.DataObject) -> None:
    problem = data.draw(problems("finite", discount=reading == "causal", paths=None))
    problem.options["horizon"] = steps = data.draw(st.sampled_from([1, 17, 100, 300]))
    mdp, reward = problem.build(), data.draw(rewards(problem, batched=False)).requires_grad_()
    (r,) = truth.rows(mdp, reward.detach())
    values = torch.tensor(truth.Rules(problem, r, reading, mdp.discount).finite(steps)[0], dtype=torch.float64)
    error = truth.tolerance(steps, size_of(mdp, reward, steps))
    found = messages(mdp, reward, reading)
    near(found.log_beta.detach(), values.flip(0), error)
    law = KINDS[reading](mdp, reward)
    demos = law.sample((3,))
    assert bool(law.log_prob(demos).isfinite().all())
    (slope,) = torch.autograd.grad(law.log_prob_sum(demos), reward)
    assert bool(slope.isfinite().all())


@given(st.data())
@cases(10, 300)
def test_plans_are_their_recursion(data: st.DataObject) -> None:
    problem = data.draw(problems(discount=True))
    mdp, reward = problem.build(), data.draw(rewards(problem, batched=False))
    (r,) = truth.rows(mdp, reward)
    rules = truth.Rules(problem, r, "causal", mdp.discount)
    rules.prior = [[0.0 if p > -math.inf else p for p in row] for row in rules.prior]
    try:
        plan = pirl.optimal_policy(mdp, reward)
    except (DivergenceError, ConvergenceError):
        assert mdp.horizon is None and mdp.discount == 1 and bool((reward > 0).any())
        return
    assert bool(plan.value.isfinite().all())
    assert bool((plan.policy.sum(-1) - 1).abs().max() < 1e-12)
    if mdp.horizon is None:
        value = plan.value.tolist()
        best = [max(row) for row in rules.q(value)]
        near(plan.value, best, 1e3 * truth.EPS * (1 + max(map(abs, value)) + float(reward.abs().max())))
    else:
        values = [[0.0] * problem.states]
        for _ in range(mdp.horizon):
            values.append([max(row) for row in rules.q(values[-1])])
        expected = values[:0:-1] if plan.value.shape[0] == mdp.horizon else values[::-1]
        near(plan.value, expected, truth.tolerance(mdp.horizon, size_of(mdp, reward, mdp.horizon)))
    own = pirl.policy_value(mdp, plan.policy, reward)
    near(own, plan.value, 1e4 * truth.EPS * (1 + float(plan.value.abs().max()) + float(reward.abs().max())) * 100)
