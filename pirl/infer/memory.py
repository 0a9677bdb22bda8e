"""How much memory a result takes, told before the work that makes it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pirl.errors import MemoryLimitError
from pirl.infer.potential import Potential

COPIES = 2.5
"""A group is held as draws, as tensors and as the arrays of the result, not all at the same time."""


def check_memory(potential: Potential, draws: int, log_likelihood: bool) -> None:
    """Refuse a run whose result would not fit into the free memory of this machine.

    Args:
        draws: of all chains, after thinning.
        log_likelihood: whether that of each observation is kept.

    Raises:
        MemoryLimitError: it would not fit; says what is largest and what to change.
    """
    free = free_memory()
    parts = result_bytes(potential, draws, log_likelihood)
    total = COPIES * sum(parts.values())
    if free is None or total <= free:
        return
    largest = max(parts, key=lambda name: parts[name])
    advice = "log_likelihood=False, " if largest.endswith("log_likelihood") else ""
    raise MemoryLimitError(
        f"the result of {draws} draws would take about {_in_words(total)}, but {_in_words(free)} are free; the largest "
        f"part is {largest} with {_in_words(parts[largest])}: use {advice}a larger thin, or fewer chains or samples"
    )


def result_bytes(potential: Potential, draws: int, log_likelihood: bool) -> dict[str, int]:
    """Bytes of each part of the result that grows with the number of draws."""
    size = torch.empty(0).element_size()
    parts = {"the draws in unconstrained space": draws * size * (potential.size + 8)}
    for name, site in potential.sites.items():
        batch = site.shape[: len(site.shape) - site.event_dim].numel()
        if site.kind in ("latent", "deterministic"):
            parts[f"{name} in the group posterior"] = draws * size * site.shape.numel()
        if site.kind == "latent":
            parts[f"{name} in the group log_prior"] = draws * size * batch
        if site.kind == "observed" and log_likelihood:
            parts[f"{name} in the group log_likelihood"] = draws * size * batch
    return parts


def free_memory() -> int | None:
    """Bytes that this process may still take: of the machine, or of the container that it runs in; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(pages["active_file"]) + int(pages["inactive_file"])  # given back when others need it
        return free if limit == "max" else max(0, min(free, int(limit) - used + cached))
    except (OSError, ValueError, KeyError):
        return free


def _in_words(count: int | float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
