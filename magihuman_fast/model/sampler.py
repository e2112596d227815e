"""Samplers: distilled re-noising, guided UniPC, super-resolution (MODEL.md section 7).

All of them take latents without a batch axis, video (48, T, H, W) and audio (Na, 64), float32, and return the same.
The UniPC solver is written as linear combinations with coefficients known before the first step, so that a captured
step only has to read a row of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import expm1, inf, log
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..guards.number_checks import check_seed, integer_between
from .config import MAX_SIDE
from .dit import DiT
from .packing import CoordsStyle

SHIFT = 5.0
SIGMA_MAX = 0.999
GUIDANCE_EARLY, GUIDANCE_LATE, GUIDANCE_SWITCH = 5.0, 2.0, 500  # video guidance above and below this timestep
AUDIO_GUIDANCE = 5.0
SR_GUIDANCE, SR_GUIDANCE_START, SR_START_FRAMES = (
    3.5,
    2.0,
    13,
)  # the first 13 latent frames take the lower one
SR_NOISE_INDEX = 220
SR_AUDIO_NOISE = 0.7

Latents = tuple[torch.Tensor, torch.Tensor]
OnStep = Callable[[int, int], object]


def check_steps(steps: object) -> int:
    """`steps` as an int, if a schedule of that many can be made."""
    return integer_between("steps", steps, 1, 1000)


def flow_sigmas(steps: int) -> np.ndarray:
    """Noise levels sigma_0 > ... > sigma_steps = 0 of the shifted flow schedule, float64 (steps + 1,)."""
    steps = check_steps(steps)
    s = np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]
    return np.append(SHIFT * s / (1 + (SHIFT - 1) * s), 0.0)


def timesteps(sigmas: np.ndarray) -> list[int]:
    """Timestep int(1000 sigma) of each step."""
    return [int(1000 * s) for s in sigmas[:-1]]


@dataclass(frozen=True)
class UniPCStep:
    """Coefficients of one UniPC step, with m = x - sigma v the clean latent predicted at this step.

    The corrector replaces x by `last * x_last + old * m_older + prev * m_previous + new * m` (absent at step 0), the
    predictor then gives `keep * x + current * m + previous * m_previous`.
    """

    sigma: float
    corrector: tuple[float, float, float, float] | None  # last, old, prev, new
    predictor: tuple[float, float, float]  # keep, current, previous


def unipc_steps(sigmas: np.ndarray) -> list[UniPCStep]:
    """UniPC of order 2 (B(h) = e^h - 1, predicting x0, order 1 at the first and last step) as coefficients.

    Zhao et al., arXiv 2302.04867, for a flow: alpha = 1 - sigma, lambda = log(alpha / sigma).
    """
    sig = sigmas.astype(np.float32).astype(np.float64)  # the published solver keeps its schedule in float32
    lam = [log((1 - s) / s) if s > 0 else inf for s in sig]
    count = len(sig) - 1
    steps = []
    for i in range(count):
        corrector = None
        if i > 0:
            # From sigma_{i-1} to sigma_i with the order that the previous predictor used.
            h = lam[i] - lam[i - 1]
            scale = -(1 - sig[i]) * expm1(-h)  # -alpha B(h)
            old = 0.0
            new = 0.5
            if _order(i - 1, count) == 2:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi1 = expm1(-h) / -h - 1
                b0, b1 = phi1 / expm1(-h), 2 * (phi1 / -h - 0.5) / expm1(-h)
                # [[1, 1], [r, 1]] rho = b
                rho = (b0 - b1) / (1 - r)
                old, new = rho / r, b0 - rho
            corrector = (sig[i] / sig[i - 1], scale * old, scale * (1 - old - new), scale * new)
        expm = expm1(lam[i] - lam[i + 1])
        scale = -(1 - sig[i + 1]) * expm
        previous = 0.0
        if _order(i, count) == 2:
            previous = 0.5 * (lam[i + 1] - lam[i]) / (lam[i - 1] - lam[i])
        predictor = (sig[i + 1] / sig[i], scale * (1 - previous), scale * previous)
        steps.append(UniPCStep(float(sig[i]), corrector, predictor))
    return steps


def _order(step: int, count: int) -> int:
    return min(2, step + 1, count - step)


def unipc_table(sigmas: np.ndarray) -> torch.Tensor:
    """The same steps as rows for `ops.unipc_step`, float32 (steps, 9): sigma, own, last, old, prev, new, predictor."""
    rows = []
    for step in unipc_steps(sigmas):
        corrector = (1.0, 0.0, 0.0, 0.0, 0.0) if step.corrector is None else (0.0, *step.corrector)
        rows.append((step.sigma, *corrector, *step.predictor))
    return torch.tensor(rows, dtype=torch.float32)


def renoise_table(sigmas: np.ndarray) -> torch.Tensor:
    """A distilled run as rows for `ops.renoise_step`, float32 (steps, 3): sigma_i, 1 - sigma_{i+1}, sigma_{i+1}."""
    return torch.from_numpy(np.stack([sigmas[:-1], 1 - sigmas[1:], sigmas[1:]], axis=1)).float()


def video_guidance(sigmas: np.ndarray) -> list[float]:
    """Guidance of the base model's video in each step."""
    return [GUIDANCE_EARLY if t > GUIDANCE_SWITCH else GUIDANCE_LATE for t in timesteps(sigmas)]


