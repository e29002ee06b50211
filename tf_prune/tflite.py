"""Reads TF-Lite files, whole and damaged ones: what is wrong with a file is found here, before anything is done.

Python's schema of LiteRT loops and allocates as a file says, so that only its tables of names are used.
"""

import enum
import math
from typing import Any

import numpy as np

from tf_prune.flatbuffer import FlatTable
from tf_prune.tflite_graph import Graph, Operator, Tensor, check_graph
from tf_prune.tflite_sparsity import SparseEncoding

# Of the schema's TensorType, by number, what weights come in.
_DTYPES = {0: "float32", 1: "float16", 2: "int32", 4: "int64", 7: "int16", 9: "int8", 3: "uint8", 6: "bool"}
# By name, in how many bits a number of the other types is stored.
_BITS = {
    **{"INT2": 2, "INT4": 4, "UINT4": 4, "FLOAT8_E4M3FN": 8, "FLOAT8_E5M2": 8, "BFLOAT16": 16, "UINT16": 16},
    **{"UINT32": 32, "COMPLEX64": 64, "FLOAT64": 64, "UINT64": 64, "COMPLEX128": 128},
}
# What constants may take as plain arrays: so much, and so often the file's size. Sparse tensors are larger than what is
# stored of them, without limit if nothing is stored; those of VGG-16 with 0.1 % of its weights 600 times.
_ALWAYS_DECODED, _MOST_DECODED = 1 << 28, 1024
_MOST_AXES = 32  # of NumPy before 2.0


# Where the fields stand in the schema's tables. FlatBuffers never changes that.
class _Model(enum.IntEnum):
    OPERATOR_CODES, SUBGRAPHS, BUFFERS = 1, 2, 4


class _Code(enum.IntEnum):
    DEPRECATED_BUILTIN_CODE, CUSTOM_CODE, BUILTIN_CODE = 0, 1, 3


class _Graph(enum.IntEnum):
    TENSORS, INPUTS, OUTPUTS, OPERATORS = 0, 1, 2, 3


class _Operator(enum.IntEnum):
    OPCODE_INDEX, INPUTS, OUTPUTS, OPTIONS_TYPE, OPTIONS = 0, 1, 2, 3, 4


class _Tensor(enum.IntEnum):
    SHAPE, TYPE, BUFFER, NAME, SPARSITY, SIGNATURE = 0, 1, 2, 3, 6, 7


class _Buffer(enum.IntEnum):
    DATA, OFFSET, SIZE = 0, 1, 2


# The options that are read: of which operator, the number of their type, and each one's field, form and default.
_OPTIONS: dict[str, tuple[int, dict[str, tuple[int, str, int]]]] = {
    "CONV_2D": (
        1,
        {
            **{"padding": (0, "b", 0), "strideW": (1, "i", 0), "strideH": (2, "i", 0)},
            **{"dilationWFactor": (4, "i", 1), "dilationHFactor": (5, "i", 1)},
        },
    ),
    "DEPTHWISE_CONV_2D": (
        2,
        {
            **{"padding": (0, "b", 0), "strideW": (1, "i", 0), "strideH": (2, "i", 0), "depthMultiplier": (3, "i", 0)},
            **{"dilationWFactor": (5, "i", 1), "dilationHFactor": (6, "i", 1)},
        },
    ),
    "CALL": (16, {"subgraphIndex": (0, "I", 0)}),
    "IF": (92, {"thenSubgraphIndex": (0, "i", 0), "elseSubgraphIndex": (1, "i", 0)}),
    "WHILE": (93, {"condSubgraphIndex": (0, "i", 0), "bodySubgraphIndex": (1, "i", 0)}),
    "CALL_ONCE": (103, {"initSubgraphIndex": (0, "i", 0)}),
}


def read(content: bytes) -> tuple[Graph, ...]:
    """Reads the graphs of a TF-Lite file: the main one first, then those that loops and branches call.

    Args:
        content: The bytes of a `.tflite` file.

    Raises:
        ValueError: If it is none, or any part of it that is read is damaged.
    """
    schema = _schema()
    if content[4:8] != b"TFL3":
        raise ValueError(f"Not a TF-Lite file: its identifier is {content[4:8]!r}, expected b'TFL3'.")
    try:
        return _graphs(FlatTable.root(content), schema, len(content))
    except ValueError as error:
        raise ValueError(
            f"The TF-Lite file of {len(content):,} bytes is damaged, or newer than the installed ai-edge-litert: "
            f"{error}. Copy or convert it again."
        ) from error


