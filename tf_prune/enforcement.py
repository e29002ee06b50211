"""The one place where a mask is held during training.

Keras applies `variable.constraint` inside the optimizer's step, right after the update. Here that constraint sets
pruned weights to zero, so that every step, every checkpoint and every export has them exactly zero, under any
optimizer. And where a step begins the optimizer is handed masked gradients, so that it takes the step of the sparse
network: what would move a pruned weight counts in no norm, no momentum and no average.

The zero of a pruned weight is -0.0, and a kept weight is never -0.0. No random initializer draws -0.0, so the weights
alone, in whatever file they were, tell the mask that they had; files stay plain Keras files.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tf_prune.effective import is_quantized_kernel, multiplied
from tf_prune.masks import Masks
from tf_prune.matching import fitted
from tf_prune.prunable import check_model, owners_of, weights_by_path


class MaskConstraint(keras.constraints.Constraint):
    """Applies the user's own constraint and then zeroes the pruned weights.

    Args:
        variable: The weights; their own constraint is kept inside.
        mask: A variable that holds the mask and belongs to somebody else; `None` makes one.
    """

    def __init__(self, variable: keras.Variable, mask: keras.Variable | None = None):
        _meet_steps()
        self.inner: Callable[[Any], Any] | None = variable.constraint
        self.is_weight = mask is not None
        # A boolean takes a quarter of a float32's memory, and where() gives no NaN.
        if mask is None:
            mask = keras.Variable("ones", shape=variable.shape, dtype="bool", trainable=False, name="mask")
        self.mask = mask
        # A variable, because a compiler drops the addition of a constant 0, which is what turns -0.0 into 0.0.
        self._zero = keras.Variable("zeros", shape=(), dtype=variable.dtype, trainable=False, name="zero")
        self.models: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self._kept: Any = None  # while a step is traced, the mask as it was read for the gradients
        self._is_added = False

    def __call__(self, value: Any) -> Any:
        """The constrained weights, as Keras asks for them after each update."""
        return self.masked(value if self.inner is None else self.inner(value))

    def masked(self, value: Any) -> Any:
        """-0.0 where the mask is `False`; what is kept is never -0.0."""
        value = keras.ops.convert_to_tensor(value)
        # Of NumPy, because TensorFlow keeps Python's numbers by their value, and would give a 0.0 that it has.
        pruned = keras.ops.convert_to_tensor(np.array(-0.0), value.dtype)
        if not self._is_added or self.inner is not None:  # what was added to a kept weight left no -0.0
            value = value + keras.ops.cast(self._zero, value.dtype)
        return keras.ops.where(self._read(), value, pruned)

    def masked_gradient(self, gradient: Any) -> Any:
        """0 where the mask is `False`: the one place that sees the gradient of all weights in training."""
        gradient = keras.ops.convert_to_tensor(gradient)
        return keras.ops.where(self._read(), gradient, keras.ops.zeros((), gradient.dtype))

    def _read(self) -> Any:
        return keras.ops.cast(self.mask, "bool") if self._kept is None else self._kept

    @contextlib.contextmanager
    def in_step(self, is_added: bool) -> Iterator[None]:
        """Reads the mask once for a step of the optimizer.

        Args:
            is_added: Whether the optimizer changes weights by sums alone. A sum of what is not -0.0 is none.
        """
        try:
            self._kept, self._is_added = self._read(), is_added
            yield
        finally:
            self._kept, self._is_added = None, False


def mask_held(variable: Any) -> MaskConstraint | None:
    """What holds the mask of this variable, if it has one."""
    constraint = getattr(variable, "constraint", None)
    return constraint if isinstance(constraint, MaskConstraint) else None


# What held the masks of each layer, by the variable's name: `quantize` replaces the variable, and the zeros stay.
_remembered: weakref.WeakKeyDictionary[keras.Layer, dict[str, MaskConstraint]] = weakref.WeakKeyDictionary()
_released: weakref.WeakSet[keras.Model] = weakref.WeakSet()


def hold(layer: keras.Layer | None, variable: keras.Variable, mask: keras.Variable | None = None) -> None:
    """Makes this variable have a mask, that of a variable of somebody else's or one of ones."""
    variable.constraint = MaskConstraint(variable, mask)
    if layer is not None:
        _remembered.setdefault(layer, {})[variable.name] = variable.constraint


