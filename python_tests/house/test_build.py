"""What the compiled libraries depend on and show, what their sources include, and life without them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ROOM = ROOT / "magihuman_fast" / "kernels"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def includes() -> dict[Path, list[str]]:
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert len(sources) > 20
    return {path.relative_to(CSRC): INCLUDE.findall(path.read_text()) for path in sources}


def test_no_source_includes_torch() -> None:
    foreign = re.compile(r"^(torch|ATen|c10|caffe2)/|^Python\.h$")
    found = [(path, name) for path, names in includes().items() for name in names if foreign.match(name)]
    assert not found


def test_only_the_binding_includes_pybind11() -> None:
    users = [path for path, names in includes().items() if any(n.startswith("pybind11/") for n in names)]
    assert users == [Path("binding.cpp")]
    assert includes()[Path("binding.cpp")] == ["pybind11/pybind11.h", "api.h", "sim/instructions.h"]


def test_api_needs_no_other_header(tmp_path: Path) -> None:
    assert includes()[Path("api.h")] == ["cstdint"]
    source = tmp_path / "api_alone.cpp"
    source.write_text('#include "api.h"\n')
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", f"-I{CSRC}", source], check=True
    )


@pytest.fixture(scope="module")
def kernels() -> Path:
    library = ROOM / "libmagihuman_kernels.so"
    if not library.exists() and shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: there is no libmagihuman_kernels.so to look at")
    assert library.exists(), "nvcc is installed, and the kernels are not built: make build"
    return library


def readelf(option: str, library: Path) -> str:
    return subprocess.run(
        ["readelf", option, "-W", library], capture_output=True, text=True, check=True
    ).stdout


def needed(library: Path) -> set[str]:
    return {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", readelf("-d", library))}


SYSTEM = {"libc", "libm", "libstdc++", "libgcc_s", "libdl", "librt", "libpthread", "ld-linux-x86-64"}


def test_kernel_library_needs_only_the_system(kernels: Path) -> None:
    assert needed(kernels) <= SYSTEM


def test_kernel_library_shows_only_its_surface(kernels: Path) -> None:
    shown = r" (?:FUNC|OBJECT) +(?:GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ (\S+)"
    # The C++ library's own templates are visible wherever they are compiled.
    symbols = [s for s in re.findall(shown, readelf("--dyn-syms", kernels)) if not re.match(r"_ZZ?N?K?St", s)]
    surface = re.findall(r"MAGIHUMAN_API \w+ (\w+)\(", (CSRC / "api.h").read_text())
    assert len(symbols) == len(surface) > 10
    for name in surface:
        assert [s for s in symbols if s.startswith(f"_ZN9magihuman{len(name)}{name}E")], name


def test_binding_finds_the_library_beside_it(kernels: Path) -> None:
    (binding,) = kernels.parent.glob("_C.*.so")
    assert needed(binding) <= SYSTEM | {"libmagihuman_kernels"}
    assert re.search(r"(RUNPATH|RPATH).*\[\$ORIGIN\]", readelf("-d", binding))


def test_both_modules_offer_the_same_operations(kernels: Path) -> None:
    from magihuman_fast.kernels import _C, _sim  # type: ignore[attr-defined]

    def operations(module: object) -> dict[str, str]:
        return {
            name: getattr(module, name).__doc__
            for name in dir(module)
            if "stream" in (getattr(module, name).__doc__ or "")
        }

    assert operations(_C) == operations(_sim)
    assert len(operations(_C)) > 10


def test_kernels_know_their_version_of_cuda(kernels: Path) -> None:
    from magihuman_fast.kernels import _C  # type: ignore[attr-defined]

    built, driver = _C.cuda_versions()
    assert 12080 <= built < 20000
    assert driver == 0 or driver >= 9000


# As on a machine where nothing was compiled.
WITHOUT_LIBRARIES = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("magihuman_fast.kernels._C", "magihuman_fast.kernels._sim"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
import magihuman_fast
from magihuman_fast.kernels import ops, torch_library
print(ops.gpu_unavailable())
try:
    ops.simulator()
except RuntimeError as error:
    print(error)
print(ops.rms_norm(torch.ones(1, 8), torch.zeros(1, 8), backend="reference").tolist())
"""


def test_package_works_without_its_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARIES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "kernels not compiled: there was no nvcc when the package was installed (in a clone: make build)",
        "backend 'sim': magihuman_fast.kernels._sim is not built; it comes with an editable install",
        "[[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]",
    ]


def build_without(nvcc: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """Build as for a wheel, elsewhere; the lines printed and the built room of the kernels."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={tmp_path}"]
    command += ["build", f"--build-base={tmp_path}", f"--build-lib={tmp_path / 'lib'}"]
    environment = {**os.environ, "CUDACXX": str(nvcc)}
    for name in ("MAGIHUMAN_BUILD_SIM", "MAGIHUMAN_KERNELS"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), tmp_path / "lib" / "magihuman_fast" / "kernels"


def test_build_without_nvcc_says_so_in_one_line(tmp_path: Path) -> None:
    lines, room = build_without(tmp_path / "nvcc", tmp_path)
    assert lines == [
        f"magihuman_fast: {tmp_path / 'nvcc'} not found: kernels not compiled, reference path only"
    ]
    assert (room / "ops.py").exists()
    assert not list(room.glob("*.so"))


def test_build_with_an_old_nvcc_says_so_in_one_line(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    lines, room = build_without(nvcc, tmp_path)
    reason = f"nvcc 12.8 or newer is needed, {nvcc} is release 11.8"
    assert lines == [f"magihuman_fast: {reason}: kernels not compiled, reference path only"]
    assert not list(room.glob("*.so"))
