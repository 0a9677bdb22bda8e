"""One contract over all engines: right posteriors, labelled approximations, reproducible, no trace left."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.integrate import trapezoid
from torch import Tensor

from pirl import errors
from pirl.fit import fit
from pirl.infer import ENGINES, Draws, Potential, get_engine
from pirl.infer.engine import own_generator
from pirl.infer.hmc import Metric
from pirl.infer.importance import weighed
from pirl.infer.nuts import Nuts, _Guessed
from pirl.infer.ranks import ALONE
from pirl.infer.start import guarded
from pirl.setting import Setting

F64 = torch.float64
FEW: dict[str, Any] = {"num_prior": 0, "num_posterior_predictive": 0, "progress": False}


def regression_data() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[1.0, t, t * t - 2] for t in torch.linspace(-2, 2, 20).tolist()], dtype=F64)
    return x, torch.sin(3 * torch.arange(20, dtype=F64)) + x[:, 1]


def regression(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1), infer={"dims": ["feature"]})
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, 0.8), obs=y)


def regression_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, covariance and log evidence in closed form."""
    covariance = torch.linalg.inv(torch.eye(3, dtype=F64) + x.T @ x / 0.64)
    marginal = 0.64 * torch.eye(20, dtype=F64) + x @ x.T
    evidence = dist.MultivariateNormal(torch.zeros(20, dtype=F64), marginal).log_prob(y)
    return covariance @ x.T @ y / 0.64, covariance, float(evidence)


COUNTS = torch.tensor([2.0, 0, 3, 1], dtype=F64)
TOSSES = torch.tensor([1.0, 1, 0, 1, 1, 0, 1], dtype=F64)
VOTES = torch.tensor([0, 0, 2, 0, 1, 0, 2, 0])
ERRORS = torch.tensor([0.3, -1.1, 0.8], dtype=F64)


def four_posteriors() -> None:
    """Independent posteriors that are known, with all kinds of support, in one model."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    chance = pyro.sample("chance", dist.Beta(2.0, 2.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    sd = pyro.sample("sd", dist.HalfNormal(2.0))
    pyro.sample("counts", dist.Poisson(rate).expand([4]).to_event(1), obs=COUNTS)
    pyro.sample("tosses", dist.Bernoulli(chance).expand([7]).to_event(1), obs=TOSSES)
    pyro.sample("votes", dist.Categorical(shares).expand([8]).to_event(1), obs=VOTES)
    pyro.sample("errors", dist.Normal(0.0, sd).expand([3]).to_event(1), obs=ERRORS)


class Quadrature:
    """The posterior of a half-normal sd by quadrature: mean, std and quantiles."""

    def __init__(self) -> None:
        self.grid = np.linspace(1e-4, 12.0, 40_001)
        log = stats.halfnorm.logpdf(self.grid, scale=2.0)
        log = log + stats.norm.logpdf(ERRORS.numpy()[:, None], scale=self.grid).sum(0)
        density = np.exp(log - log.max())
        self.density = density / trapezoid(density, self.grid)
        self.cdf = np.cumsum(self.density) * (self.grid[1] - self.grid[0])

    def mean(self) -> float:
        return float(trapezoid(self.grid * self.density, self.grid))

    def std(self) -> float:
        return math.sqrt(trapezoid((self.grid - self.mean()) ** 2 * self.density, self.grid))

    def ppf(self, probability: float) -> float:
        return float(np.interp(probability, self.cdf, self.grid))


def exact_marginals() -> dict[str, tuple[Any, Any]]:
    """Name -> (how to select it from the posterior, its exact law)."""
    heads = float(TOSSES.sum())
    return {
        "rate": ({}, stats.gamma(2 + float(COUNTS.sum()), scale=1 / 5)),
        "chance": ({}, stats.beta(2 + heads, 2 + 7 - heads)),
        "shares": ({"shares_dim_0": 0}, stats.beta(1 + 5, 2 + 3)),
        "sd": ({}, Quadrature()),
    }


def two_posteriors() -> None:
    """As above, with the two sites that are farthest from Gaussian."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    sd = pyro.sample("sd", dist.HalfNormal(2.0))
    pyro.sample("counts", dist.Poisson(rate).expand([4]).to_event(1), obs=COUNTS)
    pyro.sample("errors", dist.Normal(0.0, sd).expand([3]).to_event(1), obs=ERRORS)


