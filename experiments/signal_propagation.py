"""The tables of "A signal propagation perspective for pruning neural networks at initialization" (Lee et al. 2020).

    python -m experiments.signal_propagation --data_dir=DATA
    python -m experiments.signal_propagation --data_dir=DATA --picture=gamma.png --initializer=scaled_gaussian

Prints each table in Markdown, the paper's figure in parentheses behind ours, mean and standard deviation over the
seeds; writes the runs to `--output_dir`/signal_propagation as they end, and does none of them twice. With `--picture`
it draws spectra, densities and sensitivities of one configuration, before and after pruning and after conditioning.

Where the common flags are not given they are the paper's (`PAPER` below), but for the length of training: SNIP at 90 %
on MNIST, scored on the whole training set.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

import tf_prune
from experiments import common, datasets

_TABLES = flags.DEFINE_list("tables", ["1", "2", "3", "5", "figure2", "conditioning"], "Which tables.")
_SEEDS = flags.DEFINE_list("runs", ["0", "1", "2"], "Seeds to average over.")
_IMAGES = flags.DEFINE_integer("spectrum_images", 60_000, "Training images that a spectrum is measured at.", 1)
_PICTURE = flags.DEFINE_string("picture", "", "Draws this PNG file instead of the tables.")

PAPER = {
    "method": "snip",
    "sparsity": 0.9,
    "model": "mlp_tanh_7",
    "dataset": "mnist",
    "epochs": 5,
    "batch_size": 100,
    "learning_rate": 0.1,
    "score_batches": 600,
}
_GAMMAS = (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1)
_GRU_IMAGES = 6_000  # 28 steps in float64 take their time
_SCULPTING = {"epochs": 3, "batch_size": 128, "score_batches": 10}  # of images that are six times as large

# Lee et al. 2020: errors in percent.
_PAPER_1 = {
    ("linear", 3): (7.99, 8.00, 7.72, 7.69, 7.69, 7.69),
    ("linear", 5): (8.21, 8.15, 8.06, 8.02, 8.01, 8.01),
    ("linear", 7): (8.30, 8.27, 8.37, 8.44, 8.43, 8.44),
    ("tanh", 3): (2.54, 2.50, 2.52, 2.50, 2.57, 2.59),
    ("tanh", 5): (2.55, 2.53, 2.53, 2.51, 2.45, 90.2),
    ("tanh", 7): (2.66, 2.70, 2.67, 2.61, 90.2, 90.2),
}
_PAPER_2 = {  # mean, standard deviation, condition number, sparsities of layers 1 to 7
    1e-4: (2.46e-07, 9.90e-08, 4.66e00, (0.97, 0.80, 0.80, 0.80, 0.80, 0.81, 0.48)),
    1e-3: (5.74e-04, 2.45e-04, 8.54e00, (0.97, 0.80, 0.80, 0.80, 0.80, 0.81, 0.48)),
    1e-2: (4.49e-01, 2.51e-01, 5.14e01, (0.96, 0.80, 0.80, 0.80, 0.81, 0.81, 0.49)),
    1e-1: (2.30e01, 2.56e01, 2.92e04, (0.96, 0.81, 0.82, 0.82, 0.82, 0.80, 0.45)),
    1e0: (1.03e03, 2.61e03, 3.34e11, (0.85, 0.88, 0.99, 1.00, 1.00, 1.00, 0.91)),
    1e1: (3.67e04, 2.64e05, float("inf"), (0.84, 0.95, 1.00, 1.00, 1.00, 1.00, 1.00)),
}
_ROWS_3 = [("lecun_normal", "labels"), ("glorot_normal", "labels"), ("he_normal", "labels")]
_ROWS_3 += [("orthogonal", "labels"), ("orthogonal", "uniform")]
_PAPER_3 = {  # condition number dense, sparse, error
    "lenet_300_100": [(6.7, 8.1, 1.69), (6.7, 9.4, 1.75), (6.7, 9.6, 1.81), (4.5, 5.7, 1.61), (4.5, 7.9, 1.83)],
    "gru": [(4.8, 4.8, 1.25), (3.9, 3.9, 1.20), (5.4, 5.7, 1.28), (3.3, 3.4, 1.18), (3.3, 3.6, 1.35)],
}
_PAPER_5 = {
    "labels": (2.46, 2.43, 2.61),
    "prediction_raw": (3.31, 3.38, 3.60),
    "prediction": (3.11, 3.37, 3.56),
    "uniform": (2.77, 2.77, 2.94),
}


class Runs:
    """Does each run once, and keeps what came out in a file of its own."""

    def __init__(
        self, config: common.Config, seeds: Sequence[int], data_dir: str | None, output_dir: Path, images: int
    ):
        self.config = config
        self.seeds = seeds
        self._folder = output_dir / "signal_propagation"
        self._data_dir = data_dir
        self._images = images
        self._data: dict[str, datasets.Dataset] = {}

    def data(self, config: common.Config) -> datasets.Dataset:
        """The configuration's dataset, read once."""
        if config.dataset not in self._data:
            self._data[config.dataset] = datasets.load(config.dataset, self._data_dir)
        return self._data[config.dataset]

    def errors(self, **changes: Any) -> list[float]:
        """Test error in percent for each seed, trained as the configuration with these changes says."""
        return [100 * (1 - one["accuracy"]) for one in self._each("train", self._train, changes)]

    def images(self, model: str) -> int:
        """How many images a spectrum of this network is measured at."""
        return min(self._images, _GRU_IMAGES) if model == "gru" else self._images

    def spectra(self, **changes: Any) -> list[dict[str, Any]]:
        """What `measure` gives for each seed."""
        return self._each(f"measure-{self.images(changes['model'])}", self._measure, changes)

    def _each(self, kind: str, function: Callable[[common.Config], dict], changes: dict[str, Any]) -> list[dict]:
        results = []
        for seed in self.seeds:
            config = dataclasses.replace(self.config, seed=seed, **changes)
            file = self._folder / f"{kind}-{config.name}.json"
            if not file.exists():
                begin = time.perf_counter()
                result = function(config)
                common.write_json(file, {"config": dataclasses.asdict(config), **result, "versions": common.versions()})
                print(f"{file.name} in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            results.append(json.loads(file.read_text()))
        return results

    def _train(self, config: common.Config) -> dict[str, Any]:
        return common.train(config, self.data(config))[1]

    def _measure(self, config: common.Config) -> dict[str, Any]:
        spectra, masks, _, gaps = measure(config, self.data(config), self.images(config.model))
        return {
            "spectra": {label: _numbers(spectrum) for label, spectrum in spectra.items()},
            "sparsities": [1 - float(mask.mean()) for mask in masks.values()],
            "gaps": gaps,
        }


def _numbers(spectrum: tf_prune.Spectrum) -> dict[str, float]:
    names = ("mean", "std", "smallest", "largest", "pooled_condition_number", "mean_condition_number")
    names += ("condition_number_of_means", "num_rank_deficient", "isometry_gap")
    return {name: getattr(spectrum, name) for name in names}


def measure(
    config: common.Config, data: datasets.Dataset, images: int, verbose: int = 0
) -> tuple[dict[str, tf_prune.Spectrum], tf_prune.Masks, dict[str, np.ndarray], list[tuple[float, float, float]]]:
    """Spectra before pruning, after it and after conditioning; masks; scores; gaps (before, after, floor) of each."""
    model = common.initial_model(config, data)
    x = data.x_train[:images]
    prune = common.pruning(config, data)[0]
    scores = tf_prune.score(model, prune.method, prune.data, prune.loss, filters=prune.options["filters"])
    spectra = {"before pruning": tf_prune.jacobian_spectrum(model, x, verbose=verbose)}
    report = tf_prune.prune(
        model, prune.method, config.sparsity, prune.data, prune.loss, verbose=verbose, **prune.options
    )
    spectra["after pruning"] = tf_prune.jacobian_spectrum(model, x, verbose=verbose)
    gaps = []
    if config.condition_gain:
        gains = tf_prune.condition(model, gain=config.condition_gain, verbose=verbose).values()
        gaps = [(gain.before, gain.after, gain.floor) for gain in gains]
        spectra["after conditioning"] = tf_prune.jacobian_spectrum(model, x, verbose=verbose)
    return spectra, report.masks, scores, gaps


# -- the tables ---------------------------------------------------------------------------------------


def _markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}"


