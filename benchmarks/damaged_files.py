"""Damages files of masks and TF-Lite files in many ways, and reads them: an error in words, or what is in the file.

    python -m benchmarks.damaged_files --mutations=10000

A file of masks must give a `ValueError` or exactly the masks that were saved. A `.tflite` file must give one, or what
LiteRT's own schema reads in it, to `read`, `constants`, `zeros_in_file` and `explain`. Each must take less than a
second. The `.tflite` files that are read are then run by LiteRT in a process with limits; which of them it refuses, and
which crash it, is its own doing, and is counted.
"""

import collections
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from ai_edge_litert import schema_py_generated as schema
from keras import layers
from rich.console import Console
from rich.table import Table

import tf_prune
from tf_prune import conversion, tflite, zeros
from tf_prune.saved_model import write_saved_model

_MUTATIONS = flags.DEFINE_integer("mutations", 10_000, "How many damaged files of each kind.", lower_bound=1)
_SEED = flags.DEFINE_integer("mutation_seed", 0, "Of the damages.")

_SECONDS = 1.0
_SECONDS_TO_RUN = 10.0
_WORDS = (0, 1, -1, 2**31 - 1, -(2**31), 2**30, 0x7F7F7F7F, 127, 255, 65535)


def _flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 4))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _set_byte(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 4))):
        content[rng.randrange(len(content))] = rng.randrange(256)


def _set_word(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content) - 4) // 4 * 4
    content[at : at + 4] = (rng.choice(_WORDS) & 0xFFFFFFFF).to_bytes(4, "little")


