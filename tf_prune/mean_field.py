"""What a wide network does to the variance of its pre-activations, and the gain at which signals neither grow nor fade.

`q' = σ_w² E[φ(√q z)²] + σ_b²` and `χ₁ = σ_w² E[φ'(√q z)²]` with z ~ N(0, 1). On the critical line χ₁ = 1.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

# The normal distribution at the middles of equal steps: sums that converge exponentially for smooth functions, and
# nodes that do not meet a kink at 0.
_NODES = (np.arange(-(2**15), 2**15) + 0.5) * 2.0**-12
_WEIGHTS = np.exp(-(_NODES**2) / 2)
_WEIGHTS /= _WEIGHTS.sum()
_VARIANCES = np.geomspace(1e-4, 1e6, 51)
_TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class CriticalPoint:
    """Where the variance of pre-activations is a fixed point and χ₁ is 1.

    Attributes:
        variance: q*, of the pre-activations; `None` where every variance is a fixed point (linear, ReLU).
        weight_variance: σ_w²: weights have the variance σ_w² / fan_in, or are an orthogonal matrix times σ_w.
        bias_variance: σ_b².
    """

    variance: float | None
    weight_variance: float
    bias_variance: float

    @property
    def gain(self) -> float:
        """σ_w: what an orthogonal initializer takes."""
        return math.sqrt(self.weight_variance)


def _function(activation: Any) -> Callable[[np.ndarray], np.ndarray]:
    if isinstance(activation, keras.Layer):  # which would compute in its own precision
        activation = type(activation).from_config({**activation.get_config(), "dtype": "float64"})
    activation = keras.activations.get(activation)

    def function(values: np.ndarray) -> np.ndarray:
        return np.asarray(activation(keras.ops.convert_to_tensor(values, "float64")), np.float64)

    points = np.array([-1.0, -0.5, 0.25, 1.5])
    try:
        whole, single = function(points), np.concatenate([function(points[i : i + 1]) for i in range(4)])
    except Exception as error:  # whatever a function raises that takes no such vector
        raise ValueError(_not_elementwise(activation, str(error).splitlines()[0])) from error
    if whole.shape != points.shape or not np.allclose(whole, single):
        raise ValueError(_not_elementwise(activation, "its value depends on other units"))
    return function


def _not_elementwise(activation: Any, why: str) -> str:
    name = getattr(activation, "__name__", repr(activation))
    return (
        f"The activation {name!r} has no mean-field gain ({why}). Expected the name of an elementwise activation of "
        "Keras, or a function of one tensor, such as keras.ops.erf."
    )


def _moments(function: Callable[[np.ndarray], np.ndarray], variance: float) -> tuple[float, float]:
    """E[φ²] and E[φ'²] at pre-activations of this variance."""
    points = math.sqrt(variance) * _NODES
    step = 2.0 ** round(math.log2(variance) / 2 - 18)
    grid = np.round(points / step) * step  # here differences of piecewise linear functions are exact
    slopes = (function(grid + step) - function(grid - step)) / (2 * step)
    return float(_WEIGHTS @ function(points) ** 2), float(_WEIGHTS @ slopes**2)


def _check(name: str, value: float, lowest_is_allowed: bool) -> None:
    if not (math.isfinite(value) and (value > 0 or (lowest_is_allowed and value == 0))):
        raise ValueError(f"{name} must be a {'non-negative' if lowest_is_allowed else 'positive'} number, got {value}.")


def next_variance(activation: Any, variance: float, weight_variance: float, bias_variance: float = 0.0) -> float:
    """The variance of the pre-activations one layer later, in a wide network of random weights.

    `q' = σ_w² E[φ(√q z)²] + σ_b²`

    Args:
        activation: An elementwise activation of Keras, its name, or a function of one tensor.
        variance: q, of the pre-activations of this layer.
        weight_variance: σ_w²; weights have the variance σ_w² / fan_in.
        bias_variance: σ_b².

    Raises:
        ValueError: If the activation is not elementwise, or a variance is negative.

    >>> round(next_variance("relu", 3.0, weight_variance=2.0), 6)
    3.0

    Source: Poole et al. 2016, Eq. 3; Schoenholz et al. 2017, Eq. 3.
    """
    for name, value in (("variance", variance), ("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        _check(name, value, lowest_is_allowed=True)
    return weight_variance * _moments(_function(activation), variance or 1e-300)[0] + bias_variance


def mean_field_gain(activation: Any, variance: float) -> float:
    """The gain σ_w at which gradients keep their size, where pre-activations have this variance.

    `σ_w = E[φ'(√q z)²]^(-1/2)`, which is χ₁ = 1. As q → 0 it is 1 / |φ'(0)|; of ReLU it is √2 at every q.

    Args:
        activation: An elementwise activation of Keras, its name, or a function of one tensor.
        variance: q, of the pre-activations. That it stays q needs biases of the variance `q - next_variance(activation,
            q, σ_w²)`; where that is negative, q is not a fixed point of any network. See `critical_point`.

    Raises:
        ValueError: If the activation is not elementwise or has no slope there, or the variance is not positive.

    >>> round(mean_field_gain("relu", 1.0), 6), round(mean_field_gain("tanh", 1e-4), 3)
    (1.414214, 1.0)

    Source: Schoenholz et al. 2017, Eq. 5 with χ₁ = 1; Pennington et al. 2017; Lee et al. 2020, Sec. 4.1.2. E is a sum
    over 65,536 nodes, φ' a central difference: exact to 1e-7 for smooth activations, 1e-4 for those with kinks off 0.
    """
    _check("variance", variance, lowest_is_allowed=False)
    return _gain(_function(activation), variance)


def _gain(function: Callable[[np.ndarray], np.ndarray], variance: float) -> float:
    slope = _moments(function, variance)[1]
    if not (math.isfinite(slope) and slope > 1e-6):
        raise ValueError(f"The activation has no finite slope at pre-activations of variance {variance:g}.")
    return 1 / math.sqrt(slope)


def critical_point(activation: Any, bias_variance: float = 0.0) -> CriticalPoint:
    """Solves for q* and σ_w² on the critical line χ₁ = 1, given the variance of the biases.

    `q* = σ_w² E[φ(√q* z)²] + σ_b²` with `σ_w² = 1 / E[φ'(√q* z)²]`. Of several fixed points it is the least that is
    stable: there the variance returns to q* after a disturbance.

    Args:
        activation: An elementwise activation of Keras, its name, or a function of one tensor.
        bias_variance: σ_b². 0 gives q* = 0 for tanh and the like: the linear regime.

    Raises:
        ValueError: If the activation is not elementwise, or has no critical point with this bias variance.

    >>> [round(critical_point(name).weight_variance, 6) for name in ("relu", "tanh", "linear")]
    [2.0, 1.0, 1.0]
    >>> point = critical_point("tanh", bias_variance=0.01)
    >>> round(point.variance, 3), round(point.gain, 3)
    (0.273, 1.193)

    Source: Schoenholz et al. 2017, Sec. 3; Pennington et al. 2017, Sec. 2.
    """
    _check("bias_variance", bias_variance, lowest_is_allowed=True)
    function = _function(activation)

    def surplus(variance: float) -> float:
        """How far q is above what the layer makes of it, in units of q."""
        value, slope = _moments(function, variance)
        return (variance - value / slope - bias_variance) / variance if slope > 0 else math.nan

    if abs(function(np.zeros(1))[0]) < _TOLERANCE and bias_variance == 0:
        if all(abs(surplus(q)) < _TOLERANCE for q in (1e-3, 1.0, 1e3)):
            return CriticalPoint(None, _gain(function, 1.0) ** 2, 0.0)
        if surplus(1e-3) > -_TOLERANCE and _moments(function, 1e-12)[1] > 1e-3:  # falls to 0 from any side
            return CriticalPoint(0.0, _gain(function, 1e-12) ** 2, 0.0)
    signs = (math.copysign(1, surplus(variance)) for variance in _VARIANCES)  # as far as they are needed
    for (low, before), (high, sign) in itertools.pairwise(zip(_VARIANCES.tolist(), signs, strict=True)):
        if before != sign:
            for _ in range(40):
                middle = math.sqrt(low * high)
                low, high = (low, middle) if math.copysign(1, surplus(middle)) == sign else (middle, high)
            weight_variance = _gain(function, low) ** 2
            if weight_variance * _moments(function, 1.01 * low)[0] + bias_variance < 1.01 * low:  # it comes back
                return CriticalPoint(low, weight_variance, bias_variance)
    raise ValueError(
        f"The activation {getattr(activation, '__name__', activation)!r} has no stable critical point with a bias "
        f"variance of {bias_variance:g}: on the line χ₁ = 1 the variance of its pre-activations grows or falls without "
        "end. Try another bias_variance (0 for ReLU and linear layers, more for sigmoid)."
    )
