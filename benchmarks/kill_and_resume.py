"""Kills a pruned training run with SIGKILL at random moments, starts it again, and compares its masks.

    python -m benchmarks.kill_and_resume --kills=20

Each start makes a new model with other initial weights, so that masks that were drawn again would differ, and lists
the callbacks in the other order. The run saves with `BackupAndRestore` or with `ModelCheckpoint`; a kill can hit at any
moment, also while a file is written. A start that finds a saved state must have the masks of before at its first batch
and at its end, and must not score.
"""

import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import ClassVar

import keras
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

import tf_prune

_KILLS = flags.DEFINE_integer("kills", 20, "How many kills for each way of saving.", lower_bound=1)
_SAVING = flags.DEFINE_multi_enum("saving", ["backup", "checkpoint"], ["backup", "checkpoint"], "Ways of saving.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments of the kills.")
_RUN = flags.DEFINE_string("run", None, "Used by the benchmark itself: the folder of the run to start or go on with.")
_START = flags.DEFINE_integer("start", 0, "Used by the benchmark itself: which start of the run this is.")

_EPOCHS, _STEPS = 30, 20


class _CountedSNIP(tf_prune.SNIP):
    """SNIP that tells when it scores."""

    calls: ClassVar[list[int]] = []

    def scores(self, *args):
        """The scores of SNIP."""
        self.calls.append(1)
        return super().scores(*args)


class _Witness(keras.callbacks.Callback):
    """Compares the masks at the first batch with those of the run, or notes them if they were just drawn."""

    def __init__(self, folder, found):
        super().__init__()
        self.folder, self.found, self.steps = folder, found, 0

    def on_train_batch_begin(self, batch, logs=None):
        """Tells the parent that the training goes on."""
        if self.steps == 0:
            if not self.found:
                tf_prune.masks_of(self.model).save(self.folder / "masks.npz")
            self.note("first batch")
        elif self.steps == 1:  # the step is compiled
            print("training", flush=True)
        self.steps += 1
        time.sleep(0.003)  # or the run would be over before it can be killed

    def note(self, moment):
        """Adds what is found at this moment to the run's notes."""
        expected = tf_prune.Masks.load(self.folder / "masks.npz").values()
        masks = tf_prune.masks_of(self.model)
        variables = tf_prune.find_prunable(self.model).prunable
        note = {
            "start": _START.value,
            "moment": moment,
            "found": self.found,
            "scored": bool(_CountedSNIP.calls),
            "same": all(np.array_equal(a, b) for a, b in zip(masks.values(), expected, strict=True)),
            "zero": not any(np.asarray(variables[path])[~mask].any() for path, mask in masks.items()),
        }
        with (self.folder / "notes.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")


def _model():
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(5)])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _newest_whole(folder):
    """The newest checkpoint that can be read: a kill may have cut the last one short."""
    for file in sorted(folder.glob("*.keras"), reverse=True):
        try:
            return keras.models.load_model(file), int(file.stem)
        except (ValueError, OSError):
            file.unlink()
    return None, 0


def _run(folder, start, saving):
    keras.utils.set_random_seed(start)
    generator = np.random.default_rng(0)
    data = generator.standard_normal((32 * _STEPS, 20)).astype("float32"), generator.integers(0, 5, 32 * _STEPS)
    pruning = tf_prune.PruneBeforeTraining(_CountedSNIP(), 0.9, data)
    if saving == "backup":
        model, epoch, found = _model(), 0, (folder / "backup" / "latest.weights.h5").exists()
        saver = keras.callbacks.BackupAndRestore(folder / "backup", 7, double_checkpoint=True, delete_checkpoint=False)
    else:
        model, epoch = _newest_whole(folder)
        found = model is not None
        model = model or _model()
        saver = keras.callbacks.ModelCheckpoint(folder / "{epoch:03d}.keras")
    witness = _Witness(folder, found)
    callbacks = [pruning, saver] if start % 2 else [saver, pruning]
    model.fit(*data, batch_size=32, epochs=_EPOCHS, initial_epoch=epoch, callbacks=[*callbacks, witness], verbose=0)
    if witness.steps:
        witness.note("end")


def _measure(saving, kills, folder, rng):
    """Runs until so many kills, the last one to its end: what they noted, and how often they were started."""
    notes, start, runs, is_over = [], 0, 0, False
    while kills or not is_over:
        run = folder / f"{saving}_{runs}"
        run.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.kill_and_resume", f"--run={run}", f"--start={start}"]
        child = subprocess.Popen([*command, f"--saving={saving}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        start += 1
        began = child.stdout.readline() == b"training\n"
        if began and kills:
            time.sleep(rng.uniform(0, 1.5))
            child.kill()
        errors = child.communicate()[1].decode()
        if child.returncode > 0:
            raise RuntimeError(f"A start of the run failed:\n{errors[-2000:]}")
        kills -= child.returncode < 0
        lines = (run / "notes.jsonl").read_text().splitlines() if (run / "notes.jsonl").exists() else []
        is_over = child.returncode == 0
        if is_over:  # the run is over: its notes are complete, and the next one starts anew
            notes += map(json.loads, lines)
            runs += 1
            print(f"{saving}: a run is over after {start} starts, {kills} kills to go", flush=True)
    return notes, start


def main(_):
    """Prints what the starts found."""
    if _RUN.value:
        _run(pathlib.Path(_RUN.value), _START.value, _SAVING.value[0])
        return
    rng = random.Random(_SEED.value)
    table = Table(title=f"{_KILLS.value} kills at random moments, for each way of saving")
    for column in ("saved by", "starts", "found a saved state", "scored again then", "other masks", "pruned not zero"):
        table.add_column(column, justify="left" if column == "saved by" else "right")
    failed = False
    for saving in _SAVING.value:
        folder = pathlib.Path(tempfile.mkdtemp())
        notes, starts = _measure(saving, _KILLS.value, folder, rng)
        shutil.rmtree(folder)
        found = [note for note in notes if note["found"]]
        again = sum(note["scored"] for note in found)
        others, not_zero = sum(not note["same"] for note in notes), sum(not note["zero"] for note in notes)
        found_starts = len({note["start"] for note in found})
        table.add_row(saving, str(starts), str(found_starts), str(again), str(others), str(not_zero))
        failed = failed or bool(again or others or not_zero) or not found
    Console(width=120).print(table)
    if failed:
        sys.exit("A run did not come back with its masks.")


if __name__ == "__main__":
    app.run(main)
