"""The concept study: its bank, what is held out, wrong descriptions, the arms at their start, and that it runs."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.common.neutral_texts import BLANK, UNRELATED
from benchmarks.common.rows import read_rows
from benchmarks.concepts import __main__ as study
from benchmarks.concepts.arms import ARMS, SCALE, SHIFT, build, centring, trained_wordings, whitening
from benchmarks.concepts.bank import CLASSES
from benchmarks.concepts.data import ConceptData, load_data
from benchmarks.concepts.evaluation import SHUFFLED_ADAPTER, Evaluation
from benchmarks.concepts.plan import COSINE, GATED, OURS, POLY, SEPARATE, WHITENED, Run, Study
from benchmarks.concepts.predicates import PREDICATES
from benchmarks.concepts.runs import best_threshold, draws, margins_of, share_of_rate
from benchmarks.concepts.tasks import CORPORA, FAMILIES, HELD_OUT, Concept, Task, concepts, subset, tasks_of
from tests.support.tolerances import COSINE_BFLOAT16, FLOAT32_DIFFERENCE


@pytest.fixture(scope="module")
def data() -> ConceptData:
    try:
        return load_data(study.FAST.size)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bank() -> list[Concept]:
    names = [f"{corpus}/{name}" for corpus, classes in CLASSES.items() for name in classes]
    return concepts(CORPORA, Counter(dict.fromkeys(names, 20)))


def test_the_bank_is_large_and_whole_concepts_are_held_out(bank: list[Concept]) -> None:
    roles = {concept.name: concept.role for concept in bank}
    counts = Counter(roles.values())
    assert len(roles) == len(bank) >= 140
    assert counts["test"] == sum(test for _, test in HELD_OUT.values()) >= 30
    assert counts["validation"] == sum(validation for validation, _ in HELD_OUT.values())
    tasks = tasks_of(bank)
    assert len({task.name for task in tasks}) == len(tasks)
    assert sum(task.family != "atomic" for task in tasks) >= 300
    assert {task.family for task in tasks} == set(FAMILIES)
    for task in tasks:
        assert {roles[part] for part in task.parts} == {task.role}
        assert len(set(task.wordings)) == 6
        assert all("{}" not in wording for wording in task.wordings)
    # No description means two tasks, and some of each trained one stay unseen.
    assert max(Counter(wording for task in tasks for wording in task.wordings).values()) == 1
    trained = {wording for task in tasks if task.role == "train" for wording in trained_wordings(task)}
    assert all(len(set(task.wordings) - trained) == 2 for task in tasks if task.role == "train")


def test_few_texts_keep_a_class_from_being_held_out() -> None:
    names = [f"questions/{name}" for name in CLASSES["questions"]]
    few = set(names[::2])
    bank = concepts(["questions"], Counter({name: 19 if name in few else 20 for name in names}))
    held_out = {concept.name for concept in bank if concept.role != "train"}
    assert len(held_out) == sum(HELD_OUT["questions"])
    assert not held_out & few
    # A class without texts is no concept.
    assert not concepts(["questions"], Counter())


def test_smaller_sets_of_trained_concepts_are_parts_of_larger_ones(bank: list[Concept]) -> None:
    small, large = ({concept.name for concept in subset(bank, count)} for count in (8, 16))
    assert small < large
    assert len(small) == 8
    assert {concept.role for concept in subset(bank, 64)} == {"train"}
    with pytest.raises(ValueError, match=r"1000 concepts are more than the \d+ trained ones"):
        subset(bank, 1000)


@pytest.mark.parametrize(
    ("family", "neither", "first", "second", "both"),
    [
        ("atomic", False, True, False, True),
        ("not", True, False, True, False),
        ("or", False, True, True, True),
        ("versus", None, True, False, None),
    ],
)
def test_answers(family: str, neither: bool | None, first: bool | None, second: bool | None, both: bool | None) -> None:
    parts = ("a", "b") if family in ("or", "versus") else ("a",)
    task = Task("x", family, "exams", parts, (), "train")
    answers = [task.answer(tags) for tags in (set(), {"a", "c"}, {"b"}, {"a", "b"})]
    assert answers == [neither, first, second, both]


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("digit", "In 1987", "In nineteen hundred"),
        ("negation", "Which is NOT true?", "A knot"),
        ("country", "the u.s. dollar", "the user"),
        ("short", "Who was Lacan ?", "one two three four five six seven eight nine"),
        ("long", " ".join("abcdefghijklmnop"), " ".join("abcdefghijklmno")),
        ("repetition", "rates of interest and rates of tax", "the rates of the tax"),
        ("hyphen", "two-handed", "a - b"),
    ],
)
def test_predicates(name: str, yes: str, no: str) -> None:
    assert PREDICATES[name](yes)
    assert not PREDICATES[name](no)


def test_held_out_texts_are_not_trained_and_all_texts_have_both_answers(data: ConceptData) -> None:
    roles = {concept.name: concept.role for concept in data.bank}
    trained = data.trainable(data.tasks["train"])
    places = {place for place, text in enumerate(data.texts) if text.role == "train"}
    assert len({text.text for text in data.texts}) == len(data.texts)
    for task in data.tasks["test"]:
        for pool in data.pools(task, "test"):
            for place in (*pool.yes, *pool.no):
                assert data.texts[place].role == "test"
                assert roles[data.texts[place].label] == "test"
    answers: dict[int, set[bool]] = {}
    for task in trained:
        for pool in data.pools(task, "train"):
            for answer, members in ((True, pool.yes), (False, pool.no)):
                for place in members:
                    answers.setdefault(int(place), set()).add(answer)
    assert answers.keys() == places
    assert all(seen == {True, False} for seen in answers.values())


def test_draws_are_balanced_right_and_the_same_again(data: ConceptData) -> None:
    tasks, amount = data.trainable(data.tasks["train"]), replace(study.FAST.amount, steps=40)
    steps = list(draws(data, tasks, amount, 3, 0.75))
    assert len(steps) == 40
    for step in steps:
        for place, label, task in zip(step.places, step.labels.tolist(), 2 * step.tasks, strict=True):
            assert task.answer(data.texts[place].tags) is bool(label)
            assert data.texts[place].role == "train"
        assert all(wording in trained_wordings(task) for task, wording in zip(step.tasks, step.wordings, strict=True))
    assert steps == list(draws(data, tasks, amount, 3, 0.75))
    assert steps != list(draws(data, tasks, amount, 4, 0.75))
    assert {task.family for step in steps[:30] for task in step.tasks} == {"atomic"}
    assert {task.family for step in steps[30:] for task in step.tasks} == set(FAMILIES)


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    shares = [share_of_rate(done) for done in (0.0, 0.025, 0.05, 0.5, 0.75, 0.875, 1.0)]
    assert shares == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0])


def test_wrong_descriptions_are_what_they_are_called(data: ConceptData) -> None:
    tasks = data.trainable(data.tasks["train"])
    owner = {wording: task for members in data.tasks.values() for task in members for wording in task.wordings}
    for seed in range(3):
        evaluation = Evaluation(data, ARMS[OURS], tasks, study.FAST.amount, seed)
        for task in data.tasks["test"]:
            true, head = evaluation.true(task)
            assert true == head
            assert owner[true] is task
            texts = {name: adapter for name, (adapter, head) in evaluation.wrong(task).items() if head == adapter}
            shuffled = owner[texts["shuffled"]]
            assert (shuffled.role, shuffled.family) == ("test", task.family)
            assert not set(shuffled.parts) & set(task.parts)
            if task.family == "atomic":
                assert shuffled.corpus == task.corpus != owner[texts["across corpora"]].corpus
                assert texts["blank"] == BLANK
                assert texts["unrelated"] in UNRELATED
                assert owner[texts["nearest trained"]].role == "train"
        in_head = Evaluation(data, ARMS["hyperadapter in bi-encoder"], tasks, study.FAST.amount, seed)
        for task in data.tasks["test"]:
            adapter, head = in_head.wrong(task)[SHUFFLED_ADAPTER]
            assert owner[head] is task is not owner[adapter]


def test_arms_start_at_the_base_model(data: ConceptData) -> None:
    tasks = data.trainable(data.tasks["train"])[:4]
    first, second = (task.wordings[0] for task in data.tasks["test"][:2])
    places = list(range(6))
    cosines = data.vectors[places] @ data.described.vectors([first])[0]
    for name in ("bi-encoder", "hyperadapter in bi-encoder"):
        margins = margins_of(build(ARMS[name], data, tasks, 0).eval(), ARMS[name], data, tasks)
        expected = SCALE * (cosines - SHIFT)
        torch.testing.assert_close(margins(places, second, first), expected, rtol=0, atol=SCALE * COSINE_BFLOAT16)
    for name in (OURS, "lora"):
        margins = margins_of(build(ARMS[name], data, tasks, 0).eval(), ARMS[name], data, tasks)
        assert torch.equal(margins(places, first, first), margins(places, second, second))


def test_best_threshold_is_right_most_often() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        values, answers = torch.randn(9), torch.rand(9) < 0.5
        most = max(int(((values > bound) == answers).sum()) for bound in (-9.0, *values.tolist()))
        assert int(((values > best_threshold(values, answers)) == answers).sum()) == most


def test_changed_vectors() -> None:
    torch.manual_seed(0)
    trained = torch.randn(400, 4) * torch.tensor([1.0, 2.0, 4.0, 8.0]) + 3.0
    assert centring(trained)(trained).mean(0).abs().max() < FLOAT32_DIFFERENCE * trained.abs().max()
    values = torch.linalg.eigvalsh(trained.T @ trained / len(trained))
    new = whitening(trained)(trained)
    # Each mean square s becomes s / (s + v), v being the mean variance.
    expected = values / (values + trained.var(0, correction=0).mean())
    torch.testing.assert_close(torch.linalg.eigvalsh(new.T @ new / len(new)), expected)


def test_study_runs_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: ConceptData
) -> None:
    monkeypatch.setattr(study, "load_data", lambda size, cache: data)
    monkeypatch.setattr("sys.argv", ["concepts", "--fast", "--output", str(tmp_path)])
    study.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    runs = Study(tmp_path, study.FAST)
    rate = runs.rate(OURS)
    in_head = ("hyperadapter in bi-encoder", "bilinear in bi-encoder")
    trained = (GATED, WHITENED, "lora", "bi-encoder", *in_head, "cross-encoder")
    assert {runs.run_of(row) for row in rows} == {
        *(Run("tune", OURS, one, 0, 0) for one in (2e-3, 5e-3)),
        Run("ablate", "centred", rate, 0, 0),
        Run("test", OURS, rate, 0, 1),
        Run("test", COSINE, 0.0, 0, 1),
        *(Run("test", arm, 2e-3, 0, 1) for arm in trained),
        Run("test", SEPARATE, 5e-3, 0, 1),
        Run("test", POLY, 5e-3, 0, 1),
        Run("curve", OURS, rate, 4, 1),
    }
    for row in rows:
        for families in row["scores"].values():
            for scores in families.values():
                assert all(0 <= value <= 1 for pair in scores.values() for value in pair)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "concepts.jsonl", "concepts.svg"}
    assert len(read_rows(tmp_path / "concepts.jsonl")) == len(rows)
    output = capsys.readouterr().out

    # Everything is there, so only the report is made again.
    study.main()
    again = capsys.readouterr().out
    assert output.endswith(again)
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(rows)
    # A given rate counts in place of those that were chosen.
    monkeypatch.setattr("sys.argv", ["concepts", "--fast", "--output", str(tmp_path), "--stage", "curve", "--rate=0.1"])
    study.main()
    assert runs.run_of(read_rows(tmp_path / "rows.jsonl")[-1]) == Run("curve", OURS, 0.1, 4, 1)
    monkeypatch.setattr("sys.argv", ["concepts", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has rows of another definition of the study, \w+, which is \w+ now"):
        study.main()
