"""Where two tensors differ: counts, the first and the worst elements, and how they lie in a kernel's tiles.

Everything is counted in chunks on the device that holds the tensors, from sums of one mask of wrong elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = Literal["rows", "heads", "pixels"]
Rule = Literal["close", "equal", "finite"]
Bound = float | Tensor | Callable[[Tensor], Tensor]
CHUNK = 1 << 24  # elements
SHOWN = 16
TILE = 128  # rows, and columns
UNIT = 8  # pixels, both ways
BITS = {torch.float64: torch.int64, torch.float32: torch.int32}
BITS |= {torch.bfloat16: torch.int16, torch.float16: torch.int16}


def plain(value: Any) -> Any:
    """As JSON can hold it; numbers that are none in words."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@dataclass(frozen=True)
class Compared:
    """Two tensors as matrices, whose rows are rows, or lines of pixels, and the rule that each element must meet."""

    rule: Rule
    got: Tensor
    ref: Tensor
    bound: float | Tensor | Callable[[Tensor], Tensor]
    layout: Layout
    shape: tuple[
        int, ...
    ]  # by the layout: (rows, columns), (rows, heads, channels), (frames, h, w, channels)
    numbers: Tensor  # of rows, or of frames

    @classmethod
    def of(
        cls,
        rule: Rule,
        got: Tensor,
        ref: Tensor,
        bound: Bound,
        layout: Layout,
        numbers: Tensor | Sequence[int] | None,
    ) -> Compared:
        got, ref = got.detach(), ref.detach()
        if layout == "heads" and got.dim() != 3:
            layout = "rows"
        if layout == "pixels" and got.dim() not in (3, 4):
            layout = "rows"
        shape = tuple(got.shape)
        if layout == "pixels":
            shape = (1,) * (4 - len(shape)) + shape
            lines, width = shape[0] * shape[1], shape[2] * shape[3]
        else:
            if len(shape) < 2:
                shape = (1, math.prod(shape))
            elif layout == "rows":
                shape = (shape[0], math.prod(shape[1:]))
            lines, width = shape[0], math.prod(shape[1:])
        if isinstance(bound, Tensor):
            bound = bound.detach().broadcast_to(got.shape).reshape(lines, width)
        count = shape[0]
        known = torch.arange(count) if numbers is None else torch.as_tensor(numbers).cpu()
        return cls(rule, got.reshape(lines, width), ref.reshape(lines, width), bound, layout, shape, known)

    def with_got(self, got: Tensor) -> Compared:
        """Another run's elements in place of these, which may have been widened or moved since."""
        return replace(self, got=got.detach().reshape(self.got.shape).to(self.got))

    def against(self, other: Compared) -> Compared:
        """This one's elements beside the other's, bit by bit."""
        return replace(self, rule="equal", ref=other.got, bound=0.0)

    def chunks(self) -> Iterator[slice]:
        step = max(CHUNK // max(self.got.shape[1], 1), 1)
        for start in range(0, len(self.got), step):
            yield slice(start, min(start + step, len(self.got)))

    def bound_of(self, rows: slice, ref: Tensor) -> Tensor:
        if callable(self.bound):
            # Of all rows: what a bound derives from the whole, such as a mean, must not depend on the chunk.
            return self.bound(ref)
        if isinstance(self.bound, Tensor):
            return self.bound[rows].to(ref.device)
        return torch.as_tensor(self.bound, dtype=torch.float64, device=ref.device)

    def parts(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Elements, references and mask of what is wrong."""
        got, ref = self.got[rows], self.ref[rows].to(self.got.device)
        if self.rule == "finite":
            return got, ref, ~got.isfinite()
        if self.rule == "equal":
            if got.dtype not in BITS:
                return got, ref, got != ref
            bits = BITS[got.dtype]
            same = got.contiguous().view(bits) == ref.contiguous().view(bits)
            return got, ref, ~(same | (got.isnan() & ref.isnan()))
        g, r = self.wide(got), self.wide(ref)
        return got, ref, ~((g - r).abs() <= self.bound_of(rows, self.ref[rows].to(self.got.device)))

    def wide(self, x: Tensor) -> Tensor:
        exact = torch.float64 in (self.got.dtype, self.ref.dtype)
        return x.double() if exact or not x.is_floating_point() else x.float()

    def holds(self) -> bool:
        """One look at every element, one answer from the device."""
        wrong = torch.zeros((), dtype=torch.bool, device=self.got.device)
        for rows in self.chunks():
            wrong |= self.parts(rows)[2].any()
        return not bool(wrong)

    def count(self) -> int:
        return sum(int(self.parts(rows)[2].sum()) for rows in self.chunks())

    # --- places -----------------------------------------------------------------------------------------------

    def block(self) -> int:
        """Columns of a tile."""
        return {"rows": TILE, "heads": self.shape[-1], "pixels": UNIT * self.shape[-1]}[self.layout]

    def line_places(self) -> dict[str, Tensor]:
        """What each line's place says."""
        lines = torch.arange(len(self.got))
        if self.layout == "pixels":
            height = self.shape[1]
            return {"frame": self.numbers[lines // max(height, 1)], "y": lines % max(height, 1)}
        return {"row": self.numbers[lines]}

    def column_places(self) -> dict[str, Tensor]:
        columns, last = torch.arange(self.got.shape[1]), max(self.shape[-1], 1)
        if self.layout == "rows":
            return {"column": columns}
        return {"x" if self.layout == "pixels" else "head": columns // last, "channel": columns % last}

    def index_of(self, line: int, column: int) -> list[int]:
        places = [*self.line_places().values(), *self.column_places().values()]
        split = 2 if self.layout == "pixels" else 1
        return [int(place[line if i < split else column]) for i, place in enumerate(places)]


def _top(values: Tensor, counts: Tensor) -> list[list[int]]:
    """The `SHOWN` most frequent of them: [value, count]."""
    found, inverse = values.unique(return_inverse=True)
    sums = torch.zeros(len(found), dtype=torch.int64).index_add_(0, inverse, counts)
    order = sums.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return [[int(found[i]), int(sums[i])] for i in order if sums[i] > 0]


def _by(values: Tensor, counts: Tensor, extent: int) -> list[int]:
    return torch.zeros(extent, dtype=torch.int64).index_add_(0, values, counts).tolist()


@dataclass
class _Counts:
    """Sums of the mask: of every line, of every column on even and on odd lines, of every line in every tile."""

    lines: Tensor
    columns: Tensor
    blocks: Tensor


def survey(c: Compared, max_bytes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The report on what is wrong, and the tensors to keep with it, of at most `max_bytes`."""
    lines, width = c.got.shape
    device, block = c.got.device, max(c.block(), 1)
    num_blocks = -(-width // block)
    counts = _Counts(
        torch.zeros(lines, dtype=torch.int64, device=device),
        torch.zeros(2, width, dtype=torch.int64, device=device),
        torch.zeros(lines, num_blocks, dtype=torch.int32, device=device),
    )
    unwritten = infinite = zeros = 0
    largest, ratio = (-1.0, (0, 0)), (-1.0, (0, 0))
    first: list[dict[str, Any]] = []
    ratios: list[Tensor] = []
    places = c.line_places()
    odd = (places["y" if c.layout == "pixels" else "row"] % 2 == 1).to(device)
    for rows in c.chunks():
        got, ref, wrong = c.parts(rows)
        if not got.numel():
            continue
        counts.lines[rows] = wrong.sum(1)
        counts.columns[0] += wrong[~odd[rows]].sum(0)
        counts.columns[1] += wrong[odd[rows]].sum(0)
        padded = F.pad(wrong, (0, num_blocks * block - width)).view(len(wrong), num_blocks, block)
        counts.blocks[rows] = padded.sum(2).int()
        if got.is_floating_point():
            unwritten += int(got.isnan().sum())
            infinite += int(got.isinf().sum())
        zeros += int((wrong & (got == 0)).sum())
        error = (c.wide(got) - c.wide(ref)).abs().nan_to_num(-1.0, -1.0, -1.0)
        largest = max(largest, _peak(error, rows.start))
        bound = c.bound_of(rows, ref) if c.rule == "close" else None
        if bound is not None:
            ratio = max(ratio, _peak((error / bound).nan_to_num(-1.0), rows.start))
        if len(first) < SHOWN:
            hit = int((counts.lines[rows].cumsum(0) < SHOWN).sum()) + 1
            for line, column in wrong[:hit].nonzero()[: SHOWN - len(first)].tolist():
                first.append(_element(c, rows.start + line, column, got[line, column], ref[line, column]))
        if sum(map(len, ratios)) < 4096:
            ok = wrong & (ref != 0) & got.isfinite()
            ratios.append((c.wide(got)[ok] / c.wide(ref)[ok])[:4096].cpu())
    per_line, per_column, blocks = counts.lines.cpu(), counts.columns.cpu(), counts.blocks.cpu().long()
    wrong_elements, elements = int(per_line.sum()), c.got.numel()
    report: dict[str, Any] = {
        "rule": c.rule,
        "layout": c.layout,
        "shape": list(c.shape),
        "elements": elements,
        "wrong": wrong_elements,
        "unwritten": unwritten,
        "infinite": infinite,
        "wrong_and_zero": zeros,
        "first_wrong": first,
        "histograms": _histograms(c, per_line, per_column, blocks) if wrong_elements else {},
    }
    if c.rule != "finite" and largest[0] >= 0:
        report |= {"largest_error": largest[0], "largest_error_at": c.index_of(*largest[1])}
    if ratio[0] >= 0:
        report |= {"largest_ratio": plain(ratio[0]), "largest_ratio_at": c.index_of(*ratio[1])}
    if c.rule != "finite" and any(map(len, ratios)):
        report["median_got_over_ref"] = plain(float(torch.cat(ratios).double().median()))
    if not wrong_elements:
        return report, {}
    report["worst_tile"], tensors = _worst_tile(c, blocks, max_bytes)
    return report, tensors


def _peak(x: Tensor, start: int) -> tuple[float, tuple[int, int]]:
    at = int(x.argmax())
    return float(x.flatten()[at]), (start + at // x.shape[1], at % x.shape[1])


def _element(c: Compared, line: int, column: int, got: Tensor, ref: Tensor) -> dict[str, Any]:
    found = {"index": c.index_of(line, column), "got": plain(got.item())}
    return found if c.rule == "finite" else found | {"ref": plain(ref.item())}


def _tile_lines(c: Compared) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Which row of tiles each line is in, and what these are called."""
    places = c.line_places()
    if c.layout == "pixels":
        key = torch.stack([places["frame"], places["y"] // UNIT], 1)
    else:
        key = (places["row"] // TILE).unsqueeze(1)
    names, inverse = key.unique(dim=0, return_inverse=True)
    return inverse, [tuple(name) for name in names.tolist()]


def _histograms(c: Compared, lines: Tensor, columns: Tensor, blocks: Tensor) -> dict[str, Any]:
    """Counts of wrong elements: a list by value where the values are few, else the most frequent [value, count]."""
    p, q, both = c.line_places(), c.column_places(), columns.sum(0)
    inverse, names = _tile_lines(c)
    tiles = torch.zeros(len(names), blocks.shape[1], dtype=torch.int64).index_add_(0, inverse, blocks)
    order = tiles.flatten().argsort(descending=True, stable=True)[:SHOWN].tolist()
    shown = [(names[i // tiles.shape[1]], i % tiles.shape[1], int(tiles.flatten()[i])) for i in order]
    found: dict[str, Any] = {"tile": [[[*name, n], count] for name, n, count in shown if count]}
    found["tiles_with_wrong"] = [int((tiles > 0).sum()), tiles.numel()]
    if c.layout == "pixels":
        unit_rows = torch.tensor([name[1] for name in names])
        across = tiles.shape[1]
        keys = unit_rows.unsqueeze(1) * across + torch.arange(across)
        found["unit"] = [[[k // across, k % across], n] for k, n in _top(keys.flatten(), tiles.flatten())]
        phases = [_by(q["x"] % 2, part, 2) for part in columns]
        found |= {
            "frame": _top(p["frame"], lines),
            "y % 8": _by(p["y"] % UNIT, lines, UNIT),
            "x % 8": _by(q["x"] % UNIT, both, UNIT),
            "phase (y % 2, x % 2)": phases,
            "channel % 8": _by(q["channel"] % 8, both, 8),
            "channel // 64": _top(q["channel"] // 64, both),
        }
        return found
    found |= {
        "row % 128": _by(p["row"] % TILE, lines, TILE),
        "row // 16 % 8": _by(p["row"] // 16 % 8, lines, 8),
        "row % 8": _by(p["row"] % 8, lines, 8),
    }
    within = q["column" if c.layout == "rows" else "channel"]
    found |= {
        f"{'column' if c.layout == 'rows' else 'channel'} % 8": _by(within % 8, both, 8),
        f"{'column' if c.layout == 'rows' else 'channel'} % 128 // 8": _by(within % 128 // 8, both, 16),
    }
    if c.layout == "heads":
        found["head"] = _top(q["head"], both)
    return found


def _worst_tile(c: Compared, blocks: Tensor, max_bytes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The tile with most wrong elements, its pattern, and its tensors, or the whole ones where they are small."""
    inverse, names = _tile_lines(c)
    tiles = torch.zeros(len(names), blocks.shape[1], dtype=torch.int64).index_add_(0, inverse, blocks)
    at = int(tiles.argmax())
    row, column = at // tiles.shape[1], at % tiles.shape[1]
    lines = (inverse == row).nonzero().flatten()
    columns = slice(column * c.block(), min((column + 1) * c.block(), c.got.shape[1]))

    def cut(rows: Tensor | slice, columns: slice) -> dict[str, Tensor]:
        chosen = lines.to(c.got.device) if isinstance(rows, Tensor) else rows
        got = c.got[chosen][:, columns]
        kept = {"got": got.cpu().clone()}
        if c.rule == "finite":
            return kept
        ref = c.ref[chosen.to(c.ref.device) if isinstance(chosen, Tensor) else chosen]
        kept["ref"] = ref[:, columns].cpu().clone()
        if c.rule == "close":
            if isinstance(c.bound, Tensor):
                bound = c.bound[chosen.to(c.bound.device) if isinstance(chosen, Tensor) else chosen]
            else:
                bound = c.bound_of(slice(0), ref).broadcast_to(ref.shape)
            kept["bound"] = bound[:, columns].float().cpu().clone()
        return {name: x.float() if x.dtype == torch.float64 else x for name, x in kept.items()}

    tile = cut(lines, columns)
    size = max(tile["got"].numel(), 1)
    channels = c.shape[-1] if c.layout == "pixels" else tile["got"].shape[1]
    flat = {name: x.reshape(-1, max(channels, 1)) for name, x in tile.items()}
    found: dict[str, Any] = {
        "index": [*names[row], column],
        "shape": list(flat["got"].shape),
        "wrong": int(tiles.flatten()[at]),
        "wrong_share": int(tiles.flatten()[at]) / size,
    }
    if flat["got"].is_floating_point():
        found["unwritten_share"] = int(flat["got"].isnan().sum()) / size
    if "ref" in flat and flat["got"].is_floating_point():
        got, ref = flat["got"].float().nan_to_num(), flat["ref"].float().nan_to_num()
        found |= _origins("columns", got.T, ref.T) | _origins("rows", got, ref)
    if c.got.numel() * (c.got.element_size() + 8) <= max_bytes:
        found["tensors"] = "whole"
        whole = cut(slice(None), slice(None))
        return found, {name: x.reshape(c.shape) for name, x in whole.items()}
    found["tensors"] = "this tile"
    per_line = sum(x[:1].nbytes for x in flat.values())
    return found, {name: x[: max_bytes // max(per_line, 1)].clone() for name, x in flat.items()}


def _origins(kind: str, got: Tensor, ref: Tensor) -> dict[str, Any]:
    """Which lines of the reference's tile the tile's lines hold, where many hold another than their own: what an error
    in a fragment's or a swizzle's addresses does. -1: none."""
    if len(got) < 2 or got.shape[1] < 2:
        return {}
    distance, nearest = torch.cdist(got, ref).min(1)
    found = torch.where(distance <= 0.05 * got.norm(dim=1), nearest, -1)
    found[got.norm(dim=1) == 0] = -1
    moved = (found >= 0) & (found != torch.arange(len(got)))
    return {f"{kind}_come_from": found.tolist()} if int(moved.sum()) else {}
