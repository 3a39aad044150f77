"""Small changes of a program, each of which some test must notice: what a row's code says, said a little differently."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
# What a call does to its one argument that a program could leave out without an error: a norm, an activation, a cast of meaning.
KEPT_CALLS = {
    "len",
    "int",
    "float",
    "bool",
    "str",
    "list",
    "tuple",
    "dict",
    "set",
    "range",
    "iter",
    "next",
    "isinstance",
    "super",
    "get",
    "register",
    "cast",
}


Path = tuple[tuple[str, int | None], ...]


SILENT_KEYWORDS = {None, "device", "strict"}  # no number depends on them


@dataclass(frozen=True)
class Mutant:
    """One change of a program. line: where; what: the change in words; text: the line before the change."""

    line: int
    what: str
    text: str
    path: Path
    new: ast.AST

    @property
    def key(self) -> str:
        """Names the mutant in the list of equivalent ones: it stays when lines move."""
        return f"{self.what} in `{self.text}`"


def mutants(source: str) -> list[Mutant]:
    """All mutants of a program, in the order of its lines. Docstrings, annotations, decorators, imports and messages stay as they are."""
    tree = ast.parse(source)
    lines = source.splitlines()
    found = []
    for path, node, guard in sites(tree):
        for what, new in alternatives(node, guard):
            line = getattr(node, "lineno", 1)
            found.append(Mutant(line, what, lines[line - 1].strip(), path, new))
    return found


SKIPPED = {"annotation", "returns", "decorator_list", "type_comment", "exc", "msg", "bases", "type_params"}


def sites(node: ast.AST, path: Path = (), guard: bool = False) -> Iterator[tuple[Path, ast.AST, bool]]:
    """Every node that may change, with the way to it and whether it stands in the condition of a refusal."""
    for name, value in ast.iter_fields(node):
        if name in SKIPPED or isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise, ast.Assert, ast.JoinedStr)):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                continue
            if isinstance(child, ast.keyword) and child.arg in SILENT_KEYWORDS - {None}:
                continue
            here = (*path, (name, index))
            refusing = guard or (name == "test" and isinstance(node, ast.If) and all(isinstance(one, ast.Raise) for one in node.body))
            yield here, child, refusing
            yield from sites(child, here, refusing)


def alternatives(node: ast.AST, guard: bool) -> Iterator[tuple[str, ast.AST]]:
    """What could stand in a node's place. In the condition of a refusal only the whole condition is turned round."""
    match node:
        case ast.If(test=test):
            yield "condition turned round", ast.If(ast.UnaryOp(ast.Not(), test), node.body, node.orelse)
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "statement left out", ast.Pass()
    if guard:
        return
    match node:
        case ast.IfExp(test=test):
            yield "condition turned round", ast.IfExp(ast.UnaryOp(ast.Not(), test), node.body, node.orelse)
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            new = ARITHMETIC[type(op)]
            yield f"{type(op).__name__} -> {new.__name__}", ast.BinOp(node.left, new(), node.right)
        case ast.Compare(ops=[op], left=left, comparators=rest) if type(op) in COMPARISONS:
            other = COMPARISONS[type(op)]
            yield f"{type(op).__name__} -> {other.__name__}", ast.Compare(left, [other()], rest)
        case ast.BoolOp(op=ast.And()):
            yield "And -> Or", ast.BoolOp(ast.Or(), node.values)
        case ast.BoolOp(op=ast.Or()):
            yield "Or -> And", ast.BoolOp(ast.And(), node.values)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):
            return  # an axis counted from the end, most often the same as one counted from the front
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield f"{type(node.op).__name__} left out", operand
        case ast.Constant(value=bool(value)):
            yield f"{value} -> {not value}", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield f"{value} -> {value + 1}", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            new_value = 2 * value if value else 1.0
            yield f"{value} -> {new_value}", ast.Constant(new_value)
        case ast.Call(func=func, args=[ast.expr() as only], keywords=[]) if not isinstance(only, (ast.Starred, ast.GeneratorExp)):
            name = ast.unparse(func)
            if name.rpartition(".")[2] not in KEPT_CALLS and not name[:1].isupper():
                yield f"{name}() left out", only
        case ast.Call(keywords=[*keywords]) if keywords:
            for keyword in keywords:
                if keyword.arg not in SILENT_KEYWORDS:
                    rest = [other for other in keywords if other is not keyword]
                    yield f"{keyword.arg}= left out", ast.Call(node.func, node.args, rest)
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(value)):
            yield "statement left out", ast.Pass()


def changed(source: str, mutant: Mutant) -> ast.Module:
    """The program with the mutant's node in the place of its own."""
    tree = ast.parse(source)
    parent: ast.AST = tree
    for name, index in mutant.path[:-1]:
        value = getattr(parent, name)
        parent = value if index is None else value[index]
    name, index = mutant.path[-1]
    old = getattr(parent, name) if index is None else getattr(parent, name)[index]
    new = ast.copy_location(copy.deepcopy(mutant.new), old)
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new
    return ast.fix_missing_locations(tree)
