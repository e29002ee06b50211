"""Where a model leaves: clean SavedModel -> TF-Lite, dense and sparse -> parity check -> report."""

import dataclasses
import gzip
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_prune.batches import Batches, inputs_like
from tf_prune.enforcement import masks_of
from tf_prune.prunable import check_model, find_kernels
from tf_prune.tflite import constants

_ENCODINGS = ("dense", "sparse")


class ExportError(ValueError):
    """The exported model does not do what the Keras model does; nothing was written."""


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one kernel in the Keras model and in the `.tflite` file.

    Attributes:
        path: The variable's path.
        num_weights: How many weights the kernel has.
        sparsity: Fraction of exact zeros in the Keras model.
        tflite_sparsity: Fraction of exact zeros in the file; `None` if no tensor of the file has this kernel's form.
    """

    path: str
    num_weights: int
    sparsity: float
    tflite_sparsity: float | None


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and how it compares with the Keras model. `print(report)` shows a table.

    Attributes:
        directory: Where `saved_model/`, `model.tflite` and `report.json` are.
        encoding: Of `model.tflite`, `"dense"` or `"sparse"`: the smaller file.
        bytes: File sizes by encoding, e.g. `bytes["sparse"]["gzip"]`; and of the SavedModel.
        layers: Zeros of each kernel, before and after conversion.
        inputs: What the models were compared on.
        largest_difference: Of any output, absolute, between Keras and the file.
        agreement: Fraction of examples with the same largest output; `None` where an output is a single number.
    """

    directory: str
    encoding: str
    bytes: dict[str, dict[str, int]]
    layers: tuple[LayerSparsity, ...]
    inputs: str
    largest_difference: float
    agreement: float | None

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros among the weights of all kernels."""
        total = sum(row.num_weights for row in self.layers)
        return sum(row.sparsity * row.num_weights for row in self.layers) / total if total else 0.0

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the report as JSON."""
        Path(file).write_text(json.dumps({**dataclasses.asdict(self), "sparsity": self.sparsity}, indent=2) + "\n")

    def __str__(self) -> str:
        table = Table(title=f"{self.directory}: {self.sparsity:.2%} of the kernels' weights are zero")
        for column in ("kernel", "weights", "sparsity", "in the .tflite"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for row in self.layers:
            after = "not found" if row.tflite_sparsity is None else f"{row.tflite_sparsity:.2%}"
            table.add_row(row.path, f"{row.num_weights:,}", f"{row.sparsity:.2%}", after)
        sizes = Table()
        for column in ("file", "bytes", "gzipped"):
            sizes.add_column(column, justify="left" if column == "file" else "right")
        for name, size in self.bytes.items():
            kept = " (kept as model.tflite)" if name == self.encoding else ""
            label = f"TF-Lite, {name}{kept}" if name in _ENCODINGS else name
            sizes.add_row(label, f"{size['raw']:,}", f"{size['gzip']:,}")
        with io.StringIO() as stream:
            console = Console(file=stream, width=100)
            console.print(table)
            console.print(sizes)
            agreement = "" if self.agreement is None else f", the same prediction for {self.agreement:.2%}"
            console.print(
                f"Keras and LiteRT on {self.inputs}: largest difference {self.largest_difference:.2g}{agreement}"
            )
            return stream.getvalue()


def export(
    model: keras.Model,
    directory: str | os.PathLike[str],
    data: Any = None,
    *,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Writes `saved_model/`, `model.tflite` and `report.json`, after checking that they do what the model does.

    The SavedModel holds the plain model, each variable once: no mask, no optimizer, pruned weights exactly zero. The
    TF-Lite file is made from it twice, with plain and with sparse tensors, and the smaller one is kept. It is run with
    LiteRT, and its outputs are compared with Keras's. The model itself is not changed.

    Args:
        model: A built `keras.Model`, pruned or not.
        directory: Where to write; made if needed. Files of an earlier export there are replaced.
        data: Real inputs to compare on, an `(x, y)` batch or an iterable of them (y is not used). `None` takes 32
            standard normal examples.
        tolerance: Largest difference of any output, relative to the largest output if that is above 1.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: If outputs differ by more than `tolerance`; nothing is written then.
        ImportError: If `ai-edge-litert` is missing.
        ValueError: If a pruned weight is not zero, or the input's shape is unknown.

    Example:
        report = tf_prune.export(model, "saved_models/lenet", data=(x_test, y_test))
        print(report)
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must be a folder to write into, but {directory} is a file.")
    check_model(model)
    masks = masks_of(model)
    # Tables of embeddings, and biases, count where they were pruned.
    plain = find_kernels(model, ())
    kernels = {path: v for path, v in find_kernels(model).items() if path in masks or path in plain}
    for path, mask in masks.items():
        if np.asarray(kernels[path])[~mask].any():
            raise ValueError(
                f"Pruned weights of {path!r} are not zero; they were set from outside after pruning. Call "
                "tf_prune.apply_masks(model, tf_prune.masks_of(model)) and export again."
            )
    batches = Batches(data)
    examples = _first_input(model, batches)
    interpreter_class = _litert_interpreter()
    there = next(parent for parent in directory.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=there, prefix=f".{directory.name}.") as temporary:
        work = Path(temporary)
        names = _write_saved_model(model, examples, work / "saved_model")
        files = {encoding: _convert(work / "saved_model", encoding) for encoding in _ENCODINGS}
        encoding = min(_ENCODINGS, key=lambda name: len(files[name]))
        inputs = (_as_inputs(model, x) for x, _, _ in batches) if batches.given else iter([examples])
        count, difference, agreement = _compare(
            model, interpreter_class(model_content=files[encoding]), names, inputs, tolerance
        )
        archive = b"".join(file.read_bytes() for file in sorted(work.rglob("*")) if file.is_file())
        report = ExportReport(
            directory=str(directory),
            encoding=encoding,
            bytes={name: _sizes(content) for name, content in [*files.items(), ("SavedModel", archive)]},
            layers=_layer_sparsities(kernels, files[encoding]),
            inputs=f"{count:,} {'given' if batches.given else 'random'} examples",
            largest_difference=difference,
            agreement=agreement,
        )
        (work / "model.tflite").write_bytes(files[encoding])
        report.save(work / "report.json")
        _move_into(work, directory)
    return report


def _litert_interpreter() -> Callable[..., Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(
            "export runs what it wrote with LiteRT, which is not installed. Install it with: "
            "pip install 'tf_prune[litert]'"
        ) from error
    return Interpreter


def _first_input(model: keras.Model, batches: Batches) -> Any:
    """One batch of inputs: of the data, or random ones of the shape that the model says."""
    if batches.given:
        return _as_inputs(model, next(iter(batches.take(1)))[0])
    generator = np.random.default_rng(0)
    inputs = inputs_like(model, lambda shape, dtype: generator.standard_normal((32, *shape)).astype(dtype))
    if inputs is None:
        raise ValueError(
            f"The model {model.name!r} does not say of what shape its inputs are. Pass data=(x, y): x gives the shape, "
            "and real inputs to compare on."
        )
    return inputs


def _as_inputs(model: keras.Model, x: Any) -> Any:
    """The examples in the dtypes that the model takes: NumPy's float64 is not what a file should ask for."""
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(x)]
    dtypes = [tensor.dtype for tensor in getattr(model, "inputs", None) or []]
    if len(dtypes) != len(leaves):
        dtypes = [keras.config.floatx() if leaf.dtype == np.float64 else leaf.dtype for leaf in leaves]
    return keras.tree.pack_sequence_as(x, [a.astype(d, copy=False) for a, d in zip(leaves, dtypes, strict=True)])


def _write_saved_model(model: keras.Model, examples: Any, directory: Path) -> list[str]:
    """Writes it and returns the names of its inputs, in the order of the flattened examples."""
    leaves = keras.tree.flatten(examples)
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    if len(set(names)) != len(leaves) or not all(name.isidentifier() for name in names):
        names = [f"input_{i}" for i in range(len(leaves))]
    specs = [
        tf.TensorSpec((None, *leaf.shape[1:]), tf.as_dtype(leaf.dtype), name)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    signature = keras.tree.pack_sequence_as(examples, specs)
    # An endpoint alone tracks the variables that it uses, once; Keras's own model.export writes each twice.
    archive = keras.export.ExportArchive()

    def serve(inputs: Any) -> Any:
        return model(inputs, training=False)

    archive.add_endpoint("serve", serve, input_signature=[signature])
    archive.write_out(str(directory), verbose=False)
    return names


def _convert(saved_model: Path, encoding: str) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    if encoding == "sparse":
        converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    return bytes(converter.convert())


def _compare(
    model: keras.Model, interpreter: Any, names: list[str], inputs: Iterator[Any], tolerance: float
) -> tuple[int, float, float | None]:
    """How many examples were compared, the largest difference of an output, and the agreement of predictions."""
    runner = interpreter.get_signature_runner()
    count, difference = 0, 0.0
    agreements: list[np.ndarray] = []
    for x in inputs:
        leaves = keras.tree.flatten(x)
        outputs = model(x, training=False)
        got = runner(**dict(zip(names, leaves, strict=True)))
        keys = sorted(outputs) if isinstance(outputs, dict) else [f"output_{i}" for i in range(len(got))]
        for key, output in zip(keys, keras.tree.flatten(outputs), strict=True):
            expected = np.asarray(output)
            here, largest = float(np.abs(expected - got[key]).max()), float(np.abs(expected).max())
            # A difference that is NaN is not at most anything: it is refused too.
            if not here <= tolerance * max(1.0, largest):
                raise ExportError(
                    f"The TF-Lite model's output {key!r} differs from Keras's by up to {here:.3g} (allowed: "
                    f"{tolerance:g}, relative to outputs up to {largest:.3g}). Nothing was written. If the difference "
                    "is rounding, raise tolerance=; if it is nan, the model's outputs are not finite."
                )
            difference = max(difference, here)
            if expected.ndim > 1 and expected.shape[-1] > 1:
                agreements.append((expected.argmax(-1) == got[key].argmax(-1)).ravel())
        count += len(leaves[0])
    return count, difference, float(np.concatenate(agreements).mean()) if agreements else None


def _sizes(content: bytes) -> dict[str, int]:
    return {"raw": len(content), "gzip": len(gzip.compress(content, mtime=0))}


def _move_into(work: Path, directory: Path) -> None:
    """Renames the new files into place; an earlier export's are set aside until all are there."""
    directory.mkdir(parents=True, exist_ok=True)
    new = list(work.iterdir())
    aside = work / "replaced"
    aside.mkdir()
    try:
        for source in new:
            target = directory / source.name
            if target.exists():
                os.replace(target, aside / source.name)
            os.replace(source, target)
    except BaseException:
        for old in aside.iterdir():
            target = directory / old.name
            if target.exists():
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            os.replace(old, target)
        raise


def _layer_sparsities(variables: dict[str, keras.Variable], content: bytes) -> tuple[LayerSparsity, ...]:
    """Finds each kernel in the file by its pattern of zeros; names there do not survive conversion."""
    patterns = [constant != 0 for constant in constants(content) if constant.ndim > 1]
    found: dict[str, float] = {}
    kernels = {path: np.asarray(variable) != 0 for path, variable in variables.items()}
    # The sparsest first: the fewer weights a kernel has left, the less can pass for it.
    for path in sorted(kernels, key=lambda path: kernels[path].mean()):
        match = _find(kernels[path], patterns)
        if match is not None:
            found[path] = 1.0 - float(patterns.pop(match).mean())
    return tuple(
        LayerSparsity(path, kernel.size, 1.0 - float(kernel.mean()), found.get(path))
        for path, kernel in kernels.items()
    )


def _find(kernel: np.ndarray, patterns: list[np.ndarray]) -> int | None:
    """Which pattern is this kernel's with its axes in another order, zeros staying zeros.

    Axes of size 1 come and go in conversion; a depthwise kernel's two last axes become one.
    """
    forms = [np.squeeze(kernel)]
    if kernel.ndim > 2:
        forms.append(np.squeeze(kernel.reshape(*kernel.shape[:-2], -1)))
    best: tuple[int, int] | None = None
    for i, pattern in enumerate(map(np.squeeze, patterns)):
        for form in forms:
            turned = (form.transpose(axes) for axes in itertools.permutations(range(form.ndim)))
            if any(t.shape == pattern.shape and not (pattern & ~t).any() for t in turned):
                best = max(best or (-1, -1), (int(pattern.sum()), i))
    return None if best is None else best[1]
