"""How the sparsity grows while a model is pruned: progress -> sparsity.

Frozen dataclasses, validated when they are made. Progress is the fraction of the way, from 0 to 1; at 1 it is the
target itself, so that the final count is exact.
"""

import abc
import dataclasses
from typing import Any

from tf_prune.scopes import check_sparsity


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """From one sparsity to another.

    Args:
        sparsity: The target, in [0, 1).
        initial_sparsity: Where it starts, at most the target.
    """

    sparsity: float
    initial_sparsity: float = 0.0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if not 0 <= check_sparsity(self.initial_sparsity) <= self.sparsity:
            raise ValueError(
                f"A schedule starts at most at its target, got initial_sparsity={self.initial_sparsity!r} and "
                f"sparsity={self.sparsity!r}."
            )

    def __call__(self, progress: float) -> float:
        """The sparsity at this fraction of the way, in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress!r}.")
        return self.sparsity if progress == 1 else self._between(progress)

    @abc.abstractmethod
    def _between(self, progress: float) -> float: ...


class Constant(Schedule):
    """The target from the start: `sparsity_t = sparsity`.

    >>> Constant(0.9)(0.0)
    0.9
    """

    def _between(self, progress: float) -> float:
        return self.sparsity


class Linear(Schedule):
    """The same number of weights is removed at each step: `sparsity_t = s0 + (sparsity - s0) * t`.

    >>> [round(Linear(0.9)(step / 3), 6) for step in (1, 2, 3)]
    [0.3, 0.6, 0.9]

    Source: de Jorge et al. 2020, Eq. 8.
    """

    def _between(self, progress: float) -> float:
        return self.initial_sparsity + (self.sparsity - self.initial_sparsity) * progress


class Cubic(Schedule):
    """Fast at first, while there is much to spare: `sparsity_t = sparsity + (s0 - sparsity) * (1 - t)**3`.

    >>> round(Cubic(0.8)(0.5), 6)
    0.7

    Source: Zhu and Gupta 2017, Eq. 1; the `PolynomialDecay` of TensorFlow's toolkit with its power of 3.
    """

    def _between(self, progress: float) -> float:
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - progress) ** 3


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
    """`Cubic` with a power of one's own: `sparsity_t = sparsity + (s0 - sparsity) * (1 - t)**power`.

    Args:
        sparsity: The target, in [0, 1).
        initial_sparsity: Where it starts, at most the target.
        power: Above 0. The larger, the more is removed at first.

    >>> round(Polynomial(0.8, power=2)(0.5), 6)
    0.6

    Source: the `PolynomialDecay` of TensorFlow's toolkit.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power must be above 0, got {self.power!r}.")

    def _between(self, progress: float) -> float:
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - progress) ** self.power


class Exponential(Schedule):
    """The same fraction of what is left is removed at each step: `density_t = d0**(1 - t) * density**t`.

    >>> [round(Exponential(0.99)(step / 2), 6) for step in (1, 2)]
    [0.9, 0.99]

    Source: de Jorge et al. 2020, Eq. 9, with both sides divided by the number of weights.
    """

    def _between(self, progress: float) -> float:
        return 1.0 - (1.0 - self.initial_sparsity) ** (1 - progress) * (1.0 - self.sparsity) ** progress


class Harmonic(Schedule):
    """The inverse of the density grows evenly: `1 / density_t = (1 - t) / d0 + t / density`.

    With n rounds, round i removes the fraction `p / (i * p + n * (1 - p))` of what is left, if it starts at 0.

    >>> [round(Harmonic(0.5)(i / 2), 6) for i in (1, 2)]
    [0.333333, 0.5]

    Source: the code of Lubana and Dick 2021; the paper gives no formula.
    """

    def _between(self, progress: float) -> float:
        return 1.0 - 1.0 / ((1 - progress) / (1.0 - self.initial_sparsity) + progress / (1.0 - self.sparsity))


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cubic": Cubic,
    "exponential": Exponential,
    "harmonic": Harmonic,
}


def as_schedule(schedule: Any) -> tuple[Schedule, tuple[int, int, int] | None]:
    """A schedule, and its own begin, end and frequency in steps if it has them.

    Has them: a `PolynomialDecay` or `ConstantSparsity` of TensorFlow's toolkit. They are known by their attributes, so
    that the toolkit need not be there. A constant sparsity ends where it begins: what is pruned here stays so, and
    pruning again would change nothing.

    Args:
        schedule: A `Schedule`, or an object of the toolkit.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(schedule, Schedule):
        return schedule, None
    if all(hasattr(schedule, name) for name in ("begin_step", "end_step", "frequency")):
        begin, end, frequency = int(schedule.begin_step), int(schedule.end_step), int(schedule.frequency)
        if all(hasattr(schedule, name) for name in ("initial_sparsity", "final_sparsity", "power")):
            polynomial = Polynomial(schedule.final_sparsity, schedule.initial_sparsity, schedule.power)
            return polynomial, (begin, end, frequency)
        if hasattr(schedule, "target_sparsity"):
            return Constant(schedule.target_sparsity), (begin, begin, frequency)
    raise ValueError(
        "schedule must be an object that has the target: PolynomialDecay or ConstantSparsity of TensorFlow's toolkit, "
        f"or one such as tf_prune.Cubic(0.9); got {schedule!r}."
    )
