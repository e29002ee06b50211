"""What a user calls `data`, as a stream of checked `(x, y, sample_weight)` batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        progress: What a progress bar over the batches is called; empty for none. One batch needs none.

    >>> [x.shape for x, y, _ in Batches((np.ones((4, 2)), np.ones(4)))]
    [(4, 2)]
    """

    def __init__(self, data: Any):
        if data is not None and not isinstance(data, (Iterable, keras.utils.PyDataset)):
            raise ValueError(f"data must be an (x, y) tuple or an iterable of such tuples, got {type(data).__name__}.")
        self._data: Any = [data] if isinstance(data, tuple) else data
        self._is_checked = False
        self.example: Any = None
        self.progress = ""
        self._endless: Iterator[Batch] | None = None

    @property
    def given(self) -> bool:
        """Whether there is any data."""
        return self._data is not None

    @property
    def once_only(self) -> bool:
        """Whether the data is a generator, which can be read a single time."""
        return isinstance(self._data, Iterator) or getattr(self._data, "once_only", False)

    def __iter__(self) -> Iterator[Batch]:
        cardinality = getattr(self._data, "cardinality", None)
        is_endless = isinstance(self._data, keras.utils.PyDataset) and self._data.num_batches is None
        if is_endless or (callable(cardinality) and int(cardinality()) == -1):
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
        index, bar, total = -1, None, self._num_batches()
        if isinstance(source, keras.utils.PyDataset):
            source = map(source.__getitem__, itertools.count() if total is None else range(total))
        for index, batch in enumerate(source):
            if self.progress and (index or (total or 0) > 1):
                bar = bar or keras.utils.Progbar(total, unit_name=self.progress)
                bar.update(index)
            x, y, sample_weight = batch if self._is_checked else _check_batch(batch, index)
            if self.example is None:
                self.example = keras.tree.map_structure(lambda leaf: leaf[:8], x)
            yield x, y, sample_weight
        if bar:
            bar.update(index + 1, finalize=True)
        if index < 0:
            raise ValueError("data is empty: it gave no batch. If it is a generator, it may have been read before.")

    def _num_batches(self) -> int | None:
        """How many batches there are, if the data says so."""
        if isinstance(self._data, keras.utils.PyDataset):
            return self._data.num_batches
        cardinality = getattr(self._data, "cardinality", None)
        if callable(cardinality):
            return int(cardinality()) if int(cardinality()) > 0 else None
        return len(self._data) if hasattr(self._data, "__len__") else None

    def _forever(self) -> Iterator[Batch]:
        yield from self._read()
        while not self.once_only:
            yield from self._read()
        raise ValueError(
            "data ended before the last pruning step. It is a generator, which can be read once; pass a list, a "
            "tf.data.Dataset or a keras.utils.PyDataset, which can be read again."
        )

    def halves(self) -> "Batches":
        """The same batches, each cut in the middle into two."""
        halved = Batches(_Halves(self))
        halved._is_checked = True
        return halved

    def take(self, count: int) -> "Batches":
        """The next `count` batches, starting over at the end of the data."""
        if self._endless is None:
            self._endless = self._forever()
        taken = Batches([next(self._endless) for _ in range(count)])
        taken._is_checked = True
        return taken


class _Halves:
    def __init__(self, batches: Batches):
        self._batches = batches
        self.once_only = batches.once_only

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            middle = len(keras.tree.flatten(batch)[0]) // 2
            if middle == 0:
                raise ValueError("A batch of one example has no halves. Half batches need at least 2 examples each.")
            for part in (slice(None, middle), slice(middle, None)):
                x, y, sample_weight = keras.tree.map_structure(
                    lambda leaf, part=part: None if leaf is None else leaf[part], batch
                )
                yield x, y, sample_weight


