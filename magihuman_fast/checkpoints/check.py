"""Verify a checkpoint from its headers, without loading it, and tell the memory it needs.

Every component is looked at, and everything found is reported; loading itself stops at the first fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..codecs.audio_vae import PUBLISHED_CONFIG, PUBLISHED_WEIGHTS, AudioVAE
from ..codecs.diffusers_vae import WEIGHTS_FILE, find_diffusers_folder
from ..codecs.image_encoder import PUBLISHED_FILE, ImageEncoder
from ..codecs.text_encoder import TextEncoder
from ..errors import CheckpointError, InputError
from ..guards.download_faults import contents, fault, meant_instead, require_root, unfinished
from ..model.config import (
    AUDIO_VAE_FOLDER,
    IMAGE_VAE_FOLDER,
    SUPER_RESOLUTIONS,
    TEXT_ENCODER_FOLDER,
    TURBO_VAE_FOLDER,
    VARIANTS,
    DiTConfig,
    is_layer_linear,
)
from ..model.dit import config_from_shapes, rope_bands
from ..model.turbo_vae import CHECKPOINT_NAME, CONFIG_NAME, TurboVAE
from ..model.turbo_vae_config import TurboVAEConfig
from ..model.weights import Checkpoint, TensorEntry, open_checkpoint, read_json, reading
from ..runtime.decode_plan import unsupported
from ..runtime.dit import kernel_limits
from ..runtime.memory_estimate import Model, tensors_of
from ..runtime.memory_plan import MemoryPlan, ModelSizes, memory_plan

_INDEX = "model.safetensors.index.json"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BF16_FOLDERS = {VARIANTS["base"].folder}  # published with bfloat16 layer linears; all others are float32
_MAX_LOOKED_FOR = 50
_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass
class ComponentReport:
    """What was found of one component. `required` means that a run as asked for would load it."""

    name: str
    path: Path
    required: bool
    found: bool = True
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0

    @property
    def status(self) -> str:
        """One of "ok", "absent" and "broken"."""
        if not self.found:
            return "absent"
        return "broken" if self.problems else "ok"

    @property
    def stands_in_the_way(self) -> bool:
        return self.required and self.status != "ok"


@dataclass(frozen=True)
class CheckReport:
    """Everything `check_checkpoint` found."""

    root: Path
    components: list[ComponentReport]
    memory: list[MemoryPlan]  # on the kernels in bfloat16, and on the reference path

    @property
    def ok(self) -> bool:
        """Whether everything that a run as asked for loads is there and right."""
        return not any(component.stands_in_the_way for component in self.components)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        components = [asdict(c) | {"path": str(c.path), "status": c.status} for c in self.components]
        memory = [
            asdict(m) | {"needed_bytes": m.needed_bytes, "kept_bytes": m.kept_bytes} for m in self.memory
        ]
        return {"root": str(self.root), "ok": self.ok, "components": components, "memory": memory}


@reading()
def check_checkpoint(
    root: Path | str,
    *,
    variant: str = "distill",
    sr: str | None = None,
    precision: str = "bf16",
    text_encoder: Path | str | None = None,
    image_vae: Path | str | None = None,
    audio_vae: Path | str | None = None,
) -> CheckReport:
    """Look at all that `MagiHumanPipeline.from_pretrained` would load with these arguments, and at the other models.

    Raises:
        InputError: an option that does not exist.
        CheckpointError: `root` is no folder, or plainly another one than was meant. All else that is wrong is in the
            report.
    """
    choices: tuple[tuple[str, str | None, Iterable[str | None]], ...] = (
        ("variant", variant, VARIANTS),
        ("sr", sr, (None, *SUPER_RESOLUTIONS)),
        ("precision", precision, _DTYPES),
    )
    for name, value, known in choices:
        if value not in known:
            raise InputError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")
    root, dtype = Path(root), _DTYPES[precision]
    require_root(root)

    needed = {VARIANTS[variant].folder} | ({SUPER_RESOLUTIONS[sr].folder} if sr is not None else set())
    folders = [*(v.folder for v in VARIANTS.values()), *(s.folder for s in SUPER_RESOLUTIONS.values())]
    models = [*folders, TURBO_VAE_FOLDER]
    if not any((root / name).is_dir() for name in models) and (hint := meant_instead(root, models)):
        raise CheckpointError(f"{root}: expected the checkpoint's root folder, found {contents(root)}{hint}")
    dits = {name: _check_dit(root / name, name, name in needed, dtype) for name in folders}
    turbo, turbo_config = _check_turbo_vae(root / TURBO_VAE_FOLDER, dtype)
    text, width = _check_text_encoder(Path(text_encoder or root / TEXT_ENCODER_FOLDER), dtype)
    image = _check_image_vae(Path(image_vae or root / IMAGE_VAE_FOLDER), required=image_vae is not None)
    audio = _check_audio_vae(Path(audio_vae or root / AUDIO_VAE_FOLDER))
    for report, dit in dits.values():
        if width is not None and dit is not None and dit.text_in_channels != width:
            report.problems.append(
                f"reads text encodings of width {dit.text_in_channels}, but {text.path} gives {width}"
            )
    others = [turbo, text, image, audio]
    for report in (*(report for report, _ in dits.values()), *others):
        if not report.found and report.path.is_symlink():
            report.problems.append(contents(report.path))
    memory: list[MemoryPlan] = []
    loaded = {
        name: Model(dit, report.memory_bytes) for name, (report, dit) in dits.items() if dit is not None
    }
    if turbo_config is not None and VARIANTS[variant].folder in loaded:
        sizes = ModelSizes(
            loaded[VARIANTS[variant].folder],
            VARIANTS[variant].guided,
            {
                name: loaded[model.folder]
                for name, model in SUPER_RESOLUTIONS.items()
                if model.folder in loaded
            },
            turbo_config,
            text.memory_bytes,
            sum(report.memory_bytes for report in (turbo, image, audio)),
            dtype.itemsize,
            kernels=False,
            kernel_decoder=False,
        )
        memory = memory_plan(sizes)
        if kernel_limits(sizes.first.config, dtype) is None:
            decoder = unsupported(turbo_config) is None
            memory = [*memory_plan(replace(sizes, kernels=True, kernel_decoder=decoder)), *memory]
    return CheckReport(root, [*(report for report, _ in dits.values()), *others], memory)


def _check_dit(
    path: Path, name: str, required: bool, dtype: torch.dtype
) -> tuple[ComponentReport, DiTConfig | None]:
    report = ComponentReport(name, path, required, found=path.exists())
    if not report.found:
        return report, None
    entries, promised, report.problems = _read_headers(path)
    report.tensors = len(entries)
    report.disk_bytes = _size_of({entry.file for entry in entries.values()})
    if not entries:
        return report, None
    config, problems = _explain_shapes(entries, promised, path)
    report.problems += problems
    report.problems += _not_floating(entries)
    report.notes += _describe_dtypes(entries, name)
    if any(entry.file.suffix == ".zst" for entry in entries.values()):
        report.notes.append(
            "compressed shards: only their headers were read, damage further in shows when loading"
        )
    for key, entry in entries.items():
        itemsize = dtype.itemsize if is_layer_linear(key) else 4
        report.memory_bytes += entry.nbytes // entry.dtype.itemsize * itemsize
    bands = entries.get("adapter.rope.bands")
    # Within a compressed shard it would take reading the shard.
    if config is not None and not report.problems and bands is not None and bands.file.suffix != ".zst":
        ((_, found),) = Checkpoint(path, entries).tensors(["adapter.rope.bands"])
        if not torch.allclose(found.float(), rope_bands(config), rtol=1e-2, atol=0):
            report.problems.append(
                f"adapter.rope.bands: expected {rope_bands(config).tolist()}, got {found.tolist()}"
            )
    return report, config if not problems else None


def _explain_shapes(
    entries: dict[str, TensorEntry], promised: set[str], path: Path
) -> tuple[DiTConfig | None, list[str]]:
    """What fits the shapes best, the configuration they suggest or the published one, and all that does not fit it.

    `promised` keys are in shards that cannot be read: what is wrong with those is said elsewhere.
    """
    shapes = {name: entry.shape for name, entry in entries.items()}
    candidates, problems = [DiTConfig()], []
    try:
        candidates.insert(0, config_from_shapes(shapes, path))
    except CheckpointError as error:
        problems = [] if promised else [str(error)]
    fits = []
    for config in candidates:
        expected = config.state_dict_shapes()
        wrong = [f"{n}: missing" for n in expected if n not in shapes and n not in promised]
        wrong += [f"{n}: unexpected, {list(s)}" for n, s in shapes.items() if n not in expected]
        wrong += [
            f"{n}: expected shape {list(expected[n])}, got {list(s)}"
            for n, s in shapes.items()
            if n in expected and s != expected[n]
        ]
        fits.append((len(wrong), wrong, config))
    count, wrong, config = min(fits, key=lambda fit: fit[0])
    if problems or promised:
        # Sizes that cannot be read off are those of the published model only if most of the rest says so.
        return (config, wrong) if count < len(shapes) / 2 else (None, problems)
    return config, wrong


def _read_headers(path: Path, prefix: str = "") -> tuple[dict[str, TensorEntry], set[str], list[str]]:
    """Every tensor that can be found, keys the index places in shards that cannot be read, and all problems.

    Of keys that do not start with `prefix`, and shards without others, nothing is said.
    """
    try:
        return dict(open_checkpoint(path, prefix=prefix).entries), set(), []
    except CheckpointError as error:
        reason = str(error)
    # Once more shard by shard, so that one bad file does not hide the others.
    try:
        content = read_json(path / _INDEX)
        weight_map = {
            str(key): Path(str(shard))
            for key, shard in content["weight_map"].items()
            if str(key).startswith(prefix)
        }
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return {}, set(), [reason]
    entries: dict[str, TensorEntry] = {}
    promised: set[str] = set()
    missing: set[Path] = set()
    problems = []
    for shard in sorted(set(weight_map.values())):
        claimed = {key for key, where in weight_map.items() if where == shard}
        if shard.name != str(shard) or shard.name in ("", ".."):
            problems.append(
                f"{_INDEX}: shard {str(shard)!r} is outside the folder; expected a plain file name"
            )
            promised |= claimed
            continue
        files = [file for file in (path / shard, path / f"{shard}.zst") if file.is_file()]
        if not files:
            # What a download left is looked for beside the first ones: an index may name any number.
            what = _missing(path / shard) if len(missing) < _MAX_LOOKED_FOR else f"{shard}: missing"
            missing.add(shard)
            problems.append(f"{what}; tensors in it: {len(claimed)}")
            promised |= claimed
            continue
        try:
            held = open_checkpoint(files[0], prefix=prefix).entries
        except CheckpointError as error:
            problems.append(str(error))
            promised |= claimed
            continue
        problems += [
            f"{shard}: {key} is not in it, though the index says so" for key in sorted(claimed - held.keys())
        ]
        problems += [
            f"{shard}: {key} is in it, but not in the index" for key in sorted(held.keys() - claimed)
        ]
        promised |= claimed - held.keys()
        entries.update((key, held[key]) for key in claimed & held.keys())
    return entries, promised, problems or [reason]


def _missing(file: Path) -> str:
    left = unfinished(file)
    return f"{file.name}: missing" + (f", found {left}" if left is not None else "")


def _not_floating(entries: dict[str, TensorEntry]) -> list[str]:
    return [
        f"{name}: expected a floating-point dtype, got {entry.dtype}"
        for name, entry in entries.items()
        if not entry.dtype.is_floating_point
    ]


def _describe_dtypes(entries: Mapping[str, TensorEntry], folder: str) -> list[str]:
    """Which dtypes are stored, and which of them differ from the published file's; loading casts them either way."""
    counts = Counter(_dtype_name(entry.dtype) for entry in entries.values())
    notes = ["stored as " + ", ".join(f"{dtype} ({count})" for dtype, count in counts.most_common())]
    published = torch.bfloat16 if folder in _BF16_FOLDERS else torch.float32
    for what, expected, linear in (
        ("layer linears", published, True),
        ("other tensors", torch.float32, False),
    ):
        found = {e.dtype for n, e in entries.items() if is_layer_linear(n) == linear} - {expected}
        if found:
            names = ", ".join(sorted(map(_dtype_name, found)))
            notes.append(f"{what} in {names}; the published file has {_dtype_name(expected)}")
    return notes


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_turbo_vae(path: Path, dtype: torch.dtype) -> tuple[ComponentReport, TurboVAEConfig | None]:
    report = ComponentReport("Turbo VAE", path, required=True, found=path.exists())
    files = [path / CONFIG_NAME, path / CHECKPOINT_NAME]
    turbo = _load_on_meta(report, files, lambda: TurboVAE.from_pretrained(path, device="meta", dtype=dtype))
    return report, None if turbo is None else turbo.config


