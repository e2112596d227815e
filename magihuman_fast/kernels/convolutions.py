"""The video decoder's operations, checked and launched; see `ops`.

Pixels are (frames, H, W, C) bfloat16, C a multiple of 8. Frame t of a clip lies at index t % frames of its buffer, so a
buffer may hold all of a clip or its last few frames only. Weights are packed by `conv_weights`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from ..model import convolutions as reference
from ..model.turbo_vae import RMS_EPS, SHORTCUT_RMS_EPS
from .launch import Backend, choose_backend, launch
from .tensor_checks import check_disjoint, check_tensor, require

Activation = Literal["none", "silu", "relu"]
PICTURE_CHANNELS = 12
MAX_FUSED_CHANNELS = 256  # a convolution's epilogue normalises up to so many
MAX_CHANNELS = 512  # that any norm of ours takes
BF16, F32 = torch.bfloat16, torch.float32


class PixelOutputs(NamedTuple):
    """What a convolution wrote."""

    out: torch.Tensor | None
    normed: torch.Tensor | None


class ConvOptions(TypedDict, total=False):
    """What every convolution takes by name.

    v = bf16(conv(x) + bias), then bf16(v + shortcut) where there is one; frames `first` .. `first + count - 1` are
    computed of a clip of `length` frames (defaults: all frames of x). Outputs and shortcut have the result's (H, W, C)
    and room for the frames computed, x for those read. The shortcut may be one of the outputs; else none shares memory:

    out: v, or with out_eps > 0 bf16(v / rms(v)).
    normed: bf16(act(bf16(v / rms(v)))), rms(v) = sqrt(mean over channels of v^2 + eps); as out_eps: up to 256 channels.
    Without any of them a new `out` is made.
    """

    first: int
    count: int
    length: int
    shortcut: Tensor | None
    out: Tensor | None
    out_eps: float
    normed: Tensor | None
    eps: float
    activation: Activation
    num_sms: int
    backend: Backend | None


class _Clip(NamedTuple):
    """Frames first .. first + number - 1 of a clip of `length`."""

    first: int
    number: int
    length: int


def check_pixels(where: str, x: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """A contiguous bfloat16 (frames, H, W, C) of at least one frame and pixel."""
    check_tensor(where, x, shape, BF16, device)
    require(x.numel() > 0 and x.shape[3] % 8 == 0, where, "pixels of 8 n channels", tuple(x.shape))


def _check_apart(op: str, **buffers: Tensor | None) -> None:
    """Outputs must not share memory, nor with what is still read; the last of `buffers` may be one of the others."""
    given = [(name, tensor) for name, tensor in buffers.items() if tensor is not None]
    for i, (name, tensor) in enumerate(given):
        for other, earlier in given[:i]:
            last = name == list(buffers)[-1]
            same = tensor.data_ptr() == earlier.data_ptr() and tensor.shape == earlier.shape
            if not (last and same):
                check_disjoint(f"{op}: {name}", tensor, earlier, other)


def _check_room(op: str, name: str, tensor: Tensor | None, frames: int) -> None:
    """A shorter buffer would hold two frames in one place."""
    if tensor is not None:
        require(len(tensor) >= frames, f"{op}: {name}", f"room for {frames} frames", len(tensor))


def _frames_read(clip: _Clip, time_taps: int) -> int:
    """How many frames of x a convolution reads."""
    reach = time_taps // 2
    last = min(clip.first + clip.number - 1 + reach, clip.length - 1)
    return last - max(clip.first - reach, 0) + 1


def _check_clip(op: str, x: Tensor, options: ConvOptions) -> _Clip:
    length = options.get("length", len(x))
    first = options.get("first", 0)
    count = options.get("count", length - first)
    for name, value, least in (("length", length, 1), ("first", first, 0), ("count", count, 1)):
        require(isinstance(value, int) and value >= least, f"{op}: {name}", f"at least {least}", repr(value))
    require(first + count <= length, f"{op}: count", f"frames of a clip of {length}", f"{first} + {count}")
    return _Clip(first, count, length)


def _check_weights(op: str, x: Tensor, w: Tensor, shape: tuple[int | None, ...]) -> None:
    require(isinstance(x, torch.Tensor), f"{op}: x", "a torch.Tensor", type(x).__name__)
    check_pixels(f"{op}: x", x, (None,) * 4, x.device)
    check_tensor(f"{op}: w", w, (*shape, x.shape[3]), BF16, x.device)
    require(w.numel() > 0, f"{op}: w", "at least one channel", tuple(w.shape))


def _convolution(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    channels: int,
    scale: int,
    compute: Any,
    options: ConvOptions,
    *,
    taps: int = 1,
    frames: tuple[int, int] | None = None,
    **numbers: int,
) -> PixelOutputs:
    """Check the rest and run. `compute(clip)` is the reference's result; `taps`: in time; `frames`: first and number of
    those written, where they are not the clip's."""
    unknown = set(options) - set(ConvOptions.__annotations__)
    require(not unknown, f"{op}: options", f"some of {sorted(ConvOptions.__annotations__)}", sorted(unknown))
    clip = _check_clip(op, x, options)
    chosen = choose_backend(op, x, options.get("backend"))
    first, count = (clip.first, clip.number) if frames is None else frames
    size = (scale * x.shape[1], scale * x.shape[2], channels)
    require(channels % 8 == 0, f"{op}: w", "a multiple of 8 output channels", channels)
    out, normed, shortcut = options.get("out"), options.get("normed"), options.get("shortcut")
    out_eps, eps = options.get("out_eps", 0.0), options.get("eps", RMS_EPS)
    activation = options.get("activation", "silu")
    require(
        activation in reference.ACTIVATIONS,
        f"{op}: activation",
        f"one of {reference.ACTIVATIONS}",
        activation,
    )
    require(eps > 0, f"{op}: eps", "a positive number", eps)
    require(out_eps >= 0, f"{op}: out_eps", "0 or a positive number", out_eps)
    if out is None and normed is None:
        out = torch.empty((first + count, *size), dtype=BF16, device=x.device)
    for name, tensor in (("shortcut", shortcut), ("out", out), ("normed", normed)):
        if tensor is not None:
            check_pixels(f"{op}: {name}", tensor, (None, *size), x.device)
            _check_room(op, name, tensor, count)
            check_disjoint(f"{op}: {name}", tensor, x, "x")
    _check_room(op, "x", x, _frames_read(clip, taps))
    _check_apart(op, out=out, normed=normed, shortcut=shortcut)
    fused = normed is not None or out_eps > 0
    expected = f"at most {MAX_FUSED_CHANNELS} channels beside normed or out_eps"
    require(not fused or channels <= MAX_FUSED_CHANNELS, f"{op}: w", expected, channels)
    if chosen == "reference":
        reference.finish(compute(clip), first, shortcut, out, out_eps, normed, eps, activation)
    else:
        buffers = {"x": x, "shortcut": shortcut, "out": out, "normed": normed}
        launch(
            chosen,
            op,
            {**buffers, "w": w, "bias": bias},
            **{f"{name}_frames": 0 if t is None else len(t) for name, t in buffers.items()},
            **_sizes(x, clip),
            channels=channels,
            out_eps=out_eps,
            eps=eps,
            activation=reference.ACTIVATIONS.index(activation),
            num_sms=options.get("num_sms", 0),
            **numbers,
        )
    return PixelOutputs(out, normed)


