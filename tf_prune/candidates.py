"""The TF-Lite files that a model may be shipped as: one an encoding, those that LiteRT runs, the first that agrees."""

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tf_prune.conversion import ENCODINGS, ConversionError, convert
from tf_prune.export_report import Point
from tf_prune.litert import LiteRTModel, latencies, load_runnable
from tf_prune.parity import TOLERANCES, Arrays, ExportError, Parity, compare, num_examples, rows
from tf_prune.quiet import quiet
from tf_prune.saved_model import SERVED, Shape
from tf_prune.sources import KerasSource, SavedModelSource
from tf_prune.sparse_inference import why_wrong
from tf_prune.sweep import at_sparsity
from tf_prune.tflite import read

Source = KerasSource | SavedModelSource

# As many as TensorFlow's guides take; each is run once.
_NUM_REPRESENTATIVE = 200
_NO_FLEX = "Select TensorFlow op(s)"
_NOT_COMPARED = (
    "Not compared with the model: the runtime here has no Flex delegate. Compare them on the device that is to run it."
)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What kind of TF-Lite file is asked for: the arguments of `export`."""

    dtype: str = "float32"
    encoding: str | None = None
    batch_size: int | None = None
    is_fixed: bool = False
    signature: str = SERVED
    tolerance: float | None = None
    flex: bool = False

    @property
    def allowed(self) -> float:
        """How far outputs may differ."""
        return TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The files by encoding, and which is kept.

    Attributes:
        files: Their bytes.
        shapes: What they take, one an input.
        kept: The encoding.
        parity: How the kept one compares with the model.
        refused: Why an encoding cannot be used.
        notes: What the user did not ask for, a sentence each.
    """

    files: dict[str, bytes]
    shapes: tuple[Shape, ...]
    kept: str
    parity: Parity
    refused: dict[str, str]
    notes: tuple[str, ...] = ()


def candidates(source: Source, saved_model: Path, wanted: Wanted) -> Candidates:
    """Makes the files, runs them, and finds the first that agrees with the model, the smallest first.

    Sizes that the model leaves open are open in the files, if TF-Lite computes rightly with them at other sizes than
    the data's; else the files take what the data have, which is noted.

    Args:
        source: The model.
        saved_model: Its SavedModel, written.
        wanted: What is asked for.

    Raises:
        ConversionError: If TF-Lite cannot express the model.
        ExportError: If no file agrees.
        ValueError: If data of several shapes meets a file of one.
    """
    is_open = wanted.dtype != "int8" and not wanted.is_fixed
    shapes = source.shapes_for_tf_lite(wanted.batch_size, is_open)
    fixed = source.shapes_for_tf_lite(wanted.batch_size, False)
    try:
        return _of_shapes(source, saved_model, wanted, shapes)
    except (ConversionError, ExportError) as error:
        if fixed == shapes:
            raise
        with contextlib.suppress(ConversionError, ExportError):
            found = _of_shapes(source, saved_model, wanted, fixed)
            sizes = ", ".join(str(shape[1:]) for shape in fixed)
            note = f"The TF-Lite file takes examples of shape {sizes} alone. With open sizes: {error}"
            return dataclasses.replace(found, notes=(note.replace(" Nothing was written.", ""),))
        raise


def sizes_at(
    source: Source, wanted: Wanted, made: Candidates, sparsities: Sequence[float], one: Arrays
) -> tuple[Point, ...]:
    """Size and latency of the files, and of those with other fractions of zeros; latencies are measured in turn.

    Args:
        source: The model.
        wanted: What is asked for.
        made: The files as they are.
        sparsities: The other fractions.
        one: A single example.
    """
    swept = [(sparsity_of(source.kernels), made.files)]
    for sparsity in sparsities:
        with at_sparsity(source.variables, sparsity):
            swept.append((sparsity_of(source.kernels), _files(source, None, wanted, list(made.shapes))))
    runnable = {
        (i, name): model
        for i, (_, files) in enumerate(swept)
        for name, model in _usable(files, one, wanted.flex)[0].items()
    }
    times = latencies(runnable, one)
    return tuple(
        Point(sparsity, name, len(content), times.get((i, name)))
        for i, (sparsity, files) in enumerate(swept)
        for name, content in files.items()
    )