def constants(content: bytes) -> list[np.ndarray]:
    """Every constant that may hold weights (floats and 8-bit integers) as a plain array, in the file's order.

    Args:
        content: The bytes of a `.tflite` file.

    Raises:
        ValueError: As `read`.
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


def _graphs(model: FlatTable, schema: Any, size: int) -> tuple[Graph, ...]:
    types = _names(schema.TensorType)
    kinds = [_kind(code, _names(schema.BuiltinOperator)) for code in model.tables(_Model.OPERATOR_CODES)]
    buffers = [_data(buffer) for buffer in model.tables(_Model.BUFFERS)]
    graphs = tuple(_graph(table, kinds, buffers, types) for table in model.tables(_Model.SUBGRAPHS))
    if not graphs:
        raise ValueError("it has no graph")
    for graph in graphs:
        check_graph(graph, len(graphs))
    decoded = sum(tensor.num_bytes for graph in graphs for tensor in graph.tensors)
    if decoded > _ALWAYS_DECODED + _MOST_DECODED * size:
        raise ValueError(f"its constants would take {decoded:,} bytes")
    return graphs


def _names(numbers: Any) -> dict[int, str]:
    return {number: name for name, number in vars(numbers).items() if isinstance(number, int)}


def _kind(code: FlatTable, names: dict[int, str]) -> str:
    number = max(code.number(_Code.BUILTIN_CODE), code.number(_Code.DEPRECATED_BUILTIN_CODE, "b"))
    name = names.get(number)
    kind = code.text(_Code.CUSTOM_CODE) if name == "CUSTOM" else name
    if kind is None:
        raise ValueError("a custom operator has no name" if name else f"there is no operator with the code {number}")
    return kind


def _data(buffer: FlatTable) -> np.ndarray | None:
    """The bytes of a buffer; `None` if it has none."""
    offset, size = buffer.number(_Buffer.OFFSET, "Q"), buffer.number(_Buffer.SIZE, "Q")
    if buffer.has(_Buffer.DATA) or min(offset, size) < 2:  # 0 and 1 stand for none.
        return buffer.numbers(_Buffer.DATA, "u1")
    return buffer.behind(offset, size)


def _graph(table: FlatTable, kinds: list[str], buffers: list[np.ndarray | None], types: dict[int, str]) -> Graph:
    return Graph(
        tuple(_operator(operator, kinds) for operator in table.tables(_Graph.OPERATORS)),
        tuple(_tensor(tensor, buffers, types) for tensor in table.tables(_Graph.TENSORS)),
        _numbers(table, _Graph.INPUTS),
        _numbers(table, _Graph.OUTPUTS),
    )


def _numbers(table: FlatTable, field: int) -> tuple[int, ...]:
    array = table.numbers(field)
    return () if array is None else tuple(array.tolist())


def _operator(table: FlatTable, kinds: list[str]) -> Operator:
    index = table.number(_Operator.OPCODE_INDEX, "I")
    if index >= len(kinds):
        raise ValueError(f"an operator is of kind {index:,} of {len(kinds):,}")
    kind, options = kinds[index], {}
    if kind in _OPTIONS:
        number, fields = _OPTIONS[kind]
        found = table.table(_Operator.OPTIONS)
        if found is None or table.number(_Operator.OPTIONS_TYPE, "B") != number:
            raise ValueError(f"{kind} has no options, or those of another operator")
        options = {name: found.number(*field) for name, field in fields.items()}
    return Operator(kind, _numbers(table, _Operator.INPUTS), _numbers(table, _Operator.OUTPUTS), options)


def _tensor(table: FlatTable, buffers: list[np.ndarray | None], types: dict[int, str]) -> Tensor:
    name, shape = table.text(_Tensor.NAME) or "", _numbers(table, _Tensor.SHAPE)
    kind, buffer = table.number(_Tensor.TYPE, "b"), table.number(_Tensor.BUFFER, "I")
    if kind not in types:
        raise ValueError(f"the tensor {name!r} is of the unknown type {kind}")
    if len(shape) > _MOST_AXES or min(shape, default=0) < 0 or math.prod(shape) >> 60:
        raise ValueError(f"the tensor {name!r} has the shape {list(shape[:_MOST_AXES])}")
    open_axes = tuple(axis for axis, size in enumerate(_numbers(table, _Tensor.SIGNATURE)) if size < 0)
    # Where a file has no buffers, no tensor has one.
    if buffer and buffer >= len(buffers):
        raise ValueError(f"the tensor {name!r} has its numbers in buffer {buffer:,} of {len(buffers):,}")
    # The first buffer stands for none.
    data, dtype = buffers[buffer] if buffer else None, _DTYPES.get(kind, "other")
    bits = _BITS.get(types[kind]) if dtype == "other" else 8 * np.dtype(dtype).itemsize
    if data is None or bits is None:
        return Tensor(name, shape, dtype, None, None, None, open_axes)
    try:
        parameters = table.table(_Tensor.SPARSITY)
        sparse = None if parameters is None else SparseEncoding.read(parameters, shape)
        needed = -(-bits * (math.prod(shape) if sparse is None else sparse.count) // 8)
        if data.size != needed and (data.size or sparse is not None):
            raise ValueError(f"it is stored in {data.size:,} bytes; its shape {list(shape)} needs {needed:,}")
    except ValueError as error:
        raise ValueError(f"the tensor {name!r}: {error}") from None
    # An empty buffer, too, stands for none.
    if dtype == "other" or data.size != needed:
        return Tensor(name, shape, dtype, None, None, None, open_axes)
    encoding = "dense" if sparse is None else "x".join(map(str, sparse.blocks)) or "random"
    return Tensor(name, shape, dtype, encoding, data, sparse, open_axes)
