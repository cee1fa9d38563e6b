"""Matrix normalisation for general use: of any weight matrix, and of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyperadapt.normalization.cores import cores_of_grams
from hyperadapt.normalization.formulas import METHODS, learned_bound
from hyperadapt.normalization.matrix_functions import inverse_sqrt
from hyperadapt.normalization.normalize import check_options, checked_method, full_core
from hyperadapt.normalization.precision import own_dtype


class MatrixNorm(nn.Module):
    """Normalises a weight matrix, or a batch of them, with any method of ``hyperadapt.normalize``.

    Made for ``torch.nn.utils.parametrize.register_parametrization(layer, "weight", MatrixNorm("spectral"))``, and as
    usable on its own. A matrix W of shape ``(m, n)`` counts as the product I·W (or W·I, whichever identity is
    smaller), so the core is of the size ``min(m, n)``. Two methods have a meaning of their own here:
    ``"sinkhorn"`` makes a square W, taken as logits, doubly stochastic; ``"whitening"`` gives W's orthogonal polar
    factor, since the identity is white already.

    Args:
        method: One of ``hyperadapt.normalization.NORMALIZATIONS``.
        start_dim: Dimensions from this one on are flattened into the columns of the matrix, as ``1`` does
            for the weight of a convolution; None takes the last two dimensions and any others as a batch.
        **options: The method's options, as in ``normalize``; `bound` is absolute. ``"adaptive"`` learns a bound
            between 0 and `bound`, from 88% of it.

    Raises:
        ValueError: If the method is unknown, or an option is missing, needless or out of range.
    """

    def __init__(self, method: str, *, start_dim: int | None = None, **options: Any) -> None:
        super().__init__()
        record = checked_method(method)
        check_options(method, options, (*record.options, *(["bound"] if record.is_bounded else [])))
        if record.is_bounded and "bound" not in options:
            raise ValueError(f"normalization {method!r} needs a bound on the Frobenius norm; pass bound=.")
        self.method = method
        self.start_dim = start_dim
        self.options = options
        if record.learns_bound:
            self.bound_logit = nn.Parameter(torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:  # noqa: DOC502
        """Normalise a weight.

        Args:
            weight: Shape ``(..., m, n)``, or any with at least two dimensions if `start_dim` is given.

        Returns:
            Same shape and dtype, also under autocast.

        Raises:
            ValueError: If the method is ``"sinkhorn"`` and the matrix is not square.
        """
        matrix = weight if self.start_dim is None else weight.flatten(self.start_dim)
        with own_dtype(weight.device):
            return self._normalized(matrix).to(weight.dtype).reshape(weight.shape)

    def _normalized(self, matrix: Tensor) -> Tensor:
        method, options = METHODS[self.method], dict(self.options)
        rows, columns = matrix.shape[-2:]
        identity = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
        identity = identity.expand(*matrix.shape[:-2], -1, -1)
        if "logits" in method.needs:
            if rows != columns:
                raise ValueError(
                    f"normalization {self.method!r} needs a square matrix, but the weight is of shape "
                    f"{tuple(matrix.shape)}: only a square matrix can be doubly stochastic."
                )
            # The rows of an identity have length 1, so that the core is the doubly stochastic matrix itself.
            gram = identity.to(torch.promote_types(matrix.dtype, torch.float32)).reshape(-1, 1, rows, rows)
            options["logits"] = matrix.reshape(-1, 1, rows, rows)
            return cores_of_grams(torch.cat([gram, gram], dim=1), method, options).reshape(matrix.shape)
        if method.learns_bound:
            options["bound"] = learned_bound(options["bound"], self.bound_logit)
        if rows <= columns:
            return full_core(matrix, identity, method, options).to(matrix.dtype) @ matrix
        return matrix @ full_core(identity, matrix, method, options).to(matrix.dtype)


class Whitening(nn.Module):
    """Whitens activations: zero mean and unit covariance over the batch (ZCA), as batch normalisation does per feature.

    With the batch's mean μ and covariance Σ over features, ``y = (x - μ)·(Σ + ε·I)^(-1/2)``. In evaluation the running
    averages take their place. No matrix is inverted, and the gradient is finite at repeated eigenvalues.

    Args:
        num_features: Number of features d.
        ridge: ε in units of the mean variance, dimensionless.
        momentum: Share of the latest batch in the running averages.
    """

    running_mean: Tensor
    running_covariance: Tensor

    def __init__(self, num_features: int, *, ridge: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features = num_features
        self.ridge = ridge
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_covariance", torch.eye(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten a batch.

        Args:
            x: Shape ``(..., num_features)``; all leading dimensions are the batch.

        Returns:
            Same shape and dtype, also under autocast.

        Raises:
            ValueError: If the last dimension is not `num_features`, or a training batch has one element.
        """
        if x.shape[-1] != self.num_features:
            raise ValueError(f"Whitening({self.num_features}) got an input of shape {tuple(x.shape)}.")
        if self.training and x.shape[:-1].numel() < 2:
            raise ValueError(f"Whitening needs at least 2 samples in training, but got shape {tuple(x.shape)}.")
        with own_dtype(x.device):
            return self._whitened(_at_least_float32(x).reshape(-1, self.num_features)).to(x.dtype).reshape(x.shape)

    def _whitened(self, samples: Tensor) -> Tensor:
        if self.training:
            mean = samples.mean(0)
            covariance = (samples - mean).mT @ (samples - mean) / (len(samples) - 1)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_covariance.lerp_(covariance.to(self.running_covariance.dtype), self.momentum)
        else:
            mean, covariance = self.running_mean.to(samples.dtype), self.running_covariance.to(samples.dtype)
        return (samples - mean) @ inverse_sqrt(covariance, self.ridge)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
