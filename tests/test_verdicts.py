"""Verdicts on studies: sound posteriors pass, unsound ones are called what they are, in words and figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pirl
from pirl.errors import (
    NonFiniteError,
    OptionError,
)
from pirl.infer import Potential
from pirl.infer.engine import Draws
from pirl.plots import plot_ranks, plot_recovery
from pirl.plots.style import ORANGE
from pirl.replicates import check_study
from pirl.uniformity import holm, p_values
from pirl.verdicts import _coverage, is_calibrated, judge, print_verdicts, stays_in_bands, verdicts, words
from tests.studies import DATA, SCALE, exact, module, normal, study


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
    assert (
        told[0].startswith("Nothing leaves its band, which says little")
        and "Of 100% of the posteriors R-hat" in told[1]
    )


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
    for count in (20, 19):
        few = study(monkeypatch, exact(blind=True), num_replicates=count)
        assert any("the data tell little" in line for line in words(few, verdicts(few))) == (count == 20)
        assert verdicts(few)["contraction"].isna().all() == (count < 20)
    deaf = study(monkeypatch, exact(blind=True, width=0.1))  # sure of itself, whatever the data
    told = words(deaf, verdicts(deaf))
    assert any(line.startswith("Posteriors of mu are narrow and do not follow the truth") for line in told)


def test_truths_with_heavy_tails_are_followed_by_their_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ratio has no variance: neither correlation nor contraction mean anything."""
    heavy = {"heavy": lambda draws, data: torch.sinh(8 * draws["mu"])}
    found = study(monkeypatch, exact(), quantities=heavy, num_replicates=60)
    table = verdicts(found)
    table.loc["heavy", "correlation"] = 0.05
    assert not any("tell little" in line for line in words(found, table))
    found["recovery"]["heavy"].loc[{"summary": "sd"}] *= 1e3
    print_verdicts(found)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("heavy")]
    assert " <-1 " in row


def test_all_that_data_do_not_tell_of_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    luck = torch.Generator().manual_seed(0)
    noise = {"noise": lambda draws, data: torch.randn(len(draws["mu"]), 25, generator=luck, dtype=torch.float64)}
    found = study(monkeypatch, exact(), quantities=noise, num_replicates=30)
    (line,) = [line for line in words(found, verdicts(found)) if "tell little" in line]
    named = line.count("noise[") + int(line.split(" and ")[1].split()[0])
    assert named >= 22  # each of 25 is further off than 2 standard errors with probability 5%


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


def test_several_quantities_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(study(monkeypatch, exact(width=0.8)))
    assert len(found) == 2
    np.testing.assert_array_equal(found["p_adjusted"], holm(found["p_value"].to_numpy()))
    assert not found["p_adjusted"].equals(found["p_value"])


def test_coverage_counts_whole_ranks() -> None:
    every = np.arange(40)  # each rank once, of 39 draws
    assert [_coverage(every, 39, level) for level in (0.5, 0.9)] == [0.5, 0.9]
    assert [_coverage(np.array([rank]), 39, 0.9) for rank in (1, 2, 37, 38)] == [0, 1, 1, 0]
