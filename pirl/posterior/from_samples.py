"""Draws of models whose log Z is estimated from samples: their rewards, and how well the pool knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import ModelError, OptionError, check_counts
from pirl.infer.engine import one_thread, own_generator
from pirl.infer.user_errors import own_errors
from pirl.partition import PartitionEstimate
from pirl.partition.gates import ESS_PER_DEMONSTRATION, untrusted
from pirl.pool import Pool, ratio_of_table
from pirl.posterior.draws import Given, default_dtype, drawn_of, law_of
from pirl.posterior.starts import ADVICE, UNLIKELY, Conflict, conflict
from pirl.sampled import SampledMaxEntTrajectory

if TYPE_CHECKING:
    import xarray

_QUALITY_DRAWS = 100
_CANDIDATES = 8
"""Draws among which the one is looked for that a pool knows least."""


def sampled_rewards(
    posterior: xarray.DataTree,
    model: Callable[..., Any],
    *args: Any,
    num_draws: int = 4,
    seed: int = 0,
    least_known: int = 0,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """Rewards of some posterior draws, as the model gives them to its :class:`pirl.SampledMaxEntTrajectory`.

    A table ``[S, A]``, or a function of states and actions, for each draw (of a model with several such sites, those
    of the first).

    Args:
        num_draws: how many rewards; fewer where the posterior has no more draws.
        least_known: so many of them are those of which the pool has the fewest effective samples, among eight times as
            many draws.
        dtype: of the model's arguments, where they are of another precision than the posterior's.

    Raises:
        ModelError: the model observes no :class:`pirl.SampledMaxEntTrajectory`.
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
    dataset = drawn_of(posterior)
    count = dataset.sizes["chain"] * dataset.sizes["draw"]
    index = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    plain = num_draws - least_known
    index = index[: plain + _CANDIDATES * least_known]
    dtype = getattr(torch, posterior.attrs.get("dtype", "float64")) if dtype is None else dtype
    found, ess = list[Any](), list[float]()
    with default_dtype(dtype), one_thread(), own_generator(), pyro.validation_enabled(False), torch.no_grad():
        values = {str(n): torch.as_tensor(x.values).flatten(0, 1).to(dtype) for n, x in dataset.data_vars.items()}
        for number in index.tolist():
            with Given({name: value[number] for name, value in values.items()}) as given:
                model(*args)
            if not given.sampled:
                raise ModelError("the model observes no SampledMaxEntTrajectory, whose rewards these would be")
            laws = list(given.sampled.values())
            found.append(laws[0].reward)
            if len(found) > plain:  # a candidate for the least known
                ess.append(min(float(law.pool.log_ess(law.log_weights).min()) for law in laws))
    edge = sorted(range(len(ess)), key=lambda number: ess[number])[:least_known]
    return [*found[:plain], *(found[plain + number] for number in edge)]


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
    check_counts(1, num_draws=num_draws)
    found = []
    with default_dtype(dtype), one_thread(), own_generator(), pyro.validation_enabled(False), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(num_draws):
            with own_errors():
                trace = pyro.poutine.trace(model).get_trace(*args)
            latent = {name: site["value"] for name, site in trace.nodes.items()
                      if site["type"] == "sample" and not site["is_observed"]}  # fmt: skip
            for name in latent:
                if isinstance(law_of(trace.nodes[name]["fn"]), SampledMaxEntTrajectory):
                    raise ModelError(f"site {name!r} observes nothing: give it obs=demos.as_tensor()")
            with Given(latent) as given:
                model(*args)
            if not given.sampled:
                raise ModelError("the model observes no SampledMaxEntTrajectory, which needs no guided cost learning")
            found.append(next(iter(given.sampled.values())).reward)
    return found


def partition_quality(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: Mapping[str, Tensor],
    compare_starts: bool = True,
) -> PartitionQuality | None:
    """How well log Z is known at posterior draws; None for exact models.

    A model that observes several sampled sites is judged by each of them: their estimates follow each other.

    Args:
        draws: of the latent sites, ``[draw, *shape]``; a hundred of them are looked at.
        compare_starts: whether to look, where log Z is known well enough, if demonstrations' starts fit what follows.
    """
    count = len(next(iter(draws.values()))) if draws else 0
    index = torch.linspace(0, count - 1, min(count, _QUALITY_DRAWS)).round().long().tolist()
    first, seen = dict[str, SampledMaxEntTrajectory](), dict[str, Tensor]()
    whole, gained, odds = (dict[str, list[Tensor]]() for _ in range(3))
    for number in index:
        with torch.no_grad(), Given({name: value[number] for name, value in draws.items()}) as given:
            model(*args, **kwargs)
        first, seen = (first, seen) if first else (given.sampled, given.seen)
        for name, law in given.sampled.items():
            whole.setdefault(name, []).append(law.log_weights)
            log_prob = law.log_prob(seen[name])
            odds.setdefault(name, []).append((log_prob + _ratio(law, seen[name])).reshape(-1))
            gained.setdefault(name, []).append(log_prob + law.log_partition)
    if not first:
        return None
    sites: list[_Site] = []
    for name, law in first.items():
        found = law.pool.judge(torch.stack(whole[name]).reshape(len(index), -1, len(law.pool)))  # [draw, batch]
        fields = (found.log_partition, found.standard_error, found.ess, found.pareto_k)
        value, error, ess, khat = (field.flatten(1) for field in fields)
        of_demos = law.pool.ess_of(torch.stack(odds[name])).unsqueeze(1)
        estimate = PartitionEstimate(value, error, torch.minimum(ess, of_demos), khat, found.num_samples)
        sites.append(_Site(name, law.pool, num_observed(law, seen[name]), estimate))
    quality = _together(sites)
    if not compare_starts or untrusted(quality.estimate, quality.num_demos) is not None:
        return quality
    conflicts = dict[str, Conflict]()
    for name, law in first.items():
        starts = seen[name][..., 0, 0] if law.pool.tabular else seen[name][..., 0, : law.pool.states.shape[-1]]
        returns = torch.stack(whole.pop(name)) - law.pool.log_offset
        conflicts[name] = conflict(law.pool, starts, returns, torch.stack(gained[name]))
    worst = min(conflicts, key=lambda name: (conflicts[name].chance, -conflicts[name].errors))
    if len(conflicts) * conflicts[worst].chance >= UNLIKELY:
        return quality
    where = "" if len(conflicts) == 1 else f"at site {worst!r} "
    errors = conflicts[worst].errors
    return quality._replace(
        starts=f"{where}demonstrations' starts and what follows them differ about the reward by {errors:.1f} standard "
        f"errors: {ADVICE}"
    )


