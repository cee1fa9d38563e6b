"""LoRAs made without the base model: bit for bit those of the live model, from files that are checked."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from hyperadapt import LoraGenerator, diagnose, export_lora, generate_lora, push
from hyperadapt.cards import write_card
from hyperadapt.loras.file_formats import FORMATS
from hyperadapt.tuner.layer import HyperAdapterLayer
from tests.support.helpers import (
    BILINEAR,
    TASK_TYPES,
    TASKS,
    adapted_model,
    adapter_config,
    base_model,
    example_batch,
    letters,
    logits,
    make_active,
)
from tests.support.hub_helpers import REPO, make_model
from tests.support.hub_server import HubServer
from tests.support.tolerances import EXPORT_FLOAT32


class Net(nn.Module):
    """A layer of each kind that is no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=2)
        self.layers = nn.ModuleList(nn.Conv1d(6, 6, 3, padding=1) for _ in range(2))
        self.plane, self.volume = nn.Conv2d(1, 4, (2, 3)), nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(4, 3)


def net(**changes: Any) -> PeftModel:
    modules = ["words", "layers.0", "layers.1", "plane", "volume", "head"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_active(get_peft_model(Net(), adapter_config(target_modules=modules, **changes)))


def saved(model: PeftModel, folder: Path) -> LoraGenerator:
    model.save_pretrained(str(folder))
    return LoraGenerator.from_pretrained(folder)


def outcome(write: Callable[[Path], None], folder: Path) -> dict[str, bytes] | str:
    """The files that are written to a new folder, or the error."""
    try:
        write(folder / "out")
        return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    except ValueError as error:
        return str(error)
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"task_type": kind}) for name, kind in TASK_TYPES.items()},
    "patterns": ("llama", {"r": 3, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"v_proj": 2}}),
    "one layer": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "patches": ("vit", {"target_modules": ["projection", "query"]}),
    "sinkhorn": ("llama", {"normalization": "sinkhorn", "head": "row"}),
    "whitening": ("gpt2", {"normalization": "whitening", "head": "pair"}),
    "adaptive": ("bert", {"normalization": "adaptive"}),
    "text": ("llama", {"tasks": dict.fromkeys(TASKS, "some text"), "task_embedding": "both", "text_encoder": letters}),
    "bilinear": ("llama", {"tasks": dict.fromkeys(TASKS, "some text"), "task_embedding": "both", **BILINEAR}),
}


# PEFT says so whenever it saves an adapted embedding.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("case", [*CASES, "net"])
def test_a_lora_is_that_of_the_live_model(tmp_path: Path, case: str) -> None:
    name, changes = CASES.get(case, ("", {}))
    model = adapted_model(name, **changes) if name else net()
    generator = saved(model, tmp_path / "adapter")
    assert generator.tasks == TASKS
    for format in FORMATS:
        live = outcome(lambda folder, format=format: export_lora(model, "beta", folder, format=format), tmp_path)
        made = outcome(lambda folder, format=format: generator.save("beta", folder, format=format), tmp_path)
        assert made == live
        assert isinstance(live, dict) or format != "peft"
    export_lora(model, "beta", tmp_path / "live")
    state = load_file(tmp_path / "live" / "adapter_model.safetensors")
    made_state = generator.state_dict("beta")
    assert state.keys() == made_state.keys()
    assert all(torch.equal(made_state[key], value) for key, value in state.items())
    assert generator.r == 16 if case == "patterns" else 8


