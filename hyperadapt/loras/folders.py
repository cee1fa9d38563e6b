"""Folders of exported LoRAs: their names, and writing them."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from peft.utils import CONFIG_NAME

from hyperadapt.cards.card import CARD, may_be_written_anew
from hyperadapt.cards.lora_card import lora_card
from hyperadapt.config.checks import check_choice, shown
from hyperadapt.config.config import HyperAdapterType
from hyperadapt.files import whole_folders
from hyperadapt.loras.file_formats import BASE_CONFIG, FORMATS, is_whole, write_base_config
from hyperadapt.loras.lora import Lora, LoraFamily, warn_of_mistakes, warn_of_zeros

# Folders of these names, also with an ending, cannot be made on Windows.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{digit}" for name in ("com", "lpt") for digit in range(10))}


def check_folder_names(names: Sequence[str]) -> None:
    """Refuse what is no name of a folder on some file system, or means another folder."""
    seen: dict[str, str] = {}
    for name in names:
        is_plain = re.fullmatch(r"[^\x00-\x1f<>:\"/\\|?*]+", name) and name == name.strip() == name.strip(".")
        if not is_plain or len(name.encode()) > 255 or name.partition(".")[0].lower() in _RESERVED:
            raise ValueError(
                f"Task {shown(name)} cannot be the name of a folder: slashes and the like, control characters, spaces "
                "or dots at an end, more than 255 bytes, and names that Windows reserves are refused. Call "
                "rename_task, or export it with export_lora."
            )
        # macOS takes an é for an e with an accent, too.
        folder = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
        if folder in seen:
            raise ValueError(
                f"Tasks {shown(seen[folder])} and {shown(name)} would share a folder where case is ignored. "
                "Name every task once, call rename_task, or export them one by one with export_lora."
            )
        seen[folder] = name


def write_loras(loras: Iterable[Lora], folders: Sequence[Path], format: str) -> None:
    """Write LoRAs with their cards to a folder each; all of them, or none."""
    check_places(folders, format)
    zeros: list[str | None] = []
    families: list[LoraFamily] = []
    with whole_folders(folders) as new:
        for lora, place, folder in zip(loras, new, folders, strict=True):
            write_lora(lora, place, folder, format)
            zeros += [lora.task] if lora.is_zero else []
            families.append(lora.family)
    warn_of_zeros(zeros)
    # All of a call are of one adapter.
    warn_of_mistakes(families[:1], format)


def check_places(folders: Iterable[Path], format: str) -> None:
    """Refuse an unknown format, what is no folder in the place of one, and the folder of a hyperadapter."""
    check_choice("format", format, tuple(FORMATS))
    folders = list(folders)
    for folder in folders:
        if _holds_hyperadapter(folder):
            raise ValueError(
                f"directory={str(folder)!r} holds a hyperadapter, which the LoRA would replace. Pass another folder."
            )
    for place in {folder: None for path in folders for folder in (path, *path.parents)}:
        if os.path.lexists(place) and not place.is_dir():
            raise ValueError(f"directory={str(place)!r} is a file; pass a folder.")


def _holds_hyperadapter(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == HyperAdapterType.HYPERADAPTER.value


def write_lora(lora: Lora, place: Path, folder: Path, format: str) -> None:
    """Write the files of a LoRA to a place from which they are moved into `folder`."""
    FORMATS[format](lora, place)
    if format == "peft" and is_whole(folder) and (folder / BASE_CONFIG).exists():
        # That of an earlier export may name another task's labels.
        write_base_config(lora, place)
    if may_be_written_anew(folder):
        card = lora_card(lora.family.adapter, lora.task, lora.descriptions, str(folder), format)
        (place / CARD).write_text(card, encoding="utf-8")
