"""Compiles Triton kernels for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100, 120)
ONE_TYPE_EACH = ((80, "fp16"), (90, "bf16"), (100, "fp16"), (120, "bf16"))
# The smallest that a block may have among them: sm_120, and sm_86 and sm_89, which run what sm_80 runs.
SHARED_MEMORY = 99 * 1024
STORED = {"codes_ptr": "*u8", "scale_ptr": "*i16", "codebook_ptr": "*i8"}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture.

    Args:
        ptx: its assembly.
        cubin: its machine code.
        shared: bytes of shared memory.
    """

    ptx: str
    cubin: bytes
    shared: int

    def resources(self) -> dict[str, int]:
        """What cuobjdump reports, e.g. {"REG": 96, "STACK": 0, "LOCAL": 0}; both of the latter are spills."""
        fields = [field.split(":") for field in self._dump("--dump-resource-usage").splitlines()[-1].split()]
        return {name: int(value) for name, value in fields}

    def instructions(self) -> set[str]:
        """Names of the machine instructions in use, e.g. "IMMA.16832.S8.S8.SAT"."""
        return set(re.findall(r"^\s+/\*\w+\*/\s+(?:@\S+\s+)?([A-Z][\w.]+)", self._dump("--dump-sass"), re.M))

    def _dump(self, what: str) -> str:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(self.cubin)
            command = [str(tool), what, str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_never_fused(compiled: Compiled, asked_for: bool = False) -> None:
    """Products and sums that the format rounds one by one are not contracted, denormals are not flushed.

    Args:
        compiled: a kernel compiled with `enable_fp_fusion=False`.
        asked_for: whether its source has fused multiply-adds of float32; ptxas makes no others then.
    """
    if asked_for:
        assert set(re.findall(r"\bfma\.[.\w]*", compiled.ptx)) <= {"fma.rn.f32", "fma.rn.f32x2"}
    else:
        assert not re.search(r"\bfma\.", compiled.ptx)
    assert ".ftz" not in compiled.ptx
    assert ".approx" not in compiled.ptx
    arithmetic = re.findall(r"\b(?:add|sub|mul|div|sqrt)[.\w]*\.f(?:32|64)", compiled.ptx)
    assert all(".rn" in instruction for instruction in arithmetic)


def compile_kernel(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int, **options: Any
) -> Compiled:
    """Compile a kernel whose pointers and sizes are as a caller's usually are: multiples of 16.

    Args:
        kernel: a `triton.jit` function.
        pointers: argument -> type, such as "*fp16"; the arguments named nowhere are int32.
        constants: compile-time values, and None for pointers that are absent.
        capability: 80 for sm_80 and so on.
        options: num_warps, num_stages, enable_fp_fusion.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)
