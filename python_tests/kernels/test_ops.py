"""Checks of the operations' arguments, choice of the backend, and the model that the operations make up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from backends import BACKENDS, device_of, offsets_tensor
from cases import draw_weights
from magihuman_fast.kernels import attention, convolutions, launch, ops, pointwise, products
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import DiT
from magihuman_fast.model.packing import PackedTokens, unpatchify
from numerics import rel_err
from operation_cases import ROWS, VALID, Arguments, K, N, bf16


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values one element further on: 16-byte loads would fault."""
    storage = torch.empty(t.numel() + 16, dtype=t.dtype)
    start = -storage.data_ptr() % 16 // t.itemsize + 1
    return storage[start : start + t.numel()].view(t.shape).copy_(t)


# What can be wrong with any tensor, and how the message says it.
WRONGS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "type": (lambda t: t.tolist(), "expected a torch.Tensor, got list"),
    "dtype": (lambda t: t.double(), r"expected dtype torch\.\w+, got torch\.float64"),
    "shape": (lambda t: t.unsqueeze(-1).contiguous(), r"expected shape .*, got \("),
    "stride": (
        lambda t: torch.stack([t, t], -1)[..., 0],
        r"expected (contiguous rows|a contiguous tensor).*, got strides",
    ),
    "device": (
        lambda t: t.to("meta"),
        r"expected (device (cpu, got meta|meta, got cpu)|CPU tensors, got tensors on meta)",
    ),
    "alignment": (misaligned, "expected an address that is a multiple of 16, got 0x"),
}


def cases_of_misuse() -> list[tuple[str, str, str]]:
    return [
        (op, name, wrong)
        for op, arguments in VALID.items()
        for name, value in arguments().items()
        if isinstance(value, torch.Tensor)
        for wrong in WRONGS
        # Single words need no alignment beyond their type's; one of them has no stride to be wrong.
        if not (
            value.dtype == torch.int32 and (wrong == "alignment" or (wrong == "stride" and len(value) == 1))
        )
    ]


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **numbers: object) -> None:
        pytest.fail("launched")

    for module in (attention, convolutions, products, pointwise):
        monkeypatch.setattr(module, "launch", refuse)


@pytest.mark.parametrize("op", VALID)
def test_valid_arguments_pass(op: str) -> None:
    getattr(ops, op)(**VALID[op](), backend="sim")


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("op", "name", "wrong"), cases_of_misuse())
def test_misuse_is_named(op: str, name: str, wrong: str) -> None:
    arguments = VALID[op]()
    spoil, message = WRONGS[wrong]
    arguments[name] = spoil(arguments[name])
    # Of the first tensor device and (in updates) shape are the measure: it is another one that does not fit.
    first = name == next(iter(arguments)) and wrong in ("device", "shape")
    where = rf"^{op}: .*" if first else rf"^{op}: {name}: "
    with pytest.raises(ValueError, match=where + message):
        getattr(ops, op)(**arguments, backend="sim")


GROUPED = [op for op, arguments in VALID.items() if "modality_offsets" in arguments()]


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("op", GROUPED)
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 4, 7, 9], "expected to begin with 0, got [1, 4, 7, 9]"),
        ([0, 4, 3, 6], "expected ascending row numbers, got [0, 4, 3, 6]"),
        ([0, 4, 7, 10], "rows, got [0, 4, 7, 10]"),
        ([0, 4, 7], "expected shape (4), got (3,)"),
        ([0, -2, 4, 6], "expected ascending row numbers, got [0, -2, 4, 6]"),
    ],
)
def test_offsets_that_do_not_fit(op: str, offsets: list[int], message: str) -> None:
    arguments = {**VALID[op](), "modality_offsets": offsets_tensor(offsets, "cpu")}
    with pytest.raises(ValueError, match=rf"^{op}: modality_offsets: .*{re.escape(message)}"):
        getattr(ops, op)(**arguments, backend="sim")


