"""The mouse model: its law against a plain loop, and real mice against what is known of them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

import pirl
from models import mouse_labyrinth
from pirl.datasets import LABYRINTH_NODES, labyrinth_transition
from pirl.datasets import mouse_labyrinth as read_mice
from pirl.errors import DataError

LEFT, RIGHT, BACK, STAY = range(4)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def following(states: Tensor, actions: Tensor) -> Tensor:
    return labyrinth_transition()[states, actions].argmax(dim=-1)


def walk(episodes: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random paths from the entrance."""
    actions = torch.randint(4, (episodes, steps), generator=torch.Generator().manual_seed(seed))
    states = [torch.zeros(episodes, dtype=torch.int64)]
    for t in range(steps - 1):
        states.append(following(states[-1], actions[:, t]))
    return torch.stack(states, dim=1), actions


def labyrinth() -> pirl.TabularMDP:
    return pirl.TabularMDP(labyrinth_transition(), 0, mouse_labyrinth.DISCOUNT)


def traced(values: dict[str, Tensor] | None = None, **arguments: Any) -> Any:
    """The model's trace at given values of some sites, and prior draws of the others."""
    model = pyro.condition(mouse_labyrinth.model, values or {})
    return pyro.poutine.trace(model).get_trace(**arguments).nodes


def test_the_labyrinth_is_a_tree() -> None:
    table = labyrinth_transition()
    assert table.sum(dim=-1).eq(1.0).all()
    assert following(torch.tensor([0, 0, 0, 0]), torch.arange(4)).tolist() == [1, 2, 0, 0]
    assert following(torch.tensor([62, 62, 62, 62]), torch.arange(4)).tolist() == [125, 126, 30, 62]
    assert following(torch.tensor([100, 100, 100, 100]), torch.arange(4)).tolist() == [100, 100, 49, 100]
    # Back undoes left and right wherever they lead somewhere.
    inner = torch.arange(63)
    for action in (LEFT, RIGHT):
        there = following(inner, torch.full_like(inner, action))
        assert following(there, torch.full_like(inner, BACK)).equal(inner)


def test_a_static_reward_has_the_likelihood_of_trajectories() -> None:
    mdp, (states, actions) = labyrinth(), walk(7, 5)
    nodes = traced(mdp=mdp, states=states, actions=actions)
    reward = pirl.tabular_reward(nodes["maps"]["value"][0])
    demos = pirl.Trajectories(states, actions)
    expected = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths).choice_log_prob(demos.as_tensor())
    found = nodes["actions"]["fn"].log_prob(actions)
    assert found.shape == (7,)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    recorded = nodes["reward"]["value"]
    assert recorded.shape == (1, LABYRINTH_NODES)
    torch.testing.assert_close(recorded[0], reward[:, 0] - reward.mean(), rtol=1e-12, atol=1e-12)


def test_each_step_has_its_own_reward_and_a_mouse_its_own_maps() -> None:
    """Against one soft-optimal policy a step and subject, computed alone."""
    mdp, (states, actions) = labyrinth(), walk(4, 6)
    subjects = torch.tensor([0, 1, 1, 0])
    nodes = traced(mdp=mdp, states=states, actions=actions, num_maps=2, drift=0.7, lapse=True, subjects=subjects)
    moves, maps, spread, own, lapse = (nodes[name]["value"] for name in ("moves", "maps", "spread", "own", "lapse"))
    assert own.shape == (2, 2, LABYRINTH_NODES)
    expected = torch.zeros(4)
    for n in range(4):
        weight = torch.ones(2)
        for t in range(6):
            if t > 0:
                weight = weight + 0.7 * moves[t - 1]
            reward = weight @ (maps + spread * own[subjects[n]])
            policy = pirl.soft_policy(mdp, reward[:, None])[states[n, t]].exp()
            expected[n] += ((1 - lapse) * policy[actions[n, t]] + lapse / 4).log()
    found = nodes["actions"]["fn"].log_prob(actions)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert nodes["weights"]["value"][0].tolist() == [1.0, 1.0]


def test_engines_see_one_observation_an_episode_and_simulate_choices() -> None:
    states, actions = walk(5, 4)
    posterior = pirl.fit(
        mouse_labyrinth.model, labyrinth(), states, actions, 1, 0.5, True, engine="chees", num_chains=4, num_warmup=3,
        num_samples=4, num_posterior_predictive=8, num_prior=3, dims=mouse_labyrinth.dims, progress=False,
    )  # fmt: skip
    assert posterior.log_likelihood["actions"].dims == ("chain", "draw", "episode")
    assert posterior.posterior["reward"].dims == ("chain", "draw", "step", "state")
    assert posterior.posterior["weights"].dims == ("chain", "draw", "step", "map")
    assert posterior.posterior_predictive["actions"].shape[2:] == (5, 4)
    np.testing.assert_allclose(posterior.posterior["reward"].mean("state"), 0.0, atol=1e-12)


