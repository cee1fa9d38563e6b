"""Card and pictures of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from peft import PeftModel

from hyperadapt.cards.card import CARD, card_text, may_be_written_anew
from hyperadapt.cards.sections import code
from hyperadapt.cards.snippets import is_on_the_hub
from hyperadapt.diagnosis import Diagnosis
from hyperadapt.files import whole_folder
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.recipes.recipe import Recipe
from hyperadapt.runs.record import Record

# Of each picture, what a card calls it.
FIGURES = {
    "task_map": "The tasks' embeddings",
    "cosines": "Cosines between the tasks' updates",
    "update_norms": "Norms of the updates",
    "singular_values": "Singular values of the updates, before and after normalisation",
    "training": "Training",
}
_MEASURED = ("accuracy", "majority", "loss")
_KINDS = ("png", "svg")


def write_report(
    model: PeftModel | HyperAdapterNetwork,
    recipe: Recipe,
    record: Record,
    folder: Path,
    diagnosis: Diagnosis,
    *,
    figures: bool,
) -> None:
    """Write a run's card into its folder, with new pictures if matplotlib is installed.

    A card that does not say that it may be rewritten keeps its text, and gets the metadata that it lacks. Without
    `figures`, the card shows the pictures that are there.
    """
    with whole_folder(folder) as new:
        card = _report(model, recipe, record, folder, diagnosis, new, figures)
        (new / CARD).write_text(card, encoding="utf-8")


def _report(
    model: PeftModel | HyperAdapterNetwork,
    recipe: Recipe,
    record: Record,
    folder: Path,
    diagnosis: Diagnosis,
    new: Path,
    figures: bool,
) -> str:
    """Draw the pictures into the folder `new`, and compose the card for `folder`."""
    pictures = folder / "figures"
    if figures and importlib.util.find_spec("matplotlib") is not None:
        from hyperadapt.plots import make_figures, save_figures

        pictures = new / "figures"
        pictures.mkdir()
        save_figures(
            make_figures(model, diagnosis, record.log_history, record.training.get("chosen_by")), pictures, _KINDS
        )
    results = {
        task: {name: values[name] for name in _MEASURED if values.get(name) is not None}
        for task, values in record.results.get("tasks", {}).items()
        if task in diagnosis.tasks
    }
    weak = [name for name in record.results.get("no_better_than_majority", ()) if name in results]
    limits = [f"Task {code(name)} is no better than always giving its most frequent answer." for name in weak]
    card = {name: value for name, value in recipe.card.items() if name != "show_inputs"}
    return card_text(
        model,
        folder,
        overwrite=may_be_written_anew(folder),
        prompts={name: prompt for name, prompt in record.prompts.items() if name in recipe.tasks},
        labels={name: task.labels for name, task in recipe.tasks.items() if task.labels},
        results=results,
        split=record.results.get("split", "test"),
        datasets=sorted({task.dataset for task in recipe.tasks.values() if is_on_the_hub(task.dataset)}),
        training=record.training,
        diagnosis=diagnosis,
        figures={
            title: f"figures/{name}.png" for name, title in FIGURES.items() if (pictures / f"{name}.png").exists()
        },
        **{**card, "limits": [*limits, *recipe.card.get("limits", ())]},
    )
