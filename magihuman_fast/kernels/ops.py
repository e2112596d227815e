"""The operations that the kernels compute: every argument checked, then one launch.

All take tensors and return what they wrote. `backend` says what computes: "gpu" the kernels, on a Hopper GPU;
"sim" the same kernel sources in the simulator, on CPU tensors (development builds only); "reference" plain PyTorch.
None is "gpu"; nothing falls back silently. Launches allocate nothing when the outputs are given, never wait, and can
be captured in a CUDA graph.

M is the number of rows a buffer has room for. `modality_offsets`, int32 (4,) on the tensors' device, holds the row
ranges (0, Nv, Nv + Na, L) of video, audio and text; rows at or beyond L are neither computed nor written. Weights with
a leading axis of 3 hold one expert per modality, with 1 one for all; offsets may then be None: all rows. Values of
offsets on a GPU are not looked at.

Raises, everywhere:
    ValueError: an argument with the wrong dtype, shape, strides, alignment, device or value; names it, with what was
        expected and what was found. Nothing has been launched then.
    RuntimeError: the backend is not there, or the launch failed.
"""

from __future__ import annotations

from ..model.operations import QkvGate
from .attention import AttentionBackend, gated_attention
from .convolutions import (
    ConvOptions,
    PixelOutputs,
    channel_norm,
    conv_1x1,
    conv_3x3,
    conv_picture,
    conv_time,
    conv_upsample,
    latent_pixels,
)
from .launch import Backend, gpu_unavailable, simulator
from .pointwise import advance_step, clamp_image, embed, embed_text, head, renoise_step, rms_norm, unipc_step
from .products import gemm, gemm_gelu7, gemm_qkv, gemm_residual, gemm_swiglu7

__all__ = [
    "AttentionBackend",
    "Backend",
    "ConvOptions",
    "PixelOutputs",
    "QkvGate",
    "advance_step",
    "channel_norm",
    "clamp_image",
    "conv_1x1",
    "conv_3x3",
    "conv_picture",
    "conv_time",
    "conv_upsample",
    "embed",
    "embed_text",
    "gated_attention",
    "gemm",
    "gemm_gelu7",
    "gemm_qkv",
    "gemm_residual",
    "gemm_swiglu7",
    "gpu_unavailable",
    "head",
    "latent_pixels",
    "renoise_step",
    "rms_norm",
    "simulator",
    "unipc_step",
]
