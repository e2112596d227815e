"""One layer's weights as the kernels read them: packed once, at load."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from ..model.dit import LayerWeights
from .tensor_checks import require

# A block of K in the matrix kernels. A width that is a whole number of them has legal row pitches (13652 bf16 are
# 27304 bytes, no multiple of 16) and no ragged last block.
BLOCK_K = 64
LINEARS = ("qkvg", "proj", "up_gate", "down")


def padded_width(width: int) -> int:
    """Columns of the activation between the two MLP products: 13652 becomes 13696, 20480 stays."""
    return -(-width // BLOCK_K) * BLOCK_K


def pack_layer(weights: LayerWeights) -> LayerWeights:
    """The same layer with `down` (E, hidden, width) padded with zero columns to (E, hidden, padded_width(width)).

    The activation's padding is zero as well (`ops.gemm_swiglu7` writes it), and a product of zeros adds nothing: the
    result is the same, bit for bit where sums run in the same order. Everything else stays as published: experts one
    after another on the leading axis, which is the kernels' [E * N, K]; gate and linear rows of `up_gate` in turn, so
    that one thread holds both. A tensor that already fits is used as it is, not copied.

    Raises:
        ValueError: a linear that is not bfloat16, or whose number of experts or sizes do not fit the others.
    """
    experts, hidden, width = weights.down.shape
    for name in LINEARS:
        w = getattr(weights, name)
        require(w.dtype == torch.bfloat16, f"pack_layer: {name}", "dtype torch.bfloat16", w.dtype)
    for field in fields(weights):
        count = len(getattr(weights, field.name))
        require(count == experts, f"pack_layer: {field.name}", f"{experts} experts, as down has", count)
    rows = weights.up_gate.shape[1]
    require(rows in (width, 2 * width), "pack_layer: up_gate", f"{width} or {2 * width} rows", rows)
    inputs = weights.up_gate.shape[2]
    require(
        inputs == hidden and hidden % 8 == 0, "pack_layer: up_gate", "hidden columns, a multiple of 8", inputs
    )

    columns = padded_width(width)
    down = weights.down
    if columns != width:
        down = down.new_zeros(experts, hidden, columns)
        down[..., :width] = weights.down
    packed = {name: getattr(weights, name).contiguous() for name in LINEARS if name != "down"}
    return replace(weights, **packed, down=down.contiguous())
