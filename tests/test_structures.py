"""The axes of each kernel are checked by what the layer computes, the groups by plain loops."""

import dataclasses
import itertools
import math

import keras
import numpy as np
import pytest
from keras import layers

import tf_prune
from tests import helpers
from tf_prune.prunable import find_prunable
from tf_prune.structures import Layout, cut_into_groups


def one_layer(layer, shape):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape), layer])


# name -> (layer, input shape, how many of the last axes of its input, and of its output, count channels)
LAYERS = {
    "dense": (lambda: layers.Dense(6), (4,), 1, 1),
    "conv1d": (lambda: layers.Conv1D(6, 3), (7, 4), 1, 1),
    "conv2d": (lambda: layers.Conv2D(6, 3), (7, 7, 4), 1, 1),
    "conv3d": (lambda: layers.Conv3D(6, 2), (3, 3, 3, 4), 1, 1),
    "grouped": (lambda: layers.Conv2D(6, 3, groups=2), (7, 7, 4), 1, 1),
    "transposed1d": (lambda: layers.Conv1DTranspose(6, 3), (7, 4), 1, 1),
    "transposed": (lambda: layers.Conv2DTranspose(6, 3), (7, 7, 4), 1, 1),
    "transposed3d": (lambda: layers.Conv3DTranspose(6, 2), (3, 3, 3, 4), 1, 1),
    "depthwise1d": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (7, 4), 1, 1),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (7, 7, 4), 1, 1),
    "einsum": (lambda: layers.EinsumDense("abc,cd->abd", (5, 6)), (5, 4), 1, 1),
    "einsum to heads": (lambda: layers.EinsumDense("abc,cde->abde", (5, 2, 3)), (5, 4), 1, 2),
    "einsum from heads": (lambda: layers.EinsumDense("abcd,cde->abe", (5, 6)), (5, 2, 4), 2, 1),
    "einsum transposed": (lambda: layers.EinsumDense("abc,dc->abd", (5, 6)), (5, 4), 1, 1),
    "einsum of experts": (lambda: layers.EinsumDense("bgi,gio->bgo", (3, 4)), (3, 5), 2, 2),
    "einsum of heads": (lambda: layers.EinsumDense("abhd,hed->abhe", (2, 3, 4)), (2, 3, 5), 2, 2),
    "einsum of positions": (lambda: layers.EinsumDense("abc,bcd->abd", (5, 6)), (5, 4), 2, 2),
    "einsum of scales": (lambda: layers.EinsumDense("abc,c->abc", (5, 4)), (5, 4), 1, 1),
    "einsum from permuted heads": (lambda: layers.EinsumDense("abhd,dho->abo", (5, 6)), (5, 2, 4), 2, 1),
    "einsum to heads around inputs": (lambda: layers.EinsumDense("abc,dce->abde", (5, 2, 3)), (5, 4), 1, 2),
}
EVERY_LAYER = pytest.mark.parametrize(("make", "shape", "in_axes", "out_axes"), LAYERS.values(), ids=LAYERS.keys())


def kernel_and_group(model, structure):
    layouts = {p: dataclasses.replace(layout, is_last=False) for p, layout in find_prunable(model).layouts.items()}
    ((path, group),) = cut_into_groups(structure, layouts)[0].items()
    return find_prunable(model).prunable[path], group


def channels_that_differ(one, other, axes):
    return set(np.ndindex(*one.shape[-axes:])) - {
        i for i in np.ndindex(*one.shape[-axes:]) if np.array_equal(one[(..., *i)], other[(..., *i)])
    }


@EVERY_LAYER
def test_an_output_channel_is_all_that_makes_one_output(make, shape, in_axes, out_axes):
    model = one_layer(make(), shape)
    kernel, group = kernel_and_group(model, "output_channels")
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    weights, whole = np.asarray(kernel).copy(), np.asarray(model(x))
    silenced = []
    for index in np.ndindex(group.group_shape):
        kept = np.ones(group.group_shape, bool)
        kept[index] = False
        kernel.assign(np.where(group.spread(kept), weights, 0))
        (channel,) = channels_that_differ(whole, np.asarray(model(x)), out_axes)
        assert not np.asarray(model(x))[(..., *channel)].any()
        silenced.append(channel)
    assert sorted(silenced) == sorted(np.ndindex(*whole.shape[-out_axes:]))


