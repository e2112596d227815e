"""One valid call of every operation, as small as it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from backends import offsets_tensor
from magihuman_fast.kernels import ops

Arguments = dict[str, Any]
ROWS, K, N = 6, 24, 16


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def step_number() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32)


def product_arguments() -> Arguments:
    offsets = offsets_tensor((0, 2, 4, 6), "cpu")
    return {"a": bf16(ROWS, K), "w": bf16(3, N, K), "modality_offsets": offsets, "out": bf16(ROWS, N)}


def residual_arguments() -> Arguments:
    arguments = product_arguments()
    del arguments["out"]
    return {**arguments, "x": torch.randn(ROWS, N)}


def qkv_arguments() -> Arguments:
    q, k = bf16(ROWS, 2, 128), bf16(ROWS, 1, 128)
    return {
        "a": bf16(ROWS, K),
        "w": bf16(3, 4 * 128 + 2, K),
        "q_norm": torch.randn(3, 128),
        "k_norm": torch.randn(3, 128),
        "rope": torch.randn(ROWS, 96),
        "num_q_heads": 2,
        "num_kv_heads": 1,
        "modality_offsets": offsets_tensor((0, 2, 4, 6), "cpu"),
        "out": ops.QkvGate(q, k, k.clone(), torch.randn(ROWS, 2)),
    }


def attention_arguments() -> Arguments:
    q, k = bf16(ROWS, 4, 128), bf16(ROWS, 2, 128)
    return {
        "q": q,
        "k": k,
        "v": k.clone(),
        "gate": torch.randn(ROWS, 4),
        "modality_offsets": offsets_tensor((0, 2, 4, 6), "cpu"),
        "tokens_per_frame": 1,
        "frame_window": 0,
        "text_queries": True,
        "out": torch.zeros_like(q),
    }


def embed_arguments() -> Arguments:
    return {
        "video": torch.randn(2, 1, 4, 4),
        "audio": torch.randn(3, 8),
        "text_embedding": torch.randn(2, 16),
        "video_weight": torch.randn(16, 8),
        "video_bias": torch.randn(16),
        "audio_weight": torch.randn(16, 8),
        "audio_bias": torch.randn(16),
        "modality_offsets": offsets_tensor((0, 4, 7, 9), "cpu"),
        "out": torch.randn(9, 16),
    }


def head_arguments() -> Arguments:
    return {
        "x": torch.randn(9, 16),
        "video_norm": torch.randn(16),
        "audio_norm": torch.randn(16),
        "video_weight": torch.randn(8, 16),
        "audio_weight": torch.randn(8, 16),
        "modality_offsets": offsets_tensor((0, 4, 7, 9), "cpu"),
        "video_out": torch.randn(2, 1, 4, 4),
        "audio_out": torch.randn(3, 8),
    }


def update_arguments() -> Arguments:
    return {"x": torch.randn(2, 3, 2, 2), "velocity": torch.randn(2, 3, 2, 2), "step": step_number()}


def conv_arguments(*weights: int, bias: tuple[int, ...], scale: int = 1, frames: int = 2) -> Arguments:
    """16 channels to 8; `weights` and `bias` are the shapes before the input's channels."""
    shape = (frames, 3 * scale, 2 * scale, 8)
    return {
        "x": bf16(2, 3, 2, 16),
        "w": bf16(*weights, 16),
        "bias": torch.randn(bias),
        "shortcut": bf16(*shape),
        "out": bf16(*shape),
        "normed": bf16(*shape),
    }


def without(arguments: Arguments, *names: str) -> Arguments:
    return {name: value for name, value in arguments.items() if name not in names}


VALID: dict[str, Callable[[], Arguments]] = {
    "gemm": product_arguments,
    "gemm_residual": residual_arguments,
    "gemm_gelu7": product_arguments,
    "gemm_swiglu7": product_arguments,
    "gemm_qkv": qkv_arguments,
    "gated_attention": attention_arguments,
    "rms_norm": lambda: {
        "x": torch.randn(ROWS, 16),
        "weight": torch.randn(3, 16),
        "modality_offsets": offsets_tensor((0, 2, 4, 6), "cpu"),
        "out": bf16(ROWS, 16),
    },
    "embed_text": lambda: {
        "text": torch.randn(3, 8),
        "weight": torch.randn(16, 8),
        "bias": torch.randn(16),
        "out": torch.randn(3, 16),
    },
    "embed": embed_arguments,
    "head": head_arguments,
    "renoise_step": lambda: {
        **update_arguments(),
        "noise": torch.randn(4, 2, 3, 2, 2),
        "table": torch.randn(4, 3),
    },
    "clamp_image": lambda: {"video": torch.randn(2, 3, 2, 2), "image": torch.randn(2, 2, 2)},
    "unipc_step": lambda: {
        **update_arguments(),
        "x_last": torch.randn(2, 3, 2, 2),
        "history": torch.randn(2, 2, 3, 2, 2),
        "table": torch.randn(4, 9),
        "null_velocity": torch.randn(2, 3, 2, 2),
        "guidance": torch.randn(4, 3),
    },
    "advance_step": lambda: {"step": step_number()},
    "conv_3x3": lambda: conv_arguments(8, 3, 3, 3, bias=(8,)),
    "conv_1x1": lambda: without(conv_arguments(8, 1, 1, 1, bias=(8,)), "shortcut"),
    "conv_upsample": lambda: without(conv_arguments(4, 8, 2, 2, bias=(8,), scale=2), "shortcut"),
    "conv_time": lambda: without(conv_arguments(2, 8, 3, bias=(2, 8), frames=4), "shortcut"),
    "conv_picture": lambda: {
        **without(conv_arguments(12, 3, 3, 3, bias=(12,)), "shortcut", "normed"),
        "out": torch.zeros(2, 6, 4, 3, dtype=torch.uint8),
    },
    "channel_norm": lambda: {"x": bf16(2, 3, 2, 16), "normed": bf16(2, 3, 2, 16), "plain": bf16(2, 3, 2, 16)},
    "latent_pixels": lambda: {
        "latent": torch.randn(8, 2, 3, 2),
        "mean": torch.randn(8),
        "std": torch.randn(8),
        "out": bf16(3, 3, 2, 8),
    },
}
