import itertools
import math
import time

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st

import tf_prune
from benchmarks import damaged_files
from tf_prune import tflite, zeros

CODES = ("CONV_2D", "DENSIFY", "DEQUANTIZE", "RELU", "FULLY_CONNECTED", "MEAN", "ADD")
KERNELS = {"kernel": np.ones((4, 4), np.float32)}


@pytest.fixture(scope="module")
def files():
    return damaged_files.tflite_files(("float32, sparse", "recurrent"))


def filled(table, **fields):
    for name, value in fields.items():
        setattr(table, name, value)
    return table


def tensor(shape, name=b"tensor", buffer=0, dtype=0, sparsity=None):
    return filled(schema.TensorT(), shape=shape, name=name, buffer=buffer, type=dtype, sparsity=sparsity)


def operator(code, inputs, outputs):
    made = filled(schema.OperatorT(), opcodeIndex=code, inputs=inputs, outputs=outputs)
    if code == 0:
        made.builtinOptionsType = schema.BuiltinOptions.Conv2DOptions
        made.builtinOptions = filled(schema.Conv2DOptionsT(), strideH=1, strideW=1)
    return made


def packed(model):
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def network(tensors=(), operators=None, outputs=(3,), buffers=()):
    """A 1x1 convolution of 4 to 4 channels: image, kernel and bias, output; what is given comes behind."""
    numbers = [getattr(schema.BuiltinOperator, name) for name in CODES]
    codes = [filled(schema.OperatorCodeT(), builtinCode=n, deprecatedBuiltinCode=n) for n in numbers]
    own = [np.ones(16, np.float32), np.zeros(4, np.float32), *buffers]
    return filled(
        schema.ModelT(),
        version=3,
        operatorCodes=codes,
        buffers=[filled(schema.BufferT(), data=d if d is None else d.view(np.uint8)) for d in (None, *own)],
        subgraphs=[
            filled(
                schema.SubGraphT(),
                tensors=[
                    *(tensor([1, 8, 8, 4]), tensor([4, 1, 1, 4], b"kernel", 1), tensor([4], b"bias", 2)),
                    *(tensor([1, 8, 8, 4], b"output"), *tensors),
                ],
                operators=[operator(0, [0, 1, 2], [3])] if operators is None else operators,
                inputs=[0],
                outputs=list(outputs),
            )
        ],
    )


def level(size=None, segments=None, indices=None):
    if segments is None:
        return filled(schema.DimensionMetadataT(), format=0, denseSize=size)
    vectors = [filled(schema.Int32VectorT(), values=np.array(v, np.int32)) for v in (segments, indices)]
    return filled(
        schema.DimensionMetadataT(),
        format=1,
        arraySegmentsType=schema.SparseIndexVector.Int32Vector,
        arraySegments=vectors[0],
        arrayIndicesType=schema.SparseIndexVector.Int32Vector,
        arrayIndices=vectors[1],
    )


def sparse(levels, order=(0, 1), blocks=()):
    return filled(schema.SparsityParametersT(), traversalOrder=list(order), blockMap=list(blocks), dimMetadata=levels)


def with_sparse(shape, values, sparsity):
    return network([tensor(shape, b"sparse", 3, 0, sparsity)], buffers=[np.array(values, np.float32)])


def ask_everything(content):
    """Whether it is read; whatever asks must agree, in a second of computing each."""
    asked = [tflite.read, tflite.constants, lambda c: zeros.zeros_in_file(KERNELS, c)]
    asked += [lambda c, target=target: str(tf_prune.explain(c, target)) for target in tf_prune.TARGETS]
    found = set()
    for ask in asked:
        start = time.process_time()
        try:
            ask(content)
            found.add("read")
        except ValueError as error:
            found.add(str(error))
        assert time.process_time() - start < 1
    assert len(found) == 1, found
    return found.pop()


def test_a_network_made_by_hand_is_read():
    content = packed(network())
    assert ask_everything(content) == "read"
    (graph,) = tflite.read(content)
    assert [t.encoding for t in graph.tensors] == [None, "dense", "dense", None]
    assert (graph.inputs, graph.outputs, graph.operators[0].inputs) == ((0,), (3,), (0, 1, 2))
    assert graph.operators[0].options["strideH"] == 1


def changed(path, value):
    """A change of one field, by the names of the way to it."""

    def change(model):
        *way, last = path.split(".")
        table = model
        for step in way:
            table = table[int(step)] if step.isdigit() else getattr(table, step)
        if last.isdigit():
            table[int(last)] = value
        else:
            setattr(table, last, value)
        return model

    return change


