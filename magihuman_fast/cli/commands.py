"""What the shell commands do: each takes parsed arguments and answers with values and text; none prints its result."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.check import CheckReport, check_checkpoint
from ..checkpoints.loading import check_root, resolve_device
from ..checkpoints.synthetic import write_checkpoint
from ..checkpoints.synthetic.disk_size import checkpoint_bytes
from ..codecs.picture_files import load_image
from ..codecs.sound_files import DRIVING_SAMPLE_RATE
from ..errors import InputError, OutputError
from ..guards.file_paths import check_output_path
from ..kernels import ops
from ..kernels.self_check import trust as kernel_trust
from ..kernels.self_check.cases import CASES
from ..model.config import IMAGE_VAE_FOLDER, SUPER_RESOLUTIONS, VARIANTS
from ..model.weights import open_checkpoint
from ..pipeline.pipeline import MagiHumanPipeline
from ..pipeline.request import check_request, load_driving_audio
from ..runtime.environment import available_memory, cpu_bf16_instructions, cuda_devices, describe_machine
from ..runtime.memory_estimate import bytes_text, bytes_texts
from . import benchmark
from .prompt_text import plain, read_prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a command has to say: as plain values for `--json`, as text otherwise, and its exit code."""

    values: dict[str, Any]
    text: str
    code: int = 0


