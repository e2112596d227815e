"""The decoder on a Hopper GPU: parity with float32, every layer, memory, captured windows, streams.

The checks that need no size run here in the simulator as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import log10, prod
from typing import Any

import pytest
import torch
from torch import Tensor

import conv_cases
import decoder_cases
from kernel_cases import TINY, Inputs, Setting, gpu_setting
from magihuman_fast.checkpoints.synthetic.turbo_vae import TINY_CONFIG
from magihuman_fast.kernels import ops
from magihuman_fast.model import turbo_vae as reference
from magihuman_fast.model.turbo_vae import num_frames, to_uint8
from magihuman_fast.model.turbo_vae_config import PUBLISHED_CONFIG, TurboVAEConfig
from magihuman_fast.runtime.decode_plan import Step
from magihuman_fast.runtime.turbo_vae import TurboVAE, Workspace, workspace_bytes
from mismatch import (
    Mismatch,
    require,
    require_at_most,
    require_close,
    require_equal,
    require_finite,
    require_rel_err,
)
from numerics import rel_err
from turbo_vae_cases import LATENTS, PUBLISHED, random_latent


def random_weights(config: TurboVAEConfig, device: str) -> dict[str, Tensor]:
    """Weights of unit gain, bf16 values, so that both precisions hold the same numbers."""
    generator = torch.Generator(device).manual_seed(7)
    found = {}
    for name, shape in config.state_dict_shapes().items():
        scale = 0.02 if name.endswith(".bias") else prod(shape[1:]) ** -0.5
        found[name] = (scale * torch.randn(shape, generator=generator, device=device)).bfloat16()
    return found


def psnr(frames: Tensor, truth: Tensor) -> float:
    """Of 8-bit frames, in dB."""
    square = (frames.float() - truth.float()).square().mean().item()
    return 20 * log10(255) - 10 * log10(max(square, 1e-12))


def check_parity(values: Mapping[str, Any], latent: Tensor, device: str, backend: ops.Backend) -> float:
    """Kernels against the float32 reference: at most twice the error of the bf16 reference; PSNR in dB."""
    weights = random_weights(TurboVAEConfig.from_dict(values), device)

    def model(dtype: torch.dtype) -> reference.TurboVAE:
        return reference.TurboVAE.from_state_dict(values, weights, device=device, dtype=dtype)

    latent = latent.to(device)
    truth = model(torch.float32).decode(latent)
    in_bf16 = model(torch.bfloat16).decode(latent)
    vae = TurboVAE(model(torch.bfloat16), backend)
    frames = vae.decode_frames(latent)
    video = vae.decode(latent)
    assert frames.shape == (num_frames(latent.shape[1]), *truth.shape[2:], 3)
    pixels: dict[str, Any] = {"layout": "pixels"}
    of_picture = to_uint8(video).cpu()
    require_equal("frames", frames, of_picture, says="are not those of the picture", **pixels)
    got, ref, peer = (in_pixels(x) for x in (video, truth, in_bf16))
    # Where it is over twice PyTorch's: of the element's own error, or of the usual one.
    usual = (peer - ref).square().mean().sqrt()
    pixels["rerun"] = lambda: in_pixels(vae.decode(latent))
    limit = 2 * rel_err(in_bf16, truth)
    require_rel_err("video", got, ref, limit, bound=2 * (peer - ref).abs() + 4 * usual, **pixels)
    wanted = to_uint8(truth).cpu()
    found, by_torch = psnr(frames, wanted), psnr(to_uint8(in_bf16).cpu(), wanted)
    require(found >= by_torch - 6.1, "PSNR is under that of half PyTorch's error", dB=found, torch=by_torch)
    # An error of one tile would vanish in the whole: no 16 x 16 block of any frame is off by more than a few times.
    worst = (video - truth).square().unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2)).sqrt().max()
    bound = (in_bf16 - truth).square().unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2)).sqrt().max()
    says = "is over twice PyTorch's error in one block"
    pixels |= {"got": got, "ref": ref, "bound": 2 * (peer - ref).abs() + 4 * usual}
    require_at_most("video", worst, 2 * bound, says=says, **pixels)
    require_equal("video:", in_pixels(vae.decode(latent)), got, layout="pixels", rerun=pixels["rerun"])
    return found


def in_pixels(video: Tensor) -> Tensor:
    """(3, T, H, W) as (T, H, W, 3)."""
    return video.permute(1, 2, 3, 0)


def test_gpu_parity_check_holds_in_the_simulator() -> None:
    values = dict(TINY_CONFIG) | {"first_chunk_size": 1, "step_size": 1}
    ops.simulator().set_multiprocessor_count(4)
    assert check_parity(values, random_latent(2, 1, 1), "cpu", "sim") > 30


def check_layer(step: Step, s: Setting) -> None:
    """One launch at its shape in the decoder; its first, middle and last frame, element by element, against the same in
    bf16 PyTorch. Frame by frame: at 1080p a tensor is 10 GB and more."""
    given = {
        name: value for name, value in decoder_cases.layer_inputs(step, s).items() if name != "published"
    }
    names = [name for name in ("out", "normed", "plain") if name in given]
    found = dict(given)
    for name in names:
        empty = given[name].dtype == torch.uint8
        found[name] = torch.full_like(given[name], 77 if empty else torch.nan)
    getattr(ops, step.op)(**found, backend=s.backend)
    more: dict[str, Any] = {"layout": "pixels", "facts": facts_of(step)}
    if s.backend == "gpu" and step.op in conv_cases.FORMS:
        more["isolate"] = partial(isolated, step)

    def rerun(name: str, frames: slice) -> Tensor:
        again = dict(given)
        for other in names:
            empty = given[other].dtype == torch.uint8
            again[other] = torch.full_like(given[other], 77 if empty else torch.nan)
        getattr(ops, step.op)(**again, backend=s.backend)
        return again[name][frames]

    for name in names:
        for t, frame in enumerate(found[name]):
            if frame.is_floating_point():
                once_more = partial(rerun, name, slice(t, t + 1))
                require_finite(f"{name} of {step.op}", frame[None], numbers=[t], rerun=once_more, **more)
    for wanted, frames in some_frames(step, given, names):
        getattr(ops, step.op)(**wanted, backend="reference")
        for name in names:
            for t in frames:
                once_more = partial(rerun, name, slice(t, t + 1))
                ref = wanted[name][t % len(wanted[name])]
                check_frame(step, name, found[name][t], ref, numbers=[t], rerun=once_more, **more)


def isolated(step: Step) -> dict[str, str]:
    """conv_cases.isolate of a convolution with this one's picture, channels and ending, on a few frames."""
    wanted = decoder_cases.ending(step)
    endings = {
        name: ("shortcut" in given, "out" in given, "out_eps" in given, "normed" in given)
        for name, given in conv_cases.ENDINGS.items()
    }
    nearest = "shortcut" if wanted[3] else "raw"
    ending = next((name for name, flags in endings.items() if flags == wanted), nearest)
    _, height, width, channels = step.x.shape
    size = (min(step.count, 3), height, width)
    options: dict[str, Any] = {"num_sms": 0, "device": "cuda"}
    problem = conv_cases.make_problem(step.op, ending, size, channels, step.channels, **options)
    return conv_cases.isolate(problem)


