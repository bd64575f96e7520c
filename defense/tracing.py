"""Tracing a model with torch.fx, and cutting its graph in two at a node."""

import traceback
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from defense.errors import SplitError

INPUT = ":input"  # "name:input" is what goes into a module, "name" what comes out of it


class NamingTracer(fx.Tracer):
    """Remembers which graph nodes are each module's input and output, leaf or not."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[fx.Node]] = {}
        self.inputs: dict[str, list[fx.Node]] = {}

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.inputs.setdefault(name, []).extend(a.node for a in args[:1] if isinstance(a, fx.Proxy))
        self.outputs.setdefault(name, []).extend([result.node] if isinstance(result, fx.Proxy) else [])
        return result

    def node_of(self, layer: str) -> fx.Node:
        """The one node that is the output (or, of ``name:input``, the input) of a layer."""
        name, is_input = layer.removesuffix(INPUT), layer.endswith(INPUT)
        nodes = (self.inputs if is_input else self.outputs).get(name, [])
        if len(nodes) != 1:
            raise SplitError(
                f"expected layer '{layer}' to be called once with one tensor as its "
                f"{'input' if is_input else 'output'}, found {len(nodes)}; choose another layer"
            )
        return nodes[0]


def trace(model: nn.Module) -> tuple[NamingTracer, fx.Graph]:
    """The graph of a model, and where its modules are in it.

    Raises:
        SplitError: naming the line of the model that cannot be traced, and the way out.
    """
    tracer = NamingTracer()
    try:
        return tracer, tracer.trace(model)
    except Exception as error:  # tracing runs the model's own code, which can fail in any way
        operation = _failing_operation(error)
        raise SplitError(
            f"torch.fx cannot trace {type(model).__name__}: {operation}: {error}. Way out: move data-dependent "
            "control flow into a submodule and mark it with torch.fx.wrap, or rewrite that line without it; "
            "or pass a torch.fx.GraphModule of the model that you made yourself"
        ) from error


def _failing_operation(error: BaseException) -> str:
    """Where in the model's own code tracing stopped: file, line, function, source."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frame = frames[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}: `{frame.line}`"


def cut_graph(model: nn.Module, graph: fx.Graph, at: fx.Node, layer: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two graph modules: images -> (activations, *bypass), and back to logits."""
    trunk_nodes = _ancestors(at)
    output = next(node for node in graph.nodes if node.op == "output")
    tail_nodes = _ancestors(output) - trunk_nodes
    crossing = {a for node in tail_nodes | {output} for a in node.all_input_nodes if a in trunk_nodes and a is not at}
    # Parameters that are read directly belong to whichever part uses them.
    parameters = [node for node in graph.nodes if node in crossing and node.op == "get_attr"]
    bypass = [node for node in graph.nodes if node in crossing and node.op != "get_attr"]

    trunk, values = _copy_nodes(graph, trunk_nodes, {})
    trunk.output(tuple(values[node] for node in [at, *bypass]))

    tail = fx.Graph()
    inputs = {node: tail.placeholder(f"value_{i}") for i, node in enumerate([at, *bypass])}
    tail, values = _copy_nodes(graph, tail_nodes.union(parameters) - {at, output}, inputs, into=tail)
    tail.output(fx.node.map_arg(output.args[0], lambda node: values[node]))
    return fx.GraphModule(model, trunk, "Trunk"), fx.GraphModule(model, tail, "Tail")


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        new = [a for a in todo.pop().all_input_nodes if a not in found]
        found.update(new)
        todo.extend(new)
    return found


def _copy_nodes(
    graph: fx.Graph, nodes: Iterable[fx.Node], values: dict[fx.Node, fx.Node], into: fx.Graph | None = None
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    into, values, chosen = into or fx.Graph(), dict(values), set(nodes)
    for node in graph.nodes:
        if node in chosen:
            values[node] = into.node_copy(node, lambda n: values[n])
    return into, values
