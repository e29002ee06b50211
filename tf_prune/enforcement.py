"""The one place where a mask is held during training.

Keras applies `variable.constraint` inside the optimizer's step, right after the update. Here that
constraint sets pruned weights to zero, so that every step, every checkpoint and every export has them
exactly zero, under any optimizer.

The zero of a pruned weight is -0.0, and a kept weight is never -0.0. No random initializer draws -0.0, so the weights
alone, in whatever file they were, tell the mask that they had; files stay plain Keras files.
"""

import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tf_prune.masks import Masks
from tf_prune.prunable import check_model, find_kernels, weights_by_path


class MaskConstraint(keras.constraints.Constraint):
    """Applies the user's own constraint and then zeroes the pruned weights, and their moving average.

    Args:
        variable: The weights; their own constraint is kept inside.
        mask: A variable that holds the mask and belongs to somebody else; `None` makes one.
    """

    def __init__(self, variable: keras.Variable, mask: keras.Variable | None = None):
        self.inner: Callable[[Any], Any] | None = variable.constraint
        self.is_weight = mask is not None
        # A boolean takes a quarter of a float32's memory, and where() gives no NaN.
        if mask is None:
            mask = keras.Variable("ones", shape=variable.shape, dtype="bool", trainable=False, name="mask")
        self.mask = mask
        # A variable, because a compiler drops the addition of a constant 0, which is what turns -0.0 into 0.0.
        self._zero = keras.Variable("zeros", shape=(), dtype=variable.dtype, trainable=False, name="zero")
        self.models: weakref.WeakSet[keras.Model] = weakref.WeakSet()

    def __call__(self, value: Any) -> Any:
        """The constrained weights, as Keras asks for them after each update."""
        # Keras passes the variable itself, whose moving average has just been updated with unmasked weights.
        for average in _moving_averages(_calling_optimizer(), value):
            average.assign(self.masked(average))
        return self.masked(value if self.inner is None else self.inner(value))

    def masked(self, value: Any) -> Any:
        """-0.0 where the mask is `False`; what is kept is never -0.0."""
        value = keras.ops.convert_to_tensor(value)
        # Of NumPy, because TensorFlow keeps Python's numbers by their value, and would give a 0.0 that it has.
        pruned = keras.ops.convert_to_tensor(np.array(-0.0), value.dtype)
        return keras.ops.where(
            keras.ops.cast(self.mask, "bool"), value + keras.ops.cast(self._zero, value.dtype), pruned
        )


def _calling_optimizer() -> Any:
    """The optimizer in whose step this constraint is called; Keras does not say, and it need not be the model's.

    Runs while a step is traced, not in each step.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), keras.optimizers.Optimizer):
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def _moving_averages(optimizer: Any, variable: Any) -> list[keras.Variable]:
    """The averages that `use_ema=True` keeps of this variable and writes back at the end of `fit`, if there are any."""
    inner = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", [])]
    found = [average for one in inner if one is not None for average in _moving_averages(one, variable)]
    if not getattr(optimizer, "use_ema", False) or not optimizer.built:
        return found
    averages = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
    return found + [average for known, average in averages if known is variable and average is not None]


def fitted(variables: Mapping[str, keras.Variable], masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks under this model's own paths; raises if they do not fit.

    Keras names variables anew when a model is built again or loaded: `mlp/hidden/kernel` comes back as `hidden/kernel`.
    So masks of all the model's kernels also fit if they have the kernels' own names and shapes, one by one in order.
    """

    def form(path: str, shape: Iterable[int]) -> tuple[str, tuple[int, ...]]:
        return path.rsplit("/", 1)[-1].split("@")[0], tuple(shape)

    unknown = [path for path in masks if path not in variables]
    if unknown:
        # Tables of embeddings, and biases, are among the masks only if they were asked for.
        for left_out in ((), ("embeddings",), ("bias",), ("embeddings", "bias")):
            kernels = [path for path in variables if form(path, ())[0] not in left_out]
            if [form(p, variables[p].shape) for p in kernels] == [form(p, mask.shape) for p, mask in masks.items()]:
                return dict(zip(kernels, masks.values(), strict=True))
        raise ValueError(
            f"The masks name {unknown[0]!r}, which is not a prunable variable of this model. "
            f"It has: {', '.join(variables)}."
        )
    for path, mask in masks.items():
        if mask.shape != tuple(variables[path].shape):
            raise ValueError(
                f"The mask of {path!r} has shape {mask.shape}, but the variable has {tuple(variables[path].shape)}."
            )
    return dict(masks)


