"""The diffusion transformer on the kernels: `model/dit.py` again, in its order and with its names, on `ops`.

What differs is the optimisation. Every buffer is made once for a clip's shape and used by all steps and prompts; norms,
activations, rotation, gates and residual sums are endings of the products before them; patches are cut and put
together by the embedder and the head; text rows are not computed where nothing reads them any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from ..errors import InputError
from ..kernels import ops
from ..kernels.dit_weights import pack_layer, padded_width
from ..kernels.pointwise import MAX_NORM_WIDTH
from ..kernels.products import HEAD_DIM
from ..model.config import MAX_TEXT_TOKENS, PATCH, VAE_STRIDE, DiTConfig, latent_frames
from ..model.dit import DiT
from ..model.packing import CoordsStyle, coordinates, rope_table

BF16, F32 = torch.bfloat16, torch.float32


def kernel_limits(config: DiTConfig, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute a model of these sizes; None where they can."""
    if dtype != BF16:
        return f"the kernels compute in bfloat16, not {dtype}"
    if config.head_dim != HEAD_DIM:
        return f"the kernels need heads of {HEAD_DIM} channels, the model has {config.head_dim}"
    if config.hidden_size > MAX_NORM_WIDTH:
        return (
            f"the kernels need a hidden size of at most {MAX_NORM_WIDTH}, the model has {config.hidden_size}"
        )
    for name in ("video_in_channels", "audio_in_channels", "text_in_channels"):
        if getattr(config, name) % 8:
            return f"the kernels need {name} to be a multiple of 8, the model has {getattr(config, name)}"
    return None


