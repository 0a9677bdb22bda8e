"""Bayesian guided cost learning: a posterior over rewards, and policies that follow its draws, in turn.

Guided cost learning (Finn, Levine and Abbeel 2016) moves one policy towards one reward. A posterior needs log Z over
all rewards that it allows: so policies are trained for draws of it, their roll-outs are added to the pool, and the
posterior is inferred again, until log Z is known well enough over its draws (:func:`pirl.partition.untrusted`).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pirl.errors import ConvergenceWarning, ModelError, NonFiniteError, OptionError, check_counts, counted, form
from pirl.fit import check_options, fit
from pirl.gaussian_integrals import GaussianKernel
from pirl.infer import get_engine
from pirl.infer.engine import own_generator
from pirl.infer.progress import progress_bar
from pirl.learning.growth import Growth
from pirl.local_control import LocalLearner
from pirl.particles import can_tilt
from pirl.partition.gates import ESS_PER_DEMONSTRATION, trusted_k
from pirl.pool import Pool, check_explained, check_transitions
from pirl.posterior import prior_rewards, sampled_rewards
from pirl.posterior.draws import default_dtype, drawn_of
from pirl.posterior.from_samples import log_odds
from pirl.sampled import SampledMaxEntTrajectory
from pirl.simulators import BaseMeasure, Policy, roll_out
from pirl.simulators.finite import cloned_policy
from pirl.simulators.protocols import Generator, check_demonstrations, check_simulator, require_undiscounted
from pirl.soft_q_learning import FiniteSimulator, SoftQLearner, require_finite_simulator
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    import xarray

_QUICK = {"num_samples": 256, "num_prior": 0, "num_posterior_predictive": 0, "log_likelihood": False}
"""Of the rounds' posteriors, of which the gates look at a hundred draws."""
_MARGIN, _MARGIN_OF_TAIL = 1.5, 0.2
_LEAST_SHARE, _FEW = 0.05, 30.0
"""So many of the draws that a pool's samples count for, the smaller of this share and this number, should count before
more are drawn. Less than the gate asks for: a posterior that is held back must not look known where it is held."""

PolicyStep = Callable[[Any, Generator], Policy]
"""(reward of one posterior draw, generator) -> a policy that nearly maximises reward plus entropy."""


class GuidedPosterior(NamedTuple):
    """What :func:`bayesian_guided_cost` found.

    Example:
        >>> GuidedPosterior._fields
        ('posterior', 'pool', 'history')
    """

    posterior: xarray.DataTree
    """Labelled with how well log Z is known (attrs "partition_...")."""
    pool: Any
    """All roll-outs, a :class:`pirl.Pool` (or a list of them): other models of the same demonstrations may use it."""
    history: Mapping[str, Sequence[float]]
    """By name, and by round: "ess" (5% quantile over posterior draws), "pareto_k", "samples", "trusted" (1 or 0), and
    whether most of what it added were "particles" (1) or roll-outs (0)."""

    def __repr__(self) -> str:
        attrs = self.posterior.attrs
        known = "trusted" if attrs["partition_trusted"] else "NOT TRUSTED"
        return (
            f"GuidedPosterior({known}: {attrs['partition_ess']:,.0f} effective of {attrs['partition_samples']:,} "
            f"samples for {counted(attrs['partition_demonstrations'], 'demonstration')}, "
            f"{counted(len(self.history['ess']), 'round')})"
        )


class GuidedPool(NamedTuple):
    """What :func:`guided_pool` found; see :class:`GuidedPosterior`.

    Example:
        >>> GuidedPool._fields
        ('pool', 'history')
    """

    pool: Any
    history: Mapping[str, Sequence[float]]


