"""MaxEnt-RL policies for few continuous coordinates: soft values on a grid, interpolated.

From every node of the grid each action is tried once in the simulator; a next state between nodes counts as a mixture
of its neighbours (the Markov chain approximation of Kushner and Dupuis 2001), which makes a finite problem whose soft
values are exact (causal reading: interpolation is no luck to be counted on). Between nodes, policies are mixtures of
the nodes' policies and so have densities; that they are only nearly optimal is told, and mended, by importance weights
or particles. For two to four coordinates; nodes grow as a power of their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import InvalidRewardError, OptionError, SimulatorError, check_generator
from pirl.simulators import Simulator
from pirl.simulators.playing import asked, checked_states
from pirl.simulators.protocols import Generator
from pirl.soft_values import SoftProblem, soft_values
from pirl.transitions import TransitionMap

Reward = Callable[[Tensor, Tensor], Tensor]
"""(states [n, ds], actions [n, da]) -> [n]."""

_LARGEST = 2**22
"""Numbers of one table, at most: 32 MB in double precision."""


class Grid:
    """Nodes of a box, and the neighbours of any point by multilinear interpolation.

    Args:
        low: of each coordinate ``[d]``.
        high: likewise; points outside count as on the border.
        shape: number of nodes along each.
        wraps: coordinates that are angles: ``high`` is ``low`` again, and no node of its own.

    Example:
        >>> Grid([0.0], [1.0], [3]).neighbours(torch.tensor([[0.25]]).double())[1]
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        shape: Sequence[int],
        wraps: Sequence[int] = (),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if not len(low) == len(high) == len(shape) or any(b <= a for a, b in zip(low, high, strict=True)):
            raise OptionError(f"a box from {tuple(low)} to {tuple(high)} with {tuple(shape)} nodes is none")
        if any(size < 2 for size in shape):
            raise OptionError(f"{tuple(shape)} nodes: at least 2 along each coordinate")
        if any(not 0 <= i < len(shape) for i in wraps):
            raise OptionError(f"wraps={tuple(wraps)}: coordinates are numbered from 0 to {len(shape) - 1}")
        self.shape, self.wraps = tuple(shape), tuple(wraps)
        self.low = torch.tensor(low, dtype=dtype, device=device)
        cells = [size if i in wraps else size - 1 for i, size in enumerate(shape)]
        self.width = (torch.tensor(high, dtype=dtype, device=device) - self.low) / torch.tensor(cells).to(self.low)
        axes = [self.low[i] + self.width[i] * torch.arange(size, device=device) for i, size in enumerate(shape)]
        self.nodes: Tensor = torch.cartesian_prod(*axes).reshape(-1, len(shape))
        """``[S, d]``."""

    def neighbours(self, points: Float[Tensor, "n d"]) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
        """Numbers of the 2^d surrounding nodes, and their shares."""
        if points.shape[-1] != len(self.shape) or not bool(points.isfinite().all()):
            raise OptionError(
                f"points {tuple(points.shape)} must be finite, with {len(self.shape)} coordinates, as the grid has"
            )
        place = (points - self.low) / self.width
        index = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
        share = torch.ones(len(points), 1, dtype=points.dtype, device=points.device)
        for i, size in enumerate(self.shape):
            along = place[:, i]
            if i in self.wraps:
                below = along.floor()
                pair = torch.stack([below, below + 1], 1).long() % size
            else:
                along = along.clamp(0, size - 1)
                below = along.floor().clamp_max(size - 2)
                pair = torch.stack([below, below + 1], 1).long()
            above = along - below
            index = (index.unsqueeze(2) * size + pair.unsqueeze(1)).flatten(1)
            share = (share.unsqueeze(2) * torch.stack([1 - above, above], 1).unsqueeze(1)).flatten(1)
        return index, share


