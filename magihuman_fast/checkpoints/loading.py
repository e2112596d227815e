"""Reading the published files: everything that a pipeline is made of, placed where there is memory for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..codecs.audio_vae import AudioVAE
from ..codecs.image_encoder import ImageEncoder
from ..codecs.text_encoder import TextEncoder, TextEncoderOnDisk
from ..errors import CheckpointError, InputError
from ..guards.download_faults import require_folders
from ..guards.file_paths import PathLike
from ..kernels.ops import gpu_unavailable
from ..kernels.self_check import trust as kernel_trust
from ..model import config
from ..model.config import SUPER_RESOLUTIONS, VARIANTS, DiTConfig, SuperResolution, Variant, is_layer_linear
from ..model.dit import DiT, infer_config
from ..model.weights import open_checkpoint, reading
from ..runtime.memory_estimate import Model, tensors_of
from ..runtime.memory_plan import PLACES, ModelSizes, check_place, choose_place, device_capacity, memory_plan
from ..runtime.turbo_vae import TurboVAE

log = logging.getLogger(__name__)

OnLoad = Callable[[str, int, int], object]
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Components:
    """What a pipeline is made of, loaded."""

    dit: DiT
    variant: Variant
    turbo_vae: TurboVAE
    audio_vae: AudioVAE
    text_encoder: TextEncoder
    image_encoder: ImageEncoder | None = None
    sr_dit: DiT | None = None
    sr: SuperResolution | None = None


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


def choose(name: str, value: object, choices: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[value]


@reading()
def check_root(root: PathLike, variant: str, presets: Iterable[str]) -> None:
    """Refuse a root folder without the folders of the models that a run needs; nothing in them is looked at.

    Raises:
        CheckpointError: says what is there, and which folder was meant where that can be told.
    """
    models = [SUPER_RESOLUTIONS[name].folder for name in presets if name in SUPER_RESOLUTIONS]
    require_folders(Path(root), [VARIANTS[variant].folder, *models, config.TURBO_VAE_FOLDER])


def dit_bytes(dit: DiTConfig, dtype: torch.dtype) -> int:
    """Memory of a diffusion model's weights with layer linears in `dtype`."""
    shapes = dit.state_dict_shapes().items()
    return sum(prod(shape) * (dtype.itemsize if is_layer_linear(name) else 4) for name, shape in shapes)


def measured_sizes(
    dit: DiT,
    variant: Variant,
    sr_dit: DiT | None,
    sr: SuperResolution | None,
    turbo_vae: TurboVAE,
    text_encoder: TextEncoder,
    others: Iterable[object],
    *,
    kernels: bool,
) -> ModelSizes:
    """Bytes and sizes of components that are loaded."""

    def model(of: DiT) -> Model:
        return Model(of.config, dit_bytes(of.config, of.dtype))

    presets = [name for name, known in SUPER_RESOLUTIONS.items() if known == sr]
    return ModelSizes(
        model(dit),
        variant.guided,
        {} if sr_dit is None else dict.fromkeys(presets, model(sr_dit)),
        turbo_vae.config,
        sum(tensor.nbytes for tensor in tensors_of(text_encoder)),
        sum(tensor.nbytes for part in (turbo_vae, *others) for tensor in tensors_of(part)),
        dit.dtype.itemsize,
        kernels,
        turbo_vae.backend != "reference",
    )


