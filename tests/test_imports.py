"""The package's structure: import order, public names, lazy Triton, file lengths."""

import ast
import graphlib
import importlib
import subprocess
import symtable
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hyperadapt"
MAX_LINES = 400

# Each module may import only modules that stand before it.
ORDER = [
    "validation",
    "conditions",
    "methods",
    "config",
    "encoders",
    "tasks",
    "positions",
    "hypernetwork",
    "factors",
    "kernels",
    "matrix_functions",
    "cores",
    "normalization",
    "nn",
    "network",
    "sharding",
    "scope",
    "routing",
    "checkpointing",
    "layer",
    "base_norms",
    "loading",
    "fitting",
    "task_editing",
    "model",
    "registration",
    "updates",
    "diagnosis",
    "usage",
    "card_text",
    "cards",
    "formats",
    "export",
    "lora_folders",
    "distillation",
    "data",
    "losses",
    "monitor",
    "saving",
    "trainer",
    "plots",
    "hub",
    "yaml_fields",
    "recipe_fields",
    "recipes",
    "task_files",
    "task_data",
    "run_files",
    "scoring",
    "base_models",
    "run_training",
    "runs",
    "publishing",
    "doctor",
    "cli",
    "__main__",
]

# Reports imports of Triton that the package named by the argument makes while it is itself imported. Watching
# the import statement, rather than sys.modules, also catches a guarded import where Triton is not installed,
# and does not blame the package for an import that torch makes.
TRITON_PROBE = """
import builtins, sys
package, original = sys.argv[1], builtins.__import__
def watch(name, globals=None, *rest, **options):
    importer = (globals or {}).get("__name__") or ""
    if name.partition(".")[0] == "triton" and importer.partition(".")[0] == package:
        sys.exit(f"{importer} imports {name}")
    return original(name, globals, *rest, **options)
builtins.__import__ = watch
original(package)
"""

Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path, package: str) -> Graph:
    """Maps each module of the package to the package's modules that it imports, wherever in the file."""
    files = {module_name(path, root): path for path in (root / package).rglob("*.py")}

    def owner(target: str) -> str:
        while target not in files and "." in target:
            target = target.rpartition(".")[0]
        return target

    graph: Graph = {}
    for module, path in files.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    anchor = module.split(".")
                    drop = node.level - (path.name == "__init__.py")
                    base = ".".join([*anchor[: len(anchor) - drop], *filter(None, [base])])
                targets |= {f"{base}.{alias.name}" for alias in node.names}
        graph[module] = {owner(target) for target in targets if target.partition(".")[0] == package}
    return graph


def find_cycle(graph: Graph) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def order_violations(graph: Graph, package: str, order: list[str]) -> list[str]:
    rank = {name: position for position, name in enumerate(order)}

    def place(module: str) -> str:
        """The name in the list: a subpackage stands there as a whole."""
        return module.removeprefix(f"{package}.").partition(".")[0]

    violations = []
    for module in sorted(graph.keys() - {package}):
        if place(module) not in rank:
            violations.append(f"{module} is not in the order list: add it to ORDER in {Path(__file__).name}")
            continue
        for target in sorted(graph[module] - {package}):
            # Among the modules of a subpackage only cycles are refused.
            if place(target) != place(module) and rank.get(place(target), len(order)) >= rank[place(module)]:
                violations.append(f"{module} imports {target}, which does not stand before it in ORDER")
    return violations


def root_importers(graph: Graph, package: str) -> list[str]:
    return sorted(module for module, targets in graph.items() if package in targets)


def public_names(source: str) -> set[str]:
    symbols = symtable.symtable(source, "__init__.py", "exec").get_symbols()
    bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    return {name for name in bound if not name.startswith("_")}


def triton_imports(package: str, cwd: Path) -> str:
    command = [sys.executable, "-c", TRITON_PROBE, package]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return result.stderr if result.returncode else ""


def long_files(paths: Iterable[Path], limit: int) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{path}: {length} lines" for path, length in sorted(lengths.items()) if length > limit]


