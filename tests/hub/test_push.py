"""Publishing on the Hub, and loading from there, against a server of our own."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hyperadapt import export_lora, push
from tests.support.helpers import example_batch, logits, run_python, snapshot
from tests.support.hub_helpers import (
    AUTO,
    FILES,
    REPO,
    contents,
    load,
    make_model,
    outputs,
    published,
    skip_if_cut_is_not_repeated,
)
from tests.support.hub_server import HubServer


@pytest.mark.parametrize("name", AUTO)
def test_a_pushed_model_loads_everywhere(hub: HubServer, tmp_path: Path, name: str) -> None:
    model = make_model(hub, tmp_path, name)
    before = snapshot(model)
    commit = push(model, REPO, commit_message="First", commit_description="Of many")
    [last, initial] = hub.commits(REPO)
    assert (last.title, last.description, initial.title) == ("First", "Of many", "initial commit")
    assert (commit.oid, commit.commit_url) == (last.oid, f"{hub.url}/{REPO}/commit/{last.oid}")
    model.save_pretrained(tmp_path / "local")
    local, remote = contents(tmp_path / "local"), published(hub)
    assert set(remote) == FILES
    assert {path: content for path, content in remote.items() if path != "README.md"} == {
        path: content for path, content in local.items() if path != "README.md"
    }
    card = ModelCard(remote["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (f"user/{name}", "hyperadapt")
    assert f'PeftModel.from_pretrained(base_model, "{REPO}")' in card.text
    tensors = HfApi().parse_safetensors_file_metadata(REPO, "adapter_model.safetensors").tensors
    assert set(tensors) == set(load_file(tmp_path / "local" / "adapter_model.safetensors"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    auto, auto_peft = AUTO[name]
    expected = outputs(model, name)
    for loaded in (
        PeftModel.from_pretrained(auto.from_pretrained(f"user/{name}"), REPO),
        auto_peft.from_pretrained(REPO),
    ):
        assert type(loaded) is type(model)
        assert torch.equal(outputs(loaded, name), expected)


def test_a_pushed_folder_is_published_byte_for_byte(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_model(hub, tmp_path).save_pretrained(folder)
    kept = {"figures/map.png": b"\x89PNG\r\n\x1a\n\0", ".eval_results/alpha.yaml": b"a: 1\n", "tokenizer.json": b"{}"}
    left_out = (
        "checkpoint-5/adapter_config.json",
        "checkpoint-5/optimizer.pt",
        "global_step5/states.pt",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "adapter_model.safetensors.tmp",
        ".secret",
        ".cache/huggingface/README.md",
        "figures/.hidden",
    )
    for name, content in kept.items() | {(name, b"x") for name in left_out}:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = contents(folder)
    # The weights are sent in several parts.
    hub.part_size = 20_000
    push(folder, REPO)
    assert len(hub.commits(REPO)) == 2
    assert sum(request.method == "PUT" for request in hub.requests) > 2
    remote = published(hub)
    assert set(remote) == FILES | set(kept)
    assert {path: before[path] for path in remote if path != "README.md"} == {
        path: content for path, content in remote.items() if path != "README.md"
    }
    # Only where the adapter is loaded from is another.
    card = before["README.md"].decode()
    assert card.count(json.dumps(str(folder))) == 1
    assert remote["README.md"].decode() == card.replace(json.dumps(str(folder)), json.dumps(REPO))
    assert contents(folder) == before


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"adapter_model.safetensors": "adapters.safetensors"},
        {"adapter_model.safetensors": "pytorch_lora_weights.safetensors", "adapter_config.json": "notes.json"},
    ],
    ids=["peft", "mlx", "diffusers"],
)
def test_exported_loras_are_published(hub: HubServer, tmp_path: Path, names: dict[str, str]) -> None:
    model, folder = make_model(hub, tmp_path), tmp_path / "export"
    export_lora(model, "beta", folder)
    for old, new in names.items():
        (folder / old).rename(folder / new)
    push(folder, REPO)
    remote = published(hub)
    assert {path: content for path, content in contents(folder).items() if path != "README.md"} == {
        path: content for path, content in remote.items() if path != "README.md"
    }
    if not names:
        loaded = load()
        assert isinstance(loaded.peft_config["default"], LoraConfig)
        batch = example_batch("llama", labels=False)
        torch.testing.assert_close(
            logits(loaded.eval(), batch), logits(model, batch, tasks="beta"), rtol=1e-4, atol=1e-4
        )


def test_a_second_push_updates_and_revisions_stay(hub: HubServer, tmp_path: Path) -> None:
    models = [make_model(hub, tmp_path, seed=seed) for seed in (2, 3)]
    first = push(models[0], REPO)
    second = push(models[1], REPO)
    push(models[0], REPO, revision="old")
    expected = [outputs(model) for model in models]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    assert [commit.oid for commit in hub.commits(REPO)][:2] == [second.oid, first.oid]
    assert hub.commits(REPO, "old")[1].oid == second.oid
    for revision, index in ((None, 1), ("main", 1), ("old", 0), (first.oid, 0), (second.oid, 1)):
        assert torch.equal(outputs(load(revision=revision)), expected[index]), revision


def test_what_has_not_changed_is_not_committed(hub: HubServer, tmp_path: Path) -> None:
    model = make_model(hub, tmp_path)
    first = push(model, REPO)
    assert push(model, REPO).oid == first.oid
    assert len(hub.commits(REPO)) == 2


def test_private_repositories(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(hub, tmp_path)
    push(model, "adapter", private=True, token="hf_user")
    assert hub.repos[REPO].private
    assert f'"{REPO}"' in hub.files(REPO)["README.md"].decode()
    for token in ("", "hf_guest"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises((RepositoryNotFoundError, ValueError), match="user/adapter"):
            load()
        assert torch.equal(outputs(load(token="hf_user")), outputs(model))
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    push(model, "user/public")
    with pytest.raises(
        ValueError, match=r"private=True, but 'user/public' is public already(.|\n)*Nothing was published"
    ):
        push(make_model(hub, tmp_path, seed=3), "user/public", private=True)
    assert len(hub.commits("user/public")) == 2


def test_gated_repositories(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(hub, tmp_path)
    push(model, REPO)
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    with pytest.raises(GatedRepoError, match="Access to model user/adapter is restricted"):
        ModelCard.load(REPO)
    assert torch.equal(outputs(load(token="hf_user")), outputs(model))


def test_subfolders(hub: HubServer, tmp_path: Path) -> None:
    models = {name: make_model(hub, tmp_path, seed=seed) for seed, name in enumerate(("one", "more/two"))}
    for name, model in models.items():
        push(model, REPO, subfolder=name)
    assert set(published(hub)) == {f"{name}/{file}" for name in models for file in FILES}
    for name, model in models.items():
        assert torch.equal(outputs(load(subfolder=name)), outputs(model))
        # As the card says.
        [call] = re.findall(r"model = (PeftModel.*)", hub.files(REPO)[f"{name}/README.md"].decode())
        base = AutoModelForCausalLM.from_pretrained("user/llama")
        assert torch.equal(outputs(eval(call, {"PeftModel": PeftModel, "base_model": base})), outputs(model))


def test_anybody_may_open_a_pull_request(hub: HubServer, tmp_path: Path) -> None:
    model = make_model(hub, tmp_path)
    push(model, REPO)
    before = hub.files(REPO)
    other = make_model(hub, tmp_path, seed=3)
    commit = push(other, REPO, token="hf_guest", create_pr=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert hub.files(REPO) == before
    assert torch.equal(outputs(load(revision="refs/pr/1")), outputs(other))
    # Further commits go into it by its name.
    push(model, REPO, revision="refs/pr/1")
    assert torch.equal(outputs(load(revision="refs/pr/1")), outputs(model))
    assert set(hub.repos[REPO].branches) == {"main", "refs/pr/1"}


ELSEWHERE = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import hyperadapt

folder = sys.argv[1]
model = AutoPeftModelForCausalLM.from_pretrained("user/adapter").eval()
with torch.no_grad():
    logits = model(**load_file(f"{folder}/batch.safetensors"), tasks="beta").logits
save_file({"logits": logits}, f"{folder}/logits.safetensors")
hyperadapt.push(model, "user/copy")
"""


def test_a_fresh_process_loads_and_publishes(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(hub, tmp_path)
    push(model, REPO, private=True)
    batch = example_batch("llama", labels=False)
    save_file(batch, tmp_path / "batch.safetensors")
    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:Use 'content=<...>' to upload raw:DeprecationWarning")
    run_python(ELSEWHERE, tmp_path)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(model, batch, tasks="beta"))
    assert hub.files("user/copy")["adapter_model.safetensors"] == hub.files(REPO)["adapter_model.safetensors"]


def test_a_download_that_is_cut_is_repeated(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_if_cut_is_not_repeated()
    model = make_model(hub, tmp_path)
    push(model, REPO)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    for cut in ("request", "response"):
        hub.fail("GET", r"/user/adapter/resolve/.*/adapter_model.safetensors", cut=cut)
    assert torch.equal(outputs(load()), outputs(model))
