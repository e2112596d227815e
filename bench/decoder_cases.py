"""The video decoder: every layer's kernel at the shapes of a window, a whole window, and a clip down to host memory.

Baselines are cuDNN's convolutions in channels-last bf16, as they are and with everything around them compiled by torch:
padding in time, bias, shortcut, the next norm and activation. Operations are those that the layer needs: an upsampler's
convolution counts 16 taps of the small picture, not 36.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log10, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import BF16, TINY, Case, Inputs, Setting, Variant, bound, compiled
from magihuman_fast.kernels import ops
from magihuman_fast.kernels.conv_weights import pack_conv, pack_time, pack_upsample
from magihuman_fast.model import turbo_vae as reference
from magihuman_fast.model.config import LATENT_CHANNELS, VAE_STRIDE
from magihuman_fast.model.turbo_vae import (
    RMS_EPS,
    Window,
    channel_rms,
    num_frames,
    plan_windows,
    to_uint8,
    unpatchify,
)
from magihuman_fast.model.turbo_vae_config import PUBLISHED_CONFIG, TurboVAEConfig
from magihuman_fast.runtime.decode_plan import Step, merged
from magihuman_fast.runtime.turbo_vae import TurboVAE, Workspace, window_plan, workspace_bytes
from timing import Call

CUDNN, CUDNN_COMPILED = "cuDNN, channels last", "cuDNN + compiled rest"


def values_of(s: Setting) -> dict[str, object]:
    """The published decoder, or a small one of its kind in a toy setting."""
    if s.config != TINY.config:
        return dict(PUBLISHED_CONFIG)
    tiny = {"decoder_block_out_channels": [8, 8, 16, 16], "decoder_layers_per_block": [1, 1, 1, 1, 1]}
    return {**PUBLISHED_CONFIG, **tiny, "first_chunk_size": 1, "step_size": 1}


def windows_of(s: Setting) -> list[Window]:
    config = TurboVAEConfig.from_dict(values_of(s))
    return plan_windows(s.clip.latent[1], config.first_chunk_size, config.step_size)


def middle_window(s: Setting) -> Window:
    """One with context on either side, or in a short clip the last one."""
    windows = windows_of(s)
    return windows[min(1, len(windows) - 1)]


def layers_of(s: Setting) -> list[Step]:
    """A window's launches, one for each that differs in shape or ending, over all of its frames."""
    plan = window_plan(TurboVAEConfig.from_dict(values_of(s)), middle_window(s), *s.clip.latent[2:])
    found: dict[tuple[Any, ...], Step] = {}
    for step in merged(plan):
        key = (step.op, step.x.shape[1:], step.channels, step.count, *ending(step))
        found.setdefault(key, step)
    return list(found.values())


def ending(step: Step) -> tuple[bool, bool, bool, bool]:
    """Which of shortcut, out, its norm, and normed there are."""
    return (step.shortcut is not None, step.out is not None, step.out_eps > 0, step.normed is not None)


def frames_written(step: Step) -> int:
    return 2 * step.count - step.drop if step.op == "conv_time" else step.count


def size_written(step: Step) -> tuple[int, int, int, int]:
    scale = 2 if step.op == "conv_upsample" else 1
    _, height, width, _ = step.x.shape
    return (frames_written(step), scale * height, scale * width, step.channels)


def layer_inputs(step: Step, s: Setting) -> Inputs:
    """Arguments of `ops.<op>` for a step, outputs included; weights as published beside them, under "published"."""
    _, height, width, channels = step.x.shape
    x = s.normal(step.length, height, width, channels, dtype=BF16)
    if step.op == "latent_pixels":
        latent, statistics = s.normal(channels, step.length, height, width), s.normal(channels)
        return {"latent": latent, "mean": statistics, "std": statistics.abs(), "out": x}
    if step.op == "channel_norm":
        given = {"x": x, "normed": torch.empty_like(x), "activation": step.activation}
        return given | ({"plain": torch.empty_like(x)} if step.out is not None else {})
    taps = {"conv_1x1": (1, 1, 1), "conv_time": (3, 1, 1), "conv_upsample": (3, 3)}.get(step.op, (3, 3, 3))
    out_channels = step.channels * (2 if step.op == "conv_time" else 1)
    weight = s.normal(out_channels, channels, *taps, scale=(prod(taps) * channels) ** -0.5, dtype=BF16)
    bias = s.normal(out_channels, scale=0.02).to(BF16).float()
    pack = {"conv_time": pack_time, "conv_upsample": pack_upsample}.get(step.op, pack_conv)
    given = {"x": x, "w": pack(weight), "bias": bias, "published": weight}
    if step.op == "conv_picture":
        size = (step.count, 2 * height, 2 * width, 3)
        return given | {"out": torch.empty(size, dtype=torch.uint8, device=s.device), "first": step.first}
    if step.op == "conv_time":
        given |= {"bias": bias.view(2, -1), "drop": step.drop}
    if step.shortcut is not None:
        given["shortcut"] = s.normal(*size_written(step), dtype=BF16)
    for name, pixels in (("out", step.out), ("normed", step.normed)):
        if pixels is not None:
            given[name] = torch.empty(size_written(step), dtype=BF16, device=s.device)
    return given | {"out_eps": step.out_eps, "activation": step.activation}


