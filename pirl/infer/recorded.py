"""A potential and its gradient as one recorded list of tensor operations, without the model's Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from pirl.infer.potential import Potential, Values

# What torch's own formulas do in place to a fresh result that nothing else reads: vector @ matrix, derivative of clamp.
_IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.squeeze_.dim: torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze_.dims: torch.ops.aten.squeeze.dims,
    torch.ops.aten.logical_and_.default: torch.ops.aten.logical_and.default,
}


def fold_constants(graph: GraphModule) -> GraphModule:
    """Evaluate once what does not depend on the inputs; changes and returns the module."""
    known: dict[Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.target in _IN_PLACE and len(node.all_input_nodes[0].users) == 1:
            node.target = _IN_PLACE[node.target]
        if node.op == "get_attr":
            known[node] = getattr(graph, str(node.target))
        if node.op != "call_function" or not all(source in known for source in node.all_input_nodes):
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        lookup = known.__getitem__
        value = node.target(*map_arg(node.args, lookup), **map_arg(node.kwargs, lookup))
        if not isinstance(value, Tensor):
            continue
        name = f"constant_{len(known)}"
        graph.register_buffer(name, value)
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        node.replace_all_uses_with(constant)
        graph.graph.erase_node(node)
        known[constant] = value
    if any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.graph.nodes
    ):
        raise ValueError("the graph writes to its inputs or constants")
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


class _Replay(torch.autograd.Function):
    """Value of a recorded potential, with the gradient that was computed beside it."""

    @staticmethod
    def forward(ctx: Any, graph: GraphModule, *z: Tensor) -> Tensor:
        ctx.slopes, value = graph(*z)
        return value

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        return (None, *(slope * scale for slope in ctx.slopes))


def record(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> Callable[..., Any] | None:
    """Record a function of tensors at ``inputs`` and compare it at ``others``; None where that is not possible.

    A function that branches on a value cannot be recorded: the recorder refuses to read values.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # First, so that what is computed once and kept (counts of trajectories) is not computed by a tracer.
    expected = tree_leaves(function(*others))
    # A folded constant must never be written to. Where a custom Function hides from torch's functionalisation, the
    # recording is taken as it is, and refused if it writes to anything.
    for pure in (torch.func.functionalize(function, remove="mutations"), function):
        try:
            graph = fold_constants(make_fx(pure)(*inputs))
            with torch.no_grad():
                found = tree_leaves(graph(*others))
            break
        except Exception:  # a branch on a value, an operator or a Function that torch.func does not know
            continue
    else:
        return None
    tolerance = torch.finfo(inputs[0].dtype).eps ** 0.6
    same = (torch.allclose(a, b, tolerance, tolerance, equal_nan=True) for a, b in zip(found, expected, strict=True))
    return graph if all(same) else None


def recorded(potential: Potential, first: Values, second: Values) -> Callable[[Values], Tensor] | None:
    """Record U and its gradient at ``first``, check them at ``second``; None where that is not possible."""
    names = list(potential.latent)

    def energy(*z: Tensor) -> Tensor:
        return potential(dict(zip(names, z, strict=True)))

    both = torch.func.grad_and_value(energy, argnums=tuple(range(len(names))))
    graph = record(both, *(tuple(z[name].detach() for name in names) for z in (first, second)))
    if graph is None:
        return None
    return lambda z: _Replay.apply(graph, *(z[name] for name in names))
