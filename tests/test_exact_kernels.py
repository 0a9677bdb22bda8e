"""Each transition keeps its law exactly: rank tests of the kernels of ``chees``, ``smc`` and ``nuts``, frozen, and of
that of studies of calibration, which samples many data sets at once.

On a small target that is not Gaussian, tempered or not, with exact draws; and on the joint law of weights and
demonstrations of a model, where exact draws come from the prior and ``sample()`` (Geweke 2004, by ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import exact
import planted
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pirl.distributions import MaxCausalEntTrajectory, MaxEntTrajectory, TabularTrajectory
from pirl.infer.batched import BatchedPotential
from pirl.infer.chees import Chees
from pirl.infer.ensemble import Ensemble
from pirl.infer.hmc import Metric
from pirl.infer.nuts import _Kernel
from pirl.infer.potential import Potential
from pirl.infer.ranks import ALONE
from pirl.infer.recorded import recorded
from pirl.infer.replicated import ReplicatedPotential, _Metrics
from pirl.infer.smc import SMC
from pirl.infer.start import guarded
from pirl.mdp import TabularMDP
from pirl.rewards import linear_reward

PROBES = torch.tensor([[0.1, 0.2], [-0.3, 0.4]], dtype=torch.float64)
METRIC = torch.tensor([[0.6, 0.0], [0.5, 0.9]], dtype=torch.float64)


@contextmanager
def inside_an_engine(seed: int = 0) -> Iterator[None]:
    """Double precision, a trusted model, and random numbers that nobody else sees."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(False), torch.random.fork_rng([]):
            torch.manual_seed(seed)
            yield
    finally:  # also where a law fails, as it must under a planted fault
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------------- exact targets


def conjugate() -> None:
    """A rate and a probability, with the likelihoods of 2 events in 1.5 seconds and of 3 successes in 4 trials."""
    rate = pyro.sample("rate", dist.Gamma(1.5, 1.0))
    chance = pyro.sample("chance", dist.Beta(1.0, 2.0))
    pyro.factor("events", 2 * rate.log() - 1.5 * rate)
    pyro.factor("trials", 3 * chance.log() + (1 - chance).log())


def conjugate_draws(count: int, temperature: float) -> Tensor:
    """Exact draws ``[count, 2]`` at a temperature, in unconstrained space."""
    t = temperature
    rate = dist.Gamma(1.5 + 2 * t, 1.0 + 1.5 * t).sample((count,))
    chance = dist.Beta(1.0 + 3 * t, 2.0 + t).sample((count,))
    return torch.stack([rate.log(), chance.logit()], 1)


def coordinates(state: exact.State) -> Tensor:
    """The coordinates, their product, and how far out a chain is."""
    z = state[0]
    return torch.stack([z[:, 0], z[:, 1], z[:, 0] * z[:, 1], (z**2).sum(1)])


def many_chains(engine: str, temperature: float = 1.0) -> None:
    """The frozen transition of ``chees`` or ``smc``, as it is made in a step after warm-up, or at a temperature."""
    with inside_an_engine(1):
        potential = Potential(conjugate)
        target = BatchedPotential(potential, PROBES, 512)
        seeds = iter(range(1, 10**6))

        def move(state: exact.State, edge: int) -> exact.State:
            return (frozen_step(engine, target, state[0], edge, next(seeds), temperature),)

        exact.check(lambda n: (conjugate_draws(n, temperature),), move, coordinates, 4000)


