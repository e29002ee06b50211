"""A Keras 3 model <-> a `tf_keras` model: the same layers and connections, the same weights and outputs.

Needs `tf_keras`, of the extra `[tfmot]`. Single layers are `legacy_layers.py`'s.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.layers import Masked, strip
from tf_prune.legacy_layers import UnsupportedError, counterpart, label
from tf_prune.prunable import check_model

try:
    import tf_keras as tf_keras
except ImportError as _error:
    raise ImportError(
        "tf_prune.tfmot needs tf_keras, which is not installed. Install it with: pip install 'tf_prune[tfmot]'"
    ) from _error

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Subtract": operator.sub,
    "Multiply": operator.mul,
    "Divide": operator.truediv,
    "TrueDivide": operator.truediv,
}
_LEGACY_OPERATORS = {
    "__operators__.add": "Add",
    "math.add": "Add",
    "math.subtract": "Subtract",
    "math.multiply": "Multiply",
    "math.truediv": "Divide",
    "math.divide": "Divide",
}


def to_tf_keras(model: keras.Model, *, flat: bool = False) -> Any:
    """A `tf_keras` model of the same weights and outputs, for what takes only those; pruned weights are exactly 0.

    The masks are not attached: nothing but `quantize_aware`, tfmot's own prune-preserving quantization, or pruning anew
    with tfmot keeps the zeros when the model is trained. The model that is given is not changed; the new one is not
    compiled.

    Args:
        model: A built Sequential or functional `keras.Model`, also with such models or `Masked` layers inside.
        flat: Whether the layers of models inside the model become its own.

    Returns:
        A `tf_keras.Model` with the same names of layers.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If a layer has no counterpart in `tf_keras`; all of them are named.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="logits")])
    >>> to_tf_keras(model).get_layer("logits").kernel.shape
    TensorShape([2, 2])
    """
    check_model(model)
    if any(isinstance(layer, Masked) for layer in model._flatten_layers()):
        model = strip(model)
    return rebuild(model, tf_keras, flat=flat)[0]


def rebuild(
    model: Any, to: Any, *, flat: bool = False, unwrapped: Callable[[Any], Any] = lambda layer: layer
) -> tuple[Any, list[tuple[Any, Any]]]:
    """The model in the other Keras, with its weights.

    Args:
        model: A built Sequential or functional model, also with such models inside; it is not changed.
        to: The Keras to build in: the module `keras` or `tf_keras`.
        flat: Whether models inside the model are taken apart.
        unwrapped: Takes a layer; returns it, or the layer inside that stands for it.

    Returns:
        The new model, not compiled; and each weight of the old one with the weight that it became.

    Raises:
        ValueError: If a layer has no counterpart; all of them are named.
    """
    bridge = _Bridge(to, flat, unwrapped)
    new = bridge.model(model)
    return new, bridge.copy_weights()


class _Bridge:
    """One model, rebuilt in the other Keras; the arguments are those of `rebuild`."""

    def __init__(self, to: Any, flat: bool, unwrapped: Callable[[Any], Any]):
        self.to, self.flat, self.unwrapped = to, flat, unwrapped
        self.source, self.title = (tf_keras, "Keras 3") if to is keras else (keras, "tf_keras")
        self.made: dict[int, Any] = {}  # by the id of the layer that it was made from: a shared layer stays one
        self.pairs: list[tuple[Any, Any]] = []  # layers without layers inside, for their weights
        self.problems: dict[str, str] = {}
        self.names: set[str] = set()

    def model(self, model: Any) -> Any:
        """The model, built anew, with the weights that it was initialized with."""
        self._make_layers(model)
        if self.problems:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in self.problems.items())
            raise ValueError(
                f"{model.name!r} cannot be brought to {self.title}. Without a counterpart there:\n{lines}\n"
                "Replace these layers, or build the model there by hand and copy its weights."
            )
        return self._rebuilt(model)

    def copy_weights(self) -> list[tuple[Any, Any]]:
        """Copies them into the new model; returns each with the one that it became."""
        copied = []
        for old, new in self.pairs:
            weights, variables = _weights(old), _weights(new)
            shapes = [[tuple(weight.shape) for weight in one] for one in (weights, variables)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The layer {label(old)} has weights of the shapes {shapes[0]}, but built in {self.title} it "
                    f"has {shapes[1]}. Is the model built, and all of it used?"
                )
            for weight, variable in zip(weights, variables, strict=True):
                variable.assign(np.asarray(weight) + 0)  # what is pruned in tf_prune is -0.0
                copied.append((weight, variable))
            if not old.trainable:
                for part in new._flatten_layers():
                    part.trainable = False  # Keras 3 makes those inside as if it were trainable
            if hasattr(new, "finalize_state"):
                new.finalize_state()  # Normalization derives from its weights what it computes with
        return copied

    def _make_layers(self, model: Any) -> None:
        """Makes each layer, not built yet, and notes all that cannot be made."""
        names, library = ("Sequential", "Functional"), f"{self.source.__name__}."
        if not (type(model).__name__ in names and type(model).__module__.startswith(library)):
            self.problems[label(model)] = "a class of its own, which does not say how its layers are connected"
        elif not model.inputs:
            self.problems[label(model)] = "not built yet: call it once on a batch"
        elif _is_sequential(model):
            for layer in model.layers:
                self._make(layer)
        else:
            for layer, _, kwargs, _ in _calls(model):
                self._make(layer)
                if kwargs.get("training") is True:
                    self.problems[label(layer)] = "called with training=True, which holds in tf_keras only"

    def _make(self, layer: Any) -> Any:
        """The layer's counterpart; `None` for a model, whose turn comes when it is called, and for an operator."""
        if id(layer) in self.made:
            return self.made[id(layer)]
        self.made[id(layer)] = None
        inner = self.unwrapped(layer)
        if isinstance(inner, self.source.Model):
            self._make_layers(inner)
        elif _operator(inner) is None:
            try:
                self.made[id(layer)] = self._new(inner)
            except UnsupportedError as error:
                self.problems[label(inner)] = str(error)
        return self.made[id(layer)]

    def _new(self, layer: Any) -> Any:
        inside = self._inside(layer)
        new = counterpart(layer, self.source, self.to, **inside, name=self._name(layer.name))
        if not isinstance(layer, self.source.layers.TimeDistributed):
            self.pairs.append((layer, new))
        return new

    def _name(self, name: str) -> str:
        """The same, unless models that are taken apart have it twice, or Keras 3 does not allow it."""
        name = name.replace("/", "_")
        while self.flat and name in self.names:
            name += "_1"
        self.names.add(name)
        return name

    def _inside(self, layer: Any) -> dict[str, Any]:
        """What wraps another layer takes it as an object."""
        if type(layer) is self.source.layers.TimeDistributed:
            self._make(layer.layer)
            if self.problems:
                raise UnsupportedError("what it wraps, or a layer before it, has none")
            return {"layer": self._counterpart(layer.layer)}
        if type(layer) is not self.source.layers.Bidirectional:
            return {}
        # The wrapper makes its own of these two.
        parts = {"layer": (layer.forward_layer, "forward_"), "backward_layer": (layer.backward_layer, "backward_")}
        return {
            key: counterpart(
                part, self.source, self.to, name=part.name.removeprefix(prefix), zero_output_for_mask=False
            )
            for key, (part, prefix) in parts.items()
        }

    def _rebuilt(self, model: Any) -> Any:
        """The model of the layers that were made."""
        name = model.name.replace("/", "_")
        if not _is_sequential(model):
            inputs = tf.nest.map_structure(self._input, model.input)
            return self.to.Model(inputs, self._outputs(model, tf.nest.flatten(inputs)), name=name)
        first = self._input(model.inputs[0])
        if self.flat and any(isinstance(layer, self.source.Model) for layer in model.layers):
            return self.to.Model(first, self._taken_apart(model, first), name=name)
        return self.to.Sequential([first, *map(self._counterpart, model.layers)], name=name)

    def _counterpart(self, layer: Any) -> Any:
        if self.made[id(layer)] is None:
            self.made[id(layer)] = self._rebuilt(layer)
        return self.made[id(layer)]

    def _input(self, tensor: Any) -> Any:
        """A batch's size stays only where a layer keeps a state for each example."""
        is_stateful = any(getattr(layer, "stateful", False) for layer, _ in self.pairs)
        shape = (tensor.shape[0] if is_stateful else None, *tensor.shape[1:])
        dtype = getattr(tensor.dtype, "name", tensor.dtype)
        return self.to.Input(batch_shape=shape, dtype=dtype, name=self._name(_origin(tensor).name))

    def _outputs(self, model: Any, inputs: Sequence[Any]) -> Any:
        """Calls the new layers on each other as the old ones were."""
        tensors = dict(zip(map(id, model.inputs), inputs, strict=True))
        for layer, args, kwargs, outputs in _calls(model):
            args, kwargs = tf.nest.map_structure(lambda value: tensors.get(id(value), value), (args, kwargs))
            results = self._called(layer, list(args), kwargs)
            tensors.update(zip(map(id, outputs), tf.nest.flatten(results), strict=True))
        return tf.nest.map_structure(lambda tensor: tensors[id(tensor)], model.output)

    def _called(self, layer: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        name = _operator(layer)
        if name is not None:
            return self._operated(name, layer.name, [*args, *kwargs.values()])
        if self.flat and isinstance(layer, self.source.Model):
            return self._taken_apart(layer, args[0])
        if self.to is keras and args and isinstance(args[0], (list, tuple)) and _has_state(layer):
            kwargs = {**kwargs, "initial_state": list(args[0][1:])}  # tf_keras makes one list of both
            args = [args[0][0]]
        return self._counterpart(layer)(*args, **kwargs)

    def _taken_apart(self, model: Any, inputs: Any) -> Any:
        """What it computes, by its layers."""
        if not _is_sequential(model):
            return self._outputs(model, tf.nest.flatten(inputs))
        for layer in model.layers:
            inputs = self._called(layer, [inputs], {})
        return inputs

    def _operated(self, name: str, as_layer: str, operands: Sequence[Any]) -> Any:
        """`a + b` as the layer of that name where both are tensors of one shape, as in a shortcut."""
        left, right = operands
        if hasattr(self.to.layers, name) and getattr(left, "shape", 0) == getattr(right, "shape", 1):
            return getattr(self.to.layers, name)(name=self._name(as_layer))([left, right])
        result = _OPERATORS[name](left, right)
        if self.to is keras:
            _origin(result).name = self._name(as_layer)  # Keras's own can be that of another layer
        return result


def _is_sequential(model: Any) -> bool:
    return isinstance(model, (keras.Sequential, tf_keras.Sequential))


def _has_state(layer: Any) -> bool:
    return isinstance(getattr(layer, "layer", layer), tf_keras.layers.RNN)


def _weights(layer: Any) -> list[Any]:
    """In one order for both: the property of tf_keras moves those of frozen layers inside to the end."""
    if isinstance(layer, keras.Layer):
        return list(layer.weights)
    return [
        weight for part in layer._flatten_layers() for weight in part._trainable_weights + part._non_trainable_weights
    ]


def _origin(tensor: Any) -> Any:
    """The layer whose output this is."""
    return tensor._keras_history[0]


def _operator(layer: Any) -> str | None:
    """Which operator of Python this operation stands for, if it is one."""
    if isinstance(layer, tf_keras.layers.Layer):
        is_operator = type(layer).__name__ == "TFOpLambda"
        return _LEGACY_OPERATORS.get(layer.get_config()["function"]) if is_operator else None
    name = type(layer).__name__
    return name if not isinstance(layer, keras.Layer) and name in _OPERATORS else None


_Call = tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]


