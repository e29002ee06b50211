"""The battery: every method of the table, over every model of the table."""

import contextlib
import dataclasses
import math

import keras
import numpy as np
import pytest

import tf_prune
from tests import helpers
from tf_prune.batches import Batches
from tf_prune.gradients import Derivatives
from tf_prune.scopes import num_kept
from tf_prune.structures import cut_into_groups


def slow(*values):
    """A row that is left to `pytest -m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def on_every_model(*left_to_slow):
    return pytest.mark.parametrize("name", [slow(n) if n in left_to_slow else n for n in helpers.MODELS])


EVERY = pytest.mark.parametrize("method", helpers.METHODS.values(), ids=helpers.METHODS.keys())


def criterion_of(method):
    return getattr(method, "criterion", method)


def score_by_magnitude(model):
    return tf_prune.score(model, "magnitude")


def groups_that_divide(structure, layouts):
    groups = {}
    for path, layout in layouts.items():
        with contextlib.suppress(ValueError):
            groups.update(cut_into_groups(structure, {path: layout})[0])
    return groups


def score(model, method, **options):
    return tf_prune.score(model, method, helpers.batch(), **options)


@EVERY
@on_every_model("mlp_softmax", "residual", "nested", "recurrent", "attention")
def test_scores_are_finite_have_the_kernels_form_and_leave_the_model(method, name):
    model = helpers.build(name)
    before = helpers.state(model)
    scores = score(model, method)
    prunable = tf_prune.find_prunable(model).prunable
    assert list(scores) == list(prunable)
    for path, values in scores.items():
        assert values.shape == tuple(prunable[path].shape)
        assert values.dtype == np.float32
        assert values.flags.writeable
        assert np.isfinite(values).all()
    helpers.assert_same_state(before, model)


@EVERY
@on_every_model("mlp_softmax", "residual", "nested")
def test_counts_are_exact_and_a_layer_that_is_emptied_is_told(method, name, recwarn):
    model = helpers.build(name)
    size = sum(score.size for score in score_by_magnitude(model).values())
    report = tf_prune.prune(model, method, 0.8125, helpers.batch(), verbose=0)
    assert report.masks.num_kept == num_kept(size, 0.8125)
    assert any("left no weight in" in str(warning.message) for warning in recwarn) == bool(report.emptied)
    assert set(report.emptied) == {path for path, mask in report.masks.items() if not mask.any()}
    helpers.assert_masks_hold(model, report.masks)


# The scope, the structure and the loop decide the counts, not the criterion inside: of the criteria of one loop, one is
# enough where a model takes long.
LOOPS = ("snip", "force", "iterative_snip", "synflow", "magnitude", "random")


@pytest.mark.filterwarnings("ignore:.*gives 0 to every weight")  # few groups, cut on the way
@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(method, name, id=f"{name}-{key}", marks=() if is_quick else pytest.mark.slow)
        for name in ("mlp", "separable", "recurrent", "conv_bn", "attention")
        for key, method in helpers.METHODS.items()
        for is_quick in [name == "mlp" or (name == "separable" and key in LOOPS)]
    ],
)
def test_every_scope_keeps_exact_counts_of_the_groups_of_every_structure(method, name):
    model = helpers.build(name)
    survey = tf_prune.find_prunable(model)
    iterative = method if isinstance(method, tf_prune.Iterative) else tf_prune.Iterative(method)
    derivatives = {}  # one for each set of kernels, so that each is traced once
    for structure in tf_prune.STRUCTURES.values():
        groups = groups_that_divide(structure, survey.layouts)
        variables = {path: survey.prunable[path] for path in groups}
        if not variables:
            continue
        of_these = derivatives.setdefault(tuple(variables), Derivatives(model, variables))
        for scope in (*tf_prune.SCOPES, {next(iter(groups)): 0.5}):
            masks, kept = iterative.masks(of_these, Batches(helpers.batch()), 0.75, groups, scope)
            sizes = {path: math.prod(group.group_shape) for path, group in groups.items()}
            table = scope if isinstance(scope, dict) else {}
            each = {path: size // (2 if path in table else 4) for path, size in sizes.items()}
            if scope in ("global", "uniform", "erk"):
                assert kept.num_kept == sum(sizes.values()) // 4, (structure, scope)
            else:
                assert {p: int(mask.sum()) for p, mask in kept.items()} == each, (structure, scope)
            for path, group in groups.items():
                np.testing.assert_array_equal(group.any(masks[path]), kept[path])
                np.testing.assert_array_equal(group.spread(kept[path]), masks[path])
                if group.at_most:
                    axis, n = group.at_most
                    assert (masks[path].reshape(group.view).sum(axis) <= n).all(), (structure, scope)


def test_the_models_of_the_battery_have_kernels_for_every_structure():
    models = [helpers.build(name) for name in ("mlp", "conv_bn", "recurrent", "attention", "separable")]
    for name, structure in tf_prune.STRUCTURES.items():
        cut = [groups_that_divide(structure, tf_prune.find_prunable(model).layouts) for model in models]
        assert sum(map(len, cut)) >= (1 if name == "1x16" else 4), name


@EVERY
@pytest.mark.filterwarnings("ignore:.*left no weight in")  # small nets, high sparsity
def test_the_same_seed_gives_the_same_masks(method):
    masks = []
    for _ in range(2):
        masks.append(tf_prune.prune(helpers.build("conv_bn"), method, 0.9, helpers.batch(), verbose=0).masks)
    assert masks[0] == masks[1]


@EVERY
def test_permuting_hidden_units_permutes_the_scores(method):
    if isinstance(method, tf_prune.Random | tf_prune.OptimalBrainDamage):
        pytest.skip("random scores, and random probes, know no unit")
    model, permuted = helpers.build("mlp"), helpers.build("mlp")
    order = np.random.default_rng(0).permutation(16)
    a, bias, b, head_bias = model.get_weights()
    permuted.set_weights([a[:, order], bias[order], b[order], head_bias])
    (first, second), (first_p, second_p) = (tuple(score(m, method).values()) for m in (model, permuted))
    np.testing.assert_allclose(first_p, first[:, order], rtol=2e-4, atol=1e-6 * np.abs(first).max())
    np.testing.assert_allclose(second_p, second[order], rtol=2e-4, atol=1e-6 * np.abs(second).max())


@EVERY
@pytest.mark.parametrize(
    ("name", "policy"),
    [("conv_bn", "mixed_float16"), slow("conv_bn", "mixed_bfloat16"), slow("recurrent", "mixed_float16")],
)
def test_mixed_precision_prunes_exactly_too(method, name, policy):
    keras.config.set_dtype_policy(policy)
    model = helpers.build(name)
    report = tf_prune.prune(model, method, 0.5, helpers.batch(), verbose=0)
    assert report.sparsity == 0.5
    helpers.assert_masks_hold(model, report.masks)


@EVERY
@pytest.mark.parametrize("name", ["conv_bn", slow("recurrent")])
def test_xla_gives_the_same_scores(method, name):
    plain, compiled = helpers.build(name), helpers.build(name)
    compiled.compile("sgd", plain.loss, jit_compile=True)
    one, other = score(plain, method), score(compiled, method)
    for path, other_path in zip(one, other, strict=True):
        scale = np.abs(one[path]).max()
        np.testing.assert_allclose(other[other_path], one[path], rtol=1e-3, atol=1e-4 * scale)


@EVERY
def test_several_batches_equal_one_big_batch_without_batch_normalization(method):
    method = criterion_of(method)
    x, y = helpers.batch(16)
    data = [(x[:3], y[:3]), (x[3:8], y[3:8]), (x[8:], y[8:])]
    one, several = (tf_prune.score(helpers.build("residual"), method, d) for d in ((x, y), data))
    for (path, a), b in zip(one.items(), several.values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max(), err_msg=path)


@EVERY
def test_a_dead_unit_makes_ties_and_counts_stay_exact(method):
    # A hidden unit that never fires: SNIP, GraSP and FORCE give all its weights a score of exactly 0.
    model = helpers.build("mlp")
    bias = model.get_layer("hidden").bias
    bias.assign(np.where(np.arange(16) < 8, -1e3, 0.0))
    report = tf_prune.prune(model, method, 0.25, helpers.batch(), verbose=0)
    assert report.masks.num_kept == num_kept(36 * 16 + 16 * 4, 0.25)


@EVERY
def test_methods_are_values(method):
    assert dataclasses.replace(method) == method
    assert hash(method) == hash(dataclasses.replace(method))


def test_every_name_of_the_string_table_is_in_the_tests_table():
    assert list(tf_prune.METHODS) == list(helpers.METHODS)


def test_snip_is_the_derivative_by_an_explicit_mask():
    # score = |dL(c * w) / dc| at c = 1, here by central differences of the loss in c.
    model = helpers.float64_mlp()
    generator = np.random.default_rng(1)
    x, y = generator.standard_normal((9, 5)), generator.integers(0, 3, 9)
    scores = tf_prune.score(model, "snip", (x, y))
    variables = tf_prune.find_prunable(model).prunable
    for path, variable in variables.items():
        weight = np.asarray(variable).copy()
        for index in [(0, 0), (1, 2), (3, 1)]:
            losses = []
            for c in (1 + 1e-5, 1 - 1e-5):
                moved = weight.copy()
                moved[index] *= c
                variable.assign(moved)
                losses.append(float(model.loss(y, model(x))))
            variable.assign(weight)
            assert scores[path][index] == pytest.approx(abs(losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-10)


def test_grasp_removes_the_weights_whose_removal_costs_the_least_gradient_norm():
    # To first order, shrinking a weight by a fraction e changes |g|^2 by -2 e w Hg: the paper's sign.
    model = helpers.float64_mlp()
    generator = np.random.default_rng(1)
    data = generator.standard_normal((9, 5)), generator.integers(0, 3, 9)
    scores = tf_prune.score(model, tf_prune.GraSP(temperature=1.0), data)
    variables = tf_prune.find_prunable(model).prunable

    def norm():
        snip = tf_prune.score(model, "snip", data)
        weights = {path: np.asarray(v) for path, v in variables.items()}
        return sum(((snip[path] / weights[path]) ** 2).sum(dtype=np.float64) for path in snip)

    for path, variable in variables.items():
        weight = np.asarray(variable).copy()
        index = np.unravel_index(np.abs(scores[path]).argmax(), weight.shape)
        norms = []
        for c in (1.01, 0.99):
            moved = weight.copy()
            moved[index] *= c
            variable.assign(moved)
            norms.append(norm())
        variable.assign(weight)
        assert 2 * scores[path][index] == pytest.approx((norms[0] - norms[1]) / 0.02, rel=1e-2)


def test_a_temperature_flattens_the_predictions_and_changes_the_ranking():
    model = helpers.build("mlp")
    hot, cold = (score(model, tf_prune.GraSP(temperature=t)) for t in (200.0, 1.0))
    ranks = [np.argsort(np.concatenate([s.ravel() for s in scores.values()])) for scores in (hot, cold)]
    assert not np.array_equal(*ranks)


def test_scaling_the_loss_keeps_the_snip_mask():
    def four_times(y, z):
        return 4.0 * keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)

    model = helpers.build("mlp")
    one, four = (tf_prune.score(model, "snip", helpers.batch(), loss=loss) for loss in (None, four_times))
    assert tf_prune.masks_from_scores(one, 0.7) == tf_prune.masks_from_scores(four, 0.7)


def test_synflow_is_conserved_from_layer_to_layer():
    keras.utils.set_random_seed(0)
    layer = keras.layers.Conv2D
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layer(5, 3, activation="relu", use_bias=False),
            layer(7, 3, strides=2, activation="relu", use_bias=False),
            keras.layers.Flatten(),
            keras.layers.Dense(6, "relu", use_bias=False),
            keras.layers.Dense(4, use_bias=False),
        ]
    )
    sums = [values.sum(dtype=np.float64) for values in tf_prune.score(model, "synflow").values()]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)


def test_synflow_is_conserved_at_each_hidden_unit():
    model = helpers.build("mlp")
    into, out = tf_prune.score(model, "synflow").values()
    np.testing.assert_allclose(into.sum(0), out.sum(1), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no longer depend on its input")  # 40 weights: its few paths meet dead units
def test_synflow_empties_no_layer_where_magnitude_does():
    keras.utils.set_random_seed(0)
    widths = [64] * 6
    model = keras.Sequential(
        [keras.Input((64,)), *(keras.layers.Dense(w, "relu", use_bias=False) for w in widths), keras.layers.Dense(10)]
    )
    model.layers[3].kernel.assign(model.layers[3].kernel * 0.01)
    total = sum(s.size for s in tf_prune.score(model, "magnitude").values())
    sparsity = 1 - 40 / total
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    report = tf_prune.prune(clone, "synflow", sparsity, verbose=0)
    assert not report.emptied
    assert report.masks.num_kept == 40
    with pytest.warns(UserWarning, match="left no weight in"):
        assert tf_prune.prune(model, "magnitude", sparsity).emptied


def test_magnitude_is_the_absolute_weight():
    model = helpers.build("mlp")
    scores = tf_prune.score(model, "magnitude")
    for path, variable in tf_prune.find_prunable(model).prunable.items():
        np.testing.assert_array_equal(scores[path], np.abs(np.asarray(variable)))


def test_random_scores_differ_by_seed_and_look_uniform():
    model = helpers.build("mlp")
    a, b = (np.concatenate([s.ravel() for s in tf_prune.score(model, tf_prune.Random(i)).values()]) for i in (0, 1))
    assert not np.array_equal(a, b)
    assert 0.4 < a.mean() < 0.6
    assert a.min() >= 0
    assert a.max() < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tf_prune.GraSP(temperature=0.0), "temperature must be positive"),
        (lambda: tf_prune.GraSP(temperature=-1.0), "temperature must be positive"),
        (lambda: tf_prune.GraSP(temperature=float("nan")), "temperature must be positive"),
        (lambda: tf_prune.LossPreservation(magnitude_power=2), "magnitude_power must be 0 or 1, got 2"),
        (lambda: tf_prune.Magnitude(p=3), r"p must be 1, 2, math.inf or -math.inf, got 3"),
        (lambda: tf_prune.OptimalBrainDamage(num_probes=0), "num_probes must be at least 1, got 0"),
    ],
)
def test_an_option_out_of_range_is_an_error_when_the_criterion_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
