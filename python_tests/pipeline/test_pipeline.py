"""The whole pipeline on a tiny synthetic checkpoint: what a caller gets, and what a bad request gets."""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import magihuman_fast
from magihuman_fast import Cancelled, CheckpointError, InputError, MagiHumanPipeline, OutputError
from magihuman_fast.codecs.media import write_video
from magihuman_fast.codecs.sound_files import load_audio
from magihuman_fast.model import sampler
from magihuman_fast.model.config import (
    SUPER_RESOLUTIONS,
    VARIANTS,
    audio_latents,
    clip_frames,
    latent_frames,
    super_resolution_size,
)
from magihuman_fast.pipeline.request import check_request, load_driving_audio
from media_cases import portrait, voice

SMALL: dict[str, Any] = {"seconds": 1, "width": 64, "height": 64, "steps": 2}


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> MagiHumanPipeline:
    return MagiHumanPipeline.from_pretrained(tiny_checkpoint, device="cpu")


def test_prompt_to_file(plain: MagiHumanPipeline, tmp_path: Path) -> None:
    start = time.perf_counter()
    result = plain("A woman says hello.", **SMALL)
    elapsed = time.perf_counter() - start
    assert result.frames.shape == (25, 64, 64, 3)
    assert result.frames.dtype == np.uint8
    assert result.frames.std() > 1
    assert result.audio.dtype == np.float32
    assert result.audio.shape == (44100, 2)
    assert (result.fps, result.sample_rate, result.seed) == (25, 44100, 42)
    stages = dict(result.timings)
    total = stages.pop("total")
    assert {"text", "denoise", "decode", "sound"} == set(stages)
    # One after the other, within the time it took.
    assert min(stages.values()) > 0
    assert sum(stages.values()) <= total <= elapsed
    result.save(tmp_path / "out.mp4")
    assert load_audio(tmp_path / "out.mp4", 44100).shape[1] >= 44100
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_same_seed_same_bytes(tiny_checkpoint: Path, plain: MagiHumanPipeline, tmp_path: Path) -> None:
    first = plain("A man sings.", seed=7, image=portrait(), **SMALL)
    plain("Something else in between.", seed=8, **SMALL)
    again = plain("A man sings.", seed=7, image=portrait(), **SMALL)
    fresh = MagiHumanPipeline.from_pretrained(tiny_checkpoint, device="cpu")(
        "A man sings.", seed=7, image=Image.fromarray(portrait()), **SMALL
    )
    for name, result in (("a", first), ("b", again), ("c", fresh)):
        assert np.array_equal(result.frames, first.frames)
        assert np.array_equal(result.audio, first.audio)
        result.save(tmp_path / f"{name}.mp4")
        assert (tmp_path / f"{name}.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    other = plain("A man sings.", seed=9, image=portrait(), **SMALL)
    assert not np.array_equal(other.frames, first.frames)


def test_noise_order(plain: MagiHumanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One generator: audio latents, video latents, then each step's video and audio noise."""
    seen: dict[str, Any] = {}

    def record(dit: object, video: torch.Tensor, audio: torch.Tensor, text: object, **options: Any) -> Any:
        seen.update(video=video, audio=audio, noise=next(iter(options["noise"])))
        return video, audio

    monkeypatch.setattr(sampler, "sample_distilled", record)
    plain("Hello.", seed=5, **SMALL)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(seen["audio"], torch.randn(1, 26, 64, generator=generator)[0])
    assert torch.equal(seen["video"], torch.randn(1, 48, 7, 4, 4, generator=generator)[0])
    assert torch.equal(seen["noise"][0], torch.randn(1, 48, 7, 4, 4, generator=generator)[0])
    assert torch.equal(seen["noise"][1], torch.randn(1, 26, 64, generator=generator)[0])


@pytest.mark.parametrize("sr", ["540p", "1080p"])
def test_super_resolution(tiny_checkpoint: Path, sr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = MagiHumanPipeline.from_pretrained(tiny_checkpoint, sr=sr, device="cpu")
    windows = []
    resolve = sampler.super_resolve

    def record(*args: Any, **options: Any) -> Any:
        windows.append(options["frame_window"])
        return resolve(*args, **options)

    monkeypatch.setattr(sampler, "super_resolve", record)
    options = SMALL | {"sr_steps": 1, "sr_size": (96, 128), "image": portrait()}
    steps: list[tuple[str, int, int]] = []
    result = pipe("A woman nods.", on_step=lambda *step: steps.append(step), **options)
    assert result.frames.shape == (25, 128, 96, 3)
    assert [step for step in steps if step[0] != "decode"] == [
        ("denoise", 1, 2),
        ("denoise", 2, 2),
        ("super_resolution", 1, 1),
    ]
    assert {"image_encode", "sr_image_encode", "super_resolution"} <= set(result.timings)
    guided = pipe("A woman nods.", sr_guidance=True, **options)
    assert not np.array_equal(guided.frames, result.frames)
    assert windows == [SUPER_RESOLUTIONS[sr].frame_window] * 2
    # The sound comes from the first stage's clean latents.
    assert np.array_equal(guided.audio, result.audio)


def test_base_model_is_guided(tiny_checkpoint: Path) -> None:
    pipe = MagiHumanPipeline.from_pretrained(tiny_checkpoint, variant="base", device="cpu")
    first = pipe("A man nods.", **SMALL)
    assert not np.array_equal(pipe("A man nods.", negative_prompt="a tree", **SMALL).frames, first.frames)


def test_driving_audio_sets_length_and_stays_fixed(plain: MagiHumanPipeline, tmp_path: Path) -> None:
    options = SMALL | {"seconds": 3}
    result = plain("He speaks.", audio=voice(2), **options)
    assert len(result.frames) == 50
    assert len(result.audio) == 2 * 44100
    write_video(tmp_path / "voice.mp4", np.zeros((50, 32, 32, 3), np.uint8), voice(2.02, 44100).T.numpy())
    from_file = plain("He speaks.", audio=tmp_path / "voice.mp4", **options)
    assert len(from_file.frames) == 51  # AAC comes in blocks: the last one ends after 2.02 s
    longer = plain("He speaks.", audio=voice(2), **(options | {"seconds": 1, "steps": 1}))
    assert len(longer.frames) == 25
    # More steps change the picture, never the driving sound.
    assert np.array_equal(plain("He speaks.", audio=voice(2), **(options | {"steps": 1})).audio, result.audio)


@pytest.mark.parametrize("seconds", [1, 1.11, 1.12, 1.96, 2, 2.5, 3, 4, 5.04])
def test_seconds_are_covered_by_whole_frames(
    plain: MagiHumanPipeline, tmp_path: Path, seconds: float
) -> None:
    """With and without driving sound: as many frames as it takes, never fewer, and sound just as long."""
    frames = math.ceil(round(25 * seconds, 6))
    for options in ({"seconds": seconds}, {"audio": voice(seconds), "seconds": 6}):
        result = plain("He speaks.", **SMALL | {"steps": 1} | options)
        assert len(result.frames) == frames
        assert len(result.audio) == frames * 1764
        result.save(tmp_path / "a.mp4")
        with av.open(str(tmp_path / "a.mp4")) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            assert video.frames == frames
            assert sound.duration * sound.time_base == pytest.approx(frames / 25, abs=1e-3)


def test_only_lengths_that_are_no_whole_frames_are_told(
    plain: MagiHumanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="magihuman_fast"):
        for frames in range(25, 1501):
            load_driving_audio(None, frames / 25)
            load_driving_audio(None, frames * 0.04)
        assert not caplog.messages
        load_driving_audio(None, 2.5)
    assert caplog.messages == ["2.5 s are no whole frames: the clip has 63 and lasts 2.52 s"]


def test_published_lengths_stay_as_they_are() -> None:
    """Where the published latents cover the clip, there are just as many: a seed's noise stays the reference's."""
    for seconds in (1, 4, 5, 8, 9, 12, 13, 20, 60):
        assert audio_latents(seconds) == 25 * seconds + 1
    assert audio_latents(5, driven=True) == 125
    for samples in range(51200, 4 * 51200, 97):
        for driven in (False, True):
            latents, frames = audio_latents(samples / 51200, driven=driven), math.ceil(samples / 2048)
            assert clip_frames(samples / 51200) == frames
            assert 4 * (latent_frames(latents) - 1) + 1 >= frames > 4 * (latent_frames(latents) - 2) + 1
            assert latents >= frames + (not driven)


def test_the_voice_reaches_the_model_to_its_end(
    plain: MagiHumanPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []
    encode = plain.audio_vae.encode
    monkeypatch.setattr(
        plain.audio_vae, "encode", lambda wave, **options: seen.append(wave) or encode(wave, **options)
    )
    sound = voice(1.11)
    with caplog.at_level(logging.WARNING, logger="magihuman_fast"):
        plain("He speaks.", audio=sound, **SMALL | {"steps": 1, "seconds": 5})
    assert torch.equal(seen[0][:, : sound.shape[1]], sound)
    assert seen[0].shape == (2, 29 * 2048)
    assert not seen[0][:, sound.shape[1] :].any()
    assert caplog.messages == [
        "the driving sound lasts 1.110 s: the clip has 28 frames and lasts 1.12 s, not 5 s"
    ]


def test_driving_audio_that_is_cut_is_said(
    plain: MagiHumanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="magihuman_fast"):
        plain("He speaks.", audio=voice(1), **(SMALL | {"steps": 1}))
        assert not caplog.records
        plain("He speaks.", audio=voice(1.5), **(SMALL | {"steps": 1}))
    assert "the driving sound is longer than 1 s and is cut there" in caplog.text


def test_progress_and_cancel(plain: MagiHumanPipeline) -> None:
    seen: list[tuple[str, int, int]] = []
    event = threading.Event()

    def on_step(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if (stage, done) == ("denoise", 2):
            event.set()

    options = SMALL | {"steps": 4}
    with pytest.raises(Cancelled, match=r"cancelled during denoise"):
        plain("Hello.", on_step=on_step, cancel=event, **options)
    assert seen == [("denoise", 1, 4), ("denoise", 2, 4)]
    seen.clear()
    event.clear()
    plain("Hello.", on_step=lambda *step: seen.append(step), cancel=event, **options)
    assert seen == [("denoise", i, 4) for i in (1, 2, 3, 4)] + [("decode", 1, 1)]
    event.set()
    with pytest.raises(Cancelled):
        plain("Hello.", cancel=event, **options)


def test_sizes_snap_and_say_so(plain: MagiHumanPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="magihuman_fast"):
        result = plain("Hello.", **(SMALL | {"width": 100, "height": 95}))
    assert result.frames.shape == (25, 64, 96, 3)
    assert "size 100x95 becomes 96x64" in caplog.text


def test_long_prompt_is_trimmed_and_said(plain: MagiHumanPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="magihuman_fast"):
        plain("word " * 700, **(SMALL | {"steps": 1}))
    assert "only the first 640 are used" in caplog.text


def test_published_sizes() -> None:
    assert super_resolution_size(448, 256, SUPER_RESOLUTIONS["540p"]) == (960, 544)
    assert super_resolution_size(448, 256, SUPER_RESOLUTIONS["1080p"]) == (1920, 1088)
    assert super_resolution_size(256, 448, SUPER_RESOLUTIONS["1080p"]) == (1088, 1920)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, r"prompt: expected text, got ''"),
        ({"prompt": " \n"}, r"prompt: expected text"),
        ({"prompt": 7}, r"prompt: expected text, got 7"),
        ({"width": 32}, r"size: expected sides of 64 to 4096 pixels, got 32"),
        ({"height": 64.0}, r"size: expected sides of 64 to 4096 pixels, got 64.0"),
        ({"height": 5000}, r"size: expected sides of 64 to 4096 pixels, got 5000"),
        ({"seconds": 0.5}, r"seconds: expected 1 to 60, got 0.5"),
        ({"seconds": 61}, r"seconds: expected 1 to 60, got 61"),
        ({"seconds": float("nan")}, r"seconds: expected 1 to 60, got nan"),
        ({"seconds": "5"}, r"seconds: expected 1 to 60, got '5'"),
        ({"steps": 0}, r"steps: expected an integer from 1 to 1000, got 0"),
        ({"seed": -1}, r"seed: expected an integer from 0"),
        ({"seed": 2**64}, r"seed: expected an integer from 0 to 2\^64 - 1, got 18446744073709551616"),
        ({"seed": 1.5}, r"seed: expected an integer from 0"),
        ({"sr_guidance": True}, r"sr_guidance: this pipeline was loaded without sr="),
        ({"audio": np.array([None, "x"])}, r"audio: expected a file, an array or a tensor"),
        ({"sr_steps": 3}, r"sr_size, sr_steps: this pipeline was loaded without sr="),
        ({"image": "no/such/picture.png"}, r"image no/such/picture.png: expected a file, found nothing"),
        ({"image": np.zeros((4, 4))}, r"image"),
        ({"audio": "no/such/voice.wav"}, r"audio no/such/voice.wav: expected a file, found nothing"),
        ({"audio": torch.zeros(51200)}, r"audio: expected float \(2, n\) at 51200 Hz, got \(51200,\)"),
        ({"audio": voice(0.5)}, r"audio: expected at least 1 s, got 0.500 s"),
        ({"audio": voice(1)[:, :-1]}, r"audio: expected at least 1 s, got 0.999 s"),
        ({"audio": voice(1) / 0}, r"audio: expected finite samples"),
    ],
)
def test_bad_requests_are_named_before_any_work(
    plain: MagiHumanPipeline, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(plain.text_encoder, "encode", untouched)
    monkeypatch.setattr(plain.dit, "velocity", untouched)
    with pytest.raises(InputError, match=message):
        plain(**({"prompt": "Hello."} | SMALL | change))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n broken", b"plain text"])
def test_unreadable_files(plain: MagiHumanPipeline, tmp_path: Path, data: bytes) -> None:
    for name in ("picture.png", "voice.wav"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"picture.png"):
        plain("Hello.", image=tmp_path / "picture.png", **SMALL)
    with pytest.raises(InputError, match=r"voice.wav"):
        plain("Hello.", audio=tmp_path / "voice.wav", **SMALL)


def test_unwritable_output(plain: MagiHumanPipeline, tmp_path: Path) -> None:
    result = plain("Hello.", **SMALL)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out.mp4", tmp_path / "absent" / "out.mp4", tmp_path / "out.avi"):
        with pytest.raises(OutputError, match=path.name):
            result.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_an_image_vae(tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    ignored = shutil.ignore_patterns("Wan2.2-TI2V-5B", "base", "540p_sr", "1080p_sr")
    shutil.copytree(tiny_checkpoint, root, ignore=ignored)
    pipe = MagiHumanPipeline.from_pretrained(root, device="cpu")
    with pytest.raises(InputError, match=r"loaded without an image VAE; pass image_vae="):
        pipe("Hello.", image=portrait(), **SMALL)
    with pytest.raises(CheckpointError, match=r"absent"):
        MagiHumanPipeline.from_pretrained(root, device="cpu", image_vae=tmp_path / "absent")
    # Components may live anywhere.
    elsewhere = {
        "text_encoder": tiny_checkpoint / "t5gemma-9b-9b-ul2",
        "audio_vae": tiny_checkpoint / "stable-audio-open-1.0",
        "image_vae": tiny_checkpoint / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth",
    }
    shutil.rmtree(root / "t5gemma-9b-9b-ul2")
    shutil.rmtree(root / "stable-audio-open-1.0")
    assert MagiHumanPipeline.from_pretrained(root, device="cpu", **elsewhere).image_encoder is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "turbo"}, InputError, r"variant: expected one of distill, base, got 'turbo'"),
        ({"sr": "720p"}, InputError, r"sr: expected one of 540p, 1080p, got '720p'"),
        ({"precision": "fp8"}, InputError, r"precision: expected one of bf16, fp32, got 'fp8'"),
        ({"device": None}, InputError, r"device: expected 'auto', 'cpu' or 'cuda\[:N\]', got None"),
        ({"device": "tpu9"}, InputError, r"device: expected 'auto', 'cpu' or 'cuda\[:N\]', got 'tpu9'"),
        ({"device": "cuda:99"}, InputError, r"device: 'cuda:99' not found"),
    ],
)
def test_bad_options(tiny_checkpoint: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MagiHumanPipeline.from_pretrained(tiny_checkpoint, **({"device": "cpu"} | options))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("distill", r"root: expected distill/ in the checkpoint's root folder, found only: "),
        ("distill/model-00003-of-00013.safetensors", r"missing shards model-00003-of-00013.safetensors"),
        ("turbo_vae", r"turbo_vae"),
        ("turbo_vae/checkpoint-340000.ckpt", r"checkpoint-340000.ckpt"),
        ("stable-audio-open-1.0/model_config.json", r"stable-audio-open-1.0"),
        ("t5gemma-9b-9b-ul2/tokenizer.json", r"tokenizer.json"),
        ("t5gemma-9b-9b-ul2", r"t5gemma-9b-9b-ul2"),
        ("", r"expected the checkpoint's root folder, found no folder"),
    ],
)
def test_missing_files(tiny_checkpoint: Path, tmp_path: Path, missing: str, message: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_checkpoint, root, ignore=shutil.ignore_patterns("base", "540p_sr", "1080p_sr"))
    target = root / missing
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    with pytest.raises(CheckpointError, match=message):
        MagiHumanPipeline.from_pretrained(root, device="cpu")