def facts_of(step: Step) -> dict[str, Any]:
    names = ("op", "layer", "first", "count", "length", "drop", "channels")
    return {name: getattr(step, name) for name in names} | {"x": step.x.shape}


def some_frames(step: Step, given: Inputs, names: list[str]) -> Iterator[tuple[Inputs, list[int]]]:
    """Arguments for one frame at a time, outputs as long as they need to be, and which frames they then hold."""
    if step.op in ("conv_picture", "latent_pixels"):  # few channels: all at once
        yield given | {name: torch.zeros_like(given[name]) for name in names}, list(range(len(given["out"])))
        return
    per = 2 if step.op == "conv_time" else 1
    count = len(given["x"])
    for first in sorted({0, count // 2, count - 1}):
        outputs = {name: torch.zeros_like(given[name][:per]) for name in names}
        frames = [per * first - step.drop + i for i in range(per)]
        yield given | outputs | {"first": first, "count": 1}, [t for t in frames if t >= 0]


def check_frame(step: Step, name: str, got: torch.Tensor, ref: torch.Tensor, **more: Any) -> None:
    more |= {"says": "differs from PyTorch"}
    got, ref = got.float().unsqueeze(0), ref.float().unsqueeze(0)
    if step.op == "conv_picture":
        # Levels of 255: one unit of bf16 near 1 is one of them.
        require_close(f"{name} of {step.op}", got, ref, 3, **more | {"rerun": None})
        return
    # A few units of bf16, and where sums cancel or an activation bends a share of the usual size.
    bound = ref.abs().mul_(2**-5).add_(2**-4 * ref.square().mean().sqrt())
    require_close(f"{name} of {step.op} {step.layer}", got, ref, bound, **more)


def test_gpu_check_of_layers_holds_in_the_simulator() -> None:
    ops.simulator().set_multiprocessor_count(4)
    for step in decoder_cases.layers_of(TINY):
        check_layer(step, replace(TINY, backend="sim"))


def test_the_check_of_layers_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.conv_3x3

    def wrong(*args: Any, backend: ops.Backend, **options: Any) -> Any:
        found = right(*args, **options, backend=backend)
        if backend == "sim":
            for tensor in (options.get("out"), options.get("normed")):
                if tensor is not None:
                    tensor[:, :8, :8, 8:16] = tensor[:, :8, :8, :8].clone()
        return found

    monkeypatch.setattr(ops, "conv_3x3", wrong)
    ops.simulator().set_multiprocessor_count(4)
    step = next(step for step in decoder_cases.layers_of(TINY) if step.op == "conv_3x3")
    with pytest.raises(Mismatch, match="differs from PyTorch") as caught:
        check_layer(step, replace(TINY, backend="sim"))
    assert caught.value.report["second_run"]["same_bits"]
    assert caught.value.report["facts"]["op"] == "conv_3x3"


# By operation and layer, so that none hides another.
LAYERS = [
    pytest.param(size, number, id=f"{size}-{step.op}-{step.layer}")
    for size in ("256p", "1080p")
    for number, step in enumerate(decoder_cases.layers_of(gpu_setting(size)))
]


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "number"), LAYERS)
def test_layers_on_a_gpu(size: str, number: int) -> None:
    setting = gpu_setting(size)
    check_layer(decoder_cases.layers_of(setting)[number], setting)
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_captured_window_equals_a_launched_one() -> None:
    setting = gpu_setting("256p")
    vae, latent = TurboVAE(decoder_cases.decoder(setting), "gpu"), setting.normal(*setting.clip.latent)
    window = decoder_cases.middle_window(setting)
    frames = torch.zeros(28, 256, 448, 3, dtype=torch.uint8, device="cuda")
    space = Workspace(workspace_bytes(PUBLISHED, [window], 16, 28), frames.shape, vae.device)
    vae.run_window(latent, window, frames, space)
    launched = frames.clone()
    frames.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vae.run_window(latent, window, frames, space)
    graph.replay()
    torch.cuda.synchronize()
    require_equal("frames", frames, launched, layout="pixels", says="captured and launched differ")


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "frames"), [("256p", 32), ("540p", 7), ("1080p", 7)])
def test_parity_on_a_gpu(size: str, frames: int) -> None:
    latent = random_latent(frames, *LATENTS[size])
    found = check_parity(PUBLISHED_CONFIG, latent, "cuda", "gpu")
    print(f"{size}: PSNR {found:.1f} dB against the float32 decoder")
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_peak_memory_and_pinned_frames_on_a_gpu() -> None:
    weights = random_weights(PUBLISHED, "cuda")
    vae = TurboVAE.from_state_dict(PUBLISHED_CONFIG, weights, device="cuda", dtype=torch.bfloat16)
    assert vae.backend == "gpu"
    del weights
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    frames = vae.decode_frames(random_latent(15, *LATENTS["1080p"]).cuda())
    (space,) = vae._free
    assert [buffer.is_pinned() for buffer in (frames, *space.staging)] == [False, True, True]
    assert sum(buffer.nbytes for buffer in space.staging) == 2 * 28 * 1088 * 1920 * 3
    peak = torch.cuda.max_memory_allocated() - before
    print(f"1080p: {peak / 1e9:.2f} GB beside the weights")
    require(peak < 12e9, "the decode takes over 12 GB", peak=peak)


