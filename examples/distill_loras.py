"""Train one LoRA per text task, then fit all of them with one hyperadapter: `python -m examples.distill_loras`.

The LoRAs are independent, each with its own seed, and share nothing but the base model. The fit sees their folders
alone, no data. What counts is how much of their gain in accuracy the hyperadapter keeps, and how small its file is.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from examples.support.data import TextData
from examples.support.loras import WEIGHTS, report, save_distilled_card, score_distilled, score_lora, train_lora
from examples.support.matching import load_matcher
from hyperadapt import HyperAdapterConfig, distill

TASKS = (
    *("trec6", "sms_spam", "tweet_sent", "product_sent"),
    *("movie_sent", "reuters_r8", "stereoset_rel", "trump_clinton"),
)
FAST = {"tasks": list(TASKS[:3]), "lora_steps": 3, "steps": 10, "rows": 96}


def main() -> None:
    """Train the LoRAs, fit them, test what was saved and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--lora-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=600, help="of the fit")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of the fit")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--head", default="pair")
    parser.add_argument("--hypernetwork-dim", type=int, default=44)
    parser.add_argument("--rows", type=int, default=4000, help="training rows per task at most; an eighth for the test")
    parser.add_argument("--reuse-loras", action="store_true", help="keep the LoRAs of an earlier run in --output")
    parser.add_argument("--fast", action="store_true", help="three tasks and a few steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("runs/distill_loras"))
    options = parser.parse_args()
    if options.fast:
        vars(options).update(FAST)
    data = TextData(options.tasks, max_length=32, train=options.rows, test=options.rows // 8)
    # Half precision takes half of the time on a CPU that has it; the LoRAs' weights are float32 all the same.
    base = load_matcher(data.tasks, data.tokenizer, torch.bfloat16)
    folders = {name: options.output / "loras" / name for name in options.tasks}
    scores = {}
    for seed, (name, folder) in enumerate(folders.items()):
        if not (options.reuse_loras and (folder / WEIGHTS).exists()):
            train_lora(base, data["train"][name], data, folder, steps=options.lora_steps, seed=seed)
        scores[name] = score_lora(base, folder, name, data)

    torch.manual_seed(0)
    config = HyperAdapterConfig(
        r=options.r,
        lora_alpha=options.r,
        target_modules="all-linear",
        tasks=options.tasks,
        head=options.head,
        hypernetwork_dim=options.hypernetwork_dim,
    )
    model = get_peft_model(base, config)
    started = time.monotonic()
    fit = distill(model, folders, steps=options.steps, learning_rate=options.learning_rate)
    seconds = time.monotonic() - started

    folder = options.output / "hyperadapter"
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(model.unload(), str(folder)).eval()
    score_distilled(loaded, fit.error, scores, data)
    save_distilled_card(loaded, folder, scores, options)
    report(scores, options, data, seconds)


if __name__ == "__main__":
    main()
