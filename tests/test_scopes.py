import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_prune.masks import masks_from_scores
from tf_prune.scopes import kept_in_each, num_kept, shared_out

KERNELS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5
)
SHARES = st.lists(st.tuples(st.floats(0.01, 100.0), st.integers(0, 30)), min_size=1, max_size=6)


def one_by_one(total, shares, capacities):
    """D'Hondt by its definition: each seat goes to the largest share / (seats + 1), equals by index."""
    seats = [0] * len(shares)
    for _ in range(total):
        open_ones = [i for i, capacity in enumerate(capacities) if seats[i] < capacity]
        winner = max(open_ones, key=lambda i: (shares[i] / (seats[i] + 1), -i))
        seats[winner] += 1
    return seats


def by_level(total, shapes):
    """Erdos-Renyi-kernel densities as Evci et al. define them: find the factor, make full kernels dense, repeat."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense = set()
    while True:
        left = total - sum(sizes[i] for i in dense)
        factor = left / sum(raw[i] * sizes[i] for i in range(len(shapes)) if i not in dense)
        full = {i for i in range(len(shapes)) if i not in dense and factor * raw[i] > 1}
        if not full:
            return [1.0 if i in dense else factor * raw[i] for i in range(len(shapes))]
        dense |= full


@given(SHARES, st.floats(0, 1))
def test_sharing_out_is_the_divisor_method_and_fills_nobody_beyond_capacity(pairs, fraction):
    shares, capacities = zip(*pairs, strict=True)
    total = int(fraction * sum(capacities))
    counts = shared_out(total, shares, capacities)
    assert sum(counts) == total
    assert counts == one_by_one(total, shares, capacities)


@given(SHARES, st.data())
def test_a_larger_total_never_gives_anybody_less(pairs, data):
    shares, capacities = zip(*pairs, strict=True)
    total = data.draw(st.integers(0, sum(capacities)))
    less = data.draw(st.integers(0, total))
    assert all(a <= b for a, b in zip(*(shared_out(n, shares, capacities) for n in (less, total)), strict=True))


def test_sharing_out_more_than_there_is_room_for_is_an_error():
    with pytest.raises(ValueError, match="5 do not fit into 4"):
        shared_out(5, [1.0, 1.0], [2, 2])


@given(KERNELS, st.integers(0, 999))
def test_uniform_keeps_the_exact_total_and_nearly_the_same_fraction_of_each_kernel(kernels, thousandths):
    sparsity = thousandths / 1000
    scores = {f"k{i}": np.random.default_rng(i).random(shape) for i, shape in enumerate(kernels)}
    total = sum(score.size for score in scores.values())
    if num_kept(total, sparsity) == 0:
        return
    masks = masks_from_scores(scores, sparsity, "uniform")
    assert masks.num_kept == num_kept(total, sparsity)
    for path, score in scores.items():
        assert abs(masks[path].sum() - (1 - sparsity) * score.size) <= len(scores) + 1


@given(KERNELS, st.integers(1, 999))
def test_erk_keeps_the_exact_total_and_the_densities_of_its_paper(kernels, thousandths):
    sparsity = thousandths / 1000
    scores = {f"k{i}": np.random.default_rng(i).random(shape) for i, shape in enumerate(kernels)}
    total = num_kept(sum(score.size for score in scores.values()), sparsity)
    if total == 0:
        return
    masks = masks_from_scores(scores, sparsity, "erk")
    assert masks.num_kept == total
    for density, (path, score) in zip(by_level(total, kernels), scores.items(), strict=True):
        assert abs(masks[path].sum() - density * score.size) <= len(scores) + 1


def test_erk_on_lenet_300_100_is_its_closed_form():
    # Densities e (in + out) / (in out): 1084, 400 and 110 shares, of which the last kernel would be more than full.
    shapes = {"a": (784, 300), "b": (300, 100), "c": (100, 10)}
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    kept = kept_in_each("erk", 0.9, sizes, shapes, sizes, None, or_fewer=False)
    total = 26620
    assert sum(kept.values()) == total
    assert kept["c"] == 1000
    assert kept["a"] == pytest.approx((total - 1000) * 1084 / 1484, abs=1)


@pytest.mark.parametrize(("floors", "kept"), [((8, 0), [9, 1]), ((8, 2), [8, 2]), ((8, 8), [5, 5])])
def test_what_is_kept_in_any_case_counts_before_the_rest_is_shared_out_unless_it_is_too_much(floors, kept):
    sizes, shapes = {"a": 10, "b": 10}, {"a": (2, 5), "b": (2, 5)}
    counts = kept_in_each("uniform", 0.5, sizes, shapes, sizes, dict(zip("ab", floors, strict=True)), or_fewer=False)
    assert list(counts.values()) == kept


def test_a_table_says_it_for_some_kernels_and_the_sparsity_is_that_of_the_others():
    scores = {path: np.arange(10.0) for path in "abc"}
    masks = masks_from_scores(scores, 0.5, {"a": 0.9, "c": 0.0})
    assert [int(mask.sum()) for mask in masks.values()] == [1, 5, 10]


def test_a_table_with_an_unknown_name_and_no_scores_at_all_are_errors():
    with pytest.raises(ValueError, match=r"names 'b', which has no scores\. Scores are of: a"):
        masks_from_scores({"a": np.ones(4)}, 0.5, {"b": 0.5})
    with pytest.raises(ValueError, match="There are no scores"):
        masks_from_scores({}, 0.5)


def test_the_sparsity_that_is_advised_where_nothing_is_kept_keeps_something():
    scores = {"a": np.ones(4), "b": np.ones(100)}
    for scope in ("global", "layerwise", "uniform", "erk"):
        with pytest.raises(ValueError, match="at most") as error:
            masks_from_scores(scores, 0.9999, scope)
        assert masks_from_scores(scores, float(str(error.value).split()[-1].rstrip(".")), scope).num_kept >= 1


@pytest.mark.parametrize("scope", ["uniform", "erk"])
def test_a_kernel_with_few_candidates_leaves_its_share_to_the_others(scope):
    scores = {"a": np.ones((4, 5)), "b": np.ones((4, 5))}
    among = {"a": np.arange(20).reshape(4, 5) < 2, "b": np.ones((4, 5), bool)}
    masks = masks_from_scores(scores, 0.5, scope, among)
    assert [int(mask.sum()) for mask in masks.values()] == [2, 18]


@pytest.mark.parametrize(("scope", "where"), [("uniform", "the model"), ("layerwise", "'a'"), ({"a": 0.5}, "'a'")])
def test_too_few_candidates_are_an_error_that_says_where(scope, where):
    among = {"a": np.zeros(4, bool)}
    with pytest.raises(ValueError, match=f"keeps 2 of 4 in {where}, but only 0 are not yet pruned"):
        masks_from_scores({"a": np.ones(4)}, 0.5, scope, among)
    scores, among = {"a": np.ones(4), "b": np.ones(4)}, {**among, "b": np.ones(4, bool)}
    assert not masks_from_scores(scores, 0.5, scope, among, or_fewer=True)["a"].any()
