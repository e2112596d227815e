"""The tests of what has changed, without the slow ones: what `make check` runs. `make test` runs all of them.

What has changed is what differs from main; on main itself the working tree, or, where that is clean, the last commit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TESTS = ROOT / "magihuman_fast", ROOT / "python_tests"
ALWAYS = ("house/test_house.py", "house/test_public_interface.py")
# For those who have no git, or nothing to compare with.
QUICK = ("guards", "model", "kernels/test_ops.py")
# Folder of csrc to its tests: patterns of files.
OF_KERNELS = {
    "attention": "kernels/test_attention*.py",
    "conv": "kernels/test_conv*.py",
    "gemm": "kernels/test_gemm*.py",
    "pointwise": "kernels/test_pointwise.py",
    "common": "kernels/test_attention.py",
    "hopper": "simulator/*.py",
    "sim": "simulator/*.py",
}
OF_THE_BUILD = ("house/test_build.py", "house/test_release.py", "house/test_wheel.py")
OPTIONS = ("-q", "-m", "not gpu and not slow", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")


def git(*words: str) -> list[str] | None:
    """The lines that git says; None where it fails."""
    try:
        command = ["git", "-c", "core.quotepath=off", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout.splitlines()


def changed_files() -> list[str] | None:
    """Relative to the repository; None where nobody can tell."""
    names = ("diff", "--name-only", "--no-renames", "--relative")
    base = git("merge-base", "HEAD", "main") or git("merge-base", "HEAD", "origin/main")
    head, new = git("rev-parse", "HEAD"), git("ls-files", "--others", "--exclude-standard")
    if base is None or head is None or new is None:
        return None
    changed = git(*names, base[0])
    if base == head and not changed and not new:
        changed = git(*names, "HEAD~1")
    return None if changed is None else sorted({*changed, *new})


def all_files() -> list[Path]:
    return sorted(TESTS.glob("*/test_*.py"))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def importing(module: str) -> set[Path]:
    """Tests that import a module, named as they would (`magihuman_fast.model.dit`, `cases`), or something shared that
    does."""
    package, _, name = module.rpartition(".")
    forms = [rf"import {re.escape(module)}\b", rf"from {re.escape(module)} import"]
    if package:
        forms.append(rf"from {re.escape(package)} import [^\n]*\b{name}\b")
    pattern = re.compile("^(" + "|".join(forms) + ")", re.MULTILINE)

    def users(paths: Iterable[Path]) -> set[Path]:
        return {path for path in paths if pattern.search(text_of(path))}

    shared = users(path for path in TESTS.glob("*.py") if path.stem != "conftest")
    return users(all_files()).union(*(importing(path.stem) for path in shared))


def named_after(stem: str, room: str) -> set[Path]:
    """The tests of a module by their names: those of its own room where there are any."""
    named = {path for path in all_files() if stem in path.stem}
    return {path for path in named if path.parent.name == room} or named


def below(*names: str) -> set[Path]:
    """Files of tests, and those in folders, by their names below `python_tests/`."""
    return {
        path for path in all_files() for name in names if path.relative_to(TESTS).as_posix().startswith(name)
    }


def for_file(file: str) -> set[Path]:
    """The tests of one file of the repository, beside those that always run."""
    path = Path(file)
    top, room = path.parts[0], path.parts[1] if len(path.parts) > 2 else ""
    if path.suffix == ".md" or top == "docs":
        return set()
    if top == "csrc":
        return set(TESTS.glob(OF_KERNELS.get(room, "kernels/test_ops.py")))
    if top == "examples":
        return below("house/test_examples.py")
    if top == "bench":
        return named_after(path.stem, "bench") or importing(path.stem) or below("bench/test_gpu_check.py")
    if top == "python_tests":
        if path.suffix != ".py" or path.stem == "conftest":
            return below(*QUICK)
        return {ROOT / path} & set(all_files()) or importing(path.stem)
    if top != PACKAGE.name:
        return below(*OF_THE_BUILD)
    if not room:  # the public names and what all rooms stand on
        return below("cli/test_cli.py", *QUICK)
    if path.suffix != ".py" or path.stem == "__init__":
        return below(f"{room}/")
    return of_module(path) or set().union(*map(of_module, package_users(path)))


def of_module(path: Path) -> set[Path]:
    return named_after(path.stem, path.parts[1]) or importing(".".join(path.with_suffix("").parts))


def package_users(path: Path) -> list[Path]:
    """Modules of the package that import one of it, for one without tests of its own."""
    pattern = re.compile(
        rf"^\s*from [\w.]*\.(?:{path.stem} import|\w* ?import [^\n]*\b{path.stem}\b)", re.MULTILINE
    )
    sources = sorted(PACKAGE.rglob("*.py"))
    return [s.relative_to(ROOT) for s in sources if pattern.search(text_of(s))]


def chosen(files: Iterable[str] | None) -> list[str]:
    """Paths of tests, relative to the repository."""
    found = below(*QUICK) if files is None else set().union(*map(for_file, files))
    return sorted(path.relative_to(ROOT).as_posix() for path in found | below(*ALWAYS))


def main(words: list[str]) -> int:
    files = changed_files()
    tests = chosen(files)
    if files is None:
        print("nobody can tell here what has changed: the quick tests")
    print("checked:", *tests, flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", *OPTIONS, *tests, *words], cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
