"""Adversarial IRL by single decisions (Fu, Luo and Levine 2018): a reward network, a policy network, and a simulator.

A discriminator between the demonstrators' transitions and the policy's has the form

    D(s, a, s') = exp f / (exp f + pi(a|s)),        f(s, a, s') = r(s, a) + g h(s') - h(s),

with pi(a|s) known, so that log D - log(1 - D) = f - log pi(a|s). The policy maximises the expected sum of just that: r
plus entropy, the MaxEnt-RL problem (h changes nothing there). Where both are at their optimum D is 1/2, exp f is the
demonstrators' policy, and f their advantage: r then explains it up to a potential. A point estimate, never a posterior.

Episodes are of one length, that of the demonstrations, whatever happens in them: no sign of the reward, and no length,
says who played.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from pirl.continuous import ContinuousTrajectories
from pirl.errors import HorizonError, InvalidTrajectoriesError, OptionError, check_counts, check_numbers, form
from pirl.simulators import Policy

_FARTHEST = 10.0
"""Standardised inputs are cut here: a policy may go where no demonstration says how far far is."""


@runtime_checkable
class MaxEntLearner(Protocol):
    """What learns policies, such as :class:`pirl.stable_baselines.StableBaselines`."""

    horizon: int
    """T, decisions of an episode."""
    discount: float
    """g."""
    num_actions: int | None
    """None: actions are vectors."""

    @property
    def steps_taken(self) -> int:
        """Decisions so far."""

    def played(self) -> Sequence[tuple[Policy, Any]]:
        """What was done in the last :meth:`improve`, by whom: the policies, as they were when they acted, each beside
        its states ``[n, ds]``, actions, following states and ends, as a named tuple."""

    def improve(
        self,
        reward: Callable[[Tensor, Tensor], Tensor],
        num_steps: int,
        *,
        potential: Callable[[Tensor], Tensor] | None = None,
    ) -> Policy:
        """Go on learning, to maximise sum_t g^t [r + g h(s') - h(s) - log pi]."""


class Network(nn.Module):
    """A function of states, or of states and actions, standardised by the demonstrations': tanh layers, one number.

    Args:
        states: ``[n, ds]`` whose means and standard deviations are taken.
        actions: ``[n, da]`` as well; None: numbered actions, or none at all.
        num_actions: number of them, 0 without.
        hidden: widths of the layers.
    """

    def __init__(self, states: Tensor, actions: Tensor | None, num_actions: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.scales = [_scale(x) for x in (states, actions) if x is not None]
        widths = [sum(len(mean) for mean, _ in self.scales) + num_actions, *hidden, 1]
        layers: list[nn.Module] = []
        for i, (inside, outside) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [nn.Tanh()] if i else []
            layers.append(nn.Linear(inside, outside, dtype=states.dtype))
        self.layers = nn.Sequential(*layers)

    def inputs(self, states: Tensor, actions: Tensor | None = None) -> Float[Tensor, "n D"]:
        """What the first layer sees."""
        parts = [states] if actions is None or self.num_actions or len(self.scales) == 1 else [states, actions]
        seen = [
            ((x - mean) / sd).clamp(-_FARTHEST, _FARTHEST) for x, (mean, sd) in zip(parts, self.scales, strict=True)
        ]
        if self.num_actions and actions is not None:
            seen.append(one_hot(actions.reshape(len(states)).long(), self.num_actions).to(states))
        return torch.cat(seen, -1)

    def forward(self, states: Tensor, actions: Tensor | None = None) -> Float[Tensor, " n"]:
        """One number a row."""
        return self.layers(self.inputs(states, actions)).squeeze(-1)


class AdversarialReward(NamedTuple):
    """What :func:`airl` found."""

    reward: Network
    """r(states ``[n, ds]``, actions ``[n]`` or ``[n, da]``) -> ``[n]``."""
    potential: Network
    """h(states)."""
    policy: Any
    """The newest policy, which imitates."""
    history: Mapping[str, Sequence[float]]
    """By round: "loss" of the discriminator (log 4 where nothing is to be told apart), "accuracy", "entropy" of the
    policy, "environment_steps"."""
    attrs: Mapping[str, str | int | float | bool]


def airl(
    demos: ContinuousTrajectories,
    learner: MaxEntLearner,
    num_steps: int,
    *,
    state_only: bool = False,
    shaping: bool = True,
    steps_per_round: int = 2048,
    updates_per_round: int = 20,
    batch_size: int = 512,
    replay: float = 0.5,
    learning_rate: float = 1e-3,
    hidden: Sequence[int] = (32, 32),
    weight_decay: float = 0.0,
    gradient_penalty: float = 0.0,
    seed: int = 0,
) -> AdversarialReward:
    """Learn a reward and a policy from demonstrations and a simulator.

    Args:
        demos: all as long as the learner's episodes.
        learner: such as ``pirl.stable_baselines.StableBaselines(env, horizon=...)``, of temperature 1.
        num_steps: decisions in the simulator, of all rounds together; the last round is finished, so that there may be
            up to ``learner.steps_at_once - 1`` more.
        state_only: r(s) in place of r(s, a).
        shaping: learn h; else it is 0, and r alone tells the two sides apart.
        steps_per_round: decisions for which the policy is trained between two turns of the discriminator.
        updates_per_round: gradient steps of the discriminator (Adam).
        batch_size: transitions of each side in one of them.
        replay: share of the policy's side that is drawn from earlier rounds, told apart with the density of the policy
            that played them. Without it the reward forgets what the policy no longer does, and teaches no other one.
        learning_rate: of the discriminator.
        hidden: widths of the tanh layers of r and of h.
        weight_decay: ``weight_decay / 2 |parameters|^2`` is added to its loss.
        gradient_penalty: times the mean squared gradient of f by its standardised inputs, at points between the two
            sides' transitions; it keeps f from running away where the two do not meet.
        seed: of the networks and batches; the learner has its own.

    Raises:
        OptionError: an option out of range; fewer steps than the learner takes at once.
        HorizonError: demonstrations of another length than the learner's episodes.
        InvalidTrajectoriesError: actions that the learner does not have, or that its policy cannot take.
        SimulatorError: the simulator failed.

    Example:
        >>> from pirl.stable_baselines import StableBaselines
        >>> states, actions = torch.zeros(2, 11, 4), torch.zeros(2, 10)  # of an expert
        >>> learner = StableBaselines("CartPole-v1", horizon=10, n_steps=16)
        >>> found = airl(pirl.ContinuousTrajectories(states, actions), learner, 256, steps_per_round=128)
        >>> again = StableBaselines("CartPole-v1", horizon=10, n_steps=16, seed=1)  # does the reward teach another one?
        >>> policy = again.improve(found.reward, 128)
    """
    began = time.perf_counter()
    check_counts(1, num_steps=num_steps, steps_per_round=steps_per_round, updates_per_round=updates_per_round,
                 batch_size=batch_size)  # fmt: skip
    check_numbers(0.0, within=True, learning_rate=learning_rate)
    check_numbers(0.0, weight_decay=weight_decay, gradient_penalty=gradient_penalty)
    check_numbers(0.0, 1.0, below=True, replay=replay)
    _check_kinds(demos, learner)
    least = getattr(learner, "steps_at_once", 1)
    if num_steps < least:
        raise OptionError(
            f"num_steps is {num_steps}, but the learner takes {least} at once: raise it, or lower the learner's "
            "n_steps or num_envs"
        )
    temperature = getattr(learner, "temperature", 1.0)
    if temperature != 1:
        raise OptionError(
            f"the learner's temperature is {temperature}, but the discriminator knows the reward at 1: give "
            "temperature=1 (the reward of temperature T is T times what is found)"
        )
    real = _transitions(demos, learner)
    generator = torch.Generator().manual_seed(seed)
    vectors = None if state_only or learner.num_actions is not None else real.actions
    number = 0 if state_only else learner.num_actions or 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reward = Network(real.states, vectors, number, hidden)
        potential = Network(real.states, None, 0, hidden)
    for parameter in [] if shaping else potential.parameters():
        parameter.detach().zero_()
    learned = [*reward.parameters(), *(potential.parameters() if shaping else [])]
    optimizer = torch.optim.Adam(learned, learning_rate, weight_decay=weight_decay)

    def advantage(step: Step) -> Tensor:
        later = torch.where(step.ended, 0.0, potential(step.following))
        return reward(step.states, step.actions) + learner.discount * later - potential(step.states)

    def steepness(a: Step, b: Step) -> Tensor:
        """Mean squared gradient of r and of h between two batches."""
        total = torch.zeros((), dtype=demos.dtype)
        share = torch.rand(len(a.states), 1, generator=generator, dtype=demos.dtype)
        for network, ends in (
            (reward, [(x.states, x.actions) for x in (a, b)]),
            (potential, [(x.states,) for x in (a, b)]),
        ):
            one, other = (network.inputs(*x) for x in ends)
            between = (share * one + (1 - share) * other).detach().requires_grad_()
            (slope,) = torch.autograd.grad(network.layers(between).sum(), between, create_graph=True)
            total = total + slope.square().sum(-1).mean()
        return total

    history: dict[str, list[float]] = {"loss": [], "accuracy": [], "entropy": [], "environment_steps": []}
    memory: _Memory | None = None
    first, policy = learner.steps_taken, None
    while learner.steps_taken - first < num_steps:
        left = num_steps - (learner.steps_taken - first)
        policy = learner.improve(reward, min(steps_per_round, left), potential=potential)
        memory = _Memory.of(learner.played(), real, memory)
        losses, right = [], []
        for _ in range(updates_per_round):
            one, log_one, other, log_other = memory.batch(real, batch_size, replay, generator)
            yes, no = advantage(one) - log_one, advantage(other) - log_other
            loss = softplus(-yes).mean() + softplus(no).mean()
            penalty = gradient_penalty * steepness(one, other) if gradient_penalty else 0.0
            optimizer.zero_grad()
            (loss + penalty).backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            right.append(float(((yes > 0).double().mean() + (no < 0).double().mean()) / 2))
        entropy = -float(memory.log_made[memory.newest :].mean())
        numbers = (sum(losses) / len(losses), sum(right) / len(right), entropy, float(learner.steps_taken - first))
        for name, value in zip(history, numbers, strict=True):
            history[name].append(value)
    attrs = {
        "state_only": state_only,
        "shaping": shaping,
        "discount": learner.discount,
        "num_rounds": len(history["loss"]),
        "environment_steps": learner.steps_taken - first,
        "replay": replay,
        "weight_decay": weight_decay,
        "gradient_penalty": gradient_penalty,
        "seed": seed,
        "seconds": time.perf_counter() - began,
    }
    for network in (reward, potential):
        network.requires_grad_(False)
    return AdversarialReward(reward, potential, policy, history, attrs)


class Step(NamedTuple):
    """Transitions of one side."""

    states: Tensor
    actions: Tensor
    following: Tensor
    ended: Tensor

    def at(self, rows: Tensor) -> Step:
        return Step(*(x[rows] for x in self))

    def to(self, dtype: torch.dtype) -> Step:
        return Step(*(x.to(dtype) if x.is_floating_point() else x for x in self))


class _Memory(NamedTuple):
    """What all policies did, round after round, and log pi, as it was then, of it and of the demonstrations."""

    made: Step
    log_made: Float[Tensor, " n"]
    """Under the policy that did it."""
    player: Int[Tensor, " n"]
    """Which one that was."""
    log_real: Float[Tensor, "players N"]
    newest: int
    """Where the last round begins."""

    @staticmethod
    def of(played: Sequence[tuple[Policy, Any]], real: Step, before: _Memory | None) -> _Memory:
        """What was done, added to what was done before."""
        made, log_made, player, log_real = list[Step](), list[Tensor](), list[Tensor](), list[Tensor]()
        newest, players = (len(before.log_made), len(before.log_real)) if before else (0, 0)
        for policy, step in played:
            mine = Step(*step).to(real.states.dtype)
            log_mine, log_theirs = (policy.log_prob(x.states, x.actions, 0).to(x.states.dtype) for x in (mine, real))
            if not bool(log_theirs.isfinite().all()):
                worst = real.actions[~log_theirs.isfinite()][0].tolist()
                raise InvalidTrajectoriesError(
                    f"the policy can never take a demonstrated action, {worst}: cut it to the range"
                )
            made.append(mine)
            log_made.append(log_mine)
            player.append(torch.full((len(log_mine),), players + len(player)))
            log_real.append(log_theirs.unsqueeze(0))
        if before:
            made, log_made = [before.made, *made], [before.log_made, *log_made]
            player, log_real = [before.player, *player], [before.log_real, *log_real]
        steps = Step(*(torch.cat(field) for field in zip(*made, strict=True)))
        return _Memory(steps, torch.cat(log_made), torch.cat(player), torch.cat(log_real), newest)

    def batch(
        self, real: Step, size: int, replay: float, generator: torch.Generator
    ) -> tuple[Step, Tensor, Step, Tensor]:
        """Transitions of both sides, in pairs with log pi of the same policy."""
        earlier = round(replay * size) if self.newest else 0
        old = torch.randint(max(self.newest, 1), (earlier,), generator=generator)
        new = torch.randint(self.newest, len(self.log_made), (size - earlier,), generator=generator)
        i, j = torch.randint(len(real.states), (size,), generator=generator), torch.cat([old, new])
        return real.at(i), self.log_real[self.player[j], i], self.made.at(j), self.log_made[j]


def _transitions(demos: ContinuousTrajectories, learner: MaxEntLearner) -> Step:
    wrong = demos.lengths != learner.horizon
    if bool(wrong.any()):
        episode = int(wrong.nonzero()[0])
        raise HorizonError(
            f"trajectory {episode} has {int(demos.lengths[episode])} decisions, and the learner's episodes "
            f"{learner.horizon}: cut one or the other, so that length says nothing"
        )
    steps = learner.horizon
    states, following = (
        x.reshape(-1, demos.state_dim) for x in (demos.states[:, :steps], demos.states[:, 1 : steps + 1])
    )
    actions = demos.actions[:, :steps].reshape(len(states), -1)
    if learner.num_actions is not None:
        numbered = actions.squeeze(-1) if actions.shape[-1] == 1 else torch.full_like(actions[:, 0], -1)
        if not bool(torch.isin(numbered, torch.arange(learner.num_actions).to(numbered)).all()):
            raise InvalidTrajectoriesError(f"actions must be whole numbers below {learner.num_actions}, one a decision")
        actions = numbered.long()
    return Step(states, actions, following, torch.zeros(len(states), dtype=torch.bool))


def _check_kinds(demos: Any, learner: Any) -> None:
    if not isinstance(demos, ContinuousTrajectories):
        raise OptionError(
            f"demos is {form(demos)}: airl needs ContinuousTrajectories; finite problems have "
            "pirl.baselines.adversarial"
        )
    if not isinstance(learner, MaxEntLearner):
        raise OptionError(
            f"the learner is {form(learner)}, which learns no policies: give "
            "pirl.stable_baselines.StableBaselines(env, horizon=...)"
        )
    if getattr(learner, "absorb", True) is False:
        raise OptionError(
            "the learner has absorb=False: where episodes may end, the length that demonstrations all have would be "
            "taken for reward; give absorb=True"
        )


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    sd = x.std(0)
    return x.mean(0), torch.where(sd > 1e-6, sd, 1.0)
