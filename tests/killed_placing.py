"""Kills or interrupts `replacing` at every line that it runs, one after the other, and tells what is there then.

    python tests/killed_placing.py tf_prune/placing.py kill|twice|interrupt

Needs nothing but Python: a process without TensorFlow's threads can fork, and in a moment.
"""

import collections
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

FILE = sys.argv[1] if __name__ == "__main__" else Path(__file__).parent.parent / "tf_prune" / "placing.py"
spec = importlib.util.spec_from_file_location("placing", FILE)
placing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(placing)

NAMES, LAST = ("folder", "model", "picture", "report"), "report"
OLD = {"folder/part": "old", "model": "old", "picture": "old", "report": "old"}
NEW = {"folder/part": "new", "folder/more": "new", "model": "new", "report": "new"}
THIRD = {"folder/part": "third", "report": "third"}
MINE = {"notes": "mine", ".hidden/file": "mine"}
# What is there before: the directory itself is not, an earlier set with more entries, or somebody else's picture.
BEFORE = [{}, {**OLD, **MINE}, {**MINE, "picture": "mine"}]


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder):
    """The files, without work folders; and how many of these there are."""
    work = [entry for entry in os.listdir(folder) if entry.startswith(placing.PREFIX)] if folder.exists() else []
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {n: f.read_text() for n, f in files.items() if n.split("/")[0] not in work}, len(work)


def after(before, new):
    mine = {name: text for name, text in before.items() if name.split("/")[0] not in NAMES}
    return {**(mine if LAST in before else before), **new}


def run(directory, new, fails=False):
    try:
        with placing.replacing(directory, NAMES, LAST) as work:
            write(work, new)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def at_line(number, stop):
    """A trace function that stops the run at its so-manieth line."""
    lines = iter(range(number))

    def trace(frame, event, _):
        if frame.f_code.co_filename != placing.__file__:
            return None
        if event == "line" and next(lines, None) is None:
            stop()
        return trace

    return trace


def at_call(number, stop):
    """A profile function that stops the run where Python looks for signals: as functions begin, and after calls."""
    calls = iter(range(number))

    def profile(frame, event, _):
        here = frame.f_code.co_filename == placing.__file__
        if here and event in ("call", "c_return", "c_exception") and next(calls, None) is None:
            stop()

    return profile


def killed(number, *args):
    """Whether a run in a child was killed, at its so-manieth line."""
    child = os.fork()
    if not child:
        sys.settrace(at_line(number, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        run(*args)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def interrupted(number, *args):
    """Whether a run was interrupted at its so-manieth call, as by Ctrl-C."""

    def stop():
        raise KeyboardInterrupt

    sys.setprofile(at_call(number, stop))
    try:
        run(*args)
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)


def check_now(directory, before, amid):
    """The directory holds the old or the new set whole; amid the moves maybe a part of one, which shows."""
    files, count = read(directory)
    old, new = before, after(before, NEW)
    if files in (old, new):
        return count, ("old", "new")[files == new]
    assert amid, files
    assert LAST not in files, files
    assert all(files[name] == "mine" for name in before if name.split("/")[0] not in NEW and before[name] == "mine")
    assert any(files.items() <= whole.items() for whole in (old, new)), files
    return count, "part"


def check_next(directory, before, state, fails):
    """The next run removes all work folders; what was begun is there if it fails, whole."""
    was = before if state == "old" else after(before, NEW)
    run(directory, THIRD, fails)
    files, count = read(directory)
    assert count == 0, os.listdir(directory)
    # A run that was whole when it was killed is completed: its moves had begun.
    possible = [was, after(before, NEW)]
    assert files in (possible if fails else [after(files_then, THIRD) for files_then in possible]), files


def every_line(stop, before, root, amid):
    """Stops runs at line 0, 1, 2, ... until one is over before."""
    found, number, stopped = collections.Counter(), 0, True
    while stopped:
        directory = Path(tempfile.mkdtemp(dir=root)) / "out"
        write(directory, before)
        stopped = stop(number, directory, NEW)
        count, state = check_now(directory, before, amid)
        assert count <= 1
        found[state] += 1
        check_next(directory, before, state, fails=number % 2)
        shutil.rmtree(directory.parent)
        number += 1
    found["lines"] = number
    return found


def twice(before, root):
    """Kills a run amid its moves, and the next one, which repairs, at each of its lines."""
    found, number, is_killed = collections.Counter(), 0, True
    while is_killed:
        directory = Path(tempfile.mkdtemp(dir=root)) / "out"
        write(directory, before)
        is_killed = killed(number, directory, NEW)
        if check_now(directory, before, True)[1] == "part" and number % 3 == 0:
            copy, again, is_repaired = directory.with_name("copy"), 0, False
            while not is_repaired:
                shutil.copytree(directory, copy)
                if not killed(again, copy, THIRD, True):
                    is_repaired = True
                check_now(copy, before, True)
                check_next(copy, before, "part", fails=True)
                shutil.rmtree(copy)
                again += 3
                found["kills"] += 1
        shutil.rmtree(directory.parent)
        number += 1
    return found


if __name__ == "__main__":
    memory = "/dev/shm"  # where a thousand small folders are a matter of seconds, whatever the disk does
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as root:
        for before in BEFORE:
            if sys.argv[2] == "twice":
                found = twice(before, root)
            else:
                amid = sys.argv[2] == "kill"
                found = every_line(killed if amid else interrupted, before, root, amid)
            print(" ".join(f"{name}={found[name]}" for name in sorted(found)))
