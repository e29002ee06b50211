"""The bridge to TensorFlow's own pruning toolkit (tfmot), and to the legacy `tf_keras` models that it takes.

Needs the extra `[tfmot]`, and is imported by itself: `import tf_prune.tfmot`. Neither that nor any function here
changes which Keras the rest of the process uses, what `tf.keras` is, or the environment. A plain
`import tensorflow_model_optimization` does, unless `import_tfmot` was called before it.
"""

import contextlib
import importlib
import inspect
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.enforcement import apply_masks, masks_of
from tf_prune.layers import Masked, strip
from tf_prune.masks import Masks
from tf_prune.prunable import check_model, find_kernels, weights_by_path

_INSTALL = "pip install 'tf_prune[tfmot]'"

try:
    import tf_keras
except ImportError as _error:
    raise ImportError(f"tf_prune.tfmot needs tf_keras, which is not installed. Install it with: {_INSTALL}") from _error

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
_RENAMED = {("LeakyReLU", "alpha"): "negative_slope", ("LeakyReLU", "negative_slope"): "alpha"}
# Of a layer's configuration, what says nothing about the function that it computes.
# fmt: off
_WITHOUT_EFFECT = frozenset((
    "batch_input_shape", "batch_shape", "input_length", "implementation", "use_cudnn", "flash_attention",
    "seed", "sparse", "query_shape", "key_shape", "value_shape",
))
# fmt: on
# tfmot takes these apart, or folds them into the convolution before them.
_FOLDED = ("BatchNormalization", "SeparableConv1D", "SeparableConv2D")
_QUANTIZED_ACTIVATIONS = ("gelu", "linear", "relu", "sigmoid", "softmax", "swish", "tanh")


def import_tfmot() -> Any:
    """Imports TensorFlow's toolkit, and undoes what its import does to the process.

    Its import sets `TF_USE_LEGACY_KERAS` in the environment, from where child processes inherit it, and with it makes
    `tf.keras` the legacy one if nothing has used `tf.keras` before. After this function both are as they were, and a
    later `import tensorflow_model_optimization` gives the same module and changes nothing.

    Returns:
        The module `tensorflow_model_optimization`.

    Raises:
        ImportError: If it is not installed.

    >>> import_tfmot().sparsity.keras.prune_low_magnitude.__name__, "TF_USE_LEGACY_KERAS" in os.environ
    ('prune_low_magnitude', False)
    """
    name = "tensorflow_model_optimization"
    if sys.modules.get(name):
        return sys.modules[name]
    with _legacy_keras(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"TensorFlow's toolkit cannot be imported ({error}). Install it with: {_INSTALL}"
            ) from error


@contextlib.contextmanager
def _legacy_keras() -> Iterator[None]:
    """Puts `tf_keras` where tfmot looks for its Keras while it is imported, and afterwards everything back.

    In these places TensorFlow has loaders that read the environment when they are first used, and then never again.
    """
    places = (tf, tf.compat.v1, tf.compat.v2)
    loaders = [place.keras for place in places]
    environment = os.environ.get("TF_USE_LEGACY_KERAS")
    try:
        for place in places:
            place.keras = tf_keras
        yield
    finally:
        for place, loader in zip(places, loaders, strict=True):
            place.keras = loader
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
        if environment is not None:
            os.environ["TF_USE_LEGACY_KERAS"] = environment


