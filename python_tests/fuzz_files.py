"""Reads damaged copies of small files, for `test_fuzz.py` and by hand: whatever is in them, they end in a result or an
`InputError`.

    .venv/bin/python python_tests/fuzz_files.py sound FOLDER 10000 --seed 7

Each file of FOLDER is damaged in turn: bits flipped, bytes overwritten, cut, repeated or put in, most often near the
start, where the headers are. The number of the case that runs is kept in FOLDER.case, so that whoever started this
process knows which one ended it; case N of a seed is always the same.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import resource
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

PATIENCE = 20  # seconds for one case
MEMORY = 6 << 30  # bytes of addresses


def damaged(data: bytes, deal: random.Random) -> bytes:
    """A damaged copy of a file."""
    copy = bytearray(data)
    for _ in range(deal.choice((1, 1, 1, 2, 4, 16))):
        reach = len(copy) if deal.random() < 0.5 else min(len(copy), 256)
        if not reach:
            break
        at, length = deal.randrange(reach), deal.choice((1, 1, 2, 4, 4, 8, 64))
        match deal.randrange(8):
            case 0 | 1 | 2:
                copy[at] ^= 1 << deal.randrange(8)
            case 3:
                copy[at : at + length] = deal.randbytes(length)
            case 4:
                copy[at : at + length] = deal.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
            case 5:
                copy[at:at] = deal.randbytes(length)
            case 6:
                copy[at : at + length] = copy[(start := deal.randrange(len(copy))) : start + length]
            case 7:
                del copy[at : deal.choice((at + length, len(copy)))]
    return bytes(copy)


def case(files: list[Path], seed: int, number: int) -> tuple[Path, bytes]:
    """What case `number` of a seed reads: the file that was damaged, and its damaged copy."""
    file = files[number % len(files)]
    return file, damaged(file.read_bytes(), random.Random(f"{seed} {number}"))


def read_sound(path: Path) -> None:
    """Decode as the decoder's process does, without a process for each file."""
    from magihuman_fast.codecs.sound_decoder import read

    read(str(path), 51200, 51200 * 2)


def read_picture(path: Path) -> None:
    from magihuman_fast.codecs.picture_files import load_image

    image: Any = load_image(path)
    assert image.mode == "RGB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("sound", "picture"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    read = {"sound": read_sound, "picture": read_picture}[args.kind]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.enable()
    warnings.simplefilter("always")
    # What is logged is told properly; whatever else is on stderr is not.
    logging.getLogger("magihuman_fast").addHandler(logging.NullHandler())
    from magihuman_fast.errors import InputError

    files = sorted(path for path in args.folder.iterdir() if path.is_file())
    progress = args.folder.with_suffix(".case")
    ends: Counter[str] = Counter()
    for number in range(args.first, args.cases):
        file, data = case(files, args.seed, number)
        progress.write_text(str(number))
        target = args.folder.with_suffix(f".damaged{file.suffix}")  # some formats are known by their suffix
        target.write_bytes(data)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            read(target)
            ends[f"{file.name} read"] += 1
        except InputError:
            ends[f"{file.name} refused"] += 1
        except BaseException:
            print(f"case {number} of seed {args.seed}: {file.name}", file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
    faulthandler.cancel_dump_traceback_later()
    print("\n".join(f"{count:8} {what}" for what, count in sorted(ends.items())), flush=True)
    os._exit(0)  # as the decoder's process ends


if __name__ == "__main__":
    main()
