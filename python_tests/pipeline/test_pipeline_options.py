"""What a pipeline and a request are asked for arrives where it is used, or the published value in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from magihuman_fast import InputError, MagiHumanPipeline
from magihuman_fast.model.config import SUPER_RESOLUTIONS, VARIANTS
from magihuman_fast.pipeline import pipeline
from magihuman_fast.pipeline.request import check_request


def test_options_reach_what_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []
    parts = SimpleNamespace(dit="a model")
    monkeypatch.setattr(pipeline, "load_components", lambda root, **options: loads.append(options) or parts)
    monkeypatch.setattr(MagiHumanPipeline, "__init__", lambda self, **options: made.append(options))
    names = ("variant", "sr", "device", "precision", "on_load")
    names += ("text_encoder", "text_encoder_on", "image_vae", "audio_vae")
    options: dict[str, Any] = {name: object() for name in names}
    # What was checked anew is known when it is loaded.
    for check, later in ((None, None), (True, None), (False, False)):
        shared = {"memory_limit": object(), "kernels": object()}
        MagiHumanPipeline.from_pretrained("root", check_kernels=check, **shared, **options)
        assert loads.pop() == {"check_kernels": check, **shared, **options}
        assert made.pop() == {"check_kernels": later, **shared, "dit": "a model"}


def test_steps_as_published_or_as_asked_for() -> None:
    def steps(variant: str, sr: str | None, given: Any = None, sr_given: Any = None) -> tuple[int, int]:
        second = None if sr is None else SUPER_RESOLUTIONS[sr]
        request = check_request(VARIANTS[variant], second, 60, 448, 256, 2**64 - 1, given, sr_given, None)
        assert (request.seconds, request.seed) == (60, 2**64 - 1)
        return request.steps, request.sr_steps

    assert steps("distill", None) == (8, 0)
    assert steps("distill", "540p", 3, 7) == (3, 7)
    assert steps("base", "1080p") == (32, 5)
    assert steps("base", "1080p", 1000, 1) == (1000, 1)
    for refused in (0, 1001, 2.0):
        with pytest.raises(InputError, match=r"steps: expected an integer from 1 to 1000, got "):
            steps("distill", "540p", None, refused)
