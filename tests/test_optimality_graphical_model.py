"""The graphical model of control as inference, enumerated by Pyro, against messages and against every trajectory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate, infer_discrete
from scipy import stats
from torch import Tensor

import pirl
from models.optimality_graphical_model import (
    Optimality,
    below_zero,
    graphical_model,
    load,
    log_evidence,
    model,
    reference,
)
from pirl.datasets import simulate
from pirl.errors import DiscountError, HorizonError, ImpossibleTransitionError, InvalidMDPError, InvalidRewardError
from tests import oracle

F64 = torch.float64


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """As `pirl.fit` does for the length of a run."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def masked(mdp: pirl.TabularMDP) -> pirl.TabularMDP:
    """One action is missing in the first state, and whatever the table says of it is void."""
    available = mdp.available.clone()
    available[0, 1] = False
    transition = mdp.transition.clone()
    transition[0, 1] = 0.0
    return mdp.replace(available=available, transition=transition)


def tilted(mdp: pirl.TabularMDP) -> pirl.TabularMDP:
    """A base measure that is not uniform, and a start that is certain."""
    weight = torch.rand(mdp.available.shape, generator=torch.Generator().manual_seed(4))
    return mdp.replace(action_prior=weight / weight.sum(-1, keepdim=True), initial=1)


def problem(kind: str, **options: Any) -> tuple[pirl.TabularMDP, Tensor]:
    """A small problem, and a reward of both signs (of negative sign only, where episodes end early)."""
    options = {"states": 3, "actions": 2, "horizon": 4, "stochastic": "deterministic" not in kind, **options}
    mdp = oracle.random_mdp(11, **options)
    reward = 2 * torch.randn(mdp.available.shape, generator=torch.Generator().manual_seed(5))
    if "tilted" in kind:
        mdp = tilted(mdp)
    if "terminal" in kind:
        mdp = mdp.replace(terminal=[2])
        reward = -reward.abs()
        reward[0, 0] = 0.0  # good for sure
    if "masked" in kind:
        mdp = masked(mdp)
        reward[0, 1] = 7.0  # of no account
    return mdp, reward


KINDS = [
    "stochastic", "deterministic", "masked", "deterministic tilted", "terminal", "deterministic terminal",
    "masked terminal",
]  # fmt: skip


def pyro_elbo(mdp: pirl.TabularMDP, reward: Tensor) -> float:
    """Minus log Z as Pyro's own ELBO finds it, which is exact where every latent variable is enumerated."""
    reward, best = below_zero(mdp, reward)
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(config_enumerate(graphical_model), lambda *_: None, mdp, reward)
    assert mdp.horizon is not None
    return loss - mdp.horizon * float(best)


# ------------------------------------------------------------------------------------------------------ the evidence


@pytest.mark.parametrize("kind", KINDS)
def test_the_evidence_is_the_partition_function(kind: str) -> None:
    mdp, reward = problem(kind)
    found = float(log_evidence(mdp, reward))
    assert found == pytest.approx(oracle.log_partition(mdp, reward), abs=1e-10)
    assert found == pytest.approx(float(pirl.log_partition(mdp, reward)), abs=1e-10)
    assert found == pytest.approx(-pyro_elbo(mdp, reward), abs=1e-10)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("ends", [False, True])
