"""The potential against Pyro's own, and against densities written down by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pirl import errors
from pirl.distributions import MaxEntTrajectory
from pirl.infer import Potential
from pirl.infer.recorded import recorded
from pirl.mdp import TabularMDP
from pirl.trajectories import Trajectories


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * raw, 10.0), obs=torch.arange(8.0) * 3)


def every_support() -> None:
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("cholesky", dist.LKJCholesky(3, 2.0))
    pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("positive", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))


def nested_plates_masks_and_scales() -> None:
    with pyro.plate("subject", 3, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("trial", 4, dim=-1), pyro.poutine.mask(mask=torch.arange(4) < 3), pyro.poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.arange(12.0).reshape(3, 4))
    pyro.factor("extra", -(mean**2).sum())
    pyro.deterministic("twice", 2 * mean)


MODELS = [schools, every_support, nested_plates_masks_and_scales]


def point(potential: Potential, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return potential.unflatten(torch.randn(potential.size))


@pytest.mark.parametrize("model", MODELS)
def test_potential_and_gradient_equal_those_of_pyro(model: Callable[[], None]) -> None:
    potential = Potential(model)
    start, theirs, _, _ = initialize_model(model)
    assert {name: value.shape for name, value in start.items()} == {
        name: site.unconstrained_shape for name, site in potential.latent.items()
    }
    z = {name: value.requires_grad_() for name, value in point(potential).items()}
    mine = potential(z)
    torch.testing.assert_close(mine, theirs(z), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(theirs(z), list(z.values()))
    torch.testing.assert_close(torch.autograd.grad(mine, list(z.values())), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model", MODELS)
def test_vmap_over_chains_equals_a_loop(model: Callable[[], None]) -> None:
    potential = Potential(model)
    torch.manual_seed(1)
    vectors = torch.randn(5, potential.size)
    with pyro.validation_enabled(False):
        mapped = torch.func.vmap(potential)(potential.unflatten(vectors))
        slopes = torch.func.vmap(torch.func.grad(lambda v: potential(potential.unflatten(v))))(vectors)
    looped = [potential.gradient(potential.unflatten(vector)) for vector in vectors]
    torch.testing.assert_close(mapped, torch.stack([value for value, _ in looped]), rtol=1e-12, atol=1e-12)
    expected = torch.stack([potential.flatten(slope) for _, slope in looped])
    torch.testing.assert_close(slopes, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model", MODELS)
def test_a_recorded_potential_equals_the_potential(model: Callable[[], None]) -> None:
    potential = Potential(model)
    with pyro.validation_enabled(False):
        replay = recorded(potential, point(potential, 1), point(potential, 2))
    assert replay is not None
    for seed in (3, 4, 3):  # a recording that wrote to its constants would not repeat itself
        z = {name: value.requires_grad_() for name, value in point(potential, seed).items()}
        torch.testing.assert_close(replay(z), potential(z), rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(replay(z), list(z.values()))
        torch.testing.assert_close(found, tuple(potential.gradient(z)[1].values()), rtol=1e-11, atol=1e-11)


def test_recording_a_potential_that_was_never_evaluated() -> None:
    """Counts of trajectories are kept by whoever needs them first, and must not be a tracer's."""
    mdp = TabularMDP(torch.full((2, 2, 2), 0.5), initial=0, horizon=2)
    demos = Trajectories(states=[[0, 1, 1]], actions=[[0, 1]])

    def model() -> None:
        reward = pyro.sample("reward", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
        with pyro.plate("episode", 1):
            pyro.sample("demos", MaxEntTrajectory(mdp, reward), obs=demos.as_tensor())

    potential = Potential(model)
    points = [point(potential, seed) for seed in range(3)]
    with pyro.validation_enabled(False):
        replay = recorded(potential, *points[:2])
        assert replay is not None
        torch.testing.assert_close(replay(points[2]), potential(points[2]), rtol=1e-12, atol=1e-12)


def test_a_support_that_depends_on_another_site() -> None:
    """x ~ U(0, top): the bijection moves with the top; Pyro's own potential keeps the first one."""

    def model() -> None:
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(torch.zeros(()), top))

    potential = Potential(model)
    z = {"top": torch.tensor(0.7), "x": torch.tensor(-0.4)}
    chance = torch.sigmoid(z["x"])
    # log N(log top | 0, 1) + log sigmoid'(x): uniform density and length of the interval cancel
    expected = 0.5 * 0.7**2 + 0.5 * math.log(2 * math.pi) - torch.log(chance * (1 - chance))
    assert potential(z).item() == pytest.approx(expected.item(), rel=1e-12)
    assert potential.replay(z)["posterior"]["x"].item() == pytest.approx(math.exp(0.7) * chance.item(), rel=1e-12)


