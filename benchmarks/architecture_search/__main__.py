"""One hypernetwork for the architecture search of adapters: `python -m benchmarks.architecture_search`.

A candidate is a rank and a set of target modules: 3 ranks times 6 sets. A hyperadapter has one "task" for each
candidate, and so generates the weights of all of them; each generated update is cut to its candidate's rank and modules
before it is normalised. It is trained once, every row of a batch with a random candidate. The search then reads every
candidate's accuracy on validation rows, and picks the best. What that ranking is worth is told by the candidates'
accuracy on test rows when each is trained alone, as plain LoRA: the truth is the mean over the seeds of that.

The base model is MiniLM, which scores class names, and the data set trec6 (6 classes of questions, up to 16 tokens).
The lower three layers are frozen and computed once; the modules are those of the upper three. Arms:

- soft_frobenius, none: the search, normalised (with the default bound) or not.
- shared weights: as none, but the candidates' embeddings are equal and fixed: all candidates are cuts of one adapter,
  so it tells what generating weights for each candidate adds.
- parameter count: ranks the candidates by their number of parameters, and trains nothing.
- alone: trains every candidate. One seed ranks them by validation accuracy; its truth is the other seeds' mean.

All runs have batches of 16 rows, and AdamW at a rate that falls linearly to zero after a warm-up. A search sees 3,200
rows for all candidates together, a candidate that is trained alone 960. The highest rate of each arm is the best of
0.003, 0.01 and 0.03 by the mean validation accuracy of all candidates with seed 100, which is no seed of the study:

                    0.003   0.01   0.03
    soft_frobenius   81.5   82.1   72.7
    none             82.5   77.6   36.2
    shared weights   83.1   73.4   34.2
    alone            74.9   86.1   69.6
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.architecture_search.report import judge_all, report
from benchmarks.architecture_search.runs import SearchData, all_candidates, search, train_alone
from benchmarks.common.rows import environment, save_rows

RANKS = (2, 4, 8)
RATES = {"soft_frobenius": 0.01, "none": 0.003, "shared weights": 0.003, "alone": 0.01}
FAST: dict[str, Any] = {"search_steps": 2, "steps": 1, "seeds": [0], "alone_seeds": [0, 1], "rows": 16, "ranks": [2]}


def main() -> None:
    """Search, train all candidates alone, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search-steps", type=int, default=200, help="steps of a search, for all candidates together")
    parser.add_argument("--steps", type=int, default=60, help="steps of a candidate that is trained alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the searches")
    parser.add_argument("--alone-seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--rows", type=int, default=5000, help="most rows of a split")
    parser.add_argument("--fast", action="store_true", help="one rank, two steps: a test")
    parser.add_argument("--output", "--results", type=Path, default=Path("runs/architecture_search"))
    options = parser.parse_args()
    if options.fast:
        vars(options).update(FAST)
    # Read first: the code may be another by the end of a long run.
    shared, rows = environment(), []
    data, candidates = SearchData(options.rows), all_candidates(options.ranks)
    for arm, rate in RATES.items():
        steps = options.steps if arm == "alone" else options.search_steps
        for seed in options.alone_seeds if arm == "alone" else options.seeds:
            if arm == "alone":
                run = train_alone(data, candidates, steps, rate, seed)
            else:
                run = search(arm, data, candidates, steps, rate, seed)
            rows.append({"arm": arm, "seed": seed, "rate": rate, "steps": steps, **run})
            print(f"{arm}, seed {seed}: {run['seconds']:.0f} CPU seconds", flush=True)
    judged = judge_all(rows)
    save_rows(options.output / "architecture_search.jsonl", [shared | row for row in judged])
    report(judged, options.output)


if __name__ == "__main__":
    main()
