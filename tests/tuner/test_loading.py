"""Adapters from files that cannot be trusted: each gives one clear error and leaves the model as it was."""

import copy
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperadapt import HyperAdapterConfig
from tests.config.test_untrusted_config import assert_unwrapped
from tests.support.helpers import (
    MIXED,
    WRITES_COMPLEX,
    adapted_model,
    adapter_config,
    base_model,
    example_batch,
    letters,
    logits,
    make_active,
    snapshot,
)

BATCH = example_batch("llama", labels=False)
NETWORK = "base_model.hyperadapter_networks."
WEIGHTS = "adapter_model.safetensors"
Change = Callable[[dict[str, Tensor]], Any]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted_model("llama", target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])


@pytest.fixture
def folder(model: PeftModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder: Path, change: Change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def test_a_failed_second_adapter_leaves_the_first_as_it_was(model: PeftModel, tmp_path: Path) -> None:
    model = copy.deepcopy(model)
    expected, before = logits(model, BATCH, tasks=MIXED), snapshot(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = adapter_config(
        target_modules=["up_proj", "down_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
        inference_mode=True,
        r=64,
        hypernetwork_dim=65536,
    )
    with pytest.raises(ValueError, match="more than the limit of"):
        model.add_adapter("second", config)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert list(snapshot(model)) == list(before)
    assert torch.equal(logits(model, BATCH, tasks=MIXED), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), expected)
    model.add_adapter("second", adapter_config(target_modules=["down_proj"], modules_to_save=["embed_tokens"]))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp_score = nn.Sequential(nn.Linear(4, 4))
        self.score = nn.Linear(4, 2)


def test_a_saved_module_with_adapted_parts_is_refused() -> None:
    base = Parts()
    before = snapshot(base)
    config = adapter_config(target_modules=["0"], modules_to_save=["score"])
    with pytest.raises(ValueError, match=r"^modules_to_save takes in 'mlp_score', whose part '0' is adapted, too"):
        get_peft_model(base, config)
    assert_unwrapped(base, before)
    model = get_peft_model(base, adapter_config(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"^modules_to_save takes in 'mlp_score'"):
        model.add_adapter("second", adapter_config(target_modules=["score"], modules_to_save=["mlp_score"]))
    assert list(model.peft_config) == ["default"]


def rename(old: str, new: str) -> Change:
    return lambda weights: weights.update({new: weights.pop(old)})


def put(name: str, value: Tensor) -> Change:
    return lambda weights: weights.update({name: value})


EMBEDDING = f"{NETWORK}task_embedding.weight"
NORMS = f"{NETWORK}base_norms"
HEAD = "base_model.model.lm_head.weight"
LAYER = "base_model.model.model.layers.0.self_attn.k_proj.weight"
BAD_WEIGHTS: dict[str, tuple[Change, str]] = {
    "empty": (lambda weights: weights.clear(), r"The file of adapter 'x' lacks the tensor 'base_model.model.lm_head"),
    "missing": (lambda weights: weights.pop(EMBEDDING), f"{EMBEDDING!r} is missing"),
    "renamed": (
        rename(EMBEDDING, f"{EMBEDDING}s"),
        f"'{EMBEDDING}s' is unexpected; {EMBEDDING!r} is missing. Load the adapter with its own adapter_config.json",
    ),
    "several": (
        lambda weights: [weights.pop(name) for name in list(weights) if NETWORK in name],
        "is missing; and ",
    ),
    "added": (put(f"{NETWORK}hypernetwork.more", torch.ones(2)), f"'{NETWORK}hypernetwork.more' is unexpected"),
    "base weight": (put(LAYER, torch.zeros(16, 32)), f"{LAYER!r} is unexpected"),
    "another adapter's": (
        put(f"{NETWORK}default.base_norms", torch.ones(4)),
        f"'{NETWORK}default.base_norms' is unexpected",
    ),
    "this adapter's by name": (put(f"{NETWORK}x.base_norms", torch.ones(4)), "base_norms' is unexpected"),
    "shape": (put(EMBEDDING, torch.zeros(3, 9)), f"{EMBEDDING!r} has shape (3, 9) instead of (3, 8)"),
    "shapes of network and head": (
        lambda weights: weights.update({EMBEDDING: torch.zeros(3, 9), HEAD: torch.zeros(3, 3)}),
        f"{EMBEDDING!r} has shape (3, 9) instead of (3, 8). Load the adapter with its own adapter_config.json on the "
        "base model it was made for; if it was, the file is damaged: get it again. With ignore_mismatched_sizes=True, "
        "tensors of other sizes keep the base model's values, but for those of the network, all of which are needed.",
    ),
    "rank": (put(EMBEDDING, torch.zeros(24)), f"{EMBEDDING!r} has shape (24,) instead of (3, 8)"),
    "one task more": (put(EMBEDDING, torch.zeros(4, 8)), f"{EMBEDDING!r} has shape (4, 8) instead of (3, 8)"),
    "integers": (
        put(EMBEDDING, torch.zeros(3, 8, dtype=torch.int64)),
        f"{EMBEDDING!r} has dtype torch.int64 instead of torch.float32",
    ),
    "float8": (
        put(EMBEDDING, torch.zeros(3, 8, dtype=torch.float8_e4m3fn)),
        f"{EMBEDDING!r} has dtype torch.float8_e4m3fn instead of torch.float32",
    ),
    "zero norm": (put(NORMS, torch.tensor([1.0, 0, 1, 1])), f"{NORMS!r} holds a norm that is not finite and above 0"),
    "negative norm": (put(NORMS, torch.tensor([1.0, -1, 1, 1])), "holds a norm that is not finite and above 0"),
    "infinite norm": (put(NORMS, torch.full((4,), torch.inf)), "holds a norm that is not finite and above 0"),
    "norm not a number": (put(NORMS, torch.full((4,), torch.nan)), "holds a norm that is not finite and above 0"),
    "missing head": (
        lambda weights: weights.pop(HEAD),
        "The file of adapter 'x' lacks the tensor 'base_model.model.lm_head.weight', part of a module of",
    ),
    "shape of the head": (
        put(HEAD, torch.zeros(3, 3)),
        "'base_model.model.lm_head.modules_to_save.x.weight' has shape (3, 3) instead of (100, 32)",
    ),
}
if WRITES_COMPLEX:
    complex_zeros = torch.zeros(3, 8, dtype=torch.complex64)
    BAD_WEIGHTS["complex"] = (put(EMBEDDING, complex_zeros), "has dtype torch.complex64 instead of torch.float32")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_of_a_further_adapter(model: PeftModel, folder: Path, case: str, low_cpu_mem_usage: bool) -> None:
    change, message = BAD_WEIGHTS[case]
    change_weights(folder, change)
    model = copy.deepcopy(model)
    expected, before = logits(model, BATCH, tasks=MIXED), snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_adapter(folder, "x", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(model.peft_config) == ["default"]
    assert list(snapshot(model)) == list(before)
    assert torch.equal(logits(model, BATCH, tasks=MIXED), expected)
    model.save_pretrained(folder)
    model.load_adapter(folder, "x", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("x")
    assert torch.equal(logits(model, BATCH, tasks=MIXED), expected)


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_of_the_first_adapter(model: PeftModel, folder: Path, case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    original = (folder / WEIGHTS).read_bytes()
    change_weights(folder, change)
    base = base_model("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(base, folder, adapter_name="x")
    assert_unwrapped(base, before)
    assert torch.equal(logits(base, BATCH), logits(base_model("llama"), BATCH))
    (folder / WEIGHTS).write_bytes(original)
    loaded = PeftModel.from_pretrained(base, folder, adapter_name="x")
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), logits(model, BATCH, tasks=MIXED))


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_for_an_adapter_in_use(model: PeftModel, folder: Path, case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    change_weights(folder, change)
    model = copy.deepcopy(model)
    model.add_adapter("x", model.peft_config["default"])
    model.set_adapter("x")
    model = make_active(model)
    expected, before = logits(model, BATCH, tasks=MIXED), snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_adapter(folder, "x")
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model, BATCH, tasks=MIXED), expected)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["gamma", "alpha", "beta"], "Task 0 is 'alpha' in the file of adapter 'default', but 'gamma' in the adapter"),
        (["alpha", "beta", "delta"], "Task 2 is 'gamma' in the file of adapter 'default', but 'delta' in the adapter"),
        (["alpha", "beta"], "Task 2 is 'gamma' in the file of adapter 'default', but None in the adapter"),
    ],
)
def test_tasks_of_other_names_or_in_another_order(folder: Path, tasks: list[str], message: str) -> None:
    config = adapter_config(tasks=tasks, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = make_active(get_peft_model(base_model("llama"), copy.deepcopy(config)))
    expected = logits(model, BATCH, tasks="beta")
    # As Trainer resumes a run, and loads the best checkpoint.
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_adapter(folder, "default", is_trainable=True)
    assert torch.equal(logits(model, BATCH, tasks="beta"), expected)
    base = base_model("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(base, folder, config=config)
    assert_unwrapped(base, before)


def test_descriptions_of_other_texts(tmp_path: Path) -> None:
    def described(text: str) -> PeftModel:
        return adapted_model(
            "llama", tasks={"alpha": text, "beta": "zebra"}, task_embedding="text", text_encoder=letters
        )

    described("first").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"description of task 'alpha' is \['first'\] in the file .*\['second'\] in the"
    ):
        described("second").load_adapter(tmp_path, "default", is_trainable=True)
    described("first").load_adapter(tmp_path, "default", is_trainable=True)


def test_a_file_without_a_network_is_refused(tmp_path: Path) -> None:
    adapted_model("llama").save_pretrained(tmp_path)
    save_file({}, tmp_path / WEIGHTS)
    base = base_model("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"^The file of adapter 'default' has no weights of a hyperadapter: \['base_m"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unwrapped(base, before)


def test_state_dicts_that_no_file_holds(model: PeftModel) -> None:
    model = copy.deepcopy(model)
    weights = get_peft_model_state_dict(model)
    before = snapshot(model)
    for value in (1.0, None, [1, 2], torch.zeros(3, 8).to_sparse(), torch.zeros(3, 8, device="meta")):
        with pytest.raises(ValueError, match=re.escape(f"{EMBEDDING!r} is no ordinary tensor")):
            set_peft_model_state_dict(model, weights | {EMBEDDING: value, NORMS: torch.ones(4)})
    # Ranks that do not read the file pass nothing.
    set_peft_model_state_dict(adapted_model("llama"), {})
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_weights_in_another_float_are_converted(folder: Path, dtype: torch.dtype, low_cpu_mem_usage: bool) -> None:
    head = "base_model.model.lm_head.weight"
    change_weights(
        folder, lambda weights: weights.update({name: weights[name].to(dtype) for name in (EMBEDDING, head)})
    )
    loaded = PeftModel.from_pretrained(base_model("llama"), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    network = loaded.base_model.hyperadapter_networks["default"]
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    logits(loaded, BATCH, tasks=MIXED)
    # Also before PEFT moves what it has assigned.
    weights = {name: value for name, value in load_file(folder / WEIGHTS).items() if NETWORK in name}
    weights = loaded.base_model._remap_adapter_state_dict_for_load(
        loaded, loaded.peft_config["default"], "default", weights
    )
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)


def test_counts_and_masks_of_saved_modules(tmp_path: Path) -> None:
    config = adapter_config(target_modules=["up"], modules_to_save=["norm"])
    model = get_peft_model(Normed(), config)
    model.base_model.model.norm.modules_to_save["default"].num_batches_tracked.fill_(7)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Normed(), tmp_path)
    assert loaded.base_model.model.norm.modules_to_save["default"].num_batches_tracked == 7
    change_weights(tmp_path, put("base_model.model.norm.num_batches_tracked", torch.tensor(7.0)))
    with pytest.raises(ValueError, match=r"num_batches_tracked' has dtype torch.float32 instead of torch.int64"):
        PeftModel.from_pretrained(Normed(), tmp_path)


def test_embeddings_saved_along_are_loaded(tmp_path: Path) -> None:
    model = adapted_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert torch.equal(logits(loaded, BATCH, tasks=MIXED), logits(model, BATCH, tasks=MIXED))
    change_weights(tmp_path, put("base_model.model.model.embed_tokens.weight", torch.zeros(99, 32)))
    with pytest.raises(ValueError, match=r"embed_tokens.weight' has shape \(99, 32\) instead of \(100, 32\)"):
        PeftModel.from_pretrained(base_model("llama"), tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_truncated_file(model: PeftModel, folder: Path, cut: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:cut])
    base = base_model("llama")
    before = snapshot(base)
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(base, folder)
    assert_unwrapped(base, before)
    model = copy.deepcopy(model)
    with pytest.raises(SafetensorError):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]


def test_a_header_that_claims_more_than_the_file_holds(folder: Path) -> None:
    header = json.dumps({NORMS: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(base_model("llama"), folder)


def test_copies_guard_their_own_loading(model: PeftModel, folder: Path) -> None:
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        duplicate.load_adapter(folder, "second")
        assert "second" in duplicate.peft_config
        assert "second" not in model.peft_config


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_executes_nothing(folder: Path) -> None:
    # PEFT reads such files, with what torch holds for safe; the package's own writing is safetensors only.
    (folder / WEIGHTS).unlink()
    torch.save({NORMS: Malice(folder / "executed")}, folder / "adapter_model.bin")
    base = base_model("llama")
    before = snapshot(base)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        PeftModel.from_pretrained(base, folder)
    assert_unwrapped(base, before)
    assert not (folder / "executed").exists()


def test_our_files_hold_no_pickle(model: PeftModel, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", WEIGHTS}


def test_text_vectors_that_are_not_finite(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tasks": {"a": "first"}, "task_embedding": "text", "text_encoder": letters}
    adapted_model("llama", **settings).save_pretrained(tmp_path)
    name = f"{NETWORK}task_embedding.text_vectors"
    change_weights(tmp_path, put(name, torch.full((1, 26), torch.nan)))
    with pytest.raises(ValueError, match=re.escape(f"{name!r} holds a vector that is not finite")):
        PeftModel.from_pretrained(base_model("llama"), tmp_path)


def test_a_file_alone_has_no_encoder_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"tasks": {"a": "first"}, "task_embedding": "text", "target_modules": "all-linear"}
    adapter_config(**fields, text_encoder="some/model").save_pretrained(tmp_path)
    monkeypatch.setattr("hyperadapt.tasks.encoders.encode_texts", None)
    config = HyperAdapterConfig.from_pretrained(tmp_path)
    for change in (config, config.replaced(tasks=["a"])):
        with pytest.raises(
            ValueError, match=r"names text_encoder='some/model' but holds no vectors of its descriptions"
        ):
            get_peft_model(base_model("llama"), change)
    monkeypatch.undo()
    model = get_peft_model(base_model("llama"), config.replaced(text_encoder=letters))
    assert model.peft_config["default"].text_embedding_dim == 26
