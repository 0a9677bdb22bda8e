"""``pirl.calibrate``: sound posteriors pass, unsound ones are called what they are, and studies can be resumed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from pirl.cli import app
from pirl.envs import gridworld, gridworld_features
from pirl.errors import (
    CheckpointError,
    CheckpointWarning,
    ConvergenceWarning,
    DiscreteLatentError,
    InterruptedWarning,
    MemoryLimitError,
    ModelError,
    NonFiniteError,
    OptionError,
)
from pirl.infer import Potential
from pirl.infer import checkpoint as checkpoints
from pirl.infer.engine import Draws
from pirl.infer.replicated import ReplicatedPotential, run_all
from pirl.model_file import ModelFile
from pirl.plots import plot_ranks, plot_recovery
from pirl.plots.style import ORANGE
from pirl.quantities import own_quantities, ranked
from pirl.replicates import Study, check_study
from pirl.setting import Setting
from pirl.study_rows import COLUMNS
from pirl.uniformity import holm, p_values
from pirl.verdicts import _coverage, is_calibrated, judge, print_verdicts, stays_in_bands, verdicts, words

module = sys.modules["pirl.calibrate"]  # whose name the function has
SCALE = 0.5
DATA = torch.zeros(4, dtype=torch.float64)


def normal(data: Tensor) -> None:
    """One mean, four measurements: the posterior is normal, with mean sum / (4 + SCALE^2) and known sd."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("item", len(data)):
        pyro.sample("x", dist.Normal(mu, SCALE), obs=data)


def exact(shift: float = 0.0, width: float = 1.0, blind: bool = False) -> Callable[..., Draws]:
    """An engine for :func:`normal`: independent draws of its posterior, spoilt as asked."""

    def run(potential: Potential, *, num_chains: int, num_warmup: int, num_samples: int, seed: int, **_: Any) -> Draws:
        observed = potential.sites["x"].value
        assert observed is not None
        precision = 1 + len(observed) / SCALE**2
        mean, sd = observed.sum() / SCALE**2 / precision, precision**-0.5
        if blind:
            mean, sd = torch.tensor(0.0), 1.0
        noise = torch.randn(num_chains, num_samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Draws({"mu": mean + shift * sd + width * sd * noise}, unconstrained=True)

    return run


def study(monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Draws], **options: Any) -> Any:
    monkeypatch.setattr(module, "get_engine", lambda name: engine)
    given: dict[str, Any] = {"num_replicates": 200, "engine": "laplace", "progress": False, **options}
    return pirl.calibrate(normal, DATA, **given)


# ------------------------------------------------------------------------------------------------------- verdicts


def test_exact_posteriors_are_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(monkeypatch, exact())
    table = verdicts(found)
    assert list(table.index) == ["mu", "log_likelihood"] and is_calibrated(found)
    for level in (50, 90):
        share = level / 100
        assert table.loc["mu", f"coverage_{level}"] == pytest.approx(
            share, abs=4.5 * (share * (1 - share) / 200) ** 0.5
        )
    # Posterior variance 1 / 17 of a prior variance 1: known to the error of 200 truths' variance.
    assert table.loc["mu", "contraction"] == pytest.approx(1 - 1 / 17, abs=4.5 * (2 / 200) ** 0.5 / 17)
    assert table.loc["mu", "correlation"] == pytest.approx((1 - 1 / 17) ** 0.5, abs=0.02)


@pytest.mark.parametrize(
    ("spoilt", "finding"),
    [
        (exact(shift=0.4), "posterior too high"),
        (exact(shift=-0.4), "posterior too low"),
        (exact(width=0.7), "posterior too narrow"),
        (exact(width=1.5), "posterior too wide"),
        (exact(shift=0.4, width=0.5), "posterior too narrow and high"),
    ],
)
def test_unsound_posteriors_are_called_what_they_are(
    monkeypatch: pytest.MonkeyPatch, spoilt: Callable[..., Draws], finding: str
) -> None:
    found = study(monkeypatch, spoilt)
    assert verdicts(found).loc["mu", "finding"] == finding
    assert not is_calibrated(found)
    told = words(found, verdicts(found))
    assert finding in told[0]
    assert not any("A sound study" in line for line in told)  # of 200 replicates, with p-values of 1e-4 and less


def test_few_ranks_have_the_spread_of_few_ranks() -> None:
    """Of two ranks the variance is 1/16 and not 1/12: a shift is not a spread as well."""
    assert judge(np.repeat([0, 1], [140, 60])[:, None], 1, ["mu"]).loc["mu", "finding"] == "posterior too high"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_table_is_whole_on_any_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    found = study(monkeypatch, exact(shift=0.4, width=0.5))
    monkeypatch.setenv("COLUMNS", str(columns))
    print_verdicts(found)
    told = capsys.readouterr().out
    for word in ("adjusted", "covers", "log_likelihood", "<.001"):
        assert word in told
    assert "\N{HORIZONTAL ELLIPSIS}" not in told and ("corre-" in told) == (columns > 80)


def test_a_file_has_room_for_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = study(monkeypatch, exact(shift=0.4, width=0.5), num_replicates=40)
    monkeypatch.delenv("COLUMNS", raising=False)
    print_verdicts(found)
    told = capsys.readouterr().out
    assert "corre-" in told and "posterior too narrow and high" in told


