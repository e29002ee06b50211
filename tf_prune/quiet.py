"""Holds back what TensorFlow's C++ writes past Python, on the descriptors 1 and 2."""

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

# Lines of C++ logs, of the converter, and of what it says before it raises. Other lines are somebody else's.
_NOISE = re.compile(
    rb"[IWEF]\d{4} \d\d:\d\d:\d+\.\d+ |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWEF] "
    rb"|(INFO|WARNING|ERROR): |INFO:tensorflow:|fully_quantize: |loc\(|<unknown>:|error: |note: "
    rb"|Some ops (are|in the model)|TF Select ops: |Flex ops: |Custom ops: |Select ops: |Details:|\ttf\.|"
    rb"To enable the following instructions|See instructions: |\r?\n"
)
_lock = threading.Lock()
# How many are quiet now; and for each descriptor its copy and the file that stands in its place.
_depth = 0
_held: dict[int, tuple[int, Any]] = {}


@dataclasses.dataclass
class Heard:
    """What was written in the meantime; complete when the context has ended."""

    text: str = ""


@contextlib.contextmanager
def quiet() -> Iterator[Heard]:
    """While it lasts nothing that is written on the descriptors 1 and 2 is seen; also in several threads at a time.

    Afterwards, lines that are none of TensorFlow's are written where they belong: Python's output goes the same way.
    """
    heard = Heard()
    with _lock:
        starts = _begin()
    try:
        yield heard
    finally:
        with _lock:
            heard.text = _end(starts)


def _begin() -> dict[int, int]:
    """Where each file stands."""
    global _depth
    _flush()
    if _depth == 0:
        for descriptor in (1, 2):
            try:
                copy = os.dup(descriptor)
            except OSError:  # It is closed.
                continue
            file = tempfile.TemporaryFile()  # noqa: SIM115
            os.dup2(file.fileno(), descriptor)
            _held[descriptor] = copy, file
    _depth += 1
    return {descriptor: os.fstat(file.fileno()).st_size for descriptor, (_, file) in _held.items()}


def _end(starts: dict[int, int]) -> str:
    global _depth
    _flush()
    parts = [_read(_held[descriptor][1], start) for descriptor, start in starts.items()]
    _depth -= 1
    if _depth == 0:
        for descriptor, (copy, file) in _held.items():
            os.dup2(copy, descriptor)
            others = b"".join(line for line in _read(file, 0).splitlines(True) if not _NOISE.match(line))
            with contextlib.suppress(OSError):
                while others:
                    others = others[os.write(copy, others) :]
            os.close(copy)
            file.close()
        _held.clear()
    return b"".join(parts).decode(errors="replace")


def _read(file: Any, start: int) -> bytes:
    # Not by seeking: the descriptors that are written to share the file's position.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size - start, start)


def _flush() -> None:
    """Python's and C's own buffers, which else come out in the wrong place."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).fflush(None)
