"""Tensors that a traced graph holds, and random numbers that it draws, made inputs of it."""

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

__all__ = ["lift_draws", "lift_tensors"]


def lift_tensors(traced: GraphModule, position: int) -> list[Tensor]:
    """Make inputs of the tensors that the graph holds, such as buffers of the model, which may change between steps.

    Args:
        traced: the graph, changed in place.
        position: the position of the first of them among the inputs.

    Returns:
        The tensors.
    """
    held = [node for node in traced.graph.nodes if node.op == "get_attr"]
    # Constants that the program writes as tensors stay: the graph copies them before use (lift_fresh).
    held = [node for node in held if any("lift_fresh" not in str(user.target) for user in node.users)]
    tensors = [getattr(traced, node.target) for node in held]
    _become_inputs(traced, held, position)
    return tensors


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
    random = [node for node in traced.graph.nodes if _is_random(node)]
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
    count = sum(node.op == "placeholder" for node in traced.graph.nodes)
    _become_inputs(traced, drawn, count)
    # Erase the empty tensors that were drawn into. As they were changed in place, torch would not remove them as unused.
    for node in reversed(needed):
        if not node.users and node not in drawn:
            traced.graph.erase_node(node)
    traced.recompile()
    return GraphModule(root, program), len(drawn) == len(random)


def _is_random(node: Node) -> bool:
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


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


def _become_inputs(traced: GraphModule, nodes: list[Node], position: int) -> None:
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for count, node in enumerate(nodes, start=position):
        with traced.graph.inserting_after(placeholders[count - 1]):
            placeholder = traced.graph.placeholder(f"lifted_{count}")
        placeholder.meta = dict(node.meta)
        placeholders.insert(count, placeholder)
        node.replace_all_uses_with(placeholder)
        traced.graph.erase_node(node)
    traced.recompile()
