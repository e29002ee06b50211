"""Which variables of a model can be pruned, and how their axes lie; for each other one, why not."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import layers

from tf_prune.scopes import check_sparsity
from tf_prune.structures import Kind, Layout

Filters = str | Sequence[str] | Callable[[keras.Layer], bool] | None

# What is prunable only when it is asked for, by the name under which it is.
INCLUDE = ("embeddings", "quirk_biases")

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_CELLS = (layers.GRUCell, layers.LSTMCell, layers.SimpleRNNCell)

# A subclass counts as its parent: a layer of the user's own that extends Dense is prunable.
_KERNELS: list[tuple[tuple[type, ...], dict[str, Kind]]] = [
    (_SEPARABLE, {"depthwise_kernel": "depthwise", "pointwise_kernel": "convolution", "bias": "bias"}),
    (_CELLS, {"kernel": "recurrent", "recurrent_kernel": "recurrent"}),
    (_DEPTHWISE, {"kernel": "depthwise", "bias": "bias"}),
    ((*_CONVOLUTIONS, *TRANSPOSED), {"kernel": "convolution", "bias": "bias"}),
    ((layers.Dense, layers.EinsumDense), {"kernel": "dense", "bias": "bias"}),
    ((layers.Embedding,), {"embeddings": "embedding"}),
]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What `find_prunable` found: every weight of the model is in one of the two.

    Attributes:
        prunable: Mapping of path to variable, in model order.
        skipped: Mapping of path to the reason why this variable is left alone.
        layouts: Mapping of the prunable paths to which axes are inputs and which outputs.
        layers: Mapping of the prunable paths to the layers that own them.
    """

    prunable: dict[str, keras.Variable]
    skipped: dict[str, str]
    layouts: dict[str, Layout]
    layers: dict[str, keras.Layer]


def check_model(model: object) -> None:
    """Raises if `model` is not a built Keras 3 model."""
    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        is_legacy = any(parent.__module__.startswith("tf_keras") for parent in type(model).__mro__)
        hint = (
            " That is a legacy Keras 2 model: bring it to Keras 3 with `tf_prune.tfmot.from_tfmot`, or rebuild it with "
            "`import keras` and copy its weights with `new.set_weights(old.get_weights())`."
            if is_legacy
            else ""
        )
        raise TypeError(f"Expected a keras.Model (Keras {keras.__version__}), received {kind}.{hint}")
    unbuilt = layers_to_build(model)
    if unbuilt or not model.weights:
        what = f"layers without weights yet ({', '.join(unbuilt[:3])})" if model.weights else "no weights yet"
        how = "call it once on a batch, or call `model.build(input_shape)`"
        raise ValueError(
            f"The model {model.name!r} has {what}, so what can be pruned is not known. Build it first: give it an "
            f"Input, {how if has_call(model) else 'and its sub-models, which its train_step calls, one as well'}."
        )


def layers_to_build(model: keras.Model) -> list[str]:
    """Names of the layers whose weights are still to be made, in a model that was never called."""
    if model.built:
        return []
    waiting = [layer for layer in model._flatten_layers(include_self=False) if not layer.built]
    without = (keras.Model, layers.Add.__base__)  # What a model has is inside; merging layers have nothing.
    return [one.name for one in waiting if type(one).build is not keras.Layer.build and not isinstance(one, without)]


def has_call(model: keras.Model) -> bool:
    """Whether the model computes something; a GAN whose `train_step` calls its sub-models may not."""
    return type(model).call is not keras.Model.call


def check_call(model: keras.Model, what: str) -> None:
    """Raises if the model has no `call`.

    Args:
        model: A `keras.Model`.
        what: What needs one, at the beginning of a sentence.
    """
    if not has_call(model):
        inside = [f"model.{name}" for name, value in vars(model).items() if isinstance(value, keras.Layer)]
        raise ValueError(
            f"{what} calls the model, and {model.name!r} ({type(model).__name__}) has no `call` of its own. Take what "
            f"is inside, each by itself: {', '.join(inside) or 'it has nothing'}."
        )


