"""Export of a task as an ordinary LoRA folder that plain PEFT loads."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from hyperadapt import LoraGenerator, export_lora, export_loras, generate_lora
from hyperadapt.config.checks import shown
from hyperadapt.loras import file_formats as formats
from hyperadapt.loras import folders, tensor_files
from hyperadapt.loras.lora import Lora
from hyperadapt.normalization import NORMALIZATIONS
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
    run_python,
    snapshot,
    two_adapters,
)
from tests.support.tolerances import EXPORT_FLOAT32

NAMES = ("bert", "gpt2", "llama", "t5")
# Short names where they mean the adapted modules and no others.
ENDINGS = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "t5": {"q", "k", "v", "o", "wi", "wo"}}
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}

# The reader knows nothing of hyperadapters: it loads base models and folders with PEFT and writes logits.
READER = """
import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

root = Path(sys.argv[1])
for job in json.loads((root / "jobs.json").read_text()):
    folder = root / job["folder"]
    base = getattr(transformers, job["class"]).from_pretrained(root / job["base"])
    model = PeftModel.from_pretrained(base, folder).eval()
    assert type(model).__name__ == job["peft_class"], type(model)
    batch = load_file(root / f"{job['base']}.safetensors")
    with torch.no_grad():
        save_file({"logits": model(**batch).logits}, folder / "logits.safetensors")