@dataclass(frozen=True)
class ClipShape:
    """A clip's latents: video (48, frames, height, width) and audio (audio, 64)."""

    frames: int
    height: int
    width: int
    audio: int

    @classmethod
    def of(cls, size: tuple[int, int], audio: int) -> ClipShape:
        """The latents of (width, height) in pixels with `audio` audio latents."""
        return cls(latent_frames(audio), size[1] // VAE_STRIDE, size[0] // VAE_STRIDE, audio)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return (self.width * VAE_STRIDE, self.height * VAE_STRIDE)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, patch rows, patch columns."""
        return (self.frames, self.height // PATCH, self.width // PATCH)

    @property
    def tokens_per_frame(self) -> int:
        return prod(self.grid[1:])

    @property
    def first_text(self) -> int:
        """Rows of video and audio, after which the text's begin."""
        return prod(self.grid) + self.audio

    @property
    def rows(self) -> int:
        """Rows that the buffers have room for: with the longest text."""
        return self.first_text + MAX_TEXT_TOKENS


class Prompt:
    """One prompt as the kernels read it: buffers that are made once and filled anew for each prompt."""

    def __init__(self, config: DiTConfig, shape: ClipShape, device: torch.device) -> None:
        self.encoding = torch.zeros(MAX_TEXT_TOKENS, config.text_in_channels, device=device)
        self.text = torch.zeros(MAX_TEXT_TOKENS, config.hidden_size, device=device)  # embedded
        self.rope = torch.zeros(shape.rows, config.rotary_dim, device=device)
        # (0, Nv, Nv + Na, L), and the same with no text.
        self.offsets = torch.zeros(4, dtype=torch.int32, device=device)
        self.offsets_without_text = torch.zeros(4, dtype=torch.int32, device=device)

    @staticmethod
    def nbytes(config: DiTConfig, shape: ClipShape) -> int:
        text = MAX_TEXT_TOKENS * (config.text_in_channels + config.hidden_size)
        return 4 * (text + shape.rows * config.rotary_dim + 8)


class Activations:
    """What lives between two kernels, for M = shape.rows tokens.

    x: the residual stream (M, hidden) float32. h: what a norm leaves, and then what attention leaves, (M, hidden)
    bfloat16. q, k, v and gate are dead when the MLP's inner activation comes to life, and use the same memory.
    """

    def __init__(self, config: DiTConfig, shape: ClipShape, device: torch.device) -> None:
        rows, hidden = shape.rows, config.hidden_size
        self.x = torch.zeros(rows, hidden, device=device)
        self.h = torch.zeros(rows, hidden, dtype=BF16, device=device)
        shared = torch.zeros(rows * _shared_columns(config), dtype=BF16, device=device)
        parts = [rows * heads * HEAD_DIM for heads in (config.num_q_heads, *[config.num_kv_heads] * 2)]
        q, k, v, rest = shared.split([*parts, len(shared) - sum(parts)])
        gate = rest[: 2 * rows * config.num_q_heads].view(F32).view(rows, -1)
        q, k, v = (part.view(rows, -1, HEAD_DIM) for part in (q, k, v))
        self.qkv_gate = ops.QkvGate(q, k, v, gate)
        widths = {padded_width(config.intermediate(i)) for i in range(config.num_layers)}
        self.inner = {width: shared[: rows * width].view(rows, width) for width in widths}

    @staticmethod
    def nbytes(config: DiTConfig, shape: ClipShape) -> int:
        return shape.rows * (6 * config.hidden_size + 2 * _shared_columns(config))


def _shared_columns(config: DiTConfig) -> int:
    """bfloat16 columns a row of the memory that attention and MLP take in turn needs; the gate's are float32."""
    attention = HEAD_DIM * (config.num_q_heads + 2 * config.num_kv_heads) + 2 * config.num_q_heads
    return max(attention, *(padded_width(config.intermediate(i)) for i in range(config.num_layers)))


class KernelDiT:
    """The denoiser on the kernels. It holds weights and no state: buffers belong to whoever calls."""

    def __init__(self, dit: DiT, *, backend: ops.Backend = "gpu") -> None:
        """Pack the weights of a reference model, layer by layer, for `backend`.

        Both share their memory from then on: where a packed tensor is wider, `dit` gets a view of it.

        Raises:
            InputError: a model that the kernels cannot compute (`kernel_limits`).
        """
        reason = kernel_limits(dit.config, dit.dtype)
        if reason is not None:
            raise InputError(f"KernelDiT: {reason}")
        self.config, self.device, self.backend = dit.config, dit.device, backend
        self.adapter, self.bands = dit.adapter, dit.bands
        self.head = {name: (norm.squeeze(0), linear) for name, (norm, linear) in dit.head.items()}
        self.layers = []
        for i, weights in enumerate(dit.layers):
            packed = pack_layer(weights)
            dit.layers[i] = replace(packed, down=packed.down[..., : weights.down.shape[2]])
            self.layers.append(packed)

    def write_prompt(self, prompt: Prompt, shape: ClipShape, text: torch.Tensor, coords: CoordsStyle) -> None:
        """Fill `prompt` for a text encoding (Nt, C) of at most 640 rows."""
        count = len(text)
        encoding = prompt.encoding[:count].copy_(text)
        ops.embed_text(encoding, *self.adapter["text"], out=prompt.text[:count], backend=self.backend)
        rope = rope_table(coordinates(shape.grid, shape.audio, count, coords, self.device), self.bands)
        prompt.rope[: len(rope)] = rope
        first_audio, first_text = prod(shape.grid), shape.first_text
        ranges = torch.tensor([0, first_audio, first_text, first_text + count, first_text], dtype=torch.int32)
        prompt.offsets.copy_(ranges[:4])
        prompt.offsets_without_text.copy_(ranges[[0, 1, 2, 4]])

    def velocity(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        prompt: Prompt,
        shape: ClipShape,
        a: Activations,
        video_out: torch.Tensor,
        audio_out: torch.Tensor,
        *,
        frame_window: int | None = None,
    ) -> None:
        """Predict the velocities of video (48, T, H, W) and audio (Na, 64), float32, into tensors of their shapes.

        Nothing is allocated and nothing waited for: what this launches can be captured.
        """
        self.embed(video, audio, prompt, a)
        for i in range(self.config.num_layers):
            window = frame_window if i in self.config.local_attn_layers else None
            self.layer(i, a, prompt, shape, window)
        self.project_out(a, prompt, video_out, audio_out)

    def embed(self, video: torch.Tensor, audio: torch.Tensor, prompt: Prompt, a: Activations) -> None:
        """The residual stream at the first layer's input, into a.x."""
        video_weight, video_bias = self.adapter["video"]
        audio_weight, audio_bias = self.adapter["audio"]
        ops.embed(
            video,
            audio,
            prompt.text,
            video_weight=video_weight,
            video_bias=video_bias,
            audio_weight=audio_weight,
            audio_bias=audio_bias,
            modality_offsets=prompt.offsets,
            out=a.x,
            backend=self.backend,
        )

    def layer(self, index: int, a: Activations, prompt: Prompt, shape: ClipShape, window: int | None) -> None:
        """Run one layer, updating the residual stream a.x in place."""
        last = index == self.config.num_layers - 1
        # The head drops the text: once the last layer has its keys and values, nothing reads those rows.
        offsets = prompt.offsets_without_text if last else prompt.offsets
        self._attend(index, a, prompt, shape, window, offsets)
        self._mlp(index, a, offsets)

    def _attend(
        self,
        index: int,
        a: Activations,
        prompt: Prompt,
        shape: ClipShape,
        window: int | None,
        offsets: torch.Tensor,
    ) -> None:
        c, w, backend = self.config, self.layers[index], self.backend
        ops.rms_norm(a.x, w.attn_norm, modality_offsets=prompt.offsets, out=a.h, backend=backend)
        ops.gemm_qkv(
            a.h,
            w.qkvg,
            w.q_norm,
            w.k_norm,
            prompt.rope,
            num_q_heads=c.num_q_heads,
            num_kv_heads=c.num_kv_heads,
            modality_offsets=prompt.offsets,
            out=a.qkv_gate,
            backend=backend,
        )
        ops.gated_attention(
            *a.qkv_gate,
            modality_offsets=prompt.offsets,
            tokens_per_frame=None if window is None else shape.tokens_per_frame,
            frame_window=window,
            text_queries=offsets is prompt.offsets,
            out=a.h.view(-1, c.num_q_heads, c.head_dim),
            backend=backend,
        )
        ops.gemm_residual(a.h, w.proj, a.x, modality_offsets=offsets, backend=backend)

    def _mlp(self, index: int, a: Activations, offsets: torch.Tensor) -> None:
        w, backend = self.layers[index], self.backend
        activation = ops.gemm_gelu7 if self.config.is_gelu(index) else ops.gemm_swiglu7
        inner = a.inner[w.down.shape[2]]
        ops.rms_norm(a.x, w.mlp_norm, modality_offsets=offsets, out=a.h, backend=backend)
        activation(a.h, w.up_gate, modality_offsets=offsets, out=inner, backend=backend)
        ops.gemm_residual(inner, w.down, a.x, modality_offsets=offsets, backend=backend)

    def project_out(
        self, a: Activations, prompt: Prompt, video_out: torch.Tensor, audio_out: torch.Tensor
    ) -> None:
        """Final norm and projection of video and audio rows, unpatched; text rows are dropped."""
        (video_norm, video_weight), (audio_norm, audio_weight) = (self.head[n] for n in ("video", "audio"))
        ops.head(
            a.x,
            video_norm=video_norm,
            audio_norm=audio_norm,
            video_weight=video_weight,
            audio_weight=audio_weight,
            modality_offsets=prompt.offsets,
            video_out=video_out,
            audio_out=audio_out,
            backend=self.backend,
        )
