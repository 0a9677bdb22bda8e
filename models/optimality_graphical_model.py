"""Control as inference, literally: states, actions, and a variable that says whether each action was a good one.

This is the picture of the lecture, and of Levine (2018), figures 1 and 2, word for word in Pyro:

    s_1 ~ p(s_1)                              where it starts
    a_t ~ p(a|s_t)                            what one would do for no reason at all
    O_t ~ Bernoulli(exp r(s_t, a_t))          whether that was good: we observe O_t = 1, at every step
    s_{t+1} ~ P(s'|s_t, a_t)                  where it leads

To act well is to act as one of whom we know that every O_t is 1: the posterior of the a_t. How well one can do is the
evidence, p(O_1 = ... = O_T = 1) = Z. Here Pyro enumerates states and actions, and each is summed out in its turn, the
last one first. Nobody tells it about control; and yet what is left after each sum is the lecture's backward message.
`pirl.MaxEntTrajectory` is the same thing computed by messages outright, for problems of any size.

The posterior of the reward needs one thing more. A demonstration tau is a draw from p(tau | O), not from p(tau, O):
what the picture says of it is divided by the evidence, which depends on the reward as well.

    pirl fit models/optimality_graphical_model.py

What the model simulates is what the picture generates: actions for no reason, and whether they happened to be good.

Source: S. Levine, "Reinforcement Learning and Control as Probabilistic Inference: Tutorial and Review", 2018,
arXiv:1805.00909.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.util import is_validation_enabled
from torch import Tensor

import pirl
from pirl.datasets import simulate
from pirl.errors import DiscountError, HorizonError, InvalidMDPError, InvalidRewardError

# What the walker of `load` gets at each step: for being at the right end, and for going right.
TRUE_WEIGHTS = {"right end": 1.0, "going right": -0.5}

# Simulated episodes predict nothing here: they are not conditioned on O.
defaults = {
    "num_prior": 100,
    "num_posterior_predictive": 0,
    "chees": {"num_chains": 32, "num_warmup": 100, "num_samples": 150},
    "nuts": {"num_warmup": 200, "num_samples": 300, "dense_mass": True},
}
dims = {"features": ("state", "action", "feature")}
labels = {"weights": "weight"}


class Optimality(dist.Bernoulli):
    """O is 1 with probability exp(r), r <= 0; log p(O = 1) is r itself, of which a rounded probability keeps little."""

    def __init__(self, reward: Tensor) -> None:
        self.reward = reward
        super().__init__(probs=reward.exp(), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Optimality:
        """The same law for each member of a plate."""
        return Optimality(self.reward.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of exp(r), or of 1 - exp(r)."""
        return torch.where(value == 1, self.reward, super().log_prob(value))


def graphical_model(mdp: pirl.TabularMDP, reward: Float[Tensor, "S A"]) -> None:
    """The picture, for r <= 0. A terminal state is good or not once, on entry; after that there is no O_t."""
    start, prior, dynamics = log_tables(mdp)
    good, going = torch.ones_like(start[0]), torch.tensor(True, device=mdp.device)
    state = pyro.sample("s_1", dist.Categorical(logits=start))
    for t in pyro.markov(range(1, horizon_of(mdp) + 1), history=2):  # 2: going depends on the state before this one
        action = pyro.sample(f"a_{t}", dist.Categorical(logits=prior[state]))
        with poutine.mask(mask=going):
            pyro.sample(f"O_{t}", Optimality(reward[state, action]), obs=good)
        going = ~mdp.terminal[state]
        state = pyro.sample(f"s_{t + 1}", dist.Categorical(logits=dynamics[state, action]))


