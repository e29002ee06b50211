"""Scales of int8 tensors with which runtimes compute, where pruning has left the quantizer nothing to measure.

Where an activation is 0 for all data the quantizer gives it a range of ±1e-6. TensorFlow Lite for Microcontrollers
aborts on it in a softmax, LiteRT and it abort in a sum, and XNNPACK refuses a layer that reads or writes it.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tf_prune.complaints import places

# What the quantizer makes of a range of nothing. Values of 2e-11 would already give another scale: all are 0 in it.
_EMPTY = 2e-6 / 255
_INT8 = 9
# Where the kernel stands among the inputs; the other one is what it is multiplied with.
_KERNELS = {"FULLY_CONNECTED": (0, 1), "CONV_2D": (0, 1), "DEPTHWISE_CONV_2D": (0, 1), "CONV_3D": (0, 1)} | {
    "TRANSPOSE_CONV": (2, 1)
}
_SUMS, _SOFTMAXES = ("ADD", "SUB"), ("SOFTMAX", "LOG_SOFTMAX")
# Biases are in steps of inputs * kernel: so many in one of the outputs', so that they lose nothing.
_PER_STEP = 2**8
# Fixed-point steps of the runtimes: they check that 2 * inputs / (2**20 * outputs) < 1, and inputs * 2**26 > 1.
_LEAST_FOR_SOFTMAX = 2.0**-26


class ScaleError(ValueError):
    """Runtimes would abort on a file."""


@dataclasses.dataclass
class _Operator:
    """An operator with the scales of its int8 activations, and where its name may be found."""

    kind: str
    table: Any
    inputs: dict[int, float]
    outputs: dict[int, float]
    names: list[str]

    def __post_init__(self) -> None:
        self.empty_in = [t for t, scale in self.inputs.items() if _is_empty(scale)]
        self.empty_out = [t for t, scale in self.outputs.items() if _is_empty(scale)]
        self.read = [scale for scale in self.inputs.values() if not _is_empty(scale)]
        self.written = [scale for scale in self.outputs.values() if not _is_empty(scale)]


def repaired(content: bytes, layers: Mapping[str, str]) -> bytes:
    """The file with a scale in the order of the others where an activation is 0 for all data. Else the same bytes.

    Biases are rounded anew to the product of scales that they are in. Warns once, with the layers.

    Args:
        content: The bytes of a `.tflite` file of int8.
        layers: Name -> class of the Keras layers.

    Raises:
        ScaleError: If runtimes would abort on the file, and no scale helps.
    """
    from tensorflow.lite.python import schema_py_generated as schema

    file = bytearray(content)
    model = schema.Model.GetRootAs(file, 0)
    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    graphs = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    dead: list[str] = []
    for graph in graphs:
        operators = list(_operators(model, graph, names))
        empty = {t for operator in operators for t in (*operator.empty_in, *operator.empty_out)}
        if empty:
            dead += _where_it_begins(operators)
            free = _zero_kernels(model, graph, operators)
            scale = _scale_for(graph, operators, free, layers)
            for tensor in empty:
                graph.Tensors(tensor).Quantization().ScaleAsNumpy()[:] = scale
            for operator in operators:
                if operator.kind in _KERNELS and operator.empty_in:
                    kernel = operator.table.Inputs(_KERNELS[operator.kind][1])
                    if kernel in free:
                        out = max(operator.written, default=scale)
                        graph.Tensors(kernel).Quantization().ScaleAsNumpy()[:] = out / scale / _PER_STEP
                    _rescale_bias(model, graph, operator)
        for operator in _operators(model, graph, names):
            _check(operator, layers)
    if dead:
        warnings.warn(
            f"What {places(dead, layers)} puts out is 0 for all data given: int8 finds no range for it, with which "
            "runtimes abort. It was given one of the size of the others; the file computes the same.",
            stacklevel=2,
        )
    return bytes(file)


def _is_empty(scale: float) -> bool:
    return not scale or math.isclose(scale, _EMPTY, rel_tol=1e-5)


def _operators(model: Any, graph: Any, names: Mapping[int, str]) -> Iterator[_Operator]:
    for i in range(graph.OperatorsLength()):
        table = graph.Operators(i)
        code = model.OperatorCodes(table.OpcodeIndex())
        inputs = [int(t) for t in table.InputsAsNumpy() if t >= 0] if table.InputsLength() else []
        outputs = [int(t) for t in table.OutputsAsNumpy() if t >= 0] if table.OutputsLength() else []
        kind = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        # What the model puts out bears no layer's name: the kernel may, or what is read.
        tensors = [*outputs[:1], *(inputs[1:2] if kind in _KERNELS else ())]
        if outputs and (graph.Tensors(outputs[0]).Name() or b"").startswith(b"StatefulPartitionedCall"):
            tensors = (tensors + inputs[:1])[1:2]
        yield _Operator(
            kind,
            table,
            {t: scale for t in inputs if (scale := _scale_of(model, graph, t)) is not None},
            {t: scale for t in outputs if (scale := _scale_of(model, graph, t)) is not None},
            [(graph.Tensors(t).Name() or b"").decode() for t in tensors],
        )


def _scale_of(model: Any, graph: Any, number: int) -> float | None:
    """Of an activation of int8."""
    tensor = graph.Tensors(number)
    quantization = tensor.Quantization()
    if tensor.Type() != _INT8 or quantization is None or quantization.ScaleLength() != 1:
        return None
    constant = model.Buffers(tensor.Buffer()).DataLength() > 0
    scale = float(quantization.Scale(0))
    # Not a real range from -1e-6 to 1e-6 that is cut unevenly.
    return None if constant or (_is_empty(scale) and quantization.ZeroPoint(0) != 0) else scale


def _where_it_begins(operators: list[_Operator]) -> list[str]:
    """Names of operators that put out zeros and read others."""
    return [";".join(o.names) for o in operators if o.empty_out and not o.empty_in]


def _kernel_scale(graph: Any, operator: _Operator) -> float:
    kernel = graph.Tensors(operator.table.Inputs(_KERNELS[operator.kind][1])).Quantization()
    return float(kernel.ScaleAsNumpy().max()) if kernel is not None and kernel.ScaleLength() else 1.0


def _zero_kernels(model: Any, graph: Any, operators: list[_Operator]) -> set[int]:
    """Kernels of one operator that hold nothing but zeros, which any scale suits."""
    kernels = [o.table.Inputs(_KERNELS[o.kind][1]) for o in operators if o.kind in _KERNELS]
    found = set()
    for kernel in kernels:
        values = model.Buffers(graph.Tensors(kernel).Buffer()).DataAsNumpy()
        quantization = graph.Tensors(kernel).Quantization()
        if kernels.count(kernel) == 1 and isinstance(values, np.ndarray) and not values.any() and quantization:
            found |= {kernel} if quantization.ScaleLength() else set()
    return found


def _scale_for(graph: Any, operators: list[_Operator], free: set[int], layers: Mapping[str, str]) -> float:
    """One scale for all: the median of the others, within what the neighbours ask for."""
    least, most = [2.0**-20], [2.0**10]
    for o in operators:
        if o.kind in _KERNELS:
            kernel = _kernel_scale(graph, o)
            if o.empty_in and o.table.Inputs(_KERNELS[o.kind][1]) not in free:
                most += [out / kernel / _PER_STEP for out in o.written]
            least += [read * kernel / 2**7 for read in o.read if o.empty_out]
        elif o.kind in _SUMS:
            most += [out * 2**6 for out in o.written if o.empty_in]
            least += [read / 2**6 for read in o.read if o.empty_out]
        elif o.kind == "MUL":
            most += [out / read * 2**6 for out in o.written for read in o.read if o.empty_in]
            least += [math.prod(o.read) / 2**6] if o.empty_out and not o.empty_in else []
    if max(least) > min(most):
        raise ScaleError(
            f"What {places(_where_it_begins(operators), layers)} puts out is 0 for all data given, and no int8 scale "
            "suits all its neighbours. Give data for which it is not, remove the layer, or take dtype='dynamic_int8'."
        )
    others = [scale for o in operators for scale in (*o.read, *o.written)]
    return float(np.clip(np.median(others or [2.0**-7]), max(least), min(most)))


def _rescale_bias(model: Any, graph: Any, operator: _Operator) -> None:
    place, kernel = _KERNELS[operator.kind]
    number = operator.table.Inputs(3 if operator.kind == "TRANSPOSE_CONV" else 2) if _has_bias(operator) else -1
    if number < 0:
        return
    bias = graph.Tensors(number)
    scales = bias.Quantization().ScaleAsNumpy()
    new = (
        graph.Tensors(operator.table.Inputs(place)).Quantization().Scale(0)
        * graph.Tensors(operator.table.Inputs(kernel)).Quantization().ScaleAsNumpy()
    ).astype(np.float32)
    values = model.Buffers(bias.Buffer()).DataAsNumpy()
    if isinstance(values, np.ndarray):
        numbers = values.view(np.int32)
        numbers[:] = np.round(numbers * (scales.astype(np.float64) / new))
    scales[:] = new


def _has_bias(operator: _Operator) -> bool:
    return operator.table.InputsLength() > (3 if operator.kind == "TRANSPOSE_CONV" else 2)


def _check(operator: _Operator, layers: Mapping[str, str]) -> None:
    inputs, outputs = list(operator.inputs.values()), list(operator.outputs.values())
    if operator.kind in _SUMS and len(inputs) == 2 and outputs:
        fails = 2 * max(inputs) >= 2**20 * outputs[0]
    else:
        fails = operator.kind in _SOFTMAXES and bool(inputs) and inputs[0] <= _LEAST_FOR_SOFTMAX
    if fails:
        where = places([";".join(operator.names)], layers)
        raise ScaleError(
            f"Runtimes abort on the int8 scales of {operator.kind} in {where}: its inputs are in steps of "
            f"{max(inputs):.2g}, its outputs in steps of {max(outputs, default=0):.2g}. Give data for which they vary "
            "more, or take dtype='dynamic_int8'."
        )
