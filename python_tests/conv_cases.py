"""The convolutions for tests: problems with random data, their float64 result, and the call through a backend.

Outputs are NaN beforehand and a frame longer than the clip, so that whatever is not written, or is written too far,
shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from magihuman_fast.kernels import ops
from mismatch import (
    Facts,
    outcomes,
    require_at_most,
    require_close,
    require_equal,
    require_finite,
    rounding_bound,
)

EPS, PLAIN_EPS = 1e-8, 1e-6
SPARE_FRAMES = 1
# Vertical, horizontal and time taps, the first tap's offset in space, phases.
FORMS: dict[str, tuple[int, int, int, int, int]] = {
    "conv_3x3": (3, 3, 3, -1, 1),
    "conv_frame": (3, 3, 1, -1, 1),  # conv_3x3 with one time tap
    "conv_1x1": (1, 1, 1, 0, 1),
    "conv_upsample": (2, 2, 1, -1, 4),
    "conv_time": (1, 1, 3, 0, 2),
}
# What the epilogue does: its options, and how many outputs it has.
ENDINGS: dict[str, dict[str, Any]] = {
    "raw": {"out": True},
    "normed": {"normed": True, "activation": "silu"},
    "shortcut": {"shortcut": True, "out": True, "normed": True, "activation": "relu"},
    "plain": {"shortcut": True, "out": True, "out_eps": PLAIN_EPS, "normed": True, "activation": "silu"},
    "bare": {"out": True, "normed": True, "activation": "none"},
}
# Tiles by their output channels, with multiprocessors that get them (test_conv_tiles.py holds the choice to it).
TILES = {"pair": (200, 2), "square": (104, 1), "tall": (56, 4)}

# Frames, height, width; channels of the input; the first frame and how many are computed (0: all from there on).
# Units have 8 x 8 or 8 x 32 pixels and blocks 2 or 4 of them, boxes 64 channels; rings have 2 to 6 stages.
SIZES: tuple[tuple[tuple[int, int, int], int, tuple[int, int]], ...] = (
    ((1, 1, 1), 8, (0, 0)),
    ((1, 3, 5), 48, (0, 0)),
    ((2, 8, 8), 64, (0, 0)),
    ((3, 9, 17), 72, (0, 0)),
    ((5, 7, 2), 16, (1, 3)),
    ((2, 17, 8), 136, (1, 0)),
    ((4, 1, 33), 8, (3, 1)),
    ((1, 41, 3), 24, (0, 0)),
)
# Enough of them for 132 multiprocessors: fewer than 67 tiles, and pairs cost no more than square tiles on all of them.
LARGE_SIZES: tuple[tuple[tuple[int, int, int], int, tuple[int, int]], ...] = (
    ((3, 77, 75), 72, (0, 0)),
    ((5, 73, 75), 136, (1, 3)),
)
ALL_SIZES = (*SIZES, *LARGE_SIZES)
TILE_CASES = [
    (kind, ending, tile)
    for kind in FORMS
    for ending in ENDINGS
    for tile in TILES
    # Tiles of 64 channels exist for three vertical taps only.
    if tile != "tall" or kind in ("conv_3x3", "conv_frame")
]


def sizes_on_all(tile: str) -> range:
    """Numbers of the sizes that get `tile` on a grid of all of a Hopper GPU's multiprocessors."""
    return range(len(SIZES) if tile == "square" else 0, len(ALL_SIZES))


@dataclass
class Problem:
    """One call: its sizes, its inputs, and what its epilogue does."""

    kind: str
    ending: str
    size: tuple[int, int, int]
    in_channels: int
    channels: int
    first: int = 0
    count: int = 0
    drop: int = 0
    ring: int = 0  # frames of the buffers; 0: all of the clip
    num_sms: int = 2
    device: str = "cpu"
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> int:
        return 2 if self.kind == "conv_upsample" else 1

    @property
    def clip_frames(self) -> int:
        """Of the outputs, from frame 0 on."""
        return 2 * self.size[0] - self.drop if self.kind == "conv_time" else self.size[0]

    @property
    def written(self) -> range:
        """Frames of the outputs that this call computes."""
        if self.kind != "conv_time":
            return range(self.first, self.first + self.count)
        return range(max(2 * self.first - self.drop, 0), 2 * (self.first + self.count) - self.drop)

    @property
    def options(self) -> dict[str, Any]:
        return ENDINGS[self.ending]


