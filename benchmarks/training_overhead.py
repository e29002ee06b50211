"""What masks cost in training: a masked step of `fit` divided by a dense step of the same model, in one run.

    python -m benchmarks.training_overhead
    python -m benchmarks.training_overhead --networks=vgg19 --rounds=20 --optimizer=adam

A step is one call of the compiled `model.train_function` on a batch that lies in memory. In each round every model
takes its steps in a shuffled order, and the figure is the median over the rounds of their ratios to the dense model's.
A second dense model is among them: how far it is from 1.00 is the error of the measurement. tfmot takes no model of
Keras 3, so it is measured on the same networks in tf_keras, against a dense model there, in a process of its own.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import keras
import numpy as np
import rich.box
import tensorflow as tf
from absl import app, flags
from rich.console import Console
from rich.table import Table

import tf_prune
from experiments import models

SPARSITY = 0.9
TARGET = 1.03
TFMOT_FREQUENCY = 100  # steps from one choice of masks to the next; tfmot's own default


@dataclasses.dataclass(frozen=True)
class Network:
    """Its inputs, and how often it is measured: so often that the whole takes less than 12 minutes on 2 cores."""

    input_shape: tuple[int, ...]
    rounds: int
    steps: int


NETWORKS = {
    "mlp": Network((784,), rounds=60, steps=10),
    "resnet8": Network((32, 32, 3), rounds=40, steps=3),
    "vgg19": Network((32, 32, 3), rounds=30, steps=1),
}

_NETWORKS = flags.DEFINE_list("networks", list(NETWORKS), f"Which of {', '.join(NETWORKS)}.")
_ROUNDS = flags.DEFINE_integer("rounds", None, "Rounds of each network; its own number if not given.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 128, "Examples in the batch.", lower_bound=1)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "sgd", ["sgd", "adam"], "SGD has momentum 0.9.")
_TFMOT = flags.DEFINE_bool("tfmot", True, "Whether tfmot is measured too.")
_TFMOT_CASE = flags.DEFINE_string("tfmot_case", None, "Measures tfmot on one network, in this process; prints JSON.")

flags.register_validator("networks", set(NETWORKS).issuperset, f"must be of {', '.join(NETWORKS)}")

Seconds = Mapping[str, list[float]]


def networks_in(framework: ModuleType) -> ModuleType:
    """`experiments.models` as it is with `import tf_keras as keras`: the same networks for tfmot as for us."""
    if framework is keras:
        return models
    spec = importlib.util.spec_from_file_location("networks_in_tf_keras", models.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["keras"] = framework
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules["keras"] = keras
    return module


def build(network: str, framework: ModuleType) -> Any:
    """The network, in Keras 3 or in tf_keras; not compiled."""
    shape = NETWORKS[network].input_shape
    if network != "mlp":
        return networks_in(framework).build(network, shape, 10)
    dense = framework.layers.Dense
    hidden = [dense(1024, "relu") for _ in range(3)]
    return framework.Sequential([framework.Input(shape), *hidden, dense(10)], name="mlp")


def stepper(model: Any, network: str, framework: ModuleType, callbacks: tuple = ()) -> Callable[[], None]:
    """Compiles the model; what is returned is one step of `fit` on it, with what the callbacks do before a batch."""
    sgd, adam = framework.optimizers.SGD, framework.optimizers.Adam
    optimizer = sgd(1e-3, momentum=0.9) if _OPTIMIZER.value == "sgd" else adam(1e-3)
    model.compile(optimizer, framework.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = tf.random.normal((_BATCH.value, *NETWORKS[network].input_shape))
    y = tf.random.uniform((_BATCH.value,), 0, 10, tf.int32)
    data = tf.data.Dataset.from_tensors((x, y)).repeat()
    # Traces the train function, makes the optimizer's variables, and tells the callbacks their model.
    model.fit(data, steps_per_epoch=1, verbose=0, shuffle=False, callbacks=list(callbacks))
    iterator = iter(data)

    def step() -> None:
        for callback in callbacks:
            callback.on_train_batch_begin(0)
        logs = model.train_function(iterator)
        np.asarray(tf.nest.flatten(logs)[0])  # waits until the step is done

    return step


def seconds_a_step(steppers: Mapping[str, Callable[[], None]], network: str) -> Seconds:
    """Of each model, round by round; shuffled, so that none is always the first, or always after the same one."""
    for step in steppers.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    steps = NETWORKS[network].steps
    order = list(steppers)
    generator = np.random.default_rng(0)
    for _ in range(_ROUNDS.value or NETWORKS[network].rounds):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(steps):
                steppers[name]()
            seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def measure(network: str) -> Seconds:
    """Our own rows; the first of them is the dense model."""
    keras.utils.set_random_seed(0)
    pruned = build(network, keras)
    tf_prune.prune(pruned, "magnitude", SPARSITY)
    rows = {
        "dense": build(network, keras),
        "dense, a second model": build(network, keras),
        "masked": pruned,
        "masked, wrapped": tf_prune.wrap(pruned),
    }
    seconds = seconds_a_step({name: stepper(model, network, keras) for name, model in rows.items()}, network)
    for name, model in rows.items():
        kernels = tf_prune.find_prunable(model).prunable.values()
        check_sparsity(name, [np.asarray(kernel) for kernel in kernels], 0 if "dense" in name else SPARSITY)
    return seconds


def check_sparsity(name: str, weights: list[np.ndarray], expected: float) -> None:
    """A figure of masks that did not hold would be worth nothing."""
    zeros = sum(np.count_nonzero(array == 0) for array in weights) / sum(array.size for array in weights)
    if abs(zeros - expected) > 0.01:
        raise RuntimeError(f"{name}: {zeros:.2%} of the weights are zero after training, expected {expected:.0%}")


def measure_tfmot(network: str) -> Seconds:
    """The rows of tfmot, in a process that was started with TF_USE_LEGACY_KERAS=1."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.utils.set_random_seed(0)
    schedule = tfmot.sparsity.keras.ConstantSparsity(SPARSITY, begin_step=0, frequency=TFMOT_FREQUENCY)
    wrapped = tfmot.sparsity.keras.prune_low_magnitude(build(network, tf_keras), schedule)
    update = tfmot.sparsity.keras.UpdatePruningStep()
    step = stepper(wrapped, network, tf_keras, (update,))

    def step_with_new_masks() -> None:
        for layer in update.prunable_layers:
            layer.pruning_step.assign(TFMOT_FREQUENCY - 1)
        step()

    step_with_new_masks()  # before it, tfmot's masks are all ones
    steppers = {"tfmot's dense": stepper(build(network, tf_keras), network, tf_keras), "tfmot": step}
    seconds = dict(seconds_a_step(steppers, network))
    # Its masks, not its weights: tfmot zeroes them at the beginning of a step, and then the optimizer moves them.
    masks = [mask.numpy() for layer in update.prunable_layers for _, mask, _ in layer.pruning_vars]
    check_sparsity("tfmot", masks, SPARSITY)
    start = time.perf_counter()
    for _ in range(5):
        step_with_new_masks()
    new = (time.perf_counter() - start) / 5
    rest = TFMOT_FREQUENCY - 1
    seconds["tfmot, a step with new masks"] = [new] * len(seconds["tfmot"])
    seconds[f"tfmot, 1 such step in {TFMOT_FREQUENCY}"] = [(rest * s + new) / TFMOT_FREQUENCY for s in seconds["tfmot"]]
    return seconds


