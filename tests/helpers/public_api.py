"""The public interfaces as lines of text: Python names, commands, C functions.

`python tests/helpers/public_api.py > tests/data/public_api.txt` accepts a change. docs/explanation/stability.md says
which changes a release may make.
"""

import argparse
import ast
import inspect
import re
from pathlib import Path

import fmn_ref as fmn
from fmn_ref.cli import parser

PACKAGE = Path(fmn.__file__).parent
REPOSITORY = Path(__file__).parents[2]


def plain(signature):
    """Names, kinds and defaults, without annotations: how Python prints these differs from version to version."""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def members(name, cls):
    """Lines of a class: how to make one, then its public methods, properties and fields, also inherited from ours."""
    ours = [c for c in cls.__mro__ if c.__module__.startswith("fmn_ref")]
    names = {n for c in ours for n in (*vars(c), *inspect.get_annotations(c)) if not n.startswith("_")}
    yield f"{name}{plain(inspect.signature(cls))}"
    for member in sorted(names):
        value = inspect.getattr_static(cls, member, None)
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        yield f"{name}.{member}{plain(inspect.signature(value)) if inspect.isfunction(value) else ''}"


def names():
    """Names of `fmn_ref`, and of the modules that it shows."""
    shown = {name: getattr(fmn, name) for name in fmn.__all__}
    for module in ("plot", "report"):
        shown |= {
            f"{module}.{n}": v for n, v in vars(getattr(fmn, module)).items() if defined(n, v, getattr(fmn, module))
        }
    for name, value in sorted(shown.items()):
        yield from members(name, value) if inspect.isclass(value) else [f"{name}{plain(inspect.signature(value))}"]


def defined(name, value, module):
    return not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__


def integrations():
    """Documented names of the integrations, from their source: here the frameworks may be missing."""
    page = (REPOSITORY / "docs" / "reference" / "api.md").read_text()
    for path, name in re.findall(r"\.\. auto\w+:: fmn_ref\.([\w.]+)\.(\w+)$", page, re.MULTILINE):
        found = definition(PACKAGE / f"{path.replace('.', '/')}.py", name)
        functions = [found] if isinstance(found, ast.FunctionDef) else found.body
        for node in functions:
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                qualified = f"{path}.{name}" + ("" if node is found else f".{node.name}")
                yield f"{qualified}({unannotated(node.args)})"


def definition(path, name):
    """The function or class of a name, in a file, or in one beside it that it imports from."""
    for file in (path, *sorted(path.parent.glob("*.py"))):
        for node in ast.parse(file.read_text()).body:
            if getattr(node, "name", "") == name:
                return node
    raise LookupError(f"{path}: {name}")


def unannotated(arguments):
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    return ast.unparse(arguments)


def commands(p=None, name="fmn-ref"):
    """Commands with their arguments and options."""
    p = p or parser()
    below = [a for a in p._actions if isinstance(a, argparse._SubParsersAction)]
    words = sorted("/".join(a.option_strings) or a.dest for a in p._actions if a not in below and a.dest != "help")
    yield f"{name} {' '.join(words)}".rstrip()
    for action in below:
        for word, sub in sorted(action.choices.items()):
            yield from commands(sub, f"{name} {word}")


def c_functions():
    header = (REPOSITORY / "csrc" / "include" / "fmn" / "fmn.h").read_text()
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.DOTALL)
    for declaration in re.findall(r"^[\w ]+[ *]+fmn_\w+\([^;{]*\);", code, re.MULTILINE):
        yield " ".join(declaration.split())


def lines():
    for title, found in (
        ("Python", names()),
        ("Integrations", integrations()),
        ("Commands", commands()),
        ("C", c_functions()),
    ):
        yield f"# {title}"
        yield from (re.sub(r"<(enum|function|class|object)[^>]*>", "...", line) for line in found)


if __name__ == "__main__":
    print("\n".join(lines()))