def z_scores(draws: np.ndarray, law: Any) -> dict[str | float, float]:
    """Distance of mean, sd and quantiles of draws ``[chain, draw]`` from a law's, in Monte Carlo standard errors."""
    from arviz_stats.base import array_stats

    found = {"mean": (draws.mean(), law.mean()), "sd": (draws.std(), law.std())}
    errors_of = {name: array_stats.mcse(draws, method=name) for name in found}
    for p in (0.05, 0.5, 0.95):
        found[p] = (np.quantile(draws, p), law.ppf(p))
        errors_of[p] = array_stats.mcse(draws, method="quantile", prob=p)
    return {name: (value - truth) / errors_of[name] for name, (value, truth) in found.items()}


NUTS: dict[str, Any] = {"engine": "nuts", "num_warmup": 300}
CHEES: dict[str, Any] = {"engine": "chees", "num_warmup": 100}
SMC: dict[str, Any] = {"engine": "smc"}


@pytest.mark.parametrize(
    "model, options, smallest_ess",
    [
        pytest.param(two_posteriors, NUTS | {"num_chains": 4, "num_samples": 1000}, 2000, marks=pytest.mark.slow),
        pytest.param(four_posteriors, NUTS | {"num_chains": 2, "num_samples": 1000}, 1000, marks=pytest.mark.slow),
        (two_posteriors, NUTS | {"num_chains": 2, "num_samples": 250}, 150),
        (two_posteriors, NUTS | {"num_chains": 2, "num_samples": 250, "num_warmup": 40, "init": "laplace"}, 150),
        (two_posteriors, CHEES | {"num_samples": 250}, 4000),
        (two_posteriors, CHEES | {"num_samples": 250, "dense_mass": False, "init": "laplace"}, 4000),
        (four_posteriors, CHEES | {"num_samples": 250, "init": "uniform"}, 4000),
        (two_posteriors, SMC | {"num_chains": 6, "num_samples": 1000}, 4000),
        (four_posteriors, SMC | {"num_chains": 6, "num_samples": 1000}, 4000),
    ],
)
def test_draws_match_exact_posteriors(model: Callable[[], None], options: dict[str, Any], smallest_ess: float) -> None:
    from arviz_stats.base import array_stats

    result = fit(model, seed=3, **options, **FEW)
    assert float(result.sample_stats["diverging"].mean()) < 0.01
    for name, (where, law) in exact_marginals().items():
        if name not in result.posterior:
            continue
        draws = result.posterior[name].isel(where).values
        assert array_stats.ess(draws, method="bulk") >= smallest_ess, name
        for what, z in z_scores(draws, law).items():
            assert abs(z) < 4, (name, what, z)


def ill_conditioned() -> tuple[Callable[[], None], Tensor, Tensor]:
    """A linear Gaussian model of 50 parameters whose posterior has sds from 1 to 1/100, rotated; mean, covariance."""
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(50, 50, dtype=F64, generator=generator))[0]
    precision = torch.logspace(0, 4, 50, dtype=F64)
    # Prior precision 1, so the likelihood adds the rest.
    design = (precision - 1 + 1e-12).sqrt()[:, None] * rotation.T
    y = design @ torch.randn(50, dtype=F64, generator=generator)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([50]).to_event(1))
        pyro.sample("y", dist.Normal(design @ w, 1.0).to_event(1), obs=y)

    covariance = rotation @ (1 / precision).diag() @ rotation.T
    return model, covariance @ design.T @ y, covariance


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        CHEES | {"num_warmup": 300, "num_samples": 100},
        CHEES | {"num_warmup": 200, "num_samples": 100, "dense_mass": False},
        NUTS | {"num_chains": 2, "num_warmup": 400, "num_samples": 150, "dense_mass": True},
        SMC | {"num_chains": 5, "num_samples": 1000},
    ],
    ids=["chees", "chees-diagonal", "nuts", "smc"],
)
def test_draws_match_an_ill_conditioned_gaussian(options: dict[str, Any]) -> None:
    """Along the principal axes too, where the condition number is 1e4."""
    from arviz_stats.base import array_stats

    model, mean, covariance = ill_conditioned()
    result = fit(model, seed=8, **options, **FEW)
    assert int(result.sample_stats["diverging"].sum()) == 0
    draws = result.posterior["w"].values
    _, axes = torch.linalg.eigh(covariance)
    for directions in (np.eye(50), axes.numpy()):
        centre = directions.T @ mean.numpy()
        sd = np.sqrt(np.diag(directions.T @ covariance.numpy() @ directions))
        turned = draws @ directions
        for k in range(0, 50, 7):
            law = stats.norm(centre[k], sd[k])
            size = array_stats.ess(turned[:, :, k], method="bulk")
            assert size > 80, (k, size)
            for what, z in z_scores(turned[:, :, k], law).items():
                assert abs(z) < 4, (k, what, z)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["chees", "nuts"])
