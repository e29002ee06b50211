"""The `Masks` type, and the one place where scores become masks. NumPy only.

A mask is boolean, `True` = kept. Scores and masks are dictionaries keyed by `variable.path`, in
model order. A score is always "larger = keep".
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_prune.mask_files import decode, encode
from tf_prune.scopes import SCOPES, check_sparsity, kept_in_each, num_kept, too_few
from tf_prune.whole_files import replacing_file

Scores = Mapping[str, np.ndarray]

_CHUNK = 1 << 18  # values at a time: what is computed on the way fits into a cache


class Masks(Mapping[str, np.ndarray]):
    """Boolean masks of a model's weights, `True` = kept, keyed by `variable.path`.

    Immutable: every array is copied in and read-only, and can hold nothing but `True` and `False`.

    Args:
        masks: Mapping of path to array; an array of booleans, or of exact zeros and ones.
        status: What `masks_of` says of them; it takes no part in comparisons, and is not saved.

    Raises:
        ValueError: If a key is not a string or an array holds anything else.

    >>> masks = Masks({"dense/kernel": [[True, False], [False, False]]})
    >>> masks.num_weights, masks.num_kept, masks.sparsity
    (4, 1, 0.75)
    """

    def __init__(self, masks: Mapping[str, Any], *, status: str = ""):
        self.status = status
        if not isinstance(masks, Mapping):
            raise ValueError(f"Masks are a mapping of variable.path to array of booleans, got {type(masks).__name__}.")
        self._masks: dict[str, np.ndarray] = {}
        for path, mask in masks.items():
            array = np.asarray(mask)
            if not isinstance(path, str):
                raise ValueError(f"A mask's key must be a variable's path (a string), got {path!r}.")
            if array.dtype != bool and not np.isin(array, (0, 1)).all():
                raise ValueError(f"The mask {path!r} must hold only True and False (or 1 and 0).")
            self._masks[path] = array.astype(bool)
            self._masks[path].setflags(write=False)

    def __getitem__(self, path: str) -> np.ndarray:
        return self._masks[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return list(self) == list(other) and all(np.array_equal(self[path], other[path]) for path in self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Masks of {len(self)} variables: {self.num_kept:,} of {self.num_weights:,} weights kept>"

    @property
    def num_weights(self) -> int:
        """How many weights the masks cover."""
        return sum(mask.size for mask in self.values())

    @property
    def num_kept(self) -> int:
        """How many weights are kept."""
        return sum(int(np.count_nonzero(mask)) for mask in self.values())

    @property
    def density(self) -> float:
        """The fraction of weights that is kept."""
        return self.num_kept / self.num_weights if self.num_weights else 1.0

    @property
    def sparsity(self) -> float:
        """The fraction of weights that is removed."""
        return 1.0 - self.density

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the masks to `file` (`.npz`), 8 weights a byte; an existing file is replaced in one step.

        The file holds `format`, `count` (of masks), `checksum`, and for the i-th mask `path_i` (its key), `shape_i` and
        `bits_i` (`numpy.packbits` of the flattened mask). `numpy.load` reads it without this package:
        `numpy.unpackbits(file["bits_0"], count=math.prod(file["shape_0"])).reshape(file["shape_0"])`.
        It is not compressed, so that what a file asks for when it is read is bounded by its size.

        Raises:
            ValueError: If a path ends in a zero character.
        """
        content = encode(self)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Masks":
        """Reads what `save` wrote, also in earlier versions.

        Raises:
            ValueError: If the file is damaged or is not a file of masks.
        """
        try:
            if Path(file).exists() and not Path(file).is_file():
                raise ValueError("it is a folder or a device")
            return cls(decode(Path(file).read_bytes()))
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(file)!r} is not a whole file of masks ({error}). Expected a file written by Masks.save."
            ) from error


def check_finite(scores: Scores) -> None:
    """Raises a `ValueError` that names the first variable with a score that is not finite."""
    for path, score in scores.items():
        bad = score.size - np.count_nonzero(np.isfinite(score))
        if bad:
            raise ValueError(
                f"{bad} of {score.size} scores of {path!r} are not finite, so its weights cannot be ranked. "
                "Check the model for exploding activations (normalize the inputs, lower the weights' scale)."
            )