def test_what_made_a_study_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def elsewhere(parameters: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
        return {"data": 3 + parameters["mu"] + SCALE * torch.randn(4, dtype=torch.float64)}

    monkeypatch.setattr(module, "check_options", lambda *_: None)
    found = study(monkeypatch, exact(), num_replicates=40, draw_data=elsewhere, init="laplace")
    print_verdicts(found)
    told = capsys.readouterr().out
    assert "normal: 40 replicates by laplace, 1 chain of 200 draws, ranks among 99" in told
    assert "init='laplace', data by elsewhere, seed 0." in told
    assert "is wrong there, what elsewhere draws is not the model's, or it approximates" in told


@pytest.mark.parametrize("num_draws", [19, 39, 99])
def test_intervals_of_recovery_hold_as_many_truths_as_the_table_says(
    monkeypatch: pytest.MonkeyPatch, num_draws: int
) -> None:
    """To the last replicate, however few the draws, as the quantiles are order statistics."""
    found = study(monkeypatch, exact(width=0.6), num_draws=num_draws)
    recovery, truth = found["recovery"].to_dataset(), found["prior"]["mu"].values
    low, high = (recovery["mu"].sel(summary=name).values for name in ("q5", "q95"))
    assert ((low < truth) & (truth < high)).mean() == verdicts(found).loc["mu", "coverage_90"]


def test_chains_that_are_too_short_are_the_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where chains disagree, nobody knows whether the model or the engine is wrong."""
    found = study(monkeypatch, exact(width=0.5))
    assert "The model or engine" in words(found, verdicts(found))[0]
    found["sample_stats"]["rhat"].values[:] = 1.2
    assert not any("chains" in line for line in words(found, verdicts(found)))  # laplace has none
    found.attrs["engine"] = "chees"
    told = words(found, verdicts(found))
    assert "The chains are too short" in told[0] and any("chains disagree" in line for line in told)
    well = study(monkeypatch, exact())
    well.attrs["engine"] = "chees"
    assert words(well, verdicts(well))[0].startswith("Calibrated, as far as")
    well["sample_stats"]["rhat"].values[0, ::10] = 1.2
    told = words(well, verdicts(well))
    assert told[0].startswith("Calibrated on the whole, as far as") and "In 10% of the posteriors chains" in told[1]
    well["sample_stats"]["rhat"].values[:] = 1.0
    well["sample_stats"]["ess"].values[0, ::10] = 49.0
    told = words(well, verdicts(well))
    assert told[0].startswith("Calibrated on the whole, as far as") and "10% of the posteriors have fewer" in told[1]


def test_chains_of_which_nothing_is_known_are_not_taken_for_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(monkeypatch, exact(), num_chains=40, num_samples=3)
    found.attrs["engine"] = "chees"
    assert np.isnan(found["sample_stats"]["rhat"]).all()
    told = words(found, verdicts(found))
    point = study(monkeypatch, exact(width=0.0), num_replicates=2, num_draws=9)  # of draws that are all the same
    assert np.isnan(point["sample_stats"]["ess"]).all() and np.isnan(point["sample_stats"]["rhat"]).all()
    assert told[0].startswith("Calibrated on the whole") and "Of 100% of the posteriors R-hat is unknown" in told[1]


def test_likelihoods_that_differ_by_rounding_alone_are_ties() -> None:
    """The truth is evaluated by itself and draws many at once, which round to one side: an exact posterior failed."""

    def blind(x: Tensor, y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("item", len(x)):
            pyro.sample("y", dist.Normal(x @ weights, 1.3), obs=y)

    sizes = {"engine": "laplace", "num_replicates": 60, "num_draws": 39, "progress": False}
    found = pirl.calibrate(blind, torch.zeros(30, 2, dtype=torch.float64), torch.zeros(30).double(), **sizes)
    assert found["recovery"]["log_likelihood"].sel(summary="sd").max() < 1e-12
    assert verdicts(found).loc["log_likelihood", "p_value"] > 1e-3
    assert 0.3 < found["ranks"]["log_likelihood"].mean() / 39 < 0.7  # 5.2 standard errors of 60 uniform ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1.0, -1e5])
def test_what_differs_in_its_last_digits_is_a_tie_and_nothing_else_is(dtype: torch.dtype, size: float) -> None:
    eps = torch.finfo(dtype).eps
    draws = torch.full((2001,), size, dtype=dtype)
    draws[0] -= 2 * eps * max(abs(size), 1.0)
    torch.manual_seed(0)
    places = torch.tensor([int(ranked("log_likelihood", draws).rank) for _ in range(300)]) / 2000
    # Where a cell's edge comes between them, in one case of dozens (of float32), the truth is below them all.
    assert 0.4 < places.mean() < 0.6  # 6 standard errors of a uniform mean
    draws[1:] += eps**0.7 * max(abs(size), 1.0) * torch.arange(1, 2001)
    assert ranked("log_likelihood", draws).rank == 0
    assert ranked("log_likelihood", draws.flip(0)).rank == 2000


def test_ranks_of_sound_posteriors_are_uniform_however_coarse_the_numbers() -> None:
    """Of float32 log-likelihoods of a million hardly any two differ: ranks are random, and biased to no side."""
    torch.manual_seed(1)
    values = (1e6 + torch.randn(20, 4000)).float()
    ranks = ranked("log_likelihood", values).rank
    counts = np.bincount(ranks, minlength=20)
    assert np.square(counts - 200).sum() / 200 < 50  # chi squared of 19 degrees: 1.4e-4


def test_what_may_be_chance_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound studies leave their bands at 5%; of the first seeds one that does is told how often."""
    for seed in range(100):
        found = study(monkeypatch, exact(), seed=seed, num_replicates=20)
        told = words(found, verdicts(found))
        if not is_calibrated(found):
            break
    least = float(verdicts(found)["p_adjusted"].min())
    assert 0.001 < least < 0.05
    assert told[0].startswith("Not calibrated")
    assert told[1].startswith(f"A sound study departs as far with probability {least:.2g} at most: another seed")


def test_a_posterior_that_ignores_the_data_is_seen_by_the_log_likelihood_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior ranks its own draws uniformly; only a quantity of parameters and data shows it (Modrak et al. 2023)."""
    table = verdicts(study(monkeypatch, exact(blind=True)))
    assert table.loc["mu", "finding"] == "uniform"
    assert table.loc["log_likelihood", "finding"] == "posterior too low"  # of the truth's log-likelihood


def test_ties_are_broken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    sign = {"sign": lambda draws, data: (draws["mu"] > data["x"].mean()).double()}
    table = verdicts(study(monkeypatch, exact(), quantities=sign))
    assert table.loc["sign", "finding"] == "uniform"


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(monkeypatch, exact(), num_replicates=20)
    assert found.attrs["num_replicates"] == 20
    pit, rank = found["prior_sbc"]["mu"], found["ranks"]["mu"]
    assert pit.dims == ("chain", "draw") and pit.shape == (1, 20)
    assert np.array_equal(np.floor(pit.values * 100), rank.values)
    recovery = found["recovery"]["mu"]
    assert list(recovery["summary"].values) == ["mean", "sd", "q5", "q25", "q50", "q75", "q95"]
    low, high = recovery.sel(summary="q5").values, recovery.sel(summary="q95").values
    inside = (found["prior"]["mu"].values > low) & (found["prior"]["mu"].values < high)
    assert np.array_equal(inside[(rank > 5) & (rank < 94)], np.ones(int(((rank > 5) & (rank < 94)).sum()), bool))


def test_arviz_draws_it_and_so_does_pirl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from arviz_plots import plot_ecdf_pit

    found = study(monkeypatch, exact(width=0.5), num_replicates=100)
    plot_ecdf_pit(found, backend="none")
    for draw, panels in ((plot_ranks, 2), (plot_recovery, 1)):
        figure = draw(found)
        figure.savefig(tmp_path / "figure.png")
        assert len(figure.axes) == panels
    titles = [ax.get_title() for ax in plot_ranks(found).axes]
    assert titles[0] == "mu (leaves the band)"


def test_what_few_replicates_and_one_draw_do_not_tell_is_a_dash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = study(monkeypatch, exact(), num_replicates=3, num_draws=1)
    assert np.isnan(found["recovery"]["mu"].sel(summary="sd").values).all()
    print_verdicts(found)
    told = capsys.readouterr().out
    assert "nan" not in told and " - too few to tell" in told


@pytest.mark.parametrize("other", ["sound", "unsound"])
def test_figures_mark_what_the_verdict_names(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """A p-value between 5% and half of it, of two: the verdict depends on the other, drawn or not (Holm 1979)."""
    found = study(monkeypatch, exact(), num_replicates=60, num_draws=19)
    even = np.arange(60) % 20
    for moved in range(60):
        ranks = np.where(np.arange(60) < moved, 0, even)
        if p_values(ranks, 19) < 0.05:
            break
    assert p_values(ranks, 19) > 0.025
    found["ranks"]["log_likelihood"].values[0] = ranks
    found["ranks"]["mu"].values[0] = even if other == "sound" else 0
    table = verdicts(found)
    assert (table["finding"] == "uniform").tolist() == [other == "sound"] * 2
    for names in (None, ["mu"], ["log_likelihood"]):
        for ax in plot_ranks(found, names=names).axes:
            name = ax.get_title().removesuffix(" (leaves the band)")
            marked = table.loc[name, "finding"] != "uniform"
            line = ax.get_lines()[1]
            edge = ax.collections[0].get_paths()[0].vertices
            limits = [edge[np.isclose(edge[:, 0], x), 1] for x in line.get_xdata()]
            within = [y.min() - 1e-9 <= at <= y.max() + 1e-9 for y, at in zip(limits, line.get_ydata(), strict=True)]
            assert ax.get_title().endswith(" (leaves the band)") == marked == (not all(within))
            assert (line.get_color() == ORANGE) == marked
            dots = [x for more in ax.get_lines()[2:] for x in more.get_xdata()]
            assert dots == [x for x, inside in zip(line.get_xdata(), within, strict=True) if marked and not inside]


# ------------------------------------------------------------------------------------------------- truths and data


def test_replicates_are_the_same_for_the_same_number_and_leave_the_generator() -> None:
    setting = Setting.of((DATA,), {})
    with setting.entered():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first, again, other = (
            Study(normal, setting).draw(3),
            Study(normal, setting).draw(3),
            Study(normal, setting).draw(4),
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.data["x"], again.data["x"]) and not torch.equal(first.data["x"], other.data["x"])


def test_what_cannot_be_simulated_is_refused() -> None:
    def factored(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", -(mu - data).square().sum())

    def blind(data: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="draw_data"):
        pirl.calibrate(factored, DATA, engine="laplace", num_replicates=2)
    with pytest.raises(ModelError, match="observes nothing"):
        pirl.calibrate(blind, DATA, engine="laplace", num_replicates=2)

    def forgets(demos: pirl.Trajectories) -> None:  # obs=, so that its simulations would pass
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        with pyro.plate("episode", len(demos)):
            pyro.sample("walk", pirl.MaxCausalEntTrajectory(pirl.TabularMDP([[[1.0]]], [1.0], horizon=2), mu))

    walks = pirl.Trajectories([[0, 0]], [[0, 0]])
    with pytest.raises(ModelError, match="'walk' does not observe the demonstrations: give obs="):
        pirl.calibrate(forgets, walks, engine="laplace", num_replicates=2)

    def counts(demos: pirl.Trajectories) -> None:  # whose demonstrations are no data
        rate = pyro.sample("rate", dist.Gamma(2.0, torch.tensor(1.0)))
        pyro.sample("visits", dist.Poisson(rate * len(demos)))

    assert "visits" in Study(counts, Setting.of((walks,), {})).draw(0).data

    def draw_data(parameters: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
        return {"data": parameters["mu"] + 0.5**0.5 * torch.randn_like(arguments["data"])}

    # Demonstrations reach draw_data as a plan: as long as they were to be watched, not as they were.
    def planned(demos: pirl.Trajectories) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        assert demos.as_tensor() is not None
        pyro.factor("likelihood", mu * demos.as_tensor()[0, 0, 0])

    def redraw(parameters: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
        assert arguments["demos"].as_tensor() is None and arguments["demos"].lengths.tolist() == [5]
        return {"demos": pirl.Trajectories([[0]], [[0]])}

    short = pirl.Trajectories([[0]], [[0]], limits=[5])
    assert Study(planned, Setting.of((short,), {}), draw_data=redraw).draw(0).arguments["demos"] is not None

    found = pirl.calibrate(factored, DATA, engine="laplace", num_replicates=60, draw_data=draw_data, progress=False)
    assert is_calibrated(found)  # exp(-(mu - x)^2) is a normal density of variance 1/2


def test_what_a_fit_does_is_what_a_study_hears() -> None:
    """A model that asks whether there are data must do the same with them and without."""
    mdp = pirl.TabularMDP([[[1.0], [1.0]]], [1.0], horizon=3)

    def walks(demos: pirl.Trajectories, gain: float = 1.0, sd: float = 1.0) -> None:
        seen = demos.as_tensor()
        gain, sd = (1.0, 1.0) if seen is None else (gain, sd)
        mu = pyro.sample("mu", dist.Normal(0.0, sd))
        reward = gain * torch.stack([mu, -mu])[None]
        with pyro.plate("episode", len(demos)):
            pyro.sample("walk", pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths), obs=seen)

    many = pirl.Trajectories([[0, 0, 0]] * 3, [[0, 0, 0], [0, 0, 1], [1, 1, 0]])
    shorter = pirl.Trajectories([[0, 0, 0], [0]], [[0, 0, 0], [1]], limits=[3, 3])
    sizes: dict[str, Any] = {"engine": "laplace", "num_replicates": 2, "num_draws": 9, "progress": False}
    for demos in (many, shorter):
        assert pirl.calibrate(walks, demos, **sizes).attrs["num_replicates"] == 2
    for site, two_faced in (("walk", {"gain": 2.0}), ("mu", {"sd": 3.0})):
        with pytest.raises(ModelError, match=f"site '{site}' has .* must not depend on whether there are data"):
            pirl.calibrate(walks, many, model_kwargs=two_faced, **sizes)


def test_hidden_discrete_sites_are_no_data() -> None:
    def mixture(data: Tensor | None) -> None:
        kind = pyro.sample("kind", dist.Categorical(torch.full((2,), 0.5)))
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0])[kind], 1.0))
        pyro.sample("x", dist.Normal(mu, SCALE).expand([4]).to_event(1), obs=data)

    with pytest.raises(DiscreteLatentError, match="'kind' is discrete: enumerate it"):
        pirl.calibrate(mixture, DATA, num_replicates=2, engine="laplace", progress=False)
    given = {"num_replicates": 2, "num_draws": 9, "engine": "laplace", "progress": False}
    assert (
        "mu" in pirl.calibrate(mixture, None, **given)["ranks"]
    )  # a plan alone does not say which of the two is hidden


def test_continuous_groups_within_a_list_are_data() -> None:
    """Hidden when the model is simulated, they would pass for parameters."""

    @dataclass
    class Group:
        values: Tensor | None

        def as_tensor(self) -> Tensor | None:
            return self.values

        def unobserved(self) -> Group:
            return Group(None)

    def grouped(groups: list[Group], data: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("data", dist.Normal(mean, 1.0).expand([4]).to_event(1), obs=data)
        for number, group in enumerate(groups):
            pyro.sample(f"y{number}", dist.Normal(mean, 1.0), obs=group.as_tensor())

    setting = Setting.of(([Group(torch.tensor(0.0)), Group(torch.tensor(1.0))], DATA), {})
    with setting.entered():
        truth = Study(grouped, setting).draw(0)
    assert set(truth.latent) == {"mean"} and set(truth.data) == {"data", "y0", "y1"}


def test_parameters_without_a_law_are_drawn_again() -> None:
    refused = list[float]()

    def partial(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if float(mu.detach()) < 0:
            refused.append(float(mu.detach()))
            raise pirl.errors.DivergenceError("no law here")
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, SCALE), obs=data)

    setting = Setting.of((DATA,), {})
    with setting.entered():
        studies = [Study(partial, setting) for _ in range(40)]
        refused.clear()
        truths = [each.draw(number) for number, each in enumerate(studies)]
    assert all(float(truth.latent["mu"]) >= 0 for truth in truths)
    assert len(refused) > 10


def test_options_out_of_range_are_named() -> None:
    for wrong, named in [
        ({"num_replicates": 0}, "num_replicates"),
        ({"num_chains": 1, "num_samples": 5}, "num_draws"),
        ({"nonsense": 1}, "nonsense"),
        ({"batch": 4}, "batch"),
        ({"coords": {"item": ["a"]}}, "item"),
        ({"quantities": {"odd": lambda draws, data: 1.0}}, "odd"),
    ]:
        with pytest.raises(OptionError, match=named):
            pirl.calibrate(normal, DATA, engine="laplace", progress=False, **wrong)


@pytest.mark.parametrize("much", ["num_samples", "num_replicates"])
def test_more_than_memory_holds_is_refused_before_sampling(monkeypatch: pytest.MonkeyPatch, much: str) -> None:
    def unasked(potential: Potential, **options: Any) -> Draws:
        raise AssertionError("was sampled")

    with pytest.raises(MemoryLimitError, match=f"{10**29}"):
        study(monkeypatch, unasked, num_chains=1, **{much: 10**29})


def failing(every: int) -> Callable[..., Draws]:
    sound, calls = exact(), [0]

    def run(potential: Potential, **options: Any) -> Draws:
        calls[0] += 1
        if calls[0] % every == 0:
            raise NonFiniteError("no start")
        return sound(potential, **options)

    return run


def test_failures_are_counted_and_no_study_with_failures_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(monkeypatch, failing(5), num_replicates=50)
    assert int(found["sample_stats"]["failed"].sum()) == 10
    assert not is_calibrated(found)
    told = words(found, verdicts(found))
    assert told[0].startswith("Not known to be calibrated: the ranks of 40 replicates stay in their band, but others f")
    assert "10 of 50 replicates failed: replicate 4: no start" in " ".join(told)
    with pytest.raises(NonFiniteError):  # what fails at once will always fail
        study(monkeypatch, failing(1), num_replicates=5)


def test_an_engine_complains_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = exact()

    def uneasy(potential: Potential, **options: Any) -> Draws:
        warnings.warn("not quite", ConvergenceWarning, stacklevel=2)
        return sound(potential, **options)

    with pytest.warns(ConvergenceWarning, match="not quite") as caught:
        study(monkeypatch, uneasy, num_replicates=5)
    assert len([one for one in caught if issubclass(one.category, ConvergenceWarning)]) == 1


@pytest.mark.parametrize("count", [5, 19, 20])
def test_few_replicates_are_called_too_few(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    found = study(monkeypatch, exact(), num_replicates=count)
    (first, *_) = words(found, verdicts(found))
    assert ("tell too little" in first) == (count < 20) and ("Calibrated" in first) == (count >= 20)
    assert stays_in_bands(found) and is_calibrated(found) == (count >= 20)


def test_what_the_data_do_not_tell_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The posterior of a parameter that no data depend on is its prior: calibrated, and worth a word."""
    whole = study(monkeypatch, exact())
    assert not any("the data tell little" in line for line in words(whole, verdicts(whole)))
    blind = study(monkeypatch, exact(blind=True))
    assert any(line.startswith("Of mu the data tell little") for line in words(blind, verdicts(blind)))
    # Twenty replicates cannot tell that, and a contraction is a ratio of two variances.
    for count in (20, 19):
        few = study(monkeypatch, exact(blind=True), num_replicates=count)
        assert not any("the data tell little" in line for line in words(few, verdicts(few)))
        assert verdicts(few)["contraction"].isna().all() == (count < 20)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (np.full((50, 1), 12), "ranks are 12 to 12, but of 9 draws 0 to 9"),
        (np.zeros((0, 1), int), "for 1 name: expected"),
        (np.zeros(50, int), "expected .replicate, quantity."),
        (np.zeros((50, 2), int), "for 1 name: expected"),
    ],
)
def test_ranks_that_are_none_are_not_judged(ranks: np.ndarray, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        judge(ranks, num_draws=9, names=["mu"])


def test_what_is_no_study_is_refused() -> None:
    posterior = pirl.fit(normal, DATA, engine="laplace", num_samples=10, progress=False)
    for wrong in (None, "study.nc", posterior):
        with pytest.raises(OptionError, match=r"give what pirl\.calibrate returned"):
            check_study(wrong)
    for reads in (verdicts, plot_ranks, plot_recovery):
        with pytest.raises(OptionError, match="this is a posterior, and no study"):
            reads(posterior)


# ------------------------------------------------------------------------------------------------------ checkpoints


def interrupted_after(count: int) -> Callable[..., Draws]:
    sound, calls = exact(), [0]

    def run(potential: Potential, **options: Any) -> Draws:
        calls[0] += 1
        if calls[0] > count:
            raise KeyboardInterrupt
        return sound(potential, **options)

    return run


def test_a_study_goes_on_where_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = study(monkeypatch, exact(), num_replicates=12)
    path = tmp_path / "study.ckpt"
    with pytest.warns(InterruptedWarning, match="after 5 replicates"):
        part = study(monkeypatch, interrupted_after(5), num_replicates=12, checkpoint=path)
    assert part.attrs["num_replicates"] == 5
    capsys.readouterr()
    print_verdicts(part)
    told = capsys.readouterr().out
    assert "normal: 5 replicates (of 12, interrupted) by laplace" in told and "too few to tell" in told
    assert "uniform" not in told and verdicts(part)["correlation"].isna().all()
    resumed = study(monkeypatch, interrupted_after(7), num_replicates=12, checkpoint=path)
    for group in ("ranks", "prior", "recovery", "prior_sbc", "sample_stats"):
        assert resumed[group].to_dataset().identical(whole[group].to_dataset().assign_attrs(resumed[group].attrs))
    assert "num_asked" not in resumed.attrs
    longer = study(monkeypatch, exact(), num_replicates=15, checkpoint=path)
    assert longer["ranks"]["mu"][:, :12].equals(whole["ranks"]["mu"])
    with pytest.raises(CheckpointError, match="another run"):
        study(monkeypatch, exact(), num_replicates=12, checkpoint=path, seed=1)
    with pytest.raises(CheckpointError, match="kind is 'calibration'"):
        pirl.fit(normal, DATA, engine="nuts", num_warmup=5, num_samples=5, checkpoint=path, progress=False)


# ---------------------------------------------------------------------------------------------- many data sets at once


def hierarchy(data: Tensor) -> None:
    """Means of groups, a scale, and a support that is not the whole line: dims of every kind."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    base = pyro.sample("base", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("group", 3):
        mu = pyro.sample("mu", dist.Normal(base.sum(-1), scale))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, 0.7), obs=data)


def problem(reading: str) -> tuple[Any, ...]:
    mdp = gridworld(3, 3, slip=0.2, horizon=5)
    features = gridworld_features(3, 3, num_features=2)
    law = pirl.MaxCausalEntTrajectory if reading == "causal" else pirl.MaxEntTrajectory
    lengths = torch.tensor([5, 5, 3, 2])
    table = law(mdp, pirl.linear_reward(features, torch.zeros(2, dtype=mdp.dtype)), lengths=lengths).sample()

    def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
        prior = dist.Normal(0.0, 2.0).expand([features.shape[-1]]).to_event(1)
        reward = pirl.linear_reward(features, pyro.sample("weights", prior))
        with pyro.plate("episode", len(demos)):
            pyro.sample("trajectories", law(mdp, reward, lengths=demos.lengths), obs=demos.as_tensor())

    return model, pirl.Trajectories(table[..., 0], table[:, :-1, 1], lengths), mdp, features


def stacked(model: Any, args: tuple[Any, ...], count: int) -> tuple[list[Potential], dict[str, Tensor]]:
    study = Study(model, Setting.of(args, {}))
    truths = [study.draw(number) for number in range(count)]
    data = {name: torch.stack([truth.data[name] for truth in truths]) for name in truths[0].data}
    return [study.potential(truth) for truth in truths], data


@pytest.mark.parametrize("case", ["hierarchy", "causal", "trajectory"])
def test_at_once_equals_one_by_one(case: str) -> None:
    model, *args = (hierarchy, torch.zeros(5, 3, dtype=torch.float64)) if case == "hierarchy" else problem(case)
    with Setting.of(args, {}).entered(), pyro.validation_enabled(False):
        potentials, data = stacked(model, tuple(args), 4)
        probes = torch.stack([potentials[0].flatten(potentials[0].prior_draw()) for _ in range(2)])
        target = ReplicatedPotential(potentials, model, data, probes, width=12)
        points = torch.randn(12, potentials[0].size)
        value, slope, _ = target(points)
        for row, point in enumerate(points):
            energy, gradient = potentials[row % 4].gradient(potentials[row % 4].unflatten(point))
            torch.testing.assert_close(value[row], energy, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(slope[row], potentials[0].flatten(gradient), rtol=1e-10, atol=1e-10)


def test_replicates_sampled_at_once_have_their_own_posteriors() -> None:
    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(normal, (DATA,), 20)
        found = run_all(potentials, normal, data, num_chains=16, num_warmup=100, num_samples=100, seed=1)
    precision = 1 + 4 / SCALE**2
    for draws, x in zip(found, data["x"], strict=True):
        mu = draws.values["mu"].numpy()
        error = precision**-0.5 / pirl.convergence.ess_bulk(mu) ** 0.5
        assert mu.mean() == pytest.approx(float(x.sum()) / SCALE**2 / precision, abs=4.5 * error)
        assert mu.std() == pytest.approx(precision**-0.5, rel=4.5 / (2 * pirl.convergence.ess_bulk(mu**2)) ** 0.5)


def test_chains_sampled_at_once_start_where_they_are_told() -> None:
    def far(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(50.0, 1.0))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, SCALE), obs=data)

    sizes = {"num_chains": 4, "num_warmup": 0, "num_samples": 1, "max_leapfrogs": 1, "seed": 1}
    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(far, (DATA,), 3)
        first = {
            # One step of a prior's or a box's size is refused where the posterior's sd is .24: chains stay there.
            init: torch.stack([draws.values["mu"] for draws in run_all(potentials, far, data, init=init, **sizes)])
            for init in ("prior", "uniform", "laplace")
        }
    assert first["prior"].min() > 40 and first["uniform"].abs().max() < 2 and len(first["uniform"].unique()) == 12
    precision = 1 + 4 / SCALE**2
    means = (50.0 + data["x"].sum(-1) / SCALE**2) / precision
    assert ((first["laplace"].mean(1).squeeze() - means).abs() < 4.5 * 2 / (4 * precision) ** 0.5).all()
    with pytest.raises(OptionError, match="batch=2 cannot be: init gives values, and many replicates start by one of"):
        pirl.calibrate(far, DATA, batch=2, init={"mu": torch.tensor(50.0)}, progress=False)
    with pytest.raises(OptionError, match="batch=2 cannot be: init is 'priors', and many replicates"):
        pirl.calibrate(far, DATA, batch=2, init="priors", progress=False)
    with pytest.raises(OptionError, match="batch=2 cannot be: with the option loop"):
        pirl.calibrate(far, DATA, batch=2, loop=True, progress=False)
    with pytest.raises(OptionError, match="batch=2 cannot be: the data are drawn by draw_data"):
        pirl.calibrate(far, DATA, batch=2, draw_data=lambda truth, given: {"data": DATA}, progress=False)


def test_one_chain_a_replicate_has_no_spread_to_learn_from() -> None:
    """Of one start torch has no standard deviation, and says so: a warning, which is an error here."""
    sizes = {"num_chains": 1, "num_warmup": 10, "num_samples": 9, "num_draws": 9, "progress": False}
    found = pirl.calibrate(normal, DATA, num_replicates=3, batch=3, **sizes)
    assert np.isfinite(found["recovery"]["mu"].sel(summary="mean")).all()


def test_models_that_mix_replicates_are_sampled_one_by_one() -> None:
    def mixing(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(weights[0] + weights[1], SCALE), obs=data)

    sizes = {"num_replicates": 2, "num_chains": 4, "num_warmup": 20, "num_samples": 30, "progress": False}
    with pytest.raises(ModelError, match="data sets at once.*; with batch=1 replicates are sampled one by one"):
        pirl.calibrate(mixing, DATA, batch=2, **sizes)
    assert pirl.calibrate(mixing, DATA, **sizes).attrs["num_replicates"] == 2


def test_progress_is_told_within_a_batch() -> None:
    shares = list[float]()
    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(normal, (DATA,), 3)
        run_all(potentials, normal, data, num_chains=4, num_warmup=20, num_samples=5, seed=1, told=shares.append)
    assert shares == pytest.approx([(k + 1) / 25 for k in range(25)])


# ---------------------------------------------------------------------------------------------------------- quantities


def scored(data: Tensor) -> None:
    """Says how likely data are, and cannot do without them."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("score", dist.Normal(mu, SCALE).log_prob(data.sort().values).sum())


def redrawn(latent: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    return {"data": dist.Normal(latent["mu"], SCALE).sample(torch.Size([4]))}


def test_data_may_be_drawn_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"engine": "laplace", "num_replicates": 4, "num_draws": 9, "progress": False}
    found = pirl.calibrate(scored, DATA, draw_data=redrawn, **sizes)
    assert list(found["ranks"].data_vars) == ["mu", "log_likelihood"]
    wrong: list[tuple[Any, str]] = [
        (lambda latent, arguments: {}, "must be a dictionary"),
        (lambda latent, arguments: {"datum": DATA}, r"returned \['datum'\].*some of data"),
        (lambda latent, arguments: None, "returned NoneType"),
    ]
    for drawn, told in wrong:
        with pytest.raises(OptionError, match=told):
            pirl.calibrate(scored, DATA, draw_data=drawn, **sizes)

    class Plan:
        """Demonstrations, of which a model sees only how many there are."""

        def sort(self) -> Any:
            return DATA.sort()

        def unobserved(self) -> None:
            return None

    with pytest.raises(ModelError, match="does not run without data.*draw_data="):
        pirl.calibrate(scored, Plan(), **sizes)

    def ordered(data: Tensor, scale: dict[str, float]) -> None:
        normal(data * scale["all"])

    with pytest.raises(ModelError, match="does not run on its arguments.*their order, data, scale"):
        pirl.calibrate(ordered, {"all": 1.0}, DATA, **sizes)


def test_names_of_quantities_and_dims_are_checked() -> None:
    sizes: dict[str, Any] = {"engine": "laplace", "num_replicates": 2, "num_draws": 9, "progress": False}
    for name in ("mu", "log_likelihood"):
        with pytest.raises(OptionError, match=f"{name!r}.*: leave (it|that quantity) out"):
            pirl.calibrate(normal, DATA, quantities={name: lambda draws, data: draws["mu"]}, **sizes)
    with pytest.raises(OptionError, match="dims names 'my'"):
        pirl.calibrate(normal, DATA, dims={"my": ["x"]}, **sizes)
    with pytest.raises(OptionError, match="batch is 0"):
        pirl.calibrate(normal, DATA, batch=0, **sizes)


def recorder(data: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu + torch.zeros(2), event_dim=1)
    with pyro.plate("item", len(data)):
        pyro.sample("x", dist.Normal(mu, SCALE), obs=data)


@pytest.mark.parametrize("dim", ["chain", "draw", "summary"])
def test_dims_that_a_study_has_itself_are_refused_before_sampling(monkeypatch: pytest.MonkeyPatch, dim: str) -> None:
    def unasked(potential: Potential, **options: Any) -> Draws:
        raise AssertionError("was sampled")

    monkeypatch.setattr(module, "get_engine", lambda name: unasked)
    pair = {"pair": lambda draws, data: draws["twice"]}
    for name in ("twice", "pair"):
        with pytest.raises(ModelError, match=f"{name!r} has a dim {dim!r}, as results have of their own"):
            pirl.calibrate(recorder, DATA, quantities=pair, dims={name: [dim]}, engine="laplace", progress=False)


def test_what_a_model_records_is_ranked_by_its_name() -> None:
    sizes: dict[str, Any] = {"engine": "laplace", "num_replicates": 3, "num_draws": 9, "progress": False}
    found = pirl.calibrate(recorder, DATA, quantities=["twice"], **sizes)
    ranks = found["ranks"].to_dataset()
    assert ranks["twice"].shape == (1, 3, 2)
    np.testing.assert_array_equal(ranks["twice"].values[..., 0], ranks["mu"].values)
    assert len(plot_ranks(found).axes) == 4
    assert [ax.get_title() for ax in plot_ranks(found, names=["mu", "twice[1]"]).axes] == ["mu", "twice[1]"]
    assert len(plot_recovery(found, names="twice").axes) == 2
    with pytest.raises(OptionError, match="names has 'nu'"):
        plot_ranks(found, names=["nu"])
    with pytest.raises(OptionError, match="'thrice' is not recorded"):
        pirl.calibrate(recorder, DATA, quantities=["thrice"], **sizes)


def test_a_study_of_other_quantities_is_another_study(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"engine": "laplace", "num_replicates": 3, "num_draws": 9, "progress": False}
    path = tmp_path / "study.ckpt"
    for _ in range(2):
        pirl.calibrate(recorder, DATA, checkpoint=path, quantities={"q": lambda draws, data: draws["mu"]}, **sizes)
    with pytest.raises(CheckpointError, match="another"):
        pirl.calibrate(recorder, DATA, checkpoint=path, quantities={"q": lambda draws, data: -draws["mu"]}, **sizes)


def test_a_study_that_is_terminated_saves_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, path = exact(), tmp_path / "study.ckpt"

    def killed(potential: Potential, *, seed: int, **options: Any) -> Draws:
        killed.calls += 1
        if killed.calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return engine(potential, seed=seed, **options)

    killed.calls = 0
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        study(monkeypatch, killed, num_replicates=6, checkpoint=path)
    assert left.value.code == 128 + signal.SIGTERM
    again_from = f"the same call goes on from {path}"
    assert capsys.readouterr().err == f"pirl: terminated after 3 replicates; {again_from}\n"
    assert signal.getsignal(signal.SIGTERM) == before
    again = study(monkeypatch, killed, num_replicates=6, checkpoint=path)
    assert killed.calls == 4 + 3  # three were saved
    whole = study(monkeypatch, engine, num_replicates=6)
    np.testing.assert_array_equal(again["ranks"]["mu"].values, whole["ranks"]["mu"].values)


def test_a_study_that_goes_on_keeps_its_quantities_apart(tmp_path: Path) -> None:
    """In whatever order they are asked for this time."""
    model, options = recorder, {"engine": "laplace", "num_draws": 9, "progress": False}

    def quantities(names: list[str]) -> dict[str, Callable[..., Tensor]]:
        return {name: lambda draws, data, sign=int(f"{name}1"): sign * draws["mu"] for name in names}

    asked = {"checkpoint": tmp_path / "study.ckpt", **options}
    pirl.calibrate(model, DATA, num_replicates=3, quantities=quantities(["+", "-"]), **asked)
    longer = pirl.calibrate(model, DATA, num_replicates=6, quantities=quantities(["-", "+"]), **asked)
    whole = pirl.calibrate(model, DATA, num_replicates=6, quantities=quantities(["+", "-"]), **options)
    for name in ("+", "-"):
        assert longer["ranks"][name].equals(whole["ranks"][name])
    assert not whole["ranks"]["+"].equals(whole["ranks"]["-"])


@pytest.mark.parametrize(
    ("quantities", "told"),
    [
        ({"twice"}, "a list of names"),  # whose order differs between processes
        ((name for name in ["twice"]), "a list of names"),
        (3, "a list of names"),
        ([3], "a list of names"),
        ({3: len}, "a list of names"),
        ({"draw": len}, "use the name 'draw' themselves: leave"),
        (["return_gap"], "use the name 'return_gap' themselves: leave"),
        ({"q": 3}, "'q' is an int: give a function"),
        (["mu"], "'mu' is a parameter, which is ranked already"),
        ({"mu": lambda draws, data: draws["mu"]}, "'mu' is a parameter, which is ranked already"),
        ({"twice": lambda draws, data: draws["mu"]}, "'twice' has the name of a site"),
    ],
)
def test_quantities_that_cannot_be_are_refused(quantities: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        found = own_quantities(quantities)
        pirl.calibrate(recorder, DATA, quantities=found, engine="laplace", num_replicates=2, num_draws=9)


def test_a_parameter_that_is_not_identified_is_ranked_where_asked_for() -> None:
    def model(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0), infer={"identified": False})
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, SCALE), obs=data)

    sizes: dict[str, Any] = {"engine": "laplace", "num_replicates": 2, "num_draws": 9, "progress": False}
    assert "mu" not in pirl.calibrate(model, DATA, **sizes)["ranks"]
    assert "mu" in pirl.calibrate(model, DATA, quantities=["mu"], **sizes)["ranks"]


