"""Compare what the LoRA resolver uses of vLLM with a release: `python -m tests.vllm_interface vllm-0.33.0.tar.gz`.

Takes a wheel, a source distribution or a folder that holds ``vllm/``. Nothing of it is run: signatures are read from
the source, and compared with those in ``tests/support/vllm_standin.py``; what that cannot have is looked for.
"""

import ast
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STANDIN = ROOT / "tests" / "support" / "vllm_standin.py"
# Where vLLM keeps what the stand-in has.
PLACES = {
    "LoRARequest": "vllm/lora/request.py",
    "LoRAResolver": "vllm/lora/resolver.py",
    "_LoRAResolverRegistry": "vllm/lora/resolver.py",
    "init_logger": "vllm/logger.py",
}
# What is relied on beside signatures, as code that the files must hold.
STATEMENTS = {
    "vllm/plugins/__init__.py": ["DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'"],
    "vllm/lora/resolver.py": ["LoRAResolverRegistry = _LoRAResolverRegistry()"],
    "vllm/envs.py": ["VLLM_ALLOW_RUNTIME_LORA_UPDATING: bool = False"],
    # The resolver is asked once for a name: afterwards vLLM reads the folder again when it likes.
    "vllm/entrypoints/openai/models/serving.py": [
        "base_model_name = self.model_config.model",
        "lora_request = await resolver.resolve_lora(base_model_name, lora_name)",
        "lora_request.lora_int_id = unique_id",
        "await self.engine_client.add_lora(lora_request)",
        "self.lora_requests[lora_name] = lora_request",
    ],
    "vllm/lora/worker_manager.py": ["peft_helper.validate_legal(self.lora_config)"],
    # Its ids of LoRAs are of 32 bits.
    "vllm/v1/worker/gpu/lora_utils.py": ["self.lora_ids = np.zeros(max_num_reqs, dtype=np.int32)"],
}


def reader(release: Path) -> Callable[[str], str]:
    """What gives the text of a file of a release by its path."""
    if release.is_dir():
        return lambda name: (release / name).read_text(encoding="utf-8")
    if zipfile.is_zipfile(release):
        return lambda name: zipfile.ZipFile(release).read(name).decode()

    def read(name: str) -> str:
        with tarfile.open(release) as archive:
            [member] = [one for one in archive.getnames() if one.partition("/")[2] == name]
            file = archive.extractfile(member)
            assert file is not None
            return file.read().decode()

    return read


def signatures(source: str, name: str) -> list[str]:
    """Parameters of a function, or fields of a class, with whether they have defaults, and of its public methods."""
    [node] = [one for one in ast.walk(ast.parse(source)) if getattr(one, "name", None) == name]
    if not isinstance(node, ast.ClassDef):
        return [_signature(node)]
    found = []
    for one in node.body:
        if isinstance(one, ast.AnnAssign):
            default = "" if one.value is None else " = ..."
            found.append(f"{ast.unparse(one.target)}: {ast.unparse(one.annotation)}{default}")
        elif isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            one.name.startswith("_") or "property" in map(ast.unparse, one.decorator_list)
        ):
            found.append(_signature(one))
    return found


def _signature(node: ast.AST) -> str:
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{kind} {node.name}({ast.unparse(node.args)})"


def main() -> int:
    """Print each comparison.

    Returns:
        1 if something differs, else 0.
    """
    read = reader(Path(sys.argv[1]))
    own = STANDIN.read_text(encoding="utf-8")
    differences = 0
    for name, place in PLACES.items():
        expected, found = signatures(own, name), signatures(read(place), name)
        differences += expected != found
        print(f"{'same' if expected == found else 'DIFFERS':8}{place}: {name}")
        if expected != found:
            print(f"        expected {expected}\n        found    {found}")
    for place, statements in STATEMENTS.items():
        held = [ast.unparse(node) for node in ast.walk(ast.parse(read(place))) if isinstance(node, ast.stmt)]
        for statement in statements:
            is_there = statement in held
            differences += not is_there
            print(f"{'same' if is_there else 'DIFFERS':8}{place}: {statement}")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
