"""What a device must hold for a preset or a request, known before anything is allocated.

Weights stay. Captured steps stay too while there is room: a decode drops them where there is not, and the next request
captures them anew. So what is needed at least is the weights and the larger of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..errors import InsufficientMemory
from ..model.config import (
    FPS,
    MIN_SECONDS,
    SUPER_RESOLUTIONS,
    VAE_TIME_STRIDE,
    audio_latents,
    latent_frames,
    super_resolution_size,
)
from ..model.turbo_vae_config import TurboVAEConfig
from .dit import ClipShape
from .environment import available_memory
from .graph import GRAPH_BYTES, StepSpec
from .memory_estimate import Model, activation_bytes, bytes_texts, decode_bytes
from .turbo_vae import decode_bytes as kernel_decode_bytes

TextEncoderPlace = Literal["device", "cpu", "disk"]
"""Where the text encoder is between two prompts. From "disk" it is loaded onto the device for each new prompt."""
PLACES: tuple[TextEncoderPlace, ...] = get_args(TextEncoderPlace)
PRESET_SECONDS = 5
PRESET_SIZE = (448, 256)  # width, height of the first stage
# Of a GPU's free memory this much is left alone, for what is there for a moment and counted nowhere: the image encoder
# (2.2 GiB at 1920x1088), a voice's encoder (0.6 GiB for 5 s), the sound's decoder (0.8 GiB for 5 s, 2.8 at most),
# libraries' workspaces, fragments.
RESERVE_BYTES = 3 << 30


@dataclass(frozen=True)
class ModelSizes:
    """Bytes and sizes of everything that is loaded. `super_resolution` is by preset."""

    first: Model
    guided: bool  # the first stage
    super_resolution: Mapping[str, Model]
    turbo_vae: TurboVAEConfig
    text_encoder_bytes: int
    other_bytes: int  # of both VAEs and the image encoder
    itemsize: int  # of the layer linears and of the decoder's activations
    kernels: bool  # for the diffusion models, or the reference path
    kernel_decoder: bool  # the same for the decoder


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one preset needs on the device, with the text encoder in one place."""

    preset: str
    size: tuple[int, int]  # width, height in pixels
    tokens: int  # of the largest stage, with the longest prompt
    kernels: bool  # or the reference path
    text_encoder: TextEncoderPlace
    weight_bytes: int  # of what stays
    step_bytes: int  # captured steps of all stages, or on the reference path the largest stage's activations
    decode_bytes: int
    text_bytes: int  # of a text encoder that is there only while it encodes
    note: str = ""

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + max(self.step_bytes, self.decode_bytes, self.text_bytes)

    @property
    def kept_bytes(self) -> int:
        """What lets captured steps stay where they are while frames are decoded; the reference path has none."""
        if not self.kernels:
            return self.needed_bytes
        return self.weight_bytes + self.step_bytes + max(self.decode_bytes, self.text_bytes)

    def fits(self, capacity: int | None) -> bool:
        return capacity is None or self.needed_bytes <= capacity


def graph_bytes(model: Model, spec: StepSpec) -> int:
    """Device memory of a captured step."""
    return spec.nbytes(model.config) + GRAPH_BYTES


def stage_bytes(sizes: ModelSizes, stages: Sequence[tuple[Model, StepSpec]]) -> int:
    """Memory beyond the weights in which a request's stages run: see `MemoryPlan.step_bytes`."""
    if sizes.kernels:
        return sum(graph_bytes(model, spec) for model, spec in stages)
    return max(activation_bytes(model.config, spec.shape.rows, sizes.itemsize) for model, spec in stages)


def decoder_bytes(sizes: ModelSizes, shape: ClipShape) -> int:
    """Memory beyond the weights in which a clip is decoded."""
    if sizes.kernel_decoder:
        return kernel_decode_bytes(sizes.turbo_vae, shape.size, shape.frames)
    return decode_bytes(sizes.turbo_vae, shape.size, shape.frames, sizes.itemsize)


def memory_plan(sizes: ModelSizes, seconds: float = PRESET_SECONDS) -> list[MemoryPlan]:
    """Every preset with the text encoder in every place; an absent super-resolution model counts like the first."""
    audio = audio_latents(seconds)
    first = ClipShape.of(PRESET_SIZE, audio)
    steps = 32 if sizes.guided else 8
    base = (sizes.first, StepSpec.first_stage(first, guided=sizes.guided, steps=steps))
    presets: list[tuple[str, ClipShape, list[tuple[Model, StepSpec]]]] = [("256p", first, [base])]
    for name, sr in SUPER_RESOLUTIONS.items():
        shape = ClipShape.of(super_resolution_size(*PRESET_SIZE, sr), audio)
        spec = StepSpec.super_resolution(shape, guided=False, frame_window=sr.frame_window)
        presets.append((name, shape, [base, (sizes.super_resolution.get(name, sizes.first), spec)]))
    plans = []
    for name, shape, stages in presets:
        weights = sizes.other_bytes + sum(model.weight_bytes for model, _ in stages)
        decode = decoder_bytes(sizes, shape)
        absent = name in SUPER_RESOLUTIONS and name not in sizes.super_resolution
        note = (
            f"{SUPER_RESOLUTIONS[name].folder} not there: counted as large as the first stage"
            if absent
            else ""
        )
        for place in PLACES:
            text = sizes.text_encoder_bytes
            plans.append(
                MemoryPlan(
                    name,
                    shape.size,
                    shape.rows,
                    sizes.kernels,
                    place,
                    weights + (text if place == "device" else 0),
                    stage_bytes(sizes, stages),
                    decode,
                    text if place == "disk" else 0,
                    note,
                )
            )
    return plans


