"""The Turbo VAE decoder: on a Hopper GPU in bfloat16 by the kernels of `ops`, else in plain PyTorch.

Same windows, same order, same roundings as `model.turbo_vae`, which is the truth; what differs is where tensors lie
(`decode_plan`), that norms run in the convolutions' epilogues, and that the last one writes frames.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import ops
from ..kernels.conv_weights import pack_layers
from ..kernels.launch import capture_graph, side_stream
from ..kernels.self_check import trust as kernel_trust
from ..model import turbo_vae as reference
from ..model.config import VAE_STRIDE
from ..model.latent_statistics import LATENT_MEAN, LATENT_STD
from ..model.turbo_vae import RMS_EPS, SHORTCUT_RMS_EPS, Window, check_latent, num_frames, plan_windows
from ..model.turbo_vae_config import TurboVAEConfig
from . import decode_plan
from .decode_plan import REGIONS, Pixels, Region, Step, plan_decode, region_bytes

logger = logging.getLogger(__name__)


class TurboVAE:
    """The decoder with its weights on one device; usable with any latents of this VAE.

    `backend`: "gpu" the kernels, "sim" the same in the simulator (development builds, CPU), "reference" plain PyTorch;
    None chooses "gpu" for bfloat16 weights on a Hopper GPU where the kernels are right (`check`, as in
    `kernel_trust.why_not`), and "reference" elsewhere, with a log line that says why.
    Calls from several threads are independent of one another; only captures wait for each other.
    """

    def __init__(
        self, model: reference.TurboVAE, backend: ops.Backend | None = None, *, check: bool | None = None
    ) -> None:
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.backend = _choose_backend(model, backend, check)
        self._model = model if self.backend == "reference" else None
        if self._model is None:
            self._layers = pack_layers(model)
            self._mean = torch.tensor(LATENT_MEAN, dtype=torch.float32, device=self.device)
            self._std = torch.tensor(LATENT_STD, dtype=torch.float32, device=self.device)
            self._free: list[Workspace] = []
            self._lock = threading.Lock()

    @classmethod
    def from_state_dict(
        cls,
        config_dict: Mapping[str, Any],
        state_dict: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: ops.Backend | None = None,
        check: bool | None = None,
    ) -> TurboVAE:
        """Copy the `decoder.` part of a published state dict, with or without a `module.` prefix.

        Other keys are ignored. Raises one `CheckpointError` naming missing, unexpected and wrongly shaped keys.
        """
        model = reference.TurboVAE.from_state_dict(config_dict, state_dict, device=device, dtype=dtype)
        return cls(model, backend, check=check)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: ops.Backend | None = None,
        check: bool | None = None,
    ) -> TurboVAE:
        """Load the published `turbo_vae/` folder: its JSON and its checkpoint's averaged weights.

        The checkpoint is mapped, not read, and copied tensor by tensor: never two models in memory. Raises
        `CheckpointError` naming the file.
        """
        return cls(
            reference.TurboVAE.from_pretrained(folder, device=device, dtype=dtype), backend, check=check
        )

    @property
    def held_bytes(self) -> int:
        """Device memory of the buffers that are kept for the next decode; in PyTorch none are."""
        if self._model is not None:
            return 0
        with self._lock:
            return sum(workspace.nbytes for workspace in self._free)

    def drop_buffers(self) -> None:
        """Give back what is kept for the next decode, which then makes it anew."""
        if self._model is None:
            with self._lock:
                self._free = []

    def decode(self, latent: Tensor) -> Tensor:
        """(48, T, h, w) float32 normalised latent to a (3, 4 (T - 1) + 1, 16 h, 16 w) float32 picture.

        The picture's range is about [-1, 1], not clamped; it lies on the model's device. Raises `InputError` for
        anything but such a latent.
        """
        return torch.cat(list(self.decode_windows(latent)), dim=1)

    def decode_windows(self, latent: Tensor) -> Iterator[Tensor]:
        """As `decode`, but yields (3, f, H, W) window by window, in order; the latent is checked at the call."""
        if self._model is not None:
            return self._model.decode_windows(latent)
        check_latent(latent, self.config.latent_channels)
        return self._windows(latent)

    def decode_frames(self, latent: Tensor, on_window: Callable[[int, int], object] | None = None) -> Tensor:
        """(48, T, h, w) latent to uint8 RGB frames (F, H, W, 3) in host memory, filled window by window.

        On a GPU each window's frames are copied while the next one decodes, through pinned memory for two windows that
        is kept for the next decode; torch makes it up to twice as large as they are (512 MiB at 1080p), the result is
        ordinary memory. A window is captured when it is first decoded and replayed from then on.
        `on_window(done, total)` is called once a window's frames are there; what it raises ends the decode.
        """
        if self._model is not None:
            return self._model.decode_frames(latent, on_window)
        check_latent(latent, self.config.latent_channels)
        _, t, h, w = latent.shape
        windows = self._plan(t)
        shape = (num_frames(t), h * VAE_STRIDE, w * VAE_STRIDE, 3)
        frames = torch.empty(shape, dtype=torch.uint8)
        with self._workspace(windows, latent) as workspace:
            decode = self._frames_by_copy if self.backend == "gpu" else self._frames_in_place
            for done in decode(windows, frames, workspace):
                if on_window is not None:
                    on_window(done, len(windows))
        return frames

    def _windows(self, latent: Tensor) -> Iterator[Tensor]:
        _, t, h, w = latent.shape
        windows = self._plan(t)
        with self._workspace(windows, latent) as workspace:
            for window in windows:
                size = (3, window.keep_stop - window.keep_start, h * VAE_STRIDE, w * VAE_STRIDE)
                with workspace.launching():
                    picture = torch.empty(size, device=self.device)
                    self.run_window(workspace.latent, window, picture, workspace)
                if picture.is_cuda:
                    picture.record_stream(torch.cuda.current_stream(self.device))
                yield picture

    def _frames_in_place(self, windows: list[Window], frames: Tensor, workspace: Workspace) -> Iterator[int]:
        """Decode into host memory itself; yields how many windows are done."""
        for done, window in enumerate(windows, start=1):
            self.run_window(workspace.latent, window, frames[window.out_start : window.out_stop], workspace)
            yield done

    def _frames_by_copy(self, windows: list[Window], frames: Tensor, workspace: Workspace) -> Iterator[int]:
        """Decode into two buffers in turn, copying one to the host and there to `frames` while the other is filled."""
        stream, copies = torch.cuda.current_stream(self.device), workspace.copy_stream
        arrived: list[torch.cuda.Event] = []

        def collect(i: int) -> None:
            window = windows[i]
            arrived[i].synchronize()
            on_host = workspace.staging[i % 2][: window.keep_stop - window.keep_start]
            frames[window.out_start : window.out_stop] = on_host

        for i, window in enumerate(windows):
            # Free again: what it held two windows ago has been collected.
            buffer = workspace.frames[i % 2][: window.keep_stop - window.keep_start]
            # Wherever it lies in a clip of any length, a window of these sizes is the same launches on the same bytes.
            part = workspace.window_latent(window)
            key = (window.num_latent_frames, window.is_first, window.keep_start, window.keep_stop, i % 2)
            graph = workspace.graphs.get(key)
            if graph is None:
                run = partial(self.run_window, part, self.alone(window), buffer, workspace)
                run()
                workspace.graphs[key] = capture_graph(run, self.device)
            else:
                graph.replay()
            copies.wait_stream(stream)
            with torch.cuda.stream(copies):
                workspace.staging[i % 2][: len(buffer)].copy_(buffer, non_blocking=True)
                arrived.append(copies.record_event())
            if i > 0:
                collect(i - 1)
                yield i
        collect(len(windows) - 1)
        yield len(windows)

    @staticmethod
    def alone(window: Window) -> Window:
        """The window of `Workspace.window_latent(window)` that is all of it."""
        return replace(window, start=0, stop=window.num_latent_frames, padding=0)

    def _plan(self, num_latent_frames: int) -> list[Window]:
        return plan_windows(num_latent_frames, self.config.first_chunk_size, self.config.step_size)

    @contextmanager
    def _workspace(self, windows: list[Window], latent: Tensor) -> Iterator[Workspace]:
        """Buffers for these windows with the latent in them, from an earlier call where they are big enough."""
        _, _, height, width = latent.shape
        need = workspace_bytes(self.config, windows, height, width)
        frame_shape = self._frame_shape(windows, height, width)
        most = max(window.num_latent_frames for window in windows)
        latent_sizes = (latent.numel(), self.config.latent_channels * most * height * width)
        with self._lock:
            fitting = [space for space in self._free if space.fits(need, latent_sizes, frame_shape)]
            workspace = fitting[0] if fitting else None
            # Others are of another size: they make room.
            self._free = fitting[1:]
        if workspace is None:
            workspace = Workspace(need, frame_shape, self.device, latent_sizes)
        workspace.acquire()
        workspace.load(latent)
        try:
            yield workspace
        finally:
            workspace.release()
            with self._lock:
                self._free.append(workspace)

    def _frame_shape(self, windows: list[Window], height: int, width: int) -> tuple[int, ...]:
        most = max(window.keep_stop - window.keep_start for window in windows)
        return (most, height * VAE_STRIDE, width * VAE_STRIDE, 3)

    @torch.no_grad()
    def run_window(self, latent: Tensor, window: Window, out: Tensor, workspace: Workspace) -> None:
        """One window's launches: latent (48, T, h, w) to `out`, uint8 (f, H, W, 3) or float32 (3, f, H, W)."""
        plan = window_plan(self.config, window, latent.shape[2], latent.shape[3])
        for step in plan:
            self.launch(step, workspace, latent, window.start, out)

    def launch(self, step: Step, workspace: Workspace, latent: Tensor, start: int, out: Tensor) -> None:
        """Launch one step of a plan; `latent`, its first frame `start` and `out` are for the steps that need them."""

        def at(pixels: Pixels | None) -> Tensor | None:
            return None if pixels is None else workspace.view(pixels)

        x = workspace.view(step.x)
        if step.op == "latent_pixels":
            ops.latent_pixels(latent, self._mean, self._std, x, first=start, backend=self.backend)
            return
        span = {"first": step.first, "count": step.count}
        if step.op == "channel_norm":
            to = at(step.normed)
            assert to is not None
            ops.channel_norm(
                x,
                to,
                eps=RMS_EPS,
                activation=step.activation,  # type: ignore[arg-type]
                plain=at(step.out),
                plain_eps=SHORTCUT_RMS_EPS,
                **span,
                backend=self.backend,
            )
            return
        weight, bias = self._layers[step.layer]
        if step.op == "conv_picture":
            ops.conv_picture(x, weight, bias, out, first=step.first, length=step.length, backend=self.backend)
            return
        options: dict[str, Any] = {
            **span,
            "length": step.length,
            "shortcut": at(step.shortcut),
            "out": at(step.out),
            "out_eps": step.out_eps,
            "normed": at(step.normed),
            "eps": RMS_EPS,
            "activation": step.activation,
            "backend": self.backend,
        }
        if step.op == "conv_time":
            options["drop"] = step.drop
        getattr(ops, step.op)(x, weight, bias, **options)


