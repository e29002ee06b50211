"""Peak memory of scoring, divided by that of one training step of the same model on the same batch.

    python -m benchmarks.memory

Each figure is a process of its own: its peak, less what it had when the model was built. The training step is one of
`fit` with SGD and momentum. The last lines score over a stream of many batches, and over one array that is cut: there
the peak is that of the whole process, with the array.
"""

import resource
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_prune
from experiments import models

_CASE = flags.DEFINE_list("case", [], "network, images, batches, what: runs one case in this process.")
_NETWORKS = flags.DEFINE_list("networks", ["vgg19", "resnet32x2"], "Which networks of experiments.models.")

SCORES: dict[str, Any] = {
    "SNIP": tf_prune.SNIP(),
    "GraSP": tf_prune.GraSP(),
    "FORCE": tf_prune.FORCE(4),
    "SynFlow": tf_prune.SynFlow(4),
}


def used() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(network: str, images: int, batches: int, what: str) -> int:
    keras.utils.set_random_seed(0)
    model = models.build(network, (32, 32, 3), 10)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batch = tf.zeros((images, 32, 32, 3)), tf.zeros((images,), tf.int32)
    data = tf.data.Dataset.range(batches).map(
        lambda i: (tf.random.stateless_normal((images, 32, 32, 3), tf.stack([i, i])), batch[1])
    )
    model(batch[0][:1])
    before = used()
    if what == "training step":
        model.fit(data, verbose=0)
    else:
        tf_prune.prune(model, SCORES[what], 0.9, data, verbose=0)
    return peak() - before


def measure_arrays(network: str, images: int) -> int:
    """The peak where 50,000 images are in memory, and so many of them are scored in batches of 128."""
    keras.utils.set_random_seed(0)
    model = models.build(network, (32, 32, 3), 10)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.ones((50_000, 32, 32, 3), np.float32), np.arange(50_000) % 10
    tf_prune.score(model, "snip", (x[:images], y[:images]), batch_size=128)
    return peak()


def main(argv: list[str]) -> None:
    if _CASE.value:
        network, images, batches, what = _CASE.value
        if what == "arrays":
            print(measure_arrays(network, int(images)))
            return
        print(measure(network, int(images), int(batches), what))
        return

    def run(network: str, images: int, batches: int, what: str) -> int:
        case = f"--case={network},{images},{batches},{what}"
        command = [sys.executable, "-m", "benchmarks.memory", case]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    print("| network | images | batches | what | peak | / a training step |\n|---|---|---|---|---|---|")
    for network in _NETWORKS.value:
        base = run(network, 128, 1, "training step")
        for what in ("training step", *SCORES):
            value = base if what == "training step" else run(network, 128, 1, what)
            print(f"| {network} | 128 | 1 | {what} | {value / 2**20:.0f} MiB | {value / base:.2f} |", flush=True)
    for batches in (2, 50, 391):
        value = run("resnet8", 128, batches, "SNIP")
        print(f"| resnet8 | 128 | {batches} | SNIP | {value / 2**20:.0f} MiB | |", flush=True)
    base = run("resnet8", 128, 1, "arrays")
    for images in (128, 50_000):
        value = run("resnet8", images, 1, "arrays")
        print(
            f"| resnet8 | {images:,} of an array of 50,000 | {-(-images // 128)} | SNIP, batch_size=128 | "
            f"{value / 2**20:.0f} MiB | {value / base:.2f} of 128 |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