def log_odds(law: SampledMaxEntTrajectory, table: Tensor) -> Float[Tensor, "..."]:
    """log p(tau | O) - log q(tau) of what a site observes: see :meth:`pirl.Pool.ess_of`."""
    return law.log_prob(table) + _ratio(law, table)


def _ratio(law: SampledMaxEntTrajectory, table: Tensor) -> Float[Tensor, "..."]:
    return ratio_of_table(law.pool, table, law.lengths)


def num_observed(law: SampledMaxEntTrajectory, table: Tensor) -> int:
    """How many trajectories a site observes, be they in a plate or not."""
    return max(torch.broadcast_shapes(law.batch_shape, table.shape[:-2]).numel(), 1)


class PartitionQuality(NamedTuple):
    """How well log Z is known at posterior draws, by all sites of a model."""

    estimate: PartitionEstimate
    """``[draw]``, of the worst pool."""
    num_demos: int
    """How many demonstrations share one error."""
    total_error: Float[Tensor, " draw"]
    """Standard error of log Z summed over all demonstrations, which is that of their log likelihood."""
    weakest: str | None
    """Of several pools, the site whose pool is furthest from what it should know; None where there is one pool."""
    starts: str | None = None
    """That demonstrations' starts do not say of the reward what follows does, where they do not."""

    @property
    def ess(self) -> float:
        """Effective samples at the worst twentieth of the draws."""
        return float(self.estimate.ess.quantile(0.05))

    @property
    def pareto_k(self) -> float:
        """Pareto k-hat at the worst twentieth of the draws; 1 where it is not known."""
        return float(self.estimate.pareto_k.nan_to_num(nan=1.0, neginf=-10.0).quantile(0.95))


class _Site(NamedTuple):
    """How well log Z of one sampled site is known at posterior draws."""

    name: str
    pool: Pool
    explained: int
    """Demonstrations."""
    estimate: PartitionEstimate
    """``[draw, batch]``."""


def _together(sites: list[_Site]) -> PartitionQuality:
    """One estimate for all sites.

    Errors of one pool move all that it explains together; those of several pools average out in parameters that all
    share, and do not in those of one pool's own: each has to be good enough for what it explains. Of a draw, the worst
    pool's tail counts.
    """
    of_pool: dict[int, int] = {}
    moved: dict[int, Tensor] = {}  # the sum of log Z over what a pool explains: by one error for all of it, at most
    for _, pool, explained, estimate in sites:
        of_pool[id(pool)] = of_pool.get(id(pool), 0) + explained
        error = explained * estimate.standard_error.amax(1).cpu()
        moved[id(pool)] = moved[id(pool)] + error if id(pool) in moved else error
    total, squares = sum(of_pool.values()), sum(n * n for n in of_pool.values())
    estimates = [site.estimate for site in sites]
    # On the CPU, wherever the model's tensors are made.
    inverse = torch.zeros(len(estimates[0].ess), dtype=torch.float64, device="cpu")
    for _, pool, explained, estimate in sites:
        inverse += explained * of_pool[id(pool)] * (1 / estimate.ess.double()).amax(1).cpu()
    khat = torch.cat([estimate.pareto_k.nan_to_num(nan=1.0, neginf=-10.0) for estimate in estimates], 1).amax(1)
    error = torch.cat([estimate.standard_error for estimate in estimates], 1).amax(1)
    value = torch.cat([estimate.log_partition for estimate in estimates], 1).mean(1)
    ess, count = squares / inverse, math.ceil(squares / total)
    known: dict[str, float] = {}
    for name, pool, _, estimate in sites:  # in units of what is asked for altogether
        share = estimate.ess.double().amin(1).cpu() * count / of_pool[id(pool)]
        ess, known[name] = torch.minimum(ess, share), float(share.nan_to_num(nan=0.0).quantile(0.05))
    ess = ess.to(value)
    weakest = None
    if len(of_pool) > 1:
        weakest = min(known, key=lambda name: known[name])
        if known[weakest] >= ESS_PER_DEMONSTRATION * count:  # then only tails can be wrong
            tails = {x.name: float(x.estimate.pareto_k.nan_to_num(nan=1.0).amax(1).quantile(0.95)) for x in sites}
            weakest = max(tails, key=lambda name: tails[name])
    whole = PartitionEstimate(value, error, ess, khat, min(estimate.num_samples for estimate in estimates))
    return PartitionQuality(whole, count, torch.stack(list(moved.values())).square().sum(0).sqrt(), weakest)
