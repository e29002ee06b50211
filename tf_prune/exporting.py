"""Where a model leaves: clean SavedModel -> TF-Lite, dense and sparse -> parity check -> report."""

import contextlib
import gzip
import itertools
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_prune.batches import Batches
from tf_prune.conversion import DTYPES, ENCODINGS, convert
from tf_prune.export_report import ExportReport, Point, draw_sizes
from tf_prune.litert import LiteRTModel, check_installed, latencies, load_runnable
from tf_prune.parity import TOLERANCES, Arrays, ExportError, Parity, compare, num_examples, rows
from tf_prune.prunable import check_model
from tf_prune.scopes import check_sparsity
from tf_prune.sources import KerasSource, SavedModelSource
from tf_prune.sparse_inference import TARGETS, explain_graphs, why_wrong
from tf_prune.sweep import at_sparsity
from tf_prune.tflite import read
from tf_prune.zeros import zeros_in_file

_SIGNATURE = "serving_default"
# As many as TensorFlow's guides take; each is run once.
_NUM_REPRESENTATIVE = 200
_NO_FLEX = "Select TensorFlow op(s)"
_NOT_COMPARED = (
    "Not compared with the model: the runtime here has no Flex delegate. Compare them on the device that is to run it."
)


def export(
    model: keras.Model | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    data: Any = None,
    *,
    dtype: str = "float32",
    encoding: str | None = None,
    batch_size: int | None = None,
    signature: str = _SIGNATURE,
    sweep: Sequence[float] = (),
    tolerance: float | None = None,
    flex: bool = False,
) -> ExportReport:
    """Writes `saved_model/`, `model.tflite` and a report, after checking that they do what the model does.

    The SavedModel holds the plain model, each variable once: no mask, no optimizer, pruned weights exactly zero. The
    TF-Lite file is made from it twice, with plain and with sparse tensors, and the smaller one is kept. It is run with
    LiteRT, and its outputs are compared with the model's: what the data do not tell, since the outputs hardly vary over
    them, is a warning and in the report. Its zeros are counted, and each target's verdict on them is
    in the report (`tf_prune.explain`). The model itself is not changed. One that computes in float16 or bfloat16 is
    served and compared in float32.

    Args:
        model: A built `keras.Model`, pruned or not; or the path of a SavedModel, for example of one that was trained
            aware of quantization.
        directory: Where to write; made if needed. Files of an earlier export there are replaced.
        data: Real inputs to compare on, an `(x, y)` batch or an iterable of them (y is not used); of a SavedModel with
            several inputs, x is a dict of its names. `None` takes 32 standard normal examples, or as many as the
            model's inputs fix. `"int8"` takes its ranges from the first 200 examples.
        dtype: Of the weights in the TF-Lite file: `"float32"`, `"float16"`, `"dynamic_int8"`; or `"int8"` for all,
            activations, inputs and outputs too.
        encoding: `"dense"` or `"sparse"`; `None` keeps the smaller file. Microcontrollers need `"dense"`.
        batch_size: Fixes the TF-Lite file's; `None` leaves it open. The SavedModel serves batches of any size, unless
            the model's own inputs fix it.
        signature: Which of a SavedModel's signatures is exported.
        sweep: Sparsities to measure size and latency at, too, for the report's plot: the kernels' smallest weights
            are zeroed for it, in the pattern they have, and come back afterwards. A Keras model only.
        tolerance: Root mean square of an output's differences, of each channel by itself, relative to the standard
            deviation of the model's own outputs over the examples; a constant file has 1. `None` is 1e-3 for float32,
            0.05 for float16, 0.3 for dynamic-range int8 and 0.5 for int8.
        flex: Lets operators of TensorFlow stand in the file where TF-Lite has none. It is not compared, and the report
            says so, where the installed runtime has no Flex delegate.

    Returns:
        An `ExportReport`; `report.json`, `report.md` and, with matplotlib, `report.png` hold the same.

    Raises:
        ConversionError: If TF-Lite cannot express the model; names the operators.
        ExportError: If outputs differ by more than `tolerance`, or predictions do that rounding cannot turn.
        ImportError: If `ai-edge-litert` is missing.
        ValueError: If a pruned weight is not zero, a weight is not finite, the inputs' shape is unknown or not that of
            the data, a layer is stateful, or `"int8"` has no data. Nothing is written then, as after all other errors.

    Example:
        report = tf_prune.export(model, "saved_models/lenet", data=(x_test, y_test))
        print(report)
    """
    _check_options(model, dtype, encoding, batch_size, sweep)
    directory = Path(directory)
    batches = Batches(data)
    source = (
        KerasSource(model, batches)
        if isinstance(model, keras.Model)
        else SavedModelSource(Path(model), signature, batches)
    )
    check_installed()
    with _folder_in(directory) as work:

        def files_of(saved_model: Path) -> dict[str, bytes]:
            source.write(saved_model, batch_size)
            return {
                name: convert(
                    saved_model,
                    dtype=dtype,
                    encoding=name,
                    representative=_representative(source, batches, dtype),
                    signature=signature,
                    flex=flex,
                )
                for name in ENCODINGS
            }

        files = files_of(work / "saved_model")
        one = rows(next(source.inputs()), 0, 1)
        allowed = TOLERANCES[dtype] if tolerance is None else tolerance
        models, refused = _usable(files, one, flex)
        kept, parity = _first_that_agrees(
            [encoding] if encoding else sorted(files, key=lambda name: len(files[name])),
            models,
            refused,
            source,
            allowed,
        )
        archive = b"".join(file.read_bytes() for file in sorted(work.rglob("*")) if file.is_file())
        layers = zeros_in_file(source.kernels, files[kept])
        graphs = read(files[kept])
        report = ExportReport(
            directory=str(directory),
            dtype=dtype,
            encoding=kept,
            bytes={name: _sizes(content) for name, content in [*files.items(), ("SavedModel", archive)]},
            layers=layers,
            inputs=f"{parity.count:,} {'given' if batches.given else 'random'} examples",
            largest_difference=parity.largest_difference,
            agreement=parity.agreement,
            undecided=parity.undecided,
            machine=platform.machine(),
            refused=refused,
            points=_points([(_sparsity(source.kernels), files), *_sweep(source, sweep, files_of)], one, flex),
            explanations=tuple(explain_graphs(graphs, target, source.layers) for target in TARGETS),
        )
        (work / "model.tflite").write_bytes(files[kept])
        report.save(work / "report.json")
        drawn = draw_sizes(work / "report.png", report)
        (work / "report.md").write_text(report.to_markdown("report.png" if drawn else None))
        if parity.undecided:
            warnings.warn(" ".join(parity.undecided), stacklevel=2)
        _move_into(work, directory)
    return report


