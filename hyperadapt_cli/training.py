"""Commands that train and evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperadapt_cli.arguments import Adapter, Revision, Tasks, checked_adapter
from hyperadapt_cli.flags import in_flags
from hyperadapt_cli.output import CONTROLS, Json, quiet_output, show, table

if TYPE_CHECKING:
    from hyperadapt.runs.preview import Preview

_SHOWN_LABELS = 6
_TRAINED_ON = "These rows were trained on. Add test files to the recipe to see how other rows fare."


class Split(StrEnum):
    """The parts of a task's data."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE", exists=True, dir_okay=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to, instead of the recipe's or the adapter's own.", file_okay=False),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a finished run in the folder.")] = False,
    continued: Annotated[
        str | None,
        typer.Option(
            "--continue",
            help="A trained adapter that learns more tasks, in place of a recipe.",
            metavar="ADAPTER",
            callback=checked_adapter,
        ),
    ] = None,
    add: Annotated[
        Path | None,
        typer.Option(help="With --continue: a YAML file with the new tasks.", exists=True, dir_okay=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would be done; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter on all tasks of a recipe, test it, and write its card and pictures.

    With --continue and --add a trained adapter learns new tasks, and keeps its own.
    """
    if continued is not None or add is not None:
        others = {"RECIPE": recipe, "--resume": resume, "--overwrite": overwrite, "--dry-run": dry_run}
        continue_training(continued, add, output, [name for name, given in others.items() if given], as_json)
        return
    if recipe is None:
        raise typer.BadParameter("Name a recipe, or a trained adapter with --continue and its new tasks with --add.")
    if resume and overwrite:
        raise typer.BadParameter("Give --resume or --overwrite, not both.")
    with quiet_output(f"reading {recipe}"):
        from hyperadapt.recipes import load_recipe
        from hyperadapt.runs import train as train_run
        from hyperadapt.runs.preview import preview

        read = load_recipe(recipe, output_dir=output)
        if dry_run:
            seen = preview(read, resume=resume, overwrite=overwrite)
        else:
            run = train_run(read, resume=resume, overwrite=overwrite)
    if dry_run:
        return show(asdict(seen), _preview_text(seen), as_json)
    result = {"folder": str(run.folder), **run.record.results}
    lines = [_results_table(run.record.results)]
    if run.record.results["split"] == Split.TRAIN:
        lines.append(_TRAINED_ON)
    show(result, "\n".join([*lines, "", f"saved to {run.folder}"]), as_json)


def evaluate(
    adapter: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a trained adapter, or its name on the Hub.", metavar="ADAPTER", callback=checked_adapter
        ),
    ] = None,
    split: Annotated[Split, typer.Option(help="Which rows to measure on.")] = Split.TEST,
    task: Tasks = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task at most, drawn at random.", min=1)] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="File to write the answer to each row to; without an ADAPTER, a file of answers to measure.",
            dir_okay=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 64,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also answer the rows under other descriptions; up to nine times slower.")
    ] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy and loss of every task, or of answers in a file.

    If all tasks and rows are measured, the results go into the folder's record, by split, and into its card.
    """
    if adapter is None:
        options = {"--split": split != Split.TEST, "--task": bool(task), "--limit": limit is not None}
        options |= {"--controls": controls, "--revision": revision is not None}
        results = _measured_file(predictions, [name for name, is_given in options.items() if is_given])
        return show(results, "\n".join(_results_lines(results)), as_json)
    with quiet_output(f"loading {adapter} and its base model"):
        from hyperadapt.diagnosis import measure
        from hyperadapt.runs import evaluate as evaluate_run
        from hyperadapt.runs import load_run, save_record
        from hyperadapt.runs.report import write_report
        from hyperadapt.runs.run import missing_of

        run = load_run(adapter, revision=revision)
        results = evaluate_run(
            run, split.value, task, batch_size, controls=controls, limit=limit, predictions=predictions
        )
        missing = missing_of(run, results)
        why_not = f"the results lack {missing}" if missing else ""
        if Path(adapter).is_dir() and not missing:
            try:
                run = save_record(run, results)
                write_report(run.model, run.recipe, run.record, run.folder, measure(run.model), figures=False)
            except OSError as error:
                # The folder may be there to be read by many.
                why_not = f"{run.folder} cannot be written ({error.strerror})"
    lines = [*_results_lines(results), *([_controls_table(results)] if controls else [])]
    if why_not:
        lines.append(f"not recorded, since {why_not}")
    if predictions is not None:
        lines.append(f"answers saved to {predictions}")
    show(results, "\n".join(lines), as_json)


def _measured_file(predictions: Path | None, given: Sequence[str]) -> dict[str, Any]:
    """What ``evaluate`` tells of a file of answers, where no adapter is named; with the other options given."""
    if predictions is None:
        raise typer.BadParameter("Name the ADAPTER, or with --predictions a file of answers to measure.")
    if given:
        raise typer.BadParameter(
            f"{', '.join(given)}: name an ADAPTER; without one --predictions is measured as it is."
        )
    with quiet_output(f"reading {predictions}"):
        from hyperadapt.runs.prediction import evaluate_predictions

        return evaluate_predictions(predictions)


def _results_lines(results: Mapping[str, Any]) -> list[str]:
    from hyperadapt.runs.evaluation import no_better_lines

    return [_results_table(results), *no_better_lines(results)]


def add_task(
    adapter: Adapter,
    name: Annotated[str, typer.Argument(help="Name of the new task.", metavar="NAME")],
    description: Annotated[
        list[str] | None, typer.Option(help="What the task is; may be repeated. With this alone, nothing is trained.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="File with labelled rows, as in a recipe; without --train, 8 to 64 are enough.", exists=True),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit to the examples even if the adapter could read them in one pass.")
    ] = False,
    test: Annotated[Path | None, typer.Option(help="Rows to evaluate the task on later.", exists=True)] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A label of the task; may be repeated.", show_default="those of the examples"),
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train", help="Train all of the adapter, half on the examples and half on rows of the old tasks."
        ),
    ] = False,
    replay: Annotated[
        list[str] | None,
        typer.Option(
            help="TASK=FILE, rows of an old task to train on again; may be repeated.", show_default="the recipe's"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the training.", show_default="100", min=1)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Rate of the training.", show_default="the recipe's")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to, instead of changing the adapter's.", file_okay=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Add a task to a trained adapter: by a description alone, fitted to examples, or trained.

    With a description alone, or with --examples, to which only the new embedding is fitted, the other tasks keep every
    bit. --train trains all of the adapter, with rows of the old tasks so that they are not forgotten.
    """
    folder = _folder_to_write(adapter, output)
    replayed = _replay(replay)
    _check_training(train, examples, {"--replay": replay, "--steps": steps, "--learning-rate": learning_rate})
    with quiet_output(f"loading {adapter} and its base model"):
        from hyperadapt.runs import add_task as add_task_to_run
        from hyperadapt.runs import load_run, save_run

        run = load_run(adapter)
        added = add_task_to_run(
            run,
            name,
            description=description,
            examples=examples,
            test=test,
            labels=label,
            fit=fit,
            train=train,
            replay=replayed,
            steps=steps,
            learning_rate=learning_rate,
        )
        save_run(run, folder)
    tasks = run.recipe.adapter_config.task_names
    result: dict[str, Any] = {"folder": str(folder), "tasks": tasks, **asdict(added)}
    lines = [in_flags(str(added), ()), f"{len(tasks)} tasks, with {name!r}, saved to {folder}"]
    if examples is None:
        lines.append(CONTROLS)
        result["controls"] = CONTROLS
    show(result, "\n".join(lines), as_json)


def continue_training(
    adapter: str | None, add: Path | None, output: Path | None, others: list[str], as_json: bool
) -> None:
    """``train --continue``: have an adapter learn the tasks of a file, and write it."""
    if adapter is None or add is None:
        given, lacking = ("--add", "--continue ADAPTER") if adapter is None else ("--continue", "--add FILE")
        raise typer.BadParameter(f"{given} needs {lacking}: the one names what learns on, the other its new tasks.")
    if others:
        raise typer.BadParameter(f"--continue does not go with {', '.join(others)}. Leave out the one or the other.")
    folder = _folder_to_write(adapter, output)
    with quiet_output(f"loading {adapter} and its base model"):
        from hyperadapt.recipes import load_additions
        from hyperadapt.runs import continue_run, load_run, save_run

        run = load_run(adapter)
        added = continue_run(run, load_additions(add, run.recipe))
        save_run(run, folder)
    tasks = run.recipe.adapter_config.task_names
    result = {"folder": str(folder), "tasks": tasks, "added": [asdict(one) for one in added]}
    show(result, "\n".join([*map(str, added), f"{len(tasks)} tasks, saved to {folder}"]), as_json)


def _folder_to_write(adapter: str, output: Path | None) -> Path:
    """Where an adapter that was changed goes."""
    if output is None and not Path(adapter).is_dir():
        raise typer.BadParameter(f"{adapter!r} is a name on the Hub. Name a folder to write to with --output.")
    if output is None:
        return Path(adapter)
    folder = output.expanduser()
    if folder.resolve() != Path(adapter).resolve() and folder.is_dir() and any(folder.iterdir()):
        raise typer.BadParameter(f"--output {output} is a folder with files. Name a new one, so that none is replaced.")
    return folder


def _check_training(train: bool, examples: Path | None, options: Mapping[str, object]) -> None:
    given = [flag for flag, value in options.items() if value is not None]
    if given and not train:
        raise typer.BadParameter(f"{', '.join(given)}: this is for --train. Add that, or leave it out.")
    if train and examples is None:
        raise typer.BadParameter("--train needs rows to train on. Give them with --examples FILE.")


def _replay(given: list[str] | None) -> dict[str, str] | None:
    """Old task -> file."""
    if given is None:
        return None
    pairs = {}
    for one in given:
        name, is_pair, file = one.partition("=")
        if not is_pair or not name or not file:
            raise typer.BadParameter(f"--replay {one!r} is not of the form TASK=FILE.")
        if name in pairs:
            raise typer.BadParameter(f"--replay names {name!r} twice. Put its rows into one file.")
        pairs[name] = file
    return pairs


def _preview_text(seen: Preview) -> str:
    splits = ("train", "validation", "test")
    rows: list[list[object]] = [["task", *splits, "longest row", "labels"]]
    for name, task in seen.tasks.items():
        labels = f"{len(task.labels)}: {', '.join(task.labels[:_SHOWN_LABELS])}" if task.labels else ""
        more = ", ..." if len(task.labels) > _SHOWN_LABELS else ""
        counts = [task.rows.get(split, "-") for split in splits]
        rows.append([name, *counts, f"{task.longest} tokens", f"{labels}{more}"])
    lines = [
        f"{seen.base_model}, {seen.task_type}",
        f"{len(seen.positions)} modules are adapted: {seen.modules}",
        f"{seen.trainable_parameters:,} of {seen.parameters:,} parameters are trained",
        f"{seen.steps:,} steps of {seen.batch_size} rows of at most {seen.max_length} tokens, to {seen.folder}",
        "",
        table(rows),
    ]
    for name, task in seen.tasks.items():
        if task.full:
            lines.append(f"{name}: {task.full} rows have {seen.max_length} tokens, and may have been cut to max_length")
        lines += [
            "",
            f"{name}, the first row to train on",
            *(f"  {part}: {text!r}" for part, text in task.example.items()),
        ]
    return "\n".join([*lines, "", "Everything was checked. Nothing was trained or written."])


def _results_table(results: Mapping[str, Any]) -> str:
    names = ("rows", "majority", "accuracy", "loss")
    rows: list[list[object]] = [["task", *names]]
    rows += [[task, *(_known(values[name]) for name in names)] for task, values in results["tasks"].items()]
    mean = results["mean"]
    rows.append(["mean", "", *(_known(mean[name]) for name in names[1:])])
    # A file of answers is no split.
    head = results["split"] if results["split"] == "predictions" else f"{results['split']} split"
    return f"{head}\n{table(rows)}"


def _known(value: object) -> object:
    return "-" if value is None else value


def _controls_table(results: Mapping[str, Any]) -> str:
    """What the rows of each task get under each condition, and the tasks for which that makes no difference."""
    rows: list[list[object]] = [["task", "condition", "true gains", "95% interval", "accuracy"]]
    lines = []
    for name, values in results["tasks"].items():
        found = values["controls"]
        for arm in found["arms"]:
            low, high = arm["interval"]
            gain = [arm["gain"], f"{low:.3f} to {high:.3f}"] if arm["name"] != "true" else ["", ""]
            rows.append([name, arm["name"], *gain, arm["mean"]])
        lines += [f"{name}: no {control} condition, since {reason}" for control, reason in found["without"].items()]
        if not found["is_above"]:
            lines.append(f"{name}: the true condition is not above every control: do not rely on it")
    return "\n".join(["", "controls", table(rows), *lines])
