"""Kills `export` with SIGKILL, at random moments and at each rename of its end, and looks at what is there.

    python -m benchmarks.kill_export --kills=20

A directory holds an export of one model and a file of the user's own; a child exports another model into it and is
killed. By their digests, all files must then be those of the old export or those of the new one; amid the renames they
may be a part of one of them, without `report.json`. A next run that fails must find the old or the new one whole, and
after one that succeeds its own must be there, the user's file, and no hidden folder.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import keras
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import tf_prune
from tf_prune.placing import PREFIX

_KILLS = flags.DEFINE_integer("kills", 20, "How many at random moments.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_RUN = flags.DEFINE_string("run", None, "Used by the benchmark itself: the directory to export into.")
_RENAME = flags.DEFINE_integer("rename", 0, "Used by the benchmark itself: before which rename the child kills itself.")

_REPORT, _MINE = "report.json", "notes.txt"
_BAD = (
    "mixture",
    "not whole after a next run that failed",
    "hidden folder left by the next run",
    "next run not whole",
)


def _export(directory, width):
    keras.utils.set_random_seed(width)
    layers = [keras.Input((64,)), keras.layers.Dense(width, "relu"), keras.layers.Dense(10)]
    return tf_prune.export(keras.Sequential(layers), directory)


def _run(directory):
    """The child: tells when it begins and ends; notes the digests of the new files before they are moved."""
    honest, moments = os.replace, []

    def noting(source, target):
        source = pathlib.Path(source)
        if not moments and not source.is_dir():  # a file that is written whole into the folder of the new ones
            honest(source, target)
            return
        if not moments:
            directory.with_name("new.json").write_text(json.dumps(_digests(source)))
        moments.append(time.perf_counter())
        if len(moments) == _RENAME.value:
            os.kill(os.getpid(), signal.SIGKILL)
        honest(source, target)
        moments[-1] = time.perf_counter()

    os.replace = noting
    print("begins", flush=True)
    begin = time.perf_counter()
    _export(directory, 96)
    print(json.dumps([time.perf_counter() - begin, len(moments), moments[-1] - moments[1]]), flush=True)


def _digests(folder):
    """Of all files but those in work folders."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in files.items()
        if not name.startswith(PREFIX)
    }


def _child(directory, rename=0, delay=None):
    """What an export in a child said, `None` if it was killed, after so many seconds or before a rename."""
    command = [sys.executable, "-m", "benchmarks.kill_export", f"--run={directory}", f"--rename={rename}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if child.stdout.readline() == b"begins\n" and delay is not None:
        time.sleep(delay)
        child.kill()
    output, errors = child.communicate()
    if child.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The export failed:\n{errors.decode()[-2000:]}")
    return json.loads(output.splitlines()[-1]) if child.returncode == 0 else None


def _state(directory, old):
    """Whether the old export is there, the new one, or a part of one; or what must not be, a mixture."""
    noted = directory.with_name("new.json")
    mine = {_MINE: old[_MINE]}
    new = {**json.loads(noted.read_text()), **mine} if noted.exists() else old
    files = _digests(directory)
    if files in (old, new):
        return "old" if files == old else "new"
    is_part = _REPORT not in files and mine.items() <= files.items()
    return "part" if is_part and any(files.items() <= whole.items() for whole in (old, new)) else "mixture"


def _hidden(directory):
    return [entry for entry in os.listdir(directory) if entry.startswith(".")]


def _check(directory, old):
    """What a kill left, and whether the next runs did as they must."""
    state = _state(directory, old)
    found = {state: 1, "killed": 1, "hidden folder left by it": len(_hidden(directory))}
    with contextlib.suppress(InterruptedError), mock.patch("tf_prune.exporting.convert", side_effect=InterruptedError):
        _export(directory, 64)
    found["not whole after a next run that failed"] = _state(directory, old) not in ("old", "new")
    report = _export(directory, 64)
    names = {entry.name for entry in directory.iterdir()}
    expected = {"saved_model", "model.tflite", _REPORT, "report.md", "report.png", _MINE}
    is_whole = (directory / "model.tflite").stat().st_size == report.bytes[report.encoding]["raw"]
    found["hidden folder left by the next run"] = len(_hidden(directory))
    found["next run not whole"] = not is_whole or names != expected or _digests(directory)[_MINE] != old[_MINE]
    return collections.Counter(found)


def main(_):
    """Prints what was found after the kills."""
    logging.set_verbosity(logging.WARNING)
    if _RUN.value:
        _run(pathlib.Path(_RUN.value))
        return
    rng = random.Random(_SEED.value)
    found = {"at random moments": collections.Counter(), "before each rename": collections.Counter()}
    with tempfile.TemporaryDirectory() as root:
        earlier = pathlib.Path(root, "earlier")
        _export(earlier, 32)
        (earlier / _MINE).write_text("mine")
        old, number = _digests(earlier), iter(range(1000))

        def directory():
            return pathlib.Path(shutil.copytree(earlier, pathlib.Path(root, str(next(number)), "out")))

        duration, renames, without_report = _child(directory())
        moments = [{"delay": duration * (i + rng.random()) / _KILLS.value} for i in range(_KILLS.value)]
        aimed = [{"rename": i} for i in range(1, renames + 1)]
        for label, when in [*(("at random moments", m) for m in moments), *(("before each rename", m) for m in aimed)]:
            place = directory()
            if _child(place, **when) is None:  # else it was over before
                found[label] += _check(place, old)
                print(f"{label}: {dict(found[label])}", flush=True)
    table = Table(
        title=f"An export of {duration:.1f} s, {renames} renames, {1e6 * without_report:.0f} us without a report"
    )
    for column in ("killed", *found):
        table.add_column(column, justify="left" if column == "killed" else "right")
    rows = ("killed", "old", "new", "part", "mixture", "hidden folder left by it", *_BAD[1:])
    for row in rows:
        table.add_row(row, *(str(counts[row]) for counts in found.values()))
    Console(width=120).print(table)
    if any(counts[bad] for counts in found.values() for bad in _BAD) or not found["at random moments"]["killed"]:
        sys.exit("An export was not whole, or a hidden folder outlived the next run.")


if __name__ == "__main__":
    app.run(main)