def from_tfmot(model: Any) -> tuple[keras.Model, Masks]:
    """A Keras 3 model of the same weights and outputs as one that tfmot pruned, and its masks, which hold from here on.

    The masks are those of tfmot's wrappers, also where a weight that is kept happens to be 0. Of a model without
    wrappers (after `strip_pruning`, or never pruned) they are the kernels' zeros. Layers have the names that they had
    without the wrappers. The model that is given is not changed; the new one is not compiled.

    Args:
        model: A built Sequential or functional `tf_keras.Model`, also with such models inside.

    Returns:
        The model, with the masks attached by `tf_prune.apply_masks`, and the masks.

    Raises:
        TypeError: If `model` is not a `tf_keras.Model`.
        ValueError: If a layer has no counterpart in Keras 3; all of them are named.

    >>> legacy = tf_keras.Sequential([tf_keras.Input((2,)), tf_keras.layers.Dense(2, name="logits")])
    >>> legacy.layers[0].kernel.assign([[0.0, 1.0], [2.0, 3.0]]).shape
    TensorShape([2, 2])
    >>> model, masks = from_tfmot(legacy)
    >>> model.get_layer("logits"), masks.num_kept
    (<Dense name=logits, built=True>, 3)
    """
    if not isinstance(model, tf_keras.Model):
        raise TypeError(
            f"Expected a tf_keras.Model, as TensorFlow's toolkit prunes it; received {_kind(model)}. A Keras 3 model "
            "needs no bridge: tf_prune takes it as it is."
        )
    bridge = _Bridge(keras)
    new = bridge.model(model)
    paths = {id(variable): path for path, variable in weights_by_path(new).items()}
    found = {paths[id(variable)]: mask for variable, mask in bridge.copy_weights()}
    if found:
        masks = Masks({path: found[path] for path in paths.values() if path in found})
    else:
        kernels = find_kernels(new, ("embeddings",))
        plain = masks_of(new, from_zeros=True)
        # A table of embeddings is pruned by default in tfmot, and here only if it is asked for.
        zeros = {path: np.asarray(v) != 0 for path, v in kernels.items()}
        masks = Masks({path: mask for path, mask in zeros.items() if path in plain or not mask.all()})
    apply_masks(new, masks)
    return new, masks


def to_tf_keras(model: keras.Model) -> Any:
    """A `tf_keras` model of the same weights and outputs, for what takes only those; pruned weights are exactly 0.

    The masks are not attached: nothing but `quantize_aware`, tfmot's own prune-preserving quantization, or pruning anew
    with tfmot keeps the zeros when the model is trained. The model that is given is not changed; the new one is not
    compiled.

    Args:
        model: A built Sequential or functional `keras.Model`, also with such models or `Masked` layers inside.

    Returns:
        A `tf_keras.Model` with the same names of layers.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If a layer has no counterpart in `tf_keras`; all of them are named.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="logits")])
    >>> to_tf_keras(model).get_layer("logits").kernel.shape
    TensorShape([2, 2])
    """
    return _to_tf_keras(model, flat=False)


def _to_tf_keras(model: keras.Model, flat: bool) -> Any:
    check_model(model)
    if any(isinstance(layer, Masked) for layer in model._flatten_layers()):
        model = strip(model)
    bridge = _Bridge(tf_keras, flat)
    new = bridge.model(model)
    bridge.copy_weights()
    return new


def quantize_aware(model: keras.Model) -> Any:
    """A `tf_keras` model that trains with the rounding of int8, and in which pruned weights stay 0.

    As `to_tf_keras`, then tfmot's `quantize_annotate_model` and `quantize_apply` with its prune-preserving scheme. That
    scheme lets the weights of depthwise convolutions grow again; here they stay 0 too. Models inside the model become
    part of it, since tfmot takes none. Compile and fit it with `tf_keras` optimizers and losses, then `save_quantized`.

    Args:
        model: A built Sequential or functional `keras.Model`, pruned or not.

    Returns:
        A `tf_keras.Model`, not compiled; its layers' names begin with `quant_`.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If tfmot cannot quantize a layer; all of them are named.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="logits")])
    >>> quantize_aware(model).layers[-1].name
    'quant_logits'
    """
    tfmot = import_tfmot()
    legacy = _to_tf_keras(model, flat=True)
    scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
    registry = scheme.get_quantize_registry()
    reasons = {_label(layer): _why_not_quantized(layer, registry) for layer in legacy.layers}
    refused = "\n".join(f"  {label}: {reason}" for label, reason in reasons.items() if reason)
    advice = (
        "Replace what it names by what it can (Dense, Conv2D, DepthwiseConv2D, a BatchNormalization right after one, "
        "ReLU, ...), or quantize after training: tf_prune.export(model, directory, dtype='int8', data=...)."
    )
    if refused:
        raise ValueError(f"tfmot cannot quantize these layers of {model.name!r}:\n{refused}\n{advice}")
    try:
        annotated = tfmot.quantization.keras.quantize_annotate_model(legacy)
        quantized = tfmot.quantization.keras.quantize_apply(annotated, scheme)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"tfmot cannot quantize {model.name!r}: {str(error).splitlines()[0]}\n{advice}") from error
    for layer in quantized.layers:
        if isinstance(getattr(layer, "layer", None), tf_keras.layers.DepthwiseConv2D):
            for variable in layer.trainable_weights:
                if variable.shape.rank == 4:
                    _keep_zeros(variable)
    return quantized


