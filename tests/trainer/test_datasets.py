"""One data set per task, given to trainers that take one: pairs of rows of a task, texts beside chats."""

from typing import Any

import pytest
from datasets import Dataset, Features, Value

from hyperadapt.trainer import concatenate_tasks
from hyperadapt.trainer.datasets import _paired_within_tasks, concatenate_prompts, has_texts_and_chats
from tests.support.helpers import TASKS

CHAT = [{"role": "user", "content": "which"}]


def pairs_of(tasks: list[int], batch_size: int) -> list[int]:
    rows = Dataset.from_dict({"tasks": tasks, "completion_ids": [[row] for row in range(len(tasks))]})
    rows = rows.add_column("KL_completion_ids", [[-1]] * len(tasks))
    return [row for [row] in _paired_within_tasks(rows, batch_size)["KL_completion_ids"]]


def test_pairs_of_one_task_are_those_of_trl() -> None:
    assert pairs_of([1] * 6, 3) == [2, 0, 1, 5, 3, 4]


def test_pairs_are_of_one_task_and_of_two_rows() -> None:
    tasks = [0, 1, 0, 2, 1, 0, 2, 2]
    assert pairs_of(tasks, 4) == [2, 4, 0, 7, 1, 2, 7, 6]
    for row, other in enumerate(pairs_of(tasks, 4)):
        assert row != other
        assert tasks[row] == tasks[other]


def test_prompts_as_texts_and_as_chats_keep_their_form() -> None:
    given: dict[str, list[Any]] = {"alpha": ["red", "blue"], "beta": [CHAT], "gamma": [[*CHAT, {"role": "user"}]]}
    rows = concatenate_prompts({task: Dataset.from_dict({"prompt": values}) for task, values in given.items()}, TASKS)
    assert rows.column_names == ["prompt", "tasks"]
    assert [row["tasks"] for row in rows] == [0, 0, 1, 2]
    assert rows[0]["prompt"] == "red"
    assert rows[2]["prompt"] == CHAT
    assert rows.__getitems__([1, 2])[0] == {"prompt": "blue", "tasks": 0}
    assert rows[3]["prompt"][1]["content"] is None


def test_prompts_of_one_form_are_put_together_as_ever() -> None:
    data = {task: Dataset.from_dict({"prompt": [CHAT], "answer": [task]}) for task in TASKS}
    data["beta"] = data["beta"].remove_columns("answer")
    assert list(concatenate_prompts(data, TASKS)) == list(concatenate_tasks(data, TASKS))


def test_other_columns_must_agree() -> None:
    data = {"alpha": Dataset.from_dict({"prompt": ["red"], "best": [1]})}
    data["beta"] = Dataset.from_dict({"prompt": [CHAT], "best": [0.5]})
    with pytest.raises(ValueError, match=r"Column 'best' is .*float64.* in task 'beta' but .*int64.* in task 'alpha'"):
        concatenate_prompts(data, TASKS)


def test_large_texts_are_texts() -> None:
    small = Dataset.from_list([{"prompt": "one"}])
    large = small.cast(Features({"prompt": Value("large_string")}))
    chats = Dataset.from_list([{"prompt": CHAT}])
    assert not has_texts_and_chats({"alpha": small, "beta": large})
    assert has_texts_and_chats({"alpha": large, "beta": chats})
