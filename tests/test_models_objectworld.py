"""Objectworld: its reward by the rule, networks with priors, and chains judged by rewards and not by weights."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

import pirl
from models import objectworld
from pirl.convergence import ess_bulk, rhat
from pirl.envs import gridworld
from pirl.envs import objectworld as build
from pirl.errors import ConvergenceWarning, InvalidMDPError, InvalidRewardError
from pirl.rewards import lifted_reward

ROOT = Path(__file__).resolve().parents[1]


def test_the_reward_follows_the_rule() -> None:
    """Cell by cell, object by object, in words of the paper."""
    world = build(size=7, num_objects=6, num_colours=3, seed=2)
    for cell in range(49):
        distance = {("inner", c): math.inf for c in range(3)} | {("outer", c): math.inf for c in range(3)}
        for place, inner, outer in world.objects.tolist():
            away = math.hypot(cell // 7 - place // 7, cell % 7 - place % 7)
            for key in (("inner", inner), ("outer", outer)):
                distance[key] = min(distance[key], away)
        assert world.features[cell].tolist() == pytest.approx(list(distance.values()), abs=1e-12)
        expected = 0.0
        if distance["outer", 0] <= 3:
            expected = 1.0 if distance["outer", 1] <= 2 else -1.0
        assert world.reward[cell].item() == expected
    assert set(world.reward.tolist()) == {-1.0, 0.0, 1.0}


def test_every_colour_occurs_and_objects_do_not_share_cells() -> None:
    for seed in range(20):
        world = build(size=4, num_objects=5, num_colours=5, seed=seed)
        assert len(world.objects[:, 0].unique()) == 5
        assert sorted(world.objects[:, 1].tolist()) == sorted(world.objects[:, 2].tolist()) == list(range(5))
        assert world.features.isfinite().all()
    assert not build(seed=0).objects.equal(build(seed=1).objects)
    assert build(seed=3).objects.equal(build(seed=3).objects)
    same = gridworld(10, 10, slip=0.3, discount=0.9)
    assert build().mdp.transition.equal(same.transition) and build().mdp.discount == 0.9


@pytest.mark.parametrize("numbers", [(3, 1, 2), (3, 10, 2), (3, 4, 1)])
def test_a_world_that_cannot_be_is_refused(numbers: tuple[int, int, int]) -> None:
    size, objects, colours = numbers
    with pytest.raises(InvalidMDPError, match=f"{objects} objects of {colours} colours on 9 cells"):
        build(size, objects, colours)


NETWORK = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def lifted(features: Tensor, **values: Tensor) -> Any:
    """The sites that a lifted network makes, and its reward."""
    model = pyro.condition(lambda: lifted_reward("net", NETWORK, features, scale=3.0), values)
    trace = pyro.poutine.trace(model).get_trace()
    return trace.nodes, trace.nodes["_RETURN"]["value"]


def test_each_parameter_has_a_prior_that_fits_its_layer() -> None:
    nodes, reward = lifted(torch.ones(5, 3, dtype=torch.float64))
    sites = {name: node["fn"] for name, node in nodes.items() if node["type"] == "sample"}
    assert list(sites) == ["net_0_weight", "net_0_bias", "net_2_weight", "net_2_bias"]
    scales = {name: fn.base_dist.scale.unique().item() for name, fn in sites.items()}
    expected = {
        "net_0_weight": 3 / math.sqrt(3), "net_0_bias": 3.0, "net_2_weight": 3 / math.sqrt(6), "net_2_bias": 3.0,
    }  # fmt: skip
    assert scales == pytest.approx(expected)
    assert all(fn.event_shape == nodes[name]["value"].shape for name, fn in sites.items())
    assert reward.shape == (5, 2)


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3)])
def test_a_lifted_reward_is_the_network_of_its_weights(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64)
    one = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    trace = pyro.poutine.trace(lambda: lifted_reward("net", one, features)).get_trace()
    w0, b0, w2, b2 = (trace.nodes[f"net_{name}"]["value"] for name in ("0_weight", "0_bias", "2_weight", "2_bias"))
    expected = (features @ w0.T + b0).tanh() @ w2.T + b2
    expected = expected if len(shape) == 2 else expected.squeeze(-1)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected, rtol=1e-12, atol=1e-12)


def test_in_a_plate_and_under_vmap_each_member_has_its_network() -> None:
    features = torch.randn(5, 3, dtype=torch.float64)
    with pyro.plate("particle", 4, dim=-2), pyro.plate("subject", 7, dim=-1):
        nodes, reward = lifted(features)
    assert reward.shape == (4, 7, 5, 2)
    draws = {name: node["value"] for name, node in nodes.items() if name.startswith("net")}
    alone = lifted(features, **{name: value[1, 2] for name, value in draws.items()})[1]
    torch.testing.assert_close(reward[1, 2], alone, rtol=1e-12, atol=1e-12)
    mapped = torch.func.vmap(lambda draw: lifted(features, **draw)[1])({k: v[:, 0] for k, v in draws.items()})
    torch.testing.assert_close(mapped, reward[:, 0], rtol=1e-12, atol=1e-12)

    # Both at once: chains by vmap, of which each has a network for every subject.
    def chain(draw: dict[str, Tensor]) -> Tensor:
        with pyro.plate("subject", 7):
            return lifted(features, **draw)[1]

    torch.testing.assert_close(torch.func.vmap(chain)(draws), reward, rtol=1e-12, atol=1e-12)


def test_a_network_that_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidRewardError, match=r"expected \[S, D\]"):
        lifted_reward("net", NETWORK, torch.ones(3, dtype=torch.float64))


def test_the_model_observes_the_law_of_its_network() -> None:
    arguments = objectworld.load(size=4, num_objects=4, num_demos=6, length=5, hidden=3)
    trace = pyro.poutine.trace(objectworld.model).get_trace(**arguments | {"network": arguments["network"].double()})
    reward = trace.nodes["reward"]["value"]
    assert reward.mean().abs() < 1e-12
    # A constant changes no decision, so the recorded reward has the likelihood of the drawn one.
    law = pirl.MaxCausalEntTrajectory(arguments["mdp"], reward[:, None], lengths=arguments["demos"].lengths)
    site = trace.nodes["trajectories"]
    expected = law.log_prob(site["value"])
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected, rtol=1e-9, atol=1e-9)
    assert site["cond_indep_stack"][0].name == "episode"


def fitted(engine: str, hidden: int, **options: Any) -> tuple[Any, np.ndarray]:
    arguments = objectworld.load(size=6, num_objects=6, num_demos=40, length=10, hidden=hidden, seed=1)
    posterior = pirl.fit(
        objectworld.model, model_kwargs=arguments, engine=engine, num_prior=0, num_posterior_predictive=0,
        dims=objectworld.dims, progress=False, **options,
    )  # fmt: skip
    assert posterior.posterior["reward"].dims == ("chain", "draw", "state")
    truth = np.array(objectworld.reference(6, 6, 2, 3.0, 1)["values"]["reward"])
    return posterior, truth


@pytest.mark.slow
def test_chains_agree_on_the_reward_where_weights_differ() -> None:
    options = {"num_chains": 16, "num_warmup": 150, "num_samples": 100, "init": "uniform", "max_leapfrogs": 48}
    posterior, truth = fitted("chees", 16, **options)
    reward = posterior.posterior["reward"].values
    weights = [data.values for name, data in posterior.posterior.data_vars.items() if name.startswith("network")]
    assert rhat(reward).max() < 1.05
    assert ess_bulk(reward).min() > 400
    assert max(rhat(w).max() for w in weights) - 1 > 2 * (rhat(reward).max() - 1)
    linear, _ = fitted("laplace", 0, num_chains=1, num_samples=200)
    near, far = (np.corrcoef(x.posterior["reward"].values.mean((0, 1)), truth)[0, 1] for x in (posterior, linear))
    assert near > 0.8 > 0.72 > far


def test_svi_finds_a_reward_like_the_truth() -> None:
    with pytest.warns(ConvergenceWarning):  # a normal law is not the posterior of weights that can be exchanged
        posterior, truth = fitted(
            "svi", 4, guide="normal", num_chains=1, num_samples=100, max_steps=200, num_particles=8
        )
    assert np.corrcoef(posterior.posterior["reward"].values.mean((0, 1)), truth)[0, 1] > 0.7


def test_labels_and_reference_fit_the_model() -> None:
    options: dict[str, Any] = {"size": 4, "num_objects": 5, "num_colours": 3, "sharpness": 2.0, "seed": 4}
    assert len(objectworld.coords(3)["feature"]) == objectworld.load(num_demos=1, **options)["features"].shape[1]
    truth = torch.tensor(objectworld.reference(**options)["values"]["reward"])
    world, reward = objectworld.true_reward(**options)
    assert truth.mean().abs() < 1e-6
    assert (reward == 2.0 * world.reward).all()
    torch.testing.assert_close(truth.double(), reward - reward.mean(), atol=1e-6, rtol=0)


def test_the_model_file_stands_alone() -> None:
    found = runpy.run_path(str(ROOT / "models" / "objectworld.py"))
    assert callable(found["model"]) and callable(found["load"]) and found["__doc__"]
