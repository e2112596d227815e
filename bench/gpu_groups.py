"""What the groups of `gpu_plan.py` do, each inside a forked child of `gpu_check.py`.

Every function takes a `Child`: on a GPU it works at the model's sizes, in a rehearsal on the CPU and in the simulator
at toy sizes. `python bench/gpu_groups.py OPERATION` launches operations once, for tools that watch a process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

import torch  # noqa: E402

import baseline_cases  # noqa: E402
import cutlass_baseline  # noqa: E402
import decoder_cases  # noqa: E402
import gated_attention_cases  # noqa: E402
import gpu_kit  # noqa: E402
import kernel_cases  # noqa: E402
from kernel_cases import TINY, Case, Setting, gpu_setting, run_case  # noqa: E402
from records import Child  # noqa: E402
from timing import Ceilings, GraphStopwatch, Result, describe_machine, gpu_state, measure_ceilings  # noqa: E402
from workload import Tokens  # noqa: E402

QUICK = {"laps": 3, "lap_seconds": 1e-4, "max_seconds": 0.05}
# On a GPU: a fifth of a second a variant is enough for a median, and there are hundreds.
BRIEF = {"laps": 11, "lap_seconds": 3e-3, "max_seconds": 0.5}
# Row ranges that end inside tiles, few enough rows for a tool that slows everything down a hundredfold.
SMALL = Tokens("small", (3, 6, 10), 37, 5)
# torch's compiler takes longer than everything else here; the libraries' own kernels are the baselines.
SLOW_VARIANTS = ("compiled", "keys repeated", "PyTorch", "per window")
Builder = Callable[[Setting], Iterator[Case]]


def setting_of(child: Child, size: str) -> Setting:
    return gpu_setting(size) if child.on_gpu else TINY


# --- facts and ceilings -------------------------------------------------------------------------------------------


def facts(child: Child) -> None:
    """The machine, and which tools and packages are there."""
    if not child.begin("machine"):
        return
    if child.on_gpu:
        torch.zeros(1, device="cuda")
    child.add("fact", {"machine": describe_machine()})
    names = ("nvcc", "ncu", "compute-sanitizer", "cuda-gdb", "nvidia-smi", "cuobjdump")
    tools = {name: gpu_kit.cuda_tool(name) for name in names}
    packages = {d.metadata["Name"]: d.version for d in distributions()}
    wanted = ("torch", "numpy", "pytest", "pybind11", "triton", "transformers", "diffusers", "safetensors")
    child.add("fact", {"tools": tools, "packages": {name: packages.get(name) for name in wanted}})
    child.add("fact", {"system": platform.platform(), "cores": os.cpu_count()})
    child.end("machine")


def ceilings(child: Child) -> None:
    """Copy, matrix product, and what L2 gives when all multiprocessors ask."""
    if child.begin("copy and product"):
        found = measure_ceilings(child.device)
        child.add("ceilings", {**dataclasses.asdict(found), "state": gpu_state()})
        print(found, flush=True)
        child.end("copy and product")
    if child.on_gpu and child.begin("L2"):
        with tempfile.TemporaryDirectory() as folder:
            child.add("fact", {"l2": l2_throughput(probe_library(Path(folder)))})
        child.end("L2")


def ceilings_of(child: Child) -> Ceilings:
    """The run's, or where it has none, measured now."""
    known = child.ceilings()
    if known is None:
        return measure_ceilings(child.device)
    return Ceilings(*(known[field.name] for field in dataclasses.fields(Ceilings)))


def probe_library(folder: Path) -> Path:
    """The kit's probe of L2, or without a kit one compiled into `folder`."""
    probe = gpu_kit.KIT / gpu_kit.PROBE
    if not probe.is_file():
        probe = folder / gpu_kit.PROBE
        subprocess.run(list(map(str, gpu_kit.probe_command(probe))), check=True)
    return probe


def l2_throughput(library: Path) -> list[dict[str, float]]:
    """Bytes a second for buffers of some sizes, of which the last does not fit."""
    functions = ctypes.CDLL(str(library))
    functions.l2_read_bytes.restype = ctypes.c_int64
    blocks = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    found = []
    for megabytes in (9, 18, 27, 36, 512):
        nbytes = ctypes.c_int64(megabytes << 20)
        rounds = 4096 // megabytes
        data = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8, device="cuda")

        def launch(data: torch.Tensor = data, nbytes: ctypes.c_int64 = nbytes, rounds: int = rounds) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            pointers = (ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr()))
            status = functions.l2_read_launch(pointers[0], nbytes, rounds, pointers[1], blocks, stream)
            if status:
                raise RuntimeError(f"the L2 probe: CUDA error {status}")

        launch()
        lap = GraphStopwatch().prepare(launch)
        seconds = sorted(lap() for _ in range(7))[3]
        read = functions.l2_read_bytes(nbytes, rounds, blocks)
        found.append({"megabytes": megabytes, "bytes_per_second": read / seconds})
        print(f"L2, {megabytes} MiB: {read / seconds / 1e12:.2f} TB/s", flush=True)
    return found


