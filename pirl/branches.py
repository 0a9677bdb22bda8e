"""The two branches of a model: one is fitted to data, and one simulates where there are none.

A study simulates. Which sites are data it learns from the branch that is fitted; and whether the two are one model, by
comparing them at the same values of all sites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from pirl.distributions import TabularTrajectory
from pirl.errors import DiscreteLatentError, ModelError, named_line
from pirl.infer.engine import own_generator
from pirl.infer.potential import Values, base_of, kind_of
from pirl.infer.user_errors import place_of
from pirl.linear_gaussian import LinearGaussianTrajectory
from pirl.sampled import SampledMaxEntTrajectory
from pirl.setting import Setting, leaves

TRAJECTORIES = (TabularTrajectory, SampledMaxEntTrajectory, LinearGaussianTrajectory)


class Fitted(NamedTuple):
    """What the branch that is fitted says."""

    observed: frozenset[str] = frozenset()
    """Sites that are data; none where the arguments are a plan already, without data."""
    fails: str | None = None
    """Why it does not run on the arguments as they were given."""


def fitted_branch(model: Callable[..., Any], setting: Setting, seed: int) -> Fitted:
    """Look at the branch that is fitted, where there are data: continuous ones would pass for parameters.

    Raises:
        DiscreteLatentError: a discrete site is hidden, which would pass for data.
        ModelError: there are demonstrations, and trajectories are not observed: that simulates, and fits nothing. Or
            the other branch is of another model.
    """
    arguments = list(leaves([setting.args, setting.kwargs]))
    plans = [value for value in arguments if hasattr(value, "as_tensor") and value.as_tensor() is None]
    if plans or any(value is None for value in arguments):
        return Fitted()
    try:
        with own_generator(), torch.no_grad():
            torch.manual_seed(seed)
            trace = pyro.poutine.trace(model).get_trace(*setting.args, **setting.kwargs)
    except Exception as error:  # will be said of the model without data, or with those of a replicate
        return Fitted(fails=f"{named_line(error)}{place_of(error)}")
    kinds = {name: kind_of(node) for name, node in trace.nodes.items() if node["type"] == "sample"}
    given = [value for value in arguments if hasattr(value, "unobserved")]
    for name, kind in kinds.items():
        site = trace.nodes[name]
        hidden = kind == "latent" and not site["infer"].get("was_observed")
        if given and hidden and isinstance(base_of(site["fn"]), TRAJECTORIES):
            raise ModelError(f"site {name!r} does not observe the demonstrations: give obs=demos.as_tensor()")
        if kind == "latent" and site["fn"].support.is_discrete and "observed" in kinds.values():
            raise DiscreteLatentError(
                f"latent site {name!r} is discrete: enumerate it, or use MixtureSameFamily; data need obs="
            )
    # Where episodes may last longer than they did the two laws differ, as they should.
    if given and all(map(_lasts_as_planned, given)):
        values = {name: trace.nodes[name]["value"] for name, kind in kinds.items() if kind != "plate"}
        _compare(trace, pyro.poutine.condition(model, values), setting, values)
    return Fitted(frozenset(name for name, kind in kinds.items() if kind == "observed"))


def _compare(fitted: pyro.poutine.Trace, model: Callable[..., Any], setting: Setting, values: Values) -> None:
    """A model that asks whether there are data may say two things; a study hears one, and a fit the other.

    Args:
        model: the model, at these values of its sites.

    Raises:
        ModelError: its density is another where it simulates.
    """
    args, kwargs = setting.unobserved()
    try:
        with own_generator(), torch.no_grad(), pyro.validation_enabled(False):
            simulated = pyro.poutine.trace(model).get_trace(*args, **kwargs)
            for run in (fitted, simulated):
                run.compute_log_prob(lambda name, _: name in values)
    except Exception:  # the study will say it of its own data
        return
    for name in (name for name in values if name in simulated.nodes):  # in the order of the model
        with_data, without = (float(run.nodes[name]["log_prob_sum"]) for run in (fitted, simulated))
        if not np.isclose(with_data, without, rtol=1e-6, equal_nan=True):
            raise ModelError(
                f"site {name!r} has the log-density {with_data:.6g} where the model is given data, and {without:.6g} "
                "for the same values where it simulates: what it does must not depend on whether there are data (a "
                "mask can be an argument of its own)"
            )


def _lasts_as_planned(demos: Any) -> bool:
    """Whether no episode could have been longer; of a kind of one's own nobody knows."""
    lengths = getattr(demos, "lengths", None)
    return isinstance(lengths, Tensor) and torch.equal(lengths, demos.unobserved().lengths)
