"""Cores by kernels, under Triton's interpreter or on a GPU, against the formulas in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hyperadapt.normalization import cores as cores_module
from hyperadapt.normalization.cores import cores
from hyperadapt.normalization.formulas import METHODS
from tests.support.dense_updates import EACH, WHITENING_A
from tests.support.kernels import INTERPRETED, NEEDS_KERNELS, PLACE, let_kernels_serve, run_interpreted
from tests.support.tolerances import FLOAT32_CONDITIONED, FLOAT32_FORMULA

KERNEL_METHODS = [(name, options) for name, options in [*EACH, WHITENING_A] if METHODS[name].kernel]
# Count, and widths of A and of B, of two groups.
SHAPES = [(1, 48, 32), (1, 21, 70)]
TASKS, POSITIONS = 2, 2


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels for float32 wherever tensors are, whose outputs are NaN where nothing is written."""
    if INTERPRETED:
        let_kernels_serve(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(method: str, options: dict[str, Any], r: int) -> dict[str, list[Tensor]]:
    """Random factors in float64, and what the method reads beside them, by position."""
    torch.manual_seed(0)
    inputs: dict[str, list[Tensor]] = {"A": [], "B": []}
    for count, inside, out in SHAPES:
        for name, width in (("A", inside), ("B", out)):
            # Of full rank, also where r is large.
            width += 2 * r
            inputs[name].append(torch.randn(TASKS, count, r, width, dtype=torch.float64) / width**0.5)
    if "bound" in options:
        # Some singular values are above bound/√r, some below.
        inputs["bound"] = [options["bound"] * (0.5 + torch.rand(POSITIONS, dtype=torch.float64))]
    if "logits" in METHODS[method].needs:
        inputs["logits"] = [torch.randn(TASKS, POSITIONS, r, r, dtype=torch.float64)]
    return inputs


def core_and_gradients(
    method: str, options: dict[str, Any], inputs: dict[str, list[Tensor]], dtype: torch.dtype, place: str
) -> tuple[Tensor, list[Tensor]]:
    """The core of inputs rounded to a dtype, and the gradients of all that the core depends on."""
    given = {
        name: [
            tensor.to(place, dtype if name in "AB" else torch.promote_types(dtype, torch.float32)) for tensor in some
        ]
        for name, some in inputs.items()
    }
    leaves = [tensor.requires_grad_() for some in given.values() for tensor in some]
    named = {name: given[name][0] for name in ("bound", "logits") if name in given}
    core = cores(given["A"], given["B"], METHODS[method], options | named)
    torch.manual_seed(1)
    direction = torch.randn(core.shape, dtype=torch.float64).to(core)
    gradients = torch.autograd.grad(core, leaves, direction, allow_unused=True, materialize_grads=True)
    return core.detach(), list(gradients)


def round_inputs(inputs: dict[str, list[Tensor]], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The inputs as a run in a dtype reads them."""
    kinds = {name: dtype if name in "AB" else torch.float32 for name in inputs}
    return {name: [tensor.to(kinds[name]).double() for tensor in some] for name, some in inputs.items()}


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("method", "options", "r", "dtype"),
    [
        *((method, options, 5, torch.float32) for method, options in KERNEL_METHODS),
        *(("soft_polar", {"bound": 2.0}, r, torch.float32) for r in (1, 16, 32, 64)),
        ("soft_frobenius", {"bound": 2.0}, 64, torch.float32),
        ("sinkhorn", {}, 64, torch.float32),
        ("soft_frobenius", {"bound": 2.0}, 5, torch.float16),
        ("soft_polar", {"bound": 2.0}, 5, torch.float16),
    ],
    ids=str,
)
def test_kernels_equal_the_formulas(method: str, options: dict[str, Any], r: int, dtype: torch.dtype) -> None:
    check_against_float64(method, options, r, dtype)


def check_against_float64(method: str, options: dict[str, Any], r: int, dtype: torch.dtype) -> None:
    inputs = round_inputs(make_inputs(method, options, r), dtype)
    core, gradients = core_and_gradients(method, options, inputs, dtype, PLACE)
    exact, exact_gradients = core_and_gradients(method, options, inputs, torch.float64, "cpu")
    assert core.dtype == torch.float32
    # Inverse square roots multiply rounding with the condition of a Gram matrix.
    error = FLOAT32_CONDITIONED if method == "whitening" else FLOAT32_FORMULA
    assert_close(core.cpu().double(), exact, rtol=error, atol=error * float(exact.abs().max()))
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        limit = (error + torch.finfo(dtype).eps) * float(wanted.abs().max())
        assert_close(gradient.cpu().double(), wanted, rtol=error, atol=limit)


def hard_factors(case: str, r: int = 5) -> dict[str, list[Tensor]]:
    """One pair whose spectrum is hard, far above any bound where that matters."""
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(r, 40, dtype=torch.float64), torch.randn(r, 30, dtype=torch.float64)
    if case == "zero":
        lora_B = torch.zeros_like(lora_B)
    elif case == "repeated":
        lora_A, lora_B = (torch.linalg.qr(factor.mT)[0].mT for factor in (lora_A, lora_B))
    elif case == "deficient":
        lora_A[-2:], lora_B = 1.37 * lora_A[:2], 1e7 * lora_B
    elif case == "graded":
        lora_A, lora_B = lora_A * torch.logspace(0, -4, r)[:, None], 1e7 * lora_B
    elif case == "cancelling":
        lora_A[2:4] = -lora_A[:2] + 1e-3 * lora_A[2:4]
        lora_B[2:4] = lora_B[:2] + 1e-3 * lora_B[2:4]
        lora_B = 1e5 * lora_B
    return {"A": [lora_A.float().double()[None, None]], "B": [lora_B.float().double()[None, None]]}


# An iteration that fails, and is taken up again with a larger shift, overflows.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("method", "options", "case"),
    [
        *(("soft_polar", {"bound": 2.0}, case) for case in ("repeated", "graded", "cancelling")),
        *((method, options, case) for method, options in KERNEL_METHODS for case in ("zero", "deficient")),
    ],
    ids=str,
)
def test_kernels_stay_finite_and_bounded_on_hard_spectra(method: str, options: dict[str, Any], case: str) -> None:
    inputs = hard_factors(case)
    if "bound" in options:
        inputs["bound"] = [torch.tensor([options["bound"]], dtype=torch.float64)]
    if "logits" in METHODS[method].needs:
        inputs["logits"] = [torch.zeros(1, 1, 5, 5, dtype=torch.float64)]
    core, gradients = core_and_gradients(method, options, inputs, torch.float32, PLACE)
    assert core.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    outer, inner = inputs["B"][0][0, 0].mT, inputs["A"][0][0, 0]
    size = core.cpu().double()[0, 0]
    update = outer @ (size if size.shape[0] > 1 else size * torch.eye(5)) @ inner
    if METHODS[method].bounds_singular_values and case != "cancelling":
        # Rounding the core to float32 counts in units of its largest entry, that of lost directions.
        assert torch.linalg.matrix_norm(update, ord=2) <= options["bound"] / 5**0.5 * (1 + FLOAT32_CONDITIONED)
    if case == "zero" and METHODS[method].is_bounded:
        assert torch.equal(size, torch.eye(len(size), dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@NEEDS_KERNELS
def test_kernels_give_nan_for_what_is_not_finite() -> None:
    inputs = hard_factors("repeated")
    inputs["B"][0][..., 0] = torch.nan
    for method in ("soft_polar", "soft_frobenius"):
        given = inputs | {"bound": [torch.ones(1, dtype=torch.float64)]}
        core, _ = core_and_gradients(method, {"bound": 1.0}, given, torch.float32, PLACE)
        assert core.isnan().all()


@NEEDS_KERNELS
@pytest.mark.parametrize("method", ["soft_frobenius", "soft_polar", "sinkhorn"])
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
def test_kernels_compile_into_one_graph_and_repeat_their_bits(method: str) -> None:
    options = dict(EACH)[method]
    inputs = make_inputs(method, options, 5)
    given = {name: [tensor.to(PLACE, torch.float32) for tensor in some] for name, some in inputs.items()}
    named = {name: given[name][0] for name in ("bound", "logits") if name in given}

    # Of the first group, which has one position.
    named = {name: value[:, :1] if name == "logits" else value[:1] for name, value in named.items()}

    def loss(A: Tensor, B: Tensor) -> Tensor:
        return cores([A], [B], METHODS[method], named).square().sum()

    factors = [given[name][0].requires_grad_() for name in "AB"]
    torch.compiler.reset()
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*factors), factors)
    for actual, expected in zip(compiled, torch.autograd.grad(loss(*factors), factors), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["soft_frobenius", "soft_polar"])
def test_a_cuda_graph_replays_the_kernels(method: str) -> None:
    inputs = make_inputs(method, dict(EACH)[method], 16)
    given = {name: [tensor.cuda().float() for tensor in some] for name, some in inputs.items()}
    factors = [tensor.requires_grad_() for name in "AB" for tensor in given[name]]

    def run() -> list[Tensor]:
        core = cores(given["A"], given["B"], METHODS[method], {"bound": given["bound"][0]})
        return [core, *torch.autograd.grad(core.square().sum(), factors)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for factor in factors:
            factor.mul_(1.5)
    graph.replay()
    for actual, expected in zip(captured, run(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__, "kernels_ and not interpreter", "42 passed")


@pytest.mark.parametrize(
    ("version", "serves"), [("3.4.0", False), ("3.5.0", True), ("3.9.0+rocm7", True), ("3.10.1", True)]
)
def test_a_triton_that_multiplies_no_float64_takes_formulas_for_matrices(
    version: str, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CalledError(Exception):
        """The kernel was called."""

    def call(*_: Any) -> None:
        raise CalledError

    let_kernels_serve(monkeypatch)
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    monkeypatch.setattr(cores_module, "_core", call)
    method, gram = METHODS["soft_polar"], torch.eye(4).expand(1, 2, 4, 4)
    if serves:
        with pytest.raises(CalledError):
            cores_module.cores_of_grams(gram, method, {"bound": 1.0})
    else:
        core = cores_module.cores_of_grams(gram, method, {"bound": 1.0})
        assert torch.equal(core, method.core(*gram.chunk(2, dim=1), bound=1.0))


def test_which_whitening_the_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores_module._whitening_serves(64, 1e-5)
    assert not cores_module._whitening_serves(64, 1e-7)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cores_module._whitening_serves(32, 1e-5)
    assert not cores_module._whitening_serves(64, 1e-5)
