"""What travels to a bare GPU machine, so that a run there starts where it lands: `make gpu-kit` fills build/gpu-kit.

The machine is expected to have Python 3.12, torch, pytest, nvcc, cmake and ninja, and no network. In the folder: the
compiled kernel library (which needs no Python), their binding for Python 3.12 where there is one here to compile it
with, the probe of L2, the few CUTLASS headers that the kernels include, pybind11, and the packages that such a machine
lacks. There, `install` puts them in place; what does not load is compiled again: the binding in seconds, and as a last
resort everything by CMake.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "build" / "gpu-kit"
ROOM = ROOT / "magihuman_fast" / "kernels"  # where the package looks for what is compiled
KERNELS, PROBE, CUTLASS = "libmagihuman_kernels.so", "libl2_read.so", "libcutlass_baseline.so"
PYTHON = "python3.12"  # what GPU machines have
# Needed for whole clips and not on such a machine; with what they need that is not there either.
PACKAGES = ("diffusers", "importlib_metadata", "lazy_importer")
MAX_BYTES = 60 << 20


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, which need not be on the path."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def nvcc() -> str:
    program = cuda_tool("nvcc")
    if program is None:
        raise SystemExit("nvcc is not installed")
    return program


def asked(python: str | Path, what: str) -> str:
    """What an interpreter's `sysconfig` says."""
    words = [python, "-c", f"import sysconfig; print(sysconfig.{what})"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def binding_command(python: str | Path, pybind11: Path, kernels: Path, target: Path) -> list[str | Path]:
    """Compile the binding for an interpreter, over a kernel library; a few seconds."""
    include = asked(python, "get_path('include')")
    return [
        os.environ.get("CXX", "g++"),
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-DMAGIHUMAN_MODULE=_C"),
        *(f"-I{ROOT / 'csrc'}", f"-I{pybind11}", f"-I{include}"),
        ROOT / "csrc" / "binding.cpp",
        *("-o", target, kernels, "-Wl,-rpath,$ORIGIN"),
    ]


def binding_name(python: str | Path) -> str:
    return "_C" + asked(python, "get_config_var('EXT_SUFFIX')")


def probe_command(target: Path) -> list[str | Path]:
    """Compile the L2 probe."""
    flags = ("-std=c++20", "-O3", "-shared", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC")
    return [nvcc(), *flags, "-o", target, Path(__file__).with_name("l2_read.cu")]


def python312() -> str | None:
    """An interpreter of the machine's version with headers, if there is one here."""
    found = [shutil.which(PYTHON), *map(str, sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python")))]
    for python in filter(None, found):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            if Path(asked(python, "get_path('include')"), "Python.h").is_file():
                return python
    return None


def tree_digest(root: Path = ROOT) -> str:
    """Of every source that the kit is made of, or that runs beside it."""
    patterns = (
        "csrc/**/*.c*",
        "csrc/**/*.h",
        "magihuman_fast/**/*.py",
        "bench/*.py",
        "bench/*.cu",
        "python_tests/**/*.py",
    )
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- here ---------------------------------------------------------------------------------------------------------


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def cutlass_headers() -> list[Path]:
    """Those that the kernels include, relative to CUTLASS's include folder, as nvcc finds them."""
    include = package_folder("cutlass_library") / "source" / "include"
    found: set[Path] = set()
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        words = [nvcc(), "-std=c++20", "-M", "-gencode=arch=compute_90a,code=sm_90a"]
        words += [f"-I{ROOT / 'csrc'}", f"-I{include}", str(source)]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found |= {
            Path(name).relative_to(include)
            for name in re.findall(r"\S+", text)
            if name.startswith(f"{include}/")
        }
    return sorted(found)


def prepare(kit: Path = KIT, *, cutlass: bool = False) -> dict[str, Any]:
    """Fill the folder; what is in it, with sizes. The kernels must have been built.

    `cutlass`: compile its collective product too, which takes minutes (the plan "baselines").
    """
    library = ROOM / KERNELS
    if not library.is_file():
        raise SystemExit(f"gpu-kit: {library.name} is not built: nvcc is needed (make build)")
    with tempfile.TemporaryDirectory(dir=kit.parent if kit.parent.is_dir() else ROOT) as folder:
        aside = Path(folder) / "kit"
        aside.mkdir()
        shutil.copy2(library, aside / KERNELS)
        subprocess.run(probe_command(aside / PROBE), check=True)
        if cutlass:
            from cutlass_baseline import compile_command

            subprocess.run(compile_command(aside / CUTLASS), check=True)
        _build_packages(aside / "build-site")
        _wheels(aside / "site")
        python = python312()
        if python is not None:
            target = aside / binding_name(python)
            subprocess.run(
                binding_command(
                    python, aside / "build-site" / "pybind11" / "include", aside / KERNELS, target
                ),
                check=True,
            )
        from timing import describe_commit

        manifest: dict[str, Any] = {**describe_commit(), "tree": tree_digest()}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(kit, ignore_errors=True)
        aside.rename(kit)
    sizes = {
        path.name: sum(
            f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()
        )
        for path in sorted(kit.iterdir())
    }
    if sum(sizes.values()) > MAX_BYTES:
        raise SystemExit(f"gpu-kit: {sum(sizes.values())} bytes, over {MAX_BYTES}")
    return sizes


def _build_packages(site: Path) -> None:
    """pybind11, and CUTLASS as the package that CMakeLists.txt looks for."""
    for name in ("pybind11", "cutlass_library"):
        source, target = package_folder(name), site / name
        if name == "pybind11":
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            continue
        (target / "source" / "include").mkdir(parents=True)
        (target / "__init__.py").write_text('"""The headers that the kernels include."""\n')
        for header in cutlass_headers():
            to = target / "source" / "include" / header
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / "source" / "include" / header, to)


def _wheels(site: Path) -> None:
    """The missing packages, of the versions installed here, unpacked: all are plain Python."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--no-deps",
        ]
        words += ["--only-binary=:all:", "--dest", folder, *(f"{name}=={version(name)}" for name in PACKAGES)]
        subprocess.run(words, check=True)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)


# --- on the GPU machine -------------------------------------------------------------------------------------------


def manifest_of(kit: Path) -> dict[str, Any]:
    """What a kit says of itself.

    Raises:
        ValueError: it is none, or not made of the sources beside it; in words.
    """
    try:
        manifest = json.loads((kit / "manifest.json").read_text(encoding="utf-8"))
        there = (kit / KERNELS).is_file()
        tree = manifest["tree"]
    except (OSError, ValueError, KeyError, TypeError):
        there, tree = False, None
    if not there:
        raise ValueError("expected what `make gpu-kit` prepares")
    if tree != tree_digest():
        raise ValueError("it is not made of these sources; expected a new one (make gpu-kit)")
    return manifest


def add_packages(kit: Path) -> None:
    """Make the kit's packages importable, here and in processes started from here."""
    site = str(kit / "site")
    sys.path.append(site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH"), site]))


def install(kit: Path) -> dict[str, Any]:
    """Put the kernels in place; what was done. Nothing here touches a GPU."""
    facts: dict[str, Any] = {
        "tools": {name: shutil.which(name) for name in ("nvcc", "g++", "cmake", "ninja")}
    }
    shutil.copy2(kit / KERNELS, ROOM / KERNELS)
    name = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
    target = ROOM / name
    if (kit / name).is_file():
        shutil.copy2(kit / name, target)
        facts["binding"] = "as it came"
        if _loads(target, facts):
            return facts
    _run(
        binding_command(sys.executable, kit / "build-site" / "pybind11" / "include", ROOM / KERNELS, target),
        facts,
    )
    facts["binding"] = "compiled here"
    if _loads(target, facts):
        return facts
    facts["binding"] = "built by CMake"
    path = os.pathsep.join([str(kit / "build-site"), os.environ.get("PYTHONPATH", "")])
    _run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        facts,
        PYTHONPATH=path,
        MAGIHUMAN_BUILD_SIM="0",
    )
    if not _loads(target, facts):
        raise SystemExit(f"the kernels' module does not load: {facts}")
    return facts


def _run(words: Sequence[str | Path], facts: dict[str, Any], **environment: str) -> None:
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        facts.setdefault("build errors", []).append((done.stdout + done.stderr)[-3000:])


def _loads(target: Path, facts: dict[str, Any]) -> bool:
    code = (
        f"import ctypes; ctypes.CDLL({str(ROOM / KERNELS)!r}); import importlib.util as u; "
        f"s = u.spec_from_file_location('_C', {str(target)!r}); m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(m.gemm)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        facts.setdefault("load errors", []).append(done.stderr[-1000:])
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare build/gpu-kit for a run on a bare GPU machine.")
    parser.add_argument("--cutlass", action="store_true", help="with CUTLASS's own product; takes minutes")
    sizes = prepare(cutlass=parser.parse_args(argv).cutlass)
    for name, size in sizes.items():
        print(f"  {name:<40} {size / 2**20:8.2f} MiB")
    print(f"build/gpu-kit: {sum(sizes.values()) / 2**20:.1f} MiB of {MAX_BYTES >> 20}")
    if not any(name.startswith("_C") for name in sizes):
        print(f"without a binding: no {PYTHON} with headers here; it is compiled on the machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
