"""Groups, dims and coordinates of the result, and what ArviZ makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from torch import Tensor

from pirl import errors
from pirl.fit import fit

SMALL: dict[str, Any] = {"num_chains": 2, "num_warmup": 60, "num_samples": 50, "progress": False, "seed": 1}


def schools(y: Tensor, sd: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        effect = pyro.deterministic("effect", mu + tau * raw)
        pyro.sample("y", dist.Normal(effect, sd), obs=y)


Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
SD = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


@pytest.fixture(scope="module")
def posterior() -> xarray.DataTree:
    return fit(
        schools, Y, SD, engine="nuts", coords={"school": list("ABCDEFGH")}, dims={"sd": ["school"]},
        num_posterior_predictive=40, num_prior=30, **SMALL,
    )  # fmt: skip


def test_groups_variables_and_dims(posterior: xarray.DataTree) -> None:
    expected = {
        "posterior": {"mu": (), "tau": (), "raw": ("school",), "effect": ("school",)},
        "log_prior": {"mu": (), "tau": (), "raw": ("school",)},
        "log_likelihood": {"y": ("school",)},
        "posterior_predictive": {"y": ("school",)},
        "prior": {"mu": (), "tau": (), "raw": ("school",), "effect": ("school",)},
        "prior_predictive": {"y": ("school",)},
        "sample_stats": dict.fromkeys(
            ["lp", "energy", "tree_depth", "n_steps", "step_size", "acceptance_rate", "diverging"], ()
        ),
    }
    for group, variables in expected.items():
        found = {name: variable.dims for name, variable in posterior[group].data_vars.items()}
        assert found == {name: ("chain", "draw", *dims) for name, dims in variables.items()}, group
    assert dict(posterior["posterior"].sizes) == {"chain": 2, "draw": 50, "school": 8}
    assert dict(posterior["posterior_predictive"].sizes) == {"chain": 2, "draw": 20, "school": 8}
    assert dict(posterior["prior"].sizes) == {"chain": 1, "draw": 30, "school": 8}
    assert posterior["observed_data"]["y"].dims == ("school",)
    assert posterior["constant_data"]["sd"].dims == ("school",)
    assert posterior["constant_data"]["y"].dims == ("y_dim_0",)
    assert list(posterior["posterior"]["school"].values) == list("ABCDEFGH")


def test_numbers_agree_with_each_other(posterior: xarray.DataTree) -> None:
    draws = posterior.posterior
    np.testing.assert_allclose(draws["effect"], draws["mu"] + draws["tau"] * draws["raw"], rtol=1e-12)
    expected = dist.Normal(torch.as_tensor(draws["effect"].values), SD).log_prob(Y)
    np.testing.assert_allclose(posterior.log_likelihood["y"], expected, rtol=1e-12)
    tau = torch.as_tensor(draws["tau"].values)
    np.testing.assert_allclose(
        posterior.log_prior["tau"], dist.HalfCauchy(torch.tensor(5.0, dtype=tau.dtype)).log_prob(tau), rtol=1e-12
    )
    joint = sum(posterior.log_prior[name].sum(set(posterior.log_prior[name].dims) - {"chain", "draw"})
                for name in ("mu", "tau", "raw")) + posterior.log_likelihood["y"].sum("school")  # fmt: skip
    np.testing.assert_allclose(posterior.sample_stats["lp"], joint + np.log(tau.numpy()), rtol=1e-10)  # tau = exp(z)


def test_statistics_of_nuts_are_consistent(posterior: xarray.DataTree) -> None:
    stats = posterior.sample_stats
    assert (stats["tree_depth"] == np.floor(np.log2(stats["n_steps"] + 1))).all()
    assert (stats["energy"] > -stats["lp"]).all()  # kinetic energy is positive
    # K = p'p/2 in 10 dims has mean 5 and variance 5 at stationary momenta; 100 draws.
    assert abs(float((stats["energy"] + stats["lp"]).mean()) - 5) < 4 * np.sqrt(5 / 100) + 0.5
    assert ((stats["acceptance_rate"] > 0) & (stats["acceptance_rate"] <= 1)).all()
    assert (stats["step_size"].std("draw") == 0).all()  # frozen after warm-up


def test_predictive_draws_belong_to_their_posterior_draws() -> None:
    """As many draws as members of the plate, where Pyro's parallel predictive goes wrong silently."""

    def model(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 100.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(level, 1e-3), obs=y)

    result = fit(model, torch.zeros(6, dtype=torch.float64), num_chains=1, num_warmup=30, num_samples=6, seed=1,
                 num_posterior_predictive=6, num_prior=6, progress=False)  # fmt: skip
    for latent, predictive in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        away = np.abs(result[predictive]["y"] - result[latent]["level"])
        assert float(away.max()) < 6e-3, latent
        assert float(result[predictive]["y"].std("row").min()) > 1e-5, latent  # rows are drawn apart


