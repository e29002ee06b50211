"""What scoring costs: each method's time divided by one forward + backward of the same model, in one run.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --networks=resnet32x2 --repeats=5

One forward + backward is the gradient of the mean loss by all trainable variables on 128 CIFAR-sized images, compiled
by `tf.function`. A method's time is from the data to the finished masks: gradients, scores, ranking. The two are
measured in turn, and the figure is the median of their ratios. The first call, which also traces and compiles, is
shown by itself: it happens once for a model, whatever the number of steps. Of an iterative method the figure is for
one step, from runs of 2 and of 6 steps; `--end_to_end` takes 60 steps with everything.
"""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import tf_prune
from experiments import common, models
from tf_prune.batches import Batches
from tf_prune.gradients import Derivatives
from tf_prune.methods import Iterative
from tf_prune.structures import cut_into_groups

_NETWORKS = flags.DEFINE_list("networks", ["vgg19", "resnet32x2", "resnet50"], "Which networks of experiments.models.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Pairs of measurements; the median ratio is shown.")
_IMAGES = flags.DEFINE_integer("images", 128, "Images in the batch.")
_END_TO_END = flags.DEFINE_bool("end_to_end", False, "Only FORCE with 60 steps, tracing and all.")
_METHODS = flags.DEFINE_list("only", [], "Which methods; all if empty.")

SPARSITY = 0.9
ONE_SHOT = {
    "SNIP": tf_prune.SNIP(),
    "GraSP": tf_prune.GraSP(),
    "|GraSP|": tf_prune.GradientNormPreservation(),
    "LossPreservation": tf_prune.LossPreservation(magnitude_power=1),
    "OptimalBrainDamage, a probe": tf_prune.OptimalBrainDamage(num_probes=1),
    "Magnitude": tf_prune.Magnitude(),
}
PER_STEP = {
    "FORCE": tf_prune.FORCE,
    "IterativeSNIP": tf_prune.IterativeSNIP,
    "GraSPIt": tf_prune.GraSPIt,
    "SynFlow": tf_prune.SynFlow,
}
# Measured of the papers' own code on VGG-19 and ResNet-32x2, 2 cores, PyTorch: the range over both.
PAPERS = {"SNIP": "1.10-1.73", "GraSP": "5.2-8.4", "FORCE": "1.13-2.15", "IterativeSNIP": "1.15-2.28"}
PAPERS_NETWORKS = ("vgg19", "resnet32x2")
TARGETS = {"SNIP": 1.1, "GraSP": 3.0, "|GraSP|": 3.0, "FORCE": 1.1, "IterativeSNIP": 1.1, "SynFlow": 1.1}


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def forward_backward(model: keras.Model, x: tf.Tensor, y: tf.Tensor) -> Callable[[], Any]:
    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = model.loss(y, model(x, training=True))
        return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    return lambda: step()[0].numpy()


def pruner(model: keras.Model, data: Any) -> Callable[[Any], Any]:
    """Prunes without touching the model, and keeps what is compiled from one call to the next."""
    survey = tf_prune.find_prunable(model)
    derivatives = Derivatives(model, survey.prunable)
    groups, _ = cut_into_groups(None, survey.layouts)

    def run(method: Any) -> Any:
        iterative = method if isinstance(method, Iterative) else Iterative(method)
        return iterative.masks(derivatives, Batches(data), SPARSITY, groups)

    return run


def ratios(yardstick: Callable[[], Any], function: Callable[[], Any], repeats: int) -> list[float]:
    """The two in turn, so that a drift of the machine's speed falls on both."""
    return [seconds(function) / seconds(yardstick) for _ in range(repeats)]


def measure(network: str, repeats: int) -> None:
    keras.utils.set_random_seed(0)
    model = models.build(network, (32, 32, 3), 10)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = tf.random.normal((_IMAGES.value, 32, 32, 3))
    y = tf.random.uniform((_IMAGES.value,), 0, 10, tf.int32)
    yardstick = forward_backward(model, x, y)
    yardstick()
    base = float(np.median([seconds(yardstick) for _ in range(3)]))
    if _END_TO_END.value:
        before = [seconds(yardstick) for _ in range(10)]
        whole = seconds(lambda: tf_prune.prune(model, tf_prune.FORCE(60), SPARSITY, (x, y), verbose=0))
        base = float(np.median(before + [seconds(yardstick) for _ in range(10)]))
        print(f"{network}: FORCE, 60 steps, from the model to its masks: {whole / base / 60:.2f} x 60 of {base:.2f} s")
        return
    prune = pruner(model, (x, y))
    weights = sum(int(np.prod(v.shape)) for v in tf_prune.find_prunable(model).prunable.values())
    print(f"\n{network}: {weights:,} prunable weights, one forward + backward of {_IMAGES.value} images {base:.2f} s")
    print("| method | ratio (min - max) | target | the papers' code | first call |\n|---|---|---|---|---|")
    for name, method in ONE_SHOT.items():
        if _METHODS.value and name not in _METHODS.value:
            continue
        first = seconds(lambda method=method: prune(method))
        row(network, name, ratios(yardstick, lambda method=method: prune(method), repeats), first / base)
    for name, make in PER_STEP.items():
        if _METHODS.value and name not in _METHODS.value:
            continue
        first = seconds(lambda make=make: prune(make(num_steps=2)))
        values = []
        for _ in range(repeats):
            long, short = (seconds(lambda n=n, make=make: prune(make(num_steps=n))) for n in (6, 2))
            values.append((long - short) / 4 / seconds(yardstick))
        row(network, f"{name}, a step", values, first / base)


def row(network: str, name: str, values: list[float], first: float) -> None:
    key = name.split(",")[0]
    papers = PAPERS.get(key, "") if network in PAPERS_NETWORKS else ""
    target = f"{TARGETS[key]:.2f}" if key in TARGETS else ""
    spread = f"{np.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"
    print(f"| {name} | {spread} | {target} | {papers} | {first:.1f} |", flush=True)


def main() -> None:
    for network in _NETWORKS.value:
        measure(network, _REPEATS.value)


if __name__ == "__main__":
    common.start(main)
