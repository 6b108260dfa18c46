"""Prints what CMAKE_CUDA_ARCHITECTURES must be for the GPU of this machine, so that nothing else is compiled.

python -m bench.gpu.architecture
"""

from __future__ import annotations

import torch


def cmake_architecture(major: int, minor: int) -> str:
    """The build's name for a compute capability.

    Raises:
        ValueError: older than 8.0, for which there are no kernels.
    """
    if major < 8:
        raise ValueError(f"GPU: expected compute capability 8.0 or newer, got {major}.{minor}")
    # Machine code runs on every later minor version; Hopper's own instructions (wgmma) need the "a".
    return "90a-real" if major == 9 else f"{major}0-real"


if __name__ == "__main__":
    print(cmake_architecture(*torch.cuda.get_device_capability()))
