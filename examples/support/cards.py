"""Cards of the adapters that the examples train; those of full runs are kept in ``model_cards/``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer

from examples.support.data import TextData
from hyperadapt import diagnose
from hyperadapt.cards import write_card
from hyperadapt.runs.record import hardware, versions
from hyperadapt.runs.report import FIGURES

Results = Mapping[str, Mapping[str, float]]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LIMITS = (
    "One seed, and test sets of some hundred rows: a difference of two points on one task is within noise.",
    "`stereoset_rel` holds offensive sentences by design. The data sets keep their own licences.",
    "The weights are not published: the command under Training makes them in a few minutes.",
)


TITLES = {
    "quickstart": "Quickstart: seven text tasks in one hyperadapter",
    "train_multitask": "Ten text tasks in one hyperadapter",
    "train_accelerate": "Eight text tasks in one hyperadapter, in a loop with Accelerate",
    "train_causal_lm": "Nine text tasks as chats in one hyperadapter",
    "distill_loras": "Eight LoRAs of rank 16 in one hyperadapter",
}
CLASSIFIER = """\
import hyperadapt  # registers the method with PEFT
from examples.support.encoder import load_base, load_tokenizer
from peft import PeftModel

model = PeftModel.from_pretrained(load_base(num_labels={num_labels}, seed=0), "{folder}").eval()
inputs = load_tokenizer()("Who wrote it?", return_tensors="pt")
logits = model(**inputs, tasks="trec6").logits  # the classes of all tasks, those of trec6 first
"""
MATCHER = """\
import hyperadapt  # registers the method with PEFT
from examples.support.encoder import load_tokenizer
from examples.support.matching import load_matcher
from examples.support.text_tasks import load_task
from peft import PeftModel

tokenizer = load_tokenizer()
task = load_task("sms_spam")
model = PeftModel.from_pretrained(load_matcher([task], tokenizer), "{folder}").eval()
scores = model(**tokenizer("You have won a prize", return_tensors="pt"), tasks="sms_spam").logits
print(task.labels[scores.argmax()])
"""
CHAT = """\
import hyperadapt  # registers the method with PEFT
import torch
from examples.support.causal_lm import load_base, load_tokenizer
from peft import PeftModel

model = PeftModel.from_pretrained(load_base(torch.bfloat16), "{folder}").eval()
tokenizer = load_tokenizer()
messages = [
    {{"role": "system", "content": "Tell spam from genuine text messages. Answer only with one of: not spam, spam."}},
    {{"role": "user", "content": "WINNER!! You have been selected for a prize. Call now."}},
]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, tasks="sms_spam", max_new_tokens=8, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def save_classifier_card(
    model: PeftModel,
    folder: Path,
    example: str,
    data: TextData,
    results: Results,
    trainer: Trainer | None = None,
    **facts: Any,
) -> None:
    """Write the card of an adapter of the examples' classifier; facts of its training are taken from its trainer."""
    if trainer is not None:
        arguments = trainer.args
        facts |= {"steps": arguments.max_steps, "batch_size": arguments.per_device_train_batch_size}
        facts |= {"learning_rate": arguments.learning_rate, "seed": arguments.seed}
        facts["trainable parameters"] = model.get_nb_trainable_parameters()[0]
    save_card(
        model,
        folder,
        example,
        usage=CLASSIFIER.format(num_labels=data.num_labels, folder=folder.as_posix()),
        results=results,
        training=facts | {"rows per task at most": data.rows["train"], "tokens per row": data.max_length},
        log_history=() if trainer is None else trainer.state.log_history,
    )


def save_chat_card(trainer: Trainer, folder: Path, results: Results, options: argparse.Namespace) -> None:
    """Write the card of the adapter of the chat example."""
    names = ("steps", "batch_size", "learning_rate")
    save_card(
        trainer.model,
        folder,
        "train_causal_lm",
        usage=CHAT.format(folder=folder.as_posix()),
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        results=results,
        training={
            **{name: getattr(options, name) for name in names},
            "rows per task at most": options.rows,
            "tokens per text": options.max_tokens,
            "seed": trainer.args.seed,
            "trainable parameters": trainer.model.get_nb_trainable_parameters()[0],
        },
        options="--fast" if options.fast else "",
        log_history=trainer.state.log_history,
    )


def save_card(
    model: PeftModel,
    folder: Path,
    example: str,
    *,
    usage: str,
    results: Results,
    training: Mapping[str, Any],
    options: str = "",
    log_history: Sequence[Mapping[str, Any]] = (),
    base_model: str = MINILM,
) -> None:
    """Write the card of an adapter, and its pictures.

    Args:
        model: The trained model.
        folder: The adapter's folder.
        example: The example that trains it.
        usage: Code that loads the adapter and runs it.
        results: Task -> metric -> value, on the test rows.
        training: Facts about the training.
        options: Of the example's command.
        log_history: What ``Trainer`` logged.
        base_model: The base model's name on the Hub.
    """
    from hyperadapt.plots import plot

    pictures = plot(model, folder / "figures", log_history=log_history or None, formats=("png",))
    write_card(
        model,
        folder,
        overwrite=True,
        title=TITLES[example],
        base_model=base_model,
        usage=usage,
        results=results,
        training={
            "command": f"python -m examples.{example} {options}".rstrip(),
            **training,
            "hardware": hardware(model.device),
            "versions": versions(),
        },
        diagnosis=diagnose(model),
        figures={FIGURES[path.stem]: f"figures/{path.name}" for path in pictures},
        language="en",
        limits=LIMITS,
    )
