"""The `Masks` type, and the one place where scores become masks. NumPy only.

A mask is boolean, `True` = kept. Scores and masks are dictionaries keyed by `variable.path`, in
model order. A score is always "larger = keep".
"""

import math
import numbers
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Scores = Mapping[str, np.ndarray]

SCOPES = ("global", "layerwise")
_FORMAT = "tf_prune masks 1"


def check_sparsity(sparsity: Any) -> float:
    """Returns the sparsity as a float, or raises an error that says how to fix it.

    Args:
        sparsity: Fraction in [0, 1) of weights to remove.

    Raises:
        ValueError: If it is no number, or outside of [0, 1).

    >>> check_sparsity(0.9)
    0.9
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise ValueError(
            f"sparsity must be a number in [0, 1), the fraction of weights removed; got {sparsity!r} "
            f"of type {type(sparsity).__name__}."
        )
    # A float32 is written out first: 0.1 in float32 is the user's 0.1, not 0.100000001490116.
    value = float(str(sparsity)) if isinstance(sparsity, np.floating) else float(sparsity)
    if 0.0 <= value < 1.0:
        return value
    hint = f" Did you mean {value / 100:g}?" if 1.0 < value < 100.0 else ""
    raise ValueError(f"sparsity must be in [0, 1), the fraction of weights removed; got {sparsity}.{hint}")


def num_kept(size: int, sparsity: float) -> int:
    """How many of `size` weights are kept: `size - ceil(sparsity * size)`, float noise set aside.

    A product within 1e-12 of each weight's share of an integer counts as that integer, so that
    0.9 of 1000 removes 900 although `0.9 * 1000` may not be exactly 900 after a schedule computed 0.9.

    >>> num_kept(1000, 0.9), num_kept(1000, 1 - 0.1), num_kept(3, 0.5)
    (100, 100, 1)
    """
    removed = check_sparsity(sparsity) * size
    nearest = round(removed)
    if abs(removed - nearest) > 1e-12 * size:
        nearest = math.ceil(removed)
    return size - nearest


class Masks(Mapping[str, np.ndarray]):
    """Boolean masks of a model's weights, `True` = kept, keyed by `variable.path`.

    Immutable: every array is copied in and read-only, and can hold nothing but `True` and `False`.

    Args:
        masks: Mapping of path to array; an array of booleans, or of exact zeros and ones.

    Raises:
        ValueError: If a key is not a string or an array holds anything else.

    >>> masks = Masks({"dense/kernel": [[True, False], [False, False]]})
    >>> masks.num_weights, masks.num_kept, masks.sparsity
    (4, 1, 0.75)
    """

    def __init__(self, masks: Mapping[str, Any]):
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

        The file holds `format` and, for the i-th mask, `path_i` (its key), `shape_i` and `bits_i`
        (`numpy.packbits` of the flattened mask): `numpy.load` reads it without this package.
        """
        target = Path(file)
        arrays: dict[str, Any] = {"format": np.array(_FORMAT)}
        for i, (path, mask) in enumerate(self.items()):
            arrays[f"path_{i}"] = np.array(path)
            arrays[f"shape_{i}"] = np.array(mask.shape, np.int64)
            arrays[f"bits_{i}"] = np.packbits(mask)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as stream:
                np.savez_compressed(stream, allow_pickle=False, **arrays)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Masks":
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is damaged or is not a file of masks.
        """
        try:
            with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                if str(arrays["format"]) != _FORMAT:
                    raise ValueError(f"its format is {str(arrays['format'])!r}")
                masks = {}
                for i in range((len(arrays.files) - 1) // 3):
                    shape = tuple(arrays[f"shape_{i}"])
                    bits = np.unpackbits(arrays[f"bits_{i}"], count=math.prod(shape))
                    masks[str(arrays[f"path_{i}"])] = bits.reshape(shape)
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{os.fspath(file)!r} is not a whole file of masks ({error}). Expected a file written by Masks.save."
            ) from error
        return cls(masks)


def check_finite(scores: Scores) -> None:
    """Raises a `ValueError` that names the first variable with a score that is not finite."""
    for path, score in scores.items():
        bad = score.size - np.count_nonzero(np.isfinite(score))
        if bad:
            raise ValueError(
                f"{bad} of {score.size} scores of {path!r} are not finite, so its weights cannot be ranked. "
                "Check the model for exploding activations (normalize the inputs, lower the weights' scale)."
            )


def _keep_largest(flat: np.ndarray, count: int) -> np.ndarray:
    """Marks exactly `count` entries: the largest, and among equals those with the lowest index.

    Comparing with the k-th largest score alone would keep or drop all of its ties: dead units give
    thousands of exact zeros. A partition finds that score without sorting.
    """
    kept = np.zeros(flat.size, bool)
    if count <= 0:
        return kept
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    np.greater(flat, threshold, out=kept)
    ties = np.flatnonzero(flat == threshold)
    kept[ties[: count - np.count_nonzero(kept)]] = True
    return kept


def _select(
    scores: Scores, sparsity: float, among: Mapping[str, np.ndarray] | None, or_fewer: bool, where: str
) -> dict[str, np.ndarray]:
    flat = np.concatenate([np.ravel(score) for score in scores.values()])
    count = num_kept(flat.size, sparsity)
    if among is None:
        kept = _keep_largest(flat, count)
    else:
        candidates = np.flatnonzero(np.concatenate([np.ravel(among[path]) for path in scores]))
        if or_fewer:
            count = min(count, candidates.size)
        if count > candidates.size:
            raise ValueError(
                f"Sparsity {sparsity:g} keeps {count:,} of the {flat.size:,} weights of {where}, but only "
                f"{candidates.size:,} are not yet pruned. Ask for a higher sparsity, or call remove_masks(model) first "
                "to let pruned weights come back."
            )
        kept = np.zeros(flat.size, bool)
        kept[candidates[_keep_largest(flat[candidates], count)]] = True
    ends = np.cumsum([score.size for score in scores.values()])
    pieces = np.split(kept, ends[:-1])
    return {path: piece.reshape(np.shape(score)) for piece, (path, score) in zip(pieces, scores.items(), strict=True)}


def masks_from_scores(
    scores: Scores,
    sparsity: float,
    scope: str = "global",
    among: Mapping[str, np.ndarray] | None = None,
    or_fewer: bool = False,
) -> Masks:
    """Keeps the weights with the largest scores; the only place where scores become masks.

    Of d weights, ceil(sparsity * d) are removed and the rest is kept, exactly: scores are ranked by
    value and then by index, never compared with a threshold alone.

    Args:
        scores: Mapping of path to array of scores, larger = keep.
        sparsity: Fraction in [0, 1) to remove.
        scope: `"global"` ranks all weights together; `"layerwise"` removes this fraction of each array.
        among: Masks of the candidates; a weight that is `False` there is never kept. It still counts in d.
        or_fewer: Keeps all candidates, instead of raising, where fewer are left than are to be kept.

    Returns:
        `Masks` with the keys, the order and the shapes of `scores`.

    Raises:
        ValueError: If a score is not finite, nothing would be kept, or fewer candidates are left than are to be kept.

    >>> masks_from_scores({"a": np.array([3.0, 1.0]), "b": np.array([2.0, 2.0])}, 0.5)["b"]
    array([ True, False])
    """
    check_sparsity(sparsity)
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    scores = {path: np.asarray(score) for path, score in scores.items()}
    check_finite(scores)
    if scope == "global":
        masks = _select(scores, sparsity, among, or_fewer, "the model")
    else:
        masks = {}
        for path, score in scores.items():
            masks.update(_select({path: score}, sparsity, among, or_fewer, repr(path)))
    if not any(mask.any() for mask in masks.values()):
        total = sum(score.size for score in scores.values())
        raise ValueError(
            f"Sparsity {sparsity:g} keeps none of the {total:,} prunable weights ({scope} scope). "
            f"Keep at least one: ask for a sparsity of at most {math.floor((1 - 1 / total) * 1e9) / 1e9:g}."
        )
    return Masks(masks)
