"""A training run that can be told to kill itself: ``python -m tests.support.killed_run FOLDER KILL``.

KILL is ``never``, ``step N`` (after that step), ``event SAVE N`` (at the N-th event of the file system while the
SAVE-th checkpoint of this process is written) or ``time SAVE SECONDS`` (that long after it was begun).
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hyperadapt.trainer import HyperAdapterTrainer
from tests.support.helpers import TASKS, adapted_model, adapter_parameters, example_batch

STEPS = 102
SAVE_STEPS = 3


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledTrainer(HyperAdapterTrainer):
    def __init__(self, when: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.when = when
        self.saves = 0
        self.is_inside = False
        if when[0] == "event":
            sys.addaudithook(self.count)

    def count(self, event: str, args: Any) -> None:
        if self.is_inside and self.saves == int(self.when[1]) and event.split(".")[0] in ("open", "os", "shutil"):
            self.events += 1
            if self.events == int(self.when[2]):
                kill()

    def _save_checkpoint(self, *args: Any) -> None:
        self.saves += 1
        self.events = 0
        if self.when[0] == "time" and self.saves == int(self.when[1]):
            threading.Timer(float(self.when[2]), kill).start()
        self.is_inside = True
        super()._save_checkpoint(*args)
        self.is_inside = False


class KillAfterStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kill()


def main() -> None:
    folder, when = Path(sys.argv[1]), sys.argv[2:]
    rows = {}
    for index, task in enumerate(TASKS):
        batch = example_batch("bert", rows=5 + 4 * index, seed=index)
        rows[task] = Dataset.from_dict({key: value.tolist() for key, value in batch.items()})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=SAVE_STEPS,
        save_total_limit=None if when[0] == "never" and not folder.exists() else 2,
        logging_steps=1,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    # Dropout depends on the state of the generators.
    model = adapted_model("bert", lora_dropout=0.1, active=False)
    callbacks = [KillAfterStep(int(when[1]))] if when[0] == "step" else []
    trainer = KilledTrainer(
        when, model=model, args=arguments, train_dataset=rows, temperature=2, max_tasks_per_batch=2, callbacks=callbacks
    )
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        save_final(folder, model)
    # Not an orderly end: a thread of gloo's that then asks for the interpreter's lock aborts the process or hangs.
    sys.stderr.flush()
    os._exit(0)


def save_final(folder: Path, model: PeftModel) -> None:
    save_file({name: value.detach() for name, value in adapter_parameters(model).items()}, folder / "final.safetensors")


if __name__ == "__main__":
    main()
