"""What users of the package can call, as lines of text: names, signatures, and the shell command's options.

python python_tests/public_interface.py          # rewrites the record, where a change of it is wanted
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import magihuman_fast
from magihuman_fast.cli.parser import PROGRAM, build_parser

RECORD = Path(__file__).parent / "house" / "public_interface.txt"
# Where a class lies is nobody's business.
ADDRESS = re.compile(r" at 0x\w+")
PLACE = re.compile(r"\bmagihuman_fast\.(?:\w+\.)*")


def interface() -> list[str]:
    return [*python_interface(), *torch_operators(), *shell_interface(build_parser(), PROGRAM)]


def python_interface() -> list[str]:
    """Every exported name, with the signatures of functions and of what is public in classes."""
    lines = [f"__version__: {type(magihuman_fast.__version__).__name__}"]
    for name in sorted(magihuman_fast.__all__):
        lines += described(name, getattr(magihuman_fast, name))
    return lines


def described(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, ModuleType):
        public = getattr(value, "__all__", None) or [
            n for n, v in vars(value).items() if getattr(v, "__module__", None) == value.__name__
        ]
        for inner in sorted(n for n in public if not n.startswith("_")):
            yield from described(f"{name}.{inner}", getattr(value, inner))
    elif typing.get_origin(value) is None and inspect.isclass(value):
        if typing.is_typeddict(value):
            yield f"class {name}({', '.join(value.__annotations__)})"
            return
        yield f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"
        if not issubclass(value, BaseException):
            yield f"{name}{shown_signature(value)}"
        for inner, member in sorted(vars(value).items()):
            if inner.startswith("_") and inner not in ("__call__", "__enter__", "__exit__"):
                continue
            if isinstance(member, property):
                yield f"{name}.{inner}: property"
            elif callable(member) or isinstance(member, (classmethod, staticmethod)):
                yield f"{name}.{inner}{shown_signature(getattr(value, inner))}"
    elif typing.get_origin(value) is None and inspect.isroutine(value):
        yield f"{name}{shown_signature(value)}"
    else:
        yield f"{name} = {PLACE.sub('', repr(value))}"


def shown_signature(value: Any) -> str:
    """With annotations as they are written, whatever module the names come from."""
    signature = inspect.signature(value)
    plain = {
        name: p if isinstance(p.annotation, str) else p.replace(annotation=inspect.Parameter.empty)
        for name, p in signature.parameters.items()
    }
    text = str(signature.replace(parameters=list(plain.values())))
    return ADDRESS.sub("", text.replace("'", ""))


def torch_operators() -> list[str]:
    """The schemas that importing the façade of torch.library registers."""
    importlib.import_module("magihuman_fast.kernels.torch_library")
    schemas = map(str, torch._C._jit_get_all_schemas())
    return sorted(schema for schema in schemas if schema.startswith("magihuman_fast::"))


def shell_interface(parser: argparse.ArgumentParser, name: str) -> list[str]:
    """Every command with its arguments: names, what they take, defaults."""
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                lines += shell_interface(inner, f"{name} {command}")
            continue
        words = [name, "|".join(action.option_strings) or str(action.metavar)]
        if action.option_strings and action.metavar:
            words.append(str(action.metavar))
        if action.choices is not None:
            words.append("{" + ",".join(map(str, action.choices)) + "}")
        if action.required:
            words.append("required")
        if action.default is not argparse.SUPPRESS and action.default is not None:
            words.append(f"= {action.default}")
        lines.append(" ".join(words))
    return lines


if __name__ == "__main__":
    RECORD.write_text("\n".join(interface()) + "\n", encoding="utf-8")
