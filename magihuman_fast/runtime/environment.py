"""What this machine has, and which of the package's paths runs on it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..kernels.ops import gpu_unavailable
from ..kernels.self_check import trust as kernel_trust
from ..kernels.self_check.comparison import Part

LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "diffusers",
    "av",
    "soundfile",
    "scipy",
    "pillow",
    "tqdm",
    "zstandard",
)
CODECS = ("libx264", "aac")
"""What an mp4 needs of the FFmpeg inside PyAV."""


KERNELS, REFERENCE = "Hopper kernels", "reference path (PyTorch)"


@dataclass(frozen=True)
class KernelPath:
    """The code that computes the models, `KERNELS` or `REFERENCE`, and why it is the one that runs."""

    name: str
    reason: str


def kernel_path(part: Part = "models") -> KernelPath:
    """Which path the models of the published sizes, or the video decoder, take on this machine, in bfloat16.

    Nothing is checked for it: it tells what an earlier check of the kernels found.
    """
    reason = gpu_unavailable()
    if reason is not None:
        return KernelPath(REFERENCE, f"Hopper kernels: {reason}")
    report = kernel_trust.known("cuda")
    if report is None:
        return KernelPath(KERNELS, "compiled, and this is a Hopper GPU; their first use checks them")
    wrong = report.why_not(part)
    if wrong is not None:
        return KernelPath(REFERENCE, wrong)
    return KernelPath(KERNELS, "compiled, and they agree with PyTorch on this Hopper GPU")


def library_versions() -> dict[str, str | None]:
    """Installed version of every library the package uses, None where one is missing."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cuda_devices() -> list[dict[str, Any]]:
    """Name, compute capability, memory in bytes and bfloat16 ability of every CUDA device torch can use."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "bf16": properties.major >= 8,
            }
        )
    return devices


def available_memory() -> int | None:
    """Bytes of host memory a new program can use without swapping, None where the system does not say."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def cpu_bf16_instructions() -> list[str]:
    """What this CPU multiplies bfloat16 with; where there is nothing, torch emulates it and float32 is faster."""
    found = re.findall(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", _read(Path("/proc/cpuinfo")))
    return sorted(set(found))


def describe_machine() -> dict[str, Any]:
    """Everything `magihuman-fast info` tells, as plain values."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    path, decoder_path = kernel_path("models"), kernel_path("decoder")
    return {
        "magihuman_fast": import_module("..", __package__).__version__,
        "path": {"name": path.name, "reason": path.reason},
        "decoder_path": {"name": decoder_path.name, "reason": decoder_path.reason},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {
            "name": model[1].strip() if model else platform.machine(),
            "cores": _usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "bf16_instructions": cpu_bf16_instructions(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "available_bytes": available_memory(),
        },
        "cuda": {
            "torch_built_with": torch.version.cuda,
            "driver": kernel_trust.driver_version(),
            "devices": cuda_devices(),
        },
        "libraries": library_versions(),
        "codecs": codecs(),
    }


def codecs() -> dict[str, bool]:
    """Whether PyAV can encode the picture and the sound of an mp4."""
    try:
        import av
    except ImportError:
        return dict.fromkeys(CODECS, False)
    return {name: name in av.codecs_available for name in CODECS}


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