def test_the_evidence_of_the_largest_picture(stochastic: bool, ends: bool) -> None:
    kind = ("" if stochastic else "deterministic ") + ("terminal" if ends else "")
    mdp, reward = problem(kind, states=4, actions=3, horizon=6)
    assert float(log_evidence(mdp, reward)) == pytest.approx(float(pirl.log_partition(mdp, reward)), abs=1e-10)
    assert -pyro_elbo(mdp, reward) == pytest.approx(float(pirl.log_partition(mdp, reward)), abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_of_the_evidence_is_the_occupancy(kind: str) -> None:
    """Also at the best pair, whose O is 1 for sure, and along steps of probability 0."""
    mdp, reward = problem(kind)
    reward.requires_grad_()
    (slope,) = torch.autograd.grad(log_evidence(mdp, reward), reward)
    torch.testing.assert_close(slope, pirl.occupancy(mdp, reward.detach(), "trajectory"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_rewards_whose_probability_rounds_to_nothing(size: float) -> None:
    mdp, reward = problem("terminal")
    reward = size * (reward - 1)
    assert float(log_evidence(mdp, reward)) == pytest.approx(float(pirl.log_partition(mdp, reward)), rel=1e-12)


def test_a_reward_of_both_signs_is_no_probability_where_episodes_end_early() -> None:
    mdp, reward = problem("terminal")
    with pytest.raises(InvalidRewardError, match=r"largest reward is 0\.5: .* so r <= 0"):
        log_evidence(mdp, reward + 0.5)
    # Taking it off and giving T times as much back would be another model, and not by a little.
    assert mdp.horizon is not None
    shifted = float(log_evidence(mdp, reward)) + mdp.horizon * 0.5
    assert abs(shifted - float(pirl.log_partition(mdp, reward + 0.5))) > 0.1
    assert below_zero(mdp, reward)[1] == 0


def test_optimality_is_a_bernoulli_variable() -> None:
    reward = torch.tensor([-0.1, -3.0, 0.0])
    optimality, bernoulli = Optimality(reward), dist.Bernoulli(reward.exp())
    for value in (0.0, 1.0):
        observed = torch.tensor(value)
        torch.testing.assert_close(optimality.log_prob(observed), bernoulli.log_prob(observed))
    assert optimality.expand(torch.Size((2, 3))).sample().shape == (2, 3)


def test_the_evidence_is_the_chance_that_aimless_actions_are_all_good() -> None:
    """Z = p(O = 1), by simulation: four standard deviations of a binomial frequency."""
    mdp, reward = problem("stochastic", horizon=3)
    reward, _ = below_zero(mdp, reward / 4)
    draws = 20_000
    with pyro.plate("draw", draws):
        trace = poutine.trace(poutine.uncondition(graphical_model)).get_trace(mdp, reward)
    good = torch.stack([trace.nodes[f"O_{t}"]["value"] for t in (1, 2, 3)]).prod(0).mean()
    chance = float(log_evidence(mdp, reward).exp())
    assert 0.05 < chance < 0.95
    assert abs(float(good) - chance) < 4 * math.sqrt(chance * (1 - chance) / draws)


# ----------------------------------------------------------------------------------------------------- the posterior


@pytest.mark.parametrize("kind", ["stochastic", "deterministic", "masked", "terminal"])
def test_the_posterior_of_states_and_actions_is_what_messages_say(kind: str) -> None:
    """mu_t(s,a) = p(s_t, a_t | O) by evidences with s_t and a_t clamped, and Pyro's own marginals of each."""
    mdp, reward = problem(kind, horizon=3)
    S, A = mdp.available.shape
    message = pirl.messages(mdp, reward)
    # Who is in a terminal state stays; mu counts the entry.
    expected = torch.where(mdp.terminal.unsqueeze(-1), message.mu.cumsum(0), message.mu)
    whole = log_evidence(mdp, reward)
    elbo, picture = TraceEnum_ELBO(max_plate_nesting=0), config_enumerate(graphical_model)
    marginals = elbo.compute_marginals(picture, lambda *_: None, mdp, below_zero(mdp, reward)[0])
    for t in range(1, 4):
        clamped = torch.stack(
            [
                log_evidence(mdp, reward, {f"s_{t}": torch.tensor(s), f"a_{t}": torch.tensor(a)}) - whole
                for s in range(S)
                for a in range(A)
            ]
        )
        torch.testing.assert_close(clamped.exp().reshape(S, A), expected[t - 1], rtol=0, atol=1e-10)
        torch.testing.assert_close(marginals[f"s_{t}"].probs, expected[t - 1].sum(-1), rtol=0, atol=1e-10)
        torch.testing.assert_close(marginals[f"a_{t}"].probs, expected[t - 1].sum(-2), rtol=0, atol=1e-10)


def test_the_posterior_policy_is_the_soft_policy_that_controls_its_luck() -> None:
    """p(a_1 | s_1, O), and p(s_2 | s_1, a_1, O), which is not P(s'|s,a)."""
    mdp, reward = problem("stochastic", horizon=3)
    policy = pirl.soft_policy(mdp, reward, "trajectory")[0].exp()
    beta = pirl.messages(mdp, reward).log_beta[1].exp()
    luck = mdp.transition * beta
    luck = luck / luck.sum(-1, keepdim=True)
    assert float((luck - mdp.transition).abs().max()) > 0.1
    for s in range(3):
        start = {"s_1": torch.tensor(s)}
        for a in range(2):
            act = {**start, "a_1": torch.tensor(a)}
            chance = (log_evidence(mdp, reward, act) - log_evidence(mdp, reward, start)).exp()
            assert float(chance) == pytest.approx(float(policy[s, a]), abs=1e-10)
            for n in range(3):
                moved = log_evidence(mdp, reward, {**act, "s_2": torch.tensor(n)}) - log_evidence(mdp, reward, act)
                assert float(moved.exp()) == pytest.approx(float(luck[s, a, n]), abs=1e-10)


def chi_square(drawn: Tensor, law: dict[tuple[int, ...], float]) -> float:
    """The p-value of draws ``[n, k]``; outcomes that are expected less than five times are one."""
    counts = dict.fromkeys(law, 0)
    for row in map(tuple, drawn.tolist()):
        counts[row] += 1  # KeyError: an outcome of probability 0
    found, expected = np.array(list(counts.values()), float), len(drawn) * np.array(list(law.values()))
    rare = expected < 5
    found = np.append(found[~rare], found[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return float(stats.chisquare(found, expected).pvalue)


@pytest.mark.parametrize("kind", ["stochastic", "terminal"])
def test_draws_of_pyros_posterior_follow_the_trajectory_law(kind: str) -> None:
    mdp, reward = problem(kind, horizon=2)
    draws = 5000

    def many() -> None:
        with pyro.plate("draw", draws):
            graphical_model(mdp, below_zero(mdp, reward)[0])

    picture = infer_discrete(config_enumerate(many), first_available_dim=-2)
    trace = poutine.trace(picture).get_trace()
    drawn = torch.stack([trace.nodes[name]["value"] for name in ("s_1", "a_1", "s_2", "a_2", "s_3")], -1)
    law: dict[tuple[int, ...], float] = {}
    aimless: dict[tuple[int, ...], float] = {}
    for path in oracle.paths(mdp, steps=2):
        # The picture goes on in a terminal state: it stays, and does nothing.
        assert path.last is not None
        row = [*(i for pair in path.pairs for i in pair), path.last]
        row += [0, path.last] * (2 - len(path.pairs))
        log_prob = pirl.MaxEntTrajectory(mdp, reward).log_prob(oracle.as_tensor(path, 3))
        law[tuple(row)], aimless[tuple(row)] = float(log_prob.exp()), path.probability
    assert sum(law.values()) == pytest.approx(1)
    assert chi_square(drawn, law) > 1e-4
    assert chi_square(drawn, aimless) < 1e-12  # so many draws can tell


# -------------------------------------------------------------------------------------- the posterior of the reward


def by_messages(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
    """The same sentence with the library's word for it."""
    prior = dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["feature"]})
    law = pirl.MaxEntTrajectory(mdp, pirl.linear_reward(features, weights))
    with pyro.plate("episode", len(demos)):
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def ending_early() -> dict[str, Any]:
    """Demonstrations of different lengths: the right end of the corridor is terminal, and each step costs."""
    given = load(num_demos=1, horizon=3)
    mdp, features = given["mdp"].replace(terminal=[2]), -given["features"].abs() - 0.1
    demos = simulate(mdp, pirl.linear_reward(features, torch.ones(2)), 8, 3, "trajectory")
    assert len(set(demos.lengths.tolist())) > 1
    return {"demos": demos, "mdp": mdp, "features": features}


def log_joint(sentence: Any, arguments: dict[str, Any], weights: Tensor) -> Tensor:
    trace = poutine.trace(poutine.condition(sentence, {"weights": weights})).get_trace(**arguments)
    return trace.log_prob_sum()


@pytest.mark.parametrize("early", [False, True])
def test_the_density_and_its_slope_are_those_of_the_messages(early: bool) -> None:
    arguments = ending_early() if early else load(num_demos=6, horizon=3)
    for weights in ([0.0, 0.0], [0.3, 1.2], [2.0, 0.1]):
        point = torch.tensor(weights, requires_grad=True)
        found, expected = (log_joint(sentence, arguments, point) for sentence in (model, by_messages))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        slopes = [torch.autograd.grad(value, point)[0] for value in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_nuts_finds_the_same_posterior() -> None:
    """Means and standard deviations within four Monte Carlo standard errors, by chains of different seeds."""
    from arviz_stats.base import array_stats

    arguments = load(num_demos=6, horizon=2)
    options: dict[str, Any] = {
        "engine": "nuts", "num_chains": 2, "num_warmup": 100, "num_samples": 700, "dense_mass": True,
        "target_accept_prob": 0.7, "num_prior": 0, "num_posterior_predictive": 0, "progress": False,
    }  # fmt: skip
    literal = pirl.fit(model, **arguments, seed=1, **options)
    short = pirl.fit(by_messages, **arguments, seed=2, **options)
    assert literal.attrs["recorded"] == "True"  # the enumeration is tensor operations throughout
    for feature in range(2):
        draws = [fit.posterior["weights"].isel(feature=feature).values for fit in (literal, short)]
        assert min(array_stats.ess(x, method="bulk") for x in draws) >= 1000
        for method, statistic in (("mean", np.mean), ("sd", np.std)):
            error = math.hypot(*(array_stats.mcse(x, method=method) for x in draws))
            assert abs(statistic(draws[0]) - statistic(draws[1])) < 4 * error, (feature, method)


def test_the_file_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fits, prints the truth beside the posterior, and simulates aimless episodes with their optimality."""
    from pirl.cli import app
    from pirl.files import read_posterior

    file, out = Path(__file__).parents[1] / "models" / "optimality_graphical_model.py", tmp_path / "posterior.nc"
    settings = ["--set", "num_demos=5", "--set", "horizon=2", "--chains", "1", "--warmup", "10", "--samples", "10"]
    with pytest.raises(SystemExit) as ended:
        app(["fit", str(file), *settings, "--no-progress", "--out", str(out)])
    assert ended.value.code == 0
    assert "going right" in capsys.readouterr().out
    posterior = read_posterior(out)
    assert posterior.posterior["weights"].coords["feature"].values.tolist() == ["right end", "going right"]
    assert set(np.unique(posterior.prior_predictive["O_2"])) == {0.0, 1.0}
    assert reference()["values"]["weights"] == [1.0, -0.5]


# ---------------------------------------------------------------------------------------------------- what it is not


def test_what_the_picture_cannot_say_is_refused() -> None:
    mdp, reward = problem("stochastic")
    with pytest.raises(HorizonError, match="give the decision problem a horizon"):
        log_evidence(mdp.replace(horizon=None, terminal=[2]), -reward.abs())
    with pytest.raises(DiscountError, match=r"the discount is 0\.9"):
        log_evidence(mdp.replace(discount=0.9), reward)
    with pytest.raises(InvalidMDPError, match="action_prior='uniform'"):
        log_evidence(mdp.replace(action_prior="counting"), reward)
    with pytest.raises(InvalidRewardError, match="reward has shape"):
        log_evidence(mdp, reward[:2])


@pytest.mark.parametrize(
    ("states", "actions", "error", "message"),
    [
        ([[0, 1, 2]], [[1, 1]], HorizonError, "trajectory 0 was not watched to its end"),
        ([[0, 1, 2, 2], [0, 1, 2, -1]], [[1, 1, 1], [1, 1, 0]], HorizonError, "trajectory 1 was not watched"),
        ([[0, 2, 2, 2]], [[1, 1, 1]], ImpossibleTransitionError, "trajectory 0, step 0: moving from state 0"),
    ],
)
def test_demonstrations_that_leave_variables_open_or_cannot_be(
    states: list[list[int]], actions: list[list[int]], error: type[Exception], message: str
) -> None:
    arguments = load(num_demos=1, horizon=3)
    arguments["demos"] = pirl.Trajectories(torch.tensor(states), torch.tensor(actions))
    with pytest.raises(error, match=message):
        model(**arguments)
