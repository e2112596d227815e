"""Numbers of any library where callers give them, and what messages make of two that are nearly equal."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from magihuman_fast.checkpoints.synthetic import write_checkpoint
from magihuman_fast.cli.benchmark import Setting
from magihuman_fast.codecs import media
from magihuman_fast.codecs.image_encoder import preprocess_image
from magihuman_fast.errors import InputError
from magihuman_fast.guards.number_checks import MAX_SEED, apart, as_integer, as_real, check_seed
from magihuman_fast.model import sampler
from magihuman_fast.model.config import SUPER_RESOLUTIONS, VARIANTS
from magihuman_fast.pipeline.pipeline import MagiHumanPipeline
from magihuman_fast.pipeline.request import Request, check_request
from magihuman_fast.runtime.memory_estimate import bytes_text, bytes_texts

INTEGERS = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)]
NO_INTEGERS: list[object] = [
    *(True, np.True_, np.array(True), torch.tensor(True)),
    *(3.0, np.float64(3), np.array(3.0), torch.tensor(3.0), "3", None, [3], np.array([3, 4])),
]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value: object) -> None:
    assert (as_integer(value), type(as_integer(value))) == (3, int)
    assert (as_real(value), type(as_real(value))) == (3.0, float)
    assert type(check_seed(value)) is int


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_no_integers(value: object) -> None:
    assert as_integer(value) is None
    with pytest.raises(InputError, match="seed: expected an integer"):
        check_seed(value)
    for call in (
        lambda: sampler.flow_sigmas(value),  # type: ignore[arg-type]
        lambda: preprocess_image(np.zeros((32, 32, 3), np.uint8), value, 32),  # type: ignore[arg-type]
        lambda: checked(width=value),
        lambda: checked(seed=value),
        lambda: checked(steps=value) if value is not None else check_seed(value),
        lambda: Setting(runs=value),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError):
            call()


def test_reals() -> None:
    for value in (2.5, np.float32(2.5), np.float64(2.5), np.float16(2.5), Fraction(5, 2)):
        assert (as_real(value), type(as_real(value))) == (2.5, float)
    for refused in (True, np.True_, "2.5", None, 2.5j, [2.5], 10**400):
        assert as_real(refused) is None


def checked(**changes: Any) -> Request:
    given = {"seconds": 5, "width": 448, "height": 256, "seed": 42, "steps": None} | changes
    given = {"sr_steps": None, "sr_size": None} | given
    return check_request(VARIANTS["distill"], SUPER_RESOLUTIONS["540p"], **given)


def test_checked_requests_hold_plain_numbers() -> None:
    request = checked(
        seconds=np.float32(5),
        width=np.int32(448),
        height=np.int64(256),
        seed=np.uint64(MAX_SEED),
        steps=np.int8(4),
        sr_steps=np.int8(3),
        sr_size=np.array([960, 544]),
    )
    assert request == checked(seed=MAX_SEED, steps=4, sr_steps=3, sr_size=(960, 544))
    assert json.loads(json.dumps(vars(request)))["seed"] == MAX_SEED
    for size in ((960, 544, 25), (960,), 960):
        with pytest.raises(InputError, match="sr_size: expected width and height, got"):
            checked(sr_size=size)
    for seconds in (True, np.True_, "5", None):
        with pytest.raises(InputError, match="seconds: expected 1 to 60, got"):
            checked(seconds=seconds)
    with pytest.raises(InputError, match=r"seconds: expected 1 to 60, got 60\.0000001$"):
        checked(seconds=np.float64(60.0000001))


def test_clip_of_numpy_numbers(pipe: MagiHumanPipeline) -> None:
    plain: dict[str, Any] = {"seconds": 1, "width": 64, "height": 64, "seed": 2**63, "steps": 1}
    plain |= {"sr_steps": 1, "sr_size": (64, 64)}
    ours = {name: np.uint64(v) if isinstance(v, int) else np.array(v) for name, v in plain.items()}
    expected, got = pipe("A woman speaks.", **plain), pipe("A woman speaks.", **ours)
    assert np.array_equal(expected.frames, got.frames)
    assert type(got.seed) is int
    pipe.setup(np.array([[64, 64]]), seconds=np.float32(1), steps=np.int64(1), sr_size=np.array([64, 64]))


def test_every_bit_of_a_seed_counts() -> None:
    """On a CPU torch's own generator takes the lower 32 bits alone."""
    cpu = torch.device("cpu")
    seeds = [
        0,
        1,
        2**32 - 1,
        2**32,
        2**32 + 1,
        2**63 - 1,
        2**63,
        2**63 + 1,
        2**63 + 2**32,
        2**64 - 2,
        2**64 - 1,
    ]
    assert seeds[-1] == MAX_SEED
    drawn = {tuple(sampler.draw_noise(sampler.seeded(cpu, seed), (4,)).tolist()) for seed in seeds}
    assert len(drawn) == len(seeds)
    for seed in (0, 42, 2**32 - 1):  # these draw what torch draws
        published = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(sampler.draw_noise(sampler.seeded(cpu, seed), (4,)), published)
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match=r"seed: expected an integer from 0 to 2\^64 - 1"):
            sampler.seeded(cpu, seed)


