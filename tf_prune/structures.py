"""The shapes of what is pruned together: single weights, N:M, blocks, output or input channels. NumPy only.

A structure cuts a kernel into groups. A criterion gives a group one score, ranking keeps or removes it as a whole.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

# "other" is a kernel of a layer that is not Keras's own, of which only the shape is known.
Kind = Literal["dense", "convolution", "depthwise", "recurrent", "embedding", "bias", "other"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a kernel are its inputs and which its outputs.

    Attributes:
        kind: Of the layer that owns the kernel.
        shape: The kernel's own.
        view: The shape of the kernel with each axis in one part only: the gates of a recurrent kernel, or the groups of
            a grouped convolution, have an axis of their own there.
        inputs: Axes of `view` along which the inputs are counted, in the order that the layer's input has them.
        outputs: Axes of `view` along which the outputs are counted, in the order of the layer's output. An axis that is
            among both counts copies of the same map: experts, heads, the channels of a depthwise convolution.
        is_last: Whether its outputs are the model's.
        copies: Axes of `view` that count further copies and are no channels: the gates of a recurrent kernel.
    """

    kind: Kind
    shape: tuple[int, ...]
    view: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_last: bool = False
    copies: tuple[int, ...] = ()

    @property
    def own_inputs(self) -> tuple[int, ...]:
        """The inputs that are no outputs at the same time."""
        return tuple(axis for axis in self.inputs if axis not in self.outputs)

    @property
    def own_outputs(self) -> tuple[int, ...]:
        """The outputs that are no inputs at the same time."""
        return tuple(axis for axis in self.outputs if axis not in self.inputs)

    @property
    def flat(self) -> "Layout":
        """The same with a single axis for the inputs, and for the outputs, where theirs follow each other in `view`."""
        runs = [part for part in (self.own_inputs, self.own_outputs) if part and part == _range(part[0], len(part))]
        view, new = list[int](), dict[int, int]()
        for axis, size in enumerate(self.view):
            if any(axis in run[1:] for run in runs):
                view[-1] *= size
            else:
                view.append(size)
            new[axis] = len(view) - 1
        inputs, outputs, copies = (
            tuple(dict.fromkeys(new[axis] for axis in part)) for part in (self.inputs, self.outputs, self.copies)
        )
        return dataclasses.replace(self, view=tuple(view), inputs=inputs, outputs=outputs, copies=copies)

    def to_matrices(self, kernel: np.ndarray) -> np.ndarray:
        """The kernel as independent matrices: an array (number of them, *window, inputs, outputs).

        There is one for each gate of a recurrent layer, group of a grouped convolution, channel of a depthwise one, and
        for each expert.
        """
        copies, window, inputs, outputs = self._parts()
        moved = kernel.reshape(self.view).transpose(*copies, *window, *inputs, *outputs)
        sizes = [math.prod(self.view[i] for i in part) for part in (copies, inputs, outputs)]
        return moved.reshape(sizes[0], *(self.view[i] for i in window), *sizes[1:])

    def from_matrices(self, matrices: np.ndarray) -> np.ndarray:
        """The kernel that `to_matrices` gives these of."""
        order = [axis for part in self._parts() for axis in part]
        moved = matrices.reshape([self.view[axis] for axis in order])
        return moved.transpose(np.argsort(order)).reshape(self.shape)

    def _parts(self) -> tuple[tuple[int, ...], ...]:
        """Axes of `view` that count copies of the same map, its window, its inputs, its outputs."""
        rest = tuple(i for i in range(len(self.view)) if i not in (*self.inputs, *self.outputs, *self.copies))
        copies = {*self.copies, *(set(self.inputs) & set(self.outputs))}
        if self.kind in ("convolution", "depthwise"):
            return tuple(sorted(copies)), rest, self.own_inputs, self.own_outputs
        return tuple(sorted({*copies, *rest})), (), self.own_inputs, self.own_outputs


def _range(start: int, length: int) -> tuple[int, ...]:
    return tuple(range(start, start + length))


