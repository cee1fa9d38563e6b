"""The kernels compiled ahead of time for several GPUs, and what the compiled code does; needs no GPU."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.language import bfloat16, float32  # noqa: E402

from hyperadapt.normalization import gram_triton  # noqa: E402

NVIDIA = [80, 90, 100]
RANKS = [4, 8, 16, 32, 64]
KERNELS = {
    "forward": (gram_triton._gram_forward_kernel, {"addresses": "*i64", "table": "*i32", "grams": "*fp32"}),
    "backward": (
        gram_triton._gram_backward_kernel,
        {"addresses": "*i64", "gradient_addresses": "*i64", "table": "*i32", "grad_grams": "*fp32"},
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")


def compile_kernel(name: str, r: int, dtype: Any, target: Any) -> Any:
    kernel, signature = KERNELS[name]
    padded = max(16, r)
    tile, warps, precision = gram_triton.CONFIGURATIONS[padded]
    constants = {
        "R": r,
        "R_PADDED": padded,
        "TILE": tile,
        "DTYPE": dtype,
        "ALIGNED": True,
        "PRECISION": precision,
    }
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    return triton.compile(source, target=target, options={"num_warps": warps})


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("capability", NVIDIA)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_code_keeps_to_registers_and_moves_16_bytes_at_a_time(
    name: str, capability: int, r: int, dtype: Any, tmp_path: Path
) -> None:
    compiled = compile_kernel(name, r, dtype, GPUTarget("cuda", capability, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    match = re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)
    assert match is not None
    assert match.group(1) == "0", "registers spill to the stack"

    ptx = compiled.asm["ptx"]
    if name == "forward":
        assert re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10", ptx), "no asynchronous 16-byte copies"
    else:
        assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx), "no 16-byte loads"
        assert re.search(r"st\.global[.\w]*\.v[24]\.b32", ptx), "no wide stores"
    assert not re.search(r"ld\.global[.\w]*\.b16", ptx), "16-bit loads"


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_amd(name: str) -> None:
    # An older package leaves out the linker.
    pytest.importorskip("triton", minversion="3.5")
    assert compile_kernel(name, 16, bfloat16, GPUTarget("hip", "gfx942", 64)).asm["hsaco"]
