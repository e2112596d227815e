"""One denoising step as a CUDA graph: captured once for a clip's shape, replayed for every step of every prompt.

Whatever differs between prompts, steps and requests is device data: the text's rows and length, rotary tables, noise
levels, guidance, noise, the step's number, whether there is a reference image, whether the sound is given. So one graph
serves them all; what it is captured for is a `StepSpec`.

On the backends "sim" and "reference" the same step runs launch by launch: everything but the capture is tested there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..errors import InputError
from ..kernels import ops
from ..kernels.launch import capture_graph
from ..kernels.pointwise import RENOISE_COLUMNS, UNIPC_COLUMNS
from ..model import sampler
from ..model.config import AUDIO_CHANNELS, LATENT_CHANNELS, DiTConfig
from ..model.packing import CoordsStyle
from ..model.sampler import Latents
from .dit import Activations, ClipShape, KernelDiT, Prompt

MAX_STEPS = 1000  # of a UniPC run: its tables have so many rows
NOISE_STEPS = 8  # noise of a distilled run is kept in multiples of so many steps
# What an instantiated graph of some 250 launches takes besides its buffers, rounded up.
GRAPH_BYTES = 16 << 20
# The number of a step that no table has: its update leaves the latents as they are.
NO_STEP = 1 << 30


@dataclass(frozen=True)
class StepSpec:
    """What a step is captured for. `max_steps` are the steps its tables have room for (`noise_steps`, `MAX_STEPS`)."""

    shape: ClipShape
    kind: Literal["renoise", "unipc"]
    guided: bool = False
    frame_window: int | None = None
    max_steps: int = MAX_STEPS

    @staticmethod
    def noise_steps(steps: int) -> int:
        """Room for the noise of a distilled run of `steps` steps."""
        return -(-steps // NOISE_STEPS) * NOISE_STEPS

    @classmethod
    def first_stage(cls, shape: ClipShape, *, guided: bool, steps: int) -> StepSpec:
        """A step of the distilled model, or of the base model with guidance."""
        if guided:
            return cls(shape, "unipc", guided=True)
        return cls(shape, "renoise", max_steps=cls.noise_steps(steps))

    @classmethod
    def super_resolution(cls, shape: ClipShape, *, guided: bool, frame_window: int | None) -> StepSpec:
        return cls(shape, "unipc", guided, frame_window)

    def nbytes(self, config: DiTConfig) -> int:
        """Device memory of everything a `StepGraph` holds for this, but weights and the graph itself."""
        s, forwards = self.shape, 2 if self.guided else 1
        frame = LATENT_CHANNELS * s.height * s.width
        latents = frame * s.frames + AUDIO_CHANNELS * s.audio
        # Each latent, its velocities, and the noise, or the last sample and two predictions.
        copies = 1 + forwards + (self.max_steps if self.kind == "renoise" else 3)
        table = RENOISE_COLUMNS if self.kind == "renoise" else UNIPC_COLUMNS
        tables = self.max_steps * (table + (s.frames + 1 if self.guided else 0)) + 3
        prompts = forwards * Prompt.nbytes(config, s)
        return 4 * (copies * latents + frame + tables) + prompts + Activations.nbytes(config, s)


class _Solver:
    """The latents of one modality, and what their sampler's update reads and writes."""

    def __init__(self, spec: StepSpec, shape: tuple[int, ...], frames: int, device: torch.device) -> None:
        def zeros(*sizes: int) -> torch.Tensor:
            return torch.zeros(sizes, device=device)

        self.x, self.velocity = zeros(*shape), zeros(*shape)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.null_velocity = zeros(*shape) if spec.guided else None
        self.guidance = zeros(spec.max_steps, frames) if spec.guided else None
        if spec.kind == "renoise":
            self.noise = zeros(spec.max_steps, *shape)
        else:
            self.x_last, self.history = zeros(*shape), zeros(2, *shape)

    def update(self, kind: str, table: torch.Tensor, backend: ops.Backend) -> None:
        if kind == "renoise":
            ops.renoise_step(self.x, self.velocity, self.noise, table, self.step, backend=backend)
        else:
            ops.unipc_step(
                self.x,
                self.velocity,
                self.x_last,
                self.history,
                table,
                self.step,
                null_velocity=self.null_velocity,
                guidance=self.guidance,
                backend=backend,
            )
        ops.advance_step(self.step, backend=backend)