def apply_masks(model: keras.Model, masks: Mapping[str, np.ndarray]) -> None:
    """Zeroes the pruned weights and keeps them zero in everything that trains the model from here on.

    `weight <- where(mask, weight, 0)`, now and after each step of the optimizer. The user's own constraint still
    applies, before the mask. A mask that the variable already has is replaced; weights of variables that `masks`
    does not name are left alone. Works before and after `compile`, and after a first `fit`. Masks of a model that was
    built again or loaded, whose paths Keras may have changed, are matched in model order. Pruned weights become -0.0,
    from which `masks_of` knows them again after saving and loading.

    Args:
        model: A built `keras.Model`: the one that is trained, if it has others inside. A train function that an outer
            model traced in an earlier `fit`, and a step of one's own that was traced before, are not made anew.
        masks: `Masks`, or a mapping of `variable.path` to boolean array.

    Raises:
        ValueError: If a key or a shape does not fit; nothing is changed then.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> path, _ = find_kernels(model)  # kernel and bias
    >>> apply_masks(model, {path: np.array([[True, False], [False, False]])})
    >>> masks_of(model).num_kept
    1
    """
    check_model(model)
    weights = weights_by_path(model)
    variables = find_kernels(model) | {path: weights[path] for path in masks if path in weights}
    is_new = False
    for path, mask in fitted(variables, masks if isinstance(masks, Masks) else Masks(masks)).items():
        variable = variables[path]
        if not isinstance(variable.constraint, MaskConstraint):
            with model.distribute_strategy.scope():  # a mask on each device that has the weights
                variable.constraint = MaskConstraint(variable)
        constraint = variable.constraint
        is_new = is_new or model not in constraint.models
        constraint.models.add(model)
        constraint.mask.assign(mask)
        for value in (variable, *_moving_averages(getattr(model, "optimizer", None), variable)):
            value.assign(constraint.masked(value))
    if is_new:
        _retrace(model)


def remove_masks(model: keras.Model) -> None:
    """Takes the masks off: pruned weights stay zero, and are free to grow again in training.

    Args:
        model: A built `keras.Model`, with or without masks.
    """
    check_model(model)
    for variable in _maskable(model).values():
        constraint = variable.constraint
        if isinstance(constraint, MaskConstraint):
            constraint.mask.assign(keras.ops.ones_like(constraint.mask))
            for value in (variable, *_moving_averages(getattr(model, "optimizer", None), variable)):
                value.assign(constraint.masked(value))  # 0.0: nothing says any more that it was pruned
            if not constraint.is_weight:
                variable.constraint = constraint.inner
        elif _is_pruned(np.asarray(variable)).any():
            variable.assign(np.where(_is_pruned(np.asarray(variable)), 0.0, np.asarray(variable)))
    _retrace(model)


def masks_of(model: keras.Model, from_zeros: bool = False) -> Masks:
    """The masks of a model: attached to it, or told by its weights; empty if there are none.

    A model that was saved while it had masks, in whatever format, and built or loaded again (or copied) has none
    attached, but its weights still tell them: `apply_masks(model, masks_of(model))` makes them hold again.

    Args:
        model: A built `keras.Model`.
        from_zeros: Takes every weight of the kernels that is zero for pruned, whatever made it so: another toolkit, a
            multiplication by hand, an initializer of zeros. Products with a mask are -0.0 in part, so that they do tell
            something without this, but not all.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> masks_of(model)
    <Masks of 0 variables: 0 of 0 weights kept>
    >>> _ = model.layers[0].kernel.assign([[0.0, 1.0], [2.0, 3.0]])
    >>> masks_of(model, from_zeros=True).num_kept
    3
    """
    check_model(model)
    if from_zeros:
        return Masks({path: np.asarray(v) != 0 for path, v in find_kernels(model, ()).items()})
    masks, certain = {}, set()
    for path, variable in _maskable(model).items():
        is_attached = isinstance(variable.constraint, MaskConstraint)
        masks[path] = np.asarray(variable.constraint.mask if is_attached else ~_is_pruned(np.asarray(variable)))
        if is_attached or not masks[path].all():
            certain.add(path)
    if certain and not any(isinstance(v.constraint, MaskConstraint) for v in model.weights):
        certain.update(find_kernels(model, ()))  # those of which nothing was pruned had masks as well
    return Masks({path: mask for path, mask in masks.items() if path in certain})


def _maskable(model: keras.Model) -> dict[str, keras.Variable]:
    """The known kernels, and whatever else has a mask."""
    kernels = find_kernels(model)
    return {
        path: variable
        for path, variable in weights_by_path(model).items()
        if path in kernels or isinstance(getattr(variable, "constraint", None), MaskConstraint)
    }


def _is_pruned(weights: np.ndarray) -> np.ndarray:
    return (weights == 0) & np.signbit(weights)


def mask_gradients(gradients: Sequence[Any], variables: Sequence[keras.Variable]) -> list[Any]:
    """The gradients with zeros where a weight is pruned, for an update that no optimizer of Keras makes.

    `gradient <- where(mask, gradient, 0)`. An optimizer of Keras applies the masks by itself. Momentum of one's own
    must be masked like this too, and weights be zero to begin with, as `apply_masks` makes them.

    Args:
        gradients: One for each variable; `None` stays `None`.
        variables: The `keras.Variable`s, such as `model.trainable_variables`; those without a mask are left alone.

    Raises:
        TypeError: If a variable is none of Keras, which has no mask whatever it was made from.
        ValueError: If there are not as many gradients as variables.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> apply_masks(model, {next(iter(find_kernels(model))): np.array([[True], [False]])})
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
    return [_masked_gradient(g, getattr(v, "constraint", None)) for g, v in zip(gradients, variables, strict=True)]


def _masked_gradient(gradient: Any, constraint: Any) -> Any:
    if gradient is None or not isinstance(constraint, MaskConstraint):
        return gradient
    gradient = keras.ops.convert_to_tensor(gradient)
    return keras.ops.where(keras.ops.cast(constraint.mask, "bool"), gradient, keras.ops.zeros_like(gradient))


def _retrace(model: keras.Model) -> None:
    """A train function that was traced in an earlier `fit` does not know a new constraint: make it anew."""
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
