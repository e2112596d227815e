"""The parts of `gpu_check.py`, each run in a process of its own: `python bench/gpu_parts.py NAME RECORDS [--dry-run]`.

A part appends what it finds to RECORDS, one JSON object a line, as it finds it: a part that is stopped or crashes loses
only what it was doing. With --dry-run everything is tiny and on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

import torch  # noqa: E402

import baseline_cases  # noqa: E402
import decoder_cases  # noqa: E402
import gated_attention_cases  # noqa: E402
import kernel_cases  # noqa: E402
from kernel_cases import TINY, Case, Setting, gpu_setting, run_case  # noqa: E402
from timing import Ceilings, Result, gpu_state, measure_ceilings  # noqa: E402
from workload import Tokens  # noqa: E402

QUICK = {"laps": 3, "lap_seconds": 1e-4, "max_seconds": 0.05}
# Row ranges that end inside tiles, few enough rows for a tool that slows everything down a hundredfold.
SMALL = Tokens("small", (3, 6, 10), 37, 5)


class Records:
    """The file that a part appends to; every record is on disk before the next thing starts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, kind: str, value: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: value}) + "\n")

    def result(self, result: Result) -> None:
        print(result.line(), flush=True)
        self.add("result", result.to_dict())

    def error(self, op: str, shape: str, variant: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}".strip()[:2000]
        print(f"{op}, {variant} ({shape}): {text}", flush=True)
        self.add("error", {"op": op, "shape": shape, "variant": variant, "error": text})


# Tests of whole models, which run after those of single kernels.
WHOLE_MODELS = ("test_kernel_dit", "test_step_graph", "test_engine", "test_engine_gpu")


@dataclass(frozen=True)
class Part:
    """One part: what it does in words, the seconds it may take, and the function that does it."""

    name: str
    what: str
    seconds: int
    run: Callable[[Records, bool], None]


def time_cases(
    records: Records, cases: Iterable[Case], device: str, quick: bool, ceilings: Ceilings | None = None
) -> list[Result]:
    """Measure this process's ceilings, then every case, and the ceilings again: clocks may have fallen meanwhile."""
    first = measure_ceilings(device) if ceilings is None else ceilings
    records.add("ceilings", {"when": "before", **dataclasses.asdict(first), "state": gpu_state()})
    found: list[Result] = []

    def emit(result: Result) -> None:
        found.append(result)
        records.result(result)

    for case in cases:
        print(f"{case.op} ({case.shape})", flush=True)  # the last line before a hang
        run_case(case, device, first, emit, records.error, **(QUICK if quick else {}))
    if ceilings is None:
        again = measure_ceilings(device)
        records.add("ceilings", {"when": "after", **dataclasses.asdict(again), "state": gpu_state()})
    return found


def timed(
    builders: Sequence[Callable[[Setting], Iterator[Case]]], size: str, records: Records, dry: bool
) -> None:
    s = TINY if dry else gpu_setting(size)
    found: list[Result] = []
    for build in builders:
        found += time_cases(records, build(s), s.device, dry)
    for result in baseline_cases.extrapolated_step(found, s.clip.name):
        records.result(result)


def command(records: Records, words: Sequence[str | Path], dry: bool, **environment: str) -> int:
    """Run a command from the repository's root, its output shown; in a dry run only say it."""
    text = " ".join(map(str, words))
    print("would run" if dry else "running", text, flush=True)
    if dry:
        return 0
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    code = subprocess.run([str(word) for word in words], cwd=ROOT, env=env).returncode
    records.add("fact", {"command": text, "exit": code})
    return code


def build(records: Records, dry: bool) -> None:
    """Compile the kernels and their module into the package's folder."""
    tools = {name: shutil.which(name) for name in ("nvcc", "cmake", "ninja", "ccache")}
    modules = {name: find_spec(name) is not None for name in ("pybind11", "cutlass_library", "setuptools")}
    records.add("fact", {"build": tools | modules})
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    code = command(records, words, dry, MAGIHUMAN_BUILD_SIM="0")  # the simulator is no use of a GPU's time
    if not dry and not any((ROOT / "magihuman_fast").glob("_C*.so")):
        raise SystemExit(f"the build left no kernel module (exit code {code})")
    if code:
        raise SystemExit(code)