def test_whose_function_failed_is_said() -> None:
    sizes: dict[str, Any] = {"engine": "laplace", "num_replicates": 2, "num_draws": 9, "progress": False}
    with pytest.raises(ModelError, match="quantity 'q' raised KeyError: 'nu'"):
        pirl.calibrate(normal, DATA, quantities={"q": lambda draws, data: draws["nu"]}, **sizes)
    with pytest.raises(ModelError, match="quantity 'q' raised ZeroDivisionError$"):
        pirl.calibrate(normal, DATA, quantities={"q": wordless}, **sizes)
    with pytest.raises(ModelError, match="draw_data raised KeyError: 'nu'"):
        pirl.calibrate(normal, DATA, draw_data=lambda truth, arguments: {"data": truth["nu"]}, **sizes)
    with pytest.raises(OptionError, match="missing a required argument: 'data'"):
        pirl.calibrate(normal, **sizes)
    with pytest.raises(OptionError, match="functions by name, or a list of names"):
        pirl.calibrate(normal, DATA, quantities="mu", **sizes)


def wordless(*_: Any) -> Any:
    raise ZeroDivisionError


def test_quantities_of_replicates_sampled_at_once_are_of_their_own_data() -> None:
    """The rank of the log-likelihood, from draws of the exact posterior, is as one by one."""
    with Setting.of((DATA,), {}).entered():
        study = Study(normal, Setting.of((DATA,), {}))
        truths = [study.draw(number) for number in range(3)]
        draws = [exact()(study.potential(t), num_chains=1, num_warmup=0, num_samples=39, seed=5) for t in truths]

        def given(potentials: list[Potential], *_: Any, **__: Any) -> list[Draws]:
            return draws

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run_all", given)
            found = pirl.calibrate(
                normal, DATA, num_replicates=3, num_draws=39, num_chains=1, num_samples=39, batch=3, progress=False
            )
        assert found.attrs["sampler"].startswith("HMC")
        for number, truth in enumerate(truths):
            mu, x = constrained(draws[number]), truth.data["x"]
            law = dist.Normal(torch.cat([truth.latent["mu"][None], mu])[:, None], SCALE)
            log_likelihood = law.log_prob(x).sum(-1)
            for name, value in (("mu", torch.cat([truth.latent["mu"][None], mu])), ("log_likelihood", log_likelihood)):
                assert found["ranks"][name].values[0, number] == int((value[1:] < value[0]).sum())
                assert found["prior"][name].values[0, number] == pytest.approx(float(value[0]), rel=1e-12)


