"""Pruning while `fit` trains, by a schedule over the run or in rounds."""

import bisect
import gc
import warnings
from typing import Any

import keras
import numpy as np

from tf_prune.callbacks import PruningCallback
from tf_prune.enforcement import apply_masks
from tf_prune.evidence import masks_of
from tf_prune.methods import Method, as_iterative
from tf_prune.pruning import Pruner
from tf_prune.schedules import Harmonic, Schedule, as_schedule
from tf_prune.scopes import TooLowSparsityError


class GradualPruning(PruningCallback):
    """Prunes further and further while the model trains; what is pruned stays so.

    After step `begin`, and every `frequency` steps from there to `end`, the model is pruned to
    `schedule((step - begin) / (end - begin))`, and at `end` to the target exactly. Steps are batches of the run,
    counted from its epoch 0, so that a run that was interrupted goes on where it was.

    Args:
        criterion: As `method` in `tf_prune.prune`.
        schedule: An object such as `Cubic(0.9)`, which has the target. Or a `PolynomialDecay` or `ConstantSparsity` of
            TensorFlow's toolkit (tfmot), whose steps are then `begin`, `end` and `frequency`.
        begin: A step (an integer), or a fraction of the run (a float in [0, 1]).
        end: The same. What is left of the run after it trains the final network.
        frequency: How many steps between two prunings, or which fraction of the run.
        data: As in `tf_prune.prune`, for criteria that need examples. Of a generator, without `num_batches`, at most as
            many batches as an epoch has steps are kept, and read again at each pruning; with it, each takes the next
            ones, so it must not be the generator that `fit` reads.
        loss: Defaults to the compiled loss.
        verbose: As in `tf_prune.prune`, at each pruning.
        **options: `scope`, `structure`, `filters`, `include`, `dropout`, `num_batches` and `batch_size` as in
            `tf_prune.prune`.

    Attributes:
        report: The `PruningReport` of the last pruning; `None` before the first.

    Raises:
        ValueError: When `fit` begins, if the schedule would not come to its end within the run.
        RuntimeError: When `fit` ends, if it was stopped before the schedule's end.

    >>> from tf_prune.schedules import Cubic
    >>> GradualPruning("magnitude", Cubic(0.9), begin=0.1, end=0.5, frequency=100).schedule.sparsity
    0.9

    Source: Zhu and Gupta 2017, with magnitudes and a cubic schedule. Deviation: there a pruned weight that was trained
    further in the shadow of its mask can come back. Deviations from tfmot with the same schedule: tfmot prunes as step
    s begins, here s is over, one update later. It counts from 1, so that a `begin_step` of 0 prunes the untrained model
    here, and there nothing before step `frequency`. It misses its target if `frequency` does not lead to `end_step`. It
    gives each layer the same sparsity; here `scope="layerwise"` does.
    """

    def __init__(
        self,
        criterion: Method,
        schedule: Schedule,
        begin: float = 0.0,
        end: float = 0.75,
        frequency: float = 0.01,
        data: Any = None,
        loss: Any = None,
        *,
        verbose: int = 0,
        **options: Any,
    ):
        super().__init__(as_iterative(criterion), data, loss, verbose=verbose, **options)
        self.schedule, steps = as_schedule(schedule)
        if steps is not None and (begin, end, frequency) != (0.0, 0.75, 0.01):
            raise ValueError(
                f"{type(schedule).__name__} has its own steps, and begin={begin!r}, end={end!r} and "
                f"frequency={frequency!r} would be others. Leave these out, or pass a schedule such as "
                "tf_prune.Cubic(0.9)."
            )
        if steps is not None:
            begin, end, frequency = steps
        self.begin, self.end, self.frequency = begin, end, frequency
        for name in ("begin", "end", "frequency"):
            _as_steps(name, getattr(self, name), 1)
        if frequency == 0:
            raise ValueError("frequency must be above 0: steps, or a fraction of the run.")
        self._steps = self._epoch_start = 0
        self._times: list[int] = []
        self._last = -1

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Lays the schedule over the run; raises if it does not fit."""
        steps, epochs = self.params.get("steps"), self.params["epochs"]
        if steps is None:
            raise ValueError(
                "fit does not know how many steps an epoch has, so the schedule cannot be laid over the run. Pass "
                "steps_per_epoch=..., or data that knows its length, such as a tf.data.Dataset with assert_cardinality."
            )
        self._steps, self._last, self._tool = int(steps), -1, None
        self._times = self._times_in(self._steps, epochs)

    def _times_in(self, steps: int, epochs: int) -> list[int]:
        """After which steps to prune, in a run of so many steps an epoch."""
        total = steps * epochs
        begin, end = (_as_steps(name, getattr(self, name), total) for name in ("begin", "end"))
        frequency = max(1, _as_steps("frequency", self.frequency, total))
        if not begin <= end <= total:
            raise ValueError(
                f"The schedule goes from step {begin} (begin={self.begin!r}) to step {end} (end={self.end!r}), but the "
                f"run has {total} steps: {epochs} epochs of {steps}. It would "
                f"{'never begin' if begin > total else 'not come to its end'}. Give begin <= end as fractions of the "
                "run (floats), or as steps (integers) within it, or train longer."
            )
        return [*range(begin, end, frequency), end]

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Prunes if it is time; in the first epoch, checks before all training what the prunings will need."""
        self._epoch_start = epoch * self._steps
        if self._tool is None:
            self._tool = self._checked_pruner()
            self._warn_of_best_weights()
            # From the start, so that the logs of all epochs have the same names.
            ones = {path: np.ones(variable.shape, bool) for path, variable in self._tool.variables.items()}
            apply_masks(self.model, {**ones, **masks_of(self.model)})
        self._prune_after(self._epoch_start)

    def _warn_of_best_weights(self) -> None:
        """The best epoch is likely one that was less sparse, and it would be restored under the last masks."""
        last = -(-self._times[-1] // self._steps)
        # Keras does not tell a callback of the others.
        lists = [one for one in gc.get_referrers(self) if isinstance(one, list)]
        stopping = [one for list_ in lists for one in list_ if isinstance(one, keras.callbacks.EarlyStopping)]
        if self._epoch_start < self._times[-1] and any(
            one.restore_best_weights and one.start_from_epoch < last for one in stopping
        ):
            warnings.warn(
                "EarlyStopping compares epochs of different sparsity: the best weights that it restores may be of one "
                "before the schedule's end, and would then be masked to the last sparsity. Begin when the schedule is "
                f"over: EarlyStopping(start_from_epoch={last}).",
                stacklevel=2,
            )

    def _checked_pruner(self) -> Pruner:
        pruner = self._pruner()
        pruner.check(self.schedule.sparsity)
        if pruner.num_batches is None and len(self._times) > 1:
            pruner.batches = pruner.batches.kept()
        if self._epoch_start < self._times[0] and not pruner.batches.once_only:
            pruner.scores()  # data, labels and loss: an error now, and not in the middle of the run
        return pruner

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Prunes if it is time."""
        self._prune_after(self._epoch_start + batch + 1)

    def _prune_after(self, step: int) -> None:
        index = bisect.bisect_right(self._times, step) - 1
        if index < 0 or self._times[index] == self._last:
            return
        assert self._tool is not None  # noqa: S101 - for the type checker
        self._last = self._times[index]
        begin, end = self._times[0], self._times[-1]
        progress = (self._last - begin) / (end - begin) if self._last < end else 1.0
        sparsity = self.schedule(progress)
        if sparsity == 0:
            return
        try:
            self.report = self._tool.prune(sparsity, self.verbose)
        except TooLowSparsityError:  # the schedule will catch up with what was pruned before, or the structure removes
            if progress == 1:
                raise

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Masks the weights; raises if the schedule did not come to its end."""
        super().on_train_end(logs)
        is_over = self._last == self._times[-1] or (self._tool is None and masks_of(self.model).sparsity > 0)
        self._tool = None
        if not is_over:
            raise RuntimeError(
                f"Training stopped before step {self._times[-1]}, where the schedule reaches a sparsity of "
                f"{self.schedule.sparsity:g}: the model was "
                f"{f'last pruned after step {self._last}' if self._last >= 0 else 'never pruned'} and has "
                f"{masks_of(self.model).sparsity:.4g}. It keeps its weights and masks. Train to the end, let the "
                "schedule end earlier, or call tf_prune.prune(model, ...) and fine-tune."
            )


class PruneAndTrain(GradualPruning):
    """Trains an epoch and then prunes, `rounds` times; the rest of the epochs train the final network.

    After round i of n the density is that of `Harmonic`: the first round removes the most.

    Args:
        criterion: As `method` in `tf_prune.prune`.
        sparsity: The target, in [0, 1).
        rounds: How many, at least 1 and at most the epochs of `fit`.
        data: As in `GradualPruning`.
        loss: Defaults to the compiled loss.
        **options: Of `GradualPruning`, other than its times.

    >>> PruneAndTrain("loss_preservation", 0.75, rounds=5, structure="output_channels").rounds
    5

    Source: Lubana and Dick 2021, Sec. 4, with 1, 5 and 25 rounds. Deviation: their code makes a new optimizer for each
    round; here momentum goes on.
    """

    def __init__(
        self, criterion: Method, sparsity: float, rounds: int, data: Any = None, loss: Any = None, **options: Any
    ):
        super().__init__(criterion, Harmonic(sparsity), 0.0, 1.0, 1.0, data, loss, **options)
        if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)) or rounds < 1:
            raise ValueError(f"rounds must be an integer of at least 1, got {rounds!r}.")
        self.rounds = int(rounds)

    def _times_in(self, steps: int, epochs: int) -> list[int]:
        if self.rounds > epochs:
            raise ValueError(
                f"Each of the {self.rounds} rounds takes an epoch, but fit runs {epochs}. Ask for fewer rounds, or for "
                "more epochs."
            )
        return [i * steps for i in range(self.rounds + 1)]  # nothing at 0, where the schedule starts


def _as_steps(name: str, value: Any, total: int) -> int:
    """A step, or a fraction of all of them, in steps."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0:
        return int(value)
    if isinstance(value, (float, np.floating)) and 0 <= value <= 1:
        return round(float(value) * total)
    raise ValueError(
        f"{name} must be steps (an integer >= 0) or a fraction of the run (a float in [0, 1]); got {value!r}."
    )
