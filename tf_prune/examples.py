"""One batch of examples: what may be given for it, as a checked `(x, y, sample_weight)`; and rows of it.

Its parts are what `fit` takes: arrays and tensors of numbers or strings, ragged and sparse ones, those of pandas and
SciPy, and any structure of them.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

Batch = tuple[Any, Any, Any]

_NOT_BATCHED = "If the data set is not batched, batch it first: data.batch(32)."


def is_array(part: Any) -> bool:
    """Whether it is an array or a tensor of any library, and no structure or stream of them."""
    return hasattr(part, "shape") and (hasattr(part, "dtype") or hasattr(part, "to_numpy"))


def as_batch(element: Any, index: int = 0) -> Batch:
    """What a data set gives, as `(x, y, sample_weight)`; what is not given is `None`.

    Args:
        element: A tuple or list of one to three parts, or x alone: an array, or a dict of arrays.
        index: Which batch an error speaks of.

    Raises:
        ValueError: If it is none of these.
    """
    if is_array(element) or isinstance(element, Mapping):
        element = (element,)
    if not isinstance(element, (tuple, list)) or len(element) not in (1, 2, 3):
        items = f" of {len(element)} items" if isinstance(element, (tuple, list)) else ""
        raise ValueError(
            f"Batch {index} of data must be a tuple (x, y) or (x, y, sample_weight) of arrays, or an array x where no "
            f"labels are needed; got {type(element).__name__}{items}. Pass one such tuple, or an iterable of them, for "
            "example a batched tf.data.Dataset."
        )
    x, y, sample_weight = (keras.tree.map_structure(_as_array, part) for part in (*element, None, None)[:3])
    return x, y, sample_weight


def _as_array(leaf: Any) -> Any:
    if hasattr(leaf, "to_numpy"):  # of pandas; like fit, which gives a Series an axis of features
        array = leaf.to_numpy()
        return array[:, None] if array.ndim == 1 else array
    return leaf.tocsr() if hasattr(leaf, "tocsr") else leaf  # a sparse matrix of SciPy, in the form that has rows


def check_lengths(batch: Batch, index: int = 0) -> None:
    """Raises if the parts are no arrays of one length.

    Raises:
        ValueError: That says what is wrong with which part.
    """
    lengths = []
    for name, part in zip(("x", "y", "sample_weight"), batch, strict=True):
        for leaf in keras.tree.flatten(part):
            if leaf is None:
                continue
            if not is_array(leaf) and not isinstance(leaf, (bool, int, float, str, bytes)):
                raise ValueError(f"Batch {index} of data has a {type(leaf).__name__} in its {name}; expected arrays.")
            if not is_array(leaf) or len(leaf.shape) == 0:
                raise ValueError(
                    f"Batch {index} of data has a scalar in its {name}; expected arrays (batch, ...). {_NOT_BATCHED} A "
                    "single example is x[:1], y[:1], and a Python list goes into an array."
                )
            lengths.append((name, int(leaf.shape[0])))
    if not any(name == "x" for name, _ in lengths) and lengths:
        raise ValueError(f"Batch {index} of data has no inputs: its x is None.")
    if len({length for _, length in lengths}) > 1:
        raise ValueError(f"The parts of batch {index} of data differ in length: {dict(lengths)}. {_NOT_BATCHED}")
    if not lengths or lengths[0][1] == 0:
        raise ValueError(f"Batch {index} of data is empty. Scoring needs at least one example.")


def check_values(batch: Batch, index: int = 0) -> None:
    """Raises if a number is not finite, or what should be a number or a string is neither.

    Raises:
        ValueError: That names the part.
    """
    for name, part in zip(("x", "y", "sample_weight"), batch, strict=True):
        for leaf in keras.tree.flatten(part):
            values = np.asarray(_values(leaf))
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise ValueError(
                    f"Batch {index} of data has NaN or infinity in its {name}, and its scores would mean nothing. "
                    "Clean the data first."
                )
            strange = () if values.dtype.kind != "O" or leaf is None else values.flat
            for value in strange:
                if not isinstance(value, (str, bytes)):
                    raise ValueError(
                        f"Batch {index} of data has Python objects in its {name}, among them {value!r} "
                        f"({type(value).__name__}); expected numbers or strings. Give each column of a table its own "
                        "array, in a dict, or convert it with .astype('float32')."
                    )


def _values(leaf: Any) -> Any:
    """All that is stored of it, as it is stored."""
    if hasattr(leaf, "flat_values"):  # ragged
        return leaf.flat_values
    if hasattr(leaf, "dense_shape"):
        return leaf.values
    return leaf.data if hasattr(leaf, "tocsr") else leaf


def as_numpy(leaf: Any) -> np.ndarray:
    """It as an array of NumPy, with zeros where a sparse or ragged one has nothing; no copy where it is dense."""
    if hasattr(leaf, "toarray"):
        return leaf.toarray()
    has_gaps = hasattr(leaf, "dense_shape") or hasattr(leaf, "flat_values")
    return keras.ops.convert_to_numpy(leaf) if has_gaps else np.asarray(leaf)


def size_of(batch: Any) -> int:
    """How many examples are in it."""
    return int(next(leaf.shape[0] for leaf in keras.tree.flatten(batch) if leaf is not None))


def rows(part: Any, begin: int | None, end: int | None) -> Any:
    """Some of the examples: of arrays, views.

    >>> rows({"a": np.arange(5), "b": None}, 1, 3)
    {'a': array([1, 2]), 'b': None}
    """

    def cut(leaf: Any) -> Any:
        if leaf is None or not hasattr(leaf, "dense_shape"):
            return None if leaf is None else leaf[begin:end]
        first, last, _ = slice(begin, end).indices(int(leaf.shape[0]))
        indices, values = np.asarray(leaf.indices), np.asarray(leaf.values)
        inside = (indices[:, 0] >= first) & (indices[:, 0] < last)
        indices = indices[inside] - [first, *[0] * (len(leaf.shape) - 1)]
        return type(leaf)(indices, values[inside], [last - first, *leaf.shape[1:]])

    return keras.tree.map_structure(cut, part)
