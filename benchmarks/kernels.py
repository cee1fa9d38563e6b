"""What the kernels are compiled to, without a GPU: `python -m benchmarks.kernels`.

Every kernel is compiled ahead of time for NVIDIA's sm_80, sm_90 and sm_100 and AMD's gfx942, at each rank. A row has
its registers for each thread, its spilled bytes (they must be 0), its shared memory in bytes, and its
warps. Nothing is run, so no time is measured.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common.rows import save_rows
from hyperadapt.normalization import core_triton, gram_triton, root_triton

MODULES = (gram_triton, root_triton, core_triton)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RANKS = (4, 8, 16, 32, 64)
# Tensors of factors that a kernel is compiled for: two shapes, each with A and B.
FACTORS = 4
# What arguments are; "factors" is a tuple of pointers to them. All others are pointers to float32.
KINDS = {
    "tensors": "factors",
    "gradients": "factors",
    "table": "*i32",
    **dict.fromkeys(("positions", "pairs", "iterations", "stride_task", "stride_position"), "i32"),
    **dict.fromkeys(("ridge", "temperature"), "fp32"),
    **dict.fromkeys(("roots", "shifts", "vectors", "scratch"), "*fp64"),
}
READING = {
    "gram_forward": {},
    "gram_backward": {},
    "scale_forward": {"SOFT": True},
    "scale_backward": {"SOFT": True},
}
CORES = {
    "soft_polar_forward": {},
    "soft_polar_backward": {},
    "spectral_forward": {},
    "spectral_backward": {},
    "whitening_forward": {"BOTH": True},
    "whitening_backward": {"BOTH": True},
    "mixing_forward": {"MIXES": True},
    "mixing_backward": {"MIXES": True},
}


# What spills and is not used.
UNUSED = {("whitening_backward", 64, "gfx942")}


def compile_kernel(name: str, r: int, target: str, dtype: str = "fp32") -> Any:
    """Compile a kernel as a launch would.

    Args:
        name: A key of ``READING`` or ``CORES``.
        r: Rank.
        target: A key of ``TARGETS``.
        dtype: Triton's name of the factors' dtype.

    Returns:
        Triton's compiled kernel.
    """
    found = [vars(module).get(f"{prefix}{name}_kernel") for module in MODULES for prefix in ("", "_")]
    kernel = next(kernel for kernel in found if kernel is not None)
    is_amd = TARGETS[target].backend == "hip"
    constants = READING[name] | gram_triton.constants_of(r, is_amd) if name in READING else CORES[name]
    constants = constants | ({"ALIGNED": True} if name in READING else core_triton.constants_of(r, is_amd))
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in constants}
    kinds = {argument: KINDS.get(argument, "*fp32") for argument in kernel.arg_names if argument not in constants}
    signature = {
        argument: tuple([f"*{dtype}"] * FACTORS) if kind == "factors" else kind for argument, kind in kinds.items()
    }
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION is unset")
        return triton.compile(source, target=TARGETS[target], options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, the bytes that they spill, and shared memory in bytes.

    Args:
        compiled: What ``compile_kernel`` returns.

    Returns:
        The figures by name.
    """
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        # What is spilled to accumulation registers takes no memory.
        code = compiled.asm["amdgcn"]
        spilled = _found(r"\.private_segment_fixed_size:\s*(\d+)", code)
        return {"registers": _found(r"\.vgpr_count:\s*(\d+)", code), "spilled": spilled, "shared": shared}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    return {"registers": _found(r"REG:(\d+)", text), "spilled": _found(r"STACK:(\d+)", text), "shared": shared}


def _found(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler reports"
    return int(match.group(1))


def main() -> None:
    """Compile, print a line per row, and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=[*READING, *CORES], default=[*READING, *CORES])
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--output", type=Path, default=Path("runs/kernels"))
    options = parser.parse_args()
    print("registers/spilled bytes/shared bytes/warps")
    print(f"{'kernel':<20}{'factors':<9}{'r':>3}" + "".join(f"{target:>16}" for target in options.targets))
    rows = []
    for name in options.kernels:
        for dtype in ("fp32", "bf16") if name in READING else ("fp32",):
            for r in options.ranks:
                print(f"{name:<20}{dtype:<9}{r:>3}", end="", flush=True)
                for target in options.targets:
                    compiled = compile_kernel(name, r, target, dtype)
                    row = {"kernel": name, "dtype": dtype, "r": r, "target": target} | resources(compiled)
                    row["warps"] = compiled.metadata.num_warps
                    rows.append(row)
                    cell = "/".join(str(row[figure]) for figure in ("registers", "spilled", "shared", "warps"))
                    print(f"{cell:>16}", end="", flush=True)
                    # What is stopped leaves what it has compiled.
                    save_rows(options.output / "rows.jsonl", rows)
                print()


if __name__ == "__main__":
    main()
