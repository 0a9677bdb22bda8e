"""Bayesian guided cost learning: a posterior over rewards, and policies that follow its draws, in turn.

Guided cost learning (Finn, Levine and Abbeel 2016) moves one policy towards one reward. A posterior needs log Z over
all rewards that it allows: so policies are trained for draws of it, their roll-outs are added to the pool, and the
posterior is inferred again, until log Z is known well enough over its draws (:func:`pirl.partition.untrusted`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pirl.errors import ConvergenceWarning, PirlError, check_counts, counted, warn
from pirl.fit import check_options, fit
from pirl.infer import get_engine
from pirl.infer.progress import progress_bar
from pirl.learning.rounds import PolicyStep, Rounds
from pirl.simulators import Policy

if TYPE_CHECKING:
    import xarray

_MOST_POSTERIORS = 3
"""The engine samples the posterior so often, at most, in one call."""


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
        each = " of each pool" if isinstance(self.pool, list) else ""
        starts = "; STARTS DO NOT FIT what follows them" if "partition_starts" in attrs else ""
        return (
            f"GuidedPosterior({known}: {attrs['partition_ess']:,.0f} effective of {attrs['partition_samples']:,} "
            f"samples for {counted(attrs['partition_demonstrations'], 'demonstration')}{each}, "
            f"{counted(len(self.history['ess']), 'round')}{starts})"
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
    simulators, one for each start. The model then gets lists of demonstrations and of pools. A simulator that draws
    starts makes them part of what the demonstrators chose: it is for starts that they could choose.

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
        progress: show the rounds, and how the engine goes, in terminals and notebooks; elsewhere write a line a minute
            to standard error.
        guide_options, options: of :func:`pirl.fit` for the rounds, and for the final posterior.

    The engine may find more than the rounds' approximation did, where the pool knows less. Then rounds go on, with
    policies for its draws, and it samples again, three times at most (once with ``checkpoint`` or ``model_kwargs``). A
    pool that is still too poor after the last round is told by a warning and by the posterior's label.

    Returns:
        Posterior, pool (a list of pools for several simulators) and history of the rounds: see
        :class:`GuidedPosterior`. Rounds end where the gates are passed with a margin, after the second at the
        earliest, or after ``num_rounds`` in all.

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
    check_options(engine, get_engine(engine), others, bayesian_guided_cost, fit)
    check_counts(1, num_rounds=num_rounds)
    rounds = Rounds(
        model, demos, simulator, args, base=base, policy_step=policy_step, guide=guide, num_policies=num_policies,
        num_rollouts=num_rollouts, seed=seed, particles=particles, guide_options=guide_options,
    )  # fmt: skip
    told = list[warnings.WarningMessage]()

    def improve() -> None:
        with progress_bar("guided cost learning", num_rounds, progress) as update:
            rounds.run(num_rounds, update)

    def sampled() -> GuidedPosterior:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            posterior = fit(model, *rounds.given, engine=engine, seed=seed, progress=progress, **options)
        # What an earlier posterior did not know is mended, or told by the last one again.
        told[:] = [x for x in told if not issubclass(x.category, ConvergenceWarning)] + caught
        return GuidedPosterior(posterior, rounds.pool, rounds.history)

    improve()
    found = sampled()
    # A checkpoint is of one run, with one pool; and rounds do not know the model's own keywords.
    alone = options.get("checkpoint") is None and not options.get("model_kwargs")
    for _ in range(_MOST_POSTERIORS - 1):
        attrs = found.posterior.attrs
        if attrs["partition_trusted"] or attrs.get("interrupted") == "True" or len(rounds) == num_rounds or not alone:
            break
        try:
            rounds.reach(found.posterior)
            improve()
            found = sampled()
        except (PirlError, KeyboardInterrupt) as error:
            why = f"the rounds could not go on ({type(error).__name__}: {str(error) or 'interrupted'})"
            warn(f"{why}: this is the posterior of before", ConvergenceWarning)
            break
    for warning in told:
        message = str(warning.message).replace(
            "add samples of policies nearer to the posterior",
            f"its {len(rounds)} rounds of {num_policies} policies with {num_rollouts} roll-outs did not reach it: "
            "raise num_rounds or num_rollouts",
        )
        warn(message, warning.category)
    return found


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
    check_counts(1, num_rounds=num_rounds)
    rounds = Rounds(
        model, demos, simulator, args, base=base, policy_step=policy_step, guide=guide, num_policies=num_policies,
        num_rollouts=num_rollouts, seed=seed, particles=particles, guide_options=guide_options,
    )  # fmt: skip
    with progress_bar("guided cost learning", num_rounds, progress) as update:
        rounds.run(num_rounds, update)
    return GuidedPool(rounds.pool, rounds.history)