def log_evidence(
    mdp: pirl.TabularMDP, reward: Tensor, clamped: Mapping[str, Tensor] | None = None
) -> Float[Tensor, ""]:
    """log Z = log p(O_1 = ... = O_T = 1), every state and action summed out.

    Args:
        mdp: undiscounted, with a horizon and normalised p(a|s).
        reward: r(s) ``[S]`` or ``[S, 1]``, or r(s,a) ``[S, A]``; see :func:`below_zero`.
        clamped: values of some variables, such as ``{"s_1": ..., "a_1": ...}``. The result is then the log of their
            joint probability with O = 1; the posterior p(these | O = 1) is a ratio of two evidences.

    Raises:
        InvalidRewardError, DiscountError, HorizonError, InvalidMDPError: the picture cannot say this problem.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> float(log_evidence(mdp, torch.zeros(1, 2).double()))
        0.0
    """
    reward, best = below_zero(mdp, reward)
    picture = config_enumerate(poutine.condition(graphical_model, data=dict(clamped or {})))
    with poutine.block(), pyro.validation_enabled(False):  # a model that asks for the evidence sees none of these sites
        trace = poutine.trace(poutine.enum(picture, first_available_dim=-1)).get_trace(mdp, reward)
        trace.compute_log_prob()
    message = torch.zeros_like(best)
    for site in reversed(trace.nodes.values()):
        if site["type"] == "sample":
            message = message + site["log_prob"]
            # All that depends on a variable comes after it, so is in the message by now: sum the variable out.
            if "_enumerate_dim" in site["infer"]:
                message = message.logsumexp(site["infer"]["_enumerate_dim"], keepdim=True)
    return message.reshape(()) + horizon_of(mdp) * best


def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor) -> None:
    """Normal weights; what the picture says of each demonstration, with every O_t = 1, over the evidence."""
    prior = dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["feature"]})
    reward, _ = below_zero(mdp, pirl.linear_reward(features, weights))
    with pyro.plate("episode", len(demos)):
        poutine.condition(graphical_model, data=observed_variables(demos, mdp))(mdp, reward)
        pyro.factor("evidence", -log_evidence(mdp, reward))


