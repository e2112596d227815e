"""What the libraries reach at the model's shapes, with or without kernels of ours: cuBLAS with and without padding,
attention, convolutions, and whole layers of the plain PyTorch model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from math import prod

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_cases import BF16, TINY, Case, Setting, Variant, compiled
from magihuman_fast.config import LATENT_CHANNELS, DiTConfig
from magihuman_fast.packing import pack, window_ranges
from magihuman_fast.reference.dit import DiT, attention, rope_bands
from magihuman_fast.reference.turbo_vae import TurboVAE
from magihuman_fast.turbo_vae_config import PUBLISHED_CONFIG, TurboVAEConfig
from timing import Call, Result
from workload import (
    DECODE_FRAMES,
    FRAME_WINDOW,
    ConvShape,
    attention_bytes,
    attention_flops,
    decoder_convs,
    gemm_bytes,
    gemm_flops,
    layer_linears,
    padded,
)

SDPA_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)

FLASH_ATTENTION = ("flash_attn_interface", "flash_attn")  # the packages of versions 3 and 2


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


def attention_cases(s: Setting) -> Iterator[Case]:
    """Attention over all tokens by torch's kernels, each chosen explicitly, and by flash-attn where it is installed."""
    c, m = s.config, s.clip.rows

    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (c.num_q_heads, c.num_kv_heads, c.num_kv_heads)
        q, k, v = (s.normal(1, m, n, c.head_dim, dtype=BF16) for n in heads)
        return q, k, v

    def sdpa(backend: SDPBackend, repeat: bool) -> Call:
        q, k, v = (x.transpose(1, 2) for x in inputs())
        if repeat:
            k, v = (x.repeat_interleave(c.num_q_heads // c.num_kv_heads, 1) for x in (k, v))

        def call() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=not repeat)

        return call

    def flash(module: str) -> Call:
        function = import_module(module).flash_attn_func
        q, k, v = inputs()
        return lambda: function(q, k, v)

    backends = SDPA_BACKENDS if s.device == "cuda" else (SDPBackend.MATH,)
    variants = []
    for backend in backends:
        name = backend.name.lower().replace("_attention", "")
        for repeat in (False, True):
            label = f"SDPA {name}{', keys repeated' if repeat else ''}"
            variants.append(Variant(label, lambda b=backend, r=repeat: sdpa(b, r)))
    installed = [name for name in FLASH_ATTENTION if find_spec(name) is not None]
    variants += [Variant(name, lambda n=name: flash(n)) for name in installed]
    shape = f"{s.clip.name}: {m} tokens, {c.num_q_heads} heads on {c.num_kv_heads}"
    yield Case("attention", shape, attention_flops(c, s.clip), attention_bytes(c, s.clip), tuple(variants))


def window_attention_cases(s: Setting) -> Iterator[Case]:
    """Attention within the frame window, window by window; counted on its own pairs."""
    c, clip = s.config, s.clip
    windows = window_ranges(clip.grid, clip.rows, FRAME_WINDOW)

    def make() -> Call:
        heads = (c.num_q_heads, c.num_kv_heads, c.num_kv_heads)
        q, k, v = (s.normal(clip.rows, n, c.head_dim, dtype=BF16) for n in heads)
        return lambda: attention(q, k, v, windows)

    shape = f"{clip.name}: {clip.rows} tokens, window {FRAME_WINDOW}"
    flops, nbytes = attention_flops(c, clip, FRAME_WINDOW), attention_bytes(c, clip)
    yield Case("window attention", shape, flops, nbytes, (Variant("SDPA per window", make),))


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
