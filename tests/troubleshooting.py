"""Lists every message of the package in docs/troubleshooting.md: `python -m tests.troubleshooting --write`."""

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hyperadapt"
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN = "<!-- Written by `python -m tests.troubleshooting --write`, to the end of the page. -->"

# Heading -> modules and packages of the package. Every module with messages is in one of them.
TOPICS = {
    "Configuration": ("config", "conditions", "validation"),
    "Making an adapter": ("registration", "model", "network", "base_norms"),
    "Descriptions and their encoder": ("encoders", "tasks"),
    "Naming the tasks of a batch": ("routing", "scope", "updates"),
    "Changing tasks, and fitting new ones": ("task_editing", "fitting"),
    "Normalisation": ("normalization", "matrix_functions", "cores", "nn"),
    "Layers, merging and quantised bases": ("layer",),
    "Loading a file": ("loading",),
    "Several processes": ("sharding",),
    "Training": ("data", "losses", "trainer", "saving"),
    "Diagnosis and pictures": ("diagnosis", "plots"),
    "Exporting": ("export", "formats"),
    "Distilling LoRA folders": ("distillation", "lora_folders"),
    "Recipes": ("recipes", "recipe_fields", "yaml_fields"),
    "Data of recipes": ("task_data", "task_files"),
    "Runs": ("runs", "run_files", "run_training"),
    "Cards and the Hub": ("cards", "hub"),
    "Command line": ("cli",),
}
# Where the message stands among a call's arguments.
_REPORTS = {"warn": 0, "warning": 0, "warning_once": 0, "refuse": 1, "Problem": 1}


@dataclass(frozen=True)
class Message:
    kind: str
    text: str


def messages(path: Path) -> list[Message]:
    """What a module raises, warns of or reports, in the order of the file; each message once."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = dict(_constants(tree))
    constants = _public_constants() | own
    used: set[str] = set()
    found: dict[Message, None] = {}
    for function, node in _with_functions(tree):
        for kind, expression in _reported(node):
            for text in _texts(expression, constants, function, used):
                found[Message(kind, " ".join(text.split()))] = None
    # What is put together in other ways, such as the remedies for what the Hub refuses.
    rest = [text for name, text in own.items() if name not in used and text.endswith(".") and " " in text]
    return [*found, *(Message("remedy", text) for text in dict.fromkeys(rest))]


def _with_functions(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """All nodes in the order of the file, with the innermost function around each."""

    def visit(function: ast.AST, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        yield function, node
        inner = node if isinstance(node, ast.FunctionDef) else function
        for child in ast.iter_child_nodes(node):
            yield from visit(inner, child)

    return visit(tree, tree)


def _reported(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Kind and message of a statement that raises, and of a call that warns or reports."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        yield _last_name(node.exc.func), node.exc.args[0]
    if isinstance(node, ast.Call) and _last_name(node.func) in _REPORTS:
        place = _REPORTS[_last_name(node.func)]
        if len(node.args) > place:
            yield "warning" if place == 0 else "RecipeError", node.args[place]


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _texts(node: ast.expr, constants: dict[str, str], function: ast.AST, used: set[str]) -> list[str]:
    """The texts that an expression can have, placeholders for its values in them; none if it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            texts = [""]
            for part in parts:
                value = part.value if isinstance(part, ast.FormattedValue) else part
                shown = _texts(value, constants, function, used) if _is_text(value, constants, function) else None
                texts = [text + one for text in texts for one in shown or [_placeholder(value)]]
            return texts
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            ends = _texts(right, constants, function, used) or [_placeholder(right)]
            return [start + end for start in _texts(left, constants, function, used) for end in ends]
        case ast.IfExp(body=body, orelse=orelse):
            return [*_texts(body, constants, function, used), *_texts(orelse, constants, function, used)]
        case ast.Name(id=name) if name in constants:
            used.add(name)
            return [constants[name]]
        case ast.Name(id=name):
            return [text for value in _assigned(function, name) for text in _texts(value, constants, function, used)]
        case _:
            return []


def _is_text(node: ast.expr, constants: dict[str, str], function: ast.AST) -> bool:
    """Whether a part of a text is one itself, rather than a value."""
    if isinstance(node, ast.Name) and node.id not in constants:
        values = _assigned(function, node.id)
        return len(values) == 1 and isinstance(values[0], ast.JoinedStr)
    return isinstance(node, ast.Constant | ast.Name)


def _assigned(function: ast.AST, name: str) -> list[ast.expr]:
    """What a local variable is set to."""
    return [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets)
    ]


def _placeholder(node: ast.expr) -> str:
    """A value by its name, if it has a plain one."""
    if isinstance(node, ast.Call) and _last_name(node.func) in ("shown", "str", "list") and len(node.args) == 1:
        return _placeholder(node.args[0])
    name = {"__name__": "type"}.get(_last_name(node), _last_name(node))
    return f"‹{name.strip('_')}›" if name else "…"


@functools.cache
def _public_constants() -> dict[str, str]:
    """Texts that modules import from each other."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    return {name: text for tree in trees for name, text in _constants(tree) if not name.startswith("_")}


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Texts of the module's top level by name; those of a dict with their keys."""
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        elif isinstance(value, ast.Dict):
            name = _last_name(target)
            entries = zip(value.keys, value.values, strict=True)
            pairs = [(ast.Name(f"{name}[{ast.unparse(key)}]"), entry) for key, entry in entries if key is not None]
        else:
            pairs = [(target, value)]
        for one, text in pairs:
            if isinstance(one, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield one.id, text.value


def listing() -> str:
    """The generated part of the page."""
    lines = [BEGIN]
    for heading, modules in TOPICS.items():
        paths = [path for module in modules for path in _files(module)]
        found = dict.fromkeys(message for path in paths for message in messages(path))
        if found:
            lines += ["", f"### {heading}", ""]
            lines += [f"- {message.kind}: {_code(message.text)}" for message in found]
    return "\n".join(lines) + "\n"


def _files(module: str) -> list[Path]:
    path = PACKAGE / module
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def unlisted_modules() -> list[str]:
    """Modules that have messages and no topic."""
    listed = {path for modules in TOPICS.values() for module in modules for path in _files(module)}
    return sorted(str(path.relative_to(ROOT)) for path in {*PACKAGE.rglob("*.py")} - listed if messages(path))


def updated(page: str) -> str:
    """The page with the part after the marker written anew."""
    start, marker, _ = page.partition(BEGIN)
    if not marker:
        raise ValueError(f"{PAGE} has no line {BEGIN!r}, after which the messages go.")
    return start + listing()


def main() -> int:
    new = updated(PAGE.read_text(encoding="utf-8"))
    if "--write" not in sys.argv:
        print(new, end="")
    else:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
