"""From a Pyro model to a log density on unconstrained space, evaluated by one hand-written handler.

A latent site with support S is sampled as x = T(z), T the bijection that torch registers for S, z a real tensor.
The potential is U(z) = -log p(T(z), data) - log |det dT/dz|. The bijection is looked up at each evaluation, so a
support may depend on other sites. All functions work under torch's autograd and under ``torch.func.vmap``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.mixture_same_family import MixtureSameFamilyConstraint
from torch.distributions.transforms import Transform

from pirl.errors import DiscreteLatentError, ModelError, PirlError, first_line
from pirl.infer.user_errors import NO_DENSITY, own_errors, place_of

Values = dict[str, Tensor]

SURVEY_ATTEMPTS = 100


@dataclass(frozen=True)
class Site:
    """One sample site of a model: what it is, its shape, and the names of its dims.

    ``kind`` is "latent", "observed", "deterministic" or "factor". ``plates`` maps a batch dim, counted from the right
    (-1, -2, ...), to the name of its plate; ``dims`` names the last dims of the value. A site that is not
    ``identified`` (``infer={"identified": False}``: weights of a network, say) is known only through what is computed
    from it.
    """

    name: str
    kind: str
    shape: torch.Size
    event_dim: int
    plates: Mapping[int, str]
    dims: tuple[str, ...]
    unconstrained_shape: torch.Size = torch.Size()
    value: Tensor | None = None
    identified: bool = True


def _is_real(support: constraints.Constraint) -> bool:
    while hasattr(support, "base_constraint"):  # of many independent elements, or of a mixture
        support = support.base_constraint
    return support is constraints.real


def bijection(fn: Any) -> Transform:
    """Find the map from unconstrained space onto the support of a distribution."""
    support = fn.support
    return biject_to(support.base_constraint if isinstance(support, MixtureSameFamilyConstraint) else support)


def base_of(fn: Any) -> Any:
    """The distribution inside of others."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def kind_of(message: Mapping[str, Any]) -> str:
    """Sort a sample message into the kinds of :class:`Site`, and "plate" for the index of a plate."""
    if isinstance(message["fn"], _Subsample):
        return "plate"
    if not message["is_observed"]:
        return "latent"
    # A site that Pyro reparametrised is a point mass at a function of other sites, as a deterministic one is.
    if message["infer"].get("_deterministic") or isinstance(base_of(message["fn"]), pyro.distributions.Delta):
        return "deterministic"
    return "factor" if isinstance(message["fn"], pyro.distributions.Unit) else "observed"


def _pointwise(message: Mapping[str, Any]) -> Tensor:
    """Log density of each element of a site's batch: masked, not scaled."""
    return scale_and_mask(message["fn"].log_prob(message["value"]), 1.0, message["mask"])


def _total(message: Mapping[str, Any]) -> Tensor | float:
    """Log density that a site adds to the joint: masked, scaled, summed."""
    fn, value, scale, mask = message["fn"], message["value"], message["scale"], message["mask"]
    if mask is False:
        return 0.0
    scalar = not isinstance(scale, Tensor) or scale.numel() == 1
    if (mask is None or mask is True) and scalar:
        # A distribution may know the sum from sufficient statistics, without the terms.
        shortcut = getattr(fn, "log_prob_sum", None) if message["is_observed"] else None
        total = fn.log_prob(value).sum() if shortcut is None else shortcut(value)
        return total if isinstance(scale, float) and scale == 1.0 else total * scale
    return scale_and_mask(fn.log_prob(value), scale, mask).sum()


@contextmanager
def whole_plates() -> Iterator[None]:
    """Let every plate take all its members, whatever ``subsample_size`` the model asks for."""
    original = SubsampleMessenger._subsample

    def take_all(name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any) -> Any:
        return original(name, size, None, None, *rest)

    SubsampleMessenger._subsample = staticmethod(take_all)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(original)


