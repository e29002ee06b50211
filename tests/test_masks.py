import fractions
import math
import os
import zipfile

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_prune.masks import Masks, masks_from_scores
from tf_prune.scopes import check_sparsity, num_kept

SHAPES = npst.array_shapes(min_dims=1, max_dims=4, max_side=6)
# Few distinct values, so that ties are the rule; and any float at all.
VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), st.floats(-(2.0**100), 2.0**100, width=32))
SCORES = st.lists(
    SHAPES.flatmap(lambda shape: npst.arrays(np.float32, shape, elements=VALUES)), min_size=1, max_size=4
).map(lambda arrays: {f"layer_{i}/kernel": array for i, array in enumerate(arrays)})
SPARSITIES = st.one_of(
    st.integers(0, 999).map(lambda n: n / 1000), st.floats(0, 1, exclude_max=True, allow_subnormal=False)
)


def exactly_kept(size, sparsity):
    """The count by the rule, in exact arithmetic on the decimal number that the user wrote."""
    return size - math.ceil(fractions.Fraction(repr(sparsity)) * size)


def by_sorting(scores, kept):
    """Brute force: a stable sort of all scores, largest first, equals by index."""
    flat = np.concatenate([score.ravel() for score in scores.values()]).astype(np.float64)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:kept]] = True
    return mask


def flatten(masks):
    return np.concatenate([mask.ravel() for mask in masks.values()])


@given(st.integers(1, 10**9), st.integers(0, 9999))
def test_count_is_exact_for_every_decimal_sparsity(size, ten_thousandths):
    sparsity = ten_thousandths / 10000
    assert num_kept(size, sparsity) == exactly_kept(size, sparsity)


@pytest.mark.parametrize(
    ("size", "sparsity", "kept"),
    [(1000, 0.9, 100), (1000, 1 - 0.1, 100), (100, 0.07, 93), (25, 0.28, 18), (7, 0.5, 3), (3, 2 / 3, 1)],
)
def test_count_sets_float_noise_aside(size, sparsity, kept):
    assert num_kept(size, sparsity) == kept


def test_a_float32_sparsity_is_the_number_that_was_written():
    assert num_kept(1000, np.float32(0.1)) == 900


def test_no_masks_at_all_remove_nothing():
    assert Masks({}).sparsity == 0.0


def test_or_fewer_keeps_what_is_left():
    masks = masks_from_scores({"a": np.ones(4)}, 0.25, among={"a": np.array([True, False, False, True])}, or_fewer=True)
    assert masks["a"].tolist() == [True, False, False, True]


@given(SCORES, SPARSITIES)
def test_global_masks_equal_a_stable_sort(scores, sparsity):
    total = sum(score.size for score in scores.values())
    kept = num_kept(total, sparsity)
    if kept == 0:
        with pytest.raises(ValueError, match="keeps none"):
            masks_from_scores(scores, sparsity)
        return
    masks = masks_from_scores(scores, sparsity)
    np.testing.assert_array_equal(flatten(masks), by_sorting(scores, kept))
    assert masks.num_kept == kept
    assert list(masks) == list(scores)
    assert all(masks[path].shape == score.shape for path, score in scores.items())


@given(SCORES, SPARSITIES)
def test_layerwise_masks_equal_a_stable_sort_of_each_layer(scores, sparsity):
    if not any(num_kept(score.size, sparsity) for score in scores.values()):
        return
    masks = masks_from_scores(scores, sparsity, scope="layerwise")
    for path, score in scores.items():
        expected = by_sorting({path: score}, num_kept(score.size, sparsity))
        np.testing.assert_array_equal(masks[path].ravel(), expected)


@given(SCORES, SPARSITIES, SPARSITIES)
def test_a_higher_sparsity_keeps_a_subset(scores, one, other):
    low, high = sorted((one, other))
    if num_kept(sum(score.size for score in scores.values()), high) == 0:
        return
    looser, tighter = masks_from_scores(scores, low), masks_from_scores(scores, high)
    assert not (flatten(tighter) & ~flatten(looser)).any()


