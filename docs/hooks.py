"""Takes the pictures of the benchmarks into the site, which MkDocs looks for in this folder alone."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = "../benchmarks/results/"


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pictures."""
    for path in sorted((Path(config.docs_dir) / RESULTS).glob("*.svg")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Have pages find them there."""
    return markdown.replace(f"({RESULTS}", "(results/")