@pytest.mark.gpu
def test_captured_windows_on_a_gpu() -> None:
    """A window is launched, then replayed: the same bytes; also for a latent of another length in the same buffers."""
    vae = TurboVAE.from_state_dict(
        PUBLISHED_CONFIG, random_weights(PUBLISHED, "cuda"), device="cuda", dtype=torch.bfloat16
    )
    latents = [random_latent(frames, 16, 16).cuda() for frames in (21, 9, 21)]
    first = [vae.decode_frames(latent) for latent in latents]
    (space,) = vae._free
    graphs = len(space.graphs)
    assert graphs == 3 + 1  # three windows of 21 latent frames; of 9 the first is the same
    for latent, frames in zip(latents, first, strict=True):
        replayed: dict[str, Any] = {"layout": "pixels", "says": "captured and launched differ"}
        require_equal("frames", vae.decode_frames(latent), frames, **replayed)
        fresh = TurboVAE.__new__(TurboVAE)
        vars(fresh).update(vars(vae) | {"_free": []})
        require_equal("frames of new buffers", fresh.decode_frames(latent), frames, **replayed)
    assert len(space.graphs) == graphs


@pytest.mark.gpu
def test_windows_asked_for_on_changing_streams() -> None:
    """All windows run on the stream of the first; whoever asks for one elsewhere gets it whole."""
    weights = random_weights(PUBLISHED, "cuda")
    vae = TurboVAE.from_state_dict(PUBLISHED_CONFIG, weights, device="cuda", dtype=torch.bfloat16)
    latent = random_latent(21, 32, 32).cuda()
    expected = vae.decode(latent)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    windows, found = vae.decode_windows(latent), []
    for i in range(3):
        with torch.cuda.stream(streams[i % 2]):
            found.append(next(windows) * 1)
    with torch.cuda.stream(streams[0]):
        windows.close()
        again = vae.decode(latent)
    torch.cuda.synchronize()
    got = in_pixels(torch.cat(found, 1))
    require_equal("video on changing streams", got, in_pixels(expected), layout="pixels")
    require_equal("video afterwards", in_pixels(again), in_pixels(expected), layout="pixels")
