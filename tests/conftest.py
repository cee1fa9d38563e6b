"""Settings shared by all tests: no network, quiet tokenizers, a local Hub, and a skip for GPU tests without a GPU."""

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator

import pytest
import torch

from tests.support.hub_server import HubServer

with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    HUB_PORT = _free.getsockname()[1]
_home = tempfile.mkdtemp(prefix="hyperadapt-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)

# Read when the Hugging Face libraries are first imported, which is after this file.
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",
    "HF_HOME": _home,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# huggingface_hub passes uploads to httpx in a way that httpx deprecates.
_UPLOADS = "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "hub" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings(_UPLOADS))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with nothing in it, and libraries that are logged in to it as "user" and have nothing in their cache."""
    import datasets.config
    from huggingface_hub import close_session, constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, name, False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    with HubServer(HUB_PORT).running() as server:
        yield server
        close_session()