class _Evaluate(Messenger):
    """Fix the latent sites and sum the log density; with ``record``, keep what each site says as well."""

    def __init__(self, values: Mapping[str, Tensor], unconstrained: bool, record: bool = False) -> None:
        super().__init__()
        self.values, self.unconstrained = values, unconstrained
        self.log_prior: Tensor | float = 0.0
        self.log_likelihood: Tensor | float = 0.0
        self.record: dict[str, Values] | None = None
        self.factors: Values = {}
        if record:
            self.record = {"posterior": {}, "log_prior": {}, "log_likelihood": {}}

    def _process_message(self, message: Any) -> None:
        # Outermost handler: plates and the model's own handlers have already expanded and scaled the site.
        if message["type"] != "sample" or message["is_observed"] or isinstance(message["fn"], _Subsample):
            return
        value = self.values[message["name"]]
        if self.unconstrained and not _is_real(message["fn"].support):
            transform = bijection(message["fn"])
            constrained = transform(value)
            self.log_prior = self.log_prior + transform.log_abs_det_jacobian(value, constrained).sum()
            value = constrained
        message["value"], message["done"] = value, True

    def _postprocess_message(self, message: Any) -> None:
        if message["type"] != "sample":
            return
        kind, name = kind_of(message), message["name"]
        if kind == "latent":
            self.log_prior = self.log_prior + _total(message)
        elif kind in ("observed", "factor"):
            self.log_likelihood = self.log_likelihood + _total(message)
        if self.record is None:
            return
        if kind == "factor":
            self.factors[name] = _pointwise(message)
        if kind in ("latent", "deterministic"):
            self.record["posterior"][name] = message["value"]
        if kind in ("latent", "observed"):
            self.record["log_prior" if kind == "latent" else "log_likelihood"][name] = _pointwise(message)


