"""Lets a model compute in float64 or float32, whatever it trains in, while it is called or traced."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras

# What enters a loop or a call leaves it again among its outputs, weights too.
_CONTAINERS = re.compile("(Stateless)?(While|If)|(Stateful)?PartitionedCall")


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
    # Not by the layers' property: of a `DTypePolicyMap`, which many layers share, it changes the entries.
    policies = [layer._dtype_policy for layer in layers]
    # What Keras casts a model's inputs to.
    inputs = [layer for layer in everything if isinstance(layer, keras.layers.InputLayer)]
    for part in everything:
        inputs += (getattr(part, "inputs", None) or []) if isinstance(part, keras.Model) else []
    types = [one.dtype for one in inputs]
    default, floatx = keras.config.dtype_policy(), keras.config.floatx()
    try:
        keras.config.set_dtype_policy(dtype)  # of layers that are made in a call
        keras.config.set_floatx(dtype)  # of constants
        for layer in layers:
            layer._dtype_policy = _Casting(dtype)
        for one in inputs:
            if keras.backend.is_float_dtype(one.dtype):
                one._dtype = dtype
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(default)
        for layer, policy in zip(layers, policies, strict=True):
            layer._dtype_policy = policy
        for one, own in zip(inputs, types, strict=True):
            one._dtype = own


def _computes_in_floats(layer: keras.Layer) -> bool:
    return not layer.quantization_mode and keras.backend.is_float_dtype(layer.compute_dtype)


def first_below_float64(graph: Any, sources: list[Any]) -> Any:
    """The first operation of TensorFlow on the way from the sources that computes in less than float64, or `None`."""
    reached = {tensor.name for tensor in sources}
    for operation in graph.get_operations():
        if any(tensor.name in reached for tensor in operation.inputs):
            floats = [tensor for tensor in operation.outputs if tensor.dtype.is_floating]
            if any(tensor.dtype != "float64" for tensor in floats) and not _CONTAINERS.fullmatch(operation.type):
                return operation
            reached.update(tensor.name for tensor in floats if tensor.dtype == "float64")
    return None
