"""From a prompt to frames and sound: load once, then call (MODEL.md section 1)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from . import config, media, sampler
from .audio_vae import AudioVAE
from .config import SUPER_RESOLUTIONS, VARIANTS, SuperResolution, Variant
from .errors import Cancelled, CheckpointError, InputError
from .image_encoder import ImageEncoder, preprocess_image
from .reference.dit import DiT, infer_config
from .request import PathLike, Request, check_request, load_driving_audio
from .text_encoder import TextEncoder, load_negative_prompt
from .turbo_vae import TurboVAE
from .weights import open_checkpoint

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

OnStep = Callable[[str, int, int], object]
OnLoad = Callable[[str, int, int], object]
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class CancelEvent(Protocol):
    """What `cancel` must offer; `threading.Event` does."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class GenerationResult:
    """One generated clip.

    frames: uint8 (F, H, W, 3) at `fps`. audio: float32 (n, 2) at `sample_rate`. timings: seconds per stage, and
    "total".
    """

    frames: np.ndarray
    audio: np.ndarray
    timings: Mapping[str, float]
    seed: int
    fps: int = config.FPS
    sample_rate: int = config.SAMPLE_RATE

    def save(self, path: PathLike) -> None:
        """Write an mp4 with sound; the shorter of picture and sound sets the length.

        Raises:
            OutputError: the file cannot be written; nothing is left behind.
        """
        media.write_video(path, self.frames, self.audio, fps=self.fps, sample_rate=self.sample_rate)


class _Stages:
    """Names and times the stages of one run, and carries progress and cancellation."""

    def __init__(self, device: torch.device, on_step: OnStep | None, cancel: CancelEvent | None) -> None:
        self.timings: dict[str, float] = {}
        self._device, self._on_step, self._cancel = device, on_step, cancel

    def check(self, stage: str) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled during {stage}")

    def reporter(self, stage: str) -> Callable[[int, int], None]:
        """A callback (done, total) for one stage that reports progress, then honours cancellation."""

        def report(done: int, total: int) -> None:
            if self._on_step is not None:
                self._on_step(stage, done, total)
            self.check(stage)

        return report

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self.check(stage)
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.timings[stage] = time.perf_counter() - start


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device a name stands for: "auto" is the current CUDA device, else the CPU; others must exist."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device: expected 'auto', 'cpu' or 'cuda[:N]', got {device!r}") from error
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected 'auto', 'cpu' or 'cuda[:N]', got {device!r}")
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        if (resolved.index or 0) >= count:
            raise InputError(f"device: {device!r} not found; this machine has {count} CUDA devices")
        resolved = torch.device(
            "cuda", torch.cuda.current_device() if resolved.index is None else resolved.index
        )
    return resolved


