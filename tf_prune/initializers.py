"""Initial weights: the orthogonal kinds, and the Gaussians of the papers. All serializable, all for any kernel.

The last two axes of a shape are inputs and outputs, as in Keras; the axes before them are the window of a convolution.
"""

import abc
import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops


class _Gain(keras.initializers.Initializer, abc.ABC):
    """An initializer that multiplies an isometry by a gain.

    A seed that is an integer gives the same values at each call, as everywhere in Keras.
    """

    def __init__(self, gain: float = 1.0, seed: Any = None):
        if not (isinstance(gain, (int, float)) and math.isfinite(gain) and gain > 0):
            raise ValueError(f"gain must be a positive number, got {gain!r}. See tf_prune.mean_field_gain.")
        self.gain = gain
        self._inner = keras.initializers.RandomNormal(0.0, 1.0, seed)
        self.seed = self._inner.seed

    def get_config(self) -> dict[str, Any]:
        """What makes it again."""
        return {"gain": self.gain, "seed": self._inner.get_config()["seed"]}

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        shape = tuple(shape)
        if len(shape) < 2:
            raise ValueError(
                f"An orthogonal kernel needs at least two axes, inputs and outputs; got the shape {shape}. Biases "
                "take another initializer, such as zeros."
            )
        kernel = self.gain * self._isometry(shape[:-2], shape[-2], shape[-1])
        return ops.cast(kernel, dtype or keras.config.floatx())

    @abc.abstractmethod
    def _isometry(self, window: tuple[int, ...], inputs: int, outputs: int) -> Any:
        """The kernel for a gain of 1."""

    def _matrix(self, rows: int, columns: int) -> Any:
        """An orthogonal matrix, or the part of one."""
        matrix = _orthogonal(*self._normals((max(rows, columns), min(rows, columns))))
        return matrix if rows >= columns else ops.transpose(matrix)

    def _normals(self, *shapes: tuple[int, ...]) -> list[Any]:
        """All that a kernel needs in one draw; in float64, so that what is orthogonal is so to the last digit."""
        ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        draw = ops.cast(keras.random.normal((ends[-1],), seed=self.seed, dtype="float32"), "float64")
        parts = [draw[end - math.prod(shape) : end] for end, shape in zip(ends, shapes, strict=True)]
        return [ops.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _orthogonal(normal: Any) -> Any:
    """Matrices with orthonormal columns, uniform (Haar), from Gaussian ones that are not wider than high."""
    q, r = ops.qr(normal)
    return q * ops.sign(ops.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


@keras.saving.register_keras_serializable(package="tf_prune")
class Orthogonal(_Gain):
    """A kernel that is an orthogonal matrix `W`, window and inputs together along its rows.

    `W^T W = gain^2 I`, or `W W^T = gain^2 I` where it is wider than high. A dense layer is an isometry up to the gain,
    at least of as many dimensions as its smaller side has. Of a convolution it is the reshaped kind: a single patch is
    mapped isometrically, an image is not, because patches overlap; see `DeltaOrthogonal` and `ConvolutionOrthogonal`.

    Args:
        gain: Of all singular values.
        seed: An integer, a `keras.random.SeedGenerator`, or `None`.

    Raises:
        ValueError: If the gain is not positive, or the shape has fewer than two axes.

    >>> import numpy as np
    >>> kernel = Orthogonal(seed=0)((4, 3))
    >>> np.allclose(np.transpose(kernel) @ kernel, np.eye(3), atol=1e-6)
    True

    Source: Saxe et al. 2014; Lee et al. 2020, Sec. 4.1.2. What `keras.initializers.Orthogonal` gives, but factorized
    in float64.
    """

    def _isometry(self, window: tuple[int, ...], inputs: int, outputs: int) -> Any:
        return ops.reshape(self._matrix(math.prod(window) * inputs, outputs), (*window, inputs, outputs))


@keras.saving.register_keras_serializable(package="tf_prune")
class DeltaOrthogonal(_Gain):
    """A convolution that is an orthogonal matrix at the window's center and zero elsewhere.

    A convolution of stride 1 with `"same"` or circular padding is then an isometry of whole images, up to the gain,
    where it has no more inputs than outputs; otherwise its transpose is one: all singular values are the gain or, of
    what is projected out, 0. A dense kernel has no window, and is that of `Orthogonal`.

    Args:
        gain: Of all singular values.
        seed: An integer, a `keras.random.SeedGenerator`, or `None`.

    Raises:
        ValueError: If the gain is not positive, or the shape has fewer than two axes.

    >>> import numpy as np
    >>> kernel = np.asarray(DeltaOrthogonal(seed=0)((3, 3, 2, 2)))
    >>> int(np.count_nonzero(kernel.any((2, 3))))
    1
    >>> np.allclose(kernel[1, 1] @ kernel[1, 1].T, np.eye(2), atol=1e-6)
    True

    Source: Xiao et al. 2018, Algorithm 1. The paper takes no fewer outputs than inputs; this takes any.
    """

    def _isometry(self, window: tuple[int, ...], inputs: int, outputs: int) -> Any:
        matrix = self._matrix(inputs, outputs)
        center = [(n - 1) // 2 for n in window]  # where Keras's "same" has it
        padding = [(c, n - 1 - c) for c, n in zip(center, window, strict=True)]
        return ops.pad(ops.reshape(matrix, (*[1] * len(window), inputs, outputs)), [*padding, (0, 0), (0, 0)])


@keras.saving.register_keras_serializable(package="tf_prune")
class ConvolutionOrthogonal(_Gain):
    """A convolution whose whole window is filled, and that is an isometry of images under circular padding.

    `W(z) = O prod_i (P_i + (I - P_i) z_a)`: an orthogonal matrix times, along each axis a of the window, one factor of
    two taps less than it is long, with random orthogonal projections `P_i`. At every frequency that is an orthogonal
    matrix, so all singular values of the convolution are the gain: under circular padding exactly, under `"same"` but
    for the border. With more inputs than outputs its transpose is the isometry. A dense kernel is that of `Orthogonal`.

    Args:
        gain: Of all singular values.
        seed: An integer, a `keras.random.SeedGenerator`, or `None`.

    Raises:
        ValueError: If the gain is not positive, or the shape has fewer than two axes.

    >>> import numpy as np
    >>> kernel = np.asarray(ConvolutionOrthogonal(seed=0)((3, 3, 2, 2)))
    >>> transfer = np.fft.fft2(kernel, s=(8, 8), axes=(0, 1))
    >>> np.allclose(np.linalg.svd(transfer, compute_uv=False), 1, atol=1e-6)
    True

    Source: Xiao et al. 2018, appendix ("2-D orthogonal kernel"); the orthogonal initialization of the code of Lee et
    al. 2020. They take no fewer outputs than inputs and square windows; this takes any.
    """

    def _isometry(self, window: tuple[int, ...], inputs: int, outputs: int) -> Any:
        width, narrow = max(inputs, outputs), min(inputs, outputs)
        axes = [axis for axis, n in enumerate(window) for _ in range(n - 1)]
        first, *normals = self._normals((width, narrow), *[(width, width + 1)] * len(axes))
        kernel = ops.reshape(ops.transpose(_orthogonal(first)), (*[1] * len(window), narrow, width))
        for axis, draw in zip(axes, normals, strict=True):
            columns = _orthogonal(draw[:, :-1]) * ops.cast(draw[:, -1] > 0, "float64")
            projection = columns @ ops.transpose(columns)
            projected = kernel @ projection
            after, before = ([[0, 0] for _ in range(len(window) + 2)] for _ in range(2))
            after[axis][1] = before[axis][0] = 1
            kernel = ops.pad(projected, after) + ops.pad(kernel - projected, before)
        if inputs <= outputs:
            return kernel
        return ops.moveaxis(kernel, -1, -2)


class _Untruncated(keras.initializers.VarianceScaling):
    """Variance scaling by a normal distribution that is not truncated."""

    _SCALE: float
    _MODE: str

    def __init__(self, seed: Any = None):
        super().__init__(self._SCALE, self._MODE, "untruncated_normal", seed)

    def get_config(self) -> dict[str, Any]:
        """What makes it again."""
        return {"seed": super().get_config()["seed"]}


@keras.saving.register_keras_serializable(package="tf_prune")
class LeCunNormal(_Untruncated):
    """`w ~ N(0, 1 / fan_in)`, not truncated: VS-L of the paper.

    Args:
        seed: An integer, a `keras.random.SeedGenerator`, or `None`.

    >>> LeCunNormal(seed=0)((100, 50)).shape
    TensorShape([100, 50])

    Source: LeCun et al. 1998; Lee et al. 2020, Table 3, whose code does not truncate. Keras's own does.
    """

    _SCALE, _MODE = 1.0, "fan_in"


@keras.saving.register_keras_serializable(package="tf_prune")
class GlorotNormal(_Untruncated):
    """`w ~ N(0, 2 / (fan_in + fan_out))`, not truncated: VS-G of the paper.

    Args:
        seed: An integer, a `keras.random.SeedGenerator`, or `None`.

    >>> GlorotNormal(seed=0)((100, 50)).shape
    TensorShape([100, 50])

    Source: Glorot and Bengio 2010; Lee et al. 2020, Table 3, whose code does not truncate. Keras's own does.
    """

    _SCALE, _MODE = 1.0, "fan_avg"


@keras.saving.register_keras_serializable(package="tf_prune")
class HeNormal(_Untruncated):
    """`w ~ N(0, 2 / fan_in)`, not truncated: VS-H of the paper.

    Args:
        seed: An integer, a `keras.random.SeedGenerator`, or `None`.

    >>> HeNormal(seed=0)((100, 50)).shape
    TensorShape([100, 50])

    Source: He et al. 2015; Lee et al. 2020, Table 3, whose code does not truncate. Keras's own does.
    """

    _SCALE, _MODE = 2.0, "fan_in"


@keras.saving.register_keras_serializable(package="tf_prune")
class ScaledGaussian(keras.initializers.RandomNormal):
    """`w ~ N(0, gamma)` whatever the fans: SG of the paper. γ is the variance.

    Args:
        gamma: The variance; not negative.
        seed: An integer, a `keras.random.SeedGenerator`, or `None`.

    Raises:
        ValueError: If gamma is negative.

    >>> import numpy as np
    >>> bool(abs(np.std(ScaledGaussian(0.01, seed=0)((100, 100))) - 0.1) < 0.002)
    True

    Source: Lee et al. 2020, Sec. 3 and Table 2. The text scales the standard deviation by γ; the figures of its tables,
    and its code, come out with a standard deviation of √γ.
    """

    def __init__(self, gamma: float = 1.0, seed: Any = None):
        if not gamma >= 0:
            raise ValueError(f"gamma is a variance and cannot be negative, got {gamma!r}.")
        super().__init__(0.0, math.sqrt(gamma), seed)
        self.gamma = gamma

    def get_config(self) -> dict[str, Any]:
        """What makes it again."""
        return {"gamma": self.gamma, "seed": super().get_config()["seed"]}


INITIALIZERS: dict[str, type[keras.initializers.Initializer]] = {
    "orthogonal": Orthogonal,
    "delta_orthogonal": DeltaOrthogonal,
    "convolution_orthogonal": ConvolutionOrthogonal,
    "lecun_normal": LeCunNormal,
    "glorot_normal": GlorotNormal,
    "he_normal": HeNormal,
    "scaled_gaussian": ScaledGaussian,
}
