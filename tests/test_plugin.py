"""The method as PEFT sees it."""

import copy
import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

from hyperadapt import HyperAdapterConfig, HyperAdapterModel, LoraGenerator
from hyperadapt.config.config import HyperAdapterType
from hyperadapt.plugin import LORA_OPTIMIZERS, METHODS, ROUTING_ARGUMENTS, register
from tests.support.helpers import adapted_model, adapter_config, base_model, make_active, run_python

KIND = HyperAdapterType.HYPERADAPTER
MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


def test_name_and_prefix() -> None:
    assert KIND.value == KIND == "HYPERADAPTER"
    assert [mapping[KIND] for mapping in MAPPINGS] == [HyperAdapterConfig, HyperAdapterModel, "hyperadapter_"]
    # What is read from adapter_config.json is a plain string.
    assert PEFT_TYPE_TO_CONFIG_MAPPING["HYPERADAPTER"] is HyperAdapterConfig
    assert HyperAdapterConfig().peft_type is KIND
    assert HyperAdapterModel.prefix == "hyperadapter_"


def test_config_is_found_by_peft(tmp_path: Path) -> None:
    config = HyperAdapterConfig(tasks=["one", "two"], r=5)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is HyperAdapterConfig
    assert loaded.peft_type is KIND
    assert (loaded.tasks, loaded.r) == (["one", "two"], 5)


def test_registering_again_changes_nothing() -> None:
    before = [dict(mapping) for mapping in MAPPINGS]
    register()
    assert [dict(mapping) for mapping in MAPPINGS] == before


@pytest.mark.parametrize("name", LORA_OPTIMIZERS)
def test_optimizers_of_lora_s_factors_are_refused(name: str) -> None:
    options = {
        "create_loraplus_optimizer": {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16},
        "create_lorafa_optimizer": {"r": 4, "lora_alpha": 8, "lr": 1e-3},
    }[name]
    create = getattr(peft.optimizers, name)
    with pytest.raises(
        TypeError, match=f"{name} treats LoRA's factors A and B differently, but those of a hyperadapter"
    ):
        create(adapted_model("llama"), **options)
    lora = get_peft_model(base_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    # Once, however often the package is imported.
    register()
    assert getattr(peft.optimizers, name) is create
    assert sum(len(group["params"]) for group in create(model=lora, **options).param_groups) > 0


HEADS = {
    "SEQ_CLS": (BertForSequenceClassification, ["classifier", "score"]),
    "TOKEN_CLS": (BertForTokenClassification, ["classifier", "score"]),
    "QUESTION_ANS": (BertForQuestionAnswering, ["qa_outputs"]),
    "CAUSAL_LM": (BertLMHeadModel, None),
    "FEATURE_EXTRACTION": (BertModel, None),
}


@pytest.mark.parametrize("extra", [None, ["attention.output.dense"]])
@pytest.mark.parametrize("task_type", HEADS)
def test_the_head_of_each_kind_of_model_is_trained_and_saved(
    task_type: str, extra: list[str] | None, tmp_path: Path
) -> None:
    kind, head = HEADS[task_type]
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertConfig(**sizes, intermediate_size=16, is_decoder=task_type == "CAUSAL_LM")
    config = adapter_config(task_type=task_type, target_modules="all-linear", modules_to_save=copy.copy(extra))
    torch.manual_seed(0)
    model = get_peft_model(kind(base), config)
    assert type(model) is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type]
    wanted = [*(extra or []), *(head or [])] or None
    assert model.peft_config["default"].modules_to_save == config.modules_to_save == wanted
    # No model here has a "score".
    modules = {name for name in wanted or () if name != "score"}
    trained = {name for name, one in model.named_parameters() if one.requires_grad and "hyperadapter_" not in name}
    assert {ending for ending in modules for name in trained if f".{ending}." in name} == modules
    assert all(any(f".{ending}." in name for ending in modules) for name in trained)
    # Nothing of it is adapted as well.
    positions = {position.name for position in model.base_model.router.network("default").positions}
    assert not any(name.endswith(tuple(modules)) for name in positions if modules)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).normal_()
    make_active(model).save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(kind(base), tmp_path)
    assert loaded.peft_config["default"].modules_to_save == wanted
    ids = torch.arange(3, 9).reshape(2, 3)
    assert torch.equal(loaded(ids, tasks="beta")[0], model(ids, tasks="beta")[0])
    # Its files alone tell of the head, too.
    made = LoraGenerator.from_pretrained(tmp_path).state_dict("beta")
    assert {ending for ending in modules for name in made if f".{ending}." in name} == modules


