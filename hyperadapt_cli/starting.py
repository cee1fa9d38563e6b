"""The command that begins: a recipe from data files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperadapt_cli.output import Json, quiet_output, show


def init(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Files with rows (.csv, .tsv, .json, .jsonl, .parquet), or folders of such files.",
            metavar="DATA",
            exists=True,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The recipe to write; an existing file is not overwritten.")] = Path(
        "recipe.yaml"
    ),
    base_model: Annotated[
        str | None, typer.Option(help="Name of the base model on the Hub, or its folder.", show_default="a small one")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a starter recipe from data files: guess their tasks, columns and splits, and say what was guessed.

    Each file is a task with the file's name. Files such as trec/train.csv and trec/test.csv, or trec_train.csv and
    trec_test.csv, are the splits of a task trec.
    """
    if output.exists():
        raise typer.BadParameter(f"{str(output)!r} is there already. Name another file.", param_hint="--output")
    with quiet_output("reading the data"):
        from hyperadapt.recipes.starter import write_starter

        starter = write_starter(data, output, base_model)
    recipe = starter.recipe
    result = {
        "recipe": str(output),
        "base_model": recipe.base_model,
        "task_type": recipe.task_type,
        "tasks": list(recipe.tasks),
        "guesses": starter.guesses,
    }
    end = f"written to {output}; look at it, and then: hyperadapt train {output} --dry-run"
    show(result, "\n".join([*starter.guesses, end]), as_json)
