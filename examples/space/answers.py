"""What visitors read: answers beside those of the control, and how often they are right."""

from __future__ import annotations

import html
from collections.abc import Sequence

from examples.space.facts import Concept, Facts

_EXPECTATION = """
**What to expect.** Chance is 50%. On new texts, answers are right in {trained.own:.0%} of cases for
{trained.concepts} trained concepts, and in {unseen.own:.0%} for {unseen.concepts} that were never trained. By the
control's description it is {trained.other:.0%} and {unseen.other:.0%}. So do not rely on a single answer. “Not” in a
description is understood only in part. The model reads the first {max_length} tokens of a text.
"""


def expectation(facts: Facts) -> str:
    """How often the answers are right, as it was measured after training."""
    return _EXPECTATION.format(trained=facts.trained, unseen=facts.unseen, max_length=facts.max_length)


def answers_table(
    texts: Sequence[str],
    description: str,
    shares: Sequence[float],
    control: str,
    control_shares: Sequence[float],
    nearest: Sequence[Concept],
) -> str:
    """Answers by the task's own description beside those by another one, as HTML; shares are those of a yes."""
    rows = "".join(
        f"<tr><td>{html.escape(text)}</td>{_cell(own)}{_cell(other)}</tr>"
        for text, own, other in zip(texts, shares, control_shares, strict=True)
    )
    near = "; ".join(f"“{html.escape(concept.description)}”" for concept in nearest)
    return (
        f'<p class="asked"><b>Asked:</b> “{html.escape(description)}”<br>'
        f"<b>Control, another task:</b> “{html.escape(control)}”</p>"
        '<table class="answers"><thead><tr><th>Text</th><th>Asked</th><th>Control</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        f'<p class="near"><b>Nearest trained tasks:</b> {near}</p>'
    )


def _cell(share: float) -> str:
    word = "yes" if share > 0.5 else "no"
    return f'<td class="share"><span class="{word}">{word}</span> {max(share, 1 - share):.0%}</td>'
