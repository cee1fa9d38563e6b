"""Normalised updates by each method's definition, from the dense matrices, for the tests of normalisation."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from hyperadapt.normalization import normalize
from hyperadapt.normalization.formulas import METHODS
from tests.support.tolerances import FLOAT64_CONDITIONED, FLOAT64_EXACT

OUT, R, IN = 5, 3, 7
BOUND = 2.0
# Every method once, with what it needs beside generated logits: method and options.
EACH: list[tuple[str, dict[str, Any]]] = [
    (name, {"bound": BOUND} if method.is_bounded else {}) for name, method in METHODS.items()
]
WHITENING_A: tuple[str, dict[str, Any]] = ("whitening", {"factors": "A"})
CASES: list[tuple[str, dict[str, Any]]] = [
    *EACH,
    # The factors of seed 0 have norms of about √105 = 10. Of a bound of 2 some singular values are above the limit and
    # some below; of these, all are above or below.
    ("soft_polar", {"bound": 0.02}),
    ("soft_polar", {"bound": 100.0}),
    ("whitening", {"ridge": 0.1}),
    ("whitening", {"ridge": 0.1, "factors": "A"}),
    ("sinkhorn", {"iterations": 3, "temperature": 0.5}),
]


def make_factors(*leading: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random factors A and B that require gradients."""
    torch.manual_seed(seed)
    lora_A = torch.randn(*leading, R, IN, dtype=torch.float64)
    lora_B = torch.randn(*leading, OUT, R, dtype=torch.float64)
    return lora_A.to(dtype).requires_grad_(), lora_B.to(dtype).requires_grad_()


def with_logits(method: str, options: dict[str, Any], *leading: int) -> dict[str, Any]:
    """The options, with generated logits where the method needs them."""
    if "logits" not in METHODS[method].needs:
        return options
    generator = torch.Generator().manual_seed(1)
    return options | {"logits": torch.randn(*leading, R, R, generator=generator, dtype=torch.float64)}


def core_update(lora_A: Tensor, lora_B: Tensor, method: str, **options: Any) -> Tensor:
    """The normalised update through its core."""
    return lora_B @ normalize(lora_A, lora_B, method, **options).to(lora_A.dtype) @ lora_A


def tolerance(method: str) -> float:
    """Of float64 updates; inverse square roots multiply errors with a condition number."""
    return FLOAT64_CONDITIONED if method == "whitening" else FLOAT64_EXACT


def dense_update(lora_A: Tensor, lora_B: Tensor, method: str, **options: Any) -> Tensor:
    """The normalised update by the method's definition."""
    product = lora_B @ lora_A
    norm = torch.linalg.matrix_norm(product, keepdim=True)
    bound = torch.as_tensor(options.get("bound", 1.0), dtype=norm.dtype)[..., None, None]
    if method == "none":
        return product
    if method == "soft_frobenius":
        return product / torch.sqrt(1 + (norm / bound) ** 2)
    if method in ("soft_polar", "adaptive"):
        return _inverse_sqrt(product @ product.mT * (lora_A.shape[-2] / bound**2)) @ product
    if method == "frobenius":
        return product / norm
    if method == "spectral":
        return product / torch.linalg.matrix_norm(product, ord=2, keepdim=True)
    if method == "weight_norm":
        return unit_length(lora_B, dim=-2) @ unit_length(lora_A, dim=-1)
    if method == "sinkhorn":
        mixing = (options["logits"] / options.get("temperature", 1.0)).exp()
        for _ in range(options.get("iterations", 20)):
            mixing = mixing / mixing.sum(-2, keepdim=True)
            mixing = mixing / mixing.sum(-1, keepdim=True)
        return unit_length(lora_B, dim=-2) @ mixing @ unit_length(lora_A, dim=-1)
    assert method == "whitening", f"{method!r} has no definition here yet"
    ridge = options.get("ridge", 1e-5)
    outer = lora_B if options.get("factors") == "A" else _whitened(lora_B.mT, ridge).mT
    return outer @ _whitened(lora_A, ridge)


def _inverse_sqrt(matrix: Tensor) -> Tensor:
    """(I + M)^(-1/2) by the iteration of Denman and Beavers: its gradient needs no eigenvalues, which may be tied."""
    root = matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    inverse = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    for _ in range(25):
        root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
    return inverse


def _whitened(factor: Tensor, ridge: float) -> Tensor:
    """A factor with its rows made orthonormal up to the ridge."""
    left, values, right_h = torch.linalg.svd(factor, full_matrices=False)
    ridged = (values.square() + ridge * values.square().mean(-1, keepdim=True)).sqrt()
    return left * (values / ridged).unsqueeze(-2) @ right_h