def gpu_tests(records: Records, dry: bool) -> None:
    """Run every test marked `gpu`."""
    files = [
        path
        for path in (ROOT / "python_tests").glob("test_*.py")
        if re.search(r"\bmark\.gpu\b|\bBACKENDS\b", path.read_text(encoding="utf-8"))
    ]
    # Single kernels before what is made of them: a wrong one is named by its own test.
    files.sort(key=lambda path: (path.stem in WHOLE_MODELS, path))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        # Names first, and few failures: after a hang or an illegal access the last name says which kernel it was,
        # and every later test in this process would fail for its sake.
        options = ["-v", "--maxfail=5", "-o", "faulthandler_timeout=30", "-p", "no:cacheprovider"]
        words = [sys.executable, "-m", "pytest", "-m", "gpu", *options, *files]
        if dry:
            words.append("--collect-only")
        code = command(records, [*words, f"--junitxml={report}"], False)
        if report.is_file():
            records.add("fact", {"tests": read_junit(report)})
    if code:
        raise SystemExit(code)


def whole(script: str, options: Sequence[str], records: Records, dry: bool) -> None:
    """Run a benchmark script of whole steps or clips and keep what it wrote; in a dry run it takes its toy."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        code = command(records, [sys.executable, BENCH / script, *options, "--out", out], False)
        if out.is_file():
            records.add("fact", {Path(script).stem: json.loads(out.read_text(encoding="utf-8"))})
    if code:
        raise SystemExit(code)


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, and the names and first lines of what failed."""
    cases = list(ET.parse(path).getroot().iter("testcase"))
    outcome = {
        case: next((child.tag for child in case if child.tag != "system-out"), "passed") for case in cases
    }
    failed = [
        f"{case.get('name')}: {next(iter(case)).get('message', '')[:300]}"
        for case in cases
        if outcome[case] in ("failure", "error")
    ]
    skipped = sum(tag == "skipped" for tag in outcome.values())
    return {"passed": sum(tag == "passed" for tag in outcome.values()), "skipped": skipped, "failed": failed}


def small_operations(device: str) -> None:
    """Launch every operation once on a small problem; for tools that watch the launches.

    Products, attention and convolutions again on two multiprocessors, where each block has more than one tile to do.
    """
    backend = "gpu" if device == "cuda" else "reference"
    persistent = (kernel_cases.gemm_cases, kernel_cases.fused_cases, ATTENTION, WINDOW, LAYERS_OF_DECODER)
    for num_sms, builders in ((0, (*persistent, kernel_cases.pointwise_cases)), (2, persistent)):
        s = dataclasses.replace(TINY, clip=SMALL, device=device, backend=backend, num_sms=num_sms)
        for case in (case for build in builders for case in build(s)):
            case.variants[0].make()()
            print(case.op, case.shape, flush=True)
        for call in decoder_cases.calls_of_wide_tiles(s):
            call()
    if device == "cuda":
        torch.cuda.synchronize()


def sanitize(tool: str, records: Records, dry: bool) -> None:
    """compute-sanitizer over one launch of every operation."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None and not dry:
        raise SystemExit("compute-sanitizer is not installed")
    words = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    words += [sys.executable, str(BENCH / "gpu_parts.py"), "small-operations", os.devnull]
    # Without torch's own allocator in between, the tool sees where each tensor ends.
    code = command(records, words + (["--dry-run"] if dry else []), dry, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if dry:
        small_operations("cpu")
    records.add("fact", {tool: "not run" if dry else "clean" if code == 0 else f"exit code {code}"})
    if code:
        raise SystemExit(code)


def cutlass(records: Records, dry: bool) -> None:
    """CUTLASS's own collective GEMM at the model's shapes, compiled here."""
    import cutlass_baseline

    s = TINY if dry else gpu_setting("256p")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcutlass_baseline.so"
        code = command(records, cutlass_baseline.compile_command(library), dry)
        if code:
            raise SystemExit(code)
        cases = [] if dry else cutlass_baseline.cases(s, library)
        time_cases(records, cases, s.device, dry)


def decoder_quality(records: Records, dry: bool) -> None:
    """The decoder's frames against float32: two windows at 256p, one at 1080p."""
    for size, frames in (("256p", 9), ("1080p", 7)):
        s = TINY if dry else gpu_setting(size)
        found = decoder_cases.decoder_quality(s, 2 if dry else frames)
        print(size, found, flush=True)
        records.add("fact", {f"decoder, {size}": found})


