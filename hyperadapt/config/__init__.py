"""What the user asks for, checked when it is asked."""

from hyperadapt.config.config import CONDITIONINGS, HEADS, HyperAdapterConfig

__all__ = ["CONDITIONINGS", "HEADS", "HyperAdapterConfig"]
