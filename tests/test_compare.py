"""The table of answers, column by column, against what defines it."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import arviz_stats
import numpy as np
import pandas
import pytest
import torch
from typer.testing import CliRunner

import pirl
from models import gridworld
from pirl import errors
from pirl.baselines import cloning, max_margin, maxent
from pirl.cli import app
from pirl.compare import COLUMNS, compare, print_comparison, to_latex
from pirl.metrics import epic_distance
from pirl.planning import optimal_policy
from pirl.policies import mean_policy
from pirl.posterior import reward_draws

F64 = torch.float64
DRAWS = 40


@pytest.fixture(scope="module")
def problem() -> dict[str, Any]:
    loaded = gridworld.load(rows=4, cols=4, num_demos=30, horizon=6, num_features=3)
    train, test = loaded["demos"][:12], loaded["demos"][12:]
    arguments = {**loaded, "demos": train}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.ConvergenceWarning)  # forty draws: too few for a k-hat
        posterior = pirl.fit(gridworld.model, model_kwargs=arguments, engine="laplace", num_samples=DRAWS // 4,
                             num_prior=0, num_posterior_predictive=0)  # fmt: skip
    return {
        "posterior": posterior,
        "rewards": reward_draws(posterior, gridworld.model, **arguments),
        "truth": gridworld.truth(loaded["features"], 3, 0),
        "train": train, "test": test, "mdp": loaded["mdp"], "features": loaded["features"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def table(problem: dict[str, Any]) -> pandas.DataFrame:
    train, mdp, features = problem["train"], problem["mdp"], problem["features"]
    entries = {
        "posterior": problem["posterior"],
        "maxent": maxent(train, mdp, features),
        "margin": max_margin(train, mdp, features, method="projection"),
        "cloning": cloning(train, mdp),
    }
    return compare(
        entries,
        problem["test"],
        mdp,
        rewards={"posterior": problem["rewards"]},
        truth=problem["truth"],
        features=features,
    )


def choices(demos: pirl.Trajectories, log_policy: torch.Tensor) -> torch.Tensor:
    """log pi of each episode's decisions, by a loop."""
    return torch.stack([
        sum(((log_policy[t] if log_policy.dim() == 3 else log_policy)[s, a]
             for t, (s, a) in enumerate(zip(states, actions, strict=False)) if a >= 0), torch.zeros((), dtype=F64))
        for states, actions in zip(demos.states.tolist(), demos.actions.tolist(), strict=True)
    ])  # fmt: skip