@EVERY_LAYER
def test_an_input_channel_is_all_that_reads_one_input(make, shape, in_axes, out_axes):
    model = one_layer(make(), shape)
    kernel, group = kernel_and_group(model, "input_channels")
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    weights = np.asarray(kernel).copy()
    read = []
    for index in np.ndindex(group.group_shape):
        only = np.zeros(group.group_shape, bool)
        only[index] = True
        kernel.assign(np.where(group.spread(only), weights, 0))
        before, seen = np.asarray(model(x)), []
        for channel in np.ndindex(*shape[-in_axes:]):
            moved = x.copy()
            moved[(..., *channel)] += 1.0
            if (np.asarray(model(moved)) != before).any():
                seen.append(channel)
        read += seen
        assert len(seen) == 1
    assert sorted(read) == sorted(np.ndindex(*shape[-in_axes:]))


# equation, shape of the input, shape of the output
EINSUMS = [
    ("abc,cde->abde", (5, 4), (5, 2, 3)),
    ("abcd,cde->abe", (5, 2, 4), (5, 6)),
    ("abhd,dho->abo", (5, 2, 4), (5, 6)),
    ("abc,dce->abde", (5, 4), (5, 2, 3)),
    ("abc,dc->abd", (5, 4), (5, 6)),
    ("bgi,gio->bgo", (3, 5), (3, 4)),
    ("abhd,hed->abhe", (2, 3, 5), (2, 3, 4)),
]


@pytest.mark.parametrize(("equation", "shape", "output"), EINSUMS)
def test_the_matrices_of_an_einsum_map_flattened_inputs_to_flattened_outputs(equation, shape, output):
    model = one_layer(layers.EinsumDense(equation, output), shape)
    kernel = np.asarray(model.layers[0].kernel)
    (layout,) = find_prunable(model).layouts.values()
    matrices = layout.to_matrices(kernel)
    np.testing.assert_array_equal(layout.from_matrices(matrices), kernel)
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    copies = {"bgi,gio->bgo": 3, "abhd,hed->abhe": 3}.get(equation, 1)
    assert len(matrices) == copies
    channels = math.prod(layout.view[axis] for axis in layout.inputs)
    rows = x.reshape(-1, copies, channels // copies)
    y = np.einsum("nci,cio->nco", rows, matrices)
    np.testing.assert_allclose(y.reshape(2, *output), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D])
def test_the_matrices_of_a_convolutional_lstm_are_its_gates(make):
    rank = {layers.ConvLSTM1D: 1, layers.ConvLSTM2D: 2, layers.ConvLSTM3D: 3}[make]
    model = keras.Sequential([keras.Input((3, *(4,) * rank, 2)), make(5, 3), layers.Flatten(), layers.Dense(2)])
    for layout, kernel in zip(find_prunable(model).layouts.values(), model.layers[0].weights[:2], strict=False):
        kernel = np.asarray(kernel)
        matrices = layout.to_matrices(kernel)
        np.testing.assert_array_equal(matrices, np.stack(np.split(kernel, 4, -1)))
        np.testing.assert_array_equal(layout.from_matrices(matrices), kernel)


@pytest.mark.parametrize(
    ("make", "gates"), [(layers.GRU, 3), (layers.LSTM, 4), (layers.SimpleRNN, 1), (layers.ConvLSTM1D, 4)]
)
def test_an_output_channel_of_a_recurrent_kernel_has_all_gates_of_a_unit(make, gates):
    shape, options = ((4, 3), ()) if make is not layers.ConvLSTM1D else ((4, 6, 3), (3,))
    model = keras.Sequential([keras.Input(shape), make(5, *options), layers.Dense(2)])
    groups, _ = cut_into_groups("output_channels", find_prunable(model, filters="lstm|gru|rnn").layouts)
    assert len(groups) == 2
    for group in groups.values():
        mask = group.spread(np.arange(5) != 2)
        removed = [column for column in range(5 * gates) if not mask[..., column].any()]
        assert removed == [2 + 5 * gate for gate in range(gates)]


