"""The other samplers of ess_per_second.py: plain Pyro, NumPyro and BlackJAX, each run as its own documentation does.

All start where pirl's chains do, uniformly on (-2, 2) in unconstrained space, and sample the log densities of
ess_problems.py. Each returns its draws and what it can tell of its cost; the clock runs from before the sampler is made
until the draws are on the host.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.benchmarks.ess_problems import Problem, jax_log_density, naive_log_density


class Run(NamedTuple):
    """What a sampler did."""

    draws: np.ndarray  # [chain, draw, parameter], constrained
    seconds: float  # all of it: compilation and warm-up too
    warming: float | None = None  # seconds of it, with the compilation of what warms up
    compilation: float | None = None  # seconds of it in XLA
    gradients: float | None = None  # after warm-up, over all chains
    wall: float | None = None  # of the user's whole call, where more is done than sampling


def starts(problem: Problem, chains: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-2.0, 2.0, (chains, problem.size))


def pyro_nuts(problem: Problem, *, chains: int, warmup: int, draws: int, seed: int) -> Run:
    """Pyro's NUTS with a dense mass matrix on the naive density, chain after chain.

    Given the potential itself, it is spared the model's trace at each gradient, which a Pyro user would pay.
    """
    import pyro
    from pyro.infer import MCMC, NUTS

    density = naive_log_density(problem)
    kept, evaluations, before, total = [], 0, 0, 0

    def potential(z: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        return -density(z["z"])

    def note(kernel: Any, params: Any, stage: str, step: int) -> None:
        nonlocal before
        if stage == "Warmup":
            before = evaluations

    began = time.perf_counter()
    for chain, start in enumerate(torch.from_numpy(starts(problem, chains, seed))):
        pyro.set_rng_seed(seed + chain)
        mcmc = MCMC(
            NUTS(potential_fn=potential, full_mass=True),
            num_samples=draws,
            warmup_steps=warmup,
            initial_params={"z": start},
            disable_progbar=True,
            hook_fn=note,
        )
        mcmc.run()
        kept.append(mcmc.get_samples()["z"].numpy())
        total += evaluations - before
    seconds = time.perf_counter() - began
    return Run(problem.constrain(np.stack(kept)), seconds, gradients=total)


def numpyro_nuts(
    problem: Problem, *, chains: int, warmup: int, draws: int, seed: int, form: str, method: str, dense_mass: bool
) -> Run:
    """NumPyro's NUTS: chains in sequence, in one vectorised program, or "parallel" on as many host devices.

    As a model, not as a potential function, for which NumPyro 0.22 compiles each chain anew.
    """
    import numpyro

    if method == "parallel":
        numpyro.set_host_device_count(chains)
    compilation = enter_jax()
    import jax
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    log_density = jax_log_density(problem, form)

    def model() -> None:
        numpyro.factor("log_density", log_density(numpyro.sample("z", flat)))

    began = time.perf_counter()
    flat = dist.ImproperUniform(dist.constraints.real_vector, (), (problem.size,))
    mcmc = MCMC(
        NUTS(model, dense_mass=dense_mass),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method=method,
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(seed), extra_fields=("num_steps",))
    drawn = np.asarray(mcmc.get_samples(group_by_chain=True)["z"])
    seconds = time.perf_counter() - began
    gradients = float(mcmc.get_extra_fields()["num_steps"].sum())
    return Run(problem.constrain(drawn), seconds, compilation=sum(compilation), gradients=gradients)


def blackjax_chees(
    problem: Problem, *, chains: int, warmup: int, draws: int, seed: int, form: str, diagonal: bool
) -> Run:
    """BlackJAX's ChEES adaptation, then dynamic HMC: all chains by vmap.

    ``diagonal`` asks for its estimate of a diagonal mass matrix; it has no dense one.
    """
    compilation = enter_jax()
    import blackjax
    import jax
    import optax

    z = jax.numpy.asarray(starts(problem, chains, seed))
    log_density = jax_log_density(problem, form)
    key_warmup, key_draws = jax.random.split(jax.random.PRNGKey(seed))
    began = time.perf_counter()
    adaptation = blackjax.chees_adaptation(
        log_density,
        chains,
        mass_matrix_estimation="diagonal" if diagonal else None,
        adaptation_info_fn=lambda state, info, adapted: None,
    )
    (states, parameters), _ = adaptation.run(
        key_warmup, z, 0.1, optax.adam(0.05, b1=0.0, b2=0.95), warmup, max_sampling_steps=draws
    )
    jax.block_until_ready(states)
    warmed = time.perf_counter() - began
    step = blackjax.dynamic_hmc(log_density, **parameters).step

    @jax.jit
    def sample(states: Any, keys: Any) -> Any:
        def advance(states: Any, key: Any) -> Any:
            states, info = jax.vmap(step)(jax.random.split(key, chains), states)
            return states, (states.position, info.num_integration_steps)

        return jax.lax.scan(advance, states, keys)[1]

    drawn, steps = (np.asarray(x) for x in sample(states, jax.random.split(key_draws, draws)))
    seconds = time.perf_counter() - began
    return Run(problem.constrain(drawn.swapaxes(0, 1)), seconds, warmed, sum(compilation), float(steps.sum()))


def enter_jax() -> list[float]:
    """Float64, and a list that fills with the seconds of each compilation from here on."""
    import jax

    jax.config.update("jax_enable_x64", True)
    compilation: list[float] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilation.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    return compilation
