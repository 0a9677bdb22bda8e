"""Posteriors with one planted defect each: it is found, named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from arviz_base import from_dict
from arviz_stats.base import array_stats
from typer.testing import CliRunner

import pirl
from pirl.cli import app
from pirl.convergence import Convergence, Elements, allowed_rhat, ess_bulk, ess_tail, nested_rhat, rhat, wanted_ess
from pirl.diagnose import diagnose, print_diagnosis, verdict
from pirl.errors import PosteriorFileError
from pirl.files import write_posterior
from pirl.summary import print_summary

CHAINS, DRAWS = 4, 1000
NUTS = {"inference_library": "pirl", "engine": "nuts", "seed": 0, "wall_time": 1.0, "tuning_steps": 500, "thin": 1,
        "max_tree_depth": 10, "target_accept_prob": 0.8, "dense_mass": "False"}  # fmt: skip
LAPLACE = {**NUTS, "engine": "laplace", "approximation": "laplace", "pareto_k": 0.2, "importance_ess": 900.0,
           "converged": "True"}  # fmt: skip
Groups = dict[str, dict[str, Any]]


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def healthy(chains: int = CHAINS, draws: int = DRAWS) -> Groups:
    """Independent draws of a law with a scale, and what nuts would say of them; the data are worth ten priors."""
    numbers = rng()
    normal = numbers.normal(size=(chains, draws, 3))
    lp = -0.5 * (normal**2).sum(2)
    return {
        "posterior": {
            "weights": normal[..., :2],
            "tau": np.exp(normal[..., 2]),
            "zero": np.zeros((chains, draws, 2)),
            "twice": 2 * normal[..., 0],
        },
        "log_prior": {"weights": np.zeros((chains, draws, 2)), "tau": np.zeros((chains, draws))},
        "sample_stats": {
            "lp": lp,
            "energy": -lp + numbers.chisquare(3, size=lp.shape) / 2,
            "diverging": np.zeros((chains, draws), dtype=bool),
            "acceptance_rate": np.full((chains, draws), 0.85),
            "tree_depth": np.full((chains, draws), 3),
            "n_steps": np.full((chains, draws), 7),
        },
        "log_likelihood": {"trajectories": -1 + 0.1 * numbers.normal(size=(chains, draws, 5))},
        "prior": {
            "weights": 10 * numbers.normal(size=(1, 500, 2)),
            "tau": np.exp(3 * numbers.normal(size=(1, 500))),
        },
    }


def tree(groups: Groups, attrs: dict[str, Any] | None = None) -> xarray.DataTree:
    posterior = from_dict(
        groups,
        coords={"feature": ["goal", "trap"], "episode": [f"e{i}" for i in range(5)]},
        dims={"weights": ["feature"], "trajectories": ["episode"]},
        check_conventions=False,
    )
    posterior.attrs.update(NUTS if attrs is None else attrs)
    return posterior


def kinds(posterior: xarray.DataTree) -> list[str]:
    return [f"{finding.severity} {finding.kind}" for finding in diagnose(posterior)]


def autoregressive(strength: float, shape: tuple[int, ...]) -> np.ndarray:
    """Draws ``[chain, draw, ...]`` of a stationary process with unit variance."""
    noise = rng().normal(size=shape)
    for step in range(1, shape[1]):
        noise[:, step] = strength * noise[:, step - 1] + np.sqrt(1 - strength**2) * noise[:, step]
    return noise


# ------------------------------------------------------------------------------------------------- planted defects

Defect = Callable[[Groups, dict[str, Any]], None]


def displaced(groups: Groups, attrs: dict[str, Any]) -> None:
    """Chains that wander slowly, and have not met."""
    groups["posterior"]["weights"][..., 1] = autoregressive(0.995, (CHAINS, DRAWS))


def displaced_after_long_warmup(groups: Groups, attrs: dict[str, Any]) -> None:
    displaced(groups, attrs)
    attrs["tuning_steps"] = 2000


def slow(groups: Groups, attrs: dict[str, Any]) -> None:
    """Chains that agree, of draws that count for a twelfth each: 320 where 400 are wanted."""
    groups["posterior"]["weights"][..., 0] = autoregressive(0.85, (CHAINS, DRAWS))


def bimodal(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["posterior"]["weights"][[1, 3], :, 0] += 8


def near(groups: Groups, attrs: dict[str, Any]) -> None:
    """Two humps that are one, as of chains that have not met yet: the means are less than two deviations apart."""
    groups["posterior"]["weights"][[1, 3], :, 0] += 1.2


def too_short_tails(groups: Groups, attrs: dict[str, Any]) -> None:
    """Large values come in spells, at the same times in every chain and in both halves."""
    groups["posterior"]["weights"][..., 0] *= np.where(np.arange(DRAWS) % (DRAWS // 2) < 60, 10, 1)


def stuck(groups: Groups, attrs: dict[str, Any]) -> None:
    for values in (*groups["posterior"].values(), groups["sample_stats"]["energy"]):
        values[2] = values[2, :1]
    groups["sample_stats"]["acceptance_rate"][2] = 0.001


def low_density(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["posterior"]["weights"][1] += 5
    groups["sample_stats"]["lp"][1] -= 60


def divergent(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["sample_stats"]["diverging"] |= groups["posterior"]["tau"] < 0.2


def divergent_anywhere(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["sample_stats"]["diverging"] |= rng().random((CHAINS, DRAWS)) < 0.01


def slow_energy(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["sample_stats"]["energy"][3] = autoregressive(0.95, (1, DRAWS))[0]


def deep_trees(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["sample_stats"]["tree_depth"][:, ::5] = 10


def long_trajectories(groups: Groups, attrs: dict[str, Any]) -> None:
    del groups["sample_stats"]["tree_depth"]
    attrs |= {"engine": "chees", "max_leapfrogs": 100}
    groups["sample_stats"]["n_steps"][:, ::5] = 100


def interrupted(groups: Groups, attrs: dict[str, Any]) -> None:
    attrs["interrupted"] = "True"


def not_finite(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["posterior"]["weights"][0, 5, 1] = np.nan


def blanked_out(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["posterior"]["zero"][..., 1] = -np.inf
    groups["posterior"]["zero"][..., 0] = np.nan


def influential(groups: Groups, attrs: dict[str, Any]) -> None:
    """Without them the variance would be ten times as large: k-hat is 0.9 (and 20 for the other, beyond a fit)."""
    squares = groups["posterior"]["weights"][..., 0] ** 2
    groups["log_likelihood"]["trajectories"][..., 3] = -0.45 * squares
    groups["log_likelihood"]["trajectories"][..., 1] = -10 * squares


def prior_only(groups: Groups, attrs: dict[str, Any]) -> None:
    groups["prior"]["weights"][..., 1] /= 10


def a_shift(groups: Groups, attrs: dict[str, Any]) -> None:
    """As wide as the prior, but elsewhere: the data spoke."""
    groups["prior"]["weights"][..., 1] = groups["prior"]["weights"][..., 1] / 10 + 4


@pytest.mark.parametrize("defect", [displaced, divergent_anywhere, slow_energy])
def test_of_scales_is_spoken_where_numbers_are_positive(defect: Defect) -> None:
    groups, attrs = healthy(), dict(NUTS)
    defect(groups, attrs)
    (found,) = diagnose(tree(groups, attrs))
    assert "non-centred" in found.advice
    groups["posterior"]["tau"] = np.log(groups["posterior"]["tau"])
    (without,) = diagnose(tree(groups, attrs))
    assert without.kind == found.kind and "non-centred" not in without.advice
    assert without.advice == without.advice.strip(" ,;") and ", , " not in without.advice


@pytest.mark.parametrize(
    ("defect", "kind", "words"),
    [
        (displaced, "problem rhat", ["weights[trap] (", "num_samples=2000", "num_warmup=1000", "dense_mass=True"]),
        (displaced_after_long_warmup, "problem rhat", ["Try: dense_mass=True", "warmed up for 2000 steps, and longer"]),
        (slow, "problem ess", ["wanted 400", "weights[goal] (", "such as num_samples=2000 (--samples)"]),
        (near, "problem rhat", ["do not agree yet", "weights[goal] ("]),
        (bimodal, "problem modes", ["chains 0 and 2 stay near", "chains 1 and 3 stay near", "engine='smc'"]),
        (too_short_tails, "problem ess", ["tails", "wanted 400", "weights[goal] (", "such as num_samples="]),
        (stuck, "problem stuck", ["Chain 2 hardly moved", "0.1%"]),
        (low_density, "problem low_density", ["Chain 1 stays", "by up to 60"]),
        (divergent, "problem divergences", ["tau is small (median 0.1", "Try: the non-centred form"]),
        (divergent_anywhere, "problem divergences", ["no particular place", "target_accept_prob=0.9 (it was 0.8)"]),
        (slow_energy, "problem energy", ["chain 3 ", "E-BFMI 0.1"]),
        (deep_trees, "note trajectories", ["20%", "10 (max_tree_depth)"]),
        (long_trajectories, "note trajectories", ["20%", "100 (max_leapfrogs)", "dense_mass=True"]),
        (interrupted, "note interrupted", ["1,000 draws"]),
        (not_finite, "problem not_finite", ["weights[trap] is NaN"]),
        (blanked_out, None, []),
        (influential, "note influential", ["2 of 5", "trajectories[e1] (9.99) and trajectories[e3] ("]),
        (prior_only, "note prior", ["weights[trap] ("]),
        (a_shift, None, []),
        (lambda groups, attrs: None, None, []),
    ],
)
def test_a_planted_defect_is_found_and_nothing_else(
    defect: Defect, kind: str | None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, attrs = healthy(), dict(NUTS)
    defect(groups, attrs)
    posterior = tree(groups, attrs)
    assert kinds(posterior) == ([kind] if kind else [])
    problem = bool(kind and kind.startswith("problem"))

    monkeypatch.setenv("COLUMNS", "72")
    write_posterior(posterior, tmp_path / "posterior.nc")
    result = CliRunner().invoke(app, ["diagnose", str(tmp_path / "posterior.nc")])
    assert result.exit_code == int(problem), result.output
    assert max(map(len, result.stdout.splitlines())) <= 72
    said = " ".join(result.stdout.split())
    for word in words:
        assert word in said
    assert ("Nothing is wrong" in said) == (not problem)
    assert " nan" not in said.lower().replace("is nan or", "")
    # The summary says the same.
    assert ("do not trust this yet" in verdict(posterior)) == problem
    assert ("nothing is wrong" in verdict(posterior)) == (not problem)


def test_what_was_checked_is_told_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    posterior = tree(healthy())
    assert print_diagnosis(posterior) == []
    said = " ".join(capsys.readouterr().out.split())
    sampled = posterior["posterior"].to_dataset()[["weights", "tau"]]
    worst = max(float(data.max()) for data in arviz_stats.rhat(sampled).values())
    bulk = min(float(data.min()) for data in arviz_stats.ess(sampled).values())
    for figure in (
        f"R-hat at most {worst:.3f} (",
        f"bulk ESS at least {bulk:.0f} (",
        "0 of 4,000 transitions diverged",
    ):
        assert figure in said


def test_two_defects_are_told_problems_first() -> None:
    groups = healthy()
    deep_trees(groups, {})
    divergent(groups, {})
    slow_energy(groups, {})
    assert kinds(tree(groups)) == ["problem divergences", "problem energy", "note trajectories"]


def test_when_every_chain_is_stuck_nothing_else_is_said() -> None:
    groups = healthy()
    for values in (*groups["posterior"].values(), groups["sample_stats"]["energy"]):
        values[:] = values[:, :1]
    (finding,) = diagnose(tree(groups))
    assert finding.kind == "stuck"
    assert "all of them" in finding.what


def test_a_low_acceptance_alone_makes_a_chain_stuck() -> None:
    groups = healthy()
    groups["sample_stats"]["acceptance_rate"][[0, 3]] = 0.01
    (finding,) = diagnose(tree(groups))
    assert finding.what.startswith("Chains 0 and 3 hardly moved")


# --------------------------------------------------------------------------------------------------- approximations


@pytest.mark.parametrize(
    ("attrs", "kind"),
    [
        ({}, None),
        ({"pareto_k": 0.9}, "problem pareto_k"),
        ({"pareto_k": float("-inf"), "importance_ess": 1000.0}, None),
        ({"pareto_k": float("inf"), "importance_ess": 1.0}, "problem pareto_k"),
        ({"importance_ess": 20.0}, "note importance_ess"),
        ({"converged": "False"}, "problem unconverged"),
        ({"pareto_k": float("nan")}, "note pareto_k"),
        ({"pareto_k": None}, "note pareto_k"),
        ({"engine": "svi", "approximation": "svi", "guide": "delta"}, "problem point"),
    ],
)
def test_approximations_are_judged_by_their_weights(attrs: dict[str, Any], kind: str | None) -> None:
    groups = healthy(chains=1)
    groups["sample_stats"] = {"lp": groups["sample_stats"]["lp"], "log_weight": np.zeros((1, DRAWS))}
    given = {name: value for name, value in {**LAPLACE, **attrs}.items() if value is not None}
    posterior = tree(groups, given)
    assert kinds(posterior) == ([kind] if kind else [])
    print_summary(posterior)


@pytest.mark.parametrize(("slope", "told"), [(0.6, True), (0.1, False)])
def test_means_that_weights_move_are_told(slope: float, told: bool) -> None:
    """Weights exp(slope x) move the mean of a normal x by slope standard deviations."""
    groups = healthy(chains=1)
    goal = groups["posterior"]["weights"][..., 0]
    groups["sample_stats"] = {"log_weight": slope * (goal - goal.mean()) / goal.std()}
    attrs = {**LAPLACE, "importance_ess": DRAWS * np.exp(-(slope**2))}
    found = [finding for finding in diagnose(tree(groups, attrs)) if finding.kind == "shifted"]
    assert bool(found) == told
    if told:
        shift = float(found[0].what.split("weights[goal] (")[1].split(")")[0])
        assert shift == pytest.approx(slope, abs=4.5 / attrs["importance_ess"] ** 0.5)


def test_draws_of_an_approximation_are_weighted_before_observations_are_left_out() -> None:
    groups = healthy(chains=1)
    squares = groups["posterior"]["weights"][..., 0] ** 2
    groups["sample_stats"] = {"log_weight": np.zeros((1, DRAWS))}
    groups["log_likelihood"]["trajectories"][..., 3] = -0.45 * squares
    assert kinds(tree(groups, LAPLACE)) == ["note influential"]
    # The draws are too wide for the posterior, whose weights undo what the observation forbids.
    for weight in (-0.45, -0.4):
        groups["sample_stats"]["log_weight"] = weight * squares
        assert kinds(tree(groups, LAPLACE)) == []


def test_copies_of_few_particles_are_found() -> None:
    groups, attrs = healthy(), {**NUTS, "engine": "smc", "num_temperatures": 12, "log_evidence_se": 0.1}
    divergent(groups, attrs)  # of the last moves of particles, which need not follow the posterior by themselves
    assert kinds(tree(groups, attrs)) == []
    assert kinds(tree(groups, {**attrs, "log_evidence_se": 2.0})) == ["problem evidence"]
    bimodal(groups, attrs)
    (finding,) = diagnose(tree(groups, attrs))
    assert finding.kind == "modes" and "target_ess" in finding.advice and "engine=" not in finding.advice
    for values in groups["posterior"].values():
        values[:] = np.repeat(values[:, :100], 10, axis=1)
    (finding,) = diagnose(tree(groups, attrs))
    assert (finding.kind, finding.severity) == ("few_particles", "problem")
    assert "10%" in finding.what


# ------------------------------------------------------------------------------------------------------- odd shapes


@pytest.mark.parametrize("draws", [1, 2, 3, 4, 5, 7, 25])
@pytest.mark.parametrize("chains", [1, 2, 4])
@pytest.mark.parametrize("attrs", [NUTS, LAPLACE, {**NUTS, "engine": "smc"}, {**NUTS, "num_superchains": 2}])
def test_few_draws_and_chains_are_no_accident(
    chains: int, draws: int, attrs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    posterior = tree(healthy(chains, draws), attrs)
    findings = print_diagnosis(posterior)
    said = capsys.readouterr().out
    assert "nan" not in said and "inf " not in said
    if attrs is not LAPLACE:
        assert ("problem few_draws" in [f"{f.severity} {f.kind}" for f in findings]) == (draws < 4)
    print_summary(posterior)


def test_only_constants(capsys: pytest.CaptureFixture[str]) -> None:
    posterior = from_dict({"posterior": {"a": np.ones((4, 100)), "b": np.full((4, 100, 3), -np.inf)}})
    assert print_diagnosis(posterior) == []
    assert "no parameter varies" in capsys.readouterr().out


def test_rounding_is_not_variation() -> None:
    groups = healthy()
    jitter = rng().integers(-2, 3, size=(CHAINS, DRAWS, 2)) * np.spacing(1e6)
    groups["posterior"]["zero"] = 1e6 + np.arange(CHAINS)[:, None, None] * np.spacing(1e6) + jitter
    assert kinds(tree(groups)) == []


def test_one_chain_is_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert kinds(tree(healthy(chains=1))) == ["note one_chain"]
    groups = healthy(chains=1)
    groups["posterior"]["weights"][:, :, 0] += np.linspace(0, 5, DRAWS)
    assert kinds(tree(groups)) == ["problem rhat", "note one_chain"]
    groups["posterior"]["weights"][:, :, 0] = autoregressive(0.97, (1, DRAWS))
    (found, _) = diagnose(tree(groups))
    assert found.kind in ("ess", "rhat")


def test_draws_alone_are_enough() -> None:
    assert diagnose(from_dict({"posterior": healthy()["posterior"]})) == []
    assert diagnose(from_dict({"posterior": {"n": np.arange(4000).reshape(4, 1000) * 733 % 101}})) == []


def test_what_has_no_draws_is_refused() -> None:
    for groups in ({"prior": {"a": np.ones((4, 100))}}, {}):
        with pytest.raises(PosteriorFileError, match="no group 'posterior'"):
            diagnose(from_dict(groups) if groups else xarray.DataTree())


def test_a_file_that_is_no_posterior_has_status_2(tmp_path: Path) -> None:
    path = tmp_path / "file.nc"
    path.write_bytes(b"something else")
    result = CliRunner().invoke(app, ["diagnose", str(path)])
    assert result.exit_code == 2
    assert result.stdout == ""


def test_modes_of_a_skewed_parameter_are_told() -> None:
    """Whose largest draws would hide any distance."""
    groups = healthy()
    tau = np.exp(rng().normal(size=groups["posterior"]["tau"].shape))
    groups["posterior"]["tau"] = tau * np.array([1.0, 50.0, 1.0, 50.0])[:, None]
    finding = next(found for found in diagnose(tree(groups)) if found.kind == "modes")
    assert "for tau, chains 0 and 2 stay near" in finding.what and "chains 1 and 3 stay near" in finding.what


def test_a_large_parameter_is_looked_at_whole() -> None:
    groups = healthy()
    groups["posterior"]["reward"] = rng().normal(size=(CHAINS, DRAWS, 40, 25))
    groups["posterior"]["reward"][1, :, 31, 7] += 4
    posterior = tree(groups)
    (finding,) = diagnose(posterior)
    assert finding.kind == "modes"
    assert "reward[31,7]" in finding.what


def test_a_posterior_of_nuts_has_nothing_wrong() -> None:
    def model(heads: torch.Tensor) -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
        pyro.deterministic("odds", bias.exp())
        with pyro.plate("throw", len(heads)):
            pyro.sample("landed", dist.Bernoulli(logits=bias), obs=heads)

    heads = (torch.arange(40) % 3 == 0).double()
    posterior = pirl.fit(model, heads, num_chains=2, num_warmup=100, num_samples=300, seed=1, progress=False)
    assert kinds(posterior) == []


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("chains", "draws"), [(1, 30), (2, 4), (2, 5), (3, 7), (4, 37), (4, 200), (16, 25), (64, 10)])
@pytest.mark.parametrize("kind", ["independent", "slow", "alternating", "with ties"])
def test_the_numbers_are_those_of_arviz(chains: int, draws: int, kind: str) -> None:
    values = autoregressive({"slow": 0.9, "alternating": -0.7}.get(kind, 0.0), (chains, draws, 3, 2))
    values = np.round(values) if kind == "with ties" else values
    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_allclose(ess_bulk(values), array_stats.ess(values, **axes), rtol=1e-9)
        np.testing.assert_allclose(
            ess_tail(values), array_stats.ess(values, method="tail", prob=(0.05, 0.95), **axes), rtol=1e-9
        )
        if chains > 1:
            # Where folded draws are constant, the larger of the two is the other; ArviZ may say NaN.
            expected = array_stats.rhat(values, **axes)
            np.testing.assert_allclose(np.where(np.isnan(expected), np.nan, rhat(values)), expected, rtol=1e-9)
        if chains % 2 == 0 and chains > 2:
            groups = np.repeat(np.arange(chains // 2), 2)
            expected = array_stats.rhat_nested(values, superchain_ids=groups, **axes)
            np.testing.assert_allclose(nested_rhat(values, chains // 2), expected, rtol=1e-9)


def nested_by_loops(draws: np.ndarray, num_superchains: int) -> float:
    """Nested R-hat as Margossian et al. (2024) define it, sum by sum."""
    chains, count = draws.shape
    size = chains // num_superchains
    chain_means = [sum(chain) / count for chain in draws]
    means, within = [], 0.0
    for k in range(num_superchains):
        members = range(k * size, (k + 1) * size)
        mean = sum(chain_means[c] for c in members) / size
        means.append(mean)
        if size > 1:
            within += sum((chain_means[c] - mean) ** 2 for c in members) / (size - 1)
        if count > 1:
            within += sum(sum((x - chain_means[c]) ** 2 for x in draws[c]) / (count - 1) for c in members) / size
    centre = sum(means) / num_superchains
    between = sum((mean - centre) ** 2 for mean in means) / (num_superchains - 1)
    return float(np.sqrt(1 + between / (within / num_superchains)))


@pytest.mark.parametrize(("superchains", "chains", "draws"), [(2, 6, 5), (4, 4, 9), (3, 12, 1), (5, 20, 2)])
def test_nested_rhat_is_its_definition(superchains: int, chains: int, draws: int) -> None:
    values = rng().normal(size=(chains, draws, 3)) + np.arange(chains)[:, None, None] / chains
    expected = [nested_by_loops(values[..., i], superchains) for i in range(3)]
    np.testing.assert_allclose(nested_rhat(values, superchains, rank=False), expected, rtol=1e-12)


def test_nested_rhat_of_independent_draws_follows_its_law() -> None:
    """B M N / sigma^2 is chi-squared over its K - 1 degrees of freedom; W is about sigma^2 (1 + 1/N)."""
    superchains, size, draws, repeats = 5, 8, 10, 4000
    values = rng().normal(size=(superchains * size, draws, repeats))
    excess = (nested_rhat(values, superchains, rank=False) ** 2 - 1) * size * draws * (1 + 1 / draws)
    # Such a ratio has mean 1 and variance 2/(K - 1). That W is estimated, from about 400 numbers, adds 2/400 of each:
    # E[1/W] = 1 + Var[W].
    share = 2 / (superchains * size * draws)
    variance = 2 / (superchains - 1)
    assert abs(excess.mean() - 1) < 5 * np.sqrt(variance / repeats) + 2 * share
    # The kurtosis of a chi-squared with 4 degrees of freedom is 3 + 12/4.
    assert abs(excess.var() / variance - 1) < 5 * np.sqrt((6 - 1) / repeats) + 10 * share
    # By that law 0.978 of such runs keep the limit above the floor, and 0.868 would keep 1.01; ranks change little.
    ranked = nested_rhat(values, superchains)
    limit = allowed_rhat(superchains * size, draws, superchains)
    assert limit == pytest.approx(np.sqrt(1.01**2 + 1 / 80))
    assert (ranked < limit).mean() > 0.95
    assert (ranked < 1.01).mean() < 0.9


def test_displaced_superchains_disagree() -> None:
    values = rng().normal(size=(32, 25))
    assert nested_rhat(values, 8) < allowed_rhat(32, 25, 8)
    values[4:8] += 1.0
    assert nested_rhat(values, 8) > allowed_rhat(32, 25, 8)
    # With as many superchains as chains both statistics judge alike, chain by chain.
    apart = rng().normal(size=(4, 500, 200)) + np.linspace(0, 0.4, 4)[:, None, None] * np.linspace(0, 1, 200)
    count, between = 500, apart.mean(1).var(0, ddof=1)
    plain = np.sqrt((count - 1) / count + between / apart.var(1, ddof=1).mean(0))
    agree = nested_rhat(apart, 4, rank=False) < allowed_rhat(4, count, 4)
    assert 20 < agree.sum() < 180
    np.testing.assert_array_equal(agree, plain < allowed_rhat(4, count))


def test_chains_that_share_starts_are_judged_by_superchains() -> None:
    attrs = {**NUTS, "engine": "chees", "num_superchains": 8}
    groups = healthy(chains=64, draws=50)
    assert kinds(tree(groups, attrs)) == []
    assert Convergence.of(Elements.of(tree(groups)["posterior"].to_dataset()), 8).nested
    groups["posterior"]["weights"][8:16] += 3.0
    (finding,) = diagnose(tree(groups, attrs))
    assert finding.kind == "modes"
    assert "chains 0 to 7 and 16 to 63 stay near" in finding.what
    # A number that does not divide the chains is no reason to stop.
    assert diagnose(tree(healthy(chains=6), {**attrs, "num_superchains": 4})) == []


@pytest.mark.parametrize("superchains", [1, 5, 0])
def test_superchains_have_one_size(superchains: int) -> None:
    with pytest.raises(ValueError, match="superchains of one size"):
        nested_rhat(np.zeros((8, 10)), superchains)


def test_enough_draws_are_a_hundred_a_chain_up_to_four() -> None:
    assert [wanted_ess(n) for n in (1, 2, 4, 5, 64)] == [100, 200, 400, 400, 400]


def test_what_is_identified_is_told_beside_chains_that_disagree_elsewhere() -> None:
    draws = rng().normal(size=(4, 400, 2))
    draws[:, :, 0] += [[0.0], [0.2], [0.0], [0.3]]
    (found,) = [
        x
        for x in diagnose(tree({"posterior": {"weights": draws}}, {**NUTS, "identified_rhat": 1.004}))
        if x.kind == "rhat"
    ]
    assert "On what demonstrations identify, R-hat is 1.004." in found.what
    (found,) = [x for x in diagnose(tree({"posterior": {"weights": draws}})) if x.kind == "rhat"]
    assert "identify" not in found.what
