"""Reads a FlatBuffer that may be damaged or hostile: every place is checked, and the work bounded by the file's size.

Python's `flatbuffers` has no verifier: its accessors follow offsets to wherever they point, and loop over as many
elements as a length says.
"""

import struct
from collections.abc import Iterator

import numpy as np

_SIZES = {"b": 1, "B": 1, "H": 2, "i": 4, "I": 4, "Q": 8}
_MOST_TABLES = 1_000_000  # as in FlatBuffers' verifier, which LiteRT uses


class _Bytes:
    """The bytes of a file, and how much of them may still be read: all of it twice.

    What a writer writes is read once. Much more is read only where many tables point at the same large vector.
    """

    def __init__(self, content: bytes):
        self.content = content
        self._bytes_left, self._tables_left = 2 * len(content), _MOST_TABLES

    def number(self, form: str, position: int) -> int:
        """The number at a position; `form` is one of `struct`'s."""
        if not 0 <= position <= len(self.content) - _SIZES[form]:
            raise ValueError(f"byte {position:,} of {len(self.content):,} is referred to")
        return int(struct.unpack_from("<" + form, self.content, position)[0])

    def spend(self, size: int) -> None:
        """Counts bytes that are read."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise ValueError("its parts are larger than the whole: many refer to the same bytes")

    def count_table(self) -> None:
        """Counts a table that is read: it has 8 bytes at least, with the offset that refers to it."""
        self.spend(16)
        self._tables_left -= 1
        if self._tables_left < 0:
            raise ValueError(f"it has more than {_MOST_TABLES:,} tables, which LiteRT does not read")


class FlatTable:
    """A table of a FlatBuffer. Its fields are asked for by their places in the schema, which never change.

    All methods raise a `ValueError` where something does not lie in the file.
    """

    def __init__(self, file: _Bytes, position: int):
        file.count_table()
        self._file, self._position = file, position
        start = position - file.number("i", position)
        size = file.number("H", start)
        width = file.number("H", start + 2)
        if size < 4 or size % 2 or start + size > len(file.content) or position + width > len(file.content):
            raise ValueError(f"there is no table at byte {position:,}")
        self._fields = struct.unpack_from(f"<{size // 2 - 2}H", file.content, start + 4)
        if any(field >= width for field in self._fields):
            raise ValueError(f"the table at byte {position:,} has fields outside of itself")

    @classmethod
    def root(cls, content: bytes) -> "FlatTable":
        """The table that holds all others."""
        file = _Bytes(content)
        return cls(file, file.number("I", 0))

    def has(self, field: int) -> bool:
        """Whether a field is there."""
        return field < len(self._fields) and self._fields[field] != 0

    def number(self, field: int, form: str = "i", default: int = 0) -> int:
        """A number; `form` is one of `struct`'s."""
        return self._file.number(form, self._position + self._fields[field]) if self.has(field) else default

    def numbers(self, field: int, dtype: str = "<i4") -> np.ndarray | None:
        """A vector of numbers, not copied; `None` if it is missing."""
        if not self.has(field):
            return None
        start, count = self._vector(field, np.dtype(dtype).itemsize)
        self._file.spend(4 + count * np.dtype(dtype).itemsize)
        return np.frombuffer(self._file.content, dtype, count, start)

    def text(self, field: int) -> str | None:
        """A string; `None` if it is missing."""
        array = self.numbers(field, "u1")
        return None if array is None else array.tobytes().decode()

    def table(self, field: int) -> "FlatTable | None":
        """A table; `None` if it is missing."""
        return FlatTable(self._file, self._target(self._position + self._fields[field])) if self.has(field) else None

    def tables(self, field: int) -> Iterator["FlatTable"]:
        """A vector of tables; none if it is missing."""
        if self.has(field):
            start, count = self._vector(field, 4)
            for position in range(start, start + 4 * count, 4):
                yield FlatTable(self._file, self._target(position))

    def behind(self, offset: int, size: int) -> np.ndarray:
        """Bytes that lie behind the tables, in files that are too large for offsets of 32 bits."""
        if offset + size > len(self._file.content):
            raise ValueError(f"bytes {offset:,} to {offset + size:,} of {len(self._file.content):,} are referred to")
        return np.frombuffer(self._file.content, np.uint8, size, offset)

    def _target(self, position: int) -> int:
        return position + self._file.number("I", position)

    def _vector(self, field: int, width: int) -> tuple[int, int]:
        """Where a vector starts, and how many elements it has."""
        start = self._target(self._position + self._fields[field])
        count = self._file.number("I", start)
        if start + 4 + count * width > len(self._file.content):
            raise ValueError(f"a vector of {count:,} elements goes beyond the end")
        return start + 4, count