G = "subgraphs.0"
HOSTILE = {
    "unpacks its own output": (
        lambda _: network([tensor([4])], [operator(2, [4], [4]), operator(0, [0, 1, 2], [3])]),
        r"operator 0, DEQUANTIZE: it reads what it, or an operator behind it, computes",
    ),
    "a circle of two": (
        lambda _: network([tensor([4]), tensor([4])], [operator(2, [4], [5]), operator(1, [5], [4])]),
        r"it reads what it, or an operator behind it",
    ),
    "computed twice": (
        lambda _: network(operators=[operator(0, [0, 1, 2], [3]), operator(3, [0], [3])]),
        r"it writes what another operator has computed",
    ),
    "a constant written": (lambda _: network(operators=[operator(3, [0], [1])]), r"it writes into a constant"),
    "no such input": (changed(f"{G}.operators.0.inputs.0", 99), r"tensors that are not among the 4 of its graph"),
    "no such output": (changed(f"{G}.operators.0.outputs.0", -1), r"tensors that are not among the 4"),
    "no input": (changed(f"{G}.operators.0.inputs", None), r"it has 0 inputs and 1 outputs; expected 2 and 1"),
    "no output": (changed(f"{G}.operators.0.outputs", None), r"it has 3 inputs and 0 outputs"),
    "a kernel left out": (changed(f"{G}.operators.0.inputs", [0, -1, 2]), r"expected 2 and 1"),
    "no such graph output": (changed(f"{G}.outputs.0", 4), r"begin or end in number 4"),
    "no such opcode": (changed(f"{G}.operators.0.opcodeIndex", 2**32 - 1), r"is of kind 4,294,967,295 of 7"),
    "unknown opcode": (changed("operatorCodes.0.builtinCode", 9999), r"no operator with the code 9999"),
    "custom without a name": (changed("operatorCodes.0.builtinCode", 32), r"a custom operator has no name"),
    "no options": (changed(f"{G}.operators.0.builtinOptionsType", 2), r"has no options, or those of another"),
    "no such buffer": (changed(f"{G}.tensors.1.buffer", 77), r"buffer 77 of 3"),
    "unknown type": (changed(f"{G}.tensors.0.type", 99), r"of the unknown type 99"),
    "negative shape": (changed(f"{G}.tensors.0.shape", [1, -8, 8, 4]), r"has the shape \[1, -8, 8, 4\]"),
    "huge shape": (changed(f"{G}.tensors.0.shape", [2**31 - 1] * 4), r"has the shape"),
    "thousands of axes": (changed(f"{G}.tensors.0.shape", [2**31 - 1] * 50_000), r"has the shape"),
    "another size": (changed(f"{G}.tensors.1.shape", [4, 1, 1, 5]), r"stored in 64 bytes; its shape .* needs 80"),
    "three axes": (changed(f"{G}.tensors.0.shape", [8, 8, 4]), r"input 0 has the shape \[8, 8, 4\]; expected four"),
    "not UTF-8": (changed(f"{G}.tensors.0.name", b"\xff\xfe"), r"utf-8"),
    "a kernel without axes": (
        lambda _: network([tensor([])], [operator(4, [0, 4], [3])]),
        r"its kernel has the shape \[\]",
    ),
    "a kernel without weights": (
        lambda _: network([tensor([0, 4])], [operator(4, [0, 4], [3])]),
        r"its kernel has the shape \[0, 4\]",
    ),
    "axes that are no integers": (
        lambda _: network(operators=[operator(5, [0, 2], [3])]),
        r"its axes or amounts are float32; expected integers",
    ),
    "a sum of one": (lambda _: network(operators=[operator(6, [0], [3])]), r"ADD: it has 1 inputs and 1 outputs"),
    "no graph": (changed("subgraphs", []), r"it has no graph"),
    "missing graphs": (changed("subgraphs", None), r"it has no graph"),
    "missing buffers": (changed("buffers", None), r"of 0"),
    "missing codes": (changed("operatorCodes", None), r"is of kind 0 of 0"),
    "too large to decode": (
        lambda _: with_sparse([2**15, 2**15], [], sparse([level(2**15), level(0, [0] * (2**15 + 1), [])])),
        r"its constants would take 4,294,967,\d+ bytes",
    ),
    "levels without end": (
        lambda _: with_sparse([2**30, 2**30], [], sparse([level(2**30), level(2**30)])),
        r"has the shape|needs",
    ),
    "order": (lambda _: with_sparse([2, 2], [1], sparse([level(2), level(2)], (0, 7))), r"its 2 levels are not those"),
    "twice one axis": (lambda _: with_sparse([2, 2], [1], sparse([level(2), level(2)], (0, 0))), r"its 2 levels"),
    "no levels": (lambda _: with_sparse([2, 2], [1], sparse(None)), r"its 0 levels"),
    "another dense size": (lambda _: with_sparse([2, 2], [1] * 6, sparse([level(3), level(2)])), r"has 3 places"),
    "negative size": (lambda _: with_sparse([2, 2], [1], sparse([level(-2), level(-2)])), r"has -2 places"),
    "segments fall": (
        lambda _: with_sparse([2, 4], [1, 1], sparse([level(2), level(0, [0, 3, 2], [0, 1])])),
        r"its 3 segments are not those of 2 rows",
    ),
    "too few segments": (
        lambda _: with_sparse([2, 4], [1, 1], sparse([level(2), level(0, [0, 2], [0, 1])])),
        r"its 2 segments are not those of 2 rows",
    ),
    "index outside": (
        lambda _: with_sparse([2, 4], [1, 1], sparse([level(2), level(0, [0, 1, 2], [0, 4])])),
        r"an index is not between 0 and 4",
    ),
    "index twice": (
        lambda _: with_sparse([2, 4], [1, 1], sparse([level(2), level(0, [0, 2, 2], [1, 1])])),
        r"do not rise",
    ),
    "no indices": (
        lambda _: with_sparse([2, 4], [1], sparse([level(2), filled(schema.DimensionMetadataT(), format=1)])),
        r"has no segments or no indices",
    ),
    "too few numbers": (
        lambda _: with_sparse([2, 4], [1], sparse([level(2), level(0, [0, 1, 2], [0, 3])])),
        r"stored in 4 bytes; its shape \[2, 4\] needs 8",
    ),
    "block along no axis": (
        lambda _: with_sparse([2, 4], [1], sparse([level(2), level(2), level(2)], (0, 1, 2), [5])),
        r"do not lie along one axis each",
    ),
    "blocks that do not fit": (
        lambda _: with_sparse([2, 4], [1], sparse([level(2), level(2), level(3)], (0, 1, 2), [1])),
        r"do not fill the shape",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_words(name):
    change, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message) as caught:
        tflite.read(content := packed(change(network())))
    assert "Copy or convert it again." in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert ask_everything(content) == str(caught.value)


def test_graphs_that_are_called_must_be_there(files):
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(files["recurrent"], 0))
    (loop,) = [o for o in model.subgraphs[0].operators if isinstance(o.builtinOptions, schema.WhileOptionsT)]
    assert ask_everything(packed(model)) == "read"
    assert len(tflite.read(files["recurrent"])) == 3
    loop.builtinOptions.bodySubgraphIndex = 3
    with pytest.raises(ValueError, match="it calls graph 3 of 3"):
        tflite.read(packed(model))


