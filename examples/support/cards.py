"""Cards of the adapters that the examples train; those of full runs are kept in ``model_cards/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from hyperadapt import diagnose
from hyperadapt.cards import write_card
from hyperadapt.plots import plot
from hyperadapt.runs.record import hardware, versions
from hyperadapt.runs.report import FIGURES

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LIMITS = (
    "One seed, and test sets of some hundred rows: a difference of two points on one task is within noise.",
    "`stereoset_rel` holds offensive sentences by design. The data sets keep their own licences.",
    "The weights are not published: the command under Training makes them in a few minutes.",
)


def classifier_usage(num_labels: int, folder: Path) -> str:
    """Code that loads an adapter of the examples' classifier.

    Args:
        num_labels: Number of classes.
        folder: The adapter's folder.

    Returns:
        Python code.
    """
    return f"""\
import hyperadapt  # registers the method with PEFT
from examples.support.encoder import load_base, load_tokenizer
from peft import PeftModel

model = PeftModel.from_pretrained(load_base(num_labels={num_labels}, seed=0), "{folder.as_posix()}").eval()
inputs = load_tokenizer()("Who wrote it?", return_tensors="pt")
logits = model(**inputs, tasks="trec6").logits  # the classes of all tasks, those of trec6 first
"""


def save_card(
    model: PeftModel,
    folder: Path,
    *,
    module: str,
    title: str,
    usage: str,
    results: Mapping[str, Mapping[str, float]],
    training: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]] = (),
    base_model: str = MINILM,
) -> None:
    """Write the card of an adapter, and its pictures.

    Args:
        model: The trained model.
        folder: The adapter's folder.
        module: The example that trains it.
        title: Heading of the card.
        usage: Code that loads the adapter and runs it.
        results: Task -> metric -> value, on the test rows.
        training: Facts about the training.
        log_history: What ``Trainer`` logged.
        base_model: The base model's name on the Hub.
    """
    pictures = plot(model, folder / "figures", log_history=log_history or None, formats=("png",))
    write_card(
        model,
        folder,
        overwrite=True,
        title=title,
        base_model=base_model,
        usage=usage,
        results=results,
        training={
            "command": f"python -m {module}",
            **training,
            "hardware": hardware(model.device),
            "versions": versions(),
        },
        diagnosis=diagnose(model),
        figures={FIGURES[path.stem]: f"figures/{path.name}" for path in pictures},
        language="en",
        limits=LIMITS,
    )
