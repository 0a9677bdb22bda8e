"""Is pirl calibrated? Each engine by simulation on a small problem, both readings; the long form is a benchmark.

``python -m tests.benchmarks.calibration`` has a thousand replicates of the shipped models; here are some dozens of a
problem with chance, terminal states, episodes of different length, and starts that are drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pirl
from models import bus_engine
from pirl.verdicts import judge, verdicts
from tests.bus_grid import QUANTITIES, BusGrid, truths_below

ALARM = 1e-3
"""Adjusted p-value that fails a test: a sound engine does so once in a thousand seeds."""

LAWS = {"causal": pirl.MaxCausalEntTrajectory, "trajectory": pirl.MaxEntTrajectory}


def corridor() -> pirl.TabularMDP:
    """Four cells in a row, left and right with slips; the right end is terminal, and there is no left at the left."""
    transition = torch.zeros(4, 2, 4, dtype=torch.float64)
    for cell in range(4):
        for action, step in ((0, -1), (1, 1)):
            transition[cell, action, max(0, min(3, cell + step))] += 0.8
            transition[cell, action, cell] += 0.2
    terminal = torch.tensor([False, False, False, True])
    available = torch.ones(4, 2, dtype=torch.bool)
    available[0, 0] = False
    initial = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    return pirl.TabularMDP(transition, initial, horizon=6, terminal=terminal, available=available)


def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, reading: str) -> None:
    """What a cell and what going right are worth."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    place = torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=mdp.dtype)
    right = torch.tensor([0.0, 1.0], dtype=mdp.dtype)
    reward = weights[..., :1, None] * place[:, None] + weights[..., 1:, None] * right
    with pyro.plate("episode", len(demos)):
        law = LAWS[reading](mdp, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def plan(mdp: pirl.TabularMDP) -> pirl.Trajectories:
    """Twelve episodes, watched for three to six decisions."""
    lengths = torch.arange(12) % 4 + 3
    reward = torch.zeros(4, 2, dtype=mdp.dtype)
    torch.manual_seed(0)
    table = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=lengths).sample()
    return pirl.Trajectories(table[..., 0], table[:, :-1, 1], (table[..., 1] >= 0).sum(1), limits=lengths)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("chees", "causal", {"num_replicates": 60, "num_chains": 8, "num_warmup": 80, "num_samples": 30}),
    ("chees", "trajectory", {"num_replicates": 60, "num_chains": 8, "num_warmup": 80, "num_samples": 30}),
    # What samples many replicates at once does not adapt as chees does: here chees itself, one by one.
    ("chees", "causal", {"num_replicates": 15, "num_chains": 8, "num_warmup": 80, "num_samples": 30, "batch": 1}),
    ("nuts", "trajectory", {"num_replicates": 6, "num_warmup": 60, "num_samples": 80}),
    ("smc", "causal", {"num_replicates": 15, "num_samples": 120}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "reading", "sizes"),
    CASES,
    ids=["-".join([*case[:2], *("one by one" for _ in case[2].keys() & {"batch"})]) for case in CASES],
)
def test_engines_are_calibrated(engine: str, reading: str, sizes: dict[str, Any]) -> None:
    mdp = corridor()
    study = pirl.calibrate(model, plan(mdp), mdp, reading, engine=engine, num_draws=39, seed=2, progress=False, **sizes)
    table = verdicts(study)
    assert list(table.index) == ["weights[0]", "weights[1]", "log_likelihood", "return_gap"]
    assert not study["sample_stats"]["failed"].values.any()
    assert table["p_adjusted"].min() > ALARM, table
    if engine == "chees":
        assert (study.attrs["sampler"] == "chees") == ("batch" in sizes)


def test_truths_of_a_study_lie_in_exact_posteriors_as_they_should() -> None:
    # Without an engine: what a study draws, and the density of the model, are one law. Of 400 data sets the mean of a
    # uniform rank among 19 draws has a standard error of .3; a grid of 100 x 100 cells errs by some hundredths.
    u = truths_below(BusGrid(bus_engine.load(group="4"), size=100), seed=0, count=400)
    table = judge(np.minimum((20 * u).astype(int), 19), 19, QUANTITIES)
    assert table["p_adjusted"].min() > ALARM, table
