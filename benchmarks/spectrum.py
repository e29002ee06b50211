"""How long the spectrum of a network takes, beside a loop over examples that asks TensorFlow for each Jacobian.

    python -m benchmarks.spectrum --images=54000

The loop runs over `--loop_images` examples in float32, compiled by `tf.function` and as it is; all are measured in
turn, tracing included in ours and not in the loop, and the ratio is that of the times for one image.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_prune
from experiments import models

_MODEL = flags.DEFINE_enum("model", "lenet_300_100", list(models.MODELS), "The network.")
_IMAGES = flags.DEFINE_integer("images", 54_000, "How many images the spectrum is measured at.")
_LOOP_IMAGES = flags.DEFINE_integer("loop_images", 500, "How many of them the loop runs over.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often both are measured.")


def loop(model: keras.Model, x: np.ndarray, compiled: bool) -> tuple[np.ndarray, float]:
    """The singular values of one example after the other, and the seconds for one."""

    def jacobian(one):
        with tf.GradientTape() as tape:
            tape.watch(one)
            logits = model(one, training=False)
        return tape.jacobian(logits, one)

    values = []
    jacobian = tf.function(jacobian) if compiled else jacobian
    jacobian(tf.constant(x[:1]))  # traced
    start = time.perf_counter()
    for i in range(len(x)):
        matrix = jacobian(tf.constant(x[i : i + 1])).numpy().reshape(model.output_shape[-1], -1)
        values.append(np.linalg.svd(matrix.astype(np.float64), compute_uv=False))
    return np.array(values), (time.perf_counter() - start) / len(x)


def main(argv: list[str]) -> None:
    keras.utils.set_random_seed(0)
    model = models.build(_MODEL.value, (28, 28, 1), 10)
    x = np.random.default_rng(0).standard_normal((_IMAGES.value, 28, 28, 1)).astype(np.float32)
    tf_prune.jacobian_spectrum(model, x[:1], verbose=0)  # TensorFlow wakes up
    ours, compiled, eager = [], [], []
    for _ in range(_ROUNDS.value):
        start = time.perf_counter()
        spectrum = tf_prune.jacobian_spectrum(model, x, verbose=0)
        ours.append((time.perf_counter() - start) / len(x))
        values, seconds = loop(model, x[: _LOOP_IMAGES.value], True)
        compiled.append(seconds)
        eager.append(loop(model, x[: _LOOP_IMAGES.value // 10], False)[1])
        error = np.abs(spectrum.values[: len(values)] / values - 1).max()
    print("| network | images | the spectrum | compiled loop, ratio | loop, ratio | largest relative difference |")
    print("|---|---|---|---|---|---|")
    ratios = [f"{np.median(np.array(theirs) / np.array(ours)):.1f}" for theirs in (compiled, eager)]
    seconds = np.median(ours) * len(x)
    print(f"| {_MODEL.value} | {len(x):,} | {seconds:.1f} s | {' | '.join(ratios)} | {error:.0e} |")


if __name__ == "__main__":
    app.run(main)
