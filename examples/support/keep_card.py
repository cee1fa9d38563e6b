"""Copy an example's card to `model_cards/`: `python -m examples.support.keep_card FOLDER NAME`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

CARDS = Path(__file__).parents[2] / "model_cards"


def main() -> None:
    """Copy the files; the cards' pictures get a folder for each card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="adapter folder of a full run")
    parser.add_argument("name", help="name of the example")
    options = parser.parse_args()
    pictures = CARDS / "figures" / options.name
    pictures.mkdir(parents=True, exist_ok=True)
    for picture in sorted((options.folder / "figures").glob("*.png")):
        shutil.copyfile(picture, pictures / picture.name)
    text = (options.folder / "README.md").read_text(encoding="utf-8")
    text = text.replace("](figures/", f"](figures/{options.name}/")
    (CARDS / f"{options.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
