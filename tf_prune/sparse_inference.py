"""Will this model's sparsity be used on that target? Why not, and what to change.

LiteRT computes with sparse kernels in two places: XNNPACK in chains of convolutions (`xnnpack.py` has the rules), and
its own `FULLY_CONNECTED` with blocks of 1x4 (float32) and 1x16 (int8). Everything else is as fast as a dense model.
"""

import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from tf_prune.batches import inputs_like, why_no_inputs
from tf_prune.conversion import NOT_IN_TFLITE, convert
from tf_prune.effective import check_not_quantized
from tf_prune.evidence import check_masks_hold
from tf_prune.prunable import check_call, check_model
from tf_prune.saved_model import write_saved_model
from tf_prune.tflite import read
from tf_prune.tflite_graph import Graph, Operator, Tensor
from tf_prune.xnnpack import Chain, find_chain

TARGETS = ("arm64", "arm32", "x86", "wasm", "microcontroller")
# Where XNNPACK takes its sparse kernels. It never does on x86 with AVX, expecting dense ones to be faster there
# (xnn_is_chw_compatible_config).
_SPARSE_CONVOLUTIONS = ("arm64", "arm32", "wasm")
# Operators with kernels, and the Keras layers that they come from.
_WITH_KERNELS = {
    "CONV_2D": "Conv",
    "DEPTHWISE_CONV_2D": "Depthwise",
    "TRANSPOSE_CONV": "Conv",
    "FULLY_CONNECTED": "Dense",
}
# The converter leaves tensors with fewer zeros dense (kMinSparsityLevel of its dense_to_sparse pass).
_LEAST_ENCODED = 0.3


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """One thing that keeps sparse kernels from running.

    Attributes:
        kind: `"operator"`, `"sparsity"`, `"dtype"`, `"encoding"`, `"blocks"`, `"sizes"` or `"target"`; `"correctness"`
            where sparse kernels would run and compute wrong outputs.
        where: The layer, or the operator's name in the file.
        operator: As TF-Lite calls it; empty if it is about the whole model.
        reason: What is, and what it would have to be.
        fix: The change that removes it.
    """

    kind: str
    where: str
    operator: str
    reason: str
    fix: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of the file.

    Attributes:
        where: The layer, or the operator's name in the file.
        operator: As TF-Lite calls it.
        shape: In the file: outputs first, inputs last; of depthwise convolutions channels last.
        dtype: Of its numbers in the file.
        computes_in: Of what it is multiplied with.
        encoding: `"dense"`, `"random"` or blocks such as `"1x4"`.
        sparsity: Fraction of zeros.
        output_block: How many output channels at a time are zero together: 4, 2 or 1. XNNPACK on arm64 has faster
            kernels for 4 and 2.
        runs_sparse: Whether the target computes with its zeros left out.
    """

    where: str
    operator: str
    shape: tuple[int, ...]
    dtype: str
    computes_in: str
    encoding: str
    sparsity: float
    output_block: int
    runs_sparse: bool


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a target makes of a model's sparsity. `print(explanation)` shows it as tables.

    Attributes:
        target: One of `TARGETS`.
        obstacles: All that keeps sparse kernels from running, each with its fix.
        kernels: Every kernel, and whether it runs sparse.
        zeros_missing: How many more weights of the 1x1 convolutions must be zero for the rule of two thirds; 0 if none,
            or if there are no 1x1 convolutions.
        unreadable_by: Who cannot read this file, because tensors are encoded as sparse.
        advice: What costs speed without keeping sparse kernels from running.
    """

    target: str
    obstacles: tuple[Obstacle, ...]
    kernels: tuple[Kernel, ...]
    zeros_missing: int
    unreadable_by: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def runs_sparse(self) -> bool:
        """Whether any kernel runs sparse."""
        return any(kernel.runs_sparse for kernel in self.kernels)

    @property
    def ready(self) -> bool:
        """Whether nothing but sparsity, and its encoding, is missing: the architecture can be trained as it is."""
        return all(obstacle.kind in ("sparsity", "encoding", "blocks") for obstacle in self.obstacles)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all kernels."""
        sizes = [int(np.prod(kernel.shape)) for kernel in self.kernels]
        zeros = sum(kernel.sparsity * size for kernel, size in zip(self.kernels, sizes, strict=True))
        return zeros / sum(sizes) if sizes else 0.0

    @property
    def verdict(self) -> str:
        """One sentence."""
        count = sum(kernel.runs_sparse for kernel in self.kernels)
        if count:
            return f"Sparse kernels run on {self.target}: {count} of {len(self.kernels)}."
        if self.ready and self.obstacles:
            return f"The architecture is ready for {self.target}, but no kernel runs sparse yet."
        return f"No kernel runs sparse on {self.target}: it is as fast as a dense model."

    def __str__(self) -> str:
        obstacles = Table(title=self.verdict)
        for column in ("what is in the way", "reason", "fix"):
            obstacles.add_column(column, overflow="fold")
        for row in self.obstacles:
            obstacles.add_row(f"{row.where} {row.operator}".strip(), row.reason, row.fix)
        kernels = Table()
        for column in ("kernel", "operator", "shape", "type", "encoding", "sparsity", "runs"):
            kernels.add_column(column, justify="right" if column == "sparsity" else "left")
        for kernel in self.kernels:
            shape = "x".join(map(str, kernel.shape))
            runs = "sparse" if kernel.runs_sparse else "dense"
            kernels.add_row(
                kernel.where, kernel.operator, shape, kernel.dtype, kernel.encoding, f"{kernel.sparsity:.2%}", runs
            )
        with io.StringIO() as stream:
            # Names stand as they are in the file, brackets too.
            console = Console(file=stream, width=120, markup=False, emoji=False)
            console.print(obstacles if self.obstacles else self.verdict)
            console.print(kernels)
            for line in self.advice:
                console.print(f"Note: {line}")
            if self.unreadable_by:
                console.print(f"Cannot read this file: {', '.join(self.unreadable_by)}. Export with encoding='dense'.")
            return stream.getvalue()


def explain(model: Any, target: str = "arm64") -> Explanation:
    """Says which kernels will run sparse on a target, and lists all that is in the way, each with its fix.

    A Keras model and a SavedModel are converted to float32 with sparse tensors first, so that what is judged is what
    the target would get; nothing is written, and the model is not changed. An unpruned model may be asked about, too:
    `Explanation.ready` tells whether pruning it will pay.

    Args:
        model: A built `keras.Model` that says the shape of its inputs, the path of a `.tflite` file or of a SavedModel,
            or the bytes of a `.tflite` file.
        target: `"arm64"`, `"arm32"`, `"x86"`, `"wasm"` or `"microcontroller"`.

    Returns:
        An `Explanation`.

    Raises:
        ValueError: For an unknown target; for a model of unknown input shape; for a file that is none.
        ConversionError: If the model cannot be converted.

    Example:
        print(tf_prune.explain(keras.applications.MobileNetV2(weights=None), "arm64"))

    Source: XNNPACK's `subgraph.c` and `hardware-config.h`, LiteRT's `xnnpack_delegate.cc` and sparse `FULLY_CONNECTED`;
    measured on aarch64 with LiteRT 2.1 under emulation (benchmarks/README.md). Deviation: since 2025 XNNPACK may also
    count a dense layer that reads the global pooling to the two thirds; here that is an advice, for it did not keep
    the kernels that were measured from running.
    """
    if target not in TARGETS:
        raise ValueError(f"Unknown target {target!r}. Expected one of {', '.join(TARGETS)}.")
    found = model._flatten_layers(include_self=False) if isinstance(model, keras.Model) else []
    layers = {layer.name: type(layer).__name__ for layer in found}
    return explain_graphs(read(_content(model, layers)), target, layers)


def _content(model: Any, layers: Mapping[str, str] | None = None) -> bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if path.is_dir():
            return _encoded(path, layers)
        if not path.is_file():
            raise ValueError(f"There is no file or folder {path}. Expected a .tflite file or a SavedModel.")
        return path.read_bytes()
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"model must be a Keras 3 model, or the path of a .tflite file or a SavedModel; got {type(model)}."
        )
    check_model(model)
    check_not_quantized(model, *NOT_IN_TFLITE)
    check_masks_hold(model)
    check_call(model, "To explain it")
    examples = inputs_like(model, lambda shape, dtype: np.zeros((1, *shape), dtype))
    if examples is None:
        raise ValueError(
            f"The model {model.name!r} {why_no_inputs(model)}. Build it with keras.Input(shape) of fixed sizes, or "
            "export it with data=(x, y) and explain the file."
        )
    with tempfile.TemporaryDirectory() as folder:
        # As `export` does it, unless recurrent layers need a fixed size.
        recurrent = any(isinstance(layer, keras.layers.RNN) for layer in model._flatten_layers())
        shapes = [(1, *leaf.shape[1:]) for leaf in keras.tree.flatten(examples)] if recurrent else None
        write_saved_model(model, examples, Path(folder), shapes)
        return _encoded(Path(folder), layers)


def _encoded(saved_model: Path, layers: Mapping[str, str] | None) -> bytes:
    """With sparse tensors, unless the converter drops what does not fill a block: such a file is none."""
    content = convert(saved_model, encoding="sparse", layers=layers)
    try:
        read(content)
    except ValueError:
        return convert(saved_model, layers=layers)
    return content


def explain_graphs(graphs: tuple[Graph, ...], target: str, layers: Mapping[str, str] | None = None) -> Explanation:
    """As `explain`, of a file that was read.

    Args:
        graphs: The file.
        target: As in `explain`.
        layers: Name -> class of the Keras layers, to call things by their names.
    """
    names = _Names(graphs[0], layers or {})
    chain = find_chain(graphs[0])
    encoded = any(tensor.encoding not in (None, "dense") for graph in graphs for tensor in graph.tensors)
    convolve = target in _SPARSE_CONVOLUTIONS
    running = {id(o) for o in chain.running} if convolve else set()
    blocks: dict[int, int] = {}
    kernels = tuple(
        _kernel(graph, o, constant, _Names(graph, layers or {}).of(o), id(o) in running, target, blocks)
        for graph in graphs
        for o in graph.computing
        if o.kind in _WITH_KERNELS and (constant := graph.constant(o.inputs[1])) is not None
    )
    obstacles = []
    if convolve:
        obstacles += [
            Obstacle(f.kind, names.of(f.operator), f.operator.kind if f.operator else "", f.reason, f.fix)
            for f in chain.findings
        ]
    elif target == "microcontroller":
        obstacles += _on_a_microcontroller(kernels, encoded, graphs[0])
    elif any(kernel.operator != "FULLY_CONNECTED" for kernel in kernels):
        obstacles.append(
            Obstacle(
                "target",
                "all convolutions",
                "",
                "XNNPACK takes its sparse convolutions on ARM and WebAssembly, and never on x86 with AVX",
                "make the network narrower, or deploy on ARM; zeros are computed with here, whole channels of them too",
            )
        )
    if target != "microcontroller":
        # A dense head need not be sparse where other layers are.
        others = (convolve and chain.pointwise) or any(kernel.runs_sparse for kernel in kernels)
        obstacles += _dense_layers(kernels, required=not others)
    unreadable = ("TensorFlow Lite for Microcontrollers", "converters to ONNX such as tf2onnx") if encoded else ()
    return Explanation(
        target,
        tuple(obstacles),
        kernels,
        chain.zeros_missing if convolve else 0,
        unreadable,
        tuple(_advice(chain, kernels, target)),
    )


def why_wrong(graphs: tuple[Graph, ...]) -> str | None:
    """Why a runtime is known to compute wrong outputs with a file, or to crash on it; `None` if it is not known to.

    Args:
        graphs: The file.
    """
    if find_chain(graphs[0]).is_wrong:
        return "On ARM XNNPACK computes wrong outputs where its sparse chain ends as here; tf_prune.explain says where."
    layers = [(graph, o) for graph in graphs for o in graph.computing if o.kind == "FULLY_CONNECTED"]
    for graph, operator in layers:
        kernel = graph.constant(operator.inputs[1])
        if kernel is None or kernel.dtype != "int8" or kernel.encoding == "dense":
            continue
        if graph.tensors[operator.inputs[0]].dtype != "int8":
            # Measured with LiteRT 2.1 and 2.3, on x86 and emulated aarch64.
            return "XNNPACK computes wrong outputs for dense layers with sparse int8 weights alone, or crashes."
    return None


class _Names:
    """What the operators of a file are called: by their Keras layers, or else as in the file."""

    def __init__(self, graph: Graph, layers: Mapping[str, str]):
        self._graph, self._layers = graph, layers

    def of(self, operator: Operator | None) -> str:
        if operator is None:
            return "the model"
        tensors = [operator.outputs[0], *(t for t in operator.inputs[1:] if t >= 0)]
        names = [self._graph.tensors[t].name for t in tensors]
        parts = [part for name in names for part in re.split(r"[/;:]", name)]
        # Tracing adds a number to the names of layers.
        known = [p for part in parts for p in (re.sub(r"_\d+$", "", part), part) if p in self._layers]
        # Of a convolution and what was folded into it, the convolution.
        kind = _WITH_KERNELS.get(operator.kind, "")
        own = [name for name in known if kind in self._layers[name]]
        if not known and kind and len(self._graph.outputs) == 1 and names[0].startswith("StatefulPartitionedCall"):
            # The last operator bears the output's name, and older converters keep no trace of its layer.
            own = [name for name, layer in self._layers.items() if kind in layer][-1:]
        return (own or known or names)[0]


def _kernel(
    graph: Graph,
    operator: Operator,
    constant: Tensor,
    where: str,
    in_chain: bool,
    target: str,
    blocks: dict[int, int],
) -> Kernel:
    direct = operator.kind == "FULLY_CONNECTED" and constant.encoding != "dense"
    direct = direct and not graph.runs_dense(operator.inputs[1]) and target != "microcontroller"
    computes_in = graph.tensors[operator.inputs[0]].dtype
    return Kernel(
        where,
        operator.kind,
        constant.shape,
        constant.dtype,
        computes_in,
        constant.encoding or "dense",
        constant.num_zeros / constant.values.size,
        _output_block(constant, blocks),
        in_chain or (direct and computes_in == constant.dtype),
    )


def _output_block(kernel: Tensor, known: dict[int, int]) -> int:
    """The block of output channels that XNNPACK would choose: the larger of 4 and 2 that is at least 9/10 full.

    `known` are those of kernels that were asked before: many operators may share one.
    """
    if id(kernel) not in known:
        known[id(kernel)] = _fullest_block(kernel)
    return known[id(kernel)]


def _fullest_block(kernel: Tensor) -> int:
    matrix = kernel.values.reshape(kernel.shape[0], -1) != 0
    for size in (4, 2):
        blocks = matrix[: len(matrix) // size * size].reshape(-1, size, matrix.shape[1])
        stored = int(blocks.any(1).sum()) * size
        if stored and blocks.sum() >= 0.9 * stored:
            return size
    return 1


def _dense_layers(kernels: tuple[Kernel, ...], required: bool) -> list[Obstacle]:
    """What keeps dense layers from running sparse; of those with hardly a zero only where it is `required` of them."""
    rows = [k for k in kernels if k.operator == "FULLY_CONNECTED" and not k.runs_sparse]
    found = [(kernel, _why_dense(kernel, required)) for kernel in rows]
    return [Obstacle(why[0], kernel.where, kernel.operator, *why[1:]) for kernel, why in found if why is not None]


def _why_dense(kernel: Kernel, required: bool) -> tuple[str, str, str] | None:
    """Kind, reason and fix of a dense layer that runs dense."""
    block = 16 if kernel.dtype == "int8" else 4
    if kernel.dtype != kernel.computes_in or kernel.dtype not in ("float32", "int8"):
        reason = f"dense layers run sparse in float32 and in int8 throughout, not as {kernel.dtype} weights alone"
        if kernel.encoding not in ("dense", "random"):
            # Measured with LiteRT 2.3: its own kernel is right, but XNNPACK takes the layer first.
            reason += "; where XNNPACK takes this file's, its outputs are wrong"
        return "dtype", reason, "dtype='float32' with blocks of 1x4, or dtype='int8' with blocks of 1x16"
    if kernel.sparsity >= _LEAST_ENCODED:
        if kernel.encoding == "dense":
            fix = f"prune with structure='1x{block}' and export with encoding='sparse'"
            return (
                "encoding",
                f"its zeros are stored as numbers; {kernel.dtype} runs sparse in blocks of 1x{block}",
                fix,
            )
        reason = f"its zeros are those of single weights; {kernel.dtype} runs sparse in blocks of 1x{block}"
        if kernel.dtype == "int8":
            reason += ". XNNPACK does not load a dense layer that is encoded so"
        return "blocks", reason, f"prune with structure='1x{block}'"
    if not required:
        return None
    reason = f"{kernel.sparsity:.2%} of its weights are zero; below {_LEAST_ENCODED:.0%} a tensor stays dense"
    return "sparsity", reason, f"prune it with structure='1x{block}'; at 90 % it pays"


def _on_a_microcontroller(kernels: tuple[Kernel, ...], encoded: bool, graph: Graph) -> list[Obstacle]:
    reason = "TensorFlow Lite for Microcontrollers has no sparse kernels"
    fix = "make the network narrower; zeros, whole channels of them too, only make a compressed firmware image smaller"
    obstacles = [Obstacle("target", "all kernels", "", reason, fix)]
    if encoded:
        reason = "it cannot read sparse tensors, so the file does not load"
        obstacles.append(Obstacle("encoding", "the model", "", reason, "export with encoding='dense'"))
    for dtype in sorted({kernel.dtype for kernel in kernels} - {"float32", "int8"}):
        reason = f"it cannot read kernels in {dtype}"
        obstacles.append(Obstacle("dtype", "the model", "", reason, "export with dtype='int8' and data"))
    if any(axis for tensor in graph.inputs for axis in graph.tensors[tensor].open_axes):
        reason = "it takes 1 for each size that the file leaves open"
        obstacles.append(
            Obstacle("sizes", "the model's inputs", "", reason, "export with input_shape= or dtype='int8'")
        )
    return obstacles


def _advice(chain: Chain, kernels: tuple[Kernel, ...], target: str) -> list[str]:
    lines = []
    pointwise = [k for k in kernels if k.runs_sparse and k.operator == "CONV_2D"]
    blocked = [k.where for k in pointwise if k.output_block > 1]
    if blocked and target != "arm64":
        lines.append(
            f"{len(blocked)} kernels ({blocked[0]}, ...) have blocks of output channels, for which XNNPACK has fast "
            f"code on arm64 alone; on {target} single weights are faster."
        )
    if target == "x86" and any(k.runs_sparse and k.dtype == "int8" for k in kernels):
        lines.append(
            "On x86 sparse int8 blocks were measured to be slower than XNNPACK's dense int8 up to 90 % zeros. They are "
            "smaller all the same; float32 in blocks of 1x4 is faster than dense."
        )
    head = [k for k in kernels if k.operator == "FULLY_CONNECTED" and not k.runs_sparse]
    weights = chain.num_weights + sum(int(np.prod(k.shape)) for k in head)
    if pointwise and head:
        zeros = round(sum(k.sparsity * np.prod(k.shape) for k in (*pointwise, *head)))
        if 3 * zeros <= 2 * weights:
            lines.append(
                "XNNPACK since 2025 may count dense layers that follow the global pooling to the two thirds of zeros; "
                f"with {', '.join(k.where for k in head)} there are {zeros / weights:.2%}. Prune them too, to be safe."
            )
    return lines
