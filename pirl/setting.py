"""Where a run takes place: device and dtype, as its arguments say, and the global state of torch and Pyro meanwhile."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pirl.errors import OptionError, first_line, form
from pirl.infer.engine import own_generator


class Setting(NamedTuple):
    """Arguments of a model, moved to where it runs; also those that lists, tuples and dictionaries hold."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Setting:
        """Take device and dtype from the first argument that has one, unless given; float64 on the CPU without any."""
        everything = list(leaves([*args, *kwargs.values()]))
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise OptionError(f"dtype is {dtype!r}: use torch.float64 or torch.float32")
        moving = device is not None or dtype is not None
        dtype = dtype or _first(everything, "dtype", lambda d: isinstance(d, torch.dtype) and d.is_floating_point)
        dtype = dtype or torch.float64
        device = device or _first(everything, "device", lambda d: isinstance(d, torch.device)) or "cpu"
        device = own_device(device)
        moved = _changed((tuple(args), dict(kwargs)), lambda value: _moved(value, device, dtype, moving), {})
        return cls(moved[0], moved[1], device, dtype)

    def unobserved(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the model simulates: nothing of the demonstrations but their plan."""
        return _changed(
            (self.args, self.kwargs), lambda value: value.unobserved() if hasattr(value, "unobserved") else value, {}
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Set torch's default dtype and device, and give Pyro an empty parameter store; restore all of them."""
        import pyro

        before = torch.get_default_dtype()
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(self.dtype)
            if self.device != torch.empty(0).device:
                stack.enter_context(self.device)  # only where needed: it slows every call into torch
            if self.device.type == "cuda":
                torch.cuda.init()
                stack.enter_context(torch.cuda.device(self.device))  # whose generator is seeded and restored
            stack.enter_context(own_generator())
            stack.enter_context(pyro.get_param_store().scope())
            yield


def _first(values: Sequence[Any], attribute: str, fits: Callable[[Any], bool]) -> Any:
    found = (getattr(value, attribute, None) for value in values)
    return next((value for value in found if fits(value)), None)


def own_device(device: torch.device | str) -> torch.device:
    """The device, which can be computed on; each process that ``torchrun`` starts on a machine has a GPU of its own.

    Raises:
        OptionError: torch does not know it, or there is none here.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(f"device {device!r} is not known: use 'cpu', 'cuda' or 'cuda:0'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("there is no CUDA device here: use 'cpu'")
    shared = device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ
    if shared:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    try:
        torch.zeros(1, dtype=torch.uint8, device=device).item()  # "meta" tells no numbers, and "mps" has no float64
    except Exception as error:  # of whatever kind: backends that are not there raise many, and at length
        told = first_line(error).partition(". ")[0]
        raise OptionError(f"device '{device}' cannot be used ({told}): use another, such as 'cpu'") from None
    if shared:
        torch.cuda.set_device(device)
    return device


def _moved(value: Any, device: torch.device, dtype: torch.dtype, given: bool) -> Any:
    """Move one argument: floating tensors always follow the run; objects with ``to`` when asked, or if they differ."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).to(device=device, dtype=dtype)
    differs = getattr(value, "dtype", dtype) != dtype or getattr(value, "device", device) != device
    if hasattr(value, "to") and (given or differs):
        return value.to(device=device, dtype=dtype)
    return value


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries hold, and what they in turn hold; what several hold, once.

    Raises:
        OptionError: something holds itself.
    """
    opened = dict[int, bool]()

    def of(value: Any) -> Iterator[Any]:
        if not _holds(value):
            yield value
        elif opened.get(id(value)):
            raise OptionError(f"an argument is a {type(value).__name__} that holds itself: give one that ends")
        elif id(value) not in opened:
            opened[id(value)] = True
            for item in value.values() if isinstance(value, dict) else value:
                yield from of(item)
            opened[id(value)] = False

    return of(value)


def _holds(value: Any) -> bool:
    """Whether it is a plain container; other classes know themselves what to do with what they hold."""
    return type(value) in (list, tuple, dict) or (isinstance(value, tuple) and hasattr(value, "_fields"))


def _changed(value: Any, change: Callable[[Any], Any], done: dict[int, tuple[Any, Any]]) -> Any:
    """The same with every leaf changed; what is there twice is changed once, and stays one object."""
    if isinstance(value, (type, str, bytes, int, float, complex)) or value is None:
        return value
    if id(value) not in done:
        if not _holds(value):
            new = change(value)
        else:
            held = list(value.values() if isinstance(value, dict) else value)
            items = [_changed(item, change, done) for item in held]
            if all(a is b for a, b in zip(items, held, strict=True)):
                new = value
            elif isinstance(value, dict):
                new = dict(zip(value, items, strict=True))
            else:
                new = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        done[id(value)] = value, new  # kept, so that its id is not another one's
    return done[id(value)][1]


def bound(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of the model by its parameters; a variadic parameter is numbered.

    Raises:
        OptionError: they are not those that the model takes.
    """
    signature = inspect.signature(model)
    named: dict[str, Any] = {}
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        called = getattr(model, "__name__", type(model).__name__)
        raise OptionError(f"the model is {called}{signature}: {error}; give its arguments after it") from None
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def own_keywords(
    model: Callable[..., Any], options: dict[str, Any], given: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part keyword arguments of the model, which its signature names, from options of the engine.

    Raises:
        OptionError: the model cannot be called.
    """
    if not callable(model):
        raise OptionError(f"the model is {form(model)}: give a function, then its arguments")
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(f"model_kwargs is {form(given)}: give a dictionary")
    named = set(inspect.signature(model).parameters)
    rest = {name: value for name, value in options.items() if name not in named}
    return {name: value for name, value in options.items() if name in named} | dict(given or {}), rest
