"""One adapter that a server serves: read when it is first asked for, its LoRAs made once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

from hyperadapt.config.checks import shown
from hyperadapt.loras.generator import LoraGenerator
from hyperadapt.serving.cache import LoraCache
from hyperadapt.serving.settings import BASE_MODEL, Settings


class ServedAdapter:
    """The LoRA folders of an adapter's tasks, and of the descriptions that it may be asked for."""

    def __init__(self, name: str, address: str, settings: Settings, cache: LoraCache) -> None:
        self.name, self._address, self._settings, self._cache = name, address, settings, cache
        # All is done in this one thread, so that requests that come at once make a LoRA once.
        self.thread = ThreadPoolExecutor(1, "hyperadapt")
        self._read: tuple[LoraGenerator, str] | None = None

    def folder(self, name: str, served_model: str) -> Path:
        """The folder of the LoRA of a task or of a description, for a server of a base model."""
        if self._read is None:
            generator = _read(self._address)
            self._read = generator, f"{generator.fingerprint()} {version('hyperadapt')}"
        generator, fingerprint = self._read
        self._check_base_model(generator.config.base_model_name_or_path, served_model)
        condition, save = self._found(generator, name)
        # Not a name from outside: tasks may be called anything.
        key = hashlib.sha256(json.dumps([fingerprint, condition]).encode()).hexdigest()[:32]
        return self._cache.folder(key, save)

    def _found(self, generator: LoraGenerator, name: str) -> tuple[object, Callable[[Path], None]]:
        """What a name stands for, a task or a description, and what writes its LoRA."""
        if name in generator.tasks:
            return ["task", name], partial(generator.save, name)
        descriptions = self._settings.descriptions
        if name in descriptions or name in descriptions.values():
            text = descriptions.get(name, name)
            return ["description", text], lambda folder: generator.from_description(text).save(folder)
        raise ValueError(
            f"The adapter {shown(self.name)} has no task {shown(name)}, nor is there such a description. Its "
            f"tasks are {shown(list(generator.tasks))}."
        )

    def _check_base_model(self, own: str | None, served: str) -> None:
        served = self._settings.base_model or served
        if not own or own == served or _is_folder_of(served, own):
            return
        raise ValueError(
            f"The adapter {shown(self.name)} was made for {shown(own)}, but the server has {served!r}. If that is the "
            f"same model under another name, set {BASE_MODEL}={shown(own)}."
        )


def _read(address: str) -> LoraGenerator:
    """The adapter in a folder, or in ``user/repository@revision/subfolder``."""
    match = re.fullmatch(r"(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<subfolder>.+))?", address)
    if Path(address).is_dir() or match is None:
        return LoraGenerator.from_pretrained(address)
    return LoraGenerator.from_pretrained(match["repository"], revision=match["revision"], subfolder=match["subfolder"])


def _is_folder_of(folder: str, model: str) -> bool:
    """Whether a folder is that of a model: by another path, or where the Hub's cache keeps a repository."""
    if not Path(folder).is_dir():
        return False
    if Path(model).is_dir():
        return Path(folder).samefile(model)
    return f"models--{model.replace('/', '--')}" in Path(folder).absolute().parts
