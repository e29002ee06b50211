"""Keeps a model still while it is scored: the same scores each time, and nothing of the model changes."""

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras

# Operations of TensorFlow that cannot be repeated, or that change something behind Keras's back.
_RANDOM = re.compile(r"Random|Rng|Stateful.*(Uniform|Normal|Binomial)|.*TruncatedNormal$|Multinomial|(Eager)?PyFunc")
_WRITING = re.compile(r"Assign(Add|Sub)?VariableOp|Resource(Scatter|StridedSliceAssign)|LookupTable(Insert|Import)")

# Layers that prepare data, those that augment it among them; Keras does not name the class.
_DATA_LAYER = keras.layers.Rescaling.__base__


@contextlib.contextmanager
def noise_off(model: keras.Model) -> Iterator[None]:
    """Turns dropout, noise and augmentation off while a function is traced; batch normalization stays as asked.

    Noise that a layer of one's own draws beside other work, from a seed of Keras, stays on: it is the same each time.
    """
    rates, calls = [], []
    try:
        for layer in model._flatten_layers():
            for name in ("rate", "stddev", "dropout", "recurrent_dropout"):
                value = getattr(layer, name, None)
                if isinstance(value, (int, float)) and value > 0 and hasattr(layer, "seed_generator"):
                    rates.append((layer, name, value))
                    setattr(layer, name, 0.0)
            if _is_noise(layer):
                calls.append((layer, layer.__dict__.get("call")))
                object.__setattr__(layer, "call", _as_in_inference(layer))
        yield
    finally:
        for layer, name, value in rates:
            setattr(layer, name, value)
        for layer, own in calls:
            object.__delattr__(layer, "call") if own is None else object.__setattr__(layer, "call", own)


def _is_noise(layer: keras.Layer) -> bool:
    """Whether all that training changes in what it computes is noise: seeded, without weights and layers inside."""
    is_noise = isinstance(layer, _DATA_LAYER) or (
        any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
        and not layer.weights
        and not any(True for _ in layer._flatten_layers(include_self=False))
    )
    return is_noise and "training" in inspect.signature(layer.call).parameters


def _as_in_inference(layer: keras.Layer) -> Callable[..., Any]:
    if isinstance(layer, keras.layers.RandomCrop):  # in inference it gives images of another size than it promised
        middle = keras.layers.CenterCrop(layer.height, layer.width, data_format=layer.data_format, dtype=layer.dtype)
        return lambda data, training=True: middle.call(data)
    call, signature = layer.call, inspect.signature(layer.call)

    @functools.wraps(call)
    def without_training(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["training"] = False
        return call(*bound.args, **bound.kwargs)

    return without_training


def check_no_state(model: keras.Model) -> None:
    """Raises if a layer carries a state from one batch to the next.

    Raises:
        ValueError: That names the layer.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            raise ValueError(
                f"The layer {layer.name!r} is stateful: what it gives depends on the batches before, so its scores "
                "would too. Set stateful = False on it while scoring."
            )


def why_not_repeatable(graph: Any) -> str | None:
    """Says so if a traced function draws random numbers without a seed of Keras, or writes a variable.

    Args:
        graph: The graph, while the function is traced or after. An operation's name has that of its layer.
    """
    definition = graph.as_graph_def()
    nodes = itertools.chain(definition.node, *(function.node_def for function in definition.library.function))
    for node in nodes:
        if _RANDOM.match(node.op) and not node.op.startswith("Stateless"):
            return (
                f"A layer draws random numbers that cannot be drawn again ({node.op} in {node.name!r}), so scores "
                "would differ from call to call. Draw them with keras.random and a keras.random.SeedGenerator, or "
                "switch the layer off while scoring."
            )
        if _WRITING.match(node.op):
            return (
                f"A layer writes a variable while it is called ({node.op} in {node.name!r}), and scoring must leave "
                "the model as it was. Make it a keras.Variable: scoring then sets its changes aside."
            )
    return None