def _sizes(x: Tensor, clip: _Clip) -> dict[str, int]:
    """Height, width, channels of the input, and the frames computed."""
    return dict(zip(("height", "width", "in_channels"), x.shape[1:], strict=True)) | {
        "first": clip.first,
        "count": clip.number,
        "length": clip.length,
    }


def conv_3x3(x: Tensor, w: Tensor, bias: Tensor, **options: Unpack[ConvOptions]) -> PixelOutputs:
    """3x3x3 convolution, or 3x3 of every frame: w (out, 3 or 1, 3, 3, in) bfloat16, bias (out) float32."""
    op = "conv_3x3"
    _check_weights(op, x, w, (None, None, 3, 3))
    check_tensor(f"{op}: bias", bias, (len(w),), F32, x.device)
    require(w.shape[1] in (1, 3), f"{op}: w", "1 or 3 time taps", tuple(w.shape))

    def compute(clip: _Clip) -> Tensor:
        return reference.convolve(x, w, bias, *clip)

    taps = w.shape[1]
    return _convolution(op, x, w, bias, len(w), 1, compute, options, taps=taps, time_taps=taps)


def conv_1x1(x: Tensor, w: Tensor, bias: Tensor, **options: Unpack[ConvOptions]) -> PixelOutputs:
    """1x1x1 convolution: w (out, 1, 1, 1, in) bfloat16, bias (out) float32."""
    op = "conv_1x1"
    _check_weights(op, x, w, (None, 1, 1, 1))
    check_tensor(f"{op}: bias", bias, (len(w),), F32, x.device)

    def compute(clip: _Clip) -> Tensor:
        return reference.convolve(x, w, bias, *clip)

    return _convolution(op, x, w, bias, len(w), 1, compute, options)


