"""Compare what the harness's model uses of lm_eval with a release: `python -m tests.lm_eval_interface lm_eval.whl`.

Takes a wheel, a source distribution or a folder that holds ``lm_eval/``. Nothing of it is run: names of parameters and
which of them have defaults are read from the source, and compared with those in ``tests/support/lm_eval_standin.py``;
what that cannot have is looked for.
"""

import ast
import sys
from pathlib import Path

from tests.vllm_interface import ROOT, reader

STANDIN = ROOT / "tests" / "support" / "lm_eval_standin.py"
# Where lm_eval keeps what the stand-in has.
PLACES = {
    "Instance": "lm_eval/api/instance.py",
    "register_model": "lm_eval/api/registry.py",
    "cli_evaluate": "lm_eval/__main__.py",
    "HFLM.loglikelihood": "lm_eval/models/huggingface.py",
    "HFLM.loglikelihood_rolling": "lm_eval/models/huggingface.py",
    "HFLM.generate_until": "lm_eval/models/huggingface.py",
    "LM.set_cache_hook": "lm_eval/api/model.py",
}
# What is relied on beside signatures, as code that the files must hold.
STATEMENTS = {
    # A model may be given ready made, with its tokenizer, and is called without a task.
    "lm_eval/models/huggingface.py": [
        "self._model = pretrained",
        "self.tokenizer = tokenizer",
        "return self.model(inps).logits",
    ],
    # All requests of a kind come at once, and know their task.
    "lm_eval/evaluator.py": ["resps = getattr(lm, reqtype)(cloned_reqs)"],
    "lm_eval/api/instance.py": ["self.task_name, self.doc_id, self.repeats = self.metadata"],
    # Answers are kept by prompt, without the task.
    "lm_eval/api/model.py": ["hsh = hash_args(attr, req.args)", "lm.set_cache_hook(self.get_cache_hook())"],
}


def parameters(source: str, name: str) -> list[str]:
    """Names of a function's parameters or a dataclass's fields, with whether they have defaults."""
    scope: ast.AST = ast.parse(source)
    for part in name.split("."):
        [scope] = [node for node in ast.walk(scope) if getattr(node, "name", None) == part]
    if isinstance(scope, ast.ClassDef):
        fields = [node for node in scope.body if isinstance(node, ast.AnnAssign)]
        return [f"{ast.unparse(one.target)}{'' if one.value is None else ' = ...'}" for one in fields]
    assert isinstance(scope, ast.FunctionDef)
    given = scope.args
    required = len(given.args) - len(given.defaults)
    return [
        *(f"{one.arg}{' = ...' if place >= required else ''}" for place, one in enumerate(given.args)),
        *([f"*{given.vararg.arg}"] if given.vararg else []),
    ]


def main() -> int:
    """Print each comparison.

    Returns:
        1 if something differs, else 0.
    """
    read = reader(Path(sys.argv[1]))
    own = STANDIN.read_text(encoding="utf-8")
    differences = 0
    for name, place in PLACES.items():
        expected, found = parameters(own, name.replace("LM.set", "HFLM.set")), parameters(read(place), name)
        differences += expected != found
        print(f"{'same' if expected == found else 'DIFFERS':8}{place}: {name}")
        if expected != found:
            print(f"        expected {expected}\n        found    {found}")
    for place, statements in STATEMENTS.items():
        held = [ast.unparse(node) for node in ast.walk(ast.parse(read(place))) if isinstance(node, ast.stmt)]
        for statement in statements:
            is_there = ast.unparse(ast.parse(statement)) in held
            differences += not is_there
            print(f"{'same' if is_there else 'DIFFERS':8}{place}: {statement}")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
