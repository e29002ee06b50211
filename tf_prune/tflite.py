"""What a TF-Lite file holds: its operators and its tensors, sparse ones decoded. NumPy and LiteRT's schema only."""

import dataclasses
import functools
from typing import Any

import numpy as np

# Of the schema's TensorType, by number, what weights come in.
_DTYPES = {0: "float32", 1: "float16", 2: "int32", 4: "int64", 7: "int16", 9: "int8", 3: "uint8", 6: "bool"}
# Operators that only unpack a constant, before the model runs.
_UNPACKING = ("DENSIFY", "DEQUANTIZE")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: As the converter wrote it; parts of the names of Keras's layers are in it.
        shape: With 1 for a dimension that is not fixed.
        dtype: A NumPy name, or `"other"`.
        encoding: Of a constant `"dense"`, `"random"` (single weights) or blocks such as `"1x4"`; `None` of the rest.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str | None
    _table: Any = dataclasses.field(repr=False, compare=False)
    _data: Any = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def values(self) -> np.ndarray:
        """A constant as a plain array, in the file's own numbers (quantized ones are not scaled back)."""
        if self.encoding is None:
            raise ValueError(f"{self.name!r} is computed while the model runs; only constants have values.")
        return _decode(np.asarray(self._data, np.uint8).view(self.dtype), self._table)


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operation of a file: what it is called in TF-Lite's schema, its tensors by number, and its options."""

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

    def constant(self, tensor: int) -> Tensor | None:
        """The constant that a tensor is, also where it is unpacked first; `None` if it depends on the inputs."""
        operator = self.producers.get(tensor)
        while operator is not None and operator.kind in _UNPACKING:
            tensor = operator.inputs[0]
            operator = self.producers.get(tensor)
        found = self.tensors[tensor]
        return None if found.encoding is None else found

    def runs_dense(self, tensor: int) -> bool:
        """Whether a constant is unpacked from a sparse encoding before the model runs (by `DENSIFY`)."""
        operator = self.producers.get(tensor)
        while operator is not None and operator.kind in _UNPACKING:
            if operator.kind == "DENSIFY":
                return True
            operator = self.producers.get(operator.inputs[0])
        return False

    @functools.cached_property
    def computing(self) -> tuple[Operator, ...]:
        """The operators that depend on the inputs."""
        return tuple(
            operator
            for operator in self.operators
            if not (operator.kind in _UNPACKING and self.constant(operator.outputs[0]) is not None)
        )


def read(content: bytes) -> tuple[Graph, ...]:
    """Reads the graphs of a TF-Lite file: the main one first, then those that loops and branches call.

    Args:
        content: The bytes of a `.tflite` file.

    Raises:
        ValueError: If it is none.
    """
    schema = _schema()
    if content[4:8] != b"TFL3":
        raise ValueError(f"Not a TF-Lite file: its identifier is {content[4:8]!r}, expected b'TFL3'.")
    try:
        flatbuffer = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        whole = flatbuffer.subgraphs is not None
    except Exception:  # Whatever the bytes make of the generated code.
        whole = False
    if not whole:
        raise ValueError(f"The TF-Lite file of {len(content):,} bytes is damaged. Copy or convert it again.")
    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    kinds = []
    for code in flatbuffer.operatorCodes:
        name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        kinds.append(code.customCode.decode() if name == "CUSTOM" else name)
    return tuple(_graph(table, kinds, flatbuffer.buffers) for table in flatbuffer.subgraphs)


def constants(content: bytes) -> list[np.ndarray]:
    """Every constant that may hold weights (floats and 8-bit integers) as a plain array, in the file's order.

    Args:
        content: The bytes of a `.tflite` file.
    """
    kinds = ("float32", "float16", "int8", "uint8")
    tensors = (tensor for graph in read(content) for tensor in graph.tensors)
    return [t.values for t in tensors if t.encoding is not None and t.dtype in kinds]


def _schema() -> Any:
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise ImportError(
            "Reading a TF-Lite file needs LiteRT, which is not installed. Install it with: "
            "pip install 'tf_prune[litert]'"
        ) from error
    return schema_py_generated


def _graph(table: Any, kinds: list[str], buffers: Any) -> Graph:
    operators = [
        Operator(
            kinds[operator.opcodeIndex],
            _numbers(operator.inputs),
            _numbers(operator.outputs),
            {} if operator.builtinOptions is None else vars(operator.builtinOptions),
        )
        for operator in table.operators
    ]
    tensors = [_tensor(tensor, buffers[tensor.buffer].data) for tensor in table.tensors]
    return Graph(tuple(operators), tuple(tensors), _numbers(table.inputs), _numbers(table.outputs))


def _numbers(array: Any) -> tuple[int, ...]:
    return () if array is None else tuple(int(number) for number in array)


def _tensor(table: Any, data: Any) -> Tensor:
    name = "" if table.name is None else table.name.decode()
    dtype = _DTYPES.get(table.type, "other")
    encoding = None if data is None or dtype == "other" else _encoding(table)
    return Tensor(name, _numbers(table.shape), dtype, encoding, table, data)


def _encoding(table: Any) -> str:
    if table.sparsity is None:
        return "dense"
    blocks = _numbers(table.sparsity.blockMap)
    if not blocks:
        return "random"
    levels = list(table.sparsity.traversalOrder)
    return "x".join(str(_block_size(table, levels, blocks, axis)) for axis in range(len(table.shape)))


def _decode(values: np.ndarray, tensor: Any) -> np.ndarray:
    """A constant tensor as a plain array, from its plain or its sparse encoding (TF-Lite's `SparsityParameters`)."""
    shape = _numbers(tensor.shape)
    if tensor.sparsity is None:
        return values.reshape(shape)
    # Level by level: the coordinates of everything stored so far, one column a level.
    coordinates = np.zeros((1, 0), np.int64)
    for metadata in tensor.sparsity.dimMetadata:
        if metadata.arraySegments is None:
            column = np.tile(np.arange(metadata.denseSize), len(coordinates))
            coordinates = np.repeat(coordinates, metadata.denseSize, axis=0)
        else:
            column = np.asarray(metadata.arrayIndices.values, np.int64)
            counts: Any = np.diff(np.asarray(metadata.arraySegments.values, np.int64))
            coordinates = np.repeat(coordinates, counts, axis=0)
        coordinates = np.column_stack([coordinates, column])
    blocks = _numbers(tensor.sparsity.blockMap)
    index = np.zeros((len(coordinates), len(shape)), np.int64)
    levels = list(tensor.sparsity.traversalOrder)
    for level, axis in enumerate(levels):
        if axis < len(shape):
            index[:, axis] += coordinates[:, level] * _block_size(tensor, levels, blocks, axis)
        else:
            index[:, blocks[axis - len(shape)]] += coordinates[:, level]
    dense = np.zeros(shape, values.dtype)
    dense[tuple(index.T)] = values[: len(index)]
    return dense


def _block_size(tensor: Any, levels: list[int], blocks: tuple[int, ...], axis: int) -> int:
    if axis not in blocks:
        return 1
    return int(tensor.sparsity.dimMetadata[levels.index(len(tensor.shape) + blocks.index(axis))].denseSize)