def test_a_funnel_is_reported_as_divergent(engine: str) -> None:
    """Neal's funnel: no step size fits its neck and its mouth."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(0.0, torch.exp(0.5 * v)).expand([9]).to_event(1))

    options: dict[str, Any] = {"chees": {"num_chains": 32}, "nuts": {"num_chains": 2}}[engine]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*never moved", category=errors.ConvergenceWarning)
        result = fit(model, engine=engine, num_warmup=150, num_samples=150, seed=2, **options, **FEW)
    assert int(result.sample_stats["diverging"].sum()) > 0


@pytest.mark.slow
def test_chees_and_nuts_agree_on_a_hierarchy() -> None:
    """Two engines, one posterior without a closed form: eight schools, not centred."""
    from arviz_stats.base import array_stats

    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=F64)
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=F64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        pyro.sample("y", dist.Normal(mu + tau * raw, sd).to_event(1), obs=y)

    runs = [CHEES | {"num_warmup": 200, "num_samples": 200}, NUTS | {"num_chains": 4, "num_samples": 500}]
    results = [fit(model, seed=1, **options, **FEW).posterior for options in runs]
    for name in ("mu", "tau"):
        draws = [result[name].values for result in results]
        for method in ("mean", "sd"):
            value = [float(getattr(np, method.replace("sd", "std"))(x)) for x in draws]
            error = math.hypot(*(array_stats.mcse(x, method=method) for x in draws))
            assert abs(value[0] - value[1]) < 4 * error, (name, method)


def test_recorded_potential_repeats_the_model() -> None:
    """Recording changes no draw beyond rounding, and a model that branches on a value is not recorded."""
    x, y = regression_data()
    options: dict[str, Any] = {"num_chains": 1, "num_warmup": 0, "num_samples": 3, "seed": 1, "engine": "nuts", **FEW}
    plain, recorded = fit(regression, x, y, record=False, **options), fit(regression, x, y, **options)
    assert (plain.attrs["recorded"], recorded.attrs["recorded"]) == ("False", "True")
    np.testing.assert_allclose(recorded.posterior["weights"], plain.posterior["weights"], rtol=1e-8)

    def branching() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("fold", -(x**2) if x > 0 else -x.abs())

    options["num_warmup"] = 50
    assert fit(branching, **options).attrs["recorded"] == "False"


def large_sample() -> None:
    """Much data: the posteriors Gamma(297, 101) and Beta(27, 17) are almost, but not quite, Gaussian."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    chance = pyro.sample("chance", dist.Beta(2.0, 2.0))
    pyro.sample("counts", dist.Poisson(rate).expand([100]).to_event(1), obs=torch.arange(100.0) % 7)
    pyro.sample("heads", dist.Binomial(40, chance), obs=torch.tensor(25.0))


@pytest.mark.parametrize("engine", ["laplace", "svi"])
def test_corrected_approximations_match_exact_posteriors(engine: str) -> None:
    result = fit(large_sample, engine=engine, seed=1, num_samples=5000, resample=True, **FEW)
    assert -1 < result.attrs["pareto_k"] < 0.7  # not exact, told so, and corrected
    assert result.attrs["resampled"] == "True"
    size = result.attrs["importance_ess"]
    assert size < 19_999
    total = float((torch.arange(100.0) % 7).sum())
    for name, law in {"rate": stats.gamma(2 + total, scale=1 / 101), "chance": stats.beta(27, 17)}.items():
        draws = result.posterior[name].values.ravel()
        # Resampling adds the variance of one draw in len(draws) to that of the weights.
        error = law.std() * math.sqrt(1 / size + 1 / len(draws))
        assert abs(draws.mean() - law.mean()) < 4 * error, name
        skewness = ((draws - draws.mean()) ** 3).mean() / draws.std() ** 3
        assert abs(skewness - law.stats(moments="s")) < 4 * math.sqrt(15 / size), name


