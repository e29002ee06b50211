import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

from tf_prune.batches import Batches, class_balanced
from tf_prune.examples import rows

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
        ({"a": X}, None),
        (X, [1]),
        ((X,), [1]),
        ((X, None), [1]),
        ([X, X + 1], [1, 2]),
        ([[X, Y]], [1]),
        (tf.data.Dataset.from_tensors(X).repeat(2), [1, 1]),
    ],
    ids=[
        *("tuple", "weighted", "list", "dataset", "pydataset", "generator", "dict"),
        *("x of a dict", "x", "x of a tuple", "no labels", "x of a list", "pair in a list", "x of a dataset"),
    ],
)
def test_every_form_of_data_gives_its_batches(data, expected):
    if expected is None:
        assert [sorted(x) for x, _, _ in Batches(data)] == [["a"]]
    else:
        assert firsts(Batches(data)) == expected


def test_take_goes_on_where_it_was_and_starts_over():
    batches = Batches([(X + i, Y) for i in range(3)])
    assert [firsts(batches.take(2)) for _ in range(3)] == [[1, 2], [3, 1], [2, 3]]


def test_take_gives_no_batch_twice():
    batches = Batches([(X + i, Y) for i in range(3)])
    assert [firsts(batches.take(n)) for n in (10, 1, 10)] == [[1, 2, 3], [1], [2, 3, 1]]
    unsized = Batches(tf.data.Dataset.from_tensors((X, Y)).repeat(3).filter(lambda *_: True))
    assert [len(list(unsized.take(n))) for n in (2, 5)] == [2, 3]


def test_what_is_taken_and_kept_is_the_same_at_each_reading():
    kept = Batches((X + i, Y) for i in itertools.count()).take(2).kept()
    assert firsts(kept) == firsts(kept) == [1, 2]


class Counted:
    """An endless generator that knows how often it was asked."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return X, Y


def test_a_generator_is_asked_for_no_more_than_is_taken():
    data = Counted()
    batches = Batches(data, limit=4)
    assert len(list(batches.take(2))) == 2
    assert data.count == 2
    assert len(list(batches)) == 4
    assert data.count == 6


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (Counted, 200),
        (lambda: itertools.repeat((X, Y)), 200),
        (lambda: tf.data.Dataset.from_tensors((X, Y)).repeat().filter(lambda *_: True), 200),
        (lambda: [(X, Y)] * 300, None),
        (lambda: iter([(X, Y)] * 300), None),
        (lambda: tf.data.Dataset.from_tensors((X, Y)).repeat(300), None),
        (lambda: ((X, Y) for _ in range(200)), None),
    ],
    ids=["iterator", "itertools", "unknown dataset", "list", "list iterator", "dataset", "200 of a generator"],
)
def test_data_that_may_be_endless_is_given_up_and_no_other(data, count):
    if count is None:
        assert len(list(Batches(data()))) in (200, 300)
        return
    with pytest.raises(ValueError, match=rf"given {count} batches and does not say .* num_batches=.*\.take"):
        list(Batches(data()))
    assert len(list(Batches(data(), limit=7))) == 7


def test_a_generator_that_was_begun_before_and_ends_early_is_told():
    data = ((X, Y) for _ in range(4))
    assert len(list(Batches(data, limit=3))) == 3
    with pytest.warns(UserWarning, match="had been read from before, and it ended after 1 of 3"):
        list(Batches(data, limit=3))
    with pytest.raises(ValueError, match="may have been read before"):
        list(Batches(data, limit=3))


def test_cut_batches_are_views_of_the_same_examples():
    x, y, weights = np.arange(14.0).reshape(7, 2), np.arange(7), np.ones(7)
    cut = Batches(({"a": x}, (y, None), weights), batch_size=3)
    batches = list(cut)
    assert cut.length == 3
    assert [len(w) for _, _, w in batches] == [3, 3, 1]
    assert all(np.shares_memory(x, part["a"]) for part, _, _ in batches)
    np.testing.assert_array_equal(np.concatenate([part["a"] for part, _, _ in batches]), x)
    np.testing.assert_array_equal(np.concatenate([labels for _, (labels, _), _ in batches]), y)


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        ((X, Y), 0, "at least 1, got 0"),
        ((X, Y), 2.0, "at least 1, got 2.0"),
        ((X, Y[:3]), 1, "differ in length"),
        ([(X, Y)], 2, "gives batches already"),
        (tf.data.Dataset.from_tensors((X, Y)), 2, r"data\.batch"),
    ],
)
def test_what_cannot_be_cut_says_so(data, batch_size, message):
    with pytest.raises(ValueError, match=message):
        Batches(data, batch_size)


def dense(part):
    part = part.toarray() if hasattr(part, "toarray") else keras.ops.convert_to_numpy(part)
    return np.pad(part, [(0, 0), (0, 4 - part.shape[1])])


@pytest.mark.parametrize(
    "make",
    [tf.sparse.from_dense, scipy.sparse.coo_matrix, scipy.sparse.csc_array, tf.RaggedTensor.from_tensor, np.asarray],
)
def test_rows_of_any_kind_are_the_rows_of_the_dense_array(make):
    array = np.triu(np.arange(1.0, 25).reshape(6, 4))
    for begin, end in ((0, 2), (2, 5), (None, 3), (4, None), (5, 9)):
        ((x, _, _),) = Batches(make(array))
        np.testing.assert_array_equal(dense(rows(x, begin, end)), array[begin:end])


class Frame:
    """What `fit` takes of pandas."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def to_numpy(self):
        return self.array


