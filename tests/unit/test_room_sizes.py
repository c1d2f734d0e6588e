"""Small rooms: modules of about 400 lines at most, functions of about 40."""

import ast
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
MAX_MODULE_LINES = 420
MAX_FUNCTION_LINES = 60


def functions(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in found]


def test_modules_are_small():
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in sizes.items() if lines > MAX_MODULE_LINES} == {}


def test_functions_are_small():
    sizes = [(lines, path.name, name) for path in SOURCES for name, lines in functions(path)]
    assert [size for size in sizes if size[0] > MAX_FUNCTION_LINES] == []
    assert sorted(sizes)[len(sizes) * 9 // 10][0] <= 30
