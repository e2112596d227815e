"""Loading a pipeline's parts: where the text encoder goes, what is refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loading_cases import LOAD
from magihuman_fast import InputError, InsufficientMemory
from magihuman_fast.checkpoints import loading
from magihuman_fast.checkpoints.loading import Components, load_components, resolve_device
from magihuman_fast.codecs.audio_vae import AudioVAE
from magihuman_fast.codecs.text_encoder import TextEncoder, TextEncoderOnDisk
from magihuman_fast.runtime.memory_plan import MemoryPlan, ModelSizes


@pytest.fixture
def load(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Components]:
    """Loads the tiny checkpoint for a device that is not the CPU and holds nothing; without its audio VAE, which takes
    longer than all else."""
    sound = SimpleNamespace(weight=torch.zeros(1))
    monkeypatch.setattr(AudioVAE, "from_pretrained", lambda path, device: sound)
    monkeypatch.setattr(loading, "resolve_device", lambda device: torch.device("meta"))
    return lambda **options: load_components(tiny_checkpoint, **LOAD | options)


@pytest.mark.parametrize(
    ("place", "device", "kind"),
    [
        ("device", "meta", TextEncoder),
        ("cpu", "cpu", TextEncoder),
        ("disk", "meta", TextEncoderOnDisk),
    ],
)
def test_the_text_encoder_goes_where_it_is_sent(
    load: Callable[..., Components], place: str, device: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    read = kind.from_pretrained

    def record(*args: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
        sent.append((torch.device(device).type, dtype))
        return read(*args, device=device, dtype=dtype)

    monkeypatch.setattr(kind, "from_pretrained", record)
    parts = load(text_encoder_on=place)
    assert type(parts.text_encoder) is kind
    assert sent == [(device, torch.bfloat16)]
    assert parts.dit.device.type == "meta"


def test_without_room_on_the_device_the_text_encoder_stays_on_the_cpu(
    load: Callable[..., Components], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the byte: by default it moves, and where a place was asked for it is that or nothing."""
    needed: dict[str, int] = {}
    measure = loading.memory_plan

    def record(sizes: ModelSizes) -> list[MemoryPlan]:
        plans = measure(sizes)
        needed.update((plan.text_encoder, plan.needed_bytes) for plan in plans if plan.preset == "256p")
        return plans

    monkeypatch.setattr(loading, "memory_plan", record)
    with caplog.at_level("INFO", logger="magihuman_fast"):
        assert load().text_encoder.device.type == "meta"
        assert "the text encoder stays" not in caplog.text
        assert load(memory_limit=needed["device"]).text_encoder.device.type == "meta"
        assert load(memory_limit=needed["device"] - 1).text_encoder.device.type == "cpu"
        assert "the text encoder stays on the cpu" in caplog.text
    for place in ("device", "cpu"):
        with pytest.raises(InsufficientMemory, match="room for 256p by where the text encoder is kept"):
            load(text_encoder_on=place, memory_limit=needed[place] - 1)


def test_places_that_do_not_exist(tmp_path: Path) -> None:
    for place in ("gpu", None, ["cpu"]):
        with pytest.raises(
            InputError, match=r"text_encoder_on: expected one of auto, device, cpu, disk, got "
        ):
            # Before the folder is looked for.
            load_components(tmp_path / "absent", **LOAD | {"text_encoder_on": place})


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two GPUs, and with none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for there, auto in ((True, "cuda:1"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device() == torch.device(auto)
    for name in ("cpu", "cuda:0", "cuda:1"):
        assert resolve_device(name) == resolve_device(torch.device(name)) == torch.device(name)
    assert resolve_device("cuda") == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"device: 'cuda:2' not found; this machine has 2 CUDA devices"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"device: 'cuda' not found; this machine has 0 CUDA devices"):
        resolve_device("cuda")
    for name in ("meta", "mps", "gpu", None):
        with pytest.raises(InputError, match=r"device: expected 'auto', 'cpu' or 'cuda\[:N\]', got "):
            resolve_device(name)  # type: ignore[arg-type]


def test_progress_counts_the_bytes_of_each_model(load: Callable[..., Components]) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    load(sr="1080p", on_load=lambda name, done, total: seen.setdefault(name, []).append((done, total)))
    assert list(seen) == ["distill", "1080p_sr"]
    for steps in seen.values():
        read = [done for done, _ in steps]
        assert read == sorted(read)
        assert 0 < read[0] < read[-1]
        assert {total for _, total in steps} == {read[-1]}
