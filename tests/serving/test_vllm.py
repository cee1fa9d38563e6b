"""A real vLLM with the plugin, asked for tasks over HTTP; see "vLLM" in CONTRIBUTING.md."""

import json
import os
import shutil
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import hyperadapt
from tests.support.helpers import ROOT, TASKS, VOCABULARY, adapter_config, make_active
from tests.support.hub_server import HubServer

VLLM_PYTHON = os.environ.get("VLLM_PYTHON", "")
PROMPT = [5, 6, 7, 8, 9]
TOKENS = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not VLLM_PYTHON, reason="VLLM_PYTHON does not name the python of an environment with vLLM and PEFT"
    ),
]


def pushed(folder: Path, hub: HubServer) -> PeftModel:
    """The hyperadapter "user/two" of a base model that vLLM takes, "user/base"; both on the Hub."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=160, vocab_size=VOCABULARY, initializer_range=0.2))
    base.save_pretrained(folder / "base")
    hub.add_repo("user/base", {path.name: path for path in (folder / "base").iterdir()})
    base = LlamaForCausalLM.from_pretrained("user/base")
    model = make_active(get_peft_model(base, adapter_config(target_modules="all-linear", normalization_bound=2.0)))
    hyperadapt.push(model, "user/two")
    return model


def install(folder: Path) -> None:
    """What an installation tells of a package: vLLM looks for plugins there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata)
    lines = []
    for group, plugins in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in plugins.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


@contextmanager
def server(folder: Path, hub: HubServer, *options: str) -> Iterator[int]:
    """vLLM with both on a port, which is yielded; its log is ``folder/log``."""
    install(folder / "site")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = hub.environment() | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "site")]),
        "HYPERADAPT_LORA_RESOLVER_ADAPTERS": "user/two",
        "HYPERADAPT_LORA_RESOLVER_CACHE_DIR": str(folder / "cache"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [Path(VLLM_PYTHON).with_name("vllm"), "serve", "user/base", "--host", "127.0.0.1", "--port", port]
    model = ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32", "--max-model-len", "64"]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(
            [*map(str, command), *model, "--enable-lora", *options], env=environment, stdout=log, stderr=log
        ) as process,
    ):
        try:
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    time.sleep(1)
            yield port
        finally:
            process.terminate()


def tokens(port: int, model: str) -> list[int] | int:
    """What the server answers to the prompt; the status where it refuses."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as response:
            answer: list[int] = json.load(response)["choices"][0]["token_ids"]
            return answer
    except urllib.error.HTTPError as error:
        return error.code


def generated(model: PeftModel, **routing: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **routing)
    return output[0, len(PROMPT) :].tolist()


def test_vllm_answers_as_the_live_model_does(tmp_path: Path, hub: HubServer) -> None:
    model = pushed(tmp_path, hub)
    expected = {f"user/two/{task}": generated(model, tasks=task) for task in TASKS}
    with model.disable_adapter():
        expected["user/base"] = generated(model)
    assert len(set(map(tuple, expected.values()))) == 4
    # One LoRA in memory: each task is read from its folder again, the second time.
    with server(tmp_path, hub, "--max-loras", "1", "--max-cpu-loras", "1") as port:
        for name in [*expected, *expected]:
            assert tokens(port, name) == expected[name]
        for name in ("user/two/delta", "user/two/../alpha", "user/two"):
            assert tokens(port, name) == 404
    log = (tmp_path / "log").read_text()
    assert "No LoRA for 'user/two/delta': The adapter 'user/two' has no task 'delta'" in log
    assert log.count("LoRA for 'user/two/alpha': ") == 1


def test_vllm_ends_if_a_folder_is_gone(tmp_path: Path, hub: HubServer) -> None:
    """Why folders that a server was given stay: the day this fails, the cache may take them away."""
    pushed(tmp_path, hub)
    with server(tmp_path, hub, "--max-loras", "1", "--max-cpu-loras", "1") as port:
        assert isinstance(tokens(port, "user/two/alpha"), list)
        [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
        assert isinstance(tokens(port, "user/two/beta"), list)
        shutil.rmtree(folder)
        assert [tokens(port, name) for name in ("user/two/alpha", "user/two/beta")] == [500, 500]


def test_vllm_refuses_a_rank_that_it_has_no_room_for(tmp_path: Path, hub: HubServer) -> None:
    pushed(tmp_path, hub)
    with server(tmp_path, hub, "--max-lora-rank", "1") as port:
        assert tokens(port, "user/two/alpha") == 400
    assert "LoRA rank 8 is greater than max_lora_rank 1." in (tmp_path / "log").read_text()
