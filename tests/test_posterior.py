"""Rewards of a posterior's draws, against the reward computed by hand."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pirl
from pirl import errors
from pirl.datasets import simulate
from pirl.envs import gridworld, gridworld_features
from pirl.posterior import identification, reward_draws
from pirl.summary import print_summary

F64 = torch.float64
FEW: dict[str, Any] = {"engine": "laplace", "num_samples": 10, "num_prior": 0, "num_posterior_predictive": 0}


@pytest.fixture(scope="module")
def problem() -> tuple[pirl.Trajectories, pirl.TabularMDP, torch.Tensor]:
    mdp = gridworld(4, 4, horizon=6)
    features = gridworld_features(4, 4, 3)
    return simulate(mdp, features @ torch.tensor([1.0, -1.0, 0.5], dtype=F64), 10, 6), mdp, features


def linear(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: torch.Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    pyro.deterministic("largest", weights.max())
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, scale * pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def test_rewards_are_those_of_the_draws(problem: Any) -> None:
    posterior = pirl.fit(linear, *problem, **FEW)
    found = reward_draws(posterior, linear, *problem)
    parts = posterior["posterior"]
    scale = parts["scale"].values.reshape(-1, 1, 1)
    expected = scale * (parts["weights"].values.reshape(-1, 3) @ problem[2].numpy().T)[..., None]
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(expected, found.shape), rtol=1e-12)
    assert found.shape == (parts.sizes["chain"] * parts.sizes["draw"], 16, 5)
    some = reward_draws(posterior, linear, *problem, num_draws=3)
    torch.testing.assert_close(some, found[[0, round((len(found) - 1) / 2), -1]], rtol=1e-12, atol=0)
    assert torch.get_default_dtype() == torch.float32


def sampled(demos: pirl.Trajectories, pool: pirl.Pool, features: torch.Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def test_sampled_dynamics_have_rewards_of_draws_too(problem: Any) -> None:
    demos, mdp, features = problem
    base = pirl.simulators.base_policy(mdp)
    pool = pirl.Pool.of(pirl.simulators.roll_out(pirl.simulators.TabularSimulator(mdp), base, 500), base, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.ConvergenceWarning)  # that so small a pool is not trusted
        posterior = pirl.fit(sampled, demos, pool, features, **FEW)
    found = reward_draws(posterior, sampled, demos, pool, features)
    expected = posterior["posterior"]["weights"].values.reshape(-1, 3) @ features.numpy().T
    assert found.shape == (len(expected), 16, 5)
    np.testing.assert_allclose(found, np.broadcast_to(expected[..., None], found.shape), rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so few draws leave-one-out says that it is not to be trusted
        table = pirl.compare({"sampled": posterior}, demos, mdp, rewards={"sampled": found})
    assert "sampled: mean policy" in table.index
    with pytest.raises(errors.OptionError, match="num_draws is 0, but must be a whole number, at least 1"):
        reward_draws(posterior, sampled, demos, pool, features, num_draws=0)


def test_a_reward_of_vectors_is_no_table() -> None:
    one = torch.eye(1, dtype=F64)
    puck = pirl.linear_gaussian.LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=3)
    played = pirl.simulators.roll_out(puck, puck.base_policy, 50)
    demos = pirl.ContinuousTrajectories(played.states[:2], played.actions[:2])

    def model(demos: pirl.ContinuousTrajectories, pool: pirl.Pool) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        with pyro.plate("episode", len(demos)):
            law = pirl.SampledMaxEntTrajectory(pool, pirl.FeatureReward(lambda s, a: -(s**2), weight))
            pyro.sample("trajectories", law, obs=demos.as_tensor())

    pool = pirl.Pool.of(played, puck.base_policy, puck.base_policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.ConvergenceWarning)
        posterior = pirl.fit(model, demos, pool, **FEW)
    with pytest.raises(errors.ModelError, match="a function of vectors, and no table"):
        reward_draws(posterior, model, demos, pool)


def subjects(demos: pirl.Trajectories, mdp: pirl.TabularMDP) -> None:
    with pyro.plate("subject", 2, dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    reward = level.unsqueeze(-1).unsqueeze(-1) * torch.arange(16.0).unsqueeze(-1)
    with pyro.plate("subject again", 2, dim=-2), pyro.plate("episode", len(demos), dim=-1):
        law = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def test_subjects_keep_their_dimension(problem: Any) -> None:
    posterior = pirl.fit(subjects, *problem[:2], **FEW)
    found = reward_draws(posterior, subjects, *problem[:2])
    level = posterior["posterior"]["level"].values.reshape(-1, 2, 1, 1)
    np.testing.assert_allclose(found, np.broadcast_to(level * np.arange(16.0)[:, None], found.shape), rtol=1e-12)


def branching(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: torch.Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    reward = features @ (torch.ones(3) * (x if float(x.detach()) > 0 else -x))
    with pyro.plate("episode", len(demos)):
        pyro.sample(
            "trajectories", pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths), obs=demos.as_tensor()
        )


def test_models_that_do_not_vmap_are_run_draw_by_draw(problem: Any) -> None:
    posterior = pirl.fit(branching, *problem, engine="nuts", num_chains=1, num_warmup=5, num_samples=4, progress=False,
                         num_prior=0, num_posterior_predictive=0)  # fmt: skip
    found = reward_draws(posterior, branching, *problem)
    expected = np.abs(posterior["posterior"]["x"].values.ravel())[:, None] * problem[2].numpy().sum(1)
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-12)


def two(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: torch.Tensor) -> None:
    linear(demos, mdp, features)
    with pyro.plate("more", len(demos)):
        law = pirl.MaxEntTrajectory(mdp, features @ torch.ones(3), lengths=demos.lengths)
        pyro.sample("others", law, obs=demos.as_tensor())


def test_what_has_no_reward_is_refused(problem: Any) -> None:
    posterior = pirl.fit(linear, *problem, **FEW)
    with pytest.raises(errors.ModelError, match="choose site= of trajectories, others"):
        reward_draws(posterior, two, *problem)
    other = reward_draws(posterior, two, *problem, site="others")
    torch.testing.assert_close(other, problem[2].sum(1)[:, None].expand_as(other))
    with pytest.raises(errors.ModelError, match="no trajectories at 'rest'"):
        reward_draws(posterior, two, *problem, site="rest")
    with pytest.raises(errors.OptionError, match="has no site 'x'"):
        reward_draws(posterior, branching, *problem)

    def empty() -> None:
        pyro.sample("scale", dist.LogNormal(0.0, 0.3))

    with pytest.raises(errors.ModelError, match="observes no trajectories"):
        reward_draws(posterior, empty)


# ------------------------------------------------------------------------------------------------ what is identified


def with_a_constant(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: torch.Tensor, scaled: bool) -> None:
    """A constant reward changes nothing; nor does a scale that the weights make good."""
    count = features.shape[-1]
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([count]).to_event(1), infer={"dims": ["feature"]})
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3)) if scaled else 1.0
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, scale * pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


CHEES: dict[str, Any] = {"num_chains": 16, "num_warmup": 60, "num_samples": 40, "num_prior": 0, "progress": False,
                         "num_posterior_predictive": 0}  # fmt: skip


@pytest.mark.parametrize("scaled, rank", [(False, 3), (True, 3)])
def test_unidentified_directions_are_told(problem: Any, scaled: bool, rank: int, capsys: Any) -> None:
    demos, mdp, features = problem
    whole = torch.cat([features, torch.ones(16, 1, dtype=F64)], -1)
    posterior = pirl.fit(with_a_constant, demos, mdp, whole, scaled, **CHEES)
    shares = posterior["identification"]["weights"].values
    assert posterior.attrs["identified_directions"] == rank
    assert posterior.attrs["num_directions"] == 4 + scaled
    assert shares[3] == pytest.approx(1.0, abs=1e-8)
    if scaled:  # what the scale gains, weights lose
        assert shares[:3].max() > 0.01 and 0.1 < float(posterior["identification"]["scale"]) < 1
    else:
        assert shares[:3] == pytest.approx(0.0, abs=1e-10)
        # The chains' agreement is that on the other three weights, in whatever basis.
        assert posterior.attrs["identified_rhat"] < 1.1
    assert 0 < posterior.attrs["identified_ess"] < 3 * 16 * 40
    print_summary(posterior)
    printed = capsys.readouterr().out
    assert "weights[3]*" in printed and f"{1 + scaled} of {4 + scaled} directions" in printed
    assert ("scale*" in printed) == scaled


def test_single_precision_marks_the_same_directions(problem: Any) -> None:
    demos, mdp, features = problem
    whole = torch.cat([features, torch.ones(16, 1, dtype=F64)], -1).float()
    single = mdp.to(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.ConvergenceWarning)  # forty draws: too few for a k-hat
        posterior = pirl.fit(with_a_constant, demos, single, whole, False, engine="laplace", num_samples=40,
                             num_prior=0, num_posterior_predictive=0)  # fmt: skip
    assert posterior.attrs["dtype"] == "float32"
    assert posterior.attrs["identified_directions"] == 3
    assert posterior["identification"]["weights"].values[3] == pytest.approx(1.0, abs=1e-3)


def test_nothing_is_marked_where_all_is_identified(problem: Any, capsys: Any) -> None:
    posterior = pirl.fit(with_a_constant, *problem, False, **CHEES)
    assert posterior.attrs["identified_directions"] == posterior.attrs["num_directions"] == 3
    print_summary(posterior)
    assert "*" not in capsys.readouterr().out


def hierarchy(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: torch.Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    weights = pyro.sample("weights", dist.Normal(mean, 0.3).expand([3]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, pirl.linear_reward(features, weights), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def test_what_is_known_through_others_is_not_marked(problem: Any, capsys: Any) -> None:
    """Of a mean no reward depends on, three weights leave .3^2 / 3 of 3^2: a share of .003."""
    posterior = pirl.fit(hierarchy, *problem, **CHEES)
    # The prior's covariance is estimated from 400 draws, to some 10%.
    assert float(posterior["identification"]["mean"]) == pytest.approx(0.03 / 9.03, rel=0.3)
    assert posterior["identification"]["weights"].values == pytest.approx(0.0, abs=1e-6)
    print_summary(posterior)
    assert "*" not in capsys.readouterr().out


def own_horizons(demos: pirl.Trajectories, mdp: pirl.TabularMDP) -> None:
    reward = pyro.sample("reward", dist.Normal(0.0, 1.0).expand([16]).to_event(1))
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(
            mdp, pirl.tabular_reward(reward), lengths=demos.lengths, horizons=demos.horizons
        )
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def test_demonstrators_with_horizons_of_their_own(problem: Any) -> None:
    """On a torus without an end only a horizon of one's own tells a potential from a reward."""
    mdp = problem[1].replace(horizon=None, discount=0.9)
    seen = problem[0]
    ends = pirl.Trajectories(seen.states, seen.actions, ends="horizon")
    few = {**FEW, "num_samples": 40}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.ConvergenceWarning)
        found = pirl.fit(own_horizons, ends, mdp, **few)
        whole = pirl.fit(own_horizons, seen, mdp.replace(horizon=6), **few)
    assert found.attrs["identified_directions"] == whole.attrs["identified_directions"]


def test_posteriors_of_other_models_say_nothing_of_it() -> None:
    posterior = pirl.fit(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), **FEW)
    assert "identification" not in posterior.children and "identified_rhat" not in posterior.attrs
    assert "identification_unknown" not in posterior.attrs


def test_one_draw_tells_nothing_of_it(problem: Any) -> None:
    """Nor has it a standard deviation, of which torch warns: an error here."""
    posterior = pirl.fit(with_a_constant, *problem, False, **{**FEW, "num_chains": 1, "num_samples": 1})
    assert posterior.attrs["identification_unknown"] == "there is one draw"


@pytest.mark.parametrize("limit, told", [("_MOST_PARAMETERS", "3 parameters, more than 2"), ("_MOST_PAIRS", "pairs")])
def test_what_is_not_known_of_it_is_told(
    problem: Any, limit: str, told: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identification, limit, 2)
    posterior = pirl.fit(with_a_constant, *problem, False, **FEW)
    assert "identification" not in posterior.children and told in posterior.attrs["identification_unknown"]
    print_summary(posterior)
    assert f"is not known: {posterior.attrs['identification_unknown']}." in capsys.readouterr().out
