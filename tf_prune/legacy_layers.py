"""One layer of either Keras -> its counterpart in the other, made from its configuration.

Between Keras 3 and `tf_keras`; the models that these layers make up are `legacy_keras.py`'s.
"""

import contextlib
import inspect
from typing import Any

import numpy as np

# By the name that they have in both: these compute the same from the same weights.
# fmt: off
LAYERS = frozenset((
    "Dense", "EinsumDense", "Embedding", "Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose",
    "Conv3DTranspose", "DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D", "LSTM",
    "GRU", "SimpleRNN", "Bidirectional", "TimeDistributed", "MultiHeadAttention", "Attention",
    "AdditiveAttention", "BatchNormalization", "LayerNormalization", "GroupNormalization",
    "UnitNormalization", "Normalization", "Rescaling", "MaxPooling1D", "MaxPooling2D", "MaxPooling3D",
    "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "GlobalMaxPooling1D", "GlobalMaxPooling2D",
    "GlobalMaxPooling3D", "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D",
    "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Cropping1D", "Cropping2D", "Cropping3D",
    "UpSampling1D", "UpSampling2D", "UpSampling3D", "Flatten", "Reshape", "Permute", "RepeatVector",
    "Identity", "Masking", "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "Dropout",
    "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "GaussianNoise",
    "AlphaDropout", "ActivityRegularization", "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum",
    "Concatenate", "Dot",
))
# fmt: on
# Not `hard_sigmoid`, which is another function in Keras 3.
_ACTIVATIONS = (
    *("elu", "exponential", "gelu", "leaky_relu", "linear", "mish", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softmax", "softplus", "softsign", "swish", "tanh"),
)
_RENAMED = {("LeakyReLU", "alpha"): "negative_slope", ("LeakyReLU", "negative_slope"): "alpha"}
# Of a layer's configuration, what says nothing about the function that it computes.
# fmt: off
_WITHOUT_EFFECT = frozenset((
    "batch_input_shape", "batch_shape", "input_length", "implementation", "use_cudnn", "flash_attention",
    "seed", "sparse", "query_shape", "key_shape", "value_shape",
))
# fmt: on
_DEFAULT = object()  # an argument that is left out


class UnsupportedError(ValueError):
    """Says why a layer has no counterpart."""


def counterpart(layer: Any, source: Any, to: Any, /, **options: Any) -> Any:
    """The layer in the other Keras, which computes the same from the same weights; not built yet.

    Args:
        layer: Any layer.
        source: The Keras that it is of: the module `keras` or `tf_keras`.
        to: The other one.
        **options: Arguments of the new layer that are not as its configuration says.

    Raises:
        UnsupportedError: If there is none.
    """
    name = type(layer).__name__
    if name not in LAYERS or type(layer) is not getattr(source.layers, name, None):
        raise UnsupportedError(f"of the class {kind(layer)}")
    cls = getattr(to.layers, name)
    accepted, defaults = _arguments(cls), _arguments(type(layer))
    made: dict[str, Any] = {"name": layer.name, "dtype": _policy(layer), **options}
    for key, value in layer.get_config().items():
        target = _RENAMED.get((name, key), key)
        if target in made or key in _WITHOUT_EFFECT:
            continue
        if target in accepted or key == "zero_output_for_mask":
            value = _argument(key, value, to)
            if value is not _DEFAULT:
                made[target] = value
        elif not _is_usual(key, value, defaults):
            raise UnsupportedError(f"{key}={value!r} has no counterpart")
    try:
        return cls(**made)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(str(error).splitlines()[0]) from error


def _argument(key: str, value: Any, to: Any) -> Any:
    """A value of a layer's configuration, as the other Keras takes it."""
    if key.endswith("initializer"):
        with contextlib.suppress(UnsupportedError):  # the weights are copied: what drew them matters no more
            return _object(key, value, to.initializers)
        return _DEFAULT
    if key.endswith("regularizer"):
        return _object(key, value, to.regularizers)
    if key.endswith("constraint"):
        return _object(key, value, to.constraints)
    if key.endswith("activation") and value is not None:
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise UnsupportedError(f"{key}={value!r} is not one of {', '.join(_ACTIVATIONS)}")
        return "swish" if value == "silu" else value  # two names of one function, of which tf_keras has one
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        return value.item()
    if isinstance(value, (list, tuple)):
        return value[0] if key == "axis" and len(value) == 1 else tuple(value)
    return value


def _object(key: str, value: Any, module: Any) -> Any:
    """An initializer, regularizer or constraint."""
    if value is None or isinstance(value, str):
        return value
    cls = getattr(module, value["class_name"], None) if value.get("registered_name") is None else None
    if cls is None:
        raise UnsupportedError(f"{key}={value['class_name']!r} has no counterpart")
    arguments = _arguments(cls)
    config = {name: one for name, one in value["config"].items() if name in arguments}
    if not isinstance(config.get("seed"), (int, type(None))):
        del config["seed"]
    return cls(**config)


def kind(thing: Any) -> str:
    """Its class, in full."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def label(layer: Any) -> str:
    """Its name and class, for a message."""
    return f"{layer.name} ({type(layer).__name__})"


def _policy(layer: Any) -> str:
    """The name of the layer's dtype policy."""
    name = str(layer.dtype_policy.name)
    if "_from_" in name or "float8" in name:
        raise UnsupportedError(f"quantized ({name})")
    return name


def _arguments(cls: type) -> dict[str, Any]:
    """What a constructor takes, and hands on to the classes above it, with the defaults."""
    arguments: dict[str, Any] = {}
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                arguments.setdefault(parameter.name, parameter.default)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return arguments


def _is_usual(key: str, value: Any, defaults: dict[str, Any]) -> bool:
    """Whether leaving this argument out changes nothing."""
    # Only layers without weights do not take `trainable`.
    if key.endswith("initializer") or key == "trainable" or (key, value) == ("data_format", "channels_last"):
        return True
    return bool(value == defaults[key]) if key in defaults else not value
