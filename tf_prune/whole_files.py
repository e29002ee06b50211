"""Writes a file whole or not at all."""

import os
import secrets
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file in one step: whoever reads it meanwhile finds the old one or the new one, and none is left half.

    It is written under another name in the same folder, which is made if needed, and renamed; whatever number of
    threads and processes write the same file, the last one's stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Short, for names of files may have 255 bytes. `tempfile` would make a file that only its owner can read.
    temporary = file.parent / f".{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