@reading()
def load_components(
    root: PathLike,
    *,
    variant: str,
    sr: str | None,
    device: str | torch.device,
    precision: str,
    text_encoder: PathLike | None,
    text_encoder_on: str,
    image_vae: PathLike | None,
    audio_vae: PathLike | None,
    memory_limit: int | None,
    kernels: bool | None,
    check_kernels: bool | None,
    on_load: OnLoad | None,
) -> Components:
    """Load the published files unchanged; the arguments are those of `MagiHumanPipeline.from_pretrained`."""
    root = Path(root)
    chosen: Variant = choose("variant", variant, VARIANTS)
    sr_chosen: SuperResolution | None = None if sr is None else choose("sr", sr, SUPER_RESOLUTIONS)
    dtype: torch.dtype = choose("precision", precision, PRECISIONS)
    choose("text_encoder_on", text_encoder_on, dict.fromkeys(("auto", *PLACES)))
    target = resolve_device(device)
    check_root(root, variant, [] if sr is None else [sr])
    capacity = device_capacity(target, memory_limit)

    checkpoints = {chosen.folder: open_checkpoint(root / chosen.folder)}
    if sr_chosen is not None:
        checkpoints[sr_chosen.folder] = open_checkpoint(root / sr_chosen.folder)
    configs = {name: infer_config(checkpoint) for name, checkpoint in checkpoints.items()}

    # Before anything is loaded: the process that checks needs memory of its own.
    with_kernels = kernels is not False and gpu_unavailable(target) is None and dtype == torch.bfloat16
    if with_kernels and check_kernels is not False:
        checked = kernel_trust.examine(target, anew=check_kernels is True)
        if kernels and (wrong := checked.why_not()) is not None:
            raise InputError(f"kernels: expected kernels that are right: {wrong}")
        with_kernels, check_kernels = checked.why_not("models") is None, None
    # The small components first: their faults show before minutes are spent on the large ones.
    turbo = TurboVAE.from_pretrained(
        root / config.TURBO_VAE_FOLDER,
        device=target,
        dtype=dtype,
        backend="reference" if kernels is False else None,
        check=check_kernels,
    )
    sound = AudioVAE.from_pretrained(Path(audio_vae or root / config.AUDIO_VAE_FOLDER), device=target)
    image_path = Path(image_vae or root / config.IMAGE_VAE_FOLDER)
    image = None
    if image_vae is not None or image_path.exists():
        image = ImageEncoder.from_pretrained(image_path, device=target)

    text_path = Path(text_encoder or root / config.TEXT_ENCODER_FOLDER)
    models = {name: Model(dit, dit_bytes(dit, dtype)) for name, dit in configs.items()}
    plans = memory_plan(
        ModelSizes(
            models[chosen.folder],
            chosen.guided,
            {} if sr is None or sr_chosen is None else {sr: models[sr_chosen.folder]},
            turbo.config,
            TextEncoder.weight_bytes(text_path, dtype),
            sum(tensor.nbytes for part in (turbo, sound, image) for tensor in tensors_of(part)),
            dtype.itemsize,
            with_kernels,
            turbo.backend != "reference",
        )
    )
    preset = "256p" if sr is None else sr
    if text_encoder_on == "auto":
        place = choose_place(plans, preset, capacity)
    else:
        place = next(p for p in PLACES if p == text_encoder_on)
        check_place(plans, preset, place, capacity)
    if place != "device":
        log.info("the text encoder stays on the %s", place)
    encoder_class = TextEncoderOnDisk if place == "disk" else TextEncoder
    text = encoder_class.from_pretrained(text_path, device="cpu" if place == "cpu" else target, dtype=dtype)
    for name, dit in configs.items():
        if dit.text_in_channels != text.hidden_size:
            raise CheckpointError(
                f"{root / name}: reads text encodings of width {dit.text_in_channels}, but {text.path} gives "
                f"{text.hidden_size}"
            )

    dits = {}
    for name, checkpoint in checkpoints.items():
        total, done = sum(e.nbytes for e in checkpoint.entries.values()), 0

        def report(nbytes: int, name: str = name, total: int = total) -> None:
            nonlocal done
            done += nbytes
            if on_load is not None:
                on_load(name, done, total)

        start = time.perf_counter()
        dits[name] = DiT.from_checkpoint(checkpoint, device=target, dtype=dtype, on_tensor=report)
        log.info("loaded %s in %.1f s", checkpoint.path, time.perf_counter() - start)
    return Components(
        dit=dits[chosen.folder],
        variant=chosen,
        turbo_vae=turbo,
        audio_vae=sound,
        text_encoder=text,
        image_encoder=image,
        sr_dit=None if sr_chosen is None else dits[sr_chosen.folder],
        sr=sr_chosen,
    )
