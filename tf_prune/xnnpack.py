"""XNNPACK's rules for sparse convolutions, on the graph of a TF-Lite file: what joins, and what breaks the chain.

With the sparse encoding in a file, XNNPACK looks for a chain that starts with a 3x3 convolution of stride 2 on 3
channels, goes on with 1x1 and depthwise convolutions and elementwise operators, and ends in the mean over the image. It
computes the whole chain channels first and sparse, or none of it (`xnn_subgraph_rewrite_for_nchw` and
`xnn_check_nchw_compatibility` in XNNPACK's `subgraph.c`).
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from tf_prune.tflite import Graph, Operator

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")
_UNARY = (
    *("ABS", "CEIL", "COS", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOGISTIC", "NEG", "RELU"),
    *("RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "ROUND", "RSQRT", "SIN", "SQRT", "SQUARE", "TANH"),
)
_POOLING = ("MEAN", "SUM")
_ENDS = (*_POOLING, "DEPTH_TO_SPACE")
# XNNPACK does not take these, so that a part before them has no end of its own and stays dense (measured).
_NOT_TAKEN = (
    *("BATCH_TO_SPACE_ND", "EXPAND_DIMS", "LOG", "REDUCE_MAX", "RESIZE_NEAREST_NEIGHBOR", "SIGN", "SPACE_TO_BATCH_ND"),
    *("TILE",),
)
_SAME = 0
BY_MAKE_READY = "; make_ready does so"
_SYMMETRIC = "put ZeroPadding2D({}) before it and set its padding to 'valid'" + BY_MAKE_READY
_EVEN_SIZES = "an input size whose images are even before each stride, such as a multiple of 32"
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
        running: Those of them that run sparse, and rightly.
        findings: All that breaks it, in the order of the graph.
        num_weights: Of the 1x1 convolutions.
        zeros_missing: How many more of them must be zero, so that more than two thirds are.
        is_wrong: Whether XNNPACK takes sparse kernels, for the chain or a part of it, and computes wrong outputs.
    """

    pointwise: tuple[Operator, ...]
    running: tuple[Operator, ...]
    findings: tuple[Finding, ...]
    num_weights: int
    zeros_missing: int
    is_wrong: bool


