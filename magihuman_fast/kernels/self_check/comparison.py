"""One kernel against PyTorch on small random inputs: its inputs, two runs of it, and the comparison.

A `Case` is one operation of `ops` in one of the forms that the models use, made for one of its compiled tiles;
`cases` lists them all. It runs twice with outputs that hold NaN before, and once in PyTorch on the same
device. What it wrote must be the same bits both times, be there wherever PyTorch wrote and nowhere else, and lie as
close as roundings explain. `child` runs cases where they can do no harm, `trust` says what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .. import ops
from ..products import BF16, F32

Part = Literal["models", "decoder"]
Arguments = dict[str, Any]
# As csrc/gemm/tile_config.h and csrc/conv/tile_config.h name them.
WIDE, SQUARE = "128x256, pairs", "128x128"
PAIRS, BLOCKS, TALL = (
    "128 pixels x 256 channels, pairs",
    "256 pixels x 128 channels",
    "64 channels x 512 pixels",
)
# Rows, and frames, of every buffer beyond those in use: they must stay as they are.
SPARE_ROWS, SPARE_FRAMES = 5, 1


@dataclass(frozen=True)
class Bound:
    """How far an element may be from PyTorch's: a part of its own size, and one of the usual size, rms."""

    of_element: float
    of_rms: float


# A sum in another order may round a bfloat16 the other way, here and in what it came from: two units of its last place,
# and four of the usual size where two terms cancel. Float32 sums of a few thousand terms differ in the last few bits.
TO_BF16, TO_F32, EXACT = Bound(2**-6, 2**-5), Bound(2**-16, 2**-14), Bound(0, 0)


@dataclass(frozen=True)
class Product:
    """Rows of video, audio and text, width of a row, columns, heads of queries and of keys; 0 SMs: all."""

    rows: tuple[int, int, int]
    k: int
    n: int
    heads: tuple[int, int]
    num_sms: int


@dataclass(frozen=True)
class Sizes:
    """Of all cases: `ON_GPU` fills the device, `IN_SIMULATOR` is as small as tiles and their edges allow."""

    products: dict[str, Product]
    attention: tuple[tuple[int, int, int], tuple[int, int], int]  # rows, heads, video rows of a frame
    attention_sms: int
    hidden: int
    latent: tuple[int, int, int]
    audio: int
    text: int
    pixels: tuple[int, int, int]
    in_channels: int
    convolutions: dict[str, tuple[int, int]]  # output channels that get a tile, SMs


ON_GPU = Sizes(
    products={
        WIDE: Product((1400, 60, 40), 328, 2576, (16, 2), 0),
        SQUARE: Product((250, 30, 20), 520, 648, (3, 1), 0),
    },
    attention=((1500, 40, 60), (10, 2), 150),
    attention_sms=0,
    hidden=5120,
    latent=(4, 16, 28),
    audio=29,
    text=60,
    pixels=(9, 37, 70),
    in_channels=136,
    convolutions={PAIRS: (256, 0), BLOCKS: (128, 0), TALL: (64, 0)},
)
IN_SIMULATOR = Sizes(
    products={
        WIDE: Product((130, 70, 33), 72, 520, (2, 1), 2),
        SQUARE: Product((65, 20, 44), 136, 104, (1, 1), 1),
    },
    attention=((192, 9, 14), (2, 1), 64),
    attention_sms=2,
    hidden=128,
    latent=(2, 4, 6),
    audio=7,
    text=9,
    pixels=(2, 9, 10),
    in_channels=72,
    convolutions={PAIRS: (200, 2), BLOCKS: (104, 1), TALL: (56, 4)},
)


def sizes_for(backend: ops.Backend) -> Sizes:
    return ON_GPU if backend == "gpu" else IN_SIMULATOR


