"""Is one output of a file the model's? Judged by how far the model's own varies over the examples."""

import ml_dtypes  # what Keras and TensorFlow themselves have bfloat16 from
import numpy as np

from tf_prune.spread import Labels, Numbers, Spread

# A single number may be wrong by so many times what all are wrong by in the mean; a prediction, by less.
_PEAK, _MARGIN = 10, 4
# The last digits of a sum of products, and a constant beside which the spread is lost where weights are rounded (half a
# float16's last digit); the latter for a tolerance of 0.05 and more.
_DIGITS, _OFFSET = 8, 2.5e-4
_FEWEST_STEPS = 10
# Masks of attention and of beam search: one number, so far below all others that beside it nothing is seen.
_MASKED = -1e3


class ExportError(ValueError):
    """The exported model does not do what the model does; nothing was written."""


class Judge:
    """One output of both models.

    Attributes:
        largest: The largest difference of finite numbers.
        agreed: Predictions that are the same, and all.
    """

    def __init__(self, name: str, tolerance: float, step: float):
        self._name, self._tolerance, self._step = name, tolerance, float(step)
        self._numbers, self._labels, self._infinite = Numbers(), Labels(), Labels()
        self._kind, self._axes, self._any = "", 0, False
        self._epsilon = 2.0**-23  # files compute in float32 at best
        self._flips: list[np.ndarray] = []
        self.largest: float | None = None
        self.agreed = (0, 0)

    def add(self, expected: np.ndarray, got: np.ndarray, size: int) -> None:
        """Takes a batch. What can be told of it at once is."""
        if expected.shape != got.shape:
            self._fail(f"is of shape {got.shape}, the model's of {expected.shape}")
        kind, other = _kind(expected), _kind(got)
        if kind != other and ({kind, other} & {"text", "complex"} or kind == "bool"):
            self._fail(f"is {got.dtype}, the model's {expected.dtype}")
        self._kind = kind
        if not expected.size:
            return
        self._any = True
        shaped = [_with_axes(array, size) for array in (expected, got)]
        if self._axes not in (0, shaped[0].ndim):
            self._fail(f"has another number of axes from batch to batch, now {expected.shape} of {size} examples")
        self._axes = shaped[0].ndim
        if kind == "text":
            self._labels.add(*map(_as_bytes, shaped))
        elif kind == "bool":
            self._labels.add(*shaped)
        else:
            self._add_numbers(shaped[0], shaped[1], expected.ndim > 1 and expected.shape[-1] > 1)

    def _add_numbers(self, expected: np.ndarray, got: np.ndarray, has_classes: bool) -> None:
        if self._kind == "complex":
            expected, got = (np.concatenate([array.real, array.imag], -1) for array in (expected, got))
        if self._kind == "integer":
            self._labels.add(expected, got)
        else:
            self._epsilon = max([self._epsilon, *(_epsilon(array) for array in (expected, got))])
            for whose, array in (("model", expected), ("TF-Lite model", got)):
                if broken := int(np.isnan(array).sum()):
                    self._fail(f"cannot be compared: {broken:,} of the {whose}'s {array.size:,} numbers are nan")
            expected, got = _unmasked(expected, got)
            infinite = [np.sign(np.where(np.isinf(array), array, 0)).astype(np.int8) for array in (expected, got)]
            self._infinite.add(*infinite)
            if self._kind == "float" and has_classes:
                self._predictions(expected, got)
        self._numbers.add(expected, got)

    def _predictions(self, expected: np.ndarray, got: np.ndarray) -> None:
        """Notes which are the same, and of each other one both classes and the reference's margin between them."""
        ours, theirs = expected.argmax(-1), got.argmax(-1)
        self.agreed = (self.agreed[0] + int((ours == theirs).sum()), self.agreed[1] + ours.size)
        other = np.nonzero(ours != theirs)
        a, b = ours[other], theirs[other]
        with np.errstate(invalid="ignore"):
            margin = expected[(*other, a)].astype(np.float64) - expected[(*other, b)]
        self._flips.append(np.stack([a, b, margin])[:, np.isfinite(margin)])

    def verdict(self) -> list[str]:
        """What the data do not tell.

        Raises:
            ExportError: If it is wrong.
        """
        if not self._any:
            return [self._unknown("it is empty")]
        if self._kind in ("text", "bool"):
            return self._judged_labels(self._labels, "text" if self._kind == "text" else "in other places")
        gathered = self._numbers.spread()
        self.largest = float(gathered.peak.max())
        if self._kind == "integer":
            return self._judged_integers(gathered)
        if not gathered.seen.any():
            self._fail("cannot be compared: none of its numbers is finite. The model overflows on these data")
        infinite = self._judged_labels(self._infinite, "infinite") if self._infinite.different.any() else []
        return infinite + self._judged_numbers(gathered)

    def _judged_integers(self, gathered: Spread) -> list[str]:
        """As classes; or as numbers, if they vary by enough."""
        try:
            return self._judged_labels(self._labels, "in other places")
        except ExportError:
            if self._judged_numbers(gathered):
                raise
            return []

    def _judged_labels(self, labels: Labels, where: str) -> list[str]:
        """One may differ where many change; as many as the tolerance says where more do."""
        different, changes = labels.different, labels.changes
        enough = changes >= _FEWEST_STEPS
        allowed = np.maximum(self._tolerance * changes, enough) if where != "text" else 0 * changes
        allowed = np.minimum(allowed, 0.5 * changes + 1)
        wrong = different > allowed
        if (wrong & ((different > 1) | (changes == 0) | (where == "text"))).any():
            c = int(np.argmax(different - allowed))
            self._fail(
                f"differs from the model's in {int(different.sum()):,} of {labels.seen:,} places"
                + (" by being infinite there or not" if where == "infinite" else "")
                + f": in channel {c} {int(different[c]):,}, where one that is always the same differs in "
                f"{changes[c]:.0f} at least (allowed: {self._tolerance:g} of them)",
                rounding=where != "text",
            )
        if wrong.any():
            return [self._unknown(f"it is another in {int(different.sum())} places, and changes in few")]
        return [] if changes.any() or where == "infinite" else [self._unknown("it is the same in all examples")]

    def _judged_numbers(self, got: Spread) -> list[str]:
        tolerance, step = self._tolerance, max(self._step, float(self._kind == "integer"))
        sizes = np.maximum(abs(got.low), abs(got.high))
        offset = min(_OFFSET, _OFFSET / 0.05 * tolerance)
        least = max(_DIGITS * self._epsilon * float(sizes.max()), step)
        floor = np.maximum(least, offset * sizes)
        tells = (got.spread >= 2 * floor) | ((got.spread >= 2 * least) & (got.error <= tolerance * got.spread))
        tells &= (got.spread > 0) & (got.high - got.low >= _FEWEST_STEPS * step)
        # The common measure of all channels: of how far they vary, or of what they are where none does enough.
        common = float(np.sqrt(np.mean((got.spread[tells] if tells.any() else got.size) ** 2)))
        allowed = np.where(tells, np.hypot(tolerance * got.spread, floor), tolerance * common + 3 * floor)
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.nan_to_num(got.error / allowed, nan=0.0, posinf=np.inf)
        c = int(excess.argmax())
        if not got.error[c] <= allowed[c]:
            self._fail(self._too_far(got, c, float(allowed[c])), rounding=True)
        peaks = _PEAK * (tolerance * np.maximum(got.spread, common) + floor)
        c = int((got.peak - peaks).argmax())
        if not got.peak[c] <= peaks[c]:
            self._fail(self._too_far(got, c, float(peaks[c])), rounding=True)
        if tells.any():
            self._check_predictions(got.spread, floor)
        return self._unknown_channels(got, tells)

    def _check_predictions(self, spread: np.ndarray, floor: np.ndarray) -> None:
        a, b, margin = np.concatenate([*self._flips, np.zeros((3, 0))], 1)
        noise = self._tolerance * spread + floor
        allowed = _MARGIN * (noise[a.astype(int)] + noise[b.astype(int)])
        if (wrong := margin > allowed).any():
            worst = int((margin - allowed).argmax())
            self._fail(
                f"predicts other classes than the model's in {wrong.sum():,} of {self.agreed[1]:,} places where that "
                f"is sure: {int(b[worst])} for {int(a[worst])}, by a margin of {margin[worst]:.3g} (rounding may turn "
                f"{allowed[worst]:.3g})",
                rounding=True,
            )

    def _unknown_channels(self, got: Spread, tells: np.ndarray) -> list[str]:
        """A channel that hardly varies is right all the same if it agrees to its own measure."""
        told = f"{_FEWEST_STEPS} of the file's steps of {self._step:.3g}" if self._step else "the file's numbers tell"
        varies = got.spread > self._epsilon * got.size
        if not tells.any():
            if self._infinite.changes.any() and not varies.any():
                return []
            return [self._unknown(f"it varies by less than {told}" if varies.any() else "it is always the same")]
        own = np.where(varies, got.spread, got.size)
        unknown = ~tells & (got.error > self._tolerance * own) & (got.seen > 0)
        if not unknown.any():
            return []
        return [self._unknown(f"{unknown.sum():,} of its {len(tells):,} channels vary by less than {told}")]

    def _too_far(self, got: Spread, channel: int, allowed: float) -> str:
        return (
            f"differs from the model's by up to {self.largest:.3g}, in channel {channel} of {len(got.error)} by "
            f"{got.error[channel]:.3g} in the root mean square and {got.peak[channel]:.3g} at most (allowed: "
            f"{allowed:.3g}; the model's varies by {got.spread[channel]:.3g} over the examples and is up to "
            f"{max(abs(got.low[channel]), abs(got.high[channel])):.3g})"
        )

    def _unknown(self, why: str) -> str:
        return (
            f"The data do not tell whether output {self._name!r} is right: {why}. Pass more examples, and such "
            "that the model tells apart."
        )

    def _fail(self, what: str, rounding: bool = False) -> None:
        hint = f" If the difference is rounding, raise tolerance= from {self._tolerance:g}." if rounding else ""
        raise ExportError(f"The TF-Lite model's output {self._name!r} {what}. Nothing was written.{hint}")


