"""The bridge to TensorFlow's own pruning toolkit (tfmot), and to the legacy `tf_keras` models that it takes.

Needs the extra `[tfmot]`, and is imported by itself: `import tf_prune.tfmot`. Neither that nor any function here
changes which Keras the rest of the process uses, what `tf.keras` is, or the environment. A plain
`import tensorflow_model_optimization` does, unless `import_tfmot` was called before it.
"""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.enforcement import apply_masks
from tf_prune.evidence import masks_of
from tf_prune.legacy_keras import rebuild, tf_keras
from tf_prune.legacy_keras import to_tf_keras as to_tf_keras
from tf_prune.legacy_layers import LAYERS as LAYERS
from tf_prune.legacy_layers import kind, label
from tf_prune.masks import Masks
from tf_prune.placing import replacing
from tf_prune.prunable import find_kernels, weights_by_path

# tfmot takes these apart, or folds them into the convolution before them.
_FOLDED = ("BatchNormalization", "SeparableConv1D", "SeparableConv2D")
# What TensorFlow's versions write into a SavedModel's folder.
_SAVED_MODEL = ("saved_model.pb", "variables", "assets", "assets.extra", "fingerprint.pb", "keras_metadata.pb")
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
    with _tf_keras_in_place(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"TensorFlow's toolkit cannot be imported ({error}). Install it with: pip install 'tf_prune[tfmot]'"
            ) from error


@contextlib.contextmanager
def _tf_keras_in_place() -> Iterator[None]:
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
        ValueError: If a layer has no counterpart in Keras 3, or is called with `training=True`, which Keras 3 does not
            keep; all of them are named.

    >>> legacy = tf_keras.Sequential([tf_keras.Input((2,)), tf_keras.layers.Dense(2, name="logits")])
    >>> legacy.layers[0].kernel.assign([[0.0, 1.0], [2.0, 3.0]]).shape
    TensorShape([2, 2])
    >>> model, masks = from_tfmot(legacy)
    >>> model.get_layer("logits"), masks.num_kept
    (<Dense name=logits, built=True>, 3)
    """
    if not isinstance(model, tf_keras.Model):
        raise TypeError(
            f"Expected a tf_keras.Model, as TensorFlow's toolkit prunes it; received {kind(model)}. A Keras 3 model "
            "needs no bridge: tf_prune takes it as it is."
        )
    theirs: dict[int, np.ndarray] = {}

    def unwrapped(layer: Any) -> Any:
        if type(layer).__name__ != "PruneLowMagnitude" or not hasattr(layer, "pruning_vars"):
            return layer
        theirs.update((id(weight), mask.numpy() != 0) for weight, mask, _ in layer.pruning_vars)
        return layer.layer

    new, weights = rebuild(model, keras, unwrapped=unwrapped)
    paths = {id(variable): path for path, variable in weights_by_path(new).items()}
    found = {paths[id(variable)]: theirs[id(weight)] for weight, variable in weights if id(weight) in theirs}
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
    legacy = to_tf_keras(model, flat=True)
    scheme = tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
    registry = scheme.get_quantize_registry()
    reasons = {label(layer): _why_not_quantized(layer, registry) for layer in legacy.layers}
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
    if isinstance(layer, tf_keras.layers.InputLayer):
        return None
    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    if activation not in _QUANTIZED_ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(_QUANTIZED_ACTIVATIONS)}"
    if layer.compute_dtype != "float32":
        return f"computes in {layer.compute_dtype}, and only float32 can be quantized"
    if type(layer).__name__ in _FOLDED:
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
        directory: Where to write; made if needed. An earlier SavedModel there is replaced, whole or not at all.

    Raises:
        TypeError: If `model` is not a `tf_keras.Model`.

    Example:
        save_quantized(quantized, "saved_models/lenet_int8")
    """
    if not isinstance(model, tf_keras.Model):
        raise TypeError(
            f"Expected a tf_keras.Model, such as quantize_aware returns; received {kind(model)}. A Keras 3 model is "
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
    with replacing(directory, _SAVED_MODEL, last="saved_model.pb") as work:
        tf.saved_model.save(module, os.fspath(work), signatures={"serving_default": module.serve})
