"""The instruction study: its tasks, what is held out, its rows and model, wrong descriptions, and that it runs."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.neutral_texts import BLANK, UNRELATED
from benchmarks.common.rows import append_row, read_rows
from benchmarks.instructions import __main__ as study
from benchmarks.instructions import data as instructions_data
from benchmarks.instructions.arms import ARMS, build, embeddings, text_encoder
from benchmarks.instructions.data import InstructionData, LastStates, load_data, rows_of
from benchmarks.instructions.evaluation import TRUE, WRONG, Amount, Evaluation, judged
from benchmarks.instructions.model import IGNORED, padded, prompt_of, split, tokens_of
from benchmarks.instructions.operations import FAMILIES
from benchmarks.instructions.plan import BASE, LONGER, LORA, OURS, TOLD, WHITENED, Run, Study
from benchmarks.instructions.runs import answers_of, draws
from benchmarks.instructions.shots import FRESH, ShotRun
from benchmarks.instructions.tasks import KINDS, Operation, Task, operations, subset, trained_wordings
from tests.support.tolerances import FLOAT32_FORWARD


def tiny(dtype: torch.dtype) -> LlamaForCausalLM:
    """A language model as deep as SmolLM2-135M with its vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def randomise(model: nn.Module) -> None:
    """Have a hyperadapter make large updates."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "heads" in name:
                parameter.normal_()


@pytest.fixture(scope="module")
def data() -> InstructionData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructions_data, "load_base", lambda dtype: tiny(torch.float32))
        try:
            return load_data(study.FAST.size)
        except ModuleNotFoundError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def bank(data: InstructionData) -> list[Task]:
    """The tasks of the whole study."""
    return rows_of(data.tokenizer, replace(study.Settings().size, train=6, held_out=6))[0]


def test_many_tasks_are_trained_and_new_ones_of_each_kind_are_held_out(bank: list[Task]) -> None:
    counts = Counter((task.role, task.kind) for task in bank)
    assert counts["train", ""] >= 300
    assert sum(counts["test", kind] for kind in KINDS) >= 50
    assert all(counts[role, kind] for role in ("validation", "test") for kind in KINDS)
    # No description means two tasks, and some of each trained one stay unseen.
    assert max(Counter(wording for task in bank for wording in task.wordings).values()) == 1
    assert all(len(set(task.wordings) - set(trained_wordings(task))) == 2 for task in bank)
    trained = {part for task in bank if task.role == "train" for part in task.parts}
    families = {part.family for part in trained}
    for task in bank:
        new = [part for part in task.parts if part not in trained]
        assert bool(new) == (task.kind in ("argument", "operation"))
        assert all((part.family in families) == (task.kind == "argument") for part in new)


def test_smaller_sets_of_trained_tasks_are_parts_of_larger_ones(bank: list[Task]) -> None:
    trained = [task for task in bank if task.role == "train"]
    assert set(subset(trained, 8)) < set(subset(trained, 16))
    with pytest.raises(ValueError, match=r"1000 tasks are more than the \d+ trained ones"):
        subset(trained, 1000)


@pytest.mark.parametrize(
    ("parts", "text", "answer"),
    [
        (["word second to last", "capitals"], "Rome is an old city", "OLD"),
        (["word after is"], "Rome is an old city", "an"),
        (["word after is"], "Rome is where it is", None),
        (["word after city"], "Rome is an old city", None),
        (["field job", "ended a colon"], "name: Ann; job: cook; size: 12", "cook:"),
        (["field year"], "name: Ann; job: cook; size: 12", None),
        (["longest word"], "Rome is an ancient city", "ancient"),
        (["longest word"], "Rome and Pisa", None),
        (["first words three", "small"], "Rome is an old city", "rome is an"),
        (["last words two", "joined hyphens"], "Rome is an old city", "old-city"),
        (["without the first word"], "Rome is an old city", "is an old city"),
        (["without the last word"], "Rome is an old city", "Rome is an old"),
        (["replaced Now"], "Rome is an old city", "Now is an old city"),
        (["reversed"], "Rome is old", "old is Rome"),
        (["sorted"], "Rome is Old", "is Old Rome"),
        (["word last", "twice"], "Rome is old", "old old"),
        (["word first", "first letters two letters"], "Rome is old", "Ro"),
        (["word first", "last letters letter"], "Rome is old", "e"),
        (["initials", "between single quotes"], "Rome is old", "'Rio'"),
        (["word first", "number of letters"], "Rome is old", "4"),
        (["number of words", "begun the number one"], "Rome is old", "1. 3"),
        (["has a word is"], "Rome is old", "yes"),
        (["is longer five"], "Rome is an old city", "no"),
        (["is a question", "tag b"], "What is old", "<b>yes</b>"),
        (["word first", "json answer"], "Rome is old", '{"answer": "Rome"}'),
        (["word first", "label Note"], "Rome is old", "Note: Rome"),
        (["word first", "bold"], "Rome is old", "**Rome**"),
        (["initial capitals"], "Rome is McOld", "Rome Is Mcold"),
    ],
)
def test_answers(parts: list[str], text: str, answer: str | None) -> None:
    known = {operation.name: operation for operation in operations()}
    family = next(family for family in FAMILIES if family.name == "word after")
    known["word after city"] = Operation(family, "city")
    assert Task(tuple(known[part] for part in parts), "train", "").answer(text) == answer


def test_wordings_say_what_is_done_last_outside() -> None:
    operation = {operation.name: operation for operation in operations()}
    task = Task((operation["word last"], operation["tag b"]), "train", "")
    assert task.wordings[0] == "Write the last word of the text in the HTML tag b."
    record = Task((operation["field job"],), "train", "")
    assert record.wordings[-1] == "Your answer is what the record has as its job."


def test_texts_have_one_role_and_rows_the_right_answers(data: InstructionData) -> None:
    seen: dict[str, set[str]] = {}
    members = {task.name: task for role in data.tasks.values() for task in role}
    for role, rows_of_tasks in data.rows.items():
        for name, rows in rows_of_tasks.items():
            assert len({row.text for row in rows}) == len(rows)
            for row in rows:
                assert members[name].answer(row.text) == row.answer
                assert len(data.tokens(*row).ids) - data.tokens(*row).start <= data.size.answer_tokens
                seen.setdefault(row.text, set()).add(role)
    assert {len(roles) for roles in seen.values()} == {1}


def test_upper_layers_answer_as_the_whole_model_generates(data: InstructionData) -> None:
    # Its norms compute in float32.
    model = tiny(torch.float64)
    prompt = "Rome is old"
    start = tokens_of(data.tokenizer, prompt, "")
    ids = torch.tensor([start.ids[: start.start]])
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        whole = model(generated).logits[0, start.start - 1 : -1]
    right = type(start)(generated[0].tolist(), start.start)
    wrong = type(start)([*right.ids[:-1], right.ids[-1] + 1], start.start)
    short = type(start)(right.ids[:-2], start.start)
    lower, upper = split(model, 20)
    batch = padded(lower([right, short, wrong]), [right, short, wrong])
    with torch.no_grad():
        output = upper(**batch)
    torch.testing.assert_close(output.logits[:4], whole, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    exact, losses = judged(output.logits, batch["labels"])
    assert exact.tolist() == [True, True, False]
    counts = (batch["labels"] != IGNORED).sum(1)
    torch.testing.assert_close((losses * counts).sum() / counts.sum(), output.loss)


def test_what_is_not_trained_ends_its_lines(data: InstructionData) -> None:
    shown = "first -> one\nsecond -> two"
    turn, line = (data.tokens("third", "three", shown, ends_line) for ends_line in (False, True))
    assert data.tokenizer.decode(turn.ids[turn.start :]) == " three" + data.tokenizer.eos_token
    assert data.tokenizer.decode(line.ids[line.start :]) == " three\n"
    assert turn.ids[: turn.start] == line.ids[: line.start]


def test_states_are_kept_and_the_same_as_computed(data: InstructionData, tmp_path: Path) -> None:
    task = data.tasks["train"][0]
    rows = data.rows["train"][task.name][:3]
    before = data.batch(rows)
    data.keep(tmp_path)
    [path] = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    data.keep(tmp_path)
    assert path.stat().st_mtime_ns == written
    after = data.batch(rows)
    assert all(torch.equal(before[name][0, :9], after[name][0, :9]) for name in before)
    told = data.batch(rows, [task.wordings[0]] * 3)
    assert torch.equal(told["labels"][told["labels"] != IGNORED], after["labels"][after["labels"] != IGNORED])
    assert told["labels"].shape[1] > after["labels"].shape[1]


def test_draws_are_right_and_the_same_again(data: InstructionData) -> None:
    trained, amount = data.tasks["train"], Amount(steps=5, tasks=4, rows=2)
    steps = list(draws(data, trained, amount, 3))
    assert steps == list(draws(data, trained, amount, 3)) != list(draws(data, trained, amount, 4))
    for drawn in steps:
        assert len({task.name for task in drawn.tasks}) == 4
        for task, description, row in zip(*drawn, strict=True):
            assert description in trained_wordings(task)
            assert row in data.rows["train"][task.name]


def test_wrong_descriptions_are_what_they_are_called(data: InstructionData) -> None:
    owner = {wording: task for role in data.tasks.values() for task in role for wording in task.wordings}
    for seed in range(2):
        evaluation = Evaluation(data, data.tasks["train"], study.FAST.amount, seed)
        for task in data.tasks["test"]:
            texts = {condition: evaluation.description(task, condition) for condition in (TRUE, *WRONG)}
            assert owner[texts[TRUE]] is task
            assert owner[texts["shuffled"]].role == "test"
            assert not set(owner[texts["shuffled"]].parts) & set(task.parts)
            assert (texts["blank"], texts["unrelated"] in UNRELATED) == (BLANK, True)
            assert owner[texts["nearest trained"]].role == "train"


def test_arms_start_at_the_base_model(data: InstructionData) -> None:
    trained = data.tasks["train"]
    rows = [row for task in trained[:3] for row in data.rows["test"][task.name][:2]]
    told = [task.wordings[0] for task in trained[:3] for _ in range(2)]
    for name, arm in ARMS.items():
        base = ARMS[BASE] if arm.is_told else ARMS[LORA]
        model = build(arm, data, trained, 0).eval()
        expected = data.upper(**data.batch(rows, told if base.is_told else None)).logits
        inputs = data.batch(rows, told if arm.is_told else None)
        if arm.is_hyperadapter:
            inputs["task_embeddings"] = embeddings(model, text_encoder(arm, data, trained), told)
        assert torch.equal(model(**inputs).logits, expected), name


def test_descriptions_are_read_by_both_models(data: InstructionData) -> None:
    trained = data.tasks["train"]
    known = [wording for task in trained for wording in trained_wordings(task)]
    together = LastStates(data.tokenizer, data.lower).vectors(known[:2])
    for text, vector in zip(known, together, strict=False):
        # Alone, without padding, it is the last token's state.
        [states] = data.lower([prompt_of(data.tokenizer, text)])
        expected = normalize(states[-1], dim=0)
        torch.testing.assert_close(vector, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    read = text_encoder(ARMS[OURS], data, trained)(known)
    sizes = [vectors(known[:1]).shape[1] for vectors in data.vectors.values()]
    for part in read.split(sizes, dim=1):
        torch.testing.assert_close(part.mean(0), torch.zeros(part.shape[1]), rtol=0.0, atol=FLOAT32_FORWARD)
        torch.testing.assert_close(part.norm(dim=1).mean(), torch.ones(()))


def test_an_adapter_answers_by_the_description(data: InstructionData) -> None:
    trained = data.tasks["train"]
    model = build(ARMS[OURS], data, trained, 0).eval()
    randomise(model)
    rows = [row for task in trained[:2] for row in data.rows["test"][task.name][:1]]
    answers = answers_of(model, ARMS[OURS], data, trained)
    one, other = trained[0].wordings[0], trained[1].wordings[0]
    _, both = answers(rows, [one, other])
    for place, description in enumerate((one, other)):
        _, alone = answers(rows[place : place + 1], [description])
        torch.testing.assert_close(alone[0], both[place], rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    _, swapped = answers(rows, [other, one])
    assert (swapped - both).abs().max() > 50 * FLOAT32_FORWARD


def test_study_runs_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: InstructionData
) -> None:
    monkeypatch.setattr(study, "load_data", lambda size, folder: data)
    monkeypatch.setattr("sys.argv", ["instructions", "--fast", "--output", str(tmp_path)])
    study.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    runs = Study(tmp_path, study.FAST)
    rate = runs.rate(OURS)
    assert {runs.run_of(row) for row in rows} == {
        *(Run("tune", OURS, one, 0, 0) for one in study.FAST.arms[OURS]),
        *(Run("tune", FRESH, one, 0, 0) for one in study.FAST.shot_arms[FRESH]),
        Run("ablate", "width 16", rate, 0, 0),
        Run("test", OURS, rate, 0, 1),
        Run("test", TOLD, 5e-3, 0, 1),
        Run("test", LORA, 5e-3, 0, 1),
        Run("test", WHITENED, 5e-3, 0, 1),
        Run("test", LONGER, 5e-3, 0, 1),
        Run("test", BASE, 0.0, 0, 1),
        Run("curve", OURS, rate, 4, 1),
        *(Run("shots", arm, runs.rate(arm), 0, 1) for arm in study.FAST.shot_arms),
    }
    tokens = {row["arm"]: row["prompt_tokens"] for row in rows if row["stage"] == "test"}
    assert tokens[OURS] == tokens[LORA] < tokens[TOLD] == tokens[BASE]
    for row in rows:
        for kinds in row["scores"].values():
            for scores in kinds.values():
                assert all(0 <= exact <= 1 and loss > 0 for exact, loss in scores.values())
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".pt"}
    assert names == {"rows.jsonl", "instructions.jsonl", "instructions.svg"}
    assert len(read_rows(tmp_path / "instructions.jsonl")) == len(rows)
    output = capsys.readouterr().out

    # Everything is there, so only the report is made again.
    study.main()
    assert output.endswith(capsys.readouterr().out)
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(rows)
    monkeypatch.setattr("sys.argv", ["instructions", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has rows of another definition of the study, \w+, which is \w+ now"):
        study.main()


@pytest.fixture
def shots(data: InstructionData, tmp_path: Path) -> ShotRun:
    return ShotRun(data, 5e-2, 5e-2, 1, study.FAST.amount, study.FAST.shots, tmp_path)


def test_more_examples_contain_the_fewer_and_are_not_asked_about(shots: ShotRun) -> None:
    for task in shots.data.tasks["test"]:
        few, many = shots.examples(task, 2), shots.examples(task, 4)
        assert many[:2] == few
        assert not {row.text for row in many} & {row.text for row in shots.data.rows["test"][task.name]}


def test_a_lora_starts_where_the_description_puts_it(shots: ShotRun) -> None:
    [task, *_] = shots.data.tasks["test"]
    rows = shots.data.rows["test"][task.name][:2]
    model, _ = shots._describing
    randomise(model)
    description = Evaluation(shots.data, [], shots.amount, shots.seed).description(task, TRUE)
    _, expected = answers_of(model, ARMS[OURS], shots.data, shots.data.tasks["train"])(rows, [description] * 2)
    shots.rate = 0.0
    _, found = shots._warm(task, shots.examples(task, 2), rows)
    _, fresh = shots._fresh(task, shots.examples(task, 2), rows)
    torch.testing.assert_close(found, expected, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    assert (fresh - expected).abs().max() > 10 * FLOAT32_FORWARD


def test_examples_make_an_adapter(shots: ShotRun) -> None:
    first, second, *_ = shots.data.tasks["test"]
    rows = shots.data.rows["test"][first.name][:2]
    randomise(shots._reading)
    _, one = shots._by_examples(first, shots.examples(first, 4), rows)
    _, again = shots._by_examples(first, shots.examples(first, 4)[::-1], rows)
    _, other = shots._by_examples(second, shots.examples(second, 4), rows)
    torch.testing.assert_close(one, again, rtol=FLOAT32_FORWARD, atol=FLOAT32_FORWARD)
    assert (one - other).abs().max() > 50 * FLOAT32_FORWARD


def test_a_trained_model_is_read_again(shots: ShotRun) -> None:
    model = shots._trained(ARMS[OURS], 1e-2)
    again = shots._trained(ARMS[OURS], 1e-2)
    task = shots.data.tasks["test"][0]
    rows, told = shots.data.rows["test"][task.name][:2], [task.wordings[0]] * 2
    trained = shots.data.tasks["train"]
    first, second = (answers_of(one, ARMS[OURS], shots.data, trained)(rows, told)[1] for one in (model, again))
    assert torch.equal(first, second)
    assert len(list(shots.folder.iterdir())) == 1


def test_a_rate_is_chosen_by_answers_and_then_by_the_loss(tmp_path: Path) -> None:
    runs = Study(tmp_path, study.FAST)
    with pytest.raises(SystemExit, match=r"hyperadapter has no runs to choose its rate from at \[0.005, 0.01\]"):
        runs.rate(OURS)
    measured = {0.005: (0.2, 1.0), 0.01: (0.4, 2.0)}
    for rate, score in measured.items():
        scores = {TRUE: {"argument": {"x": score}}}
        row = {"definition": runs.definition, "scores": scores, **Run("tune", OURS, rate, 0, 0)._asdict()}
        append_row(runs.path, row)
    assert runs.rate(OURS) == 0.01
    assert Study(tmp_path, study.FAST, rate=0.3).rate(OURS) == 0.3