@pytest.mark.parametrize(
    ("structure", "block"), [(tf_prune.Blocks(inputs=4), (4, 1)), (tf_prune.Blocks(2, 3), (2, 3))], ids=str
)
def test_blocks_are_consecutive_weights_of_a_dense_kernel(structure, block):
    model = one_layer(layers.Dense(6), (8,))
    _, group = kernel_and_group(model, structure)
    values = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    for i, j in itertools.product(range(8 // block[0]), range(6 // block[1])):
        part = values[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        assert group.sum(values)[i, j] == pytest.approx(part.sum(dtype=np.float64))
        assert group.norm(values, 1)[i, j] == pytest.approx(np.abs(part).sum(dtype=np.float64))
        assert group.norm(values, 2)[i, j] == pytest.approx(np.linalg.norm(part.ravel()))
        assert group.norm(values, math.inf)[i, j] == np.abs(part).max()
        assert group.norm(values, -math.inf)[i, j] == np.abs(part).min()
        kept = np.zeros(group.group_shape, bool)
        kept[i, j] = True
        mask = group.spread(kept)
        assert mask.sum() == part.size
        assert mask[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].all()
        np.testing.assert_array_equal(group.any(mask), kept)


def test_blocks_of_a_convolution_are_consecutive_channels_at_one_place_of_the_window():
    model = one_layer(layers.Conv2D(8, 1), (5, 5, 4))
    _, group = kernel_and_group(model, "4_outputs")
    values = np.arange(32.0).reshape(1, 1, 4, 8)
    np.testing.assert_array_equal(group.sum(values), values.reshape(1, 1, 4, 2, 4).sum(-1))


@pytest.mark.parametrize("shape", [(8, 3), (3, 3, 4, 2)])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.9])
def test_of_every_four_weights_along_the_input_no_more_than_two_are_kept(shape, sparsity):
    if len(shape) == 2:
        model = one_layer(layers.Dense(shape[1]), shape[:1])
    else:
        model = one_layer(layers.Conv2D(shape[3], 3), (5, 5, shape[2]))
    weights = np.asarray(find_prunable(model).prunable.popitem()[1]).copy()
    report = tf_prune.prune(model, "magnitude", sparsity, structure="2:4", verbose=0)
    ((_, mask),) = report.masks.items()
    assert mask.sum() == mask.size - math.ceil(sparsity * mask.size - 1e-9)
    columns = np.moveaxis(mask, -2, 0)
    best = np.zeros(mask.shape, bool)
    for rest in np.ndindex(columns.shape[1:]):
        for start in range(0, shape[-2], 4):
            index = [(*rest[:-1], start + i, rest[-1]) for i in range(4)]
            assert sum(mask[i] for i in index) <= 2
            for i in sorted(index, key=lambda i: -abs(weights[i]))[:2]:
                best[i] = True
    assert not (mask & ~best).any()
    if sparsity == 0.5:
        np.testing.assert_array_equal(mask, best)


# 4 heads of 3 channels: no multiple of 4 within a head. The second kernel has the channels before the heads.
@pytest.mark.parametrize(("equation", "order"), [("abhd,hdo->abo", (0, 1, 2)), ("abhd,dho->abo", (1, 0, 2))])
@pytest.mark.parametrize(
    "structure", [tf_prune.NofM(2, 4), tf_prune.NofM(1, 3), tf_prune.Blocks(4), tf_prune.Blocks(3)]
)
def test_patterns_and_blocks_of_an_attention_output_run_along_all_of_its_inputs(equation, order, structure):
    model = one_layer(layers.EinsumDense(equation, (5, 6)), (5, 4, 3))
    if order != (0, 1, 2) and structure in (tf_prune.NofM(2, 4), tf_prune.Blocks(4)):
        with pytest.raises(ValueError, match="3 is not a multiple of 4, within the last of 2 axes"):
            tf_prune.prune(model, "magnitude", 0.5, structure=structure)
        return
    weights = abs(np.asarray(model.layers[0].kernel)).transpose(order).reshape(12, 6)
    m = structure.m if isinstance(structure, tf_prune.NofM) else structure.inputs
    sparsity = 1 - structure.n / m if isinstance(structure, tf_prune.NofM) else 0.5
    ((_, mask),) = tf_prune.prune(model, "magnitude", sparsity, structure=structure).masks.items()
    runs = weights.reshape(12 // m, m, 6)
    if isinstance(structure, tf_prune.NofM):
        expected = runs >= np.sort(runs, axis=1)[:, [m - structure.n]]
    else:
        sums = runs.sum(1, keepdims=True)
        expected = np.broadcast_to(sums >= np.sort(sums.ravel())[sums.size // 2], runs.shape)
    np.testing.assert_array_equal(mask.transpose(order).reshape(runs.shape), expected)


@pytest.mark.parametrize("attention", [layers.MultiHeadAttention, layers.GroupQueryAttention], ids=lambda c: c.__name__)
@pytest.mark.parametrize("structure", sorted(set(tf_prune.STRUCTURES) - {"1x16"}))
def test_every_structure_prunes_attention(attention, structure):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 8))
    sizes = (2, 4) if attention is layers.MultiHeadAttention else (4, 4, 2)
    x = attention(*sizes, name="attention")(x, x)
    model = keras.Model(inputs, layers.Dense(4, name="head")(layers.Flatten()(x)))
    report = tf_prune.prune(model, "magnitude", 0.5, structure=structure, filters="query|key|value|output")
    assert len(report.masks) == 4
    assert report.groups.num_kept == report.groups.num_weights // 2


def test_n_of_m_tightens_step_by_step_when_it_is_pruned_in_steps():
    model = one_layer(layers.Dense(6), (8,))
    x, y = np.random.default_rng(0).standard_normal((16, 8)), np.arange(16) % 6
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    method = tf_prune.IterativeSNIP(num_steps=5, schedule="linear")
    one_shot = tf_prune.prune(keras.models.clone_model(model), "magnitude", 0.75, structure=tf_prune.NofM(1, 4)).masks
    masks = tf_prune.prune(model, method, 0.75, (x, y), structure=tf_prune.NofM(1, 4), verbose=0).masks
    ((_, mask),) = masks.items()
    assert (mask.reshape(2, 4, 6).sum(1) == 1).all()
    assert one_shot.num_kept == mask.sum() == 12


class Noting(tf_prune.Criterion):
    """Random scores, and the masks at which they were asked for."""

    def __init__(self):
        self.generator, self.seen = np.random.default_rng(0), []

    def scores(self, derivatives, batches, masks, groups):
        self.seen.append(masks)
        return {path: self.generator.random(group.group_shape) for path, group in groups.items()}


def test_the_pattern_tightens_with_the_schedule_and_holds_from_the_first_step_in_a_hybrid():
    noting = Noting()
    method = tf_prune.Iterative(noting, 4, "linear")
    tf_prune.prune(one_layer(layers.Dense(6), (8,)), method, 0.75, structure=tf_prune.NofM(1, 4), verbose=0)
    masks = [next(iter(masks.values())) for masks in noting.seen[1:]]
    assert [int(mask.sum()) for mask in masks] == [39, 30, 21]
    assert [mask.reshape(2, 4, 6).sum(1).max() for mask in masks] == [4, 3, 2]
    noting.seen.clear()
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(6)])
    structure = tf_prune.Hybrid(tf_prune.Weights(), tf_prune.NofM(1, 4))
    tf_prune.prune(model, method, 0.8, structure=structure, verbose=0)
    for masks in noting.seen[1:]:
        assert list(masks.values())[1].reshape(4, 4, 6).sum(1).max() == 1


