"""Commands that export and publish."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hyperadapt_cli.arguments import Adapter, Output, Revision
from hyperadapt_cli.output import CONTROLS, Json, quiet_output, show


class Format(StrEnum):
    """What exported LoRAs are for."""

    PEFT = "peft"
    GGUF_READY = "gguf-ready"
    MLX = "mlx"
    DIFFUSERS = "diffusers"


def generate(
    adapter: Adapter,
    output: Output,
    description: Annotated[list[str] | None, typer.Option(help="What the task is; may be repeated.")] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="A file with labelled rows, as in a recipe; this loads the base model.", exists=True),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="The adapter's text encoder, if its folder has moved.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write the LoRA that a description asks for, without loading the base model, or one made from examples.

    The adapter must have been trained with descriptions, or with examples.
    """
    if not description and examples is None:
        raise typer.BadParameter("Say what the task is with --description TEXT or --examples FILE.")
    with quiet_output(f"reading {adapter}"):
        from hyperadapt.loras.generator import LoraGenerator
        from hyperadapt.runs import load_run, lora_from_examples

        if examples is not None:
            run = load_run(adapter, revision=revision)
            lora = lora_from_examples(run, examples, description=description, text_encoder=text_encoder)
        else:
            generator = LoraGenerator.from_pretrained(adapter, revision=revision)
            lora = generator.from_description(description or [], text_encoder=text_encoder)
        lora.save(output)
    # They compare descriptions, so examples have none.
    told = {"controls": CONTROLS} if examples is None else {}
    show({"folder": str(output), **told}, "\n".join([f"LoRA saved to {output}", *told.values()]), as_json)


def export(
    adapter: Adapter,
    output: Output,
    task: Annotated[list[str] | None, typer.Option(help="The task to export; may be repeated.")] = None,
    all_tasks: Annotated[bool, typer.Option("--all", help="Export all tasks, each to a folder of its own.")] = False,
    format: Annotated[Format, typer.Option(help="What the LoRAs are for.")] = Format.PEFT,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write tasks as ordinary LoRA folders, without loading the base model.

    The LoRAs are for plain PEFT and servers, llama.cpp's converter, MLX or diffusers. With several tasks, each folder
    is complete or absent, and the same command goes on where it was stopped.
    """
    if bool(task) == all_tasks:
        raise typer.BadParameter("Give the tasks with --task NAME, or all of them with --all.")
    with quiet_output(f"reading {adapter}"):
        from hyperadapt.loras.generator import LoraGenerator

        generator = LoraGenerator.from_pretrained(adapter, revision=revision)
        if task and len(task) == 1:
            generator.save(task[0], output, format=format.value)
            folders = {task[0]: output}
        else:
            folders = generator.save_all(output, task, format=format.value)
    text = "\n".join(f"{name}: {folder}" for name, folder in folders.items())
    show({"format": format.value, "folders": {name: str(folder) for name, folder in folders.items()}}, text, as_json)


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an adapter or of an exported LoRA.", metavar="FOLDER", exists=True)
    ],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub.", metavar="USER/NAME")],
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder in the repository.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    as_json: Json = False,
) -> None:
    """Publish a folder on the Hub in one commit: weights, configuration and card, or nothing. No model is loaded."""
    with quiet_output(f"publishing {folder}"):
        from hyperadapt.hub.push import push as push_folder

        commit = push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            subfolder=subfolder,
            create_pr=create_pr,
            commit_message=message,
        )
    url = commit.pr_url or commit.commit_url
    show({"url": url, "commit": commit.oid}, f"published: {url}", as_json)


def card(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter.", metavar="ADAPTER", exists=True, file_okay=False)
    ],
    as_json: Json = False,
) -> None:
    """Write the model card of an adapter anew, README.md, without loading the base model.

    It tells of the adapter's tasks, results and diagnostics.
    """
    with quiet_output(f"reading {adapter}"):
        from hyperadapt.diagnosis import measure
        from hyperadapt.loras.generator import LoraGenerator
        from hyperadapt.recipes import load_recipe
        from hyperadapt.runs.folder import RECIPE
        from hyperadapt.runs.record import Record
        from hyperadapt.runs.report import write_report

        record, recipe = Record.load(adapter), load_recipe(adapter / RECIPE, to_train=False)
        network = LoraGenerator.from_pretrained(adapter).network
        write_report(network, recipe, record, adapter, measure(network), figures=True)
    path = adapter / "README.md"
    show({"card": str(path)}, f"card written to {path}", as_json)