def _calls(model: Any) -> list[_Call]:
    """Each call of a layer that the outputs need, in order: the layer, its arguments, and the tensors that it gave."""
    calls: list[_Call] = []
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if node.is_input:
                continue
            if isinstance(model, keras.Model):
                calls.append((node.operation, node.arguments.args, _given(node.arguments), node.outputs))
            else:
                kwargs = {key: value for key, value in node.call_kwargs.items() if value is not None}
                calls.append((node.layer, node.call_args, kwargs, tf.nest.flatten(node.outputs)))
    needed = set(map(id, tf.nest.flatten(model.output)))
    kept = []
    for call in reversed(calls):
        if any(id(tensor) in needed for tensor in call[3]):
            needed.update(map(id, tf.nest.flatten(call[1:3])))
            kept.append(call)
    return kept[::-1]


def _given(arguments: Any) -> dict[str, Any]:
    """What the user gave by name, but for what Keras 3 sets and tf_keras finds out.

    Those are the masks of time steps, and `training`, instead of which that of the whole model's call counts.
    """
    automatic = {id(getattr(tensor, "_keras_mask", None)) for tensor in arguments.keras_tensors} | {id(None)}
    return {
        key: value
        for key, value in arguments.kwargs.items()
        if key != "training" and not all(id(leaf) in automatic for leaf in tf.nest.flatten(value))
    }