def constrained(draws: Draws) -> Tensor:
    return draws.values["mu"].flatten()  # a real line is its own unconstrained space


def test_several_quantities_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(study(monkeypatch, exact(width=0.8)))
    assert len(found) == 2
    np.testing.assert_array_equal(found["p_adjusted"], holm(found["p_value"].to_numpy()))
    assert not found["p_adjusted"].equals(found["p_value"])


def test_coverage_counts_whole_ranks() -> None:
    every = np.arange(40)  # each rank once, of 39 draws
    assert [_coverage(every, 39, level) for level in (0.5, 0.9)] == [0.5, 0.9]
    assert [_coverage(np.array([rank]), 39, 0.9) for rank in (1, 2, 37, 38)] == [0, 1, 1, 0]


def test_models_that_give_other_densities_at_once_are_sampled_one_by_one() -> None:
    def turned(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = SCALE if mu.dim() == 0 else 2 * SCALE  # right shapes, wrong law
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, scale), obs=data)

    with Setting.of((DATA,), {}).entered():
        potentials, data = stacked(turned, (DATA,), 3)
        with pytest.raises(ModelError, match="other densities"):
            run_all(potentials, turned, data, num_chains=4, num_warmup=5, num_samples=5, seed=1)
    for options in ({"target_accept_prob": 5.0}, {"max_leapfrogs": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            pirl.calibrate(normal, DATA, num_replicates=2, progress=False, **options)


def test_fewer_replicates_leave_the_others_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "study.ckpt"
    whole = study(monkeypatch, exact(), num_replicates=30, checkpoint=path)
    before = path.read_bytes()
    few = study(monkeypatch, exact(), num_replicates=5, checkpoint=path)
    assert path.read_bytes() == before
    np.testing.assert_array_equal(few["ranks"]["mu"].values, whole["ranks"]["mu"].values[:, :5])
    spoilt = study(monkeypatch, exact(shift=9.0), num_replicates=30, checkpoint=path)  # nothing is made anew
    np.testing.assert_array_equal(spoilt["ranks"]["mu"].values, whole["ranks"]["mu"].values)


def test_what_is_sampled_one_by_one_goes_on_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, made = tmp_path / "study.ckpt", list[int]()
    own = Study.compare

    def compare(self: Study, number: int, *rest: Any) -> Any:
        made.append(number)
        if made == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return own(self, number, *rest)

    monkeypatch.setattr(Study, "compare", compare)
    monkeypatch.setattr(module, "run_all", lambda *_, **__: (_ for _ in ()).throw(ModelError("not at once")))
    monkeypatch.setattr(module, "get_engine", lambda name: exact())
    sizes: dict[str, Any] = {
        "num_replicates": 6,
        "num_draws": 39,
        "num_chains": 2,
        "checkpoint": path,
        "progress": False,
    }
    monkeypatch.setattr(module, "check_options", lambda *_: None)
    with pytest.warns(InterruptedWarning, match="after 3 replicates"):
        pirl.calibrate(normal, DATA, **sizes)
    assert pirl.calibrate(normal, DATA, **sizes).attrs["sampler"] == "chees"
    assert made == [0, 1, 2, 3, 3, 4, 5]


def test_a_full_disk_costs_no_replicates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Any, arrays: Any) -> None:
        raise CheckpointError("cannot be written: no space left")

    monkeypatch.setattr("pirl.infer.checkpoint.Checkpoint.save", full)
    with pytest.warns(CheckpointWarning, match="no space left; the study goes on"):
        found = study(monkeypatch, exact(), num_replicates=7, checkpoint=tmp_path / "study.ckpt")
    assert found.attrs["num_replicates"] == 7


def test_what_is_recorded_comes_in_the_order_of_the_model() -> None:
    """Processes, and runs that go on, agree about which number is whose."""

    def model(data: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0), infer={"identified": False})
        for name in ("z", "b", "y", "a"):
            pyro.deterministic(name, mu)
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(mu, SCALE), obs=data)

    found = pirl.calibrate(model, DATA, engine="laplace", num_replicates=2, num_draws=9, progress=False)
    assert list(found["ranks"].data_vars) == ["z", "b", "y", "a", "log_likelihood"]


