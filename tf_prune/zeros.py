"""Counts the zeros of kernels again in a TF-Lite file."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

from tf_prune.tflite import constants

_PLACES = 2048


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one kernel in the model and in the `.tflite` file.

    Attributes:
        path: The variable's path.
        num_weights: How many weights the kernel has.
        sparsity: Fraction of exact zeros in the model.
        tflite_sparsity: Fraction of exact zeros in the file; `None` if no tensor of the file has this kernel's form.
    """

    path: str
    num_weights: int
    sparsity: float
    tflite_sparsity: float | None


def zeros_in_file(arrays: dict[str, np.ndarray], content: bytes) -> tuple[LayerSparsity, ...]:
    """Finds each kernel in a file by its pattern of zeros, since names do not survive conversion, and counts again.

    Args:
        arrays: Path -> kernel.
        content: The bytes of a `.tflite` file. What rounding has made zero there counts, too.
    """
    patterns = _Patterns([constant != 0 for constant in constants(content) if constant.ndim > 1])
    found: dict[str, float] = {}
    kernels = {path: array != 0 for path, array in arrays.items()}
    # The sparsest first: the fewer weights a kernel has left, the less can pass for it.
    for path in sorted(kernels, key=lambda path: kernels[path].mean()):
        match = patterns.take(kernels[path])
        if match is not None:
            found[path] = 1.0 - float(match.mean())
    return tuple(
        LayerSparsity(path, kernel.size, 1.0 - float(kernel.mean()), found.get(path))
        for path, kernel in kernels.items()
    )


class _Patterns:
    """The zeros of a file's tensors, each of which belongs to one kernel at most.

    A kernel can be any pattern that is 0 where the kernel is, with its axes in some order. Of these the one with the
    most weights left is taken, and of equals the last: rounding takes a few weights from a kernel's own pattern, and a
    sparser kernel's pattern, which may be 0 in all the right places, too, has lost more. So a pattern that is equal to
    the kernel is always the best, and is looked up; what was rounded is searched for, the fullest first.
    """

    def __init__(self, patterns: list[np.ndarray]):
        self._patterns = dict(enumerate(map(np.squeeze, patterns)))
        self._counts = {i: int(np.count_nonzero(pattern)) for i, pattern in self._patterns.items()}
        self._equal: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
        self._by_shape: dict[tuple[int, ...], dict[int, None]] = {}
        for i, pattern in self._patterns.items():
            self._equal.setdefault(_key(pattern), []).append(i)
        for i in sorted(self._patterns, key=lambda i: (self._counts[i], i), reverse=True):
            self._by_shape.setdefault(self._patterns[i].shape, {})[i] = None

    def take(self, kernel: np.ndarray) -> np.ndarray | None:
        """The pattern of a kernel, which then is no other kernel's; `None` if there is none."""
        turned = [form for form in _forms(kernel) if form.shape in self._by_shape]
        equal = [same[-1] for form in turned if (same := self._equal.get(_key(form)))]
        best = max(equal) if equal else self._fullest(turned)
        if best is None:
            return None
        pattern = self._patterns.pop(best)
        self._equal[_key(pattern)].remove(best)
        del self._by_shape[pattern.shape][best]
        return pattern

    def _fullest(self, turned: list[np.ndarray]) -> int | None:
        """The fullest pattern that is 0 where the kernel is."""
        best = -1, -1
        for form in turned:
            zero = ~form.reshape(-1)
            # Nearly all others are seen at a few of the zeros.
            places = np.random.default_rng(0).integers(zero.size, size=_PLACES)
            places = places[zero[places]]
            most = zero.size - int(np.count_nonzero(zero))
            for i in self._by_shape[form.shape]:
                if (self._counts[i], i) <= best:
                    break
                flat = self._patterns[i].reshape(-1)
                if self._counts[i] <= most and not flat[places].any() and not (flat & zero).any():
                    best = self._counts[i], i
        return None if best[1] < 0 else best[1]


def _key(pattern: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return pattern.shape, hashlib.sha256(np.packbits(pattern).data).digest()


def _forms(kernel: np.ndarray) -> Iterator[np.ndarray]:
    """How a kernel may stand in a file.

    Axes of size 1 come and go in conversion; a depthwise kernel's two last axes become one, and so do the first of an
    attention's output.
    """
    forms = {(form := np.squeeze(kernel)).shape: form}
    if kernel.ndim > 2:
        for form in (np.squeeze(kernel.reshape(*kernel.shape[:-2], -1)), kernel.reshape(-1, kernel.shape[-1])):
            forms[form.shape] = form
    for form in forms.values():
        for axes in itertools.permutations(range(form.ndim)):
            yield form.transpose(axes)
