"""A Keras model -> a SavedModel -> the bytes of a TF-Lite file. The only calls of TensorFlow's converter."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune import tflite
from tf_prune.complaints import places, why
from tf_prune.loops import loops_of
from tf_prune.precision import computing_in
from tf_prune.quiet import Heard, quiet
from tf_prune.scales import ScaleError, repaired

ENCODINGS = ("dense", "sparse")
DTYPES = ("float32", "float16", "dynamic_int8", "int8")
_EXPORTED = "serving_default"
_FIXED_BATCH = "fixed_batch"


# Of layers that Keras has quantized.
NOT_IN_TFLITE = (
    "TF-Lite has no operators for what those compute",
    'Export the model before model.quantize, with dtype="int8" for integers, which TF-Lite quantizes by itself.',
)


class ConversionError(ValueError):
    """TensorFlow's converter cannot make a TF-Lite file of this model."""


def write_saved_model(model: keras.Model, examples: Any, directory: Path, batch_size: int | None = None) -> list[str]:
    """Writes the plain model, each variable once, to serve under `serving_default` for batches of any size.

    It computes in float32, in whatever the model does: TF-Lite has few kernels for other floats. A batch size that the
    model itself fixes stays.

    Args:
        model: A built `keras.Model`.
        examples: Inputs of the shapes and dtypes to serve, in the structure that the model takes.
        directory: The SavedModel.
        batch_size: Adds a second signature of just this batch size, the one that `convert` then takes.

    Returns:
        The names of the inputs, in the order of the flattened examples.
    """
    leaves = keras.tree.flatten(examples)
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    if len(set(names)) != len(leaves) or not all(name.isidentifier() for name in names):
        names = [f"input_{i}" for i in range(len(leaves))]

    def signature(size: int | None) -> list[Any]:
        specs = [
            tf.TensorSpec((size, *leaf.shape[1:]), tf.as_dtype(leaf.dtype), name)
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return [keras.tree.pack_sequence_as(examples, specs)]

    # An endpoint alone tracks the variables that it uses, once; Keras's own model.export writes each twice.
    archive = keras.export.ExportArchive()

    def serve(inputs: Any) -> Any:
        return model(inputs, training=False)

    with computing_in(model, "float32"), quiet():
        archive.add_endpoint("serve", serve, input_signature=signature(batch_size_of(model)))
        if batch_size is not None:
            archive.add_endpoint(_FIXED_BATCH, lambda inputs: serve(inputs), input_signature=signature(batch_size))
        archive.write_out(str(directory), verbose=False)
    return names


def batch_size_of(model: keras.Model) -> int | None:
    """The batch size that the model's inputs fix; mostly none."""
    return next((tensor.shape[0] for tensor in getattr(model, "inputs", None) or []), None)


def signatures_of(saved_model: Path) -> dict[str, Any]:
    """The functions that a SavedModel serves, by name.

    Raises:
        ValueError: If the folder is no SavedModel.
    """
    _check_is_saved_model(saved_model)
    with quiet():
        loaded = tf.saved_model.load(str(saved_model))
    # A signature works as long as what it was loaded with lives.
    functions = dict(loaded.signatures)
    for function in functions.values():
        function.kept_alive_by_tf_prune = loaded
    return functions


def has_trained_ranges(saved_model: Path) -> bool:
    """Whether quantization-aware training has put its ranges into a SavedModel."""
    return b"FakeQuantWithMinMaxVars" in (saved_model / "saved_model.pb").read_bytes()


def convert(
    saved_model: Path,
    *,
    dtype: str = "float32",
    encoding: str = "dense",
    representative: Iterable[Mapping[str, np.ndarray]] | None = None,
    signature: str = _EXPORTED,
    flex: bool = False,
    layers: Mapping[str, str] | None = None,
) -> bytes:
    """The TF-Lite file of a SavedModel's signature. What TensorFlow prints meanwhile is not seen.

    Args:
        saved_model: Its folder.
        dtype: `"float32"`; `"float16"` and `"dynamic_int8"` for weights alone; `"int8"` for everything, inputs and
            outputs too.
        encoding: `"dense"`, or `"sparse"` for tensors with at least 30 % zeros.
        representative: Real inputs by name, one example each: they give the ranges of `"int8"`. `None` where
            quantization-aware training has given them.
        signature: Which of the SavedModel's; the one of a fixed batch size is taken in the place of `serving_default`.
        flex: Lets TensorFlow's own operators stand in the file where TF-Lite has none.
        layers: Name -> class of the Keras layers, to say in errors where an operator comes from.

    Raises:
        ConversionError: If the converter refuses; names the operators that TF-Lite does not have, and their layers.
            Also where TensorFlow, or a runtime, would end the process: `"int8"` of loops, tensors without any number.
    """
    _check_is_saved_model(saved_model)
    present = _signature_names(saved_model)
    if signature not in present:
        raise ValueError(f"The SavedModel has no signature {signature!r}. It has: {', '.join(sorted(present))}.")
    if signature == _EXPORTED and _FIXED_BATCH in present:
        signature = _FIXED_BATCH
    layers = layers or {}
    _check_sizes(saved_model)
    if dtype == "int8" and representative is not None:
        representative = list(representative)
        _check_calibration(saved_model, signature, representative, flex, layers)
    content = _converted(saved_model, dtype, encoding, representative, signature, flex, layers)
    try:
        return repaired(content, layers) if dtype == "int8" else content
    except ScaleError as error:
        raise ConversionError(str(error)) from error


def _converted(
    saved_model: Path,
    dtype: str,
    encoding: str,
    representative: Iterable[Mapping[str, np.ndarray]] | None,
    signature: str,
    flex: bool,
    layers: Mapping[str, str],
) -> bytes:
    heard = Heard()
    try:
        with warnings.catch_warnings(), quiet() as heard:
            # Of TensorFlow's own calibration, about its own interpreter.
            warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated", UserWarning)
            converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=[signature])
            converter.optimizations = [] if dtype == "float32" else [tf.lite.Optimize.DEFAULT]
            if encoding == "sparse":
                converter.optimizations.append(tf.lite.Optimize.EXPERIMENTAL_SPARSITY)
            operators = [tf.lite.OpsSet.TFLITE_BUILTINS]
            if dtype == "float16":
                converter.target_spec.supported_types = [tf.float16]
            elif dtype == "int8":
                converter.inference_input_type = converter.inference_output_type = tf.int8
                if representative is not None:
                    operators = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
                    converter.representative_dataset = lambda: iter(map(dict, representative))
            converter.target_spec.supported_ops = [*operators, *([tf.lite.OpsSet.SELECT_TF_OPS] if flex else [])]
            return bytes(converter.convert())
    except Exception as error:
        raise ConversionError(why(f"{error}\n{heard.text}", dtype, layers)) from error


