"""The diffusion transformer in plain PyTorch: what every kernel must reproduce (MODEL.md section 4).

Layer linears run in `dtype` (bfloat16 as published, or float32 as an oracle); the residual stream, norms, rotary
embedding, activations, adapter and head are float32 either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import CheckpointError, InputError
from .config import NUM_MODALITIES, ROPE_BASE, DiTConfig, is_layer_linear
from .packing import CoordsStyle, PackedTokens, WindowRange, pack, rows_of, unpatchify, window_ranges
from .weights import Checkpoint, check_state_dict, shapes_of

NORM_EPS = 1e-6
GATE_MAX = 7.0  # both activations clamp their inputs at 7
SIGMOID_SLOPE = 1.702

Offsets = tuple[int, int, int, int]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's tensors. The leading axis is the expert: 3 (video, audio, text) in mm layers, else 1."""

    attn_norm: torch.Tensor  # (E, hidden) float32, offset from 1
    qkvg: torch.Tensor  # (E, 7208, hidden): rows q, k, v, gate
    q_norm: torch.Tensor  # (E, head_dim) float32, offset from 1
    k_norm: torch.Tensor  # (E, head_dim) float32, offset from 1
    proj: torch.Tensor  # (E, hidden, hidden)
    mlp_norm: torch.Tensor  # (E, hidden) float32, offset from 1
    up_gate: torch.Tensor  # (E, 20480 | 27304, hidden); SwiGLU7: even rows gate, odd rows linear
    down: torch.Tensor  # (E, hidden, 20480 | 13652)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, offsets: Offsets) -> torch.Tensor:
    """RMSNorm over the last axis of x (L, ..., D) in float32, with the weights (E, D) of each row's modality."""
    x = x.float()
    # On a CPU, torch's own rms_norm is many passes over x; a norm is one.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = x * (norm.square() / x.shape[-1] + NORM_EPS).rsqrt()
    rows = rows_of(offsets) if len(weight) > 1 else [(0, len(x))]
    for (a, b), scale in zip(rows, 1 + weight, strict=True):
        y[a:b] *= scale
    return y


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: Offsets) -> torch.Tensor:
    """x (L, K) times the transposed expert (E, N, K) of each row's modality: (L, N), rounded to x's dtype."""
    if len(weight) == 1:
        return F.linear(x, weight[0])
    out = x.new_empty(len(x), weight.shape[1])
    for (a, b), expert in zip(rows_of(offsets), weight, strict=True):
        torch.mm(x[a:b], expert.t(), out=out[a:b])
    return out


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate x (L, H, D) in place by rope (L, R): channel pairs (i, i + R/2) of the first R; the rest stays."""
    sin, cos = rope.unsqueeze(1).chunk(2, dim=-1)
    half = sin.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    a_sin = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(a_sin)
    return x


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q kT / sqrt(D)) v for q (Lq, Hq, D) and k, v (Lk, Hkv, D); query head h reads head h // (Hq / Hkv)."""
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    # Without a mask, the query heads of one key/value head are just more rows: no key is repeated.
    q = q.view(rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, head_dim)
    k, v = (x.transpose(0, 1).contiguous().unsqueeze(0) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.view(num_kv_heads, -1, rows, head_dim).permute(2, 0, 1, 3).reshape(rows, num_q_heads, head_dim)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    windows: list[WindowRange] | None = None,
    attend: Attend = sdpa,
) -> torch.Tensor:
    """Attention over all tokens, or over frame windows: q (L, Hq, D), k and v (L, Hkv, D) to (L, Hq, D).

    Each window gathers its key intervals once, so the largest temporary is one window's keys, never L x L.
    `attend` is what computes one softmax over all of its keys.
    """
    if windows is None:
        return attend(q, k, v)
    out = torch.empty_like(q)
    for window in windows:
        if window.query[0] == window.query[1]:
            continue
        keys, values = (torch.cat([x[a:b] for a, b in window.keys]) for x in (k, v))
        a, b = window.query
        out[a:b] = attend(q[a:b], keys, values)
    return out


def gelu7(u: torch.Tensor) -> torch.Tensor:
    """a sigmoid(1.702 a) with a = min(u, 7), in float32, rounded to u's dtype."""
    return _gelu7_(u.to(torch.float32, copy=True)).to(u.dtype)