def sparsity_of(kernels: dict[str, np.ndarray]) -> float:
    """Fraction of exact zeros."""
    total = sum(kernel.size for kernel in kernels.values())
    return sum(int((kernel == 0).sum()) for kernel in kernels.values()) / total if total else 0.0


def _of_shapes(source: Source, saved_model: Path, wanted: Wanted, shapes: list[Shape]) -> Candidates:
    files = _files(source, saved_model, wanted, shapes)
    one = rows(next(source.inputs(shapes)), 0, 1)
    models, refused = _usable(files, one, wanted.flex)
    others = list(source.at_other_sizes(shapes))
    order = [wanted.encoding] if wanted.encoding else sorted(files, key=lambda name: len(files[name]))
    for name in order:
        if _NO_FLEX in refused.get(name, ""):
            # It cannot be compared where the runtime has no Flex delegate, as in TensorFlow 2.21.
            known = {key: reason for key, reason in refused.items() if _NO_FLEX not in reason}
            return Candidates(files, tuple(shapes), name, Parity(0, None, None, (_NOT_COMPARED,)), known)
        try:
            if name in refused:
                raise ExportError(f"The {name} encoding cannot be used. {refused[name]} Nothing was written.")
            parity = _parity(source, models[name], wanted.allowed, shapes, others)
            return Candidates(files, tuple(shapes), name, parity, refused)
        except ExportError as error:
            if name == order[-1]:
                raise
            # XNNPACK mistakes some int8 weights with a sparse encoding; then the plain encoding is what can be used.
            refused[name] = str(error).replace(" Nothing was written.", "")
    raise AssertionError("There is always an encoding.")


def _parity(source: Source, model: LiteRTModel, allowed: float, shapes: list[Shape], others: list[Arrays]) -> Parity:
    """On the data; and on inputs of other sizes, if those are open."""
    for inputs in others:
        try:
            with quiet():
                compare(source.outputs, model.outputs, [inputs], allowed, steps=model.steps)
        except (ExportError, RuntimeError, ValueError) as error:
            sizes = ", ".join(str(array.shape) for array in inputs.values())
            raise ExportError(f"On inputs of shape {sizes}: {str(error).splitlines()[0]}") from error
    return compare(source.outputs, model.outputs, source.inputs(shapes), allowed, steps=model.steps)


def _files(source: Source, saved_model: Path | None, wanted: Wanted, shapes: list[Shape]) -> dict[str, bytes]:
    """Both encodings, from the SavedModel if it takes just these shapes, or from another one."""
    representative = _representative(source, wanted.dtype, shapes)
    with tempfile.TemporaryDirectory() as folder:
        if saved_model is None or shapes != source.shapes:
            saved_model = Path(folder) / "saved_model"
            source.write(saved_model, shapes)
        return {
            name: convert(
                saved_model,
                dtype=wanted.dtype,
                encoding=name,
                representative=representative,
                signature=wanted.signature,
                flex=wanted.flex,
                layers=source.layers,
            )
            for name in ENCODINGS
        }


def _usable(files: dict[str, bytes], one: Arrays, flex: bool) -> tuple[dict[str, LiteRTModel], dict[str, str]]:
    """The files that LiteRT runs, and why not the others. What is known to be wrong is not tried: it may crash."""
    wrong = {name: why for name, content in files.items() if (why := _why_not_run(content)) is not None}
    models, refused = load_runnable({name: files[name] for name in files if name not in wrong}, one, flex)
    return models, {**wrong, **refused}


def _why_not_run(content: bytes) -> str | None:
    try:
        return why_wrong(read(content))
    except ValueError as error:
        # As where its sparse encoding drops what does not fill a block.
        return f"TensorFlow's converter has made a file that is none. {error}"


def _representative(source: Source, dtype: str, shapes: list[Shape]) -> list[dict[str, np.ndarray]] | None:
    """Single examples that give int8 its ranges; `None` where it needs none."""
    if dtype != "int8" or source.has_trained_ranges:
        return None
    ones = (rows(inputs, i, i + 1) for inputs in source.inputs(shapes) for i in range(num_examples(inputs)))
    return list(itertools.islice(ones, _NUM_REPRESENTATIVE))
