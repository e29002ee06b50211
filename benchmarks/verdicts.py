"""Does `tf_prune.explain` say of a network what aarch64 then does? Predicted and measured, side by side.

    python -m benchmarks.verdicts
    python -m benchmarks.verdicts --cases='MobileNet'

Small networks with one thing each that XNNPACK's sparse chain takes or does not (`benchmarks/image_nets.py`), and the
mobile networks of Keras, as shipped and made ready, all with 90 % zeros in their 1x1 kernels. Each is exported with
plain and with sparse tensors, and both are run by `benchmarks/on_device.py`. That sparse kernels run is seen by the
time: what does not engage takes as long as the dense file, what does is several times as fast.

Results are kept in `--output_dir`/inference/, so that an interrupted run goes on where it was.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from benchmarks import inference
from benchmarks.image_nets import NETS
from experiments import common, models
from tf_prune.readiness import make_ready

_SIZE = 96
# Between what engages (2.9 and more at 90 %) and what does not (0.9 to 1.3, on a busy machine).
_ENGAGED = 1.6


def _application(name: str) -> Callable[[], keras.Model]:
    return lambda: getattr(keras.applications, name)(weights=None, input_shape=(_SIZE, _SIZE, 3))


def cases() -> list[inference.Case]:
    """The rows, in order."""
    builders = {name: build for name, (build, _, _) in NETS.items()}
    mobile = ("MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large", "EfficientNetB0", "EfficientNetV2B0")
    networks = {name: _application(name) for name in mobile}
    for name in ("mobilenet_v1", "mobilenet_v1_ready"):
        networks[f"{name} for CIFAR-10"] = lambda name=name: models.build(name, (32, 32, 3), 10)
    for name, build in networks.items():
        builders[f"{name}, as it is"] = build
        builders[f"{name}, made ready"] = lambda build=build: make_ready(build())[0]
    return [inference.Case(name, build, 0.9, pointwise=True, is_aarch64=True) for name, build in builders.items()]


def row(case: inference.Case, result: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a case's row."""
    said, right = result["explained"], inference.is_right(case, result)
    if "failed" in result:
        shown, engaged = f"does not run ({result['failed']})", False
    else:
        ratio = result["speedup"][0]["ratio"]
        shown = f"{ratio:.2f} ({result['label'] or result['machine']})" + ("" if right else ", outputs wrong")
        engaged = ratio > _ENGAGED and right
    return case.model, said["verdict"], said["in_the_way"], shown, "yes" if engaged == said["runs_sparse"] else "NO"


def agrees(case: inference.Case, result: dict[str, Any]) -> bool:
    """Whether the verdict is what was measured. Kernels that run and compute wrong outputs must not be promised."""
    return row(case, result)[-1] == "yes"


def table(results: dict[inference.Case, dict[str, Any]]) -> str:
    """In Markdown."""
    columns = ("network", "explain says", "in the way", "times as fast", "agrees")
    return inference.markdown(columns, (row(case, result) for case, result in results.items()))


def main() -> None:
    tf.get_logger().setLevel("ERROR")
    chosen = [case for case in cases() if re.search(inference.CASES.value, case.name)]
    results = inference.collect(chosen, Path(common.OUTPUT_DIR.value), inference.SECONDS.value)
    print(table(results))
    count = sum(agrees(case, result) for case, result in results.items())
    print(f"The verdict is what was measured in {count} of {len(results)} cases.")
    if count < len(results):
        sys.exit("error: explain and the measurement differ")


if __name__ == "__main__":
    common.start(main)
