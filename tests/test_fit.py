"""The front door: arguments, dtype and device, what the model is shown, and what is kept about the run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pirl import errors
from pirl.fit import fit
from pirl.infer import get_engine
from pirl.setting import leaves

TINY: dict[str, Any] = {"num_chains": 1, "num_warmup": 30, "num_samples": 4, "num_prior": 3,
                        "num_posterior_predictive": 4, "progress": False}  # fmt: skip


@dataclass(frozen=True)
class Recordings:
    """A stand-in for demonstrations: values, or only how many."""

    values: Tensor | None
    count: int

    def __len__(self) -> int:
        return self.count

    def as_tensor(self) -> Tensor | None:
        return self.values

    def unobserved(self) -> Recordings:
        return replace(self, values=None)

    def constant_data(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        return {"lengths": (("episode",), np.arange(self.count))}


@dataclass(frozen=True)
class World:
    """A stand-in for a decision problem: it has a dtype and a device, moves, and describes itself."""

    table: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        return self.table.device

    def to(self, device: Any = None, dtype: Any = None) -> World:
        return World(self.table.to(device=device, dtype=dtype))

    def constant_data(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        return {"table": (("state", "action"), self.table.numpy())}


seen: list[tuple[bool, torch.dtype, torch.dtype]] = []


def model(recordings: Recordings, world: World, features: Tensor, index: Tensor | None = None) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"dims": ["feature"]})
    seen.append((recordings.as_tensor() is None, weights.dtype, features.dtype))
    with pyro.plate("episode", len(recordings)):
        loc = (features @ weights).sum() + world.table.sum()
        pyro.sample("values", dist.Normal(loc, 1.0), obs=recordings.as_tensor())


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Recordings, World, Tensor]:
    return Recordings(torch.zeros(3, dtype=dtype), 3), World(torch.ones(2, 2, dtype=dtype) / 4), torch.eye(2)


def test_the_model_is_simulated_without_its_observations() -> None:
    seen.clear()
    result = fit(model, *inputs(), **TINY)
    blind = [hidden for hidden, _, _ in seen]
    assert blind[0] is False and True in blind
    assert result.posterior_predictive["values"].dims == ("chain", "draw", "episode")
    assert dict(result.prior_predictive.sizes) == {"chain": 1, "draw": 3, "episode": 3}


def test_constant_data_comes_from_arguments() -> None:
    result = fit(model, *inputs(), torch.arange(4), dims={"features": ["state", "feature"]},
                 coords={"feature": ["near", "far"]}, **TINY)  # fmt: skip
    constant = result.constant_data
    assert {name: constant[name].dims for name in constant.data_vars} == {
        "lengths": ("episode",),
        "table": ("state", "action"),
        "features": ("state", "feature"),
        "index": ("index_dim_0",),
    }
    assert list(constant["feature"].values) == ["near", "far"] == list(result.posterior["feature"].values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_first_argument_that_has_one(dtype: torch.dtype) -> None:
    seen.clear()
    result = fit(model, *inputs(dtype), **TINY)  # the features are float32
    assert {(latent, features) for _, latent, features in seen} == {(dtype, dtype)}
    assert result.posterior["weights"].dtype == str(dtype).removeprefix("torch.") == result.attrs["dtype"]
    assert torch.get_default_dtype() == torch.float32


def test_dtype_can_be_given_and_integers_stay() -> None:
    seen.clear()
    index = torch.arange(2)
    recordings, world, features = inputs(torch.float32)
    result = fit(model, replace(recordings, values=recordings.values.double()), world, features, index,
                 dtype=torch.float64, device="cpu", **TINY)  # fmt: skip
    assert seen[0][1:] == (torch.float64, torch.float64)
    assert result.constant_data["index"].dtype == np.int64
    assert world.table.dtype == torch.float32  # the caller's object is not touched


def test_what_lists_and_dictionaries_hold_is_an_argument_too() -> None:
    """It moves, decides about the precision, and is not shown where the model is simulated; one object stays one."""
    seen.clear()
    recordings, world, features = inputs(torch.float32)
    same = list[bool]()

    def several(groups: list[Recordings], worlds: dict[str, World], features: tuple[Tensor, ...]) -> None:
        same.append(worlds["here"] is worlds["there"] and worlds["here"].table is not world.table)
        with pyro.poutine.scale(scale=1.0):
            model(groups[0], worlds["here"], features[0])

    given = [recordings], {"here": world, "there": world}, (features.double(),)
    result = fit(several, *given, **TINY)
    assert {(weights, known) for _, weights, known in seen} == {(torch.float32, torch.float32)}
    assert seen[0][0] is False and any(hidden for hidden, _, _ in seen)
    assert set(result.posterior_predictive["values"].values.ravel()) != {0.0}  # it was observed to be 0
    fit(several, *given, dtype=torch.float64, **TINY)
    assert same[-1] and world.table.dtype == torch.float32  # the caller's object is not touched


def test_what_holds_itself_is_refused() -> None:
    """It would be looked through without end; what is there twice is no such thing."""
    endless: list[Any] = [torch.zeros(2)]
    endless.append({"again": endless})
    with pytest.raises(errors.OptionError, match="a list that holds itself"):
        fit(model, endless, **TINY)
    twice = [torch.zeros(2)]
    fit(lambda data: pyro.sample("x", dist.Normal(0.0, 1.0)), [twice, twice], **TINY)


def test_arguments_that_the_model_lacks_are_named() -> None:
    recordings, world, _ = inputs()
    for given in ((recordings, world), (recordings, world, 1, 2, 3)):
        with pytest.raises(errors.OptionError, match=r"the model is model\(recordings.*: .*argument.*; give its"):
            fit(model, *given, **TINY)


WARNS = """
import warnings

