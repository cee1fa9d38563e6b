"""Publishing that fails: on the Hub is everything or what was there before, and the message says what to do."""

import json
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model

from hyperadapt import push
from tests.support.helpers import adapted_model, base_model, make_active, snapshot
from tests.support.hub_helpers import REPO, contents, skip_if_cut_is_not_repeated
from tests.support.hub_server import HubServer

COMMIT = f"/api/models/{REPO}/commit/main"
PREUPLOAD = f"/api/models/{REPO}/preupload/main"
NOTHING = f"Nothing was published on '{REPO}'"
UNKNOWN = f"Whether the commit to '{REPO}' arrived is not known; if so, it is complete."
UPLOAD = "Error while uploading 'adapter_model.safetensors' to the Hub."
FAULT = "The Hub has a fault: push again later."
LOST = "The connection was lost: push again."
# The client's waits, in seconds, before it gives up.
WAITS = [1, 2, 4, 8, 8]


@dataclass(frozen=True)
class Case:
    """What fails, the error (None if the client tries again with success), what it says, and how long was waited."""

    method: str
    path: str
    failure: dict[str, Any]
    error: type[Exception] | None = None
    messages: tuple[str, ...] = ()
    waits: tuple[float, ...] = ()
    arrives: bool = False


EVER = {"times": math.inf}
CASES = {
    "create: 429": Case(
        "POST",
        "/api/repos/create",
        {"status": 429},
        HfHubHTTPError,
        ("429 Too Many Requests", NOTHING, "wait some minutes and push again"),
    ),
    "create: 500": Case("POST", "/api/repos/create", {"status": 500}, HfHubHTTPError, (NOTHING, FAULT)),
    "create: cut": Case("POST", "/api/repos/create", {"cut": "request"}, HTTPError, (NOTHING, LOST)),
    "card: 502": Case("POST", "/api/validate-yaml", {"status": 502}, HfHubHTTPError, (NOTHING, FAULT)),
    "preupload: 404": Case(
        "POST", PREUPLOAD, {"status": 404}, HfHubHTTPError, (NOTHING, "Check the name and the revision")
    ),
    "preupload: 429 once": Case("POST", PREUPLOAD, {"status": 429, "headers": {"Retry-After": "1"}}, waits=(2,)),
    "preupload: 429": Case(
        "POST",
        PREUPLOAD,
        {"status": 429, "headers": {"Retry-After": "7"}} | EVER,
        HfHubHTTPError,
        ("429 Too Many Requests", NOTHING, "wait some minutes and push again"),
        waits=(8,) * 5,
    ),
    "preupload: 500 once": Case("POST", PREUPLOAD, {"status": 500}, waits=(1,)),
    "preupload: 500": Case(
        "POST", PREUPLOAD, {"status": 500} | EVER, HfHubHTTPError, (NOTHING, FAULT), waits=tuple(WAITS)
    ),
    "batch: 503": Case("POST", "/batch", {"status": 503} | EVER, HfHubHTTPError, (NOTHING, FAULT), waits=tuple(WAITS)),
    "upload: 403": Case("PUT", "/lfs/", {"status": 403}, RuntimeError, (UPLOAD, NOTHING, "(status 403). Push again.")),
    "upload: 500 once": Case("PUT", "/lfs/", {"status": 500}, waits=(1,)),
    "upload: 500": Case(
        "PUT",
        "/lfs/",
        {"status": 500} | EVER,
        RuntimeError,
        (UPLOAD, f"{NOTHING} (status 500). {FAULT}"),
        waits=tuple(WAITS),
    ),
    "upload: cut once": Case("PUT", "/lfs/", {"cut": "request"}, waits=(1,)),
    "upload: cut": Case(
        "PUT", "/lfs/", {"cut": "request"} | EVER, RuntimeError, (UPLOAD, f"{NOTHING} (", LOST), waits=tuple(WAITS)
    ),
    "upload: answer cut": Case("PUT", "/lfs/", {"cut": "response"}, waits=(1,)),
    "verify: 500": Case(
        "POST",
        "/lfs/verify",
        {"status": 500} | EVER,
        RuntimeError,
        (UPLOAD, f"{NOTHING} (status 500). {FAULT}"),
        waits=tuple(WAITS),
    ),
    "commit: 409": Case("POST", COMMIT, {"status": 409}, HfHubHTTPError, (NOTHING, "Somebody else changed")),
    "commit: 429": Case("POST", COMMIT, {"status": 429}, HfHubHTTPError, (NOTHING, "wait some minutes")),
    "commit: 500": Case("POST", COMMIT, {"status": 500}, HfHubHTTPError, (UNKNOWN, "push again")),
    "commit: cut": Case("POST", COMMIT, {"cut": "request"}, HTTPError, (UNKNOWN, "push again")),
    "commit: answer cut": Case("POST", COMMIT, {"cut": "response"}, HTTPError, (UNKNOWN, "push again"), arrives=True),
}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client wanted to wait."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=waited.append))
    return waited