def _choose(name: str, value: object, choices: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[value]


class MagiHumanPipeline:
    """daVinci-MagiHuman, loaded. Call it with a prompt; see `from_pretrained` and `__call__`."""

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
    ) -> None:
        """Put loaded components together; `from_pretrained` is the usual way."""
        self.dit, self.variant = dit, variant
        self.sr_dit, self.sr = sr_dit, sr
        self.turbo_vae, self.audio_vae = turbo_vae, audio_vae
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.device = dit.device

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
        image_vae: PathLike | None = None,
        audio_vae: PathLike | None = None,
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
            on_load: called as (component, bytes read, bytes in all) while the large models load.

        Raises:
            InputError: an option that does not exist, or a device that is not there.
            CheckpointError: a file missing, damaged or not the model's. The headers of the diffusion models are all
                checked before any of them is read; after a failure nothing stays loaded.
        """
        root = Path(root)
        chosen: Variant = _choose("variant", variant, VARIANTS)
        sr_chosen: SuperResolution | None = None if sr is None else _choose("sr", sr, SUPER_RESOLUTIONS)
        dtype: torch.dtype = _choose("precision", precision, PRECISIONS)
        target = resolve_device(device)
        if not os.path.isdir(root):  # unlike Path.is_dir, also False for a name that no file system takes
            raise CheckpointError(f"{root}: expected the checkpoint's root folder, found no folder")

        checkpoints = {chosen.folder: open_checkpoint(root / chosen.folder)}
        if sr_chosen is not None:
            checkpoints[sr_chosen.folder] = open_checkpoint(root / sr_chosen.folder)
        widths = {name: infer_config(checkpoint).text_in_channels for name, checkpoint in checkpoints.items()}

        # The small components first: their faults show before minutes are spent on the large ones.
        turbo = TurboVAE.from_pretrained(root / config.TURBO_VAE_FOLDER, device=target, dtype=dtype)
        sound = AudioVAE.from_pretrained(Path(audio_vae or root / config.AUDIO_VAE_FOLDER), device=target)
        image_path = Path(image_vae or root / config.IMAGE_VAE_FOLDER)
        image = None
        if image_vae is not None or image_path.exists():
            image = ImageEncoder.from_pretrained(image_path, device=target)
        text = TextEncoder.from_pretrained(
            Path(text_encoder or root / config.TEXT_ENCODER_FOLDER), device=target, dtype=dtype
        )
        for name, width in widths.items():
            if width != text.hidden_size:
                raise CheckpointError(
                    f"{root / name}: reads text encodings of width {width}, but {text.path} gives {text.hidden_size}"
                )

        models = {}
        for name, checkpoint in checkpoints.items():
            total, done = sum(e.nbytes for e in checkpoint.entries.values()), 0

            def report(nbytes: int, name: str = name, total: int = total) -> None:
                nonlocal done
                done += nbytes
                if on_load is not None:
                    on_load(name, done, total)

            start = time.perf_counter()
            models[name] = DiT.from_checkpoint(checkpoint, device=target, dtype=dtype, on_tensor=report)
            log.info("loaded %s in %.1f s", checkpoint.path, time.perf_counter() - start)
        return cls(
            dit=models[chosen.folder],
            variant=chosen,
            turbo_vae=turbo,
            audio_vae=sound,
            text_encoder=text,
            image_encoder=image,
            sr_dit=None if sr_chosen is None else models[sr_chosen.folder],
            sr=sr_chosen,
        )

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
            image: first frame: a file, a PIL image, or uint8 (H, W, 3). It is cropped to the clip's aspect ratio.
            audio: driving sound: a file, or float32 (2, n) at 51200 Hz. Its first `seconds` set the clip's length and
                its sound.
            seconds: length, 1 to 60, at 25 frames a second. width, height: first-stage pixels, rounded down to a
                multiple of 32.
            seed: of all noise; the same seed on the same device gives the same clip.
            steps, sr_steps: denoising steps (by default 8 distilled, 32 base, 5 super-resolution).
            sr_guidance: two forwards a super-resolution step, with guidance 3.5, instead of one.
            sr_size: (width, height) of the super-resolved clip instead of the one that keeps the aspect ratio.
            negative_prompt: what guidance leads away from; by default the published one.
            on_step: called as (stage, done, total) after each step. cancel: checked after each step.

        Raises:
            InputError: a value out of range, an unreadable image or sound. Raised before anything is computed.
            Cancelled: `cancel` was set.
        """
        if sr_guidance and self.sr is None:
            raise InputError("sr_guidance: this pipeline was loaded without sr=")
        request = check_request(self.variant, self.sr, seconds, width, height, seed, steps, sr_steps, sr_size)
        null_prompt = load_negative_prompt() if negative_prompt is None else negative_prompt
        guided = self.variant.guided or sr_guidance
        if negative_prompt is not None and not guided:
            log.warning("the negative prompt is not used: neither the model nor super-resolution is guided")
        for name, value in (("prompt", prompt), ("negative_prompt", null_prompt if guided else "-")):
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{name}: expected text, got {value!r}")
        pixels, sr_pixels = self._load_image(image, request)
        waveform = load_driving_audio(audio, seconds)

        stages = _Stages(self.device, on_step, cancel)
        started = time.perf_counter()
        generator = torch.Generator(self.device).manual_seed(seed)
        with stages.timed("text"):
            text = self.text_encoder.encode(prompt).hidden
            null_text = (
                self.text_encoder.encode(null_prompt, name="negative prompt").hidden if guided else None
            )
            if self.sr is not None and min(len(t) for t in (text, null_text) if t is not None) < 2:
                raise InputError("prompt: super-resolution needs at least 2 text tokens, got 1")

        # Draws in the published order: audio latents first, then video latents.
        if waveform is None:
            audio_latent = sampler.draw_noise(
                generator, (config.audio_latents(seconds), config.AUDIO_CHANNELS)
            )
        else:
            with stages.timed("audio_encode"):
                audio_latent = self.audio_vae.encode(waveform, generator=generator).to(self.device)
        frames = config.latent_frames(len(audio_latent))
        video = sampler.draw_noise(generator, request.latent_shape(frames, request.size))

        image_latent = self._encode_image(pixels, stages, "image_encode")
        with stages.timed("denoise"):
            options: dict[str, Any] = {
                "steps": request.steps,
                "image_latent": image_latent,
                "fixed_audio": waveform is not None,
                "on_step": stages.reporter("denoise"),
            }
            if self.variant.guided:
                assert null_text is not None
                video, audio_latent = sampler.sample_guided(
                    self.dit, video, audio_latent, text, null_text, **options
                )
            else:
                noise = sampler.gaussian_noise(generator, tuple(video.shape), tuple(audio_latent.shape))
                video, audio_latent = sampler.sample_distilled(
                    self.dit, video, audio_latent, text, noise=noise, **options
                )

        if self.sr is not None and self.sr_dit is not None:
            image_latent = self._encode_image(sr_pixels, stages, "sr_image_encode")
            with stages.timed("super_resolution"):
                shape = request.latent_shape(frames, request.sr_size)
                video_noise = sampler.draw_noise(generator, shape)
                audio_noise = sampler.draw_noise(generator, tuple(audio_latent.shape))
                video, sr_audio = sampler.prepare_super_resolution(
                    video, audio_latent, shape[2:], video_noise=video_noise, audio_noise=audio_noise
                )
                del video_noise
                # The noised audio latents only condition this stage; the sound is decoded from the clean ones.
                video, _ = sampler.super_resolve(
                    self.sr_dit,
                    video,
                    sr_audio,
                    text,
                    null_text if sr_guidance else None,
                    steps=request.sr_steps,
                    frame_window=self.sr.frame_window,
                    image_latent=image_latent,
                    on_step=stages.reporter("super_resolution"),
                )
        with stages.timed("decode"):
            clip = self.turbo_vae.decode_frames(video, on_window=stages.reporter("decode"))
        with stages.timed("sound"):
            sound = self.audio_vae.decode(audio_latent)
        timings = {**stages.timings, "total": time.perf_counter() - started}
        return GenerationResult(clip.cpu().numpy(), sound.cpu().numpy(), timings, seed)

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
        picture = media.load_image(image) if isinstance(image, (str, os.PathLike)) else image
        pixels = preprocess_image(picture, *request.size)
        return pixels, None if self.sr is None else preprocess_image(picture, *request.sr_size)

    def _encode_image(self, pixels: torch.Tensor | None, stages: _Stages, stage: str) -> torch.Tensor | None:
        if pixels is None or self.image_encoder is None:
            return None
        with stages.timed(stage):
            return self.image_encoder.encode(pixels.to(self.device))
