"""``pirl.calibrate``: are the posteriors of a model what they claim to be? Simulation-based calibration, and recovery.

Parameters are drawn from the prior, demonstrations from the model with those parameters, draws from the posterior given
those demonstrations; again and again. If model and engine are right the rank of the truth among the draws is uniform,
for every function of parameters and data (Talts, Betancourt, Simpson, Vehtari and Gelman 2018; Modrak et al. 2023).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pirl.errors import ConvergenceWarning, MemoryLimitError, OptionError, check_counts, form
from pirl.fit import check_options, engine_options
from pirl.infer import get_engine
from pirl.infer.datatree import check_names, check_reserved, planned, to_datatree
from pirl.infer.engine import one_thread
from pirl.infer.memory import check_memory, free_memory
from pirl.infer.ranks import join
from pirl.infer.replicated import run_all
from pirl.infer.start import NAMED_STARTS
from pirl.quantities import Quantity
from pirl.replicates import Comparison, DrawData, Study
from pirl.setting import Setting, own_keywords
from pirl.study_rows import COLUMNS, Rows, groups_of

if TYPE_CHECKING:
    import xarray

SIZES: dict[str, dict[str, int]] = {
    "chees": {"num_chains": 32, "num_warmup": 150, "num_samples": 40},
    "nuts": {"num_chains": 1, "num_warmup": 200, "num_samples": 500},
    "smc": {"num_chains": 1, "num_warmup": 0, "num_samples": 512},
    "svi": {"num_chains": 1, "num_warmup": 0, "num_samples": 200},
    "laplace": {"num_chains": 1, "num_warmup": 0, "num_samples": 200},
}
"""What suits many posteriors of which only some hundred draws are looked at: fewer than :func:`pirl.fit` makes."""

AT_ONCE = 512
"""Chains that are sampled at once, of all replicates: more are hardly faster, and are seen and saved less often."""

BATCHED = {"target_accept_prob", "dense_mass", "max_leapfrogs", "init"}
"""Options of chees that replicates sampled at once know."""


def calibrate(
    model: Callable[..., Any],
    *args: Any,
    num_replicates: int = 200,
    num_draws: int = 99,
    engine: str = "chees",
    num_chains: int | None = None,
    num_warmup: int | None = None,
    num_samples: int | None = None,
    quantities: Mapping[str, Quantity] | Sequence[str] | None = None,
    draw_data: DrawData | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    batch: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> xarray.DataTree:
    """Simulation-based calibration of a model with an engine.

    The arguments are those of :func:`pirl.fit`; of demonstrations only the plan counts (how many, for how long, whose,
    from which starts where those are given). Ranks are taken of each element of each latent site (where these are not
    identified by themselves, as weights of networks are not, of what the model records of them), of the
    log-likelihood, of the *return gap* (what the demonstrators' policy, estimated from the data, earns more than
    actions taken for no reason: identified, though rewards are not), and of ``quantities``.

    Args:
        model: a Pyro model with continuous latent sites and proper priors.
        args: its arguments.
        num_replicates: truths, each with demonstrations and a posterior of its own.
        num_draws: draws of a posterior among which the truth is ranked, evenly spaced over its chains. With 99 there
            are 100 ranks, and intervals of 50% and 90% are covered exactly so often. They must be nearly independent.
        engine, num_chains, num_warmup, num_samples: how each posterior is found. Sizes are those of a study, not of
            :func:`pirl.fit` or of a model file's defaults: by chees 32 chains of 40 draws after 150 of warm-up, by nuts
            1 of 500 after 200, by smc 512 particles, by laplace and svi 200 draws.
        quantities: further test quantities: names of what the model records (``pyro.deterministic``), or functions by
            name of (draws of latent and deterministic sites ``[draw, *shape]`` by name, data by site) that return a
            tensor ``[draw, *any]``.
        draw_data: for models that cannot say their data forwards (a ``pyro.factor``): a function of (latent sites,
            named arguments) which returns those arguments that are data, drawn with torch's default generator. It may
            also say that the world is not as the model thinks. Latent sites are of the model's prior all the same.
        coords, dims: labels, and names of dims of sites and quantities, as in :func:`pirl.fit`.
        seed: reproduces truths and data of every replicate by its number, and its posterior as well where replicates
            are sampled one by one. Those that are sampled at once share the number of leapfrog steps, so that their
            draws depend on which others are sampled with them.
        device, dtype: move the arguments there first.
        progress: show how far it is in terminals and notebooks; elsewhere write a line a minute to standard error.
            Say how much a checkpoint has.
        checkpoint: a file that replicates are saved to as they are done, every half a minute, on Ctrl-C and on SIGTERM;
            the same call goes on from there, also to more replicates (of an unfinished batch all are made anew).
        batch: replicates that chees samples at once: the model runs once for all their chains, where it keeps batch
            dims left of its plates as Pyro's particles need (and ``init`` is no dict of values). None: as many as make
            512 chains, where the model allows it and data are its own; 1: one by one, as all other engines do,
            and ``draw_data``, which takes longer. What samples them at once is Hamiltonian Monte Carlo with the
            transition of ``chees`` and trajectories of a fixed length (``attrs["sampler"]`` says what was used): it
            judges the model; ``batch=1`` judges the adaptation of ``chees`` as well.
        model_kwargs: keyword arguments of the model.
        options: options of the engine.

    Returns:
        A DataTree with the groups ``prior_sbc`` (probability integral transforms of the truths, uniform if all is
        well, for ``arviz_plots.plot_ecdf_pit``; its draws are the replicates), ``ranks``, ``prior`` (the truths),
        ``recovery`` (mean, sd and quantiles of the posteriors) and ``sample_stats`` (of each replicate: ess, rhat,
        share of divergences, failed). :func:`pirl.verdicts` makes a table of it.

    Ctrl-C returns the replicates so far, with a warning. Under ``torchrun`` the processes share the replicates; the
    process of rank 0 gets the result, the others None.

    Raises:
        OptionError: an unknown engine or option, or fewer draws than ``num_draws``.
        ModelError: the model cannot be simulated from, or an engine cannot sample it.
        CheckpointError: the checkpoint is damaged, belongs to another study, or cannot be written.
        MemoryLimitError: so many draws or replicates do not fit into the memory.

    Example:
        >>> plan = demos[:5]  # how many, and for how long: what they did does not count
        >>> study = pirl.calibrate(model, plan, mdp, features, engine="laplace", num_replicates=4, num_draws=9, seed=1)
        >>> study["ranks"]["weights"].sizes["draw"], sorted(study.children)
        (4, ['prior', 'prior_sbc', 'ranks', 'recovery', 'sample_stats'])
        >>> def walks(parameters, arguments):  # of a world that is not the model's, or of a pyro.factor
        ...     reward = pirl.linear_reward(arguments["features"], parameters["weights"])
        ...     lengths = arguments["demos"].lengths
        ...     table = pirl.MaxCausalEntTrajectory(arguments["mdp"], reward, lengths=lengths).sample()
        ...     return {"demos": pirl.Trajectories(table[..., 0], table[:, :-1, 1])}
        >>> sizes = dict(engine="laplace", num_replicates=4, num_draws=9)
        >>> found = pirl.calibrate(model, plan, mdp, features, draw_data=walks, **sizes)
        >>> pirl.is_calibrated(found)  # four replicates are too few to say so
        False
    """
    if not callable(model):
        raise OptionError(f"the model is {form(model)}: give a function, then its arguments")
    run = get_engine(engine)
    given = {"num_chains": num_chains, "num_warmup": num_warmup, "num_samples": num_samples}
    counts = SIZES[engine] | {name: count for name, count in given.items() if count is not None}
    for name, count in (counts | {"num_replicates": num_replicates, "num_draws": num_draws}).items():
        check_counts(int(name != "num_warmup"), **{name: count})
    check_counts(0, seed=seed)
    check_counts(1, batch=1 if batch is None else batch)
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise OptionError(f"checkpoint is {form(checkpoint)}: give the path of a file")
    if counts["num_chains"] * counts["num_samples"] < num_draws:
        raise OptionError(
            f"{counts['num_chains']} chains of {counts['num_samples']} draws are fewer than num_draws={num_draws}: "
            "take more samples, or fewer num_draws (--draws)"
        )
    kwargs, options = own_keywords(model, options, model_kwargs)
    check_options(engine, run, options, calibrate)
    setting = Setting.of(args, kwargs, device, dtype)
    with setting.entered(), one_thread():
        ranks = join(setting.device)
        if num_replicates < ranks.size:
            raise OptionError(f"num_replicates is {num_replicates}, fewer than the {ranks.size} processes: start fewer")
        study = Study(model, setting, quantities, draw_data, seed)
        known = study.at_truth(0)
        numbers = [x for name in sorted(known) for x in known[name]]
        identity = {
            "kind": "calibration", "model": getattr(model, "__name__", type(model).__name__), "engine": engine,
            "seed": seed, **counts,
            "num_draws": num_draws, "quantities": sorted(study.quantities),
            "draw_data": draw_data is not None,
            **{f"option {name}": options.get(name) for name in engine_options(run)},
        }  # fmt: skip

        potential = study.potential(study.draw(0))
        plan = planned(potential, dims or {})
        # Labels of what only arguments have (a model file's may have such) are nobody's here.
        theirs = {dim for name in study.plan for dim in (dims or {}).get(name, ())}
        ours = {dim for group in plan.values() for layout, _ in group.values() for dim in layout}
        check_names(plan, {dim: labels for dim, labels in (coords or {}).items() if dim not in theirs - ours})
        dims_of = {*plan["posterior"], *potential.sites, *study.plan, *study.quantities}
        if unknown := set(dims or {}) - dims_of:
            raise OptionError(f"dims names {sorted(unknown)[0]!r}, which is no site, argument or quantity of the model")
        names = {name: layout for name, (layout, _) in plan["posterior"].items()}
        names |= {name: tuple(dims[name]) for name in study.quantities if dims and name in dims}
        check_reserved(names, ("chain", "draw", "summary"))
        check_memory(potential, counts["num_chains"] * counts["num_samples"], log_likelihood=False)
        free = free_memory()
        if free is not None and 8 * COLUMNS * potential.size * num_replicates > free:
            raise MemoryLimitError(f"{num_replicates} replicates do not fit into the memory that is free: take fewer")

        told = list[int]()

        def one(number: int) -> Comparison:
            truth = study.draw(number)
            potential = study.potential(truth)
            with warnings.catch_warnings():
                if told:  # one replicate's complaint is like the next one's; a study judges them all
                    warnings.simplefilter("ignore", ConvergenceWarning)
                told.append(number)
                draws = run(potential, **counts, seed=study.engine_seed(number), progress=False, **options)
            if draws.attrs.get("interrupted") == "True":
                raise KeyboardInterrupt
            return study.compare(number, truth, potential, draws, num_draws)

        def many(numbers: Sequence[int], shown: Callable[[float], None]) -> list[Callable[[], Comparison]]:
            truths = [study.draw(number) for number in numbers]
            potentials = [study.potential(truth) for truth in truths]
            data = {name: torch.stack([truth.data[name] for truth in truths]) for name in truths[0].data}
            chains: dict[str, Any] = {**counts, **options, "seed": study.engine_seed(numbers[0])}
            found = run_all(potentials, model, data, **chains, told=shown)
            cases = zip(numbers, truths, potentials, found, strict=True)
            return [partial(study.compare, *case, num_draws) for case in cases]

        alone = _one_by_one(engine, draw_data, options)
        if batch is not None and batch > 1 and alone:
            raise OptionError(f"batch={batch} cannot be: {alone}; leave it out")
        at_once = 1 if alone else batch or max(1, AT_ONCE // counts["num_chains"])
        rows = Rows(study, num_replicates, ranks, at_once, must=batch is not None)
        rows.fill(one, many, checkpoint, identity, numbers, progress)
        found = rows.gathered()
        if not ranks.leads:
            return None  # type: ignore[return-value]
    groups = groups_of(found, rows.shapes, num_draws, names, seed)
    attrs: dict[str, str | int | float] = {
        "inference_library": "pirl", "model": str(identity["model"]), "engine": engine, "seed": seed, **counts,
        "num_draws": num_draws, "num_replicates": len(found),
    }  # fmt: skip
    if len(found) < num_replicates:  # it was interrupted
        attrs["num_asked"] = num_replicates
    if options:
        attrs["engine_options"] = ", ".join(
            f"{name}={value!r}" if isinstance(value, str | int | float | list | None) else f"{name}=given"
            for name, value in options.items()
        )
    if draw_data is not None:
        attrs["draw_data"] = getattr(draw_data, "__name__", type(draw_data).__name__)
    if engine == "chees":
        ways = ["HMC of many replicates at once, with chees' transition"] * rows.together + ["chees"] * rows.apart
        attrs["sampler"] = "; ".join(ways)
    if rows.why_apart:
        attrs["sampled_one_by_one"] = rows.why_apart
    if said := [f"replicate {number}: {reason}" for number, reason in rows.reasons.items() if number < num_replicates]:
        attrs["failures"] = "; ".join(said[:3])
    used = {dim for group in groups.values() for layout, _ in group.values() for dim in layout}
    return to_datatree(groups, {dim: labels for dim, labels in (coords or {}).items() if dim in used}, attrs)


def _one_by_one(engine: str, draw_data: DrawData | None, options: Mapping[str, Any]) -> str:
    """Why replicates cannot be sampled at once; nothing where they can."""
    if engine != "chees":
        return f"engine {engine!r} samples replicates one by one, 'chees' many at once"
    if draw_data is not None:
        return "the data are drawn by draw_data, one replicate after the other"
    if unfit := sorted(options.keys() - BATCHED):
        return f"with the option {unfit[0]} replicates are sampled one by one"
    init = options.get("init", NAMED_STARTS[0])
    if not isinstance(init, str) or init not in NAMED_STARTS:
        given = f"is {init!r}" if isinstance(init, str) else "gives values"
        return f"init {given}, and many replicates start by one of {', '.join(map(repr, NAMED_STARTS))}"
    return ""