def test_a_draw_without_density_weighs_nothing() -> None:
    """Also where a branch on its value, which does not vmap, raises."""
    from pirl.infer.importance import log_density

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        if float(x) > 1:
            raise errors.DivergenceError("infinite")

    found = log_density(Potential(model), torch.tensor([[-0.5], [2.0]], dtype=F64))
    assert found.tolist() == pytest.approx([stats.norm.logpdf(-0.5), -math.inf])


@pytest.mark.parametrize("options", [{"engine": "laplace"}, {"engine": "svi", "guide": "normal"}])
def test_weighed_moments_are_those_of_the_posterior(options: dict[str, Any]) -> None:
    """A mean-field guide has too small sds, a Gaussian the wrong mean: the weights mend both, and k-hat vouches."""
    x, y = regression_data()
    mean, covariance, _ = regression_posterior(x, y)
    if options["engine"] == "svi":
        result = fit(regression, x, y, seed=1, num_samples=5000, **options, **FEW)
        truth = {"weights": (mean.numpy(), covariance.diagonal().sqrt().numpy())}
    else:
        result = fit(large_sample, seed=1, num_samples=5000, **options, **FEW)
        total = float((torch.arange(100.0) % 7).sum())
        laws = {"rate": stats.gamma(2 + total, scale=1 / 101), "chance": stats.beta(27, 17)}
        truth = {name: (law.mean(), law.std()) for name, law in laws.items()}
    assert result.attrs["pareto_k"] < 0.7
    error = 1 / math.sqrt(result.attrs["importance_ess"])
    for name, (expected, sd) in truth.items():
        moments = result["psis_moments"][name]
        assert (np.abs(moments.sel(moment="mean") - expected) / sd < 4 * error).all(), name
        assert (np.abs(moments.sel(moment="sd") / sd - 1) < 4 * error).all(), name
    if options["engine"] == "svi":  # and not for lack of anything to mend
        narrow = result.posterior["weights"].values.std((0, 1)) / covariance.diagonal().sqrt().numpy()
        assert narrow.min() < 0.97


def test_laplace_is_exact_on_a_gaussian() -> None:
    x, y = regression_data()
    mean, covariance, evidence = regression_posterior(x, y)
    result = fit(regression, x, y, engine="laplace", seed=2, **FEW)
    found = result["laplace"]
    np.testing.assert_allclose(found["mode"], mean, rtol=1e-8)
    np.testing.assert_allclose(found["covariance"], covariance, rtol=1e-8, atol=1e-12)
    assert result.attrs["log_evidence"] == pytest.approx(evidence, rel=1e-10)
    assert result.attrs["importance_ess"] == pytest.approx(4000)
    draws = result.posterior["weights"].values.reshape(-1, 3)
    assert np.abs(draws.mean(0) - mean.numpy()).max() < 4 * covariance.diagonal().sqrt().max() / math.sqrt(4000)
    assert np.abs(np.cov(draws.T) / covariance.numpy() - 1).diagonal().max() < 4 * math.sqrt(2 / 4000)


@pytest.mark.parametrize("guide", ["multivariate_normal", "full_rank", "low_rank"])
def test_svi_is_exact_on_a_gaussian(guide: str) -> None:
    x, y = regression_data()
    mean, covariance, evidence = regression_posterior(x, y)
    result = fit(regression, x, y, engine="svi", guide=guide, seed=2, **FEW)
    # KL(q | posterior) = log evidence - ELBO, and a Gaussian q is at most sqrt(2 KL) sds from the mean.
    gap = evidence - result.attrs["elbo"]
    assert abs(gap) < (1e-2 if guide == "low_rank" else 1e-4)
    assert result.attrs["converged"] == "True"
    bound = math.sqrt(2 * max(gap, 1e-8)) + 4 / math.sqrt(4000)
    draws = result.posterior["weights"].values.reshape(-1, 3)
    assert (np.abs(draws.mean(0) - mean.numpy()) / covariance.diagonal().sqrt().numpy()).max() < bound


