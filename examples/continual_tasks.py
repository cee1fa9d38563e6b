"""A trained adapter learns one more task, by replay and held exactly: `python -m examples.continual_tasks`.

MiniLM learns five text tasks. A day later nyt_sent arrives, whose labels two of them have, too.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from datasets import disable_progress_bars

from examples.support.text_tasks import encoder_path, load_task, write_rows
from hyperadapt.recipes import load_additions, load_recipe
from hyperadapt.runs import continue_run, evaluate, load_run, save_run, train

TASKS = ("trec6", "sms_spam", "movie_sent", "product_sent", "bbc")
NEW_TASK = "nyt_sent"


def main() -> None:
    """Write the files, train, add the task in both ways, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="known tasks")
    parser.add_argument("--rows", type=int, default=1000, help="training rows per task at most")
    parser.add_argument("--steps", type=int, default=300, help="on the known tasks")
    parser.add_argument("--new-steps", type=int, default=100, help="on the new task")
    parser.add_argument("--output", type=Path, default=Path("runs/continual"))
    options = parser.parse_args()
    disable_progress_bars()
    folder = options.output
    content = {
        "base_model": str(encoder_path()),
        "output_dir": str(folder / "first"),
        # Sentence encoders average over tokens: the pooler, which the classifier reads, was never trained.
        "adapter": {"task_type": "SEQ_CLS", "target_modules": "all-linear", "modules_to_save": ["pooler"]},
        "tasks": {name: files(name, folder, options.rows) for name in options.tasks},
        "max_length": 40,
        "training": {"max_steps": options.steps},
    }
    scores = {"before": evaluate(train(load_recipe(write(folder / "first.yaml", content))))}
    more = {"tasks": {NEW_TASK: files(NEW_TASK, folder, options.rows)}}
    for keep in ("replay", "exact"):
        path = write(folder / f"{keep}.yaml", {"keep": keep, "steps": options.new_steps, **more})
        # `hyperadapt train --continue FOLDER/first --add PATH --output FOLDER/KEEP` does the same.
        run = load_run(folder / "first")
        for added in continue_run(run, load_additions(path, run.recipe)):
            print(added)
        save_run(run, folder / keep)
        scores[keep] = evaluate(run)

    print(f"{'test accuracy':<16}" + "".join(f"{when:>10}" for when in scores))
    for name in (*options.tasks, NEW_TASK):
        found = (result["tasks"].get(name, {}).get("accuracy") for result in scores.values())
        print(f"{name:<16}" + "".join(f"{'' if value is None else format(value, '.3f'):>10}" for value in found))


def files(name: str, folder: Path, rows: int) -> dict[str, Any]:
    """A task's section of a recipe, with its files, which are written."""
    task = load_task(name)
    for split, count in (("train", rows), ("test", max(20, rows // 5))):
        write_rows(task, split, count, folder / name / f"{split}.jsonl")
    pair = {"text_pair": "text_pair"} if task.has_pairs else {}
    return {"train": f"{name}/train.jsonl", "test": f"{name}/test.jsonl", **pair}


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a YAML file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