def assert_same_model(model: PeftModel, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    assert model.peft_config["default"].to_dict() == config
    current = model.state_dict()
    assert set(current) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in current.items())


# A model differs from a folder in what comes before the Hub is called.
OF_MODELS = ("create: 500", "preupload: 429 once", "upload: 500", "commit: answer cut")


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "folder") for name in CASES), *((name, "model") for name in OF_MODELS)]
)
def test_everything_or_nothing(hub: HubServer, tmp_path: Path, waits: list[float], name: str, kind: str) -> None:
    case = CASES[name]
    if case.waits and ("429" in name or "cut" in name):
        skip_if_cut_is_not_repeated()
    first, second = adapted_model("llama"), make_active(adapted_model("llama"), seed=9)
    push(first, REPO)
    before, commits = hub.files(REPO), len(hub.commits(REPO))
    second.save_pretrained(tmp_path)
    source = second if kind == "model" else tmp_path
    state, config, local = snapshot(second), second.peft_config["default"].to_dict(), contents(tmp_path)
    hub.fail(case.method, re.escape(case.path), **case.failure)
    if case.error is None:
        push(source, REPO)
    else:
        with pytest.raises(case.error) as caught:
            push(source, REPO)
        for message in case.messages:
            assert message in str(caught.value)
    assert waits == list(case.waits)
    arrives = case.error is None or case.arrives
    assert len(hub.commits(REPO)) == commits + arrives
    if arrives:
        assert hub.files(REPO)["adapter_model.safetensors"] == local["adapter_model.safetensors"]
    else:
        assert hub.files(REPO) == before
    assert_same_model(second, state, config)
    assert contents(tmp_path) == local
    # As the message says.
    hub.stop_failing()
    push(source, REPO)
    assert len(hub.commits(REPO)) == commits + 1
    assert hub.files(REPO)["adapter_model.safetensors"] == local["adapter_model.safetensors"]


def test_a_new_repository_stays_empty(hub: HubServer, waits: list[float]) -> None:
    hub.fail("PUT", "/lfs/", status=500, times=math.inf)
    with pytest.raises(RuntimeError, match=NOTHING):
        adapted_model("llama").push_to_hub(REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}


# Token, whether the repository is there, and what the message says.
@pytest.mark.parametrize(
    ("token", "exists", "status", "message"),
    [
        (None, False, 401, "Log in with `hf auth login`, or pass as token= one that may write."),
        ("hf_unknown", True, 401, "Log in with `hf auth login`, or pass as token= one that may write."),
        ("hf_reader", False, 403, "The token may not write there: take one that may, ask the owner, or open a pull"),
        ("hf_guest", True, 403, "The token may not write there: take one that may, ask the owner, or open a pull"),
    ],
)
def test_tokens_that_may_not_write(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, exists: bool, token: str | None, status: int, message: str
) -> None:
    if exists:
        hub.add_repo(REPO, {"notes.txt": b"mine"})
        hub.repos[REPO].branches["dev"] = hub.repos[REPO].branches["main"]
    before = hub.files(REPO) if exists else None
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    for revision in (None, "dev"):
        with pytest.raises(HfHubHTTPError, match=re.escape(message)) as caught:
            push(adapted_model("llama"), REPO, token=token, revision=revision)
        assert NOTHING in str(caught.value)
        assert caught.value.response.status_code == status
        assert (hub.files(REPO, revision or "main") if REPO in hub.repos else None) == before


def test_somebody_elses_private_repository(hub: HubServer) -> None:
    hub.add_repo(REPO, {"notes.txt": b"mine"}, private=True)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden") as caught:
        push(adapted_model("llama"), REPO, token="hf_guest")
    assert NOTHING in str(caught.value)
    assert hub.files(REPO) == {"notes.txt": b"mine"}


