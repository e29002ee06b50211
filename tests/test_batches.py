import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_prune.batches import Batches, class_balanced

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
