"""What any trainer of transformers left beside an adapter: facts of the training, and results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

_STATE = "trainer_state.json"
_RESULTS = ("accuracy", "loss")


def trainer_state(directory: Path) -> Mapping[str, Any]:
    """The state that a trainer wrote into a folder, or into its last checkpoint there; empty if there is none."""
    last = get_last_checkpoint(str(directory)) if directory.is_dir() else None  # type: ignore[no-untyped-call]
    for folder in (directory, *([] if last is None else [Path(last)])):
        try:
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(state, dict) and isinstance(state.get("global_step"), int):
            history = state.get("log_history")
            entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
            if not directory.name.startswith("checkpoint-") and state.get("best_global_step") not in (
                None,
                state["global_step"],
            ):
                # Nothing tells whether the weights beside it are the last ones or the best ones.
                entries = [entry for entry in entries if not any(name.startswith("eval_") for name in entry)]
            return {**state, "log_history": entries}
    return {}


def training_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer's state says of the training, name -> number."""
    entries = state.get("log_history", ())
    rates = [entry["learning_rate"] for entry in entries if isinstance(entry.get("learning_rate"), float)]
    losses = [entry["loss"] for entry in entries if isinstance(entry.get("loss"), float)]
    epoch = state.get("epoch")
    facts = {
        "steps": state.get("global_step"),
        "best_step": state.get("best_global_step"),
        "epochs": round(epoch, 2) if isinstance(epoch, int | float) else None,
        "batch_size": state.get("train_batch_size"),
        # The highest that was logged: warm-up begins below it.
        "learning_rate": max(rates, default=None),
        "last_training_loss": losses[-1] if losses else None,
    }
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}


def last_results(log_history: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as last logged."""
    results: dict[str, dict[str, float]] = {}
    for entry in log_history:
        for task in tasks:
            start = f"eval_{task}_"
            values = {key.removeprefix(start): value for key, value in entry.items() if key.startswith(start)}
            found = {
                name: value for name, value in values.items() if name in _RESULTS and isinstance(value, int | float)
            }
            if found:
                results[task] = found
    return results
