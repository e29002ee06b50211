"""Lets a model compute in float64 or float32, whatever it trains in, while it is called or traced."""

import contextlib
from collections.abc import Iterator

import keras


class _Casting(keras.DTypePolicy):
    """Computes in a type with variables that are of another one, which makes a layer cast them."""

    @property
    def variable_dtype(self) -> str:
        return "float32" if self.compute_dtype == "float64" else "float64"


def computing_in_float64(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """`computing_in` for float64."""
    return computing_in(model, "float64")


@contextlib.contextmanager
def computing_in(model: keras.Model, dtype: str) -> Iterator[None]:
    """While it is called or traced: layers cast weights and inputs to this type of floats; no variable changes.

    Layers that compute in integers or strings stay, and so do models' inputs that are.
    """
    everything = list(model._flatten_layers())
    layers = [layer for layer in everything if _computes_in_floats(layer)]
    policies = [layer.dtype_policy for layer in layers]
    # What Keras casts a model's inputs to.
    inputs = [layer for layer in everything if isinstance(layer, keras.layers.InputLayer)]
    for part in everything:
        inputs += (getattr(part, "inputs", None) or []) if isinstance(part, keras.Model) else []
    types = [one.dtype for one in inputs]
    default = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(dtype)  # of layers that are made in a call
        for layer in layers:
            layer.dtype_policy = _Casting(dtype)
        for one in inputs:
            if keras.backend.is_float_dtype(one.dtype):
                one._dtype = dtype
        yield
    finally:
        keras.config.set_dtype_policy(default)
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy
        for one, own in zip(inputs, types, strict=True):
            one._dtype = own


def _computes_in_floats(layer: keras.Layer) -> bool:
    policy = layer.dtype_policy
    return not policy.quantization_mode and keras.backend.is_float_dtype(policy.compute_dtype)
