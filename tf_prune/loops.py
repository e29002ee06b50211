"""Which loops a signature of a SavedModel runs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

_LOOPS = ("While", "StatelessWhile")


def loops_of(saved_model: Path, signature: str) -> list[str]:
    """The names of the loops that a signature reaches, also through functions and branches.

    Args:
        saved_model: Its folder.
        signature: The name of one that it has.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    content = saved_model_pb2.SavedModel()
    content.ParseFromString((saved_model / "saved_model.pb").read_bytes())
    (graph,) = [one for one in content.meta_graphs if signature in one.signature_def][:1]
    functions = {function.signature.name: function.node_def for function in graph.graph_def.library.function}
    outputs = [tensor.name for tensor in graph.signature_def[signature].outputs.values()]
    waiting = [_behind(outputs, graph.graph_def.node)]
    seen: set[str] = set()
    found: list[str] = []
    while waiting:
        for node in waiting.pop():
            if node.op in _LOOPS:
                found.append(node.name)
            called = {name for value in node.attr.values() for name in _functions_in(value)} - seen
            seen |= called
            waiting += [functions[name] for name in called if name in functions]
    return sorted(set(found))


def _behind(outputs: Iterable[str], nodes: Iterable[Any]) -> list[Any]:
    """The nodes that outputs are computed from."""
    by_name = {node.name: node for node in nodes}
    waiting, reached = list(outputs), {}
    while waiting:
        name = waiting.pop().removeprefix("^").split(":")[0]
        if name in by_name and name not in reached:
            reached[name] = by_name[name]
            waiting += by_name[name].input
    return list(reached.values())


def _functions_in(value: Any) -> list[str]:
    return [function.name for function in (value.func, *value.list.func) if function.name]
