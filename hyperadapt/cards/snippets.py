"""Code for model cards: how an adapter is loaded and run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.tuner.empty_base import AUTO_CLASSES, CLASSIFIERS

# What a task is asked: a text, several texts that belong together, or the messages of a chat.
Prompt: TypeAlias = str | Sequence[Any]
# Where no data is known.
_PROMPT = "What does the sun weigh?"


@dataclass(frozen=True)
class BaseModel:
    """The base model as a card speaks of it."""

    # What it is loaded from, a name on the Hub or a folder; None if that is not known.
    path: str | None
    # Its name on the Hub; None if it was loaded from a folder.
    hub_id: str | None

    @property
    def name(self) -> str:
        """A short name."""
        return os.path.basename((self.path or "the base model").rstrip("/\\"))

    @property
    def link(self) -> str:
        """Its name, with a link if it is on the Hub."""
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else f"`{self.name}`"


def base_model_of(config: HyperAdapterConfig, hub_id: str | None = None) -> BaseModel:
    """The base model of a hyperadapter; `hub_id` names it where it was loaded from a folder."""
    path = config.base_model_name_or_path
    return BaseModel(hub_id or path or None, hub_id or (path if is_on_the_hub(path) else None))


def is_on_the_hub(path: str | None) -> bool:
    """Whether what a model or data set is loaded from is a name on the Hub, and no folder."""
    if not path or os.path.exists(path):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def usage(config: HyperAdapterConfig, base: BaseModel, address: str, prompts: Mapping[str, Prompt]) -> str:
    """Code in Markdown that loads a hyperadapter from a folder or the Hub and runs one of its tasks, of `prompts`."""
    task = next((name for name in (config.fallback_task, *prompts) if name in prompts), config.fallback_task)
    imports, routing = ["import hyperadapt  # registers the method with PEFT"], f", tasks={json.dumps(task)}"
    return _snippet(config, base, address, imports, routing, prompts.get(task, _PROMPT))


def lora_usage(config: HyperAdapterConfig, base: BaseModel, address: str, format: str) -> str:
    """Markdown on how an exported LoRA is used."""
    path = base.path or "path/to/the/base/model"
    if format == "mlx":
        return f"```text\nmlx_lm.generate --model {path} --adapter-path {address} --prompt Hello\n```"
    if format == "diffusers":
        return f"```text\npipeline.load_lora_weights({json.dumps(address)})\n```"
    if format == "gguf-ready":
        return f"llama.cpp converts it:\n\n```text\npython convert_lora_to_gguf.py --base {address} {address}\n```"
    return _snippet(config, base, address, [], "", _PROMPT)


def _snippet(
    config: HyperAdapterConfig, base: BaseModel, address: str, imports: list[str], routing: str, prompt: Prompt
) -> str:
    facts = config.base_facts
    if base.path is None or facts.library != "transformers":
        # Only its maker knows how such a model is made.
        lines = ["```text", *imports, "from peft import PeftModel", "", "base_model = ...  # made as for training"]
        lines += [f"model = PeftModel.from_pretrained(base_model, {json.dumps(address)})", f"model(**batch{routing})"]
        return "\n".join([*lines, "```"])
    loader, has_text = AUTO_CLASSES.get(config.task_type or "") or facts.kind, facts.has_text
    arguments = [json.dumps(base.path)]
    if config.task_type in CLASSIFIERS:
        arguments.append(f"num_labels={facts.num_labels}")
    if facts.dtype not in ("float32", None):
        arguments.append(f'dtype="{facts.dtype}"')
    answers = (
        bool(imports and config.task_labels) and config.task_type == "SEQ_CLS" and has_text and not is_chat(prompt)
    )
    lines = [*imports, "from peft import PeftModel"]
    names = [loader, *["AutoTokenizer"] * has_text, *["pipeline"] * answers]
    lines += [f"from transformers import {', '.join(sorted(names))}", ""]
    lines += [f"base_model = {loader}.from_pretrained({', '.join(arguments)})"]
    lines += [f"model = PeftModel.from_pretrained(base_model, {json.dumps(address)})"]
    if has_text:
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base.path)})"]
        if answers:
            lines += ['classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)']
            lines += [f"print(classifier({_classified(prompt)}{routing}))"]
            return "\n".join(["```python", *lines, "```"])
        lines += _inputs(prompt)
        if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            lines += [f"output = model.generate(**inputs{routing}, max_new_tokens=20)"]
            lines += ["print(tokenizer.decode(output[0], skip_special_tokens=True))"]
        else:
            lines += [f"outputs = model(**inputs{routing})"]
    return "\n".join(["```python", *lines, "```"])


def _classified(prompt: Prompt) -> str:
    """Code of what a pipeline classifies: a text, or a pair of texts."""
    if isinstance(prompt, str):
        return _quoted(prompt)
    named = zip(("text", "text_pair"), prompt, strict=False)
    return f"{{{', '.join(f'{_quoted(name)}: {_quoted(str(text))}' for name, text in named)}}}"


def _inputs(prompt: Prompt) -> list[str]:
    """Lines of code that make tokens of a prompt."""
    if is_chat(prompt):
        chat: Sequence[Any] = prompt
        messages = [{"role": message["role"], "content": message["content"]} for message in chat]
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        return [f"messages = {messages!r}", f"inputs = tokenizer.apply_chat_template(messages, {options})"]
    texts = [prompt] if isinstance(prompt, str) else prompt
    return [f'inputs = tokenizer({", ".join(map(_quoted, texts))}, return_tensors="pt")']


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages."""
    return not isinstance(prompt, str) and all(isinstance(message, Mapping) for message in prompt)


def _quoted(text: object) -> str:
    return json.dumps(text, ensure_ascii=False)
