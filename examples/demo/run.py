"""From a prompt and a picture to a video with sound, on any machine, with a small model of random weights.

Writes demo/demo.mp4, demo/contact_sheet.png and demo/waveform.png in the repository's root, and the model itself to
demo/checkpoint in the layout of the published one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import magihuman_fast
from magihuman_fast import MagiHumanPipeline
from magihuman_fast.checkpoints.synthetic import write_checkpoint
from magihuman_fast.cli.commands import Progress, timing_table
from magihuman_fast.cli.parser import DOWNLOADS, PROGRAM
from magihuman_fast.codecs import media
from magihuman_fast.runtime.environment import cpu_bf16_instructions, cuda_devices

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent / "demo"
CHECKPOINT = DEMO / "checkpoint"
STAMP = "synthetic.json"  # written last: a checkpoint that has it is complete
SETTINGS = {"version": magihuman_fast.__version__, "size": "tiny", "seed": 0}

NOTICE = f"""
NOTE: the weights of this demo are RANDOM. Its picture and sound are noise: what you see at work is everything around
the weights, from reading the published layout to the finished mp4. With the published weights (DIR is a folder of yours
with 100 GB of room; google and stabilityai ask you to accept their terms on huggingface.co first):

{DOWNLOADS}
{PROGRAM} check DIR
{PROGRAM} generate --model DIR --prompt-file examples/demo/prompt.txt --image examples/demo/portrait.png \\
  --output out.mp4
"""


def prepare_checkpoint() -> None:
    """Write the model, unless this version has written it before."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((CHECKPOINT / STAMP).read_text(encoding="utf-8")) == SETTINGS:
            print(f"using the random weights in {CHECKPOINT}")
            return
    print(f"writing random weights in the published layout to {CHECKPOINT}")
    partial = CHECKPOINT.with_name("checkpoint.partial")
    for folder in (partial, CHECKPOINT):
        shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(partial, size=str(SETTINGS["size"]), seed=int(SETTINGS["seed"]))
    (partial / STAMP).write_text(json.dumps(SETTINGS), encoding="utf-8")
    os.replace(partial, CHECKPOINT)


def main() -> None:
    # The model's small tokenizer knows few words: that it trims this prompt says nothing about the published one.
    logging.getLogger("magihuman_fast.codecs.text_encoder").setLevel(logging.ERROR)
    DEMO.mkdir(exist_ok=True)
    prepare_checkpoint()
    start = time.perf_counter()
    # A CPU that must emulate bfloat16 would take minutes.
    precision = "bf16" if cuda_devices() or cpu_bf16_instructions() else "fp32"
    pipe = MagiHumanPipeline.from_pretrained(CHECKPOINT, precision=precision)
    load_seconds = time.perf_counter() - start
    print(f"making 5 seconds of 448x256 in 8 steps on {pipe.device} in {precision}")
    with contextlib.closing(Progress(hidden=False)) as progress:
        result = pipe(
            (HERE / "prompt.txt").read_text(encoding="utf-8").strip(),
            image=HERE / "portrait.png",
            seconds=5,
            on_step=progress,
        )
    start = time.perf_counter()
    result.save(DEMO / "demo.mp4")
    media.write_contact_sheet(DEMO / "contact_sheet.png", result.frames)
    media.write_waveform_plot(DEMO / "waveform.png", result.audio)
    timings = {stage: seconds for stage, seconds in result.timings.items() if stage != "total"}
    timings["files"] = time.perf_counter() - start
    timings["total"] = sum(timings.values())
    print()
    print(timing_table(timings, load_seconds))
    print()
    for name in ("demo.mp4", "contact_sheet.png", "waveform.png"):
        print(f"{(DEMO / name).stat().st_size / 1024:8.0f} KiB  {DEMO / name}")
    print(NOTICE)


if __name__ == "__main__":
    main()
