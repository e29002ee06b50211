"""What a TF-Lite file holds: its constant tensors, sparse ones decoded. NumPy and LiteRT's schema only."""

from typing import Any

import numpy as np


def constants(content: bytes) -> list[np.ndarray]:
    """Every constant float32 tensor of a TF-Lite file as a plain array, in the file's order.

    Args:
        content: The bytes of a `.tflite` file.
    """
    from ai_edge_litert import schema_py_generated as schema

    flatbuffer = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    arrays = []
    for graph in flatbuffer.subgraphs:
        for tensor in graph.tensors:
            data = flatbuffer.buffers[tensor.buffer].data
            if data is not None and tensor.type == schema.TensorType.FLOAT32:
                arrays.append(_decode(np.asarray(data, np.uint8).view(np.float32), tensor))
    return arrays


def _decode(values: np.ndarray, tensor: Any) -> np.ndarray:
    """A constant tensor as a plain array, from its plain or its sparse encoding (TF-Lite's `SparsityParameters`)."""
    shape = tuple(tensor.shape)
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
    blocks = [] if tensor.sparsity.blockMap is None else list(tensor.sparsity.blockMap)
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


def _block_size(tensor: Any, levels: list[int], blocks: list[int], axis: int) -> int:
    if axis not in blocks:
        return 1
    return int(tensor.sparsity.dimMetadata[levels.index(len(tensor.shape) + blocks.index(axis))].denseSize)
