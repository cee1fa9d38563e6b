"""The demo's page: what its buttons do, and where everything stands."""

from __future__ import annotations

import atexit
import hashlib
import html
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio

from examples.space.answers import answers_table, expectation
from examples.space.inputs import MAX_TEXTS, checked_concept, checked_description, checked_texts
from examples.space.pictures import TaskMap, draw_sizes
from examples.space.reader import Reader

TEXTS = (
    "What is the name of the longest river in Europe?\n"
    "The central bank raised its lending rate by half a point.\n"
    "My old motorcycle needs a new chain and a helmet for the passenger.\n"
    "Which nerve is hurt in a fracture of the upper arm?"
)
DESCRIPTION = "News about the economy"
INTRODUCTION = """
# One network, a LoRA for every description

A small network was trained on {trained} concepts that a text can have, each a yes/no question. From a description it
makes a LoRA for MiniLM, in one forward pass. Nothing but the description tells the model what to decide.
"""
CSS = """
.gradio-container {max-width: 1160px !important; margin: 0 auto !important}
.prose .answers {width: 100%; border-collapse: collapse; border: 0; font-size: 0.95rem}
.prose .answers tr {border: 0}
.prose .answers th, .prose .answers td {
    border: 0; border-bottom: 1px solid var(--border-color-primary);
    padding: 8px; text-align: left; vertical-align: top;
}
.prose .answers .share {white-space: nowrap; width: 1%}
.answers .yes {color: #00705a; font-weight: 600}
.answers .no {color: #a33b00; font-weight: 600}
.message {color: #a31515; font-weight: 600}
"""


class Page:
    """The page of one adapter."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._concepts = reader.facts.concepts
        self._map = TaskMap([one for one in self._concepts if one.is_trained], reader.trained_embeddings())
        self._folder = Path(tempfile.mkdtemp(prefix="hyperadapt-demo-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)

    def answer_chosen(self, texts: str, name: str | None) -> tuple[Any, ...]:
        """Answers by the description of a concept of the bank."""
        return self._answered(texts, lambda: checked_concept(name, self._concepts).description)

    def answer_described(self, texts: str, description: str) -> tuple[Any, ...]:
        """Answers by a description of the visitor's own."""
        return self._answered(texts, lambda: checked_description(description))

    def _answered(self, texts: str, asked: Callable[[], str]) -> tuple[Any, ...]:
        """Message, answers, map, sizes and file; after a mistake the message alone."""
        try:
            rows, description = checked_texts(texts), asked()
        except ValueError as error:
            message = f'<p class="message" role="alert">{html.escape(str(error))}</p>'
            return message, None, None, None, gradio.update(value=None, interactive=False)
        reader, control = self._reader, self._reader.control(description)
        embedding = reader.embedding(description)
        near = self._map.nearest(embedding)
        table = answers_table(
            rows, description, reader.yes(rows, description), control, reader.yes(rows, control), near
        )
        path = self._folder / f"lora-{hashlib.sha256(description.encode()).hexdigest()[:8]}"
        file = gradio.update(value=str(reader.write_lora(description, path)), interactive=True)
        return "", table, self._map.draw(embedding), draw_sizes(reader.update_sizes(description)), file

    def build(self) -> gradio.Blocks:
        """The page itself."""
        trained = sum(concept.is_trained for concept in self._concepts)
        with gradio.Blocks(title="hyperadapt", analytics_enabled=False) as blocks:
            gradio.Markdown(INTRODUCTION.format(trained=trained))
            with gradio.Row():
                with gradio.Column(min_width=340):
                    label = f"Texts, one in each line, at most {MAX_TEXTS}"
                    texts = gradio.Textbox(TEXTS, label=label, lines=6, max_lines=10, elem_id="texts")
                    with gradio.Tab("Describe a task"):
                        label = "What shall be decided about each text?"
                        description = gradio.Textbox(DESCRIPTION, label=label, elem_id="description")
                        describe = gradio.Button("Answer", variant="primary", elem_id="describe")
                    with gradio.Tab("Choose a task"):
                        concept = gradio.Dropdown(
                            self._choices(),
                            value=None,
                            label="A task of the bank",
                            # What is not in the list is told in our own words.
                            allow_custom_value=True,
                            elem_id="concept",
                        )
                        choose = gradio.Button("Answer", variant="primary", elem_id="choose")
                    message = gradio.HTML(elem_id="message")
                with gradio.Column(min_width=340):
                    answers = gradio.HTML(elem_id="answers")
                    download = gradio.DownloadButton("Download this task's LoRA", interactive=False, elem_id="download")
            with gradio.Row():
                task_map = gradio.Plot(label="Map", show_label=False, elem_id="map", min_width=340)
                sizes = gradio.Plot(label="Changes", show_label=False, elem_id="sizes", min_width=340)
            gradio.Markdown(expectation(self._reader.facts), elem_id="expectation")
            shown = [message, answers, task_map, sizes, download]
            gradio.on(
                [describe.click, description.submit, blocks.load], self.answer_described, [texts, description], shown
            )
            choose.click(self.answer_chosen, [texts, concept], shown)
        return blocks

    def _choices(self) -> list[tuple[str, str]]:
        """What is shown of each concept, and its name."""
        return [
            (f"{one.description}{'' if one.is_trained else ' (never trained)'}", one.name) for one in self._concepts
        ]