def super_resolution_guidance(frames: int) -> torch.Tensor:
    """Guidance of each latent frame in super-resolution, float32 (frames,)."""
    guidance = torch.full((frames,), SR_GUIDANCE)
    guidance[:SR_START_FRAMES] = SR_GUIDANCE_START
    return guidance


class UniPC:
    """The solver's state for one latent: its last samples and predictions."""

    def __init__(self, sigmas: np.ndarray) -> None:
        self._steps = iter(unipc_steps(sigmas))
        self._last = self._previous = self._older = torch.tensor(0.0)

    def step(self, velocity: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Advance x by one step along `velocity` (same shape); steps must be taken in order."""
        s = next(self._steps)
        m = x - s.sigma * velocity
        if s.corrector is not None:
            last, old, prev, new = s.corrector
            x = last * self._last + prev * self._previous + new * m
            if old:
                x += old * self._older
        keep, current, previous = s.predictor
        out = keep * x + current * m
        if previous:
            out += previous * self._previous
        self._last, self._older, self._previous = x, self._previous, m
        return out


def check_latents(
    device: torch.device, video: torch.Tensor, audio: torch.Tensor, image_latent: torch.Tensor | None
) -> None:
    """Refuse latents that no sampler on `device` could step: an `InputError` names expected and got."""
    for name, x, ndim in (("video", video, 4), ("audio", audio, 2)):
        if x.ndim != ndim or x.dtype != torch.float32 or x.device != device:
            raise InputError(
                f"{name} latent: expected {ndim} dimensions, float32, on {device}; "
                f"got {tuple(x.shape)}, {x.dtype}, on {x.device}"
            )
    if image_latent is not None:
        expected = (video.shape[0], 1, *video.shape[2:])
        if tuple(image_latent.shape) != expected:
            raise InputError(f"image latent: expected shape {expected}, got {tuple(image_latent.shape)}")


def _clamp_image(video: torch.Tensor, image_latent: torch.Tensor | None) -> torch.Tensor:
    """The video latents with frame 0 replaced by the reference image's."""
    if image_latent is None:
        return video
    return torch.cat([image_latent.to(video), video[:, 1:]], dim=1)


def check_noise(noise: torch.Tensor, x: torch.Tensor) -> None:
    """Refuse noise that is not of the latents' shape, dtype and device."""
    if noise.shape != x.shape or noise.dtype != x.dtype or noise.device != x.device:
        raise InputError(
            f"noise: expected shape {tuple(x.shape)}, {x.dtype}, on {x.device}; "
            f"got {tuple(noise.shape)}, {noise.dtype}, on {noise.device}"
        )


def renoise(
    x: torch.Tensor, velocity: torch.Tensor, noise: torch.Tensor, sigma: float, sigma_next: float
) -> torch.Tensor:
    """One distilled step: predict the clean latent at `sigma`, then noise it afresh to `sigma_next`."""
    check_noise(noise, x)
    return sigma_next * noise + (1 - sigma_next) * (x - sigma * velocity)


@torch.no_grad()
def sample_distilled(
    dit: DiT,
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
    """Denoise with the distilled model, one forward a step.

    Args:
        video: initial noise (48, T, H, W). audio: initial noise, or driving latents with `fixed_audio`, (Na, 64).
        text: prompt encoding (Nt, C).
        noise: (video, audio) noise of each step, of the latents' shapes; consumed one step at a time.
        image_latent: (48, 1, H, W), held in latent frame 0.
        fixed_audio: keep the audio latents as given.
        on_step: called as (steps done, steps) after each step; an exception in it ends the run.

    Raises:
        InputError: shapes that do not fit, or fewer noise pairs than steps.
    """
    check_latents(dit.device, video, audio, image_latent)
    steps = check_steps(steps)
    sigmas = flow_sigmas(steps).tolist()
    pairs = iter(noise)
    for i in range(steps):
        pair = next(pairs, None)
        if pair is None:
            raise InputError(f"noise: expected {steps} (video, audio) pairs, got {i}")
        video = _clamp_image(video, image_latent)
        v_video, v_audio = dit.velocity(video, audio, text)
        video = renoise(video, v_video, pair[0], sigmas[i], sigmas[i + 1])
        if not fixed_audio:
            audio = renoise(audio, v_audio, pair[1], sigmas[i], sigmas[i + 1])
        if on_step is not None:
            on_step(i + 1, steps)
    return _clamp_image(video, image_latent), audio


@torch.no_grad()
def sample_guided(
    dit: DiT,
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
    """Denoise with the base model: classifier-free guidance (two forwards a step) and UniPC.

    `null_text` (Nt', C) is the encoding of the negative prompt; everything else as in `sample_distilled`.
    """
    check_latents(dit.device, video, audio, image_latent)
    steps = check_steps(steps)
    sigmas = flow_sigmas(steps)
    solve_video, solve_audio = UniPC(sigmas), UniPC(sigmas)
    for i, guidance in enumerate(video_guidance(sigmas)):
        video = _clamp_image(video, image_latent)
        text_v, text_a = dit.velocity(video, audio, text)
        null_v, null_a = dit.velocity(video, audio, null_text)
        video = solve_video.step(null_v + guidance * (text_v - null_v), video)
        if not fixed_audio:
            audio = solve_audio.step(null_a + AUDIO_GUIDANCE * (text_a - null_a), audio)
        if on_step is not None:
            on_step(i + 1, steps)
    return _clamp_image(video, image_latent), audio


def zero_snr_sigmas() -> np.ndarray:
    """The zero-terminal-SNR table (1000,) float64, from near 1 down to 0, that sets the SR input's noise."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = np.sqrt(np.cumprod(1 - beta))
    return (a - a[-1]) * a[0] / (a[0] - a[-1])


def prepare_super_resolution(
    video: torch.Tensor,
    audio: torch.Tensor,
    size: Sequence[int],
    *,
    video_noise: torch.Tensor,
    audio_noise: torch.Tensor,
) -> Latents:
    """The super-resolution stage's input: enlarged and noised video latents, noised audio latents.

    Args:
        video: finished 256p latents (48, T, h, w). audio: finished audio latents (Na, 64).
        size: latent size to reach, (H, W) or (T, H, W).
        video_noise: (48, T, H, W). audio_noise: (Na, 64).
    """
    frames = video.shape[1]
    if not isinstance(size, Sequence) or len(size) not in (2, 3) or (len(size) == 3 and size[0] != frames):
        raise InputError(f"size: expected latent (H, W), or (T, H, W) with T = {frames}, got {size!r}")
    grid = (frames, *(integer_between("size", side, 1, MAX_SIDE) for side in size[-2:]))
    for name, noise, shape in (
        ("video", video_noise, (video.shape[0], *grid)),
        ("audio", audio_noise, audio.shape),
    ):
        if tuple(noise.shape) != tuple(shape):
            raise InputError(f"{name} noise: expected shape {tuple(shape)}, got {tuple(noise.shape)}")
    up = F.interpolate(video.unsqueeze(0), size=grid, mode="trilinear", align_corners=True).squeeze(0)
    sigma = float(zero_snr_sigmas()[SR_NOISE_INDEX])
    noised = sigma * up + (1 - sigma**2) ** 0.5 * video_noise
    return noised, SR_AUDIO_NOISE * audio_noise + (1 - SR_AUDIO_NOISE) * audio


@torch.no_grad()
def super_resolve(
    dit: DiT,
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
    """Denoise prepared latents with a super-resolution model; the audio latents are held and returned as given.

    One forward a step, or two with guidance where `null_text` is given. `frame_window` is 11 for the 1080p model and
    None for the 540p model; everything else as in `sample_distilled`.
    """
    check_latents(dit.device, video, audio, image_latent)
    coords: CoordsStyle = "v1"
    steps = check_steps(steps)
    sigmas = flow_sigmas(steps)
    solver = UniPC(sigmas)
    guidance = super_resolution_guidance(video.shape[1]).to(video.device).view(-1, 1, 1)
    for i in range(steps):
        video = _clamp_image(video, image_latent)
        v, _ = dit.velocity(video, audio, text, coords=coords, frame_window=frame_window)
        if null_text is not None:
            null_v, _ = dit.velocity(video, audio, null_text, coords=coords, frame_window=frame_window)
            v = null_v + guidance * (v - null_v)
        video = solver.step(v, video)
        if on_step is not None:
            on_step(i + 1, steps)
    return _clamp_image(video, image_latent), audio


def gaussian_noise(
    generator: torch.Generator, video_shape: tuple[int, ...], audio_shape: tuple[int, ...]
) -> Iterator[Latents]:
    """Endless (video, audio) noise pairs, drawn as needed, video first: the published order of a distilled run."""
    while True:
        yield draw_noise(generator, video_shape), draw_noise(generator, audio_shape)


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """A generator on `device` that starts from all 64 bits of `seed`.

    A GPU's takes them all. A CPU's takes the lower 32 alone, so that seeds above would repeat the noise of those below:
    they are folded into 32 bits in which two that differ in one half only stay different.
    """
    seed = check_seed(seed)
    if device.type == "cpu" and seed >> 32:
        seed = crc32(seed.to_bytes(8, "little"))
    return torch.Generator(device).manual_seed(seed)


def draw_noise(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 noise of `shape` on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)
