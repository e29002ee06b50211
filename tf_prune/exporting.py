"""Where a model leaves: clean SavedModel -> TF-Lite, dense and sparse -> parity check -> report."""

import functools
import gzip
import itertools
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from tf_prune.batches import Batches
from tf_prune.candidates import Candidates, Source, Wanted, candidates, sizes_at
from tf_prune.conversion import DTYPES, ENCODINGS
from tf_prune.export_report import ExportReport, draw_sizes
from tf_prune.litert import check_installed
from tf_prune.parity import TOLERANCES, ExportError, Parity, compare, rows
from tf_prune.placing import replacing
from tf_prune.prunable import check_model
from tf_prune.saved_model import SERVED, call_signature, signatures_of
from tf_prune.scopes import check_sparsity
from tf_prune.sources import KerasSource, SavedModelSource
from tf_prune.sparse_inference import TARGETS, explain_graphs
from tf_prune.tflite import read
from tf_prune.zeros import LayerSparsity, zeros_in_file

# All that an export may write; `report.json` is there whenever the others are of one export and complete.
_ENTRIES = ("saved_model", "model.tflite", "report.json", "report.md", "report.png")


def export(
    model: keras.Model | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    data: Any = None,
    *,
    dtype: str = "float32",
    encoding: str | None = None,
    batch_size: int | None = None,
    input_shape: Any = None,
    num_batches: int | None = None,
    tflite: bool = True,
    signature: str = SERVED,
    sweep: Sequence[float] = (),
    tolerance: float | None = None,
    flex: bool = False,
) -> ExportReport:
    """Writes `saved_model/`, `model.tflite` and a report, after checking that they do what the model does.

    The SavedModel holds the plain model, each variable once: no mask, no optimizer, pruned weights exactly zero. Every
    size that the model leaves open is open in it. The TF-Lite file is made of the same twice, with plain and with
    sparse tensors, and the smaller one is kept. Both are run, and their outputs are compared with the model's, at other
    sizes too where sizes are open; what the data do not tell, since the outputs hardly vary over them, is a warning and
    in the report. Zeros are counted, and each target's verdict on them is in the report
    (`tf_prune.explain`). The model itself is not changed. One that computes in float16 or bfloat16 is served and
    compared in float32.

    Args:
        model: A built `keras.Model`, pruned or not; or the path of a SavedModel, for example of one that was trained
            aware of quantization.
        directory: Where to write; made if needed. All of an earlier export there is replaced at once, or stays if this
            one fails or is killed. `report.json` goes first and comes last: a directory that has it is whole.
        data: Real inputs to compare on, an `(x, y)` batch, x alone, or an iterable of them (y is not used); of a
            SavedModel with several inputs, x is a dict of its names. A generator is read once, and kept. `None` takes
            32 standard normal examples, or as many as the model's inputs fix. `"int8"` takes its ranges from the first
            200 examples.
        dtype: Of the weights in the TF-Lite file: `"float32"`, `"float16"`, `"dynamic_int8"`; or `"int8"` for all,
            activations, inputs and outputs too.
        encoding: `"dense"` or `"sparse"`; `None` keeps the smaller file. Microcontrollers need `"dense"`.
        batch_size: Fixes the TF-Lite file's; `None` leaves it open, which recurrent layers cannot.
        input_shape: Fixes all other sizes that the TF-Lite file takes, as delegates and browsers need it: the shape of
            one example, `(96, 96, 3)`, or a structure of shapes like that of the inputs. `"int8"` fixes them to the
            data's.
        num_batches: So many batches are read of the data, once, and kept; endless data needs it.
        tflite: `False` writes the SavedModel alone, for servers: TF-Lite has no strings, and not every operator.
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
    wanted = Wanted(dtype, encoding, batch_size, input_shape is not None, signature, tolerance, flex)
    _check_options(model, wanted, input_shape, tflite, sweep)
    directory, batches = Path(directory), _read_once(data, num_batches)
    source: Source = (
        KerasSource(model, batches, input_shape)
        if isinstance(model, keras.Model)
        else SavedModelSource(Path(model), signature, batches)
    )
    if dtype == "int8" and not batches.given and not source.has_trained_ranges:
        raise ValueError(
            "dtype='int8' takes the ranges of activations from real inputs. Pass data=(x, y) with some hundred "
            "examples as the model will see them; or train aware of quantization (tf_prune.tfmot)."
        )
    if tflite:
        check_installed()
    with replacing(directory, _ENTRIES, last="report.json") as work:
        source.write(work / "saved_model")
        made = candidates(source, work / "saved_model", wanted) if tflite else None
        served = _compared_as_served(source, work / "saved_model", wanted, whole=not tflite)
        report = _report(directory, work, batches, source, wanted, made, served, sweep)
        if made is not None:
            (work / "model.tflite").write_bytes(made.files[made.kept])
        report.save(work / "report.json")
        drawn = draw_sizes(work / "report.png", report) if report.points else False
        (work / "report.md").write_text(report.to_markdown("report.png" if drawn else None))
        # Before the files are put in their place: for who makes errors of warnings there is no export.
        for note in (*report.notes, *report.undecided):
            warnings.warn(note, stacklevel=2)
    return report


def _report(
    directory: Path,
    work: Path,
    batches: Batches,
    source: Source,
    wanted: Wanted,
    made: Candidates | None,
    served: Parity,
    sweep: Sequence[float],
) -> ExportReport:
    content = None if made is None else made.files[made.kept]
    graphs = () if content is None else read(content)
    archive = b"".join(file.read_bytes() for file in sorted((work / "saved_model").rglob("*")) if file.is_file())
    parity = served if made is None else made.parity
    points: tuple[Any, ...] = ()
    if made is not None:
        one = rows(next(source.inputs(list(made.shapes))), 0, 1)
        points = sizes_at(source, wanted, made, sweep, one)
    return ExportReport(
        directory=str(directory),
        dtype=wanted.dtype,
        encoding=None if made is None else made.kept,
        bytes={name: _sizes(file) for name, file in [*(made.files if made else {}).items(), ("SavedModel", archive)]},
        layers=zeros_in_file(source.kernels, content) if content else _zeros(source),
        inputs=f"{parity.count:,} {'given' if batches.given else 'random'} examples",
        shapes=tuple(source.shapes if made is None else made.shapes),
        largest_difference=parity.largest_difference,
        agreement=parity.agreement,
        undecided=parity.undecided,
        machine=platform.machine(),
        refused={} if made is None else made.refused,
        points=points,
        explanations=tuple(explain_graphs(graphs, target, source.layers) for target in TARGETS if graphs),
        notes=(*source.notes, *(made.notes if made else ())),
    )


def _zeros(source: Source) -> tuple[LayerSparsity, ...]:
    return tuple(LayerSparsity(p, k.size, float((k == 0).mean()), None) for p, k in source.kernels.items())


def _read_once(data: Any, num_batches: int | None) -> Batches:
    """The data; in memory if it can be read only once, or so many batches of it are asked for."""
    if num_batches is not None and (
        not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 1
    ):
        raise ValueError(f"num_batches must be a positive integer, or None for all of the data; got {num_batches!r}.")
    batches = Batches(data, limit=num_batches)
    if not batches.given or (num_batches is None and not batches.once_only):
        return batches
    return Batches(list(itertools.islice(batches, num_batches)))


def _compared_as_served(source: Source, folder: Path, wanted: Wanted, whole: bool) -> Parity:
    """How what the SavedModel serves compares with the model: on a batch or the whole data, and at other sizes."""
    if isinstance(source, SavedModelSource):
        return Parity(0, None, None)
    serve = functools.partial(call_signature, signatures_of(folder)[SERVED])
    allowed = max(TOLERANCES["float32"], wanted.tolerance or 0.0)
    for inputs in source.at_other_sizes(source.shapes):
        try:
            compare(source.outputs, serve, [inputs], allowed)
        except ExportError as error:
            sizes = ", ".join(str(array.shape) for array in inputs.values())
            why = str(error).replace("TF-Lite model", "SavedModel")
            raise ExportError(
                f"On inputs of shape {sizes} the model computes otherwise in a graph than by itself, as in "
                f"model.predict: {why} Build it with keras.Input(shape) of fixed sizes, or mend the layer that does."
            ) from error
    try:
        return compare(source.outputs, serve, source.inputs() if whole else [next(source.inputs())], allowed)
    except ExportError as error:
        raise ExportError(str(error).replace("TF-Lite model", "SavedModel")) from error


def _check_options(model: Any, wanted: Wanted, input_shape: Any, tflite: bool, sweep: Sequence[float]) -> None:
    if wanted.dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {wanted.dtype!r}. Expected one of {', '.join(DTYPES)}.")
    if wanted.encoding not in (None, *ENCODINGS):
        raise ValueError(
            f"Unknown encoding {wanted.encoding!r}. Expected 'dense', 'sparse', or None for the smaller file."
        )
    size = wanted.batch_size
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"batch_size must be a positive integer, or None for any; got {size!r}.")
    for sparsity in sweep:
        check_sparsity(sparsity)
    if not isinstance(model, keras.Model):
        if not isinstance(model, (str, os.PathLike)):
            check_model(model)
        if size is not None or sweep or input_shape is not None or not tflite:
            raise ValueError(
                "batch_size=, input_shape=, sweep= and tflite=False need the Keras model: a SavedModel's signature "
                "fixes its sizes, and its weights are not changed. Pass the model, or leave them out."
            )
    if not tflite and (wanted != Wanted(tolerance=wanted.tolerance) or sweep):
        raise ValueError(
            "tflite=False writes the SavedModel alone, in float32 and open in every size; dtype=, encoding=, "
            "batch_size=, input_shape=, sweep= and flex= are of the TF-Lite file. Leave them out."
        )


def _sizes(content: bytes) -> dict[str, int]:
    return {"raw": len(content), "gzip": len(gzip.compress(content, mtime=0))}