def calls_of_wide_tiles(s: Setting) -> Iterator[Call]:
    """conv_3x3 in its tiles of 128 and of 256 channels, which no toy decoder has, on a few small pictures."""
    for channels in (104, 200):
        x, shortcut = (s.normal(3, 10, 18, channels, dtype=BF16) for _ in range(2))
        given = {
            "x": x,
            "w": s.normal(channels, 3, 3, 3, channels, scale=(27 * channels) ** -0.5, dtype=BF16),
            "bias": s.normal(channels),
            "shortcut": shortcut,
            "out": torch.empty_like(x),
            "normed": torch.empty_like(x),
        }
        yield bound("conv_3x3", s, given)


def layer_bytes(step: Step) -> int:
    """Input, shortcut, weights and outputs once each."""
    _, height, width, channels = step.x.shape
    read = 2 * step.length * height * width * channels
    if step.op == "latent_pixels":
        return 3 * read  # float32 in
    if step.op == "conv_picture":
        return read + 12 * step.count * height * width + 2 * 27 * channels * 12
    written = 2 * prod(size_written(step))
    weights = step.flops // max(step.count * height * width, 1)
    return (
        read
        + weights
        + written * sum((step.shortcut is not None, step.out is not None, step.normed is not None))
    )


def convolve(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (1, C, T, H, W) channels last, by torch; published weights."""
    if op == "conv_upsample":
        frames = F.interpolate(x[0].transpose(0, 1), scale_factor=2.0, mode="nearest")
        return F.conv2d(frames, weight, bias, padding=1).transpose(0, 1).unsqueeze(0)
    kt, kh, kw = weight.shape[2:]
    if kt == 3:
        x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    y = F.conv3d(x, weight, bias, padding=(0, kh // 2, kw // 2))
    return y.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3) if op == "conv_time" else y


def by_torch(step: Step, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None) -> list[Tensor]:
    """All that a step does, on (1, C, T, H, W)."""
    act = {"silu": F.silu, "relu": F.relu, "none": lambda v: v}[step.activation]
    if step.op == "channel_norm":
        v = x
    else:
        v = convolve(step.op, x, weight, bias)
        if step.op == "conv_picture":
            return [to_uint8(unpatchify(v[0, :, step.first : step.first + step.count], 2))]
        v = v[:, :, step.drop :] if step.drop else v
        v = v if shortcut is None else v + shortcut
    found = []
    if step.out is not None:
        found.append(channel_rms(v, step.out_eps) if step.out_eps > 0 else v)
    if step.normed is not None:
        found.append(act(channel_rms(v, RMS_EPS)))
    return found


def torch_inputs(step: Step, s: Setting) -> tuple[Tensor, ...]:
    """x, weight, bias and shortcut for `by_torch`."""
    given = layer_inputs(step, s)

    def channels_last(pixels: Tensor) -> Tensor:
        return pixels.permute(3, 0, 1, 2).unsqueeze(0)

    x = channels_last(given["x"])
    if step.op == "channel_norm":
        return x, x.new_empty(0), x.new_empty(0), None  # type: ignore[return-value]
    weight: Tensor = given["published"]
    layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    shortcut = channels_last(given["shortcut"]) if "shortcut" in given else None
    return x, weight.contiguous(memory_format=layout), given["bias"].flatten().to(BF16), shortcut  # type: ignore[return-value]


def layer_case(step: Step, s: Setting) -> Case:
    def subject() -> Call:
        given = {name: value for name, value in layer_inputs(step, s).items() if name != "published"}
        return bound(step.op, s, given)

    def alone() -> Call:
        x, weight, bias, _ = torch_inputs(step, s)
        return lambda: convolve(step.op, x, weight, bias)

    def with_rest() -> Call:
        run, given = compiled(lambda *arguments: by_torch(step, *arguments), s.device), torch_inputs(step, s)
        return lambda: run(*given)

    variants = [Variant(s.subject, subject)]
    if step.op != "latent_pixels":
        variants.append(Variant("compiled" if step.op == "channel_norm" else CUDNN_COMPILED, with_rest))
    if step.op.startswith("conv_"):
        variants.append(Variant(CUDNN, alone))
    frames, height, width, channels = (step.length, *step.x.shape[1:])
    parts = ("shortcut", "raw", "plain norm", "norm")
    _, out, plain, normed = ending(step)
    kept = zip(parts, (step.shortcut is not None, out and not plain, plain, normed), strict=True)
    words = ", ".join(word for word, there in kept if there)
    shape = f"{s.clip.name}: {channels} -> {step.channels} channels, {frames} x {height} x {width}"
    return Case(
        step.op, f"{shape}, {words}" if words else shape, step.flops, layer_bytes(step), tuple(variants)
    )


def decoder_layer_cases(s: Setting) -> Iterator[Case]:
    """Each kernel of a window, at each shape and ending that it has there."""
    for step in layers_of(s):
        yield layer_case(step, s)


# --- whole windows and clips ----------------------------------------------------------------------------------


def decoder(s: Setting) -> reference.TurboVAE:
    """Random weights of unit gain in bf16."""
    values = values_of(s)
    shapes = TurboVAEConfig.from_dict(values).state_dict_shapes()
    weights = {
        name: s.normal(*shape, scale=prod(shape[1:]) ** -0.5, dtype=BF16) for name, shape in shapes.items()
    }
    return reference.TurboVAE.from_state_dict(values, weights, device=s.device, dtype=BF16)


def window_flops(s: Setting) -> int:
    config = TurboVAEConfig.from_dict(values_of(s))
    return sum(step.flops for step in window_plan(config, middle_window(s), *s.clip.latent[2:]))


def decode_window_cases(s: Setting) -> Iterator[Case]:
    """One window from latents to frames."""
    window, (height, width) = middle_window(s), s.clip.latent[2:]
    config = TurboVAEConfig.from_dict(values_of(s))

    def by_kernels() -> Call:
        vae = TurboVAE(decoder(s), s.backend)
        latent = s.normal(*s.clip.latent)
        size = (window.keep_stop - window.keep_start, VAE_STRIDE * height, VAE_STRIDE * width, 3)
        frames = torch.empty(size, dtype=torch.uint8, device=s.device)
        space = Workspace(workspace_bytes(config, [window], height, width), size, torch.device(s.device))
        return lambda: vae.run_window(latent, window, frames, space)

    def by_pytorch(compile_it: bool) -> Call:
        vae = decoder(s)
        z = s.normal(1, window.num_latent_frames, height, width, LATENT_CHANNELS, dtype=BF16)
        z = z.permute(0, 4, 1, 2, 3)
        forward = compiled(vae._forward, s.device) if compile_it else vae._forward
        return lambda: to_uint8(forward(z, window.is_first)[:, window.keep_start : window.keep_stop])

    subject = Variant(s.subject, by_kernels if s.backend != "reference" else lambda: by_pytorch(False))
    variants = (
        subject,
        Variant(CUDNN, lambda: by_pytorch(False)),
        Variant("cuDNN, compiled", lambda: by_pytorch(True)),
    )
    shape = f"{s.clip.name}: {window.num_latent_frames} latent frames of {height} x {width}"
    # Its bytes are the activations between the layers, which a better version would not move: not counted.
    yield Case("decode_window", shape, window_flops(s), 0, variants, footprint=1 << 30)


def decode_clip_cases(s: Setting) -> Iterator[Case]:
    """All windows of a clip, to frames in host memory: what a user waits for. Timed on the host."""

    def make(backend: ops.Backend) -> Call:
        vae, latent = TurboVAE(decoder(s), backend), s.normal(*s.clip.latent)
        return lambda: vae.decode_frames(latent)

    frames = num_frames(s.clip.latent[1])
    variants = (Variant(s.subject, lambda: make(s.backend)), Variant("PyTorch", lambda: make("reference")))
    yield Case(
        "decode_clip", f"{s.clip.name}: {frames} frames", 0, 0, variants, footprint=1 << 30, on_host=True
    )


def decoder_quality(s: Setting, latent_frames: int) -> dict[str, float]:
    """Errors against the float32 decoder of the kernels and of bf16 PyTorch, PSNR of frames in dB, peak memory."""
    model = decoder(s)
    exact = reference.TurboVAE(model.config, {name: weight.float() for name, weight in model.weights.items()})
    latent = s.normal(LATENT_CHANNELS, latent_frames, *s.clip.latent[2:])
    truth = exact.decode(latent)
    wanted = to_uint8(truth).float()
    found: dict[str, float] = {}
    for name, backend in (("kernels", s.backend), ("PyTorch bf16", "reference")):
        vae = TurboVAE(model, backend)  # type: ignore[arg-type]
        if s.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        frames = vae.decode_frames(latent)
        if s.device == "cuda":
            found[f"{name}: peak bytes beside the weights"] = torch.cuda.max_memory_allocated() - before
        error = (vae.decode(latent) - truth).norm() / truth.norm()
        square = (frames.to(s.device).float() - wanted).square().mean().item()
        found |= {
            f"{name}: relative error": error.item(),
            f"{name}: PSNR": 10 * log10(255**2 / max(square, 1e-9)),
        }
    return found
