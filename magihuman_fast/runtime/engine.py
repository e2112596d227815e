"""The runtime of the diffusion models: captured steps in a pool, replayed by the samplers.

An `Engine` offers the functions of `sampler`, on the kernels where they run and on the reference path everywhere else.
On the kernels each size is captured once, ahead of time or when it is first asked for; captured sizes are kept while
there is memory, and the one used longest ago goes first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from ..errors import InputError, InsufficientMemory
from ..kernels import ops
from ..kernels.self_check import trust as kernel_trust
from ..model import sampler
from ..model.config import VAE_TIME_STRIDE
from ..model.dit import DiT
from ..model.packing import check_inputs
from ..model.sampler import Latents, OnStep
from .dit import ClipShape, KernelDiT, kernel_limits
from .environment import KERNELS, REFERENCE, KernelPath
from .graph import GRAPH_BYTES, StepGraph, StepSpec
from .memory_estimate import bytes_text

log = logging.getLogger(__name__)

Stage = Literal["denoise", "super_resolution"]
Key = tuple[Stage, StepSpec]


def choose_path(
    models: Iterable[DiT], kernels: bool | None = None, check: bool | None = None
) -> tuple[ops.Backend | None, KernelPath]:
    """Which path computes `models`, all on one device: the kernels' backend, or None for the reference path.

    `kernels` None takes the kernels where they run, True insists on them, False takes the reference path. `check`:
    whether they must have agreed with PyTorch on this GPU (`kernel_trust.why_not`).

    Raises:
        InputError: the kernels are insisted on and cannot run, or are wrong; says why.
    """
    models = list(models)
    reason = "asked for" if kernels is False else None
    for dit in models:
        reason = reason or ops.gpu_unavailable(dit.device) or kernel_limits(dit.config, dit.dtype)
    reason = reason or kernel_trust.why_not(models[0].device, "models", check=check)
    if reason is None:
        checked = "unchecked, as asked for" if check is False else "which agree with PyTorch here"
        return "gpu", KernelPath(KERNELS, f"Hopper GPU, kernels compiled, {checked}")
    if kernels:
        raise InputError(f"kernels: expected a model and a device that they run on: {reason}")
    return None, KernelPath(REFERENCE, reason)


class GraphPool:
    """Captured steps, each with its buffers, within a number of bytes."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Key, StepGraph] = OrderedDict()

    @staticmethod
    def bytes_of(dit: KernelDiT, spec: StepSpec) -> int:
        return spec.nbytes(dit.config) + GRAPH_BYTES

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_of(graph.dit, graph.spec) for graph in self._graphs.values())

    @property
    def keys(self) -> list[Key]:
        """What is captured, that used longest ago first."""
        return list(self._graphs)

    def get(self, stage: Stage, dit: KernelDiT, spec: StepSpec, limit: int | None) -> StepGraph:
        """The captured step for `spec`, made now if there is none, the pool's size kept within `limit` bytes.

        Raises:
            InsufficientMemory: `spec` alone takes more than `limit`.
        """
        graph = self._graphs.get((stage, spec))
        needed = self.bytes_of(dit, spec)
        if limit is not None and needed > limit:
            raise InsufficientMemory(_too_large(dit, spec, limit))
        if graph is not None:
            self._graphs.move_to_end((stage, spec))
            self.shrink(limit)
            return graph
        self.shrink(None if limit is None else limit - needed)
        graph = self._graphs[stage, spec] = StepGraph(dit, spec)
        width, height = spec.shape.size
        took = graph.capture_seconds
        log.info(
            "%s of %dx%d, %d latent frames: %s of buffers%s",
            *(stage, width, height, spec.shape.frames, bytes_text(needed)),
            "" if took is None else f", captured in {took:.2f} s",
        )
        return graph

    def shrink(self, limit: int | None) -> None:
        """Drop what was used longest ago until no more than `limit` bytes are held."""
        while limit is not None and self._graphs and self.nbytes > limit:
            self._graphs.popitem(last=False)


