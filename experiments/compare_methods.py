"""Compare pruning methods at several sparsities over several seeds, as the papers' tables do.

    python -m experiments.compare_methods --model=lenet_300_100 --dataset=mnist --epochs=10 --batch_size=128 \
        --sparsities=0.9,0.98,0.995 --seeds=0,1,2

Each run's result is written to `--output_dir`/runs as soon as it is there; a run that is there already is not done
again, so an interrupted comparison goes on where it was. Prints a Markdown table: mean and standard deviation of the
test accuracy after the last epoch.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

import tf_prune
from experiments import common, datasets

_METHODS = flags.DEFINE_list("methods", list(tf_prune.METHODS), "Methods to compare.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.9", "0.98", "0.995"], "Sparsities to compare at.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to average over.")


def run(
    config: common.Config,
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    data_dir: str | None,
    output_dir: Path,
) -> list[dict]:
    """Does each run that is not done yet; returns all results in order."""
    unknown = [name for name in methods if name not in common.METHODS]
    if unknown:
        raise ValueError(f"Unknown methods {', '.join(unknown)}. Expected some of {', '.join(common.METHODS)}.")
    configs = [dataclasses.replace(config, method="dense", sparsity=0.0, seed=seed) for seed in seeds]
    configs += [
        dataclasses.replace(config, method=method, sparsity=tf_prune.check_sparsity(sparsity), seed=seed)
        for sparsity in sparsities
        for method in methods
        for seed in seeds
    ]
    data = datasets.load(config.dataset, data_dir)
    results = []
    for i, one in enumerate(configs):
        file = output_dir / "runs" / f"{one.name}.json"
        if not file.exists():
            start = time.perf_counter()
            _, result = common.train(one, data)
            seconds = time.perf_counter() - start
            common.write_json(file, {"config": dataclasses.asdict(one), **result, "versions": common.versions()})
            print(f"[{i + 1}/{len(configs)}] {one.name}: {result['accuracy']:.2%} in {seconds:.0f} s", file=sys.stderr)
        results.append(json.loads(file.read_text()))
    return results


def table(results: Iterable[dict]) -> str:
    """Markdown: one row a method, one column a sparsity; mean +- standard deviation over seeds, in percent."""
    accuracies: dict[tuple[str, float], list[float]] = {}
    for result in results:
        key = (result["config"]["method"], result["config"]["sparsity"])
        accuracies.setdefault(key, []).append(100 * result["accuracy"])
    dense = accuracies.pop(("dense", 0.0), None)
    sparsities = sorted({sparsity for _, sparsity in accuracies})
    lines = [
        "| method | " + " | ".join(f"{100 * sparsity:g} %" for sparsity in sparsities) + " |",
        "|---|" + "---|" * len(sparsities),
    ]
    if dense:
        lines.append("| dense | " + " | ".join([_mean(dense)] + ["" for _ in sparsities[1:]]) + " |")
    for method in dict.fromkeys(method for method, _ in accuracies):
        cells = [_mean(accuracies.get((method, sparsity), [])) for sparsity in sparsities]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}" if values else ""


def main() -> None:
    """Reads the flags."""
    results = run(
        common.config_of_flags(),
        _METHODS.value,
        [float(value) for value in _SPARSITIES.value],
        [int(value) for value in _SEEDS.value],
        common.DATA_DIR.value,
        Path(common.OUTPUT_DIR.value),
    )
    print(table(results))


if __name__ == "__main__":
    common.start(main)
