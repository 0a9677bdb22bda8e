"""Maximum entropy IRL: the reward that makes the demonstrations likeliest, or match their features."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pirl.baselines.estimate import PointEstimate, check_problem
from pirl.baselines.objectives import Dual, Likelihood, Objective, get_objective
from pirl.baselines.visits import feature_table
from pirl.errors import ConvergenceWarning, OptionError, first_line, warn
from pirl.mdp import TabularMDP
from pirl.message_passing import soft_policy
from pirl.rewards import linear_reward, neural_reward
from pirl.soft_values import Reading
from pirl.trajectories import Trajectories

KINDS = ("hessian", "outer_product", "sandwich", "clustered")
MOST_PARAMETERS = 300
"""Parameters up to which second derivatives are computed: to end the search by Newton steps, for standard errors."""

FEW_PARAMETERS = 50
"""Parameters up to which the search makes Newton steps from the start."""

SMALLEST_STEP = 1e-8
"""Share of a Newton step below which the search gives up."""


@dataclass(frozen=True)
class _Reward:
    """A reward as a function of one flat vector of parameters."""

    of: Callable[[Float[Tensor, " P"]], Float[Tensor, "S A"]]
    start: Float[Tensor, " P"]
    unit: Float[Tensor, " P"]
    """What a parameter is multiplied by to be searched for: the largest value of its feature."""
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    def parameters(self, vector: Tensor) -> dict[str, Tensor]:
        parts = (vector / self.unit).split([shape.numel() for shape in self.shapes])
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


def maxent(
    demos: Trajectories,
    mdp: TabularMDP,
    features: Float[Tensor, "S K"] | Float[Tensor, "S A K"],
    *,
    network: nn.Module | None = None,
    objective: str = "likelihood",
    reading: Reading = "causal",
    given_starts: bool = False,
    stopping: str | None = None,
    method: str = "quasi-newton",
    l2: float = 0.0,
    start: Tensor | None = None,
    max_iterations: int = 1000,
    tolerance: float | None = None,
    learning_rate: float = 0.1,
    standard_errors: Sequence[str] | None = None,
) -> PointEstimate:
    """Maximum entropy inverse reinforcement learning (Ziebart et al. 2008; Ziebart 2010, chapters 6 and 9).

    Each step is the lecture's: a backward pass of messages, a forward pass, the expected visits mu, and the gradient
    ``sum_i sum_t grad r - sum_t E_mu[grad r]`` (in the causal reading of a likelihood, where luck is not to be
    explained, after each transition from where it led).

    - ``objective="likelihood"``: the reward under which the demonstrations are likeliest.
    - ``objective="dual"``: the reward under which the demonstrator's policy has the demonstrations' (discounted)
      features, from the same starts: among all such policies it is the one of maximum causal entropy. In the trajectory
      reading the two are one, of given starts.

    Args:
        features: ``[S, K]`` or ``[S, A, K]``; the reward is ``features . weights``, unless a ``network`` is given.
        network: any module, as for :func:`pirl.neural_reward`; it is not changed. Its parameters are the estimates.
        given_starts: condition on the first states (trajectory reading).
        stopping: "geometric" for the trajectory reading of a discount.
        method: "quasi-newton" (Newton steps with curvature from differences of gradients; beyond 50 parameters L-BFGS
            first), or the lecture's plain "gradient"
            ascent of the mean over episodes by ``learning_rate``.
        l2: adds ``-l2 |theta|^2 / 2``, the logarithm of a Normal(0, 1/l2) prior: some directions of a reward may not
            be identified, and some rewards be infinite.
        start: first parameters; zeros for linear rewards, a network's own.
        tolerance: of the residual, the largest derivative of the objective's mean over episodes: for the dual of a
            linear reward, by how much a feature does not match, as a share of its largest value. By default the root of
            the dtype's epsilon (1.5e-8 in float64).
        standard_errors: of "hessian" (inverse of the observed information), "outer_product" (of the scores; Berndt,
            Hall, Hall and Hausman 1974), "sandwich", and "clustered" by subject (by episode if there are none). By
            default all that are defined, for linear rewards; of the dual, which is no likelihood, "sandwich" and
            "clustered" only.

    Returns:
        Parameters ("weights", or those of the network), reward and policy. ``attrs`` has "converged", "residual",
        "objective", "log_likelihood" (in the causal reading of the choices alone), "seconds", and for linear rewards
        "feature_gap": by how much the soft policy's features miss the demonstrations', an episode. ``history`` has
        "objective" and "residual" by iteration.

    Raises:
        InvalidRewardError: the shapes do not fit.
        OptionError: an option out of range, or no finite objective at the start.
        InvalidTrajectoriesError, HorizonError, DiscountError: as for the distributions.

    Example:
        >>> mdp = pirl.envs.gridworld(3, 3, horizon=5)
        >>> demos = pirl.datasets.simulate(mdp, torch.arange(9.0).double(), 20, 5)
        >>> estimate = maxent(demos, mdp, torch.arange(9.0).double()[:, None])
        >>> estimate.attrs["converged"]
        True
    """
    began = time.perf_counter()
    check_problem(demos, mdp)
    tolerance = torch.finfo(mdp.dtype).eps ** 0.5 if tolerance is None else tolerance
    _check(method, l2, max_iterations, tolerance, learning_rate, standard_errors)
    if given_starts and reading == "causal":
        raise OptionError("given_starts belongs to the trajectory reading: causal choices do not depend on p(s_1)")
    goal = get_objective(objective, demos, mdp, reading, given_starts, stopping)
    reward = _linear(features, mdp, start) if network is None else _neural(network, features, start)

    def value(theta: Tensor) -> Tensor:
        return goal(mdp.check_reward(reward.of(theta))) - 0.5 * l2 * (theta / reward.unit).square().sum()

    try:
        value(reward.start)
    except ArithmeticError as error:
        said = first_line(error)
        raise OptionError(f"there is no finite objective at the start, where {said}; give start=") from error
    search = partial(_gradient_ascent, rate=learning_rate) if method == "gradient" else _quasi_newton
    theta, history = search(value, reward.start, goal.count, max_iterations, tolerance)
    residual = history["residual"][-1]
    if not residual <= tolerance:
        warn(
            f"maxent has not converged: residual {residual:.2g} after {len(history['residual']) - 1} iterations, above "
            f"tolerance {tolerance:.2g}; raise max_iterations, or, where weights grow without end, set l2",
            ConvergenceWarning,
        )
    found = mdp.check_reward(reward.of(theta)).detach()
    kinds = _kinds(goal, network, len(theta)) if standard_errors is None else tuple(standard_errors)
    covariance = _covariances(kinds, goal, lambda t: mdp.check_reward(reward.of(t)), value, theta, demos)
    covariance = {kind: x / torch.outer(reward.unit, reward.unit) for kind, x in covariance.items()}
    fit = goal if isinstance(goal, Likelihood) else Likelihood(demos, mdp, reading)
    attrs: dict[str, Any] = {
        "objective_name": objective,
        "reading": reading,
        "method": method,
        "converged": bool(residual <= tolerance),
        "residual": residual,
        "iterations": len(history["residual"]) - 1,
        "objective": history["objective"][-1],
        "log_likelihood": float(fit.terms(found).sum()),
        "l2": float(l2),
        "num_parameters": len(theta),
    }
    if network is None:
        match = goal if reading == "trajectory" or isinstance(goal, Dual) else Dual(demos, mdp)
        slope = _gradient(lambda t: match(mdp.check_reward(reward.of(t))), theta)[1]
        attrs["feature_gap"] = float((slope * reward.unit).abs().amax()) / goal.count if len(slope) else 0.0
    attrs["seconds"] = time.perf_counter() - began
    return PointEstimate(
        name="maxent",
        parameters=reward.parameters(theta),
        reward=found,
        log_policy=soft_policy(mdp, found, reading, stopping=stopping),
        history=history,
        attrs=attrs,
        covariance=covariance,
    )


def _check(
    method: str, l2: float, max_iterations: int, tolerance: float, learning_rate: float, kinds: Sequence[str] | None
) -> None:
    if method not in ("quasi-newton", "gradient"):
        raise OptionError(f"method must be 'quasi-newton' or 'gradient', not {method!r}")
    if not l2 >= 0:
        raise OptionError(f"l2 is {l2}, but must not be negative")
    if max_iterations < 1 or not tolerance > 0 or not learning_rate > 0:
        raise OptionError("max_iterations, tolerance and learning_rate must be positive")
    if unknown := set(kinds or ()) - set(KINDS):
        raise OptionError(f"no standard errors are called {sorted(unknown)[0]!r}: choose of {', '.join(KINDS)}")


def _linear(features: Tensor, mdp: TabularMDP, start: Tensor | None) -> _Reward:
    """Features are scaled to 1 at most: what can be told of a weight must not depend on its unit."""
    unit = feature_table(features, mdp).flatten(0, 1).abs().amax(0)
    unit = torch.where(unit > 0, unit, 1.0)
    first = torch.zeros_like(unit) if start is None else start.detach().to(unit) * unit
    linear_reward(features, first)  # refuses a start that does not fit
    return _Reward(lambda theta: linear_reward(features / unit, theta), first, unit, ("weights",), (first.shape,))


def _neural(network: nn.Module, features: Tensor, start: Tensor | None) -> _Reward:
    own = {name: p.detach() for name, p in network.named_parameters()}
    shapes = tuple(p.shape for p in own.values())
    vector = torch.cat([p.flatten() for p in own.values()]).to(features) if start is None else start.detach().clone()

    def reward(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        given = {name: part.reshape(shape) for name, part, shape in zip(own, parts, shapes, strict=True)}
        return neural_reward(lambda x: torch.func.functional_call(network, given, (x,)), features)

    return _Reward(reward, vector, torch.ones_like(vector), tuple(own), shapes)


# ---------------------------------------------------------------------------------------------------------- the search

History = dict[str, list[float]]


def _gradient(value: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[float, Tensor]:
    """Value and gradient; -inf where the sum over paths is infinite."""
    leaf = theta.detach().clone().requires_grad_()
    try:
        total = value(leaf)
    except ArithmeticError:  # DivergenceError, ConvergenceError
        return -math.inf, torch.zeros_like(theta)
    return float(total.detach()), torch.autograd.grad(total, leaf)[0]


def _hessian(value: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    second = torch.func.jacrev(torch.func.grad(value))(theta)
    return 0.5 * (second + second.mT)


def _note(history: History, value: float, slope: Tensor, count: int) -> float:
    residual = float(slope.abs().amax()) / count if len(slope) else 0.0
    history["objective"].append(value)
    history["residual"].append(residual)
    return residual


def _gradient_ascent(
    value: Callable[[Tensor], Tensor], theta: Tensor, count: int, steps: int, tolerance: float, rate: float
) -> tuple[Tensor, History]:
    history: History = {"objective": [], "residual": []}
    for _ in range(steps):
        now, slope = _gradient(value, theta)
        if _note(history, now, slope, count) <= tolerance:
            return theta, history
        theta = theta + rate * slope / count
    _note(history, *_gradient(value, theta), count)
    if not history["objective"][-1] > -math.inf:
        raise OptionError(f"gradient ascent left the rewards of finite objective: lower learning_rate={rate}")
    return theta, history


def _quasi_newton(
    value: Callable[[Tensor], Tensor], theta: Tensor, count: int, steps: int, tolerance: float
) -> tuple[Tensor, History]:
    """Damped Newton steps; for many parameters L-BFGS first, down to small residuals."""
    history: History = {"objective": [], "residual": []}
    if len(theta) > FEW_PARAMETERS:
        small = len(theta) <= MOST_PARAMETERS
        theta = _lbfgs(value, theta, count, steps, max(tolerance, 1e-5) if small else tolerance, history)
        if not small:
            return theta, history
    now, slope = _gradient(value, theta)
    while _note(history, now, slope, count) > tolerance and len(history["residual"]) <= steps:
        direction = _newton_step(-_curvature(value, theta), slope)
        size, gain = 1.0, float(slope @ direction)
        while size > SMALLEST_STEP:
            after, steeper = _gradient(value, theta + size * direction)
            # Near the maximum its value does not tell any more; its slope does.
            flatter = float(steeper.abs().amax()) < 0.5 * float(slope.abs().amax())
            if after > now + 1e-4 * size * gain or (flatter and after > now - 1e-9 * abs(now)):
                break
            size /= 2
        else:
            break
        theta, now, slope = theta + size * direction, after, steeper
    return theta, history


def _lbfgs(
    value: Callable[[Tensor], Tensor], theta: Tensor, count: int, steps: int, tolerance: float, history: History
) -> Tensor:
    from scipy.optimize import minimize

    seen: dict[bytes, tuple[float, Tensor]] = {}

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        now, slope = seen[x.tobytes()] = _gradient(value, torch.from_numpy(x).to(theta))
        return -now / count, -slope.double().cpu().numpy() / count

    def note(x: np.ndarray) -> None:
        if x.tobytes() not in seen:  # where the search rounds differently
            loss(x)
        _note(history, *seen[x.tobytes()], count)
        seen.clear()

    first = theta.double().cpu().numpy()
    options = {"maxiter": steps, "maxfun": 20 * steps, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
    end = minimize(loss, first, jac=True, method="L-BFGS-B", callback=note, options=options)
    return torch.from_numpy(end.x).to(theta)


def _curvature(value: Callable[[Tensor], Tensor], theta: Float[Tensor, " P"]) -> Float[Tensor, "P P"]:
    """Hessian by central differences of 2 P gradients, which are one batched pass: all that a search needs."""
    width = torch.finfo(theta.dtype).eps ** (1 / 3) * (1 + theta.abs())
    points = torch.cat([theta + width.diag(), theta - width.diag()])
    above, below = torch.func.vmap(torch.func.grad(value))(points).chunk(2)
    second = (above - below) / (2 * width.unsqueeze(1))
    return 0.5 * (second + second.mT)


def _newton_step(information: Tensor, slope: Tensor) -> Tensor:
    """Uphill, along the directions that the demonstrations say something about; also where it is not concave."""
    level, axes = torch.linalg.eigh(information)
    level = level.abs()
    known = level > float(level.amax()) * torch.finfo(level.dtype).eps ** 0.5
    return axes[:, known] @ ((axes[:, known].mT @ slope) / level[known])


def _floor(level: Tensor) -> float:
    """Curvature below which a direction is not identified: rounding errors of the largest."""
    return float(level.amax().clamp(min=0)) * torch.finfo(level.dtype).eps ** 0.6


# ------------------------------------------------------------------------------------------------------ standard errors


def _kinds(goal: Objective, network: nn.Module | None, size: int) -> tuple[str, ...]:
    if network is not None or size > MOST_PARAMETERS:
        return ()
    return KINDS if isinstance(goal, Likelihood) else KINDS[2:]


def _covariances(
    kinds: Sequence[str],
    goal: Objective,
    reward: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
    theta: Tensor,
    demos: Trajectories,
) -> dict[str, Tensor]:
    """Covariance of the parameters by kind; infinite along directions about which there is no information."""
    if not isinstance(goal, Likelihood) and (wrong := set(kinds) & set(KINDS[:2])):
        raise OptionError(f"the dual is no likelihood and has no {sorted(wrong)[0]!r} standard errors: use 'sandwich'")
    if not kinds:
        return {}
    found = {}
    bread = _inverse(-_hessian(value, theta)) if set(kinds) - {"outer_product"} else theta
    scores = _scores(lambda t: goal.terms(reward(t)), theta) if set(kinds) - {"hessian"} else theta
    for kind in kinds:
        if kind == "hessian":
            found[kind] = bread
        elif kind == "outer_product":
            found[kind] = _inverse(scores @ scores.mT)
        else:
            unit = goal.unit if demos.subjects is None else demos.subjects[goal.unit]
            grouped = scores if kind == "sandwich" else _by_cluster(scores, unit)
            found[kind] = _sandwich(bread, grouped @ grouped.mT)
    return found


def _scores(terms: Callable[[Tensor], Tensor], theta: Tensor) -> Float[Tensor, "P n"]:
    """Gradients of n terms by P reverse passes: the product with their Jacobian is linear, and its derivative is it."""
    like = terms(theta)
    pull = lambda weight: torch.func.vjp(terms, theta)[1](weight)[0]  # noqa: E731
    return torch.func.jacrev(pull)(torch.zeros_like(like))


def _by_cluster(scores: Float[Tensor, "P n"], unit: Tensor) -> Float[Tensor, "P G"]:
    """Sums over clusters, scaled for their number: sqrt(G / (G - 1))."""
    names, place = unit.unique(return_inverse=True)
    total = scores.new_zeros(len(scores), len(names)).index_add(1, place, scores)
    return total * (len(names) / max(len(names) - 1, 1)) ** 0.5


def _inverse(information: Tensor) -> Tensor:
    """Inverse of an information matrix, infinite for parameters that have a part in an unidentified direction."""
    level, axes = torch.linalg.eigh(information)
    known = level > _floor(level)
    inverse = (axes[:, known] / level[known]) @ axes[:, known].mT
    lost = (
        (axes[:, ~known].square().sum(1) > 1e-8) if not bool(known.all()) else torch.zeros_like(level, dtype=torch.bool)
    )
    return _mark(inverse, lost)


def _sandwich(bread: Tensor, meat: Tensor) -> Tensor:
    lost = bread.diagonal().isinf()
    clean = torch.where(lost[:, None] | lost, 0.0, bread)
    return _mark(clean @ meat @ clean, lost)


def _mark(covariance: Tensor, lost: Tensor) -> Tensor:
    either = lost[:, None] | lost
    unknown = torch.full_like(covariance, torch.nan).fill_diagonal_(torch.inf)
    return torch.where(either, unknown, covariance)