def test_what_was_pruned_before_takes_no_place_at_any_step():
    noting, model = Noting(), one_layer(layers.Dense(6), (8,))
    before = tf_prune.prune(model, "magnitude", 0.5, verbose=0).masks
    after = tf_prune.prune(model, tf_prune.Iterative(noting, 3, "linear"), 0.75, verbose=0).masks
    assert noting.seen == [before] * 3
    assert after.num_kept == 12


@pytest.mark.parametrize(
    ("m", "density", "kept"), [(4, 0.26, 2), (4, 0.75, 3), (4, 0.76, 4), (4, 0.1, 1), (25, 0.28, 7)]
)
def test_on_its_way_n_of_m_keeps_the_density_rounded_up_to_whole_weights(m, density, kept):
    assert density != 0.28 or density * m > 7  # by the noise of floats alone
    group = tf_prune.NofM(1, m).grouping(Layout("dense", (2 * m, 3), (2 * m, 3), (0,), (1,)))
    scores = np.random.default_rng(0).random((2 * m, 3))
    best = group.best_of_each(scores, np.ones(scores.shape, bool), density)
    runs = scores.reshape(2, m, 3)
    np.testing.assert_array_equal(best.reshape(runs.shape), runs >= np.sort(runs, 1)[:, [m - kept]])