def test_mean_field_finds_the_mean_and_the_conditional_sds() -> None:
    """The best diagonal Gaussian has the mean of a Gaussian target, and the inverse diagonal of its precision."""
    x, y = regression_data()
    mean, covariance, evidence = regression_posterior(x, y)
    result = fit(regression, x, y, engine="svi", guide="normal", seed=2, **FEW)
    draws = result.posterior["weights"].values.reshape(-1, 3)
    sds = torch.linalg.inv(covariance).diagonal().rsqrt().numpy()
    assert (np.abs(draws.mean(0) - mean.numpy()) / sds).max() < 0.1
    np.testing.assert_allclose(draws.std(0), sds, rtol=0.06)
    # KL = (sum of log precisions - log det precision) / 2 for this optimum
    gap = 0.5 * float(torch.linalg.inv(covariance).diagonal().log().sum() + torch.logdet(covariance))
    assert evidence - result.attrs["elbo"] == pytest.approx(gap, abs=0.02)


def test_delta_guide_is_the_mode() -> None:
    x, y = regression_data()
    mean, _, _ = regression_posterior(x, y)
    result = fit(regression, x, y, engine="svi", guide="delta", num_samples=3, seed=2, **FEW)
    np.testing.assert_allclose(result.posterior["weights"].values[0, -1], mean, atol=1e-3)


def test_svi_subsamples_and_learns_parameters() -> None:
    """Minibatches and pyro.param go through Pyro's ELBO, and the report still covers every row."""
    x, y = regression_data()

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        offset = pyro.param("offset", torch.tensor(0.0))
        with pyro.plate("row", len(y), subsample_size=10) as index:
            pyro.sample("y", dist.Normal(slope * x[index, 1] + offset, 0.8), obs=y[index])

    result = fit(model, x, y, engine="svi", guide="normal", num_particles=2, seed=2, num_samples=500, **FEW)
    squares = float((x[:, 1] ** 2).sum())
    expected = float(x[:, 1] @ y) / (squares + 0.64)  # x is centred: the offset does not matter
    # The step size ends at 1e-4, so what is left is noise of the minibatches, a fraction of the posterior sd.
    assert float(result.posterior["slope"].mean()) == pytest.approx(expected, abs=0.5 * math.sqrt(0.64 / squares))
    assert result.log_likelihood["y"].sizes == {"chain": 1, "draw": 2000, "row": 20}


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_seeds_reproduce_and_nothing_global_changes(engine: str) -> None:
    x, y = regression_data()
    options: dict[str, Any] = {"num_chains": 2, "num_warmup": 50, "num_samples": 20, "engine": engine, **FEW}
    if engine == "svi":
        options |= {"max_steps": 300}
    pyro.param("theirs", torch.tensor(3.0))
    torch.manual_seed(11)
    before, flags = torch.get_rng_state(), (torch.get_default_dtype(), torch.distributions.Distribution._validate_args)

    def run(seed: int) -> np.ndarray:
        if engine == "svi":
            with pytest.warns(errors.ConvergenceWarning):
                return fit(regression, x, y, seed=seed, **options).posterior["weights"].values
        return fit(regression, x, y, seed=seed, **options).posterior["weights"].values

    first = run(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert (torch.get_default_dtype(), torch.distributions.Distribution._validate_args) == flags
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    torch.rand(3)
    np.testing.assert_array_equal(run(5), first)
    assert not np.array_equal(run(6), first)


def test_a_chain_does_not_depend_on_how_many_there_are() -> None:
    x, y = regression_data()
    start = {"weights": torch.zeros(3, dtype=F64)}
    options: dict[str, Any] = {
        "num_warmup": 10, "num_samples": 10, "seed": 5, "init": start, "engine": "nuts", **FEW
    }  # fmt: skip
    one = fit(regression, x, y, num_chains=1, **options).posterior["weights"].values
    two = fit(regression, x, y, num_chains=2, **options).posterior["weights"].values
    np.testing.assert_array_equal(one[0], two[0])
    assert not np.array_equal(two[0], two[1])


@pytest.mark.parametrize("dense_mass", [True, False, [("b", "a")], [("a",)]])
def test_nuts_begins_with_the_covariance_of_laplace(dense_mass: bool | list[tuple[str, ...]]) -> None:
    """Of a Gaussian model it is exact, whatever blocks the mass matrix has; chains start twice as far as it is wide."""
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.3, 0.0], [-1.0, 0.4, 5.0]], dtype=F64)
    data = torch.tensor([1.0, -2.0, 3.0], dtype=F64)

    def model() -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mixing @ torch.cat([b, a[None]]), 1.0).to_event(1), obs=data)

    covariance = torch.linalg.inv(torch.eye(3, dtype=F64) + mixing.T @ mixing)
    mean = covariance @ mixing.T @ data
    with Setting.of((data,), {}).entered(), own_generator():
        potential = Potential(model)
        sampler = Nuts(
            potential, guarded(potential), num_chains=100, num_warmup=0, seed=1, init="laplace", ranks=ALONE,
            full_mass=dense_mass,
        )  # fmt: skip
    place = {"b": [0, 1], "a": [2]}
    for kernel in list(sampler.kernels.values())[:2]:
        for names, inverse in kernel.inverse_mass_matrix.items():
            rows = [i for name in names for i in place[name]]
            block = covariance[rows][:, rows]
            torch.testing.assert_close(inverse, block if inverse.dim() == 2 else block.diag())
    starts = torch.stack([potential.flatten(kernel.initial_params) for kernel in sampler.kernels.values()])
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (starts - mean).T, upper=False)
    # Squares of 3 x 100 normal numbers of sd 2: their mean is 4 to within 4 standard errors.
    assert float(white.square().mean()) == pytest.approx(4.0, rel=4 * math.sqrt(2 / white.numel()))


