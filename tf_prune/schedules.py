"""How the sparsity grows over the steps of an iterative pruning: step -> sparsity.

Frozen dataclasses, validated when they are made. Step t of T gives the sparsity after that step;
the last step gives the target itself, so that the final count is exact.
"""

import dataclasses
import numbers

from tf_prune.scopes import check_sparsity


@dataclasses.dataclass(frozen=True)
class _Schedule:
    sparsity: float
    num_steps: int

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, numbers.Integral) or self.num_steps < 1:
            raise ValueError(f"num_steps must be an integer of at least 1, got {self.num_steps!r}.")

    def _progress(self, step: int) -> float:
        if not 1 <= step <= self.num_steps:
            raise ValueError(f"step must be in [1, {self.num_steps}], got {step}.")
        return step / self.num_steps


@dataclasses.dataclass(frozen=True)
class Linear(_Schedule):
    """The same number of weights is removed at each step: `sparsity_t = (t / T) * sparsity`.

    Args:
        sparsity: The target, in [0, 1).
        num_steps: T, at least 1.

    >>> [Linear(0.9, 3)(step) for step in (1, 2, 3)]
    [0.3, 0.6, 0.9]

    Source: de Jorge et al. 2020, Eq. 8.
    """

    def __call__(self, step: int) -> float:
        """The sparsity after this step, counted from 1."""
        progress = self._progress(step)
        return self.sparsity if step == self.num_steps else progress * self.sparsity


@dataclasses.dataclass(frozen=True)
class Exponential(_Schedule):
    """The same fraction of what is left is removed at each step: `density_t = density ** (t / T)`.

    Args:
        sparsity: The target, in [0, 1).
        num_steps: T, at least 1.

    >>> [round(Exponential(0.99, 2)(step), 6) for step in (1, 2)]
    [0.9, 0.99]

    Source: de Jorge et al. 2020, Eq. 9, with both sides divided by the number of weights.
    """

    def __call__(self, step: int) -> float:
        """The sparsity after this step, counted from 1."""
        progress = self._progress(step)
        return self.sparsity if step == self.num_steps else 1.0 - (1.0 - self.sparsity) ** progress


SCHEDULES: dict[str, type[Linear] | type[Exponential]] = {"linear": Linear, "exponential": Exponential}
