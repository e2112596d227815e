"""Norms, embedders, head and sampler updates, checked and launched; see `ops`."""

from __future__ import annotations

import math

import torch

from ..model import operations as reference
from ..model.config import PATCH
from ..model.dit import NORM_EPS
from .launch import Backend, check_groups, choose_backend, host_ranges, launch, output_or_new
from .tensor_checks import check_offsets, check_tensor, check_word, require, row_pitch

MAX_NORM_WIDTH = 5120
RENOISE_COLUMNS = 3  # sigma, keep, renoise
UNIPC_COLUMNS = 9  # sigma, own, last, old, prev, new, keep, current, previous
BF16, F32 = torch.bfloat16, torch.float32


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    modality_offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """out = bf16(x rsqrt(mean(x^2) + 1e-6) (1 + weight)) over rows of x.

    x (M, H) float32, weight (1 or 3, H) float32, out (M, H) bfloat16; H a multiple of 8 up to 5120.
    """
    op = "rms_norm"
    require(isinstance(x, torch.Tensor), f"{op}: x", "a torch.Tensor", type(x).__name__)
    check_tensor(f"{op}: x", x, (None, None), F32, x.device, pitched=True)
    rows, h = x.shape
    expected = f"a multiple of 8 columns from 8 to {MAX_NORM_WIDTH}"
    require(h % 8 == 0 and 8 <= h <= MAX_NORM_WIDTH, f"{op}: x", expected, h)
    check_tensor(f"{op}: weight", weight, (None, h), F32, x.device)
    groups = check_groups(op, weight, modality_offsets, rows, x.device)
    chosen = choose_backend(op, x, backend)
    out = output_or_new(f"{op}: out", out, (rows, h), BF16, x)
    if chosen == "reference":
        reference.rms_norm(x, weight, host_ranges(modality_offsets, rows), out)
    elif rows:
        tensors = {"x": x, "weight": weight, "modality_offsets": modality_offsets, "out": out}
        pitches = {"ldx": row_pitch(x), "ldout": row_pitch(out)}
        launch(chosen, op, tensors, **pitches, m=rows, h=h, groups=groups, eps=NORM_EPS, num_sms=num_sms)
    return out