class Shared:
    """A table that is packed once, however many refer to it."""

    def __init__(self, table):
        self.table, self.offset = table, None

    def Pack(self, builder):
        self.offset = self.offset or self.table.Pack(builder)
        return self.offset


@pytest.mark.parametrize("shared", ["graphs", "operators", "tensors"])
def test_many_that_refer_to_one_large_part_are_refused(shared):
    model = network(operators=[operator(0, [0, 1, 2], [3])] * 2000)
    (graph,) = model.subgraphs
    if shared == "graphs":
        model.subgraphs = [Shared(graph)] * 2000
    elif shared == "operators":
        graph.operators = [Shared(operator(0, [0, 1, 2] * 2000, [3]))] * 2000
    else:
        graph.tensors = [Shared(tensor([1], b"n" * 5000))] * 2000
    content = packed(model)
    assert len(content) < 300_000
    assert "many refer to the same bytes" in ask_everything(content)


@pytest.mark.parametrize("name", ["float32, sparse", "recurrent"])
def test_damaged_files_are_refused_or_read_as_the_schema_reads_them(files, name):
    assert damaged_files.reads_rightly(files[name], "arm64", KERNELS)
    results = [
        damaged_files.reads_rightly(content, tf_prune.TARGETS[i % 5], KERNELS)
        for i, (_, _, content) in enumerate(damaged_files.damaged([files[name]], 120, seed=1))
    ]
    assert 0 < sum(results) < 120