def ceilings(records: Records, dry: bool) -> None:
    time_cases(records, (), "cpu" if dry else "cuda", dry)


PADDING, LAYERS = baseline_cases.padding_cases, baseline_cases.layer_cases
ATTENTION, WINDOW = gated_attention_cases.attention_cases, gated_attention_cases.window_attention_cases
LAYERS_OF_DECODER = decoder_cases.decoder_layer_cases
DECODER = (decoder_cases.decode_window_cases, LAYERS_OF_DECODER, decoder_cases.decode_clip_cases)
TIMED = {
    "products": ("plain and fused products", (kernel_cases.gemm_cases, kernel_cases.fused_cases)),
    "pointwise": ("norms, embedders, head, sampler updates", (kernel_cases.pointwise_cases,)),
    "libraries": ("cuBLAS padding, layers", (PADDING, LAYERS)),
    "attention": ("gated attention, of torch and of flash-attn", (ATTENTION,)),
    "windowed": ("the same, and within the frame window", (ATTENTION, WINDOW)),
    "decoder": ("a decode window, its layers, a clip", DECODER),
}


def timed_part(kind: str, size: str, seconds: int) -> Part:
    what, builders = TIMED[kind]
    return Part(f"{kind}-{size}", f"{what}, {size}", seconds, partial(timed, builders, size))


def sanitizer_part(tool: str) -> Part:
    return Part(tool, f"compute-sanitizer {tool}, every operation once", 120, partial(sanitize, tool))


# The most important first: what comes last is left out when time runs short. Few parts: each loads torch anew.
PARTS = {
    part.name: part
    for part in (
        Part("ceilings", "large copy and large matrix product", 60, ceilings),
        Part("build", "compile the kernels", 300, build),
        Part("tests", "pytest -m gpu", 300, gpu_tests),
        sanitizer_part("memcheck"),
        timed_part("products", "256p", 240),
        timed_part("attention", "256p", 90),
        timed_part("windowed", "1080p", 150),
        timed_part("decoder", "256p", 180),
        Part("decoder-quality", "error, PSNR and memory of the decoder", 120, decoder_quality),
        Part("step", "one step of 256p, kernel by kernel", 120, partial(whole, "bench_step.py", ())),
        Part("clips", "whole clips of 256p", 240, partial(whole, "bench_e2e.py", ("--presets", "256p"))),
        timed_part("pointwise", "256p", 90),
        timed_part("libraries", "256p", 240),
        timed_part("products", "540p", 240),
        timed_part("products", "1080p", 300),
        sanitizer_part("racecheck"),
        sanitizer_part("synccheck"),
        Part("cutlass", "CUTLASS's collective product, 256p", 240, cutlass),
        timed_part("attention", "540p", 90),
        timed_part("pointwise", "1080p", 90),
        timed_part("decoder", "1080p", 300),
        timed_part("decoder", "540p", 180),
    )
}
# One of each kind: what a dry run runs.
REHEARSAL = ("ceilings", "build", "tests", "memcheck", "decoder-quality", "cutlass")
REHEARSAL += ("products-256p", "pointwise-256p", "libraries-256p", "windowed-1080p")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One part of gpu_check.py.")
    parser.add_argument("part", choices=[*PARTS, "small-operations"])
    parser.add_argument("records", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.part == "small-operations":
        small_operations("cpu" if args.dry_run else "cuda")
    else:
        PARTS[args.part].run(Records(args.records), args.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
