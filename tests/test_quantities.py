"""What studies compare: ranks and ties, quantities of a user, what a model records, differences of returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from pirl.envs import gridworld
from pirl.errors import (
    CheckpointError,
    ModelError,
    OptionError,
)
from pirl.infer import Potential
from pirl.infer import checkpoint as checkpoints
from pirl.infer.engine import Draws
from pirl.plots import plot_ranks, plot_recovery
from pirl.quantities import own_quantities, ranked
from pirl.replicates import Study
from pirl.setting import Setting
from pirl.study_rows import COLUMNS
from pirl.verdicts import verdicts
from tests.studies import DATA, SCALE, exact, module, normal, study


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


def test_ties_are_broken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    sign = {"sign": lambda draws, data: (draws["mu"] > data["x"].mean()).double()}
    table = verdicts(study(monkeypatch, exact(), quantities=sign))
    assert table.loc["sign", "finding"] == "uniform"


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
    with pytest.raises(ModelError, match="quantity 'q' raised ZeroDivisionError .at test_quantities.py:[0-9]+.$"):
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
