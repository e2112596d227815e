"""What `load_components` is asked for where a caller names nothing but the CPU."""

from __future__ import annotations

from typing import Any

LOAD: dict[str, Any] = {
    "variant": "distill",
    "sr": None,
    "device": "cpu",
    "precision": "bf16",
    "text_encoder": None,
    "text_encoder_on": "auto",
    "image_vae": None,
    "audio_vae": None,
    "memory_limit": None,
    "kernels": None,
    "check_kernels": None,
    "on_load": None,
}