@given(SCORES, SPARSITIES, SPARSITIES, st.integers(0, 2**32 - 1))
def test_what_is_not_among_the_candidates_is_never_kept(scores, sparsity, existing, seed):
    total = sum(score.size for score in scores.values())
    generator = np.random.default_rng(seed)
    among = {path: generator.random(score.shape) >= existing for path, score in scores.items()}
    kept = num_kept(total, sparsity)
    candidates = flatten(among)
    if kept == 0 or kept > candidates.sum():
        with pytest.raises(ValueError, match=r"keeps none|not yet pruned"):
            masks_from_scores(scores, sparsity, among=among)
        return
    masks = masks_from_scores(scores, sparsity, among=among)
    assert masks.num_kept == kept
    assert not (flatten(masks) & ~candidates).any()


def test_equal_scores_keep_half_and_not_all_or_none():
    assert masks_from_scores({"a": np.ones(10)}, 0.5)["a"].tolist() == [True] * 5 + [False] * 5


def test_a_threshold_of_zero_revives_nothing():
    scores = {"a": np.array([0.0, 0.0, 3.0, 0.0])}
    masks = masks_from_scores(scores, 0.5, among={"a": np.array([False, False, True, True])})
    assert masks["a"].tolist() == [False, False, True, True]


def test_signed_scores_are_ranked_with_their_sign():
    assert masks_from_scores({"a": np.array([-5.0, 1.0, 2.0])}, 0.4)["a"].tolist() == [False, False, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_names_its_layer(value):
    with pytest.raises(ValueError, match=r"1 of 2 scores of 'b'"):
        masks_from_scores({"a": np.ones(3), "b": np.array([1.0, value])}, 0.5)


@pytest.mark.parametrize("sparsity", [95, -0.1, float("nan"), 1.0, float("inf"), "0.9", None, True, False])
def test_a_wrong_sparsity_says_what_it_got(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be .* got"):
        check_sparsity(sparsity)


def test_a_percentage_gets_a_hint():
    with pytest.raises(ValueError, match=r"Did you mean 0\.95\?"):
        check_sparsity(95)
    for none in (1.0, 100.0):  # 0.01 is not what was meant, and 1.0 is no sparsity either
        with pytest.raises(ValueError, match=rf"got {none}\.$"):
            check_sparsity(none)


def test_an_unknown_scope_says_which_there_are():
    with pytest.raises(ValueError, match=r"'global', 'layerwise', 'uniform', 'erk', or a table; got 'layer'"):
        masks_from_scores({"a": np.ones(3)}, 0.5, scope="layer")


@pytest.mark.parametrize("bad", [{"a": [0, 2]}, {"a": [0.5]}, {3: [True]}])
def test_masks_hold_nothing_but_booleans_under_paths(bad):
    with pytest.raises(ValueError, match="mask"):
        Masks(bad)


def test_masks_cannot_be_changed_from_outside():
    source = np.array([True, False])
    masks = Masks({"a": source})
    source[:] = True
    assert masks["a"].tolist() == [True, False]
    with pytest.raises(ValueError, match="read-only"):
        masks["a"][0] = False


def test_a_file_makes_its_folder(tmp_path):
    masks = Masks({"a": [True, False]})
    masks.save(tmp_path / "new" / "folder" / "masks.npz")
    assert Masks.load(tmp_path / "new" / "folder" / "masks.npz") == masks


@given(SCORES, st.integers(0, 2**32 - 1))
def test_masks_survive_a_file(tmp_path_factory, scores, seed):
    generator = np.random.default_rng(seed)
    masks = Masks({path: generator.random(score.shape) < 0.5 for path, score in scores.items()})
    file = tmp_path_factory.mktemp("masks") / "masks.npz"
    masks.save(file)
    assert Masks.load(file) == masks
    assert os.listdir(file.parent) == ["masks.npz"]


def test_a_file_of_masks_is_plain_numpy_with_eight_weights_a_byte(tmp_path):
    Masks({"a": np.ones((5, 5), bool)}).save(tmp_path / "masks.npz")
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as arrays:
        assert str(arrays["path_0"]) == "a"
        assert arrays["shape_0"].tolist() == [5, 5]
        assert arrays["bits_0"].nbytes == 4


@pytest.mark.parametrize("damage", ["truncated", "foreign", "text", "flipped"])
def test_a_damaged_file_says_so(tmp_path, damage):
    file = tmp_path / "masks.npz"
    Masks({"a": np.random.default_rng(0).random((64, 64)) < 0.5}).save(file)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        np.savez(file, weights=np.ones(3))
    elif damage == "text":
        file.write_text("no masks here")
    else:
        with zipfile.ZipFile(file) as archive:
            start = archive.getinfo("bits_0.npy").header_offset
        content[start + 200] ^= 0xFF
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a whole file of masks"):
        Masks.load(file)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "masks.npz"
    old = Masks({"a": [True, False]})
    old.save(file)
    monkeypatch.setattr(np, "savez_compressed", lambda stream, **_: stream.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Masks({"a": [False, False]}).save(file)
    assert Masks.load(file) == old
    assert os.listdir(tmp_path) == ["masks.npz"]


KINDS = ["normal", "mostly zero", "all equal", "negative", "two values", "every 64th"]


@pytest.mark.parametrize(
    ("kind", "dtype", "among"),
    [
        *((kind, np.float32, among) for kind in KINDS for among in (False, True)),
        *(("normal", dtype, among) for dtype in (np.float64, np.float16) for among in (False, True)),
    ],
)
def test_many_scores_equal_a_stable_sort(kind, dtype, among):
    # So many that a sample brackets the last one kept, in several chunks; digits beyond the first 16 bits, and ties
    # across arrays. Where there are ties the bracket is given up; where every 64th is large, the sample is wrong.
    generator = np.random.default_rng(0)
    flat = generator.standard_normal(1_200_000)
    flat = {
        "normal": flat,
        "mostly zero": np.where(flat > 1.5, flat, 0.0),
        "all equal": np.full_like(flat, 0.1),
        "negative": -np.abs(flat),
        "two values": np.where(flat > 0, -1e-3, -1.0),
        "every 64th": np.where(np.arange(flat.size) % 64, flat, flat + 10),
    }[kind].astype(dtype)
    scores = {"a": flat[:640_000], "b": flat[640_000:640_064], "c": flat[640_064:].reshape(-1, 1)}
    allowed = {path: generator.random(score.shape) < 0.95 for path, score in scores.items()} if among else None
    candidates = flatten(allowed) if among else np.ones(flat.size, bool)
    order = np.argsort(-flat.astype(np.float64), kind="stable")
    for sparsity in (0.35, 0.9, 0.999):
        masks = masks_from_scores(scores, sparsity, among=allowed)
        kept = num_kept(flat.size, sparsity)
        expected = np.zeros(flat.size, bool)
        expected[order[candidates[order]][:kept]] = True
        np.testing.assert_array_equal(flatten(masks), expected)


@given(SCORES, SPARSITIES, st.integers(0, 2**32 - 1))
def test_some_candidates_are_kept_before_all_others(scores, sparsity, seed):
    generator = np.random.default_rng(seed)
    among = {path: generator.random(score.shape) < 0.8 for path, score in scores.items()}
    first = {path: mask & (generator.random(mask.shape) < 0.5) for path, mask in among.items()}
    kept, flat = num_kept(sum(score.size for score in scores.values()), sparsity), flatten(scores).astype(np.float64)
    if not 0 < kept <= flatten(among).sum():
        return
    masks = masks_from_scores(scores, sparsity, among=among, first=first)
    order = np.lexsort((-flat, ~flatten(first), ~flatten(among)))
    expected = np.zeros(flat.size, bool)
    expected[order[:kept]] = True
    np.testing.assert_array_equal(flatten(masks), expected)


def test_a_file_with_too_few_bits_is_an_error(tmp_path):
    Masks({"a": np.ones((10, 10), bool)}).save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as whole:
        arrays = {**dict(whole), "bits_0": whole["bits_0"][:1]}
    np.savez(tmp_path / "short.npz", **arrays)
    with pytest.raises(ValueError, match=r"not a whole file of masks \(mask 0 has 1 bytes"):
        Masks.load(tmp_path / "short.npz")
