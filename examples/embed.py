"""The smallest embedding: load once, make a size ready, then make clips from any number of prompts.

    python examples/embed.py DIR "A woman looks into the camera and says hello." hello.mp4

DIR holds a checkpoint in the published layout (`magihuman-fast synth DIR` writes one with random weights).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from magihuman_fast import MagiHumanPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Make one clip.")
    parser.add_argument("model", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=(448, 256), metavar=("W", "H"))
    args = parser.parse_args()
    width, height = args.size

    pipe = MagiHumanPipeline.from_pretrained(args.model)
    print(f"{pipe.device}: {pipe.engine.path.name} ({pipe.engine.path.reason})")
    # On a Hopper GPU this captures the steps of this size, so that the first request is as fast as the next.
    pipe.setup([(width, height)], seconds=args.seconds)
    result = pipe(
        args.prompt,
        seconds=args.seconds,
        width=width,
        height=height,
        on_step=lambda stage, done, total: print(f"{stage} {done}/{total}"),
    )
    # Frames are uint8 (F, H, W, 3), sound is float32 (n, 2): yours to stream, edit or store as they are.
    print(f"{result.frames.shape} frames, {len(result.audio) / result.sample_rate:.2f} s of sound")
    result.save(args.output)


if __name__ == "__main__":
    main()
