"""What a file of masks is: bytes that `numpy.load` reads, checked whole before anything is made of them."""

import hashlib
import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_FORMAT, _FIRST_FORMAT = "tf_prune masks 2", "tf_prune masks 1"
# What NumPy writes before an array; what it also reads, with no bound, is not looked at.
_HEADER = re.compile(rb"\{'descr': '([<|>][a-zA-Z]\d+)', 'fortran_order': False, 'shape': \((|\d+,)\), \} *\n")
# Files of the first format are compressed, and may hold so many bytes, and so often what they have: masks with 0.1 % of
# the weights left shrink to a 90th.
_ALWAYS_INFLATED, _MOST_INFLATED = 1 << 24, 128
_MOST_AXES = 32  # of NumPy before 2.0
# All that `zipfile` may raise on what is damaged, encrypted or of a kind that it does not know.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, OSError),
    *(OverflowError, KeyError, IndexError),
)


def encode(masks: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a file of masks; `Masks.save` says what they hold.

    Raises:
        ValueError: If a path cannot be written.
    """
    arrays: dict[str, Any] = {"format": np.array(_FORMAT), "count": np.array(len(masks), np.int64)}
    bits = [np.packbits(mask) for mask in masks.values()]
    arrays["checksum"] = _checksum(list(masks), [mask.shape for mask in masks.values()], bits)
    for i, (path, mask) in enumerate(masks.items()):
        if str(np.array(path)) != path:
            raise ValueError(f"The path {path!r} ends in a zero character, which NumPy does not keep. Rename it.")
        arrays |= {f"path_{i}": np.array(path), f"shape_{i}": np.array(mask.shape, np.int64), f"bits_{i}": bits[i]}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def decode(content: bytes) -> dict[str, np.ndarray]:
    """The masks of a file.

    Raises:
        ValueError: If it is not exactly what `encode` made. No more is allocated than a small multiple of its size.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _masks(archive, len(content))
    except ValueError:
        raise
    except _DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _masks(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise ValueError("two of its members have one name")
    is_stored = all(info.compress_type == zipfile.ZIP_STORED for info in members.values())
    allowed = size if is_stored else _ALWAYS_INFLATED + _MOST_INFLATED * size
    if not is_stored and any(info.compress_type not in (0, zipfile.ZIP_DEFLATED) for info in members.values()):
        raise ValueError("it is compressed in another way than by deflate")
    # Before anything is read: a few bytes may unpack to any number, and members may overlap.
    if sum(info.file_size for info in members.values()) > allowed:
        raise ValueError(f"a file of {size:,} bytes may not hold {sum(i.file_size for i in members.values()):,}")
    arrays = {name: _array(archive.read(info), name) for name, info in members.items()}
    written = str(arrays["format"]) if "format" in arrays else None
    if written not in (_FORMAT, _FIRST_FORMAT) or (written == _FORMAT and not is_stored):
        raise ValueError(f"its format is {written!r}" if is_stored else f"the format {written!r} is compressed")
    head = ["format", "count", "checksum"] if written == _FORMAT else ["format"]
    # NumPy before 2.1 took an argument of the first format's writer for an array.
    names = [name for name in arrays if written == _FORMAT or name != "allow_pickle"]
    count = (len(names) - len(head)) // 3
    if names != head + [f"{part}_{i}" for i in range(count) for part in ("path", "shape", "bits")]:
        raise ValueError(f"its {len(names)} members are not those of {count} masks")
    paths = [str(arrays[f"path_{i}"]) for i in range(count)]
    shapes = [tuple(arrays[f"shape_{i}"].tolist()) for i in range(count)]
    bits = [arrays[f"bits_{i}"] for i in range(count)]
    if len(set(paths)) < count:
        raise ValueError("two masks have one path")
    if written == _FORMAT:
        if int(arrays["count"]) != count:
            raise ValueError(f"it holds {count} masks of {int(arrays['count'])}")
        if not np.array_equal(arrays["checksum"], _checksum(paths, shapes, bits)):
            raise ValueError("its checksum is another")
    return {path: _mask(i, shapes[i], bits[i]) for i, path in enumerate(paths)}


def _array(content: bytes, name: str) -> np.ndarray:
    """A member as an array of the one type that it may have."""
    start = 10 + int.from_bytes(content[8:10], "little")
    header = _HEADER.fullmatch(content, 10, start)
    if content[:8] != b"\x93NUMPY\x01\x00" or header is None:
        raise ValueError(f"{name!r} is not an array as NumPy writes them")
    kind, shape = header[1].decode(), tuple(int(size) for size in header[2].rstrip(b",").split() if size)
    scalar = {"format": "<U16", "count": "<i8", "allow_pickle": "|b1"}.get(name)
    if name.startswith("path_") and re.fullmatch("<U[0-9]{1,8}", kind):
        scalar = kind
    vector = "|u1" if name == "checksum" or name.startswith("bits_") else "<i8" if name.startswith("shape_") else None
    if kind != (scalar or vector) or len(shape) != (0 if scalar else 1):
        raise ValueError(f"{name!r} has the type {kind} and {len(shape)} axes")
    if math.prod(shape) * np.dtype(kind).itemsize != len(content) - start:
        raise ValueError(f"{name!r} has {len(content) - start:,} bytes for the shape {shape}")
    if kind.startswith("<U"):
        return np.array(content[start:].decode("utf-32-le", "surrogatepass"))
    return np.frombuffer(content, kind, offset=start).reshape(shape)


def _mask(number: int, shape: tuple[int, ...], bits: np.ndarray) -> np.ndarray:
    if len(shape) > _MOST_AXES:
        raise ValueError(f"mask {number} has {len(shape):,} axes")
    size = math.prod(shape)
    if min(shape, default=0) < 0 or bits.size != -(-size // 8):
        raise ValueError(f"mask {number} has {bits.size:,} bytes for the shape {shape}")
    if size % 8 and bits[-1] & (0xFF >> size % 8):
        raise ValueError(f"mask {number} has more than the {size:,} bits of its shape")
    return np.unpackbits(bits, count=size).view(bool).reshape(shape)


def _checksum(paths: list[str], shapes: list[tuple[int, ...]], bits: list[np.ndarray]) -> np.ndarray:
    """Of all that a file holds, in its order (SHA-256)."""
    digest = hashlib.sha256(json.dumps([paths, shapes]).encode())
    for part in bits:
        digest.update(part.data)
    return np.frombuffer(digest.digest(), np.uint8)
