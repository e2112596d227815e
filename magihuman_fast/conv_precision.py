"""How cuDNN's convolutions run inside the VAEs: reproducibly, and in the precision that was asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_depth = 0
_callers: tuple[bool, bool] = (False, False)


@contextmanager
def conv_precision(device: torch.device, allow_tf32: bool) -> Iterator[None]:
    """Run cuDNN's convolutions reproducibly, and in full float32 unless TF32 is allowed.

    cuDNN's settings belong to the process. The first of overlapping blocks saves the caller's, the last one restores
    them, so that threads cannot restore one another's.
    """
    global _depth, _callers
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with _lock:
        if _depth == 0:
            _callers = (cudnn.deterministic, cudnn.allow_tf32)
        _depth += 1
        cudnn.deterministic, cudnn.allow_tf32 = True, allow_tf32
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                cudnn.deterministic, cudnn.allow_tf32 = _callers
