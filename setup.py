"""Builds the kernels with CMake (CMakeLists.txt); everything else is declared in pyproject.toml.

Without nvcc, or without a C++ compiler, the package installs all the same and runs on its reference path.
MAGIHUMAN_BUILD_SIM=1 or 0 says whether the simulator module that tests use is built; by default it is for editable
installs and not for wheels. MAGIHUMAN_KERNELS=required makes an error of kernels that cannot be compiled;
MAGIHUMAN_KERNELS=FOLDER takes the libraries that lie there and compiles none. CMAKE_ARGS is passed on.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "magihuman_fast"
KERNELS = "kernels"  # the room that holds what is compiled
REQUIRED = "required"
MIN_NVCC = (12, 8)


def find_nvcc() -> tuple[str | None, str]:
    """The compiler, or why there is none."""
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    named = os.environ.get("CUDACXX")
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which(named or "nvcc", path=path)
    if nvcc is None:
        return None, f"{named or 'nvcc'} not found"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or (int(release[1]), int(release[2])) < MIN_NVCC:
        wanted = ".".join(map(str, MIN_NVCC))
        return None, f"nvcc {wanted} or newer is needed, {nvcc} is {release[0] if release else 'unreadable'}"
    return nvcc, ""


def find_program(name: str) -> str:
    """A program from its PyPI package next to this interpreter (a virtual environment need not be active), else from
    the path."""
    bundled = Path(sys.executable).parent / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"error: {name} not found; it is a build requirement (pyproject.toml)")
    return found


class CMakeBuild(build_ext):
    """Builds libmagihuman_kernels.so and the modules `_C` and `_sim` into `magihuman_fast/kernels/`."""

    editable_mode = False
    built: list[str] = []  # noqa: RUF012

    def run(self) -> None:
        in_place = bool(self.inplace or self.editable_mode)
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / PACKAGE / KERNELS
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        if not in_place:
            build = Path(self.build_temp).resolve() / "cmake"
        with_sim = os.environ.get("MAGIHUMAN_BUILD_SIM", "1" if in_place else "0") != "0"
        nvcc, reason = find_nvcc()
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            nvcc, with_sim, reason = None, False, "no C++ compiler found"
        wish = os.environ.get("MAGIHUMAN_KERNELS", "")
        ready = wish not in ("", REQUIRED)
        if ready:
            nvcc = None
            self._copy(Path(wish), target)
        elif nvcc is None and wish == REQUIRED:
            raise SystemExit(f"error: {PACKAGE}: {reason}, and without it there are no kernels to pack")
        elif nvcc is None:
            print(f"{PACKAGE}: {reason}: kernels not compiled, reference path only", flush=True)
        if nvcc is not None or with_sim:
            self._cmake(build, target, nvcc, with_sim, in_place)
        # What an earlier build left and this one did not make would be out of date.
        wanted = {"_C", "libmagihuman_kernels"} if ready or nvcc is not None else set()
        wanted |= {"_sim"} if with_sim else set()
        for library in target.parent.rglob("*.so"):
            if library.parent != target or library.name.split(".")[0] not in wanted:
                library.unlink()
        self.built = [str(path) for path in sorted(target.glob("*.so"))]

    def _cmake(self, build: Path, target: Path, nvcc: str | None, with_sim: bool, in_place: bool) -> None:
        cmake, ninja = find_program("cmake"), find_program("ninja")
        # Everything named afresh: an isolated build's programs are gone by the next one.
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "MAGIHUMAN_BUILD_KERNELS": "OFF" if nvcc is None else "ON",
            "MAGIHUMAN_BUILD_SIM": "ON" if with_sim else "OFF",
            "MAGIHUMAN_LINE_INFO": "ON" if in_place else "OFF",
        }
        if nvcc is not None:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        defines = [f"-D{name}={value}" for name, value in options.items()]
        quiet = [] if self.verbose > 1 else ["--log-level=WARNING"]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        commands = [
            [cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *quiet, *defines, *extra],
            [cmake, "--build", build],
            # Without the symbols for debuggers: they name the compiler's temporary files.
            [cmake, "--install", build, "--prefix", target, *([] if in_place else ["--strip"])],
        ]
        for command in commands:
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"error: {' '.join(map(str, command))} failed")

    def _copy(self, ready: Path, target: Path) -> None:
        """Kernels that another build has made, for this interpreter."""
        target.mkdir(parents=True, exist_ok=True)
        for name in ("libmagihuman_kernels.so", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
            if not (ready / name).is_file():
                raise SystemExit(f"error: {PACKAGE}: MAGIHUMAN_KERNELS: there is no {ready / name}")
            shutil.copy2(ready / name, target / name)

    def get_outputs(self) -> list[str]:
        return self.built

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


setup(ext_modules=[Extension(f"{PACKAGE}.{KERNELS}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
