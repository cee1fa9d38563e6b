"""Random damage to configurations and to files of weights: only errors that are meant, and nothing else changes.

``FUZZ_CASES`` in the environment sets the number of cases, and has them drawn anew in every run.
"""

import copy
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hyperadapt import HyperAdapterConfig
from hyperadapt.normalization import NORMALIZATIONS
from hyperadapt.tasks import encoders
from hyperadapt.tuner import loading
from hyperadapt.tuner.layer import HyperAdapterLayer
from tests.support.helpers import WRITES_COMPLEX

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
WEIGHTS = "adapter_model.safetensors"
# The last comes from the reader of files that are no safetensors.
MEANT = (TypeError, ValueError, SafetensorError)
VALID: dict[str, Any] = {
    "r": 2,
    "target_modules": ["up", "down"],
    "tasks": ["a", "b"],
    "task_embedding_dim": 4,
    "hypernetwork_dim": 4,
    "hypernetwork_depth": 1,
}
FIELDS = [field.name for field in dataclasses.fields(HyperAdapterConfig)]
# Of the methods, PEFT looks up the name that the file gives, and that without a check.
FILE_FIELDS = [name for name in FIELDS if name != "peft_type"]
MAX_MESSAGE = 2500

# What PEFT warns of, such as patterns that match nothing, is not the point here.
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        self.block_up = nn.Sequential(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block_up(self.head(self.down(self.up(x).relu()).relu()))


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    NET, INPUT = Net(), torch.randn(2, 5)


def cases(share: float) -> settings:
    return settings(
        max_examples=max(1, round(share * CASES)),
        derandomize="FUZZ_CASES" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


NAMES = st.sampled_from(
    ["up", "down", "head", "u", "0", "", " ", ".*", "(", "[a", "a)(b", "(?i)up", r"\1", "*", "all-linear", "default"]
)
MODULES = st.one_of(st.none(), NAMES, st.lists(NAMES, max_size=3))
NUMBERS = st.sampled_from([5e-324, 1e-320, 1e-30, 0.5, 1, 8, 1e30]) | st.floats(0, 1e30)
LAYERS = st.one_of(st.none(), st.integers(-1, 3), st.lists(st.integers(-1, 3), max_size=3))
TASKS = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=4)
# Of each field, values that may be right, alone or together with others.
NEAR: dict[str, st.SearchStrategy[Any]] = {
    "task_type": st.sampled_from([None, "FEATURE_EXTRACTION", "SEQ_CLS", "CAUSAL_LM"]),
    "auto_mapping": st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    "peft_version": st.text(max_size=3),
    "base_model_name_or_path": st.none() | st.text(max_size=3),
    "revision": st.none() | st.text(max_size=3),
    "inference_mode": st.booleans(),
    "r": st.integers(1, 70) | st.sampled_from([2**16, 2**16 + 1]),
    "lora_alpha": NUMBERS,
    "lora_dropout": st.sampled_from([0, 0.5, 0.999, 1]),
    "rank_pattern": st.dictionaries(NAMES, st.integers(1, 9) | st.just(2**16), max_size=3),
    "alpha_pattern": st.dictionaries(NAMES, NUMBERS, max_size=3),
    "target_modules": MODULES,
    "exclude_modules": MODULES,
    "layers_to_transform": LAYERS,
    "layers_pattern": MODULES,
    "modules_to_save": MODULES,
    "target_parameters": st.none() | st.lists(st.sampled_from(["up.weight", "conv.weight", "weight", "a"]), max_size=2),
    "bias": st.just("none"),
    "tasks": TASKS | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
    "task_descriptions": st.none() | st.dictionaries(st.sampled_from(["a", "b"]), st.text(max_size=3), max_size=2),
    "default_task": st.sampled_from([None, "a", "b", "c"]),
    "task_embedding": st.sampled_from(["learned", "text", "both"])
    | st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["learned", "text", "both"]), max_size=2),
    "text_encoder": st.none() | st.text(max_size=3),
    "text_encoder_revision": st.none() | st.text(max_size=3),
    "text_embedding_dim": st.none() | st.integers(1, 70) | st.just(2**16),
    "conditioning": st.sampled_from(["additive", "gated", "bilinear"]),
    "task_embedding_dim": st.integers(1, 70) | st.just(2**16),
    "hypernetwork_dim": st.integers(1, 70) | st.just(2**16),
    "hypernetwork_depth": st.integers(1, 4) | st.just(256),
    "head": st.sampled_from(["row", "factor", "pair"]),
    "normalization": st.sampled_from(NORMALIZATIONS),
    "normalization_bound": st.none() | NUMBERS,
    "normalization_ridge": st.none() | NUMBERS,
    "normalization_factors": st.sampled_from([None, "A", "both"]),
    "normalization_iterations": st.sampled_from([None, 1, 20, 1000]),
    "normalization_temperature": st.none() | NUMBERS,
    "init_weights": st.sampled_from([True, False, "zero_head", "zero_gain", 1]),
    "plugin": st.text(max_size=3),
}
ANYTHING = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), NAMES),
        st.sampled_from([-(2**31), 2**31, 2**63, 2**64, 10**40, 10**400, 1e308, -0.0, math.nan, math.inf, -math.inf]),
    ),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text() | NAMES, values, max_size=4),
    max_leaves=8,
)


