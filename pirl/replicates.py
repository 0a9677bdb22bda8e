"""Parameters from the prior, data from the model, the posterior given those data: one replicate of a study.

What is compared of them tells :mod:`pirl.quantities`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.branches import Fitted, fitted_branch
from pirl.convergence import FEWEST_DRAWS, ess_bulk, rhat, varying
from pirl.errors import ModelError, OptionError, PirlError, first_line, form, named_line
from pirl.infer.datatree import replay_draws
from pirl.infer.engine import Draws, derive_seed, own_generator
from pirl.infer.potential import Potential, Values, base_of
from pirl.infer.user_errors import NO_DENSITY, own_errors, place_of
from pirl.quantities import Quantity, Ranked, named, own_quantities, own_quantities_at, quantities_at, ranked
from pirl.setting import Setting, bound

DrawData = Callable[[dict[str, Tensor], dict[str, Any]], Mapping[str, Any]]
"""(latent sites, named arguments of the model, nothing observed) -> those that are data, drawn by torch's generator."""

_ATTEMPTS = 100
_MOST_ELEMENTS = 50
"""Of a quantity, in which chains are compared."""
_TRUTHS, _ENGINES = 1000, 1001
"""Streams of random numbers: of truth and data of a replicate, and of its engine."""


class Truth(NamedTuple):
    """Parameters that a replicate's data were drawn with."""

    latent: Values
    data: Values
    """Values of the observed sites; empty where ``arguments`` carry them."""
    arguments: dict[str, Any]
    """Arguments of the model, by name, that replace its own."""


class Comparison(NamedTuple):
    """A replicate: truth and posterior, by test quantity, and how well its chains did."""

    quantities: dict[str, Ranked]
    ess: float
    """The least bulk effective sample size of the unconstrained parameters; of the test quantities where some of these
    are not identified. NaN where nothing varies, or chains have fewer than four draws."""
    rhat: float
    """The largest R-hat of them."""
    divergences: float
    """Share of divergent transitions."""