def mask_remembered(layer: keras.Layer, name: str) -> MaskConstraint | None:
    """What held the mask of the layer's variable of this name, as long as masks were not removed."""
    return _remembered.get(layer, {}).get(name)


# Optimizers of Keras that change weights by sums; others set them, or may.
_NAMES = (
    "SGD",
    "Adam",
    "AdamW",
    "Adamax",
    "Nadam",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adafactor",
    "Lamb",
    "Lion",
    "Muon",
)
_ADDING = tuple(getattr(keras.optimizers, name, None) for name in _NAMES)
# Where a row and a column have no gradient at all it divides 0 by 0, and all of the kernel becomes NaN.
_DIVIDES_BY_GRADIENTS = keras.optimizers.Adafactor


# -- where a step begins and ends ---------------------------------------------------------------------


def _meet_steps() -> None:
    """From the first mask on, every optimizer of Keras is given masked gradients; Keras has no hook before a step.

    An optimizer with an `apply` of its own comes to this one in the end, and may do more before and after. In `fit`,
    and wherever it is called by `apply_gradients`, it is met there as well, and what it wrote is masked.
    """
    optimizer = keras.optimizers.Optimizer
    if hasattr(optimizer.apply, "masks_gradients"):
        return
    apply, apply_gradients = optimizer.apply, optimizer.apply_gradients

    @functools.wraps(apply)
    def masked_apply(self: Any, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        variables = getattr(self, "_trainable_variables", ()) if trainable_variables is None else trainable_variables
        variables = list(variables)
        with contextlib.ExitStack() as stack:
            for constraint in filter(None, map(mask_held, variables)):
                stack.enter_context(constraint.in_step(type(self) in _ADDING and not self.ema_overwrite_frequency))
            if len(variables) == len(grads) and not isinstance(self, _DIVIDES_BY_GRADIENTS):
                grads = _masked_gradients(grads, variables)
            apply(self, grads, trainable_variables if trainable_variables is None else variables)
        _mask_averages(self)  # recorded before the constraint, of what an update like Muon's makes of all weights

    @functools.wraps(apply_gradients)
    def masked_apply_gradients(self: Any, grads_and_vars: Any) -> Any:
        pairs = list(grads_and_vars)
        held = [variable for _, variable in pairs if mask_held(variable)]
        if not held or type(self).apply is masked_apply:
            return apply_gradients(self, pairs)
        gradients, variables = zip(*pairs, strict=True)
        result = apply_gradients(self, list(zip(_masked_gradients(gradients, variables), variables, strict=True)))
        if not type(self).apply.__module__.startswith("keras."):
            for variable in held:
                variable.assign(variable.constraint.masked(variable))
        return result

    masked_apply.masks_gradients = True  # type: ignore[attr-defined]
    optimizer.apply, optimizer.apply_gradients = masked_apply, masked_apply_gradients


def _masked_gradients(gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    held = map(mask_held, variables)
    return [
        g if g is None or constraint is None else constraint.masked_gradient(g)
        for g, constraint in zip(gradients, held, strict=True)
    ]


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizer, and those that it hands its work on to."""
    if optimizer is not None:
        yield optimizer
        for inner in (getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())):
            yield from _parts(inner)


def _averages(optimizer: Any) -> list[tuple[Any, keras.Variable]]:
    """The weights and the averages that `use_ema=True` keeps of them and writes back at the end of `fit`."""
    if not getattr(optimizer, "use_ema", False) or not optimizer.built:
        return []
    pairs = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def _mask_averages(optimizer: Any) -> None:
    for variable, average in _averages(optimizer):
        constraint = mask_held(variable)
        if constraint is not None:
            average.assign(constraint.masked(average))


def _slots(optimizer: Any, variable: keras.Variable) -> Iterator[keras.Variable]:
    """What the optimizer keeps for this variable, one value for each weight: momentum, averages, copies, gradients."""
    for part in _parts(optimizer):
        known = getattr(part, "_trainable_variables", ()) if part.built else ()
        lists = [slots for slots in vars(part).values() if isinstance(slots, list) and len(slots) == len(known)]
        for index in [i for i, one in enumerate(known) if one is variable]:
            for slot in (slots[index] for slots in lists):
                if isinstance(slot, keras.Variable) and slot is not variable and slot.shape == variable.shape:
                    yield slot


# -- masks that come and go ---------------------------------------------------------------------------


def apply_masks(model: keras.Model, masks: Mapping[str, np.ndarray]) -> None:
    """Zeroes the pruned weights and keeps them zero in everything that trains the model from here on.

    `weight <- where(mask, weight, 0)`, now and after each step of the optimizer, and `gradient <- where(mask, gradient,
    0)` before it: the step is that of the sparse network, also where the gradient's norm is clipped. What the model's
    optimizer keeps for pruned weights (momentum, averages) is cleared. The user's own constraint still applies, before
    the mask. A mask that the variable already has is replaced; weights of variables that `masks` does not name are left
    alone. Works before and after `compile`, and after a first `fit`. Masks of a model that was built again or loaded,
    whose paths Keras may have changed, are matched by the names that layers were given, and in model order where they
    were given none. Pruned weights become -0.0, from which `masks_of` knows them again after saving and loading.

    From the first mask on, all optimizers of Keras mask gradients so, in `fit` and in loops of one's own that call
    `optimizer.apply` or `apply_gradients`; but for `Adafactor`, which gives NaN where the gradients of a row and of a
    column are 0, and so gets dense ones. What a loop does with gradients before that, such as clipping, it does with
    dense ones: use `mask_gradients` there.

    Args:
        model: A built `keras.Model`: the one that is trained, if it has others inside. A train function that an outer
            model traced in an earlier `fit`, and a step of one's own that was traced before, are not made anew;
            `masks_of` says so when their masks do not hold.
        masks: `Masks`, or a mapping of `variable.path` to boolean array, of any float weights of the model.

    Raises:
        ValueError: If a key or a shape does not fit; nothing is changed then.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> path = model.layers[0].kernel.path
    >>> apply_masks(model, {path: np.array([[True, False], [False, False]])})
    >>> from tf_prune import masks_of
    >>> masks_of(model).num_kept
    1
    """
    check_model(model)
    new = fitted(model, masks if isinstance(masks, Masks) else Masks(masks))
    variables, owners = weights_by_path(model), owners_of(model)
    is_new = False
    for path in _check_quantized(owners, {path: variables[path] for path in new}, new):
        variable, mask = variables[path], new[path]
        if mask_held(variable) is None:
            with model.distribute_strategy.scope():  # a mask on each device that has the weights
                hold(owners.get(id(variable)), variable)
        constraint = variable.constraint
        is_new = is_new or model not in constraint.models
        constraint.models.add(model)
        constraint.mask.assign(mask)
        for value in (variable, *_slots(getattr(model, "optimizer", None), variable)):
            value.assign(constraint.masked(value))
    if is_new:
        _retrace(model)


def _check_quantized(
    owners: Mapping[int, keras.Layer], variables: Mapping[str, keras.Variable], masks: Mapping[str, np.ndarray]
) -> list[str]:
    """The paths but for those of quantized kernels, which are not trained and so keep the zeros that they have."""
    quantized = {p: owners[id(v)] for p, v in variables.items() if is_quantized_kernel(owners.get(id(v)), v)}
    for path, layer in quantized.items():
        if multiplied(layer, variables[path])[~masks[path]].any():
            raise ValueError(
                f"The kernel {path!r} is quantized to {layer.quantization_mode}, and the mask prunes integers of it "
                "that are not zero. Prune the model before model.quantize: its zeros stay zero."
            )
    return [path for path in masks if path not in quantized]


def remove_masks(model: keras.Model) -> None:
    """Takes the masks off: pruned weights stay zero, and are free to grow again in training.

    Args:
        model: A built `keras.Model`, with or without masks.
    """
    check_model(model)
    for variable in weights_by_path(model).values():
        constraint = mask_held(variable)
        if constraint is not None:
            constraint.mask.assign(keras.ops.ones_like(constraint.mask))
            for value in (variable, *_slots(getattr(model, "optimizer", None), variable)):
                value.assign(constraint.masked(value))  # 0.0: nothing says any more that it was pruned
            if not constraint.is_weight:
                variable.constraint = constraint.inner
        elif keras.backend.is_float_dtype(variable.dtype):
            weights = np.asarray(variable)
            if is_pruned(weights).any():
                variable.assign(np.where(is_pruned(weights), np.zeros((), weights.dtype), weights))
    for layer in model._flatten_layers():
        _remembered.pop(layer, None)
    _released.add(model)
    _retrace(model)


def was_released(model: keras.Model) -> bool:
    """Whether its masks were removed: its zeros are no surprise."""
    return model in _released


def rewind(model: keras.Model, weights: Sequence[np.ndarray]) -> None:
    """Sets the weights of a pruned model and leaves its masks: what is pruned stays zero.

    `model.set_weights` and `load_weights` make a pruned network dense until the next step of its optimizer, and a file
    that is saved then has no masks. Slots of the optimizer stay as they are; `compile` anew clears them.

    Args:
        model: A `keras.Model` with masks.
        weights: As `model.get_weights()` gives them.

    Raises:
        ValueError: If the model has no masks, or the weights do not fit; nothing is changed then.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> initial = model.get_weights()
    >>> apply_masks(model, {model.layers[0].kernel.path: np.eye(2, dtype=bool)})
    >>> rewind(model, initial)
    >>> np.flatnonzero(model.get_weights()[0])
    array([0, 3])
    """
    check_model(model)
    held = {path: mask_held(v) for path, v in weights_by_path(model).items()}
    masks = {path: np.asarray(c.mask) != 0 for path, c in held.items() if c is not None}
    if not masks:
        raise ValueError(
            f"The model {model.name!r} has no masks attached, so there is nothing to keep. Use model.set_weights, or "
            "attach them first: apply_masks(model, masks_of(model))."
        )
    shapes = [tuple(variable.shape) for variable in model.weights]
    found = [tuple(np.shape(array)) for array in weights]
    if found != shapes:
        raise ValueError(
            f"The weights do not fit the model {model.name!r}: expected {len(shapes)} arrays as model.get_weights() "
            f"gives them, of shapes {shapes}, got {found}."
        )
    model.set_weights(list(weights))
    apply_masks(model, masks)


def is_pruned(weights: np.ndarray) -> np.ndarray:
    """Where weights are -0.0."""
    return (weights == 0) & np.signbit(weights)


def mask_gradients(gradients: Sequence[Any], variables: Sequence[keras.Variable]) -> list[Any]:
    """The gradients with zeros where a weight is pruned, for what a loop of one's own does with them.

    `gradient <- where(mask, gradient, 0)`. An optimizer of Keras does so by itself; an update without one, and clipping
    before one, need this. Momentum of one's own must be masked too, and weights be zero to begin with, as `apply_masks`
    makes them.

    Args:
        gradients: One for each variable; `None` stays `None`.
        variables: The `keras.Variable`s, such as `model.trainable_variables`; those without a mask are left alone.

    Raises:
        TypeError: If a variable is none of Keras, which has no mask whatever it was made from.
        ValueError: If there are not as many gradients as variables.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> apply_masks(model, {model.layers[0].kernel.path: np.array([[True], [False]])})
    >>> np.asarray(mask_gradients([np.ones((2, 1))], model.trainable_variables)[0]).ravel()
    array([1., 0.])
    """
    gradients, variables = list(gradients), list(variables)
    if len(gradients) != len(variables):
        raise ValueError(f"Expected a gradient for each variable, got {len(gradients)} for {len(variables)}.")
    for variable in variables:
        if not isinstance(variable, keras.Variable):
            raise TypeError(
                f"Expected variables of Keras, such as model.trainable_variables, got {type(variable).__name__}: "
                "nothing says which mask it has."
            )
    return _masked_gradients(gradients, variables)


def _retrace(model: keras.Model) -> None:
    """A train function that was traced in an earlier `fit` does not know a new constraint: make it anew."""
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
