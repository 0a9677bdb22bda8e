"""Rounds of guided cost learning: policies for rewards of a posterior, their samples, and the posterior again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch

from pirl.errors import ConvergenceWarning, ModelError, NonFiniteError, OptionError, check_counts, counted, form
from pirl.fit import fit
from pirl.gaussian_integrals import GaussianKernel
from pirl.infer.engine import one_thread, own_generator
from pirl.infer.ranks import join
from pirl.learning.growth import Growth
from pirl.learning.near_samples import check_observed, near_samples
from pirl.local_control import LocalLearner
from pirl.particles import can_tilt
from pirl.partition.gates import ESS_PER_DEMONSTRATION, trusted_k
from pirl.pool import Pool, check_explained, check_transitions
from pirl.posterior import prior_rewards, sampled_rewards
from pirl.posterior.draws import default_dtype, drawn_of
from pirl.posterior.from_samples import partition_quality
from pirl.simulators import BaseMeasure, Policy, roll_out
from pirl.simulators.finite import cloned_policy
from pirl.simulators.protocols import Generator, check_demonstrations, check_simulator, require_undiscounted
from pirl.soft_q_learning import FiniteSimulator, SoftQLearner, require_finite_simulator
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    import xarray

_QUICK = {"num_samples": 256, "num_prior": 0, "num_posterior_predictive": 0, "log_likelihood": False}
"""Of the rounds' posteriors, of which the gates look at a hundred draws."""
_MARGIN, _MARGIN_OF_TAIL = 2.0, 0.2
"""The gate's samples may move means by a tenth of a standard deviation, and the engine may reach where they are fewer:
the rounds go on until there are twice as many, and tails are lighter by so much; by less where more samples count."""

PolicyStep = Callable[[Any, Generator], Policy]
"""(reward of one posterior draw, generator) -> a policy that nearly maximises reward plus entropy."""


