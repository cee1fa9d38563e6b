"""What the base model makes of labelled rows: the vectors of examples, from its last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from hyperadapt.config.checks import shown
from hyperadapt.config.config import HyperAdapterConfig
from hyperadapt.config.task_fields import PAIRS
from hyperadapt.routing.forward_pass import ForwardPass
from hyperadapt.routing.router import Router
from hyperadapt.routing.undisturbed import undisturbed
from hyperadapt.tuner.layer import HyperAdapterLayer

BATCH_SIZE = 32
# What the loss skips: with it, the labels of a language model's row say where the prompt is.
_NO_LABEL = -100
Collator = Callable[[list[Any]], Any]


def with_example_sizes(config: HyperAdapterConfig, base_model: nn.Module) -> HyperAdapterConfig:
    """A configuration with the size of a row's vector and the number of classes, where tasks have examples."""
    if not config.has_examples or config.example_dim is not None:
        return config
    is_known = isinstance(base_model, PreTrainedModel)
    base_config: Any = base_model.config if is_known else None
    dim = getattr(base_config.get_text_config(), "hidden_size", None) if is_known else None
    if dim is None:
        raise ValueError(
            f"task_embedding asks for examples, which the base model reads, but {type(base_model).__name__} is no "
            "model of transformers with a hidden_size. Choose another task_embedding."
        )
    return config.replaced(
        example_dim=dim, example_classes=None if config.task_type in PAIRS else base_config.num_labels
    )


def raw_vectors(
    model: nn.Module, router: Router, config: HyperAdapterConfig, rows: Sequence[Any], collate: Collator, place: str
) -> Tensor:
    """Vectors ``(rows, example_dim + classes or example_dim)``, float32, by the base model without any adapter.

    Features are means of the last hidden states: over a row's tokens, or over those of its prompt and of its
    completion. `place` names the rows in errors.
    """
    if router.merged:
        raise ValueError(
            f"Task {next(iter(router.merged.values()))!r} is merged into the weights of the base model, which reads "
            "examples without an adapter. Call unmerge_adapter() first."
        )
    if any(hasattr(one, "ds_id") for one in model.parameters()):
        raise ValueError(
            "The base model is partitioned by DeepSpeed's ZeRO-3 and cannot read examples on its own. Give them with "
            "set_examples in one process, save the adapter, and load it for the training."
        )
    with undisturbed(model, at_rest=True), _plain(model), router.installed(ForwardPass({})), _states(model) as states:

        def read(start: int, end: int) -> Tensor:
            where = f"{place}, from row {start}"
            batch = _batch(rows[start:end], collate, router, where)
            # A decoder apart is told by labels what it reads; elsewhere they would only serve for a loss.
            inputs = {name: value for name, value in batch.items() if name != "labels" or _is_split(model)}
            try:
                model(**inputs)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{where}: the base model does not take the columns {sorted(inputs)} ({error}). Give rows of model "
                    "inputs, as for training."
                ) from error
            found, count = len(states["rows"]), len(rows[start:end])
            if found == count:
                return _vectors(batch, states, model, config, where)
            if count == 1:
                raise ValueError(
                    f"{where}: the data_collator made {found} rows of one, but an example is one row. Pass one that "
                    "pads rows."
                )
            # A collator that joins rows, as padding_free does, has nothing to join here.
            return torch.cat([read(one, one + 1) for one in range(start, start + count)])

        return torch.cat([read(start, start + BATCH_SIZE) for start in range(0, len(rows), BATCH_SIZE)])


def check_classes(raw: Tensor, config: HyperAdapterConfig, place: str) -> None:
    """Refuse a task's rows if all of them have one class, which does not tell what to decide."""
    if config.example_classes is None:
        return
    classes = torch.unique(raw[:, -config.example_classes :].argmax(1)).tolist()
    if len(classes) == 1:
        raise ValueError(
            f"{place}: all {len(raw)} rows have the class {classes[0]}. Give examples of at least two classes."
        )


