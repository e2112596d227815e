"""Tokens: patches, coordinates, rotary tables, modality ranges and frame windows (MODEL.md sections 2-4).

Tokens of one sample are always ordered video, audio, text, so everything that depends on the modality is three
contiguous row ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch

from ..errors import InputError
from .config import MAX_TEXT_TOKENS, PATCH

CoordsStyle = Literal["v1", "v2"]


@dataclass(frozen=True)
class PackedTokens:
    """One sample's tokens, ready for the embedders.

    video: (Nv, 192), audio: (Na, 64), text: (Nt, C), float32. rope: (L, 2B) float32, sines then cosines.
    offsets: the row ranges (0, Nv, Nv + Na, L). grid: latent frames, patch rows, patch columns.
    """

    video: torch.Tensor
    audio: torch.Tensor
    text: torch.Tensor
    rope: torch.Tensor
    offsets: tuple[int, int, int, int]
    grid: tuple[int, int, int]


def patchify(video: torch.Tensor) -> torch.Tensor:
    """Latents (C, T, H, W) to tokens (T*H/2*W/2, 4C): order t, h, w; channels (c, ph, pw), c slowest."""
    c, t, h, w = video.shape
    x = video.reshape(c, t, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(1, 2, 4, 0, 3, 5).reshape(-1, c * PATCH * PATCH)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Predicted tokens (T*h*w, 4C) to latents (C, T, 2h, 2w): channels (ph, pw, c), c fastest, unlike `patchify`."""
    t, h, w = grid
    x = tokens.reshape(t, h, w, PATCH, PATCH, -1)
    return x.permute(5, 0, 1, 3, 2, 4).reshape(-1, t, h * PATCH, w * PATCH)


def _line(count: int, start: int, size: int, ref: int, device: torch.device) -> torch.Tensor:
    """Coordinates of tokens on the time axis alone (audio, text)."""
    rows = torch.ones(count, 9, device=device)
    rows[:, 0] = torch.arange(start, start + count, device=device)
    rows[:, 1:3] = 0
    rows[:, 3] = size
    rows[:, 6] = ref
    return rows


