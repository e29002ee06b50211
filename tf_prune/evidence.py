"""What masks a model has: those that are attached, or those that its weights tell; and whether they hold."""

import functools
import math
import warnings
import weakref
from collections.abc import Mapping

import keras
import numpy as np

from tf_prune.effective import is_quantized_kernel, multiplied
from tf_prune.enforcement import (
    MaskConstraint,
    apply_masks,
    is_pruned,
    mask_held,
    mask_remembered,
    was_released,
)
from tf_prune.masks import Masks
from tf_prune.prunable import check_model, find_kernels, owners_of, weights_by_path

_said: weakref.WeakKeyDictionary[keras.Model, set[str]] = weakref.WeakKeyDictionary()

# Of integers: which fraction of zeros rounding alone does not make.
_MOST_ROUNDED = {"int8": 0.25, "int4": 0.6}


def masks_of(model: keras.Model, from_zeros: bool = False) -> Masks:
    """The masks of a model: attached to it, or told by its weights; empty if there are none.

    What is attached is what counts, also for layers that `model.quantize` made integer ones. Where nothing is attached,
    the weights tell: pruned ones are -0.0. So a model that was saved while it had masks, in whatever format, and built
    or loaded again (or copied) has none attached, but `apply_masks(model, masks_of(model))` makes them hold again.

    Its `status` says what the masks are:

    - `"holding"`: attached, and every weight that they prune is zero in what the layers multiply by;
    - `"told"`: by the weights;
    - `"ambiguous"`: some kernels have zeros of which nobody can tell what made them (products with a mask and proximal
      steps give zeros of either sign, quantization rounds to zero). Float kernels are left out then;
    - `"not holding"`: attached, but some of the weights that they prune are not zero;
    - `""`: there are none.

    Args:
        model: A built `keras.Model`.
        from_zeros: Takes every weight of the kernels that is zero for pruned, whatever made it so: another toolkit, a
            multiplication by hand, an average of pruned weights, an initializer of zeros.

    Warns:
        UserWarning: Once for a model, where masks do not hold or are ambiguous; it says what to do.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> masks_of(model)
    <Masks of 0 variables: 0 of 0 weights kept>
    >>> weights = np.array([[1.0, -0.0], [-0.0, 2.0]])  # the sign of a zero tells
    >>> model.set_weights([weights, np.zeros(2)])
    >>> masks_of(model).num_kept, masks_of(model).status
    (2, 'told')
    """
    check_model(model)
    owners, variables = owners_of(model), weights_by_path(model)
    if from_zeros:
        kernels = find_kernels(model, ())
        kernels |= {path: v for path, v in variables.items() if is_quantized_kernel(owners.get(id(v)), v)}
        zeros = {path: multiplied(owners.get(id(v)), v) != 0 for path, v in kernels.items()}
        return Masks(zeros, status="told" if zeros else "")
    attached = {path: mask for path, v in variables.items() if (mask := _attached(owners.get(id(v)), v)) is not None}
    broken = [p for p, mask in attached.items() if multiplied(owners.get(id(variables[p])), variables[p])[~mask].any()]
    told, doubtful = _told({path: v for path, v in variables.items() if path not in attached}, model, owners)
    if told and not attached:  # those of which nothing was pruned had masks as well
        whole = (path for path in find_kernels(model, ()) if path not in told and path not in doubtful)
        told |= {path: np.ones(variables[path].shape, bool) for path in whole}
    if broken:
        _say(model, "not holding", _why_not_holding(model, broken, owners, variables))
    if doubtful:
        _say(model, "ambiguous", _doubt(model, doubtful))
    found = attached | told
    status = "not holding" if broken else "ambiguous" if doubtful else "told" if told else "holding" if found else ""
    return Masks({path: found[path] for path in variables if path in found}, status=status)


def unmasked(model: keras.Model) -> list[str]:
    """Paths of the variables of which weights that the attached mask prunes are not zero."""
    held = {path: (v, mask_held(v)) for path, v in weights_by_path(model).items()}
    return [p for p, (v, c) in held.items() if c is not None and np.asarray(v)[~mask_array(c)].any()]


def check_masks_hold(model: keras.Model) -> None:
    """Raises if weights that the attached masks prune are not zero: what is measured would be of another network.

    Raises:
        ValueError: That says how to mask them again.
    """
    broken = unmasked(model)
    if broken:
        raise ValueError(
            f"Pruned weights of {_few(broken)} in {model.name!r} are not zero: set_weights, load_weights, or a step "
            "that was traced before the masks, wrote them. Mask them again by tf_prune.rewind(model, "
            "model.get_weights()), or tf_prune.apply_masks(model, tf_prune.masks_of(model)); "
            "tf_prune.remove_masks(model) makes it the dense network."
        )