class _Simulate(Messenger):
    """Fix the latent sites that are given, draw all others, observed ones too; keep every value."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.drawn: Values = {}

    def _process_message(self, message: Any) -> None:
        if message["type"] != "sample" or (kind := kind_of(message)) in ("plate", "deterministic", "factor"):
            return
        if kind == "observed":
            message["value"], message["is_observed"] = None, False
        elif message["name"] in self.values:
            message["value"], message["done"] = self.values[message["name"]], True

    def _postprocess_message(self, message: Any) -> None:
        if message["type"] == "sample" and kind_of(message) in ("latent", "deterministic"):
            self.drawn[message["name"]] = message["value"]


class Potential:
    """The negative log density of a Pyro model on unconstrained space: call it with a dict of real tensors.

    Creating it evaluates the model once at a prior draw with Pyro's validation on, so that mistakes are reported by
    name; later evaluations trust the model.

    Args:
        model: a Pyro model whose latent sites are continuous.
        args, kwargs: its arguments.
        subsampling: accept plates that subsample, and ``pyro.param`` (only stochastic variational inference may).

    Raises:
        DiscreteLatentError: a latent site is discrete.
        ModelError: no latent site, a plate that subsamples, a ``pyro.param``, a name with "/", a support without a
            bijection, or values outside a distribution's domain.

    Example:
        >>> def model(data):
        ...     location = pyro.sample("location", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("seen", dist.Normal(location, 1.0), obs=data)
        >>> potential = Potential(model, (torch.tensor([1.0, 2.0]),))
        >>> potential({"location": torch.tensor(0.5)})
        tensor(4.1318)
        >>> potential.gradient({"location": torch.tensor(1.0)})[1]
        {'location': tensor(0.)}
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        subsampling: bool = False,
    ) -> None:
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})
        self.sites, self.params, self.subsampled = _survey(model, self.args, self.kwargs, subsampling)
        self.latent = {name: site for name, site in self.sites.items() if site.kind == "latent"}

    def __call__(self, z: Mapping[str, Tensor]) -> Tensor:
        """Evaluate U(z), a scalar; the latent site ``name`` has shape ``latent[name].unconstrained_shape``."""
        log_prior, log_likelihood = self.parts(z)
        return -torch.as_tensor(log_prior + log_likelihood)

    def parts(self, z: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Evaluate the two parts of -U: the log prior with the log Jacobian, and the log-likelihood with factors."""
        with _Evaluate(z, unconstrained=True) as evaluation:
            self.model(*self.args, **self.kwargs)
        return torch.as_tensor(evaluation.log_prior), torch.as_tensor(evaluation.log_likelihood)

    def replay(self, values: Mapping[str, Tensor], unconstrained: bool = True) -> dict[str, Values]:
        """Report one draw: groups "posterior", "log_prior", "log_likelihood", and "stats".

        The statistics are the log density "lp", and "log_likelihood", what of it is not the prior's: factors, too.
        """
        with self._whole(), _Evaluate(values, unconstrained, record=True) as evaluation:
            self.model(*self.args, **self.kwargs)
        assert evaluation.record is not None
        whole = {"lp": evaluation.log_prior + evaluation.log_likelihood, "log_likelihood": evaluation.log_likelihood}
        return {**evaluation.record, "stats": {name: torch.as_tensor(value) for name, value in whole.items()}}

    def simulate(self, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Values:
        """Run the model forwards with some latent sites given; values of all sites, the observed ones drawn anew."""
        with self._whole(), _Simulate(values) as simulation:
            self.model(*args, **kwargs)
        return simulation.drawn

    def _whole(self) -> Any:
        return whole_plates() if self.subsampled else nullcontext()

    def unconstrain(self, values: Mapping[str, Tensor]) -> Values:
        """Map a draw of all latent sites to unconstrained space."""
        trace = pyro.poutine.trace(pyro.poutine.condition(self.model, dict(values))).get_trace(
            *self.args, **self.kwargs
        )
        return {
            name: bijection(trace.nodes[name]["fn"]).inv(trace.nodes[name]["value"]).detach() for name in self.latent
        }

    def prior_draw(self) -> Values:
        """Draw all latent sites from the prior, in unconstrained space."""
        tracer = pyro.poutine.trace(self.model)
        try:
            tracer.get_trace(*self.args, **self.kwargs)
        except NO_DENSITY:  # the prior has been drawn all the same; only the likelihood does not exist there
            if not self.latent.keys() <= tracer.trace.nodes.keys():
                raise
        nodes = {name: tracer.trace.nodes[name] for name in self.latent}
        return {name: bijection(node["fn"]).inv(node["value"]).detach() for name, node in nodes.items()}

    def flat_prior_draws(self, count: int) -> Tensor:
        """Draw from the prior ``count`` times, flat: ``[count, size]``; all at once where the model vmaps."""

        def one(_: Tensor) -> Tensor:
            return self.flatten(self.prior_draw())

        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                return torch.func.vmap(one, randomness="different")(torch.empty(count))
            except Exception:  # whatever vmap cannot do a loop can
                return torch.stack([one(torch.empty(())) for _ in range(count)])

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return sum(site.unconstrained_shape.numel() for site in self.latent.values())

    def flatten(self, z: Mapping[str, Tensor]) -> Tensor:
        """Join a draw into one vector ``[size]``."""
        return torch.cat([z[name].reshape(-1) for name in self.latent])

    def unflatten(self, vector: Tensor) -> Values:
        """Split vectors ``[*batch, size]`` into tensors ``[*batch, *shape]`` by site."""
        parts = vector.split([site.unconstrained_shape.numel() for site in self.latent.values()], dim=-1)
        return {
            name: part.reshape(vector.shape[:-1] + site.unconstrained_shape)
            for part, (name, site) in zip(parts, self.latent.items(), strict=True)
        }

    def coordinates(self) -> list[str]:
        """Name the coordinates of :meth:`flatten`: "mu", "raw[0]", "raw[1]", ..."""
        names = []
        for name, site in self.latent.items():
            indices = torch.ones(site.unconstrained_shape).nonzero().tolist()
            names += [f"{name}[{','.join(map(str, index))}]" if index else name for index in indices]
        return names

    def gradient(self, z: Mapping[str, Tensor]) -> tuple[Tensor, Values]:
        """Evaluate U and its gradient."""
        leaves = {name: value.detach().requires_grad_() for name, value in z.items()}
        energy = self(leaves)
        return energy.detach(), dict(zip(leaves, torch.autograd.grad(energy, list(leaves.values())), strict=True))

    def culprit(self, z: Mapping[str, Tensor]) -> str:
        """Say in words which site makes the log density or its gradient at ``z`` not finite, or steepest."""
        with torch.no_grad(), self._whole(), _Evaluate(z, unconstrained=True, record=True) as evaluation:
            self.model(*self.args, **self.kwargs)
        assert evaluation.record is not None
        for terms in (evaluation.record["log_prior"], evaluation.record["log_likelihood"], evaluation.factors):
            for name, value in terms.items():
                if not torch.isfinite(value).all():
                    return f"the log density of site {name!r} is {float(value.sum())}"
        _, slopes = self.gradient(z)
        for name, value in slopes.items():
            if not torch.isfinite(value).all():
                return f"the gradient at site {name!r} is not finite"
        name = max(slopes, key=lambda key: float(slopes[key].abs().max()))
        return f"the gradient is largest at site {name!r}, {float(slopes[name].abs().max()):.3g}"


def _survey(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], subsampling: bool
) -> tuple[dict[str, Site], list[str], list[str]]:
    """Run the model at a prior draw with validation on, refuse what no engine can do, and describe its sites.

    Also returns the names of what only Pyro's ELBO handles: of every ``pyro.param``, and of plates that subsample.
    A draw at which the model has no density (an infinite partition function, say) says nothing against the model:
    others are tried.
    """
    for attempt in range(SURVEY_ATTEMPTS):
        try:
            return _survey_once(model, args, kwargs, subsampling)
        except NO_DENSITY:
            if attempt == SURVEY_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _survey_once(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], subsampling: bool
) -> tuple[dict[str, Site], list[str], list[str]]:
    try:
        with own_errors(), pyro.validation_enabled(True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered")  # an infinite density is told when it stays so
            trace = pyro.poutine.trace(model, graph_type="flat").get_trace(*args, **kwargs)
            params, subsampled = _refuse(trace, subsampling)
            trace.compute_log_prob()
            if subsampled:
                with whole_plates():
                    trace = pyro.poutine.trace(model, graph_type="flat").get_trace(*args, **kwargs)
    except PirlError:
        raise
    except (ValueError, RuntimeError) as error:
        if isinstance(error, NO_DENSITY):
            raise
        if isinstance(error, RuntimeError) and "sites named" not in str(error):  # Pyro's word for a name used twice
            raise
        raise ModelError(
            f"the model cannot be evaluated at a draw from its prior{place_of(error)}: {first_line(error)}"
        ) from error
    sites = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or (kind := kind_of(node)) == "plate":
            continue
        fn, value = node["fn"], node["value"]
        dims = node["infer"].get("dims", getattr(fn, "event_dim_names", ()))
        unconstrained = bijection(fn).inv(value).shape if kind == "latent" else torch.Size()
        plates = {frame.dim: frame.name for frame in node["cond_indep_stack"] if frame.dim is not None}
        observed = value.detach() if kind == "observed" else None
        sites[name] = Site(
            name,
            kind,
            value.shape,
            fn.event_dim,
            plates,
            tuple(dims),
            unconstrained,
            observed,
            node["infer"].get("identified", True),
        )
    if not any(site.kind == "latent" for site in sites.values()):
        raise ModelError("the model has no latent site: give a parameter a prior with pyro.sample(name, prior)")
    return sites, params, subsampled


def _refuse(trace: pyro.poutine.Trace, subsampling: bool) -> tuple[list[str], list[str]]:
    params, subsampled = [], []
    for name, node in trace.nodes.items():
        if node["type"] == "param":
            params.append(name)
            if not subsampling:
                raise ModelError(
                    f"{name!r} is a pyro.param, which has no prior: use pyro.sample, or engine='svi', which fits it"
                )
        if node["type"] != "sample":
            continue
        fn, kind = node["fn"], kind_of(node)
        if "/" in name:
            raise ModelError(f"the name of site {name!r} contains '/', which separates groups in the result: rename it")
        if kind == "plate":
            taken = len(node["value"])
            if taken < fn.size:
                subsampled.append(name)
                if not subsampling:
                    raise ModelError(
                        f"plate {name!r} takes {taken} of {fn.size} at random, which biases this engine: "
                        "remove subsample_size, or use engine='svi'"
                    )
        elif kind == "latent":
            if fn.has_enumerate_support or fn.support.is_discrete:
                raise DiscreteLatentError(
                    f"latent site {name!r} is discrete: enumerate it, or use MixtureSameFamily; data need obs="
                )
            try:
                bijection(fn)
            except NotImplementedError as error:
                raise ModelError(
                    f"latent site {name!r} has support {fn.support}, which no bijection maps to"
                ) from error
    return params, subsampled
