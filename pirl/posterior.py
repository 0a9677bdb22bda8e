"""What draws of a model's parameters mean: the rewards that they make, and what of them demonstrations determine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pirl.convergence import ess_bulk, rhat
from pirl.distributions import TabularTrajectory
from pirl.errors import ModelError, OptionError, PirlError, check_counts
from pirl.identify import Identification, unidentified
from pirl.infer.engine import one_thread, own_generator
from pirl.mdp import TabularMDP
from pirl.partition import PartitionEstimate
from pirl.sampled import SampledMaxEntTrajectory

if TYPE_CHECKING:
    import xarray

__all__ = ["prior_rewards", "reward_draws", "sampled_rewards"]

_BLOCK = 256
# Beyond these, dense tables of directions cost more than they tell.
_MOST_PARAMETERS, _MOST_PAIRS, _MOST_QUANTITIES = 300, 3000, 200
_PRIOR_DRAWS = 400
_QUALITY_DRAWS = 100
_CANDIDATES = 8
"""Draws among which the one is looked for that a pool knows least."""


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
    dataset = posterior["posterior"].to_dataset()
    count = dataset.sizes["chain"] * dataset.sizes["draw"]
    num_draws = count if num_draws is None else num_draws
    check_counts(1, num_draws=num_draws)
    index = torch.linspace(0, count - 1, min(num_draws, count)).round().long()
    dtype = getattr(torch, posterior.attrs.get("dtype", "float64"))
    devices = (getattr(x, "device", None) for x in [*args, *kwargs.values()])
    device = next((x for x in devices if isinstance(x, torch.device)), torch.device("cpu"))
    with device, _default_dtype(dtype), one_thread(), own_generator(), pyro.validation_enabled(False), torch.no_grad():
        values = {
            str(name): torch.as_tensor(data.values, device=device).flatten(0, 1)[index].to(dtype)
            for name, data in dataset.data_vars.items()
        }

        rewards = rewards_at(model, args, kwargs, values, site)
    singles = [dim for dim in range(1, rewards.dim() - 2) if rewards.shape[dim] == 1]
    return rewards.squeeze(singles) if singles else rewards


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
        return torch.func.vmap(one, chunk_size=_BLOCK)(dict(values))
    except Exception:  # what does not vmap is run draw by draw
        return torch.stack([one({name: value[i] for name, value in values.items()}) for i in range(count)])


class _Given(Messenger):
    """Latent sites take the values given; the laws of trajectories are kept."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.laws = values, dict[str, TabularTrajectory]()
        self.sampled = dict[str, SampledMaxEntTrajectory]()

    def _process_message(self, message: Any) -> None:
        if message["type"] != "sample" or message["is_observed"]:
            return
        if message["name"] in self.values:
            message["value"], message["done"] = self.values[message["name"]], True

    def _postprocess_message(self, message: Any) -> None:
        if message["type"] != "sample":
            return
        fn = _law(message["fn"])
        if isinstance(fn, TabularTrajectory):
            self.laws[message["name"]] = fn
        elif isinstance(fn, SampledMaxEntTrajectory):
            self.sampled[message["name"]] = fn
        elif message["infer"].get("_deterministic") or message["is_observed"] or message["name"] in self.values:
            return
        elif type(fn).__name__ != "_Subsample":
            raise OptionError(
                f"the posterior has no site {message['name']!r}: it is of another model, or of other arguments"
            )


