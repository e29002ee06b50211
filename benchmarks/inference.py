"""What sparsity brings at inference: one pruned model as a TF-Lite file with plain and with sparse tensors.

    python -m benchmarks.inference
    python -m benchmarks.inference --cases='Dense.*int8' --output_dir=results

Both files hold the same weights, and `benchmarks/on_device.py` measures them in alternation in one process: dense
layers on this machine, MobileNets on aarch64, which `benchmarks/aarch64.py` emulates on another machine. XNNPACK's
sparse convolutions do not exist on x86; emulation shows whether they engage, but it is no phone.

A row that was measured is kept in `--output_dir`/inference/, so that an interrupted run goes on where it was.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import rich.box
import tensorflow as tf
from absl import flags
from rich.console import Console
from rich.table import Table

import tf_prune
from benchmarks import aarch64
from experiments import common
from tf_prune.conversion import convert
from tf_prune.readiness import make_ready
from tf_prune.saved_model import write_saved_model

CASES = flags.DEFINE_string("cases", "", "Only rows whose names have this regular expression in them.")
SECONDS = flags.DEFINE_float("seconds_a_case", 10.0, "About how long a row is measured.", lower_bound=0.0)

ON_DEVICE = Path(__file__).with_name("on_device.py")
# Of the largest output. Rounding differs between kernels; more than that, and it would be another model.
TOLERANCES = {"float32": 1e-3, "int8": 5e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a model, how it is pruned, and where it is measured.

    Attributes:
        model: Its name in the table.
        build: Makes it.
        sparsity: Of the pruned kernels, each.
        structure: What is pruned together.
        pointwise: Whether only 1x1 convolutions are pruned, the ones that XNNPACK has sparse kernels for.
        dtype: Of the file: `"float32"` or `"int8"`.
        batch: Examples in a call.
        is_aarch64: Whether it is measured on aarch64, emulated if need be, and not on this machine.
    """

    model: str
    build: Callable[[], keras.Model]
    sparsity: float
    structure: str = "weights"
    pointwise: bool = False
    dtype: str = "float32"
    batch: int = 1
    is_aarch64: bool = False

    @property
    def name(self) -> str:
        """Of the row; its result is found by it."""
        where = " on aarch64" if self.is_aarch64 else ""
        return f"{self.model}, {self.structure} {self.sparsity:.0%}, {self.dtype}, batch {self.batch}{where}"


def dense_layer() -> keras.Model:
    return keras.Sequential([keras.Input((2048,)), keras.layers.Dense(2048)])


def mobilenet() -> keras.Model:
    return keras.applications.MobileNet(weights=None)


def mobilenet_v2() -> keras.Model:
    return keras.applications.MobileNetV2(weights=None)


def cases() -> list[Case]:
    """The rows, in order."""
    layer = ("Dense 2048 x 2048", dense_layer)
    rows = [Case(*layer, sparsity, "1x4") for sparsity in (0.8, 0.9, 0.95)]
    rows += [Case(*layer, 0.9), Case(*layer, 0.9, "1x4", batch=8), Case(*layer, 0.95, "1x4", batch=8)]
    rows += [Case(*layer, sparsity, "1x16", dtype="int8") for sparsity in (0.8, 0.9, 0.95)]
    for name, build, sparsities in (
        ("MobileNetV2", mobilenet_v2, (0.7, 0.8, 0.9, 0.95)),
        ("MobileNet", mobilenet, (0.9,)),
    ):
        variants: dict[str, tuple[Callable[[], keras.Model], Iterable[float]]] = {
            "as shipped": (build, (0.9,)),
            "made ready": (lambda build=build: make_ready(build())[0], sparsities),
        }
        for variant, (make, values) in variants.items():
            rows += [Case(f"{name}, {variant}", make, s, pointwise=True, is_aarch64=True) for s in values]
    rows.append(
        Case("MobileNetV2, made ready, every kernel", lambda: make_ready(mobilenet_v2())[0], 0.9, is_aarch64=True)
    )
    return rows


def pruned_model(case: Case) -> keras.Model:
    """The case's model with random weights, pruned at random."""
    keras.utils.set_random_seed(0)
    model = case.build()
    settle(model)
    options: dict[str, Any] = {}
    if case.pointwise:
        # A depthwise convolution is no Conv2D in Keras.
        layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
        names = [re.escape(layer.name) for layer in layers if layer.kernel_size == (1, 1)]
        options["filters"] = f"^({'|'.join(names)})$"
    report = tf_prune.prune(
        model, "random", case.sparsity, scope="layerwise", structure=case.structure, verbose=0, **options
    )
    if abs(report.masks.sparsity - case.sparsity) > 0.01:
        raise RuntimeError(f"{case.name}: {report.masks.sparsity:.2%} were pruned")
    settle(model)
    return model


def settle(model: keras.Model) -> None:
    """Sets the moving statistics of batch normalization to those of random inputs, as training would have done.

    Without it the outputs of a deep net that was never trained depend on nothing, and to compare them would be in vain.
    """
    normalizations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    if not normalizations:
        return
    momenta = [layer.momentum for layer in normalizations]
    for layer in normalizations:
        layer.momentum = 0.0
    model(np.random.default_rng(1).standard_normal((2, *model.input_shape[1:])).astype("float32"), training=True)
    for layer, momentum in zip(normalizations, momenta, strict=True):
        layer.momentum = momentum


