"""The mutants of a file: mutmut's operators, applied by libcst, less what no test should notice.

mutmut's own runner leaves out properties, decorated functions, and code at module level: much of `fmn_ref.metrics`.
Its operators know no types of errors, no plain conditions and no sets of letters. `_own` adds these.

Not mutated, by rule:

- docstrings, annotations, type aliases, imports, decorators and `__all__`;
- assert statements, which are for mypy, and `strict=` of `zip`: both never fail;
- the words of a message: strings with a space, what an error is called with as a whole, and the choice between texts.
  Its first word before a colon is mutated: it names the argument or the file at fault.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

_SKIPPED = cst.Annotation | cst.Import | cst.ImportFrom | cst.Decorator | cst.Assert
_ERRORS = {"TypeError": "ValueError", "ValueError": "TypeError"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file. `key` names it whatever the line numbers are.

    `at_import` tells that the change is outside of functions, or in the defaults of one.
    """

    file: str
    function: str
    before: str
    after: str
    lines: range
    code: str
    at_import: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.function, self.before, self.after


def mutants(root: Path, file: str) -> Iterator[Mutant]:
    """Yield the mutants of root/file in the order of the file; equal ones once."""
    source = (root / file).read_text()
    wrapper = MetadataWrapper(cst.parse_module(source))
    positions = wrapper.resolve(PositionProvider)
    seen, header = {source}, wrapper.module.with_changes(body=[]).code
    parts = [wrapper.module.code_for_node(part) for part in wrapper.module.body]
    for i, part in enumerate(wrapper.module.body):
        for node, mutated, names, statement in _changes(part, (), part):
            changed = wrapper.module.code_for_node(part.deep_replace(node, mutated))
            code = "".join((header, *parts[:i], changed, *parts[i + 1 :]))
            if code in seen or not _compiles(changed):
                continue
            seen.add(code)
            lines = range(positions[statement].start.line, positions[node].end.line + 1)
            within = any(name.lstrip("_")[0].islower() for name in names)
            at_import = isinstance(statement, cst.FunctionDef) or not within
            yield Mutant(file, ".".join(names) or "module", *_difference(parts[i], changed), lines, code, at_import)


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _difference(before: str, after: str) -> tuple[str, str]:
    """The lines that differ, without those that both begin and end with."""
    a, b = before.splitlines(), after.splitlines()
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    ends = zip(reversed(a[start:]), reversed(b[start:]), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
    sides = (lines[start : len(lines) - same] for lines in (a, b))
    return tuple(" ".join(line.strip() for line in side) for side in sides)


def _changes(
    node: cst.CSTNode, names: tuple[str, ...], statement: cst.CSTNode
) -> Iterator[tuple[cst.CSTNode, cst.CSTNode, tuple[str, ...], cst.CSTNode]]:
    """Yield (node, mutated node, names of the functions around it, statement that holds it)."""
    strict = isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict"
    if strict or isinstance(node, _SKIPPED) or _is_docstring(node) or _is_alias(node) or _chooses_text(node):
        return
    if isinstance(node, cst.FunctionDef | cst.ClassDef):
        names = (*names, node.name.value)
    statement = node if isinstance(node, cst.BaseStatement | cst.SimpleStatementLine) else statement
    for mutated in (*_mutmut(node), *_own(node)):
        yield node, mutated, names, statement
    if isinstance(node, cst.ComparisonTarget) and isinstance(node.comparator, cst.SimpleString):
        return  # `kind in "iu"`: _own leaves letters out
    for child in node.children:
        raised = isinstance(node, cst.Raise) and isinstance(child, cst.Call)
        for change in _changes(child, names, statement):
            if not (raised and change[0] is child):  # the call of an error: its words do not count
                yield change


def _mutmut(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    words = node.value if isinstance(node, cst.Assign | cst.AnnAssign) else node
    if words is None or not _is_text(words):
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                yield from (mutated for mutated in operator(node) if not _is_redundant(node, mutated))


def _is_redundant(node: cst.CSTNode, mutated: cst.CSTNode) -> bool:
    """Tell whether a mutant is all but another one: a string in another case, or a call without a required argument.

    Leaving out an argument counts where a default may take its place: keywords, and the last positional one.
    """
    if isinstance(node, cst.SimpleString):
        return "XX" not in mutated.value
    if not isinstance(node, cst.Call):
        return False
    if any(arg.keyword and arg.keyword.value == "strict" and arg not in mutated.args for arg in node.args):
        return True
    if len(mutated.args) == len(node.args):
        return False
    left_out = next(i for i, arg in enumerate(node.args) if arg not in mutated.args)
    following = node.args[left_out + 1 :]
    return node.args[left_out].keyword is None and any(arg.keyword is None for arg in following)


def _own(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Other type of error, other name at the beginning of a message, opposite condition, fewer of some letters."""
    if isinstance(node, cst.Raise) and isinstance(node.exc, cst.Call) and isinstance(node.exc.func, cst.Name):
        other = _ERRORS.get(node.exc.func.value, "RuntimeError")
        yield node.with_deep_changes(node.exc.func, value=other)
        if node.exc.args and (named := _otherwise_named(node.exc.args[0].value)):
            yield node.deep_replace(node.exc.args[0].value, named)
    if isinstance(node, cst.ComparisonTarget) and isinstance(node.comparator, cst.SimpleString):
        letters = node.comparator.evaluated_value
        for other in [letters.replace(letter, "") for letter in letters] if len(letters) > 1 else ["XX"]:
            yield node.with_changes(comparator=cst.SimpleString(f'"{other}"'))
    plain = not isinstance(getattr(node, "test", None), cst.Comparison | cst.BooleanOperation | cst.UnaryOperation)
    if isinstance(node, cst.If) and plain:
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def _otherwise_named(message: cst.BaseExpression) -> cst.BaseExpression | None:
    """The message with another first word, if that word is before a colon."""
    if isinstance(message, cst.SimpleString):
        other = re.sub(r"""(?<=^["'])\w+(?=:)""", "XX", message.value)
        return None if other == message.value else message.with_changes(value=other)
    if isinstance(message, cst.FormattedString):
        first, *rest = message.parts
        if isinstance(first, cst.FormattedStringText) and re.match(r"\w+:", first.value):
            other = re.sub(r"^\w+", "XX", first.value)
            return message.with_changes(parts=[first.with_changes(value=other), *rest])
        if isinstance(first, cst.FormattedStringExpression):
            return message.with_changes(parts=rest)
    return None


def _is_text(node: cst.CSTNode) -> bool:
    """Tell whether a string has words: a space between letters."""
    if isinstance(node, cst.SimpleString):
        return " " in node.value.strip("\"' ")
    if isinstance(node, cst.FormattedString):
        return any(isinstance(part, cst.FormattedStringText) and " " in part.value for part in node.parts)
    if isinstance(node, cst.ConcatenatedString):
        return True
    return isinstance(node, cst.IfExp) and _chooses_text(node)


def _chooses_text(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.IfExp) and (_is_text(node.body) or _is_text(node.orelse))


def _is_docstring(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)


def _is_alias(node: cst.CSTNode) -> bool:
    """Tell whether a statement names a type, `__all__`, or what only a type checker reads."""
    if isinstance(node, cst.If):
        return isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING"
    if not isinstance(node, cst.Assign):
        return False
    target, value = node.targets[0].target, node.value
    of_types = isinstance(value, cst.Subscript) and isinstance(value.value, cst.Name) and _is_type(value.value.value)
    return of_types or (isinstance(target, cst.Name) and target.value == "__all__")


def _is_type(name: str) -> bool:
    return name[0].isupper() or name in ("dict", "list", "set", "tuple")
