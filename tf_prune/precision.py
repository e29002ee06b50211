"""Lets a model compute in float64, whatever it trains in, while a function is traced."""

import contextlib
from collections.abc import Iterator

import keras


class _Float64(keras.DTypePolicy):
    """Computes in float64 with variables that are of another type, which makes a layer cast them."""

    variable_dtype = "float32"


@contextlib.contextmanager
def computing_in_float64(model: keras.Model) -> Iterator[None]:
    """While a function is traced: layers cast weights and inputs to float64, models no inputs; no variable changes."""
    everything = list(model._flatten_layers())
    layers = [layer for layer in everything if not layer.dtype_policy.quantization_mode]
    policies = [layer.dtype_policy for layer in layers]
    # What Keras casts a model's inputs to.
    inputs = [layer for layer in everything if isinstance(layer, keras.layers.InputLayer)]
    for part in everything:
        inputs += (getattr(part, "inputs", None) or []) if isinstance(part, keras.Model) else []
    types = [one.dtype for one in inputs]
    default = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("float64")  # of layers that are made in a call
        for layer in layers:
            layer.dtype_policy = _Float64("float64")
        for one in inputs:
            if keras.backend.is_float_dtype(one.dtype):
                one._dtype = "float64"
        yield
    finally:
        keras.config.set_dtype_policy(default)
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy
        for one, dtype in zip(inputs, types, strict=True):
            one._dtype = dtype