def _middle(values: Sequence[float]) -> str:
    return f"{np.median(values):.3g}"


def table_1(runs: Runs) -> str:
    """Errors of linear and tanh MLPs by depth and γ, pruned there and drawn anew before training."""
    rows = []
    for (activation, depth), paper in _PAPER_1.items():
        cells = []
        for gamma, theirs in zip(_GAMMAS, paper, strict=True):
            errors = runs.errors(
                model=f"mlp_{activation}_{depth}",
                initializer="scaled_gaussian",
                gamma=gamma,
                retrain_initializer="glorot_normal",
            )
            cells.append(f"{_mean(errors)} ({theirs:g})")
        rows.append([f"{activation}, {depth}", *cells])
    return _markdown("Table 1: error in %, by γ", ["network, K", *(f"{gamma:g}" for gamma in _GAMMAS)], rows)


def table_2(runs: Runs) -> str:
    """Spectrum of the 7-layer tanh MLP by γ, and the sparsity of each layer."""
    rows = []
    for gamma, (mean, std, number, sparsities) in _PAPER_2.items():
        measured = runs.spectra(model="mlp_tanh_7", initializer="scaled_gaussian", gamma=gamma)
        dense = [one["spectra"]["before pruning"] for one in measured]
        ours = [np.median([one[key] for one in dense]) for key in ("mean", "std", "pooled_condition_number")]
        cells = [f"{value:.3g} ({theirs:g})" for value, theirs in zip(ours, (mean, std, number), strict=True)]
        cells.append(_middle([one["condition_number_of_means"] for one in dense]))
        each = np.mean([one["sparsities"] for one in measured], 0)
        cells.append(", ".join(f"{value:.2f} ({theirs:g})" for value, theirs in zip(each, sparsities, strict=True)))
        rows.append([f"{gamma:g}", *cells])
    header = ["γ", "mean", "std", "condition number, pooled", "of means", "sparsity of layers 1 to 7"]
    return _markdown("Table 2: 7-layer tanh MLP, medians of the seeds", header, rows)


