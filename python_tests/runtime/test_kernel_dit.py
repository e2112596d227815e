"""The DiT on the kernels against the published implementation's vectors and against the reference.

The same cases in plain PyTorch operations, in the simulator and on a GPU. Every golden model has heads of 128 channels,
so none falls back. Buffers are NaN beforehand: what nobody writes, nobody may read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from backends import BACKENDS, device_of
from cases import load_golden
from dit_cases import CONFIG, NAMES, frame_window, golden_model, inputs, random_model
from magihuman_fast.errors import InputError
from magihuman_fast.kernels import ops
from magihuman_fast.model.config import MAX_TEXT_TOKENS, DiTConfig
from magihuman_fast.runtime.dit import Activations, ClipShape, KernelDiT, Prompt, kernel_limits
from mismatch import require_at_most, require_equal, require_finite, require_rel_err
from numerics import rel_err


def clip() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(48, 2, 4, 6), torch.randn(5, 64), torch.randn(7, 64)


def buffers(dit: KernelDiT, shape: ClipShape) -> tuple[Prompt, Activations]:
    """Buffers with NaN wherever a float can be."""
    prompt = Prompt(dit.config, shape, dit.device)
    activations = Activations(dit.config, shape, dit.device)
    for tensor in (prompt.encoding, prompt.text, prompt.rope, activations.x, activations.h):
        tensor.fill_(torch.nan)
    for tensor in (*activations.inner.values(), *activations.qkv_gate):
        tensor.fill_(torch.nan)
    return prompt, activations


def run(
    dit: KernelDiT,
    video: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor,
    coords: Any = "v2",
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward in fresh buffers."""
    # Copies: a tensor in a mapped file lies where it likes, the engine's buffers do not.
    video, audio, text = (x.clone().to(dit.device) for x in (video, audio, text))
    shape = ClipShape(*video.shape[1:], len(audio))
    prompt, activations = buffers(dit, shape)
    dit.write_prompt(prompt, shape, text, coords)
    outs = torch.full_like(video, torch.nan), torch.full_like(audio, torch.nan)
    dit.velocity(video, audio, prompt, shape, activations, *outs, frame_window=window)
    return outs[0].cpu(), outs[1].cpu()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend: ops.Backend, name: str) -> None:
    golden = load_golden(f"dit/{name}")
    dit = KernelDiT(golden_model(golden, device=device_of(backend)), backend=backend)
    out = run(dit, *inputs(golden), golden.meta["coords_style"], frame_window(golden))
    for part, velocity in zip(("video", "audio"), out, strict=True):
        bound = 1.25 * float(golden.meta[f"rel_err_{part}"])
        require_rel_err(f"{name}: {part}", velocity, golden.batch0(f"out_fp32.{part}"), bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float32(backend: ops.Backend) -> None:
    """No further from float32 than twice what the reference is in the same precision; one text row, and all 640."""
    exact, plain = random_model(dtype=torch.float32), random_model()
    dit = KernelDiT(random_model(device_of(backend)), backend=backend)
    video, audio, _ = clip()
    for count in (1, MAX_TEXT_TOKENS):
        text = torch.randn(count, 64)
        truth, rounded = exact.velocity(video, audio, text), plain.velocity(video, audio, text)
        outs = run(dit, video, audio, text)
        for part, got, ref, peer in zip(("video", "audio"), outs, truth, rounded, strict=True):
            worst = (peer - ref).abs().max()
            more: dict[str, Any] = {"bound": 4 * worst, "facts": {"text": count}}
            require_rel_err(part, got, ref, 2 * rel_err(peer, ref), **more)
            # One wrong tile of rows is lost in a norm over everything.
            largest = (got - ref).abs().max()
            require_at_most(f"{part}:", largest, 4 * worst, got=got, ref=ref, **more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_layer_computes_no_text(backend: ops.Backend) -> None:
    dit = KernelDiT(random_model(device_of(backend)), backend=backend)
    video, audio, text = (x.to(dit.device) for x in clip())
    shape = ClipShape(*video.shape[1:], len(audio))
    prompt, a = buffers(dit, shape)
    dit.write_prompt(prompt, shape, text, "v2")
    dit.embed(video, audio, prompt, a)
    rows = slice(shape.first_text, shape.first_text + len(text))
    for i in range(CONFIG.num_layers):
        before = a.x.clone()
        normed = ops.rms_norm(a.x, dit.layers[i].attn_norm, modality_offsets=prompt.offsets, backend=backend)
        dit.layer(i, a, prompt, shape, None)
        is_last = i == CONFIG.num_layers - 1
        assert torch.equal(a.x[rows], before[rows]) == is_last
        assert torch.equal(a.h[rows], normed[rows]) == is_last  # nor is their attention
        assert not torch.equal(a.x[: rows.start], before[: rows.start])
        require_finite("x", a.x[: rows.stop], facts={"layer": i})
        says = "rows beyond the ranges were written"
        require_equal("x:", a.x[rows.stop :], torch.nan, says=says, facts={"layer": i})


def test_schedules_do_not_matter() -> None:
    """In the simulator any order of whatever is asynchronous gives the same bits."""
    dit, given = KernelDiT(random_model(), backend="sim"), clip()
    ops.simulator().set_seed(0)
    first = run(dit, *given)
    for seed in range(1, 4):
        ops.simulator().set_seed(seed)
        for got, ref in zip(run(dit, *given), first, strict=True):
            assert torch.equal(got, ref)


def test_weights_are_held_once() -> None:
    """The reference model sees the packed weights, and computes with them what it did before."""
    dit, given = random_model(), clip()
    before = dit.velocity(*given)
    packed = KernelDiT(dit, backend="reference")
    for mine, theirs in zip(packed.layers, dit.layers, strict=True):
        for name in ("qkvg", "proj", "up_gate", "down"):
            assert getattr(mine, name).data_ptr() == getattr(theirs, name).data_ptr()
    assert packed.layers[1].down.shape[2] == 704  # 680 columns, and zeros
    assert dit.layers[1].down.shape[2] == 680
    for got, ref in zip(dit.velocity(*given), before, strict=True):
        assert rel_err(got, ref) <= 1e-3  # a strided product may sum in another order


def test_bytes_of_buffers() -> None:
    shape = ClipShape(2, 4, 6, 5)
    dit = KernelDiT(random_model(), backend="reference")
    prompt, a = buffers(dit, shape)
    tensors = [prompt.encoding, prompt.text, prompt.rope, prompt.offsets, prompt.offsets_without_text]
    assert Prompt.nbytes(CONFIG, shape) == sum(t.nbytes for t in tensors)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (a.x, a.h, *a.qkv_gate, *a.inner.values())
    }
    assert len(storages) == 3
    assert Activations.nbytes(CONFIG, shape) == sum(storages.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 64}, r"heads of 128 channels, the model has 64"),
        ({"hidden_size": 5248}, r"hidden size of at most 5120, the model has 5248"),
        ({"text_in_channels": 12}, r"text_in_channels to be a multiple of 8, the model has 12"),
    ],
)
def test_limits(change: dict[str, int], message: str) -> None:
    reason = kernel_limits(replace(CONFIG, **change), torch.bfloat16)
    assert reason is not None
    assert re.search(message, reason)
    assert kernel_limits(DiTConfig(), torch.bfloat16) is None


def test_float32_is_refused() -> None:
    with pytest.raises(InputError, match=r"KernelDiT: the kernels compute in bfloat16, not torch.float32"):
        KernelDiT(random_model(dtype=torch.float32), backend="reference")
