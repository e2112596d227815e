"""The reference of every function, from the docstrings: `make docs` writes build/docs/index.html.

A warning of pdoc's, such as an annotation that names nothing, is an error.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render

import magihuman_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = magihuman_fast.__name__
# What is compiled has no docstrings (`ops` describes it), and to import `__main__` is to run it.
NO_PAGE = ("_", "libmagihuman_kernels")


def show_contents(room: ModuleType) -> None:
    """Have pdoc show what a room hands on, which may be imported on first use, and its modules."""
    names = list(getattr(room, "__all__", ()))
    for name in names:
        setattr(room, name, getattr(room, name))
    for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        name = module.name.rpartition(".")[2]
        if name.startswith(NO_PAGE):
            continue
        if module.ispkg:
            show_contents(importlib.import_module(module.name))
        names.append(name)
    room.__all__ = list(dict.fromkeys(names))  # type: ignore[attr-defined]


def build(folder: Path) -> list[str]:
    """Write the pages; what pdoc had to complain of."""
    show_contents(magihuman_fast)
    # The main call first; calls of objects, which pdoc takes for private; modules, which it does not list.
    magihuman_fast.__all__.sort(key=lambda name: name != "MagiHumanPipeline")
    for value in (getattr(magihuman_fast, name) for name in magihuman_fast.__all__):
        if isinstance(value, type) and "__call__" in vars(value):
            call = inspect.unwrap(vars(value)["__call__"])
            call.__doc__ = f"{inspect.getdoc(call)}\n\n@public"
    modules = (magihuman_fast.ops, magihuman_fast.sampler)
    names = " and ".join(f"`{module.__name__}`" for module in modules)
    magihuman_fast.__doc__ = f"{magihuman_fast.__doc__}\n\nThe kernels and the samplers alone are {names}."
    pdoc.render.configure(docformat="google", footer_text=f"{PACKAGE} {magihuman_fast.__version__}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(PACKAGE, output_directory=folder)
    ours = (Path(pdoc.__file__).parent, ROOT / PACKAGE)
    said = [str(w.message) for w in caught if any(Path(w.filename).is_relative_to(place) for place in ours)]
    front = (folder / f"{PACKAGE}.html").read_text(encoding="utf-8")
    values = vars(magihuman_fast)
    named = [name for name in magihuman_fast.__all__ if not isinstance(values[name], ModuleType)]
    wanted = [*named, "MagiHumanPipeline.__call__"]
    return said + [f"{name} is not on the front page" for name in wanted if f'id="{name}"' not in front]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the reference of every function.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "docs")
    folder = parser.parse_args(argv).folder
    complaints = build(folder)
    for complaint in complaints:
        print(f"error: {complaint}", file=sys.stderr)
    if not complaints:
        print(f"the reference: {folder / 'index.html'}")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
