"""Plants one-token faults in a room of the package and tells which of them no test notices: there a test is missing,
or the change makes no difference, or only a GPU would show it.

    make mutants ROOM=pipeline N=20 SEED=0

ROOM may also be one module, as codecs/media.py. The changes are Cosmic Ray's: a number one larger or smaller, another
operator or comparison, a condition turned round, an exception that is not caught, a loop that does not run. A place is
drawn first, then a change of it. Everything happens in a copy of the tree. Each change gets a child of this process,
which has imported what takes long and nothing of the package; it runs the tests of the room's folder and of `ALSO`
until one fails, without those that took longer than `--longest` in the unchanged tree.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import difflib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "magihuman_fast"
LEFT_OUT = (".*", "__pycache__", "build", "dist", "results", "*.egg-info")
WARM = ("torch", "numpy", "scipy.signal", "PIL.Image", "av", "transformers.models.t5gemma.modeling_t5gemma")
# What else tests a room, beside the folder of its name.
ALSO = {
    "kernels": ("simulator",),
    "runtime": ("pipeline/test_pipeline_engine.py",),
    "checkpoints": ("pipeline/test_pipeline.py",),
    "pipeline": ("cli/test_cli.py",),
}
# Operators that no test can miss, and `is` in place of a comparison of values or the other way round.
TOO_PLAIN = re.compile(r"_(Pow|[LR]Shift|Bit(Or|And|Xor)|Mod)$|(Eq|[LG]tE?)_Is|_Is(Not)?_[^I]")


def meaning(source: str) -> str:
    """What a test could notice of a module: no annotation, no text for the log, not what only a type checker reads."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():  # a bare `*` among the parameters is no product
                node.returns = None
                node.args.args, node.args.posonlyargs = node.args.posonlyargs + node.args.args, []
            case ast.arg() | ast.AnnAssign():
                node.annotation = None
            case ast.keyword(arg="frozen" | "strict"):
                node.value = None
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "logger")))):
                node.value = None
            case ast.If(
                test=ast.Name(id="TYPE_CHECKING") | ast.UnaryOp(operand=ast.Name(id="TYPE_CHECKING"))
            ):
                node.test = None
    return ast.dump(tree)


def places(source: str) -> list[list[tuple[str, int]]]:
    """For each place that can be changed, in a fixed order: the changes there, each an operator and its occurrence."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    found: defaultdict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    nodes = list(ast_nodes(get_ast(source)))
    for name in sorted(cosmic_ray.plugins.operator_names()):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments() or TOO_PLAIN.search(name):  # arguments: names that somebody chose
            continue
        spans = (span for node in nodes for span in kind().mutation_positions(node))
        for occurrence, (start, _) in enumerate(spans):
            found[start].append((name, occurrence))
    return [changes for _, changes in sorted(found.items())]


def sample(modules: list[Path], seed: int) -> Iterator[tuple[Path, str]]:
    """Changed modules, each with the text it gets, in a random order that `seed` sets."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    deal = random.Random(seed)
    every = [(module, changes) for module in modules for changes in places(module.read_text())]
    deal.shuffle(every)
    for module, changes in every:
        source, (name, occurrence) = module.read_text(), deal.choice(changes)
        changed = mutate_code(source, cosmic_ray.plugins.get_operator(name)(), occurrence)
        with contextlib.suppress(SyntaxError):  # of an operator that is none there
            if meaning(changed) != meaning(source):
                yield module, changed


class Order:
    """A plugin of pytest: keeps how long tests take. The module's own test file comes first, then quick ones."""

    def __init__(self, seconds: dict[str, float], longest: float, module: str) -> None:
        self.seconds, self.longest, self.module = seconds, longest, module

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        took = {item: self.seconds.get(item.nodeid, 0.0) for item in items}
        items[:] = [item for item in items if took[item] <= self.longest]
        items.sort(key=lambda item: (self.module not in item.nodeid, took[item] > 1))


