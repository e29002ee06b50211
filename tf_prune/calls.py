"""What enters and leaves the layers of a model while it is called. A tape that is told of it can derive by it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tf_prune.prunable import Include, find_kernels


@dataclasses.dataclass
class Call:
    """One call of a layer while the model is traced: all that is not an integer of what enters and leaves it."""

    layer: keras.Layer
    inputs: list[Any]
    outputs: list[Any]


def layer_called(model: keras.Model, name: str) -> keras.Layer:
    """The one layer of this name, the outer one if a wrapper and what it wraps share it."""
    everything = list(model._flatten_layers(include_self=False))
    inside = [getattr(layer, "layer", None) for layer in everything]
    found = [layer for layer in everything if layer.name == name]
    found = [layer for layer in found if len(found) == 1 or not any(layer is one for one in inside)]  # the outer ones
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(layer.name for layer in everything))
        raise ValueError(
            f"The model {model.name!r} has {len(found) or 'no'} layers called {name!r}. Start and end name one of: "
            f"{names}."
        )
    return found[0]


def layers_with_kernels(model: keras.Model, include: Include = ()) -> Iterator[keras.Layer]:
    """The layers that have kernels; models inside are opened, other composite layers are not."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_with_kernels(layer, include)
        elif find_kernels(layer, include):
            yield layer


def only_call(calls: list[Call], layer: keras.Layer) -> Call:
    """The one call of this layer."""
    found = [call for call in calls if call.layer is layer]
    if len(found) != 1:
        raise ValueError(
            f"The layer {layer.name!r} is called {len(found)} times when the model is called, so it has "
            f"{'no output' if not found else 'several outputs'}. Name a layer that is called once, outside of loops."
        )
    return found[0]


def floats(*values: Any) -> list[Any]:
    """The tensors among these that can be derived, each once."""
    leaves = [
        leaf
        for leaf in keras.tree.flatten(values)
        if keras.ops.is_tensor(leaf) and keras.backend.is_float_dtype(leaf.dtype)
    ]
    return list({id(leaf): leaf for leaf in leaves}.values())


def on_logits(tensors: list[Any]) -> list[Any]:
    """What entered a softmax or sigmoid in the place of what left it."""
    return [getattr(tensor, "_keras_logits", tensor) for tensor in tensors]


@contextlib.contextmanager
def watched(layers: list[keras.Layer], tape: Any, calls: list[Call]) -> Iterator[None]:
    """Notes what enters and leaves these layers while a function is traced, and makes it known to the tape."""

    def watching(layer: keras.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched_call(*args: Any, **kwargs: Any) -> Any:
            inputs = floats(args, kwargs)
            tape.watch(inputs)
            outputs = call(*args, **kwargs)
            tape.watch(floats(outputs))
            calls.append(Call(layer, inputs, floats(outputs)))
            return outputs

        return watched_call

    own = [layer.__dict__.get("call") for layer in layers]
    try:
        for layer in layers:
            object.__setattr__(layer, "call", watching(layer, layer.call))
        yield
    finally:
        for layer, call in zip(layers, own, strict=True):
            object.__delattr__(layer, "call") if call is None else object.__setattr__(layer, "call", call)