def coordinates(
    grid: tuple[int, int, int],
    num_audio: int,
    num_text: int,
    style: CoordsStyle,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(L, 9) float32 rows (t, h, w, T, H, W, refT, refH, refW): `v2` at 256p, `v1` in super-resolution."""
    device = torch.device(device)
    t, h, w = grid
    position = torch.cartesian_prod(
        *(torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    ).reshape(-1, 3)
    size = torch.tensor([t, h, w, t, h, w], device=device, dtype=torch.float32)
    video = torch.cat([position, size.expand(len(position), 6)], dim=1)
    if style == "v2":
        audio = _line(num_audio, 0, num_audio, (num_audio - 1) // 4 + 1, device)
        text = _line(num_text, -num_text, num_text, 1, device)
    else:
        audio = _line(num_audio, 0, num_audio, t, device)
        text = _line(num_text, 0, num_text, 2, device)
    return torch.cat([video, audio, text])


def rope_table(coords: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    """Rotary table (L, 6B) float32 of coordinates (L, 9) and B frequency bands: 3B sines, then 3B cosines.

    Raises:
        InputError: an axis has size 1 but a reference size above 1 (with `v1` that is a text of one token).
    """
    position, size, ref = coords.float().unflatten(1, (3, 3)).unbind(1)
    scale = (ref - 1) / (size - 1)
    scale = torch.where((ref == 1) & (size == 1), 1.0, scale)
    if not torch.isfinite(scale).all():
        raise InputError(
            "rotary table: an axis of size 1 cannot be stretched to a reference size above 1; "
            "super-resolution needs at least 2 text tokens and sound as long as the picture"
        )
    centre = (size - 1) / 2
    centre[:, 0] = 0  # time counts from the first frame, space from the middle
    angle = ((position - centre) * scale).unsqueeze(-1) * bands.float()
    angle = angle.flatten(1)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _require(ok: bool, what: str, expected: str, got: object) -> None:
    if not ok:
        raise InputError(f"{what}: expected {expected}, got {got}")


def check_inputs(
    video: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor,
    device: torch.device,
    channels: tuple[int, int, int],
) -> None:
    """Refuse latents and text that do not make tokens of `channels` (192, 64, C) on `device`.

    Raises:
        InputError: a shape, dtype or device that does not fit, naming expected and got.
    """
    inputs = (("video", video, 4), ("audio", audio, 2), ("text", text, 2))
    for name, tensor, ndim in inputs:
        _require(isinstance(tensor, torch.Tensor), name, "a torch.Tensor", type(tensor).__name__)
        _require(tensor.ndim == ndim, name, f"{ndim} dimensions", tuple(tensor.shape))
        _require(tensor.is_floating_point(), name, "a floating-point dtype", tensor.dtype)
        _require(tensor.device == device, name, f"device {device}", tensor.device)
        _require(tensor.numel() > 0, name, "at least one token", tuple(tensor.shape))
    c, _, h, w = video.shape
    _require(
        c * PATCH * PATCH == channels[0], "video", f"{channels[0] // PATCH**2} channels", tuple(video.shape)
    )
    _require(h % PATCH == 0 and w % PATCH == 0, "video", "even latent height and width", tuple(video.shape))
    _require(audio.shape[1] == channels[1], "audio", f"{channels[1]} channels", tuple(audio.shape))
    _require(text.shape[1] == channels[2], "text", f"{channels[2]} channels", tuple(text.shape))
    _require(len(text) <= MAX_TEXT_TOKENS, "text", f"at most {MAX_TEXT_TOKENS} tokens", len(text))


def pack(
    video: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor,
    bands: torch.Tensor,
    *,
    coords: CoordsStyle,
    channels: tuple[int, int, int],
) -> PackedTokens:
    """Check one sample's inputs and lay them out as tokens.

    Args:
        video: latents (48, T, H, W), H and W even. audio: latents (Na, 64). text: encodings (Nt, C).
        bands: rotary frequencies (B,). coords: coordinate style. channels: (192, 64, C) as the model expects them.

    Raises:
        InputError: a shape, dtype or device that does not fit, naming expected and got.
    """
    _require(coords in get_args(CoordsStyle), "coords", "'v1' or 'v2'", repr(coords))
    check_inputs(video, audio, text, bands.device, channels)
    _, t, h, w = video.shape
    grid = (t, h // PATCH, w // PATCH)
    num_video = t * grid[1] * grid[2]
    rope = rope_table(coordinates(grid, len(audio), len(text), coords, bands.device), bands)
    return PackedTokens(
        video=patchify(video.float()),
        audio=audio.float(),
        text=text.float(),
        rope=rope,
        offsets=(0, num_video, num_video + len(audio), len(rope)),
        grid=grid,
    )


@dataclass(frozen=True)
class WindowRange:
    """Query rows [query[0], query[1]) attend to the union of the disjoint key intervals `keys`, in one softmax."""

    query: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


def window_ranges(grid: tuple[int, int, int], num_tokens: int, window: int) -> list[WindowRange]:
    """Frame-window attention as row ranges (MODEL.md section 4).

    Video tokens of latent frame i see frames [i - window, i + window], clipped, and every audio and text token; audio
    and text tokens see everything. Neighbouring frames with equal key ranges share one entry.
    """
    frames, per_frame = grid[0], grid[1] * grid[2]
    num_video = frames * per_frame
    ranges: list[WindowRange] = []
    for i in range(frames):
        near = (max(0, i - window) * per_frame, min(frames, i + window + 1) * per_frame)
        keys = (near, (num_video, num_tokens))
        if ranges and ranges[-1].keys == keys:
            ranges[-1] = WindowRange((ranges[-1].query[0], (i + 1) * per_frame), keys)
        else:
            ranges.append(WindowRange((i * per_frame, (i + 1) * per_frame), keys))
    ranges.append(WindowRange((num_video, num_tokens), ((0, num_tokens),)))
    return ranges


def rows_of(offsets: Sequence[int]) -> list[tuple[int, int]]:
    """The row range of each modality: [(0, Nv), (Nv, Nv + Na), (Nv + Na, L)]."""
    return list(pairwise(offsets))
