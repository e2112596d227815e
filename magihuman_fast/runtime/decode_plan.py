"""What the Turbo VAE decoder launches for one window, and where every tensor lies: a pure function of the sizes.

Three regions of memory hold everything. "stream" holds x, raw: the input of the next shortcut; "normed" the normalised
and activated input of the next convolution; "scratch" what lives shorter. A resnet goes through its frames in chunks,
so that between its convolutions only a ring of chunk + 2 frames exists: at 1920x1088, 128 channels are 4.8 GB.

Frames are overwritten as soon as nothing reads them. With chunk a .. b - 1 the first convolution has run up to frame b
and next reads from frame b on; the second writes a .. b - 1 over them, in no more bytes than they had, since widths
never grow towards the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from ..kernels.convolutions import MAX_CHANNELS, MAX_FUSED_CHANNELS
from ..model.turbo_vae import SHORTCUT_RMS_EPS
from ..model.turbo_vae_config import TurboVAEConfig

Region = Literal["stream", "normed", "scratch"]
REGIONS: tuple[Region, ...] = ("stream", "normed", "scratch")
# Of ring and shortcut input together; a chunk has at least MIN_CHUNK frames all the same.
CHUNK_BYTES = 1_200_000_000
MIN_CHUNK = 2
PATCH = 2
ITEM_BYTES = 2
ALIGNMENT = 256


@dataclass(frozen=True)
class Pixels:
    """A bfloat16 tensor (frames, H, W, C) at a byte offset of a region; frame t of a clip lies at t % frames."""

    region: Region
    shape: tuple[int, int, int, int]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES * prod(self.shape)

    @property
    def end(self) -> int:
        """The first aligned offset behind it."""
        return -(-(self.offset + self.nbytes) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Step:
    """One launch: an operation of `ops`, the layer whose weights it takes, its tensors, and its frames."""

    op: Literal[
        "conv_3x3", "conv_1x1", "conv_upsample", "conv_time", "conv_picture", "channel_norm", "latent_pixels"
    ]
    layer: str
    x: Pixels
    first: int
    count: int
    length: int
    channels: int  # of the result
    shortcut: Pixels | None = None
    out: Pixels | None = None
    out_eps: float = 0.0
    normed: Pixels | None = None
    activation: str = "silu"
    drop: int = 0

    @property
    def flops(self) -> int:
        """Operations that its products need, edges of tiles not counted."""
        taps = {"conv_3x3": 27, "conv_picture": 27, "conv_1x1": 1, "conv_time": 2 * 3, "conv_upsample": 4 * 4}
        _, height, width, channels = self.x.shape
        return 2 * taps.get(self.op, 0) * self.count * height * width * channels * self.channels


@dataclass(frozen=True)
class _Resnet:
    name: str
    in_channels: int
    out_channels: int
    activation: str


@dataclass(frozen=True)
class _Upsample:
    name: str
    channels: int
    time: bool


@dataclass
class _Builder:
    """The steps so far, and the clip's size at this point."""

    frames: int
    height: int
    width: int
    drop: int
    steps: list[Step] = field(default_factory=list)

    def pixels(self, region: Region, channels: int, frames: int | None = None, offset: int = 0) -> Pixels:
        shape = (self.frames if frames is None else frames, self.height, self.width, channels)
        return Pixels(region, shape, offset)

    def step(self, op: str, layer: str, x: Pixels, channels: int, span: range, **options: object) -> Step:
        made = Step(op, layer, x, span.start, len(span), self.frames, channels, **options)  # type: ignore[arg-type]
        self.steps.append(made)
        return made

    def convolve(
        self,
        op: str,
        layer: str,
        x: Pixels,
        channels: int,
        span: range,
        *,
        raw: Pixels | None,
        normed: Pixels | None = None,
        plain: Pixels | None = None,
        activation: str = "silu",
        shortcut: Pixels | None = None,
    ) -> None:
        """A convolution and the next operator's norm: fused where one tile holds all channels, else behind it.

        raw: where the result goes; above 256 channels it is always written, and may be the place of `normed`.
        plain: where the input of the next shortcut's convolution goes; the raw result is then not kept.
        """
        if normed is None or channels <= MAX_FUSED_CHANNELS:
            out = raw if plain is None else plain
            if normed is not None and raw == normed:
                out = None
            out_eps = SHORTCUT_RMS_EPS if plain is not None else 0.0
            ending = {"out": out, "out_eps": out_eps, "normed": normed, "activation": activation}
            self.step(op, layer, x, channels, span, shortcut=shortcut, **ending)
            return
        assert raw is not None
        self.step(op, layer, x, channels, span, shortcut=shortcut, out=raw)
        out_eps = 0.0 if plain is None else SHORTCUT_RMS_EPS
        ending = {"out": plain, "out_eps": out_eps, "normed": normed, "activation": activation}
        self.step("channel_norm", layer, raw, channels, span, **ending)

    def chunk(self, channels: int) -> int:
        """Frames of a chunk: all, or as many as leave room for ring and shortcut input."""
        frame = ITEM_BYTES * self.height * self.width * channels
        return min(self.frames, max((CHUNK_BYTES // frame - 2) // 2, MIN_CHUNK))


def unsupported(config: TurboVAEConfig) -> str | None:
    """Why the kernels cannot run this decoder; None where they can."""
    widths = config.decoder_block_out_channels
    if config.patch_size != PATCH:
        return f"patch_size is {config.patch_size}, the kernels need {PATCH}"
    if any(width % 8 or width > MAX_CHANNELS for width in widths) or list(widths) != sorted(widths):
        expected = f"multiples of 8 up to {MAX_CHANNELS} that never fall"
        return f"decoder_block_out_channels is {list(widths)}, the kernels need {expected}"
    return None


def _operators(config: TurboVAEConfig) -> Iterator[_Resnet | _Upsample]:
    """The decoder between its first and its last convolution."""
    mid = config.mid_channels
    for j in range(config.num_mid_resnets):
        yield _Resnet(f"mid_block.resnets.{j}", mid, mid, "silu")
    for i, block in enumerate(config.up_blocks):
        c = block.out_channels
        if block.has_conv_in:
            yield _Resnet(f"up_blocks.{i}.conv_in", block.in_channels, c, "silu")
        if block.upsample_space:
            yield _Upsample(f"up_blocks.{i}.upsamplers.0", c, block.upsample_time)
        for j in range(block.num_resnets):
            yield _Resnet(f"up_blocks.{i}.resnets.{j}", c, c, "relu" if block.upsample_space else "silu")


def plan_decode(
    config: TurboVAEConfig, frames: int, height: int, width: int, *, is_first: bool, keep: range
) -> list[Step]:
    """The launches that decode one window of `frames` latent frames of height x width.

    `keep`: the decoded frames that are wanted; the last step is their `conv_picture`. The first window drops the frame
    that each doubling of time puts before the clip.
    """
    b = _Builder(frames, height, width, int(is_first))
    operators = list(_operators(config))
    mid = config.mid_channels
    latent = b.pixels("scratch", config.latent_channels)
    whole = range(b.frames)
    b.step("latent_pixels", "", latent, config.latent_channels, whole)
    stream, normed = b.pixels("stream", mid), b.pixels("normed", mid)
    b.convolve("conv_3x3", "conv_in.conv", latent, mid, whole, raw=stream, normed=normed)
    for operator, following in zip(operators, [*operators[1:], None], strict=True):
        if isinstance(operator, _Resnet):
            _resnet(b, operator, following)
        else:
            assert isinstance(following, _Resnet)
            _upsample(b, operator, following)
    b.step(
        "conv_picture", "conv_out.conv", b.pixels("normed", config.decoder_block_out_channels[0]), 12, keep
    )
    return b.steps


def _resnet(b: _Builder, net: _Resnet, following: _Resnet | _Upsample | None) -> None:
    """x (or its convolved shortcut) lies in "stream", act(rms(x)) in "normed"; the same is left for `following`."""
    c, chunk = net.out_channels, b.chunk(net.out_channels)
    source, stream = b.pixels("normed", net.in_channels), b.pixels("stream", c)
    ring = b.pixels("scratch", c, min(chunk + 2, b.frames))
    raw: Pixels | None = stream
    normed: Pixels | None = b.pixels("normed", c)
    plain: Pixels | None = None
    if isinstance(following, _Upsample):
        # Read by a convolution that writes both other regions: from scratch, or by way of it.
        raw = b.pixels("normed", c) if following.time else b.pixels("scratch", c, offset=ring.end)
        normed = None
    elif following is not None and following.out_channels != c:
        plain = b.pixels("scratch", c, min(chunk, b.frames), ring.end)
    elif following is None and c <= MAX_FUSED_CHANNELS:
        raw = None
    activation = following.activation if isinstance(following, _Resnet) else "silu"
    done = 0
    for begin in range(0, b.frames, chunk):
        span = range(begin, min(begin + chunk, b.frames))
        ahead = range(done, min(span.stop + 1, b.frames))
        if ahead:
            b.convolve("conv_3x3", f"{net.name}.conv1.conv", source, c, ahead, raw=ring, normed=ring)
        done = ahead.stop if ahead else done
        b.convolve(
            "conv_3x3",
            f"{net.name}.conv2.conv",
            ring,
            c,
            span,
            raw=raw,
            normed=normed,
            plain=plain,
            activation=activation,
            shortcut=stream,
        )
        if plain is not None:
            assert isinstance(following, _Resnet)
            to = b.pixels("stream", following.out_channels)
            name = f"{following.name}.conv_shortcut.conv"
            b.step("conv_1x1", name, plain, following.out_channels, span, out=to)


def _upsample(b: _Builder, up: _Upsample, following: _Resnet) -> None:
    c = up.channels
    source = b.steps[-1].out
    assert source is not None
    if up.time:
        frames = 2 * b.frames - b.drop
        doubled = b.pixels("scratch", c, frames)
        b.step("conv_time", f"{up.name}.time_conv.conv", source, c, range(b.frames), out=doubled, drop=b.drop)
        b.frames, source = frames, doubled
    whole = range(b.frames)
    small = (b.height, b.width)
    b.height, b.width = 2 * small[0], 2 * small[1]
    stream, normed = b.pixels("stream", c), b.pixels("normed", c)
    name = f"{up.name}.resample.1"
    b.convolve(
        "conv_upsample", name, source, c, whole, raw=stream, normed=normed, activation=following.activation
    )


def region_bytes(plans: list[list[Step]]) -> dict[Region, int]:
    """Bytes that each region must have for all of `plans`."""
    sizes: dict[Region, int] = dict.fromkeys(REGIONS, 0)
    for step in (step for plan in plans for step in plan):
        for pixels in (step.x, step.shortcut, step.out, step.normed):
            if pixels is not None:
                sizes[pixels.region] = max(sizes[pixels.region], pixels.end)
    return sizes


def merged(plan: list[Step]) -> list[Step]:
    """One step per layer and operation, as if a resnet's frames went through in one chunk: for tables of layers."""
    found: dict[tuple[str, str], Step] = {}
    for step in plan:
        key = (step.op, step.layer)
        before = found.get(key)
        found[key] = step if before is None else replace(before, count=before.count + step.count)
    return list(found.values())
