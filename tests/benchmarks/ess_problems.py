"""The three posteriors of ess_per_second.py, each written twice: with pirl, and by hand for the other samplers.

By hand, a posterior is a function of one unconstrained vector z: a prior, a reward of every state and action, and the
log-likelihood sum n(s,a) log pi(a|s) of how often actions were taken, by decisions to go where the horizon is finite.
Every sampler gets these counts, not the demonstrations: the cost of a gradient does not grow with their number.
:func:`check` demands that all forms have the same log density and the same gradients as pirl's own potential.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pirl
from models import bus_engine, gridworld
from pirl.datasets import simulate
from pirl.infer.potential import Potential

GOAL, REWARD_SD = 10.0, 10.0
_NEWTON_STEPS = 12  # of the naive form, which does not look whether it has converged: as many as any reward needed


@dataclass(frozen=True, eq=False)
class Problem:
    """A posterior. ``log_prior`` and ``reward`` take (array namespace, z), the namespace being torch or jax.numpy."""

    model: Callable[..., None]
    arguments: dict[str, Any]
    counts: np.ndarray  # [S, A], or [K, S, A] by decisions to go, the last decision first
    size: int
    log_prior: Callable[[Any, Any], Any]  # with the Jacobian of the map from z
    reward: Callable[[Any, Any], Any]  # [S, A] or [S, 1]
    constrain: Callable[[np.ndarray], np.ndarray] = lambda z: z

    @property
    def mdp(self) -> pirl.TabularMDP:
        return self.arguments["mdp"]


def gridworld_problem() -> Problem:
    """models/gridworld.py as it stands: 8 weights of a 10x10 grid, 20 decisions, 50 demonstrations."""
    arguments = gridworld.load()
    features = arguments["features"].numpy()
    table = arguments["demos"].as_tensor().numpy()
    counts = np.zeros((arguments["mdp"].horizon, *arguments["mdp"].available.shape))
    for episode in table:
        for step, (state, action) in enumerate(episode[:-1]):
            counts[len(counts) - 1 - step, state, action] += 1
    return Problem(
        gridworld.model,
        arguments,
        counts,
        features.shape[1],
        log_prior=lambda xp, z: -0.5 * ((z / gridworld.PRIOR_SD) ** 2).sum(),
        reward=lambda xp, z: (xp.asarray(features) @ z)[:, None],
    )


def states_problem() -> Problem:
    """A reward for each of 144 states, Normal(0, 10), from 50 decisions; discount .9, no horizon.

    The demonstrator, soft-optimal for a reward of 10 in one corner, is watched five times for ten decisions.
    """
    mdp = pirl.envs.gridworld(12, 12, slip=0.1, discount=0.9)
    goal = torch.zeros(mdp.num_states, dtype=mdp.dtype)
    goal[-1] = GOAL
    demos = simulate(mdp, goal, num_episodes=5, length=10)
    states, actions = demos.as_tensor()[:, :-1].reshape(-1, 2).T.numpy()
    counts = np.zeros(mdp.available.shape)
    np.add.at(counts, (states, actions), 1)
    return Problem(
        states_model,
        {"demos": demos, "mdp": mdp},
        counts,
        mdp.num_states,
        log_prior=lambda xp, z: -0.5 * ((z / REWARD_SD) ** 2).sum(),
        reward=lambda xp, z: z[:, None],
    )


def states_model(demos: pirl.Trajectories, mdp: pirl.TabularMDP) -> None:
    prior = dist.Normal(0.0, REWARD_SD).expand([mdp.num_states]).to_event(1)
    reward = pirl.tabular_reward(pyro.sample("reward", prior, infer={"dims": ["state"]}))
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def bus_problem() -> Problem:
    """models/bus_engine.py of group 4: two costs with uniform priors, 90 states, discount .9999."""
    arguments = bus_engine.load(group="4")
    low, high = np.array(list(arguments["bounds"].values())).T
    replaced = arguments["replaced"].sum(0).numpy()
    state = np.arange(len(replaced), dtype=float)

    def reward(xp: Any, z: Any) -> Any:
        replacement, theta11 = xp.asarray(low) + xp.asarray(high - low) / (1 + xp.exp(-z))
        running = -0.001 * theta11 * xp.asarray(state)
        return xp.stack([running, -replacement * xp.ones_like(running)], -1)

    def log_prior(xp: Any, z: Any) -> Any:
        return -(xp.logaddexp(xp.zeros_like(z), z) + xp.logaddexp(xp.zeros_like(z), -z)).sum()

    return Problem(
        bus_engine.model,
        arguments,
        np.stack([arguments["months"].sum(0).numpy() - replaced, replaced], -1),
        len(low),
        log_prior,
        reward,
        constrain=lambda z: low + (high - low) / (1 + np.exp(-z)),
    )


PROBLEMS = {"gridworld": gridworld_problem, "states": states_problem, "bus": bus_problem}


# --------------------------------------------------------------------------------------------------- by hand, in torch


def naive_log_density(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    """Soft Bellman recursion over a dense table, left to autograd; without a horizon, Newton steps, unrolled.

    (Value iteration at the bus engines' discount would take some 100,000 steps, each of them recorded.)
    """
    mdp, counts = problem.mdp, torch.from_numpy(problem.counts)
    table = mdp.discount * mdp.transition
    eye = torch.eye(mdp.num_states, dtype=mdp.dtype)

    def log_density(z: torch.Tensor) -> torch.Tensor:
        base = problem.reward(torch, z) + mdp.log_prior
        total, value = problem.log_prior(torch, z), torch.zeros_like(base[:, 0])
        for n in counts if mdp.horizon else [None] * _NEWTON_STEPS + [counts]:
            q = base + torch.einsum("sat,t->sa", table, value)
            best = torch.logsumexp(q, -1)
            policy = q - best[:, None]
            if n is not None:
                total, value = total + (n * policy).sum(), best
            else:
                value = value + torch.linalg.solve(eye - torch.einsum("sat,sa->st", table, policy.exp()), best - value)
        return total

    return log_density


# ------------------------------------------------------------------------------------------------------------- in JAX


def jax_log_density(problem: Problem, form: str) -> Callable[[Any], Any]:
    """The same in JAX. Forms: "dense" or "gather" (of a state's few neighbours), and without a horizon "newton".

    Actions come before states, so that sums over a few actions run along many states, which XLA likes better. A finite
    horizon is one scan. Without one, "dense" and "gather" iterate values and "newton" solves a dense system, all to
    pirl's tolerance; the gradient is implicit, by one solve.
    """
    import jax
    import jax.numpy as jnp

    mdp, counts = problem.mdp, jnp.asarray(problem.counts.swapaxes(-1, -2))
    dense = mdp.discount * mdp.transition.numpy()
    neighbour, probability = (jnp.asarray(x) for x in neighbours(dense))
    table, log_prior, eye = jnp.asarray(dense.swapaxes(0, 1)), jnp.asarray(mdp.log_prior.numpy().T), jnp.eye(len(dense))

    def backup(base: Any, value: Any) -> tuple[Any, Any]:
        """Values [S] after one step, and log policy [A, S]."""
        if form == "gather":
            q = base + (probability * value[neighbour][:, None]).sum(0)
        else:
            q = base + (table.reshape(-1, len(value)) @ value).reshape(base.shape)
        top = jax.lax.stop_gradient(q.max(0))
        best = top + jnp.log(jnp.exp(q - top).sum(0))
        return best, q - best

    def step(base: Any, value: Any, n: Any) -> tuple[Any, Any]:
        best, log_policy = backup(base, value)
        return best, (n * log_policy).sum()

    def system(log_policy: Any) -> Any:
        return eye - jnp.einsum("as,ast->st", jnp.exp(log_policy), table)

    @jax.custom_vjp
    def fixed_point(base: Any) -> Any:
        largest = jnp.abs(base).max()

        def improve(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            value, _, steps = state
            best, log_policy = backup(base, value)
            change = best - value
            rounding = 64 * jnp.finfo(best).eps * (jnp.maximum(jnp.abs(value).max(), largest) + 1)
            met = ~(jnp.abs(change).max() > rounding)  # NaN will not become better
            if form == "newton":
                best = jnp.where(met, best, value + jnp.linalg.solve(system(log_policy), change))
            return best, met, steps + 1

        def going(state: tuple[Any, Any, Any]) -> Any:
            return ~state[1] & (state[2] < (100 if form == "newton" else 10_000))

        value, met, _ = jax.lax.while_loop(going, improve, (jnp.zeros(len(dense)), False, 0))
        return jnp.where(met, value, jnp.nan)

    def forward(base: Any) -> tuple[Any, Any]:
        value = fixed_point(base)
        return value, (base, value)

    def backward(saved: tuple[Any, Any], cotangent: Any) -> tuple[Any]:
        log_policy = backup(*saved)[1]
        return (jnp.linalg.solve(system(log_policy).T, cotangent) * jnp.exp(log_policy),)

    fixed_point.defvjp(forward, backward)

    def log_density(z: Any) -> Any:
        base = problem.reward(jnp, z).T + log_prior
        if mdp.horizon:
            data = jax.lax.scan(partial(step, base), jnp.zeros(len(dense)), counts)[1].sum()
        else:
            data = step(base, fixed_point(base), counts)[1]
        return problem.log_prior(jnp, z) + data

    return log_density


def neighbours(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [K, S] of the states that can follow a state, whatever the action, and their probabilities [K, A, S]."""
    reached = (table > 0).any(1)
    neighbour = np.argsort(~reached, axis=-1, kind="stable")[:, : reached.sum(-1).max()]
    probability = np.take_along_axis(table, np.repeat(neighbour[:, None], table.shape[1], 1), -1)
    return neighbour.T, probability.transpose(2, 1, 0)


# --------------------------------------------------------------------------------------------------------- same target?


def check(problem: Problem, forms: list[str], points: int = 4) -> float:
    """Largest relative difference from pirl's log density (up to its constant) and gradient; raises beyond 1e-8."""
    potential = Potential(problem.model, (), problem.arguments)
    z = torch.empty(points, problem.size, dtype=torch.float64).uniform_(
        -2, 2, generator=torch.Generator().manual_seed(1)
    )
    exact = [energy_and_slope(lambda x: -potential(potential.unflatten(x)), x) for x in z]
    naive = naive_log_density(problem)
    found = {"naive": [energy_and_slope(naive, x) for x in z]}
    if forms:
        import jax

        for form in forms:
            value_and_grad = jax.jit(jax.value_and_grad(jax_log_density(problem, form)))
            found[form] = [tuple(np.asarray(part) for part in value_and_grad(x.numpy())) for x in z]
    worst = 0.0
    for form, values in found.items():
        for (value, slope), (value_pirl, slope_pirl) in zip(values, exact, strict=True):
            offset = (values[0][0] - exact[0][0]) - (value - value_pirl)
            scale = max(1.0, abs(float(value_pirl)), float(np.abs(slope_pirl).max()))
            error = max(abs(float(offset)), float(np.abs(slope - slope_pirl).max())) / scale
            worst = max(worst, error)
            if not error < 1e-8:
                raise AssertionError(f"form {form!r} is not pirl's density: relative difference {error:.1e}")
    return worst


def energy_and_slope(function: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> tuple[float, np.ndarray]:
    leaf = z.clone().requires_grad_()
    value = function(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), slope.numpy()
