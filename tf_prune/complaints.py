"""What TensorFlow's converter complains of, in words: which operator, and from which Keras layer it comes."""

import re
from collections.abc import Iterable, Mapping

# `loc(callsite(fused["Cumprod:", "model_1/layer_1/Cumprod@__inference_serve_9"] at ...`, of the operation itself.
_OPERATION = re.compile(r'fused\["(\w+):", "([^"@]+)')
_REASON = re.compile(r"error: (?:loc\(.*\): )?(.*)")
_WITHOUT_TFLITE = "pass tflite=False to export the SavedModel alone, for a server"


def layer_of(name: str, layers: Mapping[str, str]) -> str | None:
    """The innermost Keras layer that the name of a node bears; `None` if it bears none.

    Args:
        name: Of a node or a tensor, as `"model_1/gru_1/while"`: tracing adds a number to the names of layers.
        layers: Name -> class of the Keras layers.
    """
    parts = re.split(r"[/;:]", name)
    known = [one for part in parts for one in (re.sub(r"_\d+$", "", part), part) if one in layers]
    return known[-1] if known else None


def places(names: Iterable[str], layers: Mapping[str, str]) -> str:
    """Nodes by their Keras layers, with the class of each; by their own names where they bear none."""
    said = {}
    for name in names:
        layer = layer_of(name, layers)
        own = next((part for part in name.split(";") if "/" in part), name)
        said[f"{layer!r} ({layers[layer]})" if layer else f"node {own!r}"] = True
    return ", ".join(said)


def why(message: str, dtype: str, layers: Mapping[str, str]) -> str:
    """One paragraph in place of the converter's message.

    Args:
        message: All that it said.
        dtype: As in `convert`.
        layers: Name -> class of the Keras layers.
    """
    lines = [line for line in message.splitlines() if "error:" in line]
    found = [match.groups() for line in lines if (match := _OPERATION.search(line))]
    missing = sorted(
        {
            name
            for names in re.findall(r"(?:Select|Custom) ops: ([\w, ]+)", message)
            for name in re.split(r"[,\s]+", names)
            if name
        }
    )
    if missing:
        flex = (
            "; or pass flex=True, which keeps TensorFlow's own: such a file runs only in a runtime that was built with "
            "the Flex delegate"
        )
        # The Flex delegate has none of these either, such as Python's functions.
        flex = "" if "Custom ops: " in message else flex
        operators = ", ".join(_with_place(name, found, layers) for name in missing)
        return f"TF-Lite has no operator {operators}. Replace the layers that use it; or {_WITHOUT_TFLITE}{flex}."
    where = places([name for _, name in found], layers)
    if "tensor list" in message.lower() or "TensorListReserve" in message:
        return (
            f"A recurrent layer{f' ({where})' if where else ''} needs a batch of fixed size in TF-Lite. Pass "
            "batch_size=1, or the size that you need."
        )
    reason = _REASON.search(lines[0]) if lines else None
    first = reason[1] if reason else next((line.strip() for line in message.splitlines() if line.strip()), "no reason")
    hint = " An operator of the model may have no int8 kernel: try dtype='dynamic_int8'." if dtype == "int8" else ""
    at = f" at {where}" if where else ""
    return f"TensorFlow's converter failed{at}: {first[:300]} Where TF-Lite cannot do it, {_WITHOUT_TFLITE}.{hint}"


def _with_place(operator: str, found: list[tuple[str, ...]], layers: Mapping[str, str]) -> str:
    where = places([name for kind, name in found if kind == operator], layers)
    return f"{operator} of {where}" if where else operator
