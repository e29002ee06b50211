"""`Masked`: a layer whose masks are weights of the model and travel in its file."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tf_prune.enforcement import apply_masks, hold
from tf_prune.evidence import masks_of
from tf_prune.prunable import Include, check_include, check_model, find_kernels, owners_of, weights_by_path


@keras.saving.register_keras_serializable(package="tf_prune")
class Masked(keras.layers.Wrapper):
    """A layer with a mask for each of its kernels, as non-trainable weights: 1 is kept, 0 is pruned.

    The masks hold in training as those of `apply_masks` do, and `prune`, `score` and the callbacks take a wrapped layer
    as they take a plain one. In addition the masks are saved and loaded with the model, a bit for each weight, and hold
    again without a call.

    The kernel's pruned weights are zero, so the forward pass is that of the layer itself and costs nothing more. Only
    where other masks are substituted, in `model.stateless_call`, are they multiplied with the kernels: then
    dL/dc, the connection sensitivity, is the gradient by the substituted masks.

    Args:
        layer: Any layer that has kernels, also a composite one, such as `Bidirectional`, with all that is inside; it
            can have any arguments in its call.
        include: Which other weights get a mask, such as kernels of a layer of one's own; see `find_prunable`.
        positions: The same as positions in `layer.weights`: what is left of `include` in the configuration of a layer
            that is built, so that it can be saved with a predicate, too.
        **options: Of `keras.layers.Layer`. The name is that of the layer unless given.

    Attributes:
        masks: The mask variables, float32, in the order of the layer's kernels; empty before it is built.

    >>> model = keras.Sequential([keras.Input((4,)), Masked(keras.layers.Dense(2, name="logits"))])
    >>> [mask.name for mask in model.layers[0].masks]
    ['kernel_mask']

    Source: Lee et al. 2019, Eq. 4 and 5, for the auxiliary indicator c and dL/dc.
    """

    def __init__(
        self, layer: keras.Layer, include: Include = (), positions: Sequence[int] | None = None, **options: Any
    ):
        if isinstance(layer, Masked):
            raise ValueError(f"The layer {layer.name!r} is masked already.")
        if isinstance(layer, keras.Layer):
            # Keras reads from the signatures what to pass on, so they must be those of the layer.
            object.__setattr__(self, "call", functools.wraps(layer.call)(functools.partial(self._call)))
            options = {"name": layer.name, "dtype": layer.dtype_policy, **options}
        super().__init__(layer, **options)
        object.__setattr__(self, "build", functools.wraps(layer.build)(functools.partial(self.build)))
        self.supports_masking = layer.supports_masking
        self._include = include
        self._positions = None if positions is None else tuple(positions)
        self.masks: list[keras.Variable] = []

    def build(self, *shapes: Any, **named_shapes: Any) -> None:
        """Builds the layer, and adds a mask of ones for each of its kernels."""
        self.layer._parent_path = self._parent_path  # its weights are called as they were without the wrapper
        if not self.layer.built:
            self.layer.build(*shapes, **named_shapes)
        if self._positions is None:
            included = find_kernels(self.layer, check_include(self.layer, self._include))
            self._positions = _positions(self.layer, included.values())
        if max(self._positions, default=-1) >= len(self.layer.weights):
            raise ValueError(
                f"{self.name!r} was saved with masks of the weights {self._positions} of its layer, which has only "
                f"{len(self.layer.weights)} weights now. Load it with the code that it was saved with."
            )
        owners = owners_of(self.layer)
        for path, kernel in self._kernels().items():
            name = path.removeprefix(f"{self.layer.path}/").replace("/", "_").replace("@", "_")
            mask = self.add_weight(
                kernel.shape, "ones", "float32", trainable=False, autocast=False, name=f"{name}_mask"
            )
            hold(owners.get(id(kernel)), kernel, mask)
            self.masks.append(mask)
        if not self.masks:
            raise ValueError(
                f"The layer {self.layer.name!r} ({type(self.layer).__name__}) has no kernel that could be masked. "
                "Wrap dense, convolutional, recurrent, attention or embedding layers, or say with include=... which "
                f"weights of your own layer are kernels: {', '.join(weights_by_path(self.layer)) or 'it has none'}."
            )

    def get_config(self) -> dict[str, Any]:
        """That of the wrapper, and which other weights than the known kernels have masks."""
        options = {"include": self._include} if self._positions is None else {"positions": list(self._positions)}
        return {**super().get_config(), **options}

    def get_build_config(self) -> dict[str, Any] | None:
        """That of the layer."""
        return self.layer.get_build_config()

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the layer as it does it itself, and then the masks; a layer that was quantized has none."""
        if not self.layer.built:
            self.layer.build_from_config(config)
        if self._kernels():
            self.build()
        else:
            self.built = True

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if all(mask.value is mask._value for mask in self.masks):
            return self.layer(*args, **kwargs)
        gates = {id(v): mask.value for v, mask in zip(self._kernels().values(), self.masks, strict=True)}
        values = [
            v.value * keras.ops.cast(gates[id(v)], v.dtype) if id(v) in gates else v.value for v in self.layer.variables
        ]
        mapping = list(zip(self.layer.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            outputs = self.layer(*args, **kwargs)
        for loss in scope.losses or ():
            self.add_loss(loss)
            self._loss_ids.discard(id(loss))  # it counts as that of the layer inside
        for variable in self.layer.non_trainable_variables:  # such as moving statistics: for the scope around this one
            variable.assign(scope.get_current_value(variable))
        return outputs

    def _kernels(self) -> dict[str, keras.Variable]:
        included = {id(v) for i, v in enumerate(self.layer.weights) if i in (self._positions or ())}
        known = find_kernels(self.layer, ("embeddings",))
        return {p: v for p, v in weights_by_path(self.layer).items() if p in known or id(v) in included}

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """That of the layer; a mask of time steps, not of weights."""
        return self.layer.compute_mask(inputs, previous_mask)

    def save_own_variables(self, store: Any) -> None:
        """Writes the masks, 8 weights a byte."""
        for i, mask in enumerate(self.masks):
            store[f"bits_{i}"] = np.packbits(np.asarray(mask) != 0)

    def load_own_variables(self, store: Any) -> None:
        """Reads the masks."""
        sizes = [-(-int(np.prod(mask.shape)) // 8) for mask in self.masks]
        found = [len(store[f"bits_{i}"]) if f"bits_{i}" in store else None for i in range(len(self.masks))]
        if found != sizes:
            raise ValueError(
                f"The file has no masks for the layer {self.name!r}: expected {sizes} bytes, found {found}. Was it "
                "saved from a model that is not wrapped, or of other sizes? Load it into that one, and wrap that."
            )
        for i, mask in enumerate(self.masks):
            bits = np.unpackbits(np.asarray(store[f"bits_{i}"]), count=int(np.prod(mask.shape)))
            mask.assign(bits.reshape(mask.shape).astype("float32"))


def _positions(layer: keras.Layer, variables: Iterable[keras.Variable]) -> tuple[int, ...]:
    """Where those that are no known kernels are among the layer's weights: the same in each layer made like it."""
    ids = {id(variable) for variable in variables} - {id(v) for v in find_kernels(layer, ("embeddings",)).values()}
    return tuple(i for i, variable in enumerate(layer.weights) if id(variable) in ids)


def wrap(model: keras.Model, include: Include = ()) -> keras.Model:
    """A copy of the model in which each layer that has kernels is `Masked`; weights and masks are the model's.

    The copy is a new model, not compiled. `score` and `prune` give the same on both; the paths of weights are those
    that `keras.models.clone_model` gives.

    Args:
        model: A built Sequential or functional `keras.Model`, also with such models inside.
        include: Which other weights get masks, such as kernels of one's own layers; see `find_prunable`. What has a
            mask already needs none of it.

    Raises:
        ValueError: If a part of `include` asks for nothing. If the model, or one inside, is subclassed: there write
            `Masked(layer)` into its own code.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="logits")])
    >>> wrap(model).get_layer("logits")
    <Masked name=logits, built=True>
    """
    check_model(model)
    included = find_kernels(model, check_include(model, include))
    weights = weights_by_path(model)
    chosen = [*included.values(), *(weights[path] for path in masks_of(model))]
    ids = {id(variable) for variable in chosen}

    def masked(layer: keras.Layer) -> keras.Layer:
        copy = _copy(layer)
        # A functional model can have operations that are no layers.
        if not isinstance(layer, keras.Layer) or isinstance(layer, Masked):
            return copy
        has_mask = not ids.isdisjoint(map(id, layer.weights))
        return Masked(copy, positions=_positions(layer, chosen)) if has_mask else copy

    return _rebuilt(model, masked)


def strip(model: keras.Model) -> keras.Model:
    """A copy of the model without `Masked` layers: the inverse of `wrap`.

    Weights are the model's, and if any is pruned, the masks hold in the copy by `apply_masks`. The copy is not
    compiled.

    Args:
        model: A built Sequential or functional `keras.Model`.

    Raises:
        ValueError: If the model is subclassed.

    >>> model = keras.Sequential([keras.Input((4,)), Masked(keras.layers.Dense(2, name="logits"))])
    >>> strip(model).get_layer("logits")
    <Dense name=logits, built=True>
    """
    return _rebuilt(model, lambda layer: _copy(layer.layer if isinstance(layer, Masked) else layer))


def _copy(layer: keras.Layer) -> keras.Layer:
    return type(layer).from_config(layer.get_config())


@contextlib.contextmanager
def uncompiled(model: keras.Model) -> Iterator[None]:
    """Keras clones what a model was compiled with by its config, which fails for losses that it does not know."""
    compiled = [part for part in model._flatten_layers() if getattr(part, "compiled", False)]
    try:
        for part in compiled:
            part.compiled = False
        yield
    finally:
        for part in compiled:
            part.compiled = True


def _rebuilt(model: keras.Model, replace: Callable[[keras.Layer], keras.Layer]) -> keras.Model:
    check_model(model)
    with model.distribute_strategy.scope(), uncompiled(model):
        try:
            new = keras.models.clone_model(model, _inputs_like(model), clone_function=replace, recursive=True)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(_not_rebuilt(model, str(error).splitlines()[0])) from error
    if [type(m) for m in _models_in(new)] != [type(m) for m in _models_in(model)]:
        raise ValueError(_not_rebuilt(model, "a class of its own would be lost"))
    old_paths, new_paths = ({id(v): path for path, v in weights_by_path(m).items()} for m in (model, new))
    paths = {}
    for old_variable, variable in zip(_without_masks(model), _without_masks(new), strict=True):
        variable.assign(old_variable)
        paths[old_paths[id(old_variable)]] = new_paths[id(variable)]
    masks = masks_of(model)
    if not all(mask.all() for mask in masks.values()):
        apply_masks(new, {paths[path]: mask for path, mask in masks.items()})
    return new


def _models_in(model: keras.Model) -> list[keras.Model]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.Model)]


def _not_rebuilt(model: keras.Model, why: str) -> str:
    return (
        f"{model.name!r} cannot be built again from its layers ({why}). wrap and strip take Sequential and functional "
        "models; in a subclassed one write Masked(layer) where it makes its layers, or use apply_masks, which needs no "
        "wrapper."
    )


def _inputs_like(model: keras.Model) -> Any:
    """Inputs with the names of the model's, which Keras would call anew; `None` where it does not."""
    if isinstance(model, keras.Sequential) or not getattr(model, "inputs", None):
        return None

    def like(tensor: Any) -> Any:
        name = tensor._keras_history.operation.name
        return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, sparse=tensor.sparse, name=name)

    return keras.tree.map_structure(like, model.input)


def _without_masks(model: keras.Model) -> list[keras.Variable]:
    masks = {id(v) for layer in model._flatten_layers() if isinstance(layer, Masked) for v in layer.masks}
    return [variable for variable in model.weights if id(variable) not in masks]