@st.composite
def changes(draw: st.DrawFn, names: list[str]) -> dict[str, Any]:
    fields = {}
    for name in draw(st.lists(st.sampled_from(names), max_size=5, unique=True)):
        fields[name] = draw(NEAR[name] if name in NEAR and draw(st.sampled_from(range(8))) else ANYTHING)
    if draw(st.sampled_from(range(16))) == 1:
        fields |= draw(st.dictionaries(st.text(min_size=1).filter(lambda name: name not in FIELDS), ANYTHING))
    return fields


@pytest.fixture(scope="module", autouse=True)
def small_limit() -> Iterator[None]:
    """A network above a limit that fits the tiny model must not be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "MAX_PARAMETERS", 20_000)
        patch.setattr(encoders, "encode_texts", lambda encoder, texts, revision: (torch.ones(len(texts), 3), revision))
        yield


def assert_meant(error: Exception) -> None:
    assert isinstance(error, MEANT), error
    assert 0 < len(str(error)) < MAX_MESSAGE


def assert_plain(net: Net) -> None:
    assert not any(isinstance(module, HyperAdapterLayer) for module in net.modules())
    assert list(net.state_dict()) == list(NET.state_dict())
    assert torch.equal(net(INPUT), NET(INPUT))


@cases(0.4)
@given(changes(FIELDS))
def test_configurations(fields: dict[str, Any]) -> None:
    net = copy.deepcopy(NET)
    try:
        config = HyperAdapterConfig(**VALID | fields)
        # Of the task types, all but the one without a name want more of a model.
        config.task_type = None
        model = get_peft_model(net, config)
    except Exception as error:
        assert_meant(error)
        assert_plain(net)
    else:
        network = model.base_model.hyperadapter_networks["default"]
        assert sum(parameter.numel() for parameter in network.parameters()) <= loading.MAX_PARAMETERS
        has_vectors = network.task_embedding.has_vectors
        with nullcontext() if has_vectors else pytest.raises(RuntimeError, match="has no vectors of its descriptions"):
            model(INPUT, tasks=config.task_names[-1])


@cases(0.2)
@given(changes(FILE_FIELDS), st.sampled_from([PeftConfig, HyperAdapterConfig]))
def test_files_of_configurations(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], config_class: type[PeftConfig]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "configuration"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HYPERADAPTER"} | VALID | fields))
    try:
        config = config_class.from_pretrained(folder)
    except Exception as error:
        assert_meant(error)
    else:
        config.save_pretrained(folder)
        loaded = config_class.from_pretrained(folder)
        # By what is written, as no NaN would equal itself.
        assert json.dumps(sorted_sets(loaded), sort_keys=True) == json.dumps(sorted_sets(config), sort_keys=True)
        assert not set(fields) - {*FIELDS, "runtime_config"}


def sorted_sets(config: PeftConfig) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


@pytest.fixture(scope="module")
def model() -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = HyperAdapterConfig(**VALID, init_weights=False, modules_to_save=["head"])
        return get_peft_model(copy.deepcopy(NET), config).eval()


@pytest.fixture(scope="module")
def folder(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    model.save_pretrained(path)
    return path


DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *((torch.complex64,) if WRITES_COMPLEX else ()),
)
# Of the size of a float32 in half the bytes, so that the offsets still fit.
HALVED = ("BF16", "F16", "I16", "U16")
# All names of types that the format has had.
WRITTEN_DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "F9", "C64"),
    *("I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", ""),
)


def damage(data: st.DataObject, weights: dict[str, Tensor]) -> None:
    """Change the state dict in one way."""
    name = data.draw(st.sampled_from([*weights, "base_model.new"]))
    value = weights.get(name, torch.ones(2))
    kind = data.draw(st.sampled_from(["drop", "rename", "add", "shape", "dtype", "value", "swap"]))
    if kind == "drop":
        weights.pop(name, None)
    elif kind == "rename":
        new = name.replace(data.draw(st.sampled_from(name.split("."))), data.draw(st.text(max_size=5) | NAMES))
        weights[new] = weights.pop(name, value)
    elif kind == "add":
        places = [name, *NET.state_dict(), "base_model.hyperadapter_networks.default.base_norms"]
        weights[data.draw(st.sampled_from(["", "base_model.model.", "x."])) + data.draw(st.sampled_from(places))] = (
            value
        )
    elif kind == "shape":
        weights[name] = torch.ones(data.draw(st.lists(st.integers(0, 7), max_size=3)))
    elif kind == "dtype":
        weights[name] = value.to(data.draw(st.sampled_from(DTYPES)))
    elif kind == "value":
        number = data.draw(st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1e30]))
        weights[name] = torch.full(value.shape, number, dtype=torch.float32)
    else:
        other = data.draw(st.sampled_from([*weights, name]))
        weights[name], weights[other] = weights.get(other, value), value


def damage_header(data: st.DataObject, content: bytes) -> bytes:
    """Change what the file says about one tensor."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if header:
        entry = header[data.draw(st.sampled_from(sorted(header)))]
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        offsets = st.lists(st.integers(-1, 600) | st.sampled_from([2**40, 2**63, 2**64]), max_size=3)
        entry[key] = data.draw({"dtype": st.sampled_from(WRITTEN_DTYPES), "more": ANYTHING}.get(key, offsets))
        if key == "dtype" and entry["dtype"] in HALVED:
            entry["shape"] = [2, *entry["shape"]]
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + content[8 + length :]