def matches(layer: keras.Layer, filters: Filters) -> bool:
    """Whether the filters choose this layer."""
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


def _kind(layer: keras.Layer | None, variable: keras.Variable) -> Kind | None:
    """What this variable is to its layer; `None` if it is nothing that can be pruned."""
    kinds = next((kinds for classes, kinds in _KERNELS if isinstance(layer, classes)), {})
    return kinds.get(variable.name)


def _why_not(layer: keras.Layer | None, variable: keras.Variable, include: Sequence[str]) -> str | None:
    """Why this variable is left alone, or `None` if it is a float kernel."""
    kind = _kind(layer, variable)
    if kind == "embedding" and "embeddings" not in include:
        return 'an embedding table: pruned only with include=["embeddings"]'
    if kind is None or (kind == "bias" and "quirk_biases" not in include):
        if layer is None:
            return "no layer of the model owns it"
        if not variable.trainable and variable.name.endswith("_mask"):
            return "a mask"
        if len(variable.shape) < 2 or variable.name == "bias":
            return "a bias, scale, statistic or state: not a connection between units"
        return f"no known kernel of a {type(layer).__name__} layer"
    return None if keras.backend.is_float_dtype(variable.dtype) else f"quantized to {variable.dtype}"


def find_kernels(model: keras.Model, include: Sequence[str] = INCLUDE) -> dict[str, keras.Variable]:
    """The float variables of the model that can have a mask, frozen ones too; there may be none."""
    owners = _owners(model)
    return {p: v for p, v in weights_by_path(model).items() if _why_not(owners.get(id(v)), v, include) is None}


