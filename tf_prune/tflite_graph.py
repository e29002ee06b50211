"""The graphs of a TF-Lite file, and the check that they are what the code that asks them relies on."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tf_prune.tflite_sparsity import SparseEncoding

# Operators on images that have one input, and keep its shape.
UNARY = (
    *("ABS", "CEIL", "COS", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG", "RELU"),
    *("RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "ROUND", "RSQRT", "SIN", "SQRT", "SQUARE", "TANH"),
)
# Operators that only unpack a constant, before the model runs.
_UNPACKING = ("DENSIFY", "DEQUANTIZE")
_NUM_INPUTS = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"), 2),
    **dict.fromkeys(("ADD", "MAXIMUM", "MEAN", "MINIMUM", "MUL", "PAD", "RESIZE_BILINEAR", "SUM"), 2),
    **dict.fromkeys((*UNARY, *_UNPACKING, "DEPTH_TO_SPACE"), 1),
}
# Of which inputs the number of axes, and the type, is fixed.
_IMAGES = {"CONV_2D": (0, 1), "DEPTHWISE_CONV_2D": (0, 1), "TRANSPOSE_CONV": (1,), "RESIZE_BILINEAR": (0,)}
_INTEGERS = {"MEAN": 1, "PAD": 1, "SUM": 1}
_KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: As the converter wrote it; parts of the names of Keras's layers are in it.
        shape: With 1 for a dimension that is not fixed.
        dtype: A NumPy name, or `"other"`.
        encoding: Of a constant `"dense"`, `"random"` (single weights) or blocks such as `"1x4"`; `None` of the rest.
        open_axes: Which dimensions are not fixed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str | None
    _data: np.ndarray | None = dataclasses.field(repr=False, compare=False)
    _sparse: SparseEncoding | None = dataclasses.field(repr=False, compare=False)
    open_axes: tuple[int, ...] = ()

    @functools.cached_property
    def values(self) -> np.ndarray:
        """A constant as a plain array, in the file's own numbers (quantized ones are not scaled back)."""
        if self.encoding is None or self._data is None:
            raise ValueError(f"{self.name!r} is computed while the model runs; only constants have values.")
        values = self._data.view(self.dtype)
        return values.reshape(self.shape) if self._sparse is None else self._sparse.decode(values)

    @functools.cached_property
    def num_zeros(self) -> int:
        """How many of `values` are zero."""
        return self.values.size - int(np.count_nonzero(self.values))

    @property
    def num_bytes(self) -> int:
        """The size of `values`; 0 if it is no constant."""
        return 0 if self.encoding is None else math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operation of a file: what it is called in TF-Lite's schema, and its tensors by number.

    Attributes:
        kind: Its name; of a custom operator the name it has in the file.
        inputs: Numbers of tensors; -1 stands for one that is left out.
        outputs: Numbers of tensors.
        options: Of convolutions, and which graphs loops and branches call.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A graph of a file. `inputs` and `outputs` are numbers of tensors; operators are in running order."""

    operators: tuple[Operator, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @functools.cached_property
    def producers(self) -> dict[int, Operator]:
        """Which operator computes a tensor."""
        return {tensor: operator for operator in self.operators for tensor in operator.outputs}

    @functools.cached_property
    def _unpacked(self) -> dict[int, tuple[int, bool]]:
        """From which tensor others are unpacked, and whether from a sparse encoding on the way."""
        found: dict[int, tuple[int, bool]] = {}
        for operator in self.operators:
            if operator.kind in _UNPACKING:
                source, is_sparse = found.get(operator.inputs[0], (operator.inputs[0], False))
                found[operator.outputs[0]] = source, is_sparse or operator.kind == "DENSIFY"
        return found

    def constant(self, tensor: int) -> Tensor | None:
        """The constant that a tensor is, also where it is unpacked first; `None` if it depends on the inputs."""
        found = self.tensors[self._unpacked.get(tensor, (tensor, False))[0]]
        return None if found.encoding is None else found

    def runs_dense(self, tensor: int) -> bool:
        """Whether a constant is unpacked from a sparse encoding before the model runs (by `DENSIFY`)."""
        return self._unpacked.get(tensor, (tensor, False))[1]

    @functools.cached_property
    def computing(self) -> tuple[Operator, ...]:
        """The operators that depend on the inputs."""
        return tuple(
            operator
            for operator in self.operators
            if not (operator.kind in _UNPACKING and self.constant(operator.outputs[0]) is not None)
        )


def check_graph(graph: Graph, num_graphs: int) -> None:
    """Checks that the tensors are there, that what is read was computed before, and what operators need.

    Raises:
        ValueError: Says what is wrong.
    """
    for tensor in (*graph.inputs, *graph.outputs):
        if not 0 <= tensor < len(graph.tensors):
            raise ValueError(f"a graph of {len(graph.tensors):,} tensors is said to begin or end in number {tensor:,}")
    computed = {tensor for operator in graph.operators for tensor in operator.outputs}
    waiting = set(computed)
    for number, operator in enumerate(graph.operators):
        try:
            for why in _faults(graph, operator, waiting, num_graphs):
                raise ValueError(why)
        except ValueError as error:
            raise ValueError(f"operator {number:,}, {operator.kind}: {error}") from None
        waiting.difference_update(operator.outputs)


def _faults(graph: Graph, operator: Operator, waiting: set[int], num_graphs: int) -> Iterator[str]:
    """What is wrong with an operator. `waiting` are the tensors that are not computed before it."""
    count = len(graph.tensors)
    if not all(-1 <= t < count for t in operator.inputs) or not all(0 <= t < count for t in operator.outputs):
        yield f"it reads or writes tensors that are not among the {count:,} of its graph"
    if any(t in waiting for t in operator.inputs):
        yield "it reads what it, or an operator behind it, computes"
    if len(set(operator.outputs)) < len(operator.outputs) or not waiting.issuperset(operator.outputs):
        yield "it writes what another operator has computed"
    if any(graph.tensors[t].encoding is not None for t in operator.outputs):
        yield "it writes into a constant"
    for name, value in operator.options.items():
        if name.lower().endswith("subgraphindex") and not 0 <= value < num_graphs:
            yield f"it calls graph {value:,} of {num_graphs:,}"
    needed = _NUM_INPUTS.get(operator.kind, 0)
    if needed and (len(operator.inputs) < needed or min(operator.inputs[:needed]) < 0 or len(operator.outputs) != 1):
        yield f"it has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs; expected {needed} and 1"
    for place in _IMAGES.get(operator.kind, ()):
        if len(shape := graph.tensors[operator.inputs[place]].shape) != 4:
            yield f"its input {place} has the shape {list(shape)}; expected four axes"
    if operator.kind in _INTEGERS:
        dtype = graph.tensors[operator.inputs[_INTEGERS[operator.kind]]].dtype
        if "int" not in dtype:
            yield f"its axes or amounts are {dtype}; expected integers"
    if operator.kind in _KERNELS:
        shape = graph.tensors[operator.inputs[1]].shape
        if not shape or not math.prod(shape):
            yield f"its kernel has the shape {list(shape)}; expected axes, and weights"
