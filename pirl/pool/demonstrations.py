"""Whether trajectories are ones that a pool's log Z is of: checked before they are observed or learned from."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import ConvergenceWarning, HorizonError, InvalidTrajectoriesError, PartitionError, warn
from pirl.pool.samples import Pool
from pirl.pool.tables import widened
from pirl.simulators import WholeLaw, log_density


def check_explained(pool: Pool, demos: Any) -> None:
    """Refuse demonstrations that the pool's log Z is not of, before anything is learned from them.

    Args:
        demos: :class:`pirl.Trajectories` or :class:`pirl.ContinuousTrajectories`.

    Raises:
        InvalidTrajectoriesError: other kinds or sizes of states and actions, another dtype, or nothing observed.
        HorizonError, PartitionError: see :func:`check_table`; and vectors of other lengths than the samples.
    """
    kinds = {True: "numbers", False: "vectors"}
    theirs, own = demos.states, pool.states
    action_size = 1 if pool.actions.dim() == 2 else pool.actions.shape[-1]
    if theirs.is_floating_point() == pool.tabular:
        raise InvalidTrajectoriesError(
            f"states of the demonstrations are {kinds[not pool.tabular]}, and the simulator's are "
            f"{kinds[pool.tabular]}: give demonstrations of the simulator's world, Trajectories of numbers or "
            "ContinuousTrajectories of vectors"
        )
    if not pool.tabular and (theirs.shape[-1], demos.actions.shape[-1]) != (own.shape[-1], action_size):
        raise InvalidTrajectoriesError(
            f"the demonstrations have states of size {theirs.shape[-1]} and actions of size "
            f"{demos.actions.shape[-1]}, and the simulator {own.shape[-1]} and {action_size}: give those of "
            "one world"
        )
    if not pool.tabular:  # of numbers, the table tells lengths
        check_lengths(pool, demos.lengths)
    check_table(pool, demos.as_tensor(), demos.lengths)


def check_table(pool: Pool, table: Tensor, lengths: Tensor | None = None) -> None:
    """Refuse a tensor of trajectories that log Z is not of; the same one is looked at once.

    Args:
        table: ``[*batch, T + 1, 2]`` or ``[*batch, T + 1, ds + da]``.
        lengths: of trajectories of vectors; by default all of the table. Numbered ones tell it themselves.

    Raises:
        InvalidTrajectoriesError: another shape than the samples', or a state or action that there is not.
        HorizonError: another length than the samples', or trajectories that were cut before their end.
        PartitionError: trajectories that the base measure, or every policy of the pool, gives no probability, or that
            start where no sample does: of these the samples say nothing, however good the estimate of log Z looks.
    """
    pool._remember(("checked", id(lengths)), table, lambda: _check_table(pool, table, lengths), lengths)


def check_lengths(pool: Pool, lengths: Tensor) -> None:
    """Refuse demonstrations of other lengths than the samples.

    Raises:
        HorizonError: names the first such demonstration.
    """
    ends = pool._remember(("ends",), None, lambda: bool((pool.lengths < pool.horizon).any()))
    wrong = (lengths > pool.horizon) | ((lengths < pool.horizon) & (not ends))
    if bool(wrong.any()):
        episode = int(wrong.flatten().nonzero()[0])
        raise HorizonError(
            f"trajectory {episode} has {int(lengths.flatten()[episode])} decisions, and the pool's have "
            f"{pool.horizon}: log Z is of one length; cut the demonstrations, or roll out as long"
        )


def _check_table(pool: Pool, table: Tensor, lengths: Tensor | None) -> None:
    expected = tuple(pool.table.shape[-2:])
    if table.dim() < 2 or table.shape[-1] != expected[1]:
        raise InvalidTrajectoriesError(
            f"trajectories {tuple(table.shape)} do not fit the pool: they must be [*batch, {expected[0]}, "
            f"{expected[1]}]"
        )
    if table.dtype != pool.table.dtype:
        raise InvalidTrajectoriesError(
            f"trajectories are {table.dtype}, and the pool's {pool.table.dtype}: give those of one kind and "
            "precision (demos.to(dtype=...), or another dtype of the simulator)"
        )
    steps = table.shape[-2] - 1
    if pool.tabular:
        lengths = (table[..., 1] >= 0).sum(-1)
        _check_range(pool, table)
        check_lengths(pool, lengths)
        _check_ends(pool, table[..., 0], lengths)
    elif lengths is not None:
        if int(lengths.max()) > steps:
            raise HorizonError(f"lengths go up to {int(lengths.max())}, and the trajectories have {steps} steps")
    elif steps != pool.horizon:
        raise HorizonError(
            f"the trajectories have {steps} decisions, and the pool's {pool.horizon}: give lengths= where they "
            "ended by themselves, or roll out as long"
        )

    if lengths is not None and lengths.dim() and lengths.shape[-1] not in (1, *table.shape[-3:-2]):
        raise InvalidTrajectoriesError(
            f"lengths {tuple(lengths.shape)} do not fit trajectories {tuple(table.shape)}: give one of each"
        )
    states, actions, lengths = _decoded(pool, table, lengths)
    check_support(pool, states, actions, lengths)
    check_starts(pool, states[:, 0], None if pool.tabular else _distinct(table))


def ratio_of_table(pool: Pool, table: Tensor, lengths: Tensor | None = None) -> Float[Tensor, "..."]:
    """log p - log q of trajectories as a Pyro model observes them, under the mixture of all policies; computed once."""

    def compute() -> Tensor:
        return pool.ratio_of(*_decoded(pool, table, lengths)).reshape(table.shape[:-2])

    return pool._remember(("ratio", id(lengths)), table, compute, lengths)


def _decoded(pool: Pool, table: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """States, actions and lengths ``[N, ...]`` of a table ``[*batch, T + 1, D]``."""
    size, flat = pool.states.shape[-1], table.reshape(-1, *table.shape[-2:])
    if pool.tabular:
        return flat[..., 0], flat[:, :-1, 1], (flat[..., 1] >= 0).sum(-1)
    if lengths is None:
        lengths = torch.full((), table.shape[-2] - 1, device=table.device)
    return flat[..., :size], flat[:, :-1, size:], lengths.expand(table.shape[:-2]).reshape(-1)


def _distinct(table: Tensor) -> Tensor:
    """Numbers of the first of each trajectory of vectors ``[*batch, T + 1, D]``, as of a bootstrap's."""
    flat = table.detach().cpu().reshape(-1, table.shape[-2] * table.shape[-1])
    _, place = flat.unique(dim=0, return_inverse=True)
    number = torch.arange(len(flat), device="cpu")
    return (
        torch.full_like(number, len(flat))
        .scatter_reduce(0, place, number, "amin")[: int(place.max()) + 1]
        .sort()
        .values
    )