def test_components_that_do_not_fit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from magihuman_fast.checkpoints.synthetic.text_encoder import write_text_encoder

    write_text_encoder(tmp_path / "text", hidden=32)
    with pytest.raises(CheckpointError, match=r"reads text encodings of width 64, but .*text gives 32"):
        MagiHumanPipeline.from_pretrained(tiny_checkpoint, device="cpu", text_encoder=tmp_path / "text")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((4096, 64), r"super-resolution makes 69632x1088 of 4096x64; expected no side .* over 4096"),
        ((2048, 2048), r"super-resolution makes 1088x1088 of 2048x2048; expected no side smaller"),
    ],
)
def test_super_resolution_sizes_are_bounded(size: tuple[int, int], message: str) -> None:
    options = (VARIANTS["distill"], SUPER_RESOLUTIONS["1080p"], 5, *size, 0, None, None, None)
    with pytest.raises(InputError, match=message):
        check_request(*options)


def test_root_beyond_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no folder"):
        MagiHumanPipeline.from_pretrained(tmp_path / ("x" * 300), device="cpu")


def test_threads_share_a_pipeline(plain: MagiHumanPipeline) -> None:
    prompts = [f"Speaker {i} says hello." for i in range(4)]
    plain.text_encoder._cache.clear()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda prompt: plain(prompt, **SMALL), prompts))
    for prompt, result in zip(prompts, together, strict=True):
        assert np.array_equal(plain(prompt, **SMALL).frames, result.frames)


def test_public_names() -> None:
    for name in magihuman_fast.__all__:
        assert getattr(magihuman_fast, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'Pipeline'"):
        _ = magihuman_fast.Pipeline
