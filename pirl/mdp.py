"""`TabularMDP`: a decision problem with finitely many states and actions, validated once and frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import InvalidMDPError, InvalidRewardError, RewardTimingError, UnboundedProblemError, first_line
from pirl.transitions import TransitionMap

_ROW_SUM_TOLERANCE = 1e-8
_ARGUMENTS = (
    "transition",
    "initial",
    "discount",
    "horizon",
    "terminal",
    "available",
    "action_prior",
    "state_names",
    "action_names",
)


class TabularMDP:
    """Dynamics, start and end of a finite decision problem: everything but the reward.

    Args:
        transition: P(s'|s,a), dense ``[S, A, S]``, or sparse (COO or CSR) ``[S * A, S]`` with row ``s * A + a``.
            Floating tensors set the dtype (use float64) and device of all that follows; arrays and lists are taken too.
        initial: p(s_1) ``[S]``, or one state's number.
        discount: g in [0, 1]. The trajectory reading of exp(r) needs 1, or explicit geometric stopping.
        horizon: number of decisions of an episode, or None for an unbounded one.
        terminal: ``[S]`` mask (or state numbers, or one) where episodes end. On entry a terminal state takes one forced
            no-op, action 0, collects r(s, 0) once, and is worth nothing after.
        available: ``[S, A]`` mask of the actions that can be taken; all by default.
        action_prior: base measure p(a|s): "uniform" over the available actions, "counting" (weight 1 each), or a
            tensor ``[S, A]``.
        state_names: optional names, kept for tables and plots.
        action_names: likewise.

    Raises:
        InvalidMDPError: a table is inconsistent; the message names the row.
        UnboundedProblemError: discount 1 without a horizon, and some state cannot reach a terminal one.

    Example:
        >>> pirl.TabularMDP(torch.eye(2).repeat(1, 2, 1).reshape(2, 2, 2).double(), initial=0, discount=0.9)
        TabularMDP(states=2, actions=2, discount=0.9)
        >>> transition = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]] * 3).double()  # [S, A, S]
        >>> pirl.TabularMDP(transition, initial=[1.0, 0.0, 0.0], terminal=[2], action_names=["wait", "go"])
        TabularMDP(states=3, actions=2, terminal=1)
    """

    transition: Tensor
    initial: Float[Tensor, " S"]
    discount: float
    horizon: int | None
    terminal: Bool[Tensor, " S"]
    available: Bool[Tensor, "S A"]
    action_prior: Float[Tensor, "S A"]
    state_names: tuple[str, ...] | None
    action_names: tuple[str, ...] | None
    # Problems and counts derived from these tables, for the recursions; dropped when pickled.
    memo: dict[Any, Any]
    _given_prior: Any

    def __init__(
        self,
        transition: Any,
        initial: Any,
        discount: float = 1.0,
        horizon: int | None = None,
        terminal: Any = None,
        available: Any = None,
        action_prior: Any = "uniform",
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
    ) -> None:
        transition = _floating(transition, "transition")
        if transition.layout == torch.strided:  # a copy, as of every table: whoever gave it may go on writing to it
            transition = transition.clone()
        if transition.layout == torch.sparse_csr:  # one sparse form inside; a CSR tensor also warns when unpickled
            transition = transition.to_sparse_coo()
        states, actions = _table_shape(transition)
        # Through __dict__: a frozen object fills itself once.
        self.__dict__.update(
            transition=transition,
            terminal=_mask(terminal, (states,), "terminal", default=False, like=transition),
            available=_mask(available, (states, actions), "available", default=True, like=transition),
            initial=_initial(initial, states, transition),
            discount=_discount(discount),
            horizon=_horizon(horizon),
            state_names=_names(state_names, states, "state_names"),
            action_names=_names(action_names, actions, "action_names"),
            memo={},
        )
        without = ~self.available.any(1) & ~self.terminal
        if bool(without.any()):
            raise InvalidMDPError(
                f"state {int(without.nonzero()[0])} has no available action; make it terminal or allow one"
            )
        prior = self._validated_prior(action_prior)
        self.__dict__.update(_given_prior=action_prior if isinstance(action_prior, str) else prior, action_prior=prior)
        self._validate_rows()
        if self.horizon is None and self.discount == 1.0:
            self._require_absorption()

    # ------------------------------------------------------------------------------------------------ sizes and tables

    @property
    def num_states(self) -> int:
        """S."""
        return self.initial.shape[0]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.available.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of every tensor of this problem."""
        return self.initial.dtype

    @property
    def device(self) -> torch.device:
        """Where every tensor of this problem lives."""
        return self.initial.device

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Non-zero (row, column, value) of the whole table, sorted by row."""
        table = self.transition
        if table.layout == torch.strided:
            table = table.reshape(-1, self.num_states)
            row, column = table.nonzero(as_tuple=True)
            return row, column, table[row, column]
        table = table.coalesce()
        (row, column), value = table.indices(), table.values()
        kept = value != 0
        return row[kept].long(), column[kept].long(), value[kept]

    @cached_property
    def transitions(self) -> TransitionMap:
        """P(s'|s,a) as a linear map; no entry leaves a terminal state or an action that is not available."""
        row, column, value = self._entries
        kept = self.acts.reshape(-1)[row]
        return TransitionMap(row[kept], column[kept], value[kept], (self.available.numel(), self.num_states))

    @cached_property
    def acts(self) -> Bool[Tensor, "S A"]:
        """Pairs (s, a) that a decision can lead to: available, in a state that is not terminal."""
        return self.log_prior.isfinite() & ~self.terminal.unsqueeze(1)

    @cached_property
    def log_prior(self) -> Float[Tensor, "S A"]:
        """log p(a|s): -inf where an action is not available; a terminal state has its no-op, action 0, with log p =
        0.
        """
        no_op = torch.zeros_like(self.action_prior)
        no_op[:, 0] = 1.0
        return torch.where(self.terminal.unsqueeze(1), no_op, self.action_prior * self.available).log()

    @cached_property
    def reachable(self) -> Bool[Tensor, " S"]:
        """States that some policy visits with positive probability from p(s_1)."""
        return _closure(self.initial > 0, self.transitions.state, self.transitions.column)

    def probability(self, state: Int[Tensor, " n"], action: Int[Tensor, " n"], following: Int[Tensor, " n"]) -> Tensor:
        """P(s'|s,a) of n listed transitions ``[n]``."""
        row, column, value = self._entries
        if not len(row):  # every state is terminal
            return value.new_zeros(len(state))
        key, wanted = row * self.num_states + column, (state * self.num_actions + action) * self.num_states + following
        place = torch.searchsorted(key, wanted).clamp_max(len(key) - 1)
        return torch.where(key[place] == wanted, value[place], torch.zeros_like(value[:1]))

    def check_reward(self, reward: Tensor) -> Float[Tensor, "*batch S A"]:
        """Broadcast r(s) ``[S]`` or ``[*batch, S, 1]``, or r(s, a) ``[*batch, S, A]``, to ``[*batch, S, A]``.

        Raises:
            InvalidRewardError: any other shape, or another dtype or device than the MDP's.
        """
        states, actions = self.num_states, self.num_actions
        if not isinstance(reward, Tensor):
            raise InvalidRewardError(
                f"reward must be a tensor [*batch, {states}, {actions}], not {type(reward).__name__}"
            )
        if reward.dtype != self.dtype or reward.device != self.device:
            raise InvalidRewardError(
                f"reward is {reward.dtype} on {reward.device}, the MDP {self.dtype} on {self.device}: "
                "convert one (mdp.to(...))"
            )
        if reward.shape == (states,):
            reward = reward.unsqueeze(-1)
        if reward.shape[-3:] == (states, actions, states) and actions != states:
            raise RewardTimingError(
                f"reward has shape {tuple(reward.shape)}, r(s,a,s'): for the causal reading use "
                "pirl.expected_reward; the trajectory reading has no such mean, so let the state say what happened"
            )
        if reward.dim() < 2 or reward.shape[-2] != states or reward.shape[-1] not in (1, actions):
            raise InvalidRewardError(
                f"reward has shape {tuple(reward.shape)}; expected [*batch, {states}, {actions}] for r(s,a), "
                f"or [*batch, {states}, 1] for r(s)"
            )
        return reward.expand(*reward.shape[:-1], actions)

    # ------------------------------------------------------------------------------------------------ whole objects

    def replace(self, **changes: Any) -> TabularMDP:
        """A copy with some arguments changed, validated anew."""
        fields = {name: getattr(self, name) for name in _ARGUMENTS}
        fields["action_prior"] = self._given_prior  # "uniform" stays uniform over other available actions
        return TabularMDP(**{**fields, **changes})

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> TabularMDP:
        """A copy on another device, or in another floating type (rows are normalised again after rounding)."""
        device = self.device if device is None else torch.device(device)
        if dtype in (None, self.dtype) and device == self.device:
            return self
        prior = self._given_prior
        if self.transition.layout == torch.strided:
            transition = self.transition.to(device=device, dtype=dtype)
            transition = transition / transition.sum(-1, keepdim=True).where(
                transition.sum(-1, keepdim=True) > 0, torch.ones_like(transition[..., :1])
            )
        else:
            row, column, value = (x.to(device=device) for x in self._entries)
            value = value.to(dtype=dtype)
            total = value.new_zeros(self.num_states * self.num_actions).index_add(0, row, value)
            transition = torch.sparse_coo_tensor(
                torch.stack([row, column]), value / total[row], (len(total), self.num_states),
                device=value.device, check_invariants=False,
            )  # fmt: skip
        initial = self.initial.to(device=device, dtype=dtype)
        return self.replace(
            transition=transition,
            initial=initial / initial.sum(),
            terminal=self.terminal.to(device=device),
            available=self.available.to(device=device),
            action_prior=prior if isinstance(prior, str) else self.action_prior.to(device=device, dtype=dtype),
        )

    def constant_data(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """What a posterior file keeps of this problem: enough for plots and for identifiability."""
        row, column, value = self._entries
        tables: dict[str, tuple[tuple[str, ...], Tensor]] = {
            "transition_row": (("transition",), row),
            "transition_column": (("transition",), column),
            "transition_probability": (("transition",), value),
            "initial": (("state",), self.initial),
            "terminal": (("state",), self.terminal),
            "available": (("state", "action"), self.available),
            "discount": ((), torch.tensor(self.discount, dtype=torch.float64, device="cpu")),
            "horizon": ((), torch.tensor(-1 if self.horizon is None else self.horizon, device="cpu")),
        }
        return {name: (dims, x.detach().cpu().numpy()) for name, (dims, x) in tables.items()}

    def __repr__(self) -> str:
        missing = self.num_states - int(self.reachable.sum())
        parts = [
            f"states={self.num_states}" + (f" ({missing} unreachable)" if missing else ""),
            f"actions={self.num_actions}",
        ]
        parts += [f"discount={self.discount:g}"] * (self.discount != 1.0)
        parts += [f"horizon={self.horizon}"] * (self.horizon is not None)
        parts += [f"terminal={int(self.terminal.sum())}"] * bool(self.terminal.any())
        return f"TabularMDP({', '.join(parts)})"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a TabularMDP does not change: use mdp.replace({name}=...)")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memo": {}}  # memoised counts are keyed by identity, which does not survive a pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # ------------------------------------------------------------------------------------------------ validation

    def _validated_prior(self, prior: Any) -> Float[Tensor, "S A"]:
        available = self.available
        if isinstance(prior, str):
            if prior not in ("uniform", "counting"):
                raise InvalidMDPError(f"action_prior must be 'uniform', 'counting' or a tensor [S, A], not {prior!r}")
            weight = available.to(self.initial.dtype)
            return weight / weight.sum(1, keepdim=True).clamp_min(1.0) if prior == "uniform" else weight
        prior = _floating(prior, "action_prior", self.initial)
        if prior.shape != available.shape:
            raise InvalidMDPError(f"action_prior has shape {tuple(prior.shape)}; expected {tuple(available.shape)}")
        _require_finite(prior, "action_prior")
        counting = bool((prior == available).all())
        total = (prior * available).sum(1)
        wrong = ((total - 1).abs() > _tolerance(prior.dtype)) & ~self.terminal
        if bool(wrong.any()) and not counting:
            state = int(wrong.nonzero()[0])
            raise InvalidMDPError(
                f"action_prior[{state}] sums to {float(total[state]):.9g} over the available actions, not 1 "
                "(use 'counting' for the counting measure)"
            )
        return prior.clone()

    def _validate_rows(self) -> None:
        row, _, value = self._entries
        bad = ~value.isfinite() | (value < 0)
        if bool(bad.any()):
            entry = int(bad.nonzero()[0])
            state, action = divmod(int(row[entry]), self.num_actions)
            raise InvalidMDPError(
                f"transition[{state}, {action}] contains {float(value[entry])}; probabilities are finite and >= 0"
            )
        total = value.new_zeros(self.available.numel()).index_add(0, row, value)
        wrong = ((total - 1).abs() > _tolerance(value.dtype)) & self.acts.reshape(
            -1
        )  # terminal and masked rows are free
        if bool(wrong.any()):
            pair = int(wrong.nonzero()[0])
            state, action = divmod(pair, self.num_actions)
            raise InvalidMDPError(
                f"transition[{state}, {action}] sums to {float(total[pair]):.9g}, not 1 (within 1e-8)"
            )

    def _require_absorption(self) -> None:
        support = self.transitions
        ends = _closure(self.terminal, support.column, support.state)
        if not bool(ends.all()):
            raise UnboundedProblemError(
                f"discount is 1 without a horizon, and state {int((~ends).nonzero()[0])} cannot reach a terminal "
                "state: "
                "give horizon=, a discount below 1, or terminal states that every state can reach"
            )


def _closure(start: Bool[Tensor, " S"], source: Tensor, target: Tensor) -> Bool[Tensor, " S"]:
    """States reached from ``start`` along the edges source -> target."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order

    states = len(start)
    begin = start.nonzero().flatten().cpu().numpy()
    # One extra node points at all starts, so that one search is enough.
    edges_from = np.concatenate([source.cpu().numpy(), np.full(len(begin), states)])
    edges_to = np.concatenate([target.cpu().numpy(), begin])
    graph = coo_matrix((np.ones(len(edges_from)), (edges_from, edges_to)), shape=(states + 1, states + 1)).tocsr()
    reached = torch.zeros(states + 1, dtype=torch.bool, device="cpu")
    reached[torch.from_numpy(breadth_first_order(graph, states, return_predecessors=False).astype("int64"))] = True
    return reached[:-1].to(start.device)


def _tolerance(dtype: torch.dtype) -> float:
    """1e-8, or what the rounding of a row allows in a shorter type."""
    return max(_ROW_SUM_TOLERANCE, 32 * torch.finfo(dtype).eps)


def _floating(x: Any, name: str, like: Tensor | None = None) -> Tensor:
    """A floating tensor: of the type and on the device of ``like``, or as it comes."""
    try:  # plain lists are float64, as in NumPy
        tensor = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x), device=getattr(like, "device", None))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidMDPError(f"{name} cannot be read as a tensor: {first_line(error)}") from None
    if like is not None:
        return tensor.to(dtype=like.dtype, device=like.device)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def _require_finite(x: Tensor, name: str) -> None:
    bad = ~x.isfinite() | (x < 0)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise InvalidMDPError(f"{name}{where} is {float(x[tuple(where)])}; probabilities are finite and >= 0")


def _table_shape(transition: Tensor) -> tuple[int, int]:
    if transition.layout == torch.strided:
        if transition.dim() != 3 or transition.shape[0] != transition.shape[2]:
            raise InvalidMDPError(f"transition has shape {tuple(transition.shape)}; a dense table is [S, A, S]")
        states, actions = transition.shape[:2]
    else:
        if transition.dim() != 2 or not transition.shape[1] or transition.shape[0] % transition.shape[1]:
            raise InvalidMDPError(f"transition has shape {tuple(transition.shape)}; a sparse table is [S * A, S]")
        states, actions = transition.shape[1], transition.shape[0] // transition.shape[1]
    if states < 1 or actions < 1:
        raise InvalidMDPError(f"transition has {states} states and {actions} actions; both must be at least 1")
    return states, actions


def _mask(mask: Any, shape: tuple[int, ...], name: str, default: bool, like: Tensor) -> Tensor:
    if mask is None:
        return torch.full(shape, default, dtype=torch.bool, device=like.device)
    try:
        mask = torch.as_tensor(mask, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidMDPError(f"{name} cannot be read as a tensor: {first_line(error)}") from None
    mask = mask if mask.numel() else mask.long()  # an empty list of state numbers
    mask = mask if mask.dim() or mask.dtype == torch.bool else mask.reshape(1)  # one state's number
    if mask.dtype != torch.bool and len(shape) == 1 and not mask.is_floating_point():  # a list of state numbers
        wrong = mask[(mask < 0) | (mask >= shape[0])]
        if wrong.numel():
            raise InvalidMDPError(f"{name} names state {int(wrong[0])}; states are 0 to {shape[0] - 1}")
        if len(mask) != len(mask.unique()):
            raise InvalidMDPError(f"{name} repeats a state number; a mask must be boolean: {name} == 1")
        return torch.zeros(shape, dtype=torch.bool, device=like.device).index_fill(0, mask.reshape(-1).long(), True)
    if mask.shape != shape or mask.dtype != torch.bool:
        raise InvalidMDPError(f"{name} is {mask.dtype} {tuple(mask.shape)}; expected a boolean mask of shape {shape}")
    return mask.clone()


def _initial(initial: Any, states: int, like: Tensor) -> Tensor:
    given = initial if isinstance(initial, Tensor) else np.asarray(initial)
    if given.ndim == 0 and str(given.dtype).removeprefix("torch.").startswith(("int", "uint")):  # one state's number
        if not 0 <= int(initial) < states:
            raise InvalidMDPError(f"initial state {int(initial)} is out of range; states are 0 to {states - 1}")
        return torch.zeros(states, dtype=like.dtype, device=like.device).index_fill(
            0, torch.tensor([int(initial)], device=like.device), 1.0
        )
    tensor = _floating(initial, "initial", like)
    if tensor.shape != (states,):
        raise InvalidMDPError(f"initial has shape {tuple(tensor.shape)}; expected ({states},), or one state's number")
    _require_finite(tensor, "initial")
    if abs(float(tensor.sum()) - 1) > _tolerance(tensor.dtype):
        raise InvalidMDPError(f"initial sums to {float(tensor.sum()):.9g}, not 1 (within 1e-8)")
    return tensor.clone()


def _names(names: Sequence[str] | None, count: int, what: str) -> tuple[str, ...] | None:
    if names is not None and len(names) != count:
        raise InvalidMDPError(f"{what} has {len(names)} names for {count} entries")
    return None if names is None else tuple(str(name) for name in names)


def _discount(discount: Any) -> float:
    try:
        discount = float(discount)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidMDPError(f"discount is {discount!r}; it must be a number in [0, 1]") from None
    if not 0 <= discount <= 1:
        raise InvalidMDPError(f"discount is {discount}; it must lie in [0, 1]")
    return discount


def _horizon(horizon: Any) -> int | None:
    if horizon is None:
        return None
    try:
        number = math.nan if isinstance(horizon, bool | str) else float(horizon)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not number.is_integer() or number < 1:
        raise InvalidMDPError(f"horizon is {horizon!r}; it must be a whole number of decisions, at least 1, or None")
    return int(horizon)
