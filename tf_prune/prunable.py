"""Which variables of a model can be pruned; for each other one, why not."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
from keras import layers

from tf_prune.layouts import CELLS, kind_of, layout_of, why_no_kernel
from tf_prune.scopes import check_sparsity
from tf_prune.structures import Layout

Filters = str | Sequence[str] | Callable[[keras.Layer], bool] | None
_Inclusion = str | Callable[[keras.Layer, keras.Variable], bool]
Include = _Inclusion | Sequence[_Inclusion]

# What is prunable only when it is asked for, by the name under which it is.
INCLUDE = ("embeddings", "quirk_biases")
# Whatever can be asked for.
EVERYTHING: tuple[_Inclusion, ...] = (*INCLUDE, lambda layer, variable: True)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What `find_prunable` found: every weight of the model is in one of the two.

    Attributes:
        prunable: Mapping of path to variable, in model order.
        skipped: Mapping of path to the reason why this variable is left alone.
        layouts: Mapping of the prunable paths to which axes are inputs and which outputs.
        layers: Mapping of the prunable paths to the layers that own them.
        unknown: Mapping of path to variable of those skipped that may be kernels of layers that are not Keras's own.
        num_weights: Of the whole model, without masks.
    """

    prunable: dict[str, keras.Variable]
    skipped: dict[str, str]
    layouts: dict[str, Layout]
    layers: dict[str, keras.Layer]
    unknown: dict[str, keras.Variable]
    num_weights: int


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
    # Where Keras cannot tell the shape behind a layer, it leaves the rest of a Sequential without weights, in silence.
    rest = [layer.name for layer in model.layers if not layer.built] if isinstance(model, keras.Sequential) else []
    if rest:
        raise ValueError(
            f"Keras built only a part of {model.name!r}: {listed(rest)} have no weights yet. Call the model once on a "
            "batch, or write compute_output_shape for your own layer before them."
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
    # Where Keras cannot tell the shape behind a layer, it leaves the rest of a Sequential without weights, in silence.
    unbuilt = [layer.name for layer in getattr(model, "layers", ()) if not layer.built]
    if isinstance(model, keras.Sequential) and unbuilt:
        raise ValueError(
            f"Keras built only a part of {model.name!r}: {listed(unbuilt)} have no weights yet. Call the model once "
            "on a batch, or write compute_output_shape for your own layer before them."
        )


def matches(layer: keras.Layer, filters: Filters) -> bool:
    """Whether the filters choose this layer."""
    if filters is None:
        return True
    if callable(filters):
        return bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    return any(re.search(pattern, layer.name) for pattern in patterns)


def weights_by_path(model: keras.Layer) -> dict[str, keras.Variable]:
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


def owners_of(model: keras.Layer) -> dict[int, keras.Layer]:
    """The layer that owns each variable, by the variable's id."""
    return {
        id(variable): layer
        for layer in model._flatten_layers()
        for variable in layer._trainable_variables + layer._non_trainable_variables
    }


def _is_chosen(layer: keras.Layer, variable: keras.Variable, include: Sequence[_Inclusion]) -> bool:
    """Whether a pattern or a predicate asks for this variable; the names of groups do not."""
    return any(
        bool(one(layer, variable)) if callable(one) else one not in INCLUDE and bool(re.search(one, variable.path))
        for one in include
    )


def _why_not(layer: keras.Layer | None, variable: keras.Variable, include: Sequence[_Inclusion]) -> str | None:
    """Why this variable is left alone, or `None` if it is a float kernel."""
    if layer is None:
        return "no layer of the model owns it"
    kind = kind_of(layer, variable)
    reason = None
    if kind == "embedding":
        reason = None if "embeddings" in include else 'an embedding table: pruned only with include=["embeddings"]'
    elif kind == "bias" and "quirk_biases" not in include:
        return "a bias, scale, statistic or state: not a connection between units"
    elif isinstance(layer, layers.STFTSpectrogram):
        reason = f'a Fourier transform: pruned only with include=["{variable.name}"]'
    elif kind is None:
        no_kernel = why_no_kernel(layer, variable)
        if no_kernel:
            return no_kernel
        reason = _unknown(layer)
    if reason and not _is_chosen(layer, variable, include):
        return reason
    return None if keras.backend.is_float_dtype(variable.dtype) else f"quantized to {variable.dtype}"


def _unknown(layer: keras.Layer) -> str:
    return f"no known kernel of a {type(layer).__name__} layer"


def size_of(variables: Iterable[keras.Variable]) -> int:
    """How many weights these have together."""
    return sum(math.prod(variable.shape) for variable in variables)


def listed(paths: Iterable[str], most: int = 8) -> str:
    """The first of them, for a message."""
    paths = list(paths)
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def pattern_of(variables: Mapping[str, keras.Variable]) -> str:
    """What to write for `include`, to have these."""
    # By the ends of the paths: what is before them changes when the model is built again.
    ends = [f"/{v.name}$" if v.path.endswith(f"/{v.name}") else v.path for v in variables.values()]
    return repr(ends[0] if len(set(ends)) == 1 else list(dict.fromkeys(ends)))


def check_include(model: keras.Layer, include: Include) -> tuple[_Inclusion, ...]:
    """What is included, as a tuple; raises if a part of it asks for no kernel of the model."""
    parts = _parts(include)
    for part in parts:
        if not isinstance(part, str) and not callable(part):
            raise ValueError(
                f"include must be {', '.join(map(repr, INCLUDE))}, a regular expression that is searched in the paths "
                f"of weights, a callable (layer, variable) -> bool, or a list of such; got {part!r}."
            )
        if callable(part) or part not in INCLUDE:
            _check_asks_for_something(model, part)
    return parts


def _check_asks_for_something(model: keras.Layer, part: _Inclusion) -> None:
    owners, by_path = owners_of(model), weights_by_path(model)
    owned = {path: (owners[id(v)], v) for path, v in by_path.items() if id(v) in owners}
    try:
        chosen = [path for path, (layer, variable) in owned.items() if _is_chosen(layer, variable, (part,))]
    except re.error as error:
        raise ValueError(f"include={part!r} is no regular expression: {error}.") from error
    reasons = {path: _why_not(*owned[path], (part,)) for path in chosen}
    if not all(reasons.values()):
        return
    if reasons:
        found = "; ".join(f"{path} ({reason})" for path, reason in list(reasons.items())[:4])
        what = f"chooses nothing that can be pruned, only {found}"
    else:
        what = "chooses no weight of the model" if callable(part) else "is no group, and found in the path of no weight"
    askable = [path for path, one in owned.items() if _why_not(*one, ()) and not _why_not(*one, EVERYTHING[-1:])]
    raise ValueError(
        f"include={part!r} {what}. There are the groups {', '.join(map(repr, INCLUDE))}, and these weights that are "
        f"pruned only where a pattern or a predicate (layer, variable) -> bool asks for them: "
        f"{listed(askable) or 'none in this model'}. Pruned without it are: {listed(find_kernels(model, ()))}."
    )


def _parts(include: Include) -> tuple[_Inclusion, ...]:
    return (include,) if isinstance(include, str) or callable(include) else tuple(include)


def find_kernels(model: keras.Layer, include: Include = INCLUDE) -> dict[str, keras.Variable]:
    """The float variables that are kernels, frozen ones too, and what `include` adds; there may be none.

    Args:
        model: A model, or one layer.
        include: As in `find_prunable`, but what asks for nothing is no error here.
    """
    owners, include = owners_of(model), _parts(include)
    return {p: v for p, v in weights_by_path(model).items() if _why_not(owners.get(id(v)), v, include) is None}


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
        return _last_kernels(layer, {one: kernels[one] for one in own})
    recurrent = isinstance(layer, (layers.RNN, layers.Bidirectional, *CELLS))
    # Of a layer of one's own nobody knows which of its kernels is the last.
    is_own = any(kernels[one] is None for one in own)
    return set(own if recurrent or is_own else own[-1:])


def find_prunable(model: keras.Model, filters: Filters = None, include: Include = ()) -> Survey:
    """Lists the kernels that can be pruned, and why each other variable is not.

    Prunable are the kernels of dense, einsum-dense, convolutional (also transposed, depthwise and separable) and
    recurrent layers (also convolutional ones), and the untied way back of a `ReversibleEmbedding`, at any depth of
    nesting; a layer used twice counts once. The first and the last layer, shortcuts and attention are among them, as in
    the papers. Kernels of layers and cells of one's own are prunable where `include` asks for them.

    A key is `variable.path`; see `weights_by_path` for two variables with the same one.

    Args:
        model: A built `keras.Model`.
        filters: A regular expression that is searched in the layer's name, a list of them, or a
            callable `layer -> bool`, as in `keras.Model.quantize`. `None` chooses every layer.
        include: What is prunable only when it is asked for, one of these or a list of them: `"embeddings"`, the tables
            of `keras.layers.Embedding`; `"quirk_biases"`, the biases of these layers, which the release of SNIP prunes
            and its paper does not name; any other string is a regular expression that is searched in `variable.path`; a
            callable `(layer, variable) -> bool` is asked of each variable and the layer that owns it. The latter two
            add trainable weights of two and more axes of layers that are not Keras's own, and single tables of
            embeddings. Of such a weight the last two axes are taken for its inputs and outputs, and the others for
            copies.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If it is not built, has nothing prunable, or a part of `include` asks for nothing.

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, layers.Dense(3, name="head")(inputs))
    >>> list(find_prunable(model).prunable)
    ['head/kernel']
    """
    check_model(model)
    include = check_include(model, include)
    owners = owners_of(model)
    prunable: dict[str, keras.Variable] = {}
    skipped: dict[str, str] = {}
    unknown: dict[str, keras.Variable] = {}
    for path, variable in weights_by_path(model).items():
        layer = owners.get(id(variable))
        reason = _why_not(layer, variable, include)
        is_chosen = layer is not None and variable.trainable and matches(layer, filters)
        if layer is not None and reason is None and not matches(layer, filters):
            reason = "not chosen by filters"
        elif reason is None and not variable.trainable:
            reason = "frozen: its layer is not trainable"
        if reason is None:
            prunable[path] = variable
            continue
        skipped[path] = reason
        if is_chosen and reason == _unknown(layer) and keras.backend.is_float_dtype(variable.dtype):
            unknown[path] = variable
    if not prunable:
        reasons = "\n".join(f"  {path}: {reason}" for path, reason in skipped.items())
        hint = f"\nKernels of your own layers are pruned with include={pattern_of(unknown)}." if unknown else ""
        raise ValueError(
            f"The model {model.name!r} has nothing to prune. Each variable, and why it is left:\n{reasons}{hint}"
        )
    kernels = find_kernels(model, ("embeddings", *(part for part in include if part != "quirk_biases")))
    last = _last_kernels(model, {id(v): kind_of(owners[id(v)], v) for v in kernels.values()})
    own = {path: owners[id(variable)] for path, variable in prunable.items()}
    layouts = {path: layout_of(own[path], variable, id(variable) in last) for path, variable in prunable.items()}
    num_weights = size_of(v for path, v in weights_by_path(model).items() if skipped.get(path) != "a mask")
    return Survey(prunable, skipped, layouts, own, unknown, num_weights)


def sparsity_of_each(
    owners: Mapping[str, keras.Layer], table: Mapping[keras.Layer | str, float], model: keras.Model
) -> dict[str, float]:
    """What a table of layers says about their kernels, by path.

    Args:
        owners: Mapping of the paths that are pruned to the layers that own them.
        table: Mapping of layer to sparsity; a layer can be a whole sub-model, with all that is inside. Its name will
            do, or the end of its path where two have one name.
        model: Where the names are looked up.

    Raises:
        ValueError: If a key is no layer of the model, has nothing prunable, or two of them hold the same kernel.
    """
    sparsities: dict[str, float] = {}
    for key, sparsity in table.items():
        layer = _named(key, model, owners) if isinstance(key, str) else key
        if not isinstance(layer, keras.Layer):
            raise ValueError(f"A scope table is keyed by layers or their names, got {key!r}. Use {{name: sparsity}}.")
        inside = {id(part) for part in layer._flatten_layers()}
        paths = [path for path, owner in owners.items() if id(owner) in inside]
        if not paths:
            raise ValueError(
                f"The scope table names the layer {layer.name!r}, which is not in the model, or of which nothing is "
                f"pruned. {_names(owners)} A table of layer objects goes with their model alone; for a model that is "
                "built anew, as by a tuner, use their names."
            )
        for path in paths:
            if path in sparsities:
                raise ValueError(f"The scope table names {path!r} twice: by a layer, and by a model that contains it.")
            sparsities[path] = check_sparsity(sparsity)
    return sparsities


def _names(owners: Mapping[str, keras.Layer]) -> str:
    return f"Layers that are: {', '.join(dict.fromkeys(owner.name for owner in owners.values()))}."


def _named(name: str, model: keras.Model, owners: Mapping[str, keras.Layer]) -> keras.Layer:
    """The layer of this name, or whose path ends so."""
    everything = list({id(layer): layer for layer in model._flatten_layers()}.values())
    found = [la for la in everything if name == la.name or f"/{la.path}".endswith(f"/{name}")]
    inside = {id(part) for la in found for part in la._flatten_layers(include_self=False)}
    found = [la for la in found if id(la) not in inside]  # a wrapper may be called as what it wraps
    if not found:
        raise ValueError(f"The scope table names the layer {name!r}, which is not in the model. {_names(owners)}")
    if len(found) > 1:
        raise ValueError(
            f"The scope table names {name!r}, as {len(found)} layers are called: "
            f"{', '.join(layer.path for layer in found)}. Use a path, where they differ, or the layer itself."
        )
    return found[0]
