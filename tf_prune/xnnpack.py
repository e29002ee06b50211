"""XNNPACK's rules for sparse convolutions, on the graph of a TF-Lite file: what joins, and what breaks the chain.

With the sparse encoding in a file, XNNPACK looks for a chain that starts with a 3x3 convolution of stride 2 on 3
channels, goes on with 1x1 and depthwise convolutions and elementwise operators, and ends in the mean over the image. It
computes the whole chain channels first and sparse, or none of it (`xnn_subgraph_rewrite_for_nchw` and
`xnn_check_nchw_compatibility` in XNNPACK's `subgraph.c`).
"""

import collections
import dataclasses
from collections.abc import Iterable

from tf_prune.tflite_graph import Graph, Operator
from tf_prune.xnnpack_operators import BY_MAKE_READY, CONVOLUTIONS, ENDS, POOLING, SEPARABLE, ImageOperators

# XNNPACK does not take these, so that a part before them has no end of its own and stays dense (measured).
_NOT_TAKEN = (
    *("BATCH_TO_SPACE_ND", "EXPAND_DIMS", "LOG", "REDUCE_MAX", "RESIZE_NEAREST_NEIGHBOR", "SIGN", "SPACE_TO_BATCH_ND"),
    *("TILE",),
)
_WRONG_PART = "XNNPACK runs the part of the chain up to here sparse, and hands on wrong numbers"
_WHOLE_CHAIN = "mend what is in the way behind it, or export with encoding='dense'"
_WRONG_END = "the chain would end here in a tensor with the axes of an image, which XNNPACK computes wrongly"
_PLAIN_END = "GlobalAveragePooling2D(keepdims=False) before it, and Reshape behind that where need be" + BY_MAKE_READY
_OTHER_AXES = (
    "it pools other axes than height and width; XNNPACK does not load the sparse file, or computes wrongly",
    "GlobalAveragePooling2D in its place",
)


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
            Finding("operator", None, "there is no 1x1 convolution, the only kind that has sparse kernels", SEPARABLE)
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