def mask_again(model: keras.Model) -> None:
    """Masks what a callback or a loop wrote where the attached masks prune, and says so once."""
    broken = unmasked(model)
    if broken:
        _say(
            model,
            "masked again",
            f"Weights that the masks of {model.name!r} prune were not zero in {_few(broken)}, and were set to zero: "
            "weights of an epoch that was less sparse were restored or loaded (the best ones?), or something wrote "
            "weights behind the optimizer. The network is not the one that was restored. Let callbacks that keep the "
            "best weights begin when the last pruning is over; tf_prune.rewind(model, weights) is for weights that are "
            "meant to be masked.",
        )
        constraints = {path: mask_held(v) for path, v in weights_by_path(model).items() if path in broken}
        apply_masks(model, {path: mask_array(c) for path, c in constraints.items() if c is not None})


def sparsity_of_model(model: keras.Model, masks: Mapping[str, np.ndarray]) -> tuple[float, dict[str, float]]:
    """The fraction of all the model's kernels that is pruned and really zero, and that of each kernel with a mask.

    All kernels are all float weights with two axes or more, embeddings and layers that nobody asked to prune included.
    """
    owners, total, pruned, of_each = owners_of(model), 0, 0, dict[str, float]()
    for path, variable in weights_by_path(model).items():
        mask = masks.get(path)
        if mask is None and not _is_matrix(owners.get(id(variable)), variable):
            continue
        size = math.prod(variable.shape) if mask is None else mask.size
        zeros = 0
        if mask is not None:
            zeros = int(np.count_nonzero(multiplied(owners.get(id(variable)), variable)[~mask] == 0))
            of_each[path] = zeros / size
        if len(variable.shape) > 1:
            total, pruned = total + size, pruned + zeros
    return pruned / total if total else 0.0, of_each


def warn_of_unknown_zeros(model: keras.Model, variables: Mapping[str, keras.Variable], masks: Masks | None) -> None:
    """Says so, once, where much of these kernels is exactly zero and nothing says that it was pruned."""
    if was_released(model) or not {"ambiguous", "unknown zeros"}.isdisjoint(_said.get(model, ())):
        return
    found, zeros_in_all, total = 0, 0, 0
    for path, variable in variables.items():
        weights = np.asarray(variable)
        total += weights.size
        unmasked = weights == 0 if masks is None or path not in masks else (weights == 0) & masks[path]
        if unmasked.any():
            held = mask_held(variable)
            zeros = unmasked & _scattered_zeros(weights)
            made = _constrained(weights, zeros, variable.constraint if held is None else held.inner)
            found += int(np.count_nonzero(zeros & (made != 0)))
            zeros_in_all += int(np.count_nonzero(unmasked))
    if found > 0.05 * total:
        _say(
            model,
            "unknown zeros",
            f"{zeros_in_all / total:.0%} of the prunable weights of {model.name!r} are exactly zero already, and "
            "nothing says that they were pruned: an average of pruned weights, or another toolkit? Here they count as "
            "weights like the others. If they are to stay zero, call apply_masks(model, masks_of(model, "
            "from_zeros=True)) first.",
        )


# -- what the weights tell ----------------------------------------------------------------------------


def _attached(layer: keras.Layer | None, variable: keras.Variable) -> np.ndarray | None:
    """The mask that is attached, or was until `quantize` or another constraint took the place of what held it."""
    constraint = mask_held(variable)
    is_kernel = keras.backend.is_float_dtype(variable.dtype) or is_quantized_kernel(layer, variable)
    if constraint is None and layer is not None and is_kernel:
        constraint = mask_remembered(layer, variable.name)
        if constraint is not None and constraint.mask.shape != multiplied(layer, variable).shape:
            constraint = None
    return None if constraint is None else mask_array(constraint)


def mask_array(constraint: MaskConstraint) -> np.ndarray:
    """The mask as an array of booleans."""
    return np.asarray(constraint.mask) != 0