def test_samplers_take_any_integer() -> None:
    assert np.array_equal(sampler.flow_sigmas(np.int64(8)), sampler.flow_sigmas(8))  # type: ignore[arg-type]
    latents = torch.zeros(2, 3, 4, 4), torch.zeros(9, 2)
    noise = {"video_noise": torch.zeros(2, 3, 8, 8), "audio_noise": torch.zeros(9, 2)}
    size = tuple(np.int64([8, 8]))
    assert sampler.prepare_super_resolution(*latents, size, **noise)[0].shape == (2, 3, 8, 8)
    with pytest.raises(InputError, match="size: expected an integer"):
        sampler.prepare_super_resolution(*latents, (8.0, 8.0), **noise)  # type: ignore[arg-type]


def test_media_takes_any_integer(tmp_path: Path) -> None:
    frames, sound = np.zeros((2, 32, 32, 3), np.uint8), np.zeros((44100, 2), np.float32)
    options = {"fps": 25, "crf": 30, "sample_rate": 44100}
    media.write_video(tmp_path / "a.mp4", frames, sound, **options)
    media.write_video(tmp_path / "b.mp4", frames, sound, **{n: np.int64(v) for n, v in options.items()})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    media.write_contact_sheet(tmp_path / "a.png", frames, columns=np.int64(2), count=np.int64(2))
    media.write_waveform_plot(tmp_path / "b.png", sound, np.int64(44100))
    for name, value in options.items():
        for refused in (float(value), True, str(value)):
            with pytest.raises(InputError, match=f"{name}: expected"):
                media.write_video(tmp_path / "c.mp4", frames, sound, **{name: refused})
    for name in ("columns", "count"):
        for refused in (2.0, True, 0):
            with pytest.raises(InputError, match=f"{name}: expected an integer from 1"):
                media.write_contact_sheet(tmp_path / "c.png", frames, **{name: refused})
    with pytest.raises(InputError, match="sample_rate: expected an integer from 1"):
        media.write_waveform_plot(tmp_path / "c.png", sound, 44100.0)  # type: ignore[arg-type]


def test_values_in_messages_are_short() -> None:
    with pytest.raises(InputError, match=r"got a number of thousands of digits$"):
        check_seed(10**5000)
    for length, shown in ((98, "'" + "x" * 98 + "'"), (99, "'" + "x" * 99 + "...")):
        with pytest.raises(InputError) as refused:
            check_seed("x" * length)
        assert str(refused.value).endswith(f", got {shown}")


def test_runs_of_a_benchmark() -> None:
    assert type(Setting(runs=np.int64(2)).runs) is int  # type: ignore[arg-type]


def test_seed_of_random_weights(tmp_path: Path) -> None:
    for refused in (-1, 2**64, True, 1.0):
        with pytest.raises(InputError, match="seed: expected"):
            write_checkpoint(tmp_path / "new", seed=refused)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_different_sizes_never_read_the_same() -> None:
    gib = 1 << 30
    assert bytes_texts(80 * gib, 79 * gib) == ["80.0 GiB", "79.0 GiB"]
    assert bytes_texts(80 * gib, 80 * gib) == ["80.0 GiB", "80.0 GiB"]
    needed, free = bytes_texts(80 * gib + 1, 80 * gib)
    assert bytes_text(80 * gib + 1) == bytes_text(80 * gib)
    assert needed != free
    assert needed.startswith("80.000")
    assert apart((0.0010004, 0.001), lambda value, digits: f"{value:.{digits}g}", 3) == ["0.0010004", "0.001"]