def test_prior_draws_follow_the_prior(posterior: xarray.DataTree) -> None:
    result = fit(schools, Y, SD, engine="laplace", num_starts=1, num_samples=10, num_prior=2000,
                 num_posterior_predictive=0, progress=False, seed=4)  # fmt: skip
    assert "posterior_predictive" not in result
    mu = result.prior["mu"].values
    assert abs(mu.mean()) < 4 * 5 / np.sqrt(2000) and abs(mu.std() / 5 - 1) < 4 / np.sqrt(2 * 2000)
    assert np.median(result.prior["tau"]) == pytest.approx(5.0, rel=0.2)
    # y - effect ~ N(0, sd): observed sites are drawn, too
    noise = (result.prior_predictive["y"] - result.prior["effect"]) / SD.numpy()
    assert abs(float(noise.std()) - 1) < 4 / np.sqrt(2 * 16_000)


def test_nested_plates_event_dims_and_default_names() -> None:
    y = torch.zeros(3, 2, 4, dtype=torch.float64)

    class Path3(dist.Normal):
        """An observed law that names the dims of its event itself."""

    def model() -> None:
        pyro.sample("table", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2), infer={"dims": ["row", "column"]})
        pyro.sample("plain", dist.Normal(0.0, 1.0).expand([2]))
        pyro.sample("shares", dist.Dirichlet(torch.ones(3)), infer={"dims": ["part"]})
        with pyro.plate("subject", 3, dim=-2):
            own = pyro.sample("own", dist.Normal(0.0, 1.0))
            with pyro.plate("episode", 2, dim=-1):
                law = Path3(own[..., None], torch.ones(3, 1, 4)).to_event(1)
                law.event_dim_names = ("step",)
                pyro.sample("paths", law.expand([3, 2]), obs=y)

    result = fit(model, coords={"part": ["a", "b", "c"]}, num_posterior_predictive=4, num_prior=3,
                 **SMALL | {"num_samples": 4})  # fmt: skip
    dims = {name: variable.dims[2:] for name, variable in result.posterior.data_vars.items()}
    assert dims == {
        "table": ("row", "column"), "plain": ("plain_dim_0",), "shares": ("part",), "own": ("subject", "own_dim_0")
    }  # fmt: skip
    assert result.log_likelihood["paths"].dims[2:] == ("subject", "episode")
    assert result.observed_data["paths"].dims[:2] == ("subject", "episode")
    assert result.posterior_predictive["paths"].dims[2:4] == ("subject", "episode")
    assert result.log_prior["table"].dims == ("chain", "draw")


def test_a_distribution_names_its_event_dims() -> None:
    class Walk(dist.TorchDistribution):
        """A toy trajectory: integer pairs [T, 2], drawn with a given chance; it knows the sum of its log densities."""

        arg_constraints: dict[str, Any] = {}
        support = torch.distributions.constraints.boolean
        event_dim_names = ("step", "state_action")

        def __init__(self, logit: Tensor, batch: torch.Size = torch.Size()) -> None:  # noqa: B008
            self.logit = logit
            super().__init__(batch, torch.Size([5, 2]), validate_args=False)

        def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Walk:
            return Walk(self.logit, torch.Size(batch_shape))

        def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
            chance = torch.sigmoid(self.logit).expand(sample_shape + self.batch_shape + self.event_shape)
            return torch.bernoulli(chance).long()

        def log_prob(self, value: Tensor) -> Tensor:
            return (value * self.logit - torch.nn.functional.softplus(self.logit)).sum((-1, -2))

        def log_prob_sum(self, value: Tensor) -> Tensor:
            return value.sum() * self.logit - value.numel() * torch.nn.functional.softplus(self.logit)

    def model(walks: Tensor) -> None:
        logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
        with pyro.plate("episode", len(walks)):
            pyro.sample("walks", Walk(logit), obs=walks)

    walks = torch.ones(7, 5, 2, dtype=torch.long)
    result = fit(model, walks, num_posterior_predictive=10, num_prior=5, **SMALL)
    assert result.observed_data["walks"].dims == ("episode", "step", "state_action")
    assert result.posterior_predictive["walks"].dims == ("chain", "draw", "episode", "step", "state_action")
    assert result.posterior_predictive["walks"].dtype == np.int64
    assert result.log_likelihood["walks"].dims == ("chain", "draw", "episode")
    np.testing.assert_allclose(
        result.log_likelihood["walks"].sum("episode"),
        70 * np.log(1 / (1 + np.exp(-result.posterior["logit"]))),
        rtol=1e-10,
    )


