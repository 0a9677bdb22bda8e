"""The reward that a model makes of each draw of its parameters, by running it with its latent sites given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pirl.distributions import TabularTrajectory
from pirl.errors import ModelError, OptionError, check_counts, form
from pirl.infer.engine import one_thread, own_generator
from pirl.sampled import SampledMaxEntTrajectory

if TYPE_CHECKING:
    import xarray

BLOCK = 256
"""Draws that are looked at together."""


def reward_draws(
    posterior: xarray.DataTree,
    model: Callable[..., Any],
    *args: Any,
    site: str | None = None,
    num_draws: int | None = None,
    **kwargs: Any,
) -> Float[Tensor, "D *batch S A"]:
    """The reward under each draw of a posterior, by running the model with its latent sites given.

    Args:
        posterior: what :func:`pirl.fit` returned, of ``model(*args, **kwargs)``.
        site: which trajectories' reward, where a model observes several.
        num_draws: at most so many, evenly spaced over all chains.

    Returns:
        ``[D, S, A]``, of a reward r(s) as well; dimensions of 1 that stand for plates are left out, those of subjects
        or environments stay. A :class:`pirl.SampledMaxEntTrajectory` of numbered states has such a reward too.

    Raises:
        ModelError: the model observes no trajectories of numbered states, or several and ``site`` does not say which.
        OptionError: the posterior lacks a latent site of the model: it is of another one; or an option out of range.

    Example:
        >>> pirl.reward_draws(posterior, model, demos, mdp, features, num_draws=100).shape
        torch.Size([100, 25, 5])
    """
    dataset = drawn_of(posterior)
    count = dataset.sizes["chain"] * dataset.sizes["draw"]
    num_draws = count if num_draws is None else num_draws
    check_counts(1, num_draws=num_draws)
    index = torch.linspace(0, count - 1, min(num_draws, count)).round().long()
    dtype = getattr(torch, posterior.attrs.get("dtype", "float64"))
    devices = (getattr(x, "device", None) for x in [*args, *kwargs.values()])
    device = next((x for x in devices if isinstance(x, torch.device)), torch.device("cpu"))
    with device, default_dtype(dtype), one_thread(), own_generator(), pyro.validation_enabled(False), torch.no_grad():
        values = {
            str(name): torch.as_tensor(data.values, device=device).flatten(0, 1)[index].to(dtype)
            for name, data in dataset.data_vars.items()
        }

        rewards = rewards_at(model, args, kwargs, values, site)
    singles = [dim for dim in range(1, rewards.dim() - 2) if rewards.shape[dim] == 1]
    return rewards.squeeze(singles) if singles else rewards


def drawn_of(posterior: Any) -> xarray.Dataset:
    """The draws of what :func:`pirl.fit` returned.

    Raises:
        OptionError: it is something else.
    """
    import xarray

    if isinstance(posterior, xarray.DataTree) and "posterior" in posterior.children:
        return posterior["posterior"].to_dataset()
    own = ", which draws rewards itself: posterior.reward_draws" if hasattr(posterior, "reward_draws") else ""
    raise OptionError(f"posterior is {form(posterior)}{own or ': give what pirl.fit returned, then its model'}")


def rewards_at(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    site: str | None = None,
) -> Float[Tensor, "D *batch S A"]:
    """The reward of trajectories at draws ``[D, *shape]`` of the latent sites: all at once where the model vmaps."""

    def one(draw: Mapping[str, Tensor]) -> Tensor:
        return _reward(model, args, kwargs, draw, site)

    count = len(next(iter(values.values())))
    one({name: value[0] for name, value in values.items()})  # what is wrong is said here
    try:
        return torch.func.vmap(one, chunk_size=BLOCK)(dict(values))
    except Exception:  # what does not vmap is run draw by draw
        return torch.stack([one({name: value[i] for name, value in values.items()}) for i in range(count)])


class Given(Messenger):
    """Latent sites take the values given; the laws of trajectories are kept."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.laws = values, dict[str, TabularTrajectory]()
        self.sampled, self.seen = dict[str, SampledMaxEntTrajectory](), dict[str, Tensor]()

    def _process_message(self, message: Any) -> None:
        if message["type"] != "sample" or message["is_observed"]:
            return
        if message["name"] in self.values:
            message["value"], message["done"] = self.values[message["name"]], True

    def _postprocess_message(self, message: Any) -> None:
        if message["type"] != "sample":
            return
        fn = law_of(message["fn"])
        if isinstance(fn, TabularTrajectory):
            self.laws[message["name"]] = fn
        elif isinstance(fn, SampledMaxEntTrajectory):
            self.sampled[message["name"]], self.seen[message["name"]] = fn, message["value"]
        elif message["infer"].get("_deterministic") or message["is_observed"] or message["name"] in self.values:
            return
        elif type(fn).__name__ != "_Subsample":
            raise OptionError(
                f"the posterior has no site {message['name']!r}: it is of another model, or of other arguments"
            )


def law_of(fn: Any) -> Any:
    """The distribution of trajectories inside of others, if it is one."""
    while not isinstance(fn, (TabularTrajectory, SampledMaxEntTrajectory)) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def trajectory_laws(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], draw: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The distributions of trajectories (TabularTrajectory) under one draw, by site."""
    with Given(draw) as given:
        model(*args, **kwargs)
    return given.laws


def _reward(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draw: Mapping[str, Tensor],
    site: str | None,
) -> Tensor:
    with Given(draw) as given:
        model(*args, **kwargs)
    laws = given.laws | given.sampled
    if not laws:
        raise ModelError("the model observes no trajectories of a TabularMDP, so that it has no reward to show")
    if site is None and len(laws) > 1:
        raise ModelError(f"the model observes several trajectories: choose site= of {', '.join(laws)}")
    if site is not None and site not in laws:
        raise ModelError(f"the model observes no trajectories at {site!r}: there are {', '.join(laws)}")
    law = laws[site or next(iter(laws))]
    if isinstance(law, TabularTrajectory):
        return law.reward
    if not isinstance(law.reward, Tensor):
        raise ModelError("the reward is a function of vectors, and no table: call it on states and actions of interest")
    return law.reward.expand(*law.reward.shape[:-1], law.pool.num_actions or law.reward.shape[-1])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As in :func:`pirl.fit`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