def choose_place(plans: Sequence[MemoryPlan], preset: str, capacity: int | None) -> TextEncoderPlace:
    """The place for the text encoder in which `preset` fits into `capacity` bytes: on the device if it can be.

    Raises:
        InsufficientMemory: it fits nowhere; says what each place would need and which presets fit.
    """
    for place in ("device", "cpu"):  # "disk" needs no less than "cpu", and reads gigabytes for each prompt
        if any(p.fits(capacity) for p in plans if (p.preset, p.text_encoder) == (preset, place)):
            return place
    raise InsufficientMemory(_nothing_fits(plans, preset, capacity))


def check_place(
    plans: Sequence[MemoryPlan], preset: str, place: TextEncoderPlace, capacity: int | None
) -> None:
    """Refuse a preset that does not fit with the text encoder in `place`."""
    if not any(p.fits(capacity) for p in plans if (p.preset, p.text_encoder) == (preset, place)):
        raise InsufficientMemory(_nothing_fits(plans, preset, capacity))


def _nothing_fits(plans: Sequence[MemoryPlan], preset: str, capacity: int | None) -> str:
    wanted = [p for p in plans if p.preset == preset]
    *texts, free = bytes_texts(*(p.needed_bytes for p in wanted), capacity or 0)
    needs = [f"{text} ({p.text_encoder})" for text, p in zip(texts, wanted, strict=True)]
    fitting = [f"{p.preset} ({p.text_encoder})" for p in plans if p.fits(capacity)]
    return (
        f"memory: expected room for {preset} by where the text encoder is kept, {', '.join(needs)}; "
        f"{free} are free, in which would fit: {', '.join(fitting) or 'none of the presets'}"
    )


def device_capacity(device: torch.device, limit: int | None = None, held: int = 0) -> int | None:
    """Bytes that a pipeline may use on `device`, the `held` that it uses already included; None: nobody knows.

    On a GPU that is what is free, or kept but unused by torch, less a reserve; on a CPU what the system says is
    available. `limit` lowers it.
    """
    if device.type != "cuda":
        available = available_memory()
        if available is None:
            return limit
        return available + held if limit is None else min(available + held, limit)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    capacity = free + unused + held - RESERVE_BYTES
    return capacity if limit is None else min(capacity, limit)


def check_request(
    sizes: ModelSizes,
    stages: Sequence[tuple[Model, StepSpec]],
    weight_bytes: int,
    capacity: int | None,
    seconds: float,
) -> tuple[int, int]:
    """Refuse a request that does not fit beside the weights; the bytes that its steps and its decode need.

    Raises:
        InsufficientMemory: says what is needed, what is free, and the longest clip of that size that would fit.
    """

    def needs(shapes: Sequence[ClipShape]) -> tuple[int, int]:
        resized = [
            (model, replace(spec, shape=shape)) for (model, spec), shape in zip(stages, shapes, strict=True)
        ]
        return stage_bytes(sizes, resized), decoder_bytes(sizes, shapes[-1])

    shapes = [spec.shape for _, spec in stages]
    step, decode = needs(shapes)
    if capacity is None or weight_bytes + max(step, decode) <= capacity:
        return step, decode
    free, fitting = capacity - weight_bytes, "no length"
    for frames in range(latent_frames(audio_latents(MIN_SECONDS)), shapes[0].frames):
        audio = VAE_TIME_STRIDE * (frames - 1) + 2  # the most that go with as many frames
        if max(needs([ClipShape(frames, s.height, s.width, audio) for s in shapes])) > free:
            break
        fitting = _length_text(frames)
    width, height = shapes[-1].size
    needed, step_text, decode_text, free_text = bytes_texts(max(step, decode), step, decode, max(free, 0))
    raise InsufficientMemory(
        f"size, seconds: {seconds:g} s of {width}x{height} need {needed} beside the weights "
        f"(steps {step_text}, decoding {decode_text}), {free_text} are free; {fitting} would fit at this size"
    )


def _length_text(frames: int) -> str:
    """How long a clip of that many latent frames can be: rounded down, so that it is no frame more."""
    tenths = 10 * (VAE_TIME_STRIDE * (frames - 1) + 1) // FPS
    return f"{tenths / 10:.1f} s"