assert not any(name.partition(".")[0] == "hyperadapt" for name in sys.modules)
"""


def contents(folder: Path) -> dict[Path, bytes | None]:
    """All files and folders below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def train_head(model: nn.Module) -> None:
    """Move the classifier, so that an export without it would differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(0.1)


def test_plain_peft_reproduces_the_live_task(tmp_path: Path) -> None:
    jobs, expected = [], {}
    for name in NAMES:
        batch = example_batch(name, labels=False)
        base_model(name).save_pretrained(tmp_path / name)
        save_file(batch, tmp_path / f"{name}.safetensors")
        for normalization in NORMALIZATIONS:
            # An update without a bound is not small against the base; its rounding would not be either.
            alpha = 0.5 if normalization == "none" else 8
            model = adapted_model(name, normalization=normalization, lora_alpha=alpha, task_type=TASK_TYPES[name], r=3)
            train_head(model)
            live = [logits(model, batch, tasks=task) for task in TASKS]
            assert (live[0] - live[1]).abs().max() > 0.01
            for task, outputs in zip(TASKS[:2], live, strict=False):
                folder = f"{name}-{normalization}-{task}"
                export_lora(model, task, tmp_path / folder)
                expected[folder] = outputs
                kinds = {"class": type(base_model(name)).__name__, "peft_class": type(model).__name__}
                jobs.append({"folder": folder, "base": name} | kinds)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_python(READER, tmp_path)
    for folder, outputs in expected.items():
        result = load_file(tmp_path / folder / "logits.safetensors")["logits"]
        assert_close(
            result,
            outputs,
            rtol=EXPORT_FLOAT32,
            atol=EXPORT_FLOAT32,
            msg=lambda message, folder=folder: f"{folder}: {message}",
        )


@pytest.mark.parametrize("name", NAMES)
def test_files(tmp_path: Path, name: str) -> None:
    model = adapted_model(name, r=3, lora_alpha=6, task_type=TASK_TYPES[name])
    base, folder = tmp_path / "base", tmp_path / "export"
    base_model(name).config.save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = str(base)
    before = snapshot(model)
    export_lora(model, "beta", folder)
    assert {path.name for path in folder.iterdir()} == FILES
    config = LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.bias, config.init_lora_weights) == (8, 8, "none", True)
    assert (config.task_type, config.base_model_name_or_path) == (TASK_TYPES[name], str(base))
    assert not any((config.use_rslora, config.use_dora, config.rank_pattern, config.alpha_pattern))
    assert config.fan_in_fan_out == (name == "gpt2")
    positions = model.base_model.router.network("default").positions
    state = load_file(folder / "adapter_model.safetensors")
    wanted = {
        f"base_model.model.{position.name}.lora_{factor}.weight": (8, position.in_features)
        if factor == "A"
        else (position.out_features, 8)
        for position in positions
        for factor in "AB"
    }
    if name == "bert":
        wanted |= {"base_model.model.classifier.weight": (3, 32), "base_model.model.classifier.bias": (3,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == wanted
    if name in ENDINGS:
        assert config.target_modules == ENDINGS[name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_target_modules_name_no_other_module(tmp_path: Path) -> None:
    model = adapted_model("llama", target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    export_lora(model, "alpha", tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.target_modules == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    batch = example_batch("llama")
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    close = {"rtol": EXPORT_FLOAT32, "atol": EXPORT_FLOAT32}
    assert_close(logits(loaded, batch), logits(model, batch, tasks="alpha"), **close)


def test_overwrites_its_own_files_only(tmp_path: Path) -> None:
    model = adapted_model("llama")
    (tmp_path / "README.md").write_text("mine")
    export_lora(model, "alpha", tmp_path)
    first = load_file(tmp_path / "adapter_model.safetensors")
    export_lora(model, "beta", str(tmp_path))
    second = load_file(tmp_path / "adapter_model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert (tmp_path / "README.md").read_text() == "mine"
    assert any(not torch.equal(first[key], second[key]) for key in first)
    export_lora(model, "alpha", tmp_path)
    third = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(first[key], third[key]) for key in first)


def test_the_adapter_that_is_active_is_exported(tmp_path: Path) -> None:
    model = two_adapters()
    model.set_adapter("second")
    export_lora(model, "two", tmp_path / "new" / "folder")
    config = LoraConfig.from_pretrained(tmp_path / "new" / "folder")
    assert (config.r, config.target_modules) == (8, {"q_proj", "up_proj"})


def test_export_is_exact_while_merged(tmp_path: Path) -> None:
    model = adapted_model("llama")
    export_lora(model, "alpha", tmp_path / "live")
    model.set_task("beta")
    model.merge_adapter()
    export_lora(model, "alpha", tmp_path / "merged")
    live, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("live", "merged"))
    assert all(torch.equal(live[key], merged[key]) for key in live)


@pytest.mark.parametrize(
    ("case", "existing"),
    [
        ("unknown task", False),
        ("several adapters", False),
        ("save fails", False),
        ("save fails", True),
        ("config fails", True),
        ("card fails", False),
    ],
)
def test_failures_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, existing: bool) -> None:
    model, folder = two_adapters(), tmp_path / "export"
    if existing:
        export_lora(model, "alpha", folder)
    before = contents(tmp_path)
    task, error, message = "beta", OSError, "disk full"

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    if case == "unknown task":
        task, error, message = "delta", ValueError, f"Unknown task 'delta'. Known tasks: {TASKS}."
    elif case == "several adapters":
        model.base_model.set_adapter(["default", "second"])
        error, message = ValueError, "One adapter must be active, but ['default', 'second'] are."
    elif case == "save fails":
        monkeypatch.setattr(tensor_files, "save_file", fail)
    elif case == "card fails":
        monkeypatch.setattr(folders, "lora_card", fail)
        folder = tmp_path / "deeper" / "export"
    else:
        monkeypatch.setattr(LoraConfig, "save_pretrained", fail)
    with pytest.raises(error, match=re.escape(message)):
        export_lora(model, task, folder)
    assert contents(tmp_path) == before


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"directory={str(path)!r} is a file; pass a folder.")):
        export_lora(adapted_model("llama"), "alpha", path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lora_never_replaces_a_hyperadapter(tmp_path: Path) -> None:
    model = adapted_model("llama", tasks={"alpha": "find the topic"}, task_embedding="text", text_encoder=letters)
    model.save_pretrained(str(tmp_path / "alpha"))
    before, message = contents(tmp_path), r"/alpha' holds a hyperadapter, which the LoRA would replace. Pass another"
    for write in (
        lambda: export_lora(model, "alpha", tmp_path / "alpha"),
        lambda: export_loras(model, tmp_path),
        lambda: LoraGenerator.from_model(model).save_all(tmp_path),
        lambda: generate_lora(model, "is it spam", tmp_path / "alpha", text_encoder=letters),
    ):
        with pytest.raises(ValueError, match=message):
            write()
    assert contents(tmp_path) == before


def test_tied_weights_that_are_saved_with_an_adapter(tmp_path: Path) -> None:
    base = base_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    # PEFT saves embeddings that are not those of the base model.
    base.resize_token_embeddings(base.config.vocab_size + 8, mean_resizing=False)
    model = make_active(get_peft_model(base, adapter_config(task_type="CAUSAL_LM")))
    with pytest.warns(UserWarning, match="as the embedding layer has been resized"):
        export_lora(model, "beta", tmp_path / "lora")
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in ("lm_head", "transformer.wte"):
        assert torch.equal(saved[f"base_model.model.{name}.weight"], base.lm_head.weight)


@pytest.mark.parametrize("settings", [{"text_encoder": letters}, BILINEAR], ids=["gated", "bilinear"])
def test_a_description_becomes_a_lora_folder(tmp_path: Path, settings: dict[str, Any]) -> None:
    encoder, tasks = settings["text_encoder"], {"alpha": "find the topic", "beta": "is it spam"}
    model = adapted_model("llama", tasks=tasks, task_embedding="text", **settings)
    description = "which language is it"
    generate_lora(model, description, tmp_path / "generated", text_encoder=encoder)
    assert model.peft_config["default"].tasks == ["alpha", "beta"]
    batch = example_batch("llama", labels=False)
    plain = PeftModel.from_pretrained(base_model("llama"), tmp_path / "generated")
    assert isinstance(plain.peft_config["default"], LoraConfig)
    model.add_task("new", description=description, text_encoder=encoder)
    expected = logits(model, batch, tasks="new")
    assert torch.allclose(logits(plain, batch), expected, rtol=EXPORT_FLOAT32, atol=EXPORT_FLOAT32)
    assert not torch.allclose(logits(model, batch, tasks="alpha"), expected, atol=1e-2)
    export_lora(model, "new", tmp_path / "exported")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("generated", "exported"))
    assert all(torch.equal(first[key], second[key]) for key in second)
    with pytest.raises(ValueError, match="has no task with a description"):
        generate_lora(adapted_model("llama"), description, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("ranks", "r"), [((1, 2), 8), ((8, 3), 8), ((9, 4), 16), ((256, 1), 256), ((300, 257), 300)])
def test_every_module_gets_a_rank_that_servers_take(tmp_path: Path, ranks: tuple[int, int], r: int) -> None:
    patterns = {"rank_pattern": {"v_proj": ranks[1]}, "alpha_pattern": {"v_proj": 3}}
    model = adapted_model("llama", r=ranks[0], target_modules=["q_proj", "v_proj"], **patterns)
    export_lora(model, "beta", tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (r, r)
    assert (written["rank_pattern"], written["alpha_pattern"], written["modules_to_save"]) == ({}, {}, None)
    state = load_file(tmp_path / "adapter_model.safetensors")
    generated = model.base_model.router.factors_of_task("default", "beta")
    assert {len(factors.lora_A[0]) for factors in generated.values()} == set(ranks)
    for name, factors in generated.items():
        lora_A, lora_B = (state[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        rank = len(factors.lora_A[0])
        assert len(lora_A) == lora_B.shape[1] == r
        assert torch.equal(lora_A[:rank], factors.lora_A[0])
        assert torch.equal(lora_B[:, :rank], factors.outer()[0])
        assert not lora_A[rank:].any()
        assert not lora_B[:, rank:].any()


def test_all_tasks_are_exported_to_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"task {index}" for index in range(17)]
    model = adapted_model("llama", tasks=names, target_modules=["q_proj", "v_proj"])
    network = model.base_model.router.network("default")
    calls, forward = [], network.forward
    monkeypatch.setattr(
        network, "forward", lambda tasks, **options: calls.append(len(tasks)) or forward(tasks, **options)
    )
    folders = export_loras(model, tmp_path / "all")
    # However many there are, memory holds one.
    assert calls == [1] * 17
    assert folders == {name: tmp_path / "all" / name for name in names}
    assert set((tmp_path / "all").iterdir()) == set(folders.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "all"]
    for name in (names[0], names[15], names[16], names[-1]):
        export_lora(model, name, tmp_path / "alone")
        assert {path.name for path in folders[name].iterdir()} == FILES
        for file in FILES - {"README.md"}:
            assert (folders[name] / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_some_tasks_are_exported_beside_what_is_there(tmp_path: Path) -> None:
    model = adapted_model("llama")
    (tmp_path / "gamma").mkdir()
    for name in ("README.md", "mine"):
        (tmp_path / "gamma" / name).write_text("mine")
    assert export_loras(model, str(tmp_path), ["gamma", "beta"], format="mlx") == {
        "gamma": tmp_path / "gamma",
        "beta": tmp_path / "beta",
    }
    files = {"README.md", "adapter_config.json", "adapters.safetensors"}
    assert {path.name for path in (tmp_path / "gamma").iterdir()} == {*files, "mine"}
    assert {path.name for path in (tmp_path / "beta").iterdir()} == files
    assert (tmp_path / "gamma" / "README.md").read_text() == "mine"


UNSAFE = ["a/b", "a\\b", "..", "../a", ".hidden", "ends.", " a", "a ", "a\nb", "a\0b", "a|b", "w?", "é" * 128]
UNSAFE += ["C:", "con", "Nul.txt", "COM1"]


def test_a_task_that_cannot_name_a_folder_is_refused(tmp_path: Path) -> None:
    model = adapted_model("llama", tasks=["alpha", *UNSAFE], target_modules=["q_proj"])
    for name in UNSAFE:
        with pytest.raises(ValueError, match=re.escape(f"Task {shown(name)} cannot be the name of a folder: ")):
            export_loras(model, tmp_path / "all", ["alpha", name])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (["Beta", "beta"], ValueError, "Tasks 'Beta' and 'beta' would share a folder where case is ignored."),
        (["beta", "beta"], ValueError, "Tasks 'beta' and 'beta' would share a folder"),
        (["caf\u00e9", "cafe\u0301"], ValueError, "would share a folder where case is ignored."),
        (["beta", "delta"], ValueError, "Unknown task 'delta'."),
        ([], ValueError, "tasks is empty"),
        ("beta", TypeError, "tasks='beta' must be a list of names, not str."),
        (["beta", 3], ValueError, "tasks=['beta', 3] holds 3"),
    ],
)
def test_tasks_are_checked_before_anything_is_written(tmp_path: Path, tasks: Any, error: Any, message: str) -> None:
    model = adapted_model("llama", tasks=["alpha", "beta", "Beta", "caf\u00e9", "cafe\u0301"])
    with pytest.raises(error, match=re.escape(message)):
        export_loras(model, tmp_path / "all", tasks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_of_several_tasks_all_or_none_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    model, written = adapted_model("llama"), []
    if existing:
        export_lora(model, "alpha", tmp_path / "all" / "alpha")
    before = contents(tmp_path)

    def fail_at_the_second(lora: Lora, folder: Path) -> None:
        if written:
            raise OSError("disk full")
        written.append(folder)
        formats._write_peft(lora, folder)

    monkeypatch.setitem(formats.FORMATS, "peft", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        export_loras(model, tmp_path / "all")
    assert len(written) == 1
    assert contents(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / "all").mkdir(exist_ok=True)
    (tmp_path / "all" / "beta").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"directory='.*beta' is a file; pass a folder\."):
        export_loras(model, tmp_path / "all")
    assert contents(tmp_path) == before
