"""From a prompt to frames and sound: load once, then call (MODEL.md section 1)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoints.loading import OnLoad, load_components, measured_sizes
from ..codecs.audio_vae import AudioVAE
from ..codecs.audio_vae_config import SAMPLES_PER_LATENT
from ..codecs.image_encoder import ImageEncoder, preprocess_image
from ..codecs.picture_files import load_image
from ..codecs.sound_files import DRIVING_SAMPLE_RATE
from ..codecs.text_encoder import TextEncoder, TextEncoderOnDisk, load_negative_prompt
from ..errors import InputError
from ..guards.file_paths import PathLike
from ..kernels.launch import side_stream
from ..kernels.ops import Backend
from ..model import config, sampler
from ..model.config import SuperResolution, Variant
from ..model.dit import DiT
from ..runtime.dit import ClipShape
from ..runtime.engine import Engine, Stage
from ..runtime.graph import StepSpec
from ..runtime.memory_estimate import Model
from ..runtime.memory_plan import MemoryPlan, check_request, device_capacity, memory_plan
from ..runtime.turbo_vae import TurboVAE
from .generation import Beside, CancelEvent, EitherEvent, GenerationResult, Job, OnStep, Stages
from .request import Request, load_driving_audio
from .request import check_request as check_arguments

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Room:
    """Bytes that captured steps may take while prompts are encoded and while frames are decoded; None: any.

    `for_all`: the decoder's buffers may stay beside captured steps.
    """

    to_encode: int | None = None
    to_decode: int | None = None
    for_all: bool = True


class MagiHumanPipeline:
    """daVinci-MagiHuman, loaded. Call it with a prompt; see `from_pretrained` and `__call__`.

    On a Hopper GPU the kernels compute it, each size captured as CUDA graphs (`setup`, or on first use); everywhere
    else the reference path does. `engine.path` says which, and why. It may be called from several threads; on a GPU
    one request runs at a time, the others wait for their turn.
    """

    def __init__(
        self,
        *,
        dit: DiT,
        variant: Variant,
        turbo_vae: TurboVAE,
        audio_vae: AudioVAE,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder | None = None,
        sr_dit: DiT | None = None,
        sr: SuperResolution | None = None,
        kernels: bool | None = None,
        check_kernels: bool | None = None,
        backend: Backend | None = None,
        memory_limit: int | None = None,
    ) -> None:
        """Put loaded components together; `from_pretrained` is the usual way.

        `backend` runs the kernels' steps on "sim" or "reference" instead of a GPU, for tests. The rest is as in
        `from_pretrained`.
        """
        self.dit, self.variant = dit, variant
        self.sr_dit, self.sr = sr_dit, sr
        self.turbo_vae, self.audio_vae = turbo_vae, audio_vae
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.device = dit.device
        self.engine = Engine(dit, sr_dit, kernels=kernels, backend=backend, check=check_kernels)
        self.memory_limit = memory_limit
        self._sizes = measured_sizes(
            *(dit, variant, sr_dit, sr, turbo_vae, text_encoder, (audio_vae, image_encoder)),
            kernels=self.engine.backend is not None,
        )
        self._turn = threading.Lock()
        self._side = side_stream(self.device) if self.device.type == "cuda" else None
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="magihuman")

    @classmethod
    def from_pretrained(
        cls,
        root: PathLike,
        *,
        variant: str = "distill",
        sr: str | None = None,
        device: str | torch.device = "auto",
        precision: str = "bf16",
        text_encoder: PathLike | None = None,
        text_encoder_on: str = "auto",
        image_vae: PathLike | None = None,
        audio_vae: PathLike | None = None,
        memory_limit: int | None = None,
        kernels: bool | None = None,
        check_kernels: bool | None = None,
        on_load: OnLoad | None = None,
    ) -> MagiHumanPipeline:
        """Load the published files unchanged.

        Args:
            root: folder holding `distill/` or `base/`, `turbo_vae/` and, with `sr`, `540p_sr/` or `1080p_sr/`.
            variant: "distill" (8 steps) or "base" (32 guided steps). sr: None, "540p" or "1080p".
            device: "auto", "cpu" or "cuda[:N]". precision: "bf16" as published, or "fp32" as an oracle.
            text_encoder, image_vae, audio_vae: folders of `t5gemma-9b-9b-ul2`, `Wan2.2-TI2V-5B` and
                `stable-audio-open-1.0`; by default those names below `root`. Without the default image VAE folder the
                pipeline takes no images.
            text_encoder_on: where the text encoder is between prompts: "device"; "cpu", where it also runs; "disk",
                from where it is loaded for each new prompt; or "auto": the device if there is room, else the CPU.
            memory_limit: bytes of device memory to stay within; by default a GPU's free memory, and no limit on a CPU.
            kernels: None takes the kernels where they run, True insists on them, False takes the reference path.
            check_kernels: None checks them against PyTorch once for a GPU and build and keeps the answer, True checks
                anew, False does not. Where one is wrong, what uses it takes the reference path, and says so.
            on_load: called as (component, bytes read, bytes in all) while the large models load.

        Raises:
            InputError: an option that does not exist, or a device that is not there.
            InsufficientMemory: the models do not fit; says what would. Nothing large has been loaded then.
            CheckpointError: a file missing, damaged or not the model's. The headers of the diffusion models are all
                checked before any of them is read; after a failure nothing stays loaded.
        """
        parts = load_components(
            root,
            variant=variant,
            sr=sr,
            device=device,
            precision=precision,
            text_encoder=text_encoder,
            text_encoder_on=text_encoder_on,
            image_vae=image_vae,
            audio_vae=audio_vae,
            memory_limit=memory_limit,
            kernels=kernels,
            check_kernels=check_kernels,
            on_load=on_load,
        )
        trust = (
            False if check_kernels is False else None
        )  # what was checked anew, while loading, is known now
        return cls(**vars(parts), kernels=kernels, check_kernels=trust, memory_limit=memory_limit)

    def setup(
        self,
        sizes: Iterable[tuple[int, int]] = ((448, 256),),
        *,
        seconds: float = 5,
        steps: int | None = None,
        sr_guidance: bool = False,
        sr_size: tuple[int, int] | None = None,
    ) -> None:
        """Make everything ready for clips of these first-stage (width, height) in pixels, so that no request waits.

        On the kernels that allocates and captures the steps of both stages and, where its buffers can stay beside them,
        the decoder of the last size, which keeps those of one size; elsewhere there is nothing to do. It waits for a
        request that runs.

        Raises:
            InputError: a size out of range.
            InsufficientMemory: they do not fit together; says what would. Nothing has been allocated then.
        """
        clips = []
        for width, height in sizes:
            request = check_arguments(self.variant, self.sr, seconds, width, height, 0, steps, None, sr_size)
            clips.append(self._steps(request, config.audio_latents(request.seconds), sr_guidance))
        with self._turn:
            limits, room = [], _Room()
            for keys in clips:
                room = self._reserve(keys, seconds)
                limits.append(self.engine.limit)
            # What all of them can stay within, whichever is decoded.
            self.engine.limit = min((limit for limit in limits if limit is not None), default=None)
            self.engine.setup(key for keys in clips for key in keys)
            if clips and room.for_all and self.turbo_vae.backend == "gpu":
                shape = clips[-1][-1][1].shape
                size = (config.LATENT_CHANNELS, shape.frames, shape.height, shape.width)
                self.turbo_vae.decode_frames(torch.zeros(size, device=self.device))

    def memory_plan(self, seconds: float = 5) -> list[MemoryPlan]:
        """What each preset needs on the device, with the text encoder in each place."""
        return memory_plan(self._sizes, seconds)

    async def generate_async(
        self,
        prompt: str,
        *,
        on_step: OnStep | None = None,
        cancel: CancelEvent | None = None,
        **options: Any,
    ) -> GenerationResult:
        """`__call__` for services: awaits the clip while the event loop goes on; requests are served in their order.

        `on_step` is called in the event loop. Cancelling the awaiting task ends the request: at once while it waits,
        after the step that runs otherwise. `options` and errors are those of `__call__`.
        """
        loop = asyncio.get_running_loop()
        stop = EitherEvent(cancel)
        report: OnStep | None = None
        if on_step is not None:
            told = on_step

            def tell(stage: str, done: int, total: int) -> None:
                if not stop.is_set():  # a step that ended after the request was cancelled is no news
                    told(stage, done, total)

            def report(stage: str, done: int, total: int) -> None:
                loop.call_soon_threadsafe(tell, stage, done, total)

        future = self._waiting.submit(self, prompt, on_step=report, cancel=stop, **options)
        try:
            return await asyncio.wrap_future(future)
        finally:
            stop.set()  # nothing to a run that is over

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        image: PathLike | Image.Image | np.ndarray | None = None,
        audio: PathLike | np.ndarray | torch.Tensor | None = None,
        seconds: float = 5,
        width: int = 448,
        height: int = 256,
        seed: int = 42,
        steps: int | None = None,
        sr_steps: int | None = None,
        sr_guidance: bool = False,
        sr_size: tuple[int, int] | None = None,
        negative_prompt: str | None = None,
        on_step: OnStep | None = None,
        cancel: CancelEvent | None = None,
    ) -> GenerationResult:
        """Generate one clip.

        Args:
            prompt: what happens and what is said; up to 640 tokens are used.
            image: first frame: a file, a PIL image, or uint8 (H, W, 3). `load_image` makes it upright, opaque sRGB, on
                white where it is transparent; then it is cropped to the clip's aspect ratio.
            audio: driving sound: a file, or float32 (2, n) at 51200 Hz. Its first `seconds` set the clip's length, in
                whole frames that cover it, and its sound.
            seconds: length, 1 to 60, in whole frames, 25 a second, that cover it.
            width, height: first-stage pixels, rounded down to a multiple of 32.
            seed: of all noise, 0 to 2^64 - 1; the same seed on the same device gives the same clip.
            steps, sr_steps: denoising steps (by default 8 distilled, 32 base, 5 super-resolution).
            sr_guidance: two forwards a super-resolution step, with guidance 3.5, instead of one.
            sr_size: (width, height) of the super-resolved clip instead of the one that keeps the aspect ratio.
            negative_prompt: what guidance leads away from; by default the published one.
            on_step: called as (stage, done, total) after each step. cancel: checked after each step.

        Raises:
            InputError: a value out of range, an unreadable image or sound. Raised before anything is computed.
            InsufficientMemory: the clip does not fit beside the models; says what would.
            Cancelled: `cancel` was set.
        """
        if sr_guidance and self.sr is None:
            raise InputError("sr_guidance: this pipeline was loaded without sr=")
        request = check_arguments(
            self.variant, self.sr, seconds, width, height, seed, steps, sr_steps, sr_size
        )
        seconds, seed = request.seconds, request.seed
        null_prompt = load_negative_prompt() if negative_prompt is None else negative_prompt
        guided = self.variant.guided or sr_guidance
        if negative_prompt is not None and not guided:
            log.warning("the negative prompt is not used: neither the model nor super-resolution is guided")
        prompts = [prompt, null_prompt] if guided else [prompt]
        for name, value in zip(("prompt", "negative_prompt"), prompts, strict=False):
            self.text_encoder.tokens(value, name=name)
        stages = Stages(self.device, on_step, cancel)
        pixels = self._load_image(image, request)
        waveform = load_driving_audio(audio, seconds, partial(stages.check, "reading the sound"))
        length = seconds if waveform is None else waveform.shape[1] / DRIVING_SAMPLE_RATE
        latents = config.audio_latents(length, driven=waveform is not None)
        if waveform is not None:  # to its end: silence follows up to the last latent
            missing = latents * SAMPLES_PER_LATENT - waveform.shape[1]
            waveform = torch.nn.functional.pad(waveform, (0, missing))
        keys = self._steps(request, latents, sr_guidance)
        job = Job(request, prompts, pixels, waveform, length, seed, sr_guidance, stages)
        if self.device.type != "cuda":
            return self._generate(job, self._reserve(keys, length))
        with stages.turn(self._turn):
            return self._generate(job, self._reserve(keys, length))

    def _generate(self, job: Job, room: _Room) -> GenerationResult:
        request, stages = job.request, job.stages
        started = time.perf_counter()
        generator = sampler.seeded(self.device, job.seed)
        with Beside(self._side) as beside:
            self.engine.make_room(room.to_encode)
            images = [
                beside.start(partial(self._encode_image, pixels, stages, stage))
                for pixels, stage in zip(job.pixels, ("image_encode", "sr_image_encode"), strict=True)
            ]
            with stages.timed("text"), self.text_encoder.loaded() as encoder:
                names = ("prompt", "negative prompt")
                texts = [
                    encoder.encode(text, name=name).hidden.to(self.device)
                    for text, name in zip(job.prompts, names, strict=False)
                ]
                if self.sr is not None and min(map(len, texts)) < 2:
                    raise InputError("prompt: super-resolution needs at least 2 text tokens, got 1")

            # Draws in the published order: audio latents first, then video latents.
            if job.waveform is None:
                shape: tuple[int, ...] = (config.audio_latents(job.seconds), config.AUDIO_CHANNELS)
                audio = sampler.draw_noise(generator, shape)
            else:
                with stages.timed("audio_encode"):
                    audio = self.audio_vae.encode(job.waveform, generator=generator).to(self.device)
            frames = config.latent_frames(len(audio))
            video = sampler.draw_noise(generator, request.latent_shape(frames, request.size))
            image_latent, sr_image_latent = (image() for image in images)

            with stages.timed("denoise"):
                options: dict[str, Any] = {
                    "steps": request.steps,
                    "image_latent": image_latent,
                    "fixed_audio": job.waveform is not None,
                    "on_step": stages.reporter("denoise"),
                }
                if self.variant.guided:
                    video, audio = self.engine.sample_guided(video, audio, *texts, **options)
                else:
                    noise = sampler.gaussian_noise(generator, tuple(video.shape), tuple(audio.shape))
                    video, audio = self.engine.sample_distilled(
                        video, audio, texts[0], noise=noise, **options
                    )

            if self.sr is not None:
                with stages.timed("super_resolution"):
                    shape = request.latent_shape(frames, request.sr_size)
                    video_noise = sampler.draw_noise(generator, shape)
                    audio_noise = sampler.draw_noise(generator, tuple(audio.shape))
                    video, sr_audio = sampler.prepare_super_resolution(
                        video, audio, shape[2:], video_noise=video_noise, audio_noise=audio_noise
                    )
                    del video_noise
                    # The noised audio latents only condition this stage; the sound is decoded from the clean ones.
                    video, _ = self.engine.super_resolve(
                        video,
                        sr_audio,
                        texts[0],
                        texts[1] if job.sr_guidance else None,
                        steps=request.sr_steps,
                        frame_window=self.sr.frame_window,
                        image_latent=sr_image_latent,
                        on_step=stages.reporter("super_resolution"),
                    )
            self.engine.make_room(room.to_decode)
            decoded = beside.start(partial(self._decode_sound, audio, stages))
            with stages.timed("decode"):
                clip = self.turbo_vae.decode_frames(video, on_window=stages.reporter("decode"))
            if not room.for_all:
                self.turbo_vae.drop_buffers()
            waveform = decoded()
        timings = {**stages.timings, "total": time.perf_counter() - started}
        # Latents come four frames at a time: what goes beyond the clip ends here.
        count = config.clip_frames(job.seconds)
        sound = waveform[: count * config.SAMPLE_RATE // config.FPS]
        return GenerationResult(clip[:count].cpu().numpy(), sound.cpu().numpy(), timings, job.seed)

    def _steps(self, request: Request, audio: int, sr_guidance: bool) -> list[tuple[Stage, StepSpec]]:
        """What a request's stages are captured for, of a clip with `audio` audio latents."""
        first = ClipShape.of(request.size, audio)
        keys: list[tuple[Stage, StepSpec]] = [
            ("denoise", StepSpec.first_stage(first, guided=self.variant.guided, steps=request.steps))
        ]
        if self.sr is not None:
            shape, window = ClipShape.of(request.sr_size, audio), self.sr.frame_window
            spec = StepSpec.super_resolution(shape, guided=sr_guidance, frame_window=window)
            keys.append(("super_resolution", spec))
        return keys

    def _reserve(self, keys: Sequence[tuple[Stage, StepSpec]], seconds: float) -> _Room:
        """Refuse what does not fit; how much captured steps may take during which stage.

        Steps, the decoder's buffers and a text encoder from disk stay side by side where they fit, else take turns.
        """
        sizes = self._sizes
        models: dict[Stage, Model] = {"denoise": sizes.first}
        for model in sizes.super_resolution.values():
            models["super_resolution"] = model
        weights = sizes.other_bytes + sum(model.weight_bytes for model in models.values())
        if self.text_encoder.device == self.device:
            weights += sizes.text_encoder_bytes
        held = weights + self.engine.pool.nbytes + self.turbo_vae.held_bytes
        capacity = device_capacity(self.device, self.memory_limit, held)
        steps, decode = check_request(
            sizes, [(models[stage], spec) for stage, spec in keys], weights, capacity, seconds
        )
        if capacity is None:
            return _Room()
        room = capacity - weights
        text = sizes.text_encoder_bytes if isinstance(self.text_encoder, TextEncoderOnDisk) else 0
        for_all = max(steps, text) + decode <= room
        if not for_all or self.turbo_vae.held_bytes > decode:
            self.turbo_vae.drop_buffers()
        kept = decode if for_all else 0
        self.engine.limit = room - kept
        return _Room(room - kept - text, room - decode, for_all)

    def _load_image(
        self, image: PathLike | Image.Image | np.ndarray | None, request: Request
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The reference image (3, H, W) at the sizes of both stages; None for a stage that does not run."""
        if image is None:
            return None, None
        if self.image_encoder is None:
            raise InputError(
                "image: this pipeline was loaded without an image VAE; pass image_vae= to from_pretrained, or put "
                f"{config.IMAGE_VAE_FOLDER} below the checkpoint's root"
            )
        picture = load_image(image)
        pixels = preprocess_image(picture, *request.size)
        return pixels, None if self.sr is None else preprocess_image(picture, *request.sr_size)

    def _encode_image(self, pixels: torch.Tensor | None, stages: Stages, stage: str) -> torch.Tensor | None:
        if pixels is None or self.image_encoder is None:
            return None
        with stages.timed(stage):
            return self.image_encoder.encode(pixels.to(self.device))

    def _decode_sound(self, audio: torch.Tensor, stages: Stages) -> torch.Tensor:
        with stages.timed("sound"):
            return self.audio_vae.decode(audio)
