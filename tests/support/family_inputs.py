"""Inputs of many families of models: rows of any number and length, and one row of them alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]

VOCABULARY = 40
IMAGE = 39


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, IMAGE - 2, (rows, length), generator=torch.Generator().manual_seed(seed))


def text(rows: int, length: int) -> Batch:
    return {"input_ids": ids(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}


def padded(rows: int, length: int) -> Batch:
    """The last row is one token long."""
    batch = text(rows, length)
    batch["attention_mask"][-1, 1:] = 0
    return batch


def pair(rows: int, length: int) -> Batch:
    """Inputs of an encoder and a decoder of other lengths."""
    return {**text(rows, length), "decoder_input_ids": ids(rows, 3, seed=1)}


def images(rows: int, length: int) -> Batch:
    return {"pixel_values": random(rows, 3, 16, 16)}


def large_images(rows: int, length: int) -> Batch:
    return {"pixel_values": random(rows, 3, 32, 32)}


def frames(rows: int, length: int) -> Batch:
    return {"pixel_values": random(rows, 4, 3, 16, 16)}


def image_counts(rows: int) -> list[int]:
    return [1 + index % 3 for index in range(rows)]


def images_in_text(rows: int, length: int, tokens: int = 4) -> Batch:
    """Rows with one to three images each, in order, padded on the left."""
    counts = image_counts(rows)
    width = 3 * tokens + length
    batch = text(rows, width)
    for index, count in enumerate(counts):
        batch["input_ids"][index, length : length + count * tokens] = IMAGE
    return {**batch, "pixel_values": random(sum(counts), 3, 16, 16)}


def row_with_images(batch: Batch, index: int) -> Batch:
    start = sum(image_counts(index))
    alone = {name: batch[name][index : index + 1] for name in ("input_ids", "attention_mask")}
    return {**alone, "pixel_values": batch["pixel_values"][start : start + image_counts(index + 1)[index]]}


def image_stack_in_text(rows: int, length: int) -> Batch:
    """As many images as the row with the most has, with empty ones behind a row's own."""
    counts = image_counts(rows)
    batch = images_in_text(rows, length, tokens=4)
    stack = torch.zeros(rows, max(counts), 3, 16, 16, dtype=torch.float64)
    start = 0
    for index, count in enumerate(counts):
        stack[index, :count] = batch["pixel_values"][start : start + count]
        start += count
    return {**batch, "pixel_values": stack}


def patches_in_text(rows: int, length: int) -> Batch:
    """Images of different sizes as one sequence of patches: 2 x 2 and 4 x 2."""
    grids = torch.tensor([[1, 2, 2], [1, 4, 2]])[torch.arange(rows) % 2]
    batch = text(rows, 2 + length)
    for index, grid in enumerate(grids):
        batch["input_ids"][index, length : length + int(grid.prod()) // 4] = IMAGE
    return {
        **batch,
        "pixel_values": random(int(grids.prod(dim=1).sum()), 24),
        "image_grid_thw": grids,
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).long(),
    }


def row_with_patches(batch: Batch, index: int) -> Batch:
    sizes = batch["image_grid_thw"].prod(dim=1)
    start = int(sizes[:index].sum())
    return {
        **{
            name: batch[name][index : index + 1]
            for name in ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
        },
        "pixel_values": batch["pixel_values"][start : start + int(sizes[index])],
    }


def texts_and_images(rows: int, length: int) -> Batch:
    return {**text(rows, length), **images(rows, length)}


def texts_and_fewer_images(rows: int, length: int) -> Batch:
    return {**text(rows, length), "pixel_values": random(max(1, rows // 2), 3, 16, 16)}


def row_with_all_images(batch: Batch, index: int) -> Batch:
    return {
        **{name: batch[name][index : index + 1] for name in ("input_ids", "attention_mask")},
        "pixel_values": batch["pixel_values"],
    }
