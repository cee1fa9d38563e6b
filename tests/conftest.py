"""Settings shared by all tests: no network, quiet tokenizers, and a skip for GPU tests without a GPU."""

import os

import pytest
import torch

# Read when the Hugging Face libraries are first imported, which is after this file.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
