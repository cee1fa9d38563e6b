"""The study of few texts: what a concept gets, where the arms start, and that it runs and goes on where it was."""

from pathlib import Path

import pytest
import torch

from benchmarks.common.rows import read_rows
from benchmarks.concepts.arms import ARMS as CONCEPT_ARMS
from benchmarks.concepts.data import ConceptData, load_data
from benchmarks.concepts.plan import OURS
from benchmarks.concepts.runs import margins_of
from benchmarks.concepts_shots import __main__ as study
from benchmarks.concepts_shots.arms import ARMS, DESCRIPTION, EXAMPLES, FROM_ANOTHER, FROM_ITS, LOGISTIC, NEW, Shots
from benchmarks.concepts_shots.plan import Run, Study
from tests.support.tolerances import COSINE_BFLOAT16


@pytest.fixture(scope="module")
def data() -> ConceptData:
    try:
        return load_data(study.FAST.size)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shots(data: ConceptData, tmp_path_factory: pytest.TempPathFactory) -> Shots:
    return Shots(data, study.FAST, 1, tmp_path_factory.mktemp("shots"))


def test_texts_are_a_yes_and_a_no_in_turn_and_not_those_that_are_asked(shots: Shots) -> None:
    data = shots.data
    for task in data.tasks["test"]:
        if task.family != "atomic":
            continue
        rows = data.evaluation(task, "test", study.FAST.amount.most(task))
        assert rows is not None
        four, eight = shots.chosen(task, "test", 4), shots.chosen(task, "test", 8)
        assert four is not None
        assert eight is not None
        assert eight[:4] == four
        assert len(set(eight)) == 8
        assert not set(eight) & set(rows[0])
        assert [task.answer(data.texts[place].tags) for place in eight] == 4 * [True, False]
        assert {data.texts[place].role for place in eight} == {"test"}
        assert shots.chosen(task, "test", 400) is None


def test_a_lora_starts_where_the_hyperadapter_stands(shots: Shots) -> None:
    data, places = shots.data, list(range(6))
    task = next(task for task in data.tasks["test"] if task.family == "atomic")
    margins = margins_of(shots.reader, CONCEPT_ARMS[OURS], data, shots.tasks)
    told = {FROM_ITS: shots.evaluation.true(task), FROM_ANOTHER: shots.evaluation.wrong(task)["shuffled"]}
    expected = {arm: margins(places, *texts) for arm, texts in told.items()}
    assert not torch.equal(expected[FROM_ITS], expected[FROM_ANOTHER])
    started = {}
    for arm in (NEW, FROM_ITS, FROM_ANOTHER):
        model = shots._started(arm, task).eval()
        with torch.no_grad():
            logits = model(**data.padded(places)).logits
        started[arm] = logits[:, 1] - logits[:, 0]
        assert model.get_nb_trainable_parameters()[0] > 0
    for arm, values in expected.items():
        torch.testing.assert_close(started[arm], values, rtol=0, atol=COSINE_BFLOAT16)
    # A LoRA of one rank and placement.
    assert len({shots._started(arm, task).get_nb_trainable_parameters()[0] for arm in started}) == 1


def test_study_runs_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: ConceptData
) -> None:
    monkeypatch.setattr(study, "load_data", lambda size, cache: data)
    command = ["concepts_shots", "--fast", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    study.main()
    rows = read_rows(tmp_path / "shots.jsonl")
    made = Study(tmp_path, study.FAST)
    assert made.rate(FROM_ANOTHER) == made.rate(FROM_ITS)
    counts = {arm: [n for n in (4, 8) if n >= one.least] if one.reads_texts else [0] for arm, one in ARMS.items()}
    assert {made.run_of(row) for row in rows} == {
        *(Run("tune", 1, LOGISTIC, 4, rate) for rate in study.FAST.logistic_rates),
        *(Run("tune", 1, arm, 4, rate) for arm in (NEW, FROM_ITS) for rate in study.FAST.lora_rates),
        *(Run("test", 1, arm, n, made.rate(arm)) for arm in ARMS for n in counts[arm]),
    }
    for row in rows:
        assert set(row["scores"]) == ({"1", "2"} if ARMS[row["arm"]].is_lora else {"0"})
    output = capsys.readouterr().out
    assert "LoRA from its description - new LoRA" in output
    kept = {path.name for path in tmp_path.iterdir()}
    assert len([name for name in kept if name.endswith(".pt")]) == 2
    study.main()
    assert output.endswith(capsys.readouterr().out)
    # What was kept gives the same scores again.
    (tmp_path / "shots.jsonl").unlink()
    monkeypatch.setattr("sys.argv", [*command, "--stage", "test", "--arm", DESCRIPTION, EXAMPLES])
    study.main()
    again = {made.run_of(row): row["scores"] for row in read_rows(tmp_path / "shots.jsonl")}
    assert len(again) == 3
    assert again == {made.run_of(row): row["scores"] for row in rows if row["arm"] in (DESCRIPTION, EXAMPLES)}
    monkeypatch.setattr("sys.argv", ["concepts_shots", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has rows of another definition of the study, \w+, which is \w+ now"):
        study.main()