def frozen_step(
    engine: str,
    target: BatchedPotential,
    start: Tensor,
    edge: int,
    seed: int,
    temperature: float = 1.0,
    length: float = 2.0,
) -> Tensor:
    """A step of ``chees`` after warm-up, or a move of ``smc``, of chains whose law is the target at a temperature."""
    ensemble = Ensemble(target, len(start), ALONE)
    options: dict[str, Any] = {"seed": 0, "target_accept_prob": 0.8, "max_leapfrogs": 100, "dense_mass": True}
    if engine == "chees":
        sampler: Any = Chees(ensemble, start, Metric(METRIC), num_warmup=0, trajectory_length=length, **options)
    else:
        sampler = SMC(ensemble, start, num_islands=1, target_ess=0.8, max_moves=5, correlation=0.2, **options)
        sampler.metric, sampler.temperatures = Metric(METRIC), [0.0, temperature]
        sampler.length.restart(length)
    # What a start would choose depends on where it is, and a frozen kernel may not.
    sampler.step_size.restart(1.1)
    sampler.phase = ensemble.evaluate(start, torch.full_like(start[:, 0], temperature))
    sampler.seed = seed
    return sampler.advance(edge)[0]


def no_u_turn(count: int = 250) -> None:
    """Pyro's kernel, as ``nuts`` sets it up and drives it."""
    with inside_an_engine(2):
        potential = Potential(conjugate)
        kernel = frozen(potential, 0.9)

        def move(state: exact.State, edge: int) -> exact.State:
            return (transitions(kernel, potential, state[0]),)

        exact.check(lambda n: (conjugate_draws(n, 1.0),), move, coordinates, count)


def frozen(potential: Potential, step_size: float) -> _Kernel:
    """The kernel of ``nuts`` after a warm-up of nothing, with a given step size."""
    first, second = (potential.unflatten(z) for z in PROBES)
    energy = guarded(recorded(potential, first, second) or potential)
    kernel = _Kernel(
        potential_fn=energy, step_size=step_size, adapt_step_size=False, adapt_mass_matrix=False, max_tree_depth=3
    )
    kernel.initial_params = first
    kernel.setup(0)
    return kernel


def transitions(kernel: _Kernel, potential: Potential, starts: Tensor) -> Tensor:
    """One transition from each start."""
    ends = []
    for start in starts:
        kernel.clear_cache()
        ends.append(potential.flatten(kernel.sample(potential.unflatten(start))))
    return torch.stack(ends)


# ----------------------------------------------------------------------------------------------- weights and their data

FEATURES = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-0.5, 0.5], [1.0, 1.0]]], dtype=torch.float64)
HORIZON, WATCHED = 2, 1


def world() -> TabularMDP:
    """Two states, two actions: few enough data sets that each has a potential of its own."""
    table = torch.tensor([[[0.8, 0.2], [0.3, 0.7]], [[0.5, 0.5], [0.1, 0.9]]], dtype=torch.float64)
    return TabularMDP(table, initial=0, horizon=HORIZON)


class Joint:
    """Weights and demonstrations of a model, of which both can be simulated exactly.

    Episodes are watched for one decision of two, and the state after it: each has four outcomes, and two of them ten
    that a likelihood can tell apart.
    """

    def __init__(self, cls: type[TabularTrajectory], episodes: int = 2) -> None:
        self.cls, self.mdp, self.lengths = cls, world(), torch.full((episodes,), WATCHED)

    def model(self, demos: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, 1.5).expand([2]).to_event(1))
        with pyro.plate("episode", len(self.lengths)):
            law = self.cls(self.mdp, linear_reward(FEATURES, weights), lengths=self.lengths)
            pyro.sample("demos", law, obs=demos)

    def start(self, count: int) -> exact.State:
        weights = 1.5 * torch.randn(count, 2)
        return weights, self.simulate(weights)

    def simulate(self, weights: Tensor) -> Tensor:
        return self.cls(self.mdp, linear_reward(FEATURES, weights).unsqueeze(-3), lengths=self.lengths).sample()

    def code(self, demos: Tensor) -> Tensor:
        """A number for each data set; the order of episodes does not matter."""
        outcome = (2 * demos[:, :, 0, 1] + demos[:, :, 1, 0]).sort(1).values
        return (outcome * 4 ** torch.arange(len(self.lengths))).sum(1)


