"""Rewards as functions of parameters: linear, tabular and neural, giving ``[*batch, S, A]``.

A reward of the state alone keeps a last dimension of 1, which broadcasts over actions wherever pirl takes a reward.
Leading batch dimensions (chains, particles, posterior draws) pass through, and so does ``torch.func.vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pirl.errors import InvalidRewardError, first_line, form


def linear_reward(features: Tensor, weights: Tensor) -> Float[Tensor, "*batch S A"]:
    """Reward ``features . weights``.

    Args:
        features: ``[S, K]`` of states, or ``[S, A, K]`` of state-action pairs.
        weights: ``[*batch, K]``.

    Returns:
        ``[*batch, S, 1]`` or ``[*batch, S, A]``.

    Raises:
        InvalidRewardError: the shapes or types do not fit.

    Example:
        >>> linear_reward(torch.eye(3), torch.tensor([0.0, 1.0, 2.0])).shape
        torch.Size([3, 1])
    """
    if not isinstance(features, Tensor):
        raise InvalidRewardError(f"features must be a tensor, not {type(features).__name__}: use torch.as_tensor(...)")
    if features.dim() not in (2, 3):
        raise InvalidRewardError(f"features have shape {tuple(features.shape)}; expected [S, K] or [S, A, K]")
    num_features = features.shape[-1]
    if not isinstance(weights, Tensor):
        raise InvalidRewardError(f"weights is {form(weights)}; expected a floating tensor [*batch, {num_features}]")
    if weights.dim() < 1 or weights.shape[-1] != num_features:
        raise InvalidRewardError(f"weights have shape {tuple(weights.shape)}; expected [*batch, {num_features}]")
    if not features.is_floating_point() or (weights.is_floating_point() and features.dtype != weights.dtype):
        cast = {torch.float32: "float", torch.float64: "double"}.get(weights.dtype, "double")
        raise InvalidRewardError(
            f"features are {features.dtype}, and weights {weights.dtype}: give features.{cast}() "
            "(pirl.fit computes in float64, unless dtype= says otherwise)"
        )
    _require_same(features, weights, "weights")
    reward = weights @ features.reshape(-1, num_features).mT
    pairs = (features.shape[0], 1) if features.dim() == 2 else features.shape[:2]
    return reward.reshape(*weights.shape[:-1], *pairs)


def tabular_reward(values: Tensor) -> Float[Tensor, "*batch S 1"]:
    """One number a state ``[*batch, S]``, received whatever the action: ``[*batch, S, 1]``.

    A table r(s, a) ``[*batch, S, A]`` is a reward already and needs no function.

    Raises:
        InvalidRewardError: ``values`` has no dimension, or is not of a floating type.

    Example:
        >>> tabular_reward(torch.zeros(4, 7)).shape
        torch.Size([4, 7, 1])
    """
    if values.dim() < 1 or not values.is_floating_point():
        raise InvalidRewardError(
            f"values are {values.dtype} of shape {tuple(values.shape)}; expected a floating tensor [*batch, S]"
        )
    return values.unsqueeze(-1)


def neural_reward(network: Callable[[Tensor], Tensor], features: Tensor) -> Float[Tensor, "*batch S A"]:
    """A network's reward of every state, or of every state-action pair.

    Args:
        network: any module, with its own parameters or with parameters that Pyro samples. From ``[S, D]`` it gives
            ``[*batch, S, 1]`` or ``[*batch, S, A]``, from ``[S, A, D]`` ``[*batch, S, A, 1]`` or ``[*batch, S, A]``.
        features: ``[S, D]`` or ``[S, A, D]``.

    Returns:
        ``[*batch, S, 1]`` or ``[*batch, S, A]``.

    Raises:
        InvalidRewardError: the shapes or types do not fit.

    Example:
        >>> pirl.neural_reward(torch.nn.Linear(2, 1), torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """
    if features.dim() not in (2, 3):
        raise InvalidRewardError(f"features have shape {tuple(features.shape)}; expected [S, D] or [S, A, D]")
    try:
        reward = network(features)
    except RuntimeError as error:
        message = first_line(error)
        if not any(word in message for word in ("shape", "size", "dtype", "device")):
            raise
        told = f"{list(features.shape)} of {features.dtype} on {features.device}"
        raise InvalidRewardError(f"the network does not take features {told}: {message}") from error
    pairs = features.shape[:-1]
    if len(pairs) == 2 and reward.shape[-3:] == (*pairs, 1):
        reward = reward.squeeze(-1)
    fits = reward.dim() >= 2 and (reward.shape[-2:] == pairs if len(pairs) == 2 else reward.shape[-2] == pairs[0])
    if not fits:
        expected = ", ".join(map(str, (*pairs, 1)))
        raise InvalidRewardError(f"the network gave shape {tuple(reward.shape)}; expected [*batch, {expected}]")
    return reward


def lifted_network(
    name: str, network: nn.Module, scale: float = 1.0, last_layer: bool = False
) -> Callable[[Tensor], Tensor]:
    """A network with a prior on each of its parameters, which become sites of the Pyro model that calls this.

    A parameter with n inputs a unit is normal with standard deviation ``scale / sqrt(n)``, a bias with ``scale``, so
    that the prior of the output does not depend on how wide the layers are. Sites are called ``name_parameter``. Hidden
    units can be exchanged: chains are judged by the reward, which ``pyro.deterministic`` records, and not by weights.

    Args:
        name: what the names of the sites begin with.
        network: any module. Its own parameters are only looked at for their shapes.
        scale: standard deviation of a bias, and of each layer's sum of inputs of size one.
        last_layer: priors on the last module with parameters alone; the others keep the values that they have (a
            network that was trained before, such as :func:`pirl.baselines.maxent`'s). The posterior is then one of a
            linear reward, quickly sampled, and right for ``engine="laplace"``.

    Raises:
        InvalidRewardError: the network is none, or has no parameters.

    Returns:
        A function from inputs ``[..., D]`` to ``[*batch, ..., outputs]``; in a plate, one network for each of its
        members.

    Example:
        >>> network = torch.nn.Linear(4, 1)  # of three coordinates of a state and one of an action
        >>> net = pirl.lifted_network("network", network)  # in a model: samples "network_weight" and "network_bias"
        >>> reward = lambda states, actions: net(torch.cat([states, actions], -1)).squeeze(-1)
        >>> reward(torch.zeros(8, 3), torch.ones(8, 1)).shape
        torch.Size([8])
    """
    if not isinstance(name, str) or not isinstance(network, nn.Module):
        kinds = f"{type(name).__name__} and {type(network).__name__}"
        raise InvalidRewardError(f"name and network are {kinds}: give a string, then a torch.nn.Module")
    values = dict(network.named_parameters())
    own = [n for n, module in network.named_modules() if next(module.parameters(recurse=False), None) is not None]
    if not own:
        raise InvalidRewardError("the network has no parameters to put priors on")
    fixed: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for parameter, value in values.items():
        if last_layer and parameter.rpartition(".")[0] != own[-1]:
            fixed[parameter] = value.detach()
            continue
        inputs = value[0].numel() if value.dim() > 1 else 1
        zero = torch.zeros_like(value, requires_grad=False)
        prior = dist.Normal(zero, scale / math.sqrt(inputs)).to_event(value.dim())
        weights[parameter] = pyro.sample(f"{name}_{parameter.replace('.', '_')}", prior, infer={"identified": False})
    batches = [weights[parameter].shape[: -values[parameter].dim() or None] for parameter in weights]
    batch = torch.broadcast_shapes(*batches)

    def call(inputs: Tensor) -> Tensor:
        def one(given: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(network, {**fixed, **given}, (inputs,))

        if not batch:
            return one(weights)
        flat = {k: v.expand(*batch, *values[k].shape).reshape(-1, *values[k].shape) for k, v in weights.items()}
        return torch.func.vmap(one)(flat).unflatten(0, batch)

    return call


def lifted_reward(
    name: str, network: nn.Module, features: Tensor, scale: float = 1.0, last_layer: bool = False
) -> Float[Tensor, "*batch S A"]:
    """The reward of a network with priors on its parameters: :func:`neural_reward` of a :func:`lifted_network`.

    Args:
        network: any module, from ``[S, D]`` to ``[S, 1]`` or ``[S, A]``, or as in :func:`neural_reward`.
        features: ``[S, D]`` or ``[S, A, D]``.
        name, scale, last_layer: of :func:`lifted_network`.

    Returns:
        ``[*batch, S, 1]`` or ``[*batch, S, A]``; in a plate, one network for each of its members.

    Raises:
        InvalidRewardError: the shapes do not fit.

    Example:
        >>> def model(demos, mdp, features, network):
        ...     reward = pyro.deterministic("reward", pirl.lifted_reward("network", network, features))
        ...     with pyro.plate("episode", len(demos)):
        ...         law = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
        ...         pyro.sample("trajectories", law, obs=demos.as_tensor())
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
        >>> sorted(pyro.poutine.trace(model).get_trace(demos, mdp, features, network).stochastic_nodes)
        ['episode', 'network_0_bias', 'network_0_weight', 'network_2_bias', 'network_2_weight']
    """
    return neural_reward(lifted_network(name, network, scale, last_layer), features)


def expected_reward(reward_sas: Tensor, transition: Tensor) -> Float[Tensor, "*batch S A"]:
    """Mean of r(s, a, s') over the next state: sum over s' of P(s'|s,a) r(s, a, s').

    Right for the causal reading of exp(r) only, whose soft Bellman equation is linear in the reward. The trajectory
    reading needs E exp(r), which is more than exp(E r) wherever the reward depends on chance.

    Args:
        reward_sas: ``[*batch, S, A, S]``.
        transition: dense ``[S, A, S]``, or sparse ``[S * A, S]`` with row ``s * A + a``.

    Raises:
        InvalidRewardError: the shapes or types do not fit.

    Example:
        >>> expected_reward(torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]), torch.full((2, 1, 2), 0.5))
        tensor([[2.],
                [0.]])
    """
    dense = transition.layout == torch.strided
    num_states = transition.shape[-1]
    table = tuple(transition.shape) if dense else (num_states, transition.shape[0] // num_states, num_states)
    if reward_sas.shape[-3:] != table:
        raise InvalidRewardError(
            f"reward_sas has shape {tuple(reward_sas.shape)}; expected [*batch, S, A, S] = {table}"
        )
    _require_same(transition, reward_sas, "reward_sas")
    if dense:
        return (reward_sas * transition).sum(dim=-1)
    entries = transition.to_sparse_coo().coalesce()
    row, column = entries.indices()
    weighted = reward_sas.flatten(-3, -2)[..., row, column] * entries.values()
    reward = weighted.new_zeros(*reward_sas.shape[:-3], transition.shape[0]).index_add(-1, row, weighted)
    return reward.unflatten(-1, table[:2])


def _require_same(reference: Tensor, other: Tensor, name: str) -> None:
    if not other.is_floating_point() or other.dtype != reference.dtype or other.device != reference.device:
        raise InvalidRewardError(
            f"{name}: got {other.dtype} on {other.device}; expected floating {reference.dtype} on {reference.device}"
        )
