"""Puts new files in the place of old ones, all of them or none, whatever fails or is killed meanwhile."""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed. Nothing is locked there for the moves.
    fcntl = None  # type: ignore[assignment]

# What a work folder is called, before the name of `last`.
PREFIX = ".tf_prune-"
_LOCK, _OLD = "lock", "old"
# The name of the new entries' folder says how far it is: being filled; whole, so that old ones go; and new ones come.
_FILLING, _READY, _PLACING = "new", "ready", "placing"
# Another run that fails may remove the directory that it had made, just as this one begins.
_ATTEMPTS = 10
# Seconds. Moves take milliseconds; a run that stands still amid them is stopped, or stuck in a debugger.
_PATIENCE = 60


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str], names: Collection[str], last: str) -> Iterator[Path]:
    """Yields a folder; what is in it at the end takes the place of an earlier set in the directory, whole.

    After an error the earlier set is there as it was, and directories that were made are gone. Of two runs at once the
    last one wins. A run that is killed leaves the old set or the new one; if it is killed between the renames of the
    end, for less than a millisecond, a part of one, never of both, and without `last`. The next run completes that and
    removes what was left, before anything else. Files of other names are not touched.

    Args:
        directory: Made if needed. The folder is in it: then whether it can be written into shows before the work.
        names: All that belongs to a set. What an earlier one has and the new one has not is removed, too.
        last: The entry that goes first and comes last: a set is whole if it is there. Where it is not, entries that
            are in `names` are of somebody else, and go only if there are new ones of their names.

    Raises:
        OSError: If the directory cannot be written into, or the entries not be moved.
        ValueError: If a file is in the way.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for text in ("old", "new"):
        ...         with replacing(directory, ["a.txt", "b.txt"], last="b.txt") as work:
        ...             _ = (work / "a.txt").write_text(text), (work / "b.txt").write_text(text)
        ...     sorted(os.listdir(directory)), Path(directory, "a.txt").read_text()
        (['a.txt', 'b.txt'], 'new')
    """
    # Where it is now, wherever a link or the current directory leads later.
    place = Path(os.path.realpath(directory))
    path = (place, *place.parents)
    for file in filter(os.path.isfile, path):
        raise ValueError(f"directory must be a folder to write into, but {file} is a file.")
    missing = [part for part in path if not os.path.exists(part)]
    try:
        with _work_in(place, names, last) as work:
            yield work / _FILLING
            with _alone_in(place):
                # Another run may have been killed in its moves since.
                _repair(place, names, last)
                _place(work, place, names, last)
    except BaseException:
        for part in missing:
            with contextlib.suppress(OSError):
                part.rmdir()
        raise


@contextlib.contextmanager
def _work_in(directory: Path, names: Collection[str], last: str) -> Iterator[Path]:
    """A work folder that other runs see to be in use."""
    for attempt in range(_ATTEMPTS):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _alone_in(directory):
                _repair(directory, names, last)
                _check_movable(directory, names)
                work, lock = _new_work(directory, last)
            break
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS - 1:
                continue
            raise type(error)(f"Cannot write into {directory}: {error.strerror}. Choose another directory.") from error
    try:
        yield work
    finally:
        lock.close()
        if not _is_amid_moves(work):
            _remove(work)


def _new_work(directory: Path, last: str) -> tuple[Path, BinaryIO]:
    """A new work folder, and its lock."""
    work = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{last}-", dir=directory))
    try:
        (work / _FILLING).mkdir()
        (work / _OLD).mkdir()  # now, so that the moves need no space
        lock = open(work / _LOCK, "wb")  # noqa: SIM115 - it is closed with the work
    except BaseException:
        _remove(work)
        raise
    _lock(lock.fileno())
    return work, lock


