"""TF-Lite's encoding of sparse tensors (`SparsityParameters` in its schema): checked as it is read, then decoded."""

import dataclasses
import enum
import math

import numpy as np

from tf_prune.flatbuffer import FlatTable


class _Sparsity(enum.IntEnum):
    TRAVERSAL_ORDER, BLOCK_MAP, DIM_METADATA = 0, 1, 2


class _Dimension(enum.IntEnum):
    FORMAT, DENSE_SIZE = 0, 1
    SEGMENTS_TYPE, SEGMENTS, INDICES_TYPE, INDICES = 2, 3, 4, 5


# Of the schema's SparseIndexVector, by number.
_INDEX_DTYPES = {1: "<i4", 2: "<u2", 3: "u1"}


@dataclasses.dataclass(frozen=True)
class _Level:
    """A step on the way to a number: `size` places that lie `step` apart in the plain array, or some of them.

    With `segments`, those of the i-th branch are `indices[segments[i] : segments[i + 1]]`.
    """

    size: int
    step: int
    segments: np.ndarray | None
    indices: np.ndarray | None

    def check(self, branches: int) -> int:
        """Into how many branches so many branches split."""
        if self.segments is None or self.indices is None:
            return branches * self.size
        starts: np.ndarray = self.segments.astype(np.int64)
        indices = self.indices.astype(np.int64)
        if len(starts) != branches + 1 or starts[0] != 0 or starts[-1] != len(indices) or (np.diff(starts) < 0).any():
            raise ValueError(f"its {len(starts):,} segments are not those of {branches:,} rows")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.size:
            raise ValueError(f"an index is not between 0 and {self.size:,}")
        rises = np.diff(indices) > 0
        rises[starts[1:-1][(starts[1:-1] > 0) & (starts[1:-1] < len(indices))] - 1] = True  # A new row begins.
        if not rises.all():
            raise ValueError("the indices of a row do not rise")
        return len(indices)

    def extend(self, places: np.ndarray) -> np.ndarray:
        """The places in the plain array, one level on."""
        if self.segments is None or self.indices is None:
            return (places[:, None] + self.step * np.arange(self.size)).ravel()
        counts: np.ndarray = np.diff(self.segments.astype(np.int64))
        return np.repeat(places, counts) + self.step * self.indices.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class SparseEncoding:
    """How a sparse tensor is stored.

    Attributes:
        shape: Of the plain array.
        blocks: The block's size along each axis; empty if single weights are stored.
        count: How many numbers are stored.
    """

    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    count: int
    _levels: tuple[_Level, ...] = dataclasses.field(repr=False)

    @classmethod
    def read(cls, table: FlatTable, shape: tuple[int, ...]) -> "SparseEncoding":
        """Reads and checks the encoding of a tensor.

        Raises:
            ValueError: If it does not fit the shape, or is damaged.
        """
        order, mapped = (
            [] if (array := table.numbers(field)) is None else array.tolist()
            for field in (_Sparsity.TRAVERSAL_ORDER, _Sparsity.BLOCK_MAP)
        )
        rank, rows = len(shape), list(table.tables(_Sparsity.DIM_METADATA))
        if sorted(order) != list(range(rank + len(mapped))) or len(rows) != len(order):
            raise ValueError(f"its {len(rows):,} levels are not those of {rank} axes and {len(mapped):,} blocks")
        if len(set(mapped)) < len(mapped) or not set(mapped) <= set(range(rank)):
            raise ValueError(f"its {len(mapped):,} blocks do not lie along one axis each")
        block = [1] * rank
        for axis, row in zip(order, rows, strict=True):
            if axis >= rank:
                block[mapped[axis - rank]] = row.number(_Dimension.DENSE_SIZE)
        if any(min(width, size) < 1 or size % width for size, width in zip(shape, block, strict=True)):
            raise ValueError(f"blocks of {block} do not fill the shape {list(shape)}")
        count, levels = 1, []
        for axis, row in zip(order, rows, strict=True):
            at = axis if axis < rank else mapped[axis - rank]
            size = shape[at] // block[at] if axis < rank else block[at]
            stride = math.prod(shape[at + 1 :])
            levels.append(_level(row, size, stride * block[at] if axis < rank else stride, is_block=axis >= rank))
            count = levels[-1].check(count)
        return cls(shape, tuple(block) if mapped else (), count, tuple(levels))

    def decode(self, values: np.ndarray) -> np.ndarray:
        """The plain array of the stored numbers."""
        places = np.zeros(1, np.int64)
        for level in self._levels:
            places = level.extend(places)
        dense = np.zeros(math.prod(self.shape), values.dtype)
        dense[places] = values
        return dense.reshape(self.shape)


def _level(row: FlatTable, size: int, step: int, is_block: bool) -> _Level:
    if not row.number(_Dimension.FORMAT, "b"):
        if row.number(_Dimension.DENSE_SIZE) != size:
            raise ValueError(f"a level has {row.number(_Dimension.DENSE_SIZE):,} places, and the shape {size:,}")
        return _Level(size, step, None, None)
    if is_block or row.number(_Dimension.FORMAT, "b") != 1:
        raise ValueError("a level is neither dense nor compressed")
    return _Level(
        size,
        step,
        _index_vector(row, _Dimension.SEGMENTS_TYPE, _Dimension.SEGMENTS),
        _index_vector(row, _Dimension.INDICES_TYPE, _Dimension.INDICES),
    )


def _index_vector(row: FlatTable, kind: int, field: int) -> np.ndarray:
    dtype, table = _INDEX_DTYPES.get(row.number(kind, "B")), row.table(field)
    array = None if dtype is None or table is None else table.numbers(0, dtype)
    if array is None:
        raise ValueError("a compressed level has no segments or no indices")
    return array
