"""Write a recipe and its data: `python -m examples.write_recipe FOLDER`, then `hyperadapt train FOLDER/recipe.yaml`.

Eight text tasks are trained together, three of which share the labels positive and negative. One more of that kind,
nyt_sent, is left out: its files are written for `hyperadapt add-task`.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from datasets import disable_progress_bars

from examples.support.cards import LIMITS, MINILM
from examples.support.text_tasks import TextTask, encoder_path, load_task, write_rows

TASKS = ("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent", "reuters_r8", "trump_clinton", "bbc")
HELD_OUT = "nyt_sent"
EXAMPLES = 64


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--rows", type=int, default=4000, help="training rows per task at most")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base-model", help="MiniLM's folder or its name on the Hub; default: the one in its package")
    options = parser.parse_args()
    disable_progress_bars()
    sizes = {"train": options.rows, "validation": max(20, options.rows // 40), "test": max(20, options.rows // 10)}
    tasks = [load_task(name) for name in options.tasks]
    for task in tasks:
        for split, size in sizes.items():
            write_rows(task, split, size, options.folder / task.name / f"{split}.jsonl")
    held_out = load_task(HELD_OUT)
    write_rows(held_out, "train", EXAMPLES, options.folder / HELD_OUT / "examples.jsonl")
    write_rows(held_out, "test", sizes["test"], options.folder / HELD_OUT / "test.jsonl")
    path = options.folder / "recipe.yaml"
    content = recipe(tasks, options.base_model or str(encoder_path()), options.steps)
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=110), encoding="utf-8")
    print(f"hyperadapt train {path}")


def recipe(tasks: list[TextTask], base_model: str, steps: int) -> dict[str, Any]:
    """What the YAML file holds; the tasks' files are beside it, and the base model also encodes the descriptions."""
    return {
        "base_model": base_model,
        "output_dir": "runs/recipe",
        "adapter": {
            "task_type": "SEQ_CLS",
            "target_modules": "all-linear",
            # Sentence encoders average over tokens: this layer, which the classifier reads, was never trained.
            "modules_to_save": ["pooler"],
            "task_embedding": "both",
            "text_encoder": base_model,
        },
        "tasks": {
            task.name: {
                "description": list(task.descriptions),
                **{split: f"{task.name}/{split}.jsonl" for split in ("train", "validation", "test")},
                **({"text_pair": "text_pair"} if task.has_pairs else {}),
            }
            for task in tasks
        },
        "max_length": 40,
        "trainer": {"temperature": 2.0},
        "training": {"max_steps": steps},
        "card": {
            "title": f"{len(tasks)} text tasks, trained from a recipe",
            "base_model": MINILM,
            "language": "en",
            "limits": list(LIMITS[:1]),
        },
    }


if __name__ == "__main__":
    main()
