"""Evaluate three tasks by EleutherAI's harness, in one run: `python -m examples.evaluate_harness`.

SmolLM2-135M-Instruct learns to classify. The harness (`pip install lm_eval`) asks for all tasks at once, and each is
answered by the adapter's task of its name. Before training, that is the base model.
"""

import json
from pathlib import Path

import lm_eval
import torch
import yaml
from datasets import Dataset
from lm_eval.tasks import TaskManager
from trl import SFTConfig

from examples.support.causal_lm import load_base, load_tokenizer
from examples.support.text_tasks import TextTask, load_task
from examples.support.training import training_parser
from hyperadapt import HyperAdapterConfig
from hyperadapt.runs.harness import HyperAdapterLM
from hyperadapt.trl import MultiTaskSFTTrainer

TASKS = ("trec6", "sms_spam", "movie_sent")


def pairs(task: TextTask, split: str, count: int) -> Dataset:
    """A split's first rows as prompts and completions."""
    rows = getattr(task, split).take(count)
    prompts = [f"{text[:200]}\n{task.description} Answer:" for text in rows["text"]]
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {task.labels[label]}" for label in rows["label"]]})


def write_benchmark(task: TextTask, count: int, folder: Path) -> None:
    """A task of the harness: its rows, and how they are asked and scored."""
    lines = [json.dumps({**row, "label": row["completion"].strip()}) for row in pairs(task, "test", count)]
    (folder / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    benchmark = {
        "task": task.name,
        **{"dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{task.name}.jsonl")}},
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(task.labels),
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(benchmark), encoding="utf-8")


def main() -> None:
    """Evaluate, train and evaluate again."""
    parser = training_parser(__doc__, steps=100, rows=400, output="runs/evaluate_harness")
    parser.set_defaults(batch_size=8)
    parser.add_argument("--test-rows", type=int, default=50)
    options = parser.parse_args()
    tasks, folder = [load_task(name) for name in TASKS], options.output / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        write_benchmark(task, options.test_rows, folder)
    settings = {"max_steps": options.steps, "per_device_train_batch_size": options.batch_size, "bf16": False}
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "gradient_checkpointing": False}
    trainer = MultiTaskSFTTrainer(
        load_base(torch.float32),
        args=SFTConfig(str(options.output), learning_rate=options.learning_rate, **settings, **quiet),
        train_dataset={task.name: pairs(task, "train", options.rows) for task in tasks},
        processing_class=load_tokenizer(),
        peft_config=HyperAdapterConfig(task_type="CAUSAL_LM", target_modules="all-linear", tasks=list(TASKS)),
    )
    manager, found = TaskManager(include_path=str(folder)), []
    for prepare in (trainer.model.eval, trainer.train):
        prepare()
        model = HyperAdapterLM(trainer.model, tokenizer=trainer.processing_class, batch_size=8)
        found.append(lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager)["results"])
    print(f"\n{'accuracy':<12}{'before':>10}{'after':>10}")
    for name in TASKS:
        print(f"{name:<12}" + "".join(f"{results[name]['acc,none']:>10.3f}" for results in found))


if __name__ == "__main__":
    main()