def _why_not_quantized(layer: Any, registry: Any) -> str | None:
    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    if activation not in _QUANTIZED_ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(_QUANTIZED_ACTIVATIONS)}"
    if isinstance(layer, tf_keras.layers.InputLayer) or type(layer).__name__ in _FOLDED:
        return None
    try:
        registry.get_quantize_config(layer)
    except ValueError:
        return "a class that tfmot does not quantize"
    return None


def _keep_zeros(variable: Any) -> None:
    """As a constraint, which `tf_keras` optimizers apply after each step; there is no public way to add one later."""
    mask, inner = tf.constant(variable.numpy() != 0, variable.dtype), variable.constraint
    variable._constraint = lambda value: (value if inner is None else inner(value)) * mask


def save_quantized(model: Any, directory: str | os.PathLike[str]) -> None:
    """Writes a `tf_keras` model as a SavedModel that TF-Lite converts to int8 with the ranges of its training.

    Its one signature, `serving_default`, takes the model's inputs by their names, for any size of batch, and gives
    `output_0`, ... or the model's own names of outputs. `tf_prune.export(directory, ..., dtype="int8")` makes the
    `.tflite` file.

    Args:
        model: A `tf_keras.Model`: what `quantize_aware` returned, trained.
        directory: Where to write; made if needed.

    Raises:
        TypeError: If `model` is not a `tf_keras.Model`.

    Example:
        save_quantized(quantized, "saved_models/lenet_int8")
    """
    if not isinstance(model, tf_keras.Model):
        raise TypeError(
            f"Expected a tf_keras.Model, such as quantize_aware returns; received {_kind(model)}. A Keras 3 model is "
            "written by tf_prune.export(model, directory)."
        )
    names = [tensor._keras_history.layer.name for tensor in model.inputs]
    if not all(name.isidentifier() for name in names):
        names = [f"input_{i}" for i in range(len(names))]
    specs = [
        tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name)
        for tensor, name in zip(model.inputs, names, strict=True)
    ]

    def serve(*tensors: Any) -> Any:
        outputs = model(tf.nest.pack_sequence_as(model.input, tensors), training=False)
        if isinstance(outputs, dict):
            return dict(outputs)
        return {f"output_{i}": output for i, output in enumerate(tf.nest.flatten(outputs))}

    # Of the model itself TensorFlow would write its optimizer, and each layer's own function, too.
    module = tf.Module()
    module.weights, module.serve = list(model.weights), tf.function(serve, specs)
    tf.saved_model.save(module, os.fspath(directory), signatures={"serving_default": module.serve})


