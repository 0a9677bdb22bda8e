"""`Pool`: roll-outs of several policies, and how much each counts for the partition function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import (
    InvalidTrajectoriesError,
    OptionError,
    PartitionError,
    check_counts,
    form,
)
from pirl.partition import Constants, PartitionEstimate, importance, log_mean_exp, mixture_log_density, reconcile
from pirl.pool.tables import Features, checked_features, encode, visits, widened
from pirl.simulators import Policy, Rollouts, WholeLaw, log_density
from pirl.simulators.protocols import check_policy, require_undiscounted

_ROUNDING = 1e-3
"""Share of a log density by which a policy may differ from itself: networks are in single precision."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples of one or more policies, weighed against the base measure by the balance heuristic.

    Particles share ancestors; those of a proposal count for as many samples as they are worth, in the mixture as in
    the mean. Taken for as many as they are, they would take the weight from roll-outs that know more. Their log Z-hat,
    which their density needs, is held by the roll-outs, whose density is known (:attr:`constants`).

    Make one by :meth:`of`, and a larger one by :meth:`add`; nothing is changed in place, so that a policy or simulator
    that fails leaves the pool as it was. Only action probabilities are needed: the dynamics of proposal and model are
    the same, and cancel.

    Attributes:
        states: ``[J, T + 1]`` whole numbers (-1 after the end), or ``[J, T + 1, ds]``.
        actions: ``[J, T]``, or ``[J, T, da]``.
        lengths: number of decisions ``[J]``.
        base: the base measure over actions p(a|s); None: the counting or Lebesgue measure.
        log_base: sum_t log p(a_t|s_t), ``[J]``.
        policies: the proposals, of which sample j came from ``origin[j]``.
        log_densities: sum_t log pi_k(a_t|s_t) of every sample under every proposal, ``[K, J]``.
        terminal: which numbered states end an episode ``[S]``, where the simulator told it; None: not known.

    Example:
        >>> from pirl.simulators import TabularSimulator, base_policy, roll_out
        >>> simulator, base = TabularSimulator(world), base_policy(world)
        >>> pool = pirl.Pool.of(roll_out(simulator, base, 100), base, base)
        >>> learned = pirl.soft_q_learning.soft_q_learning(simulator, wanted, num_rollouts=20)
        >>> pool.add(roll_out(simulator, learned, 50), learned)
        Pool(150 samples of 2 policies)
    """

    states: Tensor
    actions: Tensor
    lengths: Int[Tensor, " J"]
    base: Policy | None
    log_base: Float[Tensor, " J"]
    policies: tuple[Policy | WholeLaw, ...]
    origin: Int[Tensor, " J"]
    log_densities: Float[Tensor, "K J"]
    terminal: Bool[Tensor, " S"] | None = None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, rollouts: Rollouts, policy: Policy | WholeLaw, base: Policy | None = None) -> Pool:
        """A pool of one policy's roll-outs.

        Args:
            base: the base measure over actions; for a finite problem ``pirl.simulators.base_policy(mdp)``, which is
                that of :class:`pirl.MaxEntTrajectory` as well. None: the counting (or Lebesgue) measure, under which
                every decision multiplies Z by the number of actions.

        Raises:
            OptionError: the roll-outs are none.
            DiscountError: they are of a simulator with a discount, of which log Z knows nothing.
            PartitionError: a roll-out has density 0, NaN or infinity under its own policy, or another density than when
                it was played.
        """
        _check_player(rollouts, policy)
        if base is not None:
            check_policy(base, "base")
        log_base = torch.zeros_like(rollouts.log_density) if base is None else _density(base, rollouts)
        pool = cls(
            rollouts.states, rollouts.actions, rollouts.lengths, base, log_base,
            (policy,), torch.zeros_like(rollouts.lengths), _density(policy, rollouts).unsqueeze(0), rollouts.terminal,
        )  # fmt: skip
        _ = pool.log_offset
        return pool

    def add(self, rollouts: Rollouts, policy: Policy | WholeLaw) -> Pool:
        """A pool with more samples; every sample's density under every policy is computed once.

        Draws of p(tau | O) for another reward are added by ``pool.add(*pirl.particles.tilt(...))``; what several of
        them say of each other's normalising constants is brought together by :func:`pirl.partition.reconcile`.

        Demonstrations of the pool's horizon may be added as well, with a policy cloned from them as the estimate of
        their density (fusion, Finn et al. 2016): ``pool.add(Rollouts(demos.states, demos.actions,
        log_density(cloned, demos.states, demos.actions), demos.lengths), cloned)``.

        Raises:
            InvalidTrajectoriesError: other kinds of states or actions, or another horizon.
            DiscountError: the roll-outs are of a simulator with a discount.
            PartitionError: a density is NaN or infinite, or another one than when the roll-out was played.
        """
        _check_rollouts(rollouts)
        if rollouts.states.shape[1:] != self.states.shape[1:] or rollouts.actions.shape[1:] != self.actions.shape[1:]:
            raise InvalidTrajectoriesError(
                f"roll-outs with states {tuple(rollouts.states.shape[1:])} and actions "
                f"{tuple(rollouts.actions.shape[1:])} do not fit a pool with {tuple(self.states.shape[1:])} and "
                f"{tuple(self.actions.shape[1:])}"
            )
        _check_player(rollouts, policy)
        log_base = torch.zeros_like(rollouts.log_density) if self.base is None else _density(self.base, rollouts)
        under_old = torch.stack([self._under(old, rollouts, log_base) for old in self.policies])
        old = Rollouts(self.states, self.actions, self.log_base, self.lengths)
        under_new = torch.cat([self._under(policy, old, self.log_base), self._under(policy, rollouts, log_base)])
        pool = Pool(
            torch.cat([self.states, rollouts.states]),
            torch.cat([self.actions, rollouts.actions]),
            torch.cat([self.lengths, rollouts.lengths]),
            self.base,
            torch.cat([self.log_base, log_base]),
            (*self.policies, policy),
            torch.cat([self.origin, torch.full_like(rollouts.lengths, len(self.policies))]),
            torch.cat([torch.cat([self.log_densities, under_old], 1), under_new.unsqueeze(0)]),
            rollouts.terminal if self.terminal is None else self.terminal,
        )
        _ = pool.log_offset
        return pool

    def _of_each(self, name: str, default: float) -> Float[Tensor, " K"]:
        """What laws that are no policies say of themselves."""
        return self.log_base.new_tensor([getattr(policy, name, default) for policy in self.policies])

    def _under(self, law: Policy | WholeLaw, rollouts: Rollouts, log_base: Tensor) -> Tensor:
        """Log density of roll-outs under a law; that of the base measure is computed once for all."""
        if isinstance(law, WholeLaw) and getattr(law, "base", None) is self.base and self.base is not None:
            return law.log_density(rollouts.states, rollouts.actions, rollouts.lengths, log_base)  # type: ignore[call-arg]
        return _density(law, rollouts)

    def newest(self, num_policies: int) -> Pool:
        """The samples of the last policies only, weighed among themselves: old ones that no longer help may go."""
        check_counts(1, num_policies=num_policies)
        first = max(len(self.policies) - num_policies, 0)
        keep = self.origin >= first
        return Pool(
            self.states[keep], self.actions[keep], self.lengths[keep], self.base, self.log_base[keep],
            self.policies[first:], self.origin[keep] - first, self.log_densities[first:, keep], self.terminal,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        measure = "" if self.base is not None else ", counting measure" if self.tabular else ", Lebesgue measure"
        return f"Pool({len(self)} samples of {len(self.policies)} policies{measure})"

    @property
    def num_states(self) -> int | None:
        """S, where it is known."""
        return None if self._sizes is None else self._sizes[0]

    @property
    def num_actions(self) -> int | None:
        """A, where it is known."""
        return None if self._sizes is None else self._sizes[1]

    @property
    def _sizes(self) -> tuple[int, int] | None:
        """S and A, where a table of the base measure or of a policy tells them."""
        for law in (self.base, *self.policies):
            for name in ("log_prior", "log_policy"):
                table = getattr(law, name, None)
                if self.tabular and isinstance(table, Tensor):
                    return int(table.shape[-2]), int(table.shape[-1])
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the densities."""
        return self.log_base.dtype

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self.log_base.device

    @property
    def tabular(self) -> bool:
        """Whether states are numbers."""
        return not self.states.is_floating_point()

    @property
    def horizon(self) -> int:
        """T."""
        return self.actions.shape[1]

    @property
    def log_ratio(self) -> Float[Tensor, " J"]:
        """log p - log q of the actions, q the mixture of all proposals, as :meth:`ratio_of` has it of others.

        For weights take :attr:`log_offset`, which tells what particles count for.
        """
        if "log_ratio" not in self._memo:
            if bool((self.log_base == torch.inf).any() | self.log_base.isnan().any()):
                raise PartitionError("the base measure's log density is NaN or +inf at a sample")
            densities = self.log_densities - self.constants.unsqueeze(1)
            self._memo["log_ratio"] = self.log_base - mixture_log_density(densities, self._counts)
        return self._memo["log_ratio"]

    @property
    def log_worth(self) -> Float[Tensor, " J"]:
        """log of the independent draws that each sample counts for: 0, or less where particles share ancestors."""
        return self._remember(("log worth",), None, lambda: self._worth.log()[self.origin])

    @property
    def log_offset(self) -> Float[Tensor, " J"]:
        """What a return is added to for a log weight: log of p / q times what the sample counts for beside the others.

        The mean of weights is Z-hat; their tail, of which k-hat is, is that of the mean.
        """
        return self._remember(("offset",), None, lambda: self.log_ratio + self.log_worth - math.log(self.efficiency))

    @property
    def _worth(self) -> Float[Tensor, " K"]:
        """Independent draws that a sample of each proposal counts for; of particles an estimate from them."""
        return self._of_each("efficiency", 1.0)

    @property
    def _counts(self) -> Float[Tensor, " K"]:
        """Independent draws that the samples of each proposal count for."""
        return self._worth * torch.bincount(self.origin, minlength=len(self.policies))

    @property
    def constants(self) -> Float[Tensor, " K"]:
        """What is added to each proposal's log normalising constant so that all samples agree; 0 for policies."""
        return self._reconciled.shift

    @property
    def _reconciled(self) -> Constants:
        def compute() -> Constants:
            known = torch.tensor([not isinstance(law, WholeLaw) for law in self.policies], device=self.device)
            return reconcile(self.log_densities, self.origin, self._of_each("standard_error", 0.0), self._worth, known)

        return self._remember(("constants",), None, compute)

    @property
    def efficiency(self) -> float:
        """Independent draws that a sample counts for on average."""
        return self._remember(("efficiency",), None, lambda: float(self._counts.sum()) / len(self))

    def log_ess(self, log_weights: Float[Tensor, "*batch J"]) -> Float[Tensor, "*batch"]:
        """log of the effective number of independent draws, as the weights of samples tell it; it has a slope."""
        return -(2 * log_weights.log_softmax(-1) - self.log_worth).logsumexp(-1)

    def judge(self, log_weights: Float[Tensor, "*batch J"]) -> PartitionEstimate:
        """log Z-hat and its diagnostics.

        Particles that share ancestors count for less than one sample. Errors e of the proposals' constants move the
        weight from one proposal to another: the mean of a function whose means under the proposals' shares s of the
        weight are f_k moves by sum_k s_k e_k (f_k - f). Of all functions of variance 1 the one that is moved most has
        for its variance the largest eigenvalue of sqrt(s) cov(e) sqrt(s), apart from what is common to all; that is
        added to 1 / ess, which is that variance by the samples.
        """
        found, fixed = importance(log_weights), log_weights.detach()
        share, ess = fixed.softmax(-1), self.log_ess(fixed).exp()
        worth, draws = self._worth, float(self._counts.sum())
        # Where all samples have the same p exp(r) / q, each has the share that it counts for, and Z-hat has no error.
        each = worth[self.origin]
        error = ((share - each / draws).square() / each).sum(-1)
        error = error * (draws / (draws - 1) if draws > 1 else math.nan)
        covariance = self._reconciled.covariance.to(share)
        if bool(covariance.any()):
            carried = torch.zeros(*share.shape[:-1], len(worth), dtype=share.dtype, device=share.device)
            carried = carried.index_add(-1, self.origin, share)
            root = carried.sqrt()
            apart = torch.eye(len(worth), dtype=share.dtype, device=share.device)
            apart = apart - root.unsqueeze(-1) * root.unsqueeze(-2)
            moved = apart @ (root.unsqueeze(-1) * covariance * root.unsqueeze(-2)) @ apart
            ess = 1 / (1 / ess + torch.linalg.eigvalsh(moved)[..., -1].clamp(min=0))
            error = error + torch.einsum("...k,kl,...l->...", carried, covariance, carried)
        return found._replace(ess=ess, standard_error=error.sqrt())

    def ess_of(self, log_odds: Float[Tensor, "*batch M"]) -> Float[Tensor, "*batch"]:
        """Effective samples as the demonstrations see them: few where they are and the pool is not.

        The weights of samples tell nothing of what no sample does. Those of demonstrations do: with
        w = p(tau) exp(r) / q the mean of w over p(tau | O) is Z (1 + CV^2), where CV is that of w over q, so that
        N Z-hat over the mean w of demonstrations is another estimate of N / (1 + CV^2).

        Args:
            log_odds: log p(tau | O) - log q(tau) of each demonstration: its log density under the model, and
                :meth:`ratio_of`.
        """
        return self.log_ess_of(log_odds).exp()

    def log_ess_of(self, log_odds: Float[Tensor, "*batch M"]) -> Float[Tensor, "*batch"]:
        """Its logarithm, which is finite, and has a slope, however far the demonstrations are from the samples."""
        return math.log(len(self) * self.efficiency) - log_mean_exp(log_odds)

    @property
    def table(self) -> Tensor:
        """The samples as a Pyro model observes trajectories: ``[J, T + 1, 2]``, or ``[J, T + 1, ds + da]``."""
        return self._remember(("table",), None, lambda: encode(self.states, self.actions))

    def constant_data(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """How many samples each policy gave, and how many independent draws those count for."""
        counts = torch.bincount(self.origin, minlength=len(self.policies))
        return {
            "pool_samples": (("policy",), counts.cpu().numpy()),
            "pool_draws": (("policy",), self._counts.cpu().numpy()),
        }

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Pool:
        """A copy elsewhere, or of another precision. Policies stay where they are."""
        real = lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None)  # noqa: E731
        return Pool(
            real(self.states), real(self.actions), self.lengths.to(device), self.base, real(self.log_base),
            self.policies, self.origin.to(device), real(self.log_densities),
            None if self.terminal is None else self.terminal.to(device),
        )  # fmt: skip

    def ratio_of(self, states: Tensor, actions: Tensor, lengths: Tensor) -> Float[Tensor, " N"]:
        """log p - log q of other trajectories, such as demonstrations, under the mixture of all policies."""
        states, actions = widened(states, actions, self.horizon)
        under = torch.stack([log_density(policy, states, actions, lengths) for policy in self.policies])
        base = torch.zeros_like(under[0]) if self.base is None else log_density(self.base, states, actions, lengths)
        under = under - self.constants.unsqueeze(1)
        return base - mixture_log_density(under, self._counts)

    # ------------------------------------------------------------------------------------------------ what is summed

    def visits(self, table: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Int[Tensor, " U"]]:
        """How often a trajectory collects the reward of each pair; the pairs that any sample or trajectory visits.

        Args:
            table: trajectories ``[N, T + 1, 2]``; None: the pool's own samples.
            shape: numbers of states and of actions.
        """
        return self._remember(
            ("visits", shape),
            table,
            lambda: visits(self.table if table is None else table, shape, self.horizon, self.dtype),
        )

    def feature_sums(
        self, features: Features, table: Tensor | None, lengths: Tensor | None = None
    ) -> Float[Tensor, "N K"]:
        """sum_t f(s_t, a_t) of trajectories ``[N, T + 1, ds + da]`` (None: the pool's own samples); computed once."""

        def compute() -> Tensor:
            return (checked_features(features, states, actions) * counted.unsqueeze(-1)).sum(-2).detach()

        states, actions, counted = self.decisions(table, lengths)
        return self._remember(("features", id(features), id(lengths)), table, compute, features, lengths)

    def decisions(self, table: Tensor | None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """States and actions of the decisions ``[N, T, .]`` of trajectories of vectors, and which of them count."""
        table, lengths = (self.table, self.lengths) if table is None else (table, lengths)
        size = self.states.shape[-1]
        states, actions = table[..., :-1, :size], table[..., :-1, size:]
        time = torch.arange(states.shape[-2], device=table.device)
        counted = time < (torch.tensor(len(time), device=table.device) if lengths is None else lengths).unsqueeze(-1)
        return states, actions, counted.expand(states.shape[:-1])

    def _remember(self, key: tuple[Any, ...], table: Tensor | None, compute: Callable[[], Any], *keep: Any) -> Any:
        """What ``compute`` returns, once for each key and table; ``keep`` are the objects whose ids are in the key."""
        # The objects are kept with the result, so that an id is never that of another one.
        if len(self._memo) > 64:
            self._memo.clear()
        key = (*key, id(table), None if table is None else table._version)
        if key not in self._memo:
            self._memo[key] = (compute(), table, *keep)
        return self._memo[key][0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}


def _check_rollouts(rollouts: Any) -> None:
    if not isinstance(rollouts, Rollouts):
        raise OptionError(f"rollouts is {form(rollouts)}: give what roll_out returned, then its policy")
    require_undiscounted(rollouts)


def _check_player(rollouts: Rollouts, policy: Policy | WholeLaw) -> None:
    """Refuse a policy that did not play the roll-outs: their weights would be another policy's."""
    _check_rollouts(rollouts)
    check_policy(policy)
    if isinstance(policy, WholeLaw):
        return
    found, played = _density(policy, rollouts), rollouts.log_density
    off = (found - played).abs() > _ROUNDING * (1 + played.abs())
    if bool(off.any()):
        first = int(off.nonzero()[0])
        raise PartitionError(
            f"roll-out {first} was played with log density {float(played[first]):.4g}, and has "
            f"{float(found[first]):.4g} under the policy given with it: give the policy that played it"
        )


def _density(policy: Policy | WholeLaw, rollouts: Rollouts) -> Tensor:
    return log_density(policy, rollouts.states, rollouts.actions, rollouts.lengths)
