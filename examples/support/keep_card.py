"""Keep the text of an example's card in `model_cards/`: `python -m examples.support.keep_card FOLDER NAME`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

CARDS = Path(__file__).parents[2] / "model_cards"


def without_pictures(card: str) -> str:
    """The card's text; its pictures are made again by every run."""
    return re.sub(r"^!\[.*\]\(.*\)\n\n", "", card, flags=re.MULTILINE)


def main() -> None:
    """Copy the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="adapter folder of a full run")
    parser.add_argument("name", help="name of the example")
    options = parser.parse_args()
    text = (options.folder / "README.md").read_text(encoding="utf-8")
    (CARDS / f"{options.name}.md").write_text(without_pictures(text), encoding="utf-8")


if __name__ == "__main__":
    main()
