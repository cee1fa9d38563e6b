"""Cards on the Hub, and what PEFT and transformers publish by themselves."""

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import PushToHubMixin

from hyperadapt import push
from hyperadapt.cards.card import MARKER
from hyperadapt.trainer import HyperAdapterTrainer
from tests.support.helpers import MIXED, adapter_config, example_batch, logits, make_active
from tests.support.hub_helpers import FILES, REPO, load, make_model, outputs, published
from tests.support.hub_server import HubServer


def test_plain_push_to_hub(hub: HubServer, tmp_path: Path) -> None:
    model = make_model(hub, tmp_path)
    theirs = set(inspect.signature(PushToHubMixin.push_to_hub).parameters)
    assert theirs <= {"self", *inspect.signature(model.push_to_hub).parameters}
    commit = model.push_to_hub(
        REPO,
        commit_message="Mine",
        private=True,
        revision="branch",
        tags="trec",
        max_shard_size="5GB",
        token="hf_user",
    )
    [last, initial] = hub.commits(REPO, "branch")
    assert (last.oid, last.title, initial.oid) == (commit.oid, "Mine", hub.commits(REPO)[0].oid)
    assert hub.repos[REPO].private
    remote = published(hub, revision="branch")
    assert set(remote) == FILES
    card = ModelCard(remote["README.md"].decode())
    assert {"hyperadapt", "trec"} <= set(card.data.tags)
    assert card.data.library_name == "hyperadapt"
    assert "import hyperadapt" in card.text
    assert torch.equal(outputs(load(revision="branch")), outputs(model))


def test_a_card_that_somebody_edited_keeps_its_text(hub: HubServer, tmp_path: Path) -> None:
    model = make_model(hub, tmp_path)
    words = "---\nlicense: mit\ntags: [mine]\n---\n\n# My words\n"
    for publish in (push, lambda model, repo_id: model.push_to_hub(repo_id)):
        hub.add_repo(REPO, {"README.md": words.encode(), "notes.txt": b"kept"})
        publish(model, REPO)
        card = ModelCard(hub.files(REPO)["README.md"].decode())
        assert card.text == "\n# My words\n"
        assert (card.data.license, card.data.base_model) == ("mit", "user/llama")
        assert set(card.data.tags) > {"mine", "hyperadapt"}
        assert hub.files(REPO)["notes.txt"] == b"kept"


def test_other_cards_are_replaced(hub: HubServer, tmp_path: Path) -> None:
    push(make_model(hub, tmp_path), REPO)
    old = hub.files(REPO)["README.md"].decode()
    assert MARKER in old
    assert "`delta`" not in old
    model = make_model(hub, tmp_path, tasks=["alpha", "beta", "gamma", "delta"])
    push(model, REPO)
    assert "`delta`" in hub.files(REPO)["README.md"].decode()
    model.save_pretrained(tmp_path / "local")
    (tmp_path / "local" / "README.md").write_text("---\nlicense: mit\n---\n# The folder's card\n")
    push(tmp_path / "local", REPO)
    assert hub.files(REPO)["README.md"] == b"---\nlicense: mit\n---\n# The folder's card\n"


def test_the_active_adapter_goes_to_the_top(hub: HubServer, tmp_path: Path) -> None:
    model = make_model(hub, tmp_path)
    model.add_adapter("second", adapter_config(tasks=["one", "two"], target_modules=["q_proj"], r=2))
    make_active(model)
    for active, folder, other in (("default", "second", "second"), ("second", "default", "default")):
        model.set_adapter(active)
        model.push_to_hub(f"user/{active}")
        names = {*FILES, f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors"}
        assert set(published(hub, f"user/{active}")) == names
        base = AutoModelForCausalLM.from_pretrained("user/llama")
        loaded = PeftModel.from_pretrained(base, f"user/{active}", adapter_name=active)
        loaded.load_adapter(f"user/{active}", other, subfolder=other)
        for name, tasks in (("default", MIXED), ("second", ["one", "two", "two", "one"])):
            model.set_adapter(name)
            loaded.set_adapter(name)
            batch = example_batch("llama", labels=False)
            assert torch.equal(logits(loaded.eval(), batch, tasks=tasks), logits(model, batch, tasks=tasks))
    model.set_adapter("second")
    push(model, REPO)
    assert set(published(hub)) == FILES
    assert json.loads(published(hub)["adapter_config.json"])["tasks"] == ["one", "two"]
    model.base_model.set_adapter(["default", "second"])
    for publish in (push, lambda model, repo_id: model.push_to_hub(repo_id)):
        with pytest.raises(ValueError, match=r"One adapter must be active, but \['default', 'second'\] are"):
            publish(model, "user/both")
    assert "user/both" not in hub.repos


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_publishes_itself(hub: HubServer, tmp_path: Path, duplicate: Any) -> None:
    model = make_model(hub, tmp_path)
    copied = duplicate(model)
    make_active(copied, seed=9)
    copied.push_to_hub(REPO)
    assert torch.equal(outputs(load()), outputs(copied))
    assert not torch.equal(outputs(copied), outputs(model))
    copied.save_pretrained(tmp_path / "copied")
    assert MARKER in (tmp_path / "copied" / "README.md").read_text()


def test_trainer_publishes_its_run(hub: HubServer, tmp_path: Path) -> None:
    model = make_model(hub, tmp_path)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in example_batch("llama")["input_ids"]]
    arguments = TrainingArguments(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=REPO,
        hub_private_repo=True,
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = {name: Dataset.from_list(rows) for name in ("alpha", "beta")}
    trainer = HyperAdapterTrainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    assert {"Training in progress, step 1", "End of training"} <= {commit.title for commit in hub.commits(REPO)}
    assert set(published(hub)) == FILES | {"training_args.bin"}
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("hyperadapt", "user/llama")
    assert {"hyperadapt", "peft"} <= set(card.data.tags)
    assert torch.equal(outputs(load()), outputs(model))
