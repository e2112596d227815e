"""Checks of a tensor operation's arguments: each failure is one `ValueError` that names operation, argument, expected
and got."""

from __future__ import annotations

from itertools import pairwise

import torch

ALIGNMENT = 16  # bytes: the widest load, and what a tensor map asks of its base and row pitch


def require(ok: bool, where: str, expected: str, got: object) -> None:
    """`where`: operation and argument, e.g. "rms_norm: x"."""
    if not ok:
        raise ValueError(f"{where}: expected {expected}, got {got}")


def check_tensor(
    where: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    pitched: bool = False,
) -> None:
    """Type, dtype, device, shape (None: any size), layout and alignment of one argument.

    Tensors are contiguous; with `pitched` the rows of the last axis are, and leading axes follow one another at one
    distance between rows, a multiple of 16 bytes.
    """
    require(isinstance(tensor, torch.Tensor), where, "a torch.Tensor", type(tensor).__name__)
    require(tensor.dtype == dtype, where, f"dtype {dtype}", tensor.dtype)
    require(tensor.device == device, where, f"device {device}", tensor.device)
    fits = tensor.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    require(fits, where, f"shape ({wanted})", tuple(tensor.shape))
    if pitched:
        step = row_pitch(tensor)
        axes = list(zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))
        nested = all(
            size == 1 or outer == inner_size * inner for (size, outer), (inner_size, inner) in pairwise(axes)
        )
        ok = tensor.stride(-1) == 1 and step >= tensor.shape[-1] and nested
        require(ok, where, "contiguous rows at one distance", f"strides {tensor.stride()}")
        expected = f"a row pitch that is a multiple of {ALIGNMENT} bytes"
        require(step * tensor.itemsize % ALIGNMENT == 0, where, expected, f"{step * tensor.itemsize} bytes")
    else:
        require(tensor.is_contiguous(), where, "a contiguous tensor", f"strides {tensor.stride()}")
    expected = f"an address that is a multiple of {ALIGNMENT}"
    require(tensor.data_ptr() % ALIGNMENT == 0, where, expected, hex(tensor.data_ptr()))


def row_pitch(tensor: torch.Tensor) -> int:
    """Elements from one row of the last axis to the next."""
    return tensor.stride(-2)


def check_word(where: str, tensor: torch.Tensor, count: int, device: torch.device) -> None:
    """A contiguous int32 vector of `count` elements."""
    require(isinstance(tensor, torch.Tensor), where, "a torch.Tensor", type(tensor).__name__)
    require(tensor.dtype == torch.int32, where, "dtype torch.int32", tensor.dtype)
    require(tensor.device == device, where, f"device {device}", tensor.device)
    require(tuple(tensor.shape) == (count,), where, f"shape ({count})", tuple(tensor.shape))
    require(tensor.is_contiguous(), where, "a contiguous tensor", f"strides {tensor.stride()}")


def check_offsets(where: str, offsets: torch.Tensor, rows: int, device: torch.device) -> None:
    """Modality offsets int32 (4,): (0, Nv, Nv + Na, L). The values are looked at only where they are on the host."""
    check_word(where, offsets, 4, device)
    if offsets.device.type == "cpu":
        values = offsets.tolist()
        require(values[0] == 0, where, "to begin with 0", values)
        require(all(a <= b for a, b in pairwise(values)), where, "ascending row numbers", values)
        require(values[3] <= rows, where, f"at most {rows} rows", values)


def check_disjoint(where: str, out: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Refuse an output that shares memory with an input which is still read while it is written."""
    ends = []
    for tensor in (out, source):
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        ends.append(
            (tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize if tensor.numel() else 0)
        )
    (start, end), (first, last) = ends
    require(end <= first or last <= start, where, "memory of its own", f"memory that the input {name} shares")
