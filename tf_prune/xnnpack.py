"""XNNPACK's rules for sparse convolutions, on the graph of a TF-Lite file: what joins, and what breaks the chain.

With the sparse encoding in a file, XNNPACK looks for a chain that starts with a 3x3 convolution of stride 2 on 3
channels, goes on with 1x1 and depthwise convolutions and elementwise operators, and ends in the mean over the image. It
computes the whole chain channels first and sparse, or none of it (`xnn_subgraph_rewrite_for_nchw` and
`xnn_check_nchw_compatibility` in XNNPACK's `subgraph.c`).
"""

import dataclasses

import numpy as np

from tf_prune.tflite import Graph, Operator

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")
_UNARY = (
    *("ABS", "CEIL", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG", "RELU", "RELU6"),
    *("RELU_N1_TO_1", "ROUND", "RSQRT", "SQRT", "SQUARE", "TANH"),
)
_ENDS = ("MEAN", "DEPTH_TO_SPACE")
_SAME = 0
_SYMMETRIC = "put ZeroPadding2D({}) before it and set its padding to 'valid'; make_ready does so"
_SEPARABLE = "a depthwise 3x3 or 5x5 convolution followed by a 1x1 convolution in its place"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What breaks the chain: an operator, or with `None` something of the whole. `kind` is as in `Obstacle`."""

    kind: str
    operator: Operator | None
    reason: str
    fix: str


@dataclasses.dataclass(frozen=True)
class Chain:
    """The chain of a graph, whole or broken.

    Attributes:
        pointwise: Its 1x1 convolutions.
        findings: All that breaks it, in the order of the graph.
        num_weights: Of the 1x1 convolutions.
        zeros_missing: How many more of them must be zero, so that more than two thirds are.
    """

    pointwise: tuple[Operator, ...]
    findings: tuple[Finding, ...]
    num_weights: int
    zeros_missing: int

    @property
    def runs_sparse(self) -> bool:
        """Whether XNNPACK takes its sparse kernels, and computes the right outputs with them."""
        return bool(self.pointwise) and not self.findings

    @property
    def is_wrong(self) -> bool:
        """Whether XNNPACK takes its sparse kernels, and computes wrong outputs with them."""
        return bool(self.findings) and all(finding.kind == "correctness" for finding in self.findings)


def find_chain(graph: Graph) -> Chain:
    """Looks for the chain, and for everything that breaks it."""
    search = _Search(graph)
    pointwise = tuple(o for o in search.image if o.kind == "CONV_2D" and search.kernel_size(o) == (1, 1))
    kernels = [graph.constant(o.inputs[1]) for o in pointwise]
    values = [kernel.values for kernel in kernels if kernel is not None]
    size = sum(array.size for array in values)
    zeros = sum(int((array == 0).sum()) for array in values)
    missing = max(0, 2 * size // 3 + 1 - zeros) if size else 0
    findings = list(search.findings())
    if search.image and not pointwise:
        findings.append(
            Finding("operator", None, "there is no 1x1 convolution, the only kind that has sparse kernels", _SEPARABLE)
        )
    if missing:
        findings.append(
            Finding(
                "sparsity",
                None,
                f"{zeros / size:.2%} of the {size:,} weights of 1x1 convolutions are zero; over two thirds must be",
                f"prune {missing:,} more of them; at 80 to 95 % it pays most",
            )
        )
    elif size and not any(o.kind == "DENSIFY" for o in graph.operators):
        findings.append(
            Finding(
                "encoding",
                None,
                "the zeros are stored as numbers, and XNNPACK looks for zeros only in files with sparse tensors",
                "export with encoding='sparse'",
            )
        )
    return Chain(pointwise, tuple(findings), size, missing)


class _Search:
    def __init__(self, graph: Graph):
        self.graph = graph
        self._consumers: dict[int, list[Operator]] = {}
        for operator in graph.computing:
            for tensor in operator.inputs:
                self._consumers.setdefault(tensor, []).append(operator)
        self.image = self._image_operators()

    def findings(self) -> list[Finding]:
        found = {id(o): Finding("operator", o, *why) for o in self.image if (why := self._judge(o)) is not None}
        joins = {id(o): id(o) not in found for o in self.image}
        breaks = [found[id(o)] for o in self.image if id(o) in found and self._matters(o, joins)]
        for operator in self.image:
            if joins[id(operator)] and any(
                t in self.graph.outputs and self._joining(t, joins) for t in operator.outputs
            ):
                why = "its output is also an output of the model", "compute that output from the end of the network"
                breaks.append(Finding("operator", operator, *why))
        if not self.image:
            return []
        if any(o.kind in _ENDS and joins[id(o)] for o in self.image):
            broken = {id(finding.operator) for finding in breaks}
            breaks += self._wrong_ends(joins, broken)
        else:
            why = "the chain has no end", "end the image part of the network in GlobalAveragePooling2D"
            breaks.append(Finding("operator", self.image[-1], *why))
        return [*self._dtypes(), *breaks]

    def _wrong_ends(self, joins: dict[int, bool], broken: set[int]) -> list[Finding]:
        """Where the chain ends in something else than a mean or plain values, which XNNPACK computes wrongly.

        Measured with LiteRT 2.1.2 on emulated aarch64: a tensor that leaves the chain with the axes of an image has
        wrong shapes or numbers, or the file does not load. A mean without these axes is right, and so is a reshape.
        """
        found = []
        for operator in (o for o in self.image if joins[id(o)]):
            (output,) = operator.outputs
            followers = self._followers(output)
            shape = self.graph.tensors[output].shape
            if len(shape) != 4 or any(joins.get(id(o), False) or id(o) in broken for o in followers):
                continue
            if operator.kind in _ENDS and output not in self.graph.outputs:
                wrong = [o for o in followers if o.kind not in ("RESHAPE", "SHAPE", "SQUEEZE")]
                found += [Finding("correctness", o, _WRONG_END, _PLAIN_END) for o in wrong]
            elif operator.kind != "DEPTH_TO_SPACE":
                found.append(Finding("correctness", operator, _WRONG_END, _PLAIN_END))
        return found

    def kernel_size(self, operator: Operator) -> tuple[int, int]:
        """Height and width of a convolution's kernel."""
        return self.graph.tensors[operator.inputs[1]].shape[1:3]  # type: ignore[return-value]

    def _image_operators(self) -> list[Operator]:
        """Operators on images, from the first convolution to where the last image is pooled.

        Paddings that convolutions take in are left out; squeezing for attention is inside, since an image follows.
        """
        reached: set[int] = set()
        after: list[Operator] = []
        for operator in self.graph.computing:
            if operator.kind in _CONVOLUTIONS or any(t in reached for t in operator.inputs):
                reached.update(operator.outputs)
                after.append(operator)
        image, leads_to_images = [], set[int]()
        for operator in reversed(after):
            if self._is_on_images(operator) or any(t in leads_to_images for t in operator.outputs):
                leads_to_images.update(self._computed(operator))
                image.append(operator)
        return [o for o in reversed(image) if not self._is_taken_in(o)]

    def _is_on_images(self, operator: Operator) -> bool:
        if all(self.graph.tensors[t].dtype in ("int32", "int64") for t in operator.outputs):
            return False  # It computes a shape.
        shapes = [self.graph.tensors[t].shape for t in (*self._computed(operator), *operator.outputs)]
        return any(len(shape) == 4 and max(shape[1:3]) > 1 for shape in shapes)

    def _computed(self, operator: Operator) -> list[int]:
        """The inputs that are no constants."""
        return [t for t in operator.inputs if t >= 0 and self.graph.constant(t) is None]

    def _followers(self, tensor: int) -> list[Operator]:
        """The operators that read a tensor; in the place of a padding the convolution that takes it in."""
        found = []
        for operator in self._consumers.get(tensor, []):
            found += self._consumers[operator.outputs[0]] if self._is_taken_in(operator) else [operator]
        return found

    def _joining(self, tensor: int, joins: dict[int, bool]) -> list[Operator]:
        return [o for o in self._followers(tensor) if joins.get(id(o), False)]

    def _matters(self, operator: Operator, joins: dict[int, bool]) -> bool:
        """Whether it is amid the chain: convolutions follow, or it shares a tensor with an operator that joins."""
        shares = any(self._joining(t, joins) for t in (*self._computed(operator), *operator.outputs))
        if operator.kind in _CONVOLUTIONS or shares:
            return True
        waiting, seen = list(operator.outputs), set()
        while waiting:
            for follower in self._followers(waiting.pop()):
                if follower.kind in _CONVOLUTIONS:
                    return True
                if id(follower) not in seen:
                    seen.add(id(follower))
                    waiting.extend(follower.outputs)
        return False

    def _dtypes(self) -> list[Finding]:
        """XNNPACK's sparse kernels compute in floats; weights may be stored as float16."""
        found: set[str] = set()
        for operator in (o for o in self.image if o.kind in _CONVOLUTIONS):
            tensors = [self.graph.tensors[t] for t in (operator.inputs[0], *operator.outputs)]
            found.update(t.dtype for t in (*tensors, self.graph.constant(operator.inputs[1])) if t is not None)
        wrong = sorted(found - {"float32", "float16"})
        if not wrong:
            return []
        reason = f"convolutions in {', '.join(wrong)}, and sparse ones compute in float32 or float16"
        return [Finding("dtype", None, reason, "export with dtype='float32' or 'float16'")]

    def _is_taken_in(self, operator: Operator) -> bool:
        """Whether a padding becomes the next convolution's own."""
        if operator.kind != "PAD" or operator.outputs[0] in self.graph.outputs:
            return False
        amounts = self.graph.constant(operator.inputs[1])
        followers = self._consumers.get(operator.outputs[0], [])
        if amounts is None or len(followers) != 1 or amounts.values.shape != (4, 2) or amounts.values[[0, 3]].any():
            return False
        (follower,) = followers
        return follower.kind in ("CONV_2D", "DEPTHWISE_CONV_2D") and not _pads_by_itself(follower)

    def _padding(self, operator: Operator) -> tuple[int, int, int, int] | None:
        """Top, bottom, left, right; `None` where it is left to the runtime."""
        total = np.zeros((2, 2), int)
        if operator.options["padding"] == _SAME:
            if _pads_by_itself(operator):
                return None
            reach = np.array(self.kernel_size(operator)) - 1
            total += np.stack([reach // 2, reach - reach // 2], axis=1)
        producer = self.graph.producers.get(operator.inputs[0])
        if producer is not None and self._is_taken_in(producer):
            amounts = self.graph.constant(producer.inputs[1])
            total += 0 if amounts is None else amounts.values[1:3]
        return tuple(total.ravel().tolist())

    def _judge(self, operator: Operator) -> tuple[str, str] | None:
        """Why an operator cannot join, and what to do about it; `None` if it can."""
        kind = operator.kind
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            return self._judge_convolution(operator)
        if kind == "MEAN":
            axes = self.graph.constant(operator.inputs[1])
            if axes is not None and sorted(axes.values.ravel().tolist()) == [1, 2]:
                return None
            return "a mean over other axes than height and width", "GlobalAveragePooling2D in its place"
        if kind in ("ADD", "MUL"):
            return self._judge_sum_or_product(operator)
        if kind == "RESIZE_BILINEAR":
            if min(self.graph.tensors[operator.inputs[0]].shape[1:3]) > 1:
                return None
            return "a single row or column is resized", "resize larger images"
        if kind == "DEPTH_TO_SPACE" or (kind in _UNARY and self._ranks(operator) == [4]):
            return None
        return _OTHERS.get(
            kind, (f"{kind} is not among the operators that join", "leave it out, or put it behind the end")
        )

    def _ranks(self, operator: Operator) -> list[int]:
        return [len(self.graph.tensors[t].shape) for t in operator.inputs]

    def _judge_convolution(self, operator: Operator) -> tuple[str, str] | None:
        options, size, stride = operator.options, self.kernel_size(operator), _stride(operator)
        channels = self.graph.tensors[operator.inputs[0]].shape[3]
        if self.graph.constant(operator.inputs[1]) is None:
            return "its kernel is computed", "a kernel that is a weight"
        if (options["dilationHFactor"], options["dilationWFactor"]) != (1, 1):
            return "it is dilated", "dilation_rate=1"
        if operator.kind == "DEPTHWISE_CONV_2D":
            return self._judge_depthwise(operator, channels)
        if self.graph.tensors[operator.inputs[1]].shape[3] != channels:
            return "it has groups", "groups=1, or a depthwise convolution"
        if size == (1, 1):
            if stride == (1, 1) and self._padding(operator) == (0, 0, 0, 0):
                return None if self._reads_the_chain(operator) else _NO_STEM
            return (
                f"a 1x1 convolution with strides {stride}",
                "strides=1, and a strided depthwise convolution before it",
            )
        if size != (3, 3):
            return f"a convolution of {size[0]}x{size[1]}; only 1x1 joins, and 3x3 as the stem", _SEPARABLE
        if channels != 3 or stride != (2, 2):
            found = f"this has strides {stride[0]} on {channels}"
            reason = f"a 3x3 convolution joins only as the stem, with strides 2 on 3 channels; {found}"
            return reason, f"a stem of 3x3, strides 2, on the image's 3 channels; elsewhere {_SEPARABLE}"
        if self._padding(operator) != (1, 1, 1, 1):
            return self._uneven(operator), _SYMMETRIC.format(1)
        return None

    def _judge_depthwise(self, operator: Operator, channels: int) -> tuple[str, str] | None:
        size, stride = self.kernel_size(operator), _stride(operator)
        if operator.options["depthMultiplier"] != 1 or self.graph.tensors[operator.inputs[1]].shape[3] != channels:
            return "its depth multiplier is not 1", "depth_multiplier=1, and a 1x1 convolution for more channels"
        if size not in ((3, 3), (5, 5)):
            return f"a depthwise convolution of {size[0]}x{size[1]}; 3x3 and 5x5 join", "a kernel of 3x3 or 5x5"
        if stride not in ((1, 1), (2, 2)):
            return f"its strides are {stride}", "strides 1 or 2"
        half = size[0] // 2
        if self._padding(operator) != (half,) * 4:
            return self._uneven(operator), _SYMMETRIC.format(half)
        return None if self._reads_the_chain(operator) else _NO_STEM

    def _uneven(self, operator: Operator) -> str:
        padding, half = self._padding(operator), self.kernel_size(operator)[0] // 2
        found = "'same' with strides 2" if padding is None else f"{padding} (top, bottom, left, right)"
        return f"its padding is {found}; it must be {half} on each side"

    def _reads_the_chain(self, operator: Operator) -> bool:
        """Whether its image comes from another image operator, and not straight from the model's inputs."""
        producer = self.graph.producers.get(operator.inputs[0])
        if producer is not None and self._is_taken_in(producer):
            producer = self.graph.producers.get(producer.inputs[0])
        return any(producer is before for before in self.image)

    def _judge_sum_or_product(self, operator: Operator) -> tuple[str, str] | None:
        shapes = [self.graph.tensors[t].shape for t in operator.inputs]
        constants = [self.graph.constant(t) is not None for t in operator.inputs]
        # XNNPACK judges a constant on the right by the shape of what it is combined with.
        if any(constants) and max(max(shape[1:3]) for shape in shapes if len(shape) == 4) > 1:
            fix = "fold it into the convolution before it, as BatchNormalization straight behind one is"
            return "a constant is combined with an image", fix
        if any(len(shape) != 4 for shape in shapes):
            what = "a constant" if any(constants) else "a tensor"
            ranks = " and ".join(str(len(shape)) for shape in shapes)
            fix = "give it four axes; make_ready does so" if any(constants) else "keep all four axes (keepdims=True)"
            return f"{what} without the four axes of an image (axes: {ranks})", fix
        return None


_NO_STEM = (
    "it reads an input of the model, and the chain starts with a stem",
    "a stem first: a 3x3 convolution, strides 2, on 3 channels, with padding 1 on each side",
)
_WRONG_END = "the chain would end here in a tensor with the axes of an image, which XNNPACK computes wrongly"
_PLAIN_END = (
    "GlobalAveragePooling2D(keepdims=False) before it, and Reshape behind that where need be; make_ready does so"
)
_MOBILE = "a strided depthwise convolution in its place"
_OTHERS = {
    "MAX_POOL_2D": ("max pooling does not join", _MOBILE),
    "AVERAGE_POOL_2D": ("average pooling does not join", f"GlobalAveragePooling2D at the end; elsewhere {_MOBILE}"),
    "CONCATENATION": ("concatenation does not join", "Add in its place"),
    "RESHAPE": (
        "reshaping does not join",
        "GlobalAveragePooling2D(keepdims=True) where it follows one; make_ready does so",
    ),
    "TRANSPOSE_CONV": ("a transposed convolution does not join", "bilinear UpSampling2D and separable convolutions"),
    "RESIZE_NEAREST_NEIGHBOR": ("nearest-neighbour resizing does not join", "interpolation='bilinear'"),
    "PRELU": ("PReLU does not join", "ReLU, LeakyReLU or hard swish"),
    "SUB": ("subtraction does not join", "Add"),
    "SPACE_TO_BATCH_ND": ("a dilated convolution does not join", "dilation_rate=1"),
    "BATCH_TO_SPACE_ND": ("a dilated convolution does not join", "dilation_rate=1"),
    "PAD": ("a padding that is not a convolution's own", "ZeroPadding2D straight before one 'valid' convolution"),
}


def _stride(operator: Operator) -> tuple[int, int]:
    return operator.options["strideH"], operator.options["strideW"]


def _pads_by_itself(operator: Operator) -> bool:
    """Whether the runtime chooses the padding: `same` with a stride. Without one it is made explicit."""
    return operator.options["padding"] == _SAME and _stride(operator) != (1, 1)
