"""Logits of a saved adapter on the test texts, in a process of its own: `python -m examples.support.predict --help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from examples.support.encoder import encode, label_offsets, load_base, load_tokenizer, predict_logits
from examples.support.text_tasks import load_task


def main() -> None:
    """Load an adapter folder on a fresh base model, predict, and save the logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="adapter folder: a hyperadapter, or an exported LoRA")
    parser.add_argument("output", type=Path, help="safetensors file to write, `logits` of shape (rows, classes)")
    parser.add_argument("--plugin", action="store_true", help="import hyperadapt, which a hyperadapter needs")
    parser.add_argument("--tasks", nargs="+", required=True, help="names of all tasks of the shared classifier")
    parser.add_argument("--only", help="predict the test texts of this task alone")
    parser.add_argument("--rows", type=int, required=True, help="test rows per task")
    parser.add_argument("--max-length", type=int, required=True, help="tokens per row")
    options = parser.parse_args()

    if options.plugin:
        importlib.import_module("hyperadapt")
    tasks = [load_task(name) for name in options.tasks]
    tokenizer = load_tokenizer()
    model = PeftModel.from_pretrained(load_base(label_offsets(tasks)[-1], seed=1), options.folder).eval()
    encoded = encode(tasks, "test", tokenizer, max_rows=options.rows, max_length=options.max_length)
    logits = [
        predict_logits(model, rows if options.plugin else rows.remove_columns("tasks"), tokenizer)
        for name, rows in zip(options.tasks, encoded, strict=True)
        if options.only in (None, name)
    ]
    if not options.plugin and "hyperadapt" in sys.modules:
        raise RuntimeError("hyperadapt was imported, so this run does not show that plain peft is enough.")
    save_file({"logits": torch.cat(logits)}, options.output)


if __name__ == "__main__":
    main()
