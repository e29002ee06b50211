import contextlib
import itertools
import re

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from keras import layers

import tf_prune
from tests import helpers
from tf_prune import methods
from tf_prune.batches import Batches
from tf_prune.gradients import Derivatives
from tf_prune.pruning import Pruner

X = helpers.batch()[0]


def masks_at_each_step(monkeypatch, model, method, sparsity, data):
    steps = []
    original = methods.masks_from_scores

    def recorded(*args, **kwargs):
        steps.append(original(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(methods, "masks_from_scores", recorded)
    tf_prune.prune(model, method, sparsity, data, verbose=0)
    return steps


def flat(masks):
    return np.concatenate([mask.ravel() for mask in masks.values()])


@pytest.mark.parametrize("make", [tf_prune.FORCE, tf_prune.IterativeSNIP])
@pytest.mark.parametrize("name", ["mlp", "conv_bn", pytest.param("recurrent", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*left no weight in")  # small nets, high sparsity
def test_one_step_equals_snip_on_the_same_batches(make, name):
    data = [helpers.batch(seed=i) for i in range(3)]
    snip = tf_prune.prune(helpers.build(name), "snip", 0.9, data).masks
    assert tf_prune.prune(helpers.build(name), make(num_steps=1, num_batches=None), 0.9, data).masks == snip
    one_batch = tf_prune.prune(helpers.build(name), "snip", 0.9, data[0]).masks
    assert tf_prune.prune(helpers.build(name), make(num_steps=1), 0.9, data).masks == one_batch
    assert one_batch != snip


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_iterative_snip_never_revives_a_weight(monkeypatch, schedule):
    data = [helpers.batch(seed=i) for i in range(3)]
    method = tf_prune.IterativeSNIP(num_steps=12, schedule=schedule)
    steps = masks_at_each_step(monkeypatch, helpers.build("conv_bn"), method, 0.97, data)
    assert len(steps) == 12
    for before, after in itertools.pairwise(steps):
        assert not (flat(after) & ~flat(before)).any()


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_force_revives_weights(monkeypatch, schedule):
    data = [helpers.batch(seed=i) for i in range(3)]
    method = tf_prune.FORCE(num_steps=12, schedule=schedule)
    steps = masks_at_each_step(monkeypatch, helpers.build("conv_bn"), method, 0.97, data)
    revived = [(flat(after) & ~flat(before)).sum() for before, after in itertools.pairwise(steps)]
    assert sum(revived) > 0


def test_force_is_a_plain_loop_over_masked_gradients():
    # Algorithm 1 of the paper, written out: dense weights, gradients of the masked network, top-k by sorting.
    model = helpers.build("mlp")
    data = [helpers.batch(seed=i) for i in range(2)]
    derivatives = Derivatives(model, tf_prune.find_prunable(model).prunable)
    weights = np.concatenate([w.ravel() for w in derivatives.weights().values()])
    sizes = [w.size for w in derivatives.weights().values()]
    shapes = {path: w.shape for path, w in derivatives.weights().items()}
    mask = np.ones(weights.size, bool)
    for t in range(1, 6):
        parts = np.split(mask, np.cumsum(sizes)[:-1])
        masks = {path: part.reshape(shape) for part, (path, shape) in zip(parts, shapes.items(), strict=True)}
        gradients = derivatives.gradient(Batches(data[(t - 1) % 2]), masks)
        scores = np.abs(weights * np.concatenate([g.ravel() for g in gradients.values()]))
        kept = weights.size - int(np.ceil((1 - 0.1 ** (t / 5)) * weights.size - 1e-9))
        mask = np.zeros(weights.size, bool)
        mask[np.argsort(-scores, kind="stable")[:kept]] = True
    report = tf_prune.prune(model, tf_prune.FORCE(num_steps=5), 0.9, data, verbose=0)
    np.testing.assert_array_equal(flat(report.masks), mask)


def test_each_step_takes_the_next_batch():
    taken = []

    class Data(list):
        def __iter__(self):
            for i in range(3):
                taken.append(i)
                yield helpers.batch(seed=i)

    tf_prune.prune(helpers.build("mlp"), tf_prune.FORCE(num_steps=4, num_batches=2), 0.9, Data(), verbose=0)
    assert taken == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_second_pruning_goes_on_from_the_first_and_never_brings_a_weight_back():
    model = helpers.build("mlp")
    first = tf_prune.prune(model, "grasp", 0.5, helpers.batch())
    second = tf_prune.prune(model, tf_prune.FORCE(num_steps=60), 0.9, helpers.batch(), verbose=0)
    assert not (flat(second.masks) & ~flat(first.masks)).any()
    assert second.masks.num_kept == 64
    with pytest.raises(ValueError, match=r"only 64 are not yet pruned.*remove_masks"):
        tf_prune.prune(model, "snip", 0.2, helpers.batch())


@pytest.mark.parametrize("scope", tf_prune.SCOPES)
@pytest.mark.parametrize("method", ["force", "iterative_snip", "synflow"])
def test_pruning_step_by_step_goes_on_from_masks_of_another_scope(method, scope):
    model = helpers.build("mlp")
    first = tf_prune.prune(model, "snip", 0.5, helpers.batch()).masks
    second = tf_prune.prune(model, method, 0.95, helpers.batch(), scope=scope, verbose=0).masks
    assert second.num_kept == (28 + 3 if scope == "layerwise" else 32)
    assert not (flat(second) & ~flat(first)).any()


def test_score_works_where_only_some_layers_have_masks():
    model = helpers.build("mlp")
    tf_prune.prune(model, "magnitude", 0.5, filters="hidden")
    assert len(tf_prune.score(model, "snip", helpers.batch())) == 2


def test_inputs_may_be_a_dictionary():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    model = keras.Model({"b": b, "a": a}, keras.layers.Dense(8)(keras.layers.Concatenate()([a, b])))
    tf_prune.prune(model, "magnitude", 0.5)
    tf_prune.prune(model, "synflow", 0.75, verbose=0)
    assert tf_prune.masks_of(model).num_kept == 14


def test_filters_leave_other_layers_dense():
    model = helpers.build("mlp")
    report = tf_prune.prune(model, "magnitude", 0.9, filters="hidden")
    assert len(report.masks) == 1
    assert "not chosen by filters" in str(report)
    assert np.all(np.asarray(model.get_layer("head").kernel))


def test_the_report_shows_each_kernel_and_why_the_rest_is_left():
    model = helpers.build("conv_bn")
    text = str(tf_prune.prune(model, "snip", 0.9, helpers.batch()))
    for path in tf_prune.find_prunable(model).prunable:
        assert path in text
    assert "left alone (a bias, scale, statistic" in text
    assert "SNIP, global: 90." in text


def test_an_emptied_layer_is_a_warning_and_in_the_report():
    model = helpers.build("mlp")
    model.get_layer("head").kernel.assign(np.full((16, 4), 1e-9))
    with pytest.warns(UserWarning, match=r"Magnitude at sparsity 0.9 left no weight in .*head/kernel.*lower sparsity"):
        report = tf_prune.prune(model, "magnitude", 0.9)
    assert [path.split("/")[-2] for path in report.emptied] == ["head"]
    assert "emptied" in str(report)


@pytest.mark.parametrize(
    ("method", "scope", "advised"),
    [
        ("magnitude", "global", 'a lower sparsity, another method (SynFlow, FORCE) or scope="layerwise"'),
        ("magnitude", "layerwise", "a lower sparsity or another method (SynFlow, FORCE)"),
        (tf_prune.SynFlow(2), "layerwise", "a lower sparsity, more than 2 steps or another method (FORCE)"),
        (tf_prune.FORCE(3), "erk", "a lower sparsity, more than 3 steps or another method (SynFlow)"),
        (tf_prune.IterativeSNIP(3), "erk", "a lower sparsity, more than 3 steps or another method (SynFlow, FORCE)"),
    ],
)
def test_what_was_done_already_is_not_advised_against_a_cut(method, scope, advised):
    pruner = Pruner(helpers.build("mlp"), method, helpers.batch(), scope=scope)
    nothing = {path: np.zeros(v.shape, bool) for path, v in pruner.variables.items()}
    with pytest.warns(UserWarning, match=re.escape(f"Ask for {advised}.")):
        pruner._warn_if_cut(tf_prune.Masks(nothing), 0.99)


@pytest.mark.parametrize(
    ("method", "saturating", "words"),
    [
        (
            "synflow",
            "relu6",
            r"SynFlow gives 0 to every weight of first/kernel, second/kernel: .*ReLU6.*smaller",
        ),
        ("snip", "dead", r"SNIP gives 0 to every weight of first/kernel, second/kernel, head/kernel.*dead units"),
        ("magnitude", "zeros", r"Magnitude gives 0 to every weight of second/kernel: .*Their weights are 0"),
        ("synflow", "relu", None),
        ("snip", "relu", None),
        ("magnitude", "relu", None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no longer depend on its input")  # nor did the dead ones before
def test_kernels_that_are_ranked_by_position_alone_are_a_warning(method, saturating, words):
    inputs = x = keras.Input((36,))
    for name in ("first", "second"):
        kernel = "zeros" if saturating == "zeros" and name == "second" else keras.initializers.HeNormal(seed=1)
        x = keras.layers.Dense(40, kernel_initializer=kernel, name=name)(x)
        x = keras.layers.ReLU(6.0 if saturating == "relu6" else None)(x - 1e6 if saturating == "dead" else x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = helpers.batch()
    with pytest.warns(UserWarning, match=words) if words else contextlib.nullcontext():
        method = tf_prune.SynFlow(5) if method == "synflow" else method
        report = tf_prune.prune(model, method, 0.5, (x.reshape(len(x), -1), y), scope="layerwise", verbose=0)
    assert report.sparsity == 0.5


@pytest.mark.parametrize("data", [helpers.batch(), None], ids=["on data", "without data"])
def test_a_network_that_no_longer_sees_its_input_is_a_warning(data):
    # Each kernel keeps a weight, but what goes into the second layer comes from a unit that the first one lost.
    model = helpers.build("mlp")
    hidden, head = np.full((36, 16), 1e-3), np.full((16, 4), 1e-3)
    hidden[0, 0] = head[5, 0] = 1.0
    model.get_layer("hidden").kernel.assign(hidden)
    model.get_layer("head").kernel.assign(head)
    with pytest.warns(UserWarning, match="outputs no longer depend on its input"):
        tf_prune.prune(model, "magnitude", 1 - 2 / 640, data)
    x, _ = helpers.batch()
    assert np.ptp(np.asarray(model(x)), axis=0).max() == 0


def test_numbers_of_steps_are_those_of_the_papers():
    steps = [make().num_steps for make in (tf_prune.FORCE, tf_prune.IterativeSNIP, tf_prune.GraSPIt, tf_prune.SynFlow)]
    assert steps == [60, 60, 60, 100]


class Scripted(tf_prune.Criterion):
    """At each step, one score for all of each kernel."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def scores(self, derivatives, batches, masks, groups):
        return {
            path: np.full(group.group_shape, float(score))
            for score, (path, group) in zip(self.steps.pop(0), groups.items(), strict=True)
        }


def test_what_is_ranked_by_position_alone_is_said_and_nothing_else_is():
    def prune(steps, *args, **options):
        tf_prune.prune(helpers.build("mlp"), tf_prune.Iterative(Scripted(*steps), len(steps)), *args, **options)

    prune([(0, 1)], 0.5, scope={"hidden": 0.0})  # all of it is kept
    with pytest.warns(UserWarning, match="left no weight in .*head/kernel"):
        prune([(1, 0)], 0.9)  # none of it
    # After the first step, what lost one kernel scores 0 there; what has lost all is blind.
    with pytest.warns(
        UserWarning, match="gives 0 to every weight of mlp/hidden/kernel, mlp/head/kernel, at step 3 of 3"
    ):
        prune([(1, 1), (0, 1), (0, 0)], 0.5, scope="layerwise", verbose=0)


def test_sparsity_zero_changes_nothing():
    model = helpers.build("mlp")
    before = helpers.state(model)
    assert tf_prune.prune(model, "force", 0.0, helpers.batch(), verbose=0).sparsity == 0.0
    helpers.assert_same_state(before, model)


def test_synaptic_flow_of_a_subclassed_model_reads_one_batch_of_a_generator():
    model = helpers.build("subclassed")
    data = (helpers.batch(seed=i) for i in range(1))
    assert tf_prune.prune(model, tf_prune.SynFlow(3), 0.5, data, verbose=0).sparsity == 0.5


@pytest.mark.parametrize("with_data", [True, False])
def test_a_model_of_a_fixed_batch_size_is_looked_through_too(with_data):
    inputs = keras.Input(batch_shape=(12, 6))
    hidden = keras.layers.Dense(4, "relu", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))
    model.compile("sgd", "mse")
    model.get_layer("hidden").bias.assign(np.full(4, -1e3))
    data = (np.ones((12, 6), np.float32) * np.arange(12)[:, None], np.zeros((12, 2))) if with_data else None
    with pytest.warns(UserWarning, match="no longer depend on its input"):
        tf_prune.prune(model, "magnitude", 0.5, data)


def test_data_is_opened_no_more_often_than_it_is_read():
    opened = []

    class Data(list):
        def __iter__(self):
            opened.append(1)
            return super().__iter__()

    data = Data([helpers.batch(seed=i) for i in range(3)])
    tf_prune.score(helpers.build("mlp"), "grasp", data)
    assert len(opened) == 2
    tf_prune.score(helpers.build("mlp"), tf_prune.OptimalBrainDamage(4), data)
    assert len(opened) == 2 + 4


def test_a_progress_bar_shows_each_step_unless_silent(capsys):
    method = tf_prune.FORCE(num_steps=3)
    tf_prune.prune(helpers.build("mlp"), method, 0.9, helpers.batch(), verbose=1)
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert "FORCE" in shown
    assert "sparsity: 0.9" in shown
    tf_prune.prune(helpers.build("mlp"), method, 0.9, helpers.batch(), verbose=0)
    tf_prune.prune(helpers.build("mlp"), "snip", 0.9, helpers.batch(), verbose=1)
    tf_prune.prune(helpers.build("mlp"), "snip", 0.9, [helpers.batch()] * 2, verbose=0)
    assert capsys.readouterr().out == ""


def nan_weights(model):
    model.get_layer("hidden").kernel.assign(np.full((36, 16), np.nan))


X, Y = helpers.batch()
BAD = {
    "a percentage": ({"sparsity": 95}, ValueError, r"Did you mean 0\.95"),
    "a negative sparsity": ({"sparsity": -0.1}, ValueError, r"in \[0, 1\).*got -0\.1"),
    "a sparsity that is no number": ({"sparsity": float("nan")}, ValueError, "got nan"),
    "nothing kept": ({"sparsity": 0.9999}, ValueError, r"keeps none of the 640 prunable weights"),
    "no data": ({"data": None}, ValueError, r"data is None\. Pass data="),
    "empty data": ({"data": []}, ValueError, "data is empty"),
    "no examples": ({"data": (X[:0], Y[:0])}, ValueError, "Batch 0 of data is empty"),
    "NaN in the data": ({"data": (np.full_like(X, np.nan), Y)}, ValueError, "NaN or infinity in its x"),
    "labels out of range": ({"data": (X, Y + 4)}, ValueError, "y is int64.*from 4 to 7.*outside the valid range"),
    "labels that are words": ({"data": (X, Y.astype(str))}, ValueError, "cannot be computed on this batch.*y is"),
    "images of another size": ({"data": (X[:, :3], Y)}, ValueError, "cannot be computed on this batch"),
    "an unknown method": ({"method": "gra_sp"}, ValueError, "'grasp', 'force'.*got 'gra_sp'"),
    "a class for an object": ({"method": tf_prune.SNIP}, ValueError, r"such as tf_prune\.SNIP\(\)"),
    "an unknown scope": ({"scope": "layer"}, ValueError, "got 'layer'"),
    "no labels": ({"data": (X, None)}, ValueError, r"y is missing \(only the losses 'uniform'"),
    "an unknown loss without labels": ({"loss": "unifrom"}, ValueError, "Only for scoring there are 'uniform'"),
    "an unknown loss": ({"loss": "no_such_loss"}, ValueError, "no_such_loss"),
    "weights that are NaN": ({"break_model": nan_weights}, ValueError, "scores of .*hidden/kernel.* are not finite"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_is_wrong_and_changes_nothing(change, error, message):
    model = helpers.build("mlp")
    change = dict(change)
    change.pop("break_model", lambda model: None)(model)
    before = helpers.state(model)
    arguments = {"method": "snip", "sparsity": 0.9, "data": (X, Y), **change}
    with pytest.raises(error, match=message):
        tf_prune.prune(model, **arguments)
    helpers.assert_same_state(before, model)
    assert not tf_prune.masks_of(model)


@pytest.mark.filterwarnings("ignore")  # of tf_keras
def test_a_legacy_model_is_refused_by_all_that_takes_a_model(tmp_path):
    tf_keras = pytest.importorskip("tf_keras")

    class Mine(tf_keras.Sequential):
        pass

    model = Mine([tf_keras.layers.Dense(3, input_shape=(4,))])
    calls = [
        lambda: tf_prune.prune(model, "magnitude", 0.5),
        lambda: tf_prune.score(model, "magnitude"),
        lambda: tf_prune.export(model, tmp_path / "out"),
        lambda: tf_prune.apply_masks(model, {}),
        lambda: tf_prune.masks_of(model),
        lambda: tf_prune.remove_masks(model),
        lambda: tf_prune.rewind(model, []),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"Expected a keras\.Model .*Mine.*legacy Keras 2"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
        ({"num_steps": 2.5}, "num_steps must be an integer of at least 1, got 2.5"),
        ({"num_steps": True}, "num_steps must be an integer of at least 1, got True"),
        ({"schedule": "quadratic"}, "schedule must be one of .*, got .quadratic."),
        ({"num_batches": 0}, "num_batches must be at least 1"),
    ],
)
def test_a_wrong_option_is_an_error_when_the_method_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        tf_prune.FORCE(**options)


def text_model():
    words = layers.TextVectorization(output_sequence_length=6, vocabulary=["good", "bad", "film"])
    inputs = keras.Input((1,), dtype="string")
    embedded = layers.Embedding(20, 8)(words(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(embedded)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize(
    ("method", "kind"),
    [*((name, "tensor") for name in helpers.METHODS), *(("snip", kind) for kind in "UOS"), ("synflow", "U")],
)
def test_strings_are_data(method, kind):
    text = np.array([["good film"], ["bad film"], ["film"], ["a film"]])
    text = keras.ops.convert_to_tensor(text) if kind == "tensor" else text.astype(kind)
    model = text_model()
    report = tf_prune.prune(model, helpers.METHODS[method], 0.5, (text, np.arange(4) % 3), verbose=0)
    assert report.masks.num_kept == 12
    helpers.assert_masks_hold(model, report.masks)


def test_of_a_model_of_strings_no_inputs_are_made_up():
    assert tf_prune.prune(text_model(), "magnitude", 0.5).masks.num_kept == 12
    with pytest.raises(ValueError, match=r"takes strings, and synaptic flow needs an input of ones"):
        tf_prune.prune(text_model(), "synflow", 0.5, verbose=0)


SPARSE = np.where(helpers.batch()[0] > 0.5, helpers.batch()[0], 0).reshape(16, 36)


def sparse_model():
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((36,)), layers.Dense(8, "tanh"), layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("make", [tf.sparse.from_dense, scipy.sparse.coo_matrix], ids=["tensorflow", "scipy"])
@pytest.mark.parametrize("method", ["snip", "grasp", "optimal_brain_damage", "synflow"])
def test_sparse_inputs_score_as_the_dense_ones(make, method):
    y = helpers.batch()[1]
    dense, sparse = (tf_prune.score(sparse_model(), method, (x, y)) for x in (SPARSE, make(SPARSE)))
    for path, scores in dense.items():
        np.testing.assert_allclose(sparse[path], scores, rtol=1e-4, atol=1e-6 * np.abs(scores).max())


def ragged_model():
    inputs = keras.Input((None,), dtype="int32")
    mean = layers.Lambda(lambda x: tf.reduce_mean(x, 1), output_shape=(8,))
    model = keras.Model(inputs, layers.Dense(1, name="head")(mean(layers.Embedding(20, 8)(inputs))))
    model.compile("sgd", "mse")
    return model


def test_the_flow_of_ragged_inputs_is_that_of_ones_in_their_places():
    model = ragged_model()
    scores = tf_prune.score(model, "synflow", (tf.ragged.constant([[1, 2, 3], [4]]), np.arange(2.0)))["head/kernel"]
    expected = abs(model.get_weights()[0][1][:, None] * model.get_weights()[1])  # of the embedding of 1
    np.testing.assert_allclose(scores / scores.max(), expected / expected.max(), rtol=1e-5)


def test_ragged_inputs_score_as_each_by_itself():
    model = ragged_model()
    rows, y = [[1, 2, 3], [4], [5, 6]], np.arange(3.0)[:, None]
    got = tf_prune.score(model, tf_prune.LossPreservation(), (tf.ragged.constant(rows), y))
    one_by_one = [(np.array([row]), y[i : i + 1]) for i, row in enumerate(rows)]
    np.testing.assert_allclose(
        got["head/kernel"], tf_prune.score(model, "loss_preservation", one_by_one)["head/kernel"], rtol=1e-4
    )


@pytest.mark.parametrize("method", ["snip", "grasp", "optimal_brain_damage"])
def test_cut_arrays_score_as_one_batch(method):
    x, y = helpers.batch(50)
    weights = np.linspace(1.0, 1.0, 50)
    one, cut = (tf_prune.score(helpers.build("mlp"), method, (x, y, weights), batch_size=n) for n in (None, 16))
    for path, scores in one.items():
        np.testing.assert_allclose(cut[path], scores, rtol=1e-3, atol=1e-5 * np.abs(scores).max())


def test_a_large_batch_is_told_of_once_and_only_where_it_is_scored():
    data = tuple(np.concatenate([part] * 2) for part in helpers.batch(2049))
    model = helpers.build("mlp")
    with pytest.warns(UserWarning, match="4,098 examples is scored at once.*batch_size=128") as told:
        tf_prune.prune(model, tf_prune.FORCE(3), 0.5, data, verbose=0)
    assert len(told) == 1
    tf_prune.score(model, "snip", data, batch_size=1024)
    tf_prune.score(model, "magnitude", data)
    tf_prune.score(model, "synflow", data)


@pytest.mark.parametrize("data", [X, (X, None), [X, X], tf.data.Dataset.from_tensors(X)], ids=range(4))
def test_labels_are_asked_for_only_where_they_are_needed(data):
    model = helpers.build("mlp")
    for method, loss in (("snip", "uniform"), ("magnitude", None), ("synflow", None)):
        a, b = (tf_prune.score(model, method, d, loss) for d in (data, helpers.batch()))
        for path, scores in a.items():
            np.testing.assert_allclose(scores, b[path], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="y is missing"):
        tf_prune.score(model, "snip", data)


@pytest.mark.parametrize("data", [X[0], tf.data.Dataset.from_tensor_slices(X)], ids=["example", "dataset"])
def test_an_unbatched_x_is_told(data):
    with pytest.raises(ValueError, match=r"x lacks the axis of examples: a data set is batched by data.batch\(32\)"):
        tf_prune.prune(helpers.build("mlp"), "snip", 0.5, data, loss="uniform")


@pytest.mark.parametrize("method", helpers.METHODS.values(), ids=helpers.METHODS.keys())
def test_every_method_takes_a_number_of_batches_from_an_endless_generator(method):
    batches = [helpers.batch(seed=i) for i in range(2)]
    masks = tf_prune.prune(helpers.build("mlp"), method, 0.5, itertools.cycle(batches), num_batches=2, verbose=0).masks
    assert masks == tf_prune.prune(helpers.build("mlp"), method, 0.5, batches, num_batches=2, verbose=0).masks
    if not isinstance(method, tf_prune.Iterative):
        assert masks == tf_prune.prune(helpers.build("mlp"), method, 0.5, batches).masks


def test_the_score_of_an_iterative_method_is_that_of_its_first_step():
    batches = [helpers.batch(seed=i) for i in range(2)]
    first = tf_prune.score(helpers.build("mlp"), "force", batches)
    snip = tf_prune.score(helpers.build("mlp"), "snip", batches[0])
    for path, scores in snip.items():
        np.testing.assert_array_equal(first[path], scores)


def test_a_progress_bar_counts_the_batches_that_are_taken(capsys):
    tf_prune.prune(helpers.build("mlp"), "snip", 0.5, itertools.repeat(helpers.batch()), num_batches=3)
    assert "3/3" in capsys.readouterr().out