def embed_text(
    text: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """out = text weightT + bias in float32: the text's rows of the residual stream, made once per prompt.

    text (Nt, C), weight (H, C), bias (H,), out (Nt, H), all float32 and contiguous; C a multiple of 8, H of 4.
    """
    op = "embed_text"
    require(isinstance(text, torch.Tensor), f"{op}: text", "a torch.Tensor", type(text).__name__)
    check_tensor(f"{op}: text", text, (None, None), F32, text.device)
    rows, channels = text.shape
    require(channels % 8 == 0 and channels > 0, f"{op}: text", "a multiple of 8 channels", channels)
    check_tensor(f"{op}: weight", weight, (None, channels), F32, text.device)
    h = len(weight)
    require(h % 4 == 0 and h > 0, f"{op}: weight", "a multiple of 4 rows", h)
    check_tensor(f"{op}: bias", bias, (h,), F32, text.device)
    chosen = choose_backend(op, text, backend)
    if out is None:
        out = text.new_empty(rows, h)
    check_tensor(f"{op}: out", out, (rows, h), F32, text.device)
    if chosen == "reference":
        reference.embed_text(text, weight, bias, out)
    elif rows:
        tensors = {"text": text, "weight": weight, "bias": bias, "out": out}
        launch(chosen, op, tensors, rows=rows, channels=channels, h=h, num_sms=num_sms)
    return out


def _check_latents(op: str, name: str, video: torch.Tensor) -> dict[str, int]:
    """The grid that the launchers take of video latents (C, T, H, W) float32."""
    require(isinstance(video, torch.Tensor), f"{op}: {name}", "a torch.Tensor", type(video).__name__)
    check_tensor(f"{op}: {name}", video, (None, None, None, None), F32, video.device)
    channels, frames, height, width = video.shape
    even = channels % 2 == 0 and height % PATCH == 0 and width % PATCH == 0 and video.numel() > 0
    require(even, f"{op}: {name}", "an even number of channels, rows and columns", tuple(video.shape))
    return {"channels": channels, "frames": frames, "height": height, "width": width}


def _check_capacity(
    op: str, offsets: torch.Tensor, rows: int, video: torch.Tensor, audio: torch.Tensor, text_rows: int | None
) -> None:
    """Offsets within M rows and, where they are on the host, within the tensors that the ranges stand for."""
    where = f"{op}: modality_offsets"
    check_offsets(where, offsets, rows, video.device)
    if offsets.device.type == "cpu":
        _, first_audio, first_text, end = offsets.tolist()
        tokens = video[0].numel() // PATCH**2
        require(first_audio == tokens, where, f"{tokens} video rows", first_audio)
        ranges = [("audio", first_text - first_audio, len(audio))]
        if text_rows is not None:
            ranges.append(("text", end - first_text, text_rows))
        for name, count, most in ranges:
            require(count <= most, where, f"at most {most} {name} rows", count)


def embed(
    video: torch.Tensor,
    audio: torch.Tensor,
    text_embedding: torch.Tensor,
    *,
    video_weight: torch.Tensor,
    video_bias: torch.Tensor,
    audio_weight: torch.Tensor,
    audio_bias: torch.Tensor,
    modality_offsets: torch.Tensor,
    out: torch.Tensor,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """The residual stream at the first layer's input: patches, embedders, text rows; all float32.

    Args:
        video: latents (C, T, H, W), cut into patches of (c, ph, pw). audio: (at least Na, Ca), Ca a multiple of 8.
        text_embedding: (at least Nt, H), from `embed_text`.
        video_weight, video_bias, audio_weight, audio_bias: (H, 4C), (H,), (H, Ca), (H,).
        out: (M, H).
    """
    op = "embed"
    grid = _check_latents(op, "video", video)
    check_tensor(f"{op}: out", out, (None, None), F32, video.device, pitched=True)
    rows, h = out.shape
    require(h % 4 == 0 and h > 0, f"{op}: out", "a multiple of 4 columns", h)
    check_tensor(f"{op}: audio", audio, (None, None), F32, video.device)
    channels = audio.shape[1]
    require(channels % 8 == 0 and channels > 0, f"{op}: audio", "a multiple of 8 channels", channels)
    check_tensor(f"{op}: text_embedding", text_embedding, (None, h), F32, video.device)
    shapes = {
        "video_weight": (video_weight, (h, PATCH**2 * grid["channels"])),
        "video_bias": (video_bias, (h,)),
        "audio_weight": (audio_weight, (h, channels)),
        "audio_bias": (audio_bias, (h,)),
    }
    for name, (tensor, shape) in shapes.items():
        check_tensor(f"{op}: {name}", tensor, shape, F32, video.device)
    _check_capacity(op, modality_offsets, rows, video, audio, len(text_embedding))
    chosen = choose_backend(op, video, backend)
    if chosen == "reference":
        weights = (video_weight, video_bias, audio_weight, audio_bias)
        reference.embed(video, audio, text_embedding, weights, host_ranges(modality_offsets, rows), out)
    else:
        tensors = {
            "video": video,
            "audio": audio,
            "text": text_embedding,
            **{name: tensor for name, (tensor, _) in shapes.items()},
            "x": out,
            "modality_offsets": modality_offsets,
        }
        counts = {"audio_rows": len(audio), "audio_channels": channels, "text_rows": len(text_embedding)}
        launch(chosen, op, tensors, **grid, **counts, ldx=row_pitch(out), m=rows, h=h, num_sms=num_sms)
    return out


def head(
    x: torch.Tensor,
    *,
    video_norm: torch.Tensor,
    audio_norm: torch.Tensor,
    video_weight: torch.Tensor,
    audio_weight: torch.Tensor,
    modality_offsets: torch.Tensor,
    video_out: torch.Tensor,
    audio_out: torch.Tensor,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final norm, projection and unpatching: the velocities, all float32. Text rows are dropped.

    Args:
        x: (M, H), H a multiple of 8. video_norm, audio_norm: (H,), offset from 1.
        video_weight: (4C, H), rows (ph, pw, c). audio_weight: (Ca, H).
        video_out: (C, T, H, W). audio_out: (at least Na, Ca), Ca a multiple of 4.
    """
    op = "head"
    require(isinstance(x, torch.Tensor), f"{op}: x", "a torch.Tensor", type(x).__name__)
    check_tensor(f"{op}: x", x, (None, None), F32, x.device, pitched=True)
    rows, h = x.shape
    require(h % 8 == 0 and h > 0, f"{op}: x", "a multiple of 8 columns", h)
    grid = _check_latents(op, "video_out", video_out)
    require(video_out.device == x.device, f"{op}: video_out", f"device {x.device}", video_out.device)
    check_tensor(f"{op}: audio_out", audio_out, (None, None), F32, x.device)
    channels = audio_out.shape[1]
    require(channels % 4 == 0 and channels > 0, f"{op}: audio_out", "a multiple of 4 channels", channels)
    shapes = {
        "video_norm": (video_norm, (h,)),
        "audio_norm": (audio_norm, (h,)),
        "video_weight": (video_weight, (PATCH**2 * grid["channels"], h)),
        "audio_weight": (audio_weight, (channels, h)),
    }
    for name, (tensor, shape) in shapes.items():
        check_tensor(f"{op}: {name}", tensor, shape, F32, x.device)
    _check_capacity(op, modality_offsets, rows, video_out, audio_out, None)
    chosen = choose_backend(op, x, backend)
    if chosen == "reference":
        norms, weights = (video_norm, audio_norm), (video_weight, audio_weight)
        reference.head(x, norms, weights, host_ranges(modality_offsets, rows), video_out, audio_out)
    else:
        tensors = {
            "x": x,
            **{name: tensor for name, (tensor, _) in shapes.items()},
            "video": video_out,
            "audio": audio_out,
            "modality_offsets": modality_offsets,
        }
        numbers = {"ldx": row_pitch(x), "audio_rows": len(audio_out), "audio_channels": channels}
        launch(chosen, op, tensors, **grid, **numbers, m=rows, h=h, eps=NORM_EPS, num_sms=num_sms)
    return video_out, audio_out


def _check_update(
    op: str,
    x: torch.Tensor,
    like: dict[str, torch.Tensor],
    table: torch.Tensor,
    columns: int,
    step: torch.Tensor,
) -> int:
    """Check x, tensors of its shape, the table and the step number; the number of steps."""
    require(isinstance(x, torch.Tensor), f"{op}: x", "a torch.Tensor", type(x).__name__)
    check_tensor(f"{op}: x", x, (None,) * x.ndim, F32, x.device)
    require(x.numel() % 4 == 0, f"{op}: x", "a multiple of 4 elements", tuple(x.shape))
    for name, tensor in like.items():
        check_tensor(f"{op}: {name}", tensor, tuple(x.shape), F32, x.device)
    check_tensor(f"{op}: table", table, (None, columns), F32, x.device)
    require(len(table) > 0, f"{op}: table", "at least one step", tuple(table.shape))
    check_word(f"{op}: step", step, 1, x.device)
    return len(table)


def renoise_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    noise: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    *,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """One distilled step in place: x = renoise noise[i] + keep (x - sigma velocity), i = step[0].

    x and velocity of one shape, noise (steps, that shape), table (steps, 3): sigma_i, keep = 1 - sigma_{i+1}, renoise =
    sigma_{i+1}; all float32. step (1,) int32; outside 0 .. steps - 1 nothing changes.
    """
    op = "renoise_step"
    steps = _check_update(op, x, {"velocity": velocity}, table, RENOISE_COLUMNS, step)
    check_tensor(f"{op}: noise", noise, (steps, *x.shape), F32, x.device)
    chosen = choose_backend(op, x, backend)
    if chosen == "reference":
        reference.renoise_step(x, velocity, noise, table, int(step))
    else:
        tensors = {"x": x, "velocity": velocity, "noise": noise, "table": table, "step": step}
        launch(chosen, op, tensors, count=x.numel(), steps=steps, num_sms=num_sms)
    return x


def clamp_image(
    video: torch.Tensor, image: torch.Tensor, *, num_sms: int = 0, backend: Backend | None = None
) -> torch.Tensor:
    """Overwrite latent frame 0 of video (C, T, H, W) with image (C, H, W), float32."""
    op = "clamp_image"
    grid = _check_latents(op, "video", video)
    expected = (grid["channels"], grid["height"], grid["width"])
    check_tensor(f"{op}: image", image, expected, F32, video.device)
    chosen = choose_backend(op, video, backend)
    if chosen == "reference":
        reference.clamp_image(video, image)
    else:
        launch(chosen, op, {"video": video, "image": image}, **grid, num_sms=num_sms)
    return video


def unipc_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    x_last: torch.Tensor,
    history: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    *,
    null_velocity: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """One UniPC step in place, i = step[0], as `sampler.UniPC` takes it.

    With v the velocity, or null_velocity + guidance (velocity - null_velocity), and m = x - sigma v:
    x' = own x + last x_last + old m_older + prev m_previous + new m; x = keep x' + current m + previous m_previous.
    A term whose factor is 0 is not read.

    Args:
        x, velocity, x_last, null_velocity: one shape, float32. x_last receives x'.
        history: (2, that shape): row i % 2 holds m_older and receives m, the other m_previous.
        table: (steps, 9) float32: sigma, own, last, old, prev, new, keep, current, previous.
        step: (1,) int32; outside 0 .. steps - 1 nothing changes.
        guidance: (steps, 1), or (steps, T) for x (C, T, H, W): one scale per latent frame.
    """
    op = "unipc_step"
    like = {"velocity": velocity, "x_last": x_last}
    if null_velocity is not None:
        like["null_velocity"] = null_velocity
    steps = _check_update(op, x, like, table, UNIPC_COLUMNS, step)
    check_tensor(f"{op}: history", history, (2, *x.shape), F32, x.device)
    both = (null_velocity is None) == (guidance is None)
    require(both, f"{op}: guidance", "null_velocity and guidance together", "one without the other")
    frames, frame_size = 1, max(4, x.numel())
    if guidance is not None:
        check_tensor(f"{op}: guidance", guidance, (steps, None), F32, x.device)
        frames = guidance.shape[1]
        if frames != 1:
            require(x.ndim == 4, f"{op}: guidance", "one column, because x is no video latent", frames)
            require(frames == x.shape[1], f"{op}: guidance", f"{x.shape[1]} columns or 1", frames)
            frame_size = math.prod(x.shape[2:])
            require(frame_size % 4 == 0, f"{op}: x", "frames of a multiple of 4 elements", frame_size)
    chosen = choose_backend(op, x, backend)
    if chosen == "reference":
        reference.unipc_step(x, velocity, x_last, history, table, int(step), null_velocity, guidance)
    else:
        tensors = {
            "x": x,
            "velocity": velocity,
            "null_velocity": null_velocity,
            "guidance": guidance,
            "x_last": x_last,
            "history": history,
            "table": table,
            "step": step,
        }
        sizes = {"count": x.numel(), "frame_size": frame_size, "frames": frames, "steps": steps}
        launch(chosen, op, tensors, **sizes, num_sms=num_sms)
    return x


def advance_step(step: torch.Tensor, *, backend: Backend | None = None) -> torch.Tensor:
    """Add 1 to the step number, step (1,) int32."""
    op = "advance_step"
    require(isinstance(step, torch.Tensor), f"{op}: step", "a torch.Tensor", type(step).__name__)
    check_word(f"{op}: step", step, 1, step.device)
    chosen = choose_backend(op, step, backend)
    if chosen == "reference":
        step += 1
    else:
        launch(chosen, op, {"step": step})
    return step
