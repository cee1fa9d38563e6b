"""Messages of the package in the words of the command line: Python's arguments become the flags of a command."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What is said to callers of Python -> what it means here. The flags are those of the commands where it comes up.
_PHRASES = {
    r"\btasks names (?=\[|')": "--task names ",
    r"\breplay names (?=\[)": "--replay names ",
    r"\breplay\['(.*?)'\]='(.*?)'": r"--replay \1=\2",
    r"\brows with replay \((--replay .*?)\)": r"rows with \1",
    r"\bwith train=True \(--train\)": "with --train",
    r"\bTrain longer \(steps\), at another learning_rate\b": "Train longer (--steps), at another --learning-rate",
    r"\bneeds labels=,": "needs --label,",
    r"\blabels=(?=\[)": "--label ",
    r", or remove_task\('.*?'\) first": "",
    r"\bPass examples= or embedding=, or train\b": "Give the task --examples, or train",
    r"\bPass description=, examples= or embedding=": "Give --description or --examples",
    r"\bFit a task to them with add_task\(name, examples=\.\.\.\)": "Fit a task to them with add-task --examples",
    r"\bpass fit=True to add_task, which fits": "give --fit to add-task, which fits",
    r"\bPass it as text_encoder=\.": "Only Python can pass it, as text_encoder.",
    r"\bCall rename_task, or export it with export_lora": "Export it alone, with --task",
    r"\bName every task once, call rename_task, or export them one by one with export_lora": "Export them one by one, "
    "with --task",
    r"\bdirectory=('.*?') is a file; pass a folder": r"\1 is a file. Name a folder",
    r"\bask to overwrite (it|the run)\b": r"overwrite \1 with --overwrite",
    r"\bAsk to resume or to overwrite it": "Go on with --resume, or replace it with --overwrite",
    r"\bpass as token= one that may write": "set HF_TOKEN to a token that may write",
    r"\bcreate_pr=True\b": "--create-pr",
    r"\bprivate=True\b": "--private",
}
# Likewise, where the command has a flag.
_PHRASES_OF = {
    "--label": {
        r"\bGive the labels' names in the recipe, from 0, such as 'labels: \[negative, positive\]'": "Name them with "
        "--label, once for each, from 0",
        r"\bRename one, or name it in the recipe\b": "Rename one",
    },
}


def in_flags(message: str, options: Sequence[str]) -> str:
    """A message for someone who gave flags; `options` are the flags of the command, such as ``--batch-size``."""
    for phrases in (_PHRASES, *(_PHRASES_OF.get(flag, {}) for flag in options)):
        for phrase, meaning in phrases.items():
            message = re.sub(phrase, meaning, message)
    for flag in options:
        name = flag.removeprefix("--").replace("-", "_")
        message = re.sub(rf"(?<![\w.\-]){name}=(?=['\"\d\[\-.]|None\b|nan\b|inf\b)", f"{flag} ", message)
    return message
