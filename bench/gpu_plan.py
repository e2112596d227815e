"""What `gpu_check.py` runs, in which order, within how many seconds. CONTRIBUTING.md shows the same as a table.

The most important first: facts, then each kernel alone in each compiled tile, then what is made of kernels, then speed.
What time cuts off is cut off from the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import baseline_cases
import decoder_cases
import gpu_groups
import kernel_cases
import watched_tests
from gpu_groups import ATTENTION, LAYERS_OF_DECODER, WINDOW
from magihuman_fast.kernels.attention import TILES
from records import Child
from watched_tests import TESTS

BUDGET = 540  # seconds of a run
# Where a kernel was wrong, what is made of it need not be timed: the machine is given back for mending.
FAULTY_BUDGET = 260


@dataclass(frozen=True)
class Group:
    """A part of the run: a forked child with a limit, and another one behind whatever the first did not survive.

    stall: seconds without a word after which a child counts as hung; 0: all that it has. dumps: ask a hanging kernel
    for a core (which slows launches down: not where speed is measured).
    """

    name: str
    seconds: float
    what: str
    work: Callable[[Child], None]
    stall: float = 0
    dumps: bool = False


@dataclass(frozen=True)
class Tests:
    """Those tests on a GPU, of some files, whose ids match `gpu`; in a rehearsal those in the simulator that match
    `sim`, by default none."""

    files: str
    gpu: str
    sim: str = r"(?!)"

    def __call__(self, child: Child) -> None:
        select, marker = (self.gpu, "gpu") if child.on_gpu else (self.sim, "not gpu")
        watched_tests.run(child, self.paths(), select, marker)

    def paths(self) -> list[Path]:
        return [next(TESTS.rglob(f"test_{name}.py")) for name in self.files.split()]


def checked(
    name: str, seconds: float, what: str, files: str, gpu: str, sim: str = r"(?!)", stall: float = 6
) -> Group:
    return Group(name, seconds, what, Tests(files, gpu, sim), stall, dumps=True)


def timed(name: str, seconds: float, what: str, *builders: gpu_groups.Builder, slow: bool = False) -> Group:
    size = name.rsplit("-", 1)[1]
    return Group(name, seconds, what, partial(gpu_groups.timed, builders=builders, size=size, slow=slow))


def attention_alone(tile: str) -> Group:
    name = "attention-" + re.sub(r"\W+", "-", tile)
    select = (
        rf"test_(edge_cases|many_units_a_block|every_tile_at_the_models_size)\[(.*-)?{re.escape(tile)}(-|\])"
    )
    return checked(name, 12, f"attention in tiles of {tile}", "attention_gpu", select)


def conv_alone(tile: str) -> Group:
    select = rf"test_every_tile_on_a_gpu\[.*-{tile}-"
    return checked(f"conv-{tile}", 12, f"convolutions in the tile '{tile}'", "conv", select)


PRODUCTS = (kernel_cases.gemm_cases, kernel_cases.fused_cases)
WINDOWS_OF_DECODER = (decoder_cases.decode_clip_cases, decoder_cases.decode_window_cases)
LAYERS = (baseline_cases.padding_cases, baseline_cases.layer_cases)
POINTWISE = (
    r"test_pointwise.py|gpu_kernels.py::test_((rms_norm|embed|head|updates)\[.*256p|embed_text|advance_step)"
)

PLAN = (
    Group("facts", 5, "machine, tools, packages", gpu_groups.facts),
    Group("ceilings", 6, "copy, matrix product, L2", gpu_groups.ceilings),
    checked(
        "pointwise",
        12,
        "norms, embedders, head, sampler updates",
        "pointwise gpu_kernels",
        POINTWISE,
        "test_rms_norm.*sim",
    ),
    checked(
        "gemm-square",
        12,
        "products in tiles of 128x128",
        "gemm_gpu gemm",
        r"test_gemm_gpu.py::test_\w+\[.*square|_square\[",
        "test_gemm.py.*square",
    ),
    checked(
        "gemm-wide", 12, "products in tiles of 128x256, pairs", "gemm_gpu", r"test_edge_cases\[.*wide|_wide\["
    ),
    *map(attention_alone, TILES),
    *map(conv_alone, ("square", "tall", "pair")),
    checked(
        "conv-others",
        12,
        "picture, channel norm, latents, phases",
        "conv",
        r"test_(picture|channel_norm|latent_pixels|four_phases)",
        r"test_channel_norm\[.*sim|test_channel_norm\[sim",
    ),
    Group("self-check", 30, "info --check, as a user runs it", gpu_groups.self_check),
    checked(
        "self-check-tests",
        15,
        "the same check's cases, and a child of its own",
        "kernel_check kernel_trust",
        r"gpu",
        stall=15,
    ),
    checked(
        "toy-models",
        28,
        "golden models and runs, replay against eager, streams",
        "ops kernel_dit step_graph turbo_vae_kernels gpu_context streams engine turbo_vae_gpu engine_gpu",
        r"test_(ops|kernel_dit|step_graph|turbo_vae_kernels|gpu_context|streams|engine)\.py"
        r"|captured_windows|changing_streams|work_beside",
        r"test_forward\[.*sim.*a_v2",
        stall=20,  # one of them imports diffusers
    ),
    checked(
        "products-right-256p",
        10,
        "every product at 256p; capture; rows left alone",
        "gpu_kernels",
        r"test_products\[.*256p|test_rows_beyond|test_captured_products",
        stall=10,
    ),
    checked(
        "attention-right-256p",
        8,
        "attention at 256p and its extremes",
        "attention_gpu",
        r"test_(model_sizes\[256p|without_offsets|nan_stays|offsets_that|without_text|extreme|captured)",
    ),
    checked(
        "decoder-right-256p",
        12,
        "every layer, window and clip of the decoder at 256p",
        "turbo_vae_gpu",
        r"test_layers_on_a_gpu\[256p|test_parity_on_a_gpu\[256p|test_a_captured_window",
        stall=10,
    ),
    checked(
        "model-256p",
        12,
        "the whole model at 256p: two prompts, replay against eager",
        "engine_gpu",
        r"test_any_text_on_one_graph\[(.*-)?256p.*distilled|test_any_text_on_one_graph\[distilled.*256p",
        r"test_any_text_on_one_graph\[.*distilled",
        stall=12,
    ),
    Group("step-256p", 15, "one step at 256p, kernel by kernel", partial(gpu_groups.step, size="256p")),
    timed("products-256p", 8, "products at 256p, and cuBLAS", *PRODUCTS),
    timed("attention-256p", 5, "attention at 256p, its tiles, cuDNN", ATTENTION),
    timed(
        "decoder-256p",
        20,
        "a decode window, a clip, every layer, and cuDNN",
        *WINDOWS_OF_DECODER,
        LAYERS_OF_DECODER,
    ),
    timed("pointwise-256p", 5, "norms, embedders, head, updates at 256p", kernel_cases.pointwise_cases),
    checked(
        "products-right-1080p",
        12,
        "every product at 1080p",
        "gpu_kernels",
        r"test_products\[.*1080p",
        stall=10,
    ),
    checked(
        "attention-right-1080p",
        12,
        "attention at 1080p, full and within the window",
        "attention_gpu",
        r"test_model_sizes\[1080p",
        stall=10,
    ),
    checked(
        "decoder-right-1080p",
        24,
        "the decoder at 1080p, and its memory",
        "turbo_vae_gpu",
        r"test_layers_on_a_gpu\[1080p|test_parity_on_a_gpu\[1080p|test_peak_memory",
        stall=20,
    ),
    Group("clip-256p", 37, "whole clips of 256p", partial(gpu_groups.clip, preset="256p")),
    timed("products-1080p", 20, "products at 1080p, and cuBLAS", *PRODUCTS),
    timed("attention-1080p", 28, "attention at 1080p, full and within the window", ATTENTION, WINDOW),
    timed("decoder-1080p", 31, "a clip's decode at 1080p, a window, and cuDNN's", *WINDOWS_OF_DECODER),
    checked(
        "drift",
        35,
        "8 steps against float32",
        "engine_gpu",
        r"test_drift_of_a_whole_run\[(.*-)?256p",
        stall=35,
    ),
    Group("counters-gemm", 10, "what a product's warps wait for", partial(gpu_groups.counters, op="gemm")),
    Group(
        "counters-attention",
        10,
        "what attention's warps wait for",
        partial(gpu_groups.counters, op="gated_attention"),
    ),
    Group(
        "counters-conv",
        10,
        "what a convolution's warps wait for",
        partial(gpu_groups.counters, op="conv_3x3"),
    ),
    Group(
        "memcheck",
        12,
        "compute-sanitizer memcheck, every operation once",
        partial(gpu_groups.sanitize, name="memcheck"),
    ),
)
# For a second call, where all of that is green.
SECOND = (
    Group("facts", 5, "machine, tools, packages", gpu_groups.facts),
    Group("ceilings", 6, "copy, matrix product, L2", gpu_groups.ceilings),
    Group("clip-1080p", 110, "whole clips of 1080p", partial(gpu_groups.clip, preset="1080p", runs=1)),
    Group("step-1080p", 25, "one step at 1080p, kernel by kernel", partial(gpu_groups.step, size="1080p")),
    Group("clip-540p", 45, "whole clips of 540p", partial(gpu_groups.clip, preset="540p", runs=1)),
    timed("products-540p", 20, "products at 540p, and cuBLAS", *PRODUCTS),
    timed("attention-540p", 12, "attention at 540p, its tiles, cuDNN", ATTENTION),
    timed("decoder-540p", 20, "a clip's decode at 540p, a window, and cuDNN's", *WINDOWS_OF_DECODER),
    Group(
        "racecheck",
        60,
        "compute-sanitizer racecheck, every operation once",
        partial(gpu_groups.sanitize, name="racecheck"),
    ),
    Group(
        "synccheck",
        60,
        "compute-sanitizer synccheck, every operation once",
        partial(gpu_groups.sanitize, name="synccheck"),
    ),
    checked(
        "others",
        90,
        "540p, 1080p norms, memory as planned, many clips, threads",
        "engine_gpu gpu_kernels attention_gpu turbo_vae_gpu",
        r"\[.*540p|test_(rms_norm|embed|head|updates)\[.*1080p|windowed|test_(memory_is|many_clips|two_threads)",
        stall=90,
    ),
)
# What the kernels are compared with where torch's compiler takes part, which takes longer than all else.
BASELINES = (
    Group("facts", 5, "machine, tools, packages", gpu_groups.facts),
    Group("ceilings", 6, "copy, matrix product, L2", gpu_groups.ceilings),
    timed(
        "products-compiled-256p", 150, "products beside cuBLAS and compiled epilogues", *PRODUCTS, slow=True
    ),
    timed(
        "attention-compiled-256p", 40, "attention beside torch's with a compiled gate", ATTENTION, slow=True
    ),
    timed("decoder-compiled-256p", 120, "the decoder beside cuDNN, compiled", *WINDOWS_OF_DECODER, slow=True),
    timed(
        "layers-256p",
        90,
        "layers of the plain model, compiled; cuBLAS with and without padding",
        *LAYERS,
        slow=True,
    ),
    Group("cutlass-256p", 30, "CUTLASS's collective product", gpu_groups.cutlass),
    Group(
        "decoder-quality-1080p",
        40,
        "error, PSNR and memory of the decoder",
        partial(gpu_groups.decoder_quality, size="1080p", latent_frames=7),
    ),
)
PLANS = {"first": PLAN, "second": SECOND, "baselines": BASELINES}


def beside(plan: tuple[Group, ...], folder: Path) -> tuple[Group, ...]:
    """The plan with another build of the kernels timed right after its own, at 256p."""
    found: list[Group] = []
    for group in plan:
        found.append(group)
        if (
            isinstance(group.work, partial)
            and group.work.func is gpu_groups.timed
            and group.name.endswith("-256p")
        ):
            work = partial(group.work, other=folder)
            found.append(
                replace(
                    group, name=f"{group.name}-{folder.name}", what=f"{group.what}: {folder.name}", work=work
                )
            )
    return tuple(found)


def test_files(plan: tuple[Group, ...]) -> list[Path]:
    """Every file of tests that a plan runs, once."""
    return list(
        dict.fromkeys(path for group in plan if isinstance(group.work, Tests) for path in group.work.paths())
    )


def table(plan: tuple[Group, ...] = PLAN) -> str:
    """The plan in Markdown."""
    lines = ["| group | seconds at most | what |", "|---|---|---|"]
    return "\n".join(lines + [f"| {g.name} | {g.seconds:g} | {g.what} |" for g in plan])
