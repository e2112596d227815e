"""The model's problem sizes, and the operations and bytes each of its parts needs at least.

Operations count a multiplication and an addition as two. Bytes count every input read once and every output written
once. Nothing here needs a GPU or allocates anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from magihuman_fast.model.config import LATENT_CHANNELS, PATCH, DiTConfig
from magihuman_fast.model.packing import window_ranges

FRAME_WINDOW = 11  # latent frames on either side, in the windowed layers of the 1080p model
# The down projection's K as the kernels see it: padded with zeros so that a row pitch is a multiple of 16 bytes.
K_MULTIPLE = 64


@dataclass(frozen=True)
class Tokens:
    """One clip: its name, the grid of video tokens (latent frames, rows, columns), and how many audio and text."""

    name: str
    grid: tuple[int, int, int]
    audio: int
    text: int

    @property
    def video(self) -> int:
        return prod(self.grid)

    @property
    def rows(self) -> int:
        return self.video + self.audio + self.text

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        return (0, self.video, self.video + self.audio, self.rows)

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """Shape of the video latents."""
        frames, rows, columns = self.grid
        return (LATENT_CHANNELS, frames, rows * PATCH, columns * PATCH)


# 5-second clips with a prompt of 400 tokens.
CLIPS = {
    clip.name: clip
    for clip in (
        Tokens("256p", (32, 8, 14), 126, 400),
        Tokens("540p", (32, 17, 30), 126, 400),
        Tokens("1080p", (32, 34, 60), 126, 400),
    )
}


def padded(k: int) -> int:
    """K rounded up to what the kernels take (13652 to 13696)."""
    return -(-k // K_MULTIPLE) * K_MULTIPLE


def gemm_flops(m: int, n: int, k: int) -> int:
    return 2 * m * n * k


def layer_linears(config: DiTConfig, layer: int) -> list[tuple[int, int]]:
    """(N, K) of one layer's linears: projection to q, k, v and gate; output; up; down."""
    hidden, width = config.hidden_size, config.intermediate(layer)
    up = width if config.is_gelu(layer) else 2 * width
    return [(config.qkvg_rows, hidden), (hidden, hidden), (up, hidden), (hidden, width)]


def linear_flops(config: DiTConfig, rows: int) -> int:
    """Operations of every layer's linears in one step."""
    layers = range(config.num_layers)
    return sum(gemm_flops(rows, n, k) for layer in layers for n, k in layer_linears(config, layer))


def attention_pairs(clip: Tokens, window: int | None = None) -> int:
    """(query, key) pairs of one head: all of them, or those within `window` latent frames."""
    if window is None:
        return clip.rows**2
    ranges = window_ranges(clip.grid, clip.rows, window)
    return sum((r.query[1] - r.query[0]) * sum(b - a for a, b in r.keys) for r in ranges)


def attention_flops(config: DiTConfig, clip: Tokens, window: int | None = None) -> int:
    """Operations of one layer's two attention products."""
    return 4 * attention_pairs(clip, window) * config.num_q_heads * config.head_dim


def step_attention_flops(config: DiTConfig, clip: Tokens, window: int | None = None) -> int:
    """Operations of every layer's attention in one step; `window` holds in the configuration's windowed layers."""
    windowed = len(config.local_attn_layers) if window is not None else 0
    full = config.num_layers - windowed
    return full * attention_flops(config, clip) + windowed * attention_flops(config, clip, window)


def attention_bytes(config: DiTConfig, clip: Tokens) -> int:
    """q, k, v read and the output written, bf16."""
    return 2 * clip.rows * config.head_dim * (2 * config.num_q_heads + 2 * config.num_kv_heads)


def gemm_bytes(m: int, n: int, k: int, groups: int, per_row: int) -> int:
    """bf16 operands read once, plus `per_row` bytes read or written per output row."""
    return 2 * (m * k + groups * n * k) + m * per_row