# --- timings ------------------------------------------------------------------------------------------------------


def timed(
    child: Child, builders: Sequence[Builder], size: str, other: Path | None = None, *, slow: bool = False
) -> None:
    """Every case's kernel, its compiled tiles and the libraries' kernels, beside this run's ceilings.

    `other`: a folder with another build of the kernels and their binding, which is timed instead, by itself. `slow`:
    what torch compiles too.
    """
    s = setting_of(child, size)
    if other is not None and child.on_gpu:
        load_kernels(other)
    limits = ceilings_of(child)
    # On a GPU the state, at both ends: clocks may fall meanwhile.
    child.add("fact", {"state": gpu_state()})
    found: list[Result] = []

    def keep(result: Result) -> None:
        found.append(result)
        child.result(result)

    cases = (case for build in builders for case in build(s))
    for case in cases if slow else quick_variants(cases):
        step = f"{case.op} ({case.shape})"
        if other is not None:
            subject = dataclasses.replace(case.variants[0], name=f"kernel, {other.name}")
            case = dataclasses.replace(case, variants=(subject,))
        if child.begin(step):
            options: dict[str, Any] = dict(BRIEF if child.on_gpu else QUICK)
            run_case(case, child.device, limits, keep, failing(child), at_once=child.record, **options)
            child.end(step)
    for result in baseline_cases.extrapolated_step(found, s.clip.name):
        child.result(result)
    child.add("fact", {"state": gpu_state()})


def cutlass(child: Child) -> None:
    """CUTLASS's own collective product at the model's shapes, from a kit that holds it."""
    if not child.begin("CUTLASS"):
        return
    if child.on_gpu:
        library = gpu_kit.KIT / gpu_kit.CUTLASS
        if not library.is_file():
            raise SystemExit(f"the kit holds no {library.name}: bench/gpu_kit.py --cutlass")
        limits = ceilings_of(child)
        for case in cutlass_baseline.cases(gpu_setting("256p"), library):
            run_case(case, child.device, limits, child.result, failing(child), **BRIEF)
    child.end("CUTLASS")


def load_kernels(folder: Path) -> None:
    """Take the kernels' module from a folder instead of the package's, where none is loaded yet."""
    name = "magihuman_fast.kernels._C"
    assert name not in sys.modules
    spec = importlib.util.spec_from_file_location(name, next(folder.glob("_C.*.so")))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def quick_variants(cases: Iterable[Case]) -> Iterator[Case]:
    for case in cases:
        subject, *others = case.variants
        kept = [v for v in others if not any(word in v.name for word in SLOW_VARIANTS)]
        yield dataclasses.replace(case, variants=(subject, *kept))


def failing(child: Child) -> Callable[[str, str, str, Exception], None]:
    """Record an error; where the device answers no more, leave."""

    def fail(op: str, shape: str, variant: str, error: Exception) -> None:
        child.error(op, shape, variant, error)
        if child.on_gpu:
            torch.cuda.synchronize()  # raises where a kernel has broken the context: the child ends in this step

    return fail


# --- models -------------------------------------------------------------------------------------------------------


def step(child: Child, size: str) -> None:
    """One captured step, kernel by kernel."""
    import bench_step

    if not child.begin(f"step {size}"):
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        bench_step.main(["--clip", size, "--out", str(out)])
        child.add("fact", {f"step {size}": json.loads(out.read_text(encoding="utf-8"))})
    child.end(f"step {size}")


def clip(child: Child, preset: str, runs: int = 3) -> None:
    """Whole clips: load, set-up, a first one and `runs` warm ones; no baseline, no fresh processes."""
    from magihuman_fast.cli import benchmark

    size = "full" if child.on_gpu else "tiny"
    setting = benchmark.Setting((preset,), size=size, runs=runs, baseline=False, cold=False)
    if not child.begin(f"clip {preset}"):
        return
    for found in benchmark.measure(setting, lambda text: print(text, flush=True)):
        child.add("fact", {f"clip {preset}": dataclasses.asdict(found)})
    child.end(f"clip {preset}")