class Progress:
    """Progress bars on stderr: one after the other, named by what they count."""

    def __init__(self, hidden: bool, unit: str = "it") -> None:
        self._disable = True if hidden else None  # None: shown on a terminal
        self._unit, self._label = unit, ""
        self._bar: Any = None

    def __call__(self, label: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None or label != self._label or done < self._bar.n:
            self.close()
            scale = {"unit": self._unit, "unit_scale": self._unit == "B", "unit_divisor": 1024}
            self._bar = tqdm(total=total, desc=label, disable=self._disable, file=sys.stderr, **scale)
            self._label = label
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def generate(args: argparse.Namespace) -> Answer:
    """Make a video; everything that can be refused is refused before the model is loaded."""
    # A mistyped folder is said before anything that is looked for in it.
    check_root(args.model, args.variant, [] if args.sr is None else [args.sr])
    output = check_output_path(args.output)
    prompt, args.negative_prompt = _prompts(args)
    request = _checked_request(args)
    if args.precision == "bf16" and resolve_device(args.device).type == "cpu" and not cpu_bf16_instructions():
        log.warning("this CPU has no bfloat16 instructions: --precision fp32 is many times faster here")
    hidden = args.quiet or args.json
    progress, start = Progress(hidden, unit="B"), time.perf_counter()
    with contextlib.closing(progress):
        pipe = MagiHumanPipeline.from_pretrained(
            args.model,
            variant=args.variant,
            sr=args.sr,
            device=args.device,
            precision=args.precision,
            text_encoder=args.text_encoder,
            text_encoder_on=args.text_encoder_on,
            image_vae=args.image_vae,
            audio_vae=args.audio_vae,
            kernels=False if args.reference else None,
            check_kernels=args.check_kernels,
            on_load=progress,
        )
    load_seconds = time.perf_counter() - start
    with contextlib.closing(Progress(hidden)) as progress:
        result = pipe(prompt, on_step=progress, **request)
    start = time.perf_counter()
    result.save(output)
    timings = {stage: seconds for stage, seconds in result.timings.items() if stage != "total"}
    timings["save"] = time.perf_counter() - start
    timings["total"] = result.timings["total"] + timings["save"]

    frames, height, width = result.frames.shape[:3]
    audio_seconds = len(result.audio) / result.sample_rate
    values = {
        "output": str(output),
        "frames": frames,
        "width": width,
        "height": height,
        "fps": result.fps,
        "audio_seconds": round(audio_seconds, 3),
        "sample_rate": result.sample_rate,
        "seed": result.seed,
        "device": str(pipe.device),
        "path": pipe.engine.path.name,
        "precision": args.precision,
        "variant": args.variant,
        "sr": args.sr,
        "load_seconds": round(load_seconds, 3),
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
    }
    if args.quiet:
        return Answer(values, "")
    clip = f"{frames} frames of {width}x{height} at {result.fps} fps, {audio_seconds:.2f} s of sound"
    text = f"wrote {output}: {clip}, seed {result.seed}\n\n" + timing_table(timings, load_seconds)
    return Answer(values, text)


def _prompts(args: argparse.Namespace) -> tuple[str, str | None]:
    """The prompt and the negative one, where it is given."""
    prompt = read_prompt(args.prompt_file) if args.prompt is None else plain(args.prompt)
    negative = None if args.negative_prompt is None else plain(args.negative_prompt)
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        if text is not None and not text:
            raise InputError(f"{name}: expected text, got {text!r}")
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: expected valid Unicode: {error}") from error
    return prompt, negative


def _checked_request(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments, checked as it would check them, so that what it tells of them is told once: now."""
    sr = None if args.sr is None else SUPER_RESOLUTIONS[args.sr]
    if sr is None and (args.sr_size or args.sr_steps is not None or args.sr_guidance):
        raise InputError("--sr-size, --sr-steps and --sr-guidance need --sr 540p or --sr 1080p")
    sizes = (args.seconds, *args.size, args.seed, args.steps, args.sr_steps, args.sr_size)
    request = check_request(VARIANTS[args.variant], sr, *sizes)
    found: dict[str, Any] = {
        "seconds": request.seconds,
        "width": request.size[0],
        "height": request.size[1],
        "seed": request.seed,
        "steps": request.steps,
        "negative_prompt": args.negative_prompt,
    }
    if sr is not None:
        found |= {"sr_steps": request.sr_steps, "sr_guidance": args.sr_guidance, "sr_size": request.sr_size}
    if args.image is not None:
        if args.image_vae is None and not (args.model / IMAGE_VAE_FOLDER).exists():
            raise InputError(
                f"--image needs the image VAE: expected {args.model / IMAGE_VAE_FOLDER}, or --image-vae DIR"
            )
        found["image"] = load_image(
            args.image,
            background="white" if args.image_background is None else args.image_background,
            convert_profile=not args.keep_image_profile,
        )
    elif args.image_background is not None or args.keep_image_profile:
        raise InputError("--image-background and --keep-image-profile need --image")
    if args.audio is not None:
        waveform = load_driving_audio(args.audio, args.seconds)
        assert waveform is not None
        found["audio"] = waveform
        found["seconds"] = waveform.shape[1] / DRIVING_SAMPLE_RATE
    return found


def timing_table(timings: dict[str, float], load_seconds: float | None = None) -> str:
    """Seconds and share of every stage, "total" last."""
    total = timings["total"]
    rows = [] if load_seconds is None else [("load", f"{load_seconds:.2f}", "")]
    rows += [
        (stage, f"{seconds:.2f}", f"{100 * seconds / total:.0f} %") for stage, seconds in timings.items()
    ]
    return table(("stage", "seconds", "share"), rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns two spaces apart; the first is left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check(args: argparse.Namespace) -> Answer:
    """Verify a checkpoint; exit code 3 unless all that a run as asked for loads is right."""
    report = check_checkpoint(
        args.folder,
        variant=args.variant,
        sr=args.sr,
        precision=args.precision,
        text_encoder=args.text_encoder,
        image_vae=args.image_vae,
        audio_vae=args.audio_vae,
    )
    return Answer(report.to_dict(), _check_text(report, args.precision, args.quiet), 0 if report.ok else 3)


def _check_text(report: CheckReport, precision: str, quiet: bool) -> str:
    lines = []
    for c in report.components:
        facts = (
            f"{c.tensors} tensors, {bytes_text(c.disk_bytes)} on disk, {bytes_text(c.memory_bytes)} in memory"
        )
        status = "MISSING" if c.required and not c.found else c.status
        lines.append(
            f"{status:<7} {c.name:<13}"
            + (facts if c.tensors else f"not needed: {c.path}" if not c.required else str(c.path))
        )
        lines += [f"          - {problem}" for problem in c.problems]
        lines += [f"          {note}" for note in c.notes]
    if report.memory and not quiet:
        rows = [
            (
                f"{m.preset} {m.size[0]}x{m.size[1]}",
                "kernels" if m.kernels else "reference",
                m.text_encoder,
                str(m.tokens),
                *map(
                    bytes_text, (m.weight_bytes, m.step_bytes, m.decode_bytes, m.needed_bytes, m.kept_bytes)
                ),
            )
            for m in report.memory
            if m.text_encoder != "disk"  # which needs no less than "cpu"
        ]
        header = (
            "preset",
            "path",
            "text encoder",
            "tokens",
            "weights",
            "steps",
            "decoding",
            "needed",
            "all kept",
        )
        lines += [
            "",
            f"memory for 5 seconds in {precision}, estimated: needed are the weights and the larger of steps and",
            "decoding; with room for both, captured steps stay where they are while frames are decoded.",
            table(header, rows),
        ]
        lines += dict.fromkeys(f"{m.preset}: {m.note}" for m in report.memory if m.note)
        here = [f"{bytes_text(d['memory_bytes'])} on {d['device']} ({d['name']})" for d in cuda_devices()]
        lines.append("here: " + ", ".join([*here, f"{bytes_text(available_memory())} available to the CPU"]))
    verdict = "ok: everything needed is there" if report.ok else "not usable: see the components above"
    return "\n".join([*lines, "", verdict])


def synth(args: argparse.Namespace) -> Answer:
    """Write a checkpoint of random weights, if there is room for it."""
    folder: Path = args.folder
    needed = checkpoint_bytes(args.size, args.models)
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: expected a folder, found a file")
        if folder.is_dir() and any(folder.iterdir()) and not args.force:
            raise OutputError(
                f"{folder}: expected an empty folder, found files; --force writes among and over them"
            )
        existing = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(existing).free
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from error
    if needed > free:
        expected, found = bytes_texts(needed, free)
        raise OutputError(f"{folder}: expected {expected} of free disk, found {found}")
    if not args.quiet:
        print(f"writing {bytes_text(needed)} of RANDOM weights to {folder}", file=sys.stderr)
    with contextlib.closing(Progress(args.quiet or args.json, unit="file")) as progress:
        write_checkpoint(
            folder,
            size=args.size,
            models=args.models,
            seed=args.seed,
            on_file=lambda _, done, total: progress("write", done, total),
        )
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    values = {
        "folder": str(folder),
        "size": args.size,
        "models": args.models,
        "seed": args.seed,
        "bytes": written,
    }
    text = f"wrote {bytes_text(written)} to {folder}. "
    text += "The weights are random: pictures and sound made with them are noise."
    return Answer(values, "" if args.quiet else text)


def bench(args: argparse.Namespace) -> Answer:
    """Time a cold start and warm clips."""
    if args.model is not None:  # what is wrong with it is said before a process starts for it
        check_root(args.model, args.variant, args.presets)
        folders = [VARIANTS[args.variant].folder]
        folders += [SUPER_RESOLUTIONS[name].folder for name in args.presets if name in SUPER_RESOLUTIONS]
        for folder in folders:
            open_checkpoint(Path(args.model) / folder)
    on_gpu = resolve_device(args.device).type == "cuda"
    size = args.size or ("full" if on_gpu else "tiny")
    options = {"model": args.model, "size": size, "variant": args.variant, "runs": args.runs}
    setting = benchmark.Setting(
        tuple(args.presets),
        device=args.device,
        baseline=not args.no_baseline,
        cold=not args.no_cold,
        **options,
    )
    record = benchmark.run(setting, lambda text: None if args.quiet else print(text, file=sys.stderr))
    header, *rows = benchmark.rows(record)
    text = "\n".join([table(header, rows), "", *benchmark.notes(record)])
    return Answer(record, "" if args.quiet else text.rstrip())


def info(args: argparse.Namespace) -> Answer:
    """Tell what this machine has and which path runs on it; with `--check`, check the kernels first."""
    if args.simulator and not args.check:
        raise InputError("--simulator needs --check")
    checks = check_kernels(simulator=args.simulator) if args.check else None
    machine = describe_machine()
    cpu, cuda = machine["cpu"], machine["cuda"]
    threads = f"{cpu['cores']} cores, torch uses {cpu['torch_threads']} threads"
    bf16 = ", ".join(cpu["bf16_instructions"]) or "none: bfloat16 is emulated"
    rows = [
        ("magihuman_fast", machine["magihuman_fast"]),
        ("runs", f"{machine['path']['name']}; {machine['path']['reason']}"),
        *(
            [("decoder", f"{machine['decoder_path']['name']}; {machine['decoder_path']['reason']}")]
            if machine["decoder_path"] != machine["path"]
            else []
        ),
        ("Python", f"{machine['python']} on {machine['system']}"),
        ("CPU", f"{cpu['name']}: {threads}; bfloat16 instructions: {bf16}"),
        ("memory", f"{bytes_text(cpu['memory_bytes'])}, {bytes_text(cpu['available_bytes'])} available"),
        ("CUDA", f"torch built with {cuda['torch_built_with'] or 'none'}, driver {cuda['driver'] or 'none'}"),
    ]
    for d in cuda["devices"]:
        bf16 = "bfloat16" if d["bf16"] else "no bfloat16"
        rows.append(
            (
                d["device"],
                f"{d['name']}: sm_{d['compute_capability'].replace('.', '')}, {bytes_text(d['memory_bytes'])}, {bf16}",
            )
        )
    if not cuda["devices"]:
        rows.append(("GPU", "none that torch can use"))
    rows.append(("libraries", ", ".join(f"{n} {v or 'MISSING'}" for n, v in machine["libraries"].items())))
    rows.append(("codecs", ", ".join(f"{n} {'yes' if ok else 'NO'}" for n, ok in machine["codecs"].items())))
    text = "\n".join(f"{name:<15} {value}" for name, value in rows)
    if checks is None:
        return Answer(machine, text)
    code = 0 if all(check["right"] for check in checks["devices"]) else 1
    return Answer(machine | {"kernel_check": checks}, f"{text}\n\n{kernel_tables(checks)}", code)


def check_kernels(*, simulator: bool = False) -> dict[str, Any]:
    """Check all kernels anew on every device that they run on, or in the simulator; `reason`: why on none."""
    targets: list[tuple[str, ops.Backend]] = [
        (device["device"], "gpu")
        for device in cuda_devices()
        if ops.gpu_unavailable(device["device"]) is None
    ]
    if simulator:
        try:
            ops.simulator()
        except RuntimeError as error:
            raise InputError(f"--simulator: {error}") from error
        targets = [("cpu", "sim")]
    devices = []
    for device, backend in targets:
        report = kernel_trust.examine(device, anew=True, backend=backend)
        kernels = []
        for finding in report.findings:
            case = CASES[finding.kernel]
            names = {"operation": case.operation, "form": case.form, "tile": case.tile, "part": case.part}
            kernels.append(names | asdict(finding))
        name = report.made_for["device"] if backend == "gpu" else "simulator"
        right = report.why_not() is None
        devices.append({"device": device, "name": name, "right": right, "kernels": kernels})
    return {"reason": None if devices else ops.gpu_unavailable(), "devices": devices}


def kernel_tables(checks: dict[str, Any]) -> str:
    """What `check_kernels` found, for people."""
    if not checks["devices"]:
        return f"no kernels to check: {checks['reason']}"
    lines = []
    for check in checks["devices"]:
        rows, notes = [], []
        for found in check["kernels"]:
            numbers = ("" if n is None else f"{n:.2g}" for n in (found["error"], found["allowed"]))
            label = f"{found['operation']}, {found['form']}" if found["form"] else found["operation"]
            rows.append((label, found["tile"], *numbers, f"{found['seconds']:.2f}", found["verdict"]))
            if found["verdict"] != "right":
                notes.append(f"{found['verdict']}: {found['kernel']}: {found['detail']}")
        lines += [
            f"kernels against PyTorch on {check['device']} ({check['name']}); error and bound of the element",
            "that is furthest off for its bound:",
            table(("kernel", "tile", "error", "bound", "seconds", "verdict"), rows),
            *notes,
            "all kernels are right" if check["right"] else "these kernels are not used on this device",
        ]
    return "\n".join(lines)