def run_tests(tree: Path, tests: list[str], order: Order, patience: float) -> int | None:
    """Pytest's exit code in a child, None where it had to be ended; its output and the tests' seconds lie beside it."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(tree, tests, order))
    child.start()
    try:
        child.join(patience)
        return child.exitcode
    finally:
        child.kill()
        with contextlib.suppress(ProcessLookupError):  # whatever its tests have left
            os.killpg(child.pid, signal.SIGKILL)


def _child(tree: Path, tests: list[str], order: Order) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its parent
    with open(tree.with_suffix(".log"), "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(tree)
    sys.path[0] = os.environ["PYTHONPATH"] = str(tree)  # instead of this file's folder
    code = pytest.main(["-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *tests], plugins=[order])
    tree.with_suffix(".json").write_text(json.dumps(order.seconds))
    sys.stdout.flush()
    os._exit(code)  # no waiting for threads


def inside_package(name: str) -> Path:
    """A room or a module by its path in the package, or in the repository.

    Raises:
        ValueError: it is neither, or has no tests.
    """
    package = ROOT / PACKAGE
    path = (package / name.removeprefix(f"{PACKAGE}/")).resolve()
    if path.is_relative_to(package) and path != package and (path.is_dir() or path.suffix == ".py"):
        inside = path.relative_to(package)
        if path.exists() and (ROOT / "python_tests" / inside.parts[0]).is_dir():
            return inside
    raise ValueError(f"{name}: expected a folder or a module of {PACKAGE} that has tests")


def told(module: Path, before: str, after: str) -> str:
    """Where a change is, and its lines before and after, without their indentation."""
    old, new = before.splitlines(), after.splitlines()
    first = next(i for i, (one, other) in enumerate(zip(old, new, strict=False), 1) if one != other)
    lines = list(difflib.unified_diff(old, new, n=0, lineterm=""))[3:]
    return "\n     ".join([f"{module}:{first}", *(f"{line[0]} {line[1:].strip()}" for line in lines)])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("room", help="a folder of the package, or a module in one")
    parser.add_argument("--sample", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=10, help="seconds of the slowest test that is run")
    args = parser.parse_args()
    try:
        inside = inside_package(args.room)
    except ValueError as error:
        parser.error(str(error))
    room = inside.parts[0]
    tests = [f"python_tests/{name}" for name in (room, *ALSO.get(room, ()))]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as any end: nothing is left behind
    for name in WARM:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        start = time.monotonic()
        if run_tests(tree, tests, Order({}, float("inf"), ""), 3600) != 0:
            print(tree.with_suffix(".log").read_text("utf-8", "replace")[-5000:])
            print("the tests fail, or do not end, without any change")
            return 1
        seconds, whole = json.loads(tree.with_suffix(".json").read_text()), time.monotonic() - start
        quick = sum(each <= args.longest for each in seconds.values())
        print(f"{len(seconds)} tests pass in {whole:.0f} s; {quick} of them are quick enough", flush=True)
        # From here on nothing is compiled for good: a change and the next one may have the same length and second.
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        target = tree / PACKAGE / inside
        changes = sample(sorted(target.rglob("*.py")) if target.is_dir() else [target], args.seed)
        survivors, planted = [], 0
        for planted, (module, changed) in enumerate(itertools.islice(changes, args.sample), 1):
            kept = module.rename(module.with_suffix(".kept"))
            module.write_text(changed)
            code = run_tests(tree, tests, Order(dict(seconds), args.longest, module.stem), 2 * whole + 60)
            kept.replace(module)
            what = told(module.relative_to(tree), module.read_text(), changed)
            end = {0: "SURVIVED", None: "killed, it hung"}.get(code, "killed")
            print(f"{planted:3}. {end}: {what}", flush=True)
            survivors += [what] if code == 0 else []
    print(*(["\nNot noticed:"] if survivors else []), *survivors, sep="\n")
    print(f"\nkilled {planted - len(survivors)} of {planted}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
