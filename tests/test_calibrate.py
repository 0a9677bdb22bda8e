"""``pirl.calibrate``: truths and data, what cannot be studied, and the command line."""

from __future__ import annotations

import warnings
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
from pirl.errors import (
    ConvergenceWarning,
    DiscreteLatentError,
    MemoryLimitError,
    ModelError,
    OptionError,
)
from pirl.infer import Potential
from pirl.infer.engine import Draws
from pirl.model_file import ModelFile
from pirl.replicates import Study
from pirl.setting import Setting
from pirl.verdicts import is_calibrated
from tests.studies import DATA, SCALE, exact, module, normal, study


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


def test_an_engine_complains_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = exact()

    def uneasy(potential: Potential, **options: Any) -> Draws:
        warnings.warn("not quite", ConvergenceWarning, stacklevel=2)
        return sound(potential, **options)

    with pytest.warns(ConvergenceWarning, match="not quite") as caught:
        study(monkeypatch, uneasy, num_replicates=5)
    assert len([one for one in caught if issubclass(one.category, ConvergenceWarning)]) == 1


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

    with pytest.raises(
        ModelError, match="does not run on its arguments.*at test_calibrate.py:[0-9]+.*its arguments, data, scale"
    ):
        pirl.calibrate(ordered, {"all": 1.0}, DATA, **sizes)


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