def _check_text_encoder(path: Path, dtype: torch.dtype) -> tuple[ComponentReport, int | None]:
    report = ComponentReport("text encoder", path, required=True, found=path.exists())
    files = [path / name for name in _TEXT_FILES]
    if report.found:
        entries, _, report.problems = _read_headers(path, "model.encoder.")
        files += sorted({entry.file for entry in entries.values()})
        report.notes += _describe_dtypes(entries, "")[: 1 if entries else 0]
    encoder = _load_on_meta(
        report, files, lambda: TextEncoder.from_pretrained(path, device="meta", dtype=dtype)
    )
    return report, None if encoder is None else encoder.hidden_size


def _check_image_vae(path: Path, *, required: bool) -> ComponentReport:
    # Loaded whenever it is there, so then it must be right.
    report = ComponentReport("image VAE", path, required=required or path.exists(), found=path.exists())
    files = [path] if path.is_file() else _vae_files(path, PUBLISHED_FILE)
    _load_on_meta(report, files, lambda: ImageEncoder.from_pretrained(path, device="meta"))
    if not report.found:
        report.notes.append("without it there are no reference images")
    return report


def _check_audio_vae(path: Path) -> ComponentReport:
    report = ComponentReport("audio VAE", path, required=True, found=path.exists())
    files = _vae_files(path, PUBLISHED_CONFIG, PUBLISHED_WEIGHTS)
    _load_on_meta(report, files, lambda: AudioVAE.from_pretrained(path, device="meta"))
    return report


def _vae_files(path: Path, *published: str) -> list[Path]:
    """The files an autoencoder is read from: the published ones, or the weights of a diffusers folder."""
    folder = find_diffusers_folder(path)
    if folder is not None and not all((path / name).is_file() for name in published):
        return [folder / WEIGHTS_FILE]
    return [path / name for name in published]


def _load_on_meta(report: ComponentReport, files: list[Path], load: Callable[[], Any]) -> Any:
    """Fill in `report` by loading a component without storage: its own loader checks every key and shape."""
    if not report.found:
        return None
    report.problems += [_missing(file) for file in files if not file.is_file()]
    # What is damaged beyond being no such file at all, the component's own loader tells.
    report.problems += [f"{file}: found {found}" for file in files if (found := fault(file)) is not None]
    report.disk_bytes = _size_of({file for file in files if file.is_file()})
    if report.problems:
        return None
    try:
        component = load()
    except CheckpointError as error:
        report.problems.append(str(error))
        return None
    tensors = list(tensors_of(component))
    report.tensors = len(tensors)
    report.memory_bytes = sum(tensor.nbytes for tensor in tensors)
    return component


def _size_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