@pytest.mark.parametrize("dense_mass", [True, False])
def test_few_draws_do_not_overrule_the_covariance_of_laplace(dense_mass: bool) -> None:
    """Sds from .001 to 1: trees double once at most, however short the window; without it they have 30 leaves."""
    scales = torch.logspace(-3, 0, 10, dtype=F64)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 100.0).expand([10]).to_event(1))
        pyro.sample("y", dist.Normal(x, scales).to_event(1), obs=torch.zeros(10, dtype=F64))

    options: dict[str, Any] = {"num_chains": 2, "num_samples": 40, "seed": 2, "init": "laplace", "progress": False}
    with Setting.of((scales,), {}).entered():
        for num_warmup in (10, 40, 100):  # no window, one of 30 draws, one of 75
            stats = get_engine("nuts")(Potential(model), num_warmup=num_warmup, dense_mass=dense_mass, **options).stats
            assert float(stats["n_steps"].double().mean()) <= 15, num_warmup
            assert float(stats["acceptance_rate"].mean()) > 0.5


@pytest.mark.parametrize("shape", [(3,), (3, 3)])
@pytest.mark.parametrize("wrong", [1e-4, 1e4])
def test_a_guess_that_is_wrong_is_overruled(shape: tuple[int, ...], wrong: float) -> None:
    """As of a mode that is flat. What is left of it makes the variance at most ten times the draws', and then none."""
    potential = Potential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1)))
    dense = len(shape) == 2
    mass = _Guessed(Metric(torch.full((3,), math.sqrt(wrong))), potential)
    mass.configure({("x",): shape})
    torch.testing.assert_close(mass.inverse_mass_matrix[("x",)], wrong * (torch.eye(3) if dense else torch.ones(3)))
    draws = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))

    def learnt(window: Tensor) -> Tensor:
        for x in window:
            mass.update({"x": x}, None)
        mass.end_adaptation()
        return mass.inverse_mass_matrix[("x",)]

    def variances(found: Tensor) -> Tensor:
        return found.diagonal() if dense else found

    few, many, still = learnt(draws[:20]), learnt(draws), learnt(draws[:1].expand(5, 3))
    own = draws[:20].var(0)
    assert bool((variances(few) <= 10 * own).all() and (variances(few) >= 0.5 * own).all())
    torch.testing.assert_close(many, draws.T.cov() if dense else draws.var(0))
    assert bool((variances(still) > 0).all())  # of a chain that did not move