def make_problem(
    kind: str,
    ending: str,
    size: tuple[int, int, int],
    in_channels: int,
    channels: int,
    *,
    seed: int = 0,
    gain: float = 1.0,
    **options: Any,
) -> Problem:
    """A problem with normal data and products of variance about one, drawn where it is used."""
    p = Problem(kind, ending, size, in_channels, channels, **options)
    p.count = p.count or size[0] - p.first
    drawn: dict[str, Any] = {"generator": torch.Generator(p.device).manual_seed(seed), "device": p.device}
    taps_y, taps_x, taps_t, _, phases = FORMS[kind]

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, **drawn) * scale).bfloat16()

    t, h, w = size
    p.tensors["x"] = normal(t, h, w, in_channels)
    strength = gain * (taps_y * taps_x * taps_t * in_channels) ** -0.5
    p.tensors["w"] = normal(phases * channels, taps_t, taps_y, taps_x, in_channels, scale=strength)
    phases_of_bias = phases if kind == "conv_time" else 1
    p.tensors["bias"] = normal(phases_of_bias * channels).float()
    if p.options.get("shortcut"):
        p.tensors["shortcut"] = normal(p.clip_frames, p.scale * h, p.scale * w, channels)
    return p


def edge_case(
    kind: str, ending: str, tile: str, index: int, *, device: str = "cpu", num_sms: int | None = None
) -> Problem:
    """Size number `index`, with output channels that get `tile`; some are no multiple of 64, some fill it.

    num_sms: instead of the few that go with the tile.
    """
    size, in_channels, (first, count) = ALL_SIZES[index]
    ragged, few = TILES[tile]
    num_sms = few if num_sms is None else num_sms
    channels = ragged if index % 2 == 0 else -(-ragged // 64) * 64
    drop = (index + 1) % 2 if kind == "conv_time" else 0
    options: dict[str, Any] = {"first": first, "count": count, "drop": drop, "num_sms": num_sms}
    # As few frames in the buffers as the call touches, where the form leaves some out.
    if kind == "conv_3x3" and first > 0:
        options["ring"] = min(size[0], (count or size[0] - first) + 2)
    return make_problem(kind, ending, size, in_channels, channels, seed=index, device=device, **options)


def in_ring(frames: torch.Tensor, ring: int, wanted: range) -> torch.Tensor:
    """A buffer of `ring` frames (0: of all) with frame t of `wanted` at t % ring, the others NaN."""
    buffer = frames.new_full((ring or len(frames), *frames.shape[1:]), torch.nan)
    for t in wanted:
        buffer[t % len(buffer)] = frames[t]
    return buffer


def outputs_of(p: Problem) -> dict[str, torch.Tensor]:
    """Fresh outputs: NaN, or the shortcut itself where it is overwritten in place."""
    _, h, w = p.size
    shape = (p.clip_frames + SPARE_FRAMES, p.scale * h, p.scale * w, p.channels)
    out = {
        name: torch.full(shape, torch.nan, dtype=torch.bfloat16, device=p.device)
        for name in ("out", "normed")
        if p.options.get(name)
    }
    if "shortcut" in p.tensors:
        out["out"][: p.clip_frames] = in_ring(p.tensors["shortcut"], 0, p.written)
    return out


def run(p: Problem, backend: ops.Backend = "sim", seed: int = 0) -> dict[str, torch.Tensor]:
    """The outputs of one call, with what lies around them. The shortcut lies where `out` goes."""
    if backend == "sim":
        ops.simulator().set_seed(seed)
    out, t = outputs_of(p), p.tensors
    taps_t = FORMS[p.kind][2]
    op = "conv_3x3" if p.kind == "conv_frame" else p.kind
    w, bias = t["w"], t["bias"]
    options: dict[str, Any] = {}
    if p.kind == "conv_upsample":
        w = w.view(4, p.channels, 2, 2, p.in_channels)
    elif p.kind == "conv_time":
        w, bias = w.view(2, p.channels, 3, p.in_channels), bias.view(2, p.channels)
        options["drop"] = p.drop
    reach = range(max(p.first - taps_t // 2, 0), min(p.first + p.count + taps_t // 2, p.size[0]))
    getattr(ops, op)(
        in_ring(t["x"], p.ring, reach),
        w,
        bias,
        first=p.first,
        count=p.count,
        length=p.size[0],
        shortcut=out["out"] if "shortcut" in t else None,
        **out,
        out_eps=p.options.get("out_eps", 0.0),
        eps=EPS,
        activation=p.options.get("activation", "silu"),
        num_sms=p.num_sms,
        backend=backend,
        **options,
    )
    return out


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.bfloat16().to(dtype)


def convolved(p: Problem, dtype: torch.dtype) -> torch.Tensor:
    """Frames `p.written` before any rounding, tap by tap from shifted copies."""
    x, bias = p.tensors["x"].to(dtype), p.tensors["bias"].to(dtype)
    taps_y, taps_x, taps_t, offset, phases = FORMS[p.kind]
    weights = p.tensors["w"].to(dtype).unflatten(0, (phases, p.channels))
    length, h, w = p.size
    results = []
    for phase in range(phases):
        sy, sx = divmod(phase, 2) if phases == 4 else (0, 0)
        sums = torch.zeros(p.count, h, w, p.channels, dtype=dtype, device=p.device)
        for tap_t in range(taps_t):
            times = [
                min(max(t + tap_t - taps_t // 2, 0), length - 1) for t in range(p.first, p.first + p.count)
            ]
            for tap_y in range(taps_y):
                for tap_x in range(taps_x):
                    dy, dx = tap_y + offset + sy, tap_x + offset + sx
                    ys, xs = slice(max(-dy, 0), min(h - dy, h)), slice(max(-dx, 0), min(w - dx, w))
                    if ys.start >= ys.stop or xs.start >= xs.stop:
                        continue
                    source = x[times][:, ys.start + dy : ys.stop + dy, xs.start + dx : xs.stop + dx]
                    sums[:, ys, xs] += source @ weights[phase, :, tap_t, tap_y, tap_x].T
        half = bias.view(-1, p.channels)[phase if phases == 2 else 0]
        results.append(sums + half)
    if phases == 4:
        out = torch.zeros(p.count, 2 * h, 2 * w, p.channels, dtype=dtype, device=p.device)
        for phase, result in enumerate(results):
            out[:, phase // 2 :: 2, phase % 2 :: 2] = result
        return out
    if phases == 2:
        out = torch.stack(results, 1).flatten(0, 1)
        return out[1:] if p.drop and p.first == 0 else out
    return results[0]


def activated(v: torch.Tensor, activation: str) -> torch.Tensor:
    return {"none": v, "relu": v.clamp(min=0), "silu": v * torch.sigmoid(v)}[activation]


def unit_rms(v: torch.Tensor, eps: float) -> torch.Tensor:
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def expected(p: Problem, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Every output's written frames, unrounded at the end, computed in `dtype` with the kernels' inner roundings.

    With float64 this is the truth; with float32 it is the computation in PyTorch as the model does it.
    """
    v = _round(convolved(p, dtype), dtype)
    if "shortcut" in p.tensors:
        v = _round(v + p.tensors["shortcut"][list(p.written)].to(dtype), dtype)
    found = {}
    if p.options.get("out"):
        found["out"] = unit_rms(v, p.options["out_eps"]) if "out_eps" in p.options else v
    if p.options.get("normed"):
        found["normed"] = activated(_round(unit_rms(v, EPS), dtype), p.options["activation"])
    return found


def check_values(
    name: str,
    got: torch.Tensor,
    truth: torch.Tensor,
    baseline: torch.Tensor,
    *,
    frames: range | None = None,
    rerun: Callable[[], torch.Tensor] | None = None,
    isolated: Callable[[], Facts] | None = None,
    facts: Facts | None = None,
) -> None:
    """Within twice PyTorch's error in norm, and no element off by more than roundings explain (gemm_cases.check)."""
    more: dict[str, Any] = {"layout": "pixels", "numbers": frames, "rerun": rerun}
    more |= {"isolate": isolated, "facts": facts}
    require_finite(name, got, **more)
    error, allowed = (got.double() - truth).norm(), (baseline.double() - truth).norm()
    # One unit of bf16 besides: the sum in another order rounds one element the other way, which few elements show.
    unit = 2.0**-8 * truth.abs().max()
    limit, bound = 2 * allowed + 2.0**-12 * truth.norm() + unit, rounding_bound(truth)
    says = "has an error over twice PyTorch's"
    require_at_most(name, error, limit, says=says, got=got, ref=truth, bound=bound, **more)
    require_close(name, got, truth, bound, says="is off by more than rounding explains", **more)


def isolate(p: Problem, backend: ops.Backend = "gpu") -> dict[str, str]:
    """Which smaller problems hold: one box of input channels, one unit of pixels, one tap, few multiprocessors."""
    frames, height, width = p.size
    box, unit = min(p.in_channels, 64), (frames, min(height, 8), min(width, 8))
    options: dict[str, Any] = {"first": p.first, "count": p.count, "drop": p.drop, "ring": p.ring}
    options |= {"num_sms": p.num_sms, "device": p.device}

    def drawn(size: tuple[int, int, int], channels: int, kind: str = p.kind) -> Callable[[], None]:
        extra = options | ({"drop": 0, "ring": 0} if kind != p.kind else {})
        return lambda: run_and_check(
            make_problem(kind, p.ending, size, channels, p.channels, **extra), backend
        )

    def on(num_sms: int) -> Callable[[], None]:
        return lambda: run_and_check(replace(p, num_sms=num_sms), backend)

    return outcomes(
        {
            "one tap, one unit, one box of channels": drawn(unit, box, "conv_1x1"),
            "one unit, one box of channels": drawn(unit, box),
            "one unit": drawn(unit, p.in_channels),
            "one box of channels": drawn(p.size, box),
            "one time tap": drawn(p.size, p.in_channels, "conv_frame"),
            "the same on one multiprocessor": on(1),
            "the same on two multiprocessors": on(2),
        }
    )


def run_and_check(p: Problem, backend: ops.Backend) -> None:
    check(p, run(p, backend))


def check(p: Problem, out: dict[str, torch.Tensor]) -> None:
    """Against float64; whatever was not to be written is still NaN."""
    truth, baseline = expected(p), expected(p, torch.float32)
    facts = {"kind": p.kind, "ending": p.ending, "size": p.size, "num_sms": p.num_sms}
    facts |= {
        "channels": [p.in_channels, p.channels],
        "frames": list(p.written),
        "drop": p.drop,
        "ring": p.ring,
    }
    more: dict[str, Any] = {"facts": facts}
    if p.device == "cuda":
        more["isolated"] = partial(isolate, p)
    for name, ref in truth.items():
        inside = torch.zeros(len(out[name]), dtype=torch.bool, device=p.device)
        inside[list(p.written)] = True
        others = (~inside).nonzero().flatten()
        says = "other frames were written"
        rest = out[name][~inside]
        require_equal(f"{name}:", rest, torch.nan, layout="pixels", says=says, numbers=others, facts=facts)
        if p.device == "cuda":
            more["rerun"] = lambda name=name, inside=inside: run(p, "gpu")[name][inside]
        check_values(name, out[name][inside], ref, baseline[name].bfloat16(), frames=p.written, **more)
