"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def checked_adapter(value: str | None) -> str | None:
    """A folder, or what can be a name on the Hub: a mistyped folder is not looked for there."""
    if value is None:
        return None
    path = Path(value).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise NotADirectoryError(f"{value!r} is a file. Name the folder of a trained adapter.")
    # A name on the Hub is user/name.
    is_path = value.startswith((".", "/", "~")) or "\\" in value or value.count("/") != 1
    if is_path or path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {value!r}. Name the folder of a trained adapter, or its name on the Hub, user/name."
        )
    return value


Adapter = Annotated[
    str,
    typer.Argument(
        help="Folder of a trained adapter, or its name on the Hub.", metavar="ADAPTER", callback=checked_adapter
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of an adapter on the Hub.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")]
Output = Annotated[Path, typer.Argument(help="Folder to write to.", metavar="OUTPUT", file_okay=False)]