def test_unconstrain_inverts_replay() -> None:
    potential = Potential(every_support)
    z = point(potential)
    values = potential.replay(z)["posterior"]
    back = potential.unconstrain(values)
    for name in potential.latent:
        torch.testing.assert_close(back[name], z[name], rtol=1e-8, atol=1e-8)


class Summed(dist.Normal):
    """A normal that knows the sum of its log densities from sufficient statistics, and counts how often it is asked."""

    asked = 0

    def log_prob_sum(self, value: Tensor) -> Tensor:
        type(self).asked += 1
        return dist.Normal(self.loc, self.scale).log_prob(value).sum()


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_sum_shortcut_is_used_only_where_it_is_right(scale: float, masked: bool) -> None:
    data = torch.tensor([0.5, -1.0, 2.0])

    def model(kind: type[dist.Normal]) -> None:
        x = pyro.sample("x", Summed(torch.zeros(()), 1.0))  # latent: never
        mask = torch.tensor([True, False, True]) if masked else True
        with pyro.poutine.scale(scale=scale), pyro.poutine.mask(mask=mask):
            pyro.sample("y", kind(x.expand(3), 1.0).expand([3]), obs=data)

    z = {"x": torch.tensor(0.3)}
    kept = data[[0, 2]] if masked else data
    standard = dist.Normal(0.0, 1.0)
    expected = -standard.log_prob(z["x"]) - scale * dist.Normal(z["x"], 1.0).log_prob(kept).sum()
    fast, plain = Potential(model, (Summed,)), Potential(model, (dist.Normal,))
    Summed.asked = 0
    torch.testing.assert_close(fast(z), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(plain(z), expected, rtol=1e-14, atol=1e-14)
    assert Summed.asked == (0 if masked else 1)


def test_replay_reports_densities_by_site() -> None:
    potential = Potential(nested_plates_masks_and_scales)
    z = point(potential)
    groups = potential.replay(z)
    mean, y = z["mean"], torch.arange(12.0).reshape(3, 4)
    expected = dist.Normal(mean, 1.0).log_prob(y)
    expected[:, 3] = 0.0  # masked; the scale of 0.5 weighs the posterior, not the report
    torch.testing.assert_close(groups["log_likelihood"]["y"], expected)
    torch.testing.assert_close(groups["log_prior"]["mean"], dist.Normal(0.0, 1.0).log_prob(mean))
    torch.testing.assert_close(groups["posterior"]["twice"], 2 * mean)
    assert set(groups["log_likelihood"]) == {"y"}
    assert groups["stats"]["lp"].item() == pytest.approx(-potential(z).item(), rel=1e-14)


def test_simulate_draws_observed_sites_anew_and_keeps_what_is_given() -> None:
    potential = Potential(schools)
    given = {"mu": torch.tensor(100.0), "tau": torch.tensor(1e-9)}
    torch.manual_seed(0)
    drawn = potential.simulate(given, (), {})
    assert drawn["mu"] == 100 and drawn["y"].shape == (8,)
    assert abs(float(drawn["y"].mean()) - 100) < 4 * 10 / math.sqrt(8)


def test_names_of_coordinates() -> None:
    assert Potential(every_support).coordinates()[:4] == ["simplex[0]", "simplex[1]", "interval", "cholesky[0]"]


def test_a_support_without_bijection_is_refused_by_name() -> None:
    class Odd(dist.Normal):
        support = torch.distributions.constraints.Constraint()  # type: ignore[assignment]

    def odd() -> None:
        pyro.sample("odd", Odd(0.0, 1.0, validate_args=False))

    with pytest.raises(errors.ModelError, match="'odd' has support"):
        Potential(odd)


def test_validation_is_on_once_and_off_afterwards() -> None:
    seen: list[Any] = []

    def model() -> None:
        fn = dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0)
        seen.append(fn._validate_args)
        pyro.sample("y", fn, obs=torch.tensor(0.0))

    with pyro.validation_enabled(False):
        potential = Potential(model)
        potential({"x": torch.tensor(0.0)})
    assert seen == [True, False]


@pytest.mark.parametrize(("raised", "told"), [((), "ValueError$"), (("no bus\nat all",), "no bus$")])
def test_what_a_model_raises_is_told_in_a_line(raised: tuple[str, ...], told: str) -> None:
    """Also where it says nothing, to which Pyro adds its table of shapes."""

    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise ValueError(*raised)

    with pytest.raises(errors.ModelError, match=f"at a draw from its prior .at test_potential.py:[0-9]+.: {told}"):
        Potential(model)
