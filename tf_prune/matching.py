"""Which mask belongs to which variable where Keras has named the variables anew: by names before positions."""

import re
from collections.abc import Iterable, Mapping

import keras
import numpy as np

from tf_prune.effective import is_quantized_kernel, multiplied
from tf_prune.prunable import owners_of, weights_by_path


def fitted(model: keras.Model, masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks under this model's own paths; raises if they do not fit.

    Keras names variables anew when a model is built again or loaded: `mlp/hidden/kernel` comes back as `hidden/kernel`,
    and `dense_1/kernel` as `dense_3/kernel`. Names that somebody gave to layers must agree. What Keras named by itself
    is matched in model order, and then there must be as many variables as masks.

    Args:
        model: A built `keras.Model`.
        masks: Mapping of path to boolean array.

    Raises:
        ValueError: If a mask has no variable, or one of another shape.
    """
    shapes, owners = dict[str, tuple[int, ...]](), owners_of(model)
    for path, variable in weights_by_path(model).items():
        if keras.backend.is_float_dtype(variable.dtype):
            shapes[path] = tuple(variable.shape)
        elif is_quantized_kernel(owners.get(id(variable)), variable):
            shapes[path] = multiplied(owners.get(id(variable)), variable).shape
    if not all(path in shapes for path in masks):
        masks = _by_names(model, list(shapes), masks)
    for path, mask in masks.items():
        if mask.shape != shapes[path]:
            raise ValueError(f"The mask of {path!r} has shape {mask.shape}, but the variable has {shapes[path]}.")
    return dict(masks)


def _by_names(model: keras.Model, owns: list[str], masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    classes = {type(layer).__name__ for layer in model._flatten_layers()} | {"Functional", "Sequential"}
    automatic = re.compile(f"({'|'.join({_snake_case(name) for name in (*classes, *_KERAS)})})(_[0-9]+)?")
    wrong = None
    for outer_masks, outer_owns in ((0, 0), (1, 0), (0, 1), (1, 1)):
        groups = _grouped(masks, automatic, outer_masks * _names_of_model(masks))
        same = _grouped(owns, automatic, outer_owns * _names_of_model(owns))
        misfit = next((key for key, paths in groups.items() if len(same.get(key, ())) != len(paths)), None)
        if misfit is None:
            pairs = [pair for key, paths in groups.items() for pair in zip(same[key], paths, strict=True)]
            found = {own: masks[path] for own, path in pairs}
            return {own: found[own] for own in owns if own in found}
        wrong = wrong or (groups[misfit], same.get(misfit, []))
    assert wrong is not None  # noqa: S101 - for the type checker: the loop runs
    unnamed, count = (len(wrong[0]), len(wrong[1]))
    raise ValueError(
        f"The masks name {wrong[0][0]!r}, which is not a prunable variable of this model: of that name there are "
        f"{unnamed} masks, and {count} variables. Names that were given to layers must agree; layers without a name "
        f"are matched in order, and all of them. It has: {', '.join(owns)}."
    )


def _grouped(paths: Iterable[str], automatic: re.Pattern[str], skipped: int) -> dict[tuple[str, ...], list[str]]:
    """Paths by the names that somebody gave to their layers, in order."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        *layers, name = path.split("@")[0].split("/")[skipped:]
        groups.setdefault((*(one for one in layers if not automatic.fullmatch(one)), name), []).append(path)
    return groups


def _names_of_model(paths: Iterable[str]) -> int:
    """1 where all paths begin with the same name, which can be that of the model itself."""
    parts = [path.split("/") for path in paths]
    return int(len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 2)


def _snake_case(name: str) -> str:
    """What Keras calls a layer of this class that was given no name, but for a number behind it."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


_KERAS = [name for name in vars(keras.layers) if name[0].isupper()]
