"""What `benchmarks.mutants` changes in a module, one thing at a time, and which lines a test reaches."""

import ast
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator

_COMPARED: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_COMPUTED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_NAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil"}
_LEFT_ALONE = ("stacklevel", "strict")  # arguments that are there for people and for linters
_NAMED |= {
    "isdisjoint": "issubset",
    "zeros": "ones",
    "ones": "zeros",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes:
        line: Of the statement that is changed, in the original.
        what: The statement's first line, and the changed one's.
        source: Of the whole module.
    """

    line: int
    what: str
    source: str


def mutants_of(source: str) -> list[Mutant]:
    """Every change of one operator, constant, condition, argument or statement inside the functions of a module.

    Texts, types and what is said in an error are left alone.
    """
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    for path in _places(tree):
        statement = _statement(path)
        before = ast.unparse(statement).splitlines()
        for change in _changes(path[-1]):
            changed = copy.deepcopy(tree)
            nodes = [changed, *_same_path(changed, path)]
            change(nodes)
            text = ast.unparse(ast.fix_missing_locations(changed))
            after = ast.unparse(_statement(nodes)).splitlines() if _statement(nodes) in ast.walk(changed) else ["pass"]
            different = [(a, b) for a, b in zip(before, after, strict=False) if a != b] or [(before[0], after[0])]
            what = " => ".join(part.strip() for part in different[0])
            found.setdefault(text, Mutant(_first_line(statement), what, text))
    found.pop(ast.unparse(tree), None)
    return list(found.values())


def instrumented(source: str, module: str) -> str:
    """The module, each statement of its functions telling `builtins.__reached__` that it is run."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            _tell(node, module)
    return ast.unparse(ast.fix_missing_locations(tree))


def _tell(node: ast.AST, module: str) -> None:
    for name in ("body", "orelse", "finalbody", "handlers"):
        block = getattr(node, name, None)
        if not isinstance(block, list):
            continue
        told = []
        for child in block:
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and not _is_text(child):
                place = ast.Constant((module, child.lineno))
                told.append(ast.Expr(ast.Call(ast.Name("__reached__", ast.Load()), [place], [])))
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):  # they are walked by themselves
                _tell(child, module)
            told.append(child)
        setattr(node, name, told)


def _places(tree: ast.Module) -> Iterator[list[ast.AST]]:
    """The ways from the module to what may be changed."""

    def walk(path: list[ast.AST]) -> Iterator[list[ast.AST]]:
        node = path[-1]
        yield path
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, (ast.JoinedStr, ast.Raise)):
                    if isinstance(child, ast.Raise):
                        yield [*path, child]
                    continue
                if isinstance(child, ast.keyword) and child.arg in _LEFT_ALONE:
                    continue
                yield from walk([*path, child])

    for path in walk([tree]):
        if any(isinstance(node, ast.FunctionDef) for node in path[:-1]):
            yield path


def _statement(path: list[ast.AST]) -> ast.stmt:
    return next(node for node in reversed(path) if isinstance(node, ast.stmt))


def _first_line(statement: ast.stmt) -> int:
    """Where a test reaches the statement; a function, and its defaults, with the first line of its body."""
    if isinstance(statement, ast.FunctionDef):
        statement = next((one for one in statement.body if not _is_text(one)), statement)
    return statement.lineno


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _same_path(changed: ast.AST, path: list[ast.AST]) -> Iterator[ast.AST]:
    """The same way in a copy of the tree."""
    here = changed
    for parent, child in itertools.pairwise(path):
        index = next(i for i, node in enumerate(ast.iter_child_nodes(parent)) if node is child)
        here = list(ast.iter_child_nodes(here))[index]
        yield here


def _put(nodes: list[ast.AST], new: ast.AST) -> None:
    """Puts another node in the place of the last one."""
    old, parent = nodes[-1], nodes[-2]
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list) and any(one is old for one in value):
            value[next(i for i, one in enumerate(value) if one is old)] = new


Change = Callable[[list[ast.AST]], None]


def _changes(node: ast.AST) -> Iterator[Change]:
    """What can be done to this node; each change takes the way to its copy."""
    yield from _changes_of_values(node)
    yield from _changes_of_statements(node)


def _changes_of_values(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in _COMPARED[type(operator)]:
                yield lambda nodes, i=i, other=other: nodes[-1].ops.__setitem__(i, other())
    elif isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield lambda nodes: setattr(nodes[-1], "op", other())
        for i in range(len(node.values)):
            yield lambda nodes, i=i: nodes[-1].values.pop(i)
    elif isinstance(node, ast.UnaryOp):
        yield lambda nodes: _put(nodes, nodes[-1].operand)
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _COMPUTED:
        parts = [getattr(node, "left", None), getattr(node, "right", None)]
        if not any(isinstance(p, ast.JoinedStr) or isinstance(getattr(p, "value", None), str) for p in parts):
            yield lambda nodes: setattr(nodes[-1], "op", _COMPUTED[type(nodes[-1].op)]())
    elif isinstance(node, ast.Constant):
        values = [not node.value] if isinstance(node.value, bool) else []
        if isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            values = [node.value + 1, node.value - 1] if isinstance(node.value, int) else [node.value * 2]
        for value in values:
            yield lambda nodes, value=value: setattr(nodes[-1], "value", value)
    elif isinstance(node, ast.IfExp):
        yield lambda nodes: _put(nodes, nodes[-1].body)
        yield lambda nodes: _put(nodes, nodes[-1].orelse)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield lambda nodes: setattr(nodes[-1], "ifs", [])
    elif isinstance(node, ast.Call):
        yield from _changes_of_calls(node)


def _changes_of_calls(node: ast.Call) -> Iterator[Change]:
    attribute = "id" if isinstance(node.func, ast.Name) else "attr" if isinstance(node.func, ast.Attribute) else None
    if attribute and getattr(node.func, attribute) in _NAMED:
        yield lambda nodes: setattr(nodes[-1].func, attribute, _NAMED[getattr(nodes[-1].func, attribute)])
    is_symmetric = attribute and getattr(node.func, attribute) in ("min", "max", "minimum", "maximum", "isinstance")
    if len(node.args) == 2 and not is_symmetric and not any(isinstance(arg, ast.Starred) for arg in node.args):
        yield lambda nodes: nodes[-1].args.reverse()
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in _LEFT_ALONE:
            yield lambda nodes, i=i: nodes[-1].keywords.pop(i)


def _changes_of_statements(node: ast.AST) -> Iterator[Change]:
    removed = isinstance(node, (ast.Raise, ast.Continue, ast.Break, ast.Delete))
    removed |= isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom)
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        removed |= isinstance(node, ast.AugAssign) or any(not isinstance(one, ast.Name | ast.Tuple) for one in targets)
    if removed:
        yield lambda nodes: _put(nodes, ast.Pass())
    if isinstance(node, (ast.If, ast.While)):
        yield lambda nodes: setattr(nodes[-1], "test", ast.UnaryOp(ast.Not(), nodes[-1].test))
        if isinstance(node, ast.If):
            yield lambda nodes: setattr(nodes[-1], "test", ast.Constant(False))
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield lambda nodes: setattr(nodes[-1], "value", ast.Constant(None))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