class _Search(ImageOperators):
    def __init__(self, graph: Graph):
        super().__init__(graph)
        self._judged = {id(operator): self.judge(operator) for operator in self.image}
        self._readers: dict[int, list[Operator]] = {}
        # The tensors that convolutions depend on.
        self._before_convolutions: set[int] = set()
        for operator in reversed(graph.computing):
            if operator.kind in CONVOLUTIONS or not self._before_convolutions.isdisjoint(operator.outputs):
                self._before_convolutions.update(operator.inputs)
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
            if self._joins(operator) and any(t in self.outputs and self._joining(t) for t in operator.outputs):
                why = "its output is also an output of the model", "compute that output from the end of the network"
                breaks.append(Finding("operator", operator, *why))
        if not self._has_end():
            why = "the chain has no end", "end the image part of the network in GlobalAveragePooling2D"
            breaks.append(Finding("operator", self.image[-1], *why))
        else:
            for operator in (o for o in self.image if self._joins(o)):
                # Where an operator breaks the chain, that is what is to be changed.
                if not any(self._breaks(o) for t in operator.outputs for o in self.followers(t)):
                    why = (_WRONG_END, _PLAIN_END) if self.pools_rightly(operator) else _OTHER_AXES
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
        ends = {self._levels[id(o)] for o in self.image if o.kind in ENDS and self._joins(o)}
        found = []
        for part in self.whole_parts():
            size, zeros = self.count(part)
            if 3 * zeros > 2 * size and self._levels[id(part[0])] in ends:
                found.append(part)
        return found

    def count(self, operators: Iterable[Operator]) -> tuple[int, int]:
        """How many weights the 1x1 kernels among them have, and how many are zero."""
        kernels = [self.graph.constant(o.inputs[1]) for o in operators if self.is_pointwise(o)]
        found = [kernel for kernel in kernels if kernel is not None]
        return sum(kernel.values.size for kernel in found), sum(kernel.num_zeros for kernel in found)

    def _joins(self, operator: Operator) -> bool:
        return id(operator) in self._judged and self._judged[id(operator)] is None

    def _breaks(self, operator: Operator) -> bool:
        return self._judged.get(id(operator)) is not None and self._matters(operator)

    def _has_end(self) -> bool:
        return any(o.kind in ENDS and self._joins(o) for o in self.image)

    def _is_stem(self, operator: Operator) -> bool:
        return operator.kind == "CONV_2D" and not self.is_pointwise(operator)

    def _parts(self) -> list[list[Operator]]:
        """The operators that join, in connected parts."""
        parts: dict[int, collections.deque[Operator]] = {}
        for operator in (o for o in self.image if self._joins(o)):
            part = parts[id(operator)] = collections.deque([operator])
            if self._is_stem(operator):
                continue
            for before in filter(None, map(self.before, self.computed(operator))):
                other = parts.get(id(before), part)
                if other is part:
                    continue
                # The smaller one joins the larger, or a deep network would take quadratic time.
                if len(part) <= len(other):
                    parts.update((id(member), other) for member in part)
                    other.extend(part)
                    part = other
                else:
                    parts.update((id(member), part) for member in other)
                    part.extendleft(reversed(other))
        return list({id(part): list(part) for part in parts.values()}.values())

    def _is_cut_off(self, operator: Operator) -> bool:
        """Whether an operator reads what is not of the chain, or what others read, too."""
        if self._is_stem(operator):
            return False
        for tensor in self.computed(operator):
            before = self.before(tensor)
            if before is None or not self._joins(before):
                return True
            source = before.outputs[0]
            if source in self.outputs or len(self._joining(source)) < len(self.followers(source)):
                return True
        return False

    def wrong_ends(self, operator: Operator) -> list[Operator]:
        """Where the chain ends in something else than a mean or plain values, which XNNPACK computes wrongly.

        Measured with LiteRT 2.1.2 on emulated aarch64: a tensor that leaves the chain with the axes of an image has
        wrong shapes or numbers, or the file does not load. A mean without these axes is right, and so is a reshape.
        """
        (output,) = operator.outputs
        if not self.pools_rightly(operator):
            return [operator]
        if len(self.graph.tensors[output].shape) != 4 or self._joining(output) or operator.kind == "DEPTH_TO_SPACE":
            return []
        if operator.kind in POOLING and output not in self.outputs:
            return [o for o in self.followers(output) if o.kind not in ("RESHAPE", "SHAPE", "SQUEEZE")]
        return [operator]

    def _joining(self, tensor: int) -> list[Operator]:
        """Who reads a tensor within the chain; a stem reads from outside."""
        if tensor not in self._readers:
            self._readers[tensor] = [o for o in self.followers(tensor) if self._joins(o) and not self._is_stem(o)]
        return self._readers[tensor]

    def _matters(self, operator: Operator) -> bool:
        """Whether it is amid the chain: convolutions follow, or it shares a tensor with an operator that joins."""
        shares = any(self._joining(t) for t in (*self.computed(operator), *operator.outputs))
        follow = not self._before_convolutions.isdisjoint(operator.outputs)
        return operator.kind in CONVOLUTIONS or shares or follow

    def _dtypes(self) -> list[Finding]:
        """XNNPACK's sparse kernels compute in floats; weights may be stored as float16."""
        found: set[str] = set()
        for operator in (o for o in self.image if o.kind in CONVOLUTIONS):
            tensors = [self.graph.tensors[t] for t in (operator.inputs[0], *operator.outputs)]
            found.update(t.dtype for t in (*tensors, self.graph.constant(operator.inputs[1])) if t is not None)
        wrong = sorted(found - {"float32", "float16"})
        if not wrong:
            return []
        reason = f"convolutions in {', '.join(wrong)}, and sparse ones compute in float32 or float16"
        return [Finding("dtype", None, reason, "export with dtype='float32' or 'float16'")]