@pytest.mark.parametrize("scope", tf_prune.SCOPES)
@pytest.mark.parametrize("method", ["magnitude", "force", "iterative_snip", "synflow"])
@pytest.mark.parametrize("channels", [tf_prune.Weights(), tf_prune.OutputChannels()])
def test_a_hybrid_with_n_of_m_holds_both_and_starves_nobody(method, scope, channels):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(16, 3, activation="relu", name="conv"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(16, "relu", name="hidden"),
            layers.Dense(4, name="head"),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = np.random.default_rng(0).standard_normal((16, 8, 8, 4)).astype(np.float32), np.arange(16) % 4
    structure = tf_prune.Hybrid(channels, tf_prune.NofM(2, 4))
    report = tf_prune.prune(model, helpers.METHODS[method], 0.625, data, scope=scope, structure=structure, verbose=0)
    expected = {"conv": 16 if isinstance(channels, tf_prune.OutputChannels) else 576, "hidden": 256, "head": 64}
    if scope == "layerwise":
        assert {p.split("/")[-2]: int(m.sum()) for p, m in report.groups.items()} == {
            name: size * 3 // 8 for name, size in expected.items()
        }
    else:
        assert report.groups.num_kept == sum(expected.values()) * 3 // 8
    for path, mask in report.masks.items():
        if "conv" in path:
            assert mask.any()
        else:
            assert (mask.reshape(-1, 4, mask.shape[-1]).sum(1) <= 2).all()


@pytest.mark.parametrize(
    ("structure", "options", "where"),
    [
        ("2:4", {"sparsity": 0.9, "scope": {"head": 0.2}}, "head/kernel, but a sparsity of 0.2"),
        (tf_prune.Hybrid(tf_prune.Weights(), tf_prune.NofM(2, 4)), {"sparsity": 0.3, "scope": "layerwise"}, "of 0.3"),
    ],
)
def test_a_kernel_that_n_of_m_must_prune_further_is_named(structure, options, where):
    model = helpers.build("mlp")
    if isinstance(options["scope"], dict):
        options = {**options, "scope": {model.get_layer(name): s for name, s in options["scope"].items()}}
    with pytest.raises(ValueError, match=rf"removes at least 0\.5 of the weights of .*{where}"):
        tf_prune.prune(model, "magnitude", structure=structure, **options)


def test_a_group_counts_only_its_weights_that_are_still_there():
    model = one_layer(layers.Dense(6), (8,))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kernel = model.layers[0].kernel
    weights = np.random.default_rng(0).uniform(0.5, 1.0, (8, 6)).astype(np.float32)
    alive = np.ones((8, 6), bool)
    alive[:4, 0] = False  # the upper rows lose a weight each, and are otherwise larger
    weights[:4] += 1
    kernel.assign(weights)
    tf_prune.apply_masks(model, {find_prunable(model).prunable.popitem()[0]: alive})
    report = tf_prune.prune(model, tf_prune.Magnitude(p=-np.inf), 0.5, structure="input_channels")
    ((_, rows),) = report.groups.items()
    assert rows.tolist() == [True] * 4 + [False] * 4


def test_hybrid_takes_filters_of_convolutions_and_single_weights_of_the_rest():
    model = helpers.build("separable")
    groups, _ = cut_into_groups("hybrid", find_prunable(model).layouts)
    shapes = {path.split("/")[-2]: group.group_shape for path, group in groups.items()}
    assert shapes == {"stem": (8,), "depthwise": (8, 1), "grouped": (2, 4), "head": (8, 4)}


@pytest.mark.parametrize("name", helpers.MODELS)
def test_the_models_own_outputs_are_never_removed(name):
    model = helpers.build(name)
    last = [path.split("/")[-2] for path, layout in find_prunable(model).layouts.items() if layout.is_last]
    assert last == ["head"]
    report = tf_prune.prune(model, "random", 0.5, structure="output_channels", scope="layerwise", verbose=0)
    assert not any("head/" in path for path in report.masks)
    assert "its output channels are the model's outputs" in str(report)


def test_two_heads_a_softmax_and_a_nested_model_at_the_end_are_found():
    inputs = keras.Input((8,))
    body = layers.Dense(8, name="body")(inputs)
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="a"), layers.Dense(4, name="b")], name="inner")
    first = layers.Activation("softmax")(layers.BatchNormalization()(layers.Dense(4, name="first")(body)))
    second = layers.Add()([inner(body), layers.Dense(4, name="third")(body)])
    recurrent = layers.Bidirectional(layers.GRU(3, name="gru"), name="both")(layers.Reshape((4, 2))(body))
    model = keras.Model(inputs, [first, second, recurrent])
    last = [path for path, layout in find_prunable(model).layouts.items() if layout.is_last]
    last = {path.split("/")[-3 if "gru" in path else -2] for path in last}
    assert last == {"first", "b", "third", "forward_gru", "backward_gru"}


