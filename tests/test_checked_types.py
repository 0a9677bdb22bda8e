"""That types are checked while tests run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import beartype
import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import pirl
from tests import checked_types


def product(left: Float[Tensor, "n m"], right: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    return left @ right if len(left) < 9 else left


def defined_anew() -> Callable[[int], int]:
    @checked_types.first_calls(typechecker=beartype.beartype)
    def inner(number: int) -> int:
        return number

    return inner


@dataclasses.dataclass
class Step:
    size: float


def test_pirl_is_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="features"):
        pirl.linear_reward("features", torch.zeros(3))  # type: ignore[arg-type]


def test_arguments_and_results_are_checked_in_the_first_calls_of_each_test() -> None:
    checked = checked_types.first_calls(product, typechecker=beartype.beartype)
    x = torch.ones(2, 3)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
        checked(x, x)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        checked(torch.ones(9, 3), torch.ones(3, 2))
    for _ in range(checked_types.CALLS):
        assert checked(x, x.T).shape == (2, 2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        checked(x, x)
    for _ in range(checked_types.CALLS + 3, checked_types.LATER):
        checked(x, x.T)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
        checked(x, x)
    checked_types.calls.clear()
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(x, x)


def test_functions_defined_anew_count_together_and_classes_count_by_their_own_init() -> None:
    for _ in range(checked_types.CALLS):
        defined_anew()(1)
    assert defined_anew()("one") == "one"  # type: ignore[arg-type]
    step = checked_types.first_calls(Step, typechecker=beartype.beartype)
    with pytest.raises(jaxtyping.TypeCheckError, match="size"):
        step("long")
