"""What a simulator and a policy are, and refusals of what is neither."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import DiscountError, OptionError, form
from pirl.simulators.rollouts import Rollouts

Generator = torch.Generator | None


@runtime_checkable
class Simulator(Protocol):
    """What :func:`roll_out` needs. States are whole numbers ``[n]`` or vectors ``[n, ds]``.

    Episodes that can end early also need ``is_terminal(states) -> [n]`` (bool).

    Example:
        >>> class Walk:
        ...     horizon = 10
        ...     def reset(self, num, generator=None):
        ...         return torch.zeros(num, 1)
        ...     def step(self, states, actions, generator=None):
        ...         return states + actions
        >>> isinstance(Walk(), Simulator)
        True
    """

    horizon: int
    """T, decisions of an episode."""

    def reset(self, num: int, generator: Generator = None) -> Tensor:
        """First states of ``num`` episodes."""

    def step(self, states: Tensor, actions: Tensor, generator: Generator = None) -> Tensor:
        """The states that follow, one for each; whichever states were given before, since particles go on from any."""


@runtime_checkable
class EpisodeSimulator(Protocol):
    """A simulator without a stateless step, which plays episodes from beginning to end itself.

    Example:
        >>> isinstance(GymSimulator("CartPole-v1", horizon=20), EpisodeSimulator)
        True
    """

    horizon: int
    """T, decisions of an episode."""

    def roll_out(self, policy: Policy, num: int, generator: Generator = None) -> Rollouts:
        """See the function of this name."""


@runtime_checkable
class Policy(Protocol):
    """How actions are chosen; ``step`` is 0 for the first decision of an episode.

    Example:
        >>> class Coin:  # two actions, equally likely
        ...     def sample(self, states, step, generator=None):
        ...         return torch.randint(2, (len(states),), generator=generator)
        ...     def log_prob(self, states, actions, step):
        ...         return torch.full((len(states),), 0.5).log()
        >>> isinstance(Coin(), Policy)
        True
        >>> roll_out(GymSimulator("CartPole-v1", horizon=5), Coin(), 3).states.shape
        torch.Size([3, 6, 4])
    """

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions: whole numbers ``[n]`` or vectors ``[n, da]``."""

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log pi(a|s), normalised."""


@runtime_checkable
class WholeLaw(Protocol):
    """A law of trajectories that is no policy, such as that of particles (:mod:`pirl.particles`).

    Example:
        >>> from pirl.particles import TiltedProposal
        >>> isinstance(TiltedProposal(wanted, base_policy(world), 0.0, 0.0, 1.0), WholeLaw)
        True
    """

    def log_density(self, states: Tensor, actions: Tensor, lengths: Tensor) -> Float[Tensor, " n"]:
        """log q(tau), relative to the dynamics."""


def check_simulator(simulator: Any) -> None:
    """Refuse what cannot be played, and say what it lacks.

    Raises:
        OptionError: it is no simulator.
    """
    if not isinstance(simulator, type) and isinstance(simulator, (Simulator, EpisodeSimulator)):
        return
    lacks = [name for name in ("horizon", "reset", "step") if not hasattr(simulator, name)]
    raise OptionError(
        f"the simulator is {form(simulator)}, which cannot be played for want of {', '.join(lacks) or 'an instance'}: "
        "give one in this place (a TabularMDP is wrapped, pirl.simulators.TabularSimulator(mdp))"
    )


def check_policy(policy: Any, name: str = "policy") -> None:
    """Refuse what cannot decide.

    Raises:
        OptionError: it is no policy, nor a law of whole trajectories.
    """
    if isinstance(policy, type) or not isinstance(policy, (Policy, WholeLaw)):
        raise OptionError(
            f"{name} is {form(policy)}, and no policy with sample and log_prob: give one, such as "
            "pirl.simulators.TabularPolicy of a table, or pirl.local_control.gaussian_base(...)"
        )


def check_demonstrations(demos: Any) -> None:
    """Refuse what is no demonstrations.

    Raises:
        OptionError: says what belongs there.
    """
    if not hasattr(demos, "as_tensor"):
        raise OptionError(f"demos is {form(demos)}: give Trajectories or ContinuousTrajectories first")


def require_undiscounted(simulator: object) -> None:
    """Refuse a simulator with a discount, or its roll-outs, where returns are sums: the trajectory reading has none.

    Raises:
        DiscountError: its discount is not 1.
    """
    discount = getattr(simulator, "discount", 1)
    if discount != 1:
        raise DiscountError(
            f"the trajectory reading has no discount, and the simulator's is {discount:g}: make it of a problem with "
            "discount=1 and a horizon"
        )
