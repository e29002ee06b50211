"""Prune a network before training, train it beside the dense one, and export it for the edge.

    python -m experiments.prune_at_init --model=digits_mobilenet --sparsity=0.9
    python -m experiments.prune_at_init --method=snip --sparsity=0.98 --model=lenet_300_100 --dataset=mnist --epochs=10

Prints a table of both networks' accuracies, sparsities and sizes. Writes to `--output_dir`/NAME `results.json` and
`kept_weights.png`, and to `--export_dir`/NAME the SavedModel, the TF-Lite file and the export's report, with a plot of
size and latency against sparsity.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

import tf_prune
from experiments import common, datasets
from tf_prune.conversion import DTYPES

_SWEEP = (0.0, 0.5, 0.75, 0.95)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the weights in the TF-Lite file; int8 is of everything.")
_EXPORT_DIR = flags.DEFINE_string("export_dir", "saved_models", "Where the pruned model is exported.")


def run(
    config: common.Config, data_dir: str | None, output_dir: Path, export_dir: Path, dtype: str = "float32"
) -> dict[str, Any]:
    """Trains the dense and the pruned network, exports the pruned one, and returns what is written to results.json."""
    tf_prune.check_sparsity(config.sparsity)
    data = datasets.load(config.dataset, data_dir)
    _, dense = common.train(dataclasses.replace(config, method="dense"), data)
    model, pruned = common.train(config, data, verbose=1)
    examples = data.x_test[:1000], data.y_test[:1000]
    report = tf_prune.export(model, export_dir / config.name, examples, dtype=dtype, sweep=_SWEEP)
    print(report)
    plot_kept_weights(tf_prune.masks_of(model), output_dir / config.name / "kept_weights.png", config)
    results = {
        "config": dataclasses.asdict(config),
        "versions": common.versions(),
        "dense": dense,
        "pruned": pruned,
        "bytes": report.bytes,
        "encoding": report.encoding,
    }
    common.write_json(output_dir / config.name / "results.json", results)
    return results


def plot_kept_weights(masks: Mapping[str, Any], file: Path, config: common.Config) -> None:
    """Draws which fraction of each layer's weights is kept, and how many those are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [path.removesuffix("/kernel") for path in masks]
    kept = [int(mask.sum()) for mask in masks.values()]
    density = [mask.mean() for mask in masks.values()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.5 + 0.3 * len(names)), sharey=True, layout="constrained")
    for axes, values, label, text in (
        (left, density, "fraction of weights kept", "{:.1%}"),
        (right, kept, "number of weights kept", "{:,}"),
    ):
        bars = axes.barh(names, values, color="#3b6ea5")
        axes.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    figure.suptitle(f"{config.model} on {config.dataset}: {config.method} at sparsity {config.sparsity:g}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def print_results(results: Mapping[str, Any], output_dir: Path, export_dir: Path) -> None:
    """The table that this experiment is for."""
    config = common.Config(**results["config"])
    sizes = results["bytes"]
    table = Table(title=f"{config.model} on {config.dataset}, seed {config.seed}, {config.epochs} epochs")
    for column in ("", "test accuracy", "sparsity", "TF-Lite bytes", "gzipped"):
        table.add_column(column, justify="right" if column else "left")
    for label, part, size in (
        ("dense", results["dense"], sizes["dense"]),
        (config.method, results["pruned"], sizes[results["encoding"]]),
    ):
        gzipped = "" if label == "dense" else f"{size['gzip']:,}"
        table.add_row(label, f"{part['accuracy']:.2%}", f"{part['sparsity']:.2%}", f"{size['raw']:,}", gzipped)
    console = Console()
    console.print(table)
    console.print(f"{output_dir / config.name}: results.json, kept_weights.png", highlight=False, soft_wrap=True)
    console.print(f"{export_dir / config.name}: saved_model, model.tflite, report.md", highlight=False, soft_wrap=True)


def main() -> None:
    """Reads the flags."""
    config = common.config_of_flags()
    output_dir, export_dir = Path(common.OUTPUT_DIR.value), Path(_EXPORT_DIR.value)
    results = run(config, common.DATA_DIR.value, output_dir, export_dir, _DTYPE.value)
    print_results(results, output_dir, export_dir)


if __name__ == "__main__":
    common.start(main)