def damage_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Change the file in one way."""
    # Most of the file is numbers; what is written about them matters more.
    header_end = min(int.from_bytes(content[:8], "little") + 8, len(content))
    place = data.draw(st.integers(0, len(content)) | st.integers(0, header_end))
    kind = data.draw(st.sampled_from(["truncate", "flip", "insert"]))
    if kind == "truncate":
        return content[:place]
    if kind == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        return content[:place] + bytes(byte ^ bit for byte in content[place : place + 1]) + content[place + 1 :]
    return content[:place] + data.draw(st.binary(max_size=4)) + content[place:]


@cases(0.4)
@given(st.data())
def test_weights(model: PeftModel, folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    broken = tmp_path_factory.getbasetemp() / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    weights = load_file(folder / WEIGHTS)
    for _ in range(data.draw(st.integers(0, 2))):
        damage(data, weights)
    # Some damage makes two names share their memory, which is not to be written.
    content = save({name: value.clone() for name, value in weights.items()})
    kind = data.draw(st.sampled_from(["whole", "header", "bytes"]))
    if kind != "whole":
        content = damage_header(data, content) if kind == "header" else damage_bytes(data, content)
    (broken / WEIGHTS).write_bytes(content)
    low_cpu_mem_usage = data.draw(st.booleans())
    if data.draw(st.booleans()):
        net = copy.deepcopy(NET)
        try:
            loaded = PeftModel.from_pretrained(net, broken, low_cpu_mem_usage=low_cpu_mem_usage)
        except Exception as error:
            assert_meant(error)
            assert_plain(net)
        else:
            loaded(INPUT)
        return
    loaded = copy.deepcopy(model)
    before, expected = list(loaded.state_dict()), model(INPUT)
    try:
        loaded.load_adapter(broken, "x", low_cpu_mem_usage=low_cpu_mem_usage)
    except Exception as error:
        assert_meant(error)
        assert list(loaded.peft_config) == ["default"]
        assert list(loaded.state_dict()) == before
    assert torch.equal(loaded(INPUT), expected)
