"""What a user calls `data`, as a stream of checked `(x, y, sample_weight)` batches."""

import copy
import inspect
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tf_prune.examples import Batch, as_batch, as_numpy, check_lengths, check_values, is_array, rows, size_of

# So many batches are read of data that does not say how many it has, which may be endless.
_MOST_UNKNOWN = 200


def inputs_like(
    model: keras.Model,
    fill: Callable[[tuple[int, ...], str], np.ndarray],
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> Any:
    """Inputs of the structure and shapes that the model says; `None` if they cannot be made up.

    That is so if it does not say them (subclassed, or of any size), or takes strings.

    Args:
        model: A built `keras.Model`.
        fill: Makes an array of a shape, without the batch's axis, and a dtype.
        shapes: Of an example of each input, where the model leaves sizes open.
    """
    inputs = getattr(model, "inputs", None)
    shapes = shapes or [tuple(tensor.shape[1:]) for tensor in inputs or ()]
    if not inputs or any(None in shape for shape in shapes) or any(tensor.dtype == "string" for tensor in inputs):
        return None
    arrays = [fill(shape, tensor.dtype) for shape, tensor in zip(shapes, inputs, strict=True)]
    structure = getattr(model, "input", None)  # a Sequential model has none
    return arrays[0] if structure is None else keras.tree.pack_sequence_as(structure, arrays)


def why_no_inputs(model: keras.Model) -> str:
    """What is in the way of `inputs_like`, said of the model."""
    takes_strings = any(tensor.dtype == "string" for tensor in getattr(model, "inputs", None) or ())
    return "takes strings" if takes_strings else "does not say of what shape its inputs are"


class Batches:
    """One batch or an iterable of them, read as often and as far as the caller asks.

    A batch is `(x, y)`, `(x, y, sample_weight)`, or x alone. A tuple, an array or a dict is one batch; anything else
    (list, `tf.data.Dataset`, `keras.utils.PyDataset`, generator) is an iterable of batches. Nothing is kept: each pass
    reads the data anew.

    Args:
        data: The examples, or `None`: then asking for a batch is an error, and a method that asks for none works.
        batch_size: Cuts one batch of arrays into batches of so many examples, which are views.
        limit: Where all is asked for, so many batches are read of data that is endless or does not say its length.

    Raises:
        ValueError: If it is no data, or is in batches and `batch_size` would cut it. When read, if the data is missing,
            empty, not finite, or may be endless where all of it is asked for.

    Attributes:
        example: The first inputs that were read, up to 8; `None` before that.
        progress: What a progress bar over the batches is called; empty for none. One batch needs none.

    >>> [x.shape for x, y, _ in Batches((np.ones((4, 2)), np.ones(4)))]
    [(4, 2)]
    >>> [len(x) for x, _, _ in Batches(np.ones((5, 2)), batch_size=2)]
    [2, 2, 1]
    """

    def __init__(self, data: Any, batch_size: int | None = None, limit: int | None = None):
        is_one = isinstance(data, (tuple, Mapping)) or is_array(data)
        if not is_one and data is not None and not isinstance(data, (Iterable, keras.utils.PyDataset)):
            raise ValueError(
                f"data must be an (x, y) tuple or an iterable of such tuples, got {type(data).__name__}. Other loaders "
                "are wrapped in a generator of tuples of arrays."
            )
        if isinstance(data, list):
            _check_no_pair(data)
        self._data: Any = [data] if is_one else data
        if batch_size is not None and data is not None:
            self._data = _Cut(data, batch_size, is_one)
        self._limit = limit
        self._was_begun = inspect.isgenerator(data) and inspect.getgeneratorstate(data) == inspect.GEN_SUSPENDED
        self._most_unknown = _MOST_UNKNOWN
        self._is_checked = False
        self.example: Any = None
        self.progress = ""
        self._endless: Iterator[Batch | None] | None = None
        self._in_a_pass: int | None = None  # known when the first pass is over

    @property
    def given(self) -> bool:
        """Whether there is any data."""
        return self._data is not None

    @property
    def once_only(self) -> bool:
        """Whether the data is a generator, which can be read a single time."""
        return isinstance(self._data, Iterator) or getattr(self._data, "once_only", False)

    @property
    def length(self) -> float | None:
        """How many batches there are: infinity if it is endless, `None` if the data does not say."""
        if isinstance(self._data, keras.utils.PyDataset):
            try:
                count = self._data.num_batches
            except NotImplementedError:
                count = None
            return math.inf if count is None else int(count)
        cardinality = getattr(self._data, "cardinality", None)
        count = int(cardinality()) if callable(cardinality) else operator.length_hint(self._data, -2)
        return {-1: math.inf, -2: None}.get(count, count)

    def __iter__(self) -> Iterator[Batch]:
        length = self.length if self.given else 0
        if length == math.inf and self._limit is None:
            raise ValueError(
                "data is an endless dataset, and all of it is asked for. Say how many batches to read, num_batches=10 "
                "for example, or limit it with data.take(10)."
            )
        return self._read(self._limit if length in (None, math.inf) else None, is_all=True)

    def _read(self, most: int | None = None, is_all: bool = False) -> Iterator[Batch]:
        source = self._data
        if source is None:
            raise ValueError(
                "This method scores weights by the loss on examples, but data is None. Pass data=(x, y), or an "
                "iterable of such batches."
            )
        index, bar, length = -1, None, self.length
        total = most or (None if length == math.inf else length)
        if isinstance(source, keras.utils.PyDataset):
            source = map(source.__getitem__, itertools.count() if length == math.inf else range(int(length or 0)))
        for index, element in enumerate(itertools.islice(source, most)):
            if index == self._most_unknown and is_all and total is None:
                raise ValueError(
                    f"data has given {index} batches and does not say how many it has: it may be endless. Say how many "
                    "to read with num_batches=..., or limit it with data.take(...), which itertools.islice does for a "
                    "generator; a tf.data.Dataset can say its length by .apply(tf.data.experimental."
                    "assert_cardinality(...))."
                )
            if self.progress and (index or (total or 0) > 1):
                bar = bar or keras.utils.Progbar(total, unit_name=self.progress)
                bar.update(index)
            batch = element if self._is_checked else _checked(element, index)
            if self.example is None:
                self.example = rows(batch[0], None, 8)
            yield batch
        if bar:
            bar.target = bar.target and index + 1  # a generator may end before what was asked for
            bar.update(index + 1, finalize=True)
        if self._was_begun and most and 0 <= index < most - 1:
            warnings.warn(
                f"data is a generator that had been read from before, and it ended after {index + 1} of {most} "
                "batches. Pass a list, a tf.data.Dataset or a keras.utils.PyDataset, which can be read again.",
                stacklevel=2,
            )
        if index < 0:
            raise ValueError("data is empty: it gave no batch. If it is a generator, it may have been read before.")

    def _forever(self) -> Iterator[Batch | None]:
        """Pass after pass, with `None` at the end of each."""
        while True:
            count = 0
            for batch in self._read():
                count += 1
                yield batch
            if self.once_only:
                raise ValueError(
                    f"data ended before the last pruning step had its batches: {count} were left in it. It is a "
                    "generator, which can be read once, and may have been read before; pass a list, a tf.data.Dataset "
                    "or a keras.utils.PyDataset, which can be read again, or ask for fewer with num_batches=..."
                )
            self._in_a_pass = count
            yield None

    def _next(self, count: int) -> Iterator[Batch]:
        self._endless = self._endless or self._forever()
        given = 0
        while given < min(count, self._in_a_pass or count):
            batch = next(self._endless)
            if batch is not None:
                given += 1
                yield batch

    def take(self, count: int) -> "Batches":
        """The next `count` batches, none of them twice, starting over at the end of the data. They are read once."""
        limit = count if self.once_only or not self.given else int(min(count, self.length or count))
        taken = Batches(self._next(count), limit=limit)
        taken._is_checked, taken.example = True, self.example
        return taken

    def kept(self) -> "Batches":
        """The same batches, in memory if they can be read only once but are no more than were asked for."""
        if not self.once_only or self._limit is None:
            return self
        self.progress, progress = "", self.progress
        kept = Batches(list(self))
        kept._is_checked, kept.example, kept.progress = True, self.example, progress
        return kept

    def anew(self) -> "Batches":
        """The same data, taken from its beginning."""
        anew = copy.copy(self)
        anew._endless = None
        return anew

    def halves(self) -> "Batches":
        """The same batches, each cut in the middle into two."""
        halved = Batches(_Halves(self), limit=self._limit and 2 * self._limit)
        halved._is_checked, halved._most_unknown = True, 2 * self._most_unknown
        return halved


def _checked(element: Any, index: int) -> Batch:
    batch = as_batch(element, index)
    check_lengths(batch, index)
    check_values(batch, index)
    return batch


def _check_no_pair(data: list[Any]) -> None:
    """Raises for `[x, y]`: taken as batches of x alone they would be nonsense."""
    parts = [data[i] for i in range(len(data))] if len(data) in (2, 3) else []
    if not parts or not all(is_array(part) and len(part.shape) for part in parts):
        return
    if all(len(part.shape) == len(parts[0].shape) > 2 for part in parts):  # sequences or images of other sizes
        return
    if len({int(part.shape[0]) for part in parts}) == 1 and len({tuple(part.shape[1:]) for part in parts}) > 1:
        raise ValueError(
            "data is a list of arrays that are of one length and else differ, like [x, y]. One batch must be a tuple: "
            "(x, y); several inputs are ([a, b], None); and batches of x alone are [(x,), (x,)]."
        )


class _Cut:
    """One batch of arrays in several; each is a view."""

    def __init__(self, data: Any, batch_size: Any, is_one: bool):
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
        if not is_one:
            raise ValueError(
                f"batch_size={batch_size} cuts one (x, y) of arrays, but data is a {type(data).__name__}, which gives "
                "batches already. Leave batch_size out; a tf.data.Dataset is batched by data.batch(...)."
            )
        self._batch, self._size = as_batch(data), int(batch_size)
        check_lengths(self._batch)

    def __len__(self) -> int:
        return math.ceil(size_of(self._batch) / self._size)

    def __iter__(self) -> Iterator[Batch]:
        return (rows(self._batch, i * self._size, (i + 1) * self._size) for i in range(len(self)))


class _Halves:
    def __init__(self, batches: Batches):
        self._batches = batches
        self.once_only = batches.once_only

    def __length_hint__(self) -> Any:
        length = self._batches.length
        return NotImplemented if length in (None, math.inf) else 2 * int(length or 0)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            middle = size_of(batch) // 2
            if middle == 0:
                raise ValueError("A batch of one example has no halves. Half batches need at least 2 examples each.")
            yield rows(batch, None, middle)
            yield rows(batch, middle, None)


def _stackable(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "flat_values"):
        raise ValueError("Ragged examples have no common shape to be stacked in. Pad them first, with .to_tensor().")
    return as_numpy(leaf)


def _labels(y: Any) -> tuple[np.ndarray, np.ndarray]:
    """The labels as they are, and as one integer a row."""
    leaves = keras.tree.flatten(y)
    given = as_numpy(leaves[0]) if len(leaves) == 1 and leaves[0] is not None else np.zeros((0, 0, 0))
    if given.ndim == 1 or given.shape[1:] == (1,):
        return given, given.reshape(len(given))
    if given.ndim == 2 and np.isin(given, (0, 1)).all() and (given.sum(-1) == 1).all():
        return given, given.argmax(-1)
    shape = given.shape if given.size else type(y).__name__
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
        ValueError: If a class has fewer examples, or a label is no class. Data that does not say its length is given
            up after 200 batches in a row without an example that is missing.

    >>> x, y = class_balanced((np.arange(6.0), np.array([1, 0, 1, 0, 0, 1])), examples_per_class=2)
    >>> x, y
    (array([1., 3., 0., 2.]), array([0, 0, 1, 1]))

    Source: Wang et al. 2020, Sec. 5, and their code, whose sampling stops only after a surplus example of each class.
    """
    if examples_per_class < 1:
        raise ValueError(f"examples_per_class must be at least 1, got {examples_per_class}.")
    found: dict[int, list[tuple[Any, Any]]] = {}
    batches, in_vain = Batches(data), 0
    may_be_endless = batches.length in (None, math.inf)
    # With the number of classes known, data may be endless.
    for x, y, _ in batches if num_classes is None else batches._read():
        given, labels = _labels(y)
        num_classes = given.shape[-1] if given.ndim > 1 and given.shape[-1] > 1 else num_classes
        examples = keras.tree.map_structure(_stackable, x)
        before = sum(map(len, found.values()))
        for i, label in enumerate(labels.tolist()):
            if label != int(label) or not 0 <= label < (num_classes or np.inf):
                raise ValueError(f"The label {label} is no class: expected an integer from 0, below num_classes.")
            if len(found.setdefault(int(label), [])) < examples_per_class:  # a copy: a view would hold its whole batch
                found[int(label)].append(
                    (keras.tree.map_structure(lambda leaf, i=i: np.array(leaf[i]), examples), given[i])
                )
        count = sum(map(len, found.values()))
        in_vain = 0 if count > before else in_vain + 1
        if count == (num_classes or 0) * examples_per_class or (may_be_endless and in_vain == _MOST_UNKNOWN):
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
