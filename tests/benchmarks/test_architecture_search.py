"""The architecture search cuts adapters to their candidates, and its report says what follows from the accuracies."""

import itertools
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from benchmarks.architecture_search import __main__ as architecture_search
from benchmarks.architecture_search.report import judge, judge_all
from benchmarks.architecture_search.runs import (
    TARGETS,
    Candidate,
    SearchData,
    accuracy,
    all_candidates,
    build_alone,
    build_search,
)
from benchmarks.common.rows import read_rows
from examples.support.text_tasks import encoder_path
from hyperadapt import normalize
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.tuner.active import find_tuner
from tests.support.helpers import full_core

CANDIDATES = all_candidates([2, 4, 8])


@pytest.fixture(scope="module")
def data() -> SearchData:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return SearchData(rows=16)


def network_of(arm: str, data: SearchData) -> HyperAdapterNetwork:
    """The network of a search whose heads of B are not zero."""
    network = find_tuner(build_search(arm, data, CANDIDATES, seed=0)).router.network("default")
    for name, head in network.hypernetwork.heads.items():
        if name.startswith("B"):
            torch.nn.init.normal_(head.weight)
    return network


@torch.no_grad()
@pytest.mark.parametrize("arm", ["soft_frobenius", "none"])
def test_updates_have_their_candidates_rank_and_modules(data: SearchData, arm: str) -> None:
    network = network_of(arm, data)
    # Neither all candidates nor in order, as in a batch.
    asked = [CANDIDATES.index(Candidate(*pair)) for pair in [(4, "all"), (2, "query, value"), (8, "query")]]
    generated = network(torch.tensor(asked))
    assert len(generated) == 3 * 6
    for name, factors in generated.items():
        ranks = torch.linalg.matrix_rank(factors.delta_weight(), rtol=1e-4).tolist()
        assert ranks == [4, 2 if "query" in name or "value" in name else 0, 8 if "query" in name else 0], name

    # The core is that of the cut factors: a norm that saw the others would be another.
    name = next(iter(generated))
    factors = generated[name]
    options = network.config.normalization_options
    # Nothing has been trained, so the warm-up is in its first step.
    bound = {"bound": options["bound"] / options["warmup"] * network.base_norms[0]} if options else {}
    r = 2
    expected = normalize(factors.lora_A[1, :r], factors.lora_B[1, :, :r], arm, **bound)
    torch.testing.assert_close(full_core(factors)[1, :r, :r], expected)


@torch.no_grad()
def test_shared_weights_are_cuts_of_one_adapter(data: SearchData) -> None:
    first, last = 0, CANDIDATES.index(Candidate(8, "query"))
    assert CANDIDATES[first] == Candidate(2, "query")
    for arm, is_shared in (("shared weights", True), ("none", False)):
        for name, factors in network_of(arm, data)(torch.tensor([first, last])).items():
            if "query" in name:
                assert torch.equal(factors.lora_A[0, :2], factors.lora_A[1, :2]) == is_shared


def test_a_candidate_alone_has_the_modules_of_its_cut(data: SearchData) -> None:
    # Hidden size 384, and 1536 in between; three layers.
    sums = {"query": 768, "value": 768, "query, value": 2 * 768, "attention but key": 3 * 768}
    sums = {name: 3 * total for name, total in sums.items()}
    sums |= {"all of the last layer": 4 * 768 + 2 * 1920, "all": 3 * (4 * 768 + 2 * 1920)}
    assert sums.keys() == TARGETS.keys()
    for targets, total in sums.items():
        model = build_alone(Candidate(4, targets), data, seed=0)
        assert model.get_nb_trainable_parameters()[0] == 4 * total, targets
    # Both start at the base model.
    search = build_search("soft_frobenius", data, CANDIDATES, seed=0).eval()
    assert accuracy(search, data.validation, 3) == accuracy(model.eval(), data.validation, None)


def test_judge_by_plain_calculation() -> None:
    scores = dict(zip("abcde", (0.1, 0.4, 0.3, 0.9, 0.5), strict=True))
    truth = dict(zip("abcde", (0.2, 0.3, 0.5, 0.8, 0.9), strict=True))
    judged = judge(scores, truth)
    agree = [(scores[x] - scores[y]) * (truth[x] - truth[y]) > 0 for x, y in itertools.combinations("abcde", 2)]
    assert judged["kendall"] == pytest.approx(fmean(1 if both else -1 for both in agree))
    # Ranks 1 3 2 5 4 and 1 2 3 4 5: 1 - 6 · Σd² / (n · (n² - 1)).
    assert judged["spearman"] == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert judged["pick"] == "d"
    assert judged["regret"] == pytest.approx(0.9 - 0.8)
    assert judged["random_regret"] == pytest.approx(0.9 - 2.7 / 5)
    assert judge(dict.fromkeys("abcde", 0.5), truth)["kendall"] == 0


def test_the_truth_of_a_run_alone_is_the_other_seeds() -> None:
    def alone(seed: int, first: float, second: float) -> dict[str, Any]:
        test = {"x": first, "y": second}
        return {"arm": "alone", "seed": seed, "parameters": {"x": 1, "y": 2}, "validation": test, "test": test}

    runs = [{"arm": "none", "seed": 0, "validation": {"x": 0.1, "y": 0.2}}, alone(0, 0.9, 0.1), alone(1, 0.4, 0.5)]
    search, count, first, second = judge_all(runs)
    # Means 0.65 and 0.3.
    assert (search["pick"], search["kendall"], search["regret"]) == ("y", -1, pytest.approx(0.35))
    assert (count["arm"], count["pick"], count["regret"]) == ("parameter count", "y", pytest.approx(0.35))
    assert (first["pick"], first["regret"]) == ("x", pytest.approx(0.1))
    assert (second["pick"], second["regret"]) == ("y", pytest.approx(0.8))


def test_fast_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: SearchData
) -> None:
    monkeypatch.setattr(architecture_search, "SearchData", lambda rows: data)
    monkeypatch.setattr("sys.argv", ["architecture_search", "--fast", "--output", str(tmp_path)])
    architecture_search.main()
    rows = read_rows(tmp_path / "architecture_search.jsonl")
    assert [row["arm"] for row in rows] == [
        "soft_frobenius",
        "none",
        "shared weights",
        "parameter count",
        "alone",
        "alone",
    ]
    names = [f"{targets}; r = 2" for targets in TARGETS]
    for row in rows:
        assert row["pick"] in names
        assert row["commit"]
        if row["arm"] != "parameter count":
            assert list(row["validation"]) == names
            assert all(0 <= value <= 1 for value in row["validation"].values())
    # With its embeddings fixed, a search trains 64 numbers less for each candidate.
    assert rows[1]["parameters"] - rows[2]["parameters"] == 64 * len(names)
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        [line] = [line for line in lines if line.startswith(name)]
        assert line.removeprefix(name).split()[0] == f"{rows[-1]['parameters'][name]:,}"
    [line] = [line for line in lines if line.startswith("alone ")]
    assert line.split()[1] == "2"
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".svg"}
