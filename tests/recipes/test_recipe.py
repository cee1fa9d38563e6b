"""Recipes: what is read, how paths are found, what is refused with which line, and what is written back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from hyperadapt.recipes import Recipe, RecipeError, TaskRecipe, load_recipe

FULL = """\
base_model: base
revision: main
dtype: float32
output_dir: runs/first
adapter:
  task_type: SEQ_CLS
  target_modules: [query, value]
  r: 4
  task_embedding: both
  text_encoder: base
tasks:
  one:
    description: What the first one is.
    train: data/train.jsonl
    validation: data/validation.jsonl
    test: data/test.csv
    text_pair: other
    labels: [positive, negative]
  'no':
    description: [First text., Second text.]
    dataset: user/reviews
    name: english
    revision: abc
    train: "train[:2000]"
    validation: dev
    text: sentence
    label: stars
max_length: 64
max_rows: {train: 2000, test: 400}
trainer:
  temperature: 2.0
  log_task_losses: false
training:
  max_steps: 400
  learning_rate: 5e-3
  lr_scheduler_type: cosine
card:
  title: Two tasks
  license: apache-2.0
  language: en
  limits: [It knows little.]
  tags: [a, b]
"""
SMALL = """\
base_model: user/base
output_dir: out
adapter:
  task_type: SEQ_CLS
  r: 4
tasks:
  one:
    train: data/train.jsonl
