"""Offline reward learning: an approximate reward posterior from demonstrations alone, without dynamics or simulator.

Two networks learn together: Q(s,a), whose softmax explains the decisions, and an encoder q(r|s,a), a normal law of each
pair's reward. A temporal difference of Q says which reward Q stands for (Chan and van der Schaar 2021,
arXiv 2102.06483). Maximised, as a mean over demonstrated decisions, is

    log softmax(Q(s,.) / temperature)[a]  -  KL(q(r|s,a) || N(0, prior_scale^2))
        +  td_weight * log q(r = Q(s,a) - discount * Q(s',a') | s,a)

where (s',a') is the demonstration's next decision. See :func:`offline_posterior` for what this is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.continuous import ContinuousTrajectories
from pirl.errors import (
    InvalidTrajectoriesError,
    NonFiniteError,
    OptionError,
    check_counts,
    check_generator,
    check_numbers,
    form,
)
from pirl.simulators.protocols import Generator, check_demonstrations
from pirl.trajectories import Trajectories

_SMALLEST_SD = 1e-3  # in units of prior_scale: log q has no upper bound without it

Layers = list[tuple[Tensor, Tensor]]


# ------------------------------------------------------------------------------------------------ the objective's terms


def policy_term(
    q: Float[Tensor, "*batch A"], actions: Int[Tensor, "*batch"], temperature: float = 1.0
) -> Float[Tensor, "*batch"]:
    """log softmax(Q / temperature) at the actions taken."""
    return torch.log_softmax(q / temperature, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def kl_to_prior(
    mean: Float[Tensor, "*batch"], sd: Float[Tensor, "*batch"], prior_scale: float = 1.0
) -> Float[Tensor, "*batch"]:
    """KL(N(mean, sd^2) || N(0, prior_scale^2))."""
    return math.log(prior_scale) - sd.log() + (sd.square() + mean.square()) / (2 * prior_scale**2) - 0.5


def td_term(
    mean: Float[Tensor, "*batch"],
    sd: Float[Tensor, "*batch"],
    value: Float[Tensor, "*batch"],
    following: Float[Tensor, "*batch"],
    discount: float,
) -> Float[Tensor, "*batch"]:
    """log N(value - discount * following; mean, sd^2): how well the reward fits what Q loses in a step."""
    error = (value - discount * following - mean) / sd
    return -0.5 * error.square() - sd.log() - 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------------------- the answer


@dataclass(frozen=True, eq=False)
class OfflinePosterior:
    """What :func:`offline_posterior` learned: laws of rewards, and the demonstrator's policy.

    It is itself that policy, as a :class:`pirl.simulators.Policy`.
    States are vectors ``[*batch, ds]``, or numbers ``[*batch]`` where the demonstrations are tabular; actions are whole
    numbers ``[*batch]`` (or ``[*batch, 1]`` beside vectors). Answers are of the demonstrations' precision, though the
    networks are in float32.

    Attributes:
        num_actions: A.
        history: by name, the objective and its terms ("objective", "policy", "kl", "td") at each step
            ``[num_steps]``, of its batch.

    Example:
        >>> found = offline_posterior(demos, num_actions=5, num_states=25, num_steps=20)
        >>> states = torch.arange(25)
        >>> found.log_policy(states).shape, found.greedy(states).shape
        (torch.Size([25, 5]), torch.Size([25]))
        >>> found.history["objective"].shape
        torch.Size([20])
    """

    num_actions: int
    history: Mapping[str, Tensor]
    _embed: Callable[[Tensor], Tensor] = field(repr=False)
    _q: Layers = field(repr=False)
    _encoder: Layers = field(repr=False)
    _options: _Options = field(repr=False)
    _dtype: torch.dtype = field(repr=False)

    def __repr__(self) -> str:
        steps = len(self.history["objective"])
        return f"OfflinePosterior({self.num_actions} actions, {steps} steps, variational: a first look)"

    @torch.no_grad()
    def reward(self, states: Tensor, actions: Tensor) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Mean and standard deviation of q(r|s,a) ``[*batch]`` each."""
        x = self._embed(states)
        chosen = _numbered(actions, x.shape[:-1], self.num_actions)
        mean, sd = _encode(self._encoder, x, chosen, self._options)
        return mean.to(self._dtype), sd.to(self._dtype)

    def reward_draws(
        self, states: Tensor, actions: Tensor, num: int, generator: Generator = None
    ) -> Float[Tensor, "num *batch"]:
        """Draws of q(r|s,a), independent of each other, between pairs as well: q knows no correlation."""
        check_counts(1, num=num)
        check_generator(generator)
        mean, sd = self.reward(states, actions)
        noise = torch.randn(num, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + sd * noise

    @torch.no_grad()
    def log_policy(self, states: Tensor) -> Float[Tensor, "*batch A"]:
        """log pi(a|s) = log softmax(Q(s,.) / temperature), normalised."""
        q = _forward(self._q, self._embed(states)).to(self._dtype)
        return torch.log_softmax(q / self._options.temperature, -1)

    def greedy(self, states: Tensor) -> Int[Tensor, "*batch"]:
        """The most likely action."""
        return self.log_policy(states).argmax(-1)

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Int[Tensor, " n"]:
        """Actions ``[n]``; the step does not matter."""
        return torch.multinomial(self.log_policy(states).exp(), 1, generator=generator).squeeze(-1)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log pi(a|s); the step does not matter."""
        log_policy = self.log_policy(states)
        chosen = _numbered(actions, log_policy.shape[:-1], self.num_actions)
        return log_policy.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


class _Options(NamedTuple):
    discount: float
    temperature: float
    td_weight: float
    prior_scale: float
    state_reward: bool


def offline_posterior(
    demos: ContinuousTrajectories | Trajectories,
    num_actions: int,
    *,
    num_states: int | None = None,
    terminated: Any = None,
    discount: float = 0.99,
    hidden: Sequence[int] = (64, 64),
    temperature: float = 1.0,
    td_weight: float = 1.0,
    prior_scale: float = 1.0,
    num_steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    state_reward: bool = False,
    seed: int = 0,
) -> OfflinePosterior:
    """Learn a reward's approximate posterior, and a policy, from demonstrations and nothing else.

    What this is not. The approximation is variational and amortised: one network gives a normal law for every pair,
    without correlations, and the maximum of an objective (module docstring) in which Q is a point estimate is no
    Bayesian posterior of a generative model. Pairs far from the demonstrations are in neither the KL nor the TD term:
    there the answer does not return to the prior, it is the networks' extrapolation and nothing else. Standard
    deviations are not calibrated. At a pair whose TD is steady and less than ``prior_scale`` in size, the best one is
    near ``prior_scale * sqrt(1 - td_weight)``; for ``td_weight`` >= 1 it is zero (1e-3 ``prior_scale`` is the least
    allowed), and how small it gets is a matter of ``num_steps``. Where dynamics or a simulator are known, use
    :func:`pirl.fit`.

    Args:
        demos: with numbered actions. Vector states are standardised by their mean and deviation over the decisions;
            tabular states are one-hot.
        num_actions: A.
        num_states: S, of tabular demonstrations only.
        terminated: which episodes ended in a terminal state, one bool for all or ``[N]``: after their last decision Q
            is 0, while that of others has no TD term. By default what the ``ends`` of tabular demonstrations say, and
            False for vectors. A reward of the terminal state itself counts to the pair before it.
        discount: of the TD term, from 0 to 1.
        hidden: widths of both networks' layers.
        temperature: of the demonstrator's softmax; beta = 1 / temperature.
        td_weight: weight of the TD term, which also moves Q, away from what explains the decisions best: where next
            states are noisy, less of it (0.1 to 0.5) gives a better policy and larger deviations.
        prior_scale: standard deviation of the prior over each pair's reward.
        num_steps: of Adam.
        batch_size: decisions drawn a step, with replacement; all of them, where there are no more.
        learning_rate: of Adam.
        state_reward: r(s) in place of r(s,a).
        seed: of initial weights and batches. Torch's own generator is neither used nor moved.

    All networks and their training are in float32, whatever the precision of the demonstrations.

    Raises:
        InvalidTrajectoriesError: no decisions, or actions (states) that are not numbers from 0 to A - 1 (S - 1).
        OptionError: an option is out of range or not finite.
        NonFiniteError: training diverged.

    Example:
        >>> demos = pirl.ContinuousTrajectories(torch.randn(5, 11, 3), torch.randint(2, (5, 10)))
        >>> found = offline_posterior(demos, 2, num_steps=10)
        >>> mean, sd = found.reward(demos.states[:, :-1], demos.actions)
        >>> mean.shape
        torch.Size([5, 10])
    """
    options = _Options(discount, temperature, td_weight, prior_scale, state_reward)
    check_demonstrations(demos)
    _check(options, num_actions, hidden, num_steps, batch_size, learning_rate)
    check_counts(0, seed=seed)
    data = _decisions(demos, num_actions, num_states, terminated)
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = data.inputs.shape[-1], 1 if state_reward else num_actions
    q = _layers([inputs, *hidden, num_actions], generator, demos.device)
    encoder = _layers([inputs, *hidden, 2 * outputs], generator, demos.device)
    optimizer = torch.optim.Adam([x for layer in q + encoder for x in layer], lr=learning_rate)
    count = len(data.actions)
    trace = torch.zeros(num_steps, 4)
    for step in range(num_steps):
        batch = data
        if batch_size < count:
            rows = torch.randint(count, (batch_size,), generator=generator).to(demos.device)
            batch = _Decisions(*(x[rows] for x in data))
        terms = _terms(q, encoder, batch, options)
        optimizer.zero_grad()
        (-terms[0]).backward()
        optimizer.step()
        trace[step] = terms.detach().cpu()
        if not math.isfinite(float(trace[step, 0])):
            raise NonFiniteError(f"the objective is {float(trace[step, 0])} at step {step}: lower learning_rate")
    q, encoder = ([(w.detach(), b.detach()) for w, b in network] for network in (q, encoder))
    history = dict(zip(("objective", "policy", "kl", "td"), trace.unbind(-1), strict=True))
    dtype = demos.dtype if isinstance(demos, ContinuousTrajectories) else torch.float64
    return OfflinePosterior(num_actions, history, _embedding(demos, num_states), q, encoder, options, dtype)


# -------------------------------------------------------------------------------------------------------------- inside


class _Decisions(NamedTuple):
    """Every decision of every episode, one row each."""

    inputs: Float[Tensor, "n inputs"]
    actions: Int[Tensor, " n"]
    next_inputs: Float[Tensor, "n inputs"]
    next_actions: Int[Tensor, " n"]
    followed: Bool[Tensor, " n"]
    """Another decision follows."""
    ends: Bool[Tensor, " n"]
    """The last one of a terminated episode."""


def _terms(q: Layers, encoder: Layers, batch: _Decisions, options: _Options) -> Float[Tensor, "4"]:
    """Objective, and its terms, as means over the batch's decisions."""
    values = _forward(q, batch.inputs)
    value = values.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    following = _forward(q, batch.next_inputs).gather(-1, batch.next_actions.unsqueeze(-1)).squeeze(-1)
    mean, sd = _encode(encoder, batch.inputs, batch.actions, options)
    policy = policy_term(values, batch.actions, options.temperature).mean()
    kl = kl_to_prior(mean, sd, options.prior_scale).mean()
    td = td_term(mean, sd, value, following * batch.followed, options.discount)
    td = (td * (batch.followed | batch.ends)).mean()
    return torch.stack([policy - kl + options.td_weight * td, policy, kl, td])


def _encode(encoder: Layers, inputs: Tensor, actions: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    mean, raw = _forward(encoder, inputs).chunk(2, -1)
    at = torch.zeros_like(actions) if options.state_reward else actions
    mean, raw = (x.gather(-1, at.unsqueeze(-1)).squeeze(-1) for x in (mean, raw))
    return options.prior_scale * mean, options.prior_scale * (torch.nn.functional.softplus(raw) + _SMALLEST_SD)


def _forward(layers: Layers, x: Tensor) -> Tensor:
    for weight, bias in layers[:-1]:
        x = torch.nn.functional.elu(torch.nn.functional.linear(x, weight, bias))
    return torch.nn.functional.linear(x, *layers[-1])


def _layers(sizes: Sequence[int], generator: torch.Generator, device: torch.device) -> Layers:
    """Uniform weights of deviation 1 / sqrt(3 * inputs), from a generator of our own."""

    def draw(*shape: int) -> Tensor:
        uniform = 2 * torch.rand(*shape, generator=generator, dtype=torch.float32) - 1
        return (uniform / math.sqrt(shape[-1])).to(device).requires_grad_()

    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return [(draw(n, m), torch.zeros(n, device=device, dtype=torch.float32, requires_grad=True)) for m, n in pairs]


def _embedding(demos: ContinuousTrajectories | Trajectories, num_states: int | None) -> Callable[[Tensor], Tensor]:
    """What the networks see of states."""
    if isinstance(demos, Trajectories):
        size = int(num_states or 0)

        def one_hot(states: Tensor) -> Tensor:
            whole = isinstance(states, Tensor) and not states.is_floating_point()
            if not whole or bool(((states < 0) | (states >= size)).any()):
                raise InvalidTrajectoriesError(f"states must be whole numbers from 0 to {size - 1}")
            return torch.nn.functional.one_hot(states, size).float()

        return one_hot
    seen = demos.states[:, :-1][demos.acting].double()
    centre, scale = seen.mean(0), seen.std(0, unbiased=False)
    scale = torch.where(scale > 0, scale, 1.0)

    def standardised(states: Tensor) -> Tensor:
        real = isinstance(states, Tensor) and states.is_floating_point()
        if not real or states.shape[-1:] != centre.shape:
            raise InvalidTrajectoriesError(f"states are {form(states)}; expected vectors of size {len(centre)}")
        return ((states.double() - centre) / scale).float()

    return standardised


def _decisions(
    demos: ContinuousTrajectories | Trajectories, num_actions: int, num_states: int | None, terminated: Any
) -> _Decisions:
    tabular = isinstance(demos, Trajectories)
    if num_states is not None:
        check_counts(1, num_states=num_states)
    if tabular != (num_states is not None):
        raise OptionError(f"num_states is {num_states}; tabular demonstrations need a number, and vectors None")
    if not bool((demos.lengths > 0).any()):
        raise InvalidTrajectoriesError("no decision was demonstrated: there is nothing to learn from")
    states = demos.states  # tabular padding is -1, in states as in actions
    width = int(demos.lengths.max())
    acting = torch.arange(width, device=demos.device) < demos.lengths.unsqueeze(1)
    acted = demos.actions[:, :width] if tabular else _scalars(demos.actions)[:, :width]
    wrong = acting & ((acted != acted.round()) | (acted < 0) | (acted >= num_actions))
    if bool(wrong.any()):
        n, t = wrong.nonzero()[0].tolist()
        raise InvalidTrajectoriesError(
            f"trajectory {n}, step {t}: action {float(acted[n, t]):g} is no whole number from 0 to {num_actions - 1}"
        )
    if terminated is None:
        terminated = [end == "terminated" for end in demos.ends] if isinstance(demos, Trajectories) else False
    try:
        ended = torch.as_tensor(terminated, device=demos.device)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(f"terminated is {form(terminated)}; expected one bool, or {len(demos)}") from None
    if ended.dtype != torch.bool or ended.shape not in ((), (len(demos),)):
        raise OptionError(f"terminated is {ended.dtype} {tuple(ended.shape)}; expected one bool, or {len(demos)}")
    followed = torch.cat([acting[:, 1:], torch.zeros_like(acting[:, :1])], 1)
    # A successor that does not count is the decision itself.
    step = torch.arange(width, device=demos.device)
    after = torch.where(followed, step + 1, step)
    row = torch.arange(len(demos), device=demos.device).unsqueeze(1)
    embed, acted = _embedding(demos, num_states), torch.where(acting, acted, 0).long()
    last = acting & ~followed & ended.reshape(-1, 1)
    return _Decisions(
        embed(states[:, :width][acting]),
        acted[acting],
        embed(states[row, after][acting]),
        acted[row, after][acting],
        followed[acting],
        last[acting],
    )


def _scalars(actions: Float[Tensor, "N T da"]) -> Float[Tensor, "N T"]:
    if actions.shape[-1] != 1:
        raise InvalidTrajectoriesError(f"actions are vectors of size {actions.shape[-1]}: expected whole numbers")
    return actions.squeeze(-1)


def _numbered(actions: Tensor, batch: Sequence[int], num_actions: int) -> Int[Tensor, "*batch"]:
    if not isinstance(actions, Tensor):
        raise InvalidTrajectoriesError(f"actions are {form(actions)}: expected a tensor of whole numbers")
    if actions.shape == (*batch, 1):
        actions = actions.squeeze(-1)
    wrong = (actions != actions.round()) | (actions < 0) | (actions >= num_actions)
    if actions.shape != tuple(batch) or bool(wrong.any()):
        raise InvalidTrajectoriesError(
            f"actions must be whole numbers from 0 to {num_actions - 1}, one for each of the states {tuple(batch)}"
        )
    return actions.long()


def _check(
    options: _Options, num_actions: int, hidden: Sequence[int], num_steps: int, batch_size: int, learning_rate: float
) -> None:
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise OptionError(f"hidden is {hidden!r}: give the widths of all layers, such as (64, 64)")
    check_counts(1, num_actions=num_actions, num_steps=num_steps, batch_size=batch_size)
    for width in hidden:
        check_counts(1, hidden=width)
    check_numbers(0.0, 1.0, discount=options.discount)
    check_numbers(0.0, td_weight=options.td_weight)
    check_numbers(
        0.0, within=True, temperature=options.temperature, prior_scale=options.prior_scale, learning_rate=learning_rate
    )