def swiglu7(u: torch.Tensor) -> torch.Tensor:
    """u (L, 2W), even columns gate and odd columns linear, to (L, W): g sigmoid(1.702 g) (l + 1), both clamped at 7."""
    gate, linear = _columns(u)
    y = linear.clamp_(-GATE_MAX, GATE_MAX).add_(1).mul_(_gelu7_(gate))
    del gate  # a gigabyte and more at full size
    return y.to(u.dtype)


def _gelu7_(a: torch.Tensor) -> torch.Tensor:
    """a sigmoid(1.702 a) with a clamped at 7, over the float32 a: new memory costs a CPU more than the arithmetic."""
    # silu(s a) / s is one pass instead of three.
    return F.silu(a.clamp_(max=GATE_MAX).mul_(SIGMOID_SLOPE), inplace=True).mul_(1 / SIGMOID_SLOPE)


def _columns(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Even and odd columns of u (L, 2W) as new float32 tensors (L, W)."""
    if u.dtype != torch.bfloat16:
        even, odd = u.unflatten(-1, (-1, 2)).unbind(-1)
        return even.to(torch.float32, copy=True), odd.to(torch.float32, copy=True)
    # bfloat16 is the upper half of float32. Taken as words, pairs are read in one vectorised pass, not strided.
    words = u.contiguous().view(torch.int32)
    return (words << 16).view(torch.float32), (words & -(1 << 16)).view(torch.float32)


class DiT:
    """The denoiser: video and audio latents and a text encoding to their velocities. It takes no timestep."""

    def __init__(self, config: DiTConfig, weights: Mapping[str, torch.Tensor]) -> None:
        """`weights` as `from_state_dict` leaves them; use `from_state_dict` or `from_checkpoint`."""
        self.config = config
        self.adapter = {
            name: (weights[f"adapter.{name}_embedder.weight"], weights[f"adapter.{name}_embedder.bias"])
            for name in ("video", "audio", "text")
        }
        self.bands = weights["adapter.rope.bands"]
        self.layers = [_layer_weights(config, weights, i) for i in range(config.num_layers)]
        self.dtype = self.layers[0].qkvg.dtype
        """Dtype of the layer linears and of their inputs."""
        self.head = {
            name: (weights[f"final_norm_{name}.weight"].unsqueeze(0), weights[f"final_linear_{name}.weight"])
            for name in ("video", "audio")
        }

    @classmethod
    def from_state_dict(
        cls,
        config: DiTConfig,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> DiT:
        """Build from tensors with the published names (331 keys for the published model).

        `dtype` is that of the layer linears: bfloat16 or float32. Tensors that already have their dtype and device
        are used as they are, not copied.

        Raises:
            CheckpointError: missing or unexpected keys, wrong shapes, rotary bands other than the model's.
        """
        check_state_dict(shapes_of(state_dict, "DiT"), config.state_dict_shapes(), "DiT")
        return cls._from_tensors(config, state_dict.items(), torch.device(device), dtype, copy=False)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        on_tensor: Callable[[int], object] | None = None,
    ) -> DiT:
        """Load a model folder whose sizes are read from its shapes; `on_tensor` is told each tensor's stored bytes."""
        config = infer_config(checkpoint)

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in checkpoint.tensors():
                yield name, tensor
                if on_tensor is not None:
                    on_tensor(checkpoint.entries[name].nbytes)

        return cls._from_tensors(config, counted(), torch.device(device), dtype, copy=True)

    @classmethod
    def _from_tensors(
        cls,
        config: DiTConfig,
        tensors: Iterable[tuple[str, torch.Tensor]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        copy: bool,
    ) -> DiT:
        if dtype not in (torch.bfloat16, torch.float32):
            raise InputError(f"DiT dtype: expected torch.bfloat16 or torch.float32, got {dtype}")
        weights = {}
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                raise CheckpointError(f"DiT: {name} expected a floating-point dtype, got {tensor.dtype}")
            target = dtype if is_layer_linear(name) else torch.float32
            if device.type == "cpu":
                # A copy of what a file holds, even in its own dtype: a view would change with the file.
                weights[name] = tensor.to(device, target, copy=copy)
            else:
                # Moved before it is cast: the host casts slower than it copies.
                weights[name] = tensor.to(device).to(target)
        if device.type != "meta":
            bands, expected = weights["adapter.rope.bands"], rope_bands(config, device)
            if not torch.allclose(
                bands, expected, rtol=1e-2, atol=0
            ):  # as loose as a file rounded to bfloat16
                raise CheckpointError(
                    f"DiT: adapter.rope.bands expected {expected.tolist()}, got {bands.tolist()}"
                )
        return cls(config, weights)

    @property
    def device(self) -> torch.device:
        return self.bands.device

    def pack(
        self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor, coords: CoordsStyle
    ) -> PackedTokens:
        """Check the inputs of `velocity` and lay them out as tokens; see `packing.pack`."""
        return pack(video, audio, text, self.bands, coords=coords, channels=self.config.token_channels)

    @torch.no_grad()
    def velocity(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        text: torch.Tensor,
        *,
        coords: CoordsStyle = "v2",
        frame_window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the velocity of both latents.

        Args:
            video: noisy latents (48, T, H, W), H and W even.
            audio: noisy latents (Na, 64).
            text: prompt encoding (Nt, C), true rows only.
            coords: "v2" at 256p, "v1" in super-resolution.
            frame_window: latent frames a video token sees on either side in the model's `local_attn_layers`; None
                lets every layer see everything.

        Returns:
            Velocities (48, T, H, W) and (Na, 64), float32.

        Raises:
            InputError: an input whose shape, dtype or device does not fit.
        """
        tokens = self.pack(video, audio, text, coords)
        if frame_window is not None and (type(frame_window) is not int or frame_window < 0):
            raise InputError(f"frame_window: expected None or an integer of at least 0, got {frame_window!r}")
        windows = None
        if frame_window is not None and self.config.local_attn_layers:
            windows = window_ranges(tokens.grid, tokens.offsets[-1], frame_window)
        x = self.embed(tokens)
        for i in range(self.config.num_layers):
            local = windows if i in self.config.local_attn_layers else None
            self.layer(i, x, tokens, local)
        video_tokens, audio_tokens = self.project_out(x, tokens.offsets)
        return unpatchify(video_tokens, tokens.grid), audio_tokens

    def embed(self, tokens: PackedTokens) -> torch.Tensor:
        """The residual stream (L, hidden) float32 at the first layer's input."""
        parts = (tokens.video, tokens.audio, tokens.text)
        return torch.cat([F.linear(x, *self.adapter[n]) for n, x in zip(self.adapter, parts, strict=True)])

    def layer(
        self, index: int, x: torch.Tensor, tokens: PackedTokens, windows: list[WindowRange] | None = None
    ) -> None:
        """Run one layer, updating the residual stream x (L, hidden) float32 in place."""
        self.apply_layer(self.layers[index], self.config.is_gelu(index), x, tokens, windows)

    def apply_layer(
        self,
        w: LayerWeights,
        gelu: bool,
        x: torch.Tensor,
        tokens: PackedTokens,
        windows: list[WindowRange] | None = None,
    ) -> None:
        """`layer` with its weights as an argument: what a compiler compiles once for every kind of layer."""
        x += self._attend(w, x, tokens, windows)
        x += self._mlp(w, gelu, x, tokens.offsets)

    def _attend(
        self, w: LayerWeights, x: torch.Tensor, tokens: PackedTokens, windows: list[WindowRange] | None
    ) -> torch.Tensor:
        c, offsets = self.config, tokens.offsets
        h = rms_norm(x, w.attn_norm, offsets).to(self.dtype)
        qkvg = grouped_linear(h, w.qkvg, offsets)
        q, k, v, gate = qkvg.split(
            [n * c.head_dim for n in (c.num_q_heads, *[c.num_kv_heads] * 2)] + [c.num_q_heads], 1
        )
        q, k, v = (part.unflatten(1, (-1, c.head_dim)) for part in (q, k, v))
        q = apply_rope(rms_norm(q, w.q_norm, offsets), tokens.rope).to(self.dtype)
        k = apply_rope(rms_norm(k, w.k_norm, offsets), tokens.rope).to(self.dtype)
        o = attention(q, k, v, windows)
        o = o.float().mul_(torch.sigmoid(gate.float()).unsqueeze(-1)).to(self.dtype)
        return grouped_linear(o.flatten(1), w.proj, offsets)

    def _mlp(self, w: LayerWeights, gelu: bool, x: torch.Tensor, offsets: Offsets) -> torch.Tensor:
        activation = gelu7 if gelu else swiglu7
        h = rms_norm(x, w.mlp_norm, offsets).to(self.dtype)
        return grouped_linear(activation(grouped_linear(h, w.up_gate, offsets)), w.down, offsets)

    def project_out(self, x: torch.Tensor, offsets: Offsets) -> tuple[torch.Tensor, torch.Tensor]:
        """Final norm and projection: video rows (Nv, 192), audio rows (Na, 64); text rows are dropped."""
        outs = []
        for (norm, linear), (a, b) in zip(self.head.values(), rows_of(offsets)[:2], strict=True):
            outs.append(F.linear(rms_norm(x[a:b], norm, offsets), linear))
        return outs[0], outs[1]


def _layer_weights(config: DiTConfig, weights: Mapping[str, torch.Tensor], index: int) -> LayerWeights:
    def expert(name: str) -> torch.Tensor:
        tensor = weights[f"block.layers.{index}.{name}.weight"]
        return tensor.unflatten(0, (NUM_MODALITIES if config.is_mm(index) else 1, -1))

    return LayerWeights(
        attn_norm=expert("attention.pre_norm"),
        qkvg=expert("attention.linear_qkv"),
        q_norm=expert("attention.q_norm"),
        k_norm=expert("attention.k_norm"),
        proj=expert("attention.linear_proj"),
        mlp_norm=expert("mlp.pre_norm"),
        up_gate=expert("mlp.up_gate_proj"),
        down=expert("mlp.down_proj"),
    )


def rope_bands(config: DiTConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """Rotary frequencies 10000^(-k/B), k = 0..B-1, B = head_dim/8, float32."""
    count = config.head_dim // 8
    return ROPE_BASE ** (-torch.arange(count, dtype=torch.float32, device=device) / count)


def windowed_layers(num_layers: int) -> tuple[int, ...]:
    """Layers that attend within a frame window in the published 1080p model: all but every fourth of the first 80 %."""
    return tuple(i for i in range(num_layers) if i % 4 != 3 or i >= num_layers - num_layers // 5)


def infer_config(checkpoint: Checkpoint) -> DiTConfig:
    """Read a model's sizes off its shapes, then check every key and shape against them.

    Raises:
        CheckpointError: keys or shapes that no configuration explains.
    """
    config = config_from_shapes(checkpoint.shapes, checkpoint.path)
    checkpoint.check(config.state_dict_shapes(), "DiT")
    return config


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: object) -> DiTConfig:
    """The sizes that the telling shapes of a state dict have; the others are not looked at.

    The published folders hold no configuration. Shapes determine all but the windowed layers, which follow the
    published rule and matter only where a frame window is asked for.

    Raises:
        CheckpointError: a telling key is not there, or its shape makes no model.
    """
    try:
        hidden = shapes["final_norm_video.weight"][0]
        num_layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("block.layers."))
        prefix = "block.layers.{}."
        experts = [
            shapes[prefix.format(i) + "attention.pre_norm.weight"][0] // hidden for i in range(num_layers)
        ]
        head_dim = shapes[prefix.format(0) + "attention.q_norm.weight"][0] // experts[0]
        rows = shapes[prefix.format(0) + "attention.linear_qkv.weight"][0] // experts[0]
        num_q_heads = hidden // head_dim
        gelu = []
        for i in range(num_layers):
            up = shapes[prefix.format(i) + "mlp.up_gate_proj.weight"][0] // experts[i]
            if up == shapes[prefix.format(i) + "mlp.down_proj.weight"][1]:
                gelu.append(i)
        return DiTConfig(
            num_layers=num_layers,
            hidden_size=hidden,
            head_dim=head_dim,
            num_query_groups=(rows - num_q_heads - hidden) // (2 * head_dim),
            video_in_channels=shapes["adapter.video_embedder.weight"][1],
            audio_in_channels=shapes["adapter.audio_embedder.weight"][1],
            text_in_channels=shapes["adapter.text_embedder.weight"][1],
            mm_layers=tuple(i for i in range(num_layers) if experts[i] == NUM_MODALITIES),
            gelu7_layers=tuple(gelu),
            local_attn_layers=windowed_layers(num_layers),
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where}: not a MagiHuman DiT: {reason}") from error


def load_dit(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    on_tensor: Callable[[int], object] | None = None,
) -> DiT:
    """`DiT.from_checkpoint` for a folder; see there."""
    from .weights import open_checkpoint

    return DiT.from_checkpoint(open_checkpoint(path), device=device, dtype=dtype, on_tensor=on_tensor)
