"""Model configurations and the constants of the published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

from ..errors import CheckpointError

FPS = 25
VAE_STRIDE = 16  # pixels per latent, height and width
VAE_TIME_STRIDE = 4  # frames per latent frame (after the first)
PATCH = 2  # latents per token, height and width
LATENT_CHANNELS = 48
AUDIO_CHANNELS = 64
SAMPLE_RATE = 44100
MAX_TEXT_TOKENS = 640
NUM_MODALITIES = 3  # video, audio, text: the order of tokens and of stacked experts
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of one diffusion transformer; field names are those of the published architecture (MODEL.md section 4).

    The defaults are the published 15.3 B model. `local_attn_layers` lists the layers that attend within a window of
    latent frames when a run asks for one (only the 1080p super-resolution model does).
    """

    num_layers: int = 40
    hidden_size: int = 5120
    head_dim: int = 128
    num_query_groups: int = 8
    video_in_channels: int = LATENT_CHANNELS * PATCH * PATCH
    audio_in_channels: int = AUDIO_CHANNELS
    text_in_channels: int = 3584
    mm_layers: tuple[int, ...] = (0, 1, 2, 3, 36, 37, 38, 39)
    local_attn_layers: tuple[int, ...] = ()
    gelu7_layers: tuple[int, ...] = (0, 1, 2, 3)
    post_norm_layers: tuple[int, ...] = ()
    enable_attn_gating: bool = True

    def __post_init__(self) -> None:
        counts = ("num_layers", "hidden_size", "head_dim", "num_query_groups")
        for name in (*counts, "video_in_channels", "audio_in_channels", "text_in_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"DiT config: {name} must be a positive integer, got {value!r}")
        if self.head_dim % 8 or self.rotary_dim > self.head_dim:
            raise CheckpointError(f"DiT config: head_dim must be a multiple of 8, got {self.head_dim}")
        if self.hidden_size % self.head_dim:
            raise CheckpointError(
                f"DiT config: hidden_size {self.hidden_size} is not a multiple of head_dim {self.head_dim}"
            )
        if self.num_q_heads % self.num_query_groups:
            raise CheckpointError(
                f"DiT config: {self.num_q_heads} query heads do not divide into "
                f"num_query_groups {self.num_query_groups}"
            )
        for name in ("mm_layers", "local_attn_layers", "gelu7_layers", "post_norm_layers"):
            layers = getattr(self, name)
            if not isinstance(layers, (tuple, list)):
                raise CheckpointError(f"DiT config: {name} must be a list of layers, got {layers!r}")
            layers = tuple(layers)
            object.__setattr__(self, name, layers)
            bad = [i for i in layers if not isinstance(i, int) or not 0 <= i < self.num_layers]
            if bad:
                raise CheckpointError(f"DiT config: {name} names {bad}, expected 0..{self.num_layers - 1}")
        if self.post_norm_layers or not self.enable_attn_gating:
            raise CheckpointError(
                "DiT config: post_norm_layers must be empty and enable_attn_gating true, as in the published "
                f"models; got {list(self.post_norm_layers)} and {self.enable_attn_gating}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """Build from a mapping with this class's field names; an unknown name is a `CheckpointError`."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(f"DiT config: unknown fields {unknown}; known: {sorted(known)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)

    @property
    def num_q_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.num_query_groups

    @property
    def token_channels(self) -> tuple[int, int, int]:
        """Channels of a video, audio and text token as they come in (192, 64, 3584)."""
        return (self.video_in_channels, self.audio_in_channels, self.text_in_channels)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated: sine and cosine of 3 axes x head_dim/8 bands (96 of 128)."""
        return 6 * (self.head_dim // 8)

    @property
    def qkvg_rows(self) -> int:
        """Rows of one expert's fused projection: q, k, v, then one gate logit per query head (7208)."""
        return self.head_dim * (self.num_q_heads + 2 * self.num_kv_heads) + self.num_q_heads

    def is_mm(self, layer: int) -> bool:
        """Whether `layer` has one expert per modality."""
        return layer in self.mm_layers

    def is_gelu(self, layer: int) -> bool:
        """Whether `layer` uses GELU7 (else SwiGLU7)."""
        return layer in self.gelu7_layers

    def intermediate(self, layer: int) -> int:
        """Width between the two MLP products: 4h for GELU7, int(8h/3) floored to a multiple of 4 for SwiGLU7."""
        if self.is_gelu(layer):
            return 4 * self.hidden_size
        return int(self.hidden_size * 4 * 2 / 3) // 4 * 4

    def state_dict_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the published state dict with its shape (331 keys for the published model)."""
        h, d = self.hidden_size, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"adapter.rope.bands": (d // 8,)}
        for name in ("video", "audio", "text"):
            shapes[f"adapter.{name}_embedder.weight"] = (h, getattr(self, f"{name}_in_channels"))
            shapes[f"adapter.{name}_embedder.bias"] = (h,)
        for i in range(self.num_layers):
            experts = NUM_MODALITIES if self.is_mm(i) else 1
            width = self.intermediate(i)
            up_rows = width if self.is_gelu(i) else 2 * width
            prefix = f"block.layers.{i}."
            shapes |= {
                prefix + "attention.pre_norm.weight": (experts * h,),
                prefix + "attention.linear_qkv.weight": (experts * self.qkvg_rows, h),
                prefix + "attention.q_norm.weight": (experts * d,),
                prefix + "attention.k_norm.weight": (experts * d,),
                prefix + "attention.linear_proj.weight": (experts * h, h),
                prefix + "mlp.pre_norm.weight": (experts * h,),
                prefix + "mlp.up_gate_proj.weight": (experts * up_rows, h),
                prefix + "mlp.down_proj.weight": (experts * h, width),
            }
        for name, channels in (("video", self.video_in_channels), ("audio", self.audio_in_channels)):
            shapes[f"final_norm_{name}.weight"] = (h,)
            shapes[f"final_linear_{name}.weight"] = (channels, h)
        return shapes


def is_layer_linear(name: str) -> bool:
    """Whether a state-dict key is one of the layers' linears: the tensors that run in bfloat16."""
    return name.startswith("block.layers.") and name.split(".")[-2] in (
        "linear_qkv",
        "linear_proj",
        "up_gate_proj",
        "down_proj",
    )


@dataclass(frozen=True)
class Variant:
    """A first-stage model: its folder below the checkpoint root and how it is stepped (MODEL.md section 1)."""

    folder: str
    steps: int
    guided: bool


@dataclass(frozen=True)
class SuperResolution:
    """A super-resolution model: its folder, the short side it aims at in pixels, its steps and frame window."""

    folder: str
    short_side: int
    steps: int
    frame_window: int | None


VARIANTS = {
    "distill": Variant("distill", steps=8, guided=False),
    "base": Variant("base", steps=32, guided=True),
}
SUPER_RESOLUTIONS = {
    "540p": SuperResolution("540p_sr", short_side=544, steps=5, frame_window=None),
    "1080p": SuperResolution("1080p_sr", short_side=1088, steps=5, frame_window=11),
}
TURBO_VAE_FOLDER = "turbo_vae"
# Where the components published elsewhere are looked for below the root when no folder is named.
TEXT_ENCODER_FOLDER = "t5gemma-9b-9b-ul2"
IMAGE_VAE_FOLDER = "Wan2.2-TI2V-5B"
AUDIO_VAE_FOLDER = "stable-audio-open-1.0"

SIZE_STEP = VAE_STRIDE * PATCH  # pixels
MIN_SIDE, MAX_SIDE = 64, 4096  # pixels
MIN_SECONDS, MAX_SECONDS = 1.0, 60.0


def snap_size(size: int) -> int:
    """Round a side in pixels down to what the model can make, a multiple of 32."""
    return size // SIZE_STEP * SIZE_STEP


def super_resolution_size(width: int, height: int, sr: SuperResolution) -> tuple[int, int]:
    """(width, height) that keeps the aspect ratio with the stage's short side: 448x256 to 960x544 or 1920x1088."""
    short = min(width, height)
    sides = (int(side * sr.short_side / short / SIZE_STEP + 0.5) * SIZE_STEP for side in (width, height))
    return next(sides), next(sides)


def clip_frames(seconds: float) -> int:
    """Frames of a clip: the whole frames that cover `seconds`."""
    return ceil(round(FPS * seconds, 6))  # rounded: no frame more for an error in the last bits


def audio_latents(seconds: float, *, driven: bool = False) -> int:
    """Audio latents of a clip, 25 a second: as many as its latent video frames need to cover all of its frames.

    A generated clip has one more than it has frames, where that is no fewer; driving sound has only what it lasts.
    """
    frames = clip_frames(seconds)
    covering = VAE_TIME_STRIDE * ceil((frames - 1) / VAE_TIME_STRIDE) + 1
    return covering if driven else max(covering, frames + 1)


def latent_frames(num_audio: int) -> int:
    """Latent video frames that go with `num_audio` audio latents."""
    return (num_audio - 1) // VAE_TIME_STRIDE + 1
