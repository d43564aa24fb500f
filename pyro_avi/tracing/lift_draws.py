"""Random numbers that a graph draws, made inputs of it."""

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from pyro_avi.tracing.operations import is_random

__all__ = ["lift_draws"]


def lift_draws(traced: GraphModule) -> tuple[GraphModule, bool]:
    """Make inputs of the random numbers that the graph draws, up to the first draw that depends on an input.

    Inside of a graph draws take longer to dispatch, and a graph without draws is a pure function. They become the last inputs.

    Args:
        traced: the graph, changed in place.

    Returns:
        A program without inputs that makes the list of these draws, in the same order from the same random state, into the
        same memory at every call; and whether these are all draws of the graph.
    """
    drawn: list[Node] = []
    needed: dict[Node, None] = {}
    random = [node for node in traced.graph.nodes if is_random(node)]
    for node in random:
        ancestors = _ancestors(node)
        if any(other.op != "call_function" for other in ancestors):
            break
        drawn.append(node)
        needed |= ancestors
    program, root = Graph(), nn.Module()
    copies: dict[Node, Node] = {}
    for node in traced.graph.nodes:
        if node not in needed:
            continue
        if node.target == torch.ops.aten.empty.memory_format and all(user in drawn for user in node.users):
            # The same memory at every step: the draws of a step are not read after it.
            root.register_buffer(node.name, node.target(*node.args, **node.kwargs))
            copies[node] = program.get_attr(node.name)
        else:
            copies[node] = program.node_copy(node, copies.__getitem__)
    program.output([copies[node] for node in drawn])
    _become_inputs(traced, drawn)
    # Erase the empty tensors that were drawn into. As they were changed in place, torch would not remove them as unused.
    for node in reversed(needed):
        if not node.users and node not in drawn:
            traced.graph.erase_node(node)
    traced.recompile()
    return GraphModule(root, program), len(drawn) == len(random)


def _ancestors(node: Node) -> dict[Node, None]:
    """The node and all nodes that it is computed from."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found[one] = None
            waiting += one.all_input_nodes
    return found


def _become_inputs(traced: GraphModule, nodes: list[Node]) -> None:
    """Replace nodes by further inputs, behind the others."""
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    for count, node in enumerate(nodes):
        with traced.graph.inserting_after(last):
            last = traced.graph.placeholder(f"draw_{count}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        traced.graph.erase_node(node)
