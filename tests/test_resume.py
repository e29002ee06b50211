"""A run that is killed comes back with the masks it had."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tf_prune

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(("saving", "kills"), [("backup", 1), pytest.param("checkpoint", 1, marks=pytest.mark.slow)])
def test_runs_that_are_killed_come_back_with_their_masks(saving, kills):
    command = [sys.executable, "-m", "benchmarks.kill_and_resume", f"--kills={kills}", f"--saving={saving}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (row,) = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    name, starts, found, again, others, not_zero = (cell.strip() for cell in row)
    assert name == saving
    assert int(starts) > kills
    assert int(found) >= 1
    assert (again, others, not_zero) == ("0", "0", "0")


GRADUAL = """
import os, pathlib, signal, sys
import keras, numpy as np, tf_prune

folder, kill_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
keras.utils.set_random_seed(0)
generator = np.random.default_rng(0)
x, y = generator.standard_normal((128, 20)).astype("float32"), generator.integers(0, 5, 128)
model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(5)])
model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

class Kill(keras.callbacks.Callback):
    steps = 0
    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

pruning = tf_prune.GradualPruning("snip", tf_prune.Cubic(0.9), end=0.8, frequency=3, data=(x, y))
backup = keras.callbacks.BackupAndRestore(folder / "backup")
callbacks = [pruning, backup] if kill_at else [backup, pruning]
model.fit(x, y, batch_size=16, epochs=6, shuffle=False, verbose=0, callbacks=[*callbacks, Kill()])
tf_prune.masks_of(model).save(folder / "masks.npz")
"""


def test_gradual_pruning_goes_on_where_it_was_and_ends_with_the_same_masks(tmp_path):
    masks = []
    for name, kills in (("whole", [0]), ("killed", [21, 0])):
        folder = tmp_path / name
        folder.mkdir()
        for kill_at in kills:
            done = subprocess.run([sys.executable, "-c", GRADUAL, folder, str(kill_at)], cwd=ROOT, capture_output=True)
            assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr.decode()[-2000:]
        masks.append(tf_prune.Masks.load(folder / "masks.npz"))
    assert masks[0].num_kept == masks[0].num_weights - int(np.ceil(0.9 * masks[0].num_weights))
    assert masks[0] == masks[1]


SAVE = """
import sys
import numpy as np, tf_prune
masks = [tf_prune.Masks({"kernel": np.random.default_rng(i).random((1000, 1000)) < 0.5}) for i in (0, 1)]
print("saving", flush=True)
while True:
    for one in masks:
        one.save(sys.argv[1])
"""


def test_a_kill_while_masks_are_saved_leaves_the_old_file_or_the_new_one(tmp_path):
    file = tmp_path / "masks.npz"
    whole = [np.random.default_rng(i).random((1000, 1000)) < 0.5 for i in (0, 1)]
    for wait in (0.0, 0.013, 0.1):
        child = subprocess.Popen([sys.executable, "-c", SAVE, file], cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"saving\n"
        while not file.exists():
            time.sleep(0.001)
        for _ in range(50):  # what a reader sees at any moment is what a kill at that moment leaves
            mask = tf_prune.Masks.load(file)["kernel"]
            assert any(np.array_equal(mask, one) for one in whole)
        time.sleep(wait)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert any(np.array_equal(tf_prune.Masks.load(file)["kernel"], one) for one in whole)
