"""Chains in blocks: wherever a block is evaluated, its numbers are the same bits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pirl import errors
from pirl.fit import fit
from pirl.infer import Potential
from pirl.infer.batched import BatchedPotential
from pirl.infer.ensemble import CPU_WIDTH, GPU_WIDTH, Ensemble, default_width
from pirl.infer.hmc import Metric, Phase, transition
from pirl.infer.ranks import ALONE, Ranks

SIZE = 3
CPU = torch.device("cpu")


def model(x: torch.Tensor, y: torch.Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([SIZE]).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.StudentT(3.0, x @ weights, 0.8), obs=y)


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    """As engines make them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pyro.validation_enabled(False):
        yield
    torch.set_default_dtype(before)


def target(width: int, rows: int = 20, **options: Any) -> BatchedPotential:
    x = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(1))
    return BatchedPotential(Potential(model, (x, x.sum(1))), torch.randn(2, SIZE), width, **options)


def ensemble(num_chains: int, width: int, ranks: Ranks = ALONE, **options: Any) -> Ensemble:
    return Ensemble(target(width, **options), num_chains, ranks)


def positions(num_chains: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(2)
    return torch.randn(num_chains, SIZE, generator=numbers), torch.rand(num_chains, generator=numbers)


def moved(group: Ensemble, threads: int = 1) -> list[torch.Tensor]:
    """Every column of an evaluation and of a transition."""
    z, temperature = positions(group.num_chains)
    numbers = torch.Generator().manual_seed(3)
    momentum = torch.randn(*z.shape, generator=numbers)
    sizes = 0.1 + 0.2 * torch.rand(len(z), generator=numbers)
    threshold = torch.rand(len(z), generator=numbers).log()
    metric = Metric(torch.linalg.cholesky(torch.eye(SIZE) + 0.5))
    with group.at_work(CPU):
        phase = group.evaluate(z, temperature)
        after = group.transition(phase, metric, sizes, 3, momentum, threshold)
    now = {**vars(phase), **{f"new {name}": value for name, value in vars(after.phase).items()}}
    return [*now.values(), *(value for name, value in vars(after).items() if name != "phase")]


def test_blocks_are_evaluated_each_by_itself() -> None:
    """Eleven chains in blocks of four, the last of three."""
    group = ensemble(11, 4)
    z, temperature = positions(11)
    phase = group.evaluate(z, temperature)
    for start in (0, 4, 8):
        rows = slice(start, start + 4)
        alone = Phase.at(z[rows], temperature[rows], group.target)
        for name, value in vars(alone).items():
            assert torch.equal(getattr(phase, name)[rows], value), name


def test_ranks_without_a_block_are_told_of() -> None:
    with pytest.warns(errors.RankWarning, match="1 of 3 ranks .* set chains_per_block to 4"):
        ensemble(11, 8, Ranks(0, 3))
    assert len(ensemble(11, 4, Ranks(0, 3))._own) == 1


def test_chains_one_by_one_agree_to_rounding() -> None:
    found = moved(ensemble(11, 4))
    for other in (moved(ensemble(11, 1)), moved(ensemble(11, 11)), moved(ensemble(11, 4, loop=True))):
        for ours, theirs in zip(found, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_transition_of_all_is_the_transition_of_each() -> None:
    group = ensemble(7, 3)
    z, temperature = positions(7)
    metric, phase = Metric(torch.ones(SIZE)), group.evaluate(z, temperature)
    sizes, momentum, threshold = torch.linspace(0.1, 0.4, 7), torch.randn(7, SIZE), torch.rand(7).log()
    together = group.transition(phase, metric, sizes, 2, momentum, threshold)
    for i in range(7):
        row = slice(i, i + 1)
        own = Phase(*(value[row] for value in vars(phase).values()))
        alone = transition(group.target, own, metric, sizes[row], 2, momentum[row], threshold[row])
        torch.testing.assert_close(together.phase.z[row], alone.phase.z, rtol=1e-9, atol=1e-12)
        for name in ("proposal", "velocity", "acceptance", "hamiltonian", "diverging"):
            torch.testing.assert_close(getattr(together, name)[row], getattr(alone, name), rtol=1e-9, atol=1e-12)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_draws_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    torch.set_num_threads(1)
    expected = moved(ensemble(11, 4))
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for ours, theirs in zip(moved(ensemble(11, 4)), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_products_that_torch_would_split_do_not_either(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of 32 chains with 5 weights and 20,000 rows: gradients differ where two threads share them."""
    monkeypatch.setattr(sys.modules[__name__], "SIZE", 5)
    group = ensemble(32, 32, rows=20_000)
    z, temperature = positions(32)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with group.at_work(CPU):
            found.append(group.evaluate(z, temperature))
    assert torch.equal(found[0].energy, found[1].energy)
    assert torch.equal(found[0].gradient, found[1].gradient)


def test_blocks_go_to_several_threads_of_one_each(threads: None) -> None:
    torch.set_num_threads(2)
    group = ensemble(8, 2)
    both, seen = threading.Barrier(2, timeout=30), set()
    inner = group.target

    def watched(*args: Any) -> Any:
        both.wait()  # passes only if two are at work
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return inner(*args)

    class Watched:
        width, recorded = 2, True

        def __call__(self, *args: Any) -> Any:
            return watched(*args)

    group.target = Watched()  # type: ignore[assignment]
    with group.at_work(CPU):
        group.evaluate(*positions(8))
    assert len(seen) == 2 and {count for _, count in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}


@pytest.mark.parametrize("fails", [False, True])
def test_the_number_of_threads_is_what_it_was(fails: bool, threads: None) -> None:
    torch.set_num_threads(2)
    group = ensemble(8, 4)
    running = threading.active_count()

    def work() -> None:
        with group.at_work(CPU):
            assert torch.get_num_threads() == 1
            group.evaluate(*positions(8))
            if fails:
                raise ArithmeticError

    if fails:
        with pytest.raises(ArithmeticError):
            work()
    else:
        work()
    assert torch.get_num_threads() == 2
    assert threading.active_count() == running
    group.evaluate(*positions(8))  # without its threads, in this one


def test_an_error_in_a_block_is_raised(threads: None) -> None:
    torch.set_num_threads(2)
    group = ensemble(8, 2)

    class Broken:
        width, recorded = 2, True

        def __call__(self, *args: Any) -> Any:
            raise ArithmeticError("in a block")

    group.target = Broken()  # type: ignore[assignment]
    with pytest.raises(ArithmeticError, match="in a block"), group.at_work(CPU):
        group.evaluate(*positions(8))
    assert torch.get_num_threads() == 2


def test_models_that_are_not_recorded_stay_in_one_thread(threads: None) -> None:
    """Their Python is not made for several at once."""
    torch.set_num_threads(2)
    group = ensemble(8, 4, record=False)
    with group.at_work(CPU):
        assert group._pool is None and torch.get_num_threads() == 2


def test_default_widths() -> None:
    assert default_width(1000, CPU) == CPU_WIDTH
    assert default_width(5, CPU) == 5
    assert default_width(5000, torch.device("cuda")) == GPU_WIDTH


@pytest.mark.filterwarnings("ignore:.* ranks have nothing to do")
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_share_whole_blocks(size: int) -> None:
    """Eleven chains in three blocks: each block on one rank, in their order, and all know how many each has."""
    groups = [ensemble(11, 4, Ranks(rank, size), record=False) for rank in range(size)]
    rows = [range(11)[block] for group in groups for block in group._own]
    assert [i for block in rows for i in block] == list(range(11))
    assert {len(block) for block in rows} == {4, 3}
    for group in groups:
        assert group._counts == [sum(len(range(11)[b]) for b in other._own) for other in groups]


def test_factorisations_that_fail_in_two_threads_leave_pyro_whole() -> None:
    """A recorded Cholesky raises for a chain; the model's Python then runs, one thread at a time, from the prior on."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        off = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=x.dtype)
        root = torch.linalg.cholesky(torch.eye(2, dtype=x.dtype) + x[0] * off)
        pyro.sample("y", dist.MultivariateNormal(x, scale_tril=root), obs=torch.zeros(2, dtype=x.dtype))

    before = torch.get_num_threads()
    draws = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            options = {"num_chains": 16, "chains_per_block": 4, "num_warmup": 10, "num_samples": 5, "seed": 2}
            result = fit(model, engine="chees", progress=False, num_prior=0, num_posterior_predictive=0, **options)
        finally:
            torch.set_num_threads(before)
        draws.append(result.posterior["x"].values)
    assert np.isfinite(draws[0]).all() and np.abs(draws[0][..., 0]).max() < 1
    np.testing.assert_array_equal(*draws)


def test_results_are_laid_out_as_a_checkpoint_gives_them_back() -> None:
    """In rows, where torch aligns its tensors: some processors round products of other layouts differently."""
    for found in moved(ensemble(8, 4)):
        assert found.is_contiguous() and found.data_ptr() % 64 == 0
    factor = Metric(torch.linalg.cholesky(torch.eye(SIZE) + 0.5).mT.contiguous().mT).factor
    assert factor.is_contiguous() and factor.data_ptr() % 64 == 0