_FEW_STARTS = 10
"""Starts of samples, up to which a simulator is one of given starts."""
_IMPOSSIBLE, _UNLIKELY = 1e-3, 0.05
"""Chances below which starts that no sample has are refused, or warned of."""


def check_starts(pool: Pool, starts: Tensor, distinct: Tensor | None = None) -> None:
    """Refuse demonstrations that start where no sample starts, unless that may be by chance.

    If both came from one law, which of all N + M starts are the demonstrations' would be by chance: all c trajectories
    that start in a state are demonstrations with probability (M)_c / (N + M)_c. The smallest of these is one statistic,
    and the sum of all that are as small bounds its p-value. Where samples have but a few starts the other is how many
    of those that occur once are demonstrations': each of many wrong places may be by chance, and not all of them.
    Particles share their starts, and are left out.

    Args:
        distinct: which demonstrations count: a trajectory of vectors that is there twice was seen once.

    Raises:
        PartitionError: names the start.
    """
    from scipy.stats import hypergeom

    alone = torch.tensor([not isinstance(law, WholeLaw) for law in pool.policies], device="cpu")[pool.origin.cpu()]
    ours, starts = pool.states[:, 0].cpu()[alone], starts.cpu()
    kept = torch.arange(len(starts), device="cpu") if distinct is None else distinct.cpu()
    starts, samples = starts[kept], len(ours)
    rows = torch.cat([ours, starts]).reshape(samples + len(starts), -1)
    _, place = rows.unique(dim=0, return_inverse=True)
    number, size = len(starts), len(rows)
    counts = place.bincount()
    count = counts.double()
    log_chance = (
        math.lgamma(number + 1) - torch.lgamma((number - count + 1).clamp_min(1))
        - math.lgamma(size + 1) + torch.lgamma(size - count + 1)
    )  # fmt: skip
    chance = torch.where(counts <= number, log_chance, -torch.inf).exp()
    unseen = place[:samples].bincount(minlength=len(counts)) == 0
    if not samples or not bool(unseen.any()):
        return
    least = chance[unseen].amin()
    once = counts == 1
    of_demos, of_singles = int((unseen & once).sum()), 1.0
    if of_demos and int((~unseen).sum()) <= _FEW_STARTS:
        of_singles = float(hypergeom.sf(of_demos - 1, size, int(once.sum()), number))
    total = 2 * min(float(chance[chance <= least].sum()), of_singles)
    if total >= _UNLIKELY:
        return
    elsewhere = unseen[place[samples:]]
    first = int(elsewhere.nonzero()[0])
    episode, start = int(kept[first]), starts[first].tolist()
    where = "" if int((~unseen).sum()) > 1 else f" (all start in {ours[0].tolist()})"
    told = (
        f"{int(elsewhere.sum())} of {number} demonstrations start where none of {samples} samples does{where}, the "
        f"first of them, {episode}, in {start}: log Z is of the simulator's starts; give simulators of the "
        "demonstrations' starts, one for each group, or more roll-outs"
    )
    if total < _IMPOSSIBLE:
        raise PartitionError(told)
    warn(told, ConvergenceWarning)