def _check_sizes(saved_model: Path) -> None:
    """TensorFlow's sparse encoding ends the process on a variable without any number."""
    prefix = saved_model / "variables" / "variables"
    for _, shape in tf.train.list_variables(str(prefix)) if prefix.with_suffix(".index").is_file() else ():
        if 0 in shape:
            raise ConversionError(
                f"A variable of the model has the shape {tuple(shape)}: it holds no number, and TensorFlow's converter "
                "would end the process. Leave out the layer that it belongs to, or its input of size 0."
            )


def _check_calibration(
    saved_model: Path,
    signature: str,
    representative: list[Mapping[str, np.ndarray]],
    flex: bool,
    layers: Mapping[str, str],
) -> None:
    if not representative:
        raise ValueError(
            "representative is empty, but int8 takes the ranges of activations from it. Give some hundred real inputs."
        )
    loops = loops_of(saved_model, signature)
    # Some go in conversion, as when the converter knows the whole layer.
    if loops and _runs_loops(_converted(saved_model, "float32", "dense", None, signature, flex, layers)):
        raise ConversionError(
            f"dtype='int8' cannot be had for loops, as in {places(loops, layers)}: TensorFlow's calibration ends the "
            "process on them. Build recurrent layers with unroll=True and load the weights, write other loops out in "
            "Python; or take dtype='dynamic_int8', in which weights are int8 and loops compute in floats."
        )


def _runs_loops(content: bytes) -> bool:
    return any(operator.kind == "WHILE" for graph in tflite.read(content) for operator in graph.operators)


def flex_interpreter(**arguments: Any) -> Any:
    """TensorFlow's own interpreter, which older versions build with the Flex delegate; LiteRT's package has none."""
    with warnings.catch_warnings():
        # Deprecated for ai-edge-litert.
        warnings.simplefilter("ignore")
        return tf.lite.Interpreter(**arguments)


def _check_is_saved_model(folder: Path) -> None:
    if not (folder / "saved_model.pb").is_file():
        raise ValueError(f"Expected a SavedModel, a folder with saved_model.pb in it; got {folder}.")


def _signature_names(saved_model: Path) -> set[str]:
    from tensorflow.core.protobuf import saved_model_pb2

    content = saved_model_pb2.SavedModel()
    content.ParseFromString((saved_model / "saved_model.pb").read_bytes())
    return {name for graph in content.meta_graphs for name in graph.signature_def if not name.startswith("__")}
