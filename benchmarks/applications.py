"""Every model of `keras.applications`: pruned, trained, saved, loaded, wrapped and stripped, with what must hold.

    python -m benchmarks.applications
    python -m benchmarks.applications --models=MobileNetV2,ConvNeXtTiny --output=results/some.jsonl

Each model is made with random weights, 10 classes and the smallest images that it takes, in a process of its own, so
that the largest ones find all the memory free. One line a model is appended to `--output`; a run that was interrupted
goes on where it was, and models that are in the file are not checked again, failed ones neither. The exit code is 1 if
any of the models failed.
"""

import inspect
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import app, flags

import tf_prune

_MODELS = flags.DEFINE_list("models", [], "Which constructors of keras.applications; all if empty.")
_OUTPUT = flags.DEFINE_string("output", "results/applications.jsonl", "The file that results are appended to.")
_ONE_MODEL = flags.DEFINE_string("one_model", None, "Checks one model in this process; prints JSON.")

CLASSES = 10
SPARSITY = 0.9
# Lower bounds that networks of keras.applications state, in ascending order; 331 is NASNetLarge for ImageNet.
SIZES = (32, 71, 75, 96, 128, 160, 192, 224, 299, 331)


def constructors() -> list[str]:
    """The names of the models; what else is public there are modules, in lower case."""
    found = vars(keras.applications).items()
    return sorted(name for name, value in found if name[0].isupper() and callable(value))


def build(constructor_name: str) -> keras.Model:
    """The model with logits, if it can have them, and with the smallest images that it takes."""
    constructor = getattr(keras.applications, constructor_name)
    options = {"weights": None, "classes": CLASSES, "classifier_activation": None}
    options = {name: value for name, value in options.items() if name in inspect.signature(constructor).parameters}
    for size in SIZES:
        try:
            return constructor(input_shape=(size, size, 3), **options)
        except ValueError as error:
            refused = error
    raise ValueError(f"no size of {SIZES} is accepted; the last one: {refused}") from refused


