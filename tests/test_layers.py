"""The layer map of `ckptkit.__init__`, read from the imports themselves; how large files may be; where tests are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ckptkit
from ckptkit.formats import FORMATS

PACKAGE = Path(ckptkit.__file__).parent

LAYERS = (
    {"errors", "display", "shell", "startup"},
    {"nearness"},
    {"report", "arguments", "dtypes", "limits", "extras"},
    {"codes", "documents", "fleet", "fixes"},
    {"bytesource"},
    {"remote"},
    {"places"},
    {"computed"},
    {"tensor"},
    {"checkpoint"},
    {"plan", "casting"},
    {"pickling"},
    {"normalize"},
    {"transfer"},
    {"formats"},
    {"rewrite"},
    {"diagnose", "compare", "stats", "architectures", "digests", "options"},
    {"inspection", "conversion"},
    {"differences"},
    {"torch_bridge"},
    {"verifier"},
    {"released"},
    {"checkpoint_file"},
    {"api"},
    {""},  # the package itself: the public names
    {"page"},
    {"cli", "testing"},
    {"__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

GUESTS = {
    "torch": {"torch_bridge", "verifier"},
    "torchvision": {"verifier"},
    "numpy": {"casting", "differences", "transfer", "stats"},
    "ml_dtypes": {"casting", "stats"},
    "click": {"cli"},
    "tabulate": {"cli"},
    "wcwidth": {"cli"},
    "zstandard": {"formats"},
    "fsspec": {"remote"},
}
"""Heavy packages, and the only rooms that may import them."""


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """A file's, as `ast.walk` gives them: parsed once for all tests here."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.fixture(scope="module", autouse=True)
def _parsed_files_go() -> Iterator[None]:
    yield
    nodes.cache_clear()


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Every module a file imports, in full, and whether only for type checkers."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    typing_only = {
        id(node)
        for block in nodes(path)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in nodes(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("ckptkit.")
                yield (
                    (f"ckptkit.{inner}" if inner in MODULES and base.startswith("ckptkit") else base),
                    (id(node) in typing_only),
                )


@cache
def edges() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        targets = {target for target, _ in imports(path) if target == "ckptkit" or target.startswith("ckptkit.")}
        targets = {target.removeprefix("ckptkit").lstrip(".") for target in targets}
        packages = {target.rpartition(".")[0] for target in targets}  # are imported before what is in them
        graph[name] = targets | {package for package in packages if package and not name.startswith(package)}
    return graph


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_a_layer() -> None:
    assert {room(module) for module in MODULES} == set(RANK)


def test_imports_point_down() -> None:
    assert len(MODULES) > 100
    for module, targets in edges().items():
        for target in targets:
            same_room = room(target) == room(module) and room(module) not in ("", "__main__")
            assert same_room or RANK[room(target)] < RANK[room(module)], f"{module} imports {target}"


def test_members_do_not_import_their_own_package() -> None:
    for module, targets in edges().items():
        assert "." not in module or module.rpartition(".")[0] not in targets, f"{module} imports its own package"


def test_there_are_no_cycles() -> None:
    graph = edges()
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " > ".join((*above, module))
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_guests_stay_in_their_rooms() -> None:
    for module, path in MODULES.items():
        for target, typing_only in imports(path):
            allowed = GUESTS.get(target.split(".")[0])
            assert allowed is None or typing_only or room(module) in allowed, f"{module} imports {target}"


def test_containers_are_asked_for_their_facts_and_not_for_their_names() -> None:
    names = {container.name for container in FORMATS}
    nouns = {("released.policy_rules", "count_of(len(members), 'pickle')")}
    for module, path in MODULES.items():
        if room(module) == "formats":
            continue
        for node in nodes(path):
            texts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.Constant)]
            named = any(part.value in names for part in texts) and (module, ast.unparse(node)) not in nouns
            if isinstance(node, ast.Compare):  # of `origin.format`, `plan.format`, with any text
                named |= bool(texts) and any(_is_format(part) for part in ast.iter_child_nodes(node))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # `plan.format.startswith(...)`
                named |= _is_format(node.func.value)
            assert not named, f"{module}: {ast.unparse(node):.100}: a container's facts are on its Format"


def _is_format(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "format"


def test_the_table_of_containers_imports_no_reader() -> None:
    code = "import sys, ckptkit.formats.containers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {module for row in FORMATS for module in (row.reader, row.writer) if module is not None}
    assert not {f"ckptkit.formats.{module}" for module in modules} & set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import ckptkit",
        "import ckptkit.cli.inspect, ckptkit.cli.convert, ckptkit.cli.explain",
        "import ckptkit; ckptkit.inspect(r'{fixture}')",
        "import ckptkit; ckptkit.convert(r'{fixture}', r'{out}', strip_module=True, weights_only=True)",
    ],
)
def test_the_torch_free_path_imports_neither_torch_nor_numpy(statement: str, tmp_path: Path) -> None:
    fixture = Path(__file__).parent.parent / "fixtures" / "ddp_resume.pth"
    code = statement.format(fixture=fixture, out=tmp_path / "out.safetensors")
    check = "import sys; print(sorted({'torch', 'torchvision', 'numpy', 'ml_dtypes'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_is_sorted_and_complete() -> None:
    assert ckptkit.__all__ == sorted(ckptkit.__all__)
    for name in ckptkit.__all__:
        if name != "Rewriter":  # a type alias
            assert getattr(ckptkit, name).__doc__, f"ckptkit.{name} has no docstring"
    assert not set(ckptkit.__all__) & set(MODULES), "a room would take the place of what it is named after"
    public = {name for name in dir(ckptkit) if not name.startswith("_")} - set(MODULES)
    assert public == set(ckptkit.__all__)


# How large the house may be.


def test_the_package_has_few_files_and_none_too_short_or_too_long() -> None:
    lines = {path.relative_to(PACKAGE): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert len(lines) <= 270
    assert {path: n for path, n in lines.items() if n < 50 and path.name not in ("__init__.py", "__main__.py")} == {}
    assert {path: n for path, n in lines.items() if n > 500} == {}


BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension, ast.Assert, ast.match_case)


def complexity(function: ast.FunctionDef) -> int:
    """McCabe's, as radon counts it: functions inside are counted by themselves."""
    count, nodes = 1, list[ast.AST]([function])
    for node in nodes:
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.FunctionDef)]
        count += isinstance(node, BRANCHES) + len(getattr(node, "ifs", ()))
        count += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        count += bool(node.orelse) if isinstance(node, (ast.For, ast.While, ast.Try)) else 0
    return count


def test_complexity_is_counted_as_radon_counts_it() -> None:
    code = """
def f(a, b):
    def inner(): return 1 if a else 2
    for x in a:
        if x and b or not x: continue
    else:
        b = [y for y in a if y if b]
    try: assert a
    except ValueError: pass
    except TypeError: pass
    else: return
"""
    outer, inner = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef))
    assert (complexity(outer), complexity(inner)) == (13, 2)


def test_no_function_has_too_many_branches() -> None:
    functions = [(name, f) for name, path in MODULES.items() for f in nodes(path) if isinstance(f, ast.FunctionDef)]
    assert len(functions) > 1000
    found = {f"{name}.{f.name}": count for name, f in functions if (count := complexity(f)) > 25}
    assert found.keys() == {"pickling.reader._run"}, "its loop has a branch an opcode, for speed; all others are short"


def test_the_table_of_tests_names_every_file_once() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)`", (tests / "README.md").read_text(encoding="utf-8"))
    assert len(named) == len(set(named))
    assert [name for name in named if not (tests / name).is_file()] == []
    assert {path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - set(named) == set()
