"""The choice of the convolutions' tiles, and bugs planted in them, which the simulator or a comparison must find."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from conv_cases import (
    EPS,
    FORMS,
    SIZES,
    TILE_CASES,
    TILES,
    Problem,
    check,
    edge_case,
    make_problem,
    outputs_of,
    sizes_on_all,
)
from magihuman_fast.kernels.self_check.cases import CASES
from magihuman_fast.kernels.self_check.comparison import IN_SIMULATOR, ON_GPU
from magihuman_fast.model.turbo_vae import plan_windows
from magihuman_fast.model.turbo_vae_config import TurboVAEConfig
from magihuman_fast.runtime.decode_plan import Step
from magihuman_fast.runtime.turbo_vae import window_plan
from sim_library import TEXT, build_library

TALL, PAIR, SQUARE = (
    "64 channels x 512 pixels",
    "128 pixels x 256 channels, pairs",
    "256 pixels x 128 channels",
)
NAMES = {"tall": TALL, "pair": PAIR, "square": SQUARE}  # in the library's order
BUGS = (
    "none",
    "no weight wait",
    "early pixel release",
    "early weight release",
    "no peer release",
    "no drain",
    "no turn wait",
    "no clamp",
    "stores beyond edge",
)
LATENTS = {"256p": (16, 28), "540p": (34, 60), "1080p": (68, 120)}


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """csrc/conv/tests/sim_library.cpp with the simulator."""
    return build_library("conv")


def verdicts(
    library: ctypes.CDLL,
    size: tuple[int, int, int],
    channels: int,
    *,
    phases: int = 1,
    taps_y: int = 3,
    norm: bool = True,
    num_sms: int = 132,
) -> list[str]:
    text = ctypes.create_string_buffer(TEXT)
    library.conv_tile_verdicts(*size, channels, phases, taps_y, int(norm), num_sms, text)
    return text.value.decode().splitlines()


def chosen(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("* ")]
    return line[2:].split(":")[0]


def of_step(library: ctypes.CDLL, step: Step) -> list[str]:
    kind = "conv_3x3" if step.op == "conv_picture" else step.op
    taps_y, _, _, _, phases = FORMS[kind]
    norm = step.normed is not None or step.out_eps > 0
    size = (step.count, *step.x.shape[1:3])
    return verdicts(library, size, step.channels, phases=phases, taps_y=taps_y, norm=norm)


@pytest.mark.parametrize("size", LATENTS)
def test_tiles_of_the_published_decoder(library: ctypes.CDLL, size: str) -> None:
    """Every launch of a window in the middle gets the tile that its channels ask for, at every published size."""
    window = plan_windows(32, 7, 7)[1]
    for step in window_plan(TurboVAEConfig(), window, *LATENTS[size]):
        if not step.op.startswith("conv_") or step.op == "conv_picture":
            continue
        lines = of_step(library, step)
        assert len(lines) == 3
        reasons = r" rounds of | in one tile$| not compiled for | would fetch the pixels anew$"
        assert all(re.search(reasons, line) for line in lines)
        if step.channels >= 256:
            # Little work, or no rows to share between products: smaller tiles may fill the last round better.
            assert chosen(lines) == PAIR or step.op == "conv_1x1" or step.flops < 3e11, (step, lines)
        elif step.channels == 128:
            assert chosen(lines) == SQUARE
        else:
            assert chosen(lines) in ((TALL,) if step.op == "conv_3x3" else (SQUARE,))


def test_what_bounds_a_tile(library: ctypes.CDLL) -> None:
    # 36 frames of 64 x 112 pixels, 256 channels: 4032 units, so 1008 tiles of pairs.
    lines = verdicts(library, (36, 64, 112), 256)
    assert "16 rounds of 66 for 1008 tiles, bound by products: 49152 clocks per box" in lines[1]
    assert lines[2].endswith("the norm needs all 256 channels in one tile")
    # 64 channels as rows of products of 256 pixels: 80 bytes of shared memory a clock, and 30 that arrive.
    lines = verdicts(library, (36, 128, 224), 64)
    assert "16 rounds of 132 for 2016 tiles, bound by products: 49152 clocks per box" in lines[0]
    assert chosen(lines) == TALL
    assert verdicts(library, (1, 8, 8), 64, taps_y=2)[0].endswith("not compiled for 2 vertical taps")
    assert verdicts(library, (1, 8, 8), 256, num_sms=1)[1].endswith("needs 2 multiprocessors, the grid has 1")
    # Then nothing is left that could normalise 256 channels.
    assert not [line for line in verdicts(library, (1, 8, 8), 256, num_sms=1) if line.startswith("*")]


def test_cases_run_with_the_tile_they_are_meant_for(library: ctypes.CDLL) -> None:
    for kind in FORMS:
        for tile, name in NAMES.items():
            if tile == "tall" and kind not in ("conv_3x3", "conv_frame"):
                continue
            for index in range(len(SIZES)):
                p = edge_case(kind, "normed", tile, index)
                taps_y, _, _, _, phases = FORMS[kind]
                size = (p.count, *p.size[1:])
                options = {"phases": phases, "taps_y": taps_y, "num_sms": TILES[tile][1]}
                lines = verdicts(library, size, p.channels, **options)
                assert chosen(lines) == name, (kind, tile, index, lines)


def test_cases_on_all_multiprocessors_run_with_their_tile(library: ctypes.CDLL) -> None:
    for kind, ending, tile in TILE_CASES:
        for index in sizes_on_all(tile):
            p = edge_case(kind, ending, tile, index)
            taps_y, _, _, _, phases = FORMS[kind]
            norm = "normed" in p.options or "out_eps" in p.options
            options = {"phases": phases, "taps_y": taps_y, "norm": norm, "num_sms": 132}
            lines = verdicts(library, (p.count, *p.size[1:]), p.channels, **options)
            assert chosen(lines) == NAMES[tile], (kind, ending, tile, index, lines)


@pytest.mark.parametrize("num_sms", [78, 114, 132])
def test_kernel_checks_run_with_the_tile_they_name(library: ctypes.CDLL, num_sms: int) -> None:
    for sizes in (IN_SIMULATOR, ON_GPU):
        for case in CASES.values():
            if case.tile not in NAMES.values():
                continue
            channels, sms = sizes.convolutions[case.tile]
            taps_y, _, _, _, phases = FORMS[case.operation]
            options = {"phases": phases, "taps_y": taps_y, "norm": case.form != "raw"}
            lines = verdicts(library, sizes.pixels, channels, **options, num_sms=sms or num_sms)
            assert chosen(lines) == case.tile, (case.name, lines)


def test_shared_memory_is_as_planned(library: ctypes.CDLL) -> None:
    """Boxes of unit_rows + taps_y - 1 rows of 1 KB, weights of 128 bytes a channel, 32 KB of staging, 16 bytes a stage;
    where roles are swapped, 8 KB a warpgroup to turn pixels."""
    kb = 1024
    planned = {
        (3, 0): (2 * 2 * 34, 5 * 8 + 2 * 8, 7),
        (3, 1): (3 * 2 * 10, 4 * 32, 7),
        (3, 2): (2 * 4 * 10, 6 * 16, 8),
        (2, 1): (3 * 2 * 9, 4 * 32, 7),
        (2, 2): (3 * 4 * 9, 5 * 16, 8),
        (1, 1): (4 * 2 * 8, 4 * 32, 8),
        (1, 2): (4 * 4 * 8, 4 * 16, 8),
    }
    for (taps_y, tile), (pixels, weights, stages) in planned.items():
        wanted = (pixels + weights + 32) * kb + 16 * stages
        assert library.conv_shared_bytes(taps_y, tile) == wanted <= 232448


class PixelFrames(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("frames", ctypes.c_int))


class Conv3x3Params(ctypes.Structure):
    """As in api.h, with the fields of its ConvParams first."""

    _fields_ = (
        ("x", PixelFrames),
        *((name, ctypes.c_int) for name in ("height", "width", "in_channels", "length", "first", "count")),
        ("w", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("channels", ctypes.c_int),
        ("shortcut", PixelFrames),
        ("out", PixelFrames),
        ("normed", PixelFrames),
        ("out_eps", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("activation", ctypes.c_int),
        ("num_sms", ctypes.c_int),
        ("time_taps", ctypes.c_int),
    )


def run_broken(
    library: ctypes.CDLL, bug: str, tile: str, p: Problem, seed: int
) -> dict[str, torch.Tensor] | str:
    """The output, or the simulator's message."""
    out, t = outputs_of(p), p.tensors

    def frames(tensor: torch.Tensor | None) -> PixelFrames:
        return PixelFrames() if tensor is None else PixelFrames(tensor.data_ptr(), len(tensor))

    params = Conv3x3Params(
        frames(t["x"]),
        *p.size[1:],
        p.in_channels,
        p.size[0],
        p.first,
        p.count,
        t["w"].data_ptr(),
        t["bias"].data_ptr(),
    )
    params.channels, params.out, params.normed = p.channels, frames(out.get("out")), frames(out.get("normed"))
    params.eps, params.activation, params.num_sms, params.time_taps = EPS, 1, p.num_sms, 3
    error = ctypes.create_string_buffer(TEXT)
    for name, tensor in {**t, **out}.items():
        library.sim_register(
            ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), name.encode()
        )
    arguments = (BUGS.index(bug), list(NAMES).index(tile), ctypes.byref(params), ctypes.c_uint64(seed), error)
    failed = library.sim_broken_conv(*arguments)
    library.sim_clear()
    return error.value.decode() if failed else out


