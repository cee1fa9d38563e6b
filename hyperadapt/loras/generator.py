"""LoRAs made from the files of an adapter, without its base model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.task_fields import descriptions_of
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.sharding import whole_network
from hyperadapt.loras.file_formats import peft_tensors
from hyperadapt.loras.folders import write_loras
from hyperadapt.loras.lora import Lora, lora_tensors, uniform_rank
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tasks.table import TaskTable
from hyperadapt.tuner.active import active_network
from hyperadapt.tuner.model import HyperAdapterModel
from hyperadapt.tuner.saved_adapter import read_adapter


@dataclass(frozen=True, eq=False)
class GeneratedLora:
    """A LoRA in memory, made by a ``LoraGenerator``."""

    lora: Lora

    def state_dict(self) -> dict[str, Tensor]:
        """The LoRA as PEFT saves one.

        Returns:
            As of ``LoraGenerator.state_dict``.
        """
        return peft_tensors(self.lora)

    def save(self, folder: str | os.PathLike[str], *, format: str = "peft") -> None:  # noqa: DOC502
        """Write the LoRA as a folder.

        Args:
            folder: As in ``export_lora``.
            format: As in ``export_lora``.

        Raises:
            ValueError: If the format is unknown or has no place for a module, or `folder` is a file.
        """
        write_loras([self.lora], [Path(folder)], format)


class LoraGenerator:
    """Makes ordinary LoRAs of an adapter's tasks, without the base model: from the adapter's files, or from a model.

    A LoRA is the same, bit for bit, whichever way it is made. What is generated is computed on the CPU if the adapter
    comes from files, and nothing is kept.

    Args:
        network: The adapter's hypernetwork. ``diagnose``, ``hyperadapt.plots`` and ``hyperadapt.cards`` take it as they
            take a model.
        others: Modules that are trained in full and saved with the adapter, by the names of their tensors in a file.
    """

    def __init__(self, network: HyperAdapterNetwork, others: dict[str, Tensor]) -> None:
        self.network = network
        self._others = others
        self._positions = {position.name: position for position in network.positions}
        self._base = network.config.base_facts

    @classmethod
    def from_pretrained(  # noqa: DOC502
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
    ) -> LoraGenerator:
        """Read an adapter's two files, ``adapter_config.json`` and ``adapter_model.safetensors``, and no others.

        They are checked as for a model before anything is made of them. The files of an adapter that was saved before
        its positions were saved along need the ``config.json`` of the base model, too; weights of that are never read.

        Args:
            source: The adapter's folder, or its name on the Hub.
            revision: Revision on the Hub.
            subfolder: Folder in the repository, or in the folder.
            token: Token for the Hub; None for the one that is logged in.

        Returns:
            The generator.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged or no hyperadapter's, or the two do not belong together.
        """
        if not Path(source).is_dir():
            files = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
            source = snapshot_download(os.fspath(source), revision=revision, token=token, allow_patterns=files)
        adapter = read_adapter(Path(source, subfolder or ""))
        return cls(adapter.network, dict(adapter.others))

    @classmethod
    def from_model(cls, model: nn.Module) -> LoraGenerator:  # noqa: DOC502
        """The generator of the adapter that is active in a model, whose parameters it uses.

        Args:
            model: A ``PeftModel`` with a hyperadapter. If it is sharded over processes, all must call this.

        Returns:
            The generator.

        Raises:
            ValueError: If several adapters are active, or parameters are partitioned by DeepSpeed's ZeRO-3 and not
                gathered.
        """
        adapter_name, network = active_network(model)
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
        prefix = f"base_model.{HyperAdapterModel.prefix}"
        others = {key: value.cpu().contiguous() for key, value in state_dict.items() if not key.startswith(prefix)}
        return cls(whole_network(network), others)

    @property
    def config(self) -> HyperAdapterConfig:
        """The adapter's configuration: ``base_model_name_or_path``, ``task_descriptions`` and the like."""
        return self.network.config

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return self.config.task_names

    @property
    def r(self) -> int:
        """Rank of the LoRAs, the same everywhere."""
        return uniform_rank(position.r for position in self.network.positions)

    @property
    def lora_config(self) -> LoraConfig:
        """The LoRAs' configuration: ``peft_config=`` of ``load_adapter``, with a ``state_dict``."""
        names = list(self._positions)
        endings = {name.rpartition(".")[2] for name in names}
        return LoraConfig(
            r=self.r,
            # The scaling is in the factors.
            lora_alpha=self.r,
            # Servers expect the last components, if they mean nothing else.
            target_modules=sorted(endings if self._base.has_own_endings else names),
            fan_in_fan_out=any(position.kind == "Conv1D" for position in self.network.positions),
            modules_to_save=self.config.modules_to_save,
            task_type=self.config.task_type,
            base_model_name_or_path=self.config.base_model_name_or_path,
            revision=self.config.revision,
            inference_mode=True,
        )

    def state_dict(self, task: str) -> dict[str, Tensor]:  # noqa: DOC502
        """Make one task's LoRA in memory.

        Args:
            task: Name of the task.

        Returns:
            Its tensors under PEFT's names, ``base_model.model.<module>.lora_A.weight`` ``(r, in_features)`` and
            ``.lora_B.weight`` ``(out_features, r)``, with the scaling inside, on the CPU: what ``export_lora`` writes.

        Raises:
            ValueError: If the task is unknown.
        """
        [lora] = self.loras([task])
        return peft_tensors(lora)

    def save(self, task: str, folder: str | os.PathLike[str], *, format: str = "peft") -> None:  # noqa: DOC502
        """Write one task as a LoRA folder, as ``export_lora`` does.

        Args:
            task: Name of the task.
            folder: As in ``export_lora``.
            format: As in ``export_lora``.

        Raises:
            ValueError: If the task or the format is unknown, the format has no place for a module, or `folder` is a
                file.
        """
        write_loras(self.loras([task]), [Path(folder)], format)

    def from_description(  # noqa: DOC502
        self, description: str | Sequence[str], *, text_encoder: str | Callable[[list[str]], Tensor] | None = None
    ) -> GeneratedLora:
        """Make the LoRA that a description asks for, in memory.

        Args:
            description: A text that describes the task, or several.
            text_encoder: As in ``generate_lora``.

        Returns:
            The LoRA, with ``state_dict()`` and ``save(folder, format=)``.

        Raises:
            ValueError: If the adapter knows no text, the description is empty, or the encoder is another one.
        """
        embedding = TaskTable(self.config, self.network.task_embedding).embed(description, text_encoder)
        texts = [description] if isinstance(description, str) else list(description)
        return GeneratedLora(self._made(embedding[None], None, texts))

    def loras(self, names: Sequence[str]) -> Iterator[Lora]:
        """The LoRAs of tasks in their order, each made when it is asked for."""
        ids = resolve_task_ids(list(names), self.tasks)
        texts = [descriptions_of(self.config.task_descriptions, name) for name in names]
        return map(self._made, ids[:, None], names, texts)

    @torch.no_grad()
    def _made(self, condition: Tensor, task: str | None, descriptions: Sequence[str]) -> Lora:
        """The LoRA of a task id ``(1,)`` or an embedding ``(1, task_embedding_dim)``.

        One task at a time, since sums in a product of matrices may be rounded in another way where there are more.
        """
        config = self.lora_config
        factors = {
            name: lora_tensors(self._positions[name], one, config.r) for name, one in self.network(condition).items()
        }
        return Lora(self.config, self._base, config, self._positions, factors, self._others, task, descriptions)