"""


CAUSAL = SMALL.replace("SEQ_CLS", "CAUSAL_LM")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "validation.jsonl", "test.csv", "train.txt"):
        (tmp_path / "data" / name).touch()
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "first.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(old: str, new: str) -> str:
    """The small recipe with one part replaced."""
    assert SMALL.count(old) == 1
    return SMALL.replace(old, new)


def error(folder: Path, text: str, **options: Any) -> RecipeError:
    with pytest.raises(RecipeError) as info:
        load_recipe(write(folder, text), **options)
    return info.value


def test_all_fields(folder: Path) -> None:
    recipe = load_recipe(write(folder, FULL))
    base, data = str(folder / "base"), folder / "data"
    assert recipe == Recipe(
        base_model=base,
        output_dir="runs/first",
        adapter={
            "task_type": "SEQ_CLS",
            "target_modules": ["query", "value"],
            "r": 4,
            "task_embedding": "both",
            "text_encoder": base,
        },
        tasks={
            "one": TaskRecipe(
                description="What the first one is.",
                train=str(data / "train.jsonl"),
                validation=str(data / "validation.jsonl"),
                test=str(data / "test.csv"),
                text_pair="other",
                labels=("positive", "negative"),
            ),
            "no": TaskRecipe(
                description=("First text.", "Second text."),
                train="train[:2000]",
                validation="dev",
                dataset="user/reviews",
                name="english",
                revision="abc",
                text="sentence",
                label="stars",
            ),
        },
        revision="main",
        dtype="float32",
        max_length=64,
        max_rows={"train": 2000, "test": 400},
        trainer={"temperature": 2.0, "log_task_losses": False},
        training={"max_steps": 400, "learning_rate": 5e-3, "lr_scheduler_type": "cosine"},
        card={
            "title": "Two tasks",
            "license": "apache-2.0",
            "language": "en",
            "limits": ("It knows little.",),
            "tags": ("a", "b"),
        },
    )
    config = recipe.adapter_config
    assert config.task_names == ["one", "no"]
    assert config.task_descriptions == {"one": "What the first one is.", "no": ["First text.", "Second text."]}
    assert (config.r, config.task_type) == (4, "SEQ_CLS")
    assert recipe.labels == ["positive", "negative"]


def test_the_folder_to_write_to_can_be_given(folder: Path) -> None:
    text = changed("output_dir: out\n", "")
    assert load_recipe(write(folder, text), output_dir=folder / "other").output_dir == str(folder / "other")
    # As Trainer takes it for its checkpoints, too.
    home = str(Path.home() / "run")
    assert load_recipe(write(folder, text), output_dir="~/run").output_dir == home
    assert load_recipe(write(folder, changed("output_dir: out\n", "output_dir: ~/run\n"))).output_dir == home
    assert load_recipe(write(folder, SMALL), output_dir="other").output_dir == "other"
    assert str(error(folder, text)) == f"{folder}/first.yaml:1: output_dir is missing."
    assert "This is no valid YAML" in str(error(folder, "a: [", output_dir="other"))


def test_labels_are_shared_by_name_in_the_order_of_first_sight() -> None:
    labels = [("negative", "positive"), ("spam", "positive"), None]
    tasks = {str(index): TaskRecipe(labels=names) for index, names in enumerate(labels)}
    assert Recipe("base", "out", {}, tasks).labels == ["negative", "positive", "spam"]


@pytest.mark.parametrize(("text", "place"), [(FULL, "runs/first"), (SMALL, "")])
def test_what_is_saved_loads_as_the_same(folder: Path, text: str, place: str) -> None:
    recipe = load_recipe(write(folder, text))
    (folder / place).mkdir(parents=True, exist_ok=True)
    saved = folder / place / "recipe.yaml"
    recipe.save(saved)
    assert load_recipe(saved) == recipe
    assert str(folder) not in saved.read_text()
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_is_moved_after_writing_keeps_its_paths(folder: Path) -> None:
    recipe = load_recipe(write(folder, FULL))
    written = folder / "a" / "b" / "c"
    written.mkdir(parents=True)
    recipe.save(written / "recipe.yaml", folder / "run")
    (folder / "run").mkdir()
    (written / "recipe.yaml").rename(folder / "run" / "recipe.yaml")
    assert load_recipe(folder / "run" / "recipe.yaml") == recipe


def test_paths_that_share_no_folder_stay_absolute(folder: Path) -> None:
    recipe = Recipe("/elsewhere/base", "out", {"task_type": "SEQ_CLS"}, {"/a": TaskRecipe("/a text", train="/x/y.csv")})
    recipe.save(folder / "recipe.yaml")
    text = (folder / "recipe.yaml").read_text()
    for part in ("base_model: /elsewhere/base", "train: /x/y.csv", "description: /a text", "/a:"):
        assert part in text


def test_a_trained_run_needs_no_data(folder: Path) -> None:
    text = changed("    train: data/train.jsonl\n", "    test: gone/test.jsonl\n  two: {}\n")
    text = text.replace("r: 4", "r: 4\n  text_encoder: ../gone") + "training:\n  tf32: true\n"
    recipe = load_recipe(write(folder, text), to_train=False)
    assert recipe.tasks == {"one": TaskRecipe(test=str(folder / "gone" / "test.jsonl")), "two": TaskRecipe()}
    lines = [problem.line for problem in error(folder, text).problems]
    assert lines == [6, 8, 9, 10, 12]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (changed("r: 4", "rank: 4"), 5, "adapter.rank is no field of HyperAdapterConfig. Did you mean 'r'?"),
        (changed("r: 4", "lora_alfa: 4"), 5, "adapter.lora_alfa is no field of HyperAdapterConfig. Did you mean 'lora"),
        (changed("r: 4", "r: 0"), 5, "adapter.r=0 must be at least 1."),
        (changed("r: 4", "r: four"), 5, "adapter.r='four' must be an integer, not str."),
        (changed("r: 4", "tasks: [a]"), 5, "adapter.tasks is no field of HyperAdapterConfig."),
        (changed("r: 4", "inference_mode: true"), 5, "adapter.inference_mode is no field of HyperAdapterConfig."),
        (changed("r: 4", "task_embedding: text"), 5, "adapter.task_embedding='text' needs a description of task 'one'"),
        (changed("r: 4", "text_encoder: ./none"), 5, "adapter.text_encoder='./none' is neither a folder ("),
        (changed("SEQ_CLS", "seq_cls"), 4, "adapter.task_type='seq_cls' is unknown. Choose one of 'SEQ_CLS', 'CAUSAL_"),
        (changed("  task_type: SEQ_CLS\n", ""), 3, "adapter.task_type is missing."),
        (changed("adapter:\n  task_type: SEQ_CLS\n  r: 4\n", ""), 1, "adapter is missing."),
        (changed("base_model: user/base\n", ""), 1, "base_model is missing."),
        (changed("user/base", "./base/none"), 1, "base_model='./base/none' is neither a folder ("),
        (changed("user/base", "5"), 1, "base_model=5 must be a text, not int. Put it in quotes."),
        (changed("output_dir: out", "output_dir: [out]"), 2, "output_dir=['out'] must be a text, not list."),
        (changed("output_dir: out", "output_dir: out\ndtype: float8"), 3, "dtype='float8' is unknown. Choose one of"),
        (changed("output_dir: out", "output_dir: out\nmax_length: 0"), 3, "max_length=0 must be at least 1."),
        (changed("output_dir: out", "output_dir: out\nmax_row: {}"), 3, "max_row is no field of a recipe. Did you mea"),
        (changed("output_dir: out", "output_dir: out\nmax_steps: 5"), 3, "Did you mean 'training.max_steps'?"),
        (changed("output_dir: out", "output_dir: out\nlora_alpha: 5"), 3, "Did you mean 'adapter.lora_alpha'?"),
        (changed("output_dir: out", "output_dir: out\ntemperature: 5"), 3, "Did you mean 'trainer.temperature'?"),
        (changed("one:", "no:"), 7, "tasks.no: YAML takes the name for a bool. Put it in quotes: 'no'."),
        (changed("one:", "mean:"), 7, "A task cannot have the name 'mean'."),
        (changed("one:", "' ':"), 7, "A task cannot have the name ' '."),
        (changed("  one:\n    train: data/train.jsonl\n", "  - one\n"), 6, "tasks is ['one'], but must hold a section"),
        (changed("tasks:\n  one:\n    train: data/train.jsonl\n", "tasks: {}\n"), 6, "tasks is {}, but must hold a se"),
        (changed("tasks:\n  one:\n    train: data/train.jsonl\n", ""), 1, "tasks is missing."),
        (changed("one:\n    train: data/train.jsonl", "one: data/train.jsonl"), 7, "tasks.one is 'data/train.jsonl', "),
        (changed("train: data/train.jsonl", "test: data/train.jsonl"), 7, "tasks.one.train is missing."),
        (changed("one:\n    train: data/train.jsonl", "one:"), 7, "tasks.one.train is missing."),
        (changed("train: data/train.jsonl", "train: data/none.jsonl"), 8, "tasks.one.train='data/none.jsonl' is no fi"),
        (changed("train: data/train.jsonl", "train: data/train.txt"), 8, "tasks.one.train='data/train.txt' has an unk"),
        (changed("train: data/train.jsonl", "file: a.csv\n    train: data/train.jsonl"), 8, "Did you mean 'train'?"),
        (SMALL + "    prompt: x\n", 9, "tasks.one.prompt is no field of a SEQ_CLS task."),
        (SMALL + "    name: x\n", 9, "tasks.one.name belongs to a dataset, but none is given."),
        (SMALL + "    description: ['']\n", 9, "tasks.one.description[0]='' is empty."),
        (SMALL + "    labels: [no, yes]\n", 9, "tasks.one.labels[0]=False must be a text, not bool. Put it in quotes."),
        (SMALL + "    labels: positive\n", 9, "tasks.one.labels='positive' must be a list of names, not str."),
        (SMALL + "    labels: [a, a]\n", 9, "tasks.one.labels=['a', 'a'] holds a name twice."),
        (SMALL + "    train: x.csv\n", 9, "tasks.one.train is given twice, first in line 8."),
        (SMALL + "max_rows: {train: 1.5}\n", 9, "max_rows.train=1.5 must be an integer, not float."),
        (SMALL + "max_rows: {dev: 5}\n", 9, "max_rows.dev is no field of max_rows."),
        (SMALL + "trainer:\n  temperature: 0.5\n", 10, "trainer.temperature=0.5 must be a finite number of at least 1"),
        (SMALL + "trainer:\n  max_tasks_per_batch: 5\n", 10, "trainer.max_tasks_per_batch=5 does not divide batch_siz"),
        (SMALL + "trainer:\n  log_positions: 1\n", 10, "trainer.log_positions=1 must be true or false, not int."),
        (SMALL + "training:\n  epochs: 3\n", 10, "Did you mean 'num_train_epochs'?"),
        (SMALL + "training:\n  push_to_hub: true\n", 10, "training.push_to_hub is no field of TrainingArguments that "),
        (SMALL + "training:\n  hub_token: abc\n", 10, "training.hub_token is no field of TrainingArguments that a rec"),
        (SMALL + "training:\n  output_dir: abc\n", 10, "training.output_dir is no field of TrainingArguments that a r"),
        (SMALL + "training:\n  max_steps: '9'\n", 10, "training.max_steps='9' must be an integer, not str."),
        (SMALL + "training:\n  learning_rate: -1\n", 10, "training.learning_rate=-1 must be a finite number of at lea"),
        (SMALL + "training:\n  bf16: 1\n", 10, "training.bf16=1 must be true or false, not int."),
        (SMALL + "training:\n  eval_strategy: no\n", 10, "training.eval_strategy=False must be a text, not bool. Put "),
        (SMALL + "training:\n  eval_strategy: epoch\n", 10, "training.eval_strategy='epoch' needs a validation split "),
        (SMALL + "training:\n  metric_for_best_model: loss\n", 10, "training.metric_for_best_model='loss' is not meas"),
        (SMALL + "training:\n  metric_for_best_model: mean_f1\n", 10, "Choose one of ['mean_accuracy', 'mean_loss', "),
        (CAUSAL + "training:\n  metric_for_best_model: mean_accuracy\n", 10, "one of ['mean_loss', 'one_loss']."),
        (SMALL + "training:\n  seed: 1\n  lr_scheduler_type: cosin\n", 11, "cosin is not a valid SchedulerType"),
        (SMALL + "training:\n  save_steps: .inf\n", 9, "training: cannot convert float infinity to integer"),
        (SMALL + "training:\n  per_device_train_batch_size: 0\n", 10, "training.per_device_train_batch_size=0 must be"),
        (SMALL + "card:\n  licence: mit\n", 10, "card.licence is no field of a card. Did you mean 'license'?"),
        (SMALL + "card:\n  language: no\n", 10, "card.language=False must be a text, not bool. Put it in quotes."),
        (SMALL + "card: [mit]\n", 9, "card is ['mit'], but must hold lines of 'field: value'."),
        (SMALL + "card: {title: [x}\n", 9, "This is no valid YAML"),
        ("just text\n", 1, "The file is 'just text', but must hold lines of 'field: value'."),
        ("- a\n", 1, "The file is ['a'], but must hold lines of 'field: value'."),
    ],
)  # fmt: skip
def test_one_problem_is_told_with_its_line(folder: Path, text: str, line: int, message: str) -> None:
    found = error(folder, text)
    assert found.path == folder / "first.yaml"
    assert [problem.line for problem in found.problems] == [found.line] == [line]
    assert str(found).startswith(f"{folder}/first.yaml:{line}: ")
    assert message in str(found)


def test_all_problems_are_told_together_in_the_order_of_lines(folder: Path) -> None:
    text = """\
