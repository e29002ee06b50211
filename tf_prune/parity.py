"""Runs TF-Lite files with LiteRT: do they do what the model does, and how long do they take?"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tf_prune.conversion import flex_interpreter
from tf_prune.quiet import quiet

Arrays = Mapping[str, np.ndarray]
# Outputs of float32 agree to rounding. Quantized ones need not: there the check is that they are of the same model.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "dynamic_int8": 0.5, "int8": 0.5}
_TIMED_SECONDS = 0.2


class ExportError(ValueError):
    """The exported model does not do what the model does; nothing was written."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """How the outputs of a file compare with the model's.

    Attributes:
        count: How many examples were compared.
        largest_difference: Of any output, absolute; `None` if none were.
        agreement: Fraction of examples with the same largest output; `None` where an output is a single number.
    """

    count: int
    largest_difference: float | None
    agreement: float | None


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
        sizes = {int(details["shape_signature"][0]) for details in self._inputs.values()}
        self._batch_size: int | None = sizes.pop() if len(sizes) == 1 and sizes != {-1} else None

    def outputs(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """What the file computes, for any number of examples."""
        count = len(next(iter(inputs.values())))
        step = self._batch_size or count
        parts = [self._run({k: v[i : i + step] for k, v in inputs.items()}, step) for i in range(0, count, step)]
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def seconds(self, inputs: Arrays) -> float:
        """What one call takes, in seconds, with one thread."""
        prepared = self._prepared(inputs, self._batch_size or len(next(iter(inputs.values()))))
        start = time.perf_counter()
        self._runner(**prepared)
        return time.perf_counter() - start

    def _run(self, inputs: Arrays, size: int) -> dict[str, np.ndarray]:
        outputs = self._runner(**self._prepared(inputs, size))
        return {name: _dequantized(array, self._outputs[name]) for name, array in outputs.items()}

    def _prepared(self, inputs: Arrays, size: int) -> dict[str, np.ndarray]:
        """Filled up to the file's batch size by the last example, and quantized where the file takes integers."""
        return {
            name: _quantized(_filled(np.asarray(array), size), self._inputs[name]) for name, array in inputs.items()
        }


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


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)]) if len(array) < size else array


def _quantized(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    if not scale or array.dtype == details["dtype"]:
        return array
    limits = np.iinfo(details["dtype"])
    return np.clip(np.round(array / scale) + zero_point, limits.min, limits.max).astype(details["dtype"])


def _dequantized(array: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    return (array.astype(np.float32) - zero_point) * np.float32(scale) if scale else array


def compare(
    reference: Callable[[Arrays], Arrays],
    candidate: Callable[[Arrays], Arrays],
    batches: Iterable[Arrays],
    tolerance: float,
) -> Parity:
    """Compares the outputs of two models, by name, on the same inputs.

    Args:
        reference: Gives the outputs to agree with.
        candidate: The file.
        batches: Inputs by name.
        tolerance: Largest difference of any output, relative to the largest output if that is above 1.

    Raises:
        ExportError: If they differ by more, or outputs are not finite.
    """
    count, difference = 0, 0.0
    agreements: list[np.ndarray] = []
    for inputs in batches:
        expected, got = reference(inputs), candidate(inputs)
        for key, output in expected.items():
            with np.errstate(invalid="ignore"):
                here, largest = float(np.abs(output - got[key]).max()), float(np.abs(output).max())
            # A difference that is NaN is not at most anything: it is refused too.
            if not here <= tolerance * max(1.0, largest):
                raise ExportError(
                    f"The TF-Lite model's output {key!r} differs from the model's by up to {here:.3g} (allowed: "
                    f"{tolerance:g}, relative to outputs up to {largest:.3g}). Nothing was written. If the difference "
                    "is rounding, raise tolerance=; if it is nan, the model's outputs are not finite."
                )
            difference = max(difference, here)
            if output.ndim > 1 and output.shape[-1] > 1:
                agreements.append((output.argmax(-1) == got[key].argmax(-1)).ravel())
        count += len(next(iter(inputs.values())))
    return Parity(count, difference, float(np.concatenate(agreements).mean()) if agreements else None)


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