def _law(fn: Any) -> Any:
    """The distribution of trajectories inside of others, if it is one."""
    while not isinstance(fn, (TabularTrajectory, SampledMaxEntTrajectory)) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def trajectory_laws(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], draw: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The distributions of trajectories (TabularTrajectory) under one draw, by site."""
    with _Given(draw) as given:
        model(*args, **kwargs)
    return given.laws


def _reward(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draw: Mapping[str, Tensor],
    site: str | None,
) -> Tensor:
    with _Given(draw) as given:
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


def sampled_rewards(
    posterior: xarray.DataTree,
    model: Callable[..., Any],
    *args: Any,
    num_draws: int = 4,
    seed: int = 0,
    least_known: int = 0,
) -> list[Any]:
    """Rewards of some posterior draws, as the model gives them to its :class:`pirl.SampledMaxEntTrajectory`.

    A table ``[S, A]``, or a function of states and actions, for each draw (of a model with several such sites, those
    of the first).

    Args:
        num_draws: how many rewards.
        least_known: so many of them are those of which the pool has the fewest effective samples, among eight times as
            many draws.

    Raises:
        OptionError: ``least_known`` is more than ``num_draws``, or negative.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> quick = {"engine": "laplace", "num_samples": 50, "num_prior": 0, "num_posterior_predictive": 0}
        >>> found = pirl.learning.bayesian_guided_cost(sampled_model, walks[:2], simulator, marks, **quick)
        >>> rewards = sampled_rewards(found.posterior, sampled_model, walks[:2], found.pool, marks, num_draws=2)
        >>> [reward.shape for reward in rewards]
        [torch.Size([16, 1]), torch.Size([16, 1])]
    """
    check_counts(0, num_draws=num_draws, least_known=least_known)
    if least_known > num_draws:
        raise OptionError(f"least_known is {least_known}, more than num_draws={num_draws}: it is a part of them")
    dataset = posterior["posterior"].to_dataset()
    count = dataset.sizes["chain"] * dataset.sizes["draw"]
    index = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    index = index[: num_draws - least_known + _CANDIDATES * least_known]
    dtype = getattr(torch, posterior.attrs.get("dtype", "float64"))
    found, ess = list[Any](), list[float]()
    with _default_dtype(dtype), one_thread(), own_generator(), pyro.validation_enabled(False), torch.no_grad():
        values = {str(n): torch.as_tensor(x.values).flatten(0, 1).to(dtype) for n, x in dataset.data_vars.items()}
        for number in index.tolist():
            with _Given({name: value[number] for name, value in values.items()}) as given:
                model(*args)
            laws = list(given.sampled.values())
            found.append(laws[0].reward)
            ess.append(min(float(1 / law.log_weights.softmax(-1).square().sum(-1).max()) for law in laws))
    plain = num_draws - least_known
    edge = sorted(range(plain, len(found)), key=lambda number: ess[number])[:least_known]
    return [*found[:plain], *(found[number] for number in edge)]


def prior_rewards(
    model: Callable[..., Any], *args: Any, num_draws: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Any]:
    """Rewards of some draws of the prior, as :func:`sampled_rewards` gives them of the posterior.

    Raises:
        ModelError: the model observes no :class:`pirl.SampledMaxEntTrajectory`.

    Example:
        >>> from pirl.simulators import TabularSimulator, base_policy, roll_out
        >>> base = base_policy(world)
        >>> pool = pirl.Pool.of(roll_out(TabularSimulator(world), base, 100), base, base)
        >>> [reward.shape for reward in prior_rewards(sampled_model, walks, pool, marks, num_draws=2)]
        [torch.Size([16, 1]), torch.Size([16, 1])]
    """
    found = []
    with _default_dtype(dtype), one_thread(), own_generator(), pyro.validation_enabled(False), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(num_draws):
            trace = pyro.poutine.trace(model).get_trace(*args)
            latent = {name: site["value"] for name, site in trace.nodes.items()
                      if site["type"] == "sample" and not site["is_observed"]}  # fmt: skip
            for name in latent:
                if isinstance(_law(trace.nodes[name]["fn"]), SampledMaxEntTrajectory):
                    raise ModelError(f"site {name!r} observes nothing: give it obs=demos.as_tensor()")
            with _Given(latent) as given:
                model(*args)
            if not given.sampled:
                raise ModelError("the model observes no SampledMaxEntTrajectory, which needs no guided cost learning")
            found.append(next(iter(given.sampled.values())).reward)
    return found


def partition_quality(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Mapping[str, Tensor]
) -> tuple[PartitionEstimate, int] | None:
    """The estimate of log Z at posterior draws, and how many demonstrations one pool explains; None for exact models.

    A model that observes several sampled sites is judged by each of them: their estimates follow each other.

    Args:
        draws: of the latent sites, ``[draw, *shape]``; a hundred of them are looked at.
    """
    count = len(next(iter(draws.values()))) if draws else 0
    index = torch.linspace(0, count - 1, min(count, _QUALITY_DRAWS)).round().long()

    def laws(number: int) -> dict[str, Any]:
        with torch.no_grad(), _Given({name: value[index[number]] for name, value in draws.items()}) as given:
            model(*args, **kwargs)
        return given.sampled

    first = laws(0) if count else {}
    if not first:
        return None
    weights: dict[str, list[Tensor]] = {name: [] for name in first}
    for number in range(len(index)):
        for name, law in laws(number).items():
            weights[name].append(law.log_weights.reshape(-1, law.log_weights.shape[-1]))
    # Errors of one pool move all that it explains together; those of several pools average out. Of a draw, the worst
    # pool's tail counts.
    explained = {name: max(law.batch_shape.numel(), 1) for name, law in first.items()}
    of_pool: dict[int, int] = {}
    for name, law in first.items():
        of_pool[id(law.pool)] = of_pool.get(id(law.pool), 0) + explained[name]
    total, squares = sum(of_pool.values()), sum(n * n for n in of_pool.values())
    found = {name: first[name].pool.judge(torch.stack(rows)) for name, rows in weights.items()}  # [draw, *batch]
    flat = {
        name: PartitionEstimate(
            part.log_partition.flatten(1), part.standard_error.flatten(1), part.ess.flatten(1),
            part.pareto_k.flatten(1), part.num_samples,
        )
        for name, part in found.items()
    }  # fmt: skip
    inverse = torch.zeros(len(index), dtype=torch.float64)
    for name, estimate in flat.items():
        share = explained[name] / of_pool[id(first[name].pool)]
        inverse += share * of_pool[id(first[name].pool)] ** 2 * (1 / estimate.ess.double()).amax(1).cpu()
    khat = torch.cat([estimate.pareto_k.nan_to_num(nan=1.0) for estimate in flat.values()], 1).amax(1)
    error = torch.cat([estimate.standard_error for estimate in flat.values()], 1).amax(1)
    value = torch.cat([estimate.log_partition for estimate in flat.values()], 1).mean(1)
    ess = (squares / inverse).to(value)
    whole = PartitionEstimate(value, error, ess, khat, min(estimate.num_samples for estimate in flat.values()))
    return whole, math.ceil(squares / total)


# ------------------------------------------------------------------------------------------------ what is identified


class Identified(NamedTuple):
    """What demonstrations determine of a model's parameters, and how well chains agree on that part."""

    share: dict[str, np.ndarray]
    """Of each element of each latent site: the share of its prior variance that no demonstrations can take away."""
    num_directions: int
    """Number of identified directions of parameter space (near the posterior mean, where rewards are not linear)."""
    num_parameters: int
    rhat: float
    """The largest R-hat of identified quantities: of those directions, or of the reward where it is not linear."""
    ess: float
    """Their smallest bulk effective sample size."""