dtype: float8
adapter:
  normalization: foo
  normalization_ridge: 1e-3
  lora_alpha: -1
  task_type: CAUSAL_LM
  r: 0
tasks:
  one: {train: none.csv, text: x}
training:
  tf32: true
  lr_scheduler_type: cosin
  optim: adam
trainer: {temperature: 0, max_tasks_per_batch: 5}
"""
    found = error(folder, text)
    lines = str(found).split("\n")
    assert [int(re.match(r".*first\.yaml:(\d+): ", line)[1]) for line in lines] == [
        *(1, 1, 1, 3, 5, 7, 9, 9, 11, 12, 13, 14, 14),
    ]  # fmt: skip
    # The ridge is wrong only because the normalization is.
    assert "normalization_ridge" not in str(found)


def test_an_empty_file_lacks_everything(folder: Path) -> None:
    found = error(folder, "")
    assert [problem.message for problem in found.problems] == [
        f"{name} is missing." for name in ("adapter", "base_model", "output_dir", "tasks")
    ]


def test_a_file_in_another_encoding(folder: Path) -> None:
    path = folder / "first.yaml"
    path.write_bytes(b"base_model: a\ncard:\n  title: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"first\.yaml:3: The file is not in UTF-8 .* Save it as UTF-8\."):
        load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(path).base_model == "user/base"
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_recipe(folder / "none.yaml")


def arguments(folder: Path, text: str) -> TrainingArguments:
    return load_recipe(write(folder, text)).training_arguments(folder)


def test_training_defaults(folder: Path) -> None:
    plain = arguments(folder, SMALL)
    assert (plain.learning_rate, plain.per_device_train_batch_size, plain.warmup_steps) == (2e-3, 32, 1 / 16)
    assert (plain.seed, plain.report_to, plain.load_best_model_at_end) == (0, [], False)
    assert (plain.eval_strategy, plain.save_strategy, plain.save_steps) == ("no", "steps", 0.2)
    validated = SMALL + "    validation: data/validation.jsonl\n"
    best = arguments(folder, validated)
    assert (best.eval_strategy, best.eval_steps, best.save_steps) == ("steps", 0.2, 0.2)
    assert (best.load_best_model_at_end, best.metric_for_best_model, best.greater_is_better) == (
        True,
        "mean_accuracy",
        True,
    )
    causal = arguments(folder, validated.replace("SEQ_CLS", "CAUSAL_LM"))
    assert (causal.metric_for_best_model, causal.greater_is_better) == ("mean_loss", False)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ("eval_steps: 7", {"eval_steps": 7, "save_steps": 7, "load_best_model_at_end": True}),
        ("eval_strategy: epoch", {"save_strategy": "epoch", "load_best_model_at_end": True}),
        ("eval_strategy: 'no'", {"save_strategy": "steps", "load_best_model_at_end": False}),
        ("save_strategy: 'no'", {"eval_strategy": "steps", "load_best_model_at_end": False}),
        ("save_strategy: best", {"eval_strategy": "steps", "load_best_model_at_end": True}),
        ("load_best_model_at_end: false", {"eval_strategy": "steps", "load_best_model_at_end": False}),
        ("num_train_epochs: 2", {"num_train_epochs": 2, "max_steps": -1}),
        ("report_to: [tensorboard]", {"report_to": ["tensorboard"]}),
        ("warmup_steps: 0.5", {"warmup_steps": 0.5}),
        ("metric_for_best_model: one_accuracy", {"greater_is_better": True}),
        ("metric_for_best_model: eval_mean_loss", {"greater_is_better": False}),
    ],
)
def test_what_the_recipe_says_goes_before_defaults(folder: Path, training: str, expected: dict[str, Any]) -> None:
    made = arguments(folder, SMALL + f"    validation: data/validation.jsonl\ntraining: {{{training}}}\n")
    assert {name: getattr(made, name) for name in expected} == expected
