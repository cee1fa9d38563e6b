"""Matrix functions: values and gradients by definition, and finite where the textbook's are not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization.matrix_functions import (
    inverse_sqrt,
    reciprocal,
    soft_inverse_sqrt,
    spectral_norm,
)
from tests.support.tolerances import (
    FLOAT32_CONDITIONED,
    FLOAT64_CONDITIONED,
    FLOAT64_EXACT,
    FLOAT64_GRADCHECK,
    SPECTRAL_NORM_FLOAT32,
)

Function = Callable[..., Tensor]
EXACT = {"rtol": FLOAT64_EXACT, "atol": FLOAT64_EXACT}
CHECK = {"rtol": FLOAT64_GRADCHECK, "atol": FLOAT64_GRADCHECK}


def orthogonal(*shape: int) -> Tensor:
    """Random matrices with orthonormal columns, float64."""
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def with_spectrum(values: list[float], *leading: int) -> Tensor:
    """Random symmetric matrices of these eigenvalues, float64."""
    torch.manual_seed(0)
    vectors = orthogonal(*leading, len(values), len(values))
    matrix = vectors * torch.tensor(values, dtype=torch.float64) @ vectors.mT
    return (matrix + matrix.mT) / 2


def symmetrized(function: Function) -> Function:
    """Of a free matrix: gradcheck moves one entry at a time, which leaves the symmetric matrices."""
    return lambda matrix: function((matrix + matrix.mT) / 2)


def textbook_inverse_sqrt(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


def textbook_spectral_norm(gram: Tensor) -> Tensor:
    """Of the product of a factor with this Gram matrix and a constant one."""
    return torch.linalg.svdvals(CONSTANT @ torch.linalg.cholesky(gram))[..., 0]


def textbook_soft(gram: Tensor) -> Tensor:
    """(I + G·C)^(-1/2) with the Gram matrix C of the constant factor."""
    root = torch.linalg.cholesky(gram)
    inner = torch.eye(gram.shape[-1]).to(gram) + root.mT @ other_gram(gram) @ root
    return torch.linalg.solve(root, root @ textbook_inverse_sqrt(inner), left=False)


def identity_like(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[-1]).to(gram).expand_as(gram)


def mean_eigenvalue(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def other_gram(like: Tensor) -> Tensor:
    """Gram matrix of the constant factor, the other one of the spectral norm."""
    return (CONSTANT.mT @ CONSTANT).to(like)


CONSTANT = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, -0.25], [0.75, 0.0, 1.5]], dtype=torch.float64)
# Name: function of a symmetric matrix, and the same by autograd through a decomposition.
FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "inverse_sqrt": (inverse_sqrt, textbook_inverse_sqrt),
    "inverse_sqrt_ridged": (
        lambda gram: inverse_sqrt(gram, 0.3),
        lambda gram: textbook_inverse_sqrt(gram + 0.3 * mean_eigenvalue(gram) * identity_like(gram)),
    ),
    "spectral_norm_A": (lambda gram: spectral_norm(gram, other_gram(gram)), textbook_spectral_norm),
    "spectral_norm_B": (lambda gram: spectral_norm(other_gram(gram), gram), textbook_spectral_norm),
    "soft_inverse_sqrt_A": (lambda gram: soft_inverse_sqrt(gram, other_gram(gram)), textbook_soft),
    "soft_inverse_sqrt_B": (
        lambda gram: soft_inverse_sqrt(other_gram(gram), gram),
        lambda gram: textbook_soft(gram).mT,
    ),
    "soft_inverse_sqrt_alone": (
        lambda gram: soft_inverse_sqrt(gram, identity_like(gram)),
        lambda gram: textbook_inverse_sqrt(identity_like(gram) + gram),
    ),
}
parametrize_functions = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_inverse_sqrt_by_definition(leading: tuple[int, ...]) -> None:
    gram = with_spectrum([0.25, 1.5, 1.75, 9.0], *leading)
    inverse = inverse_sqrt(gram)
    assert_close(inverse @ gram @ inverse, torch.eye(4, dtype=torch.float64).expand_as(gram), **EXACT)
    # Of the many roots, the symmetric positive one.
    assert_close(inverse, inverse.mT, **EXACT)
    assert (torch.linalg.eigvalsh(inverse) > 0).all()


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
@pytest.mark.parametrize(("out", "inside"), [(7, 5), (2, 5), (3, 3)])
def test_spectral_norm_by_definition(leading: tuple[int, ...], out: int, inside: int) -> None:
    torch.manual_seed(0)
    lora_A = torch.randn(*leading, 3, inside, dtype=torch.float64)
    lora_B = torch.randn(*leading, out, 3, dtype=torch.float64)
    actual = spectral_norm(lora_A @ lora_A.mT, lora_B.mT @ lora_B)
    assert_close(actual, torch.linalg.matrix_norm(lora_B @ lora_A, ord=2), **EXACT)


@parametrize_functions
def test_gradients_equal_those_of_the_textbook_formula(name: str) -> None:
    function, textbook = FUNCTIONS[name]
    matrix = with_spectrum([0.5, 1.5, 4.0], 2).requires_grad_()
    actual, expected = function(matrix), textbook(matrix)
    assert_close(actual, expected, **EXACT)
    direction = torch.randn_like(actual)
    gradients = [torch.autograd.grad(value, matrix, direction)[0] for value in (actual, expected)]
    # A textbook's decomposition may put the gradient of one triangle into the other.
    assert_close(gradients[0], gradients[0].mT, **EXACT)
    assert_close(gradients[0], (gradients[1] + gradients[1].mT) / 2, **EXACT)


@parametrize_functions
@pytest.mark.parametrize("spectrum", [[0.5, 1.5, 4.0], [2.0, 2.0, 2.0], [1.0, 3.0, 3.0]])
def test_gradcheck(name: str, spectrum: list[float]) -> None:
    matrix = with_spectrum(spectrum, 2).requires_grad_()
    assert torch.autograd.gradcheck(symmetrized(FUNCTIONS[name][0]), (matrix,), **CHECK)


HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
TIED = {
    "identity": torch.eye(3, dtype=torch.float64),
    "repeated": torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)),
    # The Gram matrix of a scaled orthogonal factor, exactly 16·I.
    "orthogonal": 2 * HADAMARD @ (2 * HADAMARD).mT,
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("name", ["inverse_sqrt", "soft_inverse_sqrt_alone"])
def test_at_exact_ties_the_textbook_gradient_is_nan_and_this_one_right(name: str, case: str) -> None:
    function, textbook = FUNCTIONS[name]
    matrix = TIED[case].clone().requires_grad_()
    direction = torch.randn_like(matrix)
    assert not torch.autograd.grad(textbook(matrix), matrix, direction)[0].isfinite().all()
    assert torch.autograd.grad(function(matrix), matrix, direction)[0].isfinite().all()
    assert torch.autograd.gradcheck(symmetrized(function), (matrix,), **CHECK)


@parametrize_functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 2.0, 2.0], [1e-30, 1e-12, 1.0]])
def test_values_and_gradients_are_finite_without_full_rank(
    name: str, dtype: torch.dtype, spectrum: list[float]
) -> None:
    rotated = with_spectrum(spectrum, 2)
    diagonal = torch.diag(torch.tensor(spectrum)).expand(2, 3, 3)
    for matrix in (rotated, diagonal):
        given = matrix.to(dtype).requires_grad_()
        value = FUNCTIONS[name][0](given)
        [gradient] = torch.autograd.grad(value.sum(), given)
        assert value.dtype == gradient.dtype == dtype
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        if spectrum[-1] == 0 and not name.startswith("soft"):
            assert (value == 0).all()
            assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_sqrt_leaves_out_directions_of_eigenvalue_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factor = torch.randn(20, 5, 2, dtype=dtype)
    gram = factor @ factor.mT
    if dtype == torch.float32:
        assert (torch.linalg.eigvalsh(gram) < 0).any(), "rounding made no eigenvalue of this sample negative"
    inverse = inverse_sqrt(gram)
    # The projection on the columns of the factor.
    expected = factor @ torch.linalg.pinv(factor)
    tolerance = FLOAT64_CONDITIONED if dtype == torch.float64 else FLOAT32_CONDITIONED
    assert_close(inverse @ gram @ inverse, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("condition", [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("top", [1, 2])
def test_spectral_norm_in_float32_of_graded_spectra(condition: float, top: int) -> None:
    torch.manual_seed(0)
    r, batch = 8, 20
    values = torch.logspace(0, -1, r - top + 1, base=condition, dtype=torch.float64)
    values = torch.cat([values[:1].expand(top - 1), values])
    lora_A = (orthogonal(batch, 32, r) * values @ orthogonal(batch, r, r)).mT.float()
    lora_B = (orthogonal(batch, 24, r) * values @ orthogonal(batch, r, r)).float()
    actual = spectral_norm(lora_A @ lora_A.mT, lora_B.mT @ lora_B)
    assert actual.dtype == torch.float32
    expected = torch.linalg.matrix_norm(lora_B.double() @ lora_A.double(), ord=2)
    assert_close(actual.double(), expected, rtol=SPECTRAL_NORM_FLOAT32, atol=0)


def test_spectral_norm_gives_a_subgradient_where_the_top_is_repeated() -> None:
    torch.manual_seed(0)
    # G_A = Q·diag(4, 4, 1)·Qᵀ, G_B = I: σ = 2 twice.
    vectors = orthogonal(3, 3)
    spectrum = torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64))
    gram_A, gram_B = (vectors @ spectrum @ vectors.mT).requires_grad_(), torch.eye(3).double().requires_grad_()
    gradients = torch.autograd.grad(spectral_norm(gram_A, gram_B), (gram_A, gram_B))
    top = vectors[:, :2]
    for _ in range(20):
        directions = [direction + direction.mT for direction in torch.randn(2, 3, 3, dtype=torch.float64)]
        slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
        # Along v in the top space σ changes by vᵀ·D_A·v/(2σ) + σ·vᵀ·D_B·v/2: the one-sided derivatives are the
        # largest and the smallest of these.
        slopes = torch.linalg.eigvalsh(top.mT @ (directions[0] / 4 + directions[1]) @ top)
        assert slopes[0] - FLOAT64_EXACT <= slope <= slopes[1] + FLOAT64_EXACT
    # Along the matrices themselves all of these agree: σ is homogeneous of degree 1/2 in each.
    for gradient, gram in zip(gradients, (gram_A, gram_B), strict=True):
        assert_close((gradient * gram).sum(), torch.tensor(1.0).double(), **EXACT)


@parametrize_functions
def test_second_derivatives_are_refused_and_not_wrong(name: str) -> None:
    matrix = with_spectrum([0.5, 1.5, 4.0]).requires_grad_()
    [gradient] = torch.autograd.grad(FUNCTIONS[name][0](matrix).square().sum(), matrix, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_inverse_sqrt_at_zero_is_the_identity_with_its_derivative(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gram_A = with_spectrum([0.5, 1.5, 4.0]).to(dtype)
    zero = torch.zeros_like(gram_A).requires_grad_()
    for first, second in ((gram_A, zero), (zero, gram_A)):
        value = soft_inverse_sqrt(first, second)
        assert torch.equal(value, torch.eye(3, dtype=dtype))
        direction = torch.randn_like(value)
        # (I + X)^(-1/2) = I - X/2 + ...
        expected = -(gram_A @ direction if second is zero else direction @ gram_A) / 2
        [gradient] = torch.autograd.grad(value, zero, direction)
        assert_close(gradient, (expected + expected.mT) / 2, rtol=FLOAT64_EXACT, atol=torch.finfo(dtype).eps * 8)


# Beside what rounding does to sums in 32 bits, what tensor cores do.
@pytest.mark.parametrize(("off", "error"), [(1e-7, 1e-6), (7e-5, 1e-3)])
def test_soft_inverse_sqrt_of_an_indefinite_gram_matrix(off: float, error: float) -> None:
    gram_A = torch.tensor([[4.0, 2 * (1 + off), 0.0], [2 * (1 + off), 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    assert torch.linalg.cholesky_ex(gram_A.detach().double()).info > 0
    exact = torch.tensor([[4.0, 2, 0], [2, 1, 0], [0, 0, 0]], dtype=torch.float64)
    gram_B = other_gram(exact)
    value = soft_inverse_sqrt(gram_A, gram_B.float())
    # The definition: S·S·(I + G_A·G_B) = I.
    assert_close(
        value.double() @ value.double() @ (torch.eye(3).double() + exact @ gram_B),
        torch.eye(3).double(),
        rtol=0,
        atol=20 * error,
    )
    [gradient] = torch.autograd.grad(value.sum(), gram_A)
    assert gradient.isfinite().all()


def test_reciprocal_and_its_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).tiny
        x = torch.tensor([0.0, -0.0, tiny / 2, 2 * tiny, 0.5, 4.0, 1 / tiny], dtype=dtype, requires_grad=True)
        values = reciprocal(x)
        assert values.dtype == dtype
        assert_close(values, torch.tensor([0, 0, 0, 0.5 / tiny, 2, 0.25, tiny], dtype=dtype), rtol=0, atol=0)
        # A small incoming gradient, as the chain rule gives here, must not meet an overflowed 1/x².
        [gradient] = torch.autograd.grad(values, x, torch.tensor([1, 1, 1, tiny, 1, 1, 1], dtype=dtype))
        expected = torch.tensor([0, 0, 0, -0.25 / tiny, -4, -0.0625, 0], dtype=dtype)
        assert_close(gradient, expected, rtol=0, atol=0)