def test_a_kernel_that_is_not_divided_is_named_and_nothing_is_changed():
    model = helpers.build("conv_bn")
    before = helpers.state(model)
    with pytest.raises(
        ValueError, match=r"(?s)conv/kernel \(3, 3, 1, 6\): 1 is not a multiple of 4.*not in \['conv'\]"
    ):
        tf_prune.prune(model, "magnitude", 0.5, structure="2:4")
    helpers.assert_same_state(before, model)
    report = tf_prune.prune(model, "magnitude", 0.5, structure="2:4", filters=lambda layer: layer.name not in ["conv"])
    assert report.sparsity == 0.5


def test_an_activation_that_two_heads_share_hides_neither_of_them():
    inputs = keras.Input((8,))
    activation = layers.Activation("softmax")
    heads = [layers.Dense(4, name=name)(inputs) for name in ("one", "two")]
    model = keras.Model(inputs, [activation(head) for head in heads])
    assert all(layout.is_last for layout in find_prunable(model).layouts.values())


def test_a_kernel_without_a_summed_axis_has_no_blocks():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((5, 8)), layers.EinsumDense("abc,c->abc", (5, 8), name="scale"), layers.Dense(4, name="head")]
    )
    for structure in ("2:4", "1x4", "4_outputs"):
        report = tf_prune.prune(model, "magnitude", 0.5, structure=structure)
        assert "its equation sums over no axis, or makes none" in str(report)
        tf_prune.remove_masks(model)


WRONG = {
    "an unknown name": ("3:7", "structure must be one of 'weights', '2:4'.*got '3:7'"),
    "a class": (tf_prune.OutputChannels, "or an object such as"),
    "nothing left": ("output_channels", r"leaves nothing to prune:\n.*the model's outputs"),
}


@pytest.mark.parametrize(("structure", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_structure_is_an_error(structure, message):
    with pytest.raises(ValueError, match=message):
        tf_prune.prune(one_layer(layers.Dense(4), (8,)), "magnitude", 0.5, structure=structure)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tf_prune.NofM(4, 4), "needs 1 <= n < m"),
        (lambda: tf_prune.NofM(0, 4), "needs 1 <= n < m"),
        (lambda: tf_prune.Blocks(), "For single weights, leave structure out"),
        (lambda: tf_prune.Blocks(inputs=0), "at least 1 long"),
    ],
)
def test_a_structure_out_of_range_is_an_error_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sparsity_that_n_of_m_cannot_have_says_which_it_can():
    with pytest.raises(ValueError, match=r"removes at least 0\.5 .* sparsity of 0\.3"):
        tf_prune.prune(helpers.build("mlp"), "magnitude", 0.3, structure="2:4")


def test_structures_are_values():
    for structure in tf_prune.STRUCTURES.values():
        assert hash(structure) == hash(type(structure)(**vars(structure)))
