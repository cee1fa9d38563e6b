"""The package's structure: the order of its rooms, public names, lazy Triton, file lengths."""

import ast
import graphlib
import importlib
import subprocess
import symtable
import sys
from pathlib import Path

from tests.support.helpers import ROOT

PACKAGE = ROOT / "hyperadapt"
MAX_LINES = 400

# The way of the data. A room (a folder, or a file beside them) imports only rooms that stand before it.
ROOMS = [
    "files",
    "when_imported",
    "tables",
    "randomness",
    "normalization",
    "nn",
    "config",
    "tasks",
    "hypernetwork",
    "routing",
    "tuner",
    "diagnosis",
    "listening",
    "plots",
    "cards",
    "loras",
    "hub",
    "serving",
    "plugin",
    "trainer",
    "trl",
    "sentence_transformers",
    "recipes",
    "runs",
    "__main__",
]

# Reports imports of Triton that the package makes while it is itself imported. Watching the import statement, rather
# than sys.modules, does not blame the package for an import that torch makes.
TRITON_PROBE = """
import builtins, sys
original = builtins.__import__
def watch(name, globals=None, *rest, **options):
    importer = (globals or {}).get("__name__") or ""
    if name.partition(".")[0] == "triton" and importer.partition(".")[0] == "hyperadapt":
        sys.exit(f"{importer} imports {name}")
    return original(name, globals, *rest, **options)
builtins.__import__ = watch
original("hyperadapt")
"""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Maps each module to the package's modules that it imports, wherever in the file."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                # `from room import file` imports the file; `from room import NAME` the room.
                target = name if name in modules else name.rpartition(".")[0]
                graph[module] |= {target} & modules.keys()
    return graph


def test_the_listing_of_rooms_is_complete() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == {*ROOMS, "__init__"}


def test_rooms_import_only_what_stands_above_them() -> None:
    rooms = {f"hyperadapt.{room}": place for place, room in enumerate(ROOMS)}
    place = {module: rooms.get(".".join(module.split(".")[:2]), -1) for module in import_graph()}
    wrong = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        for target in targets
        if module != "hyperadapt" and (target == "hyperadapt" or place[target] > place[module])
    ]
    assert wrong == []


def test_only_the_entry_point_imports_the_command_line() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if "hyperadapt_cli" in path.read_text(encoding="utf-8")]
    assert paths == [PACKAGE / "__main__.py"]


def test_imports_inside_of_a_room_are_acyclic() -> None:
    graph = {module: {target for target in targets if target != module} for module, targets in import_graph().items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_all_lists_exactly_the_public_names_in_sorted_order() -> None:
    symbols = symtable.symtable((PACKAGE / "__init__.py").read_text(encoding="utf-8"), "__init__.py", "exec")
    bound = {symbol.get_name() for symbol in symbols.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    package = importlib.import_module("hyperadapt")
    assert list(package.__all__) == sorted(name for name in bound if not name.startswith("_"))


def test_importing_the_package_does_not_import_triton() -> None:
    command = [sys.executable, "-c", TRITON_PROBE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_file_is_too_long() -> None:
    paths = [
        path
        for folder in ("hyperadapt", "hyperadapt_cli", "examples", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert [path for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES] == []
