"""New tasks by description, where nothing but the description names them: `python -m benchmarks.concepts`.

165 concepts that a text can have (fine classes of questions, topics of newswire and of posts, subjects of exams,
sections of news, and what can be computed from the text) give yes/no tasks: each alone, its contrary, one OR another,
one RATHER THAN another. The input is the text alone, and all tasks share two logits, so that every text has tasks that
it answers yes and tasks that it answers no. 34 whole concepts are held out, with their texts and all of their
compositions, and 16 more to choose learning rates on; of what is trained, some wordings are.

The upper layers of MiniLM are adapted; the lower ones are frozen, and computed once for all runs. The arms:

- hyperadapter, bilinear: the description makes the adapter, of which a part is its vector, in the space of the base
  model. A trained one is asked by true descriptions and by wrong ones: of another held-out concept of the same corpus
  (shuffled) or of another one, blank, an unrelated sentence, and that of the nearest trained task.
- hyperadapter: the same with the default, gated conditioning, which only projects the vector.
- hyperadapter, whitened: that, but the vectors of descriptions have the same size in all directions.
- lora: one LoRA for all tasks, which are not told.
- frozen cosine: of the base model's vectors of text and description; the threshold suits trained tasks best.
- cross-encoder: one LoRA, and the description stands behind the text in the input.
- bi-encoder: one LoRA for texts and descriptions, and their cosine.
- hyperadapter in bi-encoder, bilinear in bi-encoder: the text's side has the description's adapter, the description's
  side is frozen; asked also with the true description in the head and another one for the adapter.
- separate loras: one for each of some trained concepts, with a tenth of the steps each.
- poly: PEFT's Poly mixes eight LoRAs for each trained task; it knows no others.

``--stage tune`` runs the learning rates on the validation concepts, ``ablate`` some changes of the hyperadapter there,
``test`` the arms on the test concepts, ``curve`` the hyperadapter with fewer trained concepts; ``report`` prints the
tables, writes the rows and draws. Without --stage, all in order. Each run is a row, appended when it is done; runs
with a row are skipped.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.rows import Row
from benchmarks.concepts.arms import ARMS, VARIANTS
from benchmarks.concepts.data import ConceptData, Size, load_data
from benchmarks.concepts.evaluation import Amount
from benchmarks.concepts.plan import ALL, COSINE, OURS, SEPARATE, STAGES, Run, Settings, Study
from benchmarks.concepts.report import report
from benchmarks.concepts.runs import run_cosine, run_once, run_separate
from benchmarks.concepts.tasks import Task, subset, tasks_of

FAST = Settings(
    size=Size(corpora=("exams", "articles"), texts=24),
    amount=Amount(steps=2, tasks=2, atomic=3, others=0, trained=3),
    choosing=Amount(steps=1, tasks=2, atomic=3, others=0),
    arms={arm: rates[: 2 if arm == OURS else 1] for arm, rates in Settings().arms.items()},
    variants=("centred",),
    seeds=(1,),
    curve=(4,),
    separate=6,
)


def main() -> None:
    """Run what is missing of the stages, as long as there is time."""
    options = parse_options()
    torch.set_num_threads(1)
    study = Study(options.output, FAST if options.fast else Settings(), options.rate)
    deadline = time.monotonic() + 60 * options.minutes
    data: ConceptData | None = None
    for stage in options.stage or (*STAGES, "report"):
        if stage == "report":
            report(study, options.results or options.output)
            continue
        arms = [arm for arm in study.settings.arms if arm in (options.arm or study.settings.arms)]
        missing = study.missing(study.runs(stage, arms, options.seeds or study.settings.seeds))
        if not missing:
            continue
        data = data or load_data(study.settings.size, options.output)
        if not study.go_on(missing, partial(run_arm, study.settings, data), deadline):
            return


def parse_options() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=(*STAGES, "report"))
    parser.add_argument("--arm", nargs="+", choices=list(Settings().arms), help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the stages test and curve")
    parser.add_argument("--rate", type=float, help="instead of those that the stage tune chose")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--fast", action="store_true", help="one corpus and a few steps: a test")
    parser.add_argument("--output", type=Path, default=Path("runs/concepts"), help="folder of the rows")
    parser.add_argument("--results", type=Path, help="folder of the report's files; by default the same")
    return parser.parse_args()


def run_arm(settings: Settings, data: ConceptData, one: Run) -> Row:
    """What a run measures."""
    is_choosing = one.stage in ("tune", "ablate")
    role, amount = ("validation", settings.choosing) if is_choosing else ("test", settings.amount)
    tasks = data.trainable(data.tasks["train"] if one.concepts == ALL else tasks_of(subset(data.bank, one.concepts)))
    counts = {"trained_concepts": sum(task.family == "atomic" for task in tasks), "trained_tasks": len(tasks)}
    return counts | _measured(settings, data, one, tasks, role, amount)


def _measured(settings: Settings, data: ConceptData, one: Run, tasks: list[Task], role: str, amount: Amount) -> Row:
    if one.arm == COSINE:
        return run_cosine(data, tasks, role, one.seed, amount)
    if one.arm == SEPARATE:
        return run_separate(data, _some(data, settings.separate), one.rate, one.seed, amount)
    return run_once((ARMS | VARIANTS)[one.arm], data, tasks, role, one.rate, one.seed, amount)


def _some(data: ConceptData, count: int) -> list[Task]:
    """The tasks of so many trained concepts, those that the curve starts with."""
    names = {concept.name for concept in subset(data.bank, count)}
    return data.trainable(task for task in data.tasks["train"] if task.name in names)


if __name__ == "__main__":
    main()