def value(mdp: pirl.TabularMDP, policy: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    return pirl.policy_value(mdp, policy, reward)[..., 0, :] @ mdp.initial


def test_rows_and_columns(table: pandas.DataFrame) -> None:
    assert list(table.columns) == list(COLUMNS)
    made = ["mean policy", "Bayes-optimal policy", "predictive mixture", "10% CVaR policy"]
    assert list(table.index) == [*(f"posterior: {x}" for x in made), "maxent", "margin", "cloning", "truth"]


def test_likelihoods_are_those_of_the_soft_policies(problem: dict[str, Any], table: pandas.DataFrame) -> None:
    mdp, test = problem["mdp"], problem["test"]
    decisions = int(test.lengths.sum())
    policies = pirl.soft_policy(mdp, problem["rewards"])
    each = torch.stack([choices(test, policy) for policy in policies])
    expected = {
        "truth": choices(test, pirl.soft_policy(mdp, problem["truth"])).sum(),
        "posterior: mean policy": choices(test, mean_policy(policies)).sum(),
        "posterior: Bayes-optimal policy": choices(test, pirl.soft_policy(mdp, problem["rewards"].mean(0))).sum(),
        "posterior: predictive mixture": (torch.logsumexp(each, 0) - math.log(DRAWS)).sum(),
        "cloning": choices(test, cloning(problem["train"], mdp).log_policy).sum(),
    }
    for name, total in expected.items():
        assert table.log_likelihood[name] == pytest.approx(float(total) / decisions, rel=1e-10), name
    inside = (table.log_likelihood_low <= table.log_likelihood) & (table.log_likelihood <= table.log_likelihood_high)
    assert inside[table.log_likelihood.notna()].all()
    # A mean of means: the spread of the bootstrap is the standard error of episodes.
    episodes = choices(test, pirl.soft_policy(mdp, problem["truth"])).numpy()
    width = table.log_likelihood_high["truth"] - table.log_likelihood_low["truth"]
    assert width == pytest.approx(2 * 1.645 * episodes.std(ddof=1) / math.sqrt(len(test)) / 6, rel=0.25)


def test_value_differences_and_distances(problem: dict[str, Any], table: pandas.DataFrame) -> None:
    mdp, truth, rewards = problem["mdp"], problem["truth"], problem["rewards"]
    best = value(mdp, optimal_policy(mdp, truth).policy, truth)
    lost = {
        "truth": torch.zeros((), dtype=F64),
        "posterior: Bayes-optimal policy": best - value(mdp, optimal_policy(mdp, rewards.mean(0)).policy, truth),
        "posterior: predictive mixture": (best - value(mdp, optimal_policy(mdp, rewards).policy, truth)).mean(),
        "posterior: mean policy": best - value(mdp, mean_policy(pirl.soft_policy(mdp, rewards)).exp(), truth),
        "cloning": best - value(mdp, cloning(problem["train"], mdp).log_policy.exp().expand(6, -1, -1), truth),
    }
    for name, expected in lost.items():
        assert table.evd[name] == pytest.approx(float(expected), abs=1e-10), name
    assert (table.evd >= -1e-12).all()
    assert table.epic["truth"] == pytest.approx(0.0, abs=1e-7)
    mean = float(epic_distance(mdp, rewards, truth).mean())
    assert table.epic["posterior: predictive mixture"] == pytest.approx(mean, rel=1e-10)
    assert np.isnan(table.epic["cloning"])


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_leave_one_out_is_arviz(problem: dict[str, Any], table: pandas.DataFrame) -> None:
    found = arviz_stats.loo(problem["posterior"])
    assert table.loo["posterior: mean policy"] == pytest.approx(float(found.elpd))
    assert table.loo_se["posterior: mean policy"] == pytest.approx(float(found.se))
    assert table.loo.drop([i for i in table.index if i.startswith("posterior")]).isna().all()


def test_few_draws_have_no_leave_one_out_estimate(problem: dict[str, Any]) -> None:
    few = problem["posterior"].isel(draw=slice(3), chain=slice(1))
    rewards = {"few": problem["rewards"][:3]}
    found = compare({"few": few}, problem["test"], problem["mdp"], rewards=rewards)
    assert found.loo.isna().all() and found.log_likelihood.notna().any()


def test_draws_alone_are_a_posterior(problem: dict[str, Any], table: pandas.DataFrame) -> None:
    found = compare({"posterior": problem["rewards"]}, problem["test"], problem["mdp"], risk_level=None)
    assert len(found) == 3 and found[["evd", "epic", "feature_gap", "time", "loo"]].isna().all(axis=None)
    assert found.log_likelihood.tolist() == table.log_likelihood[:3].tolist()


def test_forms(table: pandas.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    latex = to_latex(table)
    rows = [line for line in latex.splitlines() if "&" in line][1:]
    assert [row.split(" & ")[0] for row in rows] == [name.replace("%", r"\%") for name in table.index]
    assert len({row.count("&") for row in rows}) == 1 and latex.count(r"\midrule") == 1
    assert f"${table.evd['maxent']:.3f}$" in latex
    back = pandas.read_csv(io.StringIO(table.to_csv()), index_col="answer")
    pandas.testing.assert_frame_equal(back, table)
    print_comparison(table)
    printed = capsys.readouterr().out
    assert "…" not in printed and all(name in printed for name in table.index)


def test_what_cannot_be_compared_is_refused(problem: dict[str, Any]) -> None:
    test, mdp = problem["test"], problem["mdp"]
    with pytest.raises(errors.OptionError, match="has no variable 'reward': give rewards="):
        compare({"mine": problem["posterior"]}, test, mdp)
    with pytest.raises(errors.OptionError, match="'mine' is a dict"):
        compare({"mine": {}}, test, mdp)  # type: ignore[dict-item]
    with pytest.raises(errors.OptionError, match=r"expected draws \[D, S, A\]"):
        compare({"mine": problem["rewards"][0]}, test, mdp)
    with pytest.raises(errors.OptionError, match="level must be"):
        compare({}, test, mdp, level=1.0)


SMALL = ["--set", "rows=3", "--set", "cols=3", "--set", "num_demos=8", "--set", "horizon=4", "--set", "num_features=2"]


def test_from_the_shell(tmp_path: Path) -> None:
    files = {suffix: tmp_path / f"table.{suffix}" for suffix in ("csv", "tex", "png")}
    command = ["compare", "models/gridworld.py", *SMALL, "--engine", "laplace", "--samples", "20", "--no-progress"]
    done = CliRunner().invoke(app, [*command, "--out", str(files["csv"]), "--plot", str(files["png"])])
    assert done.exit_code == 0, done.output
    table = pandas.read_csv(files["csv"], index_col="answer")
    wanted = [
        "posterior: mean policy",
        "MaxEnt likelihood",
        "MaxEnt dual",
        "max-margin",
        "structured margin",
        "cloning",
        "truth",
    ]
    assert set(wanted) <= set(table.index) and table.evd["truth"] == pytest.approx(0.0, abs=1e-12)
    assert files["png"].stat().st_size > 5000
    done = CliRunner().invoke(app, [*command, "--out", str(files["tex"])])
    assert done.exit_code == 0 and files["tex"].read_text().startswith(r"\begin{tabular}")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["models/gridworld.py", *SMALL, "--hold-out", "1.5"], "leaves none to learn from"),
        (["models/bus_engine.py"], "0 Trajectories, but comparing needs one"),
        (["models/gridworld.py", "--out", "table.txt"], ".csv, .tex"),
    ],
)
def test_wrong_calls_are_one_line(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["compare", *arguments])
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_name_that_fits_nothing_is_refused(problem: dict[str, Any]) -> None:
    estimate = maxent(problem["train"], problem["mdp"], problem["features"])
    with pytest.raises(errors.OptionError, match="an answer is called 'truth'"):
        compare({"truth": estimate}, problem["test"], problem["mdp"], truth=problem["truth"])
    with pytest.raises(errors.OptionError, match="'other'.* is of no answer: there are 'maxent'"):
        compare({"maxent": estimate}, problem["test"], problem["mdp"], rewards={"other": problem["rewards"]})


def test_a_search_that_ended_early_is_marked(problem: dict[str, Any]) -> None:
    with pytest.warns(errors.ConvergenceWarning, match="has not converged"):
        early = maxent(problem["train"], problem["mdp"], problem["features"], max_iterations=1)
    table = compare({"early": early}, problem["test"], problem["mdp"])
    assert list(table.index) == ["early (not converged)"]
