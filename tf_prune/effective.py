"""What a layer really multiplies by where it holds a kernel: with LoRA's product, unpacked where it is quantized."""

import keras
import numpy as np


def multiplied(layer: keras.Layer | None, variable: keras.Variable) -> np.ndarray:
    """The weights as the layer uses them, of the kernel's own shape.

    Integers of a quantized kernel stay integers, but for their zero point: what is 0 here is 0 in the layer.
    """
    name = variable.name
    if layer is None or getattr(layer, f"_{name}", None) is not variable or not hasattr(type(layer), name):
        return np.asarray(variable)
    weights = np.asarray(getattr(layer, name))
    offset, groups = getattr(layer, "kernel_zero", None), getattr(layer, "g_idx", None)
    if layer.quantization_mode == "int4" and offset is not None and groups is not None and weights.ndim == 2:
        offset = np.asarray(offset).astype(np.int16)
        weights = weights.astype(np.int16) - offset[np.asarray(groups).astype(int)]
    return weights


def is_quantized_kernel(layer: keras.Layer | None, variable: keras.Variable) -> bool:
    """Whether `quantize` made it integers whose zeros are still those of the kernel."""
    mode = getattr(layer, "quantization_mode", None)
    own = layer is not None and getattr(layer, f"_{variable.name}", None) is variable
    return mode in ("int8", "int4") and own and not keras.backend.is_float_dtype(variable.dtype)


def check_not_quantized(model: keras.Model, what: str, instead: str) -> None:
    """Raises if `model.quantize` has made layers compute in integers or float8.

    Args:
        model: A built `keras.Model`.
        what: What cannot be done with those.
        instead: What to do.

    Raises:
        ValueError: That names the layers and their modes.
    """
    modes = {
        one.name: one.quantization_mode for one in model._flatten_layers() if getattr(one, "quantization_mode", None)
    }
    if modes:
        names = ", ".join(f"{name} ({mode})" for name, mode in list(modes.items())[:4])
        more = f" and {len(modes) - 4} more" if len(modes) > 4 else ""
        raise ValueError(f"model.quantize has quantized layers of {model.name!r}: {names}{more}. {what}. {instead}")
