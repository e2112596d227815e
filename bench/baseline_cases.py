"""What the libraries reach at the model's shapes without kernels of ours: cuBLAS with and without padding, and whole
layers of the plain PyTorch model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from kernel_cases import BF16, TINY, Case, Setting, Variant, compiled
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import DiT, rope_bands
from magihuman_fast.model.packing import pack
from timing import Call, Result
from workload import (
    attention_flops,
    gemm_bytes,
    gemm_flops,
    layer_linears,
    padded,
)


def padding_cases(s: Setting) -> Iterator[Case]:
    """cuBLAS on the down projection as published (K = 13652: a row pitch that is no multiple of 16 bytes) and padded.

    And the projection to q, k, v with and without its 40 gate columns.
    """
    m, c = s.clip.rows, s.config
    width, hidden = c.intermediate(c.num_layers - 1), c.hidden_size
    heads = c.qkvg_rows - c.num_q_heads
    for n, k in ((hidden, width), (hidden, padded(width)), (heads, hidden), (c.qkvg_rows, hidden)):

        def make(n: int = n, k: int = k) -> Call:
            a, w = s.normal(m, k, dtype=BF16), s.normal(n, k, scale=k**-0.5, dtype=BF16)
            out = torch.empty(m, n, dtype=BF16, device=s.device)
            return lambda: torch.mm(a, w.t(), out=out)

        shape = f"{s.clip.name}: {m} x {n} x {k}"
        variants = (Variant("cuBLAS", make),)
        yield Case("linear", shape, gemm_flops(m, n, k), gemm_bytes(m, n, k, 1, 2 * n), variants)


# --- layers of the plain PyTorch model ------------------------------------------------------------------------

# One layer of each kind at full width, and how many of each the published model has.
LAYER_KINDS = (("GELU7, 3 experts", 4), ("SwiGLU7, 1 expert", 32), ("SwiGLU7, 3 experts", 4))
LAYERS_CONFIG = DiTConfig(num_layers=3, mm_layers=(0, 2), gelu7_layers=(0,))


def random_dit(s: Setting, config: DiTConfig) -> DiT:
    state = {}
    for name, shape in config.state_dict_shapes().items():
        scale = 0.1 if len(shape) == 1 else shape[1] ** -0.5
        dtype = BF16 if name.startswith("block.layers.") and len(shape) == 2 else torch.float32
        state[name] = s.normal(*shape, scale=scale, dtype=dtype)
    state["adapter.rope.bands"] = rope_bands(config, s.device)
    return DiT.from_state_dict(config, state, device=s.device)


def layer_cases(s: Setting) -> Iterator[Case]:
    """One layer of each kind, eager and compiled by torch, every token attending to every other."""
    config = s.config if s.config == TINY.config else LAYERS_CONFIG
    dit = random_dit(s, config)
    clip = s.clip
    channels = (config.video_in_channels, config.audio_in_channels, config.text_in_channels)
    inputs = (
        s.normal(*clip.latent),
        s.normal(clip.audio, channels[1]),
        s.normal(clip.text, channels[2]),
    )
    tokens = pack(*inputs, dit.bands, coords="v2", channels=channels)
    for index, (kind, _) in enumerate(LAYER_KINDS):

        def make(index: int = index, compile_it: bool = False) -> Call:
            x = s.normal(clip.rows, config.hidden_size)
            # The compiler specialises on the layer's number.
            run: Callable[..., object] = compiled(dit.layer, s.device) if compile_it else dit.layer
            return lambda: run(index, x, tokens)

        linears = layer_linears(config, index)
        flops = attention_flops(config, clip) + sum(gemm_flops(clip.rows, n, k) for n, k in linears)
        nbytes = sum(2 * n * k for n, k in linears) + 8 * clip.rows * config.hidden_size
        variants = (
            Variant("PyTorch, compiled", lambda make=make: make(compile_it=True)),
            Variant("PyTorch", make),
        )
        yield Case("layer", f"{clip.name}: {kind}", flops, nbytes, variants)


def extrapolated_step(results: list[Result], clip: str) -> list[Result]:
    """The time of 40 layers from one of each kind, for every variant that has all three; a sum, not a measurement."""
    found = []
    kinds = {f"{clip}: {kind}": count for kind, count in LAYER_KINDS}
    for variant in dict.fromkeys(result.variant for result in results if result.op == "layer"):
        parts = [r for r in results if r.op == "layer" and r.variant == variant and r.shape in kinds]
        if len(parts) != len(kinds):
            continue

        def total(pick: Callable[[Result], float], parts: list[Result] = parts) -> float:
            return sum(pick(part) * kinds[part.shape] for part in parts)

        first = parts[0]
        timing = dataclasses.replace(
            first.timing,
            seconds=total(lambda r: r.timing.seconds),
            low=total(lambda r: r.timing.low),
            high=total(lambda r: r.timing.high),
            clock="extrapolated",
        )
        found.append(
            dataclasses.replace(
                first,
                op="step",
                shape=f"{clip}: 40 layers, full attention, without embedders and head",
                timing=timing,
                flops=round(total(lambda r: r.flops)),
                nbytes=round(total(lambda r: r.nbytes)),
                baseline=None,
                speedup=None,
                peak_share=None,
                note="extrapolated from one layer of each kind",
            )
        )
    return found
