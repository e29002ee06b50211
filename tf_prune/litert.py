"""Runs TF-Lite files with LiteRT: what do they compute, and how long do they take?"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tf_prune.conversion import flex_interpreter
from tf_prune.parity import Arrays, ExportError, num_examples, rows
from tf_prune.quiet import quiet

_TIMED_SECONDS = 0.2


class LiteRTModel:
    """A TF-Lite file as a function of named arrays. Floats go in and out, also where the file takes integers.

    Args:
        content: The bytes of the file.
        flex: Whether it holds operators of TensorFlow, which LiteRT's own package cannot run.

    Raises:
        ImportError: If `ai-edge-litert` is missing.
    """

    def __init__(self, content: bytes, flex: bool = False):
        self._interpreter = _interpreter_class(flex)(model_content=content, num_threads=1)
        self._runner = self._interpreter.get_signature_runner()
        self._inputs = self._runner.get_input_details()
        self._outputs = self._runner.get_output_details()

    @property
    def steps(self) -> dict[str, float]:
        """The quantization step of each output; 0 where it has none."""
        return {name: float(details["quantization"][0]) for name, details in self._outputs.items()}

    def outputs(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """What the file computes, for any number of examples: a fixed batch size is filled up, part by part.

        Raises:
            ExportError: If it does not take inputs of these shapes, or an output is not of each example, so that parts
                cannot be joined.
        """
        count, size = num_examples(inputs), self._size(inputs)
        if size == count:
            return self._run(inputs, size)
        parts = [self._run(rows(inputs, i, i + size), size) for i in range(0, count, size)]
        for name, array in parts[0].items():
            if array.shape[:1] != (size,):
                raise ExportError(
                    f"The TF-Lite model takes {size} examples at a time, and its output {name!r} of shape "
                    f"{array.shape} is one of all of them: it cannot be compared on {count}. Pass data in batches of "
                    f"{size}, or leave out batch_size=. Nothing was written."
                )
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def seconds(self, inputs: Arrays) -> float:
        """What one call takes, in seconds, with one thread."""
        size = self._size(inputs)
        prepared = self._prepared(rows(inputs, 0, size), size)
        start = time.perf_counter()
        self._runner(**prepared)
        return time.perf_counter() - start

    def _size(self, inputs: Arrays) -> int:
        """How many examples are one call: as many as there are, or as the file fixes."""
        count = num_examples(inputs)
        takes = {name: self._inputs[name]["shape_signature"] for name, array in inputs.items() if np.ndim(array)}
        sizes = {int(shape[0]) for name, shape in takes.items() if len(shape) and len(inputs[name]) == count}
        return sizes.pop() if len(sizes) == 1 and sizes != {-1} else count

    def _run(self, inputs: Arrays, size: int) -> dict[str, np.ndarray]:
        outputs = self._runner(**self._prepared(inputs, size))
        return {name: _dequantized(array, self._outputs[name]) for name, array in outputs.items()}

    def _prepared(self, inputs: Arrays, size: int) -> dict[str, np.ndarray]:
        """Filled up to the file's batch size by the last example, and quantized where the file takes integers."""
        count, prepared = num_examples(inputs), {}
        for name, array in inputs.items():
            array, expected = np.asarray(array), self._inputs[name]["shape_signature"]
            if array.ndim and len(array) == count < size:
                array = np.concatenate([array, np.repeat(array[-1:], size - count, axis=0)])
            # LiteRT would change the sizes that the file fixes, and compute nonsense.
            if array.ndim != len(expected) or any(a not in (-1, b) for a, b in zip(expected, array.shape, strict=True)):
                takes = ", ".join("any" if a == -1 else str(a) for a in expected)
                raise ExportError(
                    f"The TF-Lite model takes {name!r} of shape ({takes}), and the data has {array.shape}. Nothing was "
                    "written. Pass data of one shape."
                )
            prepared[name] = _quantized(array, self._inputs[name])
        return prepared


def _interpreter_class(flex: bool) -> Callable[..., Any]:
    if flex:
        return flex_interpreter
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(
            "export runs what it wrote with LiteRT, which is not installed. Install it with: "
            "pip install 'tf_prune[litert]'"
        ) from error
    return Interpreter


def check_installed() -> None:
    """Raises ImportError now rather than after the conversion, if LiteRT is missing."""
    _interpreter_class(flex=False)


def _quantized(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    if not scale or array.dtype == details["dtype"]:
        return array
    limits = np.iinfo(details["dtype"])
    return np.clip(np.round(array / scale) + zero_point, limits.min, limits.max).astype(details["dtype"])


def _dequantized(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    return (array.astype(np.float32) - zero_point) * np.float32(scale) if scale else array


def load_runnable(
    files: Mapping[str, bytes], inputs: Arrays, flex: bool = False
) -> tuple[dict[str, LiteRTModel], dict[str, str]]:
    """The files that LiteRT runs, and for each other one what it says.

    XNNPACK gives up on some dense layers whose int8 weights are encoded as sparse, only when they first run.
    """
    models, refused = {}, {}
    for name, content in files.items():
        try:
            with quiet():
                model = LiteRTModel(content, flex)
                model.outputs(inputs)
        except RuntimeError as error:
            refused[name] = f"LiteRT does not run it: {str(error).splitlines()[0]}"
        else:
            models[name] = model
    return models, refused


def latencies(models: Mapping[Any, LiteRTModel], inputs: Arrays) -> dict[Any, float]:
    """The median time of one call of each, in seconds, on this machine, called in turn so that drifts cancel."""
    if not models:
        return {}
    times: dict[Any, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.seconds(inputs)
    end = time.perf_counter() + _TIMED_SECONDS * len(models)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, model in models.items():
            times[name].append(model.seconds(inputs))
    return {name: float(np.median(values)) for name, values in times.items()}