def decoder_quality(child: Child, size: str, latent_frames: int) -> None:
    """The decoder's frames against float32."""
    if not child.begin(f"decoder {size}"):
        return
    s = setting_of(child, size)
    found = decoder_cases.decoder_quality(s, latent_frames if child.on_gpu else 2)
    child.add("fact", {f"decoder, {size}": found})
    child.end(f"decoder {size}")


def self_check(child: Child) -> None:
    """The package's own check of its kernels, as a user runs it; its answer is kept for what comes after."""
    if not child.begin("info --check"):
        return
    words = [sys.executable, "-m", "magihuman_fast", "info", "--json", *(["--check"] if child.on_gpu else [])]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    child.add("fact", {"info": json.loads(done.stdout)})
    if done.returncode:
        raise SystemExit(f"info --check: exit code {done.returncode}")
    child.end("info --check")


# --- tools that watch a process -----------------------------------------------------------------------------------


def command(words: Sequence[str | Path], **environment: str) -> int:
    """Run a command from the repository's root, its output shown."""
    print("running", *words, flush=True)
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=os.environ | environment).returncode


def sanitize(child: Child, name: str) -> None:
    """compute-sanitizer over one launch of every operation."""
    if not child.begin(name):
        return
    if not child.on_gpu:
        small_operations("cpu")
        child.add("fact", {name: "not run: no GPU"})
        child.end(name)
        return
    program = gpu_kit.cuda_tool("compute-sanitizer")
    if program is None:
        raise SystemExit("compute-sanitizer is not installed")
    words = [program, "--tool", name, "--error-exitcode", "99", "--print-limit", "20"]
    words += [sys.executable, __file__, "small-operations"]
    # Without torch's own allocator in between, the tool sees where each tensor ends.
    code = command(words, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    child.add("fact", {name: "clean" if code == 0 else f"exit code {code}"})
    child.end(name)
    if code:
        raise SystemExit(code)


SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "SchedulerStats")


def counters(child: Child, op: str) -> None:
    """What a kernel's warps wait for, by Nsight Compute's counters; clocks are left as they are."""
    if not child.begin(f"counters {op}"):
        return
    if not child.on_gpu:
        launch_twice(op, "cpu")
        child.add("fact", {f"counters {op}": "not run: no GPU"})
        child.end(f"counters {op}")
        return
    program = gpu_kit.cuda_tool("ncu")
    if program is None:
        raise SystemExit("ncu is not installed")
    words = [program, "--clock-control", "none", "--target-processes", "application-only"]
    words += ["--kernel-name", f"regex:{COUNTED[op]}", "--launch-skip", "1", "--launch-count", "1"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    words += ["--print-details", "all", sys.executable, __file__, op]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"ncu: exit code {done.returncode}")
    rows = [line.strip() for line in done.stdout.splitlines() if line.strip() and not line.startswith("==")]
    child.add("fact", {f"counters {op}": rows})
    child.end(f"counters {op}")


# Operations whose counters are read, and what their kernels are called.
COUNTED = {"gemm": "gemm_sm90", "gated_attention": "gated_attention_sm90", "conv_3x3": "conv_sm90"}


def launch_twice(op: str, device: str) -> None:
    """One of `COUNTED` at its largest 256p shape, or at a toy's."""
    s = gpu_setting("256p") if device == "cuda" else TINY
    if op == "conv_3x3":
        cases = (case for case in decoder_cases.decoder_layer_cases(s) if case.op == op)
    elif op == "gemm":
        cases = kernel_cases.gemm_cases(s)
    else:
        cases = gated_attention_cases.attention_cases(s)
    call = max(cases, key=lambda case: case.flops).variants[0].make()
    for _ in range(2):
        call()
    if device == "cuda":
        torch.cuda.synchronize()


ATTENTION, WINDOW = gated_attention_cases.attention_cases, gated_attention_cases.window_attention_cases
LAYERS_OF_DECODER = decoder_cases.decoder_layer_cases


def small_operations(device: str) -> None:
    """Launch every operation once on a small problem; for tools that watch the launches.

    Products, attention and convolutions again on two multiprocessors, where each block has more than one tile to do.
    """
    backend: Any = "gpu" if device == "cuda" else "reference"
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


if __name__ == "__main__":
    if sys.argv[1] == "small-operations":
        small_operations("cuda")
    else:
        launch_twice(sys.argv[1], "cuda")
