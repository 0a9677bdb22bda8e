"""What demonstrations can never determine: the directions of reward space that leave their law as it is.

Nothing but the law of the demonstrations can be learned from them, and of it only what a reward changes: the log
probability of each choice and, in the trajectory reading, where luck is controlled too, of each next state and each
start. A direction that changes none of these is *unidentified*: there the posterior is the prior, whatever the data.

Causal reading, infinite horizon: ``r`` and ``r + phi(s) - g sum_s' P(s'|s,a) phi(s')`` have one soft policy, for any
potential phi, and no others do (Cao et al. 2021, theorem 1). So the gauge is range(E - g P), of dimension S, where
``(E phi)(s,a) = phi(s)``. The reward of a pair that no episode can contain (a state that is not reached, an action that
is not available, any but the no-op of a terminal state) is free as well.

Elsewhere the answer is the null space of the Jacobian of all those log probabilities: with V' the derivative of the
soft values and Q' = r' + E V' that of the action values, ``Q'(s,a) - V'(s)`` for a choice, ``V'(s') - E V'(s,a)`` for
luck and ``V'(s_1) - E V'`` for a start; the trajectory reading's squares, weighed by probability, add up to the
covariance of counts, which is the Hessian of log Z. All of it depends on the support of the law alone, hence not on the
reward at which it is computed.

Sources: Cao, Cohen and Szpruch 2021 (arXiv 2106.03498); Rolland et al. 2022 (arXiv 2209.10974), for demonstrators that
share a reward; Ng, Harada and Russell 1999, for potentials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pirl.backups import Reading, SoftProblem, entry_weights
from pirl.errors import HorizonError, InvalidMDPError, InvalidRewardError, MemoryLimitError, OptionError
from pirl.mdp import TabularMDP
from pirl.message_passing import checked_values, log_policy_to_go, require_finite_reward, soft_policy, soft_problem
from pirl.transitions import TransitionMap

# Everything here is dense in the parameters.
_MOST_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class Identification:
    """Which directions of parameter space the demonstrations can determine, and which they cannot.

    Attributes:
        null: orthonormal basis ``[P, K]`` of the unidentified directions; K may be 0.
        singular_values: ``[P]``, largest first: how much each direction shows in the law of the demonstrations,
            relative to how much it changes action values. Where the law is looked at in parts (steps of a finite
            horizon, several problems) a direction has the value of the first part that shows it. The last K are the
            largest rounding error that an unidentified direction left.
        tolerance: a direction is unidentified where its singular value is at most this.
        space: what the parameters are: r(s) ("state"), r(s,a) ("state_action") or weights ("features").
        shape: (S,), (S, A) or (number of features,).

    Example:
        >>> found = unidentified(mdp, features=features)
        >>> found.num_parameters, found.num_unidentified, found.null.shape
        (3, 0, torch.Size([3, 0]))
        >>> unidentified(mdp, space="state").identified(truth.squeeze(-1)).shape
        torch.Size([25])
    """

    null: Float[Tensor, "P K"]
    singular_values: Float[Tensor, " P"]
    tolerance: float
    space: str
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.null.shape[0]

    @property
    def num_unidentified(self) -> int:
        """K."""
        return self.null.shape[1]

    @property
    def rank(self) -> int:
        """P - K, the number of identified directions."""
        return self.num_parameters - self.num_unidentified

    @property
    def share(self) -> Float[Tensor, " P"]:
        """How much of each parameter is unidentified: 0 (known, given enough data) to 1 (never more than the prior)."""
        return self.null.square().sum(1)

    def identified(self, parameters: Tensor) -> Tensor:
        """The canonical form: the part orthogonal to all unidentified directions, and so the smallest equivalent.

        Args:
            parameters: ``[*batch, P]``; for r(s,a) also ``[*batch, S, A]``, for r(s) also ``[*batch, S, 1]``.

        Returns:
            The same shape. Parameters with one law of demonstrations have one canonical form.

        Raises:
            InvalidRewardError: another shape.
        """
        return parameters - self.gauge(parameters)

    def gauge(self, parameters: Tensor) -> Tensor:
        """The part of the parameters that no demonstration can determine; shapes as in :meth:`identified`."""
        event = self._event_dims(parameters)
        flat = parameters.reshape(*parameters.shape[: parameters.dim() - event], self.num_parameters)
        return ((flat @ self.null) @ self.null.mT).reshape(parameters.shape)

    def split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """(:meth:`identified`, :meth:`gauge`): orthogonal, and their sum is ``parameters``."""
        gauge = self.gauge(parameters)
        return parameters - gauge, gauge

    def _event_dims(self, parameters: Tensor) -> int:
        table = {"state_action": self.shape, "state": (*self.shape, 1)}.get(self.space)
        if table is not None and tuple(parameters.shape[-2:]) == table:
            return 2
        if parameters.dim() < 1 or parameters.shape[-1] != self.num_parameters:
            also = "" if table is None else f" or [*batch, {table[0]}, {table[1]}]"
            raise InvalidRewardError(
                f"parameters have shape {tuple(parameters.shape)}; expected [*batch, {self.num_parameters}]{also}"
            )
        return 1

    def __repr__(self) -> str:
        return f"Identification({self.space}, {self.rank} of {self.num_parameters} directions identified)"


def unidentified(
    mdp: TabularMDP | Sequence[TabularMDP],
    *,
    space: str = "state_action",
    features: Tensor | Sequence[Tensor] | None = None,
    reading: Reading = "causal",
    reward: Tensor | None = None,
    stopping: str | None = None,
    starts: str = "drawn",
    tolerance: float | None = None,
) -> Identification:
    """The directions that no amount of demonstrations determines.

    Args:
        mdp: a decision problem, or several in which demonstrators had the same reward.
        space: whether parameters are rewards r(s,a) or r(s); with ``features`` they are weights.
        features: ``[S, K]`` of states or ``[S, A, K]`` of pairs, or one such tensor for each problem.
        reading: "causal" or "trajectory".
        reward: where to take the Jacobian, r(s) or r(s,a), ``[S, A]``. The null space is the same everywhere; the
            singular values then tell how much each direction shows there. By default the closed formula where there is
            one, and the reward of whom the action prior is the soft policy.
        stopping: "geometric" for the trajectory reading with a discount.
        starts: "drawn" from p(s_1), which the trajectory reading tilts, or "given" by the experimenter.
        tolerance: largest singular value of an unidentified direction; by default epsilon^(2/3) of the dtype (4e-11 in
            float64).

    Raises:
        MemoryLimitError: there are too many parameters for dense tables; use features.
        InvalidMDPError: no problem, or problems of different sizes (unless each has features of its own).
        InvalidRewardError: shapes or types of features or reward do not fit.
        OptionError: an option that there is not.
        DiscountError: trajectory reading, a discount and no stopping.

    Example:
        >>> mdp = pirl.envs.gridworld(5, 5, slip=0.0, discount=0.9)
        >>> unidentified(mdp, space="state")
        Identification(state, 24 of 25 directions identified)
        >>> unidentified(mdp)
        Identification(state_action, 100 of 125 directions identified)
    """
    problems = (mdp,) if isinstance(mdp, TabularMDP) else tuple(mdp)
    maps = _reward_maps(problems, space, features)
    if starts not in ("drawn", "given"):
        raise OptionError(f"starts must be 'drawn' or 'given', not {starts!r}")
    first = maps[0]
    if tolerance is None:
        tolerance = torch.finfo(first.mdp.dtype).eps ** (2 / 3)
    _require_memory(maps, reading)
    kept: list[Tensor] = []
    null, rounding = None, 0.0
    for known in maps:
        problem = soft_problem(known.mdp, reading, stopping=stopping)
        closed = reading == "causal" and problem.horizon is None and reward is None
        if null is None and closed and known.space == "state_action":
            # All in one piece: what potentials make, and what is never seen.
            gauge, visible = gauge_basis(known.mdp), _visible(known.mdp).flatten()
            null = torch.cat([gauge, torch.diag((~visible).to(gauge.dtype))[:, ~visible]], 1)
            kept.append(null.new_ones(null.shape[0] - null.shape[1]))
            continue
        if null is None:
            null = torch.eye(known.num_parameters, dtype=known.mdp.dtype, device=known.mdp.device)
        search = _Search(null, tolerance, known.scale)
        if closed:
            _remove_gauge(search, known)
        else:
            _linearise(search, known, problem, reward, luck=reading == "trajectory", drawn=starts == "drawn")
        null, rounding = search.null, max(rounding, search.rounding)
        kept += search.kept
    assert null is not None
    values = torch.cat([*kept, null.new_full((null.shape[1],), rounding)]).sort(descending=True).values
    return Identification(null, values, tolerance, first.space, first.shape)


def advantage(mdp: TabularMDP, reward: Tensor) -> Float[Tensor, "*batch S A"]:
    """The equivalent reward whose soft values are 0, ``log pi(a|s) - log p(a|s)``; 0 where nothing can be chosen.

    A canonical form without a matrix (causal reading, infinite horizon): rewards with one soft policy have one
    advantage, for any number of states. It is ``r - V + g P V``, hence differs from r by a potential. Not linear in r.

    Raises:
        HorizonError: with a horizon the policy depends on time, and no single reward has soft values 0.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, discount=0.9)
        >>> bool(advantage(mdp, torch.tensor([[1.0, 1.0]]).double()).abs().max() < 1e-12)
        True
    """
    if mdp.horizon is not None:
        raise HorizonError("an advantage is a stationary reward: give a problem without a horizon, or use unidentified")
    return torch.where(mdp.log_prior.isfinite(), soft_policy(mdp, reward) - mdp.log_prior, 0.0)


def gauge_basis(mdp: TabularMDP) -> Float[Tensor, "SA G"]:
    """Orthonormal basis of range(E - g P) over pairs that an episode can contain; 0 at the others.

    E - g P is injective, so there are as many columns as reachable states.

    Example:
        >>> gauge_basis(mdp).shape
        torch.Size([125, 25])
    """
    visible, states = _visible(mdp).flatten(), mdp.reachable
    state = torch.arange(len(visible), device=mdp.device) // mdp.num_actions
    table = torch.nn.functional.one_hot(state, mdp.num_states).to(mdp.dtype)
    transitions = mdp.transitions
    table.index_put_((transitions.row, transitions.column), -mdp.discount * transitions.value, accumulate=True)
    basis = table.new_zeros(len(visible), int(states.sum()))
    basis[visible] = torch.linalg.qr(table[visible][:, states]).Q
    return basis


# ------------------------------------------------------------------------------------------------ parameters -> rewards


@dataclass(frozen=True, eq=False)
class _RewardMap:
    """How parameters make the reward of one problem."""

    mdp: TabularMDP
    space: str
    features: Float[Tensor, "SA P"] | None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.features is not None:
            return (self.features.shape[1],)
        states, actions = self.mdp.num_states, self.mdp.num_actions
        return (states, actions) if self.space == "state_action" else (states,)

    @property
    def num_parameters(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def scale(self) -> float:
        """Length of the longest reward that one parameter makes."""
        if self.features is not None:
            return _longest_column(self.features)
        return 1.0 if self.space == "state_action" else self.mdp.num_actions**0.5

    def __call__(self, directions: Float[Tensor, "P m"]) -> Float[Tensor, "SA m"]:
        if self.features is not None:
            return self.features @ directions
        return directions if self.space == "state_action" else directions.repeat_interleave(self.mdp.num_actions, 0)


def _reward_maps(
    problems: tuple[TabularMDP, ...],
    space: str,
    features: Tensor | Sequence[Tensor] | None,
) -> list[_RewardMap]:
    if not problems:
        raise InvalidMDPError("no decision problem was given: demonstrations need at least one")
    if space not in ("state", "state_action"):
        raise OptionError(f"space must be 'state' or 'state_action', not {space!r}; weights need features=")
    if features is None:
        sizes = {(mdp.num_states, mdp.num_actions) for mdp in problems}
        if len(sizes) > 1:
            raise InvalidMDPError(
                f"problems of different sizes (S, A) {sorted(sizes)} share no table of rewards: give features for each"
            )
        return [_RewardMap(mdp, space, None) for mdp in problems]
    tables = [features] * len(problems) if isinstance(features, Tensor) else list(features)
    if len(tables) != len(problems):
        raise InvalidRewardError(f"{len(tables)} tensors of features for {len(problems)} problems: give one for each")
    maps = [_RewardMap(mdp, "features", _feature_rows(mdp, table)) for mdp, table in zip(problems, tables, strict=True)]
    if len({known.num_parameters for known in maps}) > 1:
        raise InvalidRewardError(f"the problems have {[m.num_parameters for m in maps]} features: share the weights")
    return maps


def _feature_rows(mdp: TabularMDP, features: Tensor) -> Float[Tensor, "SA K"]:
    states, actions = mdp.num_states, mdp.num_actions
    if tuple(features.shape[:-1]) not in ((states,), (states, actions)):
        raise InvalidRewardError(
            f"features have shape {tuple(features.shape)}; expected [{states}, K] or [{states}, {actions}, K]"
        )
    if features.dtype != mdp.dtype or features.device != mdp.device:
        raise InvalidRewardError(
            f"features are {features.dtype} on {features.device}, the MDP {mdp.dtype} on {mdp.device}: convert one"
        )
    if not bool(features.isfinite().all()):
        raise InvalidRewardError("features are NaN or infinite somewhere: every feature of every pair must be a number")
    return (features.unsqueeze(1).expand(-1, actions, -1) if features.dim() == 2 else features).flatten(0, 1)


def _visible(mdp: TabularMDP) -> Bool[Tensor, "S A"]:
    """Pairs that an episode can contain: available actions of reachable states, and no-ops of terminal ones."""
    return mdp.log_prior.isfinite() & mdp.reachable.unsqueeze(1)


def _require_memory(maps: list[_RewardMap], reading: Reading) -> None:
    for known in maps:
        mdp, count = known.mdp, known.num_parameters
        rows = mdp.num_states * mdp.num_actions + (len(mdp.transitions.value) if reading == "trajectory" else 0)
        needed = (3 * rows * count + 2 * count**2 + rows * mdp.num_states) * mdp.initial.element_size()
        if needed > _MOST_BYTES:
            advice = "give features= of fewer columns" if known.space == "features" else "give features= [S, K]"
            raise MemoryLimitError(
                f"{count} parameters of {mdp.num_states} states and {mdp.num_actions} actions need dense tables of "
                f"{needed / 2**30:.1f} GiB, more than {_MOST_BYTES / 2**30:.0f}: {advice}"
                + (", or space='state'" if known.space == "state_action" else "")
            )


# ------------------------------------------------------------------------------------------------ null spaces


class _Search:
    """Narrows the null space, one block of rows after another."""

    def __init__(self, null: Float[Tensor, "P m"], tolerance: float, scale: float) -> None:
        self.null, self.tolerance = null, tolerance
        # Of whatever entered so far: what remains may be rounding error, and must not be measured by itself.
        self.scale = scale
        self.kept: list[Tensor] = []
        self.rounding = 0.0

    def narrow(self, rows: Float[Tensor, "n m"], *made_of: Float[Tensor, "_ m"]) -> Float[Tensor, "m k"] | None:
        """Drop the directions that show in ``rows``, differences of the numbers that they are made of.

        Returns what remains in terms of what was, or None for all of it.
        """
        size = self.scale = max(self.scale, *(_longest_column(x) for x in made_of))
        if size == 0 or not rows.numel():
            return None
        largest = float(rows.norm()) / size
        if largest <= self.tolerance:
            self.rounding = max(self.rounding, largest)
            return None
        # Of the triangular factor, since a full SVD of the rows would make a matrix of rows by rows.
        _, values, v = torch.linalg.svd(torch.linalg.qr(rows, mode="r").R)
        values = values / size
        rank = int((values > self.tolerance).sum())
        self.kept.append(values[:rank])
        self.rounding = max([self.rounding, *values[rank:].tolist()])
        rest = v[rank:].mH
        self.null = self.null @ rest
        return rest


def _remove_gauge(search: _Search, known: _RewardMap) -> None:
    """Causal reading, infinite horizon: what of each direction's reward is no potential's."""
    reward = known(search.null)[_visible(known.mdp).flatten()]
    gauge = gauge_basis(known.mdp)[_visible(known.mdp).flatten()]
    search.narrow(reward - gauge @ (gauge.mT @ reward), reward)


def _linearise(
    search: _Search, known: _RewardMap, problem: SoftProblem, reward: Tensor | None, *, luck: bool, drawn: bool
) -> None:
    """Derivatives of the log probabilities of choices, luck and starts, by the recursion that soft values follow."""
    mdp = known.mdp
    if reward is None:  # soft values 0, and the action prior as soft policy
        table = -torch.logsumexp(problem.log_prior, 1, keepdim=True).expand_as(problem.log_prior)
    else:
        table = mdp.check_reward(reward)
        if table.dim() != 2:
            raise InvalidRewardError(f"reward has shape {tuple(reward.shape)}; expected one reward, [S, A] or [S, 1]")
        require_finite_reward(table)
    values = checked_values(mdp, table, problem)
    policy = log_policy_to_go(table, values, problem).exp()
    change = known(search.null)  # r' of each direction [S * A, m]
    if problem.horizon is None:
        change, slope = _stationary(search, mdp, problem, values, policy, change, luck)
        last = values
    else:
        slope, last = change.new_zeros(mdp.num_states, change.shape[1]), values[problem.horizon]
        reached = list(_reached(mdp, problem.horizon))
        for k in range(1, problem.horizon + 1):
            step = _Step(mdp, problem, values[k - 1], policy[k - 1], reached[problem.horizon - k])
            slope, change = step.narrow(search, slope, change, luck)
            if not change.shape[1]:
                return
    if luck and drawn:
        starts = mdp.initial > 0
        tilted = torch.softmax(mdp.initial.log() + last, 0)
        search.narrow((slope - tilted @ slope)[starts], slope[starts])


def _stationary(
    search: _Search, mdp: TabularMDP, problem: SoftProblem, values: Tensor, policy: Tensor, change: Tensor, luck: bool
) -> tuple[Tensor, Tensor]:
    step = _Step(mdp, problem, values, policy, mdp.reachable)
    onward = (policy.flatten()[step.law.row] * step.law.value, step.law.state, step.law.column)
    system = torch.eye(mdp.num_states, dtype=mdp.dtype, device=mdp.device)
    system.index_put_(onward[1:], -onward[0], accumulate=True)
    slope = torch.linalg.solve(system, (policy.unsqueeze(-1) * change.unflatten(0, policy.shape)).sum(1))
    slope, change = step.narrow(search, slope, change, luck)
    return change, slope


class _Step:
    """One decision, linearised: V and Q of all directions at once, and the rows in which they show."""

    def __init__(
        self, mdp: TabularMDP, problem: SoftProblem, following: Tensor, policy: Float[Tensor, "S A"], here: Tensor
    ) -> None:
        whole = problem.transitions
        weight = entry_weights(following.unsqueeze(-1), problem).squeeze(-1)
        self.law = TransitionMap(whole.row, whole.column, weight, whole.shape)
        self.policy = policy
        self.pairs = (mdp.log_prior.isfinite() & here.unsqueeze(1)).flatten()
        self.entries = here[whole.state]

    def narrow(
        self, search: _Search, slope: Float[Tensor, "S m"], change: Float[Tensor, "SA m"], luck: bool
    ) -> tuple[Float[Tensor, "S k"], Float[Tensor, "SA k"]]:
        """(V', r') of the directions that remain, V' with this decision before what ``slope`` says."""
        mean = self.law.expect(slope)
        q = (change + mean).unflatten(0, self.policy.shape)
        value = (self.policy.unsqueeze(-1) * q).sum(1)
        rows, made_of = [(q - value.unsqueeze(1)).flatten(0, 1)[self.pairs]], [q.flatten(0, 1)[self.pairs]]
        if luck:  # a stop needs no row: where all V' equal their mean, of weights below 1 in all, they are 0
            rows.append((slope[self.law.column] - mean[self.law.row])[self.entries])
            made_of.append(slope)
        rest = search.narrow(torch.cat(rows), *made_of)
        return (value, change) if rest is None else (value @ rest, change @ rest)


def _longest_column(x: Float[Tensor, "n m"]) -> float:
    return float(x.norm(dim=0).amax()) if x.numel() else 0.0


def _reached(mdp: TabularMDP, horizon: int) -> Iterator[Bool[Tensor, " S"]]:
    """States in which step 1, 2, ... of an episode can be."""
    here = mdp.initial > 0
    for _ in range(horizon):
        yield here
        further = torch.zeros_like(here)
        further[mdp.transitions.column[here[mdp.transitions.state]]] = True
        here = further