class Foreign:
    """Stands for another package's config."""


def test_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, KIND, Foreign)
    message = f"The PEFT method name 'HYPERADAPTER' is taken by {Foreign.__module__}.Foreign."
    with pytest.raises(RuntimeError, match=re.escape(message)):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[KIND] is Foreign


def test_a_package_with_a_similar_name_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Foreign, "__module__", "hyperadapters.config")
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, KIND, Foreign)
    with pytest.raises(RuntimeError, match=r"taken by hyperadapters\.config\.Foreign"):
        register()


def test_a_taken_prefix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, "OTHER", "hyperadapter_")
    with pytest.raises(RuntimeError, match="The parameter prefix 'hyperadapter_' is taken by another PEFT method"):
        register()


FRESH = """
import sys
import peft
members = list(peft.PeftType)
import hyperadapt
assert list(peft.PeftType) == members
assert "HYPERADAPTER" not in peft.PeftType.__members__
import importlib
names = ["layer", "layer_types", "loading", "building", "targeted_parameters", "saved_tuner", "model"]
names = ["config.config", *("tuner." + name for name in names), "plugin"]
for module in [*(importlib.import_module("hyperadapt." + name) for name in names), hyperadapt]:
    importlib.reload(module)
import torch
model = peft.get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(4, 4)), hyperadapt.HyperAdapterConfig(target_modules=["0"])
)
assert type(model.base_model) is hyperadapt.HyperAdapterModel
model(torch.ones(2, 4), tasks="default").sum().backward()
assert "matplotlib" not in sys.modules
assert callable(hyperadapt.plots.plot)
assert callable(hyperadapt.trainer.HyperAdapterTrainer)
"""


def test_importing_and_reloading_in_a_fresh_process() -> None:
    result = run_python(FRESH)
    assert result.stdout == ""
    # PEFT imports torchao where it is installed, which may complain about its own libraries.
    assert "hyperadapt" not in result.stderr


WATCHED = """
import torch
from torch.nn.modules import module
from torch.optim import optimizer
import hyperadapt
from transformers import LlamaConfig, LlamaForCausalLM

calls = []
def own(hooks):
    return [hook for hook in hooks.values() if "hyperadapt" in getattr(hook, "__module__", "")]
for name, hooks in vars(module).items():
    if name.startswith("_global_") and isinstance(hooks, dict):
        assert own(hooks) == [], name
for hooks in (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks):
    assert own(hooks) == []
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
import sys
def watch(frame, event, argument):
    # Every import of a module asks what waits for sentence-transformers.
    is_asked = frame.f_code.co_qualname == "_Watcher.find_spec"
    if event == "call" and "hyperadapt" in frame.f_code.co_filename.split("site-packages")[-1] and not is_asked:
        calls.append(frame.f_code.co_qualname)
sys.setprofile(watch)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters())
model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
optimizer.step()
sys.setprofile(None)
print(len(calls), calls[:3])
"""


def test_a_plain_model_calls_nothing_of_this_package() -> None:
    assert run_python(WATCHED).stdout == "0 []\n"


def test_the_constructor_takes_what_it_took() -> None:
    config = HyperAdapterConfig(target_modules=["0"])
    model = PeftModel(model=nn.Sequential(nn.Linear(4, 4)), peft_config=config, adapter_name="other")
    assert set(ROUTING_ARGUMENTS) <= model.special_peft_forward_args
    assert list(inspect.signature(PeftModel).parameters)[:3] == ["model", "peft_config", "adapter_name"]


def test_models_made_at_once_are_all_adopted() -> None:
    def make(index: int) -> set[str]:
        base = nn.Sequential(nn.Linear(4, 4))
        return get_peft_model(base, HyperAdapterConfig(target_modules=["0"])).special_peft_forward_args

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(make, range(40)))
    assert all(set(ROUTING_ARGUMENTS) <= arguments for arguments in found)


def test_other_models_stay_as_they_are() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert not set(ROUTING_ARGUMENTS) & model.special_peft_forward_args
    assert not set(METHODS) & vars(model).keys()
    before = PeftModel.__init__
    register()
    assert PeftModel.__init__ is before