@given(st.binary(max_size=200), st.integers(0, 200))
def test_anything_else_is_refused(content, root):
    for data in (content, root.to_bytes(4, "little") + b"TFL3" + content):
        with pytest.raises(ValueError, match=r"Not a TF-Lite file|is damaged"):
            tflite.read(data)


@given(st.integers(0, 2**32 - 1))
def test_sparse_tensors_are_decoded_as_a_loop_does_it(seed):
    """Any order of the axes, with and without blocks, against a walk from number to number."""
    generator = np.random.default_rng(seed)
    rank = int(generator.integers(1, 4))
    blocks = sorted(generator.permutation(rank)[: generator.integers(0, rank + 1)].tolist())
    size = [int(generator.integers(2, 4)) if axis in blocks else 1 for axis in range(rank)]
    shape = [int(generator.integers(1, 4)) * width for width in size]
    order = [*generator.permutation(rank).tolist(), *range(rank, rank + len(blocks))]
    plain = np.where(generator.random(shape) < 0.4, generator.standard_normal(shape), 0).astype(np.float32)
    lengths = [shape[a] // size[a] if a < rank else size[blocks[a - rank]] for a in order]
    is_stored = [axis < rank and bool(generator.integers(2)) for axis in order]

    def at(places):
        index = [0] * rank
        for axis, place in zip(order, places, strict=True):
            index[axis if axis < rank else blocks[axis - rank]] += place * (size[axis] if axis < rank else 1)
        return tuple(index)

    branches, levels = [()], []
    for depth, length in enumerate(lengths):
        rest = [range(n) for n in lengths[depth + 1 :]]
        if not is_stored[depth]:
            levels.append(level(length))
            branches = [(*branch, i) for branch in branches for i in range(length)]
            continue
        found, segments = [], [0]
        for branch in branches:
            found += [
                (*branch, i)
                for i in range(length)
                if any(plain[at((*branch, i, *more))] for more in itertools.product(*rest))
            ]
            segments.append(len(found))
        levels.append(level(0, segments, [branch[-1] for branch in found]))
        branches = found
    content = packed(with_sparse(shape, [plain[at(branch)] for branch in branches], sparse(levels, order, blocks)))
    found = tflite.read(content)[0].tensors[4]
    np.testing.assert_array_equal(found.values, plain)
    assert found.encoding == ("x".join(map(str, size)) if blocks else "random")
    assert found.num_zeros == math.prod(shape) - np.count_nonzero(plain)


def test_numbers_may_lie_behind_the_tables():
    model = network()
    model.buffers[1] = filled(schema.BufferT(), offset=2**40, size=64)
    with pytest.raises(ValueError, match="are referred to"):
        tflite.read(packed(model))
    model.buffers[1].offset = size = len(packed(model))
    numbers = np.arange(16, dtype=np.float32)
    assert len(packed(model)) == size
    np.testing.assert_array_equal(tflite.constants(packed(model) + numbers.tobytes())[0].ravel(), numbers)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("INT4", [3, 5], np.zeros(8, np.uint8)),
        ("STRING", [2], np.zeros(13, np.uint8)),
        ("RESOURCE", [1], None),
        ("COMPLEX64", [2], np.zeros(16, np.uint8)),
        ("FLOAT32", [2, 0], np.zeros(0, np.uint8)),
        ("FLOAT32", [2, 3], np.zeros(0, np.uint8)),
        ("FLOAT32", None, np.zeros(4, np.uint8)),
    ],
)
def test_other_types_and_empty_buffers_are_read(dtype, shape, data):
    extra = tensor(shape, b"extra", 3, getattr(schema.TensorType, dtype))
    content = packed(network([extra], buffers=[data]))
    assert ask_everything(content) == "read"
    assert tflite.read(content)[0].tensors[4].shape == tuple(shape or ())


def test_names_with_brackets_are_shown_as_they_are():
    model = network()
    model.subgraphs[0].tensors[3].name = b"[/red] :smile: [bold]"
    assert "[/red] :smile: [bold]" in str(tf_prune.explain(packed(model)))


def test_a_deep_network_takes_time_in_proportion():
    def seconds(count):
        own = [tensor([1, 8, 8, 4]) for _ in range(count)]
        operators = [operator(0, [3 + i, 1, 2], [4 + i]) for i in range(count)]
        content = packed(network(own, [operator(0, [0, 1, 2], [3]), *operators], (3 + count,)))
        start = time.process_time()
        tf_prune.explain(content)
        return time.process_time() - start

    assert seconds(1600) < 10 * seconds(400)