def draw_data(parameters: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Demonstrations of one of whom we know that every O_t is 1: draws from p(tau | O), by messages.

    The picture by itself only says what happens, and whether it was good.
    """
    mdp, demos = arguments["mdp"], arguments["demos"]
    reward = pirl.linear_reward(arguments["features"], parameters["weights"])
    table = pirl.MaxEntTrajectory(mdp, reward, lengths=demos.lengths).sample()
    return {"demos": pirl.Trajectories(table[..., 0], table[:, :-1, 1], (table[..., 1] >= 0).sum(1))}


def below_zero(mdp: pirl.TabularMDP, reward: Tensor) -> tuple[Float[Tensor, "S A"], Float[Tensor, ""]]:
    """A reward whose exp is a probability, ``r - max r`` (over the pairs that can occur), and ``max r``.

    The log probability of T variables O_t loses T max r by that, whatever happens. Where episodes end early the number
    of O_t is part of what happens, and the shift would be another model: then r <= 0 must hold as it is.

    Raises:
        InvalidRewardError: some r(s,a) > 0, and there are terminal states.
    """
    reward, never = mdp.check_reward(reward), ~mdp.log_prior.isfinite()
    best = reward.masked_fill(never, -torch.inf).amax()
    if not any(mdp.terminal.tolist()):
        return (reward - best).masked_fill(never, 0.0), best
    if bool(best > 0):
        raise InvalidRewardError(
            f"the largest reward is {float(best.detach()):.6g}: where episodes end in terminal states exp(r) must be a "
            "probability as it is, so r <= 0; pirl.MaxEntTrajectory takes any reward"
        )
    return reward.masked_fill(never, 0.0), torch.zeros_like(best)


def log_tables(mdp: pirl.TabularMDP) -> tuple[Float[Tensor, " S"], Float[Tensor, "S A"], Float[Tensor, "S A S"]]:
    """log p(s_1), log p(a|s) and log P(s'|s,a); who has come to a terminal state stays there.

    Raises:
        InvalidMDPError: p(a|s) is the counting measure, from which nothing can be drawn.
    """
    if any(abs(total - 1) > 1e-6 for total in mdp.log_prior.exp().sum(-1).tolist()):
        raise InvalidMDPError("p(a|s) must sum to 1, as actions are drawn from it: use action_prior='uniform'")
    S, A = mdp.available.shape
    stay = torch.eye(S, dtype=mdp.dtype, device=mdp.device).unsqueeze(1)
    dynamics = torch.where(mdp.acts.unsqueeze(-1), mdp.transition.to_dense().reshape(S, A, S), stay)
    return mdp.initial.log(), mdp.log_prior, dynamics.log()


def horizon_of(mdp: pirl.TabularMDP) -> int:
    """T.

    Raises:
        DiscountError, HorizonError: the problem is discounted, or has no T.
    """
    if mdp.discount != 1:
        raise DiscountError(f"the discount is {mdp.discount:g}, and the picture has none: use discount=1")
    if mdp.horizon is None:
        raise HorizonError("the picture is drawn for T steps: give the decision problem a horizon")
    return mdp.horizon


def observed_variables(demos: pirl.Trajectories, mdp: pirl.TabularMDP) -> dict[str, Int[Tensor, " N"]]:
    """The value of each state and action in each demonstration; none of them where the model is to simulate.

    Raises:
        HorizonError: a demonstration leaves some of them open.
        InvalidTrajectoriesError: a demonstration cannot be of this problem (with Pyro's validation on, the default).
    """
    table, T = demos.as_tensor(), horizon_of(mdp)
    if table is None:
        return {}
    if is_validation_enabled():
        demos.validate(mdp)
    state, action = torch.nn.functional.pad(table, (0, 0, 0, T + 1 - table.shape[1]), value=-1).unbind(-1)
    last = state.gather(1, demos.lengths.unsqueeze(1))
    partial = ((last < 0) | (demos.lengths.unsqueeze(1) < T) & ~mdp.terminal[last])[:, 0].tolist()
    if any(partial):
        raise HorizonError(
            f"trajectory {partial.index(True)} was not watched to its end, which is a terminal state, or the state "
            f"after {T} decisions: the picture has no less; pirl.MaxEntTrajectory takes what was seen"
        )
    state, action = torch.where(state < 0, last, state), action.clamp_min(0)  # in a terminal state: stay, do nothing
    states = {f"s_{t + 1}": state[:, t] for t in range(T + 1)}
    return states | {f"a_{t + 1}": action[:, t] for t in range(T)}


def load(num_demos: int = 50, horizon: int = 4, slip: float = 0.2, seed: int = 0) -> dict[str, Any]:
    """Walks in a corridor of three cells, by someone who likes its right end but not the way there.

    A step to the left or to the right goes the other way with probability ``slip``; walls stop it.
    """
    cell = torch.eye(3, dtype=torch.float64)
    left, right = cell[[0, 0, 1]], cell[[1, 2, 2]]
    transition = torch.stack([(1 - slip) * left + slip * right, (1 - slip) * right + slip * left], dim=1)
    mdp = pirl.TabularMDP(transition, [1 / 3] * 3, horizon=horizon, action_names=("left", "right"))
    features = torch.zeros(3, 2, 2, dtype=mdp.dtype)
    features[2, :, 0] = features[:, 1, 1] = 1.0
    reward = pirl.linear_reward(features, features.new_tensor(list(TRUE_WEIGHTS.values())))
    return {"demos": simulate(mdp, reward, num_demos, horizon, "trajectory", seed), "mdp": mdp, "features": features}


def coords() -> dict[str, list[str]]:
    """What the walker likes, and does not."""
    return {"feature": list(TRUE_WEIGHTS)}


def reference() -> dict[str, Any]:
    """The weights that the walker had."""
    return {"label": "truth", "values": {"weights": list(TRUE_WEIGHTS.values())}}


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
