"""Packed weights give what unpacked weights give, in plain PyTorch and through the kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from magihuman_fast.kernels import ops
from magihuman_fast.kernels.dit_weights import pack_layer, padded_width
from magihuman_fast.model.dit import LayerWeights, gelu7, grouped_linear, swiglu7
from numerics import rel_err

HIDDEN, HQ, HKV, HEAD = 256, 2, 1, 128
ROWS = (70, 20, 9)
OFFSETS = (0, 70, 90, 99)


def layer(experts: int, width: int, *, gelu: bool) -> LayerWeights:
    generator = torch.Generator().manual_seed(width)

    def linear(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(experts, rows, columns, generator=generator) * 2 / columns**0.5).bfloat16()

    def norm(size: int) -> torch.Tensor:
        return torch.randn(experts, size, generator=generator) * 0.1

    return LayerWeights(
        attn_norm=norm(HIDDEN),
        qkvg=linear(HEAD * (HQ + 2 * HKV) + HQ, HIDDEN),
        q_norm=norm(HEAD),
        k_norm=norm(HEAD),
        proj=linear(HIDDEN, HQ * HEAD),
        mlp_norm=norm(HIDDEN),
        up_gate=linear(width if gelu else 2 * width, HIDDEN),
        down=linear(HIDDEN, width),
    )


def test_padded_width() -> None:
    assert [padded_width(w) for w in (13652, 20480, 1, 64, 65)] == [13696, 20480, 64, 64, 128]


@pytest.mark.parametrize("backend", ["reference", "sim"])
@pytest.mark.parametrize(("experts", "gelu"), [(1, False), (3, False), (3, True)])
def test_mlp_of_a_packed_layer(backend: ops.Backend, experts: int, gelu: bool) -> None:
    width = 180  # not a multiple of 8, as 13652 is not
    weights = layer(experts, width, gelu=gelu)
    h = torch.randn(sum(ROWS), HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = torch.randn(sum(ROWS), HIDDEN, generator=torch.Generator().manual_seed(2))
    activation = gelu7 if gelu else swiglu7
    middle = activation(grouped_linear(h, weights.up_gate, OFFSETS))
    expected = x + grouped_linear(middle, weights.down, OFFSETS)

    packed = pack_layer(weights)
    assert packed.down.shape == (experts, HIDDEN, 192)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    # Poisoned: padding that is not written would spread NaN.
    d = torch.full((sum(ROWS), packed.down.shape[2]), float("nan"), dtype=torch.bfloat16)
    product = ops.gemm_gelu7 if gelu else ops.gemm_swiglu7
    if gelu:
        d[:, width:] = 0  # GELU7's width is a multiple of 64 in the model: it writes no padding
    product(
        h,
        packed.up_gate,
        out=d[:, :width] if gelu else d,
        modality_offsets=offsets,
        num_sms=2,
        backend=backend,
    )
    got = ops.gemm_residual(d, packed.down, x.clone(), modality_offsets=offsets, num_sms=2, backend=backend)
    # In bf16 steps: a sum in another order moves a few products by one unit.
    assert rel_err(got - x, expected - x) < 2.0**-9
    assert d[:, :width].isfinite().all()
    assert (d[:, width:] == 0).all()


def test_what_fits_is_not_copied() -> None:
    weights = layer(1, 128, gelu=True)
    packed = pack_layer(weights)
    for name in ("qkvg", "proj", "up_gate", "down"):
        assert getattr(packed, name).data_ptr() == getattr(weights, name).data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"proj": torch.zeros(1, 256, 256)},
            "pack_layer: proj: expected dtype torch.bfloat16, got torch.float32",
        ),
        ({"q_norm": torch.zeros(3, 128)}, "pack_layer: q_norm: expected 1 experts, as down has, got 3"),
        (
            {"up_gate": torch.zeros(1, 90, 256).bfloat16()},
            "pack_layer: up_gate: expected 180 or 360 rows, got 90",
        ),
    ],
)
def test_misfits_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        pack_layer(replace(layer(1, 180, gelu=False), **change))