def table_3(runs: Runs) -> str:
    """Condition numbers dense and sparse, and errors, of LeNet-300-100 and the GRU, by initialization."""
    rows = []
    for model, paper in _PAPER_3.items():
        for (initializer, loss), theirs in zip(_ROWS_3, paper, strict=True):
            changes = {"model": model, "initializer": initializer, "score_loss": loss}
            measured = runs.spectra(**changes)
            cells = []
            for label, number in (("before pruning", theirs[0]), ("after pruning", theirs[1])):
                names = ("mean_condition_number", "pooled_condition_number", "condition_number_of_means")
                values = [_middle([one["spectra"][label][name] for one in measured]) for name in names]
                cells.append(f"{' / '.join(values)} ({number:g})")
            errors = f"{_mean(runs.errors(**changes))} ({theirs[2]:g})"
            rows.append([model, initializer, loss, *cells, errors])
    header = ["network", "initialization", "loss of scoring", "CN dense", "CN sparse", "error in %"]
    title = "Table 3: condition numbers (mean of examples / pooled / of means) and errors; "
    return _markdown(title + f"that of the GRU at {runs.images('gru'):,} images", header, rows)


def table_5(runs: Runs) -> str:
    """Errors with and without labels in scoring, by depth."""
    rows = []
    for loss, paper in _PAPER_5.items():
        cells = []
        for depth, theirs in zip((3, 5, 7), paper, strict=True):
            errors = runs.errors(model=f"mlp_tanh_{depth}", initializer="orthogonal", score_loss=loss)
            cells.append(f"{_mean(errors)} ({theirs:g})")
        rows.append([loss, *cells])
    return _markdown(
        "Table 5: error in %, tanh MLPs, by what scoring is compared with", ["loss", "K = 3", "5", "7"], rows
    )


def figure_2(runs: Runs) -> str:
    """Sculpting: a narrow dense network, and a wide one that is pruned to as many weights, without labels."""
    dataset = "cifar10" if runs.config.dataset == "mnist" else runs.config.dataset  # digits in the tests
    config = dataclasses.replace(runs.config, dataset=dataset)
    shape, classes = runs.data(config).input_shape, runs.data(config).num_classes
    target = _num_weights("resnet8_narrow", shape, classes)
    rows = []
    for model in ("resnet8_narrow", "resnet8"):
        size = _num_weights(model, shape, classes)
        is_dense = size == target
        errors = runs.errors(
            model=model,
            dataset=dataset,
            method="dense" if is_dense else runs.config.method,
            sparsity=0.0 if is_dense else 1 - target / size,
            initializer="convolution_orthogonal",
            score_loss="labels" if is_dense else "uniform",
            **_SCULPTING,
        )
        rows.append([model, f"{size:,}", f"{1 - target / size:.1%}", _mean(errors)])
    header = ["network", "weights before", "sparsity", "error in %"]
    title = f"Figure 2: {target:,} weights each, {dataset}, {_SCULPTING['epochs']} epochs, scored without labels"
    return _markdown(title, header, rows)


