"""One table: posteriors and point estimates on the same held-out demonstrations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.baselines import PointEstimate, cloning, max_margin, maxent, maximum_margin_planning
from pirl.errors import ConvergenceWarning, OptionError, PirlError, form, warn
from pirl.infer.importance import FEWEST
from pirl.mdp import TabularMDP
from pirl.message_passing import soft_policy
from pirl.metrics import epic_distance, expected_value_difference, feature_gap, held_out_log_likelihood
from pirl.model_file import ModelFile
from pirl.planning import optimal_policy
from pirl.policies import bayes_policy, mean_policy, risk_averse_policy
from pirl.posterior import reward_draws
from pirl.soft_values import Reading
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["COLUMNS", "compare", "print_comparison", "to_latex"]

COLUMNS = {
    "log_likelihood": "held-out log-likelihood a decision",
    "log_likelihood_low": "lower",
    "log_likelihood_high": "upper",
    "evd": "expected value difference",
    "epic": "EPIC distance",
    "feature_gap": "feature gap",
    "time": "seconds",
    "loo": "LOO",
    "loo_se": "LOO s.e.",
}
"""Columns of the table, and what they are called in words."""

_AT_ONCE = 2**26

WIDTH = 120
"""Characters of a printed line: a narrower terminal wraps it, which is better than to lose numbers."""


@dataclass(frozen=True)
class _Row:
    """An answer: how it predicts, how it acts, and what it takes for the reward; each a mixture over M."""

    predicts: Tensor | None = None
    """log pi ``[M, (T,) S, A]``, of which one is drawn for an episode by ``shares``."""
    acts: Tensor | None = None
    """pi ``[M, (T,) S, A]``."""
    rewards: Float[Tensor, "D S A"] | None = None
    shares: Float[Tensor, " M"] | None = None
    time: float = math.nan
    loo: tuple[float, float] = (math.nan, math.nan)


def compare(
    entries: Mapping[str, xarray.DataTree | PointEstimate | Tensor],
    demos: Trajectories,
    mdp: TabularMDP,
    *,
    rewards: Mapping[str, Float[Tensor, "D S A"]] | None = None,
    truth: Tensor | None = None,
    features: Tensor | None = None,
    reading: Reading = "causal",
    stopping: str | None = None,
    risk_level: float | None = 0.1,
    num_draws: int = 400,
    num_bootstrap: int = 2000,
    level: float = 0.9,
    seed: int = 0,
) -> pandas.DataFrame:
    """Compare answers to what a demonstrator wanted, on demonstrations that none of them has seen.

    A posterior gives several rows, by what is made of it: the mean policy, the Bayes-optimal policy (that of the mean
    reward), the predictive mixture (one reward drawn for an episode), and the policy of the largest conditional value
    at risk. A point estimate and cloning give one each, and so does the truth where it is known.

    Columns (:data:`pirl.compare.COLUMNS`; NaN where a row has none):

    - ``log_likelihood``: mean log pi(a|s) of the held-out decisions by the *soft* policy that a row predicts (nats),
      with a bootstrap interval over episodes;
    - ``evd``: how much of the best return under the true reward is lost by who *acts* on a row: by the optimal policy
      of its reward (of a drawn one for the predictive mixture), or by the policy itself where that is the answer (mean
      policy, risk-averse policy, max-margin's mixture, cloning);
    - ``epic``: EPIC distance of its reward from the true one, averaged over draws for the predictive mixture;
    - ``feature_gap``: distance of the soft policy's (discounted) features from those of the held-out demonstrations;
    - ``time``: seconds that it took to make; ``loo``, ``loo_se``: expected log predictive density, PSIS leave-one-out.

    Args:
        entries: by name: what :func:`pirl.fit` returned, what a baseline returned, or draws of a reward ``[D, S, A]``.
        demos: held out.
        rewards: draws of the reward ``[D, S, A]`` of each posterior that has no variable "reward": see
            :func:`pirl.reward_draws`.
        truth: the true reward ``[S, A]`` or ``[S, 1]``.
        features: ``[S, K]`` or ``[S, A, K]``, whose expectations are compared.
        reading, stopping: how demonstrators choose, as for the distributions.
        risk_level: share of the worst draws of the risk-averse policy; None leaves it out.
        num_draws: draws of a posterior that are used, evenly spaced.
        level: of the bootstrap interval, by ``num_bootstrap`` resamples of episodes.

    Raises:
        OptionError: an entry is none of these, or a posterior without its reward; rewards of no entry.

    Example:
        >>> estimate = pirl.baselines.maxent(demos[:20], mdp, features)
        >>> answers = {"maxent": estimate, "cloning": pirl.baselines.cloning(demos[:20], mdp)}
        >>> table = pirl.compare(answers, demos[20:], mdp, truth=truth)
        >>> table[["log_likelihood", "evd"]].round(2)
                 log_likelihood   evd
        answer
        maxent            -1.30  0.02
        cloning           -1.34  7.25
        truth             -1.29  0.00
    """
    import pandas

    if not 0 < level < 1 or num_draws < 1 or num_bootstrap < 1:
        raise OptionError("level must be between 0 and 1, num_draws and num_bootstrap at least 1")
    if not isinstance(entries, Mapping) or not isinstance(demos, Trajectories):
        raise OptionError(
            f"compare takes a dict of answers and the held-out pirl.Trajectories, not {type(entries).__name__} and "
            f"{type(demos).__name__}"
        )
    if not isinstance(mdp, TabularMDP):
        raise OptionError(f"mdp is {form(mdp)}: compare takes policies' values in a pirl.TabularMDP, which knows P")
    if truth is not None and "truth" in entries:
        raise OptionError("an answer is called 'truth', which is the row of truth=: call it otherwise")
    unknown = [name for name in rewards or {} if name not in entries]
    if unknown:
        raise OptionError(f"rewards={{{unknown[0]!r}: ...}} is of no answer: there are {', '.join(map(repr, entries))}")
    demos.validate(mdp)
    rows: dict[str, _Row] = {}
    for name, entry in entries.items():
        if isinstance(entry, PointEstimate):
            if entry.log_policy is None:
                raise OptionError(f"{name!r} is of states that are vectors, and compare takes tables of a TabularMDP")
            if mdp.horizon is None and entry.log_policy.dim() == 3:
                raise OptionError(f"the policy of {name!r} depends on time, but the problem has no horizon")
            failed = entry.attrs.get("converged") is False
            rows[f"{name} (not converged)" if failed else name] = _of_estimate(entry, mdp)
            continue
        draws, time, loo = _draws_of(name, entry, (rewards or {}).get(name), mdp)
        room = max(10, _AT_ONCE // (draws[0].numel() * (mdp.horizon or 1)))  # policies by time of all draws
        index = torch.linspace(0, len(draws) - 1, min(num_draws, len(draws), room)).round().long()
        for what, row in _of_posterior(draws[index], mdp, reading, stopping, risk_level):
            rows[f"{name}: {what}"] = _Row(row.predicts, row.acts, row.rewards, None, time, loo)
    if truth is not None:
        truth = mdp.check_reward(truth)
        soft, best = soft_policy(mdp, truth, reading, stopping=stopping), optimal_policy(mdp, truth).policy
        rows["truth"] = _Row(soft[None], best[None], truth[None])
    described = [_describe(row, demos, mdp, truth, features, num_bootstrap, level, seed) for row in rows.values()]
    return pandas.DataFrame(described, index=pandas.Index(list(rows), name="answer"), columns=list(COLUMNS))


def to_latex(table: pandas.DataFrame, digits: int = 3) -> str:
    r"""The table of :func:`compare` for a paper (with the package booktabs); columns without a number are left out.

    Example:
        >>> estimate = pirl.baselines.cloning(demos[:20], mdp)
        >>> print(to_latex(pirl.compare({"cloning": estimate}, demos[20:], mdp)))
        \begin{tabular}{lr}
        \toprule
         & held-out log-likelihood a decision \\
        \midrule
        cloning & $-1.337$ [$-1.417$, $-1.250$] \\
        \bottomrule
        \end{tabular}
    """
    kept = [column for column in table.columns if table[column].notna().any()]
    bracketed = {"log_likelihood_low", "log_likelihood_high"} <= set(kept)
    shown = [c for c in kept if not (bracketed and c.startswith("log_likelihood_")) and c != "loo_se"]

    def cell(row: Any, column: str) -> str:
        value = row[column]
        if np.isnan(value):
            return "--"
        text = _number(value, digits)
        if column == "log_likelihood" and bracketed:
            text += f" [{_number(row['log_likelihood_low'], digits)}, {_number(row['log_likelihood_high'], digits)}]"
        if column == "loo" and "loo_se" in kept:
            text = f"{value:.1f} ({row['loo_se']:.1f})"
        return text

    head = " & ".join(["", *(COLUMNS.get(c, c) for c in shown)])
    lines = [" & ".join([_escaped(str(name)), *(cell(row, c) for c in shown)]) for name, row in table.iterrows()]
    body = " \\\\\n".join([f"\\toprule\n{head}", *(["\\midrule\n" + lines[0], *lines[1:]] if lines else [])])
    return f"\\begin{{tabular}}{{l{'r' * len(shown)}}}\n{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"


def _number(value: float, digits: int) -> str:
    return f"${value:.{digits}f}$" if math.isfinite(value) else ("$-\\infty$" if value < 0 else "$\\infty$")


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)


# ------------------------------------------------------------------------------------------------------------- the rows


def _draws_of(
    name: str, entry: Any, given: Tensor | None, mdp: TabularMDP
) -> tuple[Float[Tensor, "D S A"], float, tuple[float, float]]:
    """Draws of the reward of a posterior, its seconds, and its leave-one-out estimate with standard error."""
    if isinstance(entry, Tensor):
        return _checked(name, entry, mdp), math.nan, (math.nan, math.nan)
    if not hasattr(entry, "children") or "posterior" not in entry.children:
        raise OptionError(f"{name!r} is {form(entry)}: give what pirl.fit or a baseline returned")
    if given is None and "reward" not in entry["posterior"]:
        raise OptionError(
            f"{name!r} has no variable 'reward': give rewards={{{name!r}: pirl.reward_draws(posterior, model, ...)}}"
        )
    draws = given
    if draws is None:
        values = entry["posterior"]["reward"].values
        draws = torch.from_numpy(np.array(values)).flatten(0, 1)
        draws = draws.unsqueeze(-1) if draws.shape[1:] == (mdp.num_states,) else draws
    return _checked(name, draws, mdp), float(entry.attrs.get("wall_time", math.nan)), _loo(entry)


def _checked(name: str, draws: Tensor, mdp: TabularMDP) -> Tensor:
    draws = mdp.check_reward(draws.to(mdp.initial))
    if draws.dim() != 3:
        raise OptionError(f"the reward of {name!r} has shape {tuple(draws.shape)}: expected draws [D, S, A]")
    return draws


def _loo(posterior: xarray.DataTree) -> tuple[float, float]:
    if "log_likelihood" not in posterior.children or len(posterior["log_likelihood"].data_vars) != 1:
        return math.nan, math.nan
    sizes = posterior["posterior"].sizes
    if sizes["chain"] * sizes["draw"] < FEWEST:  # of which no tail can be fitted
        return math.nan, math.nan
    import arviz_stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of k-hats: diagnose tells them
        found = arviz_stats.loo(posterior)
    return float(found.elpd), float(found.se)


def _of_estimate(estimate: PointEstimate, mdp: TabularMDP) -> _Row:
    time = float(estimate.attrs.get("seconds", math.nan))
    if estimate.mixture is not None:
        shares, policies = estimate.mixture
        return _Row(policies.log(), policies, _batch(estimate.reward, mdp), shares, time)
    acts = estimate.log_policy.exp() if estimate.reward is None else optimal_policy(mdp, estimate.reward).policy
    return _Row(estimate.log_policy[None], acts[None], _batch(estimate.reward, mdp), None, time)


def _batch(reward: Tensor | None, mdp: TabularMDP) -> Tensor | None:
    return None if reward is None else mdp.check_reward(reward)[None]


def _of_posterior(
    draws: Float[Tensor, "D S A"], mdp: TabularMDP, reading: Reading, stopping: str | None, risk_level: float | None
) -> Iterator[tuple[str, _Row]]:
    policies = soft_policy(mdp, draws, reading, stopping=stopping)
    mean = mean_policy(policies)
    yield "mean policy", _Row(mean[None], mean.exp()[None])
    middle = draws.mean(0)
    soft = soft_policy(mdp, middle, reading, stopping=stopping)
    yield "Bayes-optimal policy", _Row(soft[None], bayes_policy(mdp, draws)[None], middle[None])
    yield "predictive mixture", _Row(policies, optimal_policy(mdp, draws).policy, draws)
    if risk_level is not None:
        averse = risk_averse_policy(mdp, draws, level=risk_level, of="regret")
        yield f"{100 * risk_level:g}% CVaR policy", _Row(acts=averse.policy[None])


def _describe(
    row: _Row,
    demos: Trajectories,
    mdp: TabularMDP,
    truth: Tensor | None,
    features: Tensor | None,
    num_bootstrap: int,
    level: float,
    seed: int,
) -> dict[str, float]:
    found = dict.fromkeys(COLUMNS, math.nan) | {"time": row.time, "loo": row.loo[0], "loo_se": row.loo[1]}
    policies, shares = row.predicts if row.acts is None else row.acts, row.shares
    if shares is None and policies is not None:
        shares = policies.new_full((len(policies),), 1 / len(policies))
    if row.predicts is not None and shares is not None:
        each = _by_episode(row.predicts, shares, demos)
        number = demos.lengths.double().cpu().numpy()
        found["log_likelihood"] = float(each.sum() / number.sum())
        low, high = _bootstrap(each, number, num_bootstrap, level, seed)
        found["log_likelihood_low"], found["log_likelihood_high"] = low, high
        if features is not None:
            found["feature_gap"] = float(feature_gap(mdp, features, demos, policy=row.predicts.exp(), shares=shares))
    if truth is not None:
        if row.acts is not None and shares is not None:
            found["evd"] = float(shares @ expected_value_difference(mdp, truth, policy=row.acts))
        if row.rewards is not None:
            found["epic"] = float(epic_distance(mdp, row.rewards.unsqueeze(-1), truth.unsqueeze(-1)).mean())
    return found


def _by_episode(log_policies: Tensor, shares: Tensor, demos: Trajectories) -> np.ndarray:
    """Log-likelihood of the choices of each episode, whose policy is drawn by ``shares``."""
    horizon = log_policies.shape[1] if log_policies.dim() == 4 else None
    each = held_out_log_likelihood(log_policies, demos, horizon=horizon).episodes
    return torch.logsumexp(each + shares.log().unsqueeze(-1), 0).double().cpu().numpy()


def _bootstrap(total: np.ndarray, number: np.ndarray, count: int, level: float, seed: int) -> tuple[float, float]:
    """Percentile interval of a ratio of sums, over resampled episodes."""
    picked = np.random.default_rng(seed).integers(0, len(total), (count, len(total)))
    with np.errstate(invalid="ignore"):
        ratios = total[picked].sum(1) / number[picked].sum(1).clip(min=1)
    low, high = np.quantile(ratios, [0.5 - level / 2, 0.5 + level / 2], method="nearest")
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------- of a model file


def against_point_estimates(
    file: ModelFile, options: Mapping[str, Any], arguments: Mapping[str, Any], hold_out: float = 0.25, seed: int = 0
) -> pandas.DataFrame:
    """Fit a model file to a part of its episodes, point estimates and cloning to the same, and compare on the rest.

    Args:
        file: one whose ``load`` returns one :class:`pirl.Trajectories` and one :class:`pirl.TabularMDP`; and
            "features", which point estimates need, "reading" and "stopping", where there are.
        options: of ``load``.
        arguments: of :func:`pirl.fit`.
        hold_out: share of the episodes that is held out, drawn by ``seed``.

    Raises:
        OptionError: the file has no such data, or too few episodes.
    """
    loaded = file.arguments(options)
    name, demos = _only(file, loaded, Trajectories)
    mdp = _only(file, loaded, TabularMDP)[1]
    held_out = max(1, round(hold_out * len(demos)))
    if not 0 < hold_out < 1 or held_out >= len(demos):
        raise OptionError(
            f"--hold-out {hold_out:g} of {len(demos)} episodes leaves none to learn from, or none to compare on: "
            "choose a share between 0 and 1 that leaves both"
        )
    order = np.random.default_rng(seed).permutation(len(demos)).tolist()
    test, train = demos[sorted(order[:held_out])], demos[sorted(order[held_out:])]
    trained = {**loaded, name: train}
    posterior = file.fit(options, arguments, trained)
    if posterior is None:
        raise OptionError("pirl compare runs in one process: start it without torchrun")
    features, reading, stopping = loaded.get("features"), loaded.get("reading", "causal"), loaded.get("stopping")
    entries: dict[str, Any] = {"posterior": posterior}
    methods: dict[str, Callable[[], PointEstimate]] = {"cloning": lambda: cloning(train, mdp)}
    if features is not None:
        methods = {
            "MaxEnt likelihood": lambda: maxent(train, mdp, features, reading=reading, stopping=stopping),
            "MaxEnt dual": lambda: maxent(train, mdp, features, objective="dual", reading=reading, stopping=stopping),
            "max-margin": lambda: max_margin(train, mdp, features),
            "structured margin": lambda: maximum_margin_planning(train, mdp, features),
            **methods,
        }
    for label, method in methods.items():
        try:
            entries[label] = method()
        except PirlError as error:
            warn(f"{label} is left out: {error}", ConvergenceWarning)
    rewards = {"posterior": reward_draws(posterior, file.model, **trained)}
    truth = file.known_truth({**options, **loaded})
    return compare(
        entries,
        test,
        mdp,
        rewards=rewards,
        truth=truth,
        features=features,
        reading=reading,
        stopping=stopping,
        seed=seed,
    )


def _only(file: ModelFile, loaded: Mapping[str, Any], kind: type) -> tuple[str, Any]:
    found = [(name, value) for name, value in loaded.items() if isinstance(value, kind)]
    if len(found) != 1:
        raise OptionError(
            f"{file.path}: load() returns {len(found)} {kind.__name__}, but comparing needs one among the arguments"
        )
    return found[0]


def print_comparison(table: pandas.DataFrame) -> None:
    """Print the table on the terminal: what is better is explained below it.

    Example:
        >>> estimate = pirl.baselines.cloning(demos[:20], mdp)
        >>> print_comparison(pirl.compare({"cloning": estimate}, demos[20:], mdp))
                   log-lik.
                 a decision          interval
        cloning      -1.337  -1.417 to -1.250
        <BLANKLINE>
        log-lik. is of held-out decisions, in nats: higher is better. EVD is the return lost under the true
        reward, EPIC the distance of the reward from it, feature gap that of expected features: lower is better.
        A reward acts by its optimal policy; an answer that is a policy (mean, CVaR, max-margin, cloning) as it is.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads = {
        "log_likelihood": "log-lik.\na decision", "interval": "interval", "evd": "EVD", "epic": "EPIC",
        "feature_gap": "feature\ngap", "time": "seconds", "loo": "LOO (s.e.)",
    }  # fmt: skip
    cells = {
        "log_likelihood": lambda row: f"{row.log_likelihood:.3f}",
        "interval": lambda row: f"{row.log_likelihood_low:.3f} to {row.log_likelihood_high:.3f}",
        "evd": lambda row: f"{row.evd:.3f}",
        "epic": lambda row: f"{row.epic:.3f}",
        "feature_gap": lambda row: f"{row.feature_gap:.3g}",
        "time": lambda row: f"{row.time:.2f}",
        "loo": lambda row: f"{row.loo:.1f} ({row.loo_se:.1f})",
    }
    number = {"interval": "log_likelihood_low"}
    shown = [column for column in heads if table[number.get(column, column)].notna().any()]
    printed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    printed.add_column("", no_wrap=True)
    for column in shown:
        printed.add_column(heads[column], justify="right", vertical="bottom", no_wrap=True)
    for name, row in table.iterrows():
        texts = ["-" if math.isnan(row[number.get(c, c)]) else cells[c](row) for c in shown]
        printed.add_row(*map(Text, [str(name), *texts]))
    Console(highlight=False, width=max(Console().width, WIDTH)).print(printed)
    print(
        "\nlog-lik. is of held-out decisions, in nats: higher is better. EVD is the return lost under the true\n"
        "reward, EPIC the distance of the reward from it, feature gap that of expected features: lower is better.\n"
        "A reward acts by its optimal policy; an answer that is a policy (mean, CVaR, max-margin, cloning) as it is."
    )