import pirl, pyro, torch
import pyro.distributions as dist

def wide_and_narrow():
    peaks = dist.Normal(torch.zeros(2), torch.tensor([0.1, 5.0]))
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), peaks))

def model():
    pirl.Trajectories([], [])  # within a model
    pyro.sample("x", dist.Normal(0.0, torch.tensor(1.0)))

within = {"__name__": "pirl.within", "torch": torch, "warn": pirl.errors.warn}
exec("@torch.no_grad()\\ndef told():\\n    warn('here', UserWarning)", within)
beside = {"__name__": "pirl.beside", "told": within["told"]}
exec("def tells():\\n    told()", beside)
tells = beside["tells"]

few = {"engine": "laplace", "num_samples": 50, "num_prior": 0, "num_posterior_predictive": 0}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    pirl.Trajectories([], [])  # a call
    pirl.Trajectories.from_episodes([])  # a function further
    pirl.fit(wide_and_narrow, resample=True, **few)  # deep in a fit
    pirl.fit(model, **few)
    tells()  # with torch in between
    exec("tells()", {"__name__": None, "tells": tells})  # where Python itself tells nothing
lines = open(__file__).read().splitlines()
for warning in told:
    assert warning.filename == __file__, warning
    print(lines[warning.lineno - 1].partition("  # ")[2])
"""


def test_warnings_point_at_lines_of_the_user(tmp_path: Path) -> None:
    """However deep within pirl, and in what it stands on; in a process of its own, where no test looks at calls."""
    script = tmp_path / "script.py"
    script.write_text(WARNS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    places = list(dict.fromkeys(done.stdout.splitlines()))
    told = ["a call", "a function further", "deep in a fit", "within a model", "with torch in between"]
    assert places == told, done.stderr


def test_what_several_lists_hold_is_looked_at_once() -> None:
    held: list[Any] = [1.0]
    for _ in range(60):  # more than could be looked at one by one
        held = [held, held]
    assert list(leaves([held, 2.0, held])) == [1.0, 2.0]


def test_a_model_that_cannot_be_simulated_is_refused_before_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its demonstrations are hidden then; what would be lost is a posterior of hours."""

    def stacked(groups: list[Recordings]) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        seen = torch.stack([group.as_tensor() for group in groups])  # type: ignore[misc]
        with pyro.plate("episode", len(seen)):
            pyro.sample("seen", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=seen)

    groups = [Recordings(torch.zeros(3), 3)] * 2
    fit(stacked, groups, **TINY | {"num_prior": 0, "num_posterior_predictive": 0})

    def sampled(*args: Any, **options: Any) -> None:
        raise AssertionError("was sampled")

    monkeypatch.setattr(sys.modules["pirl.fit"], "get_engine", lambda name: wraps(get_engine(name))(sampled))
    for kept in ("num_prior", "num_posterior_predictive"):
        with pytest.raises(errors.ModelError, match=r"cannot simulate, where demonstrations are hidden .* num_prior=0"):
            fit(stacked, groups, **TINY | {"num_prior": 0, "num_posterior_predictive": 0} | {kept: 3})


def test_a_model_without_arguments_runs_in_float64() -> None:
    result = fit(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), **TINY)
    assert result.posterior["x"].dtype == np.float64


def test_keywords_of_the_model() -> None:
    recordings, world, features = inputs()
    options = TINY | {"num_prior": 0, "num_posterior_predictive": 0, "seed": 9}
    results = [
        fit(model, recordings, world, features, **options),
        fit(model, recordings, world=world, features=features, **options),
        fit(model, model_kwargs={"recordings": recordings, "world": world, "features": features}, **options),
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other.posterior["weights"], results[0].posterior["weights"])


def test_keyword_recordings_are_hidden_too() -> None:
    recordings, world, features = inputs()
    seen.clear()
    fit(model, world=world, features=features, recordings=recordings, **TINY)
    assert True in [hidden for hidden, _, _ in seen]


