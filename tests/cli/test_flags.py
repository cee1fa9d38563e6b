"""Messages in the words of the command line."""

from __future__ import annotations

import pytest

from hyperadapt_cli.flags import in_flags

OPTIONS = [
    "--label",
    "--split",
    "--format",
    "--text-encoder",
    "--learning-rate",
    "--revision",
    "--subfolder",
    "--examples",
]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Give so many, or pass fit=True to add_task, which fits the task to all of them.",
            "Give so many, or give --fit to add-task, which fits the task to all of them.",
        ),
        (
            "row 1 has the integer 0 in column 'label'. Give the labels' names in the recipe, from 0, such as 'labels: "
            "[negative, positive]'.",
            "row 1 has the integer 0 in column 'label'. Name them with --label, once for each, from 0.",
        ),
        ("has no column 'text'. Rename one, or name it in the recipe.", "has no column 'text'. Rename one."),
        ("no rows for split='dev'. Name", "no rows for --split 'dev'. Name"),
        ("Choose another name, or remove_task('mail') first.", "Choose another name."),
        ("learning_rate=-1.0 must be", "--learning-rate -1.0 must be"),
        ("text_encoder='a/b' could not be loaded", "--text-encoder 'a/b' could not be loaded"),
        ("adapter.text_encoder='a/b' is", "adapter.text_encoder='a/b' is"),
        ("Export with format='peft', or", "Export with --format 'peft', or"),
        ("batch_size=3 stays, which is no flag here", "batch_size=3 stays, which is no flag here"),
        ("tasks names ['x'], which", "--task names ['x'], which"),
        ("replay['mail']='rows.txt' has", "--replay mail=rows.txt has"),
        ("Give its rows with replay (--replay mail=FILE).", "Give its rows with --replay mail=FILE."),
        ("train on it, with train=True (--train)", "train on it, with --train"),
        ("Task 'new' needs labels=, the names", "Task 'new' needs --label, the names"),
        ("directory='a/b' is a file; pass a folder.", "'a/b' is a file. Name a folder."),
        (
            "output_dir='a' holds a finished run. Name another folder, or ask to overwrite it.",
            "output_dir='a' holds a finished run. Name another folder, or overwrite it with --overwrite.",
        ),
        (
            "holds an unfinished run. Ask to resume or to overwrite it.",
            "holds an unfinished run. Go on with --resume, or replace it with --overwrite.",
        ),
        ("or open a pull request with create_pr=True.", "or open a pull request with --create-pr."),
        ("or pass as token= one that may write.", "or set HF_TOKEN to a token that may write."),
        ("private=True, but 'a/b' is public", "--private, but 'a/b' is public"),
        ("revision='x' cannot be used with create_pr=True", "--revision 'x' cannot be used with --create-pr"),
    ],
)
def test_arguments_become_flags(message: str, expected: str) -> None:
    assert in_flags(message, OPTIONS) == expected


def test_a_recipe_stays_what_it_is_where_it_is_read() -> None:
    message = "has no column 'text'. Rename one, or name it in the recipe."
    assert in_flags(message, ["--output"]) == message