class _Bridge:
    """One model, rebuilt in the other Keras.

    Args:
        to: The Keras to build in: the module `keras` or `tf_keras`.
        flat: Whether models inside the model are taken apart.
    """

    def __init__(self, to: Any, flat: bool = False):
        self.to, self.flat = to, flat
        self.source = tf_keras if to is keras else keras
        self.made: dict[int, Any] = {}  # by the id of the layer that it was made from: a shared layer stays one
        self.pairs: list[tuple[Any, Any]] = []  # layers without layers inside, for their weights
        self.masks: dict[int, np.ndarray] = {}  # of tfmot, by the id of the weight
        self.problems: dict[str, str] = {}
        self.names: set[str] = set()
        self.is_stateful = False

    def model(self, model: Any) -> Any:
        """The model, built anew, with the weights that it was initialized with."""
        self._make_layers(model)
        if self.problems:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in self.problems.items())
            raise ValueError(
                f"{model.name!r} cannot be brought to {_title(self.to)}. Without a counterpart there:\n{lines}\n"
                "Replace these layers, or build the model there by hand and copy its weights."
            )
        return self._rebuilt(model)

    def copy_weights(self) -> list[tuple[Any, np.ndarray]]:
        """Copies them into the new model; returns the new variables that had a mask of tfmot, and the masks."""
        masked = []
        for old, new in self.pairs:
            shapes = [[tuple(weight.shape) for weight in layer.weights] for layer in (old, new)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"The layer {_label(old)} has weights of the shapes {shapes[0]}, but built in {_title(self.to)} it "
                    f"has {shapes[1]}. Is the model built, and all of it used?"
                )
            for weight, variable in zip(old.weights, new.weights, strict=True):
                variable.assign(np.asarray(weight) + 0)  # what is pruned in tf_prune is -0.0
                if id(weight) in self.masks:
                    masked.append((variable, self.masks[id(weight)]))
            if hasattr(new, "finalize_state"):
                new.finalize_state()  # Normalization derives from its weights what it computes with
        return masked

    def _make_layers(self, model: Any) -> None:
        """Makes each layer, not built yet, and notes all that cannot be made."""
        is_plain = type(model).__name__ in ("Sequential", "Functional") and _library(model) == self.source.__name__
        if is_plain and model.inputs:
            for layer in _layers(model):
                self._make(layer)
            return
        why = "a class of its own, which does not say how its layers are connected"
        self.problems[_label(model)] = "not built yet: call it once on a batch" if is_plain else why

    def _make(self, layer: Any) -> Any:
        """The layer's counterpart; `None` for a model, whose turn comes when it is called, and for an operator."""
        if id(layer) in self.made:
            return self.made[id(layer)]
        self.made[id(layer)] = None
        inner = self._unwrapped(layer)
        if isinstance(inner, self.source.Model):
            self._make_layers(inner)
        elif _operator(inner) is None:
            try:
                self.made[id(layer)] = self._new(inner)
            except _UnsupportedError as error:
                self.problems[_label(inner)] = str(error)
        return self.made[id(layer)]

    def _unwrapped(self, layer: Any) -> Any:
        """The layer inside tfmot's wrapper, whose masks are noted."""
        if type(layer).__name__ != "PruneLowMagnitude" or not hasattr(layer, "pruning_vars"):
            return layer
        for weight, mask, _ in layer.pruning_vars:
            self.masks[id(weight)] = mask.numpy() != 0
        return layer.layer

    def _new(self, layer: Any, **options: Any) -> Any:
        """The layer's counterpart, made from its configuration."""
        name = type(layer).__name__
        if name not in LAYERS or type(layer) is not getattr(self.source.layers, name, None):
            raise _UnsupportedError(f"of the class {_kind(layer)}")
        cls = getattr(self.to.layers, name)
        accepted, defaults = _arguments(cls), _arguments(type(layer))
        config = {"name": layer.name, **layer.get_config()}
        made: dict[str, Any] = {"dtype": _policy(layer), **self._inside(layer, config)}
        for key, value in config.items():
            target = _RENAMED.get((name, key), key)
            if target in made or key in _WITHOUT_EFFECT:
                continue
            if target in accepted or key == "zero_output_for_mask":
                value = self._argument(key, value)
                if value is not _DEFAULT:
                    made[target] = value
            elif not _is_usual(key, value, defaults):
                raise _UnsupportedError(f"{key}={value!r} has no counterpart")
        self.is_stateful |= bool(config.get("stateful"))
        try:
            new = cls(**{**made, **options, "name": self._name(options.get("name", layer.name))})
        except (TypeError, ValueError) as error:
            raise _UnsupportedError(str(error).splitlines()[0]) from error
        if name != "TimeDistributed":
            self.pairs.append((layer, new))
        return new

    def _name(self, name: str) -> str:
        """The same, unless models that are taken apart have it twice, or Keras 3 does not allow it."""
        name = name.replace("/", "_") if self.to is keras else name
        while self.flat and name in self.names:
            name += "_1"
        self.names.add(name)
        return name

    def _inside(self, layer: Any, config: dict[str, Any]) -> dict[str, Any]:
        """What wraps another layer takes it as an object."""
        if type(layer).__name__ == "TimeDistributed":
            self._make(layer.layer)
            if self.problems:
                raise _UnsupportedError("what it wraps, or a layer before it, has none")
            return {"layer": self._counterpart(layer.layer)}
        if type(layer).__name__ != "Bidirectional":
            return {}
        config.pop("backward_layer", None)
        pairs = len(self.pairs)
        parts = {
            key: self._new(part, name=part.name.removeprefix(prefix), zero_output_for_mask=False)
            for key, part, prefix in (
                ("layer", layer.forward_layer, "forward_"),
                ("backward_layer", layer.backward_layer, "backward_"),
            )
        }
        del self.pairs[pairs:]  # the wrapper makes its own of them, and its weights are theirs
        return parts

    def _argument(self, key: str, value: Any) -> Any:
        """A value of a layer's configuration, as the other Keras takes it."""
        if key.endswith("initializer"):
            with contextlib.suppress(_UnsupportedError):  # the weights are copied: what drew them matters no more
                return self._object(key, value, self.to.initializers)
            return _DEFAULT
        if key.endswith("regularizer"):
            return self._object(key, value, self.to.regularizers)
        if key.endswith("constraint"):
            return self._object(key, value, self.to.constraints)
        if key.endswith("activation") and value is not None:
            if not isinstance(value, str) or value not in _ACTIVATIONS:
                raise _UnsupportedError(f"{key}={value!r} is not one of {', '.join(_ACTIVATIONS)}")
            return "swish" if value == "silu" else value  # two names of one function, of which tf_keras has one
        if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
            return value.item()
        if isinstance(value, (list, tuple)):
            return value[0] if key == "axis" and len(value) == 1 else tuple(value)
        return value

    def _object(self, key: str, value: Any, module: Any) -> Any:
        """An initializer, regularizer or constraint."""
        if value is None or isinstance(value, str):
            return value
        cls = getattr(module, value["class_name"], None) if value.get("registered_name") is None else None
        if cls is None:
            raise _UnsupportedError(f"{key}={value['class_name']!r} has no counterpart")
        arguments = _arguments(cls)
        config = {name: one for name, one in value["config"].items() if name in arguments}
        if not isinstance(config.get("seed"), (int, type(None))):
            del config["seed"]
        return cls(**config)

    def _rebuilt(self, model: Any) -> Any:
        """The model of the layers that were made."""
        if _is_sequential(model):
            new = self.to.Sequential([self._input(model.inputs[0])], name=model.name)
            for layer in model.layers:
                new.add(self._counterpart(layer))
            return new
        inputs = tf.nest.map_structure(self._input, model.input)
        return self.to.Model(inputs, self._outputs(model, tf.nest.flatten(inputs)), name=model.name)

    def _counterpart(self, layer: Any) -> Any:
        if self.made[id(layer)] is None:
            self.made[id(layer)] = self._rebuilt(layer)
        return self.made[id(layer)]

    def _input(self, tensor: Any) -> Any:
        """A batch's size stays only where a layer keeps a state for each example."""
        shape = (tensor.shape[0] if self.is_stateful else None, *tensor.shape[1:])
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
        if not _is_sequential(model):
            return self._outputs(model, tf.nest.flatten(inputs))
        for layer in model.layers:
            inputs = self._called(layer, [inputs], {})
        return inputs

    def _operated(self, name: str, label: str, operands: Sequence[Any]) -> Any:
        """`a + b` as the layer of that name where both are tensors of one shape, as in a shortcut."""
        left, right = operands
        if hasattr(self.to.layers, name) and getattr(left, "shape", 0) == getattr(right, "shape", 1):
            return getattr(self.to.layers, name)(name=self._name(label))([left, right])
        result = _OPERATORS[name](left, right)
        if self.to is keras:
            _origin(result).name = self._name(label)  # Keras's own can be that of another layer
        return result


