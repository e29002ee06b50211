"""When to prune in `fit`: callbacks that prune once, before the first step, and let the masks hold."""

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tf_prune.batches import Batches
from tf_prune.criteria import SNIP, GraSP, Magnitude, Random
from tf_prune.enforcement import apply_masks, masks_of
from tf_prune.masks import Masks
from tf_prune.methods import FORCE, IterativeSNIP, Method, SynFlow
from tf_prune.prunable import Filters, Include, find_prunable
from tf_prune.pruning import Pruner, PruningReport, Scope, warn_of_unknown
from tf_prune.scopes import check_sparsity
from tf_prune.structures import Structure


class HoldMasks(keras.callbacks.Callback):
    """Masks the weights again after each epoch and at the end, and tells the sparsities in the logs.

    The masks hold in each step by themselves. Only what sets weights from outside in between is put right here, such as
    a callback that restores the best ones, wherever it is in the list. The logs get `sparsity`, and `sparsity/<path>`
    for each kernel, which callbacks that come later in the list, the progress bar and the history show.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Masks the weights, and writes the sparsities to the logs."""
        masks = self._hold()
        if logs is not None:
            logs["sparsity"] = masks.sparsity
            logs.update({f"sparsity/{path}": 1.0 - float(mask.mean()) for path, mask in masks.items()})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Masks the weights, now and after the callbacks that come later."""
        self._hold()
        if self.model.history is not None:
            self.model.history.on_train_end = lambda logs=None: self._hold()  # the last that Keras calls

    def _hold(self) -> Masks:
        masks = masks_of(self.model)
        if masks:
            apply_masks(self.model, masks)
        return masks


class PruningCallback(HoldMasks):
    """What callbacks that prune have in common: how to prune.

    Args:
        method: As in `tf_prune.prune`.
        data: An `(x, y)` batch or an iterable of them, for methods that need examples.
        loss: Defaults to the compiled loss.
        scope: How what is removed is shared out over the layers; as in `tf_prune.prune`.
        structure: What is pruned together; as in `tf_prune.prune`.
        filters: Which layers; see `find_prunable`.
        include: What is prunable only on request, such as kernels of one's own layers; see `find_prunable`.
        dropout: Whether dropout and noise layers act while scoring.
        verbose: 0 is silent, 1 shows a progress bar while an iterative method runs, or over several batches.

    Attributes:
        report: The `PruningReport` of the last pruning, or `None` before the first.
    """

    def __init__(
        self,
        method: Method,
        data: Any = None,
        loss: Any = None,
        *,
        scope: Scope = "global",
        structure: str | Structure | None = None,
        filters: Filters = None,
        include: Include = (),
        dropout: bool = False,
        verbose: int = 1,
    ):
        super().__init__()
        self.method = method
        self.data = data
        self.loss = loss
        self.options: dict[str, Any] = {
            "scope": scope,
            "structure": structure,
            "filters": filters,
            "include": include,
            "dropout": dropout,
        }
        self.verbose = verbose
        self.report: PruningReport | None = None

    def _pruner(self) -> Pruner:
        if not self.model.built and self.data is not None:
            self._build()
        return Pruner(self.model, self.method, self.data, self.loss, **self.options)

    def _build(self) -> None:
        """A subclassed model gets its weights at its first call, which would be after this."""
        data = self.data
        if isinstance(data, Iterator):  # put back what is read of it
            data = [next(self.data)]
            self.data = itertools.chain(data, self.data)
        x = next(iter(Batches(data).take(1)))[0]
        self.model(keras.tree.map_structure(lambda leaf: leaf[:1], x))


class PruneBeforeTraining(PruningCallback):
    """Prunes the model once, when the first epoch of `fit` begins; every step after it keeps the masks.

    By then all callbacks have done what they do at the beginning of `fit`: weights that one of them brings back from a
    run that was interrupted bring their masks along, and are not pruned again. Nor does a second `fit` of the same
    model prune again; another model is pruned anew.

    Args:
        method: As in `tf_prune.prune`.
        sparsity: Fraction in [0, 1) to remove.
        data: An `(x, y)` batch or an iterable of them, for methods that need examples.
        loss: Defaults to the compiled loss.
        **options: `scope`, `structure`, `filters`, `include`, `dropout` and `verbose` as in `tf_prune.prune`.

    Attributes:
        report: The `PruningReport`, or `None` before the first `fit`.
    """

    def __init__(self, method: Method, sparsity: float, data: Any = None, loss: Any = None, **options: Any):
        super().__init__(method, data, loss, **options)
        self.sparsity = check_sparsity(sparsity)
        self._pruned: Callable[[], Any] = lambda: None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Prunes, the first time."""
        self._prune_once()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Prunes if there was no epoch, and masks the weights."""
        self._prune_once()
        super().on_train_end(logs)

    def _prune_once(self) -> None:
        if self._pruned() is not self.model:
            self.report = self._pruner().prune(self.sparsity, self.verbose)
            self._pruned = weakref.ref(self.model)


class FreezeSparsity(HoldMasks):
    """Keeps whatever zeros the kernels have when `fit` begins, whoever made them: for fine-tuning a sparse model.

    Args:
        filters: Which layers; see `find_prunable`.
        include: Which other weights, such as kernels of one's own layers; see `find_prunable`.

    Raises:
        ValueError: When `fit` begins, if no weight is zero.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> _ = model.layers[0].kernel.assign([[0.0, 1.0], [2.0, 3.0]])
    >>> _ = model.fit(keras.ops.ones((4, 2)), keras.ops.ones((4, 2)), callbacks=[FreezeSparsity()], verbose=0)
    >>> float(model.layers[0].kernel[0, 0])
    -0.0
    """

    def __init__(self, filters: Filters = None, include: Include = ()):
        super().__init__()
        self.filters = filters
        self.include = include
        self._begins = True

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Remembers that the zeros are to be looked for, when all callbacks have brought back their weights."""
        self._begins = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Attaches the masks, the first time."""
        if not self._begins:
            return
        survey = find_prunable(self.model, self.filters, self.include)
        warn_of_unknown(self.model, survey)
        masks = {path: keras.ops.convert_to_numpy(kernel) != 0 for path, kernel in survey.prunable.items()}
        if all(mask.all() for mask in masks.values()):
            raise ValueError(
                "FreezeSparsity found no weight that is zero, so there is nothing to keep. Prune the model first, or "
                "load the weights of a pruned one before fit."
            )
        empty = [path for path, mask in masks.items() if not mask.any()]
        if empty:
            warnings.warn(
                f"All weights of {', '.join(empty)} are zero, and stay so. If they are new, not pruned, leave their "
                "layers out with filters=...",
                stacklevel=2,
            )
        apply_masks(self.model, masks)
        self._begins = False


class SnipPruning(PruneBeforeTraining):
    """`SNIP` when `fit` begins.

    Args:
        sparsity: Fraction in [0, 1) to remove.
        data: An `(x, y)` batch or an iterable of them.
        **options: Of `PruneBeforeTraining`.

    >>> SnipPruning(sparsity=0.9, data=None).sparsity
    0.9
    """

    def __init__(self, sparsity: float, data: Any, **options: Any):
        super().__init__(SNIP(), sparsity, data, **options)


class GraspPruning(PruneBeforeTraining):
    """`GraSP` when `fit` begins.

    Args:
        sparsity: Fraction in [0, 1) to remove.
        data: An `(x, y)` batch or an iterable of them; the paper takes 10 examples of each class.
        temperature: Divides the logits while scoring.
        **options: Of `PruneBeforeTraining`.

    >>> GraspPruning(sparsity=0.9, data=None).method.temperature
    200.0
    """

    def __init__(self, sparsity: float, data: Any, temperature: float = 200.0, **options: Any):
        super().__init__(GraSP(temperature), sparsity, data, **options)


class ForcePruning(PruneBeforeTraining):
    """`FORCE` when `fit` begins, with a progress bar over its steps.

    Args:
        sparsity: Fraction in [0, 1) to remove.
        data: An iterable of `(x, y)` batches, of which each step takes the next; or one batch.
        num_steps: How often to score and prune.
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.
        num_batches: Batches for each step.
        **options: Of `PruneBeforeTraining`.

    >>> ForcePruning(sparsity=0.99, data=None, num_steps=10).method.num_steps
    10
    """

    def __init__(
        self,
        sparsity: float,
        data: Any,
        num_steps: int = 60,
        schedule: str = "exponential",
        num_batches: int | None = 1,
        **options: Any,
    ):
        super().__init__(FORCE(num_steps, schedule, num_batches), sparsity, data, **options)


class IterativeSnipPruning(PruneBeforeTraining):
    """`IterativeSNIP` when `fit` begins; takes what `ForcePruning` takes.

    Args:
        sparsity: Fraction in [0, 1) to remove.
        data: An iterable of `(x, y)` batches, of which each step takes the next; or one batch.
        num_steps: How often to score and prune.
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.
        num_batches: Batches for each step.
        **options: Of `PruneBeforeTraining`.

    >>> IterativeSnipPruning(sparsity=0.99, data=None).method.revive
    False
    """

    def __init__(
        self,
        sparsity: float,
        data: Any,
        num_steps: int = 60,
        schedule: str = "exponential",
        num_batches: int | None = 1,
        **options: Any,
    ):
        super().__init__(IterativeSNIP(num_steps, schedule, num_batches), sparsity, data, **options)


class SynflowPruning(PruneBeforeTraining):
    """`SynFlow` when `fit` begins.

    Args:
        sparsity: Fraction in [0, 1) to remove.
        num_steps: How often to score and prune.
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.
        **options: Of `PruneBeforeTraining`.

    >>> SynflowPruning(sparsity=0.99).method.num_steps
    100
    """

    def __init__(self, sparsity: float, num_steps: int = 100, schedule: str = "exponential", **options: Any):
        super().__init__(SynFlow(num_steps, schedule), sparsity, **options)


class MagnitudePruning(PruneBeforeTraining):
    """`Magnitude` when `fit` begins.

    Args:
        sparsity: Fraction in [0, 1) to remove.
        **options: Of `PruneBeforeTraining`.

    >>> MagnitudePruning(sparsity=0.5).sparsity
    0.5
    """

    def __init__(self, sparsity: float, **options: Any):
        super().__init__(Magnitude(), sparsity, **options)


class RandomPruning(PruneBeforeTraining):
    """`Random` when `fit` begins.

    Args:
        sparsity: Fraction in [0, 1) to remove.
        seed: Of the scores.
        **options: Of `PruneBeforeTraining`.

    >>> RandomPruning(sparsity=0.5, seed=3).method.seed
    3
    """

    def __init__(self, sparsity: float, seed: int = 0, **options: Any):
        super().__init__(Random(seed), sparsity, **options)