def check(constructor_name: str) -> dict[str, Any]:
    """Takes one model through all of it, in this process.

    Args:
        constructor_name: Of `keras.applications`, for example `"MobileNetV2"`.

    Returns:
        A dict with `name`, `size` of the images, `weights` and `prunable` weights, `seconds`, and `result`: `"ok"` or
        the error, whose `traceback` is there too.
    """
    keras.utils.set_random_seed(0)
    row: dict[str, Any] = {"name": constructor_name, "size": None, "weights": None, "prunable": None}
    start = time.perf_counter()
    try:
        model = build(constructor_name)
        row.update(size=model.input_shape[1], weights=model.count_params())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # nothing here is worth an alarm
            row["prunable"] = _check_model(model)
        row["result"] = "ok"
    except Exception as error:  # whatever it is, it is this model's result, and the next one must have its turn
        row["result"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        row["traceback"] = traceback.format_exc()
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _check_model(model: keras.Model) -> int:
    """Raises `RuntimeError` with what does not hold; returns how many weights are prunable."""
    # Clipped, because a step must not end in NaN, of which nothing can be told.
    optimizer = keras.optimizers.SGD(0.1, clipnorm=1.0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Not "global": random weights are of another size in each layer, so that whole layers would be emptied, no gradient
    # would pass, and the step of training would prove nothing.
    masks = tf_prune.prune(model, "magnitude", SPARSITY, scope="uniform").masks
    _require(masks.num_weights - masks.num_kept == -(-9 * masks.num_weights // 10), "not exactly 90 % are removed")
    _require_zeros(model, masks, "after pruning")
    x = np.random.default_rng(0).uniform(0, 255, (2, *model.input_shape[1:])).astype("float32")
    _require_training(model, x)
    _require_zeros(model, masks, "after a step of training")
    _check_loading(model, masks)
    _check_wrapping(model, masks, x)
    return masks.num_weights


def _require_training(model: keras.Model, x: np.ndarray) -> None:
    """Trains one step, which must move nearly all the kernels: where no gradient comes, zeros stay without a mask."""
    kernels = tf_prune.find_prunable(model).prunable.values()
    before = [np.asarray(kernel).copy() for kernel in kernels]
    model.fit(x, np.array([0, 1]), batch_size=2, epochs=1, verbose=0)
    moved = sum(not np.array_equal(old, np.asarray(new)) for old, new in zip(before, kernels, strict=True))
    _require(moved >= 0.9 * len(before), f"the step of training moved only {moved} of {len(before)} kernels")


def _check_loading(model: keras.Model, masks: tf_prune.Masks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.keras")
        model.save(file)
        loaded = keras.models.load_model(file)
    _require_same_masks(tf_prune.masks_of(loaded), masks, "the loaded model")
    _require_same_weights(loaded, model, "the loaded model")


def _check_wrapping(model: keras.Model, masks: tf_prune.Masks, x: np.ndarray) -> None:
    expected = np.asarray(model(x, training=False))
    _require(bool(np.isfinite(expected).all()), "the predictions are not finite, so comparing them would say nothing")
    wrapped = tf_prune.wrap(model)
    _require_same_masks(tf_prune.masks_of(wrapped), masks, "the wrapped model")
    _require_same(np.asarray(wrapped(x, training=False)), expected, "the predictions of the wrapped model")
    stripped = tf_prune.strip(wrapped)
    del wrapped
    _require_same_masks(tf_prune.masks_of(stripped), masks, "the stripped model")
    _require_same_weights(stripped, model, "the stripped model")
    _require_same(np.asarray(stripped(x, training=False)), expected, "the predictions of the stripped model")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise RuntimeError(problem)


def _require_zeros(model: keras.Model, masks: tf_prune.Masks, when: str) -> None:
    """Pruned weights are zero, the others are not."""
    for path, kernel in tf_prune.find_prunable(model).prunable.items():
        _require(np.array_equal(np.asarray(kernel) != 0, masks[path]), f"{path} has other zeros than its mask {when}")


def _require_same_masks(found: tf_prune.Masks, masks: tf_prune.Masks, whose: str) -> None:
    """One by one in order: the paths of another model may be others."""
    _require(len(found) == len(masks), f"{whose} has {len(found)} masks, not {len(masks)}")
    for (path, mask), other in zip(masks.items(), found.values(), strict=True):
        _require(np.array_equal(mask, other), f"{whose} has another mask of {path}")


def _require_same_weights(found: keras.Model, model: keras.Model, whose: str) -> None:
    _require(len(found.weights) == len(model.weights), f"{whose} has {len(found.weights)}, not {len(model.weights)}")
    for variable, other in zip(model.weights, found.weights, strict=True):
        _require_same(np.asarray(other), np.asarray(variable), f"{variable.path} of {whose}")


def _require_same(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """To the bit: nothing is computed in another way."""
    _require(np.array_equal(found, expected), f"{what}: not what it is in the pruned model")


def check_in_a_process(constructor_name: str) -> dict[str, Any]:
    """The same, whatever happens to the process."""
    command = [sys.executable, "-m", "benchmarks.applications", f"--one_model={constructor_name}"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    seconds = round(time.perf_counter() - start, 1)
    # A process that the kernel ended for its memory has the code -9, and says nothing.
    ended = {"result": f"the process ended with {done.returncode}", "traceback": done.stderr[-2000:]}
    return {"name": constructor_name, "size": None, "weights": None, "prunable": None, **ended, "seconds": seconds}


def show(row: dict[str, Any]) -> None:
    """One line of a table in Markdown."""
    weights = "" if row["weights"] is None else f"{row['weights']:,}"
    print(f"| {row['name']} | {row['size'] or ''} | {weights} | {row['seconds']:.0f} | {row['result']} |", flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}; flags are written --name=value")
    if _ONE_MODEL.value:
        print(json.dumps(check(_ONE_MODEL.value)))
        return
    names = _MODELS.value or constructors()
    unknown = [name for name in names if name not in constructors()]
    if unknown:
        sys.exit(f"error: keras.applications has no {', '.join(unknown)}; it has {', '.join(constructors())}")
    output = Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {row["name"]: row for row in rows}
    print("| model | images | weights | seconds | result |\n|---|---|---|---|---|", flush=True)
    for name in names:
        if name not in done:
            done[name] = check_in_a_process(name)
            with output.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
        show(done[name])
    failed = [name for name in names if done[name]["result"] != "ok"]
    print(f"\n{len(names) - len(failed)} of {len(names)} models are ok. All results: {output}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
