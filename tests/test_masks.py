import concurrent.futures
import fractions
import io
import math
import os
import pathlib
import tracemalloc
import warnings
import zipfile

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import damaged_files
from tf_prune import mask_files
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


def saved(folder, masks):
    masks.save(folder / "masks.npz")
    return (folder / "masks.npz").read_bytes()


def write_members(file, change=lambda members: None, compression=zipfile.ZIP_STORED):
    """Saves two masks, lets `change` edit a list of [name, array or bytes], and writes the file anew."""
    Masks({"a": [[True, False]] * 5, "b": [True]}).save(file)
    with np.load(file) as arrays:
        members = [[name, arrays[name]] for name in arrays.files]
    members = change(members) or members
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        for name, value in members:
            stream = io.BytesIO()
            np.save(stream, value, allow_pickle=True) if isinstance(value, np.ndarray) else stream.write(value)
            archive.writestr(f"{name}.npy", stream.getvalue())


def first_format(masks):
    arrays = {"format": np.array("tf_prune masks 1")}
    for i, (path, mask) in enumerate(masks.items()):
        arrays |= {f"path_{i}": np.array(path), f"shape_{i}": np.array(mask.shape), f"bits_{i}": np.packbits(mask)}
    return arrays


def test_files_of_the_first_format_are_read(tmp_path):
    masks = Masks({"a": np.random.default_rng(0).random((40, 30)) < 0.1, "b": np.zeros((3, 0), bool)})
    np.savez_compressed(tmp_path / "masks.npz", **first_format(masks))
    assert Masks.load(tmp_path / "masks.npz") == masks
    # NumPy before 2.1 wrote the writer's argument, too.
    members = [["allow_pickle", np.array(False)], *map(list, first_format(masks).items())]
    write_members(tmp_path / "masks.npz", lambda _: members, zipfile.ZIP_DEFLATED)
    assert Masks.load(tmp_path / "masks.npz") == masks
    arrays = first_format(masks)
    arrays["bits_0"] = arrays["bits_0"][:-1]
    np.savez_compressed(tmp_path / "masks.npz", **arrays)
    with pytest.raises(ValueError, match=r"mask 0 has 149 bytes for the shape \(40, 30\)"):
        Masks.load(tmp_path / "masks.npz")


def test_every_cut_and_many_flipped_bits_are_seen(tmp_path):
    masks = Masks({"a": np.random.default_rng(0).random((5, 7)) < 0.5})
    content = saved(tmp_path, masks)
    file = tmp_path / "masks.npz"
    for size in range(0, len(content), 7):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="not a whole file of masks"):
            Masks.load(file)
    generator = np.random.default_rng(0)
    found = []
    for place in generator.permutation(len(content))[:300]:
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        found.append(damaged_files.loads_rightly(file, bytes(changed), masks))
    assert 0 < sum(found) < len(found)


def test_damaged_files_of_masks_are_refused_or_read_as_they_were(tmp_path):
    masks, files = damaged_files.mask_files(tmp_path)
    for kind, which, content in damaged_files.damaged(files, 200, seed=1):
        damaged_files.loads_rightly(tmp_path / "damaged.npz", content, masks[which])
        assert kind in damaged_files.MUTATIONS


def replaced(name, value):
    return lambda members: [[n, value(v) if n == name else v] for n, v in members]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:-3], r"holds 1 masks of 2"),
        (lambda m: m[:-1], r"members are not those of"),
        (lambda m: [*m, ["bits_2", np.zeros(1, np.uint8)]], r"members are not those of"),
        (lambda m: [*m, m[-1]], r"two of its members have one name"),
        (lambda m: [*m[:3], *m[6:], *m[3:6]], r"members are not those of"),
        (replaced("path_1", lambda v: np.array("a")), r"two masks have one path"),
        (replaced("path_1", lambda v: np.array("c")), r"its checksum is another"),
        (replaced("path_1", lambda v: np.array(["b"])), r"'path_1' has the type <U1 and 1 axes"),
        (replaced("bits_0", lambda v: v ^ 128), r"its checksum is another"),
        (replaced("bits_0", lambda v: v | 1), r"its checksum is another"),
        (replaced("shape_0", lambda v: v[::-1].copy()), r"its checksum is another"),
        (replaced("shape_0", lambda v: v.astype(np.float64)), r"'shape_0' has the type <f8"),
        (replaced("bits_0", lambda v: v.astype(object)), r"'bits_0' is not an array as NumPy writes them"),
        (replaced("bits_0", lambda v: v.astype(">u2")), r"'bits_0' has the type >u2"),
        (replaced("bits_0", lambda v: b""), r"'bits_0' is not an array"),
        (replaced("format", lambda v: np.array("tf_prune masks 3")), r"its format is 'tf_prune masks 3'"),
        (lambda m: m[1:], r"its format is None"),
    ],
)
def test_members_that_are_changed_are_named(tmp_path, change, message):
    write_members(tmp_path / "masks.npz", change)
    with pytest.raises(ValueError, match=message):
        Masks.load(tmp_path / "masks.npz")


