"""The rooms of ``ullage.trace`` lie in an order: a module imports from its own room and from those below it."""

from __future__ import annotations

import ast
from pathlib import Path

HOME = Path(__file__).parents[2] / "src" / "ullage" / "trace"
#: From the ground up; a name without a folder is a module at the top of the package.
ORDER = (
    "job", "internals", "recorder", "stand_ins", "cuda", "ranks", "models", "step", "repeat", "targets", "snapshot",
    "result", "compare", "api",
)  # fmt: skip


def room_of(path: Path) -> str:
    first = path.relative_to(HOME).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of the package that a module imports from, those imported inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{each.name}" for each in node.names] if module == "ullage.trace" else [module]
            found.update(name.split(".")[2] for name in names if name.startswith("ullage.trace."))
    return found


def test_every_room_has_a_place():
    rooms = {room_of(path) for path in HOME.rglob("*.py")} - {"__init__"}
    assert rooms == set(ORDER)


def test_rooms_import_downwards():
    upwards = [
        (str(path.relative_to(HOME)), room)
        for path in sorted(HOME.rglob("*.py"))
        if path.parent != HOME or path.name != "__init__.py"
        for room in imports(path)
        if ORDER.index(room) > ORDER.index(room_of(path))
    ]
    assert upwards == []


def test_rooms_are_small():
    count = {folder: len(list(folder.glob("*.py"))) for folder in HOME.rglob("*") if folder.is_dir()}
    assert {str(folder): number for folder, number in count.items() if number > 10} == {}


def test_imports_are_seen(tmp_path: Path):
    path = tmp_path / "one.py"
    path.write_text(
        "from ullage.trace import api\ndef f():\n    from ullage.trace.step.model import trace_model\n",
        encoding="utf-8",
    )
    assert imports(path) == {"api", "step"}