def conv_upsample(x: Tensor, w: Tensor, bias: Tensor, **options: Unpack[ConvOptions]) -> PixelOutputs:
    """Nearest-neighbour doubling of H and W, then 3x3 of every frame, as four 2x2 convolutions of x.

    w (4, out, 2, 2, in) bfloat16, from `conv_weights.pack_upsample`; bias (out) float32.
    """
    op = "conv_upsample"
    _check_weights(op, x, w, (4, None, 2, 2))
    check_tensor(f"{op}: bias", bias, (w.shape[1],), F32, x.device)

    def compute(clip: _Clip) -> Tensor:
        return reference.upsample(x, w, bias, clip.first, clip.number)

    return _convolution(op, x, w, bias, w.shape[1], 2, compute, options)


def conv_time(
    x: Tensor, w: Tensor, bias: Tensor, *, drop: int = 0, **options: Unpack[ConvOptions]
) -> PixelOutputs:
    """3x1x1 convolution to twice the channels, whose halves become frames 2 t - drop and 2 t + 1 - drop.

    w (2, out, 3, in) bfloat16, bias (2, out) float32. drop 0 or 1: with 1, frame -1 is left out (the first window).
    """
    op = "conv_time"
    _check_weights(op, x, w, (2, None, 3))
    check_tensor(f"{op}: bias", bias, tuple(w.shape[:2]), F32, x.device)
    require(drop in (0, 1), f"{op}: drop", "0 or 1", drop)
    clip = _check_clip(op, x, options)
    start = max(2 * clip.first - drop, 0)

    def compute(clip: _Clip) -> Tensor:
        return reference.double_time(x, w, bias, *clip, drop)

    frames = (start, 2 * (clip.first + clip.number) - drop - start)
    return _convolution(op, x, w, bias, w.shape[1], 1, compute, options, taps=3, frames=frames, drop=drop)


