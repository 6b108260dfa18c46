"""Compiles Triton kernels for GPUs that need not be there."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(self.cubin)
            command = [str(tool), "--dump-resource-usage", str(file)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        fields = [field.split(":") for field in report.splitlines()[-1].split()]
        return {name: int(value) for name, value in fields}


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
