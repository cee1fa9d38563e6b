"""Commands that answer rows, and measure answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperadapt_cli.arguments import Adapter, Revision
from hyperadapt_cli.output import Json, quiet_output, show, table

_STDIN = "-"


def predict(
    adapter: Adapter,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Texts; files (.jsonl, .json, .csv, .tsv, .parquet, or .txt with a text in each line); - for lines "
            "of the standard input.",
            metavar="FILE-OR-TEXT",
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="The task of all rows.", show_default="the one in each row's column, or the only task"),
    ] = None,
    task_column: Annotated[str, typer.Option(help="The column that names the task of each row.")] = "task",
    output: Annotated[Path | None, typer.Option(help="File to write to, .jsonl: a JSON object in each line.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that a language model writes at most.", min=1)] = 64,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Answer texts, or the rows of files: labels with scores, or what a language model writes."""
    if output is not None and output.suffix != ".jsonl":
        raise typer.BadParameter(
            f"--output {output} gets a JSON object in each line, but does not end in .jsonl. Name a file that does."
        )
    if output is not None and output.exists() and any(os.path.isfile(one) and output.samefile(one) for one in inputs):
        raise ValueError(f"--output {output} is one of the files to answer, and would replace it. Name another file.")
    with quiet_output(f"loading {adapter} and its base model"):
        from hyperadapt.recipes.queries import checked_queries
        from hyperadapt.runs.answer_lines import write_predictions
        from hyperadapt.runs.prediction import answers
        from hyperadapt.runs.run import load_for_prediction

        rows = _rows(inputs)
        run = load_for_prediction(adapter, revision=revision)
        queries = checked_queries(rows, run.recipe, task, task_column)
        lines = answers(run, queries, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if output is None:
        show({"predictions": lines}, _answers_table(lines), as_json)
    else:
        write_predictions(output, lines)
        show({"output": str(output), "rows": len(lines)}, f"{len(lines)} answers saved to {output}", as_json)


def _rows(inputs: Sequence[str]) -> list[tuple[str, Any]]:
    """Each row with its place for messages."""
    from hyperadapt.recipes.queries import FILES, read_rows, text_lines

    rows: list[tuple[str, Any]] = []
    for one in inputs:
        if one == _STDIN:
            lines = text_lines(typer.get_binary_stream("stdin").read(), "The standard input")
            rows += [(f"Line {place} of the standard input", line) for place, line in enumerate(lines, 1)]
        elif os.path.isfile(one) or (one.endswith(FILES) and not any(letter.isspace() for letter in one)):
            rows += [(f"{one}, row {place}", row) for place, row in enumerate(read_rows(one), 1)]
        elif not one.strip():
            raise typer.BadParameter("A text to answer is empty. Write something, or leave it out.")
        else:
            rows.append((f"The text {one[:40]!r}", one))
    return rows


def _answers_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The answers, with the beginning of each text in what a terminal leaves of its width."""
    is_classifier = "label" in lines[0]
    names = ["row", *["task"] * (len({line["task"] for line in lines}) > 1)]
    names += ["score", "label"] if is_classifier else []
    width = max(20, shutil.get_terminal_size().columns - 45)
    rows: list[list[object]] = [[*names, "text"] if is_classifier else [*names, "prompt", "completion"]]
    for place, line in enumerate(lines, 1):
        cells = [{"row": place, **line}[name] for name in names]
        cells = [_in_a_line(cell, 24) if isinstance(cell, str) else cell for cell in cells]
        if is_classifier:
            pair = " | ".join(line[name] for name in ("text", "text_pair") if name in line)
            rows.append([*cells, _in_a_line(pair, width)])
        else:
            prompt = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"]
            rows.append([*cells, _in_a_line(str(prompt), width // 2), _in_a_line(line["completion"], width)])
    return table(rows)


def _in_a_line(text: str, width: int) -> str:
    """The beginning of a text, without what would move the cursor."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= width else f"{line[: width - 1]}…"