def contents(case: Case) -> tuple[bytes, bytes]:
    """The pruned model as `.tflite` with plain and with sparse tensors."""
    model = pruned_model(case)
    examples = np.random.default_rng(0).standard_normal((32, *model.input_shape[1:])).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        (name,) = write_saved_model(model, examples, Path(folder))
        calibration = [{name: example[None]} for example in examples] if case.dtype == "int8" else None
        plain, sparse = (
            convert(Path(folder), dtype=case.dtype, encoding=encoding, representative=calibration)
            for encoding in ("dense", "sparse")
        )
    return plain, sparse


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Converts the case's model, runs both files with `on_device.py` in a process of its own.

    Args:
        case: The row.
        seconds: About how long the two files are run.

    Returns:
        What `on_device.py` says, the sparse file first; and what `tf_prune.explain` says of that file.

    Raises:
        aarch64.UnavailableError: If it is measured on aarch64, and that cannot be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain, sparse = Path(folder, "dense.tflite"), Path(folder, "sparse.tflite")
        for file, content in zip((plain, sparse), contents(case), strict=True):
            file.write_bytes(content)
        examples = 2 if case.is_aarch64 else 32  # emulated, a MobileNet takes seconds for each
        arguments = [str(ON_DEVICE), str(sparse), f"--against={plain}", "--json", f"--batch={case.batch}"]
        arguments += [f"--seconds={seconds}", f"--examples={max(examples, case.batch)}"]
        try:
            result = json.loads(aarch64.run(arguments) if case.is_aarch64 else _run_here(arguments))
        except subprocess.CalledProcessError as error:
            # Of models that LiteRT does not load, or whose sparse outputs have other shapes.
            result = {"failed": f"exit code {error.returncode}"}
        explanation = tf_prune.explain(sparse, "arm64" if case.is_aarch64 else "x86")
    found = [f"{o.operator or o.kind}" for o in explanation.obstacles]
    result["explained"] = {
        "runs_sparse": explanation.runs_sparse,
        "verdict": "runs sparse" if explanation.runs_sparse else "runs dense",
        "in_the_way": ", ".join(sorted(set(found))),
    }
    return result


def is_right(case: Case, result: dict[str, Any]) -> bool:
    """Whether the two files computed the same; where they did not, it says nothing how fast one of them is."""
    if "failed" in result:
        return False
    difference = result["agreement"]["relative"]
    return difference is not None and difference <= TOLERANCES[case.dtype]


def _run_here(arguments: list[str]) -> str:
    return subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def row(case: Case, result: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a case's row."""
    name = case.model if case.dtype == "float32" else f"{case.model}, {case.dtype}"
    if "failed" in result:
        return name, f"{case.sparsity:.0%}, {case.structure}", str(case.batch), "", "", "", result["failed"], ""
    sparse, dense = ((model["bytes"], model["latency"][0]["median_ms"]) for model in result["models"])
    ratio = result["speedup"][0]
    mark = f" ({result['label']})" if result["label"] else ""
    shown = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f}){mark}"
    if not is_right(case, result):
        difference = result["agreement"]["relative"]
        shown = "WRONG: outputs " + (
            "not finite" if difference is None else f"differ by {difference:.2g} of the largest"
        )
    return (
        name,
        f"{case.sparsity:.0%}, {case.structure}",
        str(case.batch),
        result["machine"] + mark,
        *(f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.2f} s" for ms in (dense[1], sparse[1])),
        shown,
        f"{sparse[0] / dense[0]:.2f}",
    )


def table(results: dict[Case, dict[str, Any]]) -> str:
    """In Markdown: a row for each case that has a result."""
    columns = ("model", "zeros", "batch", "on", "dense", "sparse", "times as fast (quartiles)", "file, ratio")
    return markdown(columns, (row(case, result) for case, result in results.items()))


def markdown(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    """A table to be pasted into a page."""
    shown = Table(*columns, box=rich.box.MARKDOWN)
    for cells in rows:
        shown.add_row(*cells)
    console = Console(width=260)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().strip()


def collect(chosen: list[Case], output_dir: Path, seconds: float) -> dict[Case, dict[str, Any]]:
    """Measures each case that has no result there yet; says in one line why rows are missing, if they are."""
    results, unavailable = {}, ""
    for i, case in enumerate(chosen):
        file = output_dir / "inference" / f"{re.sub(r'[^a-zA-Z0-9]+', '-', case.name)}.json"
        if not file.exists():
            if case.is_aarch64 and unavailable:
                continue
            print(f"[{i + 1}/{len(chosen)}] {case.name} ...", file=sys.stderr, flush=True)
            try:
                # Before its model is made, which takes longer than to find out.
                if case.is_aarch64:
                    aarch64.command()
                common.write_json(file, {"case": case.name, **measure(case, seconds)})
            except aarch64.UnavailableError as problem:
                unavailable = str(problem)
                continue
        results[case] = json.loads(file.read_text())
    if unavailable:
        print(f"Without the rows on aarch64: {unavailable}", flush=True)
    return results


def main() -> None:
    tf.get_logger().setLevel("ERROR")
    found = cases()
    chosen = [case for case in found if re.search(CASES.value, case.name)]
    if not chosen:
        raise ValueError(f"--cases={CASES.value} is in no name of a row; they are: {'; '.join(c.name for c in found)}")
    results = collect(chosen, Path(common.OUTPUT_DIR.value), SECONDS.value)
    print(table(results))
    wrong = [case.name for case, result in results.items() if not is_right(case, result)]
    if wrong:
        sys.exit(f"error: sparse and dense outputs differ in {'; '.join(wrong)}")


if __name__ == "__main__":
    common.start(main)
