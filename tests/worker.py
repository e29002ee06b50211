"""One worker of several: prunes by its share of the data and trains in a loop of its own; see test_distribution.py.

    python -m tests.worker FOLDER STEPS DIE_AFTER

It is started with TF_CONFIG. After `DIE_AFTER` steps of this process worker 1 kills itself, if that is not 0. What one
worker alone would do is `python -m tests.worker FOLDER STEPS 0` without TF_CONFIG.
"""

import json
import os
import pathlib
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

import tf_prune


def examples():
    generator = np.random.default_rng(0)
    return generator.standard_normal((64, 12)).astype("float32"), generator.integers(0, 4, 64)


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((12,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(4)])


def main(folder, num_steps, die_after):
    folder = pathlib.Path(folder)
    task = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}, "cluster": {"worker": [0]}}'))
    rank, num_workers = task["task"]["index"], len(task["cluster"]["worker"])
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if num_workers > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        model = network()
        optimizer = keras.optimizers.Adam(0.01)
        optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    checkpoint = folder / "model.weights.h5"
    steps_done = 0
    if checkpoint.exists():
        model.load_weights(checkpoint)  # the weights bring their masks along
        steps_done = int((folder / "steps").read_text())
    x, y = examples()
    mine = slice(rank * len(x) // num_workers, (rank + 1) * len(x) // num_workers)
    report = tf_prune.prune(model, "snip", 0.8, (x[mine], y[mine]), loss)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)

    step = tf.function(lambda x, y: strategy.run(replica_step, (x, y)))
    for i in range(steps_done, num_steps):
        step(tf.constant(x[mine]), tf.constant(y[mine]))
        if rank == 0:  # the new file takes the place of the old one in one step
            model.save_weights(folder / "new.weights.h5")
            os.replace(folder / "new.weights.h5", checkpoint)
            (folder / "steps").write_text(str(i + 1))
        if rank == 1 and die_after and i + 1 == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
    report.masks.save(folder / f"masks_{rank}.npz")
    kernels = tf_prune.find_prunable(model).prunable
    np.savez(folder / f"weights_{rank}.npz", **{p.replace("/", "."): np.asarray(v) for p, v in kernels.items()})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