@pytest.mark.parametrize("tile", TILES)
def test_nothing_is_found_without_a_bug(library: ctypes.CDLL, tile: str) -> None:
    for seed in range(8):
        problem = make_problem("conv_3x3", "normed", (2, 9, 10), 72, TILES[tile][0], num_sms=2)
        out = run_broken(library, "none", tile, problem, seed)
        assert isinstance(out, dict), out
        check(problem, out)


# The first is the mistake itself, the others its consequences.
EARLY = ("early overwrite", "read before arrival", "phase overrun", "deadlock")


@pytest.mark.parametrize(
    ("bug", "tile", "kinds"),
    [
        ("no weight wait", "pair", ("read before arrival", "un-waited work", "phase overrun", "deadlock")),
        ("no weight wait", "tall", ("read before arrival", "un-waited work", "phase overrun", "deadlock")),
        ("early pixel release", "pair", EARLY),
        ("early pixel release", "square", EARLY),
        ("early weight release", "pair", EARLY),
        ("early weight release", "tall", EARLY),
        ("no peer release", "pair", ("deadlock", "early overwrite")),
        ("no drain", "pair", ("block ended",)),
    ],
)
def test_planted_bug_is_found(library: ctypes.CDLL, bug: str, tile: str, kinds: tuple[str, ...]) -> None:
    problem = make_problem("conv_3x3", "normed", (3, 17, 9), 136, TILES[tile][0], num_sms=2)
    found = [run_broken(library, bug, tile, problem, seed) for seed in range(12)]
    messages = [message for message in found if isinstance(message, str)]
    assert any(message.startswith(kinds[0]) for message in messages), messages
    for message in messages:
        assert message.startswith(kinds), message
        assert "kernel conv_3x3" in message


