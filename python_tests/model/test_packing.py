"""Tokens, coordinates, rotary tables and frame windows."""

from __future__ import annotations

import pytest
import torch

from cases import GOLDEN, load_golden
from magihuman_fast.errors import InputError
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import rope_bands
from magihuman_fast.model.packing import coordinates, pack, patchify, rope_table, unpatchify, window_ranges
from numerics import rel_err

NAMES = sorted(path.stem for path in (GOLDEN / "dit").glob("*.safetensors"))
BANDS = rope_bands(DiTConfig())


def grid_of(video: torch.Tensor) -> tuple[int, int, int]:
    return video.shape[1], video.shape[2] // 2, video.shape[3] // 2


@pytest.mark.parametrize("name", NAMES)
def test_recorded_tokens(name: str) -> None:
    golden = load_golden(f"dit/{name}")
    arch, num_text = golden.json("arch"), int(golden["in.text_len"])
    tokens = pack(
        golden.batch0("in.video"),
        golden.batch0("in.audio"),
        golden.batch0("in.text")[:num_text],
        BANDS,
        coords=golden.meta["coords_style"],
        channels=(192, 64, arch["text_in_channels"]),
    )
    packed, width = golden["in.tokens"], golden["in.tokens"].shape[1]
    rows = [
        torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (tokens.video, tokens.audio, tokens.text)
    ]
    assert torch.equal(torch.cat(rows), packed)
    counts = [b - a for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    assert torch.equal(torch.repeat_interleave(torch.arange(3), torch.tensor(counts)), golden["in.modality"])
    coords = coordinates(tokens.grid, len(tokens.audio), num_text, golden.meta["coords_style"])
    assert rel_err(coords, golden["in.coords"]) <= 1e-5


@pytest.mark.parametrize("shape", [(48, 1, 2, 2), (48, 3, 2, 14), (48, 5, 6, 4), (1, 2, 10, 6)])
def test_patches_round_trip(shape: tuple[int, ...]) -> None:
    video = torch.randn(shape)
    tokens = patchify(video)
    c, (t, h, w) = shape[0], grid_of(video)
    assert tokens.shape == (t * h * w, 4 * c)
    # The model reads channels slowest and writes them fastest: reorder between the two.
    spatial_major = tokens.unflatten(1, (c, 4)).transpose(1, 2).flatten(1)
    assert torch.equal(unpatchify(spatial_major, (t, h, w)), video)
    if c > 1:
        assert not torch.equal(unpatchify(tokens, (t, h, w)), video)


def test_text_is_not_rotated_at_256p() -> None:
    table = rope_table(coordinates((3, 2, 2), 9, 5, "v2")[-5:], BANDS)
    assert torch.equal(table, torch.cat([torch.zeros(5, 48), torch.ones(5, 48)], dim=1))


def test_one_text_token_needs_v2() -> None:
    rope_table(coordinates((3, 2, 2), 9, 1, "v2"), BANDS)
    with pytest.raises(InputError, match=r"at least 2 text tokens"):
        rope_table(coordinates((3, 2, 2), 9, 1, "v1"), BANDS)


def dense_mask(grid: tuple[int, int, int], num_tokens: int, window: int) -> torch.Tensor:
    """mask[q, k]: whether query row q sees key row k, from the definition."""
    per_frame, num_video = grid[1] * grid[2], grid[0] * grid[1] * grid[2]
    frame = torch.arange(num_tokens) // per_frame
    near = (frame[:, None] - frame[None, :]).abs() <= window
    tail = torch.arange(num_tokens) >= num_video
    return near | tail[:, None] | tail[None, :]


@pytest.mark.parametrize("grid", [(1, 1, 1), (6, 2, 3), (13, 1, 2), (32, 3, 1)])
@pytest.mark.parametrize("window", [0, 1, 11, 40])
def test_windows_against_a_mask(grid: tuple[int, int, int], window: int) -> None:
    num_tokens = grid[0] * grid[1] * grid[2] + 7
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.int)
    for part in window_ranges(grid, num_tokens, window):
        for start, end in part.keys:
            mask[part.query[0] : part.query[1], start:end] += 1
    assert torch.equal(mask, dense_mask(grid, num_tokens, window).int())


@pytest.mark.parametrize("name", ["a_v1_local", "b_v1_local"])
def test_windows_as_recorded(name: str) -> None:
    golden = load_golden(f"dit/{name}")
    num_tokens = len(golden["in.tokens"])
    recorded = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for (a, b), (c, d) in zip(golden["in.q_ranges"].tolist(), golden["in.k_ranges"].tolist(), strict=True):
        recorded[a:b, c:d] = True
    window = int(golden.meta["frame_receptive_field"])
    assert torch.equal(dense_mask(grid_of(golden.batch0("in.video")), num_tokens, window), recorded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.zeros(47, 2, 4, 4)}, "video: expected 48 channels"),
        ({"video": torch.zeros(48, 2, 5, 4)}, "video: expected even latent height"),
        ({"video": torch.zeros(48, 2, 4)}, "video: expected 4 dimensions"),
        ({"video": torch.zeros(48, 0, 4, 4)}, "video: expected at least one token"),
        ({"audio": torch.zeros(5, 63)}, "audio: expected 64 channels"),
        ({"audio": torch.zeros(5, 64, dtype=torch.int32)}, "audio: expected a floating-point dtype"),
        ({"audio": torch.zeros(5, 64, device="meta")}, "audio: expected device cpu"),
        ({"text": torch.zeros(4, 31)}, "text: expected 32 channels"),
        ({"text": torch.zeros(641, 32)}, "text: expected at most 640 tokens"),
        ({"text": [[0.0]]}, "text: expected a torch.Tensor"),
        ({"coords": "v3"}, "coords: expected 'v1' or 'v2'"),
    ],
)
def test_bad_inputs_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "video": torch.zeros(48, 2, 4, 4),
        "audio": torch.zeros(5, 64),
        "text": torch.zeros(4, 32),
        "coords": "v2",
    }
    pack(**good, bands=BANDS, channels=(192, 64, 32))
    with pytest.raises(InputError, match=message):
        pack(**(good | change), bands=BANDS, channels=(192, 64, 32))