def test_unknown_pull_request(hub: HubServer) -> None:
    with pytest.raises(RevisionNotFoundError, match="Check the name and the revision") as caught:
        push(adapted_model("llama"), REPO, revision="refs/pr/9")
    assert NOTHING in str(caught.value)


def test_a_commit_by_somebody_else_is_not_overwritten(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, {"README.md": b"---\nlicense: mit\n---\nOld words\n"})
    upload = HfApi.preupload_lfs_files

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        hub.add_files(REPO, {"README.md": b"---\nlicense: mit\n---\nNew words\n"})
        upload(*args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(HfHubHTTPError, match="Somebody else changed the repository at the same time: push again"):
        push(adapted_model("llama"), REPO)
    assert set(hub.files(REPO)) == {"README.md"}
    monkeypatch.undo()


def test_the_hub_is_gone(hub: HubServer, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HTTPError, match=re.escape(NOTHING) + r"\. " + re.escape(LOST)):
        push(adapted_model("llama"), REPO)


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_lost_on_the_way_to_xet(hub: HubServer, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def upload(*args: Any, **kwargs: Any) -> None:
        raise error("Network error")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", upload)
    with pytest.raises(error, match=rf"^Network error\n{NOTHING}\. {LOST}"):
        push(adapted_model("llama"), REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled, match=f"unset the `HF_HUB_OFFLINE`(.|\n)*{NOTHING}"):
        push(adapted_model("llama"), REPO)


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def card(metadata: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Title\n")


# How a folder is damaged, and what the message says.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "holds no adapter: it must have adapter_config.json and adapter_model.safetensors; or adapter_config.json and "
        "adapters.safetensors; or pytorch_lora_weights.safetensors.",
    ),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
    "truncated weights": (truncate, "adapter_model.safetensors' is damaged ("),
    "no tensors": (no_tensors, "adapter_model.safetensors' holds no tensors."),
    "truncated config": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 4,'),
        "adapter_config.json' is damaged (",
    ),
    "config of another kind": (
        lambda folder: (folder / "adapter_config.json").write_text("[4]"),
        "adapter_config.json' holds [4] instead of a dict.",
    ),
    "card without end": (card("tags: [a"), "README.md' cannot be published (while parsing"),
    "card of another kind": (card("- a"), "README.md' cannot be published (repo card metadata block"),
    "base model of another kind": (card("base_model: 4"), "cannot be published (Repo id must be a string"),
    "local base model": (card("base_model: /home/me/llama"), "cannot be published (Repo id must be in the form"),
    "bytes in the card": (
        lambda folder: (folder / "README.md").write_bytes(b"\xff\xfe"),
        "README.md' cannot be published ('utf-8' codec",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_not_published(hub: HubServer, tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    adapted_model("llama").save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        push(tmp_path, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "not a name"}, "not a name"),
        ({"revision": "dev", "create_pr": True}, "revision='dev' cannot be used with create_pr=True"),
        ({"subfolder": "../up"}, "subfolder='../up' must be a path of names"),
        ({"subfolder": ""}, "subfolder='' must be a path of names"),
        ({"subfolder": "/top"}, "subfolder='/top' must be a path of names"),
        ({"source": "/nowhere"}, "The folder '/nowhere' holds no adapter"),
    ],
)
def test_malformed_arguments(hub: HubServer, options: dict[str, Any], message: str) -> None:
    arguments = {"source": adapted_model("llama"), "repo_id": REPO} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        push(**arguments)
    assert hub.requests == []


def test_sources_of_another_type(hub: HubServer) -> None:
    with pytest.raises(TypeError, match="source is of type LlamaForCausalLM, but must be a PeftModel or a folder"):
        push(base_model("llama"), REPO)  # type: ignore[arg-type]
    lora = get_peft_model(base_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="PeftModel has no hyperadapter"):
        push(lora, REPO)
    assert hub.requests == []


def test_a_card_that_the_hub_refuses(hub: HubServer, tmp_path: Path) -> None:
    adapted_model("llama").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [1, 2]\n---\n")
    with pytest.raises(ValueError, match=rf'Invalid metadata in README.md.\n- "tags" must be(.|\n)*{NOTHING}\.$'):
        push(tmp_path, REPO)
    assert json.dumps(sorted(hub.files(REPO))) == '[".gitattributes"]'
