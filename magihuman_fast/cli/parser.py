"""What the shell command takes: its commands and their arguments."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError
from ..model import config
from ..model.config import SUPER_RESOLUTIONS, VARIANTS

PROGRAM = "magihuman-fast"
DOWNLOADS = """\
hf download GAIR/daVinci-MagiHuman --include 'distill/*' --local-dir DIR
hf download GAIR/daVinci-MagiHuman --include 'turbo_vae/*' --local-dir DIR
hf download google/t5gemma-9b-9b-ul2 config.json tokenizer.json tokenizer_config.json model.safetensors.index.json \\
  model-0000{1,2,3,4}-of-00009.safetensors --local-dir DIR/t5gemma-9b-9b-ul2
hf download Wan-AI/Wan2.2-TI2V-5B Wan2.2_VAE.pth --local-dir DIR/Wan2.2-TI2V-5B
hf download stabilityai/stable-audio-open-1.0 model_config.json model.safetensors \\
  --local-dir DIR/stable-audio-open-1.0
"""
"""How to get what the distilled model needs; super-resolution also needs '540p_sr/*' or '1080p_sr/*'."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, and whose examples keep their lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _path(text: str) -> Path:
    if not text:  # as of a variable that is not set: to Path it would be this folder
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return Path(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 448x256, got {text!r}")
    return int(match[1]), int(match[2])


def _models(text: str) -> list[str]:
    known = [*VARIANTS, *SUPER_RESOLUTIONS]
    names = [name.strip() for name in text.split(",")]
    if not all(name in known for name in names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text!r}")
    return list(dict.fromkeys(names))


def _presets(text: str) -> list[str]:
    known = ["256p", *SUPER_RESOLUTIONS]
    names = [name.strip() for name in text.split(",")]
    if not all(name in known for name in names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text!r}")
    return list(dict.fromkeys(names))


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="daVinci-MagiHuman: from a prompt to a video of a speaking person, with sound.",
        epilog=f"""examples:
  {PROGRAM} info
  {PROGRAM} check DIR
  {PROGRAM} generate --model DIR --prompt "A woman smiles and says hello." --output hello.mp4

the published weights (DIR is a folder of yours; all of the first repository is some 200 GB):
  """
        + DOWNLOADS.strip().replace("\n", "\n  "),
    )
    version = import_module("..", __package__).__version__
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version}")
    commands = parser.add_subparsers(metavar="command", required=True)

    generate = _command(
        commands,
        "generate",
        "make a video from a prompt",
        f"""examples:
  {PROGRAM} generate --model DIR --prompt-file prompt.txt --image portrait.png --output out.mp4
  {PROGRAM} generate --model DIR --prompt "..." --sr 540p --output out.mp4
  {PROGRAM} generate --model DIR --prompt "..." --audio speech.wav --seconds 8 --output out.mp4
  {PROGRAM} generate --model DIR --prompt "..." --variant base --steps 32 --seed 7 --output out.mp4""",
    )
    add = generate.add_argument
    add(
        "--model",
        type=_path,
        required=True,
        metavar="DIR",
        help="folder of distill/, turbo_vae/ and the rest",
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what happens and what is said")
    prompt.add_argument(
        "--prompt-file", type=_path, metavar="FILE", help="read the prompt from a file, - for stdin"
    )
    add("--output", type=_path, required=True, metavar="FILE.mp4", help="the video to write")
    add("--image", type=_path, metavar="FILE", help="picture of the first frame")
    add(
        "--image-background",
        metavar="COLOR",
        help="under a picture that is not opaque, a name or #rrggbb (default: white)",
    )
    add(
        "--keep-image-profile",
        action="store_true",
        help="take a picture's colours as stored instead of converting them by its ICC profile to sRGB",
    )
    add("--audio", type=_path, metavar="FILE", help="sound that drives the video and goes into it")
    add("--seconds", type=float, default=5, metavar="S", help="length, 1 to 60 (default: 5)")
    add("--size", type=_size, default=(448, 256), metavar="WxH", help="first-stage pixels (default: 448x256)")
    add("--seed", type=int, default=42, metavar="N", help="of all noise, 0 to 2^64 - 1 (default: 42)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: distill 8, base 32)")
    add(
        "--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: the published one)"
    )
    add(
        "--sr-size",
        type=_size,
        metavar="WxH",
        help="size after super-resolution (default: keeps the aspect ratio)",
    )
    add("--sr-steps", type=int, metavar="N", help="super-resolution steps (default: 5)")
    add(
        "--sr-guidance",
        action="store_true",
        help="guide super-resolution: two forwards a step instead of one",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    add(
        "--text-encoder-on",
        choices=("auto", "device", "cpu", "disk"),
        default="auto",
        help="where the text encoder is between prompts (default: the device if there is room, else the CPU)",
    )
    add("--reference", action="store_true", help="the PyTorch path even where the kernels would run")
    add(
        "--check-kernels",
        action=argparse.BooleanOptionalAction,
        help="check the kernels against PyTorch anew, or not at all (default: once for a GPU and build)",
    )
    _add_components(generate)

    check = _command(
        commands,
        "check",
        "verify a checkpoint: files, keys, shapes, dtypes, memory needed",
        f"""Reads headers only. Exit code 0 if everything a run as asked for would load is right, else 3.

examples:
  {PROGRAM} check DIR
  {PROGRAM} check DIR --sr 1080p --json""",
    )
    check.add_argument(
        "folder", type=_path, metavar="DIR", help="folder of distill/, turbo_vae/ and the rest"
    )
    _add_components(check)

    synth = _command(
        commands,
        "synth",
        "write a checkpoint with random weights in the published layout",
        f"""What a model with random weights makes is noise; loading, shapes, speed and memory are real.

examples:
  {PROGRAM} synth DIR
  {PROGRAM} synth DIR --size full --models distill,540p""",
    )
    synth.add_argument("folder", type=_path, metavar="DIR", help="folder to write, new or empty")
    sizes = ("tiny", "small", "full")
    synth.add_argument(
        "--size", choices=sizes, default="tiny", help="full: the published sizes (default: tiny)"
    )
    synth.add_argument(
        "--models", type=_models, default=["distill"], metavar="NAMES", help="default: distill"
    )
    synth.add_argument("--seed", type=int, default=0, metavar="N", help="of all weights (default: 0)")
    synth.add_argument("--force", action="store_true", help="write although the folder is not empty")

    bench = _command(
        commands,
        "bench",
        "how long everything takes on this machine",
        f"""Cold start of a fresh process, each stage of a warm clip, and PyTorch's compiler on the same weights.
Weights are random unless --model names some. Without a GPU this times the reference path on toy sizes.

examples:
  {PROGRAM} bench
  {PROGRAM} bench --presets 256p,1080p --json""",
    )
    add = bench.add_argument
    add("--model", type=_path, metavar="DIR", help="a checkpoint (default: random weights)")
    add(
        "--presets",
        type=_presets,
        metavar="NAMES",
        help="of 256p,540p,1080p (default: 256p)",
        default=["256p"],
    )
    add(
        "--size",
        choices=("tiny", "small", "full"),
        help="of random weights (default: full on a GPU, else tiny)",
    )
    add("--variant", choices=[*VARIANTS], default="distill", help="first-stage model (default: distill)")
    add("--runs", type=int, default=3, metavar="N", help="warm clips to take the median of (default: 3)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--no-baseline", action="store_true", help="without the compiled reference path")
    add("--no-cold", action="store_true", help="without the fresh process")

    info = _command(
        commands,
        "info",
        "what this machine has and which path runs on it",
        f"""With --check every kernel runs against PyTorch on small inputs, in a process of its own. What uses a kernel
that is wrong takes the PyTorch path from then on. Exit code 1 if one is wrong.

examples:
  {PROGRAM} info --json
  {PROGRAM} info --check""",
    )
    info.add_argument("--check", action="store_true", help="check each kernel against PyTorch, anew")
    info.add_argument(
        "--simulator", action="store_true", help="with --check: in the simulator (development builds)"
    )
    return parser


def _command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    loudness = command.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="no progress, no tables, no warnings")
    loudness.add_argument("--verbose", action="store_true", help="log what is loaded; show tracebacks")
    command.set_defaults(command=name)
    return command


def _add_components(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--variant", choices=[*VARIANTS], default="distill", help="first-stage model (default: distill)")
    add("--sr", choices=[*SUPER_RESOLUTIONS], help="super-resolution model (default: none)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the models (default: bf16)")
    add(
        "--text-encoder",
        type=_path,
        metavar="DIR",
        help=f"default: {config.TEXT_ENCODER_FOLDER} below the model",
    )
    add("--image-vae", type=_path, metavar="DIR", help=f"default: {config.IMAGE_VAE_FOLDER} below the model")
    add("--audio-vae", type=_path, metavar="DIR", help=f"default: {config.AUDIO_VAE_FOLDER} below the model")
