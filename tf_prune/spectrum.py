"""The singular values of a Jacobian at many examples, and what they say. NumPy only."""

import dataclasses
from typing import Any

import numpy as np

# Singular values below this part of the largest are rounding errors of float64, times the length of its sums.
_RANK_TOLERANCE = 1e-13


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of one Jacobian at many examples; `print(spectrum)` sums them up.

    "Pooled" takes the values of all examples together, as Lee et al. 2020 do in Table 2.

    Attributes:
        values: Float64 array (examples, min(outputs, inputs)), each row from the largest to the smallest. What is
            rounding error, below 1e-13 of an example's largest, is 0: the Jacobian is rank deficient there.
        shape: `(outputs, inputs)` of the Jacobian.
        start: What it is the derivative by.
        end: What it is the derivative of.
    """

    values: np.ndarray
    shape: tuple[int, int]
    start: str = "inputs"
    end: str = "logits"

    @property
    def mean(self) -> float:
        """Of the pooled values."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the pooled values."""
        return float(self.values.std())

    @property
    def largest(self) -> float:
        """Of the pooled values."""
        return float(self.values.max())

    @property
    def smallest(self) -> float:
        """Of the pooled values; 0 if an example is rank deficient."""
        return float(self.values.min())

    @property
    def num_rank_deficient(self) -> int:
        """How many examples have a Jacobian without full rank: some change of their input, or output, is lost."""
        return int((self.values[:, -1] == 0).sum())

    @property
    def condition_numbers(self) -> np.ndarray:
        """Largest / smallest of each example; infinite for those that are rank deficient."""
        largest, smallest = self.values[:, 0], self.values[:, -1]
        return np.divide(largest, smallest, out=np.full(len(largest), np.inf), where=smallest > 0)

    @property
    def mean_condition_number(self) -> float:
        """The mean of `condition_numbers`; infinite if one of them is."""
        return float(self.condition_numbers.mean())

    @property
    def pooled_condition_number(self) -> float:
        """`largest / smallest`: the one of the paper's Table 2."""
        return _quotient(self.largest, self.smallest)

    @property
    def condition_number_of_means(self) -> float:
        """The examples' mean largest value / their mean smallest one: finite as long as one example has full rank."""
        return _quotient(self.values[:, 0].mean(), self.values[:, -1].mean())

    @property
    def isometry_gap(self) -> float:
        """Distance from an isometry: the root mean square of σ² - 1, which is ‖JᵀJ - I‖_F / √r for one example."""
        return float(np.sqrt(np.mean((self.values**2 - 1) ** 2)))

    def __str__(self) -> str:
        count = len(self.values)
        lost = self.num_rank_deficient
        return (
            f"Jacobian {self.shape[0]} x {self.shape[1]} of {self.end} by {self.start}, {count:,} examples: singular "
            f"values {self.mean:.3g} ± {self.std:.3g}, from {self.smallest:.3g} to {self.largest:.3g}; condition "
            f"number {self.mean_condition_number:.3g} (mean of examples), {self.pooled_condition_number:.3g} (pooled), "
            f"{self.condition_number_of_means:.3g} (of means); isometry gap {self.isometry_gap:.3g}"
            + (f"; {lost:,} examples are rank deficient" if lost else "")
        )


def _quotient(largest: Any, smallest: Any) -> float:
    return float(largest / smallest) if smallest > 0 else float("inf")


def singular_values(jacobians: np.ndarray) -> np.ndarray:
    """Those of each matrix, in a row from the largest on: rounding errors as 0, and NaN where a matrix is not finite.

    By QR, where a matrix is long, and then SVD of the small factor: exact to rounding errors of the largest value.
    """
    tall = jacobians if jacobians.shape[1] >= jacobians.shape[2] else jacobians.transpose(0, 2, 1)
    is_finite = np.isfinite(tall).all((1, 2))
    tall = tall if is_finite.all() else tall[is_finite]
    values = np.full((len(jacobians), tall.shape[2]), np.nan)
    small = np.linalg.qr(tall, mode="r") if 2 * tall.shape[1] > 3 * tall.shape[2] else tall
    values[is_finite] = np.linalg.svd(small, compute_uv=False)
    values[values <= _RANK_TOLERANCE * values[:, :1]] = 0.0
    return values
