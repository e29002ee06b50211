"""How many weights are kept: of the whole model, and of each kernel. Pure counting, no arrays.

What is counted are single weights, or the groups of weights (filters, blocks) that are pruned together.
"""

import heapq
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

SCOPES = ("global", "layerwise", "uniform", "erk")


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
    # A NumPy float32 is written out first: 0.1 in float32 is the user's 0.1, not 0.100000001490116.
    value = float(str(sparsity)) if type(sparsity).__module__ == "numpy" else float(sparsity)
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


def shared_out(total: int, shares: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Hands out exactly `total` in proportion to `shares`, to nobody more than it has room for.

    By the divisor method of D'Hondt: a larger total never gives anybody less, so that kernels pruned step by step only
    ever shrink. (Rounding by the largest remainder lacks that.)

    Raises:
        ValueError: If there is not room for the total.

    >>> shared_out(10, [1.0, 1.0, 2.0], [2, 100, 100])
    [2, 3, 5]
    """
    if total > sum(capacities):
        raise ValueError(f"{total} do not fit into {sum(capacities)}.")
    # The level at which min(capacity, level * share) would add up to the total, were fractions allowed.
    level, left, weight = 0.0, float(total), float(sum(shares))
    for share, capacity in sorted(zip(shares, capacities, strict=True), key=lambda pair: pair[1] / pair[0]):
        level = left / weight
        if level * share <= capacity:
            break
        left, weight = left - capacity, weight - share
    counts = [min(c, math.floor(level * (1 - 1e-12) * s)) for s, c in zip(shares, capacities, strict=True)]
    waiting = [(-s / (n + 1), i) for i, (s, n, c) in enumerate(zip(shares, counts, capacities, strict=True)) if n < c]
    heapq.heapify(waiting)
    for _ in range(total - sum(counts)):
        _, i = heapq.heappop(waiting)
        counts[i] += 1
        if counts[i] < capacities[i]:
            heapq.heappush(waiting, (-shares[i] / (counts[i] + 1), i))
    return counts


def kept_in_each(
    scope: str | Mapping[str, float],
    sparsity: float,
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    capacities: Mapping[str, int],
    floors: Mapping[str, int] | None,
    or_fewer: bool,
) -> dict[str, int]:
    """How many of each kernel are kept, in every scope but the global one.

    Args:
        scope: `"layerwise"`, `"uniform"`, `"erk"`, or a sparsity for some of the kernels, where `sparsity` is that of
            the others.
        sparsity: Fraction in [0, 1) to remove.
        sizes: How many each kernel has.
        shapes: The kernels' shapes, for `"erk"`.
        capacities: How many of each may be kept at most.
        floors: How many of each are kept in any case, where that is not more than all that is kept; in `"uniform"` and
            `"erk"`.
        or_fewer: Keeps as many as there may be, instead of raising, where they are fewer than asked for.

    Raises:
        ValueError: If a kernel, or the model, may keep fewer than asked for.
    """
    if isinstance(scope, Mapping) or scope == "layerwise":
        table = scope if isinstance(scope, Mapping) else {}
        kept = {path: num_kept(size, table.get(path, sparsity)) for path, size in sizes.items()}
        for path, count in kept.items():
            if count > capacities[path] and not or_fewer:
                raise too_few(table.get(path, sparsity), count, sizes[path], repr(path), capacities[path])
        return {path: min(count, capacities[path]) for path, count in kept.items()}
    total, room = num_kept(sum(sizes.values()), sparsity), sum(capacities.values())
    if total > room and not or_fewer:
        raise too_few(sparsity, total, sum(sizes.values()), "the model", room)
    shares = [
        size * sum(shapes[path]) / math.prod(shapes[path]) if scope == "erk" else float(size)
        for path, size in sizes.items()
    ]
    total = min(total, room)
    if floors is None or sum(floors.values()) > total:
        floors = dict.fromkeys(sizes, 0)
    above = shared_out(total - sum(floors.values()), shares, [capacities[path] - floors[path] for path in sizes])
    return {path: floors[path] + more for path, more in zip(sizes, above, strict=True)}


class TooLowSparsityError(ValueError):
    """More are to be kept than may be: they are pruned already, or the structure removes them."""


def too_few(sparsity: float, count: int, size: int, where: str, room: int) -> TooLowSparsityError:
    """The error where more are to be kept than may be."""
    return TooLowSparsityError(
        f"Sparsity {sparsity:g} keeps {count:,} of {size:,} in {where}, but only {room:,} are not yet pruned and "
        "allowed by the structure. Ask for a higher sparsity, or call remove_masks(model) first to let pruned weights "
        "come back."
    )