def _cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _region(content: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, start + rng.choice((1, 4, 16, 64, 1024))


def _splice(content: bytearray, rng: random.Random) -> None:
    """Bytes of one place over those of another."""
    start, end = _region(content, rng)
    taken = content[start:end]
    at = rng.randrange(len(content) - len(taken) + 1)
    content[at : at + len(taken)] = taken


def _insert(content: bytearray, rng: random.Random) -> None:
    start, end = _region(content, rng)
    at = rng.randrange(len(content) + 1)
    content[at:at] = content[start:end]


def _remove(content: bytearray, rng: random.Random) -> None:
    start, end = _region(content, rng)
    del content[start:end]


def _append(content: bytearray, rng: random.Random) -> None:
    start, end = _region(content, rng)
    content += content[start:end]


MUTATIONS: dict[str, Callable[[bytearray, random.Random], None]] = {
    "bits flipped": _flip,
    "bytes set": _set_byte,
    "a word set": _set_word,
    "cut short": _cut,
    "spliced": _splice,
    "a part doubled": _insert,
    "a part removed": _remove,
    "a part appended": _append,
}


def damaged(files: list[bytes], count: int, seed: int) -> Iterator[tuple[str, int, bytes]]:
    """So many damaged files: how each is damaged, which of the files it was, and its bytes."""
    rng = random.Random(seed)
    for i in range(count):
        kind, which = list(MUTATIONS)[i % len(MUTATIONS)], rng.randrange(len(files))
        content = bytearray(files[which])
        MUTATIONS[kind](content, rng)
        yield kind, which, bytes(content)


def mask_files(folder: Path) -> tuple[list[tf_prune.Masks], list[bytes]]:
    """Masks to damage, and their files."""
    generator = np.random.default_rng(0)
    shapes = [{"dense/kernel": (30, 20)}, {"a/kernel": (3, 3, 4, 8), "b/kernel": (32, 10), "b/bias": (10,)}, {}]
    masks = [tf_prune.Masks({p: generator.random(s) < 0.2 for p, s in named.items()}) for named in shapes]
    for one in masks:
        one.save(folder / f"{len(one)}.npz")
    return masks, [(folder / f"{len(one)}.npz").read_bytes() for one in masks]


def tflite_files(names: tuple[str, ...] = ()) -> dict[str, bytes]:
    """TF-Lite files to damage: plain, sparse and quantized, and with graphs that loops call; all if none is named."""
    keras.utils.set_random_seed(0)
    image = [
        *(layers.ZeroPadding2D(1), layers.Conv2D(8, 3, 2), layers.Conv2D(16, 1, activation="relu")),
        *(layers.DepthwiseConv2D(3, padding="same"), layers.Conv2D(8, 1), layers.GlobalAveragePooling2D()),
        layers.Dense(4),
    ]
    chain = keras.Sequential([keras.Input((16, 16, 3)), *image])
    tf_prune.prune(chain, "random", 0.8, scope="layerwise", verbose=0)
    dense = keras.Sequential([keras.Input((32,)), layers.Dense(32, "relu"), layers.Dense(32)])
    tf_prune.prune(dense, "magnitude", 0.75, structure="1x16", scope="layerwise", verbose=0)
    recurrent = keras.Sequential([keras.Input((5, 3)), layers.GRU(8), layers.Dense(2)])
    chosen = {
        "float32": (chain, "float32", "dense"),
        "float32, sparse": (chain, "float32", "sparse"),
        "float16, sparse": (chain, "float16", "sparse"),
        "int8": (chain, "int8", "dense"),
        "int8, sparse blocks": (dense, "int8", "sparse"),
        "recurrent": (recurrent, "float32", "dense"),
    }
    return {name: _convert(*how) for name, how in chosen.items() if name in (names or chosen)}


def _convert(model: keras.Model, dtype: str, encoding: str) -> bytes:
    x = np.random.default_rng(0).standard_normal((8, *model.input_shape[1:])).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        recurrent = any(isinstance(layer, layers.RNN) for layer in model.layers)
        (name,) = write_saved_model(model, x, Path(folder), [(1 if recurrent else None, *x.shape[1:])])
        examples = [{name: example[None]} for example in x] if dtype == "int8" else None
        return conversion.convert(Path(folder), dtype=dtype, encoding=encoding, representative=examples)


def loads_rightly(file: Path, content: bytes, masks: tf_prune.Masks) -> bool:
    """Whether a damaged file of masks is read as it was; `False` if it is refused.

    Raises:
        AssertionError: If other masks are read.
    """
    file.write_bytes(content)
    try:
        loaded = tf_prune.Masks.load(file)
    except ValueError:
        return False
    if loaded != masks:
        raise AssertionError("other masks were read")
    return True


def reads_rightly(content: bytes, target: str, kernels: dict[str, np.ndarray]) -> bool:
    """Whether a `.tflite` file is read, by everything that reads it; `False` if it is refused.

    Raises:
        AssertionError: If it is read as something else than what LiteRT's schema finds in it, or by some alone.
    """
    try:
        graphs = tflite.read(content)
    except ValueError:
        for ask in (tflite.constants, lambda c: tf_prune.explain(c, target), lambda c: zeros.zeros_in_file(kernels, c)):
            try:
                ask(content)
            except ValueError:
                continue
            raise AssertionError("what read refuses is read elsewhere") from None
        return False
    tflite.constants(content)
    zeros.zeros_in_file(kernels, content)
    str(tf_prune.explain(content, target))
    if [_seen(graph) for graph in graphs] != list(by_schema(content)):
        raise AssertionError("LiteRT's schema finds something else in the file")
    return True


def _seen(graph: Any) -> tuple[Any, ...]:
    tensors = [(t.name, t.shape, t.values.tobytes() if t.encoding == "dense" else None) for t in graph.tensors]
    return tensors, [(o.inputs, o.outputs) for o in graph.operators], graph.inputs, graph.outputs


def by_schema(content: bytes) -> Iterator[tuple[Any, ...]]:
    """The graphs of a file as the accessors see them that FlatBuffers has made of LiteRT's schema."""
    model = schema.Model.GetRootAs(content, 0)
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        tensors = []
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            buffer = model.Buffers(tensor.Buffer()) if tensor.Buffer() else None
            plain = tensor.Sparsity() is None and tensor.Type() in (0, 1, 2, 3, 4, 6, 7, 9)
            data = b"" if buffer is None or not plain or buffer.DataIsNone() else buffer.DataAsNumpy().tobytes()
            name = (tensor.Name() or b"").decode()
            tensors.append((name, _tuple(tensor.ShapeAsNumpy()), data or None))
        operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
        read = [(_tuple(o.InputsAsNumpy()), _tuple(o.OutputsAsNumpy())) for o in operators]
        yield tensors, read, _tuple(graph.InputsAsNumpy()), _tuple(graph.OutputsAsNumpy())


def _tuple(array: Any) -> tuple[int, ...]:
    return () if isinstance(array, int) else tuple(array.tolist())


class _Runner:
    """A process that runs files, and is started again when one has killed it or took too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, file: Path) -> str:
        """What became of a file."""
        if self._process is None:
            command = [sys.executable, "-m", "benchmarks.run_limited"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, **pipes)
        process = self._process
        process.stdin.write(f"{file}\n".encode())
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _SECONDS_TO_RUN)
        found = process.stdout.readline().decode().strip() if ready else "too long"
        if not ready or not found:
            self.close()
        return found or "crashed"

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _count(
    files: Iterator[tuple[str, int, bytes]], ask: Callable[[int, int, bytes], bool]
) -> tuple[dict[str, collections.Counter[str]], list[str], float]:
    """What became of damaged files, by how they were damaged; what was wrong; and the longest time."""
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong, longest = [], 0.0
    for i, (kind, which, content) in enumerate(files):
        start = time.process_time()
        try:
            rows[kind]["read" if ask(i, which, content) else "refused"] += 1
        except Exception as error:
            rows[kind]["wrong"] += 1
            wrong.append(f"{kind}, number {i}: {type(error).__name__}: {error}")
        longest = max(longest, time.process_time() - start)
    return rows, wrong, longest


def main(_: list[str]) -> None:
    """Prints what became of the files."""
    logging.set_verbosity(logging.WARNING)
    tf.get_logger().setLevel("ERROR")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        masks, files = mask_files(folder)
        found = {
            "masks": _count(
                damaged(files, _MUTATIONS.value, _SEED.value),
                lambda i, which, content: loads_rightly(folder / "damaged.npz", content, masks[which]),
            )
        }
        kernels = {"kernel": np.ones((16, 8), np.float32)}
        accepted: list[Path] = []

        def ask(i: int, which: int, content: bytes) -> bool:
            is_read = reads_rightly(content, tf_prune.TARGETS[i % len(tf_prune.TARGETS)], kernels)
            if is_read:
                accepted.append(folder / f"{i}.tflite")
                accepted[-1].write_bytes(content)
            return is_read

        made = list(tflite_files().values())
        found[".tflite"] = _count(damaged(made, _MUTATIONS.value, _SEED.value), ask)
        runner = _Runner()
        ran = collections.Counter(map(runner.run, accepted))
        runner.close()
    table = Table(title=f"{_MUTATIONS.value:,} damaged files of each kind")
    for column in ("file", "damage", "refused", "read rightly", "wrong"):
        table.add_column(column, justify="left" if column in ("file", "damage") else "right")
    for file, (rows, _, _) in found.items():
        for kind, counts in rows.items():
            table.add_row(file, kind, *(f"{counts[result]:,}" for result in ("refused", "read", "wrong")))
    Console(width=100).print(table)
    for file, (_, _, longest) in found.items():
        print(f"The longest time of a file ({file}): {longest:.3f} s.")
    print(f"Of {len(accepted):,} .tflite files that were read, LiteRT: {dict(ran)}.")
    wrong = [line for _, lines, _ in found.values() for line in lines]
    slow = [file for file, (_, _, longest) in found.items() if longest > _SECONDS]
    if wrong or slow:
        sys.exit("\n".join(["error:", *wrong[:20], *(f"{file} took more than {_SECONDS} s" for file in slow)]))


if __name__ == "__main__":
    app.run(main)
