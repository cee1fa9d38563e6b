"""README.md, the pages of docs/ and those of examples as their readers see them: blocks of code, headings and links."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
_SETUP = re.compile(r"<!-- setup: (\w+) -->\n*")
_PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """Fenced code.

    Args:
        page: The file.
        line: The line of the fence, from 1.
        language: What stands behind the fence.
        text: The code.
        setup: What ``<!-- setup: name -->`` right before it names.
    """

    page: Path
    line: int
    language: str
    text: str
    setup: str | None

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Link:
    line: int
    target: str


def blocks(page: Path) -> list[Block]:
    tokens, found = _tokens(page), []
    for before, token in itertools.pairwise([None, *tokens]):
        if token.type == "code_block":
            raise ValueError(f"{page}:{_line(token)}: code without a fence, which names no language.")
        if token.type == "fence":
            setup = _SETUP.fullmatch(before.content) if before and before.type == "html_block" else None
            found.append(Block(page, _line(token), token.info.strip(), token.content, setup and setup[1]))
    return found


def anchors(page: Path) -> set[str]:
    """What links to headings are called, by GitHub and by MkDocs alike; an error where the two differ."""
    tokens, found = _tokens(page), []
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            letters = re.sub(r"[^\w\s-]", "", text).strip().lower()
            github, mkdocs = letters.replace(" ", "-"), re.sub(r"[-\s]+", "-", letters)
            if github != mkdocs or github in found:
                raise ValueError(f"{page}:{_line(token)}: the heading {text!r} has no anchor of its own.")
            found.append(github)
    return set(found)


def links(page: Path) -> Iterator[Link]:
    for token in _tokens(page):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield Link(_line(token), str(target))


def _tokens(page: Path) -> list[Token]:
    return _PARSER.parse(page.read_text(encoding="utf-8"))


def _line(token: Token) -> int:
    # Cells of tables know no line.
    return token.map[0] + 1 if token.map else 0
