"""The reference DiT against the published implementation's vectors."""

from __future__ import annotations

import pytest
import torch

from cases import draw_weights, load_golden
from dit_cases import NAMES, frame_window, golden_model, inputs
from magihuman_fast.errors import CheckpointError, InputError
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import DiT, apply_rope, attention, gelu7, grouped_linear, rms_norm, swiglu7
from magihuman_fast.model.packing import window_ranges
from numerics import rel_err

TRACED = [name for name in NAMES if "trace.adapter.x" in load_golden(f"dit/{name}")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_forward(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(f"dit/{name}")
    dit = golden_model(golden, dtype)
    out = dit.velocity(*inputs(golden), coords=golden.meta["coords_style"], frame_window=frame_window(golden))
    for part, velocity in zip(("video", "audio"), out, strict=True):
        bound = 3e-6 if dtype == torch.float32 else 1.25 * float(golden.meta[f"rel_err_{part}"])
        assert velocity.dtype == torch.float32
        assert rel_err(velocity, golden.batch0(f"out_fp32.{part}")) <= bound


@pytest.mark.parametrize("name", TRACED)
def test_layers(name: str) -> None:
    golden = load_golden(f"dit/{name}")
    dit = golden_model(golden, torch.bfloat16)
    tokens = dit.pack(*inputs(golden), golden.meta["coords_style"])
    assert rel_err(tokens.rope, golden["trace.adapter.rope"]) <= 1e-5
    x = dit.embed(tokens)
    assert rel_err(x, golden["trace.adapter.x"]) <= 1e-5
    field = frame_window(golden)
    for i in range(dit.config.num_layers):
        windows = None
        if field is not None and i in dit.config.local_attn_layers:
            windows = window_ranges(tokens.grid, tokens.offsets[-1], field)
        dit.layer(i, x, tokens, windows)
        assert rel_err(x, golden[f"trace.layer{i}.out"]) <= 1e-2


def test_bfloat16_residual_would_fail() -> None:
    """The bound of `test_layers` tells a float32 residual stream from a bfloat16 one."""
    golden = load_golden("dit/a_v2")
    dit = golden_model(golden, torch.bfloat16)
    tokens = dit.pack(*inputs(golden), "v2")
    x = dit.embed(tokens)
    for i in range(dit.config.num_layers):
        x = x.bfloat16().float()
        dit.layer(i, x, tokens)
    video, _ = dit.project_out(x.bfloat16().float(), tokens.offsets)
    exact, _ = dit.project_out(golden[f"trace.layer{i}.out"], tokens.offsets)
    assert rel_err(video, exact) > 1.25 * float(golden.meta["rel_err_video"])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention from its definition, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (5, 1), (10, 2)])
@pytest.mark.parametrize("window", [None, 0, 1, 9])
def test_attention(heads: int, kv_heads: int, window: int | None) -> None:
    grid, rows = (5, 2, 2), 5 * 4 + 6
    q, k, v = (torch.randn(rows, h, 16) for h in (heads, kv_heads, kv_heads))
    mask = torch.ones(rows, rows, dtype=torch.bool)
    if window is not None:
        frame = torch.arange(rows) // 4
        tail = torch.arange(rows) >= 20
        mask = ((frame[:, None] - frame).abs() <= window) | tail[:, None] | tail
    windows = None if window is None else window_ranges(grid, rows, window)
    assert rel_err(attention(q, k, v, windows), dense_attention(q, k, v, mask)) < 1e-6


def test_activations_clamp() -> None:
    u = torch.tensor([[-100.0, 100.0, 9.0, 0.5, 3.0, -9.0]])
    clamped = u.clamp(max=7)
    assert rel_err(gelu7(u), clamped * torch.sigmoid(1.702 * clamped)) < 1e-6
    gate, linear = u[:, 0::2].clamp(max=7), u[:, 1::2].clamp(-7, 7)
    assert rel_err(swiglu7(u), gate * torch.sigmoid(1.702 * gate) * (linear + 1)) < 1e-6


def test_rows_use_the_expert_of_their_modality() -> None:
    offsets = (0, 3, 3, 5)  # no audio
    x, weight, norm = torch.randn(5, 8), torch.randn(3, 4, 8), torch.randn(3, 8)
    expert = [0, 0, 0, 2, 2]
    assert rel_err(grouped_linear(x, weight, offsets), torch.einsum("lk,lnk->ln", x, weight[expert])) < 1e-6
    scaled = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm[expert])
    assert rel_err(rms_norm(x, norm, offsets), scaled) < 1e-6


def test_rope_rotates_pairs_48_apart() -> None:
    angle = torch.randn(2, 48)
    x = torch.randn(2, 3, 128)
    out = apply_rope(x.clone(), torch.cat([angle.sin(), angle.cos()], 1))
    z = torch.complex(x[..., :48], x[..., 48:96]) * torch.polar(torch.ones(2, 1, 48), angle[:, None])
    assert rel_err(out, torch.cat([z.real, z.imag, x[..., 96:]], -1)) < 1e-6


def test_bad_calls_are_named() -> None:
    golden = load_golden("dit/a_v1_local")
    dit = golden_model(golden, torch.bfloat16)
    with pytest.raises(InputError, match=r"frame_window: expected None or an integer of at least 0, got -1"):
        dit.velocity(*inputs(golden), coords="v1", frame_window=-1)
    with pytest.raises(InputError, match=r"frame_window: expected None or an integer of at least 0, got 1.5"):
        dit.velocity(*inputs(golden), coords="v1", frame_window=1.5)
    config = DiTConfig.from_dict(golden.json("arch"))
    with pytest.raises(
        InputError, match=r"DiT dtype: expected torch.bfloat16 or torch.float32, got torch.float16"
    ):
        DiT.from_state_dict(
            config, draw_weights(config.state_dict_shapes(), golden.meta), dtype=torch.float16
        )
    with pytest.raises(CheckpointError, match=r"'linear' expected a tensor, got list"):
        DiT.from_state_dict(config, {"linear": [1.0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"post_norm_layers": [1]}, "post_norm_layers must be empty"),
        ({"enable_attn_gating": False}, "enable_attn_gating true"),
        ({"num_query_groups": 3}, "do not divide into num_query_groups 3"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of head_dim 128"),
        ({"mm_layers": [40]}, r"mm_layers names \[40\], expected 0..39"),
        ({"mm_layers": 3}, r"mm_layers must be a list of layers, got 3"),
        ({"gelu7_layers": None}, r"gelu7_layers must be a list of layers, got None"),
        ({"text_in_channels": -1}, r"text_in_channels must be a positive integer, got -1"),
        ({"video_in_channels": "x"}, r"video_in_channels must be a positive integer, got 'x'"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"windows": 3}, r"unknown fields \['windows'\]"),
    ],
)
def test_configs_that_cannot_be_served(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DiTConfig.from_dict(change)
