"""`make wheel`: what is in it, and that it works where there is neither a compiler nor this clone.

Looked at is the wheel in dist/, if nothing that it is made of has changed since; else one packed by the same target
around the libraries of `make build`, for compiling them again would take minutes. Where there is no nvcc there are no
libraries: then it is the wheel that `pip wheel` makes, which runs on the reference path.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from functools import cached_property
from pathlib import Path

import av
import pytest

import magihuman_fast

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "magihuman_fast"
ROOM = PACKAGE / "kernels"
LIBRARY = "libmagihuman_kernels.so"
BINDING = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
VERSION = magihuman_fast.__version__
INTERPRETER = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def surroundings(**changes: str) -> dict[str, str]:
    """The environment, without what a make around the tests or a developer's shell says to builds and to imports."""
    said = re.compile(r"MAKE|MFLAGS|MAGIHUMAN|PYTHON|CUDA|CMAKE|LD_LIBRARY_PATH|SOURCE_DATE_EPOCH")
    return {name: value for name, value in os.environ.items() if not said.match(name)} | changes


def make_wheel(folder: Path, kernels: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """`make wheel` into `folder`, with the environment that runs the tests: that is set up."""
    # make takes a path with spaces for several: in the clone by its name there.
    environment = Path(sys.prefix)
    environment = environment.relative_to(ROOT) if environment.is_relative_to(ROOT) else environment
    variables = {"VENV": environment, "WHEEL": folder / "build", "DIST": folder / "dist", "KERNELS": kernels}
    command = ["make", "wheel", f"--old-file={environment}/.installed"]
    command += [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(command, cwd=ROOT, env=surroundings(**changes), capture_output=True, text=True)


def pack_without_kernels(folder: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={folder}"]
    command += ["build", f"--build-base={folder / 'build'}"]
    command += ["bdist_wheel", "--skip-build", f"--dist-dir={folder / 'dist'}"]
    environment = surroundings(CUDACXX=str(folder / "nvcc"))
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)


@dataclass(frozen=True)
class Wheel:
    path: Path
    compiled: bool  # kernels are in it
    to_ship: bool  # from `make wheel` as it stands, with kernels compiled for it

    @cached_property
    def files(self) -> dict[str, bytes]:
        with zipfile.ZipFile(self.path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}

    def about(self, name: str) -> Message:
        return BytesParser().parsebytes(self.files[f"magihuman_fast-{VERSION}.dist-info/{name}"])


def up_to_date() -> Path | None:
    """The wheel in dist/ that is newer than everything it is made of."""
    inputs = [
        ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile", "pyproject.toml", "README.md")
    ]
    inputs += [path for folder in (PACKAGE, ROOT / "csrc") for path in folder.rglob("*.*")]
    # A removed file shows in its folder's time.
    inputs += [path.parent for path in inputs if path.suffix == ".py"]
    newest = max(path.stat().st_mtime for path in inputs if path.suffix not in (".so", ".pyc"))
    found = (ROOT / "dist").glob(f"magihuman_fast-{VERSION}-{INTERPRETER}-*.whl")
    return next((path for path in found if path.stat().st_mtime > newest), None)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    made = up_to_date()
    if made is not None:
        return Wheel(made, compiled=True, to_ship=True)
    folder = tmp_path_factory.mktemp("wheel")
    compiled = (ROOM / LIBRARY).exists()
    if compiled:
        done = make_wheel(folder, ROOM)
        assert done.returncode == 0, done.stderr
    else:
        pack_without_kernels(folder)
    (path,) = (folder / "dist").iterdir()
    return Wheel(path, compiled, to_ship=False)


def test_the_package_is_in_it_and_nothing_else(wheel: Wheel) -> None:
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".txt", ".typed")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources}
    assert {"magihuman_fast/py.typed", "magihuman_fast/codecs/negative_prompt.txt"} < set(texts)
    about = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    others = {f"magihuman_fast-{VERSION}.dist-info/{name}" for name in about}
    if wheel.compiled:
        others |= {f"magihuman_fast/kernels/{name}" for name in (LIBRARY, BINDING)}
    assert set(wheel.files) == set(texts) | others
    assert [name for name, text in texts.items() if wheel.files[name] != text] == []


