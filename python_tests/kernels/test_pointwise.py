"""Norm, embedders, head and sampler updates against float64, whatever computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backends import BACKENDS, beyond_rows, device_of, offsets_tensor, poisoned, runs
from magihuman_fast.kernels import ops
from magihuman_fast.model.packing import patchify, unpatchify
from magihuman_fast.model.sampler import UniPC, flow_sigmas, renoise, unipc_steps
from mismatch import require_close, require_equal, require_rel_err

# Offsets (0, Nv, Nv + Na, L) in M rows: everything in use, rows to spare, each modality empty, all of them empty.
NORMS = [
    (1, 8, None),
    (40, 520, None),  # several rows a block, all of its warps at work
    (7, 72, (0, 3, 5, 7)),
    (9, 200, (0, 3, 3, 6)),
    (5, 1032, (0, 0, 4, 4)),
    (3, 5120, (0, 1, 2, 2)),
    (4, 16, (0, 0, 0, 0)),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> ops.Backend:
    return request.param


@pytest.fixture(autouse=True)
def two_processors(request: pytest.FixtureRequest) -> None:
    """Few in the simulator, so that blocks take several rows or tiles each."""
    if "backend" not in request.fixturenames or request.getfixturevalue("backend") == "sim":
        ops.simulator().set_multiprocessor_count(2)


def drawn(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("rows", "h", "offsets"), NORMS)
def test_rms_norm(
    backend: ops.Backend, rows: int, h: int, offsets: tuple[int, ...] | None, groups: int
) -> None:
    if groups == 3 and offsets is None:
        offsets = (0, rows // 2, rows, rows)
    device = device_of(backend)
    x, weight = drawn(1, rows, h, scale=3), drawn(2, groups, h, scale=0.2)
    live = rows if offsets is None else offsets[3]
    scale = 1 + weight.double()
    if groups == 3:
        scale = scale.repeat_interleave(torch.tensor(np.diff(offsets)), dim=0)
    expected = x[:live].double() * (x[:live].double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    expected = expected * (scale if groups == 3 else scale[0])
    on_device = None if offsets is None else offsets_tensor(offsets, device)
    for _ in runs(backend, 8):
        out = poisoned((rows, h), torch.bfloat16, device)
        ops.rms_norm(
            x.to(device), weight.to(device), modality_offsets=on_device, out=out, backend=backend, num_sms=1
        )
        got = out[:live].cpu().double()
        # Half a unit of bfloat16's last place, and 1e-5 for where float32 puts a value beyond the middle.
        require_close("rms_norm", got, expected, (2**-8 + 1e-5) * expected.abs())
        untouched(out, live)


# (C, T, H, W), audio channels, width, Na and the room for it, Nt and the room for it.
GRIDS = [
    ((2, 1, 2, 2), 8, 8, (1, 1), (1, 1)),
    ((4, 2, 6, 4), 16, 72, (3, 5), (2, 6)),
    ((6, 3, 4, 12), 8, 64, (0, 2), (5, 5)),
    ((2, 1, 14, 20), 24, 132, (65, 65), (0, 3)),
    ((48, 1, 4, 4), 64, 20, (2, 2), (3, 3)),
    ((2, 1, 2, 2), 8, 8, (0, 0), (0, 0)),
]


def require_within(name: str, got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """Every element within 1e-6 of the sum of its terms' magnitudes, and the whole within 1e-6: float32's own error."""
    require_close(name, got, expected, 1e-6 * size)
    if got.numel() > 0:
        require_rel_err(name, got, expected, 1e-6, bound=1e-6 * size)


def require_near(
    name: str, got: torch.Tensor, expected: torch.Tensor, *, rtol: float, atol: float, **facts: int
) -> None:
    require_close(name, got, expected, atol + rtol * expected.abs(), facts=facts)


def untouched(out: torch.Tensor, live: int) -> None:
    """NaN still, beyond the rows in use and between the rows."""
    require_equal("out:", out[live:], torch.nan, says="rows beyond the ranges were written")
    require_equal("out:", beyond_rows(out), torch.nan, says="elements between the rows were written")


@pytest.mark.parametrize(("grid", "channels", "h", "audio_rows", "text_rows"), GRIDS)
def test_embed(
    backend: ops.Backend,
    grid: tuple[int, int, int, int],
    channels: int,
    h: int,
    audio_rows: tuple[int, int],
    text_rows: tuple[int, int],
) -> None:
    device = device_of(backend)
    video, audio = drawn(1, *grid), drawn(2, audio_rows[1], channels)
    text = drawn(3, text_rows[1], h)
    video_weight, audio_weight = drawn(4, h, 4 * grid[0]), drawn(5, h, channels)
    video_bias, audio_bias = drawn(6, h), drawn(7, h)
    tokens = patchify(video)
    offsets = (0, len(tokens), len(tokens) + audio_rows[0], len(tokens) + audio_rows[0] + text_rows[0])
    rows = len(tokens) + audio_rows[1] + text_rows[1] + 2

    def product(a: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(a.double(), w.double(), b.double())

    def both(function: object) -> torch.Tensor:
        sound = audio[: audio_rows[0]]
        parts = [(tokens, video_weight, video_bias), (sound, audio_weight, audio_bias)]
        return torch.cat([product(*(function(x) for x in part)) for part in parts])  # type: ignore[operator]

    expected, size = both(lambda x: x), both(torch.abs)
    for _ in runs(backend, 12):
        out = poisoned((rows, h), torch.float32, device)
        ops.embed(
            video.to(device),
            audio.to(device),
            text.to(device),
            video_weight=video_weight.to(device),
            video_bias=video_bias.to(device),
            audio_weight=audio_weight.to(device),
            audio_bias=audio_bias.to(device),
            modality_offsets=offsets_tensor(offsets, device),
            out=out,
            backend=backend,
        )
        got = out.cpu()
        require_within("embed: video and audio", got[: offsets[2]], expected, size)
        copied = got[offsets[2] : offsets[3]]
        require_equal("embed: text", copied, text[: text_rows[0]], says="is not what was given")
        untouched(out, offsets[3])


@pytest.mark.parametrize(
    ("rows", "channels", "h", "schedules"),
    [(1, 8, 4, 12), (3, 24, 68, 12), (65, 40, 132, 12), (64, 16, 64, 12), (2, 3584, 8, 4)],
)
def test_embed_text(backend: ops.Backend, rows: int, channels: int, h: int, schedules: int) -> None:
    device = device_of(backend)
    text, weight, bias = drawn(1, rows, channels), drawn(2, h, channels), drawn(3, h)
    expected = F.linear(text.double(), weight.double(), bias.double())
    size = F.linear(text.double().abs(), weight.double().abs(), bias.double().abs())
    for _ in runs(backend, schedules):
        out = torch.full((rows, h), torch.nan, device=device)
        ops.embed_text(text.to(device), weight.to(device), bias.to(device), out=out, backend=backend)
        require_within("embed_text", out.cpu(), expected, size)


# (C, T, H, W), audio channels, width, Na and the room for it, text rows, schedules.
HEADS = [
    ((2, 1, 2, 2), 4, 8, (1, 1), 1, 12),
    ((4, 2, 6, 4), 16, 72, (3, 5), 2, 12),
    ((6, 3, 4, 12), 8, 64, (0, 2), 0, 12),
    ((2, 1, 14, 20), 68, 40, (65, 65), 3, 12),
    ((48, 1, 2, 4), 64, 5120, (2, 2), 1, 4),
    ((2, 1, 2, 2), 4, 8, (0, 0), 1, 4),
]


@pytest.mark.parametrize(("grid", "channels", "h", "audio_rows", "text", "schedules"), HEADS)
def test_head(
    backend: ops.Backend,
    grid: tuple[int, int, int, int],
    channels: int,
    h: int,
    audio_rows: tuple[int, int],
    text: int,
    schedules: int,
) -> None:
    device = device_of(backend)
    patches = (grid[1], grid[2] // 2, grid[3] // 2)
    tokens = patches[0] * patches[1] * patches[2]
    offsets = (0, tokens, tokens + audio_rows[0], tokens + audio_rows[0] + text)
    x = poisoned((offsets[3] + 1, h), torch.float32, "cpu")
    x[: offsets[3]] = drawn(1, offsets[3], h, scale=2)
    norms = [drawn(2, h, scale=0.2), drawn(3, h, scale=0.2)]
    weights = [drawn(4, 4 * grid[0], h), drawn(5, channels, h)]
    expected, sizes = [], []
    for norm, weight, a, b in zip(norms, weights, offsets[:2], offsets[1:3], strict=True):
        part = x[a:b].double()
        part = part * (part.square().mean(1, keepdim=True) + 1e-6).rsqrt() * (1 + norm.double())
        expected.append(part @ weight.double().T)
        sizes.append(part.abs() @ weight.double().abs().T)
    for _ in runs(backend, schedules):
        video = torch.full(grid, torch.nan, device=device)
        audio = torch.full((audio_rows[1], channels), torch.nan, device=device)
        ops.head(
            # A transfer would drop the pitch.
            torch.as_strided(x._base.to(device), x.shape, x.stride()),  # type: ignore[union-attr]
            video_norm=norms[0].to(device),
            audio_norm=norms[1].to(device),
            video_weight=weights[0].to(device),
            audio_weight=weights[1].to(device),
            modality_offsets=offsets_tensor(offsets, device),
            video_out=video,
            audio_out=audio,
            backend=backend,
        )
        wanted, size = (unpatchify(x[0], patches) for x in (expected, sizes))
        require_within("head: video", video.cpu(), wanted, size)
        require_within("head: audio", audio[: audio_rows[0]].cpu(), expected[1], sizes[1])
        rest, says = audio[audio_rows[0] :], "rows beyond the ranges were written"
        require_equal("head: audio:", rest, torch.nan, says=says)


def test_embed_and_head_use_their_own_patch_orders(backend: ops.Backend) -> None:
    # With weights that only select channels, both orders can be read off the result.
    device = device_of(backend)
    grid = (2, 1, 2, 2)
    video = torch.arange(8.0).reshape(grid)
    zeros, eye = torch.zeros(8), torch.eye(8)
    x = torch.zeros(1, 8, device=device)
    offsets = offsets_tensor((0, 1, 1, 1), device)
    ops.embed(
        video.to(device),
        torch.zeros(1, 8, device=device),
        torch.zeros(1, 8, device=device),
        video_weight=eye.to(device),
        video_bias=zeros.to(device),
        audio_weight=eye.to(device),
        audio_bias=zeros.to(device),
        modality_offsets=offsets,
        out=x,
        backend=backend,
    )
    assert x[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # (c, ph, pw)
    out = torch.zeros(grid, device=device)
    sound = torch.zeros(1, 8, device=device)
    norm = (x[0].double().square().mean() + 1e-6).sqrt().float() - 1  # undoes the division
    ops.head(
        x,
        video_norm=norm.expand(8).contiguous(),
        audio_norm=zeros.to(device),
        video_weight=eye.to(device),
        audio_weight=eye.to(device),
        modality_offsets=offsets,
        video_out=out,
        audio_out=sound,
        backend=backend,
    )
    # Channel c of place (ph, pw) came from token channel 2 (2 ph + pw) + c.
    torch.testing.assert_close(out.cpu(), torch.tensor([[[[0.0, 2], [4, 6]]], [[[1, 3], [5, 7]]]]))


def renoise_table(sigmas: np.ndarray) -> torch.Tensor:
    rows = np.stack([sigmas[:-1], 1 - sigmas[1:], sigmas[1:]], axis=1)
    return torch.from_numpy(rows).float()


@pytest.mark.parametrize("shape", [(4,), (7, 64), (48, 2, 6, 4), (2, 3, 26, 28)])
def test_renoise_step(backend: ops.Backend, shape: tuple[int, ...]) -> None:
    device, steps = device_of(backend), 4
    sigmas = flow_sigmas(steps)
    noise = drawn(1, steps, *shape)
    for seed in runs(backend, 13):
        x, step = drawn(2, *shape).to(device), torch.zeros(1, dtype=torch.int32, device=device)
        expected = drawn(2, *shape)
        for i in range(steps):
            velocity = drawn(3 + i + seed, *shape)
            ops.renoise_step(
                x,
                velocity.to(device),
                noise.to(device),
                renoise_table(sigmas).to(device),
                step,
                backend=backend,
            )
            ops.advance_step(step, backend=backend)
            expected = renoise(expected, velocity, noise[i], sigmas[i], sigmas[i + 1])
            require_near("renoise_step", x.cpu(), expected, rtol=1e-6, atol=1e-6, step=i)
        # Past the end, and before the start, nothing happens.
        before = x.clone()
        for outside in (steps, -1):
            step.fill_(outside)
            ops.renoise_step(
                x, before, noise.to(device), renoise_table(sigmas).to(device), step, backend=backend
            )
            require_equal("renoise_step", x, before, says="does something beyond the last step")


@pytest.mark.parametrize("grid", [(2, 1, 2, 2), (4, 3, 6, 10), (48, 2, 4, 28), (6, 2, 34, 60)])
def test_clamp_image(backend: ops.Backend, grid: tuple[int, int, int, int]) -> None:
    device = device_of(backend)
    video, image = drawn(1, *grid), drawn(2, grid[0], *grid[2:])
    expected = torch.cat([image.unsqueeze(1), video[:, 1:]], dim=1)
    for _ in runs(backend, 13):
        out = ops.clamp_image(video.to(device, copy=True), image.to(device), backend=backend)
        require_equal("clamp_image", out.cpu(), expected, says="is no copy")


def unipc_table(sigmas: np.ndarray) -> torch.Tensor:
    """Rows of (sigma, own, last, old, prev, new, keep, current, previous)."""
    rows = []
    for s in unipc_steps(sigmas):
        last, old, prev, new = s.corrector or (0, 0, 0, 0)
        rows.append([s.sigma, float(s.corrector is None), last, old, prev, new, *s.predictor])
    return torch.tensor(rows, dtype=torch.float64).float()


@pytest.mark.parametrize("guided", ["no", "one scale", "per frame"])
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (48, 2, 6, 4), (2, 5, 14, 12)])
def test_unipc_step(backend: ops.Backend, shape: tuple[int, ...], guided: str) -> None:
    device, steps = device_of(backend), 5
    sigmas = flow_sigmas(steps)
    scales = None if guided == "no" else 1 + drawn(9, steps, 1 if guided == "one scale" else shape[1]).abs()
    table = unipc_table(sigmas).to(device)
    for seed in runs(backend, 6):
        solver, expected = UniPC(sigmas), drawn(1, *shape)
        x = expected.to(device, copy=True)
        x_last = torch.full(shape, torch.nan, device=device)
        history = torch.full((2, *shape), torch.nan, device=device)
        step = torch.zeros(1, dtype=torch.int32, device=device)
        for i in range(steps):
            velocity, null = drawn(2 + i + seed, *shape), drawn(50 + i + seed, *shape)
            guidance = {}
            if scales is not None:
                guidance = {"null_velocity": null.to(device), "guidance": scales.to(device)}
            ops.unipc_step(x, velocity.to(device), x_last, history, table, step, **guidance, backend=backend)
            ops.advance_step(step, backend=backend)
            if scales is not None:
                velocity = null + scales[i].reshape(-1, 1, 1) * (velocity - null)
            expected = solver.step(velocity, expected)
            # Factors of up to 10 on either side of a difference: a few units in the last place of 10.
            require_near("unipc_step", x.cpu(), expected, rtol=2e-6, atol=1e-5, step=i)
        assert int(step) == steps
        ops.unipc_step(x, x, x_last, history, table, step, backend=backend)
        require_near("unipc_step beyond the last", x.cpu(), expected, rtol=2e-6, atol=1e-5)
