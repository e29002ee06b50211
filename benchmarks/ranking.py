"""From scores to masks on 143 million weights, the size of VGG-19 for ImageNet: time, and memory on the way.

    python -m benchmarks.ranking

The memory is the process's peak, above what the scores take, in units of the scores. Each case is a process of its own.
"""

import itertools
import resource
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

from tf_prune.masks import masks_from_scores

_CASE = flags.DEFINE_string("case", "", "Runs one case in this process.")

# The kernels of VGG-19 for ImageNet.
WIDTHS = [3, 64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512]
SHAPES = [(3, 3, i, o) for i, o in itertools.pairwise(WIDTHS)] + [(25088, 4096), (4096, 4096), (4096, 1000)]
CASES = {
    "normal, global": (0.0, "global", 0.9),
    "normal, global, few kept": (0.0, "global", 0.999),
    "normal, ERK": (0.0, "erk", 0.9),
    "99 % are exactly 0, global": (0.99, "global", 0.9),
    "all equal, global": (1.0, "global", 0.9),
}


def used() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str) -> None:
    zeros, scope, sparsity = CASES[case]
    generator = np.random.default_rng(0)
    scores = {}
    for i, shape in enumerate(SHAPES):
        scores[f"kernel_{i}"] = score = generator.standard_normal(shape, np.float32)
        score *= score >= np.float32({0.0: -np.inf, 0.99: 2.3263, 1.0: np.inf}[zeros])
    size, before = sum(score.nbytes for score in scores.values()), used()
    start = time.perf_counter()
    masks = masks_from_scores(scores, sparsity, scope)
    seconds = time.perf_counter() - start
    if masks.num_kept != size // 4 - int(np.ceil(sparsity * (size // 4))):
        raise RuntimeError(f"{masks.num_kept} are kept")
    print(f"| {case} | {size // 4:,} | {seconds:.2f} s | {(peak() - before) / size:.2f} |", flush=True)


def main(argv: list[str]) -> None:
    if _CASE.value:
        return measure(_CASE.value)
    print("| scores | weights | time | extra memory, in copies of the scores |\n|---|---|---|---|", flush=True)
    for case in CASES:
        subprocess.run([sys.executable, "-m", "benchmarks.ranking", f"--case={case}"], check=True)


if __name__ == "__main__":
    app.run(main)
