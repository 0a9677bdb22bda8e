"""From draws to the groups of an :class:`xarray.DataTree`, with named dims.

The batch dims of a site take the names of its plates; its last dims take the names in ``infer={"dims": [...]}``, or the
distribution's ``event_dim_names``. What has no name is called after the site, as ArviZ does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pirl.errors import ConvergenceWarning, ModelError, OptionError, PirlError, first_line, form, warn
from pirl.infer.engine import PREDICTIVE_STREAM, PRIOR_STREAM, Draws, one_thread, own_generator, reseed
from pirl.infer.potential import Potential, Site, Values
from pirl.infer.user_errors import NO_DENSITY

if TYPE_CHECKING:
    import xarray

Named = dict[str, tuple[tuple[str | None, ...], np.ndarray]]
"""Name of a variable -> (names of its dims, array); None asks for a default name."""

BLOCK = 128

PRIOR_ATTEMPTS = 100


def _dims(site: Site, ndim: int, names: Sequence[str] | None, value: bool = True) -> tuple[str | None, ...]:
    """Name ``ndim`` dims of a site's value, or of its log density, which has batch dims only."""
    events = site.event_dim if value else 0
    if site.kind == "deterministic" and site.event_dim == len(site.shape):
        events = 0  # pyro.deterministic counts every dim as event unless told; plates still line up from the right
    dims: list[str | None] = [None] * ndim
    for position, plate in site.plates.items():
        at = ndim - events + position
        if 0 <= at < ndim:
            dims[at] = plate
    if value:
        named = tuple(names if names is not None else site.dims)
        if len(named) > ndim:
            raise ModelError(f"site {site.name!r} has {ndim} dims, but {len(named)} names of dims: {list(named)}")
        dims[ndim - len(named) :] = named
    return tuple(dims)


def _stack_over_draws(
    function: Callable[[Values], Any], draws: Values, count: int, random: bool, start: Callable[[], None]
) -> dict[str, Values]:
    """Map a function of one draw over ``count`` draws: by vmap in blocks where the model allows, else one by one."""
    with torch.no_grad(), one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        index = torch.arange(count)
        mapped = torch.func.vmap(
            lambda _, draw: function(draw), randomness="different" if random else "error", chunk_size=BLOCK
        )
        start()
        try:
            stacked = mapped(index, draws)
        except NO_DENSITY:
            stacked = None
        except PirlError:
            raise
        except Exception:  # whatever vmap cannot do (a branch on a value, an operator without a rule) a loop can
            stacked = None
        start()
        if stacked is not None and (random or _agree(stacked, function(_take(draws, 0)))):
            return stacked
        start()
        rows = [function(_take(draws, i)) for i in range(count)]
        return {
            group: {name: torch.stack([row[group][name] for row in rows]) for name in rows[0][group]}
            for group in rows[0]
        }


def _take(draws: Values, index: int) -> Values:
    return {name: value[index] for name, value in draws.items()}


def _agree(stacked: dict[str, Values], first: dict[str, Values]) -> bool:
    """Check the vmapped evaluation of the first draw against the plain one."""
    for group, values in first.items():
        for name, value in values.items():
            other = stacked[group][name][0]
            tolerance = 1e-3 if value.dtype == torch.float32 else 1e-8
            if other.shape != value.shape or not torch.allclose(other, value, tolerance, tolerance, equal_nan=True):
                return False
    return True


def replay_draws(potential: Potential, draws: Draws, log_likelihood: bool = True) -> dict[str, Values]:
    """Evaluate the model at every draw: the groups of :meth:`Potential.replay`, ``[chain, draw, ...]``.

    Raises:
        ModelError: the model has no density at one of them.
    """

    def replay(z: Values) -> dict[str, Values]:
        groups = potential.replay(z, draws.unconstrained)
        return groups if log_likelihood else {**groups, "log_likelihood": {}}

    chains, count = next(iter(draws.values.values())).shape[:2]
    here = torch.empty(0).device  # samplers keep draws in the memory of the host
    flat = {name: value.flatten(0, 1).to(here) for name, value in draws.values.items()}
    try:
        groups = _stack_over_draws(replay, flat, chains * count, random=False, start=lambda: None)
    except PirlError:
        raise
    except NO_DENSITY as error:
        raise ModelError(
            f"the model has no density at a draw of the posterior ({first_line(error)}): approximations (laplace, svi) "
            "may draw there; use nuts, chees or smc"
        ) from error
    return {
        group: {name: value.unflatten(0, (chains, count)) for name, value in values.items()}
        for group, values in groups.items()
    }


