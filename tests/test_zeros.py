import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_prune import zeros
from tf_prune.zeros import zeros_in_file

SHAPES = [(3, 3), (2, 3), (3, 2), (1, 3, 2), (2, 2, 2, 1), (2, 2, 2), (4, 2), (2, 2, 3), (3, 2, 2, 1), (1, 6)]


def by_trying_all(kernels, patterns):
    """Brute force: of all that fit a kernel in some order of its axes, the one with the most weights, then the last."""
    patterns, found = [np.squeeze(p) != 0 for p in patterns], {}
    for path in sorted(kernels, key=lambda path: (kernels[path] != 0).mean()):
        kernel, fitting = kernels[path] != 0, []
        forms = [np.squeeze(kernel)]
        if kernel.ndim > 2:
            forms += [np.squeeze(kernel.reshape(*kernel.shape[:-2], -1)), kernel.reshape(-1, kernel.shape[-1])]
        turned = [form.transpose(axes) for form in forms for axes in itertools.permutations(range(form.ndim))]
        for i, pattern in enumerate(patterns):
            if pattern is not None and any(t.shape == pattern.shape and not (pattern & ~t).any() for t in turned):
                fitting.append((pattern.sum(), i))
        if fitting:
            best = max(fitting)[1]
            found[path], patterns[best] = 1 - patterns[best].mean(), None
    return {path: found.get(path) for path in kernels}


def counted(kernels, tensors, monkeypatch):
    monkeypatch.setattr(zeros, "constants", lambda content: tensors)
    return {row.path: row.tflite_sparsity for row in zeros_in_file(kernels, b"")}


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_each_kernel_gets_the_best_of_all_that_fit(seed):
    generator = np.random.default_rng(seed)
    kernels, tensors = {}, []
    for i in range(generator.integers(1, 6)):
        kernel = generator.random(SHAPES[generator.integers(len(SHAPES))]) < generator.choice([0.3, 0.6, 1.0])
        kernels[f"kernel {i}"] = kernel
        tensor = kernel * (generator.random(kernel.shape) < generator.choice([0.8, 1.0]))  # Rounding takes some.
        if tensor.ndim > 2 and generator.random() < 0.4:
            tensor = tensor.reshape(*tensor.shape[:-2], -1)
        tensor = tensor.transpose(generator.permutation(tensor.ndim))
        if generator.random() < 0.9:  # Some kernels are not in the file.
            tensors.insert(generator.integers(len(tensors) + 1), tensor)
    with pytest.MonkeyPatch.context() as patch:
        assert counted(kernels, tensors, patch) == by_trying_all(kernels, tensors)


def test_the_fullest_that_fits_is_a_kernels_own_and_not_the_first(monkeypatch):
    full, half = np.ones((4, 4)), np.tri(4)
    rounded = full.copy()
    rounded[0, 0] = 0
    # The half full one, which comes first, is 0 wherever the full one is, too.
    for order in ([half, rounded], [rounded, half]):
        assert counted({"full": full}, order, monkeypatch) == {"full": 1 / 16}
        assert counted({"full": full, "half": half}, order, monkeypatch) == {"full": 1 / 16, "half": 6 / 16}


def test_each_kernel_is_looked_at_as_often_as_it_has_forms_however_many_there_are(monkeypatch):
    packed, honest = [], np.packbits
    monkeypatch.setattr(np, "packbits", lambda array: packed.append(1) or honest(array))
    costs = []
    for count in (8, 64):
        generator = np.random.default_rng(0)
        # As many weights in each, so that counts do not tell them apart.
        kernels = {f"{i}": generator.permuted(np.arange(64) % 2).reshape(8, 8) for i in range(count)}
        packed.clear()
        assert set(counted(kernels, [kernel.T for kernel in kernels.values()], monkeypatch).values()) == {0.5}
        costs.append(len(packed))
    assert costs[1] == 8 * costs[0]


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_many_kernels_with_one_pattern_are_all_found(kept, monkeypatch):
    kernel = np.random.default_rng(0).random((16, 16)) < kept
    kernels = {f"{i}": kernel for i in range(50)}
    assert set(counted(kernels, [kernel.T] * 50, monkeypatch).values()) == {1 - kernel.mean()}
    assert sum(v is None for v in counted(kernels, [kernel.T] * 49, monkeypatch).values()) == 1
