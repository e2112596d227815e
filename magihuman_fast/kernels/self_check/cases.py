"""Every kernel that the models and the video decoder use, in the forms in which they use it: see `comparison`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...model.config import AUDIO_CHANNELS, LATENT_CHANNELS
from ...model.turbo_vae import RMS_EPS, SHORTCUT_RMS_EPS
from .. import ops
from ..attention import TILES as ATTENTION_TILES
from ..convolutions import PICTURE_CHANNELS
from ..dit_weights import padded_width
from ..pointwise import RENOISE_COLUMNS, UNIPC_COLUMNS
from ..products import BF16, F32, HEAD_DIM, ROPE_WIDTH
from .comparison import (
    BLOCKS,
    EXACT,
    PAIRS,
    SPARE_FRAMES,
    SPARE_ROWS,
    SQUARE,
    TALL,
    TO_F32,
    WIDE,
    Arguments,
    Case,
    Draw,
    Sizes,
)

STEPS = 4  # of the samplers' tables


def _product(op: str, tile: str, experts: int, draw: Draw) -> Arguments:
    p = draw.sizes.products[tile]
    live, n = sum(p.rows), p.n
    if op == "gemm_qkv":
        n = HEAD_DIM * (p.heads[0] + 2 * p.heads[1]) + p.heads[0]
    # Activations clamp at 7: products of size 4 get there.
    strength = 4.0 if op in ("gemm_gelu7", "gemm_swiglu7") else 1.0
    given: Arguments = {
        "a": draw.rows(live, p.k),
        "w": draw.normal(experts, n, p.k, dtype=BF16, scale=strength * p.k**-0.5),
        "modality_offsets": draw.offsets(p.rows),
        "num_sms": p.num_sms,
    }
    rows = live + SPARE_ROWS
    if op == "gemm_residual":
        return given | {"x": draw.rows(live, n, dtype=F32)}
    if op == "gemm_gelu7":
        return given | {"out": draw.missing(rows, n)}
    if op == "gemm_swiglu7":
        return given | {"out": draw.missing(rows, padded_width(n // 2))}
    angles = draw.normal(rows, ROPE_WIDTH // 2, scale=3.0)
    q, k = (draw.missing(rows, heads, HEAD_DIM) for heads in p.heads)
    return given | {
        "q_norm": draw.normal(experts, HEAD_DIM, scale=0.2),
        "k_norm": draw.normal(experts, HEAD_DIM, scale=0.2),
        "rope": torch.cat([angles.sin(), angles.cos()], 1),
        "num_q_heads": p.heads[0],
        "num_kv_heads": p.heads[1],
        "out": ops.QkvGate(q, k, k.clone(), draw.missing(rows, p.heads[0], dtype=F32)),
    }


def _attention(tile: str, form: str, draw: Draw) -> Arguments:
    rows, (heads, kv_heads), frame = draw.sizes.attention
    live = sum(rows)
    return {
        # Few keys count for much, so that one that is left out shows.
        "q": draw.rows(live, heads, HEAD_DIM, scale=3.0),
        "k": draw.rows(live, kv_heads, HEAD_DIM),
        "v": draw.rows(live, kv_heads, HEAD_DIM),
        "gate": draw.rows(live, heads, dtype=F32, scale=2.0),
        "modality_offsets": draw.offsets(rows),
        "tokens_per_frame": frame if form == "window" else None,
        "frame_window": 1 if form == "window" else None,
        "text_queries": form != "last layer",
        "out": draw.missing(live + SPARE_ROWS, heads, HEAD_DIM),
        "num_sms": draw.sizes.attention_sms,
        "tile": tile,
    }


def _norm(experts: int, draw: Draw) -> Arguments:
    p, hidden = draw.sizes.products[SQUARE], draw.sizes.hidden
    return {
        "x": draw.rows(sum(p.rows), hidden, dtype=F32),
        "weight": draw.normal(experts, hidden, scale=0.1),
        "modality_offsets": draw.offsets(p.rows),
        "out": draw.missing(sum(p.rows) + SPARE_ROWS, hidden),
    }


def _embed_text(draw: Draw) -> Arguments:
    s, channels = draw.sizes, 264
    return {
        "text": draw.normal(s.text, channels),
        "weight": draw.normal(s.hidden, channels, scale=channels**-0.5),
        "bias": draw.normal(s.hidden, scale=0.1),
        "out": draw.missing(s.text, s.hidden, dtype=F32),
    }


def _token_rows(s: Sizes) -> tuple[int, int, int]:
    frames, height, width = s.latent
    return (frames * height * width // 4, s.audio, s.text)


def _embed(draw: Draw) -> Arguments:
    s, rows = draw.sizes, _token_rows(draw.sizes)
    channels = 4 * LATENT_CHANNELS
    return {
        "video": draw.normal(LATENT_CHANNELS, *s.latent),
        "audio": draw.normal(s.audio, AUDIO_CHANNELS),
        "text_embedding": draw.normal(s.text, s.hidden),
        "video_weight": draw.normal(s.hidden, channels, scale=channels**-0.5),
        "video_bias": draw.normal(s.hidden, scale=0.1),
        "audio_weight": draw.normal(s.hidden, AUDIO_CHANNELS, scale=AUDIO_CHANNELS**-0.5),
        "audio_bias": draw.normal(s.hidden, scale=0.1),
        "modality_offsets": draw.offsets(rows),
        "out": draw.missing(sum(rows) + SPARE_ROWS, s.hidden, dtype=F32),
    }


def _head(draw: Draw) -> Arguments:
    s, rows = draw.sizes, _token_rows(draw.sizes)
    return {
        "x": draw.rows(sum(rows), s.hidden, dtype=F32),
        "video_norm": draw.normal(s.hidden, scale=0.1),
        "audio_norm": draw.normal(s.hidden, scale=0.1),
        "video_weight": draw.normal(4 * LATENT_CHANNELS, s.hidden, scale=s.hidden**-0.5),
        "audio_weight": draw.normal(AUDIO_CHANNELS, s.hidden, scale=s.hidden**-0.5),
        "modality_offsets": draw.offsets(rows),
        "video_out": draw.missing(LATENT_CHANNELS, *s.latent, dtype=F32),
        "audio_out": draw.missing(s.audio, AUDIO_CHANNELS, dtype=F32),
    }


def _renoise(draw: Draw) -> Arguments:
    shape = (LATENT_CHANNELS, *draw.sizes.latent)
    return {
        "x": draw.normal(*shape),
        "velocity": draw.normal(*shape),
        "noise": draw.normal(STEPS, *shape),
        "table": draw.normal(STEPS, RENOISE_COLUMNS),
        "step": draw.integers(2),
    }


def _unipc(guided: bool, draw: Draw) -> Arguments:
    shape = (LATENT_CHANNELS, *draw.sizes.latent)
    given = {
        "x": draw.normal(*shape),
        "velocity": draw.normal(*shape),
        "x_last": draw.normal(*shape),
        "history": draw.normal(2, *shape),
        "table": draw.normal(STEPS, UNIPC_COLUMNS),
        "step": draw.integers(2),
    }
    if guided:
        given |= {"null_velocity": draw.normal(*shape), "guidance": draw.normal(STEPS, shape[1])}
    return given


def _clamp(draw: Draw) -> Arguments:
    frames, height, width = draw.sizes.latent
    video = draw.normal(LATENT_CHANNELS, frames, height, width)
    return {"video": video, "image": draw.normal(LATENT_CHANNELS, height, width)}


def _model_cases() -> Iterator[Case]:
    for op in ("gemm_qkv", "gemm_residual", "gemm_swiglu7", "gemm_gelu7"):
        for experts in (1, 3):
            for tile in (WIDE, SQUARE):
                form = "one expert" if experts == 1 else "by modality"
                written = ("x",) if op == "gemm_residual" else ("out",)
                yield Case(op, form, tile, "models", partial(_product, op, tile, experts), written)
    for form in ("full", "window", "last layer"):
        for tile in ATTENTION_TILES:
            yield Case("gated_attention", form, tile, "models", partial(_attention, tile, form), ("out",))
    for experts in (1, 3):
        form = "one expert" if experts == 1 else "by modality"
        yield Case("rms_norm", form, "", "models", partial(_norm, experts), ("out",))
    yield Case("embed_text", "", "", "models", _embed_text, ("out",), TO_F32)
    yield Case("embed", "", "", "models", _embed, ("out",), TO_F32)
    yield Case("head", "", "", "models", _head, ("video_out", "audio_out"), TO_F32)
    yield Case("renoise_step", "", "", "models", _renoise, ("x",), TO_F32)
    for form in ("plain", "guided"):
        state = ("x", "x_last", "history")
        yield Case("unipc_step", form, "", "models", partial(_unipc, form == "guided"), state, TO_F32)
    yield Case("clamp_image", "", "", "models", _clamp, ("video",), EXACT)
    yield Case("advance_step", "", "", "models", lambda draw: {"step": draw.integers(3)}, ("step",), EXACT)


# --- the decoder ----------------------------------------------------------------------------------------------

# Of `ops.conv_*`: the shape of the weights around the channels, taps in all, by how much a side grows.
WEIGHTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "conv_3x3": ((), (3, 3, 3), 27, 1),
    "conv_1x1": ((), (1, 1, 1), 1, 1),
    "conv_upsample": ((4,), (2, 2), 4, 2),
    "conv_time": ((2,), (3,), 3, 1),
}
RAW, NORMED, RESNET, BETWEEN = "raw", "and its norm", "shortcut and norm", "shortcut and two norms"


def _convolution(op: str, form: str, tile: str, draw: Draw) -> Arguments:
    s, (channels, num_sms) = draw.sizes, draw.sizes.convolutions[tile]
    frames, height, width = s.pixels
    before, after, taps, scale = WEIGHTS[op]
    phases = before[0] if op == "conv_time" else 1
    shape = (phases * frames + SPARE_FRAMES, scale * height, scale * width, channels)
    given: Arguments = {
        "x": draw.normal(*s.pixels, s.in_channels, dtype=BF16),
        "w": draw.normal(
            *before, channels, *after, s.in_channels, dtype=BF16, scale=(taps * s.in_channels) ** -0.5
        ),
        "bias": draw.bias(*before, channels) if op == "conv_time" else draw.bias(channels),
        "out": draw.missing(*shape),
        "num_sms": num_sms,
    }
    if form in (RESNET, BETWEEN):  # where the result goes, as in the decoder
        given["out"][:-SPARE_FRAMES] = draw.normal(*shape, dtype=BF16)[:-SPARE_FRAMES]
        given["shortcut"] = given["out"]
    if form != RAW:
        given |= {"normed": draw.missing(*shape), "eps": RMS_EPS, "activation": "silu"}
    if form == BETWEEN:
        given |= {"out_eps": SHORTCUT_RMS_EPS, "activation": "relu"}
    return given


def _picture(form: str, draw: Draw) -> Arguments:
    s = draw.sizes
    frames, height, width = s.pixels
    shape = (frames, 2 * height, 2 * width)
    out = (
        draw.missing(3, *shape, dtype=F32) if form == "float32" else torch.zeros(*shape, 3, dtype=torch.uint8)
    )
    return {
        "x": draw.normal(*s.pixels, s.in_channels, dtype=BF16),
        "w": draw.normal(
            PICTURE_CHANNELS, 3, 3, 3, s.in_channels, dtype=BF16, scale=(27 * s.in_channels) ** -0.5
        ),
        "bias": draw.bias(PICTURE_CHANNELS),
        "out": out.to(draw.device),
    }


def _channel_norm(draw: Draw) -> Arguments:
    s = draw.sizes
    frames, height, width = s.pixels
    shape = (frames + SPARE_FRAMES, height, width, 2 * s.in_channels)
    x = draw.missing(*shape)
    x[:frames] = draw.normal(frames, *shape[1:], dtype=BF16)
    return {
        "x": x,
        "normed": draw.missing(*shape),
        "plain": draw.missing(*shape),
        "count": frames,
        "eps": RMS_EPS,
        "plain_eps": SHORTCUT_RMS_EPS,
        "activation": "silu",
    }


def _latent_pixels(draw: Draw) -> Arguments:
    frames, height, width = draw.sizes.latent
    return {
        "latent": draw.normal(LATENT_CHANNELS, frames, height, width),
        "mean": draw.normal(LATENT_CHANNELS),
        "std": draw.normal(LATENT_CHANNELS),
        "out": draw.missing(frames + 1, height, width, LATENT_CHANNELS),
        "first": 1,
    }


def _decoder_cases() -> Iterator[Case]:
    forms = {"conv_3x3": (RAW, NORMED, RESNET, BETWEEN), "conv_upsample": (RAW, NORMED)}
    for op in WEIGHTS:
        tiles = (PAIRS, BLOCKS, TALL) if op == "conv_3x3" else (PAIRS, BLOCKS)
        for form in forms.get(op, (RAW,)):
            outputs = ("out",) if form == RAW else ("out", "normed")
            for tile in tiles:
                yield Case(op, form, tile, "decoder", partial(_convolution, op, form, tile), outputs)
    for form in ("float32", "bytes"):
        yield Case("conv_picture", form, "", "decoder", partial(_picture, form), ("out",))
    yield Case("channel_norm", "", "", "decoder", _channel_norm, ("normed", "plain"))
    yield Case("latent_pixels", "", "", "decoder", _latent_pixels, ("out",))


CASES: dict[str, Case] = {case.name: case for case in (*_model_cases(), *_decoder_cases())}
"""Every case by its name, in the order in which they are checked."""
