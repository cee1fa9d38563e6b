"""Model cards."""

from hyperadapt.cards.card import CardFacts, write_card

__all__ = ["CardFacts", "write_card"]