def check_transitions(pool: Pool, states: Tensor, actions: Tensor) -> None:
    """Warn of demonstrated transitions of numbered states that no sample shows, though many take the same decision.

    That all c of n + m decisions (s, a) which led to s' are among the m demonstrated ones has probability
    (m)_c / (n + m)_c if both are of one law; times the number of transitions looked at, it bounds the chance of any.
    Under the trajectory reading demonstrators are luckier than the dynamics, which is why this is no error.

    Args:
        states: ``[N, T + 1]``.
        actions: ``[N, T]``, -1 after the end.
    """

    def moves(states: Tensor, actions: Tensor) -> Tensor:
        steps = actions.shape[1]
        rows = torch.stack([states[:, :steps], actions, states[:, 1 : steps + 1]], -1)
        return rows[(actions >= 0) & (rows[..., 2] >= 0)]

    ours, theirs = moves(pool.states, pool.actions).cpu(), moves(states, actions).cpu()
    if not len(theirs):
        return
    (move, place), (_, pair) = (
        torch.cat([theirs, ours])[:, :size].unique(dim=0, return_inverse=True) for size in (3, 2)
    )
    seen, shown = place[len(theirs) :].bincount(minlength=len(move)), place[: len(theirs)].bincount(minlength=len(move))
    pairs = int(pair.max()) + 1
    pair_of = torch.zeros(len(move), dtype=torch.long, device="cpu").scatter(0, place, pair)
    n = pair[len(theirs) :].bincount(minlength=pairs)[pair_of].double()
    m = pair[: len(theirs)].bincount(minlength=pairs)[pair_of].double()
    log_chance = (
        torch.lgamma(m + 1) - torch.lgamma(m - shown + 1) - torch.lgamma(n + m + 1) + torch.lgamma(n + m - shown + 1)
    )
    log_chance = torch.where((seen == 0) & (shown > 0), log_chance, 0.0)
    least = int(log_chance.argmin())
    if float(log_chance[least]) + math.log(max(int((shown > 0).sum()), 1)) >= math.log(_IMPOSSIBLE):
        return
    state, action, following = move[least].tolist()
    warn(
        f"{int(shown[least])} of {int(m[least])} demonstrated decisions (state {state}, action {action}) lead to "
        f"state {following}, and none of {int(n[least])} samples: the simulator may be of another world than the "
        "demonstrators'",
        ConvergenceWarning,
    )