def test_what_is_simulated_follows_the_policy() -> None:
    """Of a thousand episodes in the same states each choice has the frequency that the model gives it."""
    mdp, (states, actions) = labyrinth(), walk(1, 3, seed=3)
    many = states.expand(4000, 3)
    nodes = traced(mdp=mdp, states=many, actions=actions.expand(4000, 3), num_maps=1)
    probability = nodes["actions"]["fn"].base_dist.probs[0]
    frequency = torch.nn.functional.one_hot(nodes["actions"]["fn"].sample(), 4).double().mean(dim=0)
    error = (probability * (1 - probability) / 4000).sqrt()
    assert ((frequency - probability).abs() <= 4.5 * error + 1e-12).all()


def test_the_data_are_as_published(data_folder: Path) -> None:
    training, validation = read_mice(data_folder / "mouse_labyrinth")
    assert (len(training), len(validation)) == (160, 40)
    assert training.lengths.eq(22).all() and validation.lengths.eq(22).all()
    assert training.starts.eq(0).all()
    # Caution for who compares: most of what is to be predicted occurs word for word in what is learnt from.
    seen = {tuple(path.ravel().tolist()) for path in training.as_tensor()}
    known = np.mean([tuple(path.ravel().tolist()) in seen for path in validation.as_tensor()])
    assert known == pytest.approx(0.78, abs=0.01)


def test_a_static_reward_of_real_mice(data_folder: Path) -> None:
    """Bits a decision on validation at the posterior mode: about -1.645, where random choices have -2."""
    arguments = mouse_labyrinth.load(data=data_folder / "mouse_labyrinth")
    posterior = pirl.fit(
        mouse_labyrinth.model, model_kwargs=arguments, engine="laplace", num_chains=1, num_samples=200, num_starts=1,
        num_prior=0, num_posterior_predictive=0, progress=False,
    )  # fmt: skip
    reward = torch.from_numpy(posterior.posterior["reward"].mean(("chain", "draw")).values[0])
    _, validation = mouse_labyrinth.paths(data_folder / "mouse_labyrinth")
    law = pirl.MaxCausalEntTrajectory(arguments["mdp"], pirl.tabular_reward(reward), lengths=validation.lengths)
    bits = law.choice_log_prob(validation.as_tensor()).sum() / (40 * 22 * np.log(2))
    assert bits.item() == pytest.approx(-1.645, abs=0.02)
    # Of the ends of the labyrinth mice like the one with the water.
    assert 63 + reward[63:].argmax() == 100


def damaged(folder: Path, **changes: Any) -> Path:
    states, actions = walk(5, 4)
    arrays = {"states": states, "actions": actions, "train_idx": np.arange(3), "val_idx": np.arange(3, 5)} | changes
    np.savez(folder / "water_restricted.npz", **{name: x for name, x in arrays.items() if x is not None})
    return folder


def test_the_loader_reads_the_published_arrays(tmp_path: Path) -> None:
    training, validation = read_mice(damaged(tmp_path))
    states, actions = walk(5, 4)
    assert training.states[:, :-1].equal(states[:3]) and validation.actions.equal(actions[3:])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"actions": None}, "is not an archive of whole numbers states, actions"),
        ({"states": np.full((5, 4), 3)}, "trajectory 0"),
        ({"states": np.full((5, 4), 200)}, "trajectory 0"),
        ({"states": np.zeros((4, 4), dtype=int)}, "do not fit actions"),
        ({"val_idx": np.array([7])}, "numbers of its 5 paths"),
        ({"states": np.zeros((5, 4))}, "is not an archive of whole numbers"),
    ],
)
def test_the_loader_names_what_is_wrong(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        read_mice(damaged(tmp_path, **changes))
    assert "water_restricted.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_the_loader_names_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_mice(tmp_path)
    (tmp_path / "water_restricted.npz").write_text("not an archive")
    with pytest.raises(DataError, match="water_restricted.npz"):
        read_mice(tmp_path)


def test_the_model_file_stands_alone() -> None:
    found = runpy.run_path(str(ROOT / "models" / "mouse_labyrinth.py"))
    assert callable(found["model"]) and callable(found["load"]) and found["__doc__"]