def discrete() -> None:
    pyro.sample("which", dist.Bernoulli(0.5))


def no_latent() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def slash() -> None:
    pyro.sample("a/b", dist.Normal(0.0, 1.0))


def subsampled() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 10, subsample_size=2):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(2))


def parameter() -> None:
    pyro.sample("mu", dist.Normal(pyro.param("where", torch.tensor(0.0)), 1.0), obs=None)


def impossible_data() -> None:
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    pyro.sample("count", dist.Poisson(rate), obs=torch.tensor(-1.0))


@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize(
    "model, error, words",
    [
        (discrete, errors.DiscreteLatentError, "'which' is discrete"),
        (no_latent, errors.ModelError, "no latent site"),
        (slash, errors.ModelError, "'a/b' contains '/'"),
        (impossible_data, errors.ModelError, "count"),
    ],
)
def test_bad_models_are_refused_by_name(engine: str, model: Callable[[], None], error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        fit(model, engine=engine, **FEW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", sorted(set(ENGINES) - {"svi"}))
@pytest.mark.parametrize("model, words", [(subsampled, "'row' takes 2 of 10"), (parameter, "'where' is a pyro.param")])
def test_only_svi_takes_minibatches_and_parameters(engine: str, model: Callable[[], None], words: str) -> None:
    with pytest.raises(errors.ModelError, match=words):
        fit(model, engine=engine, **FEW)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_density_that_is_never_finite_is_refused_by_name(engine: str) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("bad", dist.Normal(mu * math.nan, 1.0, validate_args=False), obs=torch.tensor(0.0))

    with pytest.raises(errors.PirlError, match="bad"):
        fit(model, engine=engine, **FEW)


def test_gradients_that_are_never_finite_are_refused_by_name() -> None:
    class Kink(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
            return slope * math.nan

    def model() -> None:
        pyro.factor("kink", -(Kink.apply(pyro.sample("mu", dist.Normal(0.0, 1.0))) ** 2))

    with pytest.raises(errors.NonFiniteError, match="gradient at site 'mu'"):
        fit(model, **FEW)


def test_nuts_survives_a_region_without_density() -> None:
    """Proposals with a NaN density, or where the model gives up, are divergences, and only for their own chain."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if float(x.detach()) > 1.5:
            raise errors.ConvergenceError("no fixed point")
        pyro.factor("wall", torch.where(x < -1.5, torch.nan, 0.0 * x))

    with pyro.validation_enabled(False):
        result = fit(model, engine="nuts", num_chains=2, num_warmup=100, num_samples=300, seed=1, **FEW)
    draws = result.posterior["x"].values
    assert np.abs(draws).max() <= 1.5
    assert int(result.sample_stats["diverging"].sum()) > 0
    truth = stats.truncnorm(-1.5, 1.5)
    assert abs(draws.mean()) < 0.25 and abs(draws.std() / truth.std() - 1) < 0.25


@pytest.mark.parametrize("engine", ["nuts", "chees"])
def test_stuck_chains_are_told(engine: str) -> None:
    """A density so steep that no step is accepted."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("cliff", -1e30 * x.abs() - 1e30 * (1e6 * x).sin())

    with pytest.raises(errors.StuckChainsError, match="'x'"):
        fit(model, engine=engine, num_chains=2, num_warmup=0, num_samples=5, **FEW)


def test_laplace_tells_a_posterior_without_a_gaussian_mode() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("flat", 0.5 * z[1] ** 2)  # removes the prior of the second coordinate

    with pytest.raises(errors.ModelError, match=r"not positive definite.*z\[1\]"):
        fit(model, engine="laplace", **FEW)
    for engine in ("nuts", "chees"):
        with pytest.raises(errors.ModelError, match=r"init='laplace' finds no Gaussian.*'uniform' or 'prior'.*z\[1\]"):
            fit(model, engine=engine, init="laplace", **FEW)


def test_svi_tells_that_it_has_not_converged() -> None:
    x, y = regression_data()
    told = [
        pytest.warns(errors.ConvergenceWarning, match=words)
        for words in ("Pareto k-hat", "still grows after 200 steps")
    ]
    with told[0], told[1]:
        result = fit(regression, x, y, engine="svi", max_steps=200, learning_rate=1e-4, **FEW)
    assert result.attrs["converged"] == "False"
    assert result["elbo"]["elbo"].sizes == {"iteration": 200}


def test_a_bad_approximation_is_labelled() -> None:
    """A Gaussian at a narrow peak misses the broad mode beside it."""

    def model() -> None:
        narrow_and_broad = dist.Normal(torch.zeros(2), torch.tensor([0.1, 5.0]))
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), narrow_and_broad))

    with pytest.warns(errors.ConvergenceWarning, match="Pareto k-hat"):
        result = fit(model, engine="laplace", resample=True, **FEW)
    assert result.attrs["pareto_k"] > 0.7
    assert result.attrs["resampled"] == "False"


