"""``pirl.fit``: one call from a Pyro model and its arguments to a posterior in an :class:`xarray.DataTree`."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pirl.errors import ConvergenceWarning, ModelError, OptionError, check_counts, named_line, warn
from pirl.infer import Potential, get_engine
from pirl.infer.checkpoint import open_checkpoint
from pirl.infer.datatree import Named, check_names, check_reserved, describe, planned, to_datatree
from pirl.infer.engine import START_STREAM, one_thread, own_generator, reseed
from pirl.infer.memory import check_memory
from pirl.infer.ranks import join
from pirl.infer.user_errors import NO_DENSITY
from pirl.partition import untrusted
from pirl.posterior.from_samples import partition_quality
from pirl.posterior.identification import identified
from pirl.setting import Setting, bound, own_keywords

if TYPE_CHECKING:
    import xarray


def fit(
    model: Callable[..., Any],
    *args: Any,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    engine: str = "chees",
    num_chains: int | None = None,
    num_warmup: int | None = None,
    num_samples: int | None = None,
    thin: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    log_likelihood: bool = True,
    num_posterior_predictive: int = 500,
    num_prior: int = 500,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> xarray.DataTree:
    """Infer the posterior of a Pyro model and return everything that ArviZ can use.

    The result has the groups posterior, sample_stats, log_likelihood (of each observation), log_prior (of each latent
    site), posterior_predictive, prior, prior_predictive, observed_data, constant_data, and identification (of each
    latent element the share that no demonstration can show). Dims are named after plates and after
    ``infer={"dims": [...]}`` of the sites.

    The run is float64 unless the first argument with a floating ``dtype`` says otherwise: torch's default dtype and
    device are set for the length of the call, so that ``dist.Normal(0.0, 1.0)`` in the model follows the data.
    Nothing global is left changed: neither dtype, device, random state and validation, nor Pyro's parameter store.
    Modules among the arguments are copied.

    Args:
        model: a Pyro model with continuous latent sites.
        args: its arguments. One with ``unobserved()`` is replaced by what that returns when the model simulates; one
            with ``constant_data()`` describes itself in the group constant_data, where tensors and arrays go as well.
        coords: labels by dim.
        dims: names of the last dims by site or argument, where the model does not give them.
        engine: "chees" (many chains at once), "nuts" (few, one after the other), "smc" (several modes; evidence):
            exact; "svi" or "laplace": approximations. Their options are told in ``pirl.infer``.
        num_chains, num_warmup, num_samples: chains, and steps a chain; None: as many as suits the engine. The
            approximations need no warm-up and return one chain of ``num_chains * num_samples`` independent draws.
        thin: keep every thin-th draw; the draws of an approximation are independent, so ask for fewer of those.
        seed: reproduces every number exactly on the same machine.
        device, dtype: move the arguments there first. Tensors that a model closes over stay where they are.
        progress: show how the run goes in terminals and notebooks; elsewhere write a line a minute to standard error.
            Say how much a checkpoint has.
        checkpoint: a file that the run saves itself to, every half a minute and when it is interrupted; the same call
            then goes on from there and gives the same draws, bit by bit. With more ``num_samples`` it draws on.
        log_likelihood: keep the log-likelihood of each observation (for LOO), which may be the largest part.
        num_posterior_predictive, num_prior: draws to simulate; 0 leaves the groups out.
        model_kwargs: keyword arguments of the model. A keyword that the model's signature names may also be given
            directly, where it is none of the above.
        options: options of the engine.

    Attributes of the answer tell how it was made (engine, options, seed, versions, seconds); "identified_rhat",
    "identified_ess" and "identified_directions" of "num_directions": convergence in what demonstrations can show; and
    where log Z is estimated from a pool, "partition_trusted" (1 or 0), "partition_problem" (why not), "partition_ess"
    and "partition_pareto_k" (at the worst twentieth of the draws), and "partition_starts", where log Z is known
    and demonstrations' starts do not fit what follows them. Log-likelihoods and evidence of such models are
    relative to p(tau): they compare models of the same demonstrations, not with models that know the dynamics.

    Ctrl-C ends sampling and returns the draws so far (of smc there are none before its end). Under ``torchrun`` the
    chains are split over the processes; the draws are the same, and only the process of rank 0 gets them: the others
    get None.

    Raises:
        OptionError: an unknown engine or option, or labels that do not fit.
        CheckpointError: the checkpoint is damaged, belongs to another run, or cannot be written.
        MemoryLimitError: the result would not fit into memory.
        ModelError: the model is not one that the engine can sample (and its subclasses, see the engine).

    Example:
        >>> posterior = pirl.fit(model, demos, mdp, features, coords={"feature": ["a", "b", "c"]}, engine="laplace",
        ...                      num_samples=50, num_prior=50, num_posterior_predictive=50, seed=1)
        >>> posterior.posterior["weights"].sel(feature="a").dims, "log_likelihood" in posterior.children
        (('chain', 'draw'), True)
    """
    began = time.perf_counter()
    run = get_engine(engine)
    parameters = inspect.signature(run).parameters
    given = {"num_chains": num_chains, "num_warmup": num_warmup, "num_samples": num_samples}
    counts = {name: parameters[name].default if count is None else count for name, count in given.items()}
    simulated = {"num_prior": num_prior, "num_posterior_predictive": num_posterior_predictive}
    check_counts(0, num_warmup=counts["num_warmup"], **simulated)
    check_counts(0, seed=seed)
    check_counts(1, num_chains=counts["num_chains"], num_samples=counts["num_samples"], thin=thin)
    kwargs, options = own_keywords(model, options, model_kwargs)
    check_options(engine, run, options, fit)
    samples = "ranks" in parameters  # else it approximates
    if thin > 1 and not samples:
        raise OptionError(f"thin={thin} does not fit engine {engine!r}, whose draws are independent: ask for fewer")
    if checkpoint is not None and not samples:
        raise OptionError(f"engine {engine!r} saves no checkpoints: leave it out, or use 'chees', 'nuts' or 'smc'")
    setting = Setting.of(args, kwargs, device, dtype)
    args, kwargs, device, dtype = setting
    name = getattr(model, "__name__", type(model).__name__)
    with setting.entered():
        ranks = join(device)
        if not (samples or ranks.leads):
            return None  # type: ignore[return-value] # an approximation is the work of one process
        arguments = bound(model, args, kwargs)
        reseed(seed, START_STREAM)
        potential = Potential(model, args, kwargs, subsampling=engine == "svi")
        constant = _constant_data(arguments, dims or {})
        # What can be refused is refused before the long work.
        plan = planned(potential, dims or {}) | {"constant_data": constant}
        for variables in plan.values():
            check_reserved({name: layout for name, (layout, _) in variables.items()})
        check_names(plan, coords or {})
        if num_prior > 0 or num_posterior_predictive > 0:
            _check_simulation(potential, setting)
        check_memory(potential, -(-counts["num_samples"] // thin) * counts["num_chains"], log_likelihood)
        shared: dict[str, Any] = {"thin": thin, "ranks": ranks} if samples else {}
        if checkpoint is not None:
            # A run may go on for more draws; but SMC's are its particles, all of which move from the beginning.
            fixed = {name: count for name, count in counts.items() if name != "num_samples" or engine == "smc"}
            whole = {f"option {name}": options.get(name, parameters[name].default) for name in engine_options(run)}
            identity = {"model": name, "engine": engine, "seed": seed, **fixed, "thin": thin, **whole}
            shared["checkpoint"] = open_checkpoint(checkpoint, potential, identity)
        draws = run(potential, **counts, seed=seed, progress=progress, **shared, **options)
        sampled = time.perf_counter()
        if not ranks.leads:
            return None  # type: ignore[return-value]
        with _after_sampling(checkpoint, simulates=num_prior > 0 or num_posterior_predictive > 0):
            groups = describe(
                potential,
                draws,
                unobserved=setting.unobserved(),
                num_posterior_predictive=num_posterior_predictive,
                num_prior=num_prior,
                seed=seed,
                dims=dims or {},
                log_likelihood=log_likelihood,
            )
            told, identified_numbers = _identification(model, args, kwargs, potential, groups["posterior"])
            numbers: dict[str, int | float | str] = {**identified_numbers}
            numbers |= _partition_quality(model, args, kwargs, potential, groups["posterior"])
    blind = [name for name, site in potential.latent.items() if not site.identified]
    groups["constant_data"] = constant
    groups["identification"] = told
    groups |= draws.extra
    attrs = {
        "model": name,
        **_versions(),
        "created_at": datetime.now(UTC).isoformat(),
        "engine": engine,
        "seed": seed,
        **dict(zip(("num_chains", "num_samples"), next(iter(draws.values.values())).shape[:2], strict=True)),
        **({"tuning_steps": counts["num_warmup"], "thin": thin} if samples else {}),
        "num_ranks": ranks.size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "sampling_time": sampled - began,
        "wall_time": time.perf_counter() - began,
        **draws.attrs,
        **numbers,
        **_evidence_error(draws.attrs, numbers),
        **({"unidentified_sites": json.dumps(blind)} if blind else {}),
    }
    return to_datatree({name: group for name, group in groups.items() if group}, coords or {}, attrs)


@contextmanager
def _after_sampling(checkpoint: str | os.PathLike[str] | None, simulates: bool) -> Iterator[None]:
    """Ctrl-C while the model is run on the draws: say what there is."""
    try:
        yield
    except KeyboardInterrupt:
        less = "; num_prior=0, num_posterior_predictive=0 (--no-predictive) leave some of that out" * simulates
        then = f"; the same call goes on from {checkpoint}" if checkpoint is not None else less
        raise KeyboardInterrupt(f"interrupted after sampling, while the model was run on the draws{then}") from None


def _identification(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], potential: Potential, posterior: Named
) -> tuple[Named, dict[str, int | float | str]]:
    """The group identification, and attributes: numbers, or why there are none; empty for models without rewards."""
    import pyro

    draws = {name: torch.as_tensor(posterior[name][1], device=torch.empty(0).device) for name in potential.latent}
    with one_thread(), pyro.validation_enabled(False):
        found = identified(model, args, kwargs, draws)
    if isinstance(found, str):
        return {}, {"identification_unknown": found} if found else {}
    group: Named = {name: (posterior[name][0][2:], share) for name, share in found.share.items()}
    return group, {
        "identified_directions": found.num_directions,
        "num_directions": found.num_parameters,
        "identified_rhat": found.rhat,
        "identified_ess": found.ess,
    }


def _partition_quality(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], potential: Potential, posterior: Named
) -> dict[str, int | float | str]:
    """How well log Z is known over draws of the posterior, where it was estimated from samples; empty elsewhere."""
    import pyro

    device = torch.empty(0).device
    draws = {name: torch.as_tensor(posterior[name][1], device=device).flatten(0, 1) for name in potential.latent}
    with one_thread(), pyro.validation_enabled(False):
        found = partition_quality(model, args, kwargs, draws)
    if found is None:
        return {}
    estimate, count = found.estimate, found.num_demos
    reason = untrusted(estimate, count, site=found.weakest)
    for told in (reason, found.starts):
        if told is not None:
            warn(told, ConvergenceWarning)
    return {
        "partition_estimator": "importance sampling from a fixed pool",
        "partition_measure": "log likelihoods and the evidence are relative to p(tau)",
        "partition_samples": estimate.num_samples,
        "partition_demonstrations": count,
        "partition_ess": found.ess,
        "partition_pareto_k": found.pareto_k,
        "partition_standard_error": float(estimate.standard_error.quantile(0.95)),
        "partition_total_error": float(found.total_error.quantile(0.95)),
        "partition_trusted": int(reason is None),
        **({} if reason is None else {"partition_problem": reason}),
        **({} if found.starts is None else {"partition_starts": found.starts}),
    }


def _evidence_error(
    drawn: Mapping[str, int | float | str], numbers: Mapping[str, int | float | str]
) -> dict[str, float]:
    """Standard error of the log evidence where log Z, which every demonstration's density has, is an estimate."""
    if "log_evidence" not in drawn or "partition_total_error" not in numbers:
        return {}
    of_partition = float(numbers["partition_total_error"])
    return {"log_evidence_se": math.hypot(float(drawn.get("log_evidence_se", 0.0)), of_partition)}


