"""More training for a trained run: new tasks from a file, one after the other, while the known ones are kept."""

from __future__ import annotations

from dataclasses import replace

from hyperadapt.recipes.additions import Additions
from hyperadapt.recipes.rows import TaskRows, read_rows
from hyperadapt.runs.new_task import STEPS, AddedTask, Way, add_checked, with_labels
from hyperadapt.runs.run import Run
from hyperadapt.runs.training import Report, write_line


def continue_run(  # noqa: DOC502
    run: Run, additions: Additions, *, report: Report | None = write_line
) -> list[AddedTask]:
    """Have a trained adapter learn new tasks in memory, one after the other; write it with ``save_run``.

    Each task is added as by ``add_task``: with ``keep="replay"`` trained, with rows of all tasks before it; with
    ``keep="exact"`` fitted to its rows, with own factors that are trained alone; or added by its description, where it
    has none.

    Args:
        run: The run, whose model, recipe and record are changed. All data are read first. On a later error the task
            that it is about is not added, and those before it are.
        additions: What ``load_additions`` read.
        report: As in ``train``.

    Returns:
        For each task how well it fits its own rows, and what a training cost the tasks before it.

    Raises:
        ValueError: If the data are wrong, the classifier does not know a label, there are no rows of known tasks, or
            a trained task answers none of its rows right.
    """
    rows: dict[str, TaskRows | None] = {}
    for name, task in additions.tasks.items():
        alone = replace(run.recipe, tasks={name: task})
        rows[name] = None if task.train is None else read_rows(alone, name, "train")
        with_labels(run, name, task, rows[name])
        for split in ("validation", "test"):
            if getattr(task, split) is not None:
                read_rows(alone, name, split)
    is_trained = additions.keep == "replay"
    way = Way(
        fit=not is_trained,
        train=is_trained,
        own_factors=not is_trained,
        replay=additions.replay,
        steps=additions.steps or STEPS,
        learning_rate=additions.learning_rate,
    )
    return [add_checked(run, name, task, rows[name], way, report) for name, task in additions.tasks.items()]
