"""transformers' Trainer for many tasks."""

from hyperadapt.trainer.batches import TASK_COLUMN, TaskCollator, TaskSampler, concatenate_tasks
from hyperadapt.trainer.chats import split_chats
from hyperadapt.trainer.checkpoints import WholeCheckpointsMixin
from hyperadapt.trainer.trainer import HyperAdapterTrainer, TaskTrainerMixin

__all__ = [
    "TASK_COLUMN",
    "HyperAdapterTrainer",
    "TaskCollator",
    "TaskSampler",
    "TaskTrainerMixin",
    "WholeCheckpointsMixin",
    "concatenate_tasks",
    "split_chats",
]
