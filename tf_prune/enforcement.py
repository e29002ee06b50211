"""The one place where a mask is held during training.

Keras applies `variable.constraint` inside the optimizer's step, right after the update. Here that
constraint sets pruned weights to zero, so that every step, every checkpoint and every export has them
exactly zero, under any optimizer.
"""

import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from tf_prune.masks import Masks
from tf_prune.prunable import check_model, find_kernels, weights_by_path


class _MaskConstraint(keras.constraints.Constraint):
    """Applies the user's own constraint and then zeroes the pruned weights, and their moving average."""

    def __init__(self, variable: keras.Variable):
        self.inner: Callable[[Any], Any] | None = variable.constraint
        # A boolean takes a quarter of a float32's memory, and where() gives +0, never -0 or NaN.
        self.mask = keras.Variable(np.ones(variable.shape, bool), dtype="bool", trainable=False, name="mask")
        self.models: weakref.WeakSet[keras.Model] = weakref.WeakSet()

    def __call__(self, value: Any) -> Any:
        # Keras passes the variable itself, whose moving average has just been updated with unmasked weights.
        for average in _moving_averages(_calling_optimizer(), value):
            average.assign(self.masked(average))
        return self.masked(value if self.inner is None else self.inner(value))

    def masked(self, value: Any) -> Any:
        value = keras.ops.convert_to_tensor(value)
        return keras.ops.where(self.mask, value, keras.ops.zeros_like(value))


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
    """The average that `use_ema=True` keeps of this variable and writes back at the end of `fit`, if there is one."""
    if not getattr(optimizer, "use_ema", False) or not optimizer.built:
        return []
    averages = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True)
    return [average for known, average in averages if known is variable and average is not None]


def _fitted(variables: Mapping[str, keras.Variable], masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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
    built again or loaded, whose paths Keras may have changed, are matched in model order.

    Args:
        model: A built `keras.Model`: the one that is trained, if it has others inside. A train function that an outer
            model traced in an earlier `fit` is not made anew.
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
    variables = find_kernels(model)
    is_new = False
    for path, mask in _fitted(variables, masks if isinstance(masks, Masks) else Masks(masks)).items():
        variable = variables[path]
        if not isinstance(variable.constraint, _MaskConstraint):
            variable.constraint = _MaskConstraint(variable)
        constraint = variable.constraint
        is_new = is_new or model not in constraint.models
        constraint.models.add(model)
        constraint.mask.assign(mask)
        optimizer = getattr(model, "optimizer", None)
        averages = _moving_averages(getattr(optimizer, "inner_optimizer", optimizer), variable)
        for value in (variable, *averages):
            value.assign(constraint.masked(value))
    if is_new:
        _retrace(model)


def remove_masks(model: keras.Model) -> None:
    """Takes the masks off: pruned weights stay zero, and are free to grow again in training.

    Args:
        model: A built `keras.Model`, with or without masks.
    """
    check_model(model)
    for variable in model.weights:
        if isinstance(variable.constraint, _MaskConstraint):
            variable.constraint = variable.constraint.inner
    _retrace(model)


def masks_of(model: keras.Model) -> Masks:
    """The masks that are attached to the model; empty if there are none.

    Args:
        model: A built `keras.Model`.
    """
    check_model(model)
    return Masks(
        {
            path: np.asarray(variable.constraint.mask)
            for path, variable in weights_by_path(model).items()
            if isinstance(variable.constraint, _MaskConstraint)
        }
    )


def _retrace(model: keras.Model) -> None:
    """A train function that was traced in an earlier `fit` does not know a new constraint: make it anew."""
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
