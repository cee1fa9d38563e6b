"""Tasks that were never trained, by description or by a few examples: `python -m benchmarks.transfer`.

MiniLM, which scores class names, is adapted on ten tasks. The others are near (sentiment in editorials, after three
other sorts of sentiment), new in topics (sections of the BBC) and far (Trump or Clinton). All arms see the same
training batches and the same examples, and the trained ones have about as many trainable parameters.

- majority: the most frequent class. base: no adapter.
- lora: one LoRA for all tasks. poly: PEFT's Poly, with the mean of the trained tasks' routing for new ones.
- hyperadapt true, shuffled, random, blank: a task is added by its own description, by that of another task, by an
  unrelated text, or by a dash.
- hyperadapt, examples: only a new task embedding is fitted. lora r=8, examples: a new LoRA.

The baselines' settings were chosen on the trained tasks alone; see ``transfer_baselines``.
A row is (arm, task, seed, n examples, accuracy, seconds). Each seed and part has its own file, and is skipped if that
is there; several processes may share the seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import read_rows, save_rows
from benchmarks.transfer_arms import ARMS, add_hyperadapter
from benchmarks.transfer_data import TransferData, load_data
from benchmarks.transfer_report import report

TRAINED_TASKS = (
    *("trec6", "sms_spam", "tweet_sent", "product_sent", "movie_sent"),
    *("newsgroups20", "reuters_r8", "privacy_qa", "stereoset_rel", "medmcqa_subject"),
)
HELD_OUT_TASKS = ("nyt_sent", "bbc", "trump_clinton")
FAST = {"steps": 3, "rows": 40, "test_rows": 20, "seeds": [0], "examples": [8]}
SETTINGS = ("steps", "rows", "test_rows", "examples")
PORTALLIB = (
    "left out: portallib 0.2.1, the nearest package (task latents to LoRA). It requires huggingface_hub<2, which "
    "transformers 5.23 excludes here, and adapts the projections of decoder-only language models alone."
)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=4000, help="training rows per task at most")
    parser.add_argument("--test-rows", type=int, default=200, help="test rows per task at most")
    parser.add_argument("--examples", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--overwrite", action="store_true", help="run again what has a file")
    parser.add_argument("--report", action="store_true", help="only read the files, print and plot")
    parser.add_argument("--fast", action="store_true", help="two trained tasks, one other, a few steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    options = parser.parse_args()
    print(PORTALLIB)
    if not options.report:
        if options.fast:
            vars(options).update(FAST)
        run(options, TRAINED_TASKS[:2] if options.fast else TRAINED_TASKS, HELD_OUT_TASKS[: 1 if options.fast else 3])
    report(options.output)


def run(options: argparse.Namespace, trained: Sequence[str], held_out: Sequence[str]) -> None:
    """Run the seeds and arms that have no file yet.

    Args:
        options: The command's options.
        trained: Names of the trained tasks.
        held_out: Names of the other ones.
    """
    todo = [(seed, arm) for seed in options.seeds for arm in options.arms if _is_missing(seed, arm, options)]
    if not todo:
        return
    started = time.monotonic()
    data = load_data(trained, held_out, rows=options.rows, test_rows=options.test_rows)
    print(f"data: {time.monotonic() - started:.0f} s", flush=True)
    options.parameters = _parameters(data)
    for seed, arm in todo:
        started = time.monotonic()
        rows = []
        for row in ARMS[arm](data, options, seed):
            rows.append({"seed": seed, **row, **{name: getattr(options, name) for name in SETTINGS}})
            print(
                f"seed {seed}: {row['arm']}, {row['task']}, n={row['n']}: accuracy {row['accuracy']:.3f}, "
                f"{row['seconds']:.1f} s",
                flush=True,
            )
        save_rows(_path(seed, arm, options), rows)
        print(f"seed {seed}: {arm}: {time.monotonic() - started:.0f} s in all", flush=True)


def _is_missing(seed: int, arm: str, options: argparse.Namespace) -> bool:
    path = _path(seed, arm, options)
    if options.overwrite or not path.exists():
        return True
    [row, *_] = read_rows(path)
    for name in SETTINGS:
        if row[name] != getattr(options, name):
            raise SystemExit(
                f"{path} was made with {name}={row[name]}, not {getattr(options, name)}. Choose another --output, or "
                "--overwrite it."
            )
    print(f"seed {seed}: {arm}: done before")
    return False


def _path(seed: int, arm: str, options: argparse.Namespace) -> Path:
    path: Path = options.output / f"rows_{seed}_{arm}.jsonl"
    return path


def _parameters(data: TransferData) -> int:
    """Trainable parameters of the hyperadapter, which the other arms match."""
    trainable, _ = add_hyperadapter(data, seed=0).get_nb_trainable_parameters()
    return int(trainable)


if __name__ == "__main__":
    main()
