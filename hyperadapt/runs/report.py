"""Card and pictures of a run, from its record."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperadapt.cards.card import may_be_written_anew, write_card
from hyperadapt.cards.snippets import is_on_the_hub
from hyperadapt.diagnosis import diagnose
from hyperadapt.runs.run import Run

# Of each picture, what a card calls it.
FIGURES = {
    "task_map": "The tasks' embeddings",
    "cosines": "Cosines between the tasks' updates",
    "update_norms": "Norms of the updates",
    "singular_values": "Singular values of the updates, before and after normalisation",
    "training": "Training",
}
_MEASURED = ("accuracy", "loss")


def publish_files(run: Run, folder: Path, *, figures: bool = True) -> None:
    """Write the card of a run into its folder, and the pictures if matplotlib is installed.

    A card that does not say that it may be rewritten keeps its text, and its metadata are completed.

    Args:
        run: The run.
        folder: Its folder.
        figures: Whether to draw the pictures, or to keep those that are there.
    """
    pictures = folder / "figures"
    if figures and importlib.util.find_spec("matplotlib") is not None:
        from hyperadapt.plots import plot

        plot(run.model, pictures, log_history=run.record.log_history)
    with warnings.catch_warnings():
        # The card itself says it.
        warnings.filterwarnings("ignore", message="All updates of adapter|The hypernetwork of adapter")
        diagnosis = diagnose(run.model)
    write_card(
        run.model,
        folder,
        overwrite=may_be_written_anew(folder),
        results=_results(run.record.results),
        split=run.record.results["split"],
        datasets=sorted({task.dataset for task in run.recipe.tasks.values() if is_on_the_hub(task.dataset)}),
        training=run.record.training,
        diagnosis=diagnosis,
        figures={
            title: f"figures/{name}.png" for name, title in FIGURES.items() if (pictures / f"{name}.png").exists()
        },
        **run.recipe.card,
    )


def _results(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {name: values[name] for name in _MEASURED if values.get(name) is not None}
        for task, values in results["tasks"].items()
    }
