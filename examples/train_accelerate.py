"""Many tasks in a training loop of one's own, with Accelerate: `accelerate launch -m examples.train_accelerate`.

It can be stopped and resumed at any step. Launch files for several devices are in `examples/accelerate`.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from examples.support import accelerate_runs as runs
from examples.support.cards import save_classifier_card
from examples.support.data import TextData
from examples.support.encoder import load_base
from hyperadapt import HyperAdapterConfig
from hyperadapt.trainer import TaskCollator, TaskSampler

TASKS = ("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent", "stereoset_rel", "trump_clinton", "bbc")
MODULES = {"target_modules": "all-linear", "exclude_modules": ["classifier"], "modules_to_save": ["classifier"]}


def main() -> None:
    """Train, evaluate and save."""
    options, settings = runs.parse_options(__doc__)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate,
        mixed_precision=options.mixed_precision,
        log_with=options.log_with,
        project_dir=options.output,
        step_scheduler_with_optimizer=False,
    )
    settings["processes"] = accelerator.num_processes
    accelerator.init_trackers("hyperadapt", settings)
    accelerator.print(f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}")
    set_seed(0)
    data = TextData(TASKS, max_length=40, train=options.rows, test=options.rows // 5)
    config = HyperAdapterConfig(tasks=data.descriptions, **MODULES)
    model = get_peft_model(load_base(data.num_labels, seed=0), config).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=options.learning_rate)
    rows, collator = data.mixed("train"), TaskCollator(data.collator)
    sampler = TaskSampler(rows["tasks"], options.batch_size, temperature=2.0, seed=0)
    # Its own generator: a loader draws a seed whenever it starts, which would move the state that dropout reads.
    loader = DataLoader(rows, options.batch_size, sampler=sampler, collate_fn=collator, generator=torch.Generator())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule, progress = get_linear_schedule_with_warmup(optimizer, options.steps // 16, options.steps), runs.Progress()
    accelerator.register_for_checkpointing(schedule, progress)
    if options.resume:
        accelerator.load_state(str(options.output / "state"))
        accelerator.print(f"resumed at step {progress.step}")
    for batch in runs.remaining_batches(accelerator, loader, sampler, progress, options.steps):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            schedule.step()
            progress.step += 1
            if progress.step % 20 == 0:
                runs.log_loss(accelerator, progress, loss, schedule.get_last_lr()[0])
            if progress.step % options.save_every == 0:
                runs.save_state(accelerator, options.output / "state")

    scores, folder = runs.test_accuracies(accelerator, model, data, progress.step), options.output / "hyperadapter"
    weights, is_main = accelerator.get_state_dict(model), accelerator.is_main_process
    accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights, is_main_process=is_main)
    if is_main:
        # Of the file, since the model may be spread over processes.
        saved = PeftModel.from_pretrained(load_base(data.num_labels, seed=0), folder).eval()
        results = {name: {"accuracy": value} for name, value in scores.items()}
        save_classifier_card(saved, folder, "train_accelerate", data, results, **settings)
    accelerator.end_training()


if __name__ == "__main__":
    main()