class Workspace:
    """The static buffers of one decode at a time, and views and graphs of them.

    The latent, one window of it, three regions, and two windows' frames in turn. A graph reads and writes these alone.
    """

    def __init__(
        self,
        need: Mapping[Region, int],
        frame_shape: tuple[int, ...],
        device: torch.device,
        latent_sizes: tuple[int, int] = (0, 0),
    ) -> None:
        """`latent_sizes`: elements of the clip's latent, and of the largest window's."""
        self._latent, self._window_latent = (torch.empty(size, device=device) for size in latent_sizes)
        self.latent = self._latent
        self.graphs: dict[tuple[int, bool, int, int, int], torch.cuda.CUDAGraph] = {}
        self._regions = {
            region: torch.empty(need[region] // 2, dtype=torch.bfloat16, device=device) for region in REGIONS
        }
        self._views: dict[Pixels, Tensor] = {}
        self._released: torch.cuda.Event | None = None
        self._device, self._frame_shape = device, frame_shape
        self.frames: list[Tensor] = []
        if device.type == "cuda":
            self.frames = [torch.empty(frame_shape, dtype=torch.uint8, device=device) for _ in range(2)]
            self.copy_stream = side_stream(device)

    @cached_property
    def staging(self) -> list[Tensor]:
        """Two windows' frames on the host, in turn, pinned on a GPU; made by the first decode to frames."""
        pinned = self._device.type == "cuda"
        return [torch.empty(self._frame_shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return sum(buffer.nbytes for buffer in self._buffers())

    def _buffers(self) -> tuple[Tensor, ...]:
        return (self._latent, self._window_latent, *self._regions.values(), *self.frames)

    def fits(
        self, need: Mapping[Region, int], latent_sizes: tuple[int, int], frame_shape: tuple[int, ...]
    ) -> bool:
        """Made for this picture size, and big enough for this latent and its windows."""
        same = self._frame_shape[1:] == frame_shape[1:] and self._frame_shape[0] >= frame_shape[0]
        enough = all(self._regions[region].nbytes >= need[region] for region in REGIONS)
        latents = (self._latent.numel(), self._window_latent.numel())
        return same and enough and all(a >= b for a, b in zip(latents, latent_sizes, strict=True))

    def load(self, latent: Tensor) -> None:
        """Copy the latent to where the launches read it."""
        self.latent = self._latent[: latent.numel()].view(latent.shape)
        self.latent.copy_(latent)

    def window_latent(self, window: Window) -> Tensor:
        """The window's part of the latent, copied to where all windows read theirs; beyond the end its last frame."""
        channels, frames, height, width = self.latent.shape
        size = (channels, window.num_latent_frames, height, width)
        part = self._window_latent[: prod(size)].view(size)
        inside = min(window.num_latent_frames, frames - window.start)
        part[:, :inside] = self.latent[:, window.start : window.start + inside]
        part[:, inside:] = self.latent[:, -1:]
        return part

    def view(self, pixels: Pixels) -> Tensor:
        found = self._views.get(pixels)
        if found is None:
            start = pixels.offset // 2
            flat = self._regions[pixels.region][start : start + pixels.nbytes // 2]
            found = self._views[pixels] = flat.view(pixels.shape)
        return found

    def acquire(self) -> None:
        """Take the buffers for the current stream, which waits for the last decode, wherever that ran."""
        if self._device.type == "cuda":
            self._stream = torch.cuda.current_stream(self._device)
            if self._released is not None:
                self._stream.wait_event(self._released)
            # Made on another stream, maybe: their memory must not be given away there while this one uses it.
            for buffer in self._buffers():
                buffer.record_stream(self._stream)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Launch on the stream that took the buffers, also where a generator goes on under another one, which waits."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def release(self) -> None:
        if self._device.type == "cuda":
            self._stream.wait_stream(self.copy_stream)
            self._released = self._stream.record_event()


def window_plan(config: TurboVAEConfig, window: Window, height: int, width: int) -> list[Step]:
    """The launches of one window of latents of height x width."""
    keep = range(window.keep_start, window.keep_stop)
    return plan_decode(config, window.num_latent_frames, height, width, is_first=window.is_first, keep=keep)


def workspace_bytes(
    config: TurboVAEConfig, windows: list[Window], height: int, width: int
) -> dict[Region, int]:
    """What decoding these windows takes beside the weights, two windows' frames apart."""
    shapes = {(w.num_latent_frames, w.is_first): w for w in windows}
    return region_bytes([window_plan(config, w, height, width) for w in shapes.values()])


def decode_bytes(config: TurboVAEConfig, size: tuple[int, int], frames: int) -> int:
    """Device memory in which the kernels decode `frames` latent frames to `size` (width, height), beside the weights.

    A copy of the latent and of one window of it, three regions, and two windows' frames on their way to the host.
    """
    width, height = size[0] // VAE_STRIDE, size[1] // VAE_STRIDE
    windows = plan_windows(frames, config.first_chunk_size, config.step_size)
    pictures = 2 * 3 * size[0] * size[1] * max(w.keep_stop - w.keep_start for w in windows)
    regions = sum(workspace_bytes(config, windows, height, width).values())
    latents = frames + max(w.num_latent_frames for w in windows)
    return regions + pictures + 4 * config.latent_channels * latents * height * width


def _choose_backend(
    model: reference.TurboVAE, backend: ops.Backend | None, check: bool | None
) -> ops.Backend:
    """The backend asked for, checked, or the best one for this model."""
    if backend is not None and backend not in get_args(ops.Backend):
        raise InputError(
            f"Turbo VAE backend: expected one of {get_args(ops.Backend)} or None, got {backend!r}"
        )
    if backend == "reference":
        return backend
    reasons = [decode_plan.unsupported(model.config)]
    if model.dtype != torch.bfloat16:
        reasons.append(f"the weights are {model.dtype}, the kernels need torch.bfloat16")
    if backend == "sim":
        if model.device.type != "cpu":
            reasons.append(f"the simulator needs the CPU, the weights are on {model.device}")
        ops.simulator()
    else:
        reasons.append(ops.gpu_unavailable(model.device))
    why, level = [reason for reason in reasons if reason is not None], logging.INFO
    if not why and (backend is None or (backend == "gpu" and check)):
        wrong = kernel_trust.why_not(model.device, "decoder", check=check)
        if wrong is not None:
            why, level = [wrong], logging.WARNING
    if backend is not None and why:
        raise InputError(f"Turbo VAE backend {backend!r}: {'; '.join(why)}")
    chosen: ops.Backend = "reference" if why else backend or "gpu"
    logger.log(
        level, "Turbo VAE: %s", f"in PyTorch: {'; '.join(why)}" if why else f"by the kernels ({chosen})"
    )
    return chosen
