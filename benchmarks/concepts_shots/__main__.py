"""A concept that was never trained, from a few labelled texts: `python -m benchmarks.concepts_shots`.

The concepts are those of `benchmarks.concepts`, and so are the texts and what is adapted. A held-out concept gets n
texts, half of them to say yes to, and is tested on others. The arms:

- description: the hyperadapter that was trained on descriptions, by the concept's own; no text is needed.
- examples: a hyperadapter with ``task_embedding="examples"`` reads the n texts, 32 at most, in one forward pass.
- logistic regression: on the frozen base model's vectors.
- new LoRA: it starts from nothing, with a new head.
- LoRA from its description: plain PEFT, started from what the hyperadapter makes of the concept's description, with the
  hyperadapter's head; from another description: of another held-out concept of the same corpus.

The LoRAs have one rank and placement, see the same batches, and are measured after as many steps. ``--stage tune``
chooses each one's learning rate (of logistic regression, the inverse of the penalty) on the validation concepts;
``test`` runs the test concepts; ``report`` prints the tables and writes the rows. Without --stage, all three. A
row is one run (stage, seed, arm, n), appended when it is done; what has a row is skipped. The hyperadapters are trained
once for each seed, and kept beside the rows.
"""

from __future__ import annotations

import argparse
import time
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.common.rows import append_row, environment
from benchmarks.concepts.data import Size, load_data
from benchmarks.concepts.evaluation import Amount
from benchmarks.concepts_shots.arms import ARMS, Shots
from benchmarks.concepts_shots.plan import STAGES, Settings, Study
from benchmarks.concepts_shots.report import report

FAST = Settings(
    size=Size(corpora=("exams", "articles"), texts=24),
    amount=Amount(steps=2, tasks=2, atomic=3),
    counts=(4, 8),
    choosing=4,
    measured_after=(1, 2),
    lora_rates=(1e-3, 3e-3),
    seeds=(1,),
)


def main() -> None:
    """Run what is missing of the stages, as long as there is time."""
    options = parse_options()
    torch.set_num_threads(1)
    study = Study(options.output, FAST if options.fast else Settings())
    deadline = time.monotonic() + 60 * options.minutes
    for stage in options.stage or (*STAGES, "report"):
        if stage == "report":
            report(study, options.results or options.output)
        elif not run(study, stage, options, deadline):
            return


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=(*STAGES, "report"))
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS), help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the stage test")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run later")
    parser.add_argument("--fast", action="store_true", help="two corpora and a few steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/concepts"), help="folder of the rows")
    parser.add_argument("--results", type=Path, help="folder of the report's file; by default the same")
    return parser.parse_args()


def run(study: Study, stage: str, options: argparse.Namespace, deadline: float) -> bool:
    """Run what has no row yet; False if the time was up before."""
    missing = study.missing(study.runs(stage, options.arm, options.seeds or study.settings.seeds))
    if not missing:
        return True
    data = load_data(study.settings.size, options.output)
    shots = lru_cache(maxsize=1)(lambda seed: Shots(data, study.settings, seed, options.output))
    shared = environment() | {"definition": study.settings.definition}
    for one in missing:
        if time.monotonic() > deadline:
            print("stopped: the time is up")
            return False
        started = time.process_time()
        scores = shots(one.seed).scores(one.arm, one.rate, one.n, STAGES[stage])
        row = one._asdict() | {"scores": scores, "cpu_seconds": round(time.process_time() - started, 1)}
        append_row(study.path, row | shared)
        print(*one, f"{row['cpu_seconds']} CPU seconds", flush=True)
    return True


if __name__ == "__main__":
    main()