def _kind(array: np.ndarray) -> str:
    if array.dtype.kind in "OSU":
        return "text"
    return {"b": "bool", "i": "integer", "u": "integer", "c": "complex"}.get(array.dtype.kind, "float")


def _epsilon(array: np.ndarray) -> float:
    return float(ml_dtypes.finfo(array.dtype).eps) if _kind(array) == "float" else 2.0**-23


def _with_axes(array: np.ndarray, size: int) -> np.ndarray:
    """(examples, ..., channels). An output that is not of each example is one of each call."""
    array = array if array.ndim and len(array) == size else array[None]
    return array[..., None] if array.ndim == 1 else array


def _as_bytes(array: np.ndarray) -> np.ndarray:
    texts = [text.encode() if isinstance(text, str) else text for text in array.ravel().tolist()]
    return np.array([*texts, None], object)[:-1].reshape(array.shape)


def _unmasked(expected: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks as minus infinity, so that beside them the rest is seen."""
    finite = np.isfinite(expected)
    low = float(expected.min(initial=0, where=finite))
    masked = finite & (expected < np.float64(0.5 * low))
    others = float(abs(expected).max(initial=0, where=finite & ~masked))
    same = masked.any() and float(np.ptp(expected[masked].astype(np.float64))) <= -1e-6 * low
    if not same or low > _MASKED * max(1.0, others) or (masked == finite).all():
        return expected, got
    return np.where(masked, -np.inf, expected), np.where(abs(got - low) < -0.1 * low, -np.inf, got)
