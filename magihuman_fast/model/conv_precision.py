"""How cuDNN's convolutions run inside the VAEs: reproducibly, and in the precision that was asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_open_blocks = 0
_undo: list[Callable[[], None]] = []


@contextmanager
def conv_precision(device: torch.device, allow_tf32: bool) -> Iterator[None]:
    """Run cuDNN's convolutions reproducibly, and in full float32 unless TF32 is allowed: then as the process is set.

    cuDNN's settings belong to the process. Overlapping blocks share what they change of them, and the end of the last
    one takes it back, but for what somebody else has set to another value meanwhile, in torch's older terms
    (`allow_tf32`) or its newer ones (`fp32_precision`). Here only the newer ones are used, because reading the older
    one raises once a newer one differs from it; so it may while a block is open.
    """
    global _open_blocks
    if device.type != "cuda":
        yield
        return
    with _lock:
        _open_blocks += 1
    try:
        with _lock:
            _make_deterministic()
            if not allow_tf32:
                _forbid_tf32()
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            while _open_blocks == 0 and _undo:
                _undo.pop()()


def _make_deterministic() -> None:
    cudnn = torch.backends.cudnn
    if cudnn.deterministic:
        return
    cudnn.deterministic = True

    def undo() -> None:
        cudnn.deterministic = False

    _undo.append(undo)


def _forbid_tf32() -> None:
    """Set convolutions to float32, where their setting is read: their own, or the one above it that they inherit.

    What they inherit is changed there and not hidden behind a setting of their own, because that could not be taken
    back: torch's initial one reads "tf32", gives way to any above it, and cannot be set.
    """
    cudnn = torch.backends.cudnn
    conv = cudnn.conv  # type: ignore[attr-defined]
    if conv.fp32_precision != "tf32":
        return
    before, _ = _own_settings()
    cudnn.fp32_precision = "ieee"
    if conv.fp32_precision == "ieee":

        def undo() -> None:
            if _own_settings()[0] == "ieee":
                cudnn.fp32_precision = before

    else:
        cudnn.fp32_precision = before
        conv.fp32_precision = "ieee"

        def undo() -> None:
            if _own_settings()[1] == "ieee":
                conv.fp32_precision = "tf32"

    _undo.append(undo)


def _own_settings() -> tuple[str, str]:
    """Those of all of cuDNN and of its convolutions, "none" also where they read as what they inherit.

    To see it, what is inherited is "none" for a moment: no precision is higher.
    """
    backends, cudnn = torch.backends, torch.backends.cudnn
    of_all = backends.fp32_precision  # type: ignore[attr-defined]
    backends.fp32_precision = "none"  # type: ignore[attr-defined]
    of_cudnn = cudnn.fp32_precision
    cudnn.fp32_precision = "none"
    try:
        return of_cudnn, cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    finally:
        cudnn.fp32_precision = of_cudnn
        backends.fp32_precision = of_all  # type: ignore[attr-defined]