class Actions:
    """Finitely many kinds of actions: numbered ones, or bins of a bounded scalar.

    In a bin the density is constant, and closed at both ends: an action at the bound, where a motor clips, has the
    density of the outermost bin.

    Args:
        num: how many.
        low: of a bounded scalar; None for actions that are numbered from 0.
        high: likewise.

    Example:
        >>> Actions(4, -2.0, 2.0).middle.flatten()
        tensor([-1.5000, -0.5000,  0.5000,  1.5000], dtype=torch.float64)
    """

    def __init__(
        self, num: int, low: float | None = None, high: float | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        if num < 1 or (low is None) != (high is None) or (low is not None and high is not None and high <= low):
            raise OptionError(f"{num} actions from {low} to {high}: at least one, and low below high or neither")
        self.num, self.low = num, low
        self.width = 0.0 if low is None or high is None else (high - low) / num
        middle = torch.arange(num, dtype=dtype)
        self.middle = (middle if low is None else low + self.width * (middle + 0.5)).unsqueeze(1)
        """A representative of each ``[K, 1]``."""

    @property
    def log_density(self) -> float:
        """Of the uniform law over all of them."""
        return -math.log(self.num * (self.width or 1.0))

    def kind(self, actions: Float[Tensor, "n 1"]) -> Int[Tensor, " n"]:
        """Which one; -1 for actions out of bounds."""
        flat = actions.squeeze(1)
        if self.low is None:
            number = flat.round().long()
            return torch.where((number >= 0) & (number < self.num) & (number == flat), number, -1)
        place = (flat - self.low) / self.width
        inside = (place >= -1e-6) & (place <= self.num + 1e-6)
        return torch.where(inside, place.floor().long().clamp(0, self.num - 1), -1)

    def draw(self, kind: Int[Tensor, " n"], generator: Generator) -> Float[Tensor, "n 1"]:
        """An action of each kind."""
        centre = self.middle.to(kind.device)[kind]
        if self.low is None:
            return centre
        uniform = torch.rand(centre.shape, generator=generator, dtype=centre.dtype, device=centre.device)
        return centre + self.width * (uniform - 0.5)


class UniformPolicy:
    """Every action equally likely: a base policy for :class:`Actions`.

    Example:
        >>> base = UniformPolicy(Actions(4, -2.0, 2.0))
        >>> base.log_prob(torch.zeros(1, 1), torch.tensor([[1.5]]), step=0).exp()
        tensor([0.2500])
    """

    def __init__(self, actions: Actions) -> None:
        self.actions = actions

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions ``[n, 1]``."""
        check_generator(generator)
        kind = torch.randint(self.actions.num, (len(states),), generator=generator, device=states.device)
        return self.actions.draw(kind, generator)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log density; -inf out of bounds."""
        inside = self.actions.kind(actions) >= 0
        return torch.where(inside, self.actions.log_density, -torch.inf).to(states.dtype)


class GridPolicy:
    """A policy that is interpolated between nodes: a :class:`pirl.particles.ValuedPolicy`.

    It keeps values only: pi_t(k|node) = p(k) exp(r(node, k) + E V_{t+1} - V_t(node)) is computed where it is asked for.

    Attributes:
        values: V_t(node) ``[T + 1, S]``; the last is 0.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> puck = pirl.linear_gaussian.LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=5)
        >>> learner = GridLearner(puck, Grid([-3.0], [3.0], [31]), Actions(9, -1.0, 1.0))
        >>> policy = learner.update(lambda states, actions: -states.square().sum(-1))
        >>> policy.values.shape, policy.value(torch.zeros(2, 1).double(), step=0).shape
        (torch.Size([6, 31]), torch.Size([2]))
    """

    def __init__(
        self,
        grid: Grid,
        actions: Actions,
        coordinates: Callable[[Tensor], Tensor],
        gains: Float[Tensor, "S K"],
        following: tuple[Int[Tensor, "S K m"], Float[Tensor, "S K m"]],
        values: Float[Tensor, "T1 S"],
    ) -> None:
        self.grid, self.actions, self.coordinates = grid, actions, coordinates
        self._gains, self._following, self.values = gains, following, values

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions ``[n, 1]``."""
        if len(states) == 0:
            return self.actions.middle[:0].to(states)
        check_generator(generator)
        index, share = self.grid.neighbours(self.coordinates(states))
        # A row takes as many numbers as it has neighbours, actions, and neighbours of what those lead to.
        rows = max(_LARGEST // (index.shape[1] * self.actions.num * self._following[0].shape[-1]), 1)
        parts = zip(index.split(rows), share.split(rows), strict=True)
        chance = torch.cat([(self._log_policy(step, i).exp() * s.unsqueeze(2)).sum(1) for i, s in parts])
        kind = torch.multinomial(chance, 1, generator=generator).squeeze(1)
        return self.actions.draw(kind, generator)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log density; -inf out of bounds."""
        kind = self.actions.kind(actions)
        index, share = self.grid.neighbours(self.coordinates(states))
        of_node = self._log_policy(step, index, kind.clamp_min(0))
        log_chance = (share.log() + of_node).logsumexp(1)
        return torch.where(kind >= 0, log_chance - math.log(self.actions.width or 1.0), -torch.inf)

    def value(self, states: Tensor, step: int) -> Float[Tensor, " n"]:
        """V_t(s)."""
        index, share = self.grid.neighbours(self.coordinates(states))
        return (self.values[step][index] * share).sum(1)

    def _log_policy(self, step: int, nodes: Int[Tensor, "n m"], kinds: Int[Tensor, " n"] | None = None) -> Tensor:
        """log pi_t(k|node) of all kinds ``[n, m, K]``, or of one each ``[n, m]``."""
        gains, columns, shares, now = self._gains, *self._following, self.values[step][nodes]
        if kinds is None:
            now = now.unsqueeze(-1)
        else:
            nodes = nodes * self.actions.num + kinds.unsqueeze(1)
            gains, columns, shares = (x.flatten(0, 1) for x in (gains, columns, shares))
        ahead = (self.values[step + 1].take(columns[nodes]) * shares[nodes]).sum(-1)
        return gains[nodes] + ahead - now


class GridLearner:
    """Soft-optimal policies of any reward, once the simulator was tried at every node.

    Args:
        simulator: with a stateless ``step``.
        grid: over the coordinates.
        actions: what can be done; all equally likely under the base policy.
        coordinates: from states ``[n, ds]`` to coordinates ``[n, d]``; the same by default.
        states: from coordinates to states.
        draws: next states drawn for each node and action; more than one where there is noise.

    Raises:
        SimulatorError: the simulator failed, or ends episodes early.
        OptionError: an option out of range.

    Attributes:
        base: the base policy.
        steps_taken: steps of the simulator, ``S * K * draws``.

    Example:
        >>> one = torch.eye(1, dtype=torch.float64)
        >>> puck = pirl.linear_gaussian.LinearGaussian(one, one, 0 * one, one[0], 0 * one, one, horizon=5)
        >>> learner = GridLearner(puck, Grid([-3.0], [3.0], [31]), Actions(9, -1.0, 1.0))
        >>> policy = learner.update(lambda states, actions: -states.square().sum(-1))
        >>> policy.sample(torch.tensor([[2.0], [-2.0]]).double(), step=0).sign()  # homewards
        tensor([[-1.],
                [ 1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        simulator: Simulator,
        grid: Grid,
        actions: Actions,
        *,
        coordinates: Callable[[Tensor], Tensor] | None = None,
        states: Callable[[Tensor], Tensor] | None = None,
        draws: int = 1,
        generator: Generator = None,
    ) -> None:
        if hasattr(simulator, "is_terminal"):
            raise SimulatorError("a grid has no ends: give a simulator without is_terminal, which plays all decisions")
        check_generator(generator)
        if draws < 1:
            raise OptionError(f"draws is {draws}; at least 1 next state of each node and action")
        self.simulator, self.grid, self.actions = simulator, grid, actions
        self.base = UniformPolicy(actions)
        self.coordinates = (lambda x: x) if coordinates is None else coordinates
        self._nodes = grid.nodes if states is None else states(grid.nodes)
        count = len(self._nodes)
        self._row_states = self._nodes.repeat_interleave(actions.num, 0)
        self._row_actions = actions.middle.to(grid.nodes).repeat(count, 1)
        columns, shares = [], []
        for _ in range(draws):
            following = asked("a node of the grid", self._ask(generator))
            index, share = grid.neighbours(self.coordinates(following))
            columns.append(index)
            shares.append(share / draws)
        column, value = torch.cat(columns, 1), torch.cat(shares, 1)
        self._following = tuple(x.unflatten(0, (count, actions.num)) for x in (column, value))
        row = torch.arange(len(column), device=column.device).unsqueeze(1).expand_as(column)
        keep = value > 0
        log_prior = torch.full((count, actions.num), -math.log(actions.num)).to(value)
        transitions = TransitionMap(row[keep], column[keep], value[keep], (count * actions.num, count))
        self._problem = SoftProblem(
            transitions, log_prior, "causal", torch.zeros_like(log_prior), stop=0.0, horizon=simulator.horizon
        )
        self.steps_taken = count * actions.num * draws

    def _ask(self, generator: Generator) -> Callable[[], Tensor]:
        states = self._row_states
        return lambda: checked_states(self.simulator.step(states, self._row_actions, generator), len(states), states)

    @torch.no_grad()
    def update(self, reward: Reward, generator: Generator = None) -> GridPolicy:
        """The policy of a reward; nothing more is asked of the simulator, nor of chance.

        Raises:
            InvalidRewardError: the reward is not finite at a node.
        """
        table = reward(self._row_states, self._row_actions).reshape(len(self._nodes), self.actions.num)
        if not bool(table.isfinite().all()):
            raise InvalidRewardError("the reward of a node of the grid is NaN or infinite: rewards must be finite")
        values = soft_values(table, self._problem).flip(-2)
        gains = table + self._problem.log_prior
        return GridPolicy(self.grid, self.actions, self.coordinates, gains, self._following, values)
