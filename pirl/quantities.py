"""What a study compares: *test quantities*, functions of parameters and data.

At the true parameters and at draws from the posterior, their ranks among the draws are uniform if the posterior is what
it claims to be (Cook, Gelman and Rubin 2006; Talts et al. 2018). Ranks of parameters alone miss faults that a quantity
of the data shows, such as a posterior that ignores them (Modrak et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import ModelError, OptionError, PirlError, form, named_line
from pirl.infer.potential import Potential, Values
from pirl.infer.user_errors import place_of
from pirl.mdp import TabularMDP
from pirl.planning import policy_value
from pirl.posterior.draws import rewards_at, trajectory_laws

Quantity = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
"""(draws of latent and deterministic sites ``[D, *shape]``, data by site) -> ``[D, *any]``."""

LOG_LIKELIHOOD, RETURN_GAP = "log_likelihood", "return_gap"

_OURS = (LOG_LIKELIHOOD, RETURN_GAP, "chain", "draw", "summary")

_TAKEN = "studies use the name {!r} themselves: leave that quantity out, or choose another"

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Recorded:
    """The test quantity that is a site of the model."""

    site: str

    def __call__(self, values: Values, data: Values) -> Tensor:
        """Its values at the draws."""
        if self.site not in values:
            raise OptionError(
                f"quantity {self.site!r} is not recorded by the model, which has {', '.join(sorted(values))}: record "
                "it by pyro.deterministic"
            )
        return values[self.site]


class Ranked(NamedTuple):
    """A test quantity: its truth among draws from the posterior."""

    rank: Int[np.ndarray, "*shape"]
    """Draws below the truth; ties, and what differs by rounding alone, are broken at random."""
    truth: Float[np.ndarray, "*shape"]
    mean: Float[np.ndarray, "*shape"]
    sd: Float[np.ndarray, "*shape"]
    quantiles: Float[np.ndarray, "5 *shape"]


def ranked(name: str, values: Tensor) -> Ranked:
    """Rank and value of the truth ``[0]`` among draws ``[1:]``, and the draws' mean, sd and quantiles.

    The truth is evaluated by itself and the draws many at once, which round otherwise, and always to one side. So what
    lies in one cell of a grid, as wide as rounding reaches and at a random place, is a tie: a grid does not tell truth
    from draws, so that the ranks of a sound posterior stay exactly uniform.

    Quantiles are those that a further draw lies below with that probability (Weibull's), so that intervals of few draws
    hold as many truths as they say, from 19 on.
    """
    rounding = torch.finfo(values.dtype if values.is_floating_point() else torch.float64).eps ** 0.75
    values = values.detach().cpu().double()
    truth, draws = values[0], values[1:]
    if not bool(values.isfinite().all()):
        raise ModelError(f"test quantity {name!r} is not finite at the truth or at a draw of the posterior")
    order = torch.rand(draws.shape, dtype=draws.dtype) < torch.rand(truth.shape, dtype=draws.dtype)
    # A log-likelihood may be zero but for rounding (where all actions tie), and then has no size of its own.
    size = values.abs().amax(0).clamp(min=1.0 if name == LOG_LIKELIHOOD else torch.finfo(torch.float64).tiny)
    cells = (values / (rounding * size) + torch.rand(truth.shape, dtype=values.dtype)).floor()
    rank = ((cells[1:] < cells[0]) | ((cells[1:] == cells[0]) & order)).sum(0)
    quantiles = np.quantile(draws.numpy(), QUANTILES, axis=0, method="weibull")
    sd = draws.std(0) if len(draws) > 1 else torch.full_like(truth, torch.nan)  # of one draw nobody knows it
    return Ranked(rank.numpy(), truth.numpy(), draws.mean(0).numpy(), sd.numpy(), quantiles)


def quantities_at(
    potential: Potential, draws: Mapping[str, Values], own: Mapping[str, Quantity]
) -> Iterator[tuple[str, Tensor]]:
    """Each test quantity by name, ``[D, *shape]``.

    They are the elements of each latent site (but of those that are not ``identified``), the log-likelihood, where
    trajectories of a TabularMDP are observed the *return gap* (see :func:`return_gaps`), and a user's ``own``.

    Args:
        draws: the groups of :meth:`Potential.replay` at D draws, of which the truth may be one.

    Raises:
        OptionError: one of a user's is not a number for each draw.
    """
    values = draws["posterior"]
    for name, site in potential.latent.items():
        if site.identified:
            yield name, values[name]
    if not all(site.identified for site in potential.latent.values()):
        # What is recorded of them, such as a network's reward; in the order of the model, for all processes.
        yield from ((name, value) for name, value in values.items() if name not in potential.latent)
    yield LOG_LIKELIHOOD, draws["stats"]["log_likelihood"]
    for name, gap in return_gaps(potential, {name: values[name] for name in potential.latent}):
        if name in own:
            raise OptionError(_TAKEN.format(name))
        yield name, gap
    yield from own_quantities_at(potential, values, own)


def own_quantities_at(
    potential: Potential, values: Values, own: Mapping[str, Quantity]
) -> Iterator[tuple[str, Tensor]]:
    """Those of a user, at draws ``[D, *shape]`` of latent and deterministic sites."""
    data = {name: site.value for name, site in potential.sites.items() if site.value is not None}
    for name, quantity in own.items():
        if name in potential.latent and potential.latent[name].identified:
            raise OptionError(f"quantity {name!r} is a parameter, which is ranked already: leave it out")
        if name in values and not isinstance(quantity, Recorded):
            raise OptionError(f"quantity {name!r} has the name of a site: choose another")
        with named(f"quantity {name!r}"):
            found = quantity(dict(values), data)
        if not isinstance(found, Tensor) or found.shape[:1] != values[next(iter(values))].shape[:1]:
            raise OptionError(f"quantity {name!r} must return a tensor [draw, ...] of as many draws as it is given")
        yield name, found


def own_quantities(quantities: Any) -> dict[str, Quantity]:
    """Test quantities of a user as functions; a name is that of a site.

    Raises:
        OptionError: they are something else, or have names that results have of their own.
    """
    listed = isinstance(quantities, (list, tuple))  # a set has another order in each process
    names: list[Any] = list(quantities) if listed or isinstance(quantities, Mapping) else [None]
    if not all(isinstance(name, str) for name in names):
        raise OptionError("quantities must be functions by name, or a list of names that the model records")
    found: dict[str, Quantity] = {name: Recorded(name) for name in names} if listed else dict(quantities)
    for name, quantity in found.items():
        if not callable(quantity):
            raise OptionError(f"quantity {name!r} is {form(quantity)}: give a function of (draws, data)")
        if name in _OURS:
            raise OptionError(_TAKEN.format(name))
    return found


@contextmanager
def named(what: str) -> Iterator[None]:
    """Say of whose function an error is."""
    try:
        yield
    except (PirlError, RuntimeError):
        raise
    except Exception as error:
        raise ModelError(f"{what} raised {named_line(error)}{place_of(error)}") from error


def return_gaps(potential: Potential, latent: Values) -> Iterator[tuple[str, Tensor]]:
    """By how much the demonstrators' policy earns more than the action prior, at each draw, by observed site.

    A difference of returns is identified though rewards are not.

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