class Rounds:
    """A pool that grows, round by round, to where the posterior of a model is.

    Arguments and errors are those of :func:`pirl.learning.bayesian_guided_cost`.

    Attributes:
        history: by name, and by round, as in :class:`pirl.learning.GuidedPosterior`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        demos: Any,
        simulator: Any,
        args: tuple[Any, ...],
        *,
        base: Policy | None,
        policy_step: PolicyStep | None,
        guide: str,
        num_policies: int,
        num_rollouts: int,
        seed: int,
        particles: bool | None,
        guide_options: Mapping[str, Any] | None,
    ) -> None:
        if join(torch.device("cpu")).size > 1:
            raise OptionError(
                "guided cost learning runs in one process: make the pool in one (guided_pool), and give it to pirl.fit "
                "in several"
            )
        check_counts(1, num_policies=num_policies)
        check_counts(4, num_rollouts=num_rollouts)
        if guide not in ("laplace", "svi"):
            raise OptionError(f"guide={guide!r} is not known: use 'laplace' or 'svi'")
        check_counts(0, seed=seed)
        for name, function in (("model", model), ("policy_step", policy_step)):
            if function is not None and not callable(function):
                raise OptionError(f"{name} is {form(function)}: give a function")
        if guide_options is not None and not isinstance(guide_options, Mapping):
            raise OptionError(f"guide_options is {form(guide_options)}: give a dict of options of pirl.fit")
        self.several = isinstance(simulator, (list, tuple))
        simulators, watched = _paired(simulator, demos)
        if isinstance(watched[0], Trajectories) and (base is None or policy_step is None):
            require_finite_simulator(simulators[0])
        self.model, self.demos, self.args, self.simulators = model, demos, args, simulators
        self.guide, self.num_policies, self.seed = guide, num_policies, seed
        self.quick = {**_QUICK, **(guide_options or {})}
        self.generator = generator = torch.Generator().manual_seed(seed)
        if particles and not all(can_tilt(each) for each in simulators):
            raise OptionError("particles=True needs a simulator with reset and step, and vectors that do not end early")
        if base is None:
            if not isinstance(simulators[0], FiniteSimulator):
                stray = any(isinstance(x, Policy) for x in args)
                among = "; there is a policy among the model's arguments" if stray else ""
                raise OptionError(
                    f"a simulator without a finite space needs base=, the base policy p(a|s), such as "
                    f"pirl.local_control.gaussian_base(horizon, covariance, num_state_dims){among}"
                )
            base = BaseMeasure(simulators[0].log_prior)
        # Starts differ, and so does what is worth learning: a step of the caller's own says what it learns, and where.
        self.steps = [_policy_step(x, base, num_rollouts) for x in simulators] if policy_step is None else [policy_step]
        plain = base.policy if isinstance(base, BaseMeasure) else base
        first = num_policies * num_rollouts
        pools = [Pool.of(roll_out(each, plain, first, generator), plain, base) for each in simulators]
        for pool, group in zip(pools, watched, strict=True):
            check_explained(pool, group)
        each = zip(pools, simulators, watched, strict=True)
        self.pools = [_with_imitation(*one, num_rollouts, generator) for one in each]
        self.growth = Growth(base, num_rollouts, particles, generator)
        self.history: dict[str, list[float]] = {
            name: [] for name in ("ess", "pareto_k", "samples", "trusted", "particles")
        }
        self._near = near_samples(model)
        self._last: xarray.DataTree | None = None
        self._reached: xarray.DataTree | None = None
        try:
            self.rewards = prior_rewards(
                model, *self.given, num_draws=num_policies, seed=seed, dtype=self.pools[0].dtype
            )
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"the model cannot be run on (demos, pool, *args): {' '.join(str(error).split())}; its first arguments "
                "are the demonstrations and the pool (lists of both for several simulators), and it observes a "
                "SampledMaxEntTrajectory(pool, reward)"
            ) from error
        if self.several:
            check_observed(model, self.given, self.pools)

    def __len__(self) -> int:
        return len(self.history["ess"])

    @property
    def pool(self) -> Any:
        """As the model gets it: a list for several simulators."""
        return self.pools if self.several else self.pools[0]

    @property
    def given(self) -> tuple[Any, ...]:
        """What the model is called with."""
        return self.demos, self.pool, *self.args

    def run(self, most: int, update: Callable[[int, str], Any]) -> None:
        """Play rounds until the pool is good enough, or there are as many in all.

        Args:
            update: told the number of rounds, and how far they are, after each.
        """
        while len(self) < most:
            posterior = self._play()
            need = _MARGIN * ESS_PER_DEMONSTRATION * posterior.attrs["partition_demonstrations"]
            update(len(self), f"ESS {self.history['ess'][-1]:.0f} of {need:.0f}")
            if not self._passes(posterior):
                self._follow(posterior)
            elif self._reached is not None and not self._known(self._reached):
                self._follow(self._reached)
            else:
                break

    def reach(self, posterior: xarray.DataTree) -> None:
        """Let the rounds go on until the pool knows a posterior, to which the engine went and they did not."""
        self._reached = posterior
        self._follow(posterior)

    def _play(self) -> xarray.DataTree:
        """A round: policies for the rewards, their samples, and the posterior that the larger pool sees."""
        number = len(self)
        self.history["particles"].append(float(self.growth.particles))
        for at, reward in enumerate(self.rewards):
            policies = [step(reward, self.generator) for step in self.steps]
            policies = policies * (len(self.pools) // len(policies))
            self.pools = self.growth.add(self.pools, self.simulators, policies, reward, may_try=at == 0)
        self.growth.decide()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a pool on its way is judged by the rounds
            start = _from(self._last, self.guide)
            posterior = _guide(self._near, self.given, self.guide, self.seed + number, self.quick, start)
        self._last = posterior
        self.history["ess"].append(posterior.attrs["partition_ess"])
        self.history["pareto_k"].append(posterior.attrs["partition_pareto_k"])
        self.history["samples"].append(float(sum(len(pool) for pool in self.pools)))
        self.history["trusted"].append(float(posterior.attrs["partition_trusted"]))
        return posterior

    def _passes(self, posterior: xarray.DataTree) -> bool:
        """Whether a round's posterior passes the gates with a margin: the engine may reach further than it does.

        The first one is of policies for the prior alone, and may look trusted where it is not.
        """
        facts = posterior.attrs
        names = ("partition_ess", "partition_pareto_k", "partition_samples", "partition_demonstrations")
        return bool(facts["partition_trusted"]) and len(self) > 1 and _has_margin(*(facts[name] for name in names))

    def _known(self, posterior: xarray.DataTree) -> bool:
        """Whether the pool as it is knows log Z over draws of an earlier posterior, with the margin."""
        dtype = self.pools[0].dtype
        draws = {str(n): torch.as_tensor(x.values).flatten(0, 1) for n, x in drawn_of(posterior).data_vars.items()}
        with default_dtype(dtype), one_thread(), own_generator(), pyro.validation_enabled(False):
            draws = {name: x.to(dtype) for name, x in draws.items()}
            found = partition_quality(self.model, self.given, {}, draws, compare_starts=False)
        assert found is not None
        return _has_margin(found.ess, found.pareto_k, found.estimate.num_samples, found.num_demos)

    def _follow(self, posterior: xarray.DataTree) -> None:
        """Half of the next policies go where a posterior is, half to its edge, where the pool knows least."""
        self.rewards = sampled_rewards(
            posterior, self.model, *self.given, num_draws=self.num_policies, seed=self.seed + len(self) - 1,
            least_known=self.num_policies // 2, dtype=self.pools[0].dtype,
        )  # fmt: skip


def _has_margin(ess: float, khat: float, num_samples: int, num_demos: int) -> bool:
    """Whether the gates are passed with room for an engine that reaches further.

    Room in the number of samples is room for the tail too: a k-hat near its limit may stay there for many rounds.
    """
    need = _MARGIN * ESS_PER_DEMONSTRATION * num_demos
    return ess >= need and khat <= trusted_k(num_samples) - _MARGIN_OF_TAIL * need / ess


def _paired(simulator: Any, demos: Any) -> tuple[Any, Any]:
    """Simulators, and what was seen of each: as many."""
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
    return simulators, watched


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
