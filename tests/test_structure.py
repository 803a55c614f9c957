"""The floors of the house (docs/design.md): what a module may import."""

import ast
from pathlib import Path

import mmfast

ROOT = Path(mmfast.__file__).parent
# from the bottom up; a file or folder imports from its own floor and those below it
FLOORS = [
    {"contract", "console", "precision"},
    {"stats", "plots", "resolvers", "losses"},
    {"backends"},
    {"ops"},
    {"blocks"},
    {"models", "collapse", "monitor"},
    {"data"},
    {"experiments", "demo"},
    {"doctor"},
    {"cli", "__main__"},
]
ABOVE_BY_DESIGN = {("resolvers/base.py", "ops")}  # a rule that is called as a module asks the operator


def imports(path):
    """The rooms of mmfast that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and node.module.split(".")[0] == "mmfast":
            below = node.module.split(".")[1:]
            yield from [below[0]] if below else [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("mmfast."))


def test_nothing_imports_upwards():
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    seen = set()
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name == "__init__.py":
            continue
        own = floor_of[name.split("/")[0].removesuffix(".py")]
        for room in imports(path):
            if room in floor_of and floor_of[room] > own:
                seen.add((name, room))
    assert seen == ABOVE_BY_DESIGN


def test_no_file_is_too_long():
    """A reader holds a file of 400 lines in mind."""
    folders = [ROOT, *(Path(__file__).parent.parent / name for name in ("csrc", "tests", "benchmarks"))]
    files = [path for folder in folders for pattern in ("*.py", "*.h", "*.cpp", "*.cu") for path in folder.rglob(pattern)]
    long = {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) > 420}
    assert not long, long