def tfmot_in_a_process(network: str) -> Seconds:
    command = [sys.executable, "-m", "benchmarks.training_overhead", *sys.argv[1:], f"--tfmot_case={network}"]
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: measuring tfmot on {network} failed, as shown above")
    return json.loads(done.stdout.splitlines()[-1])


def show(network: str, seconds: Seconds, others: Seconds) -> None:
    """One table, in Markdown; the ratios of tfmot are to the dense model of its own process."""
    kernels = tf_prune.find_prunable(build(network, keras)).prunable.values()
    weights = sum(int(np.prod(kernel.shape)) for kernel in kernels)
    rounds, steps = len(seconds["dense"]), NETWORKS[network].steps
    print(f"\n{network}: {weights:,} prunable weights, {_BATCH.value} examples a step, {_OPTIMIZER.value}, ", end="")
    print(f"{rounds} rounds of {steps} step{'s' if steps > 1 else ''} of each model\n")
    table = Table("model", "ms a step", "ratio (quartiles)", "min - max", box=rich.box.MARKDOWN)
    for rows in (seconds, others):
        dense = np.asarray(next(iter(rows.values()), []))
        for name, values in rows.items():
            ratio = np.asarray(values) / dense
            low, median, high = np.percentile(ratio, [25, 50, 75])
            spread = f"{ratio.min():.2f} - {ratio.max():.2f}"
            table.add_row(name, f"{1e3 * np.median(values):.1f}", f"{median:.3f} ({low:.3f} - {high:.3f})", spread)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    print(capture.get().strip(), flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}; flags are written --name=value")
    # TensorFlow's notes that several models were traced.
    tf.get_logger().setLevel("ERROR")
    if _TFMOT_CASE.value:
        print(json.dumps(measure_tfmot(_TFMOT_CASE.value)))
        return
    missing = [name for name in ("tensorflow_model_optimization", "tf_keras") if importlib.util.find_spec(name) is None]
    if _TFMOT.value and missing:
        print(f"tfmot is left out: {', '.join(missing)} not installed (pip install 'tf_prune[tfmot]').")
    for network in _NETWORKS.value:
        seconds = measure(network)
        show(network, seconds, tfmot_in_a_process(network) if _TFMOT.value and not missing else {})
    print(f"\nTarget: a masked step takes at most {TARGET:.2f} of a dense one.")
    print(f"tfmot chooses masks in 1 of {TFMOT_FREQUENCY} steps; the time of such a step is a mean over 5.")


if __name__ == "__main__":
    app.run(main)