def test_bad_names_are_refused() -> None:
    def clash() -> None:
        with pyro.plate("x", 3):
            pyro.sample("x_site", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"dims": ["x_site"]})

    few = SMALL | {"num_prior": 0, "num_posterior_predictive": 0, "num_warmup": 10**6}  # told before sampling
    with pytest.raises(errors.ModelError, match="'x_site' names a dim"):
        fit(clash, **few)
    with pytest.raises(errors.OptionError, match=r"coords\['school'\] has 2 labels, but the dim has size 8"):
        fit(schools, Y, SD, coords={"school": ["a", "b"]}, **few)
    with pytest.raises(errors.OptionError, match="coords has labels for 'pupil'.*school"):
        fit(schools, Y, SD, coords={"pupil": ["a", "b"]}, **few)
    with pytest.raises(errors.ModelError, match="'mu' has 0 dims, but 1 names"):
        fit(schools, Y, SD, dims={"mu": ["a"]}, **few)
    for name, dim in (("raw", "draw"), ("sd", "chain")):
        with pytest.raises(errors.ModelError, match=f"'{name}' has a dim '{dim}', as results have of their own"):
            fit(schools, Y, SD, dims={name: [dim]}, **few)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # 100 draws are few
def test_arviz_statistics_run_unchanged(posterior: xarray.DataTree) -> None:
    import arviz_stats

    assert list(arviz_stats.summary(posterior, var_names=["mu", "tau"]).index) == ["mu", "tau"]
    loo = arviz_stats.loo(posterior)
    assert loo.n_data_points == 8 and np.isfinite(loo.elpd)
    assert set(arviz_stats.psense_summary(posterior, var_names=["mu"])) >= {"prior", "likelihood"}


@pytest.mark.parametrize(
    "plot", ["plot_trace_dist", "plot_forest", "plot_ppc_dist", "plot_prior_posterior", "plot_energy"]
)
def test_arviz_plots_run_unchanged(posterior: xarray.DataTree, plot: str) -> None:
    import arviz_plots
    import matplotlib.pyplot as plt

    options: dict[str, Any] = {} if plot == "plot_energy" else {"var_names": ["mu", "tau"]}
    if plot == "plot_ppc_dist":
        options = {"num_samples": 20}
    getattr(arviz_plots, plot)(posterior, backend="matplotlib", **options)
    plt.close("all")


@pytest.mark.parametrize("library", ["h5netcdf", None])
def test_a_file_keeps_everything(posterior: xarray.DataTree, tmp_path: Path, library: Any) -> None:
    posterior.to_netcdf(tmp_path / "posterior.nc", engine=library)
    with xarray.open_datatree(tmp_path / "posterior.nc", engine=library) as back:
        assert set(back.children) == set(posterior.children)
        for group in posterior.children:
            xarray.testing.assert_equal(back[group].to_dataset(), posterior[group].to_dataset())
            assert dict(back[group].attrs) == dict(posterior[group].attrs)
        assert dict(back.attrs) == dict(posterior.attrs)
    assert {type(value) for value in posterior.attrs.values()} <= {str, int, float}


def test_tables_of_arviz_give_each_element_its_own_numbers(tmp_path: Path) -> None:
    """A vector before a matrix with a plate to its left: ArviZ labels by the dataset's order of dims."""
    import arviz_stats

    def model() -> None:
        mean = pyro.sample("a_mean", dist.Normal(0.0, 0.1).expand([2]).to_event(1), infer={"dims": ["what"]})
        centre = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
        with pyro.plate("subject", 2):
            pyro.sample("w", dist.Normal(mean + centre, 0.1).to_event(1), infer={"dims": ["what"]})

    posterior = fit(model, engine="laplace", num_samples=50, num_prior=0, num_posterior_predictive=0, progress=False)
    posterior.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "posterior.nc", engine="h5netcdf") as read:
        for tree in (posterior, read.load()):
            table = arviz_stats.summary(tree, round_to="none")
            means = tree.posterior["w"].mean(("chain", "draw"))
            for subject in range(2):
                for what in range(2):
                    found = float(table.loc[f"w[{subject}, {what}]", "mean"])
                    assert abs(found - float(means[subject, what])) < 1e-9


def test_a_reparametrised_site_is_kept_and_is_no_observation() -> None:
    from pyro.infer.reparam import LocScaleReparam

    @pyro.poutine.reparam(config={"w": LocScaleReparam(0.0)})
    def model(data: torch.Tensor) -> None:
        with pyro.plate("subject", 3):
            w = pyro.sample("w", dist.Normal(1.0, 2.0))
            pyro.sample("seen", dist.Normal(w, 1.0), obs=data)

    posterior = fit(model, torch.tensor([1.0, 2.0, 3.0]), engine="laplace", num_samples=50, progress=False)
    assert posterior.posterior["w"].dims == ("chain", "draw", "subject")
    assert set(posterior.log_likelihood.data_vars) == {"seen"}