def test_pixels_must_not_be_read_before_they_are_turned(library: ctypes.CDLL) -> None:
    problem = make_problem("conv_3x3", "normed", (1, 33, 9), 16, 56, num_sms=2)

    def is_found(seed: int) -> bool:
        out = run_broken(library, "no turn wait", "tall", problem, seed)
        if isinstance(out, str):
            assert out.startswith("read before arrival"), out
            return True
        try:
            check(problem, out)
        except AssertionError:
            return True
        return False

    assert any(is_found(seed) for seed in range(12))


def test_frames_beyond_the_clip_must_be_its_ends(library: ctypes.CDLL) -> None:
    problem = make_problem("conv_3x3", "normed", (3, 8, 8), 16, 56)
    out = run_broken(library, "no clamp", "tall", problem, 0)
    assert isinstance(out, dict), out
    with pytest.raises(AssertionError):
        check(problem, out)


def test_pixels_beyond_the_edge_must_not_be_stored(library: ctypes.CDLL) -> None:
    problem = make_problem("conv_3x3", "normed", (2, 5, 11), 16, 56)
    out = run_broken(library, "stores beyond edge", "tall", problem, 0)
    if isinstance(out, dict):
        with pytest.raises(AssertionError):
            check(problem, out)
    else:
        assert out.startswith("out of bounds"), out