def _usable(files: dict[str, bytes], one: Arrays, flex: bool) -> tuple[dict[str, LiteRTModel], dict[str, str]]:
    """The files that LiteRT runs, and why not the others. What is known to be wrong is not tried: it may crash."""
    wrong = {name: why for name, content in files.items() if (why := why_wrong(read(content))) is not None}
    models, refused = load_runnable({name: files[name] for name in files if name not in wrong}, one, flex)
    return models, {**wrong, **refused}


def _first_that_agrees(
    encodings: list[str], models: dict[str, LiteRTModel], refused: dict[str, str], source: Any, tolerance: float
) -> tuple[str, Parity]:
    """The first encoding that LiteRT runs and whose outputs are the model's. What was wrong with others is noted.

    XNNPACK mistakes some int8 weights with a sparse encoding; then the plain encoding is what can be used. A file with
    operators of TensorFlow cannot be compared where the runtime has no Flex delegate, as in TensorFlow 2.21.
    """
    name, *others = encodings
    if _NO_FLEX in refused.get(name, ""):
        for unknown in [key for key, reason in refused.items() if _NO_FLEX in reason]:
            del refused[unknown]
        return name, Parity(0, None, None, (_NOT_COMPARED,))
    try:
        if name in refused:
            raise ExportError(f"The {name} encoding cannot be used. {refused[name]} Nothing was written.")
        model = models[name]
        return name, compare(source.outputs, model.outputs, source.inputs(), tolerance, steps=model.steps)
    except ExportError as error:
        if not others:
            raise
        refused[name] = str(error).replace(" Nothing was written.", "")
        models.pop(name, None)
    return _first_that_agrees(others, models, refused, source, tolerance)