class Study:
    """Replicates of a model: where their random numbers come from, and what is compared.

    Args:
        model: a Pyro model.
        setting: its arguments; demonstrations among them are a plan: how many, how long, from where.
        quantities: test quantities beside those of every study: functions by name, or names of what the model
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
        self.quantities = own_quantities({} if quantities is None else quantities)
        if draw_data is not None and not callable(draw_data):
            raise OptionError(f"draw_data is {form(draw_data)}: give a function of (parameters, arguments)")
        # Who draws the data elsewhere needs a model that says how likely data are, and not that it can do without any.
        self.args, self.kwargs = setting.unobserved() if draw_data is None else (setting.args, setting.kwargs)
        self.plan = bound(model, *setting.unobserved())
        first = derive_seed(seed, _TRUTHS, 0)
        self.fitted = fitted_branch(model, setting, first) if draw_data is None else Fitted()

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
        raise ModelError(f"the model has no law at {_ATTEMPTS} draws from its prior: {first_line(reason)}")

    def _draw(self) -> Truth:
        try:
            with own_errors():
                trace = pyro.poutine.trace(pyro.poutine.uncondition(self.model)).get_trace(*self.args, **self.kwargs)
        except NotImplementedError as error:
            raise ModelError(f"a prior cannot be drawn from, as of an improper one: {first_line(error)}") from error
        except (*NO_DENSITY, PirlError, RuntimeError):  # it says itself what is wrong, as in a fit
            raise
        except Exception as error:
            if self.draw_data is not None:
                raise
            if self.fitted.fails is not None:
                order = ", ".join(bound(self.model, self.args, self.kwargs))
                raise ModelError(
                    f"the model does not run on its arguments: {self.fitted.fails}; check it there, or the order of "
                    f"its arguments, {order}"
                ) from error
            raise ModelError(
                f"the model does not run without data: {named_line(error)}{place_of(error)}; let it sample "
                "them (obs=demos.as_tensor()), or give draw_data= if it only says how likely data are"
            ) from error
        latent, data = {}, {}
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or type(node["fn"]).__name__ == "_Subsample":
                continue
            fn = node["fn"]
            if isinstance(base_of(fn), pyro.distributions.Unit):
                if self.draw_data is None:
                    raise ModelError(
                        f"site {name!r} is a pyro.factor, from which no data can be drawn: give draw_data=, a function "
                        "of parameters and arguments that returns the arguments that are data"
                    )
            elif node["infer"].get("_deterministic") or isinstance(base_of(fn), pyro.distributions.Delta):
                continue
            elif name in self.fitted.observed or node["infer"].get("was_observed") or fn.support.is_discrete:
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
        with named("draw_data"):
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
                kind = form(self.plan[name])
                given = "the unobserved plan" if hasattr(value, "unobserved") else form(value)
                raise OptionError(
                    f"draw_data returned {given} for {name!r}, but must return what was observed: {kind} with data"
                )
        return dict(found)

    def at_truth(self, number: int) -> dict[str, list[float]]:
        """What is known at the truth of a replicate, by which a study knows its own again.

        The parameters, the log density and the likelihood's part of it, and the values of :attr:`quantities`.
        """
        truth = self.draw(number)
        potential = self.potential(truth)
        groups = potential.replay(truth.latent, unconstrained=False)
        one = {name: value[None] for name, value in groups["posterior"].items()}
        known = {**truth.latent, **groups["stats"], **dict(own_quantities_at(potential, one, self.quantities))}
        return {name: value.detach().double().flatten().tolist() for name, value in known.items()}

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
            found = {name: ranked(name, x) for name, x in quantities_at(potential, both, self.quantities)}
        flat = self._judged(number, potential, draws, num_draws)
        varies = varying(flat)[0]  # of a constant nothing is known
        ess, torn = (of(flat[..., varies]) if varies.any() else np.array([np.nan]) for of in (ess_bulk, rhat))
        diverging = draws.stats.get("diverging")
        return Comparison(
            found,
            ess=float(np.fmin.reduce(ess)),
            rhat=float(np.fmax.reduce(torn)),
            divergences=0.0 if diverging is None else float(diverging.double().mean()),
        )

    def _judged(
        self, number: int, potential: Potential, draws: Draws, num_draws: int
    ) -> Float[np.ndarray, "chain draw element"]:
        """What chains are compared in: the parameters, or test quantities where some of these are not identified.

        Chains may differ in all parameters, and agree on what they mean.
        """
        chains, count = next(iter(draws.values.values())).shape[:2]
        judged = list(draws.values.values())
        if "diverging" in draws.stats and not all(site.identified for site in potential.latent.values()):
            # Every so-many-th draw, as few as tell: quantities may be large, and dear.
            step = max(1, min(chains * count // (4 * num_draws), count // FEWEST_DRAWS))
            some = {name: value[:, ::step] for name, value in draws.values.items()}
            count = len(range(0, count, step))
            groups = replay_draws(potential, Draws(some, draws.unconstrained), log_likelihood=False)
            flat = {group: {name: x.flatten(0, 1) for name, x in values.items()} for group, values in groups.items()}
            with own_generator():
                torch.manual_seed(derive_seed(self.seed, _TRUTHS, number) ^ 2)
                judged = [_few(x) for _, x in quantities_at(potential, flat, self.quantities)]
        return np.concatenate([x.detach().reshape(chains, count, -1).cpu().numpy() for x in judged], -1)


def _few(values: Tensor) -> Tensor:
    """Some elements of a quantity ``[D, *shape]``, evenly chosen where there are many."""
    flat = values.reshape(len(values), -1)
    return flat[:, torch.linspace(0, flat.shape[1] - 1, min(flat.shape[1], _MOST_ELEMENTS)).long().to(flat.device)]


def check_study(study: Any) -> None:
    """Refuse what is no study.

    Raises:
        OptionError: says what is wanted.
    """
    children = getattr(study, "children", ())
    if not {"ranks", "recovery", "sample_stats"} <= set(children) or "num_draws" not in study.attrs:
        kind = "posterior" if "posterior" in children else type(study).__name__
        raise OptionError(f"this is a {kind}, and no study: give what pirl.calibrate returned")