def test_modules_among_the_arguments_are_copied() -> None:
    network = torch.nn.Linear(1, 1)
    before = [parameter.detach().clone() for parameter in network.parameters()]

    def learned(network: torch.nn.Module) -> None:
        pyro.module("network", network)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(network(loc[..., None]).squeeze(-1), 1.0), obs=torch.ones(3))

    with pytest.warns(errors.ConvergenceWarning, match="still grows"):
        fit(learned, network, engine="svi", max_steps=100, num_particles=1, **TINY)
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.dtype == torch.float32
    with pytest.raises(errors.ModelError, match="is a pyro.param"):
        fit(learned, network, **TINY)


def test_thinning_keeps_every_nth_draw() -> None:
    options = TINY | {"num_samples": 7, "num_posterior_predictive": 0, "num_prior": 0}
    all_draws = fit(model, *inputs(), **options).posterior["weights"].values
    thinned = fit(model, *inputs(), thin=3, **options)
    np.testing.assert_array_equal(thinned.posterior["weights"].values, all_draws[:, ::3])
    assert thinned.sample_stats.sizes["draw"] == 3


def test_attributes_tell_how_the_numbers_came_about() -> None:
    attrs = fit(model, *inputs(), seed=17, **TINY).attrs
    assert attrs["engine"] == "chees" and attrs["seed"] == 17
    assert (attrs["num_chains"], attrs["tuning_steps"], attrs["num_samples"]) == (1, 30, 4)
    assert attrs["inference_library"] == "pirl" and attrs["wall_time"] >= attrs["sampling_time"] > 0
    assert {"inference_library_version", "pyro_version", "torch_version", "arviz_base_version", "created_at"} <= set(
        attrs
    )
    assert attrs["device"] == "cpu" and attrs["dtype"] == "float64"


@pytest.mark.parametrize("name", ["num_chains", "num_samples", "thin"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(errors.OptionError, match=f"{name} is 0"):
        fit(model, *inputs(), **TINY | {name: 0})


def test_no_bar_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    fit(model, *inputs(), **TINY | {"progress": True})
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_everything_is_restored_after_an_error() -> None:
    def broken() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise RuntimeError("broken")

    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        fit(broken, **TINY)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert torch.distributions.Distribution._validate_args is True


@pytest.mark.parametrize("device", ["meta", "vulkan", "cuda:99", "abacus"])
def test_devices_that_cannot_be_computed_on_are_refused(device: str) -> None:
    """Some backends that torch names are nowhere, and "meta" has shapes without numbers."""
    with pytest.raises(errors.OptionError, match=r"^[^\n]{20,160}: use .*'cpu'"):
        fit(model, *inputs(), device=device, **TINY)


def test_a_forgotten_device_is_told() -> None:
    """The run happens under the device of the arguments as torch's default: a model's own tensors follow it."""

    def on(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        assert torch.zeros(()).device == x.device

    with torch.device("meta"):
        result = fit(on, torch.zeros(2, device="cpu"), **TINY | {"num_prior": 0, "num_posterior_predictive": 0})
    assert result.attrs["device"] == "cpu"


def test_parameters_without_a_law_cost_prior_draws_and_not_the_posterior() -> None:
    """Trajectory reading, no horizon: half of the prior has an infinite partition function."""
    import pirl
    from pirl.datasets import simulate
    from pirl.errors import ConvergenceWarning

    mdp = pirl.TabularMDP([[[0.8, 0.2]], [[0.0, 1.0]]], initial=0, terminal=[1])
    demos = simulate(mdp, torch.tensor([[-0.5], [0.0]], dtype=torch.float64), 20, 200, reading="trajectory")

    def model(demos: pirl.Trajectories) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        reward = torch.stack([weight, torch.zeros_like(weight)], -1)
        with pyro.plate("episode", len(demos)):
            pyro.sample("seen", pirl.MaxEntTrajectory(mdp, reward, lengths=demos.lengths), obs=demos.as_tensor())

    with pytest.warns(ConvergenceWarning, match="drawn again"):
        posterior = pirl.fit(model, demos, engine="laplace", num_samples=5, num_prior=20, num_starts=1, progress=False)
    assert posterior.prior.sizes["draw"] == 20
    assert posterior.attrs["num_samples"] == posterior.posterior.sizes["draw"]
    assert posterior.attrs["num_chains"] == 1


def test_what_a_model_raises_is_what_is_said_with_its_cause() -> None:
    def mends() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        try:
            raise errors.InvalidRewardError("which the model sees to")
        except errors.InvalidRewardError:
            _ = {}["typo"]

    def fails() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        try:
            _ = 1 / 0
        except ZeroDivisionError as error:
            raise errors.InvalidRewardError("the reward failed") from error

    with pytest.raises(KeyError, match="typo"):
        fit(mends, progress=False)
    with pytest.raises(errors.InvalidRewardError, match="^the reward failed$") as caught:
        fit(fails, progress=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
