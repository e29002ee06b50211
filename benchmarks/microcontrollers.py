"""Do int8 files of networks with dead layers run in TensorFlow Lite for Microcontrollers, and compute the same?

    pip install tflite-micro
    python -m benchmarks.microcontrollers

Each file is run in a child process, since that runtime aborts on scales that it cannot compute with. One line a
network: the file as TensorFlow's converter writes it, and as `tf_prune.conversion.convert` does.
"""

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import keras
import numpy as np
from keras import layers

from tf_prune import conversion, saved_model

# Example by example, from floats to floats. Of its own, without TensorFlow in the process.
RUN = """
import sys
import numpy as np
from tflite_micro.python.tflite_micro import runtime

interpreter = runtime.Interpreter.from_file(sys.argv[1] + "/model.tflite", arena_size=2_000_000)
takes, gives = interpreter.get_input_details(0), interpreter.get_output_details(0)
outputs = []
for one in np.load(sys.argv[1] + "/x.npy"):
    scale, zero = (takes["quantization_parameters"][key][0] for key in ("scales", "zero_points"))
    interpreter.set_input(np.clip(np.round(one[None] / scale) + zero, -128, 127).astype(np.int8), 0)
    interpreter.invoke()
    scale, zero = (gives["quantization_parameters"][key][0] for key in ("scales", "zero_points"))
    outputs.append((interpreter.get_output(0).astype(np.float32) - zero) * scale)
np.save(sys.argv[1] + "/outputs.npy", np.concatenate(outputs))
"""


def network(kind: str) -> keras.Model:
    """One of small networks with the layers `first`, `middle` and `head`."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="tanh" if kind == "tanh" else "relu", name="first")(x)
    y = layers.Conv2D(8, 3, padding="same", name="middle")(x)
    x = layers.ReLU()(layers.Add()([x, y])) if kind == "residual" else y
    x = layers.LayerNormalization()(x) if kind == "normalized" else x
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, "softmax" if kind == "softmax" else None, name="head")(x))


def without_weights(model: keras.Model, names: tuple[str, ...], bias: float) -> keras.Model:
    """The model with layers that have lost all weights."""
    for name in names:
        kernel, offset = model.get_layer(name).weights
        kernel.assign(np.zeros(kernel.shape))
        offset.assign(np.full(offset.shape, bias))
    return model


def micro(content: bytes, x: np.ndarray) -> str | np.ndarray:
    """The outputs in that runtime, or the signal that the child died of."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.tflite").write_bytes(content)
        np.save(Path(folder, "x.npy"), x)
        done = subprocess.run([sys.executable, "-c", RUN, folder], capture_output=True, text=True)
        if done.returncode < 0:
            return f"dies of signal {-done.returncode}"
        if done.returncode:
            sys.exit(done.stderr)
        return np.load(Path(folder, "outputs.npy"))


def difference(found: str | np.ndarray, expected: np.ndarray) -> str:
    """In units of the largest output."""
    return (
        found if isinstance(found, str) else f"{np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6):.1%}"
    )


def main() -> None:
    """Prints the table."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).standard_normal((16, 8, 8, 3)).astype(np.float32)
    print("| network | dead | bias | as converted | as exported |\n|---|---|---|---|---|")
    for kind in ("plain", "tanh", "softmax", "residual", "normalized"):
        for names in (("first",), ("middle",), ("head",), ("first", "middle", "head")):
            for bias in (0.0, 0.3, -30.0):
                model = without_weights(network(kind), names, bias)
                results = [
                    difference(micro(convert(model, x, repair), x), np.asarray(model(x))) for repair in (False, True)
                ]
                print(f"| {kind} | {', '.join(names)} | {bias} | {' | '.join(results)} |", flush=True)


def convert(model: keras.Model, x: np.ndarray, repair: bool) -> bytes:
    """The file, with or without tf_prune's last step."""
    unchanged: Callable[..., bytes] = lambda content, _: content  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (name,) = saved_model.write_saved_model(model, x, Path(folder), [(1, *x.shape[1:])])
        ones = [{name: x[i : i + 1]} for i in range(len(x))]
        with mock.patch.object(conversion, "repaired", conversion.repaired if repair else unchanged):
            return conversion.convert(Path(folder), dtype="int8", representative=ones)


if __name__ == "__main__":
    sys.exit(main())
