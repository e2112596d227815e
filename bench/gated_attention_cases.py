"""Gated attention at the model's shapes: the kernel, torch's own kernels and flash-attn, with the gate and without.

The kernel applies the gate in its epilogue; for the others it is a second kernel, compiled by torch, so each is timed
with it and without. Work is counted on the pairs of query and key that the form has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_cases import BF16, Case, Inputs, Setting, Variant, bound, compiled
from magihuman_fast.kernels.attention import TILES
from magihuman_fast.model.dit import attention
from magihuman_fast.model.packing import window_ranges
from timing import Call
from workload import FRAME_WINDOW, attention_bytes, attention_flops

SDPA_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
FLASH_ATTENTION = ("flash_attn_interface", "flash_attn")  # the packages of versions 3 and 2
Attend = Callable[[], torch.Tensor]


def attention_inputs(s: Setting, window: int | None = None) -> Inputs:
    """Arguments of `ops.gated_attention`, the output included."""
    c, m = s.config, s.clip.rows
    q, k, v = (
        s.normal(m, n, c.head_dim, dtype=BF16) for n in (c.num_q_heads, c.num_kv_heads, c.num_kv_heads)
    )
    given = {"q": q, "k": k, "v": v, "gate": s.normal(m, c.num_q_heads), "out": torch.empty_like(q)}
    given["modality_offsets"] = s.offsets()
    if window is not None:
        given |= {"tokens_per_frame": s.clip.video // s.clip.grid[0], "frame_window": window}
    return given


def window_of(s: Setting) -> int:
    """The model's window, or in clips that have not so many frames a window all the same."""
    return FRAME_WINDOW if s.clip.grid[0] > 2 * FRAME_WINDOW else 1


def _subject(s: Setting, window: int | None = None, tile: str | None = None) -> Variant:
    def make() -> Call:
        return bound("gated_attention", s, attention_inputs(s, window) | {"tile": tile})

    return Variant(s.subject if tile is None else f"{s.subject}, {tile}", make)


def _tiles(s: Setting, window: int | None = None) -> list[Variant]:
    """Each compiled tile by itself: whether the one that is predicted to be the fastest is."""
    return [_subject(s, window, tile) for tile in TILES] if s.backend == "gpu" else []


def _gated(s: Setting, attend: Attend, given: Inputs) -> Call:
    gate = given["gate"]
    run = compiled(lambda o, g: (o.float() * torch.sigmoid(g).unsqueeze(-1)).bfloat16(), s.device)
    return lambda: run(attend(), gate)


def _with_and_without_gate(
    s: Setting, name: str, make: Callable[[Inputs], Attend], window: int | None
) -> list[Variant]:
    def alone() -> Call:
        return make(attention_inputs(s, window))

    def gated() -> Call:
        given = attention_inputs(s, window)
        return _gated(s, make(given), given)

    return [Variant(name, alone), Variant(f"{name} + compiled gate", gated)]


def attention_cases(s: Setting) -> Iterator[Case]:
    """Every token sees every token. torch's kernels are each chosen by name."""
    c, m = s.config, s.clip.rows

    def sdpa(backend: SDPBackend, repeat: bool) -> Callable[[Inputs], Attend]:
        def make(given: Inputs) -> Attend:
            q, k, v = (given[name].transpose(0, 1).unsqueeze(0) for name in "qkv")
            if repeat:
                k, v = (x.repeat_interleave(c.num_q_heads // c.num_kv_heads, 1) for x in (k, v))

            def call() -> torch.Tensor:
                with sdpa_kernel(backend):
                    o = F.scaled_dot_product_attention(q, k, v, enable_gqa=not repeat)
                return o[0].transpose(0, 1)

            return call

        return make

    def flash(module: str) -> Callable[[Inputs], Attend]:
        def make(given: Inputs) -> Attend:
            function = import_module(module).flash_attn_func
            q, k, v = (given[name].unsqueeze(0) for name in "qkv")

            def call() -> torch.Tensor:
                result = function(q, k, v)
                return (result[0] if isinstance(result, tuple) else result)[0]

            return call

        return make

    variants = [_subject(s)]
    for backend in SDPA_BACKENDS if s.device == "cuda" else (SDPBackend.MATH,):
        name = f"SDPA {backend.name.lower().replace('_attention', '')}"
        variants += _with_and_without_gate(s, name, sdpa(backend, False), None)
        variants.append(_with_and_without_gate(s, f"{name}, keys repeated", sdpa(backend, True), None)[0])
    for module in FLASH_ATTENTION:
        if find_spec(module) is not None:
            variants += _with_and_without_gate(s, module, flash(module), None)
    variants += _tiles(s)
    shape = f"{s.clip.name}: {m} tokens, {c.num_q_heads} heads on {c.num_kv_heads}"
    yield Case(
        "gated_attention", shape, attention_flops(c, s.clip), attention_bytes(c, s.clip), tuple(variants)
    )


def window_attention_cases(s: Setting) -> Iterator[Case]:
    """Video tokens see a window of frames; torch does it window by window."""
    c, clip, window = s.config, s.clip, window_of(s)
    ranges = window_ranges(clip.grid, clip.rows, window)

    def per_window(given: Inputs) -> Attend:
        return lambda: attention(given["q"], given["k"], given["v"], ranges)

    variants = [_subject(s, window), *_with_and_without_gate(s, "SDPA per window", per_window, window)]
    variants += _tiles(s, window)
    shape = f"{clip.name}: {clip.rows} tokens, window {window}"
    flops, nbytes = attention_flops(c, clip, window), attention_bytes(c, clip)
    yield Case("gated_attention", shape, flops, nbytes, tuple(variants))
