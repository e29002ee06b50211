"""How far a masked kernel is from an isometry, and the weights that bring it nearest. NumPy and SciPy only."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tf_prune.structures import Layout


@dataclasses.dataclass(frozen=True)
class LayerGain:
    """What `condition` did to one kernel.

    Attributes:
        before: The isometry gap, √mean (σ² - g²)² / g², over the kernel's singular values. It has as many as it has
            living inputs or outputs, whichever are fewer.
        after: The same, after.
        floor: The least gap of any weights under this mask: √(1 - rank / size), where rank is the structural one.
            Weights of ±g on a largest matching of inputs and outputs, and 0 elsewhere, have it.
        size: The number of singular values.
        iterations: Of the optimizer.
        dead_inputs: Inputs (channels, of each gate or group) of which no weight is left; they count for nothing.
        dead_outputs: The same of outputs.
    """

    before: float
    after: float
    floor: float
    size: int
    iterations: int
    dead_inputs: int = 0
    dead_outputs: int = 0

    @property
    def gain(self) -> float:
        """`before / after`."""
        return self.before / self.after if self.after else math.inf


class MaskedIsometry:
    """The distance of one masked kernel from an isometry, as a function of its kept weights.

    The kernel is cut into independent matrices or convolutions. A convolution with a stride is one without it, of the
    image's phases, and at each frequency it is a matrix: as many frequencies as the products of two kernels have taps
    tell all.

    Args:
        layout: Of the kernel.
        mask: Of the kernel.
        strides: Of the convolution, along its inputs; empty for other layers.
        gain: What the singular values shall be.
    """

    def __init__(self, layout: Layout, mask: np.ndarray, strides: tuple[int, ...], gain: float):
        self._layout = layout
        self._mask = mask
        self._gain = gain
        masks = layout.to_matrices(mask)
        window = masks.shape[1:-2]
        self._strides = strides if len(strides) == len(window) else (1,) * len(window)
        self._axes = tuple(range(1, 1 + len(window)))
        phases = self._phases(masks)
        self._grid = tuple(2 * n - 1 for n in phases.shape[1:-2])
        connected: np.ndarray = np.any(phases.reshape(len(phases), -1, *phases.shape[-2:]), axis=1)
        self._inputs: np.ndarray = np.any(connected, axis=2)
        self._outputs: np.ndarray = np.any(connected, axis=1)
        self._sizes = np.minimum(self._inputs.sum(1), self._outputs.sum(1))
        self._is_wide = self._inputs.sum(1) < self._outputs.sum(1)
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import structural_rank

        self._rank = sum(structural_rank(csr_array(one)) for one in connected)

    def solve(
        self, kernel: np.ndarray, max_iterations: int, after_each: Callable[[Any], None]
    ) -> tuple[np.ndarray, LayerGain]:
        """The kernel with the kept weights that are nearest to an isometry, and what that gained."""
        from scipy.optimize import minimize

        weights = kernel[self._mask]
        before = self.gap(weights)
        size = int(self._sizes.sum())
        norm = self._mean_square(self._transfers(weights))
        start = weights * self._gain * math.sqrt(size / norm)  # of the right size, as the zero kernel is a saddle
        options = {"maxiter": max_iterations, "maxfun": 10**9}
        found = minimize(self._value, start, jac=True, method="L-BFGS-B", options=options, callback=after_each)
        weights = min(weights, found.x, key=self.gap)
        floor = math.sqrt(max(0.0, 1 - self._rank / size))
        result = np.zeros(self._mask.shape)
        result[self._mask] = weights
        return result, LayerGain(before, self.gap(weights), floor, size, int(found.nit))

    def gap(self, weights: np.ndarray) -> float:
        """The isometry gap, of the kept weights in their order."""
        return math.sqrt(4 * self._value(weights)[0] / self._sizes.sum()) / self._gain**2

    def _value(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """`¼ ‖AᴴA - g² I‖²_F`, the mean over frequencies, of the living smaller side; and its gradient."""
        transfers = self._transfers(weights)
        value, gradient = 0.0, np.empty_like(transfers)
        for i, a in enumerate(transfers):
            one, gradient[i] = self._of_one(a, bool(self._is_wide[i]), self._inputs[i], self._outputs[i])
            value += one
        return value, self._back(gradient)

    def _of_one(self, a: np.ndarray, is_wide: bool, inputs: np.ndarray, outputs: np.ndarray) -> tuple[float, Any]:
        adjoint = np.conj(np.swapaxes(a, -1, -2))
        difference = a @ adjoint if is_wide else adjoint @ a
        difference -= self._gain**2 * np.diag((inputs if is_wide else outputs).astype(np.float64))
        gradient = difference @ a if is_wide else a @ difference
        return 0.25 * self._mean_square(difference), gradient

    def _mean_square(self, transfers: np.ndarray) -> float:
        """The sum of squares, the mean over frequencies; those that the transform leaves out are conjugates."""
        squares = np.sum(np.abs(transfers) ** 2, axis=(-2, -1))
        if not self._axes:
            return float(np.sum(squares))
        return float(2 * np.sum(squares) - np.sum(squares[..., 0])) / math.prod(self._grid)

    def _transfers(self, weights: np.ndarray) -> np.ndarray:
        """(copies, *frequencies, inputs, outputs); a dense kernel itself."""
        kernel = np.zeros(self._mask.shape)
        kernel[self._mask] = weights
        phases = self._phases(self._layout.to_matrices(kernel))
        return np.fft.rfftn(phases, self._grid, self._axes) if self._axes else phases

    def _back(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient by the kept weights from that by the transfers: the adjoint of `_transfers`."""
        if self._axes:
            gradient = np.fft.irfftn(gradient, self._grid, self._axes)
        return self._layout.from_matrices(self._merged(gradient))[self._mask]

    def _phases(self, matrices: np.ndarray) -> np.ndarray:
        """A convolution of the phases of a strided image: `window / stride` taps of `stride x inputs` inputs."""
        count, *window, inputs, outputs = matrices.shape
        taps = [-(-n // s) for n, s in zip(window, self._strides, strict=True)]
        fill = [(0, t * s - n) for t, s, n in zip(taps, self._strides, window, strict=True)]
        padded = np.pad(matrices, [(0, 0), *fill, (0, 0), (0, 0)])
        split = padded.reshape(
            count, *(n for pair in zip(taps, self._strides, strict=True) for n in pair), inputs, outputs
        )
        rank = len(window)
        order = [0, *range(1, 1 + 2 * rank, 2), *range(2, 2 + 2 * rank, 2), 1 + 2 * rank, 2 + 2 * rank]
        return split.transpose(order).reshape(count, *taps, math.prod(self._strides) * inputs, outputs)

    def _merged(self, phases: np.ndarray) -> np.ndarray:
        """The adjoint of `_phases`; taps beyond the window are cut off."""
        count, *window, inputs, outputs = self._layout.to_matrices(self._mask).shape
        taps = [-(-n // s) for n, s in zip(window, self._strides, strict=True)]
        phases = phases[(slice(None), *(slice(t) for t in taps))]
        rank = len(window)
        split = phases.reshape(count, *taps, *self._strides, inputs, outputs)
        order = [0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 1 + 2 * rank, 2 + 2 * rank]
        merged = split.transpose(order).reshape(
            count, *(t * s for t, s in zip(taps, self._strides, strict=True)), inputs, outputs
        )
        return merged[(slice(None), *(slice(n) for n in window))]
