"""What a run on a GPU leaves: one line of JSON for each thing found, as it is found, and one record made of them.

The lines are the protocol between the script and its forked children too: a child says which step it begins and ends,
so that whatever kills it is pinned to the step that was open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from timing import ROOT, Result

RESULTS = ROOT / "bench" / "results"
# Kinds of findings, and the record's list that each is collected in.
KINDS = {
    "result": "results",
    "error": "errors",
    "ceilings": "ceilings",
    "fact": "facts",
    "test": "tests",
    "mismatch": "mismatches",
    "fault": "faults",
    "probe": "probes",
}
MAX_TENSOR_BYTES = 12 << 20  # of all failing tensors that are kept


def default_path(machine: dict[str, Any]) -> Path:
    """`<gpu>-<commit>.json`; a dirty tree says so."""
    gpu = str(machine["gpu"] or "no-gpu").lower().removeprefix("nvidia ").replace(" ", "-")
    commit = (machine["commit"] or "unknown")[:10]
    return RESULTS / f"{gpu}-{commit}{'-dirty' if machine['dirty'] else ''}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Aside first: a run that is stopped while writing leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(aside, path)


class Records:
    """The file of lines. Every line is on disk before the next thing starts; a line cut off by an end is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, group: str, kind: str, value: dict[str, Any]) -> None:
        line = json.dumps({"group": group, "kind": kind, "value": value}, default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def mend(self) -> None:
        """End a line that a killed process has begun."""
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def of(self, kind: str, group: str | None = None) -> list[dict[str, Any]]:
        """Values of one kind, each with its group."""
        return [
            {"group": line["group"], **line["value"]}
            for line in self.lines()
            if line["kind"] == kind and group in (None, line["group"])
        ]

    def collected(self) -> dict[str, list[dict[str, Any]]]:
        """Everything but steps, by the record's lists."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS.values()}
        for line in self.lines():
            if line["kind"] in KINDS:
                found[KINDS[line["kind"]]].append({"group": line["group"], **line["value"]})
        # A kernel's time is told at once, and again with its baseline's: the later one counts.
        results = {tuple(r[key] for key in ("group", "op", "shape", "variant")): r for r in found["results"]}
        return found | {"results": list(results.values())}

    def begun_steps(self, group: str) -> list[str]:
        return [value["step"] for value in self.of("step", group) if value["event"] == "begin"]

    def open_step(self, group: str) -> str | None:
        """The step that a group has begun and neither ended nor lost."""
        steps = self.of("step", group)
        return steps[-1]["step"] if steps and steps[-1]["event"] == "begin" else None

    def lose(self, group: str) -> str | None:
        """Close the step that a child did not survive; its name."""
        step = self.open_step(group)
        if step is not None:
            self.add(group, "step", {"event": "lost", "step": step})
        return step


class Child:
    """What a group's work is given: where it runs, what it may leave out, and where it says what it finds."""

    def __init__(
        self, group: str, records: Records, tensors: Path, *, device: str, skip: frozenset[str] = frozenset()
    ) -> None:
        self.group, self.device = group, device
        self._records, self._tensors, self._skip = records, tensors, skip

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def skip(self) -> frozenset[str]:
        """Steps of this group that an earlier child has done, or has not survived."""
        return self._skip

    def add(self, kind: str, value: dict[str, Any]) -> None:
        self._records.add(self.group, kind, value)

    def begin(self, step: str) -> bool:
        """Say that a step begins; False where it is to be left out."""
        if step in self._skip:
            return False
        print(f"--- {step}", flush=True)  # the last line before a hang
        self.add("step", {"event": "begin", "step": step})
        return True

    def end(self, step: str) -> None:
        self.add("step", {"event": "end", "step": step})

    def record(self, result: Result) -> None:
        self.add("result", result.to_dict())

    def result(self, result: Result) -> None:
        print(result.line(), flush=True)
        self.record(result)

    def error(self, op: str, shape: str, variant: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}".strip()[:2000]
        print(f"{op}, {variant} ({shape}): {text}", flush=True)
        self.add("error", {"op": op, "shape": shape, "variant": variant, "error": text})

    def ceilings(self) -> dict[str, Any] | None:
        """What the run has measured as this machine's ceilings, the newest."""
        found = self._records.of("ceilings")
        return found[-1] if found else None

    def keep_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Add failing tensors to the run's one file, as long as it stays small."""
        kept = torch.load(self._tensors, weights_only=True) if self._tensors.is_file() else {}
        kept[name] = {key: value.detach().cpu() for key, value in tensors.items()}
        if sum(t.nbytes for group in kept.values() for t in group.values()) > MAX_TENSOR_BYTES:
            return
        aside = self._tensors.with_suffix(f".{os.getpid()}")
        torch.save(kept, aside)
        os.replace(aside, self._tensors)
