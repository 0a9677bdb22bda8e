"""Parameters from the prior, data from the model, the posterior given those data: one replicate of a study.

What a study compares are *test quantities*, functions of parameters and data, at the true parameters and at draws from
the posterior: their ranks among the draws are uniform if the posterior is what it claims to be (Cook, Gelman and Rubin
2006; Talts et al. 2018). Ranks of parameters alone miss faults that a quantity of the data shows, such as a posterior
that ignores them (Modrak et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.convergence import ess_bulk, rhat
from pirl.distributions import TabularTrajectory
from pirl.errors import DiscreteLatentError, ModelError, OptionError, PirlError, form
from pirl.infer.datatree import replay_draws
from pirl.infer.engine import Draws, derive_seed, own_generator
from pirl.infer.potential import NO_DENSITY, Potential, Values, kind_of, own_errors
from pirl.linear_gaussian import LinearGaussianTrajectory
from pirl.mdp import TabularMDP
from pirl.planning import policy_value
from pirl.posterior.draws import rewards_at, trajectory_laws
from pirl.sampled import SampledMaxEntTrajectory
from pirl.setting import Setting, bound, leaves

Quantity = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
"""(draws of latent and deterministic sites ``[D, *shape]``, data by site) -> ``[D, *any]``."""

DrawData = Callable[[dict[str, Tensor], dict[str, Any]], Mapping[str, Any]]
"""(latent sites, named arguments of the model, nothing observed) -> those that are data, drawn by torch's generator."""

LOG_LIKELIHOOD, RETURN_GAP = "log_likelihood", "return_gap"

TRAJECTORIES = (TabularTrajectory, SampledMaxEntTrajectory, LinearGaussianTrajectory)

_ATTEMPTS = 100
_TRUTHS, _ENGINES = 1000, 1001
"""Streams of random numbers: of truth and data of a replicate, and of its engine."""


class Truth(NamedTuple):
    """Parameters that a replicate's data were drawn with."""

    latent: Values
    data: Values
    """Values of the observed sites; empty where ``arguments`` carry them."""
    arguments: dict[str, Any]
    """Arguments of the model, by name, that replace its own."""


class Ranked(NamedTuple):
    """A test quantity: its truth among draws from the posterior."""

    rank: Int[np.ndarray, "*shape"]
    """Draws below the truth; ties are broken at random."""
    truth: Float[np.ndarray, "*shape"]
    mean: Float[np.ndarray, "*shape"]
    sd: Float[np.ndarray, "*shape"]
    quantiles: Float[np.ndarray, "5 *shape"]