@pytest.mark.parametrize(
    ("shape", "bits", "message"),
    [
        ([-2, -4], 1, r"mask 0 has 1 bytes for the shape \(-2, -4\)"),
        ([2**62, 2**62], 1, r"mask 0 has 1 bytes for the shape"),
        ([1] * 70, 1, r"mask 0 has 70 axes"),
        ([2**40] * 30_000, 1, r"mask 0 has 30,000 axes"),
        ([3], 1, r"mask 0 has more than the 3 bits of its shape"),
    ],
)
def test_a_checksum_that_is_right_does_not_make_shapes_right(tmp_path, shape, bits, message):
    bits = np.full(bits, 255, np.uint8)
    arrays = {"format": np.array("tf_prune masks 2"), "count": np.array(1)}
    arrays["checksum"] = mask_files._checksum(["a"], [tuple(shape)], [bits])
    np.savez(tmp_path / "m.npz", **arrays, path_0=np.array("a"), shape_0=np.array(shape, np.int64), bits_0=bits)
    with pytest.raises(ValueError, match=message):
        Masks.load(tmp_path / "m.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_are_compressed_are_refused(tmp_path, compression):
    write_members(tmp_path / "masks.npz", compression=compression)
    with pytest.raises(ValueError, match="compressed"):
        Masks.load(tmp_path / "masks.npz")


def lying_header(size):
    """A member whose header promises more than there is."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    return stream.getvalue() + bytes(8)


@pytest.mark.parametrize("kind", ["compressed zeros", "a header", "one member many times"])
def test_no_file_asks_for_more_memory_than_its_size_justifies(tmp_path, kind):
    file = tmp_path / "masks.npz"
    if kind == "compressed zeros":
        zeros = {"path_0": np.array("a"), "shape_0": np.array([2**29]), "bits_0": np.zeros(2**26, np.uint8)}
        np.savez_compressed(file, format=np.array("tf_prune masks 1"), **zeros)
    elif kind == "a header":
        write_members(file, replaced("bits_0", lambda v: lying_header(2**50)))
    else:
        write_members(file, replaced("bits_0", lambda v: np.zeros(10**6, np.uint8)))
        content = file.read_bytes()
        with zipfile.ZipFile(file) as archive:
            names = [info.filename.encode() for info in archive.infolist()]
        start = content.index(b"PK\x01\x02")
        entry = next(e for e in content[start:].split(b"PK\x01\x02") if b"bits_0" in e)
        more = (b"PK\x01\x02" + entry) * 50
        end = bytearray(content[content.index(b"PK\x05\x06") :])
        total = (len(names) + 50).to_bytes(2, "little")
        end[8:12] = total * 2
        end[12:16] = (int.from_bytes(end[12:16], "little") + len(more)).to_bytes(4, "little")
        file.write_bytes(content[: content.index(b"PK\x05\x06")] + more + end)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="not a whole file of masks"):
            Masks.load(file)
        assert tracemalloc.get_traced_memory()[1] < 20 * file.stat().st_size + 10**6
    finally:
        tracemalloc.stop()


def test_what_is_no_file_of_masks_is_said(tmp_path):
    np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
    (tmp_path / "text.npz").write_text("no masks here")
    (tmp_path / "empty.npz").write_bytes(b"")
    for file in (tmp_path, "/dev/zero", *(tmp_path / f"{name}.npz" for name in ("foreign", "text", "empty"))):
        with pytest.raises(ValueError, match=r"not a whole file of masks"):
            Masks.load(file)
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "missing.npz")


def test_a_file_that_may_not_be_read_keeps_its_error(tmp_path, monkeypatch):
    def refusing(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refusing)
    with pytest.raises(PermissionError):
        Masks.load(tmp_path / "masks.npz")


def test_a_path_that_numpy_would_cut_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ends in a zero character"):
        Masks({"a\0": [True]}).save(tmp_path / "masks.npz")
    assert os.listdir(tmp_path) == []
    odd = Masks({"": [True], "\ud800\u00e9": [False], "a\0b": np.array(True)})
    odd.save(tmp_path / "masks.npz")
    assert Masks.load(tmp_path / "masks.npz") == odd


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "masks.npz"
    old = Masks({"a": [True, False]})
    old.save(file)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                Masks({"a": [False, False]}).save(file)
        assert Masks.load(file) == old
        assert os.listdir(tmp_path) == ["masks.npz"]


def test_threads_and_processes_save_to_one_file(tmp_path):
    file = tmp_path / ("n" * 255)
    choices = [Masks({"k": np.random.default_rng(i).random((50, 50)) < 0.5}) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: choices[i % 4].save(file), range(80)))
    assert Masks.load(file) in choices
    assert os.listdir(tmp_path) == [file.name]


def test_a_saved_file_may_be_read_by_those_who_may_read_others(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    Masks({"a": [True]}).save(tmp_path / "masks.npz")
    assert (tmp_path / "masks.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


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