@pytest.mark.parametrize("settings", [{"text_encoder": letters}, BILINEAR], ids=["gated", "bilinear"])
def test_a_description_gives_a_lora_in_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    encoder, tasks = settings["text_encoder"], {"alpha": "find the topic", "beta": "is it spam"}
    model = adapted_model("llama", tasks=tasks, task_embedding="text", **settings)
    generator = saved(model, tmp_path / "adapter")
    lora = generator.from_description(["which language is it", "name it"], text_encoder=encoder)
    generate_lora(model, ["which language is it", "name it"], tmp_path / "live", text_encoder=encoder)
    lora.save(tmp_path / "made")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "live" / name).read_bytes()
    state = load_file(tmp_path / "made" / "adapter_model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in lora.state_dict().items())
    assert "which language is it" in (tmp_path / "made" / "README.md").read_text()
    with pytest.raises(ValueError, match="encoded by the function 'tests"):
        generator.from_description("which language is it")
    with pytest.raises(ValueError, match="has no task with a description"):
        saved(adapted_model("llama"), tmp_path / "learned").from_description("which language is it")


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_a_card_is_that_of_the_live_model(tmp_path: Path, name: str) -> None:
    model = adapted_model(name, task_type=TASK_TYPES[name])
    generator = saved(model, tmp_path)
    for config in (model.peft_config["default"], generator.config):
        config.base_model_name_or_path = "org/base"
    texts = []
    for source in (model, generator.network):
        write_card(source, tmp_path, overwrite=True, diagnosis=diagnose(source))
        texts.append((tmp_path / "README.md").read_text())
    assert texts[0] == texts[1]


def test_a_network_is_diagnosed_and_drawn_like_a_model(tmp_path: Path) -> None:
    model = adapted_model("llama")
    network = saved(model, tmp_path).network
    expected, found = diagnose(model), diagnose(network)
    assert str(found) == str(expected)
    assert torch.equal(found.cosines, expected.cosines)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from hyperadapt.plots import plot

    pictures = [plot(source, tmp_path / str(index), formats=["png"]) for index, source in enumerate((model, network))]
    assert len(pictures[0]) == 4
    assert [path.read_bytes() for path in pictures[1]] == [path.read_bytes() for path in pictures[0]]


def test_an_unknown_task(tmp_path: Path) -> None:
    generator = saved(adapted_model("llama"), tmp_path / "adapter")
    message = re.escape(f"Unknown task 'delta'. Known tasks: {TASKS}.")
    with pytest.raises(ValueError, match=message):
        generator.state_dict("delta")
    with pytest.raises(ValueError, match=message):
        generator.save("delta", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        generator.save_all(tmp_path / "out", ["alpha", "delta"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = adapted_model("llama")
    with torch.no_grad():
        model.base_model.router.network("default").hypernetwork.trunk[0].expand.bias[3] = value
    message = (
        r"'hypernetwork\.trunk\.0\.expand\.bias'\] of the adapter hold numbers that are not finite: its training div"
    )
    with pytest.raises(ValueError, match=message):
        saved(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        export_lora(model, "beta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"^'\./no/folder' is neither a folder nor a name on the Hub\."):
        LoraGenerator.from_pretrained("./no/folder")


def test_an_adapter_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    model = make_model(hub, tmp_path, "llama")
    model.push_to_hub(REPO)
    push(model, REPO, subfolder="adapters/first", revision="other")
    expected = LoraGenerator.from_model(model).state_dict("beta")
    for generator in (
        LoraGenerator.from_pretrained(REPO),
        LoraGenerator.from_pretrained(REPO, subfolder="adapters/first", revision="other"),
    ):
        state = generator.state_dict("beta")
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert generator.config.base_model_name_or_path == model.peft_config["default"].base_model_name_or_path
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        LoraGenerator.from_pretrained(REPO, subfolder="adapters/second")


def test_fifty_tasks_take_turns_on_one_plain_base(tmp_path: Path) -> None:
    tasks = [f"task {index}" for index in range(50)]
    model = adapted_model("llama", tasks=tasks, task_type="CAUSAL_LM", r=3)
    batch = example_batch("llama", rows=2, labels=False)
    expected = [logits(model, batch, tasks=task) for task in tasks]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    generator = saved(model, tmp_path)
    # transformers' own loading, and PEFT's.
    plain, peft = base_model("llama"), get_peft_model(base_model("llama"), generator.lora_config)
    for place, task in enumerate(tasks):
        state = generator.state_dict(task)
        plain.load_adapter(
            adapter_name="task", peft_config=generator.lora_config, adapter_state_dict=state, hotswap=place > 0
        )
        result = set_peft_model_state_dict(peft, state)
        assert not result.unexpected_keys
        for one in (plain, peft):
            assert_close(logits(one, batch), expected[place], rtol=EXPORT_FLOAT32, atol=EXPORT_FLOAT32)
    assert not any(isinstance(module, HyperAdapterLayer) for one in (plain, peft) for module in one.modules())


# The kernels take sizes that are multiples of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_quantised_base(tmp_path: Path, package: str) -> None:
    pytest.importorskip(package, reason="tests.versions leaves quantisation out")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=100, pad_token_id=0)).save_pretrained(tmp_path / "base")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantization: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    model = make_active(get_peft_model(base, adapter_config(target_modules="all-linear")))
    generator = saved(model, tmp_path / "adapter")
    generator.save("beta", tmp_path / "made", format="gguf-ready")
    export_lora(model, "beta", tmp_path / "live", format="gguf-ready")
    names = ("adapter_config.json", "adapter_model.safetensors", "config.json")
    assert all((tmp_path / "made" / name).read_bytes() == (tmp_path / "live" / name).read_bytes() for name in names)
    assert "quantization_config" not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_what_is_made_may_be_trained(tmp_path: Path) -> None:
    model = adapted_model("bert", task_type="SEQ_CLS")
    for generator in (LoraGenerator.from_model(model), saved(model, tmp_path)):
        before = generator.state_dict("beta")
        made = generator.state_dict("beta")
        for tensor in made.values():
            tensor.fill_(7.0)
        after = generator.state_dict("beta")
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_lora_in_memory_stays_as_it_was_made() -> None:
    texts = {"alpha": "find the topic", "beta": "is it spam"}
    model = adapted_model("bert", task_type="SEQ_CLS", tasks=texts, task_embedding="text", text_encoder=letters)
    made = LoraGenerator.from_model(model).from_description("is it spam", text_encoder=letters)
    before = made.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for tensor in made.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