def _check_movable(directory: Path, names: Collection[str]) -> None:
    """A folder that is write-protected cannot be renamed into another one."""
    for folder in (directory / name for name in names):
        if folder.is_dir() and not folder.is_symlink() and not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, f"{folder.name} there is write-protected")


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Waits for other runs, threads too, that move files there."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        begin = time.monotonic()
        while _lock(descriptor) is False:
            if time.monotonic() - begin > _PATIENCE:
                raise TimeoutError(errno.ETIMEDOUT, f"another run has been moving files there for {_PATIENCE} s")
            time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether it is locked now; `None` if that cannot be told, on a file system that has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_over(work: Path) -> bool:
    """Whether the run that made the folder is: while it lives it holds a lock. Asked by who is alone there."""
    try:
        if fcntl is None:
            (work / _LOCK).unlink()
            return True
        with open(work / _LOCK, "rb+") as lock:
            return _lock(lock.fileno()) is True
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _entries(folder: Path) -> list[str]:
    """None where there is no folder: its run may be removing it."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _is_amid_moves(work: Path) -> bool:
    return (work / _READY).exists() or bool(_entries(work / _PLACING))


def _repair(directory: Path, names: Collection[str], last: str) -> None:
    """Completes what runs that were killed had begun to move, and removes their folders."""
    for work in list(directory.glob(f"{PREFIX}{last}-*")):
        if work.is_dir() and not work.is_symlink() and _is_over(work):
            _move(work, directory, names, last)
            _remove(work)


def _place(work: Path, directory: Path, names: Collection[str], last: str) -> None:
    """The moves of this run; what was there before comes back if they fail."""
    new = _entries(work / _FILLING)
    try:
        os.replace(work / _FILLING, work / _READY)
        _move(work, directory, names, last)
    except BaseException as error:
        try:
            _move_back(work, directory, new, last)
        except OSError as again:
            raise type(again)(
                f"{directory} holds a part of what is to be there, since neither the new files could be put into it "
                f"({error}) nor the old ones again ({again}). All are in {work}; the next run completes it."
            ) from error
        if isinstance(error, OSError):
            raise type(error)(
                f"Cannot put files into {directory}: {error.strerror or error}. It is as it was before."
            ) from error
        raise


def _move(work: Path, directory: Path, names: Collection[str], last: str) -> None:
    """From wherever a run was killed, all steps that are left: each is one rename, and the disk alone says which.

    All old entries go before the first new one comes, so that nobody finds entries of both.
    """
    ready, placing, old = work / _READY, work / _PLACING, work / _OLD
    if ready.exists():
        has_set = os.path.lexists(directory / last) or os.path.lexists(old / last)
        going = {*_entries(ready), *(names if has_set else ())}
        for name in sorted(going, key=lambda name: name != last):
            if os.path.lexists(directory / name):
                os.replace(directory / name, old / name)
        os.replace(ready, placing)
    for name in sorted(_entries(placing), key=lambda name: name == last):
        if os.path.lexists(directory / name):  # put there by hand, after a kill
            os.replace(directory / name, Path(tempfile.mkdtemp(dir=work)) / name)
        os.replace(placing / name, directory / name)


def _move_back(work: Path, directory: Path, new: Collection[str], last: str) -> None:
    """The same steps the other way round; if it is killed, the next run moves forward again."""
    ready, placing, old = work / _READY, work / _PLACING, work / _OLD
    try:
        if placing.exists():
            for name in sorted(new, key=lambda name: name != last):
                if not os.path.lexists(placing / name):
                    os.replace(directory / name, placing / name)
            os.replace(placing, ready)
        if ready.exists():
            for name in sorted(_entries(old), key=lambda name: name == last):
                os.replace(old / name, directory / name)
            os.replace(ready, work / _FILLING)
    except KeyboardInterrupt:  # a second one; who sent it waits for some renames
        _move_back(work, directory, new, last)


def _remove(folder: Path) -> None:
    """Folders that are read-only, too. What cannot go now is left to the next run."""
    for path, names, _ in os.walk(folder):
        for child in (Path(path, name) for name in names):
            if not child.is_symlink():
                with contextlib.suppress(OSError):
                    child.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
