"""The kernels that read factors, compiled ahead of time, and what the compiled code does; needs no GPU."""

import re

import pytest

pytest.importorskip("triton", minversion="3.5", reason="no triton, or one without AMD's linker")

from benchmarks.kernels import RANKS, READING, TARGETS, compile_kernel, resources
from tests.support.helpers import varied


@pytest.mark.parametrize(
    ("name", "target", "r", "dtype"),
    varied(("gram_forward", "sm_90", 16, "bf16"), READING, TARGETS, RANKS, ("fp32", "bf16")),
)
def test_compiled_code_keeps_to_registers_and_moves_16_bytes_at_a_time(
    name: str, target: str, r: int, dtype: str
) -> None:
    check_compiled(name, target, r, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", READING)
def test_all_of_the_compiled_code_does(name: str, target: str, r: int, dtype: str) -> None:
    check_compiled(name, target, r, dtype)


def check_compiled(name: str, target: str, r: int, dtype: str) -> None:
    compiled = compile_kernel(name, r, target, dtype)
    assert resources(compiled)["spilled"] == 0
    if "ptx" not in compiled.asm:
        return
    ptx = compiled.asm["ptx"]
    if "forward" in name:
        assert re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10", ptx), "no asynchronous 16-byte copies"
    else:
        assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx), "no 16-byte loads"
        assert re.search(r"st\.global[.\w]*\.v[24]\.b32", ptx), "no wide stores"
    assert not re.search(r"ld\.global[.\w]*\.b16", ptx), "16-bit loads"