def test_the_order_of_quantities_is_that_of_the_model_and_their_columns_are_by_name(tmp_path: Path) -> None:
    """Processes that began a study in other orders put their rows together."""
    path = tmp_path / "study.ckpt"
    options: dict[str, Any] = {"engine": "laplace", "num_draws": 9, "progress": False, "num_replicates": 2}
    signs = {"b": 1.0, "a": -1.0}
    own = {name: lambda draws, data, sign=sign: sign * draws["mu"] for name, sign in signs.items()}
    found = pirl.calibrate(normal, DATA, quantities=own, checkpoint=path, **options)
    assert list(found["prior"].data_vars) == ["mu", "log_likelihood", "b", "a"]
    a, b, _, mu = checkpoints.read(path)["rows"][:, 1 : 4 * COLUMNS : COLUMNS].T  # the truths
    for name, truths in (("a", a), ("b", b), ("mu", mu)):
        np.testing.assert_array_equal(found["prior"][name].values[0], truths)
    np.testing.assert_array_equal(a, -b)


def test_what_is_recorded_is_ranked_where_parameters_are_not_identified() -> None:
    def model(data: Tensor) -> None:
        factors = pyro.sample("factors", dist.Normal(1.0, 1.0).expand([2]).to_event(1), infer={"identified": False})
        product = pyro.deterministic("product", factors.prod(-1))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(product.unsqueeze(-1), SCALE), obs=data)

    found = pirl.calibrate(
        model, DATA, num_replicates=2, num_chains=4, num_warmup=20, num_samples=20, num_draws=9, progress=False
    )
    assert list(found["ranks"].data_vars) == ["product", "log_likelihood"]


