"""LoRAs made from the files of an adapter, without its base model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers.utils import logging

from hyperadapt.config.checks import checked_names, shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.task_fields import descriptions_of
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.hypernetwork.sharding import whole_network
from hyperadapt.loras.file_formats import peft_tensors
from hyperadapt.loras.folders import check_folder_names, check_places, write_loras
from hyperadapt.loras.library import unfinished_library
from hyperadapt.loras.lora import Lora, LoraFamily, lora_tensors, warn_of_mistakes, warn_of_zeros
from hyperadapt.tasks.ids import resolve_task_ids
from hyperadapt.tuner.active import active_network, find_tuner
from hyperadapt.tuner.model import HyperAdapterModel
from hyperadapt.tuner.new_tasks import ExampleReader, rows_in
from hyperadapt.tuner.saved_adapter import read_adapter

if TYPE_CHECKING:
    from hyperadapt.tasks.fitting import Examples


@dataclass(frozen=True, eq=False)
class GeneratedLora:
    """A LoRA in memory, made by a ``LoraGenerator``."""

    lora: Lora

    def state_dict(self) -> dict[str, Tensor]:
        """The LoRA as PEFT saves one.

        Returns:
            As of ``LoraGenerator.state_dict``.
        """
        return _copied(peft_tensors(self.lora))

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

    Raises:
        ValueError: If the network holds numbers that are not finite.
    """

    def __init__(self, network: HyperAdapterNetwork, others: dict[str, Tensor]) -> None:  # noqa: DOC502
        self.network = network
        _check_finite(network)
        self._model: HyperAdapterModel | None = None
        self._family = LoraFamily(network.config, {one.name: one for one in network.positions}, others)

    @classmethod
    def from_pretrained(  # noqa: DOC503
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
            try:
                source = snapshot_download(os.fspath(source), revision=revision, token=token, allow_patterns=files)
            except HFValidationError as error:
                raise FileNotFoundError(
                    f"{os.fspath(source)!r} is neither a folder nor a name on the Hub. Name the folder of an adapter."
                ) from error
        adapter = read_adapter(Path(source, subfolder or ""))
        return cls(adapter.network, dict(adapter.others))

    @classmethod
    def from_model(cls, model: nn.Module) -> LoraGenerator:  # noqa: DOC502
        """The generator of the adapter that is active in a model.

        It uses the model's hypernetwork, and copies of what is trained in full (``modules_to_save``): after more
        training make a new one.

        Args:
            model: A ``PeftModel`` with a hyperadapter. If it is sharded over processes, all must call this.

        Returns:
            The generator.

        Raises:
            ValueError: If several adapters are active, or parameters are partitioned by DeepSpeed's ZeRO-3 and not
                gathered.
        """
        adapter_name, network = active_network(model)
        generator = cls(whole_network(network), _trained_in_full(model, adapter_name))
        generator._model = find_tuner(model)
        uncommon = _uncommon_convolutions(generator._model, network)
        generator._family = replace(generator._family, uncommon_convolutions=uncommon)
        return generator

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
        return self._family.r

    @property
    def lora_config(self) -> LoraConfig:
        """The LoRAs' configuration: ``peft_config=`` of ``load_adapter``, with a ``state_dict``."""
        return self._family.config()

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
        [lora] = loras_of(self, [task])
        return _copied(peft_tensors(lora))

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
        write_loras(loras_of(self, [task]), [Path(folder)], format)

    def save_all(  # noqa: DOC502
        self, folder: str | os.PathLike[str], tasks: Sequence[str] | None = None, *, format: str = "peft"
    ) -> dict[str, Path]:
        """Write many tasks as LoRA folders, one after the other, of which memory holds two.

        Each is complete or absent. What a call has done that failed or was killed stays, and the same call goes on from
        there; a call that has ended begins anew. A bar on the standard error shows rate and size, unless transformers'
        progress bars are off.

        Args:
            folder: Folder that gets a folder for each task, named after it; made if missing.
            tasks: Names of the tasks; None for all.
            format: As in ``export_lora``.

        Returns:
            The folders by task.

        Raises:
            TypeError: If `tasks` is no list of names.
            ValueError: As in ``export_loras``.
        """
        names = self.tasks if tasks is None else checked_names("tasks", tasks)
        resolve_task_ids(names, self.tasks)
        check_folder_names(names)
        folders = {name: Path(folder, name) for name in names}
        check_places(folders.values(), format)
        zeros: list[str | None] = []
        with unfinished_library(Path(folder), self.fingerprint(), format) as library:
            missing = [name for name in names if not library.has(name)]
            with (
                logging.tqdm(total=len(names), initial=len(names) - len(missing), unit="LoRA") as bar,
                ThreadPoolExecutor(1) as maker,
            ):
                loras = loras_of(self, missing) if missing else iter(())
                coming = maker.submit(_next, loras)
                while (lora := coming.result()) is not None:
                    # The next one is made while this one is written.
                    coming = maker.submit(_next, loras)
                    library.add(lora)
                    zeros += [lora.task] if lora.is_zero else []
                    bar.set_postfix_str(library.progress, refresh=False)
                    bar.update()
        warn_of_zeros(zeros)
        warn_of_mistakes([self._family], format)
        return folders

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
        embedding = self.network.table.embed(description, text_encoder)
        texts = [description] if isinstance(description, str) else list(description)
        return GeneratedLora(self._made(embedding[None], None, texts))

    def from_examples(  # noqa: DOC503
        self,
        examples: Examples,
        *,
        description: str | Sequence[str] | None = None,
        text_encoder: str | Callable[[list[str]], Tensor] | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
    ) -> GeneratedLora:
        """Make the LoRA that examples ask for, in memory, in one forward pass over them.

        Args:
            examples: As in ``HyperAdapterModel.embed_examples``.
            description: Likewise.
            text_encoder: Likewise.
            data_collator: Likewise.

        Returns:
            The LoRA, with ``state_dict()`` and ``save(folder, format=)``.

        Raises:
            TypeError: If examples are no rows.
            ValueError: If the generator was made from files, which lack the base model that reads examples, or the
                adapter was trained without any, or they are wrong.
        """
        self.network.table.check_reads_examples(len(rows_in(examples)), "examples")
        if self._model is None:
            raise ValueError(
                "This generator was made from an adapter's files, and examples are read by the base model. Load that "
                "with PeftModel.from_pretrained, and make the generator with LoraGenerator.from_model."
            )
        # Not the model's own call, since another adapter may be active in it by now.
        reader = ExampleReader(self._model.model, self._model.router, self.network.table, data_collator)
        embedding = reader.embed(examples, description, text_encoder, "examples")
        texts = [description] if isinstance(description, str) else list(description or ())
        return GeneratedLora(self._made(embedding[None], None, texts))

    def fingerprint(self) -> str:
        """A text that is the same for the same adapter, in every process, and another one for any other."""
        # Not its to_dict, which copies every name; and of an encoder the vectors count, which the network has.
        fields = {**vars(self.config), "text_encoder": None}
        # Sets have another order in every process.
        digest = sha256(json.dumps(fields, sort_keys=True, default=sorted).encode())
        for name, tensor in sorted({**self.network.state_dict(), **self._family.saved}.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def _made(self, condition: Tensor, task: str | None, descriptions: Sequence[str]) -> Lora:
        """The LoRA of a task id ``(1,)`` or an embedding ``(1, task_embedding_dim)``.

        One task at a time, since sums in a product of matrices may be rounded in another way where there are more.
        """
        family = self._family
        made = self.network(condition, is_whole=True)
        factors = {name: lora_tensors(family.positions[name], one, family.r) for name, one in made.items()}
        return Lora(family, factors, task, descriptions)


def _trained_in_full(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Modules that are saved with an adapter, by the names of their tensors in a file; tied ones have a copy each."""
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    prefix = f"base_model.{HyperAdapterModel.prefix}"
    others = {key: value.detach() for key, value in state_dict.items() if not key.startswith(prefix)}
    return {key: value.to("cpu", copy=True).contiguous() for key, value in others.items()}


def _uncommon_convolutions(tuner: HyperAdapterModel, network: HyperAdapterNetwork) -> list[str]:
    """The adapted convolutions with a dilation or padding mode."""
    names = [position.name for position in network.positions if position.kernel is not None]
    bases = {name: tuner.model.get_submodule(name).get_base_layer() for name in names}
    return [name for name, base in bases.items() if set(base.dilation) != {1} or base.padding_mode != "zeros"]


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that may be trained, or changed, without a change elsewhere."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _check_finite(network: HyperAdapterNetwork) -> None:
    """Refuse what would become LoRAs of which a server's answers are noise, without a word of the cause."""
    wrong = [
        name
        for name, value in network.named_parameters()
        if not all(map(math.isfinite, torch.stack(value.detach().aminmax()).tolist()))
    ]
    if wrong:
        raise ValueError(
            f"{shown(wrong)} of the adapter hold numbers that are not finite: its training diverged, or its file is "
            "damaged. Take an earlier checkpoint, or train anew with a lower learning rate."
        )


@torch.inference_mode()
def _next(loras: Iterator[Lora]) -> Lora | None:
    """The next LoRA, to be written and forgotten; in this mode it is made faster than without gradients."""
    return next(loras, None)


def loras_of(generator: LoraGenerator, tasks: Sequence[str]) -> Iterator[Lora]:
    """The LoRAs of tasks in their order, each made when it is asked for."""
    ids = resolve_task_ids(list(tasks), generator.tasks)
    texts = [descriptions_of(generator.config.task_descriptions, task) for task in tasks]
    return map(generator._made, ids[:, None], tasks, texts)
