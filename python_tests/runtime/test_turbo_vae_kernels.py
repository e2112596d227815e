"""The decoder made of kernels: golden windows in the simulator, its plan at published sizes, parity on a GPU with the
float32 reference."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends import BACKENDS, device_of
from cases import load_golden
from magihuman_fast import InputError
from magihuman_fast import TurboVAE as PublicTurboVAE
from magihuman_fast.checkpoints.synthetic.turbo_vae import TINY_CONFIG
from magihuman_fast.errors import Cancelled
from magihuman_fast.kernels import ops
from magihuman_fast.kernels.conv_weights import pack_layers
from magihuman_fast.model import turbo_vae as reference
from magihuman_fast.model.turbo_vae import Window, plan_windows, to_uint8
from magihuman_fast.runtime import decode_plan, turbo_vae
from magihuman_fast.runtime.decode_plan import Pixels, Step, merged
from magihuman_fast.runtime.turbo_vae import TurboVAE, Workspace, window_plan, workspace_bytes
from mismatch import require_rel_err
from turbo_vae_cases import LATENTS, PUBLISHED, golden_model, random_latent, tiny_state_dict


def tiny_vae(values: Mapping[str, Any] = TINY_CONFIG, backend: ops.Backend = "sim") -> TurboVAE:
    ops.simulator().set_multiprocessor_count(4)
    return TurboVAE.from_state_dict(values, tiny_state_dict(values), dtype=torch.bfloat16, backend=backend)


@pytest.fixture
def poisoned_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode begins with NaN in all of its buffers."""
    acquire = Workspace.acquire

    def poison(self: Workspace) -> None:
        acquire(self)
        for region in self._regions.values():
            region.fill_(torch.nan)

    monkeypatch.setattr(Workspace, "acquire", poison)