def identified(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Mapping[str, Tensor]
) -> Identified | None:
    """Compare the parameters of a model with what its demonstrations can show of its rewards (pirl.identify).

    A direction of parameter space is not identified where the reward moves along directions that are not. What stays
    unknown of a parameter is its prior variance given all that is identified, which is little for the mean of many
    subjects, say, though with it their deviations could make any reward. (Exact for normal priors and rewards that are
    linear in the parameters; else an approximation near the posterior mean.) None where that cannot be told: no
    trajectories of a TabularMDP, too many pairs or parameters, or derivatives that fail.

    Args:
        draws: of the latent sites, ``[chain, draw, *shape]``.
    """
    names = list(draws)
    shapes = [draws[name].shape[2:] for name in names]
    flat = torch.cat([draws[name].reshape(*draws[name].shape[:2], -1) for name in names], -1)  # [chain, draw, P]
    spread = flat.flatten(0, 1).std(0)
    if not 0 < flat.shape[-1] <= _MOST_PARAMETERS or not bool((spread > 0).all()):
        return None
    known: dict[str, Identification] = {}

    def visible(vector: Tensor) -> Tensor:
        """The canonical reward, of all sites, at one vector of parameters."""
        parts = vector.split([shape.numel() for shape in shapes])
        laws = trajectory_laws(
            model, args, kwargs, {n: x.reshape(s) for n, x, s in zip(names, parts, shapes, strict=True)}
        )
        return torch.cat([known[name].identified(law.reward).flatten() for name, law in laws.items()])

    mean = flat.mean((0, 1))
    try:
        with torch.no_grad():
            start = mean.split([shape.numel() for shape in shapes])
            for name, law in trajectory_laws(
                model, args, kwargs, {n: x.reshape(s) for n, x, s in zip(names, start, shapes, strict=True)}
            ).items():
                if law.reward.numel() > _MOST_PAIRS:
                    return None
                starts = "drawn" if law.starts is None else "given"
                own = [law.mdp] if law.horizons is None else _with_horizons(law.mdp, law.horizons)
                known[name] = unidentified(own, reading=law.reading, stopping=law.stopping, starts=starts)
            if not known:
                return None
            slope, elsewhere = _jacobian(visible, mean), _jacobian(visible, flat[0, -1])
            prior = _prior_covariance(_prior_draws(model, args, kwargs, names, _PRIOR_DRAWS).to(flat))
    except (RuntimeError, NotImplementedError, PirlError):
        return None
    _, level, axes = torch.linalg.svd(slope * spread)
    rounding = max(1e-8, torch.finfo(level.dtype).eps ** (2 / 3))
    rank = int((level > rounding * level.amax().clamp(min=torch.finfo(level.dtype).tiny)).sum())
    share = _prior_share(prior, axes[:rank] / spread)
    parts = share.split([shape.numel() for shape in shapes])
    if torch.allclose(slope, elsewhere, rtol=rounding, atol=rounding * float(slope.abs().amax())):
        quantities = ((flat - mean) / spread) @ axes[:rank].mT
    else:
        with torch.no_grad():
            values = torch.func.vmap(visible, chunk_size=_BLOCK)(flat.flatten(0, 1))
        moving = values.std(0) > 1e-10 * values.abs().amax()
        picked = moving.nonzero().flatten()[:: max(1, int(moving.sum()) // _MOST_QUANTITIES)]
        quantities = values[:, picked].unflatten(0, flat.shape[:2])
    table = quantities.double().cpu().numpy()
    return Identified(
        {name: x.reshape(s).cpu().numpy() for name, x, s in zip(names, parts, shapes, strict=True)},
        rank,
        flat.shape[-1],
        float(rhat(table).max()) if table.shape[-1] else math.nan,
        float(ess_bulk(table).min()) if table.shape[-1] else math.nan,
    )


def _with_horizons(mdp: TabularMDP, horizons: Tensor) -> list[TabularMDP]:
    """The problem as each kind of demonstrator knew it."""
    return [mdp if horizon < 0 else mdp.replace(horizon=horizon) for horizon in horizons.unique().tolist()]


def _prior_draws(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], names: list[str], count: int
) -> Float[Tensor, "n P"]:
    """Flat draws of the latent sites from the prior."""

    def one() -> Tensor:
        with pyro.poutine.trace() as traced:
            model(*args, **kwargs)
        return torch.cat([traced.trace.nodes[name]["value"].reshape(-1) for name in names])

    return torch.stack([one() for _ in range(count)])


def _prior_covariance(draws: Float[Tensor, "n P"]) -> Float[Tensor, "P P"]:
    """Of draws; correlations that chance alone could make are none, as nearly all are."""
    covariance = torch.cov(draws.T).reshape(draws.shape[1], -1)
    spread = covariance.diagonal().sqrt()
    by_chance = covariance.abs() < 4 / len(draws) ** 0.5 * torch.outer(spread, spread)
    return torch.where(by_chance & ~torch.eye(len(spread), dtype=torch.bool, device=draws.device), 0.0, covariance)


def _prior_share(covariance: Float[Tensor, "P P"], seen: Float[Tensor, "r P"]) -> Float[Tensor, " P"]:
    """Var(theta_i | seen theta) / Var(theta_i) of a normal with that covariance."""
    variance = covariance.diagonal()
    cross = covariance @ seen.mT
    explained = (cross @ torch.linalg.pinv(seen @ cross, hermitian=True)) * cross
    return (1 - explained.sum(1) / variance).clamp(0, 1)


def _jacobian(function: Callable[[Tensor], Tensor], point: Float[Tensor, " P"]) -> Float[Tensor, "n P"]:
    """Of n functions of few variables, by P reverse passes: the product with the Jacobian is linear in its weights."""
    like = function(point)
    pull = lambda weight: torch.func.vjp(function, point)[1](weight)[0]  # noqa: E731
    return torch.func.jacrev(pull)(torch.zeros_like(like)).mT


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As in :func:`pirl.fit`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
