"""What a point estimate is: one reward, the behaviour that it predicts, and how it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import OptionError, form
from pirl.mdp import TabularMDP
from pirl.trajectories import Trajectories

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class PointEstimate:
    """One reward that explains demonstrations, as baselines return it.

    Attributes:
        name: of the method.
        parameters: by name, in the order of ``covariance``; empty where nothing is estimated but a policy.
        reward: ``[S, 1]`` or ``[S, A]``; a function of states and actions where these are vectors; None for methods
            that only imitate.
        log_policy: log pi(a|s) ``[S, A]``, or by time ``[T, S, A]``: what the demonstrator is predicted to do. None
            where states are vectors: see ``policy``.
        history: numbers by iteration, such as "objective" and "residual".
        attrs: how it was found: options, convergence, seconds, goodness of fit.
        covariance: of the parameters, flattened ``[P, P]``, by kind of standard error; infinite where the
            demonstrations say nothing.
        mixture: (shares ``[M]``, policies ``[M, S, A]`` or ``[M, T, S, A]``) where the method answers with a mixture,
            one policy drawn for a whole episode.
        policy: a :class:`pirl.simulators.Policy` for the reward, where states are vectors.

    Example:
        >>> estimate = pirl.baselines.maxent(demos, mdp, features)
        >>> estimate.parameters["weights"].shape, estimate.reward.shape, estimate.log_policy.shape
        (torch.Size([3]), torch.Size([25, 5]), torch.Size([25, 5]))
        >>> estimate.standard_errors()["weights"].shape
        torch.Size([3])
    """

    name: str
    parameters: Mapping[str, Tensor]
    reward: Any
    log_policy: Any
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    attrs: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    covariance: Mapping[str, Float[Tensor, "P P"]] = field(default_factory=dict)
    mixture: tuple[Tensor, Tensor] | None = None
    policy: Any = None

    def standard_errors(self, kind: str | None = None) -> dict[str, Tensor]:
        """Standard errors of the parameters, by name; of the first kind unless told.

        Raises:
            OptionError: there are none, or none of that kind.
        """
        if not self.covariance:
            instead = f": {told}" if (told := self.attrs.get("instead_of_errors")) else ""
            raise OptionError(f"{self.name} has no standard errors{instead}")
        kind = next(iter(self.covariance)) if kind is None else kind
        if kind not in self.covariance:
            raise OptionError(f"{self.name} has no {kind!r} standard errors: choose of {', '.join(self.covariance)}")
        errors = self.covariance[kind].diagonal().sqrt().split([p.numel() for p in self.parameters.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(self.parameters.items(), errors, strict=True)}

    def interval(self, level: float = 0.9, kind: str | None = None) -> dict[str, Float[Tensor, "2 *parameter"]]:
        """Normal confidence intervals of the parameters: (lower, upper) bounds, by name."""
        if not 0 < level < 1:
            raise OptionError(f"level is {level}, but must be between 0 and 1")
        width = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.5 + level / 2, dtype=torch.float64)))
        errors = self.standard_errors(kind)
        return {name: torch.stack([p - width * errors[name], p + width * errors[name]])
                for name, p in self.parameters.items()}  # fmt: skip

    def table(self) -> pandas.DataFrame:
        """A row a parameter: the estimate, and a column for each kind of standard error."""
        import pandas

        names = [f"{name}{list(i) if i else ''}" for name, p in self.parameters.items() for i in _indices(p)]
        columns = {"estimate": torch.cat([p.flatten() for p in self.parameters.values()]).tolist() if names else []}
        columns |= {f"s.e. ({kind})": x.diagonal().sqrt().tolist() for kind, x in self.covariance.items()}
        return pandas.DataFrame(columns, index=names)

    def __repr__(self) -> str:
        """Name, parameters and whether the search ended well."""
        sizes = ", ".join(f"{name}{list(p.shape)}" for name, p in self.parameters.items())
        state = {True: ", converged", False: ", NOT converged"}.get(self.attrs.get("converged"), "")  # type: ignore[call-overload]
        if advice := self.attrs.get("advice"):
            state = f"{state}: {advice}"
        return f"PointEstimate({self.name}: {sizes or 'a policy'}{state})"


def check_problem(demos: Any, mdp: Any) -> None:
    """Refuse arguments in each other's place, before something far below trips over them.

    Raises:
        OptionError: says what belongs there.
    """
    if not isinstance(demos, Trajectories):
        raise OptionError(f"demos is {form(demos)}: give pirl.Trajectories first, then the pirl.TabularMDP")
    if not isinstance(mdp, TabularMDP):
        raise OptionError(f"mdp is {form(mdp)}: give the pirl.TabularMDP of the demonstrations")


def _indices(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(i) for i in torch.ones(x.shape).nonzero().tolist()]