def _chunks(array: np.ndarray, among: np.ndarray | None) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    """Where, the values and the candidates, in pieces that are read from memory once, whatever is done with them."""
    array = array.reshape(-1)
    among = None if among is None else among.reshape(-1)
    for start in range(0, array.size, _CHUNK):
        place = slice(start, start + _CHUNK)
        yield place, array[place], None if among is None else among[place]


def _kth_largest(scores: Scores, count: int, among: Scores | None) -> tuple[Any, int]:
    """The `count`-th largest candidate, and how many of those equal to it are among the `count` largest.

    A sample says between which two values it lies, most likely; then only what lies between is ranked.
    """
    total = sum(s.size if among is None else int(np.count_nonzero(among[path])) for path, s in scores.items())
    samples = [score.reshape(-1)[::64] for score in scores.values()]
    if among is not None:
        samples = [s[among[path].reshape(-1)[::64]] for s, path in zip(samples, scores, strict=True)]
    sample = np.concatenate(samples)
    if sample.size > 1 << 14:
        rank = sample.size * count / total
        margin = 4 * math.sqrt(sample.size)
        places = [min(max(int(sample.size - rank + m), 0), sample.size - 1) for m in (-margin, margin)]
        low, high = np.partition(sample, places)[places]
        above, found, between = 0, 0, []
        for path, score in scores.items():
            for _, values, candidates in _chunks(score, None if among is None else among[path]):
                is_above, is_between = values > high, values >= low
                is_between ^= is_above
                if candidates is not None:
                    is_above &= candidates
                    is_between &= candidates
                above += int(np.count_nonzero(is_above))
                between.append(values[is_between])
                found += between[-1].size
            if found > total / 8:
                break  # ties: a copy does not pay
        else:
            if above < count <= above + found:
                return _by_digits(between, count - above)
    if among is None:
        return _by_digits([score.reshape(-1) for score in scores.values()], count)
    return _by_digits([score[among[path]] for path, score in scores.items()], count)


def _by_digits(arrays: Sequence[np.ndarray], count: int) -> tuple[Any, int]:
    """The same, exactly and always: histograms of 16 bits, the highest first.

    Two passes over float32, no copy of the scores, and no case that is slow. (A partition needs a copy, and takes 25
    times as long where most scores are 0.)
    """
    dtype = arrays[0].dtype
    unsigned, bits = np.dtype(f"u{dtype.itemsize}"), 8 * dtype.itemsize
    prefix, negative = 0, False
    for shift in range(bits - 16, -1, -16):
        histogram = np.zeros(1 << 16, np.int64)
        for array in arrays:
            for _, values, _ in _chunks(array, None):
                digits = (values + 0.0).view(unsigned)  # -0.0 becomes 0.0
                if shift < bits - 16:
                    digits = digits[(digits >> (shift + 16)) == prefix]
                histogram += np.bincount((digits >> shift).astype(np.uint16), minlength=1 << 16)
        digit = np.arange(1 << 16)
        if shift == bits - 16:  # the first bit is the sign, and numbers below 0 grow with fewer bits
            order = np.concatenate([digit[: 1 << 15][::-1], digit[1 << 15 :]])
        else:
            order = digit if negative else digit[::-1]
        reached = np.cumsum(histogram[order])
        place = int(np.searchsorted(reached, count))
        count -= int(reached[place - 1]) if place else 0
        prefix = prefix << 16 | int(order[place])
        negative = bool(prefix >> 15) if shift == bits - 16 else negative
    return np.array([prefix], unsigned).view(dtype)[0], count