def find_chain(graph: Graph) -> Chain:
    """Looks for the chain, and for everything that breaks it."""
    search = _Search(graph)
    pointwise = tuple(o for o in search.image if search.is_pointwise(o))
    findings = search.findings()
    encoded = any(o.kind == "DENSIFY" for o in graph.operators)
    sparse = search.sparse_parts() if encoded else []
    wrong = [o for part in sparse for operator in part for o in search.wrong_ends(operator)]
    known = {id(finding.operator) for finding in findings}
    findings += [Finding("correctness", o, _WRONG_PART, _WHOLE_CHAIN) for o in wrong if id(o) not in known]
    if search.image and not pointwise:
        findings.append(
            Finding("operator", None, "there is no 1x1 convolution, the only kind that has sparse kernels", _SEPARABLE)
        )
    # XNNPACK counts for each part by itself; where none is whole, for what the chain would be.
    missing = 0
    for part in search.whole_parts() or [list(pointwise)]:
        size, zeros = search.count(part)
        lacking = max(0, 2 * size // 3 + 1 - zeros) if size else 0
        missing += lacking
        if lacking:
            reason = f"{zeros / size:.2%} of the {size:,} weights of 1x1 convolutions are zero; over two thirds must be"
            fix = f"prune {lacking:,} more of them; at 80 to 95 % it pays most"
            findings.append(Finding("sparsity", None, reason, fix))
    if pointwise and not missing and not encoded:
        reason = "the zeros are stored as numbers, and XNNPACK looks for zeros only in files with sparse tensors"
        findings.append(Finding("encoding", None, reason, "export with encoding='sparse'"))
    running = () if wrong else tuple(o for part in sparse for o in part if search.is_pointwise(o))
    return Chain(pointwise, running, tuple(findings), search.count(pointwise)[0], missing, bool(wrong))


class _Search:
    def __init__(self, graph: Graph):
        self.graph = graph
        self._consumers: dict[int, list[Operator]] = {}
        for operator in graph.computing:
            for tensor in operator.inputs:
                self._consumers.setdefault(tensor, []).append(operator)
        self.image = self._image_operators()
        self._judged = {id(operator): self._judge(operator) for operator in self.image}
        # Operators that XNNPACK does not take split the graph into pieces, which it sees one by one.
        self._levels: dict[int, int] = {}
        for operator in graph.computing:
            before = (graph.producers.get(t) for t in operator.inputs)
            level = max((self._levels.get(id(o), 0) for o in before if o is not None), default=0)
            self._levels[id(operator)] = level + (operator.kind in _NOT_TAKEN)

    def findings(self) -> list[Finding]:
        """What breaks the chain whatever the weights are."""
        if not self.image:
            return []
        judged = [(o, self._judged[id(o)]) for o in self.image if self._breaks(o)]
        breaks = [Finding("operator", o, *why) for o, why in judged if why is not None]
        for operator in self.image:
            if self._joins(operator) and any(t in self.graph.outputs and self._joining(t) for t in operator.outputs):
                why = "its output is also an output of the model", "compute that output from the end of the network"
                breaks.append(Finding("operator", operator, *why))
        if not self._has_end():
            why = "the chain has no end", "end the image part of the network in GlobalAveragePooling2D"
            breaks.append(Finding("operator", self.image[-1], *why))
        else:
            for operator in (o for o in self.image if self._joins(o)):
                # Where an operator breaks the chain, that is what is to be changed.
                if not any(self._breaks(o) for t in operator.outputs for o in self._followers(t)):
                    why = (_WRONG_END, _PLAIN_END) if self._pools_rightly(operator) else _OTHER_AXES
                    breaks += [Finding("correctness", o, *why) for o in self.wrong_ends(operator)]
        return [*self._dtypes(), *breaks]

    def whole_parts(self) -> list[list[Operator]]:
        """The connected parts of what joins that have 1x1 convolutions, and that nothing cuts off."""
        return [
            part
            for part in self._parts()
            if any(map(self.is_pointwise, part)) and not any(self._is_cut_off(o) for o in part)
        ]

    def sparse_parts(self) -> list[list[Operator]]:
        """Those of which XNNPACK takes the sparse kernels, rightly or wrongly.

        It judges the parts between two breaks by themselves. One that begins with a stem, has the zeros and breaks off
        later is taken, too, if some part has an end, and hands on wrong numbers (measured with LiteRT 2.1.2).
        """
        if self._dtypes():
            return []
        ends = {self._levels[id(o)] for o in self.image if o.kind in _ENDS and self._joins(o)}
        found = []
        for part in self.whole_parts():
            size, zeros = self.count(part)
            if 3 * zeros > 2 * size and self._levels[id(part[0])] in ends:
                found.append(part)
        return found

    def is_pointwise(self, operator: Operator) -> bool:
        """Whether it is a 1x1 convolution."""
        return operator.kind == "CONV_2D" and self.kernel_size(operator) == (1, 1)

    def count(self, operators: Iterable[Operator]) -> tuple[int, int]:
        """How many weights the 1x1 kernels among them have, and how many are zero."""
        kernels = [self.graph.constant(o.inputs[1]) for o in operators if self.is_pointwise(o)]
        values = [kernel.values for kernel in kernels if kernel is not None]
        return sum(array.size for array in values), sum(int((array == 0).sum()) for array in values)

    def _joins(self, operator: Operator) -> bool:
        return id(operator) in self._judged and self._judged[id(operator)] is None

    def _breaks(self, operator: Operator) -> bool:
        return self._judged.get(id(operator)) is not None and self._matters(operator)

    def _has_end(self) -> bool:
        return any(o.kind in _ENDS and self._joins(o) for o in self.image)

    def _is_stem(self, operator: Operator) -> bool:
        return operator.kind == "CONV_2D" and not self.is_pointwise(operator)

    def _parts(self) -> list[list[Operator]]:
        """The operators that join, in connected parts."""
        parts: dict[int, list[Operator]] = {}
        for operator in (o for o in self.image if self._joins(o)):
            part = [operator]
            if not self._is_stem(operator):
                for before in filter(None, map(self._before, self._computed(operator))):
                    if id(before) in parts and parts[id(before)] is not part:
                        part = [*parts[id(before)], *part]
                        parts.update((id(member), part) for member in part)
            parts.update((id(member), part) for member in part)
        return list({id(part): part for part in parts.values()}.values())

    def _is_cut_off(self, operator: Operator) -> bool:
        """Whether an operator reads what is not of the chain, or what others read, too."""
        if self._is_stem(operator):
            return False
        for tensor in self._computed(operator):
            before = self._before(tensor)
            if before is None or not self._joins(before):
                return True
            source = before.outputs[0]
            if source in self.graph.outputs or len(self._joining(source)) < len(self._followers(source)):
                return True
        return False

    def wrong_ends(self, operator: Operator) -> list[Operator]:
        """Where the chain ends in something else than a mean or plain values, which XNNPACK computes wrongly.

        Measured with LiteRT 2.1.2 on emulated aarch64: a tensor that leaves the chain with the axes of an image has
        wrong shapes or numbers, or the file does not load. A mean without these axes is right, and so is a reshape.
        """
        (output,) = operator.outputs
        if not self._pools_rightly(operator):
            return [operator]
        if len(self.graph.tensors[output].shape) != 4 or self._joining(output) or operator.kind == "DEPTH_TO_SPACE":
            return []
        if operator.kind in _POOLING and output not in self.graph.outputs:
            return [o for o in self._followers(output) if o.kind not in ("RESHAPE", "SHAPE", "SQUEEZE")]
        return [operator]

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
        if operator.kind in _ENDS and len(self.graph.tensors[operator.inputs[0]].shape) == 4:
            return True  # It pools an image, even if there is one pixel left.
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

    def _before(self, tensor: int) -> Operator | None:
        """The operator that a tensor comes from; of a padding that a convolution takes in, the one before it."""
        producer = self.graph.producers.get(tensor)
        if producer is not None and self._is_taken_in(producer):
            return self.graph.producers.get(producer.inputs[0])
        return producer

    def _joining(self, tensor: int) -> list[Operator]:
        """Who reads a tensor within the chain; a stem reads from outside."""
        return [o for o in self._followers(tensor) if self._joins(o) and not self._is_stem(o)]

    def _matters(self, operator: Operator) -> bool:
        """Whether it is amid the chain: convolutions follow, or it shares a tensor with an operator that joins."""
        shares = any(self._joining(t) for t in (*self._computed(operator), *operator.outputs))
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
        if kind in _POOLING and self._ranks(operator)[0] == 4:
            return None  # XNNPACK takes it whatever its axes are, and is wrong with others than height and width.
        if kind in ("ADD", "MUL"):
            return self._judge_sum_or_product(operator)
        if kind == "RESIZE_BILINEAR":
            if min(self.graph.tensors[operator.inputs[0]].shape[1:3]) > 1:
                return None
            return "a single row or column is resized", "resize larger images"
        if kind in ("MINIMUM", "MAXIMUM") and any(self.graph.constant(t) is not None for t in operator.inputs):
            return None  # It clips.
        if kind == "DEPTH_TO_SPACE" or (kind in _UNARY and self._ranks(operator) == [4]):
            return None
        return _OTHERS.get(
            kind, (f"{kind} is not among the operators that join", "leave it out, or put it behind the end")
        )

    def _pools_rightly(self, operator: Operator) -> bool:
        if operator.kind not in _POOLING:
            return True
        axes = self.graph.constant(operator.inputs[1])
        return axes is not None and sorted((axes.values.ravel() % 4).tolist()) == [1, 2]

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
            return self._uneven(operator)
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
            return self._uneven(operator)
        return None if self._reads_the_chain(operator) else _NO_STEM

    def _uneven(self, operator: Operator) -> tuple[str, str]:
        padding, half = self._padding(operator), self.kernel_size(operator)[0] // 2
        height, width = self.graph.tensors[operator.inputs[0]].shape[1:3]
        if padding is None and (height % 2 or width % 2):
            return f"strides 2 on an image of odd size, {height}x{width}, are always written as 'same'", _EVEN_SIZES
        found = "'same' with strides 2" if padding is None else f"{padding} (top, bottom, left, right)"
        return f"its padding is {found}; it must be {half} on each side", _SYMMETRIC.format(half)

    def _reads_the_chain(self, operator: Operator) -> bool:
        """Whether its image comes from another image operator, and not straight from the model's inputs."""
        before = self._before(operator.inputs[0])
        return any(before is other for other in self.image)

    def _judge_sum_or_product(self, operator: Operator) -> tuple[str, str] | None:
        if operator.kind == "ADD" and operator.inputs[0] == operator.inputs[1]:
            return "a tensor is added to itself", "multiply it by 2 in the convolution before it"
        shapes = [self.graph.tensors[t].shape for t in operator.inputs]
        constants = [self.graph.constant(t) is not None for t in operator.inputs]
        # XNNPACK judges a constant on the right by the shape of what it is combined with.
        if any(constants) and max(max(shape[1:3]) for shape in shapes if len(shape) == 4) > 1:
            fix = "fold it into the convolution before it, as BatchNormalization straight behind one is"
            return "a constant is combined with an image", fix
        if any(len(shape) != 4 for shape in shapes):
            what = "a constant" if any(constants) else "a tensor"
            ranks = " and ".join(str(len(shape)) for shape in shapes)
            fix = "give it four axes" + BY_MAKE_READY if any(constants) else "keep all four axes (keepdims=True)"
            return f"{what} without the four axes of an image (axes: {ranks})", fix
        return None


_NO_STEM = (
    "it reads an input of the model, and the chain starts with a stem",
    "a stem first: a 3x3 convolution, strides 2, on 3 channels, with padding 1 on each side",
)
_WRONG_PART = "XNNPACK runs the part of the chain up to here sparse, and hands on wrong numbers"
_WHOLE_CHAIN = "mend what is in the way behind it, or export with encoding='dense'"
_WRONG_END = "the chain would end here in a tensor with the axes of an image, which XNNPACK computes wrongly"
_PLAIN_END = "GlobalAveragePooling2D(keepdims=False) before it, and Reshape behind that where need be" + BY_MAKE_READY
_OTHER_AXES = (
    "it pools other axes than height and width; XNNPACK does not load the sparse file, or computes wrongly",
    "GlobalAveragePooling2D in its place",
)
_MOBILE = "a strided depthwise convolution in its place"
_OTHERS = {
    "MAX_POOL_2D": ("max pooling does not join", _MOBILE),
    "AVERAGE_POOL_2D": ("average pooling does not join", f"GlobalAveragePooling2D at the end; elsewhere {_MOBILE}"),
    "CONCATENATION": ("concatenation does not join", "Add in its place"),
    "RESHAPE": (
        "reshaping does not join",
        "GlobalAveragePooling2D(keepdims=True) where it follows one" + BY_MAKE_READY,
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
