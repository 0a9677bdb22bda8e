"""How much memory a result takes, how much there is, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pirl import errors
from pirl.fit import fit
from pirl.infer import Potential, memory
from pirl.infer.memory import check_memory, free_memory, result_bytes

QUIET: dict[str, Any] = {"num_prior": 0, "num_posterior_predictive": 0, "progress": False}


def model(y: torch.Tensor) -> None:
    """Sites of every kind and shape: vectors, simplices, plates, deterministic values, rows of several columns."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("subject", 4):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    pyro.deterministic("total", effect[:, None] + mean)
    pyro.factor("pull", -effect.square().sum())
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean.sum() + effect.sum(), 1.0).expand([3]).to_event(1), obs=y)
    pyro.sample("once", dist.Normal(mean[0], 1.0), obs=y[0, 0])


def data(rows: int = 5) -> torch.Tensor:
    return torch.arange(rows * 3, dtype=torch.float64).reshape(rows, 3) / rows


@pytest.mark.parametrize(("dtype", "log_likelihood", "thin"), [(None, True, 1), (torch.float32, False, 3)])
def test_the_bytes_of_each_part_are_told(dtype: Any, log_likelihood: bool, thin: int) -> None:
    result = fit(
        model, data(), engine="chees", num_chains=2, num_warmup=5, num_samples=7, thin=thin, dtype=dtype,
        log_likelihood=log_likelihood, max_leapfrogs=2, **QUIET,
    )  # fmt: skip
    found = {
        f"{name} in the group {group}": value.nbytes
        for group in ("posterior", "log_prior", "log_likelihood")
        if group in result.children
        for name, value in result[group].data_vars.items()
    }
    assert ("log_likelihood" in result.children) == log_likelihood
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float64)
    try:
        told = result_bytes(Potential(model, (data().to(dtype or torch.float64),)), 2 * -(-7 // thin), log_likelihood)
    finally:
        torch.set_default_dtype(before)
    hidden = told.pop("the draws in unconstrained space")
    assert told == found
    assert hidden >= 2 * -(-7 // thin) * (2 + 2 + 4) * (4 if dtype else 8)


def test_free_memory_is_some_of_what_the_machine_has() -> None:
    free = free_memory()
    assert free is not None and 0 < free < 2**50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}, 8192),
        ({"memory.max": "max\n", "memory.current": "5000\n", "memory.stat": "active_file 1\ninactive_file 2\n"}, 8192),
        # What the container caches of files is given back when it is needed.
        ({"memory.max": "6000\n", "memory.current": "5000\n", "memory.stat": "active_file 7\ninactive_file 9\n"}, 1016),
        ({"memory.max": "4000\n", "memory.current": "5000\n", "memory.stat": "active_file 0\ninactive_file 0\n"}, 0),
        ({"memory.max": "9999999\n", "memory.current": "0\n", "memory.stat": "active_file 0\ninactive_file 0\n"}, 8192),
    ],
)
def test_free_memory_minds_the_container(files: dict[str, str], expected: int, monkeypatch: Any) -> None:
    files = {"meminfo": "MemAvailable: 8 kB\n", **{Path(name).name: text for name, text in files.items()}}

    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name not in files:
            raise FileNotFoundError
        return files[path.name]

    monkeypatch.setattr(Path, "read_text", read)
    assert free_memory() == expected


def test_what_does_not_fit_is_refused_by_its_largest_part(monkeypatch: Any) -> None:
    potential = Potential(model, (data(500),))
    monkeypatch.setattr(memory, "free_memory", lambda: 3_000_000_000)
    check_memory(potential, 1000, log_likelihood=True)
    with pytest.raises(errors.MemoryLimitError) as refused:
        check_memory(potential, 1_000_000, log_likelihood=True)
    words = str(refused.value)
    assert "the result of 1000000 draws would take about" in words and "3.0 GB are free" in words
    assert "the largest part is y in the group log_likelihood with" in words
    assert words.endswith("use log_likelihood=False, a larger thin, or fewer chains or samples")
    with pytest.raises(errors.MemoryLimitError, match="part is the draws in .*use a larger thin, or fewer chains or "):
        check_memory(potential, 10_000_000, log_likelihood=False)
    monkeypatch.setattr(memory, "free_memory", lambda: None)  # not known: nothing is refused
    check_memory(potential, 10**12, log_likelihood=True)


def test_a_fit_is_refused_before_it_begins(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    monkeypatch.setattr("pirl.infer.nuts.sample", lambda *args, **kwargs: pytest.fail("began"))
    monkeypatch.setattr("pirl.infer.laplace.find_mode", lambda *args, **kwargs: pytest.fail("began"))
    for engine in ("nuts", "laplace"):
        with pytest.raises(errors.MemoryLimitError, match="group posterior|group log_likelihood|unconstrained"):
            fit(model, data(), engine=engine, **QUIET)
