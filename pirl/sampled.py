"""`SampledMaxEntTrajectory`: the trajectory reading of exp(r) where dynamics are known by sampling only.

p(tau | O) = p(tau) exp(sum_t r(s_t, a_t)) / Z, with log Z estimated from a pool of roll-outs that stays as it is while
a posterior is sampled. The potential is then a fixed function: NUTS and ChEES sample a well-defined approximation of
the posterior, which tends to the exact one as the pool grows. Densities are relative to p(tau), which no parameter
enters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pirl.errors import InvalidRewardError, InvalidTrajectoriesError, OptionError, form
from pirl.message_passing import is_checked
from pirl.partition import PartitionEstimate, log_mean_exp
from pirl.pool import Features, Pool, check_lengths, check_table, checked_features
from pirl.transitions import is_transformed


class FeatureReward:
    """A reward that is linear in features of states and actions: ``features(states, actions) . weights``.

    The features of a pool are summed over each sample once, so that a gradient costs one product.

    Args:
        features: a function from states ``[..., ds]`` and actions ``[..., da]`` to ``[..., K]``. Use the same function
            object each time: its sums are remembered by it.
        weights: ``[*batch, K]``.

    Raises:
        InvalidRewardError: features that are no function, or fail; weights that are no floating tensor, or of another
            width.

    Example:
        >>> def features(states, actions):
        ...     return torch.cat([states.square(), actions.square()], -1)
        >>> reward = FeatureReward(features, torch.tensor([-1.0, -0.1]))
        >>> reward(torch.ones(3, 1), torch.ones(3, 1))
        tensor([-1.1000, -1.1000, -1.1000])
    """

    def __init__(self, features: Features, weights: Float[Tensor, "*batch K"]) -> None:
        if not callable(features):
            raise InvalidRewardError(
                f"features is {form(features)}: give a function of states and actions, then weights"
            )
        if not isinstance(weights, Tensor) or weights.dim() < 1 or not weights.is_floating_point():
            raise InvalidRewardError(f"weights is {form(weights)}; expected a floating tensor [*batch, K]")
        self.features, self.weights = features, weights

    def __call__(self, states: Tensor, actions: Tensor) -> Tensor:
        """r ``[*batch, ...]`` of states ``[..., ds]`` and actions ``[..., da]``."""
        found = self.fitting(checked_features(self.features, states, actions))
        if self.weights.dim() == 1:
            return found @ self.weights
        flat = self.weights.reshape(-1, self.weights.shape[-1]) @ found.reshape(-1, found.shape[-1]).mT
        return flat.reshape(*self.weights.shape[:-1], *found.shape[:-1])

    def fitting(self, features: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """Features, or sums of them, if there are as many as weights.

        Raises:
            InvalidRewardError: there are more or fewer.
        """
        if features.shape[-1] != self.weights.shape[-1]:
            raise InvalidRewardError(
                f"the function gives {features.shape[-1]} features, and there are {self.weights.shape[-1]} weights: "
                "give one weight for each"
            )
        return features


Reward = Tensor | FeatureReward | Callable[[Tensor, Tensor], Tensor]


class SampledMaxEntTrajectory(TorchDistribution):
    """Trajectories under the trajectory reading of exp(r), with log Z estimated from a pool of samples.

    Batch shape ``[*batch, N]``, event shape ``(T + 1, 2)`` or ``(T + 1, ds + da)``: see
    :meth:`pirl.ContinuousTrajectories.as_tensor`. Every trajectory has the length of the pool's, or ended early as
    some of the pool's did: numbered ones that were cut before their end are refused, of vectors nobody can tell.
    ``log_prob`` is relative to p(tau): the density's unknown part, the dynamics, is left out.

    Args:
        pool: roll-outs (:class:`pirl.Pool`).
        reward: a table ``[*batch, S, A]`` or ``[*batch, S, 1]`` for numbered states; a :class:`FeatureReward`; or any
            function from states ``[J, T, ds]`` and actions ``[J, T, da]`` to ``[J, T]``, such as a network, or to
            ``[*batch, 1, J, T]`` where it stands for many rewards beside the plate of the trajectories.
        lengths: number of decisions of each trajectory ``[N]``.

    Raises:
        InvalidRewardError: a reward of the wrong shape, or not finite.
        HorizonError: lengths that are not the pool's.

    Example:
        >>> from pirl.simulators import TabularSimulator, base_policy, roll_out
        >>> base = base_policy(world)
        >>> pool = pirl.Pool.of(roll_out(TabularSimulator(world), base, 100), base, base)
        >>> with pyro.plate("episode", len(walks)):
        ...     law = pirl.SampledMaxEntTrajectory(pool, wanted, lengths=walks.lengths)
        ...     seen = pyro.sample("trajectories", law, obs=walks.as_tensor())
        >>> law.log_prob(walks.as_tensor()).shape
        torch.Size([20])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = False
    event_dim_names = ("step", "state_action")

    def __init__(
        self,
        pool: Pool,
        reward: Reward,
        *,
        lengths: Int[Tensor, "*batch"] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(pool, Pool):
            raise OptionError(f"pool is {form(pool)}: give a pirl.Pool of roll-outs, then the reward")
        if lengths is not None and (not isinstance(lengths, Tensor) or lengths.is_floating_point()):
            raise InvalidTrajectoriesError(f"lengths is {form(lengths)}: give whole numbers, demos.lengths")
        if not callable(reward) and (not isinstance(reward, Tensor) or not reward.is_floating_point()):
            raise InvalidRewardError(
                f"the reward is {form(reward)}: give a floating tensor, a FeatureReward, or a function"
            )
        self.pool, self.reward, self.lengths = pool, reward, lengths
        self.returns: Tensor = self._returns(None, None)  # [*batch, J]
        if is_checked(self.returns) and bool((self.returns.isnan() | (self.returns == torch.inf)).any()):
            wrong = self.returns.isnan() | (self.returns == torch.inf)
            sample = int(wrong.nonzero()[0, -1])
            raise InvalidRewardError(f"the reward of sample {sample} of the pool is not finite: rewards must be finite")
        if lengths is not None and not is_transformed(lengths):
            check_lengths(pool, lengths)
        batch = torch.broadcast_shapes(self.returns.shape[:-1], () if lengths is None else lengths.shape)
        super().__init__(batch, pool.table.shape[-2:], validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> Any:
        """Whole numbers, or real vectors."""
        return constraints.independent(constraints.integer if self.pool.tabular else constraints.real, 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SampledMaxEntTrajectory:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.broadcast_shapes(torch.Size(batch_shape), self._batch_shape)
        return new

    @property
    def log_weights(self) -> Float[Tensor, "*batch J"]:
        """log w_j = return + log p - log q of each sample of the pool, and log of what the sample counts for."""
        return self.returns + self.pool.log_offset

    @property
    def log_partition(self) -> Float[Tensor, "*batch"]:
        """log Z-hat, differentiable in the reward."""
        return log_mean_exp(self.log_weights)

    def estimate(self) -> PartitionEstimate:
        """log Z-hat with its standard error, effective sample size and Pareto k-hat."""
        return self.pool.judge(self.log_weights)

    def log_prob(self, value: Tensor) -> Float[Tensor, "..."]:
        """sum_t r(s_t, a_t) - log Z-hat of each trajectory: the log density relative to p(tau).

        Raises:
            InvalidTrajectoriesError: trajectories of another shape than the pool's.
            HorizonError: trajectories that are longer than the pool's, or were cut before their end.
            PartitionError: trajectories that no policy of the pool, or not the base measure, could have made.
        """
        if not isinstance(value, Tensor):
            raise InvalidTrajectoriesError(f"the trajectories are {form(value)}: give a tensor, demos.as_tensor()")
        if not is_transformed(value):
            check_table(self.pool, value, self.lengths)
        result = self._returns(value, self.lengths) - self.log_partition
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Samples of the pool, drawn by their weights (sampling importance resampling)."""
        weight = self.log_weights.softmax(-1)
        shape = torch.Size(sample_shape) + self.batch_shape
        cumulative = weight.cumsum(-1).expand(*self.batch_shape, -1) if weight.dim() > 1 else weight.cumsum(-1)
        uniform = torch.rand(shape, dtype=weight.dtype, device=weight.device)
        if weight.dim() == 1:
            index = torch.searchsorted(cumulative, uniform)
        else:
            index = torch.searchsorted(cumulative.expand(*shape, -1).contiguous(), uniform.unsqueeze(-1)).squeeze(-1)
        return self.pool.table[index.clamp(max=len(self.pool) - 1)]

    def _returns(self, table: Tensor | None, lengths: Tensor | None) -> Tensor:
        """sum_t r of trajectories ``[*batch, N]``; of the pool's samples, without batch alignment, if None."""
        reward, pool = self.reward, self.pool
        if isinstance(reward, Tensor):
            if not pool.tabular:
                raise InvalidRewardError("a table of rewards needs numbered states: give a function or a FeatureReward")
            rows = pool.num_states
            if reward.dim() < 2 or (rows is not None and reward.shape[-2] != rows):
                raise InvalidRewardError(
                    f"a reward {tuple(reward.shape)} does not fit the pool: it must be [*batch, {rows or 'S'}, A], or "
                    f"[*batch, {rows or 'S'}, 1]"
                )
            num_actions = reward.shape[-1]  # of r(s) one: the same for every action, whether or not the pool took it
            taken = pool.actions if table is None or is_transformed(table) else table[..., 1]
            if 1 < num_actions <= int(taken.max()):
                raise InvalidRewardError(
                    f"a reward {tuple(reward.shape)} has no entry for action {int(taken.max())}: it must be "
                    f"[*batch, {rows or 'S'}, A], or [*batch, {rows or 'S'}, 1]"
                )
            shape = (reward.shape[-2], num_actions)
            counts, used = pool.visits(table, shape)
            if int(used.max()) >= reward.shape[-2] * num_actions:
                raise InvalidRewardError(f"a reward {tuple(reward.shape)} has no row for every state of the pool")
            values = reward.flatten(-2)[..., used]
            counts = counts.to(values.dtype)
            return values @ counts.mT if table is None else (values * counts).sum(-1)
        if pool.tabular:
            raise InvalidRewardError(
                "numbered states need a table of rewards [*batch, S, A]: call the function on them"
            )
        if isinstance(reward, FeatureReward):
            sums = reward.fitting(pool.feature_sums(reward.features, table, lengths)).to(reward.weights)
            return reward.weights @ sums.mT if table is None else (reward.weights * sums).sum(-1)
        states, actions, counted = pool.decisions(table, lengths)
        gained = reward(states, actions)
        event = counted.shape[-2:]
        if not isinstance(gained, Tensor) or gained.shape[gained.dim() - len(event) :] != event:
            raise InvalidRewardError(
                f"the reward gave {form(gained)} for states {tuple(states.shape)} and actions {tuple(actions.shape)}: "
                f"expected [*batch, {', '.join(map(str, event))}], one number for each pair"
            )
        found = (gained * counted).sum(-1)
        if table is None or found.dim() <= states.dim() - 2:
            return found
        # Of a batch of rewards the dim of the plate is 1, and trajectories stand in one of their own behind it.
        if found.shape[-2] != 1:
            batch = tuple(found.shape[:-1])
            raise InvalidRewardError(
                f"a function of rewards with batch {batch} must keep a dim of 1 for the plate: let it return "
                f"[*{batch}, 1, J, T], as weights [*batch, 1, K] do"
            )
        return found.squeeze(-2)