@dataclasses.dataclass(frozen=True)
class Grouping:
    """One kernel cut into groups of weights.

    Attributes:
        shape: The kernel's.
        view: Its shape with an axis of its own for the members of a group.
        members: The axes of `view` that run inside a group; the others count the groups. Empty for single weights.
        at_most: `(axis, n)`: no more than n along this axis of `view` may be kept; `None` where there is no such rule.
        alive: Which weights were not pruned before: only they count in a group's score. `None` counts all.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    members: tuple[int, ...] = ()
    at_most: tuple[int, int] | None = None
    alive: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def group_shape(self) -> tuple[int, ...]:
        """The shape of an array with one entry for each group."""
        return tuple(n for i, n in enumerate(self.view) if i not in self.members) if self.members else self.shape

    @property
    def least_sparsity(self) -> float:
        """The sparsity below which this structure cannot go."""
        return 1 - self.at_most[1] / self.view[self.at_most[0]] if self.at_most else 0.0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over each group, in float64; single weights stay as they are."""
        if not self.members:
            return values
        values = values if self.alive is None else values * self.alive
        return values.reshape(self.view).sum(self.members, np.float64)

    def norm(self, values: np.ndarray, p: float) -> np.ndarray:
        """The p-norm of each group: 1, 2, infinity (the largest magnitude) or -infinity (the smallest)."""
        magnitudes = np.abs(values)
        if not self.members:
            return magnitudes
        magnitudes = magnitudes.reshape(self.view)
        if math.isinf(p) and p < 0:
            magnitudes = magnitudes if self.alive is None else self._without_dead(magnitudes)
            return magnitudes.min(self.members)
        if math.isinf(p):
            return magnitudes.max(self.members)
        return np.power(np.power(magnitudes, p, dtype=np.float64).sum(self.members), 1 / p)

    def _without_dead(self, magnitudes: np.ndarray) -> np.ndarray:
        """With dead weights as large as the largest, which leaves the smallest living one of a group its smallest."""
        assert self.alive is not None  # noqa: S101 - for the type checker
        return np.where(self.alive.reshape(self.view), magnitudes, magnitudes.max())

    def any(self, mask: np.ndarray) -> np.ndarray:
        """Which groups have a weight that is kept."""
        return np.asarray(mask.reshape(self.view).any(self.members)) if self.members else mask

    def spread(self, groups: np.ndarray) -> np.ndarray:
        """The mask of the weights from that of the groups."""
        if not self.members:
            return groups
        return np.broadcast_to(np.expand_dims(groups, self.members), self.view).reshape(self.shape)

    def best_of_each(self, scores: np.ndarray, among: np.ndarray, density: float = 0.0) -> np.ndarray:
        """Under N:M the n best weights of each m, and more of them as long as the density is higher; else all.

        Args:
            scores: Of the groups.
            among: Which may be kept at all.
            density: The fraction that is going to be kept: on the way to a higher sparsity N:M tightens with it.
        """
        if self.at_most is None:
            return among
        axis, n = self.at_most
        n = max(n, math.ceil(density * self.view[axis] - 1e-9))
        values = np.moveaxis(np.where(among, scores, -np.inf).reshape(self.view), axis, 0)
        rank = np.zeros(values.shape, np.int16)
        for i, j in itertools.permutations(range(len(values)), 2):  # cheaper than to sort so few
            rank[i] += values[j] >= values[i] if j < i else values[j] > values[i]
        return np.moveaxis(rank < n, 0, axis).reshape(self.shape) & among


class Structure(abc.ABC):
    """What is pruned together. Each structure is a frozen dataclass."""

    @abc.abstractmethod
    def grouping(self, layout: Layout) -> Grouping | str:
        """Cuts a kernel into groups; a string says why this kernel is left alone.

        Raises:
            ValueError: If the kernel cannot be cut into such groups.
        """


@dataclasses.dataclass(frozen=True)
class Weights(Structure):
    """Single weights: unstructured pruning.

    >>> Weights().grouping(Layout("dense", (4, 3), (4, 3), (0,), (1,))).group_shape
    (4, 3)
    """

    def grouping(self, layout: Layout) -> Grouping:
        """See `Structure.grouping`."""
        return Grouping(layout.shape, layout.view)