def _keep_largest(
    scores: Mapping[str, np.ndarray],
    count: int,
    among: Mapping[str, np.ndarray] | None = None,
    first: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Marks exactly `count` entries: the largest, and among equals those with the lowest index.

    Comparing with the k-th largest score alone would keep or drop all of its ties: dead units give thousands of exact
    zeros.
    """
    if first is not None and among is not None:
        sure = sum(int(np.count_nonzero(first[path])) for path in scores)
        if count <= sure:
            return _keep_largest(scores, count, first)
        rest = _keep_largest(scores, count - sure, {path: among[path] & ~first[path] for path in scores})
        return {path: first[path] | mask for path, mask in rest.items()}
    if count <= 0:
        return {path: np.zeros(score.shape, bool) for path, score in scores.items()}
    threshold, ties = _kth_largest(scores, count, among)
    kept = {}
    for path, score in scores.items():
        kept[path] = np.empty(score.shape, bool)
        flat = kept[path].reshape(-1)
        for place, values, candidates in _chunks(score, None if among is None else among[path]):
            flat[place] = values > threshold if candidates is None else (values > threshold) & candidates
            if ties:
                equal = values == threshold if candidates is None else (values == threshold) & candidates
                found = int(np.count_nonzero(equal))
                if found > ties:
                    equal[np.flatnonzero(equal)[ties] :] = False
                flat[place] |= equal
                ties -= min(ties, found)
    return kept


def masks_from_scores(
    scores: Scores,
    sparsity: float,
    scope: str | Mapping[str, float] = "global",
    among: Mapping[str, np.ndarray] | None = None,
    first: Mapping[str, np.ndarray] | None = None,
    or_fewer: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Masks:
    """Keeps what has the largest scores; the only place where scores become masks.

    Of d scores, ceil(sparsity * d) are removed and the rest is kept, exactly: they are ranked by value and then by
    index, never compared with a threshold alone. A score is that of a weight, or of weights that are pruned together.

    Args:
        scores: Mapping of path to array of scores, larger = keep.
        sparsity: Fraction in [0, 1) to remove.
        scope: `"global"` ranks all together. The others rank within each array: `"layerwise"` removes
            ceil(sparsity * d) of each; `"uniform"` removes that many of the whole, as evenly as it goes; `"erk"`
            (Erdos-Renyi-kernel) removes that many of the whole and keeps a fraction of each kernel in proportion to
            `sum(shape) / prod(shape)`, but never more than all of it; a mapping of path to sparsity removes these
            fractions, and `sparsity` of the arrays that it does not name.
        among: Masks of the candidates; what is `False` there is never kept. It still counts in d.
        first: Masks of those candidates that are kept before all others, whatever their scores.
        or_fewer: Keeps all candidates, instead of raising, where fewer are left than are to be kept.
        shapes: The kernels' shapes for `"erk"`, where they are not those of the scores.

    Returns:
        `Masks` with the keys, the order and the shapes of `scores`.

    Raises:
        ValueError: If a score is not finite, nothing would be kept, or fewer candidates are left than are to be kept.

    Sources: ERK is Evci et al. 2020, Sec. 3, with the power 1 and nothing left dense on purpose.

    >>> masks_from_scores({"a": np.array([3.0, 1.0]), "b": np.array([2.0, 2.0])}, 0.5)["b"]
    array([ True, False])
    """
    sparsity = check_sparsity(sparsity)
    if not isinstance(scope, Mapping) and scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, or a table; got {scope!r}.")
    unknown = [path for path in scope if path not in scores] if isinstance(scope, Mapping) else []
    if unknown or not scores:
        what = f"The scope table names {unknown[0]!r}, which has no scores" if unknown else "There are no scores"
        raise ValueError(f"{what}. Scores are of: {', '.join(scores) or 'nothing'}.")
    dtype = np.result_type(np.float32, *(np.asarray(score).dtype for score in scores.values()))
    scores = {path: np.ascontiguousarray(score, dtype) for path, score in scores.items()}
    check_finite(scores)
    sizes = {path: score.size for path, score in scores.items()}
    total = sum(sizes.values())
    room = sizes if among is None else {path: int(np.count_nonzero(among[path])) for path in scores}
    if scope == "global":
        count = num_kept(total, sparsity)
        if count > sum(room.values()) and not or_fewer:
            raise too_few(sparsity, count, total, "the model", sum(room.values()))
        masks = _keep_largest(scores, min(count, sum(room.values())), among, first)
    else:
        masks = {}
        shapes = shapes or {path: score.shape for path, score in scores.items()}
        floors = {path: int(np.count_nonzero(first[path])) for path in scores} if first else None
        for path, count in kept_in_each(scope, sparsity, sizes, shapes, room, floors, or_fewer).items():
            masks.update(_keep_largest({path: scores[path]}, count, among, first))
    if not any(mask.any() for mask in masks.values()):
        largest = total if scope in ("global", "uniform", "erk") else max(sizes.values())
        raise ValueError(
            f"Sparsity {sparsity:g} keeps none of the {total:,} prunable weights or groups "
            f"({'table' if isinstance(scope, Mapping) else scope} scope). "
            f"Keep at least one: ask for a sparsity of at most {math.floor((1 - 1 / largest) * 1e6) / 1e6:g}."
        )
    return Masks(masks)
