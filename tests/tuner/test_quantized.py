"""Quantised bases: bitsandbytes 8 and 4 bit and torchao int8 on a CPU, and backends that PEFT cannot merge into."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from hyperadapt import export_lora
from hyperadapt.tuner import layer_types
from hyperadapt.tuner.layer_types import HyperAdapterLinear
from tests.support.helpers import (
    MIXED,
    TASKS,
    adapted_model,
    adapter_config,
    adapter_parameters,
    checkpointing_arguments,
    example_batch,
    logits,
    make_active,
    row_of,
)
from tests.support.tolerances import EPS_BFLOAT16, FLOAT32_FORMULA, FLOAT32_FORWARD, INT8_ACTIVATIONS, INT8_GAP, NF4_GAP

BATCH = example_batch("llama", labels=False)


def int8() -> BitsAndBytesConfig:
    # With a threshold, the columns that stay in float depend on the whole batch, and so does every row.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZATIONS: dict[str, Callable[[], Any]] = {"bitsandbytes 8": int8, "bitsandbytes 4": nf4, "torchao": torchao}
# A bounded norm and a unit norm with a gain.
NORMALIZATIONS = ("soft_frobenius", "frobenius")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    # The kernels take sizes that are multiples of 64.
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        initializer_range=0.2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(params=QUANTIZATIONS)
def load(request: pytest.FixtureRequest, folder: Path) -> Callable[[], PreTrainedModel]:
    """Loads the quantised base anew."""
    pytest.importorskip(request.param.split()[0], reason="tests.versions leaves quantisation out")

    def load() -> PreTrainedModel:
        options = {"quantization_config": QUANTIZATIONS[request.param](), "device_map": {"": "cpu"}}
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()

    return load


def adapt(base: PreTrainedModel, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, adapter_config(**{"target_modules": "all-linear"} | changes)).eval()


def close(model: nn.Module, expected: Tensor) -> dict[str, float]:
    """Tolerances in units of the largest logit."""
    [backend] = {one.quantization_backend.backend_name for one in quantized_layers(model).values()}
    # Without gradients, the 4-bit products on a CPU run in bfloat16.
    units = {"bnb 8bit": INT8_ACTIVATIONS, "bnb 4bit": EPS_BFLOAT16, "torchao": FLOAT32_FORWARD}
    return {"rtol": 0, "atol": units[backend] * float(expected.abs().max())}


def quantized_layers(model: nn.Module) -> dict[str, HyperAdapterLinear]:
    layers = {name: one for name, one in model.named_modules() if isinstance(one, HyperAdapterLinear)}
    assert len(layers) == 14
    assert all(layer.quantization_backend is not None for layer in layers.values())
    return layers


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_start_and_mixed_batches(load: Callable[[], PreTrainedModel], normalization: str) -> None:
    before = logits(load(), BATCH)
    model = adapt(load(), normalization=normalization)
    assert torch.equal(logits(model, BATCH, tasks=MIXED), before)
    make_active(model)
    mixed = logits(model, BATCH, tasks=MIXED)
    assert (mixed - before).abs().max() > 1
    for row, task in enumerate(MIXED):
        assert_close(logits(model, row_of(BATCH, row), tasks=task)[0], mixed[row], **close(model, mixed))


def test_gradients(load: Callable[[], PreTrainedModel]) -> None:
    # Not after inference, for which bitsandbytes repacks 4-bit weights on a CPU for good.
    model = make_active(adapt(load())).train()
    model(**example_batch("llama"), tasks=MIXED).loss.backward()
    trained = adapter_parameters(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trained)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def merge_error(layer: HyperAdapterLinear, weight: Tensor) -> Tensor:
    """How far each entry of a weight may be from itself after it was quantised.

    Each scheme rounds to within half of the gap between its levels, 1/127 or more of the largest weight of a row.
    bitsandbytes rounds to half precision before and after: 2 · 2⁻¹¹ of it, a quarter of half the smaller gap.
    """
    gap = NF4_GAP if layer.quantization_backend.backend_name == "bnb 4bit" else INT8_GAP
    return gap / 2 * weight.abs().amax(dim=1, keepdim=True) * 1.25


def test_merging_changes_each_weight_by_the_update_and_a_rounding(load: Callable[[], PreTrainedModel]) -> None:
    model = make_active(adapt(load(), normalization_bound=0.1))
    model.set_task("beta")
    layers = quantized_layers(model)
    updates = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    before = {name: layer.get_base_weight().float() for name, layer in layers.items()}
    expected = {name: before[name] + update for name, update in updates.items()}
    model.merge_adapter(safe_merge=True)
    merged = {name: layer.get_base_weight().float() for name, layer in layers.items()}
    for name, layer in layers.items():
        assert ((merged[name] - expected[name]).abs() <= merge_error(layer, expected[name])).all(), name
        assert (merged[name] - before[name]).abs().max() > 0, name
    model.unmerge_adapter()
    for name, layer in layers.items():
        unmerged = layer.get_base_weight().float()
        exact = merged[name] - updates[name]
        assert ((unmerged - exact).abs() <= merge_error(layer, exact)).all(), name
        # As close to the base as the two roundings allow, and on the whole closer than with the update still there.
        limit = merge_error(layer, expected[name]) + merge_error(layer, exact)
        assert ((unmerged - before[name]).abs() <= limit).all(), name
        assert (unmerged - before[name]).norm() < (expected[name] - before[name]).norm(), name


def test_a_merged_model_is_unloaded_as_it_is(load: Callable[[], PreTrainedModel]) -> None:
    model = make_active(adapt(load(), normalization_bound=0.1))
    model.set_task("beta")
    model.merge_adapter()
    merged = logits(model, BATCH)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        unloaded = model.merge_and_unload()
    assert not any(isinstance(module, HyperAdapterLinear) for module in unloaded.modules())
    assert torch.equal(logits(unloaded, BATCH), merged)


def test_norms_after_inference_are_those_before(load: Callable[[], PreTrainedModel]) -> None:
    base = load()
    expected = adapt(load()).base_model.router.network("default").base_norms
    logits(base, BATCH)
    norms = adapt(base).base_model.router.network("default").base_norms
    # bitsandbytes keeps the scales of 4-bit weights in bfloat16 once they were used on some CPUs.
    assert_close(norms, expected, rtol=EPS_BFLOAT16, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_saving_loading_and_export(load: Callable[[], PreTrainedModel], normalization: str, tmp_path: Path) -> None:
    model = make_active(adapt(load(), normalization=normalization))
    # Told apart from those of the base that the adapter is loaded onto.
    model.base_model.router.network("default").base_norms.mul_(1.5)
    expected, alone = logits(model, BATCH, tasks=MIXED), logits(model, BATCH, tasks="beta")
    model.save_pretrained(tmp_path / "adapter")
    norms = next(v for k, v in load_file(tmp_path / "adapter/adapter_model.safetensors").items() if "base_norms" in k)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded.base_model.router.network("default").base_norms, norms)
        assert torch.equal(logits(loaded, BATCH, tasks=MIXED), expected)
    export_lora(model, "beta", tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(), tmp_path / "lora").eval()
    assert_close(logits(lora, BATCH), alone, **close(model, alone))


# PEFT 0.21.2 calls it by the name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_kbit_training_with_checkpointing_and_trainer(
    load: Callable[[], PreTrainedModel], use_reentrant: bool, tmp_path: Path
) -> None:
    options = {"use_reentrant": use_reentrant}
    model = adapt(prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=options))
    batch = example_batch("llama")
    columns = {**batch, "tasks": torch.tensor([TASKS.index(task) for task in MIXED])}
    rows = Dataset.from_dict({name: value.tolist() for name, value in columns.items()}).with_format("torch")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
        **checkpointing_arguments(use_reentrant),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


class Opaque(nn.Module):
    """A linear layer whose weight only its own product can read, as with GPTQ and AWQ."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().T.contiguous())
        self.register_buffer("bias", torch.full((linear.out_features,), 3.0))

    # How PEFT finds the sizes of a GPTQ layer.
    infeatures = property(lambda self: self.in_features)
    outfeatures = property(lambda self: self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight + self.bias


@pytest.fixture
def opaque(monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    """An adapted Llama with opaque layers, and others."""
    model = adapted_model("llama", active=False).unload()
    for layer in model.model.layers:
        layer.mlp.up_proj = Opaque(layer.mlp.up_proj)
        layer.mlp.down_proj = Opaque(layer.mlp.down_proj)

    def resolve(layer: nn.Module, **_: Any) -> ForwardOnlyQuantizationBackend | None:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, Opaque) else None

    monkeypatch.setattr(layer_types, "resolve_quantization_backend", resolve)
    return adapt(model, target_modules=["q_proj", "up_proj", "down_proj"])


def test_norms_of_weights_that_cannot_be_read(opaque: PeftModel) -> None:
    network = opaque.base_model.router.network("default")
    for position, norm in zip(network.positions, network.base_norms, strict=True):
        base = opaque.base_model.model.get_submodule(position.name).get_base_layer()
        weight = base.qweight if isinstance(base, Opaque) else base.weight
        assert_close(norm, torch.linalg.matrix_norm(weight), rtol=FLOAT32_FORMULA, atol=0)


def test_start_and_mixed_batches_of_layers_that_cannot_be_read(opaque: PeftModel) -> None:
    with opaque.disable_adapter():
        before = logits(opaque, BATCH)
    assert torch.equal(logits(opaque, BATCH, tasks=MIXED), before)
    make_active(opaque)
    mixed = logits(opaque, BATCH, tasks=MIXED)
    assert (mixed - before).abs().max() > 1
    limit = FLOAT32_FORWARD * float(mixed.abs().max())
    for row, task in enumerate(MIXED):
        assert_close(logits(opaque, row_of(BATCH, row), tasks=task)[0], mixed[row], rtol=0, atol=limit)


def test_layers_that_cannot_be_read_train(opaque: PeftModel) -> None:
    opaque.train()
    optimizer = torch.optim.Adam(adapter_parameters(opaque).values(), lr=2e-2)
    losses = []
    for _ in range(12):
        loss = opaque(**example_batch("llama"), tasks=MIXED).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in adapter_parameters(opaque).values())
    assert losses[-1] < 0.7 * losses[0]


