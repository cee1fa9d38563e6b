"""A demo to look at: `python -m examples.space.app`, after `python -m examples.space.train`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Read when Gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio

from examples.space.page import CSS, Page
from examples.space.reader import FOLDER, Reader


def main() -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=FOLDER, help="what was trained")
    parser.add_argument("--port", type=int, help="by default the first that is free from 7860")
    options = parser.parse_args()
    # Fonts of the machine itself: Gradio's own would be fetched from elsewhere.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    Page(Reader(options.adapter)).build().launch(server_port=options.port, theme=theme, css=CSS, footer_links=[])


if __name__ == "__main__":
    main()