def _split(shape: tuple[int, ...], axes: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape with the last of these axes cut into `(n / size, size)`: where it fits, runs along all of them do."""
    axis = axes[-1]
    if shape[axis] % size:
        where = f", within the last of {len(axes)} axes that are not in order" if len(axes) > 1 else ""
        raise ValueError(f"{shape[axis]} is not a multiple of {size}{where}")
    return (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])


def _no_matrix(layout: Layout) -> str | None:
    """Why a kernel has no connections between inputs and outputs that could be cut into blocks."""
    reasons: dict[Kind, str] = {
        "depthwise": "a depthwise kernel connects each input to its own outputs: no blocks along inputs or outputs",
        "embedding": "an embedding table has no input axis",
        "bias": "a bias has no inputs",
    }
    if layout.kind not in reasons and not (layout.own_inputs and layout.own_outputs):
        return "its equation sums over no axis, or makes none"
    return reasons.get(layout.kind)


@dataclasses.dataclass(frozen=True)
class NofM(Structure):
    """At most n of every m consecutive weights along the inputs: the pattern that sparse tensor cores run.

    Inputs that are counted by several axes, such as the heads of attention and their channels, are counted through.

    The sparsity is at least 1 - n/m. At exactly that each m keep n; above it, weights are removed from those by the
    scope's ranking. Step by step the pattern tightens with the schedule, one weight of each m at a time; inside of a
    `Hybrid` it holds from the first step if pruned weights cannot come back.

    Args:
        n: How many of each m may be kept, at least 1.
        m: At least n + 1.

    >>> NofM(2, 4).grouping(Layout("dense", (8, 3), (8, 3), (0,), (1,))).least_sparsity
    0.5

    Source: Mishra et al. 2021 (2:4).
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"NofM keeps n of m weights and needs 1 <= n < m, got n={self.n}, m={self.m}.")

    def grouping(self, layout: Layout) -> Grouping | str:
        """See `Structure.grouping`."""
        reason = _no_matrix(layout)
        if reason:
            return reason
        layout = layout.flat
        view = _split(layout.view, layout.own_inputs, self.m)
        return Grouping(layout.shape, view, at_most=(layout.own_inputs[-1] + 1, self.n))


@dataclasses.dataclass(frozen=True)
class Blocks(Structure):
    """Blocks of consecutive weights along the input and the output axis.

    `Blocks(inputs=4)` in dense layers (16 for int8) and `Blocks(outputs=2)` or `4` in 1x1 convolutions are what the
    kernels of TF-Lite run.

    Args:
        inputs: Length along the input axis, at least 1.
        outputs: Length along the output axis, at least 1.

    >>> Blocks(inputs=4).grouping(Layout("dense", (8, 3), (8, 3), (0,), (1,))).group_shape
    (2, 3)
    """

    inputs: int = 1
    outputs: int = 1

    def __post_init__(self) -> None:
        if min(self.inputs, self.outputs) < 1 or self.inputs * self.outputs == 1:
            raise ValueError(
                f"A block is at least 1 long each way and more than one weight, got inputs={self.inputs}, "
                f"outputs={self.outputs}. For single weights, leave structure out."
            )

    def grouping(self, layout: Layout) -> Grouping | str:
        """See `Structure.grouping`."""
        reason = _no_matrix(layout)
        if reason:
            return reason
        layout = layout.flat
        view, members = layout.view, list[int]()
        parts = [(layout.own_inputs, self.inputs), (layout.own_outputs, self.outputs)]
        # The later axis first, so that the earlier one still has its number.
        for axes, size in sorted(parts, key=lambda part: part[0][-1], reverse=True):
            view = _split(view, axes, size)
            members = [axes[-1] + 1, *(member + 1 for member in members)]
        return Grouping(layout.shape, view, tuple(members))


def _channels(layout: Layout, axes: tuple[int, ...], what: str) -> Grouping | str:
    if layout.kind == "bias":
        return "a bias is no channel"
    if layout.kind == "other" and len(layout.shape) > 2:
        raise ValueError(
            f"which of its {len(layout.shape)} axes count {what} channels, and which copies or a window, is not known "
            "of a layer of one's own"
        )
    grouping = Grouping(layout.shape, layout.view, tuple(i for i in range(len(layout.view)) if i not in axes))
    if math.prod(grouping.group_shape) == 1:
        return f"it has a single {what} channel"
    return grouping