def _einsum_axes(equation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the kernel that the equation sums over, and those that it puts into the output."""
    inputs, kernel, output = re.split(",|->", equation.replace(" ", ""))
    summed = tuple(i for i, letter in enumerate(kernel) if letter in inputs and letter not in output)
    return summed, tuple(i for i, letter in enumerate(kernel) if letter in output and letter not in inputs)


def _layout(layer: keras.Layer, variable: keras.Variable, is_last: bool) -> Layout:
    kind = _kind(layer, variable)
    assert kind is not None  # noqa: S101 - for the type checker: only called for what has one
    shape = tuple(variable.shape)
    inputs: tuple[int, ...] = (len(shape) - 2,)
    outputs: tuple[int, ...] = (len(shape) - 1,)
    view = shape
    if kind == "bias":
        inputs = ()
    elif kind == "recurrent":
        view = (shape[0], shape[1] // layer.units, layer.units)
        inputs, outputs = (0,), (2,)
    elif kind == "depthwise":
        outputs = (len(shape) - 2, len(shape) - 1)
    elif isinstance(layer, layers.EinsumDense):
        inputs, outputs = _einsum_axes(layer.equation)
    elif isinstance(layer, TRANSPOSED):
        inputs, outputs = outputs, inputs
    elif getattr(layer, "groups", 1) > 1:
        # (window, inputs of a group, groups, outputs of a group)
        view = (*shape[:-1], layer.groups, shape[-1] // layer.groups)
        inputs, outputs = (len(shape) - 1, len(shape) - 2), (len(shape) - 1, len(shape))
    return Layout(kind, shape, view, inputs, outputs, is_last)


def _last_kernels(model: keras.Model, kernels: Mapping[int, Any]) -> set[int]:
    """Ids of the kernels whose outputs are the model's, but for layers without kernels in between.

    A subclassed model does not say how its layers are connected: there it is the last kernel in model order. Where it
    has no `call`, each of its layers may be the last.
    """
    if not has_call(model):
        return set[int]().union(*(_last_in(layer, kernels) for layer in model.layers))
    if not getattr(model, "outputs", None):
        return set(list(kernels)[-1:])
    last: set[int] = set()
    tensors, seen = list(model.outputs), set[tuple[int, int]]()
    while tensors:
        operation, node_index, _ = tensors.pop()._keras_history
        if (id(operation), node_index) in seen:
            continue
        seen.add((id(operation), node_index))
        found = _last_in(operation, kernels) if isinstance(operation, keras.Layer) else set()
        last |= found
        if not found and operation._inbound_nodes:
            tensors.extend(operation._inbound_nodes[node_index].input_tensors)
    return last


def _last_in(layer: keras.Layer, kernels: Mapping[int, Any]) -> set[int]:
    """Ids of the kernels of one layer, maybe a composite one, that make its outputs."""
    while isinstance(layer, layers.Wrapper) and not isinstance(layer, layers.Bidirectional):
        layer = layer.layer
    own = [id(v) for v in layer.variables if id(v) in kernels]
    if isinstance(layer, keras.Model):
        return _last_kernels(layer, dict.fromkeys(own))
    recurrent = isinstance(layer, (layers.RNN, layers.Bidirectional, *_CELLS))
    return set(own if recurrent else own[-1:])


def find_prunable(model: keras.Model, filters: Filters = None, include: Sequence[str] = ()) -> Survey:
    """Lists the kernels that can be pruned, and why each other variable is not.

    Prunable are the kernels of dense, einsum-dense, convolutional (also transposed, depthwise and
    separable) and recurrent layers, at any depth of nesting; a layer used twice counts once. The first and the last
    layer, shortcuts and attention are among them, as in the papers.

    A key is `variable.path`; see `weights_by_path` for two variables with the same one.

    Args:
        model: A built `keras.Model`.
        filters: A regular expression that is searched in the layer's name, a list of them, or a
            callable `layer -> bool`, as in `keras.Model.quantize`. `None` chooses every layer.
        include: What is prunable only when it is asked for: `"embeddings"`, the tables of `keras.layers.Embedding`;
            `"quirk_biases"`, the biases of these layers, which the release of SNIP prunes and its paper does not name.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If it is not built, or has nothing prunable.

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, layers.Dense(3, name="head")(inputs))
    >>> list(find_prunable(model).prunable)
    ['head/kernel']
    """
    check_model(model)
    if isinstance(include, str) or any(name not in INCLUDE for name in include):
        raise ValueError(f"include must be a list of {', '.join(map(repr, INCLUDE))}; got {include!r}.")
    owners = _owners(model)
    prunable: dict[str, keras.Variable] = {}
    skipped: dict[str, str] = {}
    for path, variable in weights_by_path(model).items():
        layer = owners.get(id(variable))
        reason = _why_not(layer, variable, include)
        if layer is not None and reason is None and not matches(layer, filters):
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
    kernels = {id(v): v for v in find_kernels(model, ("embeddings",)).values()}
    last = _last_kernels(model, kernels)
    own = {path: owners[id(variable)] for path, variable in prunable.items()}
    layouts = {path: _layout(own[path], variable, id(variable) in last) for path, variable in prunable.items()}
    return Survey(prunable, skipped, layouts, own)


def sparsity_of_each(owners: Mapping[str, keras.Layer], table: Mapping[keras.Layer, float]) -> dict[str, float]:
    """What a table of layers says about their kernels, by path.

    Args:
        owners: Mapping of the paths that are pruned to the layers that own them.
        table: Mapping of layer to sparsity; a layer can be a whole sub-model, with all that is inside.

    Raises:
        ValueError: If a key is no layer of the model, has nothing prunable, or two of them hold the same kernel.
    """
    sparsities: dict[str, float] = {}
    for layer, sparsity in table.items():
        if not isinstance(layer, keras.Layer):
            raise ValueError(
                f"A scope table is keyed by layer objects, got {layer!r}. Use {{model.get_layer(name): sparsity}}."
            )
        inside = {id(part) for part in layer._flatten_layers()}
        paths = [path for path, owner in owners.items() if id(owner) in inside]
        if not paths:
            names = ", ".join(dict.fromkeys(owner.name for owner in owners.values()))
            raise ValueError(
                f"The scope table names the layer {layer.name!r}, which is not in the model, or of which nothing is "
                f"pruned. Layers that are: {names}."
            )
        for path in paths:
            if path in sparsities:
                raise ValueError(f"The scope table names {path!r} twice: by a layer, and by a model that contains it.")
            sparsities[path] = check_sparsity(sparsity)
    return sparsities
