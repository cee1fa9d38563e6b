"""A trained adapter with its recipe and record."""

from hyperadapt.runs.record import Record
from hyperadapt.runs.run import Run, add_task, evaluate, load_model, load_record, load_run, save_record, save_run, train

__all__ = [
    "Record",
    "Run",
    "add_task",
    "evaluate",
    "load_model",
    "load_record",
    "load_run",
    "save_record",
    "save_run",
    "train",
]