def test_unknown_names_are_listed() -> None:
    with pytest.raises(errors.OptionError, match="chees, laplace, nuts, smc, svi"):
        get_engine("gibbs")
    with pytest.raises(errors.OptionError, match="no option 'guide'.*target_accept_prob"):
        fit(regression, *regression_data(), guide="normal")
    for near, meant in (("num_sample", "num_samples"), ("target_accept", "target_accept_prob")):
        with pytest.raises(errors.OptionError, match=rf"no option '{near}' \(did you mean '{meant}'\?\)"):
            fit(regression, *regression_data(), **{near: 1})
    with pytest.raises(errors.OptionError, match="multivariate_normal"):
        fit(regression, *regression_data(), engine="svi", guide="gaussian")
    for engine, named in (("chees", "'laplace'"), ("nuts", "'laplace'"), ("svi", "'prior'")):
        with pytest.raises(errors.OptionError, match=f"init='zero'.*{named}, or a dict"):
            fit(regression, *regression_data(), engine=engine, init="zero")


def test_starts_name_every_latent_site_and_nothing_else() -> None:
    """Those of a posterior's draw do, with deterministic sites among them."""

    def model(data: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * mean)
        pyro.sample("data", dist.Normal(mean, 1.0), obs=data)

    found = fit(model, torch.tensor(1.0), engine="laplace", seed=0, **FEW)
    start = {str(name): torch.as_tensor(x.values[0, 0]) for name, x in found.posterior.data_vars.items()}
    assert set(start) == {"mean", "twice"}
    for engine in ("laplace", "nuts"):
        fit(model, torch.tensor(1.0), engine=engine, init=start, seed=0, **FEW)
        with pytest.raises(errors.OptionError, match="init has a value of 'maen': the latent sites are mean"):
            fit(model, torch.tensor(1.0), engine=engine, init={**start, "maen": start["mean"]}, seed=0, **FEW)
        with pytest.raises(errors.OptionError, match=r"init\['mean'\] has the shape \(2,\), and the site \(\)"):
            fit(model, torch.tensor(1.0), engine=engine, init={"mean": torch.zeros(2)}, seed=0, **FEW)
        with pytest.raises(errors.OptionError, match="init has no value of mean"):
            fit(model, torch.tensor(1.0), engine=engine, init={"twice": start["mean"]}, seed=0, **FEW)


def test_engines_return_draws_of_every_site_without_fit() -> None:
    """The contract below fit: a potential in, unconstrained draws out, for any engine by name."""
    potential = Potential(four_posteriors)
    draws = get_engine("laplace")(potential, num_chains=2, num_samples=3, seed=0, progress=False, num_starts=1)
    assert isinstance(draws, Draws)
    assert {name: tuple(value.shape) for name, value in draws.values.items()} == {
        "rate": (1, 6),
        "chance": (1, 6),
        "shares": (1, 6, 2),
        "sd": (1, 6),
    }


def test_an_approximation_far_too_wide_is_told_by_an_infinite_tail() -> None:
    """All but a few draws weigh nothing at all, where no tail can be fitted."""
    with Setting.of((), {}).entered():
        potential = Potential(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        vectors = torch.linspace(0.0, 1e3, 200)[:, None]
        with pytest.warns(errors.ConvergenceWarning, match="k-hat is inf"):
            found = weighed(potential, vectors, torch.zeros(200), resample=True)
    assert found.attrs["pareto_k"] == math.inf and found.attrs["importance_ess"] == pytest.approx(1.0, abs=1e-4)
    assert bool(found.stats["log_weight"].exp().isfinite().all())
