"""Which sizes of its inputs a model leaves open, by what it says and by trying; and its inputs at other sizes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tf_prune.examples import rows
from tf_prune.quiet import quiet
from tf_prune.saved_model import Shape, can_be_traced

# Twice the size, which what pools and strides divides too; the next, which is odd where it is even; or smaller ones.
_CHANGES: tuple[Callable[[int], int], ...] = (lambda n: 2 * n, lambda n: n + 1, lambda n: n // 2, lambda n: n - 1)
_FEW = 4


def batch_size_of(model: keras.Model) -> int | None:
    """The batch size that the model's inputs fix; mostly none."""
    return next((tensor.shape[0] for tensor in getattr(model, "inputs", None) or []), None)


def stated_shapes(model: keras.Model, leaves: Sequence[Any]) -> list[Shape] | None:
    """What the model says of its inputs' shapes, `None` where a size is open; `None` if it says nothing."""
    tensors = getattr(model, "inputs", None) or []
    return [tuple(tensor.shape) for tensor in tensors] if len(tensors) == len(leaves) else None


def open_shapes(model: keras.Model, examples: Any) -> tuple[list[Shape], bool]:
    """The shapes that a graph of a model takes, `None` where any size does; and whether the model takes no others.

    A functional model says it. A subclassed one says nothing, and what a `Sequential` says may only be the shape of its
    first call: of those each size is tried. Where Python code counts a size, no graph can be made with it open.

    Args:
        model: A built `keras.Model`.
        examples: Inputs that it takes.
    """
    leaves = keras.tree.flatten(examples)
    stated = stated_shapes(model, leaves)
    if stated is not None and not isinstance(model, keras.Sequential):
        found = stated
    else:
        found = _found_open(model, examples, stated or [leaf.shape for leaf in leaves])
    if all(None not in shape[1:] for shape in found):
        return found, True
    if can_be_traced(model, examples, found):
        return found, True
    return [(own[0], *leaf.shape[1:]) for own, leaf in zip(found, leaves, strict=True)], False


def _found_open(model: keras.Model, examples: Any, start: Sequence[Shape]) -> list[Shape]:
    """The shapes, with `None` for each size that may be another one."""
    few = rows(examples, None, 2)

    def run(inputs: Any) -> Any:
        return model(inputs, training=False)

    shapes = [list(shape) for shape in start]
    for axis, size in sorted({(a, n) for leaf in keras.tree.flatten(few) for a, n in enumerate(leaf.shape)}):
        # Inputs of one length are of one length together.
        alike = [i for i, leaf in enumerate(keras.tree.flatten(few)) if leaf.shape[axis : axis + 1] == (size,)]
        marked = [tuple(None if a == axis and i in alike else 0 for a in range(len(s))) for i, s in enumerate(shapes)]
        if any(shapes[i][axis] is not None for i in alike) and next(at_other_sizes(run, few, marked), None) is not None:
            for i in alike:
                shapes[i][axis] = None
    return [tuple(shape) for shape in shapes]


def at_other_sizes(run: Callable[[Any], Any], examples: Any, shapes: Sequence[Shape]) -> Iterator[Any]:
    """A few examples at up to two other sizes, all that are open changed at once; none that the model refuses.

    Args:
        run: The model.
        examples: Inputs that it takes.
        shapes: One a leaf of the examples, `None` where a size is open.
    """
    few, found = rows(examples, None, _FEW), 0
    for change in _CHANGES:
        other = keras.tree.pack_sequence_as(
            examples, [_resized(*pair, change) for pair in zip(keras.tree.flatten(few), shapes, strict=True)]
        )
        if found < 2 and _sizes(other) != _sizes(few) and _runs(run, other):
            found += 1
            yield other


def _sizes(inputs: Any) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in keras.tree.flatten(inputs)]


def _resized(array: np.ndarray, shape: Shape, change: Callable[[int], int]) -> np.ndarray:
    """Its own values, repeated or cut: words of a vocabulary stay words of it."""
    for axis, size in enumerate(shape):
        if size is None:
            now = array.shape[axis]
            array = np.take(array, np.arange(max(1, change(now))) % now, axis)
    return array


def _runs(run: Callable[[Any], Any], inputs: Any) -> bool:
    try:
        with quiet():
            run(inputs)
    except Exception:  # Each layer refuses a size in its own way.
        return False
    return True
