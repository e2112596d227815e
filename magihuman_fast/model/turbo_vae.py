"""The Turbo VAE decoder in plain PyTorch: normalised video latents to RGB frames (MODEL.md section 8).

Activations are (1, C, T, H, W) in channels-last memory, where the norm over channels is a contiguous reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..guards.download_faults import absence
from .config import VAE_STRIDE, VAE_TIME_STRIDE
from .conv_precision import conv_precision
from .latent_statistics import LATENT_MEAN, LATENT_STD
from .turbo_vae_config import TurboVAEConfig
from .weights import check_dense, load_torch_file, read_json

CONFIG_NAME = "TurboV3-Wan22-TinyShallow_7_7.json"
CHECKPOINT_NAME = "checkpoint-340000.ckpt"
STATE_DICT_KEY = "ema_state_dict"

RMS_EPS = 1e-8
SHORTCUT_RMS_EPS = 1e-6
_MAX_NAMES = 8  # keys listed one by one in an error


@dataclass(frozen=True)
class Window:
    """One decode window: which latent frames go in, and which of the decoded frames stay.

    In: latent frames `start:stop`, context included, then `padding` copies of the last one. Out: frames
    `keep_start:keep_stop` of what comes back, which are frames `out_start:out_stop` of the clip.
    """

    start: int
    stop: int
    padding: int
    keep_start: int
    keep_stop: int
    out_start: int
    out_stop: int

    @property
    def is_first(self) -> bool:
        return self.out_start == 0

    @property
    def num_latent_frames(self) -> int:
        """Latent frames the decoder sees (8 or 9 in a long clip)."""
        return self.stop - self.start + self.padding


def num_frames(num_latent_frames: int) -> int:
    """Frames that T latent frames decode to: 4 (T - 1) + 1."""
    return VAE_TIME_STRIDE * (num_latent_frames - 1) + 1


def plan_windows(num_latent_frames: int, first_chunk: int, step: int) -> list[Window]:
    """Cut T latent frames into windows: chunks of `first_chunk`, then `step`, with one frame of context.

    The last chunk is filled up with copies of the last latent frame, whose decoded frames are dropped, so a
    window's shape depends only on where it stands: T = 32 gives windows of 8, 9, 9, 9 and 8 latent frames.
    """
    for name, value in (
        ("num_latent_frames", num_latent_frames),
        ("first_chunk", first_chunk),
        ("step", step),
    ):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    windows = []
    begin, end = 0, first_chunk
    while True:
        is_first, is_last = begin == 0, end >= num_latent_frames
        start = begin if is_first else begin - 1
        padded_stop = end if is_last else end + 1
        stop = min(padded_stop, num_latent_frames)
        out_start = 0 if is_first else num_frames(begin)
        out_stop = num_frames(min(end, num_latent_frames))
        keep_start = VAE_TIME_STRIDE * (begin - start)
        windows.append(
            Window(
                start=start,
                stop=stop,
                padding=padded_stop - stop,
                keep_start=keep_start,
                keep_stop=keep_start + out_stop - out_start,
                out_start=out_start,
                out_stop=out_stop,
            )
        )
        if is_last:
            return windows
        begin, end = end, end + step


class TurboVAE:
    """The decoder with its weights on one device; stateless between calls.

    `weights` holds the published tensors without the `decoder.` prefix, in `dtype`.
    """

    def __init__(self, config: TurboVAEConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.device = weights["conv_in.conv.weight"].device
        self.dtype = weights["conv_in.conv.weight"].dtype
        shape = (1, config.latent_channels, 1, 1, 1)
        self._mean = torch.tensor(LATENT_MEAN, dtype=torch.float32, device=self.device).view(shape)
        self._std = torch.tensor(LATENT_STD, dtype=torch.float32, device=self.device).view(shape)

    @classmethod
    def from_state_dict(
        cls,
        config_dict: Mapping[str, Any],
        state_dict: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TurboVAE:
        """Copy the `decoder.` part of a published state dict, with or without a `module.` prefix.

        Other keys are ignored. Raises one `CheckpointError` naming missing, unexpected and wrongly shaped keys.
        """
        return cls._build(TurboVAEConfig.from_dict(config_dict), state_dict, device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TurboVAE:
        """Load the published `turbo_vae/` folder: its JSON and its checkpoint's averaged weights.

        The checkpoint is mapped, not read, and copied tensor by tensor: never two models in memory. Raises
        `CheckpointError` naming the file.
        """
        config_path, checkpoint_path = Path(folder) / CONFIG_NAME, Path(folder) / CHECKPOINT_NAME
        for path in (config_path, checkpoint_path):
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: no such file, found {absence(path)}; a Turbo VAE folder holds {CONFIG_NAME} and "
                    f"{CHECKPOINT_NAME}"
                )
        config = _read_config(config_path)
        state_dict = _read_state_dict(checkpoint_path)
        try:
            return cls._build(config, state_dict, device, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint_path}: {error}") from error

    @classmethod
    def _build(
        cls,
        config: TurboVAEConfig,
        state_dict: Mapping[str, Any],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> TurboVAE:
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"Turbo VAE dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        weights = {}
        for name, tensor in _decoder_tensors(config, state_dict).items():
            layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(
                tensor.ndim, torch.contiguous_format
            )
            weight = tensor.detach().to(device=device, dtype=dtype, copy=True, memory_format=layout)
            weights[name.removeprefix("decoder.")] = weight
        return cls(config, weights)

    def decode(self, latent: Tensor) -> Tensor:
        """(48, T, h, w) float32 normalised latent to a (3, 4 (T - 1) + 1, 16 h, 16 w) float32 picture.

        The picture's range is about [-1, 1], not clamped; it lies on the model's device. Raises `InputError` for
        anything but such a latent.
        """
        return torch.cat(list(self.decode_windows(latent)), dim=1)

    def decode_frames(self, latent: Tensor, on_window: Callable[[int, int], object] | None = None) -> Tensor:
        """(48, T, h, w) latent to uint8 RGB frames (F, H, W, 3) in host memory, filled window by window.

        `on_window(done, total)` is called after each window; what it raises ends the decode.
        """
        windows = self.decode_windows(latent)
        _, t, h, w = latent.shape
        frames = torch.empty(num_frames(t), h * VAE_STRIDE, w * VAE_STRIDE, 3, dtype=torch.uint8)
        plan = self._plan(t)
        for done, (window, video) in enumerate(zip(plan, windows, strict=True), start=1):
            frames[window.out_start : window.out_stop] = to_uint8(video).cpu()
            if on_window is not None:
                on_window(done, len(plan))
        return frames

    def decode_windows(self, latent: Tensor) -> Iterator[Tensor]:
        """As `decode`, but yields (3, f, H, W) window by window, in order; the latent is checked at the call."""
        check_latent(latent, self.config.latent_channels)
        return (self._decode_window(latent, window) for window in self._plan(latent.shape[1]))

    def _plan(self, num_latent_frames: int) -> list[Window]:
        return plan_windows(num_latent_frames, self.config.first_chunk_size, self.config.step_size)

    @torch.no_grad()
    def _decode_window(self, latent: Tensor, window: Window) -> Tensor:
        z = latent[None, :, window.start : window.stop].to(self.device)
        if window.padding:
            z = torch.cat([z, z[:, :, -1:].expand(-1, -1, window.padding, -1, -1)], dim=2)
        z = (z * self._std + self._mean).to(self.dtype, memory_format=torch.channels_last_3d)
        with conv_precision(self.device, allow_tf32=False):
            video = self._forward(z, window.is_first)
        return video[:, window.keep_start : window.keep_stop].float()

    def _forward(self, z: Tensor, is_first: bool) -> Tensor:
        """Latent (1, 48, t, h, w) to picture (3, f, 16 h, 16 w), f = 4 t, three fewer in the first window."""
        x = self._conv("conv_in.conv", z)
        for j in range(self.config.num_mid_resnets):
            x = self._resnet(f"mid_block.resnets.{j}", x)
        for i, block in enumerate(self.config.up_blocks):
            name = f"up_blocks.{i}"
            if block.has_conv_in:
                x = self._resnet(f"{name}.conv_in", x)
            if block.upsample_time:
                x = self._upsample_time(f"{name}.upsamplers.0.time_conv.conv", x, is_first)
            if block.upsample_space:
                x = self._upsample_space(f"{name}.upsamplers.0.resample.1", x)
            for j in range(block.num_resnets):
                x = self._resnet(f"{name}.resnets.{j}", x, F.relu if block.upsample_space else F.silu)
        x = self._conv("conv_out.conv", F.silu(channel_rms(x, RMS_EPS), inplace=True))
        return unpatchify(x[0], self.config.patch_size)

    def _resnet(self, name: str, x: Tensor, first_act: Callable[..., Tensor] = F.silu) -> Tensor:
        h = self._conv(f"{name}.conv1.conv", first_act(channel_rms(x, RMS_EPS), inplace=True))
        h = self._conv(f"{name}.conv2.conv", F.silu(channel_rms(h, RMS_EPS), inplace=True))
        if f"{name}.conv_shortcut.conv.weight" in self.weights:
            x = self._conv(f"{name}.conv_shortcut.conv", channel_rms(x, SHORTCUT_RMS_EPS))
        return h.add_(x)

    def _upsample_time(self, name: str, x: Tensor, is_first: bool) -> Tensor:
        """(1, C, t, h, w) to (1, C, 2 t, h, w); the first window's first frame has no partner before it."""
        x = self._conv(name, x).unflatten(1, (2, -1))  # (1, split, C, t, h, w)
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # frame 2 t + split
        return x[:, :, 1:] if is_first else x

    def _upsample_space(self, name: str, x: Tensor) -> Tensor:
        """(1, C, t, h, w) to (1, C, t, 2 h, 2 w): nearest, then a 3x3 convolution of every frame."""
        frames = x.squeeze(0).transpose(0, 1)  # (t, C, h, w)
        frames = F.interpolate(frames, scale_factor=2.0, mode="nearest")
        frames = F.conv2d(frames, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=1)
        return frames.transpose(0, 1).unsqueeze(0)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        """Same-size convolution: space is padded with zeros, time with copies of the first and last frame."""
        weight = self.weights[f"{name}.weight"]
        kt, kh, kw = weight.shape[2:]
        if kt == 3:
            x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
        return F.conv3d(x, weight, self.weights[f"{name}.bias"], padding=(0, kh // 2, kw // 2))


def channel_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over channels (dim 1), without a weight; computed in float32, rounded to x's dtype."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return (x * torch.rsqrt(norm.square() / x.shape[1] + eps)).to(x.dtype)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """(rgb pw ph, f, h, w) to (rgb, f, h ph, w pw): within a colour, columns vary slower than rows."""
    x = x.unflatten(0, (-1, patch, patch))  # (rgb, pw, ph, f, h, w)
    return x.permute(0, 3, 4, 2, 5, 1).flatten(4, 5).flatten(2, 3)


def to_uint8(video: Tensor) -> Tensor:
    """(3, f, H, W) picture in [-1, 1] to uint8 (f, H, W, 3): clamped, then truncated."""
    levels = (video.float() * 0.5 + 0.5).clamp_(0, 1).mul_(255)
    return levels.permute(1, 2, 3, 0).to(torch.uint8, memory_format=torch.contiguous_format)


def check_latent(latent: Tensor, channels: int) -> None:
    """Raise `InputError` for anything but a finite float32 (channels, T, h, w)."""
    expected = f"a float32 latent of shape ({channels}, T, h, w)"
    if not isinstance(latent, Tensor):
        raise InputError(f"video latent: expected {expected}, got {type(latent).__name__}")
    if latent.ndim != 4 or latent.shape[0] != channels or 0 in latent.shape or latent.dtype != torch.float32:
        raise InputError(f"video latent: expected {expected}, got {latent.dtype} {tuple(latent.shape)}")
    num_bad = int((~torch.isfinite(latent)).sum())
    if num_bad:
        raise InputError(
            f"video latent: expected finite values, got {num_bad} NaN or infinite of {latent.numel()}"
        )


def _read_config(path: Path) -> TurboVAEConfig:
    values = read_json(path)
    try:
        return TurboVAEConfig.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_state_dict(path: Path) -> dict[str, Any]:
    checkpoint = load_torch_file(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(STATE_DICT_KEY), dict):
        got = (
            list(map(str, checkpoint))[:_MAX_NAMES]
            if isinstance(checkpoint, dict)
            else type(checkpoint).__name__
        )
        raise CheckpointError(f"{path}: expected a state dict under {STATE_DICT_KEY!r}, got {got}")
    return checkpoint[STATE_DICT_KEY]


def _decoder_tensors(config: TurboVAEConfig, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Any] = {}
    problems: list[str] = []
    for key in state_dict:
        name = str(key).removeprefix("module.")
        if name.startswith("decoder."):
            if name in found:
                problems.append(f"{name} is there twice, with and without the module. prefix")
            found[name] = state_dict[key]
    expected = config.state_dict_shapes()
    problems += [
        f"{name} is missing, expected {shape}" for name, shape in expected.items() if name not in found
    ]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    for name, shape in expected.items():
        if name not in found:
            continue
        tensor = found[name]
        if not isinstance(tensor, Tensor):
            problems.append(f"{name}: expected a tensor of shape {shape}, got {type(tensor).__name__}")
        elif not tensor.is_floating_point():
            problems.append(f"{name}: expected floating-point values, got {tensor.dtype}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if problems:
        more = f"; and {len(problems) - _MAX_NAMES} more" if len(problems) > _MAX_NAMES else ""
        raise CheckpointError(f"Turbo VAE state dict: {'; '.join(problems[:_MAX_NAMES])}{more}")
    for name in expected:
        check_dense(name, found[name], "Turbo VAE state dict")
    return {name: found[name] for name in expected}
