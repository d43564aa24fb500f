"""The tensor operations of a function recorded as a graph, while it runs once.

torch's own tracer, ``make_fx``, does so too. It knows symbolic shapes, and imports sympy for them, which takes longer than to
record a training step.
"""

import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_avi.tracing.operation_mode import OperationMode

__all__ = ["is_random", "record"]

aten = torch.ops.aten

# What stands in a graph as it is.
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# They return memory with whatever was in it.
_UNWRITTEN = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}

# They return all of a tensor, where they do not change its shape.
_VIEWS = {aten.detach.default, aten.alias.default, aten.view.default, aten.expand.default}


def record(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor], *, held_at: int
) -> tuple[GraphModule, list[Tensor]]:
    """The operations of a function, below autograd, for inputs like these.

    Tensors that the function reads beside its inputs, such as buffers of a model, are inputs of the graph too, one each,
    however often they are read. Every node has an example of its value, without data, as ``meta["val"]``.

    Args:
        function: run once, on these inputs. What it decides in Python is decided as for them.
        inputs: of the function.
        held_at: the position of the first of the tensors beside them among the inputs of the graph.

    Returns:
        The graph, which returns a list; and the tensors beside the inputs.

    Raises:
        RuntimeError: the function reads a number out of a tensor that depends on an input, on a draw, or on what it computes
            of tensors beside its inputs.
        NotImplementedError: an operation has an argument that a graph cannot hold.
    """
    # Every place among the inputs has an object of its own: the same tensor may stand in two of them by chance.
    distinct = [x.detach() if any(x is y for y in inputs[:i]) else x for i, x in enumerate(inputs)]
    recorder = _Recorder(distinct, held_at)
    with recorder:
        results = function(*distinct)
    return recorder.finish(results), recorder.held


