"""The kernels that work on Gram matrices, compiled ahead of time; needs no GPU."""

import pytest

pytest.importorskip("triton", minversion="3.9", reason="no triton, or one without float64 on tensor cores")

from benchmarks.kernels import CORES, RANKS, TARGETS, UNUSED, compile_kernel, resources
from tests.support.helpers import varied


@pytest.mark.parametrize(("name", "target", "r"), varied(("soft_polar_backward", "sm_90", 64), CORES, TARGETS, RANKS))
def test_compiled_code_keeps_to_registers(name: str, target: str, r: int) -> None:
    spilled = resources(compile_kernel(name, r, target))["spilled"]
    assert (spilled == 0) == ((name, r, target) not in UNUSED)


@pytest.mark.slow
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CORES)
def test_all_compiled_code_keeps_to_registers(name: str, target: str, r: int) -> None:
    spilled = resources(compile_kernel(name, r, target))["spilled"]
    assert (spilled == 0) == ((name, r, target) not in UNUSED)