class _UnsupportedError(ValueError):
    """Says why a layer has no counterpart."""


_DEFAULT = object()  # an argument that is left out


def _title(library: Any) -> str:
    return "Keras 3" if library is keras else "tf_keras"


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _library(thing: Any) -> str:
    return type(thing).__module__.split(".")[0]


def _label(layer: Any) -> str:
    return f"{layer.name} ({type(layer).__name__})"


def _is_sequential(model: Any) -> bool:
    return isinstance(model, (keras.Sequential, tf_keras.Sequential))


def _has_state(layer: Any) -> bool:
    return isinstance(getattr(layer, "layer", layer), tf_keras.layers.RNN)


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


def _policy(layer: Any) -> str:
    """The name of the layer's dtype policy."""
    name = str(layer.dtype_policy.name)
    if "_from_" in name or "float8" in name:
        raise _UnsupportedError(f"quantized ({name})")
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
    if key.endswith("initializer") or (key, value) == ("data_format", "channels_last"):
        return True
    return bool(value == defaults[key]) if key in defaults else not value


_Call = tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]


def _layers(model: Any) -> list[Any]:
    return list(model.layers) if _is_sequential(model) else [layer for layer, *_ in _calls(model)]


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
    """What the user gave by name: Keras 3 adds the masks of time steps, which it computed and tf_keras computes too."""
    automatic = {id(getattr(tensor, "_keras_mask", None)) for tensor in arguments.keras_tensors} | {id(None)}
    return {
        key: value
        for key, value in arguments.kwargs.items()
        if not all(id(leaf) in automatic for leaf in tf.nest.flatten(value))
    }