def test_tables_are_read_as_fit_reads_them():
    ((x, y, _),) = Batches((Frame(X), Frame(Y)))
    assert x is X
    assert y.shape == (4, 1)  # a Series, as in Keras


def test_tables_of_pandas_are_data():
    pandas = pytest.importorskip("pandas")
    ((x, y, _),) = Batches((pandas.DataFrame(X), pandas.Series(Y)))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y[:, 0], Y)


def test_take_reads_an_endless_generator():
    assert firsts(Batches((X + i, Y) for i in itertools.count()).take(2)) == [1, 2]


def test_a_generator_that_ends_too_early_says_so():
    batches = Batches((X, Y) for _ in range(2))
    with pytest.raises(ValueError, match="data ended before the last pruning step had its batches: 2 were left"):
        list(batches.take(3))


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
        ([X, Y], r"One batch must be a tuple: \(x, y\)"),
        ((X, Y, Y, Y), "got tuple of 4 items"),
        ((X, 3), "scalar in its y"),
        ((None, Y), "its x is None"),
        ([(X, object())], "has a object in its y"),
        ([None], "got NoneType"),
        ("data.csv", "got str"),
        (([[1.0, 2.0]], [1]), "a Python list goes into an array"),
        (tf.data.Dataset.from_tensors((X, Y)).repeat(), "endless dataset.*num_batches=10"),
        (tf.data.Dataset.from_tensor_slices((X, Y)), r"scalar in its y.*data.batch\(32\)"),
        (tf.data.Dataset.from_tensor_slices((X, np.eye(4))), r"differ in length.*data.batch\(32\)"),
        ((X[0], Y[0]), r"A single example is x\[:1\], y\[:1\]"),
        ((X.astype(object), Y), "Python objects in its x"),
        ((tf.sparse.from_dense(X * np.nan), Y), "NaN or infinity in its x"),
        ((tf.ragged.constant([[1.0], [np.inf, 2.0], [], []]), Y), "NaN or infinity in its x"),
        ((scipy.sparse.coo_matrix(X * np.nan), Y), "NaN or infinity in its x"),
    ],
)
def test_wrong_data_says_what_is_wrong(data, message):
    with pytest.raises(ValueError, match=message):
        list(Batches(data))


def labelled(count, classes=3):
    return np.arange(float(count))[:, None], np.arange(count) % classes


