"""How far outputs vary over the examples, and how far a file's outputs are from them: gathered batch by batch."""

import dataclasses

import numpy as np

_ELEMENTS_AT_ONCE = 1 << 20
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Spread:
    """What was gathered of one output, for each of its channels (its last axis).

    Attributes:
        spread: Standard deviation over the examples, at each position by itself, then pooled: what a file that does not
            look at its input gets wrong at least.
        error: Root mean square of the differences.
        peak: The largest difference.
        size: Root mean square of the outputs.
        low: The smallest output.
        high: The largest.
        seen: How many numbers.
    """

    spread: np.ndarray
    error: np.ndarray
    peak: np.ndarray
    size: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seen: np.ndarray


class Numbers:
    """Gathers the spread of outputs of shape (examples, *positions, channels), which may be of several sizes.

    Nothing is kept but moments: count, mean, squares and squared differences at each place, in float64 (Chan et al.).
    Infinite ones are left out.
    """

    def __init__(self) -> None:
        self._places: np.ndarray | None = None  # count, mean, squares around it, squared differences
        self._channels = np.zeros((3, 0))  # largest difference, smallest, largest

    def add(self, expected: np.ndarray, got: np.ndarray) -> None:
        """Adds some examples, a part at a time so that copies in float64 stay small."""
        shape = expected.shape[1:]
        old = np.zeros((4, *[0] * len(shape))) if self._places is None else self._places
        self._places = _grown(old, shape, 0.0)
        self._channels = _grown(self._channels, shape[-1:], -np.inf)
        size = max(1, _ELEMENTS_AT_ONCE // max(1, int(np.prod(shape))))
        for i in range(0, len(expected), size):
            self._add(expected[i : i + size].astype(np.float64), got[i : i + size].astype(np.float64))

    def _add(self, expected: np.ndarray, got: np.ndarray) -> None:
        assert self._places is not None  # noqa: S101
        finite = np.isfinite(expected) & np.isfinite(got)
        expected, difference = np.where(finite, expected, 0), np.where(finite, got, 0) - np.where(finite, expected, 0)
        count, mean, squares, errors = self._places[(slice(None), *map(slice, expected.shape[1:]))]
        new = finite.sum(0)
        total = np.maximum(count + new, 1)
        here = expected.sum(0) / np.maximum(new, 1)
        step = here - mean
        squares += (np.where(finite, expected - here, 0) ** 2).sum(0) + step**2 * count * new / total
        mean += step * new / total
        errors += (difference**2).sum(0)
        count += new
        axes = tuple(range(expected.ndim - 1))
        extremes = [
            np.where(finite, a, -np.inf).max(axes, initial=-np.inf) for a in (abs(difference), -expected, expected)
        ]
        channels = self._channels[:, : expected.shape[-1]]
        np.maximum(channels, extremes, out=channels)

    def spread(self) -> Spread:
        """What was gathered."""
        assert self._places is not None  # noqa: S101
        count, mean, squares, errors = self._places
        axes = tuple(range(count.ndim - 1))
        seen = count.sum(axes)
        # A place of one example has no spread; its error counts where no place has.
        twice = np.where(count > 1, count, 0).sum(axes)
        judged = (count > 1) | (twice == 0)
        peak, low, high = self._channels
        some = seen > 0
        return Spread(
            spread=np.sqrt(np.where(count > 1, squares, 0).sum(axes) / np.maximum(twice, 1)),
            error=np.sqrt(np.where(judged, errors, 0).sum(axes) / np.maximum(np.where(twice > 0, twice, seen), 1)),
            peak=np.where(some, peak, 0),
            size=np.sqrt((squares + count * mean**2).sum(axes) / np.maximum(seen, 1)),
            low=np.where(some, -low, 0),
            high=np.where(some, high, 0),
            seen=seen,
        )


class Labels:
    """Gathers where outputs that are no numbers, or whole ones, differ: (examples, *positions, channels).

    Attributes:
        different: Of each channel, how many differ from the expected ones.
        changes: Of each channel, half of how many differ from those of another example, drawn at random. A file that
            always says the same is wrong at least so often, since each label that is not the most frequent one has
            two partners.
        seen: How many labels, of all channels.
    """

    def __init__(self) -> None:
        self._counts = np.zeros((2, 0))
        self._last: np.ndarray | None = None
        self._generator = np.random.default_rng(_SEED)
        self.seen = 0

    @property
    def different(self) -> np.ndarray:
        """See the class."""
        return self._counts[0]

    @property
    def changes(self) -> np.ndarray:
        """See the class."""
        return self._counts[1] / 2

    def add(self, expected: np.ndarray, got: np.ndarray) -> None:
        """Adds some examples."""
        if not expected.size:
            return
        self._counts = _grown(self._counts, expected.shape[-1:], 0.0)
        one = len(expected) == 1 and self._last is not None and self._last.shape == expected.shape
        order = np.roll(self._generator.permutation(len(expected)), 1)
        ordered = expected[np.roll(order, -1)]
        axes = tuple(range(expected.ndim - 1))
        counts = self._counts[:, : expected.shape[-1]]
        counts[0] += (expected != got).sum(axes)
        counts[1] += ((expected != self._last) if one else (ordered != expected[order])).sum(axes)
        self._last = expected[-1:]
        self.seen += expected.size


def _grown(array: np.ndarray, shape: tuple[int, ...], fill: float) -> np.ndarray:
    """With room for the shape behind the first axis."""
    more = [(0, 0), *((0, max(0, new - old)) for old, new in zip(array.shape[1:], shape, strict=True))]
    return np.pad(array, more, constant_values=fill) if any(after for _, after in more) else array
