"""What the demo draws: where a description lies among the trained concepts, and where its LoRA changes the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from torch.nn.functional import normalize

from examples.space.facts import Concept

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#999999")
NEW = "#111111"
SIZE = (6.0, 4.6)


class TaskMap:
    """Trained concepts by the two directions in which their embeddings differ most."""

    def __init__(self, concepts: Sequence[Concept], embeddings: Tensor) -> None:
        self._concepts = concepts
        self._directions = normalize(embeddings, dim=1)
        self._mean = self._directions.mean(0)
        self._axes = torch.linalg.svd(self._directions - self._mean, full_matrices=False).Vh[:2]

    def nearest(self, embedding: Tensor, count: int = 3) -> list[Concept]:
        """The concepts whose embeddings point in the most similar directions."""
        cosines = self._directions @ normalize(embedding, dim=0)
        return [self._concepts[place] for place in cosines.topk(min(count, len(cosines))).indices.tolist()]

    def draw(self, embedding: Tensor) -> Figure:
        """The map, with a star where a new embedding lies."""
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        points = self._at(self._directions)
        corpora = [concept.corpus for concept in self._concepts]
        for corpus, color in zip(dict.fromkeys(corpora), COLORS, strict=False):
            chosen = points[[place for place, one in enumerate(corpora) if one == corpus]]
            axes.scatter(*chosen.T.tolist(), s=22, color=color, alpha=0.75, linewidths=0, label=corpus)
        star = self._at(normalize(embedding, dim=0)).tolist()
        axes.scatter(*star, s=260, marker="*", color=NEW, edgecolors="white", zorder=3, label="this task")
        axes.set_title("Where the task lies among the trained ones", fontsize=12)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#CCCCCC")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False, fontsize=10)
        return figure

    def _at(self, directions: Tensor) -> Tensor:
        return (directions - self._mean) @ self._axes.T


def draw_sizes(sizes: Mapping[str, float]) -> Figure:
    """A bar for each adapted module, those of a layer side by side."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    layers = sorted({_layer(module) for module in sizes})
    names = list(dict.fromkeys(_name(module) for module in sizes))
    width = 0.8 / len(layers)
    for place, layer in enumerate(layers):
        found = {_name(module): size for module, size in sizes.items() if _layer(module) == layer}
        values = [found[name] for name in names]
        at = [row + (place - (len(layers) - 1) / 2) * width for row in range(len(names))]
        axes.barh(at, values, width, color=COLORS[place % len(COLORS)], label=f"layer {layer}")
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Where its LoRA changes the model", fontsize=12)
    axes.set_xlabel("size of the change ΔW, in percent of the weight's", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=10)
    return figure


def _layer(module: str) -> int:
    return int(module.split(".layer.")[1].partition(".")[0])


def _name(module: str) -> str:
    return module.split(".layer.")[1].partition(".")[2].removesuffix(".dense").replace("attention.self.", "")