CHAINS = 16
"""Of each data set in a call, where data sets are moved side by side."""

Move = Callable[[Tensor, Tensor, int], Tensor]
"""Of weights, each beside its data set, and the number of the step."""


def one_by_one(law: Joint, engine: str) -> Move:
    """The kernel of an engine, frozen: of each data set by itself."""
    seeds = iter(range(1, 10**6))
    moves: dict[int, Callable[[Tensor, int], Tensor]] = {}

    def made(demos: Tensor) -> Callable[[Tensor, int], Tensor]:
        potential = Potential(law.model, (demos,))
        if engine == "nuts":
            kernel = frozen(potential, 0.9)
            return lambda z, edge: transitions(kernel, potential, z)
        target = BatchedPotential(potential, PROBES, 128)
        return lambda z, edge: frozen_step(engine, target, z, edge, next(seeds), length=6.0)

    def move(weights: Tensor, demos: Tensor, edge: int) -> Tensor:
        moved, codes = weights.clone(), law.code(demos)
        for value in codes.unique().tolist():
            rows = codes == value
            if value not in moves:
                moves[value] = made(demos[rows][0])
            moved[rows] = moves[value](weights[rows], edge)
        return moved

    return move


def side_by_side(law: Joint) -> Move:
    """The transition of studies of calibration, which moves the chains of all data sets at once."""
    known = torch.zeros(0)
    target: ReplicatedPotential | None = None

    def move(weights: Tensor, demos: Tensor, edge: int) -> Tensor:
        nonlocal known, target
        codes = law.code(demos)
        if target is None:
            known, place = codes.unique(return_inverse=True)
            each = demos[torch.stack([(place == r).nonzero()[0, 0] for r in range(len(known))])]
            potentials = [Potential(law.model, (one,)) for one in each]
            target = ReplicatedPotential(potentials, law.model, {"demos": each}, PROBES, CHAINS * len(each))
        which, size = torch.searchsorted(known, codes), len(known)
        assert int(which.max()) < size and torch.equal(known[which], codes)
        # Rows are c R + r; those of data sets with fewer chains than others are filled up, and thrown away.
        order = [(which == r).nonzero().flatten() for r in range(size)]
        chains = -(-max(len(rows) for rows in order) // CHAINS) * CHAINS
        table = weights.new_zeros(chains, size, 2)
        for r, rows in enumerate(order):
            table[: len(rows), r] = weights[rows]
        z, metric = table.reshape(-1, 2), _Metrics(METRIC.expand(size, 2, 2))
        ensemble, one = Ensemble(target, len(z), ALONE), torch.ones_like(z[:, 0])
        numbers = torch.randn_like(z), torch.rand_like(one).log()
        z = ensemble.transition(ensemble.evaluate(z, one), metric, 1.8 * one, 3, *numbers).phase.z
        moved, table = weights.clone(), z.reshape(table.shape)
        for r, rows in enumerate(order):
            moved[rows] = table[: len(rows), r]
        return moved

    return move


def joint(cls: type[TabularTrajectory], kernel: str, episodes: int = 2, count: int = 1500) -> None:
    """Weights given demonstrations by the kernel, demonstrations given weights by ``sample()``, and ranks.

    The reversal of the two in turn is the two in the other order.
    """
    with inside_an_engine(3):
        law = Joint(cls, episodes)
        move = side_by_side(law) if kernel == "many" else one_by_one(law, kernel)

        def forwards(state: exact.State, edge: int) -> exact.State:
            weights = move(*state, edge)
            return weights, law.simulate(weights)

        def backwards(state: exact.State, edge: int) -> exact.State:
            demos = law.simulate(state[0])
            return move(state[0], demos, edge), demos

        def statistics(state: exact.State) -> Tensor:
            weights, demos = state
            actions, ends = demos[:, :, 0, 1].sum(1), demos[:, :, 1, 0].sum(1)
            return torch.stack([*weights.T, (weights**2).sum(1), weights[:, 0] * actions, weights[:, 1] * ends])

        exact.require_uniform(lambda size: exact.ranks(law.start, forwards, backwards, statistics, size, 3), count, 3)


# ---------------------------------------------------------------------------------------------------------------- tests

KERNELS: dict[str, Callable[[], None]] = {
    "chees": lambda: many_chains("chees"),
    "smc at the prior": lambda: many_chains("smc", 0.0001),
    "smc between": lambda: many_chains("smc", 0.4),
    "nuts": no_u_turn,
    "chees, trajectory reading": lambda: joint(MaxEntTrajectory, "chees"),
    "chees, causal reading": lambda: joint(MaxCausalEntTrajectory, "chees"),
    "smc, trajectory reading": lambda: joint(MaxEntTrajectory, "smc"),
    "many data sets, causal reading": lambda: joint(MaxCausalEntTrajectory, "many"),
    "nuts, trajectory reading": lambda: joint(MaxEntTrajectory, "nuts", 1, 200),
}
SLOW = ("smc, trajectory reading", "many data sets, causal reading", "nuts, trajectory reading")
SEEN = [
    ("chees", "every proposal is accepted"),
    ("chees", "the momentum depends on where a chain is"),
    ("chees", "the momentum is wider than its law"),
    ("chees", "the kinetic energy is left out of the acceptance"),
    ("smc between", "every proposal is accepted"),
    ("smc between", "the log Jacobian is dropped"),
    ("smc between", "the temperature is ignored"),
    ("nuts", "the log Jacobian is dropped"),
    ("chees, trajectory reading", "Z^(M-1) instead of Z^M"),
    pytest.param("smc, trajectory reading", "the prior counts twice", marks=pytest.mark.slow),
    pytest.param("nuts, trajectory reading", "the prior counts twice", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in KERNELS])
def test_the_kernel_keeps_its_law(name: str) -> None:
    KERNELS[name]()


@pytest.mark.parametrize(("name", "fault"), SEEN)
def test_a_wrong_kernel_does_not(name: str, fault: str) -> None:
    raised = planted.under(fault, KERNELS[name])
    assert isinstance(raised, AssertionError) and "not uniform" in str(raised)


@pytest.mark.slow
def test_energies_of_another_data_set_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chains beyond the first two: those are looked at when a study begins."""
    original = ReplicatedPotential.__call__

    def call(self: ReplicatedPotential, vectors: Tensor, temperature: Tensor | None = None) -> Any:
        value, slope, rest = original(self, vectors, temperature)
        first, others = value.split([2 * self.replicates, len(value) - 2 * self.replicates])
        return torch.cat([first, others.reshape(-1, self.replicates).roll(1, 1).reshape(-1)]), slope, rest

    monkeypatch.setattr(ReplicatedPotential, "__call__", call)
    with pytest.raises(AssertionError, match="not uniform"):
        KERNELS["many data sets, causal reading"]()


def test_ranks_of_an_exact_kernel_are_uniform_and_of_a_biased_one_are_not() -> None:
    """An autoregression that keeps the normal law, by the draws of each edge; one that is pulled to the right."""

    def kernel(shift: float) -> exact.Kernel:
        return lambda state, edge: (0.8 * state[0] + 0.6 * torch.randn_like(state[0]) + shift,)

    def start(count: int) -> exact.State:
        return (torch.randn(count),)

    torch.manual_seed(0)
    exact.check(start, kernel(0.0), lambda state: state[0][None], 2000)
    # Of a constant all ranks are ties.
    exact.check(start, kernel(0.0), lambda state: torch.zeros(1, len(state[0])), 2000)
    with pytest.raises(AssertionError, match="not uniform"):
        exact.check(start, kernel(0.1), lambda state: state[0][None], 2000)