def _labels(y: Any) -> tuple[np.ndarray, np.ndarray]:
    """The labels as they are, and as one integer a row."""
    leaves = keras.tree.flatten(y)
    rows = keras.ops.convert_to_numpy(leaves[0]) if len(leaves) == 1 and leaves[0] is not None else np.zeros((0, 0, 0))
    if rows.ndim == 1 or rows.shape[1:] == (1,):
        return rows, rows.reshape(len(rows))
    if rows.ndim == 2 and np.isin(rows, (0, 1)).all() and (rows.sum(-1) == 1).all():
        return rows, rows.argmax(-1)
    shape = rows.shape if rows.size else type(y).__name__
    raise ValueError(f"Labels must be integers of shape (batch,) or one-hot rows (batch, classes); got {shape}.")


def class_balanced(data: Any, examples_per_class: int = 10, num_classes: int | None = None) -> tuple[Any, Any]:
    """One batch with the first `examples_per_class` examples of each class, sorted by class: the batch of GraSP.

    Args:
        data: An `(x, y)` batch or an iterable of them; labels are integers, or one-hot rows.
        examples_per_class: At least 1; the paper takes 10.
        num_classes: Reading stops as soon as so many classes are full; `None` takes it from one-hot rows, or reads all
            of the data and takes the classes that it finds.

    Returns:
        `(x, y)`, arrays of `examples_per_class` times the number of classes examples.

    Raises:
        ValueError: If a class has fewer examples, or a label is no class.

    >>> x, y = class_balanced((np.arange(6.0), np.array([1, 0, 1, 0, 0, 1])), examples_per_class=2)
    >>> x, y
    (array([1., 3., 0., 2.]), array([0, 0, 1, 1]))

    Source: Wang et al. 2020, Sec. 5, and their code, whose sampling stops only after a surplus example of each class.
    """
    if examples_per_class < 1:
        raise ValueError(f"examples_per_class must be at least 1, got {examples_per_class}.")
    found: dict[int, list[tuple[Any, Any]]] = {}
    batches = Batches(data)
    # With the number of classes known, data may be endless.
    for x, y, _ in batches if num_classes is None else batches._read():
        rows, labels = _labels(y)
        num_classes = rows.shape[-1] if rows.ndim > 1 and rows.shape[-1] > 1 else num_classes
        examples = keras.tree.map_structure(keras.ops.convert_to_numpy, x)
        for i, label in enumerate(labels.tolist()):
            if label != int(label) or not 0 <= label < (num_classes or np.inf):
                raise ValueError(f"The label {label} is no class: expected an integer from 0, below num_classes.")
            if len(found.setdefault(int(label), [])) < examples_per_class:  # a copy: a view would hold its whole batch
                found[int(label)].append(
                    (keras.tree.map_structure(lambda leaf, i=i: leaf[i].copy(), examples), rows[i])
                )
        if num_classes and sum(map(len, found.values())) == num_classes * examples_per_class:
            break
    classes = range(num_classes) if num_classes else sorted(found)
    short = {label: len(found.get(label, [])) for label in classes if len(found.get(label, [])) < examples_per_class}
    if short:
        counts = ", ".join(f"class {label} has {count}" for label, count in short.items())
        raise ValueError(f"data has fewer than {examples_per_class} examples of some classes: {counts}.")
    pairs = [pair for label in classes for pair in found[label]]
    return keras.tree.map_structure(lambda *leaves: np.stack(leaves), *(x for x, _ in pairs)), np.stack(
        [y for _, y in pairs]
    )


class _Labelled:
    """Batches of inputs alone as `(x, None)`; those that have labels as they are."""

    def __init__(self, data: Any):
        self._data = data
        self.cardinality = getattr(data, "cardinality", None)

    def __iter__(self) -> Iterator[Any]:
        return (batch if isinstance(batch, tuple) else (batch, None) for batch in self._data)


def maybe_unlabelled(data: Any) -> Any:
    """The data for `Batches` where labels are not needed: inputs alone, or batches of them, get `None` for labels."""
    if isinstance(data, tuple) or data is None or isinstance(data, keras.utils.PyDataset):
        return data
    if (hasattr(data, "shape") and hasattr(data, "dtype")) or isinstance(data, Mapping):
        return data, None
    return _Labelled(data) if isinstance(data, Iterable) else data