def engine_options(run: Callable[..., Any]) -> list[str]:
    """Names of the options of an engine beside those that all have."""
    common = ("potential", "num_chains", "num_warmup", "num_samples", "seed", "progress", "thin", "ranks", "checkpoint")
    return [name for name in inspect.signature(run).parameters if name not in common]


def check_options(engine: str, run: Callable[..., Any], options: Iterable[str], *callers: Callable[..., Any]) -> None:
    """Refuse options that an engine does not have.

    Args:
        callers: whose own options may be meant by a name that is nearly theirs.

    Raises:
        OptionError: names it, and those that there are.
    """
    known = engine_options(run)
    for name in options:
        if name not in known:
            parameters = [x for caller in callers for x in inspect.signature(caller).parameters.values()]
            own = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY]
            near = difflib.get_close_matches(name, [*known, *own], n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise OptionError(
                f"engine {engine!r} has no option {name!r}{meant}; its options are {', '.join(known)}, "
                "beside num_chains, num_warmup and num_samples"
            )


def _check_simulation(potential: Potential, setting: Setting) -> None:
    """Refuse a model that cannot do without its demonstrations, which are hidden where it simulates."""
    try:
        with own_generator(), torch.no_grad():
            potential.simulate({}, *setting.unobserved())
    except NO_DENSITY:  # at this draw of the prior
        return
    except (TypeError, AttributeError) as error:
        raise ModelError(
            "the model cannot simulate, where demonstrations are hidden and demos.as_tensor() is None "
            f"({named_line(error)}): use that as obs= only, or leave out the predictive groups by num_prior=0, "
            "num_posterior_predictive=0"
        ) from error


def _constant_data(arguments: Mapping[str, Any], dims: Mapping[str, Sequence[str]]) -> Named:
    """Keep what the arguments say about themselves, and plain arrays under the name of their parameter."""
    constant: Named = {}
    for name, value in arguments.items():
        if hasattr(value, "constant_data"):
            constant |= value.constant_data()
        elif isinstance(value, (Tensor, np.ndarray)):
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            names = tuple(dims.get(name, ()))
            constant[name] = ((*(None,) * (array.ndim - len(names)), *names), array)
    return constant


def _versions() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"

    return {
        "inference_library": "pirl",
        "inference_library_version": import_module("pirl").__version__,  # installed, or run from a checkout
        "pyro_version": of("pyro-ppl"),
        "torch_version": of("torch"),
        "arviz_base_version": of("arviz-base"),
    }