def simulate_draws(
    potential: Potential, latent: Values, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int
) -> Values:
    """Run the model forwards ``count`` times, with latent sites fixed where given; all values are ``[count, ...]``."""
    stream = PREDICTIVE_STREAM if latent else PRIOR_STREAM
    refused = 0

    def simulate(values: Values) -> dict[str, Values]:
        nonlocal refused
        for _ in range(1 if latent else PRIOR_ATTEMPTS):
            try:
                return {"drawn": potential.simulate(values, args, kwargs)}
            except NO_DENSITY as error:  # parameters for which there is nothing to draw from
                refused, last = refused + 1, error
        raise last

    def start() -> None:
        nonlocal refused
        refused = 0
        reseed(seed, stream)

    with own_generator():
        drawn = _stack_over_draws(simulate, latent, count, random=True, start=start)["drawn"]
    if refused:
        warn(
            f"{refused} draws from the prior were drawn again, because the model has no law there (an infinite "
            f"partition function, say); {count} others make the prior groups",
            ConvergenceWarning,
        )
    return drawn


def describe(
    potential: Potential,
    draws: Draws,
    *,
    unobserved: tuple[tuple[Any, ...], Mapping[str, Any]],
    num_posterior_predictive: int,
    num_prior: int,
    seed: int,
    dims: Mapping[str, Sequence[str]],
    log_likelihood: bool = True,
) -> dict[str, Named]:
    """Make every group that follows from the model and the draws.

    Args:
        unobserved: arguments and keyword arguments with which the model simulates.
        num_posterior_predictive: about how many draws, evenly spaced, are simulated from.
        num_prior: draws from the prior.
        dims: names of the last dims by site, before those that the model gives.
        log_likelihood: keep that of each observation.
    """
    sites = potential.sites
    replayed = replay_draws(potential, draws, log_likelihood)
    latent = {name: replayed["posterior"][name] for name in potential.latent}
    chains, count = next(iter(latent.values())).shape[:2]
    stats = {**draws.stats} if "lp" in draws.stats else {"lp": replayed["stats"]["lp"], **draws.stats}
    groups: dict[str, dict[str, Tensor]] = {**{g: replayed[g] for g in ("posterior", "log_prior", "log_likelihood")}}
    used = np.arange(count)
    if num_posterior_predictive > 0:
        used = np.unique(
            np.linspace(0, count - 1, min(count, -(-num_posterior_predictive // chains))).round().astype(int)
        )
        chosen = {name: value[:, used].flatten(0, 1) for name, value in latent.items()}
        drawn = simulate_draws(potential, chosen, chains * len(used), *unobserved, seed)
        groups["posterior_predictive"] = {
            name: value.unflatten(0, (chains, len(used)))
            for name, value in drawn.items()
            if sites[name].kind == "observed"
        }
    if num_prior > 0:
        drawn = simulate_draws(potential, {}, num_prior, *unobserved, seed)
        groups["prior"] = {n: v[None] for n, v in drawn.items() if sites[n].kind != "observed"}
        groups["prior_predictive"] = {n: v[None] for n, v in drawn.items() if sites[n].kind == "observed"}
    named: dict[str, Named] = {}
    for group, values in groups.items():
        named[group] = {
            name: (
                ("chain", "draw", *_dims(sites[name], v.ndim - 2, dims.get(name), not group.startswith("log_"))),
                _np(v),
            )
            for name, v in values.items()
        }
    if "posterior_predictive" in named:
        named["posterior_predictive"]["draw"] = (("draw",), used)
    if "log_weight" in stats:
        named["psis_moments"] = _weighed_moments(named["posterior"], _np(stats["log_weight"]))
    named["sample_stats"] = {name: (("chain", "draw"), _np(value)) for name, value in stats.items()}
    named["observed_data"] = {
        name: (_dims(site, site.value.ndim, dims.get(name)), _np(site.value))
        for name, site in sites.items()
        if site.value is not None
    }
    return {group: values for group, values in named.items() if values}


def _weighed_moments(posterior: Named, log_weight: np.ndarray) -> Named:
    """Mean and sd of each variable by the importance weights of an approximation's draws, ``log_weight [chain, draw]``.

    They are those of the posterior where k-hat is below 0.7, however wrong the approximation's own.
    """
    weight = np.exp(log_weight - np.logaddexp.reduce(log_weight, axis=None))
    moments: Named = {"moment": (("moment",), np.array(["mean", "sd"]))}
    for name, (dims, values) in posterior.items():
        shares = weight.reshape(weight.shape + (1,) * (values.ndim - 2))
        draws = np.where(shares > 0, values, 0).astype(float)  # a draw without weight may be NaN
        mean = (shares * draws).sum((0, 1))
        variance = (shares * (draws - mean) ** 2).sum((0, 1))
        moments[name] = (("moment", *dims[2:]), np.stack([mean, np.sqrt(variance)]))
    return moments


def _np(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def planned(potential: Potential, dims: Mapping[str, Sequence[str]]) -> dict[str, Named]:
    """Lay out the variables of a model before anything is sampled, with the dims that they will have, bar draws."""
    groups: dict[str, Named] = {"posterior": {}, "observed_data": {}}
    for name, site in potential.sites.items():
        if site.kind != "factor":
            group = "observed_data" if site.kind == "observed" else "posterior"
            groups[group][name] = (_dims(site, len(site.shape), dims.get(name)), np.broadcast_to(0, site.shape))
    return groups


def check_reserved(
    variables: Mapping[str, Sequence[str | None]], reserved: Collection[str] = ("chain", "draw")
) -> None:
    """Check that no dim, by variable, has the name of one that results have of their own.

    Raises:
        ModelError: names it.
    """
    for name, dims in variables.items():
        if taken := [dim for dim in dims if dim in reserved]:
            raise ModelError(f"{name!r} has a dim {taken[0]!r}, as results have of their own: rename it (or the plate)")


def check_names(groups: Mapping[str, Named], coords: Mapping[str, Sequence[Any]]) -> None:
    """Check that dims, variables and labels fit together.

    Raises:
        OptionError: labels in ``coords`` whose number is not the size of their dim, or that no dim has.
        ModelError: a dim has the name of a variable in its group, or two sizes there.
    """
    if not isinstance(coords, Mapping):
        raise OptionError(f"coords is {form(coords)}: give a dictionary of labels by dim")
    sizes: dict[str, set[int]] = {}
    for group, variables in groups.items():
        own: dict[str, int] = {}
        for name, (dims, array) in variables.items():
            if len(dims) != array.ndim:
                raise ModelError(f"{name!r} in group {group!r} has {array.ndim} dims, but {len(dims)} names: {dims}")
            for dim, size in zip(dims, array.shape, strict=True):
                if dim is None or dim in ("chain", "draw"):
                    continue
                if dim in variables and variables[dim][0] != (dim,):
                    raise ModelError(f"{dim!r} names a dim (or a plate) and a site: rename one of them")
                if own.setdefault(dim, size) != size:
                    raise ModelError(f"dim {dim!r} of {name!r} has size {size}, but {own[dim]} in another variable")
                sizes.setdefault(dim, set()).add(size)
    for dim, labels in coords.items():
        if dim not in sizes:
            raise OptionError(f"coords has labels for {dim!r}, but the dims are {', '.join(sorted(sizes))}")
        if sizes[dim] != {len(labels)}:
            found = " and ".join(map(str, sorted(sizes[dim])))
            raise OptionError(f"coords[{dim!r}] has {len(labels)} labels, but the dim has size {found}")


def _in_order(variables: Named) -> list[str]:
    """Order variables so that a dataset of them lists its dims in an order that each of them keeps.

    ArviZ labels the elements of a variable in the dataset's order of dims, that of first appearance, and takes the
    numbers in the variable's own: where the two differ (mu [what] before w [subject, what]), its tables give numbers
    the names of others. Variables stay in their places but for those that must come first.
    """
    dims = {name: [dim for dim in variables[name][0] if dim is not None] for name in variables}
    before: dict[str, set[str]] = {dim: set() for names in dims.values() for dim in names}
    for names in dims.values():
        for first, second in pairwise(names):
            before[second].add(first)
    try:
        wanted = list(TopologicalSorter(before).static_order())
    except CycleError:  # two variables disagree: no order serves both
        return list(variables)
    ordered: list[str] = []
    waiting = list(variables)
    while waiting:
        missing = [dim for dim in wanted if not any(dim in dims[name] for name in ordered)]
        # The next that brings no dim, or just those that are wanted next; failing that, the one that brings the most.
        new = {name: [dim for dim in dims[name] if dim in missing] for name in waiting}
        fitting = [name for name in waiting if new[name] == missing[: len(new[name])]]
        chosen = fitting[0] if fitting else max(waiting, key=lambda name: len(new[name]))
        ordered.append(chosen)
        waiting.remove(chosen)
    return ordered


def to_datatree(
    groups: Mapping[str, Named], coords: Mapping[str, Sequence[Any]], attrs: Mapping[str, str | int | float]
) -> xarray.DataTree:
    """Assemble groups into a DataTree; the attributes go to the root and to each group."""
    import xarray
    from arviz_base import dict_to_dataset

    check_names(groups, coords)
    labels = {dim: np.asarray(values) for dim, values in coords.items()}
    tree = {}
    for group, variables in groups.items():
        index = {name: array for name, (dims, array) in variables.items() if dims == (name,)}
        data = {name: variables[name][1] for name in _in_order(variables) if name not in index}
        tree[group] = dict_to_dataset(
            data,
            coords={**labels, **index},
            dims={name: list(variables[name][0]) for name in data},
            sample_dims=[],
            attrs=dict(attrs),
            check_conventions=False,
        )
    result = xarray.DataTree.from_dict(tree)
    result.attrs.update(attrs)
    return result
