"""The rules of the house: rooms import downward only, no circles, no private names of other files, nothing too long."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fmn_ref as fmn

PACKAGE = Path(fmn.__file__).parent
FLOORS = {"kernels": 0, "metrics": 1, "runs": 2, "fusion": 3, "training": 4, "reporting": 5, "integrations": 5}
TOOLS = {"fmn_ref._check", "fmn_ref._files", "fmn_ref._stderr"}  # every room may import them; they import no room
MAX_FUNCTION, MAX_FILE = 40, 400  # code lines of a function (its docstring not counted), lines of a file


def module_of(path):
    parts = ("fmn_ref", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [*PACKAGE.rglob("*.py"), *(PACKAGE / "benchmarks").rglob("*.py")]  # in a checkout, benchmarks may be a link
PATHS = {module_of(p): p for p in sorted(FILES)}
TREES = {module: ast.parse(path.read_text()) for module, path in PATHS.items()}


def imported(module):
    """(module or package, alias or None, line) of all imports from the package, those in functions included."""
    package = module if PATHS[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((a.name, None, node.lineno) for a in node.names if a.name.split(".")[0] == "fmn_ref")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            if base.split(".")[0] == "fmn_ref":
                yield from ((base, alias, node.lineno) for alias in node.names)


def modules_imported(module):
    """(module, line) of all imports from the package."""
    for base, alias, line in imported(module):
        found = f"{base}.{alias.name}" if alias else base
        yield (found if found in PATHS else base), line


def room(module):
    part = module.split(".")[1] if "." in module else ""
    return part if part in FLOORS else None


def test_the_rules_see_the_imports():
    assert {m for m, _ in modules_imported("fmn_ref.metrics.matrix")} >= {"fmn_ref._check", "fmn_ref.kernels.backend"}
    in_a_function = "fmn_ref.training.distill"
    assert in_a_function in {m for m, _ in modules_imported("fmn_ref.reporting.comparison")}
    assert len(PATHS) > 70


@pytest.mark.parametrize("module", [m for m in PATHS if room(m) or m in TOOLS])
def test_imports_go_down(module):
    """A room imports the rooms below, itself and the tools; not the package's root, whose names load the rooms."""
    for target, line in modules_imported(module):
        where = f"{PATHS[module].relative_to(PACKAGE)}:{line} imports {target}"
        if target in TOOLS:
            continue
        assert module not in TOOLS, where
        if room(target) != room(module):
            assert room(target) is not None, where
            assert FLOORS[room(target)] < FLOORS[room(module)], where


def test_no_circles():
    """Among all files of the package and of the benchmarks."""
    graph = {m: {t for t, _ in modules_imported(m) if t in PATHS and t != m} for m in PATHS}
    graph["fmn_ref"] = set()  # importing any module runs the root first; what the root imports is no circle
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", PATHS)
def test_no_private_names_of_other_files(module):
    """Neither `from x import _y`, nor `x._y` of an imported module."""
    modules, names = set(), []
    for base, alias, _ in imported(module):
        name = f"{base}.{alias.name}" if alias else base
        if name in PATHS:
            modules.add((alias and alias.asname) or name.rpartition(".")[2])
        elif alias and private(alias.name):
            names.append(name)
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            names += [f"{node.value.id}.{node.attr}"] if private(node.attr) else []
    assert names == []


def private(name):
    return name.startswith("_") and not name.startswith("__")


def test_the_top_level_is_small():
    visible = [p for p in PACKAGE.iterdir() if not p.name.startswith((".", "__pycache__"))]
    folders = {p.name for p in visible if p.is_dir()} - {"benchmarks"}  # the benchmarks' folder lies beside the package
    assert folders == set(FLOORS)
    assert len([p for p in visible if p.is_file()]) <= 10


def test_every_room_says_what_it_owns():
    for name in FLOORS:
        text = (PACKAGE / name / "README.md").read_text()
        assert text.startswith(f"# {name}\n")
        assert len(text.splitlines()) <= 20


def code_lines(tree, source):
    """Numbers of the lines that are neither blank nor part of a docstring."""
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and i not in docs}


@pytest.mark.parametrize("module", [m for m in PATHS if ".benchmarks" not in m])
def test_no_function_or_file_is_too_long(module):
    source = PATHS[module].read_text()
    assert len(source.splitlines()) <= MAX_FILE
    lines = code_lines(TREES[module], source)
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            assert size <= MAX_FUNCTION, f"{node.name}: {size} lines"
