"""Counts the zeros of kernels again in a TF-Lite file."""

import dataclasses
import itertools

import numpy as np

from tf_prune.tflite import constants


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
    patterns = [constant != 0 for constant in constants(content) if constant.ndim > 1]
    found: dict[str, float] = {}
    kernels = {path: array != 0 for path, array in arrays.items()}
    # The sparsest first: the fewer weights a kernel has left, the less can pass for it.
    for path in sorted(kernels, key=lambda path: kernels[path].mean()):
        match = _find(kernels[path], patterns)
        if match is not None:
            found[path] = 1.0 - float(patterns.pop(match).mean())
    return tuple(
        LayerSparsity(path, kernel.size, 1.0 - float(kernel.mean()), found.get(path))
        for path, kernel in kernels.items()
    )


def _find(kernel: np.ndarray, patterns: list[np.ndarray]) -> int | None:
    """Which pattern is this kernel's with its axes in another order, zeros staying zeros.

    Axes of size 1 come and go in conversion; a depthwise kernel's two last axes become one, and so do the first of an
    attention's output.
    """
    forms = [np.squeeze(kernel)]
    if kernel.ndim > 2:
        forms += [np.squeeze(kernel.reshape(*kernel.shape[:-2], -1)), kernel.reshape(-1, kernel.shape[-1])]
    best: tuple[int, int] | None = None
    for i, pattern in enumerate(map(np.squeeze, patterns)):
        for form in forms:
            turned = (form.transpose(axes) for axes in itertools.permutations(range(form.ndim)))
            if any(t.shape == pattern.shape and not (pattern & ~t).any() for t in turned):
                best = max(best or (-1, -1), (int(pattern.sum()), i))
    return None if best is None else best[1]