def test_what_it_says_of_itself_is_what_the_project_says(wheel: Wheel) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = wheel.about("METADATA")
    assert (said["Name"], said["Version"]) == ("magihuman_fast", VERSION)
    assert (said["License-Expression"], said["Requires-Python"]) == (
        project["license"],
        project["requires-python"],
    )
    needs = [need for need in said.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(needs) == sorted(project["dependencies"])
    ((command, function),) = project["scripts"].items()
    assert f"{command} = {function}" in wheel.about("entry_points.txt").as_string().splitlines()
    (tag,) = wheel.about("WHEEL").get_all("Tag", [])
    assert wheel.path.name == f"magihuman_fast-{VERSION}-{tag}.whl"
    system = r"manylinux_2_\d+" if wheel.compiled else "linux"
    assert re.fullmatch(rf"{INTERPRETER}-{INTERPRETER}-{system}_{os.uname().machine}", tag)


def test_it_does_not_tell_where_it_was_built(wheel: Wheel) -> None:
    places = {ROOT, Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)} - {Path("/")}
    place = re.compile(b"|".join(re.escape(f"{place}/".encode()) for place in places))
    source = re.compile(rb"tmpxft_|(?<![\w.+/-])/[\w.+/-]+\.(?:cuh?|cpp|hpp|h)\b")
    found = []
    for name, content in wheel.files.items():
        # Profilers want source lines of the kernels that `make build` compiles.
        if wheel.to_ship or not name.endswith(LIBRARY):
            hits = place.findall(content) + (source.findall(content) if name.endswith(".so") else [])
            found += [(name, hit) for hit in hits]
    assert not found


@pytest.fixture(scope="module")
def programs(wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh virtual environment with the wheel in it; what the wheel needs is lent from the tests' own."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        f"--python={folder / 'bin' / 'python'}",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel.path], check=True)
    # Afterwards: pip would take the installation that is lent for an older one, and remove it.
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(site, "lent.pth").write_text("\n".join(lent), encoding="utf-8")
    return folder / "bin"


def run(programs: Path, cwd: Path, name: str, *arguments: object) -> str:
    """What one of the programs prints, where nothing else is on the path: no compiler either."""
    command = [str(programs / name), *map(str, arguments)]
    environment = surroundings(PATH=str(programs), HOME=str(cwd), OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROBE = """
import importlib, json
from importlib.metadata import version
import magihuman_fast
from magihuman_fast.kernels.self_check.cases import CASES
said = {"file": magihuman_fast.__file__, "version": version("magihuman_fast")}
said["reason"] = magihuman_fast.ops.gpu_unavailable()
try:
    kernels = importlib.import_module("magihuman_fast.kernels._C")
except ModuleNotFoundError:
    kernels = None
said["kernels"] = [name for name in dir(kernels) if "stream" in (getattr(kernels, name).__doc__ or "")]
said["checked"] = sorted({case.operation for case in CASES.values()})
said["cuda"] = kernels.cuda_versions()[0] if kernels else None
print(json.dumps(said))
"""


def test_it_brings_the_kernels(wheel: Wheel, programs: Path, tmp_path: Path) -> None:
    said = json.loads(run(programs, tmp_path, "python", "-c", PROBE))
    assert Path(said["file"]).is_relative_to(programs.parent)
    assert said["version"] == VERSION
    launchers = re.findall(r"void launch_(\w+)\(", (ROOT / "csrc" / "api.h").read_text(encoding="utf-8"))
    assert said["kernels"] == (sorted(launchers) if wheel.compiled else [])
    assert str(said["reason"]).startswith("kernels not compiled") is not wheel.compiled
    if wheel.compiled:
        assert set(said["checked"]) <= set(said["kernels"])
        assert said["cuda"] >= 12080


def test_its_command_makes_a_clip(programs: Path, tmp_path: Path) -> None:
    run(programs, tmp_path, "magihuman-fast", "synth", "model")
    order = {"model": "model", "prompt": "He says hello.", "output": "clip.mp4"}
    order |= {"seconds": "1", "size": "64x64", "steps": "1"}
    run(
        programs,
        tmp_path,
        "magihuman-fast",
        "generate",
        *(f"--{key}={value}" for key, value in order.items()),
    )
    with av.open(tmp_path / "clip.mp4") as clip:
        frames = [(frame.width, frame.height) for frame in clip.decode(video=0)]
        sound = clip.streams.audio[0]
        assert sound.duration is not None
        seconds = float(sound.duration * sound.time_base)
    assert frames == [(64, 64)] * 25
    assert seconds == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kernels", ["required", "FOLDER"])
def test_without_kernels_it_is_refused_in_one_line(kernels: str, tmp_path: Path) -> None:
    nvcc, empty = tmp_path / "nvcc", tmp_path / "empty"
    done = make_wheel(tmp_path, empty if kernels == "FOLDER" else kernels, CUDACXX=str(nvcc))
    reason = {
        "required": f"{nvcc} not found, and without it there are no kernels to pack",
        "FOLDER": f"MAGIHUMAN_KERNELS: there is no {empty / LIBRARY}",
    }
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines == [f"error: magihuman_fast: {reason[kernels]}"]
    assert not (tmp_path / "dist").exists()