class StepGraph:
    """A captured step with every buffer it reads or writes: `begin` a run, `replay` each step, take the `latents`.

    Not for two threads at once. `capture_seconds` is what warm-up and capture took, None where nothing is captured.
    """

    def __init__(self, dit: KernelDiT, spec: StepSpec) -> None:
        self.dit, self.spec = dit, spec
        s, device = spec.shape, dit.device
        self.video = _Solver(spec, (LATENT_CHANNELS, s.frames, s.height, s.width), s.frames, device)
        self.audio = _Solver(spec, (s.audio, AUDIO_CHANNELS), 1, device)
        columns = RENOISE_COLUMNS if spec.kind == "renoise" else UNIPC_COLUMNS
        self.table = torch.zeros(spec.max_steps, columns, device=device)
        self.image = torch.zeros(LATENT_CHANNELS, s.height, s.width, device=device)
        self.has_image = torch.zeros((), dtype=torch.bool, device=device)
        self.prompts = [Prompt(dit.config, s, device) for _ in range(2 if spec.guided else 1)]
        self.activations = Activations(dit.config, s, device)
        self.capture_seconds: float | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if dit.backend == "gpu":
            self._capture()

    def begin(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        texts: Sequence[torch.Tensor],
        *,
        sigmas: np.ndarray,
        coords: CoordsStyle,
        noise: Iterable[Latents] = (),
        guidance: tuple[torch.Tensor, torch.Tensor] | None = None,
        image_latent: torch.Tensor | None = None,
        fixed_audio: bool = False,
    ) -> None:
        """Load a run's data: everything that the captured step will read.

        Args:
            video: (48, T, H, W). audio: (Na, 64). texts: the prompt's encoding (Nt, C), and of a guided step the
                negative prompt's. sigmas: (steps + 1,).
            noise: (video, audio) pairs of a "renoise" run, taken one step after another.
            guidance: scales of a guided run: (steps, T), or what expands to it, for the video, and for the sound
                (steps, 1).
            image_latent: (48, 1, H, W), held in latent frame 0. fixed_audio: leave the audio latents as they are.

        Raises:
            InputError: more steps than there is room for, or fewer noise pairs than steps.
        """
        steps, spec = len(sigmas) - 1, self.spec
        if steps > spec.max_steps:
            raise InputError(f"steps: expected at most {spec.max_steps}, got {steps}")
        rows = sampler.renoise_table(sigmas) if spec.kind == "renoise" else sampler.unipc_table(sigmas)
        self.table[:steps] = rows.to(self.table.device)
        for prompt, text in zip(self.prompts, texts, strict=True):
            self.dit.write_prompt(prompt, spec.shape, text, coords)
        self.video.x.copy_(video)
        self.audio.x.copy_(audio)
        self.video.step.zero_()
        self.audio.step.fill_(NO_STEP if fixed_audio else 0)
        self.has_image.fill_(image_latent is not None)
        self.image.copy_(video[:, 0] if image_latent is None else image_latent[:, 0])
        if guidance is not None:
            for solver, scales in zip((self.video, self.audio), guidance, strict=True):
                assert solver.guidance is not None
                solver.guidance[:steps] = scales.to(solver.guidance.device)
        if spec.kind == "renoise":
            pairs = iter(noise)
            for i in range(steps):
                pair = next(pairs, None)
                if pair is None:
                    raise InputError(f"noise: expected {steps} (video, audio) pairs, got {i}")
                for solver, fresh in zip((self.video, self.audio), pair, strict=True):
                    sampler.check_noise(fresh, solver.x)
                    solver.noise[i] = fresh

    def replay(self) -> None:
        """Take one step. On a GPU this returns as soon as the step is queued."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def latents(self) -> Latents:
        """Video (48, T, H, W) and audio (Na, 64) after the last step, as new tensors; the image is in its frame."""
        video = self.video.x.clone()
        video[:, 0] = torch.where(self.has_image, self.image, video[:, 0])
        return video, self.audio.x.clone()

    def _step(self) -> None:
        video, audio, backend, kind = self.video, self.audio, self.dit.backend, self.spec.kind
        ops.clamp_image(video.x, self.image, backend=backend)
        self._forward(self.prompts[0], video.velocity, audio.velocity)
        if video.null_velocity is not None and audio.null_velocity is not None:
            self._forward(self.prompts[1], video.null_velocity, audio.null_velocity)
        video.update(kind, self.table, backend)
        audio.update(kind, self.table, backend)
        # What the next step clamps: the image, or without one whatever frame 0 has become.
        torch.where(self.has_image, self.image, video.x[:, 0], out=self.image)

    def _forward(self, prompt: Prompt, video_out: torch.Tensor, audio_out: torch.Tensor) -> None:
        spec = self.spec
        self.dit.velocity(
            self.video.x,
            self.audio.x,
            prompt,
            spec.shape,
            self.activations,
            video_out,
            audio_out,
            frame_window=spec.frame_window,
        )

    def _capture(self) -> None:
        start = time.perf_counter()
        # Once launch by launch, so that no kernel has to be loaded while capturing: on one latent frame, one audio and
        # two text rows, because a whole step takes seconds at the largest sizes. On the caller's stream: launched on
        # that of captures, it could get into another thread's.
        first_audio = self.spec.shape.tokens_per_frame
        few = torch.tensor([0, first_audio, first_audio + 1, first_audio + 3], dtype=torch.int32)
        for prompt in self.prompts:
            prompt.offsets.copy_(few)
            prompt.offsets_without_text.copy_(few)
        self._step()
        self._graph = capture_graph(self._step, self.dit.device)
        self.capture_seconds = time.perf_counter() - start
