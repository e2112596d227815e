"""The repository's own rules: file length, import direction, a quiet import, words that must not appear."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "magihuman_fast"
FOLDERS = (PACKAGE, "csrc", "docs", "python_tests", "bench", "examples", ".ci")
CODE = {".py", ".cu", ".cuh", ".h", ".cpp"}
TEXT = CODE | {".md", ".toml", ".txt", ".json", ""}  # "": Makefile, .ci/run
MAX_LINES = 450

# A room may import from the rooms before it, and inside itself without a circle; docs/map.md says what each is for.
# The package's own __init__ is the façade over all of them: none of them may import it.
ROOMS = (
    "errors",
    "guards",
    "model",
    "kernels",
    "codecs",
    "runtime",
    "checkpoints",
    "pipeline",
    "cli",
    "__main__",
)
MAX_ENTRIES = 12  # of modules and rooms in the package's folder

# Written so that this file does not contain what it looks for.
FORBIDDEN_WORDS = re.compile(r"\bTO[D]O\b|\bFI[X]ME\b|\bXX[X]\b")
MACHINE_PATH = re.compile(r"(?<![\w.:/*~-])/(?:work|tmp|home|root|Users|mnt)/")
VAGUE_NAME = re.compile(r"(^|_)(utils?|helpers?|managers?)(_|$)")


def files(suffixes: set[str]) -> Iterator[Path]:
    """Our files with one of `suffixes`: those in the root and everything under `FOLDERS`."""
    candidates = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    for path in candidates:
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
            yield path


def test_files_are_short() -> None:
    too_long = []
    for path in files(CODE):
        lines = path.read_text(encoding="utf-8").splitlines()
        excused = any("Longer than 450 lines because" in line for line in lines[:20])
        if len(lines) > MAX_LINES and not excused:
            too_long.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
    assert not too_long


def test_no_forbidden_words_or_machine_paths() -> None:
    found = []
    for path in files(TEXT):
        if path.name.startswith(".") or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            if FORBIDDEN_WORDS.search(line) or MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_module_names_say_what_is_inside() -> None:
    parts = {part for path in files(CODE) for part in (*path.relative_to(ROOT).parts[:-1], path.stem)}
    assert not [part for part in parts if VAGUE_NAME.search(part)]


LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
NAMED_FILE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|cuh|cpp|cu|h))`")


def test_pages_name_files_that_there_are() -> None:
    """Links, and file names in backticks: from the root, the package, or a folder that the page speaks of."""
    known = ["/" + path.relative_to(ROOT).as_posix() for path in files(CODE | {".md"})]
    wrong = []
    for page in files({".md"}):
        text = page.read_text(encoding="utf-8")
        for target, anchor in LINK.findall(text):
            there = page.parent / target if target else page
            headings = (
                re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE) if there.is_file() else []
            )
            if not there.exists() or (
                anchor and anchor not in [h.lower().replace(" ", "-") for h in headings]
            ):
                wrong.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
        for name in NAMED_FILE.findall(text):
            if not any(path.endswith(f"/{name}") for path in known):
                wrong.append(f"{page.relative_to(ROOT)}: {name}")
    assert not wrong


def modules() -> dict[str, Path]:
    """The package's modules by dotted name inside the package; "" is the package itself."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(name: str, path: Path, known: set[str]) -> set[str]:
    """The package's modules that module `name` imports anywhere in its text, inside functions too."""
    here = name.split(".") if name else []
    package = here if path.name == "__init__.py" else here[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom):
            source = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + source
            elif source and source[0] == PACKAGE:
                base = source[1:]
            else:
                continue
            # `from .a import b`: the module a.b if there is one, else a name in module a.
            targets = [
                [*base, alias.name] if ".".join([*base, alias.name]) in known else base
                for alias in node.names
            ]
        found |= {".".join(target) for target in targets}
    return found


def test_imports_point_down() -> None:
    found = modules()
    graph = {name: imported_modules(name, path, set(found)) for name, path in found.items() if name}
    assert {name.split(".")[0] for name in graph} == set(ROOMS)
    floor = {name: ROOMS.index(name.split(".")[0]) for name in graph}
    wrong = [
        f"{name} imports {target or PACKAGE}"
        for name, targets in graph.items()
        for target in targets
        if target == "" or floor[target] > floor[name]
    ]
    assert not wrong
    between = [(name, t) for name in graph if name.startswith("codecs") for t in graph[name]]
    assert not [pair for pair in between if pair[1].startswith("kernels")]  # a floor that both stand on
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {error.args[1]}")


def test_few_things_lie_at_the_packages_top() -> None:
    top = (ROOT / PACKAGE).iterdir()
    # A folder that has no sources any more is what a move leaves behind in a clone: it holds compiled ones.
    entries = [path for path in top if path.suffix == ".py" or any(path.rglob("*.py"))]
    assert len(entries) <= MAX_ENTRIES


def test_a_room_says_its_job_in_a_line() -> None:
    for room in ROOMS[1:-1]:
        tree = ast.parse((ROOT / PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
        names = (ast.ImportFrom, ast.Assign)  # that a room hands on, and __all__
        assert all(isinstance(node, names) for node in tree.body[1:]), f"{room}: belongs into its modules"
        said = ast.get_docstring(tree)
        assert said
        assert len(said.splitlines()) == 1, room


def test_tests_lie_in_the_room_of_what_they_test() -> None:
    rooms = {*ROOMS[1:-1], "simulator", "bench", "house"}
    tests = sorted((ROOT / "python_tests").rglob("test_*.py"))
    assert not [str(path) for path in tests if path.parent.name not in rooms]
    names = [path.name for path in tests]
    assert len(set(names)) == len(names)  # the plan of the GPU run finds them by name


# torch comes first: what it changes is not ours. The heavy libraries are for the functions that need them.
PROBE = """
import importlib, logging, os, pkgutil, sys, threading, torch
HEAVY = {"transformers", "diffusers", "av", "matplotlib", "scipy"}
def state():
    return {
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "path": list(sys.path),
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "torch dtype": torch.get_default_dtype(),
        "torch grad": torch.is_grad_enabled(),
        "log handlers": list(logging.getLogger().handlers),
    }
before = state()
import magihuman_fast
for module in pkgutil.walk_packages(magihuman_fast.__path__, "magihuman_fast."):
    # The kernel library lies beside its binding and is no module.
    if not module.name.endswith(("__main__", "libmagihuman_kernels")):
        importlib.import_module(module.name)
after = state()
assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
assert not torch.cuda.is_initialized()
"""


def test_importing_changes_nothing() -> None:
    """Importing every module of the package prints nothing, changes nothing and loads no heavy library."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