SPECIAL = [
    ("gemm", {"w": bf16(2, N, K)}, "weight: expected 1 or 3 experts on the leading axis, got 2"),
    ("gemm", {"modality_offsets": None}, "modality_offsets: expected offsets, because there are 3 experts"),
    ("gemm", {"a": bf16(ROWS, 25)[:, :24]}, "a: expected a row pitch that is a multiple of 16 bytes, got 50"),
    (
        "gemm",
        {"a": bf16(ROWS, K)[:, :0], "w": bf16(3, N, K)[..., :0]},
        "w: expected at least one row and column",
    ),
    ("gemm", {"w": bf16(6, N, K)[::2]}, "w: expected contiguous rows at one distance"),
    ("gemm_swiglu7", {"w": bf16(3, 15, K)}, "w: expected an even number of rows"),
    ("gemm_swiglu7", {"out": bf16(ROWS, 7)}, r"out: expected shape \(6, 8\), got \(6, 7\)"),
    ("gemm_qkv", {"num_q_heads": 3}, "w: expected 643 rows for 3 query and 1 key/value heads, got 514"),
    ("gemm_qkv", {"num_kv_heads": 0}, "num_kv_heads: expected a positive integer, got 0"),
    (
        "gated_attention",
        {"k": bf16(ROWS, 3, 128), "v": bf16(ROWS, 3, 128)},
        "k: expected a number of heads that",
    ),
    (
        "gated_attention",
        {"v": bf16(ROWS, 4, 128)},
        r"v: expected the shape of k, \(6, 2, 128\), got \(6, 4, 128\)",
    ),
    ("gated_attention", {"q": bf16(ROWS, 4, 64)}, r"q: expected shape \(any, any, 128\), got \(6, 4, 64\)"),
    (
        "gated_attention",
        {"frame_window": None},
        "frame_window: expected 0 to 1048576 with tokens_per_frame, got None",
    ),
    (
        "gated_attention",
        {"frame_window": -1},
        "frame_window: expected 0 to 1048576 with tokens_per_frame, got -1",
    ),
    (
        "gated_attention",
        {"tokens_per_frame": None},
        "tokens_per_frame: expected a positive integer with frame_window",
    ),
    (
        "gated_attention",
        {"tokens_per_frame": 4},
        "tokens_per_frame: expected a divisor of the 2 video rows, got 4",
    ),
    (
        "gated_attention",
        {"modality_offsets": None},
        "modality_offsets: expected offsets, because there is a frame",
    ),
    (
        "gated_attention",
        {"modality_offsets": None, "tokens_per_frame": None, "frame_window": None, "text_queries": False},
        "modality_offsets: expected offsets, which say where the text rows begin",
    ),
    ("rms_norm", {"x": torch.randn(ROWS, 12)}, "x: expected a multiple of 8 columns from 8 to 5120, got 12"),
    ("rms_norm", {"x": torch.randn(ROWS, 5128)}, "x: expected a multiple of 8 columns from 8 to 5120"),
    ("embed_text", {"text": torch.randn(3, 12)}, "text: expected a multiple of 8 channels, got 12"),
    ("embed", {"video": torch.randn(2, 1, 4, 3)}, "video: expected an even number"),
    ("embed", {"audio": torch.randn(2, 8)}, "modality_offsets: expected at most 2 audio rows, got 3"),
    (
        "embed",
        {"text_embedding": torch.randn(1, 16)},
        "modality_offsets: expected at most 1 text rows, got 2",
    ),
    ("head", {"video_out": torch.randn(2, 1, 2, 2)}, "modality_offsets: expected 1 video rows, got 4"),
    ("head", {"audio_out": torch.randn(3, 6)}, "audio_out: expected a multiple of 4 channels, got 6"),
    ("renoise_step", {"x": torch.randn(3)}, "x: expected a multiple of 4 elements"),
    ("renoise_step", {"noise": torch.randn(3, 2, 3, 2, 2)}, r"noise: expected shape \(4, 2, 3, 2, 2\)"),
    ("unipc_step", {"guidance": None}, "guidance: expected null_velocity and guidance together"),
    ("unipc_step", {"guidance": torch.randn(4, 2)}, "guidance: expected 3 columns or 1, got 2"),
    ("conv_3x3", {"w": bf16(8, 2, 3, 3, 16)}, r"w: expected 1 or 3 time taps, got \(8, 2, 3, 3, 16\)"),
    ("conv_3x3", {"x": bf16(2, 3, 2, 12)}, "x: expected pixels of 8 n channels"),
    ("conv_3x3", {"count": 3}, r"count: expected frames of a clip of 2, got 0 \+ 3"),
    ("conv_3x3", {"first": -1}, "first: expected at least 0, got -1"),
    ("conv_3x3", {"activation": "gelu"}, "activation: expected one of .*, got gelu"),
    ("conv_3x3", {"out_eps": -1.0}, "out_eps: expected 0 or a positive number"),
    ("conv_3x3", {"stride": 2}, r"options: expected some of .*, got \['stride'\]"),
    ("conv_3x3", {"out": bf16(1, 3, 2, 8)}, "out: expected room for 2 frames, got 1"),
    ("conv_3x3", {"length": 4, "first": 1, "count": 1}, "x: expected room for 3 frames, got 2"),
    ("conv_time", {"normed": bf16(3, 3, 2, 8)}, "normed: expected room for 4 frames, got 3"),
    ("channel_norm", {"plain": bf16(1, 3, 2, 16)}, "plain: expected room for 2 frames, got 1"),
    ("conv_3x3", {"out": bf16(2, 3, 3, 8)}, r"out: expected shape \(any, 3, 2, 8\), got \(2, 3, 3, 8\)"),
    (
        "conv_1x1",
        {"w": bf16(264, 1, 1, 1, 16), "bias": torch.randn(264), "out": None, "normed": bf16(2, 3, 2, 264)},
        "w: expected at most 256 channels beside normed or out_eps, got 264",
    ),
    ("conv_time", {"drop": 2}, "drop: expected 0 or 1, got 2"),
    ("conv_picture", {"first": 1}, r"count: expected frames of a clip of 2, got 1 \+ 2"),
    ("channel_norm", {"eps": 0.0}, "eps: expected a positive number, got 0.0"),
    ("channel_norm", {"x": bf16(1, 1, 1, 520)}, "x: expected at most 512 channels, got 520"),
    ("latent_pixels", {"first": 2}, "first: expected a frame below 2, got 2"),
]


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("op", "change", "message"), SPECIAL)
def test_values_that_do_not_fit(op: str, change: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: {message}"):
        getattr(ops, op)(**{**VALID[op](), **change}, backend="sim")


@pytest.mark.parametrize("op", VALID)
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (None, "backend None, which is 'gpu': expected CUDA tensors, got tensors on cpu"),
        ("gpu", "backend 'gpu': expected CUDA tensors, got tensors on cpu"),
        ("cpu", "backend: expected one of .*, got 'cpu'"),
    ],
)
def test_no_backend_stands_in_for_another(op: str, backend: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: {message}"):
        getattr(ops, op)(**VALID[op](), backend=backend)


def test_simulator_without_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_module", lambda name: None)
    with pytest.raises(RuntimeError, match="_sim is not built"):
        ops.rms_norm(**VALID["rms_norm"](), backend="sim")
    assert str(ops.gpu_unavailable()).startswith("kernels not compiled")


def test_launchers_check_for_themselves() -> None:
    sim = ops.simulator()
    x = torch.randn(2, 8)
    numbers = {"ldx": 8, "ldout": 8, "m": 2, "groups": 1, "modality_offsets": 0, "eps": 1e-6, "num_sms": 1}
    with pytest.raises(ValueError, match="rms_norm: h: expected a multiple of 8 from 8 to 5120, got 12"):
        sim.rms_norm(x=x.data_ptr(), weight=x.data_ptr(), out=x.data_ptr(), h=12, **numbers, stream=0)
    with pytest.raises(
        ValueError, match="rms_norm: weight: expected an address that is a multiple of 16, got"
    ):
        sim.rms_norm(x=x.data_ptr(), weight=0, out=x.data_ptr(), h=8, **numbers, stream=0)


def test_simulator_error_is_its_own_exception() -> None:
    sim = ops.simulator()
    x, out = torch.randn(2, 8), torch.empty(2, 8, dtype=torch.bfloat16)
    sim.register_buffer(x.data_ptr(), 40, "x")  # 64 bytes are read
    try:
        with pytest.raises(sim.Error, match=r"out of bounds: kernel rms_norm_sm90, .* role row"):
            sim.rms_norm(
                x=x.data_ptr(),
                ldx=8,
                weight=x.data_ptr(),
                out=out.data_ptr(),
                ldout=8,
                m=2,
                h=8,
                groups=1,
                modality_offsets=0,
                eps=1e-6,
                num_sms=1,
                stream=0,
            )
    finally:
        sim.clear_buffers()


CONFIG = DiTConfig(
    num_layers=2,
    hidden_size=128,
    num_query_groups=1,
    video_in_channels=16,
    audio_in_channels=8,
    text_in_channels=24,
    mm_layers=(0,),
    gelu7_layers=(0,),
)


@pytest.fixture(scope="module")
def model() -> DiT:
    """One layer with experts and GELU7, one without and SwiGLU7 of width 340 (not a multiple of 8)."""
    meta = {"weights.seed": "5", "weights.gain": "1.0", "weights.c0": "0.0", "weights.c1": "0.1"}
    return DiT.from_state_dict(CONFIG, draw_weights(CONFIG.state_dict_shapes(), meta))


@pytest.fixture
def tokens(model: DiT) -> PackedTokens:
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(4, 2, 6, 4, generator=generator)
    return model.pack(
        video, torch.randn(5, 8, generator=generator), torch.randn(3, 24, generator=generator), "v2"
    )


def layer_by_operations(
    model: DiT, index: int, x: torch.Tensor, tokens: PackedTokens, backend: ops.Backend
) -> None:
    """The reference's `layer`, an operation for each kernel, with the padded intermediate width of the kernels."""
    w, device = model.layers[index], x.device.type
    options: Arguments = {"modality_offsets": offsets_tensor(tokens.offsets, device), "backend": backend}

    def put(t: torch.Tensor) -> torch.Tensor:
        return t.to(device).contiguous()

    h = ops.rms_norm(x, put(w.attn_norm), **options)
    q, k, v, gate = ops.gemm_qkv(
        h,
        put(w.qkvg),
        put(w.q_norm),
        put(w.k_norm),
        put(tokens.rope),
        num_q_heads=CONFIG.num_q_heads,
        num_kv_heads=CONFIG.num_kv_heads,
        **options,
    )
    o = ops.gated_attention(q, k, v, gate, **options)
    ops.gemm_residual(o.flatten(1), put(w.proj), x, **options)
    h = ops.rms_norm(x, put(w.mlp_norm), **options)
    if CONFIG.is_gelu(index):
        u, down = ops.gemm_gelu7(h, put(w.up_gate), **options), w.down
    else:
        padding = -w.down.shape[2] % 64
        out = h.new_empty(len(h), w.down.shape[2] + padding)
        u = ops.gemm_swiglu7(h, put(w.up_gate), out=out, **options)
        down = torch.nn.functional.pad(w.down, (0, padding))
    ops.gemm_residual(u, put(down), x, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_made_of_operations(model: DiT, tokens: PackedTokens, backend: ops.Backend) -> None:
    x = model.embed(tokens)
    for index in range(CONFIG.num_layers):
        expected, got = x.clone(), x.to(device_of(backend), copy=True)
        model.layer(index, expected, tokens)
        layer_by_operations(model, index, got, tokens, backend)
        if backend == "reference" and index == 0:
            assert torch.equal(got, expected)
        # bfloat16 results that fell on the other side of a rounding; zero columns change the order of a sum.
        assert rel_err(got.cpu() - x, expected - x) < 5e-3
        x = expected


def test_embed_and_head_equal_the_model(model: DiT, tokens: PackedTokens) -> None:
    offsets = offsets_tensor(tokens.offsets, "cpu")
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(4, 2, 6, 4, generator=generator)
    text = ops.embed_text(tokens.text, *model.adapter["text"], backend="reference")
    x = ops.embed(
        video,
        tokens.audio,
        text,
        video_weight=model.adapter["video"][0],
        video_bias=model.adapter["video"][1],
        audio_weight=model.adapter["audio"][0],
        audio_bias=model.adapter["audio"][1],
        modality_offsets=offsets,
        out=torch.empty(len(tokens.rope), CONFIG.hidden_size),
        backend="reference",
    )
    assert torch.equal(x, model.embed(tokens))
    video_tokens, audio_tokens = model.project_out(x, tokens.offsets)
    got = ops.head(
        x,
        video_norm=model.head["video"][0][0],
        audio_norm=model.head["audio"][0][0],
        video_weight=model.head["video"][1],
        audio_weight=model.head["audio"][1],
        modality_offsets=offsets,
        video_out=torch.empty_like(video),
        audio_out=torch.empty_like(tokens.audio),
        backend="reference",
    )
    assert torch.equal(got[0], unpatchify(video_tokens, tokens.grid))
    assert torch.equal(got[1], audio_tokens)


@pytest.mark.parametrize("op", [ops.gemm, ops.gemm_gelu7])
def test_output_over_the_input_is_refused(op: Any) -> None:
    both = torch.zeros(4, 16, dtype=torch.bfloat16)
    w = torch.zeros(1, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"out: expected memory of its own, got memory that the input a shares"
    ):
        op(both, w, out=both, backend="sim")
    op(both[:2], w, out=both[2:], backend="sim")


def test_attention_over_an_input_is_refused() -> None:
    for name in ("q", "k", "v"):
        arguments = VALID["gated_attention"]() | {"k": bf16(ROWS, 4, 128), "v": bf16(ROWS, 4, 128)}
        arguments["out"] = arguments[name]
        with pytest.raises(ValueError, match=f"out: expected memory of its own, .* the input {name} shares"):
            ops.gated_attention(**arguments, backend="sim")


@pytest.mark.parametrize("backend", ["reference", "sim"])
def test_no_rows_is_no_work(backend: ops.Backend) -> None:
    a, w = torch.zeros(0, 16, dtype=torch.bfloat16), torch.zeros(1, 16, 16, dtype=torch.bfloat16)
    assert ops.gemm(a, w, backend=backend).shape == (0, 16)
    assert ops.gemm_swiglu7(a, w, backend=backend).shape == (0, 8)
    assert ops.gemm_residual(a, w, torch.zeros(0, 16), backend=backend).shape == (0, 16)
    assert ops.rms_norm(torch.zeros(0, 16), torch.zeros(1, 16), backend=backend).shape == (0, 16)
    q = torch.zeros(0, 2, 128, dtype=torch.bfloat16)
    assert ops.gated_attention(q, q, q, torch.zeros(0, 2), backend=backend).shape == (0, 2, 128)


def test_a_convolution_over_its_input_is_refused() -> None:
    arguments = VALID["conv_3x3"]()
    arguments["out"] = arguments["x"].flatten()[: 2 * 3 * 2 * 8].view(2, 3, 2, 8)
    with pytest.raises(
        ValueError, match=r"out: expected memory of its own, got memory that the input x shares"
    ):
        ops.conv_3x3(**arguments, backend="sim")


@pytest.mark.parametrize(("name", "other"), [("normed", "out"), ("shortcut", "out"), ("shortcut", "normed")])
def test_outputs_of_a_convolution_lie_apart(name: str, other: str) -> None:
    arguments = VALID["conv_3x3"]()
    # One frame further on in one buffer of three.
    both = bf16(3, 3, 2, 8)
    arguments |= {name: both[1:], other: both[:2]}
    message = f"{name}: expected memory of its own, got memory that the input {other} shares"
    with pytest.raises(ValueError, match=message):
        ops.conv_3x3(**arguments, backend="sim")
    if name == "shortcut":  # the very same frames are read before they are written
        ops.conv_3x3(**arguments | {name: both[:2]}, backend="sim")