def _too_large(dit: KernelDiT, spec: StepSpec, limit: int) -> str:
    """What is needed, what there is, and the longest clip of that size that would fit."""
    shape, (width, height) = spec.shape, spec.shape.size
    needed = GraphPool.bytes_of(dit, spec)
    fits = "no length fits at this size"
    for frames in range(shape.frames - 1, 0, -1):
        shorter = replace(shape, frames=frames, audio=VAE_TIME_STRIDE * (frames - 1) + 1)
        if GraphPool.bytes_of(dit, replace(spec, shape=shorter)) <= limit:
            fits = f"{frames} latent frames would fit at this size"
            break
    return (
        f"size: a step of {width}x{height} with {shape.frames} latent frames needs {bytes_text(needed)} of "
        f"buffers, {bytes_text(max(limit, 0))} are free for them; {fits}"
    )


class Engine:
    """The denoising stages of one or two models that share a device.

    Its methods may be called from several threads; on the kernels one runs at a time.
    """

    def __init__(
        self,
        dit: DiT,
        sr_dit: DiT | None = None,
        *,
        kernels: bool | None = None,
        backend: ops.Backend | None = None,
        check: bool | None = None,
    ) -> None:
        """Take loaded models; on the kernels their weights are packed, and shared with `dit` and `sr_dit`.

        Args:
            kernels, check: see `choose_path`.
            backend: run the kernels' step on this backend whatever the device is: "sim" and "reference" are for tests.
        """
        models: dict[Stage, DiT] = {"denoise": dit}
        if sr_dit is not None:
            models["super_resolution"] = sr_dit
        if backend is None:
            backend, self.path = choose_path(models.values(), kernels, check)
        else:
            self.path = KernelPath(KERNELS, f"backend {backend}")
        self.device, self.backend = dit.device, backend
        self.limit: int | None = None
        """Bytes that captured steps may take in all; None: no limit."""
        self._dits = models
        self._kernels: dict[Stage, KernelDiT] = {}
        if backend is not None:
            self._kernels = {stage: KernelDiT(model, backend=backend) for stage, model in models.items()}
        self.pool = GraphPool()
        self._lock = threading.RLock()
        level = logging.WARNING if backend is None and dit.device.type == "cuda" else logging.INFO
        log.log(level, "the models run on the %s: %s", self.path.name, self.path.reason)

    def setup(self, steps: Iterable[Key]) -> None:
        """Capture steps of stages ahead of time; on the reference path there is nothing to do.

        Raises:
            InsufficientMemory: they do not fit into `limit` together. Nothing has been captured then.
        """
        if self.backend is None:
            return
        wanted = [(stage, self._kernels[stage], spec) for stage, spec in dict.fromkeys(steps)]
        with self._lock:
            if self.limit is not None:
                sizes = [self.pool.bytes_of(dit, spec) for _, dit, spec in wanted]
                for (_, dit, spec), size in zip(wanted, sizes, strict=True):
                    if size > self.limit:
                        raise InsufficientMemory(_too_large(dit, spec, self.limit))
                if sum(sizes) > self.limit:
                    raise InsufficientMemory(
                        f"sizes: expected captured steps of at most {bytes_text(self.limit)}, these need "
                        f"{bytes_text(sum(sizes))} together; each of them alone would fit"
                    )
            for stage, dit, spec in wanted:
                self.pool.get(stage, dit, spec, self.limit)

    def make_room(self, limit: int | None) -> None:
        """Drop captured steps until they take no more than `limit` bytes."""
        with self._lock:
            self.pool.shrink(limit)

    def sample_distilled(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        text: torch.Tensor,
        *,
        steps: int = 8,
        noise: Iterable[Latents],
        image_latent: torch.Tensor | None = None,
        fixed_audio: bool = False,
        on_step: OnStep | None = None,
    ) -> Latents:
        """`sampler.sample_distilled` of the first model; noise is drawn for all steps before the first."""
        options: dict[str, Any] = {"image_latent": image_latent, "fixed_audio": fixed_audio}
        if self.backend is None:
            return sampler.sample_distilled(
                self._dits["denoise"],
                *(video, audio, text),
                steps=steps,
                noise=noise,
                on_step=on_step,
                **options,
            )
        spec = StepSpec.first_stage(_shape(video, audio), guided=False, steps=steps)
        options |= {"sigmas": sampler.flow_sigmas(steps), "coords": "v2", "noise": noise}
        return self._run("denoise", spec, video, audio, [text], on_step, options)

    def sample_guided(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        text: torch.Tensor,
        null_text: torch.Tensor,
        *,
        steps: int = 32,
        image_latent: torch.Tensor | None = None,
        fixed_audio: bool = False,
        on_step: OnStep | None = None,
    ) -> Latents:
        """`sampler.sample_guided` of the first model."""
        options: dict[str, Any] = {"image_latent": image_latent, "fixed_audio": fixed_audio}
        if self.backend is None:
            return sampler.sample_guided(
                self._dits["denoise"],
                *(video, audio, text, null_text),
                steps=steps,
                on_step=on_step,
                **options,
            )
        spec = StepSpec.first_stage(_shape(video, audio), guided=True, steps=steps)
        sigmas = sampler.flow_sigmas(steps)
        scales = torch.tensor(sampler.video_guidance(sigmas)).unsqueeze(1)
        guidance = (scales, torch.tensor([sampler.AUDIO_GUIDANCE]))
        options |= {"sigmas": sigmas, "coords": "v2", "guidance": guidance}
        return self._run("denoise", spec, video, audio, [text, null_text], on_step, options)

    def super_resolve(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        text: torch.Tensor,
        null_text: torch.Tensor | None = None,
        *,
        steps: int = 5,
        frame_window: int | None = None,
        image_latent: torch.Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Latents:
        """`sampler.super_resolve` of the second model."""
        if self.backend is None:
            return sampler.super_resolve(
                self._dits["super_resolution"],
                *(video, audio, text, null_text),
                steps=steps,
                frame_window=frame_window,
                image_latent=image_latent,
                on_step=on_step,
            )
        guided = null_text is not None
        spec = StepSpec.super_resolution(_shape(video, audio), guided=guided, frame_window=frame_window)
        options: dict[str, Any] = {
            "sigmas": sampler.flow_sigmas(steps),
            "coords": "v1",
            "image_latent": image_latent,
            "fixed_audio": True,
        }
        if guided:
            scales = sampler.super_resolution_guidance(video.shape[1])
            options["guidance"] = (scales, torch.ones(1))
        texts = [text] if null_text is None else [text, null_text]
        return self._run("super_resolution", spec, video, audio, texts, on_step, options)

    @torch.no_grad()
    def _run(
        self,
        stage: Stage,
        spec: StepSpec,
        video: torch.Tensor,
        audio: torch.Tensor,
        texts: list[torch.Tensor],
        on_step: OnStep | None,
        data: dict[str, Any],
    ) -> Latents:
        dit = self._kernels[stage]
        sampler.check_latents(dit.device, video, audio, data["image_latent"])
        for text in texts:
            check_inputs(video, audio, text, dit.device, dit.config.token_channels)
        with self._in_turn():
            graph = self.pool.get(stage, dit, spec, self.limit)
            graph.begin(video, audio, texts, **data)
            _replay(graph, len(data["sigmas"]) - 1, on_step)
            return graph.latents()

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """One run at a time, on whatever stream: its buffers are free when it is left, also by an exception."""
        with self._lock:
            try:
                yield
            finally:
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()


def _shape(video: torch.Tensor, audio: torch.Tensor) -> ClipShape:
    frames, height, width = video.shape[1:]
    return ClipShape(frames, height, width, len(audio))


def _replay(graph: StepGraph, steps: int, on_step: OnStep | None) -> None:
    """Take `steps` steps, each told to `on_step` when it is done; what that raises ends the run.

    On a GPU one step is queued ahead of the one that is waited for: the device never waits for the host, and an end
    waits for no more than that one step.
    """
    on_gpu, done = graph.dit.device.type == "cuda", []
    for i in range(steps):
        graph.replay()
        if on_gpu:
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(graph.dit.device))
            done.append(event)
            if i == 0:
                continue
            done[i - 1].synchronize()
        if on_step is not None:
            on_step(i if on_gpu else i + 1, steps)
    if on_gpu:
        done[-1].synchronize()
        if on_step is not None:
            on_step(steps, steps)
