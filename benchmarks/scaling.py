"""What a hyperadapter costs at scale, from a base model's configuration alone: `python -m benchmarks.scaling`.

Everything is counted on models without memory (PyTorch's meta device): parameters, sizes of files and tensors, and
floating-point operations. No weights are needed, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from hyperadapt import HyperAdapterConfig
from hyperadapt.hypernetwork.network import HyperAdapterNetwork
from hyperadapt.tuner.active import find_tuner

CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
# Adapters train in float32: a parameter, its gradient, and two moments of Adam.
BYTES = 4
COPIES = 4
BASE_BYTES = 2


@dataclass(frozen=True)
class Costs:
    """Counts for one base model and one adapter configuration.

    Attributes:
        base_parameters: Of the base model.
        parameters: That train.
        file_bytes: Of the adapter's file of weights.
        training_bytes: Of the trained parameters, their gradients and Adam's moments.
        factor_bytes: Of A, B and S of all positions for the distinct tasks of a batch; training holds as much again
            for their gradients.
        row_bytes: Of each row's copy of its task's factors, which training keeps for backward where a batch mixes
            tasks. An upper bound: modules that read what needs no gradient keep no copy of A, and gradient
            checkpointing keeps one block's copies at a time.
        generation_flops: Of generating them, forward.
        base_flops: Of the base model's forward pass.
    """

    base_parameters: int
    parameters: int
    file_bytes: int
    training_bytes: int
    factor_bytes: int
    row_bytes: int
    generation_flops: int
    base_flops: int


def adapted(config: PretrainedConfig, adapter: PeftConfig) -> PeftModel:
    """A model without memory, adapted.

    Args:
        config: The base model's configuration.
        adapter: The adapter's.

    Returns:
        The model, on the meta device.
    """
    # low_cpu_mem_usage alone draws every parameter before it drops the memory.
    with torch.device("meta"):
        base_model = AutoModelForCausalLM.from_config(config)
        # As an adapter that a file will bring: the norms of the base weights are not read.
        return get_peft_model(base_model, adapter, low_cpu_mem_usage=True)


def file_bytes(tensors: dict[str, Tensor]) -> int:
    """Size of a safetensors file.

    Args:
        tensors: What it holds, float32 or int64.

    Returns:
        Bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide numbers come first.
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        dtype = "F32" if tensor.is_floating_point() else "I64"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    # The length itself takes 8 bytes, and the header ends at a multiple of 8.
    return 8 + -(-length // 8) * 8 + end


def gram_flops(shapes: Sequence[Sequence[int]], *, out_shape: Sequence[int]) -> int:
    """Operations of the Gram matrices, an operator of this package that PyTorch's counter does not know.

    Args:
        shapes: Shapes ``(n, p, r, d)`` of the factors.
        out_shape: Shape of the output, which the counter passes along.

    Returns:
        The count.
    """
    return sum(2 * n * p * r * r * d for n, p, r, d in shapes)


def flops(module: nn.Module, *args: Tensor) -> int:
    """Floating-point operations of a call, two for each multiplication and addition.

    Args:
        module: The module.
        *args: What to call it with.

    Returns:
        The count of all products of matrices; attention counts in full, also where a causal mask hides half of it.
    """
    operators = {torch.ops.hyperadapt.grams: gram_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=operators) as counter:
        module(*args)
    return counter.get_total_flops()


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that train.

    Args:
        model: The model.

    Returns:
        The number.
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def costs(
    config: PretrainedConfig, adapter: HyperAdapterConfig, *, batch_size: int, length: int, tasks_per_batch: int
) -> Costs:
    """Count what an adapter costs.

    Args:
        config: The base model's configuration.
        adapter: The adapter's.
        batch_size: Rows of a batch on one device.
        length: Tokens of a row.
        tasks_per_batch: Distinct tasks in a batch.

    Returns:
        The counts.
    """
    model = adapted(config, adapter)
    positions = find_tuner(model).router.network("default").positions
    with FakeTensorMode():
        # Autocast knows no meta device; these tensors have no memory either, but pretend to be on the CPU.
        network = HyperAdapterNetwork(adapter, positions, torch.ones(len(positions)))
        tasks = torch.zeros(tasks_per_batch, dtype=torch.int64)
        factors = network(tasks)
        generation_flops = flops(network, tasks)
    with torch.device("meta"):
        base_model = AutoModelForCausalLM.from_config(config)
    parameters = trainable_parameters(model)
    factor_bytes = sum(BYTES * tensor.numel() for position in factors.values() for tensor in position)
    return Costs(
        base_parameters=sum(parameter.numel() for parameter in base_model.parameters()),
        parameters=parameters,
        file_bytes=file_bytes(get_peft_model_state_dict(model)),
        training_bytes=COPIES * BYTES * parameters,
        factor_bytes=factor_bytes,
        row_bytes=batch_size * factor_bytes // tasks_per_batch if tasks_per_batch > 1 else 0,
        generation_flops=generation_flops,
        base_flops=flops(base_model, torch.zeros(batch_size, length, dtype=torch.int64, device="meta")),
    )


def main() -> None:
    """Print a table for each base model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="folder with a base model's config.json; default: three well-known sizes")
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 100, 10_000])
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--head", default="factor", choices=("row", "factor", "pair"))
    parser.add_argument("--hypernetwork-dim", type=int, default=16)
    parser.add_argument("--task-embedding-dim", type=int, default=64)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8, help="rows per device")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--tasks-per-batch", type=int, default=8, help="distinct tasks on one device")
    options = parser.parse_args()
    configs = {options.config: AutoConfig.from_pretrained(options.config)} if options.config else CONFIGS
    for name, config in configs.items():
        lora = adapted(config, LoraConfig(r=options.r, target_modules="all-linear", task_type="CAUSAL_LM"))
        lora_bytes = file_bytes(get_peft_model_state_dict(lora))
        lora_parameters = trainable_parameters(lora)
        print(
            f"\n{name}, r = {options.r}, all linear layers, {options.devices} devices, per device "
            f"{options.batch_size} x {options.length} tokens of {options.tasks_per_batch} tasks"
        )
        print(
            f"{'tasks':>7}{'parameters':>13}{'as LoRAs':>19}{'file':>10}{'as LoRAs':>11}"
            f"{'base DDP':>11}{'FSDP2':>10}{'training DDP':>14}{'FSDP2':>10}"
            f"{'factors':>10}{'rows':>9}{'generation':>12}"
        )
        for tasks in options.tasks:
            adapter = HyperAdapterConfig(
                r=options.r,
                task_type="CAUSAL_LM",
                target_modules="all-linear",
                tasks=[f"task {index}" for index in range(tasks)],
                head=options.head,
                hypernetwork_dim=options.hypernetwork_dim,
                task_embedding_dim=options.task_embedding_dim,
            )
            distinct = min(tasks, options.tasks_per_batch, options.batch_size)
            count = costs(
                config, adapter, batch_size=options.batch_size, length=options.length, tasks_per_batch=distinct
            )
            base_bytes = BASE_BYTES * count.base_parameters
            print(
                f"{tasks:>7,}{count.parameters:>13,}{tasks * lora_parameters:>19,}"
                f"{size(count.file_bytes):>10}{size(tasks * lora_bytes):>11}"
                f"{size(base_bytes):>11}{size(base_bytes / options.devices):>10}"
                f"{size(count.training_bytes):>14}{size(count.training_bytes / options.devices):>10}"
                f"{size(count.factor_bytes):>10}{size(count.row_bytes):>9}"
                f"{count.generation_flops / count.base_flops:>12.3%}"
            )
    print(
        "\nfile: the adapter's weights, float32. base: frozen weights in bfloat16. training: trained parameters,\n"
        "gradients and Adam's moments, float32; FSDP2 divides both by the devices, but gathers all parameters of the\n"
        "hypernetwork while it generates. factors: A, B and S of a batch's tasks, on every device; as much again for\n"
        "their gradients. rows: each row's copy of its task's factors, kept for backward unless gradients are\n"
        "checkpointed. generation: its operations in units of the base model's, forward."
    )


def size(count: float) -> str:
    """A number of bytes for people.

    Args:
        count: The number.

    Returns:
        It with a decimal unit.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


if __name__ == "__main__":
    main()