def bayesian_guided_cost(
    model: Callable[..., Any],
    demos: Any,
    simulator: Any,
    *args: Any,
    base: Policy | None = None,
    policy_step: PolicyStep | None = None,
    engine: str = "chees",
    guide: str = "laplace",
    num_rounds: int = 20,
    num_policies: int = 4,
    num_rollouts: int = 500,
    seed: int = 0,
    progress: bool = True,
    particles: bool | None = None,
    guide_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> GuidedPosterior:
    """Infer the posterior of ``model(demos, pool, *args)`` while the pool grows to where the posterior is.

    The pool begins with roll-outs of the base policy and, in a finite space, of a policy cloned from the
    demonstrations. Each round fits the model with a fast approximation, trains policies for some of its draws, and adds
    their roll-outs. When the gates hold over the posterior's draws (100 effective samples for each demonstration, as
    the weights of samples and as those of demonstrations tell it), ``engine`` samples it with the pool as it is.

    Demonstrations that start in different given states have a log Z each: give lists of demonstrations and of
    simulators, one for each start. The model then gets lists of demonstrations and of pools.

    Args:
        model: observes the demonstrations by :class:`pirl.SampledMaxEntTrajectory`, whose pool is its second argument.
        simulator: of the world; see :mod:`pirl.simulators`.
        args: further arguments of the model.
        base: the base measure over actions, which also plays the first roll-outs; of a finite simulator its own.
        policy_step: trains a policy; by default soft Q-learning in a finite space, and fitted linear-Gaussian control
            (:mod:`pirl.local_control`) where the base policy is linear-Gaussian, in each of several simulators. One of
            your own trains one policy for all of them.
        engine: of the final posterior.
        guide: of the rounds, "laplace" or "svi".
        num_rounds: at most.
        num_policies: posterior draws a round that a policy is trained for.
        num_rollouts: of each policy; the base policy plays ``num_policies`` times as many.
        particles: add draws of p(tau | O) by particles that each policy guides (:func:`pirl.particles.tilt`), instead
            of its own roll-outs. Their weights do not depend on luck, but they share ancestors, and count for as few.
            None: one policy of each round is tried both ways (half as many samples the other way), and the next round
            adds particles where those counted for more than twice as much.
        progress: show the rounds, and how the engine goes, in terminals and notebooks only.
        guide_options, options: of :func:`pirl.fit` for the rounds, and for the final posterior.

    A pool that is still too poor after the last round is told by a warning and by the posterior's label.

    Returns:
        Posterior, pool (a list of pools for several simulators) and history of the rounds: see
        :class:`GuidedPosterior`. Rounds end where the gates are passed with a margin, after the second at the
        earliest, or after ``num_rounds``.

    Raises:
        ModelError: the model does not observe a :class:`pirl.SampledMaxEntTrajectory`, or not all pools.
        PartitionError: demonstrations that no roll-out could resemble.
        SimulatorError: the simulator failed.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> quick = {"engine": "laplace", "num_samples": 50, "num_prior": 0, "num_posterior_predictive": 0}
        >>> found = bayesian_guided_cost(sampled_model, walks[:2], simulator, marks, **quick)
        >>> found.posterior.attrs["partition_trusted"]
        1

        Two groups that start in states of their own, each with its plate and its pool:

        >>> worlds = [world.replace(initial=torch.eye(16, dtype=torch.float64)[start]) for start in (5, 10)]
        >>> groups = [pirl.datasets.simulate(one, wanted, 2, length=8, reading="trajectory") for one in worlds]
        >>> def grouped(groups, pools, features):
        ...     weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1))
        ...     for name, demos, pool in zip("ab", groups, pools):
        ...         with pyro.plate(f"episode_{name}", len(demos)):
        ...             law = pirl.SampledMaxEntTrajectory(pool, pirl.linear_reward(features, weights))
        ...             pyro.sample(f"walk_{name}", law, obs=demos.as_tensor())
        >>> simulators = [pirl.simulators.TabularSimulator(one) for one in worlds]
        >>> bayesian_guided_cost(grouped, groups, simulators, marks, **quick).pool
        [...]
    """
    # What could be refused after all rounds is refused before them.
    others = options.keys() - inspect.signature(fit).parameters.keys()
    check_options(engine, get_engine(engine), others, bayesian_guided_cost)
    pool, history = guided_pool(
        model, demos, simulator, *args, base=base, policy_step=policy_step, guide=guide, num_rounds=num_rounds,
        num_policies=num_policies, num_rollouts=num_rollouts, seed=seed, particles=particles,
        guide_options=guide_options, progress=progress,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        posterior = fit(model, demos, pool, *args, engine=engine, seed=seed, progress=progress, **options)
    for warning in told:
        message = str(warning.message).replace(
            "add samples of policies nearer to the posterior",
            f"its {len(history['ess'])} rounds of {num_policies} policies with {num_rollouts} roll-outs did not "
            "reach it: raise num_rounds or num_rollouts",
        )
        warnings.warn(message, warning.category, stacklevel=2)
    return GuidedPosterior(posterior, pool, history)


def guided_pool(
    model: Callable[..., Any],
    demos: Any,
    simulator: Any,
    *args: Any,
    base: Policy | None = None,
    policy_step: PolicyStep | None = None,
    guide: str = "laplace",
    num_rounds: int = 20,
    num_policies: int = 4,
    num_rollouts: int = 500,
    seed: int = 0,
    particles: bool | None = None,
    guide_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> GuidedPool:
    """The pool of :func:`bayesian_guided_cost` alone, for ``pirl.fit(model, demos, pool, ...)`` with any engine.

    Arguments and errors are those of :func:`bayesian_guided_cost`.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> found = guided_pool(sampled_model, walks[:2], simulator, marks)
        >>> found.pool.horizon, sorted(found.history)
        (8, ['ess', 'pareto_k', 'particles', 'samples', 'trusted'])
    """
    check_counts(1, num_rounds=num_rounds, num_policies=num_policies)
    check_counts(4, num_rollouts=num_rollouts)
    if guide not in ("laplace", "svi"):
        raise OptionError(f"guide={guide!r} is not known: use 'laplace' or 'svi'")
    check_counts(0, seed=seed)
    for name, function in (("model", model), ("policy_step", policy_step)):
        if function is not None and not callable(function):
            raise OptionError(f"{name} is {form(function)}: give a function")
    if guide_options is not None and not isinstance(guide_options, Mapping):
        raise OptionError(f"guide_options is {form(guide_options)}: give a dict of options of pirl.fit")
    several = isinstance(simulator, (list, tuple))
    if isinstance(demos, (list, tuple)) and not several:
        raise OptionError(
            f"{counted(len(demos), 'group')} of demonstrations, and one simulator: give a list of as many"
        )
    if several and not isinstance(demos, (list, tuple)):
        raise OptionError(f"{len(simulator)} simulators, and demos is {form(demos)}: give a list with as many")
    simulators, watched = (simulator, demos) if several else ([simulator], [demos])
    if len(simulators) != len(watched) or not len(simulators):
        raise OptionError(f"{len(simulators)} simulators do not fit {len(watched)} groups of demonstrations")
    for each, group in zip(simulators, watched, strict=True):
        check_demonstrations(group)
        check_simulator(each)
        require_undiscounted(each)
    if isinstance(watched[0], Trajectories) and (base is None or policy_step is None):
        require_finite_simulator(simulators[0])
    generator = torch.Generator().manual_seed(seed)
    if particles and not all(can_tilt(each) for each in simulators):
        raise OptionError("particles=True needs a simulator with reset and step, and vectors that do not end early")
    if base is None:
        if not isinstance(simulators[0], FiniteSimulator):
            among = (
                "; there is a policy among the model's arguments" if any(isinstance(x, Policy) for x in args) else ""
            )
            raise OptionError(f"a simulator without a finite space needs base=, the base policy p(a|s){among}")
        base = BaseMeasure(simulators[0].log_prior)
    # Starts differ, and so does what is worth learning: a step of the caller's own says what it learns, and where.
    steps = [_policy_step(x, base, num_rollouts) for x in simulators] if policy_step is None else [policy_step]
    plain = base.policy if isinstance(base, BaseMeasure) else base
    pools = [Pool.of(roll_out(each, plain, num_policies * num_rollouts, generator), plain, base) for each in simulators]
    for pool, group in zip(pools, watched, strict=True):
        check_explained(pool, group)
    pools = [_with_imitation(*each, num_rollouts, generator) for each in zip(pools, simulators, watched, strict=True)]
    quick = {**_QUICK, **(guide_options or {})}
    growth = Growth(base, num_rollouts, particles, generator)
    history: dict[str, list[float]] = {name: [] for name in ("ess", "pareto_k", "samples", "trusted", "particles")}
    near, posterior = _near_samples(model), None

    def given() -> tuple[Any, ...]:
        return demos, pools if several else pools[0], *args

    try:
        rewards = prior_rewards(model, *given(), num_draws=num_policies, seed=seed, dtype=pools[0].dtype)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"the model cannot be run on (demos, pool, *args): {' '.join(str(error).split())}; its first arguments are "
            "the demonstrations and the pool (lists of both for several simulators), and it observes a "
            "SampledMaxEntTrajectory(pool, reward)"
        ) from error
    if several:
        _check_observed(model, given(), pools)
    with progress_bar("guided cost learning", num_rounds, progress) as update:
        for number in range(num_rounds):
            history["particles"].append(float(growth.particles))
            for at, reward in enumerate(rewards):
                policies = [step(reward, generator) for step in steps]
                policies = policies * (len(pools) // len(policies))
                pools = growth.add(pools, simulators, policies, reward, may_try=at == 0)
            growth.decide()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a pool on its way is judged below
                posterior = _guide(near, given(), guide, seed + number, quick, _from(posterior, guide))
            trusted = bool(posterior.attrs["partition_trusted"])
            history["ess"].append(posterior.attrs["partition_ess"])
            history["pareto_k"].append(posterior.attrs["partition_pareto_k"])
            history["samples"].append(float(sum(len(pool) for pool in pools)))
            history["trusted"].append(float(trusted))
            # The first posterior is one of policies for the prior alone, and may look trusted where it is not. And the
            # engine may reach further than the approximation, hence the margin.
            need = _MARGIN * ESS_PER_DEMONSTRATION * posterior.attrs["partition_demonstrations"]
            update(number + 1, f"ESS {history['ess'][-1]:.0f} of {need:.0f}")
            heavy = history["pareto_k"][-1] > trusted_k(posterior.attrs["partition_samples"]) - _MARGIN_OF_TAIL
            if trusted and number > 0 and posterior.attrs["partition_ess"] >= need and not heavy:
                break
            # Half of the policies go where the posterior is, half to its edge, where the pool knows least.
            edge = num_policies // 2
            rewards = sampled_rewards(
                posterior, model, *given(), num_draws=num_policies, seed=seed + number, least_known=edge
            )
    return GuidedPool(pools if several else pools[0], history)


def _with_imitation(pool: Pool, simulator: Any, demos: Any, num_rollouts: int, generator: Generator) -> Pool:
    """A pool with roll-outs of a policy cloned from the demonstrations, where a table of counts is one.

    Policies for draws of the prior may never come where demonstrations go, and what no sample shows is not learned.
    """
    if not isinstance(simulator, FiniteSimulator):
        return pool
    cloned = cloned_policy(simulator.log_prior, demos.states, demos.actions)
    pool = pool.add(roll_out(simulator, cloned, num_rollouts, generator), cloned)
    check_transitions(pool, demos.states, demos.actions)
    return pool


def _from(posterior: xarray.DataTree | None, guide: str) -> dict[str, Any]:
    """Where the search for the mode begins: one start where the last round was, and others anywhere."""
    if posterior is None or guide != "laplace":
        return {}
    last = drawn_of(posterior).isel(chain=0, draw=0)
    return {"init": {str(name): torch.as_tensor(value.values) for name, value in last.data_vars.items()}}


def _guide(
    model: Callable[..., Any],
    given: tuple[Any, ...],
    engine: str,
    seed: int,
    options: Mapping[str, Any],
    start: Mapping[str, Any],
) -> xarray.DataTree:
    """A fast posterior; a few short chains where the mode has no Gaussian shape, as with a pool on its way."""
    try:
        return fit(model, *given, engine=engine, seed=seed, progress=False, **{**start, **options})
    except ModelError as error:
        if start and isinstance(error, NonFiniteError):  # the last round's draw need not do for this round's pool
            return _guide(model, given, engine, seed, options, {})
        if engine != "laplace" or options.keys() - _QUICK.keys():
            raise
        few = {**options, "num_chains": 16, "num_warmup": 60, "num_samples": 20}
        return fit(model, *given, seed=seed, progress=False, **few)


def _near_samples(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, less likely where few samples of the pool count.

    There log Z-hat is too low, and the likelihood without bounds in directions that no sample shows. So demonstrations
    count as samples too (Finn, Levine and Abbeel 2016 add them to those of the policies): their own weights bound log Z
    from below, by log(1 + M / ess) more than the samples where ess are counted by M demonstrations. And where less than
    a few samples count, the likelihood is lowered further. The rounds go step by step; the last posterior, of a good
    pool, is of the model itself.
    """

    def bounded(*args: Any) -> None:
        with _Laws() as laws:
            model(*args)
        for name, (law, seen) in laws.found.items():
            ess = law.pool.log_ess(law.log_weights)
            draws = len(law.pool) * law.pool.efficiency
            lacking = (math.log(min(_LEAST_SHARE * draws, _FEW)) - ess).clamp_min(0.0)
            odds = _by_reward(log_odds(law, seen), ess.shape)
            count = odds.shape[-1]
            fused = torch.nn.functional.softplus(math.log(count) - law.pool.log_ess_of(odds))
            pyro.factor(f"{name}_near_samples", -count * (lacking.square().sum() + fused.sum()))

    return bounded


def _check_observed(model: Callable[..., Any], given: tuple[Any, ...], pools: Sequence[Pool]) -> None:
    """Refuse a model that leaves out a group: its demonstrations would be lost silently."""
    with (
        default_dtype(pools[0].dtype),
        own_generator(),
        pyro.validation_enabled(False),
        torch.no_grad(),
        _Laws() as laws,
    ):
        model(*given)
    seen = {id(law.pool) for law, _ in laws.found.values()}
    for number, pool in enumerate(pools):
        if id(pool) not in seen:
            raise ModelError(
                f"the model observes nothing with pool {number} of {len(pools)}: let it observe every group, by a site "
                "in a plate of its own"
            )


def _by_reward(odds: Float[Tensor, "*batch"], rewards: torch.Size) -> Float[Tensor, "G M"]:
    """What belongs to each reward of a batch, whose shape is 1 along the plate of the demonstrations."""
    rewards = torch.Size([1] * (odds.dim() - len(rewards)) + list(rewards))
    odds = odds.expand(torch.broadcast_shapes(odds.shape, rewards))
    own = [dim for dim, size in enumerate(rewards) if size > 1]
    groups = math.prod(rewards)
    return odds.movedim(own, list(range(len(own)))).reshape(groups, odds.numel() // groups)


class _Laws(Messenger):
    """Keeps the laws whose log Z is sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.found = dict[str, tuple[SampledMaxEntTrajectory, Tensor]]()

    def _postprocess_message(self, message: Any) -> None:
        law = message.get("fn")
        while not isinstance(law, SampledMaxEntTrajectory) and hasattr(law, "base_dist"):
            law = law.base_dist
        if message["type"] == "sample" and message["is_observed"] and isinstance(law, SampledMaxEntTrajectory):
            self.found[message["name"]] = law, message["value"]


def _policy_step(simulator: Any, base: Policy, num_rollouts: int) -> PolicyStep:
    if isinstance(simulator, FiniteSimulator):
        return _updates(SoftQLearner(simulator, reading="trajectory"), num_rollouts)
    if isinstance(base, GaussianKernel):
        return _updates(LocalLearner(simulator, base), num_rollouts)
    raise OptionError(
        "a simulator without a finite space needs policy_step=, which trains a policy, or a linear-Gaussian base "
        "policy (pirl.local_control.gaussian_base)"
    )


def _updates(learner: SoftQLearner | LocalLearner, num_rollouts: int) -> PolicyStep:
    def step(reward: Any, generator: Generator) -> Policy:
        return learner.update(reward, num_rollouts, generator)

    return step