def is_random(node: Node) -> bool:
    """Whether an operation draws from torch's random state."""
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class _Recorder(OperationMode):
    """A context whose tensor operations are recorded.

    Args:
        inputs: of the graph.
        held_at: the position of tensors beside them.

    Attributes:
        held: the tensors beside the inputs that the graph reads, in the order of their first use; known at its end.
    """

    supports_higher_order_operators = True

    def __init__(self, inputs: Sequence[Tensor], held_at: int):
        super().__init__()
        self.held: list[Tensor] = []
        self._graph = Graph()
        self._nodes = WeakTensorKeyDictionary()
        # The node whose memory a node's result is in: its own, or that of which it is a view.
        self._memory: dict[Node, Node] = {}
        # Memory whose content is known in advance, as it is computed from nothing but what the function writes down.
        self._known: set[Node] = set()
        self._of_held: dict[Node, Tensor] = {}
        # Behind which the next input is added.
        self._last: Node | None = None
        placed = [self._add_input(x) for x in inputs]
        self._last = placed[held_at - 1] if held_at else None

    def run(self, func, types, args, kwargs):
        if any(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for kind in types):
            # The class does the operation by others on plain tensors, which are recorded.
            return NotImplemented
        if not isinstance(func, torch._ops.OpOverload):
            raise NotImplementedError(f"{func} takes functions, which a graph cannot hold")
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs)
        if func is aten.lift_fresh.default:
            return self._write_constant(args[0])
        if _is_composite(func):
            # Autograd would have called what it consists of, but is above the context that this is called in.
            with self:
                return func.decompose(*args, **kwargs)
        # Before the operation, which may change its arguments.
        node_args, node_kwargs = map_aggregate(args, self._argument), map_aggregate(kwargs, self._argument)
        out = func(*args, **kwargs)
        if func in _VIEWS and _is_same_view(out, args[0]):
            self._note(out, node_args[0])
            return out
        node = self._graph.call_function(func, node_args, node_kwargs)
        self._follow_memory(node)
        if isinstance(out, Tensor):
            self._note(out, node)
        elif isinstance(out, tuple | list):
            for position, part in enumerate(out):
                if isinstance(part, Tensor):
                    one = self._graph.call_function(operator.getitem, (node, position))
                    self._memory[one] = self._memory[node]
                    self._note(part, one)
        elif out is not None:
            # Of shapes alone.
            self._graph.erase_node(node)
        return out

    def finish(self, results: Sequence[Tensor | None]) -> GraphModule:
        """The graph that returns these tensors, without operations and tensors beside the inputs that nobody reads."""
        self._graph.output([x if x is None else self._node_of(x) for x in results])
        for node in reversed(self._graph.nodes):
            if node.op == "call_function" and not node.users and not _has_effects(node):
                self._graph.erase_node(node)
        for node, x in self._of_held.items():
            if node.users:
                self.held.append(x)
            else:
                self._graph.erase_node(node)
        return GraphModule(nn.Module(), self._graph)

    def _argument(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._node_of(x)
        if isinstance(x, _PLAIN):
            return x
        raise NotImplementedError(f"a graph cannot hold an argument of type {type(x).__name__}")

    def _node_of(self, x: Tensor) -> Node:
        if x not in self._nodes:
            node = self._add_input(x)
            self._of_held[node] = x.detach()
        return self._nodes[x]

    def _add_input(self, x: Tensor) -> Node:
        with self._graph.inserting_before() if self._last is None else self._graph.inserting_after(self._last):
            node = self._graph.placeholder(f"input_{len(self._memory)}")
        self._last = self._memory[node] = node
        self._note(x, node)
        return node

    def _note(self, x: Tensor, node: Node) -> None:
        if x.layout is not torch.strided:
            raise NotImplementedError(f"a graph cannot hold a tensor of layout {x.layout}")
        self._nodes[x] = node
        node.meta["val"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    def _follow_memory(self, node: Node) -> None:
        """Note which memory the result of an operation is in, and what is no longer known in advance."""
        target: Any = node.target
        schema = target._schema
        values = dict(zip((one.name for one in schema.arguments), node.args, strict=False)) | node.kwargs
        shared = [
            (values[one.name], one.alias_info.is_write)
            for one in schema.arguments
            if one.alias_info is not None and isinstance(values.get(one.name), Node)
        ]
        returns_shared = any(one.alias_info is not None for one in schema.returns)
        self._memory[node] = self._memory[shared[0][0]] if shared and returns_shared else node
        known = all(self._memory[x] in self._known for x in node.all_input_nodes)
        if known and not is_random(node) and node.target not in _UNWRITTEN:
            self._known.add(self._memory[node])
        else:
            self._known.difference_update(self._memory[x] for x, is_written in shared if is_written)

    def _write_constant(self, constant: Tensor) -> Tensor:
        """Record a tensor that the function writes down: one number as such, others as a copy of a tensor that is held."""
        options: Any = {"dtype": constant.dtype, "device": constant.device, "pin_memory": False}
        if constant.numel() == 1 and not constant.is_complex():
            node = self._graph.call_function(aten.full.default, (list(constant.shape), constant.item()), options)
        else:
            copy = constant.clone()
            node = self._graph.call_function(aten.clone.default, (self._node_of(copy),))
        self._memory[node] = node
        self._known.add(node)
        self._note(constant, node)
        return constant

    def _read(self, func, args, kwargs) -> Any:
        """A number read out of tensors, which a graph cannot follow unless it is known, or stands in a tensor that is held."""
        for x in (*args, *kwargs.values()):
            node = self._nodes.get(x) if isinstance(x, Tensor) else None
            if node is not None and node not in self._of_held and self._memory[node] not in self._known:
                raise RuntimeError(f"data-dependent: {func} reads a number out of a tensor that is computed")
        return func(*args, **kwargs)


def _is_same_view(one: Tensor, two: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation consists of others on every device."""
    has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, func.name()
    return has_kernel(name, "CompositeImplicitAutograd") and not (has_kernel(name, "CPU") or has_kernel(name, "CUDA"))


def _has_effects(node: Node) -> bool:
    """Whether it writes into its arguments, moves torch's random state on, or returns nothing: a check, which may raise."""
    schema = getattr(node.target, "_schema", None)
    return is_random(node) or (schema is not None and (schema.is_mutable or not schema.returns))