def _batch(rows: Sequence[Any], collate: Collator, router: Router, place: str) -> Mapping[str, Any]:
    batch = collate(list(rows))
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{place}: there are no labels, only {shown(found)}. Every example needs those of training.")
    network = next(iter(router.networks.values()))
    device = next(network.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _vectors(
    batch: Mapping[str, Any], states: Mapping[str, Tensor], model: Any, config: HyperAdapterConfig, place: str
) -> Tensor:
    hidden, labels = states["rows"], batch["labels"]
    if hidden.ndim != 3 or hidden.shape[-1] != config.example_dim:
        raise ValueError(
            f"{place}: the base model has hidden states of shape {tuple(hidden.shape)}, but examples need (rows, "
            f"length, {config.example_dim}). Choose another task_embedding."
        )
    is_token = _tokens(batch.get("attention_mask"), hidden, model, place)
    if config.example_classes is not None:
        return torch.cat([_mean(hidden, is_token, place), _classes(labels, config.example_classes, place)], 1)
    if labels.ndim != 2:
        raise ValueError(
            f"{place}: labels have shape {tuple(labels.shape)}, but the completion's tokens are expected. For rows "
            "with one class each, set task_type='SEQ_CLS'."
        )
    is_answer = labels != _NO_LABEL
    if "answers" in states:
        return torch.cat([_mean(hidden, is_token, place), _mean(states["answers"], is_answer, place)], 1)
    return torch.cat([_mean(hidden, is_token & ~is_answer, place), _mean(hidden, is_token & is_answer, place)], 1)


def _tokens(mask: Tensor | None, hidden: Tensor, model: Any, place: str) -> Tensor:
    """Which hidden states are no padding, ``(rows, length)``."""
    if mask is None or mask.bool().all():
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.shape != hidden.shape[:2] and mask.ndim == 2 and hasattr(model, "_get_feature_vector_attention_mask"):
        # Of audio, the mask counts samples, and frames are made of many.
        mask = model._get_feature_vector_attention_mask(hidden.shape[1], mask)
    if mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"{place}: attention_mask has shape {tuple(mask.shape)}, but the hidden states {tuple(hidden.shape[:2])}, "
            "so that it cannot be told which of them are padding. Give rows of one length, which need no padding."
        )
    return mask.bool()


def _mean(hidden: Tensor, is_part: Tensor, place: str) -> Tensor:
    """Means ``(rows, dim)`` over some tokens."""
    if not is_part.any(1).all():
        raise ValueError(
            f"{place}: a row lacks a prompt or a completion. Labels must be {_NO_LABEL} in the prompt, and the tokens' "
            "ids in the completion."
        )
    weights = is_part[..., None].float()
    means = (hidden.float() * weights).sum(1) / weights.sum(1)
    if not means.isfinite().all():
        raise ValueError(f"{place}: the base model's hidden states are not finite. Check its weights and its dtype.")
    return means


def _classes(labels: Tensor, count: int, place: str) -> Tensor:
    """Classes, one-hot ``(rows, count)``."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"{place}: labels are of shape {tuple(labels.shape)} and {labels.dtype}, but the class of each row is "
            "expected, an integer. For pairs of prompt and completion, set task_type='CAUSAL_LM'."
        )
    unknown = labels[(labels < 0) | (labels >= count)].tolist()
    if unknown:
        raise ValueError(
            f"{place}: the class {unknown[0]} is unknown: the adapter was made for {count} classes, from 0 to "
            f"{count - 1}."
        )
    return one_hot(labels.long(), count).float()


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """The base model as it was before any adapter, without a look at which parameters are trained."""
    parts = [one for one in model.modules() if isinstance(one, HyperAdapterLayer | AuxiliaryTrainingWrapper)]
    before = [one._disable_adapters for one in parts]
    try:
        for one in parts:
            one._disable_adapters = True
        yield
    finally:
        for one, was_disabled in zip(parts, before, strict=True):
            one._disable_adapters = was_disabled


@contextmanager
def _states(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The last hidden states of each call of a model: of its rows; and of its answers, where it has a decoder apart."""
    assert isinstance(model, PreTrainedModel)
    parts: dict[str, Any] = {"rows": model.get_encoder() if _is_split(model) else model.base_model}
    if _is_split(model):
        parts["answers"] = model.get_decoder()  # type: ignore[no-untyped-call]
    states: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            states[name] = output["last_hidden_state"] if isinstance(output, Mapping) else output[0]

        return parts[name].register_forward_hook(note)

    handles = [watch(name) for name in parts]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _is_split(model: Any) -> bool:
    """Whether a model of transformers reads rows with an encoder and answers with a decoder."""
    return bool(model.config.is_encoder_decoder)
