"""A trained adapter with its recipe and record."""

from hyperadapt.runs.continuing import continue_run
from hyperadapt.runs.evaluation import evaluate
from hyperadapt.runs.new_task import AddedTask, add_task, lora_from_examples
from hyperadapt.runs.prediction import evaluate_predictions, predict
from hyperadapt.runs.record import Record
from hyperadapt.runs.run import Run, load_model, load_record, load_run, save_record, save_run
from hyperadapt.runs.training import train

__all__ = [
    "AddedTask",
    "Record",
    "Run",
    "add_task",
    "continue_run",
    "evaluate",
    "evaluate_predictions",
    "load_model",
    "load_record",
    "load_run",
    "lora_from_examples",
    "predict",
    "save_record",
    "save_run",
    "train",
]