def _check_range(pool: Pool, table: Tensor) -> None:
    """Name a state or an action beyond those of the problem, where a table of the base or of a policy tells."""
    for what, column, size in zip(("state", "action"), table.unbind(-1), pool._sizes or (), strict=False):
        if bool((column >= size).any()):
            where = (column >= size).nonzero()[0].tolist()
            raise InvalidTrajectoriesError(
                f"trajectory {where[-2]}, step {where[-1]}: {what} {int(column[tuple(where)])} is out of range, of "
                f"{size} {what}s"
            )


def _check_ends(pool: Pool, states: Tensor, lengths: Tensor) -> None:
    """Refuse demonstrations of numbered states that nobody watched to their end.

    An episode shorter than the horizon must have ended: log Z is of whole episodes, and what a truncated one would
    have gone on to (beta of its last state) is not known from samples. It has ended if its last state is
    terminal; where no simulator told which are, if samples of the pool ended there.

    Raises:
        HorizonError: names the first such demonstration.
    """
    last = torch.cat([states, torch.full_like(states[..., :1], -1)], -1)
    last = last.gather(-1, lengths.unsqueeze(-1)).squeeze(-1)
    if pool.terminal is None:
        over, told = _ended_in(pool), "where no sample of the pool ended"
    else:
        over, told = pool.terminal.nonzero().flatten(), "which is not terminal"
    wrong = (lengths < pool.horizon) & ~torch.isin(last, over)
    if bool(wrong.any()):
        episode = int(wrong.flatten().nonzero()[0])
        state = int(last.flatten()[episode])
        where = "without its last state" if state < 0 else f"in state {state}, {told}"
        raise HorizonError(
            f"trajectory {episode} was cut after {int(lengths.flatten()[episode])} of {pool.horizon} decisions, "
            f"{where}: log Z is of whole episodes; give whole ones, or cut them all to one length and roll out "
            "as long"
        )


def check_support(pool: Pool, states: Tensor, actions: Tensor, lengths: Tensor) -> None:
    """Refuse demonstrations that no policy of the pool could have made, or that the base measure rules out.

    Raises:
        PartitionError: names the first such demonstration.
    """
    states, actions = widened(states, actions, pool.horizon)
    if pool.base is not None:
        ruled_out = log_density(pool.base, states, actions, lengths) == -torch.inf
        if bool(ruled_out.any()):
            raise PartitionError(
                f"demonstration {int(ruled_out.nonzero()[0])} has probability 0 under the base measure: it takes "
                "an action that is not available there"
            )
    under = torch.stack([log_density(policy, states, actions, lengths) for policy in pool.policies])
    missed = (under == -torch.inf).all(0)
    if bool(missed.any()):
        raise PartitionError(
            f"demonstration {int(missed.nonzero()[0])} has probability 0 under every policy of the pool: "
            "add roll-outs of a policy with full support, such as the base policy"
        )


def _ended_in(pool: Pool) -> Tensor:
    """States that samples shorter than the horizon ended in."""

    def compute() -> Tensor:
        short = pool.lengths < pool.horizon
        return pool.states[short, pool.lengths[short]].unique()

    return pool._remember(("ended in",), None, compute)
