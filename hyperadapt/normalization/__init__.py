"""How an update is normalised: cores of size r from Gram matrices."""

from hyperadapt.normalization.formulas import NORMALIZATIONS
from hyperadapt.normalization.normalize import normalize

__all__ = ["NORMALIZATIONS", "normalize"]