def test_a_class_balanced_batch_has_the_first_examples_of_each_class_in_order():
    x, y = labelled(30)
    for data in [(x, y), [(x[:7], y[:7]), (x[7:], y[7:])], [(x, np.eye(3)[y])], [(x, y[:, None])]]:
        examples, labels = class_balanced(data, 2, num_classes=3)
        assert examples[:, 0].tolist() == [0, 3, 1, 4, 2, 5]
        classes = labels.argmax(-1) if labels.ndim == 2 and labels.shape[1] == 3 else labels.ravel()
        assert classes.tolist() == [0, 0, 1, 1, 2, 2]
    assert class_balanced((x, y), 2)[1].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_class_balanced_batch_reads_no_more_than_it_needs():
    def endless():
        while True:
            yield labelled(6)

    assert len(class_balanced(endless(), 3, num_classes=3)[0]) == 9
    with pytest.raises(ValueError, match="class 3 has 0"):  # a class that never comes
        class_balanced(endless(), 3, num_classes=4)


def test_a_class_balanced_batch_of_other_kinds_is_that_of_the_dense_array():
    x, y = labelled(9)
    for make in (tf.sparse.from_dense, scipy.sparse.coo_matrix, tf.constant):
        np.testing.assert_array_equal(class_balanced((make(x), y), 2)[0], class_balanced((x, y), 2)[0])
    with pytest.raises(ValueError, match="Pad them first"):
        class_balanced((tf.RaggedTensor.from_tensor(x), y), 2)


def test_a_class_balanced_batch_of_several_inputs_keeps_their_structure():
    x, y = labelled(9)
    examples, _ = class_balanced(({"a": x, "b": 2 * x}, y), 1)
    assert examples["b"][:, 0].tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples_per_class": 11}, "fewer than 11 examples .* class 0 has 10, class 1 has 10"),
        ({"num_classes": 4}, "class 3 has 0"),
        ({"num_classes": 2}, "The label 2 is no class"),
        ({"examples_per_class": 0}, "at least 1, got 0"),
    ],
)
def test_a_class_balanced_batch_says_what_is_missing(options, message):
    with pytest.raises(ValueError, match=message):
        class_balanced(labelled(30), **options)


@pytest.mark.parametrize("y", [None, {"a": np.zeros(4), "b": np.zeros(4)}, np.zeros((4, 3), int), np.zeros((4, 2, 2))])
def test_labels_that_are_no_classes_are_an_error(y):
    with pytest.raises(ValueError, match=r"Labels must be integers of shape \(batch,\) or one-hot rows"):
        class_balanced((np.ones((4, 2)), y), 1)


def test_an_endless_sequence_gives_the_batches_that_are_asked_for():
    class Endless(Sequence):
        num_batches = None

    assert len(list(Batches(Endless(1)).take(5))) == 5
    with pytest.raises(ValueError, match="endless"):
        iter(Batches(Endless(1)))
    endless = tf.data.Dataset.from_tensors(labelled(6)).repeat()
    assert len(class_balanced(endless, 4, num_classes=3)[0]) == 12


def test_a_batch_of_one_example_has_no_halves():
    with pytest.raises(ValueError, match="at least 2 examples"):
        list(Batches((X[:1], Y[:1])).halves())


def test_halves_are_the_same_examples():
    x, y = labelled(7)
    halves = list(Batches((x, y)).halves())
    assert [len(half[0]) for half in halves] == [3, 4]
    np.testing.assert_array_equal(np.concatenate([half[0] for half in halves]), x)
    assert Batches(iter([(x, y)])).halves().once_only


@pytest.mark.parametrize("data", ["list", "dataset", "generator"])
def test_progress_is_shown_over_several_batches(capsys, data):
    x, y = labelled(12)
    data = {
        "list": [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])],
        "dataset": tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
        "generator": ((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)),
    }[data]
    batches = Batches(data)
    batches.progress = "SNIP"
    assert len(list(batches)) == 3
    shown = capsys.readouterr().out
    assert ("3/Unknown" if "Unknown" in shown else "3/3") in shown
    assert "SNIP" in shown
    one = Batches((x, y))
    one.progress = "SNIP"
    assert len(list(one)) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_cutting_an_array_takes_no_more_memory_than_a_part_of_it():
    peaks = []
    for images in (128, 50_000):
        command = [sys.executable, "-m", "benchmarks.memory", f"--case=resnet8,{images},1,arrays"]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    assert peaks[1] < 1.3 * peaks[0]
