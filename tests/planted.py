"""Faults planted into the library: each breaks one thing that is easily got wrong, for as long as its context lasts.

``FAULTS`` maps what is wrong to a context that makes it so. Problems, potentials and samplers that a check looks at
must be built inside the context: what was derived before (tables on an MDP, recorded operations) is not broken.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pirl import distributions, message_passing, soft_values
from pirl.distributions import MaxEntTrajectory, TabularTrajectory
from pirl.errors import PirlError
from pirl.infer import batched, chees, ensemble, hmc, nuts, population, potential, smc
from pirl.infer.adaptation import StepSize
from pirl.mdp import TabularMDP
from pirl.transitions import SparseMap, TransitionMap

Fault = Callable[[], AbstractContextManager[Any]]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Callable[[], Iterator[None]]], Fault]:
    """Enter a context into the table."""

    def enter(function: Callable[[], Iterator[None]]) -> Fault:
        FAULTS[name] = contextmanager(function)
        return FAULTS[name]

    return enter


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """``owner.name`` becomes ``make`` of what it was."""
    original = owner.__dict__[name]
    new = make(original.__func__ if isinstance(original, staticmethod) else original)
    return patch.object(owner, name, staticmethod(new) if isinstance(original, staticmethod) else new)


# ------------------------------------------------------------------------------------------------- messages and values


@fault("the horizon is one decision too short")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        def late(*args: Any, **kwargs: Any) -> Tensor:
            values = original(*args, **kwargs)
            return torch.cat([values[:1], values[:-1]])

        return late

    with replaced(soft_values, "finite_values", make):
        yield


@fault("the gradient of soft values has the other sign")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda *args, **kwargs: -original(*args, **kwargs)

    with replaced(soft_values, "finite_visits", make):
        yield


@fault("visits are rolled forward with the row of another pair")
def _() -> Iterator[None]:
    def flow(original: Any) -> Any:
        return lambda self, y: original(self, y.roll(1, 0))

    def adjoint_plus(original: Any) -> Any:
        return lambda self, base, y: original(self, base, y.roll(1, 0))

    with replaced(TransitionMap, "flow", flow), replaced(SparseMap, "adjoint_plus", adjoint_plus):
        yield


@fault("chance is not tilted when visits are rolled forward")
def _() -> Iterator[None]:
    """Algorithm 1 of Ziebart (2008) where dynamics are stochastic: the linear backward pass, the true P forward."""

    def visits(base: Tensor, values: Tensor, cotangent: Tensor, problem: Any) -> Tensor:
        total, weight = torch.zeros_like(base), cotangent[-1]
        for k in range(len(values) - 1, 0, -1):
            policy = (soft_values.backup(base, values[k - 1], problem) - values[k].unsqueeze(1)).exp()
            step = weight.unsqueeze(1) * policy
            total, weight = total + step, cotangent[k - 1] + problem.transitions.flow(step.flatten(0, 1))
        return total

    with replaced(soft_values, "_scaled_visits", lambda original: visits):
        yield


@fault("the fixed point is not differentiated, only its last backup")
def _() -> Iterator[None]:
    def visits(base: Tensor, values: Tensor, weight: Tensor, problem: Any) -> Tensor:
        return weight.unsqueeze(1) * (soft_values.backup(base, values, problem) - values.unsqueeze(1)).exp()

    with replaced(soft_values, "stationary_visits", lambda original: visits):
        yield


@fault("value iteration stops early")
def _() -> Iterator[None]:
    def values(base: Tensor, problem: Any, solver: Any) -> Tensor:
        return soft_values.finite_values(base, dataclasses.replace(problem, horizon=30), 30)[-1]

    with replaced(soft_values, "stationary_values", lambda original: values):
        yield


@fault("rewards of a batch get each other's values")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda x, batch: original(x.roll(1, -1), batch)

    with replaced(soft_values, "chain_first", make):
        yield


def problem(**changes: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """Problems whose fields are changed, each by a function of the arguments."""

    def make(original: Any) -> Any:
        return lambda **known: original(**{**known, **{name: change(known) for name, change in changes.items()}})

    return replaced(message_passing, "SoftProblem", make)


@fault("the action mask is ignored")
def _() -> Iterator[None]:
    with problem(log_prior=lambda known: known["log_prior"].clamp_min(-math.log(2))):
        yield


@fault("the base measure is ignored")
def _() -> Iterator[None]:
    with problem(log_prior=lambda known: torch.where(known["log_prior"].isfinite(), 0.0, -torch.inf).double()):
        yield


@fault("the discount is ignored")
def _() -> Iterator[None]:
    def whole(known: Any) -> TransitionMap:
        scaled = known["transitions"]
        total = scaled.value.new_zeros(scaled.shape[0]).index_add(0, scaled.row, scaled.value)
        return TransitionMap(scaled.row, scaled.column, scaled.value / total[scaled.row], scaled.shape)

    with problem(transitions=whole):
        yield


@fault("terminal states do not end an episode")
def _() -> Iterator[None]:
    with replaced(TabularMDP, "acts", lambda original: property(lambda self: self.log_prior.isfinite())):
        yield


# ----------------------------------------------------------------------------------------------------------- densities


def counts(**changes: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """Statistics whose fields are changed."""

    def make(original: Any) -> Any:
        def statistics(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            return dataclasses.replace(found, **{name: change(found) for name, change in changes.items()})

        return statistics

    return replaced(distributions, "statistics", make)


@fault("Z^(M-1) instead of Z^M")
def _() -> Iterator[None]:
    def short(found: Any) -> SparseMap:
        p = found.partitions
        return SparseMap(p.row[:-1], p.column[:-1], p.value[:-1], p.shape)

    with counts(partitions=short):
        yield


@fault("the value of the state after a truncated episode is left out")
def _() -> Iterator[None]:
    with counts(value_entries=lambda found: tuple(x[:0] for x in found.value_entries)):
        yield


@fault("episodes without a last state are taken for whole ones")
def _() -> Iterator[None]:
    with counts(open_ends=lambda found: ()):
        yield


@fault("the initial distribution is ignored in Z")
def _() -> Iterator[None]:
    def uniform(self: Any, values: Tensor, found: Any) -> Tensor:
        values = values.unsqueeze(-2) if self.problem.horizon is None else values[..., found.horizons, :]
        return found.layout.inputs(torch.logsumexp(values - math.log(values.shape[-1]), -1), 1)

    with replaced(TabularTrajectory, "_log_partitions", lambda original: uniform):
        yield


@fault("the causal reading in place of the trajectory reading")
def _() -> Iterator[None]:
    with patch.object(MaxEntTrajectory, "reading", "causal"):
        yield


@fault("every decision is taken as the last one")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        def step(self: Any, rows: Tensor, state: Tensor, to_go: Any, reward: Tensor, values: Tensor) -> Any:
            return original(self, rows, state, None if to_go is None else torch.ones_like(to_go), reward, values)

        return step

    with replaced(TabularTrajectory, "_step", make):
        yield


@fault("next states are drawn from the true law where luck obeys")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda self, rows, state, action, values: original(self, rows, state, action, torch.zeros_like(values))

    with replaced(TabularTrajectory, "_next_states", make):
        yield


@fault("counts of changed demonstrations are remembered")
def _() -> Iterator[None]:
    def memoised(memo: Any, key: Any, tensors: Any, compute: Any) -> Any:
        table = memo.setdefault("statistics", {})
        full = (*key, *map(id, tensors))
        if full not in table:
            table[full] = (tensors, compute())
        return table[full][1]

    with replaced(distributions, "memoised", lambda original: memoised):
        yield


# ---------------------------------------------------------------------------------------------------------- potentials


class _WithoutJacobian:
    """A bijection that says it keeps volume."""

    def __init__(self, transform: Any) -> None:
        self.transform, self.inv = transform, transform.inv

    def __call__(self, z: Tensor) -> Tensor:
        return self.transform(z)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.0 * self.transform.log_abs_det_jacobian(z, x)


@fault("the log Jacobian is dropped")
def _() -> Iterator[None]:
    with replaced(potential, "bijection", lambda original: lambda fn: _WithoutJacobian(original(fn))):
        yield


@fault("the prior counts twice")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda message: original(message) * (1.0 if message["is_observed"] else 2.0)

    with replaced(potential, "_total", make):
        yield


@fault("chains start from a wider prior")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda self, count: 1.5 * original(self, count)

    with replaced(potential.Potential, "flat_prior_draws", make):
        yield


@fault("the gradient of many chains has the other sign")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        def one(self: Any, vector: Tensor, temperature: Tensor) -> Any:
            value, slope, log_likelihood = original(self, vector, temperature)
            return value, -slope, log_likelihood

        return one

    with replaced(batched.BatchedPotential, "_one", make):
        yield


@fault("the temperature is ignored")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda self, vectors, heat: original(self, vectors, torch.ones_like(heat))

    with replaced(batched.BatchedPotential, "_evaluate", make):
        yield


# ------------------------------------------------------------------------------------------------------------ samplers


def leapfrog(**changes: Any) -> AbstractContextManager[Any]:
    """Transitions whose arguments are changed, each by a function of all of them."""

    def make(original: Any) -> Any:
        def transition(*args: Any) -> Any:
            names = ("target", "phase", "metric", "step_size", "num_steps", "momentum", "log_uniform")
            known = dict(zip(names, args, strict=True))
            return original(**{**known, **{name: change(known) for name, change in changes.items()}})

        return transition

    return replaced(ensemble, "transition", make)


@fault("every proposal is accepted")
def _() -> Iterator[None]:
    with leapfrog(log_uniform=lambda known: torch.full_like(known["log_uniform"], -1e9)):
        yield


@fault("the momentum depends on where a chain is")
def _() -> Iterator[None]:
    with leapfrog(momentum=lambda known: known["momentum"] * (1.0 + 0.5 * torch.tanh(known["phase"].z))):
        yield


@fault("the momentum is wider than its law")
def _() -> Iterator[None]:
    with leapfrog(momentum=lambda known: 1.5 * known["momentum"]):
        yield


@fault("the kinetic energy is left out of the acceptance")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        def transition(
            target: Any, phase: Any, metric: Any, size: Any, steps: int, momentum: Any, log_uniform: Any
        ) -> Any:
            always = torch.full_like(log_uniform, -1e9)
            moved = original(target, phase, metric, size, steps, momentum, always)
            moves = log_uniform < phase.energy - moved.phase.energy
            chosen = {
                field.name: torch.where(
                    moves[:, None] if getattr(phase, field.name).dim() == 2 else moves,
                    getattr(moved.phase, field.name),
                    getattr(phase, field.name),
                )
                for field in dataclasses.fields(phase)
            }
            return dataclasses.replace(moved, phase=hmc.Phase(**chosen))

        return transition

    with replaced(ensemble, "transition", make):
        yield


@fault("the metric is not transposed when it pulls gradients")
def _() -> Iterator[None]:
    def pull(self: hmc.Metric, gradient: Tensor) -> Tensor:
        return self.unwhiten(gradient)

    with replaced(hmc.Metric, "pull", lambda original: pull):
        yield


@fault("the many chains adapt for ever")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        def advance(self: Any, step: int) -> Any:
            self.num_warmup = 10**9
            return original(self, step)

        return advance

    with replaced(chees.Chees, "advance", make):
        yield


@fault("the No-U-Turn sampler adapts for ever")
def _() -> Iterator[None]:
    with patch.object(nuts._Kernel, "setup", lambda self, warmup: super(nuts._Kernel, self).setup(10**9)):
        yield


@fault("all chains have the same random numbers")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda seed, stream, counter=0: original(seed, 0, counter)

    with replaced(nuts, "reseed", make):
        yield


@fault("every step has the same random numbers")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda seed, stream, counter: original(seed, stream, 0)

    with replaced(population, "random_numbers", make):
        yield


@fault("the evidence sums weights, and does not average them")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        def heat(self: Any, step: int) -> None:
            original(self, step)
            self.log_evidence = self.log_evidence + math.log(len(self.phase.z) / self.num_islands)

        return heat

    with replaced(smc.SMC, "_heat", make):
        yield


@fault("particles are resampled without their weights")
def _() -> Iterator[None]:
    def make(original: Any) -> Any:
        return lambda log_weight, uniform: original(torch.zeros_like(log_weight), uniform)

    with replaced(smc, "resample", make):
        yield


@fault("a checkpoint forgets what the step size has learnt")
def _() -> Iterator[None]:
    with patch.object(StepSize, "load_state_dict", lambda self, state: None):
        yield


def under(name: str, check: Callable[[], Any]) -> BaseException | None:
    """What a check raises while a fault is at work: in a child process, so that nothing of it stays.

    Objects that other tests share remember what was computed (tables, counts, recorded operations), and must not
    remember what a broken library computed.
    """
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 minds forks of processes that have threads
        child = os.fork()
    if child == 0:
        raised: BaseException | None = None
        try:
            torch.manual_seed(0)
            with FAULTS[name]():
                check()
        except BaseException as error:
            raised = error
        kind = next((k for k in (AssertionError, PirlError) if isinstance(raised, k)), None) or type(raised)
        with os.fdopen(send, "wb") as pipe:
            pipe.write(f"{kind.__name__}\n{raised}".encode()[:4000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        kind, _, words = pipe.read().decode(errors="replace").partition("\n")
    os.waitpid(child, 0)
    known = {"AssertionError": AssertionError, "PirlError": PirlError}
    return None if kind == "NoneType" else known.get(kind, RuntimeError)(words or kind)
