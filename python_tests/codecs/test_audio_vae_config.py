"""The four sizes of an audio autoencoder, each within its bounds."""

from __future__ import annotations

from typing import Any

import pytest

from magihuman_fast.codecs.audio_vae_config import Architecture
from magihuman_fast.errors import CheckpointError

PUBLISHED = {"encoder": 128, "decoder": 128, "multiples": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8]}


def read(**changes: Any) -> Architecture:
    return Architecture.from_fields(PUBLISHED | changes, list(PUBLISHED), "config.json")


def test_sizes_within_their_bounds() -> None:
    assert vars(read()) == {
        "encoder_channels": 128,
        "decoder_channels": 128,
        "multiples": (1, 2, 4, 8, 16),
        "strides": (2, 4, 4, 8, 8),
    }
    assert read().decoder_reach == 11
    assert read(encoder=1, decoder=4096).decoder_channels == 4096
    assert read(multiples=[1, 4096], strides=[2, 1024]).strides == (2, 1024)
    assert read(multiples=[1], strides=[2048]).decoder_reach == 6  # 5.02 and up


@pytest.mark.parametrize(
    ("name", "value", "low"),
    [
        ("encoder", 0, 1),
        ("decoder", 4097, 1),
        ("decoder", [128], 1),
        ("encoder", True, 1),
        ("multiples", [1, 2, 4, 8, 0], 1),
        ("multiples", [], 1),
        ("multiples", [1.0, 2, 4, 8, 16], 1),
        ("strides", [1, 8, 4, 8, 8], 2),
        ("strides", [2, 4, 4, 8, 4097], 2),
        ("strides", None, 2),
    ],
)
def test_sizes_out_of_bounds(name: str, value: Any, low: int) -> None:
    with pytest.raises(
        CheckpointError, match=rf"config.json: {name}: expected integers in {low}\.\.4096, got "
    ):
        read(**{name: value})


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ([2, 4, 4, 64], "expected lists of one length"),
        (2048, "expected lists of one length"),
        ([2, 4, 4, 8, 4], "strides: expected a product of 2048"),
    ],
)
def test_strides_that_do_not_fit(strides: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(strides=strides)
