"""What `olive-quant doctor` prints: versions, backends, CPU and GPUs, and what is missing."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton", "peft", "numpy")
RIVAL = "olive-ai"  # another project's distribution that installs a package and a command called olive


@dataclass
class Findings:
    """Facts by name, and problems, each with its way out."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is missing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _examine_gpu(device: torch.device, found: Findings) -> None:
    """Which backend serves a GPU; a second choice is a problem."""
    import torch

    from olive import ops
    from olive.ops import cuda

    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    label = f"GPU {device.index}"
    try:
        backend = ops.gpu_backend(device)
    except (RuntimeError, ValueError) as error:
        found.facts[label] = name
        found.problems.append(str(error))
        return
    found.facts[label] = f"{name}, {capability[0]}.{capability[1]}, {backend} kernels"
    if torch.version.hip is None and (reason := cuda.missing(device)):
        found.problems.append(f"{label} runs without the CUDA kernels: {reason}")


def examine() -> Findings:
    """Look at this environment. Imports torch, nothing else of others; starts no CUDA work."""
    import torch

    import olive
    from olive import ops
    from olive.ops import cuda
    from olive.ops.cpu import cpu_isas

    found = Findings()
    found.facts["olive-quant"] = olive.__version__
    found.facts["python"] = platform.python_version()
    found.facts["system"] = f"{platform.system()} {platform.machine()}"
    for name in PACKAGES:
        found.facts[name] = installed_version(name) or "not installed"
    found.facts["torch threads"] = str(torch.get_num_threads())
    found.facts["CPU kernels"] = ops.cpu_backend()
    found.facts["CPU instruction sets"] = ", ".join(cpu_isas()) or "none"
    found.facts["CUDA kernels"] = f"built for {cuda.architectures()}" if cuda.architectures() else "not built"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        _examine_gpu(device, found)
    if not devices:
        found.facts["GPUs"] = "none"
    if ops.cpu_backend() == "reference":
        found.problems.append("the compiled module olive._cpu is missing: build it with `pip install .`")
    if find_spec("transformers") is None:
        found.problems.append("transformers is missing: `pip install olive-quant[hf]` for its models")
    if installed_version(RIVAL) is not None:
        found.problems.append(
            f"{RIVAL} is installed and also owns the package name `olive`: the one installed last wins; "
            f"`pip uninstall {RIVAL}` and reinstall olive-quant, or use separate environments"
        )
    return found
