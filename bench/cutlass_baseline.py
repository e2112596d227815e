"""CUTLASS's own collective product as a baseline, compiled from `cutlass_baseline.cu` with the installed headers."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from gpu_kit import nvcc, package_folder
from kernel_cases import BF16, Case, Setting, Variant, gemm_cases
from timing import Call

SOURCE = Path(__file__).with_suffix(".cu")
SCHEDULES = ("cooperative", "pingpong")


def cutlass_include() -> list[Path]:
    """Header folders of the PyPI package nvidia-cutlass, found without importing it."""
    source = package_folder("cutlass_library") / "source"
    return [source / "include", source / "tools" / "util" / "include"]


def compile_command(library: Path) -> list[str | Path]:
    """The nvcc call that makes `library`; about two minutes."""
    words: list[str | Path] = [
        nvcc(),
        "-std=c++20",
        "-O3",
        "-shared",
    ]
    words += ["-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    words += ["--diag-suppress=2908"]  # warnings in the headers
    words += [f"-I{folder}" for folder in cutlass_include()]
    return [*words, "-DNDEBUG", "-o", library, SOURCE]


def cases(s: Setting, library: Path) -> Iterator[Case]:
    """The plain product by CUTLASS at the model's four shapes, then by cuBLAS."""
    functions = {name: ctypes.CDLL(str(library))[f"cutlass_{name}"] for name in SCHEDULES}
    for case in gemm_cases(s):
        m, n, k = (int(part) for part in case.shape.split(": ")[1].split(" x "))
        variants = [
            Variant(f"CUTLASS {name}", partial(prepare, s, function, m, n, k))
            for name, function in functions.items()
        ]
        yield dataclasses.replace(case, variants=(*variants, *case.variants[1:]))


def prepare(s: Setting, function: ctypes._FuncPointer, m: int, n: int, k: int) -> Call:
    a, w = s.normal(m, k, dtype=BF16), s.normal(n, k, scale=k**-0.5, dtype=BF16)
    d = torch.full((m, n), torch.nan, dtype=BF16, device=s.device)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, w, d)]

    def call() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = function(*pointers, m, n, k, stream)
        if status != 0:
            raise RuntimeError(f"CUTLASS status {status} at {m} x {n} x {k}")

    call()
    rows = torch.randint(m, (64,), device=s.device)
    error = (d[rows].float() - a[rows].float() @ w.float().t()).abs().max()
    if not error <= 0.05:
        raise RuntimeError(f"CUTLASS differs from the float32 product by {float(error)}")
    return call