class Draw:
    """Random tensors on a device, the same ones each time."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).mul_(scale).to(dtype)

    def rows(self, live: int, *shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
        """Normal in rows that are in use, NaN in the spare ones: what is read of them shows."""
        found = self.missing(live + SPARE_ROWS, *shape, dtype=dtype)
        found[:live] = self.normal(live, *shape, scale=scale)
        return found

    def missing(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=self.device)

    def bias(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape, dtype=BF16, scale=0.5).float()  # PyTorch's convolution rounds it

    def integers(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def offsets(self, rows: tuple[int, int, int]) -> torch.Tensor:
        return self.integers(0, rows[0], rows[0] + rows[1], sum(rows))


@dataclass(frozen=True)
class Case:
    """One operation in one form and tile. `written`: the arguments that it writes."""

    operation: str
    form: str
    tile: str
    part: Part
    arguments: Callable[[Draw], Arguments]
    written: tuple[str, ...]
    bound: Bound = TO_BF16

    @property
    def name(self) -> str:
        """What tells it from all others, for people too."""
        details = "; ".join(text for text in (self.form, self.tile) if text)
        return f"{self.operation} ({details})" if details else self.operation


@dataclass(frozen=True)
class Difference:
    """The element furthest from PyTorch's, measured by what is allowed; `wrong` says what is not right, if anything."""

    error: float | None
    allowed: float | None
    wrong: str | None


def run_case(case: Case, device: torch.device, backend: ops.Backend) -> Difference:
    """Run a case on `backend` and hold it to PyTorch. Raises whatever the operation raises."""
    arguments = case.arguments(Draw(device, sizes_for(backend)))
    first, again = (_written(case, arguments, backend, poison) for poison in (0, 255))
    plain = _written(case, arguments, "reference", 0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found = []
    for got, repeated, expected in zip(first, again, plain, strict=True):
        difference = compare(got, expected, case.bound)
        if difference.wrong is None and not torch.equal(got.nan_to_num(), repeated.nan_to_num()):
            difference = replace(difference, wrong="two runs differ from one another")
        found.append(difference)
    return max(found, key=_badness)


def run_in_pytorch(case: Case, device: torch.device, backend: ops.Backend) -> None:
    """The PyTorch half of a case for `backend`: loads whatever libraries that takes."""
    _written(case, case.arguments(Draw(device, sizes_for(backend))), "reference", 0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _badness(found: Difference) -> tuple[bool, float]:
    if found.error is None or found.allowed is None:
        return True, float("inf")
    return found.wrong is not None, found.error / found.allowed if found.allowed else found.error


def compare(got: torch.Tensor, expected: torch.Tensor, bound: Bound) -> Difference:
    """Element by element; NaN stands for what was never written."""
    missing = int((got.isnan() & ~expected.isnan()).sum())
    beyond = int((~got.isnan() & expected.isnan()).sum())
    if missing:
        return Difference(None, None, f"{missing} of {got.numel()} elements are missing or no numbers")
    if beyond:
        return Difference(None, None, f"{beyond} elements beyond the result were written")
    inside = ~expected.isnan()
    got, expected = got[inside].double(), expected[inside].double()
    error = (got - expected).abs()
    allowed = bound.of_element * expected.abs() + bound.of_rms * expected.square().mean().sqrt()
    worst = int((error / allowed).nan_to_num(0.0, torch.inf).argmax())  # 0 / 0: as it should be
    if error[worst].isinf():
        return Difference(None, None, "infinite elements")
    wrong = "differs from PyTorch" if error[worst] > allowed[worst] else None
    return Difference(float(error[worst]), float(allowed[worst]), wrong)


def _written(case: Case, arguments: Arguments, backend: ops.Backend, poison: int) -> list[torch.Tensor]:
    """What a run writes, into copies of the outputs: where one is an input as well, both are the same copy."""
    copies: dict[int, torch.Tensor] = {}
    for output in (tensor for name in case.written for tensor in _tensors(arguments[name])):
        copies[id(output)] = output.clone()
        if output.dtype == torch.uint8:  # has no NaN: two runs then differ where nothing is written
            copies[id(output)].fill_(poison)

    def own(value: Any) -> Any:
        return copies.get(id(value), value)

    given = {
        name: type(value)(*map(own, value)) if isinstance(value, ops.QkvGate) else own(value)
        for name, value in arguments.items()
    }
    getattr(ops, case.operation)(**given, backend=backend)
    return [tensor for name in case.written for tensor in _tensors(given[name])]


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, ops.QkvGate) else (value,)
