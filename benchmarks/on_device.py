"""How fast a TF-Lite model is on this device, and beside another one: how much faster, and whether they agree.

    python on_device.py model.tflite
    python on_device.py sparse.tflite --against dense.tflite --threads 1,2,4 --inputs examples.npy

This file needs nothing but Python 3.9 and `pip install numpy ai-edge-litert`: copy it onto a board and run it there.
Two models are measured in alternation, so that a drift of the clock falls on both. They are given the same inputs, and
the numbers of quantized tensors are turned into the real values that they stand for, so that int8 compares with float.
"""

# ruff: noqa: B905 - zip has no `strict` in Python 3.9

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import numpy as np

    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
except ImportError as missing:
    sys.exit(f"error: {missing}. Install what this needs with: pip install numpy ai-edge-litert")

# Calls in a row before it is the other model's turn: so many that its weights are in the caches again for nearly all.
SECONDS_IN_A_ROW = 0.01
FEWEST_RUNS = 5
ADVICE = "Give two files of one model"


class RefusedError(ValueError):
    """What was given cannot be measured; the message says what was expected."""


class Model:
    """A TF-Lite file, loaded for one number of threads.

    Attributes:
        inputs: LiteRT's details of each input; `outputs` the same.
    """

    def __init__(self, file: str, threads: int = 1):
        self.file = file
        try:
            with open(file, "rb") as opened:
                start = opened.read(8)
        except OSError as error:
            raise RefusedError(f"{file} cannot be read: {error.strerror}") from None
        if start[4:] != b"TFL3":
            raise RefusedError(f"{file} is not a TF-Lite file; expected a .tflite file that a converter wrote")
        try:
            self.interpreter = Interpreter(model_path=file, num_threads=threads)
            self.inputs, self.outputs = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        except (ValueError, RuntimeError) as error:
            raise RefusedError(f"LiteRT cannot load {file}: {_first_line(error)}") from None

    def __str__(self) -> str:
        taken = ", ".join(f"{_name(d)} {np.dtype(d['dtype'])} {_sizes(d)}" for d in self.inputs)
        return f"{self.file} takes {taken}".replace("-1", "?")

    def prepare(self, batch: list[np.ndarray]) -> None:
        """Makes the model ready for inputs of these shapes, and sets them."""
        try:
            for details, values in zip(self.inputs, batch):
                if tuple(details["shape"]) != values.shape:
                    self.interpreter.resize_tensor_input(details["index"], values.shape)
            self.interpreter.allocate_tensors()
            self.set(batch)
            self.interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise RefusedError(f"LiteRT cannot run {self.file}: {_first_line(error)}") from None

    def set(self, batch: list[np.ndarray]) -> None:
        """Sets the inputs, given as real values."""
        for details, values in zip(self.inputs, batch):
            scale, zero = details["quantization"]
            if scale:
                limits = np.iinfo(details["dtype"])
                values = np.clip(np.rint(values / scale) + zero, limits.min, limits.max)
            self.interpreter.set_tensor(details["index"], values.astype(details["dtype"]))

    def predict(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs as real values, float64."""
        self.set(batch)
        self.interpreter.invoke()
        found = []
        for details in self.outputs:
            values = self.interpreter.get_tensor(details["index"]).astype(np.float64)
            scale, zero = details["quantization"]
            found.append((values - zero) * scale if scale else values)
        return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _name(details: dict) -> str:
    """Without what converters put around a name."""
    return details["name"].split(":")[0].replace("serving_default_", "")


def _sizes(details: dict) -> tuple[int, ...]:
    """The shape; sizes that the file leaves open are -1."""
    return tuple(int(size) for size in details.get("shape_signature", details["shape"]))


def _kind(details: dict) -> str:
    """Floats and quantized numbers stand for real values."""
    dtype = np.dtype(details["dtype"])
    return "real" if details["quantization"][0] or dtype.kind == "f" else str(dtype)


def load(files: list[str], threads: int = 1) -> list[Model]:
    """The models; tensors of the second in the order of the first, where they have the same names."""
    models = [Model(file, threads) for file in files]
    for kind in ("inputs", "outputs"):
        first, other = getattr(models[0], kind), getattr(models[-1], kind)
        named = {details["name"]: details for details in other}
        if set(named) == {details["name"] for details in first}:
            setattr(models[-1], kind, [named[details["name"]] for details in first])
    return models


def common_shapes(models: list[Model], batch: int | None) -> list[tuple[int, ...]]:
    """The shapes of inputs that all the models take; an open batch is `batch`, or 1, other open sizes stay -1.

    Raises:
        RefusedError: If the models have different inputs, or another batch than this.
    """
    first, other = models[0], models[-1]
    problem = f"the models have different inputs: {first}; {other}. {ADVICE}"
    if len(first.inputs) != len(other.inputs):
        raise RefusedError(problem)
    shapes = []
    for a, b in zip(first.inputs, other.inputs):
        pairs = list(zip(_sizes(a), _sizes(b)))
        differ = any(x != y and -1 not in (x, y) for x, y in pairs) or len(_sizes(a)) != len(_sizes(b))
        if differ or _kind(a) != _kind(b):
            raise RefusedError(problem)
        shape = [max(pair) for pair in pairs]  # a size that one of them leaves open is the other's
        if shape and batch is not None and shape[0] not in (-1, batch):
            raise RefusedError(f"--batch {batch} was given, but {first}. Leave --batch out, or convert with this batch")
        if shape and shape[0] == -1:
            shape[0] = batch or 1
        shapes.append(tuple(shape))
    return shapes


def batch_of(shapes: list[tuple[int, ...]]) -> int | None:
    """The size that all inputs have first; None if there is no such size, and so no axis of examples."""
    firsts = {shape[0] if shape else None for shape in shapes}
    return firsts.pop() if len(firsts) == 1 else None


def random_examples(model: Model, shapes: list[tuple[int, ...]], count: int, seed: int) -> list[np.ndarray]:
    """Standard normal values for real inputs; 0 and 1 for whole numbers, which every table of embeddings has."""
    generator = np.random.default_rng(seed)
    size = batch_of(shapes)
    arrays = []
    for details, shape in zip(model.inputs, shapes):
        if -1 in shape or np.dtype(details["dtype"]).kind not in "fiub":
            raise RefusedError(f"no random inputs can be made: {model}. Give --inputs file.npy with real ones")
        shape = shape if size is None else (max(count, size), *shape[1:])
        real = _kind(details) == "real"
        arrays.append(generator.standard_normal(shape) if real else generator.integers(0, 2, shape))
    return arrays


def read_examples(file: str, model: Model, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The arrays of a .npy or .npz file, one an input, by name or else in order; the first axis is of examples."""
    try:
        loaded = np.load(file, allow_pickle=False)
        arrays = dict(loaded) if hasattr(loaded, "files") else {"an array": loaded}
    except (OSError, ValueError, EOFError) as error:
        raise RefusedError(f"--inputs {file} is no .npy or .npz file of numbers: {_first_line(error)}") from None
    names = [_name(details) for details in model.inputs]
    found = [arrays[name] for name in names] if set(names) == set(arrays) else list(arrays.values())
    size = batch_of(shapes)
    own = 0 if size is None else 1  # the first axis that is the input's own
    fit = len(found) == len(shapes) and (size is None or len({array.shape[:1] for array in found}) == 1)
    for array, shape in zip(found, shapes):
        sizes = zip(shape[own:], array.shape[own:])
        fit &= array.ndim == len(shape) and all(wanted in (-1, given) for wanted, given in sizes)
        fit &= array.dtype.kind in "fiub" and (size is None or array.shape[:1] >= (size,))
    if not fit:
        received = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise RefusedError(
            f"--inputs {file} has {received}, but {model}; the first axis is of {size}, or more, examples"
        )
    return found


def batches(examples: list[np.ndarray], size: int | None) -> Iterator[tuple[list[np.ndarray], slice]]:
    """Full batches, and which examples of each are new: the last one begins earlier if it would not be full."""
    count = 1 if size is None else len(examples[0])
    for start in range(0, count, size or 1):
        begin = start if size is None else min(start, count - size)
        yield (
            examples if size is None else [array[begin : begin + size] for array in examples],
            slice(start - begin, None),
        )


def agreement(models: list[Model], examples: list[np.ndarray], size: int | None) -> dict:
    """How far the outputs of two prepared models are apart on the same examples.

    Returns:
        `largest_difference` of any output, absolute; `relative`: divided by the largest output of the second model;
        `top1`: fraction of examples with the same largest output, None where an output is one number; the number of
        `examples`. The first two are None if an output is not finite.
    """
    difference, largest = 0.0, 0.0
    same: list[np.ndarray] = []
    for batch, new in batches(examples, size):
        outputs = [model.predict(batch) for model in models]
        shapes = [[array.shape for array in arrays] for arrays in outputs]
        if shapes[0] != shapes[1]:
            raise RefusedError(
                f"the models have different outputs: {models[0].file} of the shapes {shapes[0]}, {models[1].file} of "
                f"{shapes[1]}. {ADVICE}"
            )
        for a, b in zip(*outputs):
            # Not Python's max, which loses what is not a number.
            difference = float(np.maximum(difference, np.abs(a - b).max(initial=0)))
            largest = float(np.maximum(largest, np.abs(b).max(initial=0)))
            if b.ndim > 1 and b.shape[-1] > 1:
                same.append((a.argmax(-1) == b.argmax(-1))[new if len(b) == size else slice(None)].ravel())
    finite = bool(np.isfinite(difference + largest))
    return {
        "largest_difference": difference if finite else None,
        "relative": (difference / largest if largest else difference) if finite else None,
        "top1": float(np.concatenate(same).mean()) if same else None,
        "examples": 1 if size is None else len(examples[0]),
    }


def seconds_of_calls(models: list[Model], runs: int, warmup: int, limit: float) -> list[list[list[float]]]:
    """Times prepared models in alternation: A A ... B B ... B B ... A A...

    Args:
        models: Prepared.
        runs: Calls of each model at most.
        warmup: Calls of each before.
        limit: Seconds after which it ends, if each model had 5 calls.

    Returns:
        For each model, for each of its turns, the seconds of each call.
    """
    slowest = max(min(_seconds(model) for _ in range(warmup)) for model in models)
    in_a_row = max(1, min(runs // 10, int(SECONDS_IN_A_ROW / slowest)))
    turns: list[list[list[float]]] = [[] for _ in models]
    order, start = list(range(len(models))), time.perf_counter()
    done = 0
    while done < runs and (done < FEWEST_RUNS or time.perf_counter() - start < limit):
        for i in order:
            turns[i].append([_seconds(models[i]) for _ in range(in_a_row)])
        order.reverse()
        done += in_a_row
    return turns


def _seconds(model: Model) -> float:
    start = time.perf_counter()
    model.interpreter.invoke()
    return time.perf_counter() - start


def measure(files: list[str], options: argparse.Namespace) -> dict:
    """All that is printed, as JSON has it; latencies in milliseconds.

    Raises:
        RefusedError: If it cannot be measured.
    """
    models = load(files)
    shapes = common_shapes(models, options.batch)
    if options.inputs:
        examples = read_examples(options.inputs, models[0], shapes)
    else:
        examples = random_examples(models[0], shapes, options.examples, options.seed)
    size = batch_of(shapes)
    batch, _ = next(batches(examples, size))
    result = {
        **_where(options.label),
        "batch": size,
        "inputs": options.inputs or f"random, seed {options.seed}",
        "models": [{"file": file, "bytes": os.path.getsize(file), "latency": []} for file in files],
        "speedup": [],
        "agreement": None,
    }
    for threads in options.threads:
        models = load(files, threads)
        for model in models:
            model.prepare(batch)
        if len(models) == 2 and result["agreement"] is None:
            result["agreement"] = agreement(models, examples, size)
        turns = seconds_of_calls(models, options.runs, options.warmup, options.seconds)
        for entry, values in zip(result["models"], turns):
            entry["latency"].append({"threads": threads, **_latency(values)})
        if len(models) == 2:
            result["speedup"].append({"threads": threads, **_speedup(*turns)})
    return result


def _latency(turns: list[list[float]]) -> dict:
    calls = 1e3 * np.concatenate(turns)
    p10, median, p90 = (float(value) for value in np.percentile(calls, [10, 50, 90]))
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "runs": len(calls)}


def _speedup(turns: list[list[float]], other: list[list[float]]) -> dict:
    """How many times as fast the first is: the ratio of the medians in neighbouring turns, its median and quartiles."""
    ratios = [np.median(b) / np.median(a) for a, b in zip(turns, other)]
    low, ratio, high = (float(value) for value in np.percentile(ratios, [25, 50, 75]))
    return {"ratio": ratio, "low": low, "high": high, "turns": len(ratios)}


def _where(label: str) -> dict:
    board = Path("/proc/device-tree/model")
    package = "ai-edge-litert" if Interpreter.__module__.startswith("ai_edge") else "tflite-runtime"
    return {
        "machine": platform.machine(),
        "board": board.read_text().strip("\0\n ") if board.exists() else "",
        "cpus": os.cpu_count(),
        "runtime": f"{package} {importlib.metadata.version(package)}",
        "label": label,
    }


def show(result: dict) -> None:
    """The result in words."""
    mark = f" ({result['label']})" if result["label"] else ""
    board = f"{result['board']}, " if result["board"] else ""
    print(f"{board}{result['machine']}{mark}, {result['cpus']} CPUs, {result['runtime']}; batch {result['batch']}\n")
    for model in result["models"]:
        print(f"{model['file']}  {model['bytes']:,} bytes")
        for row in model["latency"]:
            spread = f"10-90 %: {row['p10_ms']:.3f} - {row['p90_ms']:.3f}"
            print(f"  {row['threads']} thread(s)  {row['median_ms']:.3f} ms{mark}  ({spread}, {row['runs']} runs)")
    for row in result["speedup"]:
        spread = f"quartiles {row['low']:.2f} - {row['high']:.2f}, {row['turns']} turns"
        print(f"\n{row['threads']} thread(s): the first is {row['ratio']:.2f} x as fast as the second{mark} ({spread})")
    found = result["agreement"]
    if found is not None:
        print(f"\nthe same inputs, {found['examples']} examples, {result['inputs']}:")
        if found["largest_difference"] is None:
            print("  an output is not finite, so there is no largest difference; give --inputs with real examples")
        else:
            print(f"  largest difference {found['largest_difference']:.3g}, relative {found['relative']:.3g}")
        if found["top1"] is not None:
            print(f"  the same largest output for {found['top1']:.2%}")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .tflite file")
    parser.add_argument("--against", metavar="OTHER", help="a second .tflite file of the same model")
    parser.add_argument("--inputs", help=".npy or .npz with real examples, in real units; else random ones")
    parser.add_argument("--examples", type=positive, default=32, help="random examples to compare on (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the random examples (0)")
    parser.add_argument("--batch", type=positive, help="where the file leaves it open (1)")
    parser.add_argument("--threads", type=positives, default=[1], help="one number or several: 1,2,4 (1)")
    parser.add_argument("--runs", type=positive, default=1000, help="calls of each model at most (1000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure each number of threads, about (10)")
    parser.add_argument("--warmup", type=positive, default=3, help="calls before (3)")
    parser.add_argument("--label", default=os.environ.get("ON_DEVICE_LABEL", ""), help='marks figures: "emulated"')
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    options = parser.parse_args(arguments)
    try:
        result = measure([options.model] + ([options.against] if options.against else []), options)
    except RefusedError as problem:
        sys.exit(f"error: {problem}")
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