class Comparison(NamedTuple):
    """A replicate: truth and posterior, by test quantity, and how well its chains did."""

    quantities: dict[str, Ranked]
    ess: float
    """The least bulk effective sample size of the unconstrained parameters (of those that may be identified)."""
    rhat: float
    """The largest R-hat of them."""
    divergences: float
    """Share of divergent transitions."""


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Study:
    """Replicates of a model: where their random numbers come from, and what is compared.

    Args:
        model: a Pyro model.
        setting: its arguments; demonstrations among them are a plan: how many, how long, from where.
        quantities: test quantities beside those of :meth:`compare`: functions by name, or names of what the model
            records (``pyro.deterministic``).
        draw_data: draws the data, where the model cannot say them forwards (it has a ``pyro.factor``).
        seed: reproduces every replicate by its number.

    Raises:
        ModelError: the model has no data to simulate, or a ``pyro.factor`` and no ``draw_data``; or it does not observe
            its demonstrations.
        DiscreteLatentError: a discrete site is hidden.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        setting: Setting,
        quantities: Mapping[str, Quantity] | Sequence[str] | None = None,
        draw_data: DrawData | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.draw_data, self.seed = model, draw_data, seed
        self.quantities = _functions(quantities or {})
        if draw_data is not None and not callable(draw_data):
            raise OptionError(f"draw_data is {form(draw_data)}: give a function of (parameters, arguments)")
        for name, quantity in self.quantities.items():
            if not callable(quantity):
                raise OptionError(f"quantity {name!r} is {form(quantity)}: give a function of (draws, data)")
        # Who draws the data elsewhere needs a model that says how likely data are, and not that it can do without any.
        self.args, self.kwargs = setting.unobserved() if draw_data is None else (setting.args, setting.kwargs)
        self.plan = bound(model, *setting.unobserved())
        self.observed = set[str]()
        self.fails: str | None = None
        """Why the model does not run on the arguments as they were given, data and all."""
        if draw_data is None:
            self._tell_apart(setting)

    def _tell_apart(self, setting: Setting) -> None:
        """Note what is observed, where the real data are given: continuous data would pass for parameters.

        Raises:
            DiscreteLatentError: a discrete site is hidden, which would pass for data.
            ModelError: there are demonstrations, and trajectories are not observed: that simulates, and fits nothing.
        """
        arguments = list(leaves([setting.args, setting.kwargs]))
        plans = [value for value in arguments if hasattr(value, "as_tensor") and value.as_tensor() is None]
        if plans or any(value is None for value in arguments):
            return
        try:
            with own_generator(), torch.no_grad():
                torch.manual_seed(derive_seed(self.seed, _TRUTHS, 0))
                trace = pyro.poutine.trace(self.model).get_trace(*setting.args, **setting.kwargs)
        except Exception as error:  # will be said of the model without data, or with those of a replicate
            self.fails = f"{type(error).__name__}: {_line(error)}"
            return
        kinds = {name: kind_of(node) for name, node in trace.nodes.items() if node["type"] == "sample"}
        self.observed = {name for name, kind in kinds.items() if kind == "observed"}
        given = [value for value in arguments if hasattr(value, "unobserved")]
        for name, kind in kinds.items():
            hidden = kind == "latent" and not trace.nodes[name]["infer"].get("was_observed")
            if given and hidden and isinstance(_base(trace.nodes[name]["fn"]), TRAJECTORIES):
                raise ModelError(f"site {name!r} does not observe the demonstrations: give obs=demos.as_tensor()")
            if kind == "latent" and trace.nodes[name]["fn"].support.is_discrete and "observed" in kinds.values():
                raise DiscreteLatentError(
                    f"latent site {name!r} is discrete: enumerate it, or use MixtureSameFamily; data need obs="
                )
        # Where episodes may last longer than they did the two laws differ, as they should.
        if given and all(map(_lasts_as_planned, given)):
            self._check_branches(trace, {n: trace.nodes[n]["value"] for n, kind in kinds.items() if kind != "plate"})

    def _check_branches(self, trace: pyro.poutine.Trace, values: Values) -> None:
        """A model that asks whether there are data may say two things; a study hears one, and a fit the other.

        Raises:
            ModelError: its density, at the same values of all sites, is another where it simulates.
        """
        again = pyro.poutine.trace(pyro.poutine.condition(self.model, values))
        try:
            with own_generator(), torch.no_grad(), pyro.validation_enabled(False):
                other = again.get_trace(*self.args, **self.kwargs)
                for run in (trace, other):
                    run.compute_log_prob(lambda name, _: name in values)
        except Exception:  # the study will say it of its own data
            return
        for name in (name for name in values if name in other.nodes):  # in the order of the model
            fitted, simulated = (float(run.nodes[name]["log_prob_sum"]) for run in (trace, other))
            if not np.isclose(fitted, simulated, rtol=1e-6, equal_nan=True):
                raise ModelError(
                    f"site {name!r} has the log-density {fitted:.6g} where the model is given data, and "
                    f"{simulated:.6g} for the same values where it simulates: what it does must not depend on whether "
                    "there are data (a mask can be an argument of its own)"
                )

    def draw(self, number: int) -> Truth:
        """Parameters and data of a replicate, the same for the same number.

        Raises:
            ModelError: see :class:`Study`; or the model has no law at a hundred draws of the prior in a row.
        """
        with own_generator(), torch.no_grad():
            torch.manual_seed(derive_seed(self.seed, _TRUTHS, number))
            for _ in range(_ATTEMPTS):
                try:
                    return self._draw()
                except NO_DENSITY as error:  # a truth without a law is outside of the prior that the posterior has
                    reason = error
        raise ModelError(f"the model has no law at {_ATTEMPTS} draws from its prior: {reason}")

    def _draw(self) -> Truth:
        try:
            with own_errors():
                trace = pyro.poutine.trace(pyro.poutine.uncondition(self.model)).get_trace(*self.args, **self.kwargs)
        except NotImplementedError as error:
            raise ModelError(f"a prior cannot be drawn from, as of an improper one: {_line(error)}") from error
        except (*NO_DENSITY, PirlError, RuntimeError):  # it says itself what is wrong, as in a fit
            raise
        except Exception as error:
            if self.draw_data is not None:
                raise
            if self.fails is not None:
                order = ", ".join(bound(self.model, self.args, self.kwargs))
                raise ModelError(
                    f"the model does not run on its arguments ({self.fails}): check it, and their order, {order}"
                ) from error
            raise ModelError(
                f"the model does not run without data ({type(error).__name__}: {_line(error)}): let it sample them "
                "(obs=demos.as_tensor()), or give draw_data= if it only says how likely data are"
            ) from error
        latent, data = {}, {}
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or type(node["fn"]).__name__ == "_Subsample":
                continue
            fn = node["fn"]
            if isinstance(_base(fn), pyro.distributions.Unit):
                if self.draw_data is None:
                    raise ModelError(
                        f"site {name!r} is a pyro.factor, from which no data can be drawn: give draw_data=, a function "
                        "of parameters and arguments that returns the arguments that are data"
                    )
            elif node["infer"].get("_deterministic") or isinstance(_base(fn), pyro.distributions.Delta):
                continue
            elif name in self.observed or node["infer"].get("was_observed") or fn.support.is_discrete:
                data[name] = node["value"]
            else:
                latent[name] = node["value"]
        if self.draw_data is not None:
            return Truth(latent, {}, self._drawn_data(latent))
        if not data:
            raise ModelError("the model observes nothing, so that there are no data to simulate: give draw_data=")
        return Truth(latent, data, {})

    def _drawn_data(self, latent: Values) -> dict[str, Any]:
        """What ``draw_data`` returns, looked at."""
        assert self.draw_data is not None
        with _named("draw_data"):
            found = self.draw_data(latent, self.plan)
        names = list(bound(self.model, self.args, self.kwargs))
        if not isinstance(found, Mapping) or not found or not found.keys() <= set(names):
            told = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise OptionError(
                f"draw_data returned {told}: it must be a dictionary of those arguments of the model that are data, "
                f"some of {', '.join(names)}"
            )
        for name, value in found.items():
            whole = hasattr(self.plan[name], "unobserved")
            if whole and (not hasattr(value, "unobserved") or value.as_tensor() is None):
                raise OptionError(
                    f"draw_data returned {form(value)} for {name!r}, but must return what was observed, "
                    f"{form(self.plan[name])} as {name!r} is"
                )
        return dict(found)

    def at_truth(self, number: int) -> dict[str, list[float]]:
        """The values of :attr:`quantities` at the truth of a replicate: by these a study knows its own again."""
        truth = self.draw(number)
        potential = self.potential(truth)
        values = potential.replay(truth.latent, unconstrained=False)["posterior"]
        one = {name: value[None] for name, value in values.items()}
        return {name: found.flatten().tolist() for name, found in self._own_quantities(potential, one)}

    def potential(self, truth: Truth) -> Potential:
        """The posterior given a replicate's data."""
        if truth.arguments:
            return Potential(self.model, (), {**bound(self.model, self.args, self.kwargs), **truth.arguments})
        return Potential(pyro.poutine.condition(self.model, truth.data), self.args, self.kwargs)

    def engine_seed(self, number: int) -> int:
        """A seed for the engine of a replicate."""
        return derive_seed(self.seed, _ENGINES, number)

    def compare(self, number: int, truth: Truth, potential: Potential, draws: Draws, num_draws: int) -> Comparison:
        """Ranks of the truth among ``num_draws`` draws, evenly spaced over all chains.

        The quantities are the elements of each latent site (but of those that are not ``identified``), the
        log-likelihood, and where trajectories of a TabularMDP are observed the *return gap*: by how much the
        demonstrators' behaviour, a policy estimated from the data, earns more than actions taken for no reason. A
        difference of returns is identified though rewards are not.

        Raises:
            OptionError: there are fewer draws, or a quantity is not a number for each draw.
        """
        chains, count = next(iter(draws.values.values())).shape[:2]
        if chains * count < num_draws:
            raise OptionError(f"{chains} chains of {count} draws are fewer than num_draws={num_draws}: take more")
        index = torch.linspace(0, chains * count - 1, num_draws).round().long()
        chosen = {name: value.flatten(0, 1)[index.to(value.device)][None] for name, value in draws.values.items()}
        posterior = replay_draws(potential, Draws(chosen, draws.unconstrained))
        replayed = potential.replay(truth.latent, unconstrained=False)
        both = {
            group: {name: torch.cat([replayed[group][name][None], value[0]]) for name, value in values.items()}
            for group, values in posterior.items()
        }
        with own_generator():
            torch.manual_seed(derive_seed(self.seed, _TRUTHS, number) ^ 1)
            found = {name: _ranked(name, x) for name, x in self._quantities(potential, both)}
        judged = [value for name, value in draws.values.items() if potential.latent[name].identified]
        flat = np.concatenate(
            [value.reshape(chains, count, -1).cpu().numpy() for value in judged or draws.values.values()], -1
        )
        diverging = draws.stats.get("diverging")
        return Comparison(
            found,
            ess=float(np.min(ess_bulk(flat))),
            rhat=float(np.max(rhat(flat))),
            divergences=0.0 if diverging is None else float(diverging.double().mean()),
        )

    def _quantities(self, potential: Potential, both: dict[str, Values]) -> Iterator[tuple[str, Tensor]]:
        """Each test quantity at the truth and at the draws, ``[1 + D, *shape]``."""
        values = both["posterior"]
        for name, site in potential.latent.items():
            if site.identified:
                yield name, values[name]
        if not all(site.identified for site in potential.latent.values()):
            # What is recorded of them, such as a network's reward; in the order of the model, for all processes.
            yield from ((name, value) for name, value in values.items() if name not in potential.latent)
        yield LOG_LIKELIHOOD, both["stats"]["log_likelihood"]
        latent = {name: values[name] for name in potential.latent}
        yield from _return_gaps(potential, latent)
        yield from self._own_quantities(potential, values)

    def _own_quantities(self, potential: Potential, values: Values) -> Iterator[tuple[str, Tensor]]:
        """Those that were asked for beside the others, at draws ``[D, *shape]`` of latent and deterministic sites."""
        data = {name: site.value for name, site in potential.sites.items() if site.value is not None}
        for name, quantity in self.quantities.items():
            if name in potential.latent or name in (LOG_LIKELIHOOD, RETURN_GAP):
                raise OptionError(f"quantity {name!r} has the name of one that is there already: choose another")
            with _named(f"quantity {name!r}"):
                found = quantity(dict(values), data)
            if not isinstance(found, Tensor) or found.shape[:1] != values[next(iter(values))].shape[:1]:
                raise OptionError(f"quantity {name!r} must return a tensor [draw, ...] of as many draws as it is given")
            yield name, found


