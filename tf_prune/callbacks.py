"""When to prune in `fit`: callbacks that prune once, before the first step, and let the masks hold."""

import copy
import itertools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tf_prune.batches import Batches
from tf_prune.criteria import SNIP, GraSP, Magnitude, Random
from tf_prune.enforcement import apply_masks
from tf_prune.evidence import mask_again, masks_of, sparsity_of_model
from tf_prune.examples import rows
from tf_prune.masks import Masks
from tf_prune.methods import FORCE, IterativeSNIP, Method, SynFlow
from tf_prune.prunable import Filters, Include, find_kernels, find_prunable, has_call
from tf_prune.pruning import Pruner, PruningReport, Scope, warn_of_unknown
from tf_prune.scopes import check_sparsity
from tf_prune.structures import Structure


class HoldMasks(keras.callbacks.Callback):
    """Masks the weights again after each epoch and at the end, and tells the sparsities in the logs.

    The masks hold in each step by themselves. Only what sets weights from outside in between is put right here, such as
    a callback that restores the best ones, wherever it is in the list; if those were denser, a warning says so.

    The logs get `sparsity`, the fraction of the weights of all the model's kernels (everything with two axes or more,
    embeddings and layers that are not pruned included) that is pruned and zero in what the layers multiply by; and
    `sparsity/<path>` for each kernel that has a mask. Callbacks that come later in the list, the progress bar and the
    history show them.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Masks the weights, and writes the sparsities to the logs."""
        masks = self._hold()
        if logs is not None:
            logs["sparsity"], of_each = sparsity_of_model(self.model, masks)
            logs.update({f"sparsity/{path}": sparsity for path, sparsity in of_each.items()})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Masks the weights, now and after the callbacks that come later."""
        self._hold()
        history = self.model.history
        if history is not None and "on_train_end" not in vars(history):

            def hold_at_last(logs: dict[str, Any] | None = None) -> None:
                del history.on_train_end  # nothing of ours stays behind
                history.on_train_end(logs)
                self._hold()

            history.on_train_end = hold_at_last  # the last that Keras calls

    def _hold(self) -> Masks:
        mask_again(self.model)
        masks = masks_of(self.model)
        if masks:
            apply_masks(self.model, masks)
        return masks


class PruningCallback(HoldMasks):
    """What callbacks that prune have in common: how to prune.

    A copy of it (`copy.deepcopy`, as tuners make them) shares the data, which it only reads; so a generator goes on in
    the copy where it was left. So does a scope table of layers, which holds for their model alone: one of names follows
    to a model that is built anew.

    Args:
        method: As in `tf_prune.prune`.
        data: As in `tf_prune.prune`, for methods that need examples.
        loss: Defaults to the compiled loss.
        scope: How what is removed is shared out over the layers; as in `tf_prune.prune`.
        structure: What is pruned together; as in `tf_prune.prune`.
        filters: Which layers; see `find_prunable`.
        include: What is prunable only on request, such as kernels of one's own layers; see `find_prunable`.
        dropout: Whether dropout, noise and augmentation layers act while scoring.
        num_batches: As in `tf_prune.prune`. Where the data is endless or does not say its length, `None` reads at most
            as many as an epoch has steps.
        batch_size: Cuts one batch of arrays into batches; as in `tf_prune.prune`.
        verbose: 0 is silent, 1 shows a progress bar while an iterative method runs, or over several batches.

    Attributes:
        report: The `PruningReport` of the last pruning, or `None` before the first.
    """

    _tool: Pruner | None = None  # while `fit` runs
    _pruned: weakref.ref | None = None

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
        num_batches: int | None = None,
        batch_size: int | None = None,
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
            "num_batches": num_batches,
            "batch_size": batch_size,
        }
        self.verbose = verbose
        self.report: PruningReport | None = None

    def _pruner(self) -> Pruner:
        if not self.model.built and has_call(self.model) and self.data is not None:
            self._build()
        steps = (self.params or {}).get("steps")
        return Pruner(self.model, self.method, self.data, self.loss, **self.options, limit=steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PruningCallback":
        shared = (self.data, self.loss, self.options, self.model, self._tool)
        memo.update((id(part), part) for part in shared)
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: not the model of the last `fit`."""
        return {**self.__dict__, "_model": None, "_tool": None, "_pruned": None}

    def _build(self) -> None:
        """A subclassed model gets its weights at its first call, which would be after this."""
        data = self.data
        if isinstance(data, Iterator):  # put back what is read of it
            data = [next(self.data)]
            self.data = itertools.chain(data, self.data)
        x = next(iter(Batches(data).take(1)))[0]
        self.model(rows(x, None, 1))


class PruneBeforeTraining(PruningCallback):
    """Prunes the model once, when the first epoch of `fit` begins; every step after it keeps the masks.

    By then all callbacks have done what they do at the beginning of `fit`: weights that one of them brings back from a
    run that was interrupted bring their masks along, and are not pruned again. Nor does a second `fit` of the same
    model prune again, unless kernels can be pruned by then that could not before, because their layers were frozen;
    another model is pruned anew.

    Args:
        method: As in `tf_prune.prune`.
        sparsity: Fraction in [0, 1) to remove.
        data: As in `tf_prune.prune`, for methods that need examples.
        loss: Defaults to the compiled loss.
        **options: `scope`, `structure`, `filters`, `include`, `dropout`, `batch_size` and `verbose` as in
            `tf_prune.prune`, and `num_batches`, which defaults to the steps of an epoch where the data does not say its
            length.

    Attributes:
        report: The `PruningReport`, or `None` before the first `fit`.
    """

    def __init__(self, method: Method, sparsity: float, data: Any = None, loss: Any = None, **options: Any):
        super().__init__(method, data, loss, **options)
        self.sparsity = check_sparsity(sparsity)
        self._paths: set[str] = set()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Prunes, the first time."""
        self._prune_once()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Prunes if there was no epoch, and masks the weights."""
        self._prune_once()
        super().on_train_end(logs)

    def _prune_once(self) -> None:
        is_known = self._pruned is not None and self._pruned() is self.model
        if is_known and self._trainable() <= self._paths:  # or layers were frozen then, and are no more
            return
        self.report = self._pruner().prune(self.sparsity, self.verbose)
        self._pruned, self._paths = weakref.ref(self.model), self._trainable()

    def _trainable(self) -> set[str]:
        return {path for path, v in find_kernels(self.model, self.options["include"]).items() if v.trainable}


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
        masks = {path: np.asarray(kernel) != 0 for path, kernel in survey.prunable.items()}
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
