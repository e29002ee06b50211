"""Which variables of a model can be pruned; for each other one, why not."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import keras
from keras import layers

Filters = str | Sequence[str] | Callable[[keras.Layer], bool] | None

_CONVOLUTIONS = (
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
)

# A subclass counts as its parent: a layer of the user's own that extends Dense is prunable.
_KERNELS: list[tuple[tuple[type, ...], tuple[str, ...]]] = [
    ((layers.SeparableConv1D, layers.SeparableConv2D), ("depthwise_kernel", "pointwise_kernel")),
    ((layers.GRUCell, layers.LSTMCell, layers.SimpleRNNCell), ("kernel", "recurrent_kernel")),
    ((layers.Dense, layers.EinsumDense, *_CONVOLUTIONS), ("kernel",)),
]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What `find_prunable` found: every weight of the model is in one of the two.

    Attributes:
        prunable: Mapping of path to variable, in model order.
        skipped: Mapping of path to the reason why this variable is left alone.
    """

    prunable: dict[str, keras.Variable]
    skipped: dict[str, str]


def check_model(model: object) -> None:
    """Raises if `model` is not a built Keras 3 model."""
    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        is_legacy = any(parent.__module__.startswith("tf_keras") for parent in type(model).__mro__)
        hint = (
            " That is a legacy Keras 2 model: rebuild it with `import keras` (Keras 3) and copy its weights with "
            "`new.set_weights(old.get_weights())`."
            if is_legacy
            else ""
        )
        raise TypeError(f"Expected a keras.Model (Keras {keras.__version__}), received {kind}.{hint}")
    if not model.built or not model.weights:
        raise ValueError(
            f"The model {model.name!r} has no weights yet, so there is nothing to prune. Build it first: give it an "
            "Input, call it once on a batch, or call `model.build(input_shape)`."
        )


def _matches(layer: keras.Layer, filters: Filters) -> bool:
    if filters is None:
        return True
    if callable(filters):
        return bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    return any(re.search(pattern, layer.name) for pattern in patterns)


def weights_by_path(model: keras.Model) -> dict[str, keras.Variable]:
    """Every weight of the model under the key that scores and masks use for it, in model order.

    That is `variable.path`. Two variables can share a path when two sub-models name their layers alike; the second is
    then called `path@2`, the third `path@3`.
    """
    weights: dict[str, keras.Variable] = {}
    seen: dict[str, int] = {}
    for variable in model.weights:
        number = seen[variable.path] = seen.get(variable.path, 0) + 1
        weights[variable.path if number == 1 else f"{variable.path}@{number}"] = variable
    return weights


def _owners(model: keras.Model) -> dict[int, keras.Layer]:
    return {
        id(variable): layer
        for layer in model._flatten_layers()
        for variable in layer._trainable_variables + layer._non_trainable_variables
    }


def _why_no_kernel(layer: keras.Layer | None, variable: keras.Variable) -> str | None:
    """Why this variable is not a float kernel, or `None` if it is one."""
    if layer is None:
        return "no layer of the model owns it"
    names = next((names for classes, names in _KERNELS if isinstance(layer, classes)), ())
    if variable.name not in names:
        if isinstance(layer, layers.Embedding):
            return "an embedding table: each row is a token, not a connection"
        if len(variable.shape) < 2:
            return "a bias, scale, statistic or state: not a connection between units"
        return f"no known kernel of a {type(layer).__name__} layer"
    return None if keras.backend.is_float_dtype(variable.dtype) else f"quantized to {variable.dtype}"


def find_kernels(model: keras.Model) -> dict[str, keras.Variable]:
    """The kernels of the model in float, frozen ones too; there may be none."""
    owners = _owners(model)
    return {p: v for p, v in weights_by_path(model).items() if _why_no_kernel(owners.get(id(v)), v) is None}


def find_prunable(model: keras.Model, filters: Filters = None) -> Survey:
    """Lists the kernels that can be pruned, and why each other variable is not.

    Prunable are the kernels of dense, einsum-dense, convolutional (also transposed, depthwise and
    separable) and recurrent layers, at any depth of nesting; a layer used twice counts once.

    A key is `variable.path`; see `weights_by_path` for two variables with the same one.

    Args:
        model: A built `keras.Model`.
        filters: A regular expression that is searched in the layer's name, a list of them, or a
            callable `layer -> bool`, as in `keras.Model.quantize`. `None` chooses every layer.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If it is not built, or has nothing prunable.

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, layers.Dense(3, name="head")(inputs))
    >>> list(find_prunable(model).prunable)
    ['head/kernel']
    """
    check_model(model)
    owners = _owners(model)
    prunable: dict[str, keras.Variable] = {}
    skipped: dict[str, str] = {}
    for path, variable in weights_by_path(model).items():
        layer = owners.get(id(variable))
        reason = _why_no_kernel(layer, variable)
        if layer is not None and reason is None and not _matches(layer, filters):
            reason = "not chosen by filters"
        elif reason is None and not variable.trainable:
            reason = "frozen: its layer is not trainable"
        if reason is None:
            prunable[path] = variable
        else:
            skipped[path] = reason
    if not prunable:
        reasons = "\n".join(f"  {path}: {reason}" for path, reason in skipped.items())
        raise ValueError(
            f"The model {model.name!r} has nothing to prune. Each variable, and why it is left:\n{reasons}"
        )
    return Survey(prunable, skipped)
