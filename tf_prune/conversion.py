"""A SavedModel -> the bytes of a TF-Lite file. The only calls of TensorFlow's converter."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_prune.saved_model import SERVED, check_is_saved_model, signature_names

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
) -> bytes:
    """The TF-Lite file of a SavedModel's signature.

    Args:
        saved_model: Its folder.
        dtype: `"float32"`; `"float16"` and `"dynamic_int8"` for weights alone; `"int8"` for everything, inputs and
            outputs too.
        encoding: `"dense"`, or `"sparse"` for tensors with at least 30 % zeros.
        representative: Real inputs by name, one example each: they give the ranges of `"int8"`. `None` where
            quantization-aware training has given them.
        signature: Which of the SavedModel's.
        flex: Lets TensorFlow's own operators stand in the file where TF-Lite has none.

    Raises:
        ConversionError: If the converter refuses; names the operators that TF-Lite does not have.
    """
    check_is_saved_model(saved_model)
    present = signature_names(saved_model)
    if signature not in present:
        raise ValueError(f"The SavedModel has no signature {signature!r}. It has: {', '.join(sorted(present))}.")
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
    try:
        with warnings.catch_warnings():
            # Of TensorFlow's own calibration, about its own interpreter.
            warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated", UserWarning)
            return bytes(converter.convert())
    except Exception as error:
        raise ConversionError(_why(str(error), dtype)) from error


def flex_interpreter(**arguments: Any) -> Any:
    """TensorFlow's own interpreter, which older versions build with the Flex delegate; LiteRT's package has none."""
    with warnings.catch_warnings():
        # Deprecated for ai-edge-litert.
        warnings.simplefilter("ignore")
        return tf.lite.Interpreter(**arguments)


def _why(message: str, dtype: str) -> str:
    missing = sorted(
        {
            name
            for names in re.findall(r"(?:Select|Custom) ops: ([\w, ]+)", message)
            for name in re.split(r"[,\s]+", names)
            if name
        }
    )
    if missing:
        return (
            f"TF-Lite has no operator {', '.join(missing)}. Replace the layers that use it; or pass flex=True, which "
            "keeps TensorFlow's own: such a file runs only in a runtime that was built with the Flex delegate."
        )
    if "tensor list" in message.lower() or "TensorListReserve" in message:
        return "A recurrent layer needs a batch of fixed size in TF-Lite. Pass batch_size=1, or the size that you need."
    first = next((line.strip() for line in message.splitlines() if "error:" in line), message.strip()[:500])
    hint = " An operator of the model may have no int8 kernel: try dtype='dynamic_int8'." if dtype == "int8" else ""
    return f"TensorFlow's converter failed: {first}{hint}"