def test_merging_layers_that_cannot_be_written_is_refused(opaque: PeftModel) -> None:
    make_active(opaque).set_task("beta")
    before = {key: value.clone() for key, value in opaque.state_dict().items()}
    message = "Merging into gptq layers is not possible: PEFT cannot write to their weights. Use the task unmerged"
    for merge in (opaque.merge_adapter, opaque.merge_and_unload):
        for safe_merge in (False, True):
            with pytest.raises(TypeError, match=re.escape(message)):
                merge(safe_merge=safe_merge)
    after = opaque.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(one.merged for one in opaque.modules() if isinstance(one, HyperAdapterLinear))


def test_export_from_layers_that_cannot_be_read(opaque: PeftModel, tmp_path: Path) -> None:
    expected = logits(make_active(opaque), BATCH, tasks="beta")
    export_lora(opaque, "beta", tmp_path)
    # Plain PEFT knows no such layers, but the same weights as ordinary ones.
    plain = opaque.get_base_model()
    for name, module in list(plain.named_modules()):
        if isinstance(module, HyperAdapterLinear):
            linear = module.get_base_layer()
            if isinstance(linear, Opaque):
                state = {"weight": linear.qweight.T, "bias": linear.bias}
                linear = nn.Linear(linear.in_features, linear.out_features)
                linear.load_state_dict(state)
            plain.set_submodule(name, linear)
    del plain.peft_config
    actual = logits(PeftModel.from_pretrained(plain, tmp_path).eval(), BATCH)
    assert_close(actual, expected, rtol=0, atol=FLOAT32_FORWARD * float(expected.abs().max()))


def test_unloading_layers_that_cannot_be_read(opaque: PeftModel) -> None:
    with opaque.disable_adapter():
        before = logits(opaque, BATCH)
    unloaded = opaque.unload()
    assert not any(isinstance(module, HyperAdapterLinear) for module in unloaded.modules())
    assert torch.equal(logits(unloaded, BATCH), before)


def test_merging_after_inference_is_exact_or_refused(folder: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"quantization_config": nf4(), "device_map": {"": "cpu"}}
    model = make_active(adapt(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()))
    model.set_task("beta")
    before = {name: layer.get_base_weight() for name, layer in quantized_layers(model).items()}
    logits(model, BATCH)
    if bitsandbytes.functional.has_avx512bf16():
        with pytest.raises(TypeError, match="PEFT misreads them now"):
            model.merge_adapter()
        assert not any(layer.merged for layer in quantized_layers(model).values())
    else:
        assert all(torch.equal(one.get_base_weight(), before[name]) for name, one in quantized_layers(model).items())
