"""A model at other sparsities, for a while: what would its size and its latency be?"""

import contextlib
from collections.abc import Iterator

import keras
import numpy as np

from tf_prune.masks import masks_from_scores


@contextlib.contextmanager
def at_sparsity(variables: dict[str, keras.Variable], sparsity: float) -> Iterator[None]:
    """Gives each kernel this fraction of zeros for a while: fewer by random weights, more by zeroing the smallest."""
    before = {path: np.asarray(variable).copy() for path, variable in variables.items()}
    generator = np.random.default_rng(0)
    filled = {}
    for path, kernel in before.items():
        scale = kernel.std() or 1.0
        filled[path] = np.where(kernel == 0, scale * generator.standard_normal(kernel.shape), kernel)
    scores = {path: _blockwise(np.abs(filled[path]), before[path]) for path in before}
    masks = masks_from_scores(scores, sparsity, "layerwise")
    with contextlib.ExitStack() as stack:
        # Each one comes back whatever happens to others; and twice, since an interruption may hit one.
        for path, variable in [*variables.items()] * 2:
            stack.callback(variable.assign, before[path])
        for path, variable in variables.items():
            variable.assign(filled[path] * masks[path])
        yield


def _blockwise(scores: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The scores, shared within blocks of inputs if the kernel is zero in such blocks."""
    for size in (16, 4):
        if kernel.ndim == 2 and kernel.shape[0] % size == 0 and not kernel.all():
            blocks = kernel.reshape(-1, size, kernel.shape[1]) != 0
            if (blocks.any(1) == blocks.all(1)).all():
                means = scores.reshape(blocks.shape).mean(1)
                return np.repeat(means, size, axis=0)
    return scores
