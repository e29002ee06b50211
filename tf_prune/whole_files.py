"""Writes a file whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a name beside `file`; what is written there takes the place of `file` in one step, or goes after an error.

    Whoever reads it meanwhile finds the old one or the new one; whatever number of threads and processes write the same
    file, the last one's stays. A device or a pipe is written to as it is.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        yield Path(file)
        return
    target = Path(os.path.realpath(file))
    # Short, for names of files may have 255 bytes. `tempfile` would make a file that only its owner can read.
    temporary = target.with_name(f".{secrets.token_hex(8)}")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = os.fspath(file)
        raise
