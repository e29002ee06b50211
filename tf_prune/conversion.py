"""A SavedModel -> the bytes of a TF-Lite file. The only calls of TensorFlow's converter."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_prune import tflite
from tf_prune.complaints import places, why
from tf_prune.loops import loops_of
from tf_prune.quiet import Heard, quiet
from tf_prune.saved_model import SERVED, check_is_saved_model, signature_names
from tf_prune.scales import ScaleError, repaired

ENCODINGS = ("dense", "sparse")
DTYPES = ("float32", "float16", "dynamic_int8", "int8")


# Of layers that Keras has quantized.
NOT_IN_TFLITE = (
    "TF-Lite has no operators for what those compute",
    'Export the model before model.quantize, with dtype="int8" for integers, which TF-Lite quantizes by itself.',
)


class ConversionError(ValueError):
    """TensorFlow's converter cannot make a TF-Lite file of this model."""


def convert(
    saved_model: Path,
    *,
    dtype: str = "float32",
    encoding: str = "dense",
    representative: Iterable[Mapping[str, np.ndarray]] | None = None,
    signature: str = SERVED,
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
        signature: Which of the SavedModel's.
        flex: Lets TensorFlow's own operators stand in the file where TF-Lite has none.
        layers: Name -> class of the Keras layers, to say in errors where an operator comes from.

    Raises:
        ConversionError: If the converter refuses; names the operators that TF-Lite does not have, and their layers.
            Also where TensorFlow, or a runtime, would end the process: `"int8"` of loops, tensors without any number.
    """
    check_is_saved_model(saved_model)
    present = signature_names(saved_model)
    if signature not in present:
        raise ValueError(f"The SavedModel has no signature {signature!r}. It has: {', '.join(sorted(present))}.")
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
    for name, shape in tf.train.list_variables(str(prefix)) if prefix.with_suffix(".index").is_file() else ():
        if 0 in shape and "VARIABLE_VALUE" in name:
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