def conv_picture(
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    length: int | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """The last 3x3x3 convolution, to 2 x 2 pixels of red, green and blue: y = bf16(conv(x) + bias).

    w (12, 3, 3, 3, in) bfloat16, channels (rgb, pw, ph); bias (12) float32. out: uint8 (n, 2 H, 2 W, 3),
    clamp(y / 2 + 1/2, 0, 1) 255 truncated, or float32 (3, n, 2 H, 2 W), y; for frames `first` .. `first + n - 1` of a
    clip of `length` frames (default: all of x).
    """
    op = "conv_picture"
    _check_weights(op, x, w, (PICTURE_CHANNELS, 3, 3, 3))
    check_tensor(f"{op}: bias", bias, (PICTURE_CHANNELS,), F32, x.device)
    require(isinstance(out, torch.Tensor), f"{op}: out", "a torch.Tensor", type(out).__name__)
    is_bytes = out.dtype == torch.uint8
    height, width = 2 * x.shape[1], 2 * x.shape[2]
    shape = (None, height, width, 3) if is_bytes else (3, None, height, width)
    check_tensor(f"{op}: out", out, shape, torch.uint8 if is_bytes else F32, x.device)
    count = out.shape[0 if is_bytes else 1]
    clip = _check_clip(
        op, x, {"first": first, "count": count, "length": len(x) if length is None else length}
    )
    _check_room(op, "x", x, _frames_read(clip, 3))
    check_disjoint(f"{op}: out", out, x, "x")
    chosen = choose_backend(op, x, backend)
    if chosen == "reference":
        y = reference.picture(x, w, bias, *clip)
        out.copy_(reference.frames_of(y) if is_bytes else y)
    else:
        wanted = {"frames": out if is_bytes else None, "picture": None if is_bytes else out}
        tensors = {"x": x, "w": w, "bias": bias, **wanted}
        launch(chosen, op, tensors, x_frames=len(x), **_sizes(x, clip), num_sms=num_sms)
    return out


def channel_norm(
    x: Tensor,
    normed: Tensor,
    *,
    eps: float = RMS_EPS,
    activation: Activation = "silu",
    plain: Tensor | None = None,
    plain_eps: float = SHORTCUT_RMS_EPS,
    first: int = 0,
    count: int | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """normed = bf16(act(bf16(x / rms(x)))) of frames `first` .. `first + count - 1` (default: to x's last one).

    At most 512 channels. plain: bf16(x / rms(x)) with `plain_eps` beside it. x and normed may be one tensor.
    """
    op = "channel_norm"
    require(isinstance(x, torch.Tensor), f"{op}: x", "a torch.Tensor", type(x).__name__)
    check_pixels(f"{op}: x", x, (None,) * 4, x.device)
    channels = x.shape[3]
    require(channels <= MAX_CHANNELS, f"{op}: x", f"at most {MAX_CHANNELS} channels", channels)
    chosen = choose_backend(op, x, backend)
    check_pixels(f"{op}: normed", normed, (None, *x.shape[1:]), x.device)
    if plain is not None:
        check_pixels(f"{op}: plain", plain, (None, *x.shape[1:]), x.device)
    require(
        activation in reference.ACTIVATIONS,
        f"{op}: activation",
        f"one of {reference.ACTIVATIONS}",
        activation,
    )
    for name, value in (("eps", eps), ("plain_eps", plain_eps)):
        require(value > 0, f"{op}: {name}", "a positive number", value)
    count = len(x) - first if count is None else count
    for name, value, least in (("first", first, 0), ("count", count, 1)):
        require(isinstance(value, int) and value >= least, f"{op}: {name}", f"at least {least}", repr(value))
    for name, tensor in (("x", x), ("normed", normed), ("plain", plain)):
        _check_room(op, name, tensor, count)
    _check_apart(op, plain=plain, normed=normed, x=x)
    if chosen == "reference":
        reference.channel_norm(x, first, count, normed, eps, activation, plain, plain_eps)
    else:
        buffers = {"x": x, "normed": normed, "plain": plain}
        launch(
            chosen,
            op,
            buffers,
            **{f"{name}_frames": 0 if t is None else len(t) for name, t in buffers.items()},
            height=x.shape[1],
            width=x.shape[2],
            channels=channels,
            first=first,
            count=count,
            eps=eps,
            plain_eps=plain_eps,
            activation=reference.ACTIVATIONS.index(activation),
            num_sms=num_sms,
        )
    return normed


def latent_pixels(
    latent: Tensor,
    mean: Tensor,
    std: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """out = bf16(latent std + mean) as pixels: frames `first` on of latent (C, T, H, W) float32, then its last again.

    mean, std (C) float32; out (n, H, W, C) bfloat16.
    """
    op = "latent_pixels"
    require(isinstance(latent, torch.Tensor), f"{op}: latent", "a torch.Tensor", type(latent).__name__)
    check_tensor(f"{op}: latent", latent, (None,) * 4, F32, latent.device)
    channels, frames, height, width = latent.shape
    require(latent.numel() > 0, f"{op}: latent", "at least one value", tuple(latent.shape))
    chosen = choose_backend(op, latent, backend)
    check_tensor(f"{op}: mean", mean, (channels,), F32, latent.device)
    check_tensor(f"{op}: std", std, (channels,), F32, latent.device)
    check_pixels(f"{op}: out", out, (None, height, width, channels), latent.device)
    require(
        isinstance(first, int) and 0 <= first < frames, f"{op}: first", f"a frame below {frames}", repr(first)
    )
    if chosen == "reference":
        reference.latent_pixels(latent, mean, std, first, out)
    else:
        launch(
            chosen,
            op,
            {"latent": latent, "mean": mean, "std": std, "pixels": out},
            channels=channels,
            frames=frames,
            height=height,
            width=width,
            first=first,
            count=len(out),
            num_sms=num_sms,
        )
    return out
