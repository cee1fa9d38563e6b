"""A trained adapter that is asked by descriptions: its answers, and the LoRA that a description makes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import Tensor

from examples.space.describer import Describer
from examples.space.facts import Facts
from examples.support.encoder import load_base, load_tokenizer
from hyperadapt import LoraGenerator

FOLDER = Path("runs/space")


class Reader:
    """The adapter of a folder; nothing of it changes between calls."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "adapter_config.json").exists():
            raise FileNotFoundError(f"There is no adapter in {folder}. Train it: python -m examples.space.train")
        self.facts = Facts.load(folder)
        self._model = PeftModel.from_pretrained(load_base(2, seed=0), folder).eval()
        self._tokenizer, self._describer = load_tokenizer(), Describer()
        self._generator = LoraGenerator.from_pretrained(folder)

    @torch.no_grad()
    def yes(self, texts: Sequence[str], description: str) -> list[float]:
        """How sure a yes is for each text, from 0 to 1."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.facts.max_length, return_tensors="pt"
        )
        logits = self._model(**batch, task_embeddings=self.embedding(description)).logits
        shares: list[float] = logits.softmax(-1)[:, 1].tolist()
        return shares

    def control(self, description: str) -> str:
        """The description of some other concept, always the same one."""
        others = [concept.description for concept in self.facts.concepts if concept.description != description]
        return others[int(hashlib.sha256(description.encode()).hexdigest(), 16) % len(others)]

    def embedding(self, description: str) -> Tensor:
        """The task embedding that a description gives, ``(task_embedding_dim,)``."""
        embedding: Tensor = self._model.embed_description(description, text_encoder=self._describer)
        return embedding

    @torch.no_grad()
    def trained_embeddings(self) -> Tensor:
        """Those of the trained concepts, ``(concepts, task_embedding_dim)``."""
        names = [concept.name for concept in self.facts.concepts if concept.is_trained]
        task_ids = torch.tensor([self._generator.tasks.index(name) for name in names])
        embeddings: Tensor = self._generator.network.task_embedding(task_ids)
        return embeddings

    def update_sizes(self, description: str) -> dict[str, float]:
        """Adapted module -> size of its update ΔW = B·A, relative to its weight."""
        lora = self._generator.from_description(description, text_encoder=self._describer).state_dict()
        sizes = {}
        for name, factor in lora.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                update = lora[name.replace("lora_A", "lora_B")] @ factor
                weight = self._model.base_model.model.get_submodule(module).base_layer.weight
                sizes[module] = float(update.norm() / weight.norm())
        return sizes

    def write_lora(self, description: str, path: Path) -> Path:
        """Write the LoRA of a description as a zip file, `path` with its ending."""
        with TemporaryDirectory() as temporary:
            folder = Path(temporary, path.name)
            self._generator.from_description(description, text_encoder=self._describer).save(folder)
            return Path(shutil.make_archive(str(path), "zip", temporary, path.name))