# --- the simulator --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_workspace")
@pytest.mark.parametrize("case", ["a_t1", "a_t7", "a_t16"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.slow
def test_golden_windows(backend: ops.Backend, case: str) -> None:
    """One padded window; one whole; a first, a middle and a padded last one."""
    golden = load_golden(f"turbo_vae/{case}")
    vae = TurboVAE(golden_model(golden, torch.bfloat16, device_of(backend)), backend)
    if backend == "sim":
        ops.simulator().set_multiprocessor_count(4)
    video = vae.decode(golden.batch0("in.latent")).cpu()
    assert video.dtype == torch.float32
    # The bound that the PyTorch decoder is held to in bfloat16.
    got, ref = (x.permute(1, 2, 3, 0) for x in (video, golden["out.video_fp32"][0]))
    require_rel_err("video", got, ref, 1.25 * float(golden.meta["rel_err_bf16"]), layout="pixels")


@pytest.mark.usefixtures("poisoned_workspace")
@pytest.mark.slow
def test_frames_are_those_of_the_picture() -> None:
    vae, latent = tiny_vae(), random_latent(9, 1, 2)
    pieces = list(vae.decode_windows(latent))
    assert [tuple(piece.shape) for piece in pieces] == [(3, 25, 16, 32), (3, 8, 16, 32)]
    seen: list[tuple[int, int]] = []
    frames = vae.decode_frames(latent, lambda done, total: seen.append((done, total)))
    assert torch.equal(frames, to_uint8(torch.cat(pieces, 1)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.usefixtures("poisoned_workspace")
@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.slow
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings and frames overwritten in place give the same bits as whole tensors."""
    values = dict(TINY_CONFIG) | {"first_chunk_size": 2, "step_size": 2}
    latent = random_latent(4, 1, 1)
    whole = tiny_vae(values).decode(latent)
    assert whole.isfinite().all()
    monkeypatch.setattr(decode_plan._Builder, "chunk", lambda self, channels: min(chunk, self.frames))
    assert torch.equal(tiny_vae(values).decode(latent), whole)


def test_a_cancelled_decode_gives_its_buffers_back() -> None:
    vae = tiny_vae(dict(TINY_CONFIG) | {"first_chunk_size": 1, "step_size": 1})

    def cancel(done: int, total: int) -> None:
        raise Cancelled(f"after {done} of {total}")

    with pytest.raises(Cancelled, match="after 1 of 2"):
        vae.decode_frames(random_latent(2, 1, 1), cancel)
    (space,) = vae._free
    vae.decode_frames(random_latent(1, 1, 1))
    assert vae._free == [space]
    vae.decode_frames(random_latent(1, 1, 2))  # of another size: new buffers, the old ones are let go
    assert len(vae._free) == 1
    assert vae._free != [space]


@pytest.mark.parametrize("frames", [1, 5, 8, 15, 16])
@pytest.mark.slow
def test_a_window_alone_is_that_window_of_the_clip(frames: int) -> None:
    """What a captured window is given: its own part of the latent, padded, at its beginning."""
    vae, latent = tiny_vae(), random_latent(frames, 1, 2)
    windows = vae._plan(frames)
    with vae._workspace(windows, latent) as workspace:
        for window in windows:
            count = window.keep_stop - window.keep_start
            outs = [torch.zeros(count, 16, 32, 3, dtype=torch.uint8) for _ in range(2)]
            vae.run_window(workspace.latent, window, outs[0], workspace)
            vae.run_window(workspace.window_latent(window), vae.alone(window), outs[1], workspace)
            assert torch.equal(*outs)


def test_buffers_serve_shorter_clips_but_not_longer_ones() -> None:
    def need(frames: int) -> tuple[dict[decode_plan.Region, int], tuple[int, int], tuple[int, ...]]:
        windows = plan_windows(frames, 7, 7)
        most = max(window.keep_stop - window.keep_start for window in windows)
        return workspace_bytes(PUBLISHED, windows, 1, 1), (48 * frames, 48 * 8), (most, 16, 16, 3)

    def space(frames: int, latent_frames: int = 14) -> Workspace:
        regions, _, pictures = need(frames)
        return Workspace(regions, pictures, torch.device("cpu"), (48 * latent_frames, 48 * 8))

    # 13 and 14 latent frames make windows of equal sizes, of which 24 and 28 frames are kept.
    short, longer = need(13), need(14)
    assert short[0] == longer[0]
    assert space(13).fits(*short)
    assert not space(13).fits(*longer)
    assert space(14).fits(*short)
    assert not space(14, 13).fits(*longer)
    assert not space(13).fits(*short[:2], (1, 16, 32, 3))


class LateCopies(TorchFunctionMode):
    """A GPU's copy stream: a copy is done when somebody waits for it; until then there are other bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[tuple[Tensor, Tensor]] = []
        self.waits: list[int] = []  # of the host, each for so many copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.copy_:
            return func(*args, **(kwargs or {}))
        assert kwargs == {"non_blocking": True}
        to, source = args
        self.queued.append((to, source))
        return to.fill_(77)

    def wait_stream(self, stream: object) -> None:
        """Launches are over at once here."""

    def record_event(self) -> SimpleNamespace:
        count, missing = len(self.queued), self.queued[-1]

        def synchronize() -> None:
            self.waits.append(count)
            to, source = missing
            to.copy_(source)

        return SimpleNamespace(synchronize=synchronize)


def test_frames_pass_through_two_windows_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on a stand-in for its streams: a window is copied out while the next one decodes."""
    vae = tiny_vae(dict(TINY_CONFIG) | {"first_chunk_size": 1, "step_size": 1})
    latent = (16 * torch.arange(5.0)).view(1, 5, 1, 1).repeat(48, 1, 1, 1)
    windows, copies = vae._plan(5), LateCopies()
    launched: list[int] = []  # at each window's launch: how many the host has waited for

    def run(latent: Tensor, window: Window, out: Tensor, workspace: Workspace) -> None:
        launched.append(len(copies.waits))
        out[:] = latent[0, window.start] + window.keep_start + torch.arange(len(out)).view(-1, 1, 1, 1)

    monkeypatch.setattr(vae, "run_window", run)
    expected = vae.decode_frames(latent)
    launched.clear()
    monkeypatch.setattr(turbo_vae, "capture_graph", lambda run, device: SimpleNamespace(replay=run))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    with vae._workspace(windows, latent) as workspace:
        workspace.frames = [torch.empty(workspace._frame_shape, dtype=torch.uint8) for _ in range(2)]
        workspace.copy_stream = copies
        staging = workspace.staging
        for _ in range(2):  # launched and captured, then replayed
            frames = torch.full_like(expected, 99)
            for done in vae._frames_by_copy(windows, frames, workspace):
                stop = windows[done - 1].out_stop
                assert torch.equal(frames[:stop], expected[:stop])
            assert done == len(windows) == 5
            # The host waits for a window when the next one has been launched.
            assert launched == [0, 0, 1, 2, 3]
            assert copies.waits == [1, 2, 3, 4, 5]
            for log in (launched, copies.waits, copies.queued):
                log.clear()
        assert workspace.staging is staging
        assert sum(buffer.nbytes for buffer in staging) == 2 * 4 * 16 * 16 * 3


def test_pinned_are_two_windows_and_only_for_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, pinned = torch.empty, []

    def on_the_cpu(size: Any, dtype: Any = None, device: Any = None, pin_memory: bool = False) -> Tensor:
        if pin_memory:
            pinned.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", on_the_cpu)
    monkeypatch.setattr(turbo_vae, "side_stream", lambda device: None)
    size = (28, 16, 16, 3)
    space = Workspace(dict.fromkeys(decode_plan.REGIONS, 2), size, torch.device("cuda"))
    assert pinned == []
    assert [tuple(buffer.shape) for buffer in space.staging] == pinned == [size, size]
    # Not of the device.
    assert space.nbytes == 2 * 28 * 16 * 16 * 3 + 2 * len(decode_plan.REGIONS)


@pytest.mark.parametrize(
    ("latent", "match"),
    [
        (torch.zeros(47, 2, 2, 2), r"\(48, T, h, w\), got torch.float32 \(47, 2, 2, 2\)"),
        (torch.zeros(48, 1, 2, 2).bfloat16(), "got torch.bfloat16"),
        (torch.full((48, 1, 2, 2), float("nan")), "finite values, got 192 .* of 192"),
    ],
)
def test_bad_latents_are_refused_at_the_call(latent: Tensor, match: str) -> None:
    vae = tiny_vae()
    for decode in (vae.decode, vae.decode_frames, vae.decode_windows):
        with pytest.raises(InputError, match=match):
            decode(latent)


# --- which path runs ------------------------------------------------------------------------------------------


def test_the_package_offers_this_decoder() -> None:
    assert PublicTurboVAE is TurboVAE


def test_without_a_gpu_pytorch_runs_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "magihuman_fast.runtime.turbo_vae")
    vae = TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict())
    assert vae.backend == "reference"
    assert "in PyTorch: the weights are torch.float32, the kernels need torch.bfloat16" in caplog.text
    model = reference.TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict())
    latent = random_latent(2, 1, 1)
    assert torch.equal(vae.decode(latent), model.decode(latent))
    assert torch.equal(vae.decode_frames(latent), model.decode_frames(latent))


@pytest.mark.parametrize(
    ("backend", "options", "match"),
    [
        ("gpu", {}, "backend 'gpu': .*(no CUDA device|not a GPU|not compiled)"),
        ("sim", {"dtype": torch.float32}, "backend 'sim': the weights are torch.float32"),
        ("cuda", {}, "expected one of .*'gpu'.* or None, got 'cuda'"),
    ],
)
def test_no_path_stands_in_for_another(backend: Any, options: dict[str, Any], match: str) -> None:
    arguments = {"dtype": torch.bfloat16, "backend": backend} | options
    with pytest.raises(InputError, match=match):
        TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict(), device="cpu", **arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"decoder_block_out_channels": [12, 16, 16, 16]},
            r"\[12, 16, 16, 16\], the kernels need multiples of 8",
        ),
        ({"decoder_block_out_channels": [16, 8, 16, 16]}, "never fall"),
        ({"decoder_block_out_channels": [8, 8, 8, 1024]}, "up to 512"),
    ],
)
def test_decoders_that_the_kernels_cannot_run(change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        tiny_vae(dict(TINY_CONFIG) | change)


# --- the plan at the published sizes --------------------------------------------------------------------------


def windows_of(size: str) -> list[Window]:
    return plan_windows(32, PUBLISHED.first_chunk_size, PUBLISHED.step_size)


@pytest.mark.parametrize("size", LATENTS)
def test_memory_beside_the_weights(size: str) -> None:
    """Regions and two windows' frames: under 12 GB at 1080p; and never more than a region of one view's reach."""
    height, width = LATENTS[size]
    windows = windows_of(size)
    need = workspace_bytes(PUBLISHED, windows, height, width)
    frames = 2 * 28 * (16 * height) * (16 * width) * 3
    total = sum(need.values()) + frames
    assert total < {"256p": 1.1e9, "540p": 3.9e9, "1080p": 12e9}[size]
    # The two that are as large as the largest tensor: 36 frames of 128 channels at half the picture's size.
    assert need["stream"] == need["normed"] == 36 * (8 * height) * (8 * width) * 128 * 2


@pytest.mark.parametrize("size", LATENTS)
@pytest.mark.parametrize("index", [0, 1, 4])
def test_every_frame_is_read_as_it_was_written(size: str, index: int) -> None:
    """Each launch finds, byte for byte, the frames that an earlier one left there, and at the end all were."""
    plan = window_plan(PUBLISHED, windows_of(size)[index], *LATENTS[size])
    held: dict[str, dict[tuple[int, int], int]] = {region: {} for region in decode_plan.REGIONS}

    def span(pixels: Pixels, t: int) -> tuple[int, int]:
        frame = pixels.nbytes // pixels.shape[0]
        start = pixels.offset + t % pixels.shape[0] * frame
        return start, start + frame

    def write(pixels: Pixels, t: int) -> None:
        start, stop = span(pixels, t)
        spans = held[pixels.region]
        for other in [other for other in spans if other[0] < stop and start < other[1]]:
            del spans[other]
        spans[start, stop] = t

    def read(step: Step, pixels: Pixels, t: int) -> None:
        assert held[pixels.region].get(span(pixels, t)) == t, f"{step.op} {step.layer} reads frame {t}: gone"

    reach = {"conv_3x3": 1, "conv_time": 1, "conv_picture": 1}
    for step in plan:
        if step.op == "latent_pixels":
            for t in range(step.count):
                write(step.x, t)
            continue
        r = reach.get(step.op, 0)
        for t in range(max(step.first - r, 0), min(step.first + step.count + r, step.length)):
            read(step, step.x, t)
        times = range(step.first, step.first + step.count)
        if step.op == "conv_time":
            times = range(max(2 * times.start - step.drop, 0), 2 * times.stop - step.drop)
        if step.shortcut is not None:
            for t in times:
                read(step, step.shortcut, t)
        for pixels in (step.out, step.normed):
            if pixels is not None:
                # Blocks write while others still read: what they read through taps lies elsewhere.
                assert step.op == "channel_norm" or not overlap(pixels, step.x, times, step)
                for t in times:
                    write(pixels, t)
    assert plan[-1].op == "conv_picture"


def overlap(to: Pixels, x: Pixels, times: range, step: Step) -> bool:
    """Whether the frames written share bytes with those that the launch reads as its input."""
    if to.region != x.region:
        return False

    def reached(pixels: Pixels, frames: range) -> list[tuple[int, int]]:
        size = pixels.nbytes // pixels.shape[0]
        return [(pixels.offset + t % pixels.shape[0] * size, size) for t in frames]

    sources = reached(x, range(max(step.first - 1, 0), min(step.first + step.count + 1, step.length)))
    return any(a < b + m and b < a + n for a, n in reached(to, times) for b, m in sources)


def test_layers_of_a_window() -> None:
    """Every layer of the published state dict once, with the operations of its convolution."""
    plan = merged(window_plan(PUBLISHED, windows_of("256p")[1], 16, 28))
    layers = [step.layer for step in plan if step.op not in ("channel_norm", "latent_pixels")]
    names = {key.removeprefix("decoder.").rsplit(".", 1)[0] for key in PUBLISHED.state_dict_shapes()}
    assert len(layers) == len(set(layers))
    assert set(layers) == names
    flops = {step.layer: step.flops for step in plan if step.layer and step.op != "channel_norm"}
    assert flops["conv_in.conv"] == 2 * 27 * 48 * 512 * 9 * 16 * 28
    assert flops["up_blocks.2.resnets.0.conv1.conv"] == 2 * 27 * 128 * 128 * 36 * 128 * 224
    # The upsampler's convolution at 16 of 36 of its published operations; conv_out for the kept frames only.
    assert flops["up_blocks.2.upsamplers.0.resample.1"] == 2 * 16 * 128 * 128 * 36 * 64 * 112
    assert flops["conv_out.conv"] == 2 * 27 * 64 * 12 * 28 * 128 * 224
    # Norms that are not part of a convolution: those of 512 channels.
    assert {step.channels for step in plan if step.op == "channel_norm"} == {512}


def test_weights_are_packed_once_in_their_dtype() -> None:
    model = reference.TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict(), dtype=torch.bfloat16)
    layers = pack_layers(model)
    assert {weight.dtype for weight, _ in layers.values()} == {torch.bfloat16}
    assert {bias.dtype for _, bias in layers.values()} == {torch.float32}
    weight, bias = layers["up_blocks.0.upsamplers.0.time_conv.conv"]
    assert (weight.shape, bias.shape) == ((2, 16, 3, 16), (2, 16))
    assert layers["up_blocks.0.upsamplers.0.resample.1"][0].shape == (4, 16, 2, 2, 16)


# --- parity with the float32 reference ------------------------------------------------------------------------