def _num_weights(model: str, shape: Sequence[int], classes: int) -> int:
    network = common.models.build(model, shape, classes)
    return sum(int(np.prod(kernel.shape)) for kernel in tf_prune.find_prunable(network).prunable.values())


def conditioning(runs: Runs) -> str:
    """What `condition` does to the condition number, to the gaps of the layers, and to the error."""
    rows = []
    for model, gains in (("mlp_tanh_7", (1.0, 0.6)), ("lenet_300_100", (1.0,))):
        for initializer in ("orthogonal", "glorot_normal"):
            plain = runs.errors(model=model, initializer=initializer)
            for gain in gains:
                changes = {"model": model, "initializer": initializer, "condition_gain": gain}
                measured = runs.spectra(**changes)
                cells = [_change(measured, name) for name in ("mean_condition_number", "pooled_condition_number")]
                before, after, _ = np.median([one["gaps"] for one in measured], 0).T
                cells.append(f"{before.min():.2f} to {before.max():.2f} → {after.min():.1g} to {after.max():.1g}")
                cells += [_mean(plain), _mean(runs.errors(**changes))]
                rows.append([f"{model}, {initializer}", f"{gain:g}", *cells])
    header = ["network", "gain", "CN, mean of examples", "CN, pooled", "isometry gaps of the layers"]
    header += ["error without, in %", "error with"]
    return _markdown(f"Conditioning after {runs.config.method} at {runs.config.sparsity:g}", header, rows)


def _change(measured: Sequence[dict[str, Any]], name: str) -> str:
    """From after pruning to after conditioning, and before pruning in parentheses: medians of the seeds."""
    dense, pruned, after = (
        _middle([one["spectra"][f"{when} {what}"][name] for one in measured])
        for when, what in (("before", "pruning"), ("after", "pruning"), ("after", "conditioning"))
    )
    return f"{pruned} → {after} (dense {dense})"


TABLES: dict[str, Callable[[Runs], str]] = {
    "1": table_1,
    "2": table_2,
    "3": table_3,
    "5": table_5,
    "figure2": figure_2,
    "conditioning": conditioning,
}


def draw(config: common.Config, data_dir: str | None, images: int, file: Path) -> None:
    """The picture of one configuration, always with conditioning."""
    config = dataclasses.replace(config, condition_gain=config.condition_gain or 1.0)
    spectra, masks, scores, _ = measure(config, datasets.load(config.dataset, data_dir), images, verbose=1)
    for label, spectrum in spectra.items():
        print(f"{label}: {spectrum}")
    title = f"{config.model} on {config.dataset}, initialization {config.initializer or 'of its own'}, "
    title += f"{config.method} at {config.sparsity:g}"
    print(tf_prune.draw_propagation(file, spectra, masks, scores, title))


def main() -> None:
    """Reads the flags."""
    given = {name: flags.FLAGS[name].value for name in PAPER if not flags.FLAGS[name].using_default_value}
    config = dataclasses.replace(common.config_of_flags(), **{**PAPER, **given})
    if _PICTURE.value:
        draw(config, common.DATA_DIR.value, _IMAGES.value, Path(_PICTURE.value))
        return
    unknown = [name for name in _TABLES.value if name not in TABLES]
    if unknown:
        raise ValueError(f"Unknown tables {', '.join(unknown)}. Expected some of {', '.join(TABLES)}.")
    keras.utils.disable_interactive_logging()
    seeds = [int(seed) for seed in _SEEDS.value]
    runs = Runs(config, seeds, common.DATA_DIR.value, Path(common.OUTPUT_DIR.value), _IMAGES.value)
    for name in _TABLES.value:
        print(TABLES[name](runs), end="\n\n", flush=True)


if __name__ == "__main__":
    common.start(main)