def _told(
    variables: Mapping[str, keras.Variable], model: keras.Model, owners: Mapping[int, keras.Layer]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The masks that weights tell by the signs of their zeros, and the kernels of which nobody can tell."""
    known = find_kernels(model)
    told, doubtful, vague = dict[str, np.ndarray](), list[str](), dict[str, np.ndarray]()
    for path, variable in variables.items():
        layer = owners.get(id(variable))
        if is_quantized_kernel(layer, variable):
            weights = multiplied(layer, variable)
            if np.mean(weights == 0) > _MOST_ROUNDED[getattr(layer, "quantization_mode", "int8")]:
                told[path] = weights != 0
                doubtful.append(path)
        elif path in known or (_is_matrix(layer, variable) and not type(layer).__module__.startswith("keras.")):
            weights = np.asarray(variable)
            pruned = is_pruned(weights)
            if not pruned.any():
                continue
            if weights.ndim < 2 or not (weights.any() or pruned.all()):
                vague[path] = ~pruned
            elif _is_by_chance(weights, pruned, variable.constraint):
                if _scattered_zeros(weights).any():  # a channel that is zero as a whole was never random
                    doubtful.append(path)
            else:
                told[path] = ~pruned
    # Zeros of biases, and of kernels that are nothing but zeros, are pruned where those of others clearly are.
    if told:
        return told | vague, doubtful
    return {}, [*doubtful, *(path for path in vague if len(variables[path].shape) > 1)]


def _is_by_chance(weights: np.ndarray, pruned: np.ndarray, constraint: object) -> bool:
    """Whether the zeros may have their signs from what was there before: about as many of either sign.

    Or whether the user's constraint makes a -0.0 of every negative weight, as a product with `weight >= 0` does.
    """
    negative = int(np.count_nonzero(pruned))
    positive = int(np.count_nonzero(weights == 0)) - negative
    if positive:
        return negative < 3 * positive and negative - positive < 4 * math.sqrt(negative + positive)
    return bool(is_pruned(_constrained(weights, pruned, constraint))[pruned].all())


def _constrained(weights: np.ndarray, zeros: np.ndarray, constraint: object) -> np.ndarray:
    """The weights, slightly negative where they are zero, as the user's constraint leaves them.

    If it changes the others too, it was not what came last, and the zeros are not from it: it is left out then.
    """
    probe = np.where(zeros, np.asarray(-1e-3, weights.dtype), weights)
    if not callable(constraint):
        return probe
    made = np.asarray(constraint(keras.ops.convert_to_tensor(probe)))
    return made if np.array_equal(made[~zeros], weights[~zeros]) else probe


def _scattered_zeros(weights: np.ndarray) -> np.ndarray:
    """Exact zeros in a kernel that is not zero along a whole axis there, and no initializer's pattern of one value."""
    zeros = weights == 0
    others = weights[~zeros]
    if weights.ndim < 2 or not others.size or others.size == weights.size or others.min() == others.max():
        return np.zeros(weights.shape, bool)
    whole = [np.all(zeros, tuple({*range(weights.ndim)} - {axis}), keepdims=True) for axis in range(weights.ndim)]
    return zeros & ~functools.reduce(np.logical_or, whole)


def _is_matrix(layer: keras.Layer | None, variable: keras.Variable) -> bool:
    """Whether it is a float weight with two axes or more; what a layer keeps as a state or as masks is none."""
    if len(variable.shape) < 2 or not keras.backend.is_float_dtype(variable.dtype):
        return False
    return variable.trainable if layer is None else any(variable is own for own in layer._trainable_variables)


# -- what is said -------------------------------------------------------------------------------------


def _why_not_holding(
    model: keras.Model, broken: list[str], owners: Mapping[int, keras.Layer], variables: Mapping[str, keras.Variable]
) -> str:
    has_lora = [path for path in broken if getattr(owners.get(id(variables[path])), "lora_enabled", False)]
    why = (
        f"LoRA adds a dense product to {', '.join(has_lora)}, and that is what the layers multiply by. Train without "
        "LoRA; or save and load the model, which merges the product, and prune what comes out."
        if has_lora
        else "They were set by set_weights or load_weights, or by a step that was traced before the masks were "
        "attached, such as that of an outer model that was trained before: compile that one again. "
        "tf_prune.rewind(model, model.get_weights()) makes them zero again."
    )
    return f"The masks of {model.name!r} do not hold: weights that they prune are not zero in {_few(broken)}. {why}"


def _doubt(model: keras.Model, doubtful: list[str]) -> str:
    return (
        f"{model.name!r} has exact zeros in {_few(doubtful)} of which nobody can tell whether they were pruned: a "
        "product with a mask, a proximal step or a constraint gives zeros of either sign, and quantized weights are "
        "rounded to zero. If they were, masks_of(model, from_zeros=True) takes every zero for pruned; masks that you "
        "saved say it exactly."
    )


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _say(model: keras.Model, kind: str, text: str) -> None:
    """One warning of a kind for a model."""
    said = _said.setdefault(model, set())
    if kind not in said:
        said.add(kind)
        warnings.warn(text, stacklevel=3)
