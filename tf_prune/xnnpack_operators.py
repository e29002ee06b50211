"""Which operators of a TF-Lite file XNNPACK's sparse chain takes, each by itself: why not, and what to do about it.

The rules are those of `xnn_check_nchw_compatibility` in XNNPACK's `subgraph.c`, after paddings were merged into
convolutions.
"""

import numpy as np

from tf_prune.tflite_graph import UNARY, Graph, Operator

CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")
POOLING = ("MEAN", "SUM")
ENDS = (*POOLING, "DEPTH_TO_SPACE")
_SAME = 0
BY_MAKE_READY = "; make_ready does so"
_SYMMETRIC = "put ZeroPadding2D({}) before it and set its padding to 'valid'" + BY_MAKE_READY
_EVEN_SIZES = "an input size whose images are even before each stride, such as a multiple of 32"
SEPARABLE = "a depthwise 3x3 or 5x5 convolution followed by a 1x1 convolution in its place"


class ImageOperators:
    """The operators of a graph that work on images, with what each of them lacks.

    Attributes:
        graph: The file's.
        outputs: Its tensors that are outputs of the graph.
        image: From the first convolution to where the last image is pooled.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.outputs = frozenset(graph.outputs)
        self._followers: dict[int, list[Operator]] = {}
        self._consumers: dict[int, list[Operator]] = {}
        for operator in graph.computing:
            for tensor in operator.inputs:
                self._consumers.setdefault(tensor, []).append(operator)
        self.image = self._image_operators()
        self._in_image = {id(operator) for operator in self.image}

    def is_pointwise(self, operator: Operator) -> bool:
        """Whether it is a 1x1 convolution."""
        return operator.kind == "CONV_2D" and self.kernel_size(operator) == (1, 1)

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
            if operator.kind in CONVOLUTIONS or any(t in reached for t in operator.inputs):
                reached.update(operator.outputs)
                after.append(operator)
        image, leads_to_images = [], set[int]()
        for operator in reversed(after):
            if self._is_on_images(operator) or any(t in leads_to_images for t in operator.outputs):
                leads_to_images.update(self.computed(operator))
                image.append(operator)
        return [o for o in reversed(image) if not self._is_taken_in(o)]

    def _is_on_images(self, operator: Operator) -> bool:
        if all(self.graph.tensors[t].dtype in ("int32", "int64") for t in operator.outputs):
            return False  # It computes a shape.
        if operator.kind in ENDS and len(self.graph.tensors[operator.inputs[0]].shape) == 4:
            return True  # It pools an image, even if there is one pixel left.
        shapes = [self.graph.tensors[t].shape for t in (*self.computed(operator), *operator.outputs)]
        return any(len(shape) == 4 and max(shape[1:3]) > 1 for shape in shapes)

    def computed(self, operator: Operator) -> list[int]:
        """The inputs that are no constants."""
        return [t for t in operator.inputs if t >= 0 and self.graph.constant(t) is None]

    def followers(self, tensor: int) -> list[Operator]:
        """The operators that read a tensor; in the place of a padding the convolution that takes it in."""
        if tensor not in self._followers:
            found = self._followers[tensor] = []
            for operator in self._consumers.get(tensor, []):
                found += self._consumers[operator.outputs[0]] if self._is_taken_in(operator) else [operator]
        return self._followers[tensor]

    def before(self, tensor: int) -> Operator | None:
        """The operator that a tensor comes from; of a padding that a convolution takes in, the one before it."""
        producer = self.graph.producers.get(tensor)
        if producer is not None and self._is_taken_in(producer):
            return self.graph.producers.get(producer.inputs[0])
        return producer

    def _is_taken_in(self, operator: Operator) -> bool:
        """Whether a padding becomes the next convolution's own."""
        if operator.kind != "PAD" or operator.outputs[0] in self.outputs:
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

    def judge(self, operator: Operator) -> tuple[str, str] | None:
        """Why an operator cannot join, and what to do about it; `None` if it can."""
        kind = operator.kind
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            return self._judge_convolution(operator)
        if kind in POOLING and self._ranks(operator)[0] == 4:
            return None  # XNNPACK takes it whatever its axes are, and is wrong with others than height and width.
        if kind in ("ADD", "MUL"):
            return self._judge_sum_or_product(operator)
        if kind == "RESIZE_BILINEAR":
            if min(self.graph.tensors[operator.inputs[0]].shape[1:3]) > 1:
                return None
            return "a single row or column is resized", "resize larger images"
        if kind in ("MINIMUM", "MAXIMUM") and any(self.graph.constant(t) is not None for t in operator.inputs):
            return None  # It clips.
        if kind == "DEPTH_TO_SPACE" or (kind in UNARY and self._ranks(operator) == [4]):
            return None
        return _OTHERS.get(
            kind, (f"{kind} is not among the operators that join", "leave it out, or put it behind the end")
        )

    def pools_rightly(self, operator: Operator) -> bool:
        """Whether what pools images does it over height and width."""
        if operator.kind not in POOLING:
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
            return f"a convolution of {size[0]}x{size[1]}; only 1x1 joins, and 3x3 as the stem", SEPARABLE
        if channels != 3 or stride != (2, 2):
            found = f"this has strides {stride[0]} on {channels}"
            reason = f"a 3x3 convolution joins only as the stem, with strides 2 on 3 channels; {found}"
            return reason, f"a stem of 3x3, strides 2, on the image's 3 channels; elsewhere {SEPARABLE}"
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
        before = self.before(operator.inputs[0])
        return id(before) in self._in_image

    def _judge_sum_or_product(self, operator: Operator) -> tuple[str, str] | None:
        if operator.kind == "ADD" and operator.inputs[0] == operator.inputs[1]:
            return "a tensor is added to itself", "multiply it by 2 in the convolution before it"
        shapes = [self.graph.tensors[t].shape for t in operator.inputs]
        constants = [self.graph.constant(t) is not None for t in operator.inputs]
        # XNNPACK judges a constant on the right by the shape of what it is combined with.
        if any(constants) and max((max(shape[1:3]) for shape in shapes if len(shape) == 4), default=1) > 1:
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