def _functions(quantities: Mapping[str, Quantity] | Sequence[str]) -> dict[str, Quantity]:
    """Test quantities as functions; a name is that of a site."""
    if isinstance(quantities, Mapping):
        return dict(quantities)
    if isinstance(quantities, str) or not all(isinstance(name, str) for name in quantities):
        raise OptionError("quantities must be functions by name, or a list of names that the model records")

    def recorded(name: str) -> Quantity:
        def quantity(values: Values, data: Values) -> Tensor:
            if name not in values:
                raise OptionError(
                    f"quantity {name!r} is not recorded by the model, which has {', '.join(sorted(values))}: record it "
                    "by pyro.deterministic"
                )
            return values[name]

        return quantity

    return {name: recorded(name) for name in quantities}


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say of whose function an error is."""
    try:
        yield
    except (PirlError, RuntimeError):
        raise
    except Exception as error:
        raise ModelError(f"{what} raised {type(error).__name__}: {_line(error)}") from error


def check_study(study: Any) -> None:
    """Refuse what is no study.

    Raises:
        OptionError: says what is wanted.
    """
    children = getattr(study, "children", ())
    if not {"ranks", "recovery", "sample_stats"} <= set(children) or "num_draws" not in study.attrs:
        kind = "posterior" if "posterior" in children else type(study).__name__
        raise OptionError(f"this is a {kind}, and no study: give what pirl.calibrate returned")


def _ranked(name: str, values: Tensor) -> Ranked:
    """Rank and value of the truth ``[0]`` among draws ``[1:]``, and the draws' mean, sd and quantiles.

    Quantiles are those that a further draw lies below with that probability (Weibull's), so that intervals of few draws
    hold as many truths as they say, from 19 on.
    """
    values = values.detach().cpu().double()
    truth, draws = values[0], values[1:]
    if not bool(values.isfinite().all()):
        raise ModelError(f"test quantity {name!r} is not finite at the truth or at a draw of the posterior")
    order = torch.rand(draws.shape, dtype=draws.dtype) < torch.rand(truth.shape, dtype=draws.dtype)
    rank = ((draws < truth) | ((draws == truth) & order)).sum(0)
    quantiles = np.quantile(draws.numpy(), QUANTILES, axis=0, method="weibull")
    sd = draws.std(0) if len(draws) > 1 else torch.full_like(truth, torch.nan)  # of one draw nobody knows it
    return Ranked(rank.numpy(), truth.numpy(), draws.mean(0).numpy(), sd.numpy(), quantiles)


def _return_gaps(potential: Potential, latent: Values) -> Iterator[tuple[str, Tensor]]:
    """By how much the demonstrators' policy earns more than the action prior, at each draw, by observed site.

    Both start from p(s_1), so that shaping of the reward takes as much from one as from the other. The policy is
    estimated by the share of each action among the decisions seen in a state, to which one decision of the prior is
    added. Where rewards differ by episode or subject, the mean over them is taken.
    """
    args, kwargs = potential.args, potential.kwargs
    first = {name: value[0] for name, value in latent.items()}
    laws = trajectory_laws(potential.model, args, kwargs, first)
    for name, law in laws.items():
        seen = potential.sites[name].value
        if seen is None:
            continue
        mdp = law.mdp
        prior = torch.softmax(mdp.log_prior, -1)
        state, action = seen[..., 0], seen[..., 1]
        acting = action >= 0
        counts = prior.new_zeros(prior.numel())
        pairs = state[acting] * mdp.num_actions + action[acting]
        counts = counts.index_add(0, pairs, torch.ones_like(pairs, dtype=counts.dtype)).reshape(prior.shape) + prior
        policy = counts / counts.sum(-1, keepdim=True)
        try:
            rewards = rewards_at(potential.model, args, kwargs, latent, name)
            if rewards.dim() > 3:
                rewards = rewards.flatten(1, -3).mean(1)
            theirs, chance = _expected_return(mdp, policy, rewards), _expected_return(mdp, prior, rewards)
            gap = theirs - chance
            # What is only rounding is a tie.
            gap = torch.where(gap.abs() > 1e-9 * (theirs.abs() + chance.abs()), gap, 0.0)
        except PirlError:  # a policy that never ends, without a discount
            continue
        yield RETURN_GAP if len(laws) == 1 else f"{RETURN_GAP}_{name}", gap


def _expected_return(mdp: TabularMDP, policy: Float[Tensor, "S A"], rewards: Float[Tensor, "D S A"]) -> Tensor:
    values = policy_value(mdp, policy, rewards)
    return (values if mdp.horizon is None else values[..., 0, :]) @ mdp.initial


def _lasts_as_planned(demos: Any) -> bool:
    """Whether no episode could have been longer; of a kind of one's own nobody knows."""
    lengths = getattr(demos, "lengths", None)
    return isinstance(lengths, Tensor) and torch.equal(lengths, demos.unobserved().lengths)


def _line(error: BaseException) -> str:
    """Its first line, without Pyro's table of shapes."""
    return next(iter(str(error).strip().splitlines()), "")


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
