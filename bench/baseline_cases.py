"""What the libraries reach at the model's shapes, with or without kernels of ours: cuBLAS with and without padding,
convolutions, and whole layers of the plain PyTorch model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from math import prod

import torch
import torch.nn.functional as F

from kernel_cases import BF16, TINY, Case, Setting, Variant, compiled
from magihuman_fast.config import LATENT_CHANNELS, DiTConfig
from magihuman_fast.packing import pack
from magihuman_fast.reference.dit import DiT, rope_bands
from magihuman_fast.reference.turbo_vae import TurboVAE
from magihuman_fast.turbo_vae_config import PUBLISHED_CONFIG, TurboVAEConfig
from timing import Call, Result
from workload import (
    DECODE_FRAMES,
    ConvShape,
    attention_flops,
    decoder_convs,
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


def conv_cases(s: Setting) -> Iterator[Case]:
    """The video decoder's 3x3x3 convolutions in channels-last bf16, without what surrounds them."""
    shapes = [ConvShape(8, (2, 4, 4))] if s.config == TINY.config else decoder_convs(s.clip)
    for shape in shapes:

        def make(shape: ConvShape = shape) -> Call:
            channels, layout = shape.channels, torch.channels_last_3d
            x = s.normal(1, *shape.grid, channels, dtype=BF16).permute(0, 4, 1, 2, 3)
            weight = s.normal(channels, channels, 3, 3, 3, scale=(27 * channels) ** -0.5, dtype=BF16)
            weight = weight.contiguous(memory_format=layout)
            return lambda: F.conv3d(x, weight, padding=1)

        t, h, w = shape.grid
        name = f"{s.clip.name}: {shape.channels} channels, {t} x {h} x {w}"
        yield Case("conv3d", name, shape.flops, shape.nbytes, (Variant("cuDNN, channels last", make),))


def decode_cases(s: Setting) -> Iterator[Case]:
    """One whole decode window of the plain PyTorch decoder in bf16, random weights."""
    if s.config == TINY.config:
        values = {**PUBLISHED_CONFIG, "decoder_block_out_channels": [8, 8, 16, 16]}
        values["decoder_layers_per_block"] = [1, 1, 1, 1, 1]
    else:
        values = dict(PUBLISHED_CONFIG)
    height, width = s.clip.latent[2:]

    def make() -> Call:
        vae = decoder(s, values)
        z = s.normal(1, DECODE_FRAMES, height, width, LATENT_CHANNELS, dtype=BF16).permute(0, 4, 1, 2, 3)
        return lambda: vae._forward(z, False)

    shape = f"{s.clip.name}: {DECODE_FRAMES} latent frames of {height} x {width}"
    flops = decode_flops(values, (height, width))
    # Its bytes are the activations between the layers, which a better version would not move: not counted.
    yield Case("decode window", shape, flops, 0, (Variant("PyTorch", make),), footprint=1 << 30)


def decoder(s: Setting, values: dict[str, object]) -> TurboVAE:
    shapes = TurboVAEConfig.from_dict(values).state_dict_shapes()
    weights = {
        name: s.normal(*shape, scale=prod(shape[1:]) ** -0.5, dtype=BF16) for name, shape in shapes.items()
    }
    return TurboVAE.from_state_dict(values, weights, device=s.device, dtype=BF16)


def decode_flops(values: dict[str, object], size: tuple[int, int]) -> int:
    """Operations of one decode window's convolutions, counted by torch on tensors without data."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes = TurboVAEConfig.from_dict(values).state_dict_shapes()
    names = ((name.removeprefix("decoder."), shape) for name, shape in shapes.items())
    weights = {name: torch.empty(shape, device="meta", dtype=BF16) for name, shape in names}
    vae = TurboVAE(TurboVAEConfig.from_dict(values), weights)
    z = torch.empty(1, LATENT_CHANNELS, DECODE_FRAMES, *size, device="meta", dtype=BF16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae._forward(z, False)
    return int(counter.get_total_flops())


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
