import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_prune.batches import Batches

X, Y = np.ones((4, 2), np.float32), np.zeros(4, np.int64)


class Sequence(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return 2

    def __getitem__(self, index):
        return X + index, Y


def firsts(batches):
    return [float(np.asarray(x)[0, 0]) for x, _, _ in batches]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ((X, Y), [1]),
        ((X, Y, np.ones(4)), [1]),
        ([(X, Y), (X + 1, Y)], [1, 2]),
        (tf.data.Dataset.from_tensors((X, Y)).repeat(2), [1, 1]),
        (Sequence(), [1, 2]),
        (((X + i, Y) for i in range(3)), [1, 2, 3]),
        (({"a": X}, {"b": Y}), None),
    ],
    ids=["tuple", "weighted", "list", "dataset", "pydataset", "generator", "dict"],
)
def test_every_form_of_data_gives_its_batches(data, expected):
    if expected is None:
        assert [sorted(x) for x, _, _ in Batches(data)] == [["a"]]
    else:
        assert firsts(Batches(data)) == expected


def test_take_goes_on_where_it_was_and_starts_over():
    batches = Batches([(X + i, Y) for i in range(3)])
    assert [firsts(batches.take(2)) for _ in range(3)] == [[1, 2], [3, 1], [2, 3]]


def test_take_reads_an_endless_generator():
    assert firsts(Batches((X + i, Y) for i in itertools.count()).take(2)) == [1, 2]


def test_a_generator_that_ends_too_early_says_so():
    batches = Batches((X, Y) for _ in range(2))
    with pytest.raises(ValueError, match="data ended before the last pruning step"):
        batches.take(3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data is None"),
        (3, "must be an .x, y. tuple or an iterable"),
        ([], "data is empty"),
        (tf.data.Dataset.from_tensors((X, Y)).take(0), "data is empty"),
        ((X[:0], Y[:0]), "Batch 0 of data is empty"),
        ((X, Y[:2]), "differ in length"),
        ((np.full_like(X, np.nan), Y), "NaN or infinity in its x"),
        ((X, np.full(4, np.inf)), "NaN or infinity in its y"),
        ([X, Y], "Batch 0 of data must be a tuple"),
        ((X,), "got tuple of 1 items"),
        ((X, 3), "scalar in its y"),
        (tf.data.Dataset.from_tensors((X, Y)).repeat(), "endless dataset"),
    ],
)
def test_wrong_data_says_what_is_wrong(data, message):
    with pytest.raises(ValueError, match=message):
        list(Batches(data))