def _check_options(model: Any, dtype: str, encoding: str | None, batch_size: Any, sweep: Sequence[float]) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}. Expected one of {', '.join(DTYPES)}.")
    if encoding not in (None, *ENCODINGS):
        raise ValueError(f"Unknown encoding {encoding!r}. Expected 'dense', 'sparse', or None for the smaller file.")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, or None for any; got {batch_size!r}.")
    for sparsity in sweep:
        check_sparsity(sparsity)
    if not isinstance(model, keras.Model):
        if not isinstance(model, (str, os.PathLike)):
            check_model(model)
        if batch_size is not None or sweep:
            raise ValueError(
                "batch_size= and sweep= need the Keras model: a SavedModel's signature fixes its batch size, and its "
                "weights are not changed. Pass the model, or leave them out."
            )


@contextlib.contextmanager
def _folder_in(directory: Path) -> Iterator[Path]:
    """A folder on the same disk, so that what is ready is renamed into place. Directories made for it go after errors.

    Made in the directory and not beside it: then whether it can be written into shows before the work.
    """
    path = (directory, *directory.parents)
    for file in filter(os.path.isfile, path):
        raise ValueError(f"directory must be a folder to write into, but {file} is a file.")
    missing = [part for part in path if not os.path.exists(part)]
    try:
        with _temporary_in(directory) as work:
            yield work
    except BaseException:
        for part in missing:
            with contextlib.suppress(OSError):
                part.rmdir()
        raise


@contextlib.contextmanager
def _temporary_in(directory: Path) -> Iterator[Path]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=directory, prefix=".")
    except OSError as error:
        raise type(error)(f"Cannot write into {directory}: {error.strerror}. Choose another directory.") from error
    with temporary as name:
        yield Path(name)


def _representative(source: Any, batches: Batches, dtype: str) -> list[dict[str, np.ndarray]] | None:
    """Single examples that give int8 its ranges; `None` where it needs none."""
    if dtype != "int8" or (isinstance(source, SavedModelSource) and source.has_trained_ranges):
        return None
    if not batches.given:
        raise ValueError(
            "dtype='int8' takes the ranges of activations from real inputs. Pass data=(x, y) with some hundred "
            "examples as the model will see them; or train aware of quantization (tf_prune.tfmot)."
        )
    ones = (rows(inputs, i, i + 1) for inputs in source.inputs() for i in range(num_examples(inputs)))
    return list(itertools.islice(ones, _NUM_REPRESENTATIVE))


def _sparsity(kernels: dict[str, np.ndarray]) -> float:
    total = sum(kernel.size for kernel in kernels.values())
    return sum(int((kernel == 0).sum()) for kernel in kernels.values()) / total if total else 0.0


def _sweep(
    source: Any, sparsities: Sequence[float], files_of: Callable[[Path], dict[str, bytes]]
) -> Iterator[tuple[float, dict[str, bytes]]]:
    """The files with other fractions of zeros."""
    for sparsity in sparsities:
        with at_sparsity(source.variables, sparsity), tempfile.TemporaryDirectory() as folder:
            files = files_of(Path(folder) / "saved_model")
            actual = _sparsity(source.kernels)
        yield actual, files


def _points(swept: list[tuple[float, dict[str, bytes]]], one: Arrays, flex: bool) -> tuple[Point, ...]:
    """Size and latency of all files; their latencies are measured in turn, so that a drift falls on all alike."""
    runnable = {(i, name): m for i, (_, files) in enumerate(swept) for name, m in _usable(files, one, flex)[0].items()}
    times = latencies(runnable, one)
    return tuple(
        Point(sparsity, name, len(content), times.get((i, name)))
        for i, (sparsity, files) in enumerate(swept)
        for name, content in files.items()
    )


def _sizes(content: bytes) -> dict[str, int]:
    return {"raw": len(content), "gzip": len(gzip.compress(content, mtime=0))}


def _move_into(work: Path, directory: Path) -> None:
    """Renames the new files into place; an earlier export's are set aside until all are there."""
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
        for source in new:
            if not source.exists():
                os.replace(directory / source.name, source)
        for old in aside.iterdir():
            os.replace(old, directory / old.name)
        raise
