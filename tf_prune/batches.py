"""What a user calls `data`, as a stream of checked `(x, y, sample_weight)` batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

Batch = tuple[Any, Any, Any]


def _check_batch(batch: Any, index: int) -> Batch:
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        raise ValueError(
            f"Batch {index} of data must be a tuple (x, y) or (x, y, sample_weight), got {type(batch).__name__}"
            + (f" of {len(batch)} items." if isinstance(batch, (tuple, list)) else ".")
            + " Pass one tuple, or an iterable of tuples such as a batched tf.data.Dataset."
        )
    x, y, sample_weight = batch if len(batch) == 3 else (*batch, None)
    lengths = []
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        for leaf in keras.tree.flatten(part):
            if leaf is None:
                continue
            shape = np.shape(leaf)
            if not shape:
                raise ValueError(f"Batch {index} of data has a scalar in its {name}; expected arrays (batch, ...).")
            lengths.append((name, shape[0]))
            array = keras.ops.convert_to_numpy(leaf)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(
                    f"Batch {index} of data has NaN or infinity in its {name}, and its scores would mean nothing. "
                    "Clean the data first."
                )
    if len({length for _, length in lengths}) > 1:
        raise ValueError(f"The parts of batch {index} of data differ in length: {dict(lengths)}.")
    if not lengths or lengths[0][1] == 0:
        raise ValueError(f"Batch {index} of data is empty. Scoring needs at least one example.")
    return x, y, sample_weight


def inputs_like(model: keras.Model, fill: Callable[[tuple[int, ...], str], np.ndarray]) -> Any:
    """Inputs of the structure and shapes that the model says, or `None` if it does not (subclassed, or of any size).

    Args:
        model: A built `keras.Model`.
        fill: Makes an array of a shape, without the batch's axis, and a dtype.
    """
    inputs = getattr(model, "inputs", None)
    if not inputs or any(None in tensor.shape[1:] for tensor in inputs):
        return None
    arrays = [fill(tuple(tensor.shape[1:]), tensor.dtype) for tensor in inputs]
    structure = getattr(model, "input", None)  # a Sequential model has none
    return arrays[0] if structure is None else keras.tree.pack_sequence_as(structure, arrays)


class Batches:
    """One `(x, y)` batch or an iterable of them, read as often and as far as the caller asks.

    A tuple is one batch; anything else (list, `tf.data.Dataset`, `keras.utils.PyDataset`, generator) is an
    iterable of batches. Nothing is kept: each pass reads the data anew.

    Args:
        data: The examples, or `None`: then asking for a batch is an error, and a method that asks for none works.

    Raises:
        ValueError: When read, if the data is missing, empty, endless where all of it is asked for, or not finite.

    Attributes:
        example: The first inputs that were read, up to 8; `None` before that.

    >>> [x.shape for x, y, _ in Batches((np.ones((4, 2)), np.ones(4)))]
    [(4, 2)]
    """

    def __init__(self, data: Any):
        if data is not None and not isinstance(data, (Iterable, keras.utils.PyDataset)):
            raise ValueError(f"data must be an (x, y) tuple or an iterable of such tuples, got {type(data).__name__}.")
        self._data: Any = [data] if isinstance(data, tuple) else data
        self._is_checked = False
        self.example: Any = None
        self._endless: Iterator[Batch] | None = None

    @property
    def given(self) -> bool:
        """Whether there is any data."""
        return self._data is not None

    @property
    def once_only(self) -> bool:
        """Whether the data is a generator, which can be read a single time."""
        return isinstance(self._data, Iterator)

    def __iter__(self) -> Iterator[Batch]:
        cardinality = getattr(self._data, "cardinality", None)
        if callable(cardinality) and int(cardinality()) == -1:
            raise ValueError(
                "data is an endless dataset, and all of it is asked for. Limit it, for example with data.take(10)."
            )
        return self._read()

    def _read(self) -> Iterator[Batch]:
        source = self._data
        if source is None:
            raise ValueError(
                "This method scores weights by the loss on examples, but data is None. Pass data=(x, y), or an "
                "iterable of such batches."
            )
        stream = (source[i] for i in range(source.num_batches)) if isinstance(source, keras.utils.PyDataset) else source
        index = -1
        for index, batch in enumerate(stream):
            x, y, sample_weight = batch if self._is_checked else _check_batch(batch, index)
            if self.example is None:
                self.example = keras.tree.map_structure(lambda leaf: leaf[:8], x)
            yield x, y, sample_weight
        if index < 0:
            raise ValueError("data is empty: it gave no batch. If it is a generator, it may have been read before.")

    def _forever(self) -> Iterator[Batch]:
        yield from self._read()
        while not self.once_only:
            yield from self._read()
        raise ValueError(
            "data ended before the last pruning step. It is a generator, which can be read once; pass a list, a "
            "tf.data.Dataset or a keras.utils.PyDataset, which can be read again."
        )

    def take(self, count: int) -> "Batches":
        """The next `count` batches, starting over at the end of the data."""
        if self._endless is None:
            self._endless = self._forever()
        taken = Batches([next(self._endless) for _ in range(count)])
        taken._is_checked = True
        return taken
