"""Whitening of descriptions' vectors: what most of them share says little about which task is meant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

# More are of no use with fewer descriptions, and would make the files of adapters with large vectors large.
MAX_DIRECTIONS = 384
# As a share of the vectors' mean square: what vectors differ by, if it is less, is rounding.
_LEAST_VARIANCE = 1e-6


def num_directions(dim: int) -> int:
    """How many directions are damped, of vectors of a size."""
    return min(dim, MAX_DIRECTIONS)


def shared_directions(vectors: Tensor) -> Tensor:
    """Directions ``(num_directions(dim), dim)`` of vectors ``(n, dim)``, float32, as long as they are to be damped.

    ``damped`` then multiplies by (SᵀS/n + v·I)^(-1/2), up to a factor: S has the vectors' directions in its rows, and v
    is their mean variance, over as many dimensions as they span. So all directions get about the same variance, but
    those in which the vectors hardly differ are not blown up. Zeros, which damp nothing, where they do not differ.
    """
    count, dim = vectors.shape
    found = torch.zeros(num_directions(dim), dim)
    rows = rms_norm(vectors.double().cpu(), (dim,))
    total = rows.var(0, correction=0).sum()
    if count < 2 or total < _LEAST_VARIANCE * dim:
        return found
    variance = total / min(count - 1, dim)
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    shares = 1 - (variance / (sizes.square() / count + variance)).sqrt()
    kept = min(len(sizes), len(found))
    found[:kept] = (directions * shares.sqrt()[:, None])[:kept].float()
    return found


def damped(vectors: Tensor, directions: Tensor) -> Tensor:
    """Vectors ``(..., dim)`` with directions ``(n, dim)`` damped by the squares of their lengths."""
    return vectors - (vectors @ directions.T) @ directions