def write_package(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = root / "sample" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


@pytest.fixture
def graph() -> Graph:
    return import_graph(ROOT, PACKAGE)


def test_package_imports_are_acyclic(graph: Graph) -> None:
    assert find_cycle(graph) == []


def test_package_imports_obey_the_order(graph: Graph) -> None:
    assert order_violations(graph, PACKAGE, ORDER) == []


def test_no_module_imports_the_package_root(graph: Graph) -> None:
    assert root_importers(graph, PACKAGE) == []


def test_all_lists_exactly_the_public_names_in_sorted_order() -> None:
    source = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    package = importlib.import_module(PACKAGE)
    assert list(package.__all__) == sorted(public_names(source))
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_importing_the_package_does_not_import_triton() -> None:
    assert triton_imports(PACKAGE, ROOT) == ""


def test_no_file_is_too_long() -> None:
    paths = [path for folder in (PACKAGE, "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert long_files(paths, MAX_LINES) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("import sample.b", "sample.b"),
        ("import sample.b as other", "sample.b"),
        ("import sample", "sample"),
        ("from sample import b", "sample.b"),
        ("from sample import VALUE", "sample"),
        ("from sample.b import VALUE", "sample.b"),
        ("from . import b", "sample.b"),
        ("from . import VALUE", "sample"),
        ("from .b import VALUE", "sample.b"),
        ("from .inner import leaf", "sample.inner.leaf"),
        ("from .inner import VALUE", "sample.inner"),
        ("def function():\n    from .b import VALUE", "sample.b"),
        ("if TYPE_CHECKING:\n    from .b import VALUE", "sample.b"),
    ],
)
def test_import_graph_sees_every_form_of_import(tmp_path: Path, source: str, target: str) -> None:
    files = {
        "__init__.py": "",
        "a.py": source,
        "b.py": "import os",
        "inner/__init__.py": "",
        "inner/leaf.py": "",
    }
    write_package(tmp_path, files)
    graph = import_graph(tmp_path, "sample")
    assert graph == {
        "sample": set(),
        "sample.a": {target},
        "sample.b": set(),
        "sample.inner": set(),
        "sample.inner.leaf": set(),
    }


def test_import_graph_resolves_relative_imports_inside_subpackages(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .a import VALUE",
        "a.py": "",
        "inner/__init__.py": "from .leaf import VALUE",
        "inner/leaf.py": "from ..a import VALUE",
    }
    write_package(tmp_path, files)
    assert import_graph(tmp_path, "sample") == {
        "sample": {"sample.a"},
        "sample.a": set(),
        "sample.inner": {"sample.inner.leaf"},
        "sample.inner.leaf": {"sample.a"},
    }


def test_a_cycle_is_found_even_when_an_import_is_deferred(tmp_path: Path) -> None:
    deferred = "def function():\n    from .a import VALUE"
    write_package(tmp_path, {"__init__.py": "", "a.py": "from .b import VALUE", "b.py": deferred})
    graph = import_graph(tmp_path, "sample")
    assert set(find_cycle(graph)) == {"sample.a", "sample.b"}


def test_order_violations_are_reported() -> None:
    graph = {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": set(), "p.c": {"p.a", "p"}}
    assert order_violations(graph, "p", ["b", "a", "c"]) == []
    (backward,) = order_violations(graph, "p", ["a", "b", "c"])
    assert "p.a imports p.b" in backward
    (unlisted,) = order_violations(graph, "p", ["b", "a"])
    assert "p.c is not in the order list" in unlisted


def test_root_importers_are_reported() -> None:
    assert root_importers({"p": {"p.a"}, "p.a": {"p"}, "p.b": {"p.a"}}, "p") == ["p.a"]


def test_public_names_are_the_bound_names_without_underscore() -> None:
    source = "import os.path\nfrom x import y as z, _w\nA: int = 1\n__all__ = []\nclass C: pass\n"
    source += "def f(): local = 1\nprint(A)"
    assert public_names(source) == {"os", "z", "A", "f", "C"}


def test_a_triton_import_is_reported_unless_deferred(tmp_path: Path) -> None:
    guarded = "try:\n    import triton.language\nexcept ImportError:\n    pass"
    write_package(tmp_path, {"__init__.py": "from . import a", "a.py": guarded})
    assert "sample.a imports triton.language" in triton_imports("sample", tmp_path)
    write_package(tmp_path, {"a.py": "def function():\n    import triton"})
    assert triton_imports("sample", tmp_path) == ""


def test_long_files_are_reported(tmp_path: Path) -> None:
    short, long = tmp_path / "short.py", tmp_path / "long.py"
    short.write_text("\n" * 3, encoding="utf-8")
    long.write_text("\n" * 4, encoding="utf-8")
    assert long_files([short, long], 3) == [f"{long}: 4 lines"]