@dataclasses.dataclass(frozen=True)
class OutputChannels(Structure):
    """Whole filters: all weights into one output. They become zeros; the channel itself, and its bias, stay.

    Of a recurrent layer a group is what one unit has in one kernel, the columns of all its gates. `kernel` and
    `recurrent_kernel` are pruned each by itself, so a unit that loses its group in one still lives by the other.
    Experts, and heads that the input has as well, have outputs of their own.

    The kernels whose outputs are the model's outputs are left alone. A subclassed model does not say which they are:
    there it is the last kernel in model order, so put the head last, or leave it out with `filters`.

    >>> OutputChannels().grouping(Layout("convolution", (3, 3, 8, 16), (3, 3, 8, 16), (2,), (3,))).group_shape
    (16,)

    Source: Li et al. 2017; Lubana and Dick 2021 rank the filters of all layers together.
    """

    def grouping(self, layout: Layout) -> Grouping | str:
        """See `Structure.grouping`."""
        if layout.is_last:
            return "its output channels are the model's outputs"
        return _channels(layout, layout.outputs, "output")


@dataclasses.dataclass(frozen=True)
class InputChannels(Structure):
    """All weights out of one input: input features are selected. Experts have inputs of their own.

    >>> InputChannels().grouping(Layout("dense", (8, 3), (8, 3), (0,), (1,))).group_shape
    (8,)

    Source: Paganini and Forde 2020, structured pruning along the input axis.
    """

    def grouping(self, layout: Layout) -> Grouping | str:
        """See `Structure.grouping`."""
        return _channels(layout, layout.inputs, "input")


@dataclasses.dataclass(frozen=True)
class Hybrid(Structure):
    """One structure in convolutions, depthwise and recurrent ones too, and another one everywhere else.

    Groups of different sizes are ranked against each other in the global scope; the paper ranks within each layer.

    Args:
        convolutions: Of convolution kernels.
        others: Of all other kernels.

    >>> Hybrid().grouping(Layout("dense", (8, 3), (8, 3), (0,), (1,))).members
    ()

    Source: Paganini and Forde 2020; their channels are `InputChannels()`.
    """

    convolutions: Structure = OutputChannels()
    others: Structure = Weights()

    def grouping(self, layout: Layout) -> Grouping | str:
        """See `Structure.grouping`."""
        is_convolution = layout.kind in ("convolution", "depthwise")
        return (self.convolutions if is_convolution else self.others).grouping(layout)


STRUCTURES: dict[str, Structure] = {
    "weights": Weights(),
    "2:4": NofM(2, 4),
    "1x4": Blocks(inputs=4),
    "1x16": Blocks(inputs=16),
    "2_outputs": Blocks(outputs=2),
    "4_outputs": Blocks(outputs=4),
    "output_channels": OutputChannels(),
    "input_channels": InputChannels(),
    "hybrid": Hybrid(),
}


def cut_into_groups(
    structure: str | Structure | None, layouts: Mapping[str, Layout]
) -> tuple[dict[str, Grouping], dict[str, str]]:
    """Cuts every kernel; the second mapping says why a kernel is left alone.

    Args:
        structure: A structure or its name; `None` is single weights.
        layouts: Of the kernels.

    Raises:
        ValueError: If there is no such structure, or it does not divide a kernel; all such kernels are named.
    """
    if isinstance(structure, str) and structure in STRUCTURES:
        structure = STRUCTURES[structure]
    structure = Weights() if structure is None else structure
    if not isinstance(structure, Structure):
        raise ValueError(
            f"structure must be one of {', '.join(map(repr, STRUCTURES))}, or an object such as "
            f"tf_prune.NofM(2, 4); got {structure!r}."
        )
    groups: dict[str, Grouping] = {}
    left: dict[str, str] = {}
    misfits: dict[str, str] = {}
    for path, layout in layouts.items():
        try:
            cut = structure.grouping(layout)
        except ValueError as error:
            misfits[path] = f"{layout.shape}: {error}"
            continue
        if isinstance(cut, str):
            left[path] = cut
        else:
            groups[path] = cut
    if misfits:
        kernels = "\n".join(f"  {path} {reason}" for path, reason in misfits.items())
        names = sorted({path.rsplit("/", 1)[0].rsplit("/", 1)[-1] for path in misfits})
        raise ValueError(
            f"{structure} does not divide these kernels, and nothing was pruned:\n{kernels}\nLeave them dense, as "
            f"filters=lambda layer: layer.name not in {names!r} does, or choose a structure that divides them."
        )
    if not groups:
        reasons = "\n".join(f"  {path}: {reason}" for path, reason in left.items())
        raise ValueError(f"{structure} leaves nothing to prune:\n{reasons}")
    return groups, left