def test_chains_are_compared_in_what_is_identified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them have both signs the other way round, which the product does not know."""

    def model(data: Tensor) -> None:
        factors = pyro.sample("factors", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"identified": False})
        product = pyro.deterministic("product", factors.prod(-1))
        with pyro.plate("item", len(data)):
            pyro.sample("x", dist.Normal(product.unsqueeze(-1), SCALE), obs=data)

    def mirrored(potential: Potential, *, seed: int, **_: Any) -> Draws:
        noise = torch.rand(4, 50, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        factors = noise * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
        return Draws({"factors": factors}, unconstrained=True, stats={"diverging": torch.zeros(4, 50)})

    monkeypatch.setattr(module, "get_engine", lambda name: mirrored)
    options: dict[str, Any] = {"num_replicates": 3, "num_chains": 4, "num_samples": 50, "progress": False}
    found = pirl.calibrate(model, DATA, engine="laplace", **options)
    # Of 200 independent draws: R-hat exceeds 1 by some hundredths; chains apart would have 3 and more.
    assert found["sample_stats"]["rhat"].max() < 1.2 and found["sample_stats"]["ess"].min() > 50


# -------------------------------------------------------------------------------------------------- return differences


def test_return_gaps_see_no_shaping() -> None:
    """r + phi(s) - g (P phi)(s, a) earns every policy as much more from p(s_1) on, so that the gap stays."""
    mdp = gridworld(3, 3, slip=0.2, discount=0.9)
    generator = torch.Generator().manual_seed(0)
    reward, phi = (torch.randn(*shape, generator=generator, dtype=mdp.dtype) for shape in ((9, 5), (9,)))
    shaped = reward + phi[:, None] - mdp.discount * mdp.transitions.expect(phi[:, None]).reshape(9, 5)
    lengths = torch.full((6,), 7)

    def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP) -> None:
        r = pyro.sample("r", dist.Normal(torch.zeros(9, 5, dtype=mdp.dtype), 1.0).to_event(2))
        with pyro.plate("episode", len(demos)):
            law = pirl.MaxCausalEntTrajectory(mdp, r, lengths=demos.lengths)
            pyro.sample("trajectories", law, obs=demos.as_tensor())

    table = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=lengths).sample()
    demos = pirl.Trajectories(table[..., 0], table[:, :-1, 1])
    potential = Potential(model, (demos, mdp))
    ((name, gap),) = pirl.quantities.return_gaps(potential, {"r": torch.stack([reward, shaped, 2 * reward])})
    assert name == "return_gap"
    torch.testing.assert_close(gap[1], gap[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gap[2], 2 * gap[0])
    assert gap[0] > 0  # who acts by exp r earns more than who acts for no reason


# -------------------------------------------------------------------------------------------------------- command line

MODEL = '''
"""A mean."""
import pyro, pyro.distributions as dist, torch

def model(data, scale):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("item", len(data)):
        pyro.sample("x", dist.Normal(mu, scale), obs=data)

def load(count: int = 4):
    return {"data": torch.zeros(count), "scale": 0.5}

defaults = {"engine": "laplace", "num_prior": 10}
'''


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_, warnings.catch_warnings():
        app(["calibrate", *arguments], prog_name="pirl")
    return int(exit_.value.code or 0)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mean.py"
    path.write_text(MODEL)
    names = [str(tmp_path / name) for name in ("study.nc", "ranks.png", "recovery.png")]
    files = ["--out", names[0], "--plot", names[1], "--recovery", names[2]]
    assert call(str(path), "--replicates", "40", *files) == 0
    told = capsys.readouterr().out
    assert "Calibrated, as far as 40 replicates can tell" in told and all(Path(name).is_file() for name in names)
    with pytest.raises(SystemExit) as done:
        app(["summary", names[0]], prog_name="pirl")
    assert not done.value.code and told == capsys.readouterr().out + "".join(f"wrote {name}\n" for name in names)
    saved = ["--checkpoint", str(tmp_path / "study.ckpt"), "--quantity", "twice", "--draws", "9"]
    for count in ("20", "21"):
        assert call(str(path), "--replicates", count, *saved) == 0
    out, err = capsys.readouterr()
    assert err == f"pirl: {saved[1]} has 20 of 21 replicates; the study goes on from there\n" and "twice" in out
    assert call(str(path), "--replicates", "20", *saved) == 0
    assert capsys.readouterr().err == f"pirl: {saved[1]} has all 20 replicates\n"
    assert call(str(path), "--batch", "2") == 2 and "engine 'laplace' samples repl" in capsys.readouterr().err
    chees = ["--engine", "chees", "--chains", "4", "--warmup", "5", "--samples", "5", "--draws", "9"]
    assert call(str(path), "--replicates", "2", *chees, "--batch", "2") == 0
    assert "by HMC of many replicates at once" in capsys.readouterr().out
    assert call(str(path), "--quantity", "thrice") == 2 and "'thrice' is not recorded" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        app(["diagnose", names[0]], prog_name="pirl")
    assert done.value.code == 2 and "pirl.files.read_result reads it" in capsys.readouterr().err
    drawn = {name: Path(name).read_bytes() for name in names[1:]}
    with pytest.raises(SystemExit) as done:
        app(["plot", names[0], "--out", names[1], "--recovery", names[2]], prog_name="pirl")
    assert not done.value.code and capsys.readouterr().out == "".join(f"wrote {name}\n" for name in names[1:])
    assert {name: Path(name).read_bytes() for name in names[1:]} == drawn
    monkeypatch.setattr(module, "get_engine", lambda name: exact(width=0.3))
    assert call(str(path), "--replicates", "40") == 1
    assert "Not calibrated: mu (posterior too narrow)" in capsys.readouterr().out
    assert call(str(path), "--draws", "100000") == 2
    assert "fewer than num_draws" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gridworld", ["rows=3", "cols=3", "num_features=2", "horizon=4", "num_demos=3"]),
        ("optimality_graphical_model", []),
        ("bus_engine", []),
        ("linear_gaussian", []),
        ("objectworld", ["size=3", "num_objects=4", "num_demos=10", "hidden=2"]),
    ],
)
def test_the_models_of_pirl_can_be_studied(name: str, settings: list[str]) -> None:
    """With the options, the names and the labels that their files give."""
    file = ModelFile.read(Path(__file__).parents[1] / "models" / f"{name}.py")
    options = file.options(settings)
    sizes = {"num_replicates": 2, "num_draws": 9, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = file.calibrate(options, {"engine": "laplace", **sizes})
    assert found is not None and "log_likelihood" in found["ranks"]
    if name in ("gridworld", "bus_engine"):
        short = {"engine": "chees", "num_chains": 4, "num_warmup": 5, "num_samples": 5, "batch": 2, **sizes}
        found = file.calibrate(options, short)
        assert found is not None and int(found["ranks"]["log_likelihood"].size) == 2


def test_names_of_arguments_dims_have_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_engine", lambda name: exact())
    given: dict[str, Any] = {"num_replicates": 2, "engine": "laplace", "num_draws": 9, "progress": False}
    pirl.calibrate(normal, DATA, dims={"data": ["place"]}, coords={"place": ["a", "b", "c", "d"]}, **given)
    with pytest.raises(OptionError, match="'plaice'"):
        pirl.calibrate(normal, DATA, dims={"data": ["place"]}, coords={"plaice": ["a"]}, **given)
